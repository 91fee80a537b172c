"""Exports to C, StableHLO and golden values: by hand, and as the packed network.

C is compiled with all warnings as errors; StableHLO runs in processes without minw.
"""

import ctypes
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
import types

import hypothesis
from hypothesis import strategies as st
import jax
import numpy as np
from PIL import Image
import pytest

from c_programs import order
from c_programs import tool
from minw import errors
from minw import packed
from minw.data import datasets
from minw.export import __main__ as export_command
from minw.export import c
from minw.export import c_cost
from minw.export import c_memory
from minw.export import c_text
from minw.export import golden
from minw.kernels import reference
from packed_models import WHOLE
from packed_models import convnet
from packed_models import digits_convnet
from packed_models import pooled_convnet
from packed_networks import GROUPS
from packed_networks import Builder
from packed_networks import chained_pools
from packed_networks import digits_network
from packed_networks import groups_and_dilation
from packed_networks import images
from packed_networks import programs
from packed_networks import residual_and_dense
from packed_networks import small
from packed_networks import small_image
from packed_networks import sum_of_many
from packed_networks import tree

ROOT = pathlib.Path(__file__).parents[1]
GCC = shutil.which("gcc")
WARNINGS = ("-Wall", "-Wextra", "-Wpedantic", "-Wconversion", "-Wshadow", "-Wcomment",
            "-Wtrigraphs", "-Werror")
FLAGS = ("-std=c99", *WARNINGS)
needs_gcc = pytest.mark.skipif(GCC is None, reason="gcc is not installed")


STACKS = {
    "sum": sum_of_many, "sums": lambda: chained_pools("sum", 5),
    "maxima": lambda: chained_pools("max", 3), "tree": tree,
    "digits": digits_convnet, "every1": lambda: residual_and_dense(1),
    "every3": lambda: residual_and_dense(3), "dense": small,
    "groups": lambda: groups_and_dilation(3, -1)}


def library_of(text, folder, *flags):
  """The library that GCC makes of a C file."""
  (folder / "net.c").write_text(text, "ascii")
  subprocess.run([GCC, *flags, "-shared", "-fPIC", "-o", folder / "net.so",
                  folder / "net.c"], check=True)
  return ctypes.CDLL(str(folder / "net.so"))


def self_test(text, folder, compiler, *flags):
  """How the program ended that a compiler makes of a C file with its own test."""
  (folder / "net.c").write_text(text, "ascii")
  subprocess.run([compiler, *flags, *WARNINGS, "-DMINW_MAIN", "-o", folder / "net",
                  folder / "net.c"], check=True)
  return subprocess.run([folder / "net"], capture_output=True)


def compiled(program, folder, *flags):
  """The function of images that a compiler makes of the C file."""
  text = c.source(program, images(program, 1))
  function = library_of(text, folder, *FLAGS, "-O1", *flags).minw_run

  def run(batch):
    labels, scores = [], np.zeros((len(batch), program.num_classes), np.int32)
    for image, row in zip(np.ascontiguousarray(batch), scores):
      labels.append(function(ctypes.c_void_p(image.ctypes.data),
                             ctypes.c_void_p(row.ctypes.data)))
    return labels, scores

  return run


def assert_c_equal(program, folder, batch, *flags):
  logits = reference.logits(program, batch)
  labels, scores = compiled(program, folder, *flags)(batch)
  np.testing.assert_array_equal(scores, order(logits))
  assert labels == logits.argmax(-1).tolist()


def test_golden_by_hand(tmp_path):
  image = small_image()
  golden.write(tmp_path / "new" / "folder", small(), image)
  folder = tmp_path / "new" / "folder"
  index = json.loads((folder / "index.json").read_text())
  assert index["labels"] == ["no", "yes"] and index["pixel_offset"] == [7]
  assert [v["name"] for v in index["values"]] == ["00_image", "01_fc", "02_norm"]
  assert index["values"][1] == {
      "name": "01_fc", "kind": "INT", "shape": [1, 1, 2], "operation": "Conv",
      "inputs": ["00_image"]}
  load = lambda name: np.load(folder / f"{name}.npy")
  np.testing.assert_array_equal(load("input"), image)
  assert load("00_image").tolist() == [[[[3], [13]], [[23], [40]]]]
  assert load("01_fc").tolist() == [[[[-73, -1]]]]
  assert load("02_norm").tolist() == [[[[-112.5, 10.0]]]]
  assert load("01_fc").dtype == np.int32 and load("02_norm").dtype == np.float32


def test_golden_says_what_codes_stand_for(tmp_path):
  program = convnet(1, 3)
  golden.write(tmp_path, program, images(program, 2))
  values = json.loads((tmp_path / "index.json").read_text())["values"]
  code = next(v for v in values if v["kind"] == "CODE")
  assert code["levels"] == [-4, -2, -1, 0, 1, 2, 4]
  codes = np.load(tmp_path / f"{code['name']}.npy")
  assert codes.shape == (2, *code["shape"]) and codes.dtype == np.int8


@pytest.mark.parametrize("text, name", [
    ("", ""), ("a/../b", "a_b"), ("\n*/", "_"), ("é数字", "_"), ("..", "_"),
    ("a" * 255, "a" * 100)])
def test_names_of_values_are_names_of_files(tmp_path, text, name):
  program = small()
  program = program._replace(ops=tuple(op._replace(name=text) for op in program.ops))
  golden.write(tmp_path / "golden", program, images(program, 1))
  assert sorted(os.listdir(tmp_path)) == ["golden"]
  assert sorted(os.listdir(tmp_path / "golden")) == [
      "00_image.npy", f"01_{name}.npy", f"02_{name}.npy", "index.json", "input.npy"]


