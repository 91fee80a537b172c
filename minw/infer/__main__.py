"""Run packed networks on images: `python -m minw.infer --model=FILE --images=FILES`.

FILE is a file that `minw.pack` wrote, or the name of a network that comes with minw,
digits_convnet for example.
"""

import os
import sys
from typing import Iterable

from absl import flags

from minw import cli
from minw import errors
from minw import infer
from minw import packed
from minw import profiling
from minw import text
from minw.data import image_files


def print_predictions(
    network: infer.Network, files: Iterable[str | os.PathLike], top: int,
    background: str,
) -> int:
  """Prints the prediction of each image on a line.

  An image that cannot be read gets a line on standard error instead.

  Args:
    network: The network.
    files: Paths of the images.
    top: Number of classes for each image.
    background: Color behind transparent parts: a name, #rrggbb or R,G,B.

  Returns:
    The exit code: 0 if all images were read, 2 if there was one image and it was not,
    and 1 if any of several images was not.
  """
  image_files.silence_pillow()
  hidden = sys.stderr.isatty() and not sys.stdout.isatty()
  count = bad = 0
  for file, result in infer.predict_files(network, files, top, background=background):
    count += 1
    if isinstance(result, infer.Prediction):
      print(_line(file, result))
    else:
      bad += 1
      cli.print_error(f"images={os.fspath(file)!r}: {result}")
    if hidden and count % 1000 == 0:  # The predictions do not go to the terminal.
      print(f"{count:,} images", file=sys.stderr)
  return 2 if bad == count == 1 else int(bad > 0)


def _line(file: str | os.PathLike, prediction: infer.Prediction) -> str:
  """Returns the file, then each label and its score, separated by tabs."""
  pairs = zip(prediction.labels, prediction.scores)
  fields = [os.fspath(file)]
  for label, score in pairs:
    fields += [label, f"{score:.4f}"]
  return "\t".join(map(text.printable, fields))


def define_flags() -> None:
  """Defines the flags of the command."""
  cli.DEFINE_path(
      "model", None,
      "Packed network: a file, or the name of a network that comes with minw.")
  cli.DEFINE_paths("images", "Image files, or folders of them.", positional=True)
  flags.DEFINE_enum(
      "backend", None, infer.BACKENDS,
      "Inference backend; the first available one by default.")
  flags.DEFINE_integer(
      "threads", None,
      "Number of threads of the native backend; one for each core by default.",
      lower_bound=1)
  flags.DEFINE_bool(
      "limits", True,
      "Whether to refuse a network that takes much memory or time for its"
      " size. Leave this on for files that you do not trust.")
  flags.DEFINE_bool(
      "kernels", False, "Whether to list the kernel that ran each operation.")
  flags.DEFINE_bool(
      "profile", False,
      "Whether to list the time of each operation for one image: milliseconds, the rate"
      " of products, and its share of the kernel's largest rate.")
  flags.DEFINE_integer(
      "top", 1, "Number of classes that are listed for each image.", lower_bound=1)
  flags.DEFINE_string(
      "background", "black",
      "Color behind transparent parts of images: a name, #rrggbb or R,G,B.")
  cli.require("model", "images")


def main() -> int:
  """Predicts the labels of images as the flags say; returns the exit code."""
  f = flags.FLAGS
  network = infer.load_for_command(
      f.model, backend=f.backend, threads=f.threads,
      limits=packed.Limits() if f.limits else packed.UNLIMITED)
  errors.check(not f.profile or network.backend == "native", "profile", True,
               f"used with --backend=native; the backend is {network.backend}")
  code = print_predictions(network, infer.image_files(f.images), f.top, f.background)
  if f.kernels:
    for name, kernel in network.kernels():
      print(f"{text.printable(name)}\t{kernel}")
  if f.profile:
    print(profiling.table(network.profile()))
  return code


if __name__ == "__main__":
  cli.run(main, define_flags)
