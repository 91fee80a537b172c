"""Workdirs on gs://, on an emulator of Google Cloud Storage behind a strict proxy."""

import collections
import contextlib
import functools
import gc
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest

import gcs
from minw import cloud
from minw import evaluate
from minw import exit_codes
from minw import files
from minw import outbox
from minw import pack
from minw import packed
from minw import paths
from minw import train
from minw import verify
from minw.report import records
from minw.workdir import board
from minw.workdir import checkpoint
from minw.workdir import locks
from minw.workdir import run_files
from short_runs import EPOCH
from short_runs import Stop
from short_runs import experiment_of
from short_runs import lines_of
from short_runs import outcome
from short_runs import run
from short_runs import run_with
from short_runs import stop_before
from short_runs import tiny_config
from short_runs import write_config

pytestmark = [
    # TensorStore reports damaged files a second time, when nothing waits any more.
    pytest.mark.filterwarnings(
        "ignore::pytest.PytestUnhandledThreadExceptionWarning",
        "ignore::pytest.PytestUnraisableExceptionWarning",
        "ignore::ResourceWarning"),
]


@pytest.fixture
def service(emulator, monkeypatch):
  monkeypatch.setenv("MINW_LEASE_SECONDS", "3")
  emulator.requests.clear()
  yield emulator
  emulator.before = emulator.after = lambda request: None
  emulator.seconds_between_writes, emulator.one_by_one = 0.0, False
  gc.collect()  # Orbax's coroutines of failed saves warn here, and not in other tests.


@pytest.fixture
def folder(service, request):
  """The path of a folder of this test alone."""
  return paths.at(f"gs://bucket/{re.sub(r'[^a-z0-9_]+', '-', request.node.name)}")


def download(service, folder, target):
  """Copies a workdir to a folder of this machine."""
  for name, content in service.contents(f"{folder.key}/").items():
    path = target / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
  return target


def ended(service, folder, target):
  """The `outcome` of the run in a workdir on gs://."""
  return outcome(download(service, folder, target))


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
  """The `outcome` of an uninterrupted run on this machine."""
  workdir = tmp_path_factory.mktemp("local") / "run"
  run(tiny_config(), workdir)
  return outcome(workdir)


# --- Files.


def test_files_and_folders(service, folder):
  assert not folder.exists() and not folder.is_dir() and list(folder.iterdir()) == []
  files.write(folder / "a", "é\n")
  files.write(folder / "sub/b", b"\0")
  assert service.contents(f"{folder.key}/") == {"a": b"\xc3\xa9\n", "sub/b": b"\0"}
  assert (folder / "a").is_file() and not (folder / "a").is_dir()
  assert folder.is_dir() and (folder / "sub").is_dir() and not folder.is_file()
  assert not (folder / "su").exists()  # It is no folder, but the beginning of a name.
  assert list(folder.iterdir()) == [folder / "a", folder / "sub"]
  assert list(folder.walk()) == [(folder, ["sub"], ["a"]), (folder / "sub", [], ["b"])]
  assert (folder / "a").read_text() == "é\n"
  assert abs((folder / "a").stat().st_mtime - time.time()) < 60
  (folder / "sub").rename(folder / "other/place")
  assert set(service.contents(f"{folder.key}/")) == {"a", "other/place/b"}
  (folder / "a").unlink()
  assert not (folder / "a").exists()
  for read in ((folder / "a").read_bytes, (folder / "a").stat):
    with pytest.raises(FileNotFoundError) as error:
      read()
    assert error.value.filename == f"{folder}/a"


def test_writes_of_others_are_seen_at_once(service, folder):
  files.write(folder / "a", "1")
  assert len(list(folder.iterdir())) == 1
  service.write(f"{folder.key}/a", b"longer")
  service.write(f"{folder.key}/b", b"new")
  assert (folder / "a").read_text() == "longer" and len(list(folder.iterdir())) == 2


def test_a_lost_answer_is_no_conflict(service, folder):
  answers = iter([503])
  service.after = lambda request: (
      next(answers, None) if request.kind == "write" else None)
  files.write(folder / "a", "1")
  assert (folder / "a").read_text() == "1"
  assert [request.kind for request in service.requests].count("write") == 2


