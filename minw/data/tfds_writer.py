"""Writes data sets as TensorFlow Datasets does, without TensorFlow.

The result is to have the records, keys, order and descriptions that TFDS itself would
write, and therefore TFDS's own builders write it. Two things in them need TensorFlow.
Reading the original files and encoding images is one: a subclass of each builder takes
its records from elsewhere. The other is TFDS's shuffler. It keeps records beyond a
limit in temporary files, which it opens with `tf.io.gfile`, and TFDS has no option to
open them otherwise. While a data set is written, a patch therefore puts `_FILES` in the
place of `tf` in the shuffler's module. minw changes no other package elsewhere.
"""

import contextlib
import io
import os
import pathlib
import resource
import types
from typing import Any, Iterator, Mapping, Sequence
from unittest import mock

import tensorflow_datasets as tfds
from tensorflow_datasets.core import registered
from tensorflow_datasets.core import shuffle
from tensorflow_datasets.datasets.imagenet2012 import imagenet2012_dataset_builder
from tensorflow_datasets.image_classification import cifar as tfds_cifar
import tqdm

_BUILDERS = {
    "cifar10": tfds_cifar.Cifar10,
    "cifar100": tfds_cifar.Cifar100,
    "imagenet2012": imagenet2012_dataset_builder.Builder,
}

NAMES = tuple(_BUILDERS)
IMAGES_VERSION = "1.0.0"  # Version of the data sets that `write_images` writes.

# The part of TensorFlow that TFDS's shuffler uses.
_FILES = types.SimpleNamespace(
    io=types.SimpleNamespace(gfile=types.SimpleNamespace(
        GFile=lambda path, mode: open(path, mode),
        exists=os.path.exists, remove=os.remove)),
    errors=types.SimpleNamespace(ResourceExhaustedError=()))


def version(dataset: str) -> str:
  """Returns the version of a data set that `write` writes, 3.0.2 for example."""
  return str(_BUILDERS[dataset].VERSION)


def write(
    dataset: str,
    label_names: dict[str, Sequence[str]],
    splits: Mapping[str, Iterator[tuple[int | str, dict[str, Any]]]],
    folder: pathlib.Path,
    *,
    bars: bool,
) -> pathlib.Path:
  """Writes a data set and returns its directory, FOLDER/DATASET/VERSION.

  Args:
    dataset: One of `NAMES`.
    label_names: Class names by feature, where TFDS would read them from the source.
    splits: The key and the record of each example, by split.
    folder: Folder to write to.
    bars: Whether bars show the progress, where stderr is a terminal.

  Raises:
    OSError: A file cannot be written.
  """
  with registered.skip_registration():  # TFDS has a class of this name.

    class Builder(_BUILDERS[dataset]):
      """TFDS's builder, with records that are given."""

      name = dataset
      __module__ = _BUILDERS[dataset].__module__  # TFDS looks for its texts there.

      def _split_generators(self, dl_manager):
        for key, names in label_names.items():
          self.info.features[key].names = names
        return {split: self._generate_examples(split) for split in splits}

      def _generate_examples(self, split):
        return tqdm.tqdm(splits[split], desc=f"{dataset} {split}", unit=" records",
                         disable=None if bars else True)

  return _build(Builder, folder)


def write_images(
    dataset: str,
    image_shape: tuple[int, int, int],
    label_names: Sequence[str],
    splits: Mapping[str, Iterator[tuple[int | str, dict[str, Any]]]],
    metadata: dict[str, Any],
    folder: pathlib.Path,
    *,
    bars: bool,
) -> pathlib.Path:
  """Writes a data set of images with one label each, which TFDS does not know.

  Args:
    dataset: Name of the data set.
    image_shape: (height, width, channels) of the images.
    label_names: One name per class.
    splits: The key and the record of each example, by split. A record has "image", a
      PNG file, "label", the name of a class, and "file_name".
    metadata: An object for JSON, which is kept in metadata.json.
    folder: Folder to write to.
    bars: Whether bars show the progress, where stderr is a terminal.

  Returns:
    The directory of the data set, FOLDER/DATASET/`IMAGES_VERSION`.

  Raises:
    OSError: A file cannot be written.
  """
  with registered.skip_registration():

    class Images(tfds.core.GeneratorBasedBuilder):
      """A builder of the given records."""

      name = dataset
      VERSION = tfds.core.Version(IMAGES_VERSION)

      def _info(self):
        return tfds.core.DatasetInfo(
            builder=self,
            description="Images with labels, written by minw.prepare.",
            features=tfds.features.FeaturesDict({
                "file_name": tfds.features.Text(),
                "image": tfds.features.Image(shape=image_shape, encoding_format="png"),
                "label": tfds.features.ClassLabel(names=list(label_names)),
            }),
            metadata=tfds.core.MetadataDict(metadata))

      def _split_generators(self, dl_manager):
        return {split: self._generate_examples(split) for split in splits}

      def _generate_examples(self, split):
        return tqdm.tqdm(splits[split], desc=f"{dataset} {split}", unit=" records",
                         disable=None if bars else True)

  return _build(Images, folder)


def _build(builder_class: Any, folder: pathlib.Path) -> pathlib.Path:
  """Writes a data set with a builder of TFDS's, and returns its directory."""
  _allow_open_files(shuffle.BUCKETS_NUMBER + 100)
  builder = builder_class(data_dir=folder, file_format="array_record")
  tfds.disable_progress_bar()  # The bars above take its place.
  try:
    with contextlib.redirect_stdout(io.StringIO()), \
        mock.patch.object(shuffle, "tf", _FILES):  # TFDS prints that it downloads.
      builder.download_and_prepare()
  except RuntimeError as error:  # array_record raises it where a write fails.
    raise OSError(str(error)) from error
  finally:
    tfds.enable_progress_bar()
  return pathlib.Path(builder.data_dir)


def _allow_open_files(count: int) -> None:
  """Raises the limit of open files to `count`, or as far as is allowed."""
  soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
  unlimited = resource.RLIM_INFINITY
  if soft != unlimited and soft < count:
    soft = count if hard == unlimited else min(count, hard)
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
