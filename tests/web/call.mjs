// Calls the JavaScript library as tests ask: node call.mjs LIBRARY < CALLS > RESULTS.
//
// LIBRARY is the path of minw.js, or of a classic script. CALLS is a JSON list of
// [function of this file, argument]. RESULTS holds what each call returns or throws.
import { readFileSync } from "node:fs";
import { pathToFileURL } from "node:url";
import { runInThisContext } from "node:vm";

const [path] = process.argv.slice(2);
const isClassic = path.endsWith("classic.js");
const minw = isClassic ? classic() : await import(pathToFileURL(path));

function classic() {
  runInThisContext(readFileSync(path, "utf8"));
  return globalThis.minw;
}

const bytes = (text) => new Uint8Array(Buffer.from(text, "base64"));
const base64 = (array) =>
  Buffer.from(array.buffer, array.byteOffset, array.byteLength).toString("base64");

/** What `init` and `load` take: bytes in base64 after "data:", or a path. */
const source = (text) => (text.startsWith("data:") ? bytes(text.slice(5)) : text);

const functions = {
  async init(wasm) {
    await minw.init(source(wasm));
  },

  /** What `init` compiles of bytes if there is relaxed SIMD or not, and the bytes. */
  async compiled({ wasm, relaxed }) {
    const { compile, validate } = WebAssembly;
    const given = bytes(wasm);
    let code;
    WebAssembly.validate = () => relaxed;
    WebAssembly.compile = async (made) => { code = made; };
    await minw.init(given);
    Object.assign(WebAssembly, { compile, validate });
    await minw.init();
    return [code, given].map(base64);
  },

  /** Loads a network and runs images: what the network says of itself, and results. */
  async run({ net, images, values = true }) {
    const network = await minw.load(source(net));
    const pixels = bytes(images);
    const size = network.shape.reduce((a, b) => a * b);
    return {
      ...network,
      memory: network.memory,
      operations: network.operations.map((operation) => ({
        ...operation,
        weights: operation.weights && {
          ...operation.weights,
          planes: operation.weights.planes().map(base64),
          codes: operation.weights.bits > 3 ? null : base64(operation.weights.codes()),
        },
      })),
      logits: base64(network.logits(pixels)),
      values: values && Array.from({ length: pixels.length / size }, (_, i) =>
        network.values(pixels.subarray(i * size, (i + 1) * size)).map((value) =>
          ({ ...value, data: base64(value.data), type: value.data.constructor.name }))),
    };
  },

  /** The memory of a network after some calls and after many. */
  async memory({ net, calls }) {
    const network = await minw.load(source(net));
    const image = new Uint8Array(network.shape.reduce((a, b) => a * b));
    const sizes = [];
    for (let i = 0; i < calls; i++) {
      network.logits(image);
      network.values(image);
      sizes.push(network.memory);
    }
    return sizes;
  },

  async closed(net) {
    const network = await minw.load(source(net));
    network.close();
    network.logits(new Uint8Array(network.shape.reduce((a, b) => a * b)));
  },

  async logits({ net, length, type }) {
    const network = await minw.load(source(net));
    return network.logits(new globalThis[type](length)).length;
  },

  probabilities: (logits) => [...minw.probabilities(Float32Array.from(logits))],

  preprocess: ({ data, width, height, shape, shrinks, options }) => base64(
    minw.preprocess({ data: bytes(data), width, height }, { shape, shrinks }, options)),

  unpack: async (text) => base64(await minw.unpack(text)),
};

const calls = JSON.parse(readFileSync(0, "utf8"));
const results = [];
for (const [name, argument] of calls) {
  try {
    results.push({ result: await functions[name](argument) });
  } catch (error) {
    results.push({ error: error.message, type: error.constructor.name });
  }
}
process.stdout.write(JSON.stringify(results));
