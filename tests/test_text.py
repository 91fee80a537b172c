"""minw.text: foreign text as it is printed."""

import sys
import unicodedata

import pytest

from minw import text


@pytest.mark.parametrize("given, wanted", [
    ("", ""), ("a b", "a b"), ("é 数字 😀", "é 数字 😀"), (r"a\nb", r"a\nb"),
    ("a\nb", r"a\nb"), ("\r\t", r"\r\t"), ("\x1b[2J", r"\x1b[2J"),
    ("\0\x7f\x9b", r"\x00\x7f\x9b"),
    ("\u2028\u202e\u200d", r"\u2028\u202e\u200d"), ("\ud800", r"\ud800"),
    ("\U000e0041", r"\U000e0041")])
def test_printable(given, wanted):
  assert text.printable(given) == wanted


def test_printable_of_all_characters():
  """The rest has an encoding, and none of Unicode's control or format characters."""
  whole = "".join(map(chr, range(sys.maxunicode + 1)))
  shown = text.printable(whole)
  shown.encode()
  kinds = {unicodedata.category(c) for c in shown}
  assert not kinds & {"Cc", "Cf", "Cs", "Zl", "Zp"}


@pytest.mark.parametrize("given, wanted", [
    ("a\n", r"'a\n'"), (b"\x1b", r"b'\x1b'"), (["\x1b"], r"['\x1b']"), (None, "None"),
    ("a" * 80, f"'{'a' * 79}..."), ([1] * 40, f"{str([1] * 40)[:80]}...")])
def test_quoted(given, wanted):
  assert text.quoted(given) == wanted


def test_quoted_of_what_is_large():
  assert text.quoted("a" * 10**7) == text.quoted("a" * 80)
  assert text.quoted(10**5000) == "a value of type int"
  deep = []
  for _ in range(10**5):
    deep = [deep]
  assert len(text.quoted(deep)) < 100


def test_shortened():
  assert text.shortened("a\n") == r"a\n"
  assert text.shortened("\n" * 81) == r"\n" * 80 + "..."
