// A program that uses the package as its types allow; the compiler checks it, and that
// each line below @ts-expect-error is wrong.
import * as minw from "minw";
import type { Network, Operation, Value } from "minw";

async function classify(file: Blob, canvas: HTMLCanvasElement): Promise<string> {
  await minw.init();
  await minw.init(new URL("minw.wasm", "https://example.org/"));
  await minw.init(fetch("minw.wasm"));
  const net: Network = await minw.load("net.minw");
  await minw.load(await fetch("net.minw"));
  await minw.load(new Uint8Array(8));
  const pixels: Uint8Array = minw.preprocess(await createImageBitmap(file), net);
  minw.preprocess(canvas, { shape: [8, 8, 1], shrinks: true });
  minw.preprocess(await minw.decodeImage(file), net, { background: [255, 255, 255] });
  const scores: Float32Array = minw.probabilities(net.logits(pixels));
  const values: Value[] = net.values(pixels);
  const codes = values.filter(({ kind, bits }) => kind === "code" && bits === 1);
  const convolutions: Operation[] = net.operations.filter((op) => op.weights !== null);
  const planes = convolutions[0]?.weights?.planes()[0]?.length ?? 0;
  const level: number = minw.levels[3][6];
  const [height, width, channels] = net.shape;
  net.close();

  // @ts-expect-error
  net.logits([1, 2, 3]);
  // @ts-expect-error
  net.labels = [];
  // @ts-expect-error
  minw.preprocess(file, net);
  // @ts-expect-error
  minw.levels[4];
  return `${net.labels[scores.indexOf(1)]} ${codes.length} ${planes} ${level}
    ${height * width * channels}`;
}

export { classify };
