"""Draw boxes and labels onto images."""

from PIL import ImageColor, ImageDraw, ImageFont


def draw_objects(image, prediction, colors):
    """Draw boxes and labels onto an image, in place.

    All boxes are drawn before all labels, so that no box crosses a label. Both are drawn by rising
    score: where two overlap, the more confident one is on top.

    Args:
        image: PIL image, RGB.
        prediction: {'boxes': (n, 4) corners in pixels, 'labels': [names], 'scores': (n,)}, by
            falling score.
        colors: {class name: '#rrggbb'}
    """
    draw = ImageDraw.Draw(image)
    # A thirtieth of the shorter side is legible at any size at which the whole image is viewed.
    font = ImageFont.load_default(max(10, round(min(image.size) / 30)))  # bundled with Pillow
    line_width = max(1, round(font.size / 6))
    objects = list(zip(prediction['boxes'].tolist(), prediction['labels'],
                       prediction['scores'].tolist()))[::-1]
    for (x_min, y_min, x_max, y_max), name, _ in objects:
        # Boxes are edges, Pillow's corners are pixels.
        draw.rectangle((x_min, y_min, max(x_min, x_max - 1), max(y_min, y_max - 1)),
                       outline=colors[name], width=line_width)
    for (x_min, y_min, _, _), name, score in objects:
        draw_label(image, f'{name} {score:.2f}', x_min, y_min, font, colors[name])


def draw_label(image, text, x_min, y_min, font, color):
    """Draw a label above the upper left corner of a box.

    Without room above the box it is drawn inside; where it would leave the image on the right it
    is moved to the left.
    """
    draw, margin = ImageDraw.Draw(image), max(1, round(font.size / 6))
    _, _, text_width, _ = font.getbbox(text)
    width, height = text_width + 2 * margin, 1.3 * font.size
    x = max(0, min(x_min, image.width - width))
    y = y_min - height if y_min >= height else y_min
    draw.rectangle((x, y, x + width, y + height), fill=color)
    red, green, blue = ImageColor.getrgb(color)
    is_bright = 0.299 * red + 0.587 * green + 0.114 * blue > 128
    draw.text((x + margin, y), text, fill='black' if is_bright else 'white', font=font)
