"""The training step: its state, and the programs that compute on it between reports."""

import itertools
from typing import Any, Callable, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax

from minw import estimators
from minw import experiment as experiment_lib
from minw import layers
from minw import losses
from minw import optim
from minw import quantizers
from minw.data import augment
from minw.experiment import Experiment


class Totals(NamedTuple):
  """Sums over the training examples since the last report.

  Attributes:
    loss: float32 (), sum of the losses of the examples.
    correct: float32 (), number of examples that were classified correctly.
    count: float32 (), number of examples.
    diverged_at: int32 (), first step whose loss, update or batch norm statistics were
      not finite; -1 if there is none.
  """

  loss: jax.Array
  correct: jax.Array
  count: jax.Array
  diverged_at: jax.Array


class TrainState(NamedTuple):
  """The complete state of training. Random numbers follow from the seed and the step.

  Attributes:
    step: int32 (), number of steps done.
    params: Parameters of the network.
    batch_stats: Running statistics of batch norm.
    opt_state: State of the optimizer.
    totals: Sums for the next report.
    ema: Exponential moving average of the variables, {"params", "batch_stats"}. It is
      empty unless the config has `ema_decay`.
  """

  step: jax.Array
  params: Any
  batch_stats: Any
  opt_state: Any
  totals: Totals
  ema: Any


def init_state(experiment: Experiment) -> TrainState:
  """Returns the state before the first step."""
  variables = layers.initialize(
      experiment.model, experiment.image_shape, experiment.config.seed)
  trained = {name: variables[name] for name in ("params", "batch_stats")}
  return TrainState(
      step=jnp.zeros((), jnp.int32),
      **trained,
      opt_state=experiment.optimizer.init(variables["params"]),
      totals=no_totals(),
      # The copy is a buffer of its own, as the training step donates both.
      ema=jax.tree.map(jnp.copy, trained) if experiment.config.ema_decay else {})


def no_totals() -> Totals:
  """Returns the sums before the first step."""
  first, second, third = jnp.zeros(3, jnp.float32)
  return Totals(first, second, third, jnp.full((), -1, jnp.int32))


def abstract_state(experiment: Experiment) -> TrainState:
  """Returns shapes, dtypes and shardings of the state."""
  def abstract(leaf, sharding):
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

  state = jax.eval_shape(lambda: init_state(experiment))
  whole = jax.tree.map(lambda leaf: abstract(leaf, experiment.replicated), state)
  return whole._replace(opt_state=jax.tree.map(
      lambda leaf: abstract(leaf, experiment.optimizer_sharding(leaf.shape)),
      state.opt_state))


def update(
    experiment: Experiment,
    state: TrainState,
    images: jax.Array | np.ndarray,
    labels: jax.Array | np.ndarray | augment.MixedLabels,
    key: jax.Array,
    teacher_logits: jax.Array | None = None,
) -> tuple[TrainState, jax.Array]:
  """Trains one step on one batch (Algorithm 1).

  Args:
    experiment: Network, schedules and optimizer.
    state: State before the step.
    images: Normalized images, float32 (batch, height, width, channels).
    labels: Labels, int32 (batch,), or two for each image. The prediction for a mixed
      image is correct if it is the label that has the larger share.
    key: Random key for the noise of the estimator. Estimators without noise ignore it.
    teacher_logits: The teacher's logits of these images, float32 (batch, classes). None
      if the config has no teacher.

  Returns:
    The state after the step, and the mean loss of the batch, float32 (). Losses are
    multiplied with the weights of their classes; see `Experiment.class_weights`.
  """
  c = experiment.config
  alpha = experiment.alpha(state.step)

  def loss_of(params):
    logits, changed = experiment.model.apply(
        {"params": params, "batch_stats": state.batch_stats}, images, alpha,
        mode="train", mutable=["batch_stats"], rngs={"estimator": key})
    loss = losses.cross_entropy(
        logits, labels, label_smoothing=c.label_smoothing,
        class_weights=experiment.class_weights).mean()
    if teacher_logits is not None:
      distance = losses.distillation(logits, teacher_logits, c.teacher_temperature)
      loss = (1 - c.teacher_weight) * loss + c.teacher_weight * distance.mean()
    return loss, (logits, changed["batch_stats"])

  (loss, (logits, batch_stats)), gradients = jax.value_and_grad(
      loss_of, has_aux=True)(state.params)
  updates, opt_state = experiment.optimizer.update(
      gradients, state.opt_state, state.params)
  params = optax.apply_updates(state.params, updates)
  on_grid = experiment.grid_layers
  params = optim.clip_kernels(params, jax.tree_util.tree_map_with_path(
      lambda path, _: path[-1].key == "kernel"
      and "/".join(part.key for part in path[:-1]) in on_grid, params))

  ema = {}
  if c.ema_decay:
    ema = update_ema(state.ema, {"params": params, "batch_stats": batch_stats},
                     state.step, c.ema_decay)
  totals = state.totals
  finite = jnp.isfinite(loss) & jnp.isfinite(optax.tree.norm((updates, batch_stats)))
  count = logits.shape[0]
  wanted = labels.larger if isinstance(labels, augment.MixedLabels) else labels
  correct = jnp.argmax(logits, axis=-1) == wanted
  totals = Totals(
      loss=totals.loss + loss * count,
      correct=totals.correct + jnp.sum(correct, dtype=jnp.float32),
      count=totals.count + count,
      diverged_at=jnp.where(
          finite | (totals.diverged_at >= 0), totals.diverged_at, state.step))
  return TrainState(state.step + 1, params, batch_stats, opt_state, totals, ema), loss


