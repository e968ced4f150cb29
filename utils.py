"""Functions that all scripts share: boxes, annotations, images, augmentation, evaluation.

Seven sections, each of which uses only the sections above it:

1. Classes and labels                            5. Images
2. Box coordinates                               6. Augmentation
3. Jaccard overlap and non-maximum suppression   7. Mean average precision
4. VOC annotations

Boxes are edges, not pixel indices (section 4 converts VOC's): (x_min, y_min, x_max, y_max) is the
interval from the left edge of the first column to the right edge of the last, so a width is
x_max - x_min, without a "+ 1".

Letters in comments and docstrings:
N images in a batch, P = 8732 priors, C classes with background 0, O objects in an image.
"""

import colorsys
import functools
import math
import random
import xml.etree.ElementTree as ET
from typing import NamedTuple

import torch
from PIL import Image
from torch.nn.utils.rnn import pad_sequence
from torchvision.transforms.functional import pil_to_tensor

from support.errors import BrokenImageError, UserError

# --------------------------------------------------------------------------------------------------
# 1. Classes and labels
#
# Class names are mapped to class indices by a label_map, with 0 for the background, which is never
# annotated. The one here is VOC's. create_data_lists.py makes those of other data sets, and writes
# them to label_map.json; checkpoints hold them, too.
# --------------------------------------------------------------------------------------------------

voc_labels = ('aeroplane', 'bicycle', 'bird', 'boat', 'bottle', 'bus', 'car', 'cat', 'chair', 'cow',
              'diningtable', 'dog', 'horse', 'motorbike', 'person', 'pottedplant', 'sheep', 'sofa',
              'train', 'tvmonitor')


def number_classes(names):
    """Return the label map of class names, from 1 in the given order; background is 0."""
    return {'background': 0, **{name: index for index, name in enumerate(names, 1)}}


label_map = number_classes(voc_labels)
rev_label_map = {index: name for name, index in label_map.items()}


def default_label_map(n_classes):
    """Return VOC's label map for 21 classes, and numbered names for any other number of them."""
    if n_classes == len(label_map):
        return dict(label_map)
    return number_classes(f'class {i}' for i in range(1, n_classes))


def distinct_colors(label_map):
    """Choose a color for every class: {class name: '#rrggbb'}, white for the background."""
    # Steps of the golden ratio spread any number of hues around the color wheel; alternating
    # lightness separates neighbors.
    colors = {}
    for name, index in label_map.items():
        lightness = 0.45 + 0.15 * (index % 2)
        rgb = colorsys.hls_to_rgb(index * 0.618034 % 1, lightness, 0.9)
        colors[name] = '#' + ''.join(f'{round(255 * level):02x}' for level in rgb)
    return {**colors, 'background': '#ffffff'}


label_color_map = distinct_colors(label_map)


# --------------------------------------------------------------------------------------------------
# 2. Box coordinates
#
# Three representations of a box: corners (no suffix, or _xy) for geometry, center and size (_cxcy)
# for priors, and offsets from a prior (gcxgcy or locs; g in the paper), which the network predicts.
# --------------------------------------------------------------------------------------------------


def xy_to_cxcy(xy):
    """Convert corners (x_min, y_min, x_max, y_max) to center and size (cx, cy, w, h): (..., 4)."""
    return torch.cat([(xy[..., :2] + xy[..., 2:]) / 2, xy[..., 2:] - xy[..., :2]], dim=-1)


def cxcy_to_xy(cxcy):
    """Convert center and size (cx, cy, w, h) to corners (x_min, y_min, x_max, y_max): (..., 4)."""
    return torch.cat([cxcy[..., :2] - cxcy[..., 2:] / 2, cxcy[..., :2] + cxcy[..., 2:] / 2], dim=-1)


def cxcy_to_gcxgcy(cxcy, priors_cxcy):
    """Encode boxes as offsets from their priors: (..., 4) both, in the same unit.

        g_cx = (cx - prior_cx) / (prior_w / 10)       g_w = 5 * log(w / prior_w)
        g_cy = (cy - prior_cy) / (prior_h / 10)       g_h = 5 * log(h / prior_h)

    Relative to the prior's size, an offset means the same for small and for large priors (section
    2.2 of the paper). The factors 10 and 5 are the "variances" 0.1 and 0.2 of the published Caffe
    code: they bring the offsets of matched priors to a standard deviation near 1.

    Returns:
        (..., 4) offsets, without a unit.
    """
    centers = (cxcy[..., :2] - priors_cxcy[..., :2]) / (priors_cxcy[..., 2:] / 10)
    return torch.cat([centers, torch.log(cxcy[..., 2:] / priors_cxcy[..., 2:]) * 5], dim=-1)


