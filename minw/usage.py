"""Composes the text that --help prints."""

import re
import textwrap
from typing import Collection, Iterable, Mapping

from absl import flags

from minw import exit_codes

_WIDTH = 88
_PATHS = ("In a PATH, ~ is the home directory, and $NAME or ${NAME} is an environment "
          "variable. PATHS are separated by commas or given by repeated flags, and may "
          "contain the wildcards *, ? and **; a path that exists is taken as it is.")
_CODES = "Exit codes: {}.".format("; ".join(
    f"{code}, {exit_codes.MEANINGS[code]}" for code in exit_codes.COMMON))
_KINDS = {"path": "PATH", "paths": "PATHS", "int": "N", "float": "NUMBER",
          "comma separated list of strings": "A,B,...", "config": "FILE",
          "multi string": "TEXT"}


def text(
    program: str,
    about: str,
    own: Collection[flags.Flag],
    common: Iterable[flags.Flag],
    required: Collection[str],
) -> str:
  """Returns the help of a command.

  Args:
    program: Command line that starts the command, without its flags.
    about: Description of the command.
    own: Flags of the command. The first line of a flag's help describes the flag. If
      the flag has fields, the other lines are a table of the fields, which is printed
      after all flags. A flag whose attribute `positional` is true also takes arguments
      that are not flags.
    common: Flags that all commands have.
    required: Names of the required flags.
  """
  usage = [program, *(f"--{flag.name}={_kind(flag)}" for flag in own
                      if flag.name in required and not _positional(flag))]
  usage += [f"{flag.name.upper()} ..." for flag in own if _positional(flag)]
  lines = ["usage: " + " ".join([*usage, "[--FLAG=VALUE ...]"]), "", about.strip(), ""]
  if own:
    lines += ["Flags:", *_entries(own, required), ""]
  if any(_kind(flag) in ("PATH", "PATHS") for flag in own):
    lines += [*textwrap.wrap(_PATHS, _WIDTH), ""]
  for flag in own:
    if getattr(flag.parser, "fields", ()):
      lines += flag.help.split("\n")[1:]
  lines += ["Flags of all commands:", *_entries(common, ()), ""]
  return "\n".join([*lines, *textwrap.wrap(_CODES, _WIDTH)])


def commands(title: str, docstrings: Mapping[str, str]) -> list[str]:
  """Returns lines that list commands, each with the headline of its docstring.

  Args:
    title: Title of the list.
    docstrings: Docstrings of the commands by name.
  """
  return [f"{title}:", *(
      f"  {name:12}{text.splitlines()[0].partition(': `')[0].rstrip(':.')}."
      for name, text in docstrings.items())]


def sentence(flag: flags.Flag) -> str:
  """Returns the description of a flag without absl's additions and its table."""
  # absl lists the values of an enumeration before the description, and says after the
  # description of some flags that they may be repeated.
  text = re.sub("^<[^>]*>: ", "", flag.help.partition("\n")[0])
  return text.removesuffix(";")


def _positional(flag: flags.Flag) -> bool:
  return getattr(flag, "positional", False)


def _entries(shown: Iterable[flags.Flag], required: Collection[str]) -> list[str]:
  """Returns lines with the name, kind, help and default of each flag."""
  lines = []
  for flag in shown:
    short = f"-{flag.short_name}, " if flag.short_name else ""
    name = f"--[no]{flag.name}" if flag.default is True else f"--{flag.name}"
    lines.append(f"  {short}{name}" + ("" if flag.boolean else f"={_kind(flag)}"))
    note = f" The name --{flag.name} may be left out." * _positional(flag)
    if flag.name in required:
      note += " Required."
    elif flag.default not in (None, False, [], ""):
      note = f" Default: {_default(flag)}."
    lines += textwrap.wrap(sentence(flag) + note, _WIDTH, initial_indent=6 * " ",
                           subsequent_indent=6 * " ")
  return lines


def _default(flag: flags.Flag) -> str:
  return (flag.default_as_str or "").strip("'")


def _kind(flag: flags.Flag) -> str:
  """Returns the placeholder for the value of a flag."""
  values = getattr(flag.parser, "enum_values", None)
  return "|".join(values) if values else _KINDS.get(flag.flag_type(), "TEXT")
