"""Several processes: ranks, collective operations, data loading workers and signals."""

import contextlib
import datetime
import inspect
import math
import multiprocessing
import os
import pathlib
import shutil
import signal
import threading
import time
from multiprocessing import resource_tracker

import torch
from torch import distributed
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

from support.device import choose_device
from support.errors import UserError

# How long a rank waits for the others in a collective operation before it fails.
TIMEOUT = datetime.timedelta(minutes=10)
# The same at a barrier, where one rank may be downloading weights or decoding images.
BARRIER_TIMEOUT = datetime.timedelta(days=1)
# A signal within so many seconds after the first is a copy of it.
SAME_SIGNAL_SECONDS = 2


# --------------------------------------------------------------------------------------------------
# Ranks and collective operations. In a run of a single process they do nothing.
# --------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def process_group(device_name):
    """Join the processes that torchrun started into a process group within the block.

    Args:
        device_name: as for `choose_device()`; with torchrun, each rank takes the GPU of its local
            rank.

    Yields:
        The device of this rank.

    Raises:
        UserError: there is no device for this rank; another rank has ended.
    """
    if 'LOCAL_RANK' not in os.environ:
        yield choose_device(device_name)
        return
    if device_name.startswith('cuda:'):
        raise UserError(f'with several processes each needs its own GPU, not all {device_name}; '
                        f'give --device cuda or auto')
    if device_name in ('auto', 'cuda') and torch.cuda.is_available():
        rank, n_gpus = int(os.environ['LOCAL_RANK']), torch.cuda.device_count()
        if rank >= n_gpus:
            raise UserError(f'this machine has {n_gpus} GPUs; give torchrun --nproc-per-node '
                            f'{n_gpus}')
        device_name = f'cuda:{rank}'
    device = choose_device(device_name)
    backend = 'nccl' if device.type == 'cuda' else 'gloo'
    try:
        distributed.init_process_group(backend, timeout=TIMEOUT,
                                       device_id=device if device.type == 'cuda' else None)
        yield device
        distributed.destroy_process_group()
    except RuntimeError as error:
        # Gloo raises a plain RuntimeError that begins with its source file.
        if not isinstance(error, distributed.DistError) and '/gloo/transport/' not in str(error):
            raise
        raise UserError(f'the other processes of this run cannot be reached; if one has ended, '
                        f'see its message. Resume with --resume auto '
                        f'({str(error).splitlines()[0][:150]})') from error


def get_world_size():
    """Return the number of processes of this run."""
    return distributed.get_world_size() if distributed.is_initialized() else 1


def get_rank():
    """Return the rank of this process; rank 0 is the one that prints and writes."""
    return distributed.get_rank() if distributed.is_initialized() else 0


def all_reduce_sum(tensor):
    """Return the sum of a tensor over all ranks, in each rank, without waiting for the device."""
    if get_world_size() > 1:
        tensor = tensor.clone()
        distributed.all_reduce(tensor)
    return tensor


def all_gather(value):
    """Return the list of all ranks' values, in each rank. Any picklable value."""
    if get_world_size() == 1:
        return [value]
    values = [None] * get_world_size()
    distributed.all_gather_object(values, value)
    return values


def broadcast_buffers(module):
    """Copy the buffers of rank 0's module to those of all other ranks."""
    if get_world_size() > 1:
        for buffer in module.buffers():
            distributed.broadcast(buffer, src=0)


def barrier():
    """Wait until all ranks have arrived here, for as long as `BARRIER_TIMEOUT`."""
    if get_world_size() > 1:
        group = distributed.new_group(backend='gloo', timeout=BARRIER_TIMEOUT)
        distributed.barrier(group)


def wrap_distributed(network):
    """Wrap a network in DistributedDataParallel: gradients become the mean over all ranks."""
    if get_world_size() == 1:
        return network
    for parameter in network.parameters():
        # Of a size such as (1, C, 1, 1), channels last has other strides than its gradient will
        # have, and DDP would copy it and warn.
        if parameter.dim() == 4 and parameter.numel() == parameter.shape[1]:
            parameter.data = parameter.data.flatten().view(parameter.shape)
    # Constants are the same in all ranks, and train.py copies the running statistics of batch
    # normalization before an evaluation. PyTorch 2.15 renamed the option.
    renamed = 'forward_sync_buffers' in inspect.signature(DistributedDataParallel).parameters
    no_sync = {'forward_sync_buffers' if renamed else 'broadcast_buffers': False}
    return DistributedDataParallel(network, gradient_as_bucket_view=True, **no_sync)


def synchronize_gradients(network, is_last):
    """Context of a forward pass: ranks average gradients only in the last micro-batch's backward.

    Until then the gradients of earlier micro-batches add up in each rank. DistributedDataParallel
    decides in the forward pass what the backward pass will do, so only the former is inside.
    """
    if is_last or get_world_size() == 1:
        return contextlib.nullcontext()
    return network.no_sync()


def is_set_in_any_rank(event, device):
    """Return whether a threading.Event is set in any rank. All ranks call this together."""
    return all_reduce_sum(torch.tensor(int(event.is_set()), device=device)).item() > 0


