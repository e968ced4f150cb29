"""SSD300: priors, network, detection and loss.

Read it top to bottom: the table of feature maps and the priors made from it; base, auxiliary and
prediction convolutions; the network made of all these, and how its output becomes boxes; matching,
hard negative mining and the loss; SSD512, the same for larger images.

Paper: Liu et al., "SSD: Single Shot MultiBox Detector", 2016, https://arxiv.org/abs/1512.02325

Letters in comments and docstrings:
N images in a batch, P = 8732 priors, C classes with background 0, O objects in an image.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torchvision.models import VGG16_BN_Weights, VGG16_Weights

from support.batch_norm import fold_batch_norm, is_norm
from support.checkpoints import download_weights
from support.errors import UserError
from support.l2_rescale import l2_rescale
from support.published import check_classes, read_checkpoint
from utils import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    INPUT_SIZE,
    cxcy_to_gcxgcy,
    cxcy_to_xy,
    default_label_map,
    find_jaccard_overlap,
    gcxgcy_to_cxcy,
    non_max_suppression,
    normalize,
    pad_objects,
    xy_to_cxcy,
)

# --------------------------------------------------------------------------------------------------
# Feature maps and priors
#
# Predictions are made from six feature maps. Each cell of a map has a few priors: boxes of fixed
# size and shape, centered on the cell. Early maps with many cells have small priors, late maps with
# few cells have large ones.
# --------------------------------------------------------------------------------------------------


class FeatureMap(NamedTuple):
    """A feature map that predictions are made from: a row of the table."""

    name: str
    channels: int
    size: int                          # cells along a side
    scale: float                       # side of the square prior, as a fraction of the image
    aspect_ratios: tuple[float, ...]   # width / height

    @property
    def n_priors_per_cell(self):
        """One prior per aspect ratio, and one additional square."""
        return len(self.aspect_ratios) + 1


# The priors, the prediction convolutions and the number 8732 come from this table; another input
# size means another table (see `SSD512`). Sizes: figure 2 of the paper. Scales: 0.2 to 0.9 in equal
# steps (section 2.2), and 0.1 for conv4_3 (section 3.1, which also gives the aspect ratios). In the
# Caffe code: 0.1, 0.2, 0.37, 0.54, 0.71, 0.88.
FEATURE_MAPS = (
    FeatureMap('conv4_3', 512, 38, 0.1, (1., 2., 1 / 2)),
    FeatureMap('conv7', 1024, 19, 0.2, (1., 2., 3., 1 / 2, 1 / 3)),
    FeatureMap('conv8_2', 512, 10, 0.375, (1., 2., 3., 1 / 2, 1 / 3)),
    FeatureMap('conv9_2', 256, 5, 0.55, (1., 2., 3., 1 / 2, 1 / 3)),
    FeatureMap('conv10_2', 256, 3, 0.725, (1., 2., 1 / 2)),
    FeatureMap('conv11_2', 256, 1, 0.9, (1., 2., 1 / 2)),
)
N_PRIORS = sum(feature_map.size ** 2 * feature_map.n_priors_per_cell
               for feature_map in FEATURE_MAPS)     # 8732
SCALES = (*(feature_map.scale for feature_map in FEATURE_MAPS), 1.)     # 1: the whole image


def create_prior_boxes(scales=SCALES, feature_maps=FEATURE_MAPS):
    """Create the priors of all feature maps.

    Map by map, cell by cell (row by row). In a cell: aspect ratio 1, the additional square, then
    the other aspect ratios. For a scale s and an aspect ratio r, width = s * sqrt(r) and
    height = s / sqrt(r), so that the area is s * s for every r.

    Args:
        scales: those of the maps, and of the one that would follow.
        feature_maps: the table.

    Returns:
        (P, 4), center and size (cx, cy, w, h) in fractions of the image. No side is longer than the
        image's (the last maps would have a few, and do in the Caffe code), but priors may reach
        beyond its border.
    """
    priors = []
    for feature_map, scale, next_scale in zip(feature_maps, scales, scales[1:]):
        sizes = [(scale * math.sqrt(r), scale / math.sqrt(r)) for r in feature_map.aspect_ratios]
        # From one map to the next the scale grows by a factor of up to 2.5. The additional square,
        # at the geometric mean of both scales, covers the objects in between (section 2.2).
        middle = math.sqrt(scale * next_scale)
        sizes.insert(1, (middle, middle))
        for row in range(feature_map.size):
            for column in range(feature_map.size):
                cx, cy = (column + 0.5) / feature_map.size, (row + 0.5) / feature_map.size
                priors.extend((cx, cy, width, height) for width, height in sizes)
    return torch.tensor(priors).clamp(0, 1)     # (P, 4)


# --------------------------------------------------------------------------------------------------
# The base: VGG-16 with the changes of the paper's section 3
# --------------------------------------------------------------------------------------------------


class VGGBase(nn.Module):
    """VGG-16 whose fully connected layers fc6 and fc7 became the convolutions conv6 and conv7.

    The third pooling rounds the size up (75 cells become 38, not 37), and the fifth pooling keeps
    the size. The weights are random; `load_pretrained_layers()` loads those of ImageNet.
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

        # fc6 had a 7x7 kernel, of which every third row and column is kept: a 3x3 kernel with
        # dilation 3. As pool5 no longer halves the map, distances double: dilation 6.
        self.conv6 = nn.Conv2d(512, 1024, kernel_size=3, padding=6, dilation=6)
        self.conv7 = nn.Conv2d(1024, 1024, kernel_size=1)

        for layer in self.children():
            if isinstance(layer, nn.Conv2d):
                nn.init.kaiming_normal_(layer.weight, nonlinearity='relu')  # He et al., 2015
                nn.init.zeros_(layer.bias)

    def forward(self, image):
        """Compute the feature maps conv4_3 and conv7.

        Args:
            image: (N, 3, 300, 300), normalized.

        Returns:
            conv4_3_feats (N, 512, 38, 38), before their L2 normalization, and conv7_feats
            (N, 1024, 19, 19).
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
        """Load torchvision's ImageNet weights of VGG-16, downloaded once (528 MB) and cached.

        They were trained with the mean and std that `utils.normalize()` uses. A base with batch
        normalization (`support/batch_norm.py`) takes those of VGG-16 with batch normalization.

        Raises:
            UserError: the weights cannot be downloaded or read.
        """
        # fc6 and fc7 have no batch normalization in either VGG-16. That of conv6 and conv7 keeps
        # its initial mean of 0 and variance of 1.
        state = {key: tensor for key, tensor in self.state_dict().items() if is_norm(key)}
        vgg = download_weights((VGG16_BN_Weights if state else VGG16_Weights).IMAGENET1K_V1,
                               otherwise='train from scratch with --no-pretrained')

        # conv1_1 to conv5_3: the same layers in the same order. torchvision counts ReLU and pooling
        # layers, too: features.0.weight, features.2.weight, features.5.weight, ...
        features = [key.split('.') for key in vgg if key.startswith('features.')]
        numbers = sorted({int(number) for _, number, _ in features})
        names = [name for name, layer in self.named_modules()
                 if isinstance(layer, (nn.Conv2d, nn.BatchNorm2d))
                 and not name.startswith(('conv6', 'conv7'))]
        assert len(numbers) == len(names), f'{len(numbers)} and {len(names)} layers'
        name_of = dict(zip(numbers, names))     # {0: 'conv1_1', 2: 'conv1_2', 5: 'conv2_1', ...}
        state |= {f'{name_of[int(number)]}.{kind}': vgg[f'features.{number}.{kind}']
                  for _, number, kind in features}

        # A fully connected layer is a convolution whose kernel covers its whole input: 7x7 cells of
        # 512 channels for fc6, one cell of 4096 channels for fc7. Decimation keeps every 4th filter
        # of both (so every 4th input of fc7), and every 3rd row and column of fc6's kernels.
        fc6 = vgg['classifier.0.weight'].view(4096, 512, 7, 7)
        fc7 = vgg['classifier.3.weight'].view(4096, 4096, 1, 1)
        state['conv6.weight'] = decimate(fc6, (4, None, 3, 3))          # (1024, 512, 3, 3)
        state['conv6.bias'] = decimate(vgg['classifier.0.bias'], (4,))
        state['conv7.weight'] = decimate(fc7, (4, 4, None, None))       # (1024, 1024, 1, 1)
        state['conv7.bias'] = decimate(vgg['classifier.3.bias'], (4,))
        self.load_state_dict(state, strict=True)    # a missing or an unexpected key raises


def decimate(tensor, steps):
    """Keep every `steps[d]`-th slice of a tensor along each dimension d (None: all of them)."""
    assert tensor.dim() == len(steps), f'{tensor.dim()} dimensions and {len(steps)} steps'
    return tensor[tuple(slice(None, None, step) for step in steps)].clone()


# --------------------------------------------------------------------------------------------------
# Auxiliary and prediction convolutions
# --------------------------------------------------------------------------------------------------


class AuxiliaryConvolutions(nn.Module):
    """Four pairs of convolutions after the base, for maps with fewer cells and larger objects."""

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

        for layer in self.children():   # (Caffe's xavier has a variance of 1 / fan-in)
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, conv7_feats):
        """Compute the feature maps conv8_2, conv9_2, conv10_2 and conv11_2.

        Args:
            conv7_feats: (N, 1024, 19, 19).
        """
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
    """Two 3x3 convolutions per feature map: one for offsets, one for class scores.

    For each cell they predict 4 offsets and C scores per prior of that cell.
    """

    def __init__(self, n_classes, feature_maps=FEATURE_MAPS):
        super().__init__()
        self.n_classes = n_classes
        self.loc_convs = nn.ModuleList()
        self.class_convs = nn.ModuleList()
        for feature_map in feature_maps:
            channels, n_priors = feature_map.channels, feature_map.n_priors_per_cell
            self.loc_convs.append(nn.Conv2d(channels, n_priors * 4, 3, padding=1))
            self.class_convs.append(nn.Conv2d(channels, n_priors * n_classes, 3, padding=1))

        for layer in (*self.loc_convs, *self.class_convs):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, *feature_maps):
        """Predict offsets and class scores for all priors.

        Args:
            feature_maps: the maps of the table, in its order.

        Returns:
            locs (N, P, 4) and classes_scores (N, P, C). Row p of both is for prior p, in the order
            of `create_prior_boxes()`.
        """
        n_maps = len(self.loc_convs)
        assert len(feature_maps) == n_maps, f'{len(feature_maps)} maps, not {n_maps}'
        locs, classes_scores = [], []
        for feats, loc_conv, class_conv in zip(feature_maps, self.loc_convs, self.class_convs):
            # The channels of a cell hold the numbers of its first prior, then those of its second,
            # and so on. With channels last, a reshape gives one row per prior, cell after cell.
            loc = loc_conv(feats).permute(0, 2, 3, 1)               # (N, size, size, priors * 4)
            scores = class_conv(feats).permute(0, 2, 3, 1)          # (N, size, size, priors * C)
            locs.append(loc.reshape(feats.shape[0], -1, 4))
            classes_scores.append(scores.reshape(feats.shape[0], -1, self.n_classes))
        return torch.cat(locs, dim=1), torch.cat(classes_scores, dim=1)


# --------------------------------------------------------------------------------------------------
# The network
# --------------------------------------------------------------------------------------------------

# Thresholds of detect_objects(). Evaluation: section 3.7 of the paper and its code; changing these
# makes the mean average precision (utils.py, section 7) incomparable. Visualization: what the
# network is reasonably confident of.
EVALUATION = {'min_score': 0.01, 'max_overlap': 0.45, 'top_k': 200}
VISUALIZATION = {'min_score': 0.2, 'max_overlap': 0.5, 'top_k': 200}

# At most this many candidates per class and image enter non-maximum suppression, as in the Caffe
# code (nms_param.top_k).
MAX_CANDIDATES = 400

# Upper bound of the offsets of width and height: 62.5 times the prior's, as in torchvision. No
# object in an image is that large, but exp() of a diverged network's offsets would overflow.
MAX_SIZE_OFFSET = 5 * math.log(1000 / 16)

# Constants that belong to the weights: mean and std of the images (red, green, blue, from 0 to 1),
# whether these are resized with antialiasing, and the epsilon of conv4_3's normalization. Weights
# that were published elsewhere were trained with other values, and bring them along in their state
# dict.
CONSTANTS = {'image_mean': IMAGENET_MEAN, 'image_std': IMAGENET_STD, 'antialias': True,
             'l2_epsilon': 1e-10}


class SSD300(nn.Module):
    """The network: base, auxiliary and prediction convolutions, and the priors.

    Attributes:
        label_map: class names to indices, background 0.
        priors_cxcy: (P, 4), center and size in fractions; a buffer, saved with the weights.
    """

    # What another input size changes, see `SSD512`.
    input_size = INPUT_SIZE     # width and height of the images, in pixels
    feature_maps = FEATURE_MAPS
    make_aux_convs = AuxiliaryConvolutions
    scales = SCALES             # of the priors, see `create_prior_boxes()`

    def __init__(self, n_classes):
        super().__init__()
        self.n_classes = n_classes
        self.label_map = default_label_map(n_classes)

        self.base = VGGBase()
        self.aux_convs = self.make_aux_convs()
        self.pred_convs = PredictionConvolutions(n_classes, self.feature_maps)

        # conv4_3's activations are much larger than those of the later maps, and would dominate the
        # gradients. So they are normalized in each cell and scaled by one learned factor per
        # channel, 20 at the start (section 3.1).
        self.rescale_factors = nn.Parameter(torch.full((1, 512, 1, 1), 20.))

        self.register_buffer('priors_cxcy', self.create_prior_boxes())
        for name, value in CONSTANTS.items():
            self.register_buffer(name, torch.tensor(value))

    @classmethod
    def create_prior_boxes(cls, scales=None):
        """Create the priors (P, 4) of this network; None: with its scales."""
        return create_prior_boxes(scales or cls.scales, cls.feature_maps)

    def normalize(self, images):
        """Convert uint8 images (N, 3, 300, 300) to the floats that `forward()` takes."""
        return normalize(images, self.image_mean, self.image_std)

    def forward(self, image):
        """Predict offsets and class scores for all priors.

        Args:
            image: (N, 3, 300, 300), normalized.

        Returns:
            locs (N, P, 4), offsets from the priors as in `utils.cxcy_to_gcxgcy()`, and
            classes_scores (N, P, C), before the softmax.
        """
        conv4_3_feats, conv7_feats = self.base(image)
        # F.normalize(conv4_3_feats, dim=1, eps=l2_epsilon) * rescale_factors, in less memory
        conv4_3_feats = l2_rescale(conv4_3_feats, self.rescale_factors, self.l2_epsilon)
        return self.pred_convs(conv4_3_feats, conv7_feats, *self.aux_convs(conv7_feats))

    @torch.no_grad()
    def detect_objects(self, predicted_locs, predicted_scores, min_score, max_overlap, top_k):
        """Decode the network's output to boxes, for the whole batch at once.

            softmax over the classes
            for each image and each class but the background:
                keep the priors that score above min_score, at most the best 400
                decode their offsets to boxes
                remove duplicates by non-maximum suppression at max_overlap
            for each image: keep the best top_k detections of all classes, clip them to the image

        Args:
            predicted_locs: (N, P, 4), the output of `forward()`.
            predicted_scores: (N, P, C), the output of `forward()`.
            min_score, max_overlap, top_k: see `EVALUATION` and `VISUALIZATION`.

        Returns:
            Three lists of N tensors, each by falling score: boxes (n, 4), corners in fractions of
            the image; labels (n,) int64; scores (n,). n may be 0. Priors whose offsets or
            probabilities are not finite are left out.
        """
        n_images, n_priors, n_classes = predicted_scores.shape
        assert predicted_locs.shape == (n_images, n_priors, 4), f'locs {predicted_locs.shape}'
        assert n_priors == len(self.priors_cxcy), f'{n_priors} rows, {len(self.priors_cxcy)} priors'

        probabilities = predicted_scores.float().softmax(dim=2)             # (N, P, C)
        # Softmax turns all classes of a prior into NaN if the score of one is infinite or NaN.
        is_finite = probabilities[:, :, 0].isfinite() & predicted_locs.isfinite().all(dim=2)
        probabilities.masked_fill_(~is_finite.unsqueeze(2), 0)
        # For each of M candidates the index of its image, class and prior, and its score: (M,) each
        image, label, prior, score = find_candidates(probabilities, min_score)
        locs = predicted_locs[image, prior].float()                         # (M, 4)
        # Here and not in gcxgcy_to_cxcy(), which stays the exact inverse of the encoding.
        locs[:, 2:].clamp_(max=MAX_SIZE_OFFSET)
        boxes = cxcy_to_xy(gcxgcy_to_cxcy(locs, self.priors_cxcy[prior]))   # (M, 4)

        # Indices of the kept boxes. Boxes suppress only boxes of the same class in the same image.
        kept = non_max_suppression(boxes, score, max_overlap, groups=image * n_classes + label)

        # Split by image. The sort is stable, so the indices of an image stay sorted by score.
        kept = kept[image[kept].argsort(stable=True)]
        counts = torch.bincount(image[kept], minlength=n_images).tolist()
        rows_per_image = [rows[:top_k] for rows in kept.split(counts)]
        return ([boxes[rows].clamp(0, 1) for rows in rows_per_image],
                [label[rows] for rows in rows_per_image],
                [score[rows] for rows in rows_per_image])

    @property
    def device(self):
        """Device of the weights."""
        return self.priors_cxcy.device

    @torch.no_grad()
    def detect_in_batch(self, images, min_score, max_overlap, top_k):
        """Detect objects in uint8 images (N, 3, 300, 300) on any device; see `detect_objects()`."""
        assert not self.training, 'the model is in training mode; call eval() first'
        images = images.to(self.device, non_blocking=True)
        return self.detect_objects(*self(self.normalize(images)), min_score, max_overlap, top_k)

    @classmethod
    def from_checkpoint(cls, path):
        """Load a model from a checkpoint: on the CPU, in evaluation mode, with its `label_map`.

        Reads what `train.py` wrote, and the published weights that `support/published.py` lists.
        The weights of an SSD512 make an SSD512. No code in the file is executed.

        Raises:
            UserError: the file is missing, truncated, or of another program.
        """
        checkpoint = read_checkpoint(path)
        if not all(isinstance(checkpoint.get(key), dict) for key in ('model', 'label_map')):
            raise UserError(f'{path} is not a checkpoint of this program: it holds '
                            f'{sorted(map(str, checkpoint))[:5]}, not the dictionaries model and '
                            f'label_map; give one that train.py wrote, or one of those in '
                            f'docs/manual.md, "Weights to start from"')
        try:
            return cls.from_state(checkpoint)
        except (UserError, RuntimeError, TypeError, AttributeError) as error:
            reason = str(error).strip().splitlines()[-1].strip()[:200]
            raise UserError(f'{path} holds no SSD300 of {len(checkpoint["label_map"])} classes '
                            f'({reason}); give one that train.py wrote') from error

    @classmethod
    def from_state(cls, checkpoint):
        """Build a model in evaluation mode from a checkpoint's `model` and `label_map`."""
        check_classes(checkpoint['model'], checkpoint['label_map'])
        is_ssd512 = 'aux_convs.conv12_2.weight' in checkpoint['model']
        model = (SSD512 if is_ssd512 else cls)(n_classes=len(checkpoint['label_map']))
        defaults = {name: getattr(model, name) for name in CONSTANTS}   # for files without them
        model.load_state_dict({**defaults, **fold_batch_norm(checkpoint['model'])})
        model.label_map = checkpoint['label_map']
        return model.eval()


