"""Both parsers of packed networks against docs/format.md and one another."""

import collections
import math
import os
import pathlib
import re
import struct
import tracemalloc

import jax
import numpy as np
import pytest

from minw import layers
from minw import models
from minw import pack
from minw import packed
from minw.data import pixels as pixels_lib
from minw.kernels import native
from minw.kernels import reference
from minw.kernels import xla
import packed_files
from packed_files import ADD
from packed_files import CONCAT
from packed_files import CONV
from packed_files import FLOAT_NORM
from packed_files import LOGITS
from packed_files import MAX_POOL
from packed_files import SHORTCUT
from packed_files import SUM_POOL
from packed_files import THRESHOLD
import packed_networks

FORMAT = pathlib.Path(__file__).parent.parent / "docs" / "format.md"
MUTANTS = int(os.environ.get("MINW_MUTANTS", 2400))


def refusals(data: bytes, limits: packed.Limits = packed.Limits()) -> list[str]:
  """What each parser says of a file that it refuses; both must say something, or none.

  Any other error than ValueError passes through.
  """
  said = []
  for parser in [packed.from_bytes] + [native.load] * native.available():
    try:
      parser(data, limits)
    except ValueError as error:
      said.append(str(error))
  assert len(said) in (0, 1 + native.available()), said
  return said


# Rules.


def one_value(c: int) -> dict[str, np.ndarray]:
  """Constants of a norm of c channels."""
  return {name: np.full(c, x, np.float32)
          for name, x in (("center", 3), ("scale", 0.5), ("constant", -1))}


def network(*ops: packed.Op, image=(1, 1, 1)) -> bytes:
  """Operations of which nothing is used: the logits are the largest pixels."""
  pool = packed.Pool("pool", 0, "max", image[:2], (1, 1))
  end = packed.Logits("end", len(ops) + 1, 1.0, **one_value(image[2]))
  offset = np.zeros(image[2], np.uint8)
  return packed.to_bytes(packed.Program(
      image, image[:2], offset, image[2], (*ops, pool, end), {}))


def conv(x=0, bits=1, shape=(1, 1, 1, 1), value=1, **fields) -> packed.Conv:
  dtype = np.float32 if isinstance(bits, str) else np.int8
  return packed.Conv("conv", x, bits, np.full(shape, value, dtype), **fields)


def threshold(x=0, bits=1, c=1, shortcut=None, tables=1) -> packed.Threshold:
  return packed.Threshold("threshold", x, bits, np.zeros(c, bool), np.zeros(
      (tables, packed.num_thresholds(bits), c), np.int32), shortcut)


def norm(x=0, bits=1, c=1, shortcut=None) -> packed.FloatNorm:
  q = 0 if bits == 1 or isinstance(bits, str) else packed.max_code(bits)
  return packed.FloatNorm("norm", x, bits, 1.0, **one_value(c), shortcut=shortcut,
                          grid=np.full(q, 0.5, np.float32))


def edit(data: bytes, kind: int | None, value, *names) -> bytes:
  """Sets fields, of the first operation of a kind, or of the image."""
  file = packed_files.File(data)
  for name in names:
    (file if kind is None else file.op(kind))[name] = value
  return file.to_bytes()


def last_op(data: bytes, change) -> bytes:
  file = packed_files.File(data)
  change(file)
  return file.to_bytes()


def numbers(rule, data, kind, name, good, bad):
  """Cases of a field, by the numbers that are taken and that are refused."""
  yield rule, [edit(data, kind, x, name) for x in good], [
      edit(data, kind, x, name) for x in bad]


def changes(rule, data, good, bad):
  """Cases of functions that change a `packed_files.File`."""
  yield rule, [data, *(last_op(data, f) for f in good)], [last_op(data, f) for f in bad]


def head(data: bytes, at: int, code: str, value: int) -> bytes:
  """A file with another number in its head, and the checksum that fits."""
  size = struct.calcsize(code)
  return packed_files.with_checksum(
      data[:at] + struct.pack("<" + code, value) + data[at + size:])


