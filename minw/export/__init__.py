"""Exports packed networks to files that other tools run: see `minw.export.__main__`."""
