"""The lists of images and objects that `create_data_lists.py` wrote, read and checked."""

import json
import pathlib
import reprlib

from support.errors import UserError

LARGEST = 1e6   # coordinate of a box, in pixels; also excludes infinity


def read_lists(data_folder, split):
    """Read and check the lists of one split.

    Returns:
        The paths of the images; the objects of each image, a dictionary of the lists boxes (in
        pixels), labels and difficulties, of crowds true as well; the label map.

    Raises:
        UserError: a list that is missing or invalid.
    """
    paths = [pathlib.Path(data_folder) / f'{name}.json'
             for name in (f'{split}_images', f'{split}_objects', 'label_map')]
    images, all_objects, label_map = map(read_json, paths)
    if not is_label_map(label_map):
        raise invalid(paths[2], 'does not map class names to 0, 1, 2, ..., and background to 0')
    for path, content in ((paths[0], images), (paths[1], all_objects)):
        if not isinstance(content, list):
            raise invalid(path, 'is not a list')
    if len(images) != len(all_objects):
        raise invalid(paths[0], f'has {len(images)} images, {paths[1].name} the objects of '
                                f'{len(all_objects)}')
    for i, (image, objects) in enumerate(zip(images, all_objects)):
        if not isinstance(image, str):
            raise invalid(paths[0], f'item {i}: {reprlib.repr(image)} is not a path')
        if problem := find_problem(objects, len(label_map)):
            raise invalid(paths[1], f'item {i}, of {image}: {problem}')
        if 'crowds' in objects:     # VOC's rules have none; there they count as difficult
            objects['difficulties'] = [difficult or crowd for difficult, crowd in zip(
                objects['difficulties'], objects['crowds'])]
    return images, all_objects, label_map


def read_json(path):
    """Read a JSON file."""
    try:
        return json.loads(path.read_text(encoding='utf-8'))
    except OSError as error:
        raise UserError(f'{path} cannot be read ({error.strerror}); make the lists with '
                        f'create_data_lists.py, or give their folder with '
                        f'--data-folder') from error
    except (ValueError, RecursionError) as error:
        raise invalid(path, f'is not valid JSON ({error})') from error


def invalid(path, problem):
    """Return the UserError for an invalid list."""
    return UserError(f'{path} {problem}; make the lists again with create_data_lists.py')


def is_label_map(label_map):
    """Return whether this maps class names to 0, 1, 2, ..., each once, and background to 0."""
    return (isinstance(label_map, dict) and label_map.get('background') == 0
            and all(type(name) is str and type(label) is int    # a bool is not
                    for name, label in label_map.items())
            and sorted(label_map.values()) == list(range(len(label_map))))


def find_problem(objects, n_classes):
    """Describe the first invalid value in the objects of an image; None if all are valid."""
    names = ['boxes', 'labels', 'difficulties']
    if isinstance(objects, dict) and 'crowds' in objects:   # of data in COCO's format
        names.append('crowds')
    columns = [objects.get(name) for name in names] if isinstance(objects, dict) else []
    if not columns or not all(isinstance(column, list) for column in columns):
        return f'{reprlib.repr(objects)} is not a dictionary of the lists {", ".join(names)}'
    if len({len(column) for column in columns}) > 1:
        return ', '.join(f'{len(column)} {name}' for name, column in zip(names, columns))
    for box, label, *flags in zip(*columns):
        if not is_box(box):
            return (f'box {reprlib.repr(box)} is not [x_min, y_min, x_max, y_max] with '
                    f'0 <= x_min < x_max and 0 <= y_min < y_max, all below {LARGEST:g}')
        if type(label) is not int or not 0 < label < n_classes:
            return f'label {reprlib.repr(label)} is not one of 1 to {n_classes - 1}'
        for flag in flags:
            if flag not in (False, True):
                return f'difficulty or crowd {reprlib.repr(flag)} is neither false nor true'
    return None


def is_box(box):
    """Return whether this is a list of corners, in pixels, of a box with an area."""
    return (isinstance(box, list) and len(box) == 4 and {*map(type, box)} <= {int, float}
            and 0 <= box[0] < box[2] < LARGEST and 0 <= box[1] < box[3] < LARGEST)
