"""The program of a packed network while it is being written.

Arrays of the traced network that depend on the image are represented by `Array`s, which
name the value of the program that holds their numbers.
"""

import collections
from typing import Any, NamedTuple, Sequence

import numpy as np

from minw import packed
from minw.structure import refusal


class Array(NamedTuple):
  """An array of the traced network that depends on the image.

  Attributes:
    value: Index of the program's value that holds its numbers.
    unit: The number that an integer 1 of the value stands for; 1 for a FLOAT.
    shape: (height, width, channels) of the map. It is smaller than the value's shape
      where a border that fills no window is cut off.
    form: "map" (batch, height, width, channels), "flat" (batch, height * width *
      channels), or "windows" (batch, height / h, h, width / w, w, channels).
    window: The (h, w) of "windows".
  """

  value: int
  unit: float
  shape: tuple[int, int, int]
  form: str = "map"
  window: tuple[int, int] = (1, 1)

  @property
  def dims(self) -> tuple[int, ...]:
    """Shape of the array for a batch of two."""
    h, w, c = self.shape
    if self.form == "map":
      return (2, h, w, c)
    if self.form == "flat":
      return (2, h * w * c)
    return (2, h // self.window[0], self.window[0], w // self.window[1],
            self.window[1], c)


class Builder:
  """Adds operations to a program.

  Attributes:
    values: What is known of each value so far, the image first.
    ops: The operations so far. Operation i makes value i + 1.
    image: The image as an array.
  """

  def __init__(self, image_shape: tuple[int, int, int], offset: np.ndarray):
    self.values = [packed.image_value(image_shape, image_shape[:2], offset)]
    self.ops: list[packed.Op] = []
    self.image = Array(0, 1 / 64, image_shape)
    self._calls: collections.Counter[str] = collections.Counter()

  def emit(self, op: packed.Op, unit: float, form: str = "map") -> Array:
    """Adds an operation and returns its result.

    Args:
      op: The operation.
      unit: The number that an integer 1 of the result stands for.
      form: The form of the result, see `Array`.

    Raises:
      ValueError: The operation breaks a rule of the format.
    """
    try:
      value = packed.infer_value(op, self.values)
    except ValueError as error:
      sources = " and ".join(map(self._describe, packed.inputs(op)))
      raise refusal(f"{op.name}, of {sources}: {error}") from error
    self.values.append(value)
    self.ops.append(op)
    return Array(len(self.ops), unit, value.shape, form)

  def kind(self, x: Array) -> packed.Value:
    """Returns what is known of the value that holds an array."""
    return self.values[x.value]

  def whole(self, x: Array) -> Array:
    """Returns `x` if it is all of its value.

    Raises:
      ValueError: It is a part.
    """
    if x.form == "windows" or x.shape != self.kind(x).shape:
      raise refusal(f"a part of {self.describe([x])} is used other than for pooling")
    return x

  def call_name(self, name: str) -> str:
    """Returns a name for the call of a layer; another one for each further call."""
    self._calls[name] += 1
    again = self._calls[name] - 1
    return f"{name}[{again}]" if again else name

  def describe(self, given: Sequence[Any]) -> str:
    """Returns where the arrays among `given` come from, for error messages."""
    return " and ".join(self._describe(x.value) for x in given if isinstance(x, Array))

  def _describe(self, value: int) -> str:
    """Returns the name of the operation that makes a value, or "the image".

    An operation between layers has a name that says little, so that the layers before
    it are named, too.
    """
    if not value:
      return "the image"
    op = self.ops[value - 1]
    if not _stands_between(op):
      return op.name
    seen, waiting = set(), [*packed.inputs(op)]
    while waiting:
      value = waiting.pop()
      if value not in seen and value and _stands_between(self.ops[value - 1]):
        waiting += packed.inputs(self.ops[value - 1])
      seen.add(value)
    names = sorted({self._describe(v) for v in seen
                    if not v or not _stands_between(self.ops[v - 1])})
    more = f" and {len(names) - 3} more" * (len(names) > 3)
    return f"{op.name} (of {', '.join(names[:3])}{more})"


def _stands_between(op: packed.Op) -> bool:
  """Returns whether an operation stands between layers."""
  return isinstance(op, (packed.Pool, packed.Concat, packed.Shortcut, packed.Add))
