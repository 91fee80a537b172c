"""SIGTERM and SIGINT: how a command that trains ends, from its first moment on.

A scheduler sends SIGTERM whenever it likes: while modules are imported, which takes
seconds, while data are read or XLA compiles, and between two training steps. As long as
nothing would be lost, the process ends at once. Later, `StopSignal` notes the signal
and the run saves its state first.

Python runs a signal's handler only when the main thread returns to Python code. That
may take minutes, in a compilation for example. Hence `watch` starts a thread, which
Python tells of each signal as it arrives, and which can end the process meanwhile.
"""

import contextlib
import logging
import multiprocessing
import os
import select
import signal
import sys
import threading
import time
from typing import Any

from minw import exit_codes

_log = logging.getLogger(__name__)

_SIGNALS = (signal.SIGTERM, signal.SIGINT)
_PATIENCE = 5.0  # Seconds from a second SIGINT to the end of a process that is busy.
_PARENT = "MINW_PARENT"  # Process without which this one has nothing to do.
_PARENT_SECONDS = 1.0  # How often it is looked for.

_watched = False
_arrivals = -1  # Open file from which the numbers of arriving signals are read.
_deciding = threading.Lock()  # Held while what arrived meets the handlers in force.


def watch() -> None:
  """Makes SIGTERM and SIGINT end this process at once, whatever it is doing.

  The exit code is `exit_codes.PREEMPTED` after SIGTERM and `exit_codes.INTERRUPTED`
  after SIGINT. A signal that has another handler later, as inside `StopSignal`, is left
  to that handler. A SIGINT that the parent process made this one ignore stays ignored.

  A command calls this in its main thread, before the imports that take seconds.
  """
  global _watched, _arrivals
  _watched = True
  _arrivals, write = os.pipe()
  os.set_blocking(_arrivals, False)
  os.set_blocking(write, False)
  signal.set_wakeup_fd(write, warn_on_full_buffer=False)
  os.register_at_fork(after_in_child=_forget)
  for number in _SIGNALS:
    if signal.getsignal(number) != signal.SIG_IGN:
      signal.signal(number, _end_soon)
  threading.Thread(target=_follow, daemon=True).start()


def _end_soon(*_: Any) -> None:
  """Handler of a signal upon which the thread of `watch` ends the process."""


def _follow() -> None:
  """Reads the numbers of arriving signals, and ends the process where one is to."""
  followed = os.environ.get(_PARENT) == str(os.getppid())
  parent = os.getppid()
  while True:
    ready, _, _ = select.select(
        [_arrivals], [], [], _PARENT_SECONDS if followed else None)
    if not ready:
      if os.getppid() != parent:
        followed = False
        os.kill(os.getpid(), signal.SIGTERM)
      continue
    with _deciding:
      for number in _arrived():
        handler = signal.getsignal(number)
        if handler is _end_soon:
          _end(number)
        elif isinstance(stop := getattr(handler, "__self__", None), StopSignal):
          stop.arrived(number)


def _arrived() -> bytes:
  """The numbers of the signals that arrived since the last call."""
  try:
    return os.read(_arrivals, 4096)
  except BlockingIOError:
    return b""


def _end(number: int) -> None:
  """Ends the process without waiting for its main thread, which may be anywhere."""
  line = "interrupted" if number == signal.SIGINT else (
      "stopped by SIGTERM; nothing is lost, and the same command starts or resumes the"
      " run")
  os.write(sys.__stderr__.fileno() if sys.__stderr__ else 2, f"{line}\n".encode())
  os._exit(exit_codes.INTERRUPTED if number == signal.SIGINT
           else exit_codes.PREEMPTED)


def _forget() -> None:
  """Gives signals of a forked process their default meaning: it has no such thread."""
  global _watched
  if signal.getsignal(signal.SIGTERM) is _end_soon:
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
  if signal.getsignal(signal.SIGINT) is _end_soon:
    signal.signal(signal.SIGINT, signal.default_int_handler)
  signal.set_wakeup_fd(-1)
  _watched = False


def following() -> dict[str, str]:
  """Environment variables that tell a child process to follow this one.

  If this process dies, a child that trains gets SIGTERM.
  """
  return {_PARENT: str(os.getpid())}


def end_with_parent() -> None:
  """Makes this process, one of `multiprocessing`, end when its parent is gone.

  A parent that is killed cannot end its workers, which would wait for it forever.
  (Linux can send a signal instead, but does so when the thread that started the process
  ends.)
  """
  process = multiprocessing.parent_process()
  assert process is not None, "this process was not started by multiprocessing"
  parent = process.pid

  def wait():
    while os.getppid() == parent:
      time.sleep(_PARENT_SECONDS)
    os._exit(exit_codes.FAILURE)

  threading.Thread(target=wait, daemon=True).start()


class StopSignal:
  """Notes SIGTERM, as sent before a preemption, and SIGINT instead of dying of them.

  In a command, `watch` ends the process at once until `hold` is called.

  Attributes:
    requested: Whether one of them came.
    interrupted: Whether SIGINT did. A second one raises KeyboardInterrupt. A command
      whose main thread does not get to that ends some seconds later.
  """

  def __init__(self):
    self.requested = self.interrupted = False
    self._interrupts = 0  # As counted by the thread of `watch`.
    self._previous = {}

  def __enter__(self):
    if not _watched:
      self.hold()
    return self

  def hold(self) -> None:
    """From now on there is something to save, and signals are noted."""
    if self._previous or threading.current_thread() is not threading.main_thread():
      return
    for number in _SIGNALS:
      # Whoever started this process in the background may have it ignore SIGINT.
      if number == signal.SIGTERM or signal.getsignal(number) != signal.SIG_IGN:
        self._previous[number] = signal.signal(number, self._note)

  def _note(self, number, _):
    if number == signal.SIGINT:
      if self.interrupted:
        raise KeyboardInterrupt
      self.interrupted = True
      _log.warning("interrupted: the run stops when its state is saved; another"
                   " interrupt stops it at once")
    self.requested = True

  def arrived(self, number: int) -> None:
    """Takes note, in the thread of `watch`, of a signal that has just arrived."""
    self._interrupts += number == signal.SIGINT
    if number == signal.SIGINT and self._interrupts == 2:
      timer = threading.Timer(_PATIENCE, _end, [number])
      timer.daemon = True
      timer.start()

  def __exit__(self, *_):
    with _deciding if _watched else contextlib.nullcontext():
      if _watched:
        _arrived()  # They were noted, and the thread must not act on them any more.
      self._restore()

  def _restore(self) -> None:
    for number, handler in self._previous.items():
      if handler is not None:
        signal.signal(number, handler)
