"""What ConvNets compute, in float64 and from the paper's words."""

import numpy as np


def sign(a):
  """The quantizer of one bit (Eq 4)."""
  return np.where(a > 0, 1.0, -1.0)


def h(x, thresholds, levels) -> np.ndarray:
  """Eq 4, 21, 22: the level whose number is that of thresholds passed."""
  if not len(thresholds):
    return np.where(x > 0, 1.0, -1.0)
  passed = sum((np.abs(x) > t).astype(int) for t in thresholds)
  return np.sign(x) * np.array([0.0, *levels])[passed]


def max_pool(x):
  """2x2, in NumPy."""
  n, h, w, c = x.shape
  return x.reshape(n, h // 2, 2, w // 2, 2, c).max((2, 4))


def network(params, images, quantize, stats=None, epsilon=1e-4, pool=max_pool, xp=np):
  """A W1A1 ConvNet in float64, from the paper's words.

  Args:
    params: of a checkpoint.
    images: normalized, (batch, height, width, channels).
    quantize: f(values, name): a layer's for weights, "norm_..." for activations.
    stats: of batch norm; the batch's own if None.
    epsilon: of batch norm.
    pool: 2x2 maximum.
    xp: numpy or jax.numpy.

  Returns:
    The logits, and what each batch norm received.
  """
  names = sorted((name for name in params if not name.startswith("norm_")),
                 key=lambda name: (name.startswith("dense"), name))
  x, received = xp.asarray(images, xp.float64), {}
  for i, name in enumerate(names):
    kernel = quantize(xp.asarray(params[name]["kernel"], xp.float64), name)
    if name.startswith("conv"):
      h, w = x.shape[1:3]
      padded = xp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
      x = sum(padded[:, dy:dy + h, dx:dx + w] @ kernel[dy, dx]
              for dy in range(3) for dx in range(3))
      x = pool(x) if i % 2 else x
    else:
      x = x.reshape(x.shape[0], -1) @ kernel
    received[f"norm_{name}"] = x
    axes = tuple(range(x.ndim - 1))
    mean, var = (x.mean(axes), x.var(axes)) if stats is None else (
        stats[f"norm_{name}"]["batch_norm"][key] for key in ("mean", "var"))
    norm = params[f"norm_{name}"]["batch_norm"]
    x = (x - xp.asarray(mean, xp.float64)) / xp.sqrt(xp.float64(epsilon) + var)
    x = x * norm["scale"] + norm["bias"]
    if i < len(names) - 1:
      x = quantize(xp.clip(x, -1, 1), f"norm_{name}")
  return x, received


def cross_entropy(logits, labels, xp=np):
  """The loss of each example."""
  shifted = logits - logits.max(-1, keepdims=True)
  chosen = shifted[xp.arange(len(labels)), labels]
  return xp.log(xp.exp(shifted).sum(-1)) - chosen
