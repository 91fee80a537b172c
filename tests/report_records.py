"""Records of runs as `minw.report.records.read` gives them, made by hand."""

import json

from minw import config as config_lib

EXAMPLES = {"cifar10": 45_000, "cifar100": 45_000, "digits": 1_257,
            "imagenet2012": 1_271_167}
# From Student's table: 0.975, 2 and 1 degrees.
T2, T1 = 4.302652729749, 12.706204736175


def made(accuracy=0.8, *, best=None, top5=None, config=None, **changes):
  c = config or config_lib.default_config()
  c.update(changes)
  steps = c.num_epochs * (EXAMPLES[c.dataset] // c.batch_size)
  return {
      "config": json.loads(config_lib.to_json(c)), "seed": c.seed, "commit": "abc",
      "hardware": None, "versions": None, "seconds": 1.0, "step": steps,
      "test_accuracy": accuracy, "test_loss": 1.0, "test_top5_accuracy": top5,
      "best_test_accuracy": accuracy if best is None else best, "best_test_loss": 1.0,
      "best_step": steps, "curve": None, "histograms": None, "name": f"run {c.seed}"}


def named(run, accuracy, **changes):
  return made(accuracy, **changes) | {"run": f"{run}-seed{changes['seed']}"}
