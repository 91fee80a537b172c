"""minw.trackers: services get the measurements, and no run depends on them."""

import importlib.util
import json
import logging
import re
import sys
import threading
import time
import types

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


# What the packages are told, by stand-ins for them.


class Wandb(types.ModuleType):
  """A stand-in for the package wandb."""

  def __init__(self):
    super().__init__("wandb")
    self.told = []
    self.Settings = lambda **fields: ("settings", fields)

  def init(self, **arguments):
    self.told.append(("init", arguments))
    return self

  def log(self, numbers, step):
    self.told.append(("log", numbers, step))

  def finish(self):
    self.told.append(("finish",))


class Mlflow:
  """A stand-in for the client of the package mlflow: a server with its runs."""

  def __init__(self):
    self.experiments, self.runs = {"others": "7"}, {}

  def get_experiment_by_name(self, name):
    number = self.experiments.get(name)
    return number and types.SimpleNamespace(experiment_id=number)

  def create_experiment(self, name):
    assert name not in self.experiments
    self.experiments[name] = "8"
    return "8"

  def create_run(self, experiment, run_name):
    name = f"run{len(self.runs)}"
    self.runs[name] = dict(experiment=experiment, name=run_name, params={}, metrics=[])
    return types.SimpleNamespace(info=types.SimpleNamespace(run_id=name))

  def log_param(self, run, key, value):
    assert key not in self.runs[run]["params"]  # The service allows no other value.
    self.runs[run]["params"][key] = value

  def update_run(self, run, status):
    self.runs[run]["status"] = status

  def log_batch(self, run, metrics):
    assert self.runs[run]["status"] == "RUNNING"
    self.runs[run]["metrics"] += metrics

  def set_terminated(self, run):
    self.runs[run]["status"] = "FINISHED"


@pytest.fixture
def wandb(monkeypatch):
  package = Wandb()
  monkeypatch.setitem(sys.modules, "wandb", package)
  monkeypatch.delenv("WANDB_PROJECT", raising=False)
  return package


@pytest.fixture
def mlflow(monkeypatch):
  server = Mlflow()
  for name, content in (
      ("mlflow", {}), ("mlflow.tracking", {"MlflowClient": lambda: server}),
      ("mlflow.entities", {"Metric": lambda *fields: fields})):
    package = types.ModuleType(name)
    vars(package).update(content)
    monkeypatch.setitem(sys.modules, name, package)
  monkeypatch.delenv("MLFLOW_EXPERIMENT_NAME", raising=False)
  return server


def track(service, workdir, config, *logged):
  """A start of a run that sends these measurements."""
  workdir.mkdir(exist_ok=True)
  tracker = trackers.Tracker(service, f"{workdir}/", config)
  for line in logged:
    tracker.log(*line)
  tracker.close()


def test_what_wandb_is_told(wandb, monkeypatch, caplog, tmp_path):
  first, later = {"loss/train": 0.25}, {"loss/train": 0.125, "accuracy/train": 0.5}
  track("wandb", tmp_path / "run", {"seed": 3}, (10, first), (20, later))
  (opened, arguments), *rest = wandb.told
  assert rest == [("log", first, 10), ("log", later, 20), ("finish",)]
  name = json.loads((tmp_path / "run/tracker.json").read_text())["wandb"]
  assert re.fullmatch("[0-9a-f]{16}", name)
  assert (opened, arguments) == ("init", {
      "project": "minw", "name": "run", "id": name, "resume": "allow",
      "config": {"seed": 3}, "settings": ("settings", {"console": "off"})})
  # A later start resumes the run, and another workdir has another one.
  wandb.told.clear()
  monkeypatch.setenv("WANDB_PROJECT", "ours")
  track("wandb", tmp_path / "run", {"seed": 3})
  track("wandb", tmp_path / "other", {"seed": 4})
  (_, resumed), _, (_, other), _ = wandb.told
  assert resumed == arguments | {"project": "ours"}
  assert (other["name"], other["config"]) == ("other", {"seed": 4})
  assert other["id"] not in (name, None)
  assert warnings_of(caplog) == []


def test_what_mlflow_is_told(mlflow, monkeypatch, caplog, tmp_path):
  monkeypatch.setattr(time, "time", lambda: 1_700_000_000.25)
  config = {"seed": 3, "conv_widths": [8, 8], "bits_rules": "x" * 600}
  track("mlflow", tmp_path / "run", config,
        (10, {"loss/train": 0.25, "accuracy/train": 0.5}), (20, {"loss/train": 0.125}))
  expected = {
      "experiment": "8", "name": "run", "status": "FINISHED",
      # MLflow takes text of at most 500 characters.
      "params": {"seed": "3", "conv_widths": "[8, 8]", "bits_rules": "x" * 500},
      "metrics": [("loss/train", 0.25, 1_700_000_000_250, 10),
                  ("accuracy/train", 0.5, 1_700_000_000_250, 10),
                  ("loss/train", 0.125, 1_700_000_000_250, 20)]}
  assert mlflow.runs == {"run0": expected}
  assert mlflow.experiments == {"others": "7", "minw": "8"}
  # A later start resumes the run, whose parameters the service would not replace.
  track("mlflow", tmp_path / "run", config, (30, {"loss/train": 1.0}))
  expected["metrics"].append(("loss/train", 1.0, 1_700_000_000_250, 30))
  assert mlflow.runs == {"run0": expected}
  # An experiment that exists is used.
  monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "others")
  track("mlflow", tmp_path / "other", {})
  assert mlflow.runs["run1"]["experiment"] == "7"
  assert warnings_of(caplog) == []


def test_a_run_keeps_its_names_at_both_services(wandb, mlflow, tmp_path):
  track("wandb", tmp_path / "run", {})
  track("mlflow", tmp_path / "run", {})
  track("wandb", tmp_path / "run", {})
  (_, first), _, (_, second), _ = wandb.told
  assert json.loads((tmp_path / "run/tracker.json").read_text()) == {
      "wandb": first["id"], "mlflow": "run0"}
  assert second["id"] == first["id"]


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
