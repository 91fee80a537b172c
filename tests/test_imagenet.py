"""ImageNet from its archives: preparing, training and evaluating, on few images.

The variable MINW_TEST_IMAGENET names a folder with archives of real images.
"""

import contextlib
import hashlib
import io
import os
import pathlib
import resource
import tarfile
import types

import jax.numpy as jnp
import numpy as np
from PIL import Image
import pytest
import tensorflow_datasets as tfds
from tensorflow_datasets.core import shuffle

from archives import header
from archives import tar
from imagenet_files import LABELS
from imagenet_files import TRAIN
from imagenet_files import VAL
from imagenet_files import outcome
from imagenet_files import picture
from imagenet_files import tiny_config
from imagenet_files import train_files
from imagenet_files import validation_files
from imagenet_files import write_archives
from minw import errors
from minw import evaluate
from minw import infer
from minw import pack
from minw import packed
from minw import prepare
from minw import train
from minw import train_step
from minw import verify
from minw.data import datasets
from minw.data import imagenet
from minw.experiment import Experiment
from resource_limits import limited
from short_runs import trees_of

# Labels of the first six validation images, from ILSVRC2012's ground truth.
VALIDATION = ["n01751748", "n09193705", "n02105855", "n04263257", "n03125729",
              "n01735189"]


def records(data_dir, split):
  """{file name: record} of a prepared split, in its order."""
  builder = tfds.builder_from_directory(data_dir / "imagenet2012/5.1.0")
  source = builder.as_data_source(
      split, decoders={"image": tfds.decode.SkipDecoding()})
  return {record["file_name"].decode(): record for record in source}


def refusal(*arguments, **options):
  with pytest.raises(errors.UsageError) as error:
    prepare.prepare("imagenet2012", *arguments, **options)
  return str(error.value)


def test_description_is_that_of_tensorflow_datasets(imagenet_data):
  builder = tfds.builder_from_directory(imagenet_data / "imagenet2012/5.1.0")
  own = tfds.builder_cls("imagenet2012")(data_dir="/nowhere").info
  assert builder.info.description == own.description
  assert builder.info.citation == own.citation
  assert repr(builder.info.features) == repr(own.features)
  assert builder.info.features["label"].names == own.features["label"].names
  assert os.listdir(imagenet_data / "imagenet2012") == ["5.1.0"]


def check_records(data_dir):
  found = records(data_dir, "train")
  files = {name: (content, LABELS[label]) for label, part in train_files().items()
           for name, content in part.items()}
  # By the md5 of split and key, which is the name.
  assert list(found) == sorted(
      files, key=lambda name: hashlib.md5(f"train{name}".encode()).digest())
  changed = {"n01440764_8.JPEG": picture(8), "n01440764_9.JPEG": picture(9)}
  for name, record in found.items():
    content, label = files[name]
    assert record["label"] == label
    if name not in changed:
      assert record["image"] == content
      continue
    image = Image.open(io.BytesIO(record["image"]))
    assert (image.format, image.mode) == ("JPEG", "RGB")
    difference = np.asarray(image).astype(int) - changed[name]
    assert np.abs(difference).mean() < 3
  names = datasets.info("imagenet2012").label_names
  found = records(data_dir, "validation")
  assert len(found) == 6
  for i, label in enumerate(VALIDATION, start=1):
    name = f"ILSVRC2012_val_{i:08}.JPEG"
    assert names[found[name]["label"]] == label
    assert found[name]["image"] == validation_files()[name]


def test_records(imagenet_data):
  check_records(imagenet_data)


def test_records_that_memory_does_not_hold(tmp_path, monkeypatch):
  monkeypatch.setattr(shuffle, "MAX_MEM_BUFFER_SIZE", 3000)
  source = write_archives(tmp_path / "source")
  few = len(os.listdir("/proc/self/fd")) + 10  # A file for nearly every record is open.
  with limited(resource.RLIMIT_NOFILE, few):
    prepare.prepare("imagenet2012", tmp_path / "data", source, partial=True)
  check_records(tmp_path / "data")
  assert not list(tmp_path.rglob("*.tmp"))


