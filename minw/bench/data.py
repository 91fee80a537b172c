"""Benchmark of loading images for training on one core: minw's loader and PyTorch's."""

import functools
import os
import pathlib
import tempfile
import time
from typing import Any, Callable, Iterator, Sequence

import numpy as np
from PIL import Image

from minw import config as config_lib
from minw import errors
from minw.bench import timing
from minw.data import datasets
from minw.data import pixels as pixels_lib

_IMAGES = 1000  # Number of training images that are used. They stay in memory.
_WARM, _BATCHES = 6, 12  # Batches of a measurement that are not timed, and timed.
_MINW, _FLOATS, _BYTES = "minw", "torch, normalized floats", "torch, bytes"
_TORCH = {_FLOATS: True, _BYTES: False}


class _Repeated:
  """The first `count` of some records, repeated up to the size of ImageNet."""

  def __init__(self, records: Sequence[Any], count: int):
    self._records, self._count = records, count

  def __len__(self) -> int:
    return 1_271_167

  def __getitem__(self, index: int) -> Any:
    return self._records[index % self._count]


class TorchFiles:
  """A PyTorch data set of image files, cropped as torchvision's transforms do.

  Args:
    paths: Paths of the files.
    crop_size: Height and width of the random crops.
    scale: Smallest and largest share of the image's area in a crop.
    pixels: Normalization. Images are then float32 (3, size, size). If None, images are
      not normalized and stay uint8 (size, size, 3).
  """

  def __init__(self, paths, crop_size, scale, pixels):
    self._paths, self._size, self._scale = paths, crop_size, scale
    self._pixels = pixels

  def __len__(self):
    return len(self._paths)

  def __getitem__(self, index):
    import torch

    with Image.open(self._paths[index]) as image:
      image = image.convert("RGB")
    width, height = image.size
    left, top, w, h = self._box(width, height)
    image = image.crop((left, top, left + w, top + h)).resize(
        (self._size, self._size), Image.Resampling.BILINEAR)
    if torch.rand(()) < 0.5:
      image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    tensor = torch.from_numpy(np.array(image))
    if self._pixels is not None:
      tensor = tensor.permute(2, 0, 1).contiguous().to(torch.float32).div(255)
      offset, divisor = (torch.tensor(part)[:, None, None] / 255
                         for part in self._pixels)
      tensor.sub_(offset).div_(divisor)
    return tensor, index

  def _box(self, width, height):
    import torch

    for _ in range(10):
      area = width * height * torch.empty(1).uniform_(*self._scale).item()
      ratio = torch.exp(torch.empty(1).uniform_(*np.log((3 / 4, 4 / 3)))).item()
      w, h = round((area * ratio) ** 0.5), round((area / ratio) ** 0.5)
      if 0 < w <= width and 0 < h <= height:
        return (torch.randint(0, width - w + 1, (1,)).item(),
                torch.randint(0, height - h + 1, (1,)).item(), w, h)
    side = min(width, height)
    return (width - side) // 2, (height - side) // 2, side, side


