"""The fields of a run's config, each with its default and its description.

Packed networks hold configs too. Therefore this module needs no module of training.
"""

# Fields that depend on the machine. Results do not depend on them.
MACHINE = ("cache_dir", "data_dir", "data_workers")

# Default and description of each field, by section. All configs have the same fields.
FIELDS = {
    "Data": {
        "seed": (0, "Seed of initialization, order and augmentation."),
        "dataset": ("cifar10",
                    "Name of the data set: digits, cifar10, cifar100, imagenet2012, or "
                    "one that `python -m minw.prepare --source=FOLDER` wrote."),
        "data_dir": ("~/tensorflow_datasets",
                     "Directory that `python -m minw.prepare` wrote the data to, or "
                     "a copy of it, gs://BUCKET/NAME."),
        "cache_dir": ("~/.cache/minw",
                      "Directory on this machine for copies of data sets whose "
                      "data_dir is on gs://."),
        "in_memory": ("auto",
                      "Whether the data set is held in memory: true, false to decode "
                      "images when they are needed, or auto for true if images have "
                      "one size and take at most 2 GiB."),
        "train_examples": (0,
                           "Number of training examples to use, starting at the first "
                           "one; 0 for all. Streamed data, such as "
                           "imagenet2012, require 0."),
        "crop_size": (24, "Side of crops in pixels. Training takes random crops, and "
                          "evaluation takes the central crop."),
        "crop_padding": (0, "Number of pixels of mean value that are added on each "
                            "side before random crops. Streamed data ignore it."),
        "random_flip": (True, "Whether training mirrors images at random."),
        "rotation": (0.0, "Largest angle of random rotations in degrees, in either "
                          "direction."),
        "brightness": (0.0, "Largest random change of brightness, as a fraction of the "
                            "range of pixels."),
        "contrast": (0.0, "Largest random change of contrast: differences from the "
                          "mean are multiplied by 1 plus or minus up to this."),
        "random_erasing": (0.0, "Probability that a random rectangle of a training "
                                "image, 2 % to 33 % of it, becomes the mean."),
        "mixup": (0.0, "Parameter of the beta distribution of the weights with which "
                       "mixup averages pairs of training images; 0 for no mixup."),
        "cutmix": (0.0, "Parameter of the beta distribution of the area that a "
                        "training image keeps when cutmix pastes a square of another "
                        "one; 0 for no cutmix. If mixup is on, too, each image gets "
                        "one of the two at random."),
        "crop_scale": ((0.08, 1.0),
                       "Smallest and largest area of random crops, as fractions of the "
                       "image (streamed data)."),
        "eval_resize": (256,
                        "Length of the shorter side before the central crop; 0 for the "
                        "image's own size (streamed data)."),
        "data_workers": (0, "Number of processes that decode images; 0 for threads of "
                            "the training process (streamed data)."),
        "max_damaged": (0.001,
                        "Largest fraction of damaged images in a split. A run with "
                        "more of them stops (streamed data)."),
        "pixels": ("integer", "Normalization of pixels: integer for (pixel - "
                              "round(mean)) / 64, standardized for (pixel - mean) / "
                              "deviation."),
    },
    "Network": {
        "network": ("convnet", "Name of the network: convnet, or a name in "
                               "minw.models.NETWORKS such as resnet18 or densenet100."),
        "conv_widths": ((64, 64, 128, 128, 256, 256),
                        "Widths of the 3x3 convolutions (convnet)."),
        "dense_widths": ((256, 256), "Widths of the hidden dense layers (convnet)."),
        "pool_layers": ((),
                        "Convolutions that 2x2 max pooling follows, counted from 1; () "
                        "for every second one (convnet)."),
        "global_pool": (False, "Whether the input of the dense layers is the sum over "
                               "the pixels of the last feature map, so that weights do "
                               "not grow with the image (convnet)."),
        "first_padding": ("SAME", "Padding of the first convolution, SAME or VALID "
                                  "(convnet)."),
        "pad_value": (0.0, "Padding value of the other convolutions: 0, 1 or -1."),
        "share_pool_gradient": (False, "Whether tied values of a pooling window share "
                                       "the gradient."),
        "norm_momentum": (0.9, "Momentum of batch norm's running statistics."),
        "norm_epsilon": (1e-4, "Epsilon of batch norm."),
        "norm_group_size": (0,
                            "Number of examples over which batch norm takes its "
                            "statistics; 0 for the whole batch."),
        "norm_scale": (True, "Whether batch norm has a scale besides its shift."),
        "rprelu": (False, "Whether batch norm is followed by RPReLU, the learned "
                          "activation of ReActNet."),
        "kernel_init": ("glorot_uniform", "Name of the initializer, a function of "
                                          "jax.nn.initializers."),
        "compute_dtype": ("float32", "Dtype of operands in training: float32, or "
                                     "bfloat16 on accelerators."),
        "sum_dtype": ("float32", "Dtype to which training steps round sums of "
                                 "products: float32 or bfloat16. With float32, GPUs "
                                 "convert bfloat16 operands back."),
    },
    "Bits: 1 to 5, or a float format: float8_e4m3fn, bfloat16, float16, float32": {
        "input_bits": (1, "Bits of all activations except the image and the logits."),
        "weight_bits": (1, "Bits of all weights."),
        "bits_rules": ((),
                       "Exceptions from these bits: pairs of a pattern for layer paths "
                       "and bits. The last pattern that matches decides."),
        "input_thresholds": ((), "Thresholds of activations; () for the defaults."),
        "learn_input_thresholds": (False,
                                   "Whether each channel of activations of 2 to 5 bits "
                                   "learns its thresholds, starting at "
                                   "input_thresholds."),
        "weight_threshold_rule": ("layer_mean",
                                  "Rule for the thresholds of weights: layer_mean, "
                                  "channel_mean or fixed."),
        "weight_thresholds": ((),
                              "Thresholds of weights, or factors on the mean; () for "
                              "the defaults."),
        "step_per_channel": (False, "Whether the estimator lsq learns a step for each "
                                    "output channel of weights, instead of one for "
                                    "the layer."),
        "weight_scale": ("none", "Scale of quantized weights: none, layer_mean "
                                 "(DoReFa-Net) or channel_mean (XNOR-Net)."),
        "weight_frequency": (0.0, "Frequency of the sine of the weights that is "
                                  "quantized in their place, as in BiPer; 0 for the "
                                  "weights themselves."),
    },
    "Estimator": {
        "estimator": ("aqe", "Name of the estimator, a function of minw.estimators "
                             "such as ste, aqe, ede or ewgs."),
        "input_estimator": ("", "Name of the estimator of inputs, such as approx_sign "
                                "for one bit; '' for that of the weights."),
        "estimator_gradient": ("eq18", "Backward rule of AQE: eq18, algorithm1 or "
                                       "eq15."),
        "estimator_noise_steps": (1,
                                  "Number of steps for which a random estimator keeps "
                                  "its noise."),
        "alpha_start": (0.5, "Value of alpha at the start of the run."),
        "alpha_final": (1.0, "Value of alpha from alpha_end on."),
        "alpha_end": (0.465,
                      "Time at which alpha reaches alpha_final, as a fraction of the "
                      "run. The default is epoch 93 of 200."),
        "alpha_shape": ("linear", "Shape of the alpha schedule: linear, cosine, cubic, "
                                  "sigmoid or step."),
        "alpha_per_layer": (False,
                            "Whether alpha grows in one layer after another, starting "
                            "at the input."),
        "alpha_backward": (False,
                           "Whether alpha_per_layer starts at the output instead."),
        "alpha_weights": ("with", "Whether alpha grows for weights with activations, "
                                  "or in the half of alpha_end before or after that "
                                  "of activations."),
    },
    "Optimization": {
        "batch_size": (256, "Number of examples in a step, on all devices together."),
        "num_epochs": (200, "Number of epochs of the run."),
        "optimizer": ("adam", "Name of the optimizer: adam, sgd or bop."),
        "shard_optimizer": (False,
                            "Whether devices share the optimizer's state instead of "
                            "keeping a copy each."),
        "adam_epsilon": (1e-8, "Epsilon of Adam."),
        "momentum": (0.9, "Momentum of SGD."),
        "bop_adaptivity_rate": (1e-4, "Adaptivity rate of Bop, which updates one-bit "
                                      "weights. Adam updates all others."),
        "bop_threshold": (1e-8, "Threshold of Bop."),
        "class_weights": ("none",
                          "Weights of classes in the loss of training: none, or "
                          "balanced for weights that are inversely proportional to "
                          "the number of training images of a class, with mean 1 over "
                          "these images."),
        "weight_decay": (0.0, "L2 penalty on all kernels, which is added to the "
                              "gradient."),
        "decoupled_weight_decay": (False,
                                   "Whether weight_decay is not added to the gradient "
                                   "but shrinks the parameters directly, as in AdamW."),
        "latent_weight_decay_factor": (1.0, "Factor on weight_decay for latent weights "
                                            "(kernels of layers on a grid)."),
        "norm_weight_decay_factor": (0.0, "Factor on weight_decay for batch norm's "
                                          "scales and shifts."),
        "gradient_clip_norm": (0.0, "Largest norm of all gradients together. Larger "
                                    "gradients are scaled to it. 0 for no limit."),
        "ovsw_scaling": (0.0,
                         "Smallest ratio of gradient to weights to which OvSW raises "
                         "the gradient of an output channel of one-bit weights; 0 for "
                         "none."),
        "ovsw_decay": (0.0, "Coefficient of the decay by which OvSW wakes one-bit "
                            "weights that keep their sign; 0 for none."),
        "learning_rate": (0.01, "Learning rate at the start, after the warm-up."),
        "learning_rate_warmup": (0.0,
                                 "Length of the warm-up, as a fraction of the run. The "
                                 "learning rate rises linearly from 0."),
        "learning_rate_schedule": ("staircase",
                                   "Learning-rate schedule after the warm-up: "
                                   "staircase, exponential, steps or constant; linear "
                                   "or cosine, which fall to 0; or one_cycle, which "
                                   "rises along a cosine in the warm-up and falls "
                                   "along one after it."),
        "learning_rate_decay": (0.9**35,
                                "Factor on the learning rate from the warm-up to the "
                                "end (staircase and exponential schedules), or at each "
                                "step (steps schedule)."),
        "learning_rate_stairs": (35, "Number of stairs (staircase schedule)."),
        "learning_rate_steps": ((0.5, 0.75),
                                "Positions of the steps, as fractions of the run "
                                "(steps schedule)."),
        "ema_decay": (0.0,
                      "Decay of an exponential moving average of the trained "
                      "variables, from which the hard network is made; 0 for none."),
        "label_smoothing": (0.0, "Probability that labels spread evenly over all "
                                 "classes."),
        "teacher": ("", "Directory of another run whose hard network's predictions "
                        "this run learns, besides the labels; '' for none."),
        "teacher_weight": (0.9, "Weight of the teacher's predictions in the loss. The "
                                "labels have the rest."),
        "teacher_temperature": (4.0, "Number by which logits are divided before they "
                                     "are compared with those of the teacher."),
        "init_from": ("", "Directory of another run, whose last weights this run "
                          "starts from."),
    },
    "Evaluation and records": {
        "eval_every_epochs": (1, "Number of epochs between validations. Each one "
                                 "writes metrics and a checkpoint."),
        "eval_batch_size": (1000, "Number of examples that are evaluated at a time."),
        "eval_train": (False, "Whether the hard network is also evaluated on the "
                              "training split."),
        "histogram_layers": ((), "Patterns of layers whose weights or activations are "
                                 "counted in histograms."),
        "histogram_epochs": ((),
                             "Epochs after which histograms are counted; () for 1/40, "
                             "1/8 and 11/40 of the run, which is 5, 25 and 55 of 200."),
        "reestimate_batches": (0,
                               "Number of batches on which batch norm's statistics are "
                               "re-estimated."),
        "deterministic": (True, "Whether runs on GPUs repeat bit for bit, at some cost "
                                "in speed."),
    },
}

# Fields that hold an integer or the name of a float format.
BITS = ("input_bits", "weight_bits")
