"""The JavaScript library in Node: equal to the native library and to `minw.infer`."""

import base64
import gzip
import json
import re
from typing import NamedTuple

import numpy as np
import PIL
from PIL import Image
import pytest

from minw import infer
from minw import packed
from minw.export import web
from minw.kernels import native
from minw.kernels import reference
import node
import packed_files
from packed_networks import floats
from packed_networks import groups_and_dilation
from packed_networks import images
from packed_networks import integers
from packed_networks import residual_and_dense
from packed_networks import small
from packed_networks import small_image

pytestmark = node.needs_node

LIBRARY = (node.WEB / "minw.js").read_text()
TYPES = {"INT": "Int32Array", "CODE": "Int8Array", "FLOAT": "Float32Array"}
DTYPES = {"Int32Array": np.int32, "Int8Array": np.int8, "Float32Array": np.float32}
OPERATIONS = {
    packed.Conv: "convolution", packed.Threshold: "thresholds",
    packed.Logits: "logits", packed.Concat: "concatenation",
    packed.Shortcut: "shortcut", packed.FloatNorm: "float norm",
    packed.Add: "addition"}
PROGRAMS = {
    "small": small, "small2": lambda: small(2),
    **{f"integers{bits}": lambda bits=bits: integers(bits, bits) for bits in (1, 2, 3)},
    **{f"every{bits}": lambda bits=bits: residual_and_dense(bits) for bits in (1, 3)},
    **{f"groups{bits}": lambda bits=bits: groups_and_dilation(bits) for bits in (1, 2)},
    "float8": lambda: floats(1, "float8_e4m3fn"),
    "bfloat16": lambda: floats(3, "bfloat16"),
    "float32": lambda: floats(2, "float32")}


def path_of(name):
  return str(infer.shipped()[name])


def run(program_or_name, batch):
  """What call.mjs says of a network and of a batch."""
  net = (path_of(program_or_name) if isinstance(program_or_name, str)
         else node.inline(packed.to_bytes(program_or_name)))
  found, = node.results([["run", {"net": net, "images": node.encoded(batch)}]])
  return found


@pytest.mark.parametrize("name", sorted(infer.shipped()))
def test_shipped_networks_equal_native_ones(name):
  network = infer.load(name, backend="native")
  batch = images(network.program, 3)
  batch[0, :, ::2] = 255
  found = run(name, batch)
  logits = node.array(found["logits"], np.float32, 3, network.program.num_classes)
  np.testing.assert_array_equal(logits, network.logits(batch), strict=True)
  check_values(found, network.program, network.values(batch))
  check_description(found, network.program)
  assert found["labels"] == list(network.labels)
  assert found["title"].endswith("W2A2" if "2bit" in name else "W1A1")
  assert found["title"].startswith("digits" if "digits" in name else "cifar10")
  assert found["fileSize"] == infer.shipped()[name].stat().st_size


@pytest.mark.parametrize("name", PROGRAMS)
def test_programs(name):
  program = PROGRAMS[name]()
  batch = images(program, 2)
  found = run(program, batch)
  values = native.load(packed.to_bytes(program)).values(batch)
  check_values(found, program, values)
  check_description(found, program)
  assert found["labels"] == (program.metadata.get("labels")
                             or [str(i) for i in range(program.num_classes)])


def check_values(found, program, values):
  """Checks all values of all images."""
  kinds = packed.infer_values(program)
  names = ["image", *(op.name for op in program.ops)]
  for i, image in enumerate(found["values"]):
    assert len(image) == len(values)
    for got, name, kind, value in zip(image, names, kinds, values):
      assert (got["name"], got["shape"]) == (name, list(kind.shape))
      assert (got["kind"], got["bits"]) == (kind.kind.lower(), kind.bits)
      assert got["type"] == TYPES[kind.kind]
      data = node.array(got["data"], DTYPES[got["type"]], *kind.shape)
      np.testing.assert_array_equal(data, value[i], strict=True, err_msg=name)


