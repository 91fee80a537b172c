"""The loss of training: cross-entropy, and distillation from a teacher."""

from typing import Sequence

import jax
import jax.numpy as jnp
import numpy as np
import optax

from minw.data import augment


def cross_entropy(
    logits: jax.Array,
    labels: jax.Array | np.ndarray | augment.MixedLabels,
    *,
    label_smoothing: float = 0.0,
    class_weights: Sequence[float] | None = None,
) -> jax.Array:
  """Returns the cross-entropy of each example.

  Args:
    logits: Logits, float (batch, classes).
    labels: Labels, int32 (batch,). The loss of a mixed image is that of its two labels,
      each times its share.
    label_smoothing: Probability that is spread evenly over all classes (Szegedy et al.,
      arXiv 1512.00567, Section 7).
    class_weights: Weight of each class, by which the loss of its examples is
      multiplied. None for no weights.

  Returns:
    The losses, float (batch,).
  """
  if isinstance(labels, augment.MixedLabels):
    first, second = (
        cross_entropy(logits, part, label_smoothing=label_smoothing,
                      class_weights=class_weights)
        for part in (labels.first, labels.second))
    return labels.share * first + (1 - labels.share) * second
  if label_smoothing:
    targets = jax.nn.one_hot(labels, logits.shape[-1], dtype=logits.dtype)
    losses = optax.softmax_cross_entropy(
        logits, optax.smooth_labels(targets, label_smoothing))
  else:
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
  if class_weights is None:
    return losses
  return losses * jnp.asarray(class_weights, losses.dtype)[labels]


def distillation(
    logits: jax.Array, teacher_logits: jax.Array, temperature: float
) -> jax.Array:
  """Returns the distance of each example's prediction from that of a teacher.

  It is temperature^2 KL(softmax(teacher_logits / temperature) || softmax(logits /
  temperature)), as in Hinton et al. (arXiv 1503.02531, Section 2.1). The factor keeps
  the size of its gradients independent of the temperature. The teacher receives no
  gradient.

  Args:
    logits: Logits, float (batch, classes).
    teacher_logits: Logits of the teacher, float (batch, classes).
    temperature: Positive number by which all logits are divided.

  Returns:
    The distances, float (batch,), at least 0.
  """
  targets = jax.nn.log_softmax(jax.lax.stop_gradient(teacher_logits) / temperature)
  predicted = jax.nn.log_softmax(logits / temperature)
  return temperature**2 * jnp.sum(jnp.exp(targets) * (targets - predicted), axis=-1)