def test_only_the_owner_of_a_folder_writes(service, folder):
  owner = [True]
  with cloud.owning(folder, lambda: owner[0]):
    files.write(folder / "a", "1")
    service.write(f"{folder.key}/a", b"of a process that has lost the folder")
    files.write(folder / "a", "2")
    assert (folder / "a").read_text() == "2"
    owner[0] = False
    service.write(f"{folder.key}/a", b"of the next owner")
    for name in ("a", "b"):
      with pytest.raises(OSError, match="another process") as error:
        files.write(folder / name, "3")
      assert error.value.filename == f"{folder}/{name}"
  assert service.contents(f"{folder.key}/") == {"a": b"of the next owner"}


def test_errors_name_the_object(service, folder, monkeypatch):
  monkeypatch.setattr(cloud, "_PATIENCE", 0.1)
  for status, kind, words in ((403, PermissionError, "denies access"),
                              (401, PermissionError, "denies access"),
                              (503, OSError, "cannot be reached"),
                              (500, OSError, "cannot be reached")):
    service.before = lambda request: status
    for action in ((folder / "a").read_bytes, (folder / "a").exists, folder.is_dir,
                   (folder / "a").unlink,
                   lambda: (folder / "a").replace_generation(b"", 0, 0.1),
                   lambda: list(folder.walk())):
      with pytest.raises(kind, match=words) as error:
        action()
      assert error.value.errno and error.value.filename.startswith(str(folder))
  service.before = lambda request: None
  with pytest.raises(OSError, match="there is no such bucket: 'gs://absent'"):
    paths.exists("gs://absent/run/config.json")
  gc.collect()  # The library does not close the connections of refused downloads.


def test_a_thread_writes_what_its_process_owns(service, folder):
  """A process that has lost its folder meanwhile replaces nothing of its successor."""
  owner, done = [True], threading.Event()
  service.before = lambda request: None if done.wait(20) else 500
  with cloud.owning(folder, lambda: owner[0]), pytest.raises(
      OSError, match="another process"), outbox.used(folder):
    begun = time.monotonic()
    files.write(folder / "a", "1")
    files.write(folder / "b", "1")
    assert time.monotonic() - begun < 1
    done.set()
    outbox.wait(folder)
    assert service.contents(f"{folder.key}/") == {"a": b"1", "b": b"1"}
    owner[0] = False
    service.write(f"{folder.key}/a", b"of the next owner")
    files.write(folder / "a", "2")
    files.write(folder / "b", "2")
  assert service.contents(f"{folder.key}/") == {"a": b"of the next owner", "b": b"1"}


# --- Leases.


def test_one_of_two_has_a_lease(service, folder):
  with locks.take(str(folder)) as lease:
    assert locks.is_held(str(folder)) and locks.take(str(folder)) is None
    assert lease.is_held()
  assert not locks.is_held(str(folder))
  with locks.take(str(folder)):
    assert locks.is_held(str(folder)) and not lease.is_held()


def test_a_lease_that_is_not_renewed_is_taken_over(service, folder):
  files.write(folder / "lease", json.dumps({"owner": "a dead process", "seconds": 2}))
  begun = time.monotonic()
  with locks.take(str(folder)):
    assert 2 <= time.monotonic() - begun < 10
    time.sleep(4)  # It is renewed meanwhile.
    assert locks.is_held(str(folder)) and locks.take(str(folder)) is None


def test_a_lease_is_lost_to_a_successor(service, folder):
  lost = threading.Event()
  with locks.take(str(folder), lost.set) as lease:
    files.write(folder / "status.json", "1")
    assert not lost.wait(1)
    successor = json.dumps({"owner": "a successor", "seconds": 60}).encode()
    service.write(f"{folder.key}/lease", successor)
    service.write(f"{folder.key}/status.json", b"of the successor")
    assert lost.wait(10)  # The lease would be renewed.
    assert not lease.is_held()
    with pytest.raises(OSError, match="another process"):
      files.write(folder / "status.json", "2")
  assert service.contents(f"{folder.key}/") == {
      "lease": successor, "status.json": b"of the successor"}


