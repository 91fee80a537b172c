"""Benchmarks of training, inference and data loading, each with a baseline.

  python -m minw.bench train [--config=NAME] [--config.FIELD=VALUE]
      [--rounds=N] [--json=FILE]

times a training step of AQE, of the straight-through estimator and of the float32
network. The steps have a fixed batch; AQE is also timed with its data. If PyTorch is
installed, the float32 network is also timed there.

  python -m minw.bench inference [--layers] [--batches=1,64] [...]

times the packed network, by default ConvNet A, with the native kernels and in XLA. The
same network in float32 and in int8 is the baseline (pip install 'minw[bench]'). All are
timed on one thread and on all cores. With --layers, single convolutions are timed.

  python -m minw.bench data --config.data_dir=DIR [...]

measures how many images per second one core reads, decodes and crops for training on
ImageNet. If PyTorch is installed, its DataLoader with Pillow is the baseline.

  python -m minw.bench scaling [--chips=1,8,64] [--batch_per_chip=32] [--teraflops=275]
      [--utilization=0.3] [--gigabytes=300] [--microseconds=1] [...]

estimates how long a step would take on many chips, from its compiled program and these
rates. The default rates are those published for TPU v4. Nothing is run.

  python -m minw.bench configs [--configs=NAME[:ARGUMENT]]... [--batch_size=N] [...]

describes the network of each experiment and times a step of its training. By default
these are all experiments that come with minw.

  python -m minw.bench throughput [--seeds=1,2,4,8] [--seconds=5] [...]

measures the training steps per second of several seeds at once on this machine, as
separate processes and as one vmapped program. This shows the best value of --jobs for a
sweep.
"""

import json
import os
import sys
from typing import Any

from absl import flags

from minw import cli
from minw import config as config_lib
from minw import config_flag
from minw import errors
from minw import files
from minw import models
from minw.bench import configs
from minw.bench import data
from minw.bench import inference
from minw.bench import scaling
from minw.bench import throughput
from minw.bench import train


def get_config(network: str = "D") -> Any:
  """Returns the default config of a benchmark. The flag --config names this file."""
  c = config_lib.default_config()
  if network == "imagenet2012":
    c.update(dataset=network, network="resnet18", crop_size=224)
    return c
  c.conv_widths, c.dense_widths = models.convnet_widths(network)
  return c


def main_train() -> None:
  """Times steps of training, as the flags say."""
  _report(train, lambda: train.bench_train(flags.FLAGS.config, flags.FLAGS.rounds))


def main_inference() -> None:
  """Times packed networks, as the flags say."""
  batches = _positive("batches")
  _report(inference, lambda: inference.bench_inference(
      flags.FLAGS.config, flags.FLAGS.rounds, batches, flags.FLAGS.layers))


def main_data() -> None:
  """Counts the images that one core prepares, as the flags say."""
  _report(data, lambda: data.bench_data(flags.FLAGS.config, flags.FLAGS.rounds))


def main_scaling() -> None:
  """Computes how long a step would take on many chips, as the flags say."""
  f = flags.FLAGS
  rates = scaling.Rates(*(getattr(f, name) for name in scaling.Rates._fields))
  chips = _positive("chips")
  _report(scaling, lambda: scaling.bench_scaling(
      f.config, chips, f.batch_per_chip, rates))


def _positive(flag: str) -> list[int]:
  values: list[str] = getattr(flags.FLAGS, flag)
  errors.check(bool(values) and all(n.isdigit() and int(n) for n in values), flag,
               ",".join(values), "positive integers, 1,64 for example")
  return [int(n) for n in values]


def main_configs() -> None:
  """Times a step of each experiment, as the flags say."""
  names = flags.FLAGS.configs or [*config_flag.experiments()]
  _report(configs, lambda: configs.bench_configs(
      names, flags.FLAGS.rounds, flags.FLAGS.batch_size))


def main_throughput() -> None:
  """Counts the steps of several seeds, or takes part in that with --work."""
  f = flags.FLAGS
  if f.work:
    throughput.work(f.config, f.work, f.seconds)
    return
  seeds = _positive("seeds")
  _report(throughput, lambda: throughput.bench_throughput(
      f.config, seeds, f.rounds, sys.argv[1:]))


def _report(module, measure) -> None:
  path = flags.FLAGS.json
  if path:  # Check the path now, because the measurement takes minutes.
    errors.check(os.path.isdir(os.path.dirname(path) or "."), "json", path,
                 "a file in a directory that exists")
  result = measure()
  print(module.table(result))
  if path:
    files.write(path, json.dumps(result, indent=2) + "\n")


SUBCOMMANDS = {
    "train": main_train,
    "inference": main_inference,
    "data": main_data,
    "scaling": main_scaling,
    "configs": main_configs,
    "throughput": main_throughput,
}

# Argument of `get_config` for the default config of each benchmark.
_NETWORKS = {"train": "D", "inference": "A", "data": "imagenet2012", "scaling": "A",
             "throughput": "A"}


def define_flags(subcommand: str) -> None:
  """Defines the flags of a subcommand."""
  cli.DEFINE_path("json", None, "File to write the result to, as a JSON object.")
  if subcommand == "configs":
    flags.DEFINE_multi_string(
        "configs", [], "Experiments to time; by default all that come with minw.")
    flags.DEFINE_integer(
        "batch_size", None, "Batch size of all configs instead of their own.",
        lower_bound=1)
  else:
    config_flag.define(default=f"{__file__}:{_NETWORKS[subcommand]}")
  if subcommand != "scaling":
    rounds = 3 if subcommand == "throughput" else 15
    flags.DEFINE_integer("rounds", rounds, "Number of measurements.", lower_bound=1)
  if subcommand == "inference":
    flags.DEFINE_list("batches", ["1", "64"], "Batch sizes.")
    flags.DEFINE_bool(
        "layers", False, "Whether to time single convolutions and not networks.")
  if subcommand == "scaling":
    flags.DEFINE_list("chips", ["1", "8", "64", "512", "4096"], "Numbers of chips.")
    flags.DEFINE_integer(
        "batch_per_chip", 32, "Number of examples per chip.", lower_bound=1)
    flags.DEFINE_float("teraflops", 275, "Peak teraflop/s of a chip.", lower_bound=1e-3)
    flags.DEFINE_float("utilization", 0.3, "Share of the peak that is reached.",
                       lower_bound=1e-3, upper_bound=1)
    flags.DEFINE_float("gigabytes", 300,
                       "Gigabytes per second that a chip sends over all its links.",
                       lower_bound=1e-3)
    flags.DEFINE_float("microseconds", 1, "Latency between two chips in microseconds.",
                       lower_bound=0)
  if subcommand == "throughput":
    flags.DEFINE_list("seeds", ["1", "2", "4", "8"], "Numbers of seeds to compare.")
    flags.DEFINE_float(
        "seconds", 5, "Length of a measurement in seconds.", lower_bound=0)
    flags.DEFINE_integer(
        "work", None, "Number of seeds in a process. Measured processes get this flag.")


if __name__ == "__main__":
  cli.run(SUBCOMMANDS, define_flags)
