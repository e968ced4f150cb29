"""Write the JSON lists of images and objects that training and evaluation read.

    python create_data_lists.py --voc07-path VOCdevkit/VOC2007 --voc12-path VOCdevkit/VOC2012
    python create_data_lists.py --train cells:trainval --test cells:test
    python create_data_lists.py --coco-train instances_train2017.json:train2017 \
        --coco-test instances_val2017.json:val2017

Without arguments it does what the first line does. The folders are in VOC layout: JPEGImages,
Annotations (an XML file per image) and ImageSets/Main (a text file of image names per split). Data
in COCO's format are a file of annotations and a folder of images.
"""

import contextlib
import dataclasses
import functools
import json
import os
import pathlib
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import tyro
from torchvision.datasets import VOCDetection
from tqdm import tqdm

from support.coco_lists import (
    class_names,
    files_to_read,
    join_for_evaluation,
    parse_exports,
    read_exports,
)
from support.data_lists import is_label_map
from support.errors import (
    BrokenImageError,
    UserError,
    atomic_write,
    exit_on_user_error,
    make_folder,
)
from support.images import TRANSPOSES, read_orientation
from utils import (
    IMAGE_SUFFIXES,
    label_map as voc_label_map,
    number_classes,
    open_image,
    parse_objects,
    read_number,
    read_xml,
)


@dataclasses.dataclass
class Parameters:
    """Write the lists of a data set in VOC layout or in COCO's format."""

    # --- PASCAL VOC: 07 + 12 trainval to train, 07 test to test ---

    # The folder VOC2007, which holds JPEGImages, Annotations and ImageSets.
    voc07_path: str = './VOCdevkit/VOC2007'
    # The folder VOC2012.
    voc12_path: str = './VOCdevkit/VOC2012'
    # A folder to download both into (2.8 GB), in place of the two paths above.
    download: str | None = None

    # --- any other data set, in place of VOC ---

    # Images to train on: any number of folder:split.
    train: tuple[str, ...] = ()
    # Images to evaluate on: any number of folder:split.
    test: tuple[str, ...] = ()
    # Images to train on, in COCO's format: any number of annotations.json:images, a file and the
    # folder of its images. Boxes of crowds are left out.
    coco_train: tuple[str, ...] = ()
    # Images to evaluate on, the same.
    coco_test: tuple[str, ...] = ()
    # Class names in the order of their labels. Empty: those in the annotations, sorted; in COCO's
    # format, those of the categories by id.
    classes: tuple[str, ...] = ()

    # --- output ---

    # Folder for the lists.
    output_folder: str = './data'
    # Leave out images that cannot be decoded, in place of stopping at the first.
    skip_broken: bool = False


@exit_on_user_error
def main(parameters):
    """Write the lists of the given splits, or else of VOC."""
    p = parameters
    is_coco, in_layout = p.coco_train or p.coco_test, p.train or p.test
    if is_coco and in_layout:
        raise UserError('--coco-train and --coco-test cannot be combined with --train and --test; '
                        'leave out one kind of data')
    if (is_coco or in_layout) and (p.download, p.voc07_path, p.voc12_path) != (
            Parameters.download, Parameters.voc07_path, Parameters.voc12_path):
        raise UserError('--download, --voc07-path and --voc12-path are for VOC; leave them out, or '
                        'leave out the other data')
    label_map = None
    if is_coco:
        train_splits, test_splits = map(parse_exports, (p.coco_train, p.coco_test))
    elif in_layout:
        train_splits = [parse_split(text) for text in p.train]
        test_splits = [parse_split(text) for text in p.test]
    else:
        make_folder(p.output_folder)    # before the download
        paths = download_voc(p.download) if p.download else (p.voc07_path, p.voc12_path)
        train_splits, test_splits = voc_splits(*paths)
        label_map = voc_label_map
    if p.classes:
        if len(set(p.classes)) < len(p.classes) or 'background' in p.classes:
            raise UserError(f'--classes {" ".join(p.classes)}: name each class once, and leave '
                            f'background out')
        label_map = number_classes(p.classes)
    write = write_coco_lists if is_coco else write_data_lists
    write(train_splits, test_splits, p.output_folder, label_map, p.skip_broken)


def parse_split(text):
    """Parse 'folder:split' into (folder, split); the folder may contain colons itself."""
    folder, colon, split = text.rpartition(':')
    if not (folder and colon and split):
        raise UserError(f'{text!r} is not folder:split, such as VOC2007:trainval')
    return folder, split


