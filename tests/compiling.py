"""Faster compilation, for tests that do not compare the last bits of numbers."""

from typing import Any, Callable

import jax


def quick_jit(function: Callable, **options: Any) -> Callable:
  """`jax.jit` without LLVM's optimizations, which take longer than a test's numbers."""
  return jax.jit(
      function, compiler_options={"xla_backend_optimization_level": 0}, **options)
