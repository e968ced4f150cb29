"""Corrupt files: what is read from them is valid, or a user error names them.

The environment variable SSD_FUZZ is the number of files per test, 300 unless given.
"""

import io
import json
import math
import os
import pathlib
import random
import re

import pytest
import torch
from PIL import Image, ImageCms
from tqdm import tqdm

import detect
from create_data_lists import write_coco_lists, write_data_lists
from datasets import PascalVOCDataset
from support.coco_lists import read_evaluation, read_results
from support.coco_metrics import coco_summary
from support.errors import BrokenImageError, UserError
from support.images import limit_pixels, save_image, try_read_image
from utils import parse_annotation, read_image, read_image_size

N_FILES = int(os.environ.get('SSD_FUZZ', 300))
# Sizes, offsets and counts that a format may hold.
EXTREMES = (0, 1, 0x7f, 0xff, 0x7fff, 0x8000, 0xffff, 0x7fff_ffff, 0x8000_0000, 0xffff_ffff)
LABEL_MAP = {'background': 0, 'cat': 1, 'dog': 2}


def mutate(data, rng):
    """Change a file's bytes at one to five places, half of them near its beginning."""
    data = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 5))):
        at = rng.randrange(len(data) if rng.random() < 0.5 else min(200, len(data)))
        match rng.choice(('flip', 'replace', 'truncate', 'insert', 'duplicate', 'extreme')):
            case 'flip':
                data[at] ^= 1 << rng.randrange(8)
            case 'replace':
                data[at] = rng.randrange(256)
            case 'truncate':
                del data[at + 1:]
            case 'insert':
                data[at:at] = rng.randbytes(rng.randint(1, 20))
            case 'duplicate':
                data[at:at] = data[at:at + rng.randint(1, 100)]
            case 'extreme':
                n_bytes = rng.choice((1, 2, 4))
                value = rng.choice(EXTREMES) % 256 ** n_bytes
                data[at:at + n_bytes] = value.to_bytes(n_bytes, rng.choice(('big', 'little')))
    return bytes(data)


# --------------------------------------------------------------------------------------------------
# Images
# --------------------------------------------------------------------------------------------------


def image_file(suffix, mode='RGB', **options):
    """Return the bytes of an image file of 40 x 30 pixels."""
    gradient = Image.radial_gradient('L').resize((40, 30))
    image = Image.merge('RGB', (gradient, gradient.rotate(90), gradient.rotate(180))).convert(mode)
    file = io.BytesIO()
    image.save(file, Image.registered_extensions()[suffix], **options)
    return file.getvalue()


@pytest.fixture(scope='module')
def image_files():
    """Names and bytes of image files: all formats, with EXIF data and color profiles."""
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile('sRGB')).tobytes()
    exif = Image.Exif()
    exif[0x0112], exif[0x010f], exif[0x011a] = 6, 'Manufacturer', 72.0
    exif.get_ifd(0x8825)[2] = (1., 2., 3.)
    metadata = {'exif': exif, 'icc_profile': profile}
    return {
        '1.jpg': image_file('.jpg', **metadata),
        '2.jpg': image_file('.jpg', exif=exif, progressive=True),
        '3.png': image_file('.png', **metadata),
        '4.png': image_file('.png', 'P', transparency=3),
        '5.gif': image_file('.gif', transparency=2),
        '6.tif': image_file('.tif', **metadata),
        '7.tif': image_file('.tif', 'F'),
        '8.webp': image_file('.webp', **metadata),
        '9.bmp': image_file('.bmp')}


@pytest.fixture
def quiet_pillow(monkeypatch, recwarn, caplog):
    """Pillow as detect.py sets it up, so that it prints no warnings."""
    monkeypatch.setattr(Image, 'MAX_IMAGE_PIXELS', None)    # restored after the test
    limit_pixels(20_000_000)
    yield
    assert not recwarn.list and not caplog.get_records('call')


