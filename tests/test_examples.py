"""examples/draw_characters.py; tests/test_export_cortex_m.py runs the firmware."""

import importlib.util
import pathlib
import string
import subprocess
import sys

import numpy as np
from PIL import Image
from PIL import ImageFont

SCRIPT = pathlib.Path(__file__).parents[1] / "examples" / "draw_characters.py"


def load():
  spec = importlib.util.spec_from_file_location("draw_characters", SCRIPT)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


def test_every_font_has_every_character():
  """A missing character would be drawn as nothing, or as the box of a missing one."""
  fonts = load().FONTS
  assert len(fonts) >= 10
  for font in fonts:
    font = ImageFont.truetype(font, 40)
    drawn = {bytes(font.getmask(c)) for c in string.digits + string.ascii_letters}
    assert len(drawn) == 62 and b"" not in drawn
    assert bytes(font.getmask("\ue123")) not in drawn


def test_a_character_in_random_ways():
  draw = load().draw
  images = [np.asarray(draw("Q", 20, np.random.default_rng(i // 2))) for i in range(20)]
  assert all(image.shape == (20, 20) and image.dtype == np.uint8 for image in images)
  for i in range(0, 20, 2):
    np.testing.assert_array_equal(images[i], images[i + 1])
  assert len({image.tobytes() for image in images}) == 10
  # Ink is darker than paper, which surrounds it.
  assert all(np.median(image[:2]) - image.min() > 40 for image in images)


def test_a_folder_for_each_class(tmp_path):
  subprocess.run(
      [sys.executable, SCRIPT, tmp_path / "drawn", "--characters=7aA", "--images=2",
       "--side=12"], check=True)
  files = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*.png"))
  assert files == [f"drawn/{name}/{i:04}.png" for name in ("7", "A", "small_a")
                   for i in range(2)]
  with Image.open(tmp_path / files[0]) as image:
    assert image.size == (12, 12) and image.mode == "L"
