"""Large JPEG files: decoded at a reduced scale where the result is nearly the same."""

import numpy as np
import pytest
from PIL import Image

import utils
from create_data_lists import write_data_lists
from datasets import PascalVOCDataset
from support.errors import BrokenImageError
from support.large_jpeg import LargeJpeg, read_or_postpone


@pytest.fixture(scope='module')
def photo(tmp_path_factory):
    """A JPEG file of 2500 x 1001 pixels with detail of all sizes."""
    image = sum(np.kron(np.random.default_rng(cell).integers(0, 60, (1001 // cell + 1,
                                                                     2500 // cell + 1, 3)),
                        np.ones((cell, cell, 1)))[:1001, :2500] for cell in (1, 8, 60, 400))
    path = tmp_path_factory.mktemp('photo') / 'photo.jpg'
    Image.fromarray(image.astype(np.uint8)).save(path, quality=95)
    return path


@pytest.fixture
def decoded_sizes(monkeypatch):
    """A list of the sizes that images are decoded at."""
    sizes, to_rgb = [], utils.to_rgb
    monkeypatch.setattr('support.large_jpeg.to_rgb',
                        lambda image: sizes.append(image.size) or to_rgb(image))
    return sizes


@pytest.mark.parametrize('window, size, decoded', [
    ((0, 0, 2500, 1001), 60, (625, 251)), ((0, 0, 2500, 1001), 120, (1250, 501)),
    ((300, 100, 1800, 900), 100, (1250, 501)), ((-2500, -1001, 5000, 2002), 100, (625, 251)),
    ((300, 100, 1000, 900), 100, (2500, 1001))])
def test_result_is_nearly_that_of_the_full_image(photo, decoded_sizes, window, size, decoded):
    image = read_or_postpone(photo, 100)
    assert isinstance(image, LargeJpeg) and image.size == (2500, 1001) and decoded_sizes == []
    result = np.asarray(utils.warp(image, window, size=size), dtype=int)
    expected = np.asarray(utils.warp(utils.read_image(photo), window, size=size), dtype=int)
    assert decoded_sizes == [decoded]
    assert abs(result - expected).mean() < 0.2 and abs(result - expected).max() <= 2
    assert expected.std() > 10


def test_without_antialiasing_the_full_image_is_decoded(photo):
    results = [utils.warp(image, (0, 0, 2500, 1001), antialias=False)
               for image in (read_or_postpone(photo, 100), utils.read_image(photo))]
    assert results[0].tobytes() == results[1].tobytes()


@pytest.mark.parametrize('size, suffix', [((2500, 700), 'jpg'), ((900, 900), 'png')])
def test_other_images_are_read_at_once(tmp_path, size, suffix):
    Image.new('L', size, 'gray').save(tmp_path / f'image.{suffix}')
    assert read_or_postpone(tmp_path / f'image.{suffix}', 100).mode == 'RGB'


def test_data_set_gives_the_same_boxes_and_reports_broken_files(make_voc, tmp_path, photo):
    folder = make_voc({'test': {'a': [('cat', (1, 1, 1250, 1001))]}}, size=(2500, 1001))
    (folder / 'JPEGImages' / 'a.jpg').write_bytes(photo.read_bytes())
    write_data_lists([], [(folder, 'test')], tmp_path / 'lists')
    dataset = PascalVOCDataset(tmp_path / 'lists', 'TEST')
    dataset.size = 100
    image, boxes, *_ = dataset[0]
    assert image.shape == (3, 100, 100) and boxes.tolist() == [[0, 0, 0.5, 1]]
    (folder / 'JPEGImages' / 'a.jpg').write_bytes(photo.read_bytes()[:20_000])
    with pytest.raises(BrokenImageError, match='a.jpg: cannot be decoded'):
        dataset[0]
