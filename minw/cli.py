"""What all commands share: absl flags, and one-line errors with exit code 2."""

import difflib
import faulthandler
import re
import sys
from typing import Any, Callable, Collection, Mapping, NoReturn

from absl import flags
from absl import logging

from minw import dependencies


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


def _parse(argv: list[str], own: Collection[str]) -> None:
  """Parses `argv`, the command's name and its flags; `own` are the names of these."""
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
  for name in own:
    check(flags.FLAGS[name].value != "", name, "", "not empty")
  if rest[1:]:
    raise UsageError(f"argument {rest[1]!r} is not a flag (flags are --name=value)")


def _take_subcommand(subcommands: Collection[str]) -> str:
  """Removes the first of `sys.argv` that is not a flag, and returns it."""
  names = [argument for argument in sys.argv[1:] if not argument.startswith("-")]
  if not names:
    raise UsageError(f"a subcommand is missing; known: {', '.join(subcommands)}")
  if names[0] not in subcommands:
    raise unknown_name("subcommand", names[0], subcommands)
  sys.argv.remove(names[0])
  return names[0]


def guarded(function: Callable, *arguments: Any) -> Any:
  """Calls `function`; a `UsageError` is printed as one line and exits with code 2."""
  try:
    return function(*arguments)
  except dependencies.MissingDependencies:
    print(f"error: this command {dependencies.NEED}", file=sys.stderr)
    sys.exit(2)
  except UsageError as error:
    if logging.get_verbosity() >= logging.DEBUG:
      raise
    print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
    sys.exit(2)


def run(
    main: Callable[[], int | None] | Mapping[str, Callable[[], int | None]],
    define_flags: Callable[..., None],
) -> NoReturn:
  """Runs a command: defines its flags, parses `sys.argv` and calls its `main`.

  A `UsageError`, from the flags or from `main`, is printed as one line and ends the
  process with code 2; any other exception keeps its traceback. `--verbosity=1` shows
  the tracebacks of usage errors too.

  Args:
    main: Function that does the work. Its result is the exit code, None being 0. A
      command with subcommands has a mapping from their names to such functions.
    define_flags: Function that defines the command's flags. It is called without
      arguments, or with the name of the subcommand if there are subcommands. Nothing
      is defined when a module is imported, because modules share names of flags.
  """
  faulthandler.enable()
  logging.use_absl_handler()
  sys.exit(guarded(_run, main, define_flags))


def _run(main, define_flags) -> int | None:
  others = set(flags.FLAGS)
  if isinstance(main, Mapping):
    name = _take_subcommand(main)
    main = main[name]
    define_flags(name)
  else:
    define_flags()
  _parse(sys.argv, set(flags.FLAGS) - others)
  if not flags.FLAGS["verbosity"].present:
    logging.set_verbosity(logging.WARNING)  # Libraries log much at INFO.
  return main()