CODES = [threshold(), threshold(bits=3), threshold(bits=2)]  # Values 1 to 3.
MIXED = network(
    *CODES, packed.Pool("s", 0, "sum", (1, 1), (1, 1)), norm(0, "float16"), norm(0, 3),
    packed.Concat("cat", (0, 0), (0, 0)), packed.Add("add", 0, 0),
    packed.Shortcut("short", 2, (1, 1), 0, 0), conv(1, 3), threshold(0, 1, 1, 2, 7),
    norm(5, 1, 1, 5), packed.Concat("codes", (1, 1), (0, 0)),
    packed.Add("levels", 2, 2), packed.Concat("floats", (5, 5), (0, 0)))


def set_all(op, name, *values):
  for field, value in zip(op.all(name), values, strict=True):
    field.value = value


def constants():
  """Every float constant, at the limits and beyond them."""
  odd = (math.nan, math.inf, -math.inf, 2.0 ** 41, -2.0 ** 41)
  for kind, names in ((CONV, ("weight_unit", "input_unit")),
                      (LOGITS, ("unit", "center", "scale", "constant")),
                      (FLOAT_NORM, ("unit", "shortcut_unit", "center", "scale",
                                    "constant"))):
    for name in names:
      least = -100 if name == "constant" else -40
      yield from numbers(
          "constants", MIXED, kind, name, (0, 2.0 ** 40, -2.0 ** 40, 2.0 ** least),
          (*odd, 2.0 ** (least - 1), 1e-45))
  yield from numbers("constants", network(norm(0, 2)), FLOAT_NORM, "grid",
                     (0, -1, 2.0 ** -40), (*odd, 1e-30))


