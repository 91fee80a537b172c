"""Exports a packed network as a folder that is a web page and an npm package.

The folder holds:

  index.html    a page with all it needs inside, which also works as a file
  minw.js       the JavaScript library, an ES module
  minw.d.ts     its types
  minw.wasm     the engine
  net.minw      the network
  package.json  what npm needs

A file cannot load modules or anything else. The page therefore holds the library as a
classic script that is made of the module, and it holds the engine and the network in
base64 of gzip. It makes no request. Its Content-Security-Policy allows only the scripts
whose hashes it names.
"""

import base64
import gzip
import hashlib
import json
import os
import pathlib
import re
import secrets
import shutil
from typing import Mapping, Sequence

import numpy as np

import minw
from minw import errors
from minw import files
from minw import packed

_SOURCES = pathlib.Path(minw.__file__).parent / "web"
_ENGINE = "minw.wasm"
_MAX_SAMPLES = 100
_SAMPLES = {"cifar10": "cifar10.json", "digits": "digits.json"}  # By data set.

# A line of minw.js that a classic script cannot hold, and what stands there instead.
_MODULE_URL = "import.meta.url"
_SCRIPT_URL = "BASE"
_BASE = ("const BASE = globalThis.document?.currentScript?.src"
         " || globalThis.location?.href;\n")

# Marks in the template of the page.
_POLICY_MARK = "<!-- minw: policy -->"
_DATA_MARK = "<!-- minw: library and data -->"

_COMMENTS = re.compile(r"^ *(//.*|/\*\*(.|\n)*?\*/)\n", re.MULTILINE)
_EXPORTS = re.compile(r"^export (?=(?:async )?(?:function|const) (\w+))", re.MULTILINE)
_SCRIPTS = re.compile(r"<script>(.*?)</script>\n?", re.DOTALL)


def check_out(out: str | os.PathLike) -> None:
  """Checks that a folder can be written to `out`.

  Raises:
    errors.UsageError: There is something in its place.
  """
  path = pathlib.Path(out)
  free = not os.path.lexists(path) or path.is_dir() and not any(path.iterdir())
  errors.check(free, "out", str(path), "a folder that does not exist or is empty")


def check_samples(paths: Sequence[pathlib.Path]) -> None:
  """Checks the number of samples, all of which are in the page.

  Raises:
    errors.UsageError: There are too many.
  """
  errors.check(len(paths) <= _MAX_SAMPLES, "images", f"{len(paths)} files",
               f"at most {_MAX_SAMPLES} for a page, which holds all of them")


def contents(
    program: packed.Program, name: str, samples: Mapping[str, np.ndarray]
) -> dict[str, bytes]:
  """Returns the content of each file of the folder.

  Args:
    program: The network.
    name: Name of the network, for the title of the page.
    samples: Images that the page offers, uint8, by their names.

  Raises:
    errors.UsageError: The engine was not built.
  """
  engine_path = _SOURCES / _ENGINE
  if not engine_path.exists():
    raise errors.UsageError(f"format='web' needs the engine {str(engine_path)!r}, which"
                            " does not exist")
  engine, network = engine_path.read_bytes(), packed.to_bytes(program)
  library = _source("minw.js")
  data = {
      "name": name, "wasm": _packed(engine), "net": _packed(network),
      "samples": [{"name": title, "pixels": base64.b64encode(pixels.tobytes()).decode()}
                  for title, pixels in samples.items()]}
  return {
      "index.html": page(
          _source("index.html"), library, _source("start.js"), data).encode(),
      "minw.js": without_comments(library).encode(),
      "minw.d.ts": _source("minw.d.ts").encode(),
      _ENGINE: engine,
      "net.minw": network,
      "package.json": _package().encode(),
  }


def write(path: str | os.PathLike, content: Mapping[str, bytes]) -> None:
  """Writes the folder: all of it appears at once, or nothing does.

  Args:
    path: Path of the folder, which must not exist or be empty. Its parent must exist.
    content: The content of each file.

  Raises:
    OSError: The folder cannot be written.
  """
  path = pathlib.Path(os.path.abspath(path))  # Even "." has a name then.
  part = path.with_name(f"{path.name[:50]}.{secrets.token_hex(8)}.part")
  try:
    part.mkdir()
    for name, data in content.items():
      files.write(part / name, data)
    files.move_folder(part, path)
  except BaseException:
    shutil.rmtree(part, ignore_errors=True)
    raise


