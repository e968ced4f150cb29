"""The files that detect.py reads and writes: inputs, outputs, the JSON report, and images.

Videos are read and written by support/video.py.
"""

import contextlib
import glob
import io
import itertools
import json
import logging
import os
import pathlib
import sys
import urllib.parse
import warnings

from PIL import ExifTags, Image
from tqdm import tqdm

from support.errors import BrokenImageError, UserError, atomic_write, make_folder
from utils import IMAGE_SUFFIXES, open_image, read_image_size, to_rgb

# Videos that are read, and those that are written (see `ENCODERS` in support/video.py).
VIDEO_SUFFIXES = ('.mp4', '.mkv', '.mov', '.avi', '.webm', '.m4v', '.mpg', '.mpeg', '.wmv', '.flv',
                  '.ts', '.mts', '.m2ts', '.3gp', '.ogv')
OUTPUT_VIDEO_SUFFIXES = ('.mp4', '.mkv', '.mov', '.avi', '.m4v', '.webm')

# Network streams that are read (see `WHITELISTS` in support/video.py).
STREAM_PREFIXES = ('http://', 'https://', 'rtsp://', 'rtsps://', 'rtmp://', 'rtmps://')

# --------------------------------------------------------------------------------------------------
# Inputs and outputs
# --------------------------------------------------------------------------------------------------


def expand_inputs(inputs):
    """List the files for names of files, folders and patterns; cameras, URLs and - stay as they
    are.

    Returns:
        The inputs, each once, and a list of messages about folders and patterns without any file.
    """
    paths, problems = {}, []
    for name in inputs:
        matches = [name]
        if os.path.isdir(name):
            matches = sorted(str(path) for path in pathlib.Path(name).iterdir())
        elif glob.has_magic(name) and not os.path.exists(name) and not is_stream(name):
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


def is_stream(name):
    """Return whether an input is the URL of a network stream."""
    return str(name).startswith(STREAM_PREFIXES)


def redact(source):
    """Return a URL without user, password, query and all that may hold them; other names as is."""
    scheme, separator, rest = source.partition('://')
    if not separator:
        return source
    # A password may hold any character: what is after the last @ cannot be part of it.
    host, *folders = rest.rpartition('@')[2].partition('?')[0].partition('#')[0].split('/')
    return '/'.join([f'{scheme}://{host}', *(name for name in folders if '=' not in name)])


def is_live(name):
    """Return whether an input is a camera or a network stream, whose frames are handled one by one.
    """
    return is_camera(str(name)) or is_stream(name)


def is_video(name):
    """Return whether an input is a video, a camera or a network stream."""
    return is_live(name) or pathlib.Path(name).suffix.lower() in VIDEO_SUFFIXES


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
            raise UserError(f'{output}: {redact(str(inputs[0]))} cannot be written as {suffix}; '
                            f'give one of {" ".join(suffixes)}')
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
    if is_stream(name):
        try:
            parts = urllib.parse.urlsplit(redact(name))
            path = pathlib.Path(parts.path.strip('/') or parts.hostname or 'stream')
        except ValueError:  # rtsp://[camera/
            path = pathlib.Path('stream')
    else:
        path = pathlib.Path({'-': 'stdin'}.get(name, f'camera_{name}' if is_camera(name) else name))
    suffixes, default = ((OUTPUT_VIDEO_SUFFIXES, '.mp4') if is_video(name) else
                         (IMAGE_SUFFIXES, '.png'))
    suffix = path.suffix if path.suffix.lower() in suffixes else default
    yield f'{path.stem}{suffix}'
    for number in itertools.count(2):
        yield f'{path.stem}_{number}{suffix}'


def check_outputs(inputs, outputs):
    """Raise a UserError if an output is a folder, or would replace an input or another output."""
    for path in outputs:
        if path.is_dir():
            raise UserError(f'{path} is a folder; give the name of a file')
    resolved = [path.resolve() for path in outputs]
    if len({*resolved}) < len(resolved):
        raise UserError('--output and --json would write the same file; give two names')
    replaced = {pathlib.Path(path).resolve() for path in inputs} & {*resolved}
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
            """Write a row: file, `more` (a frame's number and time), boxes, labels and scores."""
            nonlocal separator
            row = {'file': str(file), **more, 'boxes': prediction['boxes'].tolist(),
                   'labels': prediction['labels'], 'scores': prediction['scores'].tolist()}
            json_file.write(f'{separator}\n{json.dumps(row)}')
            separator = ','

        yield add_to_report
        json_file.write('[]\n' if separator == '[' else '\n]\n')
        json_file.close()  # before it is renamed


def print_line(text, file=None):
    """Print a line above the progress bar; what is not printable in a file's name is escaped."""
    tqdm.write(''.join(char if char.isprintable() else char.encode('unicode_escape').decode()
                       for char in text), file=file)


