"""The errors that a user of minw can mend: bad input, named in one line."""

import difflib
from typing import Any, Collection

from minw import exit_codes

_LONGEST = 300  # Characters of a value in an error.


class UsageError(Exception):
  """The input of the user cannot be used; the message is one line for them.

  Attributes:
    exit_code: Exit code of a command that ends with this error.
  """

  exit_code = exit_codes.BAD_INPUT


def check(ok: bool, field: str, value: Any, allowed: str) -> None:
  """Raises `UsageError` naming the field, its value and what is allowed."""
  if not ok:
    raise bad_value(field, value, allowed)


def bad_value(field: str, value: Any, allowed: str) -> UsageError:
  """The error for `field` holding `value` where only `allowed` may stand."""
  return UsageError(f"{field}={shown(value)}: must be {allowed}")


def unknown_name(kind: str, name: str, known: Collection[str]) -> UsageError:
  """The error for a misspelt `name`, with the nearest known one."""
  near = difflib.get_close_matches(name, known, n=1)
  hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(sorted(known))}"
  return UsageError(f"{kind} {shown(name)} does not exist; {hint}")


def shown(value: Any) -> str:
  """`repr(value)`, or its beginning if it is too long for a line that people read."""
  try:
    whole = repr(value)
  except (RecursionError, ValueError):  # It is too deep, or a number too long.
    return "..."
  return whole if len(whole) <= _LONGEST else f"{whole[:_LONGEST]}..."
