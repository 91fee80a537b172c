"""Signals before, while and after a command has something to save."""

import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest

from minw import stopping

ROOT = pathlib.Path(stopping.__file__).parents[1]

# Work in C that takes minutes, during which Python runs no handlers of signals.
_BUSY = "import hashlib; print('ready', flush=True); " \
        "hashlib.pbkdf2_hmac('sha256', b'', b'', 10**9)"


@pytest.fixture
def start():
  """start(code, **environment): a Python process, once it has printed a line."""
  processes = []

  def start(code, **environment):
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        text=True, env={**os.environ, "PYTHONPATH": str(ROOT), **environment})
    processes.append(process)
    assert process.stdout.readline() == "ready\n"
    return process

  yield start
  for process in processes:
    process.kill()
    process.communicate()


@pytest.mark.parametrize("number, code, line", [
    (signal.SIGTERM, 75, "stopped by SIGTERM; nothing is lost, and the same command"
                         " starts or resumes the run\n"),
    (signal.SIGINT, 130, "interrupted\n")])
def test_a_signal_ends_a_busy_process(start, number, code, line):
  process = start(f"from minw import stopping; stopping.watch(); {_BUSY}")
  process.send_signal(number)
  assert process.communicate(timeout=20) == ("", line)
  assert process.returncode == code


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_what_is_held_is_noted(start, number):
  process = start(f"""if True:
      import os, signal, time
      from minw import stopping
      stopping.watch()
      with stopping.StopSignal() as stop:
        stop.hold()
        os.kill(os.getpid(), {int(number)})
        assert (stop.requested, stop.interrupted) == (True, {number == signal.SIGINT})
      print("ready", flush=True)
      time.sleep(60)""")
  process.send_signal(number)  # Nothing is held any more.
  process.wait(timeout=20)
  assert process.returncode == (130 if number == signal.SIGINT else 75)


def test_a_second_interrupt_ends_a_busy_process(start):
  process = start(f"""if True:
      from minw import stopping
      stopping.watch()
      stopping._PATIENCE = 0.5
      stop = stopping.StopSignal().__enter__()
      stop.hold()
      {_BUSY}""")
  process.send_signal(signal.SIGINT)
  process.send_signal(signal.SIGTERM)  # It is no interrupt.
  time.sleep(1)
  assert process.poll() is None
  process.send_signal(signal.SIGINT)
  assert process.wait(timeout=20) == 130


def test_other_handlers_stay_in_charge(start):
  process = start("""if True:
      import signal, sys, time
      from minw import stopping
      stopping.watch()
      signal.signal(signal.SIGTERM, lambda *_: sys.exit(7))
      print("ready", flush=True)
      time.sleep(60)""")
  process.send_signal(signal.SIGTERM)
  assert process.wait(timeout=20) == 7


def test_an_ignored_interrupt_stays_ignored(start):
  process = start("""if True:
      import signal, time
      signal.signal(signal.SIGINT, signal.SIG_IGN)
      from minw import stopping
      stopping.watch()
      print("ready", flush=True)
      time.sleep(60)""")
  process.send_signal(signal.SIGINT)
  time.sleep(0.5)
  assert process.poll() is None


def test_a_forked_process_has_the_ordinary_handlers(start):
  """Signals of it must not count as those of its parent."""
  process = start("""if True:
      import os, signal, time
      from minw import stopping
      stopping.watch()
      child = os.fork()
      if not child:
        time.sleep(60)
      time.sleep(0.2)
      os.kill(child, signal.SIGTERM)
      code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
      assert code == -signal.SIGTERM, code
      time.sleep(0.5)
      print("ready", flush=True)""")
  assert process.wait(timeout=20) == 0


def test_a_child_ends_with_the_parent_that_it_follows(tmp_path):
  child = f"from minw import stopping; stopping.watch(); {_BUSY}"
  process = subprocess.Popen(
      [sys.executable, "-c", f"""if True:
          import os, subprocess, sys, time
          from minw import stopping
          log = open({str(tmp_path / "log")!r}, "w")
          child = subprocess.Popen(
              [sys.executable, "-c", {child!r}], stdout=subprocess.PIPE, stderr=log,
              env={{**os.environ, **stopping.following()}})
          child.stdout.readline()
          print(child.pid, flush=True)
          time.sleep(60)"""],
      text=True, stdout=subprocess.PIPE, env={**os.environ, "PYTHONPATH": str(ROOT)})
  with process:
    pid = int(process.stdout.readline())
    process.kill()
  deadline = time.monotonic() + 20
  while pathlib.Path(f"/proc/{pid}").exists() and time.monotonic() < deadline:
    time.sleep(0.05)
  assert (tmp_path / "log").read_text().startswith("stopped by SIGTERM")
