"""SSD300: the network, its priors, its loss, and the way from its output to boxes.

Read it top to bottom: the table of feature maps; base, auxiliary and prediction convolutions; the
steps from predictions to boxes; the network made of all these; the steps of the loss, and the loss.

Paper: Liu et al., "SSD: Single Shot MultiBox Detector", 2016, https://arxiv.org/abs/1512.02325

Letters in comments and docstrings:
N images in a batch, P = 8732 priors, C classes with background 0, O objects in an image.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torchvision.models import VGG16_Weights

from utils import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    UserError,
    cxcy_to_gcxgcy,
    cxcy_to_xy,
    default_label_map,
    download_weights,
    find_jaccard_overlap,
    gcxgcy_to_cxcy,
    normalize,
    rank_in_group,
    suppress_in_groups,
    xy_to_cxcy,
)


class FeatureMap(NamedTuple):
    """One of the six maps that predictions are made from."""

    name: str
    channels: int
    size: int                          # cells along a side
    scale: float                       # side of the square prior, as a fraction of the image
    aspect_ratios: tuple[float, ...]   # width over height

    @property
    def n_priors_per_cell(self):
        """One prior a ratio, and a second, larger square."""
        return len(self.aspect_ratios) + 1


# The one table that priors, prediction heads and the number 8732 come from: what another input
# size changes. Sizes: figure 2 of the paper. Scales: 0.2 to 0.9 in equal steps (section 2.2), and
# 0.1 for conv4_3 (section 3.1, as the ratios of each map).
FEATURE_MAPS = (
    FeatureMap('conv4_3', 512, 38, 0.1, (1., 2., 1 / 2)),
    FeatureMap('conv7', 1024, 19, 0.2, (1., 2., 3., 1 / 2, 1 / 3)),
    FeatureMap('conv8_2', 512, 10, 0.375, (1., 2., 3., 1 / 2, 1 / 3)),
    FeatureMap('conv9_2', 256, 5, 0.55, (1., 2., 3., 1 / 2, 1 / 3)),
    FeatureMap('conv10_2', 256, 3, 0.725, (1., 2., 1 / 2)),
    FeatureMap('conv11_2', 256, 1, 0.9, (1., 2., 1 / 2)),
)
N_PRIORS = sum(map_.size ** 2 * map_.n_priors_per_cell for map_ in FEATURE_MAPS)  # 8732


# --------------------------------------------------------------------------------------------------
# The base: VGG-16, changed where the paper's section 3 says
# --------------------------------------------------------------------------------------------------


class VGGBase(nn.Module):
    """VGG-16 without its classifier, which becomes two convolutions.

    The third pooling rounds its size up (75 cells become 38, not 37), the fifth keeps the size,
    fc6 and fc7 become conv6 and conv7. It starts random; see `load_pretrained_layers()`.
    """

    def __init__(self):
        super().__init__()
        self.conv1_1 = nn.Conv2d(3, 64, kernel_size=3, padding=1)
        self.conv1_2 = nn.Conv2d(64, 64, kernel_size=3, padding=1)
        self.pool1 = nn.MaxPool2d(kernel_size=2, stride=2)

        self.conv2_1 = nn.Conv2d(64, 128, kernel_size=3, padding=1)
        self.conv2_2 = nn.Conv2d(128, 128, kernel_size=3, padding=1)
        self.pool2 = nn.MaxPool2d(kernel_size=2, stride=2)

        self.conv3_1 = nn.Conv2d(128, 256, kernel_size=3, padding=1)
        self.conv3_2 = nn.Conv2d(256, 256, kernel_size=3, padding=1)
        self.conv3_3 = nn.Conv2d(256, 256, kernel_size=3, padding=1)
        self.pool3 = nn.MaxPool2d(kernel_size=2, stride=2, ceil_mode=True)

        self.conv4_1 = nn.Conv2d(256, 512, kernel_size=3, padding=1)
        self.conv4_2 = nn.Conv2d(512, 512, kernel_size=3, padding=1)
        self.conv4_3 = nn.Conv2d(512, 512, kernel_size=3, padding=1)
        self.pool4 = nn.MaxPool2d(kernel_size=2, stride=2)

        self.conv5_1 = nn.Conv2d(512, 512, kernel_size=3, padding=1)
        self.conv5_2 = nn.Conv2d(512, 512, kernel_size=3, padding=1)
        self.conv5_3 = nn.Conv2d(512, 512, kernel_size=3, padding=1)
        self.pool5 = nn.MaxPool2d(kernel_size=3, stride=1, padding=1)

        # fc6 saw 7x7 cells. Every third of them makes a 3x3 kernel; the dilation spreads it over
        # 13x13, more than the old view, because pool5 no longer halves the map.
        self.conv6 = nn.Conv2d(512, 1024, kernel_size=3, padding=6, dilation=6)
        self.conv7 = nn.Conv2d(1024, 1024, kernel_size=1)

        for layer in self.children():
            if isinstance(layer, nn.Conv2d):
                nn.init.kaiming_normal_(layer.weight, nonlinearity='relu')  # He et al., 2015
                nn.init.zeros_(layer.bias)

    def forward(self, image):
        """Map images (N, 3, 300, 300) to conv4_3_feats (N, 512, 38, 38) and conv7_feats.

        conv4_3_feats come before their L2 normalization; conv7_feats are (N, 1024, 19, 19).
        """
        out = F.relu(self.conv1_1(image))               # (N, 64, 300, 300)
        out = F.relu(self.conv1_2(out))
        out = self.pool1(out)                           # (N, 64, 150, 150)

        out = F.relu(self.conv2_1(out))                 # (N, 128, 150, 150)
        out = F.relu(self.conv2_2(out))
        out = self.pool2(out)                           # (N, 128, 75, 75)

        out = F.relu(self.conv3_1(out))                 # (N, 256, 75, 75)
        out = F.relu(self.conv3_2(out))
        out = F.relu(self.conv3_3(out))
        out = self.pool3(out)                           # (N, 256, 38, 38)

        out = F.relu(self.conv4_1(out))                 # (N, 512, 38, 38)
        out = F.relu(self.conv4_2(out))
        conv4_3_feats = F.relu(self.conv4_3(out))
        out = self.pool4(conv4_3_feats)                 # (N, 512, 19, 19)

        out = F.relu(self.conv5_1(out))
        out = F.relu(self.conv5_2(out))
        out = F.relu(self.conv5_3(out))
        out = self.pool5(out)                           # (N, 512, 19, 19)

        out = F.relu(self.conv6(out))                   # (N, 1024, 19, 19)
        conv7_feats = F.relu(self.conv7(out))
        return conv4_3_feats, conv7_feats

    def load_pretrained_layers(self):
        """Take over torchvision's VGG-16 weights of ImageNet, downloaded once (528 MB) and kept.

        Those weights expect the mean and std that `utils.normalize()` uses.

        Raises:
            UserError: the weights cannot be had; the message says what to do.
        """
        vgg = download_weights(VGG16_Weights.IMAGENET1K_V1,
                               'train from scratch with --no-pretrained')

        # The convolutions of both stand in the same order. torchvision numbers all its layers,
        # ReLU and pooling included; `features` is everything before the classifier.
        vgg_convs = sorted({int(key.split('.')[1]) for key in vgg if key.startswith('features.')})
        own_convs = [name for name, layer in self.named_children() if isinstance(layer, nn.Conv2d)]
        assert len(vgg_convs) == len(own_convs) - 2, f'{len(vgg_convs)} and {len(own_convs)} layers'
        state = {f'{own}.{kind}': vgg[f'features.{number}.{kind}']
                 for own, number in zip(own_convs, vgg_convs) for kind in ('weight', 'bias')}

        # fc6 is a 7x7 convolution over 512 channels, fc7 a 1x1 convolution over 4096.
        fc6, fc7 = vgg['classifier.0.weight'], vgg['classifier.3.weight']
        state['conv6.weight'] = decimate(fc6.view(4096, 512, 7, 7), (4, None, 3, 3))
        state['conv6.bias'] = decimate(vgg['classifier.0.bias'], (4,))
        state['conv7.weight'] = decimate(fc7.view(4096, 4096, 1, 1), (4, 4, None, None))
        state['conv7.bias'] = decimate(vgg['classifier.3.bias'], (4,))
        self.load_state_dict(state, strict=True)  # a key too many or too few raises


def decimate(tensor, steps):
    """Keep every `steps[d]`-th slice of `tensor` along each dimension d (None: all of them)."""
    assert tensor.dim() == len(steps), f'{tensor.dim()} dimensions and {len(steps)} steps'
    return tensor[tuple(slice(None, None, step) for step in steps)].clone()


# --------------------------------------------------------------------------------------------------
# The convolutions on top, and the predictions
# --------------------------------------------------------------------------------------------------


class AuxiliaryConvolutions(nn.Module):
    """Four pairs of convolutions after the base: each map is smaller and sees more of the image."""

    def __init__(self):
        super().__init__()
        self.conv8_1 = nn.Conv2d(1024, 256, kernel_size=1)
        self.conv8_2 = nn.Conv2d(256, 512, kernel_size=3, stride=2, padding=1)

        self.conv9_1 = nn.Conv2d(512, 128, kernel_size=1)
        self.conv9_2 = nn.Conv2d(128, 256, kernel_size=3, stride=2, padding=1)

        self.conv10_1 = nn.Conv2d(256, 128, kernel_size=1)
        self.conv10_2 = nn.Conv2d(128, 256, kernel_size=3)

        self.conv11_1 = nn.Conv2d(256, 128, kernel_size=1)
        self.conv11_2 = nn.Conv2d(128, 256, kernel_size=3)

        for layer in self.children():
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, conv7_feats):
        """Map conv7_feats (N, 1024, 19, 19) to the maps of conv8_2, conv9_2, conv10_2, conv11_2."""
        out = F.relu(self.conv8_1(conv7_feats))         # (N, 256, 19, 19)
        conv8_2_feats = F.relu(self.conv8_2(out))       # (N, 512, 10, 10)

        out = F.relu(self.conv9_1(conv8_2_feats))       # (N, 128, 10, 10)
        conv9_2_feats = F.relu(self.conv9_2(out))       # (N, 256, 5, 5)

        out = F.relu(self.conv10_1(conv9_2_feats))      # (N, 128, 5, 5)
        conv10_2_feats = F.relu(self.conv10_2(out))     # (N, 256, 3, 3)

        out = F.relu(self.conv11_1(conv10_2_feats))     # (N, 128, 3, 3)
        conv11_2_feats = F.relu(self.conv11_2(out))     # (N, 256, 1, 1)
        return conv8_2_feats, conv9_2_feats, conv10_2_feats, conv11_2_feats


class PredictionConvolutions(nn.Module):
    """For each map two 3x3 convolutions: offsets and class scores of the priors of each cell."""

    def __init__(self, n_classes):
        super().__init__()
        self.n_classes = n_classes
        self.loc_convs = nn.ModuleList()
        self.class_convs = nn.ModuleList()
        for map_ in FEATURE_MAPS:
            n_priors = map_.n_priors_per_cell
            self.loc_convs.append(nn.Conv2d(map_.channels, n_priors * 4, 3, padding=1))
            self.class_convs.append(nn.Conv2d(map_.channels, n_priors * n_classes, 3, padding=1))

        for layer in (*self.loc_convs, *self.class_convs):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, *feature_maps):
        """Map the six feature maps to locs (N, P, 4) and classes_scores (N, P, C).

        Row p of both belongs to prior p: maps in the table's order, cells row by row, and the
        priors of a cell in the order of `SSD300.create_prior_boxes()`.
        """
        assert len(feature_maps) == len(FEATURE_MAPS), f'{len(feature_maps)} maps, not 6'
        locs, classes_scores = [], []
        for feats, loc_conv, class_conv in zip(feature_maps, self.loc_convs, self.class_convs):
            # The channels of a cell are its priors' numbers, one prior after the other: with the
            # channels last, a reshape lines the priors of all cells up.
            loc = loc_conv(feats).permute(0, 2, 3, 1)               # (N, size, size, priors * 4)
            scores = class_conv(feats).permute(0, 2, 3, 1)          # (N, size, size, priors * C)
            locs.append(loc.reshape(len(feats), -1, 4))
            classes_scores.append(scores.reshape(len(feats), -1, self.n_classes))
        return torch.cat(locs, dim=1), torch.cat(classes_scores, dim=1)


class L2Rescale(torch.autograd.Function):
    """L2 normalization over the channels, times a factor a channel.

    `F.normalize(feats.float(), dim=1, eps=epsilon) * factors`, in float32 even under autocast: the
    squares of 512 channels overflow half precision. The epsilon keeps a cell of zeros from becoming
    NaN. Autograd would keep several float32 maps of 3 MB an image, a tenth of a bf16 step's memory;
    here the backward pass makes them anew, 4 images at a time.
    """

    @staticmethod
    def forward(ctx, feats, factors, epsilon=1e-10):
        """Feats (N, C, H, W) and factors (1, C, 1, 1) to (N, C, H, W), in the feats' dtype."""
        length = torch.linalg.vector_norm(feats, dim=1, keepdim=True, dtype=torch.float32)
        length = length.clamp_(min=epsilon)                             # (N, 1, H, W)
        ctx.save_for_backward(feats, factors, length)
        return (feats / length).mul_(factors).to(feats.dtype)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        """A unit vector's gradient is the part of the incoming one that does not lengthen it."""
        feats, factors, length = ctx.saved_tensors
        grad_feats, grad_factors = torch.empty_like(feats), torch.zeros_like(factors)
        for start in range(0, len(feats), 4):
            some = slice(start, start + 4)
            unit = feats[some] / length[some]
            grad_factors += (unit * grad[some]).sum(dim=(0, 2, 3), keepdim=True)
            grad_unit = grad[some] * factors
            along = (unit * grad_unit).sum(dim=1, keepdim=True)
            grad_feats[some] = grad_unit.sub_(unit.mul_(along)).div_(length[some])
        return grad_feats, grad_factors, None


