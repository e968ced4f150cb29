"""Device, precision and memory."""

import contextlib
import pathlib
import platform

import torch

from support.errors import UserError


def choose_device(name):
    """Return the device of a name: cpu, cuda, cuda:1, ...; auto is the GPU if there is one.

    Raises:
        UserError: there is no such device.
    """
    advice = 'give --device cpu' if name == 'auto' else 'give --device cpu or auto'
    if name == 'auto':
        name = 'cuda' if torch.cuda.is_available() else 'cpu'
    try:
        torch.zeros(1, device=name).cpu()
        if name.startswith('cuda:'):
            torch.cuda.set_device(name)     # the default of calls that name no device
    except (RuntimeError, AssertionError, ImportError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f'device {name!r} cannot be used here ({reason}); {advice}') from error
    return torch.device(name)


def choose_precision(precision, device):
    """Choose the mixed-precision dtype: torch.bfloat16, torch.float16 or torch.float32.

    Args:
        precision: 'bf16', 'fp16', 'float32', or 'auto': the fastest that the device supports.
    """
    if precision == 'auto' and device.type == 'cuda':
        # Every GPU in use has half precision; bfloat16 came with Ampere (2020).
        precision = 'bf16' if torch.cuda.is_bf16_supported(including_emulation=False) else 'fp16'
    elif precision == 'auto':
        # A processor without bf16 instructions is slower in bf16. Releases of PyTorch without
        # get_capabilities() use float32.
        capabilities = getattr(torch.cpu, 'get_capabilities', dict)()
        precision = 'bf16' if capabilities.get('avx512_bf16') else 'float32'
    return {'bf16': torch.bfloat16, 'fp16': torch.float16, 'float32': torch.float32}[precision]


def move_for_training(model, device):
    """Move a network to a device, in the memory format in which it is trained fastest there.

    That is channels last. With AVX2 instructions alone, as in most laptops, the gradients of the
    weights take so long in it that a step in contiguous tensors takes 0.64 of the time (measured,
    see benchmarks.md). There the network converts its images, which come in channels last.
    """
    if device.type == 'cpu' and torch.backends.cpu.get_cpu_capability() == 'AVX2':
        model.to(device, memory_format=torch.contiguous_format)
        model.register_forward_pre_hook(lambda model, inputs: (inputs[0].contiguous(),))
    else:
        model.to(device, memory_format=torch.channels_last)


def configure_gpu():
    """Set what speeds up training on a GPU; no effect on a CPU's convolutions."""
    torch.set_float32_matmul_precision('high')      # TF32 for what stays in float32
    torch.backends.cudnn.allow_tf32 = True
    torch.backends.cudnn.benchmark = True           # input sizes never change: time algorithms once


@contextlib.contextmanager
def disable_tf32():
    """Compute convolutions in full float32 within the block, not rounded to TF32's 10 bits."""
    before, torch.backends.cudnn.allow_tf32 = torch.backends.cudnn.allow_tf32, False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before


def peak_memory(device):
    """Return the peak memory in bytes: of tensors on a GPU, else of this process."""
    if device.type == 'cuda':
        return torch.cuda.max_memory_allocated(device)
    return process_memory()[1]


def process_memory():
    """Return the current and the peak resident memory of this process in bytes."""
    # getrusage() is second choice: a child process inherits its parent's peak there.
    with contextlib.suppress(OSError, KeyError):
        lines = pathlib.Path('/proc/self/status').read_text().splitlines()
        status = dict(line.split(':', 1) for line in lines)
        return tuple(1024 * int(status[key].split()[0]) for key in ('VmRSS', 'VmHWM'))
    import resource  # missing on Windows
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return (peak * (1 if platform.system() == 'Darwin' else 1024),) * 2
