"""Training, evaluation and the XLA backend under strict dtype and rank promotion."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from minw import config as config_lib
from minw import estimators
from minw import evaluate
from minw import histograms
from minw import infer
from minw import models
from minw import train_step
from minw.experiment import Experiment
from minw.kernels import reference
from minw.kernels import xla
from network_variables import variables_of

pytestmark = pytest.mark.usefixtures("strict")


def tiny(**changes):
  c = config_lib.default_config(dataset="digits")
  c.update(conv_widths=(4, 4), dense_widths=(4,))
  c.update(changes)
  return Experiment(c)


def trace_a_step(experiment):
  """Promotion is checked while a function is traced, so nothing has to be compiled."""
  images = jax.ShapeDtypeStruct((64, *experiment.image_shape), jnp.float32)
  labels = jax.ShapeDtypeStruct((64,), jnp.int32)
  key = jax.eval_shape(lambda: jax.random.key(0))
  state, loss = jax.eval_shape(
      lambda *arguments: train_step.update(experiment, *arguments),
      train_step.abstract_state(experiment), images, labels, key)
  assert (loss.shape, loss.dtype) == ((), jnp.float32)
  shape_of = lambda leaf: (leaf.shape, leaf.dtype)
  assert jax.tree.map(shape_of, state) == jax.tree.map(
      shape_of, train_step.abstract_state(experiment))


def test_promotion_is_strict_here():
  with pytest.raises(Exception, match="jax_numpy_dtype_promotion=strict"):
    jnp.ones(2, jnp.int32) + jnp.ones(2, jnp.float32)
  with pytest.raises(ValueError, match="rank_promotion"):
    jnp.ones((2, 2)) + jnp.ones(2)


@pytest.mark.parametrize("name", [
    pytest.param(name, marks=() if name in ("aqe", "lsq", "parq", "stochastic_aqe")
                 else pytest.mark.slow) for name in estimators.network_estimators()])
def test_estimators(name):
  trace_a_step(tiny(estimator=name))


@pytest.mark.parametrize("changes", [
    dict(optimizer="sgd", weight_decay=1e-4, learning_rate_schedule="steps"),
    dict(optimizer="bop", estimator="ste", learning_rate_schedule="constant"),
    dict(learning_rate_schedule="exponential", compute_dtype="bfloat16",
         sum_dtype="bfloat16", class_weights="balanced"),
    dict(norm_group_size=32, alpha_per_layer=True, share_pool_gradient=True),
    dict(input_bits=2, weight_bits=3, weight_scale="channel_mean", pad_value=1.0),
    dict(input_bits=3, weight_bits=2, learn_input_thresholds=True, ovsw_decay=0.1,
         bits_rules=(("conv2", 1),), ovsw_scaling=0.1),
    dict(estimator="lsq", input_bits=2, step_per_channel=True, weight_frequency=20.0),
    dict(alpha_weights="after", rprelu=True),
    dict(input_bits="bfloat16", weight_bits="float8_e4m3fn", alpha_shape="cosine"),
], ids=str)
def test_fields(changes):
  trace_a_step(tiny(**changes))


@pytest.mark.parametrize("name", [
    "resnet20", pytest.param("alexnet", marks=pytest.mark.slow)])
def test_networks(name):
  c = config_lib.default_config(dataset="imagenet2012")
  c.network = name
  c.eval_resize = c.crop_size = max(models.SMALLEST_IMAGE.get(name, 32), 32)
  trace_a_step(Experiment(c))


def test_batches_and_evaluation():
  experiment = tiny(crop_padding=1, random_flip=True, reestimate_batches=1,
                    histogram_layers=("conv2", "norm_conv1"), num_epochs=4)
  variables = variables_of(experiment.model, experiment.image_shape)
  data = experiment.data.load("validation")
  evaluator = evaluate.Evaluator(experiment)
  assert 0 <= evaluator.hard(variables, data)["accuracy"] <= 1
  alpha = np.float32(0.7)
  assert 0 <= evaluator.mixed(variables, data, alpha)["accuracy"] <= 1
  counted = histograms.make_histograms(experiment)(variables, data, alpha)
  assert [line["layer"] for line in counted] == ["norm_conv1", "conv2"]
  data, order = next(experiment.data.train_batches(experiment.data.load("train"), 0))
  images, labels = jax.eval_shape(
      experiment.data.train_inputs, data, order, jnp.int32(0), jax.random.key(0))
  assert (images.dtype, labels.dtype) == (jnp.float32, jnp.int32)


def test_a_step_with_all_augmentation():
  experiment = tiny(rotation=20.0, brightness=0.2, contrast=0.2, random_erasing=0.5,
                    mixup=0.2, cutmix=1.0, class_weights="balanced")
  state = train_step.abstract_state(experiment)
  after, loss = jax.eval_shape(train_step.make_train_step(experiment), state,
                               *experiment.data.abstract_batch())
  assert (loss.shape, loss.dtype) == ((), jnp.float32)
  assert jax.tree.map(jnp.dtype, after) == jax.tree.map(jnp.dtype, state)


@pytest.mark.parametrize("name", ["digits_convnet"])
def test_xla_backend(name):
  program = infer.load(name, backend="reference").program
  images = np.random.default_rng(0).integers(
      0, 256, (2, *program.source_shape), np.uint8)
  operands, function = xla.logits(program)
  np.testing.assert_array_equal(
      jax.jit(function)(operands, images), reference.logits(program, images))
