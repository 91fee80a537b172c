"""Sweep of Tables I and II: ConvNets A to D with 16 pairs of bits on CIFAR-10 or -100.

An example is --sweep=tables:table=2,seeds=1,networks=AD. The arguments of `get_runs`
can be set in this way. size=quarter is for CPUs. Its runs belong to no cell of the
tables.

The name of a run, cifar10-A-1-2-seed0 for example, has the network, the bits of the
inputs (M) and the bits of the weights (N), in the paper's order. Table II also has runs
such as cifar100-A-1-1-ste-seed0. The paper's 16 bits are bfloat16 here, and its 32 bits
float32.
"""

from minw import config as config_lib
from minw import errors

_BITS = [(m, n) for m in (1, 2, 3) for n in (1, 2, 3, 16)] + [
    (16, 1), (16, 2), (16, 3), (32, 32)]
_FORMATS = {16: "bfloat16", 32: "float32"}


def get_runs(argument=""):
  a = config_lib.parse_argument(argument, table=1, seeds=5, networks="ABCD",
                                 size="full")
  errors.check(a.table in (1, 2), "table", a.table, "1 or 2")
  errors.check(type(a.seeds) is int and a.seeds > 0, "seeds", a.seeds,
               "a positive number")
  dataset = {1: "cifar10", 2: "cifar100"}[a.table]
  for seed in range(a.seeds):
    for network in str(a.networks):
      config = f"cifar_convnet:network={network},dataset={dataset},size={a.size}"
      for m, n in _BITS:
        fields = {"input_bits": _FORMATS.get(m, m), "weight_bits": _FORMATS.get(n, n),
                  "seed": seed}
        name = f"{dataset}-{network}-{m}-{n}"
        yield f"{name}-seed{seed}", config, fields
        if (a.table, m, n) == (2, 1, 1):
          yield f"{name}-ste-seed{seed}", config, fields | {"estimator": "ste"}
