"""Inference of packed networks: `python -m minw.infer --model=FILE --images=FILES`.

FILE is what `minw.pack` wrote, or the name of a network that comes with minw:
`shipped`.

  network = infer.load("net.minw")
  logits = network.logits(images)  # uint8 (batch, height, width, channels)

needs NumPy and the native library. Where that was not built, JAX runs the network, or
slowly NumPy; nothing that training needs is imported.
"""

import functools
import logging
import os
import pathlib
from typing import Sequence

from absl import flags
import numpy as np
from PIL import Image

from minw import cli
from minw import dependencies
from minw import images as images_lib
from minw import packed
from minw.kernels import native
from minw.kernels import reference

_log = logging.getLogger(__name__)

BACKENDS = ("native", "xla", "reference")


class Network:
  """A packed network, ready to run. `logits` may be called from several threads.

  Attributes:
    program: what it computes, see `minw.packed`.
    labels: a name for each class; its number where the file has none.
    backend: one of `BACKENDS`.
    threads: how many the native path uses.
  """

  def __init__(self, data: bytes, backend: str | None, threads: int | None):
    cli.check(backend in (None, *BACKENDS), "backend", backend,
              f"one of {', '.join(BACKENDS)}")
    self.program = packed.from_bytes(data)
    self.labels = tuple(self.program.metadata.get("labels") or map(
        str, range(self.program.num_classes)))
    self.threads = threads or len(os.sched_getaffinity(0))
    self.backend = backend or _default_backend()
    if self.backend == "native":
      self._native = native.load(data)
    elif self.backend == "xla":  # The only one that needs JAX.
      try:
        import jax
      except ImportError as error:
        raise cli.UsageError(
            "backend='xla' needs JAX, which is not installed: pip install jax") from error
      from minw.kernels import xla
      operands, function = xla.logits(self.program)
      self._logits = functools.partial(jax.jit(function), operands)

  def logits(self, images: np.ndarray) -> np.ndarray:
    """The logits of a batch.

    Args:
      images: uint8 (batch, *program.source_shape); the batch may be of any size.

    Returns:
      float32 (batch, classes).

    Raises:
      ValueError: images of another shape or dtype, or none.
    """
    images = self._checked(images)
    if self.backend == "native":
      return self._native.logits(images, threads=self.threads)
    if self.backend == "xla":
      return np.asarray(self._logits(images))
    return reference.logits(self.program, images)

  def values(self, images: np.ndarray) -> list[np.ndarray]:
    """All values, of the image and of each operation; see `reference.run`."""
    images = self._checked(images)
    if self.backend == "native":
      return self._native.values(images)
    if self.backend == "xla":
      return [np.asarray(value) for value in self._xla_values(images)]
    return reference.run(self.program, images)

  @functools.cached_property  # Few ask for values, which need operands of their own.
  def _xla_values(self):
    import jax
    from minw.kernels import xla
    operands, function = xla.values(self.program)
    return functools.partial(jax.jit(function), operands)

  def kernels(self) -> list[tuple[str, str]]:
    """Which kernel runs each operation: (name, kernel)."""
    if self.backend == "native":
      return self._native.layers()
    return [(op.name, self.backend) for op in self.program.ops]

  def _checked(self, images):
    images = np.asarray(images)
    shape = self.program.source_shape
    if images.dtype != np.uint8:
      raise ValueError(f"images of {images.dtype}: must be uint8, 0 to 255")
    if images.ndim != 4 or images.shape[1:] != shape or not len(images):
      raise ValueError(
          f"images of shape {images.shape}: must be (batch, {shape[0]}, {shape[1]},"
          f" {shape[2]}), a batch of at least one")
    return images


@functools.cache  # To say it once.
def _default_backend():
  if native.available():
    return "native"
  backend, name = "reference", "NumPy"
  if dependencies.installed("jax"):
    backend, name = "xla", "XLA"
  _log.warning("the native library was not built (is there a C++ compiler?): packed"
               " networks run through %s, which is slower", name)
  return backend


