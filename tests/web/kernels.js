// Runs networks in minw.wasm, in Node or on a page, and lists checksums of all values.
//
// The input is {module, cases}: the module in base64, and for each case [network, image]
// in base64. The output is a list of CRC-32 for each case: those of the values of the
// unfused plan in their order, then that of the logits. Node reads the input from the
// standard input. A page has it in `input`, and becomes the output.
"use strict";

const table = Array.from({ length: 256 }, (_, index) => {
  let entry = index;
  for (let i = 0; i < 8; i++) entry = (entry >>> 1) ^ (entry & 1 ? 0xedb88320 : 0);
  return entry;
});

function crc32(bytes) {
  let crc = ~0;
  for (const byte of bytes) crc = (crc >>> 8) ^ table[(crc ^ byte) & 255];
  return ~crc >>> 0;
}

const decoded = (text) => Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));

function checksums(module, network, image) {
  const { exports } = new WebAssembly.Instance(module, {
    env: { minw_throw() { throw new Error("the network is refused"); } },
    wasi_snapshot_preview1: { clock_time_get: () => 0 },
  });
  const bytes = (at, size) => new Uint8Array(exports.memory.buffer, at >>> 0, size);
  const put = (data) => {
    const at = exports.minw_allocate(data.length);
    bytes(at, data.length).set(data);
    return at;
  };
  exports._initialize();
  const net = exports.minw_load(put(network), network.length, 0, 0);
  const pixels = put(image);
  const shape = exports.minw_allocate(20);
  const sizes = Array.from({ length: exports.minw_num_ops(net) + 1 }, (_, value) => {
    exports.minw_value_shape(shape, net, value);
    const [height, width, channels] =
      new Uint32Array(exports.memory.buffer, shape >>> 0, 3);
    return 4 * height * width * channels;
  });
  const places = sizes.map((size) => exports.minw_allocate(size));
  const pointers = put(new Uint8Array(Uint32Array.from(places).buffer));
  exports.minw_values(net, pixels, 1, pointers, 0, 0);
  const found = places.map((at, i) => crc32(bytes(at, sizes[i])));
  const size = 4 * exports.minw_classes(net);
  const logits = exports.minw_allocate(size);
  exports.minw_logits(net, pixels, 1, logits, 1, 0, 0);
  return [...found, crc32(bytes(logits, size))];
}

function output({ module, cases }) {
  const compiled = new WebAssembly.Module(decoded(module));
  return JSON.stringify(cases.map(([network, image]) =>
    checksums(compiled, decoded(network), decoded(image))));
}

if (typeof document === "undefined") {
  const text = require("node:fs").readFileSync(0, "utf8");
  process.stdout.write(output(JSON.parse(text)));
} else {
  document.body.textContent = output(input);
}
