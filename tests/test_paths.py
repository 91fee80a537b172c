"""minw.paths."""

import os
import pathlib

import pytest

from minw import dependencies
from minw import errors
from minw import paths


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  monkeypatch.setenv("HOME", "/home/ada")
  monkeypatch.setenv("DATA", "/data/a b")
  monkeypatch.delenv("NOTHING", raising=False)


@pytest.mark.parametrize("text, path", [
    ("~", "/home/ada"),
    ("~/run", "/home/ada/run"),
    ("~/run/", "/home/ada/run/"),
    ("$DATA/x", "/data/a b/x"),
    ("runs/${DATA}x", "runs//data/a bx"),
    ("a b/größe", "a b/größe"),
    ("../x", "../x"),
    ("x~", "x~"),
    ("./~/x", "./~/x"),
    ("", ""),
    ("5$", "5$"),
    ("$3", "$3"),
])
def test_expand(text, path):
  assert paths.expand(text) == path


def test_expand_takes_path_objects():
  assert paths.expand(pathlib.Path("~/run")) == "/home/ada/run"


@pytest.mark.parametrize("text, message", [
    ("$NOTHING/run", "the environment variable 'NOTHING' is not set"),
    ("run/${NOTHING}", "the environment variable 'NOTHING' is not set"),
    ("~nobody-at-all/run", "'~nobody-at-all' is no user's home directory"),
])
def test_what_cannot_be_expanded_is_refused_unless_it_exists(text, message):
  with pytest.raises(ValueError, match=message.replace("$", r"\$")):
    paths.expand(text)
  os.makedirs(text)
  assert paths.expand(text) == text


@pytest.mark.parametrize("text", [
    "gs://bucket/run", "gs:/bucket/run", "s3://bucket", "https://host/x", "$URL/run"])
def test_a_url_is_not_a_path(text, monkeypatch):
  monkeypatch.setenv("URL", "gs://bucket")
  os.makedirs("gs:/bucket/run")  # Nor if earlier versions of minw have made a folder.
  for read in (paths.expand, paths.matching, paths.several):
    with pytest.raises(ValueError, match="a URL is not a path on this machine"):
      read(text)


@pytest.mark.parametrize("text, path", [
    ("gs://bucket", "gs://bucket"), ("gs://bucket/a//b/", "gs://bucket/a/b"),
    ("$URL/run", "gs://bucket/run")])
def test_gs_is_allowed_where_a_caller_says_so(text, path, monkeypatch):
  monkeypatch.setenv("URL", "gs://bucket")
  monkeypatch.setattr(dependencies, "installed", lambda package: True)
  assert paths.expand(text, remote=True) == path == str(paths.at(text.replace(
      "$URL", "gs://bucket")))
  assert paths.several(f"{text},x", remote=True) == [path, "x"]
  monkeypatch.setattr(dependencies, "installed", lambda package: package != "gcsfs")
  with pytest.raises(ValueError, match=r"pip install 'minw\[gcs\]'"):
    paths.expand(text, remote=True)


@pytest.mark.parametrize("text", ["s3://bucket", "gs:/bucket", "gs://", "gs:///x",
                                  "gs://bucket/../x", "http://host", "gs://Bucket/x",
                                  "gs://-bucket/x", "gs://a b/x"])
def test_no_other_url_is_allowed_anywhere(text, monkeypatch):
  monkeypatch.setattr(dependencies, "installed", lambda package: True)
  with pytest.raises(ValueError, match="gs://BUCKET/NAME"):
    paths.expand(text, remote=True)
  with pytest.raises(errors.UsageError, match=f"^{text}: .*gs://BUCKET/NAME"):
    paths.at(text)


@pytest.mark.parametrize("character", "#*?[]\n")
def test_names_on_gs_are_no_patterns(character, monkeypatch):
  monkeypatch.setattr(dependencies, "installed", lambda package: True)
  with pytest.raises(ValueError, match="must not contain # \\* \\?"):
    paths.expand(f"gs://bucket/a{character}b", remote=True)
  assert paths.expand("gs://bucket/ü b%20\\", remote=True) == "gs://bucket/ü b%20\\"


def test_paths_of_this_machine_are_those_of_pathlib():
  assert paths.at("a/b") == paths.at(pathlib.Path("a/b")) == pathlib.Path("a/b")
  os.makedirs("folder/empty")
  pathlib.Path("folder/file").touch()
  for name in ("folder", "folder/file", "none"):
    assert [f(name) for f in (paths.exists, paths.is_dir, paths.is_file)] == [
        f(name) for f in (os.path.exists, os.path.isdir, os.path.isfile)]


def test_matching():
  for name in ("b.png", "a.png", "a.jpg", "c[1].png", "d/e/f.png"):
    path = pathlib.Path(name)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
  assert paths.matching("*.png") == ["a.png", "b.png", "c[1].png"]
  assert paths.matching("?.jpg") == ["a.jpg"]
  assert paths.matching("c[1].png") == ["c[1].png"]  # It exists as it is.
  assert paths.matching("[ab].png") == ["a.png", "b.png"]
  assert paths.matching("d/**/*.png") == ["d/e/f.png"]
  assert paths.matching("*.gif") == ["*.gif"]


def test_several(monkeypatch):
  for name in ("a.png", "b.png", "a.png,b.png", "c,d"):
    pathlib.Path(name).touch()
  assert paths.several("a.png,x.png") == ["a.png", "x.png"]
  assert paths.several("a.png,b.png") == ["a.png,b.png"]  # One file has this name.
  assert paths.several("?.png,c") == ["a.png", "b.png", "c"]
  assert paths.several("~/a,$DATA/b,") == ["/home/ada/a", "/data/a b/b"]
  monkeypatch.setenv("HOME", os.getcwd())
  assert paths.several("~/c,d") == [os.getcwd() + "/c,d"]
