"""The page of an exported network in Firefox: it equals the native engine there too."""

import json

import numpy as np
import pytest

from c_programs import tool
from minw import infer
from minw.export import web
import node
from web_pages import image_files
from web_pages import npm_package
from web_pages import served
from web_pages import write_digits

pytestmark = [pytest.mark.slow, node.needs_node]

PUPPETEER = "puppeteer-core@24.43.1"
WITHOUT_RELAXED_SIMD = {"javascript.options.wasm_relaxed_simd": False}


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
  """The arguments of tests/web/firefox.mjs: puppeteer-core and the executable."""
  executable = tool("firefox", "firefox-esr")
  return npm_package(tmp_path_factory.mktemp("puppeteer"), PUPPETEER), executable


@pytest.fixture(scope="module")
def visit(browser):
  """visit(url, *steps, prefs): what the steps return, and the requests of the page.

  tests/web/firefox.mjs says which steps there are. The page must write nothing to the
  console. Firefox writes there, sooner or later, that it `refuses` a request of a step.
  """
  def run(url, *steps, prefs=None, refuses=None):
    wanted = [{"url": url, "steps": [["settle"], *steps], "prefs": prefs or {}}]
    found, = json.loads(node.run(
        "node", node.SCRIPTS / "firefox.mjs", *browser, input=json.dumps(wanted)))
    assert [text for text in found["messages"]
            if not (refuses and f"({refuses})" in text)] == []
    return [result for result in found["results"] if result is not None], (
        found["requests"])
  return run


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  """The folder of the digits network."""
  return write_digits(tmp_path_factory.mktemp("web") / "digits")


LOGITS = """
  JSON.parse(get("minw-data").textContent).samples.map(({ pixels }) => [
    ...state.net.logits(Uint8Array.from(atob(pixels), (c) => c.charCodeAt(0)))])"""
# What the page says of the sample 7, and the logits of all samples.
LABEL = [["click", "[aria-label='Sample 7']"], ["settle"],
         ["evaluate", "get('label').textContent"], ["evaluate", "state.net.isa"],
         ["evaluate", LOGITS]]


def check(found):
  label, isa, logits = found
  network = infer.load("digits_convnet", backend="native")
  samples = web.own_samples(network.program)
  images = np.stack([*samples.values()]).reshape(-1, 8, 8, 1)
  assert label == "7"
  np.testing.assert_array_equal(np.float32(logits), network.logits(images), strict=True)
  return isa


def test_page_of_a_file(visit, folder):
  found, requests = visit((folder / "index.html").as_uri(), *LABEL)
  assert check(found) in ("simd128", "relaxed-simd")
  assert requests == []  # Firefox reports none for files.


def test_page_of_a_server(visit, folder):
  with served(folder) as address:
    found, requests = visit(address, *LABEL, [
        "evaluate", "fetch(location.href).then(() => 'sent', () => 'refused')"],
        refuses="connect-src")
  assert found.pop() == "refused"
  check(found)
  assert requests == [address]


def test_browser_without_relaxed_simd(visit, folder):
  found, _ = visit((folder / "index.html").as_uri(), *LABEL, prefs=WITHOUT_RELAXED_SIMD)
  assert check(found) == "simd128"


# Files of which some pixels differ by 1. Firefox rounds the colors of partly
# transparent pixels in another way, and cuts off the lower bits of 16.
ROUNDED = {"P.png", "RGBA.png", "LA.png", "16.png"}


def test_decoded_files(visit, folder, tmp_path):
  """Files become the pixels of `minw.infer`, by `decodeImage` and as an ImageBitmap."""
  files, shape = image_files(tmp_path), (32, 32, 3)
  contents = {name: node.encoded(path.read_bytes()) for name, path in files.items()}
  (found,), _ = visit((folder / "index.html").as_uri(), ["evaluate", f"""(async () => {{
      const found = {{}};
      for (const [name, text] of Object.entries({json.dumps(contents)})) {{
        const bytes = Uint8Array.from(atob(text), (c) => c.charCodeAt(0));
        const file = new Blob([bytes]);
        const images = [await minw.decodeImage(file), await createImageBitmap(file)];
        found[name] = [0, 255].map((gray) => images.map((image) =>
          [...minw.preprocess(image, {{ shape: {list(shape)}, shrinks: true }},
            {{ background: [gray, gray, gray] }})]));
      }}
      return found;
  }})()"""])
  for name, path in files.items():
    for images, background in zip(found[name], ("black", "white"), strict=True):
      wanted = infer.read_image(path, shape, background=background)
      for pixels in images:
        np.testing.assert_allclose(
            np.array(pixels).reshape(shape), wanted.astype(int), rtol=0,
            atol=1 if name in ROUNDED else 0, err_msg=f"{name} on {background}")
