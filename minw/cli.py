"""What all commands share: absl flags, and one-line errors with exit code 2."""

import difflib
from importlib import machinery
import re
import sys
import types
from typing import Any, Callable, Collection, Mapping

from absl import app
from absl import flags
from absl import logging


class UsageError(Exception):
  """What the user gave can not be used; the message is one line for them."""


def bad_value(field: str, value: Any, allowed: str) -> UsageError:
  """The error for `field` holding `value` where only `allowed` may stand."""
  return UsageError(f"{field}={value!r}: must be {allowed}")


def check(ok: bool, field: str, value: Any, allowed: str) -> None:
  """Raises `UsageError` naming the field, its value and what is allowed."""
  if not ok:
    raise bad_value(field, value, allowed)


def unknown_name(kind: str, name: str, known) -> UsageError:
  """The error for a misspelt `name`, with the nearest known one."""
  near = difflib.get_close_matches(name, known, n=1)
  hint = f"did you mean {near[0]!r}?" if near else "known: " + ", ".join(
      sorted(known))
  return UsageError(f"{kind} {name!r} does not exist; {hint}")


def define_config(default: str) -> flags.FlagHolder:
  """Defines --config for a command that does without it.

  Args:
    default: the file whose `get_config` counts where there is no --config.
  """
  from ml_collections import config_flags

  _guarded(_check_config_fields, sys.argv)  # A default is overridden right here.
  return config_flags.DEFINE_config_file(
      "config", default, "Experiment file; --config.FIELD=VALUE overrides a field.")


def _check_config_fields(argv: list[str]) -> None:
  from minw import config  # Only commands that have a --config need it.

  fields = config.default_config().keys()
  for argument in argv[1:]:
    match = re.match(r"--?(?:no)?config\.([^=]*)", argument)
    if match and match[1] not in fields:
      raise unknown_name("config field", match[1], fields)


class _ExperimentFile(flags.ArgumentParser):
  """Makes FILE or FILE:ARGUMENT what the `get_config` of that file returns.

  Of what may be wrong with a file, the parser of ml_collections keeps some until the
  config is used, quotes some with its traceback, and lets the rest through.
  """

  def parse(self, argument: str) -> Any:
    from ml_collections import config_dict

    path, colon, text = argument.partition(":")
    loader = machinery.SourceFileLoader("config_config", path)
    module = types.ModuleType(loader.name)
    try:
      loader.exec_module(module)
      config = module.get_config(*([text] if colon else []))
      if not isinstance(config, config_dict.ConfigDict):
        raise TypeError(f"it returned {type(config).__name__}")
      return config.lock()
    except UsageError:
      raise
    except Exception as error:  # The file's own, of whatever kind.
      raise bad_value(
          "config", argument, "FILE or FILE:ARGUMENT, of a Python file whose "
          f"get_config returns a config ({type(error).__name__}: {error})") from error


def _illegal_value(message: str) -> UsageError:
  """absl's `message` about a value, in our words if it is that of a config field."""
  field = re.match(r"flag --config\.(\w+)=(.*?): ", message, re.DOTALL)
  if field is None:
    return UsageError(message)
  from minw import config

  name, value = field.groups()
  default = config.default_config()[name]
  return bad_value(f"config.{name}", value, f"of type {type(default).__name__}")


def _parse(argv: list[str], subcommands: Collection[str]) -> list[str]:
  if "config" in flags.FLAGS:
    _check_config_fields(argv)
    flags.FLAGS["config"].parser = _ExperimentFile()
  try:
    rest = flags.FLAGS(argv)
  except UsageError:
    raise
  except flags.IllegalFlagValueError as error:
    raise _illegal_value(str(error)) from error
  except (flags.Error, AttributeError, KeyError, TypeError, ValueError) as error:
    raise UsageError(str(error)) from error
  for flag in flags.FLAGS.get_key_flags_for_module(argv[0]):
    check(flag.value != "", flag.name, "", "not empty")
  if subcommands:
    if len(rest) < 2:
      raise UsageError(f"a subcommand is missing; known: {', '.join(subcommands)}")
    if rest[1] not in subcommands:
      raise unknown_name("subcommand", rest[1], subcommands)
  unexpected = rest[1 + bool(subcommands):]
  if unexpected:
    raise UsageError(
        f"argument {unexpected[0]!r} is not a flag (flags are --name=value)")
  return rest


def _guarded(function: Callable, *arguments: Any) -> Any:
  try:
    return function(*arguments)
  except UsageError as error:
    if logging.get_verbosity() >= logging.DEBUG:
      raise
    print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
    sys.exit(2)


def run(main: Callable[[], int | None] | Mapping[str, Callable]) -> None:
  """Runs a command's `main` under absl; of several, that of the subcommand given.

  A `UsageError`, from the flags or from `main`, is printed as one line and ends
  the process with code 2; any other exception keeps its traceback. What `main`
  returns is the exit code. `--verbosity=1` shows tracebacks of usage errors too.
  """
  mains = main if isinstance(main, Mapping) else {}

  def absl_main(argv):
    if not flags.FLAGS["verbosity"].present:
      logging.set_verbosity(logging.WARNING)  # Libraries say a lot at INFO.
    return _guarded(mains[argv[1]] if mains else main)

  app.run(absl_main, flags_parser=lambda argv: _guarded(_parse, argv, mains))