def test_splits(imagenet_data):
  assert datasets.info("imagenet2012", imagenet_data).splits == {
      "train": 21, "validation": 3, "test": 6}
  datasets.check_available("imagenet2012", imagenet_data)
  order = list(records(imagenet_data, "train"))
  names = {split: [record["file_name"].decode() for record in
                   datasets.open_records("imagenet2012", split, imagenet_data)]
           for split in ("train", "validation", "test")}
  assert (names["train"], names["validation"]) == (order[:21], order[21:])
  assert names["test"] == list(records(imagenet_data, "validation"))


def test_a_part_is_only_prepared_on_request(tmp_path):
  source = write_archives(tmp_path / "source")
  message = refusal(tmp_path / "data", source)
  assert message == (
      f"source='{source}': ILSVRC2012_img_train.tar holds 3 archives of a class and"
      " must hold 1,000; --partial prepares what is there")
  assert not list((tmp_path / "data").rglob("*.*"))


def test_missing_images_are_noticed(tmp_path, monkeypatch):
  monkeypatch.setattr(imagenet, "CLASSES", 3)
  monkeypatch.setattr(imagenet, "VALIDATION_IMAGES", 6)
  source = write_archives(tmp_path / "source")
  message = refusal(tmp_path / "data", source)
  assert "hold {'train': 24, 'validation': 6} images and must hold {'train': 12811" in (
      message)
  assert not list((tmp_path / "data").rglob("*.*"))
  splits = {"train": 20, "validation": 4, "test": 6}
  monkeypatch.setitem(datasets._INFOS, "imagenet2012",
                      datasets.info("imagenet2012")._replace(splits=splits))
  prepare.prepare("imagenet2012", tmp_path / "data", source)
  check_records(tmp_path / "data")


def test_wrong_sources_are_refused(tmp_path):
  data, source = tmp_path / "data", tmp_path / "source"
  message = refusal(data, None, partial=True)
  assert "source=None: must be the folder that holds ILSVRC2012_img_train.tar" in (
      message)
  message = refusal(data, "nowhere", partial=True)
  assert "source='nowhere': must be the folder" in message
  write_archives(source)
  (source / "ILSVRC2012_img_val.tar").unlink()
  message = refusal(data, source, partial=True)
  assert message.endswith("must be a folder that holds ILSVRC2012_img_val.tar")
  (source / "ILSVRC2012_img_val.tar").write_text("no archive")
  message = refusal(data, source, partial=True)
  assert "ILSVRC2012_img_val.tar cannot be read" in message
  write_archives(source, validation={"cat.jpg": b""})
  message = refusal(data, source, partial=True)
  assert "cat.jpg is no validation image of ImageNet" in message
  write_archives(source, train_={"n00000000": {}})
  message = refusal(data, source, partial=True)
  assert "n00000000.tar is no archive of a class of ImageNet" in message
  assert not list(data.rglob("*.*"))


IMAGE, CLASS = "ILSVRC2012_val_00000001.JPEG", "n01440764.tar"


