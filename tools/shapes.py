"""Draw a small detection data set in VOC layout: colored shapes on textured backgrounds.

    python -m tools.shapes --output-folder demo/shapes

With it all scripts run on a machine without VOC. In every fifth image shapes may hide much of
each other; those that are mostly hidden are marked difficult. The same seed draws the same images.
"""

import dataclasses
import math
import pathlib
import random
import xml.etree.ElementTree as ET

import tyro
from PIL import Image, ImageChops, ImageDraw
from tqdm import tqdm

from support.errors import atomic_write, check_at_least, exit_on_user_error, make_folder


@dataclasses.dataclass
class Parameters:
    """Draw a data set of shapes in VOC layout."""

    # Folder for JPEGImages, Annotations and ImageSets.
    output_folder: str = './demo/shapes'
    # Images of the split trainval, to train on.
    n_train: int = 1000
    # Images of the split test, to evaluate on.
    n_test: int = 100
    # Random seed; the same one draws the same images.
    seed: int = 0


SUPERSAMPLING = 4       # shapes are drawn this much larger and reduced, for smooth outlines
DIFFICULT_BELOW = 0.5   # a shape is difficult if a smaller part of it is visible
# The part of each shape that is visible at least. Each image takes one of these at random, so in
# every fifth of them shapes may hide much of each other.
LEAST_VISIBLE = (0.2, 0.95, 0.95, 0.95, 0.95)
PLACING_TRIES = 50      # for all shapes of an image together


def regular_polygon(n_points, radii=(1.,)):
    """Return the corners of a polygon around (0, 0), the first one at the top.

    The corners lie on circles of the given radii in turn: two radii make a star.
    """
    return [(radii[i % len(radii)] * math.sin(2 * math.pi * i / n_points),
             -radii[i % len(radii)] * math.cos(2 * math.pi * i / n_points))
            for i in range(n_points)]


# The corners of each class; a circle is a polygon with many.
OUTLINES = {
    'circle': regular_polygon(60),
    'square': [(-.95, -.95), (.95, -.95), (.95, .95), (-.95, .95)],
    'star': regular_polygon(10, radii=(1., .45)),
    'triangle': regular_polygon(3, radii=(1.15,)),
}

# The hue of each class in degrees, varied by up to HUE_SPREAD. Color is easy to learn: a network
# trained from scratch on it detects objects long before it distinguishes outlines. The classes stay
# apart when the augmentation changes the hue by up to 18 degrees.
HUES = {'circle': 0, 'square': 270, 'star': 90, 'triangle': 180}
HUE_SPREAD = 20


@exit_on_user_error
def main(parameters):
    """Draw the splits trainval and test."""
    folder = pathlib.Path(parameters.output_folder)
    n_train, n_test = parameters.n_train, parameters.n_test
    check_at_least(0, n_train=n_train, n_test=n_test)
    draw_split(folder, 'trainval', range(1, n_train + 1), parameters.seed)
    draw_split(folder, 'test', range(n_train + 1, n_train + n_test + 1), parameters.seed)
    print(f'{n_train + n_test} images drawn in {folder}')


# --------------------------------------------------------------------------------------------------
# Files in VOC layout
# --------------------------------------------------------------------------------------------------


def draw_split(folder, split, numbers, seed):
    """Draw the images of a split, named by `numbers`; an image depends on its number and seed."""
    images, annotations, splits = (
        make_folder(folder / part) for part in ('JPEGImages', 'Annotations', 'ImageSets/Main'))
    names = [f'{number:06d}' for number in numbers]
    for number, name in zip(tqdm(numbers, split), names):
        image, objects = draw_image(random.Random(f'{seed} {number}'))
        with atomic_write(images / f'{name}.jpg') as path:
            image.save(path, quality=90)
        with atomic_write(annotations / f'{name}.xml') as path:
            write_annotation(path, f'{name}.jpg', image.size, objects)
    with atomic_write(splits / f'{split}.txt') as path:
        path.write_text('\n'.join(names) + '\n')


