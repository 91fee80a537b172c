"""What the tests share: strict numerics, repeatable hypothesis runs, real data."""

import contextlib
import os
import pathlib
import tempfile
import tracemalloc  # pytest would, inside TFDS's lazy imports, which break it.
from typing import Iterator

# Set before hypothesis first looks: it caches even where it keeps no examples.
os.environ.setdefault("HYPOTHESIS_STORAGE_DIRECTORY",
                      os.path.join(tempfile.gettempdir(), "minw-hypothesis"))

import hypothesis
import jax
import pytest

hypothesis.settings.register_profile(
    "minw", derandomize=True, deadline=None, database=None)
hypothesis.settings.load_profile("minw")


@pytest.fixture(scope="module")
def strict() -> Iterator[None]:
  """No implicit change of dtype or rank.

  By request, not for all tests: optax's bias correction promotes int32 to float.
  """
  with contextlib.ExitStack() as stack:
    stack.enter_context(jax.numpy_dtype_promotion("strict"))
    stack.enter_context(jax.numpy_rank_promotion("raise"))
    yield


@pytest.fixture(scope="session")
def real_data() -> pathlib.Path:
  """The folder of prepared data sets that the variable MINW_TEST_DATA names."""
  folder = os.environ.get("MINW_TEST_DATA")
  if not folder:
    pytest.skip("MINW_TEST_DATA names no folder of prepared data sets")
  path = pathlib.Path(folder)
  assert path.is_dir(), f"MINW_TEST_DATA={folder!r} is no folder"
  return path
