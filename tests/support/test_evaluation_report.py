"""Tests of support/evaluation_report.py: the table, result files, mistakes."""

import io
import os
import random
import sys
import types

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image, ImageColor
from tqdm import tqdm

from support import evaluation_report as report
from support.errors import UserError
from utils import (
    Detections,
    GroundTruth,
    calculate_mAP,
    distinct_colors,
    label_map as voc_label_map,
    match_classes,
)

LABEL_MAP = {'background': 0, 'cat': 1, 'dog': 2, 'owl': 3}

# Cats: an object, a dog, a large cat that is missed. Detections of cats only.
GROUND_TRUTH = GroundTruth([torch.tensor([[0., 0, 10, 10], [20, 0, 30, 10], [50, 0, 90, 40]])],
                           [torch.tensor([1, 2, 1])], [torch.zeros(3).bool()])
DETECTIONS = Detections([torch.tensor([[0., 0, 10, 10], [0, 0, 10, 9], [0, 0, 4, 10],
                                       [20, 0, 30, 10], [0, 90, 5, 95]])],
                        [torch.ones(5).long()], [torch.tensor([0.9, 0.8, 0.7, 0.6, 0.5])])

# Bytes that are inserted into result files.
MUTATIONS = [b'', b' ', b'\n', b'\0', b'\xff', b'-', b'.', b'e9', b'1e400', b' nan ', b' -inf ',
             b'1_0', b'9' * 500, b'a 0.5 9 9 1 1\n', b'\xe2\x80\xa8', b'\x1c', b'0x1']


@pytest.fixture
def table():
    """Arguments of `print_table` for the detections above."""
    aps, mAP = calculate_mAP(*DETECTIONS, *GROUND_TRUTH, LABEL_MAP)
    return aps, mAP, match_classes(DETECTIONS, GROUND_TRUTH, LABEL_MAP), {'AP 0.5': 0.25}, 0.95


def test_table(table, capsys):
    report.print_table(*table)
    header, *rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ' '.join(header) == 'AP (07) AP (area) objects difficult detections recall at 0.95'
    assert rows == [
        ['cat', '0.5455', '0.5000', '2', '0', '5', '0.0000'],
        ['dog', '0.0000', '0.0000', '1', '0', '0', '0.0000'],
        ['owl', 'no', 'objects', '0', '0', '0'],
        ['mean,', 'sum', '0.2727', '0.2500', '3', '0', '5', '0.0000'],
        ['COCO', 'AP', '0.5', '0.2500'],
        ['mAP', '0.2727']]


def test_table_is_printed_above_a_progress_bar(table, capsys, monkeypatch):
    screen = io.StringIO()
    monkeypatch.setattr(sys, 'stdout', screen)
    with tqdm(total=10, desc='training', file=screen):
        report.print_table(*table)
    # The bar is cleared before the first line: without that, they would share one.
    lines = [' '.join(line.split()) for line in screen.getvalue().replace('\r', '\n').splitlines()]
    assert 'AP (07) AP (area) objects difficult detections recall at 0.95' in lines
    assert 'mAP 0.2727' in lines


def test_recall_at_a_score():
    match = match_classes(DETECTIONS, GROUND_TRUTH, LABEL_MAP)['cat']
    assert report.recall_at(match, 0.2) == 0.5 and report.recall_at(match, 0.95) == 0


def test_result_files_are_the_devkits(tmp_path):
    nothing = (torch.zeros(0, 4), torch.zeros(0).long(), torch.zeros(0))
    image = (torch.tensor([[0., 0.1, 0.5, 1.]]), torch.tensor([2]), torch.tensor([0.123456789]))
    detections = report.to_pixels(Detections(*map(list, zip(nothing, image))),
                                  torch.tensor([[1., 1.], [100., 50.]]).double())
    report.write_results(tmp_path, detections, ['a', 'b'], LABEL_MAP)
    text = (tmp_path / 'comp4_det_test_dog.txt').read_text()
    assert text == 'b 0.123456791 1.0000 6.0000 50.0000 50.0000\n'
    assert (tmp_path / 'comp4_det_test_cat.txt').read_text() == ''
    again = report.read_results(tmp_path, ['a', 'b'], LABEL_MAP)
    assert [len(boxes) for boxes in again.boxes] == [0, 1] and again.labels[1].tolist() == [2]
    assert torch.equal(again.boxes[1], detections.boxes[1])


