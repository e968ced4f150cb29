"""The cache of decoded images."""

import os
import pathlib

import pytest
import torch
from torch.utils.data import DataLoader

from create_data_lists import write_data_lists
from datasets import PascalVOCDataset
from support import image_cache
from support.errors import UserError
from support.image_cache import ImageCache, shared_folder
from utils import read_image


@pytest.fixture
def dataset(make_voc, tmp_path):
    """Five training images of 64 x 48 pixels, without augmentation."""
    voc = make_voc({'train': {f'im{i}': [('cat', (5, 5, 30, 30))] for i in range(5)}})
    write_data_lists([(voc, 'train')], [(voc, 'train')], tmp_path / 'lists')
    return PascalVOCDataset(tmp_path / 'lists', 'TRAIN', keep_difficult=True, augment=False)


def test_cached_images_equal_those_of_the_files_with_any_number_of_workers(dataset, capsys):
    images = [read_image(path) for path in dataset.images]
    plain = [dataset[i][0] for i in range(5)]
    dataset.cache = ImageCache(dataset.images)
    assert capsys.readouterr().out.startswith('cache: 5 images, 0.00 GB of the ')
    assert len(dataset.cache.memory) == 5 * 3 * 64 * 48
    for path in dataset.images:     # they are not read again
        pathlib.Path(path).unlink()
    for i, image in enumerate(images):
        assert (dataset.cache[i].mode, dataset.cache[i].size) == (image.mode, image.size)
        assert dataset.cache[i].tobytes() == image.tobytes()
    for workers in (0, 2):
        loader = DataLoader(dataset, batch_size=None, num_workers=workers)
        cached = [item[0] for item in loader]
        assert all(torch.equal(a, b) for a, b in zip(plain, cached, strict=True))
    folder, _ = shared_folder()
    assert not list(folder.glob(f'ssd300-cache-*-{os.getpid()}'))


def test_augmentation_leaves_the_cache_unchanged(dataset, tmp_path):
    dataset = PascalVOCDataset(tmp_path / 'lists', 'TRAIN', keep_difficult=True)
    dataset.cache = ImageCache(dataset.images)
    before = dataset.cache.memory.clone()
    for _ in range(10):
        for i in range(5):
            assert dataset[i][0].shape == (3, 300, 300)
    assert torch.equal(dataset.cache.memory, before)


def test_cache_larger_than_the_memory_is_a_user_error(dataset, monkeypatch, tmp_path):
    monkeypatch.setattr(image_cache, 'shared_folder', lambda: (tmp_path, 40_000))
    with pytest.raises(UserError, match='needs 0.00 GB, .* the 0.00 GB free .* leave --cache out'):
        ImageCache(dataset.images)
    assert not list(tmp_path.glob('ssd300*'))


def test_memory_of_read_files_in_a_container_is_free(monkeypatch):
    """The limit of the group counts files that were read, which the system drops when needed."""
    files = {'memory.max': '1000\n', 'memory.current': '900\n',
             'memory.stat': 'anon 500\nfile 400\ninactive_file 300\n'}

    def read_text(path):
        if path.parent != pathlib.Path('/sys/fs/cgroup'):
            raise FileNotFoundError(path)
        return files[path.name]

    monkeypatch.setattr(pathlib.Path, 'read_text', read_text)
    assert image_cache.shared_folder()[1] == 400
    files['memory.max'] = 'max\n'
    assert image_cache.shared_folder()[1] > 1_000_000


def test_corrupt_image_is_a_user_error_with_its_name(dataset):
    path = pathlib.Path(dataset.images[2])
    path.write_bytes(path.read_bytes()[:400])
    with pytest.raises(UserError, match=f'{path.name}.*cannot be decoded'):
        ImageCache(dataset.images)
