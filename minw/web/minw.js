// Runs packed networks (.minw) by WebAssembly; minw.d.ts documents the interface.
//
// The file has four parts: the engine's instance, the .minw file, the network, and
// images. Each network has an instance of its own, which is discarded after an error.
// The export also makes a classic script of this file, by lines that begin with
// "export" and by the one that holds import.meta.

// ---- The engine

const WASM = () => new URL("./minw.wasm", import.meta.url);

let compiled = null; // The promise of a module, and its vector instructions.

export function init(wasm = WASM()) {
  const compiling = compile(wasm);
  compiled = compiling;
  compiling.catch(() => {
    if (compiled === compiling) compiled = null; // A later call tries again.
  });
  return compiling.then(() => undefined);
}

async function compile(wasm) {
  if (wasm instanceof WebAssembly.Module) return { module: wasm, isa: "simd128" };
  const bytes = await readBytes(wasm);
  const code = relaxed(bytes);
  const isa = code === bytes ? "simd128" : "relaxed-simd";
  return { module: await WebAssembly.compile(code), isa };
}

// i8x16.swizzle as minw.wasm has it, i8x16.relaxed_swizzle, and a module with the latter.
const SWIZZLE = [0xfd, 0x8e, 0x00];
const RELAXED_SWIZZLE = [0xfd, 0x80, 0x02];
const RELAXED_MODULE = Uint8Array.of(
  0, 97, 115, 109, 1, 0, 0, 0, 1, 5, 1, 96, 0, 1, 123, 3, 2, 1, 0, 10, 15, 1, 13, 0,
  65, 1, 253, 15, 65, 2, 253, 15, ...RELAXED_SWIZZLE, 11);

/**
 * Exchanges the instruction that looks up bytes if there is relaxed SIMD.
 *
 * x86 CPUs need two instructions for i8x16.swizzle, because it defines what indices
 * above 15 give, and one for i8x16.relaxed_swizzle. The engine has no such indices.
 */
function relaxed(bytes) {
  if (!WebAssembly.validate(RELAXED_MODULE)) return bytes;
  const code = bytes.slice();
  // The search is for the second byte, which is much rarer than the first one.
  const [prefix, opcode, end] = SWIZZLE;
  for (let i = code.indexOf(opcode); i >= 0; i = code.indexOf(opcode, i + 1)) {
    if (code[i - 1] === prefix && code[i + 1] === end) code.set(RELAXED_SWIZZLE, i - 1);
  }
  return code;
}

/** An instance of the module, with helpers to move data in and out of its memory. */
class Engine {
  static async create({ module, isa }) {
    const engine = new Engine();
    engine.isa = isa;
    const { exports } = await WebAssembly.instantiate(module, engine.imports());
    engine.exports = exports;
    engine.run(() => exports._initialize());
    return engine;
  }

  /** What the module imports: the end with an error, and a clock. */
  imports() {
    return {
      env: {
        minw_throw: (pointer, length) => {
          throw new Error(this.text(pointer, length));
        },
      },
      wasi_snapshot_preview1: {
        clock_time_get: (clock, precision, result) => {
          const nanoseconds = BigInt(Math.round(performance.now() * 1e6));
          this.view().setBigUint64(result, nanoseconds, true);
          return 0;
        },
      },
    };
  }

  /** Runs a function. If it ends with an error, the instance cannot be used again. */
  run(action) {
    if (!this.exports) {
      throw new Error("the network was closed, or ended with an error");
    }
    try {
      return action(this.exports);
    } catch (error) {
      this.exports = null;
      throw error;
    }
  }

  // The memory may grow in any call, which detaches the views that were made before.

  view() {
    return new DataView(this.exports.memory.buffer);
  }

  /** Allocates a copy of bytes, or of as many bytes as a number says. */
  allocate(content) {
    const size = typeof content === "number" ? content : content.byteLength;
    const pointer = this.exports.minw_allocate(size) >>> 0;
    if (typeof content !== "number") {
      new Uint8Array(this.exports.memory.buffer, pointer, size).set(content);
    }
    return pointer;
  }

