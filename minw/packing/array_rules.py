"""The operations between minw's layers in a packed network.

Each rule takes the builder, an equation of the traced network and its operands, at
least one of which is an `Array`. It returns the equation's result, after adding an
operation to the program where numbers change. An equation without a rule is refused.
"""

import math
from typing import Any, Callable, Sequence

import jax.numpy as jnp
import numpy as np

from minw import packed
from minw.packing.builder import Array
from minw.packing.builder import Builder
from minw.structure import refusal

Rule = Callable[[Builder, Any, Sequence[Any]], Array]

# Equations that change no numbers. `_check_survival` checks what a cast keeps.
_IDENTITIES = ("convert_element_type", "copy", "copy_p", "name", "stop_gradient",
               "optimization_barrier")


def apply(builder: Builder, eqn: Any, given: Sequence[Any]) -> Sequence[Any]:
  """Returns the results of an equation between layers.

  Args:
    builder: The program so far.
    eqn: An equation of the traced network.
    given: Its operands.

  Raises:
    ValueError: The equation does not pack.
  """
  name = eqn.primitive.name
  if name in _IDENTITIES:
    results = given
  elif name in _RULES:
    results = [_RULES[name](builder, eqn, given)]
  else:
    raise refusal(f"{name} of {builder.describe(given)} does not pack")
  for result, var in zip(results, eqn.outvars, strict=True):
    if not isinstance(result, Array):
      continue
    if result.dims != var.aval.shape:
      raise refusal(
          f"{name} of {builder.describe(given)}, from {result.dims} to"
          f" {var.aval.shape}, does not pack")
    _check_survival(builder, name, given, result, var.aval.dtype)
  return results


def _check_survival(
    builder: Builder, name: str, given: Sequence[Any], x: Array, dtype: np.dtype
) -> None:
  """Checks that the dtype of a result holds every possible value exactly."""
  if not _survives(builder, x, dtype):
    largest = builder.kind(x).bound.max(initial=0) * x.unit
    raise refusal(
        f"{name} of {builder.describe(given)} gives {dtype.name}, which does not hold"
        f" all possible values (up to {largest:g} in steps of {x.unit:g}); cast"
        " to float32, or not at all")


def _survives(builder: Builder, x: Array, dtype: np.dtype) -> bool:
  """Returns whether a dtype holds every value that an array can have."""
  value = builder.kind(x)
  if value.kind == "FLOAT":
    made = getattr(builder.ops[x.value - 1], "bits", None) if x.value else None
    return dtype in (np.float32, np.float64) or made == dtype.name
  if value.kind == "CODE":
    return _fits(np.asarray(packed.LEVELS[value.bits]) * x.unit, dtype)
  largest = int(value.bound.max())
  if jnp.issubdtype(dtype, jnp.floating):  # Integers times a power of two.
    info = jnp.finfo(dtype)
    return (largest <= 2 ** (info.nmant + 1)
            and x.unit >= float(info.smallest_normal)
            and largest * x.unit <= float(info.max))
  return x.unit >= 1 and _fits(np.asarray([-largest, largest]) * x.unit, dtype)


def _fits(values: np.ndarray, dtype: np.dtype) -> bool:
  """Returns whether `dtype`, other than bool, holds these numbers (float64) exactly."""
  if jnp.issubdtype(dtype, jnp.integer):
    info = jnp.iinfo(dtype)
    inside = (values >= info.min) & (values <= info.max)
    return bool((inside & (values == np.round(values))).all())
  return bool(jnp.issubdtype(dtype, jnp.floating)
              and (values.astype(dtype).astype(np.float64) == values).all())


def _reshape(builder: Builder, eqn: Any, given: Sequence[Any]) -> Array:
  """Returns the same numbers in another form."""
  x = given[0]
  dims, (h, w, c) = eqn.outvars[0].aval.shape, x.shape
  if dims == x.dims:
    return x
  if dims == (2, h * w * c) and x.form == "map":
    return builder.whole(x)._replace(form="flat")
  if dims == (2, h, w, c) and x.form == "flat":
    return x._replace(form="map")
  if len(dims) == 6 and x.form == "map":
    return x._replace(form="windows", window=(dims[2], dims[4]))
  raise refusal(
      f"reshaping {builder.describe(given)} from {x.dims} to {dims} is not supported;"
      " height, width and channels may be flattened together")


