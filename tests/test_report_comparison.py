"""minw.report.comparison: means, intervals and tests of differences."""

import math

import numpy as np
import pytest

from minw import errors
from minw.report import comparison
from minw.report import records
from report_records import T1
from report_records import T2
from report_records import made


def test_estimate():
  assert comparison.estimate([0.5]) == (1, 0.5, None, None)
  n, mean, deviation, margin = comparison.estimate([1.0, 2.0, 6.0])
  assert (n, mean) == (3, 3.0)
  assert deviation == pytest.approx(math.sqrt(7))  # (4 + 1 + 9) / 2.
  assert margin == pytest.approx(T2 * math.sqrt(7 / 3), rel=1e-9)
  assert comparison.estimate([1.0, 3.0]).margin == pytest.approx(T1, rel=1e-9)


@pytest.mark.parametrize("values, bounds, expected, text", [
    # mean 0.9, deviation 0.1 sqrt(2): 12.7 * 0.1 on either side, beyond both ends.
    ([0.8, 1.0], (0, 1), (0.0, 1.0), "0.9000 (0.0000 to 1.0000)"),
    # mean 0.98, deviation 0.02: 4.3027 * 0.02 / sqrt(3) = 0.0497.
    ([0.96, 0.98, 1.0], (0, 1), (0.98 - 0.0496829, 1.0), "0.9800 (0.9303 to 1.0000)"),
    ([0.0, 0.02, 0.04], (0, 1), (0.0, 0.02 + 0.0496829), "0.0200 (0.0000 to 0.0697)"),
    ([0.48, 0.5, 0.52], (0, 1), (0.4503171, 0.5496829), "0.5000 ± 0.0497"),
    ([1.0, 1.0, 1.0], (0, 1), (1.0, 1.0), "1.0000 ± 0.0000"),
    ([0.0, 0.02, 0.04], (-1, 1), (-0.0296829, 0.0696829), "0.0200 ± 0.0497"),
    ([-0.9, 0.9], (-1, 1), (-1.0, 1.0), "0.0000 (-1.0000 to 1.0000)"),
])
def test_intervals_stay_where_values_can_be(values, bounds, expected, text):
  of = comparison.estimate(values)
  np.testing.assert_allclose(comparison.interval(of, bounds), expected, atol=1e-6)
  assert comparison.described(of, bounds) == text


def test_described_estimates():
  assert comparison.described(comparison.estimate([0.25])) == "0.2500"
  assert comparison.described(
      comparison.estimate([0.25]), comparison.DIFFERENCE, sign="+") == "+0.2500"


def test_cut_intervals_hold_the_mean_as_often():
  """5 seeds with 50 test images each: the part cut off never holds the mean."""
  generator = np.random.default_rng(0)
  for accuracy in (0.9, 0.98):
    draws = generator.binomial(50, accuracy, (2000, 5)) / 50
    held, cut = [], []
    for values in draws:
      of = comparison.estimate(values.tolist())
      low, high = comparison.interval(of)
      assert 0 <= low <= of.mean <= high <= 1
      held.append(low <= accuracy <= high)
      cut.append(abs(of.mean - accuracy) <= of.margin)
    assert held == cut and any(low < 1 for low in held)


def test_comparison():
  runs = [made(a, best=a + 0.01, seed=seed) for seed, a in
          zip((2, 0, 1), (0.86, 0.84, 0.85))]
  runs += [made(a, seed=seed, estimator="ste") for seed, a in
           zip((0, 1, 2, 7), (0.85, 0.87, 0.86, 0.1))]
  runs += [made(0.3, weight_bits=2, estimator="ste")]
  first, second = comparison.compare(runs, ["estimator"])
  assert (first.settings, second.settings) == ({}, {"weight_bits": 2})
  aqe, ste = first.groups
  assert (aqe.by, [*aqe.runs]) == ({"estimator": "aqe"}, [0, 1, 2])
  assert (ste.by, [*ste.runs]) == ({"estimator": "ste"}, [0, 1, 2, 7])
  np.testing.assert_allclose(
      aqe.estimates["test_accuracy"], (3, 0.85, 0.01, T2 * 0.01 / math.sqrt(3)))
  np.testing.assert_allclose(aqe.estimates["best_test_accuracy"].mean, 0.86)
  assert aqe.differences == {"test_accuracy": None, "best_test_accuracy": None}
  # 0.01, 0.02, 0, of seeds 0, 1, 2; seed 7 has no partner.
  np.testing.assert_allclose(
      ste.differences["test_accuracy"], (3, 0.01, 0.01, T2 * 0.01 / math.sqrt(3)))
  np.testing.assert_allclose(ste.differences["best_test_accuracy"].mean, 0.0, atol=1e-9)
  assert ste.estimates["test_accuracy"].mean == pytest.approx(0.67)
  group, = second.groups
  assert group.estimates["test_accuracy"] == (1, 0.3, None, None)

  text = comparison.markdown([first, second])
  assert ("| last checkpoint | aqe | 3 | 0.8500 | 0.0100 | 0.8252 to 0.8748 |  |  |  |"
          "\n") in text
  assert "| 3 | +0.0100 | -0.0148 to 0.0348 |\n" in text
  assert "## ConvNet D, CIFAR-10, W1A1\n" in text
  assert "## ConvNet D, CIFAR-10, W2A1\n" in text
  assert "| last checkpoint | ste | 1 | 0.3000 |  |  |  |  |  |\n" in text


