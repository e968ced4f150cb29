"""Tests of average_precision.py, evaluation_report.py and eval.py: the numbers that are quoted.

VOC's rules by their area, COCO's rule and result files each against a slow and obvious version.
"""

import math
import re

import numpy as np
import pytest
import torch
from conftest import overlap_of
from PIL import Image
from torch import nn

import average_precision as ap
import eval as evaluation
import evaluation_report as report
from create_data_lists import Parameters as ListParameters, main as create_lists
from datasets import PascalVOCDataset, make_test_loader
from utils import UserError, save_checkpoint, voc_labels

MAP = {'background': 0, 'cat': 1, 'dog': 2, 'owl': 3}
VOC_MAP = {'background': 0, **{name: i for i, name in enumerate(voc_labels, 1)}}


def random_rows(n_images, n_classes, per_image=6):
    """Detections and objects on whole pixels, with ties, duplicates and difficult objects."""
    def boxes(n):
        """Boxes (n, 4) of a few pixels."""
        low = torch.randint(0, 8, (n, 2))
        return torch.cat([low, low + torch.randint(1, 8, (n, 2))], dim=1).double()
    n_objects = n_images * per_image // 2
    image = torch.randint(0, n_images, (n_objects,)).sort().values
    objects = ap.Objects(image, boxes(n_objects), torch.randint(1, n_classes + 1, (n_objects,)),
                         torch.rand(n_objects) < 0.3)
    near = torch.randint(0, n_objects, (n_images * per_image,))
    moved = objects.boxes[near] + torch.randint(0, 2, (len(near), 4)) * torch.tensor([-1, -1, 1, 1])
    found = [image[near], torch.where(torch.rand(len(near), 1) < 0.8, moved, boxes(len(near))),
             torch.where(torch.rand(len(near)) < 0.8, objects.labels[near],
                         torch.randint(1, n_classes + 1, near.shape)),
             torch.randint(0, 10, near.shape) / 10]
    return ap.Detections(*found), objects


def devkit_curve(detections, objects, label):
    """VOCevaldet.m as loops: recall and precision after each detection of a class."""
    there = {}
    for image, box, its_label, difficult in zip(*(column.tolist() for column in objects)):
        if its_label == label:
            there.setdefault(image, []).append([box, difficult, False])
    n_objects = sum(not difficult for mine in there.values() for _, difficult, _ in mine)
    lines = [line for line in zip(*(column.tolist() for column in detections)) if line[2] == label]
    true, false, recall, precision = 0, 0, [], []
    for image, box, _, _ in sorted(lines, key=lambda line: -line[3]):
        best, overlap = None, -math.inf
        for object_ in there.get(image, []):
            if overlap_of(box, object_[0]) > overlap:
                best, overlap = object_, overlap_of(box, object_[0])
        if overlap >= 0.5:
            if not best[1]:
                true, false, best[2] = true + (not best[2]), false + best[2], True
        else:
            false += 1
        recall.append(true / n_objects if n_objects else math.nan)
        precision.append(true / (true + false) if true + false else 0)
    return recall, precision, n_objects


def devkit_area(recall, precision):
    """VOCap.m of the devkits from 2010 on, as loops."""
    recall, precision = [0, *recall, 1], [0, *precision, 0]
    for i in range(len(precision) - 2, -1, -1):
        precision[i] = max(precision[i], precision[i + 1])
    return sum((recall[i] - recall[i - 1]) * precision[i] for i in range(1, len(recall)))


def devkit_11_points(recall, precision, n_objects):
    """VOCevaldet.m of 2007: the highest precision from each tenth of recall on."""
    return sum(max((p for r, p in zip(recall, precision)
                    if round(r * n_objects) * 10 >= tenth * n_objects), default=0)
               for tenth in range(11)) / 11


def assert_devkits(detections, objects, label_map):
    judged = ap.judge_classes(detections, objects, label_map)
    by_rule = {rule: ap.average_precisions(judged, rule)[0] for rule in ap.RULES}
    for name, mine in judged.items():
        recall, precision, n_objects = devkit_curve(detections, objects, label_map[name])
        assert n_objects == mine.n_objects
        wanted = (math.nan, math.nan) if n_objects == 0 else (
            devkit_11_points(recall, precision, n_objects), devkit_area(recall, precision))
        got = (by_rule['voc07'][name], by_rule['area'][name])
        assert got == pytest.approx(wanted, abs=1e-9, nan_ok=True)
    return by_rule


