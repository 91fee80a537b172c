"""Tables I to V of Chen et al., arXiv 2003.04296, and the cells to which a run belongs.

Tables I and II have accuracies, and Tables III and V errors in %. Table IV has losses
in points against the paper's float AlexNet. Here, operands of 16 bits are bfloat16 or
float16, operands of 8 bits float8_e4m3fn, and operands of 32 bits float32.
"""

from typing import Any, NamedTuple

from minw import models
from minw import titles
from minw.data import datasets


class Cell(NamedTuple):
  """A number of the paper, and the experiment that it belongs to.

  Attributes:
    table: Number of the table, "I" to "V".
    dataset: Data set as in a config.
    network: Network as in a config, but "A" to "D" for ConvNets.
    inputs: Number of bits of activations, M in the paper.
    weights: Number of bits of weights, N in the paper.
    estimator: Estimator in training; `titles.NO_ESTIMATOR` for a float network.
    measure: "accuracy", "error %" and others, see `measured`.
    paper: Number in the paper.
    epochs: Number of epochs of the paper's recipe. For ResNet-18 it is the usual number
      of epochs.
    kept: Layers whose weights stay float32: "none", "first" or "first and last". "any"
      stands for any of these if the paper does not say.
  """

  table: str
  dataset: str
  network: str
  inputs: int
  weights: int
  estimator: str
  measure: str
  paper: float
  epochs: int
  kept: str = "none"


CAPTIONS = {
    "I": "CIFAR-10, test accuracy of ConvNets A to D",
    "II": "CIFAR-100, test accuracy of ConvNets A to D",
    "III": "CIFAR-10 and CIFAR-100, test error in %",
    "IV": "ImageNet, AlexNet: points lost against a top-1 accuracy of 56.6 and a top-5 "
          "accuracy of 80.2, the paper's float network",
    "V": "ImageNet, ResNet-18: error in %",
}

# Bits of inputs and weights (M, N, the paper's order): accuracies of A, B, C, D.
_CIFAR10 = {
    (1, 1): (.884, .851, .847, .844),
    (1, 2): (.889, .866, .859, .855),
    (1, 3): (.897, .873, .868, .867),
    (1, 16): (.901, .876, .870, .871),
    (2, 1): (.891, .875, .868, .867),
    (2, 2): (.898, .879, .873, .871),
    (2, 3): (.903, .888, .888, .881),
    (2, 16): (.909, .890, .891, .887),
    (3, 1): (.890, .889, .880, .880),
    (3, 2): (.895, .892, .887, .888),
    (3, 3): (.906, .898, .891, .893),
    (3, 16): (.911, .901, .896, .895),
    (16, 1): (.908, .890, .886, .887),
    (16, 2): (.908, .894, .892, .891),
    (16, 3): (.911, .901, .904, .903),
    (32, 32): (.918, .910, .912, .910),
}
_CIFAR100 = {
    (1, 1): (.596, .554, .546, .530),
    (1, 1, "ste"): (.596, .552, .535, .515),
    (1, 2): (.602, .559, .551, .542),
    (1, 3): (.611, .564, .557, .550),
    (1, 16): (.620, .569, .560, .555),
    (2, 1): (.618, .586, .580, .564),
    (2, 2): (.622, .590, .588, .569),
    (2, 3): (.631, .603, .592, .582),
    (2, 16): (.633, .607, .595, .585),
    (3, 1): (.593, .565, .548, .544),
    (3, 2): (.606, .582, .565, .560),
    (3, 3): (.618, .601, .581, .573),
    (3, 16): (.621, .610, .585, .579),
    (16, 1): (.631, .618, .597, .584),
    (16, 2): (.635, .622, .608, .598),
    (16, 3): (.640, .630, .619, .614),
    (32, 32): (.646, .634, .630, .623),
}
# Network, data set, epochs: errors with 3-bit and with float weights. ResNet-110 stops
# after 64,000 steps.
_THIRD = {
    ("resnet110", "cifar10", 182): (7.05, 6.61),
    ("resnet110", "cifar100", 182): (37.16, 35.87),
    ("densenet100", "cifar10", 300): (5.21, 4.51),
    ("densenet100", "cifar100", 300): (23.70, 22.27),
}
# Bits of weights and inputs (N, M): points lost in top-1 and top-5 accuracy. In each
# row, the paper keeps the same layers in float32 as the method it compares with. These
# layers differ from row to row.
_ALEXNET = {(1, 16): (8.0, 6.8), (2, 16): (3.0, 2.5), (1, 1): (21.8, 20.1),
            (1, 2): (9.8, 10.1), (2, 8): (3.2, 2.9), (3, 8): (0.6, 0.7),
            (32, 32): (0.0, 0.0)}