@pytest.mark.parametrize("bits", (1, 2, 3))
def test_golden_of_groups_and_dilation(tmp_path, bits):
  """A depthwise layer, by NumPy."""
  program = groups_and_dilation(bits)
  golden.write(tmp_path, program, images(program, 2))
  index = json.loads((tmp_path / "index.json").read_text())["values"]
  x, y = (packed.levels(np.load(tmp_path / f"{index[i]['name']}.npy"), bits)
          if i == 2 else np.load(tmp_path / f"{index[i]['name']}.npy") for i in (2, 3))
  x = np.pad(x.astype(int), [(0, 0), (1, 1), (1, 1), (0, 0)])
  kernel = packed.levels(program.ops[2].kernel, bits).astype(int)
  h, w = y.shape[1:3]
  wanted = sum(x[:, i:i + h, j:j + w] * kernel[:, i, j, 0]
               for i in range(3) for j in range(3))
  np.testing.assert_array_equal(y, wanted)


@needs_gcc
def test_c_by_hand(tmp_path):
  image = small_image()
  labels, scores = compiled(small(), tmp_path)(image)
  # 10.0 is 0x41200000 and -112.5 is 0xc2e10000 in float32.
  assert labels == [1]
  assert scores.tolist() == [[0xc2e10000 - 2**32 ^ 0x7fffffff, 0x41200000]]


@needs_gcc
def test_c_zeros_are_equal(tmp_path):
  """The first of equal scores is the label, also where one is -0."""
  image = small_image()
  program = small()
  zeros = program.ops[1]._replace(
      center=np.float32([-36.5, -0.5]), scale=np.float32([-3, 4]),
      constant=np.float32([-0.0, -0.0]))
  program = program._replace(ops=(program.ops[0], zeros))
  assert np.signbit(reference.logits(program, image)).tolist() == [[True, False]]
  labels, scores = compiled(program, tmp_path)(image)
  assert labels == [0] and scores.tolist() == [[0, 0]]


@needs_gcc
def test_c_rounds_every_step(tmp_path):
  rng = np.random.default_rng(0)
  program = digits_convnet()
  last = program.ops[-1]._replace(
      unit=0.1, **{field: rng.normal(size=10).astype(np.float32)
                   for field in ("center", "scale", "constant")})
  program = program._replace(ops=(*program.ops[:-1], last))
  # -ffast-math would change how the whole process rounds from then on.
  assert_c_equal(program, tmp_path, images(program, 50), "-O3", "-march=native",
                 "-ffp-contract=fast")


@needs_gcc
def test_c_gives_labels_alone(tmp_path):
  program = digits_network()
  text = c.source(program, images(program, 1))
  function = library_of(text, tmp_path, *FLAGS).minw_run
  image, = batch = datasets.load("digits", "test", None)[0][:1]
  label = function(ctypes.c_void_p(np.ascontiguousarray(image).ctypes.data), None)
  assert label == reference.logits(program, batch).argmax()


@hypothesis.given(st.lists(st.floats(width=32, allow_nan=False), min_size=2))
def test_scores_order_as_logits(logits):
  logits = np.float32(logits)
  scores = c.scores(logits)
  np.testing.assert_array_equal(scores, order(logits))
  for a, b in zip(range(len(logits)), range(1, len(logits))):
    assert (logits[a] < logits[b]) == (scores[a] < scores[b])
    assert (logits[a] == logits[b]) == (scores[a] == scores[b])


@needs_gcc
@pytest.mark.parametrize("bits", [(1, 1), (2, 2), (3, 3), (1, 3), (3, 1)])
def test_c_convnets(tmp_path, bits):
  program = convnet(*bits, shape=(11, 12, 3), crop=(11, 9))
  assert_c_equal(program, tmp_path, images(program, 20))


@needs_gcc
@pytest.mark.parametrize("bits", (1, 2, 3))
def test_c_every_operation(tmp_path, bits):
  program = residual_and_dense(bits)
  assert_c_equal(program, tmp_path, images(program, 20))


@needs_gcc
@pytest.mark.parametrize("bits, pad", GROUPS)
def test_c_groups_and_dilation(tmp_path, bits, pad):
  program = groups_and_dilation(bits, pad)
  assert_c_equal(program, tmp_path, images(program, 10), "-fsanitize=undefined",
                 "-fno-sanitize-recover")


def sliced(w_bits, x_bits, pad, bias, channels=32, out=64, last_bits=1):
  """A network whose convolutions, but the last, are computed 32 channels at once.

  The codes of its first layer are mostly 1 or mostly -1, as the sign of `bias` says.
  """
  b = Builder(np.random.default_rng(w_bits), (13, 11, 3), (12, 11))
  x = b.threshold(b.conv(0, w_bits, channels, (3, 2), (1, 2), (2, 1, 0, 1)), x_bits)
  b.ops[-1].thresholds[:] -= bias
  b.ops[-1].falling[:] = False
  x = b.conv(x, w_bits, out, (3, 3), (2, 1), (2, 3, 1, 2), pad, dilation=(2, 1))
  x = b.add(packed.Pool("pool", x, "max", (2, 3), (2, 3), (1, 0, 0, 1)))
  b.ops[-2].kernel[:, :, :, ::3] = -1
  x = b.threshold(x, last_bits)
  return b.end(b.threshold(b.conv(x, w_bits, out), last_bits, x), w_bits)


