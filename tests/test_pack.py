"""Packing: thresholds against all sums, and users' own networks."""

import functools

import flax.linen as nn
import hypothesis
from hypothesis import strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from minw import estimators
from minw import fold
from minw import infer
from minw import layers
from minw import models
from minw import pack
from minw import packed
from minw import quantizers
from minw import verify
from minw.data import pixels as pixels_lib
from minw.kernels import native
from minw.packing import layer_rules
from packed_models import randomized

PIXELS = pixels_lib.pixels("integer", (0.49, 0.48, 0.45), (0.2, 0.2, 0.2))


def assert_packs(model, size=13, seed=0, count=5, variables=None, untraced=True):
  """Packs a network and compares all its layers; returns the program.

  The layers are those that `structure.trace` finds in the hard network. With
  `untraced`, the logits are also compared with those of the network itself, which takes
  one more compilation.
  """
  shape = (size, size, 3)
  variables = variables or randomized(model, shape, seed)
  program = pack.pack(model, variables, pixels=PIXELS, crop=(size, size),
                      source_shape=(size + 3, size + 2, 3))
  program = packed.from_bytes(packed.to_bytes(program))
  hard = fold.fold(model, variables, pixels_lib.probe(PIXELS, shape))
  images = np.random.default_rng(seed).integers(
      0, 256, (count, *program.source_shape), np.uint8)
  network = infer.Network(packed.to_bytes(program), "reference", 1)
  assert not list(verify.differences(
      program, model, hard, PIXELS, images, [network]))
  if not untraced:
    return program
  crop = images[:, 1:1 + size, 1:1 + size]
  wanted = jax.jit(lambda hard, images: model.apply(hard, images, mode="hard"))(
      hard, pixels_lib.normalize(crop, PIXELS))
  integer = all(not isinstance(op, packed.FloatNorm) for op in program.ops)
  if integer:
    np.testing.assert_array_equal(network.logits(images), np.asarray(wanted))
  else:
    np.testing.assert_allclose(network.logits(images), wanted, rtol=1e-4, atol=1e-4)
  return program


@pytest.mark.parametrize("bits, pad", [
    ((1, 1), 0.0), ((3, 2), 1.0), ((2, "float8_e4m3fn"), 0.0),
    *(pytest.param(*slow, marks=pytest.mark.slow) for slow in (
        ((1, 2), -1.0), ((1, 3), 1.0), ((2, 1), 1.0), ((2, 2), 0.0), ((2, 3), 0.0),
        ((3, 1), 0.0), ((3, 3), -1.0), ((1, "float32"), 0.0), (("float16", 3), -1.0),
        (("bfloat16", "bfloat16"), 0.0)))])
def test_convnets_of_all_bits(bits, pad):
  weights, inputs = bits
  model = models.ConvNet(
      10, (5, 7, 9), (6,),
      conv=functools.partial(layers.QuantConv, bits=weights, pad_value=pad),
      dense=functools.partial(layers.QuantDense, bits=weights),
      norm=functools.partial(layers.NormQuant, bits=inputs))
  program = assert_packs(model, untraced=weights == inputs)
  grids = quantizers.is_grid(weights) and quantizers.is_grid(inputs)
  assert grids == all(not isinstance(op, packed.FloatNorm) for op in program.ops)
  assert [op.bits for op in program.ops if isinstance(op, packed.Conv)] == [weights] * 5


def threshold_cases():
  return st.tuples(st.sampled_from((1, 2, 3)), st.integers(0, 2**32),
                   st.sampled_from((2.0**-6, 0.25, 1.0)), st.integers(0, 60),
                   st.booleans())


@hypothesis.given(threshold_cases())
@hypothesis.settings(max_examples=40)
def test_thresholds_give_every_code(case):
  """Against float64 batch norm, over all sums that there can be."""
  bits, seed, unit, bound, with_shortcut = case
  rng = np.random.default_rng(seed)
  n = 6
  mean, bias = rng.normal(0, 20 * unit, n), rng.normal(0, 1, n)
  var, scale = rng.uniform(1e-3, 300, n) * unit ** 2, rng.normal(0, 1, n)
  scale[0], scale[1] = 0, -scale[1]
  bounds = np.full(n, bound)
  bounds[-1] = 0
  norm = fold.fold_norm(mean, var, scale, bias, 1e-4, bounds * unit, np.full(n, unit))
  layer = layers.NormQuant(bits=bits)
  shortcuts = [-1.0, 0.0, 1.0] if with_shortcut else [0.0]
  falling, table = layer_rules.channel_thresholds(
      layer, norm._asdict(), bounds, unit, shortcuts)
  assert falling.tolist() == (norm.scale < 0).tolist()
  assert table.shape == (len(shortcuts), (1, 2, 6)[bits - 1], n)
  grid = {1: [], 2: [0.1], 3: [1 / 8, 3 / 8, 3 / 4]}[bits]
  for s, shortcut in enumerate(shortcuts):
    for channel in range(n):
      for acc in range(-bounds[channel], bounds[channel] + 1):
        y = np.float32(acc * unit) - norm.center[channel]
        y = y * norm.scale[channel] + norm.constant[channel] + np.float32(shortcut)
        code = int(y > 0) * 2 - 1 if bits == 1 else int(
            np.sign(y) * sum(abs(y) > np.float32(t) for t in grid))
        t = table[s, :, channel]
        count = (acc <= t if falling[channel] else acc >= t).sum()
        assert code == (2 * count - 1 if bits == 1 else count - len(grid)), (
            acc, channel)
        exact = scale[channel] / np.sqrt(var[channel] + 1e-4) * (
            acc * unit - mean[channel]) + bias[channel] + shortcut
        near = min(abs(abs(exact) - edge) for edge in [0, *grid])
        if near > 1e-4:
          size = 1 if bits == 1 else sum(abs(exact) > t for t in grid)
          assert code == (size if exact > 0 else -size)


