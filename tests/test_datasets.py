"""The data set, the order of a run's images, and the loaders."""

import os
import random
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from PIL import Image

import utils
from create_data_lists import write_data_lists
from datasets import (
    PascalVOCDataset,
    SeededItems,
    ShuffledBatches,
    collate_fn,
    collate_padded,
    make_test_loader,
    make_train_loader,
)
from support.errors import UserError

CAT, DOG = ('cat', (1, 1, 32, 24)), ('dog', (33, 25, 64, 48))


@pytest.fixture
def lists(make_voc, tmp_path):
    """A function that makes a folder with the lists of images; returns it and the image folder."""
    def make(images):
        root = make_voc({'s': images})
        write_data_lists([(root, 's')], [(root, 's')], tmp_path / 'lists')
        return tmp_path / 'lists', root / 'JPEGImages'
    return make


# --------------------------------------------------------------------------------------------------
# The data set
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('split', ['TRAIN', 'TEST'])
def test_items_have_their_types_and_shapes(split, lists):
    folder, _ = lists({'a': [CAT, DOG], 'b': [DOG]})
    data = PascalVOCDataset(str(folder), split)
    assert len(data) == 2
    assert data.label_map == {'background': 0, 'cat': 1, 'dog': 2}
    for image, boxes, labels, difficulties in (data[0], data[1]):
        assert (image.shape, image.dtype) == ((3, 300, 300), torch.uint8)
        assert (boxes.shape, boxes.dtype) == ((len(labels), 4), torch.float32)
        assert (labels.shape, labels.dtype) == ((len(labels),), torch.int64)
        assert (difficulties.shape, difficulties.dtype) == ((len(labels),), torch.bool)


def test_test_items_are_the_lists_in_fractions(lists):
    folder, _ = lists({'a': [CAT, DOG], 'empty': []})
    data = PascalVOCDataset(folder, 'TEST')
    _, boxes, labels, _ = data[0]
    assert boxes.tolist() == [[0, 0, 0.5, 0.5], [0.5, 0.5, 1, 1]] and labels.tolist() == [1, 2]
    assert [tuple(tensor.shape) for tensor in data[1][1:]] == [(0, 4), (0,), (0,)]


@pytest.mark.parametrize('split', ['TRAIN', 'TEST'])
def test_difficult_objects_are_kept_on_request_in_either_split(split, lists, monkeypatch):
    monkeypatch.setattr(utils, 'CROP_OPTIONS', (None,))  # a crop may drop objects
    folder, _ = lists({'a': [(*CAT, 1), (*DOG, 0)], 'only': [(*CAT, 1)]})
    easy, every = (PascalVOCDataset(folder, split, keep_difficult=keep) for keep in (False, True))
    assert easy[0][2].tolist() == [2] and easy[0][3].tolist() == [False]
    assert every[0][2].tolist() == [1, 2] and every[0][3].tolist() == [True, False]
    assert easy[1][1].shape == (0, 4) and len(every[1][1]) == 1
    assert len(PascalVOCDataset(folder, split)[0][2]) == 1  # not kept by default


def test_training_images_without_augmentation_are_only_resized(lists):
    folder, _ = lists({'a': [CAT, DOG]})
    plain = PascalVOCDataset(folder, 'TRAIN', augment=False)
    for item in (plain[0], plain[0]):
        assert all(torch.equal(a, b) for a, b in zip(item, PascalVOCDataset(folder, 'TEST')[0]))


@pytest.mark.parametrize('mode, color, level', [('L', 100, 100), ('RGBA', (0, 0, 0, 0), 255)])
def test_images_of_other_modes_become_rgb(mode, color, level, lists):
    folder, images = lists({'a': [CAT]})
    Image.new(mode, (64, 48), color).save(images / 'a.jpg', 'PNG')
    image = PascalVOCDataset(folder, 'TEST')[0][0]
    assert image.shape == (3, 300, 300) and (image == level).all()


def test_orientation_tag_is_ignored(lists):
    folder, images = lists({'a': [CAT]})
    photo = Image.new('RGB', (64, 48))
    photo.paste((255, 255, 255), (0, 0, 32, 48))  # the left half is white
    exif = photo.getexif()
    exif[0x0112] = 6
    photo.save(images / 'a.jpg', exif=exif, quality=95)
    image = PascalVOCDataset(folder, 'TEST')[0][0].float()
    assert image[:, :, :140].min() > 250 and image[:, :, 160:].max() < 5


