"""Schedules of the learning rate and of alpha, defined by fractions of the run.

A schedule is a function of the step, which may be traced. A shorter run uses the same
schedule, scaled in time.
"""

import collections
import math
from typing import Any, Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
import optax

ALPHA_WEIGHTS = ("with", "before", "after")
ALPHA_SHAPES = ("linear", "cosine", "cubic", "sigmoid", "step")
LEARNING_RATE_SCHEDULES = ("exponential", "staircase", "steps", "constant", "linear",
                           "cosine", "one_cycle")

_STEEPNESS = 10  # That of a sigmoid, as in PARQ.

Schedule = Callable[[Any], Any]  # A function from an integer step to a float32 array.


def learning_rate(
    kind: str,
    initial: float,
    num_steps: int,
    *,
    decay: float,
    stairs: int,
    steps: Sequence[float],
    warmup: float = 0.0,
) -> Schedule:
  """The learning rate as a function of the step.

  Args:
    kind: "constant", "exponential" for continuous decay, "staircase" for the same decay
      in equal stairs, "steps" for a factor at given points, "linear" or "cosine" for a
      fall to 0 at the end of the run (Loshchilov and Hutter, arXiv 1608.03983, without
      restarts), or "one_cycle" for a rise and a fall along cosines (Smith and Topin,
      arXiv 1708.07120): from `initial` / 25 to `initial` in the warm-up, and then to
      `initial` / 250,000.
    initial: Learning rate after the warm-up, which is the largest one.
    num_steps: Number of steps of the run.
    decay: Factor from the end of the warm-up to the end of the run. With "steps" it is
      the factor at each of `steps`. "linear", "cosine" and "one_cycle" ignore it.
    stairs: Number of stairs of a "staircase".
    steps: Positions of the "steps", as fractions of the run. None is in the warm-up.
    warmup: Length of the warm-up, as a fraction of the run. The learning rate rises
      linearly from 0, except with "one_cycle". The schedule takes the rest of the run.

  Returns:
    Function from the step to the learning rate.

  Raises:
    ValueError: `kind` is none of these.
  """
  warm = round(warmup * num_steps)
  rest = max(num_steps - warm, 1)
  if kind == "constant":
    schedule = optax.constant_schedule(initial)
  elif kind == "exponential":
    schedule = optax.exponential_decay(initial, rest, decay)
  elif kind == "staircase":
    schedule = optax.exponential_decay(
        initial, rest / stairs,  # type: ignore (optax divides by it)
        decay ** (1 / stairs), staircase=True)
  elif kind == "steps":
    # In a short run, several of them may fall on the same training step.
    drops = collections.Counter(
        max(round(fraction * num_steps) - warm, 0) for fraction in steps)
    schedule = optax.piecewise_constant_schedule(
        initial, {step: decay**count for step, count in drops.items()})
  elif kind == "linear":
    schedule = optax.linear_schedule(initial, 0.0, rest)
  elif kind == "cosine":
    schedule = optax.cosine_decay_schedule(initial, rest)
  elif kind == "one_cycle":
    # A warm-up of no or all steps would leave one of the two parts without a step.
    top = min(max(warm, 1), num_steps - 1)
    # Optax rounds the product of fraction and steps down.
    schedule = optax.cosine_onecycle_schedule(
        num_steps, initial, (top + 0.5) / num_steps)
  else:
    raise ValueError(
        f"kind={kind!r}: must be one of {', '.join(LEARNING_RATE_SCHEDULES)}")
  if warm and kind != "one_cycle":
    schedule = optax.join_schedules(
        [optax.linear_schedule(0.0, initial, warm), schedule], [warm])

  def at(step: Any) -> Any:
    with jax.numpy_dtype_promotion("standard"):  # Optax divides the integer step.
      return schedule(step)

  return at


def alpha(
    shape: str,
    start: float,
    final: float,
    end: float,
    num_steps: int,
    *,
    depth: int | None = None,
    backward: bool = False,
    at_once: bool = False,
    weights: str = "with",
) -> Schedule:
  """The alpha of an estimator as a function of the step.

  Args:
    shape: "linear", "cosine" (slow at both ends), "cubic" (slow at first, as in
      StoMPP), "sigmoid" (slower at both ends than a cosine, as in PARQ) or "step" (a
      single jump at `end`).
    start: Value at step 0.
    final: Value from `end` on.
    end: Time at which `final` is reached, as a fraction of the run.
    num_steps: Number of steps of the run.
    depth: Number of layers that are annealed one after another, starting at the input,
      each in an equal share of the time. This is the order of StoMPP (arXiv
      2601.22660). If None, all layers have the same alpha.
    backward: Whether layers are annealed from the output instead. StoMPP uses this as a
      control and reports that it fails.
    at_once: Whether all layers are annealed at the same time after all.
    weights: Whether weights are annealed "with" the activations, or in the half of the
      time "before" or "after" that of the activations. The last two need `depth`.

  Returns:
    Function from the step to float32 (), or (depth,) if `depth` is given, or (2 depth,)
    if weights are annealed before or after activations. These are the alphas of the
    weights of all layers, followed by those of the activations.

  Raises:
    ValueError: `shape` or `weights` is none of these.
  """
  if shape not in ALPHA_SHAPES:
    raise ValueError(f"shape={shape!r}: must be one of {', '.join(ALPHA_SHAPES)}")
  if weights not in ALPHA_WEIGHTS:
    raise ValueError(f"weights={weights!r}: must be one of {', '.join(ALPHA_WEIGHTS)}")
  order, parts = _order(depth, backward, at_once, weights)

  def schedule(step):
    # With end = 0, every step is past the end: the added 1 makes the progress at least
    # 1 from step 0 on. `max` avoids a division by 0.
    done = jnp.asarray(step, jnp.float32) + float(end == 0)
    progress = done / max(end * num_steps, 1)
    # `progress * parts` counts the parts of the time that have passed. Less the part in
    # which a layer is annealed, it is the progress of this layer, after clipping to
    # [0, 1].
    done = jnp.clip(progress * parts - order, 0.0, 1.0)
    if shape == "cosine":
      done = (1 - jnp.cos(jnp.pi * done)) / 2
    elif shape == "cubic":
      done = done**3
    elif shape == "sigmoid":
      ends = math.tanh(_STEEPNESS / 4)
      rising = (1 + jnp.tanh(_STEEPNESS / 2 * (done - 0.5)) / ends) / 2
      done = jnp.where(done > 0, rising, 0.0)  # Rounding would start beside 0.
    elif shape == "step":
      done = jnp.floor(done)
    # In the end alpha is exactly `final`. Rounding would leave networks almost hard.
    return jnp.where(done >= 1, final, start + (final - start) * done)

  return schedule


def _order(
    depth: int | None, backward: bool, at_once: bool, weights: str
) -> tuple[np.ndarray, int]:
  """The part of the time in which each alpha grows, and the number of parts."""
  if depth is None:
    return np.zeros((), np.float32), 1
  parts = 1 if at_once else depth
  order = np.zeros(depth, np.float32) if at_once else np.arange(
      depth, dtype=np.float32)[::-1 if backward else 1]
  if weights == "with":
    return order, parts
  first, second = order, order + np.float32(parts)
  if weights == "after":
    first, second = second, first
  return np.concatenate([first, second]), 2 * parts
