"""minw.data.unpickle: it reads what Python 2 wrote, and survives attacks."""

import pickle
import random
import struct
import subprocess
import sys

import numpy as np
import pytest

from minw.data import unpickle
from python2_pickles import RECONSTRUCT
from python2_pickles import array
from python2_pickles import dtype
from python2_pickles import dump
from python2_pickles import pickled

EIGHT = dump((8,))
UINT8 = dtype(b"u1")
ADDRESS = struct.pack("<Q", 0x4141414141414141)


def test_reads_what_python_2_wrote():
  pixels = np.arange(24, dtype=np.uint8).reshape(4, 6)
  value = {b"data": pixels, b"labels": [0, 7, -1, 2**31 - 1], b"names": (b"a\xff", b""),
           b"more": {b"empty": []}}
  content = pickled(dump(value))
  for read in (unpickle.loads(content), pickle.loads(content, encoding="bytes")):
    np.testing.assert_array_equal(read.pop(b"data"), pixels)
    assert read == {key: value[key] for key in (b"labels", b"names", b"more")}


def test_reads_arrays_by_columns():
  read = unpickle.loads(pickled(array(dump((2, 3)), UINT8, bytes(range(6)), b"\x88")))
  assert read.tolist() == [[0, 2, 4], [1, 3, 5]] and read.dtype == np.uint8


@pytest.mark.parametrize("value", [
    None, True, False, 0, 255, 256, 65536, -1, 2**40, "text", (), (1,), (1, 2),
    (1, 2, 3), (1, 2, 3, 4), [], [1], [1, 2], {}, [[], [[]]], [(True, None)]])
def test_reads_all_plain_values(value):
  assert unpickle.loads(pickle.dumps(value, 2)) == value


def test_reads_shared_objects():
  one = [1]
  read = unpickle.loads(pickle.dumps([one, one, (one,)], 2))
  assert read == [[1], [1], ([1],)] and read[0] is read[1] is read[2][0]


