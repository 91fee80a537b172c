"""Comparison of runs that differ in chosen fields: means, intervals, differences."""

import math
import statistics
from typing import Any, NamedTuple, Sequence

import numpy as np

from minw import config as config_lib
from minw import errors
from minw import titles
from minw.report import records
from minw.report import tables

CONFIDENCE = 0.95
ACCURACY, DIFFERENCE = (0.0, 1.0), (-1.0, 1.0)  # Ranges of possible values.
_MEASURES = {"test_accuracy": "last checkpoint",
             "best_test_accuracy": "best validation checkpoint"}


class Estimate(NamedTuple):
  """A mean of numbers, one for each seed.

  Attributes:
    count: Number of values.
    mean: Mean of the values.
    deviation: Sample standard deviation (n - 1). None for a single value.
    margin: Half the width of the 95 % confidence interval of the mean, by Student's t
      with n - 1 degrees of freedom. None for a single value. See `interval`.
  """

  count: int
  mean: float
  deviation: float | None
  margin: float | None


class Group(NamedTuple):
  """Runs that differ only in the seed.

  Attributes:
    by: Values of the chosen fields, as returned by `records.acting`.
    runs: Records of the runs by seed.
    estimates: Mean of each measure, "test_accuracy" and "best_test_accuracy".
    differences: Mean difference of each measure to the comparison's first group, over
      the seeds that both groups have. None for the first group, and if there are no
      such seeds.
  """

  by: dict[str, Any]
  runs: dict[int, records.Record]
  estimates: dict[str, Estimate]
  differences: dict[str, Estimate | None]


class Comparison(NamedTuple):
  """Groups that differ only in the chosen fields.

  Attributes:
    settings: The other fields whose values are not the defaults.
    groups: Groups in the order in which they were found.
  """

  settings: dict[str, Any]
  groups: tuple[Group, ...]


def estimate(values: Sequence[float]) -> Estimate:
  """Estimates the mean of the distribution from which `values` were drawn.

  Args:
    values: At least one number.
  """
  n, mean = len(values), statistics.mean(values)
  if n == 1:
    return Estimate(1, mean, None, None)
  from scipy import stats  # This import takes seconds.

  deviation = statistics.stdev(values)
  quantile = float(stats.t.ppf((1 + CONFIDENCE) / 2, n - 1))
  return Estimate(n, mean, deviation, quantile * deviation / math.sqrt(n))


def interval(
    of: Estimate, bounds: tuple[float, float] = ACCURACY
) -> tuple[float, float]:
  """Returns the confidence interval of a mean, cut off at `bounds`.

  The mean is certain to lie within the bounds. Therefore the part of Student's interval
  beyond them can be cut off, and the rest contains the mean just as often.

  Args:
    of: Estimate of at least two values.
    bounds: Smallest and largest possible value.
  """
  assert of.margin is not None
  low, high = np.clip((of.mean - of.margin, of.mean + of.margin), *bounds).tolist()
  return low, high


def described(
    of: Estimate, bounds: tuple[float, float] = ACCURACY, sign: str = ""
) -> str:
  """Formats a mean with its interval.

  The result is "0.9000 ± 0.0100", or "0.9950 (0.9870 to 1.0000)" if the interval is cut
  off.

  Args:
    of: Estimate. An estimate of a single value has no interval.
    bounds: Smallest and largest possible value, see `interval`.
    sign: "+" to put a sign before positive means.
  """
  mean = f"{of.mean:{sign}.4f}"
  if of.margin is None:
    return mean
  low, high = interval(of, bounds)
  if (low, high) == (of.mean - of.margin, of.mean + of.margin):
    return f"{mean} ± {of.margin:.4f}"
  return f"{mean} ({low:{sign}.4f} to {high:{sign}.4f})"


def p_value(values: Sequence[float]) -> float | None:
  """Returns the p-value of a two-sided t test of the hypothesis that the mean is 0.

  This is the probability that numbers with a true mean of 0 have a sample mean as far
  from 0 as that of `values`, or farther. It is None for a single number and for equal
  numbers.
  """
  if len({*values}) < 2:
    return None
  from scipy import stats  # This import takes seconds.

  result: Any = stats.ttest_1samp(values, 0.0)
  return float(result.pvalue)


def paired(group: Group, first: Group, measure: str) -> list[float]:
  """Returns `group` minus `first` in a measure, for each seed that both have.

  Args:
    group: Group of runs.
    first: Group to compare with.
    measure: Name of the measure, for example "test_accuracy".
  """
  return [run[measure] - first.runs[seed][measure] for seed, run in group.runs.items()
          if seed in first.runs]


