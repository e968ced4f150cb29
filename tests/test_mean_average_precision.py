"""Tests of mean average precision, section 7 of utils.py, against the VOC devkit's loops."""

import math
import random

import pytest
import torch

import utils
from reference import jaccard_overlap

LABEL_MAP = {'background': 0, 'a': 1, 'b': 2, 'c': 3}
CAT_MAP = {'background': 0, 'cat': 1}


def devkit_curve(detections, objects):
    """Transcribe VOCevaldet.m as loops, for one class.

    Args:
        detections: [(score, image, box)].
        objects: {image: [(box, difficult)]}.

    Returns:
        [(true positives, precision)] after each detection, and the number of objects.
    """
    n_objects = sum(not difficult for there in objects.values() for _, difficult in there)
    n_true, n_false, detected, points = 0, 0, set(), []
    for _, image, box in sorted(detections, key=lambda detection: -detection[0]):
        highest, best = -math.inf, None
        for number, (true_box, _) in enumerate(objects.get(image, [])):
            if jaccard_overlap(box, true_box) > highest:
                highest, best = jaccard_overlap(box, true_box), number
        if highest >= 0.5 and objects[image][best][1]:
            pass
        elif highest >= 0.5 and (image, best) not in detected:
            detected.add((image, best))
            n_true += 1
        else:
            n_false += 1
        points.append((n_true, n_true / max(1, n_true + n_false)))
    return points, n_objects


def devkit_voc07(points, n_objects):
    """Transcribe the devkit of 2007: mean over the recalls 0, 0.1, ..., 1."""
    return sum(max((precision for n_true, precision in points if 10 * n_true >= k * n_objects),
                   default=0) for k in range(11)) / 11


def devkit_area(points, n_objects):
    """Transcribe VOCap.m of the devkits from 2010 on."""
    recall = [0, *(n_true / n_objects for n_true, _ in points), 1]
    precision = [0, *(precision for _, precision in points), 0]
    for i in range(len(precision) - 2, -1, -1):
        precision[i] = max(precision[i], precision[i + 1])
    return sum((recall[i] - recall[i - 1]) * precision[i] for i in range(1, len(recall)))


def devkit_aps(case, label_map):
    """The devkit's {rule: {class name: AP}}, from the arguments of `calculate_mAP`."""
    detections = {label: [] for label in label_map.values()}
    objects = {label: {} for label in label_map.values()}
    for image, columns in enumerate(zip(*case)):
        det_boxes, det_labels, det_scores, *truth = (column.tolist() for column in columns)
        for box, label, score in zip(det_boxes, det_labels, det_scores):
            detections[label].append((score, image, box))
        for box, label, difficult in zip(*truth):
            objects[label].setdefault(image, []).append((box, difficult))
    curves = {name: devkit_curve(detections[label], objects[label])
              for name, label in label_map.items() if name != 'background'}
    return {rule: {name: average_precision(*curve) if curve[1] else math.nan
                   for name, curve in curves.items()}
            for rule, average_precision in (('voc07', devkit_voc07), ('area', devkit_area))}


def random_case(n_images, n_classes):
    """Arguments of `calculate_mAP` with ties, duplicates, difficult objects and empty images."""
    def grid_boxes(n, cells=8):
        """Boxes (n, 4) of small whole numbers: ties and an IoU of exactly 0.5 are common."""
        low = torch.randint(0, cells, (n, 2))
        return torch.cat([low, low + torch.randint(1, cells, (n, 2))], dim=1).float()

    case = [[] for _ in range(6)]
    for _ in range(n_images):
        n_objects, n_detections = random.choice([0, 1, 3, 6]), random.choice([0, 2, 8])
        true_boxes, det_boxes = grid_boxes(n_objects), grid_boxes(n_detections)
        if n_objects:
            det_boxes = true_boxes[torch.randint(0, n_objects, (n_detections,))]
        det_boxes = det_boxes + torch.randint(0, 2, det_boxes.shape) * torch.tensor([-1, -1, 1, 1])
        image = (det_boxes, torch.randint(1, n_classes, (n_detections,)),
                 torch.randint(0, 10, (n_detections,)) / 10,
                 true_boxes, torch.randint(1, n_classes, (n_objects,)),
                 torch.rand(n_objects) < 0.3)
        for tensors, tensor in zip(case, image):
            tensors.append(tensor)
    return case


def assert_same_aps(got, expected):
    assert got.keys() == expected.keys()
    assert list(got.values()) == pytest.approx(list(expected.values()), abs=1e-9, nan_ok=True)


