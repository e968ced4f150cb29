"""Inputs, outputs, the JSON report and image files of detect.py."""

import json
import pathlib
import struct
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from PIL import Image, ImageOps

from support import images as images_module
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
    print_line,
    read_batches,
    read_orientation,
    redact,
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
    assert choose_outputs(['rtsp://[camera/'], folder) == [folder / 'stream.mp4']
    (tmp_path / 'folder.png').mkdir()
    assert choose_outputs(['a.jpg'], tmp_path / 'folder.png') == [tmp_path / 'folder.png' / 'a.jpg']


def test_password_of_a_url_is_not_in_the_message(tmp_path):
    with pytest.raises(UserError, match='rtsp://camera/live cannot be written as .jpg') as info:
        choose_outputs(['rtsp://admin:secret@camera/live'], tmp_path / 'a.jpg')
    assert 'secret' not in str(info.value)


def test_output_that_would_replace_an_input_is_user_error(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    check_outputs(['photo.png'], [tmp_path / 'other.png'])
    with pytest.raises(UserError, match='photo.png would be replaced'):
        check_outputs(['photo.png'], [tmp_path / 'other.png', tmp_path / 'photo.png'])


def test_outputs_are_different_files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match='--output and --json would write the same file'):
        check_outputs(['photo.png'], [tmp_path / 'other.png', pathlib.Path('other.png')])
    with pytest.raises(UserError, match='is a folder; give the name of a file'):
        check_outputs(['photo.png'], [tmp_path / 'other.png', tmp_path])


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


@pytest.mark.parametrize('suffix', ['.jpg', '.tif'])
@pytest.mark.parametrize('orientation', range(10))  # 0 and 9 have no meaning
def test_image_is_upright_as_by_pillow(tmp_path, orientation, suffix):
    path = tmp_path / f'image{suffix}'
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.effect_noise((20, 10), 50).convert('RGB').save(path, exif=exif)
    with Image.open(path) as image, Image.open(path) as same:
        expected = ImageOps.exif_transpose(same)
        upright = make_upright(image)
    assert upright.size == expected.size and upright.tobytes() == expected.tobytes()


def test_invalid_exif_data_do_not_matter(tmp_path):
    # Orientation 6 as a short integer, then a resolution (0x11a, a fraction) as a byte.
    tags = struct.pack('<HHIHHHHII', 0x112, 3, 1, 6, 0, 0x11a, 1, 1, 1)
    exif = b'Exif\0\0II*\0' + struct.pack('<IH', 8, 2) + tags + bytes(4)
    Image.new('RGB', (20, 10)).save(tmp_path / 'a.jpg', exif=exif)
    with Image.open(tmp_path / 'a.jpg') as image:
        with pytest.raises(TypeError):
            ImageOps.exif_transpose(image)
        assert read_orientation(image) == 6 and make_upright(image).size == (10, 20)


@pytest.mark.parametrize('suffix', ['.jpg', '.webp', '.png', '.tif'])
def test_color_profile_is_written(tmp_path, suffix):
    image = Image.new('RGB', (20, 10))
    image.info = {'icc_profile': b'profile'}
    save_image(image, tmp_path / f'a{suffix}')
    with Image.open(tmp_path / f'a{suffix}') as written:
        assert written.info['icc_profile'] == b'profile'


def test_unreadable_image_is_returned_as_an_error(tmp_path):
    (tmp_path / 'broken.jpg').write_bytes(b'no image')
    save_image(Image.new('RGB', (20, 10), 'red'), tmp_path / 'good.png')
    assert isinstance(try_read_image(tmp_path / 'broken.jpg'), Exception)
    assert isinstance(try_read_image(tmp_path / 'missing.jpg'), Exception)
    image = try_read_image(tmp_path / 'good.png')
    assert image.mode == 'RGB' and image.getpixel((5, 5)) == (255, 0, 0)
    assert sorted(path.name for path in tmp_path.iterdir()) == ['broken.jpg', 'good.png']


def test_batches_are_limited_in_number_and_in_bytes(monkeypatch):
    monkeypatch.setattr(images_module, 'MAX_BATCH_BYTES', 400)
    widths = [40, 60, 1, 99, 500, 2, 2, 2, 2, 2, 500]
    assert list(in_batches(widths, 4, lambda width: (width, 1))) == [
        [40, 60], [1, 99], [500], [2, 2, 2, 2], [2], [500]]
    assert list(in_batches([], 2)) == []
    images = [Image.new('L', (10, 6)) for _ in range(3)]
    remaining = iter(images)
    assert next(in_batches(remaining, 1)) == images[:1]
    assert list(remaining) == images[1:]    # a full batch does not wait for the next image


def test_two_batches_are_in_memory_at_most(monkeypatch):
    lock, n_bytes, most = threading.Lock(), 0, 0

    class Decoded:
        """A decoded image, which counts the bytes of all."""

        def __init__(self, path):
            self.path = path
            self.count(+1)

        def __del__(self):
            self.count(-1)

        def count(self, sign):
            nonlocal n_bytes, most
            with lock:
                n_bytes += sign * 4 * int(self.path)
                most = max(most, n_bytes)

    monkeypatch.setattr(images_module, 'MAX_BATCH_BYTES', 400)
    monkeypatch.setattr(images_module, 'try_read_size', lambda path: (int(path), 1))
    monkeypatch.setattr(images_module, 'try_read_image', Decoded)
    paths = [(width, f'out/{width}') for width in ['30'] * 40 + ['98', '2', '150'] * 10]
    read = []
    with ThreadPoolExecutor(4) as pool:
        for batch in read_batches(pool, paths, 32):
            read += [(image.path, output) for (_, output), image in batch]
    assert read == [(path, output) for path, output in paths]
    assert most <= 400 + 600, f'{most} bytes'   # of a full batch, and of the image that is larger
    assert n_bytes == 0


def test_line_of_a_name_with_unprintable_characters_is_one_line(capsys):
    print_line('é a\nb\r\x1b[2J\udcff.jpg -> b')
    assert capsys.readouterr().out == 'é a\\nb\\r\\x1b[2J\\udcff.jpg -> b\n'


def test_image_that_its_format_cannot_hold_is_a_user_error(tmp_path):
    with pytest.raises(UserError, match='wide.webp cannot be written.*another suffix'):
        save_image(Image.new('RGB', (17_000, 2)), tmp_path / 'wide.webp')
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize('source, name', [
    ('rtsp://admin:secret@192.168.1.5:554/stream1', 'rtsp://192.168.1.5:554/stream1'),
    ('rtsp://admin:se@cr#e/t?@camera/stream', 'rtsp://camera/stream'),
    ('http://camera/video?user=admin&pwd=secret#secret', 'http://camera/video'),
    ('rtsp://camera/user=admin_password=secret_channel=1/live', 'rtsp://camera/live'),
    ('http://camera', 'http://camera'), ('clips/a.mp4', 'clips/a.mp4'), ('0', '0')])
def test_password_is_removed_from_a_url(source, name):
    assert redact(source) == name