def gcxgcy_to_cxcy(gcxgcy, priors_cxcy):
    """Decode offsets from priors to boxes, the inverse of `cxcy_to_gcxgcy()`: (..., 4) all."""
    centers = gcxgcy[..., :2] * priors_cxcy[..., 2:] / 10 + priors_cxcy[..., :2]
    return torch.cat([centers, torch.exp(gcxgcy[..., 2:] / 5) * priors_cxcy[..., 2:]], dim=-1)


def pad_objects(boxes, labels):
    """Stack the objects of images that have different numbers of them, padded with zeros.

    The padding has boxes without area, which overlap nothing, and label 0, the background.

    Args:
        boxes, labels: lists of N tensors, (O, 4) and (O,).

    Returns:
        boxes (N, O, 4) and labels (N, O), with O the largest number of objects, at least 1.
    """
    boxes = pad_sequence(list(boxes), batch_first=True)
    labels = pad_sequence(list(labels), batch_first=True)
    if boxes.shape[1] == 0:     # no objects in the whole batch
        return boxes.new_zeros(len(boxes), 1, 4), labels.new_zeros(len(boxes), 1)
    return boxes, labels


# --------------------------------------------------------------------------------------------------
# 3. Jaccard overlap and non-maximum suppression
#
# The Jaccard overlap (intersection over union, IoU) measures how similar two boxes are: 1 for equal
# boxes, 0 for disjoint ones. Matching, suppression, cropping and mAP are all based on it.
# --------------------------------------------------------------------------------------------------


def find_intersection(set_1, set_2):
    """Compute the intersection area of each box of one set with each box of the other.

    Args:
        set_1, set_2: (..., n1, 4) and (..., n2, 4), corners in any unit.

    Returns:
        (..., n1, n2), in the unit squared.
    """
    # Shapes (..., n1, 1) and (..., 1, n2), so that each box is combined with each. Contiguous,
    # since strided views (every fourth number of a tensor) make the lines below three times as
    # slow.
    x_min_1, y_min_1, x_max_1, y_max_1 = set_1.unsqueeze(-2).movedim(-1, 0).contiguous()
    x_min_2, y_min_2, x_max_2, y_max_2 = set_2.unsqueeze(-3).movedim(-1, 0).contiguous()
    # Lower right minus upper left corner of the intersection, 0 where the boxes are disjoint.
    width = (torch.minimum(x_max_1, x_max_2) - torch.maximum(x_min_1, x_min_2)).clamp(min=0)
    height = (torch.minimum(y_max_1, y_max_2) - torch.maximum(y_min_1, y_min_2)).clamp(min=0)
    return width * height                                                   # (..., n1, n2)


def find_jaccard_overlap(set_1, set_2):
    """Compute the Jaccard overlap of each box of one set with each box of the other.

        IoU = intersection / union = intersection / (area_1 + area_2 - intersection)

    A box without area (also one whose corners are exchanged) overlaps nothing: 0, not NaN.

    Args:
        set_1, set_2: (..., n1, 4) and (..., n2, 4), corners in any unit.

    Returns:
        (..., n1, n2), from 0 to 1.
    """
    intersection = find_intersection(set_1, set_2)                          # (..., n1, n2)
    areas_1 = (set_1[..., 2:] - set_1[..., :2]).clamp(min=0).prod(dim=-1)   # (..., n1)
    areas_2 = (set_2[..., 2:] - set_2[..., :2]).clamp(min=0).prod(dim=-1)   # (..., n2)
    union = areas_1[..., :, None] + areas_2[..., None, :] - intersection
    return intersection / union.clamp(min=torch.finfo(union.dtype).tiny)


def non_max_suppression(boxes, scores, max_overlap, groups=None):
    """Remove boxes that overlap a better box too much.

        sort the boxes by falling score, equal scores by rising index
        for each box: keep it, unless an earlier box that was *kept* overlaps it too much

    torchvision.ops.nms() gives the same result for one group; this one can be read.

    Args:
        boxes: (K, 4), corners in any unit.
        scores: (K,)
        max_overlap: two boxes may both be kept up to this IoU.
        groups: (K,) int64; boxes of different groups (classes, images) never suppress each other.
            None: all boxes are in one group.

    Returns:
        Indices of the kept boxes, (n,) int64, by falling score and then by rising index.
    """
    if groups is None:
        groups = torch.zeros_like(scores, dtype=torch.int64)
    by_score = scores.argsort(descending=True, stable=True)
    order = by_score[groups[by_score].argsort(stable=True)]     # by group, then by falling score
    _, counts = groups[order].unique_consecutive(return_counts=True)

    # Many groups at once: each is a row of indices, padded with -1 to the length of the longest.
    is_kept = torch.zeros_like(groups, dtype=torch.bool)
    for rows in batch_by_length(order.split(counts.tolist())):
        indices = pad_sequence(rows, batch_first=True, padding_value=-1)    # (groups, longest)
        is_padding = indices < 0
        # Boxes without area overlap nothing.
        padded_boxes = boxes[indices].masked_fill(is_padding.unsqueeze(2), 0)
        overlap = find_jaccard_overlap(padded_boxes, padded_boxes)  # (groups, longest, longest)
        is_kept[indices[find_unsuppressed(overlap, max_overlap) & ~is_padding]] = True
    return by_score[is_kept[by_score]]


