"""ResNet-18 on ImageNet: Table V.

An example is --config=imagenet_resnet18:weight_bits=2,input_bits=float32,seed=1. The
arguments of `get_config` can be set in this way. With first=1 and last=1, the weights
of the first convolution and of the last layer are quantized, too. The paper's top-1 and
top-5 errors in % are

          top-1  top-5  not quantized
  W32A32  30.46  10.81
  W2A32   36.36  15.10
  W1A32   37.60  15.81
  W1A2    42.16  18.90  first and last layer
  W1A1    47.87  26.04  first layer

W32 and A32 stand for float32. The paper names no momentum, weight decay, learning rate
or number of epochs that differs from He et al., who train for 90 epochs. Here, 10,000
of the training images are used for validation.
"""

from minw import config


def get_config(argument: str = ""):
  a = config.parse_argument(
      argument, input_bits=2, weight_bits=1, first="float32", last="float32",
      estimator="aqe", seed=0)
  c = config.default_config(dataset="imagenet2012")
  c.data_workers = 8
  c.input_bits = a.input_bits
  c.weight_bits = a.weight_bits
  c.bits_rules = (("stem", a.first), ("dense1", a.last))
  c.estimator = a.estimator
  c.seed = a.seed
  return c
