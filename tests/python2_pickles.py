"""Pickles written out byte by byte, as Python 2 made them and as an attacker may."""

import struct
from typing import Any

import numpy as np

RECONSTRUCT = b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\0\x85U\1b\x87R"
UINT8_STATE = b"(K\3U\1|NNN" + 2 * b"J\xff\xff\xff\xff" + b"K\0t"


def dtype(code: bytes, state: bytes = UINT8_STATE) -> bytes:
  """Instructions that make a dtype, as `numpy.dtype.__reduce__` asks for."""
  return b"cnumpy\ndtype\n" + dump(code) + b"K\0K\1\x87R" + state + b"b"


def array(shape: bytes, of: bytes, content: bytes, order: bytes = b"\x89") -> bytes:
  """Instructions that make an array; `shape` and `of` are instructions as well."""
  return RECONSTRUCT + b"(K\1" + shape + of + order + dump(content) + b"tb"


def dump(value: Any) -> bytes:
  """Instructions that make `value`, as Python 2's cPickle wrote them in protocol 2."""
  match value:
    case bytes():
      return b"T" + struct.pack("<I", len(value)) + value
    case int():
      return b"J" + struct.pack("<i", value)
    case list():
      return b"](" + b"".join(map(dump, value)) + b"e"
    case tuple():
      return b"(" + b"".join(map(dump, value)) + b"t"
    case dict():
      items = (dump(part) for item in value.items() for part in item)
      return b"}(" + b"".join(items) + b"u"
    case np.ndarray():
      return array(dump(value.shape), dtype(b"u1"), value.tobytes())
  raise TypeError(value)


def pickled(instructions: bytes) -> bytes:
  """A whole pickle of protocol 2."""
  return b"\x80\2" + instructions + b"."