def assert_equals_devkit(case, label_map):
    """Compare `calculate_mAP` by both rules; returns the APs that are not NaN."""
    numbers = []
    for rule, expected in devkit_aps(case, label_map).items():
        aps, mAP = utils.calculate_mAP(*case, label_map, rule)
        assert_same_aps(aps, expected)
        numbers = [ap for ap in expected.values() if not math.isnan(ap)]
        mean = sum(numbers) / len(numbers) if numbers else math.nan
        assert mAP == pytest.approx(mean, nan_ok=True)
    return numbers


def test_map_equals_the_devkits():
    seen = []
    for number in range(150):
        random.seed(number)
        case = random_case(n_images=20 if number % 8 == 7 else number % 8, n_classes=4)
        seen += assert_equals_devkit(case, LABEL_MAP)
    assert len({round(ap, 3) for ap in seen}) > 30  # the cases are not all alike


def cat_ap(detections, objects, n_images=1):
    """AP of 'cat' for detections (image, box, score) and objects (image, box[, difficult])."""
    def lists(rows, column, shape, dtype):
        return [torch.tensor([row[column] for row in rows if row[0] == i], dtype=dtype).view(shape)
                for i in range(n_images)]
    objects = [(*row, False)[:3] for row in objects]
    det_boxes = lists(detections, 1, (-1, 4), torch.float32)
    true_boxes = lists(objects, 1, (-1, 4), torch.float32)
    aps, mAP = utils.calculate_mAP(
        det_boxes, [torch.ones(len(boxes), dtype=torch.int64) for boxes in det_boxes],
        lists(detections, 2, -1, torch.float32), true_boxes,
        [torch.ones(len(boxes), dtype=torch.int64) for boxes in true_boxes],
        lists(objects, 2, -1, torch.bool), CAT_MAP)
    assert mAP == pytest.approx(aps['cat'], nan_ok=True)
    return aps['cat']


@pytest.mark.parametrize('outcomes, n_objects, ap', [
    ('', 1, 0),
    ('T', 1, 1),
    ('F', 1, 0),
    ('TFFF', 1, 1),                            # false positives after full recall cost nothing
    ('FT', 1, 1 / 2),
    ('T', 2, 6 / 11),                          # recall 0 to 0.5
    ('TFT', 2, (6 + 5 * 2 / 3) / 11),
    ('TXT', 2, (6 + 5 * 2 / 3) / 11),          # a second detection of an object: false positive
    ('TDT', 2, 1),                             # a detection of a difficult object is ignored
    ('DDD', 1, 0),
    ('FTT', 2, 2 / 3),                         # precision 0, 1/2, 2/3: the highest counts
    ('TFTF', 3, (4 + 3 * 2 / 3) / 11),         # recall 1/3 reaches 0.3, 2/3 reaches 0.6
    *[('T' * n, 10, (n + 1) / 11) for n in range(1, 11)],   # recall of exactly n tenths
    ('FTTT', 10, 4 * 0.75 / 11),
    ('T' * 6, 20, 4 / 11),                     # 6 of 20 is 0.3, too
])
def test_average_precision_by_hand(outcomes, n_objects, ap):
    # Objects stand in a row; a detection has the next one (T), the last one again (X), a difficult
    # one (D) or none (F).
    row = [(0, (20. * i, 0., 20. * i + 10, 10.)) for i in range(n_objects)]
    difficult = (0, (0., 50., 10., 60.), True)
    nowhere, detections, n_detected = (0., 900., 10., 910.), [], 0
    for step, outcome in enumerate(outcomes):
        n_detected += outcome == 'T'
        box = {'F': nowhere, 'D': difficult[1]}.get(outcome) or row[n_detected - 1][1]
        detections.append((0, box, 0.9 - 0.01 * step))
    assert cat_ap(detections, [*row, difficult]) == pytest.approx(ap)


def test_iou_of_exactly_half_is_a_match():
    objects = [(0, (0., 0., 10., 10.))]
    assert cat_ap([(0, (0., 0., 10., 5.), 0.9)], objects) == 1
    assert cat_ap([(0, (0., 0., 10., 4.99), 0.9)], objects) == 0
    thirds = torch.tensor([[1., 1., 2., 3.], [1., 1., 2., 2.]]) / 3 - torch.tensor(1 / 3)
    assert cat_ap([(0, thirds[1].tolist(), 0.9)], [(0, thirds[0].tolist())]) == 1


