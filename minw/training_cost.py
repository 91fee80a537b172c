"""Memory and operations of a training step, from its compiled program."""

import math
from typing import Any, NamedTuple

import jax

from minw import errors
from minw import train_step
from minw.experiment import Experiment

_MIB = 2 ** 20


class StepCost(NamedTuple):
  """The costs of a training step on each device.

  Attributes:
    devices: Number of devices.
    parameters: Bytes of the parameters.
    optimizer: Bytes of the optimizer's state.
    rest: Bytes of the rest of the state: batch norm's statistics, the moving average
      and the sums for reports.
    data: Bytes of the images and labels that the step receives, which are the whole
      training split if it is held in memory.
    temporary: Bytes of what the step allocates, most of which are activations.
    operations: Floating-point operations.
  """

  devices: int
  parameters: int
  optimizer: int
  rest: int
  data: int
  temporary: int
  operations: float

  @property
  def bytes(self) -> int:
    """Bytes of memory that the step needs."""
    return (self.parameters + self.optimizer + self.rest + self.data + self.temporary)


def of_step(experiment: Experiment) -> StepCost:
  """Compiles the training step for the devices of this machine, without data.

  Raises:
    errors.UsageError: The config has a teacher.
  """
  teacher = experiment.config.teacher
  errors.check(not teacher, "config.teacher", teacher,
               "left out: the step is measured without a teacher")
  state = train_step.abstract_state(experiment)
  batch = experiment.data.abstract_batch()
  lowered = train_step.make_train_step(experiment).lower(state, *batch)
  devices = experiment.replicated.mesh.size
  # Counts of the compiled program depend on XLA's fusions and kernels.
  operations = lowered.cost_analysis()["flops"] / devices
  parameters, optimizer = map(_local_bytes, (state.params, state.opt_state))
  return StepCost(
      devices=devices, parameters=parameters, optimizer=optimizer,
      rest=_local_bytes(state) - parameters - optimizer, data=_local_bytes(batch),
      temporary=lowered.compile().memory_analysis().temp_size_in_bytes,
      operations=operations)


def _local_bytes(tree: Any) -> int:
  """Returns the bytes of the parts of arrays that are on one device."""
  return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
             for leaf in jax.tree.leaves(tree))


def format_table(cost: StepCost, batch_size: int) -> str:
  """Formats the costs of a training step of a batch as text."""
  title = f"training step of {batch_size} images"
  if cost.devices > 1:
    title += f" on {cost.devices} devices, on each of them"
  rows = [("parameters", cost.parameters), ("optimizer", cost.optimizer),
          ("other state", cost.rest), ("data", cost.data),
          ("temporary", cost.temporary), ("memory", cost.bytes)]
  lines = [title, *(f"{name:12}{size / _MIB:12,.3f}  MiB" for name, size in rows),
           f"{'operations':12}{cost.operations / 1e9:12,.3f}  GFLOP"]
  return "\n".join(lines) + "\n"
