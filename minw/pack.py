"""Packs a trained network: `python -m minw.pack --workdir=DIR --out=FILE`.

The structure of the network is read from the jaxpr of its hard mode, see
`minw.structure`. Each layer is one equation of the jaxpr. Between the layers, the
equations that `_RULES` names are allowed, and all others are an error. Networks need
not be registered. The thresholds of an activation are found by bisection: the hard
layer itself is evaluated at integer accumulators between the bounds.
"""

import collections
import hashlib
import json
import math
from typing import Any, NamedTuple, Sequence

from absl import flags
import jax
import jax.numpy as jnp
import numpy as np

from minw import cli
from minw import config as config_lib
from minw import errors
from minw import fold
from minw import layers
from minw import packed
from minw import quantizers
from minw import structure
from minw.data import pixels as pixels_lib
from minw.experiment import Experiment
from minw.packed import metadata as metadata_lib
from minw.workdir import checkpoint


def pack_workdir(workdir: str, which: str = "last") -> packed.Program:
  """Packs the network of a run.

  Args:
    workdir: Directory of the run.
    which: Checkpoint: "last", or "best" for the one with the best validation accuracy.

  Raises:
    errors.UsageError: There is no run or checkpoint, or its network does not pack.
  """
  config, saved = checkpoint.read_run(workdir, which)
  experiment = Experiment(config)
  text = config_lib.to_json(config)
  shared = metadata_lib.shared(json.loads(text))
  try:
    return pack(
        experiment.model, checkpoint.hard_variables(saved.tree),
        pixels=experiment.pixels, source_shape=experiment.info.image_shape,
        crop=experiment.image_shape[:2],
        labels=experiment.info.label_names,
        metadata={"config": shared, "step": saved.step,
                  "config_hash": hashlib.sha256(text.encode()).hexdigest()})
  except ValueError as error:
    raise errors.UsageError(f"workdir={workdir!r}: {error}") from error


def pack(
    model: Any,
    variables: Any,
    *,
    pixels: pixels_lib.Pixels,
    source_shape: Sequence[int],
    crop: Sequence[int] | None = None,
    labels: Sequence[str] = (),
    metadata: dict[str, Any] | None = None,
) -> packed.Program:
  """Packs any network that is made of minw's layers.

  Args:
    model: Flax module that is called as model(images, mode="hard"). Between minw's
      layers it may reshape to (batch, height * width * channels), add, concatenate
      channels, take every n-th pixel, and pad channels with zeros. Over windows or
      whole maps it may take maxima, sums, and means of 2^n numbers.
    variables: Trained variables, {"params", "batch_stats"}.
    pixels: Normalization of pixels, `minw.data.pixels.pixels("integer", ...)`.
    source_shape: (height, width, channels) of the images.
    crop: (height, width) of the center of the images, which is the network's input. If
      None, the whole image is.
    labels: Names of the classes.
    metadata: Other metadata of the file; see `minw.packed.metadata`.

  Raises:
    ValueError: A part of the network cannot be packed, and the message names the layer.
      Or the labels or the metadata break the rules of `minw.packed.metadata`.
  """
  crop_height, crop_width = crop or source_shape[:2]
  crop = crop_height, crop_width
  offset = np.asarray(pixels.offset)
  if (np.asarray(pixels.divisor) != 64).any() or (offset != np.round(offset)).any():
    raise ValueError(
        f"pixels={pixels}: only integer pixels pack, (value - offset) / 64")
  image_shape = (*crop, source_shape[2])
  hard = fold.fold(model, variables, pixels_lib.probe(pixels, image_shape))
  images = jax.ShapeDtypeStruct((2, *image_shape), jnp.float32)
  network = structure.trace(model, hard, images, "hard")
  walk = _Walk(image_shape, offset, network.calls)
  results = structure.evaluate(
      network.jaxpr, [*jax.tree.leaves(hard), walk.image], walk.apply)
  result = walk.logits(results)
  num_classes = math.prod(result.shape)
  metadata = {"labels": tuple(labels), **(metadata or {})}
  metadata_lib.encode(metadata, num_classes)  # Reports bad metadata before writing.
  height, width, channels = source_shape
  program = packed.Program(
      (height, width, channels), crop, offset.astype(np.uint8), num_classes,
      tuple(walk.ops), metadata)
  packed.infer_values(program)
  return program


