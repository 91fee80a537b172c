"""Print compiler flags for C and C++ programs that run packed networks.

  cc program.c $(minw-config --cflags --libs)

`minw-config` is the same command as `python -m minw.c_flags`.
"""

import shlex

from absl import flags

from minw import cli
from minw import errors
from minw.kernels import native

_HEADERS = native.LIBRARY.parent / "csrc"


def cflags() -> str:
  """Returns the flags with which a compiler finds minw.h."""
  return f"-I{shlex.quote(str(_HEADERS))}"


def libs() -> str:
  """Returns the flags with which the linker, and later the program, finds the library.

  Raises:
    errors.UsageError: The library was not built when minw was installed.
  """
  if not native.available():
    raise errors.UsageError(
        "the native library was not built: install minw again where there is a C++"
        " compiler")
  folder = shlex.quote(str(native.LIBRARY.parent))
  return f"-L{folder} -lminw -Wl,-rpath,{folder}"


def main() -> None:
  """Prints the compiler flags, the linker flags or both, as the flags say."""
  given = flags.FLAGS
  wanted = [given.cflags and cflags(), given.libs and libs()]
  if not any(wanted):
    raise errors.UsageError("--cflags or --libs, or both, must be given")
  print(" ".join(filter(None, wanted)))


def define_flags() -> None:
  """Defines the flags of the command."""
  flags.DEFINE_bool("cflags", False, "Print the flags for the compiler.")
  flags.DEFINE_bool("libs", False, "Print the flags for the linker.")


def command() -> None:
  """Runs `minw-config`."""
  cli.run(main, define_flags)


if __name__ == "__main__":
  command()
