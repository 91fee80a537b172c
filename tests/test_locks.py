"""minw.workdir.locks: one process has a workdir, however it ends."""

import os
import pathlib
import signal
import subprocess
import sys

import pytest

from minw import cloud
from minw import dependencies
from minw import errors
from minw.workdir import locks

CHILD = """
import sys, time
from minw.workdir import locks
lock = locks.take(sys.argv[1])
print(lock is not None, flush=True)
sys.stdin.read()
"""


@pytest.fixture
def child(tmp_path):
  """f(**options): a process that tries to take the lock, and says whether it has it."""
  started = []

  def start(environment={}, **options):
    process = subprocess.Popen(
        [sys.executable, "-c", CHILD, str(tmp_path)], text=True, stdin=subprocess.PIPE,
        stdout=subprocess.PIPE, cwd=pathlib.Path(locks.__file__).parents[2],
        env=os.environ | environment, **options)
    started.append(process)
    return process, process.stdout.readline() == "True\n"

  yield start
  for process in started:
    process.kill()
    process.communicate()


def test_one_of_two_has_it(tmp_path):
  first = locks.take(str(tmp_path))
  assert locks.is_held(str(tmp_path)) and locks.take(str(tmp_path)) is None
  first.close()
  assert not locks.is_held(str(tmp_path))
  with locks.take(str(tmp_path)):
    assert locks.is_held(str(tmp_path))


def test_what_was_never_locked_is_free(tmp_path):
  assert not locks.is_held(str(tmp_path)) and not locks.is_held(str(tmp_path / "no"))
  assert list(tmp_path.iterdir()) == []
  with pytest.raises(FileNotFoundError):
    locks.take(str(tmp_path / "no"))


def test_a_killed_process_gives_it_back(tmp_path, child):
  process, has_it = child()
  assert has_it and locks.is_held(str(tmp_path)) and locks.take(str(tmp_path)) is None
  process.send_signal(signal.SIGKILL)
  process.wait()
  assert not locks.is_held(str(tmp_path))


def test_a_process_is_kept_out(tmp_path, child):
  with locks.take(str(tmp_path)) as lock:
    assert not child()[1]
    # What it inherits counts only if it is told so, and is the file it looks for.
    assert not child(pass_fds=[lock.fileno()])[1]
    assert not child(locks.passed_on(lock)[0])[1]


def test_a_child_has_the_lock_of_its_parent(tmp_path, child):
  with locks.take(str(tmp_path)) as lock:
    process, has_it = child(locks.passed_on(lock)[0], pass_fds=locks.passed_on(lock)[1])
    assert has_it
  assert locks.is_held(str(tmp_path))
  process.communicate("")
  assert not locks.is_held(str(tmp_path))


@pytest.mark.parametrize("value", ["soon", "0", "-1", "inf", "nan"])
def test_times_to_live_that_cannot_be(value, monkeypatch):
  """A lease has one, and it is checked before the service is asked."""
  monkeypatch.setattr(dependencies, "installed", lambda package: True)
  monkeypatch.setattr(cloud.Path, "read_generation", lambda path: (
      b'{"owner": "", "seconds": 0.0}', 1))
  monkeypatch.setattr(cloud.Path, "replace_generation", lambda *arguments: None)
  monkeypatch.setenv("MINW_LEASE_SECONDS", value)
  with pytest.raises(errors.UsageError) as error:
    locks.take("gs://bucket/run")
  assert str(error.value) == (
      f"MINW_LEASE_SECONDS={value!r}: must be a positive number")
