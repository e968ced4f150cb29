"""Schedule, optimizer, training steps, and runs of train.py at toy size on the CPU."""

import contextlib
import dataclasses
import json
import math
import os
import pathlib
import random
import re
import signal
import threading
import types

import pytest
import torch
import torch.nn.functional as F

import datasets
import train
import utils
from create_data_lists import Parameters as ListParameters, main as make_lists
from model import SSD300, MultiBoxLoss, create_prior_boxes
from support.checkpoints import load_checkpoint, sibling_path
from support.gradient_scaling import make_scaler
from support.published import BASE_CONVS
from support.training_log import TrainingLog, read_log
from thin import ThinSSD300
from utils import normalize, pad_objects

# --------------------------------------------------------------------------------------------------
# Schedule and optimizer
# --------------------------------------------------------------------------------------------------


def test_lr_rises_linearly_and_drops_by_ten():
    rates = [train.get_lr(i, 1e-3, 4, (6, 8)) for i in range(10)]
    expected = [.25e-3, .5e-3, .75e-3, 1e-3, 1e-3, 1e-3, 1e-4, 1e-4, 1e-5, 1e-5]
    assert rates == pytest.approx(expected)


def test_paper_schedule_is_the_default():
    p = train.Parameters()
    rates = [train.get_lr(i, p.lr, p.warmup, p.decay_lr_at)
             for i in (0, 999, 1000, 79_999, 80_000, 99_999, 100_000, 119_999)]
    assert rates == pytest.approx([1e-6, 1e-3, 1e-3, 1e-3, 1e-4, 1e-4, 1e-5, 1e-5])
    assert (p.iterations, p.batch_size, p.optimizer, p.weight_decay) == (120_000, 32, 'sgd', 5e-4)


@pytest.fixture
def make_schedule():
    """Return a function that makes a schedule of little else than iterations."""
    def make(start=0, end=1000, print_freq=20, save_every=500, eval_every=0, lr=1e-3):
        return train.Schedule(start, end, lr, 0, (), print_freq, save_every, eval_every)
    return make


def test_rows_checkpoints_and_evaluations_are_due(make_schedule):
    schedule = make_schedule(end=15, print_freq=2, save_every=5, eval_every=7)
    iterations = range(1, 16)
    assert [i for i in iterations if schedule.is_evaluation_due(i)] == [7, 14, 15]
    assert [i for i in iterations if schedule.is_save_due(i)] == [5, 7, 10, 14, 15]
    assert [i for i in iterations if schedule.is_row_due(i)] == [2, 4, 5, 6, 7, 8, 10, 12, 14, 15]
    assert not make_schedule(end=15).is_evaluation_due(15)
    assert [i for i in range(8, 101) if make_schedule(start=7).is_row_due(i)] == [
        20, 40, 57, 60, 80, 100]


@pytest.mark.parametrize('kind, momentum, betas', [('sgd', 0.9, None),
                                                   ('adamw', None, (0.9, 0.99))])
def test_biases_learn_at_twice_the_rate_and_do_not_decay(kind, momentum, betas):
    model = SSD300(3)
    optimizer = train.make_optimizer(model, kind, 5e-4)
    train.set_lr(optimizer, 0.1)
    group_of = {id(p): group for group in optimizer.param_groups for p in group['params']}
    assert len(group_of) == len(list(model.parameters()))
    for name, parameter in model.named_parameters():
        group = group_of[id(parameter)]
        is_bias = name.endswith('bias')
        assert group['lr'] == (0.2 if is_bias else 0.1), name
        assert group['weight_decay'] == (0 if is_bias else 5e-4), name
        assert group.get('momentum') == momentum, name
        assert group.get('betas') == betas, name


# --------------------------------------------------------------------------------------------------
# The training loop
# --------------------------------------------------------------------------------------------------


def assert_equal(a, b):
    """Assert that nested dictionaries and lists of tensors and numbers are equal in every bit."""
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b)
    elif isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_equal(a[key], b[key])
    elif isinstance(a, list):
        assert len(a) == len(b)
        for x, y in zip(a, b):
            assert_equal(x, y)
    else:
        assert a == b


