"""minw.json_files: whatever a file holds, it is read or named in one line."""

import json
import os

import pytest

from minw import errors
from minw import json_files

CONTENTS = {
    "is empty": [b"", b"\0" * 30, b"\n", b" \r\n"],
    "is not JSON": [b"{", b'{"a": 1}x', b"nul", b"[" * 200_000, b"1" * 5000,
                    b'{"a": 1}\n{"a": 1}'],
    "is not a JSON object": [b"null", b"[]", b"5", b'"x"', b"NaN"],
    "is not text in UTF-8": [b'{"a": "\xff"}', b"\x80"],
}


@pytest.mark.parametrize("why, data", [
    (why, data) for why, several in CONTENTS.items() for data in several])
def test_what_is_no_object_is_named(why, data, tmp_path):
  (tmp_path / "a").write_bytes(data)
  with pytest.raises(json_files.Damaged) as error:
    json_files.read_object(tmp_path / "a")
  assert str(error.value).startswith(f"{tmp_path}/a is damaged: it {why}")
  assert isinstance(error.value, errors.UsageError)


@pytest.mark.parametrize("make, why", [
    (os.mkdir, "it is a folder"), (os.mkfifo, "it is not a file"),
    (lambda path: path.symlink_to("/dev/zero"), "it is not a file"),
    (lambda path: path.symlink_to(path), "Too many levels of symbolic links")])
def test_what_is_no_file_is_named(make, why, tmp_path):
  make(tmp_path / "a")
  for read in (json_files.read_object, json_files.read_lines, json_files.read_text):
    with pytest.raises(json_files.Damaged, match=why):
      read(tmp_path / "a")


def test_what_is_missing(tmp_path):
  (tmp_path / "link").symlink_to("nowhere")
  (tmp_path / "file").touch()
  for name in ("a", "link", "a/b", "file/b"):
    assert json_files.read_object(tmp_path / name) is None
    assert json_files.read_lines(tmp_path / name) == []


def test_lines(tmp_path):
  (tmp_path / "a").write_text('{"a": 1}\n{"b": "\u2028"}\r\n{"c": 3')
  assert json_files.read_lines(tmp_path / "a") == [{"a": 1}, {"b": "\u2028"}]
  (tmp_path / "a").write_text('{"a": 1}\n\n{"c": 3}\n')
  with pytest.raises(json_files.Damaged, match="line 2: it is empty"):
    json_files.read_lines(tmp_path / "a")


def test_checks(tmp_path):
  def check(value):
    if value != {"a": 1}:
      raise ValueError("a is not 1")

  (tmp_path / "a").write_text('{"a": 1}\n')
  assert json_files.read_object(tmp_path / "a", check) == {"a": 1}
  assert json_files.read_lines(tmp_path / "a", check) == [{"a": 1}]
  (tmp_path / "a").write_text('{"a": 2}\n')
  for read in (json_files.read_object, json_files.read_lines):
    with pytest.raises(json_files.Damaged, match="a is not 1"):
      read(tmp_path / "a", check)


def test_a_seal_shows_each_change():
  value = {"a": [1, 0.1, None], "b": {"c": "é"}}
  text = json.dumps(json_files.sealed(value))
  json_files.check_sealed(json.loads(text))
  for before, after in (("0.1", "0.2"), ("null", "0"), ("c", "d"), ("1, ", "1, 1, "),
                        ('"crc32"', '"crc33"')):
    with pytest.raises(ValueError, match="the checksum differs"):
      json_files.check_sealed(json.loads(text.replace(before, after, 1)))


@pytest.mark.parametrize("value, count, number", [
    (0, True, True), (3, True, True), (-1, False, True), (0.5, False, True),
    (True, False, False), (None, False, False), ("1", False, False),
    (float("nan"), False, False), (float("inf"), False, False),
    (10**400, True, False), ([], False, False)])
def test_kinds_of_numbers(value, count, number):
  assert json_files.is_count(value) == count
  assert json_files.is_number(value) == number
