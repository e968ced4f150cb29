"""Draw boxes and labels onto images."""

import torch
from PIL import ImageColor, ImageDraw, ImageFont

from utils import find_intersection


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
    margin = max(1, round(font.size / 6))
    boxes, names = prediction['boxes'].float().cpu(), prediction['labels']
    for box, name in list(zip(boxes.tolist(), names))[::-1]:
        draw.rectangle(box_pixels(box), outline=colors[name], width=margin)
    texts = [f'{name} {score:.2f}' for name, score in zip(names, prediction['scores'].tolist())]
    sizes = [(font.getbbox(text)[2] + 2 * margin, 1.3 * font.size) for text in texts]
    labels = zip(place_labels(boxes, sizes, image.size), sizes, texts, names)
    for (x, y), (width, height), text, name in list(labels)[::-1]:
        draw.rectangle((x, y, x + width, y + height), fill=colors[name])
        draw.text((x + margin, y), text, fill=choose_ink(colors[name]), font=font)


def box_pixels(box):
    """Return the first and the last pixel of a box, whose corners are edges, for Pillow."""
    x_min, y_min, x_max, y_max = box
    return x_min, y_min, max(x_min, x_max - 1), max(y_min, y_max - 1)


def place_labels(boxes, sizes, image_size):
    """Choose a place for the label of each box, where it covers little of boxes and labels.

    That is above the box or below it, at its left or its right edge; of equal places the first.
    A label that would leave the image is moved inside.

    Args:
        boxes: (n, 4), corners; the first ones choose first. The last ones may have no label.
        sizes: width and height of each label, in the same unit.
        image_size: width and height.

    Returns:
        The upper left corner of each label: a list of (x, y).
    """
    places, taken = [], boxes
    weights = torch.ones(len(boxes))
    for (x_min, y_min, x_max, y_max), (width, height) in zip(boxes.tolist(), sizes):
        corners = torch.tensor([(max(0., min(x, image_size[0] - width)),
                                 max(0., min(y, image_size[1] - height)))
                                for y in (y_min - height, y_max) for x in (x_min, x_max - width)])
        rectangles = torch.cat([corners, corners + torch.tensor([width, height])], dim=1)   # (4, 4)
        costs = find_intersection(rectangles, taken) @ weights
        best = int(costs.argmin())
        places.append(tuple(corners[best].tolist()))
        # A label on a label is worse than a label on a box.
        taken = torch.cat([taken, rectangles[best:best + 1]])
        weights = torch.cat([weights, torch.tensor([10.])])
    return places


def choose_ink(color):
    """Choose black or white for a text on a color '#rrggbb'."""
    red, green, blue = ImageColor.getrgb(color)
    return 'black' if 0.299 * red + 0.587 * green + 0.114 * blue > 128 else 'white'
