"""Trained variables -> the hard network's, the one that is evaluated and deployed.

Batch norm in float32 is not one function: eager, jit and NumPy contract and fuse it
differently, and codes next to a threshold flip. The hard network therefore computes

    y = (acc - center) * scale + constant                       (`apply_norm`)

with variables made here, once, on the host in float64, such that the product is the
only rounding: accumulators are integer multiples of a power of two, `center` is rounded
to the finest multiple for which `acc - center` is exact (so that y has the sign of
batch norm, or is 0 where batch norm is that near to it), and `constant` is 0 unless
`scale` is. Eager, jit and NumPy then give the same bits on every backend. Weights are
put on their grid here too, as the mean magnitude in their thresholds also depends on
the order of its sum.

The hard network has levels only. Scales, of weights or of learned steps, are folded
into the batch norm that follows, as are parameters that a network itself adds to sums
or multiplies them with (`minw.affine`); where that cannot be, `fold` refuses.
"""

from typing import Any, NamedTuple, Sequence

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

LEAST_CENTER = 2.0 ** -40  # By the rules of docs/format.md.


class Norm(NamedTuple):
  """Batch norm of the hard network: float32 (channels,) each."""

  center: Any
  scale: Any
  constant: Any


class Rprelu(NamedTuple):
  """The activation of ReActNet, see `layers.NormQuant`: float32 (channels,) each."""

  gamma: Any
  beta: Any
  zeta: Any


def apply_norm(acc: jax.Array, norm: Norm) -> jax.Array:
  """The hard network's batch norm: float32 (..., channels) -> the same."""
  # Where XLA sees a constant of 0 it may fuse the product into the next addition.
  norm = Norm(*(lax.broadcast_to_rank(value, acc.ndim)
                for value in lax.optimization_barrier(tuple(norm))))
  return (acc - norm.center) * norm.scale + norm.constant


def apply_rprelu(y: jax.Array, rprelu: Rprelu) -> jax.Array:
  """ReActNet's activation, float32 (..., channels) -> the same; beta is at least 0."""
  below = y - rprelu.gamma
  # A product that feeds a sum directly may be fused with it, and rounded once.
  product = lax.optimization_barrier(below * rprelu.beta)
  return jnp.where(below > 0, below, product) + rprelu.zeta


def fold_rprelu(rprelu: Rprelu, output_scale: float = 1.0) -> Rprelu:
  """The hard network's activation.

  Args:
    rprelu: The trained parameters.
    output_scale: As for `fold_norm`: input and output are divided by that.
  """
  gamma, beta, zeta = (np.asarray(field, np.float64) for field in rprelu)
  return Rprelu(*(
      _without_denormals(field).astype(np.float32)
      for field in (gamma / output_scale, np.abs(beta), zeta / output_scale)))


def fold_kernel(
    kernel: np.ndarray,
    bits: int | str,
    *,
    rule: str = "layer_mean",
    thresholds: Sequence[float] = (),
    step: float | None = None,
) -> np.ndarray:
  """Weights on their grid, with the thresholds of `quantizers.weight_grid` in float64.

  Args:
    kernel: float (..., output channels).
    bits: a grid's bits or a float format.
    rule, thresholds: see `quantizers.weight_grid`.
    step: if it is learned; thresholds are in units of it then, and there is no rule.

  Returns:
    float32 of the shape of `kernel`.
  """
  if not quantizers.is_grid(bits) or isinstance(bits, str):
    return np.asarray(quantizers.round_to(jnp.asarray(kernel), str(bits)))
  kernel = _without_denormals(np.asarray(kernel, np.float64))
  if step is not None:
    kernel = _without_denormals(kernel / np.float64(step))
    in_units: Any = quantizers.unit_thresholds(bits, thresholds)
    rule, thresholds = "fixed", in_units
  magnitudes = quantizers.level_magnitudes(bits)
  if bits == 1:
    return np.where(kernel > 0, magnitudes[0], -magnitudes[0])
  factors = quantizers.weight_factors(bits, rule, thresholds)
  axes = tuple(range(kernel.ndim - 1)) if rule == "channel_mean" else None
  unit = 1.0 if rule == "fixed" else np.abs(kernel).mean(axes)
  code = sum((np.abs(kernel) > factor * unit).astype(np.int8) for factor in factors)
  levels = np.concatenate([np.zeros(1, np.float32), magnitudes])[code]
  return np.where(kernel < 0, -levels, levels) + np.float32(0)  # no -0


