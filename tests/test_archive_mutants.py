"""A campaign of damaged archives and pickles: read, or refused in one line.

The variable MINW_ARCHIVE_MUTANTS has the number of each kind; 10000 take some minutes.
"""

import faulthandler
import gzip
import os
import pickle
import random
import resource
import struct
import tarfile

import numpy as np
import pytest

from archives import tar
import cifar_files
import imagenet_files
from minw import errors
from minw.data import cifar
from minw.data import imagenet
from minw.data import unpickle
from python2_pickles import dump
from python2_pickles import pickled

COUNT = int(os.environ.get("MINW_ARCHIVE_MUTANTS", "1000"))
HANG = 300  # Seconds of a mutant, after which all tests end with a traceback.
# Position and size of the fields of a header.
FIELDS = {"name": (0, 100), "mode": (100, 8), "size": (124, 12), "mtime": (136, 12),
          "type": (156, 1), "linkname": (157, 100), "magic": (257, 8),
          "prefix": (345, 155), "sparse": (386, 109)}
VALUES = (b"", b"\xff" * 12, b"\x80" + bytes(10) + b"\1", b"77777777777",
          b"00000000000",
          b"00000001000", b"-1", b"\x80" + b"\x7f" * 11, b"../../etc/passwd", b"/",
          b".",
          b"\xff\xfe", b"a" * 155)
TYPES = b"0\0" + b"1234567LKSxgXVMDN~"
RECORDS = ("size=-512", "size=99999999999", "size=many", "path=../../x", "path=",
           "path=a\0b", "mtime=1e999", "mtime=nan", "uid=-1", "linkpath=/etc/passwd",
           "GNU.sparse.map=0,1", "GNU.sparse.map=a", "GNU.sparse.major=1",
           "GNU.sparse.minor=0", "GNU.sparse.size=99999999999", "hdrcharset=BINARY",
           "GNU.sparse.numblocks=9999999", "GNU.sparse.realsize=99999999")


def with_checksum(header):
  """A header whose checksum is right."""
  header = bytearray(header)
  header[148:156] = b"        "
  header[148:156] = b"%06o\0 " % sum(header)
  return bytes(header)


def headers(content):
  """Where the blocks begin that look as a header does."""
  return [at for at in range(0, len(content) - 511, 512)
          if content[at + 257:at + 262] == b"ustar"]


def damaged(content, rng):
  """An archive with a field, a header, a record or a block changed."""
  data = bytearray(content)
  for _ in range(rng.choice((1, 1, 2, 5))):
    at = rng.choice(headers(data) or [0])
    match rng.randrange(8):
      case 0 | 1 | 2:
        start, size = FIELDS[rng.choice(list(FIELDS))]
        value = rng.choice((*VALUES, rng.randbytes(size)))[:size].ljust(size, b"\0")
        data[at + start:at + start + size] = value
        data[at:at + 512] = with_checksum(data[at:at + 512])
      case 3:
        data[at + 156:at + 157] = rng.choice(TYPES).to_bytes()
        data[at:at + 512] = with_checksum(data[at:at + 512])
      case 4:
        text = rng.choice(RECORDS)
        record = f"{rng.choice((len(text) + 4, 0, 9999))} {text}\n".encode()
        member = tarfile.TarInfo("./PaxHeaders/x")
        member.size, member.type = len(record), rng.choice((b"x", b"g", b"L", b"K"))
        entry = member.tobuf() + record + bytes(-len(record) % 512)
        data[at:at] = entry * rng.choice((1, 1, 2, 100))
      case 5:
        to = rng.randrange(0, len(data), 512)
        data[at:at] = data[to:to + 512 * rng.choice((1, 2, 7))]
      case 6:
        del data[at:at + rng.choice((1, 100, 512, 1024, len(data)))]
      case 7 if data:
        data[rng.randrange(len(data))] = rng.randrange(256)
    if len(data) < 512:
      break
  return bytes(data)


class Outcomes(dict):
  """Counts how mutants ended; only `allowed` errors do not end the test."""

  def count(self, call, allowed):
    faulthandler.dump_traceback_later(HANG, exit=True)
    try:
      call()
      ended = "read"
    except allowed as error:
      ended = "refused"
      assert str(error).isprintable(), str(error)
    finally:
      faulthandler.cancel_dump_traceback_later()
    self[ended] = self.get(ended, 0) + 1


