"""ConvNets against NumPy float64, the paper's sizes, and hand-counted shapes."""

import functools

from flax import traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from float64_convnet import h
from minw import errors
from minw import fold
from minw import layers
from minw import models
from network_variables import variables_of

# By bits: the ascending positive levels, thresholds of activations, and factors on the
# mean magnitude for weights.
LEVELS = {1: [1.0], 2: [1.0], 3: [0.25, 0.5, 1.0]}
THRESHOLDS = {1: [], 2: [0.1], 3: [0.125, 0.375, 0.75]}
FACTORS = {1: [], 2: [0.7], 3: [0.3125, 0.9375, 1.875]}

SHAPE, CLASSES = (7, 8, 2), 4
CONVS, DENSES = (5, 6, 4), (7, 6)
NAMES = ["conv1", "conv2", "conv3", "dense1", "dense2", "dense3"]


def network(weight_bits, input_bits, pad=1.0, first_padding="SAME", **norm):
  return models.ConvNet(
      CLASSES, CONVS, DENSES, first_padding=first_padding,
      conv=functools.partial(layers.QuantConv, bits=weight_bits, pad_value=pad),
      dense=functools.partial(layers.QuantDense, bits=weight_bits),
      norm=functools.partial(layers.NormQuant, bits=input_bits, **norm))


def small(net):
  """For what takes long to compile."""
  return net.clone(conv_widths=(4, 3), dense_widths=(5,))


def random_variables(net, seed=0, shape=SHAPE):
  return variables_of(
      net, shape, seed, mean=lambda rng, n: rng.normal(0, 1, n),
      scale=lambda rng, n: rng.choice([-1, 1], n) * rng.uniform(0.5, 1, n),
      bias=lambda rng, n: rng.normal(0, 0.3, n),
      var=lambda rng, n: rng.uniform(1, 4, n))


def random_images(count, seed=1):
  # Neither in [-1, 1] nor on a grid.
  return np.random.default_rng(seed).normal(0, 2, (count, *SHAPE)).astype(np.float32)


def captured(net, mode, variables, x, alpha=1.0):
  """The outputs of all layers, by name."""
  _, state = net.apply(
      variables, x, alpha, mode, capture_intermediates=True,
      mutable=["intermediates", "distance", "batch_stats"])
  return {path[0]: value[0] for path, value in
          traverse_util.flatten_dict(state["intermediates"]).items() if len(path) == 2}


def convolve(x, kernel, same, pad) -> np.ndarray:
  """A direct 3x3 convolution in float64."""
  if same:
    x = np.pad(x, [(0, 0), (1, 1), (1, 1), (0, 0)], constant_values=pad)
  height, width = x.shape[1] - 2, x.shape[2] - 2
  return sum(x[:, i:i + height, j:j + width] @ kernel[i, j]
             for i, j in np.ndindex(3, 3))


def numpy_network(variables, x, alphas, weight_bits, input_bits, pad=1.0,
                  first_same=True):
  """Outputs of all layers, and how near each example comes to a threshold."""
  outputs, margin = {}, np.full(len(x), np.inf)
  x = x.astype(np.float64)
  for name, alpha in zip(NAMES, alphas):
    kernel = np.float64(variables["params"][name]["kernel"])
    if weight_bits != "float32":
      thresholds = np.array(FACTORS[weight_bits]) * np.abs(kernel).mean()
      kernel = alpha * h(kernel, thresholds, LEVELS[weight_bits]) + (1 - alpha) * kernel
    if name == "conv1":
      x = convolve(x, kernel, first_same, 0.0)
    elif name in ("conv2", "conv3"):
      x = convolve(x, kernel, True, pad)
    else:
      x = x.reshape(len(x), -1) @ kernel
    outputs[name] = x
    if name == "conv2":
      height, width = x.shape[1] // 2 * 2, x.shape[2] // 2 * 2
      x = np.maximum.reduce(
          [x[:, i:height:2, j:width:2] for i in (0, 1) for j in (0, 1)])
    norm = f"norm_{name}"
    params = variables["params"][norm]["batch_norm"]
    stats = variables["batch_stats"][norm]["batch_norm"]
    x = (x - stats["mean"]) / np.sqrt(np.float64(stats["var"]) + 1e-4)
    x = x * params["scale"] + params["bias"]
    if name != NAMES[-1]:
      x = np.clip(x, -1, 1)
      if input_bits != "float32":
        thresholds = THRESHOLDS[input_bits]
        gap = np.abs(np.abs(x)[..., None] - np.array(thresholds or [0.0]))
        margin = np.minimum(margin, gap.reshape(len(x), -1).min(1))
        x = alpha * h(x, thresholds, LEVELS[input_bits]) + (1 - alpha) * x
    outputs[norm] = x
  return outputs, margin