@pytest.mark.parametrize('n_images', [1, 3, 20])
def test_both_rules_are_the_devkits(n_images):
    for seed in range(20):
        torch.manual_seed(seed)
        assert_devkits(*random_rows(n_images, 3), MAP)


def voc_case(folder):
    """The objects of the VOC 2007 test set, some made difficult, and shaken detections."""
    lines = (folder / 'voc07-test-boxes.txt').read_text().splitlines()
    image, rows = [], []
    for number, line in enumerate(lines):
        numbers = torch.tensor([float(word) for word in line.split()[1:]]).double().view(-1, 5)
        image += [number] * len(numbers)
        rows.append(numbers)
    image, rows = torch.tensor(image), torch.cat(rows)
    boxes, labels = rows[:, :4] - report.FROM_1, rows[:, 4].long() + 1
    objects = ap.Objects(image, boxes, labels, torch.rand(len(image)) < 0.1)
    size = (boxes[:, 2:] - boxes[:, :2]).repeat(2, 2)
    shaken = boxes.repeat(2, 1) + torch.randn(len(size), 4) * size * 0.1
    detections = ap.Detections(image.repeat(2), (shaken * 10).round() / 10, labels.repeat(2),
                               torch.rand(len(size)).mul(1000).round() / 1000)
    order = detections.image.argsort(stable=True)
    return ap.Detections(*(column[order] for column in detections)), objects, lines


def test_result_files_of_voc_2007_give_the_devkits_numbers(sample_data, tmp_path):
    detections, objects, lines = voc_case(sample_data)
    by_rule = assert_devkits(detections, objects, VOC_MAP)
    ids = [line.split()[0].removesuffix('.jpg') for line in lines]
    report.write_results(tmp_path, detections, ids, VOC_MAP)
    again = report.read_results(tmp_path, ids, VOC_MAP)
    judged = ap.judge_classes(again, objects, VOC_MAP)
    for rule in ap.RULES:
        assert ap.average_precisions(judged, rule)[0] == by_rule[rule]
    assert 0.2 < ap.average_precisions(judged)[1] < 0.9


def coco_reference(detections, objects, label, threshold):
    """COCO's AP of one class at one overlap, as loops."""
    judged = []
    for image in range(int(objects.image.max()) + 1):
        there = [[box, difficult, False] for i, box, its_label, difficult in zip(
            *(column.tolist() for column in objects)) if (i, its_label) == (image, label)]
        mine = [(score, box) for i, box, its_label, score in zip(
            *(column.tolist() for column in detections)) if (i, its_label) == (image, label)]
        for score, box in sorted(mine, key=lambda row: -row[0])[:100]:
            free = [o for o in there if not o[2] and overlap_of(box, o[0]) >= threshold]
            # Of equal overlaps COCO takes the last, and an ignored object only if no other is free.
            easy = [o for o in free if not o[1]] or free
            best = max(reversed(easy), key=lambda o: overlap_of(box, o[0]), default=None)
            if best is not None:
                best[2] = True
            judged.append((score, best is not None, best is not None and best[1]))
    judged = [row for row in sorted(judged, key=lambda row: -row[0]) if not row[2]]
    n_objects = int(((objects.labels == label) & ~objects.difficult).sum())
    true, points = 0, []
    for number, (_, correct, _) in enumerate(judged, 1):
        true += correct
        points.append((true / n_objects, true / number))
    # COCO compares recalls in floating point, so 0.29 may be more than 29 of 100.
    return sum(max((p for r, p in points if r >= recall), default=0)
               for recall in np.linspace(0, 1, 101)) / 101


def test_coco_is_its_slow_version():
    for seed in range(5):
        torch.manual_seed(seed)
        detections, objects = random_rows(6, 2)
        got = ap.coco_average_precision(detections, objects, 6, MAP)  # no owls: not in the mean
        for name, overlap in (('0.5', 0.5), ('0.75', 0.75)):
            wanted = [coco_reference(detections, objects, label, overlap) for label in (1, 2)]
            assert got[name] == pytest.approx(sum(wanted) / 2, abs=1e-6)
        wanted = [coco_reference(detections, objects, label, overlap)
                  for label in (1, 2) for overlap in np.linspace(0.5, 0.95, 10)]
        assert got['0.5:0.95'] == pytest.approx(sum(wanted) / 20, abs=1e-6)


