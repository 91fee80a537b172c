"""minw.losses: against values worked out by hand and in NumPy float64."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from minw import losses
from minw.data import augment

RNG = np.random.default_rng(0)
LOGITS = RNG.normal(0, 3, (7, 5))
LABELS = np.array([0, 4, 2, 2, 1, 3, 0])


def probabilities(logits):
  powers = np.exp(logits - logits.max(-1, keepdims=True))
  return powers / powers.sum(-1, keepdims=True)


def float32(array):
  return jnp.asarray(array, jnp.float32)


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("weights", [None, (0.5, 1.0, 0.0, 3.0, 2.0)])
def test_cross_entropy(smoothing, weights):
  targets = (1 - smoothing) * np.eye(5)[LABELS] + smoothing / 5
  want = -(targets * np.log(probabilities(LOGITS))).sum(-1)
  want *= np.array(weights or [1.0] * 5)[LABELS]
  got = losses.cross_entropy(float32(LOGITS), LABELS, label_smoothing=smoothing,
                             class_weights=weights)
  np.testing.assert_allclose(got, want, rtol=1e-5)


def test_mixed_labels():
  share, other = np.linspace(0, 1, 7), LABELS[::-1]
  mixed = augment.MixedLabels(LABELS, other, float32(share))
  options = dict(label_smoothing=0.1, class_weights=(0.5, 1.0, 0.0, 3.0, 2.0))
  first, second = (np.asarray(losses.cross_entropy(float32(LOGITS), part, **options))
                   for part in (LABELS, other))
  np.testing.assert_allclose(
      losses.cross_entropy(float32(LOGITS), mixed, **options),
      share * first + (1 - share) * second, rtol=1e-5)


def test_smoothed_loss_by_hand():
  # Two classes, logits 0 and ln 3: probabilities 1/4 and 3/4, label 1, smoothing 0.2.
  got = losses.cross_entropy(
      float32([[0.0, math.log(3)]]), np.array([1]), label_smoothing=0.2)
  assert float(got[0]) == pytest.approx(
      -0.1 * math.log(1 / 4) - 0.9 * math.log(3 / 4), rel=1e-6)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_distillation(temperature):
  teacher = RNG.normal(0, 2, LOGITS.shape)
  p, q = (probabilities(logits / temperature) for logits in (teacher, LOGITS))
  want = temperature**2 * (p * np.log(p / q)).sum(-1)
  arguments = float32(LOGITS), float32(teacher)
  np.testing.assert_allclose(
      losses.distillation(*arguments, temperature), want, rtol=1e-4, atol=1e-6)
  slopes = jax.grad(lambda *logits: losses.distillation(*logits, temperature).sum(),
                    argnums=(0, 1))(*arguments)
  np.testing.assert_allclose(slopes[0], temperature * (q - p), rtol=1e-4, atol=1e-6)
  assert not np.any(slopes[1])


def test_nothing_is_left_to_learn_from_an_equal_network():
  got = losses.distillation(float32(LOGITS), float32(LOGITS + 7), 3.0)
  np.testing.assert_allclose(got, np.zeros(7), atol=1e-5)


def test_a_certain_teacher_and_a_wrong_network_give_finite_losses():
  got = losses.distillation(
      float32([[1e4, -1e4]]), float32([[-1e4, 1e4]]), 1.0)
  assert float(got[0]) == pytest.approx(2e4)
