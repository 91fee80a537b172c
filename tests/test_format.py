"""docs/format.md: files are written and read by its tables alone, and its numbers hold.

The encoder and the decoder here know the types of the document. Which fields there are,
in which order and of which type, they read from its tables.
"""

import math
import pathlib
import re
from typing import Any, Callable
import zlib

import ml_dtypes
import numpy as np
import pytest

from minw import fold
from minw import infer
from minw import packed
from minw.kernels import native
from minw.kernels import reference
from minw.packed import limits
from minw.packed import rules
import packed_networks

ROOT = pathlib.Path(__file__).parents[1]
TEXT = (ROOT / "docs" / "format.md").read_text()

NUMBERS = {"u8": "u1", "u32": "<u4", "u64": "<u8", "i8": "i1", "i16": "<i2",
           "i32": "<i4", "f8": ml_dtypes.float8_e4m3fn, "f16": "<f2",
           "bf16": ml_dtypes.bfloat16, "f32": "<f4"}


def section(title: str) -> str:
  """The text below a heading, up to the next one."""
  found, = re.findall(rf"^#+ {title}\n(.*?)(?=^#|\Z)", TEXT, re.M | re.S)
  return found


def tables(title: str) -> list[list[list[str]]]:
  """The rows of each table of a section, without its head."""
  rows = [[cell.strip() for cell in line[1:-1].split("|")] if line[:1] == "|" else None
          for line in section(title).split("\n")]
  found: list[list[list[str]]] = []
  for before, row in zip([None, *rows], rows):
    if row is not None:
      if before is None:
        found.append([])
      found[-1].append(row)
  return [table[2:] for table in found]


KINDS = {  # The fields of each kind of operation: name, type.
    int(kind): [(name, of) for name, of, _ in tables(title)[0]]
    for title in re.findall(r"^### (Kinds? .*)$", TEXT, re.M)
    for kind in re.findall(r"\d+", title.split(":")[0])}
FORMATS = {int(number): of for number, _, of in tables("Values")[2]}
FILE, = tables("File")
PROGRAM, BEGIN = tables("Program")
FILE, PROGRAM, BEGIN = ([row[:2] for row in table] for table in (FILE, PROGRAM, BEGIN))
CODES = {int(bits): [int(n) for n in codes.split(",")]
         for bits, codes, _, _ in tables("Values")[1]}
COUNTS = {int(bits): int(count) for bits, _, _, count in tables("Values")[1]}


def parsed(of: str, size: Callable[[str], int]) -> tuple[int, str, tuple | None]:
  """A type as (planes, element, shape). The shape is None for a number.

  Args:
    of: A type of the document.
    size: Gives the number that a name in the type stands for.
  """
  if of.startswith("weights["):
    of = FORMATS[size("format")].replace("[n]", of.removeprefix("weights"))
  if of.startswith("thresholds["):
    of = {2: "i16", 4: "i32"}[size("width")] + of.removeprefix("thresholds")
  planes, element, shape = re.fullmatch(r"(?:(\d) × )?(.*?)(?:\[(.*)\])?", of).groups()
  if shape is not None:
    shape = tuple(int(n) if n.isdigit() else int(size(n)) for n in shape.split(" · "))
  return int(planes or 1), element, shape


def rows(table: list, version: int) -> list[tuple[str, str]]:
  """The fields of a table that a version has."""
  split = [(name, *of.split(", version ")) for name, of in table]
  return [(name, of) for name, of, *since in split if version >= int([*since, 1][0])]


def encode(table: list, version: int, fields: dict[str, Any]) -> bytes:
  """The bytes of a table's fields; `fields` also has the sizes that types name."""
  parts = []
  for name, of in rows(table, version):
    planes, element, shape = parsed(of, fields.__getitem__)
    value = fields[name]
    if element == "bits":
      assert len(value) == planes
      for plane in value:
        assert plane.shape == shape
        bits = np.append(plane.ravel(), np.zeros(-plane.size % 8))
        parts.append(bytes((bits.reshape(-1, 8) @ 2 ** np.arange(8)).astype(np.uint8)))
    elif element.startswith("("):
      assert shape == (len(value),)
      for row in value:
        parts += [np.array(n, NUMBERS[t]).tobytes()
                  for n, t in zip(row, element[1:-1].split(), strict=True)]
    else:
      array = np.array(value, NUMBERS[element])
      assert array.shape == (shape or ())
      parts.append(array.tobytes())
  return b"".join(parts)