class Residual(nn.Module):
  """What ResNets are made of: shortcuts of codes, projected, thinned out, filled."""

  bits: int = 1
  weights: int = 1

  @nn.compact
  def __call__(self, x, alpha=1.0, mode="hard"):
    conv = functools.partial(layers.QuantConv, bits=self.weights)
    norm = functools.partial(layers.NormQuant, bits=self.bits)
    x = conv(8, (7, 7), (2, 2), name="stem")(x, alpha, mode)
    x = nn.max_pool(x, (3, 3), (2, 2), padding=((1, 1), (1, 1)))
    x = norm(name="norm0")(x, alpha, mode)
    y = norm(name="norm1")(conv(8, name="conv1")(x, alpha, mode), alpha, mode)
    y = conv(8, name="conv2")(y, alpha, mode)
    x = norm(name="norm2")(y, alpha, mode, shortcut=x)
    side = conv(12, (1, 1), (2, 2), name="projection")(x, alpha, mode)
    side = norm(name="norm_side")(side, alpha, mode)
    y = conv(12, strides=(2, 2), name="conv3")(x, alpha, mode)
    x = norm(name="norm3")(y, alpha, mode, shortcut=side)
    y = conv(20, strides=(2, 2), name="conv4")(x, alpha, mode)
    side = jnp.pad(x[:, ::2, ::2], ((0, 0), (0, 0), (0, 0), (4, 4)))
    x = norm(name="norm4")(y, alpha, mode, shortcut=side)
    x = jnp.sum(x, (1, 2))
    x = layers.QuantDense(5, bits=self.weights, name="fc")(x, alpha, mode)
    return layers.NormQuant(bits=None, name="norm_fc")(x, mode=mode)


@pytest.mark.parametrize("weights, bits", [
    (2, 3), *(pytest.param(*slow, marks=pytest.mark.slow)
              for slow in ((1, 1), (3, 2)))])
def test_residual_network(weights, bits):
  program = assert_packs(Residual(bits, weights), size=37, untraced=bits == 1)
  assert sum(isinstance(op, packed.Shortcut) for op in program.ops) == 2
  assert not any(isinstance(op, packed.FloatNorm) for op in program.ops)


class Dense(nn.Module):
  """What DenseNets are made of: sums side by side, each reader with its own norm."""

  bits: int = 1
  weights: int = 3

  @nn.compact
  def __call__(self, x, alpha=1.0, mode="hard"):
    conv = functools.partial(layers.QuantConv, bits=self.weights)
    norm = functools.partial(layers.NormQuant, bits=self.bits)
    x = conv(6, name="stem")(x, alpha, mode)
    for i in range(3):
      y = norm(name=f"norm{i}")(x, alpha, mode)
      x = jnp.concatenate([x, conv(4, name=f"conv{i}")(y, alpha, mode)], -1)
    y = norm(name="norm_transition")(x, alpha, mode)
    y = nn.avg_pool(conv(9, (1, 1), name="transition")(y, alpha, mode), (2, 2), (2, 2))
    y = norm(name="norm_last")(y, alpha, mode)
    y = jnp.sum(y, (1, 2), keepdims=True).reshape(y.shape[0], -1)
    y = layers.QuantDense(5, bits=self.weights, name="fc")(y, alpha, mode)
    return layers.NormQuant(bits=None, name="norm_fc")(y, mode=mode)


@pytest.mark.parametrize("weights, bits", [
    (3, 1), *(pytest.param(*slow, marks=pytest.mark.slow)
              for slow in ((1, 3), (2, 2)))])
