"""The operations that minw's layers become in a packed network.

A convolution or dense layer becomes one `packed.Conv`. A NormQuant becomes thresholds,
which are found by bisecting the layer itself over all sums that there can be, or the
logits. Where an operand is in a float format it becomes a `packed.FloatNorm`.
"""

from typing import Any, NamedTuple, Sequence

import jax
import numpy as np

from minw import fold
from minw import layers
from minw import packed
from minw import quantizers
from minw import structure
from minw.packing.builder import Array
from minw.packing.builder import Builder
from minw.structure import refusal

_MOST_EXACT = 2**24  # float32 holds all integers up to this one.


class _Call(NamedTuple):
  """A call of one of minw's layers.

  Attributes:
    layer: The layer, unbound.
    name: Name of the operation that it becomes.
    hard: Its variables in the hard network.
  """

  layer: Any
  name: str
  hard: dict[str, np.ndarray]


def apply(
    builder: Builder, call: structure.Call, operands: Sequence[Any], where: str
) -> Array:
  """Adds the operation of a layer and returns its result.

  Args:
    builder: The program so far.
    call: The call of the layer.
    operands: Its input, its shortcut if it has one, and its variables.
    where: The iterations of the loops around it.

  Raises:
    ValueError: The layer does not pack.
  """
  call.check_exact()
  x, shortcut, variables = call.split(operands)
  name = builder.call_name(call.name(where))
  given = [builder.whole(x) for x in (x, shortcut) if x is not None]
  packing = _Call(call.layer, name, variables["hard"])
  if isinstance(call.layer, layers.NormQuant):
    return _norm(builder, packing, *given)
  return _linear(builder, packing, *given)


def _linear(builder: Builder, call: _Call, x: Array) -> Array:
  """Adds a convolution or dense layer."""
  layer, kernel, kind = call.layer, np.asarray(call.hard["kernel"]), builder.kind(x)
  options: dict[str, Any] = {}
  form = x.form
  if isinstance(layer, layers.QuantConv):
    if x.form != "map":
      raise refusal(f"{call.name}: a convolution cannot take a flattened map")
    options = _window_of(call, x, kind)
  else:
    window = x.shape[:2] if form == "flat" else (1, 1)
    kernel = kernel.reshape(*window, x.shape[2], -1)
  kernel = np.ascontiguousarray(kernel.transpose(3, 0, 1, 2), np.float32)
  unit = 1.0
  if quantizers.is_grid(layer.bits):
    if layer.bits not in packed.LEVELS:
      raise refusal(f"{call.name}: weights of {layer.bits} bits do not pack; they must"
                    " have 1, 2 or 3 bits")
    step = quantizers.step_size(layer.bits)
    kernel = _codes(kernel, layer.bits)
    options["weight_unit"] = step
    unit = 1.0 if kind.kind == "FLOAT" else step * x.unit
  op = packed.Conv(call.name, x.value, layer.bits, kernel, input_unit=x.unit, **options)
  return builder.emit(op, unit, form)


def _window_of(call: _Call, x: Array, kind: packed.Value) -> dict[str, Any]:
  """Returns the fields of `packed.Conv` that say where a convolution's windows are."""
  layer = call.layer
  pads = tuple(n for pair in layer.pads(x.shape[:2]) for n in pair)
  fields: dict[str, Any] = dict(
      strides=tuple(layer.strides), groups=layer.feature_group_count,
      dilation=tuple(layer.kernel_dilation), pads=pads)
  if any(pads):
    fields["pad"] = _pad_code(call, kind)
  return fields


def _pad_code(call: _Call, kind: packed.Value) -> int:
  """Returns the code of the padding, which is 0 or stands for a level of -1 or 1."""
  pad = call.layer.pad_value
  codes = {0: 0}
  if kind.kind == "CODE":
    q = packed.max_code(kind.bits)
    codes.update({-1: -q, 1: q})
  if pad not in codes:
    raise refusal(f"{call.name}: pad_value={pad}: must be one of"
                  f" {', '.join(map(str, sorted(codes)))} here")
  return codes[pad]


def _norm(
    builder: Builder, call: _Call, x: Array, shortcut: Array | None = None
) -> Array:
  """Adds a NormQuant."""
  layer, kind = call.layer, builder.kind(x)
  side = builder.kind(shortcut) if shortcut else None
  grid = layer.bits is not None and quantizers.is_grid(layer.bits)
  if kind.kind == "CODE":
    raise refusal(f"{call.name}: its input is quantized already")
  if x.form == "flat" and x.shape[:2] != (1, 1):
    raise refusal(f"{call.name}: batch norm cannot take a flattened map")
  if grid and layer.bits not in packed.LEVELS:
    raise refusal(f"{call.name}: activations of {layer.bits} bits do not pack; they"
                  " must have 1, 2 or 3 bits")
  if side and side.kind == "INT":
    raise refusal(f"{call.name}: its shortcut is not quantized")
  if kind.kind == "INT" and not (side and side.kind == "FLOAT"):
    if grid:
      return _emit_thresholds(builder, call, x, shortcut)
    if layer.bits is None and not shortcut:
      return builder.emit(packed.Logits(
          call.name, x.value, x.unit, **_constants(call)), 1.0, x.form)
  return _emit_float_norm(builder, call, x, shortcut)


