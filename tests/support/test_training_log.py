"""The log of a training run: its rows, what a resumed run keeps, and its pictures."""

import csv
import math
import types

import pytest
import torch

from datasets import ShuffledBatches
from model import SSD300
from support.errors import UserError
from support.training_log import COLUMNS, TrainingLog, draw_detections, read_log

PATHS = [f'im{i}.jpg' for i in range(4)]


@pytest.fixture
def make_log(tmp_path):
    """Return a function that makes a log of batches of two images."""
    def make(start=0, end=1000):
        batches = ShuffledBatches(4, 2, 0, 0, end)
        return TrainingLog(tmp_path / 'log', start, end, torch.device('cpu'), batches, PATHS)
    return make


def update(log, *losses, is_finite=True):
    log.update(torch.tensor(losses), torch.tensor(is_finite), n_images=2)


def test_search_for_the_scale_of_float16_does_not_end_a_run(make_log):
    with make_log() as log:
        for _ in range(12):
            update(log, 1., 1., is_finite=False)
        log.write_row(12, 0.5, scale=2.)
        assert log.n_skipped == 12
        for _ in range(12):     # the scale is not the reason any more
            update(log, 1., 1., is_finite=False)
        with pytest.raises(UserError, match='10 times in a row, the last time at iteration 22'):
            log.write_row(24, 0.5, scale=1.)
    with make_log() as log:
        for _ in range(12):
            update(log, math.nan, 1., is_finite=False)
        with pytest.raises(UserError, match='10 times in a row'):    # whatever the scale
            log.write_row(12, 0.5, scale=2.)


def test_row_has_the_means_of_the_steps_that_were_taken(make_log, tmp_path, capsys):
    with make_log() as log:
        update(log, 1., 2.)
        update(log, math.nan, 5., is_finite=False)
        update(log, 3., 6.)
        log.write_row(3, 0.01)
        log.restart_clock()
        update(log, math.inf, 5., is_finite=False)
        log.write_row(4, 0.01)
        log.add_mAP(0.25)
    with open(tmp_path / 'log' / 'log.csv', newline='') as file:
        header, *rows = csv.reader(file)
    assert header == list(COLUMNS)
    del rows[0][5], rows[1][5]  # images per second
    assert rows == [['3', '6', '2', '4', '0.01', '1', ''], ['4', '', '', '', '0.01', '2', '0.25']]
    assert 'loss 6.000 = classes 2.000 + boxes 4.000, lr 0.01' in capsys.readouterr().err
    assert (tmp_path / 'log' / 'curves.png').stat().st_size > 10_000
    assert log.best_mAP() == 0.25


def test_log_that_cannot_be_written_is_a_user_error(make_log, tmp_path):
    with make_log() as log:
        (tmp_path / 'log' / 'log.csv').unlink()
        (tmp_path / 'log' / 'log.csv').symlink_to('/dev/full')
        update(log, 1., 2.)
        with pytest.raises(UserError, match='log cannot be written .*No space left.*--resume auto'):
            log.write_row(1, 1e-3)


def test_ten_skipped_steps_in_a_row_are_a_user_error(make_log):
    with make_log() as log:
        for iteration in range(1, 10):
            update(log, math.nan, 1., is_finite=False)
            if iteration % 3 == 0:
                log.write_row(iteration, 0.5)
        update(log, 1., 1.)     # the count starts again
        log.write_row(10, 0.5)
        for _ in range(12):
            update(log, math.nan, 1., is_finite=False)
        paths = [PATHS[i] for _, i in log.batches.batch(19)]
        with pytest.raises(UserError, match=f'10 times in a row.*iteration 20.*rate of 0.5: .*nan.*'
                                            f'{", ".join(paths)}$'):
            log.write_row(22, 0.5)


def test_speed_is_that_of_each_row_and_remaining_time_is_estimated_once(
        make_log, monkeypatch, capsys):
    seconds = 100.
    clock = types.SimpleNamespace(perf_counter=lambda: seconds)
    monkeypatch.setattr('support.training_log.time', clock)
    with make_log(end=60) as log:
        for iteration in range(1, 61):
            update(log, 1., 1.)
            seconds += 0.5
            if iteration % 10 == 0:
                log.write_row(iteration, 0.1)
                seconds += 1000     # an evaluation
                log.restart_clock()
    assert [row['images_per_s'] for row in log.rows] == [4] * 6
    out = capsys.readouterr().out
    assert '50 iterations: 4.0 images/s, 00:05 to go' in out
    assert out.count('50 iterations: ') == 1


def test_resumed_run_keeps_the_rows_up_to_its_start(make_log, tmp_path):
    with make_log() as log:
        for iteration in range(1, 5):
            update(log, 1., 1., is_finite=iteration != 2)
            log.write_row(iteration, 0.1)
        log.add_mAP(0.5)
    with open(tmp_path / 'log' / 'log.csv', 'a') as file:
        file.write('5,1.5,\0')  # cut off by a power failure
    assert len(read_log(tmp_path / 'log' / 'log.csv')) == 4
    with make_log(start=4) as log:
        assert not log.lacks_mAP() and log.best_mAP() == 0.5
    with make_log(start=3) as log:
        assert log.lacks_mAP() and log.best_mAP() == -math.inf and log.n_skipped == 1
    assert [row['iteration'] for row in read_log(tmp_path / 'log' / 'log.csv')] == [1, 2, 3]
    with make_log(start=0) as log:
        assert log.rows == []
    assert read_log(tmp_path / 'log' / 'log.csv') == []
    assert len(read_log(tmp_path / 'log' / 'log.earlier.csv')) == 3
    assert read_log(tmp_path / 'nowhere.csv') == []


def test_test_images_show_ground_truth_in_white_and_leave_the_model_as_it_is(monkeypatch):
    model = SSD300(3).train()
    model.label_map = {'background': 0, 'cat': 1, 'dog': 2}
    image = torch.zeros(3, 300, 300, dtype=torch.uint8)
    detection = [[torch.tensor([[.6, .6, .9, .9]])], [torch.tensor([2])], [torch.tensor([.7])]]
    monkeypatch.setattr(model, 'detect_objects', lambda *arguments, **thresholds: detection)
    picture = draw_detections(model, image, torch.tensor([[.1, .2, .5, .4]]))
    assert picture.size == (300, 300) and model.training and (image == 0).all()
    white = (255, 255, 255)
    assert picture.getpixel((30, 90)) == picture.getpixel((100, 60)) == white
    assert picture.getpixel((90, 90)) == (0, 0, 0)
    assert picture.getpixel((180, 240)) not in (white, (0, 0, 0))
