"""Benchmark of inference: the packed network beside float32 and int8 networks.

Each number of threads is measured in a separate process with as many cores.
"""

import concurrent.futures
import multiprocessing
import os
import subprocess
import sys
import tempfile
from typing import Any, Callable, Sequence

import numpy as np

from minw import errors
from minw import files
from minw import packed
from minw import profiling
from minw import stopping
from minw import titles
from minw.bench import engines
from minw.bench import networks
from minw.bench import openvino_networks
from minw.bench import timing
from minw.bench.networks import Block
from minw.kernels import native

_PACKAGES = ("numpy", "onnx", "onnxruntime", "openvino", "torch")  # Recorded versions.
# Extensions of x86-64 and AArch64 on which the speed of the engines depends.
_EXTENSIONS = (
    "avx2", "avx_vnni", "avx512bw", "avx512_vnni", "avx512_vpopcntdq", "amx_int8",
    "asimddp", "i8mm")
BATCHES = (1, 64)  # Default batch sizes.
# What --layers times, and the bits of the weights and the activations.
BLOCKS = (Block(24, 128), Block(12, 256), Block(6, 512), Block(1, 1024, 1))
_PAIRS = [(1, 1), (2, 1), (1, 2), (3, 1), (2, 2), (3, 3)]
# A layer's time is the difference between networks of so many layers, divided by the
# difference in layers.
_DEPTHS = (2, 6)


def bench_inference(
    config: Any, rounds: int, batches: Sequence[int], blocks: Sequence[Block] = ()
) -> dict[str, Any]:
  """Times inference engines side by side, with random weights and images.

  Args:
    config: Config of a network, see `config.default_config`.
    rounds: Number of measurements of each engine.
    batches: Batch sizes.
    blocks: Single layers to time, such as `BLOCKS`. If empty, the config's network is
      timed.

  Returns:
    The object that --json writes. `runs` has threads, batch, engines, ratios and the
    engines that were left out of each run. `left_out` at the top has the engines that
    were left out of all runs.

  Raises:
    errors.UsageError: The config cannot be run.
  """
  file = b""
  if blocks:
    runs = _in_process(_layers, rounds, batches, blocks)
  else:
    file = packed.to_bytes(checked_network(config))
    cores = len(os.sched_getaffinity(0))
    runs = [run for threads in sorted({1, cores})
            for run in _in_process(_networks, rounds, batches, file, threads)]
  return {
      "bench": "inference", "config": config.to_dict(), "rounds": rounds,
      "layers": bool(blocks), "machine": timing.machine(_PACKAGES), "core": _core(),
      "isa": _isa(),
      "runs": runs, "left_out": left_out_of_all(runs),
      "peak_bytes": native_memory(file) if file else {},
  }


def checked_network(config: Any) -> packed.Program:
  """Packs a config's network with random weights, if all baselines can run it too.

  Raises:
    errors.UsageError: They cannot, or the network does not pack.
  """
  program = networks.random_network(config)
  try:
    networks.float_layers(program)
  except ValueError as error:
    raise errors.bad_value("config.network", config.network, networks.KNOWN) from error
  return program


def _in_process(measure: Callable[..., Any], *arguments: Any) -> list[dict[str, Any]]:
  """Returns the result of a function that runs in a process of its own."""
  context = multiprocessing.get_context("spawn")
  with concurrent.futures.ProcessPoolExecutor(
      1, context, stopping.end_with_parent) as pool:
    return pool.submit(measure, *arguments).result()


def left_out_of_all(runs: Sequence[dict[str, Any]]) -> dict[str, str]:
  """Returns the engines that no run has, with the reason of the last run."""
  timed = {name for run in runs for name in run["engines"]}
  return {name: why for run in runs for name, why in run["left_out"].items()
          if name not in timed}


_PEAK, _PEAK_PRODUCTS = "kernel on registers", 10**9


def _peak(program):
  """Returns the run of a kernel on registers by its name, and the kernel's name.

  It is the kernel of the layer with most products. The dict is empty if there is no
  such measurement.
  """
  if not native.available():
    return {}, ""
  network = native.load(packed.to_bytes(program))
  op = int(np.argmax(profiling.products(program)))
  products = network.peak(op, 1)
  if not products:
    return {}, ""
  steps = _PEAK_PRODUCTS // products
  return ({_PEAK: engines.repeat(lambda: network.peak(op, steps))},
          network.layers()[op][1])


_CALL = "call of OpenVINO"