def check_description(found, program):
  """Checks what the library read from the file against Python's parser."""
  kinds = packed.infer_values(program)
  assert found["shape"] == list(program.source_shape)
  assert found["classes"] == program.num_classes
  assert found["metadata"] == program.metadata
  assert found["kernels"] == [[op["name"], op["kernel"]] for op in found["operations"]]
  for got, op, kind in zip(found["operations"], program.ops, kinds[1:], strict=True):
    assert got["name"] == op.name and got["kernel"]
    assert got["inputs"] == list(packed.inputs(op))
    assert got["shape"] == list(kind.shape)
    wanted = OPERATIONS.get(type(op)) or {"max": "maximum", "sum": "sum"}[op.kind]
    assert got["type"] == wanted
    if isinstance(op, packed.Conv):
      check_weights(got, op, kind.shape)
    else:
      assert got["weights"] is None and got["products"] == 0


def check_weights(got, op, shape):
  weights, kernel = got["weights"], op.kernel
  assert weights["shape"] == list(kernel.shape) and weights["count"] == kernel.size
  assert got["products"] == kernel.size * shape[0] * shape[1]
  if isinstance(op.bits, str):
    assert weights["planes"] == [] and weights["codes"] is None
    assert weights["format"] == op.bits.partition("_")[0]
    assert weights["bits"] == 8 * packed.float_dtype(op.bits).itemsize
    return
  assert weights["bits"] == op.bits and weights["format"].startswith(str(op.bits))
  codes = node.array(weights["codes"], np.int8, *kernel.shape)
  np.testing.assert_array_equal(codes, kernel, strict=True)
  planes = [node.array(plane, np.uint8, *kernel.shape) for plane in weights["planes"]]
  assert len(planes) == op.bits
  np.testing.assert_array_equal(planes[0], kernel > 0)
  for bit, plane in enumerate(planes[1:]):
    np.testing.assert_array_equal(plane, np.abs(kernel) >> bit & 1)


def test_types_declare_what_there_is():
  """minw.d.ts names the exports of minw.js and the fields of a network."""
  types = (node.WEB / "minw.d.ts").read_text()
  declared = re.findall(r"^export (?:function|const) (\w+)", types, re.MULTILINE)
  library = (node.WEB / "minw.js").read_text()
  exported = re.findall(r"^export (?:async )?(?:function|const) (\w+)", library,
                        re.MULTILINE)
  assert sorted(declared) == sorted(exported)
  network = re.search(r"^export interface Network {\n(.*?)^}", types, re.M | re.S)[1]
  fields = re.findall(r"^  (?:readonly )?(\w+)[:(]", network, re.MULTILINE)
  found = run(small(), small_image())
  assert sorted(fields) == sorted([*found.keys(), "close"])
  operation, = re.findall(r"^export interface Operation .*?^}", types, re.M | re.S)
  fields = re.findall(r"^  readonly (\w+):", operation, re.MULTILINE)
  assert sorted([*fields, "shape", "kind", "bits"]) == sorted(found["operations"][0])


def test_large_batches_run_in_parts():
  network = infer.load("cifar10_convnet_a_quarter")
  batch = images(network.program, 1400, seed=3)  # More than 4 MiB.
  found, = node.results([["run", {"net": path_of("cifar10_convnet_a_quarter"),
                                  "images": node.encoded(batch), "values": False}]])
  logits = node.array(found["logits"], np.float32, 1400, 10)
  np.testing.assert_array_equal(logits, network.logits(batch))


def test_calls_release_their_memory():
  sizes, = node.results([
      ["memory", {"net": path_of("cifar10_convnet_a_quarter"), "calls": 60}]])
  assert sizes[-1] == sizes[5]