class _Call(NamedTuple):
  """A call of one of minw's layers.

  Attributes:
    layer: The unbound module, of `minw.layers`.
    path: Path of the layer.
    hard: Hard variables of the layer.
  """

  layer: Any
  path: str
  hard: dict[str, np.ndarray]


class _Array(NamedTuple):
  """An array of the jaxpr that depends on the image.

  Attributes:
    value: Index of the program's value that holds the numbers of the array.
    unit: Number that the integer 1 stands for; 1 for FLOAT.
    shape: (height, width, channels) of the map. It is smaller than that of the value if
      borders that do not fill a window are cut off.
    form: Layout: "map" (batch, height, width, channels), "flat" (batch, height * width
      * channels), or "windows" (batch, height / h, h, width / w, w, channels).
    window: (h, w) of the layout "windows".
  """

  value: int
  unit: float
  shape: tuple[int, int, int]
  form: str = "map"
  window: tuple[int, int] = (1, 1)

  @property
  def dims(self) -> tuple[int, ...]:
    """Shape of the array, for a batch of two."""
    h, w, c = self.shape
    if self.form == "map":
      return (2, h, w, c)
    if self.form == "flat":
      return (2, h * w * c)
    return (2, h // self.window[0], self.window[0], w // self.window[1],
            self.window[1], c)


