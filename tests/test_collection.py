"""minw.data.collection: size, splits, statistics and report of a user's images."""

import io

import numpy as np
from PIL import Image
import pytest

from minw import errors
from minw.data import collection
from minw.data import labeled
from own_images import picture
from own_images import png
from own_images import write_classes


def collect(source, **options):
  return collection.collect(labeled.find(source), **options)


def refusal(source, **options) -> str:
  with pytest.raises(errors.UsageError) as error:
    collect(source, **options)
  return str(error.value)


def names(found):
  return {split: {example.name for example in part}
          for split, part in found.splits.items()}


def save(path, image, **options):
  Image.fromarray(image).save(path, **options)


def test_splits_are_stratified(tmp_path):
  write_classes(tmp_path, {"a": 40, "b": 20, "c": 3})
  found = collect(tmp_path)
  assert found.report["images"] == {
      "train": {"a": 32, "b": 16, "c": 1}, "validation": {"a": 4, "b": 2, "c": 1},
      "test": {"a": 4, "b": 2, "c": 1}}
  assert found.report["made_splits"] == ["train", "validation", "test"]
  parts = names(found)
  assert len(set.union(*parts.values())) == 63
  assert sum(map(len, parts.values())) == 63
  assert found.label_names == ("a", "b", "c")


def test_splits_depend_on_the_seed_and_the_pixels_alone(tmp_path):
  write_classes(tmp_path / "one", {"a": 20, "b": 20})
  first = names(collect(tmp_path / "one", seed=3))
  assert names(collect(tmp_path / "one", seed=3)) == first
  assert names(collect(tmp_path / "one", seed=4)) != first
  # Other names and one more class change nothing.
  write_classes(tmp_path / "one", {"c": 5}, first=100)
  for label in "ab":
    for path in (tmp_path / "one" / label).iterdir():
      path.rename(path.with_name(f"{(7 * int(path.stem)) % 20:02d}-{path.name}"))
  others = {split: {name.replace(name[2:5], "") for name in part if name[0] != "c"}
            for split, part in names(collect(tmp_path / "one", seed=3)).items()}
  assert others == first


@pytest.mark.parametrize("given, made", [
    (("train",), ["validation", "test"]), (("train", "test"), ["validation"]),
    (("train", "validation", "test"), [])])
def test_only_missing_splits_are_made(tmp_path, given, made):
  for i, split in enumerate(given):
    write_classes(tmp_path / split, {"a": 10, "b": 10}, first=100 * i)
  found = collect(tmp_path)
  assert found.report["made_splits"] == made
  for split in collection.SPLITS:
    count = 10 - len(made) if split == "train" else 1 if split in made else 10
    assert found.report["images"][split] == {"a": count, "b": count}
    folders = {name.partition("/")[0] for name in names(found)[split]}
    assert folders == ({"train"} if split in made else {split})


def test_too_few_images_to_split(tmp_path):
  write_classes(tmp_path, {"a": 3, "b": 2})
  assert "class 'b' has 2 different images, from which train, validation and " in (
      refusal(tmp_path))
  (tmp_path / "b" / "2.png").write_bytes((tmp_path / "b" / "1.png").read_bytes())
  assert "class 'b' has 2 different images" in refusal(tmp_path)


def test_equal_images_stay_together(tmp_path):
  write_classes(tmp_path, {"a": 10, "b": 10})
  for i in range(10):  # The same pixels in another file format.
    save(tmp_path / "a" / f"again{i}.bmp", picture(i))
  found = collect(tmp_path)
  for part in names(found).values():
    assert {name for name in part if "again" in name} == {
        name.replace("a/", "a/again").replace("png", "bmp")
        for name in part if name.startswith("a/") and "again" not in name}
  assert found.report["duplicates"] == 10 and found.report["across_splits"] == []


def test_equal_images_across_splits_are_named(tmp_path):
  write_classes(tmp_path / "train", {"a": 4, "b": 4})
  write_classes(tmp_path / "validation", {"a": 2, "b": 2}, first=50)
  write_classes(tmp_path / "test", {"a": 2, "b": 2}, first=6)  # 6, 7 and 8, 9.
  report = collect(tmp_path).report
  assert report["across_splits"] == [["train/b/2.png", "test/a/0.png"],
                                     ["train/b/3.png", "test/a/1.png"]]
  assert report["duplicates"] == 2


def test_the_commonest_size_is_the_size(tmp_path):
  write_classes(tmp_path, {"a": 5, "b": 5})
  turned = Image.Exif()
  turned[0x0112] = 6
  for i in range(6):  # Upright, they are 7 pixels high and 9 wide.
    save(tmp_path / "a" / f"turned{i}.png", picture(20 + i, 9, 7), exif=turned)
  for i in range(6):
    save(tmp_path / "b" / f"more{i}.png", picture(30 + i, 7, 9))
  save(tmp_path / "b" / "tiny.png", picture(40, 2, 2))
  found = collect(tmp_path)
  assert found.image_shape == (7, 9, 3)
  assert found.report["sizes"] == {"9x7": 12, "12x10": 10, "2x2": 1}
  assert found.report["enlarged"] == 1
  assert collect(tmp_path, image_size=(11, 4), channels=1).image_shape == (11, 4, 1)


def test_the_largest_of_two_sizes_that_are_equally_common(tmp_path):
  write_classes(tmp_path, {"a": 3, "b": 3})
  for i in range(6):
    save(tmp_path / "a" / f"more{i}.png", picture(30 + i, 13, 10))
  assert collect(tmp_path).image_shape == (13, 10, 3)


