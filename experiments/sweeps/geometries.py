"""What the paper does not say: which geometry its images had, and how its rate decayed.

--sweep=geometries:networks=D,size=quarter,seeds=3 takes the names
below. Float networks on CIFAR-10, whose accuracies in Table I are .918, .910, .912 and
.910. Runs are D-crop30-seed0: the network and what differs from the defaults, which are
the crop of 24 and a decay of 0.9 every 1000 of the full run's 35,000 steps.
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