_ALEXNET_FLOAT = {"top-1": 56.6, "top-5": 80.2}
# Bits of weights and inputs (N, M) and kept layers: top-1 and top-5 errors.
_RESNET18 = {(32, 32, "any"): (30.46, 10.81), (2, 32, "any"): (36.36, 15.10),
             (1, 32, "any"): (37.60, 15.81), (1, 2, "first and last"): (42.16, 18.90),
             (1, 1, "first"): (47.87, 26.04)}


def _cells() -> tuple[Cell, ...]:
  cells = []
  for table, dataset, rows in (("I", "cifar10", _CIFAR10),
                               ("II", "cifar100", _CIFAR100)):
    for i, network in enumerate("ABCD"):
      cells += [Cell(table, dataset, network, m, n, (estimator or ["aqe"])[0],
                     "accuracy", values[i], 200)
                for (m, n, *estimator), values in rows.items()]
  for (network, dataset, epochs), values in _THIRD.items():
    cells += [Cell("III", dataset, network, 32, n, "aqe", "error %", value, epochs)
              for n, value in zip((3, 32), values)]
  for (n, m), values in _ALEXNET.items():
    cells += [Cell("IV", "imagenet2012", "alexnet", m, n, "aqe", f"{top} points lost",
                   value, 50, "any") for top, value in zip(("top-1", "top-5"), values)]
  for (n, m, kept), values in _RESNET18.items():
    cells += [Cell("V", "imagenet2012", "resnet18", m, n, "aqe", f"{top} error %",
                   value, 90, kept) for top, value in zip(("top-1", "top-5"), values)]
  return tuple(cells)


CELLS = tuple(
    cell._replace(estimator=titles.NO_ESTIMATOR)
    if cell.inputs == cell.weights == 32 else cell for cell in _cells())

# Results of others: network, data, accuracy, policy, source.
PUBLISHED = (
    ("ConvNet A's topology, 32x32 images, W1A1", "CIFAR-10", ".8860",
     "all layers 1-bit; no augmentation", "BinaryNet, arXiv 1602.02830"),
    ("ConvNet A's topology, 32x32 images, W1A1", "CIFAR-10", ".913",
     "all layers 1-bit; random crops of 40x40, flips", "Bop, arXiv 1906.02107"),
    ("CNV, 1.54 M weights, W1A1", "CIFAR-10", ".8422",
     "all layers 1-bit, images of 8 bits", "Brevitas' examples"),
    ("VGG-small, ResNet-18, ResNet-20, W1A1", "CIFAR-10", ".904, .915, .865",
     "first and last layer real", "IR-Net, arXiv 1909.10788"),
    ("VGG-small, ResNet-18, ResNet-20, W1A1", "CIFAR-10", ".9255, .9263, .8675",
     "first and last layer not stated", "ReSTE, arXiv 2308.06689"),
    ("ResNet-18, W1A1", "ImageNet, top-1", ".512", "first and last layer real",
     "XNOR-Net, arXiv 1603.05279"),
    ("ResNet-18, W1A1", "ImageNet, top-1", ".564", "first and last layer real",
     "Bi-Real Net, arXiv 1808.00278"),
    ("ResNet-18, W1A1", "ImageNet, top-1", ".659", "first and last layer real",
     "ReActNet, arXiv 2003.03488"),
)

# First and last layer of each network whose weights may stay float32.
_ENDS = {"alexnet": ("conv1", "dense3"), "resnet18": ("stem", "dense1")}