class _Walk:
  """Walks a jaxpr and writes the program.

  Attributes:
    values: Kinds of the program's values: the image, then the result of each operation.
    ops: Operations of the program.
    image: The array of images.
  """

  def __init__(self, image_shape, offset, calls):
    bound = np.maximum(offset, 255 - offset).astype(np.int64)
    self.values = [packed.Value(image_shape, "INT", 0, bound)]
    self.ops: list[packed.Op] = []
    self.image = _Array(0, 1 / 64, image_shape)
    self._calls = calls
    self._names: collections.Counter[str] = collections.Counter()

  def apply(self, eqn, given, where):
    """Returns the results of an equation, which are `_Array`s or NumPy arrays.

    See `structure.evaluate` for the arguments.
    """
    if eqn.primitive is structure.layer_p:
      return [self._layer(self._calls[eqn.params["index"]], given, where)]
    if not any(isinstance(x, _Array) for x in given):
      return structure.apply_equation(eqn, given)
    return self._apply(eqn, given)

  def _apply(self, eqn, given):
    name = eqn.primitive.name
    if name in _IDENTITIES:
      results = given
    elif name in _RULES:
      results = [_RULES[name](self, eqn, given)]
    else:
      raise self.refuse(f"{name} of {self.after(given)} does not pack")
    for result, var in zip(results, eqn.outvars, strict=True):
      if not isinstance(result, _Array):
        continue
      if result.dims != var.aval.shape:
        raise self.refuse(
            f"{name} of {self.after(given)}, from {result.dims} to"
            f" {var.aval.shape}, does not pack")
      self._check_survival(name, given, result, var.aval.dtype)
    return results

  def _check_survival(self, name, given, x, dtype):
    """Checks that the dtype of a result holds every possible value exactly."""
    value = self.values[x.value]
    if value.kind == "FLOAT":
      fits = dtype in (np.float32, np.float64) or (
          x.value and getattr(self.ops[x.value - 1], "bits", None) == dtype.name)
    elif value.kind == "CODE":
      fits = _fits(np.asarray(packed.LEVELS[value.bits]) * x.unit, dtype)
    elif jnp.issubdtype(dtype, jnp.floating):  # Integers times a power of two.
      info = jnp.finfo(dtype)
      largest = int(value.bound.max())
      fits = (largest <= 2 ** (info.nmant + 1) and x.unit >= float(info.smallest_normal)
              and largest * x.unit <= float(info.max))
    else:
      largest = int(value.bound.max())
      fits = x.unit >= 1 and _fits(np.asarray([-largest, largest]) * x.unit, dtype)
    if not fits:
      raise self.refuse(
          f"{name} of {self.after(given)} gives {np.dtype(dtype).name}, which does not"
          " hold all possible values (up to"
          f" {value.bound.max(initial=0) * x.unit:g} in steps of {x.unit:g}); cast to"
          " float32, or not at all")

  def logits(self, results: Sequence[Any]) -> "_Array":
    """Returns the array of logits, which the last operation must compute.

    Args:
      results: Everything that the network returns.

    Raises:
      ValueError: The network returns something else.
    """
    name = self.ops[-1].name if self.ops else "the network"
    if len(results) != 1:
      raise self.refuse(f"{name}: the network returns {len(results)} arrays; it must"
                        " return the logits alone")
    result, = results
    if not isinstance(result, _Array) or not self.ops or result.value != len(self.ops):
      raise self.refuse(f"{name}: its result is not the one that the network returns")
    if result.shape[:2] != (1, 1):
      raise self.refuse(f"{name}: gives logits of shape {result.shape}, for each place"
                        " of a map; sum over it or flatten it first")
    for i, op in enumerate(self.ops, start=1):
      last = i == len(self.ops)
      makes_logits = isinstance(op, packed.Logits) or (
          isinstance(op, packed.FloatNorm) and op.bits is None)
      if makes_logits != last:
        raise self.refuse(f"{op.name}: " + (
            "is the last layer, which must be a NormQuant with bits=None"
            if last else "has bits=None, which only the last layer may have"))
    return result

  def after(self, given) -> str:
    """Returns text that names the layers or operations which computed the arrays."""
    return " and ".join(
        self._described(x.value) for x in given if isinstance(x, _Array))

  def _described(self, value: int) -> str:
    """Returns the name of a value's layer.

    For an operation between layers, the names of the layers before it are added.
    """
    if not value:
      return "the image"
    between = (packed.Pool, packed.Concat, packed.Shortcut, packed.Add)
    op = self.ops[value - 1]
    if not isinstance(op, between):
      return op.name
    seen, waiting = set(), [*packed.inputs(op)]
    while waiting:
      value = waiting.pop()
      if value not in seen and value and isinstance(self.ops[value - 1], between):
        waiting += packed.inputs(self.ops[value - 1])
      seen.add(value)
    names = sorted({self._described(v) for v in seen
                    if not v or not isinstance(self.ops[v - 1], between)})
    more = f" and {len(names) - 3} more" * (len(names) > 3)
    return f"{op.name} (of {', '.join(names[:3])}{more})"

  def refuse(self, problem: str) -> ValueError:
    """Returns the error for a network that cannot be packed."""
    return structure.refusal(problem)

  def emit(self, op: packed.Op, unit: float, form: str = "map") -> _Array:
    """Adds an operation to the program."""
    try:
      value = packed.infer_value(op, self.values)
    except ValueError as error:
      sources = self.after([_Array(i, 1.0, (0, 0, 0)) for i in packed.inputs(op)])
      raise self.refuse(f"{op.name}, of {sources}: {error}") from error
    self.values.append(value)
    self.ops.append(op)
    return _Array(len(self.ops), unit, value.shape, form)

  def whole(self, x: _Array) -> _Array:
    """Checks that an array holds all of its value, and returns it."""
    if x.form == "windows" or x.shape != self.values[x.value].shape:
      raise self.refuse(f"a part of {self.after([x])} is used other than for pooling")
    return x

  def _layer(self, call, given, where):
    call.check_exact()
    x, shortcut, variables = call.split(given)
    name = call.name(where)
    self._names[name] += 1
    if self._names[name] > 1:  # The layer has been called before.
      name += f"[{self._names[name] - 1}]"
    given = [x] if shortcut is None else [x, shortcut]
    if not all(isinstance(operand, _Array) for operand in given):
      raise self.refuse(f"{name}: its input is a constant")
    given = [self.whole(operand) for operand in given]
    call = _Call(call.layer, name, variables["hard"])
    if isinstance(call.layer, layers.NormQuant):
      return self._norm(call, *given)
    return self._linear(call, *given)

  def _linear(self, call, x):
    layer, kernel, kind = call.layer, call.hard["kernel"], self.values[x.value]
    kernel = np.asarray(kernel)
    options: dict[str, Any] = {}
    if isinstance(layer, layers.QuantConv):
      if x.form != "map":
        raise self.refuse(f"{call.path}: a convolution cannot take a flattened map")
      form = "map"
      options = dict(strides=tuple(layer.strides),
                     groups=layer.feature_group_count,
                     dilation=tuple(layer.kernel_dilation),
                     pads=tuple(n for pair in layer.pads(x.shape[:2]) for n in pair))
      if any(options["pads"]):
        options["pad"] = self._pad_code(call, x, kind)
    else:
      form = x.form
      window = x.shape[:2] if form == "flat" else (1, 1)
      kernel = kernel.reshape(*window, x.shape[2], -1)
    kernel = np.ascontiguousarray(kernel.transpose(3, 0, 1, 2), np.float32)
    if quantizers.is_grid(layer.bits):
      if layer.bits not in packed.LEVELS:
        raise self.refuse(f"{call.path}: weights of {layer.bits} bits do not pack; they"
                          " must have 1, 2 or 3 bits")
      step = quantizers.step_size(layer.bits)
      kernel = _codes(kernel, layer.bits)
      options.update(weight_unit=step)
    op = packed.Conv(call.path, x.value, layer.bits, kernel, input_unit=x.unit,
                     **options)
    integer = quantizers.is_grid(layer.bits) and kind.kind != "FLOAT"
    return self.emit(op, step * x.unit if integer else 1.0, form)

  def _pad_code(self, call, x, kind):
    """Returns the code of the border, which is that of level 0, -1 or 1."""
    pad = call.layer.pad_value
    codes = {0: 0}
    if kind.kind == "CODE":
      q = packed.max_code(kind.bits)
      codes.update({-1: -q, 1: q})
    if pad not in codes:
      raise self.refuse(f"{call.path}: pad_value={pad}: must be one of"
                        f" {', '.join(map(str, sorted(codes)))} here")
    return codes[pad]

  def _norm(self, call, x, shortcut=None):
    layer, kind = call.layer, self.values[x.value]
    if kind.kind == "CODE":
      raise self.refuse(f"{call.path}: its input is quantized already")
    if x.form == "flat" and x.shape[:2] != (1, 1):
      raise self.refuse(f"{call.path}: batch norm cannot take a flattened map")
    grid = layer.bits is not None and quantizers.is_grid(layer.bits)
    if grid and layer.bits not in packed.LEVELS:
      raise self.refuse(f"{call.path}: activations of {layer.bits} bits do not pack;"
                        " they must have 1, 2 or 3 bits")
    side = self.values[shortcut.value] if shortcut else None
    if side and side.kind == "INT":
      raise self.refuse(f"{call.path}: its shortcut is not quantized")
    source: dict[str, Any] = dict(
        name=call.path, input=x.value, shortcut=shortcut.value if shortcut else None)
    norm = fold.Norm(*(np.asarray(call.hard[field]) for field in fold.Norm._fields))
    unit = quantizers.step_size(layer.bits) if grid and layer.bits else 1.0
    integer = kind.kind == "INT" and not (side and side.kind == "FLOAT")
    if integer and grid and layer.bits:
      if kind.bound.max() > 2 ** 24:
        raise self.refuse(f"{call.path}: its inputs are sums of {self.after([x])} up to"
                          f" {kind.bound.max()}, but float32 holds integers up to 2^24")
      falling, thresholds = channel_thresholds(
          layer, call.hard, kind.bound, x.unit,
          [level * shortcut.unit for level in packed.LEVELS[side.bits]]
          if side and shortcut else [0.0])
      return self.emit(packed.Threshold(
          bits=layer.bits, falling=falling, thresholds=thresholds, **source),
                       unit, x.form)
    if integer and layer.bits is None and not side:
      del source["shortcut"]
      return self.emit(packed.Logits(unit=x.unit, **source, **norm._asdict()),
                       unit, x.form)
    if layer.rprelu:
      raise self.refuse(f"{call.path}: rprelu is not supported with an operand in a"
                        " float format")
    if grid:
      source["grid"] = np.asarray(layers.input_grid(layer).thresholds, np.float32)
    if shortcut:
      scales = np.unique(call.hard.get("shortcut_scale", 1.0))
      if len(scales) > 1:
        raise self.refuse(f"{call.path}: its shortcut has several scales")
      source["shortcut_unit"] = shortcut.unit * float(scales[0])
    return self.emit(packed.FloatNorm(
        bits=layer.bits, unit=x.unit, **source, **norm._asdict()), unit, x.form)


