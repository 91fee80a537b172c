"""minw.data.labeled: images and labels in folders, tables and arrays."""

import json
import os

import numpy as np
import pytest

from minw import errors
from minw.data import labeled
from own_images import picture
from own_images import png
from own_images import write_classes


def listed(source):
  """(name, label, split) of all examples of a source."""
  return [(e.name, e.label, e.split) for e in labeled.find(source)]


def refusal(source) -> str:
  with pytest.raises(errors.UsageError) as error:
    labeled.find(source)
  message = str(error.value)
  assert message.startswith(f"source='{source}': ") and "\n" not in message
  return message


def test_folders_are_classes(tmp_path):
  write_classes(tmp_path, {"b": 2, "a": 1})
  (tmp_path / "a" / "deep").mkdir()
  (tmp_path / "a" / "deep" / "x.JPG").touch()
  (tmp_path / "a" / "notes.txt").touch()
  (tmp_path / ".hidden").mkdir()
  (tmp_path / "README").touch()
  assert listed(tmp_path) == [
      ("a/0.png", "a", None), ("a/deep/x.JPG", "a", None), ("b/0.png", "b", None),
      ("b/1.png", "b", None)]
  assert labeled.find(tmp_path)[0].content == tmp_path / "a" / "0.png"


@pytest.mark.parametrize("validation", ["validation", "val", "valid"])
def test_folders_of_splits(tmp_path, validation):
  for split in ("train", validation, "test"):
    write_classes(tmp_path / split, {"a": 1, "b": 1})
  assert sorted(listed(tmp_path)) == sorted(
      (f"{folder}/{label}/0.png", label, split) for folder, split in (
          ("train", "train"), (validation, "validation"), ("test", "test"))
      for label in "ab")


@pytest.mark.parametrize("folders, message", [
    (["train", "cat"], "has the folders 'cat', 'train': must be classes, or splits"),
    (["val", "test"], "has the folders 'test', 'val': must be classes, or splits"),
    (["train", "val", "validation"], "several folders of validation images"),
    (["train", "val", "valid"], "several folders of validation images"),
])
def test_folders_that_are_neither_are_refused(tmp_path, folders, message):
  for folder in folders:
    write_classes(tmp_path / folder, {"a": 1, "b": 1})
  assert message in refusal(tmp_path)


@pytest.mark.parametrize("counts, message", [
    ({"a": 1, "b": 0}, "has no images in the folder 'b'"),
    ({"a": 3}, "has 1 classes and must have at least 2"),
    ({}, "has 0 classes"),
    ({"a": 1, "b\n": 1}, r"has a class named 'b\n': must be a printable name"),
    ({"a": 1, " b": 1}, "has a class named ' b'"),
    ({"a": 1, "b" * 201: 1}, "at most 200 characters"),
])
def test_classes_that_cannot_be_used(tmp_path, counts, message):
  write_classes(tmp_path, counts)
  assert message in refusal(tmp_path)


def test_a_class_that_is_only_tested(tmp_path):
  write_classes(tmp_path / "train", {"a": 1, "b": 1})
  write_classes(tmp_path / "test", {"a": 1, "c": 1})
  assert "has images of class 'c' in test and none in train" in refusal(tmp_path)


def test_images_beside_the_classes(tmp_path):
  write_classes(tmp_path, {"a": 1, "b": 1})
  (tmp_path / "c.png").touch()
  assert "holds c.png outside of the folders of the classes" in refusal(tmp_path)


def test_a_folder_that_cannot_be_listed(tmp_path, monkeypatch):
  write_classes(tmp_path, {"a": 1, "b": 1})

  def refused(path):
    raise PermissionError(13, "Permission denied", str(path))

  monkeypatch.setattr(type(tmp_path), "iterdir", refused)
  assert "cannot be read ([Errno 13] Permission denied" in refusal(tmp_path)


def test_70_000_classes_are_too_many(tmp_path):
  (tmp_path / "x.png").touch()
  table = tmp_path / "table.csv"
  table.write_text("path,label\n" + "".join(f"x.png,{i}\n" for i in range(70_000)))
  assert "has 70,000 classes; 65,536 are accepted" in refusal(table)


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_tables(tmp_path, kind):
  write_classes(tmp_path / "images", {"x": 3})
  rows = [("images/x/0.png", "2"), ("images/x/1.png", "10"), ("images/x/2.png", "2")]
  if kind == "csv":
    lines = ["\ufefflabel,path", *(f"{label},{path}" for path, label in rows)]
  else:
    lines = [json.dumps({"path": path, "label": int(label)}) for path, label in rows]
  table = tmp_path / f"table.{kind}"
  table.write_text("\n".join(lines) + "\n", encoding="utf-8")
  assert listed(table) == [(path, label, None) for path, label in rows]
  # Numbers are in the order of numbers.
  assert labeled.class_names(labeled.find(table)) == ("2", "10")


