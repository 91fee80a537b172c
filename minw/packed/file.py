"""A packed network as bytes: the .minw file that docs/format.md specifies.

`to_bytes` writes a program, and `from_bytes` reads it back. The layout of each
operation stands here once, as a function that takes a `_Writer` or a `_Reader`. Both
have the same methods, which get the types of the next fields and a function that finds
their values in an operation. The writer writes these values. The reader reads the
values and ignores the function. Both return the values, on which the sizes of later
fields depend.

A file is not trusted. `from_bytes` checks all of it by the rules in docs/format.md,
which the native library follows as well. Loading takes less memory than 32 times the
size of the file and 64 MB.
"""

import math
import os
import stat
import struct
from typing import Any, Callable, Iterator, Sequence
import zlib

import numpy as np

from minw import files
from minw.packed import limits as limits_lib
from minw.packed import metadata as metadata_lib
from minw.packed import program as program_lib
from minw.packed import rules
from minw.packed.limits import Limits
from minw.packed.program import Program
from minw.packed.program import Value
from minw.packed.rules import require

MAGIC = b"MINW\r\n\x1a\0"
# Version 2 adds groups and dilation to each convolution. A program that has neither is
# written in version 1, which older versions of minw read.
VERSIONS = (1, 2)

_FORMAT_NAMES: dict[int, str] = {
    number: name for name, number in program_lib.FLOAT_FORMATS.items()}

# Magic, version, checksum, size of the file, of the program and of the metadata.
_HEAD = struct.Struct("<8s2IQ2I")
_CHECKED = 16  # The checksum is that of all bytes from here on.


def to_bytes(program: Program) -> bytes:
  """Returns the content of a program's file; `from_bytes` gives the program back.

  Raises:
    ValueError: The program breaks a rule, or no file can hold its names or metadata.
  """
  values = program_lib.infer_values(program)
  version = 1 if all(map(_is_plain, program.ops)) else 2
  writer = _Writer(program, version)
  _begin(writer)
  parts = [writer.data()]
  for i, op in enumerate(program.ops):
    writer = _Writer(op, version)
    kind = _kind_of(op)
    _LAYOUTS[kind](writer, op.name, values[:i + 1])
    name = _name_bytes(op.name)
    parts += [struct.pack("<2B", kind, len(name)), name, writer.data()]
  body = b"".join(parts)
  metadata = metadata_lib.encode(program.metadata, program.num_classes)
  size = _HEAD.size + len(body) + len(metadata)
  head = lambda checksum: _HEAD.pack(
      MAGIC, version, checksum, size, len(body), len(metadata))
  checksum = zlib.crc32(metadata, zlib.crc32(body, zlib.crc32(head(0)[_CHECKED:])))
  return head(checksum) + body + metadata


def from_bytes(data: bytes, limits: Limits = Limits()) -> Program:
  """Returns the program that a file holds.

  Args:
    data: The content of the file.
    limits: The most that loading and running the network may cost.

  Raises:
    ValueError: The bytes are no packed network, of another version, damaged, against
      the rules, or beyond `limits`.
  """
  version, checksum, body_size = _read_head(data, len(data))
  if checksum != zlib.crc32(data[_CHECKED:]):
    raise ValueError("packed network: its checksum does not match: it is damaged")
  reader = _Reader(data[_HEAD.size:_HEAD.size + body_size], version)
  program, num_ops = _begin(reader)
  require(num_ops <= rules.MAX_OPS, "", f"{num_ops} operations")
  ops: list[program_lib.Op] = []
  values = [program_lib.image_value(
      program.source_shape, program.crop, program.offset)]
  program_lib.append_values(values, _read_ops(reader, num_ops, ops, values))
  require(reader.done(), "", "bytes after the last operation")
  program = program._replace(ops=tuple(ops))
  program_lib.check_logits(program, values[-1])
  limits_lib.check_limits(program, limits, values)
  metadata = metadata_lib.decode(data[_HEAD.size + body_size:], program.num_classes)
  return program._replace(metadata=metadata)


def write(path: str, program: Program) -> int:
  """Writes a program to a file and returns the file's size in bytes."""
  data = to_bytes(program)
  files.write(path, data)
  return len(data)


def read(path: str | os.PathLike, limits: Limits = Limits()) -> Program:
  """Reads a file; see `from_bytes` and `read_bytes`."""
  return from_bytes(read_bytes(path), limits)


