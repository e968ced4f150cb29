"""Annotations and result files in COCO's format, read and checked.

An annotation file holds the lists `images`, `categories` and `annotations`. Of COCO's own, ids have
gaps: 80 categories have ids from 1 to 90. Boxes are [x, y, width, height] in pixels, as edges.
"""

import functools
import itertools
import json
import os
import pathlib
import re
import reprlib
from collections import Counter
from typing import NamedTuple

import torch

from support.errors import UserError, atomic_write
from utils import Detections

# What is kept of an annotation file while it is decoded; segmentations are most of its size.
KEYS = {'images', 'categories', 'annotations', 'id', 'name', 'file_name', 'width', 'height',
        'image_id', 'category_id', 'bbox', 'area', 'iscrowd', 'score'}
MAX_ID = 2 ** 53        # exact in every program that reads JSON
MAX_PIXEL = 1e6         # of a box; also excludes infinity
RESULTS_NAME = 'coco_results.json'
DECIMALS = 10           # of a pixel in result files; without the rounding errors of a difference


class CocoData(NamedTuple):
    """An annotation file."""

    path: pathlib.Path
    images: list        # {'id', 'file_name', and if known 'width', 'height'}, in the file's order
    categories: dict    # {id: class name}, by increasing id
    annotations: dict   # {image id: [{'category_id', 'bbox', 'area', 'iscrowd'}]}


# --------------------------------------------------------------------------------------------------
# Reading
# --------------------------------------------------------------------------------------------------


def read_coco(path):
    """Read and check an annotation file; returns CocoData."""
    path = pathlib.Path(path)
    data = read_json(path)
    # COCO's files of images without published annotations, image_info_*.json, lack that list.
    lists = [data.get(name, default) if isinstance(data, dict) else None for name, default in
             (('images', None), ('categories', None), ('annotations', []))]
    if not all(isinstance(rows, list) for rows in lists):
        raise UserError(f'{path}: not an annotation file in COCO\'s format, which has the lists '
                        f'images, categories and annotations; export it for object detection')
    images, categories, annotations = (
        by_id(path, name, rows) for name, rows in zip(('image', 'category', 'annotation'), lists))
    for row_id, row in images.items():
        check_image(row, f'{path}, image {row_id}')
    for row_id, row in categories.items():
        check_category(row, f'{path}, category {row_id}')
    per_image = {}
    for row_id, row in annotations.items():
        check_annotation(row, images, categories, f'{path}, annotation {row_id}')
        per_image.setdefault(row.pop('image_id'), []).append(row)
    used = {row['category_id'] for row in annotations.values()}
    return CocoData(path, list(images.values()), select_categories(path, categories, used),
                    per_image)


def select_categories(path, categories, used):
    """Map ids to class names, by increasing id; of categories with one name keep the used one.

    Roboflow adds a category that groups the others and may have the name of one of them. Other
    programs add one for the background.
    """
    used_names = Counter(categories[row_id]['name'] for row_id in used)
    for name, count in used_names.items():
        if count > 1:
            raise UserError(f'{path}: {count} categories are named {name!r}; rename or join them')
    if 'background' in used_names:
        raise UserError(f"{path}: a category with annotations is named 'background', which stands "
                        f"for no object; rename it")
    return {row_id: categories[row_id]['name'] for row_id in sorted(categories)
            if row_id in used or categories[row_id]['name'] not in {*used_names, 'background'}}


def read_json(path, advice="give an annotation file in COCO's format"):
    """Read a JSON file, of its dictionaries only `KEYS`."""
    def keep(row):
        """Return the keys to keep of a dictionary."""
        return {key: row[key] for key in KEYS & row.keys()}

    try:
        return json.loads(path.read_text(encoding='utf-8-sig'), object_hook=keep)
    except OSError as error:
        raise UserError(f'{path} cannot be read ({error.strerror}); {advice}') from error
    except (ValueError, RecursionError) as error:
        raise UserError(f'{path} is not valid JSON ({error}); export it again') from error


