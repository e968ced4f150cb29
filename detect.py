"""Detect objects in images and videos, from the command line or from Python.

    python detect.py photo.jpg --output annotated.jpg
    python detect.py photos 'more/**/*.png' clip.mp4 --output results --json results.json
    python detect.py photo.jpg --checkpoint ssd300.onnx     # a file that tools/export.py wrote

From Python, with the checkpoint that train.py wrote:

    >>> from PIL import Image
    >>> from detect import detect, predict
    >>> image = Image.open('photo.jpg')
    >>> detect(image, min_score=0.2, max_overlap=0.5, top_k=200).show()
    >>> prediction, = predict([image])
    >>> sorted(prediction)
    ['boxes', 'labels', 'scores']

Letters: N images in a batch, n detections in an image.
"""

import dataclasses
import functools
import os
import pathlib
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import Literal

import torch
import tyro
from PIL import Image
from torchvision.transforms.functional import pil_to_tensor
from tqdm import tqdm

from model import SSD300, VISUALIZATION
from support.device import choose_device, choose_precision
from support.drawing import draw_objects
from support.errors import (
    UserError,
    atomic_write,
    check_at_least,
    check_fractions,
    exit_on_user_error,
    make_folder,
)
from support.images import (
    check_outputs,
    choose_outputs,
    expand_inputs,
    in_batches,
    is_camera,
    is_live,
    is_video,
    json_report,
    limit_pixels,
    make_upright,
    print_error,
    print_line,
    read_batches,
    redact,
    save_image,
)
from support.onnx_network import OnnxNetwork, check_parameters, is_onnx
from support.processes import stop_on_signal
from support.published import download_coco, used_names
from support.video import VideoReader, VideoWriter
from utils import distinct_colors, warp

# Images per batch. A larger batch on a CPU is no faster and needs more memory.
BATCH_SIZE_GPU, BATCH_SIZE_CPU = 32, 4


@dataclasses.dataclass
class Parameters:
    """Draw the objects that SSD300 detects in images and videos."""

    # Images, videos, folders of them, patterns in quotes ('photos/**/*.jpg'), the number of a
    # camera, the URL of a network stream (rtsp://..., https://...), or - for an image on standard
    # input.
    inputs: tyro.conf.Positional[tuple[str, ...]]

    # --- model ---

    # The checkpoint that train.py wrote, a published one, or an .onnx file of tools/export.py. If
    # the default does not exist, the weights that torchvision trained on COCO are downloaded once
    # (136 MB) and detect 80 classes.
    checkpoint: str = './checkpoint_ssd300.pth.tar'
    # Images per batch; none: 32 on a GPU, 4 on a CPU.
    batch_size: int | None = None
    # Skip images with more pixels: even a small file may fill the memory once it is decoded.
    max_pixels: int = 178_956_970

    # --- what is drawn and reported ---

    # Detections are kept above this score. 0.2 is for visualization; with evaluation's 0.01
    # most detections are false positives.
    min_score: float = VISUALIZATION['min_score']
    # Of two boxes of a class that overlap more than this, the one with the lower score is removed.
    max_overlap: float = VISUALIZATION['max_overlap']
    # Keep at most this many detections per image.
    top_k: int = VISUALIZATION['top_k']
    # Names of the only classes to detect; none: all.
    classes: tuple[str, ...] = ()
    # Names of classes to leave out.
    suppress: tuple[str, ...] = ()

    # --- bookkeeping ---

    # A file if there is one input and the name ends like an image's, or a video's; else a folder.
    output: str = './detections'
    # A JSON file for the detections: file, boxes in pixels, labels, scores; of a video also the
    # frame's number and its time in seconds.
    json: str | None = None
    # cpu, cuda, cuda:1, ...; auto is the GPU if there is one.
    device: str = 'auto'
    # auto is bf16 where the device supports it, else fp16 on a GPU and float32 on a CPU. What that
    # costs in mAP, eval.py --precision prints.
    precision: Literal['auto', 'bf16', 'fp16', 'float32'] = 'auto'


# --------------------------------------------------------------------------------------------------
# From Python
# --------------------------------------------------------------------------------------------------


def detect(original_image, min_score=0.2, max_overlap=0.5, top_k=200, suppress=None, model=None,
           classes=None, precision='auto'):
    """Detect objects in an image and draw them: `detect(Image.open('photo.jpg')).show()`.

    Args:
        original_image: PIL image of any mode and size; it is not changed.
        min_score, max_overlap, top_k: see `SSD300.detect_objects`.
        suppress, classes: names of classes not to draw, and of the only ones to draw.
        model: an SSD300 in evaluation mode, or an OnnxNetwork; None loads the default checkpoint
            once.
        precision: 'bf16', 'fp16', 'float32', or 'auto': the fastest of the model's device.

    Returns:
        A new PIL image, RGB and upright, with a box and a label for each object.

    Raises:
        UserError: a name that is no class of the model, a threshold that is not from 0 to 1.
    """
    model = default_model() if model is None else model
    names = select_classes(model.label_map, classes, suppress)
    image = make_upright(original_image)
    prediction, = predict_batch([image], model, names, min_score, max_overlap, top_k, precision)
    draw_objects(image, prediction, distinct_colors(model.label_map))
    return image


