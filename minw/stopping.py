"""Handling of SIGTERM and SIGINT in commands that train.

A scheduler can send SIGTERM at any time: while modules are imported, which takes
seconds, while data are read, while XLA compiles, or between two training steps. As long
as nothing would be lost, the process exits at once. Later, `StopSignal` notes the
signal, and the run saves its state before it exits.

Python runs a signal handler only when the main thread returns to Python code. That may
take minutes, for example during a compilation. Therefore `watch` starts a thread that
reads each signal as it arrives and can end the process in the meantime.
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
from typing import Any, NoReturn

from minw import exit_codes

_log = logging.getLogger(__name__)

_SIGNALS = (signal.SIGTERM, signal.SIGINT)
_PATIENCE = 5.0  # Seconds from a second SIGINT to the end of a process that is busy.
_PARENT = "MINW_PARENT"  # Variable with the id of the parent process to follow.
_PARENT_SECONDS = 1.0  # Seconds between two checks that the parent is alive.

_watched = False
_arrivals = -1  # File descriptor that delivers the numbers of arriving signals.
_deciding = threading.Lock()  # Held while arrived signals are matched with handlers.


def watch() -> None:
  """Makes SIGTERM and SIGINT end this process at once, whatever it is doing.

  The exit code is `exit_codes.PREEMPTED` after SIGTERM and `exit_codes.INTERRUPTED`
  after SIGINT. If a signal gets another handler later, as inside `StopSignal`, that
  handler decides. If the parent process made this one ignore SIGINT, it stays ignored.

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
  """Marks a signal as fatal: the thread of `watch` ends the process when it arrives."""


def _follow() -> None:
  """Reads the numbers of arriving signals, and acts on each by its current handler.

  The signal ends the process if its handler is `_end_soon`, and is passed to the
  `StopSignal` if it belongs to one. If the process follows its parent and the parent
  is gone, the thread sends SIGTERM to this process.
  """
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
  """Returns the numbers of the signals that arrived since the last call."""
  try:
    return os.read(_arrivals, 4096)
  except BlockingIOError:
    return b""


def _end(number: int) -> None:
  """Ends the process without waiting for its main thread, which may be busy."""
  line = "interrupted" if number == signal.SIGINT else (
      "stopped by SIGTERM; nothing is lost, and the same command starts or resumes the"
      " run")
  _end_saying(line, exit_codes.INTERRUPTED if number == signal.SIGINT
              else exit_codes.PREEMPTED)


def _end_saying(line: str, code: int) -> NoReturn:
  os.write(sys.__stderr__.fileno() if sys.__stderr__ else 2, f"{line}\n".encode())
  os._exit(code)


def end_command(line: str, code: int) -> None:
  """Ends this process at once if it is a command that has called `watch`.

  Any thread may call this. Processes that use minw as a library are not ended.

  Args:
    line: Line that says why.
    code: Exit code.
  """
  if _watched:
    _end_saying(line, code)


def _forget() -> None:
  """Restores the default signal handlers in a forked process.

  Threads are not inherited by a fork. Without this, no thread would read the signals
  there.
  """
  global _watched
  if signal.getsignal(signal.SIGTERM) is _end_soon:
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
  if signal.getsignal(signal.SIGINT) is _end_soon:
    signal.signal(signal.SIGINT, signal.default_int_handler)
  signal.set_wakeup_fd(-1)
  _watched = False


def following() -> dict[str, str]:
  """Returns environment variables that tell a child process to follow this one.

  If this process dies, a child that has called `watch` sends itself SIGTERM.
  """
  return {_PARENT: str(os.getpid())}


def end_with_parent() -> None:
  """Makes a process of `multiprocessing` end when its parent is gone.

  A parent that is killed cannot end its workers, and they would wait for it forever.
  (Linux can send a signal when the parent dies. But it does so as soon as the thread
  that started the process ends.)
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
  """Context in which SIGTERM and SIGINT are noted and do not end the process.

  Schedulers send SIGTERM before a preemption. In a command that has called `watch`,
  both signals still end the process at once until `hold` is called.

  Attributes:
    requested: Whether SIGTERM or SIGINT has arrived.
    interrupted: Whether SIGINT has arrived. A second SIGINT raises KeyboardInterrupt.
      If the main thread of a command is too busy for that, the process ends some
      seconds later.
  """

  def __init__(self):
    self.requested = self.interrupted = False
    self._interrupts = 0  # Number of SIGINTs that the thread of `watch` has seen.
    self._previous = {}

  def __enter__(self):
    if not _watched:
      self.hold()
    return self

  def hold(self) -> None:
    """Starts noting signals, because from now on there is a state to save."""
    if self._previous or threading.current_thread() is not threading.main_thread():
      return
    for number in _SIGNALS:
      # A shell may make a process that it starts in the background ignore SIGINT.
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
    """Counts interrupts. The thread of `watch` calls this when a signal arrives."""
    self._interrupts += number == signal.SIGINT
    if number == signal.SIGINT and self._interrupts == 2:
      timer = threading.Timer(_PATIENCE, _end, [number])
      timer.daemon = True
      timer.start()

  def __exit__(self, *_):
    with _deciding if _watched else contextlib.nullcontext():
      if _watched:
        _arrived()  # `_note` has handled these signals. The thread must ignore them.
      self._restore()

  def _restore(self) -> None:
    for number, handler in self._previous.items():
      if handler is not None:
        signal.signal(number, handler)