def find_unsuppressed(overlap, max_overlap):
    """Find what greedy non-maximum suppression keeps of boxes sorted by falling score, in rounds.

    Each round decides on all boxes anew: a box stays unless a box that was kept in the previous
    round suppresses it (before round 1 all are kept). Let a suppress b, and b suppress c. Round 1
    removes b and c. In round 2, b no longer suppresses c, so a and c are kept. Round 3 changes
    nothing: done.

    The best box is final after round 1, the second best after round 2 at the latest, and so on, so
    the result is that of the loop over boxes. Chains as above are short, so a few rounds suffice.

    Args:
        overlap: (..., K, K), IoU of the boxes with each other.

    Returns:
        (..., K) bool, True for the kept boxes.
    """
    # [i, j]: box i suppresses box j, if i is kept. Only a better box may: the upper triangle.
    suppresses = (overlap > max_overlap).triu(diagonal=1).to(overlap.dtype)
    keep = overlap.new_ones(overlap.shape[:-1])
    while True:
        # keep @ suppresses: for each box, the number of kept boxes that suppress it
        n_suppressors = (keep.unsqueeze(-2) @ suppresses).squeeze(-2)
        still_kept = (n_suppressors == 0).to(overlap.dtype)
        if torch.equal(still_kept, keep):
            return keep.bool()
        keep = still_kept


# IoUs that are computed at once, for more than one group: 4 MiB fit into the cache of a CPU.
MAX_OVERLAPS_AT_ONCE = 2 ** 20


