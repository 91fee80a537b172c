"""Schedules of the learning rate and of alpha, defined by fractions of the run.

A schedule is a function of the step, which may be traced. A shorter run uses the same
schedule, scaled in time.
"""

import collections
from typing import Any, Callable, Sequence

import jax
import jax.numpy as jnp
import optax

ALPHA_SHAPES = ("linear", "cosine", "cubic", "step")
LEARNING_RATE_SCHEDULES = ("exponential", "staircase", "steps", "constant")

Schedule = Callable[[Any], Any]  # A function from an integer step to a float32 array.


def learning_rate(
    kind: str,
    initial: float,
    num_steps: int,
    *,
    decay: float,
    stairs: int,
    steps: Sequence[float],
) -> Schedule:
  """The learning rate as a function of the step.

  Args:
    kind: "constant", "exponential" for continuous decay, "staircase" for the same decay
      in equal stairs, or "steps" for a factor at given points.
    initial: Learning rate at step 0.
    num_steps: Number of steps of the run.
    decay: Factor over the whole run. With "steps" it is the factor at each of `steps`.
    stairs: Number of stairs of a "staircase".
    steps: Positions of the "steps", as fractions of the run.

  Returns:
    Function from the step to the learning rate.

  Raises:
    ValueError: `kind` is none of these.
  """
  if kind == "constant":
    schedule = optax.constant_schedule(initial)
  elif kind == "exponential":
    schedule = optax.exponential_decay(initial, num_steps, decay)
  elif kind == "staircase":
    schedule = optax.exponential_decay(
        initial, num_steps / stairs,  # type: ignore (optax divides by it)
        decay ** (1 / stairs), staircase=True)
  elif kind == "steps":
    # In a short run, several of them may fall on the same training step.
    drops = collections.Counter(round(fraction * num_steps) for fraction in steps)
    schedule = optax.piecewise_constant_schedule(
        initial, {step: decay**count for step, count in drops.items()})
  else:
    raise ValueError(
        f"kind={kind!r}: must be one of {', '.join(LEARNING_RATE_SCHEDULES)}")

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
) -> Schedule:
  """The alpha of an estimator as a function of the step.

  Args:
    shape: "linear", "cosine" (slow at both ends), "cubic" (slow at first, as in StoMPP)
      or "step" (a single jump at `end`).
    start: Value at step 0.
    final: Value from `end` on.
    end: Time at which `final` is reached, as a fraction of the run.
    num_steps: Number of steps of the run.
    depth: Number of layers that are annealed one after another, starting at the input,
      each in an equal share of the time. This is the order of StoMPP (arXiv
      2601.22660). If None, all layers have the same alpha.
    backward: Whether layers are annealed from the output instead. StoMPP uses this as a
      control and reports that it fails.

  Returns:
    Function from the step to float32 (), or (depth,) if `depth` is given.

  Raises:
    ValueError: `shape` is none of these.
  """
  if shape not in ALPHA_SHAPES:
    raise ValueError(f"shape={shape!r}: must be one of {', '.join(ALPHA_SHAPES)}")
  layers = 1 if depth is None else depth

  def schedule(step):
    # With end = 0, every step is past the end: the added 1 makes the progress at least
    # 1 from step 0 on. `max` avoids a division by 0.
    done = jnp.asarray(step, jnp.float32) + float(end == 0)
    progress = done / max(end * num_steps, 1)
    done = progress * layers
    # `done` counts the layers whose share of the time has passed. Less the position of
    # a layer, it is the progress of this layer, after clipping to [0, 1].
    if depth is not None:
      order = jnp.arange(depth, dtype=jnp.float32)
      done = done - (order[::-1] if backward else order)
    done = jnp.clip(done, 0.0, 1.0)
    if shape == "cosine":
      done = (1 - jnp.cos(jnp.pi * done)) / 2
    elif shape == "cubic":
      done = done**3
    elif shape == "step":
      done = jnp.floor(done)
    # In the end alpha is exactly `final`. Rounding would leave networks almost hard.
    return jnp.where(done >= 1, final, start + (final - start) * done)

  return schedule
