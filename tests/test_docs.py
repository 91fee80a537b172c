"""The code of README.md and of docs/ runs, and its links, tables and hooks are right.

Python and C blocks run. Commands are run by the slow test where they need no other data
than the digits; tests/test_commands.py parses all of them by the flags that exist.
"""

import configparser
import importlib.util
import json
import os
import pathlib
import re
import resource
import shutil
import subprocess
import sys

import numpy as np
from PIL import Image
import pytest

from minw import c_flags
from minw import config
from minw import estimators
from minw import infer
from minw import models
from minw import pack
from minw.data import datasets
from minw.export import c
from minw.export import web
from minw.kernels import native
from minw.kernels import reference
import node

ROOT = pathlib.Path(__file__).parents[1]
PAGES = ["README.md", *sorted(path.relative_to(ROOT).as_posix()
                              for path in (ROOT / "docs").rglob("*.md"))]
LANGUAGES = ("python", "sh", "c", "cpp", "js", "text")

# Programs that shell blocks may start.
PROGRAMS = {"arm-none-eabi-gcc", "cc", "gcc", "jupyter", "make", "minw", "mkdocs",
            "npm", "pip", "pytest", "python", "qonnx-cleanup", "qonnx-inference-cost",
            "tfds", "./digits"}

# Replacements that make the Python of a page fast: (text, text in its place).
_SMALL = ("num_epochs = 10 ",
          "num_epochs, c.conv_widths, c.dense_widths = 1, (8, 8), (16,)")
SHORTER = {
    "README.md": _SMALL, "docs/tutorials/digits.md": _SMALL,
    "docs/tutorials/own_network.md": ("conv_widths=(32, 32)", "conv_widths=(16, 16)")}

# Packages that the Python of a page needs beside those of minw[test].
NEEDS = {"docs/howto/export.md": ("flatbuffers", "onnx", "onnxruntime")}

# Pages whose commands need no other data than the digits.
RUNNABLE = ["README.md", "docs/explanation/estimators.md", "docs/howto/export.md",
            "docs/howto/finn.md", "docs/howto/inference.md",
            "docs/howto/microcontroller.md", "docs/howto/web.md", "docs/reference/c.md",
            "docs/reference/networks.md", "docs/tutorials/digits.md"]

# Flags for a short training run.
_SHORT = ("--config.num_epochs=1 '--config.conv_widths=(8, 8)'"
          " '--config.dense_widths=(16,)'")

# How the slow test runs the commands: with this Python, without installing anything,
# without benchmarks, which take minutes, and without firmware. Both have other tests.
_SHELL = """
set -e
PATH={scripts}:$PATH
python() {{ case "$2" in minw.bench*) ;; *) {python} "$@";; esac; }}
minw-config() {{ python -m minw.c_flags "$@"; }}
pip() {{ :; }}
npm() {{ :; }}
pytest() {{ :; }}
make() {{ :; }}
"""


def all_blocks(page):
  """Returns (language, code) of the fenced blocks of a page."""
  return re.findall(r"^```(\w*)\n(.*?)^```$", (ROOT / page).read_text(),
                    re.DOTALL | re.MULTILINE)


def blocks(page, language):
  """Returns the code of a page's blocks of one language."""
  return [code for name, code in all_blocks(page) if name == language]


def with_blocks(language):
  """Returns the pages that have blocks of a language."""
  return [page for page in PAGES if blocks(page, language)]


@pytest.fixture
def place(tmp_path, monkeypatch):
  """The folder that code runs in, with the files that the pages speak of."""
  monkeypatch.chdir(tmp_path)
  monkeypatch.setattr(models, "NETWORKS", dict(models.NETWORKS))  # A page adds to it.
  shutil.copy(infer.shipped()["digits_convnet"], "digits.minw")
  for name in ("zero.png", "one.jpg", "images/zero.png"):
    pathlib.Path(name).parent.mkdir(exist_ok=True)
    Image.new("L", (8, 8)).save(name)
  return tmp_path


@pytest.fixture(scope="module")
def hooks():
  spec = importlib.util.spec_from_file_location("hooks", ROOT / "docs" / "hooks.py")
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