@pytest.mark.parametrize("name, content, wanted", [
    (VAL, bytes(1024), "holds 0 images and must hold 50,000"),
    (VAL, b"", "cannot be read (empty file)"),
    (VAL, tar({IMAGE: b"1", f"folder/{IMAGE}": b"2"}),
     f"folder/{IMAGE} is there twice"),
    (VAL, header(IMAGE, 2**30), f"{IMAGE} has 1,073,741,824 bytes and may have"),
    (VAL, tar({"../" * 9 + "etc/passwd": b"1"}), "passwd is no validation image"),
    (VAL, tar({"a\x1b[2J": b"1"}), r"a\x1b[2J is no validation image"),
    (VAL, tar({"ILSVRC2012_val_0000000\u0661.JPEG": b"1"}), "is no validation"),
    (TRAIN, bytes(1024), "holds 0 archives of a class and must hold 1,000"),
    (TRAIN, tar({CLASS: tar({}), f"./{CLASS}": tar({})}), f"{CLASS} is there twice"),
    (TRAIN, header(CLASS, 2**40), f"{CLASS} has 1,099,511,627,776 bytes and may have"),
    (TRAIN, tar({CLASS: b""}), f"({CLASS}: empty file)"),
    (TRAIN, tar({CLASS: tar({})}), "it holds no images"),
    (TRAIN, tar({CLASS: 700 * b"1"}), f"({CLASS}: "),
    (TRAIN, tar({CLASS: header("n01440764_1.JPEG", 100)}),
     f"({CLASS}: n01440764_1.JPEG is cut off)"),
    (TRAIN, tar({CLASS: header("n01440764_1.JPEG", 2**30)}),
     f"({CLASS}: n01440764_1.JPEG has 1,073,741,824 bytes and may have"),
    (TRAIN, tar({CLASS: tar({"a/n01440764_1.JPEG": b"1", "b/n01440764_1.JPEG": b"2"})}),
     f"({CLASS}: b/n01440764_1.JPEG is there twice)"),
    (TRAIN, tar({CLASS: tar({"n01443537_1.JPEG": b"1"})}),
     f"({CLASS}: n01443537_1.JPEG is no image of this class)"),
    (TRAIN, tar({CLASS: tar({"n01440764_1\udcff.JPEG": b"1"})}),
     f"({CLASS}: n01440764_1\\udcff.JPEG is no image of this class)"),
    (TRAIN, tar({CLASS: tar({f"n01440764_{i}.JPEG": b"" for i in range(2601)})}),
     f"({CLASS}: it holds more than 2,600 entries)"),
])
def test_hostile_archives_are_refused(tmp_path, name, content, wanted):
  source = write_archives(tmp_path / "source")
  (source / name).write_bytes(content)
  message = refusal(tmp_path / "data", source, partial=True)
  assert message.startswith(f"source='{source}': {name} ") and wanted in message
  assert not os.listdir(tmp_path / "data")


