"""A packed network as ONNX: plain, or QONNX for compilers of quantized networks.

All numbers are integers that float32 holds exactly, up to the logits. Values keep the
names of `common.names`; their layout is (batch, channels, height, width), or (batch,
channels) where height and width are 1. Thresholds are as they are packed:

    level = sum of step over the thresholds that the sum of products has reached, - bias

where falling channels are multiplied by -1 before, and a shortcut is added to the sum
times more than any sum, so that each of its levels has thresholds of its own.

QONNX says all this by MultiThreshold, and by BipolarQuant and Quant of weights; plain
ONNX by comparisons, and int8 weights. Every tensor has its shape in the file, and in
QONNX every tensor of integers its type, which are those that qonnx itself infers.
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
_EXACT = 2 ** 24  # float32 holds the integers up to it.
_STEPS = {1: [2], 2: [1, 1], 3: [2, 1, 1, 1, 1, 2]}  # From level to level.
# 0, +-1, +-2, +-4 need 4 bits: Quant's levels of 3 bits end at +-3.
_TYPES = {1: ("BIPOLAR", 1), 2: ("INT2", 2), 3: ("INT4", 4)}
# The types that qonnx infers: INT32 from integers, and that of the first input.
_SUMS = {"Add", "Sub", "Mul", "MatMul", "Conv"}
_SAME_TYPE = {"Concat", "Flatten", "Identity", "MaxPool", "Pad", "Reshape", "Slice"}


def model(
    program: packed.Program, *, qonnx: bool = False, batch: int | None = None
) -> onnx.ModelProto:
  """The model.

  Args:
    program: the network.
    qonnx: QONNX, of float images (batch, channels, height, width), 0 to 255, to
      "logits"; else plain ONNX, of uint8 images (batch, height, width, channels), to
      "logits" and "label".
    batch: Number of images that the model takes. By default QONNX takes one, because
      its tools need a fixed number, and plain ONNX takes any number.

  Raises:
    ValueError: The network cannot be exported exactly; the message names the layer.
  """
  kinds = common.values(program)
  for op, kind in zip(program.ops, kinds[1:]):
    if kind.kind == "INT" and kind.bound.max() > _EXACT:
      raise ValueError(f"{op.name}: sums beyond what float32 holds exactly")
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
    """The QONNX type of every tensor that holds integers."""
    types = {"image": "UINT8", **self.types}
    for node in self.nodes:
      given, made = [types.get(name) for name in node.input], node.output[0]
      if node.op_type in _SUMS and all(given):
        types[made] = "INT32"
      elif node.op_type in _SAME_TYPE and given[0]:
        types[made] = given[0]
    return types

  def node(self, kind, name, *inputs, **attributes) -> str:
    """Adds a node that makes `name`, once."""
    if name not in self.made:
      self.made.add(name)
      # qonnx's cleanup renames a tensor only where a node reads it first.
      inputs = [
          self.node("Identity", f"{name}_again{k}", x) if x in inputs[:k] else x
          for k, x in enumerate(inputs)]
      self.nodes.append(helper.make_node(
          kind, inputs, [name], name=name, **attributes))
    return name

  def constant(self, name, values, datatype=None) -> str:
    """Adds a constant."""
    self.initializers[name] = numpy_helper.from_array(np.asarray(values), name)
    if datatype:
      self.types[name] = datatype
    return name

  def channels(self, i, name, values, datatype=None) -> str:
    """Adds a constant of a number for each channel of value i."""
    values = np.asarray(values, np.float32).reshape(-1)
    shape = (1, -1) if self.flat(i) else (1, -1, 1, 1)
    return self.constant(name, values.reshape(shape), datatype)

  def flat(self, i) -> bool:
    return self.kinds[i].shape[:2] == (1, 1)

  def code_bits(self, i) -> int:
    """The type of a code. Among signs, a border of 0 is a third level."""
    return 2 if self.kinds[i].bits == 1 and self.has_zeros(i) else self.kinds[i].bits

  def has_zeros(self, i) -> bool:
    """Whether a code gets zeros around it, or beside it in a concatenation."""
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
    """What QONNX knows the type of numbers by, which are levels already."""
    one = self.constant("one", np.float32(1))
    self.types[name] = _TYPES[bits][0]
    if bits == 1:
      return self.node("BipolarQuant", name, source, one, domain=QONNX_DOMAIN)
    return self.node(
        "Quant", name, source, one, self.constant("zero", np.float32(0)),
        self.constant(f"bits{bits}", np.float32(_TYPES[bits][1])),
        domain=QONNX_DOMAIN, signed=1, narrow=1, rounding_mode="ROUND")

  def weights(self, name, levels, bits) -> str:
    if self.qonnx:
      return self.typed(f"{name}_weight", self.constant(
          f"{name}_levels", levels.astype(np.float32)), bits)
    # Not by DequantizeLinear, with which ONNX Runtime may quantize inputs, too.
    return self.node("Cast", f"{name}_weight", self.constant(
        f"{name}_levels", levels.astype(np.int8)), to=onnx.TensorProto.FLOAT)

  def times(self, name, source, factor) -> str:
    if factor == 1:
      return source
    whole = float(factor).is_integer()
    return self.node("Mul", name, source, self.constant(
        f"{name}_factor", np.float32(factor), _integer(abs(factor)) if whole else None))

  def slice(self, name, source, starts, ends, steps) -> str:
    """Takes a part of height and width."""
    fields = dict(starts=starts, ends=ends, axes=(2, 3), steps=steps)
    arrays = (self.constant(f"{name}_{field}", np.array(numbers, np.int64))
              for field, numbers in fields.items())
    return self.node("Slice", name, source, *arrays)

  def pad(self, name, source, before, after, level) -> str:
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
    """A value as a map, of any size."""
    if not self.flat(i):
      return self.names[i]
    return self.node("Reshape", f"{self.names[i]}_as_map", self.names[i],
                     self.constant("map", np.array([0, -1, 1, 1])))

  def map(self, i, kind, name, *inputs, **attributes) -> None:
    """Adds a node that makes a map, of any size."""
    made = f"{name}_map" if self.flat(i) else name
    self.node(kind, made, *inputs, **attributes)
    if self.flat(i):
      self.node("Flatten", name, made)

  def image(self):
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
  if whole and op.groups == 1:  # A dense layer.
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
  kind, x = graph.kinds[op.input], graph.names[op.input]
  bound, steps = int(kind.bound.max()), _STEPS[op.bits]
  mirror = np.where(op.falling, -1, 1)
  # From -bound, which all sums reach, to bound + 1, which none does.
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
    raise ValueError(f"{op.name}: sums beyond what float32 holds exactly")
  span = sum(steps) // scale
  rows = []
  for level, following, table in zip(levels, (*levels[1:], levels[-1] + 1), thresholds):
    rows += [(t + apart * level, step // scale) for t, step in zip(table, steps)]
    if following - level > 1:  # As many as levels between would have.
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
  """Adds scale * (the sum of `times` of reached thresholds) + bias.

  Args:
    rows: of (thresholds, a number for each channel; times).
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
  if graph.qonnx:  # Typed before the Pad, whose type is that of its input.
    x = graph.typed(f"{name}_levels", x, max(bits, 2))
  rest = () if graph.flat(i) else (0, 0)
  graph.pad(name, x, (0, op.before, *rest), (0, op.after, *rest), 0)


def _add(graph, i, op, name):
  graph.node("Add", name, *(
      graph.times(f"{name}_{side}", graph.names[j], 1 << shift)
      for side, j, shift in (("a", op.a, op.shift_a), ("b", op.b, op.shift_b))))


def _integer(bound: int) -> str:
  """The narrowest signed type of QONNX that holds -bound to bound."""
  return f"INT{max(2, int(bound).bit_length() + 1)}"


def _shapes(model: onnx.ModelProto) -> list[onnx.ValueInfoProto]:
  """Type and shape of every tensor between the nodes.

  QONNX's nodes, which ONNX's inference does not know, keep their first input's shape.
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
