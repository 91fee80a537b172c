"""minw.data.archives: what is read of tar archives, and what is refused before."""

import io
import tarfile

import pytest

from minw.data import archives


def header(name, size, kind=tarfile.REGTYPE, **fields):
  """A header of an archive, which may claim anything."""
  member = tarfile.TarInfo(name)
  member.size, member.type = size, kind
  for field, value in fields.items():
    setattr(member, field, value)
  return member.tobuf(tarfile.GNU_FORMAT)


def entry(name, content=b"", **fields):
  padding = bytes(-len(content) % 512)
  return header(name, len(content), **fields) + content + padding


def extended(text):
  """An extended header whose text, "keyword=value", applies to the next entry."""
  length = next(n for n in range(len(text), len(text) + 9)
                if n == len(f"{n} {text}\n"))
  record = f"{length} {text}\n".encode()
  return entry("./PaxHeaders/x", record, kind=tarfile.XHDTYPE)


END = bytes(1024)


def found(content, largest=100, most=10, **part):
  file = io.BytesIO(content)
  return [(name, content[start:start + size]) for name, start, size in
          archives.files(file, largest=largest, most=most, **part)]


def refusal(content, **limits):
  with pytest.raises(tarfile.TarError) as error:
    found(content, **limits)
  return str(error.value)


def test_files():
  content = entry("a", b"one") + entry("b/c", b"") + entry("d", bytes(100)) + END
  wanted = [("a", b"one"), ("b/c", b""), ("d", bytes(100))]
  assert found(content) == wanted
  assert found(b"before" + content + b"after", start=6, size=len(content)) == wanted
  assert not found(END)


def test_links_and_devices_are_passed_over():
  content = b"".join(
      entry(f"entry {kind}", kind=kind, linkname="/etc/passwd") for kind in (
          tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE,
          tarfile.FIFOTYPE, tarfile.DIRTYPE))
  assert found(content + entry("a", b"1") + END) == [("a", b"1")]


def test_files_between_which_others_are_read():
  content = entry("a", b"one") + entry("b", b"two") + END
  file, read = io.BytesIO(content), []
  for _, start, size in archives.files(file, largest=100, most=10):
    file.seek(start)
    read.append(file.read(size))
    file.seek(7)
  assert read == [b"one", b"two"]


def test_limits():
  content = entry("a", bytes(100)) + entry("b", bytes(101)) + END
  assert refusal(content) == "b has 101 bytes and may have 100 at most"
  assert len(found(content, largest=101, most=2)) == 2
  assert refusal(content, largest=101, most=1) == "it holds more than 1 entries"
  folders = b"".join(entry("d/", kind=tarfile.DIRTYPE) for _ in range(11))
  assert refusal(folders + END) == "it holds more than 10 entries"


def test_claims_of_headers():
  """None of these sizes is allocated or waited for."""
  huge = 2**33
  assert refusal(header("a", huge)) == f"a has {huge:,} bytes and may have 100 at most"
  assert refusal(header("a", huge), largest=huge) == "a is cut off"
  assert refusal(entry("a", b"1")[:512]) == "a is cut off"
  for kind in (tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.GNUTYPE_LONGNAME,
               tarfile.GNUTYPE_LONGLINK):
    assert "it has a header of 8,589,934,592 bytes" in refusal(header("a", huge, kind))
  assert "may have" in refusal(extended(f"size={huge}") + entry("a", b"1") + END)
  assert "may have" in refusal(extended("size=-1024") + entry("a", b"1") + END)
  assert refusal(extended("size=many") + entry("a", b"1") + END)


def test_negative_sizes():
  """In base 256 a size may be negative; an entry before itself would never end."""
  for kind in (tarfile.REGTYPE, tarfile.DIRTYPE, tarfile.XHDTYPE):
    assert refusal(entry("a") + header("b", -1024, kind) + END)


def test_sparse_files():
  """They expand to as much as they claim."""
  numbers = b"".join(b"%011o\0" % n for n in (0, 1, 2**32, 0))
  block = bytearray(header("a", 1, tarfile.GNUTYPE_SPARSE))
  block[386:386 + 24], block[483:495] = numbers[:24], b"%011o\0" % 2**32
  block[148:156] = b"        "
  block[148:156] = b"%06o\0 " % sum(block)
  assert refusal(bytes(block) + b"1" + bytes(511) + END) == "a is sparse"
  expanded = extended("GNU.sparse.map=0,1") + extended("GNU.sparse.size=4294967296")
  assert refusal(expanded + entry("a", b"1") + END) == "a is sparse"


def test_chains_of_headers():
  """tarfile reads each by a call within a call."""
  chain = 5000 * extended("comment=x") + entry("a", b"1") + END
  assert refusal(chain)


def test_damaged_archives():
  content = entry("a", b"one") + entry("b", b"two") + END
  assert len(content) == 4 * 512 + len(END)
  for damaged in (b"", b"no archive", content[:100], content[:512] + content[700:],
                  b"1234" + content, content[:1100] + b"x" + content[1101:],
                  content[:1024], content[:2048], content[:2100]):
    assert refusal(damaged)


def test_names_in_messages_are_printable():
  assert refusal(entry("a\n\x1b[2J", bytes(101)) + END) == (
      r"a\n\x1b[2J has 101 bytes and may have 100 at most")