def print_error(text):
    """Print a line as `print_line()`, to standard error."""
    print_line(text, sys.stderr)


# --------------------------------------------------------------------------------------------------
# Images
# --------------------------------------------------------------------------------------------------

# Memory for the decoded images of a batch. While objects are detected in it, the next one is read.
MAX_BATCH_BYTES = 2 ** 29


def limit_pixels(max_pixels):
    """Make Pillow refuse larger images, and print none of its warnings about damaged files.

    Otherwise it warns above `Image.MAX_IMAGE_PIXELS`, and refuses above twice as many.
    """
    Image.MAX_IMAGE_PIXELS = max_pixels
    warnings.filterwarnings('ignore', module='PIL')
    warnings.simplefilter('error', Image.DecompressionBombWarning)
    logging.getLogger('PIL').setLevel(logging.CRITICAL)


# What makes an image of an EXIF orientation upright; 1 is upright.
TRANSPOSES = {2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180,
              4: Image.Transpose.FLIP_TOP_BOTTOM, 5: Image.Transpose.TRANSPOSE,
              6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE,
              8: Image.Transpose.ROTATE_90}


def read_orientation(image):
    """Read the EXIF orientation of a PIL image; None without one, or if the EXIF data are invalid.

    `ImageOps.exif_transpose()` would raise an error if any other of these data are invalid.
    """
    with contextlib.suppress(Exception):
        return image.getexif().get(ExifTags.Base.Orientation)


def make_upright(image):
    """Return an RGB copy of a PIL image, rotated by its EXIF orientation.

    Of its metadata only the color profile is kept.
    """
    upright = to_rgb(image)     # loads it, which applies the orientation of a TIFF and removes it
    transpose = TRANSPOSES.get(read_orientation(image))
    upright = upright if transpose is None else upright.transpose(transpose)
    profile = image.info.get('icc_profile') if image.mode in ('RGB', 'RGBA') else None
    # In a corrupt TIFF it can be of any type.
    upright.info = {'icc_profile': profile} if isinstance(profile, bytes) else {}
    return upright


def try_read_image(path):
    """Read an image file (-: standard input), upright and RGB, or return the error that occurred.
    """
    file = io.BytesIO(sys.stdin.buffer.read()) if path == '-' else path
    try:
        return open_image(file, make_upright)
    except BrokenImageError as error:
        reason = error.__cause__
        if isinstance(reason, (Image.DecompressionBombError, Image.DecompressionBombWarning)):
            return UserError(f'more than {Image.MAX_IMAGE_PIXELS} pixels; see --max-pixels')
        return reason


def save_image(image, output):
    """Write an image file, whole or not at all."""
    with atomic_write(output) as temporary:
        try:
            # PNG and TIFF keep the color profile without this, JPEG and WebP do not.
            image.save(temporary, quality=90, icc_profile=image.info.get('icc_profile'))
        except ValueError as error:     # too large for the format
            raise UserError(f'{output} cannot be written ({error}); choose another suffix'
                            ) from error


def read_batches(pool, paths, size):
    """Read image files in batches; while one is in use, the pool reads the next one.

    Args:
        paths: list of (input, output)
        size: of the batches, see `in_batches()`.

    Yields:
        Lists of ((input, output), image or error). Each is emptied before the next one is yielded,
        so that never more than two batches are in memory.
    """
    def submit(batch):
        """Let the pool read a batch."""
        return [(pair, pool.submit(try_read_image, pair[0])) for pair in batch]

    batches = map(submit, in_batches(paths, size, lambda pair: try_read_size(pair[0])))
    ahead = next(batches, [])
    while ahead:
        futures, ahead = ahead, next(batches, [])
        images = [(pair, future.result()) for pair, future in futures]
        futures.clear()     # they hold the images, too
        yield images
        images.clear()


def try_read_size(path):
    """Return width and height of an image file, by its header; zeros if that cannot be read."""
    try:
        return read_image_size(path)
    except BrokenImageError:
        return 0, 0


def in_batches(items, size, get_image_size=lambda image: image.size):
    """Yield lists of up to `size` items, whose images need up to MAX_BATCH_BYTES.

    A larger image is a batch of its own.
    """
    batch, n_bytes = [], 0
    for item in items:
        width, height = get_image_size(item)
        image_bytes = 4 * width * height    # Pillow stores RGB in 4 bytes per pixel
        if batch and n_bytes + image_bytes > MAX_BATCH_BYTES:
            yield batch
            batch, n_bytes = [], 0
        batch.append(item)
        n_bytes += image_bytes
        if len(batch) == size:
            yield batch
            batch, n_bytes = [], 0
    if batch:
        yield batch
