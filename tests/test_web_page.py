"""The page of an exported network in Chromium, as its readers use it."""

import base64
import io
import json
import math
import pathlib
import re

import numpy as np
from PIL import Image
import pytest

from c_programs import ROOT
from c_programs import tool
from minw import infer
from minw import packed
from minw.data import datasets
from minw.export import web
import node
from packed_networks import Builder
from packed_networks import floats
from packed_networks import groups_and_dilation
from packed_networks import images
from packed_networks import residual_and_dense
from web_pages import image_files
from web_pages import npm_package
from web_pages import photo
from web_pages import served

pytestmark = [pytest.mark.slow, node.needs_node]

PLAYWRIGHT = "playwright-core@1.65.1"
CAMERA = ["--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream"]
PHONE = {"viewport": {"width": 360, "height": 740}}
DESKTOP = {"viewport": {"width": 1280, "height": 900}}


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
  """The arguments of tests/web/page.mjs: folder of playwright-core and executable."""
  executable = tool("chromium", "chromium-browser", "google-chrome")
  return npm_package(tmp_path_factory.mktemp("playwright"), PLAYWRIGHT), executable


@pytest.fixture(scope="module")
def visit(browser):
  """visit(url, *steps): what those steps return that return anything.

  tests/web/page.mjs says which steps there are.

  The page must make no request but the one for itself. It may only write to the console
  what `messages` holds parts of. Other options are those of a browser's context, and
  `flags` of the browser.
  """
  def run(url, *steps, messages=(), **options):
    wanted = [{"url": url, "steps": [["settle"], *steps, ["settle"]], **options}]
    said = node.run("node", node.SCRIPTS / "page.mjs", *browser,
                    input=json.dumps(wanted))
    found, = json.loads(said)
    assert found["requests"] == [url]
    assert len(found["messages"]) == len(messages), found["messages"]
    for part, message in zip(messages, found["messages"]):
      assert part in message
    return [result for result in found["results"] if result is not None]
  return run


@pytest.fixture(scope="module")
def page(tmp_path_factory):
  """page(program or name of a shipped one): the address of the file of its page."""
  addresses = {}

  def of(program):
    if isinstance(program, str):
      program = infer.load(program).program
    key = packed.to_bytes(program)
    if key not in addresses:
      folder = tmp_path_factory.mktemp("page") / "network"
      web.write(folder, web.contents(program, "network", web.own_samples(program)))
      addresses[key] = (folder / "index.html").as_uri()
    return addresses[key]
  return of


def programs():
  """Networks of every operation and of other numbers of bits than the shipped ones."""
  return {"every1": residual_and_dense(1), "every3": residual_and_dense(3),
          "groups2": groups_and_dilation(2), "float16": floats(1, "float16")}


# The network.


@pytest.mark.parametrize("name", sorted(infer.shipped()))
def test_logits_equal_native_ones(visit, page, name):
  network = infer.load(name, backend="native")
  batch = images(network.program, 20, seed=1)
  text, = visit(page(name), ["evaluate", f"""(async () => {{
      const text = atob("{node.encoded(batch)}");
      const pixels = Uint8Array.from(text, (letter) => letter.charCodeAt(0));
      const bytes = new Uint8Array(state.net.logits(pixels).buffer);
      return btoa(String.fromCharCode(...bytes));
  }})()"""])
  np.testing.assert_array_equal(
      node.array(text, np.float32, 20, network.program.num_classes),
      network.logits(batch), strict=True)


# The number of elements of each color, of all pictures of activations.
COLORS = """
  Array.from(document.querySelectorAll("#layers div > figure canvas"), (canvas) => {
    const { width, height } = canvas;
    const { data } = canvas.getContext("2d").getImageData(0, 0, width, height);
    const counts = {};
    for (let i = 0; i < data.length; i += 4) {
      const color = data.slice(i, i + 3).join(" ");
      if (data[i + 3]) counts[color] = (counts[color] ?? 0) + 1;
    }
    return { name: canvas.ariaLabel, counts };
  })"""


