"""Both parsers of packed networks against docs/format.md, rule by rule, and one another."""

import collections
import math
import os
import pathlib
import re
import struct

import numpy as np
import pytest

from minw import infer
from minw import packed
from minw.kernels import native
from minw.kernels import reference
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
MUTANTS = int(os.environ.get("MINW_MUTANTS", 6000))


def refusals(data: bytes, limits: packed.Limits = packed.Limits()) -> list[str]:
  """What each parser says of a file that it refuses; both must say something, or none.

  Any other error than ValueError passes through.
  """
  said = []
  for parser in [packed.from_bytes] + [native.load] * native.available():
    try:
      parser(data, limits)
    except ValueError as error:
      assert "\n" not in str(error)
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
  yield from changes("metadata", plain, [lambda f: setattr(f, "metadata", b'{"a": 1}')], [
      lambda f, text=text: setattr(f, "metadata", text)
      for text in (b"", b"[]", b"{", b'{"\xff":1}', b"{}{}")])
  yield from changes("end", plain, [], [
      lambda f: setattr(f, "rest", b"\0"),
      lambda f: f.ops[-1].fields.pop(), lambda f: setattr(f.ops[-1], "length", 255)])
  pool = packed.Pool("", 0, "max", (1, 1), (1, 1))
  many = network(*[pool] * 4094)
  yield from changes("operations", many, [], [
      lambda f: (f.ops.insert(0, f.ops[0]), setitem(f.ops[-1], "input", 4096))])
  yield from changes("operations", plain, [], [lambda f: setattr(f, "more", 2 ** 32 - 1)])
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
      for x in (b"\0", b"a\0", b"\x80", b"\xc1\xbf", b"\xc3", b"\xe0\x9f\xbf", b"\xed\xa0\x80",
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
  wide = network(packed.Concat("c", (0,), (23,)), packed.Pool("p", 1, "sum", (1, 1), (1, 1)),
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
  yield from numbers("format", network(norm()), FLOAT_NORM, "format", (1, 8, 16, 17, 32), (
      4, 9, 33))
  flat = network(packed.Pool("p", 0, "max", (1, 1), (1, 1)), image=(3, 2, 1))
  yield from numbers("window", flat, MAX_POOL, "window", (1, 3), (0, 4, 65537, 2 ** 32 - 1))
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
                  packed.Concat("c", (0, 0), (0, 0)), packed.Add("a", 0, 0), image=(2, 1, 1))
  yield from changes("concatenation", apart, [], [
      lambda f: set_all(f.op(CONCAT), "input", 0, 1)])
  levels = lambda f: f.ops[13]
  yield from changes("shift", MIXED, [
      lambda f: set_all(levels(f), "shift", 23, 0)], [
      lambda f: set_all(levels(f), "shift", 24, 0),
      lambda f: set_all(levels(f), "shift", 0, 255),
      lambda f: set_all(f.ops[12], "shift", 0, 1), lambda f: set_all(f.ops[14], "shift", 1, 0)])
  yield from changes("zeros", MIXED, [], [
      lambda f, n=n: setitem(f.op(SHORTCUT), "input", n) for n in (0, 5)])
  yield from changes("addition", MIXED, [lambda f: set_all(levels(f), "input", 1, 3)], [
      lambda f, pair=pair: set_all(levels(f), "input", *pair)
      for pair in ((0, 1), (2, 4), (5, 5), (1, 13))])
  yield from changes("addition", apart, [], [lambda f: set_all(f.op(ADD), "input", 0, 1)])
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
  table = text[text.index("## Rules"):text.index("## Limits")]
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