def _constants(call: _Call) -> dict[str, np.ndarray]:
  """Returns center, scale and constant of a batch norm."""
  return {field: np.asarray(call.hard[field]) for field in fold.Norm._fields}


def _emit_thresholds(
    builder: Builder, call: _Call, x: Array, shortcut: Array | None
) -> Array:
  """Adds a NormQuant of integers that makes codes."""
  layer, kind = call.layer, builder.kind(x)
  if kind.bound.max() > _MOST_EXACT:
    raise refusal(f"{call.name}: its inputs are sums of {builder.describe([x])} up to"
                  f" {kind.bound.max()}, but float32 holds integers up to 2^24")
  added = [0.0]
  if shortcut:
    levels = packed.LEVELS[builder.kind(shortcut).bits]
    added = [level * shortcut.unit for level in levels]
  falling, thresholds = channel_thresholds(layer, call.hard, kind.bound, x.unit, added)
  op = packed.Threshold(call.name, x.value, layer.bits, falling, thresholds,
                        shortcut.value if shortcut else None)
  return builder.emit(op, quantizers.step_size(layer.bits), x.form)


def _emit_float_norm(
    builder: Builder, call: _Call, x: Array, shortcut: Array | None
) -> Array:
  """Adds a NormQuant if an operand is in a float format."""
  layer = call.layer
  fields: dict[str, Any] = {**_constants(call)}
  unit = 1.0
  for name, used in (("rprelu", layer.rprelu),
                     ("learn_thresholds", "thresholds" in call.hard)):
    if used:
      raise refusal(f"{call.name}: {name} is not supported with an operand in a float"
                    " format")
  if layer.bits is not None and quantizers.is_grid(layer.bits):
    fields["grid"] = np.asarray(layers.input_grid(layer).thresholds, np.float32)
    unit = quantizers.step_size(layer.bits)
  if shortcut:
    scales = np.unique(call.hard.get("shortcut_scale", 1.0))
    if len(scales) > 1:
      raise refusal(f"{call.name}: its shortcut has several scales")
    fields.update(
        shortcut=shortcut.value, shortcut_unit=shortcut.unit * float(scales[0]))
  op = packed.FloatNorm(call.name, x.value, layer.bits, x.unit, **fields)
  return builder.emit(op, unit, x.form)


def _codes(values: np.ndarray, bits: int) -> np.ndarray:
  """Returns the int8 codes of levels that are on a grid."""
  if bits == 1:
    return np.where(values > 0, 1, -1).astype(np.int8)
  magnitudes = quantizers.level_magnitudes(bits)
  size = np.searchsorted(magnitudes, np.abs(values), side="right")
  return (np.sign(values) * size).astype(np.int8)


def channel_thresholds(
    layer: layers.NormQuant,
    hard: dict[str, np.ndarray],
    bound: np.ndarray,
    unit: float,
    shortcuts: Sequence[float],
) -> tuple[np.ndarray, np.ndarray]:
  """Finds where the codes of a NormQuant change, over all sums that there can be.

  The layer is monotone in each channel. For each channel, code and shortcut level, the
  first sum that reaches the code lies between -bound and bound + 1, and bisection finds
  it in about log2(bound) calls of the layer for all of them together. Channels that
  fall are mirrored: their sums are negated before and after.

  Args:
    layer: The NormQuant, unbound.
    hard: Its variables in the hard network.
    bound: int64 (channels,), the largest magnitude of a sum.
    unit: The number that a sum of 1 stands for.
    shortcuts: The levels that may be added.

  Returns:
    The fields of `packed.Threshold`: falling (channels,), and thresholds (shortcuts, j,
    channels). A code that no sum reaches has the threshold bound + 1, or -bound - 1 if
    the channel falls.
  """
  q, t = packed.max_code(layer.bits), packed.num_thresholds(layer.bits)
  falling = np.asarray(hard["scale"]) < 0

  @jax.jit
  def level(acc, shortcut):
    return layer.apply({"hard": hard}, acc * np.float32(unit), mode="hard",
                       shortcut=shortcut if len(shortcuts) > 1 else None)

  def reached(acc):
    """Returns for acc int (s, j, channels) whether it reaches the j-th code."""
    acc = np.where(falling, -acc, acc).astype(np.float32)
    s = np.asarray(shortcuts, np.float32)[:, None, None] + np.zeros_like(acc)
    codes = _codes(np.asarray(level(acc, s)), layer.bits)
    count = codes > 0 if layer.bits == 1 else codes + q
    return count >= np.arange(1, t + 1)[:, None]

  # `above` reaches the code, or is bound + 1. `below` does not, or is -bound - 1.
  below = np.broadcast_to(-bound - 1, (len(shortcuts), t, len(bound))).copy()
  above = -below
  while (above - below > 1).any():
    middle = (above + below) // 2
    yes = reached(middle)
    above, below = np.where(yes, middle, above), np.where(yes, below, middle)
  return falling, np.where(falling, -above, above).astype(np.int32)
