"""Pack a trained network: `python -m minw.pack --workdir=DIR --out=FILE`.

FILE holds the weights and thresholds as integers. Its logits are those of the trained
hard network, bit for bit. Packing is refused if a part of the network has no exact
integer form.
"""

import hashlib
import json
import math
from typing import Any, Sequence

from absl import flags
import jax
import jax.numpy as jnp
import numpy as np

from minw import cli
from minw import config as config_lib
from minw import errors
from minw import fold
from minw import packed
from minw import structure
from minw.data import pixels as pixels_lib
from minw.experiment import Experiment
from minw.packed import metadata as metadata_lib
from minw.packing import array_rules
from minw.packing import layer_rules
from minw.packing.builder import Array
from minw.packing.builder import Builder


def pack_workdir(
    workdir: str, which: str = "last", data_dir: str | None = None) -> packed.Program:
  """Packs the network of a run.

  Args:
    workdir: Directory of the run.
    which: Checkpoint: "last", or "best" for the one with the best validation accuracy.
    data_dir: Directory of the prepared data sets. If None, the run's config names it.
      Only a data set that minw does not know by name must be there.

  Raises:
    errors.UsageError: There is no run or checkpoint, or its network does not pack.

  Examples:
    >>> program = pack.pack_workdir("runs/digits", which="best")
    >>> program.source_shape
    (8, 8, 1)
  """
  from minw.workdir import checkpoint  # Imports Orbax, which takes a while.

  config, saved, _ = checkpoint.read_run(workdir, which, data_dir)
  text = config_lib.to_json(config)
  shared = metadata_lib.shared(json.loads(text))
  if data_dir is not None:
    config.data_dir = data_dir
  try:
    return pack_experiment(
        Experiment(config), checkpoint.hard_variables(saved.tree),
        {"config": shared, "step": saved.step,
         "config_hash": hashlib.sha256(text.encode()).hexdigest()})
  except ValueError as error:
    raise errors.UsageError(f"workdir={workdir!r}: {error}") from error


def pack_experiment(
    experiment: Experiment, variables: Any, metadata: dict[str, Any] | None = None
) -> packed.Program:
  """Packs the network of an experiment, for the images of its data set.

  Args:
    experiment: The experiment.
    variables: Trained variables, {"params", "batch_stats"}.
    metadata: See `pack`.

  Raises:
    ValueError: See `pack`.

  Examples:
    >>> from minw import config, experiment, layers
    >>> digits = experiment.Experiment(config.default_config("digits"))
    >>> variables = layers.initialize(digits.model, digits.image_shape)
    >>> pack.pack_experiment(digits, variables).source_shape
    (8, 8, 1)
  """
  return pack(
      experiment.model, variables, pixels=experiment.pixels,
      source_shape=experiment.info.image_shape, crop=experiment.image_shape[:2],
      labels=experiment.info.label_names, metadata=metadata)


