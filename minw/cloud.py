"""Files on Google Cloud Storage, under names such as gs://bucket/run/status.json.

`Path` has those methods of `pathlib.Path` that minw needs. A folder is a common
beginning of the names of objects, so that it exists while it holds an object. A file is
one object, which is written as a whole. Nothing is cached: each method asks the
service, and sees what other processes have written a moment ago.

The packages of `pip install 'minw[gcs]'` are imported when a path is first used. Every
error of theirs is raised as an OSError that names the object.
"""

import contextlib
import errno
import functools
import importlib
import os
import re
import secrets
import threading
from typing import IO, Any, Callable, Iterable, Iterator, NamedTuple

# Seconds for which a request is repeated while the service is not available.
_PATIENCE = 120.0
_TRIES = 5  # Writes of a file that others keep replacing.

_BUCKET = re.compile(r"[a-z0-9][a-z0-9._-]+[a-z0-9]")  # What the service allows.

# Errors by the code of a response. All others become EIO.
_ERRORS = {"401": errno.EACCES, "403": errno.EACCES, "404": errno.ENOENT,
           "412": errno.ESTALE}
_WORDS = {
    errno.EACCES: "Google Cloud Storage denies access with these credentials",
    errno.ENOENT: "there is no such object",
    errno.ESTALE: "another process has written it in the meantime",
    errno.EIO: "Google Cloud Storage cannot be reached or has failed",
}


class Stat(NamedTuple):
  """What is known of an object without reading it.

  Attributes:
    generation: Number that the service changes with each write.
    st_mtime: Time of the last write by the service's clock, in seconds since 1970.
    writer: Name that the last write gave itself, or None.
  """

  generation: int
  st_mtime: float
  writer: str | None


class Listed(NamedTuple):
  """Facts about an object, as a listing of its folder has them.

  Attributes:
    size: Number of bytes.
    generation: Number that the service changes with each write.
    crc32c: Checksum of the content, as the service writes it: Base64 of four bytes.
  """

  size: int
  generation: int
  crc32c: str


