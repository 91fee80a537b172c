"""Timings, each beside what it is compared with: see `minw.bench.__main__`."""
