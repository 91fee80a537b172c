"""Sweep of settings that the paper does not state: image geometry and rate decay.

An example is --sweep=geometries:networks=D,size=quarter,seeds=3. The arguments of
`get_runs` can be set in this way. The runs are float networks on CIFAR-10. Their
accuracies in Table I are .918, .910, .912 and .910 for ConvNets A to D.

The name of a run, D-crop30-seed0 for example, has the network and the difference to the
defaults. These are a crop of 24 and a decay by 0.9 every 1000 of the full run's 35,000
steps.
"""

from minw import config as config_lib
from minw import errors

_CHOICES = {
    "crop24": ("crop24", {}),
    "crop30": ("crop30", {}),
    "valid32": ("valid32", {}),
    "decay0.95": ("crop24", {"learning_rate_decay": 0.95**35}),
    "decay0.8": ("crop24", {"learning_rate_decay": 0.8**35}),
    "smooth": ("crop24", {"learning_rate_schedule": "exponential"}),
    "constant": ("crop24", {"learning_rate_schedule": "constant"}),
}


def get_runs(argument=""):
  a = config_lib.parse_argument(argument, networks="AD", size="full", seeds=5)
  errors.check(type(a.seeds) is int and a.seeds > 0, "seeds", a.seeds,
               "a positive number")
  for seed in range(a.seeds):
    for network in str(a.networks):
      for name, (geometry, fields) in _CHOICES.items():
        config = ("cifar_convnet:input_bits=float32,weight_bits=float32,"
                  f"network={network},geometry={geometry},size={a.size}")
        yield f"{network}-{name}-seed{seed}", config, fields | {"seed": seed}
