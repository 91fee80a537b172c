"""Traces of programs at work, for TensorBoard's XProf and for Perfetto."""

import contextlib
import logging
import os
import pathlib
import tempfile
from typing import Any, Iterator

import jax

from minw import display
from minw import distributed
from minw import errors
from minw import files
from minw import paths

_log = logging.getLogger(__name__)

STEP = "train_step"  # Name of a training step in a trace.

Steps = tuple[int, int]  # First step, and the step after the last one, counted from 0.


def check_steps(steps: Steps | None, num_steps: int) -> None:
  """Checks that steps belong to a run of `num_steps` steps.

  Raises:
    errors.UsageError: They do not.
  """
  if steps is not None:
    first, last = steps
    errors.check(0 <= first < last <= num_steps, "profile", f"{first}:{last}",
                 "FIRST:LAST with FIRST less than LAST, and LAST at most"
                 f" {num_steps}, the number of steps of the run")


@contextlib.contextmanager
def trace(folder: str | os.PathLike) -> Iterator[None]:
  """Context whose work is traced.

  Args:
    folder: Local folder. The trace is written to `plugins/profile/TIME` in it.
  """
  options = jax.profiler.ProfileOptions()
  options.python_tracer_level = 0  # Calls of Python would be most of a trace.
  with jax.profiler.trace(folder, profiler_options=options):
    yield


@contextlib.contextmanager
def step_traced(workdir: str, steps: Steps | None) -> Iterator["StepTrace"]:
  """Context of a training loop. It yields what the loop tells of each step.

  Args:
    workdir: Directory of the run. Each process writes two files to
      `profile/plugins/profile/steps_FIRST_LAST`.
    steps: Steps that are traced; None for none.
  """
  result = StepTrace(workdir, steps)
  with contextlib.closing(result):
    yield result
  if steps and not result.begun:
    _log.warning("profile=%d:%d: this start of the run did none of these steps", *steps)


class StepTrace:
  """Names the steps of training in traces, and writes a trace of some of them.

  A failing trace is logged as a warning and does not end the run.

  Attributes:
    begun: Whether the trace was begun.
  """

  def __init__(self, workdir: str, steps: Steps | None):
    self.begun = False
    self._workdir = workdir
    self._first, self._last = steps or (0, 0)
    self._trace = contextlib.ExitStack()
    self._loss: Any = None  # That of the last step.

  @contextlib.contextmanager
  def step(self, step: int) -> Iterator[None]:
    """Context of a training step. `step` is its number, counted from 0."""
    if not self.begun and self._first <= step < self._last:
      self.begun = True
      jax.block_until_ready(self._loss)  # Earlier steps are not in the trace.
      with display.harmless("the profile cannot be begun"):
        self._trace.enter_context(self._tracing())
    with jax.profiler.StepTraceAnnotation(STEP, step_num=step):
      yield

  def stepped(self, step: int, loss: Any) -> None:
    """Ends the trace if its last step was dispatched.

    Args:
      step: Number of steps done.
      loss: Array that the last step computes.
    """
    self._loss = loss
    if step == self._last:
      self.close()

  def close(self) -> None:
    """Ends the trace if it is not ended yet."""
    with display.harmless("the profile cannot be written"):
      self._trace.close()

  @contextlib.contextmanager
  def _tracing(self) -> Iterator[None]:
    with tempfile.TemporaryDirectory(prefix="minw-profile-") as folder:
      with trace(folder):
        yield
        jax.block_until_ready(self._loss)
      self._copy(folder)

  def _copy(self, folder: str) -> None:
    """Copies the files of a trace to the workdir, under a name of this process."""
    target = paths.at(self._workdir)
    for name in ("profile", "plugins", "profile", f"steps_{self._first}_{self._last}"):
      target = target / name
    target.mkdir(parents=True, exist_ok=True)
    process, _ = distributed.share()
    for kind in ("xplane.pb", "trace.json.gz"):
      path, = pathlib.Path(folder).glob(f"plugins/profile/*/*.{kind}")
      files.write(target / f"process_{process}.{kind}", path.read_bytes())