def cases():
  """(rule, files that are taken, files that break only that rule)."""
  plain = network()
  yield "magic", [plain], [b"m" + plain[1:], plain[:7], b""]
  yield "version", [plain, head(plain, 8, "I", 2)], [
      head(plain, 8, "I", n) for n in (0, 3, 2 ** 31)]
  yield "sizes", [plain], [
      head(plain, 16, "Q", len(plain) + 1), head(plain, 24, "I", 1),
      head(plain, 28, "I", 2 ** 32 - 1), plain + b" ", plain[:-1], plain[:31]]
  yield "checksum", [plain], [plain[:12] + bytes([plain[12] ^ 1]) + plain[13:]]
  yield from changes(
      "metadata", plain, [lambda f: setattr(f, "metadata", b'{"a": 1}')], [
      lambda f, text=text: setattr(f, "metadata", text)
      for text in (b"", b"[]", b"{", b'{"\xff":1}', b"{}{}")])
  yield from changes("end", plain, [], [
      lambda f: setattr(f, "rest", b"\0"),
      lambda f: f.ops[-1].fields.pop(), lambda f: setattr(f.ops[-1], "length", 255)])
  pool = packed.Pool("", 0, "max", (1, 1), (1, 1))
  many = network(*[pool] * 4094)
  yield from changes("operations", many, [], [
      lambda f: (f.ops.insert(0, f.ops[0]), setitem(f.ops[-1], "input", 4096))])
  yield from changes("operations", plain, [],
                     [lambda f: setattr(f, "more", 2 ** 32 - 1)])
  yield from numbers("image", plain, None, "height", (1, 65536), (0, 65537))
  yield from numbers("image", plain, None, "width", (1, 65536), (0, 65537, 2 ** 32 - 1))
  wide = edit(plain, None, 4096, "width")
  yield from numbers("image", wide, None, "height", (4096,), (4097,))
  yield from numbers("crop", plain, None, "crop", (1,), (0, 2))
  yield from changes("kind", plain, [], [
      lambda f, n=n: setattr(f.ops[0], "kind", n) for n in (0, 9, 11, 255)])
  yield from changes("name", plain, [
      lambda f, x=x: setattr(f.ops[0], "name", x)
      for x in (b"", b"\x01\x7f", "\u0080\u07ff\u0800\ud7ff\ue000\uffff".encode(),
                "\U00010000\U0010ffff".encode())], [
      lambda f, x=x: setattr(f.ops[0], "name", x)
      for x in (b"\0", b"a\0", b"\x80", b"\xc1\xbf", b"\xc3", b"\xe0\x9f\xbf",
                b"\xed\xa0\x80",
                b"\xed\xbf\xbf", b"\xe2\x82", b"\xf0\x8f\xbf\xbf", b"\xf4\x90\x80\x80",
                b"\xf5\x80\x80\x80", b"\xf0\x90\x80", b"\xc3A", b"\xff")])
  yield from numbers("inputs", MIXED, CONCAT, "input", (0,), (7, 100, 2 ** 32 - 1))
  yield from numbers("inputs", MIXED, FLOAT_NORM, "shortcut", (-1, -2 ** 31), (
      5, 2 ** 31 - 1))
  zeros = network(threshold(), packed.Shortcut("short", 1, (1, 1), 65535, 0))
  yield from numbers("size", zeros, SHORTCUT, "after", (0,), (1, 65536))
  large = network(threshold(), packed.Shortcut("short", 1, (1, 1), 0, 0),
                  image=(4096, 4096, 1))
  yield from numbers("elements", large, SHORTCUT, "after", (0,), (1,))
  row = network(packed.Pool("p", 0, "max", (3, 1), (64, 1), (1, 2, 0, 0)),
                image=(1, 65536, 256))
  yield from changes("border", row, [], [
      lambda f: set_all(f.op(MAX_POOL), "pads", 2, 2, 0, 0)])
  yield "channels", [network(*[pool] * 61, image=(1, 1, 65536))], [last_op(
      network(*[pool] * 61, image=(1, 1, 65536)),
      lambda f: (f.ops.insert(0, f.ops[0]), setitem(f.ops[-1], "input", 63)))]
  yield from changes("sums", MIXED, [
      lambda f: set_all(f.op(ADD), "shift", 23, 0)], [
      lambda f: set_all(f.op(ADD), "shift", 23, 23)])
  wide = network(packed.Concat("c", (0,), (23,)),
                 packed.Pool("p", 1, "sum", (1, 1), (1, 1)),
                 image=(1, 2, 1))
  yield from changes("sums", wide, [], [
      lambda f: set_all(f.op(SUM_POOL), "window", 1, 2)])
  # 2 ** 40 is 2 ** 30 for the weight, times 2 ** 9 for 255 and 1, times 2 for the sum.
  yield "floats", [network(conv(0, "float32", value=2.0 ** 29))], [
      last_op(network(conv(0, "float32")), lambda f: setitem(
          f.op(CONV), "weights", struct.pack("<f", 2.0 ** 30)))]
  yield from constants()
  for bits, size, bad in (("float8_e4m3fn", 1, (b"\x7f", b"\xff")),
                          ("float16", 2, (b"\0\x7c", b"\1\xfc")),
                          ("bfloat16", 2, (b"\x80\x7f", b"\x81\xff")),
                          ("float32", 4, (b"\0\0\x80\x7f", b"\1\0\x80\xff"))):
    yield from changes("weights", network(conv(0, bits)), [
        lambda f, size=size: setitem(f.op(CONV), "weights", b"\1" * size)], [
        lambda f, x=x: setitem(f.op(CONV), "weights", x) for x in bad])
  yield from numbers("format", MIXED, CONV, "format", (3,), (0, 4, 7, 9, 18, 255))
  yield from numbers("format", network(norm()), FLOAT_NORM, "format",
                     (1, 8, 16, 17, 32), (
      4, 9, 33))
  flat = network(packed.Pool("p", 0, "max", (1, 1), (1, 1)), image=(3, 2, 1))
  yield from numbers("window", flat, MAX_POOL, "window", (1, 3),
                     (0, 4, 65537, 2 ** 32 - 1))
  apart = network(conv(0, 1, (1, 2, 2, 1), dilation=(2, 1)), image=(3, 2, 1))
  yield from changes("window", apart, [], [
      lambda f: set_all(f.op(CONV), "dilation", 3, 1),
      lambda f: set_all(f.op(CONV), "dilation", 1, 2)])
  for kind, data in ((MAX_POOL, flat), (CONV, apart), (SHORTCUT, MIXED)):
    yield from numbers("steps", data, kind, "strides", (1, 64), (0, 65, 2 ** 32 - 1))
  yield from numbers("steps", apart, CONV, "pads", (64,), (65, 2 ** 32 - 1))
  single = network(conv(0, 1, (1, 1, 1, 1), dilation=(1, 2)))
  yield from numbers("steps", single, CONV, "dilation", (64,), (0, 65))
  grouped = network(conv(0, 1, (4, 1, 1, 1), groups=2), image=(1, 1, 2))
  yield from numbers("groups", grouped, CONV, "groups", (2,), (0, 1, 4, 2 ** 31 + 1))
  yield from numbers("groups", grouped, CONV, "out", (4, 6), (3, 5))
  yield from numbers("border code", MIXED, CONV, "pad", (0, -1, 1), (2, -2, -128))
  three = network(*CODES, conv(2))
  yield from numbers("border code", three, CONV, "pad", (3, -3), (4, -4, 127))
  yield from numbers("border code", network(conv()), CONV, "pad", (0,), (1, -1))
  yield from changes("pool border", flat, [], [
      lambda f: set_all(f.op(MAX_POOL), "pads", 1, 0, 0, 0),
      lambda f: set_all(f.op(MAX_POOL), "pads", 0, 0, 0, 1)])
  yield from numbers("thresholds", MIXED, THRESHOLD, "bits", (1,), (0, 4, 255))
  yield from numbers("thresholds", MIXED, THRESHOLD, "width", (2,), (0, 1, 3, 8))
  again = network(threshold(), threshold(0), norm(0, "float16"))
  yield from changes("thresholds", again, [lambda f: setitem(f.ops[1], "input", 0)], [
      lambda f: setitem(f.ops[1], "input", 1)])
  last = packed_files.File(MIXED).ops[10]
  assert last.kind == THRESHOLD and last["shortcut"] == 2
  yield from changes("shortcut", MIXED, [lambda f: setitem(f.ops[10], "shortcut", 6)], [
      lambda f, n=n: setitem(f.ops[10], "shortcut", n) for n in (0, 4, 5)])
  yield from changes("shortcut", MIXED, [
      lambda f, n=n: setitem(f.ops[11], "shortcut", n) for n in (1, 2, -1)], [
      lambda f, n=n: setitem(f.ops[11], "shortcut", n) for n in (0, 4)])
  wide = network(*CODES, packed.Shortcut("w", 1, (1, 1), 1, 0), norm(0, 1, 1, 1))
  yield from changes("shortcut", wide, [], [lambda f: setitem(f.ops[4], "shortcut", 4)])
  shifted = network(packed.Concat("c", (0,), (16,)), threshold(0))
  logits = lambda f: (f.ops.pop(2), setitem(f.ops[-1], "input", 1))
  yield "logits", [last_op(shifted, logits)], [
      last_op(last_op(shifted, lambda f: setitem(f.ops[0], "shift", 17)), logits)]
  yield from changes("logits", MIXED, [], [lambda f: setitem(f.ops[-1], "input", 1),
                                            lambda f: setitem(f.ops[-1], "input", 5)])
  yield from changes("float norm", MIXED, [lambda f: setitem(f.ops[11], "input", 4)], [
      lambda f: setitem(f.ops[11], "input", 1)])
  zero = packed_files.Field("grid", "f", 0.0)
  yield from changes("grid", MIXED, [], [
      lambda f: (setitem(f.ops[4], "count", 1), f.ops[4].fields.append(zero)),
      lambda f: (setitem(f.ops[5], "count", 2), f.ops[5].fields.pop()),
      lambda f: (setitem(f.ops[11], "count", 1), f.ops[11].fields.append(zero))])
  yield from changes("concatenation", MIXED, [], [
      lambda f: (setitem(f.op(CONCAT), "count", 0), delitems(f.op(CONCAT).fields, 1)),
      lambda f: set_all(f.op(CONCAT), "input", 0, 1),
      lambda f: set_all(f.op(CONCAT), "input", 1, 2),
      lambda f: set_all(f.op(CONCAT), "input", 0, 5)])
  apart = network(packed.Pool("p", 0, "max", (1, 1), (2, 1)),
                  packed.Concat("c", (0, 0), (0, 0)), packed.Add("a", 0, 0),
                  image=(2, 1, 1))
  yield from changes("concatenation", apart, [], [
      lambda f: set_all(f.op(CONCAT), "input", 0, 1)])
  levels = lambda f: f.ops[13]
  yield from changes("shift", MIXED, [
      lambda f: set_all(levels(f), "shift", 23, 0)], [
      lambda f: set_all(levels(f), "shift", 24, 0),
      lambda f: set_all(levels(f), "shift", 0, 255),
      lambda f: set_all(f.ops[12], "shift", 0, 1),
      lambda f: set_all(f.ops[14], "shift", 1, 0)])
  yield from changes("zeros", MIXED, [], [
      lambda f, n=n: setitem(f.op(SHORTCUT), "input", n) for n in (0, 5)])
  yield from changes("addition", MIXED, [lambda f: set_all(levels(f), "input", 1, 3)], [
      lambda f, pair=pair: set_all(levels(f), "input", *pair)
      for pair in ((0, 1), (2, 4), (5, 5), (1, 13))])
  yield from changes("addition", apart, [],
                     [lambda f: set_all(f.op(ADD), "input", 0, 1)])
  yield from numbers("classes", plain, None, "classes", (1,), (0, 2, 2 ** 32 - 1))
  yield from changes("classes", plain, [], [
      lambda f: f.ops.pop(), lambda f: f.ops.append(f.ops[0]),
      lambda f: f.ops.append(f.ops[-1])])
  yield from numbers("classes", network(norm()), FLOAT_NORM, "format", (1,), (0,))


