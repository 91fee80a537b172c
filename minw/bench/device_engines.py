"""Inference engines that XLA compiles for an accelerator: the packed network, others.

The engines in int8 compute the packed network with weights that are not packed. The
float networks have its shapes, and weights of their own. Images are uint8 for all of
them, and cropping and normalization are parts of the compiled program.
"""

import functools
from typing import Any, Callable, NamedTuple

import jax
from jax import lax
import jax.numpy as jnp
import numpy as np

from minw import packed
from minw.bench import engines
from minw.bench import float_networks
from minw.bench import networks
from minw.kernels import xla


class Engine(NamedTuple):
  """A network as a function for `jax.jit`.

  Attributes:
    operands: A pytree of arrays on the device: weights and other constants.
    logits: Maps the operands and images, uint8 (batch, *program.source_shape), to
      logits (batch, classes).
    tolerance: Largest error of a logit as a share of the largest logit, compared with
      `float_logits`. If 0, the logits must be those of the packed network.
  """

  operands: Any
  logits: Callable[[Any, jax.Array], jax.Array]
  tolerance: float


# Each engine is made from the packed network by a function that may raise
# `engines.LeftOut`.


def _packed(program: packed.Program) -> Engine:
  # On accelerators this is the default. On CPUs it is the same computation.
  return Engine(*xla.logits(program, "portable"), 0.0)


def _int8(by_convolutions: bool, program: packed.Program) -> Engine:
  operands, values = xla.values(
      program, "portable",
      functools.partial(_int8_convolution, by_convolutions, program.offset))
  return Engine(
      operands, lambda *given: values(*given)[-1].reshape(-1, program.num_classes), 0.0)


def _int8_convolution(
    by_convolutions: bool,
    offset: np.ndarray,
    op: packed.Conv,
    kind: packed.Value,
    result: packed.Value,
) -> tuple[Any, Callable[[Any, jax.Array], jax.Array]]:
  """The rule of convolutions whose operands are int8, see `xla.values`.

  Pixels less their offset take 9 bits, and pixels less 128 take 8. The rule multiplies
  the latter by the weights. Their difference is a constant of each channel, and so is
  its product with the weights.

  Args:
    by_convolutions: Whether XLA sees a convolution, or the windows of its input and a
      product of matrices. Dense layers are always products.
    offset: Offset of the pixels of each channel.
    op: The convolution.
    kind: Kind of its input.
    result: Kind of its result.
  """
  if result.kind != "INT" or op.groups > 1:
    raise engines.LeftOut(f"{op.name} is no ungrouped convolution of integers")
  shift = 128 - offset.astype(np.int32) if op.input == 0 else None
  if shift is None and kind.bound.max() > 127:
    raise engines.LeftOut(f"{op.name} reads integers that int8 does not hold")
  kernel = packed.levels(op.kernel, int(op.bits)).transpose(1, 2, 3, 0)
  added = () if shift is None else np.tensordot(
      shift, kernel.sum((0, 1), dtype=np.int32), 1).astype(np.int32)
  fill = packed.levels(np.array([op.pad]), kind.bits)[0] if kind.bits else 0
  by_convolutions = by_convolutions and result.shape[:2] != (1, 1)

  def sums(arrays, x):
    kernel, added = arrays
    x = xla.pad(xla.level(x, kind), op.pads, fill)
    x = (x if shift is None else x - shift).astype(np.int8)
    if by_convolutions:
      acc = lax.conv_general_dilated(
          x, kernel, op.strides, "VALID", rhs_dilation=op.dilation,
          dimension_numbers=("NHWC", "HWIO", "NHWC"), preferred_element_type=np.int32)
      # XLA compiles convolutions of int8 for NVIDIA's GPUs only if their sums become
      # int8 or float32. float32 holds them unless a layer has a million weights for
      # each output, and the logits are checked.
      acc = acc.astype(np.float32).astype(np.int32)
    else:
      acc = lax.dot_general(
          xla.patches(x, op), kernel.reshape(-1, kernel.shape[3]),
          (((3,), (0,)), ((), ())), preferred_element_type=np.int32)
    return acc if shift is None else acc + added

  return (kernel, added), sums


def _float(dtype: Any, tolerance: float, program: packed.Program) -> Engine:
  layers = networks.float_layers(program)
  operands = jax.device_put(
      [(layer.kernel.astype(dtype), layer.bias.astype(dtype)) for layer in layers])
  offset = program.offset.astype(np.float32)

  def logits(operands, images):
    with jax.numpy_rank_promotion("allow"):
      x = (packed.crop(program, images).astype(np.float32) - offset) / 64
      return float_networks.logits(layers, operands, x.astype(dtype), matrices=True)

  return Engine(operands, logits, tolerance)


def float_logits(program: packed.Program, images: np.ndarray) -> np.ndarray:
  """Computes the float network in float32 on the CPU.

  Args:
    program: The packed network.
    images: uint8 (batch, *program.source_shape).

  Returns:
    float32 (batch, classes).
  """
  with jax.default_device(jax.local_devices(backend="cpu")[0]):
    engine = _float(np.float32, 0.0, program)
    return np.asarray(jax.jit(engine.logits)(engine.operands, images))


# The engines by name.
ENGINES: dict[str, Callable[[packed.Program], Engine]] = {
    "packed": _packed,
    "float32": functools.partial(_float, np.float32, 0.02),
    "bfloat16": functools.partial(_float, jnp.bfloat16, 0.05),
    "int8 products": functools.partial(_int8, False),
    "int8 convolutions": functools.partial(_int8, True),
}