def _fits(values, dtype):
  """Whether `dtype` holds these numbers (float64) exactly; false for bool."""
  if dtype == np.bool_ or not (jnp.issubdtype(dtype, jnp.floating)
                               or jnp.issubdtype(dtype, jnp.integer)):
    return False
  if jnp.issubdtype(dtype, jnp.integer):
    info = jnp.iinfo(dtype)
    inside = (values >= info.min) & (values <= info.max)
    return bool((inside & (values == np.round(values))).all())
  return bool((values.astype(dtype).astype(np.float64) == values).all())


def _codes(values, bits):
  """Encodes levels of a grid as int8 codes."""
  if bits == 1:
    return np.where(values > 0, 1, -1).astype(np.int8)
  magnitudes = quantizers.level_magnitudes(bits)
  size = np.searchsorted(magnitudes, np.abs(values), side="right")
  return (np.sign(values) * size).astype(np.int8)


def channel_thresholds(layer, hard, bound, unit, shortcuts):
  """Finds the integer accumulators at which the codes of a hard NormQuant change.

  In a channel of positive scale, the code does not decrease as the accumulator grows.
  In a channel of negative scale it does not increase; such a channel is called falling,
  and -accumulator is used in its place. For the j-th code and each channel, the
  threshold is the smallest accumulator that reaches this code or a higher one. It is
  found by bisection over -bound to bound: `above` is always an accumulator that reaches
  the code, or bound + 1, and `below` is always one that does not, or -bound - 1. Once
  they are neighbors, `above` is the threshold. It is bound + 1 if no accumulator
  reaches the code. All channels, codes and shortcuts are bisected at once, by calling
  the layer itself.

  Args:
    layer: The unbound NormQuant.
    hard: Hard variables of the layer.
    bound: Largest magnitude of an accumulator, (channels,).
    unit: Number that the accumulator 1 stands for.
    shortcuts: Numbers that a shortcut may add; one number if there is no shortcut.

  Returns:
    The fields `falling` (channels,) and `thresholds` (shortcuts, j, channels) of
    `packed.Threshold`.
  """
  q, t = packed.max_code(layer.bits), packed.num_thresholds(layer.bits)
  falling = np.asarray(hard["scale"]) < 0

  @jax.jit
  def level(acc, shortcut):
    return layer.apply({"hard": hard}, acc * np.float32(unit), mode="hard",
                       shortcut=shortcut if len(shortcuts) > 1 else None)

  def reached(acc):
    """Whether each accumulator, int (s, j, channels), reaches the j-th code."""
    acc = np.where(falling, -acc, acc).astype(np.float32)
    s = np.asarray(shortcuts, np.float32)[:, None, None] + np.zeros_like(acc)
    codes = _codes(np.asarray(level(acc, s)), layer.bits)
    count = codes > 0 if layer.bits == 1 else codes + q
    return count >= np.arange(1, t + 1)[:, None]

  below = np.broadcast_to(-bound - 1, (len(shortcuts), t, len(bound))).copy()
  above = -below
  while (above - below > 1).any():
    middle = (above + below) // 2
    yes = reached(middle)
    above, below = np.where(yes, middle, above), np.where(yes, below, middle)
  return falling, np.where(falling, -above, above).astype(np.int32)


