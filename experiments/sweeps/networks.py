"""Sweep that trains the networks on CIFAR-10 that come with minw, by their names.

--sweep=networks:size=quarter trains ConvNet A at a quarter of its widths with W1A1 and
with W2A2, on all training images. Each network takes about an hour on one CPU core.
size=short trains ConvNet D, as wide as in the paper, for 24 epochs. This takes two
hours on one core. size=full trains ConvNets A and D with W1A1 as in the paper.
"""

from minw import config as config_lib
from minw import errors

_NETWORKS = {  # Suffix of the name, network and bits, by size.
    "full": (("_a", "A", 1), ("_d", "D", 1)),
    "short": (("_d_24epochs", "D", 1),),
    "quarter": (("_a_quarter", "A", 1), ("_a_quarter_2bit", "A", 2)),
}
_FIELDS = {
    "full": {},
    "short": {"num_epochs": 24, "batch_size": 128, "eval_every_epochs": 2,
              "histogram_epochs": (2, 4, 6)},
    "quarter": {"train_examples": 0, "num_epochs": 40, "histogram_epochs": (2, 6, 12)},
}


def get_runs(argument=""):
  a = config_lib.parse_argument(argument, size="full")
  errors.check(a.size in _NETWORKS, "size", a.size, "full, short or quarter")
  width = "quarter" if a.size == "quarter" else "full"
  for name, network, bits in _NETWORKS[a.size]:
    config = (f"cifar_convnet:network={network},size={width},"
              f"input_bits={bits},weight_bits={bits}")
    yield f"cifar10_convnet{name}", config, _FIELDS[a.size] | {
        "histogram_layers": ("conv2", "norm_conv2")}  # For Figs 1 to 4.
