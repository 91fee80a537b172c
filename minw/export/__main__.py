"""Export a network to a file that other tools run with the same results.

  python -m minw.export --workdir=DIR --format=FORMAT --out=FILE
  python -m minw.export --model=net.minw --format=web --out=DIR
  python -m minw.export --model=net.minw --golden=DIR [--images=FILES_OR_FOLDERS]

There are five formats:

  c          a C99 and C++11 file, with a header beside it
  stablehlo  for `jax.export` on CPU, GPU and TPU
  onnx       for ONNX Runtime
  qonnx      for FINN and other compilers of quantized networks
  web        a folder with a web page and an npm package, for browsers and Node

--golden writes every intermediate value of the network for a few images. --images names
the images; without it they are random.
"""

import importlib
import math
import pathlib

from absl import flags
import numpy as np

from minw import cli
from minw import errors
from minw import files
from minw import infer
from minw import packed
from minw import paths
from minw.export import c
from minw.export import c_cost
from minw.export import c_text
from minw.export import golden
from minw.export import web

_TEST_BYTES = 2 ** 22  # Bytes of random images.
_FORMATS = ("c", "onnx", "qonnx", "stablehlo", "web")


def content(
    program: packed.Program,
    form: str,
    images: np.ndarray,
    *,
    batch: int | None = None,
    prefix: str = "minw",
) -> bytes:
  """Returns the content of an exported file.

  Args:
    program: The network.
    form: Name of the format: "c", "onnx", "qonnx" or "stablehlo".
    images: Images for the test in a C file, uint8 (batch, *program.source_shape).
    batch: Number of images that the network takes at once; see `--batch`.
    prefix: Beginning of the public names in the C file; see `--prefix`.

  Raises:
    errors.UsageError: The network cannot be exported exactly, or a package is missing.
  """
  try:
    if form == "c":
      return c.source(program, images, prefix).encode()
    if form == "stablehlo":
      stablehlo = importlib.import_module("minw.export.stablehlo")
      return stablehlo.serialize(program, batch)
    graph = importlib.import_module("minw.export.onnx_graph")
    model = graph.model(program, qonnx=form == "qonnx", batch=batch)
    return model.SerializeToString()
  except ImportError as error:
    raise errors.UsageError(
        f"format={form!r} needs a package that is not installed ({error});"
        " pip install 'minw[export]'") from error
  except ValueError as error:
    raise errors.UsageError(f"format={form!r}: {error}") from error


