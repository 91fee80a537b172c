"""Workdirs on gs://, on an emulator of Google Cloud Storage behind a strict proxy."""

import collections
import json
import os
import re
import time

import pytest

import gcs
from minw import cloud
from minw import files
from minw import paths
from minw.workdir import locks
from short_runs import EPOCH
from short_runs import outcome
from short_runs import run
from short_runs import run_with
from short_runs import tiny_config

pytestmark = [
    pytest.mark.slow,
    # TensorStore reports damaged files a second time, when nothing waits any more.
    pytest.mark.filterwarnings(
        "ignore::pytest.PytestUnhandledThreadExceptionWarning",
        "ignore::pytest.PytestUnraisableExceptionWarning",
        "ignore::ResourceWarning"),
]


@pytest.fixture(scope="module")
def emulator(tmp_path_factory):
  with gcs.emulator(tmp_path_factory.mktemp("gcs")) as service:
    with pytest.MonkeyPatch.context() as patch:
      for name, value in (service.environment | {"MINW_LEASE_SECONDS": "3"}).items():
        patch.setenv(name, value)
      yield service


@pytest.fixture
def service(emulator):
  emulator.requests.clear()
  yield emulator
  emulator.before = emulator.after = lambda request: None
  emulator.seconds_between_writes = 0.0


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
  service.after = lambda request: next(answers, None) if request.kind == "write" else None
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
  with locks.take(str(folder)) as lease:
    files.write(folder / "status.json", "1")
    successor = json.dumps({"owner": "a successor", "seconds": 60}).encode()
    service.write(f"{folder.key}/lease", successor)
    service.write(f"{folder.key}/status.json", b"of the successor")
    time.sleep(2)  # The lease would be renewed.
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


def test_a_run_is_that_of_this_machine(service, folder, expected, tmp_path):
  assert run(tiny_config(), folder)["state"] == "done"
  assert ended(service, folder, tmp_path) == expected
  assert not os.path.exists("gs:")
  # A second start finds that all is done.
  service.requests.clear()
  assert run(tiny_config(), folder)["state"] == "done"
  assert {request.name.rpartition("/")[2] for request in service.requests
          if request.kind == "write"} <= {"lease", "config.json"}


def test_requests_of_a_report_and_of_a_step(service, folder):
  counts = []
  run_with(lambda step, _: counts.append(len(service.requests)), tiny_config(), folder)
  reports = [counts[(i + 1) * EPOCH] - counts[i * EPOCH] for i in range(3)]
  assert max(reports) <= 200, reports
  renewals = 4
  within = counts[EPOCH - 1] - counts[0]
  assert within <= renewals  # The lease is renewed.


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
    if request.kind in ("write", "copy", "delete") and request.name.startswith(
        folder.key):
      counts[kind] += 1
      if counts[kind] <= 2:
        copies[kind] = service.contents(f"{folder.key}/")

  service.before = copy
  run(tiny_config(), folder)
  service.before = lambda request: None
  return copies


def test_a_run_killed_at_any_kind_of_request_goes_on(
    service, folder, expected, tmp_path, monkeypatch):
  copies = copies_of_a_run(service, folder)
  assert len(copies) >= 12
  monkeypatch.setenv("MINW_LEASE_SECONDS", "0.5")
  for i, (moment, copy) in enumerate(copies.items()):
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