def classic(library: str) -> str:
  """Returns minw.js as a classic script that defines the global `minw`.

  The script is the module without the word `export`, in a function that returns what
  was exported. Its default place of the engine is beside the script.

  Args:
    library: The content of minw.js.
  """
  names = ", ".join(_EXPORTS.findall(library))
  body = _EXPORTS.sub("", without_comments(library)).replace(_MODULE_URL, _SCRIPT_URL)
  return (f'var minw = (() => {{\n"use strict";\n{_BASE}{body}\n'
          f"return {{ {names} }};\n}})();\n")


def without_comments(source: str) -> str:
  """Removes comments from JavaScript in which they stand on lines of their own."""
  return re.sub(r"\n\n+", "\n", _COMMENTS.sub("", source)).lstrip("\n")


def page(template: str, library: str, start: str, data: Mapping[str, object]) -> str:
  """Returns the page: the template with its data and its scripts, packed.

  Args:
    template: The content of index.html, which holds the marks of this module. Its
      scripts run after the library, when the document is complete. They find the data
      as JSON in the element with the id "minw-data".
    library: The content of minw.js.
    start: The content of start.js, which unpacks and runs the scripts.
    data: What JSON can hold.

  Raises:
    ValueError: The template lacks a mark.
  """
  for mark in (_POLICY_MARK, _DATA_MARK):
    if template.count(mark) != 1:
      raise ValueError(f"the page must hold {mark} once")
  scripts = "".join(_SCRIPTS.findall(template))
  script = f'"use strict";\n{classic(library)}{without_comments(scripts)}'
  start = without_comments(start)
  # The sequence "</script" in a string would end the element.
  text = json.dumps({**data, "script": _packed(script.encode())}, separators=(",", ":"))
  element = '<script type="application/json" id="minw-data">{}</script>'
  html = _SCRIPTS.sub("", template).replace(_DATA_MARK, (
      element.format(text.replace("<", r"\u003c")) + f"\n<script>{start}</script>"))
  policy = ("default-src 'none'; base-uri 'none'; form-action 'none';"
            f" script-src 'wasm-unsafe-eval' {_source_of(start)}"
            f" {_source_of(script)}; style-src 'unsafe-inline';"
            " img-src data: blob:; media-src blob: mediastream:")
  return html.replace(_POLICY_MARK, (
      f'<meta http-equiv="Content-Security-Policy" content="{policy}">'))


def own_samples(program: packed.Program) -> dict[str, np.ndarray]:
  """Returns the samples that come with minw for the data set of a network.

  Those of the digits are images of the test split. Those of CIFAR-10 are drawings.
  Other data sets have none.

  Args:
    program: The network.

  Returns:
    Images as uint8 of one dimension, by their labels.
  """
  config = program.metadata.get("config") or {}
  file = _SAMPLES.get(str(config.get("dataset")))
  if not file:
    return {}
  images = json.loads(_source(file))["samples"]
  return {label: np.frombuffer(base64.b64decode(pixels), np.uint8)
          for label, pixels in images.items()}


def named_samples(
    paths: Sequence[pathlib.Path], images: np.ndarray
) -> dict[str, np.ndarray]:
  """Returns images by the names of their files, which get a number if they repeat."""
  found = {}
  for path, image in zip(paths, images):
    name, number = path.stem, 1
    while name in found:
      number += 1
      name = f"{path.stem} ({number})"
    found[name] = image
  return found


def _package() -> str:
  """Returns package.json."""
  return json.dumps({
      "name": "minw",
      "version": minw.__version__,
      "description": "A network with weights of 1 to 3 bits, and its engine",
      "license": "Apache-2.0",
      "type": "module",
      "sideEffects": False,
      "engines": {"node": ">=20"},
      "types": "./minw.d.ts",
      "exports": {
          ".": {"types": "./minw.d.ts", "default": "./minw.js"},
          **{f"./{name}": f"./{name}" for name in (
              "minw.wasm", "net.minw", "package.json")}},
  }, indent=2) + "\n"


def _source(name: str) -> str:
  return (_SOURCES / name).read_text("utf-8")


def _packed(content: bytes) -> str:
  """Returns base64 of gzip, without a time, so that equal networks give equal pages."""
  return base64.b64encode(gzip.compress(content, 9, mtime=0)).decode()


def _source_of(script: str) -> str:
  """Returns what allows a script in a policy: its hash."""
  digest = hashlib.sha256(script.encode()).digest()
  return f"'sha256-{base64.b64encode(digest).decode()}'"
