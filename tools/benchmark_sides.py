"""The two sides of the benchmark, this project and torchvision, and their input.

Letters: N images in a batch, P = 8732 priors, C classes with background 0, O objects in an image.
"""

import functools
import math
import pathlib
import random
import sys
import threading

import torch
from torchvision.models.detection import ssd300_vgg16
from torchvision.ops import box_iou

from model import EVALUATION, MAX_CANDIDATES, N_PRIORS, SSD300, MultiBoxLoss, create_prior_boxes
from support.compilation import compile_network_and_loss
from support.device import move_for_training
from support.errors import UserError
from support.gradient_scaling import make_scaler
from train import Run, Schedule, make_optimizer, set_lr, train
from utils import (
    INPUT_SIZE,
    cxcy_to_gcxgcy,
    cxcy_to_xy,
    find_jaccard_overlap,
    label_map as voc_label_map,
    normalize,
    pad_objects,
    xy_to_cxcy,
)

N_CLASSES = len(voc_label_map)
VOC07_TEST_IMAGES = 4951
# So low that the numbers stay finite, however many steps are taken on noise.
LR, WEIGHT_DECAY = 1e-6, 5e-4


# --------------------------------------------------------------------------------------------------
# Objects, and simulated outputs of a network
# --------------------------------------------------------------------------------------------------


@functools.cache
def load_objects(path):
    """Load the objects of many images.

    Args:
        path: a file as for the parameter `boxes`, or None for random objects.

    Returns:
        A list of (boxes (O, 4) in fractions, labels (O,)), O at least 1.

    Raises:
        UserError: an invalid line, or a file without objects.
    """
    if path is None:
        return create_random_objects(VOC07_TEST_IMAGES)
    images = []
    lines = pathlib.Path(path).read_text(encoding='utf-8').splitlines()
    for number, line in enumerate(lines, 1):
        try:
            rows = torch.tensor([float(word) for word in line.split()[1:]]).view(-1, 5)
            if ((rows[:, 4] < 0) | (rows[:, 4] > N_CLASSES - 2)).any():
                raise ValueError(f'a class is not from 0 to {N_CLASSES - 2}')
        except (ValueError, RuntimeError) as error:
            raise UserError(f'{path}, line {number}: {error}; a line is a name and five numbers '
                            f'per object: xmin ymin xmax ymax class') from error
        if len(rows) == 0:
            continue
        boxes = rows[:, :4] - torch.tensor([1., 1, 0, 0])
        # The file has no image sizes; most of VOC's images are 500 x 375.
        size = torch.maximum(boxes[:, 2:].amax(dim=0), torch.tensor([500., 375]))
        images.append((boxes / size.repeat(2), rows[:, 4].long() + 1))
    if not images:
        raise UserError(f'{path} has no objects; give another --boxes, or none')
    return images


def create_random_objects(n_images):
    """Create objects of random position and size, 2.4 per image on average, as in VOC07 test."""
    rng = torch.Generator().manual_seed(0)
    counts = 1 + torch.poisson(torch.full((n_images,), 1.4), rng).long()
    n_objects = int(counts.sum())
    sides = 0.05 + 0.9 * torch.rand(n_objects, 2, generator=rng) ** 1.5    # mostly small
    corners = (1 - sides) * torch.rand(n_objects, 2, generator=rng)
    boxes = torch.cat([corners, corners + sides], dim=1)
    labels = torch.randint(1, N_CLASSES, (n_objects,), generator=rng)
    return list(zip(boxes.split(counts.tolist()), labels.split(counts.tolist())))


def sample_objects(path, n_images, device):
    """Sample the objects of n images of `load_objects()`: lists of boxes and of labels."""
    images = random.Random(0).choices(load_objects(path), k=n_images)
    return ([boxes.to(device) for boxes, _ in images], [labels.to(device) for _, labels in images])


