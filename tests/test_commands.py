"""The commands that minw documents and prints are accepted by minw.

Each is parsed by the real command with real configs, up to where its work would begin.
Those that are cheap are run whole.
"""

import ast
import functools
import itertools
import re
import shlex
from typing import NamedTuple

import numpy as np
from PIL import Image
import pytest

from forked import ROOT
from minw import __main__ as minw_command
from minw import config_flag
from minw import prepare
from minw.data import datasets

# What stands for something in a documented command, and an example of it.
_PLACEHOLDERS = {
    "--sweep=...": "--sweep=estimators", "--dir=...": "--dir=runs",
    "--config=FILE": "--config=experiments/digits_convnet.py",
    "--config=NAME": "--config=digits_convnet",
    "--configs=NAME:ARGUMENT": "--configs=cifar_convnet:network=A",
    "config.FIELD=VALUE": "config.seed=1", "=estimator,FIELD": "=estimator,seed",
    "gs://BUCKET": "shared",
    "--format=FORMAT": "--format=c", "--jobs=N": "--jobs=2", "=N": "=8",
    "$size": "quarter", "$1_$2": "cifar10_A", "dataset=$1": "dataset=cifar10",
    "network=$2": "network=A", "seeds=$3": "seeds=3"}
_START = re.compile(
    r"(python -m minw[\w.]*|python"
    r" launch/\w+\.py|launch/slurm\.sbatch|launch/tpu_vm\.sh"
    r"|(?<![-\w/.`])minw (?=[a-z]))")

# What is checked in the place of a command's work.
_CHECK = """
import importlib, pathlib, sys
from absl import flags
from minw import cli, config, experiment, sweeps
sys.path.insert(0, {launch!r})
module = importlib.import_module({module!r})

def check():
  f = flags.FLAGS
  if "sweep" in f:
    assert sweeps.select(sweeps.read(f.sweep, f.dir, f.data_dir), f.only)
  if "config" in f:
    config.validate(f.config)
    if f.config.histogram_layers:
      experiment.Experiment(f.config)
  for name in getattr(f, "configs", ()):
    config.validate(importlib.import_module("minw.config_flag").load(name))
  if hasattr(module, "check_flags"):
    module.check_flags()

names = getattr(module, "SUBCOMMANDS", None)
cli.run(dict.fromkeys(names, check) if names else check, module.define_flags)
"""


class Command(NamedTuple):
  """A documented command: its module, its arguments, and the place of its text."""

  module: str
  argv: tuple[str, ...]
  where: str


def texts():
  """Yields (file, text) of documents, docstrings and comments of scripts."""
  for pattern in ("*.md", "docs/**/*.md", "results/**/*.md", "minw/networks/*.md"):
    for path in sorted(ROOT.glob(pattern)):
      yield str(path.relative_to(ROOT)), path.read_text()
  for path in sorted(itertools.chain.from_iterable(
      ROOT.glob(f"{top}/**/*.py") for top in ("minw", "launch", "experiments"))):
    for node in ast.walk(ast.parse(path.read_text())):
      if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)):
        yield str(path.relative_to(ROOT)), ast.get_docstring(node, clean=False) or ""
  for path in sorted(ROOT.glob("launch/*.s*")):
    lines = path.read_text().splitlines()
    yield str(path.relative_to(ROOT)), "\n".join(
        line[1:] for line in lines if line.startswith("#"))


def lines(text):
  """The lines of a text, those that a backslash or an open bracket continues joined."""
  text = re.sub(r"\\\n\s*", "", text)
  return re.sub(r"\n\s+\[(?=--|\.\.\.)", " [", text).splitlines()


