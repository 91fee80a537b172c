"""Foreign text in generated C: names and labels, as any compiler reads them alike."""

import re
import unicodedata

PREFIX = re.compile("[A-Za-z][A-Za-z0-9]*(_[A-Za-z0-9]+)*")
ALLOWED_PREFIX = "letters, digits and single underscores, a letter first"


def prefix(name: str) -> str:
  """The prefix of C names that a network's name gives.

  It is only ever used with something behind it, `NAME_run` or `NAME_CLASSES`, so that
  keywords need no care.

  Args:
    name: Any text, such as a file's name without its ending.

  Returns:
    Lower-case letters, digits and single underscores. "minw" stands for a name without
    any Latin letter or digit, and before one that begins with a digit.
  """
  plain = unicodedata.normalize("NFKD", name).encode("ascii", "ignore").decode().lower()
  words = re.findall("[a-z0-9]+", plain)
  if not words or words[0][0].isdigit():
    words = ["minw", *words]
  return "_".join(words)


def string(text: str) -> str:
  """A string literal that holds the text as UTF-8.

  All bytes that could be misread, such as those of trigraphs, are octal escapes.
  """
  return '"' + "".join(
      chr(b) if chr(b).isalnum() and b < 128 or b in b" _-.,:/()+"
      else f"\\{b:03o}" for b in text.encode(errors="replace")) + '"'


def comment(text: str) -> str:
  """The text inside a comment, with "_" for characters that could be misread in it."""
  return re.sub(r"[^\w .,:()+/-]", "_", text, flags=re.ASCII)


def json_comment(text: str) -> str:
  """JSON inside a comment: the same JSON without what ends or begins comments."""
  return text.replace("/", r"\u002f").replace("?", r"\u003f")
