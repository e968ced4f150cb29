"""The schedule, the order of the data, and runs of train.py at toy size on the CPU."""

import copy
import dataclasses
import math
import os
import random
import signal
import threading

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import datasets
import report
import train
from create_data_lists import Parameters as ListParameters, main as make_lists
from datasets import PascalVOCDataset
from model import SSD300, MultiBoxLoss
from utils import load_checkpoint, normalize, xy_to_cxcy


@pytest.fixture
def lists(make_voc, tmp_path):
    """A data folder of six training images and two test images of two classes."""
    images = {f'im{i}': [('cat', (5, 5, 30, 30)), ('dog', (20, 10, 60, 45))] for i in range(6)}
    voc = make_voc({'train': images, 'test': {'t0': [('cat', (5, 5, 30, 30))], 't1': []}})
    make_lists(ListParameters(train=(f'{voc}:train',), test=(f'{voc}:test',),
                              output_folder=str(tmp_path / 'lists')))
    return str(tmp_path / 'lists')


@pytest.fixture
def parameters(lists, tmp_path):
    """A run of two iterations of two images."""
    return train.Parameters(
        data_folder=lists, pretrained=False, iterations=2, batch_size=2, warmup=2, decay_lr_at=(1,),
        eval_every=0, workers=0, device='cpu',
        checkpoint=str(tmp_path / 'run' / 'checkpoint.pth.tar'))


# --- schedule and optimiser ---


def test_rate_rises_in_a_line_and_drops_by_ten():
    rates = [train.get_lr(i, 1e-3, 4, (6, 8)) for i in range(10)]
    expected = [.25e-3, .5e-3, .75e-3, 1e-3, 1e-3, 1e-3, 1e-4, 1e-4, 1e-5, 1e-5]
    assert rates == pytest.approx(expected)


def test_paper_schedule_is_the_default():
    p = train.Parameters()
    rates = {i: train.get_lr(i, p.lr, p.warmup, p.decay_lr_at)
             for i in (0, 999, 1000, 79_999, 80_000, 99_999, 100_000, 119_999)}
    assert list(rates.values()) == pytest.approx([1e-6, 1e-3, 1e-3, 1e-3, 1e-4, 1e-4, 1e-5, 1e-5])
    assert (p.iterations, p.batch_size, p.optimizer, p.weight_decay) == (120_000, 32, 'sgd', 5e-4)


@pytest.mark.parametrize('kind', ['sgd', 'adamw'])
def test_biases_learn_at_twice_the_rate_and_do_not_decay(kind):
    model = SSD300(3)
    optimizer = train.make_optimizer(model, kind, 5e-4)
    group_of = {id(p): group for group in optimizer.param_groups for p in group['params']}
    assert len(group_of) == len(list(model.parameters()))
    for name, parameter in model.named_parameters():
        group = group_of[id(parameter)]
        is_bias = name.endswith('bias')
        assert group['rate_factor'] == (2 if is_bias else 1), name
        assert group['weight_decay'] == (0 if is_bias else 5e-4), name


# --- data ---


def test_batches_are_permutations_one_after_the_other():
    batches = list(datasets.ShuffledBatches(n_images=10, batch_size=4, seed=1, start=0, end=5))
    positions, images = zip(*(pair for batch in batches for pair in batch))
    assert list(positions) == list(range(20))
    assert sorted(images[:10]) == sorted(images[10:]) == list(range(10))
    assert images[:10] != images[10:] != tuple(range(10))


def test_batches_from_the_middle_are_those_of_the_unbroken_run():
    whole = list(datasets.ShuffledBatches(7, 3, seed=5, start=0, end=9))
    assert list(datasets.ShuffledBatches(7, 3, seed=5, start=4, end=9)) == whole[4:]
    assert list(datasets.ShuffledBatches(7, 3, seed=6, start=0, end=9)) != whole