# Operations between layers. Each rule takes (walk, equation, inputs) and returns the
# array that the equation computes. `_Walk` then compares its shape with that of JAX.

# `_Walk` checks casts by the dtype of their result, which must hold all values.
_IDENTITIES = ("convert_element_type", "copy", "copy_p", "name", "stop_gradient",
               "optimization_barrier")


def _reshape(walk, eqn, given):
  x = given[0]
  dims, (h, w, c) = eqn.outvars[0].aval.shape, x.shape
  if dims == x.dims:
    return x
  if dims == (2, h * w * c) and x.form == "map":
    return walk.whole(x)._replace(form="flat")
  if dims == (2, h, w, c) and x.form == "flat":
    return x._replace(form="map")
  if len(dims) == 6 and x.form == "map":
    return x._replace(form="windows", window=(dims[2], dims[4]))
  raise walk.refuse(
      f"reshaping {walk.after(given)} from {x.dims} to {dims} is not supported; height,"
      " width and channels may be flattened together")


def _slice(walk, eqn, given):
  x = given[0]
  starts, limits = eqn.params["start_indices"], eqn.params["limit_indices"]
  strides = eqn.params["strides"] or (1,) * len(starts)
  h, w, c = x.shape
  if (x.form != "map" or any(starts) or limits[0] != 2 or limits[3] != c
      or strides[0] != 1 or strides[3] != 1):
    raise walk.refuse(f"a slice of {walk.after(given)} must be one of its pixels")
  if strides[1:3] == (1, 1):
    return x._replace(shape=(limits[1], limits[2], c))
  if limits[1:3] != (h, w):
    raise walk.refuse(f"a slice of {walk.after(given)} with strides must be one of all"
                      " its pixels")
  return _emit_shortcut(walk, x, strides[1:3], 0, 0)


