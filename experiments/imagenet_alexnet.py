"""AlexNet with batch norm on ImageNet: Table IV.

--config=imagenet_alexnet:weight_bits=2,input_bits=float8_e4m3fn,seed=1
takes the names below; first=1 and last=1 quantize the first convolution's and the last
layer's weights, too. What the paper loses in points of top-1 and top-5 accuracy, of
56.6 % and 80.2 % in float32:

  weights  inputs  top-1  top-5
  1        16      8.0    6.8
  2        16      3.0    2.5
  1        1       21.8   20.1
  1        2       9.8    10.1
  2        8       3.2    2.9
  3        8       0.6    0.7

Inputs of 16 and 8 bits are float16 and float8_e4m3fn. The schedule of the learning rate
is that of the paper's ConvNets.
"""

from minw import config


def get_config(argument: str = ""):
  a = config.parse_argument(
      argument, input_bits=2, weight_bits=1, first="float32", last="float32",
      estimator="aqe", seed=0)
  c = config.default_config()
  c.dataset = "imagenet2012"
  c.network = "alexnet"
  c.crop_size = 224
  c.data_workers = 8
  c.batch_size, c.eval_batch_size = 128, 250
  c.num_epochs = 50
  c.learning_rate = 1e-4
  c.input_bits = a.input_bits
  c.weight_bits = a.weight_bits
  c.bits_rules = (("conv1", a.first), ("dense3", a.last))
  c.estimator = a.estimator
  c.seed = a.seed
  return c
