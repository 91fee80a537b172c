"""minw.data.images: crops with values that are known without it."""

import io
import struct
import zlib

import numpy as np
from PIL import Image
from PIL import UnidentifiedImageError
import pytest

from minw.data import images


def coordinates(width, height):
  """(column, row, 77) of each pixel."""
  row, column = np.indices((height, width))
  pixels = np.stack([column, row, np.full_like(row, 77)], -1).astype(np.uint8)
  return Image.fromarray(pixels)


def opened(image, kind="jpeg", **options):
  file = io.BytesIO()
  image.save(file, kind, **options)
  return images.open_image(file.getvalue())


def test_centre_of_an_image_that_fits():
  for width, height, left, top in ((8, 6, 0, 0), (20, 6, 6, 0), (8, 11, 0, 2)):
    got = images.centre(coordinates(width, height), 6, 8)
    assert got.shape == (6, 8, 3) and got.dtype == np.uint8
    assert got[0, 0].tolist() == [left, top, 77]
    assert got[5, 7].tolist() == [left + 7, top + 5, 77]


def test_centre_of_a_larger_image():
  # At half of its size, then two columns off each side.
  got = images.centre(coordinates(24, 16), 8, 8)
  for i in (1, 3, 6):  # The edges have less to average.
    # Pixel i of the smaller image lies between 2i and 2i + 1 of the larger.
    assert got[i, i].tolist() == pytest.approx([2 * (i + 2) + 0.5, 2 * i + 0.5, 77],
                                               abs=0.5)
  got = images.centre(coordinates(24, 16), 8, 8, shrink=False)
  assert got[0, 0].tolist() == [8, 4, 77] and got[7, 7].tolist() == [15, 11, 77]


@pytest.mark.parametrize("shrink", [True, False])
def test_centre_of_a_smaller_image(shrink):
  got = images.centre(coordinates(4, 30), 8, 8, shrink=shrink)
  # Twice as large: its rows 26 to 33 of 60.
  assert got[0, 0].tolist() == [0, 13, 77]
  assert got[7, 7].tolist() == [3, 16, 77]


@pytest.mark.parametrize("mode", ["L", "CMYK", "P", "RGBA", "1"])
def test_other_modes(mode):
  gray = Image.new("RGB", (20, 20), (255, 255, 255)).convert(mode)
  assert (images.centre(gray, 8, 8) == 255).all()
  crop = images.random_crop(gray, 8, (0.5, 1.0), True, np.random.default_rng(0))
  assert crop.shape == (8, 8, 3) and (crop == 255).all()
  assert images.centre(gray, 8, 8, 1).shape == (8, 8, 1)


# Mode, a pixel, and its color on black by the mode's definition: opacity multiplies;
# CMYK (1 - c)(1 - k); YCbCr of JFIF; LAB of the white point D50.
MODES = [
    ("1", 1, (255, 255, 255)),
    ("1", 0, (0, 0, 0)),
    ("L", 77, (77, 77, 77)),
    ("LA", (200, 128), (100, 100, 100)),
    ("La", (100, 128), (100, 100, 100)),
    ("RGB", (10, 20, 30), (10, 20, 30)),
    ("RGBX", (10, 20, 30, 99), (10, 20, 30)),
    ("RGBA", (200, 100, 50, 128), (100, 50, 25)),
    ("RGBa", (100, 50, 25, 128), (100, 50, 25)),
    ("CMYK", (51, 0, 0, 51), (163, 204, 204)),
    ("YCbCr", (76, 85, 255), (254, 0, 0)),
    ("HSV", (85, 255, 200), (0, 200, 0)),
    ("LAB", (137, 128, 128), (128, 128, 128)),
    ("I;16", 0x12FF, (0x12,) * 3),
    ("I;16L", 0xFE01, (0xFE,) * 3),
    ("I;16B", 0x12FF, (0x12,) * 3),
    ("I;16N", 0x7F80, (0x7F,) * 3),
]


