"""minw.export.c_cost: the steps of exported C, which a plain search of windows counts.

The instructions of a step are tested in `test_export_cortex_m`, with an emulator.
"""

import itertools

import hypothesis
import numpy as np
import pytest

from minw import packed
from minw.export import c
from minw.export import c_cost
from minw.kernels import reference
from packed_networks import Builder
from packed_networks import digits_network
from packed_networks import images
from packed_networks import programs


def network(w_bits, x_bits, strides, dilation, pool):
  """Codes of 32 channels, a convolution of them, and perhaps a pool of 3x3 pixels."""
  b = Builder(np.random.default_rng(7), (9, 10, 2))
  x = b.threshold(b.conv(0, 1, 32), x_bits)
  x = b.conv(x, w_bits, 64, (3, 2), strides, (1, 1, 2, 1), dilation=dilation)
  if pool:
    x = b.add(packed.Pool("pool", x, "max", (3, 3), (3, 3), (1, 0, 0, 1)))
  return b.end(b.threshold(x, 1), w_bits)


def windows_by_hand(program, batch):
  """For each pair of windows, the inputs that are added to both or to one of them.

  Returns:
    A list of (inputs in both, in the first, in the second or None). An input of a
    window is (row, column, channel, bit) of a weight, for each image.
  """
  conv = program.ops[2]
  codes = reference.run(program, batch)[2]
  bits = packed.infer_values(program)[2].bits
  most = {1: 1, 2: 1, 3: 4}[bits]
  minus = (codes < 0).mean() > 0.5 and bits == 1
  u = most - packed.levels(-codes if minus else codes, bits).astype(int)

  def inputs(image, y, x):
    found = set()
    for i, j in itertools.product(*map(range, conv.kernel.shape[1:3])):
      r = y * conv.strides[0] - conv.pads[0] + i * conv.dilation[0]
      s = x * conv.strides[1] - conv.pads[2] + j * conv.dilation[1]
      if 0 <= r < u.shape[1] and 0 <= s < u.shape[2]:
        found |= {(i, j, k, bit) for k in range(u.shape[3]) for bit in range(4)
                  if u[image, r, s, k] >> bit & 1}
    return found

  height, width, _ = packed.infer_values(program)[3].shape
  rows, groups = range(height), [range(width)]
  if isinstance(program.ops[3], packed.Pool):  # No window of the pool has the last row.
    rows, groups = range(8), [range(0, 3), range(3, 6), range(6, 9), range(9, 12)]
  found = []
  for image, y, group in itertools.product(range(len(batch)), rows, groups):
    for x in group[::2]:
      a = inputs(image, y, x)
      b = inputs(image, y, x + 1) if x + 1 in group else None
      found.append((a & b if b is not None else set(), a, b))
  return found


@pytest.mark.parametrize("w_bits, x_bits, strides, dilation, pool", [
    (1, 1, (1, 1), (1, 1), False), (2, 2, (1, 2), (1, 1), False),
    (1, 3, (1, 1), (2, 3), False), (1, 1, (1, 1), (1, 1), True)])
def test_listed_inputs_are_those_of_all_windows(
    w_bits, x_bits, strides, dilation, pool):
  program = network(w_bits, x_bits, strides, dilation, pool)
  batch = images(program, 2)
  steps = c.steps(program, batch)[1].steps
  windows = windows_by_hand(program, batch)
  lists = [part for both, a, b in windows
           for part in (both, a - both, (b or set()) - both)]
  wanted = sum(map(len, lists)) / 2
  assert steps["listed input"] == wanted
  # Each bit of the inputs has a list of its own, and a block of 32 channels adds the
  # inputs of a list by sixteens, for each bit of the weights.
  sixteens = sum(-(-sum(entry[3] == bit for entry in part) // 16)
                 for part in lists for bit in range(4)) / 2
  assert steps["sixteen"] == sixteens * 2 * w_bits
  assert steps["filler"] == 16 * sixteens - wanted


def test_steps_of_a_convolution_of_pixels():
  """Windows of 18 pixels, five lots of four of them, for 40 channels in two blocks."""
  b = Builder(np.random.default_rng(0), (6, 5, 2))
  program = b.end(b.threshold(b.conv(0, 1, 40, pads=(0,) * 4), 2))
  layer, last = c.steps(program, images(program, 1))
  assert (layer.name, layer.products) == ("conv", 4 * 3 * 40 * 18)
  # Two windows of a row are computed together, and the third one as if it had a
  # neighbor. There are two thresholds.
  assert layer.steps["pixel"] == 4 * 3 * 18
  assert layer.steps["look-up"] == 4 * 2 * 2 * 5
  assert layer.steps["transposition"] == 4 * 2 * 2
  assert layer.steps["comparison"] == 4 * 3 * 2 * 2
  assert last.products == 12 * 40 * 7
  assert last.steps == {"element of a convolution": 7, "row of a window": 28,
                        "word of 2 and 1 bits": 7 * 12 * 2, "logit": 7}


def test_steps_of_a_network_without_codes():
  layer, = c.steps(digits_network(), np.zeros((1, 8, 8, 1), np.uint8))
  assert layer == ("fc", 640, {
      "element of a convolution": 10, "row of a window": 80, "product of pixel": 640,
      "logit": 10})


def test_programs_without_layers_have_no_steps():
  ops = (packed.Pool("p", 0, "max", (2, 2), (1, 1)),
         packed.Logits("l", 1, 1.0, *np.ones((3, 4), np.float32)))
  program = packed.Program((2, 2, 4), (2, 2), np.zeros(4, np.uint8), 4, ops, {})
  assert c.steps(program, np.zeros((1, 2, 2, 4), np.uint8)) == []


@hypothesis.given(programs())
@hypothesis.settings(max_examples=30, deadline=None)
def test_every_step_has_a_cost(program):
  layers = c_cost.estimate(c.steps(program, images(program, 1)))
  convolutions = [(op, kind.shape) for op, kind in zip(
      program.ops, packed.infer_values(program)[1:]) if isinstance(op, packed.Conv)]
  assert [layer.products for layer in layers] == [
      op.kernel.size * h * w for op, (h, w, _) in convolutions]
  assert all(layer.instructions > 0 for layer in layers)


def test_report_by_hand():
  layers = [c_cost.Layer("conv", 100_000, 25_000.4), c_cost.Layer("fc", 500, 1000)]
  assert c_cost.report(layers) == """\
estimated instructions for an image on a Cortex-M3, with gcc -O2:
layer  multiply-accumulates  instructions     each  CMSIS-NN int8
conv                100,000        25,000     0.25        173,000
fc                      500         1,000     2.00            865
total               100,500        26,000     0.26        173,865
CMSIS-NN int8: 1.73 for a multiply-accumulate, as measured on Cortex-M4, M7 and M33"""