def load(
    path: str | os.PathLike, *, backend: str | None = None, threads: int | None = None
) -> Network:
  """Loads a packed network.

  Args:
    path: of a file that `minw.pack` wrote; where there is none, the name of one of
      the networks that come with minw.
    backend: "native", "xla" or "reference"; the first that is there if None.
    threads: of the native path; as many as there are cores if None.

  Raises:
    OSError: there is no such file or network, or it can not be read.
    ValueError: the file is not a packed network, or damaged.
  """
  known = shipped()
  if not os.path.exists(path):
    if str(path) not in known:
      raise FileNotFoundError(
          f"neither a file nor a network that comes with minw ({', '.join(known)})")
    path = known[str(path)]
  return Network(pathlib.Path(path).read_bytes(), backend, threads)


def shipped() -> dict[str, pathlib.Path]:
  """The networks that come with minw, by name; beside each is its card, NAME.md."""
  folder = pathlib.Path(__file__).parent / "networks"
  return {path.stem: path for path in sorted(folder.glob("*.minw"))}


def probabilities(logits: np.ndarray) -> np.ndarray:
  """Softmax over the classes: float32 (batch, classes) -> the same."""
  powers = np.exp(logits - logits.max(-1, keepdims=True))
  return powers / powers.sum(-1, keepdims=True)


def read_image(
    path: str | os.PathLike, shape: Sequence[int], shrink: bool = True
) -> np.ndarray:
  """An image file as uint8 (height, width, channels), of the shape that is asked for.

  If it is of another size, its shorter side is brought to that size (unless it is
  larger and `shrink` is false) and the centre taken: see `images.centre`.
  """
  with Image.open(path) as image:
    return images_lib.centre(image, *shape, shrink=shrink)


def shrinks(program: packed.Program) -> bool:
  """Whether larger images are made smaller for it, as they were in its evaluation."""
  return (program.metadata.get("config") or {}).get("eval_resize") != 0


def image_files(paths: Sequence[str]) -> list[pathlib.Path]:
  """The image files among `paths` and in the folders among them, in order."""
  files = []
  for path in map(pathlib.Path, paths):
    cli.check(path.exists(), "images", str(path), "a file or folder that exists")
    found = [path]
    if path.is_dir():
      found = sorted(p for p in path.rglob("*")
                     if p.suffix.lower() in (".png", ".jpg", ".jpeg"))
      cli.check(bool(found), "images", str(path), "a folder with .png or .jpg files")
    files += found
  return files


def read_images(
    files: Sequence[str | os.PathLike], shape: Sequence[int], shrink: bool = True
) -> np.ndarray:
  """Image files as uint8 (files, height, width, channels); see `read_image`.

  Raises:
    cli.UsageError: a file can not be read as an image.
  """
  images = []
  for file in files:
    try:
      images.append(read_image(file, shape, shrink))
    except (OSError, ValueError) as error:
      raise cli.UsageError(f"images={str(file)!r}: {error}") from error
  return np.stack(images)


def load_for_command(path: str, **options) -> Network:
  """`load`, with errors for the user of a command."""
  try:
    return load(path, **options)
  except (OSError, ValueError) as error:
    raise cli.UsageError(f"model={path!r}: {error}") from error


def define_flags() -> None:
  """Defines the flags of the command."""
  flags.DEFINE_string(
      "model", None, "The packed network: a file, or a name.", required=True)
  flags.DEFINE_list(
      "images", None, "PNG and JPEG files, or folders of them.", required=True)
  flags.DEFINE_enum("backend", None, BACKENDS, "What computes.")
  flags.DEFINE_integer(
      "threads", None, "Of the native path; all cores by default.", lower_bound=1)
  flags.DEFINE_bool("kernels", False, "List what ran each operation.")


def main() -> None:
  """Predicts the labels of images, as the flags say."""
  f = flags.FLAGS
  network = load_for_command(f.model, backend=f.backend, threads=f.threads)
  shape = network.program.source_shape
  files = image_files(f.images)
  for start in range(0, len(files), 256):
    part = files[start:start + 256]
    images = read_images(part, shape, shrinks(network.program))
    for file, row in zip(part, probabilities(network.logits(images))):
      best = int(row.argmax())
      print(f"{file}\t{network.labels[best]}\t{row[best]:.4f}")
  if f.kernels:
    for name, kernel in network.kernels():
      print(f"{name}\t{kernel}")


if __name__ == "__main__":
  cli.run(main, define_flags)
