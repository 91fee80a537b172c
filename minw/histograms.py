"""Histograms of weights and activations in training, as in the paper's Figs 1 to 4.

They count the outputs of the estimator. With AQE these are alpha h(x) + (1 - alpha) x
(Eq 18, 19). A config chooses the layers and the epochs.
"""

from typing import Any, Callable

import jax
import jax.numpy as jnp
import numpy as np

from minw import layers
from minw.experiment import Experiment

# Centers of the bins, -1, -0.99, ..., 1. A bin is 0.01 wide. All counted values are in
# [-1, 1]. The levels 0, +-1/4, +-1/2 and +-1 are in the middle of a bin, so that
# rounding cannot move them to the next bin.
CENTRES = np.linspace(-1, 1, 201)
_BINS = len(CENTRES)


def make_histograms(experiment: Experiment) -> Callable[..., list[dict[str, Any]]]:
  """Makes the function that counts the layers that the config names.

  Args:
    experiment: The experiment.

  Returns:
    A function histograms(variables, data, alpha). `variables` are {"params",
    "batch_stats"}, and batch norm uses the running statistics. `data` is a split, whose
    first evaluation batch is used. `alpha` is the estimator's. The result is a list
    with a dict for each layer:

      layer: Path of the layer.
      kind: "weights", or "activations" for the output of a batch norm's quantizer.
      alpha: The layer's alpha.
      counts: Counts of the bins around `CENTRES`.
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
        for x, its_alpha in found:  # A layer in a float format has sown nothing.
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
            for path in kinds if path in counted]  # `kinds` is in the order of calls.

  return histograms


def _counts(x: jax.Array, mask: jax.Array) -> jax.Array:
  bins = jnp.clip(jnp.round(x.astype(jnp.float32) * 100) + 100, 0, _BINS - 1)
  return jnp.bincount(bins.astype(jnp.int32).ravel(), mask.astype(jnp.int32).ravel(),
                      length=_BINS)