def write_annotation(path, image_name, size, objects):
    """Write the annotation of one image in VOC's XML.

    Args:
        size: width and height of the image.
        objects: list of (name, box, difficult, truncated), boxes as edges in pixels. VOC counts
            pixels from 1 and includes both ends, so the low edges are written plus 1.
    """
    root = ET.Element('annotation')
    ET.SubElement(root, 'filename').text = image_name
    size_element = ET.SubElement(root, 'size')
    for tag, value in zip(('width', 'height', 'depth'), (*size, 3)):
        ET.SubElement(size_element, tag).text = str(value)
    for name, box, difficult, truncated in objects:
        element = ET.SubElement(root, 'object')
        ET.SubElement(element, 'name').text = name
        ET.SubElement(element, 'truncated').text = str(int(truncated))
        ET.SubElement(element, 'difficult').text = str(int(difficult))
        corners = ET.SubElement(element, 'bndbox')
        for tag, value in zip(('xmin', 'ymin', 'xmax', 'ymax'),
                              (box[0] + 1, box[1] + 1, box[2], box[3])):
            ET.SubElement(corners, tag).text = str(value)
    ET.indent(root)
    ET.ElementTree(root).write(path)


# --------------------------------------------------------------------------------------------------
# Images
# --------------------------------------------------------------------------------------------------


def draw_image(rng):
    """Draw one image of 4 to 6 shapes; all randomness comes from `rng`, a `random.Random`.

    A shape that would hide too much of an earlier one is not drawn, and another one is tried. After
    PLACING_TRIES the image has as many as there are.

    Returns:
        The PIL image, and its objects as a list of (name, box of the visible part, difficult,
        truncated), boxes as edges (x_min, y_min, x_max, y_max) in pixels.
    """
    size = rng.choice(((320, 270), (300, 300), (270, 320)))
    image = draw_background(size, rng)
    names, visible_masks, areas = [], [], []
    n_shapes, least_visible = rng.randint(4, 6), rng.choice(LEAST_VISIBLE)
    for _ in range(PLACING_TRIES):
        name = rng.choice(list(OUTLINES))
        mask = draw_mask(name, size, rng)
        # A shape hides the parts of earlier shapes that it covers.
        remaining = [ImageChops.subtract(earlier, mask) for earlier in visible_masks]
        if any(mask_area(part) < least_visible * area for part, area in zip(remaining, areas)):
            continue
        image.paste(draw_surface(name, size, rng), mask=mask)
        visible_masks = [*remaining, mask]
        names.append(name)
        areas.append(mask_area(mask))
        if len(names) == n_shapes:
            break

    objects = []
    for name, mask, area in zip(names, visible_masks, areas):
        box = mask.point(lambda level: 255 * (level >= 128)).getbbox()
        truncated = box[0] == 0 or box[1] == 0 or box[2] == size[0] or box[3] == size[1]
        objects.append((name, box, mask_area(mask) / area < DIFFICULT_BELOW, truncated))
    return image, objects


def draw_background(size, rng):
    """Draw soft blobs in two shades of a random pale color."""
    hue, saturation, lightness = rng.randrange(360), rng.randrange(15), rng.randint(30, 70)
    return draw_texture(size, [f'hsl({hue}, {saturation}%, {lightness + shade}%)'
                               for shade in (-6, 6)], rng)


def draw_surface(name, size, rng):
    """Draw soft blobs in two shades of a random color of a class."""
    hue = (HUES[name] + rng.randint(-HUE_SPREAD, HUE_SPREAD)) % 360
    return draw_texture(size, [f'hsl({hue}, 90%, {rng.randint(35, 60)}%)' for _ in range(2)], rng)


def draw_texture(size, colors, rng):
    """Blend two colors into an RGB image of soft random blobs."""
    cells = rng.choice((3, 6, 12))
    blobs = Image.frombytes('L', (cells, cells), rng.randbytes(cells ** 2))
    mask = blobs.resize(size, Image.Resampling.BICUBIC)
    return Image.composite(*(Image.new('RGB', size, color) for color in colors), mask)


def draw_mask(name, size, rng):
    """Draw the mask of one shape of random size, tilt and position, its center in the image."""
    radius = rng.uniform(0.13, 0.17) * min(size) * SUPERSAMPLING
    stretch, tilt = rng.uniform(0.95, 1.05), math.radians(rng.uniform(-15, 15))
    cx, cy = (rng.uniform(0.15, 0.85) * side * SUPERSAMPLING for side in size)
    points = []
    for x, y in OUTLINES[name]:
        x, y = x * radius * stretch, y * radius / stretch
        points.append((cx + x * math.cos(tilt) - y * math.sin(tilt),
                       cy + x * math.sin(tilt) + y * math.cos(tilt)))
    large = Image.new('L', [side * SUPERSAMPLING for side in size])
    ImageDraw.Draw(large).polygon(points, fill=255)
    return large.reduce(SUPERSAMPLING)


def mask_area(mask):
    """Return the pixels that a mask covers, fractions of pixels included."""
    return sum(level * count for level, count in enumerate(mask.histogram())) / 255


if __name__ == '__main__':
    main(tyro.cli(Parameters))
