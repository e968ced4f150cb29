"""Find objects on images, from the command line or from Python.

    python detect.py photo.jpg --output annotated.jpg

    from detect import detect
    detect(Image.open('photo.jpg'), min_score=0.2, max_overlap=0.5, top_k=200).show()
"""

import dataclasses
import functools
import pathlib
import sys

import torch
import tyro
from PIL import Image, ImageColor, ImageDraw, ImageFont, ImageOps
from tqdm import tqdm

from datasets import transform
from machine import choose_device
from model import SSD300
from published import coco_model
from utils import (
    IMAGE_ERRORS,
    IMAGE_SUFFIXES,
    UserError,
    distinct_colors,
    exit_on_user_error,
    make_folder,
    to_rgb,
    write_beside,
)


@dataclasses.dataclass
class Parameters:
    """Draw the objects that SSD300 finds on images."""

    # Image files.
    inputs: tyro.conf.Positional[tuple[str, ...]]

    # --- model ---

    # The checkpoint that train.py wrote, or a published one. While the default is not there, the
    # weights that torchvision trained on COCO are downloaded once (136 MB) and detect 80 classes.
    checkpoint: str = './checkpoint_ssd300.pth.tar'

    # --- what is drawn ---

    # Detections below this score are not drawn. 0.2 suits the eye; evaluation's 0.01 shows what
    # the model holds possible.
    min_score: float = 0.2
    # Of two boxes of a class that overlap more than this, the one with the lower score goes.
    max_overlap: float = 0.5
    # At most this many a picture.
    top_k: int = 200
    # Names of classes that are not drawn.
    suppress: tuple[str, ...] = ()

    # --- bookkeeping ---

    # A file for one image and a name that ends like an image's; else a folder.
    output: str = './detections'
    # cpu, cuda, cuda:1, ...; auto is the GPU where there is one.
    device: str = 'auto'


BATCH_SIZE = 32  # images that the network sees at a time


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


@torch.no_grad()
def predict(images, min_score=0.2, max_overlap=0.5, top_k=200, model=None):
    """Find objects on images, as numbers.

    Args:
        images: list of PIL images of any mode and size; their EXIF orientation is respected.
        min_score, max_overlap, top_k: see `SSD300.detect_objects`.
        model: an SSD300 in evaluation mode; None loads the default checkpoint once.

    Returns:
        For each image {'boxes': (n, 4) corners in pixels of the upright image, 'labels': [names],
        'scores': (n,)}, by falling score, on the CPU.
    """
    if len(images) > BATCH_SIZE:
        return [prediction for start in range(0, len(images), BATCH_SIZE) for prediction in predict(
            images[start:start + BATCH_SIZE], min_score, max_overlap, top_k, model)]
    if len(images) == 0:
        return []
    model = default_model() if model is None else model
    device = model.priors_cxcy.device
    upright = [to_rgb(ImageOps.exif_transpose(image)) for image in images]
    nothing = torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64), torch.zeros(0).bool()
    batch = torch.stack([transform(image, *nothing, 'TEST')[0] for image in upright])

    predictions = model(model.normalize(batch.to(device)))
    detections = model.detect_objects(*predictions, min_score, max_overlap, top_k)
    names = {number: name for name, number in model.label_map.items()}
    return [{'boxes': boxes.cpu() * torch.tensor([*image.size, *image.size]),
             'labels': [names[number] for number in labels.tolist()],
             'scores': scores.cpu()}
            for image, boxes, labels, scores in zip(upright, *detections)]


def detect(original_image, min_score=0.2, max_overlap=0.5, top_k=200, suppress=None, model=None):
    """Find objects on an image and draw them.

    Args:
        original_image: PIL image of any mode and size; it stays as it is.
        min_score, max_overlap, top_k: see `SSD300.detect_objects`.
        suppress: names of classes not to draw.
        model: an SSD300 in evaluation mode; None loads the default checkpoint once.

    Returns:
        A new PIL image, RGB and upright, with a box and a label for each object.

    Raises:
        UserError: a name to suppress that is no class of the model.
    """
    model = default_model() if model is None else model
    unknown = set(suppress or ()) - set(model.label_map)
    if unknown:
        raise UserError(f'no class is named {", ".join(sorted(unknown))}; the model has '
                        f'{", ".join(list(model.label_map)[1:])}')
    prediction, = predict([original_image], min_score, max_overlap, top_k, model)
    annotated = to_rgb(ImageOps.exif_transpose(original_image))
    annotated.info.clear()  # it is upright now, and no orientation tag must turn it again
    draw_objects(annotated, prediction, distinct_colors(model.label_map), suppress or ())
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


def choose_outputs(inputs, output):
    """Where the annotated version of each input goes: a list of paths, no two the same."""
    output = pathlib.Path(output)
    if len(inputs) == 1 and output.suffix.lower() in IMAGE_SUFFIXES and not output.is_dir():
        make_folder(output.parent)
        return [output]
    make_folder(output)
    outputs = []
    for path in map(pathlib.Path, inputs):
        suffix = path.suffix if path.suffix.lower() in IMAGE_SUFFIXES else '.png'
        candidate, number = output / f'{path.stem}{suffix}', 1
        while candidate in outputs:
            number += 1
            candidate = output / f'{path.stem}_{number}{suffix}'
        outputs.append(candidate)
    return outputs


def check_outputs(inputs, outputs):
    """A UserError if an output would replace an input."""
    replaced = {pathlib.Path(path).resolve() for path in inputs} & {p.resolve() for p in outputs}
    if replaced:
        raise UserError(f'{replaced.pop()} would be replaced by its annotated version; give '
                        f'another --output')


@exit_on_user_error
def main(parameters):
    """Annotate all inputs; one that cannot be read is named and passed over."""
    p = parameters
    if not p.inputs:
        raise UserError('no image was named; give one or more files')
    model = load_model(p.checkpoint)
    model = model.to(choose_device(p.device), memory_format=torch.channels_last)
    outputs = choose_outputs(p.inputs, p.output)
    check_outputs(p.inputs, outputs)
    n_failed = 0
    for path, output in zip(tqdm(p.inputs, unit='image', disable=len(p.inputs) == 1), outputs):
        try:
            with Image.open(path) as image:
                annotated = detect(image, p.min_score, p.max_overlap, p.top_k, p.suppress, model)
        except UserError:
            raise
        except IMAGE_ERRORS as error:
            tqdm.write(f'{path}: cannot be read ({error}); passed over', file=sys.stderr)
            n_failed += 1
            continue
        with write_beside(output) as beside:
            annotated.save(beside)
        tqdm.write(f'{path} -> {output}')
    if n_failed:
        raise UserError(f'{n_failed} of {len(p.inputs)} inputs could not be read')


if __name__ == '__main__':
    main(tyro.cli(Parameters))
