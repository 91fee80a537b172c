"""The config of a run: its fields, their defaults and their validation.

Every config has the same fields. An experiment file starts from `default_config()` and
changes some of them. Any field can be overridden on the command line (--config.seed=1).
"""

import ast
import copy as copy_lib
import json
import math
import os
from typing import TYPE_CHECKING, Any, Collection

from ml_collections import config_dict
import numpy as np

from minw import config_fields
from minw import errors
from minw import estimators
from minw import json_files
from minw import models
from minw import paths
from minw import quantizers
from minw import schedules
from minw.data import datasets
from minw.data import mirror

# All configs have the same fields.
FIELDS = config_fields.FIELDS

# Times of the histograms as fractions of the run (numerator, denominator), as in Figs 1
# to 4.
_HISTOGRAMS = ((1, 40), (1, 8), (11, 40))

# Defaults by data set, where they differ from the fields' defaults, which are for
# CIFAR.
_RECIPES = {
    "digits": dict(
        crop_size=8, random_flip=False, conv_widths=(32, 32, 64, 64),
        dense_widths=(128,), batch_size=64, num_epochs=40, eval_batch_size=360,
        eval_every_epochs=4),
    "imagenet2012": dict(
        network="resnet18", crop_size=224, kernel_init="he_normal", batch_size=256,
        eval_batch_size=250, num_epochs=90, optimizer="sgd", momentum=0.9,
        weight_decay=1e-4, learning_rate=0.1, learning_rate_schedule="steps",
        learning_rate_decay=0.1, learning_rate_steps=(30 / 90, 60 / 90, 80 / 90)),
}


class Config(config_dict.ConfigDict):
  """A config. Once it is locked, assigning a wrong name or type raises an error."""

  if TYPE_CHECKING:
    def __getattr__(self, name: str) -> Any:
      """The value of a field."""

    def __getitem__(self, key: str) -> Any:
      """The value of a field."""

    def lock(self) -> Any:
      """Locks the config, so that wrong names and types raise errors. Returns it."""

  def __setitem__(self, name: str, value: Any) -> None:
    if not self.is_locked:
      super().__setitem__(name, value)
      return
    if name not in self:
      raise errors.unknown_name("config field", name, self.keys())
    kind = type(self[name])
    allowed = name in config_fields.BITS or (
        value is not None and isinstance(value, bool) == (kind is bool))
    try:
      errors.check(allowed, f"config.{name}", value, f"of type {kind.__name__}")
      super().__setitem__(name, value)
    except (TypeError, OverflowError, RecursionError, ValueError) as error:
      raise errors.bad_value(
          f"config.{name}", value, f"of type {kind.__name__}") from error


def default_config(dataset: str = "cifar10") -> Config:
  """Makes a config that trains on a data set, from which experiments start.

  Args:
    dataset: One of `datasets.NAMES`. For CIFAR-10 and CIFAR-100 the config is the
      paper's recipe: ConvNet D, W1A1, AQE.

  Returns:
    The locked config. Its fields can be changed, and none can be added.

  Raises:
    errors.UsageError: There is no such data set.
  """
  if dataset not in datasets.NAMES:
    raise errors.unknown_name("data set", dataset, datasets.NAMES)
  c = Config()
  for section in FIELDS.values():
    for name, (default, _) in section.items():
      if name in config_fields.BITS:
        c[name] = config_dict.placeholder(object)
      c[name] = default
  c.update(_RECIPES.get(dataset, {}), dataset=dataset)
  return c.lock()


