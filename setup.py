"""Builds the native library, minw/kernels/libminw.so, if there is a C++ compiler.

The library is not a Python module: ctypes and C programs load it. Its kernels are
compiled for several instruction sets, and the library chooses one of them at run time.
The compiler must support GCC's vector extensions. Without such a compiler minw is
installed without the library, and runs packed networks with XLA.
"""

import glob
import os
import platform

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
    "kernels_amx": _AVX512 + _AMX,
}


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


setuptools.setup(
    cmdclass={"build_ext": BuildLibrary},
    ext_modules=[setuptools.Extension(
        "minw.kernels.libminw",
        # minw.kernels.native compiles ffi.cc, which needs the headers of jaxlib.
        sorted(set(glob.glob(f"{_SOURCES}/*.cc")) - {f"{_SOURCES}/ffi.cc"}),
        optional=True,
        depends=sorted(glob.glob(f"{_SOURCES}/*.h") + glob.glob(f"{_SOURCES}/*.inc")))],
    packages=[*setuptools.find_packages(include=["minw*"]),
              "minw.experiments", "minw.experiments.sweeps"],
    package_dir={"minw.experiments": "experiments"},
    package_data={"minw": ["networks/*", "py.typed"],
                  "minw.kernels": ["csrc/minw.h", "csrc/ffi.cc"]},
)
