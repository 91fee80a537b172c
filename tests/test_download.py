"""minw.data.download, from a web server on this machine that can fail."""

import hashlib
import http.server
import os
import pathlib
import resource
import socket
import threading
import time

import pytest

from cifar_files import check_prepared
from cifar_files import refusal
from cifar_files import write_archive
from minw import prepare
from minw.data import cifar
from minw.data import download
from resource_limits import limited


class Server:
  """A web server on this machine that can fail in several ways.

  Attributes:
    content: what every address has.
    url: an address.
    ranges: the Range header of each request so far, or None.
    break_at: if given, the connection is closed before this byte.
    stall_at: if given, nothing more is sent from this byte on.
    knows_ranges: whether Range headers are honoured.
    status: if given, an error that every request gets.
  """

  def __init__(self, content: bytes):
    self.content = content
    self.ranges = []
    self.break_at = self.stall_at = self.status = None
    self.knows_ranges = True
    self.release = threading.Event()
    outer = self

    class Handler(http.server.BaseHTTPRequestHandler):

      def do_GET(self):
        outer.answer(self)

      def log_message(self, *arguments):
        pass

    self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    self.url = f"http://127.0.0.1:{self.server.server_port}/data/archive.tar.gz"
    self.thread = threading.Thread(target=self.server.serve_forever, args=(0.01,))
    self.thread.start()

  def answer(self, request) -> None:
    header = request.headers["Range"]
    self.ranges.append(header)
    if self.status:
      request.send_error(self.status)
      return
    begin = 0
    if header and self.knows_ranges:
      begin = int(header.removeprefix("bytes=").removesuffix("-"))
    end = min(filter(None, (len(self.content), self.break_at, self.stall_at)))
    request.send_response(206 if begin else 200)
    request.send_header("Content-Length", str(len(self.content) - begin))
    request.end_headers()
    request.wfile.write(self.content[begin:end])
    if self.stall_at:
      request.wfile.flush()
      self.release.wait(30)

  def close(self) -> None:
    self.release.set()
    self.server.shutdown()
    self.thread.join()
    self.server.server_close()


@pytest.fixture
def server(small, tmp_path, monkeypatch):
  """The archive of the binary version, which `prepare` will look for there."""
  content = write_archive(tmp_path / "original", "cifar10", "binary").read_bytes()
  served = Server(content)
  monkeypatch.setitem(
      cifar.ORIGINALS, "cifar10", cifar.ORIGINALS["cifar10"]._replace(
          url=served.url, size=len(content),
          sha256=hashlib.sha256(content).hexdigest()))
  yield served
  served.close()


def part(tmp_path) -> pathlib.Path:
  return tmp_path / "data/cifar10/incomplete.minw/archive.tar.gz.part"


def test_downloads(server, tmp_path):
  check_prepared("cifar10", prepare.prepare("cifar10", tmp_path / "data"))
  assert server.ranges == [None]
  assert os.listdir(tmp_path / "data/cifar10") == ["3.0.2"]


def test_an_interrupted_download_is_resumed(server, tmp_path):
  half = len(server.content) // 2
  server.break_at = half
  message = refusal("cifar10", tmp_path / "data")
  assert f"{server.url}: download failed after {half:,} of" in message
  assert "--source=PATH" in message
  assert part(tmp_path).read_bytes() == server.content[:half]
  assert "is in use" not in refusal("cifar10", tmp_path / "data")  # No byte more.
  server.break_at = None
  check_prepared("cifar10", prepare.prepare("cifar10", tmp_path / "data"))
  assert server.ranges == [None, f"bytes={half}-", f"bytes={half}-"]
  assert os.listdir(tmp_path / "data/cifar10") == ["3.0.2"]


def test_a_server_without_ranges_is_read_from_the_start(server, tmp_path):
  server.break_at = len(server.content) // 2
  refusal("cifar10", tmp_path / "data")
  server.break_at, server.knows_ranges = None, False
  check_prepared("cifar10", prepare.prepare("cifar10", tmp_path / "data"))


def test_a_finished_download_is_not_fetched_again(server, tmp_path):
  part(tmp_path).parent.mkdir(parents=True)
  part(tmp_path).write_bytes(server.content)
  check_prepared("cifar10", prepare.prepare("cifar10", tmp_path / "data"))
  assert not server.ranges


def test_a_wrong_checksum_is_refused_and_forgotten(server, tmp_path):
  good = server.content
  server.content = good[:-1] + bytes([good[-1] ^ 1])
  message = refusal("cifar10", tmp_path / "data")
  assert hashlib.sha256(server.content).hexdigest() in message
  assert not os.listdir(tmp_path / "data")
  server.content = good
  check_prepared("cifar10", prepare.prepare("cifar10", tmp_path / "data"))
  assert server.ranges == [None, None]


def test_a_longer_file_is_not_read_to_its_end(server, tmp_path):
  server.content += bytes(1 << 20)
  check_prepared("cifar10", prepare.prepare("cifar10", tmp_path / "data"))


def test_an_error_of_the_server_is_reported(server, tmp_path):
  server.status = 404
  message = refusal("cifar10", tmp_path / "data")
  assert server.url in message and "404" in message and "--source=PATH" in message
  assert not os.listdir(tmp_path / "data")


def test_a_server_that_stalls_is_given_up(server, tmp_path, monkeypatch):
  monkeypatch.setattr(download, "TIMEOUT", 0.2)
  server.stall_at = 1000
  start = time.monotonic()
  assert "timed out" in refusal("cifar10", tmp_path / "data")
  assert time.monotonic() - start < 15
  assert part(tmp_path).read_bytes() == server.content[:1000]


def test_no_network_is_reported(small, tmp_path, monkeypatch):
  with socket.create_server(("127.0.0.1", 0)) as free:
    port = free.getsockname()[1]  # Nobody listens there, once closed.
  monkeypatch.setitem(
      cifar.ORIGINALS, "cifar10",
      cifar.ORIGINALS["cifar10"]._replace(url=f"http://127.0.0.1:{port}/a.tar.gz"))
  message = refusal("cifar10", tmp_path / "data")
  assert "refused" in message and "--source=PATH" in message


def test_a_full_disk_is_reported_in_a_download(server, tmp_path):
  with limited(resource.RLIMIT_FSIZE, 10_000):
    message = refusal("cifar10", tmp_path / "data")
  assert message.startswith(f"data_dir='{tmp_path}/data'")
