"""Estimators against closed forms, exact expectations and the paper's theorems.

Monte Carlo checks allow 5 sigma, which a correct estimator exceeds with probability
5.7e-7 a comparison; the keys are fixed, so that they never do so now and then.
"""

import functools
import itertools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest

from minw import estimators
from minw import quantizers

pytestmark = pytest.mark.usefixtures("strict")

ALPHAS = (0.0, 0.25, 0.5, 0.7, 1.0)
# Eq 18: 2 alpha; Algorithm 1: 1; Eq 15: 1 - alpha.
FACTORS = {
    "eq18": (0.0, 0.5, 1.0, 1.4, 2.0),
    "algorithm1": (1.0, 1.0, 1.0, 1.0, 1.0),
    "eq15": (1.0, 0.75, 0.5, 0.3, 0.0),
}
ONE, ABOVE = np.float32(1), np.nextafter(np.float32(1), np.float32(2))
X = np.array([-2, -ABOVE, -1, -0.9, -0.3, -0.05, 0, 0.05, 0.3, 0.9, 1, ABOVE, 2],
             np.float32)
MASK = np.array([0, 0, 1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0], np.float32)  # Eq 5.
# Eq 4, and Eq 21 and 22 with the thresholds 0.1 and (1/8, 3/8, 3/4).
HARD = {
    1: np.array([-1, -1, -1, -1, -1, -1, -1, 1, 1, 1, 1, 1, 1], np.float32),
    2: np.array([-1, -1, -1, -1, -1, 0, 0, 0, 1, 1, 1, 1, 1], np.float32),
    3: np.array([-1, -1, -1, -1, -.25, 0, 0, 0, .25, 1, 1, 1, 1], np.float32),
}
G = np.linspace(-3, 4.7, X.size).astype(np.float32)  # No cotangent is 0 or 1.


def pull(function, *arguments):
  """The value of `function` and its cotangents for the cotangent G."""
  value, pullback = jax.vjp(function, *arguments)
  return value, pullback(jnp.asarray(G, value.dtype))


def assert_zeros_like(got, arrays) -> None:
  assert jax.tree.structure(got) == jax.tree.structure(arrays)
  for zero, array in zip(jax.tree.leaves(got), jax.tree.leaves(arrays)):
    assert zero.shape == np.shape(array)
    np.testing.assert_array_equal(zero, np.zeros(np.shape(array)))


@pytest.mark.parametrize("bits", [1, 2, 3])
def test_ste(bits):
  grid = quantizers.grid(bits)
  y, (dx, dgrid) = jax.jit(functools.partial(pull, estimators.ste))(X, grid)
  np.testing.assert_array_equal(y, HARD[bits])
  np.testing.assert_array_equal(dx, G * MASK)
  assert_zeros_like(dgrid, grid)


@pytest.mark.parametrize("gradient", FACTORS)
def test_aqe(gradient):
  aqe = functools.partial(estimators.aqe, gradient=gradient)
  sweep = jax.jit(jax.vmap(functools.partial(pull, aqe), (None, 0, None)))
  for bits in (1, 3) if gradient == "eq18" else (2,):
    grid = quantizers.grid(bits)
    y, (dx, dalpha, dgrid) = sweep(X, np.array(ALPHAS, np.float32), grid)
    for i, (alpha, factor) in enumerate(zip(ALPHAS, FACTORS[gradient])):
      want = alpha * HARD[bits].astype(np.float64) + (1 - alpha) * X
      np.testing.assert_allclose(y[i], want, rtol=3e-7, atol=1e-7)
      np.testing.assert_allclose(dx[i], factor * G * MASK, rtol=3e-7)
    # The ends and the middle of the schedule are exact.
    np.testing.assert_array_equal(y[0], X)
    np.testing.assert_array_equal(y[-1], HARD[bits])
    if gradient == "eq18":
      np.testing.assert_array_equal(dx[2], G * MASK)
    assert_zeros_like(dalpha, np.array(ALPHAS))
    assert_zeros_like(dgrid, jax.tree.map(lambda a: np.stack([a] * 5), grid))


def test_aqe_takes_eq18_unless_told():
  grid = quantizers.grid(1)
  slope = jax.jit(jax.grad(estimators.aqe))
  assert slope(np.float32(0.5), np.float32(0.75), grid) == 1.5
  sample = jax.jit(jax.grad(estimators.stochastic_aqe))
  assert sample(np.float32(0.5), np.float32(0.75), jax.random.key(0)) == 1.5


def test_alpha_of_each_channel_and_plain_numbers():
  x = np.array([[0.5, 0.5, -0.5], [-1.5, 1.0, 0.25]], np.float32)
  alpha = np.array([[0, 0.5, 1]], np.float32)
  grid = quantizers.grid(1)
  y, pullback = jax.vjp(lambda x, alpha: estimators.aqe(x, alpha, grid), x, alpha)
  np.testing.assert_array_equal(y, [[0.5, 0.75, -1], [-1.5, 1, 1]])
  dx, dalpha = pullback(jnp.ones_like(y))
  np.testing.assert_array_equal(dx, [[0, 1, 2], [0, 1, 2]])
  assert_zeros_like(dalpha, alpha)
  np.testing.assert_array_equal(estimators.aqe(x, 1, grid),
                                [[1, 1, -1], [-1, 1, 1]])
  np.testing.assert_array_equal(estimators.aqe(x, 0, grid), x)
  # x + alpha (h - x) would give 0 here.
  far = np.array([[1e9, -1e9, 1e9]], np.float32)
  np.testing.assert_array_equal(estimators.aqe(far, 1, grid), [[1, -1, 1]])


def test_a_plain_number_is_quantized_and_differentiated():
  grid, key = quantizers.grid(1), jax.random.key(0)
  # Value and derivative at 0.25, of h(x) = 1 and alpha = 3/4.
  for function, value, slope in (
      (lambda x: estimators.ste(x, grid), 1.0, 1.0),
      (lambda x: estimators.aqe(x, 0.75, grid), 0.75 + 0.25 / 4, 1.5),
      (lambda x: estimators.lsq(x, 0.5, grid), 0.5, 1.0),
      (lambda x: estimators.stompp(x, 0.0, key, grid), 0.25, 1.0),
      (lambda x: estimators.stochastic_aqe(x, 0.0, key), 0.25, 0.0)):
    assert function(0.25) == value
    assert jax.grad(function)(0.25) == slope


