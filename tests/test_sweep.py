"""launch/sweep.py and the sweeps in experiments/sweeps."""

import contextlib
import itertools
import json
import math
import os
import shlex
import signal
import subprocess
import sys
import time

from absl import flags
from ml_collections import config_flags
import pytest

import emit
import fake_runs
from fake_runs import fake_command
from fake_runs import fakes
from jobsets import check_jobset
from launchers import LAUNCH
from launchers import RECORD
from launchers import ROOT
from launchers import calls
from launchers import make_stub
from launchers import shellcheck
from minw import config as config_lib
from minw import config_flag
from minw import errors
from minw import places
from minw import schedules
from minw import sweeps

# --- Runs that do not train.


def run_fakes(runs, jobs=2, retries=1):
  """What run_all returns, the lines that it says, and where all runs are."""
  said = []
  ended = sweeps.run_all(
      runs, jobs=jobs, retries=retries, steps={run.name: 10 for run in runs},
      command=fake_command, say=said.append)
  return ended, said, sweeps.states(runs, retries)


def starts(folder):
  return {path.parent.name: path.stat().st_size for path in folder.glob("*/starts")}


@pytest.fixture(autouse=True)
def fast_polling(monkeypatch):
  monkeypatch.setattr(sweeps, "_POLL_SECONDS", 0.02)


@pytest.mark.parametrize("behaviour, count, state, reason", [
    ("ok", 1, "done", ""),
    ("fail", 3, "failed", "exit code 1: ValueError: it went wrong (3 times)"),
    ("fail-once", 2, "done", ""),
    ("diverge", 1, "diverged", ""),
    ("refuse", 1, "failed", "exit code 2: error: config.data_dir: no data"),
    ("killed", 3, "failed", "killed by SIGKILL (3 times)"),
    ("silent", 3, "failed", "exit code 5: no output (3 times)"),
    ("lie", 3, "failed", "exit code 0: no output (3 times)"),
    ("stopped-once", 2, "done", ""),
])
def test_how_a_run_ends(tmp_path, behaviour, count, state, reason):
  runs = fakes(tmp_path, [behaviour])
  ended, _, found = run_fakes(runs, retries=2)
  assert ended and starts(tmp_path) == {"r0": count}
  assert (found["r0"].name, found["r0"].reason) == (state, reason)
  assert (tmp_path / "r0" / "log.txt").read_text().count("$ ") == count
  # Again: what is final stays so, but what was refused gets another chance.
  _, _, again = run_fakes(runs, retries=2)
  assert starts(tmp_path) == {"r0": count + (behaviour == "refuse")}
  assert again["r0"].name == state


def test_more_retries_go_on_with_what_failed(tmp_path):
  runs = fakes(tmp_path, ["fail"])
  run_fakes(runs, retries=0)
  assert starts(tmp_path) == {"r0": 1}
  run_fakes(runs, retries=2)
  assert starts(tmp_path) == {"r0": 3}


def test_no_more_than_jobs_at_a_time_each_in_its_place(tmp_path, monkeypatch):
  cores = os.sched_getaffinity(0)
  runs = fakes(tmp_path, ["ok"] * 7)
  run_fakes(runs, jobs=3)
  running, most = {}, 0
  for line in (tmp_path / "spans").read_text().splitlines():
    kind, name, pinned = json.loads(line)
    if kind == "end":
      del running[name]
      continue
    if len(cores) >= 3:
      assert not any(set(pinned) & set(other) for other in running.values())
    assert set(pinned) <= cores
    running[name] = pinned
    most = max(most, len(running))
  assert most <= 3
  assert starts(tmp_path) == {f"r{i}": 1 for i in range(7)}


def test_places_are_given_back(tmp_path, monkeypatch):
  one, two = places.Place([], {"PLACE": "one"}), places.Place([], {"PLACE": "two"})
  monkeypatch.setattr(places, "split", lambda count: [one, two][:count])
  used, start = [], places.start
  monkeypatch.setattr(places, "start", lambda command, place, **options: (
      used.append(place), start(command, place, **options))[1])
  run_fakes(fakes(tmp_path, ["ok", "fail", "ok", "ok"]), jobs=2, retries=0)
  assert len(used) == 4 and set(p.environment["PLACE"] for p in used) == {"one", "two"}


def test_run_that_starts_from_another(tmp_path):
  first, second = fakes(tmp_path, ["ok", "ok"])
  second = second._replace(after=("r0",))
  ended, _, _ = run_fakes([first, second], jobs=2)
  spans = [json.loads(line)[:2] for line in
           (tmp_path / "spans").read_text().splitlines()]
  assert ended and spans == [
      ["begin", "r0"], ["end", "r0"], ["begin", "r1"], ["end", "r1"]]


