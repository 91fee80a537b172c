"""Evaluate a run or a packed network.

  python -m minw.evaluate --workdir=DIR [--split=test]
  python -m minw.evaluate --model=net.minw --dataset=cifar10 --data_dir=DIR
  python -m minw.evaluate --model=net.minw --images=FOLDER

A run is evaluated as its hard network, which has the same logits as the packed network.
"""

import collections
import json
import os
import pathlib
from typing import Any, Callable, Iterable, Iterator, Sequence

from absl import flags
import jax
import jax.numpy as jnp
import numpy as np
import optax

from minw import cli
from minw import config as config_lib
from minw import confusion
from minw import errors
from minw import infer
from minw import text
from minw.data import datasets
from minw.data import image_files
from minw.data import labeled
from minw.data import mirror
from minw.data import sources
from minw.data.batches import Examples
from minw.experiment import Experiment
from minw.workdir import metrics

_TOP5_CLASSES = 100  # Smallest number of classes with a top-5 accuracy.


class Evaluator:
  """Evaluator of loss and accuracy over a split, in which every example counts once.

  Damaged images are left out. With 100 classes or more, there is also the top-5
  accuracy, the fraction of examples whose label is among the five largest logits.
  """

  def __init__(self, experiment: Experiment):
    self._experiment = experiment
    self._step = experiment.jit(self._eval_step, static_argnames="mode")

  def hard(self, variables: Any, data: Any) -> dict[str, float]:
    """Evaluates the hard network (Eq 20).

    Args:
      variables: Trained variables, {"params", "batch_stats"}.
      data: The split, from `Experiment.data.load`.

    Returns:
      {"loss", "accuracy"}, and "top5_accuracy" with 100 classes or more.
    """
    return self.start_hard(variables, data)()

  def start_hard(
      self, variables: Any, data: Any
  ) -> Callable[[], dict[str, float]]:
    """Starts `hard`. The returned function waits for the result and returns it.

    Meanwhile the devices evaluate, and the host may do something else.
    """
    wait = self._start(self._experiment.fold(variables), data, 1.0, mode="hard")
    return lambda: _means(wait()[0])

  def confused(
      self, variables: Any, data: Any
  ) -> tuple[dict[str, float], np.ndarray]:
    """Evaluates the hard network and counts which class is taken for which.

    Args:
      variables: Trained variables, {"params", "batch_stats"}.
      data: The split, from `Experiment.data.load`.

    Returns:
      The result of `hard`, and the confusion matrix; see `minw.confusion`.
    """
    sums, labels, predicted = self._start(
        self._experiment.fold(variables), data, 1.0, mode="hard")()
    return _means(sums), confusion.count(
        labels, predicted, self._experiment.info.num_classes)

  def mixed(
      self, variables: Any, data: Any, alpha: jax.Array
  ) -> dict[str, Any]:
    """Evaluates the network of training, with batch norm's running statistics.

    Args:
      variables: Trained variables, {"params", "batch_stats"}.
      data: The split, from `Experiment.data.load`.
      alpha: The estimator's alpha.

    Returns:
      {"loss", "accuracy", "input_distance"}, and "top5_accuracy" with 100 classes or
      more. "input_distance" is a dict from layers' paths to the mean distance of
      activations from their grid.
    """
    return self.start_mixed(variables, data, alpha)()

  def start_mixed(
      self, variables: Any, data: Any, alpha: jax.Array
  ) -> Callable[[], dict[str, Any]]:
    """Starts `mixed`, as `start_hard` does."""
    wait = self._start(variables, data, alpha, mode="mixed")

    def result() -> dict[str, Any]:
      sums, _, _ = wait()
      distance = {path: value / sums["count"]
                  for path, value in sums["distance"].items()}
      return {**_means(sums), "input_distance": distance}

    return result

  def _start(self, variables, data, alpha, mode):
    """Starts the evaluation of a split.

    Returns:
      A function that returns sums over the split, its labels and the predicted classes.
      An example that is not counted has the label -1.
    """
    sums, classes, before = [], [], None
    for part, start in self._experiment.data.eval_batches(data):
      batch = self._step(variables, part, start, alpha, mode=mode)
      if part is not before:  # Without this wait, streamed batches would pile up.
        jax.block_until_ready(sums[-1:])
      before = part
      sums.append(batch[0])
      classes.append(batch[1])

    def wait():
      total = jax.tree.map(lambda *parts: float(np.sum(parts, dtype=np.float64)),
                           *jax.device_get(sums))
      return total, *np.concatenate(jax.device_get(classes), axis=1)

    return wait

  def _eval_step(self, variables, data, start, alpha, mode):
    images, labels, mask = self._experiment.data.eval_inputs(data, start)
    key = jax.random.fold_in(jax.random.key(0), start)
    logits, sown = self._experiment.model.apply(
        variables, images, alpha, mode=mode, mutable=["distance"],
        rngs={"estimator": key})
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    predicted = jnp.argmax(logits, axis=-1)
    correct = (predicted == labels).astype(jnp.float32)
    total = lambda values: jnp.sum(jnp.where(mask, values, 0.0))
    distance = {
        "/".join(str(part.key) for part in path[:-2]): total(values) for path, values
        in jax.tree_util.tree_leaves_with_path(sown.get("distance", {}))}
    sums = {"loss": total(losses), "correct": total(correct),
            "count": total(jnp.ones(mask.shape)), "distance": distance}
    if logits.shape[-1] >= _TOP5_CLASSES:
      best = jax.lax.top_k(logits, 5)[1]
      sums["top5"] = total((best == labels[:, None]).any(-1).astype(jnp.float32))
    # Every process needs the classes of all examples.
    classes = jax.lax.with_sharding_constraint(
        jnp.stack([jnp.where(mask, labels, -1), predicted]),
        self._experiment.replicated)
    return sums, classes