def test_detection_is_assigned_to_the_object_with_the_highest_iou_only():
    easy, other = (0., 0., 10., 10.), (0., 0., 10., 12.)
    nearer_other = (0, (0., 0., 10., 11.5), 0.9)
    # That object is difficult: the detection is ignored, and the easy object is missed.
    assert cat_ap([nearer_other], [(0, easy), (0, other, True)]) == 0
    assert cat_ap([nearer_other, (0, easy, 0.5)], [(0, easy), (0, other, True)]) == 1
    # That object is already detected: false positive. Recall 1/2 at precision 1.
    duplicate = (0, (0., 0., 10., 11.6), 0.8)
    assert cat_ap([nearer_other, duplicate], [(0, easy), (0, other)]) == pytest.approx(6 / 11)
    # Of two objects with the same IoU, the first one.
    between = (0, (0., 0., 10., 10.), 0.9)
    twins = (0., 0., 10., 8.), (0., 2., 10., 10.)
    assert cat_ap([between], [(0, twins[0], True), (0, twins[1])]) == 0
    assert cat_ap([between], [(0, twins[0]), (0, twins[1], True)]) == 1


def test_equal_scores_keep_their_order():
    box, nowhere = (0., 0., 10., 10.), (50., 50., 60., 60.)
    objects = [(1, box)]
    assert cat_ap([(0, nowhere, 0.5), (1, box, 0.5)], objects, 2) == 0.5
    assert cat_ap([(1, box, 0.5), (2, nowhere, 0.5)], objects, 3) == 1
    many = [(0, nowhere, 0.5)] * 20 + [(0, box, 0.5)]  # an unstable sort shuffles these
    assert cat_ap(many, [(0, box)]) == pytest.approx(1 / 21)


def test_detections_in_images_without_objects_are_false_positives():
    box = (0., 0., 10., 10.)
    assert cat_ap([(0, box, 0.9), (1, box, 0.8)], [(1, box)], 2) == 0.5
    assert cat_ap([(0, box, 0.9), (1, box, 0.8)], [(1, box), (0, box, True)], 2) == 1


def test_class_without_objects_has_no_ap_and_no_part_in_the_mean():
    box = torch.tensor([[0., 0., 1., 1.]])
    label_map = {'background': 0, 'detected': 1, 'difficult': 2, 'absent': 3, 'missed': 4}
    case = ([box.repeat(3, 1)], [torch.tensor([1, 2, 3])], [torch.tensor([0.9, 0.8, 0.7])],
            [box.repeat(3, 1)], [torch.tensor([1, 2, 4])], [torch.tensor([False, True, False])])
    aps, mAP = utils.calculate_mAP(*case, label_map)
    assert_same_aps(aps, {'detected': 1, 'difficult': math.nan, 'absent': math.nan, 'missed': 0})
    assert mAP == 0.5 and isinstance(mAP, float)


@pytest.mark.parametrize('dtype', [torch.bool, torch.uint8, torch.int64])
def test_difficulties_of_any_type(dtype):
    boxes = torch.tensor([[0., 0., 1., 1.], [2., 2., 3., 3.]])
    labels, scores = torch.ones(2, dtype=torch.int64), torch.tensor([0.9, 0.8])
    difficulties = torch.tensor([1, 0]).to(dtype)
    aps, _ = utils.calculate_mAP([boxes], [labels], [scores], [boxes], [labels], [difficulties],
                                 CAT_MAP)
    assert aps == {'cat': 1.}


@pytest.mark.parametrize('n_images', [0, 1, 3])
def test_no_detections_and_no_objects(n_images):
    def lists(shape, dtype=torch.float32):
        return [torch.zeros(shape, dtype=dtype) for _ in range(n_images)]
    detections = (lists((0, 4)), lists(0, torch.int64), lists(0))
    ground_truth = (lists((0, 4)), lists(0, torch.int64), lists(0, torch.bool))
    aps, mAP = utils.calculate_mAP(*detections, *ground_truth, CAT_MAP)
    assert math.isnan(aps['cat']) and math.isnan(mAP)
    aps, mAP = utils.calculate_mAP(*detections, *ground_truth, {'background': 0})
    assert aps == {} and math.isnan(mAP)
    # One more image with an object, and still no detection.
    image = (torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64), torch.zeros(0),
             torch.tensor([[0., 0., 1., 1.]]), torch.tensor([1]), torch.tensor([False]))
    case = [[*tensors, tensor] for tensors, tensor in zip((*detections, *ground_truth), image)]
    assert utils.calculate_mAP(*case, CAT_MAP) == ({'cat': 0.}, 0.)


