"""Everything derived from a config: its network, data, schedules and devices.

Training, evaluation and packing all start from an `Experiment`.
"""

import functools
import os
from typing import Any, Callable, NamedTuple, Sequence
import zlib

import jax
import jax.numpy as jnp
from jax.sharding import AxisType
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec
import numpy as np
import optax

from minw import config as config_lib
from minw import distributed
from minw import errors
from minw import estimators
from minw import fold
from minw import layers
from minw import models
from minw import optim
from minw import quantizers
from minw import schedules
from minw.data import augment
from minw.data import batches
from minw.data import datasets
from minw.data import pixels as pixels_lib
from minw.data import sources


def build_model(config: Any, **changes: Any) -> Any:
  """Makes the network of a config.

  Args:
    config: The config; see `config.default_config`.
    **changes: Values of config fields that are changed first.

  Returns:
    The network, a Flax module.
  """
  c = config_lib.copy(config, **changes)
  named = functools.partial(estimators.by_name, gradient=c.estimator_gradient)
  weights: dict[str, Any] = dict(
      bits=layers.bits_by_rule(c.weight_bits, c.bits_rules),
      threshold_rule=c.weight_threshold_rule,
      thresholds=c.weight_thresholds,
      estimator=named(c.estimator),
      step_per_channel=c.step_per_channel,
      weight_scale=c.weight_scale,
      frequency=c.weight_frequency,
      kernel_init=_initializer(c.kernel_init),
      dtype=jnp.dtype(c.compute_dtype),
      sum_dtype=jnp.dtype(c.sum_dtype))
  make: dict[str, Any] = dict(
      num_classes=datasets.info(c.dataset, config_lib.data_dir(c)).num_classes,
      conv=functools.partial(layers.QuantConv, pad_value=c.pad_value, **weights),
      dense=functools.partial(layers.QuantDense, **weights),
      norm=functools.partial(
          _make_norm,
          bits=layers.bits_by_rule(c.input_bits, c.bits_rules),
          thresholds=c.input_thresholds,
          learn_thresholds=c.learn_input_thresholds,
          estimator=named(c.input_estimator or c.estimator),
          momentum=c.norm_momentum,
          epsilon=c.norm_epsilon,
          group_size=c.norm_group_size,
          use_scale=c.norm_scale,
          rprelu=c.rprelu))
  if c.network != "convnet":
    return models.NETWORKS[c.network](**make)
  return models.ConvNet(
      conv_widths=c.conv_widths,
      dense_widths=c.dense_widths,
      first_padding=c.first_padding,
      pool_layers=c.pool_layers,
      global_pool=c.global_pool,
      pool=functools.partial(
          layers.max_pool, share_gradient=c.share_pool_gradient),
      **make)


@functools.cache  # Layers are equal, for caches of JAX, if their initializers are one.
def _initializer(name: str) -> Callable:
  return getattr(jax.nn.initializers, name)()


def _make_norm(*, bits: Any, rprelu: bool, **options: Any) -> layers.NormQuant:
  """Makes a batch norm, with RPReLU only if it is not that of the logits."""
  return layers.NormQuant(bits=bits, rprelu=rprelu and bits is not None, **options)