def _means(sums: dict[str, Any]) -> dict[str, float]:
  names = {"loss": "loss", "accuracy": "correct", "top5_accuracy": "top5"}
  return {name: sums[key] / sums["count"] for name, key in names.items() if key in sums}


def evaluate_workdir(
    workdir: str,
    split: str = "test",
    which: str = "last",
    data_dir: str | None = None,
    data_workers: int | None = None,
) -> dict[str, Any]:
  """Evaluates the hard network of a run, from its checkpoint.

  Args:
    workdir: Directory of the run.
    split: "train", "validation" or "test".
    which: Checkpoint to evaluate: "last", or "best" for the best validation accuracy.
    data_dir: Directory of the prepared data sets. If None, the run's config names it.
    data_workers: Number of processes that decode images of ImageNet. If None, the run's
      config sets it.

  Returns:
    {"step"}, the result of `Evaluator.hard` and that of `confusion.results`. For
    streamed data there are also "damaged", the number of images that were left out, and
    "decode_rate"; see `streamed.Split`.

  Raises:
    errors.UsageError: There is no run, no checkpoint or no data, its status is damaged,
      or the record of a completed run is not complete; see `metrics.check_complete`.
  """
  from minw.workdir import checkpoint  # Imports Orbax, which takes a while.

  config, saved, status = checkpoint.read_run(workdir, which, data_dir)
  if status and status["state"] == "done":
    metrics.check_complete(workdir, config, status)
  if data_dir is not None:
    config.data_dir = data_dir
  if data_workers is not None:
    config.data_workers = data_workers
  experiment = Experiment(config)
  variables = checkpoint.hard_variables(saved.tree)
  data = experiment.data.load(split)
  means, matrix = Evaluator(experiment).confused(variables, data)
  return {"step": saved.step, **means,
          **confusion.results(matrix, experiment.info.label_names),
          **experiment.data.report(data)}


