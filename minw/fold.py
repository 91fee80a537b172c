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
"""

from typing import Any, NamedTuple, Sequence

import jax
from jax import lax
import jax.numpy as jnp
import numpy as np

from minw import quantizers

_SMALLEST_NORMAL = 2.0 ** -126  # XLA flushes what is below to zero.


class Norm(NamedTuple):
  """Batch norm of the hard network: float32 (channels,) each."""

  center: np.ndarray
  scale: np.ndarray
  constant: np.ndarray


class Probe(NamedTuple):
  """What is known of an activation without data; rows of a batch of three.

  A network is probed by running it (mode="fold") on a batch of three "images", so
  that pooling, reshaping and concatenation carry the three along by themselves.

  Attributes:
    bound: (...) the largest magnitude there can be.
    unit: (...) a power of two of which all values are multiples; 0 if there is none.
    bits: (...) the bits of an operand: a grid's, a float format's, 16 for an image.
  """

  bound: jax.Array
  unit: jax.Array
  bits: jax.Array


def apply_norm(acc: jax.Array, norm: Norm) -> jax.Array:
  """The hard network's batch norm: float32 (..., channels) -> the same."""
  # Where XLA sees a constant of 0 it may fuse the product into the next addition.
  norm = Norm(*lax.optimization_barrier(tuple(norm)))
  return (acc - norm.center) * norm.scale + norm.constant


def fold_kernel(
    kernel: np.ndarray,
    bits: int | str,
    *,
    rule: str = "layer_mean",
    thresholds: Sequence[float] = (),
) -> np.ndarray:
  """Weights on their grid, with the thresholds of `quantizers.weight_grid` in float64.

  Args:
    kernel: float (..., output channels).
    bits: a grid's bits or a float format.
    rule, thresholds: see `quantizers.weight_grid`.

  Returns:
    float32 of the shape of `kernel`.
  """
  if not quantizers.is_grid(bits):
    return np.asarray(quantizers.round_to(jnp.asarray(kernel), bits))
  kernel = np.asarray(kernel, np.float64)
  magnitudes = quantizers.level_magnitudes(bits)
  if bits == 1:
    return np.where(kernel > 0, magnitudes[0], -magnitudes[0])
  factors = quantizers.weight_factors(bits, rule, thresholds)
  axes = tuple(range(kernel.ndim - 1)) if rule == "channel_mean" else None
  unit = 1.0 if rule == "fixed" else np.abs(kernel).mean(axes)
  code = sum((np.abs(kernel) > factor * unit).astype(np.int8) for factor in factors)
  levels = np.concatenate([np.zeros(1, np.float32), magnitudes])[code]
  return np.where(kernel < 0, -levels, levels) + np.float32(0)  # no -0


def fold_norm(
    mean: np.ndarray,
    var: np.ndarray,
    scale: np.ndarray,
    bias: np.ndarray,
    epsilon: float,
    bound: np.ndarray,
    unit: np.ndarray,
) -> Norm:
  """Batch norm as center, scale and constant.

  Args:
    mean, var, scale, bias: (channels,), batch norm's.
    epsilon: batch norm's.
    bound: (channels,) the largest magnitude of an accumulator.
    unit: (channels,) the power of two of which accumulators are multiples, or 0 where
      they are floats (then no rounding of `center` is needed, or exactness claimed).
      A bound over 2^22 units, which 4 and 5 bits can reach, counts as floats too.
  """
  mean, var, scale, bias, bound, unit = (
      np.asarray(a, np.float64) for a in (mean, var, scale, bias, bound, unit))
  slope = scale / np.sqrt(var + epsilon)
  # With more units no center in the range leaves acc - center exact: floats.
  unit = np.where(bound > 2.0 ** 22 * unit, 0.0, unit)
  with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
    center = np.where(slope == 0, 0.0, mean - bias / slope)
    # acc - center needs 24 bits at most if both are multiples of `tick`.
    tick = np.exp2(np.ceil(np.log2(np.maximum(np.abs(center) + bound, unit))) - 23)
    rounded = np.where(unit > 0, np.round(center / tick) * tick, center)
    smallest = np.where(unit > 0, np.abs(slope) * tick, np.abs(slope))
    flat = (
        (slope == 0) | (smallest < _SMALLEST_NORMAL)
        | ~(np.abs(rounded) <= np.finfo(np.float32).max)
        | ((unit > 0) & (tick > unit)))
  normal = lambda x: np.where(np.abs(x) < _SMALLEST_NORMAL, 0.0, x)  # Also no -0.
  return Norm(
      center=np.where(flat, 0.0, normal(rounded)).astype(np.float32),
      scale=np.where(flat, 0.0, slope).astype(np.float32),
      constant=np.where(flat, normal(bias), 0.0).astype(np.float32))


def probe_linear(
    x: jax.Array,
    kernel: np.ndarray,
    bits: int | str,
    pad_value: float,
    output_shape: Sequence[int],
) -> jax.Array:
  """What a convolution or dense layer makes of a `Probe`.

  Args:
    x: float32 (3, ..., input channels).
    kernel: (..., input channels, output channels), on its grid.
    bits: of the kernel.
    pad_value: of the convolution's border; 0 if it has none.
    output_shape: (..., output channels).

  Returns:
    float32 (3, *output_shape).
  """
  rows = np.asarray(x, np.float64).reshape(3, -1, x.shape[-1])
  bound = np.maximum(rows[0].max(0), abs(pad_value))
  fan_in = np.abs(kernel).reshape(-1, *kernel.shape[-2:]).sum(0, dtype=np.float64)
  unit = quantizers.step_size(bits) * rows[1].min()
  channels = np.stack([bound @ fan_in, np.full(kernel.shape[-1], unit),
                       np.full(kernel.shape[-1], 32.0)])
  channels = channels.reshape(3, *(1,) * (len(output_shape) - 1), -1)
  return jnp.asarray(np.broadcast_to(channels, (3, *output_shape)), jnp.float32)


def fold(model: Any, variables: Any, probe: Probe) -> dict[str, Any]:
  """The hard network's variables, to be applied with mode="hard".

  Args:
    model: a Flax module made of minw's layers.
    variables: {"params": ..., "batch_stats": ...}, on any device.
    probe: of the input images, each field (height, width, channels).

  Returns:
    {"hard": tree of float32 NumPy arrays}: for each layer its `kernel`, or the fields
    of its `Norm`.

  Raises:
    ValueError: a variable is not finite, which a grid would hide.
  """
  variables = jax.device_get(
      {name: variables[name] for name in ("params", "batch_stats")})
  for path, leaf in jax.tree_util.tree_leaves_with_path(variables):
    if not np.isfinite(leaf).all():
      raise ValueError(f"{jax.tree_util.keystr(path)} is not finite")
  _, hard = model.apply(
      variables, jnp.stack([jnp.asarray(row, jnp.float32) for row in probe]),
      mode="fold", mutable=["hard"])
  return jax.tree.map(np.asarray, hard)
