"""What all commands share: absl flags, and one-line errors with exit code 2."""

import difflib
import re
import sys
from typing import Any, Callable

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


def _parse(argv: list[str]) -> list[str]:
  from minw import config  # Only commands that have a --config need it.

  fields = config.default_config().keys()
  for argument in argv[1:]:
    match = re.match(r"--?(?:no)?config\.([^=.]+)", argument)
    if match and match[1] not in fields:
      raise unknown_name("config field", match[1], fields)
  try:
    rest = flags.FLAGS(argv)
  except UsageError:
    raise
  except (flags.Error, AttributeError, KeyError, TypeError, ValueError) as error:
    raise UsageError(str(error)) from error
  if len(rest) > 1:
    raise UsageError(f"argument {rest[1]!r} is not a flag (flags are --name=value)")
  return rest


def _guarded(function: Callable, *arguments: Any) -> Any:
  try:
    return function(*arguments)
  except UsageError as error:
    if logging.get_verbosity() >= logging.DEBUG:
      raise
    print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
    sys.exit(2)


def run(main: Callable[[], int | None]) -> None:
  """Runs a command's `main` under absl.

  A `UsageError`, from the flags or from `main`, is printed as one line and ends
  the process with code 2; any other exception keeps its traceback. What `main`
  returns is the exit code. `--verbosity=1` shows tracebacks of usage errors too.
  """
  def absl_main(_):
    if not flags.FLAGS["verbosity"].present:
      logging.set_verbosity(logging.WARNING)  # Libraries say a lot at INFO.
    return _guarded(main)

  app.run(absl_main, flags_parser=lambda argv: _guarded(_parse, argv))
