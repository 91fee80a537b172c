"""Runs many training runs: starts, watches, resumes and retries them.

A run is a config and some of its fields. Its workdir is DIR/NAME, which also contains
log.txt and sweep.json, the record of all tries. `launch/sweep.py` and `minw.search` are
commands that use this module.

Several processes may work on one directory, because a run belongs to the process that
holds the lock of its workdir. `minw.workdir.locks` describes this lock, which
`minw.main` takes as well.
"""

import contextlib
import errno
import json
import os
import pathlib
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from typing import Any, Callable, Iterable, Iterator, NamedTuple, Sequence

from minw import cloud
from minw import config as config_lib
from minw import config_flag
from minw import errors
from minw import exit_codes
from minw import files
from minw import json_files
from minw import paths
from minw import places
from minw.progress import duration
from minw.workdir import environment
from minw.workdir import locks
from minw.workdir import run_files

_POLL_SECONDS = 0.5
_REMOTE_POLL_SECONDS = 5.0  # The same for workdirs on gs://, where reading costs money.
_FINAL = ("done", "diverged", "failed")


class Run(NamedTuple):
  """One run of a sweep.

  Attributes:
    name: Name of the run, unique in the sweep.
    workdir: Directory of the run, DIR/NAME.
    arguments: Arguments of minw.main: --config and its overrides.
    config: Config that results from these arguments.
    after: Names of the runs of the sweep that it needs: the one from which it starts,
      and its teacher.
  """

  name: str
  workdir: paths.AnyPath
  arguments: tuple[str, ...]
  config: Any
  after: tuple[str, ...]


class State(NamedTuple):
  """Progress of a run.

  Attributes:
    name: "done", "diverged", "failed", "running", "stopped" (to be resumed), "waiting".
    step: Number of training steps that are done.
    steps: Number of all training steps; 0 before the run was first started.
    accuracy: Accuracy of the hard network on the test split, when done.
    seconds: Seconds that the run took so far.
    reason: Reason why the run failed, or why it failed the last time.
    left: Seconds that the remaining steps will take at the rate so far. None if that
      rate is unknown.
  """

  name: str
  step: int = 0
  steps: int = 0
  accuracy: float | None = None
  seconds: float = 0.0
  reason: str = ""
  left: float | None = None


def read(sweep: str, folder: str, data_dir: str | None = None) -> list[Run]:
  """Reads the runs of a sweep. Their configs are validated.

  Args:
    sweep: Name or path of the sweep, NAME or NAME:ARGUMENT.
    folder: Directory that holds the workdirs.
    data_dir: Value of the config's `data_dir` for all runs, if given.

  Raises:
    errors.UsageError: The sweep is invalid. The message names the fault and the run.
  """
  common = {"data_dir": data_dir} if data_dir else {}
  listed = config_flag.call(
      "sweep", sweep, config_flag.sweeps(), "get_runs",
      "yields (name, config, overrides)",
      lambda runs: [(name, config, fields | common) for name, config, fields in runs])
  errors.check(bool(listed), "sweep", sweep, "a sweep of at least one run")
  return make_runs(listed, folder)


def make_runs(
    listed: Iterable[tuple[str, str, dict[str, Any]]], folder: str
) -> list[Run]:
  """Makes runs, and validates their configs.

  Args:
    listed: Name, config and overridden fields of each run.
    folder: Directory that holds the workdirs.

  Raises:
    errors.UsageError: A run is invalid. The message names the fault and the run.
  """
  listed = list(listed)
  names = [name for name, _, _ in listed]
  for name in names:
    valid = isinstance(name, str) and bool(re.fullmatch(r"[A-Za-z][\w.=+-]*", name))
    errors.check(valid, "name of a run", name,
                 "a letter, then letters, digits and . = + - _")
    errors.check(names.count(name) == 1, "name of a run", name, "unique in the sweep")
  return [_make_run(paths.at(folder), names, *entry) for entry in listed]


