"""The files that a training run leaves, and how they are read back."""
