"""Folds trained variables to the hard network, which is evaluated and deployed.

Batch norm in float32 is not one function: eager, jit and NumPy contract and fuse it
differently, and codes next to a threshold flip. Therefore the hard network computes

    y = (acc - center) * scale + constant                       (`apply_norm`)

with variables that are computed here once, on the host, in float64. They are chosen
such that only the product rounds:

- Accumulators are integer multiples of a power of two. `center` is rounded to a
  multiple of the finest power of two for which `acc - center` is exact. Therefore y has
  the sign of batch norm, or is 0 if batch norm is close to 0.
- `constant` is 0 unless `scale` is 0.

Eager, jit and NumPy then give the same bits on every backend. Weights are quantized
here for the same reason: their thresholds depend on a mean magnitude, which in float32
depends on the order of summation.

The hard network has levels only. Scales of weights and learned steps are folded into
the batch norm that follows. So are parameters that the network itself adds to sums or
multiplies sums by (`minw.affine`). `fold` raises an error if that is not possible.
"""

import contextlib
from typing import Any, ContextManager, NamedTuple, Sequence

import jax
from jax import lax
import jax.numpy as jnp
import numpy as np

from minw import affine
from minw import estimators
from minw import fold_probe
from minw import quantizers
from minw import structure
from minw.fold_probe import Probe as Probe

# Smallest magnitude of a center other than 0, by the rules of docs/format.md.
LEAST_CENTER = 2.0 ** -40


class Norm(NamedTuple):
  """Batch norm of the hard network. Each field is float32 (channels,)."""

  center: Any
  scale: Any
  constant: Any


class Rprelu(NamedTuple):
  """The activation of ReActNet, see `layers.NormQuant`. Each field is (channels,)."""

  gamma: Any
  beta: Any
  zeta: Any


def apply_norm(acc: jax.Array, norm: Norm) -> jax.Array:
  """Computes the batch norm of the hard network.

  Args:
    acc: Accumulators, float32 (..., channels).
    norm: Variables of the batch norm.

  Returns:
    float32 (..., channels).
  """
  # If XLA knew that a constant is 0, it might fuse the product into the next addition.
  norm = Norm(*(lax.broadcast_to_rank(value, acc.ndim)
                for value in lax.optimization_barrier(tuple(norm))))
  return (acc - norm.center) * norm.scale + norm.constant


def apply_rprelu(y: jax.Array, rprelu: Rprelu) -> jax.Array:
  """Computes ReActNet's activation.

  Args:
    y: float32 (..., channels).
    rprelu: Parameters, whose `beta` is at least 0.

  Returns:
    float32 (..., channels).
  """
  rprelu = Rprelu(*(lax.broadcast_to_rank(jnp.asarray(field), y.ndim)
                    for field in rprelu))
  below = y - rprelu.gamma
  # XLA may fuse a product into the sum that follows, and round only once.
  product = lax.optimization_barrier(below * rprelu.beta)
  return jnp.where(below > 0, below, product) + rprelu.zeta


def fold_rprelu(rprelu: Rprelu, output_scale: float = 1.0) -> Rprelu:
  """Folds ReActNet's activation to that of the hard network.

  Args:
    rprelu: Trained parameters.
    output_scale: Divisor of the input and the output, as for `fold_norm`.
  """
  gamma, beta, zeta = (np.asarray(field, np.float64) for field in rprelu)
  return Rprelu(*(
      _without_denormals(field).astype(np.float32)
      for field in (gamma / output_scale, np.abs(beta), zeta / output_scale)))


def fold_thresholds(widths: np.ndarray) -> np.ndarray:
  """Makes the thresholds of `quantizers.learned_thresholds`, in float64 for float32."""
  return quantizers.learned_thresholds(
      np.asarray(widths, np.float64)).astype(np.float32)


_round_to = jax.jit(quantizers.round_to, static_argnums=1)