def histogram_epochs(c: Config) -> tuple[int, ...]:
  """The epochs after which the layers of `histogram_layers` are counted.

  If the config names no epochs, they are the first epochs with a validation at or after
  fixed fractions of the run.
  """
  if c.histogram_epochs:
    return c.histogram_epochs
  every = c.eval_every_epochs
  return tuple(sorted({
      min(-(-part * c.num_epochs // (whole * every)) * every, c.num_epochs)
      for part, whole in _HISTOGRAMS}))


def is_validated(c: Config, epoch: int) -> bool:
  """Whether an epoch of the run ends with a validation."""
  return 0 < epoch <= c.num_epochs and (
      epoch % c.eval_every_epochs == 0 or epoch == c.num_epochs)


def validate(c: Config) -> None:
  """Checks every field that can be checked without images or devices.

  Raises:
    errors.UsageError: A field has a wrong value. The message names the field, its value
      and the allowed values.
  """
  _check_types(c)
  for check_part in (_check_choices, _check_numbers, _check_records, _check_data,
                     _check_network, _check_bits, _check_methods):
    check_part(_Checker(c))


class _Checker:
  """Checks fields of a config.

  Each method raises `errors.UsageError`, with the name of the field, its value and
  what is allowed, unless the value is allowed.

  Attributes:
    config: The config.
  """

  def __init__(self, c: Config):
    self.config = c

  def check(self, name: str, ok: bool, allowed: str) -> None:
    errors.check(ok, f"config.{name}", self.config[name], allowed)

  def one_of(self, name: str, allowed: Collection[Any]) -> None:
    self.check(name, self.config[name] in allowed,
               "one of " + ", ".join(map(str, allowed)))

  def at_least(self, low: int, *names: str) -> None:
    for name in names:
      self.check(name, self.config[name] >= low, f"at least {low}")

  def at_most(self, high: int, *names: str) -> None:
    for name in names:
      self.check(name, self.config[name] <= high, f"at most {high}")

  def fraction(self, *names: str) -> None:
    for name in names:
      self.check(name, 0 <= self.config[name] <= 1, "in [0, 1]")

  def positive(self, *names: str) -> None:
    for name in names:
      self.check(
          name, _TINY <= self.config[name] < _HUGE, "positive and finite, in float32")

  def not_negative(self, *names: str) -> None:
    for name in names:
      self.check(
          name, 0 <= self.config[name] < _HUGE, "at least 0 and finite, in float32")

  def widths(self, *names: str) -> None:
    for name in names:
      values = self.config[name]
      self.check(name, len(values) <= _MOST_LAYERS and all(
          type(value) is int and 0 < value <= _WIDEST for value in values),
                 f"a tuple of positive integers, at most {_MOST_LAYERS} and each at"
                 f" most {_WIDEST}")

  def path(self, name: str, remote: bool = False) -> None:
    try:
      paths.expand(self.config[name], remote)
    except ValueError as error:
      raise errors.UsageError(
          f"config.{name}={errors.shown(self.config[name])}: {error}") from error

  def bits(self, name: str, value: Any) -> None:
    try:
      quantizers.is_grid(value)
    except (ValueError, RecursionError) as error:
      raise errors.UsageError(f"config.{name}: bits={errors.shown(value)}: must be"
                              f" {quantizers.ALLOWED_BITS}") from error

  def thresholds(self, name: str, bits: int | str) -> None:
    q = 0
    if quantizers.is_grid(bits) and not isinstance(bits, str):
      q = quantizers.num_thresholds(bits)
    values = self.config[name]
    self.check(name, _distinct(values) and len(values) in (0, q),
               f"() or {q} positive, ascending numbers, for bits={bits!r}" if q
               else f"(): bits={bits!r} has no thresholds")


def _check_types(c: Config) -> None:
  """Checks that the config has all fields and no others, each of the right type."""
  defaults = default_config()
  for name in c:
    if name not in defaults:
      raise errors.unknown_name("config field", name, defaults.keys())
  for name, default in defaults.items():
    if name not in c:
      raise errors.UsageError(f"config field {name!r} is missing")
    if name not in config_fields.BITS:
      errors.check(type(c[name]) is type(default), f"config.{name}", c[name],
                   f"of type {type(default).__name__}")


def _check_choices(checker: _Checker) -> None:
  """Checks the fields that name one of several choices, or a path."""
  one_of = checker.one_of
  one_of("in_memory", datasets.IN_MEMORY)
  one_of("pixels", ("integer", "standardized"))
  one_of("network", ("convnet", *models.NETWORKS))
  one_of("first_padding", ("SAME", "VALID"))
  one_of("pad_value", (0.0, 1.0, -1.0))
  one_of("kernel_init", KERNEL_INITS)
  one_of("compute_dtype", ("float32", "bfloat16"))
  one_of("sum_dtype", ("float32", "bfloat16"))
  computed = checker.config.compute_dtype
  checker.check("sum_dtype", checker.config.sum_dtype in ("float32", computed),
                "float32 unless config.compute_dtype is bfloat16, too")
  one_of("weight_threshold_rule", quantizers.THRESHOLD_RULES)
  one_of("weight_scale", tuple(estimators.WEIGHT_SCALES))
  one_of("estimator", estimators.network_estimators())
  one_of("input_estimator", ("", *estimators.network_estimators()))
  one_of("estimator_gradient", tuple(estimators.GRADIENTS))
  one_of("alpha_shape", schedules.ALPHA_SHAPES)
  one_of("alpha_weights", schedules.ALPHA_WEIGHTS)
  one_of("optimizer", ("adam", "sgd", "bop"))
  one_of("class_weights", ("none", "balanced"))
  one_of("learning_rate_schedule", schedules.LEARNING_RATE_SCHEDULES)
  checker.path("data_dir", remote=True)
  checker.path("cache_dir")
  checker.path("init_from", remote=True)
  checker.path("teacher", remote=True)
  c = checker.config
  checker.check("dataset", datasets.exists(c.dataset, data_dir(c)),
                f"one of {', '.join(datasets.NAMES)}, or a data set that `python -m "
                f"minw.prepare` wrote to config.data_dir={c.data_dir!r}")


def _check_numbers(checker: _Checker) -> None:
  """Checks the fields that hold numbers."""
  c, check = checker.config, checker.check
  check("seed", 0 <= c.seed < 2**32, "in [0, 2^32)")
  checker.at_least(1, "num_epochs", "eval_every_epochs", "eval_batch_size",
                   "learning_rate_stairs", "crop_size", "estimator_noise_steps")
  # These enter calculations with steps, which are int32.
  checker.at_most(2**31 - 1, "num_epochs", "eval_every_epochs", "learning_rate_stairs",
                  "estimator_noise_steps", "reestimate_batches", "batch_size",
                  "eval_batch_size")
  checker.at_most(_MOST_WORKERS, "data_workers")
  check("batch_size", c.batch_size > 1, "at least 2: after a dense layer, batch norm"
        " of one example sees one value of each channel, which teaches it nothing")
  checker.at_least(0, "crop_padding", "reestimate_batches", "eval_resize",
                   "data_workers", "train_examples", "norm_group_size")
  checker.positive("norm_epsilon", "learning_rate", "learning_rate_decay",
                   "teacher_temperature")
  checker.not_negative(
      "adam_epsilon", "weight_decay", "latent_weight_decay_factor",
      "norm_weight_decay_factor", "gradient_clip_norm", "ovsw_scaling", "ovsw_decay",
      "bop_threshold")
  check("weight_frequency", 0 <= c.weight_frequency <= _LARGEST_FREQUENCY,
        f"in [0, {_LARGEST_FREQUENCY}]")
  checker.fraction("alpha_start", "alpha_final", "alpha_end", "norm_momentum",
                   "momentum", "max_damaged", "bop_adaptivity_rate", "teacher_weight",
                   "label_smoothing", "brightness", "contrast", "random_erasing")
  check("ema_decay", 0 <= c.ema_decay < 1, "at least 0 and less than 1")
  _check_schedule(checker)
  check("rotation", 0 <= c.rotation <= 180, "in [0, 180]")
  for name in ("mixup", "cutmix"):
    low, high = _MIXING
    check(name, c[name] == 0 or low <= c[name] <= high, f"0, or in [{low}, {high}]")
  checker.widths("conv_widths", "dense_widths")
  size = c.norm_group_size
  check("norm_group_size", size != 1 and (size == 0 or c.batch_size % size == 0),
        f"0, or at least 2 and a divisor of batch_size={c.batch_size}")


def _check_schedule(checker: _Checker) -> None:
  """Checks the schedule of the learning rate."""
  c, check = checker.config, checker.check
  check("learning_rate_warmup", 0 <= c.learning_rate_warmup < 1,
        "at least 0 and less than 1")
  check("learning_rate_steps",
        _ascending(c.learning_rate_steps) and max(c.learning_rate_steps, default=0) < 1,
        "ascending fractions of the run between 0 and 1")
  kind = c.learning_rate_schedule
  if kind == "one_cycle":
    check("learning_rate_warmup", c.learning_rate_warmup > 0,
          "more than 0 with learning_rate_schedule='one_cycle', whose rise it is")
  if kind == "steps":
    check("learning_rate_steps",
          min(c.learning_rate_steps, default=1) >= c.learning_rate_warmup,
          f"after the warm-up, learning_rate_warmup={c.learning_rate_warmup}")


def _check_records(checker: _Checker) -> None:
  """Checks which layers are counted, and after which epochs."""
  c = checker.config
  if not c.histogram_layers:
    return
  for name, kind in (("histogram_layers", str), ("histogram_epochs", int)):
    checker.check(name, all(type(value) is kind for value in c[name]),
                  f"a tuple of {kind.__name__}")
  checker.check(
      "histogram_epochs", all(is_validated(c, e) for e in c.histogram_epochs),
      f"epochs up to num_epochs={c.num_epochs} that end with a validation, as "
      f"every eval_every_epochs={c.eval_every_epochs} do")


def _check_data(checker: _Checker) -> None:
  """Checks what is cut from the images of the data set."""
  c, check = checker.config, checker.check
  info = datasets.info(c.dataset, data_dir(c), c.in_memory)
  check("crop_scale", len(c.crop_scale) == 2 and _numbers(c.crop_scale)
        and 0 < c.crop_scale[0] <= c.crop_scale[1] <= 1,
        "two ascending fractions of the image's area, (0.08, 1.0) for example")
  if info.streamed:
    checker.at_most(_LARGEST_SIDE, "crop_size", "eval_resize")
    check("train_examples", not c.train_examples, f"0: {c.dataset} is not in memory")
    check("eval_resize", c.eval_resize == 0 or c.eval_resize >= c.crop_size,
          f"0 or at least crop_size={c.crop_size}")
  else:
    check("train_examples", c.train_examples <= info.splits["train"],
          f"at most {info.splits['train']}, the training examples of {c.dataset}")
  if not info.varies:
    side = min(info.image_shape[:2])
    # Padding cannot make up for a small image, because evaluation does not pad.
    check("crop_size", c.crop_size <= side, f"at most {side}, the image of {c.dataset}")
    # Evaluation would see a smaller part of an image than training.
    check("eval_resize", not info.streamed or c.eval_resize <= side,
          f"at most {side}, the image of {c.dataset}; 0 keeps its size")
  check("crop_padding", c.crop_padding < c.crop_size,
        f"less than crop_size={c.crop_size}: every crop holds part of the image")


def _check_network(checker: _Checker) -> None:
  """Checks that the network's layers leave something of a crop."""
  c = checker.config
  if c.network == "convnet":
    checker.check(
        "pool_layers", all(type(i) is int for i in c.pool_layers)
        and _ascending((*c.pool_layers, len(c.conv_widths) + 1)),
        f"ascending numbers of convolutions, from 1 to {len(c.conv_widths)}")
    checker.check(
        "conv_widths", _final_size(c) > 0,
        f"few enough: crop_size={c.crop_size} leaves nothing to the last pooling")
  else:
    checker.at_least(models.SMALLEST_IMAGE.get(c.network, 1), "crop_size")


def _check_bits(checker: _Checker) -> None:
  """Checks bits, and the thresholds that belong to them."""
  c = checker.config
  checker.bits("input_bits", c.input_bits)
  checker.bits("weight_bits", c.weight_bits)
  for rule in c.bits_rules:
    checker.check("bits_rules", isinstance(rule, tuple) and len(rule) == 2
                  and isinstance(rule[0], str),
                  "pairs of a layer name pattern and bits: (('conv1', 'bfloat16'),)")
    checker.bits("bits_rules", rule[1])
  checker.thresholds("input_thresholds", c.input_bits)
  checker.thresholds("weight_thresholds", c.weight_bits)


def _check_methods(checker: _Checker) -> None:
  """Checks that estimator and optimizer suit the other fields."""
  c, check = checker.config, checker.check
  operands = {"estimator": [c.weight_bits], "input_estimator": [c.input_bits]}
  if not c.input_estimator:
    operands["estimator"].append(c.input_bits)
  for name, bits in operands.items():
    if c[name] in estimators.ONE_BIT:
      for value in (*bits, *(b for _, b in c.bits_rules)):
        check(name, not (quantizers.is_grid(value) and value > 1),
              f"another where bits are {value}: it is defined for one bit")
  check("input_estimator", not c.input_estimator or
        (c.input_estimator == "lsq") == (c.estimator == "lsq"),
        f"'' with estimator={c.estimator!r}, because lsq learns the steps of inputs and"
        " weights or of neither")
  check("step_per_channel", not c.step_per_channel or c.estimator == "lsq",
        f"False with estimator={c.estimator!r}, which learns no steps")
  if c.learn_input_thresholds:
    check("learn_input_thresholds", c.estimator != "lsq",
          "False with estimator='lsq', whose thresholds are parts of its steps")
    check("learn_input_thresholds", any(
        quantizers.is_grid(value) and value != 1
        for value in (c.input_bits, *(b for _, b in c.bits_rules))),
          f"False with input_bits={c.input_bits!r}, which have no thresholds")
    check("input_thresholds", max(c.input_thresholds, default=0) < 1,
          "less than 1 with learn_input_thresholds=True")
  if c.estimator == "lsq":
    check("weight_scale", c.weight_scale == "none",
          "'none' with estimator='lsq', whose steps are scales")
    check("pad_value", c.pad_value == 0,
          "0.0 with estimator='lsq', whose levels are not 1 and -1")
  if c.optimizer == "bop":
    check("estimator", c.estimator in estimators.PASS_AT_ONE,
          "one of " + ", ".join(estimators.PASS_AT_ONE) + " with optimizer='bop', which"
          " keeps weights at 1 and -1: gradients vanish there or are reversed")
    for name in ("ovsw_scaling", "ovsw_decay", "weight_frequency"):
      check(name, c[name] == 0,
            "0.0 with optimizer='bop', which has no latent weights")
  if c.weight_frequency:
    for name in ("ovsw_scaling", "ovsw_decay"):
      check(name, c[name] == 0, "0.0 with a weight_frequency, which makes the signs of"
            " latent weights others than those of the network")


# Fields that may change when a run resumes. They affect where work is done, but not its
# results.
FREE = ("cache_dir", "data_workers", "shard_optimizer")

# Smaller numbers are 0 in float32, and numbers from `_HUGE` on are infinite.
_TINY, _HUGE = 2.0**-126, 2.0**128

# Bounds that exceed any sensible network or machine, so that typing errors are found at
# once.
_WIDEST = 2**20  # Largest number of outputs of a layer.
_MOST_LAYERS = 100  # Largest number of convolutions or of hidden dense layers.
_LARGEST_SIDE = 4096  # Largest side of a crop or a resized image, in pixels.
_LARGEST_FREQUENCY = 1000  # Float32 still resolves this sine of weights in [-1, 1].
_MIXING = (0.01, 100.0)  # Parameters of a beta distribution that is not degenerate.
_MOST_WORKERS = 1024  # Largest number of processes that decode images.
KERNEL_INITS = ("glorot_uniform", "glorot_normal", "he_uniform", "he_normal",
                "lecun_uniform", "lecun_normal")


def copy(config: Config, **changes: Any) -> Config:
  """Copies a config and changes some fields of the copy."""
  # ConfigDict(config) would share the fields of bits with the original.
  result = copy_lib.deepcopy(config)
  result.update(changes)
  return result


def data_dir(c: Config) -> str | os.PathLike[str]:
  """Returns the directory of the prepared data sets, as `minw.data` takes it."""
  return mirror.place(c.data_dir, c.cache_dir)


def from_json(text: str) -> Config:
  """Reads a config that `to_json` or a run wrote.

  Fields that the text lacks, because they are newer, have their defaults.

  Raises:
    errors.UsageError: The text is damaged, or a field is unknown or of another type.
  """
  config = default_config()
  try:
    values = json.loads(text)
  except (ValueError, RecursionError) as error:
    raise errors.UsageError(f"config.json is damaged: {error}") from error
  if not isinstance(values, dict):
    raise errors.UsageError("config.json is damaged: it is not a JSON object")
  if json_files.SEAL in values:  # A file in the directory of a run is sealed.
    try:
      json_files.check_sealed(values)
    except ValueError as error:
      raise errors.UsageError(f"config.json is damaged: {error}") from error
    del values[json_files.SEAL]
  for name, value in values.items():
    config[name] = _tuples(value)
  return config


def to_json(config: Config) -> str:
  """Converts a config to sorted, indented JSON."""
  return json.dumps(config.to_dict(), indent=2, sort_keys=True) + "\n"


def to_fields(config: Config) -> dict[str, Any]:
  """Returns the fields as JSON has them: sorted by name, with lists for tuples."""
  return json.loads(to_json(config))


def differing_fields(a: config_dict.ConfigDict, b: config_dict.ConfigDict) -> list[str]:
  """Lists the fields that differ, as strings "name: value in a, value in b"."""
  return [f"{name}: {a.get(name)!r}, {b.get(name)!r}"
          for name in sorted({*a, *b}) if a.get(name) != b.get(name)]


def parse_argument(text: str, **defaults: Any) -> Any:
  """Parses the part after the colon in --config=NAME:name=value,name=value.

  Args:
    text: The part after the colon.
    **defaults: Allowed names with their default values.

  Returns:
    The values by name.

  Raises:
    errors.UsageError: A name is unknown, or a part is not name=value.
  """
  result = config_dict.ConfigDict(defaults, type_safe=False)
  for part in filter(None, text.split(",")):
    name, equals, value = part.partition("=")
    errors.check(bool(equals), "config argument", part, "name=value")
    if name not in defaults:
      raise errors.unknown_name("config argument", name, defaults)
    try:
      result[name] = ast.literal_eval(value)
    except (SyntaxError, ValueError):
      result[name] = value
  return result


def _tuples(value: Any) -> Any:
  return tuple(map(_tuples, value)) if isinstance(value, list) else value


def _ascending(values: tuple) -> bool:
  return _numbers(values) and all(a < b for a, b in zip(values, values[1:]))


def _distinct(values: tuple) -> bool:
  """Whether numbers ascend and are finite, positive and different in float32."""
  if not _ascending(values) or not all(_TINY <= v < _HUGE for v in values):
    return False
  return len(set(map(np.float32, values))) == len(values)


def _numbers(values: tuple) -> bool:
  return all(type(v) in (int, float) and 0 < v < math.inf for v in values)


def _final_size(c: Config) -> int:
  size = c.crop_size - 2 * (c.first_padding == "VALID")
  return size >> len(models.pooled_convs(len(c.conv_widths), c.pool_layers))
