"""The flag --config=NAME, with --config.FIELD=VALUE for any field.

NAME is an experiment that comes with minw, or the path of a Python file with a
`get_config`. NAME:ARGUMENT passes it an argument. Sweeps are named in the same way.
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

_HELP = ("Name of an experiment that comes with minw, or a Python file; NAME:ARGUMENT "
         "passes it an argument. --config.FIELD=VALUE overrides a field of its config; "
         "the fields are listed below.")


def _table() -> list[str]:
  """A line or two for each field of a config."""
  lines = ["Fields of --config, with the values that they have unless the file changes "
           "them:"]
  for section, fields in config_lib.FIELDS.items():
    lines += ["", section]
    for name, (default, text) in fields.items():
      lines += [f"  {name} = {default!r}",
                *textwrap.wrap(text, 88, initial_indent=6 * " ",
                               subsequent_indent=6 * " ")]
  return [*lines, ""]


def define(default: str | None = None) -> flags.FlagHolder:
  """Defines the flag for a command; its value is the config.

  Args:
    default: NAME or NAME:ARGUMENT where there is no --config, which is required if
      there is no default.
  """
  _check_arguments(sys.argv)  # Now, as a default is overridden when it is defined.
  holder = config_flags.DEFINE_config_file(
      "config", None, _HELP + "\n".join(["", *_table()]))
  flags.FLAGS["config"].parser = _ExperimentFile()
  if default is None:
    cli.require("config")
  else:
    flags.set_default(holder, default)  # Only now, for our parser to read it.
  return holder


def _check_arguments(argv: list[str]) -> None:
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
  """Where experiments are: in an installed package, or beside it in a clone."""
  package = pathlib.Path(__file__).parent
  installed = package / "experiments"
  return installed if installed.is_dir() else package.parent / "experiments"


def _files(folder: pathlib.Path) -> dict[str, pathlib.Path]:
  return {path.stem: path for path in sorted(folder.glob("[a-z]*.py"))}


def load(argument: str) -> Any:
  """The config of NAME or NAME:ARGUMENT, locked.

  Of what may be wrong with a file, the parser of ml_collections keeps some until the
  config is used, quotes some with its traceback, and lets the rest through.

  Raises:
    errors.UsageError: there is no such experiment, or it gives no config.
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
  """Calls a function of a Python file with what the command line says.

  Args:
    flag: that says it.
    argument: NAME or NAME:ARGUMENT.
    known: files by name; any other NAME is the path of a file.
    name: of the function; it gets ARGUMENT, if there is a colon.
    does: what it is to do.
    then: takes what it returns; of this the result is returned.

  Raises:
    errors.UsageError: by function or file; or whatever else they raise, as one.
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
  except Exception as error:  # The file's own, of whatever kind.
    raise errors.bad_value(
        flag, argument, f"a name or a Python file whose {name} {does} "
        f"({type(error).__name__}: {error})") from error


def _find(flag: str, name: str, known: Mapping[str, pathlib.Path]) -> str:
  """The path of the file that `name` names; a file of this name goes first."""
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
  """Makes NAME or NAME:ARGUMENT a config."""

  fields = tuple(config_lib.default_config())  # What may follow --config and a dot.

  def parse(self, argument: str) -> Any:
    return load(argument)

  def flag_type(self) -> str:
    return "config"
