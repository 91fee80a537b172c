"""The XLA backend: packed networks as JAX functions, for any platform.

Weights stay packed in memory, as operands of the computation. There are three ways to
compute the products of a convolution:

    "popcount"  The channels of a sum are packed into words of 32 bits, which exclusive
                or and population count multiply. The vector lanes hold output channels.
                This is the way for CPUs.
    "dot"       Weights are unpacked inside the computation. They are multiplied as
                int8, or on CPUs as float32 where that is faster. This is the way for
                accelerators.
    "portable"  The computation is that of "dot" on accelerators, on every platform.
                This is the way for `jax.export`.

Integer arithmetic is exact in all of them, so that the logits equal those of
`kernels.reference` bit for bit.
"""

import functools
import math
from typing import Any, Callable, Sequence

import jax
from jax import lax
import jax.numpy as jnp
import numpy as np

from minw import packed

Operands = Any  # A pytree of arrays.
# A rule takes a convolution and the kinds of its input and result. It returns arrays,
# and a function that computes the sums from these and the input.
Rule = Callable[
    [packed.Conv, packed.Value, packed.Value],
    tuple[Operands, Callable[[Operands, jax.Array], jax.Array]]]

_WORD = 32  # Bits of a word.
# A fused loop handles at most this many words of a sum (counted once for each mask) and
# this many output channels, whose weights stay in the L1 cache. Grouped convolutions
# have a loop of their own if their sums have at most _TERMS terms.
_TERMS = 36
_LANES = 128
_IMAGES = 4  # Images of a batch that run at a time; their sums stay in the cache.
# Largest window, in pixels, for which "popcount" is used. A window that covers the
# whole map may be larger.
_PIXELS = 2 ** 10
_FLOAT_EXACT = 2 ** 24  # float32 holds every integer up to this one.


def logits(
    program: packed.Program, products: str | None = None
) -> tuple[Operands, Callable[[Operands, jax.Array], jax.Array]]:
  """Returns a packed network as a function that computes logits.

  Args:
    program: The network.
    products: "popcount", "dot" or "portable". None stands for "popcount" if JAX's
      default backend is the CPU, and for "dot" otherwise.

  Returns:
    The operands, and a pure function for `jax.jit` that maps the operands and images,
    uint8 (batch, *program.source_shape), to logits, float32 (batch, classes).

  Raises:
    ValueError: `products` is none of these.
  """
  products = _products(products)
  operands, run = values(program, products)

  def logits_of(operands, images):
    last = lambda images: run(operands, images)[-1].reshape(-1, program.num_classes)
    n = len(images)
    if products != "popcount" or n <= _IMAGES:
      return last(images)
    images = jnp.pad(images, [(0, -n % _IMAGES)] + [(0, 0)] * 3)
    groups = images.reshape(-1, _IMAGES, *images.shape[1:])
    return lax.map(last, groups).reshape(-1, program.num_classes)[:n]

  return operands, logits_of


def values(
    program: packed.Program,
    products: str | None = None,
    convolution: Rule | None = None,
) -> tuple[Operands, Callable[[Operands, jax.Array], list[jax.Array]]]:
  """Returns a packed network as a function that computes all of its values.

  Args:
    program: The network.
    products: As for `logits`.
    convolution: Rule that computes convolutions instead of `products`, so that other
      ways can be compared with these.

  Returns:
    The operands, and a pure function for `jax.jit` that maps the operands and images,
    uint8 (batch, *program.source_shape), to the values that `reference.run` returns.

  Raises:
    ValueError: `products` is not allowed; see `logits`.
  """
  products = _products(products)
  kinds = packed.infer_values(program)
  signs = packed.only_signs(program)
  operands, functions, inputs = [np.asarray(program.offset, np.int32)], [], []
  for op, result in zip(program.ops, kinds[1:]):
    given = packed.inputs(op)
    if isinstance(op, packed.Conv):
      arrays, function = convolution(op, kinds[op.input], result) if convolution else (
          _conv(op, kinds[op.input], result, signs[op.input], products))
    else:
      arrays, function = _RULES[type(op)](op, [kinds[i] for i in given])
    operands.append(arrays)
    functions.append(function)
    inputs.append(given)

  def run(operands, images):
    image = packed.crop(program, images).astype(np.int32)
    # Constants of operations are (channels,), and are broadcast to all pixels.
    with jax.numpy_rank_promotion("allow"):
      found = [image - operands[0]]
      for function, arrays, given in zip(functions, operands[1:], inputs):
        found.append(function(arrays, *(found[i] for i in given)))
    return found

  return jax.device_put(operands), run