def _make_run(folder, names, name, config, overrides) -> Run:
  with _naming(name):
    after = []
    for field in ("init_from", "teacher"):
      needed = overrides.get(field, "")
      if needed in names:
        errors.check(names.index(needed) < names.index(name), f"config.{field}", needed,
                     "a run that comes before it in the sweep")
        overrides[field] = str(folder / needed)
        after.append(needed)
    result: Any = config_lib.copy(config_flag.load(config)).lock()
    for field, value in overrides.items():
      if field not in result:
        raise errors.unknown_name("config field", field, result.keys())
      try:
        result[field] = value
      except TypeError as error:
        raise errors.bad_value(f"config.{field}", value,
                               f"of type {type(result[field]).__name__}") from error
    config_lib.validate(result)
    return Run(name, folder / name, (f"--config={config}", *(
        f"--config.{field}={value}" for field, value in overrides.items())),
        result, tuple(after))


@contextlib.contextmanager
def _naming(name: str) -> Iterator[None]:
  try:
    yield
  except errors.UsageError as error:
    raise errors.UsageError(f"run {name!r}: {error}") from error


def make_folder(folder: str) -> None:
  """Makes the directory of the workdirs, if it is missing.

  Raises:
    errors.UsageError: It cannot be made.
  """
  try:
    paths.at(folder).mkdir(parents=True, exist_ok=True)
  except OSError as error:
    raise errors.bad_value("dir", folder, f"a folder to write in ({error})") from error


def select(runs: Sequence[Run], only: Sequence[str]) -> list[Run]:
  """Returns the runs with these names, and the runs that they need.

  If `only` is empty, all runs are returned.

  Raises:
    errors.UsageError: There is no run of such a name.
  """
  by_name = {run.name: run for run in runs}
  wanted = set()
  for name in only:
    if name not in by_name:
      raise errors.unknown_name("run", name, by_name)
    wanted.add(name)
  for run in reversed(runs):  # A run comes after those that it needs.
    if run.name in wanted:
      wanted.update(run.after)
  return [run for run in runs if run.name in wanted or not only]


def check(runs: Sequence[Run]) -> dict[str, int]:
  """Checks configs, data and workdirs before any run starts.

  Returns:
    The number of training steps by name, for each run that has not ended.

  Raises:
    errors.UsageError: A config cannot be run, its data are missing, or its workdir
      holds a run of another config.
  """
  import jax
  jax.config.update("jax_platforms", "cpu")  # Leave the GPUs to the runs.
  from minw import experiment
  from minw.data import datasets

  steps, known = {}, {}
  for run in runs:
    with _naming(run.name):
      if _damage(run):
        continue  # The run counts as failed. The other runs can start.
      run_files.check_free(str(run.workdir), run.config)
      if _read_status(run)[0]["state"] in _FINAL:
        continue
      # Runs that differ only in the seed are checked once, because checks are slow.
      key = config_lib.to_json(config_lib.copy(run.config, seed=0))
      if key not in known:
        datasets.check_available(
            run.config.dataset, config_lib.data_dir(run.config))
        known[key] = experiment.Experiment(run.config).num_steps
      steps[run.name] = known[key]
  return steps


@contextlib.contextmanager
def _with_locks(run: Run) -> Iterator[None]:
  """Context that turns errors of a run's lock into errors of --dir."""
  try:
    yield
  except OSError as error:
    raise errors.UsageError(f"dir={str(run.workdir.parent)!r} cannot be written to,"
                            f" or has no locks: {error}") from error


_NO_RECORD = {"steps": 0, "failures": 0, "code": 0, "reason": "", "seconds": 0.0,
              "started": None}


def _read_record(run: Run) -> dict[str, Any]:
  """Reads what `_write_record` wrote. For a damaged file, only `reason` is set."""
  try:
    found = json_files.read_object(run.workdir / "sweep.json", _check_record)
  except json_files.Damaged as error:
    found = {"reason": f"{error}; what was tried before is not known"}
  return _NO_RECORD | (found or {})


def _check_record(record: dict[str, Any]) -> None:
  """Raises ValueError if `_write_record` cannot have written this record."""
  for name in _NO_RECORD.keys() & record.keys():
    value = record[name]
    right = (isinstance(value, str) if name == "reason" else
             type(value) is int if name in ("steps", "failures", "code") else
             json_files.is_number(value) or (name, value) == ("started", None))
    if not right:
      raise ValueError(f"{name}={value!r} is of another type")


