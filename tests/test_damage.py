"""Damage of every file of a workdir: what the next start and the readers make of it.

A start ends as a run does that was never disturbed, or in one line that names what is
damaged. What has been lost and made again is said in a warning. Report, evaluate, pack
and the state of a sweep give what they would have given, or say in one line why not.

MINW_DAMAGES is how many damages the slow test tries; "all" is all of them.
"""

import json
import os
import random
import shutil
import signal

import pytest

from minw import errors
from minw import evaluate
from minw import json_files
from minw import pack
from minw import packed
from minw import sweeps
from minw.report import records
from minw.workdir import environment
from minw.workdir import run_files
from short_runs import EPOCH
from short_runs import Stop
from short_runs import lines_of
from short_runs import run
from short_runs import run_with
from short_runs import shared_programs
from short_runs import stop_before
from short_runs import tiny_config
from short_runs import trees_of

CONFIG = tiny_config(num_epochs=3, histogram_layers=("conv2", "dense*"),
                     histogram_epochs=(1, 3))
RECORDS = ("config.json", "status.json", "run.json", "metrics.jsonl",
           "histograms.jsonl")
SECONDS = 120  # What takes longer hangs.


@pytest.fixture(scope="module")
def workdirs(tmp_path_factory):
  """A run that was killed after two checkpoints, and the same when it is done."""
  folder = tmp_path_factory.mktemp("damage")
  with pytest.raises(Stop):
    run_with(stop_before(2 * EPOCH + 5), CONFIG, folder / "killed")
  shutil.copytree(folder / "killed", folder / "done")
  run(CONFIG, folder / "done")
  return {name: folder / name for name in ("killed", "done")}


# Damages: a function of a path, by name.


def content(change):
  """A damage of a file's bytes."""
  return lambda path: path.write_bytes(change(path.read_bytes()))


def flipped(data, rng):
  at = rng.randrange(len(data))
  return data[:at] + bytes([data[at] ^ 1 << rng.randrange(8)]) + data[at + 1:]


def remove(path):
  shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


def instead(make):
  """A damage by which something else stands at the path."""
  return lambda path: (remove(path), make(path))


PLACES = {
    "missing": remove,
    "a folder": instead(lambda path: path.mkdir()),
    "a full folder": instead(lambda path: (path / "a" / "b").mkdir(parents=True)),
    "a link to nothing": instead(lambda path: path.symlink_to("/nonexistent/x")),
    "a link to itself": instead(lambda path: path.symlink_to(path)),
    "a pipe": instead(os.mkfifo),
}

