"""The hard network against the trained one: what rounding explains, and what not."""

import functools
import re

import flax.linen as nn
import numpy as np
import pytest

from minw import estimators
from minw import layers
from minw import models
from minw import trained
from minw.data import pixels as pixels_lib
import network_variables

PIXELS = pixels_lib.pixels("integer", (0.49, 0.48, 0.45), (0.2, 0.2, 0.2))
SHAPE = (8, 8, 3)
IMAGES = np.random.default_rng(1).integers(0, 256, (70, *SHAPE), np.uint8)


variables_of = functools.partial(
    network_variables.variables_of, shape=SHAPE,
    step=lambda rng, n: rng.uniform(0.3, 1, n))


class Branching(nn.Module):
  """Computes something else in the hard network, where a test says so."""

  kind: str

  @nn.compact
  def __call__(self, x, alpha=1.0, mode="hard"):
    trains = mode in ("train", "mixed")
    x = layers.QuantConv(8, name="conv1")(x, alpha, mode)
    if self.kind == "border" and trains:
      x = x.at[:, 0].set(0)
    x = layers.NormQuant(bits=2, name="norm1")(x, alpha, mode)
    if self.kind == "flip" and trains:
      x = x[:, ::-1]
    layer = "other" if self.kind == "layer" and not trains else "conv2"
    if self.kind == "layer":
      layers.QuantConv(8, name="other" if trains else "conv2")(
          x, alpha, mode) if self.is_initializing() else None
    x = layers.QuantConv(8, name=layer)(x, alpha, mode)
    x = layers.NormQuant(bits=1, name="norm2")(x, alpha, mode)
    x = layers.QuantDense(3, name="last")(x.reshape(x.shape[0], -1), alpha, mode)
    x = layers.NormQuant(bits=None, name="norm_last")(x, mode=mode)
    return -x if self.kind == "end" and trains else x


@pytest.mark.parametrize("count, size", [
    (360, 60), (64, 64), (65, 33), (1, 1), (0, 1), (129, 43), (130, 44)])
def test_even_batch_size(count, size):
  """The largest size is 64."""
  assert trained.even_batch_size(count, 64) == size


def test_a_shorter_last_batch_is_compared_too():
  model = Branching("end")
  found = trained.compare(model, variables_of(model), PIXELS, IMAGES[:5], batch_size=4)
  assert found.problem.startswith("after norm_last: 15 of 15 values")


@pytest.mark.parametrize("kind, problem", [
    ("none", None), ("border", "norm1: [0-9]+ of "), ("flip", "conv2: [0-9]+ of "),
    ("layer", "conv2: is called by the trained network where the hard one calls other"),
    ("end", "after norm_last: 210 of 210 values")])
def test_a_model_that_branches_on_mode_is_found(kind, problem):
  model = Branching(kind)
  found = trained.compare(model, variables_of(model), PIXELS, IMAGES)
  if problem is None:
    assert found == (None, 0, 70)
  else:
    assert re.match(problem, found.problem), found.problem


CONVNET = functools.partial(models.ConvNet, 3, (4, 6), (5,))
RESNET = functools.partial(models.ResNet, 3, (1, 1), (4, 8))
DENSENET = functools.partial(models.DenseNet, 3, (1, 1), 4)


@pytest.mark.gpu
@pytest.mark.parametrize("make, kind", [
    (CONVNET, "plain"), (RESNET, "lsq"),
    *(pytest.param(*slow, marks=pytest.mark.slow) for slow in (
        (RESNET, "bfloat16"),
        (CONVNET, "lsq"), (RESNET, "channel_mean"), (DENSENET, "channel_mean"),
        (DENSENET, "bfloat16")))],
    ids=range(7))
def test_trained_networks_agree(make, kind):
  lsq = dict(estimator=estimators.by_name("lsq")) if kind == "lsq" else {}
  bits = kind if kind == "bfloat16" else 3
  weights = dict(weight_scale=kind) if kind == "channel_mean" else lsq
  model = make(
      conv=functools.partial(layers.QuantConv, bits=bits, **weights),
      dense=functools.partial(layers.QuantDense, bits=2, **weights),
      norm=functools.partial(layers.NormQuant, bits=2, **lsq))
  assert trained.compare(model, variables_of(model), PIXELS,
                         IMAGES[:16]).problem is None


@pytest.mark.parametrize("offset, found", [(1e-5, False), (1e-3, True)])
def test_only_codes_beside_a_threshold_may_differ(offset, found, monkeypatch):
  """A center that is off by rounding is no difference; one that is off by more is."""
  model = Branching("none")
  variables = variables_of(model)
  # Sums are integers; many of them lie between the mean and the center made below.
  norm = variables["batch_stats"]["norm2"]["batch_norm"]
  norm["mean"] = np.round(norm["mean"]) + np.float32(offset / 2)
  variables["params"]["norm2"]["batch_norm"]["bias"] *= 0
  exact = trained.fold.fold_layers

  def shifted(*arguments):
    folded = exact(*arguments)
    hard = folded.hard["hard"]["norm2"]
    hard["center"] = (hard["center"] - np.float32(offset)).astype(np.float32)
    return folded

  monkeypatch.setattr(trained.fold, "fold_layers", shifted)
  problem = trained.compare(model, variables, PIXELS, IMAGES).problem
  assert (problem is not None and problem.startswith("norm2: ")) == found