@pytest.mark.parametrize("gradient", FACTORS)
def test_stochastic_aqe(gradient):
  key = jax.random.key(5)
  alphas = np.array(ALPHAS, np.float32)
  run = functools.partial(
      pull, lambda x, alpha: estimators.stochastic_aqe(
          x, alpha, key, gradient=gradient))
  y, (dx, dalpha) = jax.jit(jax.vmap(run, (None, 0)))(X, alphas)
  np.testing.assert_array_equal(y[0], X)
  # One key is one z: the same side for every alpha, 1 or -1, at |x| > 1 that of x.
  side = np.asarray(y[-1])
  np.testing.assert_array_equal(np.abs(side), 1)
  outside = MASK == 0
  np.testing.assert_array_equal(side[outside], np.sign(X[outside]))
  for i, (alpha, factor) in enumerate(zip(ALPHAS, FACTORS[gradient])):
    want = alpha * side.astype(np.float64) + (1 - alpha) * X
    np.testing.assert_allclose(y[i], want, rtol=3e-7, atol=1e-7)
    np.testing.assert_allclose(dx[i], factor * G * MASK, rtol=3e-7)
  assert_zeros_like(dalpha, alphas)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_dtype_is_kept_and_the_mixture_is_wide(dtype):
  with jax.enable_x64(dtype == "float64"):
    x = np.linspace(-1.25, 1.25, 101).astype(dtype)
    g = np.linspace(0.1, 1, 101).astype(dtype)
    grid = quantizers.grid(1)
    key = jax.random.key(0)
    functions = {
        "ste": lambda x: estimators.ste(x, grid),
        "aqe": lambda x: estimators.aqe(x, 0.7, grid),
        "stochastic_aqe": lambda x: estimators.stochastic_aqe(x, 0.7, key),
        "log_prob": lambda x: estimators.stochastic_neuron(x, key)[1],
        "neuron": lambda x: estimators.stochastic_neuron(x, key)[0],
    }

    @jax.jit
    def run(x, g):
      results = {}
      for name, function in functions.items():
        y, pullback = jax.vjp(function, x)
        results[name] = y, pullback(g)[0]
      return results

    results = jax.tree.map(np.asarray, run(x, g))
  for name, (y, dx) in results.items():
    assert y.dtype == dtype, name
    assert dx.dtype == dtype, name
  a = x.astype(np.float64)
  inside = np.abs(a) <= 1
  # In 16 bits, what is formed there differs in dozens of the last digits.
  tolerance = dict(float32=3e-7, float64=1e-15).get(dtype, 0)
  want = (0.7 * np.where(a > 0, 1, -1) + (1 - 0.7) * a).astype(dtype)
  slope = (1.4 * g.astype(np.float64) * inside).astype(dtype)
  np.testing.assert_allclose(results["aqe"][0].astype("f8"), want.astype("f8"),
                             rtol=tolerance, atol=tolerance)
  np.testing.assert_allclose(results["aqe"][1].astype("f8"), slope.astype("f8"),
                             rtol=tolerance)
  np.testing.assert_array_equal(results["ste"][1].astype("f8"), g * inside)


@pytest.mark.parametrize("name", [
    "aqe", "stochastic_aqe", "ewgs", *(
        pytest.param(slow, marks=pytest.mark.slow) for slow in (
            "ste", "approx_sign", "swish_sign", "ede", "reste", "dsq"))])
def test_transformations_change_nothing(name):
  x = np.stack([X, X / 3])
  key = jax.random.key(1)
  grid = quantizers.grid(1)
  # The key is split by row, so that a row's z is the same however rows are mapped.
  estimator = estimators.by_name(name)

  def row(x, key):
    return pull(lambda x: estimator(x, np.float32(0.7), grid, lambda: key), x)

  keys = jax.random.split(key)
  plain = [row(x[i], keys[i]) for i in range(2)]
  want = jax.tree.map(lambda *parts: np.stack(parts), *plain)
  mapped = jax.jit(jax.vmap(row))(x, keys)
  scanned = jax.jit(lambda x, keys: jax.lax.scan(
      lambda carry, args: (carry, row(*args)), None, (x, keys))[1])(x, keys)
  for got in (mapped, scanned):
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=3e-7), got, want)


def test_one_compilation_serves_the_schedule():
  traces = []

  @jax.jit
  def step(x, alpha, thresholds):
    traces.append(None)
    grid = quantizers.grid(2, thresholds)
    return jax.value_and_grad(lambda x: estimators.aqe(x, alpha, grid))(x)

  for alpha, threshold, value, slope in [
      (0.5, 0.25, 0.75, 1.0), (0.75, 0.25, 0.875, 1.5), (1.0, 0.5, 0.0, 2.0)]:
    got = step(np.float32(0.5), np.float32(alpha), np.array([threshold], np.float32))
    assert tuple(map(float, got)) == (value, slope)
  assert len(traces) == 1


@pytest.mark.parametrize("function", [
    lambda gradient: estimators.aqe(X, 0.5, quantizers.grid(1), gradient=gradient),
    lambda gradient: estimators.stochastic_aqe(X, 0.5, jax.random.key(0),
                                               gradient=gradient),
    lambda gradient: estimators.by_name("aqe", gradient=gradient),
], ids=["aqe", "stochastic_aqe", "by_name"])
def test_gradient_that_is_unknown(function):
  with pytest.raises(ValueError, match="gradient='eq5': must be one of eq18, algo"):
    function("eq5")