def _without_denormals(x):
  """`x` with 0, never -0, in place of magnitudes below `quantizers.SMALLEST`."""
  return np.where(np.abs(x) < quantizers.SMALLEST, 0.0, x)


def kernel_scale(
    kernel: np.ndarray, bits: int | str, weight_scale: str, step: float | None = None
) -> np.ndarray:
  """What levels of a kernel are multiplied by in training: float64 () or (channels,).

  Args:
    kernel: float (..., output channels).
    bits: a grid's bits, or a float format, which has no scale.
    weight_scale: see `estimators.WEIGHT_SCALES`.
    step: if it is learned.
  """
  scale: Any = np.float64(1.0 if step is None else step)
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
  """Batch norm as center, scale and constant.

  Args:
    mean, var, scale, bias: (channels,), batch norm's.
    epsilon: batch norm's.
    bound: (channels,) the largest magnitude of an accumulator.
    unit: (channels,) the power of two of which accumulators are multiples, or 0 where
      they are floats (then no rounding of `center` is needed, or exactness claimed).
      A bound over 2^22 units, which 4 and 5 bits can reach, counts as floats too.
    input_scale: () or (channels,): batch norm's input in training is that times the
      accumulator.
    output_scale: positive: its output is to be divided by that.
  """
  mean, var, scale, bias, bound, unit = (
      np.asarray(a, np.float64) for a in (mean, var, scale, bias, bound, unit))
  slope = scale / np.sqrt(var + epsilon)
  known = input_scale == 0  # Then the input is 0, whatever the accumulator.
  bias = np.where(known, bias - slope * mean, bias) / output_scale
  mean = np.where(known, 0.0, mean / np.where(known, 1.0, input_scale))
  slope = slope * input_scale / output_scale
  # With more units no center in the range leaves acc - center exact: floats.
  unit = np.where(bound > 2.0 ** 22 * unit, 0.0, unit)
  with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
    center = np.where(slope == 0, 0.0, mean - bias / slope)
    # acc - center needs 24 bits at most if both are multiples of `tick`.
    tick = np.exp2(np.ceil(np.log2(np.maximum(np.abs(center) + bound, unit))) - 23)
    rounded = np.where(unit > 0, np.round(center / tick) * tick, center)
    smallest = np.where(unit > 0, np.abs(slope) * tick, np.abs(slope))
    flat = (
        (slope == 0) | (smallest < quantizers.SMALLEST)
        | ~(np.abs(rounded) <= np.finfo(np.float32).max)
        | ((unit > 0) & (tick > unit))
        # Floats: what the accumulator adds is lost in the rounding of the bias.
        | ((unit == 0) & (
            np.abs(slope) * (bound + np.abs(mean)) * 2.0 ** 24 <= np.abs(bias))))
    # A packed network holds no smaller one. Its sign counts: an accumulator of 0 is
    # common.
    rounded = np.where((unit == 0) & (np.abs(rounded) < LEAST_CENTER),
                       np.sign(rounded) * LEAST_CENTER, rounded)
  return Norm(
      center=np.where(flat, 0.0, _without_denormals(rounded)).astype(np.float32),
      scale=np.where(flat, 0.0, slope).astype(np.float32),
      constant=np.where(flat, _without_denormals(bias), 0.0).astype(np.float32))


class FoldedLayer(NamedTuple):
  """A layer as `fold_layers` met it.

  Attributes:
    call: Its call.
    name: Its path, with the iterations of loops around it: "block/conv[2]".
    variables: Its trained variables, {"params", "batch_stats"}.
    rows, output_rows: The probe before and after it.
  """

  call: structure.Call
  name: str
  variables: Any
  rows: jax.Array
  output_rows: jax.Array


class Folded(NamedTuple):
  """What `fold_layers` returns.

  Attributes:
    hard: The hard network's variables, see `fold`.
    layers: Its layers, in the order of their calls.
  """

  hard: dict[str, Any]
  layers: list[FoldedLayer]


