"""Average precision: which detections are right, and one number a class that says how many.

By falling score, each detection is judged right, wrong, or neither. Going down that list, recall is
the share of the objects found so far, precision the share of the detections that are right.
Average precision is one number for that curve, and there are three rules:

* `voc07`, of the VOC 2007 devkit: the mean precision at recall 0, 0.1, ..., 1. What "VOC07 mAP"
  in papers means.
* `area`, of the devkits from 2010 on: the area under the curve. About a point from the other.
* COCO's: `coco_average_precision()`.

A class without objects has no average precision (NaN), and no part in a mean.

Letters: D detections, T objects ("true"), of all images.
"""

import contextlib
import io
import math
from typing import NamedTuple

import numpy as np
import torch
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from utils import find_jaccard_overlap

RULES = ('voc07', 'area')


class Detections(NamedTuple):
    """What was found in all images. Of two with the same score the first counts as the better."""

    image: torch.Tensor     # (D,) int64, the number of the image
    boxes: torch.Tensor     # (D, 4), corners in any unit, the same as the objects'
    labels: torch.Tensor    # (D,) int64
    scores: torch.Tensor    # (D,)


class Objects(NamedTuple):
    """What there is to be found in all images."""

    image: torch.Tensor     # (T,) int64, the number of the image, rising
    boxes: torch.Tensor     # (T, 4)
    labels: torch.Tensor    # (T,) int64
    difficult: torch.Tensor  # (T,) bool


class Judged(NamedTuple):
    """The detections of one class, by falling score; an ignored one is neither right nor wrong."""

    rows: torch.Tensor      # (d,) int64, which of all detections
    scores: torch.Tensor    # (d,)
    correct: torch.Tensor   # (d,) bool
    wrong: torch.Tensor     # (d,) bool
    match: torch.Tensor     # (d,) int64, which of all objects it overlaps by half, or -1
    n_objects: int          # that count
    n_difficult: int        # that do not


# --------------------------------------------------------------------------------------------------
# VOC's rules
#
# VOCevaldet.m and VOCap.m of the devkits, for all images of a class at once.
# --------------------------------------------------------------------------------------------------


def calculate_mAP(det_boxes, det_labels, det_scores, true_boxes, true_labels, true_difficulties,
                  label_map, rule='voc07'):
    """Average precision of each class and their mean, by a rule of VOC.

    Args:
        det_boxes, det_labels, det_scores: lists of a tensor an image: (n, 4), (n,), (n,).
        true_boxes, true_labels, true_difficulties: the same for objects: (O, 4), (O,), (O,).
            Boxes are corners in any unit, the same for both.
        label_map: class names to numbers, background 0.
        rule: 'voc07' or 'area'.

    Returns:
        {class name: AP}, NaN for a class without objects (difficult ones do not count), and the
        mean of those that are not NaN; NaN if there is none.
    """
    lists = (det_boxes, det_labels, det_scores, true_boxes, true_labels, true_difficulties)
    assert len({len(list_) for list_ in lists}) == 1, f'{[len(list_) for list_ in lists]} images'
    image, boxes = flatten_images(det_boxes, width=4)
    true_image, true_boxes = flatten_images(true_boxes, width=4)
    labels, scores, true_labels, difficult = (
        flatten_images(list_)[1] for list_ in (det_labels, det_scores, true_labels,
                                               true_difficulties))
    judged = judge_classes(Detections(image, boxes, labels, scores),
                           Objects(true_image, true_boxes, true_labels, difficult.bool()),
                           label_map)
    return average_precisions(judged, rule)


def flatten_images(tensors, width=None):
    """One tensor of all images' rows, on the CPU, and the number of each row's image."""
    counts = torch.tensor([len(tensor) for tensor in tensors], dtype=torch.long)
    shape = (-1,) if width is None else (-1, width)
    flat = torch.cat([tensor.detach().cpu().reshape(shape) for tensor in tensors]
                     or [torch.zeros(0).reshape(shape)])
    return torch.repeat_interleave(torch.arange(len(counts)), counts), flat