def predict(images, min_score=0.2, max_overlap=0.5, top_k=200, model=None, batch_size=None,
            classes=None, suppress=None, precision='auto'):
    """Detect objects in images and return them as numbers.

    Args:
        images: list of PIL images of any mode and size; their EXIF orientation is respected.
        min_score, max_overlap, top_k: see `SSD300.detect_objects`.
        model: an SSD300 in evaluation mode, or an OnnxNetwork; None loads the default checkpoint
            once.
        batch_size: images per batch; None: 32 on a GPU, 4 on a CPU.
        classes, suppress: names of the only classes to detect (none: all), and of those to
            leave out.
        precision: 'bf16', 'fp16', 'float32', or 'auto': the fastest of the model's device.

    Returns:
        For each image {'boxes': (n, 4) corners in pixels of the upright image, 'labels': [names],
        'scores': (n,)}, by falling score, on the CPU.

    Raises:
        UserError: a name that is no class of the model, a threshold that is not from 0 to 1.
    """
    assert not isinstance(images, Image.Image), 'predict() takes a list of images: predict([image])'
    model = default_model() if model is None else model
    names = select_classes(model.label_map, classes, suppress)
    predictions = []
    for batch in in_batches(images, batch_size or choose_batch_size(model)):
        predictions += predict_batch([make_upright(image) for image in batch], model, names,
                                     min_score, max_overlap, top_k, precision)
    return predictions


def predict_batch(images, model, names, min_score, max_overlap, top_k, precision):
    """Detect objects of the named classes in a list of N upright RGB images; see `predict()`."""
    check_fractions(min_score=min_score, max_overlap=max_overlap)
    inputs = [pil_to_tensor(warp(image, (0, 0, *image.size), antialias=bool(model.antialias),
                                 size=model.input_size)) for image in images]
    # Detections of other classes must not use up places among the best top_k.
    all_classes = len(names) == len(model.label_map) - 1
    dtype = choose_precision(precision, model.device)
    with torch.autocast(model.device.type, dtype, enabled=dtype != torch.float32):
        detections = model.detect_in_batch(torch.stack(inputs), min_score, max_overlap,
                                           top_k if all_classes else sys.maxsize)
    name_of_label = {label: name for name, label in model.label_map.items()}
    predictions = []
    for image, boxes, labels, scores in zip(images, *detections):
        found = [name_of_label[label] for label in labels.tolist()]
        kept = [i for i, name in enumerate(found) if name in names][:top_k]
        predictions.append({
            'boxes': boxes.cpu()[kept] * torch.tensor([*image.size, *image.size]),  # (n, 4)
            'labels': [found[i] for i in kept],
            'scores': scores.cpu()[kept]})
    return predictions


def select_classes(label_map, classes, suppress):
    """Return the names of the classes to detect: `classes` (none: all) without `suppress`.

    Raises:
        UserError: a name that is no class of the model.
    """
    names = [name for name, label in label_map.items() if label != 0]
    unknown = (set(classes or ()) | set(suppress or ())) - set(names)
    if unknown:
        raise UserError(f'no class is named {", ".join(sorted(unknown))}; the model has '
                        f'{", ".join(used_names(names))}')
    return set(classes or names) - set(suppress or ())


def choose_batch_size(model):
    """Return the batch size for the device of a model."""
    return BATCH_SIZE_GPU if model.device.type == 'cuda' else BATCH_SIZE_CPU


@functools.cache
def default_model():
    """Load the model of the default checkpoint at the first call, and keep it."""
    return load_model(Parameters.checkpoint, Parameters.device)


def load_model(path, device_name):
    """Load a checkpoint's model or an ONNX file; without the default checkpoint, COCO's weights."""
    if is_onnx(path):
        return OnnxNetwork(path)
    if path == Parameters.checkpoint and not pathlib.Path(path).exists():
        print(f'{path} is not there, so these are the weights that torchvision trained on COCO',
              file=sys.stderr)
        model = SSD300.from_state(download_coco(
            'train a checkpoint with train.py and give it with --checkpoint'))
    else:
        model = SSD300.from_checkpoint(path)
    return model.to(choose_device(device_name), memory_format=torch.channels_last)


# --------------------------------------------------------------------------------------------------
# The command line
# --------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Detector:
    """A model with the batch size, classes and thresholds of the command line."""

    model: SSD300 | OnnxNetwork
    batch_size: int
    names: set[str]     # of the classes to detect
    min_score: float
    max_overlap: float
    top_k: int
    precision: str = 'auto'

    def predict(self, images):
        """Detect objects in a list of upright RGB images, which may be empty."""
        return predict_batch(images, self.model, self.names, self.min_score, self.max_overlap,
                             self.top_k, self.precision) if images else []

    @functools.cached_property
    def colors(self):
        """The color of each class name."""
        return distinct_colors(self.model.label_map)


