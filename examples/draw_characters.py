"""Draw an image data set of characters, as a folder of PNG files for each class.

  python draw_characters.py FOLDER [--characters=ABC...] [--images=100] [--side=24]

Each image is a digit or a letter in one of the DejaVu fonts of matplotlib.
Font, size, angle, place, brightness and noise are random.
"""

import argparse
import pathlib
import string

import matplotlib
import numpy as np
from PIL import Image
from PIL import ImageDraw
from PIL import ImageFont

_FOLDER = pathlib.Path(matplotlib.get_data_path(), "fonts", "ttf")
# The Display fonts have no letters.
FONTS = sorted(path for path in _FOLDER.glob("DejaVu*.ttf")
               if "Display" not in path.name)


def draw(character: str, side: int, random: np.random.Generator) -> Image.Image:
  """Draws a gray image of a character.

  Args:
    character: The character.
    side: Height and width of the image in pixels.
    random: Source of what is random.
  """
  # Four times as large, to be scaled down smoothly.
  large = 4 * side
  font = ImageFont.truetype(random.choice(FONTS), random.uniform(0.65, 0.95) * large)
  mask = Image.new("L", (large, large))
  place = large / 2 + random.uniform(-0.08, 0.08, 2) * large
  ImageDraw.Draw(mask).text(tuple(place), character, 255, font, anchor="mm")
  mask = mask.rotate(random.uniform(-15, 15), Image.Resampling.BILINEAR)
  ink = np.asarray(mask.resize((side, side), Image.Resampling.BOX)) / 255
  paper = random.uniform(130, 240)
  pixels = paper + (random.uniform(10, 90) - paper) * ink
  pixels += random.normal(0, 12, pixels.shape)
  return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))


def folder_name(character: str) -> str:
  """Names a class. Some file systems do not tell small letters from capital ones."""
  return f"small_{character}" if character.islower() else character


def main() -> None:
  """Draws the images that the command line asks for."""
  parser = argparse.ArgumentParser(
      description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("folder", type=pathlib.Path)
  parser.add_argument("--characters", default=string.digits + string.ascii_uppercase,
                      help="classes, 62 at most with all letters")
  parser.add_argument("--images", type=int, default=100, help="images of each class")
  parser.add_argument("--side", type=int, default=24, help="height and width in pixels")
  parser.add_argument("--seed", type=int, default=0)
  arguments = parser.parse_args()
  random = np.random.default_rng(arguments.seed)
  for character in arguments.characters:
    folder = arguments.folder / folder_name(character)
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(arguments.images):
      draw(character, arguments.side, random).save(folder / f"{i:04}.png")


if __name__ == "__main__":
  main()
