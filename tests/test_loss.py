"""Tests of MultiBoxLoss: matching, hard negatives, the value and its gradients."""

import math
import types

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision.models.detection._utils import BoxCoder, SSDMatcher
from torchvision.models.detection.ssd import SSD
from torchvision.ops import box_iou

import utils
from model import SSD300, MultiBoxLoss


@pytest.fixture(scope='module')
def priors():
    return SSD300.create_prior_boxes()


# --------------------------------------------------------------------------------------------------
# Matching
# --------------------------------------------------------------------------------------------------


def random_objects(*counts, step=None):
    """For each count a tensor of so many boxes; their corners are multiples of `step` if given."""
    found = []
    for count in counts:
        corners = torch.rand(count, 2, 2).sort(dim=1).values
        corners[:, 1] += 0.05
        if step:
            corners = (corners / step).round() * step
            corners[:, 1] = torch.maximum(corners[:, 1], corners[:, 0] + step)
        found.append(corners.view(count, 4))
    return found


def random_labels(boxes, n_classes):
    return [torch.randint(1, n_classes, (len(b),)) for b in boxes]


def match_slowly(overlap, threshold):
    """The object of each prior, or -1: pair by pair for overlaps (O, P)."""
    n_objects, n_priors = overlap.shape
    overlap = overlap.tolist()
    object_of = [-1] * n_priors
    objects_left, priors_left = set(range(n_objects)), set(range(n_priors))
    while objects_left and priors_left:
        best, object_, prior = max((overlap[o][p], -o, -p) for o in objects_left
                                   for p in priors_left)
        if best <= 0:
            break
        object_of[-prior] = -object_
        objects_left.remove(-object_)
        priors_left.remove(-prior)
    for p in priors_left if n_objects else ():
        object_ = max(range(n_objects), key=lambda o: overlap[o][p])    # the first of equals
        if overlap[object_][p] >= threshold:
            object_of[p] = object_
    return object_of


def overlap_with(boxes, priors):
    # The code's own function: with another one's rounding, other pairs would be equal.
    return utils.find_jaccard_overlap(boxes, utils.cxcy_to_xy(priors))


def matched_objects(priors, boxes, threshold=0.5):
    """The object of each prior, or -1, as the gradients of the loss show it: (N, P).

    Each object is a class of its own, and of a row of scores only the true class has a negative
    gradient.
    """
    labels = [torch.arange(1, len(b) + 1) for b in boxes]
    n_classes = max(map(len, boxes)) + 2
    scores = torch.zeros(len(boxes), len(priors), n_classes, requires_grad=True)
    criterion = MultiBoxLoss(priors, threshold=threshold, neg_pos_ratio=0)
    criterion(torch.zeros(len(boxes), len(priors), 4), scores, boxes, labels).backward()
    return torch.where((scores.grad != 0).any(dim=2), scores.grad.argmin(dim=2) - 1, -1)


@pytest.fixture
def coarse_priors(priors):
    """Those of the last three maps: 190, few enough for loops."""
    return priors[-190:]


@pytest.mark.parametrize('threshold', [0.3, 0.5, 0.95])
@pytest.mark.parametrize('make', [
    lambda: random_objects(12, 0, 30),
    lambda: random_objects(0, 1, 25, 0, step=0.1),
    lambda: random_objects(20, 20, step=0.25),
    lambda: [random_objects(1)[0].repeat(15, 1), random_objects(3)[0].repeat(6, 1)],
    lambda: [torch.cat([random_objects(4, step=0.2)[0], torch.full((2, 4), 0.5)])],
    lambda: random_objects(0, 0),
], ids=['random', 'with ties', 'many ties', 'duplicates', 'without area', 'no objects'])
def test_matching_takes_the_best_pair_left(coarse_priors, make, threshold):
    boxes = make()
    got = matched_objects(coarse_priors, boxes, threshold)
    for i, boxes_of_image in enumerate(boxes):
        expected = match_slowly(overlap_with(boxes_of_image, coarse_priors), threshold)
        assert got[i].tolist() == expected


@pytest.mark.parametrize('n_priors', [1, 4, 10])
def test_matching_with_fewer_priors_than_objects(coarse_priors, n_priors):
    priors = coarse_priors[-n_priors:]
    boxes = random_objects(9, 2, 15)
    for got, of_image in zip(matched_objects(priors, boxes, 0.9), boxes):
        assert got.tolist() == match_slowly(overlap_with(of_image, priors), 0.9)