def _emit_shortcut(walk, x, strides, before, after):
  walk.whole(x)
  if walk.values[x.value].kind != "CODE":
    raise walk.refuse(
        f"a shortcut of {walk.after([x])}, which is not quantized, is not supported")
  name = f"shortcut{len(walk.ops)}"
  return walk.emit(
      packed.Shortcut(name, x.value, tuple(strides), before, after), x.unit)


def _pad(walk, eqn, given):
  x, fill = given
  config = eqn.params["padding_config"]
  if (not isinstance(x, _Array) or isinstance(fill, _Array) or np.asarray(fill) != 0
      or x.form != "map" or any(any(part) for part in config[:3]) or config[3][2]
      or min(config[3]) < 0):
    raise walk.refuse(
        f"padding {walk.after(given)} other than its channels with zeros is not"
        " supported")
  return _emit_shortcut(walk, x, (1, 1), *map(int, config[3][:2]))


def _pool(kind):
  """Makes the rule of a reduction over windows or over a whole map."""
  def pool(walk, eqn, given):
    x = given[0]
    axes = eqn.params["axes"]
    if x.form == "windows" and axes == (2, 4):
      window, form = x.window, "map"
    elif x.form == "map" and axes == (1, 2):
      walk.whole(x)
      window, form = x.shape[:2], "flat"
    else:
      raise walk.refuse(
          f"a {kind} of {walk.after(given)} over axes {axes} is not supported")
    name = f"{kind}_pool{len(walk.ops)}"
    return walk.emit(packed.Pool(name, x.value, kind, window, window), x.unit, form)
  return pool


