"""minw.config: the paper's recipe, every field's check, and configs as files."""

import functools
import itertools
import json
import math
import pathlib

from ml_collections import config_dict
import numpy as np
import pytest

from minw import config as config_lib
from minw import errors
from minw.data import datasets

DEFAULT = config_lib.default_config()
BITS = ("must be one of 1, 2, 3, 4, 5 or a float format named by its dtype: "
        "float8_e4m3fn, bfloat16, float16, float32")


def changed(**changes):
  """The default config, changed without regard to types or names."""
  return config_dict.ConfigDict(DEFAULT.to_dict() | changes, type_safe=False)


def refusal(**changes):
  with pytest.raises(errors.UsageError) as error:
    config_lib.validate(changed(**changes))
  return str(error.value)


def test_default_is_the_papers_recipe():
  c = DEFAULT
  # ConvNet D: 64C3 64C3 MP2 128C3 128C3 MP2 256C3 256C3 MP2 256FC 256FC 10FC, 1/1.
  assert c.dataset == "cifar10"
  assert c.conv_widths == (64, 64, 128, 128, 256, 256) and c.dense_widths == (256, 256)
  assert (c.input_bits, c.weight_bits, c.bits_rules) == (1, 1, ())
  # A map of 3x3 comes out of the last pooling: a crop of 24 to 31.
  assert (c.crop_size, c.first_padding, c.random_flip) == (24, "SAME", True)
  assert (c.estimator, c.estimator_gradient) == ("aqe", "eq18")
  assert (c.optimizer, c.learning_rate, c.batch_size, c.num_epochs) == (
      "adam", 0.01, 256, 200)
  assert c.weight_decay == 0.0
  # 0.9 every 1000 of 200 * (45000 // 256) = 35,000 steps.
  assert c.learning_rate_schedule == "staircase" and c.learning_rate_stairs == 35
  assert math.isclose(c.learning_rate_decay, 0.02503155504993)
  # From 0.5, where AQE equals STE, to 1 at epoch 93.
  assert (c.alpha_shape, c.alpha_start, c.alpha_final) == ("linear", 0.5, 1.0)
  assert c.alpha_end * c.num_epochs == 93 and not c.alpha_per_layer
  assert c.pixels == "integer" and c.pad_value == 0.0 and c.seed == 0


@pytest.mark.parametrize("name", datasets.NAMES)
def test_defaults_fit_their_data_set(name):
  c = config_lib.default_config(dataset=name)
  config_lib.validate(c)
  assert c.dataset == name
  # Crops are no larger than what is read: all of the digits, most of the others.
  assert c.crop_size == {"digits": 8, "imagenet2012": 224}.get(name, 24)
  assert c.random_flip == (name != "digits")  # A mirrored 2 is no digit.
  assert c.network == ("resnet18" if name == "imagenet2012" else "convnet")


def test_defaults_of_an_unknown_data_set():
  with pytest.raises(errors.UsageError,
                     match="data set 'digit' does not exist; did you mean 'digits'?"):
    config_lib.default_config(dataset="digit")
  with pytest.raises(TypeError, match="datset"):
    config_lib.default_config(datset="digits")  # pytype: disable=wrong-keyword-args


@pytest.mark.parametrize("name, value, message", [
    ("crop_sze", 9,
     "config field 'crop_sze' does not exist; did you mean 'crop_size'?"),
    ("crop_size", "9", "config.crop_size='9': must be of type int"),
    ("crop_size", 9.5, "config.crop_size=9.5: must be of type int"),
    ("seed", True, "config.seed=True: must be of type int"),
    ("seed", None, "config.seed=None: must be of type int"),
    ("random_flip", 1, "config.random_flip=1: must be of type bool"),
    ("conv_widths", 8, "config.conv_widths=8: must be of type tuple"),
    ("estimator", 1, "config.estimator=1: must be of type str"),
])
def test_wrong_assignments(name, value, message):
  """They fail where they are made, and change nothing."""
  c = config_lib.default_config()
  for assign in (lambda: setattr(c, name, value), lambda: c.update({name: value}),
                 lambda: config_lib.copy(c, **{name: value})):
    with pytest.raises(errors.UsageError) as error:
      assign()
    assert str(error.value) == message
  assert config_lib.differing_fields(c, DEFAULT) == []