def _call_overhead(threads):
  """Returns a run of a model of one addition in OpenVINO, by its name."""
  compiled = openvino_networks.compile_model(
      openvino_networks.overhead_model(), threads)
  return {_CALL: engines.repeat(openvino_networks.prepare(
      compiled, np.zeros((1, 1), np.float32)))}


def _limit(threads: int) -> None:
  """Restricts this process to that many cores, and OpenVINO to the forced kernels.

  Call it before JAX starts threads and before OpenVINO is imported.
  """
  os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])
  if os.environ.get("MINW_ISA") == "avx2":
    os.environ.update(openvino_networks.AVX2)


def _networks(
    rounds: int, batches: Sequence[int], file: bytes, threads: int
) -> list[dict[str, Any]]:
  """Measures a packed network and its baselines in a separate process."""
  _limit(threads)
  program = packed.from_bytes(file, packed.UNLIMITED)
  layers = networks.float_layers(program)
  work = networks.multiplications(program)
  found = []
  for batch in batches:
    runs, left_out = engines.start(
        program, layers, batch, threads, engines.OF_NETWORKS)
    peak_run, kernel = _peak(program) if threads == 1 else ({}, "")
    runs.update(peak_run)
    if "OpenVINO binary" in runs:
      runs.update(_call_overhead(threads))
    seconds = timing.measure(runs, rounds)
    peak, overhead = seconds.pop(_PEAK, None), seconds.pop(_CALL, None)
    found.append(_result(
        seconds, work * batch, threads=threads, batch=batch, left_out=left_out))
    if peak:
      found[-1]["peak_per_second"] = _PEAK_PRODUCTS / np.median(peak)
      found[-1]["peak_kernel"] = kernel
    if overhead:
      found[-1]["openvino_call_seconds"] = np.median(overhead)
  return found


def _layers(
    rounds: int, batches: Sequence[int], blocks: Sequence[Block]
) -> list[dict[str, Any]]:
  """Measures single layers on one thread in a separate process."""
  _limit(1)
  return [_layer(rounds, batch, block, weights, inputs)
          for batch in batches for block in blocks for weights, inputs in _PAIRS]


def _layer(
    rounds: int, batch: int, block: Block, weights: int, inputs: int
) -> dict[str, Any]:
  """Measures a layer with its thresholds, as the difference of two networks."""
  names = engines.OF_CONVOLUTIONS if block.size > 1 else engines.OF_DENSE_LAYERS
  low, high = _DEPTHS
  runs, left_out = {}, {}
  for depth in _DEPTHS:
    program = networks.stack(depth, block, weights, inputs)
    started, without = engines.start(
        program, networks.float_layers(program), batch, 1, names)
    left_out.update(without)
    runs.update({(name, depth): run for name, run in started.items()})
  whole = timing.measure(runs, rounds)
  seconds = {
      name: [max(b - a, 1e-9) / (high - low)
             for a, b in zip(whole[name, low], whole[name, high])]
      for name in names if name not in left_out}
  work = networks.multiplications(program) // high * batch
  return _result(seconds, work, threads=1, batch=batch, left_out=left_out,
                 layer=f"W{weights}A{inputs} {block}")


def _result(seconds, work, **about):
  """Summarizes the times of engines, and their ratios to the packed network's times."""
  engines = {name: {**timing.summary(values), "per_second": work / np.median(values)}
             for name, values in seconds.items()}
  ratios = {
      f"{a} / {b}": timing.summary([x / y for x, y in zip(seconds[a], seconds[b])])
      for b in ("native", "XLA packed") for a in seconds
      if b in seconds and a not in ("native", b)}
  return {**about, "engines": engines, "ratios": ratios}


def _core() -> dict[str, Any]:
  """Returns what /proc/cpuinfo says of the core beside its name, where it exists."""
  if not os.path.exists("/proc/cpuinfo"):
    return {}
  with open("/proc/cpuinfo") as lines:
    pairs = (line.partition(":")[::2] for line in lines)
    fields = {name.strip(): value.strip() for name, value in pairs}
  flags = {*fields.get("flags", fields.get("Features", "")).split()}
  return {
      **{name: fields[name] for name in ("cpu family", "model", "stepping")
         if name in fields},
      "extensions": [name for name in _EXTENSIONS if name in flags]}


def _isa() -> str | None:
  """Returns the instruction set of the native kernels, which MINW_ISA can force."""
  if not native.available():
    return None
  return native.load(packed.to_bytes(networks.stack(1, Block(1, 1, 1), 1, 1))).isa


