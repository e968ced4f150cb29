"""Tests of support/l2_rescale.py."""

import pytest
import torch
from torch import nn

from support.l2_rescale import l2_rescale


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16, torch.float16])
def test_result_and_gradients_equal_those_of_normalization_in_float32(dtype):
    feats = torch.rand(5, 64, 3, 3).relu() * 1000       # whose squares overflow float16
    feats[0, :, 1, 2] = 0
    feats = feats.to(dtype).requires_grad_()
    factors = (20 * torch.rand(1, 64, 1, 1)).requires_grad_()
    weights = torch.randn(5, 64, 3, 3).to(dtype)

    rescaled = l2_rescale(feats, factors)
    expected = (nn.functional.normalize(feats.float(), dim=1, eps=1e-10) * factors).to(dtype)
    assert rescaled.dtype == dtype and (rescaled[0, :, 1, 2] == 0).all()
    torch.testing.assert_close(rescaled, expected)
    gradients = torch.autograd.grad((rescaled * weights).sum(), [feats, factors])
    expected = torch.autograd.grad((expected * weights).sum(), [feats, factors])
    for of_feats, _ in (gradients, expected):
        of_feats[0, :, 1, 2] = 0                        # huge where the epsilon is the length
    rtol = 1e-4 if dtype == torch.float32 else 1e-2
    torch.testing.assert_close(gradients, expected, atol=1e-5, rtol=rtol)


@pytest.mark.parametrize('epsilon', [1e-10, torch.tensor(1e-3)], ids=str)
def test_cell_shorter_than_epsilon_is_divided_by_epsilon(epsilon):
    feats = torch.full((1, 4, 1, 1), 1e-12)
    rescaled = l2_rescale(feats, torch.full((1, 4, 1, 1), 20.), epsilon)
    torch.testing.assert_close(rescaled, feats * 20 / epsilon)
