"""The C export on a Cortex-M3, emulated by QEMU: scores, instructions and stack."""

import functools
import pathlib
import shutil
import subprocess

import numpy as np
import pytest

from c_programs import order
from minw import packed
from minw.export import c
from minw.kernels import reference
from packed_models import convnet
from packed_models import digits_convnet
from packed_models import resnet18
from packed_networks import groups_and_dilation
from packed_networks import images
from packed_networks import residual_and_dense
from packed_networks import sum_of_many
from packed_networks import tree

HERE = pathlib.Path(__file__).parent / "export"
GCC = shutil.which("arm-none-eabi-gcc")
QEMU = shutil.which("qemu-system-arm")
_INSTRUCTIONS = 40  # In a tick of the board's 25 MHz, at one in a nanosecond.

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


def multiplications(program):
  kinds = packed.infer_values(program)
  return sum(op.kernel.size * kind.shape[0] * kind.shape[1]
             for op, kind in zip(program.ops, kinds[1:])
             if isinstance(op, packed.Conv))


@pytest.mark.parametrize("make, count", [
    (digits_convnet, 20), (lambda: residual_and_dense(1), 4),
    (lambda: residual_and_dense(3), 4),
    *[(functools.partial(convnet, name=name), 1) for name in "ABCD"],
    *[(functools.partial(convnet, bits, 2, name="D"), 1) for bits in (1, 2)],
    (lambda: groups_and_dilation(2, -1), 4), (sum_of_many, 1), (tree, 1),
    (resnet18, 1)], ids=[
        "digits", "every1", "every3", *"ABCD", "W1A2", "W2A2", "groups", "sum", "tree",
        "resnet18"])
def test_cortex_m3(tmp_path, capsys, request, make, count):
  program = make()
  batch = images(program, count)
  text = c.source(program, batch[:1])
  (tmp_path / "net.c").write_text(text)
  (tmp_path / "vectors.h").write_text(vectors(program, batch))
  flags = ["-std=c99", "-Wall", "-Wextra", "-Werror", "-O2", "-mcpu=cortex-m3",
           "-mthumb"]
  subprocess.run([GCC, *flags, "-c", "net.c"], cwd=tmp_path, check=True)
  size = subprocess.run(["arm-none-eabi-size", "net.o"], cwd=tmp_path, check=True,
                        capture_output=True, text=True).stdout.split()
  flash, ram = int(size[6]) + int(size[7]), int(size[7]) + int(size[8])
  subprocess.run(
      [GCC, *flags, "-I", tmp_path, "-nostartfiles", "-T", HERE / "cortex_m.ld",
       "-o", tmp_path / "net.elf", HERE / "cortex_m.c"], check=True)
  run = subprocess.run(
      [QEMU, "-M", "mps2-an385", "-nographic", "-monitor", "none", "-serial", "none",
       "-semihosting-config", "enable=on,target=native", "-icount", "shift=0",
       "-kernel", tmp_path / "net.elf"],
      capture_output=True, text=True, timeout=600)
  said = [line.split() for line in (run.stdout + run.stderr).splitlines()]
  labels = [int(n) for word, n in said if word == "label"]
  assert labels == reference.logits(program, batch).argmax(-1).tolist()
  found = {word: int(n) for word, n in said}
  assert found["right"] == count * program.num_classes
  assert found["stack"] < int(text.split("#define MINW_STACK ")[1].split()[0])
  instructions = found["ticks"] * _INSTRUCTIONS
  each = instructions / multiplications(program)
  with capsys.disabled():
    print(f"\nflash {flash}, RAM {ram}, stack {found['stack']} bytes,"
          f" {instructions / 1e6:.2f} million instructions,"
          f" {each:.2f} for a multiplication")
  if request.node.callspec.id == "D":
    assert each < 0.31
