"""The files in experiments/, and minw.experiment: what a config comes to."""

import functools
import importlib.util
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from minw import config as config_lib
from minw import config_flag
from minw import errors
from minw import infer
from minw import layers
from minw import models
from minw import pack
from minw import packed
from minw import quantizers
from minw import train
from minw import train_step
from minw import verify
from minw.data import batches
from minw.data import datasets
from minw.data import pixels as pixels_lib
from minw.data import resident
from minw.experiment import Experiment
from minw.experiment import balanced_weights
from minw.experiment import build_model
from packed_models import randomized

FOLDER = pathlib.Path(__file__).parents[1] / "experiments"
FILES = sorted(path.stem for path in FOLDER.glob("*.py"))


def load(name, *argument):
  """What `get_config` of an experiment file returns."""
  spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module.get_config(*argument)


def tiny_config(**changes):
  c = config_lib.default_config()
  c.update(dataset="digits", crop_size=8, conv_widths=(4, 6), dense_widths=(5,),
           batch_size=64, eval_batch_size=64)
  c.update(changes)
  return c


@functools.cache
def experiment_of(name, *argument):
  """The `Experiment` of a file; those of large networks take seconds to construct."""
  return Experiment(load(name, *argument))


@functools.cache
def tiny_experiment():
  return Experiment(tiny_config())


def refusal(**changes):
  with pytest.raises(errors.UsageError) as error:
    Experiment(tiny_config(**changes))
  return str(error.value)


def test_weights_of_classes():
  # 8 images of 3 classes, and a class without any.
  weights = balanced_weights(np.array([1, 3, 0, 4]))
  assert weights == pytest.approx((8 / 3, 8 / 9, 0, 2 / 3))
  assert balanced_weights(np.array([7, 7])) == (1, 1)


def test_there_are_experiments():
  assert {"cifar_convnet", "digits_convnet"} <= set(FILES)


def test_names():
  """Experiments go by the names of their files."""
  assert [*config_flag.experiments()] == FILES
  ours = config_flag.load("cifar_convnet:network=A")
  assert config_lib.differing_fields(ours, load("cifar_convnet", "network=A")) == []


# The fast tests make experiments with other arguments.
_LARGE = ("cifar_densenet100", "cifar_resnet110", "imagenet_alexnet")


@pytest.mark.parametrize("name", [
    pytest.param(name, marks=pytest.mark.slow if name in _LARGE else ())
    for name in FILES])
def test_every_file_gives_a_config_that_can_be_run(name):
  config = load(name)
  config_lib.validate(config)
  experiment = experiment_of(name)
  assert experiment.num_steps > 100
  assert config_lib.differing_fields(
      config_lib.from_json(config_lib.to_json(config)), config) == []


def test_cifar_without_an_argument_is_the_default():
  config = load("cifar_convnet")
  assert config_lib.differing_fields(config, config_lib.default_config()) == []
  assert config_lib.differing_fields(load("cifar_convnet", ""), config) == []


@pytest.mark.parametrize("argument, expected", [
    ("network=A", {"conv_widths": (128, 128, 256, 256, 512, 512),
                   "dense_widths": (1024, 1024)}),
    ("network=B", {"dense_widths": (1024, 1024)}),
    ("network=C", {"dense_widths": (512, 512)}),
    ("dataset=cifar100,network=D", {"dataset": "cifar100"}),
    ("input_bits=2,weight_bits=bfloat16", {"input_bits": 2, "weight_bits": "bfloat16"}),
    ("input_bits=float32,weight_bits=3",
     {"input_bits": "float32", "weight_bits": 3}),
    ("estimator=ste,seed=7", {"estimator": "ste", "seed": 7}),
])
def test_cifar_with_arguments(argument, expected):
  config, default = load("cifar_convnet", argument), config_lib.default_config()
  config_lib.validate(config)
  assert {name: config[name] for name in config if config[name] != default[name]} == (
      expected)


def test_cifar_with_wrong_arguments():
  for argument, message in (
      ("sed=1", "config argument 'sed' does not exist; did you mean 'seed'"),
      ("network=E", "ConvNet 'E' does not exist; known: A, B, C, D"),
      ("A", "config argument='A': must be name=value")):
    with pytest.raises(errors.UsageError, match=message):
      load("cifar_convnet", argument)