def test_right_assignments():
  c = config_lib.default_config()
  c.conv_widths, c.learning_rate, c.input_bits = [8, 8], 1, "bfloat16"
  assert (c.conv_widths, c.learning_rate, c.input_bits) == ((8, 8), 1.0, "bfloat16")
  assert type(c.learning_rate) is float
  config_lib.validate(c)


def test_each_call_makes_another_config():
  config_lib.default_config().seed = 7
  assert config_lib.default_config().seed == 0


@pytest.mark.parametrize("changes", [
    {},
    {"seed": 2**32 - 1},
    {"dataset": "cifar100"},
    {"dataset": "digits", "crop_size": 8},
    {"crop_size": 32, "crop_padding": 4},
    {"crop_size": 10, "first_padding": "VALID"},
    {"pool_layers": (1, 2, 6), "global_pool": True},
    {"crop_size": 8, "crop_padding": 7},
    {"network": "densenet100", "crop_size": 4, "conv_widths": ()},
    {"network": "resnet110", "crop_size": 32, "crop_padding": 4},
    {"alpha_start": 0.0, "alpha_final": 0.0, "alpha_end": 0.0},
    {"alpha_start": 1.0, "alpha_end": 1.0},
    {"input_bits": "float8_e4m3fn", "weight_bits": "float32"},
    {"input_bits": 5, "input_thresholds": tuple(i / 16 for i in range(1, 16))},
    {"weight_bits": 2, "weight_thresholds": (0.7,)},
    {"weight_bits": 3, "weight_thresholds": (1, 2, 2.5)},
    {"bits_rules": (("conv1", "bfloat16"), ("norm_*", 3))},
    {"estimator": "stochastic_aqe", "bits_rules": (("conv1", "float16"),)},
    {"conv_widths": (), "dense_widths": ()},
    {"learning_rate_steps": ()},
    {"adam_epsilon": 0.0},
    {"optimizer": "sgd", "momentum": 0.0, "weight_decay": 1e-4},
    {"dataset": "imagenet2012", "crop_size": 224},
    {"dataset": "imagenet2012", "crop_size": 300, "eval_resize": 0},
    {"crop_scale": (1.0, 1)},
    {"train_examples": 45_000},
    {"batch_size": 96, "norm_group_size": 48},
])
def test_valid(changes):
  config_lib.validate(changed(**changes))


@pytest.mark.parametrize("name", list(DEFAULT))
def test_every_field_has_its_type(name):
  for value in (None, object(), [1], {"a": 1}, config_dict.ConfigDict()):
    assert refusal(**{name: value}).startswith(f"config.{name}")
  if type(DEFAULT[name]) is not str and name not in ("input_bits", "weight_bits"):
    kind = type(DEFAULT[name]).__name__
    assert refusal(**{name: "1"}) == f"config.{name}='1': must be of type {kind}"


@pytest.mark.parametrize("name, value, kind", [
    ("seed", True, "int"), ("seed", 1.0, "int"), ("seed", np.int32(1), "int"),
    ("batch_size", 256.0, "int"), ("learning_rate", 1, "float"),
    ("learning_rate", np.float32(1), "float"), ("pad_value", 0, "float"),
    ("alpha_end", True, "float"), ("random_flip", 1, "bool"),
    ("conv_widths", [64, 64], "tuple"), ("bits_rules", "", "tuple"),
    ("data_dir", pathlib.Path("x"), "str"), ("init_from", b"", "str")])
def test_near_types_are_others(name, value, kind):
  assert refusal(**{name: value}).endswith(f": must be of type {kind}")


def test_unknown_and_missing_fields():
  assert refusal(learning_rte=0.1) == (
      "config field 'learning_rte' does not exist; did you mean 'learning_rate'?")
  assert refusal(xyz=1).startswith("config field 'xyz' does not exist; known: ")
  c = changed()
  del c.alpha_end
  with pytest.raises(errors.UsageError, match="^config field 'alpha_end' is missing$"):
    config_lib.validate(c)


NAN, INF = math.nan, math.inf