def commands():
  """Yields all documented commands that have arguments."""
  for where, text in texts():
    for line in lines(text):
      starts = [*_START.finditer(line)]
      for start, after in zip(starts, [*starts[1:], None]):
        rest = line[start.end():after.start() if after else None]
        rest = rest.partition("`")[0].partition("|")[0].partition("&&")[0]
        rest = re.sub(r"\s#\s.*|\(.*?and again.*|\s+(?=and\s).*", "", rest)
        rest = re.sub(r"\]\.\.\.|\[\.\.\.\]|[\[\]]", "", rest)
        for name, example in _PLACEHOLDERS.items():
          rest = rest.replace(name, example)
        try:
          argv = shlex.split(rest)
        except ValueError:  # The text goes on in prose.
          continue
        if any(argument.startswith("--") for argument in argv):
          yield from commands_of(start[1].strip(), argv, where)


def commands_of(name, argv, where):
  """The commands that one line starts: itself, and those that it passes others to."""
  if name in ("launch/slurm.sbatch", "launch/tpu_vm.sh"):
    argv = argv[argv[0] == "NAME":]
    yield Command("minw.main", (*argv, "--distributed"), where)
    return
  if name.startswith("python launch/"):
    module = name.removeprefix("python launch/").removesuffix(".py")
    if "--" in argv:
      split = argv.index("--")
      yield Command("minw.main", tuple(argv[split + 1:]), where)
      argv = argv[:split]
  elif name.startswith("python -m minw."):
    module = name.removeprefix("python -m ")
  else:
    module, *argv = minw_command.COMMANDS[argv[0]], *argv[1:]
  yield Command(module, tuple(argv), where)


FOUND = [*commands()]
ALL = sorted({(c.module, c.argv): c for c in FOUND}.values())
# Commands of the fast test: those that a reader meets first, and one of each kind.
FAST = {*{(c.module, c.argv[0].partition("=")[0]): c for c in ALL}.values(), *(
    c for c in ALL if c.where.startswith(("README", "docs/tutorials")))}


def accepted(run, module, argv):
  """How a command ended that ends where its work would begin."""
  path = ROOT / "minw" / module.removeprefix("minw.") / "__main__.py"
  module += ".__main__" * (module.startswith("minw.") and path.exists())
  return run("command", *argv, code=_CHECK.format(
      launch=str(ROOT / "launch"), module=module))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  """A folder with what the clone holds beside minw, an image, and a data set."""
  path = tmp_path_factory.mktemp("clone")
  for name in ("experiments", "launch", "results"):
    (path / name).symlink_to(ROOT / name)
  Image.new("L", (8, 8)).save(path / "image.png")
  # The data sets of the pages on own images.
  images = np.random.default_rng(0).integers(0, 256, (330, 24, 24, 3), np.uint8)
  np.savez(path / "images.npz", labels=np.arange(len(images)) % 3, images=images)
  for name, grayscale in (("shapes", False), ("characters", True)):
    prepare.prepare_images(
        name, path / "data", path / "images.npz", grayscale=grayscale)
  return path


@pytest.fixture(scope="module")
def run(command, folder):
  """run(module, *argv): how a command ended in `folder`."""
  return functools.partial(command, folder=folder)


def test_commands_are_found():
  found = {(c.where, c.module) for c in FOUND}
  assert len(ALL) > 50
  for where, module in (
      ("README.md", "minw.main"), ("README.md", "minw.export"),
      ("docs/howto/sweeps.md", "sweep"), ("docs/tutorials/cifar.md", "minw.prepare"),
      ("minw/bench/__main__.py", "minw.bench"), ("minw/pack.py", "minw.pack"),
      ("minw/networks/digits_convnet.md", "minw.pack"), ("launch/sweep.py", "sweep"),
      ("launch/slurm.sbatch", "minw.main"), ("launch/tpu_vm.sh", "minw.main"),
      ("results/networks/README.md", "sweep")):
    assert (where, module) in found, (where, module, sorted(found))


@pytest.mark.parametrize("documented", [
    pytest.param(c, marks=() if c in FAST else pytest.mark.slow) for c in ALL],
    ids=lambda c: f"{c.where}: {c.module} {' '.join(c.argv)}"[:90])