def by_id(path, what, rows):
    """Map unique ids to rows, which are dictionaries."""
    found = {}
    for number, row in enumerate(rows, 1):
        row_id = row.get('id') if isinstance(row, dict) else None
        if type(row_id) is not int or not 0 <= row_id < MAX_ID:     # a bool is no int here
            raise UserError(f'{path}, {what} number {number}: {reprlib.repr(row)} has no id that '
                            f'is a whole number; export it again')
        if row_id in found:
            raise UserError(f'{path}: the {what} id {row_id} occurs twice; if files were joined, '
                            f'give them one by one')
        found[row_id] = row
    return found


def check_image(row, where):
    """Check the file name of an image and the size, which may be missing."""
    name = row.get('file_name')
    if not isinstance(name, str) or not name:
        raise UserError(f'{where}: file_name is {reprlib.repr(name)}; export it again')
    for key in ('width', 'height'):
        if row.get(key) is None:
            row[key] = 0
        if not is_number(row[key]):
            raise UserError(f'{where}: {key} is {reprlib.repr(row[key])}, not a number of pixels; '
                            f'correct it')


def check_category(row, where):
    """Check the name of a category, without white space around it."""
    name = row.get('name')
    if not isinstance(name, str) or not name.strip() or not name.isprintable():
        raise UserError(f'{where}: {reprlib.repr(name)} is not a class name; name it')
    row['name'] = name.strip()


def check_annotation(row, images, categories, where):
    """Check an annotation; add area and iscrowd where they are missing."""
    for key, rows in (('image_id', images), ('category_id', categories)):
        if type(row.get(key)) is not int or row[key] not in rows:
            raise UserError(f'{where}: {key} {reprlib.repr(row.get(key))} is not in the file; '
                            f'export it again')
    box = row.get('bbox')
    if not is_box(box):
        raise UserError(f'{where}: bbox is {reprlib.repr(box)}, not [x, y, width, height] in '
                        f'pixels; export boxes, not only segmentations')
    if row.get('area') is None:
        row['area'] = max(box[2], 0) * max(box[3], 0)
    if not is_number(row['area'], MAX_PIXEL ** 2):
        raise UserError(f'{where}: area is {reprlib.repr(row["area"])}, not a number of pixels; '
                        f'correct it')
    if row.get('iscrowd') is None:
        row['iscrowd'] = 0
    if row['iscrowd'] not in (0, 1):
        raise UserError(f'{where}: iscrowd is {reprlib.repr(row["iscrowd"])}, neither 0 nor 1; '
                        f'correct it')


def is_box(box):
    """Return whether this is a list of four finite numbers."""
    return isinstance(box, list) and len(box) == 4 and all(
        is_number(value, minimum=-MAX_PIXEL) for value in box)


def is_number(value, maximum=MAX_PIXEL, minimum=0):
    """Return whether this is a number in the range; NaN is not."""
    return type(value) in (int, float) and minimum <= value <= maximum


# --------------------------------------------------------------------------------------------------
# For the lists
# --------------------------------------------------------------------------------------------------


def parse_exports(texts):
    """Parse each 'annotations.json:images'; both parts may contain colons themselves."""
    pattern = re.compile('(.+?[.]json):(.+)', re.DOTALL | re.IGNORECASE)
    matches = [pattern.fullmatch(text) for text in texts]
    if None in matches:
        raise UserError(f'{texts[matches.index(None)]!r} is not annotations.json:images, such as '
                        f'instances_val2017.json:val2017')
    return [match.groups() for match in matches]


