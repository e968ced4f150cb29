"""The data set that training and evaluation read, the order it is read in, and its augmentation.

Zoom-out, crop, flip and warp are one window of the source image: four numbers in its pixels, which
may reach beyond its border. The dice choose a window (`sample_...`), then the source is read once:
no enlarged canvas is built, and colours are changed where the image is smallest.

Letters: N images in a batch, O objects in an image.
"""

import json
import math
import os
import pathlib
import platform
import random
from concurrent.futures import ThreadPoolExecutor

import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms.functional import pil_to_tensor
from tqdm import tqdm

from machine import (
    leave_signals_to_parent,
    n_processes,
    process_number,
    shared_folder,
    wait_for_processes,
)
from utils import FILLER, IMAGE_ERRORS, SIDE, UserError, find_jaccard_overlap, to_rgb

# Section 2.2 of the paper, "Data augmentation": the least overlap of a crop with an object. None is
# the whole image, 0 is any crop.
CROP_OPTIONS = (None, 0.1, 0.3, 0.5, 0.7, 0.9, 0.)
CROP_TRIES = 50


# --------------------------------------------------------------------------------------------------
# The data set
# --------------------------------------------------------------------------------------------------


class PascalVOCDataset(Dataset):
    """The images of one split of the lists that `create_data_lists.py` wrote.

    Item i is (image (3, 300, 300) uint8, boxes (O, 4) in fractions, labels (O,), difficulties
    (O,)). `label_map` is the lists' map of class names to numbers.

    Args:
        data_folder: the folder of the lists.
        split: 'TRAIN', augmented, or 'TEST'.
        keep_difficult: keep objects that are marked difficult, in either split.
        augment: whether TRAIN is augmented.

    Raises:
        UserError: lists that are not there or not lists, images that have moved; from an item, an
            image that cannot be decoded.
    """

    def __init__(self, data_folder, split, keep_difficult=False, augment=True):
        assert split in ('TRAIN', 'TEST'), f'split is {split!r}, not TRAIN or TEST'
        self.split = split
        self.keep_difficult = keep_difficult
        self.augment = augment
        self.images = read_list(data_folder, f'{split}_images')
        self.objects = read_list(data_folder, f'{split}_objects')
        self.label_map = read_list(data_folder, 'label_map')
        self.cache = None   # see `ImageCache`
        assert len(self.images) == len(self.objects), f'{len(self.images)}, {len(self.objects)}'
        missing = [path for path in self.images if not pathlib.Path(path).is_file()]
        if missing:
            raise UserError(f'{missing[0]} is not there, as {len(missing)} of {len(self.images)} '
                            f'images of {data_folder}; if they have moved, run '
                            f'create_data_lists.py again')

    def __len__(self):
        return len(self.images)

    def __getitem__(self, i):
        image = read_image(self.images[i]) if self.cache is None else self.cache[i]
        objects = self.objects[i]
        boxes = torch.tensor(objects['boxes'], dtype=torch.float32).view(-1, 4)
        labels = torch.tensor(objects['labels'], dtype=torch.int64)
        difficulties = torch.tensor(objects['difficulties'], dtype=torch.bool)
        if not self.keep_difficult:
            easy = ~difficulties
            boxes, labels, difficulties = boxes[easy], labels[easy], difficulties[easy]
        split = self.split if self.augment else 'TEST'
        return transform(image, boxes, labels, difficulties, split)


def read_image(path, read=to_rgb):
    """An image file in RGB, or what else `read` makes of it; a UserError if it is broken."""
    try:
        with Image.open(path) as file:
            return read(file)
    except IMAGE_ERRORS as error:
        raise UserError(f'{path}: cannot be decoded ({error}); replace it, or run '
                        f'create_data_lists.py with --skip-broken') from error


def read_size(path):
    """Width and height of an image file, from its header; a UserError if it is broken."""
    return read_image(path, lambda file: file.size)


def read_list(data_folder, name):
    """The content of one of the JSON files that `create_data_lists.py` wrote."""
    path = pathlib.Path(data_folder) / f'{name}.json'
    try:
        return json.loads(path.read_text(encoding='utf-8'))
    except OSError as error:
        raise UserError(f'{path} cannot be read ({error.strerror}); make the lists with '
                        f'create_data_lists.py, or give their folder with '
                        f'--data-folder') from error
    except ValueError as error:
        raise UserError(f'{path} is not a list ({error}); make the lists again with '
                        f'create_data_lists.py') from error


def collate_fn(batch):
    """A batch of items: images (N, 3, 300, 300), and lists of boxes, labels, difficulties.

    Images hold different numbers of objects, so those cannot be stacked. The images' channels are
    last in memory, as they were in the file, and as the convolutions like them best.
    """
    images, boxes, labels, difficulties = zip(*batch)
    images = torch.stack([image.permute(1, 2, 0) for image in images]).permute(0, 3, 1, 2)
    return images, list(boxes), list(labels), list(difficulties)


