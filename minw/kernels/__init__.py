"""Kernels that run packed networks; the networks themselves are in `minw.packed`."""
