"""1/1 ConvNet with AQE on scikit-learn's digits: two minutes on two CPU cores."""

from minw.config import default_config


def get_config():
  c = default_config()
  c.dataset = "digits"
  c.crop_size = 8
  c.random_flip = False
  c.conv_widths = (32, 32, 64, 64)
  c.dense_widths = (128,)
  c.batch_size = 64
  c.num_epochs = 40
  c.eval_batch_size = 360
  c.eval_every_epochs = 4
  return c
