"""A user's own images: small folders of them, and data sets that TFDS itself wrote."""

import io
import pathlib

import numpy as np
from PIL import Image
import tensorflow_datasets as tfds
from tensorflow_datasets.core import registered

CLASSES = ("cat", "dog", "owl")


def picture(seed: int, height: int = 10, width: int = 12) -> np.ndarray:
  """Random RGB pixels."""
  return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def png(image: np.ndarray) -> bytes:
  """An image as a PNG file; one channel becomes gray."""
  file = io.BytesIO()
  Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image).save(file, "png")
  return file.getvalue()


def write_classes(
    folder: pathlib.Path, counts: dict[str, int], first: int = 0
) -> pathlib.Path:
  """Writes FOLDER/CLASS/i.png, of `picture(first)`, `picture(first + 1)` and so on."""
  for label, count in counts.items():
    (folder / label).mkdir(parents=True, exist_ok=True)
    for i in range(count):
      (folder / label / f"{i}.png").write_bytes(png(picture(first)))
      first += 1
  return folder


def write_tfds(data_dir, name, shape, sizes, *, num_classes=3, keys=("image", "label")):
  """Lets TFDS write a data set as it writes those that are like MNIST.

  The i-th image of a split has the class i % num_classes and the value 10 * i.

  Args:
    data_dir: Directory of prepared data sets.
    name: Name of the data set.
    shape: (height, width, channels); None for a height and width that differ.
    sizes: Number of records by split.
    num_classes: Number of classes, which are named "class 0" and so on.
    keys: Names of the features of the image and of the class.
  """
  image_key, label_key = keys

  def image(i):
    height, width = (side or 5 + 2 * i for side in shape[:2])
    return np.full((height, width, shape[2]), 10 * i, np.uint8)

  with registered.skip_registration():

    class Written(tfds.core.GeneratorBasedBuilder):
      VERSION = tfds.core.Version("1.2.0")

      def _info(self):
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict({
            image_key: tfds.features.Image(shape=shape),
            label_key: tfds.features.ClassLabel(
                names=[f"class {i}" for i in range(num_classes)]),
        }))

      def _split_generators(self, dl_manager):
        return {split: self._generate_examples(split) for split in sizes}

      def _generate_examples(self, split):
        for i in range(sizes[split]):
          yield i, {image_key: png(image(i)), label_key: i % num_classes}

  Written.name = name
  builder = Written(data_dir=data_dir, file_format="array_record")
  builder.download_and_prepare()
  return pathlib.Path(builder.data_dir)
