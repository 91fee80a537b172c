"""Data sets: their files, reading them, and the batches that networks see."""
