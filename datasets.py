"""The data set, the order of its images in a training run, and the data loaders.

N is the number of images in a batch, O the number of objects in an image.
"""

import pathlib
import random

import torch
from torch.utils.data import Dataset

from support.data_lists import read_lists
from support.errors import UserError
from support.large_jpeg import read_or_postpone
from support.processes import Loader, get_rank, get_world_size, ignore_signals_in_worker
from utils import INPUT_SIZE, pad_objects, transform


class PascalVOCDataset(Dataset):
    """The images of one split of the lists that `create_data_lists.py` wrote.

    Item i is (image (3, 300, 300) uint8, boxes (O, 4) in fractions, labels (O,), difficulties
    (O,)). `label_map` maps the names of the lists' classes to their indices.

    Args:
        data_folder: the folder of the lists.
        split: 'TRAIN', whose images are augmented, or 'TEST'.
        keep_difficult: keep objects that are marked difficult, in either split.
        augment: False for TRAIN images that are only resized, as those of TEST.

    Raises:
        UserError: lists that are missing or invalid, images that have moved; from an item, an
            image that cannot be decoded.
    """

    def __init__(self, data_folder, split, keep_difficult=False, augment=True):
        assert split in ('TRAIN', 'TEST'), f'split is {split!r}, not TRAIN or TEST'
        self.split = split
        self.keep_difficult = keep_difficult
        self.augment = augment
        self.images, self.objects, self.label_map = read_lists(data_folder, split)
        self.cache = None   # see `ImageCache`
        self.antialias, self.size = True, INPUT_SIZE    # those of the model, see `utils.warp()`
        missing = [path for path in self.images if not pathlib.Path(path).is_file()]
        if missing:
            raise UserError(f'{len(missing)} of the {len(self.images)} images of {data_folder} are '
                            f'missing, such as {missing[0]}; if they have moved, run '
                            f'create_data_lists.py again')

    def resize_for(self, model):
        """Resize images as the weights of a model expect it."""
        self.antialias, self.size = bool(model.antialias), model.input_size

    def __len__(self):
        return len(self.images)

    def __getitem__(self, i):
        image = (read_or_postpone(self.images[i], self.size) if self.cache is None
                 else self.cache[i])
        objects = self.objects[i]
        boxes = torch.tensor(objects['boxes'], dtype=torch.float32).view(-1, 4)
        if (boxes[:, 2:] > torch.tensor(image.size) + 1).any():
            raise UserError(f'{self.images[i]} has {image.size[0]} x {image.size[1]} pixels, and '
                            f'boxes past its border; make the lists again with '
                            f'create_data_lists.py')
        labels = torch.tensor(objects['labels'], dtype=torch.int64)
        difficulties = torch.tensor(objects['difficulties'], dtype=torch.bool)
        if not self.keep_difficult:
            easy = ~difficulties
            boxes, labels, difficulties = boxes[easy], labels[easy], difficulties[easy]
        split = self.split if self.augment else 'TEST'
        return transform(image, boxes, labels, difficulties, split, self.antialias, self.size)


# --------------------------------------------------------------------------------------------------
# Order and randomness of a training run
# --------------------------------------------------------------------------------------------------


class ShuffledBatches:
    """Sample the batches of a training run, each a list of (position in the run, image index).

    Each epoch is a permutation that depends only on the seed and the number of the epoch, so a run
    that is resumed at iteration k sees what an uninterrupted run sees from there. A batch may hold
    the end of one epoch and the beginning of the next. Each rank iterates over its share of every
    batch.

    Args:
        n_images: in the data set.
        batch_size: images in a batch, of all ranks together.
        seed: of the permutations.
        start, end: the first iteration, counted from 0, and the one after the last.
    """

    def __init__(self, n_images, batch_size, seed, start, end):
        self.n_images, self.batch_size, self.seed = n_images, batch_size, seed
        self.start, self.end = start, end
        self.epoch, self.permutation = None, None   # of the batch that was made last

    def __len__(self):
        return self.end - self.start

    def __iter__(self):
        size = self.batch_size // get_world_size()
        share = slice(get_rank() * size, (get_rank() + 1) * size)
        for iteration in range(self.start, self.end):
            yield self.batch(iteration)[share]

    def batch(self, iteration):
        """Return the whole batch of an iteration, counted from 0."""
        batch = []
        for position in range(iteration * self.batch_size, (iteration + 1) * self.batch_size):
            epoch, i = divmod(position, self.n_images)
            if epoch != self.epoch:
                self.epoch, self.permutation = epoch, list(range(self.n_images))
                random.Random(f'{self.seed} {epoch}').shuffle(self.permutation)
            batch.append((position, self.permutation[i]))
        return batch


class SeededItems(Dataset):
    """A data set whose augmentation depends only on the seed and on an item's position in the run.

    So neither the number of workers nor a resume changes what the network sees, and no two workers
    use the same random numbers. A run has no other random state that a checkpoint would have to
    hold.

    Args:
        dataset: whose items are augmented with the random numbers of Python's `random`.
        seed: of the run.
    """

    def __init__(self, dataset, seed):
        self.dataset, self.seed = dataset, seed

    def __getitem__(self, key):
        position, i = key
        random.seed(f'{self.seed} {position}')
        return self.dataset[i]


# --------------------------------------------------------------------------------------------------
# Loaders
# --------------------------------------------------------------------------------------------------


def collate_fn(batch):
    """Collate items for evaluation.

    Images contain different numbers of objects, so those stay in lists. The images' memory format
    is channels last, the fastest for the convolutions.

    Returns:
        images (N, 3, 300, 300), and lists of N tensors: boxes, labels, difficulties.
    """
    images, boxes, labels, difficulties = zip(*batch)
    images = torch.stack([image.permute(1, 2, 0) for image in images]).permute(0, 3, 1, 2)
    return images, list(boxes), list(labels), list(difficulties)


def collate_padded(batch):
    """Collate items for training, where objects marked difficult count as all others.

    Three tensors are quicker to send from a worker, and to copy to a GPU, than lists of many.

    Returns:
        images (N, 3, 300, 300), boxes (N, max O, 4), labels (N, max O); see `pad_objects()`.
    """
    images, boxes, labels, _ = collate_fn(batch)
    return images, *pad_objects(boxes, labels)


def make_train_loader(dataset, batches, workers, device):
    """Make the loader of a training run, whose batches are those of `collate_padded()`.

    Args:
        dataset: a PascalVOCDataset.
        batches: a ShuffledBatches.
        workers: number of processes that read and augment, 0 for none.
        device: that the batches will be copied to.
    """
    return Loader(
        SeededItems(dataset, batches.seed), batch_sampler=batches, collate_fn=collate_padded,
        num_workers=workers, pin_memory=device.type == 'cuda',
        worker_init_fn=ignore_signals_in_worker,
        # Only a forked worker shares the memory of the cache.
        multiprocessing_context='fork' if workers and dataset.cache else None)


def make_test_loader(dataset, batch_size, workers, device):
    """Make the loader of an evaluation, whose batches are those of `collate_fn()`.

    Of w ranks, rank r loads the images r, r + w, r + 2w, ... The workers stay for the next
    evaluation.
    """
    share = range(get_rank(), len(dataset), get_world_size())
    return Loader(dataset, batch_size, sampler=share, collate_fn=collate_fn,
                  num_workers=workers, persistent_workers=workers > 0,
                  pin_memory=device.type == 'cuda', worker_init_fn=ignore_signals_in_worker)
