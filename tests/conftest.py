"""What the tests share: strict numerics, repeatable hypothesis runs, real data."""

import contextlib
import gc
import os
import pathlib
import signal
import tempfile
import tracemalloc  # noqa: F401 (pytest would, inside TFDS's lazy imports: they break)
from typing import Iterator

# Set before hypothesis first looks: it caches even where it keeps no examples.
os.environ.setdefault("HYPOTHESIS_STORAGE_DIRECTORY",
                      os.path.join(tempfile.gettempdir(), "minw-hypothesis"))

# What is compiled is kept for all the tests of a run and the processes that they start,
# many of which compile the same. Files are locked only if there is a largest size. The
# folder may also be given, for several runs to share.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
  _compiled = tempfile.TemporaryDirectory(prefix="minw-compiled-")
  os.environ["JAX_COMPILATION_CACHE_DIR"] = _compiled.name
os.environ.setdefault("JAX_COMPILATION_CACHE_MAX_SIZE", str(10**10))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.3")

import hypothesis
import jax
import pytest

# Most of the tests' time is compilation, which these flags halve. XLA_FLAGS= compiles
# as users do. XLA exits where it does not know a flag: JAX 0.11 lacks the last one.
if "XLA_FLAGS" not in os.environ:
  _flags = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
  if jax.__version_info__ < (0, 11):
    _flags += " --xla_cpu_use_fusion_emitters=false"
  os.environ["XLA_FLAGS"] = _flags

# Tracing makes so many objects that the collector would take a tenth of the time.
gc.freeze()
gc.set_threshold(100_000, 20, 100)

# A shell that starts the tests in the background has them, and all that they start,
# ignore SIGINT, which some of them send.
signal.signal(signal.SIGINT, signal.default_int_handler)

hypothesis.settings.register_profile(
    "minw", derandomize=True, deadline=None, database=None)
hypothesis.settings.load_profile("minw")


def pytest_collection_finish() -> None:
  """Keeps what the test modules have imported from every later collection."""
  gc.collect()
  gc.freeze()


@pytest.fixture(scope="module")
def strict() -> Iterator[None]:
  """No implicit change of dtype or rank.

  It is by request because tests compute their own expectations with NumPy's promotion.
  """
  with contextlib.ExitStack() as stack:
    stack.enter_context(jax.numpy_dtype_promotion("strict"))
    stack.enter_context(jax.numpy_rank_promotion("raise"))
    yield


@pytest.fixture(scope="session")
def original_data():
  """A data set's name -> its folder in that which MINW_TEST_DATA names."""
  def of(name):
    folder = os.environ.get("MINW_TEST_DATA")
    if not folder:
      pytest.skip("MINW_TEST_DATA names no folder with the original files")
    assert os.path.isdir(folder), f"MINW_TEST_DATA={folder!r} is no folder"
    source = pathlib.Path(folder, name)
    if not list(source.glob("**/*.bin")):
      pytest.skip(f"MINW_TEST_DATA: {source} lacks original files")
    return source

  return of


@pytest.fixture(scope="session")
def prepared_data(original_data, tmp_path_factory):
  """A data set's name -> the data_dir where it was prepared from those files."""
  folder = tmp_path_factory.mktemp("prepared")

  def of(name):
    from minw import prepare  # Imports much, for the few tests that need it.
    source = original_data(name)
    if not (folder / name).exists():
      prepare.prepare(name, folder, source)
    return folder

  return of


@pytest.fixture(scope="session")
def command(tmp_path_factory):
  """command(module, *argv): runs a command of minw; see `forked.commands`."""
  import forked

  with forked.commands(tmp_path_factory.mktemp("commands")) as run:
    yield run


@pytest.fixture
def small(monkeypatch):
  """CIFAR data sets are those of `cifar_files`, with a few images each."""
  import cifar_files
  from minw.data import cifar
  from minw.data import datasets

  originals, infos = cifar_files.small_tables()
  for name in cifar_files.COUNTS:
    monkeypatch.setitem(cifar.ORIGINALS, name, originals[name])
    monkeypatch.setitem(datasets._INFOS, name, infos[name])


@pytest.fixture(scope="module")
def imagenet_data(tmp_path_factory):
  """The data_dir where the small ImageNet of `imagenet_files` was prepared."""
  import imagenet_files
  from minw import prepare

  folder = tmp_path_factory.mktemp("imagenet")
  path = prepare.prepare("imagenet2012", folder / "data",
                         imagenet_files.write_archives(folder / "source"), partial=True)
  assert path == folder / "data/imagenet2012/5.1.0"
  return folder / "data"


@pytest.fixture(scope="session")
def emulator(tmp_path_factory):
  """The `gcs.Service` of this process, whose threads keep their connections to it."""
  import gcs

  with gcs.emulator(tmp_path_factory.mktemp("gcs")) as service:
    with pytest.MonkeyPatch.context() as patch:
      for name, value in service.environment.items():
        patch.setenv(name, value)
      yield service


@pytest.fixture
def record(tmp_path):
  """A workdir with lines at steps 10, 20, 30 and of the test split."""
  import short_runs

  short_runs.write_record(tmp_path)
  return tmp_path