def test_augmentation_depends_on_seed_and_position_not_on_the_workers(lists):
    dataset = PascalVOCDataset(lists, 'TRAIN')
    order = datasets.ShuffledBatches(len(dataset), 2, seed=0, start=0, end=4)
    batches = {workers: [images for images, *_ in datasets.make_train_loader(
        dataset, order, workers, torch.device('cpu'))] for workers in (0, 2)}
    assert all(torch.equal(a, b) for a, b in zip(batches[0], batches[2], strict=True))

    # The same image at two positions, which two workers handle, is augmented in two ways.
    items = datasets.SeededItems(dataset, seed=0)
    assert not torch.equal(items[0, 3][0], items[1, 3][0])
    assert torch.equal(items[0, 3][0], items[0, 3][0])
    assert not torch.equal(items[0, 3][0], datasets.SeededItems(dataset, seed=1)[0, 3][0])


# --- runs ---


def run(parameters, **changes):
    train.main(dataclasses.replace(parameters, **changes))


def assert_same(a, b):
    """Nested dictionaries and lists of tensors and numbers are equal in every bit."""
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b)
    elif isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_same(a[key], b[key])
    elif isinstance(a, list):
        assert len(a) == len(b)
        for x, y in zip(a, b):
            assert_same(x, y)
    else:
        assert a == b


@pytest.mark.parametrize('optimizer', ['sgd', 'adamw'])
def test_resumed_run_equals_the_unbroken_one_in_every_bit(parameters, tmp_path, optimizer):
    unbroken, broken = str(tmp_path / 'unbroken.pth'), str(tmp_path / 'broken.pth')
    parameters.optimizer = optimizer
    run(parameters, checkpoint=unbroken, iterations=3)
    random.seed(99)  # nothing may depend on where the process's dice stand
    run(parameters, checkpoint=broken, iterations=1)
    run(parameters, checkpoint=broken, iterations=3, resume=broken, workers=1)
    a, b = load_checkpoint(unbroken), load_checkpoint(broken)
    assert a['iteration'] == b['iteration'] == 3
    assert_same(a['model'], b['model'])
    assert_same(a['optimizer'], b['optimizer'])


def test_resume_says_what_is_not_as_it_was(parameters, capsys):
    run(parameters, iterations=1)
    capsys.readouterr()
    run(parameters, iterations=2, resume=parameters.checkpoint, seed=5)
    out = capsys.readouterr().out
    assert 'note: seed was 0 and is 5 now' in out and out.count('note: ') == 1, out


def test_resumed_run_takes_its_own_weight_decay(parameters):
    run(parameters, iterations=1)
    run(parameters, iterations=2, resume=parameters.checkpoint, weight_decay=0.25)
    groups = load_checkpoint(parameters.checkpoint)['optimizer']['param_groups']
    assert [group['weight_decay'] for group in groups] == [0.25, 0.]


def test_without_augmentation_the_warp_is_all_that_happens(lists):
    plain, test = (PascalVOCDataset(lists, 'TRAIN', augment=False)[2] for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(plain, test))
    assert torch.allclose(plain[1][0], torch.tensor([4 / 64, 4 / 48, 30 / 64, 30 / 48]))


def test_checkpoint_holds_classes_and_parameters(parameters):
    run(parameters, iterations=1)
    checkpoint = load_checkpoint(parameters.checkpoint)
    assert checkpoint['label_map'] == {'background': 0, 'cat': 1, 'dog': 2}
    assert checkpoint['parameters']['batch_size'] == 2
    model = SSD300.from_checkpoint(parameters.checkpoint)
    assert model.label_map == checkpoint['label_map'] and not model.training


