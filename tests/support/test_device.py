"""Device, precision and memory."""

import pytest
import torch

from support.device import (
    choose_device,
    choose_precision,
    disable_tf32,
    move_for_training,
    process_memory,
)
from support.errors import UserError


def test_choose_device_by_name():
    assert choose_device('cpu') == torch.device('cpu')
    assert choose_device('auto').type == ('cuda' if torch.cuda.is_available() else 'cpu')


@pytest.mark.parametrize('name', ['gpu', 'cuda:99', ''])
def test_missing_device_is_a_user_error(name):
    with pytest.raises(UserError, match=f'{name!r}.*--device cpu'):
        choose_device(name)


@pytest.mark.parametrize('has_bf16, expected', [(True, torch.bfloat16), (False, torch.float16)])
def test_gpu_uses_bf16_or_else_fp16(monkeypatch, has_bf16, expected):
    monkeypatch.setattr(torch.cuda, 'is_bf16_supported', lambda including_emulation: has_bf16)
    assert choose_precision('auto', torch.device('cuda')) == expected
    assert choose_precision('float32', torch.device('cuda')) == torch.float32
    assert choose_precision('fp16', torch.device('cpu')) == torch.float16


@pytest.mark.parametrize('has_bf16, expected', [(True, torch.bfloat16), (False, torch.float32)])
def test_cpu_uses_bf16_only_with_the_instructions(monkeypatch, has_bf16, expected):
    monkeypatch.setattr(torch.cpu, 'get_capabilities', lambda: {'avx512_bf16': has_bf16},
                        raising=False)
    assert choose_precision('auto', torch.device('cpu')) == expected


@pytest.mark.parametrize('capability, memory_format', [
    ('AVX2', torch.contiguous_format), ('AVX512', torch.channels_last),
    ('DEFAULT', torch.channels_last)])
def test_network_is_trained_in_the_faster_memory_format(monkeypatch, capability, memory_format):
    monkeypatch.setattr(torch.backends.cpu, 'get_cpu_capability', lambda: capability)
    conv = torch.nn.Conv2d(3, 8, 3)
    images = torch.rand(2, 3, 9, 9).contiguous(memory_format=torch.channels_last)
    expected = conv(images)
    move_for_training(conv, torch.device('cpu'))
    feats = conv(images)
    feats.sum().backward()
    for tensor in (conv.weight, conv.weight.grad, feats):
        assert tensor.is_contiguous(memory_format=memory_format)
    assert torch.allclose(feats, expected, atol=1e-6)


def test_disable_tf32_ends_with_the_block(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, 'allow_tf32', True)
    with pytest.raises(ZeroDivisionError), disable_tf32():
        assert not torch.backends.cudnn.allow_tf32
        1 / 0  # noqa: B018
    assert torch.backends.cudnn.allow_tf32


def test_peak_memory_is_at_least_current_memory():
    current, peak = process_memory()
    assert 10 ** 7 < current <= peak    # torch alone takes more than 10 MB
