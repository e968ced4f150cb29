"""Errors in user input, and files that are written completely or not at all."""

import contextlib
import functools
import glob
import os
import pathlib
import sys
import tempfile

import torch


class UserError(ValueError):
    """Invalid user input, not a bug: the message names what is wrong, where, and the next step."""


class BrokenImageError(UserError):
    """An image file that cannot be decoded."""


def exit_on_user_error(main):
    """Make a script's `main` print a user error as one line on stderr and exit with status 1.

    The same holds for missing files, memory that runs out and Ctrl-C. Any other exception is a bug
    and keeps its traceback.
    """
    @functools.wraps(main)
    def _main(*args, **kwargs):
        try:
            return main(*args, **kwargs)
        except (UserError, OSError) as error:
            # What a DataLoader's worker raises arrives with the worker's traceback before it.
            message = str(error).rpartition('UserError: ')[2].strip()
        except torch.OutOfMemoryError as error:
            message = f'{str(error).splitlines()[0]} Give a smaller --batch-size'
        except RuntimeError as error:
            if 'DataLoader worker' not in str(error):
                raise
            message = (f'{str(error).splitlines()[0]} If it was killed, the machine has too little '
                       f'memory: give fewer --workers')
        except KeyboardInterrupt:
            message = 'interrupted'
        print(f'{pathlib.Path(sys.argv[0]).name}: {message}', file=sys.stderr)
        sys.exit(1)
    return _main


def check_at_least(minimum, **values):
    """Raise a UserError for the first parameter that is less than the minimum."""
    for name, value in values.items():
        if value < minimum:
            raise UserError(f'{name} is {value}; give --{name.replace("_", "-")} {minimum} or more')


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
    """Yield the path of a temporary file, which is renamed to `path` when the block ends.

    If the block fails, the temporary file is removed and an earlier file at `path` stays.
    """
    path = pathlib.Path(path)
    temporary = path.with_name(f'.{path.stem}.{os.getpid()}{path.suffix}')
    try:
        yield temporary
        os.replace(temporary, path)
    except torch.OutOfMemoryError:  # a RuntimeError too, but of the work in the block
        raise
    except (OSError, RuntimeError) as error:  # torch.save turns a full disk into a RuntimeError
        raise UserError(f'{path} cannot be written ({error}); free some space or choose another '
                        f'place') from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def remove_stale_temporaries(path):
    """Remove temporary files of `atomic_write(path)` whose process was killed."""
    path = pathlib.Path(path)
    for temporary in path.parent.glob(f'.{glob.escape(path.stem)}.*{path.suffix}'):
        pid = temporary.name.removesuffix(path.suffix).rpartition('.')[2]
        # Only where /proc lists the running processes can an ended one be told from a running one.
        ended = os.path.exists('/proc/self') and not os.path.exists(f'/proc/{pid}')
        if pid.isdecimal() and ended:
            temporary.unlink(missing_ok=True)