def fold(model: Any, variables: Any, probe: Probe) -> dict[str, Any]:
  """The hard network's variables, to be applied with mode="hard".

  Args:
    model: a Flax module made of minw's layers. Around these it may use nn.jit, nn.remat
      and nn.scan (with "hard" among its variable_axes), and parameters of its own as
      `minw.affine` describes.
    variables: {"params": ..., "batch_stats": ...}, on any device.
    probe: of the input images, each field (height, width, channels).

  Returns:
    {"hard": tree of float32 NumPy arrays}: for each layer its `kernel`, or the fields
    of its `Norm`. Where the network has parameters of its own, also {"params": tree}
    with their neutral values.

  Raises:
    ValueError: a variable is not finite, which a grid would hide; a scale does not
      fold; a layer is called twice and would need two hard versions; a parameter of the
      network's own does not fold. The message names the layer or variable.
  """
  return fold_layers(model, variables, probe).hard


def fold_layers(model: Any, variables: Any, probe: Probe) -> Folded:
  """`fold`, with what is known of each layer."""
  variables = jax.device_get(
      {name: variables.get(name, {}) for name in ("params", "batch_stats")})
  for path, leaf in jax.tree_util.tree_leaves_with_path(variables):
    if not np.isfinite(leaf).all():
      raise ValueError(f"{jax.tree_util.keystr(path)} is not finite")
  rows = fold_probe.make_rows(probe)
  network = structure.trace(model, variables, rows, "fold")
  folding = _Folding(network.calls)
  parameters = [
      affine.Parameter("/".join(str(key.key) for key in path), leaf, np.size(leaf))
      for path, leaf in jax.tree_util.tree_leaves_with_path(variables)]
  results = structure.evaluate(
      network.jaxpr, [*parameters, affine.Activation(rows)], folding.apply)
  output, made = jax.tree.unflatten(network.output, results)
  for leaf in jax.tree.leaves(output,
                              is_leaf=lambda x: isinstance(x, affine.Activation)):
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


def _check_cast(eqn, x, layers):
  """Raises `ValueError` for a cast of numbers whose scale the hard network leaves out.

  It would round the trained network's numbers, and not the hard network's levels.
  """
  dtype = eqn.outvars[0].aval.dtype
  wide = dtype in (np.float32, np.float64) and eqn.primitive.name != "reduce_precision"
  if isinstance(x, affine.Activation) and not wide and fold_probe.has_scale(x.rows):
    raise structure.refusal(
        f"{layers[-1].name}: after it, numbers that have a scale are cast to"
        f" {np.dtype(dtype).name}")


class _Folding:
  """Folds the layers of a traced network, one after the other."""

  def __init__(self, calls: list[structure.Call]):
    self.layers: list[FoldedLayer] = []
    self.used: set[str] = set()  # Paths of parameters that are a layer's.
    self.neutral: dict[str, float] = {}
    self._calls = calls
    self._made: dict[str, list[np.ndarray]] = {}  # By the layer's name.

  def apply(self, eqn: Any, given: list[Any], where: str) -> list[Any]:
    """An equation's results, see `structure.evaluate`."""
    if eqn.primitive is not structure.layer_p:
      if eqn.primitive.name in affine.CASTS:
        _check_cast(eqn, given[0], self.layers)
      return affine.apply(eqn, given, self.neutral)
    call = self._calls[eqn.params["index"]]
    name = call.name(where)
    x, shortcut, variables = call.split(given)
    for operand in (x, shortcut):
      if not isinstance(operand, affine.Activation | None):
        raise structure.refusal(f"{name}: gets what does not depend on the image")
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
    """A layer that is called again must come to the same variables, bit for bit."""
    before = self._made.setdefault(name, leaves)
    if any(a.tobytes() != b.tobytes() for a, b in zip(before, leaves)):
      raise structure.refusal(
          f"{name}: is called more than once, with inputs that need different hard"
          " networks (another bound, unit or scale); give each call a layer of its own")


def _without_unit_scales(tree):
  """A tree of hard variables without the shortcuts' scales that are 1."""
  return {
      key: _without_unit_scales(value) if isinstance(value, dict) else value
      for key, value in tree.items()
      if key != "shortcut_scale" or isinstance(value, dict) or (value != 1).any()}


def _nested(leaves):
  """The tree of leaves by path: "params/block/shift"."""
  tree = {}
  for path, leaf in leaves.items():
    *parents, name = path.split("/")
    node = tree
    for parent in parents:
      node = node.setdefault(parent, {})
    node[name] = leaf
  return tree
