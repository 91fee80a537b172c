"""What tests of web pages share: packages, a network, a server and image files."""

import contextlib
import functools
import http.server
import pathlib
import shutil
import subprocess
import threading
from typing import Iterator

import numpy as np
from PIL import Image
import pytest

from minw import infer
from minw.export import web


def npm_package(folder: pathlib.Path, package: str) -> pathlib.Path:
  """The folder of a package that npm installs; skips without npm or its registry."""
  if not shutil.which("npm"):
    pytest.skip("npm is not installed")
  done = subprocess.run(["npm", "install", "--silent", "--ignore-scripts", package],
                        cwd=folder, capture_output=True, timeout=300)
  if done.returncode:
    pytest.skip(f"npm cannot install {package}")
  return folder / "node_modules" / package.partition("@")[0]


def write_digits(folder: pathlib.Path) -> pathlib.Path:
  """Writes the folder of the digits network with its samples, and returns it."""
  program = infer.load("digits_convnet").program
  web.write(folder, web.contents(program, "digits", web.own_samples(program)))
  return folder


@contextlib.contextmanager
def served(folder: pathlib.Path, policy: str = "") -> Iterator[str]:
  """The address at which a server has the files of a folder, under a policy."""
  class Handler(http.server.SimpleHTTPRequestHandler):
    def end_headers(self):
      if policy:
        self.send_header("Content-Security-Policy", policy)
      super().end_headers()

    def log_message(self, *_):
      pass

  with http.server.ThreadingHTTPServer(
      ("127.0.0.1", 0), functools.partial(Handler, directory=folder)) as server:
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
      yield f"http://127.0.0.1:{server.server_port}/"
    finally:
      server.shutdown()
      thread.join()


def photo(width: int, height: int) -> Image.Image:
  """A smooth picture in random colors."""
  rng = np.random.default_rng(width)
  small = Image.fromarray(rng.integers(0, 256, (6, 5, 3), np.uint8))
  return small.resize((width, height), Image.Resampling.BICUBIC)


def image_files(folder: pathlib.Path) -> dict[str, pathlib.Path]:
  """Image files of all kinds that a browser decodes, by what they are."""
  rng = np.random.default_rng(0)

  def random(mode, width, height):
    return Image.fromarray(
        rng.integers(0, 256, (height, width, 4), np.uint8)).convert(mode)

  exif = Image.Exif()
  made = {}
  for mode, suffix in (("RGB", "png"), ("L", "png"), ("P", "png"), ("RGB", "bmp"),
                       ("P", "gif"), ("RGBA", "png"), ("LA", "png")):
    made[f"{mode}.{suffix}"] = random(mode, 100, 70), {}
  made["16.png"] = Image.fromarray(rng.integers(0, 2**16, (40, 40), np.uint16)), {}
  made["exact.webp"] = random("RGB", 90, 80), {"lossless": True}
  for turn in range(1, 9):
    exif[0x0112] = turn
    options = {"exif": exif.tobytes()}
    made[f"{turn}.png"] = random("RGB", 60, 41), options
    made[f"{turn}.jpg"] = photo(60, 41), {"quality": 95, **options}
  for name, (image, options) in made.items():
    image.save(folder / name, **options)
  return {name: folder / name for name in made}
