// What the programs that open pages in a browser share.
import { readFileSync } from "node:fs";

/**
 * Goes to the page of a visit in an empty tab and does its steps.
 *
 * @param page A page of Playwright or Puppeteer, which is closed with its browser.
 * @param steps Functions of a page and arguments, by name.
 * @param visit The URL, and the steps as [name, arguments...].
 * @returns What the steps returned, what the page wrote to the console, and the URLs of
 *   its requests.
 */
export async function visit(page, steps, { url, steps: wanted }) {
  const [messages, requests] = [[], []];
  page.on("console", (message) => messages.push(message.text()));
  page.on("pageerror", (error) => messages.push(String(error)));
  page.on("request", (request) => requests.push(request.url()));
  await page.goto(url);
  const results = [];
  for (const [name, ...args] of wanted) {
    results.push(await steps[name](page, ...args) ?? null);
  }
  return { results, messages, requests };
}

/** Reads a JSON list of visits, makes one after another, and writes their results. */
export async function answer(make) {
  const results = [];
  for (const wanted of JSON.parse(readFileSync(0, "utf8"))) {
    results.push(await make(wanted));
  }
  process.stdout.write(JSON.stringify(results));
}

/** The steps of both browsers. */
export const common = {
  evaluate: (page, expression) => page.evaluate(expression),
  click: (page, selector) => page.click(selector),

  /** Waits until the result belongs to the picture. */
  settle: (page) => page.waitForSelector("#result[aria-busy=false]").then(() => {}),
};