def fold_kernel(
    kernel: np.ndarray,
    bits: int | str,
    *,
    rule: str = "layer_mean",
    thresholds: Sequence[float] = (),
    step: np.ndarray | float | None = None,
) -> np.ndarray:
  """Quantizes weights with the thresholds of `quantizers.weight_grid`, in float64.

  Args:
    kernel: Weights, float (..., output channels).
    bits: Bits of a grid, or name of a float format.
    rule: Rule of the thresholds; see `quantizers.weight_grid`.
    thresholds: Factors of the thresholds; see `quantizers.weight_grid`.
    step: Learned step, or an array with one for each output channel, or None. With a
      learned step, the thresholds are multiples of it and `rule` is ignored.

  Returns:
    float32 of the shape of `kernel`.
  """
  if not quantizers.is_grid(bits) or isinstance(bits, str):
    return np.asarray(_round_to(kernel, str(bits)))
  kernel = np.asarray(kernel)
  whole = bits == 1 and step is None  # Then float32 is compared without rounding.
  kernel = kernel.astype(
      np.promote_types(kernel.dtype, np.float32 if whole else np.float64), copy=False)
  if step is not None:
    kernel = _without_denormals(kernel) / np.asarray(step, np.float64)
    in_units: Any = quantizers.unit_thresholds(bits, thresholds)
    rule, thresholds = "fixed", in_units
  if bits == 1:
    # A choice between 1 and -1 would mispredict half of its branches.
    return (kernel >= quantizers.SMALLEST).astype(np.float32) * 2 - 1
  magnitudes = quantizers.level_magnitudes(bits)
  kernel = _without_denormals(kernel)
  factors = quantizers.weight_factors(bits, rule, thresholds)
  axes = tuple(range(kernel.ndim - 1)) if rule == "channel_mean" else None
  unit = 1.0 if rule == "fixed" else np.abs(kernel).mean(axes)
  code = sum((np.abs(kernel) > factor * unit).astype(np.int8) for factor in factors)
  levels = np.concatenate([np.zeros(1, np.float32), magnitudes])[code]
  return np.where(kernel < 0, -levels, levels) + np.float32(0)  # Turns -0 into 0.


def _without_denormals(x):
  """Returns `x` with 0, never -0, for magnitudes below `quantizers.SMALLEST`."""
  return np.where(np.abs(x) < quantizers.SMALLEST, 0.0, x)


def periodic(kernel: np.ndarray, frequency: float) -> np.ndarray:
  """Computes `estimators.periodic` of weights in float64, whose signs are exact."""
  return np.sin(frequency * np.asarray(kernel, np.float64))


def kernel_scale(
    kernel: np.ndarray, bits: int | str, weight_scale: str,
    step: np.ndarray | float | None = None,
) -> np.ndarray:
  """Returns the scale that multiplies the levels of a kernel in training.

  Args:
    kernel: Weights, float (..., output channels).
    bits: Bits of a grid, or name of a float format, which has no scale.
    weight_scale: Kind of scale; see `estimators.WEIGHT_SCALES`.
    step: Learned step, or an array with one for each output channel, or None.

  Returns:
    float64 () or (channels,).
  """
  scale: Any = np.asarray(1.0 if step is None else step, np.float64)
  if quantizers.is_grid(bits) and weight_scale != "none":
    weights: Any = np.asarray(kernel, np.float64)
    scale = scale * estimators.mean_magnitude(weights, weight_scale)
  return fold_probe.round_scale(scale)