def read_bytes(path: str | os.PathLike) -> bytes:
  """Returns the content of a file that begins as a packed network.

  No more is read than the file's head says. Otherwise a pipe could wait forever, a
  device have no end, and a file with holes be larger than memory.

  Raises:
    OSError: The file cannot be read, or it is not a regular file.
    ValueError: It does not begin as a packed network of its size, or is too large.
  """
  if not stat.S_ISREG(os.stat(path).st_mode):  # Opening a device may have effects.
    raise OSError("it is not a regular file")
  with open(path, "rb", opener=_open_at_once) as file:
    size = os.fstat(file.fileno()).st_size
    start = file.read(_HEAD.size)
    _read_head(start, size)
    return start + file.read(size - _HEAD.size)


def _open_at_once(path: str, flags: int) -> int:
  """Opens a file. A pipe that has just taken its place would wait for its writer."""
  return os.open(path, flags | os.O_NONBLOCK)


def _read_head(data: bytes, size: int) -> tuple[int, int, int]:
  """Reads the head of a file that has `size` bytes.

  Returns:
    The version, the checksum, and the size of the program. The metadata are the rest.
  """
  if data[:len(MAGIC)] != MAGIC:
    raise ValueError("not a packed network: it does not begin as one")
  if len(data) < _HEAD.size:
    raise ValueError(f"packed network: {len(data)} bytes are less than its head")
  _, version, checksum, said, body, metadata = _HEAD.unpack_from(data)
  if version not in VERSIONS:
    raise ValueError(
        f"packed network of format version {version}; this minw reads the versions"
        f" {' and '.join(map(str, VERSIONS))}: pack it again, or install a newer minw")
  if size != said or size != _HEAD.size + body + metadata:
    raise ValueError(f"packed network: {size} bytes where it says {said}")
  require(size <= rules.MAX_FILE, "",
          f"{size} bytes; a file has at most {rules.MAX_FILE}")
  return version, checksum, body


def _is_plain(op: program_lib.Op) -> bool:
  """Returns whether version 1 has all fields of an operation."""
  return not isinstance(op, program_lib.Conv) or (
      op.groups == 1 and tuple(op.dilation) == (1, 1))


def _name_bytes(name: str) -> bytes:
  """Returns the bytes of a layer's name in a file."""
  require("\0" not in name, name, "a name with a NUL")
  data = name.encode(errors="surrogatepass")
  require(len(data) < 256, name, "a name longer than 255 bytes")
  require(data == name.encode(errors="replace"), name, "a name with a lone surrogate")
  return data


def _read_ops(
    reader: "_Reader", count: int, ops: list[program_lib.Op], values: Sequence[Value]
) -> Iterator[program_lib.Op]:
  """Yields operations, and appends each to `ops` before its value is asked for."""
  for _ in range(count):
    kind, length = reader.numbers("2B")
    try:
      name = reader.take(length).decode()
    except UnicodeDecodeError as error:
      raise ValueError("packed network: a layer's name is not UTF-8") from error
    require("\0" not in name, name, "a name with a NUL")
    require(kind in _LAYOUTS, name, f"an operation of kind {kind}")
    ops.append(_LAYOUTS[kind](reader, name, values))
    yield ops[-1]


class _Writer:
  """Writes the fields of a program or of one of its operations, in order."""

  def __init__(self, source: Any, version: int):
    self.version = version
    self._source = source
    self._parts: list[bytes] = []

  def data(self) -> bytes:
    """Returns all bytes that were written."""
    return b"".join(self._parts)

  def numbers(self, code: str, find: Callable[[Any], Sequence[Any]]) -> Sequence[Any]:
    """Writes numbers of a `struct` code."""
    values = find(self._source)
    self._parts.append(struct.pack("<" + code, *values))
    return values

  def array(
      self, dtype: Any, shape: Sequence[int], find: Callable[[Any], np.ndarray]
  ) -> np.ndarray:
    """Writes an array in C order."""
    array = np.asarray(find(self._source))
    assert array.shape == tuple(shape), (array.shape, shape)
    self._parts.append(array.astype(np.dtype(dtype).newbyteorder("<")).tobytes())
    return array

  def bits(self, count: int, find: Callable[[Any], np.ndarray]) -> np.ndarray:
    """Writes `count` truth values as bits, and zeros up to a whole byte."""
    values = np.asarray(find(self._source), bool).reshape(count)
    self._parts.append(np.packbits(values, bitorder="little").tobytes())
    return values.astype(np.int8)