@pytest.mark.parametrize("weight_bits, input_bits, first_padding", [
    (1, 1, "SAME"), (2, 3, "VALID"), (3, 2, "SAME"), ("float32", "float32", "SAME")])
def test_all_layers_against_numpy(weight_bits, input_bits, first_padding):
  net = network(weight_bits, input_bits, first_padding=first_padding)
  variables, images = random_variables(net), random_images(16)
  variables["params"]["norm_dense3"]["batch_norm"]["bias"] += 2  # Logits beyond 1.
  run = jax.jit(functools.partial(captured, net, "mixed"))
  one_hot = np.eye(len(NAMES))
  for alphas in (one_hot[0] * 0 + 1, 0.6 * one_hot[1], 1 - 0.7 * one_hot[3],
                 np.linspace(0, 1, 6)):
    want, margin = numpy_network(variables, images, alphas, weight_bits, input_bits,
                                 first_same=first_padding == "SAME")
    safe = margin > 1e-5
    assert safe.sum() >= 12
    got = run(variables, images, np.float32(alphas))
    for name, value in want.items():
      assert got[name].dtype == jnp.float32
      np.testing.assert_allclose(got[name][safe], value[safe], rtol=1e-4, atol=1e-4,
                                 err_msg=name)
    assert np.abs(want["norm_dense3"]).max() > 1


def on_grid(x, bits) -> bool:
  levels = LEVELS[bits] + [-level for level in LEVELS[bits]] + [0.0] * (bits > 1)
  return bool(np.isin(x, levels).all())


def test_each_alpha_reaches_its_layer():
  net = network(1, 3)
  assert net.depth == len(NAMES) == 6
  variables = random_variables(net)
  images = np.round(random_images(4) * 8)
  run = jax.jit(functools.partial(captured, net, "mixed"))
  for i, mixed in enumerate(NAMES):
    outputs = run(variables, images, np.float32(1 - 0.5 * np.eye(len(NAMES))[i]))
    for j, name in enumerate(NAMES):
      weights_are_mixed = not (np.mod(outputs[name], 0.25) == 0).all()
      # What comes in also is mixed behind the layer in question.
      assert weights_are_mixed == (j in (i, i + 1)), (mixed, name)
      if name != NAMES[-1]:
        assert on_grid(outputs[f"norm_{name}"], 3) == (j != i), (mixed, name)


def test_a_scalar_is_a_constant_vector():
  net = small(network(2, 2))
  variables, images = random_variables(net), random_images(4)
  run = jax.jit(functools.partial(captured, net, "mixed"))
  for alpha in (0.0, 0.3, 1.0):
    a = run(variables, images, np.float32(alpha))
    b = run(variables, images, np.full(net.depth, alpha, np.float32))
    jax.tree.map(np.testing.assert_array_equal, a, b)
  default = jax.jit(functools.partial(net.apply, mode="mixed"))
  np.testing.assert_allclose(default(variables, images), a["norm_dense2"], atol=1e-5)
  with pytest.raises(ValueError):
    run(variables, images, np.ones(net.depth - 1, np.float32))


