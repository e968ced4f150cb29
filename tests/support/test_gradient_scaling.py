"""Steps with gradients that are not finite, and the scale of float16."""

import copy
import functools
import math

import pytest
import torch

from support.gradient_scaling import make_scaler, nan_if_not_finite, step_if_finite
from train import make_optimizer, set_lr

assert_equal = functools.partial(torch.testing.assert_close, rtol=0, atol=0)


@pytest.fixture
def make_stepper():
    """Return a function that makes a small model, its optimizer, and a function that takes a step.
    """
    def make(kind, dtype=torch.float32, lr=0.01):
        torch.manual_seed(1)
        model = torch.nn.Linear(3, 2)
        optimizer = make_optimizer(model, kind, 5e-4)
        set_lr(optimizer, lr)
        scaler = make_scaler(dtype, torch.device('cpu'))

        def step(factor):
            """Take a step with the loss times `factor`; returns whether the gradients are finite.
            """
            optimizer.zero_grad()
            scaler.scale(model(torch.ones(4, 3)).square().sum() * factor).backward()
            return step_if_finite(optimizer, scaler).item()
        return model, optimizer, scaler, step
    return make


@pytest.mark.parametrize('kind', ['sgd', 'adamw'])
@pytest.mark.parametrize('factor', [math.inf, -math.inf, math.nan])
def test_step_that_is_not_finite_changes_nothing(make_stepper, kind, factor):
    model, optimizer, _, step = make_stepper(kind)

    def copy_state():
        return copy.deepcopy([model.state_dict(), optimizer.state_dict()['state']])

    before = copy_state()
    assert step(factor) is False    # the very first step, before there is any momentum
    assert_equal(before[0], copy_state()[0])
    assert step(1.) is True
    before = copy_state()
    assert step(factor) is False
    assert_equal(before, copy_state())
    assert step(1.) is True
    assert all(value.isfinite().all() for value in model.state_dict().values())


def test_skipped_steps_do_not_change_the_others(make_stepper):
    weights = []
    for factors in ([1., .5, 2.], [math.nan, 1., math.inf, .5, math.nan, math.nan, 2.]):
        model, _, _, step = make_stepper('sgd')
        for factor in factors:
            step(factor)
        weights.append(model.state_dict())
    assert_equal(*weights)


def test_only_float16_scales_gradients(make_stepper):
    for dtype, scales in ((torch.float16, [2. ** 16, 2. ** 15]), (torch.bfloat16, [1., 1.]),
                          (torch.float32, [1., 1.])):
        _, _, scaler, step = make_stepper('sgd', dtype)
        step(1.)
        assert scaler.get_scale() == scales[0]
        step(math.inf)
        assert scaler.get_scale() == scales[1]


def test_loss_that_is_not_finite_has_no_finite_gradient():
    for value, is_finite in ((1., True), (math.inf, False), (-math.inf, False), (math.nan, False)):
        weight = torch.tensor(1., requires_grad=True)
        loss = nan_if_not_finite(weight + value)
        loss.backward()     # of weight + inf it would be 1
        assert loss.isfinite() == weight.grad.isfinite() == is_finite
        assert not is_finite or (loss, weight.grad) == (2., 1.)
