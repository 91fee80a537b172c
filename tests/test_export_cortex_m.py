"""The C export on a Cortex-M3, emulated by QEMU: scores, instructions and stack.

The firmware in examples/cortex_m is built and run, too, and shares its start-up code.
The variable MINW_CMSIS_NN names a checkout of CMSIS-NN, whose int8 convolutions are
measured in the same way.
"""

import functools
import os
import pathlib
import shlex
import shutil
import subprocess
import sys

import numpy as np
from PIL import Image
import pytest

from c_programs import order
from minw import infer
from minw import packed
from minw import search
from minw.data import datasets
from minw.export import c
from minw.export import c_cost
from minw.export import c_sliced
from minw.kernels import reference
from packed_models import convnet
from packed_models import digits_convnet
from packed_models import folder_convnet
from packed_models import pooled_convnet
from packed_models import resnet18
from packed_networks import groups_and_dilation
from packed_networks import images
from packed_networks import residual_and_dense
from packed_networks import sum_of_many
from packed_networks import tree

PROGRAM = pathlib.Path(__file__).parent / "export" / "cortex_m.c"
EXAMPLE = pathlib.Path(__file__).parents[1] / "examples" / "cortex_m"
GCC = shutil.which("arm-none-eabi-gcc")
QEMU = shutil.which("qemu-system-arm")
FLAGS = ["-std=c99", "-Wall", "-Wextra", "-Werror", "-mthumb"]
# The machine and the flags for each processor. QEMU's machine of a Cortex-M33 has
# another timer, so that its code runs on a Cortex-M7.
PROCESSORS = {
    "cortex-m3": ("mps2-an385", []), "cortex-m4": ("mps2-an386", []),
    "cortex-m7": ("mps2-an500", []), "cortex-m33": ("mps2-an500", []),
    "cortex-m55": ("mps3-an547", [
        "-mfloat-abi=hard", "-Wl,--defsym=ram_start=0x21000000,--defsym=ram_size=2M"])}

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(GCC is None, reason="gcc-arm-none-eabi is not installed"),
    pytest.mark.skipif(QEMU is None, reason="qemu-system-arm is not installed")]


def vectors(program, batch):
  text = f"#define IMAGES {len(batch)}\n"
  scores = order(reference.logits(program, batch))
  for name, values in (("uint8_t images", batch), ("int32_t wanted", scores)):
    numbers = ",".join(map(str, np.ravel(values).tolist()))
    text += f"static const {name}[] = {{{numbers}}};\n"
  return text


def build(folder, program, batch, text, cpu="cortex-m3", level="-O2"):
  """Builds `net.elf` in a folder, which runs the C file of a network on images."""
  (folder / "net.c").write_text(text)
  (folder / "vectors.h").write_text(vectors(program, batch))
  link(folder / "net.elf", PROGRAM, cpu, level, "-I", folder)


def link(elf, source, cpu, *flags):
  """Compiles a program for a processor with the start-up code of the example."""
  subprocess.run(
      [GCC, *FLAGS, f"-mcpu={cpu}", *PROCESSORS[cpu][1], *flags, "-I", EXAMPLE,
       "-nostartfiles", "-T", EXAMPLE / "cortex_m.ld", "-o", elf, source,
       EXAMPLE / "startup.c"], check=True)


def emulate(program, cpu):
  """Runs a program in QEMU. Returns the lines that it says, each as a list of words."""
  run = subprocess.run(
      [QEMU, "-M", PROCESSORS[cpu][0], "-nographic", "-monitor", "none", "-serial",
       "none", "-semihosting-config", "enable=on,target=native", "-icount", "shift=0",
       "-kernel", program], capture_output=True, text=True, timeout=600)
  return [line.split() for line in (run.stdout + run.stderr).splitlines()]


def multiplications(program):
  kinds = packed.infer_values(program)
  return sum(op.kernel.size * kind.shape[0] * kind.shape[1]
             for op, kind in zip(program.ops, kinds[1:])
             if isinstance(op, packed.Conv))


def estimate(program, batch):
  return sum(layer.instructions for layer in c_cost.estimate(c.steps(program, batch)))


@pytest.mark.parametrize("make, count", [
    (digits_convnet, 20), (lambda: residual_and_dense(1), 4),
    (lambda: residual_and_dense(3), 4),
    *[(functools.partial(convnet, name=name), 1) for name in "ABCD"],
    *[(functools.partial(convnet, *bits, name="D"), 1)
      for bits in ((1, 2), (2, 2), (3, 3))],
    (lambda: groups_and_dilation(2, -1), 4), (sum_of_many, 1), (tree, 1),
    (resnet18, 1)], ids=[
        "digits", "every1", "every3", *"ABCD", "W1A2", "W2A2", "W3A3", "groups", "sum",
        "tree", "resnet18"])