def _damage(run: Run) -> str:
  """Returns why the run cannot start in its workdir, or "" if it can."""
  lock = run.workdir / "lock"
  for path, right, kind in ((run.workdir, os.path.isdir, "folder"),
                            (lock, os.path.isfile, "file")):
    if isinstance(path, cloud.Path):
      break  # A folder cannot be in the place of a file there.
    if os.path.lexists(path) and not right(path):
      return f"{path} is damaged: it is not a {kind}; move it away"
  try:
    json_files.read_object(run.workdir / "config.json")
  except json_files.Damaged as error:
    return f"{error}; {run_files.REMEDY}"
  return ""


def _write_record(run: Run, record: dict[str, Any]) -> None:
  files.write(run.workdir / "sweep.json", json.dumps(record) + "\n")


def state(run: Run, retries: int, held: bool | None = None) -> State:
  """Returns the progress of a run.

  Args:
    run: Run of a sweep.
    retries: Number of times that a failed run is started again.
    held: Whether a process holds its lock. If None, the lock is checked.
  """
  if damage := _damage(run):
    return State("failed", reason=damage)
  if not paths.exists(run.workdir):
    return State("waiting")
  status, fault = _read_status(run)
  record = _read_record(run)
  record["reason"] = fault or record["reason"]
  if status["state"] in ("done", "diverged"):
    name = status["state"]
  else:
    if held is None:
      with _with_locks(run):
        held = locks.is_held(str(run.workdir))
    if held:
      name = "running"
    elif record["failures"] > retries or record["code"] == exit_codes.BAD_INPUT:
      name = "failed"
    else:
      name = "stopped" if status["state"] else "waiting"
  seconds = record["seconds"]
  if name == "running" and record["started"] is not None:
    # The difference is negative if the clock was set back.
    seconds += max(time.time() - record["started"], 0.0)
  return State(name, status["step"], record["steps"], status.get("test_accuracy"),
               seconds, record["reason"], _training_left(run, name, status["step"],
                                                         record["steps"]))


def _read_status(run: Run) -> tuple[dict[str, Any], str]:
  """Returns the content of status.json and its fault, or "" if it has none.

  A damaged file is written again when the run starts.
  """
  try:
    status, fault = run_files.read_status(str(run.workdir)), ""
  except json_files.Damaged as error:
    # The run was started before. Only its checkpoints know its step.
    status, fault = {"state": "stopped", "step": 0}, str(error)
  return status or {"state": "", "step": 0}, fault


def _training_left(run: Run, name: str, step: int, steps: int) -> float | None:
  """Estimates the seconds until the last step, or returns None.

  The time before the first step does not count for the rate. run.json was written when
  the run was at `step`.
  """
  path = run.workdir / "run.json"
  if name not in ("running", "stopped") or not (step and steps and paths.exists(path)):
    return None
  try:
    content = environment.read(str(run.workdir))
  except json_files.Damaged:
    return None
  if content["seconds"] is None:
    return None
  trained = content["seconds"] - content["startup_seconds"]
  since = time.time() - path.stat().st_mtime if name == "running" else 0.0
  return max(trained / step * (steps - step) - since, 0.0)


def states(runs: Sequence[Run], retries: int) -> dict[str, State]:
  """Returns the progress of all runs of a sweep, by name."""
  result = {}
  for run in runs:
    found = state(run, retries)
    for name in run.after:
      first = result.get(name)
      if found.name in ("waiting", "stopped") and first and first.name in (
          "failed", "diverged"):
        found = found._replace(
            name="failed", reason=f"needs {name}, which {first.name}")
    result[run.name] = found
  return result


def seconds_left(found: dict[str, State], jobs: int) -> tuple[dict[str, float], float]:
  """Estimates the remaining seconds of each run and of the sweep.

  The estimate for a run uses the rate of its own steps. If that is unknown, it uses the
  mean duration of other runs from start to end.

  Returns:
    Seconds by name of the run, and seconds of the sweep. If nothing is known yet, the
    dict is empty and the seconds of the sweep are NaN.
  """
  whole = [s.seconds + (s.left or 0.0) for s in found.values()
           if s.name == "done" or s.left is not None]
  if not whole:
    return {}, float("nan")
  mean = sum(whole) / len(whole)
  left = {name: max(mean - s.seconds, 0.0) if s.left is None else s.left
          for name, s in found.items() if s.name not in _FINAL}
  running = sum(s.name == "running" for s in found.values())
  if not left:
    return {}, 0.0
  return left, max(sum(left.values()) / max(jobs, running), max(left.values()))