def test_every_block_has_a_language_that_is_tested():
  for page in PAGES:
    text = (ROOT / page).read_text()
    assert {language for language, _ in all_blocks(page)} <= {*LANGUAGES}, page
    assert text.count("```") == 2 * len(all_blocks(page)), page
  assert len(with_blocks("python")) >= 9 and len(with_blocks("sh")) >= 12
  assert {*SHORTER, *NEEDS} <= {*with_blocks("python")}
  assert {*RUNNABLE} <= {*with_blocks("sh")}


@pytest.mark.parametrize("page", [
    pytest.param(page, marks=pytest.mark.slow if page.startswith("docs/tutorials")
                 else ()) for page in with_blocks("python")])
def test_python(page, place):
  """The blocks of a page run in order, as in one program."""
  for package in NEEDS.get(page, ()):
    pytest.importorskip(package)
  if page == "docs/howto/export.md":
    _export(place)
  code = "\n".join(blocks(page, "python"))
  if page in SHORTER:
    long, short = SHORTER[page]
    assert long in code
    code = code.replace(long, short)
  names = {"__name__": "page"}
  exec(code, names)
  _AFTER.get(page, lambda names: None)(names)


def _export(place):
  """Writes the files that the page on exports reads."""
  from minw.export import onnx_graph
  from minw.export import stablehlo
  program = infer.load("digits.minw").program
  (place / "net.bin").write_bytes(stablehlo.serialize(program))
  (place / "net.onnx").write_bytes(onnx_graph.model(program).SerializeToString())


def _trained(names):
  assert names["status"]["state"] == "done"
  assert pathlib.Path("runs", "python", "status.json").exists()


def _own_network(names):
  """Its loop trains a network that is right on most test images once it is packed."""
  assert names["accuracy"] > 0.8
  info = datasets.info("digits")
  program = pack.pack(names["net"], names["variables"], pixels=names["normalization"],
                      source_shape=info.image_shape)
  images, labels = datasets.load("digits", "test", None)
  found = reference.logits(program, images).argmax(-1)
  assert np.mean(found == labels) == names["accuracy"]
  logits = infer.load("net.minw").logits(np.zeros((2, 32, 32, 3), np.uint8))
  assert logits.shape == (2, 10)


def _exported(names):
  expected = infer.load("digits.minw").logits(names["images"])
  np.testing.assert_array_equal(names["logits"], expected)
  np.testing.assert_array_equal(names["labels"], expected.argmax(-1))
  np.testing.assert_array_equal(names["label"], expected.argmax(-1))


# What is checked after the Python of a page has run.
_AFTER = {"README.md": _trained, "docs/tutorials/digits.md": _trained,
          "docs/tutorials/own_network.md": _own_network,
          "docs/howto/export.md": _exported}


@pytest.mark.parametrize("page", with_blocks("c"))
def test_c(page, place):
  """Programs run; statements are compiled as the body of a function."""
  if not shutil.which("cc"):
    pytest.skip("no cc")
  program = infer.load("digits.minw").program
  (place / "digits.h").write_text(c.header(program, "digits"))
  for code in blocks(page, "c"):
    whole = "int main(" in code
    if not whole:
      includes, body = code.split("\n\n", 1)
      code = f"{includes}\nconst char *f(void) {{\n{body}  return label;\n}}\n"
    (place / "program.c").write_text(code)
    flags = "-fsyntax-only"
    if whole:
      if not native.available():
        pytest.skip("the library was not built")
      flags = f"{c_flags.cflags()} {c_flags.libs()} -o program"
    subprocess.run(f"cc -Wall -Werror program.c {flags}", shell=True, check=True)
    if whole:
      done = subprocess.run(["./program", "digits.minw"], check=True, text=True,
                            capture_output=True)
      black = np.zeros((1, *program.source_shape), np.uint8)
      assert done.stdout == f"{infer.Network(program).logits(black).argmax()}\n"


# Stands for the library that the Arduino IDE includes in a sketch.
_ARDUINO = """
struct {
  void begin(long) {}
  void print(const char *) {}
  void println(unsigned long) {}
} Serial;
void delay(unsigned long) {}
unsigned long micros() { return 0; }
"""


