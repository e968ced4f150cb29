"""Measure the parts of this project beside their counterparts in torchvision.

    python benchmark.py --only data loss detect

The two sides take turns (A B A B ...) in one process and on the same input, so that whatever else
the machine does hits both. The columns are medians; a ratio is the median of the ratios of
neighbouring measurements, and above 1 this project is faster (or takes less memory).

Letters: N images in a batch, P = 8732 priors, C classes with background 0, O objects in an image.
"""

import contextlib
import ctypes
import dataclasses
import datetime
import functools
import gc
import json
import multiprocessing
import os
import pathlib
import platform
import random
import subprocess
import tempfile
import threading
import time
from concurrent.futures import ProcessPoolExecutor
from statistics import median
from typing import Literal

import av
import torch
import torchvision
import tyro
from PIL import Image, ImageChops
from torch.utils.data import DataLoader, Dataset
from torchvision import tv_tensors
from torchvision.transforms import v2

from benchmark_sides import (
    N_CLASSES,
    SIDES,
    OurSide,
    load_objects,
    realistic_outputs,
    some_objects,
    untrained_outputs,
)
from datasets import (
    FILLER,
    PascalVOCDataset,
    SeededItems,
    ShuffledBatches,
    batches_on,
    make_train_loader,
)
from detect import annotate_images, annotate_video, choose_batch_size, draw_objects, predict
from eval import MIN_SCORE, TOP_K
from machine import (
    choose_device,
    choose_precision,
    default_workers,
    peak_memory,
    prepare_gpu,
    process_memory,
)
from model import SSD300
from shapes import draw_image, write_annotation
from train import find_gradients, make_optimizer, make_scaler, step_if_finite
from utils import (
    SIDE,
    UserError,
    calculate_mAP,
    distinct_colors,
    exit_on_user_error,
    label_map as voc_label_map,
    make_folder,
    write_beside,
    write_data_lists,
)


@dataclasses.dataclass
class Parameters:
    """Measure the parts of this project beside torchvision's."""

    # --- input ---

    # A folder in VOC layout, whose trainval images the data path reads; none: drawn shapes, as
    # large as VOC's images but flatter, so quicker to decode.
    images: str | None = None
    # A text file, a line an image: name, then xmin ymin xmax ymax class (from 0) for each object,
    # in pixels counted from 1, both ends included. Objects are drawn from it; none: made up.
    boxes: str | None = None

    # --- what is measured ---

    # Names of the rows; none: all. The last five take minutes on a CPU.
    only: tuple[Literal['data', 'handover', 'loss', 'detect', 'untrained', 'mAP', 'step',
                        'inference', 'memory', 'training', 'files'], ...] = ()
    # Measurements of each side for a training step, after one to warm up; quicker rows take up to
    # ten times as many. More if the ratios waver from run to run.
    repeats: int = 3
    # Batch sizes of the training step; none: 8 32 on a CPU, 8 32 128 on a GPU.
    batches: tuple[int, ...] = ()
    # Iterations of a real training run from JPEG files; 0: 5 on a CPU, 1000 on a GPU.
    iterations: int = 0
    # torch.compile of this project's side in step and training, as train.py has it.
    compile: Literal['auto', 'on', 'off'] = 'auto'
    # cpu, cuda, cuda:1, ...; auto is the GPU where there is one. The data path and the mAP are the
    # CPU's in any case.
    device: str = 'auto'

    # --- result ---

    # A JSON file for the table; none: it is only printed.
    output: str | None = None


# Floating point operations of one image, a multiplication and an addition counted as two.
FORWARD_FLOP, STEP_FLOP = 62.75e9, 187.9e9



# --------------------------------------------------------------------------------------------------
# Measuring
# --------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Row:
    """A line of the table."""

    what: str
    unit: str
    ours: float
    torchvision: float | None = None
    ratio: float | None = None      # how many times as good as torchvision
    note: str = ''


# From the seconds that n images took to the number that is shown.
UNITS = {'images/s': lambda t, n: n / t, 'ms/image': lambda t, n: 1000 * t / n,
         'ms': lambda t, n: 1000 * t, 's': lambda t, n: t}


