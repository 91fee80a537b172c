/** Runs packed networks (.minw) in browsers, workers, Node and bundlers. */

/** Height, width and channels. */
export type Shape = readonly [height: number, width: number, channels: number];

/** What a value holds; `bits` is 1 to 3 for codes and 0 for integers and floats. */
export interface ValueType {
  readonly shape: Shape;
  readonly kind: "int" | "code" | "float";
  readonly bits: number;
}

/** One value of the network for one image. */
export interface Value extends ValueType {
  /** "image" for value 0. Operation i makes value i + 1 and gives it its name. */
  readonly name: string;
  /**
   * The elements in the order (height, width, channels): integers as Int32Array, codes
   * as Int8Array, floats as Float32Array. `levels` says what codes stand for.
   */
  readonly data: Int32Array | Int8Array | Float32Array;
}

/** The weights of a convolution, or of a dense layer. */
export interface Weights {
  /** "1 bit", "2 bits", "3 bits", "float8", "float16", "bfloat16" or "float32". */
  readonly format: string;
  /** Bits of a weight: 1, 2, 3, 8, 16 or 32. */
  readonly bits: number;
  /** Output channels, rows and columns of the kernel, input channels of a group. */
  readonly shape: readonly [number, number, number, number];
  /** Number of weights, the product of `shape`. */
  readonly count: number;
  /**
   * The planes of bits, each with a byte, 0 or 1, for every weight. The first plane is
   * 1 where a weight is positive. The others are the bits of its magnitude, the lowest
   * bit first. Weights in a float format have no planes.
   */
  planes(): Uint8Array[];
  /** The codes of the weights; `levels` says what they stand for. */
  codes(): Int8Array;
}

/** An operation of the network. It makes a value of its shape, kind and bits. */
export interface Operation extends ValueType {
  readonly name: string;
  readonly type:
    | "convolution" | "maximum" | "sum" | "thresholds" | "logits" | "concatenation"
    | "shortcut" | "float norm" | "addition";
  /** The indices of the values that it takes. */
  readonly inputs: readonly number[];
  /** The kernel that runs it, such as "W1A1 swizzle". */
  readonly kernel: string;
  /** The weights of a convolution, else null. */
  readonly weights: Weights | null;
  /** Products of weights and activations for an image; 0 unless it is a convolution. */
  readonly products: number;
}

/** A loaded network. Each one has a WebAssembly instance of its own. */
export interface Network {
  /** Shape of the images that the network takes. */
  readonly shape: Shape;
  /** Number of classes. */
  readonly classes: number;
  /** Names of the classes; their numbers if the file holds no names. */
  readonly labels: readonly string[];
  /** A short title, such as "digits, W1A1". */
  readonly title: string;
  /** What the file says besides its program: `config`, `step` and others. */
  readonly metadata: Readonly<Record<string, unknown>>;
  /** Whether larger images are scaled down for the network, as in its evaluation. */
  readonly shrinks: boolean;
  /** The operations in order. */
  readonly operations: readonly Operation[];
  /** Name and kernel of each operation. */
  readonly kernels: readonly (readonly [name: string, kernel: string])[];
  /** Type of each value: that of the image, then those that the operations make. */
  readonly valueTypes: readonly ValueType[];
  /** The vector instructions that the kernels use. */
  readonly isa: "simd128" | "relaxed-simd";
  /** Bytes of the file. */
  readonly fileSize: number;
  /** Bytes of memory that the instance holds now. */
  readonly memory: number;

  /**
   * Computes the logits of one image or several.
   *
   * @param images Pixels in the order (batch, height, width, channels).
   * @returns The logits in the order (batch, classes).
   */
  logits(images: Uint8Array | Uint8ClampedArray): Float32Array;

  /**
   * Computes every value of the network for one image, which is slower.
   *
   * @param image Pixels in the order (height, width, channels).
   */
  values(image: Uint8Array | Uint8ClampedArray): Value[];

  /** Releases the memory of the network, which cannot be used afterwards. */
  close(): void;
}

/** An image as a canvas gives it: red, green, blue and alpha of each pixel. */
export interface Pixels {
  readonly width: number;
  readonly height: number;
  readonly data: Uint8Array | Uint8ClampedArray;
}

export interface PreprocessOptions {
  /** Red, green and blue behind transparent parts; black by default. */
  background?: readonly [number, number, number];
  /** EXIF orientation of the pixels, 1 to 8. `decodeImage` turns images already. */
  orientation?: number;
}

/**
 * The levels that codes of 1, 2 or 3 bits stand for, from the smallest code to the
 * largest: code c of 3 bits stands for `levels[3][c + 3]`. Among codes of 1 bit, level
 * 0 occurs only where a network pads them or fills channels.
 */
export const levels: Readonly<Record<1 | 2 | 3, readonly number[]>>;

/**
 * Compiles the engine once. `load` does so by itself if minw.wasm is beside this file.
 *
 * Relaxed SIMD is used where there is any, but not in a module that was compiled before.
 *
 * @param wasm The bytes of minw.wasm, its URL, a response, or a compiled module.
 */
export function init(
  wasm?: string | URL | Response | Promise<Response> | ArrayBuffer | Uint8Array
    | WebAssembly.Module,
): Promise<void>;

/**
 * Loads a network.
 *
 * @param source URL of a .minw file, a response, or the file or its content. In Node a
 *   URL may begin with "file:", and any other string is a path.
 * @throws Error The file cannot be fetched, or the engine refuses it. The message of
 *   the engine names the operation.
 */
export function load(
  source: string | URL | Response | Promise<Response> | Blob | ArrayBuffer | Uint8Array,
): Promise<Network>;

/** Decodes base64 of gzip, as which a page of one file holds its engine and network. */
export function unpack(text: string): Promise<Uint8Array>;

/**
 * Computes the probabilities of classes, the softmax of their logits.
 *
 * @param logits The logits of one image.
 */
export function probabilities(logits: Float32Array): Float32Array;

/**
 * Decodes an image file in a browser: upright, with color profiles ignored.
 *
 * A canvas premultiplies alpha. Colors of transparent pixels are therefore not exact.
 */
export function decodeImage(file: Blob): Promise<ImageData>;

/**
 * Brings an image to the pixels that a network takes, as `minw.infer` does. The image
 * is turned, made opaque, scaled until its shorter side fits, and its center is taken.
 *
 * @param image An image, canvas or video, or its pixels.
 * @param network The network, or the fields of it that are named here.
 * @returns Pixels in the order (height, width, channels).
 */
export function preprocess(
  image: Pixels | CanvasImageSource,
  network: Pick<Network, "shape" | "shrinks">,
  options?: PreprocessOptions,
): Uint8Array;