class Reader:
  """Reads fields by tables from the front of bytes."""

  def __init__(self, data: bytes):
    self.data = data

  def take(self, size: int) -> bytes:
    assert len(self.data) >= size
    taken, self.data = self.data[:size], self.data[size:]
    return taken

  def array(self, element: str, shape: tuple[int, ...]) -> np.ndarray:
    dtype = np.dtype(NUMBERS[element])
    data = self.take(math.prod(shape) * dtype.itemsize)
    return np.frombuffer(data, dtype).reshape(shape)

  def bits(self, shape: tuple[int, ...]) -> np.ndarray:
    count = math.prod(shape)
    data = self.array("u8", ((count + 7) // 8,))
    return (data[:, None] >> np.arange(8) & 1).ravel()[:count].reshape(shape)

  def fields(
      self, table: list, version: int, size: Callable[[str, dict], int] | None = None
  ) -> dict[str, Any]:
    """The fields of a table; `size` gives numbers that are no fields."""
    fields: dict[str, Any] = {}
    find = lambda name: fields[name] if name in fields else size(name, fields)
    for name, of in rows(table, version):
      planes, element, shape = parsed(of, find)
      if element == "bits":
        fields[name] = [self.bits(shape) for _ in range(planes)]
      elif element.startswith("("):
        fields[name] = [tuple(self.array(t, ())[()] for t in element[1:-1].split())
                        for _ in range(shape[0])]
      else:
        array = self.array(element, shape or ())
        fields[name] = array[()] if shape is None else array
    return fields


def file_of(program: bytes, version: int, metadata: bytes = b"{}") -> bytes:
  """A file with the right sizes and the right checksum."""
  fields = {
      "magic": np.frombuffer(b"MINW\r\n\x1a\0", np.uint8), "version": version,
      "checksum": 0, "file size": 32 + len(program) + len(metadata),
      "program size": len(program), "metadata size": len(metadata),
      "program": np.frombuffer(program, np.uint8),
      "metadata": np.frombuffer(metadata, np.uint8)}
  first = encode(FILE, version, fields)
  return encode(FILE, version, fields | {"checksum": zlib.crc32(first[16:])})


def operation(kind: int, name: str, version: int, /, **fields: Any) -> bytes:
  """An operation; spaces in names of fields are underscores here."""
  fields = {field.replace("_", " "): value for field, value in fields.items()}
  begin = {"kind": kind, "length": len(name), "name": [*name.encode()]}
  if "bits" in fields:
    fields["count"] = COUNTS[fields["bits"]]
  return encode(BEGIN, version, begin) + encode(KINDS[kind], version, fields)


WINDOW = dict(vertical_stride=1, horizontal_stride=1, top=0, bottom=0, left=0, right=0)
UNITS = dict(border_code=0, weight_unit=1, input_unit=1)


def test_a_network_of_integers_by_the_document():
  """Version 1, and all operations that integers can have."""
  rng = np.random.default_rng(0)
  codes, signs = rng.integers(-3, 4, (4, 2, 2, 2)), rng.choice([-1, 1], (4, 1, 1, 4))
  planes = [codes > 0, abs(codes) % 2, abs(codes) // 2]
  falling = np.array([0, 1, 0, 0])
  first, second = rng.integers(-500, 500, (1, 6, 4)), rng.integers(-9, 9, (7, 2, 4))
  second[0, 0, 0] = 70000  # It does not fit in two bytes.
  constants = [[0.5] * 22, [2] * 22, [0] * 22]
  parts = [
      encode(PROGRAM, 1, {
          "height": 5, "width": 2, "channels": 2, "crop height": 3, "crop width": 2,
          "offset": [3, 200], "classes": 22, "count": 12}),
      operation(1, "a", 1, **WINDOW | {"left": 1}, **UNITS | {"weight_unit": 0.25},
                input=0, format=3, kernel_height=2, kernel_width=2, group_channels=2,
                output_channels=4, weights=planes),
      operation(4, "b", 1, input=1, shortcut=-1, bits=3, width=2, falling=[falling],
                thresholds=first, channels=4, tables=1),
      operation(1, "c", 1, **WINDOW, **UNITS, input=2, format=1, kernel_height=1,
                kernel_width=1, group_channels=4, output_channels=4,
                weights=[signs > 0]),
      operation(4, "d", 1, input=3, shortcut=2, bits=2, width=4, falling=[1 - falling],
                thresholds=second, channels=4, tables=7),
      operation(7, "e", 1, input=4, vertical_stride=1, horizontal_stride=1, before=1,
                after=2),
      operation(10, "f", 1, first=2, second=2, first_shift=1, second_shift=0),
      operation(4, "g", 1, input=6, shortcut=-1, bits=2, width=2, falling=[falling],
                thresholds=first[:, :2], channels=4, tables=1),
      operation(6, "h", 1, count=2, inputs=[(5, 0), (7, 0)]),
      operation(2, "i", 1, **WINDOW, input=8, window_height=2, window_width=1),
      operation(3, "j", 1, **WINDOW, input=9, window_height=1, window_width=2),
      operation(6, "k", 1, count=2, inputs=[(10, 0), (10, 3)]),
      operation(5, "l", 1, input=11, unit=1, channels=22,
                **dict(zip(("center", "scale", "constant"), constants)))]
  int32, int8 = lambda x: x.astype(np.int32), lambda x: x.astype(np.int8)
  program = packed.Program((5, 2, 2), (3, 2), np.uint8([3, 200]), 22, (
      packed.Conv("a", 0, 3, int8(codes), pads=(0, 0, 1, 0), weight_unit=0.25),
      packed.Threshold("b", 1, 3, falling > 0, int32(first)),
      packed.Conv("c", 2, 1, int8(signs)),
      packed.Threshold("d", 3, 2, falling < 1, int32(second), 2),
      packed.Shortcut("e", 4, (1, 1), 1, 2), packed.Add("f", 2, 2, 1, 0),
      packed.Threshold("g", 6, 2, falling > 0, int32(first[:, :2])),
      packed.Concat("h", (5, 7), (0, 0)), packed.Pool("i", 8, "max", (2, 1), (1, 1)),
      packed.Pool("j", 9, "sum", (1, 2), (1, 1)), packed.Concat("k", (10, 10), (0, 3)),
      packed.Logits("l", 11, 1.0, *np.float32(constants))), {})
  check(file_of(b"".join(parts), 1), program)


def test_a_network_of_floats_by_the_document():
  """Version 2: groups, dilation, weights and activations in float formats."""
  codes = np.array([[1, 1], [-1, 1], [2, 0], [3, -1]]).reshape(4, 2, 1, 1)
  half = np.array([[0.5, -1.25, 2, 0], [3, 1, -0.75, 65504]]).reshape(2, 1, 1, 4)
  signs = np.array([[1, -1], [-1, -1]]).reshape(2, 1, 1, 2)
  dense = dict(kernel_height=1, kernel_width=1, groups=1, vertical_dilation=1,
               horizontal_dilation=1, **WINDOW)
  norm = lambda n: dict(
      center=[0.5] * n, scale=[0.25] * n, constant=[-1] * n, channels=n)
  parts = [
      encode(PROGRAM, 2, {
          "height": 3, "width": 1, "channels": 2, "crop height": 3, "crop width": 1,
          "offset": [0, 100], "classes": 2, "count": 6}),
      operation(1, "a", 2, **WINDOW, **UNITS, input=0, format=3, kernel_height=2,
                kernel_width=1, group_channels=1, output_channels=4, groups=2,
                vertical_dilation=2, horizontal_dilation=1,
                weights=[codes > 0, abs(codes) % 2, abs(codes) // 2]),
      operation(8, "b", 2, input=1, shortcut=-1, format=17, unit=2**-6, shortcut_unit=1,
                count=0, grid=[], **norm(4)),
      operation(1, "c", 2, **dense, **UNITS, input=2, format=16, group_channels=4,
                output_channels=2, weights=half),
      operation(8, "d", 2, input=3, shortcut=-1, format=3, unit=1, shortcut_unit=1,
                count=3, grid=[0.125, 0.375, 0.75], **norm(2)),
      operation(1, "e", 2, **dense, **UNITS, input=4, format=1, group_channels=2,
                output_channels=2, weights=[signs > 0]),
      operation(8, "f", 2, input=5, shortcut=4, format=0, unit=1, shortcut_unit=0.25,
                count=0, grid=[], **norm(2))]
  norm = lambda n: [np.full(n, x, np.float32) for x in (0.5, 0.25, -1)]
  none = np.zeros(0, np.float32)
  program = packed.Program((3, 1, 2), (3, 1), np.uint8([0, 100]), 2, (
      packed.Conv("a", 0, 3, codes.astype(np.int8), groups=2, dilation=(2, 1)),
      packed.FloatNorm("b", 1, "bfloat16", 2**-6, *norm(4), none),
      packed.Conv("c", 2, "float16", half.astype(np.float32)),
      packed.FloatNorm("d", 3, 3, 1.0, *norm(2), np.float32([0.125, 0.375, 0.75])),
      packed.Conv("e", 4, 1, signs.astype(np.int8)),
      packed.FloatNorm("f", 5, None, 1.0, *norm(2), none, 4, 0.25)), {})
  check(file_of(b"".join(parts), 2), program)


def check(data: bytes, program: packed.Program) -> None:
  """Checks that a file holds a program, for both parsers, and gives its logits."""
  assert packed.to_bytes(program) == data
  packed_networks.assert_same(packed.from_bytes(data), program)
  if native.available():
    images = packed_networks.images(program, 50)
    want = reference.logits(program, images)
    assert len(np.unique(want)) > 3
    np.testing.assert_array_equal(native.load(data).logits(images), want)


@pytest.mark.parametrize("data", [
    *(path.read_bytes() for path in infer.shipped().values()),
    *packed_networks.seeds()], ids=lambda data: f"{zlib.crc32(data):08x}")
def test_files_are_read_by_the_document(data):
  """Weights, thresholds and constants are those that `from_bytes` finds."""
  size = int.from_bytes(data[24:28], "little")
  program = packed.from_bytes(data)
  values = packed.infer_values(program)
  reader = Reader(data)
  head = reader.fields([*FILE[:6]], 1)
  version = int(head["version"])
  assert head["magic"].tobytes() == packed.MAGIC and head["file size"] == len(data)
  assert head["checksum"] == zlib.crc32(data[16:])
  assert head["program size"] + head["metadata size"] == len(reader.data)
  reader.data = reader.data[:size]
  image = reader.fields(PROGRAM, version)
  assert (image["height"], image["width"], image["channels"]) == program.source_shape
  assert (image["classes"], image["count"]) == (program.num_classes, len(program.ops))

  def sizes(name, fields):
    if name == "channels":
      return values[fields["input"]].shape[2]
    if name == "count":
      return COUNTS[fields["bits"]]
    assert name == "tables"
    if fields["shortcut"] < 0:
      return 1
    return 2 * CODES[values[fields["shortcut"]].bits][-1] + 1

  for op in program.ops:
    begin = reader.fields(BEGIN, version)
    assert begin["name"].tobytes().decode() == op.name
    fields = reader.fields(KINDS[begin["kind"]], version, sizes)
    if isinstance(op, packed.Conv):
      weights = fields["weights"]
      if fields["format"] < 4:
        sign, *planes = (plane.astype(int) for plane in weights)
        magnitude = sum(2**i * plane for i, plane in enumerate(planes)) if planes else 1
        weights = (2 * sign - 1) * magnitude
      np.testing.assert_array_equal(weights.astype(np.float64), op.kernel)
    for name in ("thresholds", "center", "scale", "constant", "grid", "unit", "before"):
      if name in fields:
        np.testing.assert_array_equal(fields[name], getattr(op, name))
    if isinstance(op, packed.Threshold):
      np.testing.assert_array_equal(fields["falling"][0], op.falling)
    if isinstance(op, packed.Concat):
      assert fields["inputs"] == [*zip(op.inputs, op.shifts)]
  assert not reader.data


def test_the_example():
  lines = re.search("```text\n(.*?)```", section("Example"), re.S).group(1).split("\n")
  data = bytes.fromhex("".join(line[:24] for line in lines))
  assert data == packed.to_bytes(packed_networks.small())


def test_codes_and_formats():
  table = tables("Values")[1]
  assert [int(bits) for bits, *_ in table] == [*packed.LEVELS] == [1, 2, 3]
  for bits, codes, levels, count in table:
    codes, levels = ([int(n) for n in cell.split(",")] for cell in (codes, levels))
    assert packed.levels(np.array(codes), int(bits)).tolist() == levels
    assert (max(codes), int(count)) == (
        packed.max_code(int(bits)), packed.num_thresholds(int(bits)))
  numbers = {name: int(number) for number, name, _ in tables("Values")[2][3:]}
  assert numbers == packed.FLOAT_FORMATS


# The numbers of the rules, in Python and in C++.

_CONSTANTS = {  # The names in minw/kernels/csrc; MAX_SUM is one less than kMaxBound.
    "kMaxFile": rules.MAX_FILE, "kMaxOps": rules.MAX_OPS, "kMaxSize": rules.MAX_SIZE,
    "kMaxElements": rules.MAX_ELEMENTS, "kMaxPadded": rules.MAX_PADDED,
    "kMaxChannels": rules.MAX_CHANNELS, "kMaxPad": rules.MAX_STEP,
    "kMaxStride": rules.MAX_STEP, "kMaxShift": rules.MAX_SHIFT,
    "kMaxBound": rules.MAX_SUM + 1, "kMaxLogits": rules.MAX_LOGIT_SUM,
    "kMaxExponent": rules.MAX_EXPONENT, "kLeastConstant": rules.LEAST_CONSTANT,
    "kMostConstant": rules.MOST_CONSTANT, "kLeastAdded": rules.LEAST_ADDED,
    "kOperations": limits.ELEMENT_OPERATIONS,
    "kStepOperations": limits.STEP_OPERATIONS,
    "kFloatOperations": limits.FLOAT_OPERATIONS, "kFreePadding": limits.FREE_PADDING,
    "kOwnProducts": limits.OWN_PRODUCTS, "kHeader": 32,
    **{name: value for name, value in packed.Limits()._asdict().items()}}


def evaluated(expression: str) -> float:
  """The value of a constant in C++: a literal, or a power of two as a shift."""
  expression = re.sub(r"u?int64_t\{1\}", "1", expression.strip())
  if expression.startswith("0x"):
    return float.fromhex(expression.removesuffix("f"))
  number, _, shift = expression.partition(" << ")
  return int(number) << int(shift or 0)


def test_numbers_in_cpp():
  sources = "".join(path.read_text() for path in sorted(
      (ROOT / "minw/kernels/csrc").glob("*.[ch]*")))
  for name, value in _CONSTANTS.items():
    kind = r"[\w ,.={}<-]*" if name.startswith("k") else "uint64_t "
    found = re.findall(rf"^ *{kind}\b{name} =\s+([^,;]+)[,;]", sources, re.M)
    assert [evaluated(text) for text in found] == [value], (name, found)


def test_every_number_in_python_is_compared():
  for module in (rules, limits):
    for name, value in vars(module).items():
      if name.isupper() and isinstance(value, (int, float)):
        assert value in _CONSTANTS.values() or name == "MAX_SUM", name


def test_constants_of_a_fold_are_those_of_a_file():
  assert fold.LEAST_CENTER == rules.LEAST_CONSTANT
