"""Batch normalization for training, folded into the convolutions for detection.

The paper's network has none, and learns slowly from random weights without it.

Running statistics are those of the batches before. Activations that are not finite would make them
NaN for good, and checkpoints with them. As every layer's input is normalized, that takes weights
that have diverged: lower the learning rate, and start from a checkpoint of before.
"""

from torch import nn

EPSILON = 1e-5  # added to the variance
# Of the initial weights of the prediction convolutions. At Xavier's size the scores of normalized
# features differ by several units from the start, and hard negative mining picks the highest of
# thousands: the loss starts nearly three times as high, and the first steps only undo that.
PREDICTION_SCALE = 0.1
# Tensors of a BatchNorm2d that its output depends on.
NORM_TENSORS = ('weight', 'bias', 'running_mean', 'running_var')


def add_batch_norm(model):
    """Normalize the output of each convolution of an SSD300's base and auxiliary layers, in place.

    The BatchNorm2d is an attribute `norm` of its convolution, so that the names of the other
    weights do not change. The bias of the convolution, superfluous before it, stays. The weights of
    the prediction convolutions are multiplied by `PREDICTION_SCALE`.
    """
    convs = [layer for layer in (*model.base.children(), *model.aux_convs.children())
             if isinstance(layer, nn.Conv2d)]
    for conv in convs:
        conv.norm = nn.BatchNorm2d(len(conv.weight), eps=EPSILON)
        conv.register_forward_hook(normalize_output)
    for conv in (*model.pred_convs.loc_convs, *model.pred_convs.class_convs):
        conv.weight.data *= PREDICTION_SCALE


def normalize_output(conv, inputs, output):
    """Normalize a convolution's output: a forward hook."""
    return conv.norm(output)


def is_norm(name):
    """Return whether a parameter or buffer belongs to an added batch normalization."""
    return '.norm.' in name


def fold_batch_norm(state):
    """Fold batch normalization into the convolutions of a state dict.

    In evaluation mode it multiplies each channel by a constant and adds another, which weights and
    bias of the convolution before it can do.

    Args:
        state: state dict of an SSD300, with batch normalization or without.

    Returns:
        The state dict of an SSD300 without, whose outputs are the same. Computed in float64.
    """
    folded = dict(state)
    for name in [key.removesuffix('.norm.weight') for key in state if key.endswith('.norm.weight')]:
        keys = [f'{name}.{key}' for key in ('weight', 'bias')]
        norm_keys = [f'{name}.norm.{key}' for key in NORM_TENSORS]
        if all(key in folded for key in keys + norm_keys):
            weight, bias = (folded[key].double() for key in keys)
            factor, shift, mean, variance = (folded.pop(key).double() for key in norm_keys)
            folded.pop(f'{name}.norm.num_batches_tracked', None)
            factor = factor / (variance + EPSILON).sqrt()
            folded[keys[0]] = (weight * factor.view(-1, 1, 1, 1)).float()
            folded[keys[1]] = ((bias - mean) * factor + shift).float()
    return folded
