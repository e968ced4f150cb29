"""Tests of the mean average precision of utils.py, section 7.

The rule is subtle, so a slow and obvious version of the devkit's is here, and the two must agree.
"""

import math
import random

import pytest
import torch
from conftest import overlap_of

import utils


def grid_boxes(n, cells=8):
    """Boxes (n, 4) with small whole numbers: ties and overlaps of exactly a half are common."""
    low = torch.randint(0, cells, (n, 2))
    return torch.cat([low, low + torch.randint(1, cells, (n, 2))], dim=1).float()


CAT_MAP = {'background': 0, 'cat': 1}


def devkit_ap(detections, objects):
    """VOCevaldet.m and VOCap.m as loops.

    Args:
        detections: [(score, image, box)].
        objects: {image: [(box, difficult)]}.
    """
    n_objects = sum(not difficult for mine in objects.values() for _, difficult in mine)
    if n_objects == 0:
        return math.nan
    n_true, n_false, taken, points = 0, 0, set(), []
    for _, image, box in sorted(detections, key=lambda detection: -detection[0]):
        best_overlap, best = -math.inf, None
        for number, (true_box, _) in enumerate(objects.get(image, [])):
            if overlap_of(box, true_box) > best_overlap:
                best_overlap, best = overlap_of(box, true_box), number
        if best_overlap >= 0.5 and objects[image][best][1]:
            continue
        if best_overlap >= 0.5 and (image, best) not in taken:
            taken.add((image, best))
            n_true += 1
        else:
            n_false += 1
        points.append((n_true, n_true / (n_true + n_false)))
    return sum(max((precision for found, precision in points if 10 * found >= k * n_objects),
                   default=0) for k in range(11)) / 11


def devkit_aps(det_boxes, det_labels, det_scores, true_boxes, true_labels, true_difficulties,
               label_map):
    """The devkit's AP of each class, from the arguments of `calculate_mAP`."""
    detections = {label: [] for label in label_map.values()}
    objects = {label: {} for label in label_map.values()}
    for image, found in enumerate(zip(det_boxes, det_labels, det_scores)):
        for box, label, score in zip(*(values.tolist() for values in found)):
            detections[label].append((score, image, box))
    for image, there in enumerate(zip(true_boxes, true_labels, true_difficulties)):
        for box, label, difficult in zip(*(values.tolist() for values in there)):
            objects[label].setdefault(image, []).append((box, difficult))
    return {name: devkit_ap(detections[label], objects[label])
            for name, label in label_map.items() if name != 'background'}


def random_case(n_images, n_classes):
    """Lists for `calculate_mAP` with ties, duplicates, difficult objects and empty images."""
    case = [[] for _ in range(6)]
    for _ in range(n_images):
        n_objects, n_detections = random.choice([0, 1, 3, 6]), random.choice([0, 2, 8])
        true_boxes = grid_boxes(n_objects)
        near = grid_boxes(n_detections)
        if n_objects:
            near = true_boxes[torch.randint(0, n_objects, (n_detections,))]
        det_boxes = near + torch.randint(0, 2, near.shape) * torch.tensor([-1., -1., 1., 1.])
        true_labels = torch.randint(1, n_classes, (n_objects,))
        for values, value in zip(case, (
                det_boxes, torch.randint(1, n_classes, (n_detections,)),
                torch.randint(0, 10, (n_detections,)) / 10, true_boxes, true_labels,
                torch.rand(n_objects) < 0.3)):
            values.append(value)
    return case


def assert_same_aps(got, wanted):
    assert got.keys() == wanted.keys()
    assert list(got.values()) == pytest.approx(list(wanted.values()), abs=1e-9, nan_ok=True)


def test_map_is_the_devkits():
    label_map = {'background': 0, 'a': 1, 'b': 2, 'c': 3}
    seen = []
    for number in range(150):
        random.seed(number)
        case = random_case(n_images=number % 8, n_classes=4)
        aps, mean = utils.calculate_mAP(*case, label_map)
        wanted = devkit_aps(*case, label_map)
        assert_same_aps(aps, wanted)
        known = [ap for ap in wanted.values() if not math.isnan(ap)]
        assert mean == pytest.approx(sum(known) / len(known) if known else math.nan, nan_ok=True)
        seen += known
    assert len({round(ap, 3) for ap in seen}) > 30  # the cases are not all alike


def map_of(detections, objects, n_images=1):
    """AP of 'cat' for detections (image, box, score) and objects (image, box[, difficult])."""
    def lists(rows, column, shape, dtype):
        return [torch.tensor([row[column] for row in rows if row[0] == i], dtype=dtype).view(shape)
                for i in range(n_images)]
    objects = [(*row, False)[:3] for row in objects]
    found = lists(detections, 1, (-1, 4), torch.float32)
    there = lists(objects, 1, (-1, 4), torch.float32)
    aps, mean = utils.calculate_mAP(
        found, [torch.ones(len(boxes), dtype=torch.int64) for boxes in found],
        lists(detections, 2, -1, torch.float32), there,
        [torch.ones(len(boxes), dtype=torch.int64) for boxes in there],
        lists(objects, 2, -1, torch.bool), CAT_MAP)
    assert mean == pytest.approx(aps['cat'], nan_ok=True)
    return aps['cat']


