"""Draw a small detection data set in VOC layout: coloured shapes on textured backgrounds.

    python shapes.py --output-folder demo/shapes

It lets everything run on a machine without VOC. The shapes overlap; one that is largely hidden is
marked difficult. The same seed draws the same images.
"""

import dataclasses
import math
import pathlib
import random
import xml.etree.ElementTree as ET

import tyro
from PIL import Image, ImageChops, ImageDraw
from tqdm import tqdm

from utils import exit_on_user_error, make_folder, write_beside


@dataclasses.dataclass
class Parameters:
    """Draw a data set of shapes in VOC layout."""

    # Where JPEGImages, Annotations and ImageSets go.
    output_folder: str = './demo/shapes'
    # Images of the split trainval, to learn from.
    n_train: int = 1000
    # Images of the split test, to evaluate on.
    n_test: int = 100
    # The same number draws the same images.
    seed: int = 0


SUPERSAMPLING = 4       # outlines are drawn this much larger, so that they come out smooth
DIFFICULT_BELOW = 0.5   # part of a shape that must be visible for it not to be difficult
ANNOTATED_FROM = 0.15   # less than that is not there for anybody


def regular_polygon(n_points, radii=(1.,)):
    """Corners on circles of the given radii in turn, around (0, 0), the first one at the top."""
    return [(radii[i % len(radii)] * math.sin(2 * math.pi * i / n_points),
             -radii[i % len(radii)] * math.cos(2 * math.pi * i / n_points))
            for i in range(n_points)]


# Each class has its corners (a circle is a polygon of many) and its part of the colour circle, in
# degrees: a network from scratch has something to start from long before it tells outlines apart.
OUTLINES = {
    'circle': regular_polygon(60),
    'square': [(-.85, -.85), (.85, -.85), (.85, .85), (-.85, .85)],
    'star': regular_polygon(10, radii=(1., .45)),
    'triangle': regular_polygon(3),
}
HUES = {'circle': 0, 'square': 220, 'star': 55, 'triangle': 130}
HUE_SPREAD = 20


def draw_texture(size, colors, dice):
    """An RGB image that wavers between two colours in soft blobs."""
    cells = dice.choice((3, 6, 12))
    blobs = Image.frombytes('L', (cells, cells), dice.randbytes(cells ** 2))
    mask = blobs.resize(size, Image.Resampling.BICUBIC)
    return Image.composite(*(Image.new('RGB', size, color) for color in colors), mask)


def draw_mask(name, size, dice):
    """The mask of one shape of random size, tilt and place; its centre is inside the image."""
    radius = dice.uniform(0.11, 0.18) * min(size) * SUPERSAMPLING
    stretch, tilt = dice.uniform(0.9, 1.1), math.radians(dice.uniform(-15, 15))
    cx, cy = (dice.uniform(0.12, 0.88) * side * SUPERSAMPLING for side in size)
    points = []
    for x, y in OUTLINES[name]:
        x, y = x * radius * stretch, y * radius / stretch
        points.append((cx + x * math.cos(tilt) - y * math.sin(tilt),
                       cy + x * math.sin(tilt) + y * math.cos(tilt)))
    large = Image.new('L', [side * SUPERSAMPLING for side in size])
    ImageDraw.Draw(large).polygon(points, fill=255)
    return large.reduce(SUPERSAMPLING)


def draw_background(size, dice):
    """Soft blobs of two shades of a pale colour."""
    hue, saturation, lightness = dice.randrange(360), dice.randrange(15), dice.randint(30, 70)
    return draw_texture(size, [f'hsl({hue}, {saturation}%, {lightness + shade}%)'
                               for shade in (-6, 6)], dice)


def draw_surface(name, size, dice):
    """Soft blobs of two shades of a colour of a class."""
    hue = (HUES[name] + dice.randint(-HUE_SPREAD, HUE_SPREAD)) % 360
    return draw_texture(size, [f'hsl({hue}, 90%, {dice.randint(35, 60)}%)' for _ in range(2)], dice)


def draw_image(dice):
    """One image and its objects, as a list of (name, visible box, difficult, truncated)."""
    size = dice.choice(((320, 240), (300, 300), (240, 320)))
    image = draw_background(size, dice)
    names, visible, areas = [], [], []
    for _ in range(dice.randint(3, 6)):
        name = dice.choice(list(OUTLINES))
        mask = draw_mask(name, size, dice)
        image.paste(draw_surface(name, size, dice), mask=mask)
        # What is drawn later hides what was drawn before.
        visible = [ImageChops.subtract(earlier, mask) for earlier in visible] + [mask]
        names.append(name)
        areas.append(area(mask))

    objects = []
    for name, mask, whole in zip(names, visible, areas):
        part = area(mask) / whole
        box = mask.point(lambda level: 255 * (level >= 128)).getbbox()
        if part >= ANNOTATED_FROM and box:
            truncated = box[0] == 0 or box[1] == 0 or box[2] == size[0] or box[3] == size[1]
            objects.append((name, box, part < DIFFICULT_BELOW, truncated))
    return image, objects


def area(mask):
    """Pixels that a mask covers, parts of pixels included."""
    return sum(level * count for level, count in enumerate(mask.histogram())) / 255


def write_annotation(path, image_name, size, objects):
    """One image's objects as VOC writes them: pixels counted from 1, both ends included."""
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


@exit_on_user_error
def main(parameters):
    """Draw both splits."""
    root = pathlib.Path(parameters.output_folder)
    images, annotations, splits = (
        make_folder(root / part) for part in ('JPEGImages', 'Annotations', 'ImageSets/Main'))
    n_drawn = 0
    for split, n_images in (('trainval', parameters.n_train), ('test', parameters.n_test)):
        names = []
        for number in tqdm(range(n_drawn + 1, n_drawn + 1 + n_images), split):
            name = f'{number:06d}'
            image, objects = draw_image(random.Random(f'{parameters.seed} {number}'))
            with write_beside(images / f'{name}.jpg') as beside:
                image.save(beside, quality=90)
            with write_beside(annotations / f'{name}.xml') as beside:
                write_annotation(beside, f'{name}.jpg', image.size, objects)
            names.append(name)
        with write_beside(splits / f'{split}.txt') as beside:
            beside.write_text('\n'.join(names) + '\n')
        n_drawn += n_images
    print(f'{n_drawn} images drawn in {root}')


if __name__ == '__main__':
    main(tyro.cli(Parameters))
