"""Fixtures that several test files use."""

import contextlib
import functools
import http.server
import io
import itertools
import os
import pathlib
import random
import threading

import pytest
import torch
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode


@pytest.fixture(autouse=True)
def seed():
    """Start every test with the same random numbers."""
    torch.manual_seed(0)
    random.seed(0)


@pytest.fixture(scope='session')
def sample_data():
    """Return the folder of real annotated images; skip the test where it is not given."""
    folder = os.environ.get('SSD_SAMPLE_DATA')
    if not folder:
        pytest.skip('SSD_SAMPLE_DATA is not set')
    return pathlib.Path(folder).resolve()


# --------------------------------------------------------------------------------------------------
# Data in VOC layout
# --------------------------------------------------------------------------------------------------


@pytest.fixture(scope='session')
def annotation():
    """Return a function that writes objects as the XML of a VOC annotation.

    Objects are (name, (xmin, ymin, xmax, ymax)[, difficult]).
    """
    def make(objects, size=(64, 48)):
        parts = [f'<annotation><size><width>{size[0]}</width><height>{size[1]}</height></size>']
        for name, box, *difficult in objects:
            corners = ''.join(f'<{tag}>{value}</{tag}>'
                              for tag, value in zip(('xmin', 'ymin', 'xmax', 'ymax'), box))
            flag = f'<difficult>{int(difficult[0])}</difficult>' if difficult else ''
            parts.append(f'<object><name>{name}</name>{flag}<bndbox>{corners}</bndbox></object>')
        return ''.join(parts) + '</annotation>'
    return make


@pytest.fixture
def make_voc(tmp_path, annotation):
    """Return a function that writes a folder in VOC layout.

    `make_voc({'train': {'a': [('cat', (1, 1, 10, 10))]}})` writes the split `train` with the image
    a.jpg, and returns the folder.
    """
    def make(splits, name='voc', size=(64, 48)):
        root = tmp_path / name
        for part in ('JPEGImages', 'Annotations', 'ImageSets/Main'):
            (root / part).mkdir(parents=True, exist_ok=True)
        for split, images in splits.items():
            (root / 'ImageSets' / 'Main' / f'{split}.txt').write_text('\n'.join(images) + '\n')
            for number, (stem, objects) in enumerate(images.items()):
                Image.new('RGB', size, (40 * number % 256, 90, 160)).save(
                    root / 'JPEGImages' / f'{stem}.jpg')
                (root / 'Annotations' / f'{stem}.xml').write_text(annotation(objects, size))
        return root
    return make


# --------------------------------------------------------------------------------------------------
# Operations that wait for a GPU
# --------------------------------------------------------------------------------------------------


class WaitRecorder(TorchDispatchMode):
    """Record what would make the CPU wait for a GPU: whatever needs the values of a tensor.

    Attributes:
        waits: names of these operations, and of methods such as `Tensor.tolist` that on a CPU need
            no operation.
        n_calls: number of all operations.
    """

    OPERATIONS = {
        '_local_scalar_dense', 'item', 'equal', 'is_nonzero', 'nonzero', 'masked_select',
        'bincount', '_unique', '_unique2', 'unique_consecutive', 'unique_dim',
        'lift_fresh',   # copies a Python number to the GPU: x[i] = 0, torch.tensor(0)
    }
    METHODS = ('item', 'cpu', 'tolist', 'numpy', '__array__', '__bool__', '__float__', '__int__',
               '__index__')

    def __init__(self):
        super().__init__()
        self.waits, self.n_calls = [], 0
        self.patch = pytest.MonkeyPatch()

    def __enter__(self):
        thread = threading.get_ident()
        for name in self.METHODS:
            original = getattr(torch.Tensor, name)

            def method(tensor, *args, name=name, original=original, **kwargs):
                if threading.get_ident() == thread:     # not in a thread that loads data
                    self.waits.append(f'Tensor.{name}')
                return original(tensor, *args, **kwargs)
            self.patch.setattr(torch.Tensor, name, method)
        return super().__enter__()

    def __exit__(self, *error):
        self.patch.undo()
        return super().__exit__(*error)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = str(func).split('.')[1]      # 'index_put_' of 'aten.index_put_.default'
        # The number of values that a mask selects, and the length of a repeated tensor.
        by_mask = 'index' in name and any(
            isinstance(index, torch.Tensor) and index.dtype in (torch.bool, torch.uint8)
            for indices in args if isinstance(indices, (list, tuple)) for index in indices)
        of_unknown_length = (str(func) == 'aten.repeat_interleave.Tensor'
                             and kwargs.get('output_size') is None)
        if name in self.OPERATIONS or by_mask or of_unknown_length:
            self.waits.append(str(func))
        self.n_calls += 1
        return func(*args, **kwargs)


@pytest.fixture
def record_waits():
    """Return the class of recorders: `with record_waits() as recorder: ...; recorder.waits == []`.

    Code of the block that runs in other threads is not recorded.
    """
    return WaitRecorder


# --------------------------------------------------------------------------------------------------
# A camera
# --------------------------------------------------------------------------------------------------


@pytest.fixture
def make_camera():
    """Return a function that starts a motion JPEG server and returns its URL.

    `make_camera(first, second)` calls `first(send, is_closed)` for the first connection and
    `second` for each later one: `send(bytes)` sends a part of the stream, and the connection is
    closed when the function returns. The event `is_closed` is set when the test ends.
    """
    is_closed, servers = threading.Event(), []

    def make(*scripts):
        n_connections = itertools.count()

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                self.send_response(200)
                self.send_header('Content-Type', 'multipart/x-mixed-replace; boundary=frame')
                self.end_headers()
                with contextlib.suppress(OSError):  # the client has left
                    script = scripts[min(next(n_connections), len(scripts) - 1)]
                    script(self.wfile.write, is_closed)

            def log_message(self, *args):
                """Print nothing."""

        servers.append(http.server.ThreadingHTTPServer(('127.0.0.1', 0), Handler))
        threading.Thread(target=servers[-1].serve_forever, daemon=True).start()
        return f'http://127.0.0.1:{servers[-1].server_port}/video'

    yield make
    is_closed.set()
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.fixture(scope='session')
def jpeg_part():
    """Return a function that makes a part of a motion JPEG stream: an image of one color."""
    @functools.cache
    def make(color, size=(64, 48)):
        buffer = io.BytesIO()
        Image.new('RGB', size, color).save(buffer, 'JPEG')
        content = buffer.getvalue()
        return (f'--frame\r\nContent-Type: image/jpeg\r\nContent-Length: {len(content)}\r\n\r\n'
                .encode() + content + b'\r\n')
    return make
