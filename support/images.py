"""The files that detect.py reads and writes: inputs, outputs, the JSON report, and images.

Videos are read and written by support/video.py.
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

from support.errors import UserError, atomic_write, make_folder
from utils import IMAGE_ERRORS, IMAGE_SUFFIXES, to_rgb

# Videos that are read, and those that are written (see `ENCODERS` in support/video.py).
VIDEO_SUFFIXES = ('.mp4', '.mkv', '.mov', '.avi', '.webm', '.m4v', '.mpg', '.mpeg', '.wmv', '.flv',
                  '.ts', '.mts', '.m2ts', '.3gp', '.ogv')
OUTPUT_VIDEO_SUFFIXES = ('.mp4', '.mkv', '.mov', '.avi', '.m4v', '.webm')

# --------------------------------------------------------------------------------------------------
# Inputs and outputs
# --------------------------------------------------------------------------------------------------


def expand_inputs(inputs):
    """List the files for names of files, folders and patterns; cameras and - stay as they are.

    Returns:
        The inputs, each once, and a list of messages about folders and patterns without any file.
    """
    paths, problems = {}, []
    for name in inputs:
        matches = [name]
        if os.path.isdir(name):
            matches = sorted(str(path) for path in pathlib.Path(name).iterdir())
        elif glob.has_magic(name) and not os.path.exists(name):
            matches = sorted(glob.glob(name, recursive=True))
        if matches != [name]:
            matches = [path for path in matches if os.path.isfile(path)
                       and pathlib.Path(path).suffix.lower() in IMAGE_SUFFIXES + VIDEO_SUFFIXES]
        if not matches:
            problems.append(f'{name}: no image and no video there')
        paths |= dict.fromkeys(matches)
    return list(paths), problems


def is_camera(name):
    """Return whether an input is the number of a camera."""
    return name.isascii() and name.isdigit() and not os.path.exists(name)


def is_video(name):
    """Return whether an input is a video or a camera."""
    return is_camera(str(name)) or pathlib.Path(name).suffix.lower() in VIDEO_SUFFIXES


def choose_outputs(inputs, output):
    """Choose the path of each input's annotated version, no two the same, and make the folder.

    Args:
        inputs: paths, numbers of cameras, or - for standard input.
        output: a file, if there is one input and the name ends like one; else a folder.

    Raises:
        UserError: the input cannot be written in the format of the output's suffix.
    """
    output = pathlib.Path(output)
    suffix = output.suffix.lower()
    if len(inputs) == 1 and suffix in IMAGE_SUFFIXES + VIDEO_SUFFIXES and not output.is_dir():
        suffixes = OUTPUT_VIDEO_SUFFIXES if is_video(inputs[0]) else IMAGE_SUFFIXES
        if suffix not in suffixes:
            raise UserError(f'{output}: {inputs[0]} cannot be written as {suffix}; give one of '
                            f'{" ".join(suffixes)}')
        make_folder(output.parent)
        return [output]
    make_folder(output)
    outputs, taken = [], set()
    for name in map(str, inputs):
        candidates = (output / file_name for file_name in candidate_names(name))
        # a.jpg and A.jpg are the same file on some systems.
        path = next(path for path in candidates if str(path).lower() not in taken)
        taken.add(str(path).lower())
        outputs.append(path)
    return outputs


def candidate_names(name):
    """Yield file names for the annotated version of an input: a.jpg, a_2.jpg, a_3.jpg, ..."""
    path = pathlib.Path({'-': 'stdin'}.get(name, f'camera_{name}' if is_camera(name) else name))
    suffixes, default = ((OUTPUT_VIDEO_SUFFIXES, '.mp4') if is_video(name) else
                         (IMAGE_SUFFIXES, '.png'))
    suffix = path.suffix if path.suffix.lower() in suffixes else default
    yield f'{path.stem}{suffix}'
    for number in itertools.count(2):
        yield f'{path.stem}_{number}{suffix}'


def check_outputs(inputs, outputs):
    """Raise a UserError if an output would replace an input."""
    replaced = ({pathlib.Path(path).resolve() for path in inputs}
                & {path.resolve() for path in outputs})
    if replaced:
        raise UserError(f'{replaced.pop()} would be replaced by its annotated version; give '
                        f'another --output')


@contextlib.contextmanager
def json_report(path):
    """Yield a function that adds the prediction of an image or a frame to a JSON file.

    Each row is written at once, since those of a long video would not fit into memory. Without a
    path nothing is written.
    """
    if path is None:
        yield lambda file, prediction, **more: None
        return
    with atomic_write(path) as temporary, open(temporary, 'w', encoding='utf-8') as json_file:
        separator = '['

        def add_to_report(file, prediction, **more):
            """Write a row: the file, what `more` says of the frame, boxes, labels and scores."""
            nonlocal separator
            row = {'file': str(file), **more, 'boxes': prediction['boxes'].tolist(),
                   'labels': prediction['labels'], 'scores': prediction['scores'].tolist()}
            json_file.write(f'{separator}\n{json.dumps(row)}')
            separator = ','

        yield add_to_report
        json_file.write('[]\n' if separator == '[' else '\n]\n')
        json_file.close()  # before it is renamed


# --------------------------------------------------------------------------------------------------
# Images
# --------------------------------------------------------------------------------------------------


def make_upright(image):
    """Return an RGB copy of a PIL image, rotated by its EXIF orientation.

    Of its metadata only the color profile is kept.
    """
    upright = to_rgb(ImageOps.exif_transpose(image))
    profile = image.info.get('icc_profile') if image.mode in ('RGB', 'RGBA') else None
    upright.info = {'icc_profile': profile} if profile else {}
    return upright


def try_read_image(path):
    """Read an image file (-: standard input), upright and RGB, or return the error that occurred.
    """
    try:
        with Image.open(io.BytesIO(sys.stdin.buffer.read()) if path == '-' else path) as image:
            return make_upright(image)
    except IMAGE_ERRORS as error:
        return error


def save_image(image, output):
    """Write an image file, whole or not at all."""
    with atomic_write(output) as temporary:
        image.save(temporary, quality=90)


def read_ahead(pool, function, items, n_ahead):
    """Yield function(item) for each item, in order; `n_ahead` more are in work in the pool."""
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
