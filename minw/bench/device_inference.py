"""Benchmark of inference on an accelerator, with the engines in `device_engines`.

All programs are compiled before the first is timed. An engine that cannot be compiled,
fails or computes something else is left out, and the others are timed.
"""

from concurrent import futures
import functools
from typing import Any, Callable, Mapping, Sequence

import jax
import numpy as np

from minw import packed
from minw.bench import device_engines
from minw.bench import engines
from minw.bench import inference
from minw.bench import timing
from minw.bench.device_engines import Engine
from minw.kernels import reference

BATCHES = (1, 8, 64, 512, 4096)  # Default batch sizes.
_PACKAGES = ("jaxlib", "jax-cuda12-plugin", "jax-cuda13-plugin", "libtpu", "numpy")


def bench_inference(
    config: Any, rounds: int, batches: Sequence[int]
) -> dict[str, Any]:
  """Times the engines side by side on JAX's default device, with random weights.

  Args:
    config: Config of a network, see `config.default_config`.
    rounds: Number of measurements of each engine.
    batches: Batch sizes.

  Returns:
    The object that --json writes. `runs` has for each batch size its engines, the
    ratios of their times to the packed network's, and the engines that were left out.
    `left_out` at the top has the engines that were left out of all runs.

  Raises:
    errors.UsageError: The config cannot be run.
  """
  program = inference.checked_network(config)
  images = np.random.default_rng(0).integers(
      0, 256, (max(batches), *program.source_shape), np.uint8)
  checked = sorted({0, *(batch - 1 for batch in batches)})

  @functools.cache
  def expected(exact: bool) -> np.ndarray:
    function = reference.logits if exact else device_engines.float_logits
    return function(program, images[checked])

  started, left_out = _start(program)
  compiled = _compile(started, images, batches)
  runs = []
  for batch in batches:
    programs = {name: compiled[name, batch] for name in started}
    runs.append({"batch": batch, **_measure(
        started, programs, images[:batch], [i for i in checked if i < batch], expected,
        rounds)})
    runs[-1]["left_out"] |= left_out
  return {
      "bench": "inference", "backend": jax.default_backend(),
      "config": config.to_dict(), "rounds": rounds,
      "machine": timing.machine(_PACKAGES), "runs": runs,
      "left_out": inference.left_out_of_all(runs), "peak_bytes": timing.peak_bytes()}


def _start(program: packed.Program) -> tuple[dict[str, Engine], dict[str, str]]:
  """Makes the engines; returns them, and the reasons why others are left out."""
  started, left_out = {}, {}
  for name, make in device_engines.ENGINES.items():
    try:
      started[name] = make(program)
    except Exception as error:
      left_out[name] = _reason(error)
  return started, left_out


def _compile(
    started: Mapping[str, Engine], images: np.ndarray, batches: Sequence[int]
) -> dict[tuple[str, int], Any]:
  """Compiles the engines for all batch sizes, several at once.

  Returns:
    The compiled program, or the error, of each engine and batch size.
  """
  def one(name: str, batch: int) -> Any:
    engine = started[name]
    given = jax.ShapeDtypeStruct((batch, *images.shape[1:]), images.dtype)
    try:
      return jax.jit(engine.logits).lower(engine.operands, given).compile()
    except Exception as error:
      return error

  with futures.ThreadPoolExecutor() as pool:
    jobs = {(name, batch): pool.submit(one, name, batch)
            for batch in batches for name in started}
  return {key: job.result() for key, job in jobs.items()}


