"""Display of a run that was started from Python.

Progress is shown as lines on stderr, or as a bar in a notebook. Commands and programs
that handle minw's log records themselves are not affected. Nothing is shown if the
level of the logger "minw" was set above INFO.
"""

import contextlib
import logging
import sys
from typing import Callable, Iterator

from minw import distributed

_LOGGER = logging.getLogger("minw")


@contextlib.contextmanager
def shown(name: str, num_steps: int) -> Iterator[Callable[..., None]]:
  """Shows the progress of a run inside this context, unless it is shown already.

  Args:
    name: Label of the bar.
    num_steps: Number of steps of the whole run.

  Yields:
    A function of the number of steps done, and of a new text for the bar, if any.
  """
  if (_LOGGER.level or _LOGGER.isEnabledFor(logging.INFO)
      or not distributed.is_main()):
    yield lambda step, text="": None
  elif in_notebook():
    with contextlib.closing(_Bar(name, num_steps)) as bar:
      yield bar.show
  else:
    with _lines():
      yield lambda step, text="": None


@contextlib.contextmanager
def harmless(what: str) -> Iterator[None]:
  """Context that logs errors as warnings, because a failing display must not end a run.

  Args:
    what: Clause that describes the failure.
  """
  try:
    yield
  except Exception as error:  # pylint: disable=broad-exception-caught
    _LOGGER.warning("%s (%s)", what, error)


def in_notebook() -> bool:
  """Returns whether this process is the kernel of a notebook."""
  ipython = sys.modules.get("IPython")
  return ipython is not None and hasattr(ipython.get_ipython(), "kernel")


class _Bar:
  """A progress bar. It starts at the step with which it is first shown."""

  def __init__(self, name: str, num_steps: int):
    self._name, self._num_steps = name, num_steps
    self._bar = None
    self._failed = False

  def show(self, step: int, text: str = "") -> None:
    if not self._failed:
      self._failed = True
      with harmless("the bar of progress cannot be shown"):
        self._show(step, text)
        self._failed = False

  def close(self) -> None:
    if self._bar is not None:
      with harmless("the bar of progress cannot be closed"):
        self._bar.close()

  def _show(self, step: int, text: str) -> None:
    if self._bar is None:
      from tqdm import auto  # The import warns if a notebook has no widgets.
      self._bar = auto.tqdm(
          desc=self._name, total=self._num_steps, initial=step, unit="step")
    self._bar.update(step - self._bar.n)
    if text:
      self._bar.set_postfix_str(text)


@contextlib.contextmanager
def _lines() -> Iterator[None]:
  """Enables INFO records. They are written to stderr if they have no handler."""
  handler = None
  if not _has_handler():
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(message)s"))
    _LOGGER.addHandler(handler)
  _LOGGER.setLevel(logging.INFO)
  try:
    yield
  finally:
    _LOGGER.setLevel(logging.NOTSET)
    if handler is not None:
      _LOGGER.removeHandler(handler)


def _has_handler() -> bool:
  logger = _LOGGER
  while logger is not None:
    if any(handler.level <= logging.INFO for handler in logger.handlers):
      return True
    logger = logger.parent if logger.propagate else None
  return False
