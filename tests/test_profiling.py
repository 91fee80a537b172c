"""Times of the operations of a packed network."""

import numpy as np
import pytest

from minw import errors
from minw import infer
from minw import packed
from minw import profiling
from minw.kernels import native
from packed_networks import Builder

pytestmark = pytest.mark.skipif(
    not native.available(), reason="the native library was not built")


@pytest.fixture(scope="module")
def program():
  b = Builder(np.random.default_rng(0), (12, 10, 3))
  x = b.threshold(b.conv(0, 1, 64), 1)
  x = b.add(packed.Pool("pool", b.conv(x, 1, 70, (3, 5), pads=(1, 1, 2, 2)), "max",
                        (2, 2), (2, 2)))
  return b.end(b.threshold(x, 1))


# 12 x 10 pixels, 64 channels, 3 x 3 x 3 inputs, and so on; the last layer is dense.
PRODUCTS = [12 * 10 * 64 * 27, 12 * 10 * 70 * 3 * 5 * 64, 7 * 6 * 5 * 70]


def test_products(program):
  assert [n for n in profiling.products(program) if n] == PRODUCTS


@pytest.mark.parametrize("threads", (1, 2))
def test_passes(program, threads):
  network = infer.load(program, backend="native", threads=threads)
  passes = network.profile(batch=3, runs=2)
  kernels = [kernel for _, kernel in network.kernels()
             if kernel != "in the pass of its convolution"]
  assert [p.kernel for p in passes] == kernels
  assert [p.name for p in passes] == ["conv", "conv", "conv", "logits"]
  assert [p.products for p in passes] == [*(3 * n for n in PRODUCTS), 0]
  for p in passes:
    assert p.seconds > 0 and (p.peak is None or p.peak > 0)
    assert p.rate == p.products / p.seconds
  assert passes[-1].peak is None


def test_table():
  table = profiling.table([
      profiling.Pass("conv\x1b", "W1A1 popcount", 2e-3, 4_000_000_000, 8e12),
      profiling.Pass("dense", "int16 sums", 1e-3, 10**9, None),
      profiling.Pass("logits", "plain loops", 1e-3, 0, None)])
  lines = [line.split() for line in table.splitlines()]
  assert lines[1] == ["conv\\x1b", "W1A1", "popcount", "2.000", "50", "2000", "25"]
  assert lines[2] == ["dense", "int16", "sums", "1.000", "25", "1000"]
  assert lines[3] == ["logits", "plain", "loops", "1.000", "25"]
  assert lines[4] == ["all", "4.000", "100", "1250"]


@pytest.mark.parametrize("options", ({"batch": 0}, {"runs": 0}))
def test_refuses_numbers(program, options):
  with pytest.raises(errors.UsageError, match="at least 1"):
    infer.load(program, backend="native").profile(**options)


def test_needs_the_native_backend(program):
  with pytest.raises(errors.UsageError, match="backend='reference': must be native"):
    infer.load(program, backend="reference").profile()
