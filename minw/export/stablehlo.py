"""Exports a packed network as serialized StableHLO, for `jax.export.deserialize`.

The exported function takes images, uint8 (batch, height, width, channels), by default
of any batch size. It returns int32 labels (batch,) and float32 logits (batch, classes).
The file holds the weights packed. Its `fun_name` holds the metadata as JSON.
"""

import contextlib
import dataclasses
import json
from typing import Any, Iterator

import jax
from jax import export
import jax.numpy as jnp

from minw import packed
from minw.export import common
from minw.kernels import xla

PLATFORMS = ("cpu", "cuda", "tpu")


def serialize(program: packed.Program, batch: int | None = None) -> bytes:
  """Returns the content of the file.

  Args:
    program: The network.
    batch: Number of images that the function takes; any number by default.

  Raises:
    ImportError: flatbuffers is not installed.
    ValueError: The network cannot be exported exactly; the message names the layer.
  """
  common.values(program)
  number = batch or export.symbolic_shape("batch")[0]
  images = jax.ShapeDtypeStruct((number, *program.source_shape), jnp.uint8)
  operands, run = xla.values(program, "portable")

  def network(images):
    logits = run(operands, images)[-1].reshape(-1, program.num_classes)
    return logits.argmax(-1).astype(jnp.int32), logits

  with _no_locations():
    exported = export.export(jax.jit(network), platforms=PLATFORMS)(images)
  exported = dataclasses.replace(
      exported, fun_name=json.dumps(common.metadata(program)))
  return bytes(exported.serialize())


@contextlib.contextmanager
def _no_locations() -> Iterator[None]:
  """Keeps paths of source files out of exports made inside this context.

  By default JAX stores the source file and line of each operation. These would reveal
  to readers of the exported file where minw and the caller's program are installed.
  """
  config: Any = jax.config  # It has an attribute for each option.
  limit = config.jax_traceback_in_locations_limit
  jax.config.update("jax_traceback_in_locations_limit", 0)
  try:
    yield
  finally:
    jax.config.update("jax_traceback_in_locations_limit", limit)