def bench_data(config: Any, rounds: int) -> dict[str, Any]:
  """Measures images per second. The process is bound to one core in the meantime.

  Each loader has one worker process and takes random crops of the same JPEG images.
  minw reads them from its records, and PyTorch from one file for each image. Batches of
  minw are bytes. PyTorch is measured with bytes and with normalized floats, which are
  common there.

  Args:
    config: Config with a streamed data set, see `config.default_config`.
    rounds: Number of measurements of each loader.

  Returns:
    The object that --json writes. `images_per_second` and `ratios` have by name a
    summary of one number for each round. `left_out` has the reasons why loaders were
    not measured. The config and the machine are described, too.

  Raises:
    errors.UsageError: The config cannot be run, or there are no data.
  """
  config_lib.validate(config)
  data_dir = config_lib.data_dir(config)
  info = datasets.info(config.dataset, data_dir, config.in_memory)
  errors.check(info.streamed, "config.dataset", config.dataset,
               "a data set that is streamed: imagenet2012")
  records = datasets.open_records(config.dataset, "train", data_dir)
  images = [records[i]["image"] for i in range(min(_IMAGES, len(records)))]
  with tempfile.TemporaryDirectory() as folder:
    loaders = {_MINW: lambda: _minw(config, _Repeated(records, len(images)))}
    left_out = {}
    try:
      import torch  # noqa: F401 (checked here and used in the workers)
    except ImportError:
      left_out = dict.fromkeys(_TORCH, "PyTorch is not installed")
    else:
      paths = [pathlib.Path(folder, f"{i}.jpg") for i in range(len(images))]
      for path, image in zip(paths, images):
        path.write_bytes(image)
      for name, floats in _TORCH.items():
        pixels = pixels_lib.pixels("standardized", info.mean, info.std)
        loaders[name] = functools.partial(
            _torch, config, paths, pixels if floats else None)
    rates = _measure(loaders, rounds, config.batch_size)
  return {
      "bench": "data",
      "images": len(images),
      "bytes_per_image": int(np.mean([len(image) for image in images])),
      "rounds": rounds,
      "config": config.to_dict(),
      "machine": timing.machine(),
      "images_per_second": {name: timing.summary(part) for name, part in rates.items()},
      "ratios": {f"{_MINW} / {name}": timing.summary(
          [a / b for a, b in zip(rates[_MINW], rates[name])])
                 for name in _TORCH if name in rates},
      "left_out": left_out,
  }


def _minw(config: Any, records: Any) -> Iterator[Any]:
  from minw.data import streamed  # Imports grain, which takes a while.

  return streamed.Split(records, "train", workers=1, max_damaged=1.0).random_crops(
      0, seed=config.seed, batch_size=config.batch_size, crop_size=config.crop_size,
      crop_scale=config.crop_scale, flip=True)


def _torch(
    config: Any, paths: list[pathlib.Path], pixels: pixels_lib.Pixels | None
) -> Iterator[Any]:
  from torch.utils import data

  files = TorchFiles(paths, config.crop_size, config.crop_scale, pixels)
  count = (_WARM + _BATCHES + 10) * config.batch_size
  return iter(data.DataLoader(
      files, config.batch_size, num_workers=1, multiprocessing_context="spawn",
      sampler=data.RandomSampler(files, replacement=True, num_samples=count)))


def _measure(
    loaders: dict[str, Callable[[], Iterator[Any]]], rounds: int, batch_size: int
) -> dict[str, list[float]]:
  """Measures the images per second of each loader.

  Loaders read ahead. Therefore they are started again in each round.
  """
  rates = {name: [] for name in loaders}
  cores = os.sched_getaffinity(0)
  os.sched_setaffinity(0, {min(cores)})
  try:
    for i in range(rounds):
      for name in list(loaders)[::(-1) ** i]:
        batches = loaders[name]()
        for _ in range(_WARM):
          next(batches)
        start = time.perf_counter()
        for _ in range(_BATCHES):
          next(batches)
        rates[name].append(_BATCHES * batch_size / (time.perf_counter() - start))
        del batches  # This ends the worker.
  finally:
    os.sched_setaffinity(0, cores)
  return rates


def table(result: dict[str, Any]) -> str:
  """Formats the result of `bench_data` as text."""
  c, m = result["config"], result["machine"]
  lines = [
      f"Random crops of {c['crop_size']} of {result['images']} images of"
      f" {c['dataset']}, {result['bytes_per_image'] / 1000:.0f} kB on average, in"
      f" batches of {c['batch_size']}",
      f"on one core of {m['cpu']}: "
      + ", ".join(f"{name} {version}" for name, version in m["versions"].items()),
      f"Medians and quartiles of {result['rounds']} rounds.",
      "",
      f"{'loader':32}{'images/s':>10}{'quartiles':>20}"]
  for name, s in result["images_per_second"].items():
    spread = f"{s['low']:.0f} - {s['high']:.0f}"
    lines.append(f"{name:32}{s['median']:10.0f}{spread:>20}")
  lines += [f"{name:32} left out: {why}" for name, why in result["left_out"].items()]
  lines += ["", f"{'ratio':32}{'':10}{'quartiles':>20}"] if result["ratios"] else []
  for name, r in result["ratios"].items():
    spread = f"{r['low']:.3f} - {r['high']:.3f}"
    lines.append(f"{name:32}{r['median']:10.3f}{spread:>20}")
  return "\n".join(lines)
