// Loads a network in a worker: node worker.mjs LIBRARY NET. It prints logits of zeros.
import { fileURLToPath, pathToFileURL } from "node:url";
import { isMainThread, parentPort, Worker, workerData } from "node:worker_threads";

if (isMainThread) {
  const worker = new Worker(fileURLToPath(import.meta.url), {
    workerData: process.argv.slice(2),
  });
  worker.on("message", (logits) => console.log(JSON.stringify([...logits])));
} else {
  const [library, path] = workerData;
  const { load } = await import(pathToFileURL(library));
  const network = await load(pathToFileURL(path));
  parentPort.postMessage(network.logits(new Uint8Array(64)));
}
