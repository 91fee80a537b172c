"""Train, pack and run networks with weights and activations of 1 to 3 bits.

`minw COMMAND` and `python -m minw COMMAND` run a command. `minw COMMAND --help`
describes the command and its flags.
"""

import ast
import importlib
import pathlib
import sys

import minw
from minw import cli
from minw import completion
from minw import errors
from minw import stopping
from minw import usage

# The module of each command.
COMMANDS = {
    "train": "minw.main",
    "evaluate": "minw.evaluate",
    "pack": "minw.pack",
    "infer": "minw.infer.__main__",
    "export": "minw.export.__main__",
    "prepare": "minw.prepare",
    "search": "minw.search",
    "summary": "minw.summary",
    "report": "minw.report.__main__",
    "bench": "minw.bench.__main__",
    "plots": "minw.plots",
}


def main() -> None:
  """Runs the command that the first argument names."""
  cli.guarded(_run, sys.argv[1:])


def _run(arguments: list[str]) -> None:
  if arguments[:1] == ["help"]:
    arguments = [*arguments[1:], "--help"]
  name = arguments[0] if arguments else "--help"
  if name in ("--help", "-h"):
    print(_list())
  elif name == "--version":
    print(f"minw {minw.__version__}")
  elif name == "completion":
    if cli.asks_for_help(arguments):
      print(f"usage: minw completion SHELL\n\n{(completion.__doc__ or '').strip()}")
    else:
      print(completion.script(arguments[1:], COMMANDS))
  elif name not in COMMANDS:
    raise errors.unknown_name("command", name, [*COMMANDS, "completion"])
  else:
    if name in ("train", "search"):
      stopping.watch()  # Before the import, which takes seconds.
    module = importlib.import_module(COMMANDS[name])
    sys.argv[1:] = arguments[1:]
    cli.run(getattr(module, "SUBCOMMANDS", None) or module.main, module.define_flags,
            f"minw {name}")


def _list() -> str:
  """Returns the text of --help."""
  modules = COMMANDS | {"completion": "minw.completion"}
  return "\n".join([
      "usage: minw COMMAND [ARGUMENT ...]", "", (__doc__ or "").strip(), "",
      *usage.commands(
          "Commands", {name: _docstring(module) for name, module in modules.items()})])


def _docstring(module: str) -> str:
  """Returns the docstring of a module without importing the module."""
  path = pathlib.Path(__file__).parent.joinpath(*module.split(".")[1:])
  return ast.get_docstring(ast.parse(path.with_suffix(".py").read_text())) or ""


if __name__ == "__main__":
  main()