def judge_classes(detections, objects, label_map):
    """{class name: Judged} of all classes but the background."""
    judged = {}
    for name, label in label_map.items():
        if name == 'background':
            continue
        mine = (detections.labels == label).nonzero().flatten()
        scores, order = detections.scores[mine].sort(descending=True, stable=True)
        rows = mine[order]
        true_mine = (objects.labels == label).nonzero().flatten()
        difficult = objects.difficult[true_mine]
        correct, wrong, match = judge_detections(
            detections.image[rows], detections.boxes[rows],
            objects.image[true_mine], objects.boxes[true_mine], difficult)
        match = torch.cat([true_mine, true_mine.new_tensor([-1])])[match]
        n_difficult = int(difficult.sum())
        judged[name] = Judged(rows, scores, correct, wrong, match,
                              len(true_mine) - n_difficult, n_difficult)
    return judged


def judge_detections(image, boxes, true_image, true_boxes, difficult):
    """Which detections of one class are right and which are wrong.

    A detection looks at the object of its image that it overlaps most. From an overlap of 0.5 on
    it is ignored if that object is difficult, right if no better detection has it already, and
    wrong if one has. Below 0.5 it is wrong.

    Args:
        image, boxes: (D,), (D, 4), the detections by falling score.
        true_image, true_boxes, difficult: (T,), (T, 4), (T,), the objects, by image.

    Returns:
        correct and wrong, (D,) bool each; an ignored detection is neither. And the object that
        each looks at, (D,) int64, T where the overlap is below 0.5.
    """
    n_detections, n_objects = len(image), len(true_image)
    # Every pair of a detection and an object in the same image. Objects of an image are neighbours.
    first = torch.searchsorted(true_image, image)
    counts = torch.searchsorted(true_image, image, right=True) - first          # (D,)
    detection = torch.repeat_interleave(torch.arange(n_detections), counts)     # (pairs,)
    start = counts.cumsum(0) - counts
    object_ = torch.arange(len(detection)) - start[detection] + first[detection]

    # The corners in float64: an overlap of exactly 0.5 must not fall to rounding.
    overlap = find_jaccard_overlap(boxes.double()[detection].unsqueeze(1),
                                   true_boxes.double()[object_].unsqueeze(1)).flatten()
    best = torch.zeros(n_detections, dtype=torch.float64)
    best.scatter_reduce_(0, detection, overlap, 'amax')
    # Of several objects with the same overlap the first, as the devkit's loop finds it.
    number = torch.where(overlap == best[detection], object_, n_objects)
    match = torch.full((n_detections,), n_objects).scatter_reduce_(0, detection, number, 'amin')
    found = best >= 0.5
    match[~found] = n_objects

    rank = torch.arange(n_detections)
    winner = torch.full((n_objects + 1,), n_detections).scatter_reduce_(0, match, rank, 'amin')
    ignored = torch.cat([difficult, difficult.new_zeros(1)])[match]
    correct = found & ~ignored & (winner[match] == rank)
    return correct, ~correct & ~ignored, match


def average_precisions(judged, rule='voc07'):
    """({class name: AP}, their mean) of judged classes."""
    by_class = {name: average_precision(mine.correct, mine.wrong, mine.n_objects, rule)
                for name, mine in judged.items()}
    return by_class, mean_of_known(by_class.values())


def mean_of_known(numbers):
    """The mean of the numbers that are not NaN; NaN if there is none."""
    known = [number for number in numbers if not math.isnan(number)]
    return sum(known) / len(known) if known else math.nan


