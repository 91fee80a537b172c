"""The engine in WebAssembly against the native one: equal values, equal refusals."""

import ctypes
import http.server
import importlib.util
import json
import os
import pathlib
import queue
import re
import shutil
import subprocess
import sys
import threading
import zlib

import numpy as np
import pytest

from c_programs import CSRC
from c_programs import ROOT
from c_programs import tool
from minw import infer
from minw import packed
from minw.kernels import native
import native_cases
import node
import packed_files
import packed_networks
import wasm_engine

pytest.importorskip("wasmtime")
pytestmark = pytest.mark.skipif(
    not native.available(), reason="the native library was not built")
MUTANTS = int(os.environ.get("MINW_MUTANTS", 2400))
NAMES = [*infer.shipped()]


def assert_equal(
    data: bytes, images: np.ndarray, where: str, relaxed: bool = False
) -> list[tuple[str, str]]:
  """All values and the logits of the fused path are equal bit for bit.

  Returns the operations' names and kernels.
  """
  network = native.load(data, packed.UNLIMITED)
  other = wasm_engine.Network(data, relaxed=relaxed)
  assert network.shape == other.shape, where
  layers = other.layers()
  assert [name for name, _ in network.layers()] == [name for name, _ in layers], where
  for i, (want, have) in enumerate(
      zip(network.values(images), other.values(images), strict=True)):
    assert want.shape == have.shape, f"{where}, value {i}"
    if want.dtype == np.int8:
      want = want.astype(np.int32)
    same = want.tobytes() == have.tobytes()
    assert same, f"{where}, value {i}, {layers[i - 1]}"
  logits = other.logits(images)
  assert network.logits(images).tobytes() == logits.tobytes(), where
  return layers


def images_of(data: bytes, count: int) -> np.ndarray:
  """Random images for a network."""
  shape = native.load(data).shape
  return np.random.default_rng(0).integers(0, 256, (count, *shape), np.uint8)


def test_exports_are_the_functions_of_the_header():
  import wasmtime

  module = wasmtime.Module.from_file(wasmtime.Engine(), str(wasm_engine.MODULE))
  header = re.findall(r"\b(minw_\w+)\(", (CSRC / "minw.h").read_text())
  assert {e.name for e in module.exports} == {
      *header, "minw_allocate", "minw_release", "memory", "_initialize"}
  assert {f"{i.module}.{i.name}" for i in module.imports} == {
      "env.minw_throw", "wasi_snapshot_preview1.clock_time_get"}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("count", (4, pytest.param(200, marks=pytest.mark.slow)))
@pytest.mark.parametrize("relaxed", (False, True))
def test_shipped_networks(name, count, relaxed):
  data = infer.shipped()[name].read_bytes()
  assert_equal(data, images_of(data, count), name, relaxed)


@pytest.mark.parametrize(
    "relaxed", (False, pytest.param(True, marks=pytest.mark.slow)))
def test_all_kernels(relaxed):
  """The networks of the native library's tests, and the kernels that run them."""
  kernels = set()
  for name, program in native_cases.every():
    data = packed.to_bytes(program)
    layers = assert_equal(data, packed_networks.images(program, 2), name, relaxed)
    kernels |= {kernel for _, kernel in layers}
  bits = ("W1A1", "W1A2", "W1A3", "W2A1", "W3A1", "W2A2")
  assert {f"{name} table lookup" for name in bits} <= kernels
  assert {"pairs of products", "int16 products", "int32 products", "float32",
          "thresholds", "plain loops"} <= kernels


@pytest.fixture(scope="module")
def checked_cases():
  """Networks and images for all kernels, and native values' checksums."""
  cases, want = [], []
  for _, program in native_cases.every():
    data, image = packed.to_bytes(program), packed_networks.images(program, 1)
    cases.append([node.encoded(data), node.encoded(image)])
    network = native.load(data)
    want.append([zlib.crc32(value if value.dtype == np.float32 else np.int32(value))
                 for value in network.values(image)] + [
                     zlib.crc32(network.logits(image))])
  return cases, want