def test_a_table_names_splits(tmp_path):
  write_classes(tmp_path, {"x": 4})
  table = tmp_path / "table.csv"
  lines = ["path,label,split", "x/0.png,a,train", "x/1.png,b,train", "x/2.png,a,val"]
  table.write_text("\n".join(lines))
  assert listed(table) == [("x/0.png", "a", "train"), ("x/1.png", "b", "train"),
                           ("x/2.png", "a", "validation")]
  table.write_text("\n".join([*lines, "x/3.png,a,"]))
  assert "a split of some images and none of others, x/3.png" in refusal(table)
  table.write_text("\n".join([*lines, "x/3.png,a,hidden"]))
  assert "line 5 has split='hidden': must be one of train, val" in refusal(table)


@pytest.mark.parametrize("line, message", [
    ("x/9.png,a", "line 4 names x/9.png, which is not a file"),
    ("x,a", "line 4 names x, which is not a file"),
    ("x/0.png,c", "lists x/0.png twice"),
    ("x/2.png,", "line 4 has no path or no label"),
    (",c", "line 4 has no path or no label"),
    ('x/2.png,"' + "a" * 140_000, "cannot be read (field larger than"),
])
def test_lines_that_cannot_be_used(tmp_path, line, message):
  write_classes(tmp_path, {"x": 3})
  table = tmp_path / "table.csv"
  table.write_text(f"path,label\nx/0.png,a\nx/1.png,b\n{line}\n")
  assert message in refusal(table)


@pytest.mark.parametrize("content, message", [
    ("{", "cannot be read"), ("[1]", "line 1 has no path or no label"),
    ("[" * 100_000, "cannot be read"),
    ('{"path": "x", "label": true}', "line 1 has no path or no label")])
def test_json_that_cannot_be_used(tmp_path, content, message):
  table = tmp_path / "table.jsonl"
  table.write_text(content)
  assert message in refusal(table)


def test_arrays(tmp_path):
  gray = np.stack([picture(i)[..., 0] for i in range(4)])
  source = tmp_path / "images.npz"
  np.savez(source, images=gray, labels=np.array([7, 8, 7, 10], np.uint8))
  assert listed(source) == [(f"images[{i}]", label, None)
                            for i, label in enumerate(("7", "8", "7", "10"))]
  np.testing.assert_array_equal(labeled.find(source)[3].content, gray[3])
  # The names and shapes of MedMNIST.
  np.savez(source, train_images=gray[:3], train_labels=[[0], [1], [0]],
           val_images=gray[3:], val_labels=[[1]])
  assert [(e.label, e.split) for e in labeled.find(source)] == [
      ("0", "train"), ("1", "train"), ("0", "train"), ("1", "validation")]


@pytest.mark.parametrize("arrays, message", [
    (dict(x=np.zeros(1)), "has no array 'images'; it has x"),
    (dict(images=np.zeros((2, 3, 3), np.uint8)), "has no array 'labels'"),
    (dict(images=np.zeros((2, 3, 3)), labels=[0, 1]), "images of float64 (2, 3, 3)"),
    (dict(images=np.zeros((2, 3, 3, 4), np.uint8), labels=[0, 1]), "uint8 (2, 3, 3, "),
    (dict(images=np.zeros((2, 0, 3), np.uint8), labels=[0, 1]), "uint8 (2, 0, 3)"),
    (dict(images=np.zeros((2, 3, 3), np.uint8), labels=[0, 1, 2]), "for 2 images"),
    (dict(images=np.zeros((2, 3, 3), np.uint8), labels=[0., 1.]), "has float64 labels"),
    (dict(images=np.array([None, 1]), labels=[0, 1]), "cannot be read (Object arrays"),
])
def test_arrays_that_cannot_be_used(tmp_path, arrays, message):
  source = tmp_path / "images.npz"
  np.savez(source, **arrays)
  assert message in refusal(source)


@pytest.mark.parametrize("name", ["nowhere", "file.txt", "broken.npz", "pipe.csv"])
def test_other_sources_are_refused(tmp_path, name):
  source = tmp_path / name
  if name == "pipe.csv":
    os.mkfifo(source)
  elif name != "nowhere":
    source.write_bytes(png(picture(0)))
  assert "must be a folder with a" in refusal(source).replace(
      "cannot be read", "must be a folder with a")
