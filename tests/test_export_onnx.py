"""Exports to ONNX and QONNX: by ONNX Runtime and qonnx as the packed network."""

import hypothesis
import numpy as np
import pytest

from minw import packed
from minw.data import datasets
from minw.export import common
from minw.kernels import reference
from packed_models import WHOLE
from packed_models import convnet
from packed_models import digits_convnet
from packed_networks import GROUPS
from packed_networks import Builder
from packed_networks import groups_and_dilation
from packed_networks import images
from packed_networks import programs
from packed_networks import residual_and_dense
from packed_networks import small
from packed_networks import small_image

onnx = pytest.importorskip("onnx", reason="onnx is not installed")
onnxruntime = pytest.importorskip(
    "onnxruntime", reason="onnxruntime is not installed")
from minw.export import onnx_graph  # noqa: E402 (it imports onnx)


def as_qonnx():
  """qonnx's reader of models, and its executor."""
  pytest.importorskip("qonnx", reason="qonnx is not installed")
  from qonnx.core import modelwrapper
  from qonnx.core import onnx_exec
  return modelwrapper.ModelWrapper, onnx_exec.execute_onnx


def assert_onnx_equal(program, batch):
  model = onnx_graph.model(program)
  onnx.checker.check_model(model, full_check=True)
  session = onnxruntime.InferenceSession(model.SerializeToString())
  logits, labels = session.run(["logits", "label"], {"image": batch})
  wanted = reference.logits(program, batch)
  np.testing.assert_array_equal(logits, wanted)
  np.testing.assert_array_equal(labels, wanted.argmax(-1))
  return model


def assert_qonnx_equal(program, batch):
  """All accumulators, levels and logits, of the model as it is exported; its types."""
  wrapper, execute = as_qonnx()
  from qonnx.transformation import infer_datatypes
  model = wrapper(onnx_graph.model(program, qonnx=True, batch=len(batch)))
  inputs = {"image": batch.transpose(0, 3, 1, 2).astype(np.float32)}
  found = execute(model, inputs, True)
  values = reference.run(program, batch)
  names = [*common.names(program)[:-1], "logits"]
  for name, value, kind in zip(names, values, packed.infer_values(program)):
    if kind.kind == "CODE":
      value = packed.levels(value, kind.bits)
    have = found[name].reshape(len(batch), -1, *kind.shape[:2])
    np.testing.assert_array_equal(have.transpose(0, 2, 3, 1), value, err_msg=name)
  types = {name: model.get_tensor_datatype(name) for name in found}
  for name in (name for node in model.graph.node for name in node.output):
    if not name.startswith((names[-1], common.names(program)[-1])):  # Not logits.
      assert types[name].is_integer(), name
    assert (types[name].min() <= found[name]).all(), name
    assert (found[name] <= types[name].max()).all(), name
    assert types[name].name != "BIPOLAR" or found[name].all(), name
  inferred = model.transform(infer_datatypes.InferDataTypes())
  assert types == {name: inferred.get_tensor_datatype(name) for name in found}


def assert_logits_equal(model, program):
  """The logits of one image, of a QONNX model that was transformed."""
  _, execute = as_qonnx()
  image = images(program, 1)
  result, = execute(model, {
      model.graph.input[0].name: image.transpose(0, 3, 1, 2).astype(np.float32)
  }).values()
  np.testing.assert_array_equal(result, reference.logits(program, image))


def test_by_hand():
  image = small_image()
  session = onnxruntime.InferenceSession(
      onnx_graph.model(small()).SerializeToString())
  logits, labels = session.run(None, {"image": image})
  assert logits.tolist() == [[-112.5, 10.0]] and labels.tolist() == [1]


@pytest.mark.parametrize("equal", [assert_onnx_equal, assert_qonnx_equal])
@pytest.mark.parametrize("bits", [(1, 1), (2, 2), (3, 3), (1, 3), (3, 1)])
def test_convnets(bits, equal):
  program = convnet(*bits, shape=(11, 12, 3), crop=(11, 9))
  equal(program, images(program, 9))


@pytest.mark.parametrize("equal", [assert_onnx_equal, assert_qonnx_equal])
@pytest.mark.parametrize("bits", (1, 2, 3))
def test_every_operation(bits, equal):
  program = residual_and_dense(bits)
  equal(program, images(program, 5))


@pytest.mark.parametrize("equal", [assert_onnx_equal, assert_qonnx_equal])
@pytest.mark.parametrize("bits, pad", GROUPS)
def test_groups_and_dilation(bits, pad, equal):
  program = groups_and_dilation(bits, pad)
  equal(program, images(program, 4))


