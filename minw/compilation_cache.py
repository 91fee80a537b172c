"""The persistent cache of compiled programs, in a folder on this machine or on gs://.

A process that finds a program there does not compile it. JAX reads and writes the
programs. An entry that cannot be read or written costs a warning and a compilation.
"""

import pathlib

import jax

from minw import cloud
from minw import errors
from minw import paths


def use(folder: str) -> None:
  """Makes this process keep all compiled programs in a folder, which is created.

  If a run has several processes, process 0 alone writes programs, and all read them.

  Args:
    folder: Path of the folder. All processes of a run share it.

  Raises:
    errors.UsageError: The folder cannot be read or written.
  """
  path = paths.at(folder)
  try:
    if isinstance(path, pathlib.Path):
      path.mkdir(parents=True, exist_ok=True)
    else:
      path.exists()  # It raises an error if the bucket or the rights are missing.
      cloud.prepare_orbax()
      # XLA's own cache of kernels for GPUs must be on this machine.
      jax.config.update("jax_persistent_cache_enable_xla_caches", "none")
  except OSError as error:
    raise errors.bad_value("compilation_cache_dir", folder, "a folder that can be"
                           f" read and written ({error.strerror})") from error
  jax.config.update("jax_compilation_cache_dir", folder)
  # JAX would leave out programs that compile within a second.
  jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
  jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