def test_lists_of_unequal_length_are_an_error():
    with pytest.raises(AssertionError, match='1'):
        utils.calculate_mAP([torch.zeros(0, 4)], [], [], [], [], [], CAT_MAP)


def test_unknown_rule_is_an_error():
    with pytest.raises(AssertionError, match='voc12'):
        utils.average_precision(torch.zeros(1).bool(), torch.ones(1).bool(), 1, 'voc12')


def test_map_depends_neither_on_the_unit_nor_on_the_order_of_images_and_edits_nothing():
    random.seed(1)
    case = random_case(30, 3)
    n_detections = [len(scores) for scores in case[2]]
    case[2] = list(torch.rand(sum(n_detections)).split(n_detections))   # no ties
    before = [[tensor.clone() for tensor in tensors] for tensors in case]
    aps, _ = utils.calculate_mAP(*case, LABEL_MAP)
    assert all(torch.equal(a, b) for tensors, old in zip(case, before)
               for a, b in zip(tensors, old))
    order = torch.randperm(30).tolist()
    shuffled = [[tensors[i] for i in order] for tensors in case]
    assert_same_aps(utils.calculate_mAP(*shuffled, LABEL_MAP)[0], aps)
    for column in (0, 3):
        case[column] = [boxes / 8 for boxes in case[column]]
    assert_same_aps(utils.calculate_mAP(*case, LABEL_MAP)[0], aps)


def test_matches_are_numbered_through_all_images():
    box, nowhere = torch.tensor([[0., 0., 9., 9.]]), torch.tensor([[50., 50., 60., 60.]])
    detections = utils.Detections(
        [torch.cat([box, box]), torch.cat([nowhere, box, box])],
        [torch.tensor([1, 2]), torch.tensor([1, 1, 1])],
        [torch.tensor([0.3, 0.4]), torch.tensor([0.9, 0.8, 0.7])])
    ground_truth = utils.GroundTruth([box, torch.cat([nowhere, box])],
                                     [torch.tensor([1]), torch.tensor([2, 1])],
                                     [torch.tensor([True]), torch.tensor([False, False])])
    match = utils.match_classes(detections, ground_truth, LABEL_MAP)['a']
    assert match.detection.tolist() == [2, 3, 4, 0]     # by falling score
    assert match.score.tolist() == pytest.approx([0.9, 0.8, 0.7, 0.3])
    assert match.true_positive.tolist() == [False, True, False, False]
    assert match.false_positive.tolist() == [True, False, True, False]
    assert match.assigned.tolist() == [-1, 2, 2, 0]
    assert (match.n_objects, match.n_difficult) == (1, 1)


def random_detections(boxes, labels, per_object=2):
    """Detections near the objects of each image, some of them of another class."""
    case = [[], [], []]
    for box, label in zip(boxes, labels):
        size = (box[:, 2:] - box[:, :2]).repeat(per_object, 2)
        case[0].append(box.repeat(per_object, 1) + torch.randn(len(size), 4) * size * 0.12)
        other = torch.randint(1, 21, (len(size),))
        case[1].append(torch.where(torch.rand(len(size)) < 0.2, other, label.repeat(per_object)))
        case[2].append(torch.rand(len(size)))
    return case


def test_map_on_the_objects_of_voc_2007(sample_data):
    boxes, labels = [], []
    for line in (sample_data / 'voc07-test-boxes.txt').read_text().splitlines():
        numbers = torch.tensor([float(number) for number in line.split()[1:]]).view(-1, 5)
        boxes.append(numbers[:, :4] - torch.tensor([1., 1., 0., 0.]))
        labels.append(numbers[:, 4].long() + 1)
    ones, easy = [torch.ones(len(l)) for l in labels], [torch.zeros(len(l)) for l in labels]
    assert sum(map(len, boxes)) == 12031
    aps, mAP = utils.calculate_mAP(boxes, labels, ones, boxes, labels, easy, utils.label_map)
    assert set(aps.values()) == {1.} and mAP == 1
    # Against the devkit's loops for a part of the images.
    boxes, labels = boxes[:1000], labels[:1000]
    difficult = [torch.rand(len(l)) < 0.2 for l in labels]
    case = [*random_detections(boxes, labels), boxes, labels, difficult]
    aps = assert_equals_devkit(case, utils.label_map)
    assert 0.2 < sum(aps) / 20 < 0.8