@pytest.mark.gpu
def test_theorem_1():
  """Eq 13: the stochastic forward's mean has slope 1; 2 alpha g has it at 1/2 only.

  Mean: sigma = alpha sqrt((1 - a^2) / n). Slope, as the difference over 2d with a
  common z: z falls between a - d and a + d with probability d and then adds alpha / d,
  so sigma = alpha sqrt((1 - d) / (d n)). 5 sigma, 24 comparisons: 1.4e-5 in all.
  """
  n, d = 2**17, 0.1
  centers = np.array([-0.8, -0.25, 0.0, 0.6])
  key = jax.random.key(11)

  @jax.jit
  def run(a, alpha):
    x = jnp.broadcast_to(a[:, None], (4, n))
    y = [estimators.stochastic_aqe(x + shift, alpha, key) for shift in (-d, 0, d)]
    coded = jax.grad(lambda x: estimators.stochastic_aqe(x, alpha, key).sum())(x)
    return [value.mean(axis=1) for value in y], coded[:, 0]

  for alpha in (0.25, 0.5, 1.0):
    (low, mean, high), coded = run(np.float32(centers), np.float32(alpha))
    # Sums of 2^17 float32 numbers below 2 in pairs: 1e-6, far below sigma.
    sigma = alpha * np.sqrt((1 - centers**2) / n)
    np.testing.assert_array_less(np.abs(mean - centers), 5 * sigma + 1e-6)
    slope = (np.asarray(high, np.float64) - low) / (2 * d)
    bound = 5 * alpha * np.sqrt((1 - d) / (d * n)) + 2e-5
    assert bound < 0.05
    np.testing.assert_array_less(np.abs(slope - 1), bound)
    np.testing.assert_array_equal(coded, 2 * alpha)
    if alpha == 0.5:
      np.testing.assert_array_less(np.abs(slope - coded), bound)
    else:  # Off by 1/2 and by 1.
      np.testing.assert_array_less(10 * bound, np.abs(slope - coded))


def test_noise_is_uniform_and_independent_of_its_neighbours():
  """h = 1 has probability (1 + a) / 2, and for two elements that of independence.

  sigma of a mean of n products of +-1 is at most 1 / sqrt(n).
  """
  n = 2**16
  for a in (0.0, 0.3):
    side = np.asarray(estimators.stochastic_aqe(
        np.full((n, 2), a, np.float32), 1.0, jax.random.key(2)), np.float64)
    assert set(np.unique(side)) == {-1, 1}
    assert abs((side[:, 0] * side[:, 1]).mean() - a * a) < 5 / np.sqrt(n)
    assert abs((side[:-1, 0] * side[1:, 0]).mean() - a * a) < 5 / np.sqrt(n)
  ends = np.array([[-1, 1]] * n, np.float32)
  np.testing.assert_array_equal(
      estimators.stochastic_aqe(ends, 1.0, jax.random.key(3)), ends)


def test_noise_is_finer_than_bfloat16():
  """A z on multiples of 2^-7, or a sigmoid of 8 bits, would miss P(h = 1) by > 2^-9.

  sigma of a mean of n numbers in {0, 1} is at most 1 / (2 sqrt(n)).
  """
  n = 2**21
  bound = 5 / (2 * np.sqrt(n))
  assert bound < 2**-9

  a, b = (np.full(n, value, ml_dtypes.bfloat16) for value in (2**-9, 2**-7))
  key = jax.random.key(9)
  # Not under jit, where XLA may skip the rounding of what is between.
  up = np.asarray(estimators.stochastic_aqe(a, 1.0, key)) > 0
  fired = np.asarray(estimators.stochastic_neuron(b, key)[0]) > 0
  assert abs(up.mean() - (0.5 + 2**-10)) < bound
  assert abs(fired.mean() - sigmoid(2.0**-7)) < bound


@jax.jit
def iterate(a, alpha, grid):
  """a(1), a(2), ..., a(30) of Theorem 3."""
  def step(a, _):
    return estimators.aqe(a, alpha, grid), a
  return jax.lax.scan(step, a, None, length=30)[1]


def test_theorem_3_for_one_bit():
  """Eq 17 with the starting term that its printed form drops."""
  start = np.array([-1, -0.7, -0.05, 0, 0.02, 0.4, 1], np.float32)
  side = np.array([-1, -1, -1, -1, 1, 1, 1])
  for alpha in (0.1, 0.3, 0.8):
    path = np.asarray(iterate(start, np.float32(alpha), quantizers.grid(1)))
    kept = (1 - alpha) ** np.arange(30)[:, None]
    np.testing.assert_allclose(path, side * (1 - kept) + kept * start, atol=1e-6)
    gap = np.abs(path[:5, 1:-1] - side[1:-1])  # Rate 1 - alpha.
    np.testing.assert_allclose(gap[1:] / gap[:-1], 1 - alpha, rtol=3e-4)


def test_theorem_3_for_more_bits():
  start = np.linspace(-1, 1, 81, dtype=np.float32)
  kept = 0.6 ** np.arange(30)[:, None]
  for bits, thresholds, levels in [(2, [0.1], [1]), (3, [1/8, 3/8, 3/4], [.25, .5, 1])]:
    passed = (np.abs(start)[:, None] > np.float32(thresholds)).sum(axis=1)
    level = np.sign(start) * np.array([0, *levels])[passed]
    path = iterate(start, np.float32(0.4), quantizers.grid(bits))
    np.testing.assert_allclose(path, (1 - kept) * level + kept * start, atol=1e-6)
  # The level 1/2 lies above the third threshold here: h(0.35) = 1/2 leads to 1.
  path = iterate(np.float32([0.25, 0.35]), np.float32(0.4),
                 quantizers.grid(3, [0.2, 0.3, 0.4]))
  np.testing.assert_allclose(path[1], [0.25, 0.41], rtol=1e-6)
  np.testing.assert_allclose(path[-1], [0.25, 1], rtol=1e-6)


def sigmoid(a):
  return 1 / (1 + np.exp(-np.asarray(a, np.result_type(a, np.float64))))


