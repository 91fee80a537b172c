"""Random networks, out of all that may be packed and of what nearly may.

A `RandomNetwork` draws its structure from its seed while it is called, so that every
mode sees the same network. `near_miss` names the one thing in it that a user might
write and that cannot be packed, or only just; "" stands for none.
"""

import flax.linen as nn
import jax
from jax import lax
import jax.numpy as jnp
import numpy as np

from minw import estimators
from minw import layers

NEAR_MISSES = (
    *[""] * 16, "cast", "cast", "narrow cast", "odd padding", "subclass",
    "shared conv", "shared norm", "own dense", "own norm", "prelu", "relu",
    "transpose", "4 bits", "odd pad value", "two outputs", "norm of codes",
    "fixed mode", "mean of 3", "own parameter", "constant")
_CASTS = ("bfloat16", "float16", "int8", "int32", "uint8", "bool", "float8_e4m3fn")


class _Reversed(layers.QuantConv):
  """A user's subclass: what follows the convolution is lost if it packs as its base."""

  @nn.compact
  def __call__(self, x, alpha=1.0, mode="hard"):
    return super().__call__(x, alpha, mode)[..., ::-1]


class _Block(nn.Module):
  """A convolution and its quantizer, which keep the shape."""

  features: int
  weight_bits: int
  bits: int

  @nn.compact
  def __call__(self, x, alpha=1.0, mode="hard"):
    x = layers.QuantConv(self.features, bits=self.weight_bits)(x, alpha, mode)
    return layers.NormQuant(bits=self.bits)(x, alpha, mode)


class RandomNetwork(nn.Module):
  """A network of one to three blocks of convolutions, and one or two dense layers."""

  seed: int

  @property
  def near_miss(self) -> str:
    """What in this network cannot be packed, or is at the edge of it; "": nothing."""
    return str(np.random.default_rng(self.seed).choice(NEAR_MISSES))

  @nn.compact
  def __call__(self, x, alpha=1.0, mode="hard"):
    draw = _Draw(self.seed)
    place = draw.integer(0, 1)  # The block with the near miss.
    blocks = place + draw.integer(1, 2)
    codes = []
    for i in range(blocks):
      miss = self.near_miss if i == place else ""
      x = self._block(draw, x, codes, miss, alpha, mode)
      codes.append(x)
    extra = x
    x = draw.one_of(
        lambda: x.reshape(x.shape[0], -1), lambda: x.sum((1, 2)),
        lambda: x.max((1, 2)), lambda: x.sum((1, 2), keepdims=True)[:, 0, 0])
    if draw.chance(0.3):
      x = layers.QuantDense(draw.integer(2, 6), **draw.weights(self.near_miss))(
          x, alpha, mode)
      x = layers.NormQuant(**draw.norm(""))(x, alpha, mode)
    x = layers.QuantDense(4, **draw.weights(""))(x, alpha, mode)
    x = layers.NormQuant(bits=None)(x, mode=mode)
    return (x, extra) if self.near_miss == "two outputs" else x

  def _block(self, draw, x, codes, miss, alpha, mode):
    """Sums of convolutions, what may stand after them, and a quantizer."""
    before, first = x, not codes
    make = _Reversed if miss == "subclass" else layers.QuantConv
    conv = make(draw.integer(1, 3) * 2, **draw.convolution(x, first, miss))
    y = conv(x, alpha, "mixed" if miss == "fixed mode" else mode)
    if miss == "shared conv" and not first and y.shape == x.shape:
      y = conv(layers.NormQuant(**draw.norm(""))(y, alpha, mode), alpha, mode)
    if draw.chance(0.25):
      other = layers.QuantConv(y.shape[-1], bits=conv.bits)
      y = draw.one_of(
          lambda: y + layers.QuantConv(
              conv.features, conv.kernel_size, conv.strides, conv.padding,
              bits=draw.bits())(x, alpha, mode) if conv.kernel_dilation == (1,
                                                                            1) else y,
          lambda: jnp.concatenate([y, y], -1),
          lambda: jnp.concatenate([y, other(
              layers.NormQuant(**draw.norm(""))(y, alpha, mode), alpha, mode)], -1))
    y = self._between(draw, y, miss)
    norm = layers.NormQuant(**draw.norm(miss))
    alike = [c for c in (before, *codes) if c.shape == y.shape and not first]
    shortcut = alike[-1] if alike and draw.chance(0.5) else None
    x = norm(y, alpha, mode, shortcut=shortcut)
    if miss == "shared norm":
      x = layers.QuantConv(x.shape[-1], bits=draw.bits())(x, alpha, mode)
      x = norm(x, alpha, mode)
    if miss == "norm of codes":
      x = layers.NormQuant(bits=1)(x, alpha, mode)
    return self._after(draw, x, miss, alpha, mode)

  def _between(self, draw, y, miss):
    """What may stand between sums and their batch norm."""
    if draw.chance(0.3) and min(y.shape[1:3]) >= 3:
      y = draw.one_of(
          lambda: layers.max_pool(y, 2), lambda: layers.max_pool(y, 3, True),
          lambda: nn.max_pool(y, (2, 3), (1, 2)),
          lambda: nn.max_pool(y, (3, 3), (2, 2), padding=((1, 1), (0, 2))),
          lambda: nn.avg_pool(y, (2, 2), (2, 2)),
          lambda: nn.avg_pool(y, (2, 1), (1, 1)))
    if miss == "own parameter" or draw.chance(0.1):
      name = f"{draw.integer(0, 10**6)}"
      shift = self.param("shift" + name, _normal, (y.shape[-1],))
      factor = self.param("factor" + name, _normal, (y.shape[-1],))
      y = draw.one_of(
          lambda: y + shift, lambda: y - shift, lambda: y * factor + shift,
          lambda: (y - shift) / factor, lambda: y * factor)
      if miss:
        y = draw.one_of(
            lambda: y * jnp.exp(factor), lambda: y + shift * y, lambda: y + factor,
            lambda: shift - y, lambda: layers.max_pool(y, min(y.shape[1:3])))
    odd = {
        "cast": lambda: y.astype(draw.one_of(*_CASTS)).astype(jnp.float32),
        "narrow cast": lambda: lax.reduce_precision(y, 8, draw.integer(2, 10)),
        "relu": lambda: nn.relu(y), "prelu": lambda: nn.PReLU()(y),
        "transpose": lambda: y.transpose(0, 2, 1, 3),
        "mean of 3": lambda: nn.avg_pool(y, (1, min(3, y.shape[2])), (1, 1)),
        "own dense": lambda: nn.Dense(y.shape[-1], use_bias=False)(y),
        "own norm": lambda: nn.BatchNorm(use_running_average=True)(y),
        "constant": lambda: y + draw.one_of(0.0, 1.0, 0.37),
    }
    return odd[miss]() if miss in odd else y

  def _after(self, draw, x, miss, alpha, mode):
    """What may stand after a quantizer."""
    choices = [lambda: x] * 6
    if min(x.shape[1:3]) >= 3:
      choices += [
          lambda: layers.max_pool(x, 2), lambda: x[:, ::2, ::2],
          lambda: nn.avg_pool(x, (2, 2), (1, 1)),
          lambda: nn.max_pool(x, (3, 2), (2, 1), "SAME")]
    choices += [
        lambda: jnp.pad(x, ((0, 0),) * 3 + ((1, 1),)),
        lambda: lax.stop_gradient(x), lambda: lax.optimization_barrier((x, x))[0],
        lambda: jnp.concatenate([x, x], -1), lambda: x + x]
    x = draw.one_of(*choices)
    if miss == "cast" and draw.chance(0.5):
      x = x.astype(draw.one_of(*_CASTS)).astype(jnp.float32)
    if draw.chance(0.15):
      return _transformed(draw, x, alpha, mode)
    return x


