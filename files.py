"""The files that detect.py reads and writes: which they are, and how they come and go.

Nothing in here knows about the network.
"""

import collections
import contextlib
import glob
import io
import itertools
import json
import os
import pathlib
import sys

from PIL import Image, ImageOps

from utils import (
    IMAGE_ERRORS,
    IMAGE_SUFFIXES,
    UserError,
    make_folder,
    to_rgb,
    write_beside,
)
from video import ENCODERS, VIDEO_SUFFIXES


def is_camera(name):
    """Whether an input is the number of a camera."""
    return name.isascii() and name.isdigit() and not os.path.exists(name)


def is_video(name):
    """Whether an input is a video or a camera."""
    return is_camera(str(name)) or pathlib.Path(name).suffix.lower() in VIDEO_SUFFIXES


def expand_inputs(inputs):
    """Files, cameras and - for what was asked for, each once, and a list of what has no file."""
    paths, problems = {}, []
    for name in inputs:
        found = [name]
        if os.path.isdir(name):
            found = sorted(str(path) for path in pathlib.Path(name).iterdir())
        elif glob.has_magic(name) and not os.path.exists(name):
            found = sorted(glob.glob(name, recursive=True))
        if found != [name]:
            found = [path for path in found if os.path.isfile(path)
                     and pathlib.Path(path).suffix.lower() in IMAGE_SUFFIXES + VIDEO_SUFFIXES]
        if not found:
            problems.append(f'{name}: no image and no video there')
        paths |= dict.fromkeys(found)
    return list(paths), problems


def choose_outputs(inputs, output):
    """Where the annotated version of each input goes: a list of paths, no two the same."""
    output = pathlib.Path(output)
    suffix = output.suffix.lower()
    if len(inputs) == 1 and suffix in IMAGE_SUFFIXES + VIDEO_SUFFIXES and not output.is_dir():
        suffixes = tuple(ENCODERS) if is_video(inputs[0]) else IMAGE_SUFFIXES
        if suffix not in suffixes:
            raise UserError(f'{output}: {inputs[0]} cannot be written as {suffix}; give one of '
                            f'{" ".join(suffixes)}')
        make_folder(output.parent)
        return [output]
    make_folder(output)
    outputs, taken = [], set()
    for name in map(str, inputs):
        path = pathlib.Path({'-': 'stdin'}.get(name, f'camera_{name}' if is_camera(name) else name))
        known, other = (ENCODERS, '.mp4') if is_video(name) else (IMAGE_SUFFIXES, '.png')
        suffix = path.suffix if path.suffix.lower() in known else other
        candidate, number = output / f'{path.stem}{suffix}', 1
        while str(candidate).lower() in taken:  # a.jpg and A.jpg are one file on some systems
            number += 1
            candidate = output / f'{path.stem}_{number}{suffix}'
        taken.add(str(candidate).lower())
        outputs.append(candidate)
    return outputs


def check_outputs(inputs, outputs):
    """A UserError if an output would replace an input."""
    replaced = {pathlib.Path(path).resolve() for path in inputs} & {p.resolve() for p in outputs}
    if replaced:
        raise UserError(f'{replaced.pop()} would be replaced by its annotated version; give '
                        f'another --output')


@contextlib.contextmanager
def json_report(path):
    """Within the block, a function that adds an image's or a frame's prediction to a JSON file."""
    if path is None:
        yield lambda file, prediction, **more: None
        return
    with write_beside(path) as beside, open(beside, 'w', encoding='utf-8') as file_object:
        separator = '['

        def report(file, prediction, **more):
            """Write an element of the list at once: a long video would not fit into memory."""
            nonlocal separator
            row = {'file': str(file), **more, 'boxes': prediction['boxes'].tolist(),
                   'labels': prediction['labels'], 'scores': prediction['scores'].tolist()}
            file_object.write(f'{separator}\n{json.dumps(row)}')
            separator = ','

        yield report
        file_object.write('[]\n' if separator == '[' else '\n]\n')
        file_object.close()  # before it is renamed


def make_upright(image):
    """An RGB copy of a PIL image as it is looked at; only its colour profile goes with it."""
    upright = to_rgb(ImageOps.exif_transpose(image))
    profile = image.info.get('icc_profile') if image.mode in ('RGB', 'RGBA') else None
    upright.info = {'icc_profile': profile} if profile else {}
    return upright


def read_ahead(pool, function, items, n_ahead):
    """Yield function(item) for each item, in order, up to `n_ahead` of them done in advance."""
    futures = collections.deque()
    for item in items:
        futures.append(pool.submit(function, item))
        if len(futures) > n_ahead:
            yield futures.popleft().result()
    while futures:
        yield futures.popleft().result()


def in_batches(items, size):
    """Yield lists of up to `size` items."""
    items = iter(items)
    while batch := list(itertools.islice(items, size)):
        yield batch


def read_image(path):
    """An image file (-: standard input), upright and RGB, or the error where there is none."""
    try:
        with Image.open(io.BytesIO(sys.stdin.buffer.read()) if path == '-' else path) as image:
            return make_upright(image)
    except IMAGE_ERRORS as error:
        return error


def save_image(image, output):
    """Write an image file, whole or not at all."""
    with write_beside(output) as beside:
        image.save(beside, quality=90)
