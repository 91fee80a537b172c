"""The cost of loading and running a packed network, and the limits on it.

A small file could ask for much memory or time. docs/format.md has the formulas of the
cost. The native library computes the same numbers.
"""

import math
from typing import NamedTuple, Sequence

from minw.packed import program as program_lib
from minw.packed import rules

ELEMENT_OPERATIONS = 64  # Operations for an element that is read or made.
STEP_OPERATIONS = 16  # More operations, for each number of a window or each threshold.
FLOAT_OPERATIONS = 512  # Operations for an element that is rounded to a float format.
FREE_PADDING = 4  # Padded weights per weight of a file that do not count as padding.
OWN_PRODUCTS = 256  # Most weights of a group, per pixel, for `_has_own_inputs`.


class Limits(NamedTuple):
  """The most that a network may cost those who load and run it; see `cost`.

  The defaults leave ResNet-50 at 224 x 224 pixels room for 25 times its operations.

  Attributes:
    padding: Number of weights that padding adds, beyond 4 for each weight. Kernels keep
      up to 8 bytes for each padded weight.
    memory: Bytes of the values that an image needs at the same time.
    operations: Number of multiplications and other operations for an image, with the
      padding.
  """

  padding: int = 2 ** 24
  memory: int = 2 ** 29
  operations: int = 2 ** 38


UNLIMITED = Limits(*[2 ** 63 - 1] * 3)


def cost(
    program: program_lib.Program, values: Sequence[program_lib.Value] | None = None
) -> Limits:
  """Returns the cost of a network, in the terms of `Limits`.

  Args:
    program: The network.
    values: The result of `infer_values` for it, if that is at hand.
  """
  values = program_lib.infer_values(program) if values is None else values
  ends = program_lib.last_uses(program)
  padding = memory = operations = 0
  live = _bytes(values[0]) if any(0 in end for end in ends) else 0
  for i, op in enumerate(program.ops):
    x, result = values[program_lib.inputs(op)[0]], values[i + 1]
    live += _bytes(result)
    work = 0
    if isinstance(op, program_lib.Conv):
      weights = _padded_weights(op, x.shape)
      padding += max(0, weights - FREE_PADDING * op.kernel.size)
      elements = _padded_pixels(op, x.shape) * _pixel_elements(op, x.shape)
      work = 4 * elements
      operations += (
          math.prod(result.shape[:2]) * weights + ELEMENT_OPERATIONS * elements)
    operations += _stored(result.shape) * _element_operations(op)
    memory = max(memory, live + work)
    live -= sum(_bytes(values[value]) for value in ends[i])
  return Limits(padding, memory, operations)


def check_limits(
    program: program_lib.Program,
    limits: Limits = Limits(),
    values: Sequence[program_lib.Value] | None = None,
) -> None:
  """Refuses a network that costs more than `limits` allow.

  Args:
    program: The network.
    limits: The most that it may cost.
    values: The result of `infer_values` for it, if that is at hand.

  Raises:
    ValueError: It costs more. The message names the limit.
  """
  for field, need, limit in zip(Limits._fields, cost(program, values), limits):
    rules.require(need <= limit, "", f"its {field}, {need}, exceeds the limit of"
                  f" {limit}; higher limits are for files that you trust")


def _rounded_up(n: int, multiple: int) -> int:
  return -(-n // multiple) * multiple


def _stored(shape: Sequence[int]) -> int:
  """Number of elements of a value with its channels padded."""
  return shape[0] * shape[1] * _rounded_up(shape[2], 16)


def _bytes(value: program_lib.Value) -> int:
  return _stored(value.shape) * (1 if value.kind == "CODE" else 4)


def _padded_pixels(op: program_lib.Conv, shape: Sequence[int]) -> int:
  """Number of pixels of an input of a shape with its padding."""
  return math.prod(program_lib.padded_size(shape, op.pads))


def _has_own_inputs(op: program_lib.Conv, shape: Sequence[int]) -> bool:
  """Returns whether each output channel gets a copy of its own inputs.

  Kernels do that for groups of few channels, instead of running one group after the
  other.
  """
  out, *_, channels = op.kernel.shape
  elements = _padded_pixels(op, shape) * channels * _rounded_up(out, 16)
  return (op.groups > 1 and channels * (out // op.groups) <= OWN_PRODUCTS
          and elements <= rules.MAX_PADDED)


def _pixel_elements(op: program_lib.Conv, shape: Sequence[int]) -> int:
  """Number of elements of a pixel that a convolution reads."""
  out, *_, channels = op.kernel.shape
  own = _has_own_inputs(op, shape)
  return channels * _rounded_up(out, 16) if own else shape[2]


def _padded_weights(op: program_lib.Conv, shape: Sequence[int]) -> int:
  """Number of weights with input and output channels padded, as in kernels."""
  out, *window, channels = op.kernel.shape
  if _has_own_inputs(op, shape):
    return math.prod(window) * channels * _rounded_up(out, 64)
  return (op.groups * math.prod(window) * _rounded_up(channels, 8)
          * _rounded_up(out // op.groups, 64))


def _element_operations(op: program_lib.Op) -> int:
  """Number of operations for an element of a result, without multiplications."""
  if isinstance(op, program_lib.Pool):
    return ELEMENT_OPERATIONS + STEP_OPERATIONS * math.prod(op.window)
  if isinstance(op, program_lib.Threshold):
    return ELEMENT_OPERATIONS + STEP_OPERATIONS * math.prod(op.thresholds.shape[:2])
  if isinstance(op, program_lib.FloatNorm):
    return FLOAT_OPERATIONS
  return ELEMENT_OPERATIONS