def test_missing_or_invalid_lists_are_a_user_error(lists, tmp_path):
    with pytest.raises(UserError, match='nowhere.*create_data_lists.py'):
        PascalVOCDataset(tmp_path / 'nowhere', 'TRAIN')
    folder, _ = lists({'a': [CAT]})
    for name in ('TEST_images.json', 'TEST_objects.json', 'label_map.json'):
        whole = (folder / name).read_text()
        (folder / name).write_text(whole[:-1])
        with pytest.raises(UserError, match=f'{name}.*create_data_lists.py'):
            PascalVOCDataset(folder, 'TEST')
        (folder / name).unlink()
        with pytest.raises(UserError, match=f'{name}.*create_data_lists.py'):
            PascalVOCDataset(folder, 'TEST')
        (folder / name).write_text(whole)
    assert len(PascalVOCDataset(folder, 'TEST')) == 1


def test_moved_images_are_a_user_error_from_the_start(lists):
    folder, images = lists({'a': [CAT], 'b': [CAT]})
    (images / 'b.jpg').unlink()
    with pytest.raises(UserError, match='b.jpg.*create_data_lists.py'):
        PascalVOCDataset(folder, 'TRAIN')


@pytest.mark.parametrize('content', [b'', b'not an image', None])
def test_image_that_cannot_be_decoded_is_named(content, lists):
    folder, images = lists({'a': [CAT], 'b': [CAT]})
    path = images / 'b.jpg'
    path.write_bytes(path.read_bytes()[:-200] if content is None else content)
    data = PascalVOCDataset(folder, 'TRAIN')
    assert data[0][0].shape == (3, 300, 300)
    with pytest.raises(UserError, match='b.jpg'):
        data[1]


def test_images_that_became_smaller_are_a_user_error(lists):
    folder, images = lists({'a': [('cat', (8, 6, 60, 40))]})
    Image.open(images / 'a.jpg').resize((32, 24)).save(images / 'a.jpg')
    with pytest.raises(UserError, match='a.jpg has 32 x 24 pixels, and boxes past its border'):
        PascalVOCDataset(folder, 'TRAIN')[0]


def test_split_is_train_or_test(lists):
    folder, _ = lists({'a': [CAT]})
    with pytest.raises(AssertionError, match="'train'"):
        PascalVOCDataset(folder, 'train')


def test_label_that_is_no_class_is_a_user_error_from_the_start(lists):
    folder, _ = lists({'a': [CAT], 'b': [DOG]})
    path = folder / 'TRAIN_objects.json'
    path.write_text(path.read_text().replace('"labels": [2]', '"labels": [99]'))
    with pytest.raises(UserError, match='b.jpg: label 99 is not one of 1 to 2'):
        PascalVOCDataset(folder, 'TRAIN')


def test_real_images_in_both_splits(sample_data, tmp_path):
    root = tmp_path / 'voc'
    for part in ('JPEGImages', 'Annotations'):
        (root / part).parent.mkdir(exist_ok=True)
        (root / part).symlink_to(sample_data / 'voc-sample' / 'VOC2007' / part)
    (root / 'ImageSets' / 'Main').mkdir(parents=True)
    names = (sample_data / 'voc-sample/VOC2007/ImageSets/Main/test.txt').read_text().split()[:30]
    (root / 'ImageSets' / 'Main' / 'few.txt').write_text('\n'.join(names))
    write_data_lists([(root, 'few')], [(root, 'few')], tmp_path / 'lists', utils.label_map)
    random.seed(0)
    train, test = (PascalVOCDataset(tmp_path / 'lists', split) for split in ('TRAIN', 'TEST'))
    assert len(train) == len(test) == 30
    for i in range(30):
        for data in (train, test):
            image, boxes, labels, _ = data[i]
            assert image.shape == (3, 300, 300) and image.float().std() > 1
            assert len(boxes) >= 1 and boxes.min() >= 0 and boxes.max() <= 1 + 1e-6
            assert (boxes[:, 2:] > boxes[:, :2]).all()
            assert set(labels.tolist()) <= set(range(1, 21))
        assert len(labels) == len(test.objects[i]['labels'])


# --------------------------------------------------------------------------------------------------
# Order and randomness of a training run
# --------------------------------------------------------------------------------------------------