@pytest.mark.parametrize('story, n_objects, ap', [
    ('', 1, 0),
    ('T', 1, 1),
    ('F', 1, 0),
    ('TFFF', 1, 1),                            # what comes after full recall costs nothing
    ('FT', 1, 1 / 2),
    ('T', 2, 6 / 11),                          # recall 0 to 0.5
    ('TFT', 2, (6 + 5 * 2 / 3) / 11),
    ('TXT', 2, (6 + 5 * 2 / 3) / 11),          # a second detection of an object is false
    ('TDT', 2, 1),                             # one of a difficult object is ignored
    ('DDD', 1, 0),
    ('FTT', 2, 2 / 3),                         # precision 0, 1/2, 2/3: the highest counts
    ('TFTF', 3, (4 + 3 * 2 / 3) / 11),         # recall 1/3 reaches 0.3, 2/3 reaches 0.6
    *[('T' * n, 10, (n + 1) / 11) for n in range(1, 11)],   # recall of exactly n tenths
    ('FTTT', 10, 4 * 0.75 / 11),
    ('T' * 6, 20, 4 / 11),                     # 6 of 20 is 0.3, too
])
def test_average_precision_by_hand(story, n_objects, ap):
    # Objects stand in a row; a detection finds the next (T), the last again (X), a difficult one
    # (D), or none (F).
    row = [(0, (20. * i, 0., 20. * i + 10, 10.)) for i in range(n_objects)]
    difficult = (0, (0., 50., 10., 60.), True)
    nowhere, detections, found = (0., 900., 10., 910.), [], -1
    for step, letter in enumerate(story):
        found += letter == 'T'
        box = {'F': nowhere, 'D': difficult[1]}.get(letter) or row[found][1]
        detections.append((0, box, 0.9 - 0.01 * step))
    assert map_of(detections, [*row, difficult]) == pytest.approx(ap)


def test_an_overlap_of_exactly_a_half_counts():
    objects = [(0, (0., 0., 10., 10.))]
    assert map_of([(0, (0., 0., 10., 5.), 0.9)], objects) == 1
    assert map_of([(0, (0., 0., 10., 4.99), 0.9)], objects) == 0
    thirds = torch.tensor([[1., 1., 2., 3.], [1., 1., 2., 2.]]) / 3 - torch.tensor(1 / 3)
    assert map_of([(0, thirds[1].tolist(), 0.9)], [(0, thirds[0].tolist())]) == 1


def test_a_detection_looks_at_the_object_that_it_overlaps_most_and_at_no_other():
    easy, other = (0., 0., 10., 10.), (0., 0., 10., 12.)
    nearer_other = (0, (0., 0., 10., 11.5), 0.9)
    # Nearest is a difficult object: ignored, and the easy one is missed.
    assert map_of([nearer_other], [(0, easy), (0, other, True)]) == 0
    assert map_of([nearer_other, (0, easy, 0.5)], [(0, easy), (0, other, True)]) == 1
    # Nearest is taken: false, though another is free. Recall 1/2 at precision 1.
    again = (0, (0., 0., 10., 11.6), 0.8)
    assert map_of([nearer_other, again], [(0, easy), (0, other)]) == pytest.approx(6 / 11)
    # As near to both: the first one.
    between = (0, (0., 0., 10., 10.), 0.9)
    twins = (0., 0., 10., 8.), (0., 2., 10., 10.)
    assert map_of([between], [(0, twins[0], True), (0, twins[1])]) == 0
    assert map_of([between], [(0, twins[0]), (0, twins[1], True)]) == 1


def test_equal_scores_keep_their_order():
    box, nowhere = (0., 0., 10., 10.), (50., 50., 60., 60.)
    objects = [(1, box)]
    assert map_of([(0, nowhere, 0.5), (1, box, 0.5)], objects, 2) == 0.5
    assert map_of([(1, box, 0.5), (2, nowhere, 0.5)], objects, 3) == 1
    many = [(0, nowhere, 0.5)] * 20 + [(0, box, 0.5)]  # an unstable sort shuffles these
    assert map_of(many, [(0, box)]) == pytest.approx(1 / 21)


def test_detections_in_images_without_objects_are_false():
    box = (0., 0., 10., 10.)
    assert map_of([(0, box, 0.9), (1, box, 0.8)], [(1, box)], 2) == 0.5
    assert map_of([(0, box, 0.9), (1, box, 0.8)], [(1, box), (0, box, True)], 2) == 1


