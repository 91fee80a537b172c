"""Records of finished runs: from their workdirs, or from the lines of a study.

A study is a file of JSON lines, one for each run, which `collect` makes. A record is
such a line:

    config: all fields but those of `LOCAL`, as JSON.
    run: the name of its folder, in a sweep what the sweep calls it.
    seed: the config's.
    commit, hardware, versions: of the run's last start; null if they are not known.
    earlier: the same of earlier starts, if they were others.
    seconds: wall time, over all starts.
    step, test_accuracy, test_loss, best_step, best_test_accuracy, ...: of status.json.
    curve, histograms: files, named from the study's folder on; null if there are none.
"""

import contextlib
import functools
import hashlib
import json
import os
import pathlib
from typing import Any, Iterator, NamedTuple, Sequence

from minw import config as config_lib
from minw import errors
from minw import files
from minw import json_files
from minw import paths as paths_lib
from minw import titles
from minw.workdir import environment
from minw.workdir import metrics
from minw.workdir import run_files

LOCAL = ("data_dir", "data_workers")  # Fields that say where a run is computed.
_RATES = ("examples_per_second", "decode_rate")
NOT_COPIED = ", ".join([
    "checkpoints", "TensorBoard's files", *LOCAL, *_RATES, "measurements by layer"])

# Fields on which the hard network does not depend, but for the chance of its seed.
NO_MATTER = ("seed", *LOCAL, "shard_optimizer", "max_damaged", "eval_batch_size",
             "eval_train", "histogram_layers", "histogram_epochs")

# Fields that count only where something is quantized.
_OF_ESTIMATOR = ("estimator", "estimator_gradient", "estimator_noise_steps",
                 "alpha_start", "alpha_final", "alpha_end", "alpha_shape",
                 "alpha_per_layer", "alpha_backward")

Record = dict[str, Any]


class LeftOut(NamedTuple):
  """A run that is not counted, and why."""

  name: str
  why: str


def record(workdir: str) -> Record:
  """The record of the run in `workdir`; its files are named by their whole paths.

  Raises:
    errors.UsageError: there is no run, it is not done, or its record is not complete,
      see
      `metrics.check_complete`.
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
  fields = json.loads(config_lib.to_json(config))
  fields["init_from"] = _source(config.init_from)
  file = lambda name: (lambda path: str(path) if path.exists() else None)(
      pathlib.Path(workdir) / name)
  return {
      "config": {name: value for name, value in fields.items() if name not in LOCAL},
      "run": pathlib.Path(workdir).name,
      "seed": config.seed,
      **last,
      **({"earlier": earlier} if earlier else {}),
      "seconds": run["seconds"],
      **{name: value for name, value in status.items() if name != "state"},
      "curve": file("metrics.jsonl"),
      "histograms": file("histograms.jsonl")}


def _source(init_from: str) -> str:
  """The meaning of `init_from`: runs of several seeds may have one source each."""
  if not init_from:
    return ""
  try:
    config = run_files.read_config(paths_lib.expand(init_from))
  except (errors.UsageError, ValueError):
    return init_from
  return as_source(json.loads(config_lib.to_json(config)))


def as_source(config: dict[str, Any]) -> str:
  """What the record of a run says in `init_from` if it went on from one of `config`."""
  return f"a run of config {_digest(key(config))}"


def acting(config: dict[str, Any]) -> dict[str, Any]:
  """The config, with `titles.NO_ESTIMATOR` for an estimator that does not act.

  A network whose operands are all floats is the same whatever its config says of
  estimator and alpha.
  """
  if titles.estimator(config) != titles.NO_ESTIMATOR:
    return config
  return config | dict.fromkeys(_OF_ESTIMATOR, titles.NO_ESTIMATOR)


def key(config: dict[str, Any], without: Sequence[str] = ()) -> str:
  """Equal for configs that differ only in seed, `without` and what does not matter."""
  left_out = {*without, *NO_MATTER}
  return json.dumps({name: value for name, value in acting(config).items()
                     if name not in left_out}, sort_keys=True)


def settings(config: dict[str, Any], without: Sequence[str] = ()) -> dict[str, Any]:
  """The fields that act and differ from `config.default_config`.

  Those in `without` are left out, and those that `key` leaves out.
  """
  default = json.loads(config_lib.to_json(config_lib.default_config()))
  return {name: value for name, value in acting(config).items()
          if name not in {*without, *NO_MATTER}
          and value not in (default[name], titles.NO_ESTIMATOR)}


def method(run: Record) -> str:
  """The name of the run in its sweep, without the seed; "" if it is not known."""
  return run.get("run", "").removesuffix(f"-seed{run['seed']}")


def described(fields: dict[str, Any]) -> str:
  """Fields and their values in a line: "crop_size=30, optimizer=sgd"."""
  return ", ".join(f"{name}={text(value)}" for name, value in sorted(fields.items()))


def text(value: Any) -> str:
  """A field's value in a line."""
  return value if isinstance(value, str) and value else json.dumps(value)