def test_dense_network(weights, bits):
  program = assert_packs(Dense(bits, weights), size=12, untraced=bits == 1)
  concats = [op for op in program.ops if isinstance(op, packed.Concat)]
  # Pixels count in 1/64, codes of 3 bits in 1/4 (and weights alike on both sides).
  assert [max(op.shifts) for op in concats] == [{1: 6, 2: 6, 3: 4}[bits]] * 3


class MobileNet(nn.Module):
  """Depthwise 3x3 and pointwise 1x1 convolutions in turn."""

  bits: tuple = (1, 1, 1)  # Activations before each depthwise convolution.
  weights: tuple = (1, 1, 1)  # Bits of the weights of each pair of convolutions.
  pad: float = 0.0

  @nn.compact
  def __call__(self, x, alpha=1.0, mode="hard"):
    x = layers.QuantConv(8, strides=(2, 2), name="stem")(x, alpha, mode)
    for i, (bits, weights) in enumerate(zip(self.bits, self.weights)):
      channels = x.shape[-1]
      conv = functools.partial(layers.QuantConv, bits=weights)
      norm = functools.partial(layers.NormQuant, bits=bits)
      x = norm(name=f"norm{i}a")(x, alpha, mode)
      x = conv((1 + (i == 2)) * channels, strides=(1 + i % 2,) * 2,
               name=f"depthwise{i}",
               pad_value=self.pad, kernel_dilation=(1 + i // 2, 1),
               feature_group_count=channels)(x, alpha, mode)
      x = norm(name=f"norm{i}b")(x, alpha, mode)
      x = conv(12 + 12 * i, (1, 1), name=f"pointwise{i}",
               feature_group_count=1 + i)(x, alpha, mode)
    x = norm(name="norm_last")(x, alpha, mode)
    x = layers.QuantDense(5, name="fc")(jnp.sum(x, (1, 2)), alpha, mode)
    return layers.NormQuant(bits=None, name="norm_fc")(x, mode=mode)


def same_logits(program, *backends, count=3):
  data = packed.to_bytes(program)
  images = np.random.default_rng(1).integers(
      0, 256, (count, *program.source_shape), np.uint8)
  want = infer.Network(data, "reference", 1).logits(images)
  for backend in backends:
    got = infer.Network(data, backend, 2).logits(images)
    np.testing.assert_array_equal(got, want, err_msg=backend)


@pytest.mark.parametrize("bits, weights, pad", [
    ((3, 1, 2), (1, 2, 3), 0.0),
    *(pytest.param(*slow, marks=pytest.mark.slow) for slow in (
        ((1, 1, 1), (1, 1, 1), 0.0), ((2, 2, 2), (2, 2, 2), 1.0),
        ((3, 3, 3), (3, 3, 3), -1.0)))])
def test_mobilenet(bits, weights, pad):
  model = MobileNet(bits, weights, pad)
  mixed = len(set(bits)) > 1
  program = assert_packs(model, size=15, count=3, untraced=mixed)
  assert not any(isinstance(op, packed.FloatNorm) for op in program.ops)
  assert [(op.groups, op.dilation) for op in program.ops if op.name[:5] == "depth"] == [
      (8, (1, 1)), (12, (1, 1)), (24, (2, 1))]
  same_logits(program, "native" if native.available() else "reference",
              *(["xla"] if mixed else []))  # It takes long to compile.


def test_mobilenet_learns():
  """Every kernel has a gradient, and the loss falls."""
  model, shape = MobileNet((1, 2), (1, 3)), (8, 8, 3)
  rng = np.random.default_rng(0)
  x = rng.normal(size=(16, *shape)).astype(np.float32)
  labels = jax.nn.one_hot(rng.integers(0, 5, 16), 5)
  shapes = jax.eval_shape(lambda: layers.initialize(model, shape))
  variables = jax.tree.map(
      lambda leaf: rng.normal(0, 0.3, leaf.shape).astype(np.float32) if leaf.ndim > 1
      else np.ones(leaf.shape, np.float32), shapes)

  @jax.jit
  def step(params, stats):
    def loss(params):
      logits, new = model.apply({"params": params, "batch_stats": stats}, x, 1.0,
                                mode="train", mutable="batch_stats")
      return -(jax.nn.log_softmax(logits) * labels).sum(-1).mean(), new["batch_stats"]
    (value, stats), gradients = jax.value_and_grad(loss, has_aux=True)(params)
    params = jax.tree.map(lambda p, g: p - 0.05 * jnp.sign(g), params, gradients)
    return value, gradients, params, stats

  params, stats = variables["params"], variables["batch_stats"]
  first, gradients, params, stats = step(params, stats)
  for name, layer in gradients.items():
    if "kernel" in layer:
      assert np.isfinite(layer["kernel"]).all() and layer["kernel"].any(), name
  for _ in range(10):
    value, _, params, stats = step(params, stats)
  assert value < 0.8 * first


class Net(nn.Module):
  """A conv layer, then what a test puts there, then logits."""

  body: object

  @nn.compact
  def __call__(self, x, alpha=1.0, mode="hard"):
    x = layers.QuantConv(4, name="conv1")(x, alpha, mode)
    x = self.body(x, alpha, mode)
    x = x.reshape(x.shape[0], -1)
    x = layers.QuantDense(3, name="fc")(x, alpha, mode)
    return layers.NormQuant(bits=None, name="norm_fc")(x, mode=mode)


def quantized(x, alpha, mode, **options):
  return layers.NormQuant(name="norm1", **options)(x, alpha, mode)


@pytest.mark.parametrize("body", [
    lambda x, *a: quantized(layers.max_pool(x, 3), *a),
    lambda x, *a: quantized(layers.max_pool(x, 2, True), *a),
    lambda x, *a: quantized(nn.max_pool(x, (2, 3), (1, 2)), *a),
    lambda x, *a: quantized(x, *a).max((1, 2)),
    lambda x, *a: layers.max_pool(quantized(x, *a), 2),
    lambda x, *a: nn.max_pool(quantized(x, *a, bits=3), (3, 3), (2, 2), "SAME"),
    lambda x, *a: nn.avg_pool(quantized(x, *a), (4, 2), (1, 1)),
    lambda x, *a: quantized(2 * x, *a),
    lambda x, *a: quantized(x + x / 4, *a),
    lambda x, *a: jnp.concatenate([quantized(x, *a)] * 2, -1),
    lambda x, *a: layers.QuantDense(6)(quantized(x, *a), *a),
    # Casts that keep every value: levels in any float, sums up to 2^11 in float16.
    lambda x, *a: quantized(x, *a, bits=3).astype(jnp.bfloat16),
    pytest.param(lambda x, *a: quantized(x, *a, bits=2).astype(jnp.int8),
                 marks=pytest.mark.slow),
    pytest.param(lambda x, *a: quantized(x, *a, bits=1).astype(jnp.float8_e4m3fn),
                 marks=pytest.mark.slow),
    lambda x, *a: jax.lax.reduce_precision(quantized(x, *a, bits=3), 5, 2),
    lambda x, *a: quantized(layers.QuantConv(5, (1, 1), name="conv2")(
        layers.NormQuant(name="norm0")(x, *a), *a).astype(jnp.bfloat16), *a),
    lambda x, *a: jnp.add(*jax.lax.optimization_barrier(
        (quantized(x, *a), layers.NormQuant(name="norm2")(x, *a)))),
], ids=range(17))
def test_what_may_stand_between_layers(body):
  assert_packs(Net(body), size=9)


@pytest.mark.parametrize("body, message", [
    (lambda x, *a: quantized(nn.relu(x), *a), "max of conv1 does not pack|relu"),
    (lambda x, *a: quantized(x + 1.0, *a), "adding a constant to conv1"),
    (lambda x, *a: quantized(x * 3.0, *a), "scaling conv1"),
    (lambda x, *a: quantized(x.mean((1, 2), keepdims=True), *a),
     "instead of the mean over a window of another size, take the sum"),
    (lambda x, *a: quantized(x[:, 1:], *a), "a slice of conv1"),
    (lambda x, *a: quantized(x[:, :-1], *a), "a part of conv1"),
    (lambda x, *a: quantized(jnp.transpose(x, (0, 2, 1, 3)), *a),
     "transpose of conv1 does not pack"),
    (lambda x, *a: quantized(x, *a, bits=4), "norm1: activations of 4 bits"),
    (lambda x, *a: quantized(x, *a, bits=1)[:, ::2, ::2, ::2], "a slice of norm1"),
    (lambda x, *a: layers.QuantConv(3, bits=5, name="conv2")(quantized(x, *a), *a),
     "conv2: weights of 5 bits"),
    (lambda x, *a: layers.QuantConv(3, pad_value=0.5, name="conv2")(
        quantized(x, *a), *a), "conv2: pad_value=0.5: must be one of -1, 0, 1 here"),
    (lambda x, *a: layers.NormQuant(name="again")(quantized(x, *a), *a),
     "again: its input is quantized already"),
    (lambda x, *a: jnp.pad(quantized(x, *a), ((0, 0), (1, 1), (0, 0), (0, 0))),
     "padding norm1 other than its channels"),
    (lambda x, *a: x[:, ::2, ::2], "a shortcut of conv1, which is not quantized"),
    (lambda x, *a: jnp.concatenate([x, x], 1), "must be concatenated in channels"),
    (lambda x, *a: jnp.sin(x), "sin of conv1 does not pack"),
    # Casts that round away what there can be.
    (lambda x, *a: quantized(x.astype(jnp.bfloat16), *a), "conv1 gives bfloat16"),
    (lambda x, *a: quantized(x.astype(jnp.float16), *a), "conv1 gives float16"),
    (lambda x, *a: quantized(x.astype(jnp.int32), *a), "conv1 gives int32"),
    (lambda x, *a: quantized(jax.lax.reduce_precision(x, 8, 7), *a),
     "reduce_precision of conv1 to 8 exponent and 7 mantissa bits"),
    (lambda x, *a: quantized(jax.lax.reduce_precision(x, 3, 23), *a),
     "reduce_precision of conv1 to 3 exponent and 23"),
    (lambda x, *a: quantized(x, *a, bits=3).astype(jnp.int8), "norm1 gives int8"),
    (lambda x, *a: quantized(x, *a, bits=3).astype(jnp.float8_e5m2fnuz).astype(
        jnp.float8_e4m3b11fnuz).astype(jnp.uint8), "norm1 gives uint8"),
    (lambda x, *a: quantized(x, *a).astype(bool), "gives bool|ne of norm1"),
    (lambda x, *a: layers.QuantConv(3, name="conv2")(
        quantized(x, *a).astype(jnp.uint8).astype(jnp.float32), *a), "gives uint8"),
    (lambda x, *a: jax.lax.div(quantized(x, *a, bits=2).astype(jnp.int32).sum((1, 2)),
                               2),
     r"div of sum_pool2 \(of norm1\) gives int32"),
    (lambda x, *a: quantized(x, *a).reshape(x.shape[0], 81, 4),
     r"reshaping norm1 from \(2, 9, 9, 4\) to \(2, 81, 4\) is not supported"),
    (lambda x, *a: quantized(x, *a)[:, None],
     r"broadcast_in_dim of norm1, from \(2, 9, 9, 4\) to \(2, 1, 9, 9, 4\), does not"),
    (lambda x, *a: quantized(x, *a)[:, :7:2, ::2],
     "a slice of norm1 with strides must be one of all its pixels"),
    (lambda x, *a: quantized(x, *a).max(1),
     r"a max of norm1 over axes \(1,\) is not supported"),
    (lambda x, *a: jax.lax.reduce_window(
        quantized(x, *a), -jnp.inf, jax.lax.max, (1, 1, 1, 2), (1, 1, 1, 2), "VALID"),
     "a max of norm1 must be over windows of its pixels"),
    (lambda x, *a: quantized(x - 1.0, *a), "a subtraction with conv1 is not supported"),
    (lambda x, *a: jnp.concatenate([quantized(x, *a), jnp.ones_like(x)], -1),
     "a constant cannot be concatenated to norm1"),
    (lambda x, *a: jnp.concatenate(
        [quantized(x, *a).reshape(x.shape[0], -1)] * 2, -1),
     "norm1: a flattened map cannot be concatenated"),
    (lambda x, *a: jnp.concatenate([quantized(x, *a, bits=2), x], -1),
     r"norm1 \(activations of 2 bits\), conv1 \(sums\): numbers of different kinds"),
    (lambda x, *a: quantized(x.reshape(x.shape[0], -1), *a),
     "norm1: batch norm cannot take a flattened map"),
    (lambda x, *a: layers.NormQuant(name="norm1")(x, *a, shortcut=x),
     "norm1: its shortcut is not quantized"),
    (lambda x, *a: layers.NormQuant(name="norm1")(x, *a, shortcut=jnp.ones_like(x)),
     "norm1: its input does not depend on the image"),
    (lambda x, *a: layers.QuantConv(3, name="conv2")(jnp.ones((2, 9, 9, 4)), *a),
     "conv2: its input does not depend on the image"),
], ids=range(39))
def test_what_may_not_is_refused_by_name(body, message):
  model = Net(body)
  variables = randomized(model, (9, 9, 3))
  with pytest.raises(ValueError, match=message):
    pack.pack(model, variables, pixels=PIXELS, source_shape=(9, 9, 3))


class Ends(nn.Module):
  """A quantized conv layer, and then the end that a test gives the network."""

  end: object

  @nn.compact
  def __call__(self, x, alpha=1.0, mode="hard"):
    x = layers.QuantConv(4, name="conv1")(x, alpha, mode)
    return self.end(quantized(x, alpha, mode), alpha, mode)


def logits_of(x, alpha, mode):
  x = layers.QuantDense(3, name="fc")(x.reshape(x.shape[0], -1), alpha, mode)
  return layers.NormQuant(bits=None, name="norm_fc")(x, mode=mode)


@pytest.mark.parametrize("end, message", [
    (lambda x, *a: (logits_of(x, *a), x),
     "norm_fc: the network returns 2 arrays; it must return the logits alone"),
    (lambda x, *a: (logits_of(x, *a), x)[1],
     "norm_fc: its result is not the one that the network returns"),
    (lambda x, *a: layers.NormQuant(bits=None, name="norm2")(
        layers.QuantConv(3, name="conv2")(x, *a), mode=a[1]),
     r"norm2: gives logits of shape \(9, 9, 3\), for each place of a map; sum over it"),
    (lambda x, *a: layers.QuantDense(3, name="fc")(x.reshape(x.shape[0], -1), *a),
     "fc: is the last layer, which must be a NormQuant with bits=None"),
    (lambda x, *a: logits_of(layers.NormQuant(bits=None, name="norm2")(
        layers.QuantConv(3, bits="float32", name="conv2")(x, *a), mode=a[1]), *a),
     "norm2: has bits=None, which only the last layer may have"),
], ids=range(5))
def test_a_network_that_does_not_end_in_its_logits_is_refused_by_name(end, message):
  model = Ends(end)
  variables = randomized(model, (9, 9, 3))
  with pytest.raises(ValueError, match="cannot be packed: " + message):
    pack.pack(model, variables, pixels=PIXELS, source_shape=(9, 9, 3))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.int8])
