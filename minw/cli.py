"""What all commands share: absl flags, and one-line errors with exit code 2."""

import difflib
import re
import sys
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


def _parse(argv: list[str], subcommands: Collection[str]) -> list[str]:
  try:
    rest = flags.FLAGS(argv)
  except flags.IllegalFlagValueError as error:
    # For a field of --config absl quotes what Python says of the conversion.
    override = re.match(r"flag --(\w+\.\w+)=(.*?): ", str(error), re.DOTALL)
    if override is None:
      raise UsageError(str(error)) from error
    name, value = override.groups()
    kind = flags.FLAGS[name].parser.flag_type()
    raise bad_value(name, value, f"of type {kind}") from error
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


def guarded(function: Callable, *arguments: Any) -> Any:
  """Calls `function`; a `UsageError` is printed as one line and exits with code 2."""
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
    return guarded(mains[argv[1]] if mains else main)

  app.run(absl_main, flags_parser=lambda argv: guarded(_parse, argv, mains))
