"""Runs packed networks on images.

  network = infer.load("net.minw")
  network.predict(["a.png", "b.jpg"])  # Labels and scores.
  logits = network.logits(images)      # uint8 (batch, height, width, channels)

Inference needs NumPy and Pillow. The native library runs the network. If the library
was not built, JAX does so, or NumPy if JAX is not installed, which is slow. None of the
dependencies of training is imported, and Pillow only to read image files.
"""

import functools
import itertools
import logging
import os
import pathlib
from typing import Any, Iterable, Iterator, NamedTuple, Sequence

import numpy as np

from minw import dependencies
from minw import errors
from minw import packed
from minw import profiling
from minw.kernels import native
from minw.kernels import reference

_log = logging.getLogger(__name__)

BACKENDS = ("native", "xla", "reference")
# Image files are read and run in batches of at most this many images and bytes.
_BATCH = 256
_BATCH_BYTES = 2**26


class Prediction(NamedTuple):
  """The most probable classes of an image.

  Attributes:
    labels: Their labels, the most probable one first.
    scores: Their probabilities, in the same order.
  """

  labels: tuple[str, ...]
  scores: tuple[float, ...]

  @property
  def label(self) -> str:
    """The most probable label."""
    return self.labels[0]

  @property
  def score(self) -> float:
    """The probability of that label."""
    return self.scores[0]


