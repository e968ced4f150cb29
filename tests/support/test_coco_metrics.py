"""Tests of support/coco_metrics.py, against a slow version of COCO's rule."""

import math

import numpy as np
import pytest
import torch

from reference import jaccard_overlap
from support.coco_metrics import coco_average_precision
from utils import Detections, GroundTruth

LABEL_MAP = {'background': 0, 'cat': 1, 'dog': 2, 'owl': 3}


def random_case(n_images, n_detections=6, n_objects=3):
    """Cats and dogs on whole pixels, with ties, duplicates and difficult objects."""
    low = torch.randint(0, 8, (n_images, n_objects, 2))
    boxes = torch.cat([low, low + torch.randint(1, 8, low.shape)], dim=2).double()
    labels = torch.randint(1, 3, (n_images, n_objects))
    ground_truth = GroundTruth(list(boxes), list(labels),
                               list(torch.rand(n_images, n_objects) < 0.3))
    detections = Detections([], [], [])
    for image in range(n_images):
        near = torch.randint(0, n_objects, (n_detections,))
        shift = torch.randint(0, 2, (n_detections, 4)) * torch.tensor([-1, -1, 1, 1])
        other = torch.randint(1, 3, (n_detections,))
        detections.boxes.append(boxes[image, near] + shift)
        detections.labels.append(torch.where(torch.rand(n_detections) < 0.8,
                                             labels[image, near], other))
        detections.scores.append(torch.randint(0, 10, (n_detections,)) / 10)
    return detections, ground_truth


def slow_average_precision(detections, ground_truth, label, threshold):
    """COCO's AP of one class at one IoU threshold, as loops."""
    outcomes = []   # score, whether a match, whether ignored
    for *detected, true_boxes, true_labels, difficulties in zip(*detections, *ground_truth):
        objects = [{'box': box, 'ignored': difficult, 'free': True}
                   for box, true_label, difficult in zip(
                       true_boxes.tolist(), true_labels.tolist(), difficulties.tolist())
                   if true_label == label]
        rows = [(score, box) for box, det_label, score in zip(
            *(column.tolist() for column in detected)) if det_label == label]
        for score, box in sorted(rows, key=lambda row: -row[0])[:100]:
            free = [o for o in objects if o['free'] and jaccard_overlap(box, o['box']) >= threshold]
            # Of equal IoUs COCO takes the last, and an ignored object only if no other is free.
            free = [o for o in free if not o['ignored']] or free
            match = max(reversed(free), key=lambda o: jaccard_overlap(box, o['box']), default=None)
            if match:
                match['free'] = False
            outcomes.append((score, match is not None, match is not None and match['ignored']))
    outcomes = [row for row in sorted(outcomes, key=lambda row: -row[0]) if not row[2]]
    n_objects = sum(int(((labels == label) & ~difficult).sum()) for labels, difficult in zip(
        ground_truth.labels, ground_truth.difficulties))
    n_true, points = 0, []
    for number, (_, is_match, _) in enumerate(outcomes, 1):
        n_true += is_match
        points.append((n_true / n_objects, n_true / number))
    # COCO compares recalls in floating point, so 0.29 may be more than 29 of 100.
    return sum(max((precision for recall, precision in points if recall >= at), default=0)
               for at in np.linspace(0, 1, 101)) / 101


def test_coco_ap_equals_the_slow_version():
    for _ in range(3):
        detections, ground_truth = random_case(6)
        got = coco_average_precision(detections, ground_truth, LABEL_MAP)
        # Owls have no objects, and so no part in the mean.
        expected = [sum(slow_average_precision(detections, ground_truth, label, threshold)
                        for label in (1, 2)) / 2 for threshold in np.linspace(0.5, 0.95, 10)]
        assert got == pytest.approx({'AP 0.5:0.95': sum(expected) / 10, 'AP 0.5': expected[0],
                                     'AP 0.75': expected[5]}, abs=1e-6)


def test_coco_ignores_difficult_objects(capsys):
    ground_truth = GroundTruth([torch.tensor([[0., 0, 10, 10], [20, 0, 30, 10]])],
                               [torch.tensor([1, 1])], [torch.tensor([False, True])])
    # First a detection of the difficult object, then one with an IoU of 0.8.
    detections = Detections([torch.tensor([[20., 0, 30, 10], [0, 0, 10, 8]])],
                            [torch.tensor([1, 1])], [torch.tensor([0.9, 0.8])])
    got = coco_average_precision(detections, ground_truth, LABEL_MAP)
    # Of ten thresholds 0.5, ..., 0.8 are reached.
    assert got == pytest.approx({'AP 0.5:0.95': 0.7, 'AP 0.5': 1, 'AP 0.75': 1})
    nothing = Detections(*([tensors[0][:0]] for tensors in detections))
    assert coco_average_precision(nothing, ground_truth, LABEL_MAP)['AP 0.5'] == 0
    absent = GroundTruth(*([tensors[0][:0]] for tensors in ground_truth))
    assert math.isnan(coco_average_precision(detections, absent, LABEL_MAP)['AP 0.5'])
    assert capsys.readouterr().out == ''    # pycocotools prints
