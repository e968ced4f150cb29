"""Tests of support/data_lists.py."""

import json

import pytest

from support.data_lists import read_lists
from support.errors import UserError

LABEL_MAP = {'background': 0, 'cat': 1, 'dog': 2}
BOX = [1, 2.5, 30, 40]


@pytest.fixture
def read(tmp_path):
    """Return a function that writes the lists of the images a.jpg and b.jpg and reads them.

    `objects` are those of b.jpg; other keywords replace a whole list, strings as they are.
    """
    def read(objects=None, **contents):
        no_objects = {'boxes': [], 'labels': [], 'difficulties': []}
        contents = {'TEST_images': ['a.jpg', 'b.jpg'], 'label_map': LABEL_MAP,
                    'TEST_objects': [no_objects, no_objects if objects is None else objects],
                    **contents}
        for name, content in contents.items():
            text = content if isinstance(content, str) else json.dumps(content)
            (tmp_path / f'{name}.json').write_text(text)
        return read_lists(tmp_path, 'TEST')
    return read


def make_objects(boxes=(BOX,), labels=(1,), difficulties=(False,)):
    """Make the objects of an image."""
    return {'boxes': boxes, 'labels': labels, 'difficulties': difficulties}


def test_valid_lists_are_returned(read):
    objects = make_objects([BOX, BOX], [1, 2], [True, 0])
    images, all_objects, label_map = read(objects)
    assert images == ['a.jpg', 'b.jpg'] and label_map == LABEL_MAP
    assert all_objects == [make_objects([], [], []), objects]


@pytest.mark.parametrize('objects, problem', [
    (make_objects(labels=[99]), 'label 99 is not one of 1 to 2'),
    *((make_objects(labels=[label]), 'is not one of 1 to 2') for label in (0, -1, True, 1., '1')),
    *((make_objects(boxes=[box]), 'is not .x_min, y_min') for box in (
        [1, 2, 3], 'abcd', [1, 2, 1, 4], [1, 4, 3, 2], [-1, 2, 3, 4], [1, 2, float('nan'), 4],
        [1, 2, 3, float('inf')], [1, 2, 3, 10 ** 400], [False, 2, 3, 4], ['1', 2, 3, 4],
        [[], 2, 3, 4], None)),
    *((make_objects(difficulties=[difficult]), 'neither false nor true')
      for difficult in (2, 'no', None)),
    (make_objects(boxes=[BOX, BOX]), '2 boxes, 1 labels, 1 difficulties'),
    *((objects, 'is not a dictionary of the lists') for objects in (
        [], 'x', {}, {'boxes': [], 'labels': []}, make_objects(labels=1))),
], ids=repr)
def test_invalid_objects_are_a_user_error(objects, problem, read):
    with pytest.raises(UserError, match=f'TEST_objects.json item 1, of b.jpg: .*{problem}'):
        read(objects)


@pytest.mark.parametrize('name, content, problem', [
    ('TEST_images', ['a.jpg'], 'has 1 images, TEST_objects.json the objects of 2'),
    ('TEST_images', ['a.jpg', 2], 'item 1: 2 is not a path'),
    ('TEST_images', {}, 'is not a list'),
    ('TEST_objects', {}, 'is not a list'),
    ('TEST_objects', '[' * 100_000, 'is not valid JSON'),
    ('TEST_objects', '9' * 10_000, 'is not valid JSON'),
    *(('label_map', label_map, 'does not map class names to 0, 1, 2') for label_map in (
        [], {}, {'cat': 0, 'dog': 1}, {'background': 0, 'cat': 1, 'dog': 1}, {'background': False},
        {'background': 0, 'cat': '1'}, {'background': 0, 'cat': 2}, {'background': 1, 'cat': 0})),
], ids=lambda value: repr(value)[:30])
def test_invalid_list_is_a_user_error(name, content, problem, read):
    with pytest.raises(UserError, match=f'{name}.json {problem}'):
        read(**{name: content})
