"""Tests of tools/shapes.py."""

import random

import pytest
from PIL import Image

from tools import shapes
from utils import parse_annotation


def test_files_are_in_voc_layout_with_the_drawn_boxes(tmp_path, capsys):
    shapes.main(shapes.Parameters(str(tmp_path), n_train=2, n_test=1, seed=5))
    splits = {split: (tmp_path / 'ImageSets' / 'Main' / f'{split}.txt').read_text()
              for split in ('trainval', 'test')}
    assert splits == {'trainval': '000001\n000002\n', 'test': '000003\n'}
    assert len([path for path in tmp_path.rglob('*') if path.is_file()]) == 2 * 3 + 2
    assert f'3 images drawn in {tmp_path}' in capsys.readouterr().out
    for number in (1, 2, 3):
        image, objects = shapes.draw_image(random.Random(f'5 {number}'))
        with Image.open(tmp_path / 'JPEGImages' / f'{number:06d}.jpg') as file:
            assert file.size == image.size
        parsed = parse_annotation(tmp_path / 'Annotations' / f'{number:06d}.xml', None)
        assert parsed == {'boxes': [list(box) for _, box, _, _ in objects],
                          'labels': [name for name, *_ in objects],
                          'difficulties': [difficult for _, _, difficult, _ in objects]}


@pytest.mark.parametrize('n_train, n_test, message', [
    (-5, 10, 'n_train is -5; give --n-train 0 or more'),
    (10, -5, 'n_test is -5; give --n-test 0 or more'),
])
def test_negative_count_is_a_user_error(tmp_path, capsys, n_train, n_test, message):
    with pytest.raises(SystemExit):
        shapes.main(shapes.Parameters(str(tmp_path), n_train, n_test))
    assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_same_seed_draws_the_same_image():
    (image, objects), (same, same_objects), (other, _) = (
        shapes.draw_image(random.Random(seed)) for seed in ('0 1', '0 1', '1 1'))
    assert image.tobytes() == same.tobytes() and objects == same_objects
    assert image.tobytes() != other.tobytes()


def test_images_vary_as_a_detection_data_set_should():
    drawn = [shapes.draw_image(random.Random(seed)) for seed in range(30)]
    objects = [obj for _, image_objects in drawn for obj in image_objects]
    assert {name for name, *_ in objects} == set(shapes.OUTLINES)
    assert {difficult for _, _, difficult, _ in objects} == {True, False}
    assert {truncated for *_, truncated in objects} == {True, False}
    assert len({image.size for image, _ in drawn}) == 3
    for image, image_objects in drawn:
        for _, (x_min, y_min, x_max, y_max), _, _ in image_objects:
            assert 0 <= x_min < x_max <= image.width and 0 <= y_min < y_max <= image.height


@pytest.mark.parametrize('least_visible, some_hidden', [(0.2, True), (0.95, False)])
def test_shapes_hide_no_more_of_each_other_than_allowed(least_visible, some_hidden, monkeypatch):
    monkeypatch.setattr(shapes, 'LEAST_VISIBLE', (least_visible,))
    drawn = [shapes.draw_image(random.Random(seed))[1] for seed in range(40)]
    assert {len(objects) for objects in drawn} == {4, 5, 6}
    assert any(difficult for objects in drawn for _, _, difficult, _ in objects) == some_hidden


def test_image_without_room_for_more_shapes_has_fewer(monkeypatch):
    monkeypatch.setattr(shapes, 'LEAST_VISIBLE', (1,))
    monkeypatch.setattr(shapes, 'draw_mask', lambda name, size, rng: Image.new('L', size, 255))
    assert len(shapes.draw_image(random.Random(0))[1]) == 1


@pytest.mark.parametrize('box, area', [((0, 0, 10, 4), 40), ((3, 3, 3, 3), 0)])
def test_mask_area_counts_pixels(box, area):
    mask = Image.new('L', (20, 10))
    mask.paste(255, box)
    assert shapes.mask_area(mask) == area
    assert shapes.mask_area(mask.point(lambda level: level // 5)) == area / 5
