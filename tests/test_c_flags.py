"""minw.c_flags: programs in C and C++ find minw's header and library."""

import pathlib
import shutil
import subprocess

import numpy as np
import pytest

from minw import c_flags
from minw import errors
from minw import infer
from minw.kernels import native

ROOT = pathlib.Path(__file__).parents[1]

# Prints the logits of an image whose pixels are 0, 1, 2, ... .
_PROGRAM = """
#include <minw.h>
#include <stdio.h>

int main(void) {
  static unsigned char file[1 << 20], image[64];
  float logits[10];
  char error[200];
  size_t size = fread(file, 1, sizeof file, stdin);
  minw_network *network = minw_load(file, size, error, sizeof error);
  int i;
  for (i = 0; i < 64; i++) image[i] = (unsigned char)i;
  if (!network || minw_logits(network, image, 1, logits, 1, error, sizeof error)) {
    puts(error);
    return 1;
  }
  for (i = 0; i < 10; i++) printf("%.9g\\n", logits[i]);
  minw_free(network);
  return 0;
}
"""


@pytest.mark.skipif(not native.available(), reason="the library was not built")
@pytest.mark.parametrize("compiler, name", [("cc", "program.c"), ("c++", "program.cc")])
def test_compiles_and_runs(command, tmp_path, compiler, name):
  if not shutil.which(compiler):
    pytest.skip(f"no {compiler}")
  (tmp_path / name).write_text(_PROGRAM)
  flags = command("minw.c_flags", "--cflags", "--libs")
  assert (flags.code, flags.err) == (0, "")
  subprocess.run(
      f"{compiler} -Wall -Werror {name} -o program {flags.out}", shell=True,
      check=True, cwd=tmp_path)
  with infer.shipped()["digits_convnet"].open("rb") as file:
    done = subprocess.run([tmp_path / "program"], stdin=file, check=True,
                          capture_output=True, text=True)
  images = np.arange(64, dtype=np.uint8).reshape(1, 8, 8, 1)
  want = infer.load("digits_convnet", backend="reference").logits(images)[0]
  np.testing.assert_array_equal(np.float32(done.stdout.split()), want)


def test_each_by_itself(command):
  assert command("minw.c_flags", "--cflags").out == c_flags.cflags() + "\n"
  assert c_flags.cflags().startswith("-I") and "-l" not in c_flags.cflags()


def test_refuses(command, monkeypatch):
  done = command("minw.c_flags")
  assert done.code == 2
  assert done.err == "error: --cflags or --libs, or both, must be given\n"
  monkeypatch.setattr(native, "available", lambda: False)
  with pytest.raises(errors.UsageError, match="the native library was not built"):
    c_flags.libs()
