"""Tests of tools/figures.py, which draws the pictures of the README."""

import hashlib
import math

import pytest
import torch
from PIL import Image
from torchvision.ops import box_iou

from model import FEATURE_MAPS, create_prior_boxes
from support.training_log import COLUMNS, write_log
from tools import figures
from utils import average_precision, cxcy_to_xy

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
    """The folder of all pictures, drawn with an example log, and their hashes."""
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
            # The border has the background color all around: nothing is cut off.
            rgb = image.convert('RGB')
            assert {rgb.getpixel((x, y)) for x in (0, rgb.width - 1) for y in range(rgb.height)
                    } == {rgb.getpixel((0, 0))}, name
            assert {rgb.getpixel((x, y)) for y in (0, rgb.height - 1) for x in range(rgb.width)
                    } == {rgb.getpixel((0, 0))}, name


def test_same_bytes_are_drawn_again_and_curves_need_a_log(drawn, tmp_path, capsys):
    _, hashes = drawn
    again = draw_all(tmp_path, tmp_path / 'none.csv')
    assert 'training_curves.png is left out' in capsys.readouterr().out
    assert again == {name: digest for name, digest in hashes.items() if name != 'training_curves'}


def test_shapes_of_the_feature_maps_are_those_of_the_table():
    assert figures.feature_map_shapes() == [
        (feature_map.channels, feature_map.size, feature_map.size) for feature_map in FEATURE_MAPS]
    assert figures.count_rows() == [5776, 2166, 600, 150, 36, 4]


def test_priors_of_a_feature_map_and_their_names():
    priors = [figures.select_priors(feature_map.name).reshape(-1, 4)
              for feature_map in FEATURE_MAPS]
    assert torch.equal(torch.cat(priors), create_prior_boxes())
    assert figures.select_priors('conv9_2').shape == (5, 5, 6, 4)
    names = figures.name_ratios(FEATURE_MAPS[3])
    assert names == ['1 : 1', '1 : 1, additional', '2 : 1', '3 : 1', '1 : 2', '1 : 3']
    for name, (_, _, width, height) in zip(names, figures.select_priors('conv9_2')[2, 2].tolist()):
        numerator, denominator = name.removesuffix(', additional').split(' : ')
        assert width / height == pytest.approx(int(numerator) / int(denominator))


def test_offsets_are_scaled_as_in_the_code():
    prior, box = torch.tensor([0.5, 0.5, 0.2, 0.4]), torch.tensor([0.6, 0.4, 0.4, 0.2])
    unscaled, factors, locs = figures.explain_offsets(box, prior)
    assert unscaled == pytest.approx([0.5, -0.25, math.log(2), -math.log(2)], abs=1e-5)
    assert factors == pytest.approx([10, 10, 5, 5], rel=1e-4)
    assert locs == pytest.approx([u * f for u, f in zip(unscaled, factors)], abs=1e-5)


def test_drawn_matches_reach_the_threshold_or_are_the_best_prior():
    _, boxes, labels = figures.make_example(431)
    matched, highest, true_classes = figures.match(boxes, labels)
    assert (highest < 0.5).sum() == 1
    assert torch.equal(matched.any(dim=0), true_classes > 0)
    overlap = box_iou(boxes, cxcy_to_xy(create_prior_boxes()))
    for label, priors, overlaps, best in zip(labels, matched, overlap, highest.tolist()):
        assert overlaps[priors].max().item() == pytest.approx(best, abs=1e-5)
        assert overlaps.max().item() == pytest.approx(best, abs=1e-5)
        assert priors.sum() == 1 if best < 0.5 else overlaps[priors].min() >= 0.5 - 1e-5
        assert (true_classes[priors] == label).all()


def test_suppression_keeps_one_box_per_object():
    _, boxes, labels = figures.make_example(7)
    output, model = figures.simulate_output(boxes, labels), figures.make_meta_model()
    before = model.detect_objects(*output, 0.2, 1., 200)
    after = model.detect_objects(*output, 0.2, 0.5, 200)
    assert len(before[0][0]) > 5 * len(boxes)
    assert sorted(after[1][0].tolist()) == sorted(labels.tolist())


def test_mean_of_the_eleven_points_is_the_ap():
    matches = figures.simulate_matches()
    recall, precision, points = figures.precision_recall_points(*matches)
    assert len(points) == 11
    assert sum(points) / 11 == pytest.approx(average_precision(*matches), abs=1e-6)
    assert recall == sorted(recall)
    assert 0 < min(precision) < max(precision) == 1