def test_batches_are_consecutive_permutations():
    batches = list(ShuffledBatches(n_images=10, batch_size=4, seed=1, start=0, end=5))
    positions, images = zip(*(pair for batch in batches for pair in batch))
    assert list(positions) == list(range(20))
    assert sorted(images[:10]) == sorted(images[10:]) == list(range(10))
    assert images[:10] != images[10:] != tuple(range(10))


def test_batches_from_the_middle_are_those_of_the_uninterrupted_run():
    whole = list(ShuffledBatches(7, 3, seed=5, start=0, end=9))
    assert list(ShuffledBatches(7, 3, seed=5, start=4, end=9)) == whole[4:]
    assert list(ShuffledBatches(7, 3, seed=6, start=0, end=9)) != whole


def test_augmentation_depends_on_seed_and_position_not_on_the_workers(lists):
    folder, _ = lists({f'im{i}': [CAT, DOG] for i in range(3)})
    dataset = PascalVOCDataset(folder, 'TRAIN')
    order = ShuffledBatches(len(dataset), 2, seed=0, start=0, end=4)
    plain, loaded = (list(make_train_loader(dataset, order, workers, torch.device('cpu')))
                     for workers in (0, 2))
    for batch, other in zip(plain, loaded, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(batch, other, strict=True))

    # The same image at two positions, which two workers handle, is augmented in two ways.
    items = SeededItems(dataset, seed=0)
    assert not torch.equal(items[0, 2][0], items[1, 2][0])
    assert torch.equal(items[0, 2][0], items[0, 2][0])
    assert not torch.equal(items[0, 2][0], SeededItems(dataset, seed=1)[0, 2][0])


def test_loaders_work_in_any_thread(lists):
    folder, _ = lists({'a': [CAT], 'b': [DOG]})
    loader = make_test_loader(PascalVOCDataset(folder, 'TEST'), 1, 1, torch.device('cpu'))
    with ThreadPoolExecutor() as pool:
        assert len(pool.submit(list, loader).result()) == 2


def test_workers_stay_for_the_next_evaluation(lists, monkeypatch):
    folder, _ = lists({'a': [CAT]})
    monkeypatch.setattr(PascalVOCDataset, '__getitem__', lambda dataset, i: (
        torch.zeros(3, 2, 2), torch.zeros(0, 4), torch.tensor([os.getpid()]), torch.zeros(0)))
    loader = make_test_loader(PascalVOCDataset(folder, 'TEST'), 1, 1, torch.device('cpu'))
    (_, _, (first,), _), = loader
    (_, _, (second,), _), = loader
    assert first == second != os.getpid()


# --------------------------------------------------------------------------------------------------
# Batches
# --------------------------------------------------------------------------------------------------


def test_batch_contains_its_items(lists):
    folder, _ = lists({'a': [CAT, DOG], 'b': [DOG], 'empty': []})
    items = [PascalVOCDataset(folder, 'TEST')[i] for i in range(3)]
    images, *objects = collate_fn(items)
    assert (images.shape, images.dtype) == ((3, 3, 300, 300), torch.uint8)
    assert images.is_contiguous(memory_format=torch.channels_last)
    assert [type(values) for values in objects] == [list] * 3
    assert [len(boxes) for boxes in objects[0]] == [2, 1, 0]
    for item, image, *its_objects in zip(items, images, *objects):
        assert all(torch.equal(a, b) for a, b in zip(item, (image, *its_objects)))


def test_padded_batch_contains_its_items_and_zeros(lists):
    folder, _ = lists({'a': [CAT, DOG], 'b': [DOG], 'empty': []})
    items = [PascalVOCDataset(folder, 'TEST')[i] for i in range(3)]
    images, boxes, labels = collate_padded(items)
    assert torch.equal(images, collate_fn(items)[0])
    assert (boxes.shape, boxes.dtype) == ((3, 2, 4), torch.float32)
    assert (labels.shape, labels.dtype) == ((3, 2), torch.int64)
    for i, (_, its_boxes, its_labels, _) in enumerate(items):
        n_objects = len(its_boxes)
        assert torch.equal(boxes[i, :n_objects], its_boxes) and (boxes[i, n_objects:] == 0).all()
        assert torch.equal(labels[i, :n_objects], its_labels)
        assert (labels[i, n_objects:] == 0).all()
    _, boxes, labels = collate_padded(items[2:])
    assert (boxes.shape, labels.shape) == ((1, 1, 4), (1, 1))