def test_a_damaged_lease_is_nobodys(service, folder):
  service.write(f"{folder.key}/lease", b'{"owner": 3')
  assert not locks.is_held(str(folder))
  with locks.take(str(folder)):
    assert locks.is_held(str(folder))


def test_a_child_shares_a_lease(service, folder, monkeypatch):
  with locks.take(str(folder)) as lease:
    environment, numbers = locks.passed_on(lease)
    assert numbers == ()
    for name, value in environment.items():
      monkeypatch.setenv(name, value)
    with locks.take(str(folder)) as inherited:
      time.sleep(4)  # Both renew it.
      assert lease.is_held() and inherited.is_held()
    assert lease.is_held()
  assert not locks.is_held(str(folder))


# --- Runs.


@pytest.mark.slow
def test_a_run_is_that_of_this_machine(service, folder, expected, tmp_path):
  assert run(tiny_config(), folder)["state"] == "done"
  assert ended(service, folder, tmp_path) == expected
  assert not os.path.exists("gs:")
  # A second start finds that all is done.
  service.requests.clear()
  assert run(tiny_config(), folder)["state"] == "done"
  assert {request.name.rpartition("/")[2] for request in service.requests
          if request.kind == "write"} <= {"lease", "config.json"}


@pytest.mark.slow
def test_requests_of_a_report_and_of_a_step(service, folder):
  at = []
  run_with(lambda step, _: at.append(len(service.requests)), tiny_config(), folder)

  def between(first, last):  # Leases are renewed at any time.
    return [request for request in service.requests[at[first]:at[last]]
            if not request.name.endswith("/lease")]

  assert between(2, EPOCH - 1) == []
  counts = [len(between(i * EPOCH - 1, (i + 1) * EPOCH - 1)) for i in (1, 2, 3)]
  assert 50 < max(counts) <= 200, counts


@pytest.mark.slow
def test_requests_of_a_save_that_removes_two_checkpoints(service, folder):
  tree = {"params": np.arange(6.0), "step": np.int32(3)}
  with checkpoint.open_manager(str(folder)) as manager:
    for step, accuracy in enumerate((0.5, 0.1, 0.2, 0.9)):
      begun = len(service.requests)
      checkpoint.save(manager, step, tree, accuracy, {"journal": []})
      manager.wait_until_finished()
    assert run_files.checkpoints(str(folder)).keys() == {2, 3}
  left = {name.split("/")[0] for name in service.contents(f"{folder.key}/checkpoints/")}
  assert left == {"2", "3"}
  assert 100 < len(service.requests) - begun <= 190  # A report makes ten more.


@pytest.mark.slow
def test_training_does_not_wait_for_records(service, folder, expected, tmp_path):
  """Writes of records that the first report has begun end some steps later."""
  trained, waited = threading.Event(), collections.Counter()

  def hold(request):
    name = request.name.removeprefix(f"{folder.key}/")
    if request.kind == "write" and name in ("metrics.jsonl", "run.json", "status.json"):
      if reported and not trained.is_set():
        waited[name] += trained.wait(60)

  reported = []

  def act(step, _):
    if step == EPOCH - 1:
      reported.append(step)
    if step == EPOCH + 5:
      trained.set()

  service.before = hold
  run_with(act, tiny_config(), folder)
  assert waited and all(waited.values())
  assert ended(service, folder, tmp_path) == expected


@pytest.mark.slow
def test_a_record_that_cannot_be_written_ends_a_run(
    service, folder, expected, tmp_path, monkeypatch):
  """This report or the next one finds the error, and the run resumes."""
  monkeypatch.setattr(cloud, "_PATIENCE", 0.5)
  at = []

  def refuse(request):
    fails = request.kind == "write" and request.name.endswith("/metrics.jsonl")
    return 503 if fails and at and at[-1] >= EPOCH - 1 else None

  service.before = refuse
  with pytest.raises(train.StorageError, match="metrics.jsonl.*cannot be reached"):
    run_with(lambda step, _: at.append(step), tiny_config(), folder)
  assert at[-1] in (EPOCH - 1, 2 * EPOCH - 1)
  assert run_files.read_status(str(folder))["state"] == "stopped"
  service.before = lambda request: None
  assert run(tiny_config(), folder)["state"] == "done"
  assert ended(service, folder, tmp_path) == expected