  release(...pointers) {
    for (const pointer of pointers) this.exports.minw_release(pointer);
  }

  /** A copy of `length` elements of an array type. */
  copy(Type, pointer, length) {
    return new Type(this.exports.memory.buffer, pointer, length).slice();
  }

  /** A string of UTF-8 of a length, by default up to a byte 0. */
  text(pointer, length) {
    const bytes = new Uint8Array(this.exports.memory.buffer, pointer >>> 0);
    return new TextDecoder().decode(bytes.subarray(0, length ?? bytes.indexOf(0)));
  }

  /** The shape that a function of the C interface returns. */
  shape(name, ...args) {
    const pointer = this.allocate(20);
    this.exports[name](pointer, ...args);
    const [height, width, channels, kind, bits] = this.copy(Uint32Array, pointer, 5);
    this.release(pointer);
    return { shape: [height, width, channels], kind: KINDS[kind], bits };
  }
}

const KINDS = ["int", "code", "float"];

/** The content of what `init` and `load` take. */
async function readBytes(source) {
  if (typeof source === "string" || source instanceof URL) source = fetchUrl(source);
  source = await source;
  if (typeof source?.arrayBuffer === "function") {
    if (source.ok === false) {
      throw new Error(`${source.url} cannot be fetched: HTTP status ${source.status}`);
    }
    source = await source.arrayBuffer();
  }
  if (ArrayBuffer.isView(source)) {
    return new Uint8Array(source.buffer, source.byteOffset, source.byteLength);
  }
  if (/^\[object (Shared)?ArrayBuffer]$/.test(Object.prototype.toString.call(source))) {
    return new Uint8Array(source);
  }
  throw new TypeError("a source must be a URL, a response or bytes");
}

/** Fetches a URL. Node does not fetch files, and reads them instead. */
async function fetchUrl(url) {
  const isFile = /^file:/i.test(url) || !/^[a-z][a-z0-9+.-]+:/i.test(url);
  if (isFile && globalThis.process?.versions?.node) {
    const fileSystem = "node:fs/promises"; // Bundlers must leave it alone.
    const { readFile } = await import(
      /* webpackIgnore: true */ /* @vite-ignore */ fileSystem);
    return readFile(/^file:/i.test(url) ? new URL(url) : url);
  }
  return fetch(url);
}

export async function unpack(text) {
  const packed = Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
  const stream = new Blob([packed]).stream();
  const unpacked = stream.pipeThrough(new DecompressionStream("gzip"));
  return new Uint8Array(await new Response(unpacked).arrayBuffer());
}

// ---- The .minw file, which docs/format.md specifies, and which the engine has checked

export const levels = {
  1: [-1, 0, 1],
  2: [-1, 0, 1],
  3: [-4, -2, -1, 0, 1, 2, 4],
};

const HEAD = 32; // Bytes before the program.
const LARGEST_CODE = { 1: 1, 2: 1, 3: 3 };
const THRESHOLDS = { 1: 1, 2: 2, 3: 6 };

// Name and bits of each format of weights.
const FORMATS = {
  1: ["1 bit", 1], 2: ["2 bits", 2], 3: ["3 bits", 3], 8: ["float8", 8],
  16: ["float16", 16], 17: ["bfloat16", 16], 32: ["float32", 32],
};

class Reader {
  constructor(bytes) {
    this.bytes = bytes;
    this.view = new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength);
    this.at = 0;
  }

  take(size) {
    this.at += size;
    return this.bytes.subarray(this.at - size, this.at);
  }

  u8() {
    return this.take(1)[0];
  }

  u32() {
    this.at += 4;
    return this.view.getUint32(this.at - 4, true);
  }

  i32() {
    return this.u32() | 0;
  }
}