@pytest.mark.parametrize("name, ends, argument, bits", [
    ("resnet18", ("stem", "dense1"), (), ["float32", 1, "float32"]),
    ("resnet18", ("stem", "dense1"), ("last=1",), ["float32", 1, 1]),
    pytest.param("alexnet", ("conv1", "dense3"), (), ["float32", 1, "float32"],
                 marks=pytest.mark.slow),
    ("alexnet", ("conv1", "dense3"), ("first=2,last=2,weight_bits=3",), [2, 3, 2])])
def test_imagenet_first_and_last_layers(name, ends, argument, bits):
  experiment = experiment_of(f"imagenet_{name}", *argument)
  config = experiment.config
  found = {layer.path: layer.bits for layer in experiment.layers}
  kernels = [path for path in found if not path.startswith("norm_")]
  assert (kernels[0], kernels[-1]) == ends
  assert [found[path] for path in kernels] == (
      bits[:1] + bits[1:2] * (len(kernels) - 2) + bits[2:])
  assert {found[path] for path in found if path.startswith("norm_")} == {2, None}
  assert config.crop_size == 224 and config.eval_resize == 256


def test_digits():
  config = load("digits_convnet")
  assert (config.dataset, config.crop_size, config.random_flip) == ("digits", 8, False)
  assert (config.input_bits, config.weight_bits, config.estimator) == (1, 1, "aqe")
  # Every evaluation batch is of 360: half of validation, all of test.
  assert datasets.info("digits").splits["test"] % config.eval_batch_size == 0


def take_a_step(experiment, data):
  """One training step from the start; the state before and after, and the loss."""
  state = experiment.jit(lambda: train_step.init_state(experiment))()
  before = jax.device_get(state)
  order = jnp.arange(experiment.info.splits["train"], dtype=jnp.int32)
  after, loss = train_step.make_train_step(experiment)(state, data, order)
  return before, jax.device_get(after), float(loss)


def check_step(experiment, data):
  before, after, loss = take_a_step(experiment, data)
  classes = experiment.info.num_classes
  assert 0.3 * np.log(classes) < loss < 3 * np.log(classes)  # As of a guess.
  assert after.step == 1 and after.totals.diverged_at == -1
  assert after.totals.count == experiment.config.batch_size
  np.testing.assert_allclose(after.totals.loss, loss * after.totals.count, rtol=1e-5)
  for old, new in zip(jax.tree.leaves(before.params), jax.tree.leaves(after.params)):
    assert np.isfinite(new).all() and (old != new).any()
    if experiment.config.optimizer == "adam":
      # The first step is the learning rate, whatever the gradient.
      assert np.abs(new - old).max() < 1.01 * experiment.config.learning_rate


def test_a_step_on_the_digits():
  experiment = experiment_of("digits_convnet")
  assert (experiment.steps_per_epoch, experiment.num_steps) == (19, 760)
  check_step(experiment, experiment.data.load("train"))


def test_a_step_on_images_like_cifars(monkeypatch):
  monkeypatch.setitem(datasets._INFOS, "cifar100", datasets.info("cifar100")._replace(
      splits={"train": 40, "validation": 8, "test": 8}))
  config = load("cifar_convnet", "dataset=cifar100,weight_bits=3,input_bits=2")
  config.update(conv_widths=(8, 8), dense_widths=(8,), batch_size=16,
                eval_batch_size=8)
  experiment = Experiment(config)
  assert experiment.image_shape == (24, 24, 3) and experiment.model.depth == 4
  assert (experiment.steps_per_epoch, experiment.num_steps) == (2, 400)
  images = np.random.default_rng(0).integers(0, 256, (40, 32, 32, 3), np.uint8)
  check_step(experiment, batches.Examples(
      jnp.asarray(images), jnp.arange(40, dtype=jnp.int32)))


