"""minw.files: files are whole or as they were, and nothing else writes files."""

import ast
import errno
import os
import pathlib
import resource
import signal
import stat
import subprocess
import sys
import threading

import pytest

from minw import files
from resource_limits import limited

ROOT = pathlib.Path(files.__file__).parents[1]


def test_a_file_is_written(tmp_path):
  files.write(tmp_path / "text", "é\n")
  files.write(str(tmp_path / "bytes"), b"\0\xff")
  assert (tmp_path / "text").read_bytes() == b"\xc3\xa9\n"
  assert (tmp_path / "bytes").read_bytes() == b"\0\xff"
  assert sorted(os.listdir(tmp_path)) == ["bytes", "text"]


def test_the_content_is_synced_before_it_gets_the_name(tmp_path, monkeypatch):
  done, sync, replace = [], os.fsync, os.replace

  def kind(number):
    return "folder" if stat.S_ISDIR(os.fstat(number).st_mode) else "file"

  monkeypatch.setattr(os, "fsync", lambda number: done.append(kind(number))
                      or sync(number))
  monkeypatch.setattr(os, "replace", lambda *paths: done.append("name")
                      or replace(*paths))
  files.write(tmp_path / "a", "1")
  assert done == ["file", "name", "folder"]


def test_permissions(tmp_path):
  before = os.umask(0o027)
  try:
    files.write(tmp_path / "new", "1")
  finally:
    os.umask(before)
  (tmp_path / "old").touch()
  (tmp_path / "old").chmod(0o604)
  files.write(tmp_path / "old", "1")
  assert [stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("new",
                                                                      "old")] == [
      0o640, 0o604]


def test_a_link_is_followed_to_a_file_and_replaced_where_it_leads_nowhere(tmp_path):
  (tmp_path / "there").mkdir()
  (tmp_path / "there" / "file").write_text("before")
  (tmp_path / "link").symlink_to("there/file")
  (tmp_path / "nowhere").symlink_to("missing/file")
  files.write(tmp_path / "link", "after")
  files.write(tmp_path / "nowhere", "after")
  assert (tmp_path / "link").is_symlink()
  assert (tmp_path / "there" / "file").read_text() == "after"
  assert not (tmp_path / "nowhere").is_symlink()
  assert (tmp_path / "nowhere").read_text() == "after"
  assert not (tmp_path / "missing").exists()


def test_a_pipe_is_written_to(tmp_path):
  os.mkfifo(tmp_path / "pipe")
  with pytest.raises(OSError) as error:  # Without a reader it would wait forever.
    files.write(tmp_path / "pipe", "to nobody")
  assert error.value.filename == str(tmp_path / "pipe")
  with open(os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK), "rb") as reader:
    files.write(tmp_path / "pipe", "to the reader")
    assert reader.read() == b"to the reader"
  assert os.listdir(tmp_path) == ["pipe"]
  files.write("/dev/null", "")
  assert not pathlib.Path("/dev/null").is_file()


def test_a_folder_in_the_place_of_the_file_is_named(tmp_path):
  (tmp_path / "a").mkdir()
  with pytest.raises(IsADirectoryError) as error:
    files.write(tmp_path / "a", "1")
  assert error.value.filename == str(tmp_path / "a")
  assert os.listdir(tmp_path) == ["a"]


def test_a_name_of_the_greatest_length(tmp_path):
  name = "é" * 127
  files.write(tmp_path / name, "1")
  assert os.listdir(tmp_path) == [name]


def test_where_there_is_no_folder(tmp_path):
  with pytest.raises(FileNotFoundError) as error:
    files.write(tmp_path / "missing" / "a", "1")
  assert str(tmp_path / "missing") in error.value.filename


def test_a_disk_that_gets_full_leaves_what_was_there(tmp_path):
  files.write(tmp_path / "a", "before")
  with limited(resource.RLIMIT_FSIZE, 100):
    with pytest.raises(OSError) as error:
      files.write(tmp_path / "a", "x" * 101)
  assert (error.value.errno, error.value.filename) == (
      errno.EFBIG, str(tmp_path / "a"))
  assert (tmp_path / "a").read_text() == "before" and os.listdir(tmp_path) == ["a"]


@pytest.mark.parametrize("moment", ["fsync", "replace"])
@pytest.mark.parametrize("error", [OSError(errno.EIO, "fails"), KeyboardInterrupt()])
def test_whatever_ends_the_writing_leaves_what_was_there(
    moment, error, tmp_path, monkeypatch):
  files.write(tmp_path / "a", "before")

  def fail(*_):
    raise error

  monkeypatch.setattr(os, moment, fail)
  with pytest.raises(type(error)):
    files.write(tmp_path / "a", "after")
  assert (tmp_path / "a").read_text() == "before" and os.listdir(tmp_path) == ["a"]


def test_a_killed_process_leaves_what_was_there(tmp_path):
  files.write(tmp_path / "a", "before")
  killed = subprocess.run([sys.executable, "-c", (
      "import os, signal; from minw import files\n"
      "os.replace = lambda *_: os.kill(os.getpid(), signal.SIGKILL)\n"
      f"files.write({str(tmp_path / 'a')!r}, 'after')")],
      env={**os.environ, "PYTHONPATH": str(ROOT)})
  assert killed.returncode == -signal.SIGKILL
  assert (tmp_path / "a").read_text() == "before"
  assert len(os.listdir(tmp_path)) == 2
  (tmp_path / "mine.part").touch()
  files.remove_parts(tmp_path)
  assert sorted(os.listdir(tmp_path)) == ["a", "mine.part"]