@pytest.mark.parametrize('box', [(0.1, 0.2, 0.6, 0.9), (0., 0., 1., 1.), (0.5, 0.5, 0.52, 0.53)])
def test_twenty_objects_in_one_place_get_twenty_priors(priors, box):
    boxes = [torch.tensor([box]).repeat(20, 1), torch.zeros(0, 4)]
    got = matched_objects(priors, boxes)
    assert set(range(20)) <= set(got[0].tolist())
    assert (got[1] == -1).all()


def test_an_object_that_overlaps_nothing_gets_nothing(coarse_priors):
    boxes = torch.tensor([(0.1, 0.1, 0.5, 0.5), (0.3, 0.3, 0.3, 0.3), (2., 2., 3., 3.)])
    got = matched_objects(coarse_priors, [boxes])
    assert set(got.flatten().tolist()) == {-1, 0}
    locs, scores = torch.randn(1, 190, 4), torch.randn(1, 190, 5)
    criterion = MultiBoxLoss(coarse_priors)
    loss = criterion(locs, scores, [boxes], [torch.tensor([1, 2, 3])])
    assert loss == criterion(locs, scores, [boxes[:1]], [torch.tensor([1])])


@pytest.mark.parametrize(('threshold', 'expected'), [(0.5, [0, 0, -1]), (0.51, [0, -1, -1])])
def test_an_overlap_of_exactly_the_threshold_is_a_match(threshold, expected):
    # The whole image; its upper half, overlap 1/2; its left quarter, overlap 1/4.
    priors = torch.tensor([(0.5, 0.5, 1, 1), (0.5, 0.25, 1, 0.5), (0.125, 0.5, 0.25, 1)])
    boxes = [torch.tensor([(0., 0., 1., 1.)])]
    assert matched_objects(priors, boxes, threshold).tolist() == [expected]


@pytest.mark.parametrize('threshold', [0., 0.5])
def test_an_image_without_objects_has_no_positives(coarse_priors, threshold):
    boxes = [torch.tensor([(0.1, 0.1, 0.5, 0.5)]), torch.zeros(0, 4)]
    got = matched_objects(coarse_priors, boxes, threshold)
    assert (got[0] == 0).any()
    assert (got[1] == -1).all()


def test_matching_equals_torchvisions_where_no_prior_is_contested(priors):
    grid = torch.tensor([(x, y, x, y) for x in (0., 0.5) for y in (0., 0.5)])
    size = torch.rand(4, 2) * 0.3 + 0.1
    boxes = grid + 0.05 + torch.cat([torch.zeros(4, 2), size], dim=1)
    overlap = box_iou(boxes, utils.cxcy_to_xy(priors))
    assert len(overlap.argmax(dim=1).unique()) == 4
    assert matched_objects(priors, [boxes])[0].tolist() == SSDMatcher(0.5)(overlap).tolist()


# --------------------------------------------------------------------------------------------------
# Its value and its gradients
# --------------------------------------------------------------------------------------------------


def encode(box, prior):
    (x0, y0, x1, y1), (cx, cy, w, h) = box, prior
    return (((x0 + x1) / 2 - cx) / (w / 10), ((y0 + y1) / 2 - cy) / (h / 10),
            5 * math.log((x1 - x0) / w), 5 * math.log((y1 - y0) / h))


def loss_slowly(priors, locs, scores, boxes, labels, threshold=0.5, neg_pos_ratio=3, alpha=1.):
    """The loss prior by prior, in double precision."""
    conf_loss = loc_loss = n_positives = 0
    cross_entropy = -scores.double().log_softmax(dim=2)     # (N, P, C), for every class
    for i in range(len(locs)):
        object_of = match_slowly(overlap_with(boxes[i], priors), threshold)
        positives = [p for p, object_ in enumerate(object_of) if object_ >= 0]
        negatives = [p for p, object_ in enumerate(object_of) if object_ < 0]
        for p in positives:
            object_ = object_of[p]
            conf_loss += cross_entropy[i, p, labels[i][object_]].item()
            true_locs = encode(boxes[i][object_].tolist(), priors[p].tolist())
            for predicted, true in zip(locs[i, p].tolist(), true_locs):
                miss = abs(predicted - true)
                loc_loss += miss - 0.5 if miss > 1 else miss ** 2 / 2
        of_negatives = sorted((cross_entropy[i, p, 0].item() for p in negatives), reverse=True)
        conf_loss += sum(of_negatives[:neg_pos_ratio * len(positives)])
        n_positives += len(positives)
    return (conf_loss + alpha * loc_loss) / max(1, n_positives)