# Whole networks on small, made-up images.
SMALL = {
    "cifar_best": dict(crop_size=10, conv_widths=(8, 8), dense_widths=(8,),
                       learning_rate_warmup=0.0),
    "folder_convnet": dict(crop_size=16),
    "cifar_densenet100": dict(crop_size=8),
    "cifar_resnet110": dict(crop_size=8),
    "imagenet_alexnet": dict(crop_size=57, eval_resize=64),
    "imagenet_resnet18": dict(crop_size=32, eval_resize=32),
}


@pytest.mark.slow  # Compiling takes long. ConvNets have tests of their own, above.
@pytest.mark.parametrize("name", [
    name for name in FILES if name not in ("cifar_convnet", "digits_convnet")])
def test_a_step_of_the_other_files(name, monkeypatch):
  config = load(name)
  config.update(batch_size=8, eval_batch_size=8, **SMALL[name])
  info = datasets.info(config.dataset)
  monkeypatch.setitem(datasets._INFOS, config.dataset, info._replace(
      splits={"train": 16, "validation": 8, "test": 8}))
  experiment = Experiment(config)
  assert experiment.num_steps == 2 * config.num_epochs
  # Streamed data come as batches of crops.
  size, shape = ((8, experiment.image_shape) if info.streamed
                 else (16, info.image_shape))
  random = np.random.default_rng(0)
  check_step(experiment, batches.Examples(
      jnp.asarray(random.integers(0, 256, (size, *shape), np.uint8)),
      jnp.asarray(random.integers(0, info.num_classes, size, np.int32))))


def test_steps_and_schedules_of_the_paper():
  experiment = experiment_of("cifar_convnet")
  # 45,000 // 256 = 175 batches in each of 200 epochs.
  assert (experiment.steps_per_epoch, experiment.num_steps) == (175, 35_000)
  assert float(experiment.alpha(0)) == 0.5
  assert float(experiment.alpha(93 * 175)) == 1.0 > float(experiment.alpha(93 * 174))
  np.testing.assert_allclose(
      [experiment.learning_rate(step) for step in (999, 1_000, 34_999)],
      [0.01, 0.009, 0.01 * 0.9**34], rtol=1e-5)
  # Nine layers have weights: 6 + 2 + 1.
  assert experiment.model.depth == len(experiment.grid_layers) == 9
  assert sum(np.prod(layer.kernel_shape)
             for layer in experiment.layers if layer.kernel_shape) == 1_802_432


def test_alpha_by_layer():
  experiment = Experiment(tiny_config(
      alpha_per_layer=True, alpha_end=1.0, num_epochs=4, alpha_start=0.25))
  assert experiment.num_steps == 4 * 19  # Two convolutions, two dense layers.
  assert experiment.alpha(19).tolist() == [1.0, 0.25, 0.25, 0.25]
  assert experiment.alpha(0).shape == (4,) and tiny_experiment().alpha(0).shape == ()
  # The last of the four layers is the first, and weights wait for all activations.
  experiment = Experiment(tiny_config(
      alpha_per_layer=True, alpha_backward=True, alpha_weights="after", alpha_end=1.0,
      num_epochs=8, alpha_start=0.25))
  assert experiment.alpha(19).tolist() == [0.25] * 7 + [1]
  assert experiment.alpha(5 * 19).tolist() == [0.25] * 3 + [1] * 5
  experiment = Experiment(tiny_config(
      alpha_weights="before", alpha_end=1.0, num_epochs=4, alpha_start=0.25))
  assert experiment.alpha(38).tolist() == [1] * 4 + [0.25] * 4


def test_layers_of_the_best_recipe():
  """All weights of ConvNet A have one bit; ResNets have float ends, and a teacher."""
  experiment = experiment_of("cifar_best")
  config = experiment.config
  assert {layer.bits for layer in experiment.layers if layer.kernel_shape} == {1}
  assert sum(np.prod(layer.kernel_shape)
             for layer in experiment.grid_layers.values()) == 10_352_000
  np.testing.assert_allclose(
      experiment.learning_rate(experiment.num_steps), 0, atol=1e-9)
  resnet = Experiment(load("cifar_best", "network=resnet20,dataset=cifar100"))
  assert [layer.path for layer in resnet.layers if layer.bits == "float32"] == [
      "stem", "dense1"]
  assert load("cifar_best", "network=resnet18").network == "cifar_resnet18"
  teacher = load("cifar_best", "weight_bits=float32,input_bits=float32")
  for name in ("dataset", "crop_size", "pixels"):  # A teacher must share these.
    assert teacher[name] == config[name]
  config_lib.validate(teacher)


