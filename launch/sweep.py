"""Many training runs: started, watched, resumed and retried.

  python launch/sweep.py --sweep=estimators:seeds=3 --dir=runs/estimators --jobs=2
  python launch/sweep.py --sweep=... --dir=... --status
  python launch/sweep.py --sweep=... --dir=... --emit=slurm --out=estimators.sbatch

A sweep is a file whose `get_runs(argument="")` yields a (name, config, overrides) for
each run: the config as --config takes it, NAME or NAME:ARGUMENT, and a dict of fields.
Those in experiments/sweeps go by their names; others are given as paths.
If `init_from` is the name of another run of the sweep, that one is done before. A run's
workdir is DIR/NAME, with log.txt and sweep.json (what was tried) beside its own files.

--jobs run at a time, each with its own cores, and its own GPUs where there are any: on
CPUs one a core is the fastest way through a sweep. Started again, a sweep skips what is
done, goes on with what was interrupted and, up to --retries times each, starts again
what failed. Runs that diverged are not repeated, nor, until the sweep is started anew,
those that refused their input. SIGTERM and SIGINT let the runs save, and end the sweep
with code 75; a second one kills them. Exit codes besides: 0 all done, 1 some not, 2 bad
input.

Several sweeps may work on one directory: a run belongs to the process that holds the
lock of its workdir, which `minw.workdir.locks` describes and `minw.main` takes as well.
Where that is not sure to hold between machines, give each machine runs of its own with
--only, as what --emit writes does.

Tried on Linux with CPUs, on a local file system; the division of GPUs and network file
systems were not.
"""

from minw import stopping

if __name__ == "__main__":  # Importing all the others takes seconds.
  stopping.watch()

import contextlib
import json
import os
import pathlib
import re
import shlex
import signal
import subprocess
import sys
import time
from typing import Any, Callable, Iterator, NamedTuple, Sequence

from absl import flags

from minw import cli
from minw import config as config_lib
from minw import config_flag
from minw import errors
from minw import exit_codes
from minw import files
from minw import json_files
from minw import places
from minw.progress import duration
from minw.workdir import environment
from minw.workdir import locks
from minw.workdir import run_files

_POLL_SECONDS = 0.5
_FINAL = ("done", "diverged", "failed")


class Run(NamedTuple):
  """One run of a sweep.

  Attributes:
    name: unique in it.
    workdir: DIR/NAME.
    arguments: of minw.main: --config and its overrides.
    config: what these come to.
    after: the name of the run that it starts from; "": none.
  """

  name: str
  workdir: pathlib.Path
  arguments: tuple[str, ...]
  config: Any
  after: str


class State(NamedTuple):
  """Where a run is.

  Attributes:
    name: "done", "diverged", "failed", "running", "stopped" (to be resumed), "waiting".
    step, steps: of training; steps is 0 before the run was first started.
    accuracy: the hard network's on the test split, when done.
    seconds: that it took so far.
    left: seconds that its training will take yet, at the rate of its steps so far; None
      before that is known.
    reason: why it failed, or failed last time.
  """

  name: str
  step: int = 0
  steps: int = 0
  accuracy: float | None = None
  seconds: float = 0.0
  reason: str = ""
  left: float | None = None


def read(sweep: str, folder: str, data_dir: str | None = None) -> list[Run]:
  """The runs of a sweep, each with a config that `config.validate` passes.

  Args:
    sweep: NAME or NAME:ARGUMENT.
    folder: of the workdirs.
    data_dir: if given, the config's in all runs.

  Raises:
    errors.UsageError: naming what is wrong, and the run in which it is.
  """
  common = {"data_dir": data_dir} if data_dir else {}
  listed = config_flag.call(
      "sweep", sweep, config_flag.sweeps(), "get_runs",
      "yields (name, config, overrides)",
      lambda runs: [(name, config, fields | common) for name, config, fields in runs])
  names = [name for name, _, _ in listed]
  errors.check(bool(names), "sweep", sweep, "a sweep of at least one run")
  for name in names:
    valid = isinstance(name, str) and bool(re.fullmatch(r"[A-Za-z][\w.=+-]*", name))
    errors.check(valid, "name of a run", name,
                 "a letter, then letters, digits and . = + - _")
    errors.check(names.count(name) == 1, "name of a run", name, "unique in the sweep")
  return [_make_run(pathlib.Path(folder), names, *entry) for entry in listed]


def _make_run(folder, names, name, config, overrides) -> Run:
  with _naming(name):
    after = overrides.get("init_from", "")
    if after in names:
      errors.check(names.index(after) < names.index(name), "config.init_from", after,
                   "a run that comes before it in the sweep")
      overrides["init_from"] = str(folder / after)
    else:
      after = ""
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
        result, after)


@contextlib.contextmanager
def _naming(name: str) -> Iterator[None]:
  try:
    yield
  except errors.UsageError as error:
    raise errors.UsageError(f"run {name!r}: {error}") from error


