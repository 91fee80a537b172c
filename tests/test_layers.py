"""Layers against NumPy float64: a direct convolution, batch norm and Eq 6 by hand."""

import functools
import pathlib
import subprocess
import sys

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from float64_convnet import h
from minw import estimators
from minw import fold
from minw import fold_probe
from minw import layers
from minw import models
from minw import quantizers

# By bits: the ascending positive levels, thresholds of activations, and factors on the
# mean magnitude for weights.
LEVELS = {1: [1.0], 2: [1.0], 3: [0.25, 0.5, 1.0]}
THRESHOLDS = {1: [], 2: [0.1], 3: [0.125, 0.375, 0.75]}
FACTORS = {1: [], 2: [0.7], 3: [0.3125, 0.9375, 1.875]}


def applied(layer, variables, x, alpha=1.0, mode="hard", **options):
  """`layer.apply` as one program: alone, each of its operations would be compiled."""
  return jax.jit(lambda variables, x, alpha: layer.apply(
      variables, x, alpha, mode, **options))(variables, x, alpha)


def mixed_kernel(kernel, bits, alpha) -> np.ndarray:
  """alpha h(w) + (1 - alpha) w, thresholds proportional to the layer's mean |w|."""
  kernel = np.float64(kernel)
  thresholds = [factor * np.abs(kernel).mean() for factor in FACTORS[bits]]
  return alpha * h(kernel, thresholds, LEVELS[bits]) + (1 - alpha) * kernel


def mixed_input(y, bits, alpha) -> np.ndarray:
  y = np.clip(y, -1, 1)
  return alpha * h(y, THRESHOLDS[bits], LEVELS[bits]) + (1 - alpha) * y


def convolve(x, kernel, strides, padding, pad_value, dilation=(1, 1), groups=1):
  """A direct convolution in float64: one product for each place of the kernel."""
  height, width = x.shape[1:3]
  kh, kw = ((n - 1) * step + 1 for n, step in zip(kernel.shape[:2], dilation))
  inputs, outputs = kernel.shape[2], kernel.shape[3] // groups
  (top, bottom), (left, right) = (
      ((0, 0), (0, 0)) if isinstance(padding, str) else padding)
  out_h = (height + top + bottom - kh) // strides[0] + 1
  out_w = (width + left + right - kw) // strides[1] + 1
  if padding == "SAME":  # As TensorFlow: the odd pixel comes after the image.
    out_h, out_w = -(-height // strides[0]), -(-width // strides[1])
    top = max((out_h - 1) * strides[0] + kh - height, 0) // 2
    left = max((out_w - 1) * strides[1] + kw - width, 0) // 2
  out = np.zeros((len(x), out_h, out_w, kernel.shape[-1]))
  for i, j in np.ndindex(out_h, out_w):
    for k, m in np.ndindex(kernel.shape[:2]):
      row = i * strides[0] + k * dilation[0] - top
      column = j * strides[1] + m * dilation[1] - left
      inside = 0 <= row < height and 0 <= column < width
      pixel = x[:, row, column] if inside else np.full(
          (len(x), x.shape[-1]), pad_value)
      for group in range(groups):
        to = slice(group * outputs, (group + 1) * outputs)
        out[:, i, j, to] += (
            pixel[:, group * inputs:(group + 1) * inputs] @ kernel[k, m, :, to])
  return out


def batch_norm(x, mean, var, scale, bias, epsilon=1e-4) -> np.ndarray:
  return (x - mean) / np.sqrt(var + epsilon) * scale + bias


def norm_variables(mean, var, scale, bias):
  as_float = lambda **values: {"batch_norm": {
      name: np.asarray(value, np.float32) for name, value in values.items()}}
  return {"params": as_float(scale=scale, bias=bias),
          "batch_stats": as_float(mean=mean, var=var)}


def identity_norm(channels):
  """With epsilon = 0, batch norm that changes nothing."""
  ones = np.ones(channels)
  return norm_variables(0 * ones, ones, ones, 0 * ones)


# Layers with weights.


@pytest.mark.parametrize("bits, size, kernel_size, strides, padding, pad", [
    (1, (5, 6), (3, 3), (1, 1), "SAME", 0.0),
    (2, (5, 6), (3, 3), (2, 2), "SAME", 1.0),
    (3, (6, 7), (3, 3), (2, 2), "SAME", -1.0),
    (1, (7, 5), (2, 5), (1, 2), "SAME", -1.0),
    (2, (7, 7), (4, 4), (3, 1), "SAME", 1.0),
    (3, (7, 6), (5, 5), (1, 1), "SAME", 1.0),
    (1, (4, 4), (1, 1), (1, 1), "SAME", 1.0),
    (2, (5, 4), (1, 1), (2, 3), "VALID", -1.0),
    (3, (7, 6), (5, 4), (2, 1), "VALID", 1.0),  # VALID has nothing to pad.
    (1, (6, 5), (3, 3), (1, 1), "VALID", 0.0),
    (1, (8, 8), (3, 3), (4, 4), ((1, 1), (1, 1)), 0.0),
    (2, (5, 4), (3, 2), (2, 1), ((0, 2), (3, 1)), -1.0),
    (3, (4, 5), (3, 3), (1, 2), [[4, 0], [0, 5]], 1.0),  # Windows of the border alone.
    (1, (5, 5), (3, 3), (1, 1), ((0, 0), (0, 0)), 1.0),
])
def test_convolution(bits, size, kernel_size, strides, padding, pad):
  rng = np.random.default_rng(size[0] + kernel_size[1])
  x = rng.normal(size=(2, *size, 3)).astype(np.float32)
  kernel = rng.normal(0, 0.5, (*kernel_size, 3, 4)).astype(np.float32)
  layer = layers.QuantConv(4, kernel_size, strides, padding, pad, bits=bits)
  fresh = jax.eval_shape(lambda: layer.init(jax.random.key(0), x, 1.0, "train"))
  assert fresh["params"]["kernel"].shape == kernel.shape
  apply = jax.jit(functools.partial(layer.apply, mode="mixed"))
  for alpha in (0.0, 0.3, 1.0):
    got = apply({"params": {"kernel": kernel}}, x, alpha)
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, convolve(
        x, mixed_kernel(kernel, bits, alpha), strides, padding, pad), atol=2e-5)