def _slice(builder: Builder, eqn: Any, given: Sequence[Any]) -> Array:
  """Takes the pixels of a part from the corner on, or every n-th pixel."""
  x = given[0]
  starts, limits = eqn.params["start_indices"], eqn.params["limit_indices"]
  strides: Any = eqn.params["strides"] or (1,) * len(starts)
  h, w, c = x.shape
  if (x.form != "map" or any(starts) or limits[0] != 2 or limits[3] != c
      or strides[0] != 1 or strides[3] != 1):
    raise refusal(f"a slice of {builder.describe(given)} must be one of its pixels")
  if strides[1:3] == (1, 1):
    return x._replace(shape=(limits[1], limits[2], c))
  if limits[1:3] != (h, w):
    raise refusal(f"a slice of {builder.describe(given)} with strides must be one of"
                  " all its pixels")
  return _emit_shortcut(builder, x, strides[1:3], 0, 0)


def _emit_shortcut(
    builder: Builder, x: Array, strides: tuple[int, int], before: int, after: int
) -> Array:
  """Adds the operation that takes every n-th pixel and adds channels of zeros."""
  builder.whole(x)
  if builder.kind(x).kind != "CODE":
    raise refusal(f"a shortcut of {builder.describe([x])}, which is not quantized, is"
                  " not supported")
  name = f"shortcut{len(builder.ops)}"
  return builder.emit(
      packed.Shortcut(name, x.value, strides, before, after), x.unit)


def _pad(builder: Builder, eqn: Any, given: Sequence[Any]) -> Array:
  """Adds channels of zeros."""
  x, fill = given
  config = eqn.params["padding_config"]
  if (not isinstance(x, Array) or isinstance(fill, Array) or np.asarray(fill) != 0
      or x.form != "map" or any(any(part) for part in config[:3]) or config[3][2]
      or min(config[3]) < 0):
    raise refusal(
        f"padding {builder.describe(given)} other than its channels with zeros is not"
        " supported")
  return _emit_shortcut(builder, x, (1, 1), *map(int, config[3][:2]))


def _pool(kind: str) -> Rule:
  """Returns the rule of a maximum or a sum over the axes of windows or a map."""
  def pool(builder: Builder, eqn: Any, given: Sequence[Any]) -> Array:
    x = given[0]
    axes = eqn.params["axes"]
    if x.form == "windows" and axes == (2, 4):
      window, form = x.window, "map"
    elif x.form == "map" and axes == (1, 2):
      builder.whole(x)
      window, form = x.shape[:2], "flat"
    else:
      raise refusal(
          f"a {kind} of {builder.describe(given)} over axes {axes} is not supported")
    name = f"{kind}_pool{len(builder.ops)}"
    return builder.emit(packed.Pool(name, x.value, kind, window, window), x.unit, form)
  return pool


def _window_pool(kind: str) -> Rule:
  """Returns the rule of a maximum or a sum over windows, as of `lax.reduce_window`."""
  def pool(builder: Builder, eqn: Any, given: Sequence[Any]) -> Array:
    x, p = builder.whole(given[0]), eqn.params
    sides = (p["window_dimensions"], p["window_strides"], p["base_dilation"],
             p["window_dilation"])
    pads = [int(n) for pair in p["padding"] for n in pair]
    top, bottom, left, right = pads[2:6]
    if (x.form != "map" or any(side[0] != 1 or side[3] != 1 for side in sides)
        or set(sides[2] + sides[3]) != {1} or any(pads[:2] + pads[6:])):
      raise refusal(f"a {kind} of {builder.describe(given)} must be over windows of its"
                    " pixels")
    name = f"{kind}_pool{len(builder.ops)}"
    return builder.emit(
        packed.Pool(name, x.value, kind, sides[0][1:3], sides[1][1:3],
                    (top, bottom, left, right)), x.unit)
  return pool


def _concatenate(builder: Builder, eqn: Any, given: Sequence[Any]) -> Array:
  """Puts channels side by side."""
  first = given[0]
  for x in given:
    if not isinstance(x, Array):
      raise refusal(f"a constant cannot be concatenated to {builder.describe(given)}")
    if x.form == "flat" and x.shape[:2] != (1, 1):
      raise refusal(f"{builder.describe([x])}: a flattened map cannot be concatenated")
    builder.whole(x)
  if eqn.params["dimension"] != len(first.dims) - 1:
    raise refusal(f"{builder.describe(given)} must be concatenated in channels")
  kinds = [builder.kind(x) for x in given]
  if len({(kind.kind, kind.bits) for kind in kinds}) > 1:
    texts = [f"{builder.describe([x])} ({_describe(kind)})"
             for x, kind in zip(given, kinds)]
    raise refusal(f"{', '.join(texts)}: numbers of different kinds cannot be"
                  " concatenated")
  unit = min(x.unit for x in given)
  shifts = tuple(_shift(x, unit) for x in given)
  name = f"concat{len(builder.ops)}"
  return builder.emit(
      packed.Concat(name, tuple(x.value for x in given), shifts), unit, first.form)


