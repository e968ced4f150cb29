"""Compare the speed and memory of this project with those of torchvision.

    python -m tools.benchmark --only data loss detect

Both sides are measured in turn (A B A B ...), in one process and on the same input, so that other
load of the machine affects both. Times are medians, a ratio is the median of the ratios of
consecutive measurements; above 1 this project is faster, or needs less memory.

Letters: N images in a batch, P = 8732 priors, C classes with background 0, O objects in an image.
"""

import contextlib
import ctypes
import dataclasses
import datetime
import functools
import gc
import itertools
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

from create_data_lists import write_data_lists
from datasets import PascalVOCDataset, SeededItems, ShuffledBatches, make_train_loader
from detect import Detector, annotate_images, annotate_video, choose_batch_size, predict
from model import EVALUATION, SSD300, SSD512, VISUALIZATION
from support.device import (
    choose_device,
    choose_precision,
    configure_gpu,
    peak_memory,
    process_memory,
)
from support.errors import (
    UserError,
    atomic_write,
    check_at_least,
    exit_on_user_error,
    make_folder,
)
from support.onnx_network import OnnxNetwork
from support.processes import default_workers
from support.training_log import TrainingLog
from tools.benchmark_sides import (
    N_CLASSES,
    SIDES,
    OurSide,
    load_objects,
    sample_objects,
    simulate_trained_outputs,
    simulate_untrained_outputs,
)
from tools.export import write_onnx
from tools.shapes import draw_image, write_annotation
from utils import (
    FILLER,
    INPUT_SIZE,
    calculate_mAP,
    label_map as voc_label_map,
    normalize,
    voc_labels,
)


@dataclasses.dataclass
class Parameters:
    """Measure the parts of this project and of torchvision."""

    # --- input ---

    # A folder in VOC layout, whose trainval images are read; none: drawn shapes of the size of
    # VOC's images, but with less detail, so faster to decode.
    images: str | None = None
    # A text file with one line per image: name, then xmin ymin xmax ymax class (from 0) for each
    # object, in pixels counted from 1, both ends included; none: random objects.
    boxes: str | None = None

    # --- measurements ---

    # Names of the rows; none: all. Those from step on take minutes on a CPU.
    only: tuple[Literal['data', 'handover', 'loss', 'detect', 'untrained', 'mAP', 'step',
                        'inference', 'memory', 'ssd512', 'training', 'files',
                        'runtimes'], ...] = ()
    # Measurements of a training step per side, after one to warm up; faster rows get up to ten
    # times as many. Raise it if the ratios vary from run to run.
    repeats: int = 3
    # Batch sizes of the training step; none: 8 32 on a CPU, 8 32 128 on a GPU.
    batches: tuple[int, ...] = ()
    # Iterations of the training run from JPEG files; 0: 5 on a CPU, 1000 on a GPU.
    iterations: int = 0
    # torch.compile of this project's side in the rows step, ssd512 and training, as in train.py;
    # not in float32.
    compile: Literal['auto', 'on', 'off'] = 'auto'
    # cpu, cuda, cuda:1, ...; auto is the GPU if there is one. Data, mAP and runtimes are measured
    # on the CPU in any case.
    device: str = 'auto'

    # --- output ---

    # A JSON file for the table; none: it is only printed.
    output: str | None = None


# Floating-point operations per image; a multiplication and an addition count as two.
FORWARD_FLOP, STEP_FLOP = 62.75e9, 187.9e9


# --------------------------------------------------------------------------------------------------
# Measuring
# --------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Row:
    """A row of the table."""

    what: str
    unit: str
    ours: float
    torchvision: float | None = None
    ratio: float | None = None      # torchvision / ours in time or memory
    note: str = ''


# Convert the seconds for n images to the number in the table.
UNITS = {'images/s': lambda t, n: n / t, 'ms/image': lambda t, n: 1000 * t / n,
         'ms': lambda t, n: 1000 * t, 's': lambda t, n: t}