def select(runs: Sequence[Run], only: Sequence[str]) -> list[Run]:
  """The runs of these names, and those that they start from; all if there are none."""
  by_name = {run.name: run for run in runs}
  wanted = set()
  for name in only:
    while name:
      if name not in by_name:
        raise errors.unknown_name("run", name, by_name)
      wanted.add(name)
      name = by_name[name].after
  return [run for run in runs if run.name in wanted or not only]


def check(runs: Sequence[Run]) -> dict[str, int]:
  """Checks all that can be checked before anything starts.

  Returns:
    The number of training steps of each run that is not done, by name.

  Raises:
    errors.UsageError: a config cannot be run, its data are missing, or its workdir
      holds
      a run of another config.
  """
  import jax
  jax.config.update("jax_platforms", "cpu")  # The GPUs are for the runs.
  from minw import experiment
  from minw.data import datasets

  steps, known = {}, {}
  for run in runs:
    with _naming(run.name):
      if _damage(run):
        continue  # It counts as failed; the others go on.
      run_files.check_free(str(run.workdir), run.config)
      if _read_status(run)[0]["state"] in _FINAL:
        continue
      # One of the runs that differ by their seeds is enough: each takes a while.
      key = config_lib.to_json(config_lib.copy(run.config, seed=0))
      if key not in known:
        datasets.check_available(run.config.dataset, run.config.data_dir)
        known[key] = experiment.Experiment(run.config).num_steps
      steps[run.name] = known[key]
  return steps


@contextlib.contextmanager
def _with_locks(run: Run) -> Iterator[None]:
  """Inside, an error of the run's lock is one of --dir."""
  try:
    yield
  except OSError as error:
    raise errors.UsageError(f"dir={str(run.workdir.parent)!r} cannot be written to,"
                            f" or has no locks: {error}") from error


_NO_RECORD = {"steps": 0, "failures": 0, "code": 0, "reason": "", "seconds": 0.0,
              "started": None}


def _read_record(run: Run) -> dict[str, Any]:
  """What `_write_record` wrote; of a damaged file no more than that it is damaged."""
  try:
    found = json_files.read_object(run.workdir / "sweep.json", _check_record)
  except json_files.Damaged as error:
    found = {"reason": f"{error}; what was tried before is not known"}
  return _NO_RECORD | (found or {})


def _check_record(record: dict[str, Any]) -> None:
  """Raises ValueError for what `_write_record` cannot have written."""
  for name in _NO_RECORD.keys() & record.keys():
    value = record[name]
    right = (isinstance(value, str) if name == "reason" else
             type(value) is int if name in ("steps", "failures", "code") else
             json_files.is_number(value) or (name, value) == ("started", None))
    if not right:
      raise ValueError(f"{name}={value!r} is of another type")


def _damage(run: Run) -> str:
  """Says why nothing can be done with what is in the run's workdir; "" if it can."""
  lock = run.workdir / "lock"
  for path, right, kind in ((run.workdir, os.path.isdir, "folder"),
                            (lock, os.path.isfile, "file")):
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
  """Where `run` is.

  Args:
    run: of a sweep.
    retries: how often a run that failed is started again.
    held: whether its lock is; None to look.
  """
  if damage := _damage(run):
    return State("failed", reason=damage)
  if not run.workdir.exists():
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
    seconds += max(time.time() - record["started"], 0.0)  # The clock may be set back.
  return State(name, status["step"], record["steps"], status.get("test_accuracy"),
               seconds, record["reason"], _training_left(run, name, status["step"],
                                                         record["steps"]))


def _read_status(run: Run) -> tuple[dict[str, Any], str]:
  """The content of status.json, and its fault, which the run mends when it starts."""
  try:
    status, fault = run_files.read_status(str(run.workdir)), ""
  except json_files.Damaged as error:
    # The run has begun: its checkpoints tell how far it is.
    status, fault = {"state": "stopped", "step": 0}, str(error)
  return status or {"state": "", "step": 0}, fault


def _training_left(run: Run, name: str, step: int, steps: int) -> float | None:
  """Seconds until the last step; the time before the first step does not count.

  run.json was written when the run was at `step`.
  """
  path = run.workdir / "run.json"
  if name not in ("running", "stopped") or not (step and steps and path.exists()):
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
  """Where all of a sweep's runs are, by name."""
  result = {}
  for run in runs:
    found = state(run, retries)
    first = result.get(run.after)
    if found.name in ("waiting", "stopped") and first and first.name in (
        "failed", "diverged"):
      found = found._replace(
          name="failed", reason=f"starts from {run.after}, which {first.name}")
    result[run.name] = found
  return result


