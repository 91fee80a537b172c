"""Packed networks as files that other tools run: see `minw.export.__main__`."""