# --------------------------------------------------------------------------------------------------
# Decoded images in memory
# --------------------------------------------------------------------------------------------------


class ImageCache:
    """The decoded images of a list, in memory that all processes of this machine share.

    Decoding a JPEG is a quarter of an item's time. `cache[i]` is the i-th image, for a moment's
    use: its pixels are those in the memory.

    Args:
        paths: the image files. Their sizes are read, the memory is asked for, then all are decoded.

    Raises:
        UserError: too little memory; an image that cannot be decoded.
    """

    def __init__(self, paths):
        self.sizes = [read_size(path) for path in paths]
        ends = torch.tensor([3 * width * height for width, height in self.sizes]).cumsum(0).tolist()
        self.starts = [0, *ends]
        is_first = int(os.environ.get('LOCAL_RANK', 0)) == 0    # of this machine
        folder, free = shared_folder()
        n_bytes = self.starts[-1]
        if is_first:
            print(f'cache: {len(paths)} images, {n_bytes / 1e9:.2f} GB of the {free / 1e9:.2f} GB '
                  f'free in {folder}', flush=True)
            if n_bytes > 0.9 * free:
                raise UserError(f'the cache needs {n_bytes / 1e9:.2f} GB, which is too much for '
                                f'the {free / 1e9:.2f} GB free in {folder}; leave --cache out')
        self.memory = self.share(folder, n_bytes, is_first)
        if is_first:
            self.fill(paths)
        wait_for_processes()

    @staticmethod
    def share(folder, n_bytes, is_first):
        """Memory that the processes of this machine share, (n_bytes,) uint8.

        A file that all map and that is unlinked at once: it is gone with the last process, however
        that ends.
        """
        # The processes that one torchrun started have the same parent.
        owner = os.getppid() if n_processes() > 1 else os.getpid()
        path = folder / f'ssd300-cache-{platform.node()}-{owner}'
        try:
            if is_first:
                path.unlink(missing_ok=True)
                with open(path, 'xb') as file:
                    if hasattr(os, 'posix_fallocate'):  # an error now, not when memory is full
                        os.posix_fallocate(file.fileno(), 0, n_bytes)
                    file.truncate(n_bytes)
            wait_for_processes()
            memory = torch.from_file(str(path), shared=True, size=n_bytes, dtype=torch.uint8)
            wait_for_processes()
        finally:
            if is_first:
                path.unlink(missing_ok=True)
        return memory

    def fill(self, paths):
        """Decode all images."""
        def decode(i):
            """Decode the i-th image into its place."""
            place = self.memory[self.starts[i]:self.starts[i + 1]]
            place.copy_(pil_to_tensor(read_image(paths[i])).permute(1, 2, 0).flatten())

        pool = ThreadPoolExecutor(os.cpu_count())  # Pillow decodes without holding Python's lock
        try:
            done = pool.map(decode, range(len(paths)))
            for _ in tqdm(done, 'decoding', len(paths), unit='image'):
                pass
        finally:
            pool.shutdown(cancel_futures=True)

    def __getitem__(self, i):
        place = self.memory[self.starts[i]:self.starts[i + 1]]
        return Image.frombuffer('RGB', self.sizes[i], place.numpy(), 'raw', 'RGB', 0, 1)


# --------------------------------------------------------------------------------------------------
# The order of a training run
# --------------------------------------------------------------------------------------------------


class ShuffledBatches:
    """The endless order of a run's images, as batches of (position in the run, image).

    Each pass over the data is a permutation that depends on the seed and the pass alone, so a run
    that starts at iteration k sees what an unbroken run sees from there on. A batch may hold the
    end of one pass and the beginning of the next. Of several processes each has its own part of
    every batch.
    """

    def __init__(self, n_images, batch_size, seed, start, end):
        self.n_images, self.batch_size, self.seed = n_images, batch_size, seed
        self.start, self.end = start, end
        self.epoch, self.order = None, None     # the permutation that was needed last

    def __len__(self):
        return self.end - self.start

    def __iter__(self):
        size = self.batch_size // n_processes()
        mine = slice(process_number() * size, (process_number() + 1) * size)
        for iteration in range(self.start, self.end):
            yield self.batch(iteration)[mine]

    def batch(self, iteration):
        """The whole batch of an iteration, counted from 0."""
        batch = []
        for position in range(iteration * self.batch_size, (iteration + 1) * self.batch_size):
            epoch, place = divmod(position, self.n_images)
            if epoch != self.epoch:
                self.epoch, self.order = epoch, list(range(self.n_images))
                random.Random(f'{self.seed} {epoch}').shuffle(self.order)
            batch.append((position, self.order[place]))
        return batch


