// Runs the exported network on images, which never leave the machine.

import * as ort from "./ort.wasm.bundle.min.mjs";
import { inChannels, inputOf, resized, sizeOfSide } from "./resampling.js";

ort.env.wasm.numThreads = 1; // more need headers that a static host may not send
ort.env.wasm.wasmPaths = { wasm: new URL("./ort-wasm-simd-threaded.wasm", import.meta.url).href };
ort.env.logLevel = "error";

const LARGEST = 4096 * 4096; // pixels of an input, which takes 200 MB

let session;

/** The network; `progress` hears how much of it has come. */
async function load(progress) {
  const answer = await fetch("model.onnx");
  if (!answer.ok) throw new Error("model.onnx is missing next to the page; write the page again");
  const total = +answer.headers.get("Content-Length");
  const parts = [];
  let size = 0;
  for (const reader = answer.body.getReader(); ; ) {
    const { done, value } = await reader.read();
    if (done) break;
    parts.push(value);
    size += value.length;
    progress("loading the network", total ? Math.min(size / total, 1) : undefined);
  }
  const bytes = new Uint8Array(await new Blob(parts).arrayBuffer());
  progress("starting the network");
  return ort.InferenceSession.create(bytes, { executionProviders: ["wasm"] }).catch((error) => {
    throw new Error(`the browser cannot run this network of ${Math.ceil(size / 2 ** 20)} MB, perhaps for want of memory; use fcvgg serve (${error.message ?? error})`);
  });
}

/** The pixels of a file, upright and without its colour profile; transparent ones on white. */
async function decoded(file, channels) {
  const plain = { colorSpaceConversion: "none", imageOrientation: "from-image" };
  const image = await createImageBitmap(file, plain).catch(() => {
    throw new Error(`${file.name || "the file"} is not an image that this browser can read; convert it to PNG or JPEG`);
  });
  const canvas = new OffscreenCanvas(image.width, image.height);
  const context = canvas.getContext("2d", { willReadFrequently: true });
  if (!context) throw new Error(`an image of ${image.width}x${image.height} pixels is too large for this browser`);
  if (channels !== 4) {
    context.fillStyle = "#fff";
    context.fillRect(0, 0, image.width, image.height);
  }
  context.drawImage(image, 0, 0);
  const { data } = context.getImageData(0, 0, image.width, image.height);
  return { pixels: inChannels(data, channels), size: [image.height, image.width] };
}

async function computed({ file, side, network }, progress) {
  const { preprocess, axes, usual_side, pillow } = network;
  const channels = preprocess.mean.length;
  const image = await decoded(file, channels);
  side ??= Math.min(usual_side, ...image.size);
  const wanted = sizeOfSide(image.size, side);
  if (wanted[0] * wanted[1] > LARGEST) throw new Error(`an input of ${wanted.join("x")} pixels is too large for a browser; choose a smaller side`);
  session ??= await load(progress);
  progress("computing");
  const pixels = resized(image.pixels, image.size, wanted, channels, preprocess.interpolation, pillow);
  const { values, size } = inputOf(pixels, wanted, preprocess, axes.map((axis) => axis.window));
  const input = new ort.Tensor("float32", values, [1, channels, ...size]);
  const outputs = await session.run({ [session.inputNames[0]]: input });
  const map = outputs[session.outputNames[0]];
  const [, classes, ...cells] = map.dims;
  return { scores: map.data, classes, cells, input_size: wanted, image_size: image.size, side };
}

async function answer(request, port) {
  const progress = (progress, share) => port.postMessage({ progress, share });
  try {
    const found = await computed(request, progress);
    port.postMessage(found, [found.scores.buffer]);
  } catch (error) {
    port.postMessage({ error: String(error?.message ?? error) });
  }
}

let last = Promise.resolve(); // the network is loaded once and takes one image at a time

onmessage = ({ data, ports: [port] }) => { last = last.then(() => answer(data, port)); };