def find_candidates(probabilities, min_score):
    """Find the priors that score above `min_score` in a class, at most 400 per class and image.

    Args:
        probabilities: (N, P, C), after the softmax; class 0 is the background.

    Returns:
        image, label, prior and score of the M candidates: (M,) each.
    """
    is_candidate = probabilities > min_score                                # (N, P, C)
    is_candidate[:, :, 0] = False

    # Only a network that has learned little has more than 400 in a class of an image. Find these R
    # (image, class) pairs, and keep their best 400.
    is_full = is_candidate.sum(dim=1) > MAX_CANDIDATES                      # (N, C)
    full_image, full_label = is_full.nonzero(as_tuple=True)                 # (R,) both
    if len(full_image) > 0:
        rows = probabilities[full_image, :, full_label]                     # (R, P)
        best = rows.topk(MAX_CANDIDATES, dim=1).indices                     # (R, 400)
        is_candidate[full_image, :, full_label] = False
        is_candidate[full_image[:, None], best, full_label[:, None]] = True
    image, prior, label = is_candidate.nonzero(as_tuple=True)               # (M,) each
    return image, label, prior, probabilities[image, prior, label]


# --------------------------------------------------------------------------------------------------
# Matching and loss
#
# The network makes 8732 predictions, an image has a few objects. Matching decides what each prior
# should have predicted: an object (a positive prior) or background (a negative one). It compares
# boxes alone and does not depend on the predictions.
# --------------------------------------------------------------------------------------------------