def measure_in_turn(functions, repeats, device=None):
    """Measure the times of functions, which are called in turn, after one call to warm up.

    Args:
        device: that the functions run on; None: the CPU.

    Returns:
        For each function a list of `repeats` times in seconds.
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
    """Wait for a GPU, which runs asynchronously; no effect on the CPU."""
    if device is not None and device.type == 'cuda':
        torch.cuda.synchronize(device)


def ratio_of(slower, faster):
    """Return the median ratio of consecutive measurements."""
    return median(a / b for a, b in zip(slower, faster))


def row_of_times(what, unit, n, ours, torchvisions=None, note=''):
    """Make a row from the times in seconds of both sides for n images."""
    columns = [UNITS[unit](median(times), n) for times in (ours, torchvisions) if times]
    return Row(what, unit, *columns, ratio=torchvisions and ratio_of(torchvisions, ours), note=note)


def extra_memory(device, prepare, *arguments):
    """Measure the peak memory of the function `prepare(*arguments)`, in MB above its start."""
    if device is None or device.type == 'cpu':
        # In a new process, which has no free memory of earlier work that could be reused.
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
    """Measure `extra_memory()` in this process, a new one, on the CPU."""
    function = prepare(*arguments)
    gc.collect()
    # Where possible, return free memory to the system and reset the peak.
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
        pathlib.Path('/proc/self/clear_refs').write_text('5')
    start, _ = process_memory()
    function()
    return (process_memory()[1] - start) / 1e6


def row_of_memory(what, device, prepare, *arguments):
    """Make a row of the peak memory of both sides, see `extra_memory()`."""
    ours, theirs = (extra_memory(device, prepare, make, *arguments) for make in SIDES)
    return Row(f'{what}: memory', 'MB', ours, theirs, theirs / ours)


def select_dtypes(device):
    """Return the dtypes to train with on a device, {name: dtype}."""
    dtypes = {'float32': torch.float32}
    if choose_precision('auto', device) == torch.bfloat16:
        dtypes['bf16'] = torch.bfloat16
    return dtypes


def make_images(n_images, device, size=INPUT_SIZE):
    """Make images of noise, (N, 3, size, size) uint8, in the memory format of the data loaders."""
    torch.manual_seed(0)
    images = torch.randint(0, 256, (n_images, size, size, 3), dtype=torch.uint8)
    return images.permute(0, 3, 1, 2).to(device)


def prepare_step(make_side, boxes_path, batch_size, device, dtype, compile_choice='off'):
    """Prepare a training step of a side; returns a function without arguments.

    The first step, of one image, is done here, so that memory for gradients is allocated.
    """
    side, first = make_side(device), 1
    side.model.train()
    if dtype == torch.float32:
        compile_choice = 'off'
    train_on = side.prepare_training(dtype, batch_size, compile_choice)
    if isinstance(side, OurSide) and side.network is not side.model:
        first = batch_size  # compiled for this size
    images = make_images(batch_size, device, side.input_size)
    boxes, labels = sample_objects(boxes_path, batch_size, device)
    train_on([side.make_batch(images[:first], boxes[:first], labels[:first])])
    return functools.partial(train_on, [side.make_batch(images, boxes, labels)])


# --------------------------------------------------------------------------------------------------
# The rows
# --------------------------------------------------------------------------------------------------


def draw_folder(folder, n_images):
    """Draw shapes into a folder in VOC layout, with images of the size of VOC's."""
    images, annotations, splits = (
        make_folder(folder / part) for part in ('JPEGImages', 'Annotations', 'ImageSets/Main'))
    for number in range(n_images):
        image, objects = draw_image(random.Random(number))
        factor = 500 / 320
        image = image.resize([round(side * factor) for side in image.size])
        objects = [(name, [corner * factor for corner in box], *flags)
                   for name, box, *flags in objects]
        image.save(images / f'{number}.jpg', quality=95)
        write_annotation(annotations / f'{number}.xml', f'{number}.jpg', image.size, objects)
    (splits / 'trainval.txt').write_text('\n'.join(map(str, range(n_images))) + '\n')
    return folder