/**
 * The operations of a file: their types, inputs and weights.
 *
 * @param types The type of each value, as the engine gives it.
 */
function parse(bytes, types) {
  const reader = new Reader(bytes);
  reader.take(8);
  const version = reader.u32();
  reader.take(HEAD - 12 + 8); // Also the height and the width of images.
  const channels = reader.u32();
  reader.take(8 + channels + 4); // The crop, the offsets and the number of classes.
  const operations = [];
  for (let count = reader.u32(); count > 0; count--) {
    const kind = reader.u8();
    reader.take(reader.u8()); // The name.
    const [type, read] = OPERATIONS[kind];
    operations.push({ type, weights: null, ...read(reader, types, version) });
  }
  return operations;
}

/** Type of an operation, and the function that reads what follows its name, by kind. */
const OPERATIONS = {
  1: ["convolution", readConvolution],
  2: ["maximum", (reader) => readInputs(reader, 32)],
  3: ["sum", (reader) => readInputs(reader, 32)],
  4: ["thresholds", readThresholds],
  5: ["logits", (reader, types) => {
    const input = reader.u32();
    reader.take(4 + 12 * types[input].shape[2]);
    return { inputs: [input] };
  }],
  6: ["concatenation", (reader) => {
    const inputs = [];
    for (let count = reader.u32(); count > 0; count--) {
      inputs.push(reader.u32());
      reader.u8();
    }
    return { inputs };
  }],
  7: ["shortcut", (reader) => readInputs(reader, 16)],
  8: ["float norm", (reader, types) => {
    const inputs = [reader.u32(), reader.i32()].filter((input) => input >= 0);
    reader.take(9 + 12 * types[inputs[0]].shape[2]);
    reader.take(4 * reader.u8());
    return { inputs };
  }],
  10: ["addition", (reader) => {
    const inputs = [reader.u32(), reader.u32()];
    reader.take(2);
    return { inputs };
  }],
};

/** One input, and a number of bytes after it. */
function readInputs(reader, rest) {
  const inputs = [reader.u32()];
  reader.take(rest);
  return { inputs };
}

function readThresholds(reader, types) {
  const inputs = [reader.u32(), reader.i32()].filter((input) => input >= 0);
  const bits = reader.u8();
  const width = reader.u8();
  const channels = types[inputs[0]].shape[2];
  const shortcut = inputs.length > 1 ? LARGEST_CODE[types[inputs[1]].bits] : 0;
  const tables = 2 * shortcut + 1;
  reader.take(Math.ceil(channels / 8) + tables * THRESHOLDS[bits] * channels * width);
  return { inputs };
}

function readConvolution(reader, types, version) {
  const inputs = [reader.u32()];
  const format = reader.u8();
  const [height, width, group, outputs] = Array.from({ length: 4 }, () => reader.u32());
  reader.take(33 + (version > 1 ? 12 : 0));
  const [name, bits] = FORMATS[format];
  const shape = [outputs, height, width, group];
  const count = product(shape);
  const size = bits > 3 ? count * bits / 8 : bits * Math.ceil(count / 8);
  const data = reader.take(size);
  const planes = () => bits > 3 ? [] : unpackPlanes(data, bits, count);
  const codes = () => weightCodes(name, planes(), count);
  return { inputs, weights: { format: name, bits, shape, count, planes, codes } };
}

function unpackPlanes(data, bits, count) {
  const size = Math.ceil(count / 8);
  return Array.from({ length: bits }, (_, plane) => Uint8Array.from(
    { length: count },
    (_, i) => data[plane * size + (i >> 3)] >> (i & 7) & 1,
  ));
}

function weightCodes(format, [positive, ...magnitudes], count) {
  if (!positive) throw new Error(`weights of ${format} have no codes`);
  return Int8Array.from({ length: count }, (_, i) => {
    const magnitude = magnitudes.length
      ? magnitudes.reduce((sum, plane, bit) => sum + (plane[i] << bit), 0) : 1;
    return positive[i] ? magnitude : -magnitude;
  });
}

