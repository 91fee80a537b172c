"""Learning-rate and alpha schedules, stated as fractions of the run.

A schedule is a function of the step, traced or not; a short run is the long one scaled.
"""

import collections
from typing import Any, Callable, Sequence

import jax
import jax.numpy as jnp
import optax

ALPHA_SHAPES = ("linear", "cosine", "cubic", "step")
LEARNING_RATE_SCHEDULES = ("exponential", "staircase", "steps", "constant")

Schedule = Callable[[Any], Any]  # From an integer step to a float32 array.


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
    kind: "constant"; "exponential": continuous decay; "staircase": the same decay in
      equal stairs; "steps": a factor at given points.
    initial: the learning rate at step 0.
    num_steps: of the run.
    decay: the factor over the whole run, or at each of `steps`.
    stairs: how many stairs a "staircase" has.
    steps: where the "steps" are, as fractions of the run.
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
    # In a short run several may fall on one step.
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
  """alpha of an estimator as a function of the step.

  Args:
    shape: "linear", "cosine" (slow at both ends), "cubic" (slow at first; StoMPP's) or
      "step" (all at `end`).
    start: the value at step 0.
    final: the value from `end` on.
    end: when `final` is reached, as a fraction of the run.
    num_steps: of the run.
    depth: if given, that many layers are annealed one after another, each in an equal
      share of the time, from the input on (the order of StoMPP, arXiv 2601.22660).
    backward: from the output on instead: StoMPP's control, which it reports to fail.

  Returns:
    A function of the step to float32 () or (depth,).
  """
  if shape not in ALPHA_SHAPES:
    raise ValueError(f"shape={shape!r}: must be one of {', '.join(ALPHA_SHAPES)}")
  layers = 1 if depth is None else depth

  def schedule(step):
    # max: with end = 0 every step, the first included, is past the end.
    done = jnp.asarray(step, jnp.float32) + float(end == 0)
    progress = done / max(end * num_steps, 1)
    done = progress * layers
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
    # Exactly `final` in the end: rounding would leave networks almost hard.
    return jnp.where(done >= 1, final, start + (final - start) * done)

  return schedule