def kernels_input(cases: list, relaxed: bool) -> str:
  module = node.encoded(wasm_engine.code(relaxed))
  return json.dumps({"module": module, "cases": cases})


@node.needs_node
def test_all_kernels_in_node(checked_cases):
  cases, want = checked_cases
  found = node.run("node", node.SCRIPTS / "kernels.js",
                   input=kernels_input(cases, relaxed=False))
  assert json.loads(found) == want


def kernels_page(cases: list, relaxed: bool, then: str = "") -> str:
  """A page that becomes the output of kernels.js, and then runs a statement."""
  given, script = kernels_input(cases, relaxed), node.SCRIPTS / "kernels.js"
  return (f"<body></body><script>const input = {given};</script>"
          f"<script>{script.read_text()}{then}</script>")


@pytest.mark.slow
@pytest.mark.parametrize("relaxed", (False, True))
def test_all_kernels_in_chromium(checked_cases, tmp_path, relaxed):
  browser = tool("chromium", "chromium-browser", "google-chrome")
  cases, want = checked_cases
  page = tmp_path / "page.html"
  page.write_text(kernels_page(cases, relaxed))
  said = node.run(
      browser, "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom",
      f"--user-data-dir={tmp_path / 'profile'}", page.as_uri(), timeout=300)
  found, = re.findall(r"<body>(.*)</body>", said)
  assert json.loads(found) == want


