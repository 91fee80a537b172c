"""minw.summary: against the paper's sizes, and counts worked out by hand."""

import functools
import pathlib
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image
import pytest

from minw import config as config_lib
from minw import experiment
from minw import layers
from minw import models
from minw import plots
from minw import summary
from minw import train_step
from minw.data import datasets
from minw.data import resident

ROOT = pathlib.Path(__file__).parents[1]
CONFIG = f"--config={ROOT / 'experiments' / 'cifar_convnet.py'}"

# The paper's, which prints MiB cut to two digits.
SIZES = {"A": (10_352_000, 1.234), "B": (4_562_624, 0.544), "C": (2_591_424, 0.309),
         "D": (1_802_432, 0.215)}


def build(network="A", **fields):
  """The model and image shape of a ConvNet for CIFAR-10."""
  config = config_lib.default_config()
  config.conv_widths, config.dense_widths = models.convnet_widths(network)
  config.update(fields)
  config_lib.validate(config)
  return experiment.build_model(config), (config.crop_size, config.crop_size, 3)


@functools.cache  # Tracing takes a second.
def summarize(network="A", **fields):
  return summary.summarize(layers.trace(*build(network, **fields)))


def small(**fields):
  """A network of two convolutions and two dense layers on 8x8 images."""
  return summarize(conv_widths=(5, 7), dense_widths=(11,), crop_size=8, **fields)


@pytest.mark.parametrize("weight_bits, input_bits, expected", [
    # The paper's rule, every pair of 1, 2, 3 and 16.
    (1, 1, "XNOR"), (1, 2, "XNOR"), (2, 2, "XNOR"), (1, 3, "XNOR"), (2, 3, "XNOR"),
    (1, 16, "XNOR ADDER"), (2, 16, "XNOR ADDER"),
    (3, 3, "SHIFT"), (3, 16, "SHIFT ADDER"), (16, 16, "MAC"),
    # Beyond it: longer powers of two, other floats.
    (1, 4, "XNOR"), (2, 5, "XNOR"), (1, 8, "XNOR ADDER"), (2, 32, "XNOR ADDER"),
    (3, 4, "SHIFT"), (3, 5, "SHIFT"), (4, 4, "SHIFT"), (4, 5, "SHIFT"),
    (5, 5, "SHIFT"), (3, 8, "SHIFT ADDER"), (4, 16, "SHIFT ADDER"),
    (5, 32, "SHIFT ADDER"), (8, 8, "MAC"), (8, 16, "MAC"), (32, 32, "MAC"),
])
def test_operation(weight_bits, input_bits, expected):
  assert summary.operation(weight_bits, input_bits) == expected
  assert summary.operation(input_bits, weight_bits) == expected


@pytest.mark.parametrize("network, crop_size, first_padding", [
    ("A", 24, "SAME"), ("B", 30, "SAME"), ("C", 32, "VALID"), ("D", 30, "SAME"),
    *(pytest.param(*slow, marks=pytest.mark.slow) for slow in (
        ("A", 30, "SAME"), ("C", 30, "SAME"), ("A", 32, "VALID"), ("B", 32, "VALID"),
        ("D", 32, "VALID")))])
def test_sizes_of_the_paper(network, crop_size, first_padding):
  result = summarize(network, crop_size=crop_size, first_padding=first_padding)
  weights, mebibytes = SIZES[network]
  assert result.weights == weights
  assert result.weights_by_bits == {1: weights}
  assert result.packed_bytes * 8 == weights
  assert round(result.packed_bytes / 2**20, 3) == mebibytes
  packed, = re.findall(r"^packed +([0-9.]+)  MiB$", summary.format_table(result), re.M)
  assert packed == str(mebibytes)
  assert result.compression == 32


def test_a_last_map_of_4x4_is_not_the_papers():
  result = summarize("A", crop_size=32, first_padding="SAME")
  assert result.weights == 10_352_000 + 7 * 512 * 1024
  assert round(result.packed_bytes / 2**20, 2) == 1.67


def test_macs_of_convnet_a():
  result = summarize("A", crop_size=24, first_padding="SAME")
  assert [(layer.path, layer.output_shape, layer.macs) for layer in result.layers] == [
      ("conv1", (24, 24, 128), 1_990_656),  # 576 positions of 27 x 128
      ("conv2", (24, 24, 128), 84_934_656),  # 576 of 1152 x 128
      ("conv3", (12, 12, 256), 42_467_328),  # 144 of 1152 x 256
      ("conv4", (12, 12, 256), 84_934_656),  # 144 of 2304 x 256
      ("conv5", (6, 6, 512), 42_467_328),  # 36 of 2304 x 512
      ("conv6", (6, 6, 512), 84_934_656),  # 36 of 4608 x 512
      ("dense1", (1024,), 4_718_592),  # 4608 x 1024
      ("dense2", (1024,), 1_048_576),
      ("dense3", (10,), 10_240),
  ]
  assert result.macs == 347_506_688
  assert result.macs_by_operation == {"XNOR": 345_516_032, "XNOR ADDER": 1_990_656}
  assert list(result.macs_by_operation) == ["XNOR", "XNOR ADDER"]
  # A scale and a shift of each channel.
  assert result.norm_parameters == 2 * (2 * (128 + 256 + 512) + 2 * 1024 + 10) == 7700


