"""minw.schedules: against values worked out by hand and closed forms in float64."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from minw import schedules

STEPS = 35_000  # 200 epochs of 175 batches of 256.


def values(schedule, steps):
  return np.array([schedule(step) for step in steps])


def default_alpha(**changes):
  arguments = dict(shape="linear", start=0.5, final=1.0, end=0.465, num_steps=STEPS)
  return schedules.alpha(**arguments | changes)


def learning_rate(kind, num_steps=STEPS, **changes):
  arguments = dict(initial=0.01, decay=0.9**35, stairs=35, steps=(0.5, 0.75))
  return schedules.learning_rate(
      kind, num_steps=num_steps, **arguments | changes)


def test_alpha_of_the_paper():
  alpha = default_alpha()
  epochs = np.array([0, 1, 5, 25, 55, 92])
  # From 0.5 to 1 in 93 epochs: 0.00538 each.
  np.testing.assert_allclose(
      values(alpha, 175 * epochs),
      [0.5, 0.50537634, 0.52688172, 0.63440860, 0.79569892, 0.99462366], rtol=1e-6)
  # As read off the histograms of Figs 1, 2.
  for epoch, low, high in ((5, 0.51, 0.53), (25, 0.627, 0.635), (55, 0.79, 0.80)):
    assert low <= alpha(175 * epoch) <= high


@pytest.mark.parametrize("shape", schedules.ALPHA_SHAPES)
@pytest.mark.parametrize("start, final", [(0.5, 1.0), (0.0, 0.7), (0.9, 0.3)])
def test_alpha_is_exactly_final_from_its_end_on(shape, start, final):
  alpha = default_alpha(shape=shape, start=start, final=final)
  end = 16_275  # 0.465 of the run: the last step of epoch 93, and one.
  for step in (end, end + 1, STEPS - 1, STEPS):
    assert float(alpha(step)) == np.float32(final)
  # A cosine is flat there: it takes more than a step to be seen.
  before = end - (1 if shape == "linear" else 300)
  assert abs(float(alpha(before)) - final) > 1e-5
  assert float(alpha(0)) == np.float32(start)


def test_cosine_is_slow_at_both_ends():
  alpha = schedules.alpha("cosine", 0.2, 1.0, 0.5, 80)
  expected = [0.2, 0.2 + 0.8 * 0.1464466, 0.6, 0.2 + 0.8 * 0.8535534, 1.0, 1.0]
  np.testing.assert_allclose(
      values(alpha, (0, 10, 20, 30, 40, 79)), expected, rtol=1e-6)


def test_sigmoid_of_parq():
  """1 less PARQ's inverse slope, which its public code computes as below."""
  alpha = schedules.alpha("sigmoid", 0.0, 1.0, 0.5, 80)
  sigmoid = lambda t: 1 / (1 + math.exp(10 * (t - 0.5)))
  want = [1 - (sigmoid(step / 40) - sigmoid(1)) / (sigmoid(0) - sigmoid(1))
          for step in range(40)]
  np.testing.assert_allclose(values(alpha, range(40)), want, rtol=1e-5, atol=1e-6)


def test_a_step_is_made_at_the_end():
  alpha = schedules.alpha("step", 0.25, 1.0, 0.5, 80)
  assert values(alpha, (0, 39, 40, 79)).tolist() == [0.25, 0.25, 1, 1]
  alpha = schedules.alpha("step", 0.0, 1.0, 0.5, 80, depth=2)
  assert values(alpha, (19, 20, 39, 40)).tolist() == [[0, 0], [1, 0], [1, 0], [1, 1]]


@pytest.mark.parametrize("shape, fifth", [
    ("linear", 0.28), ("cosine", 0.2381966), ("cubic", 0.2032)])
