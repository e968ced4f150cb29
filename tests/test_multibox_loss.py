"""Tests of MultiBoxLoss: matching, hard negative mining, the loss and its gradients."""

import math
import types

import pytest
import torch
from torchvision.models.detection._utils import BoxCoder, SSDMatcher
from torchvision.models.detection.ssd import SSD
from torchvision.ops import box_iou

import utils
from model import MultiBoxLoss, create_prior_boxes


@pytest.fixture(scope='module')
def priors():
    return create_prior_boxes()


@pytest.fixture
def coarse_priors(priors):
    """Return the priors of the last three maps: 190, few enough for loops."""
    return priors[-190:]


def random_objects(*counts, step=None):
    """Return random boxes (count, 4) for each count, on a grid of width `step` if given."""
    objects = []
    for count in counts:
        corners = torch.rand(count, 2, 2).sort(dim=1).values
        corners[:, 1] += 0.05
        if step:
            corners = (corners / step).round() * step
            corners[:, 1] = torch.maximum(corners[:, 1], corners[:, 0] + step)
        objects.append(corners.view(count, 4))
    return objects


def random_labels(boxes, n_classes):
    return [torch.randint(1, n_classes, (len(b),)) for b in boxes]


def random_predictions(n_images, n_priors, n_classes):
    """Return random locs and scores that require gradients."""
    return (torch.randn(n_images, n_priors, 4, requires_grad=True),
            torch.randn(n_images, n_priors, n_classes, requires_grad=True))


def compute_gradients(loss, *tensors):
    return torch.autograd.grad(loss, tensors, retain_graph=True)


# --------------------------------------------------------------------------------------------------
# Matching
# --------------------------------------------------------------------------------------------------


def match_slowly(overlap, threshold):
    """Match priors to objects pair by pair.

    Args:
        overlap: (O, P).

    Returns:
        A list of P object indices, -1 for background.
    """
    n_objects, n_priors = overlap.shape
    overlap = overlap.tolist()
    object_of = [-1] * n_priors
    free_objects, free_priors = set(range(n_objects)), set(range(n_priors))
    while free_objects and free_priors:
        # Of equal IoUs the first object, then the first prior
        highest, obj, prior = max((overlap[o][p], -o, -p)
                                  for o in free_objects for p in free_priors)
        if highest <= 0:
            break
        object_of[-prior] = -obj
        free_objects.remove(-obj)
        free_priors.remove(-prior)
    for p in free_priors if n_objects else ():
        obj = max(range(n_objects), key=lambda o: overlap[o][p])    # the first of equals
        if overlap[obj][p] >= threshold:
            object_of[p] = obj
    return object_of


def overlap_with(boxes, priors):
    # Not torchvision's, whose rounding differs: other pairs would have equal IoUs.
    return utils.find_jaccard_overlap(boxes, utils.cxcy_to_xy(priors))


def matched_objects(priors, boxes, threshold=0.5):
    """Return the index of the object of each prior, -1 for background: (N, P)."""
    labels = [torch.arange(1, len(b) + 1) for b in boxes]   # each object is a class
    _, true_classes = MultiBoxLoss(priors, threshold=threshold).match(boxes, labels)
    return true_classes - 1


@pytest.mark.parametrize('threshold', [0.3, 0.5, 0.95])
@pytest.mark.parametrize('make', [
    lambda: random_objects(12, 0, 30),
    lambda: random_objects(0, 1, 25, 0, step=0.1),
    lambda: random_objects(20, 20, step=0.25),
    lambda: [random_objects(1)[0].repeat(15, 1), random_objects(3)[0].repeat(6, 1)],
    lambda: [torch.cat([random_objects(4, step=0.2)[0], torch.full((2, 4), 0.5)])],
    lambda: random_objects(0, 0),
], ids=['random', 'with ties', 'many ties', 'duplicates', 'without area', 'no objects'])
def test_matching_equals_a_loop_over_pairs(coarse_priors, make, threshold):
    boxes = make()
    matches = matched_objects(coarse_priors, boxes, threshold)
    for i, boxes_of_image in enumerate(boxes):
        expected = match_slowly(overlap_with(boxes_of_image, coarse_priors), threshold)
        assert matches[i].tolist() == expected


@pytest.mark.parametrize('n_priors', [1, 4, 10])
def test_matching_with_fewer_priors_than_objects(coarse_priors, n_priors):
    priors = coarse_priors[-n_priors:]
    boxes = random_objects(9, 2, 15)
    for matches, boxes_of_image in zip(matched_objects(priors, boxes, 0.9), boxes):
        assert matches.tolist() == match_slowly(overlap_with(boxes_of_image, priors), 0.9)


