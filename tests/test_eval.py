"""Tests of eval.py: from a loader or result files to the table and the mAP."""

import json
import re

import pytest
import torch
from PIL import Image
from torch import nn

import datasets
import eval as evaluation
from create_data_lists import write_data_lists
from datasets import PascalVOCDataset, make_test_loader
from support.checkpoints import save_checkpoint
from support.evaluation_report import TITLES
from utils import calculate_mAP


class FixedDetections(nn.Module):
    """Detects the same three boxes in every image."""

    antialias, input_size, device = False, 300, torch.device('cpu')

    def __init__(self):
        super().__init__()
        self.label_map = {'background': 0, 'cat': 1, 'dog': 2}

    def detect_in_batch(self, images, min_score, max_overlap, top_k):
        assert not self.training and images.dtype == torch.uint8
        assert (min_score, max_overlap, top_k) == (0.01, 0.45, 200)
        boxes = torch.tensor([[0.1, 0.1, 0.5, 0.5], [0., 0., 1., 1.], [0.6, 0.2, 0.7, 0.9]])
        n = len(images)
        return ([boxes] * n, [torch.tensor([1, 2, 1])] * n,
                [torch.tensor([0.9, 0.3, 0.02])] * n)


@pytest.fixture
def lists(make_voc, tmp_path):
    """A data folder of three test images, one of them without objects."""
    voc = make_voc({'trainval': {'t': [('cat', (1, 1, 10, 10)), ('dog', (1, 1, 9, 9))]},
                    'test': {'a': [('cat', (8, 6, 32, 24)), ('cat', (50, 2, 60, 40), 1)],
                             'b': [('dog', (1, 1, 64, 40))], 'c': []}})
    write_data_lists([(voc, 'trainval')], [(voc, 'test')], tmp_path / 'lists')
    return tmp_path / 'lists'


@pytest.fixture
def loader(lists):
    dataset = PascalVOCDataset(lists, 'TEST', keep_difficult=True)
    return make_test_loader(dataset, 2, 0, torch.device('cpu'))


def test_evaluate_prints_what_it_returns(loader, capsys):
    capsys.readouterr()
    model = FixedDetections().train()
    aps, mAP = evaluation.evaluate(loader, model)
    assert model.training   # as before
    out = capsys.readouterr().out
    assert set(aps) == {'cat', 'dog'} and aps['cat'] == 1
    assert re.search(r'^cat +1\.0000 +1\.0000 +1 +1 +6 +1\.0000$', out, re.MULTILINE)
    assert re.search(rf'^dog +{aps["dog"]:.4f} ', out, re.MULTILINE)
    assert re.search(r'^COCO AP 0.5:0.95 +\d\.\d{4}$', out, re.MULTILINE)
    assert out.splitlines()[-1].split() == ['mAP', f'{mAP:.4f}']
    # Without COCO's lines the rest is the same.
    assert evaluation.evaluate(loader, model, coco=False) == (aps, mAP)
    lines = [line for line in out.splitlines() if not line.startswith('COCO')]
    assert capsys.readouterr().out.splitlines() == lines


def test_classes_of_the_model_may_be_in_another_order(loader):
    model = FixedDetections()
    expected = evaluation.evaluate(loader, model, coco=False)
    loader.dataset.label_map = {'background': 0, 'dog': 1, 'cat': 2}
    for objects in loader.dataset.objects:
        objects['labels'] = [3 - label for label in objects['labels']]
    aps, mAP = evaluation.evaluate(loader, model, coco=False)
    assert (dict(aps), mAP) == (dict(expected[0]), expected[1])


def test_precision_is_float32_unless_given(loader, capsys, monkeypatch):
    def detect_in_batch(model, images, **thresholds):
        dtypes.append((images.flatten(1).float() @ torch.zeros(270_000, 1)).dtype)
        return original(model, images, **thresholds)

    original = FixedDetections.detect_in_batch
    monkeypatch.setattr(FixedDetections, 'detect_in_batch', detect_in_batch)
    dtypes = []
    evaluation.evaluate(loader, FixedDetections())
    evaluation.evaluate(loader, FixedDetections(), autocast=torch.autocast('cpu', torch.bfloat16))
    assert dtypes == [torch.float32] * 2 + [torch.bfloat16] * 2     # two batches each