class MultiBoxLoss(nn.Module):
    """Match priors to objects, then add up classification and localization loss (section 2.2).

        L = (L_conf + alpha * L_loc) / N_pos

    L_conf: cross entropy, summed over the positive priors and the hard negatives, which are the
            negatives of the highest cross entropy (see `hard_negatives()`).
    L_loc:  smooth L1 between predicted and true offsets, summed over the positive priors and their
            four offsets; a negative has no object, so no true offsets.
    N_pos:  number of positive priors in the batch, at least 1; per batch, as in the Caffe code.

    All images are processed at once, and nothing synchronizes with the GPU: no `.item()`, no
    indexing with a mask.

    Args:
        priors_cxcy: (P, 4), center and size in fractions.
        threshold: IoU threshold for matching a prior to an object.
        neg_pos_ratio: number of hard negatives per positive.
        alpha: weight of the localization loss.

    Attributes:
        conf_loss, loc_loss: L_conf / N_pos and L_loc / N_pos of the last call, detached, for logs.
    """

    def __init__(self, priors_cxcy, threshold=0.5, neg_pos_ratio=3, alpha=1.):
        super().__init__()
        self.threshold = threshold
        self.neg_pos_ratio = neg_pos_ratio
        self.alpha = alpha
        self.register_buffer('priors_cxcy', priors_cxcy, persistent=False)
        self.register_buffer('priors_xy', cxcy_to_xy(priors_cxcy), persistent=False)
        self.conf_loss = self.loc_loss = None

    def forward(self, predicted_locs, predicted_scores, boxes, labels, n_positives=None):
        """Compute the loss of a batch.

        Args:
            predicted_locs: (N, P, 4) offsets.
            predicted_scores: (N, P, C), before the softmax.
            boxes: list of N tensors (O, 4), corners in fractions; O may be 0.
            labels: list of N tensors (O,), int64, from 1 on. Instead of lists, boxes and labels may
                be the padded tensors of `utils.pad_objects()`.
            n_positives: N_pos as a scalar tensor, if these images are a part of a larger batch
                (gradient accumulation, several GPUs); None: count the positives of these images.

        Returns:
            A scalar, float32.
        """
        assert len(predicted_locs) == len(boxes), f'{len(predicted_locs)} and {len(boxes)} images'
        true_locs, true_classes = self.match(boxes, labels)             # (N, P, 4), (N, P)
        conf_loss, loc_loss = self.compute_losses(predicted_locs, predicted_scores, true_locs,
                                                  true_classes)
        if n_positives is None:
            n_positives = (true_classes > 0).sum()
        n_positives = n_positives.clamp(min=1)
        conf_loss, loc_loss = conf_loss / n_positives, loc_loss / n_positives
        self.conf_loss, self.loc_loss = conf_loss.detach(), loc_loss.detach()
        return conf_loss + self.alpha * loc_loss

    def count_positives(self, boxes, labels):
        """Count the positive priors of a batch (a scalar tensor), to pass to `forward()`."""
        return (self.match(boxes, labels)[1] > 0).sum()

    @torch.no_grad()
    def match(self, boxes, labels):
        """Match priors to ground-truth boxes.

        First, every object gets one prior of its own, however small their IoU: otherwise an object
        that no prior overlaps by half, as most small and narrow ones, would have no positive prior
        and never be learned. Then every other prior is matched to the object of the highest IoU.
        Two objects with the same best prior are not in the paper; this is the Caffe code's order:

            for each image:
                repeat once per object:
                    take the pair (object, prior) of the highest IoU, if any two overlap
                    match them, and leave both out of the following rounds
                for each other prior:
                    match it to the object of the highest IoU, if that reaches the threshold

        Args:
            boxes, labels: as in `forward()`.

        Returns:
            true_locs (N, P, 4), the offsets from each prior to its object, and true_classes (N, P).
            Both are 0 for background.
        """
        boxes, labels = pad_objects(boxes, labels)                      # (N, O, 4), (N, O)
        overlap = find_jaccard_overlap(boxes, self.priors_xy)           # (N, O, P)
        overlap = force_one_prior_per_object(overlap)   # 2 for the pairs of the rounds above
        overlap_for_each_prior, object_for_each_prior = overlap.max(dim=1)      # (N, P) both
        background = overlap_for_each_prior < self.threshold

        true_classes = labels.gather(1, object_for_each_prior).masked_fill(background, 0)
        image = torch.arange(len(boxes), device=boxes.device).unsqueeze(1)      # (N, 1)
        true_boxes = xy_to_cxcy(boxes)[image, object_for_each_prior]            # (N, P, 4)
        # Padding has no size: log(0) = -inf. It is background, so it becomes 0.
        true_locs = cxcy_to_gcxgcy(true_boxes, self.priors_cxcy)
        return true_locs.masked_fill(background.unsqueeze(2), 0), true_classes

    def compute_losses(self, predicted_locs, predicted_scores, true_locs, true_classes):
        """Compute L_conf and L_loc of matched priors, before the division by N_pos.

        Args:
            predicted_locs, predicted_scores: as in `forward()`.
            true_locs, true_classes: as from `match()`.

        Returns:
            Two scalars, float32 whatever the dtype of the predictions.
        """
        n_images, n_priors, n_classes = predicted_scores.shape
        assert n_priors == len(self.priors_cxcy), f'{n_priors} rows, {len(self.priors_cxcy)} priors'
        positive = true_classes > 0                                     # (N, P)

        loc_loss = F.smooth_l1_loss(predicted_locs.float(), true_locs, reduction='none')
        loc_loss = loc_loss.sum(dim=2).masked_fill(~positive, 0)        # (N, P)

        cross_entropy = F.cross_entropy(predicted_scores.float().flatten(0, 1),
                                        true_classes.flatten(), reduction='none')
        cross_entropy = cross_entropy.view(n_images, n_priors)          # (N, P)
        # neg_pos_ratio per positive of the same image, as in the Caffe code, so none in an image
        # without objects.
        n_hard = self.neg_pos_ratio * positive.sum(dim=1, keepdim=True)         # (N, 1)
        hard = hard_negatives(cross_entropy.detach(), positive, n_hard)
        conf_loss = cross_entropy.masked_fill(~(positive | hard), 0)    # (N, P)
        return conf_loss.sum(), loc_loss.sum()


