"""Records of finished runs, read from their workdirs or from the lines of a study.

A study is a file of JSON lines that `collect` writes, one for each run. A record is
such a line:

    config: All fields of the config as JSON, except those of `LOCAL`.
    run: Name of the run's folder. In a sweep this is the name of the run.
    seed: Seed of the config.
    commit, hardware, versions: Environment of the run's last start; null if unknown.
    earlier: Environments of earlier starts, if they differed.
    seconds: Wall time of all starts together.
    step, test_accuracy, test_loss, best_step, best_test_accuracy, best_test_loss and
      others: Fields of status.json.
    curve, histograms: Paths of files, relative to the study's folder; null if there are
      none.
"""

import contextlib
import functools
import hashlib
import json
import os
import pathlib
from typing import Any, Iterator, NamedTuple, Sequence

from minw import config as config_lib
from minw import config_fields
from minw import errors
from minw import files
from minw import json_files
from minw import paths as paths_lib
from minw import titles
from minw.workdir import environment
from minw.workdir import metrics
from minw.workdir import run_files

LOCAL = config_fields.MACHINE
_RATES = ("examples_per_second", "decode_rate")
NOT_COPIED = ", ".join([
    "checkpoints", "TensorBoard's files", *LOCAL, *_RATES, "measurements by layer"])

# Fields that do not affect the hard network, except that the seed changes its random
# numbers.
NO_MATTER = ("seed", *LOCAL, "shard_optimizer", "max_damaged", "eval_batch_size",
             "eval_train", "histogram_layers", "histogram_epochs")

# Fields that matter only if something is quantized.
_OF_ESTIMATOR = ("estimator", "input_estimator", "estimator_gradient",
                 "estimator_noise_steps", "alpha_start", "alpha_final", "alpha_end",
                 "alpha_shape", "alpha_per_layer", "alpha_backward", "alpha_weights")

Record = dict[str, Any]


class LeftOut(NamedTuple):
  """A run that is not counted, and the reason.

  Attributes:
    name: Workdir of the run, or its study and line.
    why: Clause that gives the reason.
  """

  name: str
  why: str


def record(workdir: str) -> Record:
  """Returns the record of the run in `workdir`.

  The paths of its files begin with `workdir`.

  Raises:
    errors.UsageError: There is no run, it is not done, or its record is not complete,
      see `metrics.check_complete`.
  """
  config = run_files.read_config(workdir)
  status = run_files.read_status(workdir) or {"state": "not begun", "step": 0}
  errors.check(status["state"] == "done", "workdir", workdir,
               f"that of a run that is done: it is {status['state']} at step "
               f"{status['step']}")
  lacking = [name for name in run_files.RESULTS if name not in status]
  errors.check(not lacking, "workdir", workdir,
               f"that of a run whose status.json has {', '.join(lacking)}")
  metrics.check_complete(workdir, config, status)
  run = environment.read(workdir)
  *earlier, last = run["environments"] or [
      {"commit": None, "hardware": None, "versions": None}]
  fields = config_lib.to_fields(config)
  for name in ("init_from", "teacher"):
    fields[name] = _source(config[name])
  file = lambda name: (lambda path: str(path) if paths_lib.exists(path) else None)(
      paths_lib.at(workdir) / name)
  return {
      "config": {name: value for name, value in fields.items() if name not in LOCAL},
      "run": paths_lib.at(workdir).name,
      "seed": config.seed,
      **last,
      **({"earlier": earlier} if earlier else {}),
      "seconds": run["seconds"],
      **{name: value for name, value in status.items() if name != "state"},
      "curve": file("metrics.jsonl"),
      "histograms": file("histograms.jsonl")}


def _source(workdir: str) -> str:
  """Returns the description of the config of another run, see `as_source`.

  Runs of different seeds may start from different workdirs. If the configs there differ
  only in the seed, the runs get the same description and can be averaged. If there is
  no readable config, the result is `workdir` itself.
  """
  if not workdir:
    return ""
  try:
    config = run_files.read_config(paths_lib.expand(workdir, remote=True))
  except (errors.UsageError, ValueError):
    return workdir
  return as_source(config_lib.to_fields(config))


def as_source(config: dict[str, Any]) -> str:
  """Returns what records of runs hold as `init_from` or `teacher`, for a run of it."""
  return f"a run of config {_digest(key(config))}"


def acting(config: dict[str, Any]) -> dict[str, Any]:
  """Returns the config, with `titles.NO_ESTIMATOR` for fields that have no effect.

  If all operands of a network are floats, its config's estimator and alpha do not
  matter.
  """
  if titles.estimator(config) != titles.NO_ESTIMATOR:
    return config
  return config | dict.fromkeys(_OF_ESTIMATOR, titles.NO_ESTIMATOR)


def key(config: dict[str, Any], without: Sequence[str] = ()) -> str:
  """Returns a string that is equal for configs of the same experiment.

  It has the `settings`, and is therefore the same after fields are added to configs.
  """
  return json.dumps(settings(config, without), sort_keys=True)