class Network:
  """A packed network, ready to run. Several threads may use it at once.

  Copies and pickles are made from the content of the file.

  Attributes:
    program: The network's operations, see `minw.packed`.
    labels: Names of the classes; their numbers if the file holds no names.
    name: Name of the file without its ending; None if the network is not from a file.
    backend: Inference backend, one of `BACKENDS`.
    threads: Number of threads of the native backend.
  """

  def __init__(
      self,
      source: str | os.PathLike | bytes | packed.Program,
      backend: str | None = None,
      threads: int | None = None,
      limits: packed.Limits = packed.Limits(),
  ):
    """Loads a network, as `load` does.

    Args:
      source: Path of a file, name of a network that comes with minw, content of a file,
        or a program.
      backend: Inference backend, one of `BACKENDS`; the first available one if None.
      threads: Number of threads of the native backend; one for each core if None.
      limits: Largest memory and work that loading and running the network may take.
    """
    errors.check(backend in (None, *BACKENDS), "backend", backend,
                 f"one of {', '.join(BACKENDS)}")
    self._options = backend, threads, limits
    self.name = None
    if isinstance(source, (str, os.PathLike)):
      path = _existing(source)
      self.name, self._data = path.stem, packed.read_bytes(path)
    else:
      self._data = (packed.to_bytes(source) if isinstance(source, packed.Program)
                    else bytes(source))
    self.program = packed.from_bytes(self._data, limits)
    self.labels = tuple(self.program.metadata.get("labels") or map(
        str, range(self.program.num_classes)))
    self.threads = threads or len(os.sched_getaffinity(0))
    self.backend = backend or default_backend()
    if self.backend == "native":
      self._native = native.load(self._data, limits)
    elif self.backend == "xla":  # Only this backend needs JAX.
      try:
        import jax
      except ImportError as error:
        raise errors.UsageError(
            "backend='xla' needs JAX, which is not installed: pip install jax"
        ) from error
      from minw.kernels import xla
      operands, function = xla.logits(self.program)
      self._logits = functools.partial(jax.jit(function), operands)

  def __reduce__(self):
    changed = {"name": self.name, "labels": self.labels, "threads": self.threads}
    return type(self), (self._data, *self._options), changed

  def __repr__(self) -> str:
    name = "" if self.name is None else f"{self.name!r}, "
    isa = f" ({self._native.isa})" if self.backend == "native" else ""
    return (f"Network({name}images={self.program.source_shape},"
            f" classes={self.program.num_classes}, bits={_bits(self.program)},"
            f" backend={self.backend}{isa})")

  def logits(self, images: np.ndarray) -> np.ndarray:
    """Computes the logits of a batch.

    Args:
      images: uint8 (batch, *program.source_shape), of any batch size.

    Returns:
      float32 (batch, classes).

    Raises:
      ValueError: The images have another shape or dtype.
    """
    images = self._checked(images)
    if not len(images):
      return np.zeros((0, self.program.num_classes), np.float32)
    if self.backend == "native":
      return self._native.logits(images, threads=self.threads)
    if self.backend == "xla":
      return np.asarray(self._logits(images))
    return reference.logits(self.program, images)

  def values(self, images: np.ndarray) -> list[np.ndarray]:
    """Computes every value of the network for a batch.

    Args:
      images: uint8 (batch, *program.source_shape), of at least one image.

    Returns:
      The values of the image and of each operation; see `reference.run`.

    Raises:
      ValueError: The images have another shape or dtype, or there are none.
    """
    images = self._checked(images)
    if not len(images):
      raise ValueError(f"images of shape {images.shape}: must be a batch of at least"
                       " one")
    if self.backend == "native":
      return self._native.values(images)
    if self.backend == "xla":
      return [np.asarray(value) for value in self._xla_values(images)]
    return reference.run(self.program, images)

  @functools.cached_property  # Values are rarely needed and have their own operands.
  def _xla_values(self):
    import jax

    from minw.kernels import xla
    operands, function = xla.values(self.program)
    return functools.partial(jax.jit(function), operands)

  def predict(
      self,
      images: str | os.PathLike | Iterable[str | os.PathLike] | np.ndarray,
      top: int = 1,
      *,
      background: str = "black",
  ) -> list[Prediction]:
    """Predicts the most probable classes of images.

    Args:
      images: Path of an image file, several such paths, or uint8 (batch,
        *program.source_shape).
      top: Number of classes for each image.
      background: Color behind transparent parts of files: a name, #rrggbb or R,G,B.

    Returns:
      A prediction for each image.

    Raises:
      ValueError: A file cannot be read as an image, or an array has another shape or
        dtype.
      errors.UsageError: `top` or `background` cannot be used.
    """
    self.check_top(top)
    if isinstance(images, (str, os.PathLike)):
      images = [images]
    if not isinstance(images, np.ndarray):
      images = list(images)
      if all(isinstance(image, (str, os.PathLike)) for image in images):
        return [_successful(*pair) for pair in predict_files(
            self, images, top, background=background)]
    batch: Any = images  # An array, or what `logits` refuses.
    logits = self.logits(batch)
    order = np.argsort(-logits, axis=-1, kind="stable")[:, :top]
    scores = np.take_along_axis(probabilities(logits), order, -1)
    return [Prediction(tuple(self.labels[i] for i in row), tuple(map(float, score)))
            for row, score in zip(order, scores)]

  def check_top(self, top: int) -> None:
    """Checks that the network has at least `top` classes.

    Raises:
      errors.UsageError: It has fewer, or `top` is less than 1.
    """
    classes = self.program.num_classes
    errors.check(1 <= top <= classes, "top", top,
                 f"1 to {classes}, the number of classes")

  def kernels(self) -> list[tuple[str, str]]:
    """Returns the name of each operation and of the kernel that runs it."""
    if self.backend == "native":
      return self._native.layers()
    return [(op.name, self.backend) for op in self.program.ops]

  def profile(self, batch: int = 1, runs: int = 20) -> list[profiling.Pass]:
    """Measures the time of each operation; `profiling.table` formats the result.

    Args:
      batch: Number of images of a run.
      runs: Number of runs, of which the medians count.

    Raises:
      errors.UsageError: The backend is not the native one, or a number is less than 1.
    """
    errors.check(self.backend == "native", "backend", self.backend,
                 "native, whose operations can be timed one by one")
    errors.check(batch >= 1, "batch", batch, "at least 1")
    errors.check(runs >= 1, "runs", runs, "at least 1")
    return profiling.profile(self.program, self._native, batch, self.threads, runs)

  def _checked(self, images):
    height, width, channels = self.program.source_shape
    allowed = f"must be (batch, {height}, {width}, {channels})"
    try:
      images = np.asarray(images)
    except ValueError as error:
      raise ValueError(f"images of different shapes: {allowed}") from error
    if images.dtype != np.uint8:
      raise ValueError(f"images of {images.dtype}: must be uint8, 0 to 255")
    if images.ndim != 4 or images.shape[1:] != (height, width, channels):
      hint = ""
      if images.shape == (height, width, channels):
        hint = "; images[None] is a batch of one image"
      elif channels == 1 and images.ndim == 3:
        hint = "; images[..., None] has an axis of channels"
      raise ValueError(f"images of shape {images.shape}: {allowed}{hint}")
    return images


