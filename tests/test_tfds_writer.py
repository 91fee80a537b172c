"""minw.data.tfds_writer: TFDS is patched only while a data set is written."""

import numpy as np
import pytest
import tensorflow_datasets as tfds
from tensorflow_datasets.core import shuffle

from minw.data import cifar
from minw.data import datasets
from minw.data import tfds_writer


def records(count, seen):
  """Records of CIFAR-10 that note what TFDS's shuffler opens files with."""
  rows = np.arange(count * 3073).reshape(count, 3073).astype(np.uint8)
  rows[:, 0] = np.arange(count) % 10
  for key, record in cifar.records("train", rows, ("label",)):
    seen.append(shuffle.tf)
    yield key, record


def test_the_patch_ends_with_the_writing(tmp_path):
  before, seen = shuffle.tf, []
  names = {"label": datasets.info("cifar10").label_names}
  directory = tfds_writer.write(
      "cifar10", names, {"train": records(3, seen)}, tmp_path, bars=False)
  assert directory == tmp_path / "cifar10" / tfds_writer.version("cifar10")
  assert len(seen) == 3 and all(tf is not before for tf in seen)
  assert seen[0].io.gfile.exists(directory) and shuffle.tf is before
  source = tfds.builder_from_directory(directory).as_data_source("train")
  assert sorted(record["label"] for record in source) == [0, 1, 2]


def test_the_patch_ends_with_an_error(tmp_path):
  def failing():
    yield from records(1, [])
    raise KeyError("no more")

  before = shuffle.tf
  with pytest.raises(KeyError, match="no more"):
    tfds_writer.write("cifar10", {}, {"train": failing()}, tmp_path, bars=False)
  assert shuffle.tf is before


def test_bars_are_shown_only_on_request(tmp_path, monkeypatch, capsys):
  asked = []
  monkeypatch.setattr(tfds_writer.tqdm, "tqdm", lambda splits, *, disable, **_: (
      asked.append(disable) or splits))
  for i, bars in enumerate((True, False)):
    tfds_writer.write("cifar10", {}, {"train": records(1, [])}, tmp_path / str(i),
                      bars=bars)
  assert asked == [None, True]
  assert capsys.readouterr().out == ""