CONTENTS = {
    "empty": lambda data: b"",
    "half": lambda data: data[:len(data) // 2],
    "a byte short": lambda data: data[:-1],
    "two bytes short": lambda data: data[:-2],
    "zeros": lambda data: bytes(len(data)),
    "zeros from the middle": lambda data: data[:len(data) // 2].ljust(len(data), b"\0"),
    "zeros at the end": lambda data: data + bytes(512),
    "not UTF-8": lambda data: data[:20] + b"\xff\xfe" + data[22:],
    "a byte order mark": lambda data: b"\xef\xbb\xbf" + data,
    "twice": lambda data: data * 2,
    "end to begin": lambda data: data[len(data) // 2:] + data[:len(data) // 2],
    **{f"is {text[:9]}": lambda data, text=text: text.encode() + b"\n" for text in (
        "null", "[]", "{}", "5", '"x"', "NaN", "1" * 5000, "[" * 200_000,
        '{"a":' * 50_000)},
}

VALUES = (None, True, -1, 2**70, 1e308, "x", [], {}, [[]], {"a": {}})
GONE = object()


def worded(value):
  return "gone" if value is GONE else repr(value)


def changed_field(name, value):
  def change(data):
    fields = json.loads(data)
    if value is GONE:
      del fields[name]
    else:
      fields[name] = value
    return json.dumps(fields).encode() + b"\n"

  return change


def changed_line(number, change):
  def change_all(data):
    lines = data.splitlines(True)
    lines[number:number + 1] = change(lines[number])
    return b"".join(lines)

  return change_all


def damages(workdir):
  """All damages of the files of a workdir: (path, name, function)."""
  for name in RECORDS:
    path, rng = workdir / name, random.Random(name)
    data = path.read_bytes()
    for what, damage in PLACES.items():
      yield name, what, damage
    for what, change in CONTENTS.items():
      yield name, what, content(change)
    for i in range(12):
      yield name, f"bit {i}", content(
          lambda data, seed=rng.random(): flipped(data, random.Random(seed)))
    if name.endswith(".json"):
      for field in json.loads(data):
        # A field that config.json lacks has its default, as in older versions.
        for value in ([rng.choice(VALUES)] if name == "config.json" else
                      [GONE, *VALUES]):
          yield name, f"{field} {worded(value)}", content(changed_field(field, value))
    else:
      count = len(data.splitlines())
      for number in sorted({0, min(1, count - 1), count // 2, count - 1}):
        for what, change in {
            "lost": lambda line: [], "twice": lambda line: [line, line],
            "cut": lambda line: [line[:30], b"\n"], "blank": lambda line: [b"\n"],
            "joined": lambda line: [line[:-1]],
            "zeros": lambda line: [bytes(len(line))],
        }.items():
          yield name, f"line {number} {what}", content(changed_line(number, change))
        line = json.loads(data.splitlines()[number])
        for field in line:
          value = rng.choice([GONE, *VALUES])
          change = changed_field(field, value)
          yield name, f"line {number} {field} {worded(value)}", content(changed_line(
              number, lambda line, change=change: [change(line)]))
  yield "status.json", "done too early", content(lambda data: json.dumps(
      {**json.loads(data), "state": "done", "step": 5}).encode())
  yield "status.json", "done without results", content(
      lambda data: json.dumps({"state": "done", "step": 3 * EPOCH}).encode())
  yield "status.json", "diverged too late", content(
      lambda data: json.dumps({"state": "diverged", "step": 3 * EPOCH}).encode())
  for name in ("lock", "curves.png", "tensorboard"):
    if (workdir / name).exists():
      for what, damage in PLACES.items():
        yield name, what, damage
  yield "tensorboard", "a file", instead(lambda path: path.write_bytes(b"x"))
  yield from _checkpoint_damages(workdir)


def _checkpoint_damages(workdir):
  folder = workdir / "checkpoints"
  steps = sorted(int(path.name) for path in folder.iterdir() if path.name.isdecimal())
  for path in sorted(folder.rglob("*")):
    name = str(path.relative_to(workdir))
    if path.is_dir():
      yield name, "missing", remove
      yield name, "a file", instead(lambda path: path.write_bytes(b"x"))
      yield name, "empty", lambda path: (remove(path), path.mkdir())
      continue
    rng = random.Random(name)
    yield name, "missing", remove
    yield name, "a folder", PLACES["a folder"]
    for what in ("empty", "half", "zeros") if path.stat().st_size else ():
      yield name, what, content(CONTENTS[what])
    if path.stat().st_size:
      yield name, "bit", content(
          lambda data, seed=rng.random(): flipped(data, random.Random(seed)))
  yield "checkpoints", "missing", remove
  yield "checkpoints", "a file", instead(lambda path: path.write_bytes(b"x"))
  for name in ("999999", "-5", "abc", f"000{steps[0]}", "٣", "1e3",
               f"{steps[-1] + 1}.orbax-checkpoint-tmp"):
    yield f"checkpoints/{name}", "a new folder", lambda path: path.mkdir()
  for name in ("junk.txt", "999999"):
    yield f"checkpoints/{name}", "a new file", lambda path: path.write_bytes(b"x")


# What comes of it.


def within(seconds, function, *arguments):
  """Calls `function`; what takes longer is an error and not a wait."""
  def hang(*_):
    raise AssertionError(f"it hangs for {seconds} s")

  before = signal.signal(signal.SIGALRM, hang)
  signal.alarm(seconds)
  try:
    return function(*arguments)
  finally:
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def attempt(function, *arguments):
  """The result of `function`, or the line that it ends in."""
  try:
    return within(SECONDS, function, *arguments), ""
  except errors.UsageError as error:
    return None, " ".join(str(error).split())


def assert_names(line, workdir, name):
  """A line that tells the user where to look."""
  assert str(workdir) in line and len(line) < 2000, line


RESULTS = {
    "status": lambda workdir: json.loads((workdir / "status.json").read_text()),
    "lines": lines_of,
    "histograms": lambda workdir: (workdir / "histograms.jsonl").read_text(),
}


def results_of(workdir, parts):
  """All that a disturbed run must have in common with one that was not."""
  return {part: (RESULTS | {"checkpoints": trees_of})[part](workdir) for part in parts}


class Trial:
  """Damaged copies of one workdir, each in the same place."""

  def __init__(self, source, done, folder):
    self.source, self.folder = source, folder
    self.workdir = folder / "run"
    self.expected = results_of(done, [*RESULTS, "checkpoints"])
    self.state = source.name
    self.readers = {}

  def damage(self, name, damage):
    if os.path.lexists(self.workdir):
      remove(self.workdir)
    shutil.copytree(self.source, self.workdir)
    path = self.workdir / name
    path.parent.mkdir(parents=True, exist_ok=True)
    damage(path)

  def check_readers(self, name, caplog):
    """They give what they did, or a line, or another result with a warning."""
    for reader, read in READERS.items():
      if reader not in self.readers:
        self.readers[reader] = attempt(read, self.source)[0]
      caplog.clear()
      found, line = attempt(read, self.workdir)
      if line:
        assert_names(line, self.workdir, name)
      elif found != self.readers[reader]:
        assert caplog.records or reader == "sweep", (reader, found)

  def start(self, name, caplog):
    """What the next start comes to: "same", or the line that it ends in."""
    caplog.clear()
    before = self._records()
    _, line = attempt(run, CONFIG, self.workdir)
    if line:
      assert_names(line, self.workdir, name)
      return line
    # A run that is done does not read its arrays again.
    parts = RESULTS if self.state == "done" and name.startswith("checkpoints") else [
        *RESULTS, "checkpoints"]
    found = results_of(self.workdir, parts)
    for part in parts:
      assert found[part] == self.expected[part], (part, caplog.text)
    lost = [file for file, text in before.items() if self._is_lost(file, text)]
    for file in lost:
      assert file in caplog.text, (lost, caplog.text)
    return "same"

  def _records(self):
    return {file: (self.workdir / file).read_bytes()
            if (self.workdir / file).is_file() else b"" for file in RECORDS[3:]}

  def _is_lost(self, file, text):
    """Whether lines of a checkpoint were not there before the start."""
    saved = (self.source / file).read_bytes().splitlines()
    return not set(saved) <= set(text.splitlines()) and (
        self.workdir / "checkpoints").is_dir() and self.state == "killed" and bool(text)


def _report(workdir):
  found, left_out = records.read([str(workdir)])
  if left_out:
    (where, why), = left_out
    raise errors.UsageError(f"{where}: {why}")
  return [{name: value for name, value in one.items()
           if name in ("config", "test_accuracy", "test_loss", "best_step", "step")}
          for one in found]


def _evaluate(workdir):
  with shared_programs():
    return evaluate.evaluate_workdir(str(workdir))


def _pack(workdir):
  return packed.to_bytes(pack.pack_workdir(str(workdir)))


def _sweep(workdir):
  one = sweeps.Run(workdir.name, workdir, (), CONFIG, "")
  found = sweeps.states([one], 2)
  sweeps.table("runs", found, 1)
  return {name: state.name for name, state in found.items()}


READERS = {"report": _report, "evaluate": _evaluate, "pack": _pack, "sweep": _sweep}


@pytest.fixture(scope="module")
def trials(workdirs, tmp_path_factory):
  return {state: Trial(source, workdirs["done"], tmp_path_factory.mktemp(state))
          for state, source in workdirs.items()}


@pytest.mark.parametrize("state, name, what, ended", [
    ("killed", "metrics.jsonl", "line 1 lost", "same"),
    ("killed", "config.json", "half", "config.json is damaged: "),
    ("killed", "run.json", "a pipe", "run.json: a pipe that no process reads is in"),
    ("done", "status.json", "done too early", "same"),
    *(pytest.param(*slow, marks=pytest.mark.slow) for slow in (
        ("killed", "status.json", "zeros", "same"),
        ("killed", "checkpoints/38/tree/_sharding", "empty", "same")))])
def test_a_damage(state, name, what, ended, trials, caplog):
  trial = trials[state]
  damage, = (damage for *which, damage in damages(trial.source)
             if which == [name, what])
  trial.damage(name, damage)
  assert ended in trial.start(name, caplog)


def test_readers_of_a_damaged_record(trials, caplog):
  trial = trials["done"]
  trial.damage("metrics.jsonl", content(CONTENTS["half"]))
  trial.check_readers("metrics.jsonl", caplog)


def test_a_lost_checkpoint_is_missed(trials, caplog):
  trial = trials["done"]
  trial.damage("checkpoints/57", remove)
  assert _evaluate(trial.workdir)["step"] == 38
  assert "the checkpoint of step 57 is missing; that of step 38 is used" in caplog.text


@pytest.mark.parametrize("reader", ["evaluate", "pack"])
def test_readers_refuse_a_damaged_status(trials, reader):
  """It would tell them whether the run is done, and with which checkpoint."""
  trial = trials["done"]
  trial.damage("status.json", content(CONTENTS["zeros"]))
  _, line = attempt(READERS[reader], trial.workdir)
  assert "status.json is damaged" in line and "next start of the run" in line


MADE = {"commit": "minw 1.0", "versions": {"jax": "0.10"}, "hardware": {
    "device": "cpu", "num_devices": 1, "cpu": "one", "cores": 2}}


@pytest.mark.parametrize("name, content, message", [
    ("status", {"state": "asleep", "step": 1}, "state='asleep' is not one of "),
    ("status", {"state": "running", "step": -1}, "step is not a number of steps"),
    ("status", {"state": "done", "step": 1, "test_accuracy": "0.5"},
     "test_accuracy is not a number"),
    ("run", {"seconds": -1.0, "environments": [MADE]},
     "seconds is not a number of seconds"),
    ("run", {"seconds": 1.0}, "it does not say where the run was made"),
    ("run", {"seconds": 1.0, "environments": [MADE, {"commit": "minw 1.0"}]},
     "it does not say where the run was made"),
    ("run", {"seconds": 1.0, "environments": [
        MADE | {"hardware": MADE["hardware"] | {"cores": "2"}}]},
     "it does not say where the run was made"),
    ("run", {"seconds": 1.0, "environments": [MADE | {"versions": {"jax": 0.1}}]},
     "it does not say where the run was made"),
])
def test_values_that_no_run_writes_are_refused(name, content, message, tmp_path):
  (tmp_path / f"{name}.json").write_text(json.dumps(content))
  read = {"status": run_files.read_status, "run": environment.read}[name]
  with pytest.raises(json_files.Damaged) as error:
    read(str(tmp_path))
  assert f"{name}.json is damaged: {message}" in str(error.value)


def test_what_a_run_writes_is_read(tmp_path):
  content = {"seconds": 3.0, "startup_seconds": 1.0, "environments": [MADE]}
  (tmp_path / "run.json").write_text(json.dumps(content))
  assert environment.read(str(tmp_path)) == content
  status = {"state": "done", "step": 7, "test_accuracy": 0.5}
  (tmp_path / "status.json").write_text(json.dumps(status))
  assert run_files.read_status(str(tmp_path)) == status


def test_a_lost_config_lets_no_other_run_go_on(workdirs, tmp_path):
  """The checkpoint knows whose it is."""
  shutil.copytree(workdirs["killed"], tmp_path / "run")
  (tmp_path / "run" / "config.json").unlink()
  with pytest.raises(errors.UsageError, match="another config .* learning_rate: "):
    run(tiny_config(num_epochs=3, histogram_layers=CONFIG.histogram_layers,
                    histogram_epochs=(1, 3), learning_rate=0.5), tmp_path / "run")


def test_lost_times_and_places_are_those_of_the_checkpoint(workdirs, tmp_path):
  """What no checkpoint knows is marked as unknown."""
  workdir = tmp_path / "run"
  shutil.copytree(workdirs["killed"], workdir)
  before = environment.read(str(workdir))
  (workdir / "run.json").write_text("damaged")
  run(CONFIG, workdir)
  after = environment.read(str(workdir))
  assert after["environments"] == before["environments"]
  assert after["startup_seconds"] > before["startup_seconds"] > 0
  (workdir / "run.json").write_text("damaged")
  environment.Journal(str(workdir), step=57)
  unknown, here = environment.read(str(workdir))["environments"]
  assert unknown == {"commit": None, "hardware": None, "versions": None}
  assert [here] == before["environments"]


def test_a_done_run_without_checkpoints_is_not_trained_again(workdirs, tmp_path):
  workdir = tmp_path / "run"
  shutil.copytree(workdirs["done"], workdir)
  shutil.rmtree(workdir / "checkpoints")
  assert run(CONFIG, workdir)["state"] == "done"
  lines = (workdir / "metrics.jsonl").read_text().splitlines(True)
  (workdir / "metrics.jsonl").write_text("".join(lines[1:]))
  with pytest.raises(errors.UsageError,
                     match="2 training lines .* no checkpoint to make"):
    run(CONFIG, workdir)
  assert (workdir / "metrics.jsonl").read_text() == "".join(lines[1:])


def test_pictures_that_cannot_be_drawn_do_not_end_a_run(workdirs, tmp_path, caplog):
  workdir = tmp_path / "run"
  shutil.copytree(workdirs["killed"], workdir)
  (workdir / "curves.png").mkdir()
  assert run(CONFIG, workdir, draw=True)["state"] == "done"
  assert "curves.png cannot be drawn" in caplog.text


@pytest.mark.slow
def test_every_damage(workdirs, trials, caplog):
  cases = [(state, *case) for state in workdirs for case in damages(workdirs[state])]
  count = os.environ.get("MINW_DAMAGES", "20")
  chosen = cases if count == "all" else random.Random(0).sample(cases, int(count))
  ends, wrong = {"same": 0, "refused": 0}, []
  for state, name, what, damage in chosen:
    trial = trials[state]
    try:
      trial.damage(name, damage)
      trial.check_readers(name, caplog)
      ended = trial.start(name, caplog)
      ends["same" if ended == "same" else "refused"] += 1
    except Exception as error:
      wrong.append(f"{state} {name} {what}: {type(error).__name__}: {error}"[:600])
  print(f"{len(chosen)} of {len(cases)} damages: {ends}, {len(wrong)} wrong")
  assert not wrong, "\n".join(wrong)
  assert ends["same"] > ends["refused"]