def voc_case(folder, n_images=1000):
    """Objects of VOC 2007 test, some made difficult, and detections near them, two per object."""
    lines = (folder / 'voc07-test-boxes.txt').read_text().splitlines()[:n_images]
    detections, ground_truth = Detections([], [], []), GroundTruth([], [], [])
    for line in lines:
        rows = torch.tensor([float(word) for word in line.split()[1:]]).double().view(-1, 5)
        boxes, labels = rows[:, :4] - report.FROM_1, rows[:, 4].long() + 1
        for column, tensor in zip(ground_truth, (boxes, labels, torch.rand(len(rows)) < 0.1)):
            column.append(tensor)
        size = (boxes[:, 2:] - boxes[:, :2]).repeat(2, 2)
        near = boxes.repeat(2, 1) + torch.randn(len(size), 4) * size * 0.1
        detections.boxes.append((near * 10).round() / 10)
        detections.labels.append(labels.repeat(2))
        detections.scores.append(torch.rand(len(size)).mul(1000).round() / 1000)    # with ties
    return detections, ground_truth, [line.split()[0].removesuffix('.jpg') for line in lines]


def test_result_files_of_voc_2007_give_the_same_map(sample_data, tmp_path):
    detections, ground_truth, ids = voc_case(sample_data)
    report.write_results(tmp_path, detections, ids, voc_label_map)
    again = report.read_results(tmp_path, ids, voc_label_map)
    for rule in ('voc07', 'area'):
        before = calculate_mAP(*detections, *ground_truth, voc_label_map, rule)
        assert calculate_mAP(*again, *ground_truth, voc_label_map, rule) == before
        assert 0.2 < before[1] < 0.9


@pytest.mark.parametrize('name, text, parts', [
    ('cat', 'a 0.5 1 1 2 2\na 0.5 1 1 2\n', ['comp4_det_test_cat.txt, line 2']),
    ('cat', 'a 0.5 1 1 2 x\n', ['cat.txt, line 1', 'score xmin ymin xmax ymax']),
    *(('cat', f'a {row}\n', ['cat.txt, line 1', row]) for row in (
        'nan 1 1 2 2', '0.5 1 1 inf 2', '0.5 9 1 2 2', '0.5 1 9 2 2', '0.5 1 1 1e30 2',
        '0.5 -1e30 1 2 2', '1e999 1 1 2 2', '0.5 1 1 2 2 2')),
    ('cat', '\nz 0.5 1 1 2 2\n', ["line 2: image 'z' is not in the TEST list"]),
    ('cow', '', ['comp4_det_test_cow.txt', 'no such class', 'cat, dog, owl']),
    ('dog', None, ['comp4_det_test_dog.txt: no such file']),
])
def test_invalid_result_file_is_a_user_error(tmp_path, name, text, parts):
    for class_name in ('cat', 'dog', 'owl'):
        (tmp_path / f'comp4_det_test_{class_name}.txt').write_text('')
    path = tmp_path / f'comp4_det_test_{name}.txt'
    path.unlink() if text is None else path.write_text(text)
    with pytest.raises(UserError) as error:
        report.read_results(tmp_path, ['a'], LABEL_MAP)
    assert all(part in str(error.value) for part in parts) and '\n' not in str(error.value)


def test_images_of_the_same_name_are_a_user_error():
    with pytest.raises(UserError, match='x/a.jpg and y/a.png have the same name'):
        report.image_ids(['x/a.jpg', 'y/a.png'])


def test_image_that_is_listed_twice_is_a_user_error():
    with pytest.raises(UserError, match='x/a.jpg is in the TEST list twice; make the lists again'):
        report.image_ids(['x/a.jpg', 'x/b.jpg', 'x/a.jpg'])


