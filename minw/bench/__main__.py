"""Measure or estimate the speed of training, inference and data loading.

Each subcommand prints a table. With --json=FILE, it also writes the result to a file.
"""

import json
import os
import sys

from absl import flags
import jax

from minw import cli
from minw import config_flag
from minw import errors
from minw import files
from minw.bench import configs
from minw.bench import data
from minw.bench import device_inference
from minw.bench import inference
from minw.bench import scaling
from minw.bench import throughput
from minw.bench import train
from minw.bench import web


def main_train() -> None:
  """Time training steps of AQE, of the straight-through estimator and in float32.

    python -m minw.bench train [--config=NAME] [--config.FIELD=VALUE]
        [--rounds=N] [--json=FILE] [--trace=DIR]

  All steps have the same fixed batch. A step of AQE is also timed together with the
  loading of its data. If PyTorch is installed, the float32 network is also timed there.
  """
  f = flags.FLAGS
  errors.check(not f.trace or not os.path.isfile(f.trace), "trace", f.trace, "a folder")
  _report(train, lambda: train.bench_train(f.config, f.rounds, f.trace))


def main_inference() -> None:
  """Time a packed network beside the same network in float32 and in int8.

    python -m minw.bench inference [--layers] [--batches=1,64] [...]

  The packed network, by default ConvNet A, is timed with the native kernels and in XLA.
  Networks of the same shapes in float32 and in int8 are the baselines, and for W1A1 the
  binary convolutions of OpenVINO. They need `pip install 'minw[bench]'`. All are timed
  on one thread and on all cores. With --layers, convolutions and dense layers are timed
  alone.

  If JAX finds a GPU or a TPU, the packed network is timed there, beside networks in
  float32, bfloat16 and int8, which XLA compiles. JAX_PLATFORMS=cpu prevents that.
  """
  f, backend = flags.FLAGS, jax.default_backend()
  on_cpu = backend == "cpu"
  errors.check(on_cpu or not f.layers, "layers", f.layers,
               f"false on a {backend}; JAX_PLATFORMS=cpu times layers on the CPU")
  if f.batches is None:
    batches = inference.BATCHES if on_cpu else device_inference.BATCHES
  else:
    batches = _positive("batches")
  if on_cpu:
    _report(inference, lambda: inference.bench_inference(
        f.config, f.rounds, batches, inference.BLOCKS if f.layers else ()))
  else:
    _report(device_inference, lambda: device_inference.bench_inference(
        f.config, f.rounds, batches))


def main_web() -> None:
  """Time a packed network in WebAssembly beside ONNX Runtime's float32 and int8.

    python -m minw.bench web [--where=node,chromium] [--modules=node_modules] [...]

  One image is computed on one thread, in Node and in a page of headless Chromium. CPU
  times are measured in turns, and so is the time to the first result. The packed
  network runs with simd128, and with relaxed SIMD where there is any. The folder
  --modules needs `npm install onnxruntime-web playwright-core`, and Python needs
  `pip install 'minw[bench]'`.
  """
  f = flags.FLAGS
  _report(web, lambda: web.bench_web(f.config, f.rounds, f.where, f.modules))


def main_data() -> None:
  """Measure how fast one core loads images of ImageNet for training.

    python -m minw.bench data --config.data_dir=DIR [...]

  An image is read, decoded and cropped. If PyTorch is installed, its DataLoader with
  Pillow is the baseline.
  """
  _report(data, lambda: data.bench_data(flags.FLAGS.config, flags.FLAGS.rounds))


def main_scaling() -> None:
  """Estimate how long a training step would take on many chips.

    python -m minw.bench scaling [--chips=1,8,64] [--batch_per_chip=32]
        [--teraflops=275] [--utilization=0.3] [--gigabytes=300] [--microseconds=1] [...]

  The estimate follows from the compiled program of a step and from these rates. The
  default rates are those published for TPU v4. No step is run.
  """
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
  """Describe the network of each experiment and time a step of its training.

    python -m minw.bench configs [--configs=NAME[:ARGUMENT]]... [--batch_size=N] [...]

  By default, all experiments that come with minw are timed.
  """
  names = flags.FLAGS.configs or [*config_flag.experiments()]
  _report(configs, lambda: configs.bench_configs(
      names, flags.FLAGS.rounds, flags.FLAGS.batch_size))


def main_throughput() -> None:
  """Measure the training steps per second of several seeds at once.

    python -m minw.bench throughput [--seeds=1,2,4,8] [--seconds=5] [...]

  The seeds run on this machine as separate processes and as one vmapped program. The
  result shows the best value of --jobs for a sweep.
  """
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
    "web": main_web,
    "data": main_data,
    "scaling": main_scaling,
    "configs": main_configs,
    "throughput": main_throughput,
}

_CONFIGS = {  # Default value of --config.
    "train": "cifar_convnet:network=D",
    "inference": "cifar_convnet:network=A",
    "web": "cifar_convnet:network=A",
    "data": "imagenet_resnet18",
    "scaling": "cifar_convnet:network=A",
    "throughput": "cifar_convnet:network=A",
}


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
    config_flag.define(default=_CONFIGS[subcommand])
  if subcommand != "scaling":
    rounds = 3 if subcommand == "throughput" else 15
    flags.DEFINE_integer("rounds", rounds, "Number of measurements.", lower_bound=1)
  if subcommand == "train":
    cli.DEFINE_path(
        "trace", None, "Folder for a trace of some steps, which are not timed.")
  if subcommand == "inference":
    flags.DEFINE_list(
        "batches", None,
        "Batch sizes; by default 1,64 on CPUs, and 1,8,64,512,4096 on GPUs and TPUs.")
    flags.DEFINE_bool(
        "layers", False, "Whether to time single layers instead of networks.")
  if subcommand == "web":
    flags.DEFINE_list("where", list(web.WHERE),
                      "Places to time the engines in: node, chromium.")
    cli.DEFINE_path("modules", "node_modules",
                    "Folder node_modules with the packages of other engines.")
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
        "work", None,
        "Number of seeds in a process. The benchmark passes this flag to the processes "
        "that it measures.")


if __name__ == "__main__":
  cli.run(SUBCOMMANDS, define_flags)