def force_one_prior_per_object(overlap):
    """Raise the IoU of one pair per object above all others: the rounds of `MultiBoxLoss.match()`.

    Args:
        overlap: (N, O, P), IoU of objects and priors.

    Returns:
        (N, O, P), with 2 for the chosen pairs, so that `max()` assigns each prior to its object.
    """
    n_images, n_objects, n_priors = overlap.shape
    image = torch.arange(n_images, device=overlap.device)
    remaining, overlap = overlap.clone(), overlap.clone()
    zero = overlap.new_zeros(())    # on the same device
    for _ in range(n_objects):
        # In each image, the pair of the highest IoU; of equal ones the first
        highest, pair = remaining.flatten(1).max(dim=1)                         # (N,) both
        obj, prior = pair // n_priors, pair % n_priors                          # (N,) both
        # Match it. Where no object is left, the highest IoU is 0 and nothing changes.
        current = overlap[image, obj, prior]
        overlap[image, obj, prior] = current.masked_fill(highest > 0, 2)
        # Leave its object and its prior out of the following rounds.
        remaining[image, obj] = zero
        remaining[image, :, prior] = zero
    return overlap


def hard_negatives(cross_entropy, positive, n_hard):
    """Select the negatives of the highest cross entropy (hard negative mining).

    Of 8732 priors a few dozen are positive. If all negatives counted, the loss would be little else
    than background, and predicting nothing but background would be nearly perfect. So the network
    learns only from the negatives of the highest cross entropy, three per positive (section 2.2).

    Args:
        cross_entropy: (N, P).
        positive: (N, P) bool; they rank last, and count in the loss anyway.
        n_hard: (N, 1), how many to select per image.

    Returns:
        (N, P) bool.
    """
    ranking = cross_entropy.masked_fill(positive, -math.inf).argsort(dim=1, descending=True)
    place = torch.arange(cross_entropy.shape[1], device=cross_entropy.device)   # (P,)
    # hard[i, ranking[i, k]] = k < n_hard[i]
    return torch.zeros_like(positive).scatter(1, ranking, place < n_hard)