def simulate_trained_outputs(priors_cxcy, boxes, labels, n_candidates=170):
    """Simulate the output of a trained network.

    `n_candidates` per image score above evaluation's `min_score`: the priors with the highest IoU
    with an object, which predict its box with noise; the higher the IoU, the higher the score. The
    others predict background with high confidence.

    Args:
        priors_cxcy: (P, 4)
        boxes, labels: lists of N tensors (O, 4) in fractions and (O,).

    Returns:
        locs (N, P, 4) and scores (N, P, C).
    """
    torch.manual_seed(0)
    shape, device = (len(boxes), len(priors_cxcy)), priors_cxcy.device
    locs, scores = (torch.randn(*shape, n, device=device) for n in (4, N_CLASSES))
    scores[:, :, 0] += 12
    best = [find_jaccard_overlap(b, cxcy_to_xy(priors_cxcy)).max(dim=0) for b in boxes]
    overlap = torch.stack([values for values, _ in best])      # (N, P)
    overlap += torch.randn(shape, device=device) / 20
    threshold = overlap.flatten().topk(n_candidates * len(boxes)).values[-1]
    min_score = EVALUATION['min_score']
    for i, (_, obj) in enumerate(best):
        prior = (overlap[i] > threshold - 0.1).nonzero().squeeze(1)
        true_cxcy = xy_to_cxcy(boxes[i][obj[prior]])
        locs[i, prior] += cxcy_to_gcxgcy(true_cxcy, priors_cxcy[prior])
        # The probability is min_score at the threshold and rises to near 1 above it. A third of
        # these priors predict a random class.
        log_odds = math.log(min_score / (1 - min_score)) + 15 * (overlap[i, prior] - threshold)
        random_labels = torch.randint(1, N_CLASSES, prior.shape, device=device)
        predicted = torch.where(torch.rand(prior.shape, device=device) < 1 / 3, random_labels,
                                labels[i][obj[prior]])
        scores[i, prior, predicted] = scores[i, prior, 0] + log_odds
    return locs, scores


def simulate_untrained_outputs(n_images, device):
    """Simulate the output of an untrained network: all scores are above evaluation's `min_score`.

    Returns:
        locs (N, P, 4) and scores (N, P, C).
    """
    torch.manual_seed(0)
    return (torch.randn(n_images, N_PRIORS, 4, device=device) / 10,
            torch.randn(n_images, N_PRIORS, N_CLASSES, device=device) / 10)


# --------------------------------------------------------------------------------------------------
# The two sides
# --------------------------------------------------------------------------------------------------


class DiscardingLog:
    """A `TrainingLog` that shows and writes nothing."""

    def update(self, losses, is_finite, n_images):
        """Discard the numbers of an iteration."""

    def restart_clock(self):
        """Measure nothing."""


class OurSide:
    """This project: the network, its loss and its detection.

    Args:
        device: that it runs on.
        network_class: SSD300 or SSD512.

    Attributes:
        network: the model, or compiled.
    """

    def __init__(self, device, network_class=SSD300):
        torch.manual_seed(0)
        self.model = network_class(N_CLASSES).to(device, memory_format=torch.channels_last)
        self.network, self.input_size = self.model, network_class.input_size
        self.criterion = MultiBoxLoss(self.model.priors_cxcy).to(device)

    def forward(self, images):
        """Predict locs (N, P, 4) and scores (N, P, C) for normalized images (N, 3, 300, 300)."""
        return self.network(images)

    def make_targets(self, boxes, labels):
        """Convert lists of boxes and labels to what the loss takes."""
        return pad_objects(boxes, labels)

    def make_batch(self, images, boxes, labels):
        """Make a batch of `prepare_training()`."""
        return images, *self.make_targets(boxes, labels)

    def loss(self, locs, scores, targets):
        """Compute the loss of a batch, a scalar."""
        return self.criterion(locs, scores, *targets)

    def detect(self, locs, scores):
        """Detect objects in a batch."""
        return self.model.detect_objects(locs, scores, **EVALUATION)

    def prepare_training(self, dtype, batch_size, compile_choice='off', log=None,
                         print_freq=sys.maxsize):
        """Prepare a training run of `train.train()`, so that its very steps are measured.

        Args:
            dtype: of mixed precision.
            compile_choice: as the parameter `compile`.
            log: a TrainingLog, which gets a row every `print_freq` iterations; None: no log.

        Returns:
            Function that trains on batches, an iterable, after `start` iterations.
        """
        device = self.model.priors_cxcy.device
        move_for_training(self.model, device)
        autocast = torch.autocast(device.type, dtype, enabled=dtype != torch.float32)
        self.network = compile_network_and_loss(compile_choice, self.model, self.criterion,
                                                autocast, batch_size,
                                                self.input_size)
        optimizer = make_optimizer(self.model, 'sgd', WEIGHT_DECAY)
        scaler = make_scaler(dtype, device)
        run = Run(self.model, optimizer, scaler, settings={}, checkpoint=None, test_loader=None,
                  autocast=autocast, log=log or DiscardingLog())

        def train_on(batches, start=0):
            """Train on batches."""
            # Without an end, nothing is saved or evaluated.
            schedule = Schedule(start, sys.maxsize, LR, warmup=0, decay_lr_at=(),
                                print_freq=print_freq, save_every=sys.maxsize, eval_every=0)
            train(self.network, self.criterion, optimizer, scaler, autocast, batches, 1, schedule,
                  run, threading.Event())
        return train_on


