"""Benchmark of WebAssembly: the packed network beside ONNX Runtime's float32 and int8.

A program in Node times the engines there and in Chromium; see web_driver.mjs.
"""

import contextlib
import json
import os
import pathlib
import shutil
import subprocess
import tempfile
from typing import Any, Iterator, NamedTuple, Sequence

import numpy as np

from minw import errors
from minw import files
from minw import packed
from minw.bench import inference
from minw.bench import networks
from minw.bench import onnx_networks
from minw.bench import timing
from minw.kernels import reference

WHERE = ("node", "chromium")
_NAMES = {"minw simd128": "simd128", "minw relaxed": "relaxed-simd",
          "ONNX float32": "float32", "ONNX int8": "int8"}
_BASE = "minw simd128"  # Ratios of times refer to it, because all browsers run it.
_FIRST_RESULTS = 15  # Number of measurements of the time to the first result.
_CHROMIUM = ("chromium", "chromium-browser", "google-chrome")
_FILES = ("web_engines.mjs", "../web/minw.js", "../web/minw.wasm")


class Timing(NamedTuple):
  """What was measured in one place, in seconds by engine.

  Attributes:
    versions: Versions of Node or Chromium, and of ONNX Runtime.
    seconds: CPU time of an image, one number for each round.
    first: Elapsed time to the first result in a new page or process.
    left_out: Engines that could not be timed, with the reason.
  """

  versions: dict[str, str]
  seconds: dict[str, list[float]]
  first: dict[str, list[float]]
  left_out: dict[str, str]


class Driver:
  """The program in Node that runs the engines."""

  def __init__(self, process: subprocess.Popen):
    self._process = process

  def __call__(self, *command: Any) -> Any:
    """Runs a command of web_driver.mjs.

    Raises:
      errors.UsageError: The command failed.
    """
    stdin, stdout = self._process.stdin, self._process.stdout
    assert stdin and stdout
    with contextlib.suppress(BrokenPipeError):
      stdin.write(json.dumps(command) + "\n")
      stdin.flush()
    line = stdout.readline()
    answer = json.loads(line) if line else {"error": "the driver ended"}
    if "error" in answer:
      raise errors.UsageError(answer["error"])
    return answer["result"]


def bench_web(
    config: Any, rounds: int, where: Sequence[str], modules: str
) -> dict[str, Any]:
  """Times engines in WebAssembly side by side: one image, one thread, random weights.

  Args:
    config: Config of a network, see `config.default_config`.
    rounds: Number of measurements of each engine.
    where: Members of `WHERE`.
    modules: Folder node_modules with onnxruntime-web, and with playwright-core if
      `where` has "chromium".

  Returns:
    The object that --json writes.

  Raises:
    errors.UsageError: The config cannot be run, or a program or package is missing.
  """
  executables = check_installed(where, modules)
  program = inference.checked_network(config)
  with tempfile.TemporaryDirectory() as folder:
    shape = write_files(program, pathlib.Path(folder))
    runs = {place: _measure(folder, modules, executable, shape, rounds)
            for place, executable in executables.items()}
  work = networks.multiplications(program)
  return {
      "bench": "web", "config": config.to_dict(), "rounds": rounds,
      "machine": timing.machine(), "runs": [
          {"where": place, "versions": run.versions, "left_out": run.left_out,
           **_summary(run.seconds, work), "first_result": _summary(run.first)}
          for place, run in runs.items()]}


def check_installed(where: Sequence[str], modules: str) -> dict[str, str]:
  """Returns the executable of Chromium by place; it is "" for Node.

  Raises:
    errors.UsageError: A program or a package is missing.
  """
  errors.check(set(where) <= {*WHERE} and len(where) > 0, "where", ",".join(where),
               f"one or more of {', '.join(WHERE)}")
  if shutil.which("node") is None:
    raise errors.UsageError("node is not installed; the benchmark needs Node 20")
  browser = next(filter(None, map(shutil.which, _CHROMIUM)), None)
  packages = ["onnxruntime-web"]
  if "chromium" in where:
    packages.append("playwright-core")
    if browser is None:
      raise errors.UsageError("chromium is not installed; --where=node does without")
  for package in packages:
    errors.check(os.path.isdir(os.path.join(modules, package)), "modules", modules,
                 f"a folder node_modules with {package} (`npm install {package}`)")
  return {place: browser or "" if place == "chromium" else "" for place in where}


