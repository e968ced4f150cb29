"""Find objects on images and videos, from the command line or from Python.

    python detect.py photo.jpg --output annotated.jpg
    python detect.py photos 'more/**/*.png' clip.mp4 --output results --json results.json

From Python, with the checkpoint that train.py wrote:

    >>> from PIL import Image
    >>> from detect import detect, predict
    >>> image = Image.open('photo.jpg')
    >>> detect(image, min_score=0.2, max_overlap=0.5, top_k=200).show()
    >>> prediction, = predict([image])
    >>> sorted(prediction)
    ['boxes', 'labels', 'scores']
"""

import dataclasses
import functools
import os
import pathlib
import sys
from concurrent.futures import ThreadPoolExecutor

import torch
import tyro
from PIL import Image, ImageColor, ImageDraw, ImageFont
from tqdm import tqdm

from datasets import transform
from files import (
    check_outputs,
    choose_outputs,
    expand_inputs,
    in_batches,
    is_camera,
    is_video,
    json_report,
    make_upright,
    read_ahead,
    read_image,
    save_image,
)
from machine import choose_device, signals_as_flag
from model import SSD300
from published import coco_model
from utils import (
    UserError,
    check_at_least,
    distinct_colors,
    exit_on_user_error,
    make_folder,
    write_beside,
)
from video import VideoReader, VideoWriter

# Images that the network sees at a time. A CPU gains nothing from more, and needs their memory.
BATCH_SIZE, BATCH_SIZE_CPU = 32, 4


@dataclasses.dataclass
class Parameters:
    """Draw the objects that SSD300 finds on images and videos."""

    # Images, videos, folders of them, patterns in quotes ('photos/**/*.jpg'), the number of a
    # camera, or - for an image on standard input.
    inputs: tyro.conf.Positional[tuple[str, ...]]

    # --- model ---

    # The checkpoint that train.py wrote, or a published one. While the default is not there, the
    # weights that torchvision trained on COCO are downloaded once (136 MB) and detect 80 classes.
    checkpoint: str = './checkpoint_ssd300.pth.tar'
    # Images that the network sees at a time; none: 32 on a GPU, 4 on a CPU.
    batch_size: int | None = None

    # --- what is drawn and reported ---

    # Detections below this score are left out. 0.2 suits the eye; evaluation's 0.01 shows what
    # the model holds possible.
    min_score: float = 0.2
    # Of two boxes of a class that overlap more than this, the one with the lower score goes.
    max_overlap: float = 0.5
    # At most this many a picture.
    top_k: int = 200
    # Names of the only classes that count; none: all.
    classes: tuple[str, ...] = ()
    # Names of classes that are left out.
    suppress: tuple[str, ...] = ()

    # --- bookkeeping ---

    # A file for one image and a name that ends like an image's, or one video and a video's; else
    # a folder.
    output: str = './detections'
    # A JSON file for what was found: file, boxes in pixels, labels, scores; of a video also the
    # frame's number and its time in seconds.
    json: str | None = None
    # cpu, cuda, cuda:1, ...; auto is the GPU where there is one.
    device: str = 'auto'


# --------------------------------------------------------------------------------------------------
# From Python
# --------------------------------------------------------------------------------------------------


def load_model(path):
    """The model of a checkpoint; in place of the default one that is not there, COCO's."""
    try:
        return SSD300.from_checkpoint(path)
    except UserError:
        if path != Parameters.checkpoint or pathlib.Path(path).exists():
            raise
    print(f'{path} is not there, so these are the weights that torchvision trained on COCO',
          file=sys.stderr)
    return coco_model()


@functools.cache
def default_model():
    """The model of the parameters' default checkpoint, loaded at the first call and kept."""
    model = load_model(Parameters.checkpoint)
    return model.to(choose_device(Parameters.device), memory_format=torch.channels_last)


def choose_batch_size(model):
    """How many images at a time suit a model's device."""
    return BATCH_SIZE if model.priors_cxcy.is_cuda else min(BATCH_SIZE, BATCH_SIZE_CPU)


def wanted_classes(label_map, classes, suppress):
    """The names that count: `classes` (none: all) without those to suppress.

    Raises:
        UserError: a name that is no class of the model.
    """
    names = [name for name, number in label_map.items() if number != 0]
    unknown = (set(classes or ()) | set(suppress or ())) - set(names)
    if unknown:
        raise UserError(f'no class is named {", ".join(sorted(unknown))}; the model has '
                        f'{", ".join(names)}')
    return set(classes or names) - set(suppress or ())


def shrink(image):
    """What the network takes of a PIL image, (3, 300, 300) uint8, and the upright image's size."""
    upright = make_upright(image)
    nothing = torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64), torch.zeros(0).bool()
    return transform(upright, *nothing, 'TEST')[0], upright.size


