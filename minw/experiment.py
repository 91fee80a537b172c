"""What a config comes to: its network, data, schedules and devices.

Training, evaluation and packing all start from here.
"""

import functools
from typing import Any, Callable

import jax
from jax.sharding import AxisType, NamedSharding, PartitionSpec
import jax.numpy as jnp
import optax

from minw import cli
from minw import config as config_lib
from minw import datasets
from minw import estimators
from minw import fold
from minw import layers
from minw import models
from minw import optim
from minw import pipeline
from minw import quantizers
from minw import schedules


def build_model(config: Any, **changes: Any) -> Any:
  """The network of a config, a Flax module.

  Args:
    config: see `config.default_config`.
    **changes: fields to change first.
  """
  c = config_lib.copy(config, **changes)
  estimator = estimators.by_name(c.estimator, gradient=c.estimator_gradient)
  weights = dict(
      bits=layers.bits_by_rule(c.weight_bits, c.bits_rules),
      threshold_rule=c.weight_threshold_rule,
      thresholds=c.weight_thresholds,
      estimator=estimator,
      kernel_init=getattr(jax.nn.initializers, c.kernel_init)(),
      dtype=jnp.dtype(c.compute_dtype))
  make = dict(
      num_classes=datasets.info(c.dataset).num_classes,
      conv=functools.partial(layers.QuantConv, pad_value=c.pad_value, **weights),
      dense=functools.partial(layers.QuantDense, **weights),
      norm=functools.partial(
          layers.NormQuant,
          bits=layers.bits_by_rule(c.input_bits, c.bits_rules),
          thresholds=c.input_thresholds,
          estimator=estimator,
          momentum=c.norm_momentum,
          epsilon=c.norm_epsilon,
          use_scale=c.norm_scale))
  if c.network != "convnet":
    return models.NETWORKS[c.network](**make)
  return models.ConvNet(
      conv_widths=c.conv_widths,
      dense_widths=c.dense_widths,
      first_padding=c.first_padding,
      pool=functools.partial(
          layers.max_pool, share_gradient=c.share_pool_gradient),
      **make)


class Experiment:
  """What a config comes to; making one checks the config and makes no arrays.

  Attributes:
    config: see `config.default_config`.
    info: of the data set.
    image_shape: of the network's input.
    pixels: their normalization.
    model: the network.
    layers: what `layers.trace` says of it.
    steps_per_epoch, num_steps: of training.
    alpha, learning_rate: functions of the step.
    optimizer: of optax.
    replicated, sharded: over all local devices, whole or along the batch.
  """

  def __init__(self, config: Any):
    """Raises `cli.UsageError` where the config can not be run."""
    c = self.config = config
    config_lib.validate(c)
    self.info = datasets.info(c.dataset)
    examples = self.info.splits["train"]
    for name in ("batch_size", "eval_batch_size"):
      cli.check(c[name] <= examples, f"config.{name}", c[name],
                f"at most {examples}, the training examples of {c.dataset}")
    self.steps_per_epoch = examples // c.batch_size
    self.num_steps = self.steps_per_epoch * c.num_epochs
    cli.check(self.num_steps < 2**31, "config.num_epochs", c.num_epochs,
              f"at most {(2**31 - 1) // self.steps_per_epoch}: steps are int32")
    devices = jax.local_devices()
    for name in ("batch_size", "eval_batch_size"):
      cli.check(c[name] % len(devices) == 0, f"config.{name}", c[name],
                f"a multiple of {len(devices)}, the number of devices")

    self.image_shape = (c.crop_size, c.crop_size, self.info.image_shape[-1])
    self.pixels = pipeline.pixels(c.pixels, self.info.mean, self.info.std)
    self.model = build_model(c)
    self.layers = layers.trace(self.model, self.image_shape)
    self._check_bits_rules()

    self.alpha = schedules.alpha(
        c.alpha_shape, c.alpha_start, c.alpha_final, c.alpha_end, self.num_steps,
        depth=self.model.depth if c.alpha_per_layer else None)
    self.learning_rate = schedules.learning_rate(
        c.learning_rate_schedule, c.learning_rate, self.num_steps,
        decay=c.learning_rate_decay, stairs=c.learning_rate_stairs,
        steps=c.learning_rate_steps)
    self.optimizer: optax.GradientTransformation = optim.optimizer(
        c.optimizer, self.learning_rate, adam_epsilon=c.adam_epsilon,
        momentum=c.momentum, weight_decay=c.weight_decay)

    # Auto: Flax's convolutions do not know explicit sharding.
    mesh = jax.make_mesh((len(devices),), ("data",), axis_types=(AxisType.Auto,))
    self.replicated = NamedSharding(mesh, PartitionSpec())
    self.sharded = NamedSharding(mesh, PartitionSpec("data"))

  def _check_bits_rules(self) -> None:
    quantized = [layer.path for layer in self.layers if layer.bits is not None]
    for pattern, _ in self.config.bits_rules:
      cli.check(any(layers.matches(pattern, path) for path in quantized),
                "config.bits_rules", pattern,
                "a pattern that matches one of " + ", ".join(quantized))

  @property
  def grid_layers(self) -> dict[str, layers.LayerInfo]:
    """The layers whose weights are on a grid, by path."""
    return {layer.path: layer for layer in self.layers
            if layer.kernel_shape and quantizers.is_grid(layer.bits)}

  def jit(self, function: Callable, **options: Any) -> Callable:
    """`jax.jit`, with the compiler options that the config asks for."""
    if self.config.deterministic and jax.default_backend() == "gpu":
      # Other algorithms, chosen by timing them, may sum in another order.
      options["compiler_options"] = {
          "xla_gpu_deterministic_ops": True, "xla_gpu_autotune_level": 0}
    return jax.jit(function, **options)

  def load(self, split: str) -> pipeline.Data:
    """A split ("train", "validation", "test") of the data, on all devices."""
    data = datasets.load(self.config.dataset, split, self.config.data_dir)
    return jax.device_put(pipeline.Data(*data), self.replicated)

  def train_batch(self, data, order, position, key) -> tuple[jax.Array, jax.Array]:
    """See `pipeline.train_batch`."""
    c = self.config
    return pipeline.train_batch(
        data, order, position, key, batch_size=c.batch_size, crop_size=c.crop_size,
        crop_padding=c.crop_padding, flip=c.random_flip, pixels=self.pixels,
        sharding=self.sharded)

  def eval_batch(self, data, start) -> tuple[jax.Array, jax.Array, jax.Array]:
    """See `pipeline.eval_batch`."""
    c = self.config
    return pipeline.eval_batch(
        data, start, batch_size=c.eval_batch_size, crop_size=c.crop_size,
        pixels=self.pixels, sharding=self.sharded)

  def fold(self, variables: Any) -> Any:
    """The hard network's variables, on all devices: see `fold.fold`."""
    probe = pipeline.probe(self.pixels, self.image_shape)
    hard = fold.fold(self.model, variables, probe)
    return jax.device_put(hard, self.replicated)