@pytest.mark.parametrize("page", with_blocks("cpp"))
def test_sketch(page, place):
  """Arduino sketches are compiled with the header of an exported network."""
  if not shutil.which("c++"):
    pytest.skip("no c++")
  program = infer.load("digits.minw").program
  (place / "digits.h").write_text(c.header(program, "digits"))
  for code in blocks(page, "cpp"):
    (place / "sketch.cc").write_text(_ARDUINO + code)
    subprocess.run("c++ -std=c++11 -Wall -Wextra -Werror -fsyntax-only sketch.cc",
                   shell=True, check=True)


# Follows the JavaScript of a page, which classifies a file; the decoder is replaced.
_JS = """
globalThis.createImageBitmap = async () => ({ ...image, close() {} });
const again = await classify("a file");
console.log(JSON.stringify({ label, scores: [...scores], again: [...again] }));
"""


@node.needs_node
@pytest.mark.parametrize("page", with_blocks("js"))
def test_javascript(page, tmp_path):
  """The blocks of a page run in order, as one module in an exported folder."""
  program = infer.load("digits_convnet").program
  web.write(tmp_path / "page", web.contents(program, "digits", {}))
  (tmp_path / "page/main.mjs").write_text("\n".join(blocks(page, "js")) + _JS)
  said = node.run("node", "main.mjs", cwd=tmp_path / "page").splitlines()
  assert len(said) == 1 + 2 * len(program.ops) + 1  # Values, operations and the last.
  last = json.loads(said[-1])
  Image.fromarray(np.uint8([[0, 9]])).save(tmp_path / "two.png")
  wanted, = infer.load("digits_convnet").predict([tmp_path / "two.png"])
  assert last["label"] == wanted.label
  assert max(last["scores"]) == pytest.approx(wanted.score)
  assert last["again"] == last["scores"]


@pytest.mark.parametrize("page", with_blocks("sh"))
def test_shell_is_understood(page):
  """Bash parses the commands; the programs, extras and files in them exist."""
  extras = configparser.ConfigParser()
  extras.read(ROOT / "setup.cfg")
  for code in blocks(page, "sh"):
    subprocess.run(["bash", "-n"], input=code, text=True, check=True)
    joined = re.sub(r"\\\n", " ", code)
    for command in re.split(r"\n|&&", re.sub(r"\s#\s.*", "", joined)):
      command = re.sub(r"^\s*MINW_\w+=\S+\s", "", command)
      assert not command.strip() or command.split()[0] in PROGRAMS, command
    for names in re.findall(r"\.\[([\w,]+)\]", code):
      for name in names.split(","):
        assert extras.has_option("options.extras_require", name), (page, name)
    for path in re.findall(r"launch/\w+\.\w+|examples/[\w./]+|(?<=-r )\S+", code):
      assert (ROOT / path).exists(), path


@pytest.mark.slow
def test_from_images_to_a_microcontroller(place):
  """The commands of the tutorial run as they are, in less than five minutes."""
  code = "\n".join(blocks("docs/tutorials/own_images.md", "sh"))
  tools = ("arm-none-eabi-gcc", "qemu-system-arm", "make")
  has_tools = all(map(shutil.which, tools))
  script = _SHELL.format(
      python=sys.executable, scripts=pathlib.Path(sys.executable).parent)
  if has_tools:
    script = script.replace("make() { :; }\n", "")
  shutil.copytree(ROOT / "examples", "examples")
  before = resource.getrusage(resource.RUSAGE_CHILDREN)
  done = subprocess.run(
      ["bash", "-c", script + code], text=True, capture_output=True,
      env=os.environ | {"MAKEFLAGS": f"PYTHON={sys.executable}"})
  after = resource.getrusage(resource.RUSAGE_CHILDREN)
  assert done.returncode == 0, done.stderr
  assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 300
  accuracies = [json.loads(line)["accuracy"] for line in done.stdout.splitlines()
                if line.startswith('{"split"')]
  # A guess is right once in 36 times.
  assert len(accuracies) == 2 and accuracies[0] > 0.8 and accuracies[1] > 0.9
  image = f"{place}/characters/A/0000.png"
  predicted, = infer.load("w2a2.minw").predict([image])
  if not has_tools:
    pytest.skip(f"without the firmware: one of {', '.join(tools)} is not installed")
  said = re.findall(r"^(\S+)\t(\w+)\ninstructions (\d+)\nstack (\d+)$", done.stdout,
                    re.MULTILINE)
  assert len(said) == 2 and said[1][:2] == (image, predicted.label)
  assert all(1e6 < int(instructions) < 6e6 and 100 < int(stack) < 1024
             for *_, instructions, stack in said)