@pytest.mark.parametrize('counts', [(5, 0, 12), (1,), (30, 40), (0, 0)])
@pytest.mark.parametrize('settings', [
    {}, {'alpha': 0.}, {'alpha': 2.5}, {'neg_pos_ratio': 1}, {'neg_pos_ratio': 0},
    {'threshold': 0.3}, {'threshold': 0.8}], ids=str)
def test_loss_equals_a_loop_over_priors(coarse_priors, counts, settings):
    boxes = random_objects(*counts)
    labels = random_labels(boxes, 6)
    locs, scores = torch.randn(len(counts), 190, 4), 3 * torch.randn(len(counts), 190, 6)
    loss = MultiBoxLoss(coarse_priors, **settings)(locs, scores, boxes, labels)
    assert loss.shape == ()
    expected = loss_slowly(coarse_priors, locs, scores, boxes, labels, **settings)
    assert loss.item() == pytest.approx(expected, rel=1e-4, abs=1e-6)


def test_loss_equals_torchvisions(priors):
    # On a grid, so that no two objects want the same prior: there torchvision matches otherwise.
    boxes = [torch.tensor([(x, y, x + 0.3, y + 0.4) for x in (0.05, 0.55) for y in (0.1, 0.5)]),
             torch.zeros(0, 4), torch.tensor([(0.21, 0.33, 0.84, 0.71)])]
    labels = random_labels(boxes, 21)
    locs, scores = torch.randn(3, 8732, 4), torch.randn(3, 8732, 21)
    corners = utils.cxcy_to_xy(priors)
    matches = [SSDMatcher(0.5)(box_iou(b, corners)) if len(b) else torch.full((8732,), -1)
               for b in boxes]
    settings = types.SimpleNamespace(box_coder=BoxCoder(weights=(10., 10., 5., 5.)),
                                     neg_to_pos_ratio=3)
    expected = SSD.compute_loss(
        settings, [{'boxes': b, 'labels': l} for b, l in zip(boxes, labels)],
        {'bbox_regression': locs, 'cls_logits': scores}, [corners] * 3, matches)
    loss = MultiBoxLoss(priors)(locs, scores, boxes, labels)
    assert loss.item() == pytest.approx(sum(expected.values()).item(), rel=1e-5)


def test_a_batch_without_objects_costs_nothing_and_can_be_learned_from(coarse_priors):
    locs = torch.randn(2, 190, 4, requires_grad=True)
    scores = torch.randn(2, 190, 6, requires_grad=True)
    loss = MultiBoxLoss(coarse_priors)(locs, scores, 2 * [torch.zeros(0, 4)],
                                       2 * [torch.zeros(0, dtype=torch.long)])
    loss.backward()
    assert loss == 0
    assert (locs.grad == 0).all() and (scores.grad == 0).all()


def test_gradients_reach_positives_and_the_hardest_negatives_alone(coarse_priors):
    boxes = random_objects(6, 0, 3)
    labels = random_labels(boxes, 5)
    locs = torch.randn(3, 190, 4, requires_grad=True)
    scores = torch.randn(3, 190, 5, requires_grad=True)
    MultiBoxLoss(coarse_priors)(locs, scores, boxes, labels).backward()
    positive = matched_objects(coarse_priors, boxes) >= 0
    assert torch.equal((locs.grad != 0).any(dim=2), positive)
    chosen = (scores.grad != 0).any(dim=2)
    assert chosen[positive].all() and not chosen[1].any()
    losses = -scores.detach().log_softmax(dim=2)[..., 0]
    for i in (0, 2):
        negatives = chosen[i] & ~positive[i]
        assert negatives.sum() == 3 * positive[i].sum()
        assert losses[i][negatives].min() > losses[i][~chosen[i]].max()


@pytest.mark.parametrize(('threshold', 'box', 'enough'), [
    (0.5, (0.1, 0.1, 0.5, 0.5), True), (0.1, (0., 0., 1., 1.), False)])