@pytest.mark.parametrize("name", [TRAIN, VAL])
def test_an_archive_that_is_cut_off_is_refused(tmp_path, name):
  source = write_archives(tmp_path / "source")
  content = (source / name).read_bytes().rstrip(b"\0")
  for size in (len(content) - 600, len(content) // 2):
    os.truncate(source / name, size)
    message = refusal(tmp_path / "data", source, partial=True)
    assert name in message and ("is cut off" in message or "cannot be" in message)
  assert not list((tmp_path / "data").rglob("*.*"))


def test_an_interruption_leaves_nothing(tmp_path, monkeypatch):
  source = write_archives(tmp_path / "source")
  examples = imagenet.examples

  def interrupted(folder, split, unreadable):
    yield next(examples(folder, split, unreadable))
    raise KeyboardInterrupt

  monkeypatch.setattr(imagenet, "examples", interrupted)
  with pytest.raises(KeyboardInterrupt):
    prepare.prepare("imagenet2012", tmp_path / "data", source, partial=True)
  assert not list((tmp_path / "data").rglob("*.*"))


def test_too_little_space_is_noticed_before_writing(tmp_path, monkeypatch):
  source = write_archives(tmp_path / "source")
  size = sum(path.stat().st_size for path in source.iterdir())
  usage = prepare.shutil.disk_usage(tmp_path)._replace(free=2 * size - 1)
  monkeypatch.setattr(prepare.shutil, "disk_usage", lambda _: usage)
  assert "free space" in refusal(tmp_path / "data", source, partial=True)


def test_the_command(tmp_path, monkeypatch, capsys):
  files = train_files()
  files["n01443537"]["n01443537_0.JPEG"] = b"no image"
  source = write_archives(tmp_path / "source", files)
  monkeypatch.setattr(prepare.flags, "FLAGS", types.SimpleNamespace(
      dataset="imagenet2012", data_dir=str(tmp_path), source=str(source), partial=True,
      image_size=None, grayscale=False, seed=0, skip_damaged=False))
  prepare.main()
  assert capsys.readouterr().out.splitlines() == [
      "no image, kept as it is: n01443537_0.JPEG",
      "1 files are no images",
      f"{tmp_path}/imagenet2012/5.1.0",
      "  train: 21 images",
      "  validation: 3 images",
      "  test: 6 images",
      "Train with: python -m minw.main --config=imagenet_resnet18"
      f" --workdir=runs/imagenet2012 --config.data_dir={tmp_path}"]


def test_evaluation_is_that_of_single_images(imagenet_data):
  # The rule, written down once more: 40 x 30 to 16 x 12, then the middle 8 x 8.
  experiment = Experiment(tiny_config(imagenet_data))
  assert experiment.info.image_shape == (12, 12, 3)
  seen = []
  for data, start in experiment.data.eval_batches(experiment.data.load("test")):
    images, labels, mask = experiment.data.eval_inputs(data, start)
    assert images.shape == (4, 8, 8, 3) and start == 4 * (len(seen) // 4)
    seen += zip(np.asarray(images), np.asarray(labels), np.asarray(mask))
  assert [bool(mask) for *_, mask in seen] == [True] * 6 + [False] * 2
  stored = records(imagenet_data, "validation").values()
  for record, (image, label, _) in zip(stored, seen):
    whole = Image.open(io.BytesIO(record["image"])).resize((16, 12), Image.BILINEAR)
    exact = (np.asarray(whole)[2:10, 4:12] - np.array([124.0, 116, 104])) / 64
    np.testing.assert_array_equal(image, exact)
    assert label == record["label"]


def test_top5_is_counted(imagenet_data):
  experiment = Experiment(tiny_config(imagenet_data))
  stored = records(imagenet_data, "validation").values()
  labels = [record["label"] for record in stored]
  evaluator = evaluate.Evaluator(experiment)
  evaluator._experiment = types.SimpleNamespace(
      data=experiment.data, fold=lambda variables: variables,
      info=experiment.info, replicated=experiment.replicated,
      model=types.SimpleNamespace(apply=fixed_logits))
  logits = np.zeros(1000, np.float32)
  logits[[labels[0], 5, 6, 7, labels[1], labels[2]]] = [9, 8, 7, 6, 5, 4]
  found = evaluator.hard(logits, experiment.data.load("test"))
  assert found["accuracy"] == pytest.approx(1 / 6)
  assert found["top5_accuracy"] == pytest.approx(2 / 6)


def fixed_logits(logits, images, *_, **__):
  return jnp.broadcast_to(logits, (len(images), 1000)), {}


@contextlib.contextmanager
def stop_after(monkeypatch, count):
  """The training loop is told to stop, as by SIGTERM, after `count` steps."""
  make = train_step.make_train_step

  def make_train_step(experiment):
    step, calls = make(experiment), iter(range(1, 10**6))

    def counted(*arguments):
      if next(calls) == count:
        os.kill(os.getpid(), 15)
      return step(*arguments)

    return counted

  with monkeypatch.context() as patch:
    patch.setattr(train_step, "make_train_step", make_train_step)
    yield


@pytest.mark.parametrize("image, wanted", [
    (Image.fromarray(np.full((16, 16), 0x4DFF, np.uint16)), (0x4D, 0x4D, 0x4D)),
    (Image.new("RGBA", (16, 16), (200, 100, 50, 128)), (100, 50, 25)),
    (Image.new("RGB", (16, 16), (200, 100, 50)), (200, 100, 50)),
    (Image.new("1", (16, 16), 1), (255, 255, 255))])
def test_images_of_other_kinds_are_stored_as_they_look(image, wanted):
  file = io.BytesIO()
  image.save(file, "png")
  with Image.open(io.BytesIO(imagenet.as_jpeg(file.getvalue()))) as stored:
    assert (stored.format, stored.mode) == ("JPEG", "RGB")
    np.testing.assert_allclose(stored.getpixel((8, 8)), wanted, atol=2)


@pytest.mark.slow
def test_a_run_goes_on_with_other_workers(imagenet_data, tmp_path, monkeypatch):
  plain = train.train_and_evaluate(tiny_config(imagenet_data), str(tmp_path / "plain"))
  assert plain["state"] == "done" and plain["step"] == 10
  lines, _ = outcome(tmp_path / "plain")
  assert [line["damaged"] for line in lines if line["split"] == "train"] == [0, 0]
  assert all("top5_accuracy" in line for line in lines if line["split"] != "train")
  for step, workers in ((3, 1), (10**6, 2)):
    with stop_after(monkeypatch, step):
      status = train.train_and_evaluate(
          tiny_config(imagenet_data, data_workers=workers), str(tmp_path / "other"))
  assert status == plain
  assert outcome(tmp_path / "other") == outcome(tmp_path / "plain")
  assert trees_of(tmp_path / "other") == trees_of(tmp_path / "plain")

  # What is packed sees the same pixels, whether from the loader or from files.
  workdir, model = str(tmp_path / "plain"), str(tmp_path / "net.minw")
  packed.write(model, pack.pack_workdir(workdir))
  assert verify.verify_workdir(workdir, model) == 0
  evaluated = evaluate.evaluate_workdir(workdir)
  found = evaluate.evaluate_model(model, data_dir=str(imagenet_data))
  assert found["accuracy"] == evaluated["accuracy"] == plain["test_accuracy"]
  assert found["top5_accuracy"] == plain["test_top5_accuracy"]
  assert found["loss"] == pytest.approx(plain["test_loss"], rel=1e-5)
  image = tmp_path / "image.jpg"
  image.write_bytes(validation_files()["ILSVRC2012_val_00000003.JPEG"])
  names = list(records(imagenet_data, "validation"))
  place = names.index("ILSVRC2012_val_00000003.JPEG")
  network = infer.load(model)
  np.testing.assert_array_equal(
      infer.read_image(image, network.program.source_shape),
      Experiment(tiny_config(imagenet_data)).data.source_images("test")[place])


@pytest.fixture(scope="session")
def real_archives():
  folder = os.environ.get("MINW_TEST_IMAGENET")
  if not folder:
    pytest.skip("MINW_TEST_IMAGENET names no folder of ImageNet's archives")
  return pathlib.Path(folder)


def test_real_images(real_archives, tmp_path):
  prepare.prepare("imagenet2012", tmp_path, real_archives, partial=True)
  originals = {}
  with tarfile.open(real_archives / "ILSVRC2012_img_train.tar") as archive:
    for member in list(archive)[:100]:
      with tarfile.open(fileobj=archive.extractfile(member)) as images:
        first = images.next()
        content = images.extractfile(first).read()
        originals[first.name] = (member.name[:-4], content)
  names = datasets.info("imagenet2012").label_names
  found = records(tmp_path, "train")
  for name, (label, content) in originals.items():
    assert names[found[name]["label"]] == label
    assert found[name]["image"] == content
  experiment = Experiment(tiny_config(
      tmp_path, crop_size=224, eval_resize=256, batch_size=8, eval_batch_size=8))
  data = experiment.data.load("train")
  batches = data.random_crops(
      0, seed=0, batch_size=8, crop_size=224, crop_scale=(0.08, 1.0), flip=True)
  means = [next(batches).images.mean((0, 1, 2)) for _ in range(10)]
  assert np.abs(np.mean(means, 0) - [124, 116, 104]).max() < 15
  assert data.damaged == 0 and data.decode_rate > 20
  sources = experiment.data.source_images("test")
  assert sources.shape[1:] == (256, 256, 3) and 30 < sources.std() < 100
