"""Exports a packed network as plain ONNX, or as QONNX for compilers of such networks.

All numbers before the logits are integers that float32 holds exactly. Values have the
names of `common.names`. Their layout is (batch, channels, height, width), or (batch,
channels) if height and width are 1. An activation is computed from the thresholds of
the packed network:

    level = bias + the sum of `step` over all thresholds t with t <= accumulator

The lowest level is the bias, and each `step` is the distance to the next level.
Accumulators and thresholds of falling channels are multiplied by -1 before that. If
there is a shortcut, the compared number is accumulator + apart * shortcut, where
`apart` is larger than the range of the accumulator. The results for two levels of the
shortcut therefore lie in disjoint intervals, and each interval has thresholds of its
own.

QONNX expresses activations by MultiThreshold, and weights by BipolarQuant and Quant.
Plain ONNX uses comparisons and int8 weights. The file states the shape of every tensor.
In QONNX it also states the type of every tensor of integers, which is the type that
qonnx itself infers.
"""

import json

import numpy as np
import onnx
from onnx import helper
from onnx import numpy_helper

from minw import packed
from minw.export import common

OPSET = 13
QONNX_DOMAIN = "qonnx.custom_op.general"
_EXACT = 2 ** 24  # float32 holds every integer up to this one.
_STEPS = {1: [2], 2: [1, 1], 3: [2, 1, 1, 1, 1, 2]}  # Distances of adjacent levels.
# The levels 0, +-1, +-2, +-4 need 4 bits, because Quant's 3-bit levels end at +-3.
_TYPES = {1: ("BIPOLAR", 1), 2: ("INT2", 2), 3: ("INT4", 4)}
# For nodes of the first set qonnx infers INT32 if all inputs are integers. For nodes of
# the second set it infers the type of the first input.
_SUMS = {"Add", "Sub", "Mul", "MatMul", "Conv"}
_SAME_TYPE = {"Concat", "Flatten", "Identity", "MaxPool", "Pad", "Reshape", "Slice"}


def model(
    program: packed.Program, *, qonnx: bool = False, batch: int | None = None
) -> onnx.ModelProto:
  """Returns the ONNX model of a network.

  Args:
    program: The network.
    qonnx: Whether to return QONNX, which maps "image", float32 (batch, channels,
      height, width) from 0 to 255, to "logits". Plain ONNX maps "image", uint8 (batch,
      height, width, channels), to "logits" and "label".
    batch: Number of images that the model takes. By default QONNX takes one, because
      its tools need a fixed number, and plain ONNX takes any number.

  Raises:
    ValueError: The network cannot be exported exactly; the message names the layer.
  """
  kinds = common.values(program)
  for op, kind in zip(program.ops, kinds[1:]):
    if kind.kind == "INT" and kind.bound.max() > _EXACT:
      raise ValueError(f"{op.name}: its sums exceed 2^24, up to which float32 is exact")
  graph = _Graph(program, kinds, qonnx)
  for i in range(len(kinds)):
    graph.value(i)
  return graph.model(batch or (1 if qonnx else "batch"))


