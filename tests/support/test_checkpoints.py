"""Checkpoints: what is saved is loaded, no code is run, and a run continues where it stopped."""

import errno
import functools
import os
import pickle

import pytest
import torch
from torchvision.models import Weights, WeightsEnum

from support.checkpoints import (
    download_weights,
    find_newest_checkpoint,
    hash_file,
    load_checkpoint,
    restore,
    save_checkpoint,
    set_aside,
    sibling_path,
)
from support.errors import UserError

# --- files ---


def test_saved_checkpoint_is_loaded(tmp_path):
    path = tmp_path / 'check.pth.tar'
    model = torch.nn.Linear(2, 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    save_checkpoint(path, iteration=7, model=model.state_dict(), label_map={'cat': 1},
                    optimizer=optimizer.state_dict(), note=None)
    state = load_checkpoint(str(path))
    assert state['iteration'] == 7 and state['label_map'] == {'cat': 1} and state['note'] is None
    assert all(torch.equal(state['model'][name], tensor) and tensor.device.type == 'cpu'
               for name, tensor in model.state_dict().items())
    optimizer.load_state_dict(state['optimizer'])
    assert os.listdir(tmp_path) == ['check.pth.tar']


def test_old_checkpoint_stays_if_the_new_one_cannot_be_written(tmp_path, monkeypatch):
    path = tmp_path / 'check.pth.tar'
    save_checkpoint(path, iteration=1)
    with pytest.raises((AttributeError, pickle.PicklingError)):
        save_checkpoint(path, iteration=lambda: 2)      # cannot be pickled

    def full(_):
        raise OSError(errno.ENOSPC, 'No space left on device')
    monkeypatch.setattr(os, 'fsync', full)
    with pytest.raises(UserError, match='check.pth.tar.*No space left'):
        save_checkpoint(path, iteration=3)
    assert load_checkpoint(path) == {'iteration': 1}
    assert os.listdir(tmp_path) == ['check.pth.tar']


def test_full_disk_is_a_user_error_and_the_old_checkpoint_stays(tmp_path):
    resource = pytest.importorskip('resource')
    path = tmp_path / 'check.pth.tar'
    save_checkpoint(path, iteration=1)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))      # maximum size of any file
    try:
        with pytest.raises(UserError, match='check.pth.tar cannot be written'):
            save_checkpoint(path, weights=torch.zeros(200_000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert load_checkpoint(path) == {'iteration': 1}
    assert os.listdir(tmp_path) == ['check.pth.tar']


@pytest.mark.parametrize('place', ['file/check.pth.tar', 'nowhere/check.pth.tar', ''])
def test_path_that_cannot_be_written_is_a_user_error(place, tmp_path):
    (tmp_path / 'file').touch()
    with pytest.raises(UserError, match='cannot be written'):
        save_checkpoint(tmp_path / place, iteration=1)
    assert os.listdir(tmp_path) == ['file']


class MakesFolder:
    """Makes a folder when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_code_in_a_checkpoint_is_not_run(tmp_path):
    for content in (torch.nn.Linear(1, 1), {'model': MakesFolder(tmp_path / 'made')}):
        torch.save(content, tmp_path / 'check.pth.tar')
        with pytest.raises(UserError, match='check.pth.tar.*train.py'):
            load_checkpoint(tmp_path / 'check.pth.tar')
    assert not (tmp_path / 'made').exists()


@pytest.mark.parametrize('corrupt', [
    pytest.param(lambda whole: b'', id='empty'),
    pytest.param(lambda whole: b'\n', id='an empty line'),
    pytest.param(lambda whole: b'not a checkpoint', id='text'),
    pytest.param(lambda whole: b'Keras', id='text that starts like a pickle'),
    pytest.param(lambda whole: b'{"images": 3}', id='json'),
    pytest.param(lambda whole: bytes(range(256)), id='bytes'),
    pytest.param(lambda whole: pickle.dumps([1, 2], 2), id='another pickle'),
    pytest.param(lambda whole: pickle.dumps({'a': 1}, 2)[:-3], id='half a pickle'),
    *[pytest.param(lambda whole, percent=percent: whole[:len(whole) * percent // 100],
                   id=f'{percent} %') for percent in (1, 30, 60, 99)],
])
def test_other_bytes_are_a_user_error(corrupt, tmp_path):
    save_checkpoint(tmp_path / 'whole', weights=torch.zeros(500))
    path = tmp_path / 'check.pth.tar'
    path.write_bytes(corrupt((tmp_path / 'whole').read_bytes()))
    with pytest.raises(UserError, match='check.pth.tar'):
        load_checkpoint(path)


@pytest.mark.parametrize('content', [torch.zeros(3), [1, 2], 'text'], ids=str)
def test_checkpoint_is_a_dictionary(content, tmp_path):
    torch.save(content, tmp_path / 'check.pth.tar')
    with pytest.raises(UserError, match='check.pth.tar'):
        load_checkpoint(tmp_path / 'check.pth.tar')


def test_missing_checkpoint_is_a_user_error(tmp_path):
    for path in (tmp_path / 'none.pth.tar', tmp_path):
        with pytest.raises(UserError, match=path.name):
            load_checkpoint(path)


# --- downloaded weights ---


def test_cached_weights_are_loaded_if_their_hash_is_that_of_the_name(tmp_path, monkeypatch):
    monkeypatch.setenv('TORCH_HOME', str(tmp_path))
    folder, weights = tmp_path / 'hub' / 'checkpoints', {'a': torch.ones(2)}
    folder.mkdir(parents=True)
    for content in (weights, {'a': MakesFolder(tmp_path / 'made')}):
        torch.save(content, folder / 'file')
        digits = hash_file(folder / 'file')[:8]
        (folder / 'file').rename(folder / f'net-{digits}.pth')
        net = WeightsEnum('Net', {'ONLY': Weights(f'http://localhost/net-{digits}.pth', None, {})})
        if content is weights:
            assert torch.equal(download_weights(net.ONLY, 'stop')['a'], weights['a'])
            torch.save({'a': torch.zeros(2)}, folder / f'net-{digits}.pth')     # another file
        with pytest.raises(UserError, match=f'net-{digits}.pth.*or stop'):
            download_weights(net.ONLY, 'stop')
    assert not (tmp_path / 'made').exists()


# --- resuming a run ---


@pytest.mark.parametrize('name, best, log', [
    ('net.pth.tar', 'net.best.pth.tar', 'net_log'), ('net.pt', 'net.best.pt', 'net_log'),
    ('net', 'net.best', 'net_log'), ('net.v2.pth', 'net.v2.best.pth', 'net.v2_log')])
def test_mark_is_inserted_before_the_suffix(tmp_path, name, best, log):
    assert sibling_path(tmp_path / name, '.best') == tmp_path / best
    assert sibling_path(str(tmp_path / name), '_log', keep_suffix=False) == tmp_path / log


def test_newest_checkpoint_is_the_last_one_that_can_be_read(tmp_path, capsys):
    last, best = tmp_path / 'net.pth.tar', tmp_path / 'net.best.pth.tar'
    assert find_newest_checkpoint(last) is None
    save_checkpoint(last, iteration=2)
    for best_iteration in (1, 2, 3):    # 3: of an earlier run
        save_checkpoint(best, iteration=best_iteration)
        assert find_newest_checkpoint(str(last)) == str(last)
    assert capsys.readouterr().out == ''
    last.write_bytes(last.read_bytes()[:100])
    assert find_newest_checkpoint(last) == str(best)
    best.write_bytes(best.read_bytes()[:100])
    last.unlink()
    assert find_newest_checkpoint(last) is None
    assert capsys.readouterr().out.count('note: ') == 2


def test_checkpoints_of_an_earlier_run_are_renamed(tmp_path, capsys):
    disk, folder = tmp_path / 'disk', tmp_path / 'run'
    disk.mkdir()
    folder.mkdir()
    save_checkpoint(disk / 'net.pth', iteration=5)
    (folder / 'net.pth').symlink_to(disk / 'net.pth')
    save_checkpoint(folder / 'net.best.pth', iteration=4)
    set_aside(str(folder / 'net.pth'))
    assert find_newest_checkpoint(folder / 'net.pth') is None
    assert load_checkpoint(disk / 'net.earlier.pth')['iteration'] == 5
    assert load_checkpoint(folder / 'net.best.earlier.pth')['iteration'] == 4
    assert capsys.readouterr().out.count('is of an earlier run; renamed to') == 2
    save_checkpoint(folder / 'net.pth', iteration=1)    # where the link still leads to
    assert load_checkpoint(disk / 'net.pth')['iteration'] == 1
    set_aside(tmp_path / 'new.pth')


@pytest.mark.parametrize('iteration', ['3', -1, 2.5, torch.zeros(2)], ids=str)
def test_iteration_is_a_number(iteration, tmp_path, capsys):
    last, best = tmp_path / 'net.pth.tar', tmp_path / 'net.best.pth.tar'
    save_checkpoint(last, iteration=iteration)
    save_checkpoint(best, iteration=1)
    assert find_newest_checkpoint(last) == str(best)
    assert 'net.pth.tar' in capsys.readouterr().out


SETTINGS = {'network': 'ssd300', 'optimizer': 'sgd', 'batch_norm': False, 'priors': 'voc',
            'precision': 'float32', 'seed': 0, 'lr': 1e-3}


def make_run(weight_decay=5e-4):
    """A small model with its label map, an SGD optimizer and a scaler."""
    model = torch.nn.Linear(2, 3)
    model.label_map = {'background': 0, 'cat': 1, 'dog': 2}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=weight_decay)
    return model, optimizer, torch.amp.GradScaler('cpu', init_scale=8.)


@pytest.fixture
def saved(tmp_path):
    """The path of a checkpoint after one step, and the run that wrote it."""
    model, optimizer, scaler = make_run()
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    path = tmp_path / 'net.pth.tar'
    save_checkpoint(path, iteration=1, model=model.state_dict(), optimizer=optimizer.state_dict(),
                    scaler={**scaler.state_dict(), 'scale': 4.}, label_map=model.label_map,
                    parameters=SETTINGS)
    return path, model, optimizer


def test_restored_run_is_the_saved_one(saved, capsys):
    path, saved_model, saved_optimizer = saved
    model, optimizer, scaler = make_run(weight_decay=0.25)
    assert restore(path, model, optimizer, scaler, SETTINGS, ('seed', 'lr')) == 1
    assert capsys.readouterr().out == ''
    for parameter, saved_parameter in zip(model.parameters(), saved_model.parameters()):
        assert torch.equal(parameter, saved_parameter)
        assert torch.equal(optimizer.state[parameter]['momentum_buffer'],
                           saved_optimizer.state[saved_parameter]['momentum_buffer'])
    assert scaler.get_scale() == 4
    assert optimizer.param_groups[0]['weight_decay'] == 0.25    # this run's


@pytest.mark.parametrize('kind', ['sgd', 'adamw'])
@pytest.mark.parametrize('formats', [(torch.channels_last, torch.contiguous_format),
                                     (torch.contiguous_format, torch.channels_last)], ids=str)
def test_run_is_resumed_in_another_memory_format(kind, formats, tmp_path):
    settings = {**SETTINGS, 'optimizer': kind}
    runs = []
    for memory_format in formats:
        torch.manual_seed(0)
        model = torch.nn.Conv2d(3, 4, 3).to(memory_format=memory_format)
        model.label_map = {'background': 0, 'cat': 1}
        make = {'sgd': functools.partial(torch.optim.SGD, momentum=0.9),
                'adamw': torch.optim.AdamW}[kind]
        runs.append((model, make(model.parameters(), lr=0.1, fused=True)))
    images = torch.rand(2, 3, 8, 8)

    def step(model, optimizer):
        optimizer.zero_grad()
        model(images).square().sum().backward()
        optimizer.step()

    (model, optimizer), (resumed, its_optimizer) = runs
    step(model, optimizer)
    path = tmp_path / 'net.pth.tar'
    scaler = torch.amp.GradScaler('cpu')
    save_checkpoint(path, iteration=1, model=model.state_dict(), optimizer=optimizer.state_dict(),
                    label_map=model.label_map, parameters=settings)
    restore(path, resumed, its_optimizer, scaler, settings, ())
    for run in runs:
        step(*run)
    assert torch.allclose(model.weight, resumed.weight, atol=1e-4)


def test_run_of_a_checkpoint_without_antialias_keeps_that_of_its_model(saved):
    model, optimizer, scaler = make_run()
    model.register_buffer('antialias', torch.tensor(True))
    assert restore(saved[0], model, optimizer, scaler, SETTINGS, ()) == 1 and model.antialias


def test_restore_notes_changed_settings(saved, capsys):
    model, optimizer, scaler = make_run()
    settings = {**SETTINGS, 'seed': 5, 'lr': 1e-2, 'precision': 'bf16'}
    restore(saved[0], model, optimizer, scaler, settings, ('seed',))
    out = capsys.readouterr().out
    assert 'note: seed was 0 and is 5 now' in out and out.count('note: ') == 1
    assert scaler.get_scale() == 8  # that of another precision is not used


def test_restore_refuses_other_classes_optimizers_and_files(saved, tmp_path):
    path, model, optimizer = saved
    scaler = make_run()[2]
    with pytest.raises(UserError, match='optimizer = sgd; resume with the same --optimizer'):
        restore(path, model, optimizer, scaler, {**SETTINGS, 'optimizer': 'adamw'}, ())
    with pytest.raises(UserError, match='batch_norm = False; resume with the same --batch-norm'):
        restore(path, model, optimizer, scaler, {**SETTINGS, 'batch_norm': True}, ())
    model.label_map = {'background': 0, 'cat': 1, 'horse': 2}
    with pytest.raises(UserError, match="'cat', 'dog'.*'cat', 'horse'"):
        restore(path, model, optimizer, scaler, SETTINGS, ())
    save_checkpoint(tmp_path / 'weights.pth', model=model.state_dict())
    with pytest.raises(UserError, match="weights.pth has no .*'iteration'"):
        restore(tmp_path / 'weights.pth', model, optimizer, scaler, SETTINGS, ())


@pytest.mark.parametrize('part, content', [
    ('iteration', None), ('parameters', 3), ('parameters', {}), ('label_map', [1]), ('model', [1]),
    ('model', {}), ('model', {'weight': torch.zeros(3, 2), 'bias': torch.zeros(4)}),
    ('model', {'weight': torch.zeros(3, 2), 'bias': 'text'}), ('optimizer', {}),
    ('optimizer', lambda saved: {**saved, 'state': 3}),
    ('optimizer', lambda saved: {**saved, 'state': {0: [1]}}),
    ('optimizer', lambda saved: {**saved, 'state': {0: {'momentum_buffer': torch.zeros(7)}}}),
    ('optimizer', lambda saved: {**saved, 'state': {0: {'momentum_buffer': 'text'}}}),
    ('optimizer', lambda saved: {**saved, 'state': {0: {'exp_avg': torch.zeros(3, 2)}}}),
    ('optimizer', lambda saved: {**saved, 'state': {9: {'momentum_buffer': torch.zeros(3)}}}),
    ('optimizer', lambda saved: {**saved, 'param_groups': []}),
    ('optimizer', lambda saved: {**saved, 'param_groups': [{'params': [[0], [1]]}]}),
    ('scaler', 3), ('scaler', {'scale': 2.}), ('scaler', lambda saved: {**saved, 'scale': 'text'}),
])
def test_checkpoint_that_does_not_fit_is_a_user_error(saved, part, content):
    path = saved[0]
    state = load_checkpoint(path)
    state[part] = content(state[part]) if callable(content) else content
    save_checkpoint(path, **state)
    model, optimizer, scaler = make_run()
    with pytest.raises(UserError, match='net.pth.tar'):
        restore(path, model, optimizer, scaler, SETTINGS, ())


def test_options_of_the_optimizer_are_those_of_this_run(saved):
    path = saved[0]
    state = load_checkpoint(path)
    state['optimizer']['param_groups'][0].update(momentum='text', nesterov=True)
    save_checkpoint(path, **state)
    model, optimizer, scaler = make_run()
    restore(path, model, optimizer, scaler, SETTINGS, ())
    group, = optimizer.param_groups
    assert group['momentum'] == 0.9 and not group['nesterov']
