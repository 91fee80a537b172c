"""Where the time of a packed network goes: seconds and rates of its operations."""

import math
import time
from typing import NamedTuple, Sequence

import numpy as np

from minw import packed
from minw import text
from minw.kernels import native

# Products that a kernel sums on registers to measure its largest rate, and the number
# of such measurements, of which the fastest counts.
_PEAK_PRODUCTS, _PEAK_RUNS = 10**9, 3


class Pass(NamedTuple):
  """A pass over the network's values: one operation, or a convolution and what follows.

  Attributes:
    name: Name of the operation, or of the convolution.
    kernel: Name of its kernel.
    seconds: Median time of a run of the whole batch.
    products: Products of weights and activations in the batch; 0 without weights.
    peak: Products per second of the kernel's instructions on registers alone; None if
      the kernel has no such measurement.
  """

  name: str
  kernel: str
  seconds: float
  products: int
  peak: float | None

  @property
  def rate(self) -> float:
    """Products of weights and activations per second."""
    return self.products / self.seconds


def products(program: packed.Program) -> list[int]:
  """Returns the products of weights and activations of each operation for an image."""
  values = packed.infer_values(program)[1:]
  return [math.prod(value.shape[:2]) * op.kernel.size
          if isinstance(op, packed.Conv) else 0
          for op, value in zip(program.ops, values)]


def profile(
    program: packed.Program,
    network: native.Network,
    batch: int = 1,
    threads: int = 1,
    runs: int = 20,
) -> list[Pass]:
  """Measures the passes of a network. Times do not depend on the images.

  Args:
    program: The network's operations.
    network: The same network in the native library.
    batch: Number of images of a run.
    threads: Number of threads, which share each layer.
    runs: Number of runs, after one that is not measured.

  Returns:
    The passes, in their order.
  """
  images = np.zeros((batch, *network.shape), np.uint8)
  times = [network.profile(images, threads) for _ in range(runs + 1)][1:]
  peaks: dict[str, float | None] = {}
  passes = []
  for i, (seconds, work) in enumerate(zip(np.median(times, 0), products(program))):
    if not seconds:  # The operation is in the pass of a convolution.
      continue
    name, kernel = network.layers()[i]
    if kernel not in peaks:
      peaks[kernel] = peak_rate(network, i)
    peak = peaks[kernel]
    passes.append(Pass(name, kernel, float(seconds), work * batch,
                       None if peak is None else peak * threads))
  return passes


def peak_rate(network: native.Network, op: int) -> float | None:
  """Measures the largest rate of an operation's kernel on one thread.

  Returns:
    Products per second on registers alone; None if the kernel has no such measurement.
  """
  of_step = network.peak(op, 1)
  if not of_step:
    return None
  seconds = []
  for _ in range(_PEAK_RUNS):
    begin = time.perf_counter()
    count = network.peak(op, _PEAK_PRODUCTS // of_step)
    seconds.append((time.perf_counter() - begin) / count)
  return 1 / min(seconds)


def table(passes: Sequence[Pass]) -> str:
  """Formats passes as text, one in a line, and their sum."""
  lines = [f"{'operation':28}{'kernel':28}{'ms':>9}{'%':>5}{'GMAC/s':>9}"
           f"{'% of peak':>11}"]
  total = sum(p.seconds for p in passes)
  for p in passes:
    line = (f"{text.printable(p.name)[:27]:28}{p.kernel:28}{1e3 * p.seconds:9.3f}"
            f"{100 * p.seconds / total:5.0f}")
    if p.products:
      line += f"{p.rate / 1e9:9.0f}"
      line += f"{100 * p.rate / p.peak:11.0f}" if p.peak else ""
    lines.append(line)
  work = sum(p.products for p in passes)
  lines.append(f"{'all':56}{1e3 * total:9.3f}{100:5}{work / total / 1e9:9.0f}")
  return "\n".join(lines)