def _bits(program: packed.Program) -> str:
  """Returns the bits of weights and activations, such as W1A2."""
  weights = {op.bits for op in program.ops if isinstance(op, packed.Conv)}
  activations = {op.bits for op in program.ops
                 if isinstance(op, (packed.Threshold, packed.FloatNorm))} - {None}
  return "".join(letter + ",".join(sorted(map(str, bits)))
                 for letter, bits in (("W", weights), ("A", activations)) if bits)


@functools.cache  # The warning appears only once.
def default_backend() -> str:
  """Returns the name of the fastest backend that is installed.

  Examples:
    >>> infer.default_backend() in infer.BACKENDS
    True
  """
  if native.available():
    return "native"
  backend, name = "reference", "NumPy"
  if dependencies.installed("jax"):
    backend, name = "xla", "XLA"
  _log.warning("the native library was not built (is there a C++ compiler?): packed"
               " networks run through %s, which is slower", name)
  return backend


def load(
    path: str | os.PathLike, *, backend: str | None = None, threads: int | None = None,
    limits: packed.Limits = packed.Limits(),
) -> Network:
  """Loads a packed network.

  Args:
    path: Path of a file that `minw.pack` wrote. If there is no such file, it is the
      name of a network that comes with minw.
    backend: "native", "xla" or "reference"; the first available one if None.
    threads: Number of threads of the native backend; one for each core if None.
    limits: Largest memory and work that loading and running the network may take. A
      trusted file may be loaded with higher limits, or with `packed.UNLIMITED`.

  Raises:
    OSError: There is no such file or network, or it cannot be read.
    ValueError: The file is not a packed network, is damaged, or exceeds `limits`.

  Examples:
    >>> network = infer.load("digits_convnet")
    >>> network.logits(np.zeros((2, 8, 8, 1), np.uint8)).shape
    (2, 10)
  """
  return Network(path, backend, threads, limits)


def _existing(path: str | os.PathLike) -> pathlib.Path:
  """Returns the path of a file, or of a network that comes with minw."""
  known = shipped()
  if not os.path.exists(path):
    if str(path) not in known:
      raise FileNotFoundError(
          f"neither a file nor a network that comes with minw ({', '.join(known)})")
    path = known[str(path)]
  return pathlib.Path(path)


def shipped() -> dict[str, pathlib.Path]:
  """Returns the paths of the networks that come with minw, by name.

  The card of each network, NAME.md, is beside its file.

  Examples:
    >>> infer.shipped()["digits_convnet"].name
    'digits_convnet.minw'
  """
  folder = pathlib.Path(__file__).parents[1] / "networks"
  return {path.stem: path for path in sorted(folder.glob("*.minw"))}


def probabilities(logits: np.ndarray) -> np.ndarray:
  """Computes the softmax over the classes.

  Args:
    logits: float32 (batch, classes).

  Returns:
    float32 (batch, classes).

  Examples:
    >>> infer.probabilities(np.zeros((1, 4), np.float32))
    array([[0.25, 0.25, 0.25, 0.25]], dtype=float32)
  """
  powers = np.exp(logits - logits.max(-1, keepdims=True))
  return powers / powers.sum(-1, keepdims=True)


def read_image(
    path: str | os.PathLike, shape: Sequence[int], shrink: bool = True,
    background: str = "black",
) -> np.ndarray:
  """Reads an image file as an upright and opaque image of the given shape.

  An image of another size is scaled until its shorter side fits, and its center is
  taken. A larger image is not scaled if `shrink` is false. See `images.centre`.

  Args:
    path: Path of the file.
    shape: (height, width, channels) of the result.
    shrink: Whether a larger image is scaled down before it is cropped.
    background: Color behind transparent parts: a name, #rrggbb or R,G,B.

  Returns:
    uint8 (height, width, channels).

  Raises:
    ValueError: The file cannot be read as an image; the message names the file.

  Examples:
    >>> Image.new("L", (16, 16), 255).save("white.png")
    >>> infer.read_image("white.png", (2, 2, 1)).tolist()
    [[[255], [255]], [[255], [255]]]
  """
  from minw.data import image_files
  from minw.data import images

  try:
    return image_files.read(path, shape, shrink=shrink,
                            background=image_files.color(background))
  except images.ImageError as error:
    raise images.ImageError(f"{os.fspath(path)!r}: {error}") from error


def shrinks(program: packed.Program) -> bool:
  """Whether larger images are scaled down for a network, as in its evaluation.

  Examples:
    >>> infer.shrinks(infer.load("digits_convnet").program)
    True
  """
  return (program.metadata.get("config") or {}).get("eval_resize") != 0