def table(folder: str, found: dict[str, State], jobs: int) -> str:
  """Formats the progress of all runs for `--status`."""
  left, total = seconds_left(found, jobs)
  kinds = [s.name for s in found.values()]
  counts = ", ".join(
      f"{kinds.count(kind)} {kind}" for kind in
      ("done", "running", "stopped", "waiting", "diverged", "failed") if kind in kinds)
  lines = [f"{folder}: {counts}" + (
      f"; about {duration(total)} left" if total > 0 else "")]
  width = max(map(len, found))
  for name, s in found.items():
    step = f"{s.step}/{s.steps}" if s.steps else ""
    accuracy = "" if s.accuracy is None else f"{s.accuracy:.4f}"
    line = (f"  {name:{width}}  {s.name:8}  {step:>15}  {accuracy:6}  "
            f"{duration(left[name]) if name in left else '':>10}  "
            f"{s.reason if s.name != 'done' else ''}")
    lines.append(line.rstrip())
  return "\n".join(lines)


class _Stop:
  """Context in which SIGTERM and SIGINT are counted and do not end the process."""

  def __enter__(self):
    self.count = 0
    self._previous = {number: signal.signal(number, self._note)
                      for number in (signal.SIGTERM, signal.SIGINT)}
    return self

  def _note(self, *_):
    self.count += 1

  def __exit__(self, *_):
    for number, handler in self._previous.items():
      signal.signal(number, handler)


class _Active(NamedTuple):
  run: Run
  process: subprocess.Popen
  place: places.Place
  log: pathlib.Path  # See `_local_log`.
  lock: contextlib.ExitStack  # Releases the lock when it is closed.
  begun: float


def command(run: Run) -> list[str]:
  """Returns the command that trains a run."""
  return [sys.executable, "-m", "minw.main", *run.arguments,
          f"--workdir={run.workdir}"]


def run_all(
    runs: Sequence[Run],
    *,
    jobs: int,
    retries: int,
    steps: dict[str, int],
    command: Callable[[Run], list[str]] = command,
    say: Callable[[str], None] = print,
) -> bool:
  """Starts runs that are not done, `jobs` at a time, until all have ended.

  Args:
    runs: Runs of a sweep. Runs from which others start come first.
    jobs: Number of runs at a time.
    retries: Number of times that a failed run is started again.
    steps: Number of training steps by name, for the records.
    command: Function that returns the command of a run.
    say: Function that takes a line on each start and end.

  Returns:
    True if all runs have ended, and False if a signal interrupted them.
  """
  free = places.split(jobs)
  active: list[_Active] = []
  passed_on = 0
  # Runs that rejected their input in an earlier sweep are tried once more, because
  # their data may be available now.
  refused = {run.name for run in runs if state(run, retries).name == "failed"
             and _read_record(run)["code"] == exit_codes.BAD_INPUT}
  with _Stop() as stop:
    while True:
      for job in [job for job in active if job.process.poll() is not None]:
        active.remove(job)
        free.insert(0, job.place)
        say(_finish(job, bool(stop.count)))
      if stop.count > passed_on:
        passed_on = stop.count
        for job in active:
          job.process.send_signal(
              signal.SIGTERM if stop.count == 1 else signal.SIGKILL)
      open_runs = []
      if free and not stop.count:  # Otherwise no run can start.
        found = states(runs, retries)
        own = [job.run.name for job in active]
        ready = {run.name for run in runs
                 if all(found[name].name == "done" for name in run.after)}
        open_runs = [run for run in runs if run.name not in own and (
            found[run.name].name not in _FINAL or run.name in refused & ready)]
        for run in open_runs:
          if free and run.name in ready and found[run.name].name != "running":
            job = start_run(
                run, free[0], retries, steps, command(run), run.name in refused)
            if job:
              refused.discard(run.name)
              active.append(job)
              del free[0]
              say(f"{run.name}: started")
      if not active and not open_runs:
        return not stop.count
      time.sleep(_POLL_SECONDS if isinstance(runs[0].workdir, pathlib.Path)
                 else _REMOTE_POLL_SECONDS)


