"""minw.titles: what networks, data sets, bits and estimators are called."""

import pytest

from minw import config as config_lib
from minw import titles


def config(**changes):
  return config_lib.copy(config_lib.default_config(), **changes)


@pytest.mark.parametrize("conv, dense, name", [
    ([64, 64, 128, 128, 256, 256], [512, 512], "ConvNet C"),
    ([32, 32, 64, 64, 128, 128], [256, 256], "ConvNet A at a quarter of its widths"),
    ([16, 16, 32, 32, 64, 64], [64, 64], "ConvNet D at a quarter of its widths"),
    ([16, 16], [64, 64], "ConvNet 16-16 + 64-64"), ([16, 32], [], "ConvNet 16-32")])
def test_convnets_are_named_as_in_the_paper(conv, dense, name):
  assert titles.network({"network": "convnet", "conv_widths": conv,
                         "dense_widths": dense}) == name


@pytest.mark.parametrize("network, name", [
    ("resnet18", "ResNet-18"), ("cifar_resnet18", "ResNet-18"),
    ("resnet110", "ResNet-110"), ("alexnet", "AlexNet"),
    ("densenet100", "DenseNet-100"), ("mine2", "mine2")])
def test_other_networks(network, name):
  assert titles.network({"network": network}) == name


@pytest.mark.parametrize("dataset, name", [
    ("cifar10", "CIFAR-10"), ("cifar100", "CIFAR-100"), ("imagenet2012", "ImageNet"),
    ("digits", "digits")])
def test_data_sets(dataset, name):
  assert titles.dataset(config(dataset=dataset)) == name


@pytest.mark.parametrize("weights, inputs, rules, name", [
    (1, 2, (), "W1A2"), (3, 1, (), "W3A1"), ("float32", "float32", (), "W32A32"),
    (1, "float32", (), "W1A32"), ("bfloat16", 3, (), "W16A3 (bfloat16)"),
    ("float16", "float8_e4m3fn", (), "W16A8 (float16, float8_e4m3fn)"),
    (1, 1, (("conv1", "float32"), ("dense*", 2)), "W1A1 (conv1=float32, dense*=2)")])
def test_bits(weights, inputs, rules, name):
  assert titles.bits(
      config(weight_bits=weights, input_bits=inputs, bits_rules=rules)) == name


@pytest.mark.parametrize("weights, inputs, rules, acts", [
    (1, 1, (), True), (1, "float32", (), True), ("bfloat16", 2, (), True),
    ("float32", "float32", (), False), ("bfloat16", "float8_e4m3fn", (), False),
    ("float32", "float32", (("conv2", 1),), True), (1, 1, (("*", "float32"),), False),
    (1, 1, (("conv1", 2), ("*", "float32")), False),
    (1, 1, (("*", "float32"), ("conv1", 2)), True)])
def test_an_estimator_acts_where_something_is_quantized(weights, inputs, rules, acts):
  c = config(weight_bits=weights, input_bits=inputs, bits_rules=rules, estimator="ste")
  assert titles.estimator(c) == ("ste" if acts else "-")
  assert (", STE, " in titles.run(c), ", float, " in titles.run(c)) == (acts, not acts)


def test_runs():
  assert titles.run(config(dataset="digits", estimator="ewgs", input_bits=2)) == (
      "ConvNet D, digits, ewgs, W1A2")