def test_coco_ignores_difficult_objects_by_hand(capsys):
    objects = ap.Objects(torch.tensor([0, 0]), torch.tensor([[0., 0, 10, 10], [20, 0, 30, 10]]),
                         torch.tensor([1, 1]), torch.tensor([False, True]))
    rows = torch.tensor([[20., 0, 30, 10], [0, 0, 10, 8]])  # the difficult one first; overlap 0.8
    detections = ap.Detections(torch.tensor([0, 0]), rows, torch.tensor([1, 1]),
                               torch.tensor([0.9, 0.8]))
    got = ap.coco_average_precision(detections, objects, 1, MAP)
    assert got == pytest.approx({'0.5:0.95': 0.7, '0.5': 1, '0.75': 1})   # 0.5, ..., 0.8
    nothing = ap.Detections(*(column[:0] for column in detections))
    assert ap.coco_average_precision(nothing, objects, 1, MAP)['0.5'] == 0
    absent = ap.Objects(*(column[:0] for column in objects))
    assert math.isnan(ap.coco_average_precision(detections, absent, 1, MAP)['0.5'])
    assert capsys.readouterr().out == ''


def test_result_files_are_the_devkits(tmp_path):
    fractions = ap.Detections(torch.tensor([1]), torch.tensor([[0., 0.1, 0.5, 1.]]),
                              torch.tensor([2]), torch.tensor([0.123456789]))
    detections = report.in_pixels(fractions, torch.tensor([[1., 1.], [100., 50.]]).double())
    report.write_results(tmp_path, detections, ['a', 'b'], MAP)
    text = (tmp_path / 'comp4_det_test_dog.txt').read_text()
    assert text == 'b 0.123456791 1.0000 6.0000 50.0000 50.0000\n'
    assert (tmp_path / 'comp4_det_test_cat.txt').read_text() == ''
    again = report.read_results(tmp_path, ['a', 'b'], MAP)
    assert again.image.tolist() == [1] and torch.equal(again.boxes, detections.boxes)


@pytest.mark.parametrize('name, text, parts', [
    ('cat', 'a 0.5 1 1 2 2\na 0.5 1 1 2\n', ['comp4_det_test_cat.txt, line 2']),
    ('cat', 'a 0.5 1 1 2 x\n', ['cat.txt, line 1', 'score xmin ymin xmax ymax']),
    ('cat', 'a nan 1 1 2 2\n', ['cat.txt, line 1', 'nan']),
    ('cat', '\nz 0.5 1 1 2 2\n', ["line 2: image 'z' is not in the TEST list"]),
    ('cow', '', ['comp4_det_test_cow.txt', 'no such class', 'cat, dog, owl']),
    ('dog', None, ['comp4_det_test_dog.txt: no such file']),
])
def test_what_is_wrong_with_a_result_file_is_said(tmp_path, name, text, parts):
    for each in ('cat', 'dog', 'owl'):
        (tmp_path / f'comp4_det_test_{each}.txt').write_text('')
    path = tmp_path / f'comp4_det_test_{name}.txt'
    path.unlink() if text is None else path.write_text(text)
    with pytest.raises(UserError) as error:
        report.read_results(tmp_path, ['a'], MAP)
    assert all(part in str(error.value) for part in parts) and '\n' not in str(error.value)


def test_images_of_the_same_name_have_no_ids():
    with pytest.raises(UserError, match='x/a.jpg and y/a.png have the same name'):
        report.image_ids(['x/a.jpg', 'y/a.png'])


def test_mistakes_have_their_kinds(tmp_path):
    boxes = torch.tensor([[0., 0, 10, 10], [20, 0, 30, 10], [50, 0, 90, 40]])
    objects = ap.Objects(torch.tensor([0, 0, 0]), boxes, torch.tensor([1, 2, 1]),
                         torch.zeros(3).bool())
    found = torch.tensor([[0., 0, 10, 10], [0, 0, 10, 9], [0, 0, 4, 10], [20, 0, 30, 10],
                          [0, 90, 5, 95]])
    detections = ap.Detections(torch.zeros(5).long(), found, torch.ones(5).long(),
                               torch.tensor([0.9, 0.8, 0.7, 0.6, 0.5]))
    judged = ap.judge_classes(detections, objects, MAP)
    mistakes = report.find_mistakes(judged, detections, objects, 0.2)
    assert mistakes == {'duplicate': [1], 'overlap': [2], 'class': [3], 'background': [4],
                        'missed': [2, 1]}
    assert ap.recall_from(judged['cat'], 0.2) == 0.5 and ap.recall_from(judged['cat'], 0.95) == 0