@pytest.fixture
def make_batch():
    """Return a function that makes a batch: images of noise with 0, 1, 2, ... objects."""
    def make(n_images):
        images = torch.randint(0, 256, (n_images, 3, 300, 300), dtype=torch.uint8)
        boxes = [torch.rand(i, 2, 2).sort(dim=1).values.flatten(1) for i in range(n_images)]
        labels = [torch.randint(1, 3, (i,)) for i in range(n_images)]
        return images, *pad_objects(boxes, labels)
    return make


class SmallNetwork(torch.nn.Module):
    """A linear layer in the place of SSD300, with its coarsest 190 priors and three classes."""

    antialias, input_size = True, 300

    def __init__(self, n_classes=3):
        super().__init__()
        assert n_classes == 3
        self.register_buffer('priors_cxcy', create_prior_boxes()[-190:])
        self.layer = torch.nn.Linear(3 * 4 * 4, 190 * (4 + 3))

    def normalize(self, images):
        return normalize(images)

    def forward(self, images):
        outputs = self.layer(F.adaptive_avg_pool2d(images, 4).flatten(1)).view(-1, 190, 7)
        return outputs[..., :4], outputs[..., 4:]


@pytest.fixture
def train_on(make_schedule, tmp_path):
    """Return a function that trains a new network on batches, without a row of the log at the end.

    It returns the `train.Run`, with the network as its model.
    """
    def make(batches, n_micro_batches=1, kind='sgd', dtype=torch.float32, network=SmallNetwork,
             criterion=MultiBoxLoss, context=None):
        torch.manual_seed(0)
        model = network()
        optimizer = train.make_optimizer(model, kind, 5e-4)
        scaler = make_scaler(dtype, torch.device('cpu'))
        criterion = criterion(model.priors_cxcy)
        autocast = torch.autocast('cpu', dtype, enabled=dtype != torch.float32)
        with TrainingLog(tmp_path / 'log', 0, 1000, torch.device('cpu'), None, None) as log:
            run = train.Run(model, optimizer, scaler, {}, None, None, autocast, log)
            with context or contextlib.nullcontext():
                train.train(model, criterion, optimizer, scaler, autocast, batches,
                            n_micro_batches, make_schedule(lr=1e-4), run, threading.Event())
        return run
    return make


def test_gradients_of_micro_batches_add_up_to_those_of_the_batch(train_on, make_batch):
    batch = make_batch(4)
    whole, parts = (train_on([batch], n_micro_batches) for n_micro_batches in (1, 4))
    for expected, parameter in zip(whole.model.parameters(), parts.model.parameters()):
        assert expected.grad.abs().max() > 0
        torch.testing.assert_close(parameter.grad, expected.grad, rtol=1e-5,
                                   atol=1e-5 * expected.grad.abs().max().item())
    # The logged loss is that of the whole batch.
    torch.manual_seed(0)
    model = SmallNetwork()
    loss = MultiBoxLoss(model.priors_cxcy)(*model(normalize(batch[0])), *batch[1:]).item()
    for run in (whole, parts):
        losses, = run.log.pending
        assert losses[:2].sum().item() == pytest.approx(loss, rel=1e-5)


def test_infinite_loss_with_finite_gradients_is_a_skipped_step(train_on, make_batch):
    class InfiniteLoss(MultiBoxLoss):
        """A loss with infinite offsets; the gradient of smooth L1 is 1 there."""

        def match(self, boxes, labels):
            true_locs, true_classes = super().match(boxes, labels)
            return torch.full_like(true_locs, math.inf), true_classes

    run = train_on([make_batch(2)], criterion=InfiniteLoss)
    (_, loc_loss, is_finite), = run.log.pending
    assert loc_loss == math.inf and not is_finite
    torch.manual_seed(0)
    assert_equal(run.model.state_dict(), SmallNetwork().state_dict())


@pytest.mark.parametrize('kind, dtype, n_micro_batches, network', [
    ('sgd', torch.float32, 2, SmallNetwork), ('adamw', torch.bfloat16, 1, SmallNetwork),
    ('sgd', torch.float16, 1, SmallNetwork), ('sgd', torch.float32, 1, lambda: SSD300(3))])
