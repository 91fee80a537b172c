"""Hostile packed networks through every command that takes one.

Whoever wrote a file chose all of its bytes, and its checksum is right. A command then
either works or ends with code 2 and one line. It prints no control characters, takes no
long time and no large memory, and what it exports holds no code of the file's author.

MINW_HOSTILE_MODELS is the number of files that the slow test makes, and
MINW_HOSTILE_SEED the first of their seeds.
"""

import collections
import functools
import json
import os
import pathlib
import random
import re
import shutil
import signal
import struct
import subprocess
from typing import Sequence

import numpy as np
from PIL import Image
import pytest

from minw import packed
import packed_files

COUNT = int(os.environ.get("MINW_HOSTILE_MODELS", "200"))
FIRST = int(os.environ.get("MINW_HOSTILE_SEED", "0"))
SECONDS, MEMORY = 20, 2**31  # That a command may take, beside what Python has.
GCC = shutil.which("gcc")

# Parts of names, labels and other texts.
TEXTS = [
    "", " ", "a", "same", "\n", "\r\n", "\t", "\0", "\x1b[31m", "\x1b]0;title\x07",
    "\x7f",
    "\x9b2J", "\u2028", "\u202e", "\u200d", "é", "数字", "\U0001f600", "error: forged",
    "/images/0.png\tfake\t1.0000", "*/", "/*", "*/ int evil; /*", "\nint evil;\n",
    "// ",
    "\\", "\\\n", "??/", "??/\n", '"', "'", '"; int evil = "', "\\u000a", "%s%n",
    "{evil}",
    "#define evil", "\n#include \"/dev/zero\"\n", "$(touch evil)", "../../evil",
    "/etc/evil", "-evil", "--evil=1", "<evil>", "a" * 60, "b" * 300]
VALUES = [
    None, True, False, 0, 1, -1, 2**31, 2**63, 10**200, 0.5, -0.0, 1e308, "1e999", [],
    {},
    [[]], [None] * 10, [1] * 10, ["a"], ["a"] * 9, ["a"] * 11, ["a"] * 10, {"a": 1},
    "digits", "cifar10", "imagenet2012", "~/evil", "/dev/zero"]
FIELDS = ["labels", "config", "config_hash", "step", "minw", "version", "", "\x1b[2J"]
CONFIG = ["dataset", "data_dir", "data_workers", "eval_resize", "max_damaged",
          "init_from",
          "seed", "bits_rules", "input_bits", "evil\n", "conv_widths", "random_flip"]
FLOATS = [0x7f800000, 0xff800000, 0x7fc00000, 0xffffffff, 0x7f7fffff, 0xff7fffff, 1,
          0x80000001, 0x00800000, 0x80000000, 0, 0x3f800000, 0x71800000, 0x0d800000]


def program_of() -> packed.Program:
  """A network of the digits' size with random weights."""
  rng = np.random.default_rng(0)
  sign = lambda *shape: rng.choice([-1, 1], shape).astype(np.int8)
  ops = (
      packed.Conv("layer0", 0, 1, sign(4, 3, 3, 1), pads=(1, 1, 1, 1)),
      packed.Pool("layer1", 1, "max", (2, 2), (2, 2)),
      packed.Threshold("layer2", 2, 1, rng.random(4) < 0.5,
                       rng.integers(-50, 50, (1, 1, 4)).astype(np.int32)),
      packed.Conv("layer3", 3, 1, sign(10, 4, 4, 4)),
      packed.Logits("layer4", 4, 0.5, *np.float32([[1] * 10, [0.25] * 10, [0] * 10])))
  return packed.Program((8, 8, 1), (8, 8), np.uint8([78]), 10, ops, {})


BODY = packed.to_bytes(program_of())[32:-2]


def file_of(names: Sequence[bytes] = (), metadata: bytes = b"{}", body=BODY) -> bytes:
  """The network's file with these names of layers and metadata, whatever they are."""
  for i, name in enumerate(names):
    old = b"layer%d" % i
    assert body.count(old) == 1
    body = body.replace(bytes([len(old)]) + old, bytes([len(name)]) + name)
  return packed_files.packed_file(1, body, metadata)