def voc_splits(voc07_path, voc12_path):
    """Return VOC's train splits (07 + 12 trainval) and test splits (07 test)."""
    return [(voc07_path, 'trainval'), (voc12_path, 'trainval')], [(voc07_path, 'test')]


def download_voc(folder):
    """Download VOC with torchvision, which verifies it; returns folders VOC2007 and VOC2012."""
    folder = make_folder(folder)
    for year, split in (('2007', 'trainval'), ('2007', 'test'), ('2012', 'trainval')):
        try:
            VOCDetection(folder, year, split, download=True)
        except (OSError, RuntimeError) as error:
            raise UserError(f'VOC{year} {split} could not be downloaded into {folder} ({error}); '
                            f'try again, or unpack the archives of '
                            f'http://host.robots.ox.ac.uk/pascal/VOC/ by hand and give '
                            f'--voc07-path and --voc12-path') from error
    return folder / 'VOCdevkit' / 'VOC2007', folder / 'VOCdevkit' / 'VOC2012'


# --------------------------------------------------------------------------------------------------
# Writing the lists
# --------------------------------------------------------------------------------------------------


def create_data_lists(voc07_path, voc12_path, output_folder):
    """Write the lists of VOC with its twenty classes; see `write_data_lists()`."""
    return write_data_lists(*voc_splits(voc07_path, voc12_path), output_folder, voc_label_map)


def write_data_lists(train_splits, test_splits, output_folder, label_map=None, skip_broken=False):
    """Read the splits and write the lists that training and evaluation read.

    Boxes are clipped to the image, and boxes without area dropped. Images without objects are left
    out of TRAIN, but kept in TEST, where every detection in them is a false positive. All images
    are read before any file is written.

    Args:
        train_splits, test_splits: lists of (folder, split), such as ('VOC2007', 'trainval').
        output_folder: for TRAIN_images.json, TRAIN_objects.json, TEST_images.json,
            TEST_objects.json and label_map.json; created if missing.
        label_map: class names to labels; None for the classes in the annotations, sorted.
        skip_broken: leave out images that cannot be decoded, in place of stopping at the first.

    Returns:
        The summary, which is printed too: {'classes': [names], 'TRAIN': {what: count}, 'TEST':
        {what: count}}, and 'classes without objects to train on' if there are some.
    """
    output_folder = make_folder(output_folder)
    # All splits are found before any image is read.
    train_files = list_files(train_splits, label_map)
    test_files = list_files(test_splits, label_map)
    train = read_images('TRAIN', train_files, skip_broken)
    test = read_images('TEST', test_files, skip_broken)
    if label_map is None:
        all_objects = train.objects + test.objects
        label_map = number_classes(sorted({name for objects in all_objects
                                           for name in objects['labels']}))
        for objects in all_objects:
            objects['labels'] = [label_map[name] for name in objects['labels']]
    return write_lists(output_folder, train, test, label_map)


def write_coco_lists(train_splits, test_splits, output_folder, label_map=None, skip_broken=False):
    """Read data in COCO's format and write their lists, as `write_data_lists()` does.

    Boxes of a pixel or less in width or height are dropped. Crowds are left out of TRAIN, but kept
    in TEST and marked. TEST_coco.json has what COCO's evaluation needs. Categories of several files
    are the same class if they have the same name.

    Args:
        train_splits, test_splits: lists of (annotation file, folder of images).
        label_map: class names to labels; None for the categories by id.
    """
    output_folder = make_folder(output_folder)
    data = {'TRAIN': read_exports(train_splits), 'TEST': read_exports(test_splits)}
    label_map = label_map or number_classes(class_names(data['TRAIN'] + data['TEST']))
    train_files = files_to_read(data['TRAIN'], label_map, keep_crowds=False)
    test_files = files_to_read(data['TEST'], label_map, keep_crowds=True)
    train = read_images('TRAIN', train_files, skip_broken)
    test = read_images('TEST', test_files, skip_broken)
    coco = join_for_evaluation(data['TEST'], set(test.images), label_map)
    return write_lists(output_folder, train, test, label_map, coco)