def seconds_left(found: dict[str, State], jobs: int) -> tuple[dict[str, float], float]:
  """About how long the runs take yet, by name where it can be told, and all together.

  A run's own steps tell it, or else the mean of the other runs, from start to end.
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
  """What `--status` prints."""
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
  """Counts SIGTERM and SIGINT instead of dying of them."""

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
  lock: contextlib.ExitStack  # Gives it back when closed.
  begun: float


def command(run: Run) -> list[str]:
  """What trains it."""
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
  """Runs what is not done, `jobs` at a time, until nothing can be done any more.

  Args:
    runs: of a sweep; those that others start from come first.
    jobs: how many at a time.
    retries: how often a run that failed is started again.
    steps: of training, by name, for the records.
    command: of a run.
    say: takes a line on each start and end.

  Returns:
    Whether it came to its end; if not, a signal interrupted it.
  """
  free = places.split(jobs)
  active: list[_Active] = []
  passed_on = 0
  # What refused its input in an earlier sweep gets a chance: data may be there now.
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
      if free and not stop.count:  # Otherwise the files need not be looked at.
        found = states(runs, retries)
        own = [job.run.name for job in active]
        ready = {run.name for run in runs
                 if not run.after or found[run.after].name == "done"}
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
      time.sleep(_POLL_SECONDS)


def start_run(run, place, retries, steps, command, refused) -> _Active | None:
  """Starts a run, unless another sweep has it or has just ended it."""
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
    if record["started"] is not None:  # That sweep was killed.
      with contextlib.suppress(FileNotFoundError):
        end = (run.workdir / "status.json").stat().st_mtime
        record["seconds"] += max(end - record["started"], 0.0)
    record |= {"started": time.time(), "code": 0,
               "steps": steps.get(run.name, record["steps"])}
    _write_record(run, record)
    with (run.workdir / "log.txt").open("a") as log:
      log.write(f"$ {shlex.join(command)}\n")
      log.flush()
      # The process holds the lock, too: it may live longer than the sweep.
      told = place._replace(environment=place.environment | locks.passed_on(lock))
      process = places.start(
          command, told, stdin=subprocess.DEVNULL, stdout=log,
          stderr=subprocess.STDOUT, pass_fds=[lock.fileno()])
    return _Active(run, process, place, stack.pop_all(), time.monotonic())
  return None


def _finish(job: _Active, stopping: bool) -> str:
  """Records how a run ended, gives its lock back, and says it in one line."""
  code = job.process.returncode
  with job.lock:
    status, _ = _read_status(job.run)
    record = _read_record(job.run)
    record["seconds"] += time.monotonic() - job.begun
    record |= {"started": None, "code": code, "reason": ""}
    ended = {0: "done", exit_codes.DIVERGED: "diverged"}.get(code)
    if code != exit_codes.PREEMPTED and not stopping and (
        ended is None or status["state"] != ended):
      record["failures"] += 1
      reason = (f"killed by {signal.Signals(-code).name}" if code < 0 else
                f"exit code {code}: {_last_line(job.run.workdir / 'log.txt')}")
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


def define_flags() -> None:
  """Defines the flags of the command."""
  cli.DEFINE_path(
      "sweep", None, "Name or file of a sweep; NAME:ARGUMENT passes it an argument.")
  cli.DEFINE_path("dir", None, "Directory that holds a workdir for each run.")
  cli.DEFINE_path(
      "data_dir", None,
      "Directory of the prepared data sets, if not where the configs say.")
  flags.DEFINE_integer("jobs", 1, "Number of runs at a time.", lower_bound=1)
  flags.DEFINE_integer(
      "retries", 2, "How often a run that failed is started again.", lower_bound=0)
  flags.DEFINE_list("only", [], "Names of the runs to do; all by default.")
  flags.DEFINE_bool("status", False, "Whether to print only where the runs are.")
  flags.DEFINE_enum(
      "emit", None, ["slurm", "jobset"], "Write only a Slurm array or a JobSet.")
  cli.DEFINE_path("out", None, "File for --emit.")
  cli.require("sweep", "dir")


def main() -> int:
  """Runs a sweep, as the flags say; returns the exit code."""
  f = flags.FLAGS
  errors.check((f.emit is None) == (f.out is None), "out", f.out,
               "given with --emit, and only then")
  runs = select(read(f.sweep, f.dir, f.data_dir), f.only)
  if f.emit:
    _emit(runs)
    return 0
  show = lambda: print(table(f.dir, states(runs, f.retries), f.jobs), flush=True)
  if f.status:
    show()
    return 0
  try:
    os.makedirs(f.dir, exist_ok=True)
  except OSError as error:
    raise errors.bad_value("dir", f.dir, f"a folder to write in ({error})") from error
  ended = run_all(runs, jobs=f.jobs, retries=f.retries, steps=check(runs),
                  say=cli.note)
  show()
  if not ended:
    return exit_codes.PREEMPTED
  return int(any(s.name != "done" for s in states(runs, f.retries).values()))


def _emit(runs: Sequence[Run]) -> None:
  import emit
  f = flags.FLAGS
  text = getattr(emit, f.emit)(
      [run.name for run in runs], jobs=f.jobs, command=[
          "python", "launch/sweep.py", f"--sweep={f.sweep}", f"--dir={f.dir}",
          f"--retries={f.retries}",
          *([f"--data_dir={f.data_dir}"] if f.data_dir else [])])
  try:
    files.write(f.out, text)
  except OSError as error:
    raise errors.bad_value("out", f.out, f"a file to write ({error})") from error


if __name__ == "__main__":
  cli.run(main, define_flags)