def native_memory(file: bytes) -> dict[str, int]:
  """Measures the peak memory of a process that loads a file and runs one image."""
  if not native.available() or not os.path.exists("/proc/self/status"):
    return {}
  code = (
      "import re, sys, numpy as np; from minw.kernels import native\n"
      "status = lambda: open('/proc/self/status').read()\n"
      "peak = lambda: 1024 * int(re.search(r'VmHWM:\\s+(\\d+)', status())[1])\n"
      "before = peak(); network = native.load(open(sys.argv[1], 'rb').read())\n"
      "network.logits(np.zeros((1, *network.shape), np.uint8)); print(before, peak())")
  with tempfile.TemporaryDirectory() as folder:
    path = os.path.join(folder, "net.minw")
    files.write(path, file)
    output = subprocess.run([sys.executable, "-c", code, path], check=True,
                            capture_output=True, text=True).stdout
  before, after = map(int, output.split())
  return {"file": len(file), "process": after, "network": after - before}


def table(result: dict[str, Any]) -> str:
  """Formats the result of `bench_inference` as text."""
  c, m = result["config"], result["machine"]
  what = "one layer" if result["layers"] else title(c)
  versions = (f"{name} {version}" for name, version in m["versions"].items())
  lines = [
      f"Inference: {what}; random weights",
      f"on {m['cores']} x {m['cpu']}{_describe_core(result['core'])}; native kernels:"
      f" {result['isa'] or 'not built'}",
      f"with {', '.join(versions)}",
      f"Medians and quartiles of {result['rounds']} rounds; ratios of times are"
      " medians of each round's."]
  for run in result["runs"]:
    lines += ["", f"{run.get('layer', 'network')}, batch {run['batch']}, "
              f"{run['threads']} thread{'s' * (run['threads'] > 1)}",
              f"{'':22}{'ms':>10}{'quartiles':>22}{'GMAC/s':>9}{'/ native':>10}"
              f"{'/ XLA':>8}"]
    for name, e in run["engines"].items():
      line = f"{times(name, e)}{e['per_second'] / 1e9:9.0f}"
      for base, width in (("native", 10), ("XLA packed", 8)):
        ratio = run["ratios"].get(f"{name} / {base}")
        line += f"{ratio['median']:{width}.2f}" if ratio else " " * width
      lines.append(line.rstrip())
    lines += [f"{name:22} left out: {why}" for name, why in run["left_out"].items()
              if name not in result["left_out"]]
    if "peak_per_second" in run:
      peak = run["peak_per_second"]
      share = run["engines"]["native"]["per_second"] / peak
      lines.append(f"native: {100 * share:.0f} % of the {peak / 1e9:.0f} GMAC/s of"
                   f" {run['peak_kernel']} on registers alone")
    if "openvino_call_seconds" in run:
      lines.append(f"A call of OpenVINO takes {1e6 * run['openvino_call_seconds']:.0f}"
                   " us of its time, whatever the network")
  lines += [f"{name:22} left out: {why}" for name, why in result["left_out"].items()]
  if result["peak_bytes"]:
    sizes = (f"{name} {size / 2**20:.1f} MiB"
             for name, size in result["peak_bytes"].items())
    lines += ["", "Native path, peak memory at batch 1: " + ", ".join(sizes)]
  return "\n".join(lines)


def times(name: str, summary: dict[str, Any]) -> str:
  """Returns the first columns of a row: a name, and median and quartiles in ms."""
  spread = f"{1e3 * summary['low']:.3f} - {1e3 * summary['high']:.3f}"
  return f"{name:22}{1e3 * summary['median']:10.3f}{spread:>22}"


def _describe_core(core: dict[str, Any]) -> str:
  """Returns numbers and extensions of a core, to go after its name."""
  numbers = [f"{name} {value}" for name, value in core.items() if name != "extensions"]
  parts = [*numbers, *core.get("extensions", [])]
  return f" ({', '.join(parts)})" if parts else ""


def title(config: dict[str, Any]) -> str:
  """Returns the name of a network, the widths of a ConvNet, its crop and its bits."""
  name = titles.network(config)
  if config["network"] == "convnet":
    widths = (*config["conv_widths"], *config["dense_widths"])
    name = f"ConvNet {'-'.join(map(str, widths))}"
  return f"{name}, crop {config['crop_size']}, {titles.bits(config)}"
