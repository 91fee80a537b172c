"""Sweep of all estimators with equal settings, and of the controls of a comparison.

An example is --sweep=estimators:dataset=cifar100,network=A,size=quarter,seeds=5. The
arguments of `get_runs` can be set in this way. With runs=aqe+ste, the sweep has only
these runs. Beside the estimators there are the runs

  aqe-by-layer    AQE layer after layer, from the input on
  bop             binary weights, flipped by Bop, without latent weights; the
                  straight-through estimator for activations
  float-then-ste  a float network with HardTanh until AQE's annealing would end, then
                  the straight-through estimator
  aqe-then-ste    AQE until alpha = 1, then the straight-through estimator
  aqe-then-aqe    AQE until alpha = 1, then AQE at alpha = 1. Under Adam this equals
                  aqe-then-ste up to Adam's epsilon, because Adam's state is reset in
                  both.

The last two start from the weights of the run aqe-first, and with the learning rate at
which it ended.
"""

from minw import config as config_lib
from minw import errors


def get_runs(argument=""):
  a = config_lib.parse_argument(
      argument, dataset="digits", network="A", size="quarter", seeds=5, epochs=0,
      runs="")
  errors.check(a.dataset in ("digits", "cifar10", "cifar100"), "dataset", a.dataset,
               "digits, cifar10 or cifar100")
  errors.check(type(a.seeds) is int and a.seeds > 0, "seeds", a.seeds,
               "a positive number")
  errors.check(type(a.epochs) is int and (a.epochs == 0 or a.epochs > 1), "epochs",
               a.epochs, "at least 2, or 0 for the usual number")
  if a.dataset == "digits":  # The digits have a single network.
    config, epochs = "digits_convnet", 40
  else:
    config = f"cifar_convnet:network={a.network},dataset={a.dataset},size={a.size}"
    epochs = 24 if a.size == "quarter" else 200
  runs = _runs(a.epochs or epochs)
  if a.dataset != "digits" and not a.epochs:  # For Figs 1 and 2.
    runs["aqe"] = {"histogram_layers": ("conv2", "norm_conv2")}
  chosen = a.runs.split("+") if a.runs else list(runs)
  for name in chosen:
    if name not in runs:
      raise errors.unknown_name("run", name, runs)
  for seed in range(a.seeds):
    for name in chosen:
      fields = {"seed": seed, "num_epochs": a.epochs or epochs} | runs[name]
      if "init_from" in fields:
        fields["init_from"] += f"-seed{seed}"
      yield f"{name}-seed{seed}", config, fields


def _runs(epochs):
  first, second = _phases(epochs)
  second |= {"alpha_start": 1.0, "init_from": "aqe-first"}
  return {
      "aqe": {},
      "ste": {"estimator": "ste"},
      "aqe-by-layer": {"alpha_per_layer": True},
      # Alpha is 0, then 1. The backward pass is that of the straight-through estimator.
      "float-then-ste": {"alpha_shape": "step", "alpha_start": 0.0,
                         "estimator_gradient": "algorithm1"},
      "bop": {"optimizer": "bop", "estimator": "ste"},
      "aqe-first": {"alpha_end": 1.0} | first,
      "aqe-then-ste": {"estimator": "ste"} | second,
      "aqe-then-aqe": second,
      **{name: {"estimator": name} for name in (
          "stochastic_aqe", "approx_sign", "swish_sign", "dsq", "ewgs")},
      **{name: {"estimator": name, "alpha_start": 0.0} for name in ("ede", "reste")},
      "parq": {"estimator": "parq", "alpha_start": 0.0, "alpha_shape": "sigmoid"},
      "binary-relax": {"alpha_start": 0.0, "estimator_gradient": "algorithm1"},
  }


def _phases(epochs):
  """Splits a run where annealing ends.

  Returns:
    The fields for number of epochs and learning rates of the first and the second part.
  """
  whole = config_lib.default_config()
  stairs = whole.learning_rate_stairs
  stair = whole.learning_rate_decay ** (1 / stairs)
  before = max(round(whole.alpha_end * epochs), 1)
  stairs_before = round(whole.alpha_end * stairs)
  return (
      dict(num_epochs=before, learning_rate_stairs=stairs_before,
           learning_rate_decay=stair**stairs_before),
      dict(num_epochs=epochs - before, learning_rate_stairs=stairs - stairs_before,
           learning_rate_decay=stair ** (stairs - stairs_before),
           learning_rate=whole.learning_rate * stair**stairs_before))