def test_stochastic_neuron():
  """P(h = 1) = sigmoid(a) within 5 sigma, and the gradient of log P is Eq 3's."""
  n = 2**17
  a = np.array([-3, -0.5, 0, 1, 8], np.float32)

  @jax.jit
  def run(x):
    def both(x):
      h, log_prob = estimators.stochastic_neuron(x, jax.random.key(4))
      return log_prob, h
    log_prob, pullback, h = jax.vjp(both, x, has_aux=True)
    blocked = jax.grad(lambda x: both(x)[1].sum())(x)
    return h, log_prob, pullback(jnp.ones_like(x))[0], blocked

  x = np.broadcast_to(a, (n, 5))
  h, log_prob, slope, blocked = map(np.asarray, run(x))
  assert set(np.unique(h)) == {0, 1}
  p = sigmoid(a)
  sigma = np.sqrt(p * (1 - p) / n)
  np.testing.assert_array_less(np.abs(h.mean(axis=0, dtype=np.float64) - p), 5 * sigma)
  # Two neurons fire independently: the covariance has sigma below 1 / (4 sqrt(n)).
  joint = (h[:, 1] * h[:, 2]).mean(dtype=np.float64)
  assert abs(joint - p[1] * p[2]) < 5 / (2 * np.sqrt(n))
  np.testing.assert_allclose(
      log_prob, np.log(np.where(h == 1, p, 1 - p)), rtol=2e-5)
  np.testing.assert_allclose(slope, h - p, rtol=1e-5, atol=1e-7)
  np.testing.assert_array_equal(blocked, np.zeros_like(x))


def test_score_function_is_unbiased_by_enumeration():
  """Both neurons' outcomes weighed exactly; the printed z > sigmoid(a) is biased."""
  a = np.array([0.8, -0.4])

  def loss(h0, h1, a0):  # Not linear in h, and dependent on a directly as well.
    return (h0 + 2 * h1 - 0.5) ** 3 + 0.7 * a0 * h0

  def probability(outcome, a, reverse=False):
    on = sigmoid(-a if reverse else a)
    return np.prod([p if h else 1 - p for h, p in zip(outcome, on)])

  outcomes = list(itertools.product([0, 1], repeat=2))

  def derivative(reverse):  # By complex steps, exact to rounding.
    def expected(a):
      return sum(probability(outcome, a, reverse) * loss(*outcome, a[0])
                 for outcome in outcomes)
    return np.array([expected(a + 1e-20j * unit).imag / 1e-20 for unit in np.eye(2)])

  @jax.jit
  @jax.vmap
  def sample(key):
    def surrogate(a):
      h, log_prob = estimators.stochastic_neuron(a, key)
      value = estimators.score_function_surrogate(loss(h[0], h[1], a[0]), log_prob)
      return value, h
    return jax.grad(surrogate, has_aux=True)(np.float32(a))

  gradients, fired = map(np.asarray, sample(jax.random.split(jax.random.key(6), 64)))
  of_outcome = {tuple(map(int, h)): g for h, g in zip(fired, gradients)}
  assert set(of_outcome) == set(outcomes)
  mean, printed = (
      sum(probability(outcome, a, reverse) * of_outcome[outcome].astype(np.float64)
          for outcome in outcomes) for reverse in (False, True))
  np.testing.assert_allclose(mean, derivative(False), rtol=1e-5)
  assert (np.abs(printed - derivative(True)) > 1).all()


def test_score_function_surrogate():
  loss = np.array([0.5, -2, 3], np.float32)
  log_prob = -np.arange(1, 13, dtype=np.float32).reshape(3, 2, 2)
  value, pullback = jax.vjp(estimators.score_function_surrogate, loss, log_prob)
  np.testing.assert_array_equal(value, loss)
  dloss, dlog_prob = pullback(np.array([1, 10, 100], np.float32))
  np.testing.assert_array_equal(dloss, [1, 10, 100])
  np.testing.assert_array_equal(
      dlog_prob, np.broadcast_to(np.float32([0.5, -20, 300])[:, None, None],
                                 (3, 2, 2)))
  # One loss of all neurons, and one neuron for each loss.
  value, pullback = jax.vjp(
      estimators.score_function_surrogate, np.float32(3), log_prob)
  assert value.shape == () and value == 3
  np.testing.assert_array_equal(pullback(np.float32(1))[1], np.full((3, 2, 2), 3))
  value, pullback = jax.vjp(
      estimators.score_function_surrogate, loss, log_prob[:, 0, 0])
  np.testing.assert_array_equal(value, loss)
  np.testing.assert_array_equal(pullback(np.ones(3, np.float32))[1], loss)


def test_by_name():
  assert estimators.network_estimators() == (
      "approx_sign", "aqe", "dsq", "ede", "ewgs", "lsq", "parq", "reste", "ste",
      "stochastic_aqe", "stompp", "stompp_ste", "swish_sign")
  for name in estimators.network_estimators():
    assert getattr(estimators, name).__name__ == name
  made = []

  def make_key():
    made.append(None)
    return jax.random.key(7)

  one, three = quantizers.grid(1), quantizers.grid(3)
  np.testing.assert_array_equal(
      estimators.by_name("ste")(X, 0.5, three, make_key), HARD[3])
  np.testing.assert_array_equal(
      estimators.by_name("aqe")(X, 1.0, three, make_key), HARD[3])
  for options, want in [({}, 1.5), ({"gradient": "eq15"}, 0.25)]:
    slope = jax.grad(lambda x, estimator=estimators.by_name("aqe", **options): (
        estimator(x, 0.75, one, make_key)))
    assert slope(np.float32(0.5)) == want
  assert not made
  got = estimators.by_name("stochastic_aqe", gradient="algorithm1")(
      X, 0.5, one, make_key)
  assert len(made) == 1
  np.testing.assert_array_equal(
      got, estimators.stochastic_aqe(X, 0.5, jax.random.key(7)))
  slope = jax.grad(lambda x: estimators.by_name(
      "stochastic_aqe", gradient="algorithm1")(x, 0.75, one, make_key))
  assert slope(np.float32(0.5)) == 1


def test_by_name_refuses():
  for name in ("STE", "stochastic_neuron", "score_function_surrogate", "by_name",
               "_aqe", "quantizers", ""):
    with pytest.raises(ValueError, match=f"estimator='{name}': must be one of appro"):
      estimators.by_name(name)
  for bits in (2, 3):
    with pytest.raises(ValueError, match="'stochastic_aqe' is defined for one bit"):
      estimators.by_name("stochastic_aqe")(
          X, 0.5, quantizers.grid(bits), lambda: jax.random.key(0))