def read_exports(exports):
    """Read (annotation file, image folder) pairs: CocoData whose images have their path, too.

    Raises:
        UserError: an invalid file, a missing image, an image that is listed twice.
    """
    all_data = []
    for file, folder in {tuple(map(os.path.realpath, pair)): pair for pair in exports}.values():
        data, folder = read_coco(file), pathlib.Path(folder).resolve()
        for image in data.images:
            name = pathlib.Path(image['file_name'])
            if name.anchor or '..' in name.parts:
                raise UserError(f'{data.path}, image {image["id"]}: file_name {str(name)!r} is not '
                                f'inside of the image folder; make it relative to that')
            image['path'] = str(folder / name)
        missing = [image['path'] for image in data.images if not os.path.isfile(image['path'])]
        if missing:
            raise UserError(f'{data.path}: {len(missing)} of its {len(data.images)} images are '
                            f'missing, such as {missing[0]!r}; add them, or give the folder that '
                            f'file_name is relative to')
        all_data.append(data)
    counts = Counter(image['path'] for data in all_data for image in data.images)
    for path, count in counts.items():
        if count > 1:   # in each, the objects of the others would be background
            raise UserError(f'{path} is listed {count} times, with annotations of its own each '
                            f'time; join them under one image id')
    return all_data


def class_names(all_data):
    """List the class names of several files: by id, then those that only a later file has."""
    return list(dict.fromkeys(name for data in all_data for name in data.categories.values()))


def files_to_read(all_data, label_map, keep_crowds):
    """List the images with functions for their objects, as `read_images()` takes them."""
    return [(image['path'], data.path,
             functools.partial(list_objects, data, image, label_map, keep_crowds))
            for data in all_data for image in data.images]


def list_objects(data, image, label_map, keep_crowds):
    """Convert the annotations of an image to the objects of the lists.

    Returns:
        {'boxes', 'labels', 'difficulties', and with keep_crowds 'crowds'}; the stated (width,
        height); a Counter of what was left out.
    """
    rows, counts = [], Counter()
    for row in data.annotations.get(image['id'], ()):
        x, y, width, height = row['bbox']
        name = data.categories[row['category_id']]
        if name not in label_map:
            raise UserError(f'{data.path}, image {image["id"]}: class {name!r} is not one of '
                            f'{sorted(label_map.keys() - {"background"})}; add it to the classes')
        if width <= 1 or height <= 1:
            counts['boxes of a pixel or less, dropped'] += 1
        elif row['iscrowd'] and not keep_crowds:
            counts['crowds, left out'] += 1
        else:
            rows.append(([x, y, x + width, y + height], label_map[name], False,
                         bool(row['iscrowd'])))
    names = ('boxes', 'labels', 'difficulties', 'crowds')[:4 if keep_crowds else 3]
    objects = {name: [row[i] for row in rows] for i, name in enumerate(names)}
    return objects, (image['width'], image['height']), counts


def join_for_evaluation(test_data, kept, label_map):
    """Join the images of the TEST list to one annotation file, which COCO's evaluation reads.

    It has the original boxes, areas and crowds, and the original ids of images and categories.
    Where files use an id for different images, all images are renumbered.

    Args:
        test_data: list of CocoData.
        kept: set of the paths in the list.
        label_map: of the list.

    Returns:
        The content of TEST_coco.json.
    """
    category_ids = number_categories(test_data, label_map)
    rows = [(data, image) for data in test_data for image in data.images if image['path'] in kept]
    image_ids = [image['id'] for _, image in rows]
    if has_duplicates(image_ids):
        image_ids = range(1, len(rows) + 1)
    images, annotations = [], []
    for image_id, (data, image) in zip(image_ids, rows):
        images.append({'id': image_id, 'file_name': image['path'], 'width': image['width'],
                       'height': image['height']})
        for row in data.annotations.get(image['id'], ()):
            # From 1: pycocotools takes a match with annotation 0 for none.
            annotations.append({
                **row, 'id': len(annotations) + 1, 'image_id': image_id,
                'category_id': category_ids[data.categories[row['category_id']]]})
    return {'images': images, 'annotations': annotations,
            'categories': [{'id': value, 'name': name} for name, value in category_ids.items()]}


