"""What programs are compiled to for a GPU, by XLA's compiler without a GPU.

The compiler comes with the packages jax-cuda13-plugin and jax-cuda13-pjrt of JAX's own
version, installed with --no-deps.
"""

import importlib.util
import json
import os
import subprocess
import sys

import pytest

from minw import config as config_lib

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("jax_plugins") is None
        or importlib.util.find_spec("jax_plugins.xla_cuda13") is None,
        reason="jax-cuda13-plugin and jax-cuda13-pjrt are not installed")]

# Begins the programs below: `gpu` stands for one H100.
DEVICE = r'''
import json, os, re, sys
import jax
from jax.experimental import topologies
import numpy as np
from minw import config as config_lib, train_step
from minw.bench import device_engines, networks
from minw.experiment import Experiment

H100 = """
platform_name: "CUDA"
device_description_str: "NVIDIA H100 80GB HBM3"
dnn_version_info { major: 9 minor: 10 patch: 0 }
gpu_device_info {
  name: "NVIDIA H100 80GB HBM3"
  device_vendor: "NVIDIA Corporation"
  cuda_compute_capability { major: 9 }
  driver_version: "13.0.0"
  runtime_version: "13.0.0"
  compile_time_toolkit_version: "13.0.0"
  dnn_version: "9.10.0"
  core_count: 132
  clock_rate_ghz: 1.98
  fpus_per_core: 128
  device_address_bits: 64
  device_memory_size: 85899345920
  memory_bandwidth: 3352320000000
  l2_cache_size: 52428800
  shared_memory_per_core: 233472
  shared_memory_per_block: 49152
  shared_memory_per_block_optin: 232448
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
  threads_per_core_limit: 2048
  threads_per_block_limit: 1024
  threads_per_warp: 32
  thread_dim_limit_x: 1024
  thread_dim_limit_y: 1024
  thread_dim_limit_z: 64
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
}
"""
gpu, = topologies.get_topology_desc(
    platform="cuda", topology_name="", target_config=H100, topology="1x1x1").devices
'''

# Run with configs, whose steps it compiles. Prints for each of them the element types
# of convolutions, how many of them name an algorithm, the sizes of sorts and the number
# of scatters that select.
STEPS = DEVICE + r'''
auto = (jax.sharding.AxisType.Auto,)
mesh = jax.sharding.Mesh(np.array([gpu]), ("data",), axis_types=auto)
jax.devices = lambda *_: [gpu]
jax.make_mesh = lambda *_, **__: mesh
jax.default_backend = lambda: "gpu"
found = []
for text in sys.argv[1:]:
  experiment = Experiment(config_lib.from_json(text))
  batch = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(
      leaf.shape, leaf.dtype, sharding=experiment.replicated),
      experiment.data.abstract_batch())
  step = train_step.make_train_step(experiment)
  # Without a device there is nothing to tune matrix products on.
  program = step.lower(train_step.abstract_state(experiment), *batch).compile(
      {"xla_gpu_enable_triton_gemm": False}).as_text()
  lines = [line for line in program.splitlines() if "__cudnn$conv" in line]
  found.append({
      "convolutions": [re.search(r"= [(]?(\w+)", line)[1] for line in lines],
      "algorithms": sum('"algorithm"' in line for line in lines),
      "sorts": list(map(int, re.findall(
          r"= [(]?\w+\[(\d+)[^=]* sort[(]", program))),
      "selecting scatters": program.count("select-and-scatter"),
      "gathers": program.count("all-gather")})
print(json.dumps(found))
'''

# Run with a config, whose network the engines of the benchmark compute for 64 images.
# Prints for each engine the products of matrices and the convolutions that libraries
# compute: the types of the two factors and of the sums.
INFERENCE = DEVICE + r'''
program = networks.random_network(config_lib.from_json(sys.argv[1]))
engines = {name: make(program) for name, make in device_engines.ENGINES.items()}
jax.default_backend = lambda: "gpu"
on_gpu = lambda leaf: jax.ShapeDtypeStruct(
    leaf.shape, leaf.dtype, sharding=jax.sharding.SingleDeviceSharding(gpu))
images = np.zeros((64, *program.source_shape), np.uint8)
found = {}
for name, engine in engines.items():
  text = jax.jit(engine.logits).lower(
      *jax.tree.map(on_gpu, (engine.operands, images))).compile(
          {"xla_gpu_enable_triton_gemm": False}).as_text()
  types = dict(re.findall(r"(%[\w.-]+) = [(]?(\w+)\[", text))
  found[name] = [
      [types[operand] for operand in operands.split(", ")[:2]] + [types[result]]
      for result, operands in re.findall(
          r"(%[\w.-]+) = .* custom-call\((.*?)\),.*target=\"__cu", text)]
print(json.dumps(found))
'''


def compiled(*configs, program=STEPS):
  environment = os.environ | {"JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1", "XLA_FLAGS": "",
                              "JAX_PLATFORMS": "cpu"}
  run = subprocess.run(
      [sys.executable, "-c", program, *map(config_lib.to_json, configs)],
      env=environment, capture_output=True, text=True)
  assert run.returncode == 0, run.stderr[-2000:]
  return json.loads(run.stdout)


def test_steps_for_an_h100():
  """Six convolutions have 17 products: the image needs no gradient."""
  config = config_lib.default_config("cifar10")
  narrow = config_lib.copy(config, compute_dtype="bfloat16", sum_dtype="bfloat16")
  free = config_lib.copy(config, deterministic=False)
  resnet = config_lib.copy(config_lib.default_config("imagenet2012"), batch_size=32)
  for got, dtype, count, batch in zip(
      compiled(config, narrow, free, resnet), ("f32", "bf16", "f32", "f32"),
      (17, 17, 17, 59), (256, 256, 256, 32)):
    assert got["convolutions"] == count * [dtype]
    # "algo_id": -1 asks the device to choose, which it cannot if there is no algorithm.
    assert got["algorithms"] == count
    assert not got["selecting scatters"] and not got["gathers"]
    assert all(size <= batch for size in got["sorts"])  # That of the labels' gradient.


def test_inference_for_an_h100():
  """All ways in int8 multiply bytes; convolutions of int8 have sums in float32."""
  config = config_lib.copy(config_lib.default_config("cifar10"),
                           conv_widths=(128, 128, 256), dense_widths=(256,))
  found = compiled(config, program=INFERENCE)
  bytes_ = ["s8", "s8", "s32"]
  assert found == {
      "packed": [["f32", "f32", "f32"]] + [bytes_] * 4,  # Pixels take nine bits.
      "float32": [["f32"] * 3] * 5, "bfloat16": [["bf16"] * 3] * 5,
      "int8 products": [bytes_] * 5,
      "int8 convolutions": [["s8", "s8", "f32"]] * 3 + [bytes_] * 2}
