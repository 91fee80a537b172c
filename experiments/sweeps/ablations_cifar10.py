"""What the ablation notebooks show of CIFAR-10: estimators, and choices left open.

ConvNet D at a quarter of its width, 1/1, on 10,000 training images for 12 epochs; each
choice is changed alone. --sweep=experiments/sweeps/ablations_cifar10.py:seeds=5 takes
more seeds.
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
    "gradient_algorithm1": dict(estimator_gradient="algorithm1"),
    "ede": dict(estimator="ede", alpha_start=0.0, alpha_end=1.0),
    "alpha_end_0.9": dict(alpha_end=0.9),
    "pad_value_-1": dict(pad_value=-1.0),
    "norm_momentum_0.99": dict(norm_momentum=0.99),
    "kernel_init_he_normal": dict(kernel_init="he_normal"),
    "reestimate_20": dict(reestimate_batches=20),
    "decay_0.9_per_1000_steps": dict(learning_rate_decay=0.9, learning_rate_stairs=1),
    "geometry_crop30": dict(crop_size=30),
    "geometry_valid32": dict(crop_size=32, crop_padding=4, first_padding="VALID"),
}


def get_runs(argument=""):
  a = config_lib.parse_argument(argument, seeds=3)
  cli.check(type(a.seeds) is int and a.seeds > 0, "seeds", a.seeds, "a positive number")
  for seed in range(a.seeds):
    for name, fields in _RUNS.items():
      yield f"{name}-seed{seed}", _CONFIG, dict(seed=seed, **_COMMON, **fields)
