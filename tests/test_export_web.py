"""The format "web": its folder, its page, and its package in npm and bundlers."""

import base64
import gzip
import hashlib
import html.parser
import json
import os
import re
import shutil
import subprocess

import numpy as np
from PIL import Image
import pytest

from minw import errors
from minw import files
from minw import infer
from minw import packed
from minw.data import datasets
from minw.export import web
import node
from packed_networks import floats
from packed_networks import small
from web_pages import write_digits

NAMES = ["index.html", "minw.d.ts", "minw.js", "minw.wasm", "net.minw", "package.json"]
# Versions that were tried. Others could complain about other things.
TYPESCRIPT, VITE = "typescript@7.0.2", "vite@8.3.8"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  """The folder of the digits network."""
  return write_digits(tmp_path_factory.mktemp("web") / "digits")


class Page(html.parser.HTMLParser):
  """The parts of a page that say what it may do.

  Attributes:
    scripts: The text of each inline script that is run.
    data: The JSON that its scripts read.
    policy: The sources that each directive of its policy allows.
    outside: Attributes that name something outside of the page.
  """

  def __init__(self, text):
    super().__init__()
    self.scripts, self.data, self.policy, self.outside = [], None, {}, []
    self._kind = None
    self.feed(text)

  def handle_starttag(self, tag, attributes):
    values = dict(attributes)
    self._kind = values.get("type", "script") if tag == "script" else None
    if values.get("http-equiv") == "Content-Security-Policy":
      directives = (part.split() for part in values["content"].split(";"))
      self.policy = {name: sources for name, *sources in directives}
    self.outside += [(tag, name) for name in ("src", "data", "action")
                     if name in values]
    if tag == "link" and not values["href"].startswith("data:"):
      self.outside.append((tag, "href"))

  def handle_endtag(self, tag):
    self._kind = None

  def handle_data(self, data):
    if self._kind == "script":
      self.scripts.append(data)
    elif self._kind == "application/json":
      self.data = json.loads(data)


def test_folder(folder):
  assert sorted(path.name for path in folder.iterdir()) == NAMES
  assert (folder / "net.minw").read_bytes() == (
      infer.shipped()["digits_convnet"].read_bytes())
  assert (folder / "minw.wasm").read_bytes() == (node.WEB / "minw.wasm").read_bytes()
  assert (folder / "minw.d.ts").read_bytes() == (node.WEB / "minw.d.ts").read_bytes()
  assert [path.name for path in folder.parent.iterdir()] == ["digits"]  # No .part.


def test_page_holds_all_it_needs(folder):
  page = Page((folder / "index.html").read_text())
  assert page.outside == []
  for name, key in (("minw.wasm", "wasm"), ("net.minw", "net")):
    assert unpacked(page.data[key]) == (folder / name).read_bytes()
  assert page.data["name"] == "digits"
  network = infer.load("digits_convnet")
  assert [sample["name"] for sample in page.data["samples"]] == list("0123456789")
  pixels = np.stack([node.array(sample["pixels"], np.uint8, 8, 8, 1)
                     for sample in page.data["samples"]])
  assert [entry.label for entry in network.predict(pixels)] == list("0123456789")


def unpacked(text):
  return gzip.decompress(base64.b64decode(text))


def test_policy_allows_only_the_scripts_of_the_page(folder):
  page = Page((folder / "index.html").read_text())
  start, = page.scripts
  hashes = [base64.b64encode(hashlib.sha256(script).digest()).decode()
            for script in (start.encode(), unpacked(page.data["script"]))]
  assert page.policy["script-src"] == [
      "'wasm-unsafe-eval'", *(f"'sha256-{found}'" for found in hashes)]
  assert page.policy["default-src"] == ["'none'"]
  assert "connect-src" not in page.policy  # The default counts.


def test_script_of_the_page_and_module_are_one_source(folder):
  script = unpacked(Page((folder / "index.html").read_text()).data["script"]).decode()
  assert not re.search(r"\bexport\b|import\.meta", script)
  lines = set(script.splitlines())
  missing = [line for line in (folder / "minw.js").read_text().splitlines()
             if line.removeprefix("export ") not in lines]
  assert missing == ['const WASM = () => new URL("./minw.wasm", import.meta.url);']


def test_size(folder):
  """Most of the folder is the engine, which the page holds a second time."""
  sizes = {path.name: path.stat().st_size for path in folder.iterdir()}
  engine = len(Page((folder / "index.html").read_text()).data["wasm"])
  assert sum(sizes.values()) <= 300_000, sizes
  assert sum(sizes.values()) - sizes["minw.wasm"] - engine <= 105_000, sizes
  packed_sizes = [len(gzip.compress(path.read_bytes())) for path in folder.iterdir()]
  assert sum(packed_sizes) <= 180_000  # So much is sent where a server packs files.


