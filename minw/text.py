"""Makes text from untrusted files printable: on one line, without control characters.

Labels, names of layers and names of files may come from anyone. Printed as they are,
they could move the cursor of a terminal, hide text or forge lines of output.
"""

from typing import Any

_LONGEST = 80  # Largest number of characters of a value in an error message.


def printable(text: str) -> str:
  r"""Returns the text with an escape for each character that is not printable.

  Line breaks, tabs, control characters, marks that reverse the direction of writing,
  and lone surrogates become escapes such as `\n`, `\x1b` and `\ud800`. A space stays a
  space.

  Args:
    text: Any text.

  Returns:
    The text on one line.
  """
  return "".join(c if c.isprintable() else c.encode("unicode_escape").decode()
                 for c in text)


def shortened(text: str) -> str:
  """Returns the text for an error message: printable, and truncated if it is long."""
  return printable(text if len(text) <= _LONGEST else f"{text[:_LONGEST]}...")


def quoted(value: Any) -> str:
  """Returns `repr(value)` for an error message: printable, truncated if long."""
  if isinstance(value, (str, bytes)):
    value = value[:_LONGEST + 1]  # Texts in files may have megabytes.
  try:
    return shortened(repr(value))
  except (ValueError, RecursionError):  # It has too many digits or is nested too deep.
    return f"a value of type {type(value).__name__}"