@pytest.fixture
def bounded():
  """Checks that a test took no more than 200 MB, which are less than a bomb."""
  before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
  yield
  assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000


@pytest.mark.slow
@pytest.mark.parametrize("version", ["binary", "python"])
def test_mutants_of_cifar(small, bounded, version, tmp_path):
  """Mutants of the archive, which may be compressed."""
  folder = cifar_files.write_directory(tmp_path / "original", "cifar10", version)
  members = {f"{folder.name}/{path.name}": path.read_bytes()
             for path in sorted(folder.iterdir())}
  original, outcomes = tar(members), Outcomes()
  source = tmp_path / "source.tar"
  for number in range(COUNT):
    rng = random.Random(number)
    content = damaged(original, rng)
    if rng.random() < 0.3:
      content = bytearray(gzip.compress(content, 1))
      if rng.random() < 0.5:
        content[rng.randrange(len(content))] = rng.randrange(256)
        del content[rng.choice((len(content), rng.randrange(len(content)))):]
    source.write_bytes(content)
    outcomes.count(lambda: cifar.read_source("cifar10", source), errors.UsageError)
  assert sum(outcomes.values()) == COUNT and len(outcomes) == 2


@pytest.mark.slow
@pytest.mark.parametrize("name", [imagenet_files.TRAIN, imagenet_files.VAL])
def test_mutants_of_imagenet(bounded, name, tmp_path):
  files = {"n01440764_1.JPEG": imagenet_files.encode(imagenet_files.picture(0, 8, 8)),
           "n01440764_2.JPEG": b"no image"}
  validation = {f"ILSVRC2012_val_{i:08}.JPEG": b"no image" for i in (1, 2, 3)}
  source = imagenet_files.write_archives(
      tmp_path, {"n01440764": files, "n01443537": {"n01443537_1.JPEG": b"1"}},
      validation)
  original, outcomes = (source / name).read_bytes(), Outcomes()

  def read():
    imagenet.check_source(source, partial=True)
    split = "train" if name == imagenet_files.TRAIN else "validation"
    for key, record in imagenet.examples(source, split, []):
      assert key.isascii() and key.isprintable() and "/" not in key
      assert len(record["image"]) < 10_000

  for number in range(COUNT):
    (source / name).write_bytes(damaged(original, random.Random(number)))
    outcomes.count(read, errors.UsageError)
  assert sum(outcomes.values()) == COUNT and len(outcomes) == 2


@pytest.mark.slow
def test_mutants_of_pickles(bounded):
  """Instructions of all protocols, in any order, with arguments that are often huge."""
  codes = [getattr(pickle, name) for name in pickle.__all__
           if isinstance(getattr(pickle, name), bytes) and name.isupper()]
  parts = [*codes, *(struct.pack("<I", n) for n in (0, 1, 2**31 - 1, 2**32 - 1)), b"\1",
           b"numpy\ndtype\n", b"numpy\nndarray\n", b"os\nsystem\n",
           b"numpy.core.multiarray\n_reconstruct\n", dump(b"u1"), dump(b"O"),
           dump((2, 3)), dump([1, 2]), dump(np.zeros((2, 3), np.uint8))]
  original, outcomes = pickled(dump({b"a": np.zeros((2, 3), np.uint8)})), Outcomes()
  for number in range(10 * COUNT):
    rng = random.Random(number)
    if number % 2:
      content = b"\x80\2" + b"".join(rng.choices(parts, k=rng.randrange(30))) + b"."
    else:
      data = bytearray(original)
      for _ in range(rng.choice((1, 2, 4))):
        at = rng.randrange(len(data))
        data[at:at + rng.randrange(3)] = rng.choice((rng.choice(parts),
                                                     rng.randbytes(1)))
      content = bytes(data)
    outcomes.count(lambda: unpickle.loads(content), pickle.UnpicklingError)
  assert sum(outcomes.values()) == 10 * COUNT and len(outcomes) == 2
