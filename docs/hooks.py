"""Hooks of mkdocs: pages from outside docs/, and reference pages made from the code.

The site holds documents that stand elsewhere in the repository, such as RESULTS.md.
Their links, and those of the pages in docs/, are written as GitHub follows them,
relative to the file. The hooks turn them into links between pages of the site.

A comment of the form `<!-- NAME -->` in a page is replaced by text that is made from
the code: the fields of a config, the help of each command, or the list of modules.

The pages of the live demo are exports of networks that come with minw.
"""

import ast
import importlib
import math
import os
import pathlib
import posixpath
import re
import runpy
import sys
import tempfile
from typing import Any, Collection, NoReturn, Sequence

import numpy as np

ROOT = pathlib.Path(__file__).parents[1]

# Files outside docs/ that are in the site, at the same paths.
OUTSIDE = ("CHANGELOG.md", "CODE_OF_CONDUCT.md", "CONTRIBUTING.md", "RESULTS.md",
           "SECURITY.md", "minw/networks/*.md", "results/*.jsonl",
           "results/*/README.md", "results/*/*.png", "results/*/*.json")

# Values of each type that are likely to be refused, for finding out what is allowed.
_BAD_VALUES = {
    int: (-1, 1, 2**40),
    float: (-1.0, math.nan),
    str: ("?",),
    tuple: (("?",), (2.0, 1.0), (-1,)),
}
# The allowed values of fields that other fields or the run decide on.
_ALLOWED = {"data_dir": "a path", "cache_dir": "a path",
            "init_from": "a path, or '' for none", "teacher": "a path, or '' for none",
            "histogram_layers": "a tuple of str",
            "histogram_epochs": "a tuple of int, epochs that end with a validation"}

# Networks of the live demo, by name or by path in docs/, and their titles.
DEMOS = {"digits_convnet": "Handwritten digits, 1 bit",
         "cifar10_convnet_a_quarter_2bit": "CIFAR-10, 2 bits",
         "networks/characters_2bit.minw": "A network of your own: characters, 2 bits"}

_LINK = re.compile(r"\[([^\]]*)\]\(([^)\s]+)\)")


def on_files(files: Any, config: Any) -> Any:
  """Adds the files outside docs/ and the pages of the demo to those of the site."""
  from mkdocs.structure.files import File
  for path in outside():
    files.append(File(path, str(ROOT), config.site_dir, config.use_directory_urls))
  for name in DEMOS:
    files.append(File.generated(
        config, f"demo/{page_of(name)}", content=demo(name)))
  return files


def on_page_markdown(markdown: str, page: Any, files: Any, **_: Any) -> str:
  """The text of a page with its links and generated parts as the site needs them."""
  known = {file.src_uri for file in files}
  markdown = relinked(markdown, page.file.src_uri, known)
  for name, make in GENERATED.items():
    mark = f"<!-- {name} -->"
    if mark in markdown:
      markdown = markdown.replace(mark, make())
  return markdown


def outside() -> list[str]:
  """Paths in the repository of the files outside docs/ that are in the site."""
  return sorted(path.relative_to(ROOT).as_posix()
                for pattern in OUTSIDE for path in ROOT.glob(pattern))


def relinked(markdown: str, page: str, known: Collection[str]) -> str:
  """Turns links between files of the repository into links between pages of the site.

  A link to a file that is not in the site becomes its text.

  Args:
    markdown: Text of a page.
    page: Path of the page in the site.
    known: Paths of all files of the site.
  """
  is_outside = page in outside()
  folder = posixpath.dirname(page if is_outside else f"docs/{page}")

  def relink(match: re.Match) -> str:
    text, target = match.groups()
    path, hash_sign, anchor = target.partition("#")
    if not path or "://" in target:
      return match[0]
    repository = posixpath.normpath(posixpath.join(folder, path))
    if not (ROOT / repository).exists():
      return match[0]
    for place in (repository, f"{repository}/README.md"):
      place = place.removeprefix("docs/")
      if place in known:
        here = posixpath.dirname(page) or "."
        return f"[{text}]({posixpath.relpath(place, here)}{hash_sign}{anchor})"
    return text

  return _LINK.sub(relink, markdown)


def page_of(name: str) -> str:
  """The file name of a network's page in the demo."""
  return f"{pathlib.PurePath(name).stem}.html"


def demo(name: str) -> bytes:
  """The page of a network of the demo, as the export makes it."""
  from minw import infer
  from minw.export import web
  path = ROOT / "docs" / name
  program = infer.load(str(path) if path.exists() else name).program
  samples = characters() if path.exists() else web.own_samples(program)
  return web.contents(program, path.stem, samples)["index.html"]


def characters() -> dict[str, np.ndarray]:
  """Images that the network of the tutorial on own images has never seen."""
  draw = runpy.run_path(str(ROOT / "examples" / "draw_characters.py"))["draw"]
  random = np.random.default_rng(2026)
  return {character: np.asarray(draw(character, 24, random))[..., None]
          for character in "7AKPRSTXYZ"}


def live_demos() -> str:
  """Frames that show the pages of the demo."""
  frames = []
  for name, title in DEMOS.items():
    frames.append(
        f'## {title}\n\n<iframe class="demo" src="{page_of(name)}" title="{title}"'
        ' allow="camera" loading="lazy"></iframe>\n\n'
        f'<a href="{page_of(name)}">Open this page alone</a>\n')
  return "\n".join(frames)


