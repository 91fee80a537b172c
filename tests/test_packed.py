"""The file of packed networks, against bytes written by hand, and damaged."""

import struct
import zlib

import hypothesis
from hypothesis import strategies as st
import numpy as np
import pytest

from minw import infer
from minw import packed
from minw.kernels import reference
from packed_files import with_checksum
from packed_networks import assert_same
from packed_networks import small
from packed_networks import small_image

FORMATS = (1, 2, 3, "float8_e4m3fn", "float16", "bfloat16", "float32")


def test_bytes_by_hand():
  body = b"".join([
      struct.pack("<5I", 4, 3, 1, 2, 2), b"\x07", struct.pack("<2I", 2, 2),
      b"\x01\x02fc", struct.pack("<I", 0), b"\x01",
      struct.pack("<10I", 2, 2, 1, 2, 1, 1, 0, 0, 0, 0), b"\x00",
      struct.pack("<2f", 1, 1),
      bytes([0b01110001]),  # Weights 1 -1 -1 -1 1 1 1 -1, the first one lowest.
      b"\x05\x04norm", struct.pack("<If", 1, 0.5),
      struct.pack("<6f", 1, 2, 3, -4, 0, 0)])
  metadata = b'{"labels":["no","yes"]}'
  rest = struct.pack("<Q2I", 32 + len(body) + len(metadata), len(body), len(metadata))
  rest += body + metadata
  head = b"MINW\r\n\x1a\0" + struct.pack("<2I", 1, zlib.crc32(rest))
  assert packed.to_bytes(small()) == head + rest
  program = packed.from_bytes(head + rest)
  assert program.metadata == {"labels": ["no", "yes"]}
  np.testing.assert_array_equal(program.ops[0].kernel, small().ops[0].kernel)


def grouped() -> packed.Program:
  """A 3x1 image of two channels; two groups of two outputs, rows 0 and 2 summed."""
  kernel = np.array([[1, 1], [-1, 1], [2, 0], [3, -1]], np.int8).reshape(4, 2, 1, 1)
  ops = (
      packed.Conv("c", 0, 3, kernel, groups=2, dilation=(2, 1)),
      packed.Logits("norm", 1, 1.0, *np.float32([[0] * 4, [1] * 4, [0] * 4])))
  return packed.Program((3, 1, 2), (3, 1), np.array([0, 100], np.uint8), 4, ops, {})


def test_bytes_of_groups_and_dilation_by_hand():
  body = b"".join([
      struct.pack("<5I", 3, 1, 2, 3, 1), b"\x00\x64", struct.pack("<2I", 4, 2),
      b"\x01\x01c", struct.pack("<I", 0), b"\x03",
      struct.pack("<10I", 2, 1, 1, 4, 1, 1, 0, 0, 0, 0), b"\x00",
      struct.pack("<2f3I", 1, 1, 2, 2, 1),
      # Codes 1 1 -1 1 2 0 3 -1: signs, then the bits of magnitudes 1 and 2.
      bytes([0b01011011, 0b11001111, 0b01010000]),
      b"\x05\x04norm", struct.pack("<If", 1, 1), struct.pack("<12f", *4 * [0], *4 * [1],
                                                           *4 * [0])])
  rest = struct.pack("<Q2I", 34 + len(body), len(body), 2) + body + b"{}"
  data = b"MINW\r\n\x1a\0" + struct.pack("<2I", 2, zlib.crc32(rest)) + rest
  assert packed.to_bytes(grouped()) == data
  assert_same(packed.from_bytes(data), grouped())
  # Version 1 has no place for them: the same bytes are no network of it.
  with pytest.raises(ValueError, match="packed network"):
    packed.from_bytes(with_checksum(data[:8] + struct.pack("<I", 1) + data[12:]))


def test_reference_of_groups_and_dilation_by_hand():
  image = np.uint8([[10, 101], [0, 255], [30, 130]]).reshape(1, 3, 1, 2)
  values = reference.run(grouped(), image)  # Levels 1 1 -1 1 2 0 4 -1.
  assert values[1].ravel().tolist() == [10 + 30, -10 + 30, 2 * 1, 4 * 1 - 30]
  bound = packed.infer_values(grouped())[1].bound
  assert bound.tolist() == [2 * 255, 2 * 255, 2 * 155, 5 * 155]


