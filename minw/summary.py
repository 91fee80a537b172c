"""Print the storage and operations of a network, layer by layer.

`python -m minw.summary --config=FILE` counts them without training the network. With
`--images=8 --out=FILE.png`, it also draws training images as the network sees them.
With `--step`, it compiles the training step and prints its memory and operations.
"""

import contextlib
import itertools
import math
import os
import pathlib
from typing import Any, NamedTuple, Sequence

from absl import flags
import jax
import numpy as np

from minw import cli
from minw import errors
from minw import layers as layers_lib

OPERATIONS = ("XNOR", "XNOR ADDER", "SHIFT", "SHIFT ADDER", "MAC")

_MIB = 2 ** 20


def operation(weight_bits: int, input_bits: int) -> str:
  """The kind of operation that a multiply-accumulate takes in inference.

  The kinds are those of the paper's section on costs. Let m be the smaller and p the
  larger number of bits:

      m       p = 1..5    p = 8, 16, 32
      1, 2    XNOR        XNOR ADDER
      3..5    SHIFT       SHIFT ADDER
      8..                 MAC

  The paper has 1, 2, 3 and 16 bits. Here 4 and 5 bits, whose levels are powers of two
  too, count as 3 bits, and all float formats count as 16 bits.

  Args:
    weight_bits: Bits of the weights.
    input_bits: Bits of the inputs. An image counts as 16 bits.

  Returns:
    One of `OPERATIONS`.
  """
  small, large = sorted((weight_bits, input_bits))
  if small > 5:
    return "MAC"
  return ("XNOR" if small <= 2 else "SHIFT") + (" ADDER" if large > 5 else "")


class LayerSummary(NamedTuple):
  """The costs of a layer with weights.

  Attributes:
    path: Path of the layer.
    output_shape: Shape of the output, without the batch.
    bits: Bits of the weights, 1 to 5, or a float format.
    input_bits: Bits of the input, 16 for the image.
    weights: Number of weights.
    packed_bytes: Bytes that the weights take at bits / 8 each, rounded up to whole
      bytes.
    macs: Multiply-accumulates for one image, including those with padding.
    operation: Kind of these operations, one of `OPERATIONS`.
  """

  path: str
  output_shape: tuple[int, ...]
  bits: layers_lib.Bits
  input_bits: int
  weights: int
  packed_bytes: int
  macs: int
  operation: str

  @property
  def compression(self) -> float:
    """The size of the weights in float32, divided by their packed size."""
    return 4 * self.weights / self.packed_bytes


class Summary(NamedTuple):
  """The costs of a network.

  Attributes:
    layers: Costs of the layers with weights.
    norm_parameters: Number of batch norm's float32 parameters. No other number here
      includes them.
  """

  layers: tuple[LayerSummary, ...]
  norm_parameters: int

  @property
  def weights(self) -> int:
    """The number of weights."""
    return sum(layer.weights for layer in self.layers)

  @property
  def packed_bytes(self) -> int:
    """The number of bytes that all packed weights take."""
    return sum(layer.packed_bytes for layer in self.layers)

  @property
  def macs(self) -> int:
    """The number of multiply-accumulates for one image."""
    return sum(layer.macs for layer in self.layers)

  @property
  def compression(self) -> float:
    """The size of the weights in float32, divided by their packed size."""
    return 4 * self.weights / self.packed_bytes

  @property
  def weights_by_bits(self) -> dict[layers_lib.Bits, int]:
    """The number of weights of each bit width, the narrowest first."""
    widths = {layer.bits for layer in self.layers}
    return {bits: sum(layer.weights for layer in self.layers if layer.bits == bits)
            for bits in sorted(widths, key=layers_lib.operand_bits)}

  @property
  def macs_by_operation(self) -> dict[str, int]:
    """The multiply-accumulates of each kind that occurs, the cheapest kind first."""
    used = {layer.operation for layer in self.layers}
    return {name: sum(layer.macs for layer in self.layers if layer.operation == name)
            for name in OPERATIONS if name in used}


def summarize(layers: Sequence[layers_lib.LayerInfo]) -> Summary:
  """Computes the costs of a network.

  Args:
    layers: Layers of the network, from `layers.trace`.
  """
  rows = []
  for layer in layers:
    if layer.kind == "norm":
      continue
    assert layer.bits is not None  # Only a norm may have None.
    bits = layers_lib.operand_bits(layer.bits)
    weights = math.prod(layer.kernel_shape)
    rows.append(LayerSummary(
        path=layer.path,
        output_shape=layer.output_shape,
        bits=layer.bits,
        input_bits=layer.input_bits,
        weights=weights,
        packed_bytes=math.ceil(weights * bits / 8),
        # A dense layer has one position. A convolution has height * width positions.
        macs=math.prod(layer.output_shape[:-1]) * weights,
        operation=operation(bits, layer.input_bits)))
  return Summary(tuple(rows), sum(layer.channel_parameters for layer in layers))