def settings(config: dict[str, Any], without: Sequence[str] = ()) -> dict[str, Any]:
  """Returns the fields that have an effect and differ from `config.default_config`.

  The fields in `without` and in `NO_MATTER` are left out.
  """
  default = config_lib.to_fields(config_lib.default_config())
  return {name: value for name, value in acting(config).items()
          if name not in {*without, *NO_MATTER}
          and value not in (default[name], titles.NO_ESTIMATOR)}


def method(run: Record) -> str:
  """Returns the name of the run in its sweep, without the seed; "" if unknown."""
  return run.get("run", "").removesuffix(f"-seed{run['seed']}")


def described(fields: dict[str, Any]) -> str:
  """Formats fields and their values in a line: "crop_size=30, optimizer=sgd"."""
  return ", ".join(f"{name}={text(value)}" for name, value in sorted(fields.items()))


def text(value: Any) -> str:
  """Formats the value of a field."""
  return value if isinstance(value, str) and value else json.dumps(value)


def read(paths: Sequence[str]) -> tuple[list[Record], list[LeftOut]]:
  """Reads the records of all runs in studies and folders.

  Args:
    paths: Studies, and folders to search for workdirs and studies. A run that is found
      several times is counted once.

  Returns:
    The records, and the runs that are left out. The records are in the order of `paths`
    and of names in folders. Their configs have all fields; those not recorded have
    their defaults. The field `name` is the workdir, or the study and line. Runs are
    left out if they are not done or cannot be read. If two runs have the same config
    and seed and different results, the second is left out.

  Raises:
    errors.UsageError: A path is neither a folder nor a study.
  """
  found, left_out, _ = _scan(paths)
  return found, left_out


def _scan(
    paths: Sequence[str],
) -> tuple[list[Record], list[LeftOut], list[LeftOut]]:
  """Returns the results of `read`, and the copies of runs that were found before."""
  found, left_out, copies, seen = [], [], [], {}
  for name, load in _sources(paths):
    try:
      run = load()
      filled = config_lib.from_json(json.dumps(run["config"]))
    except (errors.UsageError, OSError, ValueError, KeyError, TypeError) as error:
      left_out.append(LeftOut(name, " ".join(str(error).split())))
      continue
    run = {**run, "name": name, "config": config_lib.to_fields(filled)}
    first = seen.setdefault((key(run["config"]), run["seed"]), run)
    if first is run:
      found.append(run)
    elif any(first[part] != run[part] for part in ("test_accuracy", "test_loss")):
      left_out.append(LeftOut(
          name, f"its config and seed are those of {first['name']}, whose result is "
          f"another (commits {run['commit']}, {first['commit']})"))
    else:
      copies.append(LeftOut(name, f"{first['name']} is the same run"))
  return found, left_out, copies


def _sources(paths: Sequence[str]) -> Iterator[tuple[str, Any]]:
  """Yields names of runs and functions that load them, each workdir and study once."""
  visited = set()

  def new(path):
    real = paths_lib.real(path)
    return not (real in visited or visited.add(real))

  for path in paths:
    if _is_file(path):
      errors.check(is_study(path), "runs", path,
                   "a folder, or a study: lines of JSON that `collect` wrote")
      if new(path):
        yield from _lines(path)
      continue
    errors.check(paths_lib.is_dir(path), "runs", path, "a folder or a file that exists")
    for folder, folders, names in paths_lib.walk(path):
      if _is_workdir(folder, names):
        folders.clear()  # A workdir contains no other runs.
        if new(folder):
          yield folder, lambda folder=folder: record(folder)
        continue
      folders.sort()
      for file in sorted(names):
        study = os.path.join(folder, file)
        if file.endswith(".jsonl") and new(study):
          if is_study(study):
            yield from _lines(study)
          elif fault := _damage(study):
            yield study, functools.partial(_refuse, fault)


def _is_file(path: str) -> bool:
  try:
    return paths_lib.is_file(path)
  except OSError as error:
    raise errors.UsageError(f"runs={path!r} cannot be read: {error}") from error


def _damage(path: str) -> json_files.Damaged | None:
  """Returns the fault of a damaged file of JSON lines that may have been a study."""
  try:
    json_files.read_lines(path)
    if not (json_files.read_text(path) or "\n").endswith("\n"):
      return json_files.Damaged(path, "its last line is cut off")
  except json_files.Damaged as error:
    return error
  return None


def _refuse(error: Exception) -> Record:
  raise error


def _is_workdir(folder: str, names: Sequence[str]) -> bool:
  """Returns whether a folder is the workdir of a run.

  A run that ended before its first step has no status.json. A run that has lost its
  config.json counts as well, so that it is reported among the runs that are left out.

  Args:
    folder: Path of the folder.
    names: Names of the files in it.
  """
  others = {"status.json", "run.json", "metrics.jsonl"} & {*names}
  if "config.json" not in names:
    return len(others) > 1
  if others:
    return True
  try:
    return bool(run_files.read_config(folder))
  except errors.UsageError:
    return False