def test_memory_that_grows_moves_no_result():
  """A network whose values are larger than the memory that the engine starts with."""
  rng = np.random.default_rng(0)
  ops = (packed.Conv("conv", 0, 1, np.ones((64, 3, 3, 1), np.int8), pads=(1,) * 4),
         packed.Pool("max", 1, "max", (1000, 100), (1, 1)),
         packed.Logits("norm", 2, 2.0**-20, *(np.ones(64, np.float32),) * 3))
  program = packed.Program((1000, 100, 1), (1000, 100), np.array([7], np.uint8), 64,
                           ops, {})
  batch = rng.integers(0, 256, (1, 1000, 100, 1), np.uint8)
  check_values(run(program, batch), program, reference.run(program, batch))


def test_classic_script(tmp_path):
  library = tmp_path / "minw.classic.js"
  library.write_text(web.classic((node.WEB / "minw.js").read_text()))
  network = infer.load("digits_convnet")
  batch = images(network.program, 4)
  net = node.inline(infer.shipped()["digits_convnet"].read_bytes())
  _, found = node.results([
      ["init", node.inline((node.WEB / "minw.wasm").read_bytes())],
      ["run", {"net": net, "images": node.encoded(batch)}]], library)
  np.testing.assert_array_equal(node.array(found["logits"], np.float32, 4, 10),
                                network.logits(batch))


def test_worker():
  said = json.loads(node.run("node", node.SCRIPTS / "worker.mjs", node.WEB / "minw.js",
                             path_of("digits_convnet")))
  zeros = np.zeros((1, 8, 8, 1), np.uint8)
  np.testing.assert_array_equal(
      np.float32(said), infer.load("digits_convnet").logits(zeros)[0])


def test_probabilities():
  logits = np.float32([[3, -1, 0.5, 3, -200]])
  found, = node.results([["probabilities", logits[0].tolist()]])
  np.testing.assert_allclose(found, infer.probabilities(logits)[0], rtol=1e-6)


def test_unpack():
  content = np.random.default_rng(0).bytes(70_000)
  packed_text = base64.b64encode(gzip.compress(content)).decode()
  found, = node.results([["unpack", packed_text]])
  assert base64.b64decode(found) == content


# Files that are refused.


def damaged():
  """Files with faults, by what is wrong with them."""
  data = infer.shipped()["digits_convnet"].read_bytes()
  file = packed_files.File(data)
  file.ops[2]["strides"] = 0
  named = packed_files.File(data)
  named.ops[3].kind = 99
  huge = packed_files.File(data)
  huge.image[0].value = 2**31
  return {
      "empty": b"", "short": data[:500], "changed": data[:900] + b"?" + data[901:],
      "stride": file.to_bytes(), "kind": named.to_bytes(), "huge": huge.to_bytes()}


def test_refused_files_end_as_errors_of_the_engine():
  files = damaged()
  found = node.calls([["run", {"net": node.inline(data), "images": ""}]
                      for data in files.values()]
                     + [["logits", {"net": path_of("digits_convnet"), "length": 64,
                                    "type": "Uint8Array"}]])
  assert found.pop() == {"result": 10}  # Another network can be loaded.
  for (name, data), got in zip(files.items(), found):
    with pytest.raises(ValueError) as native_error:
      native.load(data)
    wanted = str(native_error.value).removeprefix("packed network: ")
    assert got == {"error": wanted, "type": "Error"}, name
  assert found[list(files).index("stride")]["error"].startswith("operation 2: ")


@pytest.mark.parametrize("metadata, message", [
    (b"", "metadata: must be JSON in UTF-8"),
    (b"\xff", "metadata: must be JSON in UTF-8"),
    (b"[]", "metadata: must be a JSON object"),
    (b'{"labels": ["a"]}', "metadata.labels: must be null or a list"),
    (b'{"labels": "0123456789"}', "metadata.labels: must be null or a list"),
    (json.dumps({"labels": ["\n"] * 10}).encode(), "metadata.labels: must be null"),
    (json.dumps({"labels": ["a" * 1001] * 10}).encode(), "metadata.labels: must be"),
    (b'{"config": [1]}', "metadata.config: must be null or an object"),
])
def test_metadata_is_checked(metadata, message):
  file = packed_files.File(infer.shipped()["digits_convnet"].read_bytes())
  file.metadata = metadata
  got, = node.calls([["run", {"net": node.inline(file.to_bytes()), "images": ""}]])
  assert got["error"].startswith(message)
  with pytest.raises(ValueError, match=r"metadata"):
    infer.Network(file.to_bytes())