def test_iterations_between_two_rows_never_wait_for_the_device(
        train_on, make_batch, record_waits, kind, dtype, n_micro_batches, network):
    batches = [make_batch(2)] * (1 if network != SmallNetwork else 3)
    normalize(batches[0][0])  # ImageNet's constants are put on the device once in a process
    recorder = record_waits()
    run = train_on(batches, n_micro_batches, kind, dtype, network, context=recorder)
    assert recorder.waits == [] and recorder.n_calls > 200
    assert len(run.log.pending) == len(batches)


def test_recorder_finds_what_waits_for_the_device(record_waits):
    with record_waits() as recorder:
        torch.arange(3)[torch.tensor([True, False, True])]
        torch.arange(3).nonzero()
        torch.arange(3).sum().item()
        torch.arange(3)[torch.tensor(1)] = 0
    assert len(recorder.waits) >= 4


# --------------------------------------------------------------------------------------------------
# Runs
# --------------------------------------------------------------------------------------------------


@pytest.fixture
def parameters(make_voc, tmp_path):
    """Parameters of two iterations on six images of two classes, with two images in a batch."""
    images = {f'im{i}': [('cat', (5, 5, 30, 30)), ('dog', (20, 10, 60, 45))] for i in range(6)}
    voc = make_voc({'train': images, 'test': {'t0': [('cat', (5, 5, 30, 30))], 't1': []}})
    lists = str(tmp_path / 'lists')
    make_lists(ListParameters(train=(f'{voc}:train',), test=(f'{voc}:test',), output_folder=lists))
    return train.Parameters(
        data_folder=lists, pretrained=False, iterations=2, batch_size=2, warmup=2, decay_lr_at=(1,),
        eval_every=0, workers=0, device='cpu', precision='float32',
        checkpoint=str(tmp_path / 'run' / 'checkpoint.pth.tar'))


@pytest.fixture
def small_network(monkeypatch):
    """Let train.py train a small network, where a test does not depend on the real one."""
    monkeypatch.setitem(train.NETWORKS, 'ssd300', SmallNetwork)


def run(parameters, **changes):
    train.main(dataclasses.replace(parameters, **changes))


def error_of(capsys, parameters, **changes):
    """Run with invalid parameters; returns the error message, the last line of stderr."""
    with pytest.raises(SystemExit) as stop:
        run(parameters, **changes)
    assert stop.value.code == 1
    err = capsys.readouterr().err
    assert 'Traceback' not in err
    return err.strip().splitlines()[-1]


@pytest.mark.parametrize('optimizer', ['sgd', 'adamw'])
def test_resumed_run_equals_the_uninterrupted_one_in_every_bit(parameters, tmp_path, small_network,
                                                               optimizer):
    uninterrupted, resumed = str(tmp_path / 'uninterrupted.pth'), str(tmp_path / 'resumed.pth')
    parameters.optimizer = optimizer
    run(parameters, checkpoint=uninterrupted, iterations=3)
    random.seed(99)     # the state of the process's random numbers must not matter
    run(parameters, checkpoint=resumed, iterations=1)
    run(parameters, checkpoint=resumed, iterations=3, resume=resumed, workers=1)
    a, b = load_checkpoint(uninterrupted), load_checkpoint(resumed)
    assert a['iteration'] == b['iteration'] == 3
    assert_equal(a['model'], b['model'])
    assert_equal(a['optimizer'], b['optimizer'])


def test_network_is_trained_and_evaluated_in_the_same_precision(parameters, monkeypatch):
    class Recorder(SmallNetwork):
        def forward(self, images):
            outputs = super().forward(images)
            dtypes.append(outputs[0].dtype)
            return outputs

    def evaluate(test_loader, model, coco, autocast):
        with autocast:
            model(torch.zeros(1, 3, 300, 300))
        return {}, 0.5

    monkeypatch.setitem(train.NETWORKS, 'ssd300', Recorder)
    monkeypatch.setattr(train, 'evaluate', evaluate)
    monkeypatch.setattr(TrainingLog, 'add_images', lambda *args: None)
    dtypes = []
    for precision in ('bf16', 'float32'):
        run(parameters, iterations=1, eval_every=1, precision=precision)
    assert dtypes == [torch.bfloat16] * 2 + [torch.float32] * 2


