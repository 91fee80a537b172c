"""Affine maps by a network's own parameters, which fold into the next batch norm.

A network may add parameters of its own to sums or multiply sums with them. While `fold`
runs the probe through the network, an `Activation` records their effect on a sum as
factor * sum + summand, in float64 for each channel. The NormQuant that follows takes
both numbers into its center and scale. In the hard network the parameters are neutral,
0 as summands and 1 as factors, so that its arithmetic stays exact. Any other use of a
parameter is an error that names the parameter.
"""

import dataclasses
from typing import Any, NamedTuple, Sequence

import numpy as np

from minw import structure

# Operations that move values without changing them.
_MOVES = ("broadcast_in_dim", "copy", "copy_p", "name", "reshape", "rev", "slice",
          "squeeze", "stop_gradient", "transpose")
# Operations that round, unless `pack` finds that they keep every value.
CASTS = ("convert_element_type", "reduce_precision")
_MAXIMA = ("reduce_max", "reduce_window_max")
_SUMS = ("reduce_sum", "reduce_window_sum")
_ALLOWED = (
    "a parameter of the network's own may be added to sums, subtracted from them,"
    " multiplied with them or divide them, as one number or one for each channel, where"
    " a NormQuant follows (its option rprelu is a learned PReLU)")


@dataclasses.dataclass(frozen=True)
class Parameter:
  """A variable of the network, perhaps reshaped.

  Attributes:
    path: Name of the variable in messages: "params/block/shift".
    value: Array of the values.
    size: Number of values of the variable, per iteration of the loops around it.
    pure: Whether `value` holds the values of the variable unchanged.
  """

  path: str
  value: Any
  size: int
  pure: bool = True

  def __getitem__(self, i: int) -> "Parameter":
    """The part of the parameter that iteration `i` of a loop gets."""
    value = self.value[i]
    return dataclasses.replace(self, value=value, size=np.size(value))


class Activation(NamedTuple):
  """An array that depends on the image.

  Attributes:
    rows: Rows of the probe, without the effect of the network's own parameters.
    factor: Factor from these parameters, float64 (channels,), or 1 without parameters.
    summand: Summand from these parameters, float64 (channels,), or 0 without
      parameters.
    owners: Paths of these parameters.
  """

  rows: Any
  factor: Any = np.float64(1)
  summand: Any = np.float64(0)
  owners: tuple[str, ...] = ()


def value_of(x: Any) -> Any:
  """The array of a `Parameter` or `Activation`. Any other value is returned as is."""
  if isinstance(x, Activation):
    return x.rows
  return x.value if isinstance(x, Parameter) else x


def apply(eqn: Any, given: Sequence[Any], neutral: dict[str, float]) -> list[Any]:
  """Computes the results of an equation on arrays, parameters and activations.

  Args:
    eqn: Equation that is not a layer.
    given: Operands of the equation.
    neutral: Values that replace parameters in the hard network, by path. The function
      adds those of parameters that this equation uses.

  Returns:
    The results of the equation.

  Raises:
    ValueError: A parameter is used in a way that does not fold.
  """
  if eqn.primitive.name == "optimization_barrier":
    return list(given)
  activations = [x for x in given if isinstance(x, Activation)]
  parameters = [x for x in given if isinstance(x, Parameter)]
  if activations and parameters:
    return [_combine(eqn, given, parameters[0], neutral)]
  owners = tuple(owner for x in activations for owner in x.owners)
  if owners:
    return [_carry(eqn, given, owners)]
  if activations and eqn.primitive.name in CASTS:
    # The probe's numbers are float32, for any dtype of the network.
    x = activations[0]
    return [x._replace(rows=x.rows.astype(np.float32))]
  results = structure.apply_equation(eqn, _operands(eqn, given))
  if activations:
    return [Activation(result) for result in results]
  if parameters:
    first = parameters[0]
    pure = first.pure and len(given) == 1 and (
        eqn.primitive.name in (*_MOVES, "convert_element_type"))
    return [dataclasses.replace(first, value=result, pure=pure) for result in results]
  return list(results)


def _operands(eqn, given):
  """The arrays of an equation's operands.

  The probe skips casts. Other operands of the dtype of an activation are therefore
  converted to float32 too.
  """
  dtypes = {var.aval.dtype for x, var in zip(given, eqn.invars)
            if isinstance(x, Activation)}
  return [
      np.asarray(x, np.float32)
      if var.aval.dtype in dtypes and not isinstance(x, (Activation, Parameter))
      else value_of(x) for x, var in zip(given, eqn.invars)]


