// Opens pages in Firefox, by WebDriver BiDi, as tests ask:
//
//   node firefox.mjs PUPPETEER FIREFOX < VISITS > RESULTS
//
// PUPPETEER is the folder of puppeteer-core, and FIREFOX the browser's executable.
// VISITS is a JSON list of {url, steps} with preferences of the browser, `prefs`. Each
// visit has a browser of its own. A step is [function of this file, arguments...].
// RESULTS holds for each visit what its steps returned, what the page wrote to the
// console, and its requests, without URLs of data.
import { readFileSync } from "node:fs";
import { createRequire } from "node:module";

const [puppeteer, executablePath] = process.argv.slice(2);
const { launch } = createRequire(import.meta.url)(puppeteer);

const steps = {
  evaluate: (page, expression) => page.evaluate(expression),
  click: (page, selector) => page.click(selector),

  /** Waits until the result belongs to the picture. */
  settle: (page) => page.waitForSelector("#result[aria-busy=false]").then(() => {}),
};

async function visit({ url, steps: wanted, prefs = {} }) {
  const browser = await launch({
    browser: "firefox", executablePath, headless: true, extraPrefsFirefox: prefs });
  try {
    const page = await browser.newPage();
    const [messages, requests] = [[], []];
    page.on("console", (message) => messages.push(message.text()));
    page.on("pageerror", (error) => messages.push(String(error)));
    page.on("request", (request) => requests.push(request.url()));
    await page.goto(url);
    const results = [];
    for (const [name, ...args] of wanted) {
      results.push(await steps[name](page, ...args) ?? null);
    }
    return {
      results, messages, requests: requests.filter((to) => !to.startsWith("data:")) };
  } finally {
    await browser.close();
  }
}

const results = [];
for (const wanted of JSON.parse(readFileSync(0, "utf8"))) {
  results.push(await visit(wanted));
}
process.stdout.write(JSON.stringify(results));