class _Reader:
  """Reads a program's bytes from the front, and never beyond the end."""

  def __init__(self, data: bytes, version: int):
    self.version = version
    self._data = data
    self._at = 0

  def done(self) -> bool:
    """Returns whether all bytes were read."""
    return self._at == len(self._data)

  def take(self, size: int) -> bytes:
    """Returns the next bytes."""
    require(size <= len(self._data) - self._at, "", "it ends inside an operation")
    self._at += size
    return self._data[self._at - size:self._at]

  def numbers(self, code: str, find: Any = None) -> Sequence[Any]:
    """Reads numbers of a `struct` code."""
    del find
    return struct.unpack("<" + code, self.take(struct.calcsize("<" + code)))

  def array(self, dtype: Any, shape: Sequence[int], find: Any = None) -> np.ndarray:
    """Reads an array in C order."""
    del find
    dtype = np.dtype(dtype).newbyteorder("<")
    data = self.take(math.prod(shape) * dtype.itemsize)
    return np.frombuffer(data, dtype).reshape(shape).astype(dtype.newbyteorder("="))

  def bits(self, count: int, find: Any = None) -> np.ndarray:
    """Reads `count` truth values from the bits of whole bytes, as 0 and 1 in int8."""
    del find
    data = np.frombuffer(self.take(-(-count // 8)), np.uint8)
    return np.unpackbits(data, count=count, bitorder="little").view(np.int8)


_File = _Writer | _Reader


def _fields(file: _File, **codes: str) -> dict[str, Any]:
  """Fields that a file holds as an operation does, by name with their `struct` code.

  A code such as "2I" stands for a tuple, and a code of one letter for a number.
  """
  fields = {}
  for name, code in codes.items():
    if len(code) == 1:
      fields[name], = file.numbers(code, lambda op, n=name: [getattr(op, n)])
    else:
      fields[name] = file.numbers(code, lambda op, n=name: getattr(op, n))
  return fields


def _begin(file: _File) -> tuple[Program, int]:
  """The layout of a program before its operations; returns it with their number."""
  fields = _fields(file, source_shape="3I", crop="2I")
  channels = fields["source_shape"][2]
  fields["offset"] = file.array(np.uint8, (channels,), lambda program: program.offset)
  fields |= _fields(file, num_classes="I")
  num_ops, = file.numbers("I", lambda program: [len(program.ops)])
  return Program(**fields, ops=(), metadata={}), num_ops


# The layout of each kind of operation, after its name. `values` are those before it.


def _conv(file: _File, name: str, values: Sequence[Value]) -> program_lib.Conv:
  del values
  fields = _fields(file, input="I")
  form = _format(file)
  *window, channels, out = file.numbers(
      "4I", lambda op: (*op.kernel.shape[1:], op.kernel.shape[0]))
  fields |= _fields(
      file, strides="2I", pads="4I", pad="b", weight_unit="f", input_unit="f")
  if file.version > 1:
    fields |= _fields(file, groups="I", dilation="2I")
  shape = tuple(rules.size(n, name) for n in (out, *window, channels))
  if isinstance(form, str):
    dtype = program_lib.float_dtype(form)
    kernel = file.array(dtype, shape, lambda op: op.kernel).astype(np.float32)
  else:
    planes = [
        file.bits(math.prod(shape), lambda op, p=plane: _plane(op.kernel, op.bits, p))
        for plane in range(program_lib.grid_bits(form, name))]
    kernel = _codes(planes).reshape(shape)
  return program_lib.Conv(name, bits=form, kernel=kernel, **fields)


def _pool(kind: str) -> Callable[..., program_lib.Pool]:
  def pool(file: _File, name: str, values: Sequence[Value]) -> program_lib.Pool:
    del values
    return program_lib.Pool(name, kind=kind, **_fields(
        file, input="I", window="2I", strides="2I", pads="4I"))
  return pool


def _threshold(
    file: _File, name: str, values: Sequence[Value]
) -> program_lib.Threshold:
  fields = _fields(file, input="I")
  shortcut = _shortcut_index(file)
  fields |= _fields(file, bits="B")
  bits = program_lib.grid_bits(fields["bits"], name)
  width, = file.numbers("B", lambda op: [_threshold_bytes(op.thresholds)])
  require(width in (2, 4), name, f"thresholds of {width} bytes")
  channels = _value(values, fields["input"], name).shape[2]
  tables = 1
  if shortcut is not None:
    codes = program_lib.grid_bits(_value(values, shortcut, name).bits, name)
    tables = len(program_lib.LEVELS[codes])
  falling = file.bits(channels, lambda op: op.falling).astype(bool)
  thresholds = file.array(
      f"i{width}", (tables, program_lib.num_thresholds(bits), channels),
      lambda op: op.thresholds).astype(np.int32)
  return program_lib.Threshold(
      name, falling=falling, thresholds=thresholds, shortcut=shortcut, **fields)


def _logits(file: _File, name: str, values: Sequence[Value]) -> program_lib.Logits:
  fields = _fields(file, input="I", unit="f")
  channels = _value(values, fields["input"], name).shape[2]
  norm: dict[str, Any] = _norm(file, channels)
  return program_lib.Logits(name, **fields, **norm)


def _float_norm(
    file: _File, name: str, values: Sequence[Value]
) -> program_lib.FloatNorm:
  fields = _fields(file, input="I")
  shortcut = _shortcut_index(file)
  bits = _format(file) or None
  fields |= _fields(file, unit="f", shortcut_unit="f")
  channels = _value(values, fields["input"], name).shape[2]
  fields |= _norm(file, channels)
  count = file.numbers("B", lambda op: [len(op.grid)])
  grid = file.array("f4", count, lambda op: op.grid)
  return program_lib.FloatNorm(name, bits=bits, grid=grid, shortcut=shortcut, **fields)


def _concat(file: _File, name: str, values: Sequence[Value]) -> program_lib.Concat:
  del values
  count, = file.numbers("I", lambda op: [len(op.inputs)])
  require(1 <= count <= rules.MAX_SIZE, name,
          f"{count} values side by side; there are 1 to {rules.MAX_SIZE}")
  numbers = file.numbers("IB" * count, lambda op: [
      n for pair in zip(op.inputs, op.shifts) for n in pair])
  return program_lib.Concat(name, tuple(numbers[::2]), tuple(numbers[1::2]))


def _shortcut(file: _File, name: str, values: Sequence[Value]) -> program_lib.Shortcut:
  del values
  return program_lib.Shortcut(name, **_fields(
      file, input="I", strides="2I", before="I", after="I"))


def _add(file: _File, name: str, values: Sequence[Value]) -> program_lib.Add:
  del values
  return program_lib.Add(name, **_fields(file, a="I", b="I", shift_a="B", shift_b="B"))


_LAYOUTS: dict[int, Callable[[_File, str, Sequence[Value]], program_lib.Op]] = {
    1: _conv,
    2: _pool("max"),
    3: _pool("sum"),
    4: _threshold,
    5: _logits,
    6: _concat,
    7: _shortcut,
    8: _float_norm,
    10: _add,
}
_KINDS = {
    program_lib.Conv: 1,
    program_lib.Threshold: 4,
    program_lib.Logits: 5,
    program_lib.Concat: 6,
    program_lib.Shortcut: 7,
    program_lib.FloatNorm: 8,
    program_lib.Add: 10,
}
_POOLS = {"max": 2, "sum": 3}


def _kind_of(op: program_lib.Op) -> int:
  """Returns the number of an operation's kind."""
  return _POOLS[op.kind] if isinstance(op, program_lib.Pool) else _KINDS[type(op)]


# Parts of several layouts.


def _format(file: _File) -> int | str:
  """A number that stands for a grid's bits or a float format; 0 is for logits."""
  number, = file.numbers(
      "B", lambda op: [program_lib.FLOAT_FORMATS.get(op.bits, op.bits or 0)])
  return _FORMAT_NAMES[number] if number in _FORMAT_NAMES else number


def _shortcut_index(file: _File) -> int | None:
  """The index of a shortcut, which is negative if there is none."""
  index, = file.numbers("i", lambda op: [-1 if op.shortcut is None else op.shortcut])
  return None if index < 0 else index


def _norm(file: _File, channels: int) -> dict[str, np.ndarray]:
  """The constants of a batch norm."""
  return {name: file.array("f4", (channels,), lambda op, n=name: getattr(op, n))
          for name in ("center", "scale", "constant")}


def _value(values: Sequence[Value], index: int, name: str) -> Value:
  """Returns the value that the operation `name` reads."""
  require(index < len(values), name, f"input {index} of operation {len(values) - 1}")
  return values[index]


def _threshold_bytes(thresholds: np.ndarray) -> int:
  """Returns the size of a threshold that holds all of them."""
  return 2 if (thresholds.astype(np.int16) == thresholds).all() else 4


def _plane(codes: np.ndarray, bits: int, plane: int) -> np.ndarray:
  """Returns a bit of each code: plane 0 is whether it is positive.

  The other planes are the bits of its magnitude, the lowest first. One bit has none, as
  its magnitudes are all 1.
  """
  if plane == 0:
    return codes > 0
  return np.abs(codes) >> (plane - 1) & 1 != 0


def _codes(planes: Sequence[np.ndarray]) -> np.ndarray:
  """Returns the int8 codes of planes, whose memory it reuses."""
  sign, *magnitude = planes
  sign += sign
  sign -= 1
  for i, plane in enumerate(magnitude[1:], 1):
    magnitude[0] += plane << i
  return sign * magnitude[0] if magnitude else sign