@pytest.mark.parametrize("mode, pixel, wanted", MODES)
def test_modes(mode, pixel, wanted):
  image = Image.new(mode, (3, 2), pixel)
  luma = 0.299 * wanted[0] + 0.587 * wanted[1] + 0.114 * wanted[2]
  for got, value in ((images.flatten(image, "RGB"), wanted),
                     (images.flatten(image, "L"), (luma,))):
    assert got.size == (3, 2)
    got = np.asarray(got).reshape(2, 3, -1)
    np.testing.assert_allclose(got, np.broadcast_to(value, got.shape), atol=1)


def test_all_modes_are_tested():
  elsewhere = {"P", "PA", "I", "F"}
  assert {*Image.MODES} <= {mode for mode, *_ in MODES} | elsewhere


def test_sixteen_bits_lose_the_low_byte():
  values = np.arange(256, dtype=np.uint16)
  for low in (0, 128, 255):
    got = images.flatten(opened(Image.fromarray((values * 256 + low)[None]), "png"),
                         "L")
    assert np.asarray(got)[0].tolist() == values.tolist()


@pytest.mark.parametrize("mode", ["I", "F"])
@pytest.mark.parametrize("kind", ["tiff", None])
def test_values_of_unknown_range_are_refused(mode, kind):
  image = Image.new(mode, (4, 4), 1)
  with pytest.raises(images.ImageError, match="range of its pixel values is unknown"):
    images.flatten(opened(image, kind) if kind else image, "L")


@pytest.mark.parametrize("background, wanted", [
    ((0, 0, 0), (100, 50, 25)), ((255, 255, 255), (227, 177, 152)),
    ((0, 255, 0), (100, 177, 25))])
def test_background(background, wanted):
  image = Image.new("RGBA", (2, 2), (200, 100, 50, 128))
  for transparent in (image, opened(image, "png"), opened(image, "tiff")):
    got = images.flatten(transparent, "RGB", background)
    np.testing.assert_allclose(np.asarray(got)[0, 0], wanted, atol=1)


def test_gray_on_a_color():
  got = images.flatten(Image.new("LA", (1, 1), (200, 0)), "RGB", (1, 2, 3))
  assert got.getpixel((0, 0)) == (1, 2, 3)
  assert images.flatten(Image.new("LA", (1, 1), (200, 0)), "L", (0, 255, 0)).getpixel(
      (0, 0)) == 150  # 0.587 of 255.


def chunk(kind, data):
  return struct.pack(">I", len(data)) + kind + data + struct.pack(
      ">I", zlib.crc32(kind + data))


def png(bits, color_type, row, *chunks):
  """A PNG file of one row."""
  width = len(row) * 8 // bits // {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}[color_type]
  head = struct.pack(">IIBBBBB", width, 1, bits, color_type, 0, 0, 0)
  return b"\x89PNG\r\n\x1a\n" + b"".join(
      chunk(*pair) for pair in ((b"IHDR", head), *chunks,
                                (b"IDAT", zlib.compress(b"\0" + row)), (b"IEND", b"")))


PALETTE = (b"PLTE", bytes([10, 20, 30, 200, 100, 50]))


