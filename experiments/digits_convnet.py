"""W1A1 ConvNet with AQE on scikit-learn's digits: two minutes on two CPU cores."""

from minw.config import default_config


def get_config():
  return default_config(dataset="digits")