def test_rates_of_a_run_are_those_of_its_schedule(parameters, small_network, tmp_path):
    run(parameters, iterations=4, warmup=2, decay_lr_at=(3,), print_freq=1)
    rows = read_log(tmp_path / 'run' / 'checkpoint_log' / 'log.csv')
    assert [row['rate'] for row in rows] == pytest.approx([5e-4, 1e-3, 1e-3, 1e-4])
    groups = load_checkpoint(parameters.checkpoint)['optimizer']['param_groups']
    assert [group['lr'] for group in groups] == pytest.approx([1e-4, 2e-4])


@pytest.mark.parametrize('augment, split', [(True, 'TRAIN'), (False, 'TEST')])
def test_images_are_augmented_unless_that_is_off(parameters, small_network, monkeypatch, augment,
                                                 split):
    def transform(*args):
        splits.append(args[4])
        return utils.transform(*args)

    monkeypatch.setattr(datasets, 'transform', transform)
    splits = []
    run(parameters, iterations=1, augment=augment)
    assert splits == [split] * 2


def test_cache_compilation_and_log_folder(parameters, small_network, monkeypatch, capsys, tmp_path):
    compiled = []
    monkeypatch.setattr(torch, 'compile', lambda f, dynamic: compiled.append(f) or f)
    monkeypatch.setattr(datasets, 'read_or_postpone', None)     # the files are not read again
    log_folder = tmp_path / 'new' / 'log'
    run(parameters, iterations=1, cache=True, compile='on', log_folder=str(log_folder))
    assert 'cache: 6 images' in capsys.readouterr().out
    assert len(compiled) == 2, 'network and loss'
    assert len(read_log(log_folder / 'log.csv')) == 1
    assert not (tmp_path / 'run' / 'checkpoint_log').exists()


def test_seed_is_that_of_weights_order_and_augmentation(parameters, small_network, monkeypatch):
    class Recorder(train.ShuffledBatches):
        def __init__(self, *args):
            super().__init__(*args)
            seeds.append(self.seed)     # also that of the augmentation

    monkeypatch.setattr(train, 'ShuffledBatches', Recorder)
    seeds = []
    for seed in (3, 5):
        run(parameters, iterations=1, lr=0., seed=seed)
        torch.manual_seed(seed)
        assert_equal(load_checkpoint(parameters.checkpoint)['model'], SmallNetwork().state_dict())
    assert seeds == [3, 5]


def test_empty_test_list_trains_without_evaluations(parameters, small_network, capsys, tmp_path):
    for name in ('TEST_images', 'TEST_objects'):
        (tmp_path / 'lists' / f'{name}.json').write_text('[]')
    run(parameters, eval_every=1)
    out = capsys.readouterr().out
    assert ' 0 to test on' in out and 'mAP' not in out
    assert load_checkpoint(parameters.checkpoint)['iteration'] == 2


def test_priors_for_coco_travel_with_the_checkpoint(parameters, monkeypatch, capsys):
    monkeypatch.setitem(train.NETWORKS, 'ssd300', ThinSSD300)
    run(parameters, iterations=1, priors='coco')
    checkpoint = load_checkpoint(parameters.checkpoint)
    assert checkpoint['model']['priors_cxcy'][0, 2:].tolist() == pytest.approx([0.07, 0.07])
    error = error_of(capsys, parameters, resume=parameters.checkpoint)
    assert 'with priors = coco; resume with the same --priors' in error
    error = error_of(capsys, parameters, priors='coco', pretrained=True, init='coco')
    assert 'bring their own priors' in error


def test_difficult_objects_are_kept_in_both_sets(make_voc, tmp_path):
    # Training learns from them; evaluation needs them, not to count their detections as errors.
    voc = make_voc({'s': {'a': [('cat', (5, 5, 30, 30)), ('dog', (20, 10, 60, 45), 1)]}})
    lists = str(tmp_path / 'lists')
    make_lists(ListParameters(train=(f'{voc}:s',), test=(f'{voc}:s',), output_folder=lists))
    for dataset in train.load_data_sets(lists, augment=False, batch_size=1, cache=False):
        assert dataset[0][3].tolist() == [False, True]


