"""Errors that the user can fix: bad input, reported in one line."""

import difflib
from typing import Any, Collection

from minw import exit_codes

_LONGEST = 300  # Largest number of characters of a value in an error message.


class UsageError(Exception):
  """The user's input is not valid. The message is one line that explains it.

  Attributes:
    exit_code: Exit code of a command that ends with this error.
  """

  exit_code = exit_codes.BAD_INPUT


def check(ok: bool, field: str, value: Any, allowed: str) -> None:
  """Checks the value of a field.

  Args:
    ok: Whether the value is allowed.
    field: Name of the field.
    value: Value of the field.
    allowed: Description of the allowed values, which completes "must be ...".

  Raises:
    UsageError: `ok` is false.
  """
  if not ok:
    raise bad_value(field, value, allowed)


def bad_value(field: str, value: Any, allowed: str) -> UsageError:
  """Returns the error for a field whose value is not allowed; see `check`."""
  return UsageError(f"{field}={shown(value)}: must be {allowed}")


def unknown_name(kind: str, name: str, known: Collection[str]) -> UsageError:
  """Returns the error for an unknown name, with the most similar known one as a hint.

  Args:
    kind: Kind of thing that the name stands for, such as "command".
    name: The unknown name.
    known: All known names.
  """
  near = difflib.get_close_matches(name, known, n=1)
  hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(sorted(known))}"
  return UsageError(f"{kind} {shown(name)} does not exist; {hint}")


def shown(value: Any) -> str:
  """Returns `repr(value)`, truncated if it is too long for an error message."""
  try:
    whole = repr(value)
  except (RecursionError, ValueError):  # It is nested too deep, or has too many digits.
    return "..."
  return whole if len(whole) <= _LONGEST else f"{whole[:_LONGEST]}..."