def setitem(op, name, value):
  op[name] = value


def delitems(items, first):
  del items[first:]


def documented(text: str) -> list[str]:
  """The names of the rules in docs/format.md."""
  table = text[text.index("## Rules"):text.index("## Bounds")]
  return re.findall(r"^\| ([a-z ,]+?) \| [A-Z]", table, re.M)


def test_every_rule_is_broken_by_a_file_of_its_own():
  found = {}
  for rule, taken, refused in cases():
    for i, data in enumerate(taken):
      assert not refusals(data, packed.UNLIMITED), (rule, i)
    for i, data in enumerate(refused):
      assert refusals(data, packed.UNLIMITED), (rule, i)
    found[rule] = found.get(rule, 0) + len(refused)
  rules = documented(FORMAT.read_text())
  assert rules[-1] == "padding, memory, operations of an image"  # See below.
  assert sorted(found) == sorted(rules[:-1])


# Limits.


def test_costs_by_hand():
  """An image of 5 x 4 x 20, a border, 3 outputs, a maximum of 2 x 2 and 2 bits."""
  data = network(
      # Value 1: 4 x 3 x 3, from 6 x 4 x 20.
      conv(0, 2, (3, 3, 2, 20), pads=(1, 0, 0, 0)),
      packed.Pool("m", 1, "max", (2, 2), (2, 1)),  # Value 2: 2 x 2 x 3.
      threshold(2, 2, 3), norm(2, "float16", 3), image=(5, 4, 20))
  image, border = 5 * 4 * 32 * 4, 6 * 4 * 20
  sums, pool, codes, logits = 12 * 16 * 4, 4 * 16 * 4, 4 * 16, 32 * 4
  weights = 3 * 2 * 24 * 64
  assert packed.cost(packed.from_bytes(data)) == packed.Limits(
      padding=weights - 4 * 3 * 2 * 20 * 3,
      memory=image + sums + 4 * border,
      operations=12 * weights + 64 * border + 12 * 16 * 64  # Convolution.
      + 4 * 16 * (64 + 16 * 4)  # Maximum.
      + 4 * 16 * (64 + 16 * 2)  # Thresholds.
      + 4 * 16 * 512  # Float norm.
      + 32 * (64 + 16 * 5 * 4) + 32 * 64)  # The largest pixels, and the logits.
  assert pool + codes + logits < sums  # The most is needed by the convolution.