def test_cortex_m3(tmp_path, capsys, request, make, count):
  program = make()
  batch = images(program, count)
  text = c.source(program, batch[:1])
  build(tmp_path, program, batch, text)
  subprocess.run([GCC, *FLAGS, "-mcpu=cortex-m3", "-O2", "-c", "net.c"], cwd=tmp_path,
                 check=True)
  size = subprocess.run(["arm-none-eabi-size", "net.o"], cwd=tmp_path, check=True,
                        capture_output=True, text=True).stdout.split()
  flash, ram = int(size[6]) + int(size[7]), int(size[7]) + int(size[8])
  footprint = c.footprint(program)
  # Compilers leave out static memory that this network does not use.
  assert footprint.static - 8 <= ram <= footprint.static
  if request.node.callspec.id in ("digits", *"ABCD", "W1A2", "W2A2", "W3A3"):
    assert footprint.constants < flash < footprint.constants + search.CODE
  said = emulate(tmp_path / "net.elf", "cortex-m3")
  labels = [int(n) for word, n in said if word == "label"]
  assert labels == reference.logits(program, batch).argmax(-1).tolist()
  found = {word: int(n) for word, n in said}
  assert found["right"] == count * program.num_classes
  assert found["stack"] < int(text.split("#define MINW_STACK ")[1].split()[0])
  instructions = found["instructions"]
  each = instructions / multiplications(program)
  with capsys.disabled():
    print(f"\nflash {flash}, RAM {ram}, stack {found['stack']} bytes,"
          f" {instructions / 1e6:.2f} million instructions,"
          f" {each:.2f} for a multiplication")
  if request.node.callspec.id == "D":
    assert each < 0.15
  error = estimate(program, batch[-1:]) / instructions - 1
  with capsys.disabled():
    print(f"estimate off by {100 * error:+.1f} %")
  # The first layer of ResNet-18 multiplies 118 million pixels one by one.
  assert abs(error) < (0.25 if request.node.callspec.id == "resnet18" else 0.07)


@pytest.mark.parametrize("make", [
    digits_convnet, *[functools.partial(folder_convnet, size, bits, bits)
                      for size in ("tiny", "small") for bits in (1, 2)]], ids=[
        "digits", "tiny-1", "tiny-2", "small-1", "small-2"])
@pytest.mark.parametrize("form", ["blocks", "channels"])
def test_estimates(tmp_path, capsys, monkeypatch, make, form):
  """The estimate of the instructions, of channels in blocks and one at a time."""
  if form == "channels":
    monkeypatch.setattr(c_sliced, "find", lambda writer: {})
  program = make()
  batch = images(program, 1, seed=5)
  build(tmp_path, program, batch, c.source(program, batch))
  said = {word: int(n) for word, n in emulate(tmp_path / "net.elf", "cortex-m3")}
  assert said["right"] == program.num_classes
  error = estimate(program, batch) / said["instructions"] - 1
  with capsys.disabled():
    print(f"\n{said['instructions']:,} instructions, RAM"
          f" {c.footprint(program).static}, stack {said['stack']} bytes,"
          f" estimate off by {100 * error:+.1f} %")
  assert abs(error) < 0.07


@pytest.mark.parametrize("cpu, level, most", [
    ("cortex-m3", "-O3", 0.15), ("cortex-m4", "-O2", 0.15), ("cortex-m7", "-O2", 0.15),
    ("cortex-m33", "-O2", 0.15), ("cortex-m55", "-O2", 0.12)])
def test_processors(tmp_path, capsys, cpu, level, most):
  """ConvNet D in W1A1."""
  program = convnet(name="D")
  batch = images(program, 1)
  build(tmp_path, program, batch, c.source(program, batch), cpu, level)
  found = {word: int(n) for word, n in emulate(tmp_path / "net.elf", cpu)}
  assert found["right"] == program.num_classes
  each = found["instructions"] / multiplications(program)
  with capsys.disabled():
    print(f"\n{cpu} {level}: {each:.3f} instructions for a multiplication,"
          f" stack {found['stack']} bytes")
  assert each < most


@pytest.mark.parametrize("level", ["-O0", "-Os", "-O3"])
@pytest.mark.parametrize("bits, widths", [
    (1, (32, 64, 96)), (2, (32, 96, 128)), (3, (64, 128, 160))])
def test_helium(tmp_path, bits, widths, level):
  """Vectors of two, three and four blocks, and blocks that fill no vector."""
  program = pooled_convnet(bits, widths)
  batch = images(program, 3)
  text = c.source(program, batch)
  assert "#define HELIUM" in text
  build(tmp_path, program, batch, text, "cortex-m55", level)
  found = {word: int(n) for word, n in emulate(tmp_path / "net.elf", "cortex-m55")}
  assert found["right"] == 3 * program.num_classes
  assert found["stack"] < c.footprint(program).stack


def test_products_by_smlad(tmp_path, capsys):
  """Products by the DSP extension take more than all of ConvNet D in W3A3.

  The time to find the inputs and to compare the sums comes on top.
  """
  link(tmp_path / "smlad.elf", PROGRAM.with_name("smlad.c"), "cortex-m4", "-O2")
  said = {word: int(n) for word, n in emulate(tmp_path / "smlad.elf", "cortex-m4")}
  assert said["right"] == 2 * 64 and said["products"] == 2 * 64 * 576
  each = said["instructions"] / said["products"]
  with capsys.disabled():
    print(f"\n{each:.2f} instructions for a multiplication by SMLAD")
  assert each > 1.1


