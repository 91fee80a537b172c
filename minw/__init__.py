"""Low-bit networks in JAX: estimators, quantizers, MINW-Nets."""

__version__ = "0.1.0"
