"""minw.optim: against Adam and SGD written out in NumPy float64."""

import functools

import hypothesis
from hypothesis import strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from minw import optim

SHAPES = {"conv1": {"kernel": (3, 3, 2, 4)}, "dense1": {"kernel": (4, 3)},
          "norm_conv1": {"batch_norm": {"scale": (4,), "bias": (4,)}}}
STEPS = 6


def random_tree(rng, scale=1.0):
  return jax.tree.map(lambda shape: scale * rng.standard_normal(shape), SHAPES,
                      is_leaf=lambda node: isinstance(node, tuple))


def schedule(step):
  return 0.1 / (1 + step)


def train(optimizer, params, gradients):
  """The parameters after each step, float32."""
  as_float32 = lambda tree: jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32),
                                         tree)
  params = as_float32(params)
  state = optimizer.init(params)
  result = []
  for gradient in gradients:
    updates, state = jax.jit(optimizer.update)(as_float32(gradient), state, params)
    params = optax.apply_updates(params, updates)
    result.append(params)
  return result


def adam(parameter, gradients, decay, epsilon):
  """Kingma and Ba 2015, Algorithm 1, with its defaults 0.9 and 0.999."""
  m = v = 0.0
  for t, gradient in enumerate(gradients, start=1):
    gradient = gradient + decay * parameter
    m = 0.9 * m + 0.1 * gradient
    v = 0.999 * v + 0.001 * gradient**2
    step = (m / (1 - 0.9**t)) / (np.sqrt(v / (1 - 0.999**t)) + epsilon)
    parameter = parameter - 0.1 / t * step
    yield parameter


def sgd(parameter, gradients, decay, momentum):
  """With heavy-ball momentum: velocity = momentum * velocity + gradient."""
  velocity = 0.0
  for t, gradient in enumerate(gradients, start=1):
    velocity = momentum * velocity + gradient + decay * parameter
    parameter = parameter - 0.1 / t * velocity
    yield parameter


@pytest.mark.parametrize("name, options, reference", [
    ("adam", {}, lambda p, g, decay: adam(p, g, decay, 1e-8)),
    ("adam", {"adam_epsilon": 0.3}, lambda p, g, decay: adam(p, g, decay, 0.3)),
    ("sgd", {}, lambda p, g, decay: sgd(p, g, decay, 0.9)),
    ("sgd", {"momentum": 0.5}, lambda p, g, decay: sgd(p, g, decay, 0.5)),
    ("sgd", {"momentum": 0.0}, lambda p, g, decay: sgd(p, g, decay, 0.0)),
])
@pytest.mark.parametrize("decay", [0.0, 0.2])
def test_against_numpy(name, options, reference, decay):
  rng = np.random.default_rng(0)
  params = random_tree(rng)
  gradients = [random_tree(rng, scale) for scale in (1, 3, 0.2, 5, 0.01, 1)]
  assert len(gradients) == STEPS
  optimizer = optim.optimizer(name, schedule, weight_decay=decay, **options)
  got = train(optimizer, params, gradients)
  paths = [path for path, _ in jax.tree_util.tree_leaves_with_path(params)]
  of_each = zip(paths, jax.tree.leaves(params), zip(*map(jax.tree.leaves, gradients)),
                zip(*map(jax.tree.leaves, got)))
  count = 0
  for path, parameter, gradient, steps in of_each:
    on_kernels = decay if path[-1].key == "kernel" else 0.0  # Not on batch norm.
    for have, want in zip(steps, reference(parameter, gradient, on_kernels)):
      np.testing.assert_allclose(have, want, rtol=2e-5, atol=2e-6)
      count += 1
  assert count == 4 * STEPS


def decoupled_adam(parameter, gradients, decay):
  """Loshchilov and Hutter 2019, Algorithm 2, with the rate in place of their eta."""
  m = v = 0.0
  for t, gradient in enumerate(gradients, start=1):
    m = 0.9 * m + 0.1 * gradient
    v = 0.999 * v + 0.001 * gradient**2
    step = (m / (1 - 0.9**t)) / (np.sqrt(v / (1 - 0.999**t)) + 1e-8)
    parameter = parameter - 0.1 / t * (step + decay * parameter)
    yield parameter


