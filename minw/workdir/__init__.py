"""The files of a training run: how they are written and read back."""
