"""Benchmark of training steps: AQE, STE, the float32 network, and PyTorch."""

import functools
from typing import Any, Callable

import jax
import jax.numpy as jnp
import numpy as np

from minw import config as config_lib
from minw import titles
from minw import traces
from minw import train_step
from minw.bench import timing
from minw.data.batches import Examples
from minw.experiment import Experiment

# Ratios of times that are reported, and the goal that a ratio should not exceed.
_RATIOS = {
    ("aqe", "float32"): 1.10,
    ("ste", "float32"): None,
    ("aqe with data", "aqe"): 1.05,
    ("float32", "torch eager"): None,
    ("float32", "torch compiled"): None,
    ("aqe", "torch eager"): None,
    ("aqe", "torch compiled"): None,
}

_TRACED = 3  # Number of steps of each network that are traced.


def bench_train(
    config: Any, rounds: int, trace: str | None = None
) -> dict[str, Any]:
  """Times training steps side by side, on random images and labels.

  Args:
    config: Config of the network, see `config.default_config`. Its estimator is
      ignored.
    rounds: Number of measurements of each step.
    trace: Folder for a trace of some steps, which are not timed; None for no trace.

  Returns:
    The object that --json writes. `steps` and `ratios` have by name a summary of one
    number for each round. `left_out` has the reasons why steps were not measured. The
    config and the machine are described, too.

  Raises:
    errors.UsageError: The config cannot be run.
  """
  aqe, ste, floats = (Experiment(config_lib.copy(config, **changes)) for changes in (
      dict(estimator="aqe"), dict(estimator="ste"),
      dict(input_bits="float32", weight_bits="float32", bits_rules=(),
           input_thresholds=(), weight_thresholds=())))
  data, order = random_batch(aqe)
  key = jax.random.key(config.seed)
  batch = aqe.jit(aqe.data.train_inputs)(data, order, 0, key)

  init = aqe.jit(lambda: train_step.init_state(aqe))  # All three start with it.
  state = jax.device_put(init(), aqe.replicated)
  runs = {}
  for name, experiment in (("float32", floats), ("ste", ste), ("aqe", aqe)):
    step = experiment.jit(
        functools.partial(train_step.update, experiment), donate_argnums=0)
    runs[name] = run_of(step, state, *batch, key)
  runs["aqe with data"] = run_of(train_step.make_train_step(aqe), state, data, order)
  theirs, left_out = torch_runs(floats, *map(np.asarray, batch))
  seconds = timing.measure(runs | theirs, rounds)
  if trace:
    _trace(runs | theirs, trace)

  ratios = {
      f"{a} / {b}": {
          **timing.summary([x / y for x, y in zip(seconds[a], seconds[b])]),
          "at_most": limit}
      for (a, b), limit in _RATIOS.items() if a in seconds and b in seconds}
  return {
      "bench": "train",
      "data": "random images and labels of the data set's shape",
      "rounds": rounds,
      "config": config.to_dict(),
      "machine": timing.machine(),
      "steps": {
          name: {**timing.summary(values),
                 "examples_per_second": config.batch_size / np.median(values)}
          for name, values in seconds.items()},
      "ratios": ratios,
      "left_out": left_out,
      "peak_bytes": timing.peak_bytes(),
  }


def _trace(runs: dict[str, timing.Run], folder: str) -> None:
  """Writes a trace to a folder, in which steps have the names of `runs`."""
  with traces.trace(folder):
    for name, run in runs.items():
      for step in range(_TRACED):
        with jax.profiler.StepTraceAnnotation(name, step_num=step):
          run(1)


def random_batch(experiment: Experiment) -> tuple[Examples, Any]:
  """Returns random images and labels, and an order, as a training step takes them."""
  examples, order = experiment.data.abstract_batch()
  generator = np.random.default_rng(experiment.config.seed)
  size = examples.labels.shape[0]
  arrays = (
      Examples(generator.integers(0, 256, examples.images.shape, np.uint8),
               generator.integers(0, experiment.info.num_classes, size, np.int32)),
      None if order is None else generator.permutation(size).astype(np.int32))
  return jax.tree.map(
      lambda array, abstract: jax.device_put(array, abstract.sharding),
      arrays, (examples, order))


def run_of(step: Callable, state: train_step.TrainState, *arguments: Any) -> timing.Run:
  """Returns a function that runs a compiled step, starting from a copy of `state`.

  Args:
    step: Compiled step (state, *arguments) -> (state, loss).
    state: First state.
    *arguments: Further arguments of the step.
  """
  state = jax.tree.map(jnp.copy, state)  # The step donates its state.

  def run(count):
    nonlocal state
    for _ in range(count):
      state, _ = step(state, *arguments)
    jax.block_until_ready(state)

  return run