def evaluate_model(
    path: str,
    split: str = "test",
    dataset: str | None = None,
    data_dir: str | None = None,
    batch_size: int = 256,
    data_workers: int | None = None,
) -> dict[str, Any]:
  """Evaluates a packed network.

  The file is not trusted. Its metadata names the data set of its training, but neither
  the directory of the data nor the number of processes that read them.

  Args:
    path: Path of the file.
    split: "train", "validation" or "test".
    dataset: Name of the data set. If None, it is the one of the network's training.
    data_dir: Directory of the prepared data sets. If None, it is that of a default
      config.
    batch_size: Number of images that are evaluated at a time.
    data_workers: Number of processes that decode images of ImageNet. If None, it is
      that of a default config.

  Returns:
    {"loss", "accuracy"}, "top5_accuracy" with 100 classes or more, and the result of
    `confusion.results`.

  Raises:
    errors.UsageError: The file is not a packed network, or there are no data for it.
  """
  network = infer.load_for_command(path)
  defaults = config_lib.default_config()
  place = mirror.place(data_dir or defaults.data_dir, defaults.cache_dir)
  config = network.program.metadata.get("config") or {}
  if dataset is None:
    dataset = config.get("dataset")
    errors.check(dataset is not None, "dataset", dataset,
                 "given: the file does not say what it was trained on")
    if not (isinstance(dataset, str) and datasets.exists(dataset, place)):
      raise errors.UsageError(
          f"model={os.fspath(path)!r} was trained on {text.quoted(dataset)}: --dataset"
          f" must be given, one of {', '.join(datasets.NAMES)}, or --data_dir, which"
          " holds it")
  # The file speaks of the data set of its training, and may hold any text.
  in_memory = config.get("in_memory") if dataset == config.get("dataset") else "auto"
  info = datasets.info(dataset, place,
                       in_memory if in_memory in datasets.IN_MEMORY else "auto")
  source_shape = network.program.source_shape
  errors.check(
      info.provides(source_shape) and info.num_classes == network.program.num_classes,
      "dataset", dataset, f"one of images of shape {network.program.source_shape} in"
      f" {network.program.num_classes} classes, as the network has")
  labels = network.program.metadata.get("labels")
  errors.check(dataset in datasets.NAMES or not labels
               or tuple(labels) == tuple(info.label_names),
               "dataset", dataset, "one with the labels that the network has")
  batches = sources.source_batches(
      info, split, place, batch_size, image_shape=source_shape,
      shrink=infer.shrinks(network.program), max_damaged=defaults.max_damaged,
      workers=defaults.data_workers if data_workers is None else data_workers)
  return _packed_results(network, batches, info.label_names)


def _packed_results(
    network: infer.Network, batches: Iterable[Examples], labels: Sequence[str]
) -> dict[str, Any]:
  """Evaluates a packed network; see `evaluate_model` for the result.

  Args:
    network: The network.
    batches: Batches of its images. Those with the label -1 are not counted.
    labels: Names of the classes.
  """
  sums: Any = collections.Counter()
  matrix = np.zeros((len(labels), len(labels)), np.int64)
  for part, wanted in batches:
    wanted = np.asarray(wanted)
    logits = network.logits(np.asarray(part)).astype(np.float64)[wanted >= 0]
    matrix += confusion.count(
        wanted[wanted >= 0], np.argmax(logits, axis=-1), len(labels))
    wanted = wanted[wanted >= 0, None]
    shifted = logits - logits.max(-1, keepdims=True)
    log_sum = np.log(np.exp(shifted).sum(-1))
    order = np.argsort(-logits, kind="stable")
    sums["count"] += len(wanted)
    sums["loss"] += float((
        log_sum - np.take_along_axis(shifted, wanted, -1)[:, 0]).sum())
    sums["correct"] += int((order[:, :1] == wanted).sum())
    if network.program.num_classes >= _TOP5_CLASSES:
      sums["top5"] += int((order[:, :5] == wanted).sum())
  return {**_means(sums), **confusion.results(matrix, labels)}


