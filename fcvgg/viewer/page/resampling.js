// Pixels as Pillow and fcvgg.Preprocess make them: a canvas rescales otherwise.

const cubic = (x) => {
  const a = -0.5; // Catmull and Rom's spline
  if (x < 1) return ((a + 2) * x - (a + 3)) * x * x + 1;
  return x < 2 ? (((x - 5) * x + 8) * x - 4) * a : 0;
};
const sinc = (x) => (x === 0 ? 1 : Math.sin(x * Math.PI) / (x * Math.PI));

const KERNELS = {
  bilinear: { reach: 1, weight: (x) => Math.max(1 - Math.abs(x), 0) },
  bicubic: { reach: 2, weight: (x) => cubic(Math.abs(x)) },
  lanczos: { reach: 3, weight: (x) => (Math.abs(x) < 3 ? sinc(x) * sinc(x / 3) : 0) },
};

const ONE = 2 ** 22; // weights are whole numbers of this

/** For every output position the first input position and the weights, which sum to one. */
function weightsOf({ reach, weight }, from, to) {
  const scale = from / to;
  const wide = Math.max(scale, 1); // a kernel that reduces is widened, against aliasing
  return Array.from({ length: to }, (_, i) => {
    const centre = (i + 0.5) * scale;
    const first = Math.max(Math.trunc(centre - reach * wide + 0.5), 0);
    const end = Math.min(Math.trunc(centre + reach * wide + 0.5), from);
    const values = Array.from({ length: end - first }, (_, k) => weight((k + first - centre + 0.5) * (1 / wide)));
    const sum = values.reduce((a, b) => a + b, 0);
    const whole = values.map((v) => (sum === 0 ? v : v / sum) * ONE).map((v) => Math.trunc(v + (v < 0 ? -0.5 : 0.5)));
    return [first, Int32Array.from(whole)];
  });
}

/** Resample one axis: `lines` lines of positions `step` apart, each `line` after the one before. */
function along(pixels, weights, channels, [lines, line, step], result, [toLine, toStep]) {
  for (let n = 0; n < lines; n++) {
    for (let i = 0; i < weights.length; i++) {
      const [first, values] = weights[i];
      for (let c = 0; c < channels; c++) {
        let sum = ONE / 2;
        let at = n * line + first * step + c;
        for (let k = 0; k < values.length; k++, at += step) sum += pixels[at] * values[k];
        result[n * toLine + i * toStep + c] = Math.floor(sum / ONE); // clamped by its type
      }
    }
  }
  return result;
}

function nearest(pixels, [height, width], [h, w], channels) {
  const places = (from, to) => {
    const step = from / to;
    let at = step * 0.5; // added up, as rounding decides between neighbours
    return Array.from({ length: to }, () => { const place = Math.trunc(at); at += step; return place; });
  };
  const [rows, cols] = [places(height, h), places(width, w)];
  const result = new Uint8ClampedArray(h * w * channels);
  let at = 0;
  for (const row of rows) for (const col of cols)
    for (let c = 0; c < channels; c++) result[at++] = pixels[(row * width + col) * channels + c];
  return result;
}

/** Rows of pixels `(height, width, channels)` at another width. */
function widened(pixels, kernel, [height, width], w, channels) {
  if (width === w) return pixels;
  const result = new Uint8ClampedArray(height * w * channels);
  const from = [height, width * channels, channels];
  return along(pixels, weightsOf(kernel, width, w), channels, from, result, [w * channels, channels]);
}

/** Columns of pixels `(height, width, channels)` at another height. */
function heightened(pixels, kernel, [height, width], h, channels) {
  if (height === h) return pixels;
  const row = width * channels; // a column is a line, and its channels are one
  const result = new Uint8ClampedArray(h * row);
  return along(pixels, weightsOf(kernel, height, h), row, [1, 0, row], result, [0, row]);
}

/**
 * Pixels `(height, width, channels)` at the size `[h, w]`, as the given release of Pillow makes them.
 * Each pass rounds to bytes. From 13 on, columns come first where the height shrinks by more than
 * twice the pixels that the width does.
 */
export function resized(pixels, [height, width], [h, w], channels, interpolation, pillow) {
  if (interpolation === "nearest") {
    return height === h && width === w ? pixels : nearest(pixels, [height, width], [h, w], channels);
  }
  const kernel = KERNELS[interpolation];
  if (pillow >= 13 && h < height && height - h > 2 * (width - w)) {
    const flat = heightened(pixels, kernel, [height, width], h, channels);
    return widened(flat, kernel, [h, width], w, channels);
  }
  const narrow = widened(pixels, kernel, [height, width], w, channels);
  return heightened(narrow, kernel, [height, w], h, channels);
}

/** RGBA of a canvas in a network's channels: grey, RGB or RGBA. */
export function inChannels(rgba, channels) {
  if (channels === 4) return rgba;
  const result = new Uint8ClampedArray((rgba.length / 4) * channels);
  for (let i = 0, at = 0; i < rgba.length; i += 4) {
    const [r, g, b] = [rgba[i], rgba[i + 1], rgba[i + 2]];
    if (channels === 3) { result[at++] = r; result[at++] = g; result[at++] = b; }
    else result[at++] = (r * 19595 + g * 38470 + b * 7471 + 32768) >> 16; // ITU-R 601-2
  }
  return result;
}

/** The size `[h, w]` of an image whose smaller side gets a length; halves go to the even one. */
export function sizeOfSide(size, side) {
  const factor = side / Math.min(...size);
  return size.map((n) => Math.max(toEven(n * factor), 1));
}

function toEven(x) {
  const floor = Math.floor(x);
  if (x - floor !== 0.5) return Math.round(x);
  return floor % 2 ? floor + 1 : floor;
}

/** The input `(1, channels, H, W)` of pixels, padded with zeros, centred, up to the window. */
export function inputOf(pixels, [height, width], preprocess, [windowHeight, windowWidth]) {
  const { mean, std, scale, channel_order } = preprocess;
  const channels = mean.length;
  const [h, w] = [Math.max(height, windowHeight), Math.max(width, windowWidth)];
  const [top, left] = [Math.floor((h - height) / 2), Math.floor((w - width) / 2)];
  const values = new Float32Array(channels * h * w);
  const f = Math.fround; // each step in single precision, as torch computes
  for (let c = 0; c < channels; c++) {
    const from = channel_order === "BGR" ? channels - 1 - c : c;
    const table = Float32Array.from({ length: 256 }, (_, v) => f(f(f(v * f(scale)) - f(mean[c])) / f(std[c])));
    for (let y = 0; y < height; y++) {
      let at = (c * h + y + top) * w + left;
      let source = y * width * channels + from;
      for (let x = 0; x < width; x++, at++, source += channels) values[at] = table[pixels[source]];
    }
  }
  return { values, size: [h, w] };
}