def fold_norm(
    mean: np.ndarray,
    var: np.ndarray,
    scale: np.ndarray,
    bias: np.ndarray,
    epsilon: float,
    bound: np.ndarray,
    unit: np.ndarray,
    *,
    input_scale: np.ndarray | float = 1.0,
    output_scale: float = 1.0,
) -> Norm:
  """Folds batch norm to center, scale and constant.

  In training, batch norm computes

      (input_scale * acc - mean) * scale / sqrt(var + epsilon) + bias,

  and the result is divided by output_scale. That is (acc - center) * slope with

      slope = scale / sqrt(var + epsilon) * input_scale / output_scale
      center = mean / input_scale - bias / output_scale / slope.

  `center` is rounded to a multiple of `tick`, the smallest power of two for which
  |acc - center| is at most 2^23 ticks. If tick <= unit, every accumulator is a multiple
  of `tick`, too. Therefore acc - center is an integer of at most 24 bits times `tick`,
  and float32 holds it exactly.

  Where this is not possible or has no effect, the result is flat: the scale is 0, and
  the constant is the bias. This is so if

  - the slope is 0, or slope * tick, the smallest y other than 0, is below
    `quantizers.SMALLEST`
  - the center is too large for float32, or so large that tick > unit
  - accumulators are floats, and slope * acc is lost when it is added to the bias.

  If input_scale is 0, the result does not depend on the accumulator and is flat, too.

  Args:
    mean: Mean of batch norm, (channels,).
    var: Variance of batch norm, (channels,).
    scale: Scale of batch norm, (channels,).
    bias: Bias of batch norm, (channels,).
    epsilon: Summand of the variance.
    bound: Largest magnitude of an accumulator, (channels,).
    unit: Power of two of which accumulators are multiples, (channels,), or 0 for
      accumulators that are floats. For floats `center` is not rounded to ticks, and
      acc - center need not be exact. Accumulators with a bound of more than 2^22 units,
      which 4 and 5 bits can reach, are treated as floats.
    input_scale: Factor of the accumulator in training, () or (channels,).
    output_scale: Divisor of the output, positive.

  Returns:
    The folded batch norm, float32 (channels,) each.
  """
  mean, var, scale, bias, bound, unit = (
      np.asarray(a, np.float64) for a in (mean, var, scale, bias, bound, unit))
  slope, mean, bias = _rescaled(
      scale / np.sqrt(var + epsilon), mean, bias, input_scale, output_scale)
  # With a larger bound, acc - center is not exact for every center within the range.
  unit = np.where(bound > 2.0 ** 22 * unit, 0.0, unit)
  with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
    center = np.where(slope == 0, 0.0, mean - bias / slope)
    # If both are multiples of `tick`, acc - center needs 24 bits at most.
    tick = np.exp2(np.ceil(np.log2(np.maximum(np.abs(center) + bound, unit))) - 23)
    rounded = np.where(unit > 0, np.round(center / tick) * tick, center)
    flat = (_vanishes(slope, np.where(unit > 0, tick, 1.0))
            | _is_too_large(rounded, tick, unit)
            | (unit == 0) & _is_lost(slope * (bound + np.abs(mean)), bias))
    # A packed network cannot hold a smaller center. The sign is kept, because it
    # decides the sign of y for an accumulator of 0, which is common.
    rounded = np.where((unit == 0) & (np.abs(rounded) < LEAST_CENTER),
                       np.sign(rounded) * LEAST_CENTER, rounded)
  return Norm(
      center=np.where(flat, 0.0, _without_denormals(rounded)).astype(np.float32),
      scale=np.where(flat, 0.0, slope).astype(np.float32),
      constant=np.where(flat, _without_denormals(bias), 0.0).astype(np.float32))


