"""minw.bench web: what it times in Node and in Chromium, and what it refuses."""

import json
import os
import shutil
import subprocess

import numpy as np
import pytest

from minw import config as config_lib
from minw import errors
from minw import packed
from minw.bench import inference
from minw.bench import networks
from minw.bench import web
from minw.kernels import reference
import node

ONNX, PLAYWRIGHT = "onnxruntime-web@1.30.0", "playwright-core@1.65.1"


def tiny_config(**changes):
  c = config_lib.default_config()
  c.update(dataset="digits", crop_size=8, conv_widths=(4, 6), dense_widths=(8,))
  c.update(changes)
  return c


@pytest.fixture
def program():
  pytest.importorskip("onnx")  # The files for the other engines need it.
  return networks.random_network(tiny_config())


@pytest.fixture
def modules(tmp_path):
  """An empty folder node_modules: only the packed network runs without packages."""
  folder = tmp_path / "node_modules"
  folder.mkdir()
  return str(folder)


@node.needs_node
def test_times_the_packed_network(program, modules, tmp_path):
  shape = web.write_files(program, tmp_path)
  assert shape == [1, 1, 8, 8]
  with web.driver(str(tmp_path), modules, "") as ask:
    assert 0 < ask("start", "simd128", shape) < 60_000
    assert 0 < ask("cold", "simd128", shape) < 60_000
    ask("run", "simd128", 10_000)  # V8 compiles it.
    few, many = ask("run", "simd128", 1000), ask("run", "simd128", 20_000)
    assert 2 * few < many  # It is twenty times the work.
    with pytest.raises(errors.UsageError, match="onnxruntime-web"):
      ask("start", "float32", shape)
    assert ask("run", "simd128", 1) > 0  # The driver lives on.


@node.needs_node
def test_relaxed_simd_is_timed_where_there_is_any(program, modules, tmp_path):
  """V8 has it since version 11.4, that is, Node 21."""
  said = node.run("node", "-p", "process.versions.node.split('.')[0] >= 21")
  shape = web.write_files(program, tmp_path)
  with web.driver(str(tmp_path), modules, "") as ask:
    if said.strip() == "true":
      assert ask("start", "relaxed-simd", shape) > 0
    else:
      with pytest.raises(errors.UsageError, match="there is no relaxed SIMD"):
        ask("start", "relaxed-simd", shape)
    assert ask("start", "simd128", shape) > 0


@node.needs_node
def test_wrong_logits_are_not_timed(program, modules, tmp_path, monkeypatch):
  right = reference.logits
  monkeypatch.setattr(
      reference, "logits", lambda *args: np.nextafter(right(*args), np.float32(99)))
  shape = web.write_files(program, tmp_path)
  with web.driver(str(tmp_path), modules, "") as ask:
    with pytest.raises(errors.UsageError, match="not those of the native kernels"):
      ask("start", "simd128", shape)


def test_refuses_what_is_not_there(modules, monkeypatch):
  with pytest.raises(errors.UsageError, match="where='moon'.*node, chromium"):
    web.check_installed(["moon"], modules)
  with pytest.raises(errors.UsageError, match="where=''"):
    web.check_installed([], modules)
  monkeypatch.setattr(shutil, "which", lambda name: f"/bin/{name}")
  with pytest.raises(errors.UsageError, match="npm install onnxruntime-web"):
    web.check_installed(["node"], modules)
  os.mkdir(f"{modules}/onnxruntime-web")
  assert web.check_installed(["node"], modules) == {"node": ""}
  with pytest.raises(errors.UsageError, match="npm install playwright-core"):
    web.check_installed(["node", "chromium"], modules)
  os.mkdir(f"{modules}/playwright-core")
  assert web.check_installed(["node", "chromium"], modules) == {
      "node": "", "chromium": "/bin/chromium"}
  monkeypatch.setattr(
      shutil, "which", lambda name: None if "chrom" in name else f"/bin/{name}")
  with pytest.raises(errors.UsageError, match="chromium is not installed"):
    web.check_installed(["chromium"], modules)
  monkeypatch.setattr(shutil, "which", lambda name: None)
  with pytest.raises(errors.UsageError, match="node is not installed"):
    web.check_installed(["node"], modules)