def decoupled_sgd(parameter, gradients, decay):
  velocity = 0.0
  for t, gradient in enumerate(gradients, start=1):
    velocity = 0.9 * velocity + gradient
    parameter = parameter - 0.1 / t * (velocity + decay * parameter)
    yield parameter


@pytest.mark.parametrize("name, decoupled, reference", [
    ("adam", False, lambda p, g, decay: adam(p, g, decay, 1e-8)),
    ("sgd", False, lambda p, g, decay: sgd(p, g, decay, 0.9)),
    ("adam", True, decoupled_adam),
    ("sgd", True, decoupled_sgd),
])
@pytest.mark.parametrize("latent, norm", [(1.0, 0.0), (0.0, 1.0), (0.5, 2.0)])
def test_groups_have_their_own_weight_decay(name, decoupled, reference, latent, norm):
  """Latent weights, which are those of conv1 here, other kernels, and batch norm."""
  rng = np.random.default_rng(2)
  add_step = lambda tree: tree | {"conv1": tree["conv1"] | {"step": rng.normal(size=4)}}
  params = add_step(random_tree(rng))
  gradients = [add_step(random_tree(rng)) for _ in range(STEPS)]
  optimizer = optim.optimizer(
      name, schedule, weight_decay=0.2, decoupled_weight_decay=decoupled,
      latent_weight_decay_factor=latent, norm_weight_decay_factor=norm,
      on_grid=("conv1", "norm_conv1/batch_norm").__contains__)
  got = train(optimizer, params, gradients)
  decays = {("conv1", "kernel"): 0.2 * latent, ("conv1", "step"): 0.0,
            ("dense1", "kernel"): 0.2, ("norm_conv1", "batch_norm", "bias"): 0.2 * norm,
            ("norm_conv1", "batch_norm", "scale"): 0.2 * norm}
  assert len(decays) == len(jax.tree.leaves(params))
  for path, decay in decays.items():
    leaf = lambda tree: functools.reduce(lambda node, key: node[key], path, tree)
    steps = reference(leaf(params), [leaf(g) for g in gradients], decay)
    for have, want in zip(got, steps, strict=True):
      np.testing.assert_allclose(leaf(have), want, rtol=2e-5, atol=2e-6)


def test_gradients_are_clipped_together():
  """To the norm 2.5 of all of them, before weight decay is added."""
  params = {"dense1": {"kernel": np.array([[1.0, 2.0]]), "bias": np.array([4.0])}}
  gradients = [{"dense1": {"kernel": np.array([[3.0, 0.0]]), "bias": np.array([4.0])}},
               {"dense1": {"kernel": np.array([[0.3, 0.4]]), "bias": np.array([0.0])}}]
  optimizer = optim.optimizer(
      "sgd", lambda step: 1.0, momentum=0.0, weight_decay=0.5, gradient_clip_norm=2.5)
  first, second = train(optimizer, params, gradients)
  # The first norm is 5, so that the gradient is halved; the second is 0.5.
  np.testing.assert_allclose(first["dense1"]["kernel"], [[-1.0, 1.0]])
  np.testing.assert_allclose(first["dense1"]["bias"], [2.0])
  np.testing.assert_allclose(second["dense1"]["kernel"], [[-0.8, 0.1]], rtol=1e-6)
  np.testing.assert_allclose(second["dense1"]["bias"], [2.0])


def test_clipping_is_before_bop():
  params = {"conv1": {"kernel": np.ones((1, 2))}}
  gradients = [{"conv1": {"kernel": np.array([[30.0, 40.0]])}}] * 2
  for limit, flips in ((0.0, [True, True]), (1.0, [False, True])):  # To 0.6, 0.8.
    optimizer = optim.optimizer(
        "bop", schedule, gradient_clip_norm=limit, bop_adaptivity_rate=1.0,
        bop_threshold=0.7, one_bit=("conv1",).__contains__)
    first, _ = train(optimizer, params, gradients)
    assert (first["conv1"]["kernel"] == -1).tolist() == [flips]


