"""Runs the commands: parses flags, prints help, and reports errors in one line."""

import contextlib
import difflib
import faulthandler
import inspect
import io
import logging as std_logging
import os
import re
import select
import signal
import sys
import threading
import traceback
from typing import Any, Callable, Collection, Iterable, Iterator, Mapping, NoReturn

from absl import flags
from absl import logging

import minw
from minw import dependencies
from minw import errors
from minw import exit_codes
from minw import paths
from minw import text
from minw import usage

_FLUSH_SECONDS = 5.0  # Time limit for the last output of a process that ends.
_COMMON = ("help", "version", "quiet", "verbosity")  # Flags of all commands.


# Names of required flags, see `require`.
_required: set[str] = set()


def require(*names: str) -> None:
  """Makes flags of the command required.

  A positional argument counts as a value of the flag that takes such arguments.
  """
  _required.update(names)


def DEFINE_path(
    name: str, default: str | None, help: str, remote: bool = False) -> None:
  """Defines a flag whose value is a path, in which `~` and variables are expanded.

  Args:
    name: Name of the flag.
    default: Default value.
    help: One sentence on what the path is.
    remote: Whether the path may be gs://BUCKET/NAME.
  """
  flags.DEFINE(_Path(remote), name, default, help)


def DEFINE_paths(
    name: str, help: str, positional: bool = False, remote: bool = False) -> None:
  """Defines a flag whose value is a list of paths.

  The flag may be repeated, and each value may be a list with commas and wildcards; see
  `paths.several`. Its value is an empty list if it is not given.

  Args:
    name: Name of the flag.
    help: One sentence on what the paths are.
    positional: Whether arguments that are not flags are added to the list.
    remote: Whether the paths may be gs://BUCKET/NAME.
  """
  flags.DEFINE_flag(_Paths(name, help, positional, remote))


class _Path(flags.ArgumentParser):
  """Parser of a path that expands `~` and variables."""

  def __init__(self, remote: bool):
    super().__init__()
    self._remote = remote

  def parse(self, argument: str) -> str:
    return paths.expand(argument, self._remote)

  def flag_type(self) -> str:
    return "path"


class _Paths(flags.MultiFlag):
  """A flag whose value is a list of paths.

  Each use of the flag adds to the list. If the flag is positional, so does each
  argument that is not a flag.
  """

  def __init__(self, name: str, help: str, positional: bool, remote: bool):
    self.positional = positional
    self._remote = remote
    super().__init__(flags.ArgumentParser(), None, name, [], help)
    self.help = help  # Removes the line that MultiFlag appends.

  def flag_type(self) -> str:
    return "paths"

  def parse(self, arguments: str | Iterable[str]) -> None:
    """Adds the paths of one or more values of the flag, each of which may be a list."""
    values = [arguments] if isinstance(arguments, str) else arguments
    for value in values:
      self._add(value, paths.several)

  def take(self, argument: str) -> None:
    """Adds the paths of a positional argument, in which commas are not special."""
    self._add(argument, paths.matching)

  def _add(self, value: str, read: Callable[[str, bool], list[str]]) -> None:
    errors.check(value.strip(",") != "", self.name, value, "not empty")
    try:
      super().parse(read(value, self._remote))
    except ValueError as error:
      raise flags.IllegalFlagValueError(f"--{self.name}={value}: {error}") from error


def show_progress() -> None:
  """Shows minw's own messages of progress unless --quiet or --verbosity was given."""
  if not (flags.FLAGS.quiet or flags.FLAGS["verbosity"].present):
    std_logging.getLogger("minw").setLevel(std_logging.INFO)


def name_process(name: str) -> None:
  """Puts a name in front of everything that this process logs."""
  logging.get_absl_handler().setFormatter(_NamedFormatter(name))


class _NamedFormatter(logging.PythonFormatter):
  """Formatter that puts a name in front of absl's format."""

  def __init__(self, name: str):
    super().__init__()
    self._name = name

  def format(self, record: std_logging.LogRecord) -> str:
    return f"[{self._name}] {super().format(record)}"


