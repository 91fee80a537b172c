"""Low-bit networks in JAX: estimators, quantizers, MINW-Nets.

`import minw` is fast and does not import JAX. Submodules are imported on first use, as
in `minw.infer.load("digits_convnet")`.
"""

import signal
import sys

# `python -m minw.NAME` imports this module first. The imports of the command then take
# seconds. During that time an interrupt ends the process without a traceback. Later,
# `cli.run` handles interrupts.
if (sys.argv[:1] == ["-m"]
    and sys.orig_argv[-len(sys.argv)].removeprefix("-m").split(".")[0] == "minw"
    and signal.getsignal(signal.SIGINT) is signal.default_int_handler):
  signal.signal(signal.SIGINT, signal.SIG_DFL)

import importlib
import pkgutil
from typing import Any

from minw import dependencies

__version__ = "0.1.0"

dependencies.guard_imports()


# Current modules, by their names in version 0.1: `from minw import NAME` still works.
_EARLIER = {"datasets": "data.datasets", "metadata": "packed.metadata",
            "pipeline": "data.pixels"}


def __getattr__(name: str) -> Any:
  """Imports the submodule `name` (PEP 562)."""
  if not name.startswith("_"):
    path = f"minw.{_EARLIER.get(name, name)}"
    try:
      return importlib.import_module(path)
    except ModuleNotFoundError as error:
      if error.name != path:
        raise
  raise AttributeError(f"module 'minw' has no attribute {name!r}")


def __dir__() -> list[str]:
  submodules = [module.name for module in pkgutil.iter_modules(__path__)]
  return sorted(["__version__", *(n for n in submodules if not n.startswith("_"))])
