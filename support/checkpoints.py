"""Checkpoints: dictionaries of tensors, numbers, strings, lists and dictionaries; never code."""

import os
import pathlib

import torch

from support.errors import UserError, atomic_write
from support.processes import get_rank

# --------------------------------------------------------------------------------------------------
# Resuming a run
# --------------------------------------------------------------------------------------------------


def find_newest_checkpoint(path):
    """Return the path of a run's last or best checkpoint, whichever has more iterations.

    The last one is at `path`, the best one at `sibling_path(path, '.best')`. A file that cannot be
    read is skipped with a note.

    Returns:
        A string; None if there is no checkpoint.
    """
    found = []
    for candidate in (pathlib.Path(path), sibling_path(path, '.best')):
        if candidate.exists():
            try:
                found.append((load_checkpoint(candidate).get('iteration', 0), str(candidate)))
            except UserError as error:
                if get_rank() == 0:
                    print(f'note: {error}')
    return max(found, default=(0, None))[1]


def sibling_path(path, mark, keep_suffix=True):
    """Insert a mark into a checkpoint's file name: net.best.pth.tar for net.pth.tar and '.best'.

    Args:
        keep_suffix: whether to keep the suffix; net.best without it.
    """
    path = pathlib.Path(path)
    stem, dot, suffix = path.name.partition('.pt')
    return path.with_name(stem + mark + (dot + suffix if keep_suffix else ''))


def restore(path, model, optimizer, scaler, settings, must_match):
    """Load model, optimizer and scaler from a checkpoint of `train.py`.

    Args:
        path: the checkpoint.
        model, optimizer, scaler: of this run; modified in place.
        settings: this run's parameters by name, `optimizer` and `precision` among them.
        must_match: names of the settings that must not change if the resumed run is to end with
            the weights of an uninterrupted one; a note is printed for each that differs.

    Returns:
        The number of iterations that the checkpoint has behind it.

    Raises:
        UserError: the file cannot be read, or its classes or optimizer differ from this run's.
    """
    checkpoint = load_checkpoint(path)
    missing = {'iteration', 'model', 'optimizer', 'label_map', 'parameters'} - checkpoint.keys()
    if missing:
        raise UserError(f'{path} has no {sorted(missing)}; give a checkpoint that train.py wrote')
    if checkpoint['label_map'] != model.label_map:
        raise UserError(f'{path} is for the classes {list(checkpoint["label_map"])[1:]}, the data '
                        f'for {list(model.label_map)[1:]}; give the checkpoint of this data set')
    previous = checkpoint['parameters']
    if previous['optimizer'] != settings['optimizer']:
        raise UserError(f'{path} was trained with {previous["optimizer"]}; resume with the same '
                        f'--optimizer')
    for name in must_match:
        if previous.get(name) != settings[name] and get_rank() == 0:
            print(f'note: {name} was {previous.get(name)} and is {settings[name]} now, so the '
                  f'weights will differ from those of an uninterrupted run')
    model.load_state_dict(checkpoint['model'])
    weight_decays = [group['weight_decay'] for group in optimizer.param_groups]
    optimizer.load_state_dict(checkpoint['optimizer'])
    for group, weight_decay in zip(optimizer.param_groups, weight_decays):
        group['weight_decay'] = weight_decay    # this run's, like every other parameter
    if previous.get('precision') == settings['precision'] and 'scaler' in checkpoint:
        scaler.load_state_dict(checkpoint['scaler'])
    return checkpoint['iteration']


# --------------------------------------------------------------------------------------------------
# Files
# --------------------------------------------------------------------------------------------------


def save_checkpoint(path, **state):
    """Write a checkpoint; an older one at `path` stays until the new one is complete.

    Args:
        path: the file.
        state: what `load_checkpoint` returns: tensors, state dicts, numbers, strings, ...

    Raises:
        UserError: the file cannot be written.
    """
    with atomic_write(path) as temporary, open(temporary, 'wb') as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())     # on the disk before the rename, in case of a power failure


def load_checkpoint(path):
    """Load the dictionary of a checkpoint, tensors on the CPU, without running code of the file.

    Raises:
        UserError: the file is missing, truncated, or written by another program.
    """
    if not pathlib.Path(path).is_file():
        raise UserError(f'{path}: no such checkpoint; train one with train.py, or give its path')
    try:
        checkpoint = torch.load(path, map_location='cpu', weights_only=True)
    except Exception as error:  # arbitrary bytes can raise anything
        reason = f'{type(error).__name__}: {error}'.splitlines()[0][:200]
        raise UserError(f'{path} cannot be read as a checkpoint: truncated, or written by another '
                        f'program ({reason}); give one that train.py wrote') from error
    if not isinstance(checkpoint, dict):
        raise UserError(f'{path} is not a checkpoint of this program: it holds a '
                        f'{type(checkpoint).__name__}; give one that train.py wrote')
    return checkpoint


def download_weights(weights, otherwise):
    """Load the state dict of torchvision's `weights`, downloaded once and kept.

    Args:
        weights: a member of one of torchvision's enumerations of weights.
        otherwise: what to do without a network, as the end of the error message.

    Raises:
        UserError: the download fails, or the file is damaged.
    """
    try:
        return weights.get_state_dict(progress=True, check_hash=True)
    except Exception as error:  # network, disk, or content of the file
        raise UserError(
            f'the weights could not be loaded from {weights.url} ({type(error).__name__}: '
            f'{error}); connect to the network, or put the file into '
            f'{torch.hub.get_dir()}/checkpoints, or {otherwise}') from error
