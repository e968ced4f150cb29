// Resize images as Pillow's Image.resize(..., BILINEAR) does. The browser's own resizing differs by
// up to 60 of 255 levels, and the network was trained on Pillow's.

const ROWS = 64;    // source rows that are read at a time: a large photo needs no second copy

// Return for each pixel of the result the first source pixel that it averages, and their weights: a
// triangle around its center that is as wide as the reduction, or, without antialiasing, one pixel.
export function triangleFilter(sourceSize, size, antialias) {
  const step = sourceSize / size, radius = antialias ? Math.max(step, 1) : 1;
  return Array.from({length: size}, (_, i) => {
    const center = (i + 0.5) * step;
    const first = Math.max(0, Math.floor(center - radius + 0.5));
    const last = Math.min(sourceSize, Math.floor(center + radius + 0.5));
    const weights = Array.from({length: last - first}, (_, j) => (
      Math.max(0, 1 - Math.abs(first + j + 0.5 - center) / radius)));
    const sum = weights.reduce((a, b) => a + b);
    // Pillow keeps 22 bits of them. With as many, halves of a level are rounded as they are there.
    return {first, weights: weights.map((weight) => Math.round(weight / sum * 2 ** 22) / 2 ** 22)};
  });
}

// Resize an ImageBitmap to size x size; returns 3 * size * size bytes, all red ones first.
export function resize(bitmap, size, antialias) {
  const {width, height} = bitmap;
  const columns = triangleFilter(width, size, antialias);
  const rows = triangleFilter(height, size, antialias);
  // Resized to `size` columns, all rows. With antialiasing Pillow rounds here and in the end; else
  // only in the end, and downward. What is assigned to a byte is rounded downward, too.
  const narrow = new (antialias ? Uint8Array : Float32Array)(3 * size * height);
  const add = antialias ? 0.5 : 1e-3;   // 1e-3 against rounding errors
  const canvas = new OffscreenCanvas(width, ROWS);
  const context = canvas.getContext('2d', {willReadFrequently: true});
  context.fillStyle = 'white';      // seen through transparent pixels
  for (let top = 0; top < height; top += ROWS) {
    context.fillRect(0, 0, width, ROWS);
    context.drawImage(bitmap, 0, -top);
    const n = Math.min(ROWS, height - top);
    const {data} = context.getImageData(0, 0, width, n);    // red, green, blue, alpha, red, ...
    // Nothing can be drawn on a canvas that is larger than the browser's limit.
    if (data[3] !== 255) throw new Error('the image is too wide for this browser');
    for (let y = 0; y < n; y++) {
      for (let x = 0; x < size; x++) {
        const {first, weights} = columns[x];
        let red = 0, green = 0, blue = 0, at = 4 * (y * width + first);
        for (let j = 0; j < weights.length; j++, at += 4) {
          red += weights[j] * data[at];
          green += weights[j] * data[at + 1];
          blue += weights[j] * data[at + 2];
        }
        const to = 3 * ((top + y) * size + x);
        narrow[to] = red + add;
        narrow[to + 1] = green + add;
        narrow[to + 2] = blue + add;
      }
    }
  }
  const result = new Uint8Array(3 * size * size);
  for (let channel = 0; channel < 3; channel++) {
    for (let y = 0; y < size; y++) {
      const {first, weights} = rows[y];
      for (let x = 0; x < size; x++) {
        let level = 0;
        for (let j = 0; j < weights.length; j++) {
          level += weights[j] * narrow[3 * ((first + j) * size + x) + channel];
        }
        result[(channel * size + y) * size + x] = level + add;
      }
    }
  }
  return result;
}