def batch_by_length(rows):
    """Split tensors of different lengths into lists of similar lengths, to be padded together.

    The work for a padded list grows with the square of its longest row, so no row is padded to more
    than twice its length.
    """
    rows = sorted(rows, key=len, reverse=True)
    while rows:
        longest = len(rows[0])
        batch = [row for row in rows[:max(1, MAX_OVERLAPS_AT_ONCE // longest ** 2)]
                 if 2 * len(row) >= longest]
        yield batch
        rows = rows[len(batch):]    # sorted by length, so the batch was the beginning of the rows


# --------------------------------------------------------------------------------------------------
# 4. VOC annotations
#
# One XML file per image, which lists its objects.
# --------------------------------------------------------------------------------------------------


def parse_annotation(annotation_path, label_map):
    """Read the objects of one VOC annotation file.

    VOC counts pixels from 1 and includes both ends, so `xmin..xmax` becomes the edges
    (xmin - 1, xmax). Nothing is clipped or dropped here. Boxes of an object's parts (head, hand,
    foot) are not objects. Objects marked `difficult` (hard to recognize) do not count in
    evaluation; without a mark they do.

    Args:
        annotation_path: the XML file.
        label_map: class names to indices; None to keep the names as labels.

    Returns:
        {'boxes': [[x_min, y_min, x_max, y_max], ...] in pixels, 'labels': [...],
        'difficulties': [...]}

    Raises:
        UserError: no such file, malformed XML, a missing or invalid value, an unknown class.
    """
    return parse_objects(read_xml(annotation_path), annotation_path, label_map)


def parse_objects(root, annotation_path, label_map):
    """Read the objects below the root element of an annotation; see `parse_annotation()`."""
    if root.tag != 'annotation':
        raise UserError(f'{annotation_path}: the root element is <{root.tag}>, not <annotation>; '
                        f'export the annotations in the format of VOC')
    boxes, labels, difficulties = [], [], []
    for number, obj in enumerate(root.findall('object'), 1):
        where = f'{annotation_path}, object {number}'
        name = (obj.findtext('name') or '').strip()
        if not name.isprintable() or not name:
            raise UserError(f'{where}: {name!r} is not a class name; correct <name>...</name>')
        if name == 'background':
            raise UserError(f"{where}: class 'background' stands for no object; rename it")
        if label_map is not None and name not in label_map:
            raise UserError(f'{where}: class {name!r} is none of '
                            f'{sorted(label_map.keys() - {"background"})}; correct it, or add it '
                            f'to the classes')
        x_min, y_min, x_max, y_max = (read_number(obj, f'bndbox/{corner}', where)
                                      for corner in ('xmin', 'ymin', 'xmax', 'ymax'))
        boxes.append([x_min - 1, y_min - 1, x_max, y_max])
        labels.append(name if label_map is None else label_map[name])
        difficulties.append(bool(read_number(obj, 'difficult', where, default=0)))
    return {'boxes': boxes, 'labels': labels, 'difficulties': difficulties}


def read_xml(path):
    """Read the root element of an XML file, or raise a UserError."""
    try:
        return ET.parse(path).getroot()
    except FileNotFoundError as error:
        raise UserError(f'{path}: no such annotation; every image of a split needs one') from error
    except (ET.ParseError, ValueError, LookupError) as error:  # the last two: unknown encoding
        raise UserError(f'{path}: malformed XML ({error}); correct or replace it') from error


def read_number(element, tag, where, default=None):
    """Read the finite number in a tag below an XML element, or raise a UserError.

    The default is for a tag that is missing or empty, as labelme writes <difficult/>.
    """
    text = element.findtext(tag)
    if default is not None and not (text or '').strip():
        return default
    try:
        number = float(text)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise UserError(f'{where}: <{tag}> holds {text!r}, not a number; correct it')
    return number


# --------------------------------------------------------------------------------------------------
# 5. Images
#
# An image is a PIL image in RGB, then a uint8 tensor (3, 300, 300), and on the device the
# normalized floats that the network takes.
# --------------------------------------------------------------------------------------------------

INPUT_SIZE = 300    # width and height of SSD300's input, in pixels
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # red, green, blue
FILLER = tuple(round(255 * mean) for mean in IMAGENET_MEAN)     # around the image after a zoom-out

IMAGE_SUFFIXES = ('.jpg', '.jpeg', '.png', '.bmp', '.webp', '.tif', '.tiff', '.gif')


def read_image(path):
    """Read an image file as an RGB PIL image, or raise a BrokenImageError."""
    return open_image(path, to_rgb)


def read_image_size(path):
    """Read width and height of an image file from its header, or raise a BrokenImageError."""
    return open_image(path, lambda image: image.size)


def open_image(path, function):
    """Open an image file and apply a function to it, or raise a BrokenImageError."""
    try:
        with Image.open(path) as image:
            return function(image)
    except MemoryError:
        raise
    except Exception as error:  # a corrupt file may raise any, such as struct.error and TypeError
        raise BrokenImageError(f'{path}: cannot be decoded ({error}); replace it, or run '
                               f'create_data_lists.py with --skip-broken') from error


def to_rgb(image):
    """Convert a PIL image of any mode to a new one in RGB.

    16 bits and floats from 0 to 1 are scaled to 8 bits, transparent pixels become white.
    """
    if image.mode.startswith(('I', 'F')):
        has_16_bits, is_float = image.mode.startswith('I;16'), image.mode.startswith('F')
        image = image.convert('F')
        highest, scale = image.getextrema()[1], 1
        if has_16_bits or highest > 255:
            scale = 255 / max(highest, 65535)
        elif is_float and highest <= 1:
            scale = 255
        # In these modes Pillow accepts functions of the form value * scale + offset alone.
        image = image.point(lambda value: value * scale + 0).convert('L')
    if image.has_transparency_data:
        image = image.convert('RGBA')
        white = Image.new('RGBA', image.size, 'white')
        image = Image.alpha_composite(white, image)
    return image.convert('RGB') if image.mode != 'RGB' else image.copy()


def normalize(images, mean=None, std=None):
    """Convert uint8 images to floats with the mean and std that the network was trained with.

    Args:
        images: (..., 3, H, W) uint8.
        mean, std: (3,) tensors on the device of the images, for red, green and blue from 0 to 1;
            None: those of ImageNet. `SSD300.normalize()` passes those that belong to its weights.

    Returns:
        (..., 3, H, W) float32.
    """
    if mean is None:
        mean, std = imagenet_constants(images.device)
    return (images - 255 * mean.view(3, 1, 1)) / (255 * std.view(3, 1, 1))


@functools.cache
def imagenet_constants(device):
    """ImageNet's mean and std on a device, (3,) each; copied there once and not for each batch."""
    return torch.tensor([IMAGENET_MEAN, IMAGENET_STD], device=device).unbind(0)


# --------------------------------------------------------------------------------------------------
# 6. Augmentation
#
# Zoom-out and crop choose a window of the source image: four numbers in its pixels, which may reach
# beyond its border. The window is warped (resized, whatever its aspect ratio) to 300 x 300 pixels.
# `sample_...` functions choose windows and colors at random, the others apply them. The image is
# resampled once, at the end: no enlarged canvas is built, and colors are changed at the final size.
# --------------------------------------------------------------------------------------------------

# Minimum IoU of a crop and an object (section 2.2 of the paper, "Data augmentation"): None is no
# crop, 0 is a crop without a minimum.
CROP_OPTIONS = (None, 0.1, 0.3, 0.5, 0.7, 0.9, 0.)
CROP_TRIES = 50


def transform(image, boxes, labels, difficulties, split, antialias=True, size=INPUT_SIZE):
    """Convert an image and its objects to the network's input, with augmentation in training.

    TRAIN: random colors, zoom-out, crop, flip and warp, sampled with Python's `random`. TEST: the
    warp alone; no object is dropped.

    Args:
        image: PIL image, RGB.
        boxes, labels, difficulties: (O, 4) in pixels, (O,) int64, (O,) bool.
        split: 'TRAIN' or 'TEST'.
        antialias, size: see `warp()`.

    Returns:
        image (3, 300, 300) uint8, boxes (O, 4) in fractions, labels (O,), difficulties (O,).
    """
    assert split in ('TRAIN', 'TEST'), f'split is {split!r}, not TRAIN or TEST'
    window = (0, 0, *image.size)
    if split == 'TEST':
        return (pil_to_tensor(warp(image, window, antialias=antialias, size=size)),
                boxes / boxes.new_tensor([*image.size, *image.size]), labels, difficulties)

    colors = sample_colors()
    if random.random() < 0.5:
        larger = sample_zoom_out(*image.size)
        # Not if every object would become smaller than a pixel of the result.
        if len(boxes) == 0 or find_kept_objects(boxes.new_tensor([larger]), boxes).any():
            window = larger
    window = sample_crop(window, boxes)
    boxes, labels, difficulties = crop(boxes, labels, difficulties, window)
    image = warp(image, window, lambda part: distort(part, **colors), antialias, size)
    if random.random() < 0.5:
        image, boxes = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT), flip(boxes)
    return pil_to_tensor(image), boxes, labels, difficulties


def sample_zoom_out(width, height):
    """Sample a window of 1 to 4 times the image's width and height, the image anywhere in it."""
    zoom = random.uniform(1, 4)
    left, top = (random.uniform(0, (zoom - 1) * side) for side in (width, height))
    return (-left, -top, zoom * width - left, zoom * height - top)


def sample_crop(window, boxes):
    """Sample a part of a window that keeps at least one object (section 2.2 of the paper).

        sample an option of CROP_OPTIONS; None: return the whole window
        up to 50 times: sample a crop, with sides 0.3 to 1 times the window's (from 0.1 in the
            paper) and an aspect ratio in pixels of 0.5 to 2; return it if it keeps an object whose
            IoU with it reaches the option's minimum
        else sample another option

    Args:
        window: (x_min, y_min, x_max, y_max) in pixels of the source image.
        boxes: (O, 4) in pixels of the source image.
    """
    if len(boxes) == 0:
        return window
    x_min, y_min, x_max, y_max = window
    while True:
        min_overlap = random.choice(CROP_OPTIONS)
        if min_overlap is None:
            return window
        crops = []
        for _ in range(CROP_TRIES):
            width = random.uniform(0.3, 1) * (x_max - x_min)
            height = random.uniform(0.3, 1) * (y_max - y_min)
            left, top = random.uniform(x_min, x_max - width), random.uniform(y_min, y_max - height)
            if 0.5 <= width / height <= 2:
                crops.append((left, top, left + width, top + height))
        # All crops are checked at once, and the first suitable one is taken.
        windows = torch.tensor(crops).view(-1, 4)
        overlaps_enough = find_jaccard_overlap(windows, boxes) >= min_overlap       # (n, O)
        suitable = (find_kept_objects(windows, boxes) & overlaps_enough).any(dim=1).tolist()
        if True in suitable:
            return crops[suitable.index(True)]


def find_kept_objects(windows, boxes):
    """Find the objects that each window keeps.

    The center of an object must be inside, and what is left of it after clipping must have a width
    and a height of at least 1/300 of the window's: one pixel of SSD300's input.

    Args:
        windows, boxes: (n, 4) and (O, 4), corners in the same unit.

    Returns:
        (n, O) bool.
    """
    low, high = windows[:, None, :2], windows[:, None, 2:]              # (n, 1, 2)
    centers = (boxes[:, :2] + boxes[:, 2:]) / 2                         # (O, 2)
    sides = torch.minimum(boxes[:, 2:], high) - torch.maximum(boxes[:, :2], low)    # (n, O, 2)
    kept = (centers > low) & (centers < high) & (sides * INPUT_SIZE >= high - low)
    return kept.all(dim=2)


def crop(boxes, labels, difficulties, window):
    """Keep the objects of a window, clipped to it, in fractions of it.

    Args:
        boxes, labels, difficulties: (O, 4) in pixels, (O,), (O,).
        window: (x_min, y_min, x_max, y_max) in pixels.
    """
    window = boxes.new_tensor(window)
    kept = find_kept_objects(window.unsqueeze(0), boxes).squeeze(0)
    origin, size = window[:2].repeat(2), (window[2:] - window[:2]).repeat(2)
    return ((boxes[kept] - origin) / size).clamp(0, 1), labels[kept], difficulties[kept]


def flip(boxes):
    """Mirror boxes (O, 4) left to right, in fractions of the image."""
    return torch.stack([1 - boxes[:, 2], boxes[:, 1], 1 - boxes[:, 0], boxes[:, 3]], dim=1)


def sample_colors():
    """Sample the arguments of `distort()`, each change with probability 0.5.

    The ranges are those of the published Caffe code, but for hue: its 18 are steps of 2 degrees.
    """
    return {
        'brightness': random.choice((0., random.uniform(-32, 32))),
        'contrast': random.choice((1., random.uniform(0.5, 1.5))),
        'saturation': random.choice((1., random.uniform(0.5, 1.5))),
        'hue': random.choice((0., random.uniform(-18, 18))),
        'contrast_first': random.choice((True, False)),
    }


def distort(image, brightness, contrast, saturation, hue, contrast_first):
    """Change the colors of an RGB image; returns a new one.

    Args:
        brightness: added to the levels from 0 to 255.
        contrast: factor of the levels.
        saturation: factor.
        hue: degrees.
        contrast_first: contrast before saturation and hue, not after.
    """
    def lookup_table(change):
        """A table of 256 levels, for `Image.point`."""
        return [min(max(round(change(level)), 0), 255) for level in range(256)]

    first = contrast if contrast_first else 1.
    if brightness != 0 or first != 1:
        table = lookup_table(lambda level: min(max(level + brightness, 0), 255) * first)
        image = image.point(table * 3)
    if saturation != 1 or hue != 0:
        # Pillow's hue is 0 to 255 for 0 to 360 degrees, so 255 is 0 again.
        turned = [round(level + hue * 255 / 360) % 255 for level in range(256)]
        # One table per channel, one after the other: hue, saturation, value (unchanged).
        table = turned + lookup_table(lambda level: level * saturation) + list(range(256))
        image = image.convert('HSV').point(table).convert('RGB')
    if contrast != 1 and not contrast_first:
        image = image.point(lookup_table(lambda level: level * contrast) * 3)
    return image


def warp(image, window, change=None, antialias=True, size=INPUT_SIZE):
    """Resize a window of an image to a square, with a filler where it reaches past the border.

    Args:
        image: PIL image, RGB.
        window: (x_min, y_min, x_max, y_max) in its pixels.
        change: a function that is applied to the part that is image and not filler, at its final
            size.
        antialias: average all source pixels that become one pixel of the result, and not only the
            four nearest to its center.
        size: width and height of the result, `input_size` of the network.
    """
    # For x and y: `step` source pixels become one pixel of the result, whose pixel i shows the
    # source from low + i * step to low + (i + 1) * step. From `first` up to `last` (exclusive) this
    # is within the image; everywhere else the filler is left. A span is that range of the result,
    # and the range of the source that is resized to it.
    spans = []
    for low, high, side in zip(window[:2], window[2:], image.size):
        step = (high - low) / size
        # 1e-6 against rounding errors: 21 / (21 / 300) is a little less than 300.
        first = max(0, math.ceil(-low / step - 1e-6))
        last = min(size, math.floor((side - low) / step + 1e-6))
        spans.append((first, last, max(0., low + first * step), min(side, low + last * step)))
    (left, right, x_min, x_max), (top, bottom, y_min, y_max) = spans
    result = Image.new('RGB', (size, size), FILLER)
    if left < right and top < bottom:
        part_size, box = (right - left, bottom - top), (x_min, y_min, x_max, y_max)
        if antialias:
            part = image.resize(part_size, Image.Resampling.BILINEAR, box)
        else:
            part = image.transform(part_size, Image.Transform.EXTENT, box,
                                   Image.Resampling.BILINEAR)
        result.paste(change(part) if change else part, (left, top))
    return result


# --------------------------------------------------------------------------------------------------
# 7. Mean average precision
#
# Each detection is assigned to the object of its class with the highest IoU. It is a true positive
# if that IoU is at least 0.5 and no better detection is assigned to the same object. As detections
# are added by falling score, recall rises and precision mostly falls. Average precision (AP) is the
# mean precision along that curve, mAP the mean of the classes' APs. Objects marked difficult (hard
# to recognize) count neither way.
# --------------------------------------------------------------------------------------------------

# How precision over recall becomes one number: 'voc07' averages the precision at the 11 recalls
# 0, 0.1, ..., 1 (VOC devkit of 2007), 'area' takes the area under the curve (devkits from 2010 on).
AP_RULES = ('voc07', 'area')


def calculate_mAP(det_boxes, det_labels, det_scores, true_boxes, true_labels, true_difficulties,
                  label_map, rule='voc07'):
    """Calculate the average precision (AP) of each class and its mean over the classes (mAP).

    Args:
        det_boxes, det_labels, det_scores: detections, lists of one tensor per image: (n, 4), (n,),
            (n,).
        true_boxes, true_labels, true_difficulties: ground truth, the same: (O, 4), (O,), (O,).
            Boxes are corners in any unit, the same for both.
        label_map: class names to class indices, background 0.
        rule: 'voc07' or 'area', see `AP_RULES`.

    Returns:
        {class name: AP}, NaN for a class without objects (difficult ones do not count), and the
        mean of those that are not NaN; NaN if there is none.
    """
    matches = match_classes(Detections(det_boxes, det_labels, det_scores),
                            GroundTruth(true_boxes, true_labels, true_difficulties), label_map)
    average_precisions = {
        name: average_precision(match.true_positive, match.false_positive, match.n_objects, rule)
        for name, match in matches.items()}
    return average_precisions, nan_mean(average_precisions.values())


def nan_mean(values):
    """Average the numbers that are not NaN; NaN if there is none."""
    numbers = [value for value in values if not math.isnan(value)]
    return sum(numbers) / len(numbers) if numbers else math.nan


class Detections(NamedTuple):
    """Detections: lists of one tensor per image."""

    boxes: list     # of (n, 4), corners
    labels: list    # of (n,) int64
    scores: list    # of (n,)


class GroundTruth(NamedTuple):
    """Annotated objects: lists of one tensor per image."""

    boxes: list         # of (O, 4), corners in the unit of the detections
    labels: list        # of (O,) int64
    difficulties: list  # of (O,) bool


class ClassMatches(NamedTuple):
    """All detections of one class, by falling score, matched to the objects of this class.

    Detections and objects are numbered through all images, as `concatenate_images()` does.
    """

    detection: torch.Tensor         # (D,) int64, index of the detection
    score: torch.Tensor             # (D,)
    true_positive: torch.Tensor     # (D,) bool
    false_positive: torch.Tensor    # (D,) bool; an ignored detection is neither
    assigned: torch.Tensor          # (D,) int64, index of the object, -1 if IoU < 0.5
    n_objects: int                  # difficult ones do not count
    n_difficult: int


def match_classes(detections, ground_truth, label_map):
    """Match the detections of each class to its ground truth: {class name: ClassMatches}."""
    n_images = [len(tensors) for tensors in (*detections, *ground_truth)]
    assert len(set(n_images)) == 1, f'lists of {n_images} images'
    image, boxes, labels, scores = concatenate_images(*detections)
    true_image, true_boxes, true_labels, difficult = concatenate_images(*ground_truth)
    difficult = difficult.bool()
    matches = {}
    for name, label in label_map.items():
        if name == 'background':
            continue
        detection = (labels == label).nonzero().flatten()
        score, order = scores[detection].sort(descending=True, stable=True)
        detection = detection[order]
        obj = (true_labels == label).nonzero().flatten()
        true_positive, false_positive, assigned = match_detections(
            image[detection], boxes[detection], true_image[obj], true_boxes[obj], difficult[obj])
        # match_detections() numbers the objects of the class, with len(obj) for none. Look up their
        # index among all objects; the appended -1 is for none.
        assigned = torch.cat([obj, obj.new_tensor([-1])])[assigned]
        n_difficult = int(difficult[obj].sum())
        matches[name] = ClassMatches(detection, score, true_positive, false_positive, assigned,
                                     len(obj) - n_difficult, n_difficult)
    return matches


def concatenate_images(boxes, labels, values):
    """Concatenate lists of one tensor per image, on the CPU.

    Args:
        boxes, labels, values: lists of (n, 4), (n,), (n,); values are scores or difficulties.

    Returns:
        image (D,) int64, the index of each row's image, boxes (D, 4), labels (D,), values (D,).
    """
    def concatenate(tensors):
        """Concatenate flattened tensors."""
        # The empty tensor is for no images at all; of bools, since any other dtype prevails.
        return torch.cat([torch.zeros(0, dtype=torch.bool),
                          *(tensor.detach().cpu().flatten() for tensor in tensors)])
    n_rows = torch.tensor([len(tensor) for tensor in labels], dtype=torch.int64)
    image = torch.arange(len(n_rows)).repeat_interleave(n_rows)
    return image, concatenate(boxes).view(-1, 4), concatenate(labels), concatenate(values)


def match_detections(image, boxes, true_image, true_boxes, difficult):
    """Match the detections of one class to its ground truth, as the VOC devkit does.

    The devkit's loop: for each detection, from the highest score to the lowest,
        find the object of its image with the highest IoU (of equal ones the first);
        if the IoU is below 0.5: false positive;
        else if the object is difficult: ignored, neither true nor false positive;
        else: true positive if it is the first detection of the object, false positive if not.

    Args:
        image, boxes: (D,), (D, 4), the detections by falling score.
        true_image, true_boxes, difficult: (T,), (T, 4), (T,), the objects by rising image index.

    Returns:
        true_positive (D,) bool, false_positive (D,) bool, and the object that each detection is
        assigned to, (D,) int64, T where the IoU is below 0.5.
    """
    n_detections, n_objects = len(image), len(true_image)
    # All pairs of a detection and an object of the same image, one detection after the other.
    # Objects are sorted by image, so a detection is paired with the n_pairs objects from `first`
    # on.
    first = torch.searchsorted(true_image, image)
    n_pairs = torch.searchsorted(true_image, image, right=True) - first             # (D,)
    detection = torch.arange(n_detections).repeat_interleave(n_pairs)               # (pairs,)
    first_pair = n_pairs.cumsum(0) - n_pairs
    obj = torch.arange(len(detection)) - first_pair[detection] + first[detection]   # (pairs,)

    # In float64, since rounding must not push an IoU of exactly 0.5 below it.
    overlap = find_jaccard_overlap(boxes.double()[detection].unsqueeze(1),
                                   true_boxes.double()[obj].unsqueeze(1)).flatten()  # (pairs,)
    highest = torch.zeros(n_detections, dtype=torch.float64)
    highest.scatter_reduce_(0, detection, overlap, 'amax')
    # Of equal IoUs the first object: the lowest index (amin). The index n_objects means none.
    candidate = torch.where(overlap == highest[detection], obj, n_objects)
    assigned = torch.full((n_detections,), n_objects)
    assigned.scatter_reduce_(0, detection, candidate, 'amin')
    has_object = highest >= 0.5
    assigned[~has_object] = n_objects

    # The first detection of each object is the one of the lowest index.
    index = torch.arange(n_detections)
    first_detection = torch.full((n_objects + 1,), n_detections)
    first_detection.scatter_reduce_(0, assigned, index, 'amin')
    ignored = torch.cat([difficult, difficult.new_zeros(1)])[assigned]
    true_positive = has_object & ~ignored & (first_detection[assigned] == index)
    return true_positive, ~true_positive & ~ignored, assigned


def average_precision(true_positive, false_positive, n_objects, rule='voc07'):
    """Calculate the average precision of one class; NaN if it has no objects.

    After each detection precision = TP / (TP + FP) and recall = TP / n_objects. The precision at a
    recall is the highest at that recall or above.

    Args:
        true_positive, false_positive: (D,) bool, by falling score.
        n_objects: number of objects, without difficult ones.
        rule: 'voc07' or 'area', see `AP_RULES`.
    """
    assert rule in AP_RULES, f'rule is {rule!r}, none of {AP_RULES}'
    if n_objects == 0:
        return math.nan
    n_true, n_false = true_positive.cumsum(0), false_positive.cumsum(0)
    precision = n_true.double() / (n_true + n_false).clamp(min=1)
    highest = precision.flip(0).cummax(0).values.flip(0) if len(precision) else precision
    if rule == 'area':
        # Each true positive adds a step of 1 / n_objects to the recall.
        return (highest[true_positive].sum() / n_objects).item()
    # First detection with a recall of at least k / 10, for k = 0 to 10. TP / n_objects >= k / 10
    # as 10 TP >= k n_objects, in whole numbers: in floating point 0.3 is not 3 times 0.1. A recall
    # that is not reached has precision 0.
    reached = torch.searchsorted(10 * n_true, n_objects * torch.arange(11))
    return torch.cat([highest, highest.new_zeros(1)])[reached].mean().item()