class Path:
  """The path of an object or a folder in a bucket."""

  def __init__(self, url: str):
    """Reads a URL gs://BUCKET/NAME, in which repeated slashes count once.

    Raises:
      ValueError: It is not such a URL.
    """
    scheme, _, rest = str(url).partition("://")
    bucket, *parts = rest.split("/")
    if scheme != "gs" or not _BUCKET.fullmatch(bucket) or ".." in parts:
      raise ValueError("must be gs://BUCKET/NAME without '..', and with a BUCKET of"
                       " small letters, digits and . _ -")
    self.bucket = bucket
    self._parts = tuple(part for part in parts if part not in ("", "."))

  def __str__(self) -> str:
    return "/".join(["gs:/", self.bucket, *self._parts])

  def __repr__(self) -> str:
    return f"Path({str(self)!r})"

  def __eq__(self, other: Any) -> bool:
    return isinstance(other, Path) and str(self) == str(other)

  def __hash__(self) -> int:
    return hash(str(self))

  def __truediv__(self, name: str) -> "Path":
    return Path(f"{self}/{name}")

  @property
  def name(self) -> str:
    """Last part of the path."""
    return self._parts[-1] if self._parts else self.bucket

  @property
  def parent(self) -> "Path":
    """The folder of this path. The parent of a bucket is the bucket."""
    return Path("/".join(["gs:/", self.bucket, *self._parts[:-1]]))

  @property
  def key(self) -> str:
    """Name of the object in the bucket."""
    return "/".join(self._parts)

  def with_name(self, name: str) -> "Path":
    """Returns the path of another name in the same folder."""
    return self.parent / name

  def with_suffix(self, suffix: str) -> "Path":
    """Returns the path of a name that ends in `suffix`, such as ".png"."""
    return self.with_name(self.name.rpartition(".")[0] + suffix)

  def is_file(self) -> bool:
    """Returns whether there is an object of this name."""
    return self.find() is not None

  def is_dir(self) -> bool:
    """Returns whether there are objects in this folder."""
    with _os_errors(self):
      return bool(list(self._listed(max_results=1)))

  def exists(self) -> bool:
    """Returns whether this is a file or a folder."""
    return self.is_file() or self.is_dir()

  def find(self) -> Stat | None:
    """Returns what is known of the object, or None if there is none."""
    with _os_errors(self):
      blob = _client().bucket(self.bucket).get_blob(self.key, retry=_retry())
      if blob is None:
        _check_bucket(self.bucket)
        return None
      return Stat(blob.generation, blob.updated.timestamp(),
                  (blob.metadata or {}).get("writer"))

  def stat(self) -> Stat:
    """Returns what is known of the object.

    Raises:
      FileNotFoundError: There is none.
    """
    found = self.find()
    if found is None:
      raise _error(errno.ENOENT, self)
    return found

  def read_bytes(self) -> bytes:
    """Returns the content of the object."""
    return self.read_generation()[0]

  def read_text(self) -> str:
    """Returns the content of the object, which is UTF-8."""
    return self.read_bytes().decode()

  def read_generation(self) -> tuple[bytes, int]:
    """Returns the content of the object and its generation."""
    with _os_errors(self):
      try:
        blob = _client().bucket(self.bucket).blob(self.key)
        return blob.download_as_bytes(retry=_retry()), int(blob.generation)
      except _libraries().api.NotFound:
        _check_bucket(self.bucket)
        raise

  def put(self, content: bytes) -> None:
    """Writes the object, unless another process owns its folder; see `owning`.

    Nothing is lost if two processes write in turn by mistake: each write names the
    generation that it replaces. If that is not the current one, the process checks
    that it still owns the folder before it writes again.

    Raises:
      OSError: With errno.ESTALE, another process owns the folder.
    """
    owns = _owners.get(str(self.parent))
    for _ in range(_TRIES):
      replaced = _generations.get(str(self))
      if replaced is None:
        found = self.find()  # Before the check: its owner may change after it.
        replaced = 0 if found is None else found.generation
        if owns is not None and not owns():
          break
      written = self.replace_generation(content, replaced)
      if written is not None:
        _generations[str(self)] = written
        return
      _generations.pop(str(self), None)
    raise _error(errno.ESTALE, self)

  def replace_generation(
      self, content: bytes, replaced: int, patience: float | None = None
  ) -> int | None:
    """Writes the object if its generation is `replaced`; 0 stands for no object.

    Args:
      content: Content of the object.
      replaced: Generation that is replaced.
      patience: Seconds for which the request is repeated if the service fails, if not
        as usual.

    Returns:
      The new generation, or None if the object has another one.
    """
    writer = secrets.token_hex(8)
    with _os_errors(self):
      blob = _client().bucket(self.bucket).blob(self.key)
      blob.metadata = {"writer": writer}
      try:
        blob.upload_from_string(
            content, "application/octet-stream", if_generation_match=replaced,
            retry=_retry(patience))
        return int(blob.generation)
      except _libraries().api.PreconditionFailed:
        # An earlier try may have arrived although its answer was lost.
        found = self.find()
        return found.generation if found and found.writer == writer else None

  def unlink(self) -> None:
    """Deletes the object."""
    with _os_errors(self):
      _client().bucket(self.bucket).delete_blob(self.key, retry=_retry())
    _generations.pop(str(self), None)

  def mkdir(self, parents: bool = False, exist_ok: bool = False) -> None:
    """Does nothing, because folders need not be made."""

  def iterdir(self) -> Iterator["Path"]:
    """Yields the files and folders in this folder, which need not exist."""
    folder, folders, names = next(self.walk())
    yield from (folder / name for name in sorted([*folders, *names]))

  def walk(self) -> Iterator[tuple["Path", list[str], list[str]]]:
    """Yields (folder, names of folders, names of files), like `pathlib.Path.walk`.

    A caller may remove names of folders, which are then not searched.
    """
    with _os_errors(self):
      listed = self._listed(delimiter="/")
      names = [blob.name.rpartition("/")[2] for blob in listed]
      folders = sorted(prefix.split("/")[-2] for prefix in listed.prefixes)
    yield self, folders, [name for name in names if name]
    for name in folders:
      yield from (self / name).walk()

  def listed(self) -> dict[str, Listed]:
    """Returns the objects in this folder by name, without those in its folders."""
    with _os_errors(self):
      return {blob.name.rpartition("/")[2]: Listed(
          blob.size, int(blob.generation), blob.crc32c)
              for blob in self._listed(delimiter="/") if not blob.name.endswith("/")}

  def download(self, generation: int, file: IO[bytes]) -> None:
    """Writes the content of the object to a file.

    Args:
      generation: Generation of the content.
      file: Open file.

    Raises:
      OSError: With errno.ESTALE, the object has another generation.
    """
    with _os_errors(self):
      blob = _client().bucket(self.bucket).blob(self.key)
      blob.download_to_file(
          file, if_generation_match=generation, checksum=None, raw_download=True,
          retry=_retry())

  def rename(self, target: "Path") -> None:
    """Moves this folder by copying its objects and deleting them then.

    Args:
      target: New path of the folder in the same bucket. It must not exist.
    """
    with _os_errors(self):
      bucket = _client().bucket(self.bucket)
      blobs = list(self._listed())
      for blob in blobs:
        rest = blob.name.removeprefix(self.key)
        with contextlib.suppress(_libraries().api.PreconditionFailed):
          # It is there if the answer to an earlier try was lost.
          bucket.copy_blob(blob, bucket, target.key + rest, if_generation_match=0,
                           retry=_retry())
      _delete(blobs)

  def remove(self, first: str) -> None:
    """Deletes the objects in this folder.

    Args:
      first: Name of the object that is deleted before all others, if it is there.
    """
    with _os_errors(self):
      _delete(sorted(self._listed(), key=lambda blob: blob.name != (self / first).key))

  def _listed(self, **options: Any) -> Any:
    _check_bucket(self.bucket)
    prefix = f"{self.key}/" if self._parts else None
    return _client().list_blobs(self.bucket, prefix=prefix, retry=_retry(), **options)