def test_equal_losses_still_give_the_exact_number_of_negatives(coarse_priors, threshold, box,
                                                               enough):
    scores = torch.zeros(2, 190, 5, requires_grad=True)
    boxes = [torch.tensor([box]), torch.zeros(0, 4)]
    labels = [torch.tensor([3]), torch.zeros(0, dtype=torch.long)]
    criterion = MultiBoxLoss(coarse_priors, threshold=threshold)
    criterion(torch.zeros(2, 190, 4), scores, boxes, labels).backward()
    n_positives = (matched_objects(coarse_priors, boxes, threshold)[0] >= 0).sum().item()
    n_chosen = (scores.grad != 0).any(dim=2).sum(dim=1).tolist()
    assert (4 * n_positives <= 190) == enough
    assert n_chosen == [min(4 * n_positives, 190), 0]


def test_perfect_predictions_cost_almost_nothing(priors):
    boxes = random_objects(8, 2)
    labels = random_labels(boxes, 21)
    objects = matched_objects(priors, boxes)
    locs, scores = torch.zeros(2, 8732, 4), torch.zeros(2, 8732, 21)
    scores[..., 0] = 20
    for i, p in (objects >= 0).nonzero().tolist():
        box, label = boxes[i][objects[i, p]], labels[i][objects[i, p]]
        locs[i, p] = torch.tensor(encode(box.tolist(), priors[p].tolist()))
        scores[i, p, label] = 40
    assert MultiBoxLoss(priors)(locs, scores, boxes, labels) < 1e-4


@pytest.mark.parametrize('autocast', [False, True])
def test_loss_of_half_precision_predictions_is_computed_in_float32(coarse_priors, autocast):
    boxes = random_objects(6, 3)
    labels = random_labels(boxes, 5)
    locs, scores = torch.randn(2, 190, 4).bfloat16(), torch.randn(2, 190, 5).bfloat16()
    criterion = MultiBoxLoss(coarse_priors)
    expected = criterion(locs.float(), scores.float(), boxes, labels)
    with torch.autocast('cpu', dtype=torch.bfloat16, enabled=autocast):
        loss = criterion(locs, scores, boxes, labels)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)


def test_loss_leaves_its_arguments_alone(coarse_priors):
    boxes = random_objects(6, 3)
    arguments = (torch.randn(2, 190, 4), torch.randn(2, 190, 5), boxes, random_labels(boxes, 5))
    flat = [coarse_priors, *arguments[:2], *arguments[2], *arguments[3]]
    before = [tensor.clone() for tensor in flat]
    MultiBoxLoss(coarse_priors)(*arguments)
    assert len(arguments[2]) == len(arguments[3]) == 2
    assert all(torch.equal(a, b) for a, b in zip(flat, before))


class RecordWaits(TorchDispatchMode):
    """Notes the operations that would make the host wait for a GPU: those that need its numbers."""

    WAIT = {'_local_scalar_dense', 'item', 'nonzero', 'is_nonzero', 'masked_select', 'equal',
            'bincount', '_unique2', 'unique_consecutive', 'unique_dim'}

    def __init__(self):
        super().__init__()
        self.waits, self.n_calls = [], 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = str(func).split('.')[1]
        masks = name in ('index', 'index_put', 'index_put_', '_index_put_impl_') and any(
            index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1])
        unsized = str(func) == 'aten.repeat_interleave.Tensor' and not (kwargs or {}).get(
            'output_size')
        if name in self.WAIT or masks or unsized:
            self.waits.append(str(func))
        self.n_calls += 1
        return func(*args, **(kwargs or {}))


def test_loss_never_waits_for_the_device(coarse_priors, monkeypatch):
    with RecordWaits() as recorder:     # the recorder sees what it is there to see
        numbers = torch.arange(3)
        numbers.sum().item(), numbers[numbers > 1], numbers.nonzero(), bool(numbers.any())
    assert len(recorder.waits) == 4

    # On a CPU these do no operation that a recorder could see.
    waits = []
    for name in ('tolist', 'cpu', 'numpy'):
        monkeypatch.setattr(torch.Tensor, name, lambda *_, name=name: waits.append(name))
    locs = torch.randn(3, 190, 4, requires_grad=True)
    scores = torch.randn(3, 190, 5, requires_grad=True)
    criterion = MultiBoxLoss(coarse_priors)
    for counts in ((6, 0, 3), (0, 0, 0)):
        boxes = random_objects(*counts)
        labels = random_labels(boxes, 5)
        with RecordWaits() as recorder:
            criterion(locs, scores, boxes, labels).backward()
        assert recorder.waits == [] and waits == []
        assert recorder.n_calls > 20