def test_casts_of_what_has_a_scale_are_refused(dtype):
  """The hard network has levels alone, which a cast keeps; in training it rounds."""
  lsq = estimators.by_name("lsq")
  model = Net(lambda x, *a: quantized(
      x, *a, bits=2, estimator=lsq).astype(dtype).astype(jnp.float32))
  variables = randomized(model, (9, 9, 3))
  with pytest.raises(ValueError, match=f"norm1: after it, .* cast to {dtype.__name__}"):
    fold.fold(model, variables, pixels_lib.probe(PIXELS, (9, 9, 3)))


@pytest.mark.parametrize("padding, strides, pad", [
    (((1, 1), (1, 1)), (4, 4), 0.0), (((1, 1), (1, 1)), (4, 4), 1.0),
    (((0, 2), (3, 1)), (2, 1), -1.0), (((0, 2), (3, 1)), (2, 1), 0.0),
    (((5, 0), (0, 4)), (1, 2), 1.0), (((5, 0), (0, 4)), (1, 2), -1.0),
    (((0, 0), (0, 0)), (1, 1), 1.0)])
def test_explicit_padding(padding, strides, pad):
  """The independent value is the hard network's, which test_layers holds."""
  program = assert_packs(Net(lambda x, *a: layers.QuantConv(
      5, (3, 3), strides, padding, pad, bits=2, name="conv2")(
          quantized(x, *a), *a)), size=9)
  conv, = (op for op in program.ops if op.name == "conv2")
  assert conv.pads == (*padding[0], *padding[1])


