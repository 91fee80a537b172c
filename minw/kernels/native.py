"""The native backend: the C library beside this file runs packed networks on the CPU.

  network = native.load(data)
  network.logits(images, threads=2)  # NumPy
  native.ffi_logits(data)(images)  # JAX, under jit

The library is optional: `available()` says whether it was built. Only `ffi_logits`
imports JAX. On its first use it compiles the function through which XLA calls the
library.
"""

import ctypes
import functools
import os
import pathlib
from typing import Any, Callable

import numpy as np

from minw import packed
from minw.packed import metadata

LIBRARY = pathlib.Path(__file__).with_name("libminw.so")

_Message = ctypes.c_char * 256  # Buffer for the text of an error.
_KINDS = (np.int32, np.int8, np.float32)  # Dtypes of INT, CODE and FLOAT values.


class _Shape(ctypes.Structure):
  _fields_ = [(name, ctypes.c_uint32)
              for name in ("height", "width", "channels", "kind", "bits")]


class _Limits(ctypes.Structure):
  _fields_ = [(name, ctypes.c_uint64) for name in packed.Limits._fields]


@functools.cache
def _library() -> ctypes.CDLL | None:
  if not LIBRARY.exists():
    return None
  library = ctypes.CDLL(str(LIBRARY))
  pointer, size, text = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_char_p
  op = [pointer, ctypes.c_uint32]
  for name, result, arguments in (
      ("load_within", pointer,
       [pointer, size, ctypes.POINTER(_Limits), text, size]),
      ("free", None, [pointer]),
      ("source", _Shape, [pointer]),
      ("classes", ctypes.c_uint32, [pointer]),
      ("metadata", pointer, [pointer, ctypes.POINTER(size)]),
      ("logits", ctypes.c_int,
       [pointer, pointer, size, pointer, ctypes.c_int, text, size]),
      ("profile", ctypes.c_int,
       [pointer, pointer, size, ctypes.c_int, pointer, text, size]),
      ("num_ops", ctypes.c_uint32, [pointer]),
      ("value_shape", _Shape, op),
      ("op_name", text, op),
      ("op_kernel", text, op),
      ("values", ctypes.c_int, [pointer, pointer, size, pointer, text, size]),
      ("isa", text, [pointer]),
      ("isas", text, []),
      ("peak", ctypes.c_uint64, [*op, ctypes.c_uint64]),
      ("hash", ctypes.c_uint64, [pointer, size])):
    function = getattr(library, "minw_" + name)
    function.restype, function.argtypes = result, arguments
  return library


def available() -> bool:
  """Whether the native library was built."""
  return _library() is not None


def isas() -> list[str]:
  """The instruction sets of this CPU, best first; MINW_ISA forces one of them."""
  return _need().minw_isas().decode().split()


class Network:
  """A packed network in the library. Several threads may use it at once.

  A copy or a pickle is made from the file's bytes, so that each object owns its own
  network in the library.

  Attributes:
    isa: Instruction set of the kernels.
    shape: (height, width, channels) of the images.
    classes: Number of classes.
  """

  def __init__(self, data: bytes, limits: packed.Limits = packed.Limits()):
    """Loads a network. The arguments are those of `load`."""
    self._data, self._limits = data, limits
    self._lib = _need()
    message = _Message()
    self._network = self._lib.minw_load_within(
        data, len(data), _Limits(*limits), message, len(message))
    if not self._network:
      raise ValueError(f"packed network: {message.value.decode(errors='replace')}")
    self.isa = self._lib.minw_isa(self._network).decode()
    source = self._lib.minw_source(self._network)
    self.shape = (source.height, source.width, source.channels)
    self.classes = self._lib.minw_classes(self._network)
    size = ctypes.c_size_t()
    said = self._lib.minw_metadata(self._network, size)
    metadata.decode(ctypes.string_at(said, size.value), self.classes)  # A check.

  def __reduce__(self):
    return type(self), (self._data, self._limits)

  def __del__(self):
    network, self._network = getattr(self, "_network", None), None
    if network:
      self._lib.minw_free(network)

  def logits(self, images: np.ndarray, threads: int = 1) -> np.ndarray:
    """Computes the logits of a batch.

    Args:
      images: uint8 (batch, *shape).
      threads: Number of threads.

    Returns:
      float32 (batch, classes).

    Raises:
      ValueError: The images have another shape or dtype.
      MemoryError: There is not enough memory for the values of the network.
    """
    images = self._checked(images)
    logits = np.empty((len(images), self.classes), np.float32)
    self._call(self._lib.minw_logits, images, _address(logits), threads)
    return logits

  def values(self, images: np.ndarray) -> list[np.ndarray]:
    """Computes every value of the network, with unfused kernels.

    Args:
      images: uint8 (batch, *shape).

    Returns:
      For the image and each operation int32 (INT), int8 (CODE) or float32 (FLOAT)
      (batch, height, width, channels).

    Raises:
      ValueError: The images have another shape or dtype.
      MemoryError: There is not enough memory for the values of the network.
    """
    images = self._checked(images)
    results = [np.empty((len(images), s.height, s.width, s.channels),
                        np.float32 if s.kind == 2 else np.int32)
               for s in self._shapes()]
    pointers = (ctypes.c_void_p * len(results))(*(r.ctypes.data for r in results))
    self._call(self._lib.minw_values, images, pointers)
    return [r.astype(_KINDS[s.kind], copy=False)
            for r, s in zip(results, self._shapes())]

  def profile(self, images: np.ndarray, threads: int = 1) -> list[float]:
    """Measures the time of each operation in a run of a batch.

    Args:
      images: uint8 (batch, *shape).
      threads: Number of threads, which share each layer.

    Returns:
      For each operation the seconds of the pass that begins with it, summed over the
      batch. They are 0 for operations in the pass of a convolution.

    Raises:
      ValueError: The images have another shape or dtype.
      MemoryError: There is not enough memory for the values of the network.
    """
    images = self._checked(images)
    seconds = np.empty(self._lib.minw_num_ops(self._network))
    self._call(self._lib.minw_profile, images, threads, seconds.ctypes.data)
    return seconds.tolist()

  def layers(self) -> list[tuple[str, str]]:
    """Returns each operation's name and the name of the kernel that runs it."""
    return [tuple(f(self._network, i).decode(errors="replace")
                  for f in (self._lib.minw_op_name, self._lib.minw_op_kernel))
            for i in range(self._lib.minw_num_ops(self._network))]

  def peak(self, op: int, steps: int) -> int:
    """Runs steps of an operation's kernel on registers alone.

    Args:
      op: Number of the operation.
      steps: Number of steps.

    Returns:
      The number of products of weights and activations that were summed; 0 if the
      kernel has no such measurement.
    """
    return self._lib.minw_peak(self._network, op, steps)

  def _shapes(self):
    return [self._lib.minw_value_shape(self._network, i)
            for i in range(self._lib.minw_num_ops(self._network) + 1)]

  def _checked(self, images):
    images = np.ascontiguousarray(images)
    if images.dtype != np.uint8 or images.shape[1:] != self.shape:
      raise ValueError(f"images of {images.dtype} {images.shape}: must be uint8"
                       f" (batch, {', '.join(map(str, self.shape))})")
    return images

  def _call(self, function, images, *arguments):
    message = _Message()
    if function(self._network, _address(images), len(images), *arguments, message,
                len(message)):
      raise MemoryError(message.value.decode(errors="replace"))