def test_best_checkpoint_has_the_highest_map(parameters, monkeypatch, small_network):
    mAPs = iter((0.2, 0.5, 0.3, 0.4))
    monkeypatch.setattr(train, 'evaluate', lambda *args, **kwargs: ({}, next(mAPs)))
    monkeypatch.setattr(TrainingLog, 'add_images', lambda *args: None)
    run(parameters, iterations=3, eval_every=1)
    run(parameters, iterations=4, eval_every=1, resume='auto')
    assert load_checkpoint(parameters.checkpoint)['iteration'] == 4
    assert load_checkpoint(sibling_path(parameters.checkpoint, '.best'))['iteration'] == 2


def test_checkpoint_and_what_resumes_from_it(parameters, capsys, tmp_path):
    path, parameters.batch_size = parameters.checkpoint, 1
    run(parameters, iterations=1)
    checkpoint = load_checkpoint(path)
    assert checkpoint['label_map'] == {'background': 0, 'cat': 1, 'dog': 2}
    assert checkpoint['parameters']['batch_size'] == 1
    model = SSD300.from_checkpoint(path)
    assert model.label_map == checkpoint['label_map'] and not model.training

    # What does not fit is refused.
    assert 'optimizer = sgd' in error_of(capsys, parameters, resume=path, optimizer='adamw')
    assert 'has 1 iterations already' in error_of(capsys, parameters, resume=path, iterations=1)

    # What changes the result is noted; the weight decay is this run's.
    capsys.readouterr()
    run(parameters, iterations=2, resume=path, seed=5, weight_decay=0.25)
    out = capsys.readouterr().out
    assert 'note: seed was 0 and is 5 now' in out, out
    assert 'note: weight_decay was 0.0005 and is 0.25 now' in out and out.count('note: ') == 3, out
    assert 'note: lr 0.001 is for batches of 32; with 1 the same is --lr 3.125e-05' in out
    groups = load_checkpoint(path)['optimizer']['param_groups']
    assert [group['weight_decay'] for group in groups] == [0.25, 0.]

    other = str(tmp_path / 'other.pth')
    pathlib.Path(path).rename(other)
    run(parameters, iterations=1)
    error = error_of(capsys, parameters, iterations=3, resume=other)
    assert f'--resume {other} would replace another checkpoint, {path}' in error
    run(parameters, iterations=3, resume=other, checkpoint=str(tmp_path / 'new.pth'))

    label_map = tmp_path / 'lists' / 'label_map.json'
    label_map.write_text('{"background": 0, "cat": 1, "horse": 2}')
    error = error_of(capsys, parameters, iterations=3, resume=path)
    assert "['cat', 'dog']" in error and "['cat', 'horse']" in error


def test_changes_that_affect_the_weights_are_noted(parameters, small_network, capsys, tmp_path):
    run(parameters, iterations=1)
    for name in ('images', 'objects'):
        path = tmp_path / 'lists' / f'TRAIN_{name}.json'
        path.write_text(json.dumps(json.loads(path.read_text())[1:]))
    capsys.readouterr()
    run(parameters, resume=parameters.checkpoint, batch_size=1, lr=2e-3, weight_decay=0.25,
        precision='bf16', decay_lr_at=(), warmup=0, seed=5, augment=False, print_freq=7, workers=1)
    assert re.findall('note: (.*) now', capsys.readouterr().out) == [
        'batch_size was 2 and is 1', 'lr was 0.001 and is 0.002',
        'weight_decay was 0.0005 and is 0.25', 'precision was float32 and is bfloat16',
        'decay_lr_at was (1,) and is ()', 'warmup was 2 and is 0', 'seed was 0 and is 5',
        'augment was True and is False', 'n_images was 6 and is 5']


def test_machines_that_find_different_checkpoints_are_refused(parameters, capsys, monkeypatch):
    monkeypatch.setattr(train, 'all_gather', lambda path: [path, 'other.pth'])
    error = error_of(capsys, parameters, resume='auto')
    assert 'find different checkpoints; put --checkpoint into a folder that all' in error
    assert not os.path.exists(parameters.checkpoint)


