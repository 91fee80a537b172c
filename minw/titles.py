"""Short names of networks, data sets, bits and estimators, for titles and tables.

All functions take a config, or a dict of its fields as read from JSON.
"""

from typing import Any, Mapping

from minw import models

NO_ESTIMATOR = "-"  # Estimator of a network without quantized operands.

_DATASETS = {"digits": "digits", "cifar10": "CIFAR-10", "cifar100": "CIFAR-100",
             "imagenet2012": "ImageNet"}
_NETWORKS = {"alexnet": "AlexNet", "resnet": "ResNet-",
             "cifar_resnet": "ResNet-", "densenet": "DenseNet-"}
_ESTIMATORS = {"aqe": "AQE", "ste": "STE", NO_ESTIMATOR: "float"}
_FORMAT_BITS = {"float8_e4m3fn": 8, "bfloat16": 16, "float16": 16, "float32": 32}


def network(config: Mapping[str, Any]) -> str:
  """Names the network: "ResNet-18" or "ConvNet D at a quarter of its widths"."""
  if config["network"] != "convnet":
    family = config["network"].rstrip("0123456789")
    return config["network"].replace(family, _NETWORKS.get(family, family))
  widths = [tuple(config[name]) for name in ("conv_widths", "dense_widths")]
  for name, known in models.CONVNETS.items():
    for part, suffix in ((1, ""), (4, " at a quarter of its widths")):
      if widths == [tuple(width // part for width in some) for some in known]:
        return f"ConvNet {name}{suffix}"
  return "ConvNet " + " + ".join("-".join(map(str, some)) for some in widths if some)


def dataset(config: Mapping[str, Any]) -> str:
  """Names the data set in its usual spelling: "CIFAR-10"."""
  name: str = config["dataset"]
  return _DATASETS.get(name, name)


def num_bits(bits: int | str) -> int | None:
  """Returns the number of bits of a config's `bits`, or None for an unknown format."""
  return _FORMAT_BITS.get(bits) if isinstance(bits, str) else bits


def bits(config: Mapping[str, Any]) -> str:
  """Names the bits of weights and activations: "W1A2", or "W16A2 (bfloat16)".

  Formats other than float32 are named in parentheses. The rules of `bits_rules` are
  also named there: "W1A1 (conv1=float32)".
  """
  weights, inputs = config["weight_bits"], config["input_bits"]
  remarks = sorted({value for value in (weights, inputs)
                    if isinstance(value, str) and num_bits(value) != 32})
  remarks += [f"{pattern}={value}" for pattern, value in config["bits_rules"]]
  return f"W{num_bits(weights)}A{num_bits(inputs)}" + (
      f" ({', '.join(remarks)})" if remarks else "")


def estimator(config: Mapping[str, Any]) -> str:
  """Returns the name of the estimator in the config.

  The result is `NO_ESTIMATOR` if all operands are floats. An estimator acts on operands
  of 1 to 5 bits. Operands in a float format are rounded to it, and gradients pass
  unchanged.
  """
  possible = {config["weight_bits"], config["input_bits"]}
  for pattern, value in config["bits_rules"]:
    possible = {value} if pattern == "*" else possible | {value}
  return NO_ESTIMATOR if all(isinstance(value, str) for value in possible) else (
      config["estimator"])


def run(config: Mapping[str, Any]) -> str:
  """Names a run in one line: "ConvNet D, CIFAR-10, AQE, W1A1"."""
  name = estimator(config)
  text = _ESTIMATORS.get(name, name)
  inputs = config.get("input_estimator")  # Older configs have no such field.
  if inputs and name != NO_ESTIMATOR:
    text += f" with {_ESTIMATORS.get(inputs, inputs)} inputs"
  return ", ".join([network(config), dataset(config), text, bits(config)])