def test_layers_are_annealed_one_after_another(shape, fifth):
  # Four layers in the first half of 80 steps: ten steps each, from 0.2 to 0.6.
  alpha = schedules.alpha(shape, 0.2, 0.6, 0.5, 80, depth=4)
  back = schedules.alpha(shape, 0.2, 0.6, 0.5, 80, depth=4, backward=True)
  for step, expected in (
      (0, (0.2, 0.2, 0.2, 0.2)),
      (5, (0.4, 0.2, 0.2, 0.2) if shape != "cubic" else (0.25, 0.2, 0.2, 0.2)),
      (10, (0.6, 0.2, 0.2, 0.2)),
      (20, (0.6, 0.6, 0.2, 0.2)),
      (30, (0.6, 0.6, 0.6, 0.2)),
      (40, (0.6, 0.6, 0.6, 0.6)),
      (79, (0.6, 0.6, 0.6, 0.6))):
    assert alpha(step).shape == (4,)
    np.testing.assert_allclose(alpha(step), expected, rtol=1e-6)
    np.testing.assert_array_equal(back(step), alpha(step)[::-1])
  # A fifth of its way: 0.2 + 0.4 / 5, 0.2 + 0.2 (1 - cos(pi / 5)), 0.2 + 0.4 / 125.
  np.testing.assert_allclose(alpha(12), (0.6, fifth, 0.2, 0.2), rtol=1e-6)
  assert (np.asarray(alpha(40)) == np.float32(0.6)).all()


# Alphas of the weights of two layers and of their activations after 10, 20 and 30 of
# the 40 steps of annealing from 0 to 1, where each alpha grows for a time of its own.
ORDERS = {
    ("together", "with"): ([.25, .25], [.5, .5], [.75, .75]),
    ("together", "before"): ([.5, .5, 0, 0], [1, 1, 0, 0], [1, 1, .5, .5]),
    ("together", "after"): ([0, 0, .5, .5], [0, 0, 1, 1], [.5, .5, 1, 1]),
    ("forward", "with"): ([.5, 0], [1, 0], [1, .5]),
    ("forward", "before"): ([1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0]),
    ("forward", "after"): ([0, 0, 1, 0], [0, 0, 1, 1], [1, 0, 1, 1]),
    ("backward", "with"): ([0, .5], [0, 1], [.5, 1]),
    ("backward", "before"): ([0, 1, 0, 0], [1, 1, 0, 0], [1, 1, 0, 1]),
    ("backward", "after"): ([0, 0, 0, 1], [0, 0, 1, 1], [0, 1, 1, 1]),
}
# The shapes at a quarter, a half and three quarters of their way. The sigmoid is
# 1/2 + tanh(5/4) / tanh(5/2) / 2 at the last of these.
SHAPES = {
    "linear": (.25, .5, .75), "cosine": (.14644661, .5, .85355339),
    "cubic": (.015625, .125, .421875), "sigmoid": (.0701037, .5, .9298963)}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("order, weights", ORDERS)
def test_order_shape_and_synchronization(order, weights, shape):
  alpha = schedules.alpha(
      shape, 0.0, 1.0, 0.5, 80, depth=2, backward=order == "backward",
      at_once=order == "together", weights=weights)
  of = dict(zip((0, .25, .5, .75, 1), (0, *SHAPES[shape], 1)))
  for step, expected in zip((10, 20, 30), ORDERS[order, weights]):
    np.testing.assert_allclose(
        alpha(step), [of[value] for value in expected], rtol=1e-5, atol=1e-6)
  count = 2 if weights == "with" else 4
  assert alpha(0).tolist() == [0] * count and alpha(40).tolist() == [1] * count


def test_unknown_synchronization():
  with pytest.raises(ValueError, match="weights='first': must be one of with, before"):
    schedules.alpha("linear", 0.0, 1.0, 0.5, 80, depth=2, weights="first")


def test_one_layer_is_the_global_schedule():
  one = default_alpha(depth=1)
  for step in (0, 7, 9_999, 16_274, 16_275):
    assert one(step).tolist() == [float(default_alpha()(step))]


@pytest.mark.parametrize("shape", schedules.ALPHA_SHAPES)
@pytest.mark.parametrize("depth", [None, 3])
def test_an_end_at_once(shape, depth):
  alpha = schedules.alpha(shape, 0.5, 0.75, 0.0, 100, depth=depth)
  for step in (0, 1, 99):
    np.testing.assert_array_equal(
        alpha(step), np.full(() if depth is None else depth, 0.75, np.float32))