def write_files(program: packed.Program, folder: pathlib.Path) -> list[int]:
  """Writes the networks, their image and the expected logits for web_engines.mjs.

  Returns:
    The shape of the image for ONNX Runtime, (1, channels, height, width).
  """
  generator = np.random.default_rng(0)
  layers = networks.float_layers(program)
  shape = (*program.crop, program.source_shape[2])
  image = generator.integers(0, 256, (1, *program.source_shape), np.uint8)
  x = generator.uniform(-1, 1, (1, shape[2], *shape[:2])).astype(np.float32)
  steps = np.round(x / onnx_networks.INT8_SCALE + onnx_networks.INT8_ZERO)
  for name in _FILES:
    path = pathlib.Path(__file__).parent / name
    files.write(folder / path.name, path.read_bytes())
  for name, content in {
      "network.minw": packed.to_bytes(program),
      "image.bin": image.tobytes(),
      "logits.bin": reference.logits(program, image).astype(np.float32).tobytes(),
      "float32.onnx": onnx_networks.float_network(layers, shape),
      "int8.onnx": onnx_networks.int8_network(layers, shape),
      "float32.bin": x.tobytes(),
      "uint8.bin": steps.astype(np.uint8).tobytes()}.items():
    files.write(folder / name, content)
  return list(x.shape)


@contextlib.contextmanager
def driver(folder: str, modules: str, executable: str) -> Iterator[Driver]:
  """Context with a running `Driver`.

  Args:
    folder: Folder of the files of `write_files`.
    modules: Folder node_modules.
    executable: Executable of Chromium, or "" for Node.
  """
  script = os.path.join(os.path.dirname(__file__), "web_driver.mjs")
  with subprocess.Popen(
      ["node", script, folder, os.path.abspath(modules), executable], text=True,
      stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
    yield Driver(process)
    assert process.stdin
    process.stdin.close()  # The driver ends with its input.


def _measure(
    folder: str, modules: str, executable: str, shape: Sequence[int], rounds: int
) -> Timing:
  """Measures all engines in one place."""
  with driver(folder, modules, executable) as ask:
    counts, left_out = {}, {}
    for name, engine in _NAMES.items():
      try:
        ask("start", engine, shape)
        counts[name] = ask("count", engine)
      except errors.UsageError as error:
        left_out[name] = str(error)
    first = {name: [] for name in counts}
    for _ in range(_FIRST_RESULTS):
      for name, values in first.items():
        values.append(ask("cold", _NAMES[name], shape) / 1e3)
    seconds = {name: [] for name in counts}
    for i in range(rounds):
      for name in list(counts)[::(-1) ** i]:  # Every second round is reversed.
        count = counts[name]
        seconds[name].append(ask("run", _NAMES[name], count) / count)
    return Timing(ask("about"), seconds, first, left_out)


def _summary(seconds: dict[str, list[float]], work: int = 0) -> dict[str, Any]:
  """Summarizes the times of engines, and their ratios to those of `_BASE`."""
  engines = {name: {**timing.summary(values), "per_second": work / np.median(values)}
             for name, values in seconds.items()}
  return {"engines": engines, "ratios": {
      name: timing.summary([a / b for a, b in zip(values, seconds[_BASE])])
      for name, values in seconds.items() if _BASE in seconds and name != _BASE}}


def table(result: dict[str, Any]) -> str:
  """Formats the result of `bench_web` as text."""
  machine = result["machine"]
  lines = [
      f"WebAssembly: {inference.title(result['config'])}; random weights",
      f"on {machine['cpu']}, one image, one thread; CPU time",
      f"Medians and quartiles of {result['rounds']} rounds; ratios to {_BASE} are"
      " medians of each round's."]
  for run in result["runs"]:
    versions = (f"{name} {version}" for name, version in run["versions"].items())
    lines += ["", ", ".join(versions),
              f"{'':14}{'ms':>10}{'quartiles':>22}{'GMAC/s':>9}{'ratio':>9}"
              f"{'first result':>14}{'ratio':>9}"]
    for name, e in run["engines"].items():
      spread = f"{1e3 * e['low']:.3f} - {1e3 * e['high']:.3f}"
      first = run["first_result"]["engines"][name]["median"]
      lines.append((
          f"{name:14}{1e3 * e['median']:10.3f}{spread:>22}{e['per_second'] / 1e9:9.1f}"
          f"{_ratio(run, name)}{1e3 * first:11.0f} ms"
          f"{_ratio(run['first_result'], name)}").rstrip())
    lines += [f"{name:14} left out: {why}" for name, why in run["left_out"].items()]
  return "\n".join(lines)


def _ratio(summary: dict[str, Any], name: str) -> str:
  ratio = summary["ratios"].get(name)
  return f"{ratio['median']:9.1f}" if ratio else " " * 9
