"""What the scripts share: labels, boxes, VOC's files, images, checkpoints.

Seven sections, each of which uses only the sections above it:

1. Slips and files        3. Box coordinates             5. Annotations and data lists
2. Classes and labels     4. Jaccard overlap and NMS     6. Images
                                                         7. Checkpoints

Boxes are edges, not pixel indices: (x_min, y_min, x_max, y_max) is the interval from the left edge
of the first column to the right edge of the last, so a width is x_max - x_min, without a "+ 1".

Letters in comments and docstrings:
N images in a batch, P = 8732 priors, C classes with background 0, O objects in an image.
"""

import colorsys
import contextlib
import functools
import glob
import importlib
import json
import math
import os
import pathlib
import sys
import tempfile
import xml.etree.ElementTree as ET
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import torch
from PIL import Image
from tqdm import tqdm

# --------------------------------------------------------------------------------------------------
# 1. Slips and files
#
# A person's slip ends a script with one line that says what to do. A file appears whole or not at
# all: it is written beside its place and renamed into it.
# --------------------------------------------------------------------------------------------------


class UserError(ValueError):
    """A person's slip, not a program's: the message says what is wrong, where, and what to do."""


class BrokenImageError(UserError):
    """An image file that cannot be decoded."""


def exit_on_user_error(main):
    """Make a script's `main` print a person's slip as one line and exit with 1."""
    @functools.wraps(main)
    def _main(*args, **kwargs):
        try:
            return main(*args, **kwargs)
        except (UserError, OSError) as error:
            # What a DataLoader's worker raises arrives with the worker's traceback before it.
            message = str(error).rpartition('UserError: ')[2].strip()
        except torch.OutOfMemoryError as error:
            message = f'{str(error).splitlines()[0]} Give a smaller --batch-size'
        except RuntimeError as error:
            if 'DataLoader worker' not in str(error):
                raise
            message = (f'{str(error).splitlines()[0]} If it was killed, the machine has too little '
                       f'memory: give fewer --workers')
        except KeyboardInterrupt:
            message = 'interrupted'
        print(f'{pathlib.Path(sys.argv[0]).name}: {message}', file=sys.stderr)
        sys.exit(1)
    return _main


@contextlib.contextmanager
def write_beside(path):
    """Give the path of a temporary file to write, which becomes `path` when the block has ended.

    When the block fails, the temporary file is removed and what was at `path` stays.
    """
    path = pathlib.Path(path)
    beside = path.with_name(f'.{path.stem}.{os.getpid()}{path.suffix}')
    try:
        yield beside
        os.replace(beside, path)
    except torch.OutOfMemoryError:  # of work in the block, a RuntimeError too
        raise
    except (OSError, RuntimeError) as error:  # torch.save makes a RuntimeError of a full disk
        raise UserError(f'{path} cannot be written ({error}); free some space or choose another '
                        f'place') from error
    finally:
        with contextlib.suppress(OSError):
            beside.unlink()


def remove_torn(path):
    """Remove the temporary files of `write_beside(path)` that killed processes have left."""
    path = pathlib.Path(path)
    for torn in path.parent.glob(f'.{glob.escape(path.stem)}.*{path.suffix}'):
        pid = torn.name.removesuffix(path.suffix).rpartition('.')[2]
        ended = os.path.exists('/proc/self') and not os.path.exists(f'/proc/{pid}')
        if pid.isdecimal() and ended:
            torn.unlink(missing_ok=True)


def make_folder(folder):
    """Make a folder and try to write into it, before the work whose result it is to hold."""
    folder = pathlib.Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise UserError(f'{folder} cannot be written ({error}); choose another folder') from error
    return folder


def check_at_least(minimum, **values):
    """A UserError for the first parameter that is less than the minimum."""
    for name, value in values.items():
        if value < minimum:
            raise UserError(f'{name} is {value}; give --{name.replace("_", "-")} {minimum} or more')