def test_pixels_must_be_integers():
  model = Net(quantized)
  pixels = pixels_lib.pixels("standardized", (0.5,) * 3, (0.2,) * 3)
  with pytest.raises(ValueError, match="only integer pixels pack"):
    pack.pack(model, randomized(model, (9, 9, 3)), pixels=pixels,
              source_shape=(9, 9, 3))


def scaled(model, weight_scale):
  """A network of `models` with weights that have scales, or learned steps."""
  lsq = estimators.by_name("lsq")
  learned = weight_scale.startswith("lsq")
  weights = dict(
      estimator=lsq, step_per_channel=weight_scale == "lsq_channels",
  ) if learned else dict(weight_scale=weight_scale)
  norm = dict(momentum=0.0) | (dict(estimator=lsq) if learned else {})
  return functools.partial(
      model, conv=functools.partial(layers.QuantConv, bits=2, **weights),
      dense=functools.partial(layers.QuantDense, bits=2, **weights),
      norm=functools.partial(layers.NormQuant, bits=2, **norm))


CONVNET = functools.partial(models.ConvNet, 3, (4, 5), (6,))
RESNET = functools.partial(models.ResNet, 3, (1, 1), (4, 8))


def assert_as_trained(program, model, variables):
  """The logits are the trained network's, where no code is next to a threshold."""
  size = program.crop[0]
  images = np.random.default_rng(0).integers(
      0, 256, (8, *program.source_shape), np.uint8)
  got = infer.Network(packed.to_bytes(program), "reference", 1).logits(images)
  crop = images[:, 1:1 + size, 1:1 + size]
  trained = jax.jit(lambda variables, images: model.apply(
      variables, pixels_lib.normalize(images, PIXELS), 1.0, mode="mixed"))(
          variables, crop)
  near = np.isclose(got, trained, rtol=1e-3, atol=1e-3)
  assert near.all(-1).sum() >= 6 and np.ptp(trained, 0).max() > 0.1


