"""A plain and slow NumPy implementation of packed networks, the reference for kernels.

Products are computed in float64, which holds every sum of a valid file exactly.
"""

import numpy as np

from minw import packed

_PATCHES = 2 ** 24  # Largest number of inputs of products kept in memory at a time.


def run(program: packed.Program, images: np.ndarray) -> list[np.ndarray]:
  """Computes every value of the network for a batch.

  Args:
    program: The network.
    images: uint8 (batch, *program.source_shape).

  Returns:
    For the image and each operation int32 (INT), int8 (CODE) or float32 (FLOAT)
    (batch, height, width, channels).
  """
  return _run(program, images, [()] * len(program.ops))


def logits(program: packed.Program, images: np.ndarray) -> np.ndarray:
  """Computes the logits of a batch.

  Args:
    program: The network.
    images: uint8 (batch, *program.source_shape).

  Returns:
    float32 (batch, classes).
  """
  values = _run(program, images, packed.last_uses(program))
  return values[-1].reshape(len(images), program.num_classes)


def _run(program, images, dropped):
  """Computes all values; those in `dropped[i]` become None after operation i."""
  kinds = packed.infer_values(program)
  image = packed.crop(program, images).astype(np.int32)
  values = [image - np.asarray(program.offset, np.int32)]
  for op, kind, drop in zip(program.ops, kinds[1:], dropped, strict=True):
    given = [values[i] for i in packed.inputs(op)]
    values.append(run_op(op, given, [kinds[i] for i in packed.inputs(op)], kind))
    for i in set(drop) - {len(program.ops)}:
      values[i] = None
  return values


def run_op(
    op: packed.Op,
    given: list[np.ndarray],
    kinds: list[packed.Value],
    result: packed.Value,
) -> np.ndarray:
  """Runs one operation.

  Args:
    op: The operation.
    given: Its inputs, each (batch, height, width, channels).
    kinds: Kinds of its inputs.
    result: Kind of its result.

  Returns:
    int32 (INT), int8 (CODE) or float32 (FLOAT) (batch, *result.shape).
  """
  dtype = {"INT": np.int32, "CODE": np.int8, "FLOAT": np.float32}[result.kind]
  value = _run_op(op, given, kinds)
  assert value.shape[1:] == result.shape, (op.name, value.shape, result.shape)
  return value.astype(dtype)


def _run_op(op, given, kinds):
  x, kind = given[0], kinds[0]
  if isinstance(op, packed.Conv):
    return _conv(op, x, kind)
  if isinstance(op, packed.Pool):
    x = _level(x, kind) if op.kind == "sum" else x.astype(np.float64)
    windows = _windows(x, op.window, op.strides, op.pads,
                       0 if op.kind == "sum" else -np.inf)
    return windows.max((-2, -1)) if op.kind == "max" else windows.sum((-2, -1))
  if isinstance(op, packed.Threshold):
    q = packed.max_code(kinds[1].bits) if op.shortcut is not None else 0
    table = given[1].astype(int) + q if q else np.zeros(x.shape, int)
    channel = np.arange(x.shape[-1])
    count = np.zeros(x.shape, int)
    for j in range(op.thresholds.shape[1]):
      threshold = op.thresholds[table, j, channel]
      count += np.where(op.falling, x <= threshold, x >= threshold)
    return 2 * count - 1 if op.bits == 1 else count - packed.max_code(op.bits)
  if isinstance(op, packed.Logits):
    return _norm(op, x)
  if isinstance(op, packed.FloatNorm):
    return _float_norm(op, x, given[1:], kinds[1:])
  if isinstance(op, packed.Concat):
    return np.concatenate([v << s if s else v for v, s in zip(given, op.shifts)], -1)
  if isinstance(op, packed.Shortcut):
    x = x[:, ::op.strides[0], ::op.strides[1]]
    return np.pad(x, [(0, 0)] * 3 + [(op.before, op.after)])
  a, b = (_level(v, k).astype(np.int64) for v, k in zip(given, kinds))
  return (a << op.shift_a) + (b << op.shift_b)


def _level(x, kind):
  """Returns the integer levels of a CODE, and any other value unchanged."""
  return packed.levels(x, kind.bits) if kind.kind == "CODE" else x


def _windows(x, window, strides, pads, fill):
  """Returns the windows of a padded map: float64 (batch, h, w, channels, *window)."""
  top, bottom, left, right = pads
  x = np.pad(x.astype(np.float64), [(0, 0), (top, bottom), (left, right), (0, 0)],
             constant_values=fill)
  windows = np.lib.stride_tricks.sliding_window_view(x, window, (1, 2))
  return windows[:, ::strides[0], ::strides[1]]


def _conv(op, x, kind):
  kernel, fill = op.kernel, op.pad
  if kind.kind == "CODE":
    fill = packed.levels(np.array([op.pad], np.int8), kind.bits)[0]
  x = _level(x, kind).astype(np.float64)
  if not isinstance(op.bits, str):
    kernel = packed.levels(kernel, op.bits)
  kernel = kernel.astype(np.float64)
  exact = kind.kind != "FLOAT" and not isinstance(op.bits, str)
  if not exact:
    x = x * (1 if kind.kind == "FLOAT" else op.input_unit)
    kernel = kernel * (1 if isinstance(op.bits, str) else op.weight_unit)
    fill = fill * op.input_unit
  windows = _windows(x, op.window, op.strides, op.pads, fill)
  windows = windows[..., ::op.dilation[0], ::op.dilation[1]]
  n, h, w = windows.shape[:3]
  terms = kernel[0].size
  matrix = kernel.transpose(0, 3, 1, 2).reshape(op.groups, -1, terms).transpose(0, 2, 1)
  sums = np.empty((n, h, w, len(kernel)))
  # The memory is bounded by computing only some of the output positions at a time.
  step = max(1, _PATCHES // (n * op.groups * terms))
  rows, columns = max(1, step // w), min(step, w)
  for top in range(0, h, rows):
    for left in range(0, w, columns):
      part = windows[:, top:top + rows, left:left + columns]
      # Per group, (positions, terms of a sum) @ (terms of a sum, output channels).
      patches = part.reshape(-1, op.groups, terms).transpose(1, 0, 2)
      sums[:, top:top + rows, left:left + columns] = (
          patches @ matrix).transpose(1, 0, 2).reshape(*part.shape[:3], -1)
  return sums


def _norm(op, x):
  y = x.astype(np.float32) * np.float32(op.unit)
  return (y - op.center) * op.scale + op.constant


def _float_norm(op, x, shortcut, kinds):
  y = _norm(op, x)
  if shortcut:
    y = y + _level(shortcut[0], kinds[0]).astype(np.float32) * np.float32(
        op.shortcut_unit)
  if op.bits is None:
    return y
  y = np.clip(y, np.float32(-1), np.float32(1))
  if isinstance(op.bits, str):
    return y.astype(packed.float_dtype(op.bits)).astype(np.float32)
  if op.bits == 1:
    return np.where(y >= packed.SMALLEST, 1, -1)
  return np.sign(y) * sum(np.abs(y) > threshold for threshold in op.grid)
