"""The packed network's kernels: what computes, not what it is (`minw.packed`)."""
