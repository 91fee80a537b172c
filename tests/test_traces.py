"""minw.traces: a trace holds the steps that were asked for, by their names."""

import gzip
import json

import jax.numpy as jnp
import pytest

import gcs
from minw import errors
from minw import traces
from minw import train
from short_runs import EPOCH
from short_runs import contents
from short_runs import shared_programs
from short_runs import tiny_config


def steps_of(path, name=traces.STEP):
  """The numbers of the steps in a trace for Perfetto."""
  with gzip.open(path) as file:
    events = json.load(file)["traceEvents"]
  return [int(event["args"]["step_num"]) for event in events
          if event.get("name") == name]


def profile(workdir, steps):
  with shared_programs():
    return train.train_and_evaluate(
        tiny_config(num_epochs=1), str(workdir), steps)


def test_a_run_writes_a_trace_of_some_steps(tmp_path):
  assert profile(tmp_path / "run", (3, 7))["state"] == "done"
  folder = tmp_path / "run/profile/plugins/profile/steps_3_7"
  assert sorted(path.name for path in folder.iterdir()) == [
      "process_0.trace.json.gz", "process_0.xplane.pb"]
  assert steps_of(folder / "process_0.trace.json.gz") == [3, 4, 5, 6]
  assert b"train_step" in (folder / "process_0.xplane.pb").read_bytes()


def test_steps_beyond_the_run(tmp_path):
  for steps in ((3, 3), (-1, 3), (5, 3), (0, EPOCH + 1)):
    with pytest.raises(errors.UsageError, match=(
        f"profile='{steps[0]}:{steps[1]}': must be FIRST:LAST .* at most {EPOCH},")):
      profile(tmp_path / "run", steps)
  assert contents(tmp_path) == {}


@pytest.mark.parametrize("value, message", [
    ("5", "FIRST:LAST, 100:110 for example"), ("a:b", "FIRST:LAST, 100"),
    ("-1:3", "FIRST:LAST, 100"), ("1:2:3", "FIRST:LAST, 100"),
    ("5:5", "FIRST:LAST with FIRST less than LAST, and LAST at most 760,"),
    ("0:761", "FIRST:LAST with FIRST less than LAST, and LAST at most 760,")])
def test_bad_values(command, tmp_path, value, message):
  ended = command("minw.main", "--config=digits_convnet", f"--workdir={tmp_path}/run",
                  f"--profile={value}")
  assert (ended.code, ended.out, ended.err.count("\n")) == (2, "", 1)
  assert ended.err.startswith(f"error: profile={value!r}: must be {message}")
  assert contents(tmp_path) == {}


def test_a_trace_ends_with_the_loop(tmp_path, caplog):
  with traces.step_traced(str(tmp_path), (1, 9)) as trace:
    for step in range(3):
      with trace.step(step):
        loss = jnp.float32(step)
      trace.stepped(step + 1, loss)
  folder = tmp_path / "profile/plugins/profile/steps_1_9"
  assert steps_of(folder / "process_0.trace.json.gz") == [1, 2]
  assert not caplog.records


def test_a_trace_that_fails_does_not_end_the_loop(tmp_path, caplog):
  (tmp_path / "profile").touch()
  with traces.step_traced(str(tmp_path), (0, 1)) as trace:
    with trace.step(0):
      pass
    trace.stepped(1, jnp.float32(0))
    with trace.step(1):
      pass
  record, = caplog.records
  assert record.getMessage().startswith("the profile cannot be written (")


def test_a_run_that_is_beyond_the_steps_says_so(tmp_path, caplog):
  with traces.step_traced(str(tmp_path), (0, 2)) as trace:
    with trace.step(2):
      pass
  record, = caplog.records
  assert record.getMessage() == (
      "profile=0:2: this start of the run did none of these steps")
  assert contents(tmp_path) == {}


@pytest.mark.slow
def test_a_trace_on_gs(tmp_path, monkeypatch):
  with gcs.emulator(tmp_path) as service:
    for name, value in service.environment.items():
      monkeypatch.setenv(name, value)
    with traces.step_traced("gs://bucket/run", (0, 1)) as trace:
      with trace.step(0):
        pass
      trace.stepped(1, jnp.float32(0))
    found = service.contents("run/profile/plugins/profile/steps_0_1/")
  assert sorted(found) == ["process_0.trace.json.gz", "process_0.xplane.pb"]
  (tmp_path / "trace").write_bytes(found["process_0.trace.json.gz"])
  assert steps_of(tmp_path / "trace") == [0]
