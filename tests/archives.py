"""Archives of tar, byte by byte, honest or not."""

import tarfile


def header(name: str, size: int) -> bytes:
  """The header of a file, which claims to have this size."""
  member = tarfile.TarInfo(name)
  member.size = size
  return member.tobuf()


def tar(members: dict[str, bytes | int]) -> bytes:
  """An archive of files; those given by a size are empty but claim to have it."""
  content = b""
  for name, data in members.items():
    if isinstance(data, int):
      content += header(name, data)
    else:
      content += header(name, len(data)) + data + bytes(-len(data) % 512)
  return content + bytes(1024)
