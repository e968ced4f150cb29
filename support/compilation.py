"""torch.compile where it saves time and works."""

import torch

from support.errors import describe_error
from support.processes import all_gather, get_rank, synchronize_gradients
from utils import normalize


def compile_network_and_loss(choice, network, criterion, autocast, n_images, size):
    """Compile a network and the tensor part of its loss, which is replaced in the criterion.

    Args:
        choice: see `compile_if_possible()`.
        network: an SSD300, or one wrapped in DistributedDataParallel: compiled as one, it is cut
            into graphs at DDP's buckets, so that gradients are exchanged during the backward pass.
        autocast: context of the forward pass.
        n_images: in a micro-batch.
        size: `input_size` of the network.

    Returns:
        The network, compiled or not.
    """
    device = criterion.priors_cxcy.device

    def try_out(network, compute_losses):
        """Run a forward and backward pass without data, which starts the compilation."""
        images = torch.zeros(n_images, 3, size, size, dtype=torch.uint8, device=device)
        images = images.contiguous(memory_format=torch.channels_last)
        with synchronize_gradients(network, is_last=False), autocast:   # a rank may fail alone
            locs, scores = network(normalize(images))
        true_classes = torch.zeros(scores.shape[:2], dtype=torch.int64, device=device)
        true_locs = torch.zeros_like(locs, dtype=torch.float32)
        sum(compute_losses(locs, scores, true_locs, true_classes)).backward()
        network.zero_grad()

    buffers = [buffer.clone() for buffer in network.buffers()]
    compiled, criterion.compute_losses = compile_if_possible(
        choice, device, (network, criterion.compute_losses), try_out)
    for buffer, before in zip(network.buffers(), buffers):  # running statistics without the zeros
        buffer.copy_(before)
    return compiled


def compile_if_possible(choice, device, functions, try_out):
    """Compile functions or modules; if that fails in any rank, print a note and compile none.

    Args:
        choice: 'on', 'off', or 'auto': on for a GPU, where fewer passes over memory save time. On
            a CPU it makes no difference (measured, see benchmarks.md).
        functions: functions or modules to compile.
        try_out: function that is called with the compiled ones. torch.compile works at the first
            call, so this is where it fails, if it does. What fails there without the compiler, too,
            is raised.

    Returns:
        The functions, either all compiled or all unchanged.
    """
    if choice == 'off' or choice == 'auto' and device.type != 'cuda':
        return functions
    problem = None
    try:
        compiled = [torch.compile(function, dynamic=False) for function in functions]
        try_out(*compiled)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # Triton, a missing C++ compiler, ...
        try_out(*functions)
        cause = getattr(error, 'inner_exception', error)    # what the compiler's back end raised
        problem = describe_error(cause)
    problems = [problem for problem in all_gather(problem) if problem]
    if not problems:
        return compiled
    if get_rank() == 0:
        print(f'note: torch.compile does not work here ({problems[0]}); continuing without it, '
              f'as with --compile off')
    return functions
