"""Several processes of one run: how they start, agree and end together.

All run the same program and meet in its collectives. So whatever decides which comes
next must be the same on all of them, and what only one of them knows (a signal, a
wrong path, what process 0 found in the workdir) is exchanged here first. With one
process nothing here communicates.
"""

import contextlib
import json
import signal
import threading
from typing import Any, Callable, Iterator
import zlib

import jax
from jax.experimental import multihost_utils
import numpy as np

from minw import errors

_FAREWELL_SECONDS = 8.0  # How long processes that end together wait for each other.


class Agreed(errors.UsageError):
  """What all processes raise, so that they can end in the ordinary way."""


def initialize(
    coordinator: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    heartbeat_timeout: int = 100,
) -> None:
  """Joins this process to the others of a run; before anything else is done with JAX.

  Args:
    coordinator: host:port where process 0 listens; None, as the next two: what a TPU
      pod, Slurm or Open MPI says.
    num_processes: of the run.
    process_id: of this one, from 0.
    heartbeat_timeout: seconds after which a process that is not heard of counts as
      dead, which ends the others.

  Raises:
    errors.UsageError: nothing is given, and there is no such environment.
  """
  jax.config.update("jax_cpu_collectives_implementation", "gloo")
  handler = signal.getsignal(signal.SIGTERM)
  try:
    jax.distributed.initialize(
        coordinator, num_processes, process_id,
        heartbeat_timeout_seconds=heartbeat_timeout)
  except ValueError as error:
    raise errors.UsageError(
        f"--distributed: {error} (no TPU pod, Slurm or Open MPI was found; elsewhere "
        "--coordinator, --num_processes and --process_id are needed)") from error
  signal.signal(signal.SIGTERM, handler)  # JAX would only note it.


@contextlib.contextmanager
def saying_who_ends() -> Iterator[None]:
  """Inside, an error of one process of several says so; `cli.guarded` ends the process.

  It ends without a farewell: Python would wait at its end for the other processes,
  which wait for this one. They notice within the heartbeat timeout. After an `Agreed`
  error, all processes do say farewell, so that each can print it before the first is
  gone.
  """
  try:
    yield
  except Agreed:
    farewell = threading.Thread(target=_say_farewell, daemon=True)
    farewell.start()
    farewell.join(_FAREWELL_SECONDS)  # One of them may be gone already.
    raise
  except (Exception, KeyboardInterrupt) as error:
    if jax.distributed.is_initialized():
      error.add_note(
          f"process {jax.process_index()} of {jax.process_count()} ends here, or"
          " another one did before; none can go on alone, and the same commands again"
          " resume from the last checkpoint")
    raise


def _say_farewell() -> None:
  with contextlib.suppress(Exception):
    jax.distributed.shutdown()


def several() -> bool:
  """Whether there is more than one process."""
  return jax.process_count() > 1


def is_main() -> bool:
  """Whether this is process 0, which alone writes records."""
  return jax.process_index() == 0


def gather(text: str) -> list[str]:
  """The `text` of each process, by process."""
  if not several():
    return [text]
  data = np.frombuffer(text.encode(), np.uint8)
  sizes = multihost_utils.process_allgather(np.int32(data.size))
  padded = np.zeros(-(-sizes.max() // 1024) * 1024 or 1, np.uint8)  # Few programs.
  padded[:data.size] = data
  rows = multihost_utils.process_allgather(padded)
  return [row[:size].tobytes().decode() for row, size in zip(rows, sizes)]


def any_of(flag: bool) -> bool:
  """Whether `flag` is true on any process."""
  if not several():
    return flag
  return bool(multihost_utils.process_allgather(np.int32(flag)).any())


def together(function: Callable, *arguments: Any) -> Any:
  """Calls `function` on each process.

  Raises:
    errors.UsageError: on all processes, if it does on any.
  """
  if not several():
    return function(*arguments)
  result, refusal = None, ""
  try:
    result = function(*arguments)
  except errors.UsageError as error:
    refusal = str(error)
  refusals = [text for text in gather(refusal) if text]
  if refusals:
    raise Agreed(refusals[0])
  return result


def on_main(function: Callable, *arguments: Any) -> Any:
  """Calls `function` on process 0 alone; what it returns, in JSON, all get.

  Raises:
    errors.UsageError: on all processes, if it does.
  """
  if not several():
    return function(*arguments)
  text = together(lambda: json.dumps(function(*arguments)) if is_main() else "")
  return json.loads(gather(text)[0])


def check_same(tree: Any, name: str) -> None:
  """Raises errors.UsageError on all processes if their arrays on the host differ."""
  if several():
    sums = gather(str([zlib.crc32(np.ascontiguousarray(leaf).data)
                       for leaf in jax.tree.leaves(tree)]))
    different = [i for i, found in enumerate(sums) if found != sums[0]]
    if different:
      raise Agreed(f"{name}: process {different[0]} has another than process 0")


def put(tree: Any, sharding: Any) -> Any:
  """Arrays on the host, the same on each process, as arrays on all devices.

  Args:
    tree: of NumPy or local arrays.
    sharding: of all of them, or a tree of shardings.
  """
  if not several():
    return jax.device_put(tree, sharding)

  def make(leaf, where):
    leaf = np.asarray(leaf)
    return jax.make_array_from_callback(leaf.shape, where, lambda index: leaf[index])

  if isinstance(sharding, jax.sharding.Sharding):
    return jax.tree.map(lambda leaf: make(leaf, sharding), tree)
  return jax.tree.map(make, tree, sharding)


def put_rows(tree: Any, sharding: jax.sharding.Sharding) -> Any:
  """This process' rows of a batch, with those of the others, as arrays on all devices.

  Args:
    tree: of NumPy arrays, as many rows on each process.
    sharding: along the rows.
  """
  if not several():
    return jax.device_put(tree, sharding)
  return jax.tree.map(
      lambda leaf: jax.make_array_from_process_local_data(sharding, leaf), tree)


def whole(array: jax.Array) -> np.ndarray:
  """An array on the host, wherever its parts are; all processes must ask for it."""
  if isinstance(array, jax.Array) and not (
      array.is_fully_addressable or array.is_fully_replicated):
    return multihost_utils.process_allgather(array, tiled=True)
  return np.asarray(array)


def share() -> tuple[int, int]:
  """(i, n): this process has the i-th of n parts of each batch."""
  return jax.process_index(), jax.process_count()