@pytest.mark.parametrize('number', [signal.SIGINT, signal.SIGTERM])
def test_first_signal_finishes_the_iteration_and_saves(parameters, capsys, small_network, number):
    log = pathlib.Path(parameters.checkpoint).parent / 'checkpoint_log' / 'log.csv'
    is_over = threading.Event()

    def send_signal():
        """Send it after the first of very many iterations, unless the run has failed."""
        while not (log.exists() and len(log.read_text().splitlines()) > 1):
            if is_over.wait(0.05):
                return
        os.kill(os.getpid(), number)

    sender = threading.Thread(target=send_signal, daemon=True)
    sender.start()
    handler = signal.getsignal(number)
    try:
        with pytest.raises(SystemExit) as stop:
            run(parameters, iterations=10_000, print_freq=1)
    finally:
        is_over.set()
        sender.join()
    assert stop.value.code == 1
    done = load_checkpoint(parameters.checkpoint)['iteration']
    assert 1 <= done < 10_000
    out = capsys.readouterr().out
    assert f'{done} iterations, written to {parameters.checkpoint}' in out
    assert 'stopped; resume with the same command and --resume auto' in out
    assert signal.getsignal(number) is handler


def test_ten_skipped_steps_in_a_row_stop_the_run(parameters, capsys, small_network):
    error = error_of(capsys, parameters, lr=1e30, warmup=0, iterations=16, print_freq=4)
    for part in ('not finite 10 times in a row', 'the last time at iteration 1',
                 'at a learning rate of 1e+2', 'classification', 'localization', 'JPEGImages/im'):
        assert part in error, error
    assert error.count('.jpg') == 2, 'the images of the batch'
    assert not os.path.exists(parameters.checkpoint)


def test_pretrained_weights_are_loaded_only_by_a_new_run(parameters, small_network, monkeypatch):
    loaded = []
    base = types.SimpleNamespace(load_pretrained_layers=lambda: loaded.append('imagenet'))
    monkeypatch.setattr(SmallNetwork, 'base', base, raising=False)
    run(parameters, iterations=1, pretrained=True)
    assert loaded == ['imagenet']
    run(parameters, iterations=2, pretrained=True, resume=parameters.checkpoint)
    run(parameters, iterations=2, pretrained=True, resume='auto')   # nothing is left to do
    assert len(loaded) == 1, 'a resumed run has its weights already'


def test_start_from_caffe_brings_its_image_mean_into_checkpoints(parameters, monkeypatch, tmp_path):
    monkeypatch.setitem(train.NETWORKS, 'ssd300', ThinSSD300)
    weights, layers = {}, dict(ThinSSD300(3).named_modules())
    # The numbers of the convolutions in ssd.pytorch's list of layers
    numbers = (0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28, 31, 33)
    for number, name in zip(numbers, BASE_CONVS, strict=True):
        weights |= {f'{number}.{kind}': value.detach()
                    for kind, value in layers[name].named_parameters()}
    path = str(tmp_path / 'vgg.pth')
    torch.save(weights, path)
    for changes in ({'iterations': 1}, {'iterations': 2, 'resume': parameters.checkpoint}):
        run(parameters, pretrained=True, init='caffe', weights=path, lr=0., **changes)
        state = load_checkpoint(parameters.checkpoint)['model']
        assert torch.equal(state['base.conv1_1.weight'], weights['0.weight'].flip(1))
        assert torch.equal(state['base.conv7.bias'], weights['33.bias'])
        images = torch.full((1, 3, 1, 1), 255, dtype=torch.uint8)
        normalized = ThinSSD300.from_checkpoint(parameters.checkpoint).normalize(images)
        torch.testing.assert_close(normalized.flatten(), torch.tensor([132., 138., 151.]))


def test_new_run_keeps_the_checkpoint_of_an_earlier_one(parameters, small_network, monkeypatch):
    run(parameters, iterations=1)
    run(parameters, iterations=2)
    path = parameters.checkpoint
    assert load_checkpoint(path)['iteration'] == 2
    assert load_checkpoint(sibling_path(path, '.earlier'))['iteration'] == 1
    # It may be the file that --weights names, so that is read before.
    exists = []
    monkeypatch.setattr(train, 'load_pretrained', lambda *args: exists.append(os.path.exists(path)))
    run(parameters, iterations=1, pretrained=True)
    assert exists == [True]


def test_checkpoint_without_finite_statistics_is_not_written(parameters, capsys, monkeypatch):
    class Diverged(SmallNetwork):
        def __init__(self, *args):
            super().__init__(*args)
            self.register_buffer('running_mean', torch.tensor([math.nan]))

    monkeypatch.setitem(train.NETWORKS, 'ssd300', Diverged)
    error = error_of(capsys, parameters, iterations=1)
    assert 'are not finite after 1 iterations' in error and 'lower --lr' in error
    assert not os.path.exists(parameters.checkpoint)


