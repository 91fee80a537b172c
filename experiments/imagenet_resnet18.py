"""ResNet-18 on ImageNet: Table V.

--config=imagenet_resnet18:weight_bits=2,input_bits=float32,seed=1 takes
the names below; first=1 and last=1 quantize the first convolution's and the last
layer's weights, too. The paper's top-1 and top-5 errors in %:

  weights  inputs  top-1  top-5  not quantized
  float32  float32 30.46  10.81
  2        float32 36.36  15.10
  1        float32 37.60  15.81
  1        2       42.16  18.90  first and last layer
  1        1       47.87  26.04  first layer

Of momentum, weight decay, learning rate and 90 epochs the paper says nothing that
differs from He et al.; 10,000 of the training images validate here.
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
