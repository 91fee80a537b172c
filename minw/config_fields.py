"""The fields of a run's config: the default and the description of each one.

Packed networks hold configs too, so that this module needs nothing of training.
"""

# Default and description of each field, by section. All configs have the same fields.
FIELDS = {
    "Data": {
        "seed": (0, "Seed of initialization, order and augmentation."),
        "dataset": ("cifar10", "digits, cifar10, cifar100 or imagenet2012."),
        "data_dir": ("~/tensorflow_datasets",
                     "Directory that `python -m minw.prepare` wrote the data to."),
        "train_examples": (0, "Number of training examples, the first ones; 0 for all. "
                              "Not for imagenet2012."),
        "crop_size": (24, "Side of crops: random ones in training, else the center."),
        "crop_padding": (0, "Pixels of mean value added on each side before random "
                            "crops. Not for imagenet2012."),
        "random_flip": (True, "Whether training mirrors images at random."),
        "crop_scale": ((0.08, 1.0), "imagenet2012: smallest and largest area of random "
                                    "crops, as fractions of the image."),
        "eval_resize": (256,
                        "imagenet2012: shorter side before the central crop; 0 for "
                             "the image's own size."),
        "data_workers": (0, "imagenet2012: processes that decode images; 0 for threads "
                            "of the training process."),
        "max_damaged": (0.001, "imagenet2012: largest fraction of damaged images in a "
                               "split; with more, a run stops."),
        "pixels": ("integer", "integer: (pixel - round(mean)) / 64; standardized: "
                              "(pixel - mean) / deviation."),
    },
    "Network": {
        "network": ("convnet", "convnet, or a name in minw.models.NETWORKS: resnet18, "
                               "densenet100, ..."),
        "conv_widths": ((64, 64, 128, 128, 256, 256),
                        "convnet: widths of the 3x3 convolutions."),
        "dense_widths": ((256, 256), "convnet: widths of the hidden dense layers."),
        "first_padding": ("SAME", "convnet: padding of the first convolution, SAME or "
                                  "VALID."),
        "pad_value": (0.0, "Border of the other convolutions: 0, 1 or -1."),
        "share_pool_gradient": (False, "Whether tied values of a pooling window share "
                                       "the gradient."),
        "norm_momentum": (0.9, "Momentum of batch norm's running statistics."),
        "norm_epsilon": (1e-4, "Epsilon of batch norm."),
        "norm_group_size": (0,
                            "Number of examples that batch norm takes its statistics "
                               "of; 0 for the whole batch."),
        "norm_scale": (True, "Whether batch norm has a scale besides its shift."),
        "kernel_init": ("glorot_uniform", "Initializer, a function of "
                                          "jax.nn.initializers."),
        "compute_dtype": ("float32", "Type of operands in training: float32, or "
                                     "bfloat16 on accelerators."),
    },
    "Bits: 1 to 5, or a float format: float8_e4m3fn, bfloat16, float16, float32": {
        "input_bits": (1, "Bits of all activations but the image and the logits."),
        "weight_bits": (1, "Bits of all weights."),
        "bits_rules": ((),
                       "Exceptions: pairs of a pattern for layer names and bits. The "
                           "last one that matches counts."),
        "input_thresholds": ((), "Thresholds of activations; () for the defaults."),
        "weight_threshold_rule": ("layer_mean", "layer_mean, channel_mean or fixed."),
        "weight_thresholds": ((),
                              "Thresholds of weights, or factors on the mean; () for "
                                  "the defaults."),
        "weight_scale": ("none", "none, layer_mean (DoReFa-Net) or channel_mean "
                                 "(XNOR-Net)."),
    },
    "Estimator": {
        "estimator": ("aqe", "A function of minw.estimators: ste, aqe, ede, ewgs, ..."),
        "estimator_gradient": ("eq18", "eq18, algorithm1 or eq15."),
        "estimator_noise_steps": (1,
                                  "Number of steps for which a random estimator keeps "
                                     "its noise."),
        "alpha_start": (0.5, "alpha at the start of the run."),
        "alpha_final": (1.0, "alpha from alpha_end on."),
        "alpha_end": (0.465,
                      "Where alpha is final, as a fraction of the run: epoch 93 of "
                             "200."),
        "alpha_shape": ("linear", "linear, cosine, cubic or step."),
        "alpha_per_layer": (False,
                            "Whether alpha grows in one layer after another, from "
                                   "the input on."),
        "alpha_backward": (False, "Whether alpha_per_layer begins at the output."),
    },
    "Optimization": {
        "batch_size": (256, "Examples of a step, on all devices together."),
        "num_epochs": (200, "Length of the run."),
        "optimizer": ("adam", "adam, sgd or bop."),
        "shard_optimizer": (False,
                            "Whether devices share the optimizer's state instead "
                                   "of keeping a copy each."),
        "adam_epsilon": (1e-8, "Epsilon of Adam."),
        "momentum": (0.9, "Momentum of SGD."),
        "bop_adaptivity_rate": (1e-4, "Adaptivity rate of Bop, for weights of one bit; "
                                      "Adam has all others."),
        "bop_threshold": (1e-8, "Threshold of Bop."),
        "weight_decay": (0.0, "L2 penalty on all kernels, added to the gradient."),
        "learning_rate": (0.01, "Learning rate at the start."),
        "learning_rate_schedule": ("staircase", "staircase, exponential, steps or "
                                                "constant."),
        "learning_rate_decay": (0.9**35,
                                "Factor on the learning rate over the whole run; "
                                         "for steps, at each step."),
        "learning_rate_stairs": (35, "staircase: number of stairs."),
        "learning_rate_steps": ((0.5, 0.75),
                                "steps: where they are, as fractions of the "
                                             "run."),
        "init_from": ("", "Workdir of another run whose last weights this one starts "
                          "from."),
    },
    "Evaluation and records": {
        "eval_every_epochs": (1, "Epochs between validations, each with metrics and a "
                                 "checkpoint."),
        "eval_batch_size": (1000, "Examples that are evaluated at a time."),
        "eval_train": (False, "Whether the hard network is also evaluated on the "
                              "training split."),
        "histogram_layers": ((), "Patterns of layers whose weights or activations are "
                                 "counted."),
        "histogram_epochs": ((),
                             "Epochs after which they are counted; () for 1/40, 1/8 "
                                 "and 11/40 of the run: 5, 25 and 55 of 200."),
        "reestimate_batches": (0, "Batches to re-estimate batch norm's statistics on."),
        "deterministic": (True, "On GPUs: whether runs repeat to the bit, at some cost "
                                "in speed."),
    },
}

BITS = ("input_bits", "weight_bits")  # Integers, or names of float formats.