def shares(counts):
  """The share of each color, or of each value of an array."""
  if not isinstance(counts, dict):
    values, numbers = np.unique(counts, return_counts=True)
    counts = dict(zip(values.tolist(), numbers.tolist()))
  return {color: pytest.approx(count / sum(counts.values()), abs=1e-12)
          for color, count in counts.items()}


def gray(codes, bits):
  """The colors of codes: the smallest level is 24, the largest is 250."""
  levels = {1: [-1, 0, 1], 2: [-1, 0, 1], 3: [-4, -2, -1, 0, 1, 2, 4]}[bits]
  level = np.array(levels)[codes + len(levels) // 2] / levels[-1]
  value = np.floor(137 + 113 * level + 0.5).astype(int)
  return np.array([f"{v} {v} {v}" for v in value.ravel().tolist()])


def planes(codes, bits):
  """The bits of codes: whether they are positive, then those of their magnitudes."""
  return [codes > 0, *(np.abs(codes) >> bit & 1 for bit in range(bits - 1))]


def activations(program, image):
  """Names, bits and codes of the values that are codes, by the native engine."""
  network = infer.Network(packed.to_bytes(program), backend="native")
  kinds = packed.infer_values(program)[1:]
  return [(op.name, kind.bits, np.asarray(value[0]))
          for op, kind, value in zip(program.ops, kinds, network.values(image)[1:])
          if kind.kind == "CODE"]


def use(pixels):
  """The step that gives pixels to the network."""
  return ["evaluate", f"usePixels(Uint8Array.from({pixels.ravel().tolist()}))"]


@pytest.mark.parametrize("name", programs())
def test_any_network_is_shown(visit, page, name):
  program = programs()[name]
  image = images(program, 1)
  is_black, has_alert, pictures = visit(
      page(program), ["text", "#prompt"], use(image), ["settle"],
      ["isVisible", "#alert"], ["evaluate", COLORS])
  assert is_black == "No picture yet: all pixels are black"
  assert not has_alert
  wanted = activations(program, image)
  assert [picture["name"] for picture in pictures] == [
      f"Activations {name}" for name, _, _ in wanted]
  for picture, (name, bits, codes) in zip(pictures, wanted):
    assert shares(picture["counts"]) == shares(gray(codes, bits)), name


def test_bit_planes(visit, page):
  name = "cifar10_convnet_a_quarter_2bit"
  program = infer.load(name).program
  image = images(program, 1)
  keys, pictures = visit(
      page(name), use(image), ["settle"], ["click", "input[value=planes]"], ["settle"],
      ["texts", ".key"], ["evaluate", COLORS])
  assert keys == ["1", "0", "changed by the flips"]
  wanted = [(f"Activations {name}, bit plane {i + 1}", plane)
            for name, bits, codes in activations(program, image)
            for i, plane in enumerate(planes(codes, bits))]
  assert [picture["name"] for picture in pictures] == [name for name, _ in wanted]
  for picture, (name, plane) in zip(pictures, wanted):
    assert shares(picture["counts"]) == shares(gray(2 * plane.astype(int) - 1, 1)), name


def test_elements_stand_in_their_places(visit, page):
  """The first channels and weights of a layer, read from the page's pictures."""
  program = infer.load("digits_convnet").program
  image = datasets.load("digits", "test", None)[0][:1]
  read = """(selector, size) => {
    const canvas = document.querySelector(selector);
    const { width, height } = canvas;
    const { data } = canvas.getContext("2d").getImageData(0, 0, width, height);
    const alphas = Array.from({ length: width }, (_, x) => data[4 * x + 3]);
    const scale = alphas.indexOf(0) / size; // Gaps are transparent.
    const isLight = (x, y) => data[4 * (width * Math.floor(y) + Math.floor(x))] > 128;
    return Array.from({ length: size * size }, (_, i) => isLight(
      (i % size + 0.5) * scale, (Math.floor(i / size) + 0.5) * scale) ? 1 : -1);
  }"""
  first, weights = visit(
      page("digits_convnet"), use(image), ["settle"],
      ["evaluate", f"({read})('#layers div > figure canvas', 8)"],
      ["evaluate", f"({read})('#layers .scroll canvas', 3)"])
  _, _, codes = activations(program, image)[0]
  assert first == codes[:, :, 0].ravel().tolist()
  layer = program.ops[0]
  assert isinstance(layer, packed.Conv)
  assert weights == layer.kernel[0, :, :, 0].ravel().tolist()


def slide(count):
  """The step that moves the slider to flip some pixels."""
  return ["evaluate", f"get('flips').value = {count};"
                      " get('flips').dispatchEvent(new Event('input')); null"]


def test_flipped_pixels(visit, page):
  """The number of bits that they change is the native engine's."""
  name = "cifar10_convnet_a_quarter"
  program = infer.load(name).program
  image = images(program, 1, seed=2)
  order, text, again, pictures = visit(
      page(name), use(image), ["evaluate", "state.order"], slide(100), ["settle"],
      ["text", "#flips-text"], ["evaluate", "flipOrder(state.net)"],
      ["evaluate", COLORS])
  assert order == again
  inside = np.arange(32 * 32).reshape(32, 32)[4:28, 4:28]  # The network's crop.
  assert sorted(order) == inside.ravel().tolist() != order
  flipped = image.reshape(-1, 3).copy()
  flipped[order[:100]] = 255 - flipped[order[:100]]
  before = activations(program, image)
  after = activations(program, flipped.reshape(image.shape))
  changed = [old != new for (_, _, old), (_, _, new) in zip(before, after)]
  bits = sum(codes.size for _, _, codes in before)
  total = sum(int(where.sum()) for where in changed)
  assert text.startswith(f"100 flipped pixels of 576 changed {total:,} of {bits:,} bits"
                         f" ({100 * total / bits:.1f}%). The label ")
  for picture, where in zip(pictures, changed, strict=True):
    assert where.any()
    assert shares(picture["counts"])["255 106 19"] == where.mean()


def test_cost(visit, page):
  name = "digits_convnet"
  program = infer.load(name).program
  found, facts = visit(page(name), ["evaluate", "costs(state.net)"],
                       ["texts", "#facts .number"])
  layers = [(op, np.prod(kind.shape[:2]) * op.kernel.size)
            for op, kind in zip(program.ops, packed.infer_values(program)[1:])
            if isinstance(op, packed.Conv)]
  assert [layer["name"] for layer in found] == [op.name for op, _ in layers]
  assert [layer["products"] for layer in found] == [count for _, count in layers]
  # Elements that each layer reads and writes. Those of the image have 8 bits, and the
  # logits have 32.
  elements = [8 * 8, 8 * 8 * 32, 4 * 4 * 32, 4 * 4 * 64, 2 * 2 * 64, 128, 10]
  bits = [8, 1, 1, 1, 1, 1, 32]
  weights = [op.kernel.size for op, _ in layers]
  for i, layer in enumerate(found):
    assert layer["weights"] == weights[i] and layer["floatWeights"] == 32 * weights[i]
    assert layer["activations"] == elements[i] * bits[i] + elements[i + 1] * bits[i + 1]
    assert layer["floatActivations"] == 32 * (elements[i] + elements[i + 1])
  xnor = sum(count for _, count in layers[1:])
  held = sum(weights) + 8 * 8 * 8 + 8 * 8 * 32  # The first layer's activations.
  assert facts == [f"{xnor / 1e6:.2f} M", "108 kbit", "15.3 kB",
                   f"{held / 8e3:.1f} kB"]


def test_cost_of_a_shortcut(visit, page):
  """The third layer also reads the activations of the first one, which it adds."""
  b = Builder(np.random.default_rng(0), (6, 6, 1))
  x = b.threshold(b.conv(0, 1, 8), 1)
  y = b.threshold(b.conv(x, 1, 8), 1)
  z = b.threshold(b.conv(y, 1, 8), 1, x)
  found, = visit(page(b.end(z)), ["evaluate", "costs(state.net)"])
  image, codes, logits = 6 * 6 * 8, 6 * 6 * 8, 7 * 32
  assert [layer["activations"] for layer in found] == [
      image + codes, 2 * codes, 3 * codes, codes + logits]


# The picture.


def arc(x, y, width, height, start, end):
  """Points on an ellipse; angles are in turns, clockwise from the right."""
  angles = 2 * math.pi * np.linspace(start, end, 12)
  return [(x + width * math.cos(a), y + height * math.sin(a)) for a in angles]


# Digits as they are written, in units of the pad.
DIGITS = {
    "0": [arc(.5, .5, .2, .33, -.25, .75)],
    "1": [[(.38, .3), (.52, .18), (.52, .85)]],
    "2": [[*arc(.5, .33, .2, .17, -.5, .08), (.3, .83), (.72, .83)]],
    "3": [[*arc(.47, .33, .2, .16, -.45, .22), *arc(.47, .66, .23, .18, -.2, .42)]],
    "4": [[(.55, .15), (.25, .6), (.75, .6)], [(.58, .4), (.56, .88)]],
    "5": [[(.7, .17), (.35, .17), (.33, .46), *arc(.47, .64, .22, .2, -.3, .4)]],
    "6": [[(.6, .14), (.42, .3), (.33, .5), *arc(.49, .67, .18, .18, -.45, .55)]],
    "7": [[(.27, .18), (.72, .18), (.42, .86)], [(.36, .5), (.68, .5)]],
    "8": [[*arc(.5, .33, .15, .16, .25, 1.25), *arc(.5, .67, .19, .18, -.25, .75)]],
    "9": [[*arc(.5, .34, .18, .17, 0, 1), (.64, .6), (.52, .87)]],
}


def test_drawn_digits(visit, page):
  """Digits are recognized wherever they are drawn, and in any size."""
  def placed(strokes, scale, left, top):
    return [[(left + scale * x, top + scale * y) for x, y in stroke]
            for stroke in strokes]

  steps = []
  for i, strokes in enumerate(DIGITS.values()):
    place = [(1, 0, 0), (.45, .5, .1), (.6, .05, .4)][i % 3]
    steps += [["click", "#clear"], ["text", "#prompt"],
              ["draw", placed(strokes, *place)], ["isVisible", "#prompt"], ["settle"],
              ["text", "#label"]]
  found = visit(page("digits_convnet"), *steps)
  assert found[0::3] == ["Draw here. Even nothing gets a label."] * 10
  assert found[1::3] == [False] * 10
  assert found[2::3] == list(DIGITS)


def thinned(bits):
  """The lines of a picture in which lines are wide: Zhang and Suen, 1984."""
  bits = np.pad(bits, 1)
  offsets = [(1, 0), (1, -1), (0, -1), (-1, -1), (-1, 0), (-1, 1), (0, 1), (1, 1)]
  while True:
    before = bits
    for ends in ((0, 2, 4), (2, 4, 6)), ((0, 2, 6), (0, 4, 6)):
      around = [np.roll(bits, offset, (0, 1)) for offset in offsets]
      steps = sum(~around[i] & around[(i + 1) % 8] for i in range(8))
      neighbors = sum(map(np.int64, around))
      removed = (steps == 1) & (neighbors >= 2) & (neighbors <= 6)
      for three in ends:
        removed &= ~np.logical_and.reduce([around[i] for i in three])
      bits = bits & ~removed
    if (bits == before).all():
      return bits[1:-1, 1:-1]


def test_drawings_become_pictures_of_the_data_set(visit, page):
  """Lines through the real digits are prepared to be like the real digits.

  The lines are found in pictures of 8x8 pixels, where narrow loops are lost. This costs
  some accuracy, most of it for the digit 8.
  """
  test, labels = datasets.load("digits", "test", None)
  drawings = []
  for image in test[..., 0]:
    large = Image.fromarray(image).resize((64, 64), Image.Resampling.BICUBIC)
    ink = np.asarray(large) > np.quantile(np.asarray(large), 1 - image.mean() / 255)
    lines = np.argwhere(thinned(ink)) / 64
    drawings.append([[(x, y)] for y, x in lines.tolist()])
  found, = visit(page("digits_convnet"), [
      "evaluate",
      f"{json.dumps(drawings)}.map((strokes) => [...digitPixels(strokes)])"])
  pixels = np.array(found, np.uint8).reshape(test.shape)
  network = infer.load("digits_convnet")
  assert np.mean(network.logits(test).argmax(-1) == labels) > .98
  assert np.mean(network.logits(pixels).argmax(-1) == labels) > .9
  # Each picture has the mean ink of the data set, in sixteenths of a pixel.
  assert set(np.unique(pixels)) <= set(np.round(np.arange(17) * 255 / 16).astype(int))
  ink = pixels.sum((1, 2, 3)) * 16 / 255
  assert ink.min() >= 311 and np.median(ink) < 330


def file_of(image, form="PNG"):
  """An image file as the step "give" takes it: its name, type and content."""
  file = io.BytesIO()
  image.save(file, form)
  return (f"image.{form.lower()}", f"image/{form.lower()}",
          base64.b64encode(file.getvalue()).decode())


def until_there_are_pixels(*steps):
  """The steps, after which the network has other pixels than before."""
  return [["evaluate", "state.pixels = null"], *steps, ["waitFor", "state.pixels"]]


@pytest.mark.parametrize("event", ["drop", "paste", "choose"])
@pytest.mark.parametrize("name", ["digits_convnet", "cifar10_convnet_a_quarter"])
def test_image_files(visit, page, tmp_path, event, name):
  """The network gets the pixels that `minw.infer` makes of a file."""
  image = photo(300, 200)
  path = tmp_path / "image.png"
  image.save(path)
  give = (["choose", "#file", str(path)] if event == "choose"
          else ["give", event, *file_of(image)])
  pixels, label, status = visit(
      page(name), *until_there_are_pixels(give), ["settle"],
      ["evaluate", "[...state.pixels]"], ["text", "#label"], ["text", "#status"])
  network = infer.load(name)
  wanted = infer.read_images([path], network.program.source_shape,
                             infer.shrinks(network.program))
  np.testing.assert_array_equal(np.array(pixels, np.uint8), wanted.ravel())
  prediction, = network.predict(wanted)
  assert label == prediction.label
  assert status.startswith(f"The network says {label}, with a probability of ")


def test_decoded_files(visit, page, tmp_path):
  """Every file becomes the pixels of `minw.infer`, on black and on white."""
  files, shape = image_files(tmp_path), (32, 32, 3)
  contents = {name: node.encoded(path.read_bytes()) for name, path in files.items()}
  found, = visit(page("digits_convnet"), ["evaluate", f"""(async () => {{
      const found = {{}};
      for (const [name, text] of Object.entries({json.dumps(contents)})) {{
        const bytes = Uint8Array.from(atob(text), (c) => c.charCodeAt(0));
        const image = await minw.decodeImage(new Blob([bytes]));
        found[name] = [0, 255].map((gray) => [...minw.preprocess(
          image, {{ shape: {list(shape)}, shrinks: true }},
          {{ background: [gray, gray, gray] }})]);
      }}
      return found;
  }})()"""])
  for name, path in files.items():
    for pixels, background in zip(found[name], ("black", "white")):
      np.testing.assert_array_equal(
          np.uint8(pixels).reshape(shape),
          infer.read_image(path, shape, background=background), err_msg=name)


def test_samples(visit, page):
  found = visit(page("digits_convnet"), *(step for label in "7340" for step in (
      ["click", f"[aria-label='Sample {label}']"], ["settle"], ["text", "#label"])))
  assert found == list("7340")


def test_drawing_after_an_image(visit, page):
  """The drawing takes the place of the image, and begins empty."""
  found = visit(page("digits_convnet"),
                *until_there_are_pixels(["give", "drop", *file_of(photo(90, 90))]),
                ["draw", DIGITS["3"]], ["settle"], ["text", "#label"])
  assert found == ["3"]


@pytest.mark.parametrize("content, name, message", [
    (b"text", "notes.txt", '"notes.txt" is not an image that this browser can read.'),
    (b"text", "net.minw", '"net.minw" is not a network that can be run: '),
])
def test_files_that_cannot_be_read(visit, page, content, name, message):
  """An error is shown until there is a picture."""
  text = base64.b64encode(content).decode()
  alert, label, is_visible = visit(
      page("digits_convnet"), ["give", "drop", name, "", text],
      ["waitFor", "!get('alert').hidden"], ["text", "#alert"],
      ["click", "[aria-label='Sample 4']"], ["settle"], ["text", "#label"],
      ["isVisible", "#alert"])
  assert alert.startswith(message)
  assert (label, is_visible) == ("4", False)


def test_another_network(visit, page):
  content = infer.shipped()["cifar10_convnet_a_quarter"].read_bytes()
  text = base64.b64encode(content).decode()
  before, title, brand, bars, draws = visit(
      page("digits_convnet"), ["text", "h1"],
      ["give", "drop", "own.minw", "", text], ["waitFor", "state.net.shape[2] === 3"],
      ["settle"], ["text", "h1"], ["text", "#brand"], ["texts", ".bars .name"],
      ["isVisible", "#clear"])
  assert (before, title) == ("Draw a digit", "Show it a picture")
  assert brand == "minw · cifar10, W1A1"
  assert bars == list(infer.load("cifar10_convnet_a_quarter").labels)
  assert not draws


def test_many_classes(visit, page):
  """The bars are those of the ten likeliest labels."""
  rng = np.random.default_rng(0)
  kernel = rng.integers(0, 2, (50, 4, 4, 1)).astype(np.int8) * 2 - 1
  ones, zeros = np.ones(50, np.float32), np.zeros(50, np.float32)
  ops = (packed.Conv("fc", 0, 1, kernel),
         packed.Logits("norm", 1, 2.0**-8, ones, ones, zeros))
  labels = [f"label {i}" for i in range(50)]
  program = packed.Program((4, 4, 1), (4, 4), np.array([7], np.uint8), 50, ops,
                           {"labels": labels})
  image = images(program, 1)
  names, percents = visit(page(program), use(image), ["settle"],
                          ["texts", ".bars .name"], ["texts", ".bars .value"])
  scores = infer.probabilities(
      infer.Network(packed.to_bytes(program)).logits(image))[0]
  order = np.argsort(-scores, kind="stable")[:10]
  assert names == [labels[i] for i in order]
  assert percents == [f"{100 * scores[i]:.1f}%" for i in order]


# The camera.


@pytest.mark.parametrize("name", ["digits_convnet", "cifar10_convnet_a_quarter"])
def test_camera(visit, page, name):
  """The picture changes with the camera's until it is taken."""
  watch = ["evaluate", "[...state.pixels].join()"]
  moved = ["waitFor", "[...state.pixels].join() !== globalThis.seen"]
  first, focus, last, taken, visible, is_on, status = visit(
      page(name), *until_there_are_pixels(["click", "#camera"]), watch,
      ["evaluate", "globalThis.seen = [...state.pixels].join(); null"], moved,
      ["evaluate", "document.activeElement.id"], ["click", "#take"], watch, ["settle"],
      ["evaluate", "new Promise((end) => setTimeout(end, 400))"], watch,
      ["isVisible", "#take"], ["evaluate", "state.stream !== null"],
      ["text", "#status"], flags=CAMERA)
  assert focus == "take"
  assert first != last == taken
  assert (visible, is_on) == (False, False)
  assert status.startswith("The network says ")


def test_camera_that_is_refused(visit, page):
  alert, button = visit(
      page("digits_convnet"), ["click", "#camera"],
      ["waitFor", "!get('alert').hidden"], ["text", "#alert"], ["text", "#camera"],
      flags=["--deny-permission-prompts"])
  assert alert.startswith("The camera cannot be used: ")
  assert button == "Use the camera"


# The page.


@pytest.fixture
def server(page):
  """The address at which the page of the digits network is served."""
  folder = pathlib.Path(page("digits_convnet").removeprefix("file://")).parent
  with served(folder) as address:
    yield address


def test_page_of_a_server(visit, server):
  found = visit(server, ["draw", DIGITS["2"]], ["settle"], ["text", "#label"],
                *until_there_are_pixels(["give", "drop", *file_of(photo(64, 64))]),
                *until_there_are_pixels(["click", "#camera"]), ["click", "#take"],
                ["isVisible", "#take"], flags=CAMERA)
  assert found == ["2", False]


def test_nothing_is_sent(visit, server):
  """The policy of the page refuses every request."""
  found = visit(
      server, ["evaluate", "fetch(location.href).then(() => 'sent', () => 'refused')"],
      messages=["Content Security Policy"] * 2)
  assert found == ["refused"]


GUIDE = (ROOT / "docs/howto/web.md").read_text()
POLICY, = re.findall("^Content-Security-Policy: (.*)$", GUIDE, re.MULTILINE)


def own_page(browser, folder, program, contents=None, policy=""):
  """Runs a program on an empty page beside minw.js and the digits network.

  The result is that of tests/web/page.mjs for a visit of one step.
  """
  digits = web.contents(infer.load("digits_convnet").program, "digits", {})
  web.write(folder, digits | {"own.html": b"<!doctype html>"} | (contents or {}))
  with served(folder, policy) as address:
    visits = [{"url": f"{address}own.html", "steps": [["evaluate", program]]}]
    found, = json.loads(node.run("node", node.SCRIPTS / "page.mjs", *browser,
                                 input=json.dumps(visits)))
  return found


@pytest.mark.parametrize("missing", ["", "'wasm-unsafe-eval'", "connect-src 'self'"])
def test_policy_of_the_guide(browser, tmp_path, missing):
  """Pages with minw.js work under the policy of the guide, but not under less."""
  program = """import("/minw.js").then(({ load }) => load("/net.minw")).then(
      (net) => [...net.logits(new Uint8Array(64))], () => "refused")"""
  assert missing in POLICY
  policy = f"default-src 'none'; {POLICY.replace(missing, '')}"
  found = own_page(browser, tmp_path / "web", program, policy=policy)
  if missing:
    assert found["results"] == ["refused"]
    return
  assert found["messages"] == []
  logits = infer.load("digits_convnet").logits(np.zeros((1, 8, 8, 1), np.uint8))
  np.testing.assert_array_equal(np.float32(found["results"]), logits)


WORKER = """
import { decodeImage, load, preprocess } from "./minw.js";
addEventListener("message", async ({ data }) => {
  const net = await load("net.minw");
  postMessage([...net.logits(preprocess(await decodeImage(data), net))]);
});
"""


def test_worker(browser, tmp_path):
  """A worker decodes an image file and classifies it."""
  photo(90, 70).save(tmp_path / "photo.png")
  program = """fetch("photo.png").then((file) => file.blob()).then((file) =>
      new Promise((resolve, reject) => {
        const worker = new Worker("worker.js", { type: "module" });
        worker.onmessage = ({ data }) => resolve(data);
        worker.onerror = reject;
        worker.postMessage(file);
      }))"""
  found = own_page(browser, tmp_path / "web", program, {
      "worker.js": WORKER.encode(),
      "photo.png": (tmp_path / "photo.png").read_bytes()})
  pixels = infer.read_image(tmp_path / "photo.png", (8, 8, 1))
  np.testing.assert_array_equal(
      np.float32(found["results"]), infer.load("digits_convnet").logits(pixels[None]))


@pytest.mark.parametrize("screen", [PHONE, DESKTOP])
@pytest.mark.parametrize("name", sorted(infer.shipped()))
def test_nothing_is_wider_than_the_screen(visit, page, screen, name):
  width, parts = visit(
      page(name), ["evaluate", "document.documentElement.scrollWidth"],
      ["evaluate", """Array.from(document.querySelectorAll("main *, footer *"))
          .filter((part) => !part.closest(".scroll, .wide, .unseen"))
          .filter((part) => part.getBoundingClientRect().right > innerWidth)
          .map((part) => part.outerHTML)"""], **screen)
  assert width == screen["viewport"]["width"]
  assert parts == []


def test_narrower_window_shows_narrower_pictures(visit, page):
  width = ["evaluate", "document.documentElement.scrollWidth"]
  found = visit(page("digits_convnet"), width, ["resize", 360, 740], ["settle"], width,
                **DESKTOP)
  assert found == [1280, 360]


def test_keyboard(visit, page):
  """Every control has the focus once, and shows it; keys do what the mouse does."""
  found, label, flips = visit(
      page("digits_convnet"), ["tabs"],
      ["evaluate", "document.querySelector('[aria-label=\"Sample 6\"]').focus()"],
      ["press", "Enter"], ["settle"], ["text", "#label"],
      ["evaluate", "get('flips').focus()"], ["press", "ArrowRight"],
      ["press", "ArrowRight"], ["settle"], ["text", "#flips-text"], **DESKTOP)
  assert [entry["id"] or entry["name"] for entry in found] == [
      "clear", "file", "camera", *(f"Sample {i}" for i in range(10)), "flips",
      "network"]
  assert all(entry["outline"] >= 2 for entry in found)
  assert label == "6"
  assert flips.startswith("2 flipped pixels of 64 changed ")


def test_keyboard_reaches_pictures_that_scroll(visit, page):
  found, keys = visit(page("cifar10_convnet_d_24epochs"), ["tabs"],
                      ["texts", ".key"], **PHONE)
  names = [entry["name"] for entry in found if entry["name"].startswith("Weights of ")]
  assert "Weights of conv6" in names and "Weights of conv1" not in names
  assert keys == ["1", "−1", "changed by the flips"]


# What is needed to compute the contrast of each text with what is behind it.
TEXTS = """Array.from(document.querySelectorAll("body *"))
  .filter((part) => Array.from(part.childNodes).some(
    (node) => node.nodeType === Node.TEXT_NODE && node.data.trim()))
  .filter((part) => part.checkVisibility() && !part.closest("script, .unseen, .prompt"))
  .map((part) => {
    const style = getComputedStyle(part);
    let behind = part;
    while (getComputedStyle(behind).backgroundColor === "rgba(0, 0, 0, 0)") {
      behind = behind.parentElement;
    }
    return { text: part.textContent, color: style.color,
             background: getComputedStyle(behind).backgroundColor };
  })"""


def luminance(color):
  """The relative luminance of WCAG 2."""
  parts = np.array([int(part) for part in color[4:-1].split(",")]) / 255
  linear = np.where(parts <= .03928, parts / 12.92, ((parts + .055) / 1.055) ** 2.4)
  return linear @ [.2126, .7152, .0722]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_contrast(visit, page, scheme):
  """Every text has a contrast of 4.5, which level AA asks for."""
  found, = visit(page("cifar10_convnet_a_quarter_2bit"), ["evaluate", TEXTS],
                 colorScheme=scheme)
  assert len(found) > 80
  is_dark = luminance(found[0]["background"]) < .1
  assert is_dark == (scheme == "dark")
  for entry in found:
    dark, light = sorted(luminance(entry[key]) for key in ("color", "background"))
    assert (light + .05) / (dark + .05) >= 4.5, entry


def test_reduced_motion(visit, page):
  read = ["evaluate", "getComputedStyle(document.querySelector('.fill'))"
                      ".transitionDuration"]
  assert visit(page("digits_convnet"), read) == ["0.15s"]
  assert visit(page("digits_convnet"), read, reducedMotion="reduce") == ["0s"]


def test_screen_readers(visit, page):
  """Pictures have names, the result is said once, and headings have no gap."""
  names, said, levels, slider = visit(
      page("digits_convnet"),
      ["evaluate", "Array.from(document.querySelectorAll('main canvas'), (canvas) =>"
                   " (canvas.closest('button') ?? canvas).ariaLabel)"],
      ["click", "[aria-label='Sample 5']"], ["settle"],
      ["text", "#status[role=status]"],
      ["evaluate", "Array.from(document.querySelectorAll('h1,h2,h3,h4'), (heading) =>"
                   " Number(heading.tagName[1]))"],
      slide(1), ["settle"], ["evaluate", "get('flips').ariaValueText"])
  assert all(names)
  assert said.startswith("The network says 5, with a probability of ")
  assert levels[0] == levels.count(1) == 1
  assert max(np.diff(levels)) == 1
  assert slider == "1 pixel"
