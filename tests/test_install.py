"""The files of an installed package, built as wheels are but without the compiler."""

import os
import pathlib
import subprocess
import sys
import tarfile

import pytest

from minw import config as config_lib
from minw import config_flag
from minw import infer
from minw.workdir import run_files

ROOT = pathlib.Path(__file__).parents[1]


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
  """The folder of a package that was built from this clone."""
  folder = tmp_path_factory.mktemp("installed")
  subprocess.run(
      [sys.executable, "setup.py", "-q", "build_py", f"--build-lib={folder}"],
      cwd=ROOT, check=True)
  return folder


def run(installed, folder, *arguments):
  return subprocess.run(
      [sys.executable, *arguments], cwd=folder, text=True, capture_output=True,
      env={**os.environ, "PYTHONPATH": str(installed)})


def test_files(installed):
  package = installed / "minw"
  assert (package / "kernels" / "csrc" / "minw.h").exists()
  assert (package / "kernels" / "csrc" / "ffi.cc").exists()
  assert (package / "py.typed").exists()  # Type checkers read the annotations.
  web = ROOT / "minw" / "web"
  for found, ours in (
      (package / "web", [*web.iterdir()]),
      (package / "experiments", [*config_flag.experiments().values()]),
      (package / "experiments" / "sweeps", [*config_flag.sweeps().values()]),
      (package / "networks", [*infer.shipped().values()])):
    for path in ours:
      assert (found / path.name).read_bytes() == path.read_bytes()
    assert len(ours) >= 4


def test_sources_of_the_library(tmp_path):
  """A source distribution holds all that the native library is built from."""
  subprocess.run(
      [sys.executable, "setup.py", "-q", "egg_info", f"--egg-base={tmp_path}", "sdist",
       "-d", tmp_path], cwd=ROOT, check=True)
  (path,) = tmp_path.glob("*.tar.gz")
  with tarfile.open(path) as file:
    names = {name.split("/", 1)[1] for name in file.getnames() if "/csrc/" in name}
  csrc = ROOT / "minw" / "kernels" / "csrc"
  assert names == {str(path.relative_to(ROOT)) for path in csrc.iterdir()}
  assert len(names) > 20


def test_experiments_by_name(installed, tmp_path):
  done = run(installed, tmp_path, "-c", """if True:
      from minw import config_flag
      print(config_flag.__file__, config_flag.experiments()["digits_convnet"])
      for name in config_flag.experiments():
        config_flag.load(name)
      print(config_flag.load("cifar_convnet:network=A").dense_widths)""")
  assert done.stderr == ""
  assert done.stdout == (
      f"{installed}/minw/config_flag.py"
      f" {installed}/minw/experiments/digits_convnet.py\n(1024, 1024)\n")


@pytest.mark.slow
def test_training_in_an_empty_folder(installed, tmp_path):
  done = run(
      installed, tmp_path, "-m", "minw.main", "--config=digits_convnet",
      "--workdir=run",
      "--config.num_epochs=1", "--config.eval_every_epochs=1")
  assert done.returncode == 0, done.stderr
  assert run_files.read_status(str(tmp_path / "run"))["state"] == "done"
  config = config_lib.from_json((tmp_path / "run" / "config.json").read_text())
  assert config_lib.differing_fields(
      config, config_flag.load("digits_convnet")) == [
          "eval_every_epochs: 1, 4", "num_epochs: 1, 40"]