@pytest.mark.parametrize('name', ['a b', 'a\nb', ' a', 'a\u2028b'])
def test_image_name_with_white_space_is_a_user_error(name):
    with pytest.raises(UserError, match='has white space in its name.*rename it'):
        report.image_ids(['a.jpg', f'x y/{name}.jpg'])
    assert report.image_ids(['x y/a.jpg']) == ['a']


@pytest.mark.parametrize('name', ['a/b', '../a', 'a\0b', 'a\nb', '\udcff', 'a' * 201])
def test_class_name_that_no_file_can_have_is_a_user_error(tmp_path, name):
    label_map = {'background': 0, 'cat .. $': 1, name: 2}
    for function in (report.result_paths, lambda *args: report.read_results(args[0], [], args[1])):
        with pytest.raises(UserError, match='cannot be part of the name of a result file'):
            function(tmp_path / 'x', label_map)
    del label_map[name]
    path, = report.result_paths(tmp_path, label_map).values()
    assert path == tmp_path / 'comp4_det_test_cat .. $.txt'


def test_image_name_that_is_not_unicode_survives_a_result_file(tmp_path):
    ids = ['a\udcff']     # as Python decodes the byte 255 of a file's name
    report.write_results(tmp_path, DETECTIONS, ids, LABEL_MAP)
    assert torch.equal(report.read_results(tmp_path, ids, LABEL_MAP).boxes[0], DETECTIONS.boxes[0])


def test_mutated_result_files_are_read_or_a_user_error(tmp_path):
    """Set SSD_FUZZ to the number of files; 100 by default."""
    rng = random.Random(0)
    report.write_results(tmp_path, DETECTIONS, ['a'], LABEL_MAP)
    path = tmp_path / 'comp4_det_test_cat.txt'
    text = path.read_bytes()
    for _ in range(int(os.environ.get('SSD_FUZZ', 100))):
        start = rng.randrange(len(text))
        path.write_bytes(text[:start] + rng.choice(MUTATIONS) + text[start + rng.randrange(3):])
        try:
            detections = report.read_results(tmp_path, ['a'], LABEL_MAP)
        except UserError as error:
            assert 'comp4_det_test_cat.txt, line ' in str(error) and '\n' not in str(error)
        else:
            boxes = detections.boxes[0]
            assert boxes.isfinite().all() and detections.scores[0].isfinite().all()
            assert (boxes[:, 2:] - boxes[:, :2] > -0.01).all() and (boxes.abs() < 2e6).all()


@pytest.mark.parametrize('name', ['$_$', '_cat'])
def test_any_class_name_is_in_the_legend_and_a_single_true_positive_is_a_point(name, tmp_path):
    """In Matplotlib dollars enclose a formula, and a label that begins with _ is hidden."""
    label_map = {'background': 0, name: 1, 'dog': 2, 'owl': 3}
    matches = match_classes(DETECTIONS, GROUND_TRUTH, label_map)
    report.draw_precision_recall(matches, label_map, tmp_path / 'curves.png')
    image = np.array(Image.open(tmp_path / 'curves.png').convert('RGB'), dtype=int)
    has_color = abs(image - ImageColor.getrgb(distinct_colors(label_map)[name])).sum(2) < 30
    columns = has_color.any(axis=0).nonzero()[0]
    # The point at a recall of 0.5 is left of the middle, the line of the legend at the right.
    assert columns.min() < 0.5 * image.shape[1] and columns.max() > 0.8 * image.shape[1]


