"""The networks that come with minw agree with their cards."""

import pathlib
import re

import pytest

import minw
from minw import errors
from minw import evaluate
from minw import infer

FOLDER = pathlib.Path(minw.__file__).parent / "networks"
NAMES = sorted(path.stem for path in FOLDER.glob("*.md"))


def card(name):
  """The rows of its table."""
  return dict(re.findall(r"^\| (\w[^|]*) \| ([^|]+) \|$",
                         (FOLDER / f"{name}.md").read_text(), re.MULTILINE))


def test_each_network_has_a_card():
  assert [*infer.shipped()] == NAMES != []
  assert {"digits_convnet"} <= set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_cards_are_of_their_networks(name):
  program = infer.load(name, backend="reference").program
  rows = card(name)
  assert {"test accuracy", "network", "trained with", "config, seed", "commit",
          "made on", "data", "license of the data"} <= rows.keys()
  config = program.metadata["config"]
  assert rows["config, seed"].endswith(f", {config['seed']}")
  assert not {"data_dir", "data_workers", "init_from"} & config.keys()
  widths = ", ".join(map(str, config["conv_widths"]))
  assert f"3x3 convolutions of {widths} channels" in rows["network"]
  widths = ", ".join(map(str, (*config["dense_widths"], program.num_classes)))
  assert f"dense layers of {widths}" in rows["network"]


@pytest.mark.parametrize("name", NAMES)
def test_the_list_of_networks_says_the_same(name):
  page = (pathlib.Path(__file__).parents[1] / "docs" / "reference" / "networks.md")
  config = infer.load(name, backend="reference").program.metadata["config"]
  bits = f"W{config['weight_bits']}A{config['input_bits']}"
  size = f"{infer.shipped()[name].stat().st_size / 1000:.0f} kB"
  accuracy = card(name)["test accuracy"].split(",")[0]
  assert re.search(rf"^\| `{name}` \| .* \| {bits} "
                   rf"\| {re.escape(accuracy)} \| {size} \|$", page.read_text(),
                   re.MULTILINE)
  assert re.search(rf"\s{size}\.", (FOLDER / f"{name}.md").read_text())


@pytest.mark.parametrize("name", NAMES)
def test_accuracy_is_that_of_the_card(name, request):
  config = infer.load(name, backend="reference").program.metadata["config"]
  data_dir = None
  if config["dataset"] != "digits":
    data_dir = str(request.getfixturevalue("prepared_data")(config["dataset"]))
  result = evaluate.evaluate_model(name, "test", None, data_dir)
  said = card(name)["test accuracy"].split(",")[0]
  assert f"{result['accuracy']:.4f}".lstrip("0") == said


def test_a_file_of_the_same_name_comes_first(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  other = infer.shipped()["digits_convnet"].read_bytes()
  pathlib.Path("digits_convnet").write_bytes(other[:-1])
  with pytest.raises(ValueError):
    infer.load("digits_convnet")


def test_unknown_names_are_refused():
  with pytest.raises(FileNotFoundError, match="comes with minw .*digits_convnet"):
    infer.load("digits_convnets")
  with pytest.raises(errors.UsageError, match="^model='none.minw': neither a file nor"):
    infer.load_for_command("none.minw")
