"""Variables of networks as after training, drawn at random."""

from typing import Any, Callable

import flax.linen as nn
import jax
import numpy as np

from minw import layers

Draw = Callable[[np.random.Generator, tuple[int, ...]], Any]

DRAWS: dict[str, Draw] = {
    "kernel": lambda rng, n: rng.normal(0, 0.5, n),
    "mean": lambda rng, n: rng.normal(0, 2, n),
    "var": lambda rng, n: rng.uniform(1, 40, n),
    "scale": lambda rng, n: rng.normal(0, 1, n),
    "bias": lambda rng, n: rng.normal(0, 0.5, n)}


def variables_of(model: nn.Module, shape: tuple[int, ...], seed: int = 0,
                 **draws: Draw) -> Any:
  """Draws the parameters and the statistics of a network.

  Args:
    model: The network.
    shape: Shape of its images.
    seed: Seed of the generator.
    **draws: Functions of a generator and a shape, by the name of an array. They come
      before those of `DRAWS`; `other` is for arrays of all other names.

  Returns:
    The variables, in float32.
  """
  rng, draws = np.random.default_rng(seed), DRAWS | draws
  shapes = jax.eval_shape(lambda: layers.initialize(model, shape))
  shapes = {kind: shapes[kind] for kind in ("params", "batch_stats") if kind in shapes}

  def draw(path, leaf):
    name = path[-1].key
    return np.asarray(draws[name if name in draws else "other"](rng, leaf.shape),
                      np.float32)

  return jax.tree_util.tree_map_with_path(draw, shapes)