def _check_memory(
    c: Any, image_shape: tuple[int, int, int], devices: Sequence[Any]
) -> None:
  """Checks that training a ConvNet can fit into memory, before allocating any.

  The estimate is a lower bound. It counts the parameters, their gradients, one moment
  of the optimizer, and the largest output of a convolution for the examples of a
  device.

  Raises:
    errors.UsageError: The network does not fit.
  """
  side, _, channels = image_shape
  side -= 2 * (c.first_padding == "VALID")
  pooled = models.pooled_convs(len(c.conv_widths), c.pool_layers)
  sizes, outputs = {"conv_widths": 0, "dense_widths": 0}, [0]
  for i, width in enumerate(c.conv_widths):
    sizes["conv_widths"] += 9 * channels * width
    outputs.append((side >> sum(number <= i for number in pooled))**2 * width)
    channels = width
  features = channels * (1 if c.global_pool else (side >> len(pooled))**2)
  for width in c.dense_widths:
    sizes["dense_widths"] += features * width
    features = width
  examples = c.batch_size // len(devices)
  needed = 4 * (3 * sum(sizes.values()) + examples * max(outputs))
  available = (jax.local_devices()[0].memory_stats() or {}).get(
      "bytes_limit", os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
  widest = "dense_widths" if sizes["dense_widths"] > sum(outputs) + sizes[
      "conv_widths"] else "conv_widths"
  errors.check(needed <= available, f"config.{widest}", c[widest],
               f"narrower: training takes at least {needed / 1e9:.1f} GB, and"
               f" {available / 1e9:.1f} GB are available")


def balanced_weights(counts: np.ndarray) -> tuple[float, ...]:
  """Returns weights of classes that are inversely proportional to their counts.

  Args:
    counts: Number of images of each class, integers (classes,).

  Returns:
    A weight for each class. Their mean over the images is 1. A class without images has
    the weight 0.
  """
  present = counts > 0
  scale = counts.sum() / present.sum()
  return tuple(np.where(present, scale / np.maximum(counts, 1), 0.0).tolist())


class Teacher(NamedTuple):
  """The hard network of another run, from whose predictions a network learns.

  Attributes:
    model: The network, a Flax module.
    variables: Variables of the hard network, replicated on all devices.
    record: Facts that a run records: `workdir`, `step`, and checksums of its `config`
      and its `variables`.
  """

  model: Any
  variables: Any
  record: dict[str, Any]


class Experiment:
  """Everything derived from a config: network, data, schedules, optimizer, devices.

  Construction validates the config and allocates no arrays.

  Attributes:
    config: The config; see `config.default_config`.
    info: Description of the part of the data set that is used. `image_shape` is the
      shape of a packed network's images.
    data_facts: The facts of the data set that checkpoints record; see `datasets.facts`.
    image_shape: Shape of the network's input.
    pixels: Normalization of the network's input.
    model: The network, a Flax module.
    layers: The network's layers, from `layers.trace`.
    steps_per_epoch: Training steps in an epoch.
    num_steps: Training steps in the whole run.
    alpha: Function from the step to the estimator's alpha.
    learning_rate: Function from the step to the learning rate.
    optimizer: The optimizer, from optax.
    replicated: Sharding of arrays that the devices of all processes hold as a whole.
    sharded: Sharding of a batch over these devices, along its examples.
    data: The splits of the data set and their batches; see `batches.Source`.
  """

  def __init__(self, config: Any):
    """Validates the config and derives everything from it.

    Args:
      config: The config.

    Raises:
      errors.UsageError: The config cannot be run.
    """
    c = self.config = config
    config_lib.validate(c)
    self.info = datasets.info(c.dataset, config_lib.data_dir(c), c.in_memory)
    self.data_facts = datasets.facts(self.info)
    self.info = self.info.resized(c.eval_resize or c.crop_size)
    examples = c.train_examples or self.info.splits["train"]
    self.info = self.info._replace(splits=self.info.splits | {"train": examples})
    for name in ("batch_size", "eval_batch_size"):
      errors.check(c[name] <= examples, f"config.{name}", c[name],
                   f"at most {examples}, the training examples of {c.dataset}")
    self.steps_per_epoch = examples // c.batch_size
    self.num_steps = self.steps_per_epoch * c.num_epochs
    errors.check(self.num_steps < 2**31, "config.num_epochs", c.num_epochs,
                 f"at most {(2**31 - 1) // self.steps_per_epoch}: steps are int32")
    devices = jax.devices()
    for name in ("batch_size", "eval_batch_size"):
      errors.check(c[name] % len(devices) == 0, f"config.{name}", c[name],
                   f"a multiple of {len(devices)}, the number of devices")

    self.image_shape = (c.crop_size, c.crop_size, self.info.image_shape[-1])
    if c.network == "convnet":
      _check_memory(c, self.image_shape, devices)
    self.pixels = pixels_lib.pixels(c.pixels, self.info.mean, self.info.std)
    self.model = build_model(c)
    self.layers = layers.trace(self.model, self.image_shape)
    self._traced = None  # What `fold` traces at first.
    self._check_patterns()

    self.alpha = schedules.alpha(
        c.alpha_shape, c.alpha_start, c.alpha_final, c.alpha_end, self.num_steps,
        depth=self.model.depth
        if c.alpha_per_layer or c.alpha_weights != "with" else None,
        backward=c.alpha_backward, at_once=not c.alpha_per_layer,
        weights=c.alpha_weights)
    self.learning_rate = schedules.learning_rate(
        c.learning_rate_schedule, c.learning_rate, self.num_steps,
        decay=c.learning_rate_decay, stairs=c.learning_rate_stairs,
        steps=c.learning_rate_steps, warmup=c.learning_rate_warmup)
    self.optimizer: optax.GradientTransformation = optim.optimizer(
        c.optimizer, self.learning_rate, adam_epsilon=c.adam_epsilon,
        momentum=c.momentum, weight_decay=c.weight_decay,
        decoupled_weight_decay=c.decoupled_weight_decay,
        latent_weight_decay_factor=c.latent_weight_decay_factor,
        norm_weight_decay_factor=c.norm_weight_decay_factor,
        gradient_clip_norm=c.gradient_clip_norm,
        ovsw_scaling=c.ovsw_scaling, ovsw_decay=c.ovsw_decay,
        bop_adaptivity_rate=c.bop_adaptivity_rate, bop_threshold=c.bop_threshold,
        on_grid=self.grid_layers.__contains__,
        one_bit=self.one_bit_layers.__contains__)
    errors.check(c.optimizer != "bop" or bool(self.one_bit_layers), "config.optimizer",
                 c.optimizer, "another optimizer: it flips weights of 1 bit, and no"
                 " layer has any")
    for name in ("ovsw_scaling", "ovsw_decay"):
      errors.check(c[name] == 0 or bool(self.one_bit_layers), f"config.{name}",
                   c[name], "0.0: OvSW acts on weights of 1 bit, and no layer has any")

    # The axis is automatic, because Flax's convolutions do not support explicit
    # sharding.
    mesh = jax.make_mesh((len(devices),), ("data",), axis_types=(AxisType.Auto,))
    self.replicated = NamedSharding(mesh, PartitionSpec())
    self.sharded = NamedSharding(mesh, PartitionSpec("data"))
    self.data = sources.open_source(
        self.info, config_lib.data_dir(c),
        batches.Batching(
            seed=c.seed, batch_size=c.batch_size, eval_batch_size=c.eval_batch_size,
            crop_size=c.crop_size, crop_padding=c.crop_padding, crop_scale=c.crop_scale,
            flip=c.random_flip, augmentation=augment.Augmentation(
                **{name: c[name] for name in augment.Augmentation._fields}),
            pixels=self.pixels, replicated=self.replicated, sharded=self.sharded),
        workers=c.data_workers, max_damaged=c.max_damaged, shrink=c.eval_resize > 0)

  def _check_patterns(self) -> None:
    """Raises `errors.UsageError` if a pattern of the config matches no layer."""
    quantized = [layer.path for layer in self.layers if layer.bits is not None]
    for pattern, _ in self.config.bits_rules:
      errors.check(any(layers.matches(pattern, path) for path in quantized),
                   "config.bits_rules", pattern,
                   "a pattern that matches one of " + ", ".join(quantized))
    on_grid = [layer.path for layer in self.layers
               if layer.bits is not None and quantizers.is_grid(layer.bits)]
    for pattern in self.config.histogram_layers:
      errors.check(any(layers.matches(pattern, path) for path in on_grid),
                   "config.histogram_layers", pattern, "a pattern that matches one of "
                   + (", ".join(on_grid) or "no layer: none has a grid"))

  @property
  def grid_layers(self) -> dict[str, layers.LayerInfo]:
    """The layers whose weights are on a grid, by path."""
    return {layer.path: layer for layer in self.layers
            if layer.bits is not None and layer.kernel_shape
            and quantizers.is_grid(layer.bits)}

  @property
  def one_bit_layers(self) -> set[str]:
    """The paths of the layers whose weights have one bit."""
    return {path for path, layer in self.grid_layers.items() if layer.bits == 1}

  def keys(self, step: jax.Array | int) -> jax.Array:
    """The random keys of a training step: of its batch, and of the estimator."""
    return jax.random.split(
        jax.random.fold_in(jax.random.key(self.config.seed), step))

  @functools.cached_property
  def class_weights(self) -> tuple[float, ...] | None:
    """The weight of each class in the loss of training; None if none has any.

    The weight is inversely proportional to the number of training images of the class,
    and its mean over these images is 1. It is 0 for a class without training images.
    Counting them takes one pass over the files of the training images.
    """
    if self.config.class_weights == "none":
      return None
    return balanced_weights(
        datasets.class_counts(self.info, config_lib.data_dir(self.config)))

  @functools.cached_property
  def teacher(self) -> Teacher | None:
    """The network that the config names as the teacher; None if it names none.

    Raises:
      errors.UsageError: There is no such run, or it sees other images or classes than
        this one.
    """
    c = self.config
    if not c.teacher:
      return None
    from minw.workdir import checkpoint  # Imports Orbax, which takes a while.

    run = checkpoint.read_named("teacher", c.teacher, c.data_dir)
    theirs = config_lib.copy(
        run.config, data_dir=c.data_dir, cache_dir=c.cache_dir)
    for name in ("dataset", "crop_size", "pixels"):
      errors.check(theirs[name] == c[name], "config.teacher", c.teacher,
                   f"a run with {name}={c[name]!r}, as this one: it has"
                   f" {theirs[name]!r}")
    model = build_model(theirs)
    hard = self._folded(model, checkpoint.hard_variables(run.saved.tree))
    crc32 = functools.reduce(
        lambda value, leaf: zlib.crc32(np.asarray(leaf).tobytes(), value),
        map(distributed.whole, jax.tree.leaves(hard)), 0)
    return Teacher(model, hard, {
        "workdir": c.teacher, "step": run.saved.step, "variables": crc32,
        "config": zlib.crc32(config_lib.to_json(run.config).encode())})

  def jit(self, function: Callable, **options: Any) -> Callable:
    """Calls `jax.jit` with the compiler options that the config requires."""
    if self.config.deterministic and jax.default_backend() == "gpu":
      # Autotuning then takes the first algorithm that repeats to the bit. Without
      # autotuning, convolutions would have no algorithm and run on the library's
      # default, whose gradients need not repeat.
      options["compiler_options"] = {"xla_gpu_deterministic_ops": True}
    return jax.jit(function, **options)

  def optimizer_sharding(self, shape: tuple[int, ...]) -> NamedSharding:
    """The sharding of an array of the optimizer's state.

    With `shard_optimizer`, the state of a kernel is split into equal parts along its
    longest axis that the number of devices divides. State of batch norm is replicated,
    because it is too small to be worth gathering.

    Args:
      shape: Shape of the array.
    """
    devices = self.replicated.mesh.size
    axes = [axis for axis, size in enumerate(shape) if size % devices == 0]
    if not (self.config.shard_optimizer and len(shape) > 1 and axes):
      return self.replicated
    longest = max(axes, key=lambda axis: shape[axis])
    return NamedSharding(
        self.replicated.mesh, PartitionSpec(*[None] * longest, "data"))

  def fold(self, variables: Any) -> Any:
    """Makes the variables of the hard network, replicated on all devices.

    Args:
      variables: Trained variables, {"params", "batch_stats"}; see `fold.fold`.
    """
    if self._traced is None:
      self._traced = fold.trace(self.model, variables, self._probe)
    return self._folded(self.model, variables, self._traced)

  @functools.cached_property
  def _probe(self):
    return pixels_lib.probe(self.pixels, self.image_shape)

  def _folded(self, model, variables, traced=None):
    hard = fold.fold(model, variables, self._probe, traced)
    distributed.check_same(hard, "the hard network")
    return distributed.put(hard, self.replicated)
