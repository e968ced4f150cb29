"""Tests of tools/benchmark.py and tools/benchmark_sides.py."""

import json
import pathlib
import subprocess
import sys

import pytest
import torch

from datasets import collate_padded
from support.errors import UserError
from tools import benchmark, benchmark_sides

ROOT = pathlib.Path(__file__).resolve().parents[2]
ROW_KEYS = ['what', 'unit', 'ours', 'torchvision', 'ratio', 'note']


def test_table_is_printed_and_written_as_json(tmp_path):
    command = [sys.executable, '-m', 'tools.benchmark', '--only', 'loss', 'detect', '--repeats',
               '1', '--output', str(tmp_path / 'out.json'), '--device', 'cpu']
    done = subprocess.run(command, cwd=ROOT, text=True, stdout=subprocess.PIPE,
                          stderr=subprocess.STDOUT, timeout=240)
    assert done.returncode == 0, done.stdout[-2000:]
    assert 'Traceback' not in done.stdout
    rows = json.loads((tmp_path / 'out.json').read_text())['rows']
    assert {row['what'].split(',')[0] for row in rows} == {'loss', 'detect'}
    for row in rows:
        assert list(row) == ROW_KEYS
        assert row['ours'] > 0 and row['torchvision'] > 0 and row['ratio'] > 0
        assert row['what'] in done.stdout


def test_row_of_times_has_medians_and_the_median_ratio():
    row = benchmark.row_of_times('x', 'ms', 1, [1., 1.], [2., 2.])
    assert row == benchmark.Row('x', 'ms', ours=1000, torchvision=2000, ratio=2)
    # The ratios of the pairs are 2, 3 and 0.25, that of the medians is 1.
    assert benchmark.row_of_times('x', 's', 1, [1, 2, 8], [2, 6, 2]).ratio == 2
    assert benchmark.row_of_times('x', 's', 1, [3.]) == benchmark.Row('x', 's', ours=3)


def test_units():
    assert {unit: convert(0.5, 4) for unit, convert in benchmark.UNITS.items()} == {
        'images/s': 8, 'ms/image': 125, 'ms': 500, 's': 0.5}


@pytest.fixture
def ready_items():
    return benchmark.ReadyItems(None)


def test_both_sides_get_the_same_images_from_the_loaders(ready_items):
    items = [ready_items[i] for i in range(3)]
    usual = benchmark.take_lists(torch.device('cpu'), benchmark.collate_lists(items))[0]
    padded = benchmark.take_padded(torch.device('cpu'), collate_padded(items))
    assert usual.shape == (3, 3, 300, 300) and usual.dtype == torch.uint8
    assert torch.equal(usual, padded)


@pytest.mark.parametrize('make_side', benchmark_sides.SIDES)
def test_a_step_trains_each_side(make_side):
    cpu = torch.device('cpu')
    side = make_side(cpu)
    side.model.train()
    conv1_1, = (p for p in side.model.parameters() if p.shape == (64, 3, 3, 3))
    before = conv1_1.detach().clone()
    boxes, labels = benchmark_sides.sample_objects(None, 1, cpu)
    train_on = side.prepare_training(torch.float32, 1)
    train_on([side.make_batch(benchmark.make_images(1, cpu), boxes, labels)])
    assert all(p.isfinite().all() and p.grad.isfinite().all() for p in side.model.parameters())
    assert not torch.equal(conv1_1, before)     # the gradient reaches the first layer


def test_simulated_outputs_have_the_wanted_candidates():
    side = benchmark_sides.OurSide(torch.device('cpu'))
    boxes, labels = benchmark_sides.sample_objects(None, 4, 'cpu')
    _, scores = benchmark_sides.simulate_trained_outputs(side.model.priors_cxcy, boxes, labels)
    n_candidates = (scores.softmax(dim=2)[:, :, 1:] > 0.01).sum().item() / 4
    assert n_candidates == pytest.approx(170, rel=0.1)
    _, scores = benchmark_sides.simulate_untrained_outputs(2, 'cpu')
    assert (scores.softmax(dim=2) > 0.01).all()


def test_boxes_are_read_as_edges_in_fractions(tmp_path):
    path = tmp_path / 'boxes.txt'
    path.write_text('a.jpg 1 1 250 375 0 101 1 500 75 19\nb.jpg\nc.jpg 1 1 1000 500 2\n')
    (boxes, labels), (large_box, _) = benchmark_sides.load_objects(str(path))
    assert torch.allclose(boxes, torch.tensor([[0, 0, 0.5, 1], [0.2, 0, 1, 0.2]]))
    assert labels.tolist() == [1, 20]
    assert torch.allclose(large_box, torch.tensor([[0., 0, 1, 1]]))


@pytest.mark.parametrize('content, expected', [
    ('a.jpg 1 1 5 5 20\n', 'line 1: a class is not from 0 to 19'),
    ('a.jpg 1 1 5 5 1\nb.jpg 1 2 3\n', 'line 2'),
    ('a.jpg\n', 'has no objects'),
])
def test_invalid_boxes_are_a_user_error(tmp_path, content, expected):
    path = tmp_path / 'boxes.txt'
    path.write_text(content)
    with pytest.raises(UserError, match=expected):
        benchmark_sides.load_objects(str(path))