@pytest.mark.parametrize('box', [(0.1, 0.2, 0.6, 0.9), (0., 0., 1., 1.), (0.5, 0.5, 0.52, 0.53)])
def test_twenty_objects_at_one_place_get_twenty_priors(priors, box):
    boxes = [torch.tensor([box]).repeat(20, 1), torch.zeros(0, 4)]
    matches = matched_objects(priors, boxes)
    assert set(range(20)) <= set(matches[0].tolist())
    assert (matches[1] == -1).all()


def test_object_that_overlaps_no_prior_is_not_matched(coarse_priors):
    boxes = torch.tensor([(0.1, 0.1, 0.5, 0.5), (0.3, 0.3, 0.3, 0.3), (2., 2., 3., 3.)])
    matches = matched_objects(coarse_priors, [boxes])
    assert set(matches.flatten().tolist()) == {-1, 0}
    locs, scores = random_predictions(1, 190, 5)
    criterion = MultiBoxLoss(coarse_priors)
    loss = criterion(locs, scores, [boxes], [torch.tensor([1, 2, 3])])
    assert loss == criterion(locs, scores, [boxes[:1]], [torch.tensor([1])])


@pytest.mark.parametrize(('threshold', 'expected'), [(0.5, [0, 0, -1]), (0.51, [0, -1, -1])])
def test_iou_of_exactly_the_threshold_is_a_match(threshold, expected):
    # The whole image; its upper half, IoU 1/2; its left quarter, IoU 1/4.
    priors = torch.tensor([(0.5, 0.5, 1, 1), (0.5, 0.25, 1, 0.5), (0.125, 0.5, 0.25, 1)])
    boxes = [torch.tensor([(0., 0., 1., 1.)])]
    assert matched_objects(priors, boxes, threshold).tolist() == [expected]


@pytest.mark.parametrize('threshold', [0., 0.5])
def test_image_without_objects_has_no_positives(coarse_priors, threshold):
    boxes = [torch.tensor([(0.1, 0.1, 0.5, 0.5)]), torch.zeros(0, 4)]
    matches = matched_objects(coarse_priors, boxes, threshold)
    assert (matches[0] == 0).any()
    assert (matches[1] == -1).all()


def test_matching_equals_torchvisions_if_no_two_objects_share_their_best_prior(priors):
    grid = torch.tensor([(x, y, x, y) for x in (0., 0.5) for y in (0., 0.5)])
    size = torch.rand(4, 2) * 0.3 + 0.1
    boxes = grid + 0.05 + torch.cat([torch.zeros(4, 2), size], dim=1)
    overlap = box_iou(boxes, utils.cxcy_to_xy(priors))
    assert len(overlap.argmax(dim=1).unique()) == 4
    assert matched_objects(priors, [boxes])[0].tolist() == SSDMatcher(0.5)(overlap).tolist()


@pytest.mark.parametrize('has_ties', [False, True])
def test_matches_do_not_depend_on_the_number_of_padded_rows(priors, has_ties):
    if has_ties:    # equal squares on an exact grid: most objects have many equal best priors
        centers = torch.cartesian_prod(torch.arange(1, 32), torch.arange(1, 32)) / 32
        priors = torch.cat([centers, torch.full_like(centers, 1 / 8)], dim=1)
    boxes = random_objects(20, 0, 6, step=1 / 16 if has_ties else None)
    boxes, labels = utils.pad_objects(boxes, random_labels(boxes, 6))
    overlap = overlap_with(boxes[0], priors)
    n_best = (overlap == overlap.max(dim=1, keepdim=True).values).sum(dim=1)
    assert ((n_best > 1).sum() > 15) == has_ties
    criterion = MultiBoxLoss(priors)
    expected = criterion.match(boxes, labels)
    for n_rows in (3, 40):
        padded = (torch.cat([boxes, torch.zeros(3, n_rows, 4)], dim=1),
                  torch.cat([labels, torch.zeros(3, n_rows, dtype=torch.int64)], dim=1))
        assert all(torch.equal(a, b) for a, b in zip(criterion.match(*padded), expected))


def test_match_returns_classes_and_offsets_of_the_matched_objects(coarse_priors):
    boxes = random_objects(5, 0, 12)
    labels = random_labels(boxes, 6)
    criterion = MultiBoxLoss(coarse_priors)
    true_locs, true_classes = criterion.match(boxes, labels)
    assert true_locs.shape == (3, 190, 4) and true_classes.shape == (3, 190)
    for i, object_of_priors in enumerate(matched_objects(coarse_priors, boxes).tolist()):
        for p, obj in enumerate(object_of_priors):
            assert true_classes[i, p] == (labels[i][obj] if obj >= 0 else 0)
            expected = (encode(boxes[i][obj].tolist(), coarse_priors[p].tolist()) if obj >= 0
                        else (0, 0, 0, 0))
            assert true_locs[i, p].tolist() == pytest.approx(expected, abs=1e-4)
    assert criterion.count_positives(boxes, labels) == (true_classes > 0).sum() > 17


