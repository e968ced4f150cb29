"""What a run asks of its machine, and the images it keeps in memory."""

import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest
import torch

import datasets
import machine
from create_data_lists import Parameters as ListParameters, main as make_lists
from datasets import ImageCache, PascalVOCDataset, ShuffledBatches, make_train_loader
from utils import UserError, remove_torn


@pytest.fixture
def cpu():
    """The device of all that follows."""
    return torch.device('cpu')


# --- device ---


def test_a_device_has_a_name():
    assert machine.choose_device('cpu') == torch.device('cpu')
    assert machine.choose_device('auto').type == ('cuda' if torch.cuda.is_available() else 'cpu')


@pytest.mark.parametrize('name', ['gpu', 'cuda:99', ''])
def test_a_device_that_is_not_there_is_a_slip(name):
    with pytest.raises(UserError, match=f'{name!r}.*--device cpu'):
        machine.choose_device(name)


# --- number formats and compiler ---


@pytest.mark.parametrize('has_bf16, expected', [(True, torch.bfloat16), (False, torch.float16)])
def test_a_gpu_gets_bf16_or_else_fp16(monkeypatch, has_bf16, expected, cpu):
    monkeypatch.setattr(torch.cuda, 'is_bf16_supported', lambda including_emulation: has_bf16)
    assert machine.choose_precision('auto', torch.device('cuda')) == expected
    assert machine.choose_precision('float32', torch.device('cuda')) == torch.float32
    assert machine.choose_precision('fp16', cpu) == torch.float16


def double(x):
    """A function to compile."""
    return 2 * x


def test_compilation_that_fails_is_told_and_done_without(capsys, monkeypatch, cpu):
    def compiler(function, dynamic):
        def fail(x):
            raise RuntimeError('no compiler found\nand more')
        return fail

    monkeypatch.setattr(torch, 'compile', compiler)
    function, = machine.compile_or_not('on', cpu, (double,), lambda f: f(torch.ones(2)))
    assert function is double
    out = capsys.readouterr().out
    assert out.count('\n') == 1 and 'does not work here (no compiler found)' in out


def test_compilation_that_works_is_used(monkeypatch, cpu):
    monkeypatch.setattr(torch, 'compile', lambda function, dynamic: lambda x: function(x) + 1)
    tried = []
    function, = machine.compile_or_not('on', cpu, (double,), lambda f: tried.append(f(1)))
    assert tried == [3] and function(2) == 5
    for choice in ('auto', 'off'):
        assert machine.compile_or_not(choice, cpu, (double,), tried.append) == (double,)


# --- signals ---


def test_first_signal_sets_the_flag_and_the_second_ends_the_process():
    code = ('import machine, os, signal\n'
            'with machine.signals_as_flag() as flag:\n'
            '    os.kill(os.getpid(), signal.SIGTERM)\n'
            '    print(flag.is_set(), flush=True)\n'
            '    os.kill(os.getpid(), signal.SIGTERM)\n'
            '    print("still there")\n')
    root = pathlib.Path(machine.__file__).parent
    done = subprocess.run([sys.executable, '-c', code], cwd=root, capture_output=True, text=True)
    assert done.returncode == -signal.SIGTERM and done.stdout == 'True\n'


@pytest.mark.skipif(not hasattr(signal, 'sigwaitinfo'), reason='signals have no sender here')
def test_a_worker_obeys_its_parent_alone():
    worker = torch.multiprocessing.get_context('fork').Process(
        target=lambda: (machine.leave_signals_to_parent(0), time.sleep(60)), daemon=True)
    worker.start()
    time.sleep(0.5)
    subprocess.run(['sh', '-c', f'kill -TERM {worker.pid}; kill -INT {worker.pid}'], check=True)
    time.sleep(0.3)
    assert worker.is_alive(), 'a stranger ended it'
    worker.terminate()
    worker.join(10)
    assert not worker.is_alive()


# --- files ---


def test_only_what_ended_processes_left_is_removed(tmp_path):
    ended = subprocess.Popen(['true'])
    ended.wait()
    names = [f'.net.pth.{ended.pid}.tar', f'.net.pth.{os.getpid()}.tar', 'net.pth.tar',
             f'.other.pth.{ended.pid}.tar', '.net.pth.notes.tar']
    for name in names:
        (tmp_path / name).touch()
    remove_torn(tmp_path / 'net.pth.tar')
    assert {path.name for path in tmp_path.iterdir()} == set(names[1:])


# --- the cache ---


@pytest.fixture
def dataset(make_voc, tmp_path):
    """Five images to train on."""
    images = {f'im{i}': [('cat', (5, 5, 30, 30))] for i in range(5)}
    voc = make_voc({'train': images})
    make_lists(ListParameters(train=(f'{voc}:train',), output_folder=str(tmp_path / 'lists')))
    return PascalVOCDataset(tmp_path / 'lists', 'TRAIN', keep_difficult=True)


def test_cached_images_are_those_of_the_files_with_any_number_of_workers(dataset, capsys, cpu):
    order = ShuffledBatches(len(dataset), 2, seed=0, start=0, end=4)
    plain = [batch[0] for batch in make_train_loader(dataset, order, 0, cpu)]
    dataset.cache = ImageCache(dataset.images)
    out = capsys.readouterr().out
    assert out.startswith('cache: 5 images, 0.00 GB of the ')
    assert len(dataset.cache.memory) == 5 * 3 * 64 * 48
    for path in dataset.images:  # it does not look at the files again
        pathlib.Path(path).unlink()
    for workers in (0, 2):
        cached = [batch[0] for batch in make_train_loader(dataset, order, workers, cpu)]
        assert all(torch.equal(a, b) for a, b in zip(plain, cached, strict=True))
    folder, _ = machine.shared_folder()
    assert not list(folder.glob(f'ssd300-cache-*-{os.getpid()}'))


def test_a_cache_that_does_not_fit_is_refused(dataset, monkeypatch, tmp_path):
    monkeypatch.setattr(datasets, 'shared_folder', lambda: (tmp_path, 40_000))
    with pytest.raises(UserError, match='needs 0.00 GB, .* the 0.00 GB free .* leave --cache out'):
        ImageCache(dataset.images)
    assert not list(tmp_path.glob('ssd300*'))


def test_a_corrupt_image_is_named_by_the_cache(dataset):
    path = pathlib.Path(dataset.images[2])
    path.write_bytes(path.read_bytes()[:400])
    with pytest.raises(UserError, match=f'{path.name}.*cannot be decoded'):
        ImageCache(dataset.images)


def test_a_packed_batch_is_the_batch(dataset, cpu):
    items = [dataset[i] for i in range(3)]
    images, boxes, labels, difficulties = datasets.collate_fn(items)
    (packed, packed_boxes, packed_labels), = datasets.batches_on(cpu, [datasets.pack(items)])
    assert torch.equal(images, packed)
    for lists in ((boxes, packed_boxes), (labels, packed_labels)):
        assert all(torch.equal(a, b) for a, b in zip(*lists, strict=True))