def _measure(
    started: Mapping[str, Engine],
    compiled: Mapping[str, Any],
    images: np.ndarray,
    checked: Sequence[int],
    expected: Callable[[bool], np.ndarray],
    rounds: int,
) -> dict[str, Any]:
  """Checks the engines for a batch size, and times those that are right.

  Args:
    started: Engines by name.
    compiled: Program of each engine, or the error of its compilation.
    images: The batch.
    checked: Indices of the images whose logits are checked.
    expected: Returns the logits that these images, and maybe more images, have in the
      packed network if its argument is true, and in the float network otherwise.
    rounds: Number of measurements of each engine.
  """
  given = jax.device_put(images)
  runs, left_out = {}, {}
  for name, engine in started.items():
    try:
      if isinstance(compiled[name], Exception):
        raise compiled[name]
      logits = np.asarray(compiled[name](engine.operands, given))
      _check(logits[checked].astype(np.float32),
             expected(engine.tolerance == 0)[:len(checked)], engine.tolerance)
      runs[name] = _run(compiled[name], engine.operands, given)
    except Exception as error:
      left_out[name] = _reason(error)
  seconds = timing.measure(runs, rounds)
  return {
      "engines": {
          name: {**timing.summary(values),
                 "images_per_second": len(images) / np.median(values),
                 **_memory(compiled[name], started[name].operands)}
          for name, values in seconds.items()},
      "ratios": {
          f"{name} / packed": timing.summary(
              [a / b for a, b in zip(values, seconds["packed"])])
          for name, values in seconds.items()
          if "packed" in seconds and name != "packed"},
      "left_out": left_out}


def _check(logits: np.ndarray, expected: np.ndarray, tolerance: float) -> None:
  """Raises `engines.LeftOut` unless logits are right, see `Engine`."""
  error = np.abs(logits - expected).max()
  if not error <= tolerance * np.abs(expected).max():  # Also true of NaN.
    raise engines.LeftOut(f"its logits are wrong by up to {error:.3g}")


def _run(compiled: Any, operands: Any, images: jax.Array) -> timing.Run:
  """Returns a run of a program on a batch. Its calls do not wait for each other."""
  def run(count: int) -> None:
    for _ in range(count):
      last = compiled(operands, images)
    jax.block_until_ready(last)
  return run


def _memory(compiled: Any, operands: Any) -> dict[str, int | None]:
  """Returns the bytes of an engine's operands and of its temporary arrays.

  The latter are None if the compiler does not tell.
  """
  analysis = compiled.memory_analysis()
  return {
      "operand_bytes": sum(leaf.nbytes for leaf in jax.tree.leaves(operands)),
      "temporary_bytes": analysis.temp_size_in_bytes if analysis else None}


def _reason(error: Exception) -> str:
  """Returns in one line why an engine is left out."""
  if isinstance(error, engines.LeftOut):
    return str(error)
  return " ".join(f"{type(error).__name__}: {error}".split())[:200]


def table(result: dict[str, Any]) -> str:
  """Formats the result of `bench_inference` as text."""
  m = result["machine"]
  versions = (f"{name} {version}" for name, version in m["versions"].items())
  lines = [
      f"Inference: {inference.title(result['config'])}; random weights",
      f"on one of {m['num_devices']} x {m['device']} ({result['backend']}); CPU:"
      f" {m['cores']} x {m['cpu']}",
      f"with {', '.join(versions)}",
      f"Medians and quartiles of {result['rounds']} rounds; ratios of times are"
      " medians of each round's."]
  for run in result["runs"]:
    batch = f"batch {run['batch']}"
    lines += ["", f"{batch:22}{'ms':>10}{'quartiles':>22}"
              f"{'images/s':>12}{'/ packed':>10}{'weights':>11}{'temporary':>13}"]
    for name, e in run["engines"].items():
      ratio = run["ratios"].get(f"{name} / packed")
      lines.append(
          f"{inference.times(name, e)}{e['images_per_second']:12.0f}"
          + (f"{ratio['median']:10.2f}" if ratio else " " * 10)
          + f"{_mib(e['operand_bytes'], 2):>11}{_mib(e['temporary_bytes'], 1):>13}")
    lines += [f"{name:22} left out: {why}" for name, why in run["left_out"].items()
              if name not in result["left_out"]]
  lines += [f"{name:22} left out: {why}" for name, why in result["left_out"].items()]
  lines += ["", "Peak memory with all engines: " + ", ".join(
      f"{name} {_mib(size, 0)}" for name, size in result["peak_bytes"].items())]
  return "\n".join(lines)


def _mib(size: int | None, digits: int) -> str:
  return "" if size is None else f"{size / 2**20:.{digits}f} MiB"
