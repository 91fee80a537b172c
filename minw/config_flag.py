"""The flag --config=NAME, with --config.FIELD=VALUE for any field.

NAME is an experiment that comes with minw, or the path of a Python file that defines
`get_config`. NAME:ARGUMENT passes an argument to this function. Sweeps are named in the
same way.
"""

from importlib import machinery
import os
import pathlib
import re
import sys
import textwrap
import types
from typing import Any, Callable, Mapping

from absl import flags
from ml_collections import config_dict
from ml_collections import config_flags

from minw import cli
from minw import config as config_lib
from minw import errors
from minw import paths

_HELP = ("Name of an experiment that comes with minw ({}), or a Python file. "
         "NAME:ARGUMENT passes an argument to it. --config.FIELD=VALUE overrides a "
         "field of its config. The fields are listed below.")


def _table() -> list[str]:
  """Lines of help that describe each field of a config."""
  lines = ["Fields of --config, with their default values, which the file may change:"]
  for section, fields in config_lib.FIELDS.items():
    lines += ["", section]
    for name, (default, text) in fields.items():
      lines += [f"  {name} = {default!r}",
                *textwrap.wrap(text, 88, initial_indent=6 * " ",
                               subsequent_indent=6 * " ")]
  return [*lines, ""]


def define(default: str | None = None) -> flags.FlagHolder:
  """Defines the flag --config of a command. Its value is the config.

  Args:
    default: NAME or NAME:ARGUMENT that is used without --config. If None, --config is
      required.

  Returns:
    The holder of the flag.
  """
  # The arguments are checked first, because defining a default already applies the
  # overrides of its fields.
  _check_arguments(sys.argv)
  holder = config_flags.DEFINE_config_file(
      "config", None,
      "\n".join([_HELP.format(", ".join(experiments())), *_table()]))
  flags.FLAGS["config"].parser = _ExperimentFile()
  if default is None:
    cli.require("config")
  else:
    # The default is set last, so that the parser above reads it.
    flags.set_default(holder, default)
  return holder


def _check_arguments(argv: list[str]) -> None:
  """Raises `errors.UsageError` if --config.FIELD names a field that does not exist."""
  fields = config_lib.default_config().keys()
  try:
    arguments = flags.FLAGS.read_flags_from_files(argv[1:], force_gnu=False)
  except flags.Error as error:
    raise errors.UsageError(str(error)) from error
  for argument in arguments:
    match = re.match(r"--?(?:no)?config\.([^=]*)", argument)
    if match and match[1] not in fields:
      raise errors.unknown_name("config field", match[1], fields)


def experiments() -> dict[str, pathlib.Path]:
  """The experiment files that come with minw, by name."""
  return _files(_folder())


def sweeps() -> dict[str, pathlib.Path]:
  """The sweep files that come with minw, by name."""
  return _files(_folder() / "sweeps")


def _folder() -> pathlib.Path:
  """The folder of experiments, which is inside an installed package.

  In a clone of the repository it is beside the package.
  """
  package = pathlib.Path(__file__).parent
  installed = package / "experiments"
  return installed if installed.is_dir() else package.parent / "experiments"


def _files(folder: pathlib.Path) -> dict[str, pathlib.Path]:
  return {path.stem: path for path in sorted(folder.glob("[a-z]*.py"))}


def load(argument: str) -> Any:
  """Loads the config of NAME or NAME:ARGUMENT.

  The parser of ml_collections is not used for this. It reports some errors in a file
  only when the config is used, reports some with a traceback, and misses the others.

  Returns:
    The locked config.

  Raises:
    errors.UsageError: There is no such experiment, or it does not return a config.
  """
  def locked(config):
    if not isinstance(config, config_dict.ConfigDict):
      raise TypeError(f"it returned {type(config).__name__}")
    return config.lock()

  return call("config", argument, experiments(), "get_config", "returns a config",
              locked)


def call(
    flag: str,
    argument: str,
    known: Mapping[str, pathlib.Path],
    name: str,
    does: str,
    then: Callable,
) -> Any:
  """Calls a function of a Python file that the command line names.

  Args:
    flag: Name of the flag, for error messages.
    argument: NAME or NAME:ARGUMENT.
    known: Files by name. Any other NAME is the path of a file.
    name: Name of the function. It gets ARGUMENT if there is a colon.
    does: Phrase that says what the function does, for error messages: "returns a
      config".
    then: Function that is applied to the result of this function.

  Returns:
    The result of `then`.

  Raises:
    errors.UsageError: There is no such file, or its code, the function or `then` raised
      an error.
  """
  path, colon, text = argument.partition(":")
  try:
    path = _find(flag, path, known)
    loader = machinery.SourceFileLoader(path, path)
    module = types.ModuleType(loader.name)
    loader.exec_module(module)
    return then(getattr(module, name)(*([text] if colon else [])))
  except errors.UsageError:
    raise
  except Exception as error:  # The code of the file may raise any error.
    raise errors.bad_value(
        flag, argument, f"a name or a Python file whose {name} {does} "
        f"({type(error).__name__}: {error})") from error


def _find(flag: str, name: str, known: Mapping[str, pathlib.Path]) -> str:
  """The path of the file that `name` names.

  A file with the path `name` takes precedence over a known name.
  """
  name = paths.expand(name)
  if os.path.isfile(name):
    return name
  stem = pathlib.Path(name).stem
  if name and stem == name:
    if name not in known:
      raise errors.unknown_name(flag, name, known)
    return str(known[name])
  if stem in known and not os.path.exists(name):
    raise errors.UsageError(f"{flag}={name!r}: no such file here; did you mean"
                            f" --{flag}={stem}, which comes with minw?")
  return name


class _ExperimentFile(flags.ArgumentParser):
  """Parser that converts NAME or NAME:ARGUMENT to a config."""

  fields = tuple(config_lib.default_config())  # Names that may follow "--config.".

  def parse(self, argument: str) -> Any:
    return load(argument)

  def flag_type(self) -> str:
    return "config"
