"""ConvNets A-D on CIFAR-10 and CIFAR-100: Tables I and II.

An example is --config=cifar_convnet:network=A,input_bits=1,weight_bits=1,estimator=ste.
The arguments of `get_config` can be set in this way. The paper's test accuracies are

                                             A     B     C     D
  CIFAR-10   W1A1                           .884  .851  .847  .844
  CIFAR-10   W32A32                         .918  .910  .912  .910
  CIFAR-100  W1A1                           .596  .554  .546  .530
  CIFAR-100  W1A1, straight-through         .596  .552  .535  .515
  CIFAR-100  W32A32                         .646  .634  .630  .623

The paper's 16 bits are bfloat16 or float16 here, and its 32 bits float32. The paper
does not say which geometry it used. Each of `GEOMETRIES` leads to its numbers of
weights.

size=quarter is for CPUs: a quarter of the widths, 20,000 training images and 24 epochs.
A run takes about a quarter of an hour on one core. It ranks methods and reproduces no
number of the paper.
"""

from minw import config
from minw import errors
from minw import models

GEOMETRIES = {
    "crop24": dict(crop_size=24),
    "crop30": dict(crop_size=30),
    "valid32": dict(crop_size=32, crop_padding=4, first_padding="VALID"),
}


def get_config(argument: str = ""):
  a = config.parse_argument(
      argument, network="D", dataset="cifar10", input_bits=1, weight_bits=1,
      estimator="aqe", geometry="crop24", size="full", seed=0)
  errors.check(a.size in ("full", "quarter"), "size", a.size, "full or quarter")
  if a.geometry not in GEOMETRIES:
    raise errors.unknown_name("geometry", a.geometry, GEOMETRIES)
  c = config.default_config()
  c.update(GEOMETRIES[a.geometry])
  c.conv_widths, c.dense_widths = models.convnet_widths(a.network)
  if a.size == "quarter":
    c.conv_widths = tuple(width // 4 for width in c.conv_widths)
    c.dense_widths = tuple(width // 4 for width in c.dense_widths)
    c.train_examples = 20_000
    c.batch_size = 128
    c.num_epochs = 24
    c.eval_every_epochs = 2
    c.histogram_epochs = (2, 4, 8)
  c.dataset = a.dataset
  c.input_bits = a.input_bits
  c.weight_bits = a.weight_bits
  c.estimator = a.estimator
  c.seed = a.seed
  return c