def test_a_valid_convolution_has_fewer_positions():
  same, valid = (summarize("A", crop_size=32, first_padding=padding).layers[0]
                 for padding in ("SAME", "VALID"))
  assert same.macs == 32 * 32 * 27 * 128
  assert valid.macs == 30 * 30 * 27 * 128


def test_groups_and_dilation():
  """The multiply-accumulates are those of each group."""
  class Network(nn.Module):

    @nn.compact
    def __call__(self, x, alpha=1.0, mode="hard"):
      x = layers.QuantConv(8, strides=(2, 2), name="full")(x, alpha, mode)
      x = layers.NormQuant(name="norm1")(x, alpha, mode)
      x = layers.QuantConv(16, name="depthwise", feature_group_count=8)(x, alpha, mode)
      x = layers.NormQuant(name="norm2")(x, alpha, mode)
      x = layers.QuantConv(12, name="groups", feature_group_count=4, padding="VALID",
                           kernel_dilation=(2, 1))(x, alpha, mode)
      return layers.NormQuant(bits=None, name="norm3")(x, alpha, mode)

  result = summary.summarize(layers.trace(Network(), (16, 16, 3)))
  assert [(layer.path, layer.output_shape, layer.weights, layer.macs)
          for layer in result.layers] == [
      ("full", (8, 8, 8), 9 * 3 * 8, 64 * 27 * 8),
      ("depthwise", (8, 8, 16), 9 * 16, 64 * 9 * 16),
      ("groups", (4, 6, 12), 9 * 4 * 12, 24 * 36 * 12)]


def test_mixed_bits():
  result = small(
      input_bits=2, weight_bits=3,
      bits_rules=(("conv1", "bfloat16"), ("dense*", 1), ("norm_dense1", 5)))
  assert [(layer.path, layer.bits, layer.input_bits, layer.weights, layer.packed_bytes,
           layer.operation) for layer in result.layers] == [
      ("conv1", "bfloat16", 16, 135, 270, "MAC"),
      ("conv2", 3, 2, 315, 119, "XNOR"),  # 945 bits: 118.1 bytes
      ("dense1", 1, 2, 1232, 154, "XNOR"),
      ("dense2", 1, 5, 110, 14, "XNOR"),  # 13.75
  ]
  assert list(result.weights_by_bits.items()) == [
      (1, 1342), (3, 315), ("bfloat16", 135)]
  assert list(result.macs_by_operation.items()) == [
      ("XNOR", 64 * 315 + 1232 + 110), ("MAC", 64 * 135)]
  assert result.packed_bytes == 270 + 119 + 154 + 14
  assert result.compression == pytest.approx(4 * 1792 / 557)
  assert result.layers[0].compression == 2


@pytest.mark.parametrize("bits, size, compression", [
    ("float8_e4m3fn", 10, 4), ("float16", 20, 2), ("bfloat16", 20, 2),
    ("float32", 40, 1), (1, 2, 20), (2, 3, 40 / 3), (3, 4, 10), (4, 5, 8),
    (5, 7, 40 / 7)])
def test_bytes_of_ten_weights(bits, size, compression):
  layer = layers.LayerInfo("dense1", "dense", bits, 16, (5,), (2,), (5, 2), 0)
  result = summary.summarize([layer])
  assert result.packed_bytes == result.layers[0].packed_bytes == size
  assert result.compression == pytest.approx(compression)
  assert result.weights_by_bits == {bits: 10}


@pytest.mark.parametrize("weight_bits, input_bits, counts, operations", [
    (3, 3, [16, 3, 3, 3], ["SHIFT ADDER"] + ["SHIFT"] * 3),
    ("float16", "float8_e4m3fn", [16, 8, 8, 8], ["MAC"] * 4)])
def test_inputs_of_a_network(weight_bits, input_bits, counts, operations):
  result = small(weight_bits=weight_bits, input_bits=input_bits)
  assert [layer.input_bits for layer in result.layers] == counts
  assert [layer.operation for layer in result.layers] == operations


