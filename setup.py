"""Builds the native library, minw/kernels/libminw.so, if there is a C++ compiler.

The library is not a Python module: ctypes and C programs load it. Its kernels are
compiled for several instruction sets, and the library chooses one of them at run time.
The compiler must support GCC's vector extensions. Without such a compiler minw is
installed without the library, and runs packed networks with XLA.

`python setup.py build_wasm` compiles the same sources to minw/web/minw.wasm, the engine
for browsers, with the compiler of the extra `web-build`. The file is committed.
"""

import glob
import os
import platform
import re
import subprocess
import sys

import setuptools
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

_SOURCES = "minw/kernels/csrc"
_FLAGS = ["-std=c++17", "-O3", "-g0", "-fvisibility=hidden", "-Wno-psabi",
          "-ffp-contract=off"]  # Without fused products, results are equal on all CPUs.
_AVX512 = ["-mpopcnt", "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl",
           "-mavx512vpopcntdq", "-mavx512vnni", "-mprefer-vector-width=512"]
_AMX = ["-mamx-tile", "-mamx-int8"]
_X86_FLAGS = {
    "kernels_avx2": ["-mavx2", "-mpopcnt"],
    "kernels_avx512": _AVX512,
    "kernels_vbmi": _AVX512 + ["-mavx512vbmi"],
    "kernels_amx": _AVX512 + _AMX,
}
# A reactor is a module without a main function. With -Os, kernels are not slower, and
# the file is a tenth smaller. Strength reduction of loops would turn the constant
# offsets of loads into additions, which makes lookups slower by a seventh.
_WASM_FLAGS = ["-target", "wasm32-wasi", "-mexec-model=reactor", "-msimd128",
               "-mrelaxed-simd", "-Os", "-mllvm", "-disable-lsr", "-Wl,--strip-all",
               "-Wl,-z,stack-size=131072"]

# The compiled engine looks up bytes by i8x16.relaxed_swizzle, the only instruction of
# relaxed SIMD in it. In the file it is i8x16.swizzle, with an opcode of as many bytes.
# This runs everywhere, and minw.js exchanges it where browsers have relaxed SIMD.
_RELAXED_SWIZZLE, _SWIZZLE = b"\xfd\x80\x02", b"\xfd\x8e\x00"


def _sources(*without: str) -> list[str]:
  """The C++ files of the engine, without some of them."""
  return sorted(set(glob.glob(f"{_SOURCES}/*.cc"))
                - {f"{_SOURCES}/{name}" for name in without})


class BuildLibrary(build_ext):
  """Compiles each source file with its own flags."""

  def get_ext_filename(self, fullname: str) -> str:
    return os.path.join(*fullname.split(".")) + ".so"

  def build_extension(self, ext: setuptools.Extension) -> None:
    x86 = platform.machine() in ("x86_64", "AMD64")
    objects = []
    for source in ext.sources:
      name = os.path.splitext(os.path.basename(source))[0]
      flags = _FLAGS + (_X86_FLAGS.get(name, []) if x86 else [])
      try:
        objects += self._compile(source, ext, flags)
      except CompileError:
        if not set(_AMX) & set(flags):
          raise
        # Compilers before GCC 11 and Clang 11 do not know AMX. Without its flags the
        # file defines no kernels.
        flags = [flag for flag in flags if flag not in _AMX]
        objects += self._compile(source, ext, flags)
    self.compiler.link_shared_object(
        objects, self.get_ext_fullpath(ext.name), libraries=["pthread"],
        target_lang="c++")

  def _compile(self, source: str, ext: setuptools.Extension, flags: list) -> list:
    return self.compiler.compile([source], output_dir=self.build_temp,
                                 extra_postargs=flags, depends=ext.depends)


class BuildWasm(setuptools.Command):
  """Compiles the engine to WebAssembly, with all functions of minw.h as its exports."""

  description = "compile the engine to WebAssembly (needs the extra web-build)"
  user_options = [("output=", "o", "file to write [default: minw/web/minw.wasm]")]

  def initialize_options(self) -> None:
    self.output = "minw/web/minw.wasm"

  def finalize_options(self) -> None:
    pass

  def run(self) -> None:
    with open(f"{_SOURCES}/minw.h") as header:
      names = sorted(set(re.findall(r"\bminw_\w+(?=\()", header.read())))
    os.makedirs(os.path.dirname(self.output) or ".", exist_ok=True)
    subprocess.run(
        [sys.executable, "-m", "ziglang", "c++", *_FLAGS, *_WASM_FLAGS,
         *(f"-Wl,--export={name}" for name in names),
         # There are no threads here, and no other instruction sets. ffi.cc is for XLA.
         *_sources("ffi.cc", "team.cc", "choice.cc"), "-o", self.output], check=True)
    with open(self.output, "r+b") as file:
      code = file.read()
      file.seek(0)
      file.write(code.replace(_RELAXED_SWIZZLE, _SWIZZLE))
    os.chmod(self.output, 0o644)  # It is no program of this system.


setuptools.setup(
    cmdclass={"build_ext": BuildLibrary, "build_wasm": BuildWasm},
    ext_modules=[setuptools.Extension(
        "minw.kernels.libminw",
        # minw.kernels.native compiles ffi.cc, which needs the headers of jaxlib.
        _sources("ffi.cc"),
        optional=True,
        depends=sorted(glob.glob(f"{_SOURCES}/*.h") + glob.glob(f"{_SOURCES}/*.inc")))],
    packages=[*setuptools.find_packages(include=["minw*"]),
              "minw.experiments", "minw.experiments.sweeps"],
    package_dir={"minw.experiments": "experiments"},
    package_data={"minw": ["networks/*", "py.typed", "web/*"],
                  "minw.bench": ["*.mjs"],
                  "minw.kernels": ["csrc/minw.h", "csrc/ffi.cc"]},
)