def format_table(network: Summary) -> str:
  """Formats a table with a row for each layer and totals by bits and by operation."""
  header = ("layer", "output", "input bits", "weight bits", "weights", "bytes",
            "smaller", "MACs", "operation")
  rows = [(layer.path, "x".join(map(str, layer.output_shape)), f"{layer.input_bits}",
           f"{layer.bits}", f"{layer.weights:,}", f"{layer.packed_bytes:,}",
           f"{layer.compression:.1f}x", f"{layer.macs:,}", layer.operation)
          for layer in network.layers]
  total = ("total", "", "", "", f"{network.weights:,}", f"{network.packed_bytes:,}",
           f"{network.compression:.1f}x", f"{network.macs:,}", "")
  table = _align([header, *rows, total], left=(0, 1, 8))
  rule = "-" * max(map(len, table))

  weights = [(f"{count:,}", _bits_name(bits), f"{count / network.weights:.1%}")
             for bits, count in network.weights_by_bits.items()]
  macs = [(f"{count:,}", name, f"{count / network.macs:.1%}")
          for name, count in network.macs_by_operation.items()]
  totals = _align([
      *_titled("weights", weights),
      ("packed", f"{network.packed_bytes / _MIB:.3f}", "MiB", ""),
      ("in float32", f"{4 * network.weights / _MIB:.3f}", "MiB", ""),
      *_titled("MACs", macs),
      ("batch norm", f"{network.norm_parameters:,}", "float32, beside", "")],
      left=(0, 2))
  return "\n".join(
      [table[0], rule, *table[1:-1], rule, table[-1], "", *totals]) + "\n"


def summary(model: Any, image_shape: Sequence[int]) -> str:
  """Formats the costs of a network as a table; see `format_table`.

  Args:
    model: Network made of `minw.layers`.
    image_shape: Shape of its input, (height, width, channels).
  """
  return format_table(summarize(layers_lib.trace(model, image_shape)))


def _bits_name(bits: layers_lib.Bits) -> str:
  if isinstance(bits, str):
    return bits
  return "1 bit" if bits == 1 else f"{bits} bits"


def _titled(title: str, rows: list[tuple[str, ...]]) -> list[tuple[str, ...]]:
  return [("" if i else title, *row) for i, row in enumerate(rows)]


def _align(rows: list[tuple[str, ...]], left: tuple[int, ...]) -> list[str]:
  """Formats rows as lines with aligned columns; those in `left` are left-aligned."""
  widths = [max(map(len, column)) for column in zip(*rows)]
  return ["  ".join(
      cell.ljust(width) if i in left else cell.rjust(width)
      for i, (cell, width) in enumerate(zip(row, widths))).rstrip() for row in rows]


def first_batch(experiment: Any, count: int) -> tuple[np.ndarray, list[str]]:
  """Returns images of the first training batch as the network sees them.

  Args:
    experiment: The experiment, see `minw.experiment`.
    count: Number of images.

  Returns:
    images: uint8 (count, size, size, channels): the augmented crops.
    titles: The label of each image, or both labels of a mixed one with their shares.

  Raises:
    errors.UsageError: There are no data.
  """
  from minw.data import augment

  data = experiment.data
  with contextlib.closing(data.train_batches(data.load("train"), 0)) as batches:
    examples, order = next(batches)
    images, labels = jax.device_get(experiment.jit(
        lambda *batch: data.train_inputs(*batch, 0, experiment.keys(0)[0]))(
            examples, order))
  offset, divisor = map(np.array, experiment.pixels)
  pixels = np.round(images[:count] * divisor + offset).astype(np.uint8)
  name = lambda label: experiment.info.label_names[label]
  if not isinstance(labels, augment.MixedLabels):
    return pixels, [name(label) for label in labels[:count]]
  return pixels, [
      f"{share:.0%} {name(one)}\n{1 - share:.0%} {name(other)}"
      for one, other, share in itertools.islice(zip(*labels), count)]


def define_flags() -> None:
  """Defines the flags of the command."""
  from minw import config_flag

  config_flag.define()
  flags.DEFINE_integer(
      "images", None,
      "Number of images of the first training batch to draw as the network sees them: "
      "cropped and augmented. --out names the file.", lower_bound=1)
  cli.DEFINE_path("out", None, "PNG file for the images.")
  flags.DEFINE_bool(
      "step", False,
      "Whether to compile a training step for the devices of this machine and to print "
      "its memory and operations on each of them.")
  flags.DEFINE_float(
      "images_per_second", None, "Rate of training, for which the time of the run is "
      "printed.", lower_bound=1e-3)


def main() -> None:
  """Prints the table of a config's network, and draws images if the flags say so."""
  f = flags.FLAGS
  if (f.images is None) != (f.out is None):
    raise errors.UsageError("--images and --out must be given together")
  if f.out:
    errors.check(not os.path.isdir(f.out), "out", f.out, "a file")
    errors.check(f.images <= f.config.batch_size, "images", f.images,
                 f"at most config.batch_size={f.config.batch_size}")
  # These imports take seconds. Errors in flags are reported before them.
  from minw import experiment as experiment_lib
  from minw import plots
  from minw import progress

  experiment = experiment_lib.Experiment(f.config)
  if f.out:
    plots.save(plots.images_figure(*first_batch(experiment, f.images)),
               pathlib.Path(f.out))
  parts = [format_table(summarize(experiment.layers))]
  if f.step:
    from minw import training_cost

    cost = training_cost.of_step(experiment)
    parts.append(training_cost.format_table(cost, f.config.batch_size))
  if f.images_per_second:
    images = experiment.num_steps * f.config.batch_size
    parts.append(
        f"training on {images:,} images takes"
        f" {progress.duration(images / f.images_per_second)}, without evaluation, at"
        f" {f.images_per_second:,g} images a second\n")
  print("\n".join(parts), end="")


if __name__ == "__main__":
  cli.run(main, define_flags)
