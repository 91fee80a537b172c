"""Downloads of large files, which resume where they were interrupted."""

import hashlib
import http.client
import pathlib
import posixpath
from typing import Any
import urllib.error
import urllib.request

import tqdm

from minw import errors

TIMEOUT = 30  # Seconds without a byte, after which a download is given up.


def size_of(part: pathlib.Path) -> int:
  """Returns how many bytes of a download are there."""
  return part.stat().st_size if part.exists() else 0


def download(
    url: str, part: pathlib.Path, *, size: int, sha256: str, bars: bool
) -> None:
  """Downloads a file, or the rest of it, and verifies it.

  Args:
    url: Address of the file.
    part: Path of the download. What an earlier call left there is kept.
    size: Bytes of the file.
    sha256: Checksum of the file.
    bars: Whether a bar shows the progress, where stderr is a terminal.

  Raises:
    errors.UsageError: The download failed, or the checksum is another. After a wrong
      checksum nothing is kept.
    OSError: `part` cannot be written.
  """
  done = size_of(part)
  if done < size:
    _fetch(url, size, part, done, bars)
  with open(part, "rb") as file:
    found = hashlib.file_digest(file, "sha256").hexdigest()
  if found != sha256:
    part.unlink()  # Resuming it would never end well.
    raise errors.UsageError(
        f"{url}: what was downloaded has sha256 {found} and not "
        f"{sha256}; run again, or give an archive with --source=PATH")


def _fetch(url: str, size: int, part: pathlib.Path, done: int, bars: bool) -> None:
  """Appends to `part`, which has `done` bytes, until it has `size` bytes.

  Raises:
    errors.UsageError: The download failed; `part` keeps what arrived.
  """

  def failed(why: Any) -> errors.UsageError:
    return errors.UsageError(
        f"{url}: download failed after {done:,} of {size:,} bytes ({why}); run again "
        "to resume it, or give an archive that you have with --source=PATH")

  headers = {"Range": f"bytes={done}-"} if done else {}
  try:
    response = urllib.request.urlopen(
        urllib.request.Request(url, headers=headers), timeout=TIMEOUT)
  except urllib.error.HTTPError as error:  # An error page, which is open.
    error.close()
    raise failed(error) from error
  except (OSError, http.client.HTTPException) as error:
    raise failed(error) from error
  with response:
    if response.status != 206:  # The server sends all of it.
      done = 0
    with open(part, "ab") as file, tqdm.tqdm(
        total=size, initial=done, desc=posixpath.basename(url), unit="B",
        unit_scale=True, disable=None if bars else True) as progress:
      file.truncate(done)
      while done < size:
        try:
          chunk = response.read1(min(1 << 20, size - done))
        except (OSError, http.client.HTTPException) as error:
          raise failed(error) from error
        if not chunk:
          raise failed("the connection was closed")
        file.write(chunk)
        done += len(chunk)
        progress.update(len(chunk))
