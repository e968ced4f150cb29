"""Several processes: ranks, collective operations, data loading workers and signals."""

import contextlib
import datetime
import inspect
import os
import re
import signal
import threading

import torch
from torch import distributed
from torch.nn.parallel import DistributedDataParallel

from support.device import choose_device
from support.errors import UserError

# How long a rank waits for the others in a collective operation before it fails.
TIMEOUT = datetime.timedelta(minutes=10)


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
        device_name = f'cuda:{os.environ["LOCAL_RANK"]}'
    device = choose_device(device_name)
    backend = 'nccl' if device.type == 'cuda' else 'gloo'
    try:
        distributed.init_process_group(backend, timeout=TIMEOUT,
                                       device_id=device if device.type == 'cuda' else None)
        yield device
        distributed.destroy_process_group()
    except RuntimeError as error:
        if not re.search('connection|closed|reset|nccl|gloo|timed? ?out', str(error).lower()):
            raise
        raise UserError(f'the other processes of this run cannot be reached; if one has ended, its '
                        f'own message says why. Resume with --resume auto '
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
    """Wait until all ranks have arrived here."""
    if get_world_size() > 1:
        distributed.barrier()


def wrap_distributed(network):
    """Wrap a network in DistributedDataParallel: gradients become the mean over all ranks."""
    if get_world_size() == 1:
        return network
    # Buffers are the same in all ranks and stay so. PyTorch 2.15 renamed the option.
    renamed = 'forward_sync_buffers' in inspect.signature(DistributedDataParallel).parameters
    no_sync = {'forward_sync_buffers' if renamed else 'broadcast_buffers': False}
    return DistributedDataParallel(network, gradient_as_bucket_view=True, **no_sync)


# --------------------------------------------------------------------------------------------------
# Workers and signals
# --------------------------------------------------------------------------------------------------


def default_workers():
    """Return the number of data loading workers: this rank's share of the cores, at most 16."""
    n_cores = len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count()
    return max(1, min(16, n_cores // int(os.environ.get('LOCAL_WORLD_SIZE', 1))))


@contextlib.contextmanager
def stop_on_signal():
    """Let the first Ctrl-C or SIGTERM within the block only set a flag, so that a step completes.

    The second one ends the process at once, as without the block.

    Yields:
        The flag, a threading.Event.
    """
    flag = threading.Event()
    handlers = {}

    def restore_handlers():
        """Handle signals as before the block."""
        for number, handler in handlers.items():
            signal.signal(number, handler)

    def handle_first(number, frame):
        """Handle the first signal."""
        flag.set()
        restore_handlers()

    for number in (signal.SIGINT, signal.SIGTERM):
        handlers[number] = signal.signal(number, handle_first)
    try:
        yield flag
    finally:
        restore_handlers()


def ignore_signals_in_worker(worker_id):
    """Make a worker ignore Ctrl-C, and SIGTERM unless its parent sends it.

    Such signals often reach all processes of a run, but the parent still needs the batch of the
    iteration that it finishes.

    Args:
        worker_id: unused; the signature of a DataLoader's `worker_init_fn`.
    """
    def wait_for_parent():
        """End the worker at the first SIGTERM from the parent."""
        while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
            pass
        os._exit(1)

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, 'sigwaitinfo'):  # missing on macOS
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=wait_for_parent, daemon=True).start()