def _rescaled(
    slope: np.ndarray,
    mean: np.ndarray,
    bias: np.ndarray,
    input_scale: np.ndarray | float,
    output_scale: float,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """Takes the scales of input and output into slope, mean and bias.

  Before, y = ((input_scale * acc - mean) * slope + bias) / output_scale. The results
  are those for which y = (acc - mean) * slope + bias.
  """
  known = input_scale == 0  # The input of batch norm is 0 for every accumulator.
  return (slope * input_scale / output_scale,
          np.where(known, 0.0, mean / np.where(known, 1.0, input_scale)),
          np.where(known, bias - slope * mean, bias) / output_scale)


def _vanishes(slope: np.ndarray, tick: np.ndarray) -> np.ndarray:
  """Whether y is 0 for all accumulators, or would be denormal for some."""
  return (slope == 0) | (np.abs(slope) * tick < quantizers.SMALLEST)


def _is_too_large(
    center: np.ndarray, tick: np.ndarray, unit: np.ndarray
) -> np.ndarray:
  """Whether float32 does not hold the center, or acc - center is not exact."""
  return ~(np.abs(center) <= np.finfo(np.float32).max) | (unit > 0) & (tick > unit)


def _is_lost(product: np.ndarray, bias: np.ndarray) -> np.ndarray:
  """Whether `bias` in float32 stays the same if `product` or less is added to it."""
  return np.abs(product) * 2.0 ** 24 <= np.abs(bias)


class FoldedLayer(NamedTuple):
  """A layer that `fold_layers` has folded.

  Attributes:
    call: Call of the layer in the traced network.
    name: Path of the layer, with the iterations of enclosing loops: "block/conv[2]".
    variables: Trained variables of the layer, {"params", "batch_stats"}.
    rows: Rows of the probe at the input.
    output_rows: Rows of the probe at the output.
  """

  call: structure.Call
  name: str
  variables: Any
  rows: fold_probe.Rows
  output_rows: fold_probe.Rows


class Folded(NamedTuple):
  """The result of `fold_layers`.

  Attributes:
    hard: Variables of the hard network, see `fold`.
    layers: Layers in the order of their calls.
  """

  hard: dict[str, Any]
  layers: list[FoldedLayer]


def trace(model: Any, variables: Any, probe: Probe) -> structure.Network:
  """Traces a network for `fold`, which takes most of the time of folding.

  Args:
    model: As for `fold`.
    variables: As for `fold`. Only their shapes matter.
    probe: As for `fold`. Only its shape matters.

  Raises:
    ValueError: The network cannot be traced; the message names the layer.
  """
  return structure.trace(model, variables, fold_probe.make_rows(probe), "fold")


def fold(
    model: Any, variables: Any, probe: Probe, network: structure.Network | None = None
) -> dict[str, Any]:
  """Returns the variables of the hard network, for model.apply with mode="hard".

  Args:
    model: Flax module made of minw's layers. Around them it may use nn.jit, nn.remat
      and nn.scan (with "hard" among its variable_axes). It may have parameters of its
      own, as `minw.affine` describes.
    variables: Trained variables {"params": ..., "batch_stats": ...}, on any device.
    probe: Probe of the input images, each field (height, width, channels).
    network: What `trace` has returned, for a network that is folded repeatedly.

  Returns:
    {"hard": tree of float32 NumPy arrays}: for each layer its `kernel`, or the fields
    of its `Norm`. Where the network has parameters of its own, also {"params": tree}
    with their neutral values.

  Raises:
    ValueError: A variable is not finite, which a grid would hide. Or a scale or a
      parameter of the network itself does not fold, or a layer is called twice and
      would need two hard versions. The message names the layer or variable.
  """
  return fold_layers(model, variables, probe, network).hard


def fold_layers(
    model: Any, variables: Any, probe: Probe, network: structure.Network | None = None
) -> Folded:
  """Folds a network like `fold`, and also describes each of its layers.

  Args:
    model: As for `fold`.
    variables: As for `fold`.
    probe: As for `fold`.
    network: As for `fold`.

  Raises:
    ValueError: The network does not fold; see `fold`.
  """
  variables = jax.device_get(
      {name: variables.get(name, {}) for name in ("params", "batch_stats")})
  for path, leaf in jax.tree_util.tree_leaves_with_path(variables):
    if not np.isfinite(leaf).all():
      raise ValueError(f"{jax.tree_util.keystr(path)} is not finite")
  network = network or trace(model, variables, probe)
  rows = fold_probe.make_rows(probe)
  folding = _Folding(network.calls)
  parameters = [
      affine.Parameter("/".join(str(key.key) for key in path), leaf, np.size(leaf))
      for path, leaf in jax.tree_util.tree_leaves_with_path(variables)]
  with _computing_on_the_host():
    results = structure.evaluate(
        network.jaxpr, [*parameters, affine.Activation(rows)], folding.apply)
  output, made = jax.tree.unflatten(network.output, results)
  for leaf in jax.tree.leaves(
      output, is_leaf=lambda x: isinstance(x, affine.Activation)):
    affine.check_folded(leaf, "the output")
    leaf = affine.value_of(leaf)
    if (jnp.shape(leaf)[:1] == (fold_probe.NUM_ROWS,)
        and (fold_probe.scale_of(leaf) != 1).any()):
      raise ValueError("the network's output has a scale: a NormQuant must follow it")
  hard = {"hard": _without_unit_scales(made.get("hard", {}))}
  own = {p.path: np.full_like(p.value, folding.neutral.get(p.path, p.value))
         for p in parameters
         if p.path.startswith("params/") and p.path not in folding.used}
  return Folded(hard | _nested(own), folding.layers)


def _computing_on_the_host() -> ContextManager:
  """Context in which JAX computes on the host, so that it waits for no other device."""
  try:
    return jax.default_device(jax.local_devices(backend="cpu")[0])
  except RuntimeError:  # JAX_PLATFORMS leaves the host out.
    return contextlib.nullcontext()


def _check_cast(eqn, x, layers):
  """Raises `ValueError` for a narrowing cast of numbers that have a scale.

  The hard network leaves out the scale. Such a cast would round the numbers of the
  trained network differently from the levels of the hard network.
  """
  dtype = eqn.outvars[0].aval.dtype
  wide = dtype in (np.float32, np.float64) and eqn.primitive.name != "reduce_precision"
  if (isinstance(x, affine.Activation) and not wide
      and jnp.shape(x.rows)[:1] == (fold_probe.NUM_ROWS,)  # Not summed over images.
      and fold_probe.has_scale(x.rows)):
    raise structure.refusal(
        f"{layers[-1].name}: after it, numbers that have a scale are cast to"
        f" {np.dtype(dtype).name}")


class _Folding:
  """Folds the layers of a traced network, one after the other.

  Attributes:
    layers: Layers that have been folded.
    used: Paths of the parameters that belong to layers.
    neutral: Neutral values of the network's own parameters, by path.
  """

  def __init__(self, calls: list[structure.Call]):
    self.layers: list[FoldedLayer] = []
    self.used: set[str] = set()
    self.neutral: dict[str, float] = {}
    self._calls = calls
    self._made: dict[str, list[np.ndarray]] = {}  # Hard variables, by layer's name.

  def apply(self, eqn: Any, given: list[Any], where: str) -> list[Any]:
    """Returns the results of an equation; see `structure.evaluate`."""
    if eqn.primitive is not structure.layer_p:
      if eqn.primitive.name in affine.CASTS:
        _check_cast(eqn, given[0], self.layers)
      return affine.apply(eqn, given, self.neutral)
    call = self._calls[eqn.params["index"]]
    name = call.name(where)
    x, shortcut, variables = call.split(given)
    for operand in (x, shortcut):
      if not isinstance(operand, affine.Activation | None):
        raise structure.refusal(f"{name}: its input does not depend on the image")
    affine.check_folded(shortcut, f"the shortcut of {name}")
    if "batch_stats" not in variables or not variables["batch_stats"]:
      affine.check_folded(x, name)
    leaves = jax.tree.leaves(variables)
    self.used |= {leaf.path for leaf in leaves
                  if isinstance(leaf, affine.Parameter) and leaf.pure}
    variables = jax.tree.map(affine.value_of, variables)
    try:
      rows, hard = call.layer.apply(
          variables | {"affine": {"factor": x.factor, "summand": x.summand}}, x.rows,
          1.0, "fold", **{} if shortcut is None else {"shortcut": shortcut.rows},
          mutable=["hard"])
    except ValueError as error:
      raise ValueError(f"{name}: {error}") from error
    self.layers.append(FoldedLayer(call, name, variables, x.rows, rows))
    hard = {"shortcut_scale": np.ones(rows.shape[-1:], np.float32), **hard["hard"]}
    leaves = [np.asarray(hard[key]) for key in eqn.params["results"]]
    self._check_again(name, leaves)
    return [affine.Activation(rows), *leaves]

  def _check_again(self, name, leaves):
    """Checks that further calls of a layer give the same variables, bit for bit."""
    before = self._made.setdefault(name, leaves)
    if before is not leaves and any(
        a.tobytes() != b.tobytes() for a, b in zip(before, leaves)):
      raise structure.refusal(
          f"{name}: is called more than once, with inputs that need different hard"
          " networks (another bound, unit or scale); use one layer for each call")


def _without_unit_scales(tree):
  """Returns a tree of hard variables without shortcut scales that are all 1."""
  return {
      key: _without_unit_scales(value) if isinstance(value, dict) else value
      for key, value in tree.items()
      if key != "shortcut_scale" or isinstance(value, dict) or (value != 1).any()}


def _nested(leaves):
  """Returns the tree of leaves that are given by path, such as "params/block/shift"."""
  tree = {}
  for path, leaf in leaves.items():
    *parents, name = path.split("/")
    node = tree
    for parent in parents:
      node = node.setdefault(parent, {})
    node[name] = leaf
  return tree
