"""Runs with several processes: how the processes start, agree and end together.

All processes run the same program and wait for each other in its collectives.
Therefore everything that decides which collective comes next must be the same on all of
them. Facts that only one process knows are exchanged here first: a signal, a wrong
path, or what process 0 found in the workdir. In a run with one process, no function
here communicates.
"""

import contextlib
import json
import re
import signal
import subprocess
import threading
from typing import Any, Callable, Iterator, Sequence
import zlib

import jax
from jax.experimental import multihost_utils
import numpy as np

from minw import errors
from minw import exit_codes

_FAREWELL_SECONDS = 8.0  # Time that processes wait for each other when all end.

# JAX's errors about other processes: their states, and the names of what connects them.
_LOST = re.compile("UNAVAILABLE|ABORTED|DEADLINE_EXCEEDED|Gloo|NCCL|coordination|"
                   "heartbeat|Connection (reset|refused|closed)", re.IGNORECASE)
_RESUMES = ("No process can continue alone. The same commands resume the run from its"
            " last checkpoint")


class Agreed(errors.UsageError):
  """Error that all processes raise together, so that they can shut down normally."""


class Lost(errors.UsageError):
  """Another process has ended, or cannot be reached."""

  exit_code = exit_codes.FAILURE


def initialize(
    coordinator: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    heartbeat_timeout: int = 100,
) -> None:
  """Joins this process to the others of a run.

  This must be called before any other use of JAX. If `coordinator`, `num_processes` and
  `process_id` are None, they are taken from the environment: a TPU pod, Slurm or
  Open MPI.

  Args:
    coordinator: Address host:port at which process 0 listens.
    num_processes: Number of processes of the run.
    process_id: Number of this process, from 0.
    heartbeat_timeout: Number of seconds without a heartbeat after which a process
      counts as dead. The other processes then end as well.

  Raises:
    errors.UsageError: The arguments are missing, and there is no such environment.
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
  signal.signal(signal.SIGTERM, handler)  # The handler of JAX only notes it.


@contextlib.contextmanager
def explaining_sudden_ends(heartbeat_timeout: int) -> Iterator[None]:
  """Context that explains in one line on stderr why this process ended without a word.

  JAX aborts a process that loses the others, and prints the stack of its threads. No
  Python code runs then. Therefore a small process waits for a farewell, and prints the
  line if this process is gone without it.

  Args:
    heartbeat_timeout: See `initialize`.
  """
  line = ("error: this process was killed, or JAX ended it because it could not reach"
          f" the others for --heartbeat_timeout={heartbeat_timeout} seconds, or 300"
          " seconds when they start: one of them has ended or hangs, or the network or"
          f" --coordinator is wrong. {_RESUMES}")
  with subprocess.Popen(["sh", "-c", 'read -r _ || echo "$1" >&2', "sh", line],
                        stdin=subprocess.PIPE, stdout=subprocess.DEVNULL) as waiting:
    try:
      yield
    finally:
      with contextlib.suppress(OSError):
        waiting.communicate(b"\n")


@contextlib.contextmanager
def saying_who_ends() -> Iterator[None]:
  """Context that explains errors that end one of several processes.

  Errors of JAX that tell that another process is gone become `Lost`. All errors get a
  note.

  Afterwards `cli.guarded` ends the process at once. The usual shutdown barrier would
  hang, because the other processes wait for this one in a collective. They notice its
  end within the heartbeat timeout. After an `Agreed` error, all processes do pass the
  barrier, so that each can print the error before the first process is gone.
  """
  try:
    yield
  except Agreed:
    farewell = threading.Thread(target=_say_farewell, daemon=True)
    farewell.start()
    farewell.join(_FAREWELL_SECONDS)  # Another process may be gone already.
    raise
  except (Exception, KeyboardInterrupt) as error:
    if not jax.distributed.is_initialized():
      raise
    note = (f"process {jax.process_index()} of {jax.process_count()} ends here, or"
            f" another process ended before it. {_RESUMES}")
    if isinstance(error, jax.errors.JaxRuntimeError) and _LOST.search(str(error)):
      error = Lost(f"the processes have lost each other ({error})")
    error.add_note(note)
    raise error


def _say_farewell() -> None:
  with contextlib.suppress(Exception):
    jax.distributed.shutdown()


def several() -> bool:
  """Returns whether there is more than one process."""
  return jax.process_count() > 1


def is_main() -> bool:
  """Returns whether this is process 0, the only one that writes records."""
  return jax.process_index() == 0


def gather(text: str) -> list[str]:
  """Returns the `text` of each process, in the order of the processes."""
  if not several():
    return [text]
  data = np.frombuffer(text.encode(), np.uint8)
  sizes = multihost_utils.process_allgather(np.int32(data.size))
  # Sizes are rounded up to multiples of 1024, so that few programs are compiled.
  padded = np.zeros(-(-sizes.max() // 1024) * 1024 or 1, np.uint8)
  padded[:data.size] = data
  rows = multihost_utils.process_allgather(padded)
  return [row[:size].tobytes().decode() for row, size in zip(rows, sizes)]


def gather_numbers(numbers: Sequence[float]) -> np.ndarray:
  """Returns the numbers of each process, float32 (processes, numbers)."""
  row = np.array(numbers, np.float32)
  return multihost_utils.process_allgather(row) if several() else row[None]


def any_of(flag: bool) -> bool:
  """Returns whether `flag` is true on any process."""
  if not several():
    return flag
  return bool(multihost_utils.process_allgather(np.int32(flag)).any())


def together(function: Callable, *arguments: Any) -> Any:
  """Calls `function` on each process, and returns its result.

  Raises:
    errors.UsageError: The function raised it on some process. Then all processes raise
      it, with the same message.
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
  """Calls `function` on process 0 only, and returns its result on all processes.

  Several processes exchange the result as JSON.

  Raises:
    errors.UsageError: The function raised it. Then all processes raise it.
  """
  if not several():
    return function(*arguments)
  text = together(lambda: json.dumps(function(*arguments)) if is_main() else "")
  return json.loads(gather(text)[0])