def start_run(run, place, retries, steps, command, refused) -> _Active | None:
  """Starts a run, unless another sweep is training it or has just ended it."""
  with contextlib.ExitStack() as stack:
    with _with_locks(run):
      run.workdir.mkdir(parents=True, exist_ok=True)
      lock = locks.take(str(run.workdir))
    if lock is None:
      return None
    stack.enter_context(lock)
    if state(run, retries, held=False).name in _FINAL and not refused:
      return None
    record = _read_record(run)
    if record["started"] is not None:  # The sweep that started it was killed.
      with contextlib.suppress(FileNotFoundError):
        end = (run.workdir / "status.json").stat().st_mtime
        record["seconds"] += max(end - record["started"], 0.0)
    record |= {"started": time.time(), "code": 0,
               "steps": steps.get(run.name, record["steps"])}
    _write_record(run, record)
    log_path = _local_log(run)
    with log_path.open("a") as log:
      log.write(f"$ {shlex.join(command)}\n")
      log.flush()
      # The process also holds the lock, because it may outlive the sweep.
      environment, numbers = locks.passed_on(lock)
      told = place._replace(environment=place.environment | environment)
      process = places.start(
          command, told, stdin=subprocess.DEVNULL, stdout=log,
          stderr=subprocess.STDOUT, pass_fds=numbers)
    return _Active(run, process, place, log_path, stack.pop_all(), time.monotonic())
  return None


def _local_log(run: Run) -> pathlib.Path:
  """Returns the path of the run's log on this machine.

  If the workdir is on gs://, where nothing can be appended, this is a copy of the log
  in a temporary folder. `_finish` uploads it.
  """
  path = run.workdir / "log.txt"
  if isinstance(path, pathlib.Path):
    return path
  copy = pathlib.Path(tempfile.mkdtemp(prefix="minw-sweep-"), "log.txt")
  files.write(copy, path.read_bytes() if path.is_file() else b"")
  return copy


def _finish(job: _Active, stopping: bool) -> str:
  """Records how a run ended, releases its lock, and returns a line about it."""
  with job.lock:
    try:
      if job.log.parent != job.run.workdir:
        files.write(job.run.workdir / "log.txt", job.log.read_bytes())
      return _record_end(job, stopping)
    except OSError as error:
      if not (isinstance(job.run.workdir, cloud.Path) and error.errno == errno.ESTALE):
        raise
      return f"{job.run.name}: another sweep has taken over"
    finally:
      if job.log.parent != job.run.workdir:
        shutil.rmtree(job.log.parent, ignore_errors=True)


def _record_end(job: _Active, stopping: bool) -> str:
  """Records how a run ended, and returns a line about it."""
  code = job.process.returncode
  status, _ = _read_status(job.run)
  record = _read_record(job.run)
  record["seconds"] += time.monotonic() - job.begun
  record |= {"started": None, "code": code, "reason": ""}
  ended = {0: "done", exit_codes.DIVERGED: "diverged"}.get(code)
  if code != exit_codes.PREEMPTED and not stopping and (
      ended is None or status["state"] != ended):
    record["failures"] += 1
    reason = (f"killed by {signal.Signals(-code).name}" if code < 0 else
              f"exit code {code}: {_last_line(job.log)}")
    record["reason"] = reason + (
        f" ({record['failures']} times)" if record["failures"] > 1 else "")
  _write_record(job.run, record)
  if record["reason"]:
    return f"{job.run.name}: failed, {record['reason']}"
  accuracy = status.get("test_accuracy")
  return f"{job.run.name}: " + (status["state"] or "stopped") + (
      f", accuracy {accuracy:.4f}" if accuracy is not None else "")


def _last_line(path: pathlib.Path) -> str:
  with path.open("rb") as file:
    file.seek(max(0, path.stat().st_size - 4096))
    lines = file.read().decode(errors="replace").splitlines()
  lines = [line.strip() for line in lines if line.strip()]
  return lines[-1][:300] if lines and not lines[-1].startswith("$ ") else "no output"
