"""Parameters of a network's own: folded against float64, or refused by name."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from minw import fold
from minw import fold_probe
from minw import infer
from minw import layers
from minw import pack
from minw import packed
from minw import trained
from minw.data import pixels as pixels_lib
import network_variables

PIXELS = pixels_lib.pixels("integer", (0.49, 0.48, 0.45), (0.2, 0.2, 0.2))
SHAPE = (6, 6, 3)
IMAGES = np.random.default_rng(1).integers(0, 256, (20, *SHAPE), np.uint8)


class Net(nn.Module):
  """conv, what a test puts there with parameters of the network's own, norm."""

  body: object
  weight_scale: str = "none"

  @nn.compact
  def __call__(self, x, alpha=1.0, mode="hard"):
    x = layers.QuantConv(8, name="first")(x, alpha, mode)
    x = layers.NormQuant(bits=2, name="norm_first")(x, alpha, mode)
    x = layers.QuantConv(8, weight_scale=self.weight_scale, name="conv")(x, alpha, mode)
    x = self.body(x, lambda name, *shape: self.param(
        name, nn.initializers.ones, shape))
    x = layers.NormQuant(name="norm")(x, alpha, mode)
    x = layers.QuantDense(3, name="last")(x.reshape(x.shape[0], -1), alpha, mode)
    return layers.NormQuant(bits=None, name="norm_last")(x, mode=mode)


variables_of = functools.partial(
    network_variables.variables_of, shape=SHAPE,
    shift=lambda rng, n: rng.normal(0, 3, n),
    gain=lambda rng, n: rng.choice([-1.5, 0.3, 2, 0.7], n),
    positive=lambda rng, n: rng.uniform(0.2, 2, n))


def probe():
  return pixels_lib.probe(PIXELS, SHAPE)


_MAPS = [
    ("none", lambda x, own: x + own("shift", 8)),
    ("channel_mean", lambda x, own: x * own("gain", 1, 1, 1, 8) - own("shift")),
    ("none", lambda x, own: x * own("gain") - own("shift", 8)),
    ("channel_mean", lambda x, own: (x + own("shift", 8)) / own("gain", 8)),
    ("channel_mean", lambda x, own: nn.avg_pool(
        x * own("gain", 8) + own("shift", 8), (2, 2), (2, 2))),
    ("none", lambda x, own: layers.max_pool(
        own("shift", 8) + x * own("positive", 8), 2)),
    ("channel_mean", lambda x, own: nn.max_pool(
        x * own("positive") + own("shift", 8), (3, 3), (2, 2))),
    ("none", lambda x, own: (x * own("gain", 8) + own("shift", 8)).sum((1, 2))),
    ("channel_mean", lambda x, own: jnp.concatenate([x + own("shift", 8), x], -1)),
    ("channel_mean", lambda x, own: (x + own("shift", 8)) + x),
]


@pytest.mark.parametrize("scale, body", [
    pytest.param(*case, marks=() if i in (2, 4) else pytest.mark.slow)
    for i, case in enumerate(_MAPS)], ids=range(10))
def test_affine_maps_fold(scale, body):
  model = Net(body, scale)
  variables = variables_of(model)
  hard = fold.fold(model, variables, probe())
  for name, value in hard["params"].items():  # Neutral: 0 as summands, 1 as factors.
    np.testing.assert_array_equal(
        value, np.full_like(variables["params"][name], name != "shift"))
  # Each layer is the trained one's but for codes beside thresholds.
  assert trained.compare(model, variables, PIXELS, IMAGES) == (None, 0, 20)
  program = pack.pack(model, variables, pixels=PIXELS, source_shape=SHAPE)
  images = pixels_lib.normalize(IMAGES, PIXELS)
  got = infer.Network(packed.to_bytes(program), "reference", 1).logits(IMAGES)
  np.testing.assert_array_equal(
      got, jax.jit(lambda hard: model.apply(hard, images, mode="hard"))(hard))
  assert len(np.unique(got)) > 5


