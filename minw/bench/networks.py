"""The networks with which inference is timed: random weights, packed and in float32.

The float32 network of a packed one has its layers and shapes, and weights of its own.
Batch norm is folded into its kernels. All baselines are made of it.
"""

import math
from typing import Any, NamedTuple, Sequence

import jax
import numpy as np

from minw import errors
from minw import layers as layers_lib
from minw import pack
from minw import packed
from minw import profiling
from minw import quantizers
from minw.experiment import Experiment

# The networks that can be timed, for error messages.
KNOWN = "a ConvNet, AlexNet, or a ResNet with projections as shortcuts"


class Layer(NamedTuple):
  """A layer in float32. Dense layers are convolutions as large as their input.

  A layer takes the mean over the map if `mean`, convolves, adds the bias, pools, adds
  the shortcut and clips, in this order.

  Attributes:
    kernel: Kernel, float32 (height, width, in, out), into which batch norm is folded.
    bias: Bias, float32 (out,).
    input: Index of its input. 0 is the image, and i the result of the i-th layer.
    strides: (vertical, horizontal).
    pads: (top, bottom, left, right), zeros.
    mean: Whether its input is the mean over the map.
    pool: The max pooling that follows, or None.
    shortcut: Index of a value that is added, or None.
    clip: Whether HardTanh follows.
  """

  kernel: np.ndarray
  bias: np.ndarray
  input: int
  strides: tuple[int, int] = (1, 1)
  pads: tuple[int, int, int, int] = (0, 0, 0, 0)
  mean: bool = False
  pool: packed.Pool | None = None
  shortcut: int | None = None
  clip: bool = False


def random_network(config: Any) -> packed.Program:
  """Packs a config's network with random weights and batch norms.

  Raises:
    errors.UsageError: The network is none of convolutions and dense layers that are
      each followed by a norm, or it does not pack.
  """
  experiment = Experiment(config)
  pairs = list(zip(experiment.layers[::2], experiment.layers[1::2]))
  if not all(norm.kind == "norm" and layer.kernel_shape[-1:] == norm.input_shape[-1:]
             for layer, norm in pairs):
    raise errors.bad_value("config.network", config.network, KNOWN)
  variables = jax.tree.map(
      lambda leaf: np.zeros(leaf.shape, leaf.dtype),
      jax.eval_shape(lambda: layers_lib.initialize(
          experiment.model, experiment.image_shape)))
  generator = np.random.default_rng(config.seed)
  for layer, norm in pairs:
    _draw(variables, layer, norm, generator)
  try:
    return pack.pack(
        experiment.model, variables, pixels=experiment.pixels,
        source_shape=experiment.info.image_shape, crop=experiment.image_shape[:2])
  except ValueError as error:
    raise errors.UsageError(str(error)) from error


def _draw(
    variables: Any,
    layer: layers_lib.LayerInfo,
    norm: layers_lib.LayerInfo,
    generator: np.random.Generator,
) -> None:
  """Draws the weights of a layer and its batch norm, a part of which falls.

  Its sums have about the mean and the variance that the norm expects.
  """
  fan_in, out = math.prod(layer.kernel_shape[:-1]), layer.kernel_shape[-1]
  std = (2 / (fan_in + out)) ** 0.5
  variables["params"][layer.path]["kernel"] = generator.normal(
      0, std, layer.kernel_shape).astype(np.float32)
  is_grid = layer.bits is not None and quantizers.is_grid(layer.bits)
  size = fan_in ** 0.5 * (1 if is_grid else std)  # Standard deviation of the sums.
  draw = lambda low, high: generator.uniform(low, high, out).astype(np.float32)
  variables["batch_stats"][norm.path]["batch_norm"].update(
      mean=draw(-1, 1) * size / 2, var=draw(0.5, 2) * size**2)
  variables["params"][norm.path]["batch_norm"].update(
      scale=draw(0.5, 1) * generator.choice(np.array([-1, 1], np.float32), out),
      bias=draw(-0.5, 0.5))


def multiplications(program: packed.Program) -> int:
  """Returns the number of multiplications of an image."""
  return sum(profiling.products(program))


