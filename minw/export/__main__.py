"""A trained or packed network as a file that other tools run, to the same answers:

  python -m minw.export --workdir=DIR --format=FORMAT --out=FILE
  python -m minw.export --model=net.minw --golden=DIR [--images=FILES_OR_FOLDERS]

The formats: c, one C99 file; stablehlo, for `jax.export` on CPU, GPU and TPU; onnx, for
ONNX Runtime; qonnx, for FINN and other compilers of quantized networks. --golden writes
all values of a few images, which --images names; else they are random.
"""

import importlib
import pathlib

from absl import flags
import numpy as np

from minw import cli
from minw import infer
from minw import packed
from minw.export import golden

_MODULES = {"c": "c", "onnx": "onnx_graph", "qonnx": "onnx_graph",
            "stablehlo": "stablehlo"}


def content(
    program: packed.Program, form: str, images: np.ndarray, batch: int | None = None
) -> bytes:
  """The file of a format.

  Args:
    program: the network.
    form: a name of a format.
    images: for the test in the file, where it has one.
    batch: Number of images that the file's network takes at once; see `--batch`.

  Raises:
    cli.UsageError: the network can not be exported exactly, or a package is missing.
  """
  try:
    module = importlib.import_module(f"minw.export.{_MODULES[form]}")
    if form == "c":
      return module.source(program, images).encode()
    if form == "stablehlo":
      return module.serialize(program, batch)
    return module.model(
        program, qonnx=form == "qonnx", batch=batch).SerializeToString()
  except ImportError as error:
    raise cli.UsageError(
        f"format={form!r} needs a package that is not installed ({error});"
        " pip install 'minw[export]'") from error
  except ValueError as error:
    raise cli.UsageError(f"format={form!r}: {error}") from error


def test_images(paths: list[str] | None, program: packed.Program) -> np.ndarray:
  """The images that files hold, as `minw.infer` takes them; else four random ones."""
  shape = program.source_shape
  if not paths:
    return np.random.default_rng(0).integers(0, 256, (4, *shape), np.uint8)
  return infer.read_images(
      infer.image_files(paths), shape, infer.shrinks(program))


def _program(workdir: str | None, model: str | None, which: str) -> packed.Program:
  if (workdir is None) == (model is None):
    raise cli.UsageError("one of --workdir and --model must be given, not both")
  if workdir is None:
    cli.check(not flags.FLAGS["checkpoint"].present, "checkpoint", which,
              "left out with --model, which is of one checkpoint")
    return infer.load_for_command(model, backend="reference").program
  from minw import pack  # It needs what training needs.
  return pack.pack_workdir(workdir, which)


def define_flags() -> None:
  """Defines the flags of the command."""
  flags.DEFINE_string("workdir", None, "Of a run.")
  flags.DEFINE_string("model", None, "A packed network, instead of a run.")
  flags.DEFINE_enum(
      "checkpoint", "last", ["last", "best"], "The last, or of the best validation.")
  flags.DEFINE_enum("format", None, sorted(_MODULES), "Of the file --out.")
  flags.DEFINE_string("out", None, "The file to write.")
  flags.DEFINE_integer(
      "batch", None, "Number of images that the exported network takes at once. By"
      " default qonnx takes one, onnx and stablehlo any number; c always takes one.",
      lower_bound=1)
  flags.DEFINE_string("golden", None, "A folder for the values of --images.")
  flags.DEFINE_list(
      "images", None, "PNG and JPEG files, or folders of them, for --golden and for the"
      " test in a C file; random images if none.")


def main() -> None:
  """Exports a network, as the flags say."""
  f = flags.FLAGS
  if (f.format is None) != (f.out is None) or not (f.format or f.golden):
    raise cli.UsageError("--format and --out, or --golden, must be given")
  cli.check(f.batch is None or f.format not in (None, "c"), "batch", f.batch,
            "left out unless --format is onnx, qonnx or stablehlo")
  program = _program(f.workdir, f.model, f.checkpoint)
  images = test_images(f.images, program)
  if f.format:
    data = content(program, f.format, images, f.batch)
    try:
      pathlib.Path(f.out).write_bytes(data)
    except OSError as error:
      raise cli.UsageError(f"out={f.out!r} can not be written: {error}") from error
    print(f"{f.out}: {len(data)} bytes")
  if f.golden:
    try:
      golden.write(f.golden, program, images)
    except (OSError, ValueError) as error:
      raise cli.UsageError(f"golden={f.golden!r}: {error}") from error
    print(f"{f.golden}: {len(program.ops) + 1} values of {len(images)} images")


if __name__ == "__main__":
  cli.run(main, define_flags)
