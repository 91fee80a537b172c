"""A small ImageNet: its archives, its prepared records, and short runs on it."""

import io
import json

import numpy as np
from PIL import Image

from archives import tar
from minw import config as config_lib
from short_runs import lines_of

TRAIN, VAL = "ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar"
# Tench, goldfish and toilet tissue are the first two classes and the last.
LABELS = {"n01440764": 0, "n01443537": 1, "n15075141": 999}


def encode(pixels, kind="jpeg", mode="RGB", **options):
  file = io.BytesIO()
  Image.fromarray(pixels).convert(mode).save(file, kind, **options)
  return file.getvalue()


def picture(seed, width=40, height=30):
  """Smooth, so that JPEG changes little: a ramp in each channel."""
  corners = np.random.default_rng(seed).integers(0, 256, (2, 2, 3), np.uint8)
  return np.asarray(Image.fromarray(corners).resize((width, height)))


def train_files():
  """{class: {name: content}}: among them what ImageNet has that is not RGB JPEG."""
  files = {}
  for name, label in LABELS.items():
    files[name] = {f"{name}_{i}.JPEG": encode(picture(10 * label + i), quality=95)
                   for i in range(7)}
  first = files["n01440764"]
  first["n01440764_7.JPEG"] = encode(picture(7), mode="L")
  first["n01440764_8.JPEG"] = encode(picture(8), mode="CMYK", quality=95)
  first["n01440764_9.JPEG"] = encode(picture(9), "png")
  return files


def validation_files():
  return {f"ILSVRC2012_val_{i:08}.JPEG": encode(picture(100 + i)) for i in range(1, 7)}


def write_archives(folder, train_=None, validation=None):
  """Writes both archives, by default of all the files above; returns the folder."""
  folder.mkdir(exist_ok=True)
  classes = {f"{name}.tar": tar(files)
             for name, files in (train_ or train_files()).items()}
  (folder / TRAIN).write_bytes(tar(classes))
  (folder / VAL).write_bytes(tar(validation or validation_files()))
  return folder


def tiny_config(data_dir, **changes):
  c = config_lib.default_config()
  c.update(dataset="imagenet2012", data_dir=str(data_dir), crop_size=8, eval_resize=12,
           conv_widths=(4, 4), dense_widths=(), batch_size=4, eval_batch_size=4,
           num_epochs=2, weight_bits=2, reestimate_batches=2)
  c.update(changes)
  return c


def outcome(workdir):
  """All lines of metrics.jsonl, without rates, and the status."""
  return lines_of(workdir), json.loads((workdir / "status.json").read_text())