def test_comments_are_removed():
  source = """// A file.

/** Adds. */
export function add(a, b) {
  // A sum.
  return a + b; // "//" in a string stays.
}

/**
 * Two lines.
 */
const url = "https://example.org/**";
"""
  assert web.without_comments(source) == """export function add(a, b) {
  return a + b; // "//" in a string stays.
}
const url = "https://example.org/**";
"""


def test_template_must_hold_the_marks():
  with pytest.raises(ValueError, match="must hold <!-- minw: policy --> once"):
    web.page("<!-- minw: library and data -->", "", "", {})


def test_names_cannot_end_a_script():
  program = small()._replace(metadata={"labels": ["</script>", "b"]})
  name = '</script><script>alert("1")</script>'
  image = np.zeros((4, 3, 1), np.uint8)
  page = Page(web.contents(program, name, {name: image})["index.html"].decode())
  assert page.data["name"] == page.data["samples"][0]["name"] == name
  assert not any("alert" in script for script in page.scripts)


def test_equal_networks_give_equal_folders():
  program = infer.load("digits_convnet").program
  assert web.contents(program, "a", {}) == web.contents(program, "a", {})


def test_own_samples_are_of_the_digits():
  assert web.own_samples(small()) == {}
  found = web.own_samples(infer.load("digits_convnet").program)
  images = np.stack(list(found.values()))
  test, labels = datasets.load("digits", "test", None)
  first = [int(np.argmax(labels == label)) for label in range(10)]
  np.testing.assert_array_equal(images.reshape(10, 8, 8, 1), test[first])


@pytest.mark.parametrize(
    "name", [name for name in sorted(infer.shipped()) if "cifar10" in name])
def test_own_samples_of_cifar_are_recognized(name):
  network = infer.load(name)
  found = web.own_samples(network.program)
  images = np.stack(list(found.values())).reshape(10, 32, 32, 3)
  assert tuple(found) == network.labels
  assert [entry.label for entry in network.predict(images)] == list(found)


def test_command(command, tmp_path):
  for name in ("a", "b"):
    (tmp_path / name).mkdir()
    Image.new("L", (16, 20), 255).save(tmp_path / name / "white.png")
  out = tmp_path / "page"
  result = command("minw.export", "--format=web", "--model=digits_convnet",
                   f"--out={out}", f"--images={tmp_path / 'a'},{tmp_path / 'b'}")
  assert result.code == 0, result.err
  sizes = [f"{path}: {path.stat().st_size} bytes" for path in out.iterdir()]
  assert sorted(result.out.splitlines()) == sorted(sizes)
  page = Page((out / "index.html").read_text())
  assert page.data["name"] == "digits_convnet"
  assert [sample["name"] for sample in page.data["samples"]] == ["white", "white (2)"]
  assert base64.b64decode(page.data["samples"][0]["pixels"]) == b"\xff" * 64


def test_command_into_an_empty_folder(command, tmp_path):
  (tmp_path / "page").mkdir()
  result = command("minw.export", "--format=web", "--model=digits_convnet",
                   f"--out={tmp_path / 'page'}")
  assert result.code == 0, result.err
  assert sorted(path.name for path in (tmp_path / "page").iterdir()) == NAMES


@pytest.mark.parametrize("flags, message", [
    ((), "out=.*: must be a folder that does not exist or is empty"),
    (("--out={new}/none/page",), "out=.* cannot be written: .*No such file"),
    (("--out={new}", "--prefix=a"), "prefix='a': must be left out unless"),
    (("--out={new}", "--batch=2"), "batch=2: must be left out unless"),
    (("--out={new}", "--images={images}"), "images='101 files': must be at most 100"),
    (("--out={new}", "--images={new}"), "images=.*: must be a file or folder"),
])
def test_command_refuses(command, tmp_path, flags, message):
  taken, images, new = tmp_path / "taken", tmp_path / "images", tmp_path / "new"
  taken.mkdir()
  (taken / "notes.txt").write_text("mine")
  images.mkdir()
  for i in range(101):
    (images / f"{i}.png").touch()
  arguments = [flag.format(new=new, images=images) for flag in flags]
  result = command("minw.export", "--format=web", "--model=digits_convnet",
                   *(arguments or [f"--out={taken}"]))
  assert result.code == 2
  assert re.search(message, result.err), result.err
  assert sorted(path.name for path in tmp_path.iterdir()) == ["images", "taken"]
  assert [path.name for path in taken.iterdir()] == ["notes.txt"]