def measure_in_turn(functions, repeats, device=None):
    """The seconds that each function takes: for each a list of `repeats` numbers.

    All are called once to warm up, then in turn. Without a device they work on the CPU.
    """
    times = [[] for _ in functions]
    for repeat in range(repeats + 1):
        for function, seconds in zip(functions, times):
            synchronize(device)
            start = time.perf_counter()
            function()
            synchronize(device)
            if repeat > 0:
                seconds.append(time.perf_counter() - start)
    return times


def synchronize(device):
    """Wait for a GPU, which works on after a call has returned."""
    if device is not None and device.type == 'cuda':
        torch.cuda.synchronize(device)


def ratio_of(slower, faster):
    """The median of how many times as long the neighbouring measurement took."""
    return median(a / b for a, b in zip(slower, faster))


def row_of_times(what, unit, n, ours, torchvisions=None, note=''):
    """A row from the seconds that both sides took for n images."""
    columns = [UNITS[unit](median(times), n) for times in (ours, torchvisions) if times]
    return Row(what, unit, *columns, ratio=torchvisions and ratio_of(torchvisions, ours), note=note)


def extra_memory(device, prepare, *arguments):
    """The MB that the function `prepare(*arguments)` takes at its peak, above what is in use."""
    if device is None or device.type == 'cpu':
        # In a process of its own, where nothing that ran before has left memory to be used again.
        spawn = multiprocessing.get_context('spawn')
        with ProcessPoolExecutor(1, mp_context=spawn) as pool:
            return pool.submit(extra_memory_here, prepare, arguments).result()
    function = prepare(*arguments)
    synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    start = torch.cuda.memory_allocated(device)
    function()
    return (torch.cuda.max_memory_allocated(device) - start) / 1e6


def extra_memory_here(prepare, arguments):
    """`extra_memory()` of this process, on the CPU; it should have done nothing before."""
    function = prepare(*arguments)
    gc.collect()
    # What the preparation left is given back and its peak forgotten, where that can be done.
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
        pathlib.Path('/proc/self/clear_refs').write_text('5')
    start, _ = process_memory()
    function()
    return (process_memory()[1] - start) / 1e6


def row_of_memory(what, device, prepare, *arguments):
    """A row of the memory that a function takes at its peak, for either side."""
    ours, theirs = (extra_memory(device, prepare, make, *arguments) for make in SIDES)
    return Row(f'{what}: memory', 'MB', ours, theirs, theirs / ours)


def formats_of(device):
    """The number formats that training may use on a device, by name: (dtype, memory format)."""
    formats = {'float32': (torch.float32, torch.contiguous_format)}
    if choose_precision('auto', device) == torch.bfloat16:
        formats['bf16'] = (torch.bfloat16, torch.channels_last)
    return formats


def make_images(n_images, device, memory_format):
    """Images of noise, as the network takes them."""
    torch.manual_seed(0)
    images = torch.randn(n_images, 3, SIDE, SIDE, device=device)
    return images.contiguous(memory_format=memory_format)


def train_step(side, optimizer, dtype, images, targets):
    """One training step as `train.py` does it."""
    with torch.autocast(images.device.type, dtype, enabled=dtype != torch.float32):
        locs, scores = side.forward(images)
    loss = side.loss(locs.float(), scores.float(), targets)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


def prepare_step(make_side, boxes_path, batch_size, device, dtype, memory_format, compile_='off'):
    """A function that does a training step.

    The first one, of one image, is done here: gradients and momenta are there afterwards.
    """
    side, first = make_side(device), 1
    side.model.train().to(memory_format=memory_format)
    if make_side is OurSide and dtype != torch.float32:
        side.compile(compile_, device, dtype, batch_size)
        if side.network is not side.model:
            first = batch_size  # what is compiled is so for one size
    optimizer = make_optimizer(side.model, 'sgd', weight_decay=5e-4)
    for group in optimizer.param_groups:
        group['lr'] = 1e-6  # the numbers stay finite, however many steps there are
    images = make_images(batch_size, device, memory_format)
    boxes, labels = some_objects(boxes_path, batch_size, device)
    train_step(side, optimizer, dtype, images[:first], side.targets(boxes[:first], labels[:first]))
    return functools.partial(train_step, side, optimizer, dtype, images,
                             side.targets(boxes, labels))


# --------------------------------------------------------------------------------------------------
# The rows
# --------------------------------------------------------------------------------------------------