def test_networks_that_the_best_recipe_lacks():
  with pytest.raises(errors.UsageError, match="network='resnet50': must be A, B, C, D"):
    load("cifar_best", "network=resnet50")


@pytest.mark.parametrize("size, weights", [
    ("tiny", 9 * (32 * 32 + 32 * 64 + 64 * 64)),
    ("small", 9 * (32 * 64 + 64 * 64 + 64 * 96 + 96 * 128 + 128 * 128)),
    ("medium", 9 * (64 * 128 + 128 * 192 + 192 * 256 + 2 * 256 * 256))])
def test_sizes_of_folder_convnets(size, weights):
  """Beside conv2 and so on there are conv1 and dense1. No weight depends on a size."""
  first, last = {"tiny": (32, 64), "small": (32, 128), "medium": (64, 256)}[size]
  weights += 9 * 3 * first + 10 * last
  budget = {"tiny": 10_000, "small": 50_000, "medium": 250_000}[size]
  assert 0.8 * budget < weights / 8 < budget  # Thresholds and texts come in addition.
  for side in (16, 32):  # CIFAR-10 has no larger images.
    config = load("folder_convnet", f"size={size},input_bits=2")
    config.crop_size = side
    experiment = Experiment(config)
    kernels = [layer.kernel_shape for layer in experiment.layers if layer.kernel_shape]
    assert sum(map(np.prod, kernels)) == weights
    assert {layer.bits for layer in experiment.layers} == {1, 2, None}


def test_sizes_that_folder_convnets_lack():
  with pytest.raises(errors.UsageError, match="size 'tinny' does not exist; did you"):
    load("folder_convnet", "size=tinny")


def test_settings_reach_what_they_are_for():
  config = tiny_config(
      input_bits=3, weight_bits=2, input_thresholds=(0.1, 0.2, 0.3),
      weight_thresholds=(0.6,), weight_threshold_rule="channel_mean", norm_momentum=0.7,
      norm_epsilon=1e-3, norm_scale=False, first_padding="VALID", pad_value=-1.0,
      compute_dtype="bfloat16", bits_rules=(("conv1", 5), ("norm_conv?", "bfloat16"),
                                            ("norm_conv2", 4)))
  model = build_model(config)
  conv, norm = model.conv.keywords, model.norm.keywords
  assert model.first_padding == "VALID" and conv["pad_value"] == -1.0
  for layer in (conv, model.dense.keywords):
    assert layer["threshold_rule"] == "channel_mean" and layer["thresholds"] == (0.6,)
    assert layer["dtype"] == jnp.bfloat16
    assert [layer["bits"](name) for name in ("conv1", "conv2", "dense1")] == [5, 2, 2]
  assert norm["thresholds"] == (0.1, 0.2, 0.3) and norm["use_scale"] is False
  assert norm["momentum"] == 0.7 and norm["epsilon"] == 1e-3
  names = ("norm_conv1", "norm_conv2", "norm_dense1")
  assert [norm["bits"](name) for name in names] == ["bfloat16", 4, 3]
  assert model.pool.keywords == {"share_gradient": False}
  other = build_model(config, share_pool_gradient=True, dataset="cifar100")
  assert other.pool.keywords == {"share_gradient": True} and other.num_classes == 100
  assert config.dataset == "digits"


def test_methods_reach_their_layers():
  """RPReLU follows every batch norm but that of the logits."""
  model = build_model(tiny_config(
      rprelu=True, learn_input_thresholds=True, input_bits=2, estimator="ste",
      weight_frequency=20.0))
  assert model.conv.keywords["frequency"] == model.dense.keywords["frequency"] == 20
  params = jax.eval_shape(lambda: layers.initialize(model, (8, 8, 1)))["params"]
  names = ["batch_norm", "rprelu_beta", "rprelu_gamma", "rprelu_zeta",
           "threshold_widths"]
  for name in ("norm_conv1", "norm_conv2", "norm_dense1"):
    assert sorted(params[name]) == names
  assert list(params["norm_dense2"]) == ["batch_norm"]
  model = build_model(tiny_config(estimator="lsq", step_per_channel=True))
  params = jax.eval_shape(lambda: layers.initialize(model, (8, 8, 1)))["params"]
  assert params["conv2"]["step"].shape == (6,)
  assert params["norm_conv2"]["step"].shape == ()


