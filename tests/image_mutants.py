"""Reads hostile images of all formats and reports how that ended.

  python tests/image_mutants.py mutants FIRST COUNT
  python tests/image_mutants.py thin
  python tests/image_mutants.py largest

Mutants are numbered. Most of their damage keeps what a decoder checks first: chunks of
PNG have the right checksum and tags of TIFF their place, so that the code behind these
checks is reached.
"""

import faulthandler
import io
import json
import pathlib
import random
import re
import resource
import struct
import sys
import tempfile
import time
from typing import Iterator
import warnings
import zlib

import numpy as np
from PIL import Image

from minw.data import image_files
from minw.data import images

MEMORY = 3 * 2**30  # Most bytes of address space, which a mutant must not run into.
HANG = 300  # Seconds after which a mutant counts as one that never ends.
NUMBERS = (0, 1, 2, 3, 7, 8, 16, 127, 128, 255, 256, 4095, 9459, 32767, 32768, 65535,
           65536, 2**24, 2**31 - 1, 2**31, 2**32 - 1)


def encoded(image: Image.Image, kind: str, **options) -> tuple[str, bytes]:
  file = io.BytesIO()
  image.save(file, kind, **options)
  return kind, file.getvalue()


def originals() -> list[tuple[str, bytes]]:
  """Small images of each format and of many of its kinds: (format, content)."""
  pixels = np.random.default_rng(0).integers(0, 256, (24, 20, 4), np.uint8)
  rgba = Image.fromarray(pixels).resize((60, 50))
  rgb, gray = rgba.convert("RGB"), rgba.convert("L")
  exif = Image.Exif()
  exif[0x0112], exif[0x010E] = 6, "a description"
  deep = Image.fromarray(pixels[..., 0].astype(np.uint16) * 257)
  palette = rgb.quantize(16)
  frames = {"save_all": True, "append_images": [rgb.rotate(90)]}
  return [
      *(encoded(image, "png", exif=exif, icc_profile=bytes(500)) for image in (
          rgba, rgb, gray, palette, deep, rgb.convert("1"), rgba.convert("LA"))),
      encoded(palette, "png", transparency=3), encoded(gray, "png", transparency=9),
      encoded(rgb, "png", **frames),
      encoded(rgb, "jpeg", exif=exif), encoded(gray, "jpeg", icc_profile=bytes(500)),
      encoded(rgb, "jpeg", progressive=True), encoded(rgb.convert("CMYK"), "jpeg"),
      encoded(rgb, "jpeg", subsampling=0, restart_marker_blocks=1),
      encoded(rgb, "webp", exif=exif), encoded(rgba, "webp", lossless=True),
      encoded(rgba, "webp"), encoded(rgb, "webp", **frames),
      *(encoded(image, "bmp") for image in (rgba, rgb, gray, palette,
                                            rgb.convert("1"))),
      encoded(palette, "gif"), encoded(palette, "gif", transparency=3, interlace=1),
      encoded(gray, "gif", comment=b"a comment"), encoded(palette, "gif", **frames),
      *(encoded(rgb, "tiff", compression=name) for name in (
          None, "tiff_lzw", "tiff_adobe_deflate", "packbits", "jpeg")),
      *(encoded(image, "tiff", exif=exif) for image in (rgba, gray, deep, palette)),
      encoded(rgb.convert("1"), "tiff", compression="group4"),
      encoded(rgb.convert("CMYK"), "tiff"), encoded(rgb, "tiff", big_tiff=True),
      encoded(rgb, "tiff", **frames)]


def damaged(content: bytes, rng: random.Random) -> bytes:
  """A few bytes changed, set to a likely limit, left out or repeated."""
  data = bytearray(content)
  for _ in range(rng.choice((1, 1, 2, 3, 8))):
    if not data:
      break
    near = rng.choice((len(data), min(len(data), 100)))  # Headers come first.
    at, kind = rng.randrange(near), rng.randrange(10)
    if kind < 4:
      data[at] = rng.randrange(256)
    elif kind < 8:
      size, order = rng.choice((1, 2, 4)), rng.choice(("little", "big"))
      number = rng.choice(NUMBERS) % 256**size
      data[at:at + size] = number.to_bytes(size, order)
    elif kind == 8:
      del data[at:at + rng.choice((1, 4, 100, len(data)))]
    else:
      part = data[at:at + rng.choice((1, 12, 200))]
      data[at:at] = part * rng.choice((1, 2, 50))
  return bytes(data)