# --------------------------------------------------------------------------------------------------
# Workers and signals
# --------------------------------------------------------------------------------------------------


def default_workers():
    """Return the number of data loading workers: this rank's share of the cores, at most 16."""
    n_cores = len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count()
    n_cores = min(n_cores, cpu_quota())
    return max(1, min(16, int(n_cores / int(os.environ.get('LOCAL_WORLD_SIZE', 1)))))


def cpu_quota(folder='/sys/fs/cgroup'):
    """Return the number of cores whose time a container may use, infinity without a limit."""
    for names in (('cpu.max',), ('cpu/cpu.cfs_quota_us', 'cpu/cpu.cfs_period_us')):  # cgroup v2, v1
        with contextlib.suppress(OSError, ValueError):  # missing; 'max'
            texts = [(pathlib.Path(folder) / name).read_text() for name in names]
            quota, period = map(int, ' '.join(texts).split())
            return quota / period if quota > 0 else math.inf
    return math.inf


def check_shared_memory(workers, batch_bytes):
    """Raise a UserError if the workers' batches do not fit into shared memory (64 MB in Docker).

    Without space for a batch, a loader would wait for it forever.

    Args:
        workers: number of worker processes per rank and loader.
        batch_bytes: of a batch, added up over the loaders that a rank uses at the same time.
    """
    folder = pathlib.Path('/dev/shm')
    if workers == 0 or not folder.is_dir():
        return
    usage = shutil.disk_usage(folder)
    if usage.total == 0:    # no limit
        return
    free = usage.free // int(os.environ.get('LOCAL_WORLD_SIZE', 1))
    needed = (2 * workers + 1) * batch_bytes    # each worker has two, and one is in use
    if needed > free:
        raise UserError(f'{workers} workers need {needed / 1e6:.0f} MB of shared memory, but '
                        f'{folder} has {free / 1e6:.0f} MB free per rank; give --workers '
                        f'{max(0, (free // batch_bytes - 1) // 2)}, or give the container '
                        f'more shared memory (docker run --shm-size=2g)')


@contextlib.contextmanager
def stop_on_signal():
    """Let the first Ctrl-C or SIGTERM within the block only set a flag, so that a step completes.

    A second one ends the process at once, as without the block, unless it comes right after the
    first: a job queue may send the signal to torchrun and to its processes, and torchrun sends it
    on.

    Yields:
        The flag, a threading.Event.
    """
    flag = threading.Event()
    handlers, ignored_until = {}, None

    def restore_handlers():
        """Handle signals as before the block."""
        for number, handler in handlers.items():
            signal.signal(number, handler)

    def handle(number, frame):
        """Set the flag, or end the process."""
        nonlocal ignored_until
        if not flag.is_set():
            flag.set()
            ignored_until = time.monotonic() + SAME_SIGNAL_SECONDS
        elif time.monotonic() > ignored_until:
            restore_handlers()
            signal.raise_signal(number)

    for number in (signal.SIGINT, signal.SIGTERM):
        handlers[number] = signal.signal(number, handle)
    try:
        yield flag
    finally:
        restore_handlers()


@contextlib.contextmanager
def block_signals():
    """Block Ctrl-C and SIGTERM in the processes and threads that are started within the block.

    All their threads inherit it, whether processes are forked or spawned, and also the fork server
    of multiprocessing. The caller itself receives the signals after the block.
    """
    if not hasattr(signal, 'sigtimedwait'):     # missing on macOS and Windows
        yield
        return
    resource_tracker.ensure_running()   # the start of the first worker would; it unblocks signals
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def ignore_signals_in_worker(worker_id):
    """Make a worker that was started within `block_signals()` end with its parent only.

    Ctrl-C and SIGTERM often reach all processes of a run, but the parent still needs the batch of
    the iteration that it finishes. A worker ends at a SIGTERM from its parent, and if that is gone.

    Args:
        worker_id: unused; the signature of a DataLoader's `worker_init_fn`.
    """
    parent = multiprocessing.parent_process()   # not os.getppid(), which may be the fork server

    def wait_for_parent():
        """End the worker when its parent ends or sends SIGTERM."""
        while parent.is_alive():
            received = signal.sigtimedwait({signal.SIGTERM}, 5)
            if received and received.si_pid == parent.pid:
                break
        os._exit(1)

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, 'sigtimedwait'):
        threading.Thread(target=wait_for_parent, daemon=True).start()


class Loader(DataLoader):
    """A DataLoader whose workers outlast the signals that stop a run, see `block_signals()`."""

    def __iter__(self):
        if self.num_workers == 0:
            return super().__iter__()
        is_main = threading.current_thread() is threading.main_thread()     # only it has handlers
        handles = is_main and hasattr(signal, 'SIGCHLD')    # missing on Windows
        handler = signal.getsignal(signal.SIGCHLD) if handles else None
        with block_signals():
            batches = super().__iter__()
        # DataLoader would raise an error as soon as a worker dies, perhaps in the middle of a step.
        # Without its handler it does so when the next batch is fetched.
        if handles:
            signal.signal(signal.SIGCHLD, handler or signal.SIG_DFL)    # None: not from Python
        return batches