# Each would do harm if it were followed, or has no meaning.
HOSTILE = {
    # Objects whose addresses the file chooses; this one ends NumPy by a signal.
    "objects of raw bytes": array(EIGHT, dtype(b"O"), 8 * ADDRESS),
    "objects by flags": array(EIGHT, dtype(b"V8", b"(K\3U\1|NNNK\x08K\1K\x3ft"),
                              8 * ADDRESS),
    "objects in fields": array(EIGHT, dtype(
        b"V8", b"(K\3U\1|NU\1a\x85}U\1a" + dtype(b"O") + b"K\0\x86sK\x08K\1K\x3ft"),
        8 * ADDRESS),
    "other numbers": array(EIGHT, dtype(b"f8"), bytes(64)),
    "fields": array(EIGHT, dtype(b"u1", b"(K\3U\1|NU\1a\x85}NNK\0t"), bytes(8)),
    "items of another size": array(EIGHT, dtype(b"S100"), bytes(8)),
    "a shape too large": array(dump((9,)), UINT8, bytes(8)),
    "a shape too small": array(dump((7,)), UINT8, bytes(8)),
    "a huge shape": array(dump((2**31 - 1, 2**31 - 1)), UINT8, bytes(8)),
    "a shape that overflows": array(
        b"\x8a\x09" + (2**63).to_bytes(9, "little") + b"\x85", UINT8, b""),
    "a negative shape": array(dump((-1, -8)), UINT8, bytes(8)),
    "no shape": array(dump(()), UINT8, b"1"),
    "a shape of strings": array(dump((b"8",)), UINT8, bytes(8)),
    "a shape of truth": array(b"\x88\x85", UINT8, b"1"),
    "many dimensions": array(b"(" + 100_000 * b"K\1" + b"t", UINT8, b"1"),
    "content that is a list": RECONSTRUCT + b"(K\1" + EIGHT + UINT8 + b"\x89](K\1etb",
    "content that is text": RECONSTRUCT + b"(K\1" + EIGHT + UINT8 + b"\x89" +
                            b"X\x08\0\0\0aaaaaaaatb",
    "an array of no dtype": RECONSTRUCT + b"(K\1" + EIGHT + b"N\x89" + dump(bytes(8)) +
                            b"tb",
    "a state that is short": RECONSTRUCT + b"K\1\x85b",
    "a state that is no tuple": RECONSTRUCT + b"}b",
    "a state of a list": b"]K\1\x85b",
    "a state of a name": b"cnumpy\nndarray\n}b",
    "a state of an array": array(dump((1,)), UINT8, b"1") + b"K\1\x85b",
    "another class of array": b"cnumpy.core.multiarray\n_reconstruct\n"
                              b"cnumpy\ndtype\nK\0\x85U\1b\x87R",
    "a call of a string": b"U\1a)R",
    "a call without arguments": b"cnumpy\ndtype\n)R",
    "a call of a class": b"cnumpy\nndarray\nK\1\x85R",
    "a command": b"cos\nsystem\nU\4true\x85R",
    "a function of NumPy": b"cnumpy\nload\nU\4file\x85R",
    "the new name of NumPy": b"cnumpy._core.multiarray\n_reconstruct\n",
    "a name with an escape": b"cos\x1b[2J\nsystem\n",
    "an instance": b"(U\4truei__builtin__\nobject\n",
    "a new object": b"cnumpy\nndarray\n)\x81",
    "an object in protocol 0": b"(cnumpy\nndarray\no",
    "a persistent id": b"Pid\n",
    "a persistent object": b"K\1Q",
    "an extension": b"\x82\1",
    "a name from the stack": b"\x8c\2os\x8c\6system\x93",
    "a set": b"\x8f",
    "a bytearray": b"\x96" + struct.pack("<Q", 2**40),
    "bytes of a huge size": b"\x8e" + struct.pack("<Q", 2**40),
    "a string of a huge size": b"T\xff\xff\xff\x7f",
    "a string of a negative size": b"T\xff\xff\xff\xff",
    "a number of a huge size": b"\x8b\xff\xff\xff\x7f",
    "a number of many digits": b"L" + 10_000 * b"9" + b"L\n",
    "a huge place in the memo": b"Nr\xff\xff\xff\xff" + b"j\xfe\xff\xff\xff",
    "a place that is empty": b"h\7",
    "a mark without a beginning": b"t",
    "items without a list": b"(K\1e",
    "keys without a value": b"}(U\1au",
    "keys that are lists": b"}(]Nu",
    "keys that are numbers": b"}K\1Ns",
    "an empty stack": b"",
    "pop": b"NN0",
    "duplicate": b"N2",
}

SURVIVES = """
import pickle, resource, sys
from minw.data import unpickle
resource.setrlimit(resource.RLIMIT_AS, (2**30, 2**30))
for content in eval(sys.stdin.read()):
  try:
    print("made", type(unpickle.loads(content)))
  except pickle.UnpicklingError as error:
    print("refused", ascii(str(error)))
"""


def test_hostile_pickles_are_refused():
  """In another process, which a crash would end, with a gigabyte of memory."""
  ended = subprocess.run(
      [sys.executable, "-X", "faulthandler", "-c", SURVIVES], check=False, text=True,
      input=repr([*map(pickled, HOSTILE.values())]), capture_output=True)
  assert (ended.returncode, ended.stderr) == (0, "")
  lines = ended.stdout.splitlines()
  assert len(lines) == len(HOSTILE)
  for name, line in zip(HOSTILE, lines):
    assert line.startswith("refused ") and len(line) > 15, (name, line)
    assert "\x1b" not in line


def test_damaged_pickles_are_refused_or_harmless():
  """A mutant makes plain values or has the one error."""
  plain = (type(None), bool, int, bytes, str, tuple, list, dict, np.ndarray)
  content = pickled(dump({b"labels": [1, 2], b"data": np.zeros((2, 3), np.uint8)}))
  rng = random.Random(0)
  refused = 0
  for _ in range(3000):
    mutant = bytearray(content)
    for _ in range(rng.randint(1, 3)):
      mutant[rng.randrange(len(mutant))] = rng.randrange(256)
    try:
      made = unpickle.loads(bytes(mutant[:rng.choice((None, rng.randrange(1, 200)))]))
      assert type(made) in plain and getattr(made, "dtype", "uint8") == "uint8"
    except pickle.UnpicklingError:
      refused += 1
  assert 1000 < refused < 3000