def check_same(tree: Any, name: str) -> None:
  """Checks that host arrays are equal on all processes.

  Args:
    tree: Tree of NumPy arrays.
    name: Name of the arrays, for the error message.

  Raises:
    errors.UsageError: The arrays differ. All processes raise it.
  """
  if several():
    sums = gather(str([zlib.crc32(np.ascontiguousarray(leaf).data)
                       for leaf in jax.tree.leaves(tree)]))
    different = [i for i, found in enumerate(sums) if found != sums[0]]
    if different:
      raise Agreed(f"{name}: process {different[0]} has other values than process 0")


def put(tree: Any, sharding: Any) -> Any:
  """Puts host arrays, which are the same on each process, on all devices.

  Args:
    tree: Tree of NumPy or local arrays.
    sharding: Sharding of all arrays, or a tree of shardings.

  Returns:
    The tree of global arrays.
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
  """Puts a batch, of which each process has a part of the rows, on all devices.

  Args:
    tree: Tree of NumPy arrays with the rows of this process. All processes have the
      same number of rows.
    sharding: Sharding along the rows.

  Returns:
    The tree of global arrays.
  """
  if not several():
    return jax.device_put(tree, sharding)
  return jax.tree.map(
      lambda leaf: jax.make_array_from_process_local_data(sharding, leaf), tree)


def whole(array: jax.Array) -> np.ndarray:
  """Returns an array as a NumPy array, even if its parts are on several processes.

  All processes must call this function.
  """
  if isinstance(array, jax.Array) and not (
      array.is_fully_addressable or array.is_fully_replicated):
    return multihost_utils.process_allgather(array, tiled=True)
  return np.asarray(array)


def share() -> tuple[int, int]:
  """Returns (i, n), which means that this process has part i of n of each batch."""
  return jax.process_index(), jax.process_count()