def read(paths: Sequence[str]) -> tuple[list[Record], list[LeftOut]]:
  """All runs in folders, which are searched, and studies.

  Args:
    paths: folders and files; a run that is in several is counted once.

  Returns:
    The records, in the order of `paths` and of names in folders. Their configs have
    all fields, those not recorded as by default; a field `name` is the workdir, or
    the study and line. And what is left out: runs that are not done or cannot be read,
    and, of two of equal config and seed with other results, the second.

  Raises:
    errors.UsageError: a path is neither a folder nor a study.
  """
  found, left_out, _ = _scan(paths)
  return found, left_out


def _scan(
    paths: Sequence[str],
) -> tuple[list[Record], list[LeftOut], list[LeftOut]]:
  """What `read` returns, and the copies of runs that were found before."""
  found, left_out, copies, seen = [], [], [], {}
  for name, load in _sources(paths):
    try:
      run = load()
      filled = config_lib.from_json(json.dumps(run["config"]))
    except (errors.UsageError, OSError, ValueError, KeyError, TypeError) as error:
      left_out.append(LeftOut(name, " ".join(str(error).split())))
      continue
    run = {**run, "name": name, "config": json.loads(config_lib.to_json(filled))}
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
  """Names of runs, and functions that load them; each workdir and study once."""
  visited = set()

  def new(path):
    real = os.path.realpath(path)
    return not (real in visited or visited.add(real))

  for path in paths:
    if os.path.isfile(path):
      errors.check(is_study(path), "runs", path,
                   "a folder, or a study: lines of JSON that `collect` wrote")
      if new(path):
        yield from _lines(path)
      continue
    errors.check(os.path.isdir(path), "runs", path, "a folder or a file that exists")
    for folder, folders, names in os.walk(path):
      if _is_workdir(folder, names):
        folders.clear()  # It has checkpoints, no other runs.
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


def _damage(path: str) -> json_files.Damaged | None:
  """What is wrong with a file of JSON lines that may have been a study."""
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
  """Whether it holds a run; one that ended before its first step has no status.json.

  A run that has lost its config.json is one as well, to be named among what is left
  out.
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
  """Whether it is a file that `collect` wrote: one of its lines has a config."""
  if not os.path.isfile(path):
    return False
  for line in pathlib.Path(path).read_bytes().splitlines():
    if b'"config"' in line:
      with contextlib.suppress(ValueError, RecursionError):
        run = json.loads(line)
        if isinstance(run, dict) and "config" in run:
          return True
  return False


def _lines(path: str) -> Iterator[tuple[str, Any]]:
  lines = pathlib.Path(path).read_bytes().splitlines()
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
    run[name] = path if os.path.isfile(path) else None
    if run[name]:
      read_all(path)  # One that is damaged is refused here, by its name.
  return run


def collect(paths: Sequence[str], out: str) -> tuple[list[str], list[LeftOut]]:
  """Adds the records of runs to the study `out`, but those that it has already.

  Curves and histograms are copied to a folder of the study's name beside it: of
  curves all but the rates and what is measured by layer.

  Args:
    paths: see `read`.
    out: ends in .jsonl; it is made, with its folder, if missing.

  Returns:
    The names of what was added, and what was not and why: what `read` leaves out, and
    runs that the study has already or that were found twice.

  Raises:
    errors.UsageError: as `read`; `out` is not a study, or cannot be written.
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
      cut_off = before and not before.endswith("\n")  # No line is added to its last.
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
