"""What benchmark.py measures: objects, outputs of a network, and the two sides that are compared.

Letters: N images in a batch, P = 8732 priors, C classes with background 0, O objects in an image.
"""

import functools
import math
import pathlib
import random

import torch
from torchvision.models.detection import ssd300_vgg16
from torchvision.ops import box_iou

from eval import MAX_OVERLAP, MIN_SCORE, TOP_K
from machine import compile_or_not
from model import MAX_CANDIDATES_PER_CLASS, N_PRIORS, SSD300, MultiBoxLoss
from train import try_out
from utils import (
    SIDE,
    UserError,
    cxcy_to_gcxgcy,
    cxcy_to_xy,
    find_jaccard_overlap,
    label_map as voc_label_map,
    xy_to_cxcy,
)

N_CLASSES = len(voc_label_map)
VOC07_TEST_IMAGES = 4951


# --------------------------------------------------------------------------------------------------
# Objects, and outputs of a network that has seen them
# --------------------------------------------------------------------------------------------------


@functools.cache
def load_objects(path):
    """Objects of many images: a list of (boxes (O, 4) in fractions, labels (O,)), O at least 1.

    Args:
        path: a file as the parameter `boxes` wants it, or None to make objects up.
    """
    if path is None:
        return make_up_objects(VOC07_TEST_IMAGES)
    images = []
    lines = pathlib.Path(path).read_text(encoding='utf-8').splitlines()
    for number, line in enumerate(lines, 1):
        try:
            rows = torch.tensor([float(word) for word in line.split()[1:]]).view(-1, 5)
            if ((rows[:, 4] < 0) | (rows[:, 4] > N_CLASSES - 2)).any():
                raise ValueError(f'a class is not from 0 to {N_CLASSES - 2}')
        except (ValueError, RuntimeError) as error:
            raise UserError(f'{path}, line {number}: {error}; a line is a name and five numbers '
                            f'an object: xmin ymin xmax ymax class') from error
        if len(rows) == 0:
            continue
        boxes = rows[:, :4] - torch.tensor([1., 1, 0, 0])
        # The images' sizes are not in the file; most of VOC's are 500 x 375.
        size = torch.maximum(boxes[:, 2:].amax(dim=0), torch.tensor([500., 375]))
        images.append((boxes / size.repeat(2), rows[:, 4].long() + 1))
    if not images:
        raise UserError(f'{path} has no objects; give another --boxes, or none')
    return images


def make_up_objects(n_images):
    """Objects of random place and size, 2.4 an image in the mean, as VOC07 test has them."""
    dice = torch.Generator().manual_seed(0)
    counts = 1 + torch.poisson(torch.full((n_images,), 1.4), dice).long()
    n_objects = int(counts.sum())
    sides = 0.05 + 0.9 * torch.rand(n_objects, 2, generator=dice) ** 1.5    # small ones prevail
    corners = (1 - sides) * torch.rand(n_objects, 2, generator=dice)
    boxes = torch.cat([corners, corners + sides], dim=1)
    labels = torch.randint(1, N_CLASSES, (n_objects,), generator=dice)
    return list(zip(boxes.split(counts.tolist()), labels.split(counts.tolist())))


def some_objects(path, n_images, device):
    """The objects of n images of `load_objects()`: lists of boxes and labels."""
    chosen = random.Random(0).choices(load_objects(path), k=n_images)
    return ([boxes.to(device) for boxes, _ in chosen], [labels.to(device) for _, labels in chosen])