def average_precision(correct, wrong, n_objects, rule='voc07'):
    """Average precision of one class.

    The precision at a recall is the highest at that recall or above. Recalls are compared in whole
    numbers, since 3 / 10 and 0.3 need not be the same.

    Args:
        correct, wrong: (D,) bool, by falling score.
        n_objects: how many could be found.
        rule: 'voc07' or 'area'.
    """
    assert rule in RULES, f'rule is {rule!r}, none of {RULES}'
    if n_objects == 0:
        return math.nan
    n_correct, n_wrong = correct.cumsum(0), wrong.cumsum(0)
    precision = n_correct.double() / (n_correct + n_wrong).clamp(min=1)
    highest = precision.flip(0).cummax(0).values.flip(0) if len(precision) else precision
    if rule == 'area':
        # Each right detection is a step of 1 / n_objects to the right, under which the area lies.
        return (highest[correct].sum() / n_objects).item()
    highest = torch.cat([highest, highest.new_zeros(1)])    # 0 for a recall that is not reached
    reached = torch.searchsorted(10 * n_correct, n_objects * torch.arange(11))
    return highest[reached].mean().item()


def recall_from(judged, score):
    """The share of a class's objects that is found by detections of at least this score."""
    if judged.n_objects == 0:
        return math.nan
    # A detection is judged by better ones alone, so those below the score change nothing.
    return int((judged.correct & (judged.scores >= score)).sum()) / judged.n_objects


# --------------------------------------------------------------------------------------------------
# COCO's rule
#
# Average precision at overlaps of 0.5, 0.55, ..., 0.95, as the mean precision at 101 recalls. Done
# by COCO's own code, which takes its data from files or, as here, from dictionaries.
# --------------------------------------------------------------------------------------------------

COCO_DETECTIONS = 100   # of a class in an image; COCO looks at no more


def coco_average_precision(detections, objects, n_images, label_map):
    """COCO's average precision over all classes, for objects of any size.

    Difficult objects become COCO's ignored ones: a detection that finds one counts neither way.
    Other than by VOC's rule that goes for one detection of each, and a free object at any
    sufficient overlap comes first.

    Returns:
        {'0.5:0.95': AP, '0.5': AP, '0.75': AP}, means over the classes that have objects.
    """
    # pycocotools overwrites `ignore` with `iscrowd`, and a crowd's overlap is another one: without
    # the union. It also ignores objects whose area is in no range, and looks at no other area.
    area = torch.where(objects.difficult, -1, 1)
    truth = coco_data(objects, n_images, label_map, area=area, iscrowd=torch.zeros_like(area))
    found = coco_data(detections, n_images, label_map, area=torch.ones_like(detections.labels),
                      score=detections.scores)
    with contextlib.redirect_stdout(io.StringIO()):  # it prints at every step
        for data in (truth, found):
            data.createIndex()
        run = COCOeval(truth, found, 'bbox')
        run.params.areaRng, run.params.areaRngLbl = [[0, 1e10]], ['all']
        run.params.maxDets = [COCO_DETECTIONS]
        run.evaluate()
        run.accumulate()
    precision = run.eval['precision'][..., 0, 0]    # (10 overlaps, 101 recalls, classes)
    known = precision[:, :, (precision > -1).all(axis=(0, 1))]
    at_overlap = known.mean(axis=(1, 2)) if known.size else np.full(10, math.nan)
    return {'0.5:0.95': float(at_overlap.mean()), '0.5': float(at_overlap[0]),
            '0.75': float(at_overlap[5])}


def coco_data(rows, n_images, label_map, **more):
    """A COCO data set of detections or objects, with more columns: {name: (rows,)}."""
    x_min, y_min, x_max, y_max = rows.boxes.double().unbind(1)
    boxes = torch.stack([x_min, y_min, (x_max - x_min).clamp(min=0), (y_max - y_min).clamp(min=0)],
                        dim=1)
    columns = {'image_id': rows.image, 'category_id': rows.labels, 'bbox': boxes, **more}
    data = COCO()
    data.dataset = {
        'images': [{'id': i} for i in range(n_images)],
        'categories': [{'id': label} for name, label in label_map.items() if name != 'background'],
        # Numbered from 1: 0 means "not matched" there.
        'annotations': [dict(zip(('id', *columns), values)) for values in zip(
            range(1, len(boxes) + 1), *(column.tolist() for column in columns.values()))],
    }
    return data
