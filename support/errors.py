"""Errors in user input, and files that are written completely or not at all."""

import contextlib
import functools
import glob
import hashlib
import os
import pathlib
import re
import secrets
import sys
import tempfile
import time

import torch


class UserError(ValueError):
    """Invalid user input, not a bug: the message names what is wrong, where, and the next step."""


class BrokenImageError(UserError):
    """An image file that cannot be decoded."""


WORKER_ADVICE = ('If it was killed, the machine has too little memory: give fewer --workers. After '
                 'a bus error it is shared memory: give fewer --workers, or give the container '
                 'more (docker run --shm-size=2g)')
OUT_OF_MEMORY = 'out of memory; give a smaller --batch-size or fewer --workers'


def exit_on_user_error(main):
    """Make a script's `main` print a user error as one line on stderr and exit with status 1.

    The same holds for missing files, memory that runs out and Ctrl-C. Any other exception is a bug
    and keeps its traceback.
    """
    @functools.wraps(main)
    def _main(*args, **kwargs):
        try:
            return main(*args, **kwargs)
        except BrokenPipeError:
            message = 'the program that reads the output has ended'
        except (EOFError, ConnectionError):
            message = f'a DataLoader worker ended while it sent a batch. {WORKER_ADVICE}'
        except (UserError, OSError) as error:
            # What a DataLoader's worker raises arrives with the worker's traceback before it.
            message = re.split('UserError: |BrokenImageError: ', str(error))[-1].strip()
        except torch.OutOfMemoryError as error:
            message = (f'{str(error).splitlines()[0]} Give train.py --grad-accumulation 2 or more, '
                       f'other scripts a smaller --batch-size')
        except MemoryError:
            message = OUT_OF_MEMORY
        except RuntimeError as error:
            if 'DefaultCPUAllocator' in str(error):     # torch.OutOfMemoryError is for GPUs
                message = OUT_OF_MEMORY
            elif re.search(r'DataLoader worker \(pid|Pin memory thread', str(error)):
                message = f'{str(error).splitlines()[0]}. {WORKER_ADVICE}'
            else:
                raise
        except KeyboardInterrupt:
            message = 'interrupted'
        print(f'{pathlib.Path(sys.argv[0]).name}: {message}', file=sys.stderr)
        sys.exit(1)
    return _main


def describe_error(error, line=0):
    """Return the type of an error and one line of its message, at most 200 characters."""
    return f'{type(error).__name__}: {error}'.strip().splitlines()[line].strip()[:200]


def check_at_least(minimum, **values):
    """Raise a UserError for the first parameter that is less than the minimum."""
    for name, value in values.items():
        if not value >= minimum:    # NaN, too
            raise UserError(f'{name} is {value}; give --{name.replace("_", "-")} {minimum} or more')


def check_fractions(**values):
    """Raise a UserError for the first parameter that is not from 0 to 1."""
    for name, value in values.items():
        if not 0 <= value <= 1:     # NaN, too
            raise UserError(f'{name} is {value}; give a number from 0 to 1')


def make_folder(folder):
    """Create a folder if missing and test that it is writable; returns its path.

    For the start of a script: hours of work must not end in a folder that takes no file.
    """
    folder = pathlib.Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise UserError(f'{folder} cannot be written ({error}); choose another folder') from error
    return folder


@contextlib.contextmanager
def atomic_write(path):
    """Yield the path of an empty temporary file, which is renamed to `path` when the block ends.

    If the block fails, the temporary file is removed and an earlier file at `path` stays. Where
    `path` is a symbolic link, the link stays and the file that it leads to is replaced.
    """
    path = pathlib.Path(path)
    target = pathlib.Path(os.path.realpath(path))
    process = f'{process_namespace()}-{os.getpid()}-{secrets.token_hex(4)}'
    temporary = target.with_name(f'.{path.stem}.{process}{path.suffix}')
    try:
        temporary.touch(exist_ok=False)     # a symbolic link of this name is not followed
        yield temporary
        os.replace(temporary, target)
    except BrokenPipeError:     # of what the block prints
        raise
    except OSError as error:
        raise UserError(f'{path} cannot be written ({error}); free some space or choose another '
                        f'place') from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def remove_stale_temporaries(path):
    """Remove temporary files of `atomic_write(path)` whose process was killed.

    Whether a process of another machine or container still runs is not known: their files in a
    shared folder are removed when they have not changed for a day.
    """
    path = pathlib.Path(path)
    folder, here = pathlib.Path(os.path.realpath(path)).parent, process_namespace()
    for temporary in folder.glob(f'.{glob.escape(path.stem)}.*{glob.escape(path.suffix)}'):
        process = temporary.name.removesuffix(path.suffix).rpartition('.')[2]
        match = re.fullmatch('([0-9a-f]*)-([0-9]{1,9})-[0-9a-f]{8}', process)
        if match is None:
            continue
        namespace, pid = match.groups()
        has_ended = namespace == here != '' and not is_running(int(pid))
        with contextlib.suppress(OSError):  # another process may have removed it
            if has_ended or time.time() - temporary.lstat().st_mtime > 24 * 60 * 60:
                temporary.unlink()


def process_namespace():
    """Return hex digits that differ between machines, their boots and containers.

    Process numbers identify a process only in one of them. File locks would do without numbers,
    but on SMB a locked file cannot be written by a second open(). Empty without Linux's /proc.
    """
    try:
        boot = pathlib.Path('/proc/sys/kernel/random/boot_id').read_text()
        return hashlib.sha256((boot + os.readlink('/proc/self/ns/pid')).encode()).hexdigest()[:8]
    except OSError:
        return ''


def is_running(pid):
    """Return whether a process of this number runs; not for Windows."""
    try:
        os.kill(pid, 0)     # no signal, except on Windows, where it ends the process
    except ProcessLookupError:
        return False
    except OSError:     # of another user
        pass
    return True