def test_reference_by_hand():
  image = small_image()  # The crop less 7 is 3 13 / 23 40.
  values = reference.run(small(), image)
  assert values[1].ravel().tolist() == [3 - 13 - 23 - 40, 3 + 13 + 23 - 40]
  assert values[2].ravel().tolist() == [(-73 * 0.5 - 1) * 3, (-1 * 0.5 - 2) * -4]


@st.composite
def programs(draw) -> packed.Program:
  """Programs with every operation, of any bits."""
  rng = np.random.default_rng(draw(st.integers(0, 2**32)))
  size = lambda: draw(st.integers(1, 5))
  h, w, c, classes = size() + 5, size() + 5, size(), size()
  ops, values = [], [packed.Value((h, w, c), "INT", 0, np.full(c, 255))]

  def kernel(bits, *shape):
    if isinstance(bits, str):
      values = rng.normal(size=shape)
      return values.astype(packed.float_dtype(bits)).astype(np.float32)
    q = packed.max_code(bits)
    codes = rng.integers(-q, q + 1, shape).astype(np.int8)
    return np.where(codes == 0, 1, codes).astype(np.int8) if bits == 1 else codes

  def add(op):
    ops.append(op)
    values.append(packed.infer_value(op, values))
    return len(ops)

  def norm(source, bits, channels, shortcut=None, tables=1):
    t = rng.integers(-(2 ** draw(st.sampled_from([6, 20]))), 40, (
        tables, packed.num_thresholds(bits), channels))
    return add(packed.Threshold("n", source, bits, rng.random(channels) < 0.5,
                                t.astype(np.int32), shortcut))

  floats = lambda n: rng.normal(size=n).astype(np.float32)
  bits, codes = draw(st.sampled_from((1, 2, 3))), draw(st.sampled_from((1, 2, 3)))
  v = add(packed.Conv("é" * size(), 0, bits, kernel(bits, c + 1, 3, 2, c), (2, 1),
                      (1, 0, 1, 2)))
  v = norm(v, codes, c + 1)
  short = add(packed.Shortcut("s", v, (1, 1), 1, size() - 1))
  wide = c + 2 + ops[-1].after
  x = add(packed.Conv("c", short, bits, kernel(bits, wide, 3, 3, wide), (1, 1),
                      (1, 1, 1, 1), draw(st.sampled_from([0, packed.max_code(codes)]))))
  x = norm(x, codes, wide, short, 2 * packed.max_code(codes) + 1)
  if draw(st.booleans()):  # Depthwise or in two groups, and dilated.
    groups = wide if wide % 2 or draw(st.booleans()) else 2
    x = add(packed.Conv(
        "g", x, bits, kernel(bits, wide, 2, 2, wide // groups), pads=(1, 1, 2, 1),
        groups=groups, dilation=(draw(st.integers(1, 2)), 3)))
    x = norm(x, codes, wide)
    short = x
  both = add(packed.Add("a", x, short, 0, size()))
  x = add(packed.Concat("cat", (both, both), (0, size())))
  x = add(packed.Pool("m", x, "max", (2, 2), (1, 2), (1, 0, 0, 1)))
  x = add(packed.Pool("s", x, "sum", (2, 1), (1, 1)))
  form = draw(st.sampled_from(FORMATS))
  grid = np.sort(rng.random(0 if form == 1 else packed.max_code(form))).astype(
      np.float32) if form in packed.LEVELS else np.zeros(0, np.float32)
  x = add(packed.FloatNorm("f", x, form, 2.0 ** -6, floats(2 * wide),
                           floats(2 * wide) / 8, floats(2 * wide), grid))
  form = draw(st.sampled_from(FORMATS))
  x = add(packed.Conv(
      "d", x, form, kernel(form, classes, *values[x].shape), weight_unit=0.25,
                      input_unit=0.5))
  add(packed.FloatNorm("l", x, None, 1.0, floats(classes), floats(classes),
                       floats(classes)))
  return packed.Program((h + size() - 1, w, c), (h, w),
                        rng.integers(0, 256, c).astype(np.uint8), classes, tuple(ops),
                        {"labels": None, "n": draw(st.integers())})


def test_networks_without_groups_keep_their_bytes():
  """Those that come with minw were written before there was a version 2."""
  for path in infer.shipped().values():
    data = path.read_bytes()
    assert data[8:12] == struct.pack("<I", 1)
    assert packed.to_bytes(packed.from_bytes(data)) == data, path


@hypothesis.given(programs())
@hypothesis.settings(max_examples=60)
def test_round_trip(program):
  data = packed.to_bytes(program)
  assert_same(packed.from_bytes(data), program)


@hypothesis.given(programs(), st.data())
@hypothesis.settings(max_examples=150)
def test_damaged_files_are_refused_or_fit_together(program, data):
  good = bytearray(packed.to_bytes(program))
  for _ in range(data.draw(st.integers(1, 3))):
    at = data.draw(st.integers(0, len(good) - 1))
    good[at] = data.draw(st.sampled_from((0, 1, 127, 128, 255, good[at] ^ 1)))
  try:
    read = packed.from_bytes(with_checksum(bytes(good)))
  except ValueError:
    return
  packed.infer_values(read)


@pytest.mark.parametrize("size", (0, 7, 8, 31, 32, 60, 100, -1))
def test_truncated(size):
  with pytest.raises(ValueError, match="packed network"):
    packed.from_bytes(packed.to_bytes(small())[:size])


def test_every_flipped_bit_is_noticed():
  good = packed.to_bytes(small())
  for i in range(8 * len(good)):
    bad = bytearray(good)
    bad[i // 8] ^= 1 << i % 8
    with pytest.raises(ValueError):
      packed.from_bytes(bytes(bad))


def test_other_version_is_refused_by_name():
  data = bytearray(packed.to_bytes(small()))
  data[8:12] = struct.pack("<I", 3)
  with pytest.raises(
      ValueError, match="format version 3; this minw reads the versions 1 and 2: "):
    packed.from_bytes(with_checksum(bytes(data)))


CONV = small().ops[0]


@pytest.mark.parametrize("ops, message", [
    ((CONV._replace(input=1),), "input 1 of operation 0"),
    ((CONV._replace(strides=(0, 1)),), "a stride of 0"),
    ((CONV._replace(pads=(65, 0, 0, 0)),), "a border of 65"),
    ((CONV._replace(pads=(1, 0, 0, 0), pad=1),), "a border of 1 around INT"),
    ((CONV._replace(kernel=CONV.kernel[..., [0, 0]]),),
     "1 groups of 2 input channels, there are 1"),
    ((CONV._replace(kernel=np.ones((2, 3, 2, 1), np.int8)),), "a window of"),
    ((CONV._replace(groups=2),), "2 groups of 1 input channels, there are 1"),
    ((CONV._replace(groups=0),), "0 groups"),
    ((CONV._replace(groups=2**32 + 1),), "4294967297 groups"),
    ((packed.Concat("two", (0, 0), (0, 0)), CONV._replace(
        input=1, kernel=np.ones((3, 2, 1, 1), np.int8), groups=2)),
     "3 output channels in 2 groups"),
    ((CONV._replace(dilation=(1, 0)),), "a dilation of 0"),
    ((CONV._replace(dilation=(65, 1)),), "a dilation of 65"),
    ((CONV._replace(dilation=(1, 2)),), r"a window of \(2, 3\) over \(2, 2\)"),
    ((CONV._replace(bits=4),), "4 bits; a packed grid has 1, 2 or 3"),
    ((CONV._replace(kernel=2 * CONV.kernel),), "weights that are no codes of 1 bits"),
    ((CONV._replace(kernel=0 * CONV.kernel),), "weights that are no codes of 1 bits"),
    ((CONV, packed.Threshold("t", 1, 1, np.zeros(2, bool), np.zeros((1, 2, 2), int))),
     r"thresholds of shape \(1, 2, 2\)"),
    ((CONV, packed.Threshold("t", 1, 5, np.zeros(2, bool), np.zeros((1, 2, 2), int))),
     "5 bits"),
    ((CONV, packed.Shortcut("s", 1, (1, 1), 0, 0)), "a shortcut of INT"),
    ((CONV, packed.Add("a", 0, 1)), "added to INT"),
    ((CONV, packed.Concat("a", (0, 1), (0, 0))), "beside INT"),
    ((CONV, packed.Pool("p", 0, "max", (1, 1), (1, 1), (1, 0, 0, 0))),
     "a border as wide as the window"),
    ((CONV, packed.Pool("p", 0, "least", (1, 1), (1, 1))), "a pool of kind 'least'"),
    ((CONV,), "logits are made by the last operation"),
    ((*small().ops, CONV), "logits are made by the last operation"),
])
def test_what_does_not_fit_together(ops, message):
  with pytest.raises(ValueError, match=message):
    packed.infer_values(small()._replace(ops=ops))


@pytest.mark.parametrize("changes, message", [
    (dict(source_shape=(4, 70_000, 1)), "a size of 70000"),
    (dict(crop=(5, 2)), "a crop of 5 from an image of 4"),
    (dict(offset=np.zeros(2, np.uint8)), "a pixel offset"),
    (dict(num_classes=3), "for 3 classes"),
    (dict(ops=()), "logits are made"),
])
def test_what_is_no_network(changes, message):
  with pytest.raises(ValueError, match=message):
    packed.infer_values(small()._replace(**changes))


def test_sums_beyond_their_type():
  wide = packed.Conv("w", 0, 3, np.full((1, 1, 1, 65536), 3, np.int8))
  program = small()._replace(
      source_shape=(1, 1, 65536), crop=(1, 1), offset=np.zeros(65536), ops=(
          wide, packed.Logits("l", 1, 1.0, *np.zeros((3, 1), np.float32))),
      num_classes=1)
  with pytest.raises(ValueError, match="sums that float32 does not hold exactly"):
    packed.infer_values(program)  # 65536 * 255 * 4 = 2^26.
  shifted = (wide, packed.Concat("c", (1,), (6,)), packed.Logits(
      "l", 2, 1.0, *np.zeros((3, 1), np.float32)))
  with pytest.raises(ValueError, match="c: sums beyond 32 bits"):
    packed.infer_values(program._replace(ops=shifted))


def test_absurd_sizes_allocate_nothing():
  body = struct.pack("<5I", 65535, 65535, 65535, 65535, 65535)
  rest = struct.pack("<Q2I", 32 + len(body) + 2, len(body), 2) + body + b"{}"
  data = packed.MAGIC + struct.pack("<2I", 1, zlib.crc32(rest)) + rest
  with pytest.raises(ValueError, match="ends inside"):
    packed.from_bytes(data)


@pytest.mark.parametrize("name, message", [
    ("a\0", r"layer a\\x00: a name with a NUL"), ("é" * 128, "longer than 255 bytes"),
    ("\ud800", r"layer \\ud800: a name with a lone surrogate")])
def test_names_that_no_file_holds(name, message):
  program = small()._replace(ops=(CONV._replace(name=name), small().ops[1]))
  packed.infer_values(program)  # It can be run and exported.
  with pytest.raises(ValueError, match=message):
    packed.to_bytes(program)


def test_16_bits_where_they_fit():
  def size(*extremes):
    t = np.zeros((1, 1, 2), np.int32)
    t[0, 0] = extremes
    ops = (CONV, packed.Threshold("t", 1, 1, np.zeros(2, bool), t),
           packed.Conv("d", 2, 1, np.ones((2, 1, 1, 2), np.int8)),
           small().ops[1]._replace(input=3))
    program = small()._replace(ops=ops)
    assert_same(packed.from_bytes(packed.to_bytes(program)), program)
    return len(packed.to_bytes(program))

  assert size(-2**15, 2**15 - 1) == size(0, 0)
  assert size(-2**15 - 1, 0) == size(0, 2**15) == size(0, 0) + 4