@pytest.mark.parametrize('number', [signal.SIGINT, signal.SIGTERM])
def test_first_signal_finishes_the_iteration_and_saves(parameters, capsys, number):
    # The signal comes while iteration 1 or 2 of very many is under way.
    timer = threading.Timer(2.5, os.kill, (os.getpid(), number))
    timer.start()
    handler = signal.getsignal(number)
    with pytest.raises(SystemExit) as stop:
        run(parameters, iterations=10_000)
    timer.join()
    assert stop.value.code == 1
    done = load_checkpoint(parameters.checkpoint)['iteration']
    assert 1 <= done < 10_000
    out = capsys.readouterr().out
    assert f'{done} iterations, written to {parameters.checkpoint}' in out
    assert f'stopped; go on with --resume {parameters.checkpoint}' in out
    assert signal.getsignal(number) is handler


# --- steps that are not finite ---


@pytest.fixture(params=['sgd', 'adamw'])
def stepper(request):
    """A small model and a function that makes a step with a loss and a factor of it."""
    model = torch.nn.Linear(3, 2)
    optimizer = train.make_optimizer(model, request.param, 5e-4)
    scaler = train.make_scaler(torch.float32, torch.device('cpu'))

    def step(factor):
        optimizer.zero_grad()
        scaler.scale(model(torch.ones(4, 3)).square().sum() * factor).backward()
        return train.step_if_finite(optimizer, scaler, torch.float32).item()
    return model, optimizer, step


@pytest.mark.parametrize('bad', [math.inf, -math.inf, math.nan])
def test_a_step_that_is_not_finite_changes_nothing(stepper, bad):
    model, optimizer, step = stepper

    def state():
        return copy.deepcopy((model.state_dict(), optimizer.state_dict()['state']))

    before = state()
    assert step(bad) is False           # the very first step, before there is any momentum
    assert_same(before[0], state()[0])
    assert step(1.) is True
    before = state()
    assert step(bad) is False
    assert_same(list(before), list(state()))
    assert step(1.) is True
    assert all(value.isfinite().all() for value in model.state_dict().values())


def test_skipped_steps_leave_the_path_of_the_others_as_it_was():
    """SGD with bad steps between good ones arrives where SGD without them arrives."""
    ends = []
    for factors in ([1., .5, 2.], [math.nan, 1., math.inf, .5, math.nan, math.nan, 2.]):
        torch.manual_seed(1)
        model = torch.nn.Linear(3, 2)
        optimizer = train.make_optimizer(model, 'sgd', 5e-4)
        for group in optimizer.param_groups:
            group['lr'] = 0.01
        scaler = train.make_scaler(torch.float32, torch.device('cpu'))
        for factor in factors:
            optimizer.zero_grad()
            scaler.scale(model(torch.ones(4, 3)).square().sum() * factor).backward()
            train.step_if_finite(optimizer, scaler, torch.float32)
        ends.append(model.state_dict())
    assert_same(*ends)


def test_infinite_loss_with_finite_gradients_is_noticed():
    """The offsets of a box without area are infinite: so is the loss, but not its gradient."""
    model = SSD300(3)
    criterion = MultiBoxLoss(model.priors_cxcy)
    scaler = train.make_scaler(torch.float32, torch.device('cpu'))
    flat = torch.tensor([[.2, .2, .2, .7], [.1, .1, .5, .5]])
    criterion.match = lambda boxes, labels: (
        xy_to_cxcy(flat[:1]).expand(1, len(model.priors_cxcy), 4),
        torch.ones(1, len(model.priors_cxcy), dtype=torch.int64))
    images = torch.zeros(1, 3, 300, 300, dtype=torch.uint8)
    _, loc_loss = train.find_gradients(model, criterion, scaler, torch.float32, 1, images,
                                       [flat], [torch.tensor([1, 2])])
    assert loc_loss.isinf()
    assert all(p.grad.isnan().any() for p in model.pred_convs.parameters())