@pytest.mark.parametrize("name, values, allowed", [
    ("dataset", ["mnist", "", "CIFAR10"], "one of digits, cifar10, cifar100"),
    ("pixels", ["float"], "one of integer, standardized"),
    ("first_padding", ["same", ""], "one of SAME, VALID"),
    ("network", ["resnet", "ConvNet"], "one of convnet, resnet18, resnet34, resnet50"),
    ("pad_value", [0.5, NAN, -2.0], "one of 0.0, 1.0, -1.0"),
    ("kernel_init", ["zeros", "glorot"], "one of glorot_uniform, glorot_normal, "),
    ("compute_dtype", ["float16", "f32"], "one of float32, bfloat16"),
    ("sum_dtype", ["float16"], "one of float32, bfloat16"),
    ("sum_dtype", ["bfloat16"], "float32 unless config.compute_dtype is bfloat16, too"),
    ("weight_threshold_rule", ["mean"], "one of layer_mean, channel_mean, fixed"),
    ("estimator", ["stee", "stochastic_neuron", "by_name", ""],
     "one of approx_sign, aqe, dsq, ede, ewgs, lsq, parq, reste, ste, "),
    ("input_estimator", ["stee", "none"], "one of , approx_sign, aqe, dsq, ede,"),
    ("estimator_gradient", ["eq1"], "one of eq18, algorithm1, eq15"),
    ("alpha_weights", ["first"], "one of with, before, after"),
    ("alpha_shape", ["square"], "one of linear, cosine, cubic, sigmoid"),
    ("weight_scale", ["mean", ""], "one of none, layer_mean, channel_mean"),
    ("optimizer", ["adamw"], "one of adam, sgd, bop"),
    ("class_weights", ["", "inverse"], "one of none, balanced"),
    ("estimator_noise_steps", [0], "at least 1"),
    ("bop_adaptivity_rate", [-0.1, 1.1, NAN], "in [0, 1]"),
    ("bop_threshold", [-1e-9, NAN, INF], "at least 0 and finite, in float32"),
    ("learning_rate_schedule", ["square"],
     "one of exponential, staircase, steps, constant, linear, cosine, one_cycle"),
    ("learning_rate_warmup", [-0.1, 1.0, NAN], "at least 0 and less than 1"),
    ("label_smoothing", [-0.1, 1.1, NAN], "in [0, 1]"),
    ("teacher_weight", [-0.1, 1.1, NAN], "in [0, 1]"),
    ("teacher_temperature", [0.0, -1.0, NAN, INF], "positive and finite, in float32"),
    ("ema_decay", [-0.1, 1.0, NAN], "at least 0 and less than 1"),
    ("latent_weight_decay_factor", [-1.0, NAN],
     "at least 0 and finite, in float32"),
    ("norm_weight_decay_factor", [-1.0, INF], "at least 0 and finite, in float32"),
    ("gradient_clip_norm", [-1.0, NAN, INF], "at least 0 and finite, in float32"),
    ("weight_frequency", [-1.0, 1001.0, NAN], "in [0, 1000]"),
    ("ovsw_scaling", [-0.1, NAN, INF], "at least 0 and finite, in float32"),
    ("ovsw_decay", [-0.1, NAN, INF], "at least 0 and finite, in float32"),
    ("seed", [-1, 2**32, 10**30], "in [0, 2^32)"),
    ("batch_size", [1, 0, -256], "at least 2: after a dense layer, batch norm of one "
     "example sees one value of each channel, which teaches it nothing"),
    ("num_epochs", [0], "at least 1"),
    ("eval_every_epochs", [0], "at least 1"),
    ("eval_batch_size", [0], "at least 1"),
    ("learning_rate_stairs", [0], "at least 1"),
    ("crop_size", [0, -1], "at least 1"),
    ("crop_size", [33, 10**9], "at most 32, the image of cifar10"),
    ("crop_padding", [-1], "at least 0"),
    ("crop_padding", [24, 10**9], "less than crop_size=24: "),
    ("reestimate_batches", [-1], "at least 0"),
    ("eval_resize", [-1], "at least 0"),
    ("norm_group_size", [-1], "at least 0"),
    ("norm_group_size", [1, 3, 257, 512],
     "0, or at least 2 and a divisor of batch_size=256"),
    ("train_examples", [-1], "at least 0"),
    ("train_examples", [45_001, 10**30],
     "at most 45000, the training examples of cifar10"),
    ("data_workers", [-1], "at least 0"),
    ("max_damaged", [-0.1, 1.1, NAN], "in [0, 1]"),
    ("crop_scale", [(), (0.5,), (0.5, 0.4), (0.0, 1.0), (0.5, 1.1), (NAN, 1.0),
                    ("a", 1.0), (True, 1.0)],
     "two ascending fractions of the image's area, (0.08, 1.0) for example"),
    ("in_memory", ["", "True", "yes"], "one of auto, true, false"),
    ("rotation", [-1.0, 180.1, NAN, INF], "in [0, 180]"),
    ("brightness", [-0.1, 1.1, NAN], "in [0, 1]"),
    ("contrast", [-0.1, 1.1, NAN], "in [0, 1]"),
    ("random_erasing", [-0.1, 1.1, NAN], "in [0, 1]"),
    ("mixup", [-1.0, 0.009, 101.0, NAN, INF], "0, or in [0.01, 100.0]"),
    ("cutmix", [-1.0, 0.009, 101.0, NAN, INF], "0, or in [0.01, 100.0]"),
    ("norm_epsilon", [0.0, -1e-4, NAN, INF, 1e-50], "positive and finite, in float32"),
    ("learning_rate", [0.0, -1.0, NAN, INF, -INF, 1e-320, 1e39],
     "positive and finite, in float32"),
    ("learning_rate_decay", [0.0, -0.1, NAN, INF], "positive and finite, in float32"),
    ("adam_epsilon", [-1e-8, NAN, INF, 1e39], "at least 0 and finite, in float32"),
    ("weight_decay", [-1e-4, NAN, INF, 1e39], "at least 0 and finite, in float32"),
    ("alpha_start", [-1e-9, 1.0000001, NAN, INF], "in [0, 1]"),
    ("alpha_final", [-0.5, 2.0, NAN], "in [0, 1]"),
    ("alpha_end", [-0.1, 1.5, NAN], "in [0, 1]"),
    ("norm_momentum", [-0.1, 1.1, NAN], "in [0, 1]"),
    ("momentum", [-0.1, 1.1, NAN], "in [0, 1]"),
    ("conv_widths", [(0, 64), (64, -1), (64.0,), (True,), ("64",), (None,), ((64,),)],
     "a tuple of positive integers"),
    ("dense_widths", [(0,), (2.5,), ("a",)], "a tuple of positive integers"),
    ("conv_widths", [(4,) * 10], "few enough: crop_size=24 leaves nothing to the last"),
    ("pool_layers", [(0,), (7,), (2, 2), (2, 1), (1.0,), (True,), ("1",)],
     "ascending numbers of convolutions, from 1 to 6"),
    ("learning_rate_steps", [(0.75, 0.5), (0.5, 0.5), (0.0,), (1.0,), (0.5, NAN),
                             ("0.5",), (True,), ((0.5,),), (-0.5,), (0.5, None)],
     "ascending fractions of the run between 0 and 1"),
    ("bits_rules", [("conv1", 1), (("conv1",),), ((1, 1),), (("conv1", 1, 1),),
                    (["conv1", 1],), ("conv1",), (None,), (("conv1", 1), 2)],
     "pairs of a layer name pattern and bits: (('conv1', 'bfloat16'),)"),
    ("input_thresholds", [(0.1,)], "(): bits=1 has no thresholds"),
    ("weight_thresholds", [(0.1, 0.2, 0.3)], "(): bits=1 has no thresholds"),
])
def test_bad_values(name, values, allowed):
  for value in values:
    message = refusal(**{name: value})
    assert message.startswith(f"config.{name}={value!r}: must be {allowed}")
    assert "\n" not in message