def torch_network(experiment: Experiment) -> Any:
  """Makes the float network in PyTorch, for images (batch, channels, height, width).

  Args:
    experiment: Experiment with a network whose layers follow one another.

  Returns:
    A torch.nn.Module that returns the logits.
  """
  from torch import nn

  c = experiment.config
  parts = []
  size = experiment.image_shape[:2]
  for layer in experiment.layers:
    if layer.kind == "conv":
      *window, inputs, outputs = layer.kernel_shape
      padding = "same" if layer.output_shape[:2] == size else "valid"
      if c.pad_value and len(parts):  # Only the first layer is padded with zeros.
        parts.append(nn.ConstantPad2d(1, c.pad_value))
        padding = "valid"
      parts.append(nn.Conv2d(inputs, outputs, window, padding=padding, bias=False))
    elif layer.kind == "dense":
      parts.append(nn.Flatten())
      parts.append(nn.Linear(*layer.kernel_shape, bias=False))
    else:
      spatial = len(layer.input_shape) == 3
      if spatial and layer.input_shape[:2] != size:
        parts.append(nn.MaxPool2d(2))
      kind = nn.BatchNorm2d if spatial else nn.BatchNorm1d
      parts.append(kind(layer.input_shape[-1], eps=c.norm_epsilon,
                        momentum=1 - c.norm_momentum))
      parts[-1].weight.requires_grad_(c.norm_scale)
      if layer.bits is not None:
        parts.append(nn.Hardtanh())
    size = layer.output_shape[:2]
  return nn.Sequential(*parts)


def torch_runs(
    experiment: Experiment, images: np.ndarray, labels: np.ndarray
) -> tuple[dict[str, timing.Run], dict[str, str]]:
  """Makes PyTorch's training steps on a fixed batch.

  Args:
    experiment: Experiment of the float network.
    images: Images, float32 (batch, height, width, channels).
    labels: Labels, int32 (batch,).

  Returns:
    The steps by name, and the reasons why other steps are left out.
  """
  names = {"torch eager": False, "torch compiled": True}
  try:
    import torch
  except ImportError:
    return {}, dict.fromkeys(names, "PyTorch is not installed")
  device = {"cpu": "cpu", "gpu": "cuda"}.get(jax.default_backend())
  if len(jax.local_devices()) > 1 or device is None or (
      device == "cuda" and not torch.cuda.is_available()):
    return {}, dict.fromkeys(names, "PyTorch would not run on the same device")

  c = experiment.config
  torch.backends.cuda.matmul.allow_tf32 = True  # JAX uses TF32, too.
  torch.backends.cudnn.benchmark = True  # Use the fastest algorithms.
  images = torch.tensor(images, device=device).permute(0, 3, 1, 2)  # channels_last
  labels = torch.tensor(labels, device=device, dtype=torch.int64)

  def run_of(compiled):
    network = torch_network(experiment).to(device, memory_format=torch.channels_last)
    if c.optimizer == "adam":
      optimizer = torch.optim.Adam(
          network.parameters(), c.learning_rate, eps=c.adam_epsilon, fused=True)
    else:
      optimizer = torch.optim.SGD(
          network.parameters(), c.learning_rate, c.momentum, fused=True)

    def loss_of(images, labels):
      with torch.autocast(device, torch.bfloat16, c.compute_dtype == "bfloat16"):
        return torch.nn.functional.cross_entropy(network(images), labels)

    if compiled:
      loss_of = torch.compile(loss_of)

    def run(count):
      for _ in range(count):
        optimizer.zero_grad()
        loss_of(images, labels).backward()
        optimizer.step()
      if device == "cuda":
        torch.cuda.synchronize()

    run(1)
    return run

  runs, left_out = {}, {}
  for name, compiled in names.items():
    try:
      runs[name] = run_of(compiled)
    except Exception as error:  # Compilers raise errors of many types.
      why = f"{type(error).__name__}: {error}"
      left_out[name] = " ".join(why.split())[:200]
  return runs, left_out


def table(result: dict[str, Any]) -> str:
  """Formats the result of `bench_train` as text."""
  c, m = result["config"], result["machine"]
  widths = " + ".join("-".join(map(str, c[name]))
                      for name in ("conv_widths", "dense_widths") if c[name])
  lines = [
      f"Training step: ConvNet {widths}, {c['dataset']}, crop "
      f"{c['crop_size']}, batch {c['batch_size']}, {titles.bits(c)}, "
      f"{c['compute_dtype']}",
      f"on {m['num_devices']} x {m['device']}; CPU: {m['cores']} x {m['cpu']}; "
      + ", ".join(f"{name} {version}" for name, version in m["versions"].items()),
      f"Data: {result['data']}. Medians and quartiles of "
      f"{result['rounds']} rounds.",
      "",
      f"{'step':24}{'ms':>9}{'quartiles':>20}{'examples/s':>12}"]
  for name, s in result["steps"].items():
    spread = f"{1e3 * s['low']:.1f} - {1e3 * s['high']:.1f}"
    lines.append(f"{name:24}{1e3 * s['median']:9.1f}{spread:>20}"
                 f"{s['examples_per_second']:12.0f}")
  lines += [f"{name:24} left out: {why}" for name, why in result["left_out"].items()]
  lines += ["", f"{'ratio of times':24}{'':9}{'quartiles':>20}{'goal':>12}"]
  for name, r in result["ratios"].items():
    spread = f"{r['low']:.3f} - {r['high']:.3f}"
    goal = f"<= {r['at_most']:.2f}" if r["at_most"] else ""
    lines.append(f"{name:24}{r['median']:9.3f}{spread:>20}{goal:>12}".rstrip())
  lines += ["", "Peak memory of the process with all steps: " + ", ".join(
      f"{name} {size / 2**20:.0f} MiB" for name, size in result["peak_bytes"].items())]
  return "\n".join(lines)