def text_of(rng: random.Random) -> str:
  return "".join(rng.choices(TEXTS, k=rng.choice([1, 1, 2, 3])))


def value_of(rng: random.Random):
  kind = rng.randrange(5)
  if kind == 0:
    return [text_of(rng) for _ in range(10)]
  if kind == 1:
    return {rng.choice(CONFIG): rng.choice([*VALUES, text_of(rng)])
            for _ in range(rng.randrange(3))}
  return text_of(rng) if kind == 2 else rng.choice(VALUES)


def metadata_of(rng: random.Random) -> bytes:
  """Metadata of wrong types and hostile texts, or JSON that is damaged."""
  found = {"labels": [str(i) for i in range(10)], "config": {"dataset": "digits"},
           "step": 7, "config_hash": "0123abcd"}
  for _ in range(rng.randrange(3)):
    found[rng.choice(FIELDS)] = value_of(rng)
  if rng.random() < 0.3:
    found["labels"] = [text_of(rng) for _ in range(10)]
  if rng.random() < 0.3:
    found["config"] = {rng.choice(CONFIG): rng.choice([*VALUES, text_of(rng)])}
  data = json.dumps(found,
                    ensure_ascii=rng.random() < 0.5).encode(errors="surrogatepass")
  for old, new in ((b'"1e999"', b"1e999"), (b"null", b"NaN"), (b"7", b"-Infinity"),
                   (b'"step"', b'"labels"'), (b'"0"', b'"\\ud800"'),
                   (b"{", b'{"x":' + b"[" * 2000 + b"]" * 2000 + b",")):
    if rng.random() < 0.05:
      data = data.replace(old, new, 1)
  for _ in range(rng.choice([0, 0, 0, 1, 3])):
    at = rng.randrange(len(data))
    data = data[:at] + bytes([rng.randrange(256)]) + data[at + rng.randrange(3):]
  return data if rng.random() < 0.95 else data.decode(errors="replace").encode("utf-16")


def hostile_file(seed: int) -> bytes:
  """A file with hostile metadata, names, float constants, or some of these."""
  rng = random.Random(seed)
  names, metadata, body = (), b'{"config":{"dataset":"digits"}}', bytearray(BODY)
  kind = seed % 4
  if kind in (0, 2):
    metadata = metadata_of(rng)
  else:
    names = [text_of(rng).encode()[:255] for _ in range(5)]
    names = [name.decode(errors="ignore").encode() for name in names]
    if rng.random() < 0.1:
      names = names[:1] * 5
    if rng.random() < 0.1:
      names[0] = b"\xff\xed\xa0\x80"
  if kind == 3:
    # The last 124 bytes are the unit and 30 constants.
    for _ in range(rng.randrange(3)):
      at = len(body) - 4 * rng.randint(1, 31)
      body[at:at + 4] = struct.pack("<I", rng.choice(FLOATS))
  return file_of(names, metadata, bytes(body))


@pytest.fixture(scope="module")
def execute(command):
  """execute(module, *argv): how a command ended, within its time and memory."""
  return functools.partial(command, seconds=SECONDS, memory=MEMORY)


def fault(result) -> str:
  """What is wrong with how a command ended; nothing if it is empty."""
  if result.code == -signal.SIGALRM:
    return "hang"
  if result.code < 0:
    return f"signal {-result.code}"
  if "Traceback" in result.err or result.code not in (0, 2):
    return "traceback: " + result.err[-200:]
  if result.code == 2 and (result.err.count("\n") != 1 or result.out):
    return "several lines"
  bad = set(re.sub("[\n\t]", "", result.out) + result.err.replace("\n", ""))
  bad = {c for c in bad if not c.isprintable()}
  return f"unprintable: {sorted(bad)}" if bad else ""


def fault_of_c(path: pathlib.Path) -> str:
  """Whether a C file compiles, to no other symbols than its own, and is right."""
  built = subprocess.run(
      [GCC, "-std=c99", "-trigraphs", "-Wall", "-Wextra", "-pedantic", "-Werror",
       "-DMINW_MAIN", "-o", path.with_suffix(".out"), path],
      capture_output=True, text=True, errors="replace")
  if built.returncode:
    return "C does not compile: " + built.stderr[:200]
  symbols = subprocess.run(["nm", path.with_suffix(".out")], check=True,
                           capture_output=True, text=True).stdout
  if "evil" in symbols:
    return "C has other symbols"
  done = subprocess.run([path.with_suffix(".out")], capture_output=True)
  return "" if done.returncode == 0 else "C is not right"