def torchvision_item(path, objects, pipeline):
    """Read an image file and apply torchvision's transforms to it and its objects."""
    with Image.open(path) as file:
        image = file.convert('RGB')
    boxes = tv_tensors.BoundingBoxes(objects['boxes'], dtype=torch.float32, format='XYXY',
                                     canvas_size=image.size[::-1])
    return pipeline(image, {'boxes': boxes, 'labels': torch.tensor(objects['labels'])})


@contextlib.contextmanager
def training_set(images_folder, n_drawn):
    """Context of a PascalVOCDataset of a folder's trainval images; None: of drawn ones."""
    with tempfile.TemporaryDirectory() as folder:
        source = images_folder or draw_folder(pathlib.Path(folder) / 'drawn', n_drawn)
        with silence():
            write_data_lists([(source, 'trainval')], [], folder)
        dataset = PascalVOCDataset(folder, 'TRAIN', keep_difficult=True)
        if len(dataset) == 0:
            raise UserError(f'{source} has no trainval images with objects; give another --images')
        yield dataset


def measure_data(images_folder, repeats, n_images=100):
    """Measure reading and augmenting image files, to tensors (3, 300, 300), and decoding alone."""
    pipeline = v2.Compose([
        v2.RandomPhotometricDistort(), v2.RandomZoomOut(fill=list(FILLER), side_range=(1, 4)),
        v2.RandomIoUCrop(), v2.RandomHorizontalFlip(), v2.SanitizeBoundingBoxes(),
        v2.Resize((INPUT_SIZE, INPUT_SIZE)), v2.PILToTensor()])
    with training_set(images_folder, n_images) as dataset:
        indices = range(0, len(dataset), max(1, len(dataset) // n_images))
        random.seed(0)
        torch.manual_seed(0)
        ours, theirs, decoding = measure_in_turn([
            lambda: [dataset[i] for i in indices],
            lambda: [torchvision_item(dataset.images[i], dataset.objects[i], pipeline)
                     for i in indices],
            lambda: [Image.open(dataset.images[i]).convert('RGB') for i in indices],
        ], 3 * repeats)
    return [row_of_times('data: file to augmented tensor', 'images/s', len(indices), ours, theirs,
                         'one core'),
            row_of_times('data: decoding alone', 'images/s', len(indices), decoding)]


class ReadyItems(Dataset):
    """Items of a data set that cost no time to make, to measure only their way to the training."""

    cache = None

    def __init__(self, boxes_path):
        boxes, labels = sample_objects(boxes_path, 8, 'cpu')
        difficulties = [torch.zeros_like(l, dtype=torch.bool) for l in labels]
        self.items = list(zip(make_images(8, 'cpu'), boxes, labels, difficulties))

    def __len__(self):
        return len(self.items)

    def __getitem__(self, i):
        return [tensor.clone() for tensor in self.items[i]]     # new memory, like a decoded image


def collate_lists(batch):
    """Collate items to tuples of one tensor per image, as torchvision's reference scripts do."""
    return tuple(zip(*batch))


def take_padded(device, batch):
    """Move a batch of `datasets.collate_padded()` to the device, and read its images once."""
    images, _, _ = (tensor.to(device, non_blocking=True) for tensor in batch)
    return images.clone()


def take_lists(device, batch):
    """Stack the images of a batch of `collate_lists()` and move all its tensors to the device."""
    images, boxes, labels, _ = batch
    return torch.stack(images).to(device), [tensor.to(device) for tensor in (*boxes, *labels)]


def main_thread_seconds(batches, n_batches, take):
    """Measure the CPU time of the main thread for n batches, after three to start the workers.

    Elapsed time would also include waiting, which depends on the number of workers.

    Args:
        take: function that is called with each batch.
    """
    batches = iter(batches)
    for _ in range(3):
        take(next(batches))
    start = time.thread_time()
    for _ in range(n_batches):
        take(next(batches))
    return time.thread_time() - start


def measure_handover(boxes_path, device, repeats, batch_size=32, n_batches=40):
    """Measure what a batch from the workers costs the training loop until it is on the device."""
    items = ReadyItems(boxes_path)
    batches = ShuffledBatches(len(items), batch_size, seed=0, start=0, end=n_batches + 8)
    usual_loader = DataLoader(SeededItems(items, 0), batch_sampler=batches,
                              collate_fn=collate_lists, num_workers=2,
                              pin_memory=device.type == 'cuda')
    ours, theirs = [], []
    for _ in range(repeats):
        loader = make_train_loader(items, batches, 2, device)
        ours.append(main_thread_seconds(loader, n_batches,
                                        functools.partial(take_padded, device)))
        theirs.append(main_thread_seconds(usual_loader, n_batches,
                                          functools.partial(take_lists, device)))
    return [row_of_times(f'hand-over to the loop, batch {batch_size}', 'ms/image',
                         n_batches * batch_size, ours, theirs, 'CPU time of the main thread')]


@contextlib.contextmanager
def silence():
    """Suppress standard output and standard error within the block."""
    with open(os.devnull, 'w') as nowhere, contextlib.redirect_stdout(nowhere), \
            contextlib.redirect_stderr(nowhere):
        yield


def measure_training(images_folder, device, batch_size, n_iterations, compile_choice, peak_rate):
    """Measure a training run of `train.py` from image files, after the first tenth of it."""
    if device.type == 'cuda':
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    side, n_workers = OurSide(device), default_workers()
    n_first = max(1, n_iterations // 10)
    n_images = batch_size * (n_iterations - n_first)
    with training_set(images_folder, n_drawn=200) as dataset, \
            tempfile.TemporaryDirectory() as log_folder:
        batches = ShuffledBatches(len(dataset), batch_size, seed=0, start=0, end=n_iterations)
        loader = iter(make_train_loader(dataset, batches, n_workers, device))
        with silence(), TrainingLog(log_folder, 0, n_iterations, device, batches,
                                    dataset.images) as log:
            train_on = side.prepare_training(choose_precision('auto', device), batch_size,
                                             compile_choice, log, print_freq=20)
            train_on(itertools.islice(loader, n_first))
            synchronize(device)
            start = time.perf_counter()
            train_on(loader, start=n_first)
            synchronize(device)
            seconds = time.perf_counter() - start
    hours = 120_000 * seconds / (n_iterations - n_first) / 3600
    note = f'{n_workers} workers; 120,000 iterations: {hours:.3g} h'
    if peak_rate:
        note += (f'; {n_images * STEP_FLOP / seconds / peak_rate:.0%} of peak, '
                 f'{peak_memory(device) / 1e9:.1f} GB')
    return [Row(f'training from files, batch {batch_size}', 'images/s', n_images / seconds,
                note=note)]


def measure_loss(boxes_path, device, repeats, batch_size=32):
    """Measure the loss of a batch: matching, forward and backward pass."""
    ours, theirs = (make(device) for make in SIDES)
    boxes, labels = sample_objects(boxes_path, batch_size, device)
    outputs = [output.requires_grad_() for output in simulate_untrained_outputs(batch_size, device)]
    our_targets, their_targets = (side.make_targets(boxes, labels) for side in (ours, theirs))
    times = measure_in_turn(
        [lambda: torch.autograd.grad(ours.loss(*outputs, our_targets), outputs),
         lambda: torch.autograd.grad(theirs.loss(*outputs, their_targets), outputs)],
        10 * repeats, device)
    return [row_of_times(f'loss, batch {batch_size}', 'ms/image', batch_size, *times,
                         f'{sum(map(len, boxes)) / batch_size:.1f} objects per image')]


def measure_detect(boxes_path, device, repeats, batch_size=32):
    """Measure detection in the simulated outputs of a trained network."""
    ours, theirs = (make(device) for make in SIDES)
    outputs = simulate_trained_outputs(ours.model.priors_cxcy,
                                       *sample_objects(boxes_path, batch_size, device))
    is_candidate = outputs[1].softmax(dim=2)[:, :, 1:] > EVALUATION['min_score']
    times = measure_in_turn([lambda: ours.detect(*outputs), lambda: theirs.detect(*outputs)],
                            10 * repeats, device)
    n_detections = sum(map(len, ours.detect(*outputs)[0])) / batch_size
    return [row_of_times(f'detect, realistic, batch {batch_size}', 'ms/image', batch_size, *times,
                         f'{is_candidate.sum() / batch_size:.0f} candidates per image, '
                         f'{n_detections:.0f} detections')]


def prepare_untrained(make_side, batch_size, device):
    """Prepare detection in the simulated outputs of an untrained network; returns a function."""
    torch.set_num_threads(1)
    side = make_side(device)
    outputs = simulate_untrained_outputs(batch_size, device)
    side.detect(*(output[:1] for output in outputs))
    return lambda: side.detect(*outputs)


def measure_untrained(device, repeats, batch_size=8):
    """Measure detection in the outputs of an untrained network, the worst case, and its memory."""
    sides = [prepare_untrained(make, batch_size, device) for make in SIDES]
    times = measure_in_turn(sides, repeats, device)
    what = f'detect, untrained, batch {batch_size}'
    return [row_of_times(what, 'ms/image', batch_size, *times),
            row_of_memory(what, device, prepare_untrained, batch_size, device)]


def prepare_mAP(boxes_path):
    """Prepare the mAP of as many images as in VOC07 test, with 200 detections per image.

    A fifth of the detections are copies of objects, shifted a little; the others are random boxes.

    Returns:
        A function without arguments.
    """
    torch.set_num_threads(1)
    objects, top_k = load_objects(boxes_path), EVALUATION['top_k']
    rng = torch.Generator().manual_seed(0)
    counts = torch.tensor([len(boxes) for boxes, _ in objects])
    true_boxes = torch.cat([boxes for boxes, _ in objects])
    true_labels = torch.cat([labels for _, labels in objects])
    difficult = torch.rand(len(true_boxes), generator=rng) < 0.15

    image = torch.arange(len(objects)).repeat_interleave(top_k)                     # (D,)
    index_in_image = (torch.rand(len(image), generator=rng) * counts[image]).long()
    obj = (counts.cumsum(0) - counts)[image] + index_in_image
    is_copy = torch.rand(len(image), generator=rng) < 0.2
    copies = true_boxes[obj]
    sides = (copies[:, 2:] - copies[:, :2]).repeat(1, 2)
    copies = copies + 0.1 * sides * torch.randn(copies.shape, generator=rng)
    random_boxes = torch.rand(len(image), 2, 2, generator=rng).sort(dim=1).values.flatten(1)
    boxes = torch.where(is_copy.unsqueeze(1), copies, random_boxes)
    labels = torch.randint(1, N_CLASSES, (len(image),), generator=rng)
    labels = torch.where(is_copy, true_labels[obj], labels)
    scores = torch.rand(len(image), generator=rng) * torch.where(is_copy, 1., 0.5)

    detections = [list(tensor.split(top_k)) for tensor in (boxes, labels, scores)]
    ground_truth = [list(tensor.split(counts.tolist()))
                    for tensor in (true_boxes, true_labels, difficult)]
    return lambda: calculate_mAP(*detections, *ground_truth, voc_label_map)


def measure_mAP(boxes_path, repeats):
    """Measure the mAP of a whole test set, and its memory. torchvision has no mAP."""
    function = prepare_mAP(boxes_path)
    _, mAP = function()
    times, = measure_in_turn([function], repeats)
    n_images = len(load_objects(boxes_path))
    n_detections = n_images * EVALUATION['top_k']
    return [row_of_times(f'mAP, {n_images:,} images, {n_detections:,} detections', 's', n_images,
                         times, note=f'mAP {mAP:.3f}'),
            Row('mAP: memory', 'MB', extra_memory(None, prepare_mAP, boxes_path))]


def measure_step(boxes_path, batch_size, device, repeats, compile_choice, peak_rate):
    """Measure a training step: forward, loss, backward, update; one row per dtype."""
    dtypes = select_dtypes(device)
    times = measure_in_turn(
        [prepare_step(make, boxes_path, batch_size, device, dtype, compile_choice)
         for dtype in dtypes.values() for make in SIDES], repeats, device)
    rows = []
    for name, ours, theirs in zip(dtypes, times[::2], times[1::2]):
        note = f'{median(ours) / batch_size:.3g} s/image'
        if name != 'float32':
            note += f', {ratio_of(times[0], ours):.2f} x float32'
        if peak_rate and name == 'bf16':
            note += f', {batch_size * STEP_FLOP / median(ours) / peak_rate:.0%} of peak'
        rows.append(row_of_times(f'step, batch {batch_size}, {name}', 'images/s', batch_size, ours,
                                 theirs, note))
    return rows


def infer(side, dtype, images, outputs):
    """Run the network, then detect objects in the given outputs (None: no detection).

    These are simulated outputs of a trained network, since random weights detect no objects.
    """
    with torch.autocast(images.device.type, dtype, enabled=dtype != torch.float32):
        side.forward(images)
    if outputs is not None:
        side.detect(*outputs)


@torch.no_grad()
def measure_inference(boxes_path, batch_size, device, repeats, peak_rate):
    """Measure the forward pass, without and with detection; two rows per dtype."""
    rows = []
    sides = [make(device) for make in SIDES]
    outputs = simulate_trained_outputs(sides[0].model.priors_cxcy,
                                       *sample_objects(boxes_path, batch_size, device))
    images = normalize(make_images(batch_size, device))
    for side in sides:
        side.model.eval()
    for name, dtype in select_dtypes(device).items():
        ours, theirs, *with_detection = measure_in_turn(
            [functools.partial(infer, side, dtype, images, detector_input)
             for detector_input in (None, outputs) for side in sides], 3 * repeats, device)
        what = f'inference, batch {batch_size}, {name}'
        unit = 'ms' if batch_size == 1 else 'images/s'
        note = ''
        if peak_rate and name == 'bf16':
            note = f'{batch_size * FORWARD_FLOP / median(ours) / peak_rate:.0%} of peak'
        rows += [row_of_times(what, unit, batch_size, ours, theirs, note),
                 row_of_times(f'{what}, detection', unit, batch_size, *with_detection)]
    return rows


def measure_memory(boxes_path, device, batch_size=32):
    """Measure the peak memory of a training step above its start; one row per dtype."""
    return [row_of_memory(f'step, batch {batch_size}, {name}', device, prepare_step, boxes_path,
                          batch_size, device, dtype)
            for name, dtype in select_dtypes(device).items()]


def make_ssd512(device):
    """Make the side of this project's SSD512."""
    return OurSide(device, SSD512)


@torch.no_grad()
def measure_ssd512(boxes_path, device, repeats, compile_choice, batch_size):
    """Measure step, inference and memory of SSD512 next to SSD300; torchvision has no SSD512."""
    dtype = choose_precision('auto', device)
    name = str(dtype).removeprefix('torch.')
    makers = (make_ssd512, OurSide)
    with torch.enable_grad():
        steps = measure_in_turn([prepare_step(make, boxes_path, batch_size, device, dtype,
                                              compile_choice) for make in makers], repeats, device)
        memory = [extra_memory(device, prepare_step, make, boxes_path, batch_size, device, dtype)
                  for make in makers]
    forward, objects = [], sample_objects(boxes_path, 1, device)
    for side in (make(device) for make in makers):
        side.model.eval()
        forward.append(functools.partial(
            infer, side, dtype, normalize(make_images(1, device, side.input_size)),
            simulate_trained_outputs(side.model.priors_cxcy, *objects)))
    inference = measure_in_turn(forward, 3 * repeats, device)
    note = '{:.2f} x SSD300'
    return [row_of_times(f'SSD512: step, batch {batch_size}, {name}', 'images/s', batch_size,
                         steps[0], note=note.format(ratio_of(*steps)) + ' in time'),
            Row(f'SSD512: step, batch {batch_size}, {name}: memory', 'MB', memory[0],
                note=note.format(memory[0] / memory[1])),
            row_of_times(f'SSD512: inference, {name}, detection', 'ms', 1, inference[0],
                         note=note.format(ratio_of(*inference)))]


def write_video(path, images, n_frames):
    """Write a video of images in turn, 1280 x 720 pixels, 30 frames per second."""
    frames = [Image.open(image).convert('RGB').resize((1280, 720)) for image in images]
    with av.open(str(path), 'w') as container:
        stream = container.add_stream('libx264', rate=30)
        stream.width, stream.height, stream.pix_fmt = 1280, 720, 'yuv420p'
        for number in range(n_frames):  # with motion, as in real videos
            picture = ImageChops.offset(frames[number // 15 % len(frames)], 4 * number, number)
            container.mux(stream.encode(av.VideoFrame.from_image(picture)))
        container.mux(stream.encode())


def make_detector(device):
    """Make the detector of `detect.py` with random weights.

    They detect no objects, so the threshold is low, and the 5 highest scores per image are drawn.
    """
    torch.manual_seed(0)
    model = SSD300(N_CLASSES).eval().to(device, memory_format=torch.channels_last)
    return Detector(model, choose_batch_size(model), set(voc_labels), min_score=0.06,
                    max_overlap=VISUALIZATION['max_overlap'], top_k=5)


def measure_files(images_folder, device, repeats, n_images=64, n_frames=60):
    """Measure `detect.py`, from files to annotated files. torchvision has no such script."""
    detector, stopped = make_detector(device), threading.Event()
    common = detector, lambda *arguments, **keywords: None, stopped     # no JSON report
    with (training_set(images_folder, n_images) as dataset,
          tempfile.TemporaryDirectory() as folder):
        folder, paths = pathlib.Path(folder), dataset.images[:n_images]
        files = [(path, folder / f'{i}.jpg') for i, path in enumerate(paths)]
        video = folder / 'video.mp4'
        write_video(video, paths[:8], n_frames)
        image = Image.open(paths[0]).convert('RGB')
        with silence():
            image_times, video_times = (measure_in_turn([function], repeats)[0] for function in (
                lambda: annotate_images(files, *common),
                lambda: annotate_video(str(video), folder / 'out.mp4', *common)))
        predict_times, = measure_in_turn(
            [lambda: predict([image], detector.min_score, detector.max_overlap, detector.top_k,
                             detector.model)], 10 * repeats)
    return [row_of_times('files: JPEG to annotated JPEG', 'images/s', len(paths), image_times),
            row_of_times('files: predict, one image', 'ms', 1, predict_times),
            row_of_times('files: video 1280 x 720', 'images/s', n_frames, video_times,
                         note='frames, decoded, annotated, encoded')]


def measure_runtimes(repeats):
    """Measure the detection in one image by PyTorch and by onnxruntime, on the CPU.

    With random weights, which detect no objects, and images of noise.
    """
    torch.manual_seed(0)
    model, cpu = SSD300(N_CLASSES).eval(), torch.device('cpu')
    image = make_images(1, cpu)
    with tempfile.TemporaryDirectory() as folder, silence():
        paths = {name: pathlib.Path(folder, f'{name}.onnx') for name in ('float32', 'int8')}
        write_onnx(paths['float32'], model)
        write_onnx(paths['int8'], model, images=make_images(4, cpu))
        megabytes = {name: path.stat().st_size / 1e6 for name, path in paths.items()}
        networks = {name: OnnxNetwork(path) for name, path in paths.items()}
    model.to(memory_format=torch.channels_last)
    functions = {
        **{f'PyTorch, {name}': functools.partial(detect_with_dtype, model, image, dtype)
           for name, dtype in select_dtypes(cpu).items()},
        **{f'onnxruntime, {name}': functools.partial(network.detect_in_batch, image,
                                                     **VISUALIZATION)
           for name, network in networks.items()}}
    rows, times = [], measure_in_turn(functions.values(), 5 * repeats)
    for name, seconds in zip(functions, times):
        note = f'{ratio_of(times[0], seconds):.2f} x PyTorch in float32'
        if name.startswith('onnx'):
            note += f', {megabytes[name.split()[1]]:.1f} MB'
        rows.append(row_of_times(f'runtimes: {name}', 'ms', 1, seconds, note=note))
    return rows


def detect_with_dtype(model, image, dtype):
    """Detect objects in a batch on the CPU, under autocast to a dtype."""
    with torch.autocast('cpu', dtype, enabled=dtype != torch.float32):
        model.detect_in_batch(image, **VISUALIZATION)


# --------------------------------------------------------------------------------------------------
# The table
# --------------------------------------------------------------------------------------------------


def describe_machine(device):
    """Describe hardware and versions, {name: text}."""
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
    """Measure the FLOP per second of a large matrix product in bf16; None on a CPU."""
    if device.type != 'cuda':
        return None
    matrix = torch.randn(side, side, device=device, dtype=torch.bfloat16)
    times, = measure_in_turn([lambda: [matrix @ matrix for _ in range(10)]], 10, device)
    return 10 * 2 * side ** 3 / median(times)


def format_number(value):
    """Format a number with three significant digits; None is a dash."""
    return '-' if value is None else f'{value:,.0f}' if value >= 100 else f'{value:.3g}'


def print_line(*cells):
    """Print a line of the table at once, since the next one may take minutes."""
    print('{:<46} {:<9} {:>8} {:>12} {:>6}  {}'.format(*cells).rstrip(), flush=True)


@exit_on_user_error
def main(parameters):
    """Measure and print the rows that the parameters select."""
    p = parameters
    check_at_least(1, repeats=p.repeats, batches=min(p.batches, default=1))
    check_at_least(2, iterations=p.iterations or 2)     # the first is not measured
    if p.output is not None:
        make_folder(pathlib.Path(p.output).parent)
    device = choose_device(p.device)
    configure_gpu()
    load_objects(p.boxes)   # report an invalid file before anything is measured
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
        ('ssd512', measure_ssd512, p.boxes, device, p.repeats, p.compile, 32 if gpu else 2),
        ('training', measure_training, p.images, device, 32 if gpu else 8,
         p.iterations or (1000 if gpu else 5), p.compile, peak_rate),
        ('files', measure_files, p.images, device, p.repeats),
        ('runtimes', measure_runtimes, p.repeats),
    ]
    n_threads = torch.get_num_threads()
    whole_machine = ('step', 'inference', 'memory', 'ssd512', 'training', 'files', 'runtimes')
    print_line('what', 'unit', 'ours', 'torchvision', 'ratio', '')
    rows = []
    for name, measure, *arguments in jobs:
        if p.only and name not in p.only:
            continue
        # With several threads the times of small operations vary; a data worker has one, too.
        torch.set_num_threads(n_threads if name in whole_machine else 1)
        for row in measure(*arguments):
            rows.append(row)
            print_line(row.what, row.unit, format_number(row.ours), format_number(row.torchvision),
                       '-' if row.ratio is None else f'{row.ratio:.2f}', row.note)
    if p.output is not None:
        with atomic_write(p.output) as temporary:
            content = {'machine': machine, 'rows': [dataclasses.asdict(row) for row in rows]}
            temporary.write_text(json.dumps(content, indent=2) + '\n', encoding='utf-8')


if __name__ == '__main__':
    main(tyro.cli(Parameters))
