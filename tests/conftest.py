"""What the tests share: a folder in VOC layout to order, and the real sample data where it is."""

import os
import pathlib
import sys

import pytest
import torch
from PIL import Image

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))


@pytest.fixture(autouse=True)
def seed():
    """Every test starts from the same random numbers."""
    torch.manual_seed(0)


@pytest.fixture(scope='session')
def sample_data():
    """The folder of real images with boxes; tests that need it are skipped where it is unset."""
    folder = os.environ.get('SSD_SAMPLE_DATA')
    if not folder:
        pytest.skip('SSD_SAMPLE_DATA is not set')
    return pathlib.Path(folder).resolve()


def annotation(objects, size=(64, 48)):
    """VOC's XML for objects given as (name, (xmin, ymin, xmax, ymax)[, difficult])."""
    parts = [f'<annotation><size><width>{size[0]}</width><height>{size[1]}</height></size>']
    for name, box, *difficult in objects:
        corners = ''.join(f'<{tag}>{value}</{tag}>'
                          for tag, value in zip(('xmin', 'ymin', 'xmax', 'ymax'), box))
        flag = f'<difficult>{int(difficult[0])}</difficult>' if difficult else ''
        parts.append(f'<object><name>{name}</name>{flag}<bndbox>{corners}</bndbox></object>')
    return ''.join(parts) + '</annotation>'


@pytest.fixture
def make_voc(tmp_path):
    """A function that writes a folder in VOC layout.

    `make_voc({'train': {'a': [('cat', (1, 1, 10, 10))]}})` makes split `train` with image a.jpg;
    returns the folder.
    """
    def make(splits, name='voc', size=(64, 48)):
        root = tmp_path / name
        for part in ('JPEGImages', 'Annotations', 'ImageSets/Main'):
            (root / part).mkdir(parents=True, exist_ok=True)
        for split, images in splits.items():
            (root / 'ImageSets' / 'Main' / f'{split}.txt').write_text('\n'.join(images) + '\n')
            for number, (stem, objects) in enumerate(images.items()):
                Image.new('RGB', size, (40 * number % 256, 90, 160)).save(
                    root / 'JPEGImages' / f'{stem}.jpg')
                (root / 'Annotations' / f'{stem}.xml').write_text(annotation(objects, size))
        return root
    return make


def overlap_of(box, other):
    """Jaccard overlap of two boxes, as a beginner writes it."""
    width = min(box[2], other[2]) - max(box[0], other[0])
    height = min(box[3], other[3]) - max(box[1], other[1])
    if width <= 0 or height <= 0:
        return 0.
    areas = sum((b[2] - b[0]) * (b[3] - b[1]) for b in (box, other))
    return width * height / (areas - width * height)