def test_two_writers_of_one_file_do_not_meet(tmp_path):
  """The file is one writer's or the other's at any moment, and both succeed."""
  contents, errors = {letter * 5000 for letter in "ab"}, []
  files.write(tmp_path / "a", "a" * 5000)

  def write(content):
    try:
      for _ in range(30):
        files.write(tmp_path / "a", content)
    except OSError as error:
      errors.append(error)

  writers = [threading.Thread(target=write, args=(content,)) for content in contents]
  for writer in writers:
    writer.start()
  while any(writer.is_alive() for writer in writers):
    assert (tmp_path / "a").read_text() in contents
  assert not errors and os.listdir(tmp_path) == ["a"]


@pytest.mark.parametrize("code, raised", [(errno.EINVAL, False), (errno.EIO, True)])
def test_file_systems_that_cannot_sync_folders(code, raised, tmp_path, monkeypatch):
  sync = os.fsync

  def fail_for_folders(number):
    if stat.S_ISDIR(os.fstat(number).st_mode):
      raise OSError(code, "fails")
    sync(number)

  monkeypatch.setattr(os, "fsync", fail_for_folders)
  if raised:
    with pytest.raises(OSError):
      files.write(tmp_path / "a", "1")
  else:
    files.write(tmp_path / "a", "1")
  assert (tmp_path / "a").read_text() == "1"


def test_a_folder_is_synced_before_it_gets_its_name(tmp_path, monkeypatch):
  (tmp_path / "built" / "inside").mkdir(parents=True)
  for name in ("built/a", "built/inside/b"):
    (tmp_path / name).write_text(name)
  synced, sync = [], os.fsync
  monkeypatch.setattr(os, "fsync", lambda number: synced.append(os.path.relpath(
      os.readlink(f"/proc/self/fd/{number}"), tmp_path)) or sync(number))
  files.move_folder(tmp_path / "built", tmp_path / "target")
  assert sorted(synced[:4]) == ["built", "built/a", "built/inside", "built/inside/b"]
  assert synced[4:] == ["."]
  assert (tmp_path / "target" / "inside" / "b").read_text() == "built/inside/b"
  assert os.listdir(tmp_path) == ["target"]


# Calls that write or rename files elsewhere, each with what makes it right there.
ELSEWHERE = {
    "minw/bench/data.py": ["write_bytes"],  # Images in a temporary folder.
    "minw/workdir/checkpoint.py": ["rename"],  # Damaged checkpoints are moved aside.
    "minw/export/golden.py": ["save"],  # To memory.
    "minw/data/cifar.py": ["save"],  # To memory.
    "minw/data/download.py": ["open"],  # A download is appended to.
    "minw/data/imagenet.py": ["save"],  # To memory.
    "minw/data/mirror.py": ["open"],  # A lock.
    "minw/workdir/locks.py": ["open", "open"],  # Nothing is written to a lock.
    "minw/workdir/metrics.py": ["open"],  # Lines are appended.
    "minw/plots.py": ["savefig"],  # To memory.
    "minw/prepare.py": ["open"],  # A lock.
    "minw/sweeps.py": ["open"],  # A log is appended to.
}

_WRITES = ("write_text", "write_bytes", "tofile", "rename", "renames", "savefig",
           "savez",
           "savez_compressed", "savetxt", "NamedTemporaryFile", "mkstemp", "copy2",
           "copyfile", "copytree", "symlink_to", "hardlink_to")


def writing_calls(path):
  """Names of a source file's calls that write files, as far as their names tell."""
  found = []
  for node in ast.walk(ast.parse(path.read_text())):
    if not isinstance(node, ast.Call):
      continue
    function = node.func
    name = getattr(function, "attr", getattr(function, "id", None))
    owner = getattr(getattr(function, "value", None), "id", None)
    if name in ("open", "fdopen"):
      modes = [part.value for part in (*node.args, *(
          word.value for word in node.keywords if word.arg == "mode"))
          if isinstance(part, ast.Constant)]
      if any(isinstance(mode, str) and len(mode) < 4 and set(mode) & set("wax+")
             for mode in modes):
        found.append(name)
    elif (name in _WRITES or (owner, name) in (
        ("os", "replace"), ("shutil", "copy"), ("shutil", "move"), ("json", "dump"),
        ("pickle", "dump"))
          or name == "save" and owner not in ("checkpoint", "plots", "manager")
          and not isinstance(function, ast.Name)):
      found.append(name)
  return sorted(found)


def test_nothing_else_writes_files():
  found = {str(path.relative_to(ROOT)): writing_calls(path)
           for folder in ("minw", "launch", "experiments")
           for path in sorted((ROOT / folder).rglob("*.py"))}
  assert len(found) > 60
  assert found.pop("minw/files.py") == ["open", "open", "replace", "replace"]
  assert {path: calls for path, calls in found.items() if calls} == ELSEWHERE


def test_writing_calls_are_seen(tmp_path):
  (tmp_path / "a.py").write_text(
      "path.write_text('')\nopen(p, 'w')\npath.open('ab')\nopen(p)\nopen(p, 'rb')\n"
      "open(p, mode='r+')\nnp.save(p, a)\nos.replace(a, b)\n'a'.replace(a, b)\n"
      "fig.savefig(p)\n")
  assert writing_calls(tmp_path / "a.py") == [
      "open", "open", "open", "replace", "save", "savefig", "write_text"]