def realistic_outputs(priors_cxcy, boxes, labels, n_candidates=170):
    """Outputs of a trained network: `n_candidates` an image score above `MIN_SCORE`.

    The priors that overlap an object most find it, the better they lie the surer. Of the others
    the background is sure. Returns locs (N, P, 4) and scores (N, P, C).
    """
    torch.manual_seed(0)
    shape, device = (len(boxes), N_PRIORS), priors_cxcy.device
    locs, scores = (torch.randn(*shape, n, device=device) for n in (4, N_CLASSES))
    scores[:, :, 0] += 12
    found = [find_jaccard_overlap(b, cxcy_to_xy(priors_cxcy)).max(dim=0) for b in boxes]
    overlap = torch.stack([values for values, _ in found])     # (N, P)
    overlap += torch.randn(shape, device=device) / 20
    bar = overlap.flatten().topk(n_candidates * len(boxes)).values[-1]
    for i, (_, object_) in enumerate(found):
        prior = (overlap[i] > bar - 0.1).nonzero().squeeze(1)
        own = xy_to_cxcy(boxes[i][object_[prior]])
        locs[i, prior] += cxcy_to_gcxgcy(own, priors_cxcy[prior])
        # At the bar the probability is MIN_SCORE, above it rises to near 1. A third is mistaken.
        odds = math.log(MIN_SCORE / (1 - MIN_SCORE)) + 15 * (overlap[i, prior] - bar)
        wrong = torch.randint(1, N_CLASSES, prior.shape, device=device)
        class_ = torch.where(torch.rand(prior.shape, device=device) < 1 / 3, wrong,
                             labels[i][object_[prior]])
        scores[i, prior, class_] = scores[i, prior, 0] + odds
    return locs, scores


def untrained_outputs(n_images, device):
    """Outputs of a network at its start: every class of every prior is above `MIN_SCORE`."""
    torch.manual_seed(0)
    return (torch.randn(n_images, N_PRIORS, 4, device=device) / 10,
            torch.randn(n_images, N_PRIORS, N_CLASSES, device=device) / 10)


# --------------------------------------------------------------------------------------------------
# The two sides
# --------------------------------------------------------------------------------------------------


class OurSide:
    """What is measured of this project."""

    def __init__(self, device):
        torch.manual_seed(0)
        self.model = SSD300(N_CLASSES).to(device)
        self.network = self.model
        self.criterion = MultiBoxLoss(self.model.priors_cxcy).to(device)

    def compile(self, choice, device, dtype, batch_size):
        """Compile network and loss, if the choice is to."""
        self.network, self.criterion.parts = compile_or_not(
            choice, device, (self.model, self.criterion.parts),
            functools.partial(try_out, device, dtype, batch_size))

    def forward(self, images):
        """Normalized images (N, 3, 300, 300) to locs (N, P, 4), scores (N, P, C)."""
        return self.network(images)

    def targets(self, boxes, labels):
        """What the loss takes of lists of boxes and labels."""
        return boxes, labels

    def loss(self, locs, scores, targets):
        """The loss of a batch, a scalar."""
        return self.criterion(locs, scores, *targets)

    def detect(self, locs, scores):
        """The detections of a batch."""
        return self.model.detect_objects(locs, scores, MIN_SCORE, MAX_OVERLAP, TOP_K)


class TorchvisionSide:
    """The same of torchvision's SSD300, with this project's thresholds and priors.

    The pieces of `SSD.forward`, but for the transform of the images, which ours lacks too.
    """

    def __init__(self, device):
        torch.manual_seed(0)
        self.model = ssd300_vgg16(
            weights=None, weights_backbone=None, num_classes=N_CLASSES, score_thresh=MIN_SCORE,
            nms_thresh=MAX_OVERLAP, detections_per_img=TOP_K,
            topk_candidates=MAX_CANDIDATES_PER_CLASS)
        self.model.to(device)
        self.anchors = (cxcy_to_xy(SSD300.create_prior_boxes()) * SIDE).to(device)

    def forward(self, images):
        """Normalized images (N, 3, 300, 300) to locs (N, P, 4), scores (N, P, C)."""
        outputs = self.model.head(list(self.model.backbone(images).values()))
        return outputs['bbox_regression'], outputs['cls_logits']

    def targets(self, boxes, labels):
        """What the loss takes of lists of boxes and labels."""
        return [{'boxes': b * SIDE, 'labels': l} for b, l in zip(boxes, labels)]

    def loss(self, locs, scores, targets):
        """The loss of a batch, a scalar."""
        matches = [self.model.proposal_matcher(box_iou(target['boxes'], self.anchors))
                   for target in targets]
        parts = self.model.compute_loss(targets, {'bbox_regression': locs, 'cls_logits': scores},
                                        [self.anchors] * len(targets), matches)
        return parts['classification'] + parts['bbox_regression']

    @torch.no_grad()
    def detect(self, locs, scores):
        """The detections of a batch."""
        return self.model.postprocess_detections(
            {'bbox_regression': locs, 'cls_logits': scores}, [self.anchors] * len(locs),
            [(SIDE, SIDE)] * len(locs))


SIDES = (OurSide, TorchvisionSide)