def bop(weights, gradients, rate, threshold):
  """Helwegen et al., Algorithm 1, one weight after another; signs at first."""
  m = np.zeros(weights.shape)
  for gradient in gradients:
    m = (1 - rate) * m + rate * gradient
    for i in np.ndindex(weights.shape):
      if abs(weights[i]) != 1:
        weights[i] = 1 if weights[i] > 0 else -1
      elif abs(m[i]) > threshold and np.sign(m[i]) == np.sign(weights[i]):
        weights[i] = -weights[i]
    yield weights.copy()


@hypothesis.given(st.integers(0, 2**32), st.sampled_from((1e-3, 0.3, 1.0)),
                  st.sampled_from((0.0, 0.01, 0.5)))
@hypothesis.settings(max_examples=20)
def test_bop_against_numpy(seed, rate, threshold):
  """Never another value than 1 and -1, from latent weights of any size on."""
  rng = np.random.default_rng(seed)
  start = rng.choice([0.0, 1.0, -1.0, 0.03, -0.7, 1e-30, 3.0], (4, 5))
  size = rng.uniform(0.1, 1, start.shape)
  start = np.float32(np.where(np.abs(start) == 1, start, start * size))
  gradients = rng.normal(size=(8, 4, 5)).astype(np.float32)
  transformation = optim.bop(rate, threshold)
  params = jnp.asarray(start)
  state = transformation.init(params)
  flips = 0
  wanted = bop(np.float64(start), gradients, rate, threshold)
  for gradient, want in zip(gradients, wanted):
    updates, state = transformation.update(gradient, state, params)
    before, params = params, optax.apply_updates(params, updates)
    np.testing.assert_array_equal(params, want)
    assert (np.abs(params) == 1).all()
    flips += int((before == -params).sum())
  assert flips or rate * 3 < threshold * 100


@pytest.mark.parametrize("decay", [0.0, 0.2])
def test_bop_has_kernels_of_one_bit_alone(decay):
  rng = np.random.default_rng(1)
  params = random_tree(rng, 0.5)
  gradients = [random_tree(rng) for _ in range(STEPS)]
  optimizer = optim.optimizer(
      "bop", schedule, weight_decay=decay, bop_adaptivity_rate=0.2, bop_threshold=0.1,
      one_bit=("conv1", "norm_conv1/batch_norm").__contains__)
  got = train(optimizer, params, gradients)
  kernels = [g["conv1"]["kernel"] for g in gradients]
  reference = list(bop(params["conv1"]["kernel"].copy(), kernels, 0.2, 0.1))
  flips = [(a != b).sum() for a, b in zip(reference, reference[1:])]
  assert min(flips) > 0
  for have, want in zip(got, reference):
    np.testing.assert_array_equal(have["conv1"]["kernel"], want)
  for path, on_kernel in ((("dense1", "kernel"), decay),
                          (("norm_conv1", "batch_norm", "scale"), 0.0)):
    leaf = lambda tree: functools.reduce(lambda node, name: node[name], path, tree)
    steps = adam(leaf(params), [leaf(g) for g in gradients], on_kernel, 1e-8)
    for have, want in zip(got, steps):
      np.testing.assert_allclose(leaf(have), want, rtol=2e-5, atol=2e-6)


def ovsw(weights, before, flips, gradient, scaling, decay, momentum, threshold):
  """The gradient and the averages of one update, one weight after another."""
  gradient, flips = gradient.copy(), flips.copy()
  for channel in range(weights.shape[-1]):
    of_gradient = max(np.linalg.norm(gradient[..., channel]), 1e-6)
    of_weights = max(np.linalg.norm(weights[..., channel]), 1e-3)
    if of_gradient / of_weights < scaling:
      gradient[..., channel] *= scaling * of_weights / of_gradient
  for i in np.ndindex(weights.shape):
    changed = (weights[i] > 0) != (before[i] > 0)
    flips[i] = momentum * flips[i] + (1 - momentum) * changed
    if flips[i] < threshold:
      gradient[i] += decay * weights[i]
  return gradient, flips


