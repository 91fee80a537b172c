"""A campaign of damaged images: each is read, or refused with the one error.

The variable MINW_IMAGE_MUTANTS has their number; 30000 take two minutes.
"""

import json
import os
import pathlib
import subprocess
import sys

import pytest

import image_mutants

SCRIPT = pathlib.Path(image_mutants.__file__)


def run(*arguments):
  """The report on images that were read in another process."""
  environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
  ended = subprocess.run(
      [sys.executable, SCRIPT, *map(str, arguments)], check=False, text=True,
      capture_output=True, env=environment)
  assert ended.returncode == 0, ended.stderr[-5000:]  # Else a crash, or a hang.
  return json.loads(ended.stdout)


def check(report, count, peak):
  assert {*report["outcomes"]} <= {"read", "refused"}, report
  assert sum(report["outcomes"].values()) == count
  assert report["peak"] < peak
  assert report["slowest"] < 60  # Seconds of a core; usually a few.


def test_originals_are_read(tmp_path):
  """All but animations, which are four."""
  outcomes = []
  for _, content in image_mutants.originals():
    (tmp_path / "image.png").write_bytes(content)
    outcomes.append(image_mutants.read(tmp_path / "image.png"))
  assert outcomes.count("refused") == 4 and outcomes.count("read") == len(outcomes) - 4


def test_thin_images_take_little_memory():
  report = run("thin")
  assert report["outcomes"] == {"read": 6, "refused": 3}
  check(report, 9, 200 * 2**20)


def test_some_mutants():
  check(run("mutants", 0, 300), 300, 2**30)


@pytest.mark.slow
def test_many_mutants():
  count = int(os.environ.get("MINW_IMAGE_MUTANTS", "10000"))
  check(run("mutants", 1000, count), count, 2 * 2**30)


@pytest.mark.slow
def test_largest_images():
  """Making them takes memory, too."""
  report = run("largest")
  assert report["outcomes"] == {"read": 3}
  check(report, 3, 2.5 * 2**30)