def kind_of(request, folder):
  """A request without what differs between steps and is drawn by chance."""
  name = request.name.removeprefix(f"{folder.key}/")
  name = re.sub(r"[0-9a-f]{32}", "H", re.sub(r"checkpoints/\d+", "checkpoints/N", name))
  return f"{request.kind} {re.sub(r'events.out.*', 'events', name)}"


def copies_of_a_run(service, folder):
  """Contents of the workdir before mutating requests, the second of each kind."""
  copies, counts = {}, collections.Counter()

  def copy(request):
    kind = kind_of(request, folder)
    if request.kind in gcs.CHANGES and request.name.startswith(folder.key):
      counts[kind] += 1
      if counts[kind] <= 2:
        copies[kind] = service.contents(f"{folder.key}/")

  service.before, service.one_by_one = copy, True
  run(tiny_config(), folder)
  service.before, service.one_by_one = lambda request: None, False
  return copies


@pytest.mark.slow
def test_a_run_killed_at_any_kind_of_request_goes_on(
    service, folder, expected, tmp_path, monkeypatch):
  """With MINW_MOMENTS=all at each kind, otherwise at twelve or more of them.

  The service accepts a write a second for each object.
  """
  service.seconds_between_writes = 1.0
  copies = copies_of_a_run(service, folder)
  every = 1 if os.environ.get("MINW_MOMENTS") == "all" else len(copies) // 12
  assert every > 0
  monkeypatch.setenv("MINW_LEASE_SECONDS", "0.5")
  for i, (moment, copy) in enumerate(list(copies.items())[::every]):
    for name, content in copy.items():
      if name != "lease":
        service.write(f"{folder.key}-{i}/{name}", content)
    try:
      resumed = paths.at(f"{folder}-{i}")
      assert run(tiny_config(), resumed)["state"] == "done"
      assert ended(service, resumed, tmp_path / str(i)) == expected
    except BaseException as error:
      error.add_note(moment)
      raise


@pytest.mark.slow
def test_a_killed_process_goes_on(service, folder, expected, tmp_path):
  write_config(tmp_path / "config.py", tiny_config())
  command = [sys.executable, "-m", "minw.main", f"--config={tmp_path}/config.py",
             f"--workdir={folder}"]
  process = subprocess.Popen(command, stderr=subprocess.DEVNULL)

  def kill(request):
    if request == ("write", f"{folder.key}/checkpoints/38/commit_success.txt"):
      process.kill()
      return 503  # It does not arrive.
    return None

  service.before = kill
  assert process.wait(300) == -signal.SIGKILL
  service.before = lambda request: None
  assert list(run_files.checkpoints(str(folder))) == [EPOCH]
  assert f"{folder.key}/checkpoints/38/tree/_METADATA" in service.objects()
  again = subprocess.run(command, capture_output=True, text=True)
  assert again.returncode == 0, again.stderr
  assert json.loads(again.stdout)["state"] == "done"
  assert ended(service, folder, tmp_path / "run") == expected


@pytest.mark.slow
def test_a_terminated_run_goes_on_with_a_write_a_second_for_each_object(
    service, folder, expected, tmp_path):
  service.seconds_between_writes = 1.0

  def terminate(step, _):
    if step == EPOCH + 6:
      os.kill(os.getpid(), signal.SIGTERM)

  status = run_with(terminate, tiny_config(), folder)
  assert status == {"state": "preempted", "step": EPOCH + 7}
  assert run_files.read_status(str(folder)) == status
  begun = []
  run_with(lambda step, _: begun.append(step), tiny_config(), folder)
  assert begun == list(range(EPOCH + 7, 4 * EPOCH))
  assert ended(service, folder, tmp_path) == expected


