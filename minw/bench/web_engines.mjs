// The engines that `minw.bench web` times. This module runs in Node and in web pages.

const node = globalThis.process?.versions?.node;
const runs = {}; // Functions that compute an image, by the names of their engines.

/** Reads a file beside this module. */
async function read(name) {
  const url = new URL(name, import.meta.url);
  if (node) return new Uint8Array(await (await import("node:fs/promises")).readFile(url));
  return new Uint8Array(await (await fetch(url)).arrayBuffer());
}

/** Starts the packed network with vector instructions, "simd128" or "relaxed-simd". */
async function startMinw(isa) {
  const { init, load } = await import("./minw.js");
  // The library takes a compiled module as it is, and otherwise relaxed SIMD if it can.
  const compiled = isa === "simd128"
    ? read("minw.wasm").then((wasm) => WebAssembly.compile(wasm)).then(init) : init();
  const [content, image] = await Promise.all([
    read("network.minw"), read("image.bin"), compiled]);
  const network = await load(content);
  if (network.isa !== isa) throw new Error("there is no relaxed SIMD");
  network.logits(image);
  return () => network.logits(image);
}

/** Checks that the packed network's logits are those of the native kernels. */
async function checkMinw(name) {
  const logits = runs[name]();
  const expected = new Float32Array((await read("logits.bin")).buffer);
  if (logits.length !== expected.length || logits.some((x, i) => x !== expected[i])) {
    throw new Error("its logits are not those of the native kernels");
  }
}

/** Starts a network of ONNX Runtime on one thread. */
async function startOnnx(file, type, toTensor, url, shape) {
  const ort = await import(url);
  ort.env.wasm.numThreads = 1;
  const [session, image] = await Promise.all([
    read(file).then((model) =>
      ort.InferenceSession.create(model, { executionProviders: ["wasm"] })),
    read(`${type}.bin`)]);
  const x = new ort.Tensor(type, toTensor(image), shape);
  await session.run({ x });
  return () => session.run({ x });
}

/**
 * Starts an engine and computes an image.
 *
 * @param name "simd128" or "relaxed-simd" for the packed network, "float32" or "int8".
 * @param ort URL of ONNX Runtime's module.
 * @param shape Shape of the images of ONNX Runtime.
 * @returns Milliseconds that this took, with loading the engine and the network.
 */
export async function start(name, ort, shape) {
  const began = performance.now();
  runs[name] = await {
    simd128: () => startMinw(name),
    "relaxed-simd": () => startMinw(name),
    float32: () => startOnnx(
      "float32.onnx", "float32", (bytes) => new Float32Array(bytes.buffer), ort, shape),
    int8: () => startOnnx("int8.onnx", "uint8", (bytes) => bytes, ort, shape),
  }[name]();
  const milliseconds = performance.now() - began;
  if (name.includes("simd")) await checkMinw(name);
  return milliseconds;
}

/** Returns how many times an engine computes an image in about 0.2 seconds. */
export async function count(name) {
  for (let n = 1; ; n *= 2) {
    const milliseconds = await run(name, n);
    if (milliseconds > 100) return Math.ceil((200 * n) / milliseconds);
  }
}

/** Computes an image `count` times, and returns the milliseconds that this took. */
export async function run(name, count) {
  const began = performance.now();
  for (let i = 0; i < count; i++) await runs[name]();
  return performance.now() - began;
}