const MAX_LABEL = 1000; // Characters.
const PRINTABLE = /^(?:[^\p{C}\p{Z}]| )*$/u;

/** The metadata of a file. What this library uses of them is checked. */
function readMetadata(bytes, classes) {
  let metadata;
  try {
    metadata = JSON.parse(new TextDecoder("utf-8", { fatal: true }).decode(bytes));
  } catch (error) {
    throw new Error(`metadata: must be JSON in UTF-8 (${error.message})`);
  }
  if (!isObject(metadata)) {
    throw new Error("metadata: must be a JSON object");
  }
  const { labels, config } = metadata;
  const isLabel = (label) => typeof label === "string" && PRINTABLE.test(label)
    && [...label].length <= MAX_LABEL;
  if (labels && !(Array.isArray(labels) && labels.every(isLabel)
      && [0, classes].includes(labels.length))) {
    throw new Error("metadata.labels: must be null or a list of a"
      + ` printable string of at most ${MAX_LABEL} characters for each class`);
  }
  if (config && !isObject(config)) {
    throw new Error("metadata.config: must be null or an object");
  }
  return metadata;
}

function isObject(value) {
  return typeof value === "object" && value !== null && !Array.isArray(value);
}

// ---- The network

const BATCH_BYTES = 2 ** 22; // Images that the engine gets at a time.

export async function load(source) {
  if (!compiled) init().catch(() => {}); // The last line throws the errors.
  const creating = compiled.then(Engine.create); // Meanwhile the file is read.
  creating.catch(() => {});
  const bytes = await readBytes(source);
  return new Network(await creating, bytes);
}

class Network {
  #engine;
  #pointer;

  constructor(engine, bytes) {
    this.#engine = engine;
    engine.run((c) => {
      const file = engine.allocate(bytes);
      this.#pointer = c.minw_load(file, bytes.length, 0, 0);
      engine.release(file);
      this.#describe(c, bytes);
    });
  }

  /** Sets the fields that describe the network. */
  #describe(c, bytes) {
    const engine = this.#engine;
    const pointer = this.#pointer;
    this.fileSize = bytes.length;
    this.shape = engine.shape("minw_source", pointer).shape;
    this.classes = c.minw_classes(pointer);
    this.isa = engine.isa;
    const size = engine.allocate(4);
    const metadata = c.minw_metadata(pointer, size);
    const length = engine.view().getUint32(size, true);
    engine.release(size);
    this.metadata = readMetadata(
      engine.copy(Uint8Array, metadata, length), this.classes);
    const { labels, config } = this.metadata;
    const numbers = Array.from({ length: this.classes }, (_, i) => String(i));
    this.labels = labels?.length ? labels : numbers;
    this.shrinks = config?.eval_resize !== 0;
    const count = c.minw_num_ops(pointer);
    this.valueTypes = Array.from({ length: count + 1 },
      (_, i) => engine.shape("minw_value_shape", pointer, i));
    this.operations = parse(bytes, this.valueTypes).map((operation, i) => {
      const [height, width] = this.valueTypes[i + 1].shape;
      return {
        name: engine.text(c.minw_op_name(pointer, i)),
        kernel: engine.text(c.minw_op_kernel(pointer, i)),
        products: (operation.weights?.count ?? 0) * height * width,
        ...operation,
        ...this.valueTypes[i + 1],
      };
    });
    this.kernels = this.operations.map(({ name, kernel }) => [name, kernel]);
    this.title = [config?.dataset, this.#bits()].filter(Boolean).join(", ");
  }

