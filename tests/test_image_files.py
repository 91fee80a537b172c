"""minw.data.image_files: the files that paths name; all bad ones are refused."""

import io
import os
import pathlib
import socket
import struct
import threading
import warnings
import zlib

import numpy as np
from PIL import Image
import pytest

from minw import errors
from minw.data import image_files
from minw.data import images

KINDS = ("png", "jpeg", "gif", "bmp", "tiff", "webp")


def save(path, color=9, size=(8, 8), kind="png"):
  path.parent.mkdir(parents=True, exist_ok=True)
  Image.new("L", size, color).save(path, kind)
  return path


def names(folder, found):
  return [str(path.relative_to(folder)) for path in found]


def test_find(tmp_path, caplog):
  for name in ("b.png", "a/2.JPG", "a/10.webp", "A.Jpeg", "c/d/e/x.TIF", "x.npy"):
    save(tmp_path / name)
  for name in (".DS_Store", "._b.png", "notes.txt", "no_ending", ".git/z.png"):
    save(tmp_path / name)
  wanted = ["A.Jpeg", "a/10.webp", "a/2.JPG", "b.png", "c/d/e/x.TIF", "x.npy"]
  assert names(tmp_path, image_files.find([tmp_path])) == wanted
  assert [record.getMessage() for record in caplog.records] == [
      f"{tmp_path}: files left out, hidden or not named as images are: 5"]


def test_find_takes_any_file_that_is_named(tmp_path):
  files = [save(tmp_path / name) for name in ("no_ending", ".hidden", "x.y", "x.y")]
  assert list(image_files.find(map(str, files))) == files  # One of them twice.
  folder = tmp_path / ".folder"
  save(folder / "a.png")
  assert names(folder, image_files.find([folder])) == ["a.png"]


def test_find_refuses(tmp_path):
  (tmp_path / "empty" / "folder").mkdir(parents=True)
  (tmp_path / "empty" / "notes.txt").write_text("hello")
  save(tmp_path / "a.png")
  for name in ("none.png", "x" * 5000, "a\0b"):
    with pytest.raises(errors.UsageError, match="must be a file or folder that exists"):
      image_files.find([tmp_path / "a.png", str(tmp_path / name)])
  with pytest.raises(errors.UsageError,
                     match="must be a folder with .png or .jpg files"):
    image_files.find([tmp_path / "a.png", tmp_path / "empty"])


def test_find_through_links(tmp_path):
  save(tmp_path / "real" / "a.png")
  (tmp_path / "real" / "up").symlink_to(tmp_path / "real")
  (tmp_path / "real" / "self").symlink_to("self")
  (tmp_path / "real" / "gone.png").symlink_to("nowhere")
  (tmp_path / "top").mkdir()
  (tmp_path / "top" / "link").symlink_to(tmp_path / "real")
  assert names(tmp_path, image_files.find([tmp_path / "top"])) == [
      "top/link/a.png", "top/link/gone.png"]


def test_find_in_deep_folders(tmp_path):
  folder = tmp_path
  for _ in range(600):
    folder = folder / "d"
  save(folder / "a.png")
  assert len(list(image_files.find([tmp_path]))) == 1


def test_find_lists_no_further_than_it_is_used(tmp_path, monkeypatch):
  for i in range(3):
    save(tmp_path / str(i) / "a.png")
  listed, listdir = [], os.listdir
  monkeypatch.setattr(os, "listdir", lambda path: listed.append(path) or listdir(path))
  found = image_files.find([tmp_path])
  listed.clear()
  next(found)
  assert listed == [tmp_path, tmp_path / "0"]


def test_unreadable_folder_is_named(tmp_path, monkeypatch):
  save(tmp_path / "a.png")
  (tmp_path / "locked").mkdir()
  listdir = os.listdir

  def refuse(path):  # For root no folder is unreadable.
    if pathlib.Path(path).name == "locked":
      raise PermissionError(13, "Permission denied")
    return listdir(path)

  monkeypatch.setattr(os, "listdir", refuse)
  assert names(tmp_path, image_files.find([tmp_path])) == ["a.png", "locked"]
  with pytest.raises(images.ImageError, match="^Permission denied$"):
    image_files.read(tmp_path / "locked", (8, 8, 1))


