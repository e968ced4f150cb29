"""torch.compile, and what happens without a compiler. The compilers here are stand-ins."""

import contextlib
import copy

import pytest
import torch

from model import MultiBoxLoss
from support.compilation import compile_if_possible, compile_network_and_loss
from thin import ThinSSD300


@pytest.fixture
def cpu():
    """The device of all calls."""
    return torch.device('cpu')


def double(x):
    """A function to compile."""
    return 2 * x


def test_working_compilation_is_used(monkeypatch, cpu):
    monkeypatch.setattr(torch, 'compile', lambda function, dynamic: lambda x: function(x) + 1)
    tried = []
    function, = compile_if_possible('on', cpu, (double,), lambda f: tried.append(f(1)))
    assert tried == [3] and function(2) == 5
    for choice in ('auto', 'off'):
        assert compile_if_possible(choice, cpu, (double,), tried.append) == (double,)
    assert tried == [3]


def test_compiled_network_is_returned_and_the_loss_replaced_in_the_criterion(monkeypatch):
    def compile_(function, dynamic):
        compiled.append(copy.copy(function))
        return compiled[-1]

    monkeypatch.setattr(torch, 'compile', compile_)
    compiled, network = [], ThinSSD300(3)
    criterion = MultiBoxLoss(network.priors_cxcy)
    result = compile_network_and_loss('on', network, criterion, contextlib.nullcontext(), 1, 300)
    assert len(compiled) == 2 and result is compiled[0] and result is not network
    assert criterion.compute_losses is compiled[1]


def test_failing_compilation_prints_a_note_and_changes_nothing(capsys, monkeypatch, cpu):
    def fail(x):
        raise RuntimeError('no compiler found\nand more')

    monkeypatch.setattr(torch, 'compile', lambda function, dynamic: fail)
    function, = compile_if_possible('on', cpu, (double,), lambda f: f(torch.ones(2)))
    assert function is double
    out = capsys.readouterr().out
    assert out.count('\n') == 1 and 'does not work here (RuntimeError: no compiler found)' in out


def test_reason_is_that_of_the_back_end(capsys, monkeypatch, cpu):
    def fail(graph, inputs):
        raise ValueError('no such instruction')

    compile_with = torch.compile
    monkeypatch.setattr(torch, 'compile', lambda f, dynamic: compile_with(f, backend=fail))
    function, = compile_if_possible('on', cpu, (double,), lambda f: f(torch.ones(2)))
    assert function is double
    assert 'does not work here (ValueError: no such instruction)' in capsys.readouterr().out


def test_what_fails_without_the_compiler_is_raised(cpu):
    def divide(x):
        return x / 0

    with pytest.raises(ZeroDivisionError):
        compile_if_possible('on', cpu, (divide,), lambda f: f(1))


def test_too_little_memory_is_not_a_failure_of_the_compiler(monkeypatch, cpu):
    def fail(x):
        raise torch.OutOfMemoryError('out of memory')

    monkeypatch.setattr(torch, 'compile', lambda function, dynamic: fail)
    with pytest.raises(torch.OutOfMemoryError):
        compile_if_possible('on', cpu, (double,), lambda f: f(torch.ones(2)))