def evaluate_images(
    path: str, folder: str | os.PathLike, split: str | None = None
) -> tuple[dict[str, Any], dict[str, str]]:
  """Evaluates a packed network on image files, whose folders are their labels.

  Images are prepared as `minw.infer` prepares them.

  Args:
    path: Path of the packed network.
    folder: Folder of the images; see `labeled.find_known`.
    split: Split of the folder; see `labeled.find_known`.

  Returns:
    The result, as of `evaluate_model`, with "damaged", the number of images that were
    left out because they cannot be read. And the reason for each of them, by its path.

  Raises:
    errors.UsageError: The file is not a packed network, the folder has a class that the
      network does not know, or none of its images can be read.
  """
  network = infer.load_for_command(path)
  numbers = {label: i for i, label in enumerate(network.labels)}
  wanted = {str(example.content): numbers[example.label] for example
            in labeled.find_known(pathlib.Path(folder), network.labels, split)}
  damaged: dict[str, str] = {}

  def batches() -> Iterator[Examples]:
    for part, images, failures in infer.read_batches(network, wanted):
      names = list(map(str, part))
      damaged.update((names[i], str(error)) for i, error in failures.items())
      yield Examples(images, np.array(
          [wanted[name] for i, name in enumerate(names) if i not in failures],
          np.int32))
    if len(damaged) == len(wanted):
      name, reason = next(iter(damaged.items()))
      raise errors.UsageError(
          f"images={os.fspath(folder)!r}: none of its images can be read,"
          f" {text.printable(name)} for example ({reason})")

  results = _packed_results(network, batches(), network.labels)
  return {**results, "damaged": len(damaged)}, damaged


def define_flags() -> None:
  """Defines the flags of the command."""
  cli.DEFINE_path("workdir", None, "Directory of a training run.", remote=True)
  cli.DEFINE_path(
      "model", None,
      "Packed network to evaluate instead of a run. It is a file or the name of a "
      "network that comes with minw.")
  flags.DEFINE_string(
      "dataset", None,
      "Data set to evaluate a packed network on. By default it is the one of its "
      "training.")
  cli.DEFINE_path(
      "images", None,
      "Folder to evaluate a packed network on instead of a data set. It has a folder "
      "of images for each class, or such folders in train/, validation/ and test/.")
  flags.DEFINE_enum(
      "split", "test", ["train", "validation", "test"],
      "Split of the data set to evaluate on.")
  flags.DEFINE_enum(
      "checkpoint", "last", ["last", "best"],
      "Checkpoint to evaluate: the last one, or the one with the best validation "
      "accuracy.")
  cli.DEFINE_path(
      "data_dir", None,
      "Directory of the prepared data sets. The default is that of the run's config, "
      "or ~/tensorflow_datasets for a packed network. It may be gs://BUCKET/NAME.",
      remote=True)
  cli.DEFINE_path(
      "confusion", None,
      "JSON file to write the confusion matrix to. A picture of it is drawn beside the "
      "file, with the suffix .png.")
  flags.DEFINE_integer(
      "data_workers", None,
      "Number of processes that decode images of imagenet2012. The default is that of "
      "the run's config. For a packed network, threads of this process decode them by "
      "default.",
      lower_bound=0)


def main() -> int:
  """Evaluates what the flags name; returns the exit code."""
  f = flags.FLAGS
  if (f.workdir is None) == (f.model is None):
    raise errors.UsageError("one of --workdir and --model must be given, not both")
  errors.check(f.confusion is None or (f.confusion.endswith(".json")
                                       and not os.path.isdir(f.confusion)),
               "confusion", f.confusion, "a file whose name ends in .json")
  damaged = {}
  if f.workdir is not None:
    _check_unused("with --workdir, whose config names the data", "dataset", "images")
    result = evaluate_workdir(
        f.workdir, f.split, f.checkpoint, f.data_dir, f.data_workers)
  else:
    _check_unused("with --model, which holds a single checkpoint", "checkpoint")
    if f.images is None:
      result = evaluate_model(
          f.model, f.split, f.dataset, f.data_dir, data_workers=f.data_workers)
    else:
      _check_unused("with --images, which are the data", "dataset", "data_dir",
                    "data_workers")
      image_files.silence_pillow()
      result, damaged = evaluate_images(
          f.model, f.images, f.split if f["split"].present else None)
  where = {"split": f.split} if f.images is None else {"images": f.images}
  result = {**where, "mode": "hard", **result}
  if f.confusion:
    confusion.write(f.confusion, result)
  del result["confusion"]
  print(json.dumps(result))
  for name, reason in damaged.items():
    cli.print_error(f"images={name!r}: {reason}")
  return int(bool(damaged))


def _check_unused(why: str, *names: str) -> None:
  """Raises UsageError for a flag that was given and would have no effect."""
  for name in names:
    flag = flags.FLAGS[name]
    errors.check(not flag.present, name, flag.value, f"left out {why}")


if __name__ == "__main__":
  cli.run(main, define_flags)
