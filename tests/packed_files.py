"""Files of packed networks as trees of named fields, to damage them field by field.

Written by docs/format.md, apart from the reader and the writer in `minw.packed`.
"""

import copy
import math
import struct
from typing import Any, Iterator, Sequence
import zlib

import numpy as np

from minw import packed

MAGIC = b"MINW\r\n\x1a\0"
CONV, MAX_POOL, SUM_POOL, THRESHOLD, LOGITS = 1, 2, 3, 4, 5
CONCAT, SHORTCUT, FLOAT_NORM, ADD = 6, 7, 8, 10

_WINDOW = ["strides"] * 2 + ["pads"] * 4
_INTEGERS = {code: struct.calcsize(code) for code in "bBiI"}


class Field:
  """A named number (of a code of `struct`), or bytes (code "s")."""

  def __init__(self, name: str, code: str, value: Any):
    self.name, self.code, self.value = name, code, value

  def to_bytes(self) -> bytes:
    if self.code == "s":
      return self.value
    if self.code == "f":
      return struct.pack("<f", self.value)
    size = _INTEGERS[self.code]
    return (int(self.value) % 2 ** (8 * size)).to_bytes(size, "little")


class Operation:
  """An operation; `length` overrides that of its name."""

  def __init__(self, kind: int, name: bytes, fields: list[Field]):
    self.kind, self.name, self.fields, self.length = kind, name, fields, None

  def __getitem__(self, name: str) -> Any:
    return self.all(name)[0].value

  def __setitem__(self, name: str, value: Any) -> None:
    self.all(name)[0].value = value

  def all(self, name: str) -> list[Field]:
    """All fields of a name."""
    return [field for field in self.fields if field.name == name]

  def to_bytes(self) -> bytes:
    length = len(self.name) if self.length is None else self.length
    return bytes([self.kind % 256, length % 256]) + self.name + b"".join(
        field.to_bytes() for field in self.fields)


class File:
  """A file; `to_bytes` repairs its sizes and its checksum.

  Attributes:
    version: Version of the format.
    image: The fields of the image and the number of classes, in order.
    ops: The operations.
    more: How many operations more than these the file says it has.
    metadata: Bytes of JSON.
    rest: Bytes between the operations and the metadata.
  """

  def __init__(self, data: bytes):
    self.version, _, _, body, _ = struct.unpack_from("<2IQ2I", data, 8)
    self.metadata, self.rest, self.more = data[32 + body:], b"", 0
    reader = _Reader(data[32:32 + body])
    self.image = [reader.number(name, "I") for name in (
        "height", "width", "channels", "crop", "crop")]
    self.image += [reader.number("offset", "B") for _ in range(self.image[2].value)]
    self.image.append(reader.number("classes", "I"))
    count = reader.number("", "I").value
    values = packed.infer_values(packed.from_bytes(data, packed.UNLIMITED))
    self.ops = [_operation(reader, values, self.version) for _ in range(count)]
    assert reader.at == body and self.to_bytes() == data

  def __getitem__(self, name: str) -> Any:
    return next(field for field in self.image if field.name == name).value

  def __setitem__(self, name: str, value: Any) -> None:
    next(field for field in self.image if field.name == name).value = value

  def op(self, kind: int) -> Operation:
    """The first operation of a kind."""
    return next(op for op in self.ops if op.kind == kind)

  def to_bytes(self) -> bytes:
    body = b"".join(field.to_bytes() for field in self.image)
    body += struct.pack("<I", (len(self.ops) + self.more) % 2 ** 32)
    body += b"".join(op.to_bytes() for op in self.ops) + self.rest
    return packed_file(self.version, body, self.metadata)


def packed_file(version: int, body: bytes, metadata: bytes) -> bytes:
  """A file with the right sizes and the right checksum."""
  rest = struct.pack("<Q2I", 32 + len(body) + len(metadata), len(body),
                     len(metadata)) + body + metadata
  return MAGIC + struct.pack("<2I", version, zlib.crc32(rest)) + rest


def with_checksum(data: bytes) -> bytes:
  """A damaged file with the checksum that fits."""
  return data[:12] + struct.pack("<I", zlib.crc32(data[16:])) + data[16:]


class _Reader:

  def __init__(self, data):
    self.data, self.at = data, 0

  def bytes(self, name, size):
    self.at += size
    return Field(name, "s", self.data[self.at - size:self.at])

  def number(self, name, code):
    data = self.bytes(name, struct.calcsize(code)).value
    return Field(name, code, struct.unpack("<" + code, data)[0])