@pytest.mark.slow
@pytest.mark.parametrize("page", RUNNABLE)
def test_shell(page, place):
  """The commands of a page run one after the other, on a short training run."""
  if page in NEEDS or page == "docs/howto/finn.md":
    pytest.importorskip("qonnx")
  code = "\n".join(blocks(page, "sh"))
  for compiler in ("arm-none-eabi-gcc", "gcc", "cc"):
    if not shutil.which(compiler):
      code = re.sub(rf"^{compiler} .*\n", "", code, flags=re.MULTILINE)
  code = code.replace("FILES_OR_FOLDERS", "images").replace(
      "minw.main --config=digits_convnet",
      f"minw.main --config=digits_convnet {_SHORT}")
  (place / "docs").mkdir()
  (place / "program.c").write_text("\n".join(blocks("docs/reference/c.md", "c")))
  script = _SHELL.format(
      python=sys.executable, scripts=pathlib.Path(sys.executable).parent) + code
  done = subprocess.run(["bash", "-c", script], text=True, capture_output=True)
  assert done.returncode == 0, done.stderr


def test_readme_is_short():
  assert len((ROOT / "README.md").read_text().splitlines()) <= 150


def anchors(path):
  """The anchors of a page's headings, as GitHub and the site make them."""
  text = re.sub(r"^```.*?^```$", "", path.read_text(), flags=re.DOTALL | re.MULTILINE)
  return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-")
          for heading in re.findall(r"^#+ (.*)$", text, re.MULTILINE)}


@pytest.mark.parametrize("page", PAGES)
def test_links(page):
  """Links lead to files of the repository, as GitHub follows them, and to headings."""
  text = re.sub(r"^```.*?^```$", "", (ROOT / page).read_text(),
                flags=re.DOTALL | re.MULTILINE)
  for target in re.findall(r"\]\(([^)\s]+)\)", text):
    if "://" in target:
      continue
    path, _, anchor = target.partition("#")
    to = (ROOT / page).parent / path if path else ROOT / page
    assert to.exists(), target
    assert not anchor or anchor in anchors(to), target


def test_links_of_the_site(hooks):
  known = {"index.md", "howto/finn.md", "format.md", "SECURITY.md",
           "results/networks/README.md", "RESULTS.md"}
  for page, given, expected in (
      ("howto/finn.md", "[a](../format.md#limits)", "[a](../format.md#limits)"),
      ("howto/finn.md", "[a](../../SECURITY.md)", "[a](../SECURITY.md)"),
      ("howto/finn.md", "see [`fold`](../../minw/fold.py).", "see `fold`."),
      ("howto/finn.md", "[a](#b), [c](https://d.e)", "[a](#b), [c](https://d.e)"),
      ("howto/finn.md", "[a](../../results/networks)",
       "[a](../results/networks/README.md)"),
      ("howto/finn.md", "[a](missing.md)", "[a](missing.md)"),
      ("SECURITY.md", "[a](docs/format.md)", "[a](format.md)"),
      ("results/networks/README.md", "[a](../../RESULTS.md)", "[a](../../RESULTS.md)")):
    assert hooks.relinked(given, page, known) == expected


def test_every_page_is_in_the_navigation(hooks):
  pages = [path.relative_to(ROOT / "docs").as_posix()
           for path in (ROOT / "docs").rglob("*.md")]
  pages += [path for path in hooks.outside() if path.endswith(".md")]
  text = (ROOT / "mkdocs.yml").read_text()
  listed = re.findall(r"^ +- (?:[^:\n]+: )?(\S+\.md)$", text, re.MULTILINE)
  assert sorted(listed) == sorted(pages)


