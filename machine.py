"""What a run asks of its machine: a device, several processes, number formats, signals, memory.

Nothing in here knows about boxes. One process without torchrun is the ordinary case, in which the
functions of the second section do nothing.
"""

import contextlib
import datetime
import inspect
import os
import pathlib
import platform
import re
import shutil
import signal
import threading

import torch
from torch import distributed
from torch.nn.parallel import DistributedDataParallel

from utils import UserError

# --------------------------------------------------------------------------------------------------
# Device
# --------------------------------------------------------------------------------------------------


def choose_device(name):
    """The device of a name: cpu, cuda, cuda:1, ...; auto is the GPU where there is one."""
    if name == 'auto':
        name = 'cuda' if torch.cuda.is_available() else 'cpu'
    try:
        torch.zeros(1, device=name).cpu()
        if name.startswith('cuda:'):
            torch.cuda.set_device(name)  # what asks for "the" GPU means this one
    except (RuntimeError, AssertionError, ImportError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f'device {name!r} cannot be used here ({reason}); give --device cpu or '
                        f'auto') from error
    return torch.device(name)


# --------------------------------------------------------------------------------------------------
# Several processes
#
# `torchrun --nproc-per-node=8 train.py` starts the same script eight times, each with its number in
# the environment. Each process has a device of its own and works on its part of every batch.
# --------------------------------------------------------------------------------------------------

# How long a process waits for the others before it gives up.
PATIENCE = datetime.timedelta(minutes=10)


@contextlib.contextmanager
def join_processes(device_name):
    """Within the block the processes that torchrun started know each other; yields the device.

    Raises:
        UserError: this process has no device of its own; another process has ended.
    """
    if 'LOCAL_RANK' not in os.environ:
        yield choose_device(device_name)
        return
    if device_name.startswith('cuda:'):
        raise UserError(f'of several processes each takes a GPU of its own, not all {device_name}; '
                        f'give --device cuda or auto')
    if device_name in ('auto', 'cuda') and torch.cuda.is_available():
        device_name = f'cuda:{os.environ["LOCAL_RANK"]}'
    device = choose_device(device_name)
    backend = 'nccl' if device.type == 'cuda' else 'gloo'
    try:
        distributed.init_process_group(backend, timeout=PATIENCE,
                                       device_id=device if device.type == 'cuda' else None)
        yield device
        distributed.destroy_process_group()
    except RuntimeError as error:
        if not re.search('connection|closed|reset|nccl|gloo|timed? ?out', str(error).lower()):
            raise
        raise UserError(f'the other processes of this run cannot be reached; if one has ended, its '
                        f'own message says why. Go on with --resume auto '
                        f'({str(error).splitlines()[0][:150]})') from error