def test_centers_and_slopes_worked_by_hand():
  """(3 acc - 4 - 2) / 4 * 8: zero at 2, slope 6; 0 acc + 8: constant 12."""
  model = Net(lambda x, own: x * own("gain", 8) - own("shift"))
  variables = variables_of(model)
  params, stats = variables["params"], variables["batch_stats"]["norm"]["batch_norm"]
  params["gain"], params["shift"] = np.float32([3] * 7 + [0]), np.float32(4)
  ones = np.ones(8, np.float32)
  stats["mean"], stats["var"] = 2 * ones, (16 - 1e-4) * ones
  params["norm"]["batch_norm"] = {"scale": 8 * ones, "bias": 0 * ones}
  norm = fold.fold(model, variables, probe())["hard"]["norm"]
  np.testing.assert_array_equal(norm["center"], [2] * 7 + [0])
  np.testing.assert_allclose(norm["scale"], [6] * 7 + [0], rtol=1e-6)
  np.testing.assert_allclose(norm["constant"], [0] * 7 + [-12], rtol=1e-6)


@pytest.mark.parametrize("body, message", [
    (lambda x, own: nn.max_pool(x * own("gain", 8), (2, 2)),
     "'params/gain' is a negative factor before reduce_window_max"),
    (lambda x, own: x * jnp.exp(own("shift", 8)), "'params/shift' is used by mul"),
    (lambda x, own: own("shift", 8) - x, "'params/shift' is used by sub"),
    (lambda x, own: x + own("shift", 6, 6, 1), "'params/shift' is used by add"),
    (lambda x, own: nn.relu(x + own("shift", 8)), "'params/shift' is followed by max"),
    (lambda x, own: jnp.where(x > 0, x, x * own("gain", 8)),
     "'params/gain' is followed by select_n"),
    (lambda x, own: nn.avg_pool(x + own("shift", 8), (3, 3), (1, 1), "SAME"),
     "'params/shift' is followed by reduce_window_sum over several channels, or over"),
    (lambda x, own: x @ own("shift", 8, 8), "'params/shift' is used by dot_general"),
], ids=range(8))
def test_other_uses_are_refused_by_name(body, message):
  with pytest.raises(ValueError, match="cannot be packed: parameter " + message):
    fold.fold(Net(body), variables_of(Net(body)), probe())


def test_a_norm_must_follow():
  class Direct(nn.Module):

    @nn.compact
    def __call__(self, x, alpha=1.0, mode="hard"):
      x = x + self.param("shift", nn.initializers.ones, (3,))
      x = layers.QuantDense(4, name="dense")(x.reshape(x.shape[0], -1), alpha, mode)
      return layers.NormQuant(bits=None)(x, mode=mode)

  with pytest.raises(ValueError, match="'params/shift' reaches dense without a Norm"):
    fold.fold(Direct(), variables_of(Direct()), probe())


def test_a_parameter_is_a_summand_or_a_factor():
  def body(x, own):
    gain = own("gain", 8)
    return x * gain + gain

  with pytest.raises(ValueError, match="'params/gain' is a summand and a factor"):
    fold.fold(Net(body), variables_of(Net(body)), probe())


def rprelu(x, gamma, beta, zeta):
  """Liu et al. 2020, Eq 6, in float64, with the magnitude of beta."""
  return np.where(x > gamma, x - gamma, np.abs(beta) * (x - gamma)) + zeta