@pytest.mark.parametrize("fields", [
    {"input_bits": 3, "learn_input_thresholds": True},
    pytest.param({"network": "resnet20", "input_bits": 1}, marks=pytest.mark.slow)],
    ids=["convnet", "resnet20"])
def test_networks_with_rprelu_pack(fields):
  """Bit for bit, with slopes, shifts and thresholds of any sign."""
  experiment = Experiment(tiny_config(rprelu=True, **fields))
  variables = randomized(experiment.model, experiment.image_shape)
  slopes = variables["params"]["norm_conv1" if "network" not in fields else "norm_stem"]
  assert (slopes["rprelu_beta"] < 0).any()
  program = pack.pack(experiment.model, variables, pixels=experiment.pixels,
                      source_shape=experiment.info.image_shape)
  hard = experiment.fold(variables)
  images = experiment.data.source_images("test")[:16]
  network = infer.Network(packed.to_bytes(program), "reference", 1)
  assert not list(verify.differences(
      program, experiment.model, hard, experiment.pixels, images, [network]))
  logits = jax.jit(functools.partial(experiment.model.apply, mode="hard"))(
      hard, pixels_lib.normalize(images, experiment.pixels))
  np.testing.assert_array_equal(network.logits(images), logits)


def test_inputs_may_have_an_estimator_of_their_own():
  """At 1/4 the slope of the straight-through estimator is 1, of approx_sign 3/2."""
  grid = quantizers.input_grid(1)

  def slopes(**fields):
    model = build_model(tiny_config(**fields))
    return [float(jax.grad(
        lambda x, f=f: f.keywords["estimator"](x, 0.5, grid, None))(0.25))
        for f in (model.conv, model.dense, model.norm)]

  assert slopes(estimator="ste") == [1, 1, 1]
  assert slopes(estimator="ste", input_estimator="approx_sign") == [1, 1, 1.5]
  assert slopes(estimator="approx_sign", input_estimator="ste") == [1.5, 1.5, 1]


def test_kernels_start_as_told():
  # 3x3 kernels of 4 inputs and 6 outputs.
  for name, limit in (("glorot_uniform", np.sqrt(6 / (9 * 4 + 9 * 6))),
                      ("he_uniform", np.sqrt(6 / (9 * 4)))):
    model = build_model(tiny_config(kernel_init=name))
    initialize = model.conv.keywords["kernel_init"]
    assert model.dense.keywords["kernel_init"] is initialize
    kernel = np.asarray(jax.jit(lambda initialize=initialize: initialize(
        jax.random.key(0), (3, 3, 4, 6)))())
    assert 0.95 * limit < np.abs(kernel).max() <= limit


def test_layers_on_a_grid():
  experiment = Experiment(tiny_config(
      bits_rules=(("conv1", "float32"), ("dense?", 3), ("dense2", "bfloat16"))))
  assert list(experiment.grid_layers) == ["conv2", "dense1"]
  assert list(tiny_experiment().grid_layers) == ["conv1", "conv2", "dense1", "dense2"]