def config_fields() -> str:
  """Tables of all fields of a config: type, default, allowed values, description."""
  from minw import config
  defaults = config.default_config()
  lines = []
  for section, fields in config.FIELDS.items():
    lines += [f"## {section.partition(':')[0]}", "",
              "| field | type | default | allowed | what it is |",
              "|---|---|---|---|---|"]
    for name, (default, text) in fields.items():
      is_bits = name in config.config_fields.BITS
      kind = "int or str" if is_bits else type(default).__name__
      cells = (f"`{name}`", kind, f"`{default!r}`", allowed(name, defaults), text)
      lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    lines.append("")
  return "\n".join(lines)


def config_recipes() -> str:
  """A table of the defaults that differ from data set to data set."""
  from minw import config
  names = ("cifar10", "digits", "imagenet2012")
  recipes = [config.default_config(name) for name in names]
  lines = ["| field | " + " | ".join(names) + " |", "|---" * (len(names) + 1) + "|"]
  for name in recipes[0]:
    values = [repr(recipe[name]) for recipe in recipes]
    if len(set(values)) > 1 and name != "dataset":
      cells = (f"`{text}`" for text in (name, *values))
      lines.append("| " + " | ".join(cells) + " |")
  return "\n".join(lines)


def allowed(name: str, defaults: Any) -> str:
  """The values that a field may hold, in the words of the errors for other values.

  Args:
    name: Name of the field.
    defaults: The default config. Other fields have their default, but operands have 3
      bits, so that they have thresholds.
  """
  from minw import config
  from minw import errors
  if name in _ALLOWED:
    return _ALLOWED[name]
  if isinstance(defaults[name], bool):
    return "True or False"
  kind = str if name in config.config_fields.BITS else type(defaults[name])
  found = {}
  for value in _BAD_VALUES[kind]:
    try:
      config.validate(config.copy(
          defaults, **{"input_bits": 3, "weight_bits": 3, name: value}))
    except errors.UsageError as error:
      if str(error).startswith(f"config.{name}"):
        found[str(error).partition(": must be ")[2]] = None
  return "; ".join(found) or "any"


def commands() -> str:
  """The help of each command, as the command prints it."""
  from minw import __main__ as minw_command
  lines = [["minw"], ["minw-config"]]
  for name, module in minw_command.COMMANDS.items():
    module = importlib.import_module(module)  # It takes seconds, but only once.
    lines += [["minw", name], *(["minw", name, subcommand] for subcommand
                                in getattr(module, "SUBCOMMANDS", ()))]
  lines += [["python", f"launch/{name}.py"]
            for name in ("sweep", "local_multiprocess")]
  return "\n".join(f"### {' '.join(line)}\n\n```text\n{help_of(line)}\n```\n"
                   for line in lines)


def help_of(line: Sequence[str]) -> str:
  """The text of a command's --help, without the table of config fields.

  The command runs in a copy of this process, so that modules are imported only once.

  Args:
    line: The words of the command.
  """
  program, *arguments = line
  with tempfile.TemporaryFile("w+") as output:
    child = os.fork()
    if not child:
      os.dup2(output.fileno(), 1)
      _run_help(program, arguments)
    if os.waitpid(child, 0)[1]:
      raise ValueError(f"{' '.join(line)} --help failed")
    output.seek(0)
    text = output.read()
  return re.sub(r"Fields of --config, .*?(?=Flags of all commands:)", "", text,
                flags=re.DOTALL).strip()


def _run_help(program: str, arguments: Sequence[str]) -> NoReturn:
  """Prints the help of a command and ends this process."""
  code = 1
  try:
    if program == "python":
      os.chdir(ROOT)
      sys.path.insert(0, "launch")
      sys.argv = [arguments[0], "--help"]
      runpy.run_path(arguments[0], run_name="__main__")
    else:
      module = {"minw": "minw.__main__", "minw-config": "minw.c_flags"}[program]
      sys.modules.pop(module, None)  # Or runpy would warn of it.
      sys.argv = [program, *arguments, "--help"]
      runpy.run_module(module, run_name="__main__", alter_sys=True)
    code = 0
  except SystemExit as end:
    code = end.code or 0
  finally:
    sys.stdout.flush()
    os._exit(code)


def modules() -> str:
  """A table for each folder of the package: modules, and first lines of docstrings."""
  tables = {}
  for path in sorted((ROOT / "minw").rglob("*.py")):
    docstring = ast.get_docstring(ast.parse(path.read_text()))
    if docstring and "experiments" not in path.parts:
      folder = path.parent.relative_to(ROOT).as_posix()
      tables.setdefault(folder, []).append((path.name, docstring.partition("\n")[0]))
  lines = []
  for folder, rows in sorted(tables.items()):
    lines += [f"### `{folder}/`", "", "| module | what it is |", "|---|---|",
              *(f"| `{name}` | {text} |" for name, text in rows), ""]
  return "\n".join(lines)


# What replaces a comment of this name.
GENERATED = {"config fields": config_fields, "config recipes": config_recipes,
             "commands": commands, "live demos": live_demos, "modules": modules}