@pytest.mark.slow
def test_a_damaged_checkpoint_is_moved_aside(service, folder, expected, tmp_path):
  with pytest.raises(Stop):
    run_with(stop_before(2 * EPOCH + 3), tiny_config(), folder)
  damaged = f"{folder.key}/checkpoints/38/"
  before = set(service.contents(damaged))
  for name in service.objects(damaged):
    if "/d/" in name:
      service.write(name, b"damage")
  assert run(tiny_config(), folder)["state"] == "done"
  found = service.contents(f"{folder.key}/damaged_checkpoints/")
  assert {name.partition("/")[2] for name in found} == before
  assert {name.partition(".")[0] for name in found} == {"38"}
  result = ended(service, folder, tmp_path)
  assert result == expected


@pytest.mark.slow
@pytest.mark.parametrize("begins", [f"step {EPOCH + 2}", "checkpoints/38/"])
def test_a_minute_without_the_service(service, folder, expected, tmp_path, begins):
  """Training goes on, or it ends so that it can be resumed."""
  outage = []

  def fail(request):
    if begins in request.name and request.kind == "write" and not outage:
      outage.append(time.monotonic() + 60)
    return 503 if outage and time.monotonic() < outage[0] else None

  def begin(step, _):
    if begins == f"step {step}":
      outage.append(time.monotonic() + 60)

  service.before = fail
  begun = time.monotonic()
  with contextlib.suppress(train.StorageError):
    run_with(begin, tiny_config(), folder)
  assert outage and time.monotonic() - begun < 240
  time.sleep(max(outage[0] - time.monotonic(), 0))
  assert run(tiny_config(), folder)["state"] == "done"
  assert ended(service, folder, tmp_path) == expected


@pytest.mark.slow
def test_events_that_cannot_be_uploaded_end_no_run(
    service, folder, expected, tmp_path, monkeypatch, caplog):
  monkeypatch.setattr(board, "_UPLOAD_SECONDS", 1.0)
  monkeypatch.setattr(cloud, "_PATIENCE", 1.0)
  service.before = lambda request: (
      503 if "/tensorboard/" in request.name and request.kind == "write" else None)
  assert run(tiny_config(), folder)["state"] == "done"
  assert "tensorboard cannot be written" in caplog.text
  download(service, folder, tmp_path)
  assert lines_of(tmp_path) == expected["lines"]
  assert not (tmp_path / "tensorboard").exists()


@pytest.mark.slow
def test_commands_read_a_run(service, folder, expected, tmp_path):
  config = tiny_config()
  run(config, folder)
  status = expected["status"]
  result = evaluate.evaluate_workdir(str(folder))
  assert (result["step"], result["accuracy"]) == (4 * EPOCH, status["test_accuracy"])
  packed.write(str(tmp_path / "net.minw"), pack.pack_workdir(str(folder), "best"))
  assert verify.verify_workdir(str(folder), str(tmp_path / "net.minw"), "best") == 0
  (record,), left_out = records.read([str(folder)])
  assert not left_out and record["name"] == str(folder)
  assert record["test_accuracy"] == status["test_accuracy"]
  assert records.collect([str(folder)], str(tmp_path / "study.jsonl"))[0] == [
      str(folder)]
  assert len(records.read([str(tmp_path / "study.jsonl")])[0]) == 1
  source = train.read_source(str(folder), experiment_of(config))
  last = expected["checkpoints"][4 * EPOCH]
  kernel = np.asarray(source["params"]["conv1"]["kernel"])
  assert kernel.tobytes() == last["params/conv1/kernel"][2]


@pytest.mark.slow
def test_refusals(service, folder, command, tmp_path):
  """One line and code 2, and nothing is made on this machine."""
  write_config(tmp_path / "config.py", tiny_config())
  run = functools.partial(command, folder=tmp_path, env=service.environment,
                          trains=False)
  before = sorted(tmp_path.rglob("*"))
  for where, words, status in (
      ("gs://absent/run", "there is no such bucket", None),
      (str(folder), "denies access", 403), (str(folder), "denies access", 401)):
    service.before = lambda request: status
    for argv in (("minw.main", "--config=config.py", f"--workdir={where}"),
                 ("minw.evaluate", f"--workdir={where}"),
                 ("minw.pack", f"--workdir={where}", "--out=net.minw"),
                 ("minw.report", "tables", where),
                 ("minw.main", "--config=config.py", "--workdir=x",
                  f"--config.init_from={where}")):
      found = run(*argv)
      assert found.code == 2 and found.err.count("\n") == 1, found
      assert words in found.err and where.partition("/run")[0] in found.err
  assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.slow
