"""Every command with bad input: one line that names it, exit code 2, no traceback.

The commands run in forks of one process, with their real exit codes and output.
"""

import collections
import configparser
import functools
import importlib
import inspect
import json
import os
import pathlib
import random
import re
import shlex
import signal
import subprocess
import sys

from PIL import Image
import pytest

from forked import ROOT
from forked import TRAINING
import minw
from minw import __main__ as minw_command
from minw import cli
from minw import config as config_lib
from minw import dependencies
from minw import errors
from minw import train
from minw import train_step
from minw import usage

DIGITS = str(ROOT / "experiments" / "digits_convnet.py")
CIFAR = str(ROOT / "experiments" / "cifar_convnet.py")

# Experiment files, most of them broken.
_CHANGED = """
from minw import config
def get_config():
  c = config.default_config()
  {}
  return c
"""
FILES = {
    "syntax.py": "def get_config(:\n",
    "nothing_in_it.py": "",
    "no_function.py": "get_config = 3\n",
    "import_error.py": "import minw.nothing\n",
    "value_error.py": "def get_config():\n  raise ValueError('seven\\n  lines')\n",
    "key_error.py": "def get_config():\n  return {}['a']\n",
    "division.py": "x = 1 / 0\n",
    "assertion.py": "def get_config():\n  assert 1 > 2, 'an assertion'\n",
    "os_error.py": "def get_config():\n  open('no such file')\n",
    "none.py": "def get_config():\n  pass\n",
    "dict.py": "def get_config():\n  return {'seed': 1}\n",
    "unknown_field.py": _CHANGED.format("c.learning_rte = 0.1"),
    "wrong_type.py": _CHANGED.format("c.seed = 'x'"),
    "list.py": _CHANGED.format("c.input_bits = [1, 2]"),
    "nan.py": _CHANGED.format("c.alpha_end = float('nan')"),
    "frozen.py": "from ml_collections import FrozenConfigDict\n" + _CHANGED.format(
        "c = FrozenConfigDict(c)"),
    "good.py": _CHANGED.format("c.update(dataset='digits', crop_size=8)"),
    "grüße.py": _CHANGED.format("c.seed = -1"),
    "file": "neither Python",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  path = tmp_path_factory.mktemp("cli")
  for name, text in FILES.items():
    (path / name).write_text(text)
  (path / "null.py").write_bytes(b"\xff\xfe\x00")
  (path / "tmp").mkdir()
  config = config_lib.to_json(config_lib.default_config())
  for name, text in (
      ("empty", None), ("no_json", "no JSON"), ("cut_off", config[:200]),
      ("null", "null"), ("other_type", config.replace('"seed": 0', '"seed": "a"')),
      ("misspelt", config.replace('"seed": 0', '"sed": 0')),
      ("bad_value", config.replace('"seed": 0', '"seed": -1')), ("no_run", config)):
    (path / name).mkdir()
    if text is not None:
      (path / name / "config.json").write_text(text)
  return path


@pytest.fixture(scope="module")
def run(command, folder):
  """run(module, *argv): how a command ended in `folder`, where no run trains."""
  return functools.partial(command, folder=folder, trains=False)


@pytest.fixture
def refuses(run, folder):
  """refuses(message, module, *argv): the line it prints begins with `message`.

  It has it somewhere if `message` begins with an ellipsis.
  """
  def refuses(message, module, *argv, **options):
    before = sorted(folder.rglob("*"))
    result = run(module, *argv, **options)
    assert result.code == 2 and result.out == ""
    assert "Traceback" not in result.err and result.err.count("\n") == 1
    assert begins(result.err.removeprefix("error: "), message)
    assert result.err.startswith("error: ")
    assert sorted(folder.rglob("*")) == before
    return result.err

  return refuses


def begins(text, message):
  if message.startswith("..."):
    return message.removeprefix("...") in text
  return text.startswith(message)


FILE = "must be a name or a Python file whose get_config returns a config"


@pytest.mark.parametrize("name, reason", [
    ("", "FileNotFoundError: "),
    ("nothing.py", "FileNotFoundError: "),
    ("null.py", "SyntaxError: "),
    ("nothing_in_it.py", "AttributeError: module 'nothing_in_it.py' has no attribute"),
    ("import_error.py", "ModuleNotFoundError: No module named 'minw.nothing'"),
    ("value_error.py", "ValueError: seven lines"),
    ("dict.py", "TypeError: it returned dict"),
    ("good.py:seed=1", "TypeError: get_config() takes 0 positional arguments but 1"),
    (f"{CIFAR}:network=[1]", "TypeError: "),
    *(pytest.param(*slow, marks=pytest.mark.slow) for slow in (
        ("good.py/x", "NotADirectoryError: "),
        ("file", "SyntaxError: "),
        ("syntax.py", "SyntaxError: "),
        ("no_function.py", "TypeError: 'int' object is not callable"),
        ("key_error.py", "KeyError: 'a'"),
        ("division.py", "ZeroDivisionError: division by zero"),
        ("assertion.py", "AssertionError: an assertion"),
        ("os_error.py", "FileNotFoundError: "),
        ("none.py", "TypeError: it returned NoneType"),
        ("frozen.py", "AttributeError: "),
        ("good.py:", "TypeError: get_config() takes 0 positional arguments but 1")))
])
def test_experiment_files(refuses, name, reason):
  for override in ((), ("--config.seed=1",)):
    refuses(f"config={name!r}: {FILE} ({reason}", "minw.main", f"--config={name}",
            "--workdir=new", *override)


@pytest.mark.parametrize("name, message", [
    ("unknown_field.py",
     "config field 'learning_rte' does not exist; did you mean 'learning_rate'?"),
    ("list.py", "config.input_bits: bits=[1, 2]: must be one of 1, 2, 3, 4, 5 or a "),
    ("wrong_type.py", "config.seed='x': must be of type int"),
    (f"{CIFAR}:seed=a", "config.seed='a': must be of type int"),
    ("nan.py", "config.alpha_end=nan: must be in [0, 1]"),
    ("grüße.py", "config.seed=-1: must be in [0, 2^32)"),
    ("tmp", "config 'tmp' does not exist; known: cifar_best, cifar_convnet, cifar_d"),
    ("digits_convne",
     "config 'digits_convne' does not exist; did you mean 'digits_con"),
    ("experiments/digits_convnet.py", "config='experiments/digits_convnet.py': no such "
     "file here; did you mean --config=digits_convnet, which comes with minw?"),
    ("cifar_convnet:sed=1",
     "config argument 'sed' does not exist; did you mean 'seed'"),
    (f"{CIFAR}:sed=1", "config argument 'sed' does not exist; did you mean 'seed'?"),
    (f"{CIFAR}:seed", "config argument='seed': must be name=value"),
    (f"{CIFAR}:network=E", "ConvNet 'E' does not exist; known: A, B, C, D"),
    (f"{CIFAR}:input_bits=6", "config.input_bits: bits=6: must be one of 1, 2, 3, "),
    (f"{CIFAR}:weight_bits=é", "config.weight_bits: bits='é': must be one of 1, 2, "),
    (f"{CIFAR}:seed=None", "config.seed=None: must be of type int"),
    (f"{CIFAR}:dataset=mnist", "config.dataset='mnist': must be one of digits, "),
])
def test_what_experiment_files_say(refuses, name, message):
  refuses(message, "minw.main", f"--config={name}", "--workdir=new")


@pytest.mark.parametrize("override, message", [
    ("--config.lr=0.1", "config field 'lr' does not exist; "),
    ("--config.sed=1", "config field 'sed' does not exist; did you mean 'seed'?"),
    ("-config.sed=1", "config field 'sed' does not exist; did you mean 'seed'?"),
    ("--config.lr", "config field 'lr' does not exist; "),
    ("--noconfig.random_flp", "config field 'random_flp' does not exist; did you mean"),
    ("--config.seed.x=1", "config field 'seed.x' does not exist; did you mean 'seed'?"),
    ("--config.seed[0]=1", "config field 'seed[0]' does not exist; did you mean "),
    ("--config.=1", "config field '' does not exist; "),
    ("--config.größe=1", "config field 'größe' does not exist; "),
    ("--config.lock=1", "config field 'lock' does not exist; "),
    ("--config.learning_rate=abc",
     "config.learning_rate='abc': must be of type float"),
    ("--config.learning_rate=", "config.learning_rate='': must be of type float"),
    ("--config.learning_rate=1,5",
     "config.learning_rate='1,5': must be of type float"),
    ("--config.learning_rate=a b",
     "config.learning_rate='a b': must be of type float"),
    ("--config.learning_rate=True",
     "config.learning_rate='True': must be of type float"),
    ("--config.learning_rate=(0.1,)",
     "config.learning_rate='(0.1,)': must be of type float"),
    ("--config.learning_rate", "Missing value for flag --config.learning_rate"),
    ("--config.learning_rate=nan", "config.learning_rate=nan: must be positive and "),
    ("--config.learning_rate=-1", "config.learning_rate=-1.0: must be positive and "),
    ("--config.learning_rate=1e999", "config.learning_rate=inf: must be positive and "),
    ("--config.seed=1.0", "config.seed='1.0': must be of type int"),
    ("--config.seed=1e3", "config.seed='1e3': must be of type int"),
    ("--config.seed=", "config.seed='': must be of type int"),
    ("--config.seed==1", "config.seed='=1': must be of type int"),
    ("--config.seed=é", "config.seed='é': must be of type int"),
    ("--config.seed=-1", "config.seed=-1: must be in [0, 2^32)"),
    ("--config.seed=4294967296", "config.seed=4294967296: must be in [0, 2^32)"),
    ("--noconfig.seed",
     "there is no flag --noconfig.seed; did you mean --config.seed?"),
    ("--config.random_flip=maybe", "config.random_flip='maybe': must be of type bool"),
    ("--config.random_flip=2", "config.random_flip='2': must be of type bool"),
    ("--config.conv_widths=(32,", "config.conv_widths='(32,': must be of type tuple"),
    ("--config.conv_widths=(1.5, 2)", "config.conv_widths=(1.5, 2): must be a tuple "),
    ("--config.conv_widths=('a','b')", "config.conv_widths=('a', 'b'): must be a "),
    ("--config.conv_widths=abc", "config.conv_widths=('abc',): must be a tuple "),
    ("--config.conv_widths=", "config.conv_widths=('',): must be a tuple "),
    ("--config.conv_widths=0", "config.conv_widths=(0,): must be a tuple "),
    ("--config.conv_widths=" + 8 * "4,", "config.conv_widths=(4, 4, 4, 4, 4, 4, 4, 4): "
     "must be few enough: crop_size=8 leaves nothing"),
    ("--config.input_bits=0", "config.input_bits: bits=0: must be one of 1, 2, 3, "),
    ("--config.input_bits=16", "config.input_bits: bits=16: must be one of 1, 2, 3, "),
    ("--config.input_bits=True", "config.input_bits: bits=True: must be one of 1, "),
    ("--config.input_bits", "config.input_bits: bits=True: must be one of 1, 2, 3, "),
    ("--noconfig.input_bits", "config.input_bits: bits=False: must be one of 1, 2, "),
    ("--config.input_bits='3'", "config.input_bits: bits='3': must be one of 1, 2, "),
    ("--config.input_bits 3", "config field 'input_bits 3' does not exist; did you "),
    ("--config.weight_bits=float64", "config.weight_bits: bits='float64': must be one"),
    ("--config.weight_bits=", "config.weight_bits: bits='': must be one of 1, 2, 3, "),
    ("--config.bits_rules=conv1", "config.bits_rules=('conv1',): must be pairs of a "),
    ("--config.bits_rules=(('conv1',8),)", "config.bits_rules: bits=8: must be one "),
    ("--config.weight_thresholds=(0.5,)", "config.weight_thresholds=(0.5,): must be "),
    ("--config.alpha_start=1.1", "config.alpha_start=1.1: must be in [0, 1]"),
    ("--config.batch_size=0", "config.batch_size=0: must be at least 2"),
    ("--config.batch_size=1258", "config.batch_size=1258: must be at most 1257, the "),
    ("--config.eval_batch_size=1258", "config.eval_batch_size=1258: must be at most "),
    ("--config.num_epochs=113025456", "config.num_epochs=113025456: must be at most "
     "113025455: steps are int32"),
    ("--config.crop_size=33", "config.crop_size=33: must be at most 8, the image of "),
    ("--config.crop_padding=8", "config.crop_padding=8: must be less than crop_size=8"),
    ("--config.first_padding=same", "config.first_padding='same': must be one of SAME"),
    ("--config.dataset=mnist", "config.dataset='mnist': must be one of digits, "),
    ("--config.estimator=", "config.estimator='': must be one of approx_sign, aqe"),
    ("--cofig.seed=1", "there is no flag --cofig.seed; did you mean --config.seed?"),
    ("--configseed=1", "there is no flag --configseed; did you mean --config.seed?"),
    ("--config", "Missing value for flag --config"),
    ("--seed=1", "there is no flag --seed; did you mean --config.seed?"),
    ("--num_epochs=3", "there is no flag --num_epochs; did you mean --config.num_ep"),
    ("--num_epoch", "there is no flag --num_epoch; did you mean --config.num_epochs?"),
    ("--num_proceses=3", "there is no flag --num_proceses; did you mean "
     "--num_processes?"),
    ("--wrkdir=x", "there is no flag --wrkdir; did you mean --workdir?"),
    ("--verison", "there is no flag --verison; did you mean --version?"),
    ("-x", "there is no flag --x; see --help"),
    ("extra", "argument 'extra' is not a flag (flags are --name=value)"),
    ("größe", "argument 'größe' is not a flag (flags are --name=value)"),
    ("-", "argument '-' is not a flag (flags are --name=value)"),
    ("", "argument '' is not a flag (flags are --name=value)"),
    ("--verbosity=high", "verbosity='high': must be an integer"),
])
def test_overrides(refuses, override, message):
  refuses(message, "minw.main", f"--config={DIGITS}", "--workdir=new", override)


_HOSTILE = (
    "", "0", "-1", "2147483648", "4294967296", "9223372036854775808", "1" + "0" * 5000,
    "1e308", "-1e308", "5e-324", "nan", "inf", "-inf", "None", "True", "{}", "[]", "()",
    "(0,)", "(-1,)", "(9223372036854775808,)", "(1e308,)", "(nan,)", "([[[[1]]]],)",
    "((((" * 1000, "(1,)" * 1000, "a" * 10**5, "a/" * 10**4, "a\0b", "a\nb", "\x1b[31m",
    "~nobody/x", "$NONE", "*" * 100, "%s%n{}", "/dev/zero", "/proc/self/mem",
    "__import__('os').abort()")


@pytest.mark.slow
def test_hostile_values_end_in_a_line(run, tmp_path):
  """MINW_CONFIG_VALUES=N tries N fields with a value each, =all all with all."""
  pairs = [(name, value) for name in config_lib.default_config() for value in _HOSTILE]
  count = os.environ.get("MINW_CONFIG_VALUES", "60")
  if count != "all":
    pairs = random.Random(0).sample(pairs, int(count))
  bad, codes = [], collections.Counter()
  for i, (name, value) in enumerate(pairs):
    code, out, err = run(
        "minw.main", f"--config={DIGITS}", f"--workdir={tmp_path / str(i)}",
        f"--config.{name}={value}", seconds=60)
    codes[code] += 1
    lines = err.splitlines()
    if not (code == TRAINING or (
        code == 2 and len(lines) == 1 and lines[0].startswith("error: ") and not out)):
      bad.append((name, value[:50], code, err[-500:]))
  print(f"{len(pairs)} values, codes {dict(codes)}", *bad, sep="\n")
  assert not bad


def test_values_apart_from_their_flags(refuses):
  refuses("config.seed='x': must be of type int", "minw.main", "--config", DIGITS,
          "--workdir", "new", "--config.seed", "x")
  refuses("config field 'lr' does not exist", "minw.main", "--config", DIGITS,
          "--workdir", "new", "--config.lr", "1")
  refuses("Missing value for flag --workdir", "minw.main", "--config", DIGITS,
          "--workdir")


PLACE = ("--coordinator=localhost:1234", "--num_processes=2", "--process_id=1")


@pytest.mark.parametrize("argv, message", [
    (PLACE, "coordinator='localhost:1234': must be left out without --distributed"),
    (PLACE[1:2], "num_processes=2: must be left out without --distributed"),
    (("--heartbeat_timeout=9",), "heartbeat_timeout=9: must be left out without "),
    (("--distributed", *PLACE[:2]), "--coordinator goes with --process_id"),
    (("--distributed", PLACE[2]),
     "--process_id goes with --coordinator and --num_processes"),
    (("--distributed", *PLACE[1:], "--coordinator=localhost"),
     "coordinator='localhost': must be HOST:PORT"),
    (("--distributed", *PLACE[1:], "--coordinator=localhost:0"), "coordinator='loc"),
    (("--distributed", *PLACE[1:], "--coordinator=:99"), "coordinator=':99': must be "),
    (("--distributed", *PLACE[:2], "--process_id=2"),
     "process_id=2: must be less than num_processes=2"),
    (("--distributed", *PLACE[:2], "--process_id=-1"), "process_id='-1': must be a "),
    (("--distributed", *PLACE[::2], "--num_processes=0"), "num_processes='0': must "),
    (("--distributed", "--heartbeat_timeout=0"), "heartbeat_timeout='0': must "),
])
def test_processes_of_a_run(refuses, argv, message):
  refuses(message, "minw.main", f"--config={DIGITS}", "--workdir=new", *argv)


def test_required_flags(refuses):
  refuses("--config and --workdir are required\n", "minw.main")
  refuses("--config is required\n", "minw.main", "--workdir=new")
  refuses("--workdir is required\n", "minw.main", f"--config={DIGITS}")
  refuses("--images is required\n", "minw.infer", "--model=digits_convnet")
  refuses("--runs is required\n", "minw.report", "tables")


def test_a_workdir_that_is_empty_text(refuses):
  refuses("workdir='': must be not empty", "minw.main", f"--config={DIGITS}",
          "--workdir=")


# The network has no hidden layers: otherwise the last check takes seconds.
FAST = ("--config.conv_widths=()", "--config.dense_widths=()")


def test_a_workdir_below_a_file(refuses):
  refuses("workdir='file/below' cannot be written to: ", "minw.main",
          f"--config={DIGITS}", *FAST, "--workdir=file/below")


def test_a_workdir_whose_config_is_cut_off(refuses):
  refuses("...config.json is damaged: ", "minw.main", f"--config={DIGITS}", *FAST,
          "--workdir=cut_off")


def tiny_config(**changes):
  c = config_lib.default_config()
  c.update(dataset="digits", crop_size=8, conv_widths=(), dense_widths=())
  c.update(changes)
  return c


@pytest.mark.parametrize("workdir, message", [
    ("file", "workdir='file' cannot be written to: "),
    ("no_json", "...config.json is damaged: "),
    ("null", "...config.json is damaged: "),
    ("misspelt", "...config field 'sed' does not exist; did you mean 'seed'?"),
    ("other_type", "...config.seed='a': must be of type int"),
    ("bad_value", "workdir='bad_value' holds a run of another config (field: there, "
     "here): conv_widths: (64, 64, 128, 128, 256, 256), (); crop_size: 24, 8; "
     "dataset: 'cifar10', 'digits'; dense_widths: (256, 256), (); seed: -1, 0"),
])
def test_workdirs(folder, monkeypatch, workdir, message):
  monkeypatch.chdir(folder)
  monkeypatch.setattr(train_step, "make_train_step", None)
  with pytest.raises(errors.UsageError) as error:
    train.train_and_evaluate(tiny_config(), workdir)
  assert begins(str(error.value), message)


@pytest.mark.parametrize("changes, message", [
    ({"dataset": "cifar10", "data_dir": "nowhere"},
     "data_dir='nowhere': must be a directory that holds cifar10, which this command "
     "prepares: python -m minw.prepare --dataset=cifar10 --data_dir=nowhere"),
    ({"dataset": "cifar100", "data_dir": ""}, "data_dir='': must be a directory that "),
    ({"init_from": "nowhere"}, "'nowhere': must be the workdir of a run"),
    ({"init_from": "file"}, "'file': must be the workdir of a run"),
    ({"init_from": "cut_off"}, "config.json is damaged: "),
    ({"init_from": "no_run"}, "'no_run': must be a run that has a checkpoint"),
])
def test_nothing_is_written_before_all_is_there(folder, monkeypatch, changes, message):
  monkeypatch.chdir(folder)
  monkeypatch.setattr(train_step, "make_train_step", None)
  with pytest.raises(errors.UsageError) as error:
    train.train_and_evaluate(tiny_config(**changes), "new")
  assert message in str(error.value)
  assert not pathlib.Path("new").exists()


def test_batches_that_devices_do_not_share(refuses):
  env = {"XLA_FLAGS": "--xla_force_host_platform_device_count=3",
         "JAX_PLATFORMS": "cpu"}
  for field, value in (("batch_size", 64), ("eval_batch_size", 361)):
    refuses(f"config.{field}={value}: must be a multiple of 3, the number of devices",
            "minw.main", f"--config={DIGITS}", "--config.eval_batch_size=360",
            "--config.batch_size=66", f"--config.{field}={value}", "--workdir=new",
            env=env)


def test_good_input_is_not_refused(run, folder):
  result = run("minw.main", f"--config={DIGITS}", *FAST, "--noconfig.random_flip",
               "--config.input_bits=bfloat16", "--config.weight_bits=3",
               "--config.seed", "3", "--config.data_dir=", "--workdir=größe")
  assert result.code == TRAINING
  written = json.loads((folder / "größe" / "config.json").read_text())
  assert written["input_bits"] == "bfloat16" and written["weight_bits"] == 3
  assert written["conv_widths"] == [] and written["random_flip"] is False
  assert written["seed"] == 3 and written["data_dir"] == ""


@pytest.mark.parametrize("argv, message", [
    ((), "one of --workdir and --model must be given, not both"),
    (("--workdir=",), "workdir='': must be not empty"),
    (("--workdir=nowhere",), "workdir='nowhere': must be the workdir of a run "),
    (("--workdir=größe?",), "workdir='größe?': must be the workdir of a run "),
    (("--workdir=file",), "workdir='file': must be the workdir of a run "),
    (("--workdir=empty",), "workdir='empty': must be the workdir of a run "),
    (("--workdir=no_json",), "...config.json is damaged: "),
    (("--workdir=cut_off",), "...config.json is damaged: "),
    (("--workdir=null",), "...config.json is damaged: "),
    (("--workdir=other_type",), "...config.seed='a': must be of type int"),
    (("--workdir=misspelt",), "...config field 'sed' does not exist; did you mean"),
    (("--workdir=no_run",), "workdir='no_run': must be a run that has a checkpoint"),
    (("--workdir=no_run", "--split=tset"), "flag --split=tset: value should be one "),
    (("--workdir=nowhere", "--split=all"), "flag --split=all: value should be one of"),
    (("--workdir=no_run", "--checkpoint="), "flag --checkpoint=: value should be one "),
    (("--workdir=no_run", "--data_dir="), "data_dir='': must be not empty"),
    (("--workdir=no_run", "--config.seed=1"), "there is no flag --config.seed"),
    (("--workdir=no_run", "x"), "argument 'x' is not a flag"),
    (("no_run",), "argument 'no_run' is not a flag"),
])
def test_evaluate(refuses, argv, message):
  refuses(message, "minw.evaluate", *argv)


@pytest.mark.parametrize("argv, message", [
    ((), "--data_dir and --dataset are required\n"),
    (("--dataset=cifar10",), "--data_dir is required\n"),
    (("--dataset=cifar10", "--data_dir="), "data_dir='': must be not empty"),
    (("--dataset=cifar1", "--data_dir=x"), "dataset 'cifar1' does not exist; did you "),
    (("--dataset=digits", "--data_dir=x"), "dataset='digits': must be one of cifar"),
    (("--dataset=cifar10", "--data_dir=file"), "data_dir='file': must be a directory "),
    (("--dataset=cifar10", "--data_dir=x", "--source="), "source='': must be not "),
    (("--dataset=cifar10", "--datadir=x"), "there is no flag --datadir; did you mean "),
    (("--dataset=cifar10", "--config.seed=1"), "there is no flag --config.seed"),
    (("--dataset=cifar10", "--data_dir=x", "y"), "argument 'y' is not a flag"),
])
def test_prepare(refuses, argv, message):
  refuses(message, "minw.prepare", *argv)


@pytest.mark.parametrize("module, subcommand", [
    ("minw.summary", ()), ("minw.bench", ("train",))])
@pytest.mark.parametrize("argv, message", [
    (("--config=nothing.py",), f"config='nothing.py': {FILE} (FileNotFoundError: "),
    (("--config=nothing.py", "--config.seed=1"), f"config='nothing.py': {FILE} ("),
    (("--config=value_error.py",), f"config='value_error.py': {FILE} (ValueError: "),
    (("--config=good.py", "--config.sed=1"), "config field 'sed' does not exist; did "),
    (("--config=good.py", "--config.seed=x"), "config.seed='x': must be of type int"),
    (("--config=good.py", "--config.seed=-1"), "config.seed=-1: must be in [0, 2^32)"),
    (("--config=unknown_field.py",), "config field 'learning_rte' does not exist; did"),
    (("--config=good.py", "--bogus"), "there is no flag --bogus; see --help"),
    (("--config=good.py", "x"), "argument 'x' is not a flag"),
])
def test_summary_and_bench(refuses, module, subcommand, argv, message):
  refuses(message, module, *subcommand, *argv)


@pytest.mark.slow  # The other tests fork commands.
def test_without_a_fork():
  """As users start them, both at once."""
  commands = {
      ("minw.main", f"--config={DIGITS}", "--workdir=x", "--config.lr=1"):
          "config field 'lr' does not exist; ",
      ("minw.evaluate", "--workdir=nowhere"): "workdir='nowhere': must be the workdir "}
  running = [subprocess.Popen([sys.executable, "-m", *argv], cwd=ROOT, text=True,
                              stdout=subprocess.PIPE, stderr=subprocess.PIPE)
             for argv in commands]
  for process, message in zip(running, commands.values()):
    out, err = process.communicate()
    assert process.returncode == 2 and out == "" and err.count("\n") == 1
    assert err.startswith(f"error: {message}")
  assert not (ROOT / "x").exists()


_COMMAND = """
from absl import flags
from minw import cli, errors
def define_flags(subcommand=""):
  flags.DEFINE_string("name", None, "", required={required})
def main():
  {main}
cli.run({run}, define_flags)
"""


@pytest.mark.parametrize("main, code, out, err", [
    ("print(flags.FLAGS.name)", 0, "x\n", ""),
    ("return 75", 75, "", ""),
    ("raise errors.UsageError('one\\n  two')", 2, "", "error: one two\n"),
    ("errors.check(False, 'a', [1], 'two')", 2, "", "error: a=[1]: must be two\n"),
    ("errors.check(False, 'a', 'b' * 10**6, 'two')", 2, "",
     f"error: a='{299 * 'b'}...: must be two\n"),
    ("raise OSError(28, 'No space', '/a/b')", 74, "", "error: /a/b: No space\n"),
    ("errors.check(True, 'a', [1], 'two')", 0, "", ""),
])
def test_run(run, main, code, out, err):
  program = _COMMAND.format(required=True, main=main, run="main")
  assert run("command", "--name=x", code=program) == (code, out, err)
  assert run("command", "--name=x", "--verbosity=-1", code=program)[0] == code


@pytest.mark.parametrize("error, code, last", [
    ("errors.UsageError('x')", 2, "error: x"),
    ("KeyboardInterrupt", 130, "interrupted"),
    ("OSError(5, 'Broken', '/a')", 74, "error: /a: Broken"), ("ValueError(3)", 1,
                                                          "ValueError: 3")])
def test_an_error_does_not_wait_for_threads(error, code, last):
  main = ("import threading, time; print('printed');"
          f" threading.Thread(target=time.sleep, args=(600,)).start(); raise {error}")
  program = _COMMAND.format(required=False, main=main, run="main")
  done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, text=True,
                        capture_output=True, timeout=60)
  assert (done.returncode, done.stdout) == (code, "printed\n")
  assert done.stderr.splitlines()[-1] == last
  assert (done.stderr == f"{last}\n") == (code != 1)


