"""All estimators under equal terms, and the controls that a comparison needs.

--sweep=experiments/sweeps/estimators.py:dataset=cifar10,width=full,seeds=5 takes the
names below. The controls:

  float-then-ste  a float network with HardTanh until AQE's annealing would end, the
                  straight-through estimator from there on
  aqe-then-ste    AQE until alpha = 1, the straight-through estimator from there on
  aqe-then-aqe    the same, going on with AQE at alpha = 1: under Adam, whose state
                  begins anew in both, this is aqe-then-ste up to Adam's epsilon

The latter are two runs each, the second of which starts from the first one's weights
where the learning rate of the first ended.
"""

from minw import cli
from minw import config as config_lib

_ANNEALED_FROM_ZERO = ("ede", "reste")
_OTHERS = ("aqe", "ste", "stochastic_aqe", "approx_sign", "swish_sign", "ede", "reste",
           "dsq", "ewgs")
_CIFAR = "experiments/cifar_convnet.py:network=A,dataset="
_QUARTER = dict(conv_widths=(32, 32, 64, 64, 128, 128), dense_widths=(256, 256),
                train_examples=20_000, num_epochs=24, batch_size=128)


def get_runs(argument=""):
  a = config_lib.parse_argument(
      argument, dataset="digits", width="quarter", seeds=5, epochs=0)
  cli.check(a.dataset in ("digits", "cifar10", "cifar100"), "dataset", a.dataset,
            "digits, cifar10 or cifar100")
  cli.check(a.width in ("quarter", "full"), "width", a.width, "quarter or full")
  cli.check(type(a.seeds) is int and a.seeds > 0, "seeds", a.seeds, "a positive number")
  cli.check(type(a.epochs) is int and (a.epochs == 0 or a.epochs > 1), "epochs",
            a.epochs, "at least 2, or 0 for the usual number")
  if a.dataset == "digits":  # It has one width.
    config, common, epochs = "experiments/digits_convnet.py", {}, 40
  else:
    config = _CIFAR + a.dataset
    common = _QUARTER if a.width == "quarter" else {}
    epochs = common.get("num_epochs", 200)
  epochs = a.epochs or epochs
  common = common | {"num_epochs": epochs}
  first, second = _phases(epochs)

  for seed in range(a.seeds):
    def run(name, **overrides):
      return f"{name}-seed{seed}", config, common | {"seed": seed} | overrides

    for estimator in _OTHERS:
      start = {"alpha_start": 0.0} if estimator in _ANNEALED_FROM_ZERO else {}
      yield run(estimator, estimator=estimator, **start)
    # With the STE's backward: alpha is 0, then 1.
    yield run("float-then-ste", alpha_shape="step", alpha_start=0.0,
              estimator_gradient="algorithm1")
    yield run("aqe-first", alpha_end=1.0, **first)
    for estimator in ("ste", "aqe"):
      yield run(f"aqe-then-{estimator}", estimator=estimator, alpha_start=1.0,
                init_from=f"aqe-first-seed{seed}", **second)


def _phases(epochs):
  """The run until annealing ends, and from there on: its epochs, its learning rates."""
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
