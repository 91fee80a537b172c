"""Small ConvNets for a microcontroller, on images from 16x16 to 128x128 pixels.

An example is --config=folder_convnet:size=tiny,weight_bits=2,input_bits=2. The data set
is one that `minw.prepare` wrote from a folder, or CIFAR-10 by default:

  --config.dataset=NAME --config.data_dir=DIR --config.crop_size=SIDE

These are the sizes in W1A1 with ten classes. Activations are what the exported C code
keeps in memory, with an image of 32x32 and of 128x128 pixels:

  size     packed   activations
  tiny      10 kB   1.2 and 17 kB
  small     49 kB   1.3 and 17 kB
  medium   244 kB   2.9 and 41 kB

`python -m minw.search` trains them with several bits, and compares them.

Max pooling follows the first two convolutions, where images are large, and then every
second one. The classifier reads the sum over the last feature map. Therefore the
weights do not depend on the size of the image.
"""

from minw import config
from minw import errors

# The widths of the convolutions, and the convolutions that max pooling follows.
SIZES = {
    "tiny": ((32, 32, 64, 64), (1, 2, 4)),
    "small": ((32, 64, 64, 96, 128, 128), (1, 2, 4, 6)),
    "medium": ((64, 128, 192, 256, 256, 256), (1, 2, 4, 6)),
}


# Bits of weights and activations that `minw.search` tries.
BITS = ((1, 1), (1, 2), (2, 2))


def get_candidates():
  for size in SIZES:
    for weights, inputs in BITS:
      yield (f"{size}_w{weights}a{inputs}",
             f"size={size},weight_bits={weights},input_bits={inputs}")


def get_config(argument: str = ""):
  a = config.parse_argument(
      argument, size="small", input_bits=1, weight_bits=1, seed=0)
  if a.size not in SIZES:
    raise errors.unknown_name("size", a.size, SIZES)
  c = config.default_config()
  c.conv_widths, c.pool_layers = SIZES[a.size]
  c.dense_widths = ()
  c.global_pool = True
  c.input_bits = a.input_bits
  c.weight_bits = a.weight_bits
  c.seed = a.seed
  c.crop_size = 32
  c.batch_size = 64
  c.eval_batch_size = 256
  c.num_epochs = 60
  return c