def number_categories(test_data, label_map):
    """Map class names to category ids: those of the test files, and for other classes unused ones.

    If the files use an id for different classes, the ids are the labels.
    """
    names = [name for name in label_map if name != 'background']
    ids = {name: value for data in test_data for value, name in data.categories.items()
           if name in names}
    if has_duplicates(ids.values()):
        return {name: label_map[name] for name in names}
    taken = {*ids.values()}
    unused = (value for value in itertools.count(1) if value not in taken)
    return {name: ids[name] if name in ids else next(unused) for name in names}


def has_duplicates(values):
    """Return whether a value occurs twice."""
    return len(set(values)) < len(values)


# --------------------------------------------------------------------------------------------------
# For the evaluation
# --------------------------------------------------------------------------------------------------


def read_evaluation(data_folder, images, label_map):
    """Read TEST_coco.json of a data folder: CocoData in the order of the TEST list.

    Returns:
        None if the lists were not made of data in COCO's format.
    """
    path = pathlib.Path(data_folder) / 'TEST_coco.json'
    if not path.exists():
        return None
    data = read_coco(path)
    if ([image['file_name'] for image in data.images] != images
            or {*data.categories.values()} != label_map.keys() - {'background'}):
        raise UserError(f'{path} has other images or classes than the lists in its folder; make '
                        f'them again with create_data_lists.py')
    return data


def make_results(detections, data, label_map):
    """Convert `Detections` in pixels to the rows of a result file."""
    ids = {label_map[name]: category_id for category_id, name in data.categories.items()}
    rows = []
    for image, boxes, labels, scores in zip(data.images, *detections):
        for (x_min, y_min, x_max, y_max), label, score in zip(
                boxes.tolist(), labels.tolist(), scores.tolist()):
            box = [x_min, y_min, max(x_max - x_min, 0), max(y_max - y_min, 0)]
            rows.append({'image_id': image['id'], 'category_id': ids[label],
                         'bbox': [round(value, DECIMALS) for value in box], 'score': score})
    return rows


def write_results(folder, detections, data, label_map):
    """Write a result file, which COCO's server takes too."""
    with atomic_write(pathlib.Path(folder) / RESULTS_NAME) as temporary:
        temporary.write_text(json.dumps(make_results(detections, data, label_map)), 'utf-8')


def read_results(folder, data, label_map):
    """Read a result file as `Detections` in pixels."""
    path = pathlib.Path(folder) / RESULTS_NAME
    results = read_json(path, 'give the folder of --results')
    if not isinstance(results, list):
        raise UserError(f'{path} is not a list of detections; give the folder of --results')
    rows = {image['id']: [] for image in data.images}   # of each image: corners, label, score
    for number, result in enumerate(results, 1):
        where = f'{path}, detection {number}'
        result = result if isinstance(result, dict) else {}
        image_id, category_id, box, score = map(
            result.get, ('image_id', 'category_id', 'bbox', 'score'))
        for what, value, known in (('image_id', image_id, rows),
                                   ('category_id', category_id, data.categories)):
            if type(value) is not int or value not in known:
                raise UserError(f'{where}: {what} {reprlib.repr(value)} is not in the TEST list; '
                                f'give the --data-folder that the file belongs to')
        if not is_box(box) or min(box[2:]) < 0 or not is_number(score, minimum=-MAX_PIXEL):
            raise UserError(f'{where}: bbox {reprlib.repr(box)} and score {reprlib.repr(score)} '
                            f'are not [x, y, width, height] in pixels and a number; edit it')
        x, y, width, height = box
        rows[image_id].append([x, y, x + width, y + height,
                               label_map[data.categories[category_id]], score])
    tensors = [torch.tensor(numbers, dtype=torch.float64).view(-1, 6) for numbers in rows.values()]
    return Detections([rows[:, :4] for rows in tensors],
                      [rows[:, 4].long() for rows in tensors], [rows[:, 5] for rows in tensors])