@pytest.mark.parametrize("content, wanted", [
    # Gray of 1 to 16 bits with a transparent value: that of the first pixel.
    (png(1, 0, b"\xbf", (b"tRNS", b"\0\1")), [0, 0, 0, 0, 0, 0, 0, 0]),
    (png(1, 0, b"\xbf", (b"tRNS", b"\0\0")), [255, 0, 255, 255, 255, 255, 255, 255]),
    (png(2, 0, b"\x6c", (b"tRNS", b"\0\1")), [0, 170, 255, 0]),
    (png(4, 0, b"\x5a", (b"tRNS", b"\0\5")), [0, 170]),
    (png(8, 0, bytes([85, 5]), (b"tRNS", b"\0\x55")), [0, 5]),
    (png(16, 0, b"\x12\x34\x12\x35", (b"tRNS", b"\x12\x34")), [0, 0x12]),
    # The same without one.
    (png(1, 0, b"\xbf"), [255, 0, 255, 255, 255, 255, 255, 255]),
    (png(2, 0, b"\x6c"), [85, 170, 255, 0]),
    (png(4, 0, b"\x5a"), [85, 170]),
    # A transparent color.
    (png(8, 2, bytes([9, 8, 7, 9, 8, 6]), (b"tRNS", bytes([0, 9, 0, 8, 0, 7]))),
     [(0, 0, 0), (9, 8, 6)]),
    # A palette, opaque, with one transparent entry and with several opacities.
    (png(8, 3, b"\0\1", PALETTE), [(10, 20, 30), (200, 100, 50)]),
    (png(8, 3, b"\0\1", PALETTE, (b"tRNS", b"\0")), [(0, 0, 0), (200, 100, 50)]),
    (png(8, 3, b"\0\1", PALETTE, (b"tRNS", b"\xff\x80")),
     [(10, 20, 30), (100, 50, 25)]),
    (png(1, 3, b"\x40", PALETTE, (b"tRNS", b"\0")), [(0, 0, 0), (200, 100, 50)]
     + 6 * [(0, 0, 0)]),
    # The upper 8 of 16 bits count.
    (png(16, 2, bytes([9, 255, 8, 0, 7, 1])), [(9, 8, 7)]),
    (png(16, 4, bytes([200, 0, 128, 0])), [100]),
    (png(16, 6, bytes([200, 0, 100, 0, 50, 0, 128, 0])), [(100, 50, 25)]),
])
def test_png(content, wanted):
  rgb = [3 * (value,) if isinstance(value, int) else value for value in wanted]
  luma = np.array(rgb) @ [0.299, 0.587, 0.114]
  got = np.asarray(images.flatten(images.open_image(content), "RGB"))
  np.testing.assert_allclose(got[0], rgb, atol=1)
  got = np.asarray(images.flatten(images.open_image(content), "L"))
  np.testing.assert_allclose(got[0], luma, atol=1)


def test_transparent_16_bit_color_is_refused():
  content = png(16, 2, bytes(6), (b"tRNS", bytes(6)))
  with pytest.raises(images.ImageError, match="save it with an alpha channel"):
    images.flatten(images.open_image(content), "RGB")


def test_palette_with_alpha():
  image = Image.new("PA", (2, 1), (1, 128))
  image.putpalette([10, 20, 30, 200, 100, 50])
  np.testing.assert_allclose(images.flatten(image, "RGB").getpixel((0, 0)),
                             (100, 50, 25), atol=1)


def test_transparent_gif():
  image = Image.fromarray(np.array([[0, 1]], np.uint8))
  image.putpalette([10, 20, 30, 200, 100, 50])
  got = images.flatten(opened(image, "gif", transparency=1), "RGB", (1, 2, 3))
  assert np.asarray(got).tolist() == [[[10, 20, 30], [1, 2, 3]]]