@pytest.mark.parametrize("text, wanted", [
    ("black", (0, 0, 0)), ("White", (255, 255, 255)), ("1,2,3", (1, 2, 3)),
    ("#0a0B0c", (10, 11, 12)), ("#fff", (255, 255, 255)), (" 1, 2, 3 ", (1, 2, 3))])
def test_color(text, wanted):
  assert image_files.color(text) == wanted


@pytest.mark.parametrize("text", [
    "", "blak", "1,2", "1,2,256", "1,2,-1", "1,2,3,4", "#00000000", "1.5,2,3", "7"])
def test_wrong_color(text):
  with pytest.raises(errors.UsageError, match="background=.*: must be a color: a name"):
    image_files.color(text)


def test_read_is_upright_and_opaque(tmp_path):
  rgba = np.zeros((4, 6, 4), np.uint8)
  rgba[0, 0] = (200, 100, 50, 255)
  exif = Image.Exif()
  exif[0x0112] = 6  # To be turned clockwise.
  Image.fromarray(rgba).save(tmp_path / "a.png", exif=exif)
  read = image_files.read(tmp_path / "a.png", (6, 4, 3), background=(1, 2, 3))
  wanted = np.full((6, 4, 3), (1, 2, 3))
  wanted[0, 3] = (200, 100, 50)
  assert read.dtype == np.uint8 and read.tolist() == wanted.tolist()


def test_read_arrays(tmp_path):
  rng = np.random.default_rng(0)
  for channels in (1, 2, 3, 4, 7):
    stored = rng.integers(0, 256, (6, 9, channels), np.uint8)
    np.save(tmp_path / "a.NPY.npy", stored)
    read = image_files.read(tmp_path / "a.NPY.npy", (6, 9, channels))
    np.testing.assert_array_equal(read, stored)
    stored = np.asfortranarray(np.full((40, 30, channels), 7, np.uint8))
    np.save(tmp_path / "a.npy", stored)
    assert (image_files.read(tmp_path / "a.npy", (8, 8, channels)) == 7).all()


@pytest.mark.parametrize("array, holds", [
    (np.zeros((8, 8), np.uint8), r"uint8 \(8, 8\)"),
    (np.zeros((8, 8, 3), np.uint8), r"uint8 \(8, 8, 3\)"),
    (np.zeros((1, 8, 8, 4), np.uint8), r"uint8 \(1, 8, 8, 4\)"),
    (np.zeros((8, 8, 4), np.float32), "float32"),
    (np.zeros((8, 8, 4), np.uint16), "uint16"),
])
def test_wrong_arrays(tmp_path, array, holds):
  np.save(tmp_path / "a.npy", array)
  with pytest.raises(images.ImageError,
                     match=f"{holds}.*takes uint8.*height, width, 4"):
    image_files.read(tmp_path / "a.npy", (8, 8, 4))


def test_damaged_arrays(tmp_path):
  path = tmp_path / "a.npy"
  np.save(path, np.zeros((8, 8, 4), np.uint8))
  data = path.read_bytes()
  np.savez(tmp_path / "b.npz", np.zeros((8, 8, 4), np.uint8))
  archive = (tmp_path / "b.npz").read_bytes()
  for content in (b"", data[:4], data[:50], data[:-1], b"hello", archive,
                  data.replace(b"(8, 8, 4)", b"(0, 8, 4)"),
                  data.replace(b"(8, 8, 4), ", b"(88888, 4),")):
    path.write_bytes(content)
    with pytest.raises(images.ImageError):
      image_files.read(path, (8, 8, 4))
  np.save(path, np.array([object()]), allow_pickle=True)
  with pytest.raises(images.ImageError):
    image_files.read(path, (8, 8, 4))


def test_what_is_no_regular_file(tmp_path):
  os.mkfifo(tmp_path / "pipe.png")
  with socket.socket(socket.AF_UNIX) as server:
    server.bind(str(tmp_path / "s.png"))
    for path in (tmp_path / "pipe.png", tmp_path / "s.png", "/dev/zero"):
      with pytest.raises(images.ImageError, match="it is not a regular file"):
        image_files.read(path, (8, 8, 1))
  with pytest.raises(images.ImageError, match="it is a folder"):
    image_files.read(tmp_path, (8, 8, 1))
  with pytest.raises(images.ImageError, match="^No such file or directory$"):
    image_files.read(tmp_path / "none.png", (8, 8, 1))
  (tmp_path / "loop.png").symlink_to("loop.png")
  with pytest.raises(images.ImageError, match="symbolic links"):
    image_files.read(tmp_path / "loop.png", (8, 8, 1))