def test_curve_has_precision_and_recall_at_each_true_positive(tmp_path, monkeypatch):
    """Of five cats three are detected; the third detection is a false positive."""
    def savefig(figure, *args, **kwargs):
        lines.extend(figure.axes[0].lines)
        original(figure, *args, **kwargs)

    boxes = torch.arange(5.)[:, None] * 20 + torch.tensor([0., 0., 10., 10.])
    ground_truth = GroundTruth([boxes], [torch.ones(5).long()], [torch.zeros(5).bool()])
    found = torch.cat([boxes[:2], boxes[:1] + 500, boxes[2:3]])
    detections = Detections([found], [torch.ones(4).long()], [torch.tensor([.9, .8, .7, .6])])
    lines, original = [], Figure.savefig
    monkeypatch.setattr(Figure, 'savefig', savefig)
    report.draw_precision_recall(match_classes(detections, ground_truth, LABEL_MAP), LABEL_MAP,
                                 tmp_path / 'curves.png')
    line, = lines   # the other classes have no objects
    assert line.get_xydata() == pytest.approx(np.array([[0.2, 1], [0.4, 1], [0.6, 0.75]]))
    assert line.get_label().endswith(' cat')


def test_kinds_of_mistakes():
    matches = match_classes(DETECTIONS, GROUND_TRUTH, LABEL_MAP)
    mistakes = report.find_mistakes(matches, DETECTIONS, GROUND_TRUTH, 0.2)
    assert mistakes == {'duplicate': [1], 'overlap': [2], 'class': [3], 'background': [4],
                        'missed': [2, 1]}
    mistakes = report.find_mistakes(matches, DETECTIONS, GROUND_TRUTH, 0.95)
    assert mistakes['missed'] == [2, 0, 1]


def test_tiles_show_the_image_the_boxes_and_the_file_name_of_a_mistake(tmp_path):
    """The second image has a cat that is missed, and a false positive; tiles are half as large."""
    for name, color in (('a', 'green'), ('b', 'blue')):
        Image.new('RGB', (640, 480), color).save(tmp_path / f'{name}.png')
    no_boxes, no_rows, cat = torch.zeros(0, 4), torch.zeros(0), torch.tensor([1])
    truth = GroundTruth([no_boxes, torch.tensor([[100., 100, 300, 300]])], [no_rows.long(), cat],
                        [no_rows.bool(), torch.tensor([False])])
    found = Detections([no_boxes, torch.tensor([[400., 300, 600, 400]])], [no_rows.long(), cat],
                       [no_rows, torch.tensor([0.9])])
    dataset = types.SimpleNamespace(images=[str(tmp_path / 'a.png'), str(tmp_path / 'b.png')],
                                    label_map=LABEL_MAP)
    matches = match_classes(found, truth, LABEL_MAP)
    report.draw_mistakes(matches, found, truth, dataset, 0.2, tmp_path)
    color = ImageColor.getrgb(distinct_colors(LABEL_MAP)['cat'])
    white, red, blue = (255, 255, 255), (255, 0, 0), (0, 0, 255)
    for kind, true_color, found_color in (('background', white, color), ('missed', red, blue)):
        empty = report.make_page(report.TITLES[kind], [(Image.new('RGB', (1, 1)), 'b.png: cat')])
        with Image.open(tmp_path / f'mistakes_{kind}.png') as page:
            header = (0, 0, page.width, 3 * report.LINE)    # title and caption
            assert page.crop(header).tobytes() == empty.crop(header).tobytes()
            tile = page.crop((0, 3 * report.LINE, page.width, page.height))
        places = (10, 10), (50, 100), (200, 175)    # the left sides of the boxes
        assert [tile.getpixel(place) for place in places] == [blue, true_color, found_color]


def test_fifth_tile_begins_the_second_row():
    tiles = [(Image.new('RGB', (report.TILE, report.TILE), color), '')
             for color in ('red', 'lime', 'blue', 'yellow', 'white')]
    page = report.make_page('', tiles)
    rows, size = (3 * report.LINE, 4 * report.LINE + report.TILE), report.TILE
    colors = [page.getpixel((x, y)) for y in rows for x in range(0, 4 * size, size)]
    assert colors[:5] == [ImageColor.getrgb(name)
                          for name in ('red', 'lime', 'blue', 'yellow', 'white')]
    assert colors[5:] == [(0, 0, 0)] * 3 and page.height == rows[1] + size