class SeededItems(Dataset):
    """Items whose augmentation depends on the seed and on their position in the run alone.

    So neither the number of workers nor a resume changes what the network sees, and no two
    workers draw the same dice. There is no other random state in a run, and none to save.
    """

    def __init__(self, dataset, seed):
        self.dataset, self.seed = dataset, seed

    def __getitem__(self, key):
        position, i = key
        random.seed(f'{self.seed} {position}')
        return self.dataset[i]


def pack(batch):
    """`collate_fn()` for the way from a worker to the training loop: few tensors, so few messages.

    Returns:
        images (N, 3, 300, 300), boxes (T, 4) and labels (T,) of all images, and the number of
        objects of each image, a list of N.
    """
    images, boxes, labels, _ = collate_fn(batch)
    return images, torch.cat(boxes), torch.cat(labels), [len(some) for some in labels]


def make_train_loader(dataset, batches, workers, device):
    """The batches of `ShuffledBatches`, packed. Workers live as long as the run."""
    return DataLoader(
        SeededItems(dataset, batches.seed), batch_sampler=batches, collate_fn=pack,
        num_workers=workers, pin_memory=device.type == 'cuda',
        worker_init_fn=leave_signals_to_parent,
        # A forked worker has the cache's memory, any other would get a copy.
        multiprocessing_context='fork' if workers and dataset.cache else None)


def batches_on(device, loader):
    """The batches of a loader on a device: images, and for each image boxes and labels."""
    for images, boxes, labels, counts in loader:
        images, boxes, labels = (t.to(device, non_blocking=True) for t in (images, boxes, labels))
        yield images, boxes.split(counts), labels.split(counts)


def make_test_loader(dataset, batch_size, workers, device):
    """The images of a data set in their order; of several processes each has its share."""
    share = range(process_number(), len(dataset), n_processes())
    return DataLoader(dataset, batch_size, sampler=share, collate_fn=collate_fn,
                      num_workers=workers, pin_memory=device.type == 'cuda',
                      worker_init_fn=leave_signals_to_parent)


# --------------------------------------------------------------------------------------------------
# The augmentation
# --------------------------------------------------------------------------------------------------


def objects_in(windows, boxes):
    """Which objects a window keeps: their centre is inside, and enough of them to be seen.

    Enough is a pixel of the 300 in both directions, after clipping.

    Args:
        windows, boxes: (n, 4) and (O, 4), corners, the same unit.

    Returns:
        (n, O) bool.
    """
    low, high = windows[:, None, :2], windows[:, None, 2:]              # (n, 1, 2)
    centres = (boxes[:, :2] + boxes[:, 2:]) / 2                         # (O, 2)
    sides = torch.minimum(boxes[:, 2:], high) - torch.maximum(boxes[:, :2], low)    # (n, O, 2)
    inside = (centres > low) & (centres < high) & (sides * SIDE >= high - low)
    return inside.all(dim=2)


def sample_zoom_out(width, height):
    """A window 1 to 4 times as large as the image, the image anywhere in it."""
    zoom = random.uniform(1, 4)
    left, top = (random.uniform(0, (zoom - 1) * side) for side in (width, height))
    return (-left, -top, zoom * width - left, zoom * height - top)


def sample_crop(window, boxes):
    """A random part of a window, such that objects stay in it (section 2.2 of the paper).

    An option out of `CROP_OPTIONS` has 50 tries: sides of 0.3 to 1 of the window's, an aspect
    ratio of 0.5 to 2 in pixels, and an object that stays whose overlap with the crop reaches the
    option's minimum. If none fits, another option is drawn.

    Args:
        window: (x_min, y_min, x_max, y_max) in pixels of the source.
        boxes: (O, 4), the same unit.
    """
    x_min, y_min, x_max, y_max = window
    while len(boxes):
        min_overlap = random.choice(CROP_OPTIONS)
        if min_overlap is None:
            break
        # All tries at once; the first that fits is the one that trying in turn would find.
        crops = []
        for _ in range(CROP_TRIES):
            width = random.uniform(0.3, 1) * (x_max - x_min)
            height = random.uniform(0.3, 1) * (y_max - y_min)
            left, top = random.uniform(x_min, x_max - width), random.uniform(y_min, y_max - height)
            if 0.5 <= width / height <= 2:
                crops.append((left, top, left + width, top + height))
        tries = torch.tensor(crops).view(-1, 4)
        fits = objects_in(tries, boxes) & (find_jaccard_overlap(tries, boxes) >= min_overlap)
        fits = fits.any(dim=1).tolist()
        if True in fits:
            return crops[fits.index(True)]
    return window