def compare(runs: Sequence[records.Record], by: Sequence[str]) -> list[Comparison]:
  """Compares runs that differ only in the fields `by` and in the seed.

  Args:
    runs: Records, see `records.read`. In each comparison, the first group that is found
      is the one with which the others are compared.
    by: Names of fields.

  Returns:
    A comparison for each combination of the other fields.

  Raises:
    errors.UsageError: There is no such field, or the network does not depend on it.
  """
  fields = config_lib.default_config()
  for name in by:
    if name not in fields:
      raise errors.unknown_name("config field", name, [*fields])
    errors.check(name not in records.NO_MATTER, "by", name,
                 "a field that the network depends on, and not the seed")
  found: dict[str, dict[str, list[records.Record]]] = {}
  for run in runs:
    groups = found.setdefault(records.key(run["config"], by), {})
    groups.setdefault(records.key(run["config"]), []).append(run)
  result = []
  for groups in found.values():
    groups = [_group(group, by) for group in groups.values()]
    config = next(iter(groups[0].runs.values()))["config"]
    result.append(Comparison(records.settings(config, by), tuple(
        group._replace(differences=_differences(group, groups[0]))
        for group in groups)))
  return result


def _group(runs, by) -> Group:
  runs = {run["seed"]: run for run in sorted(runs, key=lambda run: run["seed"])}
  acting = records.acting(next(iter(runs.values()))["config"])
  return Group(
      by={name: acting[name] for name in by},
      runs=runs,
      estimates={name: estimate([run[name] for run in runs.values()])
                 for name in _MEASURES},
      differences={})


def _differences(group, first):
  pairs = {name: [] if group is first else paired(group, first, name)
           for name in _MEASURES}
  return {name: estimate(values) if values else None for name, values in pairs.items()}


# Functions that describe a config in headings, and the fields that each describes.
_IN_WORDS = ((titles.network, ("network", "conv_widths", "dense_widths")),
             (titles.dataset, ("dataset",)),
             (titles.bits, ("input_bits", "weight_bits", "bits_rules")))


def heading(comparison: Comparison) -> str:
  """Describes what all groups share: "ConvNet D, CIFAR-10, W1A2; batch_size=128"."""
  group = comparison.groups[0]
  by = {*group.by}
  config = next(iter(group.runs.values()))["config"]
  if "bits_rules" in by:
    config, by = config | {"bits_rules": []}, by - {"bits_rules"}
  words, said = [], set()
  for title, fields in _IN_WORDS:
    if not by & {*fields}:
      words.append(title(config))
      said.update(fields)
  rest = records.described({name: value for name, value in comparison.settings.items()
                            if name not in said})
  return "; ".join(filter(None, [", ".join(words), rest])) or "All of these"


def markdown(comparisons: Sequence[Comparison]) -> str:
  """Formats comparisons as Markdown."""
  parts = [
      "Test accuracy of the hard network: mean over the seeds, sample standard "
      f"deviation, {CONFIDENCE:.0%} confidence interval (Student's t, cut off at 0 and "
      "1); paired: the mean difference to the first row, seed by seed, and its "
      "interval (cut off at -1 and 1).\n"]
  for comparison in comparisons:
    names = list(comparison.groups[0].by)
    parts.append(f"## {heading(comparison)}\n")
    rows = []
    for measure, of in _MEASURES.items():
      for group in comparison.groups:
        mean, paired = group.estimates[measure], group.differences[measure]
        rows.append([
            of, *(records.text(group.by[name]) for name in names),
            str(mean.count), f"{mean.mean:.4f}", _number(mean.deviation),
            _interval(mean, ACCURACY), str(paired.count) if paired else "",
            f"{paired.mean:+.4f}" if paired else "",
            _interval(paired, DIFFERENCE)])
    parts.append(tables.table_of(
        ["accuracy of", *names, "seeds", "mean", "deviation", "interval", "pairs",
         "paired difference", "its interval"], rows))
  return "\n".join(parts)


def _number(value: float | None) -> str:
  return "" if value is None else f"{value:.4f}"


def _interval(of: Estimate | None, bounds: tuple[float, float]) -> str:
  if of is None or of.margin is None:
    return ""
  low, high = interval(of, bounds)
  return f"{low:.4f} to {high:.4f}"
