"""minw.bench inference on accelerators: each engine is right, or left out by name."""

import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from minw import config as config_lib
from minw import packed
from minw.bench import device_engines
from minw.bench import device_inference
from minw.bench import engines
from minw.bench import networks
from minw.kernels import reference

NAMES = ["packed", "float32", "bfloat16", "int8 products", "int8 convolutions"]
CHANGES = {
    "W1A1": dict(input_bits=1, weight_bits=1),
    "W2A3": dict(input_bits=3, weight_bits=2, first_padding="VALID"),
    "W3A1": dict(input_bits=1, weight_bits=3, pad_value=-1.0, conv_widths=(4, 6, 6, 6)),
}


def tiny_config(**changes):
  c = config_lib.default_config()
  c.update(dataset="cifar10", crop_size=12, conv_widths=(4, 6), dense_widths=(8,))
  c.update(changes)
  return c


def images_of(program, count=4):
  """Random images; one has all pixels black, and one has all of them white."""
  images = np.random.default_rng(0).integers(
      0, 256, (count, *program.source_shape), np.uint8)
  images[0], images[1] = 0, 255
  return images


@pytest.mark.parametrize("changes", CHANGES.values(), ids=CHANGES)
@pytest.mark.parametrize("name", [
    pytest.param("packed", marks=pytest.mark.gpu),
    pytest.param("int8 products", marks=pytest.mark.gpu),
    "int8 convolutions"])  # Not every device has these.
def test_they_compute_the_packed_network(name, changes):
  program = networks.random_network(tiny_config(**changes))
  images, engine = images_of(program), device_engines.ENGINES[name](program)
  logits = jax.jit(engine.logits)(engine.operands, images)
  assert engine.tolerance == 0 and logits.dtype == np.float32
  np.testing.assert_array_equal(logits, reference.logits(program, images))


@pytest.mark.slow
def test_they_compute_residual_networks():
  program = networks.random_network(tiny_config(
      network="resnet18", crop_size=32, input_bits=2, weight_bits=1))
  images = images_of(program)
  engine = device_engines.ENGINES["int8 products"](program)
  np.testing.assert_array_equal(
      jax.jit(engine.logits)(engine.operands, images),
      reference.logits(program, images))


@pytest.mark.parametrize("name, kinds", [
    ("int8 products", {"dot_general": 4}),
    ("int8 convolutions", {"convolution": 2, "dot_general": 2})])
def test_all_factors_are_int8(name, kinds):
  program = networks.random_network(tiny_config(**CHANGES["W2A3"]))
  engine = device_engines.ENGINES[name](program)
  text = jax.jit(engine.logits).lower(engine.operands, images_of(program)).as_text()
  products = re.findall(
      r"stablehlo\.(dot_general|convolution)\b.*: \((.*), (.*)\) -> (.*)", text)
  assert {kind: sum(kind == found for found, *_ in products)
          for kind in {kind for kind, *_ in products}} == kinds
  for _, *factors, sums in products:
    assert all(factor.endswith("xi8>") for factor in factors) and "xi32>" in sums


