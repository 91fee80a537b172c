"""The promise: a packed network equals the trained one, or is refused by name."""

import collections
import os
import re

import jax
import numpy as np
import pytest

from minw import fold
from minw import infer
from minw import pack
from minw import packed
from minw.data import pixels as pixels_lib
from network_variables import variables_of
from random_networks import RandomNetwork

SHAPE = (7, 6, 2)
PIXELS = pixels_lib.pixels("integer", (0.49, 0.45), (0.25, 0.25))
IMAGES = np.random.default_rng(0).integers(0, 256, (12, *SHAPE), np.uint8)
# Seeds of the fast test; how many networks are drawn in all, and from which seed on.
FAST = range(20, 25)
COUNT = int(os.environ.get("MINW_RANDOM_NETWORKS", "500"))
FIRST = int(os.environ.get("MINW_RANDOM_SEED", "0"))


def trained(model: RandomNetwork):
  """Variables as after training: batch norms of both signs among them."""
  return variables_of(
      model, SHAPE, model.seed, var=lambda rng, n: rng.uniform(0.5, 30, n),
      step=lambda rng, n: rng.uniform(0.4, 1.5, n),
      other=lambda rng, n: rng.normal(0, 1, n))


def packed_and_folded(model: RandomNetwork, variables):
  """The packed network, and the hard network that it was made of.

  To fold another time would take a tenth of the tests' time.
  """
  folded, exact = [], fold.fold
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(fold, "fold", lambda *args: folded.append(exact(*args)) or folded[0])
    program = pack.pack(model, variables, pixels=PIXELS, source_shape=SHAPE)
  hard, = folded
  return program, hard


def outcome(seed: int, backends=("reference", "native")) -> str:
  """Packs a network and compares it: "packed", or why it was refused.

  Raises:
    AssertionError: it is another network, or the refusal names nothing.
  """
  model = RandomNetwork(seed)
  where = f"seed {seed}, near miss {model.near_miss!r}"
  try:
    variables = trained(model)
    program, hard = packed_and_folded(model, variables)
  except ValueError as error:
    text = str(error)
    # The one error at construction names the attribute, all others a layer or
    # parameter.
    assert re.search(r"padding=|(Quant|Norm|Dense|params)\w*/?\w*", text), (
        f"{where}: {text}")
    return text
  inputs = pixels_lib.normalize(IMAGES, PIXELS)
  want = np.asarray(jax.jit(
      lambda hard, x: model.apply(hard, x, mode="hard"))(hard, inputs))
  data = packed.to_bytes(program)
  for backend in backends:
    got = infer.Network(data, backend, 1).logits(IMAGES)
    np.testing.assert_array_equal(
        got, want, f"{where}: {backend} differs from the hard network")
  # At alpha = 1 training computes the same but for the rounding of its batch norm, by
  # which a code next to a threshold may flip: nearly all images must agree.
  mixed = np.asarray(jax.jit(lambda variables, x: model.apply(
      variables, x, 1.0, mode="mixed", mutable=["quantized", "distance"],
      rngs={"estimator": jax.random.key(0)})[0])(variables, inputs))
  scale = np.abs(want).max() + 1e-3
  same = np.abs(mixed - want).max(-1) <= 1e-3 * scale
  assert same.sum() >= len(IMAGES) - 2, (
      f"{where}: the hard network differs from the trained one on {(~same).sum()} of"
      f" {len(IMAGES)} images, by up to {np.abs(mixed - want).max():.3g}")
  return "packed"


def check(seeds, backends=("reference", "native")) -> None:
  """Both outcomes must be frequent, as a test of refusals alone tests nothing."""
  outcomes = collections.Counter(outcome(seed, backends) for seed in seeds)
  assert 0.3 * len(seeds) < outcomes["packed"] < 0.9 * len(seeds), outcomes


def test_equal_to_the_trained_network_or_refused_by_name():
  check(FAST)


@pytest.mark.slow
def test_xla_too():
  check(range(10_000, 10_040), ("xla",))


@pytest.mark.slow
@pytest.mark.parametrize("part", range(4))  # For several processes.
def test_many_more(part):
  """MINW_RANDOM_NETWORKS=20000 draws as many; MINW_RANDOM_SEED sets the first seed."""
  check([seed for seed in range(FIRST + part, FIRST + COUNT, 4) if seed not in FAST])