def _products(products):
  """Returns the way to compute products, which depends on the platform if None."""
  if products not in ("popcount", "dot", "portable", None):
    raise ValueError(
        f"products={products!r}: must be 'popcount', 'dot' or 'portable'")
  return products or ("popcount" if jax.default_backend() == "cpu" else "dot")


def pad(x: Any, pads: Sequence[int], fill: Any = 0) -> Any:
  """Pads height and width of maps (batch, height, width, channels)."""
  top, bottom, left, right = pads
  return jnp.pad(x, ((0, 0), (top, bottom), (left, right), (0, 0)),
                 constant_values=fill)


def _windows(x, window, strides, dilation=(1, 1)):
  """Returns one array (batch, h, w, channels) for each pixel of a window.

  The array holds the value of that pixel in every window of the padded map.
  """
  h, w = ((size - (n - 1) * step - 1) // stride * stride + 1
          for size, n, step, stride in zip(x.shape[1:3], window, dilation, strides))
  return [x[:, i:i + h:strides[0], j:j + w:strides[1]]
          for i in range(0, window[0] * dilation[0], dilation[0])
          for j in range(0, window[1] * dilation[1], dilation[1])]


def patches(x: jax.Array, op: packed.Conv) -> jax.Array:
  """Returns the windows of a convolution, (batch, h, w, window * channels).

  The last axis is ordered (window height, window width, channels).

  Args:
    x: Padded input (batch, height, width, channels).
    op: The convolution.
  """
  if x.shape[1:3] == op.window:  # There is one window, perhaps of very many pixels.
    x = x[:, ::op.dilation[0], ::op.dilation[1]]
    return x.reshape(x.shape[0], 1, 1, math.prod(x.shape[1:]))
  return jnp.concatenate(
      _windows(x, op.kernel.shape[1:3], op.strides, op.dilation), -1)


def level(x: Any, kind: packed.Value) -> Any:
  """Returns the integer levels of a CODE, and any other value unchanged."""
  if kind.kind != "CODE" or kind.bits < 3:
    return x
  return jnp.sign(x) * (jnp.int8(1) << jnp.abs(x) >> jnp.int8(1))


def _apart(yes, function, *operands):
  """Computes function(*operands) in a computation that XLA does not fuse with others.

  On CPUs XLA fuses a loop with the loops that compute its operands, or with each of its
  uses, and such fused loops are not vectorized. XLA ignores optimization barriers on
  CPUs, but it compiles each branch of a conditional by itself. Therefore `function`
  becomes the branch for a true condition.

  Args:
    yes: The value True, as an operand of the program: XLA must not know the value, or
      it would remove the conditional.
    function: Function that returns one array.
    *operands: Its operands.
  """
  result = jax.eval_shape(function, *operands)
  return lax.cond(yes, function, lambda *_: jnp.zeros(result.shape, result.dtype),
                  *operands)


# A rule returns the arrays of an operation, and a function of these and the inputs.


def _conv(op, kind, result, signs, products):
  """The rule of convolutions, which chooses how to compute the products.

  Args:
    op: The convolution.
    kind: Kind of its input.
    result: Kind of its result.
    signs: Whether the input is a code of 1 bit that holds no zeros.
    products: "popcount", "dot" or "portable".
  """
  on_cpu = products != "portable" and jax.default_backend() == "cpu"
  if op.groups > 1:
    if math.prod(op.kernel.shape[1:]) <= _TERMS:
      return _shifted(op, kind, result, on_cpu)
    return _split(op, kind, result, signs, products)
  # Windows are assembled pixel by pixel, which is slow for very large ones.
  large = math.prod(op.kernel.shape[1:3]) > _PIXELS and kind.shape[:2] != op.window
  if products == "popcount" and _counts(op, kind) and not large:
    return _popcount(op, kind, result, signs)
  return _dot(op, kind, result, on_cpu and (products == "dot" or large))