def is_study(path: str | os.PathLike) -> bool:
  """Returns whether a file was written by `collect`: one of its lines has a config."""
  if not paths_lib.is_file(path):
    return False
  for line in paths_lib.at(path).read_bytes().splitlines():
    if b'"config"' in line:
      with contextlib.suppress(ValueError, RecursionError):
        run = json.loads(line)
        if isinstance(run, dict) and "config" in run:
          return True
  return False


def _lines(path: str) -> Iterator[tuple[str, Any]]:
  lines = paths_lib.at(path).read_bytes().splitlines()
  for number, line in enumerate(lines, start=1):
    yield f"{path}:{number}", lambda line=line: _line(line, os.path.dirname(path))


def _line(line: bytes, folder: str) -> Record:
  try:
    run = json.loads(line)
  except (ValueError, RecursionError) as error:
    raise errors.UsageError(f"the line is damaged: {error}") from error
  if not isinstance(run, dict):
    raise errors.UsageError("the line is damaged: it is not a JSON object")
  missing = sorted({"config", "seed", "commit", "seconds", "step", "test_accuracy",
                    "test_loss", "best_test_accuracy", "curve", "histograms"} - {*run})
  if missing:
    raise errors.UsageError(f"the line has no {', '.join(missing)}")
  wrong = [name for name in ("seed", "step", "test_accuracy", "best_test_accuracy")
           if not json_files.is_number(run[name])]
  if not (run["seconds"] is None or json_files.is_number(run["seconds"])):
    wrong.append("seconds")
  told = {name: run.get(name) for name in environment.UNKNOWN}
  if not environment.is_environment(told):
    wrong += environment.UNKNOWN
  if wrong:
    raise errors.UsageError(f"the line is damaged: {', '.join(wrong)} of another type")
  for name, read_all in (("curve", metrics.read_file),
                         ("histograms", metrics.read_histograms)):
    path = os.path.join(folder, run[name] or "")
    run[name] = path if paths_lib.is_file(path) else None
    if run[name]:
      read_all(path)  # Raises an error that names the file if it is damaged.
  return run


def collect(paths: Sequence[str], out: str) -> tuple[list[str], list[LeftOut]]:
  """Adds the records of runs to the study `out`, except those that it already has.

  Curves and histograms are copied to a folder beside the study, which has the name of
  the study. Curves are copied without rates and without measurements by layer.

  Args:
    paths: Studies, and folders to search, see `read`.
    out: Path of the study, which ends in .jsonl. The file and its folder are created if
      they are missing.

  Returns:
    The names of the runs that were added, and the other runs with reasons. These are
    the runs that `read` leaves out, runs that the study already has, and runs that were
    found twice.

  Raises:
    errors.UsageError: A path is neither a folder nor a study, or `out` is not a study
      or cannot be written.
  """
  study = pathlib.Path(out)
  errors.check(study.suffix == ".jsonl", "out", out, "a file whose name ends in .jsonl")
  before = json_files.read_text(study) or ""
  errors.check(not before or is_study(out), "out", out, "a study, or a new file")
  known, _ = read([out]) if before else ([], [])
  names = {run["name"] for run in known}
  runs, left_out, copies = _scan([*[out] * bool(before), *paths])
  added, lines = [], []
  try:
    for run in runs:
      if run["name"] in names:
        continue
      added.append(run.pop("name"))
      run["config"] = {name: value for name, value in run["config"].items()
                       if name not in LOCAL}
      name = _digest(key(run["config"]) + str(run["seed"]))
      study.with_suffix("").mkdir(parents=True, exist_ok=True)
      if run["curve"]:
        run["curve"] = _put(study, f"{name}.jsonl", "".join(
            json.dumps(_reduced(line)) + "\n" for line in metrics.read_file(
                run["curve"])))
      if run["histograms"]:
        run["histograms"] = _put(study, f"{name}_histograms.jsonl",
                                 json_files.read_text(run["histograms"]) or "")
      lines.append(json.dumps(run, sort_keys=True) + "\n")
    if lines:
      # If the last line is cut off, the next line must not be appended to it.
      cut_off = before and not before.endswith("\n")
      files.write(study, before + "\n" * bool(cut_off) + "".join(lines))
  except OSError as error:
    raise errors.UsageError(f"out={out!r} cannot be written: {error}") from error
  return added, [*left_out, *copies]


def _put(study: pathlib.Path, name: str, content: str) -> str:
  files.write(study.with_suffix("") / name, content)
  return f"{study.stem}/{name}"


def _reduced(line: dict[str, Any]) -> dict[str, Any]:
  return {name: value for name, value in line.items() if not isinstance(value, dict)
          and name not in _RATES}


def _digest(of: str) -> str:
  return hashlib.sha256(of.encode()).hexdigest()[:12]
