"""Decoded images in memory that all processes of a machine share."""

import contextlib
import os
import pathlib
import platform
import shutil
from concurrent.futures import ThreadPoolExecutor

import torch
from PIL import Image
from torchvision.transforms.functional import pil_to_tensor
from tqdm import tqdm

from support.errors import UserError
from support.processes import barrier, get_world_size
from utils import read_image, read_image_size


class ImageCache:
    """The decoded images of a list of files, in memory that all processes of this machine share.

    Decoding a JPEG takes a quarter of the time of a training item. `cache[i]` is the i-th image, as
    a PIL image.

    Args:
        paths: the image files. First the sizes of all are read, then the memory is allocated, then
            all are decoded.

    Raises:
        UserError: too little memory; an image that cannot be decoded.
    """

    def __init__(self, paths):
        self.sizes = [read_image_size(path) for path in paths]
        ends = torch.tensor([3 * width * height for width, height in self.sizes]).cumsum(0).tolist()
        self.offsets = [0, *ends]       # bytes: image i lies between offsets i and i + 1
        is_first = int(os.environ.get('LOCAL_RANK', 0)) == 0    # of this machine
        folder, free = shared_folder()
        n_bytes = self.offsets[-1]
        if is_first:
            print(f'cache: {len(paths)} images, {n_bytes / 1e9:.2f} GB of the {free / 1e9:.2f} GB '
                  f'free in {folder}', flush=True)
            if n_bytes > 0.9 * free:
                raise UserError(f'the cache needs {n_bytes / 1e9:.2f} GB, which is too much for '
                                f'the {free / 1e9:.2f} GB free in {folder}; leave --cache out')
        self.memory = self.allocate(folder, n_bytes, is_first)
        if is_first:
            self.decode_all(paths)
        barrier()

    def __getitem__(self, i):
        return Image.frombytes('RGB', self.sizes[i], self.pixels(i).numpy())

    def pixels(self, i):
        """Return the memory of the i-th image: (height * width * 3,) uint8."""
        return self.memory[self.offsets[i]:self.offsets[i + 1]]

    @staticmethod
    def allocate(folder, n_bytes, is_first):
        """Allocate memory that the processes of this machine share: (n_bytes,) uint8.

        It is a memory-mapped file, unlinked as soon as all processes have it open, so that it
        disappears with the last of them, however that ends.
        """
        # All processes of one torchrun have the same parent.
        owner = os.getppid() if get_world_size() > 1 else os.getpid()
        path = folder / f'ssd300-cache-{platform.node()}-{owner}'
        try:
            if is_first:
                path.unlink(missing_ok=True)
                with open(path, 'xb') as file:
                    if hasattr(os, 'posix_fallocate'):  # fails now, not when it is full
                        os.posix_fallocate(file.fileno(), 0, n_bytes)
                    file.truncate(n_bytes)
            barrier()
            memory = torch.from_file(str(path), shared=True, size=n_bytes, dtype=torch.uint8)
            barrier()
        finally:
            if is_first:
                path.unlink(missing_ok=True)
        return memory

    def decode_all(self, paths):
        """Decode all images into the memory."""
        def decode(i):
            """Decode the i-th image."""
            image = pil_to_tensor(read_image(paths[i]))                 # (3, height, width)
            self.pixels(i).copy_(image.permute(1, 2, 0).flatten())

        pool = ThreadPoolExecutor(os.cpu_count())   # Pillow releases the GIL while it decodes
        try:
            decoded = pool.map(decode, range(len(paths)))
            for _ in tqdm(decoded, 'decoding', len(paths), unit='image'):
                pass
        finally:
            pool.shutdown(cancel_futures=True)


def shared_folder():
    """Return a folder whose files are in memory, if there is one, and the free space in bytes."""
    folder = pathlib.Path('/dev/shm')
    folder = folder if folder.is_dir() else pathlib.Path(os.environ.get('TMPDIR', '/tmp'))
    limits = [shutil.disk_usage(folder).free]
    with contextlib.suppress(OSError, KeyError):
        lines = pathlib.Path('/proc/meminfo').read_text().splitlines()
        numbers = dict(line.split(':') for line in lines)
        limits.append(1024 * int(numbers['MemAvailable'].split()[0]))
    # The limit of a container, unless it is 'max'.
    with contextlib.suppress(OSError, ValueError, KeyError):
        group = pathlib.Path('/sys/fs/cgroup')
        lines = (group / 'memory.stat').read_text().splitlines()
        reclaimable = int(dict(line.split() for line in lines)['inactive_file'])    # read files
        limits.append(int((group / 'memory.max').read_text())
                      - int((group / 'memory.current').read_text()) + reclaimable)
    return folder, min(limits)