def test_refuses_networks_without_a_float_counterpart(modules, monkeypatch):
  monkeypatch.setattr(web, "check_installed", lambda *args: {"node": ""})
  with pytest.raises(errors.UsageError, match="config.network"):
    web.bench_web(tiny_config(network="densenet", dataset="cifar10", crop_size=24), 1,
                  ["node"], modules)


@pytest.fixture
def packages(tmp_path):
  """A folder node_modules with the packages of the other engines."""
  pytest.importorskip("onnx")
  if not shutil.which("npm"):
    pytest.skip("npm is not installed")
  installed = subprocess.run(
      ["npm", "install", "--silent", "--ignore-scripts", ONNX, PLAYWRIGHT],
      cwd=tmp_path, capture_output=True, text=True)
  if installed.returncode:
    pytest.skip(f"npm's registry cannot be reached: {installed.stderr[-200:]}")
  return str(tmp_path / "node_modules")


@node.needs_node
@pytest.mark.slow
def test_all_engines_are_timed(packages):
  where = ["node", "chromium"] if shutil.which("chromium") else ["node"]
  result = json.loads(json.dumps(web.bench_web(tiny_config(), 2, where, packages)))
  assert [run["where"] for run in result["runs"]] == where
  work = sum(np.prod(shape) for shape in (
      (8, 8, 9, 1, 4), (8, 8, 9, 4, 6), (4 * 4 * 6, 8), (8, 10)))
  assert networks.multiplications(inference.checked_network(tiny_config())) == work
  for run in result["runs"]:
    names = ["minw simd128", "minw relaxed", "ONNX float32", "ONNX int8"]
    if run["left_out"]:  # Node 20 has no relaxed SIMD.
      assert run["left_out"] == {names.pop(1): "there is no relaxed SIMD"}
      assert run["where"] == "node"
    assert run["versions"]["onnxruntime-web"] == ONNX.partition("@")[2]
    assert run["where"] in run["versions"]
    for part in (run, run["first_result"]):
      assert [*part["engines"]] == names
      assert [*part["ratios"]] == names[1:]
    for engine in run["engines"].values():
      assert len(engine["values"]) == 2 and min(engine["values"]) > 0
      np.testing.assert_allclose(
          engine["per_second"] * engine["median"], work, rtol=1e-6)
  text = web.table(result)
  assert "one image, one thread" in text and text.count("ONNX int8") == len(where)


def test_left_out_engines_are_named():
  times = {"low": 1e-3, "median": 2e-3, "high": 3e-3, "values": [2e-3]}
  engines = {"minw simd128": times | {"per_second": 5e9}}
  text = web.table({
      "config": tiny_config().to_dict(), "rounds": 1,
      "machine": {"cpu": "Some CPU", "cores": 1, "versions": {}}, "runs": [{
          "where": "node", "versions": {"node": "20.1"}, "engines": engines,
          "ratios": {}, "left_out": {"ONNX int8": "it is not there"},
          "first_result": {"engines": engines, "ratios": {}}}]})
  assert "minw simd128       2.000         1.000 - 3.000      5.0" in text
  assert "ONNX int8      left out: it is not there" in text


def test_packed_network_is_the_one_that_is_timed(program, tmp_path):
  web.write_files(program, tmp_path)
  again = packed.from_bytes((tmp_path / "network.minw").read_bytes())
  image = np.frombuffer((tmp_path / "image.bin").read_bytes(), np.uint8)
  np.testing.assert_array_equal(
      np.frombuffer((tmp_path / "logits.bin").read_bytes(), np.float32),
      reference.logits(again, image.reshape(1, 8, 8, 1))[0])