# --------------------------------------------------------------------------------------------------
# The loss and its gradients
# --------------------------------------------------------------------------------------------------


def encode(box, prior):
    (x_min, y_min, x_max, y_max), (cx, cy, w, h) = box, prior
    return (((x_min + x_max) / 2 - cx) / (w / 10), ((y_min + y_max) / 2 - cy) / (h / 10),
            5 * math.log((x_max - x_min) / w), 5 * math.log((y_max - y_min) / h))


def loss_slowly(priors, locs, scores, boxes, labels, threshold=0.5, neg_pos_ratio=3, alpha=1.):
    """Compute the loss prior by prior, in double precision: conf_loss, loc_loss, their sum."""
    conf_loss = loc_loss = n_positives = 0
    cross_entropy = -scores.double().log_softmax(dim=2)     # (N, P, C), for every class
    for i in range(len(locs)):
        object_of = match_slowly(overlap_with(boxes[i], priors), threshold)
        positives = [p for p, obj in enumerate(object_of) if obj >= 0]
        negatives = [p for p, obj in enumerate(object_of) if obj < 0]
        for p in positives:
            obj = object_of[p]
            conf_loss += cross_entropy[i, p, labels[i][obj]].item()
            true_locs = encode(boxes[i][obj].tolist(), priors[p].tolist())
            for predicted_loc, true_loc in zip(locs[i, p].tolist(), true_locs):
                error = abs(predicted_loc - true_loc)
                loc_loss += error - 0.5 if error > 1 else error ** 2 / 2
        of_negatives = sorted((cross_entropy[i, p, 0].item() for p in negatives), reverse=True)
        conf_loss += sum(of_negatives[:neg_pos_ratio * len(positives)])
        n_positives += len(positives)
    conf_loss, loc_loss = conf_loss / max(1, n_positives), loc_loss / max(1, n_positives)
    return conf_loss, loc_loss, conf_loss + alpha * loc_loss


@pytest.mark.parametrize(('counts', 'settings'), [
    ((5, 0, 12), {}), ((1,), {}), ((30, 40), {}), ((0, 0), {}),
    ((5, 0, 12), {'alpha': 0.}), ((5, 0, 12), {'alpha': 2.5}), ((0, 0), {'alpha': 2.5}),
    ((5, 0, 12), {'neg_pos_ratio': 1}), ((5, 0, 12), {'neg_pos_ratio': 0}),
    ((30, 40), {'neg_pos_ratio': 10}),      # more than there are negatives
    ((5, 0, 12), {'threshold': 0.3}), ((5, 0, 12), {'threshold': 0.8}), ((1,), {'threshold': 0.8}),
], ids=str)
def test_loss_equals_a_loop_over_priors(coarse_priors, counts, settings):
    boxes = random_objects(*counts)
    labels = random_labels(boxes, 6)
    locs, scores = torch.randn(len(counts), 190, 4), 3 * torch.randn(len(counts), 190, 6)
    criterion = MultiBoxLoss(coarse_priors, **settings)
    loss = criterion(locs, scores, boxes, labels)
    assert loss.shape == ()
    conf_loss, loc_loss, total = loss_slowly(coarse_priors, locs, scores, boxes, labels, **settings)
    assert loss.item() == pytest.approx(total, rel=1e-4, abs=1e-6)
    assert criterion.conf_loss.item() == pytest.approx(conf_loss, rel=1e-4, abs=1e-6)
    assert criterion.loc_loss.item() == pytest.approx(loc_loss, rel=1e-4, abs=1e-6)


def test_loss_equals_torchvisions(priors):
    # On a grid, so that no two objects share their best prior: there torchvision matches otherwise.
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
    criterion = MultiBoxLoss(priors)
    loss = criterion(locs, scores, boxes, labels)
    assert loss.item() == pytest.approx(sum(expected.values()).item(), rel=1e-5)
    assert criterion.conf_loss.item() == pytest.approx(expected['classification'].item(), rel=1e-5)
    assert criterion.loc_loss.item() == pytest.approx(expected['bbox_regression'].item(), rel=1e-5)