def note(line: str) -> None:
  """Prints a line on the progress of a command to stderr, unless --quiet was given."""
  if not flags.FLAGS.quiet:
    print(line, file=sys.stderr, flush=True)


def print_error(message: str) -> None:
  """Prints an error to stderr, as one line with escapes for unprintable characters."""
  print(f"error: {text.printable(' '.join(message.split()))}", file=sys.stderr)


def guarded(function: Callable, *arguments: Any) -> Any:
  """Calls `function`; if it raises an error, the process ends at once.

  The error determines the output and the exit code:

    errors.UsageError   one line, and the error's code, which is 2 for bad input
    OSError of a file   one line, and code 74
    SIGINT              one line, and code 130
    closed pipe         no output, and code 141; an example is output to `| head`
    any other error     the traceback, and code 1: this is a bug

  With `--verbosity=1` all tracebacks are printed.

  Args:
    function: Function to call.
    *arguments: Its arguments.

  Returns:
    The result of the function.
  """
  try:
    try:
      return function(*arguments)
    finally:
      if sys.stdout:
        sys.stdout.flush()
  except dependencies.MissingDependencies:
    _end(exit_codes.BAD_INPUT, f"error: this command {dependencies.NEED}")
  except KeyboardInterrupt as error:
    _end(exit_codes.INTERRUPTED, _one_line("interrupted", error))
  except BrokenPipeError as error:
    if _output_is_closed():
      os._exit(exit_codes.BROKEN_PIPE)  # No output is left to flush.
    _end_with_traceback(error)
  except Exception as error:
    if logging.get_verbosity() >= logging.DEBUG:
      _end_with_traceback(error)
    if isinstance(error, errors.UsageError):
      _end(error.exit_code, _one_line(f"error: {error}", error))
    if isinstance(error, OSError) and error.errno and error.filename:
      _end(exit_codes.IO_ERROR,
           _one_line(f"error: {error.filename}: {error.strerror}", error))
    _end_with_traceback(error)


def _one_line(message: str, error: BaseException) -> str:
  """Joins a message and the notes of an error to a line without control characters."""
  message = "; ".join([message, *getattr(error, "__notes__", ())])
  return text.printable(" ".join(message.split()))


def _end_with_traceback(error: BaseException) -> NoReturn:
  _end(exit_codes.FAILURE, "".join(traceback.format_exception(error)).rstrip())


def _end(code: int, message: str) -> NoReturn:
  """Prints a message and ends the process at once.

  A Python process usually waits for its threads before it ends. After a failure,
  threads of libraries may take minutes: those of Orbax for a checkpoint that could not
  be written, those of JAX for other processes. Locks and data workers need no such wait
  to be cleaned up.
  """
  with contextlib.suppress(OSError, ValueError, RuntimeError):
    # The reader of the output may be stuck, and so would be the flush below.
    timer = threading.Timer(_FLUSH_SECONDS, os._exit, [code])
    timer.daemon = True
    timer.start()
  steps: list[Callable[[], Any]] = [std_logging.shutdown]
  if sys.stdout:
    steps.append(sys.stdout.flush)
  if sys.stderr:
    steps += [lambda: print(message, file=sys.stderr), sys.stderr.flush]
  for step in steps:
    with contextlib.suppress(OSError, ValueError):
      step()
  os._exit(code)


def _output_is_closed() -> bool:
  """Whether standard output or standard error is a pipe without a reader."""
  pipes = select.poll()
  for number in (1, 2):
    pipes.register(number, 0)
  return any(events & select.POLLERR for _, events in pipes.poll(0))