def _transformed(draw, x, alpha, mode):
  """A block, or three, under a transformation of Flax."""
  features = dict(features=x.shape[-1], weight_bits=draw.bits(), bits=draw.bits())
  kind = draw.one_of("jit", "remat", "scan")
  if kind == "jit":
    return nn.jit(_Block, static_argnums=(3,))(**features)(x, alpha, mode)
  if kind == "remat":
    return nn.remat(_Block, static_argnums=(3,))(**features)(x, alpha, mode)
  scan = nn.scan(
      lambda block, x, _: (block(x, alpha, mode), None), length=3,
      variable_axes={name: 0 for name in (
          "params", "batch_stats", "hard", "quantized", "distance")},
      split_rngs={"params": True, "estimator": True})
  return scan(_Block(**features), x, None)[0]


def _normal(key, shape):
  return jax.random.normal(key, shape)


class _Draw:
  """Choices, by a seed."""

  def __init__(self, seed):
    self._random = np.random.default_rng(seed)
    self._random.random()

  def integer(self, low, high):
    return int(self._random.integers(low, high + 1))

  def chance(self, share):
    return bool(self._random.random() < share)

  def one_of(self, *choices):
    """One of them; a function is called."""
    choice = choices[self.integer(0, len(choices) - 1)]
    return choice() if callable(choice) else choice

  def bits(self):
    return self.integer(1, 3)

  def weights(self, miss):
    """Attributes of a layer with weights."""
    return dict(
        bits=4 if miss == "4 bits" else self.bits(),
        weight_scale="channel_mean" if self.chance(0.1) else "none",
        estimator=estimators.by_name("lsq" if self.chance(0.1) else "ste"),
        threshold_rule=self.one_of("layer_mean", "channel_mean"),
        step_per_channel=self.chance(0.5),
        frequency=self.one_of(*[0.0] * 9, 20.0))

  def norm(self, miss):
    return dict(bits=4 if miss == "4 bits" else self.bits(),
                use_scale=self.chance(0.8), learn_thresholds=self.chance(0.1),
                rprelu=self.chance(0.1))

  def convolution(self, x, first, miss):
    """Attributes of a convolution of `x` that fit its size."""
    smallest = min(x.shape[1:3])
    kernel = tuple(self.integer(1, min(3, smallest)) for _ in range(2))
    dilation = tuple(
        self.integer(1, 2) if (k - 1) * 2 < smallest else 1 for k in kernel)
    padding = self.one_of("SAME", "SAME", "SAME", "VALID", tuple(
        (self.integer(0, 3), self.integer(0, 3)) for _ in range(2)))
    if miss == "odd padding":
      padding = self.one_of("same", "SAME_LOWER", 1, (1, 1), "CIRCULAR",
                            ((1, 0), (2, 3)))
    pad_value = 0.0 if first else self.one_of(0.0, 0.0, -1.0, 1.0)
    groups = self.one_of(1, 1, 1, 2, x.shape[-1])
    features = dict(
        kernel_size=kernel, kernel_dilation=dilation, padding=padding,
        strides=(self.integer(1, 2), self.integer(1, 2)),
        pad_value=0.5 if miss == "odd pad value" else pad_value)
    if x.shape[-1] == 2 or groups == 1:
      features["feature_group_count"] = groups
    return features | self.weights(miss)
