"""Print a script that completes the commands and flags of `minw` in a shell.

  minw completion bash >> ~/.bashrc
  minw completion zsh >> ~/.zshrc
"""

import importlib
from typing import Mapping, Sequence

from minw import cli
from minw import dependencies
from minw import errors

SHELLS = ("bash", "zsh")

_SCRIPT = """\
_minw() {{
  local word=${{COMP_WORDS[COMP_CWORD]}} words
  case "${{COMP_WORDS[1]}}" in
{cases}
  esac
  if [ "$COMP_CWORD" = 1 ]; then
    words="{commands}"
  fi
  COMPREPLY=($(compgen -W "$words" -- "$word"))
  if [[ ${{COMPREPLY[0]}} == *= ]]; then
    compopt -o nospace 2> /dev/null
  fi
}}
complete -o default -F _minw minw
"""


def script(arguments: Sequence[str], commands: Mapping[str, str]) -> str:
  """Returns the completion script for a shell.

  Args:
    arguments: Arguments of the command: the name of the shell, one of `SHELLS`.
    commands: Modules of the commands by name.

  Raises:
    errors.UsageError: There is not exactly one argument, or it is not one of `SHELLS`.
  """
  if len(arguments) != 1 or arguments[0] not in SHELLS:
    raise errors.UsageError(f"completion takes one argument, the name of a shell: "
                            f"{' or '.join(SHELLS)}")
  cases = "\n".join(f'    {name}) words="{" ".join(words(module))}" ;;'
                    for name, module in commands.items())
  text = _SCRIPT.format(cases=cases, commands=" ".join([*commands, "completion"]))
  start = "autoload -U +X bashcompinit && bashcompinit\n"
  return (start if arguments[0] == "zsh" else "") + text


def words(module: str) -> list[str]:
  """Returns the words that may follow the name of a command.

  Args:
    module: Full name of the command's module.

  Returns:
    The subcommands and flags. The list is empty if the dependencies of the module are
    not installed.
  """
  try:
    command = importlib.import_module(module)
  except dependencies.MissingDependencies:
    return []
  subcommands = list(getattr(command, "SUBCOMMANDS", ()))
  found = {}
  for arguments in [[name] for name in subcommands] or [[]]:
    with cli.defined(lambda: command.define_flags(*arguments)) as own:  # noqa: B023
      found |= {f"--{name}{'' if flag.boolean else '='}": None
                for flag in own for name in cli.names([flag])}
  return [*subcommands, *found, "--help"]