def faults(execute, model: pathlib.Path, image: pathlib.Path, out: pathlib.Path, forms):
  """Runs a model through the commands: pairs of a command and what is wrong."""
  shown = execute("minw.infer", f"--model={model}", "--top=2", "--kernels", str(image))
  yield "infer", fault(shown)
  if shown.code == 0:
    image_line, *kernels = shown.out.split("\n")[:-1]
    fields = image_line.split("\t")
    forged = (len(fields) != 5 or fields[0] != str(image) or len(kernels) != 5
              or any(line.count("\t") != 1 for line in kernels))
    yield "infer", "forged lines" if forged else ""
  yield "evaluate", fault(execute("minw.evaluate", f"--model={model}"))
  for form in forms:
    made = execute("minw.export", f"--model={model}", f"--format={form}",
                   f"--out={out}.{form}", f"--golden={out}.golden", f"--images={image}")
    yield form, fault(made)
    if (made.code == 0) != (shown.code == 0):
      yield form, f"other end than infer: {made.err or shown.err}"
    if made.code == 0 and form == "c" and GCC:
      yield form, fault_of_c(pathlib.Path(f"{out}.c"))


@pytest.mark.slow
def test_hostile_models(execute, tmp_path):
  Image.new("L", (8, 8), 99).save(tmp_path / "image.png")
  found, ends = [], collections.Counter()
  for seed in range(FIRST, FIRST + COUNT):
    model = tmp_path / "net.minw"
    model.write_bytes(hostile_file(seed))
    forms = ["c"]
    if seed % 8 == 1:
      forms += ["onnx", "qonnx", "stablehlo"]
    for command, bad in faults(
        execute, model, tmp_path / "image.png", tmp_path / "out", forms):
      ends[command, bad.partition(":")[0] or "no fault"] += 1
      if bad:
        found.append((seed, command, bad))
  print("\n".join(f"{command:10} {count:6} {end}"
                  for (command, end), count in sorted(ends.items())))
  left = {path.name for path in tmp_path.iterdir()}
  assert found == [] and not {name for name in left if "evil" in name}


@pytest.mark.parametrize("what", [
    "pipe", "folder", "empty", "half", "hole", "loop", "none", "/dev/zero", "/dev/null",
    "/proc/self/mem", "/dev/stdin"])
def test_what_is_no_file_of_a_network(execute, tmp_path, what):
  path = tmp_path / what.strip("/") if what[0] != "/" else what
  data = file_of()
  if what == "pipe":
    os.mkfifo(path)
  elif what == "folder":
    path.mkdir()
  elif what == "loop":
    path.symlink_to(path)
  elif what in ("empty", "half"):
    path.write_bytes(data[:len(data) // 2] if what == "half" else b"")
  elif what == "hole":
    path.write_bytes(data[:32])
    os.truncate(path, 2**40)
  Image.new("L", (8, 8), 99).save(tmp_path / "image.png")
  images = f"--images={tmp_path}/image.png"
  for module, *more in (("minw.infer", images), ("minw.evaluate",), (
      "minw.export", "--format=c", f"--out={tmp_path}/a.c", images)):
    result = execute(module, f"--model={path}", *more)
    assert fault(result) == "" and result.code == 2, result
    assert result.err.startswith(f"error: model='{path}': ")


def test_some_hostile_models(execute, tmp_path):
  """A few of the slow test's files, of each kind."""
  Image.new("L", (8, 8), 99).save(tmp_path / "image.png")
  names = [b"*/ int evil; /*\n", b"??/\n\x1b[31m", b"\\", b"", "é".encode() * 120]
  labels = json.dumps({"labels": ["\x1b[31m\terror"] * 10}).encode()
  for data in (file_of(names), file_of((), labels)):
    (tmp_path / "net.minw").write_bytes(data)
    assert not [pair for pair in faults(
        execute, tmp_path / "net.minw", tmp_path / "image.png", tmp_path / "out", ["c"])
                if pair[1]]