@pytest.mark.parametrize("name, values, allowed", [
    ("conv_widths", [(2**20 + 1,), (8,) * 101],
     "a tuple of positive integers, at most 100 and each at most 1048576"),
    ("dense_widths", [(10**9,), (8, 2**63), (1,) * 10**5],
     "a tuple of positive integers, at most 100 and each at most 1048576"),
    ("estimator_noise_steps", [2**31, 2**32, 2**63], "at most 2147483647"),
    ("learning_rate_stairs", [2**31, 10**30], "at most 2147483647"),
    ("reestimate_batches", [2**31], "at most 2147483647"),
    ("batch_size", [2**31, 2**64], "at most 2147483647"),
    ("eval_batch_size", [2**31, 2**64], "at most 2147483647"),
    ("data_workers", [1025, 10**9], "at most 1024"),
])
def test_values_that_no_machine_can_use(name, values, allowed):
  for value in values:
    shown = repr(value) if len(repr(value)) <= 300 else repr(value)[:300] + "..."
    assert refusal(**{name: value}) == f"config.{name}={shown}: must be {allowed}"


@pytest.mark.parametrize("name", ["cache_dir", "data_dir", "init_from", "teacher"])
@pytest.mark.parametrize("value, reason", [
    ("a" * 256, "too long for this system"), ("a/" * 4000, "too long for this system"),
    ("a\0b", "null")])
