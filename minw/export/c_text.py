"""Escapes names and labels for generated C, so that all compilers read them alike."""

import re
import unicodedata

PREFIX = re.compile("[A-Za-z][A-Za-z0-9]*(_[A-Za-z0-9]+)*")
ALLOWED_PREFIX = "letters, digits and single underscores, a letter first"


def prefix(name: str) -> str:
  """Makes a prefix for C names from the name of a network.

  The prefix is always followed by more, as in `NAME_run` or `NAME_CLASSES`. Therefore
  it may be a keyword of C.

  Args:
    name: Any text, such as a file's name without its ending.

  Returns:
    Lower-case letters, digits and single underscores. The prefix is "minw" if the name
    holds no Latin letter and no digit, and begins with "minw_" if the name begins with
    a digit.
  """
  plain = unicodedata.normalize("NFKD", name).encode("ascii", "ignore").decode().lower()
  words = re.findall("[a-z0-9]+", plain)
  if not words or words[0][0].isdigit():
    words = ["minw", *words]
  return "_".join(words)


def string(text: str) -> str:
  """Returns a string literal that holds the text as UTF-8.

  Every byte that a compiler could misread, such as those of trigraphs, becomes an octal
  escape.
  """
  return '"' + "".join(
      chr(b) if chr(b).isalnum() and b < 128 or b in b" _-.,:/()+"
      else f"\\{b:03o}" for b in text.encode(errors="replace")) + '"'


def comment(text: str) -> str:
  """Returns the text for a comment, with "_" for characters that could be misread."""
  return re.sub(r"[^\w .,:()+/-]", "_", text, flags=re.ASCII)


def json_comment(text: str) -> str:
  """Returns the same JSON with escapes for "/" and "?".

  The result can neither begin nor end a comment, and it holds no trigraphs.
  """
  return text.replace("/", r"\u002f").replace("?", r"\u003f")