@pytest.mark.gpu
def test_float_networks():
  """In NumPy: their image is the crop less the offset, in units of 64."""
  program = networks.random_network(tiny_config())
  images, layers = images_of(program), networks.float_layers(program)
  y = (images[:, 10:22, 10:22].astype(np.float64) - program.offset) / 64
  for i, layer in enumerate(layers):
    y = np.pad(y, ((0, 0), layer.pads[:2], layer.pads[2:], (0, 0)))
    windows = np.lib.stride_tricks.sliding_window_view(
        y, layer.kernel.shape[:2], (1, 2))
    y = np.einsum("nyxchw,hwco->nyxo", windows, layer.kernel) + layer.bias
    if layer.pool:
      n, h, w, c = y.shape
      y = y.reshape(n, h // 2, 2, w // 2, 2, c).max((2, 4))
    y = y.clip(-1, 1) if i < len(layers) - 1 else y
  want = y[:, 0, 0]
  np.testing.assert_allclose(
      device_engines.float_logits(program, images), want, atol=1e-4)
  for name, dtype, error in (("float32", np.float32, 0.02),
                             ("bfloat16", jnp.bfloat16, 0.05)):
    engine = device_engines.ENGINES[name](program)
    assert {leaf.dtype for leaf in jax.tree.leaves(engine.operands)} == {
        np.dtype(dtype)}
    got = jax.jit(engine.logits)(engine.operands, images)
    assert got.dtype == dtype
    np.testing.assert_allclose(
        got.astype(np.float32), want, atol=error * np.abs(want).max())


def with_float_layer():
  return networks.random_network(tiny_config(bits_rules=(("conv1", "float32"),)))


def with_large_sums():
  """The sums of 12x12 codes are the input of a dense layer."""
  *ops, logits = networks.stack(1, networks.Block(12, 4), 1, 1).ops
  dense = packed.Conv("dense", len(ops), 1, np.ones((4, 1, 1, 4), np.int8))
  return networks.stack(1, networks.Block(12, 4), 1, 1)._replace(
      ops=(*ops, dense, logits._replace(input=len(ops) + 1)))


@pytest.mark.parametrize("make, words", [
    (with_float_layer, "conv1 is no ungrouped convolution of integers"),
    (with_large_sums, "dense reads integers that int8 does not hold")])
def test_layers_that_int8_cannot_compute(make, words):
  program = make()
  for name in ("int8 products", "int8 convolutions"):
    with pytest.raises(engines.LeftOut, match=words):
      device_engines.ENGINES[name](program)
  engine = device_engines.ENGINES["packed"](program)
  assert jax.jit(engine.logits)(engine.operands, images_of(program)).shape[0] == 4


def broken(change):
  """Makes an engine whose logits are those of the packed network after `change`."""
  def make(program):
    engine = device_engines.ENGINES["packed"](program)
    return engine._replace(
        logits=lambda operands, images: change(engine.logits(operands, images), images))
  return make


def refuse(program):
  raise engines.LeftOut("it does not like the network")


def fail(logits, images):
  raise RuntimeError("no algorithm\nworked")


BROKEN = {
    # The last bit of one logit of the last image differs.
    "last bit": broken(lambda logits, images: logits.at[-1, 0].set(
        jnp.nextafter(logits[-1, 0], jnp.inf))),
    "NaN": broken(lambda logits, images: logits * np.nan),
    "not compiled": broken(fail),
    "only one image": broken(lambda logits, images: (
        logits if len(images) == 1 else fail(logits, images))),
    "refused": refuse,
    "wrong float": lambda program: broken(lambda logits, images: logits + 3)(
        program)._replace(tolerance=0.1),
}


@pytest.fixture(scope="module")
def result():
  with pytest.MonkeyPatch.context() as patch:
    for name, make in BROKEN.items():
      patch.setitem(device_engines.ENGINES, name, make)
    return device_inference.bench_inference(tiny_config(), 2, [1, 3])


def test_broken_engines_are_left_out_by_name(result):
  why = result["left_out"]
  assert [*why] == ["last bit", "NaN", "not compiled", "wrong float", "refused"]
  assert why["not compiled"] == "RuntimeError: no algorithm worked"
  assert why["refused"] == "it does not like the network"
  assert why["NaN"] == "its logits are wrong by up to nan"
  for name in ("last bit", "wrong float"):
    assert re.fullmatch(r"its logits are wrong by up to [\d.e-]+", why[name])
  one, three = result["runs"]
  assert [*one["engines"]] == [*NAMES, "only one image"]
  assert [*three["engines"]] == NAMES
  assert one["left_out"].keys() == why.keys()  # Another image has another last bit.
  assert three["left_out"] == why | {
      "only one image": "RuntimeError: no algorithm worked"}


def test_result_and_table(result):
  result = json.loads(json.dumps(result))
  output = device_inference.table(result)
  assert [run["batch"] for run in result["runs"]] == [1, 3]
  assert (result["bench"], result["backend"], result["rounds"]) == (
      "inference", jax.default_backend(), 2)
  assert result["config"]["conv_widths"] == [4, 6]
  assert result["machine"]["versions"]["jax"] == jax.__version__
  assert result["peak_bytes"]["process"] > 2**26
  # 3x3x3 to 4 channels, 3x3x4 to 6, then 6x6x6 to 8 and 8 to 10; and biases.
  weights, biases = 108 + 216 + 1728 + 80, 4 + 6 + 8 + 10
  for run, block in zip(result["runs"], output.split("\n\n")[1:]):
    timed, rows = run["engines"], block.splitlines()
    for name, engine in timed.items():
      assert len(engine["values"]) == 2 and min(engine["values"]) > 0
      assert engine["median"] == np.median(engine["values"])
      np.testing.assert_allclose(
          engine["images_per_second"], run["batch"] / engine["median"])
      row, = (row for row in rows if row.startswith(name))
      assert f"{1e3 * engine['median']:.3f} " in row
      assert f" {engine['images_per_second']:.0f} " in row
      assert engine["temporary_bytes"] >= 0
    assert timed["float32"]["operand_bytes"] == 4 * (weights + biases)
    assert timed["bfloat16"]["operand_bytes"] == 2 * (weights + biases)
    assert timed["packed"]["operand_bytes"] < timed["int8 products"]["operand_bytes"]
    assert 0 < timed["int8 products"]["operand_bytes"] - weights < 400  # Thresholds.
    assert [*run["ratios"]] == [f"{name} / packed" for name in [*timed][1:]]
    for name, ratio in run["ratios"].items():
      above, below = (np.array(timed[part]["values"]) for part in name.split(" / "))
      np.testing.assert_allclose(ratio["values"], above / below)
      row, = (row for row in rows if row.startswith(name.partition(" /")[0]))
      assert f" {ratio['median']:.2f} " in row
  for name, why in result["left_out"].items():
    assert output.count(f"{name:22} left out: {why}") == 1
  assert output.split("\n\n")[2].endswith(
      "only one image         left out: RuntimeError: no algorithm worked\n"
      + "\n".join(f"{name:22} left out: {why}"
                  for name, why in result["left_out"].items()))


# The command.

DISPATCH = """
import jax
jax.default_backend = lambda: "{backend}"
from minw import cli
from minw.bench import __main__ as bench
from minw.bench import device_inference, inference
for module in (device_inference, inference):
  module.table = " ".join
inference.bench_inference = lambda config, rounds, batches, blocks: [
    "CPU", str(rounds), str(batches), str(len(blocks))]
device_inference.bench_inference = lambda config, rounds, batches: [
    "device", str(rounds), str(batches)]
cli.run(bench.SUBCOMMANDS, bench.define_flags)
"""


@pytest.mark.parametrize("backend, flags, output", [
    ("cpu", [], "CPU 15 (1, 64) 0"),
    ("cpu", ["--batches=2,8", "--layers"], "CPU 15 [2, 8] 4"),
    ("gpu", ["--rounds=3"], "device 3 (1, 8, 64, 512, 4096)"),
    ("tpu", ["--batches=2"], "device 15 [2]")])
def test_the_backend_decides(command, backend, flags, output):
  ended = command("minw.bench", "inference", *flags,
                  code=DISPATCH.format(backend=backend))
  assert ended == (0, output + "\n", "")


@pytest.mark.parametrize("flags, message", [
    (["--layers"], "layers=True: must be false on a gpu; JAX_PLATFORMS=cpu times layers"
                   " on the CPU"),
    (["--batches="], "batches='': must be positive integers, 1,64 for example")])
def test_refuses_on_accelerators(command, flags, message):
  ended = command("minw.bench", "inference", *flags,
                  code=DISPATCH.format(backend="gpu"))
  assert ended == (2, "", f"error: {message}\n")