@pytest.mark.parametrize("equal", [assert_onnx_equal, assert_qonnx_equal])
@pytest.mark.parametrize("bits", (1, 2, 3))
@pytest.mark.parametrize("shortcut", (1, 2, 3))
def test_shortcuts_of_all_bits(shortcut, bits, equal):
  """Also thresholds that no sum reaches, and that all do."""
  b = Builder(np.random.default_rng(bits), (5, 4, 2))
  x = b.threshold(b.conv(0, 1, 30), shortcut)
  y = b.threshold(b.conv(x, 1, 30), bits, x)
  b.ops[-1].thresholds[:, :, :4] = [10**6, -10**6, 2**31 - 1, -2**31]
  program = b.end(y, bits)
  equal(program, images(program, 9))


@pytest.mark.parametrize("equal", [assert_onnx_equal, assert_qonnx_equal])
@pytest.mark.parametrize("bits", (1, 2, 3))
def test_shortcuts_beside_the_largest_sums(bits, equal):
  rng = np.random.default_rng(bits)
  b = Builder(rng, (9, 9, 2))
  short = b.threshold(b.conv(0, 1, 2), 2)
  b.ops[-1].thresholds[...] = [[[-500], [500]]]  # All three levels, side by side.
  x = b.threshold(b.conv(0, 1, 2), 3)
  y = b.threshold(b.conv(x, 1, 2, (1, 1), pads=(0,) * 4), bits, short)
  thresholds = b.ops[-1].thresholds
  thresholds[...] = rng.choice([-9, -8, -7, 7, 8, 9], thresholds.shape)  # Around 8.
  program = b.end(y, bits)
  equal(program, images(program, 9))


@hypothesis.given(programs())
@hypothesis.settings(
    max_examples=10, suppress_health_check=list(hypothesis.HealthCheck))
def test_random_networks(program):
  assert_onnx_equal(program, images(program, 3))


def test_digits():
  """Equal on every test image."""
  batch = datasets.load("digits", "test", None)[0]
  program = digits_convnet()
  assert_onnx_equal(program, batch)
  assert_qonnx_equal(program, batch)


@pytest.mark.parametrize("qonnx, batch, wanted", [
    (False, None, "batch"), (False, 3, 3), (True, None, 1), (True, 3, 3)])
def test_every_tensor_has_its_shape(qonnx, batch, wanted):
  program = residual_and_dense(1)
  graph = onnx_graph.model(program, qonnx=qonnx, batch=batch).graph
  shapes = {
      info.name: [d.dim_param or d.dim_value for d in info.type.tensor_type.shape.dim]
      for info in (*graph.input, *graph.value_info, *graph.output)}
  for node in graph.node:
    shape = shapes[node.output[0]]
    if not node.output[0].endswith("_weight"):
      assert shape[0] == wanted, node.name
      assert all(isinstance(n, int) and n for n in shape[1:]), node.name
  for name, kind in zip(common.names(program)[:-1], packed.infer_values(program)):
    h, w, c = kind.shape
    assert shapes[name] == ([wanted, c] if h == w == 1 else [wanted, c, h, w])
  assert shapes["logits"] == [wanted, 7]


def test_onnx_of_one_image_runs_in_qonnx():
  wrapper, execute = as_qonnx()
  program = digits_convnet()
  image = images(program, 1)
  found = execute(wrapper(onnx_graph.model(program, batch=1)), {"image": image})
  wanted = reference.logits(program, image)
  np.testing.assert_array_equal(found["logits"], wanted)
  np.testing.assert_array_equal(found["label"], wanted.argmax(-1))


@pytest.mark.parametrize("bits", (1, 2, 3))
def test_types_stay_in_a_clean_model(bits):
  """Sums of windows and shortcuts among them; and the model gives equal logits."""
  wrapper, _ = as_qonnx()
  from qonnx.transformation import infer_datatypes
  from qonnx.util import cleanup
  from qonnx.util import inference_cost
  program = residual_and_dense(bits)
  clean = cleanup.cleanup_model(wrapper(onnx_graph.model(program, qonnx=True)))
  assert_logits_equal(clean, program)
  cost = inference_cost.inference_cost(clean)["total_cost"]
  assert not any("FLOAT" in key for key in cost), cost
  inferred = clean.transform(infer_datatypes.InferDataTypes())
  for name in clean.get_all_tensor_names():
    assert inferred.get_tensor_datatype(name) == clean.get_tensor_datatype(name), name


def test_types_hold_the_sums_that_there_can_be():
  b = Builder(np.random.default_rng(0), (4, 4, 1))
  x = b.threshold(b.conv(0, 1, 5), 3)
  x = b.add(packed.Pool("sum", x, "sum", (4, 4), (1, 1)))  # 16 levels of 4: up to 64.
  model = onnx_graph.model(b.end(x, 1), qonnx=True)
  types = {a.tensor_name: a.quant_parameter_tensor_names[0].value
           for a in model.graph.quantization_annotation}
  assert types["03_sum"] == "INT8"
  assert types["02_norm"] == "INT4" and types["01_conv"] == types["04_conv"] == "INT32"