@pytest.mark.parametrize("groups, channels, features, dilation, strides, padding", [
    (4, 4, 4, (1, 1), (1, 1), "SAME"),
    (3, 3, 6, (1, 1), (2, 2), "SAME"),
    (2, 6, 4, (1, 1), (1, 2), "VALID"),
    (1, 2, 3, (2, 2), (1, 1), "SAME"),
    (1, 2, 3, (3, 1), (2, 3), "VALID"),
    (1, 1, 2, (1, 9), (1, 1), "SAME"),  # Wider than the map.
    (3, 3, 3, (2, 1), (2, 2), "SAME"),
    (2, 4, 6, (1, 2), (1, 1), ((3, 0), (1, 2))),
])
def test_groups_and_dilation(groups, channels, features, dilation, strides, padding):
  rng = np.random.default_rng(groups)
  x = rng.normal(size=(2, 7, 8, channels)).astype(np.float32)
  kernel = rng.normal(0, 0.5, (3, 3, channels // groups, features)).astype(np.float32)
  for bits, pad in ((1, 0.0), (3, -1.0)):
    layer = layers.QuantConv(
        features, (3, 3), strides, padding, pad, bits=bits,
        feature_group_count=groups, kernel_dilation=dilation)
    fresh = jax.eval_shape(lambda: layer.init(jax.random.key(0), x, 1.0, "train"))
    assert fresh["params"]["kernel"].shape == kernel.shape
    got = applied(layer, {"params": {"kernel": kernel}}, x, 0.3, "mixed")
    np.testing.assert_allclose(got, convolve(
        x, mixed_kernel(kernel, bits, 0.3), strides, padding, pad, dilation, groups),
                               atol=2e-5)


@pytest.mark.parametrize("groups", (1, 2, 4))
def test_scales_and_means_of_channels_in_groups(groups):
  """They are over the weights that an output channel has."""
  rng = np.random.default_rng(0)
  x = rng.choice([-1.0, 1.0], (1, 3, 3, 4)).astype(np.float32)
  kernel = rng.normal(size=(3, 3, 4 // groups, 8)).astype(np.float32)
  layer = layers.QuantConv(
      8, padding="VALID", bits=2, threshold_rule="channel_mean",
      weight_scale="channel_mean", feature_group_count=groups)
  mean = np.abs(kernel.astype(np.float64)).reshape(-1, 8).mean(0)
  levels = np.sign(kernel) * (np.abs(kernel) > 0.7 * mean)
  np.testing.assert_allclose(
      applied(layer, {"params": {"kernel": kernel}}, x, 1.0, "mixed"),
      convolve(x, levels * mean, (1, 1), "VALID", 0, groups=groups), atol=2e-5)


def test_groups_that_do_not_divide_the_inputs():
  layer = layers.QuantConv(6, feature_group_count=3)
  with pytest.raises(ValueError, match="feature_group_count=3 must divide .* 4 input"):
    layer.init(jax.random.key(0), np.zeros((1, 5, 5, 4)), mode="train")


@pytest.mark.parametrize("attribute, value", [
    ("padding", "same"), ("padding", "SAME_LOWER"), ("padding", "CIRCULAR"),
    ("padding", 1), ("padding", (1, 1)), ("padding", ((1, 1),)), ("padding", None),
    ("padding", ((1, 1), (1, -1))), ("padding", ((1, 1), (1, 0.5))),
    ("padding", ((0, 0), (1, 1), (1, 1), (0, 0))), ("padding", ((True, 1), (1, 1))),
    ("strides", 2), ("strides", (2,)), ("strides", (0, 1)), ("strides", (1, 1.0)),
    ("kernel_size", 3), ("kernel_size", (3, 3, 3)), ("kernel_size", (0, 3)),
    ("features", 0), ("features", 4.0), ("kernel_dilation", 2),
    ("kernel_dilation", (0, 1)), ("kernel_dilation", (1, 1, 1)),
    ("feature_group_count", 0), ("feature_group_count", 3),
])
def test_attributes_of_a_convolution_that_are_wrong(attribute, value):
  with pytest.raises(ValueError, match=f"{attribute}=.*: must be"):
    layers.QuantConv(**{"features": 4, attribute: value})


def test_input_of_a_convolution_that_is_no_map():
  with pytest.raises(ValueError, match=r"an input of shape \(2, 12\)"):
    layers.QuantConv(4).init(jax.random.key(0), jnp.zeros((2, 12)), mode="train")


@pytest.mark.parametrize("bits", [1, 2, 3])
def test_dense(bits):
  rng = np.random.default_rng(bits)
  x = rng.normal(size=(3, 20)).astype(np.float32)
  kernel = rng.normal(0, 0.5, (20, 7)).astype(np.float32)
  apply = jax.jit(functools.partial(
      layers.QuantDense(7, bits=bits).apply, mode="mixed"))
  for alpha in (0.0, 0.3, 1.0):
    got = apply({"params": {"kernel": kernel}}, x, alpha)
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, x @ mixed_kernel(kernel, bits, alpha), atol=2e-5)


@pytest.mark.parametrize("rule, thresholds, want", [
    ("layer_mean", (), [[0.0, 1.0], [1.0, 1.0]]),  # 0.7 * 0.5
    ("layer_mean", (1.0,), [[0.0, 1.0], [0.0, 0.0]]),
    ("channel_mean", (), [[0.0, 1.0], [1.0, 0.0]]),  # 0.7 * (0.3, 0.7)
    ("channel_mean", (0.2,), [[1.0, 1.0], [1.0, 1.0]]),
    ("fixed", (), [[1.0, 1.0], [1.0, 1.0]]),  # 0.1
    ("fixed", (0.25,), [[0.0, 1.0], [1.0, 1.0]]),
])
def test_threshold_rules_of_weights(rule, thresholds, want):
  kernel = np.float32([[0.125, -1.0], [0.475, -0.4]])  # Means 0.3 and 0.7.
  layer = layers.QuantDense(2, bits=2, threshold_rule=rule, thresholds=thresholds)
  variables = {"params": {"kernel": kernel}}
  got = applied(layer, variables, np.eye(2, dtype="f4"), 1.0, "mixed")
  np.testing.assert_array_equal(got, np.sign(kernel) * want)
  _, folded = layer.apply(variables, np.ones((7, 2), "f4"), mode="fold",
                          mutable=["hard"])
  np.testing.assert_array_equal(folded["hard"]["kernel"], np.sign(kernel) * want)
  wide = layers.QuantConv(2, (1, 2), padding="VALID", bits=2, threshold_rule=rule,
                          thresholds=thresholds)
  got = applied(wide, {"params": {"kernel": kernel[None, :, None]}},
                np.float32([1, 0, 0, 1]).reshape(2, 1, 2, 1), 1.0, "mixed")
  np.testing.assert_array_equal(got[:, 0, 0], np.sign(kernel) * want)


def test_float32_weights_are_neither_quantized_nor_clipped():
  kernel = np.float32([[3.0, -0.3], [0.001, -7.5]])
  layer = layers.QuantDense(2, bits="float32")
  for alpha in (0.5, 1.0):
    for mode in ("train", "mixed"):
      got = layer.apply({"params": {"kernel": kernel}}, np.eye(2, dtype="f4"), alpha,
                        mode)
      np.testing.assert_array_equal(got, kernel)
  gradient = jax.grad(lambda kernel: layer.apply(
      {"params": {"kernel": kernel}}, np.eye(2, dtype="f4"), 1.0, "train").sum())
  np.testing.assert_array_equal(gradient(kernel), np.ones((2, 2)))


def test_weights_in_a_float_format_are_rounded_and_not_mixed():
  kernel = np.float32([[1.00390625 + 2**-10, -0.3]])  # bfloat16: 1 + 2^-7, -0.30078125.
  for alpha in (0.0, 1.0):
    got = applied(layers.QuantDense(2, bits="bfloat16"),
                  {"params": {"kernel": kernel}}, np.ones((1, 1), "f4"), alpha, "mixed")
    np.testing.assert_array_equal(got, [[1.0078125, -0.30078125]])


@pytest.mark.parametrize("mode", ["train", "mixed"])
def test_sums_are_float32_whatever_the_operands(mode):
  # Odd numbers above 256 are none of bfloat16's.
  rng = np.random.default_rng(0)
  x = np.where(rng.random((2, 4, 5, 45)) < 0.9, 1, -1).astype(np.float32)
  kernel = np.where(rng.random((4, 4, 45, 4)) < 0.9, 0.25, -0.5).astype(np.float32)
  conv = layers.QuantConv(4, (4, 4), dtype=jnp.bfloat16, bits=1)
  want = convolve(x, np.sign(kernel), (1, 1), "SAME", 0.0)
  assert ((want > 256) & (np.mod(want, 2) == 1)).any()
  got = applied(conv, {"params": {"kernel": kernel}}, x, 1.0, mode)
  assert got.dtype == jnp.float32
  np.testing.assert_array_equal(got, want)
  x, kernel = x.reshape(2, -1)[:, :719], kernel.reshape(-1, 4)[:719]
  got = applied(layers.QuantDense(4, dtype=jnp.bfloat16, bits=1),
                {"params": {"kernel": kernel}}, x, 1.0, mode)
  assert got.dtype == jnp.float32
  want = x @ np.sign(kernel)
  assert (want > 256).any() and (np.mod(want, 2) == 1).all()
  np.testing.assert_array_equal(got, want)


def test_operands_are_rounded_to_the_compute_type():
  kernel, x = np.full((1, 1), 1 / 3, "f4"), np.full((1, 1), 1.01, "f4")
  third, one = 0.333984375, 1.0078125  # The nearest bfloat16.
  layer = layers.QuantDense(1, dtype=jnp.bfloat16, bits=1)
  got = applied(layer, {"params": {"kernel": kernel}}, x, 0.0, "train")
  assert got[0, 0] == third * one
  conv = layers.QuantConv(1, (1, 1), dtype=jnp.bfloat16, bits=1)
  loss = lambda kernel: conv.apply(
      {"params": {"kernel": kernel}}, x[None, None], 0.5, "train").sum()
  value, gradient = jax.jit(jax.value_and_grad(loss))(kernel[None, None])
  assert value == 0.66796875 * one  # (1 + 1/3) / 2, rounded.
  assert gradient.dtype == jnp.float32 and gradient[0, 0, 0, 0] == one


def test_training_rounds_sums():
  """257 is no bfloat16. Only steps of training round it, and their gradients."""
  dtypes = dict(dtype=jnp.bfloat16, sum_dtype=jnp.bfloat16)
  for module, shape in ((layers.QuantConv(1, (1, 1), **dtypes), (1, 1, 1, 257)),
                        (layers.QuantDense(1, **dtypes), (1, 257))):
    x = np.ones(shape, "f4")
    kernel = np.swapaxes(x, -1, -2)
    run = lambda kernel, mode, x=x, module=module: module.apply(
        {"params": {"kernel": kernel}}, x, 1.0, mode).sum()
    assert run(kernel, "mixed") == 257
    value, gradient = jax.value_and_grad(run)(kernel, "train")
    assert value == 256 and value.dtype == gradient.dtype == jnp.float32
    text = jax.jit(jax.grad(run), static_argnums=1).lower(kernel, "train").as_text()
    products = [line for line in text.splitlines()
                if "stablehlo.convolution" in line or "dot_general" in line]
    assert products and not any("xf32>" in line for line in products)


def test_the_hard_network_computes_in_float32():
  kernel, x = np.full((1, 1, 1, 1), 1 / 3, "f4"), np.full((1, 1, 1, 1), 1.01, "f4")
  conv = layers.QuantConv(1, (1, 1), dtype=jnp.bfloat16, bits="float32")
  assert conv.apply({"hard": {"kernel": kernel}}, x) == kernel * x
  dense = layers.QuantDense(1, dtype=jnp.bfloat16, bits="float32")
  assert dense.apply({"hard": {"kernel": kernel[0, 0]}}, x[0, 0]) == (kernel * x)[0, 0]


@pytest.mark.gpu
@pytest.mark.parametrize("kernel_size, strides, pads, dilation, groups", [
    ((3, 3), (1, 1), ((1, 1), (1, 1)), (1, 1), 1),
    ((3, 2), (2, 1), ((0, 2), (1, 0)), (2, 1), 2),
    ((1, 1), (2, 2), ((0, 0), (0, 0)), (1, 1), 1),
    ((3, 3), (2, 3), ((1, 1), (0, 1)), (1, 2), 4),
    ((5, 1), (1, 2), ((2, 2), (0, 0)), (1, 1), 2)])
def test_exact_sums_of_accelerators(kernel_size, strides, pads, dilation, groups):
  """Matrix products against the sums of a convolution, which this CPU has exactly."""
  rng = np.random.default_rng(0)
  x = rng.integers(-4, 5, (2, 9, 10, 4)).astype(np.float32)
  kernel = rng.integers(-4, 5, (*kernel_size, 4 // groups, 8)).astype(np.float32)
  want = jax.lax.conv_general_dilated(
      x, kernel, strides, pads,
      rhs_dilation=dilation, feature_group_count=groups,
      dimension_numbers=("NHWC", "HWIO", "NHWC"))
  got = layers._matrix_products(x, kernel, strides, pads, dilation, groups)
  assert got.dtype == jnp.float32
  np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("platform, convolutions, products", [
    ("cpu", 1, 0), ("tpu", 1, 0), ("cuda", 0, 9), ("rocm", 0, 9)])
def test_hard_networks_use_no_convolutions_of_gpus(platform, convolutions, products):
  conv = layers.QuantConv(4, (3, 3), bits=1)
  kernel, x = np.ones((3, 3, 2, 4), "f4"), np.ones((1, 5, 5, 2), "f4")
  run = jax.jit(lambda x: conv.apply({"hard": {"kernel": kernel}}, x, 1.0, "hard"))
  text = run.trace(x).lower(lowering_platforms=(platform,)).as_text()
  assert text.count("stablehlo.convolution") == convolutions
  assert text.count("stablehlo.dot_general") == products


# Batch norm, shortcut, HardTanh, quantizer.


@pytest.mark.parametrize("bits", [1, 2, 3, "float32", None])
@pytest.mark.parametrize("has_shortcut", [False, True])
def test_order_of_what_follows_the_sums(bits, has_shortcut):
  rng = np.random.default_rng(2)
  x = rng.normal(0, 5, (4, 3, 3, 6)).astype(np.float32)
  mean, var = rng.normal(0, 2, 6), rng.uniform(5, 90, 6)
  scale, bias = rng.normal(size=6), rng.normal(size=6) / 2
  shortcut = rng.choice([-1, -0.5, 0, 0.5, 1], x.shape).astype(np.float32)
  y = batch_norm(x, mean, var, scale, bias) + has_shortcut * shortcut
  assert (np.abs(y) > 1).mean() > 0.1  # The order shows.
  variables = norm_variables(mean, var, scale, bias)
  apply = jax.jit(functools.partial(
      layers.NormQuant(bits=bits).apply, mode="mixed",
      shortcut=shortcut if has_shortcut else None))
  for alpha in (0.0, 0.3, 1.0):
    if bits is None:
      want = y
    elif bits == "float32":
      want = np.clip(y, -1, 1)
    else:
      want = mixed_input(y, bits, alpha)
    got = apply(variables, x, alpha)
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, want, atol=1e-5)


def test_activations_in_a_float_format():
  x = np.float32([[0.3, -0.3, 1.5, 2**-12]])
  layer = layers.NormQuant(bits="float8_e4m3fn", epsilon=0.0)
  for alpha in (0.0, 1.0):
    got = applied(layer, identity_norm(4), x, alpha, "mixed")
    np.testing.assert_array_equal(got, [[0.3125, -0.3125, 1, 0]])


def test_settings_of_batch_norm_and_thresholds():
  x = np.float32([[0.3], [-0.3], [0.6], [-0.1]])
  layer = layers.NormQuant(bits=2, thresholds=(0.5,), epsilon=0.0)
  np.testing.assert_array_equal(
      applied(layer, identity_norm(1), x, 1.0, "mixed"), [[0], [0], [1], [0]])
  # Thresholds meant for other bits give way to the defaults.
  layer = layers.NormQuant(bits=2, thresholds=(0.2, 0.5, 0.9), epsilon=0.0)
  np.testing.assert_array_equal(
      applied(layer, identity_norm(1), x, 1.0, "mixed"), [[1], [-1], [1], [0]])
  unscaled = identity_norm(1)
  del unscaled["params"]["batch_norm"]["scale"]
  layer = layers.NormQuant(bits=None, epsilon=3.0, use_scale=False)
  np.testing.assert_array_equal(applied(layer, unscaled, x, 1.0, "mixed"), x / 2)


@pytest.mark.parametrize("momentum", [0.9, 0.25])
def test_statistics_of_the_batch_and_running_ones(momentum):
  rng = np.random.default_rng(3)
  x = rng.normal([3, -20, 0], [1, 5, 40], (16, 4, 2, 3)).astype(np.float32)
  mean, var = np.array([1.0, 2, 3]), np.array([4.0, 5, 6])
  scale, bias = np.array([0.5, -1, 2]), np.array([0.1, 0.2, -0.3])
  variables = norm_variables(mean, var, scale, bias)
  layer = layers.NormQuant(bits="float32", momentum=momentum, epsilon=1e-3)
  batch_mean = x.mean((0, 1, 2), dtype=np.float64)
  batch_var = x.var((0, 1, 2), dtype=np.float64)  # The biased variance of the batch.
  got, updated = applied(layer, variables, x, 1.0, "train", mutable=["batch_stats"])
  np.testing.assert_allclose(got, np.clip(batch_norm(
      x, batch_mean, batch_var, scale, bias, 1e-3), -1, 1), atol=1e-5)
  stats = updated["batch_stats"]["batch_norm"]
  np.testing.assert_allclose(
      stats["mean"], momentum * mean + (1 - momentum) * batch_mean, rtol=1e-5)
  np.testing.assert_allclose(
      stats["var"], momentum * var + (1 - momentum) * batch_var, rtol=1e-5)

  got, updated = applied(layer, variables, x, 1.0, "mixed", mutable=["batch_stats"])
  np.testing.assert_allclose(got, np.clip(
      batch_norm(x, mean, var, scale, bias, 1e-3), -1, 1), atol=1e-5)
  kept = updated["batch_stats"]["batch_norm"]
  np.testing.assert_array_equal(kept["mean"], np.float32(mean))
  np.testing.assert_array_equal(kept["var"], np.float32(var))


@pytest.mark.parametrize("use_scale", [True, False])
@pytest.mark.parametrize("shape", [(12, 3), (12, 5, 2, 3)])
def test_statistics_of_groups(shape, use_scale):
  rng = np.random.default_rng(4)
  x = rng.normal([3, -20, 0], [1, 5, 40], shape).astype(np.float32)
  mean, var = np.array([1.0, 2, 3]), np.array([4.0, 5, 6])
  scale, bias = np.array([0.5, -1, 2]), np.array([0.1, 0.2, -0.3])
  variables = norm_variables(mean, var, scale, bias)
  if not use_scale:
    scale = np.ones(3)
    del variables["params"]["batch_norm"]["scale"]
  layer = layers.NormQuant(bits=None, epsilon=1e-3, group_size=4, use_scale=use_scale)
  got, updated = applied(layer, variables, x, 1.0, "train", mutable=["batch_stats"])
  groups = np.split(x.astype(np.float64), 3)
  axes = tuple(range(x.ndim - 1))
  means, vars_ = ([f(part, axis=axes) for part in groups] for f in (np.mean, np.var))
  np.testing.assert_allclose(got, np.concatenate([
      batch_norm(part, m, v, scale, bias, 1e-3)
      for part, m, v in zip(groups, means, vars_)]), atol=2e-4)
  stats = updated["batch_stats"]["batch_norm"]
  np.testing.assert_allclose(
      stats["mean"], 0.9 * mean + 0.1 * np.mean(means, axis=0), rtol=1e-5)
  np.testing.assert_allclose(
      stats["var"], 0.9 * var + 0.1 * np.mean(vars_, axis=0), rtol=1e-4)
  # Elsewhere it is what it is without groups, and so are its variables.
  plain = layers.NormQuant(bits=None, epsilon=1e-3, use_scale=use_scale)
  np.testing.assert_array_equal(
      applied(layer, variables, x, 1.0, "mixed"),
      applied(plain, variables, x, 1.0, "mixed"))
  made, expected = (jax.eval_shape(
      lambda layer=layer: layer.init(jax.random.key(0), x[:1], mode="train"))
                    for layer in (layer, plain))
  assert made == expected


@pytest.mark.parametrize("bits", [1, 2, 3, "float32", "bfloat16"])
def test_hard_tanh_passes_the_gradient_at_exactly_1(bits):
  x = np.float32([[-1.01], [-1], [-0.5], [0], [0.2], [1], [1.01]])
  layer = layers.NormQuant(bits=bits, epsilon=0.0)
  gradient = jax.grad(
      lambda x: applied(layer, identity_norm(1), x, 0.75, "mixed").sum())(x)
  factor = 1.0 if isinstance(bits, str) else 1.5  # Eq 18: 2 alpha.
  np.testing.assert_array_equal(gradient[:, 0],
                                factor * np.array([0, 1, 1, 1, 1, 1, 0]))


def test_gradient_of_clipped_weights():
  kernel = np.float32([[1.0, -1.0, 1.01, -0.2]])
  gradient = jax.grad(lambda kernel: applied(
      layers.QuantDense(4), {"params": {"kernel": kernel}}, np.ones((1, 1), "f4"), 0.5,
      "train").sum())
  np.testing.assert_array_equal(gradient(kernel), [[1, 1, 0, 1]])


def test_distance_from_the_grid():
  x = np.float32([[[0.25], [-0.5]], [[2.0], [1.0]]])
  layer = layers.NormQuant(bits=1, epsilon=0.0)
  _, sown = applied(layer, identity_norm(1), x, 0.5, "mixed", mutable=["distance"])
  mean, = sown["distance"]["mean"]
  np.testing.assert_array_equal(mean, [(0.75 + 0.5) / 2, 0])  # One for each example.
  _, sown = applied(layer, identity_norm(1), x, 0.5, "train",
                    mutable=["distance", "batch_stats"])
  assert "distance" not in sown


# Bits.


def test_bits_by_rule_the_last_match_decides():
  bits = layers.bits_by_rule(1, [("conv*", 2), ("conv1", "float32"), ("*2", 3),
                                 ("block?/conv1", 4), ("[!c]*/x", 5)])
  assert [bits(path) for path in (
      "dense1", "conv3", "conv1", "conv2", "dense2", "block1/conv1", "block12/conv1",
      "xconv1", "Conv1", "b/x", "c/x")] == [1, 2, "float32", 3, 3, 4, 1, 1, 1, 5, 1]
  assert layers.bits_by_rule("bfloat16", [])("conv1") == "bfloat16"
  assert layers.matches("norm_*", "norm_conv1")
  assert not layers.matches("norm", "norm_conv1")
  assert [layers.operand_bits(bits) for bits in (
      1, 3, 5, "float8_e4m3fn", "bfloat16", "float16", "float32")] == [
          1, 3, 5, 8, 16, 16, 32]


def test_bits_of_nested_layers():
  class Block(nn.Module):

    @nn.compact
    def __call__(self, x):
      bits = layers.bits_by_rule(1, [("outer/inner", 2)])
      return layers.QuantDense(1, bits=bits, name="inner")(x, 1.0, "mixed")

  class Network(nn.Module):

    @nn.compact
    def __call__(self, x):
      return Block(name="outer")(x) - Block(name="other")(x)

  kernel = {"inner": {"kernel": np.float32([[0.2], [1.0]])}}  # Threshold 0.42.
  got = jax.jit(Network().apply)({"params": {"outer": kernel, "other": kernel}},
                                 np.float32([[1, 0], [0, 1]]))
  np.testing.assert_array_equal(got, [[-1], [0]])


# The stochastic estimator.

# Keys of another kind than the default compile in a tenth of the time.
key = functools.partial(jax.random.key, impl="unsafe_rbg")


def test_stochastic_estimator_needs_its_key():
  estimator = estimators.by_name("stochastic_aqe")
  rng = np.random.default_rng(0)
  x = rng.uniform(-1, 1, (40, 50)).astype(np.float32)
  norm = layers.NormQuant(estimator=estimator, epsilon=0.0)
  dense = layers.QuantDense(50, estimator=estimator)
  weights = {"params": {"kernel": np.float32(x[:1])}}
  for layer, variables, inputs in (
      (norm, identity_norm(50), x), (dense, weights, np.ones((1, 1), "f4"))):
    with pytest.raises(flax.errors.InvalidRngError, match="estimator"):
      jax.eval_shape(lambda: layer.apply(variables, inputs, 0.5, "mixed"))
    values = inputs if layer is norm else x[:1]
    run = jax.jit(lambda seed, mode: layer.apply(
        variables, inputs, 0.75, mode, rngs={"estimator": key(seed)},
        mutable=["batch_stats", "distance"])[0], static_argnums=1)
    apply = lambda seed, mode="mixed": np.asarray(run(seed, mode))
    got = apply(1)
    signs = (got - 0.25 * values) / 0.75  # alpha sign(x - z) + (1 - alpha) x.
    np.testing.assert_allclose(np.abs(signs), 1, atol=1e-5)
    np.testing.assert_array_equal(apply(1), got)
    assert (apply(2) != got).any() and (signs * values < 0).any()
    assert abs((signs - values).mean()) < 0.25  # Its mean is x.
    assert np.isfinite(apply(1, "train")).all()
  with pytest.raises(ValueError, match="one bit"):
    applied(layers.NormQuant(bits=2, estimator=estimator), identity_norm(50), x, 0.5,
            "mixed", rngs={"estimator": key(0)})


def test_stochastic_estimator_in_a_network():
  estimator = estimators.by_name("stochastic_aqe")
  make = lambda layer: functools.partial(layer, estimator=estimator)
  net = models.ConvNet(3, (4,), (), conv=make(layers.QuantConv),
                       dense=make(layers.QuantDense), norm=make(layers.NormQuant))
  rng = np.random.default_rng(0)
  images = rng.normal(size=(4, 6, 6, 1)).astype(np.float32)
  shapes = jax.eval_shape(lambda: layers.initialize(net, (6, 6, 1)))
  variables = jax.tree.map(
      lambda leaf: rng.normal(0, 0.4, leaf.shape).astype(np.float32), shapes)

  @jax.jit
  def run(seed):
    def loss(params):
      logits, _ = net.apply(
          {**variables, "params": params}, images, 0.5, "train",
          rngs={"estimator": key(seed)}, mutable=["batch_stats"])
      return (logits * jnp.arange(12.0).reshape(4, 3)).sum(), logits
    return jax.grad(loss, has_aux=True)(variables["params"])

  (gradient, logits), (_, others), (_, same) = run(0), run(1), run(0)
  assert (logits != others).any()
  np.testing.assert_array_equal(logits, same)
  for leaf in jax.tree.leaves(gradient):
    assert np.isfinite(leaf).all() and (leaf != 0).any()


# Scales and learned steps.


@pytest.mark.parametrize("weight_scale", ["layer_mean", "channel_mean"])
def test_scales_of_weights(weight_scale):
  rng = np.random.default_rng(4)
  x = rng.normal(size=(2, 4, 4, 3)).astype(np.float32)
  kernel = rng.normal(0, 0.5, (3, 3, 3, 4)).astype(np.float32)
  size = np.abs(kernel).mean((0, 1, 2) if weight_scale == "channel_mean" else None)
  conv = layers.QuantConv(4, bits=2, weight_scale=weight_scale)
  got = applied(conv, {"params": {"kernel": kernel}}, x, 0.3, "mixed")
  np.testing.assert_allclose(got, convolve(
      x, mixed_kernel(kernel, 2, 0.3) * size, (1, 1), "SAME", 0.0), atol=2e-5)
  floats = layers.QuantConv(4, bits="float32", weight_scale=weight_scale)
  got = applied(floats, {"params": {"kernel": kernel}}, x, 0.3, "mixed")
  np.testing.assert_allclose(got, convolve(x, kernel, (1, 1), "SAME", 0.0), atol=2e-5)


@pytest.mark.parametrize("bits, q", [(1, 1), (2, 1), (3, 3)])
def test_learned_steps(bits, q):
  estimator, rng = estimators.by_name("lsq"), np.random.default_rng(bits)
  x = rng.normal(size=(5, 40)).astype(np.float32)
  dense = layers.QuantDense(7, bits=bits, estimator=estimator)
  fresh = jax.jit(lambda: dense.init(jax.random.key(0), x, 1.0, "train"))()["params"]
  assert sorted(fresh) == ["kernel", "step"] and fresh["step"].shape == ()
  np.testing.assert_allclose(
      fresh["step"], 2 * np.sqrt(q) * np.abs(fresh["kernel"]).mean(), rtol=1e-6)
  unit = THRESHOLDS[bits] if bits != 2 else [0.5]
  kernel = np.float32(fresh["kernel"])
  got = applied(dense, {"params": {"kernel": kernel, "step": np.float32(-0.1)}}, x, 0.2,
                "mixed")
  np.testing.assert_allclose(
      got, x @ (0.1 * h(kernel / 0.1, unit, LEVELS[bits])), atol=2e-4)

  norm = layers.NormQuant(bits=bits, estimator=estimator, epsilon=0.0)
  variables = identity_norm(40)
  fresh = jax.jit(lambda: norm.init(jax.random.key(0), x, 1.0, "train"))()["params"]
  assert fresh["step"].shape == () and fresh["step"] == 1
  variables["params"]["step"] = np.float32(1.7)  # There is no HardTanh before it.
  run = jax.jit(lambda params: norm.apply(
      {**variables, "params": params}, x, 0.2, "mixed", mutable=["distance"]))
  got, sown = run(variables["params"])
  want = 1.7 * h(x / 1.7, unit, LEVELS[bits])
  np.testing.assert_allclose(got, want, rtol=1e-5)
  np.testing.assert_allclose(
      sown["distance"]["mean"][0], np.abs(x - want).mean(1), rtol=1e-4)
  gradient = jax.grad(lambda params: run(params)[0].sum())(variables["params"])["step"]
  slope = np.where(np.abs(x) <= 1.7, (want - x) / 1.7, np.sign(x))
  np.testing.assert_allclose(gradient, slope.sum() / np.sqrt(40 * q), rtol=1e-4)
  for plain in (layers.QuantDense(7, bits="bfloat16", estimator=estimator),
                layers.NormQuant(bits=None, estimator=estimator),
                layers.NormQuant(bits="float16", estimator=estimator)):
    shapes = jax.eval_shape(
        lambda: plain.init(jax.random.key(0), x, 1.0, "train"))["params"]
    assert "step" not in shapes


@pytest.mark.parametrize("layer, axes", [
    (layers.QuantConv(4, bits=3), (0, 1, 2)), (layers.QuantDense(4, bits=2), 0)])
def test_learned_steps_of_channels(layer, axes):
  layer = layer.clone(estimator=estimators.by_name("lsq"), step_per_channel=True)
  x = np.zeros((2, 5, 5, 3) if layer.bits == 3 else (2, 6), np.float32)
  fresh = layer.init(jax.random.key(0), x, 1.0, "train")["params"]
  q = 3 if layer.bits == 3 else 1
  np.testing.assert_allclose(
      fresh["step"], 2 * np.sqrt(q) * np.abs(fresh["kernel"]).mean(axes), rtol=1e-6)
  assert fresh["step"].shape == (4,)


@pytest.mark.parametrize("bits", [2, 3])
def test_thresholds_that_each_channel_learns(bits):
  """Fresh ones are the fixed ones, and hard codes are those of the learned ones."""
  layer = layers.NormQuant(bits=bits, learn_thresholds=True, epsilon=0.0)
  fixed = np.float64(quantizers.input_grid(bits).thresholds)
  q, rng = len(fixed), np.random.default_rng(bits)
  x = rng.uniform(-1.2, 1.2, (30, 2, 2, 4)).astype(np.float32)
  fresh = layer.init(jax.random.key(0), x, 1.0, "train")["params"]
  assert fresh["threshold_widths"].shape == (q + 1, 4)
  variables = identity_norm(4)
  variables["params"]["threshold_widths"] = fresh["threshold_widths"]
  plain = layer.clone(learn_thresholds=False)
  np.testing.assert_allclose(
      applied(layer, variables, x, 0.3, "mixed"),
      applied(plain, identity_norm(4), x, 0.3, "mixed"), atol=1e-4)
  widths = np.abs(rng.normal(size=(q + 1, 4))).astype(np.float32) + np.float32(0.1)
  variables["params"]["threshold_widths"] = widths
  exact = (np.float64(widths) + 2**-20 * np.float64(widths).sum(0)).cumsum(0)
  exact = exact[:-1] / exact[-1]
  rows = fold_probe.make_rows(fold.Probe(np.full((2, 2, 4), 2.0), 2.0**-20, 32.0))
  hard = layer.apply(variables, rows, mode="fold", mutable=["hard"])[1]["hard"]
  np.testing.assert_array_equal(hard["thresholds"], exact.astype(np.float32))
  levels = np.array([0, *quantizers.level_magnitudes(bits)])
  x = np.round(x * 2**20) / np.float32(2**20)
  want = np.sign(x) * levels[(np.abs(x)[..., None] > hard["thresholds"].T).sum(-1)]
  got = layer.apply({"hard": hard}, x, mode="hard")
  np.testing.assert_array_equal(got, want)
  near = np.abs(np.abs(x)[..., None] - exact.T).min(-1) < 1e-5
  mixed = applied(layer, variables, x, 1.0, "mixed")
  np.testing.assert_array_equal(mixed[~near], want[~near])


def test_where_thresholds_cannot_be_learned():
  x = np.zeros((4, 3), np.float32)
  for bits in (1, "bfloat16", None):
    shapes = jax.eval_shape(lambda: layers.NormQuant(
        bits=bits, learn_thresholds=True).init(jax.random.key(0), x, 1.0, "train"))
    assert list(shapes["params"]) == ["batch_norm"]
  with pytest.raises(ValueError, match="learn_thresholds=True: must be False with an"):
    layers.NormQuant(bits=2, learn_thresholds=True, estimator=estimators.by_name(
        "lsq")).init(jax.random.key(0), x, 1.0, "train")


# Pooling.


@pytest.mark.parametrize("share", [False, True])
@pytest.mark.parametrize("shape, window", [
    ((2, 4, 6, 3), 2), ((1, 5, 7, 2), 2), ((2, 7, 8, 1), 3), ((1, 3, 3, 2), 3)])
def test_max_pool(shape, window, share):
  x = np.random.default_rng(0).integers(-9, 0, shape).astype(np.float32)
  h, w = shape[1] // window, shape[2] // window
  want = np.full((shape[0], h, w, shape[3]), -np.inf)
  for i, j in np.ndindex(h, w):
    want[:, i, j] = x[:, i * window:(i + 1) * window,
                      j * window:(j + 1) * window].max((1, 2))
  got = layers.max_pool(x, window, share)
  assert got.dtype == jnp.float32
  np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("window, stride, pads", [
    (3, 2, ((0, 0), (0, 0))), (3, 2, ((1, 1), (1, 1))), (3, 1, ((1, 2), (0, 2))),
    (2, 3, ((0, 1), (1, 0)))])
def test_overlapping_max_pool(window, stride, pads):
  """The first maximum of a window gets its gradient; windows are added in order."""
  rng = np.random.default_rng(0)
  x = rng.integers(-3, 3, (2, 7, 9, 3)).astype(np.float32)  # Has many ties.
  got, backward = jax.vjp(
      lambda x: layers.overlapping_max_pool(x, window, stride, pads), x)
  gradient = rng.normal(size=got.shape).astype(np.float32)
  padded = np.pad(x, [(0, 0), *pads, (0, 0)], constant_values=-np.inf)
  want, spread = np.empty_like(got), np.zeros_like(padded)
  for n, i, j, c in np.ndindex(got.shape):
    at = np.s_[n, i * stride:i * stride + window, j * stride:j * stride + window, c]
    want[n, i, j, c] = padded[at].max()
    first = np.unravel_index(padded[at].argmax(), padded[at].shape)
    spread[at][first] += gradient[n, i, j, c]
  (top, _), (left, _) = pads
  np.testing.assert_array_equal(got, want)
  np.testing.assert_array_equal(
      backward(gradient)[0], spread[:, top:top + 7, left:left + 9])


def test_gradient_of_overlapping_max_pool_is_that_of_flax_without_a_scatter():
  rng = np.random.default_rng(1)
  x = rng.integers(-3, 3, (2, 11, 8, 5)).astype(np.float32)
  ours = lambda x: layers.overlapping_max_pool(x, 3, 2, ((1, 1), (1, 1)))
  gradient = rng.normal(size=ours(x).shape).astype(np.float32)
  found, texts = [], []
  for pool in (ours, lambda x: nn.max_pool(x, (3, 3), (2, 2), ((1, 1), (1, 1)))):
    backward = jax.jit(lambda x, g, pool=pool: jax.vjp(pool, x)[1](g)[0])
    found.append(np.asarray(backward(x, gradient)).tobytes())
    texts.append(backward.lower(x, gradient).as_text())
  assert found[0] == found[1]
  assert "scatter" in texts[1] and "scatter" not in texts[0]


def test_gradient_of_max_pool_at_ties():
  x = np.float32([[1, 3, 5, 5, 9], [3, 2, 5, 5, 9], [9, 9, 9, 9, 9]])[None, :, :, None]
  weight = np.float32([4, 8]).reshape(1, 1, 2, 1)
  gradient = lambda share: jax.jit(jax.grad(lambda x: (
      weight * layers.max_pool(x, share_gradient=share)).sum()))(x)[0, :, :, 0]
  np.testing.assert_array_equal(
      gradient(True), [[0, 2, 2, 2, 0], [2, 0, 2, 2, 0], [0, 0, 0, 0, 0]])
  one = np.asarray(gradient(False))
  assert sorted(one[:2, :2].ravel()) == [0, 0, 0, 4] and one[0, 0] == one[1, 1] == 0
  assert sorted(one[:2, 2:4].ravel()) == [0, 0, 0, 8]
  assert not one[2].any() and not one[:, 4].any()


# Networks.


def test_fresh_variables():
  net = models.ConvNet(3, (4, 4), (5,), conv=functools.partial(
      layers.QuantConv, kernel_init=nn.initializers.constant(0.25)))
  make = jax.jit(lambda seed: layers.initialize(net, (6, 6, 1), seed))
  variables, same, other = make(0), make(0), make(1)
  jax.tree.map(np.testing.assert_array_equal, variables, same)
  assert sorted(variables) == ["batch_stats", "params"]
  params = variables["params"]
  np.testing.assert_array_equal(params["conv2"]["kernel"], np.full((3, 3, 4, 4), 0.25))
  dense = params["dense1"]["kernel"]  # Glorot, uniform: within sqrt(6 / (36 + 5)).
  assert dense.shape == (36, 5) and dense.dtype == jnp.float32
  assert 0.9 < np.abs(dense).max() / np.sqrt(6 / 41) <= 1
  assert (dense != other["params"]["dense1"]["kernel"]).any()
  norm = params["norm_conv1"]["batch_norm"]
  np.testing.assert_array_equal(norm["scale"], np.ones(4))
  np.testing.assert_array_equal(norm["bias"], np.zeros(4))
  stats = variables["batch_stats"]["norm_conv1"]["batch_norm"]
  assert stats["mean"].shape == stats["var"].shape == (4,)


def test_trace():
  rules = [("conv2", 3), ("dense*", "bfloat16"), ("dense2", 1),
           ("norm_conv1", "float8_e4m3fn"), ("norm_dense1", 3)]
  weights = dict(bits=layers.bits_by_rule(2, rules))
  net = models.ConvNet(
      10, (4, 6), (5,), first_padding="VALID",
      conv=functools.partial(layers.QuantConv, **weights),
      dense=functools.partial(layers.QuantDense, **weights),
      norm=functools.partial(layers.NormQuant, bits=layers.bits_by_rule(1, rules)))
  want = [
      # path, kind, bits, input bits, input, output, kernel, channel parameters
      ("conv1", "conv", 2, 16, (9, 8, 3), (7, 6, 4), (3, 3, 3, 4), 0),
      ("norm_conv1", "norm", "float8_e4m3fn", 32, (7, 6, 4), (7, 6, 4), (), 8),
      ("conv2", "conv", 3, 8, (7, 6, 4), (7, 6, 6), (3, 3, 4, 6), 0),
      ("norm_conv2", "norm", 1, 32, (3, 3, 6), (3, 3, 6), (), 12),
      ("dense1", "dense", "bfloat16", 1, (54,), (5,), (54, 5), 0),
      ("norm_dense1", "norm", 3, 32, (5,), (5,), (), 10),
      ("dense2", "dense", 1, 3, (5,), (10,), (5, 10), 0),
      ("norm_dense2", "norm", None, 32, (10,), (10,), (), 20),
  ]
  infos = layers.trace(net, (9, 8, 3))
  assert [tuple(info) for info in infos] == want
  assert infos[2].path == "conv2" and infos[2].input_bits == 8
  # Without a scale, batch norm keeps a shift alone.
  net = net.clone(norm=functools.partial(layers.NormQuant, use_scale=False))
  assert layers.trace(net, (9, 8, 3))[1].channel_parameters == 4


def test_trace_knows_the_bits_of_sums():
  class Network(nn.Module):

    @nn.compact
    def __call__(self, x, alpha=1.0, mode="hard"):
      x = layers.NormQuant(2)(layers.QuantConv(3)(x, mode=mode), mode=mode)
      x = jnp.sum(x, axis=(1, 2))
      return layers.NormQuant(None)(layers.QuantDense(4)(x, mode=mode), mode=mode)

  # 20 numbers from -1 to 1 come to -20 to 20, for which 2 + log2(20) bits suffice.
  assert [info.input_bits for info in layers.trace(Network(), (5, 4, 1))] == [
      16, 32, 7, 32]


def test_trace_names_nested_layers_and_their_shortcuts():
  class Block(nn.Module):

    @nn.compact
    def __call__(self, x, mode):
      y = layers.QuantConv(2, (1, 1), (2, 2), name="conv1")(x, 1.0, mode)
      shortcut = layers.NormQuant(2, name="norm1")(y, 1.0, mode)
      return layers.NormQuant(3, name="norm2")(y, 1.0, mode, shortcut)

  class Network(nn.Module):

    @nn.compact
    def __call__(self, x, alpha=1.0, mode="hard"):
      return Block(name="block2")(Block(name="block1")(x, mode), mode)

  assert [(info.path, info.bits, info.input_bits, info.output_shape)
          for info in layers.trace(Network(), (5, 4, 1))] == [
              ("block1/conv1", 1, 16, (3, 2, 2)),
              ("block1/norm1", 2, 32, (3, 2, 2)),
              ("block1/norm2", 3, 32, (3, 2, 2)),
              ("block2/conv1", 1, 3, (2, 1, 2)),
              ("block2/norm1", 2, 32, (2, 1, 2)),
              ("block2/norm2", 3, 32, (2, 1, 2))]


TRACE_TWICE = """
import jax
from minw import layers, models
net = models.ConvNet(10, conv_widths=(2, 2), dense_widths=())
first = layers.trace(net, (4, 4, 1))
shapes = jax.eval_shape(lambda: layers.initialize(net, (4, 4, 1)))
assert_ = layers.trace(net, (4, 4, 1)) == first
print(__debug__, len(first), assert_, sorted(shapes["params"]))
"""


@pytest.mark.slow  # It starts Python.
def test_trace_leaves_nothing_behind_without_asserts():
  """Flax removes an interceptor in an assert, which Python skips then."""
  found = subprocess.run(
      [sys.executable, "-OO", "-c", TRACE_TWICE], capture_output=True, text=True,
      cwd=pathlib.Path(layers.__file__).parents[1])
  assert found.stdout == (
      "False 6 True ['conv1', 'conv2', 'dense1', 'norm_conv1', 'norm_conv2', "
      "'norm_dense1']\n"), found.stderr[-500:]


# Batch norm in training.


class Deep(nn.Module):
  """A norm below another module, so that its path has two parts."""

  group_size: int = 0

  @nn.compact
  def __call__(self, x, mode):
    return layers.NormQuant(1, group_size=self.group_size, name="norm")(x, mode=mode)


def train_deep(shape, group_size=0):
  class Network(nn.Module):

    @nn.compact
    def __call__(self, x, mode="train"):
      return Deep(group_size, name="block")(x, mode)

  @jax.jit
  def run(x):
    variables = Network().init(jax.random.key(0), x)
    return Network().apply(variables, x, mutable=["batch_stats"])[0]

  return run(np.random.default_rng(0).normal(size=shape).astype(np.float32))


@pytest.mark.parametrize("shape, group_size", [
    ((1, 4), 0), ((1, 1, 1, 4), 0), ((3, 4), 1), ((2, 1, 1, 4), 1)])
def test_norm_of_a_single_value_is_refused(shape, group_size):
  with pytest.raises(ValueError, match="^block/norm: batch norm of one example"):
    train_deep(shape, group_size)


@pytest.mark.parametrize("shape, group_size", [
    ((2, 4), 0), ((1, 1, 2, 4), 0), ((4, 4), 2), ((3, 2, 1, 4), 1)])
def test_norm_of_two_values_depends_on_them(shape, group_size):
  assert {*np.unique(train_deep(shape, group_size))} == {-1.0, 1.0}