@pytest.mark.parametrize("weight_bits", [1, 3])
def test_every_weight_is_quantized(weight_bits):
  # Thresholds follow the mean, so at alpha = 1 halved weights are the same network.
  net = network(weight_bits, 2)
  variables, images = random_variables(net), random_images(3)
  run = jax.jit(functools.partial(captured, net, "mixed"))
  want = run(variables, images, 1.0)
  mixed = run(variables, images, 0.9)
  for name in NAMES:
    halved = {**variables, "params": {
        **variables["params"],
        name: {"kernel": variables["params"][name]["kernel"] / 2}}}
    jax.tree.map(np.testing.assert_array_equal, run(halved, images, 1.0), want)
    assert (run(halved, images, 0.9)[name] != mixed[name]).any()


@pytest.mark.parametrize("net, shape, names", [
    (models.ConvNet(CLASSES, (4, 3), (5,)), SHAPE,
     ["conv1", "conv2", "dense1", "dense2"]),
    (models.ResNet(CLASSES, (1, 1), (4, 6)), (8, 8, 2), [
        "stem", *(f"stage{i}_block1_{name}" for i, name in (
            (1, "conv1"), (1, "conv2"), (2, "projection"), (2, "conv1"),
            (2, "conv2"))), "dense1"])], ids=["convnet", "resnet"])
def test_alphas_of_weights_and_of_activations(net, shape, names):
  """Twice as many alphas as layers: first those of weights, then of activations."""
  variables = random_variables(net, shape=shape)
  alphas = jnp.linspace(0.25, 1, 2 * len(names))
  assert net.depth == len(names)
  sown = jax.jit(lambda variables: net.apply(
      variables, np.zeros((2, *shape), np.float32), alphas, "mixed",
      mutable=["quantized", "distance"])[1]["quantized"])(variables)
  got = {path[-2]: leaf[0][1] for path, leaf in traverse_util.flatten_dict(sown).items()
         if path[-1] == "value"}
  last = f"norm_{names[-1]}"  # The logits are not quantized.
  want = dict(zip([*names, *(f"norm_{name}" for name in names)], alphas))
  assert got == {name: alpha for name, alpha in want.items() if name != last}


def test_one_compilation_serves_all_alphas():
  net = small(network(3, 1))
  variables, images = random_variables(net), random_images(2)
  traced = []

  @functools.partial(jax.jit, static_argnames="mode")
  def run(variables, alpha, mode):
    traced.append(mode)
    return net.apply(variables, images, alpha, mode,
                     mutable=["batch_stats", "distance"])[0]

  for mode in ("train", "mixed"):
    outputs = [run(variables, alpha, mode=mode) for alpha in (0.0, 0.5, 0.9, 1.0)]
    assert len({output.tobytes() for output in map(np.asarray, outputs)}) == 4
    for alpha in (0.5, 1.0):
      run(variables, np.linspace(alpha, 1, net.depth, dtype=np.float32), mode=mode)
  assert traced == ["train"] * 2 + ["mixed"] * 2  # One for scalars, one for vectors.


@pytest.mark.parametrize("weight_bits, input_bits", [
    (1, 1), (2, 2), (3, 3), ("float32", "float32")])
def test_gradients_reach_every_parameter(weight_bits, input_bits):
  net = small(network(weight_bits, input_bits))
  variables, images = random_variables(net), random_images(16)
  weight = np.random.default_rng(0).normal(size=(16, CLASSES)).astype(np.float32)

  @jax.jit
  def gradients(alpha):
    def loss(params):
      logits, _ = net.apply({**variables, "params": params}, images, alpha, "train",
                            mutable=["batch_stats"])
      return (logits * weight).sum()
    return jax.grad(loss)(variables["params"])

  for alpha in (0.5, 1.0):
    flat = traverse_util.flatten_dict(gradients(alpha), sep="/")
    assert len(flat) == 3 * net.depth == 12
    for path, gradient in flat.items():
      assert np.isfinite(gradient).all(), path
      per_channel = np.abs(gradient).reshape(-1, gradient.shape[-1]).max(0)
      assert (per_channel > 1e-6).mean() > 0.7, path


@pytest.mark.parametrize("weight_bits, input_bits, alpha", [
    (3, 1, 0.5), pytest.param(1, 2, 0.0, marks=pytest.mark.slow)])