def _combine(eqn, given, parameter, neutral):
  """Applies a sum, difference, product or quotient of an activation and a parameter.

  A summand is added to the activation's summand. A factor multiplies both its factor
  and its summand, because (factor * sum + summand) * value = (factor * value) * sum +
  summand * value. The rows stay as they are.
  """
  name = eqn.primitive.name
  changes = {"add": 0.0, "add_any": 0.0, "sub": 0.0, "mul": 1.0, "div": 1.0}
  x = given[0] if isinstance(given[0], Activation) else given[-1]
  rows = x.rows if isinstance(x, Activation) else np.zeros(0)
  in_order = isinstance(given[0], Activation) or name not in ("sub", "div")
  if (name not in changes or len(given) != 2 or not in_order or not parameter.pure
      or eqn.outvars[0].aval.shape != rows.shape
      or parameter.size not in (1, rows.shape[-1])):
    raise _refusal(parameter.path, f"is used by {name}")
  values = np.broadcast_to(np.asarray(parameter.value, np.float64), rows.shape)
  values = values.reshape(-1, rows.shape[-1])
  if (values != values[0]).any():
    raise _refusal(parameter.path, "differs between the places of a channel")
  value = values[0]
  if neutral.setdefault(parameter.path, changes[name]) != changes[name]:
    raise _refusal(parameter.path, "is a summand and a factor")
  if name == "div":
    if not value.all():
      raise _refusal(parameter.path, "is a divisor and 0")
    value = 1 / value
  owners = (*x.owners, parameter.path)
  if changes[name]:
    return Activation(rows, x.factor * value, x.summand * value, owners)
  value = -value if name == "sub" else value
  return Activation(rows, x.factor * np.ones_like(value), x.summand + value, owners)


def _carry(eqn, given, owners):
  """Applies an operation that stands between the parameters and the NormQuant.

  Its results must again be factor * sum + summand for each channel, where sum is the
  result of the same operation without the parameters.
  """
  name, x = eqn.primitive.name, given[0]
  if len(given) == 1 and name in (*_MOVES, *_MAXIMA, *_SUMS):
    return _moved(eqn, x)
  if len(given) == 1 and name == "convert_element_type" and (
      eqn.outvars[0].aval.dtype == x.rows.dtype):
    return x
  rows, *more = structure.apply_equation(eqn, [value_of(x) for x in given])
  if more:
    raise _refusal(owners[-1], f"is followed by {name}")
  if all(isinstance(x, Activation) for x in given):
    wide = [Activation(x.rows, *_by_channel(x), x.owners) for x in given]
    if name == "concatenate" and eqn.params["dimension"] == rows.ndim - 1:
      return Activation(rows, np.concatenate([x.factor for x in wide]),
                        np.concatenate([x.summand for x in wide]), owners)
    if name in ("add", "add_any") and (wide[0].factor == wide[-1].factor).all():
      return Activation(
          rows, wide[0].factor, wide[0].summand + wide[-1].summand, owners)
  elif name in ("mul", "div"):
    constant = given[1] if x is given[0] and isinstance(x, Activation) else given[0]
    constant = np.unique(np.asarray(value_of(constant), np.float64))
    if constant.size == 1 and (name == "mul" or isinstance(x, Activation)):
      x = x if isinstance(x, Activation) else given[1]
      scale = constant[0] if name == "mul" else 1 / constant[0]
      return x._replace(rows=rows, summand=x.summand * scale, owners=owners)
  raise _refusal(owners[-1], f"is followed by {name}")


def _by_channel(x):
  shape = x.rows.shape[-1:]
  return np.broadcast_to(x.factor, shape), np.broadcast_to(x.summand, shape)


def _moved(eqn, x):
  """Applies an operation that moves values, takes maxima or sums, to an activation.

  The operation runs on an array that holds the index of its channel at each place, and
  so reveals from which channel each result comes. A sum runs on ones too, which gives
  the number of terms. A sum of n terms has n times the summand. All results of a
  channel must come from one and the same channel, with equally many terms. A maximum
  must not have a negative factor, which would turn it into a minimum.
  """
  name = eqn.primitive.name
  factor, summand = _by_channel(x)
  if name in _MAXIMA and (factor < 0).any():
    raise _refusal(x.owners[-1], f"is a negative factor before {name}")
  of = lambda value: np.asarray(structure.apply_equation(eqn, [value])[0])
  channels = x.rows.shape[-1]
  numbers = np.broadcast_to(np.arange(channels, dtype=np.float32), x.rows.shape)
  rows = structure.apply_equation(eqn, [x.rows])[0]
  flat = lambda value: value.reshape(-1, rows.shape[-1]).astype(np.float64)
  terms = flat(of(np.ones_like(x.rows))) if name in _SUMS else np.ones((1, 1))
  source = flat(of(numbers)) / terms
  if (terms != terms[0]).any() or (source != source[0]).any():
    raise _refusal(x.owners[-1], f"is followed by {name} over several channels, or"
                   " over a border")
  source = source[0].astype(int)
  return Activation(rows, factor[source], summand[source] * terms[0], x.owners)


def _refusal(path, problem):
  return structure.refusal(f"parameter {path!r} {problem}; {_ALLOWED}")


def check_folded(x: Any, layer: str) -> None:
  """Raises `ValueError` if `x` carries parameters, which `layer` cannot fold."""
  if isinstance(x, Activation) and x.owners:
    raise _refusal(x.owners[-1], f"reaches {layer} without a NormQuant between")