@pytest.mark.parametrize("groups, out, weights, elements", [
    (20, 40, 9 * 1 * 64, 1 * 48),  # Each output channel has inputs of its own.
    (2, 600, 2 * 9 * 16 * 320, 20)])  # The groups run one after the other.
def test_costs_of_groups_by_hand(groups, out, weights, elements):
  c = conv(0, 1, (out, 3, 3, 20 // groups), groups=groups)
  program = packed.from_bytes(network(c, image=(7, 7, 20)))
  cost = packed.cost(program)
  assert cost.padding == max(0, weights - 4 * c.kernel.size)
  image, result = 49 * 32 * 4, 25 * -(-out // 16) * 16 * 4
  assert cost.memory == image + result + 4 * 49 * elements
  rest = 49 * 64 * elements + result // 4 * 64 + 32 * (64 + 16 * 49) + 32 * 64
  assert cost.operations == 25 * weights + rest


def assert_refused_just_below_its_cost(data: bytes, cost: packed.Limits) -> None:
  assert not refusals(data, cost)
  for field, need in zip(cost._fields, cost):
    if need:
      assert field in refusals(data, cost._replace(**{field: need - 1}))[0]


def test_limits_are_exact_in_both_parsers():
  for data in (*packed_networks.seeds(), MIXED):
    assert_refused_just_below_its_cost(data, packed.cost(packed.from_bytes(data)))


@pytest.mark.parametrize("limit, ops, image", [
    # Weights whose padding takes 1000 times the file.
    ("padding", [conv(0, 1, (1, 1024, 1024, 1))], (1024, 1024, 1)),
    # Values that all live until they are added up.
    ("memory", [*[packed.Pool("p", 0, "max", (1, 1), (1, 1))] * 100,
                *[packed.Add("a", n, n + 1) for n in range(1, 100)]], (512, 512, 1)),
    # Pixels of one channel, which kernels pad to 16.
    ("memory", [], (4096, 4096, 1)),
    # A window of a million elements around each of a million.
    ("operations", [packed.Pool("p", 0, "sum", (512, 512), (1, 1))], (1024, 1024, 1)),
    # Many layers.
    ("operations", [conv(0, "float32", (64, 3, 3, 64))] * 150, (256, 256, 64))])
def test_small_files_that_cost_much_are_refused(limit, ops, image):
  data = network(*ops, image=image)
  assert refusals(data)
  for said in refusals(data):
    assert f"its {limit}" in said
  assert not refusals(data, packed.UNLIMITED)


def test_memory_of_loading_is_bounded_by_the_size_of_the_file():
  for bits in (1, 2, 3, "float8_e4m3fn"):
    data = network(conv(0, bits, (100, 1, 1, 40000)), image=(1, 1, 40000))
    tracemalloc.start()
    try:
      packed.from_bytes(data)
      _, peak = tracemalloc.get_traced_memory()
    finally:
      tracemalloc.stop()
    assert peak < 32 * len(data) + 2 ** 26, bits


@pytest.mark.slow
@pytest.mark.parametrize("name, size", [("resnet18", 448), ("resnet50", 224)])
def test_large_networks_stay_far_below_the_limits(name, size):
  model = models.NETWORKS[name](1000)
  variables = jax.tree.map(
      lambda leaf: np.ones(leaf.shape, leaf.dtype),
      jax.eval_shape(lambda: layers.initialize(model, (size, size, 3))))
  pixels = pixels_lib.pixels("integer", (0.49, 0.48, 0.44), (0.2, 0.2, 0.2))
  program = pack.pack(model, variables, source_shape=(size, size, 3), pixels=pixels)
  for need, limit in zip(packed.cost(program), packed.Limits()):
    assert 15 * need < limit


# Both parsers, and what they make of a file.


def assert_same_values(program: packed.Program, network: native.Network) -> None:
  """Compares logits bit for bit, or operations of floats one by one."""
  images = packed_networks.images(program, 2)
  kinds = packed.infer_values(program)
  logits = network.logits(images)
  assert np.isfinite(logits).all()
  if all(kind.kind != "FLOAT" for kind in kinds[:-1]):
    assert logits.tobytes() == reference.logits(program, images).tobytes()
    return
  have = network.values(images)
  assert logits.tobytes() == have[-1].tobytes()
  for i, (op, kind) in enumerate(zip(program.ops, kinds[1:]), 1):
    given = [have[j] for j in packed.inputs(op)]
    of = [kinds[j] for j in packed.inputs(op)]
    want = reference.run_op(op, given, of, kind)
    if kind.kind == "FLOAT" and isinstance(op, packed.Conv | packed.Pool):
      # Their sums are rounded in another order: relative to the sums of magnitudes.
      if isinstance(op, packed.Conv):
        op = op._replace(kernel=np.abs(op.kernel), pad=abs(op.pad), weight_unit=abs(
            op.weight_unit), input_unit=abs(op.input_unit))
      sums = reference.run_op(op, [np.abs(x) for x in given], of, kind)
      terms = op.kernel[0].size if isinstance(op, packed.Conv) else math.prod(op.window)
      most = sums * terms * 2.0 ** -22 + 2.0 ** -120
      assert (np.abs(have[i] - want) <= most).all(), op
    else:
      np.testing.assert_array_equal(have[i], want, err_msg=str(op))


def campaign(seed: int, count: int) -> collections.Counter:
  """Counts what becomes of mutants; any disagreement fails."""
  outcomes = collections.Counter()
  for i, data in enumerate(packed_files.mutants(packed_networks.seeds(), seed, count)):
    try:
      if refusals(data):
        outcomes["refused"] += 1
        continue
      program = packed.from_bytes(data)
      cost = packed.cost(program)
      assert_refused_just_below_its_cost(data, cost)
      if native.available() and cost.operations < 2 ** 25:
        outcomes["run"] += 1
        assert_same_values(program, native.load(data))
      outcomes["taken"] += 1
    except Exception as error:
      error.add_note(f"mutant {i} of seed {seed}")
      raise
  return outcomes


def test_parsers_agree_on_damaged_files():
  outcomes = campaign(0, 100)
  assert outcomes["refused"] > 50 and outcomes["run"] > 10


@pytest.mark.slow
def test_parsers_agree_on_many_damaged_files():
  outcomes = campaign(1, MUTANTS)
  assert outcomes["refused"] > MUTANTS / 2 and outcomes["run"] > MUTANTS / 10


def xla_logits(program: packed.Program, products: str,
               images: np.ndarray) -> np.ndarray:
  operands, function = xla.logits(program, products)
  return np.asarray(jax.jit(function)(operands, images))


@pytest.mark.parametrize("products", ["popcount", "dot"])
def test_largest_and_smallest_logits_are_equal_in_xla(products):
  """Constants at the limits of the rules: nothing overflows or becomes subnormal."""
  rng = np.random.default_rng(0)
  classes = 500
  parts = {name: np.float32(rng.choice([0, 1, -1, 3, -7], classes) * 2.0 ** rng.choice(
      [least, 0, 37], classes))
           for name, least in (("center", -40), ("scale", -40), ("constant", -100))}
  for unit in (2.0 ** 40, 2.0 ** -40, -1.5 * 2.0 ** -40, 0.0):
    program = packed.Program(
        (1, 1, 3), (1, 1), np.uint8([0, 128, 255]), classes,
        (conv(0, 1, (classes, 1, 1, 3)), packed.Logits("l", 1, unit, **parts)), {})
    program = packed.from_bytes(packed.to_bytes(program))
    images = packed_networks.images(program, 4)
    want = reference.logits(program, images)
    assert np.isfinite(want).all() and len(np.unique(want)) > 50
    assert xla_logits(program, products, images).tobytes() == want.tobytes()
    if native.available():
      logits = native.load(packed.to_bytes(program)).logits(images)
      assert logits.tobytes() == want.tobytes()


@pytest.mark.slow
def test_damaged_files_have_equal_logits_in_xla():
  """A few of the mutants: XLA compiles each for a second."""
  compared = 0
  seeds = [packed_networks.integers(bits, bits) for bits in (1, 2, 3)]
  for data in packed_files.mutants([packed.to_bytes(p) for p in seeds], 3, MUTANTS):
    if compared >= MUTANTS / 240:
      break
    try:
      program = packed.from_bytes(data)
    except ValueError:
      continue
    if packed.cost(program).operations > 2 ** 25:
      continue
    if any(kind.kind == "FLOAT" for kind in packed.infer_values(program)[:-1]):
      continue
    images = packed_networks.images(program, 2)
    want = reference.logits(program, images)
    products = ("popcount", "dot")[compared % 2]
    assert xla_logits(program, products, images).tobytes() == want.tobytes()
    compared += 1
  assert compared >= MUTANTS / 240