def test_a_missing_right_to_the_bucket(service, folder, command, tmp_path):
  """Orbax asks for the properties of a bucket. Rights to its objects do not suffice."""
  run(tiny_config(num_epochs=1), folder)
  write_config(tmp_path / "config.py", tiny_config(num_epochs=1))
  service.before = lambda request: 403 if request.kind == "bucket" else None
  for argv in (("minw.main", "--config=config.py", f"--workdir={folder}-new"),
               ("minw.evaluate", f"--workdir={folder}")):
    found = command(*argv, folder=tmp_path, env=service.environment, trains=False)
    assert found.code == 2 and found.err.count("\n") == 1, found
    assert ("Orbax needs the permission storage.buckets.get, which"
            " roles/storage.bucketViewer grants") in found.err
  assert service.objects(f"{folder.key}-new/") == {}
  gc.collect()


@pytest.mark.slow
def test_two_processes(service, folder, tmp_path):
  write_config(tmp_path / "config.py", tiny_config(num_epochs=2))
  port = gcs.free_port()
  processes = [subprocess.Popen(
      [sys.executable, "-m", "minw.main", f"--config={tmp_path}/config.py",
       f"--workdir={folder}", "--distributed", f"--coordinator=127.0.0.1:{port}",
       "--num_processes=2", f"--process_id={i}"],
      stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for i in range(2)]
  outputs = [process.communicate(timeout=400) for process in processes]
  assert [process.returncode for process in processes] == [0, 0], outputs
  assert run_files.read_status(str(folder))["state"] == "done"
  result = evaluate.evaluate_workdir(str(folder))
  assert result["accuracy"] == run_files.read_status(str(folder))["test_accuracy"]


def successor_takes(service, folder):
  """Makes another process the owner of a folder."""
  service.write(f"{folder.key}/lease", json.dumps(
      {"owner": "a successor", "seconds": 60}).encode())


def complete(service, folder):
  """The parts of checkpoints that are said to be complete."""
  return [name for name in service.objects(f"{folder.key}/checkpoints/")
          if name.endswith("/commit_success.txt")]


@pytest.mark.slow
def test_a_replaced_process_begins_no_checkpoint(service, folder, monkeypatch):
  monkeypatch.setenv("MINW_LEASE_SECONDS", "600")  # No renewal finds the successor.
  with pytest.raises(train.StorageError, match="another process"):
    run_with(lambda step, _: step == EPOCH - 1 and successor_takes(service, folder)
             and None, tiny_config(), folder)
  assert service.objects(f"{folder.key}/checkpoints/") == {}


@pytest.mark.slow
def test_a_replaced_process_completes_no_checkpoint(service, folder, monkeypatch):
  monkeypatch.setenv("MINW_LEASE_SECONDS", "600")

  def replace(request):
    if request == ("write", f"{folder.key}/checkpoints/19/tree/manifest.ocdbt"):
      successor_takes(service, folder)

  service.before = replace
  with pytest.raises(train.StorageError, match="another process"):
    run(tiny_config(), folder)
  assert f"{folder.key}/checkpoints/19/tree/manifest.ocdbt" in service.objects()
  assert complete(service, folder) == []


@pytest.mark.slow
@pytest.mark.parametrize("moment", [
    "tree/ocdbt.process_0/d/", "tree/d/", "tree/commit_success.txt", "run/metadata"])
def test_a_process_frozen_amid_a_checkpoint_ends_when_it_wakes(
    service, folder, tmp_path, moment):
  """A successor writes the same checkpoint, before the first process goes on.

  The write of run/metadata is one that may arrive late. The next start mends that.
  """
  config = tiny_config(num_epochs=1)
  run(config, tmp_path / "expected")
  write_config(tmp_path / "config.py", config)
  first = subprocess.Popen(
      [sys.executable, "-m", "minw.main", f"--config={tmp_path}/config.py",
       f"--workdir={folder}"], stderr=subprocess.PIPE, text=True)
  frozen = threading.Event()

  def freeze(request):
    if request.kind == "write" and not frozen.is_set() and request.name.startswith(
        f"{folder.key}/checkpoints/19/{moment}"):
      os.kill(first.pid, signal.SIGSTOP)
      frozen.set()

  service.before = freeze
  try:
    assert frozen.wait(300)
    assert f"{folder.key}/checkpoints/19/commit_success.txt" not in service.objects()
    assert run(config, folder)["state"] == "done"
  finally:
    os.kill(first.pid, signal.SIGCONT)
  told = first.communicate(timeout=200)[1]
  assert first.returncode == exit_codes.IO_ERROR, told
  assert told.splitlines()[-1] == (
      f"error: {folder}: another process has taken over the run, because this one was"
      " suspended or cut off")
  if moment == "run/metadata":
    assert run(config, folder)["state"] == "done"
  assert evaluate.evaluate_workdir(str(folder))["step"] == EPOCH
  assert ended(service, folder, tmp_path / "run") == outcome(tmp_path / "expected")


# --- Sweeps.

# A run that takes its lock as minw.main does, and some seconds.
_RUN = """
import sys, time
from minw import files, paths
from minw.workdir import locks
workdir = paths.at(sys.argv[1])
with locks.take(sys.argv[1]):
  files.write(workdir / f"start {time.time_ns()}", "")
  files.write(workdir / "status.json", '{"state": "running", "step": 1}')
  time.sleep(float(sys.argv[2]))
  files.write(workdir / "status.json", '{"state": "done", "step": 2}')
print("the end")
"""
_SWEEP = """
import sys
from minw import paths, sweeps
folder = paths.at(sys.argv[1])
runs = [sweeps.Run(name, folder / name, (), None, ()) for name in ("a", "b", "c")]
sweeps._REMOTE_POLL_SECONDS = 0.5
sweeps.run_all(runs, jobs=1, retries=1, steps={}, command=lambda run: [
    sys.executable, "-c", sys.argv[2], str(run.workdir), "2"])
"""


@pytest.mark.slow
def test_a_frozen_sweep_loses_its_run_to_another(service, folder):
  """No run is trained to its end twice, and no record is lost."""
  def start():
    return subprocess.Popen(
        [sys.executable, "-c", _SWEEP, str(folder), _RUN], text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        env=os.environ | {"PYTHONPATH": str(gcs.ROOT)})

  def running(name):
    return f"{folder.key}/{name}/status.json" in service.objects()

  first = start()
  while not running("a"):
    time.sleep(0.1)
  # The sweep and its run stop, as on a machine that is suspended.
  child = int(subprocess.run(["pgrep", "-P", str(first.pid)], capture_output=True,
                             text=True, check=True).stdout)
  for pid in (first.pid, child):
    os.kill(pid, signal.SIGSTOP)
  second = start()
  try:
    output = second.communicate(timeout=200)[0]
  finally:
    for pid in (first.pid, child):
      os.kill(pid, signal.SIGCONT)
  after = service.contents(f"{folder.key}/")
  told = first.communicate(timeout=200)[0]
  assert (first.returncode, second.returncode) == (0, 0), (told, output)
  assert "a: another sweep has taken over" in told
  assert "a: done" in output and "b: done" in output and "c: done" in output
  assert service.contents(f"{folder.key}/") == after  # The first changed nothing.
  starts = collections.Counter(name[0] for name in after if "start" in name)
  assert starts == {"a": 2, "b": 1, "c": 1}
  for name in "abc":
    assert json.loads(after[f"{name}/status.json"]) == {"state": "done", "step": 2}
    assert json.loads(after[f"{name}/sweep.json"])["failures"] == 0
    assert after[f"{name}/log.txt"].endswith(b"the end\n")


@pytest.mark.slow
def test_two_sweeps_share_the_work(service, folder):
  processes = [subprocess.Popen(
      [sys.executable, "-c", _SWEEP, str(folder), _RUN],
      env=os.environ | {"PYTHONPATH": str(gcs.ROOT)}) for _ in range(2)]
  assert [process.wait(200) for process in processes] == [0, 0]
  found = service.contents(f"{folder.key}/")
  starts = collections.Counter(name[0] for name in found if "start" in name)
  assert starts == {"a": 1, "b": 1, "c": 1}
