"""minw.bench.scaling: what a step sends, from its compiled program, and the times."""

import json
import pathlib

import numpy as np
import pytest

from minw.bench import scaling

ROOT = pathlib.Path(__file__).parents[1]

HLO = """
  %all-reduce.3 = (f32[10]{0}, f32[10]{0}) all-reduce(%a, %b), channel_id=1
  ROOT %x = bf16[3,3,4,8]{3,2,1,0:T(8,128)} all-reduce-start(%c), channel_id=2
  %y = (f32[], /*index=1*/s8[7]{0}) all-gather(%d, %e), dimensions={0}
  %z = f32[64]{0} add(%all-reduce.3, %all-reduce.3)
  %w = f32[10]{0} get-tuple-element(%all-reduce.3), index=0
"""


def test_collectives_of_a_program():
  assert scaling.collectives(HLO) == [
      ("all-reduce", (("f32", (10,)), ("f32", (10,))), 80),
      ("all-reduce", (("bf16", (3, 3, 4, 8)),), 2 * 288),
      ("all-gather", (("f32", ()), ("s8", (7,))), 11)]


RATES = scaling.Rates(teraflops=100, utilization=0.5, gigabytes=10, microseconds=2)


def test_time_of_a_reduction_by_hand():
  # 2 * 7/8 * 8e6 bytes at 1e10 a second, and 3 * 2 hops of 2 us.
  assert scaling.reduction_seconds(8e6, 8, RATES) == pytest.approx(1.4e-3 + 12e-6)
  assert scaling.reduction_seconds(8e6, 1, RATES) == 0


def test_times_of_a_step_by_hand():
  found = [scaling.Collective("all-reduce", (("f32", (10**6,)),), 4 * 10**6),
           scaling.Collective("all-reduce", (("f32", (1000, 2000)),), 8 * 10**6)]
  alone, eight = scaling.step_times(5e9, found, [(1, 16), (8, 2)], RATES)
  # 5e9 operations at 5e13 a second: 0.1 ms an example.
  assert alone == dict(chips=1, batch_per_chip=16, compute=pytest.approx(1.6e-3),
                       gradients=0, statistics=0, step=pytest.approx(1.6e-3),
                       bfloat16=pytest.approx(1.6e-3), efficiency=1)
  assert eight["compute"] == pytest.approx(0.2e-3)
  assert eight["gradients"] == pytest.approx(1.412e-3)
  assert eight["statistics"] == pytest.approx(0.712e-3)
  assert eight["step"] == pytest.approx(2.324e-3)
  assert eight["bfloat16"] == pytest.approx(2.324e-3 - 0.7e-3)
  assert eight["efficiency"] == pytest.approx(0.2 / 2.324)


@pytest.fixture
def bench(command, tmp_path):
  """bench(*arguments): the result of `minw.bench scaling`."""
  path = tmp_path / "result.json"

  def bench(*arguments):
    ended = command("minw.bench", "scaling", f"--json={path}", *arguments, seconds=300)
    assert ended.code == 0, ended.err
    return json.loads(path.read_text())

  return bench


def check_step(result, kernels, positions, products):
  """Each kernel's gradient is sent once, nothing that has the batch's size is."""
  found = [scaling.Collective(**each) for each in result["collectives"]]
  assert {each.kind for each in found} == {"all-reduce"}
  shapes = [tuple(shape) for each in found for _, shape in each.arrays]
  sent = sorted(int(np.prod(shape)) for shape in shapes if len(shape) > 1)
  assert sent == sorted(kernels)
  assert max(np.prod(shape) for shape in shapes if len(shape) < 2) < min(positions)
  # Twice the forward again: gradients of inputs, of which the image needs none, and of
  # kernels; then what is no product at all.
  assert 0.99 * products < result["operations"] < 1.05 * products


def taps(size):
  """Products of a 3x3 window with a border, whose zeros XLA does not count."""
  return (3 * size - 2) ** 2


def test_command_on_digits(bench):
  result = bench(
      f"--config={ROOT}/experiments/digits_convnet.py",
      "--config.conv_widths=(32,32)", "--config.eval_batch_size=64", "--chips=1,8,512",
      "--teraflops=1", "--microseconds=0")
  kernels = [9 * 32, 9 * 32 * 32, 16 * 32 * 128, 128 * 10]
  products = 2 * (2 * taps(8) * 32 + 3 * (taps(8) * 32 * 32 + sum(kernels[2:])))
  check_step(result, kernels, [64 * 8 * 8 * 32], products)
  assert result["parameters"] == sum(kernels) + 2 * (32 + 32 + 128 + 10)
  assert [row["chips"] for row in result["weak"]] == [1, 8, 512]
  assert [row["chips"] for row in result["strong"]] == [1, 8]  # The batch is 64.
  weak = result["weak"][1]
  assert weak["compute"] == pytest.approx(32 * result["operations"] / 0.3e12)
  total = sum(each["bytes"] for each in result["collectives"])
  assert weak["gradients"] + weak["statistics"] == pytest.approx(1.75 * total / 300e9)


@pytest.mark.slow
def test_convnet_a_sends_all_gradients_at_once(bench):
  result = bench()
  convs = [(24, 3, 128), (24, 128, 128), (12, 128, 256), (12, 256, 256),
           (6, 256, 512), (6, 512, 512)]
  dense = [4608 * 1024, 1024 * 1024, 1024 * 10]
  products = 6 * (sum(taps(size) * i * o for size, i, o in convs) + sum(dense))
  check_step(result, [9 * i * o for _, i, o in convs] + dense, [256 * 576 * 128],
             products - 2 * taps(24) * 3 * 128)
  assert sum(map(scaling.of_kernels, (
      scaling.Collective(**each) for each in result["collectives"]))) == 1


@pytest.mark.slow
def test_resnet_18_sends_no_activations(bench):
  result = bench(
      f"--config={ROOT}/experiments/imagenet_resnet18.py",
      "--config.eval_batch_size=256")
  assert result["parameters"] == pytest.approx(11.69e6, rel=1e-3)
  found = [scaling.Collective(**each) for each in result["collectives"]]
  assert {each.kind for each in found} == {"all-reduce"}
  sizes = sum(int(np.prod(shape)) for each in found for _, shape in each.arrays
              if len(shape) > 1)
  norms = 2 * (64 * 5 + 128 * 5 + 256 * 5 + 512 * 5 + 1000)
  assert sizes == result["parameters"] - norms


def test_bad_flags(command):
  code, _, err = command("minw.bench", "scaling", "--chips=1,0")
  assert code == 2 and err.count("\n") == 1 and "chips='1,0'" in err