@pytest.mark.parametrize('alpha', [1., 2.5])
def test_parts_of_the_loss_are_detached_and_add_up_to_it(coarse_priors, alpha):
    boxes = random_objects(6, 3)
    criterion = MultiBoxLoss(coarse_priors, alpha=alpha)
    loss = criterion(*random_predictions(2, 190, 5), boxes, random_labels(boxes, 5))
    parts = criterion.conf_loss, criterion.loc_loss
    assert loss.requires_grad and not any(part.requires_grad for part in parts)
    assert all(part.shape == () and part > 0 for part in parts)
    assert loss == criterion.conf_loss + alpha * criterion.loc_loss


@pytest.mark.parametrize('counts', [(6, 0, 3), (0, 0)], ids=['objects', 'no objects'])
def test_loss_of_padded_tensors_equals_that_of_lists(coarse_priors, counts):
    boxes = random_objects(*counts)
    labels = random_labels(boxes, 5)
    locs, scores = random_predictions(len(counts), 190, 5)
    criterion = MultiBoxLoss(coarse_priors)
    of_lists = criterion(locs, scores, boxes, labels)
    padded = utils.pad_objects(boxes, labels)
    of_tensors = criterion(locs, scores, *padded)
    assert of_lists == of_tensors
    for a, b in zip(compute_gradients(of_lists, locs, scores),
                    compute_gradients(of_tensors, locs, scores)):
        assert torch.equal(a, b)
    assert criterion.count_positives(boxes, labels) == criterion.count_positives(*padded)


@pytest.mark.parametrize('counts', [(6, 3, 0, 12), (0, 0, 4, 1), (0, 0, 0, 0)], ids=str)
def test_losses_and_gradients_of_micro_batches_add_up_to_those_of_the_batch(coarse_priors, counts):
    boxes = random_objects(*counts)
    labels = random_labels(boxes, 5)
    locs, scores = random_predictions(4, 190, 5)
    criterion = MultiBoxLoss(coarse_priors)
    loss = criterion(locs, scores, boxes, labels)
    n_positives = criterion.count_positives(boxes, labels)
    micro_batches = [criterion(locs[part], scores[part], boxes[part], labels[part], n_positives)
                     for part in (slice(0, 2), slice(2, 4))]
    torch.testing.assert_close(sum(micro_batches), loss)
    torch.testing.assert_close(compute_gradients(sum(micro_batches), locs, scores),
                               compute_gradients(loss, locs, scores))


def test_infinite_offset_of_a_negative_prior_leaves_loss_and_gradients_finite(coarse_priors):
    boxes = random_objects(6, 0)
    labels = random_labels(boxes, 5)
    criterion = MultiBoxLoss(coarse_priors)
    locs, scores = random_predictions(2, 190, 5)
    expected = criterion(locs, scores, boxes, labels)
    positive = criterion.match(boxes, labels)[1] > 0
    assert positive.any() and not positive[1].any()
    infinite = locs.detach().clone()
    infinite[~positive] = torch.tensor([math.inf, -math.inf, 0., math.inf])
    infinite.requires_grad_()
    loss = criterion(infinite, scores, boxes, labels)
    assert loss == expected and loss.isfinite()
    gradients = compute_gradients(loss, infinite, scores)
    assert all(gradient.isfinite().all() for gradient in gradients)
    assert (gradients[0][~positive] == 0).all() and (gradients[0][positive] != 0).any()


def test_batch_without_objects_needs_no_second_compilation(coarse_priors):
    criterion = MultiBoxLoss(coarse_priors)
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return graph

    torch.compiler.reset()
    criterion.compute_losses = torch.compile(criterion.compute_losses, backend=count, dynamic=False)
    for counts in ((6, 3), (0, 0), (1, 0)):
        boxes = random_objects(*counts)
        criterion(*random_predictions(2, 190, 5), boxes, random_labels(boxes, 5)).backward()
    assert len(graphs) == 1


def test_loss_and_gradients_of_a_batch_without_objects_are_0(coarse_priors):
    locs, scores = random_predictions(2, 190, 6)
    loss = MultiBoxLoss(coarse_priors)(locs, scores, 2 * [torch.zeros(0, 4)],
                                       2 * [torch.zeros(0, dtype=torch.long)])
    loss.backward()
    assert loss == 0
    assert (locs.grad == 0).all() and (scores.grad == 0).all()


