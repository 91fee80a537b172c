"""minw.trackers: services get the measurements, and no run depends on them."""

import importlib.util
import json
import logging
import re
import threading
import time

import pytest

from minw import trackers
from minw import train
from minw.workdir import board
from minw.workdir import metrics
from short_runs import contents
from short_runs import line_at
from short_runs import lines_of
from short_runs import shared_programs
from short_runs import tiny_config


class Fake:
  """A service that records what it is told, and fails where a test says."""

  def __init__(self, fails=""):
    self.fails, self.told = fails, []

  def __call__(self, workdir, config):
    self._tell("open", workdir, config)
    return self

  def log(self, step, numbers):
    self._tell("log", step, numbers)

  def close(self):
    self._tell("close")

  def _tell(self, name, *arguments):
    self.told.append((name, *arguments))
    if self.fails == name:
      raise ConnectionError("no answer")


@pytest.fixture
def use(monkeypatch):
  """use(service): makes it the service `wandb`, whose package counts as installed."""
  def use(service):
    monkeypatch.setitem(trackers.SERVICES, "wandb", service)
    monkeypatch.setattr(trackers.dependencies, "installed", lambda name: True)
    return service

  return use


def tracked_run(workdir, name="wandb"):
  workdir.mkdir(exist_ok=True)
  with shared_programs():
    return train.train_and_evaluate(
        tiny_config(num_epochs=1), str(workdir), tracker=name)


def warnings_of(caplog):
  return [record.getMessage() for record in caplog.records
          if record.levelno == logging.WARNING]


def test_numbers_have_the_names_of_curves():
  assert board.numbers(line_at(10, "train", "mixed", flip_rate={"conv1": 0.5})) == {
      "loss/train": 10 / 7, "accuracy/train": 0.5, "flip_rate/conv1": 0.5}
  assert board.numbers(line_at(30, "test", checkpoint="best", checkpoint_step=20)) == {
      "loss/test_best": 30 / 7, "accuracy/test_best": 0.5, "checkpoint_step": 20}


def test_a_service_gets_each_line(use, tmp_path):
  fake = use(Fake())
  assert tracked_run(tmp_path / "run")["state"] == "done"
  (opened, workdir, config), *logged, closed = fake.told
  assert (opened, workdir, closed) == ("open", str(tmp_path / "run"), ("close",))
  assert config["conv_widths"] == [8, 8]
  text = (tmp_path / "run/metrics.jsonl").read_text()
  lines = [json.loads(line) for line in text.splitlines()]
  assert logged == [("log", line["step"], board.numbers(line)) for line in lines]
  assert len(logged) == 5


@pytest.mark.parametrize("where", ["open", "log", "close"])
def test_a_run_survives_a_failing_service(use, caplog, tmp_path, where):
  fake = use(Fake(where))
  assert tracked_run(tmp_path / "run")["state"] == "done"
  assert len(lines_of(tmp_path / "run")) == 5
  assert warnings_of(caplog) == [
      "tracker=wandb: ConnectionError: no answer; nothing more of this run is sent"
      " until it is started again"]
  assert [name for name, *_ in fake.told].count(where) == 1


def test_a_service_that_hangs_delays_the_end_only(use, caplog, monkeypatch, tmp_path):
  answers = threading.Event()

  def hang(workdir, config):
    answers.wait()
    return Fake()

  use(hang)
  monkeypatch.setattr(trackers, "_CLOSE_SECONDS", 0.1)
  tracker = trackers.Tracker("wandb", str(tmp_path), {})
  writer = metrics.Writer(str(tmp_path), 0, None, tracker)
  writer.write(line_at(10))
  writer.close()
  assert warnings_of(caplog) == [
      "tracker=wandb: the last measurements were not sent within 0 s"]
  answers.set()


def test_bad_values(command, tmp_path):
  def refusal(name):
    ended = command("minw.main", "--config=digits_convnet", "--config.num_epochs=1",
                    f"--workdir={tmp_path / 'run'}", f"--tracker={name}")
    assert (ended.code, ended.out, ended.err.count("\n")) == (2, "", 1)
    assert contents(tmp_path) == {}
    return ended.err

  assert refusal("neptune") == (
      "error: flag --tracker=neptune: value should be one of <wandb|mlflow>\n")
  for name in trackers.SERVICES:
    if importlib.util.find_spec(name) is None:
      assert refusal(name) == (f"error: tracker={name!r}: must be installed: pip"
                               f" install 'minw[{name}]'\n")


# The packages themselves, offline.


def real(name, monkeypatch, **variables):
  pytest.importorskip(name, reason=f"minw[{name}] is not installed")
  for variable, value in variables.items():
    monkeypatch.setenv(variable, str(value))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_wandb_offline(monkeypatch, caplog, tmp_path):
  real("wandb", monkeypatch, WANDB_MODE="offline", WANDB_DIR=tmp_path,
       WANDB_SILENT=True)
  for _ in range(2):  # The second start resumes the run of the first one.
    (tmp_path / "run").mkdir(exist_ok=True)
    tracker = trackers.Tracker("wandb", str(tmp_path / "run"), {"seed": 3})
    tracker.log(10, {"loss/train": 0.25})
    tracker.close()
  assert warnings_of(caplog) == []
  name = json.loads((tmp_path / "run/tracker.json").read_text())["wandb"]
  files = sorted(tmp_path.glob("wandb/offline-run-*/run-*.wandb"))
  assert files and {path.name for path in files} == {f"run-{name}.wandb"}
  # Another process writes the last of a file after the run was finished.
  end = time.monotonic() + 30
  while not all(b"loss/train" in path.read_bytes() for path in files):
    assert time.monotonic() < end
    time.sleep(0.1)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_mlflow_in_files(monkeypatch, caplog, tmp_path):
  real("mlflow", monkeypatch, MLFLOW_TRACKING_URI=(tmp_path / "mlruns").as_uri(),
       MLFLOW_ALLOW_FILE_STORE="true")
  assert tracked_run(tmp_path / "run", "mlflow")["state"] == "done"
  assert warnings_of(caplog) == []
  name = json.loads((tmp_path / "run/tracker.json").read_text())["mlflow"]
  folder, = (tmp_path / "mlruns").glob(f"*/{name}")
  line, = lines_of(tmp_path / "run", split="validation", mode="hard")
  time, value, step = (folder / "metrics/loss/validation").read_text().split()
  assert (float(value), int(step)) == (line["loss"], line["step"])
  assert (folder / "params/network").read_text() == "convnet"
  # A later start resumes the same run at the service.
  tracker = trackers.Tracker("mlflow", str(tmp_path / "run"), {"network": "convnet"})
  tracker.log(40, {"loss/validation": 0.5})
  tracker.close()
  assert re.findall(r" (\S+) (\d+)\n", (
      folder / "metrics/loss/validation").read_text())[-1] == ("0.5", "40")
  assert list((tmp_path / "mlruns").glob(f"*/{name}")) == [folder]
