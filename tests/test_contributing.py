"""CONTRIBUTING.md and the linters' configuration say what is there."""

import configparser
import pathlib
import re
import tomllib

ROOT = pathlib.Path(__file__).parents[1]
TEXT = (ROOT / "CONTRIBUTING.md").read_text()
# Reads of environment variables in Python and C++, and constants with their names.
_READ = re.compile(
    r"""(?:environ(?:\.get\(|\[)|getenv\(|^_[A-Z]+ = )["'](MINW_[A-Z_]+)["']""",
    re.MULTILINE)


def read_variables():
  """Names of the environment variables that minw, its tests and notebooks read."""
  paths = [path for pattern in ("minw/**/*.py", "minw/**/*.cc", "tests/*.py",
                                "experiments/**/*.py", "experiments/**/*.ipynb")
           for path in ROOT.glob(pattern)]
  return {name for path in paths
          for name in _READ.findall(path.read_text().replace('\\"', '"'))}


def test_variables():
  found = read_variables()
  assert {"MINW_ISA", "MINW_TEST_DATA", "MINW_PARENT"} <= found
  assert found == set(re.findall(r"MINW_[A-Z_]+", TEXT))


def test_files_and_names():
  """Files exist, and the functions and tables that the text names are in them."""
  links = re.findall(r"\]\(([^)#:]+)\)", TEXT)
  for path in links + re.findall(r"`((?:tests|minw)/[\w/]+\.py)`", TEXT):
    assert (ROOT / path).exists(), path
  for path, names in {
      "minw/estimators.py": ("_ESTIMATORS", "ONE_BIT", "PASS_AT_ONE", "def _hard("),
      "minw/models.py": ("NETWORKS",), "minw/infer/__init__.py": ("BACKENDS",),
      "tests/test_estimators.py": (
          "def test_slopes_are_of_the_published_functions", "def calls(")}.items():
    for name in names:
      assert name in (ROOT / path).read_text(), (path, name)
      assert name.removeprefix("def ").rstrip("(") in TEXT


def test_helpers_are_listed():
  helpers = {path.stem for path in (ROOT / "tests").glob("*.py")
             if not path.stem.startswith("test_")} - {"conftest"}
  table = TEXT.split("| modules in `tests` |")[1].split("\n\n")[0].splitlines()[2:]
  assert helpers == {name for line in table
                     for name in re.findall(r"`(\w+)`", line.split("|")[1])}


def test_no_test_file_is_imported():
  """Helpers are in modules of their own; programs in strings count, too."""
  for path in (ROOT / "tests").glob("*.py"):
    assert not re.search(r"\b(?:from|import) +test_", path.read_text()), path


def test_extras_exist():
  config = configparser.ConfigParser()
  config.read(ROOT / "setup.cfg")
  for extras in re.findall(r"pip install -e '\.\[([\w,]+)\]'", TEXT):
    assert set(extras.split(",")) <= set(config["options.extras_require"])


def test_exceptions_from_rules_have_reasons():
  """Each line in ruff's list of ignored rules ends with a comment."""
  text = (ROOT / "pyproject.toml").read_text()
  lines = text.split("\nignore = [\n", 1)[1].split("]\n", 1)[0].splitlines()
  ignored = tomllib.loads(text)["tool"]["ruff"]["lint"]["ignore"]
  assert len(lines) == len(ignored) > 0
  assert all(re.fullmatch(r' *"\w+",  # .+\.', line) for line in lines)