class TorchvisionSide:
    """torchvision's SSD300, with the thresholds and priors of this project.

    The parts of `SSD.forward()` without the resizing of images, which `OurSide` does not do either.
    """

    input_size = INPUT_SIZE

    def __init__(self, device):
        torch.manual_seed(0)
        self.model = ssd300_vgg16(
            weights=None, weights_backbone=None, num_classes=N_CLASSES,
            score_thresh=EVALUATION['min_score'], nms_thresh=EVALUATION['max_overlap'],
            detections_per_img=EVALUATION['top_k'], topk_candidates=MAX_CANDIDATES)
        self.model.to(device, memory_format=torch.channels_last)
        self.anchors = (cxcy_to_xy(create_prior_boxes()) * INPUT_SIZE).to(device)

    def forward(self, images):
        """Predict locs (N, P, 4) and scores (N, P, C) for normalized images (N, 3, 300, 300)."""
        outputs = self.model.head(list(self.model.backbone(images).values()))
        return outputs['bbox_regression'], outputs['cls_logits']

    def make_targets(self, boxes, labels):
        """Convert lists of boxes and labels to what the loss takes."""
        return [{'boxes': b * INPUT_SIZE, 'labels': l} for b, l in zip(boxes, labels)]

    def make_batch(self, images, boxes, labels):
        """Make a batch of `prepare_training()`."""
        return images, self.make_targets(boxes, labels)

    def loss(self, locs, scores, targets):
        """Compute the loss of a batch, a scalar."""
        matches = [self.model.proposal_matcher(box_iou(target['boxes'], self.anchors))
                   for target in targets]
        losses = self.model.compute_loss(targets, {'bbox_regression': locs, 'cls_logits': scores},
                                         [self.anchors] * len(targets), matches)
        return losses['classification'] + losses['bbox_regression']

    @torch.no_grad()
    def detect(self, locs, scores):
        """Detect objects in a batch."""
        return self.model.postprocess_detections(
            {'bbox_regression': locs, 'cls_logits': scores}, [self.anchors] * len(locs),
            [(INPUT_SIZE, INPUT_SIZE)] * len(locs))

    def prepare_training(self, dtype, batch_size, compile_choice='off'):
        """Prepare the usual training loop of PyTorch, which is never compiled.

        Returns:
            Function that trains on batches, an iterable.
        """
        device = self.anchors.device
        move_for_training(self.model, device)
        move_for_training(self.model.backbone, device)  # what `forward()` calls with the images
        autocast = torch.autocast(device.type, dtype, enabled=dtype != torch.float32)
        optimizer = make_optimizer(self.model, 'sgd', WEIGHT_DECAY)
        set_lr(optimizer, LR)

        def train_on(batches):
            """Train on batches."""
            for images, targets in batches:
                with autocast:
                    locs, scores = self.forward(normalize(images))
                loss = self.loss(locs.float(), scores.float(), targets)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
        return train_on


SIDES = (OurSide, TorchvisionSide)