@pytest.mark.parametrize("length, kind, message", [
    (63, "Uint8Array", "there are 63 pixel values: must be 64, or a multiple of it"),
    (64, "Float32Array", "pixels must be a Uint8Array"),
    (64, "Array", "pixels must be a Uint8Array"),
    (64, "Int8Array", "pixels must be a Uint8Array"),
])
def test_pixels_are_checked(length, kind, message):
  net = path_of("digits_convnet")
  got, = node.calls([["logits", {"net": net, "length": length, "type": kind}]])
  assert got["error"] == message


def test_closed_network():
  got, = node.calls([["closed", path_of("digits_convnet")]])
  assert got["error"] == "the network was closed, or ended with an error"


def test_engine_that_cannot_be_read(tmp_path):
  (tmp_path / "bad.wasm").write_bytes(b"nothing")
  good = ["logits", {"net": path_of("digits_convnet"), "length": 64,
                     "type": "Uint8ClampedArray"}]
  missing, bad, loaded = node.calls([
      ["init", str(tmp_path / "none.wasm")], ["init", str(tmp_path / "bad.wasm")],
      good])
  assert "none.wasm" in missing["error"] and bad["type"] == "CompileError"
  assert loaded == {"result": 10}  # `load` compiles the engine beside the library.


def test_lookups_are_exchanged_where_relaxed_simd_exists():
  wasm = b"\xfd\x8e\x00ab\xfd\xfd\x8e\x00\x8e\x00\xfd\x0e\xfd\x8e"
  found = node.results([["compiled", {"wasm": node.encoded(wasm), "relaxed": relaxed}]
                        for relaxed in (False, True)])
  relaxed = b"\xfd\x80\x02ab\xfd\xfd\x80\x02\x8e\x00\xfd\x0e\xfd\x8e"
  assert found == [[node.encoded(code), node.encoded(wasm)] for code in (wasm, relaxed)]


def test_relaxed_simd_is_recognized():
  """V8 has it since version 11.4, that is, Node 21."""
  said = node.run("node", "-p", "process.versions.node.split('.')[0] >= 21")
  module = re.search(r"const RELAXED_MODULE = (.*?);", LIBRARY, re.DOTALL)[1]
  swizzle = re.search(r"const RELAXED_SWIZZLE = .*?;", LIBRARY)[0]
  assert node.run(
      "node", "-p", f"{swizzle} WebAssembly.validate({module})") == said
  isa = "relaxed-simd" if said == "true\n" else "simd128"
  assert run(small(), small_image())["isa"] == isa


# Images: they become the pixels that `minw.infer` makes of them.


class Case(NamedTuple):
  """An image, and how it is brought to a shape."""

  image: Image.Image
  shape: tuple[int, int, int]
  shrinks: bool = True
  background: tuple[int, int, int] = (0, 0, 0)
  orientation: int = 1

  def call(self):
    """The call of `preprocess` for the pixels as a canvas gives them."""
    rgba = self.image.convert("RGBA")
    return ["preprocess", {
        "data": node.encoded(rgba.tobytes()), "width": rgba.width,
        "height": rgba.height, "shape": self.shape, "shrinks": self.shrinks,
        "options": {"background": self.background, "orientation": self.orientation}}]

  def wanted(self, path):
    exif = Image.Exif()
    exif[0x0112] = self.orientation
    self.image.save(path, exif=exif)
    return infer.read_image(path, self.shape, self.shrinks,
                            ",".join(map(str, self.background)))


