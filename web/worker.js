// The network in a thread of its own, so that the page reacts while an image is decoded, resized
// and run. Messages in: {load: URL of the model}, then {image, minScore, maxOverlap}, where the
// image is a File or an ImageBitmap, or is left out for the last one with other thresholds. Each
// message is answered by one: {ready, ...}, {objects, ...} or {problem: a sentence}.

import {readMetadata, removeDefaults} from './onnx_file.js';
import {resize} from './resize.js';

const LARGEST_PICTURE = 1600;   // longer side of the copy that the page shows, in pixels

let ort, session, settings;
let last;   // of the image that the page shows: {input: resized for the network, width, height}

// A sentence for the page in place of an error.
class Problem extends Error {}

async function load(url) {
  const model = await fetchModel(url);
  const metadata = parse(model);
  settings = {names: JSON.parse(metadata.class_names), inputSize: Number(metadata.input_size),
              antialias: metadata.antialias === 'true', topK: Number(metadata.top_k)};
  const adapter = await navigator.gpu?.requestAdapter().catch(() => null);
  try {
    // The build with WebGPU is twice as large.
    ort = await import(adapter ? './runtime/ort.webgpu.min.mjs' : './runtime/ort.wasm.min.mjs');
  } catch {
    throw new Problem('The folder runtime/ beside this page is missing or incomplete: ' +
                      '"python -m tools.web" makes it. Or the server does not send .mjs files as ' +
                      'JavaScript.');
  }
  // Threads need memory that is shared, which a browser allows to pages with the headers
  // Cross-Origin-Opener-Policy and Cross-Origin-Embedder-Policy. More than 4 gain little.
  const nThreads = self.crossOriginIsolated ? Math.min(4, navigator.hardwareConcurrency) : 1;
  ort.env.wasm.numThreads = nThreads;
  ort.env.logLevel = 'error';
  const cpu = `the CPU (WebAssembly, ${nThreads} ${nThreads === 1 ? 'thread' : 'threads'})`;
  const reason = self.isSecureContext ? 'no WebGPU in this browser' : 'WebGPU needs https';
  let device = `${cpu}: ${reason}`;
  if (adapter) {
    device = 'the GPU (WebGPU)';
    await start(model, 'webgpu').catch((error) => {
      session = null;
      device = `${cpu}, as WebGPU cannot run this network (${error.message})`;
    });
  }
  if (!session) await start(model, 'wasm');
  return {ready: true, device, names: settings.names, minScore: Number(metadata.min_score),
          maxOverlap: Number(metadata.max_overlap)};
}

async function fetchModel(url) {
  const response = await fetch(url).catch(() => ({ok: false}));
  if (!response.ok) {
    throw new Problem('The file model.onnx is missing beside this page: "python -m tools.export ' +
                      'checkpoint.pth.tar web/model.onnx" writes it from a checkpoint, or run ' +
                      '"make web". Then reload.');
  }
  return new Uint8Array(await response.arrayBuffer());
}

// Prepare the bytes of the model, and return its metadata.
function parse(model) {
  let metadata = {};
  try {
    metadata = readMetadata(model);
    removeDefaults(model, ['min_score', 'max_overlap', 'top_k']);
  } catch { /* the same sentence for other files as for cut off ones */ }
  if (!metadata.class_names || !metadata.min_score) {
    throw new Problem('model.onnx is not a whole file of "python -m tools.export".');
  }
  return metadata;
}

async function start(model, provider) {
  session = await ort.InferenceSession.create(model, {
    executionProviders: [provider], logSeverityLevel: 3 /* errors alone */});
  if (!session.outputNames.includes('boxes')) {
    throw new Problem('model.onnx ends before the boxes: export it without --raw.');
  }
  const side = settings.inputSize;
  await run(new Uint8Array(3 * side * side), 0.5, 0.5);     // some errors come with the first run
}

// Run the network; returns the objects by falling score, boxes as fractions of the image.
async function run(image, minScore, maxOverlap) {
  const {names, inputSize, topK} = settings;
  const outputs = await session.run({
    images: new ort.Tensor('uint8', image, [1, 3, inputSize, inputSize]),
    min_score: new ort.Tensor('float32', [minScore], []),
    max_overlap: new ort.Tensor('float32', [maxOverlap], []),
    top_k: new ort.Tensor('int64', [BigInt(topK)], []),
  });
  const {boxes, labels, scores} = outputs;
  return Array.from(scores.data, (score, i) => ({
    score, label: Number(labels.data[i]), name: names[labels.data[i]],
    box: Array.from(boxes.data.subarray(4 * i, 4 * i + 4)),
  }));
}

async function detect({image, minScore, maxOverlap}) {
  const begin = performance.now();
  let current = last, picture;
  if (image) {
    const bitmap = await decode(image);
    const {width, height} = bitmap;
    current = {input: resize(bitmap, settings.inputSize, settings.antialias), width, height};
    picture = shrink(bitmap);
    bitmap.close();
  }
  const objects = await run(current.input, minScore, maxOverlap);
  last = current;   // not before: after an error the page still shows the image before
  const {width, height} = current;
  return {objects, picture, width, height, milliseconds: performance.now() - begin};
}

// Decode a File, upright by its EXIF orientation and without conversion of colors, as in predict().
async function decode(image) {
  if (image instanceof ImageBitmap) return image;
  try {
    return await createImageBitmap(image, {imageOrientation: 'from-image',
                                           colorSpaceConversion: 'none'});
  } catch {
    throw new Problem(`${image.name} is not an image that this browser can read: choose a JPEG, ` +
                      'PNG or WebP file.');
  }
}

// Return a copy of the image that is not larger than a screen.
function shrink(bitmap) {
  const scale = Math.min(1, LARGEST_PICTURE / Math.max(bitmap.width, bitmap.height));
  const side = (pixels) => Math.max(1, Math.round(scale * pixels));
  const canvas = new OffscreenCanvas(side(bitmap.width), side(bitmap.height));
  const context = canvas.getContext('2d');
  context.fillStyle = 'white';  // seen through transparent pixels, as by the network
  context.fillRect(0, 0, canvas.width, canvas.height);
  context.imageSmoothingQuality = 'high';
  context.drawImage(bitmap, 0, 0, canvas.width, canvas.height);
  return canvas.transferToImageBitmap();
}

self.onmessage = async ({data}) => {
  try {
    const answer = await (data.load ? load(data.load) : detect(data));
    self.postMessage(answer, answer.picture ? [answer.picture] : []);
  } catch (error) {
    self.postMessage({problem: error instanceof Problem ? error.message :
      `The network could not be run: ${error.message}`});
  }
};