@pytest.mark.parametrize("bits", [1, 3])
def test_rprelu(bits):
  rng = np.random.default_rng(0)
  count = 64
  layer = layers.NormQuant(bits=bits, rprelu=True, epsilon=0.0)
  batch_norm = {"scale": rng.normal(0, 1, count), "bias": rng.normal(0, 0.5, count)}
  learned = {"gamma": rng.normal(0, 0.5, count), "beta": rng.normal(0, 1, count),
             "zeta": rng.normal(0, 0.5, count)}
  single = lambda tree: jax.tree.map(np.float32, tree)
  batch_norm, learned = single(batch_norm), single(learned)
  stats = single({"mean": rng.normal(0, 5, count), "var": rng.uniform(1, 40, count)})
  variables = {
      "params": {"batch_norm": batch_norm,
                 **{f"rprelu_{name}": value for name, value in learned.items()}},
      "batch_stats": {"batch_norm": stats}}
  rows = fold_probe.make_rows(fold.Probe(np.full(count, 30.0), 1.0, 32.0))
  _, hard = layer.apply(variables, rows, mode="fold", mutable=["hard"])
  acc = np.arange(-30.0, 31, dtype=np.float32)[:, None] * np.ones(count, np.float32)
  got = layer.apply(hard, acc, mode="hard")
  np.testing.assert_array_equal(jax.jit(layer.apply, static_argnames="mode")(
      hard, acc, mode="hard"), got)
  # In NumPy, one float32 operation after the other.
  h = hard["hard"]
  y = (acc - h["center"]) * h["scale"] + h["constant"]
  below = y - h["rprelu_gamma"]
  y32 = np.where(below > 0, below, below * h["rprelu_beta"]) + h["rprelu_zeta"]
  levels = {1: [-1, 1], 3: [-1, -0.5, -0.25, 0, 0.25, 0.5, 1]}[bits]
  edges = {1: [0], 3: [-0.75, -0.375, -0.125, 0.125, 0.375, 0.75]}[bits]
  code = lambda y: np.asarray(levels)[sum((y > edge).astype(int) for edge in edges)]
  np.testing.assert_array_equal(got, code(y32))
  deviation = np.sqrt(np.float64(stats["var"]))
  exact = np.float64(acc - stats["mean"]) / deviation * np.float64(
      batch_norm["scale"]) + batch_norm["bias"]
  exact = rprelu(exact, **jax.tree.map(np.float64, learned))
  near = np.abs(exact[..., None] - edges).min(-1) < 1e-5
  np.testing.assert_array_equal(np.asarray(got)[~near], code(exact)[~near])
  assert near.mean() < 0.01
  mixed = layer.apply(variables, acc, 1.0, "mixed")
  np.testing.assert_array_equal(np.asarray(mixed)[~near], code(exact)[~near])


def test_rprelu_in_a_network_packs():
  class Real(nn.Module):

    @nn.compact
    def __call__(self, x, alpha=1.0, mode="hard"):
      norm = lambda name: layers.NormQuant(bits=2, rprelu=True, name=name)
      x = norm("norm1")(layers.QuantConv(8, name="conv1")(x, alpha, mode), alpha, mode)
      y = layers.QuantConv(8, name="conv2")(x, alpha, mode)
      x = norm("norm2")(y, alpha, mode, shortcut=x)
      x = layers.QuantDense(3, name="last")(x.reshape(x.shape[0], -1), alpha, mode)
      return layers.NormQuant(bits=None, name="norm_last")(x, mode=mode)

  rng = np.random.default_rng(3)
  shapes = jax.eval_shape(lambda: layers.initialize(Real(), SHAPE))
  variables = jax.tree.map(
      lambda leaf: rng.normal(0, 1, leaf.shape).astype(np.float32), shapes)
  variables["batch_stats"] = jax.tree.map(np.abs, variables["batch_stats"])
  assert trained.compare(Real(), variables, PIXELS, IMAGES).problem is None
  program = pack.pack(Real(), variables, pixels=PIXELS, source_shape=SHAPE)
  hard = fold.fold(Real(), variables, probe())
  images = pixels_lib.normalize(IMAGES, PIXELS)
  np.testing.assert_array_equal(
      infer.Network(packed.to_bytes(program), "reference", 1).logits(IMAGES),
      jax.jit(lambda hard: Real().apply(hard, images, mode="hard"))(hard))


def test_logits_have_no_rprelu():
  with pytest.raises(ValueError, match="rprelu=True: must be False for logits"):
    layers.NormQuant(bits=None, rprelu=True).init(
        jax.random.key(0), np.zeros((2, 3), np.float32), mode="train")
