"""Reads pickles of arrays, lists and strings without doing anything else they ask for.

A pickle is a program for a stack machine. The machine here has only the instructions
with which Python 2 stored integers, strings, tuples, lists, dicts and uint8 arrays. It
imports nothing and calls nothing that a pickle names, and the memory that it takes is
proportional to the size of the pickle.
"""

import enum
import io
import math
import pickle
import struct
from typing import Any

import numpy as np


class _Global(enum.Enum):
  """The names that pickles of uint8 arrays contain; here they are only names."""

  RECONSTRUCT = "numpy.core.multiarray _reconstruct"
  NDARRAY = "numpy ndarray"
  DTYPE = "numpy dtype"


class _Unfinished(enum.Enum):
  """Objects that a pickle creates by a call and completes with a state."""

  ARRAY = enum.auto()
  UINT8 = enum.auto()


_CONSTANTS = {pickle.NONE: None, pickle.NEWTRUE: True, pickle.NEWFALSE: False}
_NUMBERS = {pickle.BININT1: "B", pickle.BININT2: "H", pickle.BININT: "i"}


def loads(content: bytes) -> Any:
  """Reads a pickle of protocol 2 as Python 2 wrote it.

  Args:
    content: The pickle.

  Returns:
    What it holds: None, bool, int, bytes, str, tuple, list, dict or a uint8 array.
    Strings of Python 2 are bytes.

  Raises:
    pickle.UnpicklingError: The pickle asks for anything else, or is damaged.
  """
  try:
    return _run(io.BytesIO(content))
  except (ValueError, TypeError, LookupError) as error:
    raise pickle.UnpicklingError(str(error) or type(error).__name__) from error


def _run(file: io.BytesIO) -> Any:
  stack, marks, memo = [], [], {}

  def take(count: int) -> bytes:
    data = file.read(count)
    if len(data) < count:
      raise ValueError("it is cut off")
    return data

  def number(kind: str) -> int:
    return struct.unpack("<" + kind, take(struct.calcsize("<" + kind)))[0]

  def line() -> str:
    return file.readline().decode("ascii").removesuffix("\n")

  def since_mark() -> list[Any]:
    start = marks.pop()
    items = stack[start:]
    del stack[start:]
    return items

  while True:
    match take(1):
      case pickle.PROTO:
        take(1)
      case pickle.STOP:
        return stack.pop()
      case pickle.MARK:
        marks.append(len(stack))
      case pickle.BINPUT | pickle.LONG_BINPUT as code:
        memo[number("B" if code == pickle.BINPUT else "I")] = stack[-1]
      case pickle.BINGET | pickle.LONG_BINGET as code:
        place = number("B" if code == pickle.BINGET else "I")
        if place not in memo:
          raise ValueError(f"it has nothing in place {place}")
        stack.append(memo[place])
      case code if code in _CONSTANTS:
        stack.append(_CONSTANTS[code])
      case code if code in _NUMBERS:
        stack.append(number(_NUMBERS[code]))
      case pickle.LONG1:
        stack.append(int.from_bytes(take(number("B")), "little", signed=True))
      case pickle.SHORT_BINSTRING:
        stack.append(take(number("B")))
      case pickle.BINSTRING:
        stack.append(take(number("I")))
      case pickle.BINUNICODE:
        stack.append(take(number("I")).decode())
      case pickle.EMPTY_TUPLE:
        stack.append(())
      case pickle.TUPLE1 | pickle.TUPLE2 | pickle.TUPLE3 as code:
        marks.append(len(stack) - (code[0] - pickle.TUPLE1[0] + 1))
        stack.append(tuple(since_mark()))
      case pickle.TUPLE:
        stack.append(tuple(since_mark()))
      case pickle.EMPTY_LIST:
        stack.append([])
      case pickle.APPEND:
        _extend(stack[-2], [stack.pop()])
      case pickle.APPENDS:
        items = since_mark()
        _extend(stack[-1], items)
      case pickle.EMPTY_DICT:
        stack.append({})
      case pickle.SETITEM:
        _update(stack[-3], [stack.pop(-2), stack.pop()])
      case pickle.SETITEMS:
        items = since_mark()
        _update(stack[-1], items)
      case pickle.GLOBAL:
        stack.append(_named(f"{line()} {line()}"))
      case pickle.REDUCE:
        arguments = stack.pop()
        stack[-1] = _call(stack[-1], arguments)
      case pickle.BUILD:
        state = stack.pop()
        stack[-1] = _complete(stack[-1], state)
      case code:
        raise ValueError(f"it has the instruction {code!r}")


def _extend(target: Any, items: list[Any]) -> None:
  if type(target) is not list:
    raise ValueError(f"it appends to {type(target).__name__}")
  target += items


def _update(target: Any, items: list[Any]) -> None:
  """Adds keys and values, which alternate in `items`, to a dict."""
  keys, values = items[::2], items[1::2]
  if type(target) is not dict or len(keys) != len(values):
    raise ValueError(f"it sets items of {type(target).__name__}")
  if not all(type(key) is bytes for key in keys):
    raise ValueError("it has keys that are not strings")
  target.update(zip(keys, values))


def _named(name: str) -> _Global:
  """The stand-in for a global, which `name` gives as "module name"."""
  try:
    return _Global(name)
  except ValueError:
    raise ValueError(f"it names {name.replace(' ', '.')!r}") from None


def _call(function: Any, arguments: Any) -> _Unfinished:
  """The stand-in for the result of a call, of which two are known."""
  if type(arguments) is tuple:
    first = arguments[0]
    if function is _Global.RECONSTRUCT and first is _Global.NDARRAY:
      return _Unfinished.ARRAY
    if function is _Global.DTYPE and type(first) is bytes:
      if first.lstrip(b"|") == b"u1":
        return _Unfinished.UINT8
      raise ValueError(f"it has an array of dtype {first!r}")
  raise ValueError("it calls what it may not call")


def _complete(target: Any, state: Any) -> Any:
  """What an unfinished object becomes with its state."""
  if type(state) is not tuple:
    raise ValueError("it has a state that is not a tuple")
  if target is _Unfinished.UINT8:  # Its byte order, fields and alignment.
    if any(type(item) not in (type(None), int, bytes) for item in state):
      raise ValueError("it has a dtype with fields")
    return target
  if target is not _Unfinished.ARRAY:
    raise ValueError(f"it has a state for {type(target).__name__}")
  _, shape, dtype, by_columns, content = state
  if dtype is not _Unfinished.UINT8 or type(content) is not bytes:
    raise ValueError("it has an array that is not uint8")
  if type(shape) is not tuple or not 1 <= len(shape) <= 2 or not all(
      type(size) is int and 0 <= size <= len(content) for size in shape):
    raise ValueError(f"it has an array whose shape does not fit {len(content)} bytes")
  if math.prod(shape) != len(content):
    raise ValueError(f"it has an array of shape {shape} with {len(content)} bytes")
  order = "F" if by_columns else "C"
  return np.frombuffer(content, np.uint8).reshape(shape, order=order)
