"""One-bit networks on CIFAR-10 and CIFAR-100 with the training of published networks.

An example is --config=cifar_best:network=A,dataset=cifar100,seed=1. The arguments of
`get_config` can be set in this way. network is a ConvNet, A to D, resnet18 or resnet20.
All layers of ConvNets are of one bit. The first and the last layer of ResNets have
float weights, as in the papers that they are compared with. The goals with W1A1 are
test accuracies above

  ConvNet A on CIFAR-10     .913    Bop, all layers of one bit
  ConvNet A on CIFAR-100    .596    AQE, Table II
  ResNet-18 on CIFAR-10     .9263   ReSTE

No run of this file has been recorded. It starts from the paper's training and has what
published networks add: 400 epochs, a warm-up and a cosine that ends at 0, label
smoothing, crops of images that are padded by 4 pixels, and batch norm's statistics
re-estimated for the hard network. The sweep `recipes` compares each of them, and
others, with the paper's training. Of what was ranked in `results/recipes_quarter`, with
networks too small to learn their training images by heart, only the schedule helps.

With weight_bits=float32 and input_bits=float32, the file gives the config of a teacher.
--config.teacher=WORKDIR then names the run of this teacher.
"""

from minw import config
from minw import errors
from minw import models

_RESNETS = {"resnet18": "cifar_resnet18", "resnet20": "resnet20"}


def get_config(argument: str = ""):
  a = config.parse_argument(
      argument, network="A", dataset="cifar10", input_bits=1, weight_bits=1,
      estimator="aqe", seed=0)
  errors.check(a.network in (*models.CONVNETS, *_RESNETS), "network", a.network,
               ", ".join([*models.CONVNETS, *_RESNETS]))
  c = config.default_config()
  if a.network in _RESNETS:
    c.network, c.kernel_init = _RESNETS[a.network], "he_normal"
    c.bits_rules = (("stem", "float32"), ("dense1", "float32"))
  else:
    c.conv_widths, c.dense_widths = models.convnet_widths(a.network)
    c.first_padding = "VALID"
  c.crop_size, c.crop_padding = 32, 4
  c.num_epochs = 400
  c.learning_rate_schedule, c.learning_rate_warmup = "cosine", 0.0125
  c.label_smoothing = 0.1
  c.reestimate_batches = 100
  for name in ("dataset", "input_bits", "weight_bits", "estimator", "seed"):
    c[name] = a[name]
  return c