def test_find_detections_returns_lists_for_calculate_map(loader):
    detections, ground_truth = evaluation.find_detections(loader, FixedDetections().eval())
    assert [len(boxes) for boxes in detections.boxes] == [3, 3, 3]
    assert detections.labels[2].tolist() == [1, 2, 1]
    assert detections.scores[2].tolist() == pytest.approx([0.9, 0.3, 0.02])
    assert [boxes.shape for boxes in ground_truth.boxes] == [(2, 4), (1, 4), (0, 4)]
    assert [labels.tolist() for labels in ground_truth.labels] == [[1, 1], [2], []]
    assert [d.tolist() for d in ground_truth.difficulties] == [[False, True], [False], []]
    assert ground_truth.labels[0].dtype == torch.int64
    assert ground_truth.difficulties[0].dtype == torch.bool
    result = calculate_mAP(*detections, *ground_truth, FixedDetections().label_map)
    assert result == evaluation.evaluate(loader, FixedDetections(), coco=False)


def test_images_of_several_ranks_are_gathered_in_order(monkeypatch):
    rows = torch.arange(24.).view(4, 6)
    shares = [(rows[:3], [1, 2]), (rows[3:], [1])]     # images 0 and 2, image 1
    monkeypatch.setattr(evaluation, 'all_gather', lambda share: shares)
    gathered = evaluation.gather_images([])
    assert [tensor.tolist() for tensor in gathered] == [
        rows[:1].tolist(), rows[3:].tolist(), rows[1:3].tolist()]


def test_other_ranks_print_nothing_and_return_the_same(loader, capsys, monkeypatch):
    expected = evaluation.evaluate(loader, FixedDetections(), coco=False)
    capsys.readouterr()
    monkeypatch.setattr(evaluation, 'get_rank', lambda: 1)
    assert evaluation.evaluate(loader, FixedDetections()) == expected
    assert capsys.readouterr().out == ''


