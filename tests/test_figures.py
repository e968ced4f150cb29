"""The pictures of the README: all are drawn, the same each time, from the code's own numbers."""

import hashlib
import math

import pytest
import torch
from conftest import overlap_of
from PIL import Image

import figures
from average_precision import average_precision
from model import FEATURE_MAPS, SSD300
from report import COLUMNS, write_log
from utils import cxcy_to_xy

NAMES = {'network', 'overlap', 'fc_to_conv', 'priors_of_a_cell', 'priors_of_a_map', 'offsets',
         'stacking', 'matching', 'hard_negatives', 'nms', 'augmentation', 'learning_rate',
         'precision_recall', 'training_curves'}


def draw_all(folder, log):
    """Draw into a folder; returns the name and the hash of each picture."""
    figures.main(figures.Parameters(output_folder=str(folder), log=str(log)))
    return {path.stem: hashlib.sha256(path.read_bytes()).hexdigest()
            for path in folder.glob('*.png')}


@pytest.fixture(scope='module')
def drawn(tmp_path_factory):
    """The folder of all pictures, with a made-up log for the curves, and their hashes."""
    folder = tmp_path_factory.mktemp('figures')
    rows = [dict.fromkeys(COLUMNS, 0.1) | {
        'iteration': 10 * i, 'loss': 20 / i, 'classes': 15 / i, 'boxes': 5 / i, 'skipped': 0,
        'mAP': 0.5 + i / 50 if i % 4 == 0 else math.nan} for i in range(1, 17)]
    write_log(folder / 'log.csv', rows)
    return folder, draw_all(folder, folder / 'log.csv')


def test_all_pictures_are_drawn_small_and_opaque(drawn):
    folder, hashes = drawn
    assert set(hashes) == NAMES
    for name in NAMES:
        path = folder / f'{name}.png'
        assert path.stat().st_size < 200_000, f'{name}: {path.stat().st_size} bytes'
        with Image.open(path) as image:
            assert image.width == figures.WIDTH * figures.DPI, name
            assert 350 < image.height < 1200, name
            assert not image.has_transparency_data, name
            assert not image.info.keys() & {'Software', 'Creation Time'}, name
            # The margin is paper all around: nothing is cut off.
            rgb = image.convert('RGB')
            assert {rgb.getpixel((x, y)) for x in (0, rgb.width - 1) for y in range(rgb.height)
                    } == {rgb.getpixel((0, 0))}, name
            assert {rgb.getpixel((x, y)) for y in (0, rgb.height - 1) for x in range(rgb.width)
                    } == {rgb.getpixel((0, 0))}, name


def test_drawn_again_they_are_the_same_and_curves_need_a_log(drawn, tmp_path, capsys):
    _, hashes = drawn
    again = draw_all(tmp_path, tmp_path / 'none.csv')
    assert 'training_curves.png is left out' in capsys.readouterr().out
    assert again == {name: hash_ for name, hash_ in hashes.items() if name != 'training_curves'}


def test_shapes_of_the_maps_are_those_of_the_table():
    assert figures.map_shapes() == [(map_.channels, map_.size, map_.size) for map_ in FEATURE_MAPS]
    assert figures.rows_of_maps() == [5776, 2166, 600, 150, 36, 4]


def test_priors_of_a_map_and_their_names():
    parts = [figures.priors_of(map_.name).reshape(-1, 4) for map_ in FEATURE_MAPS]
    assert torch.equal(torch.cat(parts), SSD300.create_prior_boxes())
    assert figures.priors_of('conv9_2').shape == (5, 5, 6, 4)
    assert figures.ratio_names(FEATURE_MAPS[3]) == ['1 : 1', '1 : 1, second square', '2 : 1',
                                                    '3 : 1', '1 : 2', '1 : 3']
    for name, (_, _, width, height) in zip(figures.ratio_names(FEATURE_MAPS[3]),
                                           figures.priors_of('conv9_2')[2, 2].tolist()):
        over, under = name.removesuffix(', second square').split(' : ')
        assert width / height == pytest.approx(int(over) / int(under))


def test_offsets_are_multiplied_as_the_code_does():
    prior, box = torch.tensor([0.5, 0.5, 0.2, 0.4]), torch.tensor([0.6, 0.4, 0.4, 0.2])
    raw, factors, locs = figures.offset_steps(box, prior)
    assert raw == pytest.approx([0.5, -0.25, math.log(2), -math.log(2)], abs=1e-5)
    assert factors == pytest.approx([10, 10, 5, 5], rel=1e-4)
    assert locs == pytest.approx([r * f for r, f in zip(raw, factors)], abs=1e-5)


def test_matches_that_are_drawn_overlap_by_half_or_are_forced():
    _, boxes, labels = figures.scene(431)
    matched, best, classes = figures.match(boxes, labels)
    priors = cxcy_to_xy(SSD300.create_prior_boxes())
    assert (best < 0.5).sum() == 1
    assert torch.equal(matched.any(dim=0), classes > 0)
    for box, label, mine, highest in zip(boxes.tolist(), labels, matched, best.tolist()):
        overlaps = [overlap_of(box, prior) for prior in priors[mine].tolist()]
        assert max(overlaps) == pytest.approx(highest, abs=1e-5)
        assert len(overlaps) == 1 if highest < 0.5 else min(overlaps) >= 0.5 - 1e-5
        assert (classes[mine] == label).all()


def test_suppression_leaves_one_box_an_object():
    _, boxes, labels = figures.scene(7)
    output, model = figures.candidates(boxes, labels), figures.empty_model()
    before = model.detect_objects(*output, 0.2, 1., 200)
    after = model.detect_objects(*output, 0.2, 0.5, 200)
    assert len(before[0][0]) > 5 * len(boxes)
    assert sorted(after[1][0].tolist()) == sorted(labels.tolist())


def test_the_eleven_points_average_to_the_ap():
    judged = figures.made_up_detections()
    recall, precision, points = figures.precisions_at_recalls(*judged)
    assert len(points) == 11
    assert sum(points) / 11 == pytest.approx(average_precision(*judged), abs=1e-6)
    assert recall == sorted(recall)
    assert 0 < min(precision) < max(precision) == 1
