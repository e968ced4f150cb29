"""torch.compile where it saves time and works."""

import torch

from support.processes import all_gather, get_rank


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
        problem = f'{type(cause).__name__}: {cause}'.strip().splitlines()[0][:200]
    problems = [problem for problem in all_gather(problem) if problem]
    if not problems:
        return compiled
    if get_rank() == 0:
        print(f'note: torch.compile does not work here ({problems[0]}); continuing without it, '
              f'as with --compile off')
    return functions