def run(
    main: Callable[[], int | None] | Mapping[str, Callable[[], int | None]],
    define_flags: Callable[..., None],
    program: str | None = None,
) -> NoReturn:
  """Runs a command: defines its flags, parses `sys.argv` and calls its `main`.

  Errors in the flags or in `main` end the process as `guarded` describes. `--help`
  prints the docstring of the module that defines `define_flags`, and the flags. For a
  subcommand it prints the docstring of its function.

  Args:
    main: Function that does the work. Its result is the exit code; None stands for 0. A
      command with subcommands has a mapping from their names to such functions.
    define_flags: Function that defines the flags of the command. It is called without
      arguments, or with the name of the subcommand if there are subcommands. Importing
      a module must not define flags, because modules share names of flags.
    program: Command line that started the program, without its arguments. By default it
      is derived from `sys.argv`.
  """
  faulthandler.enable()
  logging.use_absl_handler()
  if isinstance(sys.stdout, io.TextIOWrapper):
    # Without this, characters that the encoding lacks would raise an error.
    sys.stdout.reconfigure(errors="backslashreplace")
  _exchange_interrupt(signal.SIG_DFL, signal.default_int_handler)  # See minw.__init__.
  try:
    sys.exit(guarded(_run, main, define_flags, program or _program()))
  finally:  # From here on, an interrupt would only print a traceback.
    _exchange_interrupt(signal.default_int_handler, signal.SIG_DFL)


def _exchange_interrupt(old: Any, new: Any) -> None:
  """Replaces the handler `old` of SIGINT by `new`, and keeps any other handler."""
  if signal.getsignal(signal.SIGINT) == old:
    signal.signal(signal.SIGINT, new)


def _run(main, define_flags, program) -> int | None:
  about = sys.modules[define_flags.__module__].__doc__ or ""
  wants_help = asks_for_help(sys.argv[1:])
  common = _define_common_flags()
  if isinstance(main, Mapping):
    abouts = {name: inspect.getdoc(work) or "" for name, work in main.items()}
    name = _take_subcommand(main, optional=wants_help)
    if name is None:
      listed = usage.commands(
          f"Subcommands (`{program} SUBCOMMAND --help` describes one)", abouts)
      print(usage.text(f"{program} SUBCOMMAND", "\n".join([about, *listed]), [],
                       common, _required))
      return 0
    program, about = f"{program} {name}", abouts[name]
    own = _define(lambda: define_flags(name))
    main = main[name]
  else:
    own = _define(define_flags)
  if wants_help:
    print(usage.text(program, about, own, common, _required))
    return 0
  if "--version" in _before_dashes(sys.argv[1:]):
    print(f"minw {minw.__version__}")
    return 0
  _parse(own)
  _set_verbosity()
  return main()


def _define_common_flags() -> list[flags.Flag]:
  """Defines the flags that all commands have, and returns them."""
  flags.DEFINE_bool("help", False, "Print this text and exit.", short_name="h")
  flags.DEFINE_bool("version", False, "Print the version of minw and exit.")
  flags.DEFINE_bool(
      "quiet", False, "Print results and errors, but no progress and no warnings.",
      short_name="q")
  flags.FLAGS["verbosity"].help = (
      "Amount of logging: -2 for errors, -1 for warnings, 0 for information, also from "
      "libraries, and 1 for details and the tracebacks of bad input.")
  return [flags.FLAGS[name] for name in _COMMON]


def _define(define_flags: Callable[[], None]) -> list[flags.Flag]:
  """Defines the flags of a command and returns them, in the order of definition."""
  others = set(flags.FLAGS)
  define_flags()
  return [flags.FLAGS[name] for name in flags.FLAGS if name not in others]


@contextlib.contextmanager
def defined(define_flags: Callable[[], None]) -> Iterator[list[flags.Flag]]:
  """Defines the flags of a command inside this context, and yields them."""
  others = set(flags.FLAGS)
  try:
    yield _define(define_flags)
  finally:
    for name in set(flags.FLAGS) - others:
      delattr(flags.FLAGS, name)


def asks_for_help(arguments: list[str]) -> bool:
  """Whether one of the arguments is --help or -h."""
  return not {"--help", "-help", "-h"}.isdisjoint(_before_dashes(arguments))


def _before_dashes(arguments: list[str]) -> list[str]:
  """Returns the arguments before `--`. The arguments after it are not flags."""
  return arguments[:arguments.index("--")] if "--" in arguments else arguments


