"""Networks as Flax users write them: transforms, layers called twice, subclasses."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from minw import fold
from minw import infer
from minw import layers
from minw import pack
from minw import packed
from minw import structure
from minw.data import pixels as pixels_lib
import network_variables

PIXELS = pixels_lib.pixels("integer", (0.49, 0.48, 0.45), (0.2, 0.2, 0.2))
SHAPE = (6, 6, 3)
AXES = {"params": 0, "batch_stats": 0, "hard": 0}


class Block(nn.Module):
  conv: type = layers.QuantConv

  @nn.compact
  def __call__(self, x, alpha=1.0, mode="hard"):
    y = self.conv(8, name="conv")(x, alpha, mode)
    return layers.NormQuant(bits=2, name="norm")(y, alpha, mode, shortcut=x)


def blocks(x, *arguments):
  """What nn.scan repeats, written out."""
  for i in range(3):
    x = Block(name=f"block{i}")(x, *arguments)
  return x


def scanned(x, alpha, mode, axes=AXES, broadcast=False):
  x, _ = nn.scan(
      lambda block, x, _: (block(x, alpha, mode), None), length=3, variable_axes=axes,
      variable_broadcast=broadcast,
      split_rngs={"params": not broadcast, "estimator": True})(
          Block(name="block"), x, None)
  return x


def twice(x, *arguments):
  block = Block(name="block")
  return block(block(x, *arguments), *arguments)


def of_layers(transform, **options):
  """A block whose layers are transformed themselves."""
  def body(x, *arguments):
    y = transform(layers.QuantConv, **options)(8, name="conv")(x, *arguments)
    return transform(layers.NormQuant, **options)(2, name="norm")(y, *arguments)

  return body


class Net(nn.Module):
  body: object

  @nn.compact
  def __call__(self, x, alpha=1.0, mode="hard"):
    x = layers.QuantConv(8, name="first")(x, alpha, mode)
    x = layers.NormQuant(bits=2, name="norm_first")(x, alpha, mode)
    x = self.body(x, alpha, mode)
    x = layers.QuantDense(3, name="last")(x.reshape(x.shape[0], -1), alpha, mode)
    return layers.NormQuant(bits=None, name="norm_last")(x, mode=mode)


variables_of = functools.partial(network_variables.variables_of, shape=SHAPE)


IMAGES = np.random.default_rng(1).integers(0, 256, (9, *SHAPE), np.uint8)


def logits(model, variables):
  """Logits of the hard network, in one jitted call, and of the packed one."""
  hard = fold.fold(model, variables, pixels_lib.probe(PIXELS, SHAPE))
  program = pack.pack(model, variables, pixels=PIXELS, source_shape=SHAPE)
  images = pixels_lib.normalize(IMAGES, PIXELS)
  computed = jax.jit(lambda hard: model.apply(hard, images, 1.0, mode="hard"))(hard)
  network = infer.Network(packed.to_bytes(program), "reference", 1)
  return np.asarray(computed), network.logits(IMAGES), program


def written_out(tree):
  """Variables of `blocks` from those of `scanned`."""
  result = {}
  for kind, layers_of in tree.items():
    result[kind] = {name: leaf for name, leaf in layers_of.items() if name != "block"}
    for i in range(3):
      result[kind][f"block{i}"] = jax.tree.map(lambda leaf, i=i: leaf[i],
                                               layers_of["block"])
  return result


def test_scan_is_the_network_written_out():
  variables = variables_of(Net(scanned))
  hard, packed_logits, program = logits(Net(scanned), variables)
  want, want_packed, _ = logits(Net(blocks), {
      "params": written_out(variables)["params"],
      "batch_stats": written_out(variables)["batch_stats"]})
  np.testing.assert_array_equal(hard, want)
  np.testing.assert_array_equal(packed_logits, want)
  np.testing.assert_array_equal(want_packed, want)
  assert len(np.unique(want)) > 20
  assert [op.name for op in program.ops if op.name.startswith("block")] == [
      f"block/{layer}[{i}]" for i in range(3) for layer in ("conv", "norm")]


def transformed_block(transform, **options):
  return lambda x, *arguments: transform(Block, **options)(name="block")(x, *arguments)


@pytest.mark.parametrize("body, plain", [
    (transformed_block(nn.remat, static_argnums=(3,)),
     lambda x, *a: Block(name="block")(x, *a)),
    (of_layers(nn.jit, static_argnums=(2, 3)), of_layers(lambda layer: layer)),
    *(pytest.param(*slow, marks=pytest.mark.slow) for slow in (
        (transformed_block(nn.jit, static_argnums=(2, 3)),
         lambda x, *a: Block(name="block")(x, *a)),
        (of_layers(nn.remat, static_argnums=(3,)), of_layers(lambda layer: layer)))),
], ids=["remat", "jit of layers", "jit", "remat of layers"])
def test_transforms_change_nothing(body, plain):
  variables = variables_of(Net(plain))
  assert jax.tree.structure(variables) == jax.tree.structure(variables_of(Net(body)))
  want = logits(Net(plain), variables)[0]
  # First without, then with opaque layers, and again: nothing of it is cached.
  images = pixels_lib.normalize(IMAGES, PIXELS)
  mixed = [Net(body).apply(variables, images, 1.0, mode="mixed")]
  for _ in range(2):
    hard, packed_logits, _ = logits(Net(body), variables)
    np.testing.assert_array_equal(hard, want)
    np.testing.assert_array_equal(packed_logits, want)
    mixed.append(Net(body).apply(variables, images, 1.0, mode="mixed"))
  np.testing.assert_array_equal(mixed[0], mixed[-1])
  assert len(layers.trace(Net(body), SHAPE)) == 6


def test_trace_has_a_line_for_each_iteration():
  infos = layers.trace(Net(scanned), SHAPE)
  assert [info.path for info in infos] == [
      "first", "norm_first", *["block/conv", "block/norm"] * 3, "last", "norm_last"]
  assert infos[4].kernel_shape == (3, 3, 8, 8) and infos[4].input_bits == 2


def test_a_layer_called_twice_packs_where_both_calls_fold_alike():
  variables = variables_of(Net(twice))
  hard, packed_logits, program = logits(Net(twice), variables)
  np.testing.assert_array_equal(hard, packed_logits)
  assert [op.name for op in program.ops][2:6] == [
      "block/conv", "block/norm", "block/conv[1]", "block/norm[1]"]


def test_a_layer_called_twice_is_refused_where_they_differ():
  def body(x, alpha, mode):  # The norm's inputs have two scales.
    norm = layers.NormQuant(name="shared")
    scaled = [layers.QuantConv(8, weight_scale="layer_mean", name=f"conv{i}")
              for i in range(2)]
    x = norm(scaled[0](x, alpha, mode), alpha, mode)
    return norm(scaled[1](x, alpha, mode), alpha, mode)

  with pytest.raises(ValueError, match="cannot be packed: shared: is called more than"):
    fold.fold(Net(body), variables_of(Net(body)), pixels_lib.probe(PIXELS, SHAPE))


class Backwards(layers.QuantConv):
  """Gives channels from the last to the first."""

  @nn.compact
  def __call__(self, x, alpha=1.0, mode="hard"):
    return super().__call__(x, alpha, mode)[..., ::-1]


class Renamed(layers.NormQuant):
  """Overrides nothing."""


class Biased(layers.QuantConv):

  @nn.compact
  def __call__(self, x, alpha=1.0, mode="hard"):
    x = super().__call__(x, alpha, mode)
    return x + self.param("own", nn.initializers.zeros, (8,))


@pytest.mark.parametrize("body, message", [
    (lambda x, *a: Block(Backwards, name="block")(x, *a),
     "block/conv: Backwards is a subclass of QuantConv"),
    (lambda x, *a: nn.remat(Backwards, static_argnums=(3,))(8, name="conv")(x, *a),
     "conv: Backwards is a subclass of QuantConv"),
    (lambda x, *a: Renamed(name="norm")(layers.QuantConv(8, name="conv")(x, *a), *a),
     "norm: Renamed is a subclass of NormQuant"),
    (lambda x, *a: scanned(x, *a, axes={"params": 0, "batch_stats": 0}),
     "block/conv: is inside a transform .* 'hard': add it to variable_axes"),
    (lambda x, *a: scanned(x, *a, axes={}, broadcast=list(AXES)),
     "block/.*: is inside nn.scan with variables that the iterations share"),
    (lambda x, *a: nn.vmap(
        Block, in_axes=(None, None, None), out_axes=4, axis_size=2, variable_axes=AXES,
        split_rngs={"params": True})(name="block")(x, *a).sum(4),
     "block/conv: is inside jax.vmap or nn.vmap"),
    (lambda x, alpha, mode: layers.NormQuant(name="norm")(
        layers.QuantConv(8, name="conv")(x, alpha, "mixed"), alpha, mode),
     "conv: is called with mode='mixed' where the network is called with mode='fold'"),
    (lambda x, *a: nn.scan(
        lambda layer, carry, row: (carry, layer(row, *a)), in_axes=1, out_axes=1,
        variable_axes=AXES, split_rngs={"params": True})(
            layers.QuantDense(8, name="dense"), 0, x)[1],
     "dense: is in a loop that takes activations apart"),
    (lambda x, *a: x * (Block(name="block")(x, *a).sum() > 0).astype(x.dtype),
     r"a sum of block/norm over axes \(0, 1, 2, 3\) is not supported"),
    (lambda x, *a: (lambda y: y * (y > 0).astype(y.dtype))(Block(name="block")(x, *a)),
     "gt of block/norm does not pack"),
], ids=range(10))
def test_what_does_not_pack_is_refused_by_name(body, message):
  model = Net(body)
  variables = variables_of(model)
  with pytest.raises(ValueError, match="cannot be packed: " + message):
    pack.pack(model, variables, pixels=PIXELS, source_shape=SHAPE)


def one_block(x, *arguments):
  return Block(name="block")(x, *arguments)


def without_a_layer(variables):
  del variables["params"]["block"]["conv"]
  return variables


@pytest.mark.parametrize("body, change, side, message", [
    (one_block, without_a_layer, 6, "block/conv: its variables are missing"),
    (one_block, lambda variables: variables, 8, r"last: .* \(512,\) and \(288,\)"),
    (lambda x, *a: x + np.asarray(one_block(x, *a)), lambda variables: variables, 6,
     "block/norm: after it, TracerArrayConversionError: The numpy.ndarray conversion"),
    (lambda x, *a: nn.cond(
        x.sum() > 0, lambda block, x: block(x, *a), lambda block, x: -block(x, *a),
        Block(name="block"), x), lambda variables: variables, 6,
     "block/conv: is inside a cond"),
], ids=["missing", "shape", "NumPy", "cond"])
def test_other_networks_than_the_trained_one_are_refused_by_name(
    body, change, side, message):
  """The variables are those of a network with one block, for images of 6 x 6."""
  variables = change(variables_of(Net(one_block)))
  with pytest.raises(ValueError, match="cannot be packed: " + message):
    pack.pack(Net(body), variables, pixels=PIXELS, source_shape=(side, side, 3))


def test_a_subclass_with_parameters_of_its_own_does_not_fold():
  model = Net(lambda x, *a: Block(Biased, name="block")(x, *a))
  variables = jax.tree.map(
      lambda leaf: np.ones(leaf.shape, np.float32),
      jax.eval_shape(lambda: layers.initialize(model, SHAPE)))
  with pytest.raises(ValueError,
                     match="block/conv: Biased, a subclass of QuantConv, has"
                     " variables of its own: own"):
    fold.fold(model, variables, pixels_lib.probe(PIXELS, SHAPE))


def test_fields_may_be_lists():
  def body(x, *a):
    conv = layers.QuantConv(
        8, kernel_size=[3, 3], strides=[2, 1], padding=[[0, 1], [2, 0]], name="conv")
    return layers.NormQuant(thresholds=[0.4], bits=2, name="norm")(conv(x, *a), *a)

  hard, packed_logits, program = logits(Net(body), variables_of(Net(body)))
  np.testing.assert_array_equal(hard, packed_logits)
  # (6 + 1 - 3) // 2 + 1 rows and 6 + 2 - 3 + 1 columns.
  assert packed.infer_values(program)[4].shape == (3, 6, 8)


def test_a_subclass_may_change_its_shape_from_trace_to_trace():
  width = 4

  class Cut(layers.QuantConv):

    @nn.compact
    def __call__(self, x, alpha=1.0, mode="hard"):
      return super().__call__(x, alpha, mode)[..., :width]

  def body(x, *a):
    return layers.NormQuant(name="norm")(Cut(8, name="conv")(x, *a), *a)

  for width in (4, 6):  # noqa: B007 (`Cut` reads it)
    shapes = [info.output_shape for info in layers.trace(Net(body), SHAPE)]
    assert shapes[2:4] == [(6, 6, width)] * 2


def test_evaluate_runs_loops_backwards_and_stacks():
  def f(x):
    return jax.lax.scan(lambda c, y: (c + y, c * y), x, jnp.arange(4.0), reverse=True)

  closed = jax.make_jaxpr(jax.jit(f))(2.0)
  got = structure.evaluate(
      closed, [np.float32(2)], lambda eqn, given, where: structure.apply_equation(
          eqn, given))
  # 2, then 2 + 3 = 5, 5 + 2 = 7, 7 + 1 = 8, 8 + 0.
  np.testing.assert_array_equal(got[0], 8)
  np.testing.assert_array_equal(got[1], [0, 7, 10, 6])