@torch.no_grad()
def predict(images, min_score=0.2, max_overlap=0.5, top_k=200, model=None, batch_size=None,
            classes=None, suppress=None):
    """Find objects on images, as numbers.

    Args:
        images: list of PIL images of any mode and size; their EXIF orientation is respected.
        min_score, max_overlap, top_k: see `SSD300.detect_objects`.
        model: an SSD300 in evaluation mode; None loads the default checkpoint once.
        batch_size: images that the network sees at a time; None: 32 on a GPU, 4 on a CPU.
        classes, suppress: names of the only classes that count (none: all), and of others.

    Returns:
        For each image {'boxes': (n, 4) corners in pixels of the upright image, 'labels': [names],
        'scores': (n,)}, by falling score, on the CPU.

    Raises:
        UserError: a name that is no class of the model.
    """
    assert not isinstance(images, Image.Image), 'a list of images is wanted: predict([image])'
    model = default_model() if model is None else model
    size = batch_size or choose_batch_size(model)
    if len(images) > size:
        return [prediction for start in range(0, len(images), size) for prediction in predict(
            images[start:start + size], min_score, max_overlap, top_k, model, size, classes,
            suppress)]
    wanted = wanted_classes(model.label_map, classes, suppress)
    if len(images) == 0:
        return []
    inputs, sizes = zip(*map(shrink, images))
    batch = torch.stack(inputs).to(model.priors_cxcy.device)        # (N, 3, 300, 300)
    # Classes that do not count take no place among the best top_k.
    all_count = len(wanted) == len(model.label_map) - 1
    detections = model.detect_objects(*model(model.normalize(batch)), min_score, max_overlap,
                                      top_k if all_count else sys.maxsize)
    names = {number: name for name, number in model.label_map.items()}
    predictions = []
    for (width, height), boxes, labels, scores in zip(sizes, *detections):
        labels = [names[number] for number in labels.tolist()]
        kept = [i for i, name in enumerate(labels) if name in wanted][:top_k]
        predictions.append({
            'boxes': boxes.cpu()[kept] * torch.tensor([width, height, width, height]),
            'labels': [labels[i] for i in kept],
            'scores': scores.cpu()[kept]})
    return predictions


def detect(original_image, min_score=0.2, max_overlap=0.5, top_k=200, suppress=None, model=None,
           classes=None):
    """Find objects on an image and draw them: `detect(Image.open('photo.jpg')).show()`.

    Args:
        original_image: PIL image of any mode and size; it stays as it is.
        min_score, max_overlap, top_k: see `SSD300.detect_objects`.
        suppress, classes: names of classes not to draw, and of the only ones to draw.
        model: an SSD300 in evaluation mode; None loads the default checkpoint once.

    Returns:
        A new PIL image, RGB and upright, with a box and a label for each object.

    Raises:
        UserError: a name that is no class of the model.
    """
    model = default_model() if model is None else model
    prediction, = predict([original_image], min_score, max_overlap, top_k, model, None, classes,
                          suppress)
    annotated = make_upright(original_image)
    draw_objects(annotated, prediction, distinct_colors(model.label_map), ())
    return annotated


def draw_objects(image, prediction, colors, suppress):
    """Draw boxes and labels onto an image, the best detection last and so on top."""
    draw = ImageDraw.Draw(image)
    # A thirtieth of the shorter side can be read at any size that is looked at as a whole.
    height = max(10, round(min(image.size) / 30))
    font = ImageFont.load_default(height)  # Pillow's own, so it is always there
    line = max(1, round(height / 6))
    objects = list(zip(prediction['boxes'].tolist(), prediction['labels'],
                       prediction['scores'].tolist()))
    for (x_min, y_min, x_max, y_max), name, score in reversed(objects):
        if name in suppress:
            continue
        color = colors[name]
        draw.rectangle((x_min, y_min, max(x_min, x_max - 1), max(y_min, y_max - 1)),
                       outline=color, width=line)
        # The label stands on the box, or inside it where there is no room above, and is moved
        # to the left where it would leave the image.
        text = f'{name} {score:.2f}'
        _, _, width, _ = font.getbbox(text)
        x = max(0, min(x_min, image.width - width - 2 * line))
        y = y_min - 1.3 * height if y_min >= 1.3 * height else y_min
        draw.rectangle((x, y, x + width + 2 * line, y + 1.3 * height), fill=color)
        red, green, blue = ImageColor.getrgb(color)
        bright = 0.299 * red + 0.587 * green + 0.114 * blue > 128
        draw.text((x + line, y), text, fill='black' if bright else 'white', font=font)