@exit_on_user_error
def main(parameters):
    """Annotate all inputs; report and skip those that cannot be read."""
    p = parameters
    if not p.inputs:
        raise UserError('no input was named; give one or more images, videos or folders')
    check_at_least(1, batch_size=1 if p.batch_size is None else p.batch_size, top_k=p.top_k,
                   max_pixels=p.max_pixels)
    check_fractions(min_score=p.min_score, max_overlap=p.max_overlap)
    check_parameters(p.checkpoint, p.device, p.precision)
    limit_pixels(p.max_pixels)
    model = load_model(p.checkpoint, p.device)
    detector = Detector(model, p.batch_size or choose_batch_size(model),
                        select_classes(model.label_map, p.classes, p.suppress),
                        p.min_score, p.max_overlap, p.top_k, p.precision)
    inputs, problems = expand_inputs(p.inputs)
    outputs = choose_outputs(inputs, p.output) if inputs else []
    check_outputs(inputs, outputs + ([] if p.json is None else [pathlib.Path(p.json)]))
    if p.json is not None:
        make_folder(pathlib.Path(p.json).parent)
    for problem in problems:
        print_error(problem)

    images = [pair for pair in zip(inputs, outputs) if not is_video(pair[0])]
    videos = [pair for pair in zip(inputs, outputs) if is_video(pair[0])]
    n_failed = len(problems)
    with stop_on_signal() as stopped, json_report(p.json) as add_to_report:
        n_failed += annotate_images(images, detector, add_to_report, stopped)
        for path, output in videos:
            if not stopped.is_set():
                n_failed += annotate_video(path, output, detector, add_to_report, stopped)
    if stopped.is_set() and not any(is_live(path) for path in inputs):
        raise UserError('interrupted; what was done until then has been written')
    if n_failed:
        n_inputs = len(inputs) + len(problems)
        raise UserError(f'{n_failed} of {n_inputs} inputs could not be read in full')


def annotate_images(paths, detector, add_to_report, stopped):
    """Annotate image files, which threads read and write.

    Args:
        paths: list of (input, output)
        add_to_report: see `json_report()`.
        stopped: event that ends the work after the batch.

    Returns:
        The number of files that could not be read.
    """
    n_failed = 0
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool, tqdm(
            total=len(paths), unit='image', disable=len(paths) < 2) as progress:
        for batch in read_batches(pool, paths, detector.batch_size):
            n_failed += annotate_batch(batch, pool, detector, add_to_report)
            progress.update(len(batch))
            if stopped.is_set():
                break
    return n_failed


def annotate_batch(batch, pool, detector, add_to_report):
    """Annotate a list of ((input, output), image or error); returns the number of errors."""
    readable = []
    for (path, output), image in batch:
        if isinstance(image, Exception):
            print_error(f'{path}: cannot be read ({image}); skipped')
        else:
            readable.append((path, output, image))
    predictions = detector.predict([image for *_, image in readable])
    writes = []
    for (path, output, image), prediction in zip(readable, predictions):
        add_to_report(path, prediction)
        draw_objects(image, prediction, detector.colors)
        writes.append(pool.submit(save_image, image, output))
    for (path, output, _), write in zip(readable, writes):
        write.result()
        print_line(f'{path} -> {output}')
    return len(batch) - len(readable)


def annotate_video(path, output, detector, add_to_report, stopped):
    """Annotate a video file or a camera's video.

    Returns:
        The number of inputs that could not be read in full, 0 or 1.
    """
    source = int(path) if is_camera(path) else path
    name = redact(str(path))
    try:
        with (VideoReader(source) as reader, atomic_write(output) as temporary,
              VideoWriter(temporary, reader) as writer):
            n_frames = annotate_frames(name, reader, writer, detector, add_to_report, stopped)
    except UserError as error:
        print_error(f'{name}: {error}; skipped')
        return 1
    print_line(f'{name} -> {output}, {n_frames} frames{", " + writer.note if writer.note else ""}')
    if reader.n_broken:
        print_error(f'{name}: {reader.n_broken} frames are broken; skipped')
    if reader.problem:
        print_error(f'{name}: cannot be read to its end ({reader.problem}); ends after {n_frames} '
                    f'frames')
    return int(bool(reader.n_broken or reader.problem))


def annotate_frames(name, reader, writer, detector, add_to_report, stopped):
    """Annotate the frames of a reader and write them; returns their number."""
    # Live frames are written as they come, without waiting for a full batch.
    batch_size = 1 if is_live(name) else detector.batch_size
    n_frames = 0
    with tqdm(total=reader.n_frames, unit='frame', desc=name) as progress:
        for frames in in_batches(reader, batch_size, lambda frame: frame.image.size):
            predictions = detector.predict([frame.image for frame in frames])
            for frame, prediction in zip(frames, predictions):
                add_to_report(name, prediction, frame=frame.number, time=round(frame.time, 6))
                draw_objects(frame.image, prediction, detector.colors)
                writer.write(frame)
            n_frames += len(frames)
            progress.update(len(frames))
            if stopped.is_set():
                break
    return n_frames


if __name__ == '__main__':
    main(tyro.cli(Parameters))