def test_warnings_of_a_schedule_that_does_not_fit(parameters, capsys, small_network):
    run(parameters, iterations=1, decay_lr_at=train.Parameters().decay_lr_at)
    out = capsys.readouterr().out
    assert 'the drop of the rate at 80000 never comes' in out
    assert '--lr 6.25e-05 and 16 times the warm-up, iterations and drops' in out
    assert '--warmup 16000 --iterations 1920000 --decay-lr-at 1280000 1600000' in out
    assert 'the warm-up of 2 iterations is longer than the run' in out
    assert 'within the warm-up' not in out
    run(parameters, iterations=3)
    out = capsys.readouterr().out
    assert 'the drop of the rate at 1 is within the warm-up of 2 iterations' in out
    assert 'longer than the run' not in out and 'never comes' not in out


@pytest.mark.parametrize('changes, words', [
    ({'batch_size': 7}, ['batch_size is 7', 'only 6 training images']),
    ({'batch_size': 0}, ['batch_size is 0', '--batch-size 1']),
    ({'iterations': 0}, ['iterations is 0']),
    ({'print_freq': 0}, ['print_freq is 0', '--print-freq 1']),
    ({'workers': -1}, ['workers is -1']),
    ({'init': 'coco'}, ['--init coco has no effect with --no-pretrained']),
    ({'eval_every': -1}, ['eval_every is -1']),
    ({'lr': math.nan}, ['lr is nan', '--lr 0 or more']),
    ({'weight_decay': -1.}, ['weight_decay is -1']),
    ({'decay_lr_at': (3, -5)}, ['decay_lr_at is -5']),
    ({'seed': -1}, ['seed is -1']),
    ({'grad_accumulation': 0}, ['grad_accumulation is 0']),
    ({'grad_accumulation': 4},
     ['batch_size is 2', '1 processes times 4 micro-batches', 'that 4 divides']),
    ({'checkpoint': '.'}, ['is a folder']),
    ({'data_folder': 'nowhere'}, ['nowhere', 'create_data_lists.py']),
    ({'device': 'cuda:99'}, ["device 'cuda:99'", '--device cpu']),
    ({'resume': 'nowhere.pth'}, ['nowhere.pth', 'no such checkpoint']),
    ({'checkpoint': '/dev/null/x.pth'}, ['/dev/null', 'cannot be written']),
    ({'init': 'caffe', 'data_folder': 'nowhere', 'pretrained': True},
     ['init is caffe', '--weights']),
    ({'weights': 'vgg.pth', 'data_folder': 'nowhere'}, ['weights is vgg.pth', '--init caffe']),
    ({'init': 'checkpoint', 'weights': 'nowhere.pth', 'pretrained': True}, ['nowhere.pth']),
    ({'init': 'caffe', 'weights': 'nowhere.pth', 'pretrained': True}, ['nowhere.pth']),
])
def test_user_errors_are_reported_in_one_line(parameters, capsys, changes, words):
    error = error_of(capsys, parameters, **changes)
    assert all(word in error for word in words), error


@pytest.mark.parametrize('network, size', [('ssd300', 300), ('ssd512', 512)])
def test_shared_memory_is_checked_for_a_batch_of_both_loaders(parameters, monkeypatch, network,
                                                              size):
    calls = []
    monkeypatch.setattr(train, 'check_shared_memory', lambda *args: calls.append(args))
    train.check_parameters(dataclasses.replace(parameters, network=network, workers=3))
    assert calls == [(3, (2 + 32) * 3 * size ** 2)]


@pytest.mark.parametrize('workers', [0, 1])
def test_image_that_cannot_be_decoded_is_named_and_stops_the_run(parameters, capsys, tmp_path,
                                                                 workers):
    for image in (tmp_path / 'voc' / 'JPEGImages').glob('im*.jpg'):
        image.write_bytes(image.read_bytes()[:300])
    error = error_of(capsys, parameters, workers=workers)
    assert 'JPEGImages/im' in error and 'cannot be decoded' in error