@pytest.mark.parametrize("model, weight_scale", [
    (CONVNET, "lsq_channels"),
    *(pytest.param(*slow, marks=pytest.mark.slow) for slow in (
        (CONVNET, "channel_mean"),
        (functools.partial(RESNET, projection=False), "lsq"),
        (CONVNET, "layer_mean"), (CONVNET, "lsq"),
        (functools.partial(RESNET, large_stem=True), "lsq"),
        (functools.partial(models.DenseNet, 3, (1, 1), 4), "channel_mean")))],
    ids=range(7))
def test_scales_fold(model, weight_scale):
  """Bit for bit, also through shortcuts of codes that have a scale."""
  network, shape = scaled(model, weight_scale)(), (17, 17, 3)
  rng = np.random.default_rng(2)
  x = pixels_lib.normalize(rng.integers(0, 256, (8, *shape), np.uint8), PIXELS)
  variables = jax.jit(lambda: layers.initialize(network, shape))()
  variables["params"] = jax.tree_util.tree_map_with_path(
      lambda path, leaf: leaf * np.float32(rng.choice([-1, 0.6, 1.4], leaf.shape))
      + np.float32(0.2 * (path[-1].key in ("scale", "bias"))), variables["params"])
  apply = jax.jit(network.apply, static_argnames=("mode", "mutable"))
  _, stats = apply(variables, x, 1.0, mode="train", mutable="batch_stats")
  variables = jax.device_get({**variables, **stats})
  program = assert_packs(network, size=17, count=3, variables=variables)
  assert not any(isinstance(op, packed.FloatNorm) for op in program.ops)
  # And the logits are the trained network's, where no code is next to a threshold.
  hard = fold.fold(network, variables, pixels_lib.probe(PIXELS, shape))
  trained = apply(variables, x, 1.0, mode="mixed")
  near = np.isclose(apply(hard, x, 1.0, mode="hard"), trained, rtol=1e-3, atol=1e-3)
  assert near.all(-1).sum() >= 6 and np.ptp(trained, 0).min() > 0.1