def test_ten_skipped_steps_in_a_row_stop_the_run(parameters, capsys):
    with pytest.raises(SystemExit) as stop:
        run(parameters, lr=1e30, warmup=0, iterations=16, print_freq=4)
    assert stop.value.code == 1
    error = capsys.readouterr().err.strip().splitlines()[-1]
    for part in ('not finite 10 times in a row', 'the last time at iteration 1',
                 'at a rate of 1e+2', 'classification', 'localization', 'JPEGImages/im'):
        assert part in error, error
    assert error.count('.jpg') == 2, 'the images of the batch'
    assert not os.path.exists(parameters.checkpoint)


# --- parts of a batch ---


def some_batch(n_images):
    """Images of noise with 0, 1, 2, ... objects."""
    images = torch.randint(0, 256, (n_images, 3, 300, 300), dtype=torch.uint8)
    corners = [torch.rand(i, 2, 2).sort(dim=1).values.flatten(1) for i in range(n_images)]
    return images, corners, [torch.randint(1, 3, (i,)) for i in range(n_images)]


def test_gradients_of_parts_add_up_to_those_of_the_batch():
    model = SSD300(3)
    criterion = MultiBoxLoss(model.priors_cxcy)
    scaler = train.make_scaler(torch.float32, torch.device('cpu'))
    batch = some_batch(4)
    losses, gradients = [], []
    for n_parts in (1, 4):
        model.zero_grad()
        losses.append(train.find_gradients(model, criterion, scaler, torch.float32, n_parts,
                                           *batch))
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters()})
    assert torch.allclose(torch.stack(losses[0]), torch.stack(losses[1]), rtol=1e-5)
    for name, whole in gradients[0].items():
        assert torch.allclose(gradients[1][name], whole, rtol=1e-5, atol=1e-5 * whole.abs().max())

    # and the loss is the one that the criterion has for the whole batch
    normalized = normalize(batch[0])
    whole = criterion(*model(normalized), *batch[1:])
    assert torch.allclose(whole, sum(losses[1]), rtol=1e-5)


# --- an iteration waits for nothing ---


class Operations(TorchDispatchMode):
    """Counts the operations that make the host wait for a GPU."""

    WAITING = ('_local_scalar_dense', 'nonzero', 'masked_select', 'unique', 'equal', 'is_nonzero',
               'repeat_interleave.Tensor', 'bincount',
               'lift_fresh')  # a number of Python's that is written by index: x[i] = 0

    def __init__(self):
        super().__init__()
        self.waiting = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = str(function)
        by_mask = 'index' in name and any(
            isinstance(index, torch.Tensor) and index.dtype in (torch.bool, torch.uint8)
            for argument in args if isinstance(argument, (list, tuple)) for index in argument)
        if by_mask or any(waiting in name for waiting in self.WAITING):
            self.waiting.append(name)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize('optimizer, precision', [('sgd', 'float32'), ('adamw', 'bf16')])
def test_iterations_between_two_rows_never_wait_for_the_device(parameters, monkeypatch, optimizer,
                                                               precision):
    operations = Operations()
    for name in ('item', 'cpu', 'tolist', 'numpy', '__bool__', '__float__', '__int__'):
        method = getattr(torch.Tensor, name)

        def noted(tensor, *arguments, name=name, method=method):
            operations.waiting.append(name)
            return method(tensor, *arguments)
        monkeypatch.setattr(torch.Tensor, name, noted)
    seen = {}

    def read(report, iteration, *arguments):
        seen[iteration] = list(operations.waiting)
        return False

    monkeypatch.setattr(report.Report, 'read', read)
    monkeypatch.setattr(report.Report, 'go_on', lambda *arguments: None)
    # the loader's own work is the host's: it happens before the batch is on the device
    whole = datasets.batches_on
    monkeypatch.setattr(train, 'batches_on', lambda *arguments: list(whole(*arguments)))
    inside = train.train

    def train_(*arguments):
        operations.waiting.clear()
        with operations:
            return inside(*arguments)

    monkeypatch.setattr(train, 'train', train_)
    monkeypatch.setattr(train, 'save_checkpoint', lambda *arguments, **state: None)
    run(parameters, iterations=3, print_freq=3, optimizer=optimizer, precision=precision)
    assert seen == {3: []}