def test_image_is_decoded_or_refused(image_files, quiet_pillow, tmp_path, capsys):
    n_decoded = 0
    for name, content in image_files.items():
        rng, path = random.Random(name), tmp_path / name
        for _ in range(-(-N_FILES // len(image_files))):
            path.write_bytes(mutate(content, rng))
            image = try_read_image(path)
            if isinstance(image, Exception):
                continue
            n_decoded += 1
            assert image.mode == 'RGB' and image.getexif().get(0x0112, 1) == 1
            save_image(image, tmp_path / f'annotated{path.suffix}')
            assert read_image(path).size == read_image_size(path)
    assert N_FILES / 10 < n_decoded < N_FILES
    assert capsys.readouterr() == ('', '')


def break_exif(file):
    """Turn a text of the EXIF data into a number, at which Pillow cannot write them again."""
    text, number = (b'\x01\x0f\x00\x02\x00\x00\x00\x0d', b'\x01\x0f\x00\x05\x00\x00\x00\x01')
    assert text in file
    return file.replace(text, number)


def test_image_with_invalid_exif_data_is_upright(image_files, quiet_pillow, tmp_path):
    path = tmp_path / 'a.jpg'
    path.write_bytes(break_exif(image_files['1.jpg']))
    assert try_read_image(path).size == (30, 40)
    assert read_image(path).size == (40, 30)    # the data set does not apply the orientation


def test_any_exception_of_a_file_is_its_own(quiet_pillow, tmp_path, monkeypatch):
    path = tmp_path / 'a.jpg'
    for error in (TypeError('type'), MemoryError(), KeyboardInterrupt()):
        def fail(path, error=error):
            raise error

        monkeypatch.setattr(Image, 'open', fail)
        if isinstance(error, TypeError):
            assert try_read_image(path) is error
            for read in (read_image, read_image_size):
                with pytest.raises(BrokenImageError, match='a.jpg: cannot be decoded .type.'):
                    read(path)
        else:
            for read in (try_read_image, read_image, read_image_size):
                with pytest.raises(type(error)):
                    read(path)


def test_color_profile_of_another_type_is_dropped(quiet_pillow, tmp_path):
    file = image_file('.tif', icc_profile=b'profile.')
    entry = (34675).to_bytes(2, 'little')
    path = tmp_path / 'a.tif'
    path.write_bytes(file.replace(entry + b'\x07\x00', entry + b'\x0b\x00'))    # a float
    with Image.open(path) as image:
        assert isinstance(image.info['icc_profile'], float)
    save_image(try_read_image(path), path)


def test_pillow_logs_nothing(quiet_pillow, tmp_path):
    samples_per_pixel = b'\x15\x01\x03\x00\x01\x00\x00\x00'
    file = image_file('.tif').replace(samples_per_pixel + b'\x03', samples_per_pixel + b'\x63')
    (tmp_path / 'a.tif').write_bytes(file)
    assert isinstance(try_read_image(tmp_path / 'a.tif'), Exception)


class StandIn:
    """A model that detects a cat in every image."""

    label_map, device = LABEL_MAP, torch.device('cpu')
    antialias, input_size = True, 300

    def detect_in_batch(self, images, *_):
        n_images = len(images)
        return ([torch.tensor([[.1, .2, .5, .6]])] * n_images, [torch.tensor([1])] * n_images,
                [torch.tensor([.9])] * n_images)


def test_good_images_are_annotated_among_corrupt_ones(image_files, quiet_pillow, tmp_path, capsys,
                                                      monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(detect, 'load_model', lambda *_: StandIn())
    monkeypatch.setattr(detect, 'tqdm', lambda **more: tqdm(**{**more, 'disable': True}))
    rng, folder = random.Random(0), tmp_path / 'in'
    folder.mkdir()
    for name, content in image_files.items():
        (folder / name).write_bytes(content)
        for number in range(3):
            (folder / f'corrupt{number}_{name}').write_bytes(mutate(content, rng))
    (folder / 'exif.jpg').write_bytes(break_exif(image_files['1.jpg']))
    Image.new('1', (5000, 2000)).save(folder / 'large.png')
    with pytest.raises(SystemExit) as stop:
        detect.main(detect.Parameters(inputs=('in',), device='cpu', max_pixels=9_999_999))
    assert stop.value.code == 1

    written = {path.name for path in (tmp_path / 'detections').iterdir()}
    assert image_files.keys() <= written
    *lines, last = capsys.readouterr().err.splitlines()
    refused = sorted(path.name for path in folder.iterdir() if path.name not in written)
    assert [line.split(': ')[0] for line in lines] == [f'in/{name}' for name in refused]
    assert 'large.png' in refused and 'exif.jpg' not in refused and len(refused) > 8
    assert lines[-1] == ('in/large.png: cannot be read (more than 9999999 pixels; see '
                         '--max-pixels); skipped')
    assert f'{len(refused)} of 38 inputs' in last


# --------------------------------------------------------------------------------------------------
# Annotations
# --------------------------------------------------------------------------------------------------


def annotation_of(box='<xmin>5</xmin><ymin>5</ymin><xmax>30</xmax><ymax>30</ymax>', head=''):
    """Return the XML of a cat."""
    return (f'{head}<annotation><size><width>64</width><height>48</height></size><object>'
            f'<name>cat</name><difficult>0</difficult><bndbox>{box}</bndbox></object></annotation>')


TEXTS = ('', ' 7 ', '-1', '0', '2.5', '99999', '1e300', '1e999', 'nan', '-inf', '0x5', 'dog', 'cow')


def mutate_annotation(rng):
    """Return the XML of a cat with other values, or with other bytes."""
    if rng.random() < 0.3:
        return mutate(annotation_of().encode(), rng)
    return re.sub('>[^<]+<', lambda match: f'>{rng.choice(TEXTS)}<' if rng.random() < 0.15 else
                  match[0], annotation_of()).encode()


def check_annotation(path):
    """Read an annotation: finite numbers, or a UserError that names the file."""
    try:
        objects = parse_annotation(path, LABEL_MAP)
    except UserError as error:
        assert path.name in str(error)
        return False
    assert all(len(box) == 4 and all(map(math.isfinite, box)) for box in objects['boxes'])
    assert len(objects['boxes']) == len(objects['labels']) == len(objects['difficulties'])
    return True


def test_annotation_is_read_or_refused(tmp_path):
    rng, path, n_read = random.Random(0), tmp_path / 'a.xml', 0
    for _ in range(N_FILES):
        path.write_bytes(mutate_annotation(rng))
        n_read += check_annotation(path)
    assert N_FILES / 20 < n_read < N_FILES


BOMB = '<!DOCTYPE a [<!ENTITY e0 "ha">' + ''.join(
    f'<!ENTITY e{i} "{f"&e{i - 1};" * 10}">' for i in range(1, 10)) + ']>'


@pytest.mark.parametrize('content, is_read', [
    (annotation_of('&e9;', BOMB), False),
    (annotation_of('<xmin>&x;</xmin>', '<!DOCTYPE a [<!ENTITY x SYSTEM "/etc/passwd">]>'), False),
    (annotation_of('<a>' * 100_000 + '</a>' * 100_000), False),
    (annotation_of(head='<?xml version="1.0" encoding="utf-16"?>'), False),
    (annotation_of(head='<?xml version="1.0" encoding="shift_jis"?>'), False),
    (annotation_of(head='<?xml version="1.0" encoding="no-such"?>'), False),
    (annotation_of(head='<?xml version="1.0" encoding="latin-1"?><!-- \xe9 -->'), True),
    *((annotation_of(f'<xmin>{number}</xmin><ymin>5</ymin><xmax>30</xmax><ymax>30</ymax>'), is_read)
      for number, is_read in (('nan', False), ('-inf', False), ('1e999', False), ('9' * 400, False),
                              ('0x5', False), ('', False), ('1e300', True), ('-5', True)))])
def test_unusual_annotation_is_read_or_refused(tmp_path, content, is_read):
    (tmp_path / 'a.xml').write_bytes(content.encode('latin-1'))
    assert check_annotation(tmp_path / 'a.xml') == is_read


def test_lists_of_corrupt_annotations_are_valid(make_voc, tmp_path):
    rng, n_read = random.Random(1), 0
    voc = make_voc({'train': {'a': []}})
    for _ in range(-(-N_FILES // 10)):
        (voc / 'Annotations' / 'a.xml').write_bytes(mutate_annotation(rng))
        try:
            write_data_lists([(voc, 'train')], [(voc, 'train')], tmp_path / 'lists')
        except UserError:
            continue
        n_read += 1
        dataset = PascalVOCDataset(tmp_path / 'lists', 'TEST', keep_difficult=True)
        check_item(dataset[0], dataset.label_map)
    assert n_read


# --------------------------------------------------------------------------------------------------
# Lists
# --------------------------------------------------------------------------------------------------

VALUES = (None, True, -1, 0, 3, 0.5, 2 ** 70, 1e300, math.nan, math.inf, '', 'x', '\ud800', '\0',
          [], [[]], {}, {'a': 1}, [1, 2, 3, 4])


def check_item(item, label_map):
    """Check an item of a data set."""
    image, boxes, labels, difficulties = item
    assert image.shape == (3, 300, 300) and image.dtype == torch.uint8
    assert boxes.shape == (len(labels), 4) and labels.shape == difficulties.shape
    assert boxes.isfinite().all() and (boxes >= 0).all() and (boxes <= 1).all()
    assert (boxes[:, 2:] > boxes[:, :2]).all()
    assert set(labels.tolist()) <= set(label_map.values()) - {0}


def replace_value(content, rng):
    """Replace or remove one value at any depth of a JSON file's content, in place."""
    while True:
        key = rng.choice(list(content) if isinstance(content, dict) else range(len(content)))
        if isinstance(content[key], (list, dict)) and content[key] and rng.random() < 0.8:
            content = content[key]
        elif rng.random() < 0.2:
            del content[key]
            return
        else:
            content[key] = rng.choice(VALUES)
            return


def mutate_json(path, n_files):
    """Overwrite a JSON file n times with its content after a change of a value or of bytes."""
    content, rng = path.read_text(), random.Random(path.name)
    for number in range(n_files):
        if number % 3:
            values = json.loads(content)
            replace_value(values, rng)
            path.write_text(json.dumps(values))
        else:
            path.write_bytes(mutate(content.encode(), rng))
        yield
    path.write_text(content)


@pytest.mark.parametrize('name', ['TRAIN_images', 'TRAIN_objects', 'label_map'])
def test_item_of_corrupt_lists_is_valid_or_refused(make_voc, tmp_path, name):
    voc = make_voc({'train': {'a': [('cat', (1, 1, 30, 30), 1), ('dog', (5, 5, 40, 40))],
                              'b': [('dog', (1, 1, 30, 30))]}})
    write_data_lists([(voc, 'train')], [], tmp_path / 'lists')
    path = tmp_path / 'lists' / f'{name}.json'
    for _ in mutate_json(path, N_FILES // 3):
        try:
            dataset = PascalVOCDataset(pathlib.Path(path.parent), 'TRAIN', augment=False)
            items = [dataset[i] for i in range(len(dataset))]
        except UserError:
            continue
        for item in items:
            check_item(item, dataset.label_map)


# --------------------------------------------------------------------------------------------------
# COCO's format
# --------------------------------------------------------------------------------------------------


@pytest.fixture
def coco_file(tmp_path):
    """An annotation file of two images beside it, one box and one crowd each."""
    annotations = []
    for number, box in enumerate(([1, 2, 30.5, 20], [0, 0, 5, 5], [3, 3, 9, 9], [5, 5, 50, 40])):
        annotations.append({'id': number, 'image_id': 7 + number // 2, 'category_id': 2 + number,
                            'bbox': box, 'area': 30., 'iscrowd': number % 2})
    for name in ('a.png', 'b.png'):
        Image.new('RGB', (64, 48)).save(tmp_path / name)
    content = {'annotations': annotations,
               'images': [{'id': 7, 'file_name': 'a.png', 'width': 64, 'height': 48},
                          {'id': 8, 'file_name': 'b.png'}],
               'categories': [{'id': 2 + number, 'name': f'class {number}'} for number in range(4)]}
    (tmp_path / 'coco.json').write_text(json.dumps(content))
    return tmp_path / 'coco.json'


def test_lists_of_corrupt_coco_files_are_valid(coco_file, tmp_path):
    n_read, exports = 0, [(coco_file, tmp_path)]
    for _ in mutate_json(coco_file, N_FILES):
        try:
            write_coco_lists(exports, exports, tmp_path / 'lists')
        except UserError:
            continue
        n_read += 1
        for split in ('TRAIN', 'TEST'):
            dataset = PascalVOCDataset(tmp_path / 'lists', split, keep_difficult=True,
                                       augment=False)
            for i in range(len(dataset)):
                check_item(dataset[i], dataset.label_map)
        read_evaluation(tmp_path / 'lists', dataset.images, dataset.label_map)
    assert N_FILES / 20 < n_read < N_FILES


@pytest.mark.parametrize('name', ['lists/TEST_coco', 'lists/TEST_objects', 'coco_results'])
def test_evaluation_by_corrupt_coco_files_has_numbers(coco_file, tmp_path, name):
    write_coco_lists([], [(coco_file, tmp_path)], tmp_path / 'lists')
    (tmp_path / 'coco_results.json').write_text(json.dumps([
        {'image_id': image_id, 'category_id': 2, 'bbox': [1, 2, 30, 20], 'score': 0.5}
        for image_id in (7, 8)]))
    n_read, n_files = 0, N_FILES // 3
    for _ in mutate_json(tmp_path / f'{name}.json', n_files):
        try:
            dataset = PascalVOCDataset(tmp_path / 'lists', 'TEST', keep_difficult=True)
            data = read_evaluation(tmp_path / 'lists', dataset.images, dataset.label_map)
            detections = read_results(tmp_path, data, dataset.label_map)
        except UserError:
            continue
        n_read += 1
        numbers = coco_summary(detections, data, dataset.label_map)
        assert all(math.isnan(value) or 0 <= value <= 1 for value in numbers.values())
    assert 0 < n_read < n_files