def test_statistics_are_those_of_the_training_images(tmp_path):
  write_classes(tmp_path, {"a": 8, "b": 8})
  found = collect(tmp_path)
  pixels = np.stack([np.asarray(Image.open(example.content))
                     for example in found.splits["train"]]) / 255
  assert len(pixels) == 12
  assert found.mean == pytest.approx(pixels.mean((0, 1, 2)), rel=1e-12)
  assert found.std == pytest.approx(pixels.std((0, 1, 2)), rel=1e-12)


def test_images_of_every_mode_are_decoded_as_elsewhere(tmp_path):
  write_classes(tmp_path, {"a": 3, "b": 3})
  rgb = picture(99)
  alpha = np.full((10, 12, 1), 128, np.uint8)
  save(tmp_path / "a" / "alpha.png", np.concatenate([rgb, alpha], 2))
  save(tmp_path / "a" / "sixteen.png", rgb[..., 0].astype(np.uint16) * 257)
  Image.fromarray(rgb).quantize(256).save(tmp_path / "a" / "palette.png")
  found = collect(tmp_path)
  got = {}
  for split in collection.SPLITS:
    for key, record in collection.records(found, split):
      assert record["file_name"] == key and record["label"] == key[0]
      got[key] = np.asarray(Image.open(io.BytesIO(record["image"])))
  assert len(got) == 9
  np.testing.assert_array_equal(got["b/2.png"], picture(5))
  # On black, half of the value, up to rounding.
  np.testing.assert_allclose(got["a/alpha.png"], rgb * (128 / 255), atol=1)
  np.testing.assert_array_equal(
      got["a/sixteen.png"], np.broadcast_to(rgb[..., :1], rgb.shape))
  np.testing.assert_array_equal(got["a/palette.png"], np.asarray(
      Image.open(tmp_path / "a" / "palette.png").convert("RGB")))


def test_gray(tmp_path):
  write_classes(tmp_path, {"a": 3, "b": 3})
  assert not collect(tmp_path).report["gray"]
  found = collect(tmp_path, channels=1)
  assert found.image_shape == (10, 12, 1) and len(found.mean) == 1
  for example in found.splits["train"]:
    save(example.content, picture(int(example.name[2]))[..., 0])
  for split in ("validation", "test"):
    for example in found.splits[split]:
      save(example.content, picture(50 + int(example.name[2]))[..., 0])
  assert collect(tmp_path).report["gray"]
  _, record = next(collection.records(found, "test"))
  opened = Image.open(io.BytesIO(record["image"]))
  assert opened.mode == "L" and opened.size == (12, 10)


def test_arrays_are_read_as_files_are(tmp_path):
  pixels = np.stack([picture(i) for i in range(6)])
  np.savez(tmp_path / "x.npz", images=pixels, labels=[0, 0, 0, 1, 1, 1])
  write_classes(tmp_path / "x", {"0": 3, "1": 3})
  arrays, files = (collect(tmp_path / name, image_size=(5, 8), channels=1)
                   for name in ("x.npz", "x"))
  assert (arrays.mean, arrays.std) == (files.mean, files.std)
  read = [{record["image"] for split in collection.SPLITS
           for _, record in collection.records(found, split)}
          for found in (arrays, files)]
  assert read[0] == read[1] and len(read[0]) == 6


def broken(path, how):
  if how == "empty":
    path.write_bytes(b"")
  elif how == "half":
    path.write_bytes(png(picture(0, 99, 99))[:5000])
  elif how == "text":
    path.write_bytes(b"no image at all")
  elif how == "a folder's link to nothing":
    path.symlink_to("nowhere")
  else:
    frames = [Image.fromarray(picture(i)) for i in range(2)]
    frames[0].save(path, "gif", save_all=True, append_images=frames[1:])


@pytest.mark.parametrize("how, why", [
    ("empty", "cannot identify image file"), ("half", "truncated"),
    ("text", "cannot identify image file"), ("animated", "it has several frames"),
    ("a folder's link to nothing", "No such file")])
def test_damaged_images_are_refused_or_left_out_by_name(tmp_path, how, why):
  write_classes(tmp_path, {"a": 3, "b": 3})
  broken(tmp_path / "b" / "bad.png", how)
  message = refusal(tmp_path)
  assert message.startswith("1 of 7 images cannot be used (b/bad.png: ")
  assert why in message and "--skip_damaged" in message and "\n" not in message
  found = collect(tmp_path, skip_damaged=True)
  assert list(found.report["damaged"]) == ["b/bad.png"]
  assert why in found.report["damaged"]["b/bad.png"]
  assert found.report["images"]["train"] == {"a": 1, "b": 1}


def test_a_class_of_damaged_images(tmp_path):
  write_classes(tmp_path, {"a": 3, "b": 1})
  broken(tmp_path / "b" / "0.png", "text")
  assert refusal(tmp_path, skip_damaged=True) == "class 'b' has only damaged images"
  for path in (tmp_path / "a").iterdir():
    broken(path, "text")
  assert "4 of 4 images cannot be used" in refusal(tmp_path, skip_damaged=True)


def test_a_file_that_changes_meanwhile_is_named(tmp_path):
  write_classes(tmp_path, {"a": 3, "b": 3})
  found = collect(tmp_path)
  example = found.splits["test"][0]
  broken(example.content, "text")
  with pytest.raises(errors.UsageError, match=f"{example.name} cannot be read any m"):
    list(collection.records(found, "test"))