def test_only_positives_and_the_hardest_negatives_have_gradients(coarse_priors):
    boxes = random_objects(6, 0, 3)
    labels = random_labels(boxes, 5)
    locs, scores = random_predictions(3, 190, 5)
    MultiBoxLoss(coarse_priors)(locs, scores, boxes, labels).backward()
    positive = matched_objects(coarse_priors, boxes) >= 0
    assert torch.equal((locs.grad != 0).any(dim=2), positive)
    selected = (scores.grad != 0).any(dim=2)
    assert selected[positive].all() and not selected[1].any()
    losses = -scores.detach().log_softmax(dim=2)[..., 0]
    for i in (0, 2):
        negatives = selected[i] & ~positive[i]
        assert negatives.sum() == 3 * positive[i].sum()
        assert losses[i][negatives].min() > losses[i][~selected[i]].max()


@pytest.mark.parametrize(('threshold', 'box', 'are_enough'), [
    (0.5, (0.1, 0.1, 0.5, 0.5), True), (0.1, (0., 0., 1., 1.), False)])
def test_number_of_hard_negatives_is_exact_also_with_equal_losses(coarse_priors, threshold, box,
                                                                  are_enough):
    scores = torch.zeros(2, 190, 5, requires_grad=True)
    boxes = [torch.tensor([box]), torch.zeros(0, 4)]
    labels = [torch.tensor([3]), torch.zeros(0, dtype=torch.long)]
    criterion = MultiBoxLoss(coarse_priors, threshold=threshold)
    criterion(torch.zeros(2, 190, 4), scores, boxes, labels).backward()
    n_positives = (matched_objects(coarse_priors, boxes, threshold)[0] >= 0).sum().item()
    n_selected = (scores.grad != 0).any(dim=2).sum(dim=1).tolist()
    assert (4 * n_positives <= 190) == are_enough
    assert n_selected == [min(4 * n_positives, 190), 0]


def test_loss_of_perfect_predictions_is_near_0(priors):
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


def test_arguments_are_not_modified(coarse_priors):
    boxes = random_objects(6, 3)
    arguments = (torch.randn(2, 190, 4), torch.randn(2, 190, 5), boxes, random_labels(boxes, 5))
    flat = [coarse_priors, *arguments[:2], *arguments[2], *arguments[3]]
    before = [tensor.clone() for tensor in flat]
    MultiBoxLoss(coarse_priors)(*arguments)
    assert len(arguments[2]) == len(arguments[3]) == 2
    assert all(torch.equal(a, b) for a, b in zip(flat, before))


# --------------------------------------------------------------------------------------------------
# Nothing waits for a GPU
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(('operation', 'wait'), [
    (lambda x: x.sum().item(), 'item'),
    (lambda x: bool(x.any()), '__bool__'),
    (lambda x: x.tolist(), 'tolist'),
    (lambda x: x.cpu(), 'cpu'),
    (lambda x: x.numpy(), 'numpy'),
    (lambda x: float(x[0]), '__float__'),
    (lambda x: [5, 6, 7][x[0]], '__index__'),
    (lambda x: x.nonzero(), 'nonzero'),
    (lambda x: x[x > 1], 'index'),
    (lambda x: x.masked_select(x > 1), 'masked_select'),
    (lambda x: x.unique(), 'unique'),
    (lambda x: torch.equal(x, x), 'equal'),
    (lambda x: x.bincount(), 'bincount'),
    (lambda x: x.repeat_interleave(x), 'repeat_interleave'),
    (lambda x: x.view(1, 3).__setitem__((torch.arange(1), torch.arange(1)), 0), 'lift_fresh'),
], ids=lambda value: value if isinstance(value, str) else '')
def test_operations_that_wait_for_a_gpu_are_recorded(record_waits, operation, wait):
    numbers = torch.arange(3)
    with record_waits() as recorder:
        operation(numbers)
    assert any(wait in name for name in recorder.waits), recorder.waits
    recorder.waits.clear()
    operation(numbers)      # after the block, and without a wait within it
    with record_waits() as other:
        numbers.masked_fill(numbers > 1, 0)[numbers.argsort()].repeat_interleave(2)
    assert recorder.waits == other.waits == [] and other.n_calls > 3


def test_loss_does_not_wait_for_the_gpu(coarse_priors, record_waits):
    locs, scores = random_predictions(3, 190, 5)
    criterion = MultiBoxLoss(coarse_priors)
    for counts in ((6, 0, 3), (0, 0, 0)):
        boxes = random_objects(*counts)
        labels = random_labels(boxes, 5)
        for arguments in ((boxes, labels), utils.pad_objects(boxes, labels)):
            with record_waits() as recorder:
                n_positives = criterion.count_positives(*arguments)
                criterion(locs, scores, *arguments).backward()
                criterion(locs, scores, *arguments, n_positives).backward()
            assert recorder.waits == []
            assert recorder.n_calls > 40
