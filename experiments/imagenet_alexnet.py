"""AlexNet with batch norm on ImageNet: Table IV.

An example is --config=imagenet_alexnet:weight_bits=2,input_bits=float8_e4m3fn,seed=1.
The arguments of `get_config` can be set in this way. With first=1 and last=1, the
weights of the first convolution and of the last layer are quantized, too.

The paper's float32 network has a top-1 accuracy of 56.6 % and a top-5 accuracy of
80.2 %. Its quantized networks lose so many points:

         top-1  top-5
  W1A16  8.0    6.8
  W2A16  3.0    2.5
  W1A1   21.8   20.1
  W1A2   9.8    10.1
  W2A8   3.2    2.9
  W3A8   0.6    0.7

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
