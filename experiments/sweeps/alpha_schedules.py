"""Sweep of schedules of alpha: shapes, start and end values, layer after layer.

An example is --sweep=alpha_schedules:dataset=cifar10,network=A,seeds=3. The arguments
of `get_runs` can be set in this way. The name of a run tells how it differs from the
default schedule, "linear-0.465-seed0". The baselines of annealing are "ste" and "hard",
which has a constant alpha of 1.
"""

from minw import config as config_lib
from minw import errors

_SCHEDULES = {
    **{f"{shape}-{end}": {"alpha_shape": shape, "alpha_end": end}
       for shape in ("linear", "cosine") for end in (0.25, 0.465, 0.75, 1.0)},
    **{f"layers-{end}": {"alpha_per_layer": True, "alpha_end": end}
       for end in (0.465, 0.75, 1.0)},
    **{f"start-{start}": {"alpha_start": start} for start in (0.25, 0.75)},
    **{f"final-{final}": {"alpha_final": final} for final in (0.9, 0.95)},
    "hard": {"alpha_start": 1.0},
    "ste": {"estimator": "ste"},
}


def get_runs(argument=""):
  a = config_lib.parse_argument(
      argument, dataset="digits", network="D", size="full", seeds=5, epochs=0)
  errors.check(a.dataset in ("digits", "cifar10", "cifar100"), "dataset", a.dataset,
               "digits, cifar10 or cifar100")
  errors.check(type(a.seeds) is int and a.seeds > 0, "seeds", a.seeds,
               "a positive number")
  config = ("digits_convnet" if a.dataset == "digits" else
            f"cifar_convnet:network={a.network},dataset={a.dataset},size={a.size}")
  common = {"num_epochs": a.epochs} if a.epochs else {}
  for seed in range(a.seeds):
    for name, fields in _SCHEDULES.items():
      yield f"{name}-seed{seed}", config, common | fields | {"seed": seed}
