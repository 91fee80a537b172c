"""Comparison of the hard network with the trained network, layer by layer.

The trained network is called in mode "mixed" with alpha = 1. Each of its layers gets
the outputs of the hard network's layers before it. Therefore a code that falls on the
other side of a threshold affects a single layer. The outputs of a layer must be equal
up to rounding:

- Sums may differ by 1e-5 of the layer's largest sum, or by more if training computes
  in 16 bits. Channels with a weight that rounding moves to another level are left out.
  At most one weight in 1,000 may be of this kind.
- Batch norm and all operations after it are monotone in a channel's sum. The hard
  output must lie between the trained outputs for a slightly smaller and a slightly
  larger sum. The difference is 2^-20 of the largest number that enters the calculation
  (sum, mean, bias and threshold). Therefore a code may only differ if its sum is that
  close to a threshold.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from minw import fold
from minw import fold_probe
from minw import quantizers
from minw import structure
from minw.data import pixels as pixels_lib

_TOLERANCE = 1e-5  # Allowed error of sums and logits, relative to the largest one.
_NEAR = 2.0**-20  # Allowed relative error of sums before a quantizer; see above.
_FLIPPED_WEIGHTS = 1e-3  # Largest fraction of weights that rounding may move.


class Comparison(NamedTuple):
  """The differences between a hard network and the trained one.

  Attributes:
    problem: Message that names the first layer that differs by more than rounding, or
      None if there is no such layer.
    labels: Number of predicted labels that differ when each network runs by itself.
    images: Number of images that were compared.
  """

  problem: str | None
  labels: int
  images: int


def compare(
    model: Any,
    variables: Any,
    pixels: pixels_lib.Pixels,
    images: np.ndarray,
    batch_size: int = 64,
) -> Comparison:
  """Compares the hard network with the trained one.

  Args:
    model: Network, called as model(images, alpha, mode=mode).
    variables: Trained variables, {"params", "batch_stats"}.
    pixels: Normalization of the pixels.
    images: uint8 images (n, height, width, channels), of the size of the network's
      input.
    batch_size: Largest number of images that are compared at a time.

  Returns:
    The comparison.

  Raises:
    ValueError: The network does not fold.
  """
  variables = {name: variables.get(name, {}) for name in ("params", "batch_stats")}
  folded = fold.fold_layers(
      model, variables, pixels_lib.probe(pixels, images.shape[1:]))
  names = [layer.name for layer in folded.layers]
  totals: Any = 0
  labels = 0

  @jax.jit
  def run(variables, hard, images):
    return _compare_batch(
        model, folded, variables, hard, pixels_lib.normalize(images, pixels))

  batch_size = even_batch_size(len(images), batch_size)
  for start in range(0, len(images), batch_size):
    batch = images[start:start + batch_size]
    try:
      counts, differ = run(variables, folded.hard, batch)
    except _Different as error:
      return Comparison(str(error), 0, len(images))
    counts = np.asarray(counts, np.int64)
    totals = totals + counts
    labels += int(differ)
  names.append(f"after {names[-1]}" if names else "the network")
  for name, (count, size) in zip(names, totals, strict=True):
    if count:
      return Comparison(
          f"{name}: {count} of {size} values of the hard network differ from the"
          " trained network's on equal inputs, by more than rounding",
          labels, len(images))
  return Comparison(None, labels, len(images))


def even_batch_size(count: int, largest: int) -> int:
  """The size of as few batches as possible, all of which are equally large if they can.

  A last batch of another size would be compiled by itself.

  Args:
    count: Number of examples.
    largest: Largest allowed size.

  Returns:
    The size, for example 60 for 360 examples in batches of at most 64.
  """
  batches = max(math.ceil(count / largest), 1)
  return max(math.ceil(count / batches), 1)


class _Different(Exception):
  """The two networks consist of different layers."""


def _compare_batch(model, folded, variables, hard, images):
  """Compares the networks on a batch.

  Returns:
    For each layer, and at the end for the logits, the number of values that differ and
    the number of values. And the number of labels that differ.
  """
  outputs, logits = _hard_run(model, hard, images)
  network = structure.trace(model, variables, images, "mixed")
  counts = []

  def apply(eqn, given, where):
    if eqn.primitive is not structure.layer_p:
      return structure.apply_equation(eqn, given)
    call = network.calls[eqn.params["index"]]
    name, position = call.name(where), len(counts)
    expected = [key for key, *_ in outputs] + ["nothing"]
    if name != expected[position] or name != folded.layers[position].name:
      raise _Different(f"{name}: is called by the trained network where the hard one"
                       f" calls {expected[position]}")
    _, value, its_hard = outputs[position]
    scale = fold_probe.scale_of(folded.layers[position].output_rows)
    want = value * jnp.asarray(scale, jnp.float32)
    if want.shape != eqn.outvars[0].aval.shape:
      raise _Different(f"{name}: gives arrays of shape {eqn.outvars[0].aval.shape} in"
                       f" the trained network and {want.shape} in the hard one")
    compare_layer = _norm_differs if "batch_norm" in call.split(
        given)[2]["params"] else _sums_differ
    differs = compare_layer(call, given, its_hard, want)
    counts.append((differs.sum(), differs.size))
    return [want]

  result, = structure.evaluate(
      network.jaxpr, [*jax.tree.leaves(variables), images], apply)
  if len(counts) < len(outputs):
    raise _Different(f"{outputs[len(counts)][0]}: is called by the hard network alone")
  differs = _beyond(result, logits, logits, _TOLERANCE)
  trained = model.apply(
      variables, images, 1.0, mode="mixed", rngs={"estimator": jax.random.key(0)})
  labels = (trained.argmax(-1) != logits.argmax(-1)).sum()
  return [*counts, (differs.sum(), differs.size)], labels


def hard_outputs(model: Any, hard: Any, images: jax.Array) -> list[jax.Array]:
  """The outputs of the hard network's layers, in the order of their calls.

  Args:
    model: The network.
    hard: Variables of the hard network, from `fold.fold`.
    images: Normalized images, float32 (batch, height, width, channels).
  """
  return [value for _, value, _ in _hard_run(model, hard, images)[0]]


def _hard_run(model, hard, images):
  """Runs the hard network.

  Returns:
    Name, output and variables of each layer. And the output of the network.
  """
  network = structure.trace(model, hard, images, "hard")
  outputs = []

  def apply(eqn, given, where):
    if eqn.primitive is not structure.layer_p:
      return structure.apply_equation(eqn, given)
    call = network.calls[eqn.params["index"]]
    value = structure.apply_layer(call, given, "hard")
    outputs.append((call.name(where), value, call.split(given)[2]["hard"]))
    return [value]

  result, = structure.evaluate(
      network.jaxpr, [*jax.tree.leaves(hard), images], apply)
  return outputs, result


def _beyond(have, want, largest, tolerance):
  return jnp.abs(have - want) > tolerance * jnp.abs(largest).max()


def _mixed(call, operands, x):
  """A trained layer's output for `x`, and the variables that it sows."""
  given = [x, *operands[1:]]
  return structure.apply_layer(
      call, given, "mixed", mutable=["quantized"],
      rngs={"estimator": jax.random.key(0)})