def pack(
    model: Any,
    variables: Any,
    *,
    pixels: pixels_lib.Pixels,
    source_shape: Sequence[int],
    crop: Sequence[int] | None = None,
    labels: Sequence[str] = (),
    metadata: dict[str, Any] | None = None,
) -> packed.Program:
  """Packs any network that is made of minw's layers.

  The structure is read from the jaxpr of the hard mode, see `minw.structure`: layers
  are equations in it, and `minw.packing` has rules for them and for what may stand
  between them. No layer is registered. A network with an equation that has no rule is
  refused.

  Args:
    model: Flax module that is called as model(images, mode="hard"). Between minw's
      layers it may reshape to (batch, height * width * channels), add, concatenate
      channels, take every n-th pixel, and pad channels with zeros. Over windows or
      whole maps it may take maxima, sums, and means of 2^n numbers.
    variables: Trained variables, {"params", "batch_stats"}.
    pixels: Normalization of pixels, `minw.data.pixels.pixels("integer", ...)`.
    source_shape: (height, width, channels) of the images.
    crop: (height, width) of the center of the images, which is the network's input. If
      None, the whole image is.
    labels: Names of the classes.
    metadata: Other metadata of the file; see `minw.packed.metadata`.

  Raises:
    ValueError: A part of the network cannot be packed, and the message names the layer.
      Or the labels or the metadata break the rules of `minw.packed.metadata`.

  Examples:
    >>> net = models.ConvNet(num_classes=10, conv_widths=(32,), dense_widths=())
    >>> program = pack.pack(
    ...     net, layers.initialize(net, (8, 8, 1)), source_shape=(8, 8, 1),
    ...     pixels=pixels.pixels("integer", (0.5,), (0.25,)))
    >>> [op.name for op in program.ops]
    ['conv1', 'norm_conv1', 'dense1', 'norm_dense1']
  """
  source_height, source_width, channels = source_shape
  height, width = crop or source_shape[:2]
  offset = np.asarray(pixels.offset)
  if (np.asarray(pixels.divisor) != 64).any() or (offset != np.round(offset)).any():
    raise ValueError(
        f"pixels={pixels}: only integer pixels pack, (value - offset) / 64")
  image_shape = (height, width, channels)
  hard = fold.fold(model, variables, pixels_lib.probe(pixels, image_shape))
  images = jax.ShapeDtypeStruct((2, *image_shape), jnp.float32)
  network = structure.trace(model, hard, images, "hard")
  builder = Builder(image_shape, offset)

  def apply(eqn: Any, given: Sequence[Any], where: str) -> Sequence[Any]:
    if eqn.primitive is structure.layer_p:
      call = network.calls[eqn.params["index"]]
      return [layer_rules.apply(builder, call, given, where)]
    if not any(isinstance(x, Array) for x in given):
      return structure.apply_equation(eqn, given)
    return array_rules.apply(builder, eqn, given)

  results = structure.evaluate(
      network.jaxpr, [*jax.tree.leaves(hard), builder.image], apply)
  result = _check_logits(builder, results)
  num_classes = math.prod(result.shape)
  metadata = {"labels": tuple(labels), **(metadata or {})}
  metadata_lib.encode(metadata, num_classes)  # Reports bad metadata before writing.
  program = packed.Program(
      (source_height, source_width, channels), (height, width), offset.astype(np.uint8),
      num_classes, tuple(builder.ops), metadata)
  packed.infer_values(program)
  return program


def _check_logits(builder: Builder, results: Sequence[Any]) -> Array:
  """Returns what the network returns, if only its last operation makes logits.

  Raises:
    ValueError: It returns something else.
  """
  ops = builder.ops
  name = ops[-1].name if ops else "the network"
  if len(results) != 1:
    raise structure.refusal(f"{name}: the network returns {len(results)} arrays; it"
                            " must return the logits alone")
  result, = results
  if not isinstance(result, Array) or not ops or result.value != len(ops):
    raise structure.refusal(
        f"{name}: its result is not the one that the network returns")
  if result.shape[:2] != (1, 1):
    raise structure.refusal(
        f"{name}: gives logits of shape {result.shape}, for each place of a map; sum"
        " over it or flatten it first")
  *before, last = map(_makes_logits, ops)
  if any(before):
    raise structure.refusal(f"{ops[before.index(True)].name}: has bits=None, which only"
                            " the last layer may have")
  if not last:
    raise structure.refusal(
        f"{name}: is the last layer, which must be a NormQuant with bits=None")
  return result


def _makes_logits(op: packed.Op) -> bool:
  return isinstance(op, packed.Logits) or (
      isinstance(op, packed.FloatNorm) and op.bits is None)


def define_flags() -> None:
  """Defines the flags of the command."""
  cli.DEFINE_path("workdir", None, "Directory of the run.", remote=True)
  cli.DEFINE_path("out", None, "File to write.")
  flags.DEFINE_enum(
      "checkpoint", "last", ["last", "best"],
      "Checkpoint to pack: the last one, or the one with the best validation accuracy.")
  flags.DEFINE_bool(
      "verify", False,
      "Whether to compare every layer with the trained network, on its "
      "test split, or on random images if there are no data.")
  cli.DEFINE_path(
      "data_dir", None,
      "Directory of the prepared data sets; that of the run's config by default. It "
      "may be gs://BUCKET/NAME.", remote=True)
  cli.require("workdir", "out")


def main() -> int:
  """Packs a run as the flags say; returns the exit code."""
  f = flags.FLAGS
  program = pack_workdir(f.workdir, f.checkpoint, f.data_dir)
  try:
    size = packed.write(f.out, program)
  except OSError as error:
    raise errors.UsageError(f"out={f.out!r} cannot be written: {error}") from error
  print(f"{f.out}: {size / 2**20:.3f} MiB, {len(program.ops)} operations,"
        f" step {program.metadata['step']}")
  if not f.verify:
    return 0
  from minw import verify  # It needs data; packing does not.
  return verify.verify_workdir(f.workdir, f.out, f.checkpoint, f.data_dir)


if __name__ == "__main__":
  cli.run(main, define_flags)
