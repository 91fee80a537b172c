"""The networks on CIFAR-10 that come with minw, by their names.

--sweep=experiments/sweeps/networks.py:size=quarter trains ConvNet A at a quarter of its
widths, with 1 and with 2 bits, on all training images, which takes CPUs about a core
an hour each; size=full ConvNets A and D as in the paper, 1/1 bits.
"""

from minw import cli
from minw import config as config_lib


def get_runs(argument=""):
  a = config_lib.parse_argument(argument, size="full")
  cli.check(a.size in ("full", "quarter"), "size", a.size, "full or quarter")
  fields = {"histogram_layers": ("conv2", "norm_conv2")}  # For Figs 1 to 4.
  if a.size == "quarter":
    fields |= {"train_examples": 0, "num_epochs": 40, "histogram_epochs": (2, 6, 12)}
    networks = (("_a_quarter", "A", 1), ("_a_quarter_2bit", "A", 2))
  else:
    networks = (("_a", "A", 1), ("_d", "D", 1))
  for name, network, bits in networks:
    config = (f"experiments/cifar_convnet.py:network={network},size={a.size},"
              f"input_bits={bits},weight_bits={bits}")
    yield f"cifar10_convnet{name}", config, fields
