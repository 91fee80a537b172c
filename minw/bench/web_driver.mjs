// Runs the engines of web_engines.mjs in Node or in Chromium, as `minw.bench web` asks.
//
//   node web_driver.mjs FOLDER MODULES CHROMIUM
//
// FOLDER holds web_engines.mjs and its files, and MODULES is a folder node_modules.
// CHROMIUM is the browser's executable, or "" for Node. Each line of the input is a
// command, an array in JSON. Each is answered by a line: {"result": ...} or
// {"error": "..."}.
//
//   ["about"]             versions
//   ["cold", NAME, SHAPE] milliseconds to the first result, in a new process or page
//   ["start", NAME, SHAPE]
//   ["count", NAME]       number of images in about 0.2 seconds
//   ["run", NAME, COUNT]  seconds of CPU time, or of elapsed time where it is unknown

import { fork } from "node:child_process";
import { existsSync, readdirSync, readFileSync } from "node:fs";
import { readFile } from "node:fs/promises";
import { createServer } from "node:http";
import { createRequire } from "node:module";
import path from "node:path";
import { createInterface } from "node:readline";
import { setTimeout } from "node:timers/promises";
import { fileURLToPath, pathToFileURL } from "node:url";

const TYPES = {
  ".html": "text/html", ".js": "text/javascript", ".mjs": "text/javascript",
  ".wasm": "application/wasm" };

/** Nanoseconds that the threads of processes have run, or null if that is unknown. */
async function cpuTime(ids) {
  await setTimeout(10); // Linux counts the time of a thread when it pauses.
  let total = 0;
  for (const id of ids) {
    const tasks = `/proc/${id}/task`;
    if (!existsSync(`${tasks}/${id}/schedstat`)) return null;
    for (const task of readdirSync(tasks)) {
      try {
        const [time] = readFileSync(`${tasks}/${task}/schedstat`, "utf8").split(" ");
        total += Number(time);
      } catch {
        // The thread has ended.
      }
    }
  }
  return total;
}

function version(modules, name) {
  return JSON.parse(readFileSync(path.join(modules, name, "package.json"))).version;
}

/** A process of Node. `call` passes a function's name and arguments to its engines. */
class Process {
  constructor(folder, modules) {
    this.engines = pathToFileURL(path.join(folder, "web_engines.mjs")).href;
    this.onnx = pathToFileURL(
      path.join(modules, "onnxruntime-web/dist/ort.node.min.mjs")).href;
    this.child = fork(fileURLToPath(import.meta.url), ["--child"]);
    this.ids = [this.child.pid];
  }

  call(name, ...args) {
    return new Promise((resolve, reject) => {
      this.child.once("message", ({ result, error }) =>
        error === undefined ? resolve(result) : reject(new Error(error)));
      this.child.send([this.engines, name, ...args]);
    });
  }

  async close() {
    this.child.kill();
  }
}

/** What a `Process` runs. */
function child() {
  process.on("message", async ([engines, name, ...args]) => {
    try {
      process.send({ result: await (await import(engines))[name](...args) });
    } catch (error) {
      process.send({ error: String(error?.message ?? error) });
    }
  });
}

/** Makes processes of Node. */
function nodeMaker(folder, modules) {
  return {
    open: async () => new Process(folder, modules),
    about: { node: process.versions.node },
    close: async () => {},
  };
}

/** Serves FOLDER, and ONNX Runtime under /ort/; returns the server. */
function serve(folder, modules) {
  const server = createServer(async (request, response) => {
    const name = decodeURIComponent(request.url.split("?")[0]);
    const file = name.startsWith("/ort/")
      ? path.join(modules, "onnxruntime-web/dist", path.basename(name))
      : path.join(folder, path.basename(name));
    try {
      const content = name === "/" ? "<!doctype html>" : await readFile(file);
      const type = name === "/" ? "text/html" : TYPES[path.extname(name)];
      response.writeHead(200, { "Content-Type": type ?? "application/octet-stream" });
      response.end(content);
    } catch {
      response.writeHead(404).end();
    }
  });
  return new Promise((resolve) => {
    server.listen(0, "127.0.0.1", () => resolve(server));
  });
}

/** Makes pages of Chromium, each in a process and with a cache of its own. */
async function chromiumMaker(folder, modules, executable) {
  const { chromium } = createRequire(path.join(modules, "x.js"))("playwright-core");
  const browser = await chromium.launch({
    executablePath: executable, chromiumSandbox: process.getuid?.() !== 0 });
  const server = await serve(folder, modules);
  const address = `http://127.0.0.1:${server.address().port}/`;
  const onnx = `${address}ort/ort.wasm.min.mjs`;
  const call = ([name, ...args]) =>
    import("/web_engines.mjs").then((engines) => engines[name](...args));
  async function open() {
    const context = await browser.newContext();
    const page = await context.newPage();
    await page.goto(address);
    return {
      // Chromium does not tell which of its processes runs this page. The others pause.
      ids: await renderers(browser), onnx,
      call: (...args) => page.evaluate(call, args), close: () => context.close() };
  }
  async function close() {
    await browser.close();
    server.close();
  }
  return { open, close, about: { chromium: browser.version() } };
}

/** Ids of the processes that run pages. */
async function renderers(browser) {
  const session = await browser.newBrowserCDPSession();
  const { processInfo } = await session.send("SystemInfo.getProcessInfo");
  await session.detach();
  return processInfo.filter(({ type }) => type === "renderer").map(({ id }) => id);
}

async function main(folder, modules, executable) {
  const maker = executable
    ? await chromiumMaker(folder, modules, executable) : nodeMaker(folder, modules);
  const main = await maker.open();
  const commands = {
    about: async () => ({
      ...maker.about, "onnxruntime-web": version(modules, "onnxruntime-web") }),
    cold: async (name, shape) => {
      const other = await maker.open();
      try {
        return await other.call("start", name, other.onnx, shape);
      } finally {
        await other.close();
      }
    },
    start: (name, shape) => main.call("start", name, main.onnx, shape),
    count: (name) => main.call("count", name),
    run: async (name, count) => {
      const before = await cpuTime(main.ids);
      const elapsed = await main.call("run", name, count);
      return before === null ? elapsed / 1e3 : (await cpuTime(main.ids) - before) / 1e9;
    },
  };
  for await (const line of createInterface({ input: process.stdin })) {
    const [name, ...args] = JSON.parse(line);
    const answer = await commands[name](...args).then(
      (result) => ({ result }), (error) => ({ error: String(error.message) }));
    process.stdout.write(`${JSON.stringify(answer)}\n`);
  }
  await main.close();
  await maker.close();
}

if (process.argv[2] === "--child") child();
else await main(...process.argv.slice(2));