def test_jit_changes_nothing_in_training(weight_bits, input_bits, alpha):
  net = network(weight_bits, input_bits).clone(conv_widths=(4, 3), dense_widths=())
  variables, images = random_variables(net), random_images(6)
  apply = functools.partial(net.apply, mode="train", mutable=["batch_stats"])
  want, state = apply(variables, images, alpha)
  assert want.shape == (6, CLASSES) and want.dtype == jnp.float32
  got, same_state = jax.jit(apply)(variables, images, alpha)
  np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)
  jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-4),
               same_state, state)
  # Logits have the batch's statistics: their mean is the bias, last of all.
  bias = variables["params"]["norm_dense1"]["batch_norm"]["bias"]
  np.testing.assert_allclose(np.mean(got, axis=0), bias, atol=1e-4)
  changed = jax.tree.map(lambda a, b: bool((np.asarray(a) != b).any()),
                         state["batch_stats"], variables["batch_stats"])
  assert all(jax.tree.leaves(changed))


# The paper's networks.

GEOMETRIES = {  # Image, padding of the first convolution; sizes after each layer.
    "crop 24": (24, "SAME", [24, 24, 12, 12, 6, 6]),
    "crop 30": (30, "SAME", [30, 30, 15, 15, 7, 7]),
    "first VALID": (32, "VALID", [30, 30, 15, 15, 7, 7]),
}
PUBLISHED = {  # Weights, and the megabytes printed for one bit each (truncated).
    "A": (10_352_000, "1.23"), "B": (4_562_624, "0.54"), "C": (2_591_424, "0.30"),
    "D": (1_802_432, "0.21")}


def test_published_widths():
  assert models.convnet_widths("A") == ((128, 128, 256, 256, 512, 512), (1024, 1024))
  assert models.convnet_widths("B") == ((64, 64, 128, 128, 256, 256), (1024, 1024))
  assert models.convnet_widths("C") == ((64, 64, 128, 128, 256, 256), (512, 512))
  assert models.convnet_widths("D") == ((64, 64, 128, 128, 256, 256), (256, 256))
  for name in ("E", "a", "", "AB"):
    with pytest.raises(errors.UsageError, match=f"ConvNet '{name}' does not exist"):
      models.convnet_widths(name)
  with pytest.raises(errors.UsageError, match="known: A, B, C, D"):
    models.convnet_widths("E")


@pytest.mark.parametrize("name, geometry", [
    ("A", "crop 24"), ("B", "crop 30"), ("C", "first VALID"), ("D", "crop 24")])
def test_published_sizes_of_convnets(name, geometry):
  size, padding, sizes = GEOMETRIES[geometry]
  convs, denses = models.convnet_widths(name)
  net = models.ConvNet(10, convs, denses, first_padding=padding)
  assert net.depth == 9

  def run():
    variables = layers.initialize(net, (size, size, 3))
    return variables, captured(net, "mixed", variables, jnp.zeros((2, size, size, 3)))

  variables, outputs = jax.eval_shape(run)
  kernels = {layer: params["kernel"].shape
             for layer, params in variables["params"].items() if "kernel" in params}
  inputs = (3, *convs)
  fan_in = (9 * convs[-1], *denses)  # A last map of 3x3.
  assert kernels == {
      **{f"conv{i + 1}": (3, 3, inputs[i], convs[i]) for i in range(6)},
      **{f"dense{i + 1}": (fan_in[i], (*denses, 10)[i]) for i in range(3)}}
  weights = sum(map(np.prod, kernels.values()))
  count, megabytes = PUBLISHED[name]
  assert weights == count and f"{weights / 8 / 2**20:.4f}"[:4] == megabytes
  # Two more for each channel: batch norm's scale and bias.
  leaves = jax.tree.leaves(variables["params"])
  assert sum(map(np.size, leaves)) == count + 2 * (sum(convs) + sum(denses) + 10)

  for i, (side, width) in enumerate(zip(sizes, convs), start=1):
    assert outputs[f"conv{i}"].shape == (2, side, side, width)
    side = side // 2 if i in (2, 4, 6) else side  # The pool comes before batch norm.
    assert outputs[f"norm_conv{i}"].shape == (2, side, side, width)
  assert outputs["norm_conv6"].shape[1:3] == (3, 3)
  for i, width in enumerate((*denses, 10), start=1):
    assert outputs[f"dense{i}"].shape == outputs[f"norm_dense{i}"].shape == (2, width)
  order = ["conv1", "norm_conv1", "conv2", "norm_conv2", "conv3", "norm_conv3", "conv4",
           "norm_conv4", "conv5", "norm_conv5", "conv6", "norm_conv6", "dense1",
           "norm_dense1", "dense2", "norm_dense2", "dense3", "norm_dense3"]
  assert sorted(outputs) == sorted(order)