# --------------------------------------------------------------------------------------------------
# 2. Classes and labels
#
# A class has a name outside and a number inside, and label_map leads from one to the other. The
# number 0 is the background, which is never annotated. VOC's map is here; any other data set's is
# made with its lists, and travels in label_map.json and in the checkpoint.
# --------------------------------------------------------------------------------------------------

voc_labels = ('aeroplane', 'bicycle', 'bird', 'boat', 'bottle', 'bus', 'car', 'cat', 'chair', 'cow',
              'diningtable', 'dog', 'horse', 'motorbike', 'person', 'pottedplant', 'sheep', 'sofa',
              'train', 'tvmonitor')
label_map = {'background': 0, **{name: number for number, name in enumerate(voc_labels, 1)}}
rev_label_map = {number: name for name, number in label_map.items()}


def default_label_map(n_classes):
    """VOC's classes where there are 21, and numbers where there is any other number of them."""
    if n_classes == len(label_map):
        return dict(label_map)
    return {'background': 0, **{f'class {i}': i for i in range(1, n_classes)}}


def distinct_colors(label_map):
    """A colour for every class name, as '#rrggbb'; the background is white."""
    # Steps of the golden ratio spread any number of hues around the circle; two levels of
    # lightness tell neighbours apart.
    colors = {}
    for name, number in label_map.items():
        lightness = 0.45 + 0.15 * (number % 2)
        rgb = colorsys.hls_to_rgb(number * 0.618034 % 1, lightness, 0.9)
        colors[name] = '#' + ''.join(f'{round(255 * level):02x}' for level in rgb)
    return {**colors, 'background': '#ffffff'}


label_color_map = distinct_colors(label_map)


# --------------------------------------------------------------------------------------------------
# 3. Box coordinates
#
# Three ways to write a box. Corners (no suffix, or _xy) for geometry; centre and size (_cxcy) for
# priors; and offsets from a prior (gcxgcy, "locs"), which the network predicts.
# --------------------------------------------------------------------------------------------------


def xy_to_cxcy(xy):
    """Corners (x_min, y_min, x_max, y_max) to centre and size (cx, cy, w, h): (..., 4) both."""
    return torch.cat([(xy[..., :2] + xy[..., 2:]) / 2, xy[..., 2:] - xy[..., :2]], dim=-1)


def cxcy_to_xy(cxcy):
    """Centre and size (cx, cy, w, h) to corners (x_min, y_min, x_max, y_max): (..., 4) both."""
    return torch.cat([cxcy[..., :2] - cxcy[..., 2:] / 2, cxcy[..., :2] + cxcy[..., 2:] / 2], dim=-1)


def cxcy_to_gcxgcy(cxcy, priors_cxcy):
    """Boxes to offsets from their priors; (..., 4) all, in fractions, offsets without a unit.

    The centre's offset is measured in the prior's size, the size's on a logarithmic scale: the
    same numbers mean the same for small and large priors (section 2.2 of the paper). The factors
    10 and 5 are the published Caffe code's "variances" 0.1 and 0.2, which bring the offsets to
    about the spread that the network's other outputs have.
    """
    centres = (cxcy[..., :2] - priors_cxcy[..., :2]) / (priors_cxcy[..., 2:] / 10)
    return torch.cat([centres, torch.log(cxcy[..., 2:] / priors_cxcy[..., 2:]) * 5], dim=-1)


def gcxgcy_to_cxcy(gcxgcy, priors_cxcy):
    """Offsets from priors back to boxes, the inverse of `cxcy_to_gcxgcy`: (..., 4) all."""
    centres = gcxgcy[..., :2] * priors_cxcy[..., 2:] / 10 + priors_cxcy[..., :2]
    return torch.cat([centres, torch.exp(gcxgcy[..., 2:] / 5) * priors_cxcy[..., 2:]], dim=-1)


# --------------------------------------------------------------------------------------------------
# 4. Jaccard overlap and non-maximum suppression
#
# The Jaccard overlap, or intersection over union, says how alike two boxes are: 1 for the same
# box, 0 for boxes apart. Matching, suppression, cropping and mAP are all built on it.
# --------------------------------------------------------------------------------------------------