def update_ema(ema: Any, variables: Any, step: jax.Array, decay: float) -> Any:
  """Updates an exponential moving average.

  The average is decay_t * ema + (1 - decay_t) * variables, where decay_t is the smaller
  of `decay` and (1 + t) / (10 + t) at step t. Without the second number, the average
  of a short run would hold much of the first values.

  Args:
    ema: Average before the step.
    variables: Tree of the same structure, after the step.
    step: int32 (), number of steps that were done before this one.
    decay: Weight of the average, in [0, 1).

  Returns:
    The average after the step.
  """
  steps = step.astype(jnp.float32)
  decay_now = jnp.minimum(decay, (1 + steps) / (10 + steps))
  return jax.tree.map(
      lambda average, value: value + decay_now.astype(value.dtype) * (average - value),
      ema, variables)


def make_init_state(experiment: Experiment) -> Callable[[], TrainState]:
  """Compiles a function without arguments that makes the first state on all devices."""
  shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract_state(experiment))
  return experiment.jit(lambda: init_state(experiment), out_shardings=shardings)


def make_train_step(
    experiment: Experiment,
) -> Callable[..., tuple[TrainState, jax.Array]]:
  """Compiles the training step f(state, data, order) -> (state, loss).

  The step donates its state. It takes data and order from
  `Experiment.data.train_batches`. The seed and `state.step` determine the batch. If the
  config has a teacher, it sees the same images.
  """
  noise_steps = experiment.config.estimator_noise_steps
  teacher = experiment.teacher

  def train_step(state, data, order, teacher_variables=None):
    batch_key, estimator_key = experiment.keys(state.step)
    if noise_steps > 1:
      estimator_key = experiment.keys(state.step - state.step % noise_steps)[1]
    images, labels = experiment.data.train_inputs(
        data, order, state.step % experiment.steps_per_epoch, batch_key)
    logits = None
    if teacher:
      logits = teacher.model.apply(teacher_variables, images, mode="hard")
    return update(experiment, state, images, labels, estimator_key, logits)

  shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract_state(experiment))
  step = experiment.jit(train_step, donate_argnums=0,
                        out_shardings=(shardings, experiment.replicated))
  if not teacher:
    return step
  return lambda state, data, order: step(state, data, order, teacher.variables)


def make_reestimate(experiment: Experiment) -> Callable[..., Any]:
  """Makes a function that re-estimates batch norm's statistics for the hard network.

  In training, batch norm sees mixed values, and weights that flip from step to step
  corrupt its running statistics. The new statistics are means over the first
  `reestimate_batches` batches of `Experiment.data.train_batches`.

  Returns:
    The function f(params, batch_stats, batches) -> batch_stats.
  """
  # Without momentum, a step leaves the statistics of its batch. The straight-through
  # estimator computes the hard quantizer at any alpha, and so does lsq with its steps.
  estimator = "lsq" if experiment.config.estimator == "lsq" else "ste"
  model = experiment_lib.build_model(
      experiment.config, estimator=estimator, input_estimator="", norm_momentum=0.0)

  @experiment.jit
  def statistics(params, batch_stats, data, order, position):
    key = jax.random.fold_in(jax.random.key(experiment.config.seed), position)
    images, _ = experiment.data.train_inputs(data, order, position, key)
    _, changed = model.apply({"params": params, "batch_stats": batch_stats}, images,
                             mode="train", mutable=["batch_stats"])
    return changed["batch_stats"]

  def reestimate(params, batch_stats, batches):
    count = min(experiment.config.reestimate_batches, experiment.steps_per_epoch)
    parts = [statistics(params, batch_stats, data, order, i)
             for i, (data, order) in enumerate(itertools.islice(batches, count))]
    return jax.tree.map(lambda *stats: jnp.mean(jnp.stack(stats), axis=0), *parts)

  return reestimate


def make_weight_report(experiment: Experiment) -> Callable[[Any], tuple[dict, dict]]:
  """Compiles f(params) -> (codes, mean distance of weights from the grid), by layer."""
  c = experiment.config

  def report(params):
    codes, distance = {}, {}
    for path, layer in experiment.grid_layers.items():
      kernel = params
      for name in path.split("/"):
        kernel = kernel[name]
      step, kernel = kernel.get("step"), kernel["kernel"]
      if c.weight_frequency:
        kernel = estimators.periodic(kernel, c.weight_frequency)
      grid = quantizers.weight_grid(
          kernel, cast(int, layer.bits), c.weight_threshold_rule, c.weight_thresholds,
          learned=step is not None)
      step = 1.0 if step is None else quantizers.positive_step(step)
      codes[path] = quantizers.encode(kernel / step, grid)
      distance[path] = jnp.mean(
          jnp.abs(kernel - step * quantizers.quantize(kernel / step, grid)))
    return codes, distance

  return experiment.jit(report)


def flip_rates(
    before: dict[str, jax.Array], after: dict[str, jax.Array]
) -> dict[str, jax.Array]:
  """Returns the fractions of codes that differ, by layer: float32 () each."""
  return {path: jnp.mean(before[path] != after[path]) for path in before}
