"""Optimizers of the paper, and the clip of the latent weights."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from minw.schedules import Schedule


def optimizer(
    name: str,
    learning_rate: Schedule,
    *,
    adam_epsilon: float = 1e-8,
    momentum: float = 0.9,
    weight_decay: float = 0.0,
) -> optax.GradientTransformation:
  """Adam or SGD with momentum.

  Args:
    name: "adam" or "sgd".
    learning_rate: a function of the step.
    adam_epsilon: of Adam.
    momentum: of SGD.
    weight_decay: L2 penalty, added to the gradient of all kernels (parameters with two
      or more axes) as in He et al.; not decoupled.
  """
  if name == "adam":
    update = optax.adam(learning_rate, eps=adam_epsilon)
  elif name == "sgd":
    update = optax.sgd(learning_rate, momentum=momentum)
  else:
    raise ValueError(f"name={name!r}: must be adam or sgd")
  if not weight_decay:
    return update
  kernels = lambda params: jax.tree.map(lambda p: p.ndim > 1, params)
  return optax.chain(optax.add_decayed_weights(weight_decay, kernels), update)


def clip_kernels(params: Any, quantized: Any) -> Any:
  """Clips latent weights to [-1, 1] (Algorithm 1, step 2).

  Args:
    params: a tree of arrays.
    quantized: the same tree of bools, true for the kernels that are on a grid.
  """
  return jax.tree.map(
      lambda p, clip: jnp.clip(p, -1.0, 1.0) if clip else p, params, quantized)
