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
from typing import Any, Callable

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


def loads(content: bytes) -> Any:
  """Reads a pickle of protocol 2 as Python 2 wrote it.

  Args:
    content: The pickle.

  Returns:
    The object that was pickled: None, a bool, int, bytes, str, tuple, list, dict or
    uint8 array. Strings of Python 2 are bytes.

  Raises:
    pickle.UnpicklingError: The pickle asks for anything else, or is damaged.
  """
  try:
    return _run(_Machine(content))
  except (ValueError, TypeError, LookupError) as error:
    raise pickle.UnpicklingError(str(error) or type(error).__name__) from error


class _Machine:
  """The state of the machine: the rest of its program, a stack, marks and a memo."""

  def __init__(self, content: bytes):
    self._program = io.BytesIO(content)
    self.stack: list[Any] = []
    self.marks: list[int] = []
    self.memo: dict[int, Any] = {}

  def take(self, count: int) -> bytes:
    """Reads `count` bytes of the program."""
    data = self._program.read(count)
    if len(data) < count:
      raise ValueError("it is cut off")
    return data

  def number(self, kind: str) -> int:
    """Reads an integer, whose size and sign `kind` says as in `struct`."""
    return struct.unpack("<" + kind, self.take(struct.calcsize("<" + kind)))[0]

  def line(self) -> str:
    """Reads a line."""
    return self._program.readline().decode("ascii").removesuffix("\n")

  def since_mark(self) -> list[Any]:
    """Removes what was pushed since the last mark, and returns it."""
    start = self.marks.pop()
    items = self.stack[start:]
    del self.stack[start:]
    return items


# Instructions that push a value, and how each finds it.
_VALUES: dict[bytes, Callable[[_Machine], Any]] = {
    pickle.NONE: lambda machine: None,
    pickle.NEWTRUE: lambda machine: True,
    pickle.NEWFALSE: lambda machine: False,
    pickle.BININT1: lambda machine: machine.number("B"),
    pickle.BININT2: lambda machine: machine.number("H"),
    pickle.BININT: lambda machine: machine.number("i"),
    pickle.LONG1: lambda machine: int.from_bytes(
        machine.take(machine.number("B")), "little", signed=True),
    pickle.SHORT_BINSTRING: lambda machine: machine.take(machine.number("B")),
    pickle.BINSTRING: lambda machine: machine.take(machine.number("I")),
    pickle.BINUNICODE: lambda machine: machine.take(machine.number("I")).decode(),
    pickle.EMPTY_TUPLE: lambda machine: (),
    pickle.EMPTY_LIST: lambda machine: [],
    pickle.EMPTY_DICT: lambda machine: {},
    pickle.TUPLE: lambda machine: tuple(machine.since_mark()),
    pickle.GLOBAL: lambda machine: _named(f"{machine.line()} {machine.line()}"),
}


def _run(machine: _Machine) -> Any:
  """Runs the program to its end and returns the result."""
  stack, marks, memo = machine.stack, machine.marks, machine.memo
  while True:
    match machine.take(1):
      case code if code in _VALUES:
        stack.append(_VALUES[code](machine))
      case pickle.PROTO:
        machine.take(1)
      case pickle.STOP:
        return stack.pop()
      case pickle.MARK:
        marks.append(len(stack))
      case pickle.BINPUT | pickle.LONG_BINPUT as code:
        memo[machine.number("B" if code == pickle.BINPUT else "I")] = stack[-1]
      case pickle.BINGET | pickle.LONG_BINGET as code:
        place = machine.number("B" if code == pickle.BINGET else "I")
        if place not in memo:
          raise ValueError(f"it has nothing in place {place}")
        stack.append(memo[place])
      case pickle.TUPLE1 | pickle.TUPLE2 | pickle.TUPLE3 as code:
        marks.append(len(stack) - (code[0] - pickle.TUPLE1[0] + 1))
        stack.append(tuple(machine.since_mark()))
      case pickle.APPEND:
        _extend(stack[-2], [stack.pop()])
      case pickle.APPENDS:
        items = machine.since_mark()
        _extend(stack[-1], items)
      case pickle.SETITEM:
        _update(stack[-3], [stack.pop(-2), stack.pop()])
      case pickle.SETITEMS:
        items = machine.since_mark()
        _update(stack[-1], items)
      case pickle.REDUCE:
        arguments = stack.pop()
        stack[-1] = _call(stack[-1], arguments)
      case pickle.BUILD:
        state = stack.pop()
        stack[-1] = _complete(stack[-1], state)
      case code:
        raise ValueError(f"it has the instruction {code!r}")


def _extend(target: Any, items: list[Any]) -> None:
  """Appends items to a list."""
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
  """Returns the stand-in for a global, which `name` gives as "module name"."""
  try:
    return _Global(name)
  except ValueError:
    raise ValueError(f"it names {name.replace(' ', '.')!r}") from None


def _call(function: Any, arguments: Any) -> _Unfinished:
  """Returns the stand-in for the result of one of the two calls that are known."""
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
  """Returns what an unfinished object becomes with its state."""
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
