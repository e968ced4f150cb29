"""Inputs, outputs, the JSON report and image files of detect.py."""

import json
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from PIL import Image

from support.errors import UserError
from support.images import (
    check_outputs,
    choose_outputs,
    expand_inputs,
    in_batches,
    is_camera,
    is_video,
    json_report,
    make_upright,
    read_ahead,
    save_image,
    try_read_image,
)


def test_each_input_counts_once(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / '[a]').mkdir()
    for name in ('[a]/1.jpg', '3'):
        (tmp_path / name).write_bytes(b'')
    assert expand_inputs(['[a]/1.jpg', '[a]', '3', '4', 'missing.jpg']) == (
        ['[a]/1.jpg', '3', '4', 'missing.jpg'], [])


def test_number_is_a_camera_unless_it_is_a_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / '3').write_bytes(b'')
    assert is_camera('4') and not is_camera('3') and not is_camera('4.jpg')
    assert is_video('4') and is_video('a.MP4') and not is_video('3') and not is_video('a.jpg')


def test_outputs_are_files_or_go_into_a_folder(tmp_path):
    folder = tmp_path / 'out'
    assert choose_outputs(['a.jpg'], tmp_path / 'new' / 'b.PNG') == [tmp_path / 'new' / 'b.PNG']
    assert choose_outputs(['x/a.jpg', 'y/a.jpg', 'y/b.xyz'], folder) == [
        folder / 'a.jpg', folder / 'a_2.jpg', folder / 'b.png']
    assert choose_outputs(['a.jpg'], folder) == [folder / 'a.jpg']
    assert choose_outputs(['-', '99', 'a.wmv', 'A.JPG', 'b/a.jpg'], folder) == [
        folder / 'stdin.png', folder / 'camera_99.mp4', folder / 'a.mp4', folder / 'A.JPG',
        folder / 'a_2.jpg']
    (tmp_path / 'folder.png').mkdir()
    assert choose_outputs(['a.jpg'], tmp_path / 'folder.png') == [tmp_path / 'folder.png' / 'a.jpg']


def test_output_that_would_replace_an_input_is_user_error(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    check_outputs(['photo.png'], [tmp_path / 'other.png'])
    with pytest.raises(UserError, match='photo.png would be replaced'):
        check_outputs(['photo.png'], [tmp_path / 'other.png', tmp_path / 'photo.png'])


@pytest.mark.parametrize('n_rows', [0, 1, 3])
def test_json_report_is_a_list_of_rows(tmp_path, n_rows):
    prediction = {'boxes': torch.tensor([[1., 2., 3., 4.]]), 'labels': ['dog'],
                  'scores': torch.tensor([.5])}
    with json_report(tmp_path / 'found.json') as add_to_report:
        for frame in range(n_rows):
            add_to_report('clip.mp4', prediction, frame=frame)
        assert not (tmp_path / 'found.json').exists()
    assert json.loads((tmp_path / 'found.json').read_text()) == [
        {'file': 'clip.mp4', 'frame': frame, 'boxes': [[1, 2, 3, 4]], 'labels': ['dog'],
         'scores': [.5]} for frame in range(n_rows)]


def test_without_a_path_no_json_report_is_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with json_report(None) as add_to_report:
        add_to_report('a.jpg', {})
    assert not list(tmp_path.iterdir())


def test_upright_image_keeps_only_the_color_profile():
    image = Image.new('RGB', (20, 10))
    image.info = {'icc_profile': b'profile', 'exif': b'', 'dpi': (72, 72)}
    image.getexif()[0x0112] = 6
    upright = make_upright(image)
    assert upright.size == (10, 20) and upright.info == {'icc_profile': b'profile'}
    assert make_upright(Image.new('L', (20, 10))).mode == 'RGB'
    assert image.size == (20, 10)


def test_unreadable_image_is_returned_as_an_error(tmp_path):
    (tmp_path / 'broken.jpg').write_bytes(b'no image')
    save_image(Image.new('RGB', (20, 10), 'red'), tmp_path / 'good.png')
    assert isinstance(try_read_image(tmp_path / 'broken.jpg'), Exception)
    assert isinstance(try_read_image(tmp_path / 'missing.jpg'), Exception)
    image = try_read_image(tmp_path / 'good.png')
    assert image.mode == 'RGB' and image.getpixel((5, 5)) == (255, 0, 0)
    assert sorted(path.name for path in tmp_path.iterdir()) == ['broken.jpg', 'good.png']


def test_read_ahead_keeps_the_order_and_its_limit():
    started = []

    def square(number):
        started.append(number)
        return number ** 2

    with ThreadPoolExecutor(1) as pool:
        results = read_ahead(pool, square, range(10), n_ahead=3)
        assert next(results) == 0
        pool.submit(int).result()   # all work submitted so far is done
        assert started == [0, 1, 2, 3]
        assert list(results) == [number ** 2 for number in range(1, 10)]


def test_batches_have_the_size_but_for_the_last():
    assert list(in_batches(iter('abcde'), 2)) == [['a', 'b'], ['c', 'd'], ['e']]
    assert list(in_batches([], 2)) == []