def draw_folder(folder, n_images):
    """A folder in VOC layout of drawn shapes, the images as large as VOC's."""
    images, annotations, splits = (
        make_folder(folder / part) for part in ('JPEGImages', 'Annotations', 'ImageSets/Main'))
    for number in range(n_images):
        image, objects = draw_image(random.Random(number))
        factor = 500 / 320
        image = image.resize([round(side * factor) for side in image.size])
        objects = [(name, [side * factor for side in box], *marks) for name, box, *marks in objects]
        image.save(images / f'{number}.jpg', quality=95)
        write_annotation(annotations / f'{number}.xml', f'{number}.jpg', image.size, objects)
    (splits / 'trainval.txt').write_text('\n'.join(map(str, range(n_images))) + '\n')
    return folder


def torchvision_item(path, objects, pipeline):
    """An image file and its objects through torchvision's transforms."""
    with Image.open(path) as file:
        image = file.convert('RGB')
    boxes = tv_tensors.BoundingBoxes(objects['boxes'], dtype=torch.float32, format='XYXY',
                                     canvas_size=image.size[::-1])
    return pipeline(image, {'boxes': boxes, 'labels': torch.tensor(objects['labels'])})


@contextlib.contextmanager
def training_set(images_folder, n_drawn):
    """Within the block a PascalVOCDataset of a folder's trainval images, or of drawn ones."""
    with tempfile.TemporaryDirectory() as folder:
        source = images_folder or draw_folder(pathlib.Path(folder) / 'drawn', n_drawn)
        with open(os.devnull, 'w') as nowhere, contextlib.redirect_stdout(nowhere), \
                contextlib.redirect_stderr(nowhere):
            write_data_lists([(source, 'trainval')], [], folder)
        dataset = PascalVOCDataset(folder, 'TRAIN', keep_difficult=True)
        if len(dataset) == 0:
            raise UserError(f'{source} has no trainval images with objects; give another --images')
        yield dataset