def _split(op, kind, result, signs, products):
  """The rule of grouped convolutions: an ungrouped one is mapped over the groups."""
  kind = kind._replace(shape=(*kind.shape[:2], op.kernel.shape[-1]))
  result = result._replace(shape=(*result.shape[:2], len(op.kernel) // op.groups))
  made = [_conv(op._replace(kernel=kernel, groups=1), kind, result, signs, products)
          for kernel in np.split(op.kernel, op.groups)]
  every_yes, *arrays = zip(*(arrays for arrays, _ in made))
  arrays = [jax.tree.map(lambda *parts: np.stack(parts), *each) for each in arrays]
  of_groups = jax.vmap(
      made[0][1], in_axes=([None] + [0] * len(arrays), 3), out_axes=3)

  def function(arrays, x):
    y = of_groups(arrays, x.reshape(*x.shape[:3], op.groups, -1))
    return y.reshape(*y.shape[:3], -1)

  return [every_yes[0], *arrays], function


def _shifted(op, kind, result, on_cpu):
  """The rule of grouped convolutions whose sums have few terms, such as depthwise ones.

  For each position in the kernel, the input is shifted by that position. The shifted
  input is multiplied by the weights of all output channels at this position, and the
  products are added up.
  """
  out, *window, channels = op.kernel.shape
  floats = result.kind == "FLOAT"

  def sums(kernel, x):
    kernel, x = _numbers(
        op, kind, floats, kernel, x, np.float32 if floats else np.int32)
    acc = 0
    for tap, part in enumerate(_windows(x, window, op.strides, op.dilation)):
      part = part.reshape(*part.shape[:3], op.groups, channels)
      weights = kernel[tap // window[1], tap % window[1]]
      for i in range(channels):
        acc = acc + jnp.repeat(part[..., i], out // op.groups, axis=-1) * weights[i]
    return acc

  def function(arrays, x):
    yes, kernel = arrays
    return _apart(yes, sums, kernel, x) if on_cpu else sums(kernel, x)

  return [np.True_, _weights(op)], function


# Products by population count.
#
# An operand is a set of bit-planes: a plane of signs (1 is minus), and masks. Mask i
# marks the channels in which the operand has the size `sizes[i]`. A code of n bits has
# these masks:
#
#   1 bit   none; every channel has size 1
#   2 bits  size 1
#   3 bits  sizes 1, 2 and 4
#
# A code of 1 bit that also holds zeros has the mask of 2 bits. An accumulator is an
# integer in two's complement. It has no plane of signs. Its masks are its bits, with
# sizes 1, 2, 4, ... and a negative last size.
#
# A channel with sizes a and b and signs s_x and s_w in the two operands has a product
# of size a * b and sign s = s_x ^ s_w. Let M be the mask of all channels whose product
# has a certain size. Of these products, popcount(M & s) are negative and the others are
# positive. The sum of all products therefore is
#
#   sum over all sizes of  size * (popcount(M) - 2 * popcount(M & s)).
#
# The second popcount depends on both operands and is computed for each output. The
# first one depends on both operands only if both have masks. If the input has no masks,
# the terms size * popcount(M) add up to the sum of the sizes of the weights, which is a
# constant of each output channel. If the weights have none, they add up to the sum of
# the sizes of the input, which is the same for all output channels.


def _counts(op, kind):
  """Whether "popcount" suits a convolution.

  Products of integers and weights of 3 bits would take too many population counts.
  """
  return not isinstance(op.bits, str) and (
      kind.kind == "CODE" or kind.kind == "INT" and op.bits < 3)


def _sizes(bits):
  """Returns the sizes that the masks of a code mark."""
  return ([], [1], [1, 2, 4])[bits - 1]


def _code_planes(xp, codes, sizes):
  """Returns the planes of codes as bits, (..., planes): the signs, then the masks."""
  masks = [abs(codes) == i + 1 for i in range(len(sizes))]
  return xp.stack([codes < 0, *masks], -1)


def _words(xp, bits):
  """Packs bits (..., channels, planes) to words, uint32 (..., words * planes).

  Channel c becomes bit c // words of word c % words. Vector instructions need no
  shuffles for this order.
  """
  *rest, channels, planes = bits.shape
  words = -(-channels // _WORD)
  bits = xp.pad(bits, [(0, 0)] * len(rest) + [(0, words * _WORD - channels), (0, 0)])
  bits = bits.reshape(*rest, _WORD, words * planes).astype(np.uint32)
  shifts = np.arange(_WORD, dtype=np.uint32)[:, None]
  return (bits << shifts).sum(-2, dtype=np.uint32)


def _popcount(op, kind, result, signs):
  """The rule of convolutions by population count.

  The weights are split into blocks of output channels and chunks of words, see `_sums`.
  """
  out, *window, channels = op.kernel.shape
  narrow = channels < _WORD  # If so, a word holds channels of several pixels.
  integer = kind.kind == "INT"
  planes = int(kind.bound.max()).bit_length() + 1  # Bits of an integer with its sign.
  if integer:
    x_sizes = [*(1 << i for i in range(planes - 1)), -1 << planes - 1]
  else:
    x_sizes = [] if signs else _sizes(max(kind.bits, 2))
  w_sizes = _sizes(op.bits)

  codes = op.kernel.reshape(out, 1, 1, -1) if narrow else op.kernel
  words = _words(np, _code_planes(np, codes, w_sizes)).reshape(
      out, -1, 1 + len(w_sizes))
  count = words.shape[1]
  chunks = -(-count * max(1, len(w_sizes), len(x_sizes)) // _TERMS)
  step = -(-count // chunks)
  chunks = -(-count // step)
  # Weights that are used for one pixel only gain nothing from the cache.
  blocks = -(-out // _LANES) if chunks > 1 and result.shape[:2] != (1, 1) else 1
  lanes = -(-out // blocks)
  words = np.pad(words, [(0, blocks * lanes - out), (0, chunks * step - count), (0, 0)])
  words = words.reshape(blocks, lanes, chunks, step, -1).transpose(0, 2, 3, 4, 1)
  arrays = [np.True_, words]
  if not x_sizes:
    levels = packed.levels(op.kernel, op.bits).astype(np.int32)
    arrays.append(np.abs(levels).sum((1, 2, 3)))
  border = not x_sizes and op.pad == 0 and any(op.pads)
  if border:
    table, rows, columns = _border(op, levels, kind.shape, result.shape)
    arrays.append(table)

  fill = _words(np, _code_planes(np, np.full(channels, op.pad, np.int8), x_sizes))

  def function(arrays, x):
    if narrow:
      x = patches(pad(x, op.pads, op.pad), op)
    if integer:
      x = x[..., None] >> np.arange(planes, dtype=np.int32) & 1
    else:
      x = _code_planes(jnp, x, x_sizes)
    x = _words(jnp, x)
    if not narrow:
      inside = np.ones((1, *x.shape[1:3], 1), bool)
      x = pad(x, op.pads)
      if op.pad:
        x = jnp.where(pad(inside, op.pads), x, fill)
      x = patches(x, op)
    shape = x.shape[:3]
    x = x.reshape(math.prod(shape), count, -1)
    acc = _sums(arrays[0], x, arrays[1], x_sizes, w_sizes)[:, :out]
    if not x_sizes:
      acc = acc + arrays[2]
    elif not w_sizes:
      counts: Any = sum(np.int32(size) * _ones(x[:, :, i - len(x_sizes)]).sum(1)
                        for i, size in enumerate(x_sizes))
      acc = acc + counts[:, None]
    acc = acc.reshape(*shape, out)
    if border:
      acc = acc - arrays[3][rows[:, None], columns]
    return acc

  return arrays, function


def _ones(x):
  return lax.population_count(x).astype(np.int32)


def _sums(yes, x, w, x_sizes, w_sizes):
  """Computes the part of all sums of products that depends on both operands.

  Args:
    yes: As for `_apart`.
    x: Planes of the input, uint32 (pixels, words, planes).
    w: Planes of the weights, uint32 (blocks, chunks, words of a chunk, planes, lanes).
    x_sizes: Sizes that the masks of the input mark. The masks are its last planes; a
      plane of signs may precede them.
    w_sizes: Sizes that the masks of the weights mark. The masks are their last planes,
      and a plane of signs precedes them.

  Returns:
    int32 (pixels, blocks * lanes).
  """
  blocks, chunks, step, _, lanes = w.shape
  x = jnp.pad(x, ((0, 0), (0, chunks * step - x.shape[1]), (0, 0)))
  x = jnp.moveaxis(x.reshape(len(x), chunks, step, -1), 1, 0)

  def add(acc, x, w):
    for k in range(step):
      planes = [x[:, k, i, None] for i in range(x.shape[2])]
      acc = acc + _product(planes, list(w[k]), x_sizes, w_sizes)
    return acc

  def block(w):
    acc = jnp.zeros((x.shape[1], lanes), np.int32)
    if chunks == 1:
      return _apart(yes, add, acc, x[0], w[0])
    return lax.scan(lambda acc, operands: (_apart(yes, add, acc, *operands), None),
                    acc, (x, w))[0]

  if blocks == 1:
    return block(w[0])
  return jnp.moveaxis(lax.map(block, w), 0, 1).reshape(-1, blocks * lanes)


def _product(x, w, x_sizes, w_sizes):
  """Computes the contribution of one word of channels to `_sums`.

  Args:
    x: Planes of the input, each uint32 (pixels, 1).
    w: Planes of the weights, each uint32 (lanes,).
    x_sizes: As for `_sums`.
    w_sizes: As for `_sums`.

  Returns:
    int32 (pixels, lanes).
  """
  signs = x[0] ^ w[0] if len(x) > len(x_sizes) else w[0]
  x_masks = zip(x_sizes, x[-len(x_sizes):]) if x_sizes else [(1, None)]
  w_masks = list(zip(w_sizes, w[1:])) if w_sizes else [(1, None)]
  masks = {}
  for a, x_mask in x_masks:
    for b, w_mask in w_masks:
      if x_mask is None or w_mask is None:
        mask = w_mask if x_mask is None else x_mask
      else:
        mask = x_mask & w_mask
      # A channel of a code has one size at most. Therefore the masks of two pairs of
      # sizes do not overlap, and pairs with the same product share one mask.
      masks[a * b] = masks[a * b] | mask if a * b in masks else mask
  total = 0
  for size, mask in masks.items():
    part = -2 * _ones(signs if mask is None else mask & signs)
    if x_sizes and w_sizes:
      part = part + _ones(mask)
    total = total + np.int32(size) * part
  return total


def _border(op, levels, size, result):
  """Computes what the border would add to the sums if all of it held the level 1.

  The window of an output pixel is outside the input in some of its rows and columns.
  Output rows whose windows agree in this share an entry of the table, and so do output
  columns. An entry is the sum of all weights minus the sum of the weights inside.

  Args:
    op: The convolution.
    levels: Integer levels of its weights, (out, height, width, channels).
    size: Shape of its input; height and width come first.
    result: Shape of its result; height and width come first.

  Returns:
    The table, int32 (rows, columns, out), and the index into it of each output row and
    of each output column.
  """
  inside, indices = [], []
  for axis in range(2):
    first = np.arange(result[axis]) * op.strides[axis] - op.pads[2 * axis]
    at = first[:, None] + op.dilation[axis] * np.arange(levels.shape[1 + axis])
    kinds, index = np.unique((0 <= at) & (at < size[axis]), axis=0,
                             return_inverse=True)
    inside.append(kinds)
    indices.append(index.reshape(-1))
  rows, columns = (kinds.astype(np.int32) for kinds in inside)
  sums = levels.sum(3, dtype=np.int32)  # (out, height, width)
  within = np.einsum("sw,row->rso", columns, np.einsum("rh,ohw->row", rows, sums))
  return sums.sum((1, 2), dtype=np.int32) - within, *indices


# Products by multiplication.


def _dot(op, kind, result, cpu):
  """The rule of convolutions by multiplication, of integers, codes or floats.

  Args:
    op: The convolution.
    kind: Kind of its input.
    result: Kind of its result.
    cpu: Whether to choose the operations that are fast on CPUs.
  """
  out = len(op.kernel)
  floats = result.kind == "FLOAT"
  if floats or (cpu or kind.kind == "INT") and result.bound.max() <= _FLOAT_EXACT:
    dtype = np.float32
  else:
    dtype = np.int8 if kind.kind == "CODE" and not cpu else np.int32

  def product(kernel, x):
    kernel, x = _numbers(op, kind, floats, kernel, x, dtype)
    options: dict[str, Any] = dict(
        precision=lax.Precision.HIGHEST,
        preferred_element_type=np.float32 if dtype == np.float32 else np.int32)
    if cpu:
      acc = lax.conv_general_dilated(
          x, kernel, op.strides, "VALID", rhs_dilation=op.dilation,
          dimension_numbers=("NHWC", "HWIO", "NHWC"), **options)
    else:  # Convolutions of accelerators may round, and may not support int8.
      acc = lax.dot_general(patches(x, op), kernel.reshape(-1, out),
                            (((3,), (0,)), ((), ())), **options)
    return acc.astype(np.float32 if floats else np.int32)

  def function(arrays, x):
    yes, kernel = arrays
    return _apart(yes, product, kernel, x) if cpu else product(kernel, x)

  return [np.True_, _weights(op)], function


def _weights(op):
  """Returns the kernel as an operand.

  A kernel of levels is packed by `_pack`. One in a float format is an array of that
  dtype, (height, width, in, out).
  """
  if isinstance(op.bits, str):
    return op.kernel.transpose(1, 2, 3, 0).astype(packed.float_dtype(op.bits))
  return _pack(op.kernel, op.bits)


def _numbers(op, kind, floats, kernel, x, dtype):
  """Returns the two factors of a convolution.

  Args:
    op: The convolution.
    kind: Kind of its input.
    floats: Whether its sums are FLOAT.
    kernel: Kernel as `_weights` returns it.
    x: Input without its border.
    dtype: Dtype of the factors.

  Returns:
    The kernel (height, width, in, out), and the padded input.
  """
  out, *shape = op.kernel.shape
  if not isinstance(op.bits, str):
    kernel = _unpack(kernel, (*shape, out))
  kernel = kernel.astype(dtype)
  fill = packed.levels(np.array([op.pad], np.int8), kind.bits)[0] if kind.bits else 0
  x = pad(level(x, kind), op.pads, fill).astype(dtype)
  if floats and kind.kind != "FLOAT":
    x = x * np.float32(op.input_unit)
  if floats and not isinstance(op.bits, str):
    kernel = kernel * np.float32(op.weight_unit)
  return kernel, x


def _pack(codes: Any, bits: int) -> list[np.ndarray]:
  """Packs codes (out, ...) to bit-planes, each uint8 (terms of a sum / 8, out).

  Bit i of the bytes holds the i-th of eight equal ranges of terms. Vector instructions
  unpack this order without shuffles.
  """
  codes = codes.reshape(len(codes), -1).T
  codes = np.pad(codes, [(0, -len(codes) % 8), (0, 0)]).reshape(8, -1, len(codes.T))
  size = abs(codes)
  planes = [codes > 0, size & 1, size >> 1][:bits]
  return [np.packbits(plane, 0, "little")[0] for plane in planes]


def _unpack(planes, shape):
  """Unpacks the planes of `_pack` to levels, int8 (height, width, in, out)."""
  shifts = np.arange(8, dtype=np.uint8)[:, None, None]
  sign, *size = ((plane >> shifts & 1).astype(np.int8) for plane in planes)
  levels = 2 * sign - 1
  if size:
    levels = levels * (size[0] if len(size) == 1 else 1 << size[0] + 2 * size[1] >> 1)
  return levels.reshape(-1, shape[-1])[:math.prod(shape[:-1])].reshape(shape)


# Operations between convolutions.


def _pool(op, kinds):
  kind, = kinds

  def function(_, x):
    if op.kind == "sum":
      x = level(x, kind)
      x = x if kind.kind == "FLOAT" else x.astype(np.int32)
      combine, fill = lax.add, 0
    else:
      combine = lax.max
      fill = -np.inf if kind.kind == "FLOAT" else jnp.iinfo(x.dtype).min
    if math.prod(op.window) <= 9:  # For small windows this is faster on CPUs.
      return functools.reduce(combine, _windows(
          pad(x, op.pads, fill), op.window, op.strides))
    top, bottom, left, right = op.pads
    return lax.reduce_window(
        x, x.dtype.type(fill), combine, (1, *op.window, 1), (1, *op.strides, 1),
        ((0, 0), (top, bottom), (left, right), (0, 0)))

  return (), function


def _threshold(op, kinds):
  # Falling channels compare acc <= t, which is the same as ~acc >= ~t.
  flip = -op.falling.astype(np.int32)

  def function(arrays: Any, x: Any, shortcut: Any = None) -> Any:
    flip, thresholds = arrays
    x = x ^ flip
    counts = [sum((x >= t).astype(np.int8) for t in table) for table in thresholds]
    count = counts[0]
    for s, other in enumerate(counts[1:], 1):
      count = jnp.where(shortcut >= s - len(counts) // 2, other, count)
    return 2 * count - 1 if op.bits == 1 else count - packed.max_code(op.bits)

  return (flip, op.thresholds ^ flip), function


def _affine(op, arrays, x):
  """Computes batch norm with the rounding of NumPy."""
  center, scale, constant = arrays
  y = _rounded(x.astype(np.float32) * np.float32(op.unit))
  return _rounded((y - center) * scale) + constant


def _rounded(product):
  """Keeps LLVM from fusing a product into the next sum, which barriers do not."""
  largest = np.finfo(np.float32).max
  return jnp.clip(product, -largest, largest)


def _logits(op, kinds):
  return (op.center, op.scale, op.constant), functools.partial(_affine, op)


def _float_norm(op, kinds):
  def function(arrays, x, shortcut=None):
    y = _affine(op, arrays, x)
    if shortcut is not None:
      added = level(shortcut, kinds[1]).astype(np.float32)
      y = y + _rounded(added * np.float32(op.shortcut_unit))
    if op.bits is None:
      return y
    y = jnp.clip(y, -1, 1)
    if isinstance(op.bits, str):
      return y.astype(packed.float_dtype(op.bits)).astype(np.float32)
    if op.bits == 1:
      return jnp.where(y >= packed.SMALLEST, jnp.int8(1), jnp.int8(-1))
    size = sum((jnp.abs(y) > threshold).astype(np.int8) for threshold in op.grid)
    return jnp.where(y < 0, -size, size)

  return (op.center, op.scale, op.constant), function


def _concat(op, kinds):
  return (), lambda _, *given: jnp.concatenate(
      [x << shift if shift else x for x, shift in zip(given, op.shifts)], -1)


def _shortcut(op, kinds):
  return (), lambda _, x: jnp.pad(
      x[:, ::op.strides[0], ::op.strides[1]],
      ((0, 0), (0, 0), (0, 0), (op.before, op.after)))


def _add(op, kinds):
  return (), lambda _, a, b: (
      (level(a, kinds[0]).astype(np.int32) << op.shift_a)
      + (level(b, kinds[1]).astype(np.int32) << op.shift_b))


_RULES = {
    packed.Pool: _pool,
    packed.Threshold: _threshold,
    packed.Logits: _logits,
    packed.FloatNorm: _float_norm,
    packed.Concat: _concat,
    packed.Shortcut: _shortcut,
    packed.Add: _add,
}