def check_images(cases, path):
  found = node.results([case.call() for case in cases])
  for case, text in zip(cases, found, strict=True):
    np.testing.assert_array_equal(
        node.array(text, np.uint8, *case.shape), case.wanted(path), strict=True,
        err_msg=str(case))


def random_image(rng, mode, width, height):
  image = Image.fromarray(rng.integers(0, 256, (height, width, 4), np.uint8))
  return image.convert(mode)


def random_cases(count, largest):
  """Images of all modes, scaled up and down, turned, and on any background."""
  rng = np.random.default_rng(count)
  for i in range(count):
    mode = ("L", "LA", "P", "RGB", "RGBA", "1")[i % 6]
    width, height = (int(side) for side in rng.integers(1, largest, 2))
    shape = *(int(side) for side in rng.integers(1, 40, 2)), (1, 3)[i % 5 % 2]
    yield Case(random_image(rng, mode, width, height), shape, bool(rng.random() < 0.8),
               tuple(map(int, rng.integers(0, 256, 3))), i % 8 + 1)


# Older versions resize some tall images in another order, which rounds otherwise.
needs_pillow_13 = pytest.mark.skipif(
    int(PIL.__version__.partition(".")[0]) < 13, reason="Pillow is older than 13")


@needs_pillow_13
@pytest.mark.parametrize("count, largest", [(240, 30), (120, 120), (12, 600)])
def test_preprocess(count, largest, tmp_path):
  check_images(list(random_cases(count, largest)), tmp_path / "image.png")


@needs_pillow_13
def test_preprocess_long_and_narrow_images(tmp_path):
  """Pillow resizes only a part of them, or rows before columns."""
  rng = np.random.default_rng(7)
  check_images([
      Case(random_image(rng, "RGB", *size), (8, 9, channels))
      for size in ((900, 3), (3, 900), (1, 2000), (40, 300), (300, 40), (7, 8), (9, 8),
                   (64, 200), (16, 35), (8, 8))
      for channels in (1, 3)], tmp_path / "image.png")


def test_preprocess_keeps_all_channels(tmp_path):
  rng = np.random.default_rng(8)
  check_images([
      Case(random_image(rng, mode, *size), (8, 8, channels), orientation=6)
      for size in ((8, 8), (31, 20), (5, 5))
      for mode, channels in (("LA", 2), ("RGBA", 4))
  ], tmp_path / "image.png")


def test_preprocess_a_photo(tmp_path):
  """A JPEG file, of which Node gets the pixels that Pillow decodes."""
  rows, columns = np.indices((427, 640))
  smooth = np.stack([rows // 2, columns // 3, (rows + columns) // 5], -1)
  noise = np.random.default_rng(9).integers(0, 20, smooth.shape)
  photo = Image.fromarray((smooth + noise).astype(np.uint8))
  photo.save(tmp_path / "photo.jpg", quality=90)
  with Image.open(tmp_path / "photo.jpg") as image:
    cases = [Case(image, shape) for shape in ((32, 32, 3), (8, 8, 1), (224, 224, 3))]
    found = node.results([case.call() for case in cases])
  for case, text in zip(cases, found):
    np.testing.assert_array_equal(
        node.array(text, np.uint8, *case.shape),
        infer.read_image(tmp_path / "photo.jpg", case.shape))


@pytest.mark.parametrize("change, message", [
    ({"width": 3}, "pixels must be a Uint8Array of red, green, blue and alpha"),
    ({"width": 0, "data": ""}, "pixels must be a Uint8Array of red, green, blue and"),
    ({"shape": (8, 8, 5)}, "the network takes 5 channels, which images lack"),
    ({"shape": (8, 8, 2)}, "the image has colors; the network takes gray and alpha"),
    ({"options": {"orientation": 9}}, "orientation=9: must be 1 to 8"),
])
def test_preprocess_refuses(change, message):
  image = Image.new("RGB", (4, 4), (1, 2, 3))
  name, argument = Case(image, (8, 8, 3)).call()
  got, = node.calls([[name, argument | change]])
  assert got["error"].startswith(message)