def measure_data(images_folder, repeats, n_images=100):
    """From an image file to an augmented tensor (3, 300, 300), and decoding alone."""
    pipeline = v2.Compose([
        v2.RandomPhotometricDistort(), v2.RandomZoomOut(fill=list(FILLER), side_range=(1, 4)),
        v2.RandomIoUCrop(), v2.RandomHorizontalFlip(), v2.SanitizeBoundingBoxes(),
        v2.Resize((SIDE, SIDE)), v2.PILToTensor()])
    with training_set(images_folder, n_images) as dataset:
        chosen = range(0, len(dataset), max(1, len(dataset) // n_images))
        random.seed(0)
        torch.manual_seed(0)
        ours, theirs, decoding = measure_in_turn([
            lambda: [dataset[i] for i in chosen],
            lambda: [torchvision_item(dataset.images[i], dataset.objects[i], pipeline)
                     for i in chosen],
            lambda: [Image.open(dataset.images[i]).convert('RGB') for i in chosen],
        ], 3 * repeats)
    return [row_of_times('data: file to augmented tensor', 'images/s', len(chosen), ours, theirs,
                         'one core'),
            row_of_times('data: decoding alone', 'images/s', len(chosen), decoding)]


class ReadyItems(Dataset):
    """Items that cost nothing to make, so that the way to the training loop is all that is left."""

    cache = None

    def __init__(self, boxes_path):
        images = torch.randint(0, 256, (8, SIDE, SIDE, 3), dtype=torch.uint8).permute(0, 3, 1, 2)
        boxes, labels = some_objects(boxes_path, 8, 'cpu')
        self.items = list(zip(images, boxes, labels, [labels[0]] * 8))

    def __len__(self):
        return len(self.items)

    def __getitem__(self, i):
        return [tensor.clone() for tensor in self.items[i]]  # as new as a decoded image


def keep_apart(batch):
    """The usual collate function of detection: every image's tensors for themselves."""
    return tuple(zip(*batch))


def seconds_of_batches(batches, n_batches, use):
    """The processor's seconds that n batches take of the loop, after three to start the workers.

    Not the time on the clock: how long the loop waits is a question of how many workers there are.
    """
    batches = iter(batches)
    for _ in range(3):
        use(next(batches)[0])
    start = time.thread_time()
    for _ in range(n_batches):
        use(next(batches)[0])
    return time.thread_time() - start


def measure_handover(boxes_path, device, repeats, batch_size=32, n_batches=40):
    """From a worker's items to a batch in the training loop, looked at once.

    Beside it the collate function of torchvision's reference scripts, the images stacked here.
    """
    items = ReadyItems(boxes_path)
    order = ShuffledBatches(len(items), batch_size, seed=0, start=0, end=n_batches + 8)
    plain = DataLoader(SeededItems(items, 0), batch_sampler=order, collate_fn=keep_apart,
                       num_workers=2, pin_memory=device.type == 'cuda')
    ours, theirs = [], []
    for _ in range(repeats):
        loader = make_train_loader(items, order, 2, device)
        ours.append(seconds_of_batches(batches_on(device, loader), n_batches, torch.clone))
        theirs.append(seconds_of_batches(
            plain, n_batches, lambda images: torch.stack(images).to(device)))
    return [row_of_times(f'hand-over to the loop, batch {batch_size}', 'ms/image',
                         n_batches * batch_size, ours, theirs, "the loop's own time")]


def measure_training(images_folder, device, batch_size, n_iterations, compile_, peak_rate):
    """A training run from image files, as `train.py` makes it: the speed after a tenth of it."""
    if device.type == 'cuda':
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    dtype = choose_precision('auto', device)
    side = OurSide(device)
    side.model.to(memory_format=torch.channels_last)
    optimizer, scaler = make_optimizer(side.model, 'sgd', 5e-4), make_scaler(dtype, device)
    for group in optimizer.param_groups:
        group['lr'] = 1e-6
    side.compile(compile_, device, dtype, batch_size)
    n_workers = default_workers()
    with training_set(images_folder, n_drawn=200) as dataset:
        order = ShuffledBatches(len(dataset), batch_size, seed=0, start=0, end=n_iterations)
        loader = make_train_loader(dataset, order, n_workers, device)
        for iteration, batch in enumerate(batches_on(device, loader)):
            if iteration == max(1, n_iterations // 10):
                synchronize(device)
                start, first = time.perf_counter(), iteration
            optimizer.zero_grad()
            find_gradients(side.network, side.criterion, scaler, dtype, 1, *batch)
            step_if_finite(optimizer, scaler, dtype)
        synchronize(device)
        seconds = time.perf_counter() - start
    n_images = batch_size * (n_iterations - first)
    note = (f'{n_workers} workers; 120,000 iterations: '
            f'{120_000 * seconds / (n_iterations - first) / 3600:.3g} h')
    if peak_rate:
        note += (f'; {n_images * STEP_FLOP / seconds / peak_rate:.0%} of peak, '
                 f'{peak_memory(device) / 1e9:.1f} GB')
    return [Row(f'training from files, batch {batch_size}', 'images/s', n_images / seconds,
                note=note)]


def measure_loss(boxes_path, device, repeats, batch_size=32):
    """The loss of a batch, forward and backward, matching included."""
    ours, theirs = (make(device) for make in SIDES)
    boxes, labels = some_objects(boxes_path, batch_size, device)
    outputs = [output.requires_grad_() for output in untrained_outputs(batch_size, device)]
    our_targets, their_targets = (side.targets(boxes, labels) for side in (ours, theirs))
    times = measure_in_turn(
        [lambda: torch.autograd.grad(ours.loss(*outputs, our_targets), outputs),
         lambda: torch.autograd.grad(theirs.loss(*outputs, their_targets), outputs)],
        10 * repeats, device)
    return [row_of_times(f'loss, batch {batch_size}', 'ms/image', batch_size, *times,
                         f'{sum(map(len, boxes)) / batch_size:.1f} objects an image')]


def measure_detect(boxes_path, device, repeats, batch_size=32):
    """Detection from the outputs of a trained network."""
    ours, theirs = (make(device) for make in SIDES)
    outputs = realistic_outputs(ours.model.priors_cxcy, *some_objects(boxes_path, batch_size,
                                                                      device))
    n_candidates = (outputs[1].softmax(dim=2)[:, :, 1:] > MIN_SCORE).sum().item() / batch_size
    times = measure_in_turn([lambda: ours.detect(*outputs), lambda: theirs.detect(*outputs)],
                            10 * repeats, device)
    n_found = sum(map(len, ours.detect(*outputs)[0])) / batch_size
    return [row_of_times(f'detect, realistic, batch {batch_size}', 'ms/image', batch_size, *times,
                         f'{n_candidates:.0f} candidates an image, {n_found:.0f} detections')]


def prepare_untrained(make_side, batch_size, device):
    """A function that detects in the outputs of an untrained network."""
    torch.set_num_threads(1)
    side = make_side(device)
    outputs = untrained_outputs(batch_size, device)
    side.detect(*(output[:1] for output in outputs))
    return lambda: side.detect(*outputs)


def measure_untrained(device, repeats, batch_size=8):
    """Detection from the outputs of an untrained network, the worst case, and its memory."""
    sides = [prepare_untrained(make, batch_size, device) for make in SIDES]
    times = measure_in_turn(sides, repeats, device)
    what = f'detect, untrained, batch {batch_size}'
    return [row_of_times(what, 'ms/image', batch_size, *times),
            row_of_memory(what, device, prepare_untrained, batch_size, device)]


def prepare_mAP(boxes_path):
    """A function that calculates the mAP of 200 detections an image, on as many as in VOC07 test.

    A fifth of the detections are copies of objects, not quite in place, the others are anywhere.
    """
    torch.set_num_threads(1)
    objects = load_objects(boxes_path)
    dice = torch.Generator().manual_seed(0)
    counts = torch.tensor([len(boxes) for boxes, _ in objects])
    true_boxes = torch.cat([boxes for boxes, _ in objects])
    true_labels = torch.cat([labels for _, labels in objects])
    difficult = torch.rand(len(true_boxes), generator=dice) < 0.15

    image = torch.arange(len(objects)).repeat_interleave(TOP_K)                     # (D,)
    place = (torch.rand(len(image), generator=dice) * counts[image]).long()
    object_ = (counts.cumsum(0) - counts)[image] + place
    copied = torch.rand(len(image), generator=dice) < 0.2
    copies = true_boxes[object_]
    sides = (copies[:, 2:] - copies[:, :2]).repeat(1, 2)
    copies = copies + 0.1 * sides * torch.randn(copies.shape, generator=dice)
    anywhere = torch.rand(len(image), 2, 2, generator=dice).sort(dim=1).values.flatten(1)
    boxes = torch.where(copied.unsqueeze(1), copies, anywhere)
    labels = torch.randint(1, N_CLASSES, (len(image),), generator=dice)
    labels = torch.where(copied, true_labels[object_], labels)
    scores = torch.rand(len(image), generator=dice) * torch.where(copied, 1., 0.5)

    detections = [list(tensor.split(TOP_K)) for tensor in (boxes, labels, scores)]
    truth = [list(t.split(counts.tolist())) for t in (true_boxes, true_labels, difficult)]
    return lambda: calculate_mAP(*detections, *truth, voc_label_map)


def measure_mAP(boxes_path, repeats):
    """The mAP of a whole test set, and its memory. torchvision has none."""
    function = prepare_mAP(boxes_path)
    _, mAP = function()
    times, = measure_in_turn([function], repeats)
    n_images = len(load_objects(boxes_path))
    return [row_of_times(f'mAP, {n_images:,} images, {n_images * TOP_K:,} detections', 's',
                         n_images, times, note=f'mAP {mAP:.3f}'),
            Row('mAP: memory', 'MB', extra_memory(None, prepare_mAP, boxes_path))]


def measure_step(boxes_path, batch_size, device, repeats, compile_, peak_rate):
    """A training step: forward, loss, backward, update; one row for each number format."""
    formats = formats_of(device)
    times = measure_in_turn([prepare_step(make, boxes_path, batch_size, device, *format_, compile_)
                             for format_ in formats.values() for make in SIDES], repeats, device)
    rows = []
    for name, ours, theirs in zip(formats, times[::2], times[1::2]):
        note = f'{median(ours) / batch_size:.3g} s/image'
        if name != 'float32':
            note += f', {ratio_of(times[0], ours):.2f} x float32'
        if peak_rate and name == 'bf16':
            note += f', {batch_size * STEP_FLOP / median(ours) / peak_rate:.0%} of peak'
        rows.append(row_of_times(f'step, batch {batch_size}, {name}', 'images/s', batch_size, ours,
                                 theirs, note))
    return rows


def infer(side, dtype, images, outputs):
    """The network forward, then detection in the given outputs (None: no detection).

    Random weights find nothing real, so detection gets what a trained network would give.
    """
    with torch.autocast(images.device.type, dtype, enabled=dtype != torch.float32):
        side.forward(images)
    if outputs is not None:
        side.detect(*outputs)


@torch.no_grad()
def measure_inference(boxes_path, batch_size, device, repeats, peak_rate):
    """The network forward, without and with detection; two rows for each number format."""
    rows = []
    sides = [make(device) for make in SIDES]
    outputs = realistic_outputs(sides[0].model.priors_cxcy,
                                *some_objects(boxes_path, batch_size, device))
    for name, (dtype, memory_format) in formats_of(device).items():
        images = make_images(batch_size, device, memory_format)
        for side in sides:
            side.model.eval().to(memory_format=memory_format)
        ours, theirs, *with_detection = measure_in_turn(
            [functools.partial(infer, side, dtype, images, detected)
             for detected in (None, outputs) for side in sides], 3 * repeats, device)
        what = f'inference, batch {batch_size}, {name}'
        unit = 'ms' if batch_size == 1 else 'images/s'
        note = ''
        if peak_rate and name == 'bf16':
            note = f'{batch_size * FORWARD_FLOP / median(ours) / peak_rate:.0%} of peak'
        rows += [row_of_times(what, unit, batch_size, ours, theirs, note),
                 row_of_times(f'{what}, detection', unit, batch_size, *with_detection)]
    return rows


def measure_memory(boxes_path, device, batch_size=32):
    """The peak memory of a training step above its start; one row for each number format."""
    return [row_of_memory(f'step, batch {batch_size}, {name}', device, prepare_step, boxes_path,
                          batch_size, device, *format_)
            for name, format_ in formats_of(device).items()]


def write_video(path, images, n_frames):
    """A video of 30 frames a second and 1280 x 720 pixels that shows images in turn."""
    frames = [Image.open(image).convert('RGB').resize((1280, 720)) for image in images]
    with av.open(str(path), 'w') as container:
        stream = container.add_stream('libx264', rate=30)
        stream.width, stream.height, stream.pix_fmt = 1280, 720, 'yuv420p'
        for number in range(n_frames):  # it moves, as a real one does
            picture = ImageChops.offset(frames[number // 15 % len(frames)], 4 * number, number)
            container.mux(stream.encode(av.VideoFrame.from_image(picture)))
        container.mux(stream.encode())


def measure_files(images_folder, device, repeats, n_images=64, n_frames=60):
    """`detect.py` as it is run: from files to annotated files. torchvision has no such script.

    Random weights find nothing real, so up to five of whatever scores best are drawn.
    """
    torch.manual_seed(0)
    model = SSD300(N_CLASSES).eval().to(device, memory_format=torch.channels_last)
    model.label_map = voc_label_map
    find = functools.partial(predict, min_score=0.06, top_k=5, model=model)
    draw = functools.partial(draw_objects, colors=distinct_colors(voc_label_map), suppress=())
    with tempfile.TemporaryDirectory() as folder, open(os.devnull, 'w') as nowhere:
        folder = pathlib.Path(folder)
        source = pathlib.Path(images_folder or draw_folder(folder / 'drawn', n_images))
        paths = sorted((source / 'JPEGImages').glob('*.jpg'))[:n_images]
        outputs = [folder / f'{i}.jpg' for i in range(len(paths))]
        video, stopped = folder / 'video.mp4', threading.Event()
        write_video(video, paths[:8], n_frames)
        rest = find, draw, lambda *args, **more: None, choose_batch_size(model), stopped
        one = Image.open(paths[0]).convert('RGB')
        with contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
            images, = measure_in_turn([lambda: annotate_images(paths, outputs, *rest)], repeats)
            videos, = measure_in_turn(
                [lambda: annotate_video(str(video), folder / 'out.mp4', *rest)], repeats)
        alone, = measure_in_turn([lambda: find([one])], 10 * repeats)
    return [row_of_times('files: JPEG to annotated JPEG', 'images/s', len(paths), images),
            row_of_times('files: predict, one image', 'ms', 1, alone),
            row_of_times('files: video 1280 x 720', 'images/s', n_frames, videos,
                         note='frames, decoded, annotated, encoded')]


# --------------------------------------------------------------------------------------------------
# The table
# --------------------------------------------------------------------------------------------------


def describe_machine(device):
    """What the numbers depend on, as {name: text}."""
    processor = platform.processor() or platform.machine()
    with contextlib.suppress(OSError, StopIteration):
        lines = pathlib.Path('/proc/cpuinfo').read_text().splitlines()
        processor = next(line.split(': ')[1] for line in lines if line.startswith('model name'))
    machine = {'processor': f'{processor}, {torch.get_num_threads()} threads'}
    if device.type == 'cuda':
        machine['GPU'] = torch.cuda.get_device_name(device)
    machine |= {'torch': torch.__version__, 'torchvision': torchvision.__version__,
                'date': datetime.date.today().isoformat()}
    with contextlib.suppress(OSError, subprocess.CalledProcessError):
        machine['commit'] = subprocess.run(
            ['git', 'rev-parse', '--short', 'HEAD'], cwd=pathlib.Path(__file__).parent, text=True,
            capture_output=True, check=True).stdout.strip()
    return machine


def measure_peak_rate(device, side=8192):
    """The floating point operations a second of a large bf16 matrix product; None on a CPU."""
    if device.type != 'cuda':
        return None
    matrix = torch.randn(side, side, device=device, dtype=torch.bfloat16)
    times, = measure_in_turn([lambda: [matrix @ matrix for _ in range(10)]], 10, device)
    return 10 * 2 * side ** 3 / median(times)


def format_number(value):
    """Three digits that count, or a dash."""
    return '-' if value is None else f'{value:,.0f}' if value >= 100 else f'{value:.3g}'


def print_line(*cells):
    """One line of the table; it appears at once, since the next may take minutes."""
    print('{:<46} {:<9} {:>8} {:>12} {:>6}  {}'.format(*cells).rstrip(), flush=True)


@exit_on_user_error
def main(parameters):
    """Measure the rows that the parameters name, and print them."""
    p = parameters
    if p.repeats < 1 or any(size < 1 for size in p.batches):
        raise UserError(f'repeats is {p.repeats}, batches {p.batches}; give 1 or more')
    if p.output is not None:
        make_folder(pathlib.Path(p.output).parent)
    device = choose_device(p.device)
    prepare_gpu()
    load_objects(p.boxes)  # a slip in it shows now
    machine = describe_machine(device)
    print('; '.join(f'{name} {text}' for name, text in machine.items()))
    peak_rate = measure_peak_rate(device)
    if peak_rate:
        print(f'peak: {peak_rate / 1e12:.0f} TFLOP/s in a bf16 matrix product')

    gpu = device.type == 'cuda'
    batches = p.batches or ((8, 32, 128) if gpu else (8, 32))
    jobs = [
        ('data', measure_data, p.images, p.repeats),
        ('handover', measure_handover, p.boxes, device, p.repeats),
        ('loss', measure_loss, p.boxes, device, p.repeats),
        ('detect', measure_detect, p.boxes, device, p.repeats),
        ('untrained', measure_untrained, device, p.repeats),
        ('mAP', measure_mAP, p.boxes, p.repeats),
        *(('step', measure_step, p.boxes, n, device, p.repeats, p.compile, peak_rate)
          for n in batches),
        *(('inference', measure_inference, p.boxes, n, device, p.repeats, peak_rate)
          for n in (1, 32 if gpu else 8)),
        ('memory', measure_memory, p.boxes, device),
        ('training', measure_training, p.images, device, 32 if gpu else 8,
         p.iterations or (1000 if gpu else 5), p.compile, peak_rate),
        ('files', measure_files, p.images, device, p.repeats),
    ]
    n_threads = torch.get_num_threads()
    whole_machine = ('step', 'inference', 'memory', 'training', 'files')
    print_line('what', 'unit', 'ours', 'torchvision', 'ratio', '')
    rows = []
    for name, measure, *arguments in jobs:
        if p.only and name not in p.only:
            continue
        # Small operations waver with more threads than one; a worker that loads data has one.
        torch.set_num_threads(n_threads if name in whole_machine else 1)
        for row in measure(*arguments):
            rows.append(row)
            print_line(row.what, row.unit, format_number(row.ours), format_number(row.torchvision),
                       '-' if row.ratio is None else f'{row.ratio:.2f}', row.note)
    if p.output is not None:
        with write_beside(p.output) as beside:
            content = {'machine': machine, 'rows': [dataclasses.asdict(row) for row in rows]}
            beside.write_text(json.dumps(content, indent=2) + '\n', encoding='utf-8')


if __name__ == '__main__':
    main(tyro.cli(Parameters))