def test_images(
    paths: list[str] | None, program: packed.Program, background: str = "black"
) -> np.ndarray:
  """Returns images for a test of the exported network.

  Args:
    paths: Image files and folders of them, read as `minw.infer` reads them. Without
      paths the images are random: four of them, or fewer if they are large.
    program: The network.
    background: Color behind transparent parts of images.

  Returns:
    uint8 (batch, *program.source_shape).
  """
  shape = program.source_shape
  if not paths:
    count = min(4, max(1, _TEST_BYTES // math.prod(shape)))
    return np.random.default_rng(0).integers(0, 256, (count, *shape), np.uint8)
  return infer.read_images(
      infer.image_files(paths), shape, infer.shrinks(program), background)


def _program(workdir: str | None, model: str | None, which: str) -> packed.Program:
  if (workdir is None) == (model is None):
    raise errors.UsageError("one of --workdir and --model must be given, not both")
  if workdir is None:
    assert model is not None
    errors.check(not flags.FLAGS["checkpoint"].present, "checkpoint", which,
                 "left out with --model, which holds one checkpoint")
    return infer.load_for_command(model, backend="reference").program
  from minw import pack  # It needs the dependencies of training.
  return pack.pack_workdir(workdir, which)


def _check_options(
    form: str | None, out: str | None, batch: int | None, prefix: str | None
) -> None:
  """Checks that the other flags fit the format.

  Raises:
    errors.UsageError: A flag does not fit. The message names the flag, its value and
      what is allowed.
  """
  errors.check(batch is None or form in ("onnx", "qonnx", "stablehlo"), "batch", batch,
               "left out unless --format is onnx, qonnx or stablehlo")
  errors.check(prefix is None or form == "c", "prefix", prefix,
               "left out unless --format is c")
  errors.check(prefix is None or bool(c_text.PREFIX.fullmatch(prefix)), "prefix",
               prefix, f"made of {c_text.ALLOWED_PREFIX}")
  errors.check(form != "c" or not (out or "").endswith(".h"), "out", out,
               "the C file; its header is written beside it")
  if form == "web":
    web.check_out(out or "")


def _name(workdir: str | None, model: str | None) -> str:
  """The network's name: that of the run's folder, or of the file without its ending."""
  if workdir:
    return paths.at(paths.real(workdir)).name
  return pathlib.Path(model or "").stem


def _write_files(
    out: pathlib.Path, program: packed.Program, form: str, images: np.ndarray,
    batch: int | None, prefix: str
) -> None:
  """Writes the file of a format, and the header that belongs to a C file."""
  files = {out: content(program, form, images, batch=batch, prefix=prefix)}
  if form == "c":
    files[out.with_suffix(".h")] = c.header(program, prefix).encode()
  for path, data in files.items():
    _write(path, data)
  if form == "c":
    found = c.footprint(program)
    print(f"constants: {found.constants} bytes, static memory: {found.static} bytes,"
          f" stack: less than {found.stack} bytes")
    layers = c_cost.estimate(c.steps(program, images))
    if layers:
      print(c_cost.report(layers))


def _write(path: pathlib.Path, data: bytes) -> None:
  try:
    files.write(path, data)
  except OSError as error:
    raise errors.UsageError(f"out={str(path)!r} cannot be written: {error}") from error
  print(f"{path}: {len(data)} bytes")


def _write_web(
    out: str, program: packed.Program, name: str, paths: list[str] | None,
    background: str
) -> None:
  """Writes the folder of the format "web"; the images become samples of its page."""
  samples = web.own_samples(program)
  if paths:
    found = list(infer.image_files(paths))
    web.check_samples(found)
    samples = web.named_samples(found, infer.read_images(
        found, program.source_shape, infer.shrinks(program), background))
  content = web.contents(program, name, samples)
  try:
    web.write(out, content)
  except OSError as error:
    raise errors.UsageError(f"out={out!r} cannot be written: {error}") from error
  for file, data in content.items():
    print(f"{pathlib.Path(out) / file}: {len(data)} bytes")


def define_flags() -> None:
  """Defines the flags of the command."""
  cli.DEFINE_path("workdir", None, "Directory of a run.", remote=True)
  cli.DEFINE_path(
      "model", None,
      "Packed network instead of a run: a file, or the name of a network "
      "that comes with minw.")
  flags.DEFINE_enum(
      "checkpoint", "last", ["last", "best"],
      "Checkpoint of --workdir to export: the last one, or the one with the best "
      "validation accuracy.")
  flags.DEFINE_enum("format", None, _FORMATS, "Format of the export.")
  cli.DEFINE_path("out", None, "File to write; for the format web, the folder.")
  flags.DEFINE_integer(
      "batch", None, "Number of images that the exported network takes at once. By"
      " default qonnx takes one, onnx and stablehlo any number; c always takes one.",
      lower_bound=1)
  flags.DEFINE_string(
      "prefix", None, "Beginning of the public names in a C file, such as digits for"
      " digits_run. By default it is made from the name of --model or --workdir.")
  cli.DEFINE_path(
      "golden", None,
      "Folder to write every intermediate value of the network for --images to.")
  cli.DEFINE_paths(
      "images", "Image files, or folders of them, for --golden and for the test in a C "
      "file, random images by default; for the format web, samples of the page.")
  flags.DEFINE_string(
      "background", "black",
      "Color behind transparent parts of images: a name, #rrggbb or R,G,B.")


def main() -> None:
  """Exports a network as the flags say."""
  f = flags.FLAGS
  if (f.format is None) != (f.out is None) or not (f.format or f.golden):
    raise errors.UsageError("--format and --out, or --golden, must be given")
  _check_options(f.format, f.out, f.batch, f.prefix)
  program = _program(f.workdir, f.model, f.checkpoint)
  name = _name(f.workdir, f.model)
  if f.format == "web":
    _write_web(f.out, program, name, f.images, f.background)
  if f.format == "web" and not f.golden:
    return
  images = test_images(f.images, program, f.background)
  if f.format not in (None, "web"):
    prefix = f.prefix or c_text.prefix(name)
    _write_files(pathlib.Path(f.out), program, f.format, images, f.batch, prefix)
  if f.golden:
    try:
      golden.write(f.golden, program, images)
    except (OSError, ValueError) as error:
      raise errors.UsageError(f"golden={f.golden!r}: {error}") from error
    print(f"{f.golden}: {len(program.ops) + 1} values of {len(images)} images")


if __name__ == "__main__":
  cli.run(main, define_flags)