def _delete(blobs: Iterable[Any]) -> None:
  """Deletes objects, unless they have changed since they were listed."""
  for blob in blobs:
    with contextlib.suppress(_libraries().api.NotFound):
      blob.delete(if_generation_match=blob.generation, retry=_retry())


# Generation of each object that this process wrote last, by path.
_generations: dict[str, int] = {}
# Functions that tell whether this process still owns a folder, by path; see `owning`.
_owners: dict[str, Callable[[], bool]] = {}


@contextlib.contextmanager
def owning(folder: Path, owns: Callable[[], bool]) -> Iterator[None]:
  """Context in which this process owns a folder.

  Args:
    folder: The folder.
    owns: Function that returns whether that is still so. Others own the folder only
      after it would have returned False.
  """
  for path in list(_generations):  # They are those of an earlier owner.
    if Path(path).parent == folder:
      del _generations[path]
  _owners[str(folder)] = owns
  try:
    yield
  finally:
    if _owners.get(str(folder)) is owns:
      del _owners[str(folder)]


def check_owned(folder: Path) -> None:
  """Checks that this process has not lost a folder that it owned; see `owning`.

  Raises:
    OSError: With errno.ESTALE, another process owns the folder.
  """
  owns = _owners.get(str(folder))
  if owns is not None and not owns():
    raise OSError(errno.ESTALE, "another process has taken over", str(folder))


class _Libraries(NamedTuple):
  storage: Any  # google.cloud.storage
  api: Any  # google.api_core.exceptions
  failures: tuple[type[BaseException], ...]  # Errors of the service and the network.