def image_files(paths: Iterable[str | os.PathLike]) -> Iterator[pathlib.Path]:
  """Yields the image files in `paths` and in their folders; see `image_files.find`.

  Examples:
    >>> Image.new("L", (16, 16), 255).save("white.png")
    >>> [path.name for path in infer.image_files(["."])]
    ['white.png']
  """
  from minw.data import image_files as files

  return files.find(paths)


def read_images(
    files: Iterable[str | os.PathLike], shape: Sequence[int], shrink: bool = True,
    background: str = "black",
) -> np.ndarray:
  """Reads image files as one array; see `read_image` for the arguments.

  Returns:
    uint8 (files, height, width, channels).

  Raises:
    errors.UsageError: A file cannot be read as an image.

  Examples:
    >>> Image.new("L", (16, 16), 255).save("white.png")
    >>> infer.read_images(["white.png", "white.png"], (2, 2, 1)).shape
    (2, 2, 2, 1)
  """
  from minw.data import images

  try:
    return np.stack([read_image(file, shape, shrink, background) for file in files])
  except images.ImageError as error:
    raise errors.UsageError(f"images={error}") from error


def predict_files(
    network: Network, files: Iterable[str | os.PathLike], top: int = 1, *,
    background: str = "black",
) -> Iterator[tuple[str | os.PathLike, Prediction | ValueError]]:
  """Predicts the classes of image files, in batches.

  A file that cannot be read does not stop the others.

  Args:
    network: The network.
    files: Paths of the files. The iterator is advanced only as files are read.
    top: Number of classes for each image.
    background: Color behind transparent parts: a name, #rrggbb or R,G,B.

  Yields:
    Each path with its prediction, or with the error that prevented one.

  Examples:
    >>> Image.new("L", (16, 16), 255).save("white.png")
    >>> network = infer.load("digits_convnet")
    >>> predictions = infer.predict_files(network, ["white.png"], top=3)
    >>> [(file, len(prediction.labels)) for file, prediction in predictions]
    [('white.png', 3)]
  """
  network.check_top(top)
  for part, images, failures in read_batches(network, files, background=background):
    found = iter(network.predict(images, top))
    for i, file in enumerate(part):
      yield file, failures[i] if i in failures else next(found)


def read_batches(
    network: Network, files: Iterable[str | os.PathLike], *, background: str = "black",
) -> Iterator[tuple[list[str | os.PathLike], np.ndarray, dict[int, ValueError]]]:
  """Reads image files as a network takes them, in batches.

  Args:
    network: The network.
    files: Paths of the files. The iterator is advanced only as files are read.
    background: Color behind transparent parts: a name, #rrggbb or R,G,B.

  Yields:
    The paths of a batch; uint8 (n, *program.source_shape) of those files that could be
    read; and the errors of the others, by their place among the paths.

  Examples:
    >>> Image.new("L", (16, 16), 255).save("white.png")
    >>> network = infer.load("digits_convnet")
    >>> (files, images, failures), = infer.read_batches(network, ["white.png", "no"])
    >>> files, images.shape, list(failures)
    (['white.png', 'no'], (1, 8, 8, 1), [1])
  """
  from minw.data import image_files
  from minw.data import images as images_lib

  shape = network.program.source_shape
  options = {"shrink": shrinks(network.program),
             "background": image_files.color(background)}
  batch = min(_BATCH, max(1, _BATCH_BYTES // int(np.prod(shape))))
  files = iter(files)
  while part := list(itertools.islice(files, batch)):
    read, failures = [], {}
    for i, file in enumerate(part):
      try:
        read.append(image_files.read(file, shape, **options))
      except images_lib.ImageError as error:
        failures[i] = error
    yield part, np.stack(read) if read else np.zeros((0, *shape), np.uint8), failures


def _successful(
    path: str | os.PathLike, result: Prediction | ValueError
) -> Prediction:
  if isinstance(result, ValueError):
    from minw.data import images

    raise images.ImageError(f"{os.fspath(path)!r}: {result}") from result
  return result


def load_for_command(path: str, **options) -> Network:
  """Loads a packed network for a command; see `load`.

  Raises:
    errors.UsageError: The network cannot be loaded.
  """
  try:
    return load(path, **options)
  except (OSError, ValueError) as error:
    raise errors.UsageError(f"model={path!r}: {error}") from error