def test_tools_of_qonnx():
  wrapper, _ = as_qonnx()
  from qonnx.util import cleanup
  from qonnx.util import inference_cost
  program = digits_convnet()
  model = onnx_graph.model(program, qonnx=True)
  clean = cleanup.cleanup_model(wrapper(model))
  assert_logits_equal(clean, program)
  kinds = [node.op_type for node in clean.graph.node]
  convs = [op for op in program.ops if isinstance(op, packed.Conv)]
  assert kinds.count("BipolarQuant") == len(convs)
  cost = inference_cost.inference_cost(clean)["total_cost"]
  assert cost["total_mem_w_bits"] == sum(op.kernel.size for op in convs)
  sizes = [kind.shape[0] * kind.shape[1] for kind in packed.infer_values(program)]
  macs = [op.kernel.size * sizes[i + 1] for i, op in enumerate(program.ops)
          if isinstance(op, packed.Conv)]
  assert cost["total_macs"] == sum(macs)
  # Convolutions have borders of 0, a third level.
  assert cost["op_mac_INT2_BIPOLAR"] == sum(macs[1:3])
  assert cost["op_mac_BIPOLAR_BIPOLAR"] == sum(macs[3:])


def test_convolutions_lower_as_finn_lowers_them():
  wrapper, _ = as_qonnx()
  from qonnx.transformation import fold_constants
  from qonnx.transformation import infer_datatypes
  from qonnx.transformation import infer_shapes
  from qonnx.transformation import lower_convs_to_matmul
  from qonnx.util import cleanup
  program = digits_convnet()
  model = cleanup.cleanup_model(wrapper(onnx_graph.model(program, qonnx=True)))
  for transformation in (
      infer_datatypes.InferDataTypes(), fold_constants.FoldConstants([]),
      lower_convs_to_matmul.LowerConvsToMatMul(), infer_shapes.InferShapes(),
      infer_datatypes.InferDataTypes()):
    model = model.transform(transformation)
  assert not model.get_nodes_by_op_type("Conv")
  for node in model.get_nodes_by_op_type("MatMul"):
    assert model.get_tensor_datatype(node.input[1]).name == "BIPOLAR"
  assert_logits_equal(model, program)


@pytest.mark.parametrize("bits, container", [(1, "BipolarQuant"), (2, 2), (3, 4)])
def test_weights_in_their_bits(bits, container):
  """Powers of two in 4 bits: those of 3 end at 3."""
  model = onnx_graph.model(
      convnet(bits, shape=(9, 9, 3), crop=(9, 9)), qonnx=True)
  constants = {c.name: onnx.numpy_helper.to_array(c) for c in model.graph.initializer}
  for node in model.graph.node:
    if node.op_type in ("Conv", "MatMul"):
      weights, = (n for n in model.graph.node if n.output[0] == node.input[1])
      if bits == 1:
        assert weights.op_type == container
      else:
        assert weights.op_type == "Quant" and constants[weights.input[3]] == container
        attributes = {a.name: a.i for a in weights.attribute}
        assert attributes["narrow"] == attributes["signed"] == 1
      assert constants[weights.input[1]] == 1
  levels = np.unique(np.concatenate(
      [v.ravel() for k, v in constants.items() if k.endswith("_levels")]))
  assert levels.tolist() == {
      1: [-1, 1], 2: [-1, 0, 1], 3: [-4, -2, -1, 0, 1, 2, 4]}[bits]


@pytest.mark.parametrize("qonnx", [True, False])
def test_metadata(qonnx):
  model = onnx_graph.model(digits_convnet(), qonnx=qonnx)
  metadata, = (p.value for p in model.metadata_props if p.key == "minw")
  assert '"config_hash": "a1b2"' in metadata and '"number 9"' in metadata
  assert '"pixel_offset": [125]' in metadata
  domains = {node.domain for node in model.graph.node}
  assert domains == ({"", "qonnx.custom_op.general"} if qonnx else {""})
  assert {o.domain for o in model.opset_import} == domains


def test_what_float32_does_not_hold_is_refused_by_name():
  b = Builder(np.random.default_rng(0), (3, 3, 1))
  x = b.add(packed.Concat("wide", (b.conv(0, 3, 2),), (15,)))
  program = b.end(b.threshold(x, 1))
  with pytest.raises(ValueError, match=r"wide: its sums exceed 2\^24"):
    onnx_graph.model(program)
  program = convnet(1, "float32", shape=(9, 9, 3), crop=(9, 9))
  with pytest.raises(ValueError, match="norm_conv1 has operands in a float format"):
    onnx_graph.model(program)


@pytest.mark.slow
@pytest.mark.parametrize("make", WHOLE, ids=[*"ABCD", "resnet18"])
def test_whole_networks(make):
  program = make()
  batch = images(program, 2)
  assert_onnx_equal(program, batch)
  assert_qonnx_equal(program, batch)
