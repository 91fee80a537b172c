"""minw.outbox: a thread writes files on gs://, in order, and its errors are raised."""

import errno
import threading
import time

import pytest

from minw import cloud
from minw import dependencies
from minw import files
from minw import outbox

RUN = "gs://bucket/run"


class Service:
  """What stands for the service: it waits while it is closed.

  Attributes:
    written: Names and contents in the order in which they were written.
    open: Event that lets writes pass.
    failing: Names that cannot be written.
  """

  def __init__(self):
    self.written = []
    self.open = threading.Event()
    self.open.set()
    self.begun = threading.Event()
    self.failing = set()

  def put(self, path, content):
    self.begun.set()
    assert self.open.wait(20)
    if path.name in self.failing:
      raise OSError(errno.ESTALE, "another process", str(path))
    self.written.append((path.name, content.decode()))


@pytest.fixture
def service(monkeypatch):
  service = Service()
  monkeypatch.setattr(cloud.Path, "put", lambda path, data: service.put(path, data))
  monkeypatch.setattr(dependencies, "installed", lambda package: True)
  before = threading.active_count()
  yield service
  service.open.set()
  end = time.monotonic() + 20
  while threading.active_count() > before:  # No thread is left.
    assert time.monotonic() < end
    time.sleep(0.01)


def write(name, content):
  files.write(f"{RUN}/{name}", content)


def test_writes_do_not_wait_and_the_end_does(service):
  service.open.clear()
  with outbox.used(RUN):
    write("a", "1")
    assert service.begun.wait(20)
    for name, content in (("b", "1"), ("a", "2"), ("b", "2"), ("c", "1")):
      write(name, content)
    assert service.written == []
    threading.Timer(0.2, service.open.set).start()
  # The first b was replaced before its turn had come.
  assert service.written == [("a", "1"), ("a", "2"), ("b", "2"), ("c", "1")]
  service.open.clear()
  threading.Timer(0.2, service.open.set).start()
  write("a", "3")  # Outside the context it waits.
  assert service.written[-1] == ("a", "3")


def test_wait(service):
  outbox.wait(RUN)  # There is nothing to wait for.
  with outbox.used(RUN):
    service.open.clear()
    write("a", "1")
    threading.Timer(0.2, service.open.set).start()
    outbox.wait(RUN)
    assert service.written == [("a", "1")]


def test_an_error_is_raised_at_the_next_write_and_at_the_end(service):
  service.failing = {"b"}
  with pytest.raises(OSError) as error, outbox.used(RUN):
    service.open.clear()
    for name in "abc":
      write(name, "1")
    service.open.set()
    with pytest.raises(OSError):
      outbox.wait(RUN)
    for _ in range(2):
      with pytest.raises(OSError) as error:
        write("d", "1")
      assert error.value.filename == f"{RUN}/b"
  assert (error.value.errno, error.value.filename) == (errno.ESTALE, f"{RUN}/b")
  assert service.written == [("a", "1")]
  service.failing = set()
  write("status.json", "stopped")  # That the run is stopped can still be noted.
  assert service.written[-1] == ("status.json", "stopped")


def test_the_end_alone_raises_an_error(service):
  service.failing = {"a"}
  with pytest.raises(OSError, match="another process"), outbox.used(RUN):
    write("a", "1")


def test_after_an_error_of_the_run_the_rest_is_written(service):
  with pytest.raises(ZeroDivisionError), outbox.used(RUN):
    service.open.clear()
    write("a", "1")
    write("b", "1")
    threading.Timer(0.2, service.open.set).start()
    raise ZeroDivisionError
  assert service.written == [("a", "1"), ("b", "1")]
  service.failing = {"c"}
  with pytest.raises(ZeroDivisionError), outbox.used(RUN):
    write("c", "1")
    raise ZeroDivisionError


def test_other_folders_are_written_as_always(service, tmp_path):
  with outbox.used(RUN), outbox.used(tmp_path):
    service.open.clear()
    threading.Timer(0.2, service.open.set).start()
    files.write(f"{RUN}/tensorboard/events", "1")
    assert service.written == [("events", "1")]
    files.write(tmp_path / "a", "1")
    assert (tmp_path / "a").read_text() == "1"
    outbox.wait(tmp_path)