# --------------------------------------------------------------------------------------------------
# From the network's output to boxes: the steps of SSD300.detect_objects()
# --------------------------------------------------------------------------------------------------


# How many candidates of a class enter non-maximum suppression (nms_param.top_k of the Caffe code).
MAX_CANDIDATES_PER_CLASS = 400


def find_candidates(log_probs, min_score):
    """Which (image, class, prior) score above `min_score`, at most 400 of an image's class.

    Args:
        log_probs: (N, P, C - 1), without the background.

    Returns:
        For the M candidates: group (image * (C - 1) + class), prior, log_prob, (M,) each.
    """
    n_images, n_priors, n_classes = log_probs.shape
    bar = math.log(max(min_score, torch.finfo(torch.float32).tiny))
    image, prior, class_ = (log_probs > bar).nonzero(as_tuple=True)
    group = image * n_classes + class_

    # Only an early network has more than 400 in a class. Those classes pick their best anew.
    crowded = torch.bincount(group, minlength=n_images * n_classes) > MAX_CANDIDATES_PER_CLASS
    calm = ~crowded[group]
    crowded = crowded.nonzero().squeeze(1)                              # (R,)
    rows = log_probs[crowded // n_classes, :, crowded % n_classes]      # (R, P)
    best = rows.topk(min(MAX_CANDIDATES_PER_CLASS, n_priors), dim=1).indices
    group = torch.cat([group[calm], crowded.repeat_interleave(best.shape[1])])
    prior = torch.cat([prior[calm], best.flatten()])
    return group, prior, log_probs[group // n_classes, prior, group % n_classes]


# --------------------------------------------------------------------------------------------------
# The network
# --------------------------------------------------------------------------------------------------


# Mean and std of the images (red, green, blue, from 0 to 1) and the shortest length that conv4_3's
# normalization divides by. Like the priors, others trained with others.
OWN_CONSTANTS = {'image_mean': IMAGENET_MEAN, 'image_std': IMAGENET_STD, 'l2_epsilon': 1e-10}


def add_own_constants(model, state, prefix, *_):
    """Complete a state dict from the time when every model had the same constants."""
    for name, value in OWN_CONSTANTS.items():
        state.setdefault(prefix + name, torch.tensor(value))


def spread_priors(sizes, n_cells, cells_across):
    """Boxes of some sizes around the centre of each cell of a map, row by row.

    Args:
        sizes: (width, height) of the priors of a cell, fractions of the image.
        n_cells: of a side of the map.
        cells_across: cells that fit into the image, `n_cells` unless the last one stands out.

    Returns:
        (n_cells * n_cells * sizes, 4), centre and size in fractions.
    """
    centres = (torch.arange(n_cells) + 0.5) / cells_across
    cy, cx = torch.meshgrid(centres, centres, indexing='ij')
    cells = torch.stack([cx, cy], dim=2).view(-1, 1, 2)                 # (cells, 1, 2)
    return torch.cat(torch.broadcast_tensors(cells, torch.tensor(sizes)), dim=2).view(-1, 4)


class SSD300(nn.Module):
    """The whole network: base, auxiliary and prediction convolutions, and the priors.

    `label_map` (class name to index, background 0) travels with the model, and in the state dict so
    do the priors, `image_mean`, `image_std` and `l2_epsilon`: published weights bring their own.
    """

    def __init__(self, n_classes):
        super().__init__()
        self.n_classes = n_classes
        self.label_map = default_label_map(n_classes)

        self.base = VGGBase()
        self.aux_convs = AuxiliaryConvolutions()
        self.pred_convs = PredictionConvolutions(n_classes)

        # conv4_3's values are much larger than those of later maps. L2 normalization over the
        # channels evens them out, and a learned factor a channel starts at 20 (section 3.1).
        self.rescale_factors = nn.Parameter(torch.full((1, 512, 1, 1), 20.))
        self.register_buffer('priors_cxcy', self.create_prior_boxes())  # (P, 4)
        for name, value in OWN_CONSTANTS.items():
            self.register_buffer(name, torch.tensor(value))
        self.register_load_state_dict_pre_hook(add_own_constants)

    def normalize(self, images):
        """Turn uint8 images (N, 3, 300, 300) on the model's device into the floats it takes."""
        return normalize(images, self.image_mean, self.image_std)

    def forward(self, image):
        """Map normalized images (N, 3, 300, 300) to locs (N, P, 4) and scores (N, P, C).

        The locs are offsets from the priors (see `utils.cxcy_to_gcxgcy`), the scores come before
        the softmax.
        """
        conv4_3_feats, conv7_feats = self.base(image)
        conv4_3_feats = L2Rescale.apply(conv4_3_feats, self.rescale_factors, self.l2_epsilon)
        return self.pred_convs(conv4_3_feats, conv7_feats, *self.aux_convs(conv7_feats))

    @staticmethod
    def create_prior_boxes():
        """The P priors of the table, centre and size in fractions of the image: (P, 4).

        Map by map, row by row; in a cell ratio 1, the extra square, then the other ratios.
        """
        scales = [map_.scale for map_ in FEATURE_MAPS] + [1.]
        priors_of_maps = []
        for map_, scale, next_scale in zip(FEATURE_MAPS, scales, scales[1:]):
            # Section 2.2: the extra square lies between this map's scale and the next one's.
            extra = math.sqrt(scale * next_scale)
            sizes = [(scale * math.sqrt(r), scale / math.sqrt(r)) for r in map_.aspect_ratios]
            sizes = [sizes[0], (extra, extra), *sizes[1:]]
            priors_of_maps.append(spread_priors(sizes, map_.size, map_.size))
        priors_cxcy = torch.cat(priors_of_maps).clamp(0, 1)
        assert priors_cxcy.shape == (N_PRIORS, 4), f'{tuple(priors_cxcy.shape)}, not {N_PRIORS}'
        return priors_cxcy

    @classmethod
    def from_checkpoint(cls, path):
        """The model of a checkpoint: on the CPU, in evaluation mode. No code of the file is run.

        Besides what `train.py` wrote it knows the weights that others published: see
        `published.read_checkpoint()`.

        Raises:
            UserError: the file is missing, truncated, or of another program.
        """
        from published import read_checkpoint  # which needs the names above
        checkpoint = read_checkpoint(path)
        if not all(isinstance(checkpoint.get(key), dict) for key in ('model', 'label_map')):
            raise UserError(f'{path} is not a checkpoint of this program: it holds '
                            f'{sorted(map(str, checkpoint))[:5]}, not the dictionaries model and '
                            f'label_map; give one that train.py wrote, or an SSD300 of '
                            f'torchvision, ssd.pytorch or a-PyTorch-Tutorial-to-Object-Detection')
        model = cls(n_classes=len(checkpoint['label_map']))
        try:
            model.load_state_dict(checkpoint['model'])
        except (RuntimeError, TypeError, AttributeError) as error:
            reason = str(error).strip().splitlines()[-1].strip()[:200]
            raise UserError(f'the weights in {path} do not fit an SSD300 of {model.n_classes} '
                            f'classes ({reason}); give one that train.py wrote') from error
        model.label_map = checkpoint['label_map']
        return model.eval()

    @torch.no_grad()
    def detect_objects(self, predicted_locs, predicted_scores, min_score, max_overlap, top_k):
        """From the network's output to boxes, the whole batch at once.

        Softmax; per class the best 400 scores above `min_score`, and non-maximum suppression at
        `max_overlap`; over all classes the best `top_k` of an image. Evaluation uses 0.01, 0.45
        and 200 (section 3.7 of the paper), the eye likes 0.2, 0.5 and 200.

        Args:
            predicted_locs: (N, P, 4), as the network gives them.
            predicted_scores: (N, P, C), as the network gives them.

        Returns:
            Three lists of N tensors, each by falling score: boxes (n, 4) as corners in fractions
            of the image and clipped to it, labels (n,) int64, scores (n,). Nothing found: n = 0.
        """
        n_images, n_priors, n_classes = predicted_scores.shape
        assert predicted_locs.shape == (n_images, n_priors, 4), f'locs {predicted_locs.shape}'
        assert n_priors == len(self.priors_cxcy), f'{n_priors} rows, {len(self.priors_cxcy)} priors'

        # One number names the image and the class of a candidate: NMS works group by group.
        log_probs = predicted_scores.float().log_softmax(dim=2)[:, :, 1:]   # (N, P, C - 1)
        group, prior, score = find_candidates(log_probs, min_score)         # (M,) each
        order = score.argsort(descending=True, stable=True)
        order = order[group[order].argsort(stable=True)]                    # by group, then score
        group, prior, score = group[order], prior[order], score[order].exp()

        image = group // (n_classes - 1)
        label = group % (n_classes - 1) + 1
        locs = predicted_locs[image, prior].float()
        boxes = cxcy_to_xy(gcxgcy_to_cxcy(locs, self.priors_cxcy[prior]))   # (M, 4)

        keep = suppress_in_groups(boxes, group, max_overlap)
        image, label, score, boxes = image[keep], label[keep], score[keep], boxes[keep]

        order = score.argsort(descending=True, stable=True)
        order = order[image[order].argsort(stable=True)]                    # by image, then score
        order = order[rank_in_group(image[order]) < top_k]
        counts = torch.bincount(image[order], minlength=n_images).tolist()
        return (list(boxes[order].clamp(0, 1).split(counts)), list(label[order].split(counts)),
                list(score[order].split(counts)))


# --------------------------------------------------------------------------------------------------
# The loss
# --------------------------------------------------------------------------------------------------


def join_key(overlap, number):
    """One int64 that sorts by overlap and then by number, both from 0 up.

    The bits of such floats, read as whole numbers, sort like the floats.
    """
    return (overlap.view(torch.int32).long() << 32) + number


def split_key(key):
    """The overlap and the number that `join_key()` joined."""
    return (key >> 32).int().view(torch.float32), key & 0xffffffff


def own_priors(overlap, image, n_images, most):
    """One prior for every object, no two objects of an image the same.

    Of all pairs of an object and a prior the one that overlaps most is taken, then the best of
    the pairs left, and so on (equal overlaps: lower object, then lower prior). A pair that does
    not overlap is never taken.

    With `most` objects in an image, others can take at most `most - 1` priors from an object: its
    `most` best are all that need looking at, and the rounds work on a handful of numbers.

    Args:
        overlap: (T, P), of the objects of all images with the priors.
        image: (T,), sorted: the image of each object.
        n_images: N, so that images without objects count.
        most: the number of objects in the image that has the most.

    Returns:
        (T,) the prior of each object, -1 where nothing overlaps or nothing is left.
    """
    n_objects, n_priors = overlap.shape
    device = overlap.device
    # Which of two equal values `topk` returns is open, so the prior joins the key.
    keys = join_key(overlap, n_priors - 1 - torch.arange(n_priors, device=device))
    overlap, prior = split_key(keys.topk(min(most, n_priors), dim=1).values)    # (T, K)
    prior = n_priors - 1 - prior

    # From one list of objects to a row an image, filled up with overlaps of 0: (N, most, K)
    first = torch.searchsorted(image, torch.arange(n_images, device=device))
    place = torch.arange(n_objects, device=device) - first[image]       # (T,)
    left = overlap.new_zeros(n_images, most, prior.shape[1])
    left[image, place] = overlap
    priors = torch.full_like(left, -1, dtype=torch.long)
    priors[image, place] = prior

    row = torch.arange(n_images, device=device)
    own = torch.full((n_images, most), -1, device=device)
    nothing = left.new_zeros(())    # to write a plain 0 by index would wait for a GPU
    for _ in range(most):
        best, pair = left.flatten(1).max(dim=1)                         # (N,), the first of equals
        object_, taken = pair // left.shape[2], priors.flatten(1)[row, pair]
        own[row, object_] = torch.where(best > 0, taken, own[row, object_])
        left[row, object_] = nothing
        left = left.masked_fill(priors == taken.view(-1, 1, 1), 0)
    return own[image, place]


def hard_negatives(losses, positive, n_wanted):
    """The negatives with the highest losses.

    How many differs from image to image, and `topk` wants one number that the host knows. So each
    image gets as many infinite losses beside its own that P are taken in each.

    Args:
        losses: (N, P).
        positive: (N, P) bool, never chosen.
        n_wanted: (N, 1), how many; fewer are chosen where there are fewer negatives.

    Returns:
        (N, P) bool.
    """
    n_priors = losses.shape[1]
    n_wanted = torch.minimum(n_wanted, (~positive).sum(dim=1, keepdim=True))
    losses = losses.masked_fill(positive, -math.inf)
    places = torch.arange(n_priors, device=losses.device)
    filler = torch.where(places < n_priors - n_wanted, math.inf, -math.inf)     # (N, P)
    chosen = torch.cat([losses, filler.to(losses)], dim=1)                      # (N, 2P)
    chosen = chosen.topk(n_priors, dim=1, sorted=False).indices
    mask = torch.zeros(len(losses), 2 * n_priors, dtype=torch.bool, device=losses.device)
    return mask.scatter_(1, chosen, True)[:, :n_priors]


class CrossEntropy(torch.autograd.Function):
    """Cross entropy of every row: scores (..., C) and classes (...) to (...).

    The numbers of `F.cross_entropy(reduction='none')`, with one large tensor where autograd has
    three: the gradient takes the place of the logarithms. A second backward pass is an error.
    """

    @staticmethod
    def forward(ctx, scores, classes):
        """Minus the logarithm of the class's softmax."""
        log_probs, classes = scores.log_softmax(dim=-1), classes.unsqueeze(-1)
        ctx.save_for_backward(log_probs, classes)
        return -log_probs.gather(-1, classes).squeeze(-1)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        """The softmax, less 1 at the class, times the incoming gradient."""
        log_probs, classes = ctx.saved_tensors
        grad = grad.unsqueeze(-1)
        return log_probs.exp_().mul_(grad).scatter_add_(-1, classes, -grad), None


class MultiBoxLoss(nn.Module):
    """Match priors with objects, then add up classification and localization loss (section 2.2).

    The classification loss is a cross entropy over the positive priors and the hardest negatives,
    the localization loss a smooth L1 over the positives' offsets. Both are summed over the batch
    and divided by its number of positives.

    All images at once, and nothing waits for the device: masks multiply, they never index.

    Args:
        priors_cxcy: (P, 4), centre and size in fractions.
        threshold: overlap from which a prior takes an object.
        neg_pos_ratio: hard negatives for one positive.
        alpha: weight of the localization loss.
    """

    def __init__(self, priors_cxcy, threshold=0.5, neg_pos_ratio=3, alpha=1.):
        super().__init__()
        self.threshold = threshold
        self.neg_pos_ratio = neg_pos_ratio
        self.alpha = alpha
        self.register_buffer('priors_cxcy', priors_cxcy, persistent=False)
        self.register_buffer('priors_xy', cxcy_to_xy(priors_cxcy), persistent=False)

    def forward(self, predicted_locs, predicted_scores, boxes, labels):
        """The loss of a batch, a scalar.

        Args:
            predicted_locs: (N, P, 4) offsets.
            predicted_scores: (N, P, C), before the softmax.
            boxes: list of N tensors (O, 4), corners in fractions. O may be 0.
            labels: list of N tensors (O,), int64, never 0.
        """
        true_cxcy, true_classes = self.match(boxes, labels)             # (N, P, 4), (N, P)
        conf_loss, loc_loss = self.parts(predicted_locs, predicted_scores, true_cxcy, true_classes,
                                         n_positives=(true_classes > 0).sum())
        return conf_loss + self.alpha * loc_loss

    def parts(self, predicted_locs, predicted_scores, true_cxcy, true_classes, n_positives):
        """Classification and localization loss, two scalars.

        Sums over the images given, divided by `n_positives`: that of the whole batch, of which
        these images may be a part. The losses, and the gradients, of the parts add up to the
        whole's.

        Args:
            predicted_locs, predicted_scores: as in `forward()`.
            true_cxcy, true_classes: as from `match()`.
            n_positives: number of positive priors in the batch, a scalar tensor.
        """
        n_images, n_priors, n_classes = predicted_scores.shape
        assert n_priors == len(self.priors_cxcy), f'{n_priors} rows, {len(self.priors_cxcy)} priors'
        assert len(true_classes) == n_images, f'{len(true_classes)} targets, {n_images} images'
        predicted_locs, predicted_scores = predicted_locs.float(), predicted_scores.float()
        n_positives = n_positives.clamp(min=1)

        positive = true_classes > 0                                     # (N, P)
        true_locs = cxcy_to_gcxgcy(true_cxcy, self.priors_cxcy)
        loc_loss = F.smooth_l1_loss(predicted_locs, true_locs, reduction='none').sum(dim=2)
        cross_entropy = CrossEntropy.apply(predicted_scores, true_classes)      # (N, P)
        n_negatives = self.neg_pos_ratio * positive.sum(dim=1, keepdim=True)    # (N, 1)
        counts = positive | hard_negatives(cross_entropy.detach(), positive, n_negatives)
        return ((cross_entropy * counts).sum() / n_positives,
                (loc_loss * positive).sum() / n_positives)

    @torch.no_grad()
    def match(self, boxes, labels):
        """The object that each prior of each image has to predict.

        Every object first gets a prior of its own, the best pairs first (see `own_priors()`).
        Every other prior takes its best object if they overlap by at least the threshold.

        Args:
            boxes, labels: as in `forward()`.

        Returns:
            true_cxcy (N, P, 4), centre and size of the object (for a prior without one the prior
            itself, whose offsets are 0), and true_classes (N, P), 0 where it is background.
        """
        n_images, n_priors = len(boxes), len(self.priors_xy)
        device, most = self.priors_xy.device, max(map(len, boxes))
        # The objects of all images in one list of T, each with its image's number.
        image = torch.cat([torch.full((len(b),), i, device=device) for i, b in enumerate(boxes)])
        boxes, labels = torch.cat(boxes).float(), torch.cat(labels)     # (T, 4), (T,)
        assert len(boxes) == len(labels) == len(image), f'{len(boxes)} boxes, {len(labels)} labels'
        true_cxcy = self.priors_cxcy.expand(n_images, -1, -1)
        true_classes = labels.new_zeros(n_images, n_priors)
        n_objects = len(boxes)
        if n_objects == 0:
            return true_cxcy, true_classes

        overlap = find_jaccard_overlap(boxes, self.priors_xy)           # (T, P)
        own_prior = own_priors(overlap, image, n_images, most)          # (T,), -1 for none

        # Each prior's best overlap with an object of an image, and that object (first of equals).
        keys = join_key(overlap, n_objects - 1 - torch.arange(n_objects, device=device)[:, None])
        rows = image.unsqueeze(1).expand(-1, n_priors)                  # (T, P)
        best = torch.full_like(true_classes, -1).scatter_reduce_(0, rows, keys, 'amax')
        best, object_ = split_key(best)                                 # (N, P)
        object_ = n_objects - 1 - object_
        taken = best >= self.threshold      # the key -1 of an image without objects splits to NaN

        # The forced matches come last and overwrite. An object without one writes into a column
        # that is cut off again.
        column = torch.where(own_prior >= 0, own_prior, n_priors)
        object_ = F.pad(object_, (0, 1))
        object_[image, column] = torch.arange(n_objects, device=device)
        taken = F.pad(taken, (0, 1))
        taken[image, column] = torch.ones_like(column, dtype=torch.bool)
        object_, taken = object_[:, :n_priors], taken[:, :n_priors]

        object_ = object_.clamp(min=0)      # that of an image without objects, never taken
        true_cxcy = torch.where(taken.unsqueeze(2), xy_to_cxcy(boxes)[object_], true_cxcy)
        return true_cxcy, torch.where(taken, labels[object_], true_classes)