def test_a_class_without_objects_has_no_ap_and_no_part_in_the_mean():
    box = torch.tensor([[0., 0., 1., 1.]])
    label_map = {'background': 0, 'found': 1, 'difficult': 2, 'absent': 3, 'missed': 4}
    lists = ([box.repeat(3, 1)], [torch.tensor([1, 2, 3])], [torch.tensor([0.9, 0.8, 0.7])],
             [box.repeat(3, 1)], [torch.tensor([1, 2, 4])], [torch.tensor([False, True, False])])
    aps, mean = utils.calculate_mAP(*lists, label_map)
    assert_same_aps(aps, {'found': 1, 'difficult': math.nan, 'absent': math.nan, 'missed': 0})
    assert mean == 0.5 and isinstance(mean, float)


@pytest.mark.parametrize('dtype', [torch.bool, torch.uint8, torch.int64])
def test_difficulties_of_any_type(dtype):
    boxes = torch.tensor([[0., 0., 1., 1.], [2., 2., 3., 3.]])
    labels, scores = torch.ones(2, dtype=torch.int64), torch.tensor([0.9, 0.8])
    difficulties = torch.tensor([1, 0]).to(dtype)
    aps, _ = utils.calculate_mAP([boxes], [labels], [scores], [boxes], [labels], [difficulties],
                                 CAT_MAP)
    assert aps == {'cat': 1.}


@pytest.mark.parametrize('n_images', [0, 1, 3])
def test_nothing_found_and_nothing_there(n_images):
    def lists(shape, dtype=torch.float32):
        return [torch.zeros(shape, dtype=dtype) for _ in range(n_images)]
    nothing = (lists((0, 4)), lists(0, torch.int64), lists(0))
    there = (lists((0, 4)), lists(0, torch.int64), lists(0, torch.bool))
    aps, mean = utils.calculate_mAP(*nothing, *there, CAT_MAP)
    assert math.isnan(aps['cat']) and math.isnan(mean)
    aps, mean = utils.calculate_mAP(*nothing, *there, {'background': 0})
    assert aps == {} and math.isnan(mean)
    there = ([*there[0], torch.tensor([[0., 0., 1., 1.]])], [*there[1], torch.tensor([1])],
             [*there[2], torch.tensor([False])])
    nothing = ([*nothing[0], torch.zeros(0, 4)], [*nothing[1], torch.zeros(0, dtype=torch.int64)],
               [*nothing[2], torch.zeros(0)])
    assert utils.calculate_mAP(*nothing, *there, CAT_MAP) == ({'cat': 0.}, 0.)


def test_map_needs_as_many_images_of_each_list():
    with pytest.raises(AssertionError, match='1'):
        utils.calculate_mAP([torch.zeros(0, 4)], [], [], [], [], [], CAT_MAP)


def test_map_does_not_depend_on_the_unit_or_the_order_of_images_and_edits_nothing():
    random.seed(1)
    label_map = {'background': 0, 'a': 1, 'b': 2}
    case = random_case(30, 3)
    case[2] = list(torch.rand(sum(map(len, case[2]))).split([len(s) for s in case[2]]))  # no ties
    before = [[tensor.clone() for tensor in list_] for list_ in case]
    aps, _ = utils.calculate_mAP(*case, label_map)
    assert all(torch.equal(a, b) for list_, old in zip(case, before) for a, b in zip(list_, old))
    order = torch.randperm(30).tolist()
    shuffled = [[list_[i] for i in order] for list_ in case]
    assert_same_aps(utils.calculate_mAP(*shuffled, label_map)[0], aps)
    for which in (0, 3):
        case[which] = [boxes / 8 for boxes in case[which]]
    assert_same_aps(utils.calculate_mAP(*case, label_map)[0], aps)


def test_map_on_the_objects_of_voc_2007(sample_data):
    boxes, labels = [], []
    for line in (sample_data / 'voc07-test-boxes.txt').read_text().splitlines():
        numbers = torch.tensor([float(number) for number in line.split()[1:]]).view(-1, 5)
        boxes.append(numbers[:, :4] - torch.tensor([1., 1., 0., 0.]))
        labels.append(numbers[:, 4].long() + 1)
    scores, easy = [torch.ones(len(l)) for l in labels], [torch.zeros(len(l)) for l in labels]
    assert sum(map(len, boxes)) == 12031
    aps, mean = utils.calculate_mAP(boxes, labels, scores, boxes, labels, easy, utils.label_map)
    assert set(aps.values()) == {1.} and mean == 1
    # Shaken, each twice, some of another class: against the devkit's loop on a part.
    case = [[], [], [], boxes[:600], labels[:600], [torch.rand(len(l)) < 0.2 for l in labels[:600]]]
    for box, label in zip(boxes[:600], labels[:600]):
        size = (box[:, 2:] - box[:, :2]).repeat(2, 2)
        case[0].append(box.repeat(2, 1) + torch.randn(len(size), 4) * size * 0.12)
        other = torch.randint(1, 21, (len(size),))
        case[1].append(torch.where(torch.rand(len(size)) < 0.2, other, label.repeat(2)))
        case[2].append(torch.rand(len(size)))
    aps, mean = utils.calculate_mAP(*case, utils.label_map)
    assert_same_aps(aps, devkit_aps(*case, utils.label_map))
    assert 0.2 < mean < 0.8