def float_layers(program: packed.Program) -> list[Layer]:
  """Makes a float32 network of the shapes of a packed one, with random weights.

  Args:
    program: A packed network of convolutions, each with its norm and maybe a max
      pooling, of shortcuts that are added, and of a sum over the map before a layer.

  Raises:
    ValueError: The network has other operations.
  """
  generator = np.random.default_rng(0)
  layers: list[Layer] = []
  # The float network's value that stands for each value of the packed one. What comes
  # before the first layer stands for the image.
  values, averaged = [0], set()
  for i, op in enumerate(program.ops, start=1):
    last = values[-1]
    if isinstance(op, packed.Conv) and op.groups == 1 and op.dilation == (1, 1):
      layers.append(_random_layer(op, values[op.input], op.input in averaged,
                                  generator))
      last = len(layers)
    elif isinstance(op, packed.Pool) and op.kind == "sum":
      averaged.add(i)
      last = values[op.input]
    elif not isinstance(op, _FOLLOWERS) or op.input != i - 1:
      raise ValueError(f"{op.name} has no counterpart in float32")
    elif layers and op.input not in averaged:  # A stack ends in a sum.
      layers[-1] = _followed(layers[-1], op, values)
    values.append(last)
  return layers


def _random_layer(
    op: packed.Conv, value: int, mean: bool, generator: np.random.Generator
) -> Layer:
  """Returns the layer of a convolution, with random weights."""
  out, h, w, channels = op.kernel.shape
  shape = (h, w, channels, out)
  kernel = generator.normal(0, (h * w * channels) ** -0.5, shape).astype(np.float32)
  bias = generator.uniform(-0.5, 0.5, out).astype(np.float32)
  return Layer(kernel, bias, value, op.strides, op.pads, mean)


# The operations that belong to the layer before them.
_FOLLOWERS = (packed.Pool, packed.Threshold, packed.FloatNorm, packed.Logits)


def _followed(layer: Layer, op: packed.Op, values: Sequence[int]) -> Layer:
  """Returns a layer with one of `_FOLLOWERS`; `values` are those of the program."""
  if isinstance(op, packed.Pool):
    return layer._replace(pool=op)
  shortcut = getattr(op, "shortcut", None)
  return layer._replace(clip=getattr(op, "bits", None) is not None,
                        shortcut=None if shortcut is None else values[shortcut])


class Block(NamedTuple):
  """The shape of a convolution or dense layer that is timed alone.

  Attributes:
    size: Height and width of its map; 1 for a dense layer.
    width: Number of its input channels, and of its output channels.
    window: Height and width of its kernel; 1 for a dense layer.
  """

  size: int
  width: int
  window: int = 3

  def __str__(self) -> str:
    shape = f"{self.width} -> {self.width}"
    if self.size == 1:
      return f"{shape}, dense"
    return f"{shape}, {self.window}x{self.window}, {self.size}x{self.size}"


def stack(depth: int, block: Block, weights: int, inputs: int) -> packed.Program:
  """Packs a network of equal layers one after another, each with its thresholds.

  Every code of the last layer counts in a logit.

  Args:
    depth: Number of layers.
    block: Their shape.
    weights: Bits of the weights.
    inputs: Bits of the activations.
  """
  generator = np.random.default_rng(0)
  size, width, window = block
  before, after = (window - 1) // 2, window // 2
  pads = (before, after, before, after)
  codes = {1: [-1, 1], 2: [-1, 0, 1], 3: range(-3, 4)}[weights]
  ops: list[packed.Op] = []

  def threshold(scale):
    t = generator.normal(0, scale, (1, packed.num_thresholds(inputs), width))
    ops.append(packed.Threshold(
        "norm", len(ops), inputs, np.zeros(width, bool),
        np.sort(t.round().astype(np.int32), 1)))

  threshold(30)
  for _ in range(depth):
    ops.append(packed.Conv(
        "conv", len(ops), weights,
        generator.choice(np.int8(codes), (width, window, window, width)), pads=pads))
    threshold((window * window * width) ** 0.5)
  ops.append(packed.Pool("pool", len(ops), "sum", (size, size), (size, size)))
  ops.append(packed.Logits("logits", len(ops), 1.0, *np.ones((3, width), np.float32)))
  return packed.Program(
      (size, size, width), (size, size), np.full(width, 128, np.uint8), width,
      tuple(ops), {})