def default_workers():
    """How many workers read images for this process: its share of the processors, at most 16."""
    n_cores = len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count()
    return max(1, min(16, n_cores // int(os.environ.get('LOCAL_WORLD_SIZE', 1))))


def n_processes():
    """How many processes share this run."""
    return distributed.get_world_size() if distributed.is_initialized() else 1


def process_number():
    """The number of this process; number 0 is the one that prints and writes."""
    return distributed.get_rank() if distributed.is_initialized() else 0


def sum_over_processes(tensor):
    """The sum of a tensor over all processes, in each of them. Nothing waits for the device."""
    if n_processes() > 1:
        tensor = tensor.clone()
        distributed.all_reduce(tensor)
    return tensor


def gather_from_processes(value):
    """A list of what each process gave, in each of them."""
    if n_processes() == 1:
        return [value]
    values = [None] * n_processes()
    distributed.all_gather_object(values, value)
    return values


def share_buffers(module):
    """Give the buffers of the first process's module to those of all others."""
    if n_processes() > 1:
        for buffer in module.buffers():
            distributed.broadcast(buffer, src=0)


def wait_for_processes():
    """Return when all processes have come here."""
    if n_processes() > 1:
        distributed.barrier()


def divide_over_processes(network):
    """A network whose gradients are the mean over all processes."""
    if n_processes() == 1:
        return network
    # Buffers are the same everywhere, and stay so. What says that was renamed in PyTorch 2.15.
    renamed = 'forward_sync_buffers' in inspect.signature(DistributedDataParallel).parameters
    same_buffers = {'forward_sync_buffers' if renamed else 'broadcast_buffers': False}
    return DistributedDataParallel(network, gradient_as_bucket_view=True, **same_buffers)


# --------------------------------------------------------------------------------------------------
# Number formats and compiler
# --------------------------------------------------------------------------------------------------


def choose_precision(precision, device):
    """The dtype of the convolutions on a device: torch.bfloat16, torch.float16 or torch.float32."""
    if precision == 'auto' and device.type == 'cuda':
        # Half precision has been in every GPU for long, bfloat16 came with Ampere (2020).
        precision = 'bf16' if torch.cuda.is_bf16_supported(including_emulation=False) else 'fp16'
    elif precision == 'auto':
        # Without the instructions for it a processor is slower in bf16. Releases of PyTorch that
        # cannot say what a processor has stay with float32.
        abilities = getattr(torch.cpu, 'get_capabilities', dict)()
        precision = 'bf16' if abilities.get('avx512_bf16') else 'float32'
    return {'bf16': torch.bfloat16, 'fp16': torch.float16, 'float32': torch.float32}[precision]


def prepare_gpu():
    """Settings of a training run that only a GPU knows."""
    torch.set_float32_matmul_precision('high')      # TF32 for what stays in float32
    torch.backends.cudnn.allow_tf32 = True
    torch.backends.cudnn.benchmark = True           # the sizes never change: try what is fastest


@contextlib.contextmanager
def full_float32():
    """Within the block a GPU's convolutions do not round their factors to TF32's 10 bits."""
    before, torch.backends.cudnn.allow_tf32 = torch.backends.cudnn.allow_tf32, False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before


def compile_or_not(choice, device, functions, try_out):
    """Compile functions (or networks) where it pays and works; say so where it does not work.

    Args:
        choice: 'on', 'off', or 'auto': on a GPU, where fewer passes over memory save time. On a
            processor it makes no difference (measured, see benchmarks.md).
        functions: what is compiled.
        try_out: function that is called with the compiled ones. Compilation happens here, at the
            first call, and so does its failure.

    Returns:
        The functions, all compiled or all as they were.
    """
    if choice == 'off' or choice == 'auto' and device.type != 'cuda':
        return functions
    problem = None
    try:
        compiled = [torch.compile(function, dynamic=False) for function in functions]
        try_out(*compiled)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # of Triton, of a C++ compiler that is not there, ...
        problem = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
    problems = [problem for problem in gather_from_processes(problem) if problem]
    if not problems:
        return compiled
    if process_number() == 0:
        print(f'note: torch.compile does not work here ({problems[0]}); the run goes on without '
              f'it, which --compile off asks for')
    return functions


# --------------------------------------------------------------------------------------------------
# Signals
# --------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def signals_as_flag():
    """Within the block the first Ctrl-C or SIGTERM only sets a flag, so that no step is torn apart.

    The second one ends the process at once, as always. Yields the flag.
    """
    flag = threading.Event()
    before = {}

    def restore():
        """Handle signals as before the block."""
        for number, handler in before.items():
            signal.signal(number, handler)

    def note(number, frame):
        """Handle the first signal."""
        flag.set()
        restore()

    for number in (signal.SIGINT, signal.SIGTERM):
        before[number] = signal.signal(number, note)
    try:
        yield flag
    finally:
        restore()


def leave_signals_to_parent(worker_id):
    """Let a worker go on after Ctrl-C or SIGTERM: its parent still wants its iteration's batch.

    Such signals often go to all processes of a run. The SIGTERM that the parent sends is obeyed.
    """
    def obey_parent():
        """Wait for SIGTERM, again and again, until it comes from the parent."""
        while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
            pass
        os._exit(1)

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, 'sigwaitinfo'):  # not on macOS
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=obey_parent, daemon=True).start()


# --------------------------------------------------------------------------------------------------
# Memory
# --------------------------------------------------------------------------------------------------


def peak_memory(device):
    """The most bytes that were in use at a time: of a GPU by tensors, else by this process."""
    if device.type == 'cuda':
        return torch.cuda.max_memory_allocated(device)
    return process_memory()[1]


def process_memory():
    """The bytes that this process has in memory now, and at its peak."""
    # Not from `getrusage` where there is a choice: there a process begins with its parent's peak.
    with contextlib.suppress(OSError, KeyError):
        lines = pathlib.Path('/proc/self/status').read_text().splitlines()
        status = dict(line.split(':', 1) for line in lines)
        return tuple(1024 * int(status[key].split()[0]) for key in ('VmRSS', 'VmHWM'))
    import resource  # not there on Windows
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return (peak * (1 if platform.system() == 'Darwin' else 1024),) * 2


def shared_folder():
    """A folder whose files are in memory, where there is one, and the bytes that fit into it."""
    folder = pathlib.Path('/dev/shm')
    folder = folder if folder.is_dir() else pathlib.Path(os.environ.get('TMPDIR', '/tmp'))
    limits = [shutil.disk_usage(folder).free]
    with contextlib.suppress(OSError, KeyError):
        lines = pathlib.Path('/proc/meminfo').read_text().splitlines()
        numbers = dict(line.split(':') for line in lines)
        limits.append(1024 * int(numbers['MemAvailable'].split()[0]))
    with contextlib.suppress(OSError, ValueError):  # of a container; 'max' is no number
        group = pathlib.Path('/sys/fs/cgroup')
        limits.append(int((group / 'memory.max').read_text())
                      - int((group / 'memory.current').read_text()))
    return folder, min(limits)