def write_lists(output_folder, train, test, label_map, coco=None):
    """Write the lists, print and return the summary; see `write_data_lists()`.

    Args:
        train, test: SplitLists.
        coco: for TEST_coco.json; None removes it.
    """
    assert is_label_map(label_map), f'{label_map} is not background 0, and 1, 2, ...'
    contents = {} if coco is None else {'TEST_coco': coco}
    write_files(output_folder, TRAIN_images=train.images, TRAIN_objects=train.objects,
                TEST_images=test.images, TEST_objects=test.objects, label_map=label_map, **contents)
    if coco is None:
        (output_folder / 'TEST_coco.json').unlink(missing_ok=True)  # of earlier lists
    summary = {'classes': [name for name in label_map if name != 'background'],
               'TRAIN': train.counts, 'TEST': test.counts}
    found = {label for objects in train.objects for label in objects['labels']}
    unseen = [name for name in summary['classes'] if label_map[name] not in found]
    if found and unseen:
        summary['classes without objects to train on'] = unseen
    if in_both := {*train.images} & {*test.images}:
        summary['TEST']['images that are in TRAIN, too'] = len(in_both)
    print_summary(summary, output_folder)
    return summary


def write_files(folder, **contents):
    """Write each NAME=content as NAME.json, all of them or none."""
    with contextlib.ExitStack() as stack:  # renames the files after the last one is written
        for name, content in contents.items():
            path = stack.enter_context(atomic_write(folder / f'{name}.json'))
            path.write_text(json.dumps(content), encoding='utf-8')


def print_summary(summary, output_folder):
    """Print the counts of both lists, the classes and the folder."""
    for name in ('TRAIN', 'TEST'):
        counts = summary[name]
        print(f'{name}: {counts["images"]} images, {counts["objects"]} objects')
        for what in sorted(counts.keys() - {'images', 'objects'}):
            print(f'    {what}: {counts[what]}')
    for what in ('classes', 'classes without objects to train on'):
        if names := summary.get(what):
            print(f'{len(names)} {what}: {", ".join(names)}')
    print(f'written to {output_folder.resolve()}')


# --------------------------------------------------------------------------------------------------
# Reading the splits
# --------------------------------------------------------------------------------------------------


class SplitLists(NamedTuple):
    """What is written of TRAIN or TEST."""

    images: list    # paths
    objects: list   # of each image {'boxes', 'labels', 'difficulties'}
    counts: dict    # {what: count}, for the summary


def read_images(name, files, skip_broken):
    """Read the images of `name`, TRAIN or TEST, and their objects; returns SplitLists.

    Args:
        files: for each image its path, that of its annotation, and a function that returns its
            objects, the stated (width, height), 0 for unknown, and a Counter for the summary.
        skip_broken: leave out images that cannot be decoded, in place of stopping at the first.
    """
    images, all_objects, counts = [], [], Counter()
    for (image_path, *_), (objects, image_counts) in zip(
            files, read_in_parallel(name, files, skip_broken)):
        counts += image_counts
        if objects is None:  # a broken image
            continue
        if name == 'TRAIN' and not objects['boxes']:
            counts['images without objects, left out'] += 1
            continue
        counts['images'] += 1
        if not objects['boxes']:
            counts['images without objects, kept'] += 1
        images.append(str(image_path))
        all_objects.append(objects)
    return SplitLists(images, all_objects, {'images': 0, 'objects': 0, **counts})


def list_files(splits, label_map):
    """List the images of splits with functions for their objects, as `read_images()` takes them.

    Splits may overlap: each image once.
    """
    pairs = dict.fromkeys(pair for folder, split in splits for pair in find_files(folder, split))
    return [(image_path, annotation_path, functools.partial(read_voc, annotation_path, label_map))
            for image_path, annotation_path in pairs]


def find_files(folder, split):
    """Return the (image path, annotation path) pairs of a split, absolute; or a UserError."""
    folder = pathlib.Path(folder)
    for part in ('JPEGImages', 'Annotations', 'ImageSets/Main'):
        if not (folder / part).is_dir():
            raise UserError(f'{folder}: not a folder in VOC layout, it has no {part}; give the '
                            f'folder that holds JPEGImages, Annotations and ImageSets/Main')
    split_path = folder / 'ImageSets' / 'Main' / f'{split}.txt'
    if not split_path.is_file():
        splits = sorted(path.stem for path in split_path.parent.glob('*.txt'))
        raise UserError(f'{split_path}: no such split; there are: {", ".join(splits[:20])}')

    image_paths = find_images(folder / 'JPEGImages')
    files = []
    lines = split_path.read_text('utf-8-sig', 'surrogateescape').splitlines()
    for line in filter(None, map(str.strip, lines)):
        # The splits of a single class have a flag after the name: '000012 -1'.
        words = line.rsplit(maxsplit=1)
        has_flag = words[-1] in ('-1', '0', '1') and line not in image_paths
        name = words[0] if has_flag else line
        if name not in image_paths:
            advice = ('write it without folder and suffix'
                      if pathlib.PurePath(name).stem in image_paths else
                      'add it, or take the line out')
            raise UserError(f'{split_path} names {name!r}, but {folder / "JPEGImages"} has no '
                            f'image of that name; {advice}')
        files.append((image_paths[name], folder.resolve() / 'Annotations' / f'{name}.xml'))
    return files


