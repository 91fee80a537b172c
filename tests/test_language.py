"""Comments and docstrings are sentences that can be understood alone.

Only what a machine finds is held here: the beginnings of fragments, and a spelling. For
C++ sources, see test_csrc.py.
"""

import ast
import io
import pathlib
import re
import tokenize

import pytest

ROOT = pathlib.Path(__file__).parents[1]
PYTHON = [path for pattern in ("*.py", "minw/**/*.py", "launch/*.py", "docs/*.py",
                               "experiments/**/*.py", "tests/*.py")
          for path in sorted(ROOT.glob(pattern))]
DOCUMENTS = [path for pattern in ("*.md", "docs/**/*.md", "minw/networks/*.md")
             for path in sorted(ROOT.glob(pattern))]
_FRAGMENT = re.compile(r"(Of|Whose|What an?) ")
_SPLIT = re.compile(r"\bcan not\b", re.IGNORECASE)


def blocks(lines):
  """Joins the texts of (line, column, text) that stand below each other."""
  before = None
  found = []
  for line, column, text in lines:
    if before == (line - 1, column):
      found[-1] += f" {text}"
    else:
      found.append(text)
    before = line, column
  return found


def comments(path):
  """All comments of a Python file, those of several lines joined."""
  tokens = tokenize.generate_tokens(io.StringIO(path.read_text()).readline)
  return blocks((*token.start, token.string.lstrip("#: ")) for token in tokens
                if token.type == tokenize.COMMENT)


def docstrings(path):
  """All docstrings of a Python file."""
  for node in ast.walk(ast.parse(path.read_text())):
    if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)):
      yield ast.get_docstring(node) or ""


def fragments(path):
  """Comments and docstrings that begin like a fragment of a sentence."""
  found = [*docstrings(path)]
  if re.search(rf"#[: ]*{_FRAGMENT.pattern}", path.read_text()):  # Reading is slow.
    found += comments(path)
  return [text for text in found if _FRAGMENT.match(text)]


def test_fragments_are_found(tmp_path):
  path = tmp_path / "a.py"
  path.write_text('"""Whose file?"""\nx = 1  # Of two.\n\n# A whole sentence\n'
                  '# Of two lines.\ny = 2\n\ndef f():\n  """What a thing is."""\n')
  assert fragments(path) == ["Whose file?", "What a thing is.", "Of two."]


@pytest.mark.parametrize("path", PYTHON, ids=lambda p: str(p.relative_to(ROOT)))
def test_no_fragments(path):
  assert fragments(path) == []


# The tests of the spelling itself are left out.
@pytest.mark.parametrize(
    "path", [path for path in PYTHON + DOCUMENTS
             if path.name not in ("test_csrc.py", "test_language.py")],
    ids=lambda p: str(p.relative_to(ROOT)))
def test_cannot_is_one_word(path):
  assert not _SPLIT.search(path.read_text())