def measured(cell: Cell, run: dict[str, Any]) -> float:
  """Returns the result of a run's last checkpoint in the unit of a cell.

  Args:
    cell: One of the cells of the run, see `cells_of`.
    run: Record of the run, see `minw.report.records`.
  """
  top5 = cell.measure.startswith("top-5")
  accuracy = run["test_top5_accuracy" if top5 else "test_accuracy"]
  if cell.table == "IV":
    return _ALEXNET_FLOAT[cell.measure[:5]] - 100 * accuracy
  return accuracy if cell.measure == "accuracy" else 100 * (1 - accuracy)


def cells_of(run: dict[str, Any]) -> tuple[list[Cell], str]:
  """Returns the cells to which a run belongs, or none and the reason.

  A run with other widths, another image size or a part of the data is another
  experiment. The paper leaves all other fields of a config open.

  Args:
    run: Record of the run, see `minw.report.records`.

  Returns:
    The cells and "", or an empty list and a clause that gives the reason.
  """
  c = run["config"]
  network = c["network"]
  if not any(cell.dataset == c["dataset"] for cell in CELLS):
    return [], f"no table has {c['dataset']}"
  if network == "convnet":
    widths = tuple(c["conv_widths"]), tuple(c["dense_widths"])
    network = next((name for name, known in models.CONVNETS.items()
                    if known == widths), None)
    if network is None:
      return [], "its widths differ from those of ConvNets A to D"
    if c.get("pool_layers") or c.get("global_pool"):
      return [], "it pools elsewhere than ConvNets A to D"
  cells = [cell for cell in CELLS
           if (cell.dataset, cell.network) == (c["dataset"], network)]
  if not cells:
    return [], f"no table has {network} on {c['dataset']}"

  if len(network) == 1:
    last = c["crop_size"] - 2 * (c["first_padding"] == "VALID") >> 3
    if last != 3:  # The paper's sizes in MB imply a last map of 3x3 pixels.
      return [], (f"crop_size={c['crop_size']} and first_padding={c['first_padding']} "
                  f"leave a last map of {last}x{last}, not 3x3 pixels")
  else:
    size = 224 if c["dataset"] == "imagenet2012" else 32
    if c["crop_size"] != size:
      return [], f"crop_size={c['crop_size']}, not {size}"
  examples = datasets.info(c["dataset"]).splits["train"]
  steps = c["num_epochs"] * (examples // c["batch_size"])
  if run["step"] != steps:
    return [], (f"it has {run['step']} steps: {c['num_epochs']} epochs of all "
                f"{examples} training examples have {steps}")

  bits = [titles.num_bits(c[name]) for name in ("input_bits", "weight_bits")]
  cells = [cell for cell in cells if [cell.inputs, cell.weights] == bits]
  if not cells:
    return [], (f"no cell has inputs of {c['input_bits']} and weights of "
                f"{c['weight_bits']} bits")
  if not bits[0] == bits[1] == 32:  # Float networks have no estimator.
    cells = [cell for cell in cells if cell.estimator == c["estimator"]]
  if not cells:
    return [], f"no cell has the estimator {c['estimator']}"
  kept = kept_layers(network, c["weight_bits"], c["bits_rules"])
  cells = [cell for cell in cells if kept == cell.kept or cell.kept == "any" and kept]
  if not cells:
    return [], f"no cell has the bits_rules {c['bits_rules']}"
  return cells, ""


def kept_layers(
    network: str, bits: int | str, rules: list[tuple[str, Any]]
) -> str | None:
  """Returns which layers keep float32 weights, in the words of `Cell.kept`.

  The result is None if no cell keeps these layers.

  Args:
    network: Network of the cell.
    bits: Bits of all other weights.
    rules: `bits_rules` of the config.
  """
  by_layer: dict[Any, Any] = {name: kind for name, kind in rules}
  first, last = _ENDS.get(network, (None, None))
  if by_layer.keys() - {first, last} or {*by_layer.values()} - {"float32", bits}:
    return None
  kept = tuple(name for name in (first, last) if by_layer.get(name, bits) != bits)
  names: dict[Any, str] = {
      (): "none", (first,): "first", (first, last): "first and last"}
  return names.get(kept)