def damaged_png(content: bytes, rng: random.Random) -> bytes:
  """Chunks changed, and all checksums repaired."""
  chunks, at = [], 8
  while at < len(content):
    size, kind = struct.unpack_from(">I4s", content, at)
    chunks.append((kind, content[at + 8:at + 8 + size]))
    at += 12 + size
  for _ in range(rng.choice((1, 2, 3))):
    i = rng.randrange(len(chunks))
    kind, data = chunks[i]
    match rng.randrange(7):
      case 0:
        del chunks[i]
        if not chunks:
          return content[:8]
      case 1:
        chunks.insert(rng.randrange(len(chunks)), chunks[i])
      case 2:
        names = (b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND", b"zTXt", b"iTXt", b"iCCP",
                 b"acTL", b"fcTL", b"fdAT", b"eXIf", b"pHYs", b"gAMA", b"cHRM", b"sRGB")
        chunks[i] = (rng.choice(names), data)
      case 3:
        bomb = zlib.compress(bytes(rng.choice((100, 2**20, 2**24))))
        chunks.insert(1, rng.choice((
            (b"zTXt", b"key\0\0" + bomb), (b"iCCP", b"key\0\0" + bomb),
            (b"iTXt", b"key\0\1\0\0\0" + bomb), (b"IDAT", bomb))))
      case 4 if kind == b"IDAT":
        try:
          chunks[i] = (kind, zlib.compress(damaged(zlib.decompress(data), rng)))
        except zlib.error:
          pass
      case _:
        chunks[i] = (kind, damaged(data, rng))
  return content[:8] + b"".join(
      struct.pack(">I", len(data)) + kind + data
      + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks)


def damaged_tiff(content: bytes, rng: random.Random) -> bytes:
  """Fields of the first directory changed, of 12 or, in BigTIFF, 20 bytes."""
  order = "<" if content[:2] == b"II" else ">"
  big = struct.unpack_from(order + "H", content, 2)[0] == 43
  start, = struct.unpack_from(order + ("Q" if big else "I"), content, 8 if big else 4)
  count, = struct.unpack_from(order + ("Q" if big else "H"), content, start)
  data = bytearray(content)
  for _ in range(rng.choice((1, 1, 2, 4))):
    at = start + (8 if big else 2) + rng.randrange(count) * (20 if big else 12)
    field, kind = rng.choice(((0, "H"), (2, "H"), (4, "I"), (8, "I"), (8, "H")))
    number = rng.choice((rng.choice(NUMBERS), rng.randrange(1, 14),
                         rng.choice((256, 257, 258, 273, 277, 278, 279, 322, 323, 338,
                                     339, 34675, 330, 700))))
    size = struct.calcsize(kind)
    struct.pack_into(order + kind, data, at + field, number % 256**size)
  return bytes(data)


def damaged_jpeg(content: bytes, rng: random.Random) -> bytes:
  """Segments changed, left out, repeated or moved."""
  segments, at = [], 2
  while content[at + 1] != 0xDA:
    size = 2 + int.from_bytes(content[at + 2:at + 4], "big")
    segments.append(content[at:at + size])
    at += size
  rest = content[at:]
  for _ in range(rng.choice((1, 2, 3))):
    i = rng.randrange(len(segments))
    match rng.randrange(4):
      case 0 if len(segments) > 1:
        del segments[i]
      case 1:
        segments.insert(rng.randrange(len(segments)), segments[i])
      case _:
        segments[i] = segments[i][:4] + damaged(segments[i][4:], rng)
  if rng.random() < 0.2:
    rest = rest[:-2] * rng.choice((2, 100, 1000)) + rest[-2:]
  return content[:2] + b"".join(segments) + rest


