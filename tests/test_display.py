"""minw.display: how runs that are started from Python are shown."""

import io
import logging
import sys
import types
from unittest import mock

import pytest
import tqdm.auto

from minw import display
from minw import distributed

LOGGER = logging.getLogger("minw.display_test")


def log_in_a_run(*handlers):
  """With these handlers of the root logger, and none of pytest's."""
  with mock.patch.object(logging.root, "handlers", [*handlers]):
    with display.shown("run", 3) as show:
      LOGGER.info("epoch %d", 1)
      show(3)
    LOGGER.info("after the run")


def test_lines_on_stderr(capsys):
  log_in_a_run()
  assert capsys.readouterr() == ("", "epoch 1\n")
  log_in_a_run()  # The first run left nothing behind.
  assert capsys.readouterr() == ("", "epoch 1\n")


def test_handlers_of_the_program_are_used(capsys):
  stream = io.StringIO()
  log_in_a_run(logging.StreamHandler(stream))
  assert stream.getvalue() == "epoch 1\n"
  assert capsys.readouterr().err == ""


def test_a_program_that_shows_info_is_left_as_it_is():
  stream = io.StringIO()
  level = logging.root.level
  logging.root.setLevel(logging.INFO)
  try:
    log_in_a_run(logging.StreamHandler(stream))
  finally:
    logging.root.setLevel(level)
  assert stream.getvalue() == "epoch 1\nafter the run\n"


@pytest.mark.parametrize("level", [logging.WARNING, logging.CRITICAL])
def test_a_level_silences(capsys, level):
  logging.getLogger("minw").setLevel(level)
  try:
    log_in_a_run()
  finally:
    logging.getLogger("minw").setLevel(logging.NOTSET)
  assert capsys.readouterr() == ("", "")


def test_other_processes_are_silent(capsys, monkeypatch):
  monkeypatch.setattr(distributed, "is_main", lambda: False)
  log_in_a_run()
  assert capsys.readouterr() == ("", "")


def test_a_bar_in_a_notebook(capsys, monkeypatch):
  """It begins at the step that the run resumes from."""
  kernel = types.SimpleNamespace(kernel=object())
  monkeypatch.setitem(sys.modules, "IPython",
                      types.SimpleNamespace(get_ipython=lambda: kernel))
  bars = []

  class Bar(tqdm.auto.tqdm):
    def __init__(self, **options):
      super().__init__(file=io.StringIO(), **options)
      bars.append(self)

  monkeypatch.setattr(tqdm.auto, "tqdm", Bar)
  with display.shown("runs/digits", 40) as show:
    LOGGER.info("epoch 1")
    show(10)
    show(11)
    show(20, "loss 0.5")
  bar, = bars
  assert (bar.initial, bar.n, bar.total) == (10, 20, 40)
  assert bar.desc.startswith("runs/digits") and bar.postfix == "loss 0.5"
  assert bar.disable  # It was closed.
  assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("module, expected", [
    (None, False),
    (types.SimpleNamespace(get_ipython=lambda: None), False),
    (types.SimpleNamespace(get_ipython=lambda: types.SimpleNamespace()), False),
    (types.SimpleNamespace(get_ipython=lambda: types.SimpleNamespace(kernel=1)), True),
])
def test_in_notebook(monkeypatch, module, expected):
  monkeypatch.setitem(sys.modules, "IPython", module)
  assert display.in_notebook() == expected


def test_an_error_of_a_bar_does_not_end_the_run(caplog, monkeypatch):
  kernel = types.SimpleNamespace(kernel=object())
  monkeypatch.setitem(sys.modules, "IPython",
                      types.SimpleNamespace(get_ipython=lambda: kernel))

  def fail(**_):
    raise OSError("no more")

  monkeypatch.setattr(tqdm.auto, "tqdm", fail)
  with display.shown("runs/digits", 40) as show:
    for step in range(3):
      show(step)
  warning, = caplog.records
  assert warning.getMessage() == "the bar of progress cannot be shown (no more)"


def test_harmless(caplog):
  with display.harmless("a picture cannot be drawn"):
    raise ValueError("no ink")
  warning, = caplog.records
  assert warning.getMessage() == "a picture cannot be drawn (no ink)"
  with pytest.raises(KeyboardInterrupt), display.harmless("a picture cannot be drawn"):
    raise KeyboardInterrupt