# --------------------------------------------------------------------------------------------------
# The command line
# --------------------------------------------------------------------------------------------------


def complain(message):
    """One line of what went wrong, above the progress bar."""
    tqdm.write(message, file=sys.stderr)


def annotate_images(paths, outputs, find, draw, report, batch_size, stopped):
    """Annotate image files, read and written by threads; returns how many could not be read."""
    n_failed = 0
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool, tqdm(
            total=len(paths), unit='image', disable=len(paths) < 2) as progress:
        images = read_ahead(pool, read_image, paths, n_ahead=batch_size)
        for batch in in_batches(zip(paths, outputs, images), batch_size):
            for path, _, error in batch:
                if isinstance(error, Exception):
                    complain(f'{path}: cannot be read ({error}); passed over')
                    n_failed += 1
            good = [item for item in batch if isinstance(item[2], Image.Image)]
            written = []
            for (path, output, image), found in zip(good, find([image for *_, image in good])):
                report(path, found)
                draw(image, found)
                written.append((path, output, pool.submit(save_image, image, output)))
            for path, output, future in written:
                future.result()
                tqdm.write(f'{path} -> {output}')
            progress.update(len(batch))
            if stopped.is_set():
                break
    return n_failed


def annotate_video(path, output, find, draw, report, batch_size, stopped):
    """Annotate a video or what a camera sees; the number of what went wrong is returned: 0 or 1."""
    camera = is_camera(path)
    n_frames, note = 0, None
    try:
        with VideoReader(int(path) if camera else path) as reader, write_beside(output) as beside:
            with VideoWriter(beside, reader) as writer, tqdm(
                    total=reader.n_frames, unit='frame', desc=str(path)) as progress:
                # What a camera sees is worth most at once, and waits for no batch.
                for frames in in_batches(reader, 1 if camera else batch_size):
                    for frame, found in zip(frames, find([frame.image for frame in frames])):
                        report(path, found, frame=frame.number, time=round(frame.time, 6))
                        draw(frame.image, found)
                        writer.write(frame)
                    n_frames += len(frames)
                    progress.update(len(frames))
                    if stopped.is_set():
                        break
            note, problem, n_broken = writer.note, reader.problem, reader.n_broken
    except UserError as error:
        complain(f'{path}: {error}; passed over')
        return 1
    tqdm.write(f'{path} -> {output}, {n_frames} frames{", " + note if note else ""}')
    if n_broken:
        complain(f'{path}: {n_broken} frames are broken; passed over')
    if problem:
        complain(f'{path}: cannot be read to its end ({problem}); ends after {n_frames} frames')
    return int(bool(n_broken or problem))


@exit_on_user_error
def main(parameters):
    """Annotate all inputs; one that cannot be read is named and passed over."""
    p = parameters
    if not p.inputs:
        raise UserError('no input was named; give one or more images, videos or folders')
    check_at_least(1, batch_size=1 if p.batch_size is None else p.batch_size, top_k=p.top_k)
    model = load_model(p.checkpoint)
    model = model.to(choose_device(p.device), memory_format=torch.channels_last)
    wanted_classes(model.label_map, p.classes, p.suppress)  # a slip in the names shows now
    inputs, problems = expand_inputs(p.inputs)
    outputs = choose_outputs(inputs, p.output) if inputs else []
    check_outputs(inputs, outputs + ([pathlib.Path(p.json)] if p.json else []))
    if p.json:
        make_folder(pathlib.Path(p.json).parent)
    for problem in problems:
        complain(problem)

    batch_size = p.batch_size or choose_batch_size(model)
    find = functools.partial(predict, min_score=p.min_score, max_overlap=p.max_overlap,
                             top_k=p.top_k, model=model, batch_size=batch_size,
                             classes=p.classes, suppress=p.suppress)
    draw = functools.partial(draw_objects, colors=distinct_colors(model.label_map), suppress=())
    pairs = list(zip(inputs, outputs))
    images = [pair for pair in pairs if not is_video(pair[0])]
    videos = [pair for pair in pairs if is_video(pair[0])]
    n_failed = len(problems)
    with signals_as_flag() as stopped, json_report(p.json) as report:
        rest = find, draw, report, batch_size, stopped
        if images:
            n_failed += annotate_images(*zip(*images), *rest)
        for path, output in videos:
            if not stopped.is_set():
                n_failed += annotate_video(path, output, *rest)
    if stopped.is_set() and not any(is_camera(path) for path in inputs):
        raise UserError('interrupted; what was done until then has been written')
    if n_failed:
        n_inputs = len(inputs) + len(problems)
        raise UserError(f'{n_failed} of {n_inputs} inputs could not be read in full')


if __name__ == '__main__':
    main(tyro.cli(Parameters))