@pytest.mark.parametrize("model, bits", [
    (CONVNET, 2), pytest.param(RESNET, 3, marks=pytest.mark.slow)], ids=range(2))
def test_learned_thresholds_pack(model, bits):
  """Channels have thresholds of their own, batch norms of any sign, and shortcuts."""
  model = model(norm=functools.partial(
      layers.NormQuant, bits=bits, learn_thresholds=True))
  program = assert_packs(model)
  assert {op.bits for op in program.ops if isinstance(op, packed.Threshold)} == {bits}


def test_learned_thresholds_beside_floats_are_refused_by_name():
  norm = functools.partial(layers.NormQuant, bits=2, learn_thresholds=True)
  model = CONVNET(conv=functools.partial(layers.QuantConv, bits="float32"), norm=norm)
  with pytest.raises(ValueError, match="norm_conv1: learn_thresholds is not supported"):
    pack.pack(model, randomized(model, (9, 9, 3)), pixels=PIXELS,
              source_shape=(9, 9, 3))


def test_periodic_weights_pack():
  """The codes are the signs of a sine that crosses 0 many times."""
  weights = dict(frequency=60.0, estimator=estimators.by_name("ste"))
  model = CONVNET(conv=functools.partial(layers.QuantConv, **weights),
                  dense=functools.partial(layers.QuantDense, **weights))
  variables = randomized(model, (13, 13, 3), 0)
  program = assert_packs(model, variables=variables)
  op = next(op for op in program.ops if op.name == "conv2")
  latent = np.float64(variables["params"]["conv2"]["kernel"])
  want = np.where(np.sin(60 * latent) > 0, 1, -1)
  np.testing.assert_array_equal(op.kernel.transpose(1, 2, 3, 0), want)
  assert (want != np.sign(latent)).mean() > 0.3


def test_scales_of_shortcuts_beside_floats():
  class Mixed(nn.Module):

    @nn.compact
    def __call__(self, x, alpha=1.0, mode="hard"):
      norm = functools.partial(
          layers.NormQuant, bits=2, estimator=estimators.by_name("lsq"))
      x = norm(name="norm1")(layers.QuantConv(4)(x, alpha, mode), alpha, mode)
      y = layers.QuantConv(4, bits="bfloat16")(x, alpha, mode)
      y = norm(name="norm2")(y, alpha, mode, shortcut=x)
      y = layers.QuantDense(3)(y.reshape(y.shape[0], -1), alpha, mode)
      return layers.NormQuant(bits=None)(y, mode=mode)

  program = assert_packs(Mixed(), size=9)
  op, = (op for op in program.ops if isinstance(op, packed.FloatNorm))
  assert op.shortcut_unit not in (0, 1) and op.grid == np.float32(0.5)


def test_scales_that_differ_between_groups_fold():
  """Inputs of two learned steps side by side, and channel means into a depthwise."""
  lsq = estimators.by_name("lsq")

  def body(x, *a):
    x = jnp.concatenate([
        layers.NormQuant(bits=2, estimator=lsq, name=f"n{i}")(x, *a) for i in (0, 1)],
        -1)
    x = layers.QuantConv(6, bits=2, feature_group_count=2, weight_scale="channel_mean",
                         name="grouped")(x, *a)
    x = layers.QuantConv(6, feature_group_count=6, name="depthwise")(x, *a)
    return layers.NormQuant(bits=3, name="last")(x, *a)

  model, shape = Net(body), (9, 9, 3)
  variables = randomized(model, shape)
  variables["params"]["n0"]["step"] = np.float32(0.7)
  variables["params"]["n1"]["step"] = np.float32(1.9)
  program = assert_packs(model, size=9, variables=variables)
  assert not any(isinstance(op, packed.FloatNorm) for op in program.ops)
  assert_as_trained(program, model, variables)