@needs_gcc
@pytest.mark.parametrize("flags", [(), ("-U__GNUC__",)], ids=["gnu", "standard"])
@pytest.mark.parametrize("w_bits, x_bits", [
    (1, 1), (1, 2), (3, 3),
    *(pytest.param(*slow, marks=pytest.mark.slow)
      for slow in ((1, 3), (2, 1), (2, 2), (2, 3), (3, 1), (3, 2)))])
@pytest.mark.parametrize("pad, bias", [
    (0, 900), (-1, -900), *(pytest.param(*slow, marks=pytest.mark.slow)
                            for slow in ((1, 900), (0, -900)))])
def test_c_of_32_channels_at_once(tmp_path, w_bits, x_bits, pad, bias, flags):
  program = sliced(w_bits, x_bits, pad, bias, last_bits=x_bits)
  batch = images(program, 3)
  values = reference.run(program, batch)
  assert (np.mean(values[2] < 0) > 0.5) == (bias < 0)
  assert 0.1 < np.mean(values[5] < 0) < 0.9
  text = c.source(program, batch[:1])
  for call in ("sums1(n, y, x, b, blocks, two)",
               "sums(&conv3, r, s, b, blocks, two)",
               "sums(&conv6, y, x, b, blocks, two)"):
    assert call in text
  assert_c_equal(program, tmp_path, batch, "-fsanitize=undefined",
                 "-fno-sanitize-recover", *flags)


@needs_gcc
@pytest.mark.parametrize("x_bits, last_bits", [(3, 1), (2, 3)])
def test_c_of_32_channels_at_once_of_mixed_bits(tmp_path, x_bits, last_bits):
  program = sliced(1, x_bits, 0, 900, last_bits=last_bits)
  text = c.source(program, images(program, 1))
  assert "&conv3, " in text and "&conv6, " in text
  assert_c_equal(program, tmp_path, images(program, 3), "-fsanitize=undefined",
                 "-fno-sanitize-recover")


@needs_gcc
@pytest.mark.parametrize("channels, out", [(7, 14), (31, 62), (64, 32), (96, 96)])
def test_c_of_32_channels_at_once_by_width(tmp_path, channels, out):
  program = sliced(1, 1, 0, 0, channels, out)
  assert "&conv3, " in c.source(program, images(program, 1))
  assert_c_equal(program, tmp_path, images(program, 3), "-fsanitize=undefined",
                 "-fno-sanitize-recover")


