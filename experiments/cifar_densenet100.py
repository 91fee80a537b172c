"""DenseNet-BC (100 layers, growth 12) on CIFAR with 3-bit weights: Table III.

An example is --config=cifar_densenet100:dataset=cifar100,weight_bits=float32,seed=1.
The arguments of `get_config` can be set in this way. The paper's test errors with W3A32
are 5.21 % on CIFAR-10 and 23.70 % on CIFAR-100. Those of the float network are 4.51 %
and 22.27 %.
"""

from minw import config


def get_config(argument: str = ""):
  a = config.parse_argument(
      argument, dataset="cifar10", input_bits="float32", weight_bits=3,
      estimator="aqe", seed=0)
  c = config.default_config()
  c.network = "densenet100"
  c.crop_size, c.crop_padding = 32, 4
  c.kernel_init = "he_normal"
  c.batch_size = 64
  c.num_epochs = 300
  c.optimizer, c.momentum, c.weight_decay = "sgd", 0.9, 1e-4
  c.learning_rate, c.learning_rate_schedule = 0.1, "steps"
  c.learning_rate_decay, c.learning_rate_steps = 0.1, (0.5, 0.75)
  c.update(a)
  return c
