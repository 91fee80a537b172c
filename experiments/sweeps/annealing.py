"""Sweep of the order, the shape and the synchronization of annealing, with W1A1.

An example is --sweep=annealing:network=resnet20,seeds=3. The arguments of `get_runs`
can be set in this way. network is a ConvNet, A to D, or resnet20. With
runs=forward-cubic-with+ste, the sweep has only these runs.

The name of a run, forward-cubic-before-seed0 for example, has three parts before the
seed, and ste-seed0 is the straight-through estimator:

  order    together: all layers at once; forward: one layer after another, from the
           input on; backward: from the output on
  shape    of the growth of alpha in a layer: linear, cosine, cubic or sigmoid
  weights  with, before or after activations
"""

import itertools

from minw import config as config_lib
from minw import errors
from minw import models

_ORDERS = {"together": {}, "forward": {"alpha_per_layer": True},
           "backward": {"alpha_per_layer": True, "alpha_backward": True}}
_SHAPES = ("linear", "cosine", "cubic", "sigmoid")
_RUNS = {
    **{f"{order}-{shape}-{weights}":
       fields | {"alpha_shape": shape, "alpha_weights": weights}
       for (order, fields), shape, weights in itertools.product(
           _ORDERS.items(), _SHAPES, ("with", "before", "after"))},
    "ste": {"estimator": "ste"},
}


def get_runs(argument=""):
  a = config_lib.parse_argument(
      argument, dataset="cifar100", network="D", size="quarter", seeds=3, epochs=0,
      runs="")
  errors.check(a.dataset in ("cifar10", "cifar100"), "dataset", a.dataset,
               "cifar10 or cifar100")
  errors.check(a.network in (*models.CONVNETS, "resnet20"), "network", a.network,
               "A, B, C, D or resnet20")
  errors.check(type(a.seeds) is int and a.seeds > 0, "seeds", a.seeds,
               "a positive number")
  chosen = a.runs.split("+") if a.runs else list(_RUNS)
  for name in chosen:
    if name not in _RUNS:
      raise errors.unknown_name("run", name, _RUNS)
  common = {"num_epochs": a.epochs} if a.epochs else {}
  if a.network == "resnet20":
    common |= {"network": "resnet20", "kernel_init": "he_normal"}
  convnet = "D" if a.network == "resnet20" else a.network
  config = f"cifar_convnet:network={convnet},dataset={a.dataset},size={a.size}"
  for seed in range(a.seeds):
    for name in chosen:
      yield f"{name}-seed{seed}", config, common | _RUNS[name] | {"seed": seed}