def test_live_demo(hooks):
  """Its frames show the pages that the export makes of networks of three data sets."""
  frames = re.findall(r'<iframe class="demo" src="([^"]*)"', hooks.live_demos())
  names = "digits_convnet", "cifar10_convnet_a_quarter_2bit", "characters_2bit"
  assert frames == [f"{name}.html" for name in names]
  for name in hooks.DEMOS:
    network = infer.load(
        str(ROOT / "docs" / name) if name.endswith(".minw") else name)
    samples = web.own_samples(network.program)
    if name.endswith(".minw"):
      samples = hooks.characters()
      found = [network.labels[i] for i in network.logits(
          np.stack([*samples.values()])).argmax(-1)]
      assert found == [*samples]
    exported = web.contents(network.program, pathlib.PurePath(name).stem, samples)
    assert hooks.demo(name) == exported["index.html"]


def test_config_fields(hooks):
  """The page has each field once, with its default and what is allowed."""
  rows = [line.strip("| ").split(" | ") for line in hooks.config_fields().splitlines()
          if line.startswith("| `")]
  defaults = config.default_config()
  assert sorted(row[0] for row in rows) == sorted(f"`{name}`" for name in defaults)
  cells = {row[0].strip("`"): row[1:] for row in rows}
  for name, (kind, default, allowed, text) in cells.items():
    assert default == f"`{defaults[name]!r}`" and text[-1] == "."
    assert kind == ("int or str" if name in ("input_bits", "weight_bits")
                    else type(defaults[name]).__name__)
    assert allowed != "any", name
  allowed = {name: row[2] for name, row in cells.items()}
  assert allowed["seed"] == "in [0, 2^32)"
  assert allowed["data_workers"] == "at least 0; at most 1024"
  assert allowed["alpha_end"] == "in [0, 1]"
  assert allowed["pad_value"] == "one of 0.0, 1.0, -1.0"
  assert allowed["random_flip"] == "True or False"
  assert allowed["input_thresholds"] == (
      "() or 3 positive, ascending numbers, for bits=3")
  assert allowed["estimator"] == "one of " + ", ".join(estimators.network_estimators())


def test_config_recipes(hooks):
  rows = hooks.config_recipes().splitlines()
  assert rows[0] == "| field | cifar10 | digits | imagenet2012 |"
  assert "| `crop_size` | `24` | `8` | `224` |" in rows
  assert not any("`seed`" in row for row in rows)


def test_help_of_commands():
  """In a process of its own, as the hook copies its process for each command."""
  code = """
import hooks
text = hooks.help_of(["minw", "infer"])
assert text.startswith("usage: minw infer --model=PATH") and "Exit codes: 0" in text
text = hooks.help_of(["minw", "train"])
assert "--workdir=PATH" in text and "learning_rate = " not in text
text = hooks.help_of(["python", "launch/sweep.py"])
assert text.startswith("usage: python launch/sweep.py")
try:
  hooks.help_of(["minw", "nothing"])
except ValueError as error:
  assert str(error) == "minw nothing --help failed"
else:
  raise AssertionError
"""
  subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT / "docs",
                 env={**os.environ, "PYTHONPATH": str(ROOT)})


def test_modules(hooks):
  text = hooks.modules()
  assert "### `minw/kernels/`" in text and "### `minw/infer/`" in text
  assert text.count("| `fold.py` |") == 1


def test_table_of_estimators():
  """Names, bits and the role of alpha are those of the code."""
  text = (ROOT / "docs" / "explanation" / "estimators.md").read_text()
  table = text.partition("| `--config.estimator` |")[2].partition("\n\n")[0]
  rows = re.findall(r"^\| `(\w+)`.*\| ([^|]+) \| [^|]+ \| (1|1-5) \|$", table,
                    re.MULTILINE)
  assert sorted(name for name, *_ in rows) == sorted(estimators.network_estimators())
  for name, annealed, bits in rows:
    assert (bits == "1") == (name in estimators.ONE_BIT), name
    takes = getattr(estimators, name).__code__.co_varnames[:3]
    assert (annealed == "no") == ("alpha" not in takes), name


def test_files_in_the_drawing_of_the_flows_exist():
  text = (ROOT / "docs" / "flows.svg").read_text()
  names = ", ".join(re.findall(r'class="file"[^>]*>([^<]+)<', text)).split(", ")
  assert len(names) >= 13
  for name in {*names} - {"runs/digits/", "digits.minw"}:
    assert list(ROOT.glob(name)) or list((ROOT / "minw").glob(name)), name
