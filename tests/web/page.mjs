// Opens pages in Chromium as tests ask:
//
//   node page.mjs PLAYWRIGHT CHROMIUM < VISITS > RESULTS
//
// PLAYWRIGHT is the folder of playwright-core, and CHROMIUM the browser's executable.
// VISITS is a JSON list of {url, steps} with options of a browser's context and `flags`
// of the browser. Each visit has a browser of its own. A step is [function of this file
// or of visits.mjs, arguments...]. RESULTS holds for each visit what its steps returned,
// what the page wrote to the console, and its requests.
import { createRequire } from "node:module";

import { answer, common, visit } from "./visits.mjs";

const [playwright, executablePath] = process.argv.slice(2);
const { chromium } = createRequire(import.meta.url)(playwright);

const steps = {
  ...common,
  text: (page, selector) => page.textContent(selector),
  texts: (page, selector) => page.locator(selector).allTextContents(),
  isVisible: (page, selector) => page.isVisible(selector),
  press: (page, key) => page.keyboard.press(key),
  resize: (page, width, height) => page.setViewportSize({ width, height }),
  choose: (page, selector, path) => page.setInputFiles(selector, path),

  /** Waits for an expression. The page's policy forbids what Playwright would do. */
  async waitFor(page, expression) {
    for (let i = 0; i < 300 && !await page.evaluate(`Boolean(${expression})`); i++) {
      await page.waitForTimeout(100);
    }
  },

  /** Draws lines with the mouse, in units of the pad's width. */
  async draw(page, strokes) {
    const pad = page.locator("#pad");
    await pad.scrollIntoViewIfNeeded();
    const { x, y, width, height } = await pad.boundingBox();
    const at = (point) => [x + width * point[0], y + height * point[1]];
    for (const [first, ...rest] of strokes) {
      await page.mouse.move(...at(first));
      await page.mouse.down();
      for (const point of rest) await page.mouse.move(...at(point), { steps: 3 });
      await page.mouse.up();
    }
  },

  /** Drops or pastes a file. */
  give(page, event, name, type, content) {
    return page.evaluate(({ event, name, type, content }) => {
      const bytes = Uint8Array.from(atob(content), (letter) => letter.charCodeAt(0));
      const data = new DataTransfer();
      data.items.add(new File([bytes], name, { type }));
      document.body.dispatchEvent(event === "drop"
        ? new DragEvent("drop", { bubbles: true, cancelable: true, dataTransfer: data })
        : new ClipboardEvent("paste", { bubbles: true, clipboardData: data }));
    }, { event, name, type, content });
  },

  /** Presses Tab until the focus is where it was, and describes what had it. */
  async tabs(page) {
    const found = [];
    for (let i = 0; i < 100; i++) {
      await page.keyboard.press("Tab");
      const element = await page.evaluate(() => {
        const { activeElement: focused } = document;
        const shown = focused.closest("label.button") ?? focused;
        return {
          id: focused.id, tag: focused.tagName,
          name: focused.ariaLabel ?? focused.innerText,
          outline: parseFloat(getComputedStyle(shown).outlineWidth),
        };
      });
      if (element.tag === "BODY") break;
      found.push(element);
    }
    return found;
  },
};

await answer(async ({ url, steps: wanted, flags = [], ...options }) => {
  const browser = await chromium.launch({ executablePath, args: flags });
  try {
    const context = await browser.newContext(options);
    const page = await context.newPage();
    page.setDefaultTimeout(30_000);
    return await visit(page, steps, { url, steps: wanted });
  } finally {
    await browser.close();
  }
});
