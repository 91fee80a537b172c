"""The flag --config=FILE or FILE:ARGUMENT, with --config.FIELD=VALUE for any field."""

from importlib import machinery
import re
import sys
import types
from typing import Any, Callable

from absl import flags
from ml_collections import config_dict
from ml_collections import config_flags

from minw import cli
from minw import config as config_lib


def define(default: str | None = None) -> flags.FlagHolder:
  """Defines the flag for a command; its value is the config.

  Args:
    default: the file whose `get_config` counts where there is no --config, which is
      required if there is no default.
  """
  _check_arguments(sys.argv)  # Now, as a default is overridden when it is defined.
  holder = config_flags.DEFINE_config_file(
      "config", default, "Experiment file; --config.FIELD=VALUE overrides a field.")
  if default is None:
    flags.mark_flag_as_required("config")
  flags.FLAGS["config"].parser = _ExperimentFile()
  return holder


def _check_arguments(argv: list[str]) -> None:
  fields = config_lib.default_config().keys()
  try:
    arguments = flags.FLAGS.read_flags_from_files(argv[1:], force_gnu=False)
  except flags.Error as error:
    raise cli.UsageError(str(error)) from error
  for argument in arguments:
    match = re.match(r"--?(?:no)?config\.([^=]*)", argument)
    if match and match[1] not in fields:
      raise cli.unknown_name("config field", match[1], fields)


def load(argument: str) -> Any:
  """What the `get_config` of FILE or FILE:ARGUMENT returns, locked.

  Of what may be wrong with a file, the parser of ml_collections keeps some until the
  config is used, quotes some with its traceback, and lets the rest through.

  Raises:
    cli.UsageError: there is no such file, or it gives no config.
  """
  def locked(config):
    if not isinstance(config, config_dict.ConfigDict):
      raise TypeError(f"it returned {type(config).__name__}")
    return config.lock()

  return call("config", argument, "get_config", "returns a config", locked)


def call(flag: str, argument: str, name: str, does: str, then: Callable) -> Any:
  """Calls a function of a Python file with what the command line says.

  Args:
    flag: that says it.
    argument: FILE or FILE:ARGUMENT.
    name: of the function; it gets ARGUMENT, if there is a colon.
    does: what it is to do.
    then: takes what it returns; of this the result is returned.

  Raises:
    cli.UsageError: by function or file; or whatever else they raise, as one.
  """
  path, colon, text = argument.partition(":")
  loader = machinery.SourceFileLoader(path, path)
  module = types.ModuleType(loader.name)
  try:
    loader.exec_module(module)
    return then(getattr(module, name)(*([text] if colon else [])))
  except cli.UsageError:
    raise
  except Exception as error:  # The file's own, of whatever kind.
    raise cli.bad_value(
        flag, argument, f"FILE or FILE:ARGUMENT, of a Python file whose {name} {does} "
        f"({type(error).__name__}: {error})") from error


class _ExperimentFile(flags.ArgumentParser):
  """Makes FILE or FILE:ARGUMENT a config."""

  def parse(self, argument: str) -> Any:
    return load(argument)