def test_result_files_give_the_same_table(lists, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(evaluation.SSD300, 'from_checkpoint', lambda path: FixedDetections().eval())
    transform = datasets.transform
    monkeypatch.setattr(datasets, 'transform',
                        lambda *args: antialias.append(args[-2]) or transform(*args))
    antialias = []
    common = {'data_folder': str(lists), 'device': 'cpu', 'workers': 0}
    results, pictures = tmp_path / 'results', tmp_path / 'pictures'
    capsys.readouterr()
    evaluation.main(evaluation.Parameters(**common, results=str(results), pictures=str(pictures)))
    table = capsys.readouterr().out.splitlines()[2:]
    assert table[-1].startswith('mAP ') and antialias == [False] * 3    # the model's
    monkeypatch.undo()
    evaluation.main(evaluation.Parameters(**common, detections=str(results)))
    assert capsys.readouterr().out.splitlines() == table
    names = {'precision_recall', *(f'mistakes_{kind}' for kind in TITLES)}
    assert {path.stem for path in pictures.iterdir()} == names
    for path in pictures.iterdir():
        with Image.open(path) as image:
            assert image.width > 500


def test_operating_score_reaches_the_table_and_the_pictures(lists, tmp_path, capsys, monkeypatch):
    drawn = []
    monkeypatch.setattr(evaluation.SSD300, 'from_checkpoint', lambda path: FixedDetections().eval())
    monkeypatch.setattr(evaluation, 'draw_pictures', lambda *args: drawn.append(args[3]))
    capsys.readouterr()
    evaluation.main(evaluation.Parameters(data_folder=str(lists), device='cpu', workers=0,
                                          operating_score=0.5, pictures=str(tmp_path / 'p')))
    table = capsys.readouterr().out
    assert 'recall at 0.5\n' in table
    assert re.search(r'^dog .* 0\.0000$', table, re.MULTILINE)     # its score is 0.3
    assert drawn == [0.5]


@pytest.mark.parametrize('precision, line', [
    ('bf16', r'in torch.bfloat16: mAP (.*), float32 (.*), difference -(.*)'),
    ('auto', '--precision auto is float32 on this device'), ('float32', None)])
def test_cost_of_another_precision_is_printed(lists, capsys, monkeypatch, precision, line):
    def detect_in_batch(model, images, **thresholds):
        boxes, labels, scores = original(model, images, **thresholds)
        if torch.is_autocast_enabled('cpu'):
            labels = [3 - label for label in labels]    # cats for dogs
        return boxes, labels, scores

    original = FixedDetections.detect_in_batch
    monkeypatch.setattr(FixedDetections, 'detect_in_batch', detect_in_batch)
    monkeypatch.setattr(evaluation.SSD300, 'from_checkpoint', lambda path: FixedDetections().eval())
    monkeypatch.setattr(torch.cpu, 'get_capabilities', dict, raising=False)
    capsys.readouterr()
    evaluation.main(evaluation.Parameters(data_folder=str(lists), device='cpu', workers=0,
                                          precision=precision))
    *table, last = capsys.readouterr().out.splitlines()
    if line is None:
        assert last.startswith('mAP ')
        return
    numbers = re.fullmatch(line, last).groups()
    assert table[-1].split()[0] == 'mAP'
    if numbers:
        other, mAP, difference = map(float, numbers)
        assert table[-1].split()[1] == f'{mAP:.4f}'
        assert mAP - other == pytest.approx(difference, abs=2e-4) and difference > 0.1


def test_checkpoint_of_other_classes_is_a_user_error(lists, tmp_path, capsys):
    model = evaluation.SSD300(2)
    path = tmp_path / 'other.pth.tar'
    save_checkpoint(path, model=model.state_dict(), label_map={'background': 0, 'cow': 1})
    with pytest.raises(SystemExit):
        evaluation.main(evaluation.Parameters(data_folder=str(lists), checkpoint=str(path),
                                              device='cpu', workers=0))
    assert "was trained on the classes ['cow']" in capsys.readouterr().err


def test_classes_may_be_in_another_order_than_those_of_the_data(lists, capsys, monkeypatch):
    def detect_in_batch(model, images, **thresholds):
        boxes, labels, scores = original(model, images, **thresholds)
        return boxes, [3 - label for label in labels], scores

    def print_table():
        monkeypatch.setattr(evaluation.SSD300, 'from_checkpoint', lambda path: model.eval())
        capsys.readouterr()
        evaluation.main(evaluation.Parameters(data_folder=str(lists), device='cpu', workers=0))
        return capsys.readouterr().out

    model = FixedDetections()
    expected = print_table()
    model.label_map = {'background': 0, 'dog': 1, 'cat': 2}
    assert print_table() != expected    # other labels are other classes
    original = FixedDetections.detect_in_batch
    monkeypatch.setattr(FixedDetections, 'detect_in_batch', detect_in_batch)
    assert print_table() == expected


def test_names_that_no_result_file_can_hold_are_found_before_the_evaluation(
        make_voc, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(evaluation, 'find_detections', lambda *args: pytest.fail('evaluated'))
    for image, class_name, message in (('a b', 'cat', 'white space'), ('a', 'x/y', "'x/y'")):
        voc = make_voc({'s': {image: [(class_name, (8, 6, 32, 24))]}}, name=f'voc {image}')
        lists = tmp_path / f'lists {image}'
        write_data_lists([(voc, 's')], [(voc, 's')], lists)
        model = FixedDetections()
        model.label_map = {'background': 0, class_name: 1}
        monkeypatch.setattr(evaluation.SSD300, 'from_checkpoint', lambda path, model=model: model)
        with pytest.raises(SystemExit):
            evaluation.main(evaluation.Parameters(data_folder=str(lists), device='cpu', workers=0,
                                                  results=str(tmp_path / 'results')))
        assert message in capsys.readouterr().err


@pytest.mark.parametrize('changes, message', [
    ({'results': 'x'}, 'leave --results out'),
    ({'precision': 'bf16'}, 'leave --precision out'),
    ({'batch_size': 0}, 'batch'),
    ({'operating_score': float('nan')}, 'operating_score is nan; give a number from 0 to 1'),
    ({}, 'no images in its TEST list'),
])
def test_invalid_input_is_a_user_error(lists, tmp_path, capsys, changes, message):
    for name in ('TEST_images', 'TEST_objects'):
        (lists / f'{name}.json').write_text(json.dumps([]))
    with pytest.raises(SystemExit):
        evaluation.main(evaluation.Parameters(data_folder=str(lists), detections=str(tmp_path),
                                              **changes))
    assert message in capsys.readouterr().err
