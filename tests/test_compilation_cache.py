"""minw.compilation_cache: a second start of a run compiles nothing."""

import json

import pytest

import gcs
from short_runs import tiny_config
from short_runs import write_config

# What runs instead of `python -m minw.main`. It prints how many programs were compiled
# or read, how many of them were looked up in the cache, and how many were found there.
COUNTING = """
import collections, json, runpy
from jax import monitoring

counts = collections.Counter()
monitoring.register_event_listener(lambda name, **_: counts.update([name]))
monitoring.register_event_duration_secs_listener(
    lambda name, *_, **__: counts.update([name]))
try:
  runpy.run_module("minw.main", run_name="__main__", alter_sys=True)
finally:
  print(json.dumps([counts[name] for name in (
      "/jax/core/compile/backend_compile_duration",
      "/jax/compilation_cache/compile_requests_use_cache",
      "/jax/compilation_cache/cache_hits")]))
"""


def counts_of(command, tmp_path, cache, name, env={}):
  """The counts of a run in the workdir `name`."""
  write_config(tmp_path / "config.py", tiny_config(
      conv_widths=(), dense_widths=(), num_epochs=1))
  ended = command("minw.main", f"--config={tmp_path}/config.py", "--quiet",
                  f"--workdir={tmp_path / name}", f"--compilation_cache_dir={cache}",
                  code=COUNTING, env=env)
  assert ended.code == 0, ended.err
  return json.loads(ended.out.splitlines()[-1])


def check_second_start(command, tmp_path, cache, env={}):
  programs, looked_up, _ = counts_of(command, tmp_path, cache, "first", env)
  assert programs == looked_up > 5
  assert counts_of(command, tmp_path, cache, "second", env) == [programs] * 3


def test_a_second_start_compiles_nothing(command, tmp_path):
  check_second_start(command, tmp_path, tmp_path / "new/cache")
  first, second = ((tmp_path / name / "metrics.jsonl").read_text().splitlines()
                   for name in ("first", "second"))
  assert first[1:] == second[1:]  # The first line has a rate.


@pytest.mark.slow
def test_a_second_start_compiles_nothing_on_gs(command, tmp_path):
  with gcs.emulator(tmp_path) as service:
    check_second_start(
        command, tmp_path, "gs://bucket/cache", service.environment)
    assert len(service.objects("cache/")) > 5


@pytest.mark.slow
def test_a_bucket_that_is_not_there(command, tmp_path):
  with gcs.emulator(tmp_path) as service:
    ended = command(
        "minw.main", "--config=digits_convnet", f"--workdir={tmp_path / 'run'}",
        "--compilation_cache_dir=gs://absent/cache", env=service.environment)
  assert ended == (
      2, "", "error: compilation_cache_dir='gs://absent/cache': must be a folder that"
      " can be read and written (there is no such bucket)\n")


def test_bad_folders(command, tmp_path):
  (tmp_path / "file").touch()
  for value, message in (
      (tmp_path / "file", "must be a folder that can be read and written (File exists"),
      (tmp_path / "file/below", "must be a folder that can be read and written (Not a"),
      ("s3://bucket/cache", "the only URLs that minw reads and writes are gs://")):
    ended = command("minw.main", "--config=digits_convnet",
                    f"--workdir={tmp_path / 'run'}", f"--compilation_cache_dir={value}")
    assert (ended.code, ended.out, ended.err.count("\n")) == (2, "", 1)
    assert message in ended.err
  assert not (tmp_path / "run").exists()