# --------------------------------------------------------------------------------------------------
# SSD512
#
# The same network for images of 512 x 512 pixels: another table, and one more auxiliary map. Its
# scales start lower (Caffe code, ssd_pascal_512.py): 0.07 of 512 pixels are 36, 0.1 of 300 are 30.
# --------------------------------------------------------------------------------------------------

FEATURE_MAPS_512 = (
    FeatureMap('conv4_3', 512, 64, 0.07, (1., 2., 1 / 2)),
    FeatureMap('conv7', 1024, 32, 0.15, (1., 2., 3., 1 / 2, 1 / 3)),
    FeatureMap('conv8_2', 512, 16, 0.3, (1., 2., 3., 1 / 2, 1 / 3)),
    FeatureMap('conv9_2', 256, 8, 0.45, (1., 2., 3., 1 / 2, 1 / 3)),
    FeatureMap('conv10_2', 256, 4, 0.6, (1., 2., 3., 1 / 2, 1 / 3)),
    FeatureMap('conv11_2', 256, 2, 0.75, (1., 2., 1 / 2)),
    FeatureMap('conv12_2', 256, 1, 0.9, (1., 2., 1 / 2)),
)
SCALES_512 = (*(feature_map.scale for feature_map in FEATURE_MAPS_512), 1.05)


