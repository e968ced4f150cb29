"""Tests of tools/figures.py, which draws the pictures of the README."""

import math

import pytest
import torch
from PIL import Image, ImageColor
from torchvision.ops import box_iou

from model import FEATURE_MAPS, create_prior_boxes
from support.training_log import COLUMNS, write_log
from tools import canvas, figures
from tools.example import load_example
from utils import average_precision, cxcy_to_xy, transform

NAMES = {'example', 'network', 'overlap', 'fc_to_conv', 'priors_of_a_cell', 'priors_of_a_map',
         'offsets', 'matching', 'hard_negatives', 'nms', 'augmentation', 'learning_rate',
         'precision_recall', 'training_curves'}


def read_all(folder):
    """Read the bytes of each picture of a folder, by name."""
    return {path.stem: path.read_bytes() for path in folder.glob('*.png')}


@pytest.fixture(scope='module')
def drawn(tmp_path_factory):
    """The folder of all pictures, drawn with an example log."""
    folder = tmp_path_factory.mktemp('figures')
    rows = [dict.fromkeys(COLUMNS, 0.1) | {
        'iteration': 10 * i, 'loss': 20 / i, 'classes': 15 / i, 'boxes': 5 / i, 'skipped': 0,
        'mAP': 0.5 + i / 50 if i % 4 == 0 else math.nan} for i in range(1, 17)]
    write_log(folder / 'log.csv', rows)
    figures.main(figures.Parameters(output_folder=str(folder), log=str(folder / 'log.csv')))
    return folder


@pytest.mark.parametrize('subfolder, colors', [('', canvas.LIGHT), ('dark', canvas.DARK)])
def test_all_pictures_are_drawn_small_on_the_paper_of_their_page(drawn, subfolder, colors):
    pictures = read_all(drawn / subfolder)
    assert set(pictures) == NAMES
    for name, content in pictures.items():
        assert len(content) < 100_000, f'{name}: {len(content)} bytes'
        with Image.open(drawn / subfolder / f'{name}.png') as image:
            assert image.width == canvas.WIDTH * canvas.DPI, name
            assert 350 < image.height < 1200, name
            assert not image.has_transparency_data, name
            assert not image.info.keys() & {'Software', 'Creation Time'}, name
            # The border has the color of the paper all around: nothing is cut off.
            rgb, paper = image.convert('RGB'), ImageColor.getrgb(colors.paper)
            for edge in ((0, 0, rgb.width, 1), (0, 0, 1, rgb.height),
                         (0, rgb.height - 1, rgb.width, rgb.height),
                         (rgb.width - 1, 0, rgb.width, rgb.height)):
                assert {color for _, color in rgb.crop(edge).getcolors()} == {paper}, name


def test_same_bytes_are_drawn_again(drawn, tmp_path):
    figures.draw_all(figures.PICTURES, canvas.LIGHT, tmp_path)
    first = read_all(drawn)
    assert read_all(tmp_path) == {name: first[name] for name in figures.PICTURES}


def test_curves_need_a_log(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(figures, 'PICTURES', {})
    figures.main(figures.Parameters(output_folder=str(tmp_path), log=str(tmp_path / 'none.csv')))
    assert 'training_curves.png is left out' in capsys.readouterr().out
    assert not read_all(tmp_path)


def test_shapes_of_the_feature_maps_are_those_of_the_table():
    assert figures.feature_map_shapes() == [
        (feature_map.channels, feature_map.size, feature_map.size) for feature_map in FEATURE_MAPS]
    assert figures.count_rows() == [5776, 2166, 600, 150, 36, 4]
    assert [figures.name_map(prior) for prior in (0, 5775, 5776, 8731)] == [
        'conv4_3', 'conv4_3', 'conv7', 'conv11_2']


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


def test_drawn_matches_reach_the_threshold_and_contested_priors_go_to_the_better_star():
    _, boxes, labels, _ = load_example()
    matched, overlap, true_classes = figures.match(boxes, labels)
    assert torch.equal(matched.any(dim=0), true_classes > 0)
    expected = box_iou(boxes, cxcy_to_xy(create_prior_boxes()))
    assert torch.allclose(overlap, expected, atol=1e-5)
    assert torch.equal(matched.sum(dim=0) > 0, (expected >= 0.5).any(dim=0))
    assert torch.equal(expected.argmax(dim=0)[matched.any(dim=0)],
                       matched.int().argmax(dim=0)[matched.any(dim=0)])
    assert int((expected >= 0.5).all(dim=0).sum()) == 0
    stars = expected[[figures.STAR_BEHIND, figures.STAR]]
    assert int((stars >= 0.5).all(dim=0).sum()) >= 4     # as many are drawn


def test_steps_of_the_augmentation_are_those_of_training():
    image, objects = figures.draw_example()
    tensors = figures.to_tensors(objects)
    original, boxes = figures.augment(image, tensors)
    expected, expected_boxes, _, _ = transform(image, *tensors, 'TEST')
    assert original.tobytes() == expected.permute(1, 2, 0).numpy().tobytes()
    assert torch.allclose(boxes, expected_boxes)
    mirrored, boxes = figures.augment(image, tensors, mirror=True)
    assert mirrored.transpose(Image.Transpose.FLIP_LEFT_RIGHT) == original
    assert torch.allclose(boxes[:, 0], 1 - expected_boxes[:, 2])


def test_suppression_leaves_one_box_of_the_two_stars():
    before = figures.detect_in_example(max_overlap=1.)
    boxes, labels, _ = figures.detect_in_example(max_overlap=0.5)
    assert len(before[0]) > 10 * len(boxes)
    _, true_boxes, true_labels, difficult = load_example()
    overlap, obj = box_iou(boxes, true_boxes).max(dim=1)
    assert (overlap > 0.5).all() and torch.equal(labels, true_labels[obj])
    assert sorted(obj.tolist()) == (~difficult).nonzero().flatten().tolist()


def test_mean_of_the_eleven_points_is_the_ap():
    matches = figures.MATCHES
    recall, precision, points = figures.precision_recall_points(*matches)
    assert len(points) == 11
    assert sum(points) / 11 == pytest.approx(average_precision(*matches), abs=1e-6)
    assert recall == sorted(recall)
    assert 0 < min(precision) < max(precision) == 1
