"""Ranks, workers and signals. Runs of several ranks are tested with train.py."""

import datetime
import functools
import math
import os
import shutil
import signal
import subprocess
import threading
import time

import pytest
import torch

from support.errors import UserError
from support.processes import (
    all_gather,
    all_reduce_sum,
    barrier,
    block_signals,
    check_shared_memory,
    cpu_quota,
    default_workers,
    get_rank,
    get_world_size,
    ignore_signals_in_worker,
    process_group,
    stop_on_signal,
    wrap_distributed,
)


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


def test_more_ranks_than_gpus_are_a_user_error(monkeypatch):
    monkeypatch.setenv('LOCAL_RANK', '1')
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: 1)
    with pytest.raises(UserError, match='1 GPUs.*--nproc-per-node 1'), process_group('auto'):
        pass


@pytest.mark.parametrize('error', [
    RuntimeError('[/__w/pytorch/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:561] '
                 'Connection closed by peer [127.0.0.1]:39818. This is typically caused by a '
                 'remote worker crashing.'),
    RuntimeError('[../third_party/gloo/gloo/transport/tcp/unbound_buffer.cc:78] Timed out waiting '
                 '6000ms for recv operation to complete'),
    torch.distributed.DistBackendError('NCCL error: remote process exited'),
    torch.distributed.DistStoreError('wait timeout after 3000ms, keys: /default_pg/0//cpu//0/0'),
])
def test_error_of_the_network_is_a_user_error(monkeypatch, error):
    monkeypatch.setenv('LOCAL_RANK', '0')
    monkeypatch.setattr(torch.distributed, 'init_process_group', lambda *args, **kwargs: None)
    with pytest.raises(UserError, match='--resume auto'), process_group('cpu'):
        raise error


def test_other_runtime_errors_of_a_rank_keep_their_traceback(monkeypatch):
    monkeypatch.setenv('LOCAL_RANK', '0')
    monkeypatch.setattr(torch.distributed, 'init_process_group', lambda *args, **kwargs: None)
    for text in ('file was closed', 'reset the connection first', 'timed out', 'gloomy'):
        with pytest.raises(RuntimeError, match=f'^{text}$'), process_group('cpu'):
            raise RuntimeError(text)


def test_barrier_waits_longer_than_a_collective_operation(fork, tmp_path):
    timeout = datetime.timedelta(seconds=1.5)

    def run(connection, rank):
        torch.distributed.init_process_group('gloo', f'file://{tmp_path}/store', timeout=timeout,
                                             rank=rank, world_size=2)
        if rank == 0:
            time.sleep(2.5)     # a long download
        barrier()
        connection.send('done')

    connections = [fork(functools.partial(run, rank=rank))[1] for rank in range(2)]
    assert [connection.recv() for connection in connections] == ['done', 'done']


def test_quota_of_a_container_is_read(tmp_path):
    assert cpu_quota(tmp_path) == math.inf
    (tmp_path / 'cpu').mkdir()
    (tmp_path / 'cpu' / 'cpu.cfs_period_us').write_text('100000\n')
    for text, expected in (('-1\n', math.inf), ('250000\n', 2.5)):     # cgroup v1
        (tmp_path / 'cpu' / 'cpu.cfs_quota_us').write_text(text)
        assert cpu_quota(tmp_path) == expected
    (tmp_path / 'cpu' / 'cpu.cfs_quota_us').unlink()
    for text, expected in (('max 100000\n', math.inf), ('150000 100000\n', 1.5)):    # v2
        (tmp_path / 'cpu.max').write_text(text)
        assert cpu_quota(tmp_path) == expected


def test_ranks_share_the_cores_among_their_workers(monkeypatch):
    monkeypatch.setattr('support.processes.cpu_quota', lambda: math.inf)
    monkeypatch.setattr(os, 'sched_getaffinity', lambda pid: set(range(12)), raising=False)
    for world_size, expected in ((1, 12), (2, 6), (5, 2), (16, 1)):
        monkeypatch.setenv('LOCAL_WORLD_SIZE', str(world_size))
        assert default_workers() == expected
    monkeypatch.setattr(os, 'sched_getaffinity', lambda pid: set(range(64)))
    monkeypatch.delenv('LOCAL_WORLD_SIZE')
    assert default_workers() == 16
    for quota, expected in ((0.5, 1), (2.5, 2), (6, 6)):
        monkeypatch.setattr('support.processes.cpu_quota', lambda quota=quota: quota)
        assert default_workers() == expected


@pytest.mark.skipif(not os.path.isdir('/dev/shm'), reason='no folder for shared memory')
def test_too_little_shared_memory_is_a_user_error(monkeypatch):
    usage = shutil.disk_usage('/')
    monkeypatch.setattr(shutil, 'disk_usage', lambda folder: usage._replace(free=64_000_000))
    monkeypatch.delenv('LOCAL_WORLD_SIZE', raising=False)
    for workers in (0, 1, 3):
        check_shared_memory(workers, 9_000_000)     # 63 MB
    with pytest.raises(UserError, match='81 MB .* 64 MB free .* --workers 3, .*--shm-size'):
        check_shared_memory(4, 9_000_000)
    monkeypatch.setenv('LOCAL_WORLD_SIZE', '2')
    with pytest.raises(UserError, match='32 MB free .* --workers 1,'):
        check_shared_memory(3, 9_000_000)


# --- signals ---


def test_first_signal_sets_the_flag_and_a_later_one_ends_the_process(fork, monkeypatch):
    monkeypatch.setattr('support.processes.SAME_SIGNAL_SECONDS', 0.5)

    def run(connection):
        with stop_on_signal() as flag:
            os.kill(os.getpid(), signal.SIGTERM)
            connection.send(flag.is_set())
            os.kill(os.getpid(), signal.SIGTERM)    # a copy of the first
            connection.send('still there')
            time.sleep(0.6)
            os.kill(os.getpid(), signal.SIGTERM)
            connection.send('and still')

    process, connection = fork(run)
    assert connection.recv() is True
    assert connection.recv() == 'still there'
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


@pytest.mark.skipif(not hasattr(signal, 'sigtimedwait'), reason='signals have no sender here')
def test_worker_is_ended_by_its_parent_only(fork):
    def work(connection):
        connection.send('started')
        time.sleep(0.2)
        threading.Thread(target=time.sleep, args=(60,), daemon=True).start()
        ignore_signals_in_worker(0)
        connection.send('ready')
        time.sleep(60)

    with block_signals():
        worker, connection = fork(work)
    assert connection.recv() == 'started'
    subprocess.run(['sh', '-c', f'kill -TERM {worker.pid}; kill -INT {worker.pid}'], check=True)
    assert connection.recv() == 'ready'
    subprocess.run(['sh', '-c', f'kill -TERM {worker.pid}; kill -INT {worker.pid}'], check=True)
    time.sleep(0.3)
    assert worker.is_alive(), 'ended by a signal of another process'
    worker.terminate()
    worker.join(10)
    assert not worker.is_alive()