def tiff(data, bits, photometric=1, sample_format=1):
  """A TIFF file of one row, little-endian, one channel."""
  tags = [(256, 4, len(data) * 8 // bits), (257, 4, 1), (258, 3, bits), (259, 3, 1),
          (262, 3, photometric), (273, 4, 8), (277, 3, 1), (278, 4, 1),
          (279, 4, len(data)), (339, 3, sample_format)]
  entries = b"".join(struct.pack("<HHII", tag, kind, 1, n) for tag, kind, n in tags)
  return (b"II*\0" + struct.pack("<I", 8 + len(data)) + data
          + struct.pack("<H", len(tags)) + entries + bytes(4))


@pytest.mark.parametrize("content, wanted", [
    (tiff(b"\x12\x34\x56", 12), [0x12, 0x45]),  # 0x123 and 0x456.
    (tiff(b"\xff\x12", 16), [0x12]),
    (tiff(b"\xff\x12", 16, photometric=0), [0xED]),
    (tiff(b"\x12", 8, photometric=0), [0xED]),
])
def test_tiff(content, wanted):
  image = images.flatten(images.open_image(content), "L")
  assert np.asarray(image)[0].tolist() == wanted


@pytest.mark.parametrize("bits, sample_format", [(8, 2), (16, 2), (32, 1), (32, 3)])
def test_tiff_of_unknown_range(bits, sample_format):
  content = tiff(bytes(bits), bits, sample_format=sample_format)
  with pytest.raises(images.ImageError, match="range of its pixel values is unknown"):
    images.flatten(images.open_image(content), "L")


def test_inverted_cmyk():
  """JPEG has inverted inks if it has Adobe's marker, which Pillow writes."""
  def jpeg(inks):
    file = io.BytesIO()
    Image.new("CMYK", (16, 16), inks).save(file, "jpeg", quality=100)
    return file.getvalue()

  def color(content):
    return images.flatten(images.open_image(content), "RGB").getpixel((8, 8))

  np.testing.assert_allclose(color(jpeg((51, 0, 0, 51))), (163, 204, 204), atol=1)
  with_marker = jpeg((204, 255, 255, 204))
  at = with_marker.index(b"\xff\xee\0\x0eAdobe")
  without = with_marker[:at] + with_marker[at + 16:]
  np.testing.assert_allclose(color(without), (163, 204, 204), atol=1)


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize("size", [(90, 70), (30, 40), (64, 48)])
def test_ordinary_jpeg_is_what_pillow_makes_of_it(mode, size):
  """To the bit, as in the data sets that networks are trained on."""
  pixels = np.random.default_rng(0).integers(0, 256, (*size, 4), np.uint8)
  image = Image.fromarray(pixels, "RGBA").convert("RGB").convert(mode)
  for channels, wanted_mode in ((3, "RGB"), (1, "L")):
    file = opened(image)
    got = images.centre(file, 32, 40, channels)
    wanted = opened(image).convert("RGB").convert(wanted_mode)
    ratio = max(40 / wanted.width, 32 / wanted.height)
    wanted = wanted.resize((max(40, round(wanted.width * ratio)),
                            max(32, round(wanted.height * ratio))),
                           Image.Resampling.BILINEAR)
    left, top = (wanted.width - 40) // 2, (wanted.height - 32) // 2
    wanted = np.asarray(wanted)[top:top + 32, left:left + 40].reshape(32, 40, channels)
    np.testing.assert_array_equal(got, wanted)


# The picture of a file with [[10, 20, 30], [40, 50, 60]], by its orientation.
ORIENTATIONS = {
    1: [[10, 20, 30], [40, 50, 60]], 2: [[30, 20, 10], [60, 50, 40]],
    3: [[60, 50, 40], [30, 20, 10]], 4: [[40, 50, 60], [10, 20, 30]],
    5: [[10, 40], [20, 50], [30, 60]], 6: [[40, 10], [50, 20], [60, 30]],
    7: [[60, 30], [50, 20], [40, 10]], 8: [[30, 60], [20, 50], [10, 40]],
    0: [[10, 20, 30], [40, 50, 60]], 9: [[10, 20, 30], [40, 50, 60]]}


@pytest.mark.parametrize("kind", ["png", "tiff", "webp", "jpeg"])
@pytest.mark.parametrize("orientation", ORIENTATIONS)
def test_orientation(kind, orientation):
  stored = np.array([[10, 20, 30], [40, 50, 60]], np.uint8)
  wanted = np.array(ORIENTATIONS[orientation])
  if kind == "jpeg":  # Blocks of 8 x 8 are exact.
    stored, wanted = (np.kron(a, np.ones((8, 8), np.uint8)) for a in (stored, wanted))
  exif = Image.Exif()
  exif[0x0112] = orientation
  options = {"lossless": True} if kind == "webp" else {}
  image = opened(Image.fromarray(stored), kind, exif=exif, **options)
  got = images.centre(image, *wanted.shape, 1, upright=True)
  np.testing.assert_allclose(got[..., 0], wanted, atol=1)
  if kind == "jpeg":  # ImageNet is seen as it is stored.
    image = opened(Image.fromarray(stored), kind, exif=exif)
    got = images.centre(image, *stored.shape, 1)
    np.testing.assert_allclose(got[..., 0], stored, atol=1)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
def test_damaged_exif_says_nothing():
  file = io.BytesIO()
  Image.new("L", (8, 8), 9).save(file, "jpeg", exif=b"Exif\0\0MM\0*\xff\xff\xff\xff")
  image = images.open_image(file.getvalue())
  assert (images.centre(image, 8, 8, 1, upright=True) == 9).all()


@pytest.mark.parametrize("kind", ["gif", "png", "webp", "tiff"])
def test_several_frames_are_refused(kind):
  frames = [Image.new("RGB", (8, 8), color) for color in ("red", "blue")]
  with pytest.raises(images.ImageError, match="several frames or pages"):
    opened(frames[0], kind, save_all=True, append_images=frames[1:])
  assert images.centre(opened(frames[0], kind, save_all=True), 8, 8).shape == (8, 8, 3)


def test_photo_with_a_second_image():
  """Phones attach one; the photo is the first."""
  frames = [Image.new("RGB", (8, 8), color) for color in ("white", "black")]
  photo = opened(frames[0], "mpo", save_all=True, append_images=frames[1:])
  assert (images.centre(photo, 8, 8) == 255).all()


@pytest.mark.parametrize("kind", [
    "eps", "tga", "ico", "pcx", "ppm", "jpeg2000", "pdf"])
def test_formats_that_are_not_opened(kind):
  with pytest.raises(UnidentifiedImageError):
    opened(Image.new("RGB", (32, 32)), kind)


def test_channels_as_they_are():
  rng = np.random.default_rng(0)
  for channels, mode in ((2, "LA"), (4, "RGBA")):
    stored = rng.integers(0, 256, (6, 8, channels), np.uint8)
    image = opened(Image.fromarray(stored), "png")
    assert image.mode == mode
    np.testing.assert_array_equal(images.centre(image, 6, 8, channels), stored)
    # Each is scaled by itself: opacity does not weigh the others.
    image = opened(Image.fromarray(stored), "png")
    scaled = images.centre(image, 3, 4, channels)
    for i in range(channels):
      band = Image.fromarray(np.ascontiguousarray(stored[..., i]))
      np.testing.assert_array_equal(
          scaled[..., i], np.asarray(band.resize((4, 3), Image.Resampling.BILINEAR)))


@pytest.mark.parametrize("mode, channels", [
    ("RGB", 4), ("L", 2), ("RGBA", 2), ("LA", 4), ("RGBA", 5), ("CMYK", 4), ("P", 4)])
def test_other_numbers_of_channels_are_refused(mode, channels):
  image = Image.new(mode, (8, 8))
  message = f"channels of Pillow mode {mode}; the network takes {channels}"
  with pytest.raises(images.ImageError, match=message):
    images.centre(image, 8, 8, channels)


def test_gray_with_alpha_of_16_bits_has_two_channels():
  content = png(16, 4, bytes([200, 0, 128, 0]))
  with pytest.raises(images.ImageError, match="mode LA; the network takes 4"):
    images.centre(images.open_image(content), 1, 1, 4)


@pytest.mark.parametrize("size", [(1, 2_000_000), (2_000_000, 1)])
def test_thin_images_take_no_memory(size):
  """As large as it fills 224 x 224, this image would have 10^11 pixels."""
  row = np.repeat(np.uint8([1, 100, 1]), [999_990, 20, 999_990])
  image = Image.fromarray(row.reshape(size[::-1]))
  got = images.centre(image, 224, 224, 1)
  assert got.shape == (224, 224, 1) and (got == 100).all()


@pytest.mark.parametrize("length", [511, 512, 513, 4097])
@pytest.mark.parametrize("upright", [True, False])
@pytest.mark.parametrize("width", [3, 8, 13])
def test_thin_images_look_as_if_resized_as_a_whole(length, upright, width):
  """The same part, to the rounding of where it begins."""
  pixels = np.random.default_rng(0).integers(0, 256, (length, width, 3), np.uint8)
  whole = Image.fromarray(pixels if upright else pixels.transpose(1, 0, 2))
  got = images.centre(whole, 8, 8).astype(int)
  size = tuple(max(8, round(n * 8 / width)) for n in whole.size)
  left, top = ((n - 8) // 2 for n in size)
  wanted = whole.resize(size, Image.Resampling.BILINEAR).crop(
      (left, top, left + 8, top + 8))
  assert np.abs(got - np.asarray(wanted)).max() <= 1


def scans(content):
  """Where the scans of a JPEG begin that has no thumbnail."""
  return [at for at in range(len(content)) if content.startswith(b"\xff\xda", at)]


def test_jpeg_of_many_scans():
  """Each takes the time of the whole image and next to no bytes."""
  file = io.BytesIO()
  Image.new("L", (4096, 4096), 90).save(file, "jpeg", progressive=True)
  content = file.getvalue()
  count, last = len(scans(content)), content[scans(content)[-1]:-2]
  assert (images.centre(images.open_image(content), 8, 8) == 90).all()
  for scan_count, good in ((128, True), (129, False)):  # 2^24 pixels each, 2^31 in all.
    longer = content[:-2] + (scan_count - count) * last + content[-2:]
    if good:
      images.open_image(longer)
      continue
    with pytest.raises(images.ImageError,
                       match="129 scans of 4096 x 4096 pixels; 2,14"):
      images.open_image(longer)
  # What follows the image, and what stands in other segments, are no scans of it.
  comment = b"\xff\xfe\x02\x02" + 256 * b"\xff\xda"
  images.open_image(content[:2] + comment + content[2:] + 200 * last)


@pytest.mark.parametrize("kind", ["progressive", "one channel after the other"])
def test_jpeg_that_is_held_as_a_whole_is_smaller(kind, monkeypatch):
  monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10_000)
  for width, good in ((100, True), (101, False)):
    file = io.BytesIO()
    Image.new("RGB", (width, 100)).save(file, "jpeg", progressive=kind == "progressive")
    content = file.getvalue()
    if kind != "progressive":
      images.open_image(content)
      at = scans(content)[0]
      assert content[at:at + 5] == b"\xff\xda\x00\x0c\3"
      content = (content[:at] + b"\xff\xda\x00\x08\1" + content[at + 5:at + 7]
                 + content[at + 11:])
    if good:
      images.open_image(content)
      continue
    with pytest.raises(images.ImageError, match="101 x 100 pixels; 1 to 10,000"):
      images.open_image(content)


def bmp_of_runs(width, height, runs):
  """A BMP of 8 bits with run-length encoding."""
  start = 14 + 40 + 1024
  return (b"BM" + struct.pack("<IHHI", start + len(runs), 0, 0, start)
          + struct.pack("<IiiHHIIiiII", 40, width, height, 1, 8, 1, len(runs),
                        0, 0, 256, 0) + bytes(i // 4 for i in range(1024)) + runs)


def test_bmp_of_runs():
  got = images.centre(images.open_image(bmp_of_runs(8, 8, b"\x08\x4d\0\0" * 8)), 8, 8)
  assert (got == 77).all()
  for width, height in ((80_000_000, 1), (9000, 9000)):  # Python would fill the rows.
    with pytest.raises(images.ImageError, match="in run-length encoding; 16,777,216"):
      images.open_image(bmp_of_runs(width, height, b"\0\2\xff\xff"))


@pytest.mark.parametrize("width, length, good", [
    (16, 16, True), (4096, 4096, True), (4096, 4112, False), (2**31 - 16, 16, False)])
def test_tiff_of_tiles(width, length, good):
  """A decoder makes a whole tile, however small the image is."""
  tags = [(256, 8), (257, 8), (258, 8), (259, 1), (262, 1), (277, 1), (322, width),
          (323, length), (324, 8), (325, 100)]
  content = (b"II*\0" + struct.pack("<IH", 8, len(tags)) + b"".join(
      struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags) + bytes(4))
  if good:
    images.open_image(content)
  else:
    with pytest.raises(images.ImageError, match="its tiles have .*; 16,777,216 are"):
      images.open_image(content)


def test_large_photos_are_decoded_at_a_fraction():
  rng = np.random.default_rng(0)
  small = Image.fromarray(rng.integers(0, 256, (30, 40, 3), np.uint8))
  large = small.resize((4032, 3024), Image.Resampling.BICUBIC)
  for size, decoded in ((32, (504, 378)), (100, (1008, 756)), (400, (4032, 3024))):
    file = opened(large, quality=95)
    got = images.centre(file, size, size).astype(int)
    assert file.size == decoded
    exact = images.centre(large, size, size)
    assert np.abs(got - exact).mean() < 1 and np.abs(got - exact).max() < 8
  file = opened(large.resize((3000, 2000)), quality=95)  # Not large enough for that.
  images.centre(file, 32, 32)
  assert file.size == (3000, 2000)


def test_limit_of_pixels(monkeypatch):
  monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10_000)
  image = Image.new("L", (101, 100))
  with pytest.raises((images.ImageError, Image.DecompressionBombWarning)):
    opened(image, "png")
  with pytest.raises(images.ImageError, match="101 x 100 pixels; 1 to 10,000"):
    images.centre(opened(image), 8, 8)
  with pytest.raises(images.ImageError, match="301 x 100 pixels; 1 to 30,000"):
    opened(image.resize((301, 100)))
  monkeypatch.setattr(images, "_DRAFT_PIXELS", 10_000)
  assert images.centre(opened(image), 8, 8).shape == (8, 8, 3)


def test_random_boxes():
  rng = np.random.default_rng(0)
  boxes = np.array([images.random_box(300, 200, (0.08, 0.5), rng)
                    for _ in range(2000)])
  left, top, right, bottom = boxes.T
  assert left.min() == top.min() == 0 and right.max() == 300 and bottom.max() == 200
  width, height = right - left, bottom - top
  area, ratio = width * height / 60_000, np.log(width / height)
  assert area.min() > 0.078 and area.max() < 0.505
  assert abs(area.mean() - 0.29) < 0.01  # Five standard deviations.
  assert np.abs(ratio).max() < np.log(4 / 3) + 0.03 and abs(ratio.mean()) < 0.02


def test_boxes_that_do_not_fit_are_central():
  rng = np.random.default_rng(0)
  assert images.random_box(90, 10, (1.0, 1.0), rng) == (38, 0, 51, 10)
  assert images.random_box(10, 90, (1.0, 1.0), rng) == (0, 38, 10, 51)


def test_random_crops_are_parts_of_the_image():
  flips = 0
  for seed in range(100):
    rng = np.random.default_rng(seed)
    box = images.random_box(200, 160, (0.3, 1.0), np.random.default_rng(seed))
    crop = images.random_crop(coordinates(200, 160), 50, (0.3, 1.0), True, rng)
    crop = crop.astype(float)
    if crop[0, 0, 0] > crop[0, -1, 0]:
      flips += 1
      crop = crop[:, ::-1]
    # Centres of the outermost pixels, to a rounding.
    assert np.abs(crop[0, 0, :2] - box[:2]).max() < 3.5
    assert np.abs(crop[-1, -1, :2] - box[2:]).max() < 4.5
    assert (crop[..., 2] == 77).all()
    assert (np.diff(crop[..., 0], axis=1) >= 0).all()
  assert 25 < flips < 75  # Five standard deviations.
  same = [images.random_crop(coordinates(200, 160), 50, (0.3, 1.0), False,
                             np.random.default_rng(seed)) for seed in (0, 0, 1)]
  assert (same[0] == same[1]).all() and (same[0] != same[2]).any()
  assert (np.diff(same[2][..., 0].astype(int), axis=1) >= 0).all()


def test_large_jpeg_is_decoded_at_a_fraction_of_its_size():
  image = coordinates(200, 160).resize((1600, 1280), Image.Resampling.BICUBIC)
  for seed in range(5):
    arguments = 50, (0.5, 1.0), True
    file = opened(image, quality=95)
    crop = images.random_crop(file, *arguments, np.random.default_rng(seed))
    assert file.size in ((200, 160), (400, 320), (800, 640))
    exact = images.random_crop(image, *arguments, np.random.default_rng(seed))
    assert np.abs(crop.astype(int) - exact).mean() < 1.5
  file = opened(image, quality=95)  # A small part of it needs all pixels.
  images.random_crop(file, 900, (0.5, 1.0), True, np.random.default_rng(0))
  assert file.size == (1600, 1280)
