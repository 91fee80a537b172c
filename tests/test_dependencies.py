"""minw.dependencies: what works where only the core is installed."""

import configparser
import os
import pathlib
import subprocess
import sys

from PIL import Image
import pytest

import minw
from minw import dependencies
from minw.__main__ import COMMANDS

ROOT = pathlib.Path(__file__).parents[1]

# Python imports this at its start: it hides all packages but those of the core.
_HIDE = """
import sys

class Hide:
  def find_spec(self, name, path=None, target=None):
    top = name.partition(".")[0]
    if not (top in sys.stdlib_module_names or top.startswith("_") or top in {
        "absl", "apport_python_hook", "minw", "ml_dtypes", "numpy", "PIL"}):
      raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Hide())
"""


@pytest.fixture(scope="module")
def core(tmp_path_factory):
  """Runs Python with arguments as if only the core were installed."""
  folder = tmp_path_factory.mktemp("core")
  (folder / "sitecustomize.py").write_text(_HIDE)
  Image.new("L", (8, 8)).save(folder / "image.png")

  def run(*arguments):
    return subprocess.run(
        [sys.executable, *arguments], cwd=folder, text=True, capture_output=True,
        env={**os.environ, "PYTHONPATH": f"{folder}:{ROOT}"})

  run.folder = folder
  return run


def requirements(section, key):
  """Names of the packages that a list in setup.cfg names."""
  config = configparser.ConfigParser()
  config.read(ROOT / "setup.cfg")
  lines = [line for line in config[section][key].splitlines()
           if line.strip() and not line.strip().startswith("#")]
  return {line.split(">")[0].strip() for line in lines}


def test_layers():
  assert requirements("options", "install_requires") == {
      "absl-py", "ml-dtypes", "numpy", "pillow"}
  for extra in ("bench", "cuda12", "cuda13", "notebooks", "test"):
    assert "minw[train]" in requirements("options.extras_require", extra)


def test_inference(core):
  done = core("-m", "minw.infer", "--model=digits_convnet", "--images=image.png")
  assert (done.returncode, done.stderr) == (0, "")
  assert done.stdout.startswith("image.png\t")


def test_list_of_commands(core):
  done = core("-m", "minw", "--help")
  assert (done.returncode, done.stderr) == (0, "")
  assert "  train " in done.stdout and "  infer " in done.stdout


def test_export_as_c(core):
  done = core("-m", "minw.export", "--model=digits_convnet", "--format=c", "--out=n.c")
  assert (done.returncode, done.stderr) == (0, "")
  assert "minw" in (core.folder / "n.c").read_text()


@pytest.mark.parametrize("arguments", [
    ["-m", "minw.main", "--config=digits_convnet", "--workdir=run"],
    ["-m", "minw.evaluate", "--help"],
    ["-m", "minw.report", "tables"],
    ["-m", "minw", "train", "--help"],
    ["-m", "minw.export", "--workdir=run", "--format=c", "--out=n.c"],
], ids=" ".join)
def test_commands_for_training(core, arguments):
  done = core(*arguments)
  assert (done.returncode, done.stdout) == (2, "")
  assert done.stderr == (
      "error: this command needs minw's training dependencies:"
      " pip install 'minw[train]'\n")


def test_xla_without_jax(core):
  done = core("-m", "minw.infer", "--model=digits_convnet", "--images=image.png",
              "--backend=xla")
  assert done.returncode == 2
  assert done.stderr == ("error: backend='xla' needs JAX, which is not installed: pip"
                         " install jax\n")


def test_without_the_library_and_jax(core):
  """NumPy runs the network, and says so once."""
  done = core("-c", """if True:
      from minw import infer
      from minw.kernels import native
      native.available = lambda: False
      print([infer.load("digits_convnet").backend for _ in range(2)])""")
  assert (done.returncode, done.stdout) == (0, "['reference', 'reference']\n")
  assert done.stderr.count("through NumPy") == 1


def test_imports(core):
  """Every module of minw works, or names what has to be installed."""
  done = core("-c", """if True:
      import pkgutil, minw
      for found in pkgutil.walk_packages(minw.__path__, "minw.", onerror=id):
        name = found.name
        if name.endswith(("__main__", ".libminw")) or name.startswith("minw.export."):
          continue  # No modules to import, or formats with packages of their own.
        try:
          __import__(name)
        except minw.dependencies.MissingDependencies as error:
          print(name, error.name, str(error).startswith(error.name + " needs minw's"))
        except Exception as error:
          print(name, type(error).__name__, error)""")
  lines = dict(line.split(" ", 1) for line in done.stdout.splitlines())
  assert lines.pop("minw.kernels.xla") == "ModuleNotFoundError No module named 'jax'"
  assert "minw.layers" in lines and "minw.bench" in lines
  assert {name: f"{name} True" for name in lines} == lines
  assert not {name.removeprefix("minw.") for name in lines} & {*dependencies.CORE}


@pytest.mark.parametrize("code, message", [
    ("from minw import layers", "minw.layers needs minw's training dependencies"),
    ("import minw; minw.layers", "minw.layers needs minw's training dependencies"),
    ("from minw.report import tables", "minw.report needs minw's training"),
    ("from minw import laiers", "ImportError: cannot import name 'laiers'"),
    ("import minw; minw.laiers", "AttributeError: module 'minw' has no attribute"),
])
def test_errors_in_python(core, code, message):
  done = core("-c", code)
  assert message in done.stderr.splitlines()[-1]


def test_import_minw_is_light():
  """JAX is imported by what uses it, not by `import minw`."""
  code = "import sys, minw; assert not {'jax', 'numpy', 'absl'} & {*sys.modules}"
  subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_inference_is_light():
  """Neither commands nor image files are needed to compute logits."""
  code = """if True:
      import sys
      import numpy as np
      from minw import infer
      infer.load("digits_convnet").logits(np.zeros((1, 8, 8, 1), np.uint8))
      assert not {"absl", "jax", "PIL", "subprocess", "tempfile"} & {*sys.modules}"""
  subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_commands_are_light():
  """These packages take half a second or more. Only what uses them imports them."""
  code = f"""if True:
      import importlib, sys
      slow = {{"grain", "matplotlib", "orbax", "scipy", "sklearn", "tensorboardX"}}
      for module in {[*COMMANDS.values()]}:
        importlib.import_module(module)
      print(slow & {{*sys.modules}})
      import minw.train
      print(slow & {{*sys.modules}})"""
  done = subprocess.run([sys.executable, "-c", code], text=True, capture_output=True,
                        check=True, cwd=ROOT)
  assert done.stdout == "set()\n{'orbax'}\n"


def test_submodules():
  code = """if True:
      import minw
      assert {"infer", "layers", "config", "train", "__version__"} <= {*dir(minw)}
      minw.infer.load("digits_convnet")
      assert minw.infer is __import__("minw.infer").infer"""
  subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
  with pytest.raises(AttributeError, match="'minw' has no attribute 'laiers'"):
    minw.laiers


def test_paths_of_this_machine_need_no_packages_of_gcs():
  code = ("import sys\nfrom minw import files, infer, paths\nfrom minw.workdir import "
          "locks\npaths.expand('~/x'); paths.at('x').exists()\n"
          "print({'gcsfs', 'fsspec', 'google.cloud', 'aiohttp'} & {*sys.modules})")
  done = subprocess.run([sys.executable, "-c", code], text=True, capture_output=True,
                        env={**os.environ, "PYTHONPATH": str(ROOT)})
  assert (done.stdout, done.stderr) == ("set()\n", "")