def convolutions(program):
  """The shapes of the convolutions of more than one pixel, as in `cmsis_nn.c`."""
  kinds = packed.infer_values(program)
  return [(*kinds[op.input].shape, *op.kernel.shape[:3], op.pads[0], *kind.shape[:2])
          for op, kind in zip(program.ops, kinds[1:])
          if isinstance(op, packed.Conv) and op.kernel[0, ..., 0].size > 1]


def write_layers(path, layers):
  h, w, c, out, _, _, _, high, wide = np.transpose(layers)
  rows = ", ".join("{" + ", ".join(map(str, layer)) + "}" for layer in layers)
  path.write_text(f"""\
#define LAYERS {{{rows}}}
#define INPUTS {max(h * w * c)}
#define WEIGHTS {max(np.prod(np.transpose(layers)[2:6], 0))}
#define OUTPUTS {max(out * high * wide)}
#define CHANNELS {max(out)}
""")


@pytest.mark.parametrize("cpu", ["cortex-m4", "cortex-m7", "cortex-m33", "cortex-m55"])
@pytest.mark.parametrize("name", ["D", "digits"])
def test_cmsis_nn(tmp_path, capsys, name, cpu):
  """CMSIS-NN's int8 convolutions with the shapes of a network's layers."""
  if "MINW_CMSIS_NN" not in os.environ:
    pytest.skip("MINW_CMSIS_NN names no checkout of CMSIS-NN")
  checkout = pathlib.Path(os.environ["MINW_CMSIS_NN"])
  program = convnet(name="D") if name == "D" else infer.load("digits_convnet").program
  layers = convolutions(program)
  write_layers(tmp_path / "layers.h", layers)
  files = [file for part in ("ConvolutionFunctions", "NNSupportFunctions")
           for file in (checkout / "Source" / part).glob("*.c")
           if not file.stem.endswith(("f16", "f32", "flt"))]
  link(tmp_path / "net.elf", PROGRAM.with_name("cmsis_nn.c"), cpu, "-std=gnu11", "-w",
       "-O2", "-ffunction-sections", "-Wl,--gc-sections", "-I", tmp_path, "-I",
       checkout / "Include", *files)
  said = emulate(tmp_path / "net.elf", cpu)
  found = {word: [int(n) for key, n in said if key == word] for word, _ in said}
  assert found["right"] == [3 * layer[3] for layer in layers]
  products = np.prod(np.transpose(layers)[[2, 3, 4, 5, 7, 8]], 0)
  with capsys.disabled():
    print(f"\n{name} on {cpu}: {sum(found['instructions']) / sum(products):.3f}"
          " instructions of CMSIS-NN for a multiplication")


def run_make(folder, *arguments):
  """Runs make in a copy of the example, and returns what it prints."""
  done = subprocess.run(["make", "--silent", f"PYTHON={sys.executable}", *arguments],
                        cwd=folder, capture_output=True, text=True)
  assert done.returncode == 0, done.stderr
  assert "warning" not in done.stderr, done.stderr
  return done.stdout


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
def test_firmware(tmp_path):
  """The firmware prints what `infer` predicts, on two processors."""
  shutil.copytree(EXAMPLE, tmp_path / "firmware")
  files = []
  for i, image in enumerate(datasets.load("digits", "test", None)[0][:6]):
    files.append(tmp_path / f"image {i}.png")
    Image.fromarray(image[..., 0]).save(files[-1])
  predictions = infer.load("digits_convnet").predict(files)
  wanted = [f"{file}\t{p.label}" for file, p in zip(files, predictions)]
  images = "IMAGES=" + " ".join(map(shlex.quote, map(str, files)))
  for cpu, machine in (("cortex-m3", "mps2-an385"), ("cortex-m4", "mps2-an386")):
    for path in (tmp_path / "firmware").glob("*.o"):
      path.unlink()
    said = run_make(
        tmp_path / "firmware", "run", f"CPU={cpu}", f"MACHINE={machine}", images)
    *lines, instructions, stack = said.splitlines()[-len(wanted) - 2:]
    assert lines == wanted
    # The network has 1,527,040 multiply-accumulates.
    assert 0.2 < int(instructions.removeprefix("instructions ")) / 1_527_040 < 0.4
    header = (tmp_path / "firmware" / "net.h").read_text()
    most = int(header.split("#define NET_STACK ")[1].split()[0])
    assert 100 < int(stack.removeprefix("stack ")) < most
  run_make(tmp_path / "firmware", "clean")
  assert {path.name for path in (tmp_path / "firmware").iterdir()} == {
      "Makefile", "cortex_m.ld", "images.py", "main.c", "measure.h", "semihosting.h",
      "startup.c"}


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
def test_firmware_without_images(tmp_path):
  shutil.copytree(EXAMPLE, tmp_path / "firmware")
  done = subprocess.run(["make", f"PYTHON={sys.executable}"], cwd=tmp_path / "firmware",
                        capture_output=True, text=True)
  assert done.returncode == 2 and "must be given" in done.stderr