def _take_subcommand(subcommands: Collection[str], optional: bool) -> str | None:
  """Removes the first argument in `sys.argv` that is not a flag, and returns it."""
  names = [argument for argument in sys.argv[1:] if not argument.startswith("-")]
  if not names:
    if optional:
      return None
    raise errors.UsageError(f"a subcommand is missing; known: {', '.join(subcommands)}")
  if names[0] not in subcommands:
    raise errors.unknown_name("subcommand", names[0], subcommands)
  sys.argv.remove(names[0])
  return names[0]


def _parse(own: list[flags.Flag]) -> None:
  """Parses `sys.argv`.

  Args:
    own: Flags of the command.

  Raises:
    errors.UsageError: An argument is not allowed, or a required flag is missing.
  """
  try:
    rest = flags.FLAGS(sys.argv)[1:]
  except flags.UnrecognizedFlagError as error:
    raise _unknown_flag(error.flagname, own) from error
  except flags.IllegalFlagValueError as error:
    raise _illegal_value(str(error)) from error
  except (flags.Error, AttributeError, KeyError, TypeError, ValueError) as error:
    raise errors.UsageError(str(error)) from error
  takers = [flag for flag in own if isinstance(flag, _Paths) and flag.positional]
  for argument in rest:
    if not takers:
      raise errors.UsageError(
          f"argument {argument!r} is not a flag (flags are --name=value)")
    try:
      takers[0].take(argument)
    except flags.IllegalFlagValueError as error:
      raise errors.UsageError(str(error)) from error
  missing = sorted(f"--{flag.name}" for flag in own
                   if flag.name in _required and flag.value in (None, []))
  if missing:
    raise errors.UsageError(
        f"{' and '.join(missing)} {'is' if len(missing) == 1 else 'are'} required")
  for flag in own:
    errors.check(flag.value != "", flag.name, "", "not empty")


def _unknown_flag(name: str, own: list[flags.Flag]) -> errors.UsageError:
  """Returns the error for an unknown flag, with the most similar flag as a hint."""
  known = {}
  for full in [*_COMMON, *names(own)]:
    # A field also counts by its last name: --seed is a typo of --config.seed.
    known.setdefault(full.rpartition(".")[2], full)
    known[full] = full
  near = difflib.get_close_matches(name, known, n=1)
  hint = f"did you mean --{known[near[0]]}?" if near else "see --help"
  return errors.UsageError(f"there is no flag --{name}; {hint}")


def _illegal_value(message: str) -> errors.UsageError:
  """Converts absl's error for the value of a flag to the form of `errors.bad_value`."""
  match = re.match(r"flag --([\w.]+)=(.*?): ", message, re.DOTALL)
  if match is None or match[1] not in flags.FLAGS:
    return errors.UsageError(message)
  name, value = match.groups()
  if "." in name:  # For a field of --config, absl's message quotes an error of Python.
    return errors.bad_value(
        name, value, f"of type {flags.FLAGS[name].parser.flag_type()}")
  allowed = flags.FLAGS[name].parser.syntactic_help
  if not allowed:
    return errors.UsageError(message)
  return errors.bad_value(name, value, allowed)


def _set_verbosity() -> None:
  if not flags.FLAGS["verbosity"].present:
    # Libraries log many messages at INFO.
    logging.set_verbosity(logging.ERROR if flags.FLAGS.quiet else logging.WARNING)
  # `display.shown` takes a level set on this logger as the choice of a command.
  std_logging.getLogger("minw").setLevel(std_logging.root.level)


def names(own: Iterable[flags.Flag]) -> Iterator[str]:
  """Yields the names of flags and of their fields, such as config and config.seed."""
  for flag in own:
    yield flag.name
    for field in getattr(flag.parser, "fields", ()):
      yield f"{flag.name}.{field}"


def _program() -> str:
  """Returns the command line that started this process, without its arguments."""
  spec = getattr(sys.modules["__main__"], "__spec__", None)
  if spec:
    return f"python -m {spec.name.removesuffix('.__main__')}"
  path = sys.argv[0]
  return f"python {path}" if path.endswith(".py") else os.path.basename(path)
