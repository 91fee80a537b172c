"""Sweep of recipes, each of which differs in one way from the paper's training.

An example is --sweep=recipes:dataset=cifar100,network=D,size=quarter,seeds=3. The
arguments of `get_runs` can be set in this way. With runs=cosine+smoothing, the sweep
has only these recipes, beside the baseline. With estimators=aqe+ste, each recipe is
trained with both estimators.

The name of a run, aqe-cosine-seed0 for example, has the estimator, the recipe and the
seed. Recipes with a teacher learn from a float network, which is trained first: one of
the same widths, or one that is four times as wide.

Recipes with stages are chains of runs, each of which starts from the weights of the one
before it. The stages share the epochs, and each of them has the whole schedules:

  activations-first  one-bit activations with float weights, then both of one bit
  weights-first      one-bit weights with float activations, then both of one bit
  sine-first         BiPer: one-bit activations with the sine of float weights, then
                     with its signs
  bits-3-2-1         weights and activations of three bits, then of two, then of one
"""

from minw import config as config_lib
from minw import errors

RECIPES = {
    "base": {},
    # Schedules of the learning rate.
    "linear": {"learning_rate_schedule": "linear"},
    "cosine": {"learning_rate_schedule": "cosine"},
    "one-cycle": {"learning_rate_schedule": "one_cycle", "learning_rate_warmup": 0.3},
    "warm-up": {"learning_rate_warmup": 0.05},
    # The loss.
    "smoothing": {"label_smoothing": 0.1},
    "teacher": {"teacher": "teacher"},
    "wide-teacher": {"teacher": "wide-teacher"},
    # Augmentation.
    "padding": {"crop_padding": 2},
    "light": {"brightness": 0.1, "contrast": 0.2},
    "erasing": {"random_erasing": 0.25},
    "mixup": {"mixup": 0.2},
    "cutmix": {"cutmix": 1.0},
    # Updates and averages.
    "weight-decay": {"weight_decay": 1e-4, "decoupled_weight_decay": True},
    "norm-decay": {"weight_decay": 1e-4, "decoupled_weight_decay": True,
                   "latent_weight_decay_factor": 0.0, "norm_weight_decay_factor": 1.0},
    "clipping": {"gradient_clip_norm": 1.0},
    "ovsw": {"ovsw_scaling": 0.04, "ovsw_decay": 0.0009},
    "periodic": {"weight_frequency": 20.0},
    "average": {"ema_decay": 0.999},
    "reestimated": {"reestimate_batches": 50},
    "he-init": {"kernel_init": "he_normal"},
    "momentum-0.99": {"norm_momentum": 0.99},
    # Quantizers.
    "rprelu": {"rprelu": True},
    "approx-sign-inputs": {"input_estimator": "approx_sign"},
    # The best schedule of results/recipes_quarter, with a warm-up.
    "linear-warm-up": {"learning_rate_schedule": "linear",
                       "learning_rate_warmup": 0.05},
    # The accelerators' fast floats, also for sums.
    "bfloat16": {"compute_dtype": "bfloat16", "sum_dtype": "bfloat16"},
    # Stages.
    "activations-first": {"init_from": "activations"},
    "weights-first": {"init_from": "weights"},
    "sine-first": {"init_from": "sine", "weight_frequency": 20.0},
    "bits-3-2-1": {"init_from": "2-bits"},
}
_FLOAT = {"weight_bits": "float32", "input_bits": "float32"}
# Float networks that others learn from, and stages that others start from.
_TEACHERS = ("teacher", "wide-teacher")
_STAGES = {"activations": {"weight_bits": "float32"},
           "weights": {"input_bits": "float32"},
           "sine": {"weight_bits": "float32", "weight_frequency": 20.0},
           "3-bits": {"weight_bits": 3, "input_bits": 3},
           "2-bits": {"weight_bits": 2, "input_bits": 2, "init_from": "3-bits"}}


def get_runs(argument=""):
  a = config_lib.parse_argument(
      argument, dataset="digits", network="D", size="quarter", seeds=3, epochs=0,
      estimators="aqe", runs="")
  errors.check(a.dataset in ("digits", "cifar10", "cifar100"), "dataset", a.dataset,
               "digits, cifar10 or cifar100")
  errors.check(type(a.seeds) is int and a.seeds > 0, "seeds", a.seeds,
               "a positive number")
  errors.check(type(a.epochs) is int and (a.epochs == 0 or a.epochs > 2), "epochs",
               a.epochs, "at least 3, or 0 for the usual number")
  chosen = ["base", *(a.runs.split("+") if a.runs else list(RECIPES)[1:])]
  for name in chosen:
    if name not in RECIPES:
      raise errors.unknown_name("recipe", name, RECIPES)
  config = ("digits_convnet" if a.dataset == "digits" else
            f"cifar_convnet:network={a.network},dataset={a.dataset},size={a.size}")
  for seed in range(a.seeds):
    yield from _runs_of_seed(config, a, chosen, seed)


def _runs_of_seed(config, a, chosen, seed):
  from minw import config_flag
  made = config_flag.load(config)
  epochs = a.epochs or made.num_epochs
  common = {"seed": seed, "num_epochs": epochs}
  recipes = [RECIPES[name] for name in chosen]
  for name in _TEACHERS:
    if {"teacher": name} in recipes:
      factor = 4 if name == "wide-teacher" else 1
      yield f"{name}-seed{seed}", config, common | _FLOAT | {
          widths: tuple(factor * width for width in made[widths])
          for widths in ("conv_widths", "dense_widths")}
  for estimator in a.estimators.split("+"):
    common["estimator"] = estimator
    for name in chosen:
      stages = [*_stages_before(RECIPES[name]), (name, RECIPES[name])]
      every = made.eval_every_epochs
      share = max(epochs // len(stages) // every, 1) * every
      for i, (stage, fields) in enumerate(stages, start=1):
        fields = common | fields
        if "teacher" in fields:
          fields["teacher"] += f"-seed{seed}"
        if "init_from" in fields:
          fields["init_from"] = f"{estimator}-{fields['init_from']}-seed{seed}"
        is_last = i == len(stages)
        fields["num_epochs"] = epochs - share * (i - 1) if is_last else share
        yield f"{estimator}-{stage}-seed{seed}", config, fields


def _stages_before(fields):
  """Lists name and fields of the runs that lead to a recipe, in their order."""
  if "init_from" not in fields:
    return []
  name = fields["init_from"]
  return [*_stages_before(_STAGES[name]), (name, _STAGES[name])]
