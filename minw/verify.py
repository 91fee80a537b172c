"""Comparison of a packed network with the trained network, layer by layer.

The packed network must equal the hard network bit for bit. The hard network must equal
the trained network up to rounding; see `minw.trained`.
"""

from typing import Any, Iterator, Sequence

import jax
import numpy as np

from minw import errors
from minw import infer
from minw import packed
from minw import quantizers
from minw import text
from minw import trained
from minw.data import pixels as pixels_lib
from minw.experiment import Experiment
from minw.kernels import native
from minw.kernels import reference

_LAYERS = (packed.Conv, packed.Threshold, packed.Logits, packed.FloatNorm)
# Allowed error of sums of floats, relative to the largest one. Such sums depend on the
# order of their terms.
_TOLERANCE = 1e-5


def differences(
    program: packed.Program,
    model: Any,
    hard: Any,
    pixels: pixels_lib.Pixels,
    images: np.ndarray,
    backends: list[infer.Network],
    batch_size: int = 64,
) -> Iterator[str]:
  """Compares a packed network with the hard network it was made of.

  Each backend runs the whole network on all images. The NumPy reference is slow and
  therefore runs on the first batch only. It computes each operation from the hard
  network's results of the operations before it.

  Integers and logits must be equal. If an operand is in a float format, the results of
  the reference on equal inputs must be within 1e-5 of the largest result of an
  operation, and the predicted labels of each backend that differ are counted.

  Args:
    program: Packed network.
    model: Trained network, a Flax module.
    hard: Variables of its hard network, from `fold.fold`.
    pixels: Normalization of the pixels.
    images: uint8 images (n, *program.source_shape).
    backends: The packed network on each backend to compare.
    batch_size: Largest number of images that are compared at a time.

  Yields:
    A line for each difference. For each backend, only the first one is reported.
  """
  kinds = packed.infer_values(program)
  exact = all(k.kind != "FLOAT" for k in kinds[:-1])
  run = jax.jit(lambda hard, images: trained.hard_outputs(
      model, hard, pixels_lib.normalize(images, pixels)))
  broken, disagree = set(), {}
  batch_size = trained.even_batch_size(len(images), batch_size)
  for start in range(0, len(images), batch_size):
    batch = images[start:start + batch_size]
    crop = packed.crop(program, batch)
    outputs = [np.asarray(x) for x in run(hard, crop)]
    wanted = _program_values(program, kinds, crop, outputs)
    if start == 0:
      yield from _against_reference(program, kinds, wanted)
    for network in backends:
      if network.backend in broken:
        continue
      got = network.values(batch) if exact else [network.logits(batch)]
      if not exact:
        labels = wanted[-1].reshape(len(batch), -1).argmax(-1)
        disagree[network.backend] = disagree.get(network.backend, 0) + int(
            (got[0].argmax(-1) != labels).sum())
        continue
      for op, want, have in zip(program.ops, wanted[1:], got[1:], strict=True):
        where = np.argwhere(np.asarray(want) != have)
        if len(where):
          broken.add(network.backend)
          first = tuple(int(i) for i in where[0])
          yield (f"{network.backend}: {text.printable(op.name)} differs first, at image"
                 f" {start + first[0]}, (row, column, channel) {first[1:]}:"
                 f" {have[first]} where the trained network has {want[first]};"
                 f" {len(where)} of {want.size} in this batch differ")
          break
  for name, count in disagree.items():
    if count:
      yield f"{name}: {count} of {len(images)} labels differ (float operands)"


def _program_values(
    program: packed.Program, kinds: Sequence[Any], crop: np.ndarray, outputs: Any
) -> list[np.ndarray]:
  """Converts the hard network's outputs to the program's values.

  The hard network computes with levels. Codes are indices of levels, and integer sums
  are sums of levels divided by the units of weights and inputs. Values that have no
  layer in the hard network, such as those of pooling, are computed by the reference.
  """
  values = [crop.astype(np.int32) - np.asarray(program.offset, np.int32)]
  outputs = iter(outputs)
  for op, kind in zip(program.ops, kinds[1:]):
    if not isinstance(op, _LAYERS):
      given = packed.inputs(op)
      values.append(reference.run_op(
          op, [values[i] for i in given], [kinds[i] for i in given], kind))
      continue
    output = next(outputs).reshape(len(crop), *kind.shape)
    if kind.kind == "CODE":
      levels = output / quantizers.step_size(kind.bits)
      table = np.asarray(packed.LEVELS[kind.bits])
      output = np.searchsorted(table, levels) - packed.max_code(kind.bits)
      np.testing.assert_array_equal(table[output + packed.max_code(kind.bits)], levels)
    elif kind.kind == "INT":
      assert isinstance(op, packed.Conv)
      sums = output / (op.weight_unit * op.input_unit)
      output = sums.astype(np.int32)
      np.testing.assert_array_equal(output, sums)
    values.append(output)
  return values


def _against_reference(program, kinds, wanted):
  for i, op in enumerate(program.ops):
    given = packed.inputs(op)
    have = reference.run_op(
        op, [np.asarray(wanted[j]) for j in given], [kinds[j] for j in given],
        kinds[i + 1])
    want = np.asarray(wanted[i + 1])
    floats = kinds[i + 1].kind == "FLOAT" and not isinstance(op, packed.Logits)
    bound = _TOLERANCE * np.abs(want).max() if floats else 0
    if (np.abs(have - want) > bound).any():
      yield (f"reference: {text.printable(op.name)} differs from the trained network on"
             " equal inputs")
      return


def verify_workdir(
    workdir: str, path: str, which: str = "last", data_dir: str | None = None
) -> int:
  """Verifies the packed network of a run, and prints the result.

  Args:
    workdir: Directory of the run.
    path: Path of its packed network.
    which: Checkpoint that was packed, "last" or "best".
    data_dir: Directory of the prepared data sets. If None, the run's config names it.

  Returns:
    Exit code: 0 if nothing differs, otherwise 1.
  """
  from minw.workdir import checkpoint  # Imports Orbax, which takes a while.

  config, saved, _ = checkpoint.read_run(workdir, which, data_dir)
  if data_dir is not None:
    config.data_dir = data_dir
  experiment = Experiment(config)
  variables = checkpoint.hard_variables(saved.tree)
  hard = experiment.fold(variables)
  try:
    images = experiment.data.source_images("test")
    name = f"the test split of {config.dataset}"
  except errors.UsageError as error:
    print(f"Random images are compared, because there are no data: {error}")
    shape = (1024, *experiment.info.image_shape)
    images = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    name = "random images"
  names = [b for b in infer.BACKENDS[:2] if b != "native" or native.available()]
  backends = [infer.load_for_command(path, backend=b) for b in names]
  found = list(differences(
      backends[0].program, experiment.model, hard, experiment.pixels, images, backends))
  compared = trained.compare(
      experiment.model, variables, experiment.pixels,
      packed.crop(backends[0].program, images))
  labels = (f"{compared.labels} of {compared.images} labels of the hard network differ"
            " from those of training (alpha = 1)")
  if compared.problem:
    found.append(f"{compared.problem}; {labels}")
  for line in found:
    print(line)
  if not found:
    print(f"equal, layer by layer, on {len(images)} images ({name}):"
          f" the trained network, {', '.join(names)} and, on the first 64, NumPy")
    print(labels)
  return 1 if found else 0