def _describe(kind: packed.Value) -> str:
  """Returns the kind of a value, for error messages."""
  return {"CODE": f"activations of {kind.bits} bits", "INT": "sums"}.get(
      kind.kind, "floats")


def _neutral(given: Sequence[Any], value: float) -> Array | None:
  """Returns the `Array` among two operands if the other one holds only `value`."""
  a, b = given
  if isinstance(a, Array) and isinstance(b, Array):
    return None
  x, constant = (a, b) if isinstance(a, Array) else (b, a)
  return x if (np.asarray(constant) == value).all() else None


def _subtract(builder: Builder, eqn: Any, given: Sequence[Any]) -> Array:
  """Returns an array less 0, the only subtraction that packs."""
  if isinstance(given[0], Array) and _neutral(given, 0):
    return given[0]
  raise refusal(f"a subtraction with {builder.describe(given)} is not supported")


def _add(builder: Builder, eqn: Any, given: Sequence[Any]) -> Array:
  """Adds two arrays, or returns an array plus 0."""
  same = _neutral(given, 0)
  if same:
    return same
  a, b = given
  if not (isinstance(a, Array) and isinstance(b, Array) and a.dims == b.dims):
    raise refusal(f"adding a constant to {builder.describe(given)} is not supported")
  builder.whole(a)
  builder.whole(b)
  unit = min(a.unit, b.unit)
  op = packed.Add(f"add{len(builder.ops)}", a.value, b.value, _shift(a, unit),
                  _shift(b, unit))
  return builder.emit(op, unit, a.form)


def _shift(x: Array, unit: float) -> int:
  """Returns by how many bits an array's integers move to count in `unit`.

  Both units are powers of two.
  """
  return int(math.log2(x.unit / unit))


def _scale(sign: int) -> Rule:
  """Returns the rule of a product (sign 1) or a quotient (sign -1)."""
  def scale(builder: Builder, eqn: Any, given: Sequence[Any]) -> Array:
    same = _neutral(given, 1)
    if same and (isinstance(given[0], Array) or sign > 0):
      return same
    x, factor = given if isinstance(given[0], Array) else given[::-1]
    factor = np.asarray(0 if isinstance(factor, Array) else factor)
    mantissa = np.frexp(factor.astype(np.float64))[0] if factor.ndim == 0 else 0
    if (mantissa != 0.5 or not isinstance(given[0], Array) and sign < 0
        or builder.kind(x).kind != "INT"):
      raise refusal(
          f"scaling {builder.describe(given)}: only sums can be scaled, and only by"
          " powers of two (instead of the mean over a window of another size, take the"
          " sum)")
    return x._replace(unit=x.unit * float(factor) ** sign)
  return scale


def _reduce_precision(builder: Builder, eqn: Any, given: Sequence[Any]) -> Array:
  """Returns an array whose values all survive the rounding."""
  x, (exponent, mantissa) = given[0], (
      eqn.params["exponent_bits"], eqn.params["mantissa_bits"])
  value = builder.kind(x)
  # The unit and the largest value must be normal numbers of the narrower format.
  largest, edge = int(value.bound.max(initial=0)), 2 ** (exponent - 1) - 2
  if (value.kind == "FLOAT" and (exponent, mantissa) != (8, 23)
      or largest > 2 ** (mantissa + 1)
      or not 2.0 ** -edge <= x.unit <= 2.0 ** edge / max(largest, 1)):
    raise refusal(
        f"reduce_precision of {builder.describe(given)} to {exponent} exponent and"
        f" {mantissa} mantissa bits does not keep all possible values")
  return x


def _squeeze(builder: Builder, eqn: Any, given: Sequence[Any]) -> Array:
  """Drops the axes of height and width, which are 1."""
  return builder.whole(given[0])._replace(form="flat")


def _broadcast(builder: Builder, eqn: Any, given: Sequence[Any]) -> Array:
  """Adds the axes of height and width back."""
  return builder.whole(given[0])._replace(form="map")


_RULES: dict[str, Rule] = {
    "reshape": _reshape,
    "slice": _slice,
    "pad": _pad,
    "reduce_max": _pool("max"),
    "reduce_sum": _pool("sum"),
    "reduce_window_max": _window_pool("max"),
    "reduce_window_sum": _window_pool("sum"),
    "concatenate": _concatenate,
    "add": _add,
    "sub": _subtract,
    "mul": _scale(1),
    "div": _scale(-1),
    "reduce_precision": _reduce_precision,
    "squeeze": _squeeze,
    "broadcast_in_dim": _broadcast,
}