def test_border_too_wide_for_the_format_is_refused_by_name():
  model = Net(lambda x, *a: layers.QuantConv(
      4, kernel_dilation=(65, 1), name="wide")(quantized(x, *a), *a))
  with pytest.raises(ValueError, match="layer wide: a dilation of 65"):
    pack.pack(model, randomized(model, (9, 9, 3)), pixels=PIXELS,
              source_shape=(9, 9, 3))


@pytest.mark.parametrize("body, message", [
    (lambda x, conv, norm, *a: norm(name="n")(x + conv(4, name="b")(x, *a), *a),
     "b: gets channels of different scales, which do not fold"),
    (lambda x, conv, norm, *a: norm(name="n")(
        x + conv(4, name="b")(norm(name="m")(x, *a), *a), *a),
     "n: gets sums of different scales, which do not fold"),
    (lambda x, conv, norm, *a: norm(name="n")(x + 1.0, *a),
     "n: gets sums of different scales, which do not fold"),
    (lambda x, conv, norm, *a: norm(name="n")(x, *a, shortcut=x),
     "n: gets a shortcut that is not quantized, of another scale"),
    (lambda x, conv, norm, *a: conv(4, pad_value=1.0, name="b")(
        layers.NormQuant(estimator=estimators.by_name("lsq"))(x, *a), *a),
     "b: pad_value=1.0 beside inputs that have a scale"),
    (lambda x, conv, norm, *a: conv(4, name="b")(jnp.concatenate([
        layers.NormQuant(estimator=estimators.by_name("lsq"))(x, *a) for _ in range(2)
    ], -1), *a), "b: gets channels of different scales, which do not fold"),
], ids=range(6))
def test_scales_that_do_not_fold(body, message):
  conv = functools.partial(layers.QuantConv, weight_scale="channel_mean")
  model = Net(lambda x, *a: body(
      conv(4, name="a")(layers.NormQuant()(x, *a), *a), conv, layers.NormQuant, *a))
  with pytest.raises(ValueError, match=message):
    pack.pack(model, randomized(model, (9, 9, 3)), pixels=PIXELS,
              source_shape=(9, 9, 3))


def test_a_network_ends_in_a_norm_if_it_has_scales():
  model = layers.QuantDense(3, weight_scale="layer_mean")
  variables = {"params": {"kernel": np.float32([[0.5, -0.25, 3]])}, "batch_stats": {}}
  with pytest.raises(ValueError, match="the network's output has a scale: a NormQuant"):
    fold.fold(model, variables, fold.Probe(*np.ones((3, 1))))


def test_labels_are_as_many_as_classes():
  model = Net(quantized)
  with pytest.raises(ValueError, match="2 labels for 3 classes"):
    pack.pack(model, randomized(model, (9, 9, 3)), pixels=PIXELS,
              source_shape=(9, 9, 3), labels=("a", "b"))


def test_size_of_convnet_a():
  """At most 1.25 MiB with all thresholds, for 1.234 MiB of weights."""
  model = models.ConvNet(10, *models.CONVNETS["A"])
  shape = (24, 24, 3)
  variables = jax.tree.map(
      lambda leaf: np.ones(leaf.shape, leaf.dtype),
      jax.eval_shape(lambda: layers.initialize(model, shape)))
  program = pack.pack(model, variables, pixels=PIXELS, source_shape=(32, 32, 3),
                      crop=shape[:2], labels=[f"class {i}" for i in range(10)])
  size = len(packed.to_bytes(program))
  assert 10_352_000 // 8 < size <= 1.25 * 2**20


@pytest.mark.slow
@pytest.mark.parametrize("name, bits", [
    ("resnet18", (1, 1)), ("resnet34", (2, 2)), ("resnet50", (3, 1)),
    ("resnet110", (1, 3)), ("densenet100", (3, 2)), ("alexnet", (3, 3))])
def test_whole_networks(name, bits):
  """At full width, integer throughout; on small images, for time's sake."""
  size = 60 if name == "alexnet" else 32
  program = assert_packs(models.NETWORKS[name](
      10, conv=functools.partial(layers.QuantConv, bits=bits[0]),
      dense=functools.partial(layers.QuantDense, bits=bits[0]),
      norm=functools.partial(layers.NormQuant, bits=bits[1])), size=size, count=2)
  assert not any(isinstance(op, packed.FloatNorm) for op in program.ops)