def test_the_pool_is_a_choice():
  pooled = []

  def pool(x):
    pooled.append(x.shape)
    return layers.max_pool(x, share_gradient=True)

  net = network("float32", "float32").clone(pool=pool)
  logits = jax.eval_shape(lambda: net.apply(
      random_variables(net), random_images(2), mode="mixed"))
  assert logits.shape == (2, CLASSES)
  assert pooled[-1] == (2, 7, 8, 6) and len(set(pooled)) == 2  # Batches of 1 and 2.


def test_pooled_convs():
  assert models.pooled_convs(6, ()) == (2, 4, 6) and models.pooled_convs(1, ()) == ()
  assert models.pooled_convs(6, [1, 2, 6]) == (1, 2, 6)


def test_pooling_of_a_convnet():
  """Pooling follows conv1 alone, and the dense layer reads sums over 5x3 pixels."""
  net = models.ConvNet(10, (4, 6), (), pool_layers=(1,), global_pool=True)
  images = jax.ShapeDtypeStruct((2, 10, 7, 3), jnp.float32)
  variables = jax.eval_shape(
      functools.partial(net.init, mode="mixed"), jax.random.key(0), images)
  kernels = {name: layer["kernel"].shape for name, layer in
             variables["params"].items() if "kernel" in layer}
  assert kernels == {"conv1": (3, 3, 3, 4), "conv2": (3, 3, 4, 6), "dense1": (6, 10)}
  _, seen = jax.eval_shape(
      lambda v, x: net.apply(v, x, mode="mixed", capture_intermediates=True,
                             mutable=["intermediates"]), variables, images)
  outputs = {name: found["__call__"][0].shape
             for name, found in seen["intermediates"].items() if name != "__call__"}
  assert outputs["norm_conv1"] == (2, 5, 3, 4) and outputs["conv2"] == (2, 5, 3, 6)
  assert outputs["norm_conv2"] == (2, 5, 3, 6) and outputs["dense1"] == (2, 10)


# Published numbers of parameters (the first three torchvision's), without the dense
# layers' biases, which batch norm replaces here: one scale and one shift a class.
@pytest.mark.parametrize("name, parameters, classes", [
    ("resnet18", 11_689_512 + 1000, 1000),
    ("resnet50", 25_557_032 + 1000, 1000),
    ("resnet20", 269_722 + 10, 10),
    # 61,100,840 with 10,344 biases; batch norm has 20,688 numbers instead.
    ("alexnet", 61_100_840 + 10_344, 1000),
    *(pytest.param(*slow, marks=pytest.mark.slow) for slow in (
        ("resnet34", 21_797_672 + 1000, 1000),
        ("cifar_resnet18", 11_173_962 + 10, 10),
        ("resnet110", 1_727_962 + 10, 10),
        ("densenet100", 769_162 + 10, 10)))])
def test_published_sizes(name, parameters, classes):
  size = 32 if classes == 10 else 224
  net = models.NETWORKS[name](classes)
  shapes = jax.eval_shape(lambda: layers.initialize(net, (size, size, 3)))["params"]
  assert sum(np.prod(leaf.shape) for leaf in jax.tree.leaves(shapes)) == parameters
  kernels = [p for p in traverse_util.flatten_dict(shapes) if p[-1] == "kernel"]
  assert net.depth == len(kernels)