def test_an_end_within_the_first_step():
  alpha = schedules.alpha("linear", 0.5, 0.75, 0.001, 100)
  assert [float(alpha(step)) for step in (0, 1, 2)] == [0.5, 0.75, 0.75]


@pytest.mark.parametrize("shape", schedules.ALPHA_SHAPES)
@pytest.mark.parametrize("depth", [None, 7])
def test_alpha_never_falls(shape, depth):
  alpha = schedules.alpha(shape, 0.5, 1.0, 0.6, 1_001, depth=depth)
  steps = jnp.arange(1_001)
  rows = np.asarray(jax.vmap(alpha)(steps)).reshape(1_001, -1)
  assert (np.diff(rows, axis=0) >= 0).all()
  assert (rows[0] == 0.5).all() and (rows[601:] == 1.0).all()
  assert (rows[599] < 1.0).any()
  # A layer moves only when all those before it are done.
  assert (np.diff(rows, axis=1) <= 0).all()
  moving = (rows > 0.5) & (rows < 1.0)
  assert (moving.sum(axis=1) <= 1).all()


@pytest.mark.parametrize("shape", schedules.ALPHA_SHAPES)
def test_a_short_run_is_the_long_one_scaled(shape):
  long, short = default_alpha(shape=shape), default_alpha(shape=shape, num_steps=350)
  for step in (0, 1, 50, 100, 163, 200):
    np.testing.assert_allclose(short(step), long(100 * step), rtol=1e-6)
  for kind in schedules.LEARNING_RATE_SCHEDULES:
    for warmup in (0.02, 0.1, 0.38) if kind == "one_cycle" else (0.0, 0.1, 0.38):
      long, short = (
          learning_rate(kind, num_steps, warmup=warmup, steps=(0.5, 0.75))
          for num_steps in (STEPS, 350))
      for step in (0, 9, 10, 35, 174, 175, 349):
        np.testing.assert_allclose(short(step), long(100 * step), rtol=3e-5, atol=1e-9)


