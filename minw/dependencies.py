"""Separates the core's dependencies from those of training, and reports missing ones.

`pip install minw` installs the core, which runs packed networks and exports them as C.
`pip install 'minw[train]'` installs JAX, Flax and what else training needs. Without
them, importing a module of minw that needs them raises `MissingDependencies`, and
`python -m` of such a module ends with that error in one line and exit code 2.
"""

from importlib import machinery
import importlib.util
import sys
from typing import Any

from minw import exit_codes

# Modules that need only the core's dependencies, and packages of such modules.
CORE = ("__main__", "c_flags", "cli", "cloud", "completion", "config_fields", "data",
        "data.image_files", "data.images", "dependencies", "errors", "exit_codes",
        "files", "outbox", "paths", "places", "profiling", "progress", "stopping",
        "text", "usage")
CORE_PACKAGES = ("export", "infer", "kernels", "packed")

# If one of these packages is missing, the dependencies of training count as missing.
_TRAINING = ("flax", "jax", "ml_collections", "optax")

NEED = "needs minw's training dependencies: pip install 'minw[train]'"


class MissingDependencies(ImportError):
  """A module for training was imported, but only the core is installed."""


def guard_imports() -> None:
  """Gives imports of minw's modules a clear error if only the core is installed."""
  if not all(map(installed, _TRAINING)):
    sys.meta_path.insert(0, _CoreOnly())


def installed(package: str) -> bool:
  """Whether `package` can be imported; it is not imported to find out."""
  try:
    return importlib.util.find_spec(package) is not None
  except ImportError:
    return False


class _CoreOnly:
  """An import finder that raises an error for minw's modules for training.

  It finds no module. For all other modules, Python asks the next finder.
  """

  def find_spec(self, name: str, path: Any = None, target: Any = None) -> None:
    package, _, module = name.partition(".")
    if (package != "minw" or module in CORE
        or module.partition(".")[0] in CORE_PACKAGES
        or machinery.PathFinder.find_spec(name, path) is None):
      return
    if sys.argv[:1] == ["-m"]:  # Python is looking for the module of `python -m`.
      print(f"error: this command {NEED}", file=sys.stderr)
      sys.exit(exit_codes.BAD_INPUT)
    raise MissingDependencies(f"{name} {NEED}", name=name)
