"""Histograms of what training computes with: the paper's Figs 1 to 4.

They count mixed weights and activations, alpha h(x) + (1 - alpha) x with AQE (Eq 18,
19), of the layers and after the epochs that a config chooses.
"""

from typing import Any, Callable

import jax
import jax.numpy as jnp
import numpy as np

from minw import layers
from minw.experiment import Experiment

# Bins 0.01 wide around -1, -0.99, ..., 1. All that is counted is in [-1, 1], and 0 and
# the levels +-1/4, +-1/2, +-1 are in the middle of a bin, where rounding cannot move
# them to the next.
CENTRES = np.linspace(-1, 1, 201)
_BINS = len(CENTRES)


def make_histograms(experiment: Experiment) -> Callable[..., list[dict[str, Any]]]:
  """f(variables, data, alpha): histograms of the layers that the config names.

  `variables` are {"params", "batch_stats"}, the running statistics count; `data` is a
  split, of which the first evaluation batch is taken; `alpha` is the estimator's. The
  result has for each layer a dict of

    layer: its path.
    kind: "weights", or "activations" of a batch norm's quantizer.
    alpha: the layer's.
    counts: of the bins around `CENTRES`.
  """
  patterns = experiment.config.histogram_layers

  @experiment.jit
  def count(variables, data, start, alpha):
    images, _, mask = experiment.data.eval_inputs(data, start)
    _, sown = experiment.model.apply(
        variables, images, alpha, mode="mixed", mutable=["quantized", "distance"],
        rngs={"estimator": jax.random.key(0)})
    result = {}
    for layer in experiment.layers:
      if any(layers.matches(pattern, layer.path) for pattern in patterns):
        found = sown["quantized"]
        for name in (*layer.path.split("/"), "value"):
          found = found.get(name, {})
        for x, its_alpha in found:  # None of a layer in a float format.
          of_images = mask.reshape(-1, *(1,) * (x.ndim - 1))
          counted = of_images if layer.kind == "norm" else True
          result[layer.path] = _counts(x, jnp.broadcast_to(counted, x.shape)), its_alpha
    return result

  def histograms(variables, data, alpha):
    batches: Any = experiment.data.eval_batches(data)
    counted = jax.device_get(count(variables, *next(batches), alpha))
    batches.close()
    kinds = {layer.path: layer.kind for layer in experiment.layers}
    return [{"layer": path,
             "kind": "activations" if kinds[path] == "norm" else "weights",
             "alpha": float(counted[path][1]), "counts": counted[path][0].tolist()}
            for path in kinds if path in counted]  # In the order of their calls.

  return histograms


def _counts(x: jax.Array, mask: jax.Array) -> jax.Array:
  bins = jnp.clip(jnp.round(x.astype(jnp.float32) * 100) + 100, 0, _BINS - 1)
  return jnp.bincount(bins.astype(jnp.int32).ravel(), mask.astype(jnp.int32).ravel(),
                      length=_BINS)
