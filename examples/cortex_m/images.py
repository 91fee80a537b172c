"""Write images as a C header for the firmware.

  python images.py MODEL FILES_OR_FOLDERS > images.h

MODEL is a packed network. Its images are read as `minw.infer` reads them.
"""

import json
import sys

from minw import infer


def main(model: str, *paths: str) -> None:
  """Prints the header."""
  program = infer.load(model).program
  files = list(infer.image_files(paths))
  images = infer.read_images(files, program.source_shape, infer.shrinks(program))
  print(f"#define IMAGES {len(images)}")
  print(f"static const unsigned char images[][{images[0].size}] = {{")
  for image in images:
    print("{" + ",".join(map(str, image.ravel())) + "},")
  print("};")
  names = ", ".join(json.dumps(str(file)) for file in files)
  print(f"static const char *const names[] = {{{names}}};")


if __name__ == "__main__":
  main(*sys.argv[1:])