@functools.cache
def _libraries() -> _Libraries:
  """Imports the packages of the extra `gcs`."""
  prepare_orbax()  # gcsfs reads some variables when it is imported.
  load = importlib.import_module
  api = load("google.api_core.exceptions")
  return _Libraries(load("google.cloud.storage"), api, (
      api.GoogleAPIError,
      load("google.auth.exceptions").GoogleAuthError,
      load("google.cloud.storage.exceptions").InvalidResponse,
      load("requests").RequestException,
      load("aiohttp").ClientError,
      load("gcsfs.retry").HttpError))


_local = threading.local()


def _client() -> Any:
  """Returns the client of this thread, because threads cannot share one."""
  if not hasattr(_local, "client"):
    # No request here is about a project.
    _local.client = _libraries().storage.Client(project="none")
  return _local.client


def _retry(patience: float | None = None) -> Any:
  retry = importlib.import_module("google.cloud.storage.retry")
  return retry.DEFAULT_RETRY.with_timeout(_PATIENCE if patience is None else patience)


@functools.cache  # A bucket is checked once.
def _check_bucket(bucket: str) -> None:
  """Raises FileNotFoundError if there is no such bucket."""
  try:
    list(_client().list_blobs(bucket, max_results=1, retry=_retry()))
  except _libraries().api.NotFound as error:
    raise OSError(errno.ENODEV, "there is no such bucket", f"gs://{bucket}") from error


def _error(number: int, path: Any, detail: str = "") -> OSError:
  words = _WORDS[number] + (f" ({detail})" if detail else "")
  return OSError(number, words, str(path))


@contextlib.contextmanager
def _os_errors(path: Path) -> Iterator[None]:
  try:
    yield
  except Exception as error:
    raised = as_os_error(error, path)
    if raised is None or raised is error:
      raise
    raise raised from error


def as_os_error(error: BaseException, path: Any) -> OSError | None:
  """Returns the OSError for an error of the service, the network or the credentials.

  TensorStore and gcsfs report some of these errors in the text of other exceptions.

  Args:
    error: Any error.
    path: Path that the error is about.

  Returns:
    The OSError; `error` itself if it is one with a number; None for other errors.
  """
  if isinstance(error, OSError) and error.errno:
    return error
  if not isinstance(error, (*_libraries().failures, OSError)):
    if not re.search("HTTP response code|gs://.*UNAVAILABLE", str(error)):
      return None
  cause = getattr(error, "cause", None) or error  # That of an error of repeated tries.
  code = getattr(cause, "code", None) or getattr(
      getattr(cause, "response", None), "status_code", None)
  number = _ERRORS.get(str(code), errno.EIO)
  auth = importlib.import_module("google.auth.exceptions")
  text = " ".join(str(cause).split())
  if isinstance(cause, (auth.DefaultCredentialsError, auth.RefreshError)) or (
      re.search("Forbidden|HTTP response code: 40[13]", text)):
    number = errno.EACCES
  return _error(number, path, "" if number == errno.ENOENT else text[:200])


def check_properties(bucket: str) -> None:
  """Checks that Orbax can ask for the properties of a bucket, as it does.

  Raises:
    OSError: It cannot.
  """
  with _os_errors(Path(f"gs://{bucket}")):
    try:
      _client().get_bucket(bucket, retry=_retry())
    except _libraries().api.Forbidden as error:
      raise OSError(
          errno.EACCES, "Orbax needs the permission storage.buckets.get, which"
          " roles/storage.bucketViewer grants", f"gs://{bucket}") from error


def prepare_orbax() -> None:
  """Sets what Orbax needs for gs://, before it is first used with such a path.

  Listings must not be cached, because a cache hides the objects of other processes.
  Orbax's client wants a project, although no request is about one. An emulator of the
  service is found by the same variable as here.
  """
  config = importlib.import_module("fsspec.config")
  config.conf.setdefault("gcs", {})["use_listings_cache"] = False
  os.environ.setdefault("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
  os.environ.setdefault("EPATH_USE_TF", "false")
  os.environ.setdefault("GOOGLE_CLOUD_PROJECT", "none")
  emulator = os.environ.get("STORAGE_EMULATOR_HOST")
  if emulator:
    os.environ.setdefault("TENSORSTORE_GCS_HTTP_URL", emulator)
