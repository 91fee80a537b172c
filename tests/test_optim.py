"""minw.optim: against Adam and SGD written out in NumPy float64."""

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


def test_unknown_name():
  with pytest.raises(ValueError, match="name='adamw': must be adam or sgd"):
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