def test_large_files_are_not_read(tmp_path):
  """They are sparse, and have a header that asks to read gigabytes."""
  starts = {"a.png": content_of("png")[:33] + b"\x7f\xff\xff\xfftEXt",
            "a.npy": b"\x93NUMPY\2\0" + b"\xff\xff\xff\xff"}
  for name, start in starts.items():
    (tmp_path / name).write_bytes(start)
    os.truncate(tmp_path / name, 2**32 + 1)
    with pytest.raises(images.ImageError,
                       match="^it has 4,294,967,297 bytes; 402,653,184 are accepted$"):
      image_files.read(tmp_path / name, (8, 8, 1))


def content_of(kind):
  pixels = np.random.default_rng(0).integers(0, 256, (40, 50, 3), np.uint8)
  file = io.BytesIO()
  Image.fromarray(pixels).save(file, kind)
  return file.getvalue()


@pytest.mark.parametrize("kind", KINDS)
def test_truncated_files(tmp_path, kind):
  """However short: refused, with one kind of error."""
  content, path = content_of(kind), tmp_path / "a.png"
  for size in (*range(0, 200, 7), len(content) // 2, len(content) * 9 // 10):
    path.write_bytes(content[:size])
    with pytest.raises(images.ImageError) as error:
      image_files.read(path, (8, 8, 3))
    assert str(error.value)


@pytest.mark.filterwarnings("ignore")  # Pillow warns of damaged metadata.
@pytest.mark.parametrize("kind", KINDS)
def test_damaged_files(tmp_path, kind):
  """Anything else may be read as another picture, but has no other error."""
  content, path = content_of(kind), tmp_path / "a.png"
  rng = np.random.default_rng(0)
  refused = 0
  for _ in range(60):
    damaged = np.frombuffer(content, np.uint8).copy()
    at = rng.integers(0, min(len(content), 400), rng.integers(1, 5))
    damaged[at] = rng.integers(0, 256, len(at))
    path.write_bytes(damaged.tobytes())
    try:
      assert image_files.read(path, (8, 8, 3)).shape == (8, 8, 3)
    except images.ImageError:
      refused += 1
  assert refused


@pytest.mark.parametrize("error", [
    SyntaxError("broken"), ValueError("broken"), OSError("broken"), EOFError("broken"),
    MemoryError("broken"), IndexError("broken"), OverflowError("broken"),
    ZeroDivisionError("broken"), AssertionError("broken"), KeyError("broken"),
    zlib.error("broken"), struct.error("broken")])
def test_all_errors_are_alike(tmp_path, monkeypatch, error):
  def fail(*_, **__):
    raise error

  path = save(tmp_path / "a.png")
  monkeypatch.setattr(Image, "open", fail)
  with pytest.raises(images.ImageError, match="^'?broken'?$"):
    image_files.read(path, (8, 8, 1))


def test_decompression_bombs(tmp_path, monkeypatch):
  """Within twice Pillow's limit it would warn, beyond it has an error of its own."""
  monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
  for width, good in ((100, True), (101, False), (201, False)):
    path = save(tmp_path / "a.png", size=(width, 10))
    if good:
      assert (image_files.read(path, (8, 8, 1)) == 9).all()
      continue
    for filters in ("error", "ignore"):
      with warnings.catch_warnings():
        warnings.simplefilter(filters)
        with pytest.raises(images.ImageError, match="pixels"):
          image_files.read(path, (8, 8, 1))


def test_photo_of_200_million_pixels(tmp_path):
  """More than Pillow opens; decoded at an eighth of its size it takes little memory."""
  path = tmp_path / "photo.jpg"
  Image.new("L", (16320, 12240), 90).save(path, quality=50)
  assert (image_files.read(path, (32, 32, 3)) == 90).all()


def test_read_from_threads(tmp_path):
  paths = [save(tmp_path / f"{i}.png", i, (50, 50)) for i in range(8)]
  wrong = []

  def work():
    for _ in range(20):
      for i, path in enumerate(paths):
        if not (image_files.read(path, (8, 8, 3)) == i).all():
          wrong.append(i)

  threads = [threading.Thread(target=work) for _ in range(4)]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join()
  assert not wrong