def test_c_weights_in_slices_take_at_most_twice_the_room():
  """Widths that would fill words with zeros are computed channel by channel."""
  for channels, out, found in (
      (32, 32, True), (32, 16, False), (40, 64, False), (20, 40, True)):
    program = sliced(1, 1, 0, 0, channels, out)
    text = c.source(program, images(program, 1))
    assert ("&conv3, " in text) == found
    words = sum(map(int, re.findall(r"uint32_t (?:w|edges)3\[(\d+)\]", text)))
    assert words <= 2 * 9 * out * -(-channels // 32)


@needs_gcc
def test_c_depthwise_and_dilated_by_hand(tmp_path):
  """Weights two pixels apart, of two channels that do not mix."""
  kernel = np.int8([[[[1], [-1]]], [[[1], [1]]]])  # (2, 1, 2, 1)
  program = packed.Program(
      (1, 4, 2), (1, 4), np.uint8([0, 10]), 2, (
          packed.Conv("depthwise", 0, 1, kernel, (1, 2), (0, 0, 1, 0), groups=2,
                      dilation=(1, 2)),
          packed.Pool("sum", 1, "sum", (1, 2), (1, 1)),
          packed.Logits("norm", 2, 1.0, *np.float32([[0, 0], [1, 1], [0, 0]]))), {})
  image = np.uint8([[[[1, 20], [2, 30], [4, 40], [8, 50]]]])
  # Channel 0: 0 - 2, then 2 - 8. Channel 1, less 10: 0 + 20, then 20 + 40.
  labels, scores = compiled(program, tmp_path)(image)
  assert labels == [1]
  assert scores.tolist() == order(np.float32([[-8, 80]])).tolist()


@needs_gcc
@hypothesis.given(programs())
@hypothesis.settings(
    max_examples=12, suppress_health_check=list(hypothesis.HealthCheck))
def test_c_random_networks(tmp_path_factory, program):
  assert_c_equal(program, tmp_path_factory.mktemp("c"), images(program, 5), "-O0")


@needs_gcc
@pytest.mark.parametrize("flags", [("-O3", "-march=native"), ("-Os",)])
def test_c_digits(tmp_path, flags):
  """Equal on every test image."""
  batch = datasets.load("digits", "test", None)[0]
  assert_c_equal(digits_convnet(), tmp_path, batch, *flags)


@needs_gcc
def test_c_checks_itself(tmp_path):
  program, batch = digits_network({"labels": ['"\\?*/é%d', *"bcdefghij"]}), (
      datasets.load("digits", "test", None)[0][:3])
  text = c.source(program, batch)
  run = lambda text: self_test(text, tmp_path, GCC, "-std=c99")
  labels = program.metadata["labels"]
  found = reference.logits(program, batch).argmax(-1)
  result = run(text)
  assert result.returncode == 0
  assert result.stdout.decode() == "".join(
      f"image {i}: {k} {labels[k]}\n" for i, k in enumerate(found)
  ) + "all scores are right\n"
  score = order(reference.logits(program, batch))[0, 0]
  result = run(text.replace(f"{score},", f"{score - 1},", 1))
  assert result.returncode == 1 and b"1 scores are wrong" in result.stdout


def longest_sum():
  """More terms than functions may recurse."""
  b = Builder(np.random.default_rng(3), (3, 3, 1))
  x = y = b.conv(0, 1, 4)
  for _ in range(1500):
    y = b.add(packed.Add("add", y, x))
  return b.end(b.threshold(y, 1))


@pytest.mark.parametrize("make", [
    sum_of_many, tree, longest_sum, lambda: chained_pools("sum", 5),
    lambda: chained_pools("max", 2)], ids=["sum", "tree", "longest", "sums", "maxima"])
def test_c_of_long_sums_and_pools(tmp_path, make):
  tool("gcc")
  program = make()
  assert_c_equal(program, tmp_path, images(program, 5))


@pytest.mark.parametrize("name, flag", [
    ("gcc", "-Os"),
    *(pytest.param(*slow, marks=pytest.mark.slow) for slow in (
        ("gcc", "-O0"), ("gcc", "-O2"), ("clang", "-O0"), ("clang", "-Os"),
        ("clang", "-O2")))])
@pytest.mark.parametrize("make", STACKS.values(), ids=STACKS)
def test_c_takes_less_stack_than_it_says(tmp_path, make, name, flag):
  """As a painted stack shows."""
  program = make()
  text = c.source(program, images(program, 1))
  (tmp_path / "net.c").write_text(text)
  (tmp_path / "net.h").write_text(c.header(program))
  subprocess.run(
      [tool(name), "-std=c99", flag, "-I", tmp_path, "-o", tmp_path / "stack",
       ROOT / "tests" / "export" / "stack.c", tmp_path / "net.c"], check=True)
  used = int(subprocess.run([tmp_path / "stack"], check=True,
                            capture_output=True).stdout)
  stated = int(text.split("Stack: less than ")[1].split()[0])
  assert f"#define MINW_STACK {stated} " in text
  assert 0 < used < stated < 1500


@needs_gcc
@pytest.mark.parametrize("make", [
    sum_of_many, tree, lambda: chained_pools("sum", 8), lambda: residual_and_dense(2),
    lambda: groups_and_dilation(2)], ids=["sum", "tree", "sums", "every", "groups"])
def test_c_computes_every_element_once(tmp_path, make):
  program = make()
  text = c.source(program, images(program, 1))
  text, functions = re.subn(
      r"(static int32_t f(\d+)\(int y, int x, int c\) {\n)", r"\1  calls[\2]++;\n",
      text)
  sizes = [np.prod(kind.shape) for kind in packed.infer_values(program)[:-1]]
  library = library_of(f"long calls[{len(sizes)}];\n{text}", tmp_path)
  image, = images(program, 1)
  library.minw_run(ctypes.c_void_p(np.ascontiguousarray(image).ctypes.data), None)
  calls = (ctypes.c_long * len(sizes)).in_dll(library, "calls")
  assert functions > len(sizes) // 2
  # The image and sums inside a sum have no function.
  for called, size in zip(calls, sizes, strict=True):
    assert called in (0, size)
  assert sum(map(bool, calls)) == functions


NASTY = [
    "/* comment */", "*/ int x; /*", "// line", "ends with \\", "??/", "??' ??<",
    '"quoted"',
    "two\nlines\r\n", "tab\t", "é 数字 \u202e", "%s%d%n", "\\x41", "\x00", "a" * 4000]


@pytest.mark.parametrize("name, flags", [
    ("gcc", ["-std=c99"]), ("clang", ["-std=c99"]),
    ("g++", ["-x", "c++", "-std=c++11"]), ("clang++", ["-x", "c++", "-std=c++20"]),
    *(pytest.param(*slow, marks=pytest.mark.slow) for slow in (
        ("gcc", ["-std=c17"]),
        *(("g++", ["-x", "c++", f"-std=c++{year}"]) for year in (14, 17, 20)),
        *(("clang++", ["-x", "c++", f"-std=c++{year}"]) for year in (11, 14, 17))))])
def test_c_holds_any_text(tmp_path, name, flags):
  """In labels, names of layers and metadata, by each standard of C and C++."""
  names = iter(NASTY)
  program = residual_and_dense(1)
  program = program._replace(
      ops=tuple(op._replace(name=next(names, "layer")) for op in program.ops),
      num_classes=7, metadata={"labels": NASTY[:7], "config_hash": "*/??/\n\\"})
  text = c.source(program, images(program, 2))
  done = self_test(text, tmp_path, tool(name), *flags)
  assert done.returncode == 0
  found = reference.logits(program, images(program, 2)).argmax(-1)
  assert done.stdout.decode() == "".join(
      f"image {i}: {k} {NASTY[k]}\n" for i, k in enumerate(found)
  ) + "all scores are right\n"


@pytest.mark.parametrize("name, flags", [
    ("gcc", ["-std=c99"]),
    *(pytest.param(*slow, marks=pytest.mark.slow) for slow in (
        ("g++", ["-std=c++11", "-x", "c++"]), ("clang", ["-std=c99"]),
        ("clang++", ["-std=c++14", "-x", "c++"])))])
@pytest.mark.parametrize("make", STACKS.values(), ids=STACKS)
def test_c_compiles_without_warnings(tmp_path, make, name, flags):
  program = make()
  (tmp_path / "net.c").write_text(c.source(program, images(program, 1)))
  subprocess.run([tool(name), *flags, *WARNINGS, "-O1", "-c", "net.c"], check=True,
                 cwd=tmp_path)


@needs_gcc
def test_c_labels_are_bytes_of_utf8(tmp_path):
  program = digits_network({"labels": (NASTY + list("abcdefghij"))[4:14]})
  library = library_of(c.source(program, images(program, 1)), tmp_path, *FLAGS)
  labels = (ctypes.c_char_p * 10).in_dll(library, "minw_labels")
  # A C string ends at its first NUL.
  assert [label.decode() for label in labels] == [
      label.split("\0")[0] for label in program.metadata["labels"]]


@pytest.mark.parametrize("name, prefix", [
    ("digits", "digits"), ("ConvNet D.v2", "convnet_d_v2"), ("3bit", "minw_3bit"),
    ("__x__y__", "x_y"), ("Über-Netz", "uber_netz"), ("数字", "minw"), ("", "minw"),
    ("int", "int")])
def test_prefixes_by_hand(name, prefix):
  assert c_text.prefix(name) == prefix
  assert c_text.PREFIX.fullmatch(prefix)


@pytest.mark.parametrize("prefix", ["", "9a", "_a", "a_", "a__b", "a-b", "é", "a\n"])
def test_bad_prefixes_are_refused(prefix):
  with pytest.raises(ValueError, match="prefix .* must be made of letters"):
    c.source(small(), images(small(), 1), prefix)


@pytest.mark.parametrize("cc, cxx", [("gcc", "g++"), ("clang", "clang++")])
def test_c_networks_link_into_one_program(tmp_path, cc, cxx):
  """By their headers, from C++."""
  programs_of = {"first": small(), "int": digits_convnet()}
  wanted = []
  for prefix, program in programs_of.items():
    (tmp_path / f"{prefix}.h").write_text(c.header(program, prefix))
    # The header agrees with the file.
    (tmp_path / f"{prefix}.c").write_text(
        f'#include "{prefix}.h"\n' + c.source(program, images(program, 1), prefix))
    subprocess.run([tool(cc), *FLAGS, "-Wmissing-prototypes", "-c", f"{prefix}.c"],
                   cwd=tmp_path, check=True)
    zeros = np.zeros((1, *program.source_shape), np.uint8)
    wanted.append(int(reference.logits(program, zeros).argmax()))
  (tmp_path / "app.cc").write_text("""
#include "first.h"
#include "int.h"
#include <cstdio>
int main() {
  static const uint8_t a[FIRST_HEIGHT * FIRST_WIDTH * FIRST_CHANNELS] = {};
  static const uint8_t b[INT_HEIGHT * INT_WIDTH * INT_CHANNELS] = {};
  int32_t scores[FIRST_CLASSES + INT_CLASSES];
  std::printf("%d %d %s\\n", first_run(a, scores), int_run(b, nullptr), int_labels[9]);
}
""".replace("\\\\", "\\"))
  subprocess.run([tool(cxx), "-std=c++11", *WARNINGS, "-o", "app", "app.cc",
                  "first.o", "int.o"], cwd=tmp_path, check=True)
  said = subprocess.run([tmp_path / "app"], check=True, capture_output=True, text=True)
  assert said.stdout == f"{wanted[0]} {wanted[1]} number 9\n"
  names = subprocess.run(["nm", "-g", "--defined-only", "first.o"], cwd=tmp_path,
                         check=True, capture_output=True,
                         text=True).stdout.split()[2::3]
  assert sorted(names) == ["first_labels", "first_run"]


@needs_gcc
@pytest.mark.parametrize("bits, widths", [
    (1, (32, 64, 96)), *(pytest.param(*slow, marks=pytest.mark.slow) for slow in (
        (1, (32, 32, 64)), (2, (32, 32, 64)), (2, (32, 96, 128)),
        (3, (64, 128, 160))))])
def test_c_of_a_convnet_that_sums_over_its_last_map(tmp_path, bits, widths):
  """Blocks of 32 channels in groups of one to four."""
  program = pooled_convnet(bits, widths)
  assert_c_equal(program, tmp_path, images(program, 4))


@needs_gcc
@pytest.mark.parametrize("width", [2**15 - 3, 2**15 - 2, 2**15 + 8])
def test_c_of_a_wide_image(tmp_path, width):
  """Positions in a map that is computed in slices have 16 bits."""
  b = Builder(np.random.default_rng(0), (1, width, 1))
  x = b.threshold(b.conv(0, 1, 32), 1)
  x = b.threshold(b.conv(x, 1, 32), 1)
  for _ in range(2):
    x = b.add(packed.Pool("pool", x, "max", (1, 64), (1, 64)))
  program = b.end(x)
  text = c.source(program, images(program, 1))
  # The pads of the second convolution are one column on each side.
  assert ("gather(" in text) == (width + 2 < 2**15)
  assert_c_equal(program, tmp_path, images(program, 1))


@needs_gcc
@pytest.mark.parametrize("flag", ["-O0", "-O3"])
def test_c_needs_nothing(tmp_path, flag):
  """No function of any library, and frames of fixed sizes."""
  program = residual_and_dense(3)
  (tmp_path / "net.c").write_text(c.source(program, images(program, 1)))
  subprocess.run([GCC, *FLAGS, flag, "-fstack-usage", "-c", "net.c"], cwd=tmp_path,
                 check=True)
  undefined = subprocess.run(["nm", "-u", "net.o"], cwd=tmp_path, check=True,
                             capture_output=True, text=True).stdout.split()
  assert set(undefined) <= {"U", "_GLOBAL_OFFSET_TABLE_", "__stack_chk_fail"}
  frames = [line.split("\t")[-2:] for line in
            (tmp_path / "net.su").read_text().splitlines()]
  assert {kind for _, kind in frames} == {"static"}


@needs_gcc
def test_c_states_its_memory(tmp_path):
  program = digits_convnet()
  text = c.source(program, images(program, 1))
  (tmp_path / "net.c").write_text(text)
  subprocess.run([GCC, *FLAGS, "-Os", "-c", "net.c"], cwd=tmp_path, check=True)
  size = subprocess.run(["size", "-A", "net.o"], cwd=tmp_path, check=True,
                        capture_output=True, text=True).stdout
  size = {line.split()[0]: int(line.split()[1]) for line in size.splitlines()
          if line.startswith(".")}
  stated = [int(text.split(f"{what}: ")[1].split()[0])
            for what in ("Constants", "Static memory")]
  constants = sum(size[k] for k in size if k.startswith((".rodata", ".data.rel.ro")))
  assert stated[0] <= constants < stated[0] + 400  # Labels, and room between arrays.
  assert size[".bss"] <= stated[1] + 64  # 64 bytes are for alignment.
  # Codes in words of bits, each map in the room of others, and a list of 64 inputs.
  assert stated[1] < 384 + 2 * 64 + 64


def arena_of(make):
  """The size of the arena and the offsets for an image of 8x6, in words.

  The first map has 8 rows of 6 words, and `make` adds what follows.
  """
  b = Builder(np.random.default_rng(0), (8, 6, 1))
  x = make(b, b.threshold(b.conv(0, 1, 16), 1))
  program = b.end(x)
  memory = c_memory.Memory(program, packed.infer_values(program))
  return memory.words, memory.offsets


def test_pixels_take_the_place_of_pixels_that_nobody_reads_any_more():
  """By hand: row y of a 3x3 convolution reads its input from row y - 1 on."""
  words, at = arena_of(lambda b, x: b.threshold(b.conv(x, 1, 16), 1))
  # While pixel (1, x) is computed, all of row 0 and pixels up to (1, x + 1) may be
  # written. The first pixel that is still read is (0, x - 1).
  assert words == 48 + 9 and at == {2: 9, 4: 0}

  def pooled(b, x):
    x = b.add(packed.Pool("pool", b.conv(x, 1, 16), "max", (2, 2), (2, 2)))
    return b.threshold(x, 1)

  # While pixel (0, 1) is computed, row 0 with its 3 pixels may be written. Column 1 of
  # the input is still read.
  words, at = arena_of(pooled)
  assert words == 48 + 2 and at == {2: 2, 5: 0}

  def residual(b, x):
    y = b.threshold(b.conv(x, 1, 16), 1)
    return b.threshold(b.conv(y, 1, 16), 1, x)

  # The second map does not overwrite the first one, which is read again. The third map
  # overwrites the second one.
  words, at = arena_of(residual)
  assert words == 9 + 48 + 48 and at == {2: 57, 4: 9, 6: 0}


def test_the_smaller_plan_of_the_arena_is_chosen():
  """Buffers that overlap more with their input fit worse together in this network."""
  program = groups_and_dilation(1, -1)
  by_pixel, by_row = (
      c_memory.Memory(program, packed.infer_values(program), by_row).words
      for by_row in (False, True))
  assert by_row < by_pixel
  assert c.footprint(program).static == 4 * by_row + 8


def test_room_in_the_arena_by_hand():
  """Its greatest free part, while the second map of a 3x3 convolution is computed."""
  b = Builder(np.random.default_rng(0), (8, 6, 1))
  x = b.threshold(b.conv(0, 1, 16), 1)
  program = b.end(b.threshold(b.conv(x, 1, 16), 1))
  memory = c_memory.Memory(program, packed.infer_values(program))
  assert memory.room(4) == (57, 0) and memory.room(2) == (0, 9)
  memory.make_room(2, 9)
  assert memory.words == 57
  memory.make_room(4, 5)
  assert memory.words == 62 and memory.room(4) == (57, 5)
  assert memory.room(2) == (0, 9)
  memory.make_room(2, 13)
  assert memory.words == 70 and memory.room(2) == (57, 13)


def test_values_in_floats_are_refused_by_name(tmp_path):
  program = convnet(1, "float32", shape=(9, 9, 3), crop=(9, 9))
  with pytest.raises(ValueError, match="norm_conv1 has operands in a float format"):
    c.source(program, images(program, 1))
  with pytest.raises(ValueError, match="norm_conv1 has operands in a float format"):
    golden.write(tmp_path, program, images(program, 1))


def with_logits(**fields):
  program = small()
  return program._replace(ops=(*program.ops[:-1], program.ops[-1]._replace(**fields)))


@pytest.mark.parametrize("form", ["c", "onnx", "qonnx", "stablehlo"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf"), 1e300])
def test_constants_that_are_not_finite_are_refused_in_one_line(form, value):
  if "onnx" in form:
    pytest.importorskip("onnx", reason="onnx is not installed")
  for program, field in (
      (with_logits(unit=value), "unit"),
      *((with_logits(**{field: np.float64([1, value])}), field)
        for field in ("center", "scale", "constant"))):
    with pytest.raises(errors.UsageError, match=f"layer norm.* {field}") as caught:
      export_command.content(program, form, images(program, 1))
    assert str(caught.value).startswith(f"format='{form}': ")
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("name, flags", [
    ("gcc", ["-std=c99"]), ("g++", ["-x", "c++", "-std=c++11"]),
    pytest.param("clang", ["-std=c99"], marks=pytest.mark.slow)])
def test_c_of_the_extreme_constants(tmp_path, name, flags):
  """Those that the format allows compile without warnings, and are exact."""
  extremes = np.float32([2.0**40, -2.0**40, 2.0**-40, -2.0**-40, 0.0, -0.0])
  for unit, scale in zip(extremes, extremes[::-1]):
    program = with_logits(
        unit=float(unit), scale=np.float32([scale, 0.1]), center=np.float32([1 / 3, 0]),
        constant=np.float32([2.0**-100, -2.0**40]))
    text = c.source(program, images(program, 3))
    assert self_test(text, tmp_path, tool(name), *flags).returncode == 0


_RUN_STABLEHLO = """
import pathlib
import sys
sys.modules["minw"] = None
import jax
import numpy as np
for folder in map(pathlib.Path, sys.argv[1:]):
  network = jax.export.deserialize(bytearray((folder / "net.bin").read_bytes()))
  assert network.platforms == ("cpu", "cuda", "tpu")
  calls = network.mlir_module().split("custom_call @")[1:]
  assert all(call.startswith("shape_assertion(") for call in calls)
  labels, logits = jax.jit(network.call)(np.load(folder / "images.npy"))
  np.savez(folder / "results.npz", labels=labels, logits=logits)
  print(network.fun_name)
"""


def stablehlo():
  pytest.importorskip("flatbuffers", reason="flatbuffers is not installed")
  from minw.export import stablehlo as module
  return module


@pytest.mark.gpu
@pytest.mark.slow
def test_stablehlo_without_minw(tmp_path):
  programs = [digits_convnet(), residual_and_dense(3), groups_and_dilation(1, -1),
              groups_and_dilation(3, 2)]
  batches = [datasets.load("digits", "test", None)[0],
             *(images(program, 20) for program in programs[1:])]
  folders = [tmp_path / str(i) for i in range(len(programs))]
  for program, batch, folder in zip(programs, batches, folders):
    folder.mkdir()
    (folder / "net.bin").write_bytes(stablehlo().serialize(program))
    np.save(folder / "images.npy", batch)
  run = subprocess.run([sys.executable, "-W", "error", "-c", _RUN_STABLEHLO, *folders],
                       check=True, capture_output=True, text=True)
  for program, batch, folder, line in zip(
      programs, batches, folders, run.stdout.splitlines(), strict=True):
    logits = reference.logits(program, batch)
    with np.load(folder / "results.npz") as results:
      np.testing.assert_array_equal(results["logits"], logits)
      np.testing.assert_array_equal(results["labels"], logits.argmax(-1))
    metadata = json.loads(line)
    assert metadata["pixel_offset"] == program.offset.tolist()
    assert len(metadata["labels"]) == program.num_classes


def test_stablehlo_holds_no_paths():
  """Nor lines of source files, also where a caller has asked JAX for them."""
  program = small()
  limit = jax.config.jax_traceback_in_locations_limit
  assert limit != 0
  data = stablehlo().serialize(program)
  assert jax.config.jax_traceback_in_locations_limit == limit
  for path in (__file__, c.__file__, jax.__file__, sys.executable, os.getcwd()):
    parts = pathlib.Path(path).parts
    assert os.path.join(*parts[:3]).encode() not in data
  assert b".py" not in data


def test_stablehlo_of_a_fixed_batch():
  program = residual_and_dense(1)
  batch = images(program, 3)
  data = stablehlo().serialize(program, 3)
  labels, logits = jax.jit(jax.export.deserialize(bytearray(data)).call)(batch)
  wanted = reference.logits(program, batch)
  np.testing.assert_array_equal(logits, wanted)
  np.testing.assert_array_equal(labels, wanted.argmax(-1))


@needs_gcc
@pytest.mark.slow
@pytest.mark.parametrize("make", WHOLE, ids=[*"ABCD", "resnet18"])
def test_whole_networks(tmp_path, make):
  program = make()
  batch = images(program, 2)
  assert_c_equal(program, tmp_path, batch, "-O2")
  data = stablehlo().serialize(program)
  labels, logits = jax.jit(jax.export.deserialize(bytearray(data)).call)(batch)
  wanted = reference.logits(program, batch)
  np.testing.assert_array_equal(logits, wanted)
  np.testing.assert_array_equal(labels, wanted.argmax(-1))
  # Weights stay packed.
  assert len(data) < 1.15 * len(packed.to_bytes(program)) + 100_000


def test_c_keeps_no_more_than_a_limit():
  """Nine sums of 64 MB, each of which two operations read in the end."""
  pool = packed.Pool("p", 0, "max", (1, 1), (1, 1))
  adds = [packed.Add("a", i, i) for i in range(1, 10)]
  ops = (*[pool] * 9, *adds, packed.Pool("p", 0, "max", (2048, 2048), (1, 1)),
         packed.Logits("l", 19, 1.0, *np.ones((3, 4), np.float32)))
  program = packed.Program(
      (2048, 2048, 4), (2048, 2048), np.zeros(4, np.uint8), 4, ops, {})
  with pytest.raises(ValueError,
                     match=f"would keep {10 * 2**26} bytes .* most 536870912"):
    c.header(program)


def test_few_random_images_where_they_are_large():
  shape = lambda h, w: types.SimpleNamespace(source_shape=(h, w, 3))
  assert export_command.test_images(None, shape(8, 8)).shape == (4, 8, 8, 3)
  assert export_command.test_images(None, shape(1024, 1024)).shape == (1, 1024, 1024, 3)


@pytest.fixture(name="model", scope="module")
def model_file(tmp_path_factory):
  path = tmp_path_factory.mktemp("model") / "net.minw"
  packed.write(path, digits_network({"labels": list("abcdefghij")}))
  return path


@pytest.mark.parametrize("form, needs", [
    ("c", []), ("stablehlo", ["flatbuffers"]), ("onnx", ["onnx"]), ("qonnx", ["onnx"])])
def test_command(command, tmp_path, model, form, needs):
  for name in needs:
    pytest.importorskip(name, reason=f"{name} is not installed")
  out = tmp_path / "net"
  run = command("minw.export", f"--model={model}", f"--format={form}", f"--out={out}",
                f"--golden={tmp_path / 'golden'}")
  assert run.code == 0, run.err
  written = [out, tmp_path / "net.h"] if form == "c" else [out]
  memory = ""
  if form == "c":
    constants, static, stack = map(int, re.search(
        r"Constants: (\d+) .*?memory: (\d+) .*?less than (\d+) ", out.read_text(),
        re.DOTALL).groups())
    # Ten labels have a letter, an end and a pointer each.
    memory = (f"constants: {constants + 60} bytes, static memory: {static} bytes,"
              f" stack: less than {stack} bytes\n")
    blank = np.zeros((4, 8, 8, 1), np.uint8)  # The image does not matter.
    layers = c_cost.estimate(c.steps(digits_network(), blank))
    memory += c_cost.report(layers) + "\n"
  assert run.out == ("".join(f"{p}: {p.stat().st_size} bytes\n" for p in written) +
                     memory + f"{tmp_path / 'golden'}: 3 values of 4 images\n")
  assert b'"abcdefghij"' in out.read_bytes().replace(b'", "', b"")
  assert np.load(tmp_path / "golden" / "input.npy").shape == (4, 8, 8, 1)
  if form == "c":  # By the name of net.minw.
    assert "int net_run(" in (tmp_path / "net.h").read_text()


def test_missing_packages_are_named(monkeypatch):
  monkeypatch.setitem(sys.modules, "onnx", None)
  monkeypatch.delitem(sys.modules, "minw.export.onnx_graph", raising=False)
  with pytest.raises(errors.UsageError, match="(?s)format='qonnx'.*minw.export"):
    export_command.content(small(), "qonnx", images(small(), 1))


def test_images_from_files(tmp_path):
  image = datasets.load("digits", "test", None)[0][0]
  Image.fromarray(image[..., 0]).save(tmp_path / "a.png")
  program = types.SimpleNamespace(source_shape=(8, 8, 1), metadata={})
  found = export_command.test_images([str(tmp_path)], program)
  np.testing.assert_array_equal(found, image[None])
  # As the network was evaluated: the centre of larger images, or all of them, smaller.
  program.source_shape = (4, 4, 1)
  program.metadata["config"] = {"eval_resize": 0}
  found = export_command.test_images([str(tmp_path)], program)
  np.testing.assert_array_equal(found, image[None, 2:6, 2:6])


def test_images_on_a_background(tmp_path):
  Image.new("LA", (8, 8), (99, 0)).save(tmp_path / "a.png")
  for background, value in (("black", 0), ("255,255,255", 255)):
    found = export_command.test_images([str(tmp_path)], small(), background)
    assert (found == value).all()
  (tmp_path / "b.png").write_bytes(b"")  # All that are named, or none.
  with pytest.raises(errors.UsageError, match="images='.*b.png': cannot identify"):
    export_command.test_images([str(tmp_path)], small())


@pytest.mark.parametrize("arguments, message", [
    (("--format=c", "--out=x"), "one of --workdir and --model must be given"),
    (("--model={model}",), "--format and --out, or --golden, must be given"),
    (("--model={model}", "--format=c"), "--format and --out, or --golden"),
    (("--model={model}", "--format=tflite", "--out=x"), "c|onnx|qonnx|stablehlo"),
    (("--model={model}", "--checkpoint=best", "--golden=x"),
     "checkpoint='best': must be left out with --model"),
    (("--model=/nowhere", "--golden=x"), "model='/nowhere': "),
    (("--workdir=/nowhere", "--golden=x"), "workdir='/nowhere'"),
    (("--model={model}", "--format=c", "--out=/no/where"),
     "out='/no/where' cannot be written"),
    (("--model={model}", "--format=c", "--out=x.h"), "out='x.h': must be the C file"),
    (("--model={model}", "--format=c", "--out=x.c", "--prefix=2x"),
     "prefix='2x': must be made of letters, digits and single underscores"),
    (("--model={model}", "--format=onnx", "--out=x", "--prefix=x"),
     "prefix='x': must be left out unless --format is c"),
    (("--model={model}", "--format=c", "--out=x.c", "--batch=2"),
     "batch=2: must be left out unless --format is onnx, qonnx or stablehlo"),
    (("--model={model}", "--format=qonnx", "--out=x", "--batch=0"),
     "batch='0': must be a positive integer"),
    (("--model={model}", "--golden=/dev/null/x"), "golden='/dev/null/x': "),
    (("--model={model}", "--golden=x", "--images=/nowhere"),
     "images='/nowhere': must be a file or folder that exists"),
])
def test_bad_commands(command, model, arguments, message):
  run = command("minw.export", *(a.format(model=model) for a in arguments))
  assert run.code == 2 and message in run.err
  assert run.err.startswith("error: ") and run.err.count("\n") == 1