def _window_pool(kind):
  """Makes the rule of a pool that JAX expresses as reduce_window."""
  def pool(walk, eqn, given):
    x, p = walk.whole(given[0]), eqn.params
    sides = (p["window_dimensions"], p["window_strides"], p["base_dilation"],
             p["window_dilation"])
    pads: Any = tuple(int(n) for pair in p["padding"] for n in pair)
    if (x.form != "map" or any(side[0] != 1 or side[3] != 1 for side in sides)
        or set(sides[2] + sides[3]) != {1} or any(pads[:2] + pads[6:])):
      raise walk.refuse(f"a {kind} of {walk.after(given)} must be over windows of its"
                        " pixels")
    name = f"{kind}_pool{len(walk.ops)}"
    return walk.emit(
        packed.Pool(name, x.value, kind, sides[0][1:3], sides[1][1:3], pads[2:6]),
        x.unit)
  return pool


def _concatenate(walk, eqn, given):
  first = given[0]
  for x in given:
    if not isinstance(x, _Array):
      raise walk.refuse(f"a constant cannot be concatenated to {walk.after(given)}")
    if x.form == "flat" and x.shape[:2] != (1, 1):
      raise walk.refuse(f"{walk.after([x])}: a flattened map cannot be concatenated")
    walk.whole(x)
  if eqn.params["dimension"] != len(first.dims) - 1:
    raise walk.refuse(f"{walk.after(given)} must be concatenated in channels")
  kinds = [walk.values[x.value] for x in given]
  if len({(kind.kind, kind.bits) for kind in kinds}) > 1:
    texts = [f"{walk.after([x])} ({_describe(kind)})" for x, kind in zip(given, kinds)]
    raise walk.refuse(f"{', '.join(texts)}: numbers of different kinds cannot be"
                      " concatenated")
  unit = min(x.unit for x in given)
  shifts = tuple(_shift(walk, x, unit) for x in given)
  name = f"concat{len(walk.ops)}"
  return walk.emit(
      packed.Concat(name, tuple(x.value for x in given), shifts), unit, first.form)


def _describe(kind):
  return {"CODE": f"activations of {kind.bits} bits", "INT": "sums"}.get(
      kind.kind, "floats")


def _neutral(given, value):
  """Returns the `_Array` of two operands if all elements of the other are `value`.

  Returns None otherwise, and for two `_Array`s.
  """
  a, b = given
  if isinstance(a, _Array) and isinstance(b, _Array):
    return None
  x, constant = (a, b) if isinstance(a, _Array) else (b, a)
  return x if (np.asarray(constant) == value).all() else None


def _subtract(walk, eqn, given):
  if isinstance(given[0], _Array) and _neutral(given, 0):
    return given[0]
  raise walk.refuse(f"a subtraction with {walk.after(given)} is not supported")


def _add(walk, eqn, given):
  if _neutral(given, 0):
    return _neutral(given, 0)
  a, b = given
  if not (isinstance(a, _Array) and isinstance(b, _Array) and a.dims == b.dims):
    raise walk.refuse(f"adding a constant to {walk.after(given)} is not supported")
  walk.whole(a)
  walk.whole(b)
  unit = min(a.unit, b.unit)
  op = packed.Add(f"add{len(walk.ops)}", a.value, b.value, _shift(walk, a, unit),
                  _shift(walk, b, unit))
  return walk.emit(op, unit, a.form)


def _shift(walk, x, unit):
  """Returns the left shift that converts the integers of `x` to multiples of `unit`.

  Both units are powers of two.
  """
  return int(math.log2(x.unit / unit))