  /** The bits of weights and activations, such as "W1A2". */
  #bits() {
    const made = this.operations.filter(({ kind }) => kind === "code");
    const used = this.operations.flatMap(({ weights }) => weights ?? []);
    return [["W", used], ["A", made]].filter(([, values]) => values.length)
      .map(([letter, values]) => letter + [...new Set(values.map(({ bits }) => bits))]
        .sort((a, b) => a - b)).join("");
  }

  get memory() {
    return this.#engine.run((c) => c.memory.buffer.byteLength);
  }

  logits(images) {
    const size = product(this.shape);
    checkPixels(images, size, true);
    const logits = new Float32Array(images.length / size * this.classes);
    const batch = Math.max(1, Math.floor(BATCH_BYTES / size));
    for (let first = 0; first * size < images.length; first += batch) {
      const part = images.subarray(first * size, (first + batch) * size);
      logits.set(this.#logits(part, part.length / size), first * this.classes);
    }
    return logits;
  }

  #logits(images, batch) {
    const engine = this.#engine;
    return engine.run((c) => {
      const input = engine.allocate(images);
      const output = engine.allocate(4 * batch * this.classes);
      c.minw_logits(this.#pointer, input, batch, output, 1, 0, 0);
      const logits = engine.copy(Float32Array, output, batch * this.classes);
      engine.release(input, output);
      return logits;
    });
  }

  values(image) {
    checkPixels(image, product(this.shape), false);
    const engine = this.#engine;
    const names = ["image", ...this.operations.map(({ name }) => name)];
    return engine.run((c) => {
      const input = engine.allocate(image);
      const outputs = this.valueTypes.map(({ shape }) =>
        engine.allocate(4 * product(shape)));
      const pointers = engine.allocate(
        new Uint8Array(Uint32Array.from(outputs).buffer));
      c.minw_values(this.#pointer, input, 1, pointers, 0, 0);
      const values = this.valueTypes.map((type, i) => {
        const Type = type.kind === "float" ? Float32Array : Int32Array;
        const data = engine.copy(Type, outputs[i], product(type.shape));
        return {
          name: names[i], ...type,
          data: type.kind === "code" ? Int8Array.from(data) : data,
        };
      });
      engine.release(input, pointers, ...outputs);
      return values;
    });
  }

  close() {
    this.#engine.exports = null;
  }
}

export function probabilities(logits) {
  const largest = logits.reduce((a, b) => Math.max(a, b));
  const powers = logits.map((logit) => Math.exp(logit - largest));
  const sum = powers.reduce((a, b) => a + b);
  return powers.map((power) => power / sum);
}

function product(numbers) {
  return numbers.reduce((a, b) => a * b, 1);
}

function isBytes(value) {
  return /^\[object Uint8(Clamped)?Array]$/.test(Object.prototype.toString.call(value));
}

function checkPixels(pixels, size, several) {
  if (!isBytes(pixels)) throw new TypeError("pixels must be a Uint8Array");
  if (several ? pixels.length % size : pixels.length !== size) {
    throw new RangeError(`there are ${pixels.length} pixel values: must be ${size}`
      + (several ? ", or a multiple of it" : ""));
  }
}

// ---- Images, which become the pixels that minw/data/images.py makes of them.

export async function decodeImage(file) {
  const bitmap = await createImageBitmap(file, {
    imageOrientation: "from-image", premultiplyAlpha: "none",
    colorSpaceConversion: "none",
  });
  const pixels = readPixels(bitmap);
  bitmap.close();
  return pixels;
}

export function preprocess(image, network, options = {}) {
  const { background = [0, 0, 0], orientation = 1 } = options;
  const [height, width, channels] = network.shape;
  const planes = splitChannels(readPixels(image), channels, background)
    .map((plane) => fit(turn(plane, orientation), height, width, network.shrinks));
  const pixels = new Uint8Array(height * width * channels);
  planes.forEach((plane, c) => {
    for (let i = 0; i < height * width; i++) pixels[i * channels + c] = plane[i];
  });
  return pixels;
}

/** The pixels of an image, canvas or video, as ImageData. */
function readPixels(image) {
  if (image.data !== undefined) {
    const { data, width, height } = image;
    if (!isBytes(data) || !(width > 0 && height > 0)
        || data.length !== 4 * width * height) {
      throw new TypeError("pixels must be a Uint8Array of red, green, blue and alpha"
        + " of width times height pixels, at least one");
    }
    return image;
  }
  const width = image.videoWidth ?? image.naturalWidth ?? image.displayWidth
    ?? image.width;
  const height = image.videoHeight ?? image.naturalHeight ?? image.displayHeight
    ?? image.height;
  const canvas = globalThis.OffscreenCanvas ? new OffscreenCanvas(width, height)
    : Object.assign(document.createElement("canvas"), { width, height });
  const context = canvas.getContext("2d", { willReadFrequently: true });
  context.drawImage(image, 0, 0);
  return context.getImageData(0, 0, width, height);
}

/**
 * The channels of a network as planes {width, height, data}. One channel is luma, of
 * which Pillow's weights are 16-bit fractions. Gray with alpha and RGB with alpha stay
 * as they are. Any other image is put on the background.
 */
function splitChannels({ data, width, height }, channels, background) {
  if (!(channels >= 1 && channels <= 4)) {
    throw new RangeError(`the network takes ${channels} channels, which images lack`);
  }
  const planes = Array.from({ length: channels }, () => new Uint8Array(width * height));
  const gray = channels < 3;
  const withAlpha = channels % 2 === 0;
  const color = [0, 0, 0];
  for (let i = 0; i < width * height; i++) {
    const alpha = data[4 * i + 3];
    for (let c = 0; c < 3; c++) {
      color[c] = withAlpha ? data[4 * i + c]
        : blend(background[c], data[4 * i + c], alpha);
    }
    if (channels === 2 && (color[0] !== color[1] || color[0] !== color[2])) {
      throw new TypeError("the image has colors; the network takes gray and alpha");
    }
    if (gray) {
      const luma = 19595 * color[0] + 38470 * color[1] + 7471 * color[2];
      planes[0][i] = (luma + 32768) >> 16;
    } else {
      for (let c = 0; c < 3; c++) planes[c][i] = color[c];
    }
    if (withAlpha) planes[channels - 1][i] = alpha;
  }
  return planes.map((plane) => ({ width, height, data: plane }));
}

/** Mixes two bytes by a third; the division by 255 is rounded to nearest. */
function blend(below, above, alpha) {
  const sum = below * (255 - alpha) + above * alpha + 128;
  return ((sum >> 8) + sum) >> 8;
}

/** Turns a plane to be upright. */
function turn({ width, height, data }, orientation) {
  if (orientation === 1) return { width, height, data };
  if (![2, 3, 4, 5, 6, 7, 8].includes(orientation)) {
    throw new RangeError(`orientation=${orientation}: must be 1 to 8`);
  }
  const swap = orientation > 4;
  const flipColumns = [2, 3, 7, 8].includes(orientation);
  const flipRows = [3, 4, 6, 7].includes(orientation);
  const turned = {
    width: swap ? height : width, height: swap ? width : height,
    data: new Uint8Array(data.length),
  };
  for (let i = 0; i < data.length; i++) {
    const x = i % turned.width;
    const y = (i - x) / turned.width;
    const column = swap ? y : x;
    const row = swap ? x : y;
    turned.data[i] = data[(flipRows ? height - 1 - row : row) * width
      + (flipColumns ? width - 1 - column : column)];
  }
  return turned;
}

// An image is resized as a whole before its center is cut out, unless that would make
// more than so many times the pixels that are asked for.
const RESIZED = 64;

/** The center of a plane, (height, width), at the largest scale that fills it. */
function fit(plane, height, width, shrink) {
  const ratio = Math.max(width / plane.width, height / plane.height);
  let columns = plane.width;
  let rows = plane.height;
  if (ratio > 1 || shrink) {
    columns = Math.max(width, roundHalfToEven(columns * ratio));
    rows = Math.max(height, roundHalfToEven(rows * ratio));
  }
  const left = Math.floor((columns - width) / 2);
  const top = Math.floor((rows - height) / 2);
  if (columns * rows <= RESIZED * width * height
      || (columns === plane.width && rows === plane.height)) {
    const across = filters(plane.width, 0, plane.width, columns);
    const down = filters(plane.height, 0, plane.height, rows);
    return resize(plane, across.slice(left, left + width),
      down.slice(top, top + height), isVerticalFirst(plane, columns, rows));
  }
  const x = (at) => at * plane.width / columns;
  const y = (at) => at * plane.height / rows;
  return resize(plane, filters(plane.width, x(left), x(left + width), width),
    filters(plane.height, y(top), y(top + height), height),
    isVerticalFirst(plane, width, height));
}

/** Rounds as Python does. */
function roundHalfToEven(number) {
  return number % 1 === 0.5 ? 2 * Math.round(number / 2) : Math.round(number);
}

/** Whether Pillow, of version 13 or newer, makes the vertical pass first. */
function isVerticalFirst(plane, width, height) {
  return height < plane.height && plane.height - height > 2 * (plane.width - width);
}

const PRECISION = 22; // Bits of a coefficient's fraction, as in Pillow.

/**
 * The filters of a bilinear resize with antialiasing. A result is a mean of the inputs
 * around its center, weighted by a triangle that is two results wide, or two inputs if
 * these are wider.
 *
 * @param size Number of inputs.
 * @param from Start of the inputs that are resized, a float32 in Pillow.
 * @param to Their end.
 * @param results Number of results.
 * @returns For each result its first input and the coefficients, in fixed point.
 */
function filters(size, from, to, results) {
  from = Math.fround(from);
  const scale = Math.fround(Math.fround(to) - from) / results;
  const support = Math.max(scale, 1);
  const inverse = 1 / support;
  return Array.from({ length: results }, (_, i) => {
    const center = from + (i + 0.5) * scale;
    const first = Math.max(0, Math.trunc(center - support + 0.5));
    const last = Math.min(size, Math.trunc(center + support + 0.5));
    const triangle = Array.from({ length: last - first }, (_, k) =>
      Math.max(0, 1 - Math.abs((k + first - center + 0.5) * inverse)));
    const sum = triangle.reduce((a, b) => a + b, 0);
    const coefficients = Int32Array.from(triangle, (weight) =>
      0.5 + (sum ? weight / sum : weight) * 2 ** PRECISION);
    return { first, coefficients };
  });
}

/** Resizes a plane by filters for its columns and rows, in two passes that round. */
function resize(plane, across, down, verticalFirst) {
  return verticalFirst
    ? resizeAcross(resizeDown(plane, down), across).data
    : resizeDown(resizeAcross(plane, across), down).data;
}

function resizeAcross({ width, height, data }, across) {
  const result = new Uint8Array(across.length * height);
  across.forEach(({ first, coefficients }, x) => {
    for (let y = 0; y < height; y++) {
      result[y * across.length + x] = mean(data, y * width + first, 1, coefficients);
    }
  });
  return { width: across.length, height, data: result };
}

function resizeDown({ width, data }, down) {
  const result = new Uint8Array(width * down.length);
  down.forEach(({ first, coefficients }, y) => {
    for (let x = 0; x < width; x++) {
      result[y * width + x] = mean(data, first * width + x, width, coefficients);
    }
  });
  return { width, height: down.length, data: result };
}

/** The weighted mean of bytes, `step` apart, rounded. */
function mean(data, start, step, coefficients) {
  let sum = 1 << (PRECISION - 1);
  for (let k = 0; k < coefficients.length; k++) {
    sum += data[start + k * step] * coefficients[k];
  }
  return Math.min(255, sum >> PRECISION);
}