def test_a_full_disk_leaves_nothing(tmp_path, monkeypatch):
  write = files.write

  def fail(path, data):
    if path.name == "net.minw":
      raise OSError(28, "No space left on device")
    write(path, data)

  monkeypatch.setattr(files, "write", fail)
  with pytest.raises(OSError, match="No space left"):
    web.write(tmp_path / "page", web.contents(small(), "small", {}))
  assert list(tmp_path.iterdir()) == []


def test_missing_engine_is_named(tmp_path, monkeypatch):
  monkeypatch.setattr(web, "_SOURCES", tmp_path)
  with pytest.raises(errors.UsageError, match="format='web' needs the engine"):
    web.contents(small(), "small", {})


def test_float_networks_are_exported():
  """The engine runs them, while the other formats could not hold them exactly."""
  program = floats(1, "float16")
  content = web.contents(program, "floats", {})
  assert content["net.minw"] == packed.to_bytes(program)


# The package.


@pytest.fixture
def npm(tmp_path):
  """npm(folder, *arguments): runs npm, with a cache that no other test uses."""
  if not shutil.which("npm"):
    pytest.skip("npm is not installed")
  environment = os.environ | {"npm_config_cache": str(tmp_path / "cache"),
                              "npm_config_update_notifier": "false"}
  return lambda folder, *arguments: node.run(
      "npm", *arguments, "--silent", cwd=folder, env=environment)


@pytest.fixture
def installed(folder, npm, tmp_path):
  """An empty folder in which the package was installed from its tarball."""
  project = tmp_path / "project"
  project.mkdir()
  tarball = npm(folder, "pack", "--pack-destination", tmp_path).strip()
  (project / "package.json").write_text('{"private": true, "type": "module"}')
  npm(project, "install", "--offline", tmp_path / tarball)
  return project


def need_registry():
  try:
    done = subprocess.run(["npm", "ping"], capture_output=True, timeout=60)
  except subprocess.TimeoutExpired:
    pytest.skip("npm's registry does not answer")
  if done.returncode:
    pytest.skip("npm's registry cannot be reached")


PROGRAM = """
import * as minw from "minw";
import { fileURLToPath } from "node:url";
const net = await minw.load(import.meta.resolve("minw/net.minw"));
console.log(JSON.stringify({
  logits: [...net.logits(new Uint8Array(64))],
  labels: net.labels,
}));
"""


@node.needs_node
@pytest.mark.slow
def test_package_installs_from_its_tarball(installed):
  found = sorted(path.name for path in (installed / "node_modules/minw").iterdir())
  assert found == NAMES
  (installed / "main.js").write_text(PROGRAM)
  said = json.loads(node.run("node", "main.js", cwd=installed))
  check_digits(said["logits"])
  assert said["labels"] == list("0123456789")


def check_digits(logits):
  zeros = np.zeros((1, 8, 8, 1), np.uint8)
  np.testing.assert_array_equal(
      np.float32(logits), infer.load("digits_convnet").logits(zeros)[0])


@node.needs_node
@pytest.mark.slow
def test_types(installed, npm):
  need_registry()
  npm(installed, "install", TYPESCRIPT)
  shutil.copy(node.SCRIPTS / "consumer.ts", installed)
  (installed / "tsconfig.json").write_text(json.dumps({
      "compilerOptions": {
          "strict": True, "noEmit": True, "target": "es2022", "module": "nodenext",
          "lib": ["es2022", "dom"], "skipLibCheck": False, "types": []},
      "files": ["consumer.ts"]}))
  node.run("npx", "tsc", cwd=installed)


@node.needs_node
@pytest.mark.slow
def test_vite_build(installed, npm):
  """The bundle finds the engine, which Vite copies beside it."""
  need_registry()
  npm(installed, "install", VITE)
  (installed / "index.html").write_text(
      '<!doctype html><script type="module" src="main.js"></script>')
  (installed / "main.js").write_text(
      'import * as minw from "minw";\n'
      'import net from "minw/net.minw?url";\n'
      "globalThis.ready = minw.load(new URL(net, import.meta.url));\n")
  # Node, which runs the bundle below, has no document for preloading.
  (installed / "vite.config.js").write_text(
      'export default { base: "./", build: { modulePreload: false } };\n')
  node.run("npx", "vite", "build", "--logLevel=warn", cwd=installed)
  assets = installed / "dist/assets"
  engine, = assets.glob("*.wasm")
  assert engine.read_bytes() == (node.WEB / "minw.wasm").read_bytes()
  bundle, = assets.glob("*.js")
  (installed / "run.js").write_text(
      f"await import('./dist/assets/{bundle.name}');\n"
      "const net = await globalThis.ready;\n"
      "console.log(JSON.stringify([...net.logits(new Uint8Array(64))]));\n")
  check_digits(json.loads(node.run("node", "run.js", cwd=installed)))
