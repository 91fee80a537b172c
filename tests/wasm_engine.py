"""Runs minw/web/minw.wasm by wasmtime, as a browser would run it.

The functions are those of minw.h. Pointers are numbers, and memory is copied.
"""

import functools
import pathlib
import struct
from typing import Any, Sequence

import numpy as np
import pytest

import minw
from minw import packed

MODULE = pathlib.Path(minw.__file__).parent / "web" / "minw.wasm"
SWIZZLE, RELAXED_SWIZZLE = b"\xfd\x8e\x00", b"\xfd\x80\x02"
_SHAPE = struct.Struct("<5I")


def code(relaxed: bool) -> bytes:
  """The module, or the one that minw.js makes of it if there is relaxed SIMD."""
  module = MODULE.read_bytes()
  return module.replace(SWIZZLE, RELAXED_SWIZZLE) if relaxed else module


class Instance:
  """An instance of the module. An error that it throws ends its use.

  Args:
    relaxed: Whether its code is that which minw.js makes if there is relaxed SIMD.
  """

  def __init__(self, relaxed: bool = False):
    wasmtime = pytest.importorskip("wasmtime")
    engine, module = _compiled(relaxed)
    self._store = wasmtime.Store(engine)
    linker = wasmtime.Linker(engine)
    i32, i64 = wasmtime.ValType.i32(), wasmtime.ValType.i64()
    linker.define_func("env", "minw_throw", wasmtime.FuncType([i32, i32], []),
                       self._throw)
    linker.define_func("wasi_snapshot_preview1", "clock_time_get",
                       wasmtime.FuncType([i32, i64, i32], [i32]), lambda *_: 0)
    self._exports = linker.instantiate(self._store, module).exports(self._store)
    self._memory = self._exports["memory"]
    self.call("_initialize")

  def _throw(self, at: int, size: int) -> None:
    raise ValueError(self.read(at, size).decode(errors="replace"))

  def call(self, name: str, *arguments: int) -> Any:
    """Calls an exported function. Raises ValueError with its message if it throws."""
    return self._exports[name](self._store, *arguments)

  def read(self, at: int, size: int) -> bytes:
    at &= 2**32 - 1  # Pointers are read as signed numbers.
    return bytes(self._memory.read(self._store, at, at + size))

  def text(self, at: int) -> str:
    """A text that ends with 0."""
    data = b""
    while b"\0" not in data:
      data += self.read(at + len(data), 16)
    return data[:data.index(b"\0")].decode()

  def put(self, data: bytes) -> int:
    """Copies data to memory of their own, and returns its address."""
    at = self.call("minw_allocate", len(data))
    self._memory.write(self._store, data, at & 2**32 - 1)
    return at

  def size(self) -> int:
    """Bytes of the instance's memory."""
    return self._memory.data_len(self._store)


class Network:
  """A packed network in an instance of its own; see `minw.kernels.native.Network`."""

  def __init__(self, data: bytes, limits: packed.Limits | None = None,
               relaxed: bool = False):
    self.instance = Instance(relaxed)
    at = self.instance.put(data)
    most = self.instance.put(struct.pack("<3Q", *limits)) if limits else 0
    self._network = self.instance.call(
        "minw_load_within", at, len(data), most, 0, 0)
    self.instance.call("minw_release", at)
    self.shape = self._shape("minw_source")[:3]
    self.classes = self.instance.call("minw_classes", self._network)

  def _shape(self, function: str, *arguments: int) -> tuple[int, ...]:
    at = self.instance.put(bytes(_SHAPE.size))
    self.instance.call(function, at, self._network, *arguments)
    shape = _SHAPE.unpack(self.instance.read(at, _SHAPE.size))
    self.instance.call("minw_release", at)
    return shape

  def layers(self) -> list[tuple[str, str]]:
    """Each operation's name and kernel."""
    count = self.instance.call("minw_num_ops", self._network)
    return [tuple(self.instance.text(self.instance.call(name, self._network, i))
                  for name in ("minw_op_name", "minw_op_kernel"))
            for i in range(count)]

  def logits(self, images: np.ndarray) -> np.ndarray:
    """Logits of images, float32 (batch, classes)."""
    batch = len(images)
    at, to = self.instance.put(images.tobytes()), self.instance.put(
        bytes(4 * batch * self.classes))
    failed = self.instance.call(
        "minw_logits", self._network, at, batch, to, 1, 0, 0)
    assert not failed
    data = self.instance.read(to, 4 * batch * self.classes)
    for memory in (at, to):
      self.instance.call("minw_release", memory)
    return np.frombuffer(data, np.float32).reshape(batch, self.classes)

  def values(
      self, images: np.ndarray, wanted: Sequence[int] | None = None
  ) -> list[np.ndarray]:
    """All values, or those wanted; codes and integers are int32."""
    count = self.instance.call("minw_num_ops", self._network) + 1
    wanted = range(count) if wanted is None else wanted
    shapes = [self._shape("minw_value_shape", i) for i in wanted]
    sizes = [4 * len(images) * h * w * c for h, w, c, _, _ in shapes]
    places = [self.instance.put(bytes(size)) for size in sizes]
    pointers = [0] * count
    for i, place in zip(wanted, places):
      pointers[i] = place
    pointers = self.instance.put(struct.pack(f"<{count}i", *pointers))
    at = self.instance.put(images.tobytes())
    failed = self.instance.call(
        "minw_values", self._network, at, len(images), pointers, 0, 0)
    assert not failed
    values = [np.frombuffer(self.instance.read(place, size),
                            np.float32 if shape[3] == 2 else np.int32).reshape(
                                len(images), *shape[:3])
              for place, size, shape in zip(places, sizes, shapes)]
    for memory in (*places, pointers, at):
      self.instance.call("minw_release", memory)
    return values


@functools.cache
def _compiled(relaxed: bool) -> tuple[Any, Any]:
  import wasmtime

  config = wasmtime.Config()
  config.wasm_relaxed_simd = relaxed
  engine = wasmtime.Engine(config)
  return engine, wasmtime.Module(engine, code(relaxed))
