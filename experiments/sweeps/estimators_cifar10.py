"""AQE against STE on CIFAR-10, as the notebook on estimators shows it, with controls.

ConvNet D at a quarter of its width, 1/1, on 10,000 training images for 12 epochs.
--sweep=experiments/sweeps/estimators_cifar10.py:seeds=5 takes more seeds.
"""

from minw import cli
from minw import config as config_lib

_CONFIG = "experiments/cifar_convnet.py:network=D"
_COMMON = dict(
    num_epochs=12, batch_size=128, train_examples=10_000, eval_every_epochs=12,
    conv_widths=(16, 16, 32, 32, 64, 64), dense_widths=(64, 64))

_RUNS = {
    "ste": dict(estimator="ste"),
    "aqe": {},
    "aqe_by_layer": dict(alpha_per_layer=True),
    "float_then_ste": dict(
        alpha_shape="step", alpha_start=0.0, estimator_gradient="algorithm1"),
}


def get_runs(argument=""):
  a = config_lib.parse_argument(argument, seeds=3)
  cli.check(type(a.seeds) is int and a.seeds > 0, "seeds", a.seeds, "a positive number")
  for seed in range(a.seeds):
    for name, fields in _RUNS.items():
      yield f"{name}-seed{seed}", _CONFIG, dict(seed=seed, **_COMMON, **fields)