def test_batches_are_made_as_configured():
  experiment = Experiment(tiny_config(
      crop_size=7, crop_padding=2, random_flip=False, pixels="standardized",
      eval_batch_size=60))
  assert experiment.image_shape == (7, 7, 1)
  assert experiment.pixels == pixels_lib.pixels("standardized", (0.3055,), (0.3761,))
  data = experiment.data.load("validation")
  assert isinstance(data, batches.Examples) and data.images.shape == (180, 8, 8, 1)
  order = resident.epoch_order(0, 0, 180)
  images, labels = jax.jit(experiment.data.train_inputs)(
      data, order, 1, jax.random.key(4))
  expected = jax.jit(lambda key: resident.random_crops(
      data, order, 1, key, batch_size=64, crop_size=7, crop_padding=2, flip=False,
      pixels=experiment.pixels))(jax.random.key(4))
  np.testing.assert_array_equal(images, expected[0])
  np.testing.assert_array_equal(labels, np.asarray(data.labels)[order[64:128]])
  images, labels, mask = jax.jit(experiment.data.eval_inputs)(data, 128)
  assert images.shape == (60, 7, 7, 1) and int(mask.sum()) == 180 - 128
  np.testing.assert_allclose(
      images[3], (data.images[131, :7, :7] / 255 - 0.3055) / 0.3761, rtol=1e-5)


@pytest.mark.parametrize("changes, message", [
    ({"seed": -1}, "config.seed=-1: must be in [0, 2^32)"),
    ({"batch_size": 1_258},
     "config.batch_size=1258: must be at most 1257, the training examples of digits"),
    ({"batch_size": 128, "train_examples": 127},
     "config.batch_size=128: must be at most 127, the training examples of digits"),
    ({"eval_batch_size": 10**12}, "config.eval_batch_size=1000000000000: must be at "),
    ({"num_epochs": 2**31 - 1},
     "config.num_epochs=2147483647: must be at most 1130254"),
    ({"bits_rules": (("conv1", 2), ("conv3", 2))},
     "config.bits_rules='conv3': must be a pattern that matches one of conv1, "
     "norm_conv1, conv2, norm_conv2, dense1, norm_dense1, dense2"),
    # The last batch norm gives the logits, which have no bits.
    ({"bits_rules": (("norm_dense2", 2),)}, "config.bits_rules='norm_dense2': must "),
    ({"bits_rules": (("Conv1", 2),)}, "config.bits_rules='Conv1': must be a pattern "),
    ({"bits_rules": (("", 2),)}, "config.bits_rules='': must be a pattern that "),
])
def test_refused(changes, message):
  assert refusal(**changes).startswith(message)


def test_an_epoch_of_one_batch():
  experiment = Experiment(tiny_config(batch_size=1_257, eval_batch_size=1_257,
                                      num_epochs=3))
  assert (experiment.steps_per_epoch, experiment.num_steps) == (1, 3)


def test_init_from_a_run_of_other_shapes(monkeypatch):
  other = Experiment(tiny_config(conv_widths=(4, 7)))
  tree = jax.eval_shape(lambda: train_step.init_state(other))._asdict()
  saved = type("Saved", (), {"step": 0, "tree": tree})
  monkeypatch.setattr(train.checkpoint, "read_run",
                      lambda workdir, data_dir: train.checkpoint.Run(None, saved, {}))
  with pytest.raises(errors.UsageError) as error:
    train.read_source("there", tiny_experiment())
  assert str(error.value).startswith(
      "config.init_from='there': must be a run of the same shapes: ")
  assert "params/conv2/kernel (3, 3, 4, 7) there, (3, 3, 4, 6) here" in str(error.value)


def test_convnets():
  assert models.convnet_widths("D") == ((64, 64, 128, 128, 256, 256), (256, 256))
  with pytest.raises(errors.UsageError, match="ConvNet '3' does not exist"):
    models.convnet_widths(3)


@pytest.mark.parametrize("name, steps, drops", [
    # 182 epochs of 45,000 // 128 steps, and 300 of 45,000 // 64.
    ("cifar_resnet110", 63_882, (31_941, 37_930)),
    ("cifar_densenet100", 210_900, (105_450, 158_175))])
def test_recipes_of_table_three(name, steps, drops):
  experiment = Experiment(load(name, "dataset=cifar100,seed=3"))
  assert experiment.num_steps == steps
  assert experiment.model.num_classes == 100 and experiment.config.seed == 3
  rates = [float(experiment.learning_rate(at + d)) for at in drops for d in (-1, 1)]
  np.testing.assert_allclose(rates, [0.1, 0.01, 0.01, 0.001], rtol=1e-5)
  bits = {info.path: info.bits for info in experiment.layers}
  assert {bits[path] for path in bits if not path.startswith("norm_")} == {3}