def test_table():
  model, image_shape = build(
      conv_widths=(5, 7), dense_widths=(11,), crop_size=8,
      bits_rules=(("dense2", "float16"), ("conv2", 2)))
  assert summary.summary(model, image_shape) == """\
layer   output  input bits  weight bits  weights  bytes  smaller    MACs  operation
------------------------------------------------------------------------------------
conv1   8x8x5           16            1      135     17    31.8x   8,640  XNOR ADDER
conv2   8x8x7            1            2      315     79    15.9x  20,160  XNOR
dense1  11               1            1    1,232    154    32.0x   1,232  XNOR
dense2  10               1      float16      110    220     2.0x     110  XNOR ADDER
------------------------------------------------------------------------------------
total                                      1,792    470    15.3x  30,142

weights      1,367  1 bit            76.3%
               315  2 bits           17.6%
               110  float16           6.1%
packed       0.000  MiB
in float32   0.007  MiB
MACs        21,392  XNOR             71.0%
             8,750  XNOR ADDER       29.0%
batch norm      66  float32, beside
"""


def test_command(command):
  ended = command("minw.summary", CONFIG + ":network=D")
  assert ended.code == 0 and not ended.err
  assert re.search(r"^total +1,802,432  225,304 +32\.0x", ended.out, re.M)
  assert re.search(r"^packed +0\.215  MiB$", ended.out, re.M)


def test_command_with_a_bad_value(command):
  ended = command("minw.summary", CONFIG, "--config.weight_bits=7")
  assert ended.code == 2 and not ended.out
  assert ended.err.startswith("error: config.weight_bits: bits=7")
  assert len(ended.err.splitlines()) == 1


def digits(**changes):
  config = config_lib.default_config("digits")
  config.update(conv_widths=(), dense_widths=(), batch_size=6, seed=3, **changes)
  return config


def test_images_are_those_of_the_first_step(monkeypatch):
  """As the compiled step sees them."""
  run = experiment.Experiment(digits(
      crop_padding=2, rotation=30.0, brightness=0.1, mixup=1.0))
  monkeypatch.setattr(train_step, "update", lambda experiment, state, *batch: (
      state, batch[:2]))
  monkeypatch.setattr(run, "jit", lambda function, **_: jax.jit(function))
  step = train_step.make_train_step(run)
  place = next(run.data.train_batches(run.data.load("train"), 0))
  state = train_step.TrainState(jnp.int32(0), *5 * [()])
  images, labels = step(state, *place)[1]
  pixels, titles = summary.first_batch(run, 5)
  assert pixels.shape == (5, 8, 8, 1) and pixels.dtype == np.uint8
  np.testing.assert_array_equal(  # The mean of the digits is 77.9 of 255.
      (pixels.astype(np.float32) - 78) / 64, np.asarray(images)[:5])
  assert titles == [
      f"{share:.0%} {one}\n{1 - share:.0%} {other}" for one, other, share in
      list(zip(*map(np.asarray, labels)))[:5]]


def test_labels_of_images():
  run = experiment.Experiment(digits())
  _, labels = datasets.load("digits", "train", None)
  order = np.asarray(resident.epoch_order(3, 0, 1257))[:6]
  assert summary.first_batch(run, 6)[1] == [str(label) for label in labels[order]]


def test_figure_of_images():
  images = np.arange(10 * 4 * 4, dtype=np.uint8).reshape(10, 4, 4, 1)
  fig = plots.images_figure(images, [f"${i}" for i in range(10)])
  assert [axes.get_title() for axes in fig.axes] == [f"${i}" for i in range(10)]
  for axes, image in zip(fig.axes, images):
    np.testing.assert_array_equal(
        np.reshape(axes.get_images()[0].get_array(), (4, 4, 1)), image)
  rows = {round(axes.get_subplotspec().rowspan.start) for axes in fig.axes}
  assert rows == {0, 1} and plots.images_figure(images[:1], ["a"]).axes


def test_command_draws_images(command, tmp_path):
  config = f"--config={ROOT / 'experiments' / 'digits_convnet.py'}"
  done = command("minw.summary", config, "--images=9", f"--out={tmp_path}/a.png",
                 "--config.random_erasing=0.5")
  assert (done.code, done.err) == (0, "") and "MACs" in done.out
  with Image.open(tmp_path / "a.png") as image:
    assert image.format == "PNG" and image.size == (1536, 456)
  for arguments, message in [
      (("--images=9",), "--images and --out must be given together"),
      ((f"--out={tmp_path}/b.png",), "--images and --out must be given together"),
      (("--images=65", f"--out={tmp_path}/b.png"),
       "images=65: must be at most config.batch_size=64"),
      (("--images=1", f"--out={tmp_path}"), "must be a file")]:
    done = command("minw.summary", config, *arguments)
    assert done.code == 2 and message in done.err and done.err.count("\n") == 1
  assert [path.name for path in tmp_path.iterdir()] == ["a.png"]