def _operation(reader, values, version):
  kind, length = (reader.number("", "B").value for _ in range(2))
  op = Operation(kind, reader.bytes("", length).value, [])
  add = lambda code, *names: op.fields.extend(
      reader.number(name, code) for name in names)
  if kind == CONV:
    add("I", "input")
    add("B", "format")
    add("I", "height", "width", "channels", "out", *_WINDOW)
    add("b", "pad")
    add("f", "weight_unit", "input_unit")
    if version > 1:
      add("I", "groups", "dilation", "dilation")
    n = math.prod(op[name] for name in ("height", "width", "channels", "out"))
    form = op["format"]
    sizes = {8: n, 16: 2 * n, 17: 2 * n, 32: 4 * n}
    op.fields.append(reader.bytes("weights", sizes.get(form, form * -(-n // 8))))
    return op
  if kind in (MAX_POOL, SUM_POOL):
    add("I", "input", "window", "window", *_WINDOW)
    return op
  if kind == CONCAT:
    add("I", "count")
    for _ in range(op["count"]):
      add("I", "input")
      add("B", "shift")
    return op
  if kind == SHORTCUT:
    add("I", "input", "strides", "strides", "before", "after")
    return op
  if kind == ADD:
    add("I", "input", "input")
    add("B", "shift", "shift")
    return op
  add("I", "input")
  channels = values[op["input"]].shape[2]
  if kind == THRESHOLD:
    add("i", "shortcut")
    add("B", "bits", "width")
    tables = 1
    if op["shortcut"] >= 0:
      tables = 7 if values[op["shortcut"]].bits == 3 else 3
    op.fields.append(reader.bytes("falling", -(-channels // 8)))
    count = (1, 2, 6)[op["bits"] - 1] * tables * channels
    op.fields.append(reader.bytes("thresholds", count * op["width"]))
    return op
  if kind == FLOAT_NORM:
    add("i", "shortcut")
    add("B", "format")
    add("f", "unit", "shortcut_unit")
  else:
    assert kind == LOGITS, kind
    add("f", "unit")
  for name in ("center", "scale", "constant"):
    add("f", *[name] * channels)
  if kind == FLOAT_NORM:
    add("B", "count")
    add("f", *["grid"] * op["count"])
  return op


_WHOLE = (0, 1, 2, 3, 4, 7, 8, 16, 17, 22, 23, 24, 32, 63, 64, 65, 127, 128, 255, 256,
          4095, 4096, 65535, 65536, 65537, 2 ** 24, 2 ** 31 - 1, 2 ** 31, -1, -2, -128)
_FLOATS = (0.0, -0.0, 1.0, -1.0, math.nan, math.inf, -math.inf, 3.4e38, -3.4e38,
           1e-45, 1.2e-38, 2.0 ** 40, 2.0 ** 41, 2.0 ** -40, 2.0 ** -41, 2.0 ** -100,
           2.0 ** -101, 1e20, 1e-20, 0.999, 65504.0, 448.0)
_NAMES = (b"", b"\0", b"a\0b", b"\xff", b"\xc0\x80", b"\xed\xa0\x80",
          b"\xf4\x90\x80\x80",
          b"\xe2\x82", b"\xe0\x80\x80", b"\xf0\x80\x80\x80", b"\n\x1b[31m", b"x" * 255,
          "\u00e9\u20ac\U0001f600\u202e".encode(), b"\xf4\x8f\xbf\xbf", b"../../etc",
          b"*/",
          b"\xee\x80\x80", b"\xef\xbf\xbf", b"\x7f\xc2\x80", b"\xc1\xbf",
          b"\xf5\x80\x80\x80")
_METADATA = (b"", b"{", b"[]", b"null", b"\xff\xfe{\0}\0", b'{"labels":"x"}', b"{}x",
             b'{"labels":null}', b'{"labels":["\\u0000"]}', b"\xef\xbb\xbf{}",
             b'{"a":1e999}',
             b"[" * 5000, b'{"config":[]}', b'{"labels":[1,2,3,4,5,6,7]}', b"{}\0",
             b'{"n":' + b"9" * 5000 + b"}", b'"\xed\xa0\x80"', b"{}")


def mutants(seeds: Sequence[bytes], seed: int, count: int) -> Iterator[bytes]:
  """Damaged files: some fields of each are changed, and its checksum fits again."""
  files = [File(data) for data in seeds]
  rng = np.random.default_rng(seed)
  for _ in range(count):
    file = copy.deepcopy(files[rng.integers(len(files))])
    for _ in range(rng.choice([1, 1, 1, 2, 3])):
      _CHANGES[rng.choice(len(_CHANGES), p=_SHARES)](file, rng)
    data = file.to_bytes()
    if rng.random() < 0.02:  # Cut or lengthened.
      data = data[:rng.integers(len(data))] if rng.random() < 0.7 else data + b"\0"
    if rng.random() < 0.02 and len(data) > 32:  # Bytes of the head.
      data = bytearray(data)
      data[rng.integers(32)] ^= 1 << rng.integers(8)
    yield with_checksum(bytes(data)) if len(data) > 16 else bytes(data)


def _pick(rng, items):
  return items[rng.integers(len(items))]


def _any_field(file, rng):
  """A number: of any name with the same chance, as there are many floats."""
  fields = _pick(rng, [*file.ops, *file.ops, None])
  fields = [f for f in (fields.fields if fields else file.image) if f.code != "s"]
  name = _pick(rng, sorted({field.name for field in fields}))
  return _pick(rng, [field for field in fields if field.name == name])


def _set(file, rng):
  field = _any_field(file, rng)
  if field.code == "f":
    field.value = _pick(rng, _FLOATS)
  else:
    field.value = _pick(rng, (*_WHOLE, field.value + 1, field.value - 1))


def _flip(file, rng):
  field = _any_field(file, rng)
  data = bytearray(field.to_bytes())
  data[rng.integers(len(data))] ^= 1 << rng.integers(8)
  field.value, = struct.unpack("<" + field.code, data)


def _step(file, rng):
  """Changes a small number a little: windows often still fit."""
  field = _any_field(file, rng)
  if field.code != "f":
    field.value += _pick(rng, (-2, -1, 1, 2))
  else:
    field.value *= _pick(rng, (0.5, 2.0, -1.0, 1024.0))


def _input(file, rng):
  field = _pick(rng, [field for op in file.ops for field in op.fields
                      if field.name in ("input", "shortcut")])
  other = _pick(rng, [field for op in file.ops for field in op.fields
                      if field.name in ("input", "shortcut")])
  if rng.random() < 0.5:
    field.value, other.value = other.value, field.value
  else:
    field.value = int(rng.integers(-2, len(file.ops) + 2))


def _data(file, rng):
  field = _pick(rng, [f for op in file.ops for f in op.fields if f.code == "s"])
  data = bytearray(field.value)
  choice = rng.integers(6)
  if choice < 3:
    for _ in range(rng.integers(1, 9)):
      data[rng.integers(len(data))] ^= 1 << rng.integers(8)
  elif choice == 3:
    data = bytearray([_pick(rng, (0, 255, 127, 128))]) * len(data)
  else:
    data = data[:-1] if choice == 4 else data + b"\1"
  field.value = bytes(data)


def _operations(file, rng):
  i, j = (int(n) for n in rng.integers(0, len(file.ops), 2))
  choice = rng.integers(6)
  if choice < 2:
    file.ops.insert(i, copy.deepcopy(file.ops[i if choice else j]))
    _renumber(file, i + 1, 1)
  elif choice == 2:
    del file.ops[i]
    _renumber(file, i + 1, -1)
  elif choice == 3:
    file.ops[i], file.ops[j] = file.ops[j], file.ops[i]
  elif choice == 4:
    file.ops[i].kind = int(rng.integers(0, 12))
  else:
    file.more = _pick(rng, (-1, 1, 4096, -len(file.ops), 2 ** 31))


def _renumber(file, first, by):
  for op in file.ops[first:]:
    for field in op.fields:
      if field.name in ("input", "shortcut") and field.value >= first:
        field.value += by


def _name(file, rng):
  op = _pick(rng, file.ops)
  if rng.random() < 0.8:
    op.name = _pick(rng, _NAMES)
  else:
    op.length = int(rng.integers(0, 256))


def _frame(file, rng):
  choice = rng.integers(4)
  if choice == 0:
    file.version = _pick(rng, (0, 1, 2, 3, 2 ** 32 - 1))
  elif choice == 1:
    file.metadata = _pick(rng, _METADATA)
  elif choice == 2:
    file.rest = _pick(rng, (b"\0", b"\1\0" * 20))
  elif file.metadata:
    data = bytearray(file.metadata)
    data[rng.integers(len(data))] ^= 1 << rng.integers(8)
    file.metadata = bytes(data)


_CHANGES = (_set, _flip, _step, _input, _data, _operations, _name, _frame)
_SHARES = (0.22, 0.12, 0.16, 0.1, 0.16, 0.1, 0.08, 0.06)