def test_headings_of_comparisons():
  """They say what is shared, and nothing that is compared."""
  runs = [made(0.5, crop_size=30, bits_rules=(("conv1", 2),)), made(0.6, crop_size=30)]
  for by, expected in (
      (["bits_rules"], "ConvNet D, CIFAR-10, W1A1; crop_size=30"),
      (["bits_rules", "weight_bits"], "ConvNet D, CIFAR-10; crop_size=30"),
      (["bits_rules", "dataset", "network"], "W1A1; crop_size=30"),
      (["bits_rules", "dataset", "network", "input_bits", "crop_size"],
       "All of these")):
    compared, = comparison.compare(runs, by)
    assert comparison.heading(compared) == expected
  compared, *_ = comparison.compare(runs, ["estimator"])
  assert comparison.heading(compared) == (
      "ConvNet D, CIFAR-10, W1A1 (conv1=2); crop_size=30")


def test_comparison_by_several_fields_and_without_partners():
  runs = [made(0.5, seed=0), made(0.6, seed=1, alpha_end=1.0, alpha_start=0.0),
          made(0.7, seed=0, alpha_end=1.0)]
  compared, = comparison.compare(runs, ["alpha_end", "alpha_start"])
  assert [group.by for group in compared.groups] == [
      {"alpha_end": 0.465, "alpha_start": 0.5}, {"alpha_end": 1.0, "alpha_start": 0.0},
      {"alpha_end": 1.0, "alpha_start": 0.5}]
  assert compared.groups[1].differences["test_accuracy"] is None
  assert compared.groups[2].differences["test_accuracy"] == (
      1, pytest.approx(0.2), None, None)
  assert len(comparison.compare(runs, ["alpha_end"])) == 2


def test_estimators_of_float_networks_do_not_count():
  """Settings of an estimator that does not act tell no runs apart."""
  floats = dict(input_bits="bfloat16", weight_bits="float32")
  runs = [made(0.9, seed=0, estimator="ste", **floats),
          made(0.8, seed=1, alpha_start=0.0, estimator_gradient="algorithm1", **floats)]
  assert records.key(runs[0]["config"]) == records.key(runs[1]["config"])
  assert records.settings(runs[1]["config"]) == floats
  compared, = comparison.compare(runs, ["estimator"])
  group, = compared.groups
  assert group.by == {"estimator": "-"} and group.estimates["test_accuracy"].count == 2
  assert "| last checkpoint | - | 2 | 0.8500 |" in comparison.markdown([compared])
  # One quantized operand is enough, of any layer.
  for changes in (dict(weight_bits=1), dict(input_bits=3),
                  dict(bits_rules=(("conv2", 1),))):
    aqe, ste = (made(estimator=name, **{**floats, **changes})["config"]
                for name in ("aqe", "ste"))
    assert records.key(aqe) != records.key(ste)
    assert records.acting(ste)["estimator"] == "ste"


def test_p_value():
  # The p-value of Student's t with 2 degrees of freedom: 1 - t / sqrt(t^2 + 2), where
  # t^2 = 12.
  assert comparison.p_value([0.03, 0.01, 0.02]) == pytest.approx(1 - (12 / 14) ** 0.5)
  assert comparison.p_value([-1.0, 1.0]) == pytest.approx(1.0)
  assert comparison.p_value([0.5]) is None
  assert comparison.p_value([0.5, 0.5]) is None


def test_comparison_refuses():
  with pytest.raises(errors.UsageError, match="did you mean 'estimator'"):
    comparison.compare([], ["estimatr"])
  for name in ("seed", "data_dir"):
    with pytest.raises(errors.UsageError, match=f"by='{name}': must be a field that"):
      comparison.compare([], [name])
