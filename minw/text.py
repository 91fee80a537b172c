"""Foreign text as people read it: on one line, and without control characters.

Labels, names of layers and names of files come from others. Printed as they are, they
could move the cursor of a terminal, hide text or add lines that nobody wrote.
"""

from typing import Any

_LONGEST = 80  # Characters of a value that an error message quotes.


def printable(text: str) -> str:
  r"""The text with an escape for each character that is not printable.

  Args:
    text: Any text.

  Returns:
    The text on one line, with escapes such as `\n`, `\x1b` and `\ud800`. Line breaks,
    tabs, control characters, marks that reverse the direction of writing and what no
    encoding can hold are escaped. A space is not.
  """
  return "".join(c if c.isprintable() else c.encode("unicode_escape").decode()
                 for c in text)


def shortened(text: str) -> str:
  """The text for an error message: printable, and cut if it is long."""
  return printable(text if len(text) <= _LONGEST else f"{text[:_LONGEST]}...")


def quoted(value: Any) -> str:
  """A value for an error message, as Python writes it: printable, and cut if long."""
  if isinstance(value, (str, bytes)):
    value = value[:_LONGEST + 1]  # Files hold up to megabytes of it.
  try:
    return shortened(repr(value))
  except (ValueError, RecursionError):  # It has too many digits or is nested too deep.
    return f"a value of type {type(value).__name__}"
