"""Ranks, workers and signals. Runs of several ranks are tested with train.py."""

import os
import signal
import subprocess
import time

import pytest
import torch

from support.errors import UserError
from support.processes import (
    all_gather,
    all_reduce_sum,
    default_workers,
    get_rank,
    get_world_size,
    ignore_signals_in_worker,
    process_group,
    stop_on_signal,
    wrap_distributed,
)

# --- ranks ---


def test_single_process_needs_no_process_group(monkeypatch):
    monkeypatch.delenv('LOCAL_RANK', raising=False)
    with process_group('cpu') as device:
        assert device == torch.device('cpu')
        assert (get_rank(), get_world_size()) == (0, 1)
        assert all_gather('value') == ['value']
        tensor, network = torch.ones(2), torch.nn.Linear(1, 1)
        assert all_reduce_sum(tensor) is tensor and wrap_distributed(network) is network


def test_several_ranks_cannot_share_a_gpu(monkeypatch):
    monkeypatch.setenv('LOCAL_RANK', '1')
    with pytest.raises(UserError, match='cuda:0.*--device cuda'), process_group('cuda:0'):
        pass


def test_ranks_share_the_cores_among_their_workers(monkeypatch):
    monkeypatch.setattr(os, 'sched_getaffinity', lambda pid: set(range(12)), raising=False)
    for world_size, expected in ((1, 12), (2, 6), (5, 2), (16, 1)):
        monkeypatch.setenv('LOCAL_WORLD_SIZE', str(world_size))
        assert default_workers() == expected
    monkeypatch.setattr(os, 'sched_getaffinity', lambda pid: set(range(64)))
    monkeypatch.delenv('LOCAL_WORLD_SIZE')
    assert default_workers() == 16


# --- signals ---


@pytest.fixture
def fork():
    """A function that runs `target(connection)` in a forked process; returns it and the other end.
    """
    context, processes = torch.multiprocessing.get_context('fork'), []

    def start(target):
        here, there = context.Pipe(duplex=False)
        process = context.Process(target=target, args=(there,), daemon=True)
        process.start()
        there.close()   # so that the end of the process ends the pipe
        processes.append(process)
        return process, here

    yield start
    for process in processes:
        process.kill()
        process.join()


def test_first_signal_sets_the_flag_and_the_second_ends_the_process(fork):
    def run(connection):
        with stop_on_signal() as flag:
            os.kill(os.getpid(), signal.SIGTERM)
            connection.send(flag.is_set())
            os.kill(os.getpid(), signal.SIGTERM)
            connection.send('still there')

    process, connection = fork(run)
    assert connection.recv() is True
    with pytest.raises(EOFError):
        connection.recv()
    process.join(10)
    assert process.exitcode == -signal.SIGTERM


def test_signal_handlers_are_restored_after_the_block():
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = [signal.getsignal(number) for number in numbers]
    with stop_on_signal() as flag:
        assert [signal.getsignal(number) for number in numbers] != before
    assert not flag.is_set()
    assert [signal.getsignal(number) for number in numbers] == before


@pytest.mark.skipif(not hasattr(signal, 'sigwaitinfo'), reason='signals have no sender here')
def test_worker_is_ended_by_its_parent_only(fork):
    def work(connection):
        ignore_signals_in_worker(0)
        connection.send('ready')
        time.sleep(60)

    worker, connection = fork(work)
    assert connection.recv() == 'ready'
    subprocess.run(['sh', '-c', f'kill -TERM {worker.pid}; kill -INT {worker.pid}'], check=True)
    time.sleep(0.3)
    assert worker.is_alive(), 'ended by a signal of another process'
    worker.terminate()
    worker.join(10)
    assert not worker.is_alive()