SCHEDULES = {
    "linear": default_alpha(),
    "cosine": default_alpha(shape="cosine"),
    "step": default_alpha(shape="step"),
    "by layer": default_alpha(depth=5),
    **{f"rate, {kind}": learning_rate(kind, warmup=0.1)
       for kind in schedules.LEARNING_RATE_SCHEDULES},
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_traced_is_untraced(name):
  schedule = SCHEDULES[name]
  traced = jax.jit(schedule)
  for step in (0, 1, 999, 1_000, 3_255, 16_274, 16_275, 17_500, 34_999):
    result = traced(jnp.int32(step))
    assert result.dtype == jnp.float32
    assert result.shape == ((5,) if name == "by layer" else ())
    np.testing.assert_allclose(result, schedule(step), rtol=3e-7, atol=2e-9)
    if step >= 16_275 and name in ("linear", "cosine", "step", "by layer"):
      assert (np.asarray(result) == 1.0).all()


def test_stairs_of_the_public_code():
  # 0.9 every 1000 steps.
  rate = learning_rate("staircase")
  for stair in range(35):
    for step in (1_000 * stair, 1_000 * stair + 999):
      np.testing.assert_allclose(rate(step), 0.01 * 0.9**stair, rtol=2e-6)
  np.testing.assert_allclose(rate(34_999), 2.781283946e-4, rtol=2e-6)


def test_stairs_that_the_run_does_not_divide_by():
  rate = learning_rate("staircase", num_steps=10, initial=1.0, decay=1 / 8, stairs=3)
  np.testing.assert_allclose(
      values(rate, range(10)), [1, 1, 1, 1, 0.5, 0.5, 0.5, 0.25, 0.25, 0.25],
      rtol=1e-6)


def test_exponential_decay():
  rate = learning_rate("exponential", num_steps=1_000, initial=0.02, decay=0.01)
  np.testing.assert_allclose(
      values(rate, (0, 1, 250, 500, 1_000)),
      [0.02, 0.02 * math.exp(math.log(0.01) / 1_000), 0.02 * 0.01**0.25, 0.002, 0.0002],
      rtol=1e-5)


def test_steps():
  # ResNet-110 of He et al.: 0.1, divided by 10 at 32k and 48k of 64k.
  rate = learning_rate(
      "steps", num_steps=64_000, initial=0.1, decay=0.1, steps=(0.5, 0.75))
  np.testing.assert_allclose(
      values(rate, (0, 31_999, 32_000, 47_999, 48_000, 63_999)),
      [0.1, 0.1, 0.01, 0.01, 0.001, 0.001], rtol=1e-6)
  assert float(learning_rate("steps", steps=())(STEPS - 1)) == np.float32(0.01)


def test_steps_that_coincide_all_count():
  # 0.5 is the second of 4 steps, and so is 0.6.
  rate = learning_rate("steps", num_steps=4, initial=1.0, decay=0.5, steps=(0.5, 0.6))
  np.testing.assert_allclose(values(rate, range(4)), [1, 1, 0.25, 0.25], rtol=1e-6)


def test_constant():
  assert values(learning_rate("constant"), (0, 1, STEPS)).tolist() == [0.01] * 3


def test_linear_and_cosine_end_at_zero():
  linear, cosine = (learning_rate(kind, num_steps=100, initial=0.2)
                    for kind in ("linear", "cosine"))
  steps = (0, 10, 50, 75, 100)
  np.testing.assert_allclose(
      values(linear, steps), [0.2, 0.18, 0.1, 0.05, 0.0], rtol=1e-6)
  np.testing.assert_allclose(
      values(cosine, steps),
      [0.1 * (1 + math.cos(math.pi * step / 100)) for step in steps], rtol=1e-6,
      atol=1e-8)


@pytest.mark.parametrize("kind, rest", [
    ("constant", lambda t: 1.0),
    ("exponential", lambda t: 0.25**t),
    ("staircase", lambda t: 0.5 ** math.floor(2 * t + 1e-9)),
    ("steps", lambda t: 0.25 ** ((t >= 0.375 - 1e-9) + (t >= 0.6875 - 1e-9))),
    ("linear", lambda t: 1 - t),
    ("cosine", lambda t: (1 + math.cos(math.pi * t)) / 2),
])
def test_warm_up(kind, rest):
  """After the warm-up, the schedule takes the rest, t from 0 to 1, of the run."""
  rate = learning_rate(kind, num_steps=100, initial=0.4, decay=0.25, stairs=2,
                       warmup=0.2)
  np.testing.assert_allclose(
      values(rate, (0, 1, 10, 19)), [0.0, 0.02, 0.2, 0.38], rtol=1e-6)
  steps = range(20, 100)
  np.testing.assert_allclose(
      values(rate, steps), [0.4 * rest((step - 20) / 80) for step in steps], rtol=2e-6,
      atol=2e-8)


@pytest.mark.parametrize("warmup, num_steps, top", [
    (0.3, 100, 30), (0.29, 100, 29), (0.57, 100, 57), (0.001, 100, 1), (0.999, 10, 9)])
def test_one_cycle(warmup, num_steps, top):
  """As fast.ai and PyTorch have it: 1/25 at first, 1/250,000 in the end."""
  rate = learning_rate("one_cycle", num_steps=num_steps, initial=0.5, warmup=warmup)
  at = lambda t: (1 - math.cos(math.pi * t)) / 2  # Rises from 0 to 1.
  want = [0.02 + 0.48 * at(step / top) if step < top else
          0.5 + (2e-6 - 0.5) * at((step - top) / (num_steps - top))
          for step in range(num_steps + 1)]
  np.testing.assert_allclose(
      values(rate, range(num_steps + 1)), want, rtol=1e-5, atol=1e-7)


def test_unknown_names():
  with pytest.raises(
      ValueError, match="shape='square': must be one of linear, cosine, cubic"):
    default_alpha(shape="square")
  with pytest.raises(ValueError, match="kind='square': must be one of exponential, "):
    learning_rate("square")