@pytest.mark.parametrize("scaling, decay", [(0.5, 0.0), (0.0, 0.3), (0.5, 0.3)])
def test_ovsw_against_numpy(scaling, decay):
  """Channels of small, large and no gradients, and one of weights that are 0."""
  rng = np.random.default_rng(3)
  states = rng.normal(size=(5, 2, 3, 4)) * [1, 1, 1, 0]
  gradients = rng.normal(size=(5, 2, 3, 4)) * [0.01, 100, 0, 1e-5]
  transformation = optim.ovsw(scaling, decay, momentum=0.75, threshold=0.2)
  update = jax.jit(transformation.update)
  float32 = lambda array: jnp.asarray(array, jnp.float32)
  state = transformation.init(float32(states[0]))
  before, flips = states[0], np.zeros(states[0].shape)
  silent = []
  for weights, gradient in zip(states, gradients):
    got, state = update(float32(gradient), state, float32(weights))
    want, flips = ovsw(
        weights, before, flips, gradient, scaling, decay, 0.75, 0.2)
    np.testing.assert_allclose(got, want, rtol=1e-5)
    np.testing.assert_allclose(state.flips, flips, rtol=1e-6)
    silent.append(np.mean(flips[..., :3] < 0.2))
    before = weights
  assert silent[0] == 1 and 0 < min(silent) < 1


def test_ovsw_is_for_kernels_of_one_bit_and_before_the_rule():
  """With SGD, the decay 0.5 is added before momentum 0.9 accumulates it."""
  params = {"conv1": {"kernel": np.array([[2.0, -4.0]]), "step": np.array(1.0)},
            "dense1": {"kernel": np.array([[2.0, -4.0]])}}
  gradients = [jax.tree.map(np.zeros_like, params)] * 2
  optimizer = optim.optimizer(
      "sgd", lambda step: 0.25, ovsw_decay=0.5, one_bit=("conv1",).__contains__)
  first, second = train(optimizer, params, gradients)
  assert first["conv1"]["kernel"].tolist() == [[1.75, -3.5]]  # 2 - 0.25 * 0.5 * 2
  np.testing.assert_allclose(  # The velocity is 0.9 * 1 + 0.5 * 1.75.
      second["conv1"]["kernel"], [[1.75 - 0.25 * 1.775, -3.5 + 0.25 * 3.55]])
  for after in (first, second):
    assert after["dense1"]["kernel"].tolist() == [[2.0, -4.0]]
    assert after["conv1"]["step"] == 1


def test_unknown_name():
  with pytest.raises(ValueError, match="name='adamw': must be adam, sgd or bop"):
    optim.optimizer("adamw", schedule)


def test_clip_only_where_told():
  values = jnp.array([[-3.0, -1.0, -0.25], [0.0, 1.0, 7.5]])
  params = {"conv1": {"kernel": values}, "dense1": {"kernel": 2 * values},
            "norm_conv1": {"batch_norm": {"scale": values[1]}}}
  quantized = {"conv1": {"kernel": True}, "dense1": {"kernel": False},
               "norm_conv1": {"batch_norm": {"scale": False}}}
  got = jax.device_get(optim.clip_kernels(params, quantized))
  assert got["conv1"]["kernel"].tolist() == [[-1.0, -1.0, -0.25], [0.0, 1.0, 1.0]]
  assert got["dense1"]["kernel"].tolist() == [[-6.0, -2.0, -0.5], [0.0, 2.0, 15.0]]
  assert got["norm_conv1"]["batch_norm"]["scale"].tolist() == [0.0, 1.0, 7.5]