def find_intersection(set_1, set_2):
    """The area that each box of one set shares with each of the other.

    Args:
        set_1, set_2: (..., n1, 4) and (..., n2, 4), corners, any unit.

    Returns:
        (..., n1, n2), in the unit squared.
    """
    # A plane for each coordinate, contiguous: the arithmetic then runs over n2 numbers in a row.
    x_min_1, y_min_1, x_max_1, y_max_1 = set_1.unsqueeze(-2).unbind(-1)                 # (n1, 1)
    x_min_2, y_min_2, x_max_2, y_max_2 = set_2.unsqueeze(-3).movedim(-1, 0).contiguous()  # (1, n2)
    width = torch.minimum(x_max_1, x_max_2).sub_(torch.maximum(x_min_1, x_min_2)).clamp_(min=0)
    height = torch.minimum(y_max_1, y_max_2).sub_(torch.maximum(y_min_1, y_min_2)).clamp_(min=0)
    return width.mul_(height)


def find_jaccard_overlap(set_1, set_2):
    """Intersection over union of each box of one set with each of the other.

    A box without area (also one with its corners exchanged) overlaps nothing: 0, not NaN.

    Args:
        set_1, set_2: (..., n1, 4) and (..., n2, 4), corners, any unit.

    Returns:
        (..., n1, n2), in [0, 1].
    """
    intersection = find_intersection(set_1, set_2)
    area_1 = (set_1[..., 2:] - set_1[..., :2]).clamp(min=0).prod(dim=-1)    # (..., n1)
    area_2 = (set_2[..., 2:] - set_2[..., :2]).clamp(min=0).prod(dim=-1)    # (..., n2)
    union = (area_1.unsqueeze(-1) + area_2.unsqueeze(-2)).sub_(intersection)
    return intersection.div_(union.clamp_(min=torch.finfo(union.dtype).tiny))


def greedy_keep(overlap, max_overlap):
    """Which boxes greedy non-maximum suppression keeps, for boxes sorted by falling score.

    Greedy suppression goes from the best box to the worst and keeps a box if no *kept* better box
    overlaps it too much. Here all boxes are judged at once, again and again: a box goes if one
    that was kept in the last round suppresses it. After the first round the best box is settled,
    after the second the next one at the latest, and so on: when a round changes nothing, the
    answer is the greedy one. A few rounds do, since a chain of suppressions is short.

    Args:
        overlap: (..., K, K), Jaccard overlap of the boxes with each other.

    Returns:
        (..., K) bool.
    """
    # [i, j]: box i suppresses box j. Only a better box may, so only the upper triangle counts.
    suppresses = (overlap > max_overlap).triu_(diagonal=1).to(overlap.dtype)
    keep = overlap.new_ones(overlap.shape[:-1])
    while True:
        # A product with a matrix of zeros and ones counts the kept boxes that suppress j.
        n_suppressors = (keep.unsqueeze(-2) @ suppresses).squeeze(-2)
        settled = (n_suppressors == 0).to(overlap.dtype)
        if torch.equal(settled, keep):
            return keep.bool()
        keep = settled


def non_max_suppression(boxes, scores, max_overlap):
    """Keep the best of the boxes that overlap each other by more than `max_overlap`.

    Args:
        boxes: (K, 4), corners, any unit.
        scores: (K,)

    Returns:
        Indices of the kept boxes, (n,) int64, by falling score and then by rising index.
    """
    order = scores.argsort(descending=True, stable=True)
    return order[greedy_keep(find_jaccard_overlap(boxes[order], boxes[order]), max_overlap)]


# Overlaps that are looked at together: 4 MiB, which stay in a processor's cache.
MAX_OVERLAPS_AT_ONCE = 2 ** 20


def rank_in_group(group):
    """The place of each element in its group, from 0: (M,) for sorted group numbers (M,)."""
    counts = torch.bincount(group)
    starts = counts.cumsum(0) - counts
    return torch.arange(len(group), device=group.device) - starts[group]