# The smooth functions whose derivatives others take for that of the sign.


def bireal(x, alpha):
  inner = np.where(x < 0, 2 * x + x**2, 2 * x - x**2)
  return np.where(np.abs(x) > 1, np.sign(x), inner)


def sign_swish(x, alpha):
  sigmoid = 1 / (1 + np.exp(-5 * x))
  return 2 * sigmoid * (1 + 5 * x * (1 - sigmoid)) - 1


def irnet(x, alpha):
  t = 0.1 * 10 ** (alpha * np.log10(10 / 0.1))
  return max(1 / t, 1) * np.tanh(t * x)


def root(x, alpha):
  """The o-th root of |x|; near zero its chord, and flat from 1.5 on."""
  o, size = 1 + 2 * alpha, np.minimum(np.abs(x), 1.5)
  return np.sign(x) * np.where(size < 0.1, size * 0.1 ** (1 / o) / 0.1, size ** (1 / o))


def soft_staircase(x, alpha, levels=(-1, 1), thresholds=(0,)):
  a = 0.5 - 0.49 * alpha
  s, k = 1 / (1 - a), np.log(2 / a - 1)
  result = np.sign(x)
  for low, high, middle in zip(levels, levels[1:], thresholds):
    step = low + (high - low) / 2 * (
        1 + s * np.tanh(k * (x - middle) / (high - low)))
    result = np.where((low <= x) & (x <= high), step, result)
  return result


SMOOTH = {"approx_sign": bireal, "swish_sign": sign_swish, "ede": irnet, "reste": root,
          "dsq": soft_staircase}
# Between the kinks of all of them.
POINTS = np.array([-2.5, -1.3, -0.95, -0.6, -0.26, -0.12, -0.07, -0.01, 0.02, 0.09,
                   0.2, 0.45, 0.62, 0.93, 1.2, 1.9, 40.0])


def slopes(function, h=1e-6):
  return (function(POINTS + h) - function(POINTS - h)) / (2 * h)