def test_paths_that_no_file_has(name, value, reason):
  message = refusal(**{name: value})
  assert message.startswith(f"config.{name}=") and reason in message
  assert len(message) < 500 and "\n" not in message and "\0" not in message


def test_largest_crops_of_streamed_images():
  for name in ("crop_size", "eval_resize"):
    for value in (4097, 2**63):
      changes = {"dataset": "imagenet2012", "crop_size": 224, name: value}
      assert refusal(**changes) == f"config.{name}={value}: must be at most 4096"


def test_long_runs_have_epochs_to_count():
  c = changed(histogram_layers=("*",), num_epochs=2**30, eval_every_epochs=7)
  config_lib.validate(c)
  # The first multiples of 7 from these fractions of 2^62 on.
  assert config_lib.histogram_epochs(c) == tuple(
      -(-start // 7) * 7 for start in (
          -(-2**30 // 40), 2**30 // 8, -(-11 * 2**30 // 40)))
  config_lib.validate(changed(
      histogram_layers=("*",), num_epochs=2**30, histogram_epochs=(2**29, 2**30)))
  assert refusal(histogram_layers=("*",), num_epochs=10, eval_every_epochs=4,
                 histogram_epochs=(4, 9)).startswith("config.histogram_epochs=(4, 9)")


# Values that are no one's wish, for each type of a field.
_NUMBERS = (0, -1, 2**31, 2**32, 2**63, 10**400, 10**5000)
HOSTILE = {
    int: _NUMBERS,
    float: (0.0, -0.0, -1.0, 1e308, -1e308, 5e-324, math.nan, math.inf, -math.inf),
    str: ("", "a" * 10**5, "a/" * 10**4, "a\0b", "a\nb", "\ud800", "~nobody/x", "$NONE",
          "../" * 2000, "*" * 100, "%s%n{}", "/dev/zero", "/proc/self/mem"),
    bool: (0, 1, "true"),
    tuple: ((), ((),), (0,), (-1,), (2**63,), (10**400,), (1e308,), (5e-324,),
            (math.nan,), (math.inf,), ("",), ("a" * 10**5,), (None,), ([],), ({},),
            (True,), (1,) * 10**5, (("*", 1),) * 1000, (("a" * 10**5, 1),),
            (("*" * 100, 1),), (("*", 2**63),), (("*", math.nan),),
            functools.reduce(lambda inner, _: (inner,), range(5000), ()))}


@pytest.mark.parametrize("name", list(DEFAULT))
def test_hostile_values_are_refused_in_a_line(name):
  streamed = name in ("crop_size", "crop_scale", "eval_resize", "data_workers")
  dataset = "imagenet2012" if streamed else "digits"
  default = config_lib.default_config(dataset)
  fields = default.to_dict() | {"histogram_layers": ("*",)}
  for value in itertools.chain.from_iterable(HOSTILE.values()):
    config = config_dict.ConfigDict(fields | {name: value}, type_safe=False)
    try:
      config_lib.validate(config)
    except errors.UsageError as error:
      assert name in str(error) or name in ("dataset", "network", "num_epochs")
      assert "\n" not in str(error) and len(str(error)) < 1500
    try:
      setattr(default, name, value)
      default = config_lib.default_config(dataset)
    except errors.UsageError as error:
      assert str(error).startswith(f"config.{name}=") and len(str(error)) < 1500


@pytest.mark.parametrize("name", ["input_bits", "weight_bits"])
@pytest.mark.parametrize("value", [
    0, 6, 8, 16, 32, -1, True, False, 1.0, "3", "float64", "", "int8", NAN, (1,), [1],
    None, {}, 10**30])
def test_bits_that_no_quantizer_has(name, value):
  message = refusal(**{name: value})
  assert message.startswith(f"config.{name}") and message.endswith(BITS)
  assert repr(value) in message
  rules = (("conv1", 1), ("conv2", value))
  message = refusal(bits_rules=rules)
  assert message.startswith("config.bits_rules") and message.endswith(BITS)
  assert repr(value) in message


@pytest.mark.parametrize("bits, values, allowed", [
    (2, [(0.0,), (-0.1,), (NAN,), (INF,), (0.1, 0.2), ("0.1",), (None,), (True,)],
     "() or 1 positive, ascending numbers, for bits=2"),
    (3, [(0.1, 0.2), (0.1, 0.3, 0.2), (0.1, 0.1, 0.2), (0.0, 0.1, 0.2),
         (0.1, NAN, 0.3), (0.1, 0.2, 0.3, 0.4), ((0.1, 0.2, 0.3),)],
     "() or 3 positive, ascending numbers, for bits=3"),
    (4, [(0.1,) * 7], "() or 7 positive, ascending numbers, for bits=4"),
    ("bfloat16", [(0.1,)], "(): bits='bfloat16' has no thresholds"),
])
@pytest.mark.parametrize("operand", ["input", "weight"])
def test_thresholds(operand, bits, values, allowed):
  for value in values:
    name = f"{operand}_thresholds"
    message = refusal(**{f"{operand}_bits": bits, name: value})
    assert message == f"config.{name}={value!r}: must be {allowed}"


@pytest.mark.parametrize("crop_size, first_padding, widths, fits", [
    (8, "SAME", 6, True), (7, "SAME", 6, False), (7, "SAME", 5, True),
    (10, "VALID", 6, True), (9, "VALID", 6, False), (32, "SAME", 11, True),
    (32, "SAME", 12, False), (3, "VALID", 1, True), (2, "VALID", 1, False),
    (1, "SAME", 1, True)])
def test_layers_that_fit_a_crop(crop_size, first_padding, widths, fits):
  fields = dict(crop_size=crop_size, first_padding=first_padding,
                conv_widths=(4,) * widths)
  if fits:
    config_lib.validate(changed(**fields))
  else:
    assert refusal(**fields).startswith("config.conv_widths=(4,")


def test_pooling_after_each_convolution():
  """Four poolings leave one of 16 pixels, and nothing of 15."""
  fields = dict(conv_widths=(4, 4, 4, 4), pool_layers=(1, 2, 3, 4))
  config_lib.validate(changed(crop_size=16, **fields))
  assert refusal(crop_size=15, **fields).startswith("config.conv_widths=(4,")


def test_the_image_bounds_the_crop():
  assert refusal(dataset="digits", crop_size=9, crop_padding=4) == (
      "config.crop_size=9: must be at most 8, the image of digits")


@pytest.mark.parametrize("fields, bits", [
    ({"input_bits": 2}, 2), ({"weight_bits": 3}, 3),
    ({"bits_rules": (("conv2", 5),)}, 5)])
def test_stochastic_aqe_is_for_one_bit(fields, bits):
  assert refusal(estimator="stochastic_aqe", **fields) == (
      "config.estimator='stochastic_aqe': must be another where bits are "
      f"{bits}: it is defined for one bit")


def test_estimators_for_one_bit_fit_their_own_operands():
  """An estimator for one bit may be that of inputs or of weights alone."""
  config_lib.validate(changed(
      input_estimator="approx_sign", input_bits=1, weight_bits=2))
  config_lib.validate(changed(
      estimator="approx_sign", input_estimator="ste", input_bits=2, weight_bits=1))
  assert refusal(input_estimator="approx_sign", input_bits=2, weight_bits=1) == (
      "config.input_estimator='approx_sign': must be another where bits are 2: it is"
      " defined for one bit")
  assert refusal(estimator="approx_sign", input_estimator="ste", weight_bits=2) == (
      "config.estimator='approx_sign': must be another where bits are 2: it is"
      " defined for one bit")


@pytest.mark.parametrize("fields, message", [
    ({"estimator": "aqe", "input_estimator": "lsq"},
     "config.input_estimator='lsq': must be '' with estimator='aqe', because"),
    ({"estimator": "lsq", "input_estimator": "ste"},
     "config.input_estimator='ste': must be '' with estimator='lsq', because"),
    ({"estimator": "lsq", "weight_scale": "layer_mean"},
     "config.weight_scale='layer_mean': must be 'none' with estimator='lsq'"),
    ({"estimator": "lsq", "pad_value": -1.0},
     "config.pad_value=-1.0: must be 0.0 with estimator='lsq'"),
    ({"estimator": "approx_sign", "optimizer": "bop"},
     "config.estimator='approx_sign': must be one of aqe, dsq, ewgs, parq, reste, ste"),
    ({"estimator": "ste", "optimizer": "bop", "ovsw_decay": 0.1},
     "config.ovsw_decay=0.1: must be 0.0 with optimizer='bop'"),
    ({"step_per_channel": True},
     "config.step_per_channel=True: must be False with estimator='aqe'"),
    ({"learn_input_thresholds": True},
     "config.learn_input_thresholds=True: must be False with input_bits=1"),
    ({"learn_input_thresholds": True, "input_bits": 2, "estimator": "lsq"},
     "config.learn_input_thresholds=True: must be False with estimator='lsq'"),
    ({"learn_input_thresholds": True, "input_bits": 2, "input_thresholds": (1.0,)},
     "config.input_thresholds=(1.0,): must be less than 1 with"),
    ({"weight_frequency": 20.0, "ovsw_decay": 0.1},
     "config.ovsw_decay=0.1: must be 0.0 with a weight_frequency"),
    ({"estimator": "lsq", "optimizer": "bop"},
     "config.estimator='lsq': must be one of aqe, dsq, ")])
def test_what_does_not_go_together(fields, message):
  assert refusal(**fields).startswith(message)


def full_config():
  """Tuples, tuples of tuples, and bits of both kinds."""
  c = config_lib.default_config()
  c.update(input_bits="bfloat16", weight_bits=3, weight_thresholds=(0.25, 1, 2.5),
           bits_rules=(("conv1", "float32"), ("norm_*", 2)), dense_widths=(),
           learning_rate_steps=(0.1,), init_from="wörk", learning_rate=1e-3)
  return c


@pytest.mark.parametrize("make", [config_lib.default_config, full_config])
def test_json_round_trip(make):
  config = make()
  text = config_lib.to_json(config)
  back = config_lib.from_json(text)
  assert config_lib.differing_fields(back, config) == []
  assert back.to_dict() == config.to_dict()
  for name in config:
    assert type(back[name]) is type(config[name])
  config_lib.validate(back)
  assert config_lib.to_json(back) == text
  back.update(input_bits="float16", weight_bits=2)  # Either is still a free choice.


def test_json_is_for_people_too():
  text = config_lib.to_json(full_config())
  assert text.endswith('"weight_threshold_rule": "layer_mean",\n'
                       '  "weight_thresholds": [\n    0.25,\n    1,\n    2.5\n  ]\n}\n')
  values = json.loads(text)
  assert list(values) == sorted(DEFAULT)
  assert values["bits_rules"] == [["conv1", "float32"], ["norm_*", 2]]


GOOD = config_lib.to_json(DEFAULT)


@pytest.mark.parametrize("text, message", [
    ("", "config.json is damaged: "),
    ("not JSON", "config.json is damaged: "),
    (GOOD[:300], "config.json is damaged: "),
    (GOOD[:-3], "config.json is damaged: "),
    ("null", "config.json is damaged: "),
    ("3", "config.json is damaged: "),
    ('"text"', "config.json is damaged: "),
    (GOOD.replace('"seed": 0', '"sed": 0'),
     "config field 'sed' does not exist; did you mean 'seed'"),
    (GOOD.replace('"seed": 0', '"seed": "a"'),
     "config.seed='a': must be of type int"),
    (GOOD.replace('"seed": 0', '"seed": NaN'), "config.seed=nan: must be of type int"),
    (GOOD.replace('"random_flip": true', '"random_flip": 1'),
     "config.random_flip=1: must be of type bool"),
    (GOOD.replace('"seed": 0', '"seed": [0]'),
     r"config.seed=\(0,\): must be of type int"),
])
def test_damaged_json(text, message):
  assert text != GOOD
  with pytest.raises(errors.UsageError, match=f"^{message}"):
    config_lib.from_json(text)


def test_fields_that_are_newer_than_a_file():
  text = GOOD.replace('  "seed": 0,\n', "")
  text = text.replace('"batch_size": 256', '"batch_size": 2')
  config = config_lib.from_json(text)
  assert text != GOOD and config.batch_size == 2
  assert config_lib.differing_fields(config, DEFAULT) == ["batch_size: 2, 256"]


def test_differing_fields():
  a, b = config_lib.default_config(), config_lib.default_config()
  assert config_lib.differing_fields(a, b) == []
  b.seed, b.conv_widths, a.input_bits = 3, (8,), "bfloat16"
  assert config_lib.differing_fields(a, b) == [
      "conv_widths: (64, 64, 128, 128, 256, 256), (8,)",
      "input_bits: 'bfloat16', 1",
      "seed: 0, 3"]
  a.unlock()
  b.unlock()
  del a.seed
  b.more = 1
  assert config_lib.differing_fields(a, b)[2:] == ["more: None, 1", "seed: None, 3"]


def test_a_copy_is_independent():
  config = config_lib.default_config().lock()
  copy = config_lib.copy(config, seed=4, input_bits=3, conv_widths=(8,))
  assert (copy.seed, copy.input_bits, copy.conv_widths) == (4, 3, (8,))
  copy.weight_bits = "bfloat16"
  copy.learning_rate = 1.0
  assert config_lib.differing_fields(config, config_lib.default_config()) == []
  config.weight_bits = 5
  assert copy.weight_bits == "bfloat16"
  assert config_lib.differing_fields(config_lib.copy(config), config) == []


@pytest.mark.parametrize("text, expected", [
    ("", {}),
    ("seed=3", {"seed": 3}),
    ("network=A,seed=3", {"network": "A", "seed": 3}),
    ("network='A',bits=bfloat16", {"network": "A", "bits": "bfloat16"}),
    ("bits=1.5,network=a=b", {"bits": 1.5, "network": "a=b"}),
    (",seed=1,,seed=2,", {"seed": 2}),
    ("network=", {"network": ""}),
    ("bits=True,network=None", {"bits": True, "network": None}),
    ("network=ü(", {"network": "ü("}),
])
def test_parse_argument(text, expected):
  defaults = {"network": "D", "seed": 0, "bits": 1}
  parsed = config_lib.parse_argument(text, **defaults)
  assert parsed.to_dict() == defaults | expected
  for name, value in expected.items():
    assert type(parsed[name]) is type(value)


@pytest.mark.parametrize("text, message", [
    ("sed=1", "config argument 'sed' does not exist; did you mean 'seed'?"),
    ("seed=1,=2", "config argument '' does not exist; known: network, seed"),
    ("seed", "config argument='seed': must be name=value"),
    ("network=A,3", "config argument='3': must be name=value"),
])
def test_parse_argument_refuses(text, message):
  with pytest.raises(errors.UsageError) as error:
    config_lib.parse_argument(text, network="D", seed=0)
  assert str(error.value) == message


def test_crop_of_other_networks():
  c = config_lib.copy(config_lib.default_config(), network="alexnet", crop_size=32)
  with pytest.raises(errors.UsageError,
                     match="config.crop_size=32: must be at least 57"):
    config_lib.validate(c)


def test_crops_of_streamed_images():
  assert refusal(dataset="imagenet2012", crop_size=257) == (
      "config.eval_resize=256: must be 0 or at least crop_size=257")


def test_only_a_part_of_what_is_in_memory():
  assert refusal(dataset="imagenet2012", train_examples=20_000) == (
      "config.train_examples=20000: must be 0: imagenet2012 is not in memory")


@pytest.mark.parametrize("num_epochs, every, given, epochs", [
    (200, 1, (), (5, 25, 55)),  # Those of the paper's Figs 1 to 4.
    (40, 1, (), (1, 5, 11)),
    (100, 1, (), (3, 13, 28)),  # 2.5, 12.5 and 27.5, rounded up to whole epochs.
    (200, 10, (), (10, 30, 60)),  # Rounded up to epochs with a validation.
    (3, 1, (), (1,)),
    (3, 2, (), (2,)),
    (1, 5, (), (1,)),
    (10, 7, (), (7,)),
    (200, 1, (4, 9), (4, 9)),
])
def test_histogram_epochs(num_epochs, every, given, epochs):
  c = config_lib.default_config()
  c.update(num_epochs=num_epochs, eval_every_epochs=every, histogram_epochs=given,
           histogram_layers=("conv2",))
  config_lib.validate(c)
  assert config_lib.histogram_epochs(c) == epochs