def test_what_the_test_above_looks_for_is_found():
    with Operations() as operations:
        torch.arange(3)[torch.tensor([True, False, True])]
        torch.arange(3).nonzero()
        torch.arange(3).sum().item()
        torch.arange(3)[torch.tensor(1)] = 0
    assert len(operations.waiting) >= 4


def test_pretrained_start_loads_the_base(parameters, monkeypatch):
    loaded = []
    monkeypatch.setattr('model.VGGBase.load_pretrained_layers', lambda base: loaded.append(base))
    run(parameters, iterations=1, pretrained=True)
    assert len(loaded) == 1
    run(parameters, iterations=2, pretrained=True, resume=parameters.checkpoint)
    run(parameters, iterations=3, pretrained=True, resume='auto')
    assert len(loaded) == 1, 'a resumed run has its weights already'


def test_warnings_of_a_schedule_that_does_not_fit(parameters, capsys):
    run(parameters, iterations=1, decay_lr_at=train.Parameters().decay_lr_at)
    out = capsys.readouterr().out
    assert 'the drop of the rate at 80000 never comes' in out
    assert '--iterations 1920000 --decay-lr-at 1280000 1600000 --warmup 16000 --lr 6.25e-05' in out


@pytest.mark.parametrize('changes, words', [
    ({'batch_size': 7}, ['batch_size is 7', 'only 6 training images']),
    ({'batch_size': 0}, ['batch_size is 0', '--batch-size 1']),
    ({'iterations': 0}, ['iterations is 0']),
    ({'print_freq': 0}, ['print_freq is 0', '--print-freq 1']),
    ({'workers': -1}, ['workers is -1']),
    ({'eval_every': -1}, ['eval_every is -1']),
    ({'grad_accumulation': 0}, ['grad_accumulation is 0']),
    ({'grad_accumulation': 4}, ['batch_size is 2', '1 processes times 4 parts', 'that 4 divides']),
    ({'checkpoint': '.'}, ['is a folder']),
    ({'data_folder': 'nowhere'}, ['nowhere', 'create_data_lists.py']),
    ({'device': 'cuda:99'}, ["device 'cuda:99'", '--device cpu']),
    ({'resume': 'nowhere.pth'}, ['nowhere.pth', 'no such checkpoint']),
    ({'checkpoint': '/dev/null/x.pth'}, ['/dev/null', 'cannot be written']),
])
def test_slips_end_in_one_line(parameters, capsys, changes, words):
    with pytest.raises(SystemExit) as stop:
        run(parameters, **changes)
    assert stop.value.code == 1
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert all(word in error for word in words), error


def test_resume_refuses_what_does_not_fit(parameters, capsys, tmp_path):
    run(parameters, iterations=1)
    path = parameters.checkpoint

    def error_of(**changes):
        with pytest.raises(SystemExit):
            run(parameters, resume=path, **changes)
        return capsys.readouterr().err.strip().splitlines()[-1]

    assert 'trained with sgd' in error_of(optimizer='adamw')
    assert 'has 1 iterations already' in error_of(iterations=1)
    label_map = tmp_path / 'lists' / 'label_map.json'
    label_map.write_text('{"background": 0, "cat": 1, "horse": 2}')
    assert "['cat', 'dog']" in error_of() and "['cat', 'horse']" in error_of()


@pytest.mark.parametrize('workers', [0, 1])
def test_corrupt_image_is_named_and_stops_the_run(parameters, capsys, tmp_path, workers):
    for image in (tmp_path / 'voc' / 'JPEGImages').glob('im*.jpg'):
        image.write_bytes(image.read_bytes()[:300])
    with pytest.raises(SystemExit) as stop:
        run(parameters, workers=workers)
    assert stop.value.code == 1
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert 'JPEGImages/im' in error and 'cannot be decoded' in error and 'Traceback' not in error