class AuxiliaryConvolutions512(AuxiliaryConvolutions):
    """The auxiliary convolutions with a fifth pair; all but the last pair halve the map."""

    def __init__(self):
        super().__init__()
        self.conv10_2 = nn.Conv2d(128, 256, kernel_size=3, stride=2, padding=1)
        self.conv11_2 = nn.Conv2d(128, 256, kernel_size=3, stride=2, padding=1)

        self.conv12_1 = nn.Conv2d(256, 128, kernel_size=1)
        self.conv12_2 = nn.Conv2d(128, 256, kernel_size=4, padding=1)

        for layer in (self.conv10_2, self.conv11_2, self.conv12_1, self.conv12_2):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, conv7_feats):
        """Compute the feature maps conv8_2 to conv12_2 from conv7_feats (N, 1024, 32, 32)."""
        feature_maps = super().forward(conv7_feats)     # of 16, 8, 4 and 2 cells per side
        out = F.relu(self.conv12_1(feature_maps[-1]))   # (N, 128, 2, 2)
        conv12_2_feats = F.relu(self.conv12_2(out))     # (N, 256, 1, 1)
        return *feature_maps, conv12_2_feats


class SSD512(SSD300):
    """The network for images (N, 3, 512, 512), with P = 24564 priors."""

    input_size = 512
    feature_maps = FEATURE_MAPS_512
    make_aux_convs = AuxiliaryConvolutions512
    scales = SCALES_512