@pytest.mark.parametrize("name", SMOOTH)
def test_slopes_are_of_the_published_functions(name):
  estimator = estimators.by_name(name)
  x = POINTS.astype(np.float32)
  grid = quantizers.grid(1)
  g = np.linspace(-2, 3, x.size).astype(np.float32)

  @jax.jit
  def run(alpha):
    y, pullback = jax.vjp(lambda x: estimator(x, alpha, grid, None), x)
    return y, pullback(g)[0]

  for alpha in (0.0, 0.3, 1.0):
    y, dx = run(np.float32(alpha))
    np.testing.assert_array_equal(y, np.where(x > 0, 1, -1))
    want = g * slopes(lambda x: SMOOTH[name](x, alpha))
    np.testing.assert_allclose(dx, want, rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize("bits, levels, thresholds", [
    (2, (-1, 0, 1), (-0.1, 0.1)),
    (3, (-1, -0.5, -0.25, 0, 0.25, 0.5, 1),
     (-0.75, -0.375, -0.125, 0.125, 0.375, 0.75))])
def test_soft_staircase_of_more_bits(bits, levels, thresholds):
  x = POINTS.astype(np.float32)
  for alpha in (0.0, 0.5, 1.0):
    y, pullback = jax.vjp(
        lambda x: estimators.dsq(x, alpha, quantizers.grid(bits)), x)
    np.testing.assert_array_equal(y, quantizers.quantize(x, quantizers.grid(bits)))
    want = slopes(lambda x: soft_staircase(x, alpha, levels, thresholds))
    np.testing.assert_allclose(
        pullback(np.ones_like(x))[0], np.where(np.abs(x) > 1, 0, want), rtol=5e-5,
        atol=1e-6)


def test_slopes_annealed():
  """Straight at first, a step in the end; reste and ede start as identity, tanh."""
  grid, x = quantizers.grid(1), np.float32([0.05, 0.5])
  slope = lambda f, alpha: jax.jit(jax.grad(lambda x: f(x, alpha, grid).sum()))(x)
  np.testing.assert_allclose(slope(estimators.reste, 0.0), [1, 1], rtol=1e-6)
  np.testing.assert_allclose(slope(estimators.ede, 0.0), [1, 1], rtol=3e-3)
  for f in (estimators.reste, estimators.ede, estimators.dsq):
    near, far = slope(f, 1.0)
    assert near > 2 > 0.7 > far


@pytest.mark.parametrize("bits", [1, 2, 3])
def test_ewgs(bits):
  grid = quantizers.grid(bits)
  for delta in (0.0, 1e-3, 0.2):
    y, (dx, dgrid) = pull(functools.partial(estimators.ewgs, delta=delta), X, grid)
    np.testing.assert_array_equal(y, HARD[bits])
    want = G * (1 + delta * np.sign(G) * (X - HARD[bits])) * MASK
    np.testing.assert_allclose(dx, want, rtol=1e-6)
    assert_zeros_like(dgrid, grid)


@pytest.mark.parametrize("name", estimators.network_estimators())
def test_of_one_bit_only(name):
  step = {"step": 1.0} if name == "lsq" else {}
  call = lambda: estimators.by_name(name)(
      X, 0.5, quantizers.grid(2), lambda: jax.random.key(0), **step)
  if name not in estimators.ONE_BIT:
    assert call().shape == X.shape
    return
  with pytest.raises(ValueError, match="one bit only"):
    call()


@pytest.mark.parametrize("bits, thresholds, q", [
    (1, [], 1), (2, [0.5], 1), (3, [1 / 8, 3 / 8, 3 / 4], 3)])
def test_lsq(bits, thresholds, q):
  unit = quantizers.unit_thresholds(bits)
  np.testing.assert_array_equal(unit, thresholds)
  levels = np.array([0, 1.0] if bits < 3 else [0, 0.25, 0.5, 1])
  for step, count in ((1.0, None), (0.3, None), (2.5, 4)):
    s, x = np.float64(np.float32(step)), np.float64(X)
    y = x / s
    size = 1 if bits == 1 else sum((np.abs(y) > t).astype(int) for t in thresholds)
    h = np.where(y > 0, 1, -1) * levels[size]
    inside = np.abs(y) <= 1
    got, (dx, ds, dgrid) = pull(
        lambda x, step, grid: estimators.lsq(x, step, grid, count=count),
        X, np.float32(step), quantizers.grid(bits, unit))
    np.testing.assert_allclose(got, s * h, rtol=1e-6)
    np.testing.assert_array_equal(dx, G * inside)
    slope = np.where(inside, h - y, np.sign(x))  # Eq 3 with q = 1, levels at most 1.
    want = (np.float64(G) * slope).sum() / np.sqrt((count or X.size) * q)
    np.testing.assert_allclose(ds, want, rtol=1e-5)
    assert ds.shape == ()
    assert_zeros_like(dgrid, quantizers.grid(bits, unit))
  again = [0.2] * len(thresholds)
  np.testing.assert_array_equal(quantizers.unit_thresholds(bits, again), again)


@pytest.mark.parametrize("bits", [2, 3])
def test_lsq_of_channels(bits):
  """An array of steps is a step for each channel, whose elements share it alone."""
  rng = np.random.default_rng(bits)
  x, g = (np.float32(rng.normal(size=(3, 4, 5))) for _ in range(2))
  steps = np.float32([0.1, 0.4, 1.0, 2.0, 0.7])
  grid = quantizers.grid(bits, quantizers.unit_thresholds(bits))
  y, pullback = jax.vjp(
      lambda x, step: estimators.lsq(x, step, grid), jnp.asarray(x), jnp.asarray(steps))
  to_x, to_steps = pullback(jnp.asarray(g))
  assert to_steps.shape == (5,)
  for c, step in enumerate(steps):
    one, back = jax.vjp(
        lambda x, step: estimators.lsq(x, step, grid), jnp.asarray(x[..., c]), step)
    np.testing.assert_array_equal(y[..., c], one)
    want_x, want_step = back(jnp.asarray(g[..., c]))
    np.testing.assert_array_equal(to_x[..., c], want_x)
    np.testing.assert_allclose(to_steps[c], want_step, rtol=1e-5)


def test_a_step_of_any_sign_stands_for_a_positive_one():
  for step in (-0.3, 0.0, 0.3):
    assert quantizers.positive_step(step) == abs(step) + 2**-20


def by_public_code(x, levels, flatness):
  """The proximal map of PARQ's public code in NumPy, for one number."""
  index = np.searchsorted(levels, x)
  low, high = levels[max(index - 1, 0)], levels[min(index, len(levels) - 1)]
  center = (low + high) / 2
  return np.clip(center + (x - center) / flatness, low, high)


@pytest.mark.parametrize("alpha", [0.0, 0.25, 0.5, 0.999])
@pytest.mark.parametrize("bits", [1, 2, 3])
def test_parq(bits, alpha):
  """On thresholds halfway between levels, which are those of the paper."""
  magnitudes = np.array(quantizers.grid(bits).magnitudes, np.float64)
  thresholds = () if bits == 1 else (
      np.concatenate([[0], magnitudes[:-1]]) + magnitudes) / 2
  grid = quantizers.grid(bits, thresholds=thresholds)
  levels = np.array(sorted({*magnitudes, *-magnitudes, *([0.0] if bits > 1 else [])}))
  x = np.linspace(-1.6, 1.6, 161)
  want = [by_public_code(value, levels, 1 - alpha) for value in x]
  got, pullback = jax.vjp(lambda x: estimators.parq(x, alpha, grid), jnp.float32(x))
  np.testing.assert_allclose(got, want, rtol=1e-4, atol=2e-4)
  np.testing.assert_array_equal(pullback(jnp.ones(161))[0], np.abs(np.float32(x)) <= 1)
  if alpha == 0:
    np.testing.assert_allclose(got, np.clip(x, -1, 1), rtol=1e-6)


@pytest.mark.parametrize("bits", [1, 2, 3])
def test_parq_ends_as_the_quantizer_on_any_thresholds(bits):
  """Thresholds that are not halfway between levels, each channel's its own."""
  magnitudes = np.array(quantizers.grid(bits).magnitudes)
  below = np.concatenate([[0], magnitudes[:-1]])
  count = quantizers.num_thresholds(bits)
  # At a quarter of the way between levels, and at four fifths.
  thresholds = (below + (magnitudes - below) * [[0.25], [0.8]]).T[:count, None]
  grid = quantizers.Grid(jnp.float32(thresholds), jnp.float32(magnitudes))
  x = np.random.default_rng(0).uniform(-1.3, 1.3, (400, 2)).astype(np.float32)
  hard = np.asarray(quantizers.quantize(x, grid))
  np.testing.assert_array_equal(estimators.parq(x, 1.0, grid), hard)
  distance = np.abs(np.abs(x) - (thresholds if count else np.zeros((1, 1, 2)))).min(0)
  nearly = np.asarray(estimators.parq(x, 0.999, grid))
  far = distance > 0.01
  assert far.mean() > 0.9
  np.testing.assert_allclose(nearly[far], hard[far], atol=1e-3)
  halfway = np.asarray(estimators.parq(x, 0.5, grid))
  assert 0.2 < (np.abs(halfway - hard) > 1e-3).mean() < 1


def test_binary_relax_is_aqe_with_the_gradient_of_algorithm_1():
  """Yin et al. (2018), Eq 7: the minimizer of |y - x|^2 + lambda |y - h(x)|^2."""
  grid, strength = quantizers.grid(1), 3.0
  got, pullback = jax.vjp(lambda x: estimators.aqe(
      x, strength / (1 + strength), grid, gradient="algorithm1"), X)
  y = np.float64(X)
  hard = np.where(y > 0, 1.0, -1.0)
  np.testing.assert_allclose(got, (y + strength * hard) / (1 + strength), rtol=1e-6)
  np.testing.assert_array_equal(pullback(jnp.ones_like(X))[0], np.abs(X) <= 1)


@pytest.mark.parametrize("function, passes", [
    (estimators.stompp, 0.0), (estimators.stompp_ste, 1.0)])
@pytest.mark.parametrize("bits", [1, 3])
def test_stompp(function, passes, bits):
  grid, key = quantizers.grid(bits), jax.random.key(3)
  x = np.tile(X, 400).reshape(400, -1)
  run = lambda alpha: jax.vjp(
      lambda x, alpha: function(x, alpha, key, grid), x, np.float32(alpha))
  frozen = {}
  for alpha in (0.0, 0.3, 0.8, 1.0):
    y, pullback = run(alpha)
    dx, dalpha = pullback(jnp.broadcast_to(G, x.shape))
    soft, hard = np.clip(x, -1, 1), np.tile(HARD[bits], (400, 1))
    frozen[alpha] = np.asarray(y) != soft
    tells = soft != hard  # Elsewhere both are the same number.
    np.testing.assert_array_equal(y, np.where(frozen[alpha], hard, soft))
    share = frozen[alpha][tells].mean()
    assert abs(share - alpha) <= 5 * np.sqrt(alpha * (1 - alpha) / tells.sum())
    want = np.where(frozen[alpha], passes, 1) * G * MASK
    np.testing.assert_array_equal(np.asarray(dx)[tells], want[tells])
    assert dalpha == 0
  # One key is one mask that grows.
  assert not (frozen[0.3] & ~frozen[0.8]).any() and (frozen[0.8] & ~frozen[0.3]).any()


def test_scales_of_weights():
  rng = np.random.default_rng(0)
  weights = rng.normal(size=(3, 2, 5)).astype(np.float32)
  levels = np.sign(weights)
  g = rng.normal(size=weights.shape).astype(np.float32)
  mean, means = np.abs(weights).mean(), np.abs(weights).mean((0, 1))
  for name, value, to_levels, to_weights in (
      ("none", levels, g, 0 * g),
      ("layer_mean", levels * mean, g, 0 * g),
      ("channel_mean", levels * means, g * means, g / 6)):
    got, pullback = jax.vjp(estimators.WEIGHT_SCALES[name], levels, weights)
    np.testing.assert_allclose(got, value, rtol=1e-6)
    for have, want in zip(pullback(g), (to_levels, to_weights)):
      np.testing.assert_allclose(have, want, rtol=1e-6)


def test_what_passes_gradients_at_weights_of_1():
  """At every alpha that there is, a positive multiple of the cotangent."""
  x, g = np.tile(np.float32([[-1, -1, 1, 1], [-1, 2, -3, 4]])[:, None], (2, 100))
  alpha = np.float32([[0.1], [0.9]])
  passing = []
  for name in estimators.network_estimators():
    step = {"step": 0.5} if name == "lsq" else {}
    f = lambda x: estimators.by_name(name)(
        x, alpha, quantizers.grid(1), lambda: jax.random.key(0), **step)
    slopes = np.asarray(jax.jit(lambda x: jax.vjp(f, x)[1](g)[0])(x)) / g
    # Frozen elements of stompp pass nothing on, but not all are frozen.
    if slopes.min() >= 0 and slopes.max(1).min() > 0.05:
      passing.append(name)
  assert tuple(passing) == estimators.PASS_AT_ONE


# Runs of a network of two one-bit layers with a two-bit activation between them, in
# float64: estimators apart, 30 steps differ by rounding alone, 1e-16 an operation.
STEPS = 30


@functools.partial(jax.jit, static_argnums=(0, 1))
def train(estimator, optimizer, alpha, data, targets, weights):
  """Algorithm 1; the weights after `STEPS` updates, and the first gradients."""
  one, two = quantizers.grid(1), quantizers.grid(2)

  def loss(weights):
    hidden = jax.nn.hard_tanh(data @ estimator(weights[0], alpha, one) / 3)
    hidden = estimator(hidden, alpha, two)
    logits = hidden @ estimator(weights[1], alpha, one) / 4
    return jax.nn.softplus(-logits * targets).mean()

  def step(carry, _):
    weights, state = carry
    gradients = jax.grad(loss)(weights)
    with jax.numpy_dtype_promotion("standard"):  # optax's own arithmetic.
      updates, state = optimizer.update(gradients, state)
    weights = jax.tree.map(lambda w, u: jnp.clip(w + u, -1, 1), weights, updates)
    return (weights, state), gradients

  (weights, _), gradients = jax.lax.scan(
      step, (weights, optimizer.init(weights)), None, length=STEPS)
  return weights, jax.tree.map(lambda g: g[0], gradients)


def test_which_runs_are_equal():
  """Adam is invariant to the constant by which a tensor's gradient is scaled.

  Equal for epsilon -> 0 (1e-30 here), whence the tolerance 1e-9: the constants are
  factors of 2 for alpha = 1, else rounded; Adam's ratios carry that to the weights.
  """
  generator = np.random.default_rng(8)
  adam, sgd = optax.adam(0.02, eps=1e-30), optax.sgd(0.02)

  def ste(x, alpha, grid):
    return estimators.ste(x, grid)

  readings = [functools.partial(estimators.aqe, gradient=gradient)
              for gradient in ("eq18", "algorithm1", "eq15")]
  with jax.enable_x64(True):
    # Two classes, one logit: the gradient of a softmax over equal binary weights
    # cancels to rounding errors, which Adam would blow up.
    targets = generator.choice([-1.0, 1.0], (24, 1))
    data = generator.normal(0, 1, (24, 6)) + targets * generator.normal(0, 1, (1, 6))
    weights = (generator.uniform(-0.4, 0.4, (6, 10)),
               generator.uniform(-0.4, 0.4, (10, 1)))

    def run(estimator, optimizer, alpha):
      return jax.tree.map(np.asarray, train(
          estimator, optimizer, np.float64(alpha), data, targets, weights))

    straight, straight_gradients = run(ste, adam, 1)
    hard, hard_gradients = run(readings[0], adam, 1)
    by_adam = [run(reading, adam, 0.7)[0] for reading in readings]
    by_sgd = [run(reading, sgd, 0.7)[0] for reading in readings]

  def distance(a, b):
    return max(np.abs(x - y).max() for x, y in zip(a, b))

  # Something was learnt, and it moved binary weights.
  flips = sum((np.sign(a) != np.sign(b)).sum() for a, b in zip(straight, weights))
  assert flips > 10
  # One quantizer lies between the last weights and the loss, three before the first.
  for constant, a, b in zip((2**2, 2), hard_gradients, straight_gradients):
    assert np.abs(b).max() > 1e-3
    np.testing.assert_allclose(a, constant * b, rtol=1e-12)
  assert distance(hard, straight) < 1e-9
  assert distance(by_adam[0], straight) > 0.1
  for a, b in itertools.combinations(range(3), 2):
    assert distance(by_adam[a], by_adam[b]) < 1e-9
    assert distance(by_sgd[a], by_sgd[b]) > 0.01


def calls(x, alpha=0.5):
  """Each estimator's name with a call of it, whose alpha may be another number."""
  grid, key = quantizers.grid(1), jax.random.key(0)
  return {
      "ste": lambda: estimators.ste(x, grid),
      "aqe": lambda: estimators.aqe(x, alpha, grid),
      "stochastic_aqe": lambda: estimators.stochastic_aqe(x, alpha, key),
      "approx_sign": lambda: estimators.approx_sign(x, grid),
      "swish_sign": lambda: estimators.swish_sign(x, grid),
      "ede": lambda: estimators.ede(x, alpha, grid),
      "reste": lambda: estimators.reste(x, alpha, grid),
      "dsq": lambda: estimators.dsq(x, alpha, grid),
      "ewgs": lambda: estimators.ewgs(x, grid),
      "lsq": lambda: estimators.lsq(x, 1.0, grid),
      "parq": lambda: estimators.parq(x, alpha, grid),
      "stompp": lambda: estimators.stompp(x, alpha, key, grid),
      "stompp_ste": lambda: estimators.stompp_ste(x, alpha, key, grid)}


def test_all_estimators_are_called():
  assert {*calls(X)} == {*estimators.network_estimators(), "lsq"}


@pytest.mark.parametrize("dtype", ["int32", "uint8", "bool", "complex64"])
@pytest.mark.parametrize("name", calls(X))
def test_inputs_that_are_not_float_are_refused(name, dtype):
  with pytest.raises(TypeError, match=f"x of dtype {dtype}: must be a float array"):
    calls(jnp.zeros(3, dtype))[name]()
  with pytest.raises(TypeError, match=f"x of dtype {dtype}: must be a float array"):
    jax.jit(lambda x: calls(x)[name]())(jnp.zeros(3, dtype))


@pytest.mark.parametrize("alpha, error", [
    (-0.1, ValueError), (1.5, ValueError), (2, ValueError), (float("nan"), ValueError),
    (float("inf"), ValueError),
    (np.float32([0.5, 2]), ValueError), (0.5j, TypeError),
    (True, TypeError), ("a", TypeError), (None, TypeError),
    (jnp.zeros(3, jnp.complex64), TypeError)])
@pytest.mark.parametrize("name", [
    "aqe", "stochastic_aqe", "ede", "reste", "dsq", "stompp", "stompp_ste", "parq"])
def test_alpha_that_is_wrong(name, alpha, error):
  with pytest.raises(error, match="alpha.*: must be (in|real|an array)"):
    calls(X, alpha)[name]()


@pytest.mark.parametrize("call, message", [
    (lambda grid: estimators.lsq(X, 0.0, grid), "step=0.0: must be in"),
    (lambda grid: estimators.lsq(X, -1.0, grid), "step=-1.0: must be in"),
    (lambda grid: estimators.lsq(X, float("nan"), grid), "step=nan: must be in"),
    (lambda grid: estimators.lsq(X, 1.0, grid, count=0), "count=0: must be an integer"),
    (lambda grid: estimators.lsq(X, 1.0, grid, count=2.0), "count=2.0: must be an int"),
    (lambda grid: estimators.ewgs(X, grid, delta=-1.0), "delta=-1.0: must be in"),
    (lambda grid: estimators.ewgs(X, grid, delta=float("inf")), "delta=inf: must be")])
def test_other_parameters_that_are_wrong(call, message):
  with pytest.raises(ValueError, match=message):
    call(quantizers.grid(1))


@pytest.mark.parametrize("dtype", ["int32", "bool", "complex64"])
def test_scales_and_the_neuron_take_floats(dtype):
  x = jnp.ones((2, 3), dtype)
  for call in (lambda: estimators.layer_mean_scale(X, x),
               lambda: estimators.channel_mean_scale(X, x),
               lambda: estimators.stochastic_neuron(x, jax.random.key(0))):
    with pytest.raises(TypeError, match=f"of dtype {dtype}: must be a float array"):
      call()


@pytest.mark.parametrize("x", ["a", None, object()])
def test_inputs_that_are_no_arrays_are_refused(x):
  with pytest.raises(TypeError, match="x=.*: must be an array or a number"):
    estimators.aqe(x, 0.5, quantizers.grid(1))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_periodic_weights(dtype):
  """Before the straight-through estimator: a square wave with the slope of the sine."""
  w = np.array([-1, -0.3, -0.01, 0, 1e-6, 0.1, 0.2, 0.75, 1]).astype(
      getattr(ml_dtypes, dtype, dtype))
  g = np.linspace(-2, 3, 9).astype(w.dtype)
  grid = quantizers.grid(1)
  wave, pullback = jax.vjp(
      lambda w: estimators.ste(estimators.periodic(w, 20.0), grid), jnp.asarray(w))
  slope, = pullback(jnp.asarray(g))
  wide = 20 * w.astype(np.float64)
  np.testing.assert_array_equal(wave, np.where(np.sin(wide) > 0, 1, -1))
  np.testing.assert_allclose(
      np.asarray(slope, np.float64), g.astype("f8") * 20 * np.cos(wide),
      rtol=1e-5 if dtype == "float32" else 0.02)
  with pytest.raises(ValueError, match="frequency=-1"):
    estimators.periodic(jnp.asarray(w), -1)