@pytest.mark.parametrize("main, code, err", [
    ("raise KeyboardInterrupt", 130, "interrupted\n"),
    ("os.kill(os.getpid(), signal.SIGINT); return 0", 130, "interrupted\n"),
])
def test_interrupt(run, main, code, err):
  program = "import os, signal\n" + _COMMAND.format(required=False, main=main,
                                                    run="main")
  assert run("command", code=program) == (code, "", err)


def test_interrupt_of_a_command_that_starts():
  """It takes seconds to import what a command needs."""
  command = subprocess.Popen(
      [sys.executable, "-X", "importtime", "-m", "minw.evaluate", "--workdir=nowhere"],
      cwd=ROOT, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
  lines = []
  with command:
    for line in command.stderr:
      lines.append(line)
      if line.endswith(" minw\n"):
        command.send_signal(signal.SIGINT)
  assert command.returncode == -signal.SIGINT
  assert all(line.startswith("import time:") for line in lines)


# Standard output is a pipe whose reader has gone, as that of `| head` does.
_PIPE = """
import os, sys
read, write = os.pipe()
os.close(read)
os.dup2(write, 1)
sys.stdout = open(1, "w", closefd=False)
"""


@pytest.mark.parametrize("main", [
    "print('x')", "print('x', flush=True)", "print('x' * 10**6)",
    "print(1); sys.exit(0)"
])
def test_output_that_no_one_reads(run, main):
  program = _PIPE + _COMMAND.format(required=False, main=main, run="main")
  assert run("command", code=program) == (141, "", "")


def test_other_broken_pipes_are_errors(run):
  program = _COMMAND.format(
      required=False, main="raise BrokenPipeError('a worker')", run="main")
  result = run("command", code=program)
  assert result.code == 1 and result.err.endswith("BrokenPipeError: a worker\n")


def test_errors_of_ours_keep_their_traceback(run):
  program = _COMMAND.format(
      required=False, main="raise ValueError('a bug')", run="main")
  result = run("command", code=program)
  assert result.code == 1 and result.err.startswith("Traceback (most recent call last)")
  assert result.err.endswith("ValueError: a bug\n")


def test_verbosity_shows_where_a_usage_error_is_from(run):
  program = _COMMAND.format(
      required=False, main="raise errors.UsageError('x')", run="main")
  result = run("command", "--verbosity=1", code=program)
  assert result.code == 1 and "Traceback" in result.err
  result = run("minw.main", "--verbosity=1", "--config=key_error.py", "--workdir=new")
  assert result.code == 1 and "return {}['a']" in result.err


def test_subcommands(run, refuses):
  program = _COMMAND.format(
      required=False, main="return 5",
      run="{'train': main, 'test': lambda: print(flags.FLAGS.name)}")
  assert run("command", "train", code=program) == (5, "", "")
  assert run("command", "--name=x", "test", code=program) == (0, "x\n", "")
  for argv, message in (((), "a subcommand is missing; known: train, test"),
                        (("tran",), "subcommand 'tran' does not exist; did you mean "),
                        (("train", "test"), "argument 'test' is not a flag"),
                        (("train", "--name"), "Missing value for flag --name"),
                        (("train", "--name="), "name='': must be not empty")):
    refuses(message, "command", *argv, code=program)


# --- Flags whose values are paths.

COMMANDS = {f"minw {name}": module for name, module in minw_command.COMMANDS.items()}
LAUNCHERS = {f"launch/{name}.py": name for name in (
    "local_multiprocess", "sweep")}
# Flags of type string that are no paths. A new flag that is one is a `cli.DEFINE_path`.
TEXTS = {"profile", "dataset", "layer", "coordinator", "module", "background", "prefix",
         "image_size", "budget_flash", "budget_ram"}
# Experiment files with arguments: `config_flag.load` expands them.
FILES_WITH_ARGUMENTS = {"config", "configs"}
PATHS = sorted({  # (command, subcommand, flag)
    ("minw train", "", "workdir"), ("minw train", "", "compilation_cache_dir"),
    ("minw evaluate", "", "workdir"),
    ("minw evaluate", "", "model"), ("minw evaluate", "", "data_dir"),
    ("minw evaluate", "", "confusion"), ("minw evaluate", "", "images"),
    ("minw pack", "", "workdir"), ("minw pack", "", "out"),
    ("minw pack", "", "data_dir"),
    ("minw infer", "", "model"), ("minw infer", "", "images"),
    ("minw export", "", "workdir"), ("minw export", "", "model"),
    ("minw export", "", "out"), ("minw export", "", "golden"),
    ("minw export", "", "images"), ("minw prepare", "", "data_dir"),
    ("minw prepare", "", "source"), ("minw plots", "", "out"),
    ("minw search", "", "dir"),
    ("minw summary", "", "out"),
    *(("minw report", name, flag) for flag in ("runs", "out")
      for name in ("tables", "figures", "compare", "collect", "results")),
    ("minw bench", "train", "trace"),
    *(("minw bench", name, "json")
      for name in ("train", "inference", "web", "data", "scaling", "configs",
                   "throughput")),
    ("minw bench", "web", "modules"),
    *(("launch/sweep.py", "", flag) for flag in ("sweep", "dir", "data_dir", "out"))})


def definers():
  """(command, subcommand, a function that defines its flags) of all commands."""
  for command, name in {**COMMANDS, **LAUNCHERS}.items():
    module = importlib.import_module(name)
    for arguments in [[name] for name in getattr(module, "SUBCOMMANDS", ())] or [[]]:
      yield (command, "".join(arguments),
             functools.partial(module.define_flags, *arguments))


@pytest.fixture
def launchers(monkeypatch):
  monkeypatch.syspath_prepend(str(ROOT / "launch"))
  monkeypatch.setattr(sys, "argv", ["command"])


def test_all_flags_that_are_paths_are_path_flags(launchers):
  found = set()
  for command, subcommand, define in definers():
    with cli.defined(define) as own:
      for flag in own:
        kind = flag.flag_type()
        if kind in ("path", "paths"):
          found.add((command, subcommand, flag.name))
        elif "string" in kind and "enum" not in kind:
          assert flag.name in TEXTS | FILES_WITH_ARGUMENTS or (
              kind == "comma separated list of strings"), (command, flag.name)
  assert PATHS == sorted(found | set(PATHS)) and found >= set(PATHS)


@pytest.mark.parametrize("text, value", [
    ("~/run", "{home}/run"), ("$PLACE/run", "{home}/in it/run"),
    ("${PLACE}/größe/", "{home}/in it/größe/"), ("a b/c", "a b/c"), ("./x/", "./x/"),
    ("../größe", "../größe"), ("/a/b", "/a/b"), ("x[1]*", "x[1]*")])
def test_what_path_flags_expand(launchers, monkeypatch, tmp_path, text, value):
  monkeypatch.setenv("HOME", str(tmp_path))
  monkeypatch.setenv("PLACE", f"{tmp_path}/in it")
  for _, _, define in definers():
    with cli.defined(define) as own:
      for flag in own:
        if flag.flag_type() in ("path", "paths"):
          expected = value.format(home=tmp_path)
          flag.parse(text)
          assert flag.value in (expected, [expected])


def test_home_and_variables_in_real_commands(run, folder, tmp_path):
  env = {"HOME": str(tmp_path), "RUNS": str(tmp_path / "my runs")}
  (tmp_path / "x.py").write_text(FILES["good.py"])
  (tmp_path / "sweep.py").write_text(
      "def get_runs():\n  yield 'a', '~/x.py', {'init_from': '$RUNS/a'}\n")
  before = sorted(folder.rglob("*"))
  result = run("minw.main", "--config=~/x.py", *FAST, "--workdir=$RUNS/größe/", env=env)
  assert result.code == TRAINING
  assert (tmp_path / "my runs" / "größe" / "config.json").exists()
  assert run("minw.summary", "--config=$HOME/x.py", env=env).code == 0
  result = run("minw.plots", "--out=~/a picture.png", env=env)
  assert result == (0, "", "") and (tmp_path / "a picture.png").exists()
  result = run("minw.export", "--model=digits_convnet", "--format=c", "--out=~/net.c",
               env=env)
  assert result.code == 0 and (tmp_path / "net.c").exists()
  result = run("minw.evaluate", "--workdir=~/none", env=env)
  assert result.err.startswith(f"error: workdir='{tmp_path}/none': must be")
  result = run("minw.main", f"--config={DIGITS}", *FAST, "--workdir=$NONE/run", env=env)
  assert result.code == 2 and result.err == (
      "error: flag --workdir=$NONE/run: the environment variable 'NONE' is not set\n")
  result = run("minw.main", f"--config={DIGITS}", "--config.data_dir=$NONE", *FAST,
               "--workdir=x", env=env)
  assert result.code == 2 and result.err == (
      "error: config.data_dir='$NONE': the environment variable 'NONE' is not set\n")
  result = run("minw.main", f"--config={DIGITS}", "--config.init_from=~/none", *FAST,
               "--workdir=x", env=env)
  assert result.code == 2 and f"workdir='{tmp_path}/none'" in result.err
  assert sorted(folder.rglob("*")) == before  # And no folder named ~.


@pytest.mark.parametrize("url", ["gs://bucket/run", "s3://bucket/run"])
def test_a_url_makes_no_folder(run, folder, tmp_path, monkeypatch, url):
  monkeypatch.chdir(tmp_path)
  before = sorted(folder.rglob("*"))
  code = ("import runpy, sys\nfrom minw import dependencies\n"
          "dependencies.installed = lambda package: package != 'gcsfs'\n"
          "sys.modules.pop(sys.argv[0], None)\n"
          "runpy.run_module(sys.argv[0], run_name='__main__', alter_sys=True)")
  for argv in (("minw.main", f"--config={DIGITS}", *FAST, f"--workdir={url}"),
               ("minw.main", f"--config={DIGITS}", *FAST, "--workdir=x",
                f"--config.init_from={url}"),
               ("minw.main", f"--config={DIGITS}", *FAST, "--workdir=x",
                f"--config.data_dir={url}"),
               ("minw.prepare", "--dataset=cifar10", f"--data_dir={url}"),
               ("minw.pack", "--workdir=x", f"--out={url}"),
               ("minw.evaluate", f"--workdir={url}"), ("minw.report", "tables", url)):
    result = run(*argv, code=code)
    assert result.code == 2 and result.err.count("\n") == 1 and url in result.err
    allowed = url.startswith("gs") and argv[0] not in ("minw.pack", "minw.prepare")
    assert allowed == ("pip install 'minw[gcs]'" in result.err)
  monkeypatch.setattr(dependencies, "installed", lambda package: package != "gcsfs")
  with pytest.raises(errors.UsageError, match=url):
    train.train_and_evaluate(config_lib.default_config(), url)
  assert not list(tmp_path.iterdir()) and sorted(folder.rglob("*")) == before


def test_images_by_name_position_and_wildcard(run, tmp_path):
  names = ["a.png", "b,c.png", "größe 1.png", "-x.png"]
  for name in names:
    Image.new("L", (8, 8), 200).save(tmp_path / name)
  env = {"HOME": str(tmp_path)}
  model = "--model=digits_convnet"

  def files(*argv):
    result = run("minw.infer", model, "--quiet", *argv, env=env)
    assert result.code == 0 and result.err == ""
    lines = result.out.splitlines()
    return [line.split("\t")[0].removeprefix(f"{tmp_path}/") for line in lines]

  assert files("--images=~/a.png,~/größe 1.png") == ["a.png", "größe 1.png"]
  assert files("--images=~/b,c.png") == ["b,c.png"]
  assert files("--images=~/a.png", "--images=~/b,c.png") == ["a.png", "b,c.png"]
  assert files("--images=~/*.png") == sorted(names)
  assert files("~/a.png", f"{tmp_path}/b,c.png") == ["a.png", "b,c.png"]
  assert files("--images=~/a.png", "~/[bg]*.png") == ["a.png", "b,c.png", "größe 1.png"]
  assert files("~/") == sorted(names)
  result = run("minw.infer", model, "--", "-x.png", env=env)
  assert result.code == 2 and "'-x.png'" in result.err  # A file; not in this folder.


# --- Help, version, quiet, completion, and the command `minw`.


def test_help_lists_all_flags_with_their_defaults(run, launchers):
  for command, subcommand, define in definers():
    if command.startswith("launch"):
      continue
    argv = [*command.split()[1:], *filter(None, [subcommand]), "--help"]
    result = run("minw", *argv)
    assert result.code == 0 and result.err == ""
    with cli.defined(define) as own:
      for flag in own:
        assert f"  --{flag.name}=" in result.out or flag.boolean and (
            f"  --{flag.name}\n" in result.out or f"--[no]{flag.name}\n" in result.out)
    module = importlib.import_module(COMMANDS[command])
    described = module.SUBCOMMANDS[subcommand] if subcommand else module
    assert result.out.startswith(f"usage: {' '.join(['minw', *argv[:-1]])} ")
    assert inspect.getdoc(described) in result.out and str(ROOT) not in result.out
    for common in ("-h, --help", "--version", "-q, --quiet", "Exit codes: 0, success"):
      assert common in result.out
    if f"--config={'FILE'}" in result.out:
      for name, value in config_lib.default_config().items():
        assert f"\n  {name} = {value!r}\n" in result.out


@pytest.mark.parametrize("argv", [
    ("minw.main", "-h"), ("minw.main", "--bogus", "--help"), ("minw.report", "-h"),
    ("minw.report", "tables", "-h"), ("minw", "-h"), ("minw", "help", "train"),
    ("minw",), ("minw", "completion", "--help"), ("minw", "help", "completion"),
    ("minw.infer", "--help", "--model=x")])
def test_help_needs_nothing_else(run, argv):
  result = run(*argv)
  assert result.code == 0 and result.err == "" and result.out.startswith("usage: ")


@pytest.mark.parametrize("argv", [(), ("report",), ("bench",)])
def test_help_lists_commands_in_the_imperative(run, argv):
  """The lists of commands and of subcommands read alike."""
  listed = re.findall(r"^  (\w+) +(\w+) .*\.$", run("minw", *argv, "--help").out,
                      re.MULTILINE)
  modules = [minw_command.COMMANDS[name] for name in argv]
  names = [*importlib.import_module(modules[0]).SUBCOMMANDS] if argv else [
      *minw_command.COMMANDS, "completion"]
  assert [name for name, _ in listed] == names
  assert {verb for _, verb in listed} <= {
      "Add", "Compare", "Describe", "Draw", "Estimate", "Evaluate", "Export", "Measure",
      "Pack", "Prepare", "Print", "Run", "Time", "Train", "Write"}


def test_all_help_is_sentences(launchers):
  for _, _, define in definers():
    with cli.defined(define) as own:
      for flag in own:
        text = usage.sentence(flag)
        assert text[0].isupper() and text.endswith(".") or text.startswith("HOST"), text
        assert not text.startswith(("Of ", "What ", "Whose ", "Where "))
  for section in config_lib.FIELDS.values():
    assert all(text.endswith((".", "...")) for _, text in section.values())


def test_version(run):
  for argv in (("minw", "--version"), ("minw.infer", "--version"),
               ("minw.main", "--version", "--workdir=x")):
    assert run(*argv) == (0, f"minw {minw.__version__}\n", "")


def test_minw_runs_commands(run):
  listed = run("minw").out
  for name in minw_command.COMMANDS:
    assert f"\n  {name} " in listed
    assert run("minw", name, "--bogus").err.startswith("error: ")
  assert run("minw", "summary", f"--config={DIGITS}") == run(
      "minw.summary", f"--config={DIGITS}")
  assert run("minw", "trian").err == (
      "error: command 'trian' does not exist; did you mean 'train'?\n")
  assert run("minw", "report", "tabels").err == (
      "error: subcommand 'tabels' does not exist; did you mean 'tables'?\n")
  assert run("minw", "--workdir=x").code == 2


def test_console_command_is_installed():
  metadata = configparser.ConfigParser()
  metadata.read(ROOT / "setup.cfg")
  assert "minw = minw.__main__:main" in metadata[
      "options.entry_points"]["console_scripts"].split("\n")


def test_quiet(run, folder):
  """As where no compiler was found, of which a warning tells."""
  Image.new("L", (8, 8)).save(folder / "quiet.png")
  code = ("from minw import __main__\nfrom minw.kernels import native\n"
          "native.available = lambda: False\n__main__.main()")
  argv = ("minw", "infer", "--model=digits_convnet", "--images=quiet.png")
  loud, silent = run(*argv, code=code), run(*argv, "--quiet", code=code)
  assert "the native library was not built" in loud.err
  assert silent == (0, loud.out, "") and "quiet.png" in silent.out
  (folder / "quiet.png").unlink()


@pytest.mark.parametrize("argv, lines", [((), 1), (("--quiet",), 0),
                                         (("--verbosity=-1",), 0)])
def test_progress_of_training_can_be_silenced(run, argv, lines):
  code = ("import runpy\nfrom minw import train\nimport logging\n"
          "def trained(config, workdir, *options):\n"
          "  logging.getLogger('minw.train').info('progress')\n"
          "  return {'state': 'done', 'step': 3, 'test_accuracy': 0.5}\n"
          "train.train_and_evaluate = trained\n"
          "runpy.run_module('minw.main', run_name='__main__', alter_sys=True)")
  result = run("minw.main", f"--config={DIGITS}", "--workdir=~", *argv, code=code,
               env={"HOME": "/home/ada"})
  assert result.code == 0 and result.err.count("progress") == lines
  assert json.loads(result.out) == {"workdir": "/home/ada", "state": "done", "step": 3,
                                    "test_accuracy": 0.5}


def complete(script, *line):
  """What bash offers for the last word of a command line."""
  program = (f"{script}\nCOMP_WORDS=({shlex.join(line)}); COMP_CWORD={len(line) - 1}\n"
             "_minw\nprintf '%s\\n' \"${COMPREPLY[@]}\"")
  done = subprocess.run(["bash", "-c", program], capture_output=True, text=True,
                        check=True)
  return done.stdout.split()


def test_completion(run, launchers):
  result = run("minw", "completion", "bash")
  assert result.code == 0 and result.err == ""
  assert complete(result.out, "minw", "p") == ["pack", "prepare", "plots"]
  assert complete(result.out, "minw", "pack", "--w") == ["--workdir="]
  assert complete(result.out, "minw", "pack", "--v") == ["--verify"]
  assert complete(result.out, "minw", "report", "c") == ["compare", "collect"]
  assert complete(result.out, "minw", "train",
                  "--config.num") == ["--config.num_epochs="]
  zsh = run("minw", "completion", "zsh").out
  assert zsh.endswith(result.out) and zsh.startswith("autoload -U +X bashcompinit")
  for argv in ((), ("fish",), ("bash", "zsh")):
    refused = run("minw", "completion", *argv)
    assert refused.code == 2 and "bash or zsh" in refused.err


def test_unknown_name_suggests():
  known = ["seed", "learning_rate", "alpha_start"]
  assert str(errors.unknown_name("field", "sead", known)) == (
      "field 'sead' does not exist; did you mean 'seed'?")
  assert str(errors.unknown_name("field", "q", known)) == (
      "field 'q' does not exist; known: alpha_start, learning_rate, seed")