def test_documented_commands_are_accepted(run, documented):
  result = accepted(run, documented.module, documented.argv)
  assert result.code == 0 and result.err == "", result


def test_commands_that_are_named_exist(run):
  """Such as `python -m minw.report tables`, without flags."""
  named = set()
  for _, text in texts():
    named |= set(re.findall(
        r"python -m (minw[\w.]*\w)(?: (\w+))?(?:`| *#| *$)", text, re.MULTILINE))
  assert ("minw.bench", "train") in named and ("minw.main", "") in named
  for module, subcommand in named:
    argv = [subcommand] if subcommand else []
    assert run(module, *argv, "--help").code == 0, (module, subcommand)


def test_documented_overrides_are_accepted_by_the_first_config(run):
  """`--config.FIELD=VALUE`, alone in the text of a document."""
  text = "\n".join(text for where, text in texts() if where.endswith(".md"))
  found = set(re.findall(r"`(--config\.\w+=[^`]+)`", text))
  assert len(found) > 5 and any("histogram_layers" in flag for flag in found)
  for flag in found:
    if "gs://" in flag:  # The bucket would be asked for its data sets.
      continue
    argv = ["--config=experiments/digits_convnet.py", "--workdir=x", *shlex.split(flag)]
    result = accepted(run, "minw.main", argv)
    assert result.code == 0, (flag, result.err)


@pytest.mark.slow  # Sweeps in commands are accepted by the fast tests, too.
def test_documented_sweeps_are_accepted(run):
  """`name:arguments` in the documents' tables of sweeps."""
  text = "\n".join(text for where, text in texts() if where.endswith(".md"))
  found = {name for name in re.findall(r"`(?:--sweep=)?(\w+:[^`]+)`", text)
           if name.partition(":")[0] in config_flag.sweeps()}
  assert len(found) >= 8
  for name in found:
    result = accepted(run, "sweep", [f"--sweep={name}", "--dir=x"])
    assert result.code == 0, (name, result.err)


@pytest.mark.parametrize("dataset", ["cifar10", "cifar100", "imagenet2012"])
def test_printed_commands_are_accepted(run, dataset):
  printed = [prepare.training_command(dataset, "/data/a b"),
             datasets.prepare_command(dataset, "/data/a b"),
             datasets.prepare_command(dataset, None)]
  for text in printed:
    python, m, module, *argv = shlex.split(text)
    assert (python, m) == ("python", "-m")
    result = accepted(run, module, argv)
    assert result == (0, "", ""), (text, result)
    assert any(argument.endswith("data_dir=/data/a b") for argument in argv) or (
        "data_dir=DIR" in text)


@pytest.mark.parametrize("text", [
    "minw.report tables --runs=results", "minw.plots --out=aqe.png",
    "minw.summary --config=experiments/digits_convnet.py",
    "minw.infer --model=digits_convnet --images=image.png",
    "minw.evaluate --model=digits_convnet",
    "minw.export --model=digits_convnet --format=c --out=digits.c"])
def test_cheap_commands_run(run, text):
  module, *argv = text.split()
  assert run(module, *argv).code == 0


@pytest.mark.parametrize("module", sorted({
    *minw_command.COMMANDS.values(), "minw.__main__", "minw.c_flags",
    "launch.sweep", "launch.local_multiprocess"}))
def test_work_is_in_functions(module):
  """Tests can call a command's work, which is not under `if __name__ == ...`."""
  tree = ast.parse((ROOT / f"{module.replace('.', '/')}.py").read_text())
  functions = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
  subcommands = [
      value.id for node in tree.body if isinstance(node, ast.Assign)
      and ast.unparse(node.targets[0]) == "SUBCOMMANDS"
      for value in node.value.values]
  assert functions >= set(subcommands or ["main"])
  guards = [node for node in tree.body if isinstance(node, ast.If)
            and ast.unparse(node.test) == "__name__ == '__main__'"]
  assert guards and all(len(guard.body) == 1 for guard in guards)