def crop(boxes, labels, difficulties, window):
    """The objects that a window keeps, clipped to it, in fractions of it.

    Args:
        boxes, labels, difficulties: (O, 4) in pixels, (O,), (O,).
        window: (x_min, y_min, x_max, y_max) in pixels.
    """
    window = boxes.new_tensor(window)
    keep = objects_in(window.unsqueeze(0), boxes).squeeze(0)
    origin, size = window[:2].repeat(2), (window[2:] - window[:2]).repeat(2)
    return ((boxes[keep] - origin) / size).clamp(0, 1), labels[keep], difficulties[keep]


def flip(boxes):
    """Boxes (O, 4) in fractions of an image, after the image was mirrored left to right."""
    return torch.stack([1 - boxes[:, 2], boxes[:, 1], 1 - boxes[:, 0], boxes[:, 3]], dim=1)


def sample_colors():
    """The arguments of `distort()`, each change with probability 0.5."""
    return {
        'brightness': random.choice((0., random.uniform(-32, 32))),
        'contrast': random.choice((1., random.uniform(0.5, 1.5))),
        'saturation': random.choice((1., random.uniform(0.5, 1.5))),
        'hue': random.choice((0., random.uniform(-18, 18))),
        'contrast_first': random.choice((True, False)),
    }


def distort(image, brightness, contrast, saturation, hue, contrast_first):
    """Change the colours of an RGB image; returns a new one.

    Args:
        brightness: added, in 255ths.
        contrast: factor of the levels.
        saturation: factor.
        hue: degrees.
        contrast_first: contrast before saturation and hue, not after.
    """
    def levels(change):
        """A table of 256 levels, for `Image.point`."""
        return [min(max(round(change(level)), 0), 255) for level in range(256)]

    first = contrast if contrast_first else 1.
    if brightness != 0 or first != 1:
        image = image.point(levels(lambda level: min(max(level + brightness, 0), 255) * first) * 3)
    if saturation != 1 or hue != 0:
        turned = [round(level + hue * 255 / 360) % 255 for level in range(256)]  # 255 is 0 again
        table = turned + levels(lambda level: level * saturation) + list(range(256))
        image = image.convert('HSV').point(table).convert('RGB')
    if contrast != 1 and not contrast_first:
        image = image.point(levels(lambda level: level * contrast) * 3)
    return image


def cut_out(image, window, change=None):
    """Warp a window of an image to 300 x 300, with the filler where it reaches past the border.

    Args:
        image: PIL image, RGB.
        window: (x_min, y_min, x_max, y_max) in its pixels.
        change: a function of the part that is image, at its final size.
    """
    # The pixels of the result that the image covers wholly, and what they are in the source.
    spans = []
    for low, high, side in zip(window[:2], window[2:], image.size):
        step = (high - low) / SIDE
        # Rounding must not cost a pixel: 21 / (21 / 300) is a little less than 300.
        first = max(0, math.ceil(-low / step - 1e-6))
        last = min(SIDE, math.floor((side - low) / step + 1e-6))
        spans.append((first, last, max(0., low + first * step), min(side, low + last * step)))
    (left, right, x_min, x_max), (top, bottom, y_min, y_max) = spans
    result = Image.new('RGB', (SIDE, SIDE), FILLER)
    if left >= right or top >= bottom:
        return result
    part = image.resize((right - left, bottom - top), Image.Resampling.BILINEAR,
                        box=(x_min, y_min, x_max, y_max))
    part = change(part) if change else part
    if part.size == result.size:
        return part
    result.paste(part, (left, top))
    return result


def transform(image, boxes, labels, difficulties, split):
    """From an image and its objects to what the network sees, augmented in training.

    TRAIN: colours, zoom-out, crop, flip and warp, by the dice of Python's `random`. TEST: the
    warp alone, and nothing is dropped.

    Args:
        image: PIL image, RGB.
        boxes, labels, difficulties: (O, 4) in pixels, (O,) int64, (O,) bool.
        split: 'TRAIN' or 'TEST'.

    Returns:
        image (3, 300, 300) uint8, boxes in fractions, labels, difficulties.
    """
    assert split in ('TRAIN', 'TEST'), f'split is {split!r}, not TRAIN or TEST'
    window = (0, 0, *image.size)
    if split == 'TEST':
        return (pil_to_tensor(cut_out(image, window)),
                boxes / boxes.new_tensor([*image.size, *image.size]), labels, difficulties)

    colors = sample_colors()
    if random.random() < 0.5:
        larger = sample_zoom_out(*image.size)
        if len(boxes) == 0 or objects_in(boxes.new_tensor([larger]), boxes).any():
            window = larger
    window = sample_crop(window, boxes)
    boxes, labels, difficulties = crop(boxes, labels, difficulties, window)
    image = cut_out(image, window, lambda part: distort(part, **colors))
    if random.random() < 0.5:
        image, boxes = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT), flip(boxes)
    return pil_to_tensor(image), boxes, labels, difficulties
