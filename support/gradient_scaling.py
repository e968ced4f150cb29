"""Gradient scaling for float16, and steps that are skipped if a gradient is not finite."""

import math

import torch


def make_scaler(dtype, device):
    """Make the gradient scaler for a mixed-precision dtype.

    float16 needs scaled gradients, which would underflow otherwise; other dtypes do not, and use
    the scaler only to skip steps whose gradients are not finite.
    """
    if dtype == torch.float16:
        return torch.amp.GradScaler(device.type)
    return UnitScaler(device.type, init_scale=1.)


class UnitScaler(torch.amp.GradScaler):
    """A gradient scaler whose scale stays 1."""

    def update(self, new_scale=1.):
        """Keep the scale, also after a skipped step."""
        super().update(new_scale)


def nan_if_not_finite(loss):
    """Replace an infinite loss by NaN.

    A loss that is not finite may have finite gradients. NaN makes the gradients non-finite, and in
    every rank, since they are averaged, so that all ranks skip the step.
    """
    # A product: the gradient of torch.where(isfinite, loss, nan) would be 0.
    return loss * torch.where(loss.isfinite(), 1., math.nan)


def step_if_finite(optimizer, scaler):
    """Update the weights unless a gradient is not finite, without waiting for the device.

    Returns:
        Whether the gradients were finite, a scalar tensor.
    """
    scaler.unscale_(optimizer)
    gradients = [p.grad for group in optimizer.param_groups for p in group['params']]
    is_finite = torch.nn.utils.get_total_norm(gradients, norm_type=math.inf).isfinite()
    scaler.step(optimizer)
    scaler.update()
    return is_finite
