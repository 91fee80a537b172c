// Opens pages in Firefox, by WebDriver BiDi, as tests ask:
//
//   node firefox.mjs PUPPETEER FIREFOX < VISITS > RESULTS
//
// PUPPETEER is the folder of puppeteer-core, and FIREFOX the browser's executable.
// VISITS is a JSON list of {url, steps} with preferences of the browser, `prefs`. Each
// visit has a browser of its own. A step is [function of visits.mjs, arguments...].
// RESULTS holds for each visit what its steps returned, what the page wrote to the
// console, and its requests, without URLs of data.
import { createRequire } from "node:module";

import { answer, common, visit } from "./visits.mjs";

const [puppeteer, executablePath] = process.argv.slice(2);
const { launch } = createRequire(import.meta.url)(puppeteer);

await answer(async ({ prefs = {}, ...wanted }) => {
  const browser = await launch({
    browser: "firefox", executablePath, headless: true, extraPrefsFirefox: prefs });
  try {
    const { requests, ...found } = await visit(await browser.newPage(), common, wanted);
    return { ...found, requests: requests.filter((to) => !to.startsWith("data:")) };
  } finally {
    await browser.close();
  }
});