@pytest.mark.parametrize(
    "behaviour, state", [("fail", "failed"), ("diverge", "diverged")])
def test_run_that_starts_from_a_failed_one(tmp_path, behaviour, state):
  runs = fakes(tmp_path, [behaviour, "ok", "ok", "ok"])
  runs[1] = runs[1]._replace(after=("r0",))
  runs[2] = runs[2]._replace(after=("r1",))
  ended, _, found = run_fakes(runs)
  assert ended
  assert [s.name for s in found.values()] == [state, "failed", "failed", "done"]
  assert found["r1"].reason == f"needs r0, which {state}"
  assert "r1" not in starts(tmp_path)


def test_refused_runs_that_start_from_each_other_end(tmp_path):
  first, second = fakes(tmp_path, ["refuse", "refuse"])
  run_fakes([first, second])
  ended, _, found = run_fakes([first, second._replace(after=("r0",))])
  assert ended and {s.name for s in found.values()} == {"failed"}
  assert starts(tmp_path) == {"r0": 2, "r1": 1}


# --- Several processes.


def drive(folder, jobs, *behaviours):
  return subprocess.Popen(
      [sys.executable, fake_runs.__file__, folder, str(jobs), *behaviours], text=True,
      env=os.environ | {"PYTHONPATH": f"{ROOT}:{LAUNCH}"},
      stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def wait_until(condition):
  for _ in range(1200):
    if condition():
      return
    time.sleep(0.05)
  raise AssertionError("it did not happen")


def state_in(folder, name):
  path = folder / name / "status.json"
  return json.loads(path.read_text())["state"] if path.exists() else None


@pytest.mark.parametrize("name, damage, state, reason", [
    ("config.json", "zeros", "failed",
     "config.json is damaged: it is empty; move it away"),
    ("config.json", "folder", "failed",
     "config.json is damaged: it is a folder; move it"),
    ("lock", "folder", "failed", "lock is damaged: it is not a file; move it away"),
    ("", "file", "failed", "r1 is damaged: it is not a folder; move it away"),
    ("status.json", "zeros", "stopped",
     "status.json is damaged: it is empty; the next"),
    ("status.json", "list", "stopped",
     "status.json is damaged: it is not a JSON object"),
    ("sweep.json", "zeros", "stopped", "sweep.json is damaged: it is empty; what was"),
    ("sweep.json", "wrong", "stopped",
     "failures='x' is of another type; what was tried"),
    ("run.json", "zeros", "stopped", ""),
])
def test_a_damaged_workdir_stops_no_other_run(name, damage, state, reason, tmp_path):
  runs = fakes(tmp_path, ["ok", "ok", "ok"])
  path = runs[1].workdir / name
  runs[1].workdir.parent.mkdir(exist_ok=True)
  if name:
    runs[1].workdir.mkdir()
    (runs[1].workdir / "status.json").write_text('{"state": "preempted", "step": 1}')
    path.unlink(missing_ok=True)
  path.mkdir() if damage == "folder" else path.write_text(
      {"zeros": "\0" * 9, "list": "[]", "wrong": '{"failures": "x"}',
       "file": ""}[damage])
  found = sweeps.states(runs, 1)
  assert [found[run.name].name for run in runs] == ["waiting", state, "waiting"]
  assert reason in found["r1"].reason and "\n" not in found["r1"].reason
  assert reason in sweeps.table("runs", found, 1)
  ended, _, found = run_fakes(runs)
  assert ended
  assert [found[run.name].name for run in runs] == [
      "done", "failed" if state == "failed" else "done", "done"]


@pytest.mark.slow  # The other tests of several processes are about the same locks.
def test_two_sweeps_share_the_work(tmp_path):
  behaviours = ["second", "fail-once", "ok", "stopped-once", "ok", "diverge"] * 2
  processes = [drive(tmp_path, 2, *behaviours) for _ in range(2)]
  outputs = [process.communicate(timeout=120)[0] for process in processes]
  assert [process.returncode for process in processes] == [0, 0], outputs
  twice = {"fail-once", "stopped-once"}
  assert starts(tmp_path) == {
      f"r{i}": 1 + (behaviour in twice) for i, behaviour in enumerate(behaviours)}
  for output in outputs:  # Both had a part in it.
    assert "started" in output


def test_sigterm_saves_and_a_new_sweep_goes_on(tmp_path):
  process = drive(tmp_path, 2, "ok", "long", "long", "ok")
  wait_until(lambda: [state_in(tmp_path, f"r{i}") for i in range(3)] == [
      "done", "running", "running"])
  process.send_signal(signal.SIGTERM)
  output = process.communicate(timeout=60)[0]
  assert process.returncode == 75, output
  assert starts(tmp_path) == {"r0": 1, "r1": 1, "r2": 1}
  runs = fakes(tmp_path, ["ok", "long", "long", "ok"])
  found = sweeps.states(runs, 1)
  assert [s.name for s in found.values()] == ["done", "stopped", "stopped", "waiting"]
  assert [s.step for s in found.values()] == [10, 3, 3, 0]
  _, _, found = run_fakes(runs)
  assert {s.name for s in found.values()} == {"done"}
  assert starts(tmp_path) == {"r0": 1, "r1": 2, "r2": 2, "r3": 1}
  assert all(json.loads((run.workdir / "sweep.json").read_text())["failures"] == 0
             for run in runs)


def test_second_signal_kills(tmp_path):
  process = drive(tmp_path, 1, "deaf")
  wait_until(lambda: state_in(tmp_path, "r0") == "running")
  process.send_signal(signal.SIGTERM)
  with pytest.raises(subprocess.TimeoutExpired):
    process.communicate(timeout=1)
  process.send_signal(signal.SIGTERM)
  process.communicate(timeout=30)
  assert process.returncode == 75


@pytest.mark.slow  # Fast tests of locks kill processes, too.
def test_killed_sweep_leaves_no_lock_but_its_runs_keep_theirs(tmp_path):
  process = drive(tmp_path, 2, "long", "long", "ok")
  wait_until(lambda: [state_in(tmp_path, f"r{i}") for i in range(2)] == ["running"] * 2)
  process.kill()
  process.communicate()
  children = [int(pid) for pid in subprocess.run(
      ["pgrep", "-f", f"{tmp_path}/r[01] long"], capture_output=True, text=True,
      check=True).stdout.split()]
  assert len(children) == 2
  runs = fakes(tmp_path, ["long", "long", "ok"])
  try:
    assert [s.name for s in sweeps.states(runs, 1).values()] == [
        "running", "running", "waiting"]
    os.kill(children[0], signal.SIGKILL)  # r0 or r1: both behave alike.
    wait_until(lambda: sorted(s.name for s in sweeps.states(runs, 1).values()) == [
        "running", "stopped", "waiting"])
    other = drive(tmp_path, 1, "long", "long", "ok")
    wait_until(
        lambda: [s.name for s in sweeps.states(runs, 1).values()].count("done") == 2)
    # The one that lives on has not been started again, and its end is waited for.
    assert sorted(starts(tmp_path).values()) == [1, 1, 2]
    assert other.poll() is None
  finally:
    for pid in children:
      with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
  other.communicate(timeout=60)
  assert other.returncode == 0
  assert starts(tmp_path) == {"r0": 2, "r1": 2, "r2": 1}


def test_run_that_another_sweep_has_just_ended(tmp_path):
  (run,) = fakes(tmp_path, ["ok"])
  run.workdir.mkdir()
  (run.workdir / "status.json").write_text('{"state": "done", "step": 10}')
  place = places.Place([], {})
  assert sweeps.start_run(run, place, 1, {}, fake_command(run), False) is None
  assert starts(tmp_path) == {}


# --- The table.


def test_time_left():
  found = {
      "done": sweeps.State("done", 100, 100, 0.5, 200.0),
      "half": sweeps.State("running", 50, 100, None, 80.0, "", 40.0),  # 120 s in all.
      "begun": sweeps.State("running", 0, 100, None, 30.0),  # Not measured yet.
      "next": sweeps.State("waiting"),
      "lost": sweeps.State("failed", 50, 50, None, 100.0),
  }
  left, total = sweeps.seconds_left(found, 2)  # The mean of 200 and 120 is 160.
  assert left == pytest.approx({"half": 40, "begun": 130, "next": 160})
  assert total == pytest.approx((40 + 130 + 160) / 2)
  assert sweeps.seconds_left(found, 9)[1] == pytest.approx(160)  # The longest run's.


def test_compilation_is_no_part_of_the_time_left(tmp_path):
  (run,) = fakes(tmp_path, ["ok"])
  run.workdir.mkdir()
  (run.workdir / "status.json").write_text('{"state": "preempted", "step": 20}')
  (run.workdir / "run.json").write_text(json.dumps(
      {"seconds": 100.0, "startup_seconds": 60.0, "environments": []}))
  (run.workdir / "sweep.json").write_text(json.dumps({"steps": 120, "seconds": 110.0}))
  # 40 s for 20 steps, so 200 s for the other 100. With compilation it would be 500 s.
  assert sweeps.state(run, 1).left == pytest.approx(200)
  assert sweeps.state(run, 1, held=True).left == pytest.approx(200, abs=5)
  os.utime(run.workdir / "run.json", (0, time.time() - 50))  # It trains since then.
  assert sweeps.state(run, 1, held=True).left == pytest.approx(150, abs=5)


def test_time_left_without_a_measurement():
  left, total = sweeps.seconds_left({"a": sweeps.State("waiting")}, 1)
  assert left == {} and math.isnan(total)
  left, total = sweeps.seconds_left({"a": sweeps.State("done", 5, 5, 0.1, 3.0)}, 1)
  assert left == {} and total == 0


def test_table():
  found = {
      "a": sweeps.State("done", 880, 880, 0.95561, 3600.0, "an old one"),
      "bb": sweeps.State(
          "failed", 0, 880, None, 5.0, "exit code 1: ValueError (3 times)"),
      "c": sweeps.State("waiting"),
  }
  assert sweeps.table("runs/x", found, 1).splitlines() == [
      "runs/x: 1 done, 1 waiting, 1 failed; about 1 h left",
      "  a   done              880/880  0.9556",
      "  bb  failed              0/880                      "
      "exit code 1: ValueError (3 times)",
      "  c   waiting" + " " * 35 + "1 h"]


def test_state_without_anything(tmp_path):
  (run,) = fakes(tmp_path, ["ok"])
  assert sweeps.state(run, 1) == sweeps.State("waiting")
  assert not run.workdir.exists()  # Looking leaves nothing behind.


# --- Reading a sweep.


def write_sweep(folder, body):
  path = folder / "sweep_file.py"
  path.write_text("def get_runs(argument=''):\n  " + body.replace("\n", "\n  ") + "\n")
  return str(path)


DIGITS = str(ROOT / "experiments" / "digits_convnet.py")
CIFAR = str(ROOT / "experiments" / "cifar_convnet.py")


def test_runs_are_read(tmp_path):
  path = write_sweep(tmp_path, f"""
yield "a", {CIFAR!r} + ":network=" + argument, {{"input_bits": "bfloat16"}}
yield "b", {CIFAR!r}, {{"seed": 3, "bits_rules": (("conv1", 2),), "init_from": "a"}}
yield "c", {DIGITS!r}, {{"init_from": "elsewhere/a"}}""")
  a, b, c = sweeps.read(path + ":A", str(tmp_path / "runs"), "some/data")
  assert (a.name, a.workdir, a.after) == ("a", tmp_path / "runs" / "a", ())
  assert a.arguments == (f"--config={CIFAR}:network=A", "--config.input_bits=bfloat16",
                         "--config.data_dir=some/data")
  assert a.config.input_bits == "bfloat16" and a.config.dense_widths == (1024, 1024)
  assert b.after == ("a",) and b.config.init_from == str(tmp_path / "runs" / "a")
  assert b.config.bits_rules == (("conv1", 2),) and b.config.data_dir == "some/data"
  assert c.after == () and c.config.init_from == "elsewhere/a"
  assert [run.name for run in sweeps.select([a, b, c], ["b"])] == ["a", "b"]
  assert [run.name for run in sweeps.select([a, b, c], [])] == ["a", "b", "c"]
  with pytest.raises(errors.UsageError, match="run 'bb' does not exist; .*'b'"):
    sweeps.select([a, b, c], ["bb"])


@pytest.mark.parametrize("body, message", [
    ("yield 'a', DIGITS, {'sed': 1}", "run 'a': config field 'sed' .* 'seed'"),
    ("yield 'a', DIGITS, {'seed': 'x'}", "run 'a': config.seed='x': .* int"),
    ("yield 'a', DIGITS, {'seed': -1}", "run 'a': config.seed=-1"),
    ("yield 'a', DIGITS + ':x=1', {}", "run 'a': config="),
    ("yield 'a', 'none.py', {}", "run 'a': config='none.py'"),
    ("yield 'a b', DIGITS, {}", "name of a run='a b'"),
    ("yield '../a', DIGITS, {}", "name of a run='../a'"),
    ("yield '7', DIGITS, {}", "name of a run='7'"),
    ("yield 7, DIGITS, {}", "name of a run=7"),
    ("yield from [('a', DIGITS, {})] * 2", "name of a run='a': must be unique"),
    ("yield 'a', DIGITS, {'init_from': 'b'}\nyield 'b', DIGITS, {}",
     "run 'a': config.init_from='b': must be a run that comes before"),
    ("yield 'a', DIGITS, {'init_from': 'a'}", "comes before"),
    ("yield 'a', DIGITS, {'teacher': 'a'}", "config.teacher='a': must be a run that"),
    ("yield 'a', DIGITS", "sweep=.*ValueError"),
    ("yield from ()", "sweep=.*at least one run"),
    ("raise KeyError(argument)", "sweep=.*KeyError"),
])
def test_bad_sweeps(tmp_path, body, message):
  path = write_sweep(tmp_path, body.replace("DIGITS", repr(DIGITS)))
  with pytest.raises(errors.UsageError, match=message):
    sweeps.read(path, str(tmp_path))


def test_missing_sweep(tmp_path):
  with pytest.raises(errors.UsageError, match="sweep=.*FileNotFoundError"):
    sweeps.read(str(tmp_path / "none.py"), str(tmp_path))


def test_check_counts_steps_of_what_is_not_done(tmp_path):
  runs = sweeps.read(write_sweep(tmp_path, f"""
for seed, epochs in enumerate((2, 3, 2, 4)):
  yield f"s{{seed}}", {DIGITS!r}, {{"seed": seed, "num_epochs": epochs}}"""),
                    str(tmp_path))
  (tmp_path / "s1").mkdir()
  (tmp_path / "s1" / "status.json").write_text('{"state": "done", "step": 57}')
  epoch = 1257 // 64
  assert sweeps.check(runs) == {"s0": 2 * epoch, "s2": 2 * epoch, "s3": 4 * epoch}


@pytest.mark.parametrize("fields, message", [
    ({"batch_size": 5000}, "run 'a': config.batch_size=5000"),
    ({"bits_rules": (("conv9", 2),)}, "run 'a': config.bits_rules='conv9'"),
])
def test_check_refuses(tmp_path, fields, message):
  runs = sweeps.read(write_sweep(tmp_path, f"yield 'a', {DIGITS!r}, {fields!r}"),
                    str(tmp_path))
  with pytest.raises(errors.UsageError, match=message):
    sweeps.check(runs)


def test_check_refuses_where_data_are_missing(tmp_path):
  runs = sweeps.read(write_sweep(tmp_path, f"yield 'a', {CIFAR!r}, {{}}"),
                    str(tmp_path), str(tmp_path / "none"))
  with pytest.raises(errors.UsageError, match="run 'a': .*none"):
    sweeps.check(runs)


def test_check_refuses_workdirs_of_others(tmp_path):
  path = write_sweep(tmp_path, f"yield 'a', {DIGITS!r}, {{'seed': int(argument)}}")
  (run,) = sweeps.read(path + ":1", str(tmp_path))
  run.workdir.mkdir()
  (run.workdir / "config.json").write_text(config_lib.to_json(run.config))
  assert sweeps.check([run]) == {"a": 40 * 19}
  with pytest.raises(errors.UsageError, match="run 'a': .*another config.*seed: 1, 2"):
    sweeps.check(sweeps.read(path + ":2", str(tmp_path)))


# --- The sweeps that there are.

SWEEPS = [
    ("tables", "seeds=2", 2 * 64), ("tables", "table=2,seeds=1", 68),
    ("tables", "networks=AD,seeds=1", 32),
    ("estimators", "", 5 * 17), ("estimators", "dataset=cifar10,size=full", 5 * 17),
    ("estimators", "dataset=cifar100,network=D,runs=aqe+ste+bop,seeds=2", 2 * 3),
    ("geometries", "", 5 * 2 * 7),
    ("geometries", "networks=D,size=quarter,seeds=2", 14),
    ("alpha_schedules", "", 5 * 17),
    ("alpha_schedules", "dataset=cifar100,network=A,seeds=1", 17),
    ("recipes", "", 3 * (30 + 7)),
    ("recipes", "dataset=cifar100,seeds=2,estimators=aqe+ste", 2 * (2 + 2 * 35)),
    ("recipes", "dataset=cifar10,size=full,seeds=1,runs=teacher+cosine", 4),
    ("annealing", "", 3 * 37), ("annealing", "network=resnet20,seeds=1", 37),
    ("annealing", "dataset=cifar10,network=A,size=full,seeds=1,epochs=9", 37),
    ("networks", "", 2), ("networks", "size=short", 1), ("networks", "size=quarter", 2),
]


@pytest.fixture
def read_sweep(monkeypatch):
  monkeypatch.chdir("/")  # Configs go by name, wherever one is.
  return lambda name, argument: sweeps.read(f"{name}:{argument}", "runs")


def test_all_sweeps_are_tested():
  assert {path.stem for path in (ROOT / "experiments" / "sweeps").glob("*.py")} == {
      name for name, _, _ in SWEEPS}


@pytest.mark.parametrize("name, argument, count", SWEEPS)
def test_sweep_is_valid_and_its_commands_say_the_same(
    read_sweep, monkeypatch, name, argument, count):
  runs = read_sweep(name, argument)
  assert len(runs) == count
  assert len({config_lib.to_json(run.config) for run in runs}) == count  # No doubles.
  for run in runs[:count if count < 65 else 17]:
    argv = ["main", *run.arguments]
    monkeypatch.setattr(sys, "argv", argv)  # ml_collections looks there.
    values = flags.FlagValues()
    holder = config_flags.DEFINE_config_file("config", flag_values=values)
    values["config"].parser = config_flag._ExperimentFile()  # As `define` does.
    values(argv)
    assert config_lib.differing_fields(holder.value, run.config) == []


def test_misspelt_sweep():
  with pytest.raises(errors.UsageError,
                     match="sweep 'table' does not exist; did you mean 'tables'?"):
    sweeps.read("table:seeds=1", "runs")


@pytest.mark.parametrize("name, argument", [
    ("tables", "table=3"), ("tables", "seeds=0"), ("tables", "network=A"),
    ("tables", "networks=E"), ("estimators", "dataset=mnist"),
    ("estimators", "width=half"), ("estimators", "seeds=many"),
    ("estimators", "epochs=1"),
    ("annealing", "network=E"), ("annealing", "dataset=digits"),
    ("annealing", "runs=forward"), ("annealing", "seeds=0"),
    ("alpha_schedules", "dataset=digit"), ("alpha_schedules", "seeds=-1"),
    ("recipes", "runs=cosin"), ("recipes", "dataset=mnist"), ("recipes", "seeds=0"),
    ("recipes", "estimators=aq"), ("recipes", "epochs=2"), ("networks", "size=half")])
def test_bad_arguments_of_sweeps(read_sweep, name, argument):
  with pytest.raises(errors.UsageError):
    read_sweep(name, argument)


# The rows of Table I, as the paper prints them: bits of inputs and of weights.
TABLE_1 = [(1, 1), (1, 2), (1, 3), (1, 16), (2, 1), (2, 2), (2, 3), (2, 16),
           (3, 1), (3, 2), (3, 3), (3, 16), (16, 1), (16, 2), (16, 3), (32, 32)]


@pytest.mark.parametrize("table, dataset", [(1, "cifar10"), (2, "cifar100")])
def test_tables_are_whole(read_sweep, table, dataset):
  runs = {run.name: run for run in read_sweep("tables", f"table={table},seeds=2")}
  fmt = {16: "bfloat16", 32: "float32"}
  widths = {"A": (128, 1024), "B": (64, 1024), "C": (64, 512), "D": (64, 256)}
  for network, (m, n), seed in itertools.product("ABCD", TABLE_1, (0, 1)):
    config = runs.pop(f"{dataset}-{network}-{m}-{n}-seed{seed}").config
    assert (config.dataset, config.seed, config.estimator) == (dataset, seed, "aqe")
    assert (config.input_bits, config.weight_bits) == (fmt.get(m, m), fmt.get(n, n))
    assert (config.conv_widths[0], config.dense_widths[0]) == widths[network]
  assert sorted(runs) == ([] if table == 1 else sorted(
      f"cifar100-{network}-1-1-ste-seed{seed}"
      for network in "ABCD" for seed in (0, 1)))
  assert {run.config.estimator for run in runs.values()} <= {"ste"}


@pytest.mark.parametrize("argument, epochs", [
    ("seeds=1", 40), ("seeds=1,dataset=cifar10,size=full", 200)])
def test_controls_have_the_rates_of_one_run(read_sweep, argument, epochs):
  """Both halves together take the epochs and the learning rates of one run."""
  runs = {run.name: run.config for run in read_sweep("estimators", argument)}
  whole = runs["aqe-seed0"]
  steps = 100  # In an epoch.

  def rates(config):
    schedule = schedules.learning_rate(
        config.learning_rate_schedule, config.learning_rate,
        config.num_epochs * steps, decay=config.learning_rate_decay,
        stairs=config.learning_rate_stairs, steps=())
    return [float(schedule(i * steps + steps // 2)) for i in range(config.num_epochs)]

  a = runs["aqe-first-seed0"]
  for second in ("aqe-then-ste", "aqe-then-aqe"):
    b = runs[f"{second}-seed0"]
    assert a.num_epochs + b.num_epochs == epochs
    assert b.init_from == "runs/aqe-first-seed0"
    both, one = rates(a) + rates(b), rates(whole)
    # Stairs may fall an epoch or so earlier or later: a factor of 0.9 each.
    assert all(0.9**1.01 <= x / y <= 0.9**-1.01 for x, y in zip(both, one))
    assert both[-1] == pytest.approx(one[-1])
  assert a.alpha_end == 1
  assert runs["aqe-then-aqe-seed0"].alpha_start == 1


def test_annealing(read_sweep):
  """The name of each run says what its fields do."""
  runs = {run.name: run.config for run in read_sweep(
      "annealing", "network=resnet20,seeds=1")}
  for order, layer, backward in (("together", False, False), ("forward", True, False),
                                 ("backward", True, True)):
    for shape in ("linear", "cosine", "cubic", "sigmoid"):
      for weights in ("with", "before", "after"):
        c = runs.pop(f"{order}-{shape}-{weights}-seed0")
        assert (c.network, c.estimator, c.weight_bits, c.input_bits) == (
            "resnet20", "aqe", 1, 1)
        assert (c.alpha_per_layer, c.alpha_backward, c.alpha_shape,
                c.alpha_weights) == (layer, backward, shape, weights)
  assert [*runs] == ["ste-seed0"] and runs["ste-seed0"].estimator == "ste"


def test_recipes_that_need_other_runs(read_sweep):
  runs = {run.name: run for run in read_sweep(
      "recipes", "dataset=cifar100,size=quarter,seeds=2,estimators=aqe+ste")}
  base = runs["aqe-base-seed1"].config
  assert base.conv_widths == (16, 16, 32, 32, 64, 64)  # A quarter of ConvNet D's.
  for name, factor in (("teacher", 1), ("wide-teacher", 4)):
    for estimator in ("aqe", "ste"):
      run = runs[f"{estimator}-{name}-seed1"]
      assert run.after == (f"{name}-seed1",)
      assert run.config.teacher == f"runs/{name}-seed1"
    teacher = runs[f"{name}-seed1"].config
    assert teacher.weight_bits == teacher.input_bits == "float32"
    assert teacher.conv_widths == tuple(factor * w for w in base.conv_widths)
    assert teacher.dense_widths == tuple(factor * w for w in base.dense_widths)
  for name, floats in (("activations", "weight_bits"), ("weights", "input_bits")):
    second = runs[f"ste-{name}-first-seed1"]
    assert second.after == (f"ste-{name}-seed1",)
    first = runs[f"ste-{name}-seed1"].config
    assert first.estimator == second.config.estimator == "ste"
    assert first[floats] == "float32"
    assert first.num_epochs + second.config.num_epochs == base.num_epochs == 24
    assert {first.weight_bits, first.input_bits} == {1, "float32"}
    assert second.config.weight_bits == second.config.input_bits == 1
  sine, signs = (runs[f"aqe-{name}-seed0"] for name in ("sine", "sine-first"))
  assert signs.after == (sine.name,)
  assert sine.config.weight_frequency == signs.config.weight_frequency == 20
  assert (sine.config.weight_bits, signs.config.weight_bits) == ("float32", 1)


def test_progressive_bits(read_sweep):
  """A third of the epochs each, in whole numbers of validations."""
  for argument, epochs in (("dataset=cifar100,seeds=1", [8, 8, 8]),
                           ("dataset=digits,seeds=1", [12, 12, 16]),
                           ("dataset=cifar10,size=full,seeds=1,epochs=5", [1, 1, 3])):
    runs = {run.name: run for run in read_sweep(
        "recipes", argument + ",runs=bits-3-2-1")}
    names = ["aqe-3-bits-seed0", "aqe-2-bits-seed0", "aqe-bits-3-2-1-seed0"]
    assert [*runs] == ["aqe-base-seed0", *names]
    assert [runs[name].after for name in names] == [(), (names[0],), (names[1],)]
    configs = [runs[name].config for name in names]
    assert [c.weight_bits for c in configs] == [c.input_bits for c in configs] == [
        3, 2, 1]
    assert [c.num_epochs for c in configs] == epochs


# --- The command.


@pytest.mark.parametrize("argument, message", [
    ("--emit=slurm", "out="), ("--dir=/proc/none", "dir=")])
def test_command_with_bad_input(command, argument, message):
  code, out, err = command("sweep", "--sweep=experiments/sweeps/tables.py", "--dir=x",
                           argument, folder=ROOT)
  assert (code, out) == (2, "")
  assert err.startswith("error: ") and message in err and err.count("\n") == 1


def test_status_starts_nothing(command, tmp_path):
  code, out, err = command("sweep", "--sweep=alpha_schedules:seeds=1",
                           f"--dir={tmp_path}/runs", "--status")
  assert code == 0, err
  assert out.startswith(f"{tmp_path}/runs: 17 waiting\n") and out.count("\n") == 18
  assert not (tmp_path / "runs").exists()


COMMAND = ["python", "launch/sweep.py", "--sweep=a b.py", "--dir=runs/x"]


@pytest.mark.parametrize("code, requeued", [(0, False), (1, False), (75, True)])
def test_slurm_array(tmp_path, code, requeued):
  script = tmp_path / "x.sbatch"
  script.write_text(emit.slurm(["a-1", "b.2", "c"], jobs=2, command=COMMAND))
  assert "#SBATCH --array=0-2%2\n" in script.read_text()
  shell = RECORD.format(folder=tmp_path)
  make_stub(tmp_path / "srun", shell + f"exit {code}")
  make_stub(tmp_path / "scontrol", shell)
  done = subprocess.run(["bash", script], env=os.environ | {
      "PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_ID": "7",
      "SLURM_ARRAY_TASK_ID": "1"})
  assert done.returncode == code
  assert calls(tmp_path) == [[*COMMAND, "--only=b.2"], *[["requeue", "7"]] * requeued]


def test_slurm_array_passes_shellcheck(tmp_path):
  script = tmp_path / "x.sbatch"
  script.write_text(emit.slurm(["a-1", "b.2"], jobs=2, command=COMMAND))
  shellcheck(script)


def test_jobset(tmp_path):
  (spec,) = check_jobset(emit.jobset(["a-1", "b.2", "c"], jobs=2, command=COMMAND))
  assert (spec["completions"], spec["parallelism"], spec["completionMode"]) == (
      3, 2, "Indexed")
  (container,) = spec["template"]["spec"]["containers"]
  make_stub(tmp_path / "python", RECORD.format(folder=tmp_path))
  subprocess.run([*container["command"], *container["args"]], check=True,
                 env={"PATH": f"{tmp_path}:/bin:/usr/bin", "JOB_COMPLETION_INDEX": "2"})
  assert calls(tmp_path) == [[*COMMAND[1:], "--only=c"]]


def test_emitted_file_names_all_runs(command, tmp_path):
  path = tmp_path / "out.sbatch"
  code, _, err = command("sweep", "--sweep=tables:seeds=1", "--dir=runs/t", "--jobs=8",
                         "--data_dir=/data", "--emit=slurm", f"--out={path}")
  assert code == 0, err
  text = path.read_text()
  assert "--array=0-63%8" in text and "\n  cifar10-D-32-32-seed0\n" in text
  (line,) = (line for line in text.splitlines() if line.startswith("srun"))
  assert shlex.split(line)[1:-1] == [
      "python", "launch/sweep.py", "--sweep=tables:seeds=1",
      "--dir=runs/t", "--retries=2", "--data_dir=/data"]


@pytest.mark.slow
def test_real_sweep_interrupted_twice(tmp_path):
  """With SIGTERM, then with SIGKILL of all its processes; then it ends."""
  path = write_sweep(tmp_path, f"""
small = dict(conv_widths=(4, 4), dense_widths=(4,), num_epochs=6, eval_every_epochs=1)
for seed in range(4):
  yield f"s{{seed}}", {DIGITS!r}, small | {{"seed": seed}}
yield "after", {DIGITS!r}, small | {{"init_from": "s0"}}""")
  folder = tmp_path / "runs"
  arguments = [sys.executable, LAUNCH / "sweep.py", f"--sweep={path}",
               f"--dir={folder}", "--jobs=2"]
  environment = os.environ | {"PYTHONPATH": str(ROOT)}
  running = lambda: any(
      state_in(folder, f"s{i}") == "running" for i in range(4))

  process = subprocess.Popen(arguments, env=environment, stdout=subprocess.PIPE)
  wait_until(running)
  process.send_signal(signal.SIGTERM)
  process.communicate(timeout=120)
  assert process.returncode == 75

  process = subprocess.Popen(arguments, env=environment, stdout=subprocess.PIPE)
  wait_until(running)
  children = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True,
                            text=True).stdout.split()
  for pid in (process.pid, *map(int, children)):
    os.kill(pid, signal.SIGKILL)
  process.communicate()

  done = subprocess.run(arguments, env=environment, capture_output=True, text=True)
  assert done.returncode == 0, done.stdout + done.stderr
  assert f"{folder}: 5 done\n" in done.stdout
  record = json.loads((folder / "after" / "sweep.json").read_text())
  assert record["failures"] == 0 and record["steps"] == 6 * 19
  again = subprocess.run(arguments, env=environment, capture_output=True, text=True)
  assert again.returncode == 0 and again.stderr == ""  # Nothing was started.