class Copying(nn.Module):
    """Finds a few fixed boxes on every image."""

    def __init__(self):
        super().__init__()
        self.register_buffer('priors_cxcy', torch.zeros(1, 4))
        self.label_map = {'background': 0, 'cat': 1, 'dog': 2}

    def normalize(self, images):
        return images.float()

    def forward(self, images):
        return images, images

    def detect_objects(self, images, _, *thresholds):
        assert thresholds == (0.01, 0.45, 200)
        boxes = torch.tensor([[0.1, 0.1, 0.5, 0.5], [0., 0., 1., 1.], [0.6, 0.2, 0.7, 0.9]])
        n = len(images)
        return ([boxes] * n, [torch.tensor([1, 2, 1])] * n,
                [torch.tensor([0.9, 0.3, 0.02])] * n)


@pytest.fixture
def lists(make_voc, tmp_path):
    voc = make_voc({'trainval': {'t': [('cat', (1, 1, 10, 10)), ('dog', (1, 1, 9, 9))]},
                    'test': {'a': [('cat', (8, 6, 32, 24)), ('cat', (50, 2, 60, 40), 1)],
                             'b': [('dog', (1, 1, 64, 40))], 'c': []}})
    create_lists(ListParameters(train=(f'{voc}:trainval',), test=(f'{voc}:test',),
                                output_folder=str(tmp_path / 'lists')))
    return tmp_path / 'lists'


def test_evaluate_prints_what_it_returns(lists, capsys):
    loader = make_test_loader(PascalVOCDataset(lists, 'TEST', True), 2, 0, torch.device('cpu'))
    capsys.readouterr()
    aps, mean = evaluation.evaluate(loader, Copying())
    out = capsys.readouterr().out
    assert set(aps) == {'cat', 'dog'} and (aps, mean) == evaluation.find_average_precisions(
        loader, Copying())
    assert re.search(r'^cat +1\.0000 +1\.0000 +1 +1 +6 +1\.0000$', out, re.MULTILINE)
    assert re.search(rf'^dog +{aps["dog"]:.4f} ', out, re.MULTILINE)
    assert re.search(r'^COCO AP 0.5:0.95 +\d\.\d{4}$', out, re.MULTILINE)
    assert out.splitlines()[-1].split() == ['mAP', f'{mean:.4f}']


def test_files_give_the_numbers_of_the_network(lists, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(evaluation.SSD300, 'from_checkpoint', lambda path: Copying())
    common = {'data_folder': str(lists), 'device': 'cpu', 'workers': 0}
    results, pictures = tmp_path / 'results', tmp_path / 'pictures'
    capsys.readouterr()
    evaluation.main(evaluation.Parameters(**common, results=str(results), pictures=str(pictures)))
    table = capsys.readouterr().out.splitlines()[2:]
    monkeypatch.undo()
    evaluation.main(evaluation.Parameters(**common, detections=str(results)))
    assert capsys.readouterr().out.splitlines() == table
    names = {'precision_recall', *(f'mistakes_{kind}' for kind in report.TITLES)}
    assert {path.stem for path in pictures.iterdir()} == names
    for path in pictures.iterdir():
        with Image.open(path) as image:
            assert image.width > 500


def test_a_checkpoint_of_other_classes_is_refused(lists, tmp_path, capsys):
    model = evaluation.SSD300(2)
    path = tmp_path / 'other.pth.tar'
    save_checkpoint(path, model=model.state_dict(), label_map={'background': 0, 'cow': 1})
    with pytest.raises(SystemExit):
        evaluation.main(evaluation.Parameters(data_folder=str(lists), checkpoint=str(path),
                                              device='cpu', workers=0))
    assert "knows the classes ['cow']" in capsys.readouterr().err


def test_shares_of_processes_come_back_in_order():
    rows = torch.arange(24.).view(4, 6)
    shares = [(rows[:3], [1, 2]), (rows[3:], [1])]     # images 0 and 2, image 1
    image, joined, n_images = evaluation.join_shares(shares)
    assert image.tolist() == [0, 1, 2, 2] and n_images == 3
    assert torch.equal(joined, rows[[0, 3, 1, 2]])