@pytest.mark.slow
def test_all_kernels_in_firefox(checked_cases, tmp_path):
  """A page sends its result to the server that it came from."""
  browser = tool("firefox", "firefox-esr")
  cases, want = checked_cases
  page = kernels_page(
      cases, relaxed=False,
      then="fetch('/', {method: 'POST', body: document.body.textContent});")
  found = queue.Queue()

  class Handler(http.server.BaseHTTPRequestHandler):

    def do_GET(self):
      self.send_response(200)
      self.end_headers()
      self.wfile.write(page.encode())

    def do_POST(self):
      found.put(self.rfile.read(int(self.headers["Content-Length"])))
      self.send_response(204)
      self.end_headers()

    def log_message(self, format, *args):
      pass

  with http.server.HTTPServer(("127.0.0.1", 0), Handler) as server:
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}/"
    with subprocess.Popen(
        [browser, "--headless", "--profile", str(tmp_path), address],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
      try:
        assert json.loads(found.get(timeout=300)) == want
      finally:
        process.terminate()
        server.shutdown()


def test_batches():
  """Images of a batch run in groups."""
  data = packed.to_bytes(native_cases.small())
  network, x = wasm_engine.Network(data), images_of(data, 40)
  want = native.load(data).logits(x)
  for count in (0, 1, 2, 15, 16, 17, 40):
    np.testing.assert_array_equal(network.logits(x[:count]), want[:count])


def built(folder: pathlib.Path) -> bytes:
  """The module that setup.py builds in a folder."""
  subprocess.run([sys.executable, "setup.py", "-q", "build_wasm", "--output=new.wasm"],
                 cwd=folder, check=True)
  return (folder / "new.wasm").read_bytes()


@pytest.mark.slow
def test_module_is_built_from_the_sources(tmp_path):
  """A build in another folder has the committed bytes."""
  if not importlib.util.find_spec("ziglang"):
    pytest.skip("the extra web-build is not installed")
  shutil.copy(ROOT / "setup.py", tmp_path)
  shutil.copytree(CSRC, tmp_path / CSRC.relative_to(ROOT))
  module = wasm_engine.MODULE.read_bytes()
  assert built(tmp_path) == module
  # Only lookups have the bytes that minw.js exchanges. With another instruction in
  # their place nothing else changes.
  file = tmp_path / CSRC.relative_to(ROOT) / "lookup_wasm.inc"
  other = "wasm_i16x8_relaxed_dot_i8x16_i7x16"
  file.write_text(file.read_text().replace("wasm_i8x16_relaxed_swizzle", other))
  assert built(tmp_path) == module.replace(wasm_engine.SWIZZLE, b"\xfd\x92\x02")


# Refusals.


def native_message(data: bytes, limits: packed.Limits | None = None) -> str:
  """What the native library says of a file that it refuses; else ""."""
  library = ctypes.CDLL(str(native.LIBRARY))
  library.minw_load_within.restype = ctypes.c_void_p
  most = (ctypes.c_uint64 * 3)(*limits) if limits else None
  message = ctypes.create_string_buffer(1000)
  network = library.minw_load_within(
      data, ctypes.c_size_t(len(data)), most, message, ctypes.c_size_t(len(message)))
  library.minw_free(ctypes.c_void_p(network))
  return "" if network else message.value.decode(errors="replace")


def compare(data: bytes) -> bool:
  """Whether a file is taken; both engines must agree, and run it alike."""
  message = native_message(data)
  if message:
    with pytest.raises(ValueError) as error:
      wasm_engine.Network(data)
    assert str(error.value) == message
    return False
  network = wasm_engine.Network(data)
  try:
    other = native.load(data, packed.Limits()._replace(operations=2**25))
  except ValueError:
    return True  # It takes long, or its metadata are damaged.
  x = np.random.default_rng(0).integers(0, 256, (2, *other.shape), np.uint8)
  assert other.logits(x).tobytes() == network.logits(x).tobytes()
  return True


def campaign(seed: int, count: int) -> int:
  """Compares damaged files. Returns how many of them are taken."""
  taken = 0
  good = [*packed_networks.seeds(), packed.to_bytes(native_cases.large())]
  for i, data in enumerate(packed_files.mutants(good, seed, count)):
    try:
      taken += compare(data)
    except Exception as error:
      error.add_note(f"mutant {i} of seed {seed}")
      raise
  return taken


def test_damaged_files_are_refused_alike():
  taken = campaign(2, 300)
  assert 30 < taken < 150


@pytest.mark.slow
def test_many_damaged_files_are_refused_alike():
  taken = campaign(3, MUTANTS)
  assert MUTANTS / 10 < taken < MUTANTS / 2


def test_messages_name_the_operation():
  data = packed_files.File(packed.to_bytes(native_cases.small()))
  data.op(packed_files.THRESHOLD)["bits"] = 4
  with pytest.raises(ValueError, match="^operation 1: codes of 4 bits$"):
    wasm_engine.Network(data.to_bytes())
  for cut in (0, 7, 31, 100):
    assert not compare(packed.to_bytes(native_cases.small())[:cut])


# Sizes beyond 32 bits. Each of them would wrap to a size that is small.


def test_values_beyond_4_gib():
  """All values together and a padded input have over 2^32 bytes; few live at a time."""
  b = packed_networks.Builder(np.random.default_rng(0), (64, 64, 1))
  x = b.conv(0, 1, 4096, (1, 1), pads=(0,) * 4)
  for _ in range(62):  # Each value has 2^26 bytes, like the input of the convolution.
    x = b.add(packed.Pool("same", x, "max", (1, 1), (1, 1)))
  x = b.conv(x, 1, 1, (1, 1), pads=(0,) * 4)
  data = packed.to_bytes(b.end(b.threshold(x, 1)))
  network = wasm_engine.Network(data)
  x = images_of(data, 1)
  size = network.instance.size()
  with pytest.raises(ValueError, match="^out of memory$"):
    network.values(x, wanted=[len(network.layers())])
  assert network.instance.size() < size + 2**20


def test_weights_beyond_4_gib():
  """A weight takes 2 masks of 64 int16: 2^24 weights need 2^32 bytes."""
  b = packed_networks.Builder(np.random.default_rng(0), (4096, 4096, 1))
  kernel = np.zeros((1, 4096, 4096, 1), np.int8)
  kernel[0, 0, 0] = 1
  b.add(packed.Conv("dense", 0, 2, kernel))
  norm = np.ones((3, 1), np.float32)
  b.add(packed.Logits("logits", 1, 0.25, *norm))
  program = packed.Program(b.source, b.crop, np.uint8([0]), 1, tuple(b.ops), {})
  data = packed.to_bytes(program)
  assert "padding exceeds" in native_message(data)
  with pytest.raises(ValueError, match="^out of memory$"):
    wasm_engine.Network(data, packed.UNLIMITED)