def suppress_in_groups(boxes, group, max_overlap):
    """Non-maximum suppression in many groups at a time.

    Args:
        boxes: (M, 4), sorted by group and in a group by falling score.
        group: (M,), sorted group numbers.

    Returns:
        (M,) bool, True where the box is kept.
    """
    if len(group) == 0:
        return torch.ones_like(group, dtype=torch.bool)
    # One row a group, the longest group first, filled up with boxes of no area, which overlap
    # nothing.
    _, row, counts = group.unique_consecutive(return_inverse=True, return_counts=True)
    rank = rank_in_group(row)
    counts, by_size = counts.sort(descending=True)
    row = by_size.argsort()[row]
    counts = counts.tolist()
    padded = boxes.new_zeros(len(counts), counts[0], 4)
    padded[row, rank] = boxes
    keep = torch.ones(padded.shape[:2], dtype=torch.bool, device=boxes.device)

    # Groups of like size go together, since the work grows with the square of the longest.
    start = 0
    while start < len(counts) and counts[start] > 1:
        longest = counts[start]
        end = min(len(counts), start + max(1, MAX_OVERLAPS_AT_ONCE // longest ** 2))
        while 2 * counts[end - 1] < longest:
            end -= 1
        some = padded[start:end, :longest]
        keep[start:end, :longest] = greedy_keep(find_jaccard_overlap(some, some), max_overlap)
        start = end
    return keep[row, rank]


# --------------------------------------------------------------------------------------------------
# 5. Annotations and data lists
#
# VOC's layout: a folder with JPEGImages, Annotations (an XML file an image) and ImageSets/Main (a
# text file a split, an image name a line). It is read once, checked, and written as JSON lists.
# --------------------------------------------------------------------------------------------------

# What Pillow raises for a file that it cannot decode.
IMAGE_ERRORS = (OSError, SyntaxError, ValueError, Image.DecompressionBombError)
IMAGE_SUFFIXES = ('.jpg', '.jpeg', '.png', '.bmp', '.webp', '.tif', '.tiff', '.gif')


def parse_annotation(annotation_path, label_map):
    """Read the objects of one VOC annotation file.

    VOC counts pixels from 1 and includes both ends, so `xmin..xmax` becomes the edges
    (xmin - 1, xmax). Nothing is clipped or dropped here. Boxes of an object's parts (head, hand,
    foot) are not objects. A missing `difficult` means no.

    Args:
        annotation_path: the XML file.
        label_map: class names to numbers; with None the labels stay names.

    Returns:
        {'boxes': [[x_min, y_min, x_max, y_max], ...] in pixels, 'labels': [...],
        'difficulties': [...]}

    Raises:
        UserError: no such file, malformed XML, a missing or impossible value, an unknown class.
    """
    root = read_xml(annotation_path)
    boxes, labels, difficulties = [], [], []
    for number, object_ in enumerate(root.findall('object'), 1):
        where = f'{annotation_path}, object {number}'
        name = (object_.findtext('name') or '').strip()
        if not name:
            raise UserError(f'{where}: no class name; add <name>...</name>')
        if label_map is not None and (name not in label_map or name == 'background'):
            raise UserError(f'{where}: class {name!r} is none of {sorted(label_map)}; '
                            f'correct it, or add it to the classes')
        corners = [read_number(object_, f'bndbox/{corner}', where)
                   for corner in ('xmin', 'ymin', 'xmax', 'ymax')]
        boxes.append([corners[0] - 1, corners[1] - 1, corners[2], corners[3]])
        labels.append(name if label_map is None else label_map[name])
        difficulties.append(bool(read_number(object_, 'difficult', where, default=0)))
    return {'boxes': boxes, 'labels': labels, 'difficulties': difficulties}


def read_xml(path):
    """The root element of an XML file; a UserError if there is none."""
    try:
        return ET.parse(path).getroot()
    except FileNotFoundError as error:
        raise UserError(f'{path}: no such annotation; every image of a split needs one') from error
    except (ET.ParseError, ValueError, LookupError) as error:  # the last two: of its encoding
        raise UserError(f'{path}: malformed XML ({error}); correct or replace it') from error


def read_number(element, tag, where, default=None):
    """The finite number in a tag below an XML element; a UserError if it is none."""
    text = element.findtext(tag)
    if text is None and default is not None:
        return default
    try:
        number = float(text)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise UserError(f'{where}: <{tag}> holds {text!r}, not a number; correct it')
    return number


def read_split(folder, split):
    """The images of a split, as a list of (annotation path, image path).

    A UserError if it is no folder in VOC layout, or has no such split or not all its images.
    """
    folder = pathlib.Path(folder)
    for part in ('JPEGImages', 'Annotations', 'ImageSets/Main'):
        if not (folder / part).is_dir():
            raise UserError(f'{folder}: not a folder in VOC layout, it has no {part}; give the '
                            f'folder that holds JPEGImages, Annotations and ImageSets/Main')
    list_path = folder / 'ImageSets' / 'Main' / f'{split}.txt'
    if not list_path.is_file():
        splits = sorted(path.stem for path in list_path.parent.glob('*.txt'))
        raise UserError(f'{list_path}: no such split; there are: {", ".join(splits[:20])}')

    # Of two images with the same name the one whose ending stands first in IMAGE_SUFFIXES counts.
    paths = [path for path in (folder / 'JPEGImages').resolve().iterdir()
             if path.suffix.lower() in IMAGE_SUFFIXES]
    paths.sort(key=lambda path: (IMAGE_SUFFIXES.index(path.suffix.lower()), path), reverse=True)
    files = {path.stem: path for path in paths}
    images = []
    for line in filter(None, map(str.strip, list_path.read_text('utf-8', 'replace').splitlines())):
        # The lists of a single class have a flag behind the name: '000012 -1'.
        name = line if line in files else line.split()[0]
        if name not in files:
            raise UserError(f'{list_path} names {name!r}, but {folder / "JPEGImages"} has no '
                            f'image of that name; add it, or take the line out')
        images.append((folder.resolve() / 'Annotations' / f'{name}.xml', files[name]))
    return images


def check_image(path):
    """Decode all of an image file for its stored width and height, or a BrokenImageError."""
    try:
        with Image.open(path) as image:
            size = image.size
            image.draft(None, (1, 1))  # an eighth of a JPEG is quicker
            image.load()
            return size
    except IMAGE_ERRORS as error:
        raise BrokenImageError(f'{path}: cannot be decoded ({error}); replace it, or leave such '
                               f'images out with --skip-broken') from error


def clean_objects(objects, width, height):
    """Objects with their boxes clipped to the image, those without area dropped, and counts."""
    cleaned, done = {'boxes': [], 'labels': [], 'difficulties': []}, Counter()
    for box, label, difficult in zip(*objects.values()):
        clipped = [min(max(box[0], 0), width), min(max(box[1], 0), height),
                   min(max(box[2], 0), width), min(max(box[3], 0), height)]
        if clipped[0] >= clipped[2] or clipped[1] >= clipped[3]:
            done['boxes without area, dropped'] += 1
            continue
        done['boxes past the border, clipped'] += clipped != box
        done['difficult'] += difficult
        for values, value in zip(cleaned.values(), (clipped, label, difficult)):
            values.append(value)
    done['objects'] = len(cleaned['boxes'])
    return cleaned, done


def read_objects(annotation_path, image_path, label_map, skip_broken):
    """An image's cleaned objects (None if it is broken and may be), and what was done."""
    objects = parse_annotation(annotation_path, label_map)
    try:
        size = check_image(image_path)
    except BrokenImageError:
        if not skip_broken:
            raise
        return None, Counter({'broken images, left out': 1})
    root = read_xml(annotation_path)
    for tag, actual in zip(('width', 'height'), size):
        stated = read_number(root, f'size/{tag}', annotation_path, default=0)
        if stated not in (0, actual):
            raise UserError(f'{annotation_path}: {tag} {stated:g}, but {image_path} has {actual}; '
                            f'the boxes are for another image, replace one of the two')
    return clean_objects(objects, *size)


def read_splits(splits, label_map, skip_broken, split_name):
    """Image paths, objects and a summary of all images in a list of (folder, split)."""
    images = [image for folder, split in splits for image in read_split(folder, split)]
    paths, objects, summary = [], [], Counter()
    pool = ThreadPoolExecutor(os.cpu_count())  # Pillow decodes without holding Python's lock
    try:
        results = pool.map(lambda image: read_objects(*image, label_map, skip_broken), images)
        for (_, path), (found, done) in zip(images, tqdm(results, split_name, len(images))):
            summary += done
            if found is None:
                continue
            if split_name == 'TRAIN' and not found['boxes']:
                summary['images without objects, left out'] += 1
                continue
            summary['images'] += 1
            summary['images without objects, kept'] += not found['boxes']
            paths.append(str(path))
            objects.append(found)
    finally:
        pool.shutdown(cancel_futures=True)
    return paths, objects, +summary


def write_data_lists(train_splits, test_splits, output_folder, label_map=None, skip_broken=False):
    """Read folders in VOC layout and write the lists that training and evaluation read.

    Boxes past the border are clipped, boxes without area dropped, images without objects left out
    of TRAIN and kept in TEST, where what is found on them is a false positive. Everything is read
    before anything is written.

    Args:
        train_splits, test_splits: lists of (folder, split), such as ('VOC2007', 'trainval').
        output_folder: for TRAIN_images.json, TRAIN_objects.json, TEST_images.json,
            TEST_objects.json and label_map.json; made if it is not there.
        label_map: class names to numbers; None for the classes in the annotations, sorted.
        skip_broken: leave images that cannot be decoded out, instead of stopping at the first.

    Returns:
        The summary, which is printed too: {'classes': [names], 'TRAIN': {what: count}, 'TEST':
        {what: count}}.
    """
    output_folder = make_folder(output_folder)
    read = {name: read_splits(splits, label_map, skip_broken, name)
            for name, splits in (('TRAIN', train_splits), ('TEST', test_splits))}
    if label_map is None:
        all_objects = [objects for _, some, _ in read.values() for objects in some]
        names = sorted({name for objects in all_objects for name in objects['labels']})
        if 'background' in names:
            raise UserError("a class of the annotations is named 'background', which stands for "
                            "no object; rename it")
        label_map = {'background': 0, **{name: i for i, name in enumerate(names, 1)}}
        for objects in all_objects:
            objects['labels'] = [label_map[name] for name in objects['labels']]

    files = {'label_map': label_map}
    for name, (paths, objects, _) in read.items():
        files |= {f'{name}_images': paths, f'{name}_objects': objects}
    with contextlib.ExitStack() as stack:  # none is renamed before all are written
        for name, content in files.items():
            path = stack.enter_context(write_beside(output_folder / f'{name}.json'))
            path.write_text(json.dumps(content), encoding='utf-8')

    classes = [name for name in label_map if name != 'background']
    for name, (_, _, counts) in read.items():
        print(f'{name}: {counts["images"]} images, {counts["objects"]} objects')
        for what in sorted(counts.keys() - {'images', 'objects'}):
            print(f'    {what}: {counts[what]}')
    print(f'{len(classes)} classes: {", ".join(classes)}')
    print(f'written to {output_folder.resolve()}')
    return {'classes': classes, **{name: dict(counts) for name, (_, _, counts) in read.items()}}


def create_data_lists(voc07_path, voc12_path, output_folder):
    """VOC's own lists: 07 + 12 trainval to TRAIN, 07 test to TEST; see `write_data_lists()`."""
    train_splits = [(voc07_path, 'trainval'), (voc12_path, 'trainval')]
    return write_data_lists(train_splits, [(voc07_path, 'test')], output_folder, label_map)


# --------------------------------------------------------------------------------------------------
# 6. Images
#
# An image is a PIL image in RGB, then a uint8 tensor (3, 300, 300), and on the device the floats
# that the network takes. The augmentation stands beside its only caller, the data set.
# --------------------------------------------------------------------------------------------------

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
FILLER = tuple(round(255 * mean) for mean in IMAGENET_MEAN)
SIDE = 300  # pixels of what the network sees


def to_rgb(image):
    """An RGB copy of a PIL image of any mode: 16 bits are scaled to 8, transparent is white."""
    if image.mode.startswith(('I', 'F')):
        has_16_bits = image.mode.startswith('I;16')
        image = image.convert('F')
        highest = image.getextrema()[1]
        scale = 255 / max(highest, 65535) if has_16_bits or highest > 255 else 1
        image = image.point(lambda value: value * scale + 0).convert('L')
    if image.has_transparency_data:
        image = image.convert('RGBA')
        white = Image.new('RGBA', image.size, 'white')
        image = Image.alpha_composite(white, image)
    return image.convert('RGB') if image.mode != 'RGB' else image.copy()


@functools.cache
def imagenet_constants(device):
    """ImageNet's mean and std on a device: (3,) each, from 0 to 1."""
    return torch.tensor([IMAGENET_MEAN, IMAGENET_STD], device=device).unbind(0)


def normalize(images, mean=None, std=None):
    """Turn uint8 images (..., 3, H, W) into the floats that a network takes.

    A model that was trained with others than ImageNet's constants brings them, see
    `SSD300.normalize()`.

    Args:
        mean, std: (3,) each, of red, green and blue from 0 to 1, on the images' device. None:
            those of ImageNet, as torchvision's VGG-16 was trained.
    """
    if mean is None:
        mean, std = imagenet_constants(images.device)
    return (images - 255 * mean.view(3, 1, 1)).div_(255 * std.view(3, 1, 1))


def __getattr__(name):
    """`transform` and `calculate_mAP` stand in modules that need the functions of this one."""
    homes = {'transform': 'datasets', 'calculate_mAP': 'average_precision'}
    if name in homes:
        return getattr(importlib.import_module(homes[name]), name)
    raise AttributeError(f'module {__name__!r} has no attribute {name!r}')


# --------------------------------------------------------------------------------------------------
# 7. Checkpoints
#
# A dictionary of tensors, numbers, strings, lists and dictionaries: nothing in it is code.
# --------------------------------------------------------------------------------------------------


def save_checkpoint(path, **state):
    """Write a checkpoint beside its place and rename it: the old one stays until the new is whole.

    Args:
        path: the file.
        state: what `load_checkpoint` returns: tensors, state_dicts, numbers, strings, ...
    """
    with write_beside(path) as beside, open(beside, 'wb') as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())  # on the disk before the name points to it


def download_weights(weights, otherwise):
    """The state dict of torchvision's `weights`, downloaded once and kept.

    Args:
        weights: a member of one of torchvision's enumerations of weights.
        otherwise: what a person without a network can do, as the end of a sentence.

    Raises:
        UserError: the weights cannot be had; the message says what to do.
    """
    try:
        return weights.get_state_dict(progress=True, check_hash=True)
    except Exception as error:  # of the network, of the disk, or of what is in the file
        raise UserError(
            f'the weights could not be loaded from {weights.url} ({type(error).__name__}: '
            f'{error}); connect to the network, or put the file into '
            f'{torch.hub.get_dir()}/checkpoints, or {otherwise}') from error


def load_checkpoint(path):
    """The dictionary of a checkpoint, its tensors on the CPU. No code of the file is run.

    Raises:
        UserError: no such file, truncated, or written by another program.
    """
    if not pathlib.Path(path).is_file():
        raise UserError(f'{path}: no such checkpoint; train one with train.py, or give its path')
    try:
        checkpoint = torch.load(path, map_location='cpu', weights_only=True)
    except Exception as error:  # a file that is none raises whatever its bytes happen to mean
        reason = f'{type(error).__name__}: {error}'.splitlines()[0][:200]
        raise UserError(f'{path} cannot be read as a checkpoint: truncated, or written by another '
                        f'program ({reason}); give one that train.py wrote') from error
    if not isinstance(checkpoint, dict):
        raise UserError(f'{path} is not a checkpoint of this program: it holds a '
                        f'{type(checkpoint).__name__}; give one that train.py wrote')
    return checkpoint
