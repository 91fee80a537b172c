"""minw.training_cost: memory and operations against values worked out by hand."""

import os
import re
import subprocess
import sys

import pytest

from minw import config as config_lib
from minw import experiment
from minw import training_cost

BATCH, WIDTH = 240, 512
WEIGHTS = 64 * WIDTH + WIDTH * 10  # Images are 8x8, and there are 10 classes.
PARAMETERS = WEIGHTS + 2 * (WIDTH + 10)  # Batch norm has a scale and a shift.
# Products forward, for the gradients of weights, and for those of the second input.
PRODUCTS = BATCH * (2 * WEIGHTS + WIDTH * 10)

# What runs with several virtual devices.
ON_DEVICES = """
import sys
from minw import config, experiment, training_cost
print(*training_cost.of_step(experiment.Experiment(config.from_json(sys.argv[1]))))
"""


def environment(devices):
  return os.environ | {
      "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "JAX_PLATFORMS": "cpu",
      "JAX_NUM_CPU_DEVICES": str(devices)}


def dense(**changes):
  config = config_lib.default_config("digits")
  config.update(conv_widths=(), dense_widths=(WIDTH,), batch_size=BATCH,
                eval_batch_size=BATCH, **changes)
  return config


def check(cost, devices, optimizer):
  assert cost.devices == devices
  assert cost.parameters == 4 * PARAMETERS
  assert cost.optimizer == optimizer
  # Mean and variance of each channel, the step and the four sums.
  assert cost.rest == 4 * (2 * (WIDTH + 10) + 1 + 4)
  assert cost.data == 1257 * (64 + 4 + 4)  # Pixels, labels and order.
  # Activations and their gradients need memory of the layer's width at least.
  assert 4 * BATCH * WIDTH / devices < cost.temporary < 40 * BATCH * WIDTH / devices
  assert cost.bytes == sum(cost[1:6])
  # A product and its sum are two operations. Few of the others are as many.
  assert 1 < cost.operations / (2 * PRODUCTS / devices) < 1.2


def test_a_dense_network():
  # Adam has two moments and two counters of steps.
  check(training_cost.of_step(experiment.Experiment(dense())), 1,
        4 * (2 * PARAMETERS + 2))


@pytest.mark.slow
def test_on_each_of_several_devices():
  config = dense(shard_optimizer=True)
  done = subprocess.run(
      [sys.executable, "-c", ON_DEVICES, config_lib.to_json(config)], text=True,
      check=True, stdout=subprocess.PIPE, env=environment(4))
  devices, *sizes, operations = done.stdout.split()
  cost = training_cost.StepCost(int(devices), *map(int, sizes), float(operations))
  # The moments of weights are shared, and those of batch norm are not.
  check(cost, 4, 4 * (2 * (WEIGHTS // 4 + 2 * (WIDTH + 10)) + 2))


def test_command(command):
  ended = command(
      "minw.summary", "--config=digits_convnet", "--config.conv_widths=()",
      f"--config.dense_widths=({WIDTH},)", f"--config.batch_size={BATCH}", "--step",
      "--images_per_second=100")
  assert (ended.code, ended.err) == (0, "")
  assert f"\ntraining step of {BATCH} images\n" in ended.out
  parameters, = re.findall(r"^parameters +([\d.]+)  MiB$", ended.out, re.MULTILINE)
  assert float(parameters) == pytest.approx(4 * PARAMETERS / 2**20, abs=6e-4)
  # 40 epochs of 5 batches of 240 images.
  assert ended.out.endswith(
      "\ntraining on 48,000 images takes 8 min, without evaluation, at 100 images a"
      " second\n")


def test_bad_values(command):
  for flag, message in (
      ("--images_per_second=0", "images_per_second='0': must be "),
      ("--config.teacher=run", "config.teacher='run': must be left out")):
    ended = command("minw.summary", "--config=digits_convnet", "--step", flag)
    assert (ended.code, ended.out, ended.err.count("\n")) == (2, "", 1)
    assert ended.err.startswith(f"error: {message}")
