"""Checkpoints: dictionaries of tensors, numbers, strings, lists and dictionaries; never code."""

import hashlib
import os
import pathlib

import torch

from support.errors import UserError, atomic_write, describe_error
from support.processes import get_rank

# --------------------------------------------------------------------------------------------------
# Resuming a run
# --------------------------------------------------------------------------------------------------

# What a run is resumed from, and the tensors that each optimizer keeps per parameter.
CONTENT = {'iteration': int, 'model': dict, 'optimizer': dict, 'label_map': dict,
           'parameters': dict}
OPTIMIZER_STATE = {'sgd': {'momentum_buffer'}, 'adamw': {'step', 'exp_avg', 'exp_avg_sq'}}
# Parameters that decide on the content of a checkpoint, and what older ones without them had.
OF_CONTENT = {'network': 'ssd300', 'optimizer': None, 'batch_norm': False, 'priors': 'voc'}


def find_newest_checkpoint(path):
    """Return the path of a run's last checkpoint; if that cannot be read, of its best one.

    The last one is at `path`, the best one, which is never newer, at `sibling_path(path, '.best')`.
    A note is printed for a file that cannot be read.

    Returns:
        A string; None if there is no checkpoint.
    """
    for candidate in (pathlib.Path(path), sibling_path(path, '.best')):
        if candidate.exists():
            try:
                load_checkpoint(candidate)
                return str(candidate)
            except UserError as error:
                if get_rank() == 0:
                    print(f'note: {error}')
    return None


def set_aside(path):
    """Rename last and best checkpoint of an earlier run, which a new run would replace."""
    for candidate in (path, sibling_path(path, '.best')):
        target = pathlib.Path(os.path.realpath(candidate))
        if target.exists():
            kept = sibling_path(target, '.earlier')
            os.replace(target, kept)
            print(f'note: {candidate} is of an earlier run; renamed to {kept}')


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
        settings: this run's parameters by name, `precision` and those of `OF_CONTENT` among them.
        must_match: names of the settings that must not change if the resumed run is to end with
            the weights of an uninterrupted one; a note is printed for each that differs.

    Returns:
        The number of iterations that the checkpoint has behind it.

    Raises:
        UserError: the file cannot be read, or its classes, weights or optimizer differ from this
            run's.
    """
    checkpoint = load_checkpoint(path)
    missing = [name for name, kind in CONTENT.items() if not isinstance(checkpoint.get(name), kind)]
    if missing:
        raise UserError(f'{path} has no {missing}; give a checkpoint that train.py wrote')
    if checkpoint['label_map'] != model.label_map:
        raise UserError(f'{path} is for the classes {list(checkpoint["label_map"])[1:]}, the data '
                        f'for {list(model.label_map)[1:]}; give the checkpoint of this data set')
    previous = checkpoint['parameters']
    for name, default in OF_CONTENT.items():
        if previous.get(name, default) != settings[name]:
            raise UserError(f'{path} was trained with {name} = {previous.get(name, default)}; '
                            f'resume with the same --{name.replace("_", "-")}')
    for name in must_match:
        if previous.get(name) != settings[name] and get_rank() == 0:
            print(f'note: {name} was {previous.get(name)} and is {settings[name]} now, so the '
                  f'weights will differ from those of an uninterrupted run')
    try:
        # A checkpoint need not have `antialias`, which is newer than the other constants.
        defaults = {name: buffer for name, buffer in model.named_buffers() if name == 'antialias'}
        model.load_state_dict({**defaults, **checkpoint['model']})
        load_optimizer_state(optimizer, checkpoint['optimizer'],
                             OPTIMIZER_STATE[settings['optimizer']])
        if previous.get('precision') == settings['precision'] and 'scaler' in checkpoint:
            if not all(isinstance(value, (int, float)) for value in checkpoint['scaler'].values()):
                raise TypeError('the scaler has values that are not numbers')
            scaler.load_state_dict(checkpoint['scaler'])
    except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
        reason = describe_error(error, line=-1)
        raise UserError(f'{path} does not fit this run ({reason}); give a checkpoint that train.py '
                        f'wrote') from error
    return checkpoint['iteration']


def load_optimizer_state(optimizer, saved, state_names):
    """Load the state of each parameter. The options of the groups stay those of this run.

    Args:
        optimizer: modified in place.
        saved: its state dict in the checkpoint.
        state_names: names of the tensors that the optimizer keeps per parameter.

    Raises:
        Exception: the content does not fit the optimizer; the type depends on what is wrong.
    """
    current_groups = optimizer.state_dict()['param_groups']
    optimizer.load_state_dict({'state': saved['state'], 'param_groups': [
        {**current, 'params': group['params']}
        for current, group in zip(current_groups, saved['param_groups'], strict=True)]})
    # PyTorch compares only the number of parameters.
    for parameter, state in optimizer.state.items():
        if state.keys() != state_names:
            raise ValueError(f'the optimizer has {list(state)}, not {sorted(state_names)}')
        for name, tensor in state.items():
            shape = () if name == 'step' else parameter.shape
            if tensor.shape != shape:
                raise ValueError(f'{name} has the shape {tuple(tensor.shape)}, not {tuple(shape)}')
            if name != 'step':
                # In the parameter's memory format, which the device decides on. Fused optimizers
                # update raw memory: in another one, they would update other weights.
                state[name] = torch.empty_like(parameter).copy_(tensor)


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
        try:
            torch.save(state, file)
        except RuntimeError as error:   # which torch.save makes of a full disk
            raise OSError(error) from error
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
        reason = describe_error(error)
        raise UserError(f'{path} cannot be read as a checkpoint: truncated, or written by another '
                        f'program ({reason}); give one that train.py wrote') from error
    if not isinstance(checkpoint, dict):
        raise UserError(f'{path} is not a checkpoint of this program: it holds a '
                        f'{type(checkpoint).__name__}; give one that train.py wrote')
    iteration = checkpoint.get('iteration', 0)
    if not isinstance(iteration, int) or iteration < 0:
        raise UserError(f'{path} is damaged: its iteration is not a whole number; give one that '
                        f'train.py wrote')
    return checkpoint


def download_weights(weights, otherwise):
    """Load the state dict of torchvision's `weights`, downloaded once and kept.

    Args:
        weights: a member of one of torchvision's enumerations of weights.
        otherwise: what to do without a network, as the end of the error message.

    Raises:
        UserError: the download fails, or the file is damaged.
    """
    path = pathlib.Path(torch.hub.get_dir(), 'checkpoints', weights.url.rpartition('/')[2])
    digits = path.stem.rpartition('-')[2]
    # torch.hub compares the hash only after a download.
    if path.is_file() and not hash_file(path).startswith(digits):
        raise UserError(f'{path} is damaged or another file: its SHA-256 hash does not start with '
                        f'{digits}; remove it, so that it is downloaded again, or {otherwise}')
    try:
        return weights.get_state_dict(progress=True, check_hash=True, weights_only=True)
    except Exception as error:  # network, disk, or content of the file
        reason = describe_error(error)
        raise UserError(f'the weights could not be loaded from {weights.url} ({reason}); connect '
                        f'to the network, or put the file into {path.parent}, or '
                        f'{otherwise}') from error


def hash_file(path):
    """Compute the SHA-256 hash of a file, in hexadecimal."""
    sha256 = hashlib.sha256()
    with open(path, 'rb') as file:
        while chunk := file.read(1 << 20):
            sha256.update(chunk)
    return sha256.hexdigest()
