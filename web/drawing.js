// Draw boxes and labels as support/drawing.py does, but each label above its box.

// The color of a class (see `distinct_colors` in utils.py): steps of the golden ratio around the
// color wheel. Returns levels from 0 to 255.
function colorOf(label) {
  const hue = (label * 0.618034) % 1, lightness = 0.45 + 0.15 * (label % 2);
  const amplitude = 0.9 * Math.min(lightness, 1 - lightness);
  return [0, 8, 4].map((n) => {     // red, green and blue of HSL
    const k = (n + 12 * hue) % 12;
    return Math.round(255 * (lightness - amplitude * Math.max(-1, Math.min(k - 3, 9 - k, 1))));
  });
}

// Draw an image and its objects onto a canvas. All boxes are drawn before all labels, so that no
// box crosses a label; both by rising score, so that the more confident one is on top.
export function draw(canvas, picture, objects) {
  const {width, height} = picture;
  Object.assign(canvas, {width, height});
  const context = canvas.getContext('2d');
  context.drawImage(picture, 0, 0);
  // Legible on a phone, too, where the canvas is shown smaller than it is.
  const reduction = width / (canvas.clientWidth || width);
  const fontSize = Math.max(Math.min(width, height) / 30, 12 * reduction);
  const rising = [...objects].reverse().map(({name, score, label, box}) => {
    const [left, top, right, bottom] = box.map((side, i) => side * (i % 2 ? height : width));
    return {text: `${name} ${score.toFixed(2)}`, color: colorOf(label), left, top, right, bottom};
  });
  context.lineWidth = Math.max(1, fontSize / 6);
  for (const {color, left, top, right, bottom} of rising) {
    context.strokeStyle = `rgb(${color})`;
    context.strokeRect(left, top, right - left, bottom - top);
  }
  context.font = `${fontSize}px system-ui, sans-serif`;
  context.textBaseline = 'middle';
  for (const label of rising) drawLabel(context, label, fontSize);
}

// Draw a label above the upper left corner of a box; inside it where there is no room above, and
// further left where it would leave the image.
function drawLabel(context, {text, color, left, top}, fontSize) {
  const margin = fontSize / 6, height = 1.3 * fontSize;
  const width = context.measureText(text).width + 2 * margin;
  const x = Math.max(0, Math.min(left, context.canvas.width - width));
  const y = top >= height ? top - height : top;
  context.fillStyle = `rgb(${color})`;
  context.fillRect(x, y, width, height);
  const [red, green, blue] = color;
  context.fillStyle = 0.299 * red + 0.587 * green + 0.114 * blue > 128 ? 'black' : 'white';
  context.fillText(text, x + margin, y + height / 2);
}