def _scale(sign):
  """Makes the rule of a product (sign 1) or a quotient (sign -1)."""
  def scale(walk, eqn, given):
    if _neutral(given, 1) and (isinstance(given[0], _Array) or sign > 0):
      return _neutral(given, 1)
    x, factor = given if isinstance(given[0], _Array) else given[::-1]
    factor = np.asarray(0 if isinstance(factor, _Array) else factor)
    mantissa = np.frexp(factor.astype(np.float64))[0] if factor.ndim == 0 else 0
    if (mantissa != 0.5 or not isinstance(given[0], _Array) and sign < 0
        or walk.values[x.value].kind != "INT"):
      raise walk.refuse(
          f"scaling {walk.after(given)}: only sums can be scaled, and only by powers of"
          " two (instead of the mean over a window of another size, take the sum)")
    return x._replace(unit=x.unit * float(factor) ** sign)
  return scale


def _reduce_precision(walk, eqn, given):
  x, (exponent, mantissa) = given[0], (
      eqn.params["exponent_bits"], eqn.params["mantissa_bits"])
  value = walk.values[x.value]
  # The unit and the largest value must be normal numbers of the narrower format.
  largest, edge = int(value.bound.max(initial=0)), 2 ** (exponent - 1) - 2
  if (value.kind == "FLOAT" and (exponent, mantissa) != (8, 23)
      or largest > 2 ** (mantissa + 1)
      or not 2.0 ** -edge <= x.unit <= 2.0 ** edge / max(largest, 1)):
    raise walk.refuse(
        f"reduce_precision of {walk.after(given)} to {exponent} exponent and {mantissa}"
        " mantissa bits does not keep all possible values")
  return x


def _squeeze(walk, eqn, given):
  return walk.whole(given[0])._replace(form="flat")


def _broadcast(walk, eqn, given):
  return walk.whole(given[0])._replace(form="map")


_RULES = {
    "reshape": _reshape,
    "slice": _slice,
    "pad": _pad,
    "reduce_max": _pool("max"),
    "reduce_sum": _pool("sum"),
    "reduce_window_max": _window_pool("max"),
    "reduce_window_sum": _window_pool("sum"),
    "concatenate": _concatenate,
    "add": _add,
    "sub": _subtract,
    "mul": _scale(1),
    "div": _scale(-1),
    "reduce_precision": _reduce_precision,
    "squeeze": _squeeze,
    "broadcast_in_dim": _broadcast,
}


def define_flags() -> None:
  """Defines the flags of the command."""
  cli.DEFINE_path("workdir", None, "Directory of the run.")
  cli.DEFINE_path("out", None, "File to write.")
  flags.DEFINE_enum(
      "checkpoint", "last", ["last", "best"],
      "The last checkpoint, or the one with the best validation accuracy.")
  flags.DEFINE_bool(
      "verify", False,
      "Whether to compare every layer with the trained network, on its "
      "test split, or on random images if there are no data.")
  cli.DEFINE_path(
      "data_dir", None,
      "Directory of the prepared data sets; that of the run's config by default.")
  cli.require("workdir", "out")


def main() -> int:
  """Packs a run as the flags say; returns the exit code."""
  f = flags.FLAGS
  program = pack_workdir(f.workdir, f.checkpoint)
  try:
    size = packed.write(f.out, program)
  except OSError as error:
    raise errors.UsageError(f"out={f.out!r} cannot be written: {error}") from error
  print(f"{f.out}: {size / 2**20:.3f} MiB, {len(program.ops)} operations,"
        f" step {program.metadata['step']}")
  if not f.verify:
    return 0
  from minw import verify  # It needs data; packing does not.
  return verify.verify_workdir(f.workdir, f.out, f.checkpoint, f.data_dir)


if __name__ == "__main__":
  cli.run(main, define_flags)