def find_images(folder):
    """Map the names of a folder's images, without their suffixes, to absolute paths.

    The name of an image in a subfolder is 'subfolder/name'.
    """
    folder, paths = folder.resolve(), []
    for parent, subfolders, files in os.walk(folder):   # follows no link to a folder
        subfolders[:] = [name for name in subfolders if not name.startswith('.')]   # thumbnails
        paths += [pathlib.Path(parent, name) for name in files]
    paths = [path for path in paths if path.suffix.lower() in IMAGE_SUFFIXES]
    # Of two images with the same name the one whose suffix comes first in IMAGE_SUFFIXES counts.
    paths.sort(key=lambda path: (IMAGE_SUFFIXES.index(path.suffix.lower()), path), reverse=True)
    return {path.relative_to(folder).with_suffix('').as_posix(): path for path in paths}


def read_in_parallel(name, files, skip_broken):
    """Call `read_objects()` for each of the files, in parallel and in order."""
    pool = ThreadPoolExecutor(os.cpu_count())  # Pillow decodes without holding Python's lock
    try:
        results = pool.map(lambda file: read_objects(*file, skip_broken), files)
        return list(tqdm(results, name, len(files)))
    finally:
        pool.shutdown(cancel_futures=True)


def read_objects(image_path, annotation_path, read, skip_broken):
    """Read the cleaned objects of one image, after checking that the image can be decoded.

    Returns:
        The objects, None for a broken image if `skip_broken`; and a Counter for the summary.
    """
    objects, stated_size, counts = read()
    try:
        size, image_counts = open_image(image_path, decode)
    except BrokenImageError:
        if not skip_broken:
            raise
        return None, Counter({'broken images, left out': 1})
    check_stated_size(stated_size, size, annotation_path, image_path)
    objects, clean_counts = clean_objects(objects, *size)
    return objects, counts + image_counts + clean_counts


def read_voc(path, label_map):
    """Read an annotation of VOC: its objects, the stated (width, height) and no counts."""
    root = read_xml(path)
    size = [read_number(root, f'size/{tag}', path, default=0) for tag in ('width', 'height')]
    return parse_objects(root, path, label_map), size, Counter()


def decode(image):
    """Decode an opened image file completely.

    Returns:
        The stored (width, height), and a Counter for the summary.
    """
    size = image.size
    image.draft(None, (1, 1))  # decodes a JPEG at an eighth of its size, which is faster
    image.load()    # applies the orientation of a TIFF, and removes it
    is_dark = image.mode.startswith('I;16') and image.getextrema()[1] < 2 ** 14
    return size, Counter({
        'images with an EXIF orientation, which is not applied':
            read_orientation(image) in TRANSPOSES,
        'images of 16 bits without values above a quarter, which are dark in 8 bits': is_dark})


def check_stated_size(stated_size, size, annotation_path, image_path):
    """Raise a UserError if the annotation states another size; no size, or 0, is accepted."""
    advice = 'the boxes are for another image, replace one of the two'
    if tuple(stated_size) == size[::-1]:
        advice = ('width and height are exchanged, as by an EXIF orientation: save the image '
                  'upright (Pillow: ImageOps.exif_transpose), and annotate that')
    for what, stated, actual in zip(('width', 'height'), stated_size, size):
        if stated not in (0, actual):
            raise UserError(f'{annotation_path}: {what} {stated:g}, but {image_path} has {actual}; '
                            f'{advice}')


def clean_objects(objects, width, height):
    """Clip boxes to the image and drop those without area; returns objects and a Counter."""
    rows, counts = [], Counter()
    for box, *others in zip(*objects.values()):     # the boxes are first
        clipped = [min(max(box[0], 0), width), min(max(box[1], 0), height),
                   min(max(box[2], 0), width), min(max(box[3], 0), height)]
        if clipped[0] >= clipped[2] or clipped[1] >= clipped[3]:
            counts['boxes without area, dropped'] += 1
            continue
        if clipped != box:
            counts['boxes past the border, clipped'] += 1
        rows.append([clipped, *others])
    cleaned = {name: [row[i] for row in rows] for i, name in enumerate(objects)}
    counts += Counter({'objects': len(rows), 'difficult': sum(cleaned['difficulties']),
                       'crowds': sum(cleaned.get('crowds', ()))})
    return cleaned, counts


if __name__ == '__main__':
    main(tyro.cli(Parameters))