class _Graph:
  """Writes the nodes of a program's values."""

  def __init__(self, program, kinds, qonnx):
    self.program, self.kinds, self.qonnx = program, kinds, qonnx
    self.names, self.signs = common.names(program), packed.only_signs(program)
    self.nodes, self.made, self.initializers, self.types = [], set(), {}, {}

  def model(self, batch) -> onnx.ModelProto:
    """Returns the model that holds the nodes; `batch` is a number or a symbol."""
    h, w, c = self.program.source_shape
    shape, dtype = [batch, c, h, w], onnx.TensorProto.FLOAT
    if not self.qonnx:
      shape, dtype = [batch, h, w, c], onnx.TensorProto.UINT8
    classes = [batch, self.program.num_classes]
    outputs = [helper.make_tensor_value_info("logits", onnx.TensorProto.FLOAT, classes)]
    if not self.qonnx:
      self.node("ArgMax", "label", "logits", axis=1, keepdims=0)
      outputs.append(
          helper.make_tensor_value_info("label", onnx.TensorProto.INT64, [batch]))
    graph = helper.make_graph(
        self.nodes, "minw", [helper.make_tensor_value_info("image", dtype, shape)],
        outputs, list(self.initializers.values()))
    opsets = [helper.make_opsetid("", OPSET)]
    if self.qonnx:
      opsets.append(helper.make_opsetid(QONNX_DOMAIN, 1))
      for name, datatype in self.all_types().items():
        annotation = graph.quantization_annotation.add(tensor_name=name)
        annotation.quant_parameter_tensor_names.add(key="finn_datatype", value=datatype)
    made = helper.make_model(
        graph, opset_imports=opsets, ir_version=8, producer_name="minw")
    made.graph.value_info.extend(_shapes(made))
    helper.set_model_props(
        made, {"minw": json.dumps(common.metadata(self.program))})
    return made

  def all_types(self) -> dict[str, str]:
    """Returns the QONNX type of every tensor that holds integers, by its name."""
    types = {"image": "UINT8", **self.types}
    for node in self.nodes:
      given, made = [types.get(name) for name in node.input], node.output[0]
      if node.op_type in _SUMS and all(given):
        types[made] = "INT32"
      elif node.op_type in _SAME_TYPE and given[0]:
        types[made] = given[0]
    return types

  def node(self, kind, name, *inputs, **attributes) -> str:
    """Adds a node whose result is `name`, unless there is one; returns `name`."""
    if name not in self.made:
      self.made.add(name)
      # If a node reads a tensor twice, qonnx's cleanup renames only the first input.
      inputs = [
          self.node("Identity", f"{name}_again{k}", x) if x in inputs[:k] else x
          for k, x in enumerate(inputs)]
      self.nodes.append(helper.make_node(
          kind, inputs, [name], name=name, **attributes))
    return name

  def constant(self, name, values, datatype=None) -> str:
    """Adds a constant; returns its name."""
    self.initializers[name] = numpy_helper.from_array(np.asarray(values), name)
    if datatype:
      self.types[name] = datatype
    return name

  def channels(self, i, name, values, datatype=None) -> str:
    """Adds a constant with one number for each channel of value i; returns its name."""
    values = np.asarray(values, np.float32).reshape(-1)
    shape = (1, -1) if self.flat(i) else (1, -1, 1, 1)
    return self.constant(name, values.reshape(shape), datatype)

  def flat(self, i) -> bool:
    """Whether value i has the layout (batch, channels)."""
    return self.kinds[i].shape[:2] == (1, 1)

  def code_bits(self, i) -> int:
    """Returns the bits of value i, a code: 2 if there are zeros among signs."""
    return 2 if self.kinds[i].bits == 1 and self.has_zeros(i) else self.kinds[i].bits

  def has_zeros(self, i) -> bool:
    """Whether a reader puts zeros around a code (padding) or beside it (channels)."""
    for k, op in enumerate(self.program.ops, start=1):
      if i in packed.inputs(op):
        if isinstance(op, packed.Conv) and any(op.pads) and not op.pad:
          return True
        if isinstance(op, packed.Concat) and self.kinds[k].kind == "CODE" and (
            not self.signs[k]):
          return True
        if isinstance(op, packed.Pool | packed.Concat | packed.Shortcut) and (
            self.kinds[k].kind == "CODE" and self.has_zeros(k)):
          return True
    return False

  def typed(self, name, source, bits) -> str:
    """Adds a quantizer that declares the type of `source` and keeps its levels."""
    one = self.constant("one", np.float32(1))
    self.types[name] = _TYPES[bits][0]
    if bits == 1:
      return self.node("BipolarQuant", name, source, one, domain=QONNX_DOMAIN)
    return self.node(
        "Quant", name, source, one, self.constant("zero", np.float32(0)),
        self.constant(f"bits{bits}", np.float32(_TYPES[bits][1])),
        domain=QONNX_DOMAIN, signed=1, narrow=1, rounding_mode="ROUND")

  def weights(self, name, levels, bits) -> str:
    """Adds the weights of a layer as integer levels; returns their name."""
    if self.qonnx:
      return self.typed(f"{name}_weight", self.constant(
          f"{name}_levels", levels.astype(np.float32)), bits)
    # DequantizeLinear is avoided: with it, ONNX Runtime may also quantize the inputs.
    return self.node("Cast", f"{name}_weight", self.constant(
        f"{name}_levels", levels.astype(np.int8)), to=onnx.TensorProto.FLOAT)

  def times(self, name, source, factor) -> str:
    """Adds a product with a constant factor; returns its name."""
    if factor == 1:
      return source
    whole = float(factor).is_integer()
    return self.node("Mul", name, source, self.constant(
        f"{name}_factor", np.float32(factor), _integer(abs(factor)) if whole else None))

  def slice(self, name, source, starts, ends, steps) -> str:
    """Adds a slice of height and width; returns its name."""
    fields = dict(starts=starts, ends=ends, axes=(2, 3), steps=steps)
    arrays = (self.constant(f"{name}_{field}", np.array(numbers, np.int64))
              for field, numbers in fields.items())
    return self.node("Slice", name, source, *arrays)

  def pad(self, name, source, before, after, level) -> str:
    """Adds a padding of every axis with `level`; returns its name."""
    return self.node(
        "Pad", name, source,
        self.constant(f"{name}_pads", np.array([*before, *after], np.int64)),
        self.constant(f"{name}_level", np.float32(level)))

  def value(self, i) -> None:
    """Adds the nodes of a value."""
    if i == 0:
      self.image()
      return
    op, name = self.program.ops[i - 1], self.names[i]
    _RULES[type(op)](self, i, op, name)

  def map_of(self, i) -> str:
    """Returns the name of value i in the layout (batch, channels, height, width)."""
    if not self.flat(i):
      return self.names[i]
    return self.node("Reshape", f"{self.names[i]}_as_map", self.names[i],
                     self.constant("map", np.array([0, -1, 1, 1])))

  def map(self, i, kind, name, *inputs, **attributes) -> None:
    """Adds a node whose result, value i, is (batch, channels, height, width).

    A `Flatten` follows if height and width are 1.
    """
    made = f"{name}_map" if self.flat(i) else name
    self.node(kind, made, *inputs, **attributes)
    if self.flat(i):
      self.node("Flatten", name, made)

  def image(self):
    """Adds the nodes of the image: layout, crop, and subtraction of the offset."""
    p, name, x = self.program, self.names[0], "image"
    if not self.qonnx:
      x = self.node("Cast", "image_float", x, to=onnx.TensorProto.FLOAT)
      x = self.node("Transpose", "image_channels", x, perm=(0, 3, 1, 2))
    if p.crop != p.source_shape[:2]:
      starts = [(n - size) // 2 for n, size in zip(p.source_shape, p.crop)]
      ends = np.add(starts, p.crop)
      x = self.slice("crop", x, starts, ends, (1, 1))
    offset = self.constant("offset", np.float32(p.offset).reshape(1, -1, 1, 1), "UINT8")
    self.map(0, "Sub", name, x, offset)


def _conv(graph, i, op, name):
  out, *window, channels = op.kernel.shape
  kind, x = graph.kinds[op.input], graph.names[op.input]
  levels = packed.levels(op.kernel, op.bits).transpose(0, 3, 1, 2)
  whole = tuple(window) == kind.shape[:2] and not any(op.pads)
  if whole and op.groups == 1:  # This is a dense layer.
    if not graph.flat(op.input):
      x = graph.node("Flatten", f"{name}_flat", x)
    graph.node("MatMul", name, x, graph.weights(
        name, levels.reshape(out, -1).T, op.bits))
    return
  x = graph.map_of(op.input)
  top, bottom, left, right = op.pads
  pads = top, left, bottom, right
  if any(pads) and op.pad:
    level = packed.levels(np.array([op.pad], np.int8), kind.bits)[0]
    x = graph.pad(f"{name}_border", x, (0, 0, top, left), (0, 0, bottom, right), level)
    pads = 0, 0, 0, 0
  graph.map(i, "Conv", name, x, graph.weights(name, levels, op.bits),
            kernel_shape=window, strides=op.strides, pads=pads,
            dilations=op.dilation, group=op.groups)


def _pool(graph, i, op, name):
  kind, x = graph.kinds[op.input], graph.map_of(op.input)
  top, bottom, left, right = op.pads
  options = dict(strides=op.strides, pads=(top, left, bottom, right),
                 kernel_shape=op.window)
  if op.kind == "max":
    graph.map(i, "MaxPool", name, x, **options)
  elif tuple(op.window) == kind.shape[:2] and not any(op.pads):
    graph.types[name] = _integer(graph.kinds[i].bound.max())
    graph.node("ReduceSum", name, x, graph.constant("axes", np.array([2, 3])),
               keepdims=0)
  else:
    channels = kind.shape[2]
    graph.map(i, "Conv", name, x, graph.constant(
        f"{name}_ones", np.ones((channels, 1, *op.window), np.float32), "BINARY"),
              group=channels, **options)


def _threshold(graph, i, op, name):
  """Adds the nodes of an activation, as the module's docstring describes them.

  All accumulators are in [-bound, bound]. Thresholds are clipped to
  [-bound, bound + 1]: every accumulator reaches -bound, and none reaches bound + 1.

  With a shortcut of levels s_0 < s_1 < ..., the compared number is

      v = accumulator + apart * s,  where  apart = 2 * bound + 2.

  The numbers v of level s_k are in [apart * s_k - bound, apart * s_k + bound], and they
  have the thresholds t + apart * s_k. These intervals are disjoint, so that a number in
  one of them has reached all thresholds of the lower ones. The steps of an interval
  sum to `span` (all steps are counted in units of `scale`). Where two levels differ by
  more than 1, an additional threshold counts as the intervals of the integers that are
  missing between them. Therefore the steps that v has reached sum to

      span * (s_k - s_0) + the steps reached within its own interval.

  The bias adds span * s_0, and the node NAME_less adds -span * s_k. The result is the
  number of steps reached within the interval, and the bias of the grid.
  """
  kind, x = graph.kinds[op.input], graph.names[op.input]
  bound, steps = int(kind.bound.max()), _STEPS[op.bits]
  mirror = np.where(op.falling, -1, 1)
  thresholds = np.clip(op.thresholds.astype(np.int64) * mirror, -bound, bound + 1)
  thresholds = np.sort(thresholds, 1)
  if op.falling.any():
    x = graph.node("Mul", f"{name}_mirrored", x, graph.channels(
        i, f"{name}_mirror", mirror, "BIPOLAR"))
  scale = 2 if op.bits == 1 else 1
  rows = [(t, step // scale) for t, step in zip(thresholds[0], steps)]
  bias = packed.LEVELS[op.bits][0]
  if op.shortcut is None:
    _reached(
        graph, i, name, x, rows, scale, bias, _TYPES[graph.code_bits(i)][0])
    return
  apart, levels = 2 * bound + 2, packed.LEVELS[graph.kinds[op.shortcut].bits]
  if apart * levels[-1] + bound + 1 > _EXACT:
    raise ValueError(f"{op.name}: its sums exceed 2^24, up to which float32 is exact")
  span = sum(steps) // scale
  rows = []
  for level, following, table in zip(levels, (*levels[1:], levels[-1] + 1), thresholds):
    rows += [(t + apart * level, step // scale) for t, step in zip(table, steps)]
    if following - level > 1:  # The steps of the missing integers in between.
      rows.append((np.full_like(table[0], bound + 1 + apart * level),
                   span * (following - level - 1)))
  shortcut = graph.names[op.shortcut]
  x = graph.node("Add", f"{name}_sum", x, graph.times(
      f"{name}_shortcut", shortcut, apart))
  x = _reached(graph, i, f"{name}_count", x, rows, scale,
                      bias + scale * span * levels[0], "INT32")
  less = graph.times(f"{name}_less", shortcut, -scale * span)
  if graph.qonnx:
    level = graph.node("Add", f"{name}_level", x, less)
    graph.typed(name, level, graph.code_bits(i))
  else:
    graph.node("Add", name, x, less)


def _reached(graph, i, name, x, rows, scale, bias, datatype):
  """Adds nodes for scale * (sum of `times` over all reached thresholds) + bias.

  Args:
    graph: The `_Graph`.
    i: Index of the value.
    name: Name of the result.
    x: Name of the numbers that are compared with the thresholds.
    rows: Pairs (thresholds, times). The thresholds are (channels,).
    scale: Factor of the sum.
    bias: Summand of the result.
    datatype: QONNX type of the result.

  Returns:
    The name of the result.
  """
  if graph.qonnx:
    graph.types[name] = datatype
    table = np.stack([t for t, times in rows for _ in range(times)], -1)
    return graph.node(
        "MultiThreshold", name, x,
        graph.constant(f"{name}_thresholds", table.astype(np.float32), "INT32"),
        domain=QONNX_DOMAIN, out_scale=float(scale), out_bias=float(bias),
        out_dtype=datatype, data_layout="NC" if graph.flat(i) else "NCHW")
  reached = []
  for j, (t, times) in enumerate(rows):
    yes = graph.node("GreaterOrEqual", f"{name}_reached{j}", x, graph.channels(
        i, f"{name}_threshold{j}", t))
    yes = graph.node("Cast", f"{name}_step{j}", yes, to=onnx.TensorProto.FLOAT)
    reached.append(graph.times(f"{name}_steps{j}", yes, times * scale))
  count = graph.node("Sum", f"{name}_sum_reached", *reached)
  return graph.node("Add", name, count, graph.constant(
      f"{name}_bias", np.float32(bias)))


def _logits(graph, i, op, name):
  x = graph.times(f"{name}_scaled", graph.names[op.input], op.unit)
  x = graph.node("Sub", f"{name}_centered", x, graph.channels(
      i, f"{name}_center", op.center))
  x = graph.node("Mul", f"{name}_product", x, graph.channels(
      i, f"{name}_scale", op.scale))
  graph.node("Add", "logits", x, graph.channels(i, f"{name}_constant", op.constant))


def _concat(graph, i, op, name):
  graph.node("Concat", name, *(
      graph.times(f"{name}_{k}", graph.names[j], 1 << shift)
      for k, (j, shift) in enumerate(zip(op.inputs, op.shifts))), axis=1)


def _shortcut(graph, i, op, name):
  h, w, _ = graph.kinds[op.input].shape
  x, bits = graph.names[op.input], graph.kinds[op.input].bits
  if max(op.strides) > 1 and not graph.flat(op.input):
    x = graph.slice(f"{name}_pixels", x, (0, 0), (h, w), op.strides)
    if graph.flat(i):
      x = graph.node("Flatten", f"{name}_flat", x)
  if not op.before + op.after:
    graph.node("Identity", name, x)
    return
  if graph.qonnx:  # A Pad has the type of its input, so that this type must hold 0.
    x = graph.typed(f"{name}_levels", x, max(bits, 2))
  rest = () if graph.flat(i) else (0, 0)
  graph.pad(name, x, (0, op.before, *rest), (0, op.after, *rest), 0)


def _add(graph, i, op, name):
  graph.node("Add", name, *(
      graph.times(f"{name}_{side}", graph.names[j], 1 << shift)
      for side, j, shift in (("a", op.a, op.shift_a), ("b", op.b, op.shift_b))))


def _integer(bound: int) -> str:
  """Returns the narrowest signed QONNX type that holds all of -bound to bound."""
  return f"INT{max(2, int(bound).bit_length() + 1)}"


def _shapes(model: onnx.ModelProto) -> list[onnx.ValueInfoProto]:
  """Returns type and shape of every tensor between the nodes.

  ONNX's shape inference does not know the nodes of QONNX. Their results have the shape
  of their first input, so that they are replaced by `Identity` for the inference.
  """
  standard = onnx.ModelProto()
  standard.CopyFrom(model)
  for node in standard.graph.node:
    if node.domain:
      node.CopyFrom(helper.make_node("Identity", node.input[:1], node.output))
  inferred = onnx.shape_inference.infer_shapes(
      standard, check_type=True, strict_mode=True, data_prop=True)
  return list(inferred.graph.value_info)


_RULES = {
    packed.Conv: _conv, packed.Pool: _pool, packed.Threshold: _threshold,
    packed.Logits: _logits, packed.Concat: _concat, packed.Shortcut: _shortcut,
    packed.Add: _add}