def _sums_differ(call, operands, hard, want):
  out, sown = _mixed(call, operands, operands[0])
  tolerance = max(_TOLERANCE, 4 * float(jnp.finfo(call.layer.dtype).eps))
  differs = _beyond(out, want, want, tolerance)
  if not quantizers.is_grid(call.layer.bits):
    return differs
  (kernel, _), = sown["quantized"]["value"]
  params = call.split(operands)[2]["params"]
  step = quantizers.positive_step(params["step"]) if "step" in params else 1.0
  flipped = jnp.abs(kernel / step - hard["kernel"]) > 0.1 * quantizers.step_size(
      call.layer.bits)
  few = flipped.sum() <= max(1, int(_FLIPPED_WEIGHTS * flipped.size))
  channels = flipped.any(tuple(range(flipped.ndim - 1)))
  return differs & ~(few & channels)


def _norm_differs(call, operands, hard, want):
  x, shortcut, variables = call.split(operands)
  params, stats = variables["params"], variables["batch_stats"]["batch_norm"]
  norm = params["batch_norm"]
  scale = norm.get("scale", jnp.ones_like(norm["bias"]))
  slope = jnp.abs(scale) / jnp.sqrt(stats["var"] + call.layer.epsilon)
  # `size` is the magnitude of the numbers that slope * (sum - mean) is added to or
  # compared with. Division by the slope converts it to the units of sums.
  size = 2 + jnp.abs(norm["bias"])
  if shortcut is not None:
    size += jnp.abs(shortcut).max()
  if "step" in params:
    size += jnp.abs(params["step"])
  if "rprelu_beta" in params:
    beta = jnp.maximum(jnp.abs(params["rprelu_beta"]), _NEAR)
    size = (size + jnp.abs(params["rprelu_zeta"])) / jnp.minimum(beta, 1)
    size += jnp.abs(params["rprelu_gamma"])
  made_of = jnp.abs(x).max() + jnp.abs(stats["mean"]) + jnp.where(
      slope > 0, size / slope, 0)
  # If folding found a channel to be constant, any sum gives the same output as the
  # mean.
  constant = (hard["scale"] == 0) & (slope > 0)
  margin = jnp.maximum(
      _NEAR * made_of, jnp.where(constant, jnp.abs(x - stats["mean"]), 0))
  near = jnp.stack([
      _mixed(call, operands, at)[0] for at in (x, x - margin, x + margin)])
  slack = _TOLERANCE * jnp.abs(want).max()
  return (want < near.min(0) - slack) | (want > near.max(0) + slack)
