"""ResNet-110 on CIFAR-10 and CIFAR-100 with 3-bit weights: Table III.

An example is --config=cifar_resnet110:dataset=cifar100,weight_bits=float32,seed=1. The
arguments of `get_config` can be set in this way. The paper's test errors with W3A32 are
7.05 % on CIFAR-10 and 37.16 % on CIFAR-100. Those of the float network are 6.61 % and
35.87 %.

The paper stops after 64,000 steps and divides the learning rate at 32,000 and 38,000
steps. He et al. divide it at 48,000 instead of 38,000. An epoch has 351 steps here.
"""

from minw import config


def get_config(argument: str = ""):
  a = config.parse_argument(
      argument, dataset="cifar10", input_bits="float32", weight_bits=3,
      estimator="aqe", seed=0)
  c = config.default_config()
  c.network = "resnet110"
  c.crop_size, c.crop_padding = 32, 4
  c.kernel_init = "he_normal"
  c.batch_size = 128
  c.num_epochs = 182
  c.optimizer, c.momentum, c.weight_decay = "sgd", 0.9, 1e-4
  c.learning_rate, c.learning_rate_schedule = 0.1, "steps"
  c.learning_rate_decay, c.learning_rate_steps = 0.1, (0.5, 38 / 64)
  c.update(a)
  return c
