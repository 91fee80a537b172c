"""Models of `minw.models` with random variables, and what they are packed to."""

import functools

import flax.linen as nn
import numpy as np

from minw import config_flag
from minw import experiment
from minw import layers
from minw import models
from minw import pack
from minw.data import pixels as pixels_lib
from network_variables import variables_of


def _scales(rng, n):
  scale = rng.normal(0, 1, n).astype(np.float32)
  scale[::5], scale[1::7] = 0, 1e-30
  return scale


def randomized(model: nn.Module, shape, seed: int = 0):
  """Variables with batch norms of any sign, also of scale zero and tiny."""
  normal = lambda rng, n: rng.normal(0, 1, n)
  return variables_of(
      model, shape, seed, kernel=normal, other=normal, scale=_scales,
      mean=lambda rng, n: rng.normal(0, 4, n),
      var=lambda rng, n: rng.uniform(0.1, 40, n))


@functools.cache
def convnet(weights=1, inputs=1, *, name=None, shape=(32, 32, 3), crop=(24, 24)):
  """A packed ConvNet, of random variables; a narrow one without a name."""
  widths = models.CONVNETS[name] if name else ((6, 40, 8), (33,))
  model = models.ConvNet(
      10, *widths, conv=functools.partial(layers.QuantConv, bits=weights),
      dense=functools.partial(layers.QuantDense, bits=weights),
      norm=functools.partial(layers.NormQuant, bits=inputs))
  return packed_model(model, shape, crop)


def packed_model(model, shape, crop):
  pixels = pixels_lib.pixels(
      "integer", (0.49, 0.48, 0.45)[:shape[2]], (0.2,) * shape[2])
  return pack.pack(
      model, randomized(model, (*crop, shape[2])), pixels=pixels, source_shape=shape,
      crop=crop, labels=[f"number {i}" for i in range(10)],
      metadata={"config_hash": "a1b2", "step": 7, "config": {}})


def digits_convnet():
  return convnet(shape=(8, 8, 1), crop=(8, 8))


def pooled_convnet(bits=1, widths=(32, 32, 64)):
  """Like `folder_convnet`: two pools at the start, and a sum over the last map."""
  model = models.ConvNet(
      10, widths, (), pool_layers=(1, 2), global_pool=True,
      conv=functools.partial(layers.QuantConv, bits=bits),
      dense=functools.partial(layers.QuantDense, bits=bits),
      norm=functools.partial(layers.NormQuant, bits=bits))
  return packed_model(model, (12, 13, 1), (12, 13))


def folder_convnet(size, weights=1, inputs=1):
  """A network of the experiment `folder_convnet`, for images of 32x32 pixels."""
  config = config_flag.load(
      f"folder_convnet:size={size},weight_bits={weights},input_bits={inputs}")
  return packed_model(experiment.Experiment(config).model, (32, 32, 3), (32, 32))


def resnet18():
  """At full size."""
  shape = (224, 224, 3)
  return packed_model(models.NETWORKS["resnet18"](10), shape, shape[:2])


# Makers of the networks at full size.
WHOLE = [*(functools.partial(convnet, name=name) for name in "ABCD"), resnet18]