@pytest.mark.parametrize("name, maps", [
    ("resnet18", [112, *[56] * 4, *[28] * 5, *[14] * 5, *[7] * 5, 1]),
    ("resnet20", [32, *[32] * 6, *[16] * 6, *[8] * 6, 1]),
    pytest.param("alexnet", [56, 27, 13, 13, 13, 1, 1, 1], marks=pytest.mark.slow)])
def test_maps(name, maps):
  """Heights of the layers' outputs, in the order of their calls."""
  size = 32 if name == "resnet20" else 224
  infos = layers.trace(models.NETWORKS[name](10), (size, size, 3))
  heights = [info.output_shape[0] if len(info.output_shape) == 3 else 1
             for info in infos if info.kind != "norm"]
  assert heights == maps


@pytest.mark.parametrize("name", models.SMALLEST_IMAGE)
def test_smallest_image(name):
  def maps(size):
    net = models.NETWORKS[name](10, conv_widths=(2,) * 5, dense_widths=(2, 2)) if (
        name == "alexnet") else models.NETWORKS[name](10, blocks=(1, 1, 1))
    try:
      infos = layers.trace(net, (size, size, 3))
    except (ValueError, ZeroDivisionError):
      return 0
    return min(min(info.input_shape) for info in infos)

  assert maps(models.SMALLEST_IMAGE[name]) > 0 == maps(models.SMALLEST_IMAGE[name] - 1)


def shallow(name, classes=3, **make):
  """The code of a network, with few layers and channels."""
  changes = {
      "resnet18": dict(stages=(1, 1), widths=(4, 6)),
      "resnet50": dict(stages=(1, 1), widths=(5, 8)),
      "resnet110": dict(stages=(1, 1), widths=(4, 6)),
      "densenet100": dict(blocks=(2, 1), growth=2),
      "alexnet": dict(conv_widths=(9, 8, 7, 8, 9), dense_widths=(12, 11))}
  return models.NETWORKS[name](classes, **changes[name], **make)


SHALLOW = ("resnet18", "densenet100", *(
    pytest.param(name, marks=pytest.mark.slow)
    for name in ("resnet50", "resnet110", "alexnet")))


def shallow_case(name):
  """A shallow network, random variables and images on the pixels' grid."""
  shape = (60, 60, 3) if name == "alexnet" else (16, 16, 3)
  net = shallow(name, norm=functools.partial(layers.NormQuant, bits=3))
  rng = np.random.default_rng(2)
  images = rng.integers(-100, 100, (6, *shape)).astype(np.float32) / 64
  return net, random_variables(net, 1, shape), images


@pytest.mark.parametrize("name", SHALLOW)
def test_hard_is_mixed_at_the_end(name):
  """With alpha = 1, where nothing lies beside a threshold."""
  net, variables, images = shallow_case(name)
  probe = fold.Probe(
      *(np.full(images.shape[1:], row) for row in (100 / 64, 1 / 64, 16.0)))
  run = jax.jit(net.apply, static_argnums=3)
  logits = run(fold.fold(net, variables, probe), images, 1.0, "hard")
  np.testing.assert_allclose(
      logits, run(variables, images, 1.0, "mixed"), rtol=1e-4, atol=1e-4)
  # Images differ, but for AlexNet, whose last map is a pixel, the maximum of many.
  assert len(np.unique(np.asarray(logits))) > 3 or name == "alexnet"


@pytest.mark.parametrize("name", SHALLOW)
def test_a_step_reaches_every_weight(name):
  net, variables, images = shallow_case(name)

  @jax.jit
  def gradient(params, alpha):
    def loss(params):
      logits, _ = net.apply(
          {**variables, "params": params}, images, alpha, "train",
          mutable=["batch_stats"])
      return jnp.sum(logits * jnp.arange(18.0).reshape(6, 3) ** 2)
    return jax.grad(loss)(params)

  alphas = jnp.linspace(0.5, 1, net.depth)
  for path, leaf in traverse_util.flatten_dict(gradient(
      variables["params"], alphas)).items():
    assert np.isfinite(leaf).all() and (np.asarray(leaf) != 0).any(), path