def _address(array: np.ndarray) -> int:
  """Returns the address of the elements of a contiguous array.

  Reading `array.ctypes.data` takes a microsecond. This is faster, but it is refused for
  arrays that are read-only or empty.
  """
  if array.flags.writeable and array.size:
    return ctypes.addressof(ctypes.c_char.from_buffer(array.data))
  return array.ctypes.data


def load(data: bytes, limits: packed.Limits = packed.Limits()) -> Network:
  """Loads the content of a .minw file.

  Args:
    data: Content of the file.
    limits: Largest memory and work that loading and running the network may take.

  Raises:
    ValueError: The data are not a packed network, are damaged or exceed `limits`, or
      MINW_ISA names an instruction set that does not run here.
    RuntimeError: The library was not built.
  """
  return Network(data, limits)


def ffi_logits(
    data: bytes, threads: int = 1, limits: packed.Limits = packed.Limits()
) -> Callable[[Any], Any]:
  """Returns a network as a JAX function on CPUs, for jit and vmap.

  Args:
    data: Content of a .minw file.
    threads: Number of threads of a call.
    limits: Largest memory and work that loading and running the network may take.

  Returns:
    A function from images, uint8 (..., *shape), to logits, float32 (..., classes).

  Raises:
    ValueError: The network cannot be loaded; see `load`.
    RuntimeError: The library was not built, or no C++ compiler is installed.
  """
  import jax  # Only this function needs it.

  network = load(data, limits)
  _register()
  file = np.frombuffer(data, np.uint8)
  key = np.uint64(_need().minw_hash(data, len(data))).astype(np.int64)

  def logits(images):
    if images.dtype != np.uint8 or images.shape[-3:] != network.shape:
      raise ValueError(f"images of {images.dtype} {images.shape}: must be uint8"
                       f" (..., {', '.join(map(str, network.shape))})")
    result = jax.ShapeDtypeStruct((*images.shape[:-3], network.classes), np.float32)
    call = jax.ffi.ffi_call("minw_logits", result, vmap_method="expand_dims")
    return call(file, images, hash=key, threads=np.int32(threads))

  return logits


@functools.cache
def _register():
  """Compiles the function through which XLA calls the library, and registers it.

  The function is compiled on first use and not at installation. Therefore minw builds
  without jaxlib, and the headers are those of the jaxlib that makes the call.
  """
  import shlex
  import subprocess
  import tempfile

  import jax

  compiler = shlex.split(os.environ.get("CXX", "")) or ["c++"]
  with tempfile.TemporaryDirectory() as folder:
    path = os.path.join(folder, "libminw_ffi.so")
    try:
      subprocess.run(
          [*compiler, "-std=c++17", "-O2", "-fPIC", "-shared", "-fvisibility=hidden",
           "-isystem", jax.ffi.include_dir(), str(LIBRARY.parent / "csrc" / "ffi.cc"),
           str(LIBRARY), "-o", path], check=True, capture_output=True, text=True)
    except OSError as error:
      raise RuntimeError(f"XLA's call needs a C++ compiler ({error})") from error
    except subprocess.CalledProcessError as error:
      raise RuntimeError(f"XLA's call does not compile: {error.stderr}") from error
    handler = ctypes.CDLL(path).MinwLogits  # It stays loaded without the file.
  jax.ffi.register_ffi_target(
      "minw_logits", jax.ffi.pycapsule(handler), platform="cpu")


def _need():
  library = _library()
  if library is None:
    raise RuntimeError("the native library was not built")
  return library