def thin() -> list[bytes]:
  """Images of a few kB that are very long, or expand to much besides pixels."""
  compressor = zlib.compressobj(9)
  bomb = b"".join(compressor.compress(bytes(2**20)) for _ in range(256))
  bomb += compressor.flush()
  return [*(png(*size) for size in ((1, 10**6), (10**6, 1), (3, 10**6), (10**6, 3),
                                    (1, 1300), (1, 60_000))),
          png(8, 8, (b"zTXt", b"key\0\0" + bomb)),
          png(8, 8, (b"iCCP", b"key\0\0" + bomb)),
          png(8, 8, (b"iTXt", b"key\0\1\0\0\0" + bomb))]


def png(width: int, height: int, *chunks: tuple[bytes, bytes]) -> bytes:
  """A black image of one bit."""
  head = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
  rows = zlib.compress(bytes(height * (1 + -(-width // 8))), 9)
  return b"\x89PNG\r\n\x1a\n" + b"".join(
      struct.pack(">I", len(data)) + kind + data
      + struct.pack(">I", zlib.crc32(kind + data))
      for kind, data in ((b"IHDR", head), *chunks, (b"IDAT", rows), (b"IEND", b"")))


def largest() -> Iterator[bytes]:
  """Images with nearly the most pixels that are accepted, in modes that take most."""
  side = int(Image.MAX_IMAGE_PIXELS**0.5)
  yield encoded(Image.new("RGBA", (side, side)), "png", compress_level=1)[1]
  yield encoded(Image.new("CMYK", (side, side)), "jpeg", progressive=True)[1]
  yield encoded(Image.new("RGBA", (16383, side**2 // 16383)), "webp", lossless=True,
                method=0)[1]


STRUCTURED = {"png": damaged_png, "tiff": damaged_tiff, "jpeg": damaged_jpeg}


def mutant(number: int, sources: list[tuple[str, bytes]]) -> bytes:
  """The mutant of this number: the same on every machine with the same Pillow."""
  rng = random.Random(number)
  kind, content = rng.choice(sources)
  if kind in STRUCTURED and rng.random() < 0.7:
    content = STRUCTURED[kind](content, rng)
  if kind not in STRUCTURED or rng.random() < 0.2:
    content = damaged(content, rng)
  return content


def read(path: pathlib.Path) -> str:
  """How an image file is taken: "read", "refused", or what else happened."""
  try:
    pixels = image_files.read(path, (32, 32, 3))
    return "read" if pixels.shape == (32, 32, 3) else f"shape {pixels.shape}"
  except images.ImageError as error:
    return "out of memory" if isinstance(error.__cause__, MemoryError) else "refused"
  except BaseException as error:
    return repr(error)


def crop(content: bytes) -> None:
  """As training does, which leaves out an image with any error."""
  try:
    with images.open_image(content) as image:
      images.random_crop(image, 32, (0.1, 1.0), True, np.random.default_rng(0))
  except Exception:
    pass


def main(kind: str, first: str = "0", count: str = "0") -> None:
  warnings.simplefilter("ignore")
  outcomes, slowest = {}, 0.0
  if kind == "mutants":
    sources, numbers = originals(), range(int(first), int(first) + int(count))
    contents = (mutant(number, sources) for number in numbers)
  else:
    contents = {"thin": thin, "largest": largest}[kind]()
  with tempfile.TemporaryDirectory() as folder:
    path = pathlib.Path(folder, "image.png")
    for number, content in enumerate(contents, int(first)):
      path.write_bytes(content)
      resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
      faulthandler.dump_traceback_later(HANG, exit=True)
      start = time.process_time()
      outcome = read(path)
      crop(content)
      slowest = max(slowest, time.process_time() - start)
      if outcome not in ("read", "refused"):
        outcome = f"{number}: {outcome}"
      outcomes[outcome] = outcomes.get(outcome, 0) + 1
  faulthandler.cancel_dump_traceback_later()
  # Not getrusage, whose maximum would include the parent's.
  status = pathlib.Path("/proc/self/status").read_text()
  peak = 1024 * int(re.search(r"VmHWM:\s*(\d+) kB", status)[1])
  json.dump({"outcomes": outcomes, "slowest": slowest, "peak": peak}, sys.stdout)


if __name__ == "__main__":
  main(*sys.argv[1:])
