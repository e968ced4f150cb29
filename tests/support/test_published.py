"""Published weights: a converted network gives the outputs and detections of the original.

torchvision's SSD300 itself is the reference. For the other two programs the reference is the
forward pass and the priors as their sources have them, written out below. All weights are random;
nothing is downloaded.
"""

import contextlib
import io
import itertools
import math
import os
import pathlib
import pickle
import random
import re
import sys
import tracemalloc
import types
import zipfile

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from torchvision.models.detection import SSD300_VGG16_Weights, ssd as torchvision_ssd, ssd300_vgg16

import datasets
import detect
import train
import utils
from create_data_lists import write_data_lists
from model import CONSTANTS, SSD300, SSD512, VGGBase
from support import published
from support.checkpoints import (
    find_newest_checkpoint,
    load_checkpoint,
    restore,
    save_checkpoint,
)
from support.errors import UserError, make_folder
from support.published import (
    coco_label_map,
    download_coco,
    spread_priors,
    start_from,
    start_from_caffe_vgg,
)

WEIGHTS = SSD300_VGG16_Weights.COCO_V1


@pytest.fixture(scope='module')
def photos():
    """Two images (3, 300, 300) uint8: of the sample data if there is any, else drawn ones."""
    folder = pathlib.Path(os.environ.get('SSD_SAMPLE_DATA', 'nowhere')) / 'voc-sample' / 'VOC2007'
    paths = sorted((folder / 'JPEGImages').glob('*.jpg'))[:2]
    if paths:
        images = [Image.open(path).convert('RGB').resize((300, 300)) for path in paths]
        return [torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
                .view(300, 300, 3).permute(2, 0, 1).contiguous() for image in images]
    rows, columns = torch.meshgrid(torch.arange(300), torch.arange(300), indexing='ij')
    waves = [128 + 100 * torch.sin(rows / a) * torch.cos(columns / b)
             for a, b in ((9, 17), (31, 5), (50, 50), (4, 60), (13, 8), (70, 21))]
    # Without noise, equal patches would get equal scores, whose order is undefined.
    noise = torch.randint(0, 20, (6, 300, 300), generator=torch.Generator().manual_seed(0))
    return list((torch.stack(waves) + noise).to(torch.uint8).view(2, 3, 300, 300))


@pytest.fixture(scope='module')
def torchvision_model():
    """torchvision's SSD300 with random weights, small for offsets as after training."""
    torch.manual_seed(1)
    network = ssd300_vgg16(weights=None, weights_backbone=None).eval()
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if 'regression_head' in name:
                parameter.mul_(0.2)
            elif name.endswith('bias'):
                parameter.uniform_(-0.1, 0.1)
        network.backbone.scale_weight.uniform_(5., 15.)
    return network


@pytest.fixture(scope='module')
def converted(torchvision_model, tmp_path_factory):
    """The same network, loaded from a file."""
    path = tmp_path_factory.mktemp('torchvision') / 'ssd300_vgg16_coco.pth'
    torch.save(torchvision_model.state_dict(), path)
    return SSD300.from_checkpoint(path)


@pytest.fixture
def downloads(torchvision_model, monkeypatch):
    """Replace the download by the random weights; a list of the calls' keyword arguments."""
    calls = []

    def get_state_dict(weights, *args, **kwargs):
        assert weights is WEIGHTS
        calls.append(kwargs)
        return torchvision_model.state_dict()

    monkeypatch.setattr(type(WEIGHTS), 'get_state_dict', get_state_dict)
    return calls


# --- layer names and feature maps ---


def test_layer_names_are_those_of_the_networks():
    with torch.device('meta'):
        convs = [name for name, layer in SSD300(2).named_modules() if isinstance(layer, nn.Conv2d)]
        convs_512 = [name for name, layer in SSD512(2).named_modules()
                     if isinstance(layer, nn.Conv2d)]
    assert convs_512 == [*published.BASE_CONVS, *published.AUX_CONVS, *published.LOC_CONVS,
                         *published.CLASS_CONVS]
    assert convs == [*published.BASE_CONVS, *published.AUX_CONVS[:8], *published.LOC_CONVS[:6],
                     *published.CLASS_CONVS[:6]]


@pytest.mark.parametrize('network, n_priors', [(SSD300, [4, 6, 6, 6, 4, 4]),
                                               (SSD512, [4, 6, 6, 6, 6, 4, 4])])
def test_feature_maps_are_those_of_the_network(network, n_priors):
    maps = published.PUBLISHED_MAPS[network.input_size]
    for theirs, ours in zip(maps, network.feature_maps, strict=True):
        assert (theirs.name, theirs.size) == (ours.name, ours.size)
        # Two squares, and two priors per aspect ratio
        assert 2 + 2 * len(theirs.aspect_ratios) == ours.n_priors_per_cell
    assert [ours.n_priors_per_cell for ours in network.feature_maps] == n_priors


def test_priors_are_spread_row_by_row():
    priors_cxcy = spread_priors([(0.1, 0.2), (0.3, 0.4)], n_cells=2, cells_across=1.6)
    x = y = 0.5 / 1.6, 1.5 / 1.6
    expected = [[x[j], y[i], *size] for i in (0, 1) for j in (0, 1)
                for size in ((0.1, 0.2), (0.3, 0.4))]
    assert torch.allclose(priors_cxcy, torch.tensor(expected))


# --- torchvision ---


@torch.no_grad()
def test_torchvision_gives_the_same_output(torchvision_model, converted, photos):
    for photo in photos:
        images, _ = torchvision_model.transform([photo / 255])
        maps = list(torchvision_model.backbone(images.tensors).values())
        expected = torchvision_model.head(maps)
        locs, scores = converted(converted.normalize(photo.unsqueeze(0)))
        assert torch.allclose(locs, expected['bbox_regression'], atol=1e-4)
        assert torch.allclose(scores, expected['cls_logits'], atol=1e-4)
        priors = torchvision_model.anchor_generator(images, maps)[0] / 300
        assert torch.allclose(utils.cxcy_to_xy(converted.priors_cxcy), priors, atol=1e-6)


@torch.no_grad()
def test_torchvision_detects_the_same_objects(torchvision_model, converted, photos, monkeypatch):
    # torchvision clips boxes before non-maximum suppression, this program after it.
    monkeypatch.setattr(torchvision_ssd.box_ops, 'clip_boxes_to_image', lambda boxes, size: boxes)
    for photo in photos:
        expected, = torchvision_model([photo / 255])
        predictions = converted(converted.normalize(photo.unsqueeze(0)))
        (boxes,), (labels,), (scores,) = converted.detect_objects(*predictions, 0.01, 0.45, 200)
        assert len(boxes) == 200 and len(labels.unique()) > 10 and boxes.std() > 0.1
        assert torch.equal(labels, expected['labels'])
        assert torch.allclose(scores, expected['scores'], atol=1e-4)
        assert torch.allclose(boxes, (expected['boxes'] / 300).clamp(0, 1), atol=1e-4)


def test_coco_label_map_names_each_index_once(converted):
    names, labels = WEIGHTS.meta['categories'], converted.label_map
    assert list(labels.values()) == list(range(91)) and list(labels)[0] == 'background'
    for name, number in labels.items():
        assert names[number] in (name, '__background__', 'N/A')
    assert labels['person'] == 1 and labels['dining table'] == names.index('dining table')


def test_torchvision_model_of_other_classes_gets_numbered_names(tmp_path):
    with torch.device('meta'):
        network = ssd300_vgg16(weights=None, weights_backbone=None, num_classes=3)
    state = {name: torch.zeros(()).expand(tensor.shape)
             for name, tensor in network.state_dict().items()}
    classes = 'head.classification_head.module_list.0.weight'
    torch.save({**state, classes: torch.zeros(state[classes].shape)}, tmp_path / 'three.pth')
    labels = SSD300.from_checkpoint(tmp_path / 'three.pth').label_map
    assert labels == {'background': 0, 'class 1': 1, 'class 2': 2}


def test_downloaded_coco_checkpoint_makes_the_same_model(downloads, converted):
    model = SSD300.from_state(download_coco('...'))
    assert model.label_map == converted.label_map and not model.training
    expected = converted.state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in model.state_dict().items())


# --- ssd.pytorch ---

# Per layer: channels in, channels out, kernel size (3 unless given).
VGG = {0: (3, 64), 2: (64, 64), 5: (64, 128), 7: (128, 128), 10: (128, 256), 12: (256, 256),
       14: (256, 256), 17: (256, 512), 19: (512, 512), 21: (512, 512), 24: (512, 512),
       26: (512, 512), 28: (512, 512), 31: (512, 1024), 33: (1024, 1024, 1)}
EXTRAS = ((1024, 256, 1), (256, 512, 3), (512, 128, 1), (128, 256, 3), (256, 128, 1), (128, 256, 3),
          (256, 128, 1), (128, 256, 3))
HEADS = tuple(zip((512, 1024, 512, 256, 256, 256), (4, 6, 6, 6, 4, 4)))
EXTRAS_512 = (*EXTRAS, (256, 128, 1), (128, 256, 4))
HEADS_512 = tuple(zip((512, 1024, 512, 256, 256, 256, 256), (4, 6, 6, 6, 6, 4, 4)))


def random_convolution(in_channels, out_channels, kernel=3):
    """Random weight and bias that preserve the magnitude of activations (He et al., 2015)."""
    weight = torch.randn(out_channels, in_channels, kernel, kernel)
    return weight * math.sqrt(2 / (in_channels * kernel ** 2)), 0.1 * torch.randn(out_channels)


def ssd_pytorch_state(n_classes=21, size=300):
    extras, heads = (EXTRAS, HEADS) if size == 300 else (EXTRAS_512, HEADS_512)
    layers = {f'vgg.{number}': shape for number, shape in VGG.items()}
    layers |= {f'extras.{number}': shape for number, shape in enumerate(extras)}
    for number, (channels, n_priors) in enumerate(heads):
        layers[f'loc.{number}'] = channels, 4 * n_priors
        layers[f'conf.{number}'] = channels, n_classes * n_priors
    state = {'L2Norm.weight': 20 * torch.rand(512)}
    for name, shape in layers.items():
        state[f'{name}.weight'], state[f'{name}.bias'] = random_convolution(*shape)
    return state


def ssd_pytorch_forward(state, x):
    """forward() of its ssd.py, layers named by number."""
    def layer(name, x, **options):
        return F.conv2d(x, state[f'{name}.weight'], state[f'{name}.bias'], **options)

    sources = []
    for number in VGG:
        if number in (5, 10, 17, 24, 31):   # these follow a pooling layer
            pooling = {17: {'kernel_size': 2, 'ceil_mode': True},
                       31: {'kernel_size': 3, 'stride': 1, 'padding': 1}}
            x = F.max_pool2d(x, **pooling.get(number, {'kernel_size': 2}))
        options = {31: {'padding': 6, 'dilation': 6}, 33: {}}.get(number, {'padding': 1})
        x = F.relu(layer(f'vgg.{number}', x, **options))
        if number == 21:
            norm = x.pow(2).sum(dim=1, keepdim=True).sqrt() + 1e-10
            sources.append(state['L2Norm.weight'].view(1, -1, 1, 1) * (x / norm))
    sources.append(x)
    halves, n_extras = {'stride': 2, 'padding': 1}, 8 if 'extras.9.weight' not in state else 10
    strided = {1: halves, 3: halves}
    if n_extras == 10:  # an SSD512
        strided |= {5: halves, 7: halves, 9: {'padding': 1}}
    for number in range(n_extras):
        options = strided.get(number, {})
        x = F.relu(layer(f'extras.{number}', x, **options))
        if number % 2 == 1:
            sources.append(x)
    outputs = [torch.cat([layer(f'{kind}.{i}', x, padding=1).permute(0, 2, 3, 1).flatten(1)
                          for i, x in enumerate(sources)], dim=1) for kind in ('loc', 'conf')]
    return outputs[0].view(1, -1, 4), outputs[1].view(1, outputs[0].shape[1] // 4, -1)


# data/config.py of ssd.pytorch; configs/vgg_ssd512_voc0712.yaml and ..._coco_trainval35k.yaml
# of lufficc/SSD.
SSD_PYTORCH_VOC = (300, (38, 19, 10, 5, 3, 1), (8, 16, 32, 64, 100, 300),
                   (30, 60, 111, 162, 213, 264, 315), ([2], [2, 3], [2, 3], [2, 3], [2], [2]))
MAPS_512 = ((64, 32, 16, 8, 4, 2, 1), (8, 16, 32, 64, 128, 256, 512))
RATIOS_512 = ([2], [2, 3], [2, 3], [2, 3], [2, 3], [2], [2])
VOC_512 = (512, *MAPS_512, (35.84, 76.8, 153.6, 230.4, 307.2, 384.0, 460.8, 537.65), RATIOS_512)
COCO_512 = (512, *MAPS_512, (20.48, 51.2, 133.12, 215.04, 296.96, 378.88, 460.8, 542.72),
            RATIOS_512)


def ssd_pytorch_priors(image_size, sizes, steps, squares, all_ratios):
    """forward() of its layers/functions/prior_box.py."""
    mean = []
    for size, step, least, most, ratios in zip(sizes, steps, squares, squares[1:], all_ratios):
        for i, j in itertools.product(range(size), repeat=2):
            cx, cy = (j + 0.5) / (image_size / step), (i + 0.5) / (image_size / step)
            s, larger = least / image_size, math.sqrt(least * most) / image_size
            mean += [cx, cy, s, s, cx, cy, larger, larger]
            for ratio in ratios:
                root = math.sqrt(ratio)
                mean += [cx, cy, s * root, s / root, cx, cy, s / root, s * root]
    return torch.tensor(mean).view(-1, 4).clamp(0, 1)


@torch.no_grad()
def test_ssd_pytorch_weights_give_its_output(photos, tmp_path):
    state = ssd_pytorch_state()
    torch.save(state, tmp_path / 'ssd300_mAP_77.43_v2.pth', _use_new_zipfile_serialization=False)
    model = SSD300.from_checkpoint(tmp_path / 'ssd300_mAP_77.43_v2.pth')
    for photo in photos:
        # OpenCV's BGR minus the mean, then RGB (BaseTransform, VOCDetection)
        x = (photo.flip(0) - torch.tensor([104., 117., 123.]).view(3, 1, 1)).flip(0).unsqueeze(0)
        locs, scores = ssd_pytorch_forward(state, x)
        assert scores.std() > 0.1
        got_locs, got_scores = model(model.normalize(photo.unsqueeze(0)))
        assert torch.allclose(got_locs, locs, rtol=1e-4, atol=1e-5 * locs.abs().max())
        assert torch.allclose(got_scores, scores, rtol=1e-4, atol=1e-5 * scores.abs().max())
    assert torch.allclose(model.priors_cxcy, ssd_pytorch_priors(*SSD_PYTORCH_VOC), atol=1e-6)
    assert model.label_map == utils.label_map


# --- lufficc/SSD, and SSD512 ---


def as_lufficc(state):
    """The names of ssd.pytorch's layers in lufficc/SSD."""
    names = {'vgg.': 'backbone.vgg.', 'extras.': 'backbone.extras.', 'L2Norm.': 'backbone.l2_norm.',
             'loc.': 'box_head.predictor.reg_headers.', 'conf.': 'box_head.predictor.cls_headers.'}
    return {names[prefix] + key.removeprefix(prefix): tensor for key, tensor in state.items()
            for prefix in names if key.startswith(prefix)}


@torch.no_grad()
@pytest.mark.parametrize('n_classes, config', [(21, VOC_512), (81, COCO_512)])
def test_ssd512_of_lufficc_gives_the_output_of_its_source(tmp_path, n_classes, config):
    state = ssd_pytorch_state(n_classes, size=512)
    torch.save({'model': as_lufficc(state), 'iteration': 120000}, tmp_path / 'vgg_ssd512.pth')
    model = SSD300.from_checkpoint(tmp_path / 'vgg_ssd512.pth')
    assert type(model) is SSD512 and len(model.priors_cxcy) == 24564
    assert torch.allclose(model.priors_cxcy, ssd_pytorch_priors(*config), atol=1e-4)
    assert list(model.label_map)[-1] == {21: 'tvmonitor', 81: 'toothbrush'}[n_classes]
    assert list(model.label_map.values()) == list(range(n_classes))
    if n_classes == 21:
        image = torch.randint(0, 256, (1, 3, 512, 512), dtype=torch.uint8)
        x = image - torch.tensor([123., 117., 104.]).view(3, 1, 1)
        for predicted, expected in zip(model(model.normalize(image)),
                                       ssd_pytorch_forward(state, x)):
            torch.testing.assert_close(predicted, expected, rtol=1e-4,
                                       atol=1e-5 * expected.abs().max())


def test_ssd512_of_a_fork_of_ssd_pytorch_is_read(tmp_path):
    torch.save(ssd_pytorch_state(2, size=512), tmp_path / 'fork.pth')
    model = SSD300.from_checkpoint(tmp_path / 'fork.pth')
    assert model.input_size == 512 and model.n_classes == 2 and not model.antialias
    with pytest.raises(UserError, match='SSD512; give --network ssd512'):
        start_from(SSD300(2), model)


# --- a-PyTorch-Tutorial-to-Object-Detection ---

NAMES = ('conv1_1', 'conv1_2', 'conv2_1', 'conv2_2', 'conv3_1', 'conv3_2', 'conv3_3', 'conv4_1',
         'conv4_2', 'conv4_3', 'conv5_1', 'conv5_2', 'conv5_3', 'conv6', 'conv7')
MAPS = ('conv4_3', 'conv7', 'conv8_2', 'conv9_2', 'conv10_2', 'conv11_2')


class Part(nn.Module):
    """A module of the tutorial: convolutions with names."""

    def __init__(self, layers):
        super().__init__()
        for name, shape in layers.items():
            setattr(self, name, nn.Conv2d(*shape[:2], kernel_size=(*shape, 3)[2]))
            layer = getattr(self, name)
            layer.weight.data, layer.bias.data = random_convolution(*shape)


@pytest.fixture
def tutorial(monkeypatch):
    """A network of the tutorial's classes, which are those of a fake module `tutorial_model`."""
    fake = types.ModuleType('tutorial_model')
    for name in ('SSD300', 'VGGBase', 'AuxiliaryConvolutions', 'PredictionConvolutions'):
        setattr(fake, name, type(name, (Part,), {'__module__': 'tutorial_model'}))
    monkeypatch.setitem(sys.modules, 'tutorial_model', fake)
    network = fake.SSD300({})
    network.base = fake.VGGBase(dict(zip(NAMES, VGG.values())))
    network.base.pool3 = nn.MaxPool2d(2, 2, ceil_mode=True)
    network.aux_convs = fake.AuxiliaryConvolutions(dict(zip(
        (f'conv{i}_{j}' for i in (8, 9, 10, 11) for j in (1, 2)), EXTRAS)))
    heads = {f'{kind}_{name}': (channels, n_priors * n) for kind, n in (('loc', 4), ('cl', 21))
             for name, (channels, n_priors) in zip(MAPS, HEADS)}
    network.pred_convs = fake.PredictionConvolutions(heads)
    network.rescale_factors = nn.Parameter(20 * torch.rand(1, 512, 1, 1))
    network.n_classes = 21
    network.priors_cxcy = tutorial_priors()     # an attribute, not a buffer
    return network


def tutorial_priors():
    """create_prior_boxes() of the tutorial's model.py."""
    priors, scales = [], (0.1, 0.2, 0.375, 0.55, 0.725, 0.9, 1.)
    for k, size in enumerate((38, 19, 10, 5, 3, 1)):
        ratios = (1., 2., 0.5) if k in (0, 4, 5) else (1., 2., 3., 0.5, .333)
        for i, j in itertools.product(range(size), repeat=2):
            cx, cy = (j + 0.5) / size, (i + 0.5) / size
            for ratio in ratios:
                root = math.sqrt(ratio)
                priors.append([cx, cy, scales[k] * root, scales[k] / root])
                if ratio == 1.:
                    extra = math.sqrt(scales[k] * scales[k + 1]) if k < 5 else 1.
                    priors.append([cx, cy, extra, extra])
    return torch.tensor(priors).clamp(0, 1)


def as_ssd_pytorch(network):
    """The tutorial's weights under ssd.pytorch's names; their layers are the same."""
    state, theirs = network.state_dict(), {'rescale_factors': 'L2Norm.weight'}
    auxiliary = [name for name, _ in network.aux_convs.named_children()]
    pairs = [(f'base.{name}', f'vgg.{number}') for name, number in zip(NAMES, VGG)]
    pairs += [(f'aux_convs.{name}', f'extras.{i}') for i, name in enumerate(auxiliary)]
    pairs += [(f'pred_convs.{kind}_{name}', f'{other}.{i}') for i, name in enumerate(MAPS)
              for kind, other in (('loc', 'loc'), ('cl', 'conf'))]
    theirs |= {f'{a}.{kind}': f'{b}.{kind}' for a, b in pairs for kind in ('weight', 'bias')}
    return {theirs[name]: tensor for name, tensor in state.items()}


@pytest.mark.filterwarnings('ignore:Couldn.t retrieve source code')
@pytest.mark.parametrize('is_zip', [False, True], ids=['before 1.6', 'since 1.6'])
@torch.no_grad()
def test_tutorial_module_gives_its_output(tutorial, photos, tmp_path, monkeypatch, is_zip):
    optimizer = torch.optim.SGD(tutorial.parameters(), lr=1e-3, momentum=0.9)
    for parameter in (tutorial.rescale_factors, tutorial.base.conv1_1.bias):
        optimizer.state[parameter]['momentum_buffer'] = torch.zeros_like(parameter)
    path = tmp_path / 'checkpoint_ssd300.pth.tar'
    torch.save({'epoch': 231, 'model': tutorial, 'optimizer': optimizer}, path,
               _use_new_zipfile_serialization=is_zip)
    monkeypatch.delitem(sys.modules, 'tutorial_model')     # without its code
    monkeypatch.setattr(torch.jit, 'load', None)

    model = SSD300.from_checkpoint(path)
    assert 'tutorial_model' not in sys.modules
    assert not any(part.training for part in model.modules())
    x = photos[0] / 255 - torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
    x = (x / torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)).unsqueeze(0)
    locs, scores = ssd_pytorch_forward(as_ssd_pytorch(tutorial), x)
    got_locs, got_scores = model(model.normalize(photos[0].unsqueeze(0)))
    assert torch.allclose(got_locs, locs, rtol=1e-4, atol=1e-5 * locs.abs().max())
    assert torch.allclose(got_scores, scores, rtol=1e-4, atol=1e-5 * scores.abs().max())
    assert torch.equal(model.priors_cxcy, tutorial_priors())
    assert model.label_map == utils.label_map


# --- untrusted files ---


class Calls:
    """Calls a function when it is unpickled."""

    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


def malicious_objects(marker):
    """Objects whose pickles would run code, where possible to create `marker`."""
    touch = f'open({str(marker)!r}, "w")'
    return {'system': Calls(os.system, f'touch {marker}'), 'eval': Calls(eval, touch),
            'exec': Calls(exec, touch), 'open': Calls(open, str(marker), 'w'),
            'import': Calls(__import__, 'antigravity'), 'getattr': Calls(getattr, 'a', 'upper'),
            'jit': Calls(torch.jit.load, 'x'), 'load': Calls(torch.load, 'x'),
            'project': Calls(make_folder, str(marker))}


@pytest.mark.parametrize('is_zip', [False, True], ids=['before 1.6', 'since 1.6'])
@pytest.mark.parametrize('name', malicious_objects('x'))
def test_code_in_a_file_is_refused_without_running_it(tmp_path, name, is_zip):
    marker, path = tmp_path / 'marker', tmp_path / 'malicious.pth'
    layer = nn.Conv2d(1, 1, 1)
    layer.extra = malicious_objects(marker)[name]
    torch.save({'model': layer}, path, _use_new_zipfile_serialization=is_zip)
    with pytest.raises(UserError, match='malicious.pth holds code, which is not run'):
        SSD300.from_checkpoint(path)
    assert not marker.exists()


@pytest.mark.parametrize('code', [
    b'\x80\x02ctorch._utils\n_rebuild_parameter\n}X\x01\x00\x00\x00aK\x01sb.',
    b'\x80\x02ccollections\nOrderedDict\n(N}X\x01\x00\x00\x00aK\x01stb.',
    b'\x80\x02ctorch.nn.modules.conv\nConv2d\n(N}X\x08\x00\x00\x00__call__K\x01stb.',
    b'\x80\x02ctorch.nn.functional\nrelu\nK\x01\x85R.',
], ids=['function', 'type', 'ModuleState', 'call'])
def test_pickle_cannot_change_its_unpickler(code):
    before = dict(vars(published.ModuleState))
    with pytest.raises((pickle.UnpicklingError, TypeError)):
        published.RestrictedUnpickler(io.BytesIO(code)).load()
    assert dict(vars(published.ModuleState)) == before


def test_torchscript_archive_is_refused_without_running_it(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.jit, 'load', None)
    with zipfile.ZipFile(tmp_path / 'scripted.pth', 'w') as archive:
        archive.writestr('scripted/constants.pkl', b'\x80\x02).')
        archive.writestr('scripted/data.pkl', b'\x80\x02}.')
    with pytest.raises(UserError, match='scripted.pth'):
        SSD300.from_checkpoint(tmp_path / 'scripted.pth')


@pytest.mark.parametrize('content', [
    lambda state: {**state, 'vgg.35.weight': torch.ones(1), 'vgg.35.bias': torch.ones(1)},
    lambda state: {key: value for key, value in state.items() if key != 'extras.3.bias'},
    lambda state: {key: value for key, value in state.items() if not key.startswith('L2')},
    lambda state: {**state, 'vgg.x.weight': torch.ones(1)},
    lambda state: {**state, 'vgg.0.bias': torch.ones(5)},
    lambda state: {**state, 'conf.0.bias': 4}], ids=['more layers', 'no bias', 'no factors', 'name',
                                                     'shape', 'no tensor'])
def test_network_of_other_layers_is_a_user_error(tmp_path, content):
    state = {name: tensor.new_zeros(()).expand(tensor.shape)    # small files
             for name, tensor in ssd_pytorch_state(2).items()}
    state['conf.0.weight'] = torch.zeros(state['conf.0.weight'].shape)  # the classes are counted
    torch.save(content(state), tmp_path / 'other.pth')
    with pytest.raises(UserError, match='other.pth'):
        SSD300.from_checkpoint(tmp_path / 'other.pth')


@pytest.mark.parametrize('is_zip', [False, True], ids=['before 1.6', 'since 1.6'])
def test_truncated_module_is_a_user_error(tmp_path, is_zip):
    path = tmp_path / 'module.pth'
    torch.save({'model': nn.Conv2d(8, 8, 3)}, path, _use_new_zipfile_serialization=is_zip)
    for length in (0, 3, 100, 600, path.stat().st_size - 100):
        truncated = tmp_path / f'first{length}.pth'
        truncated.write_bytes(path.read_bytes()[:length])
        with pytest.raises(UserError, match=f'first{length}.pth'):
            SSD300.from_checkpoint(truncated)
    with pytest.raises(UserError, match='module.pth'):
        SSD300.from_checkpoint(path)    # complete, but not an SSD300


def load_vgg():
    """Load ImageNet weights into a base that has no weights of its own."""
    VGGBase.load_pretrained_layers(torch.nn.Module())


@pytest.mark.parametrize('is_zip', [False, True], ids=['before 1.6', 'since 1.6'])
@pytest.mark.parametrize('name, read', [
    ('a.pth', lambda: load_checkpoint('a.pth')),
    ('a.pth', lambda: SSD300.from_checkpoint('a.pth')),
    ('a.pth', lambda: restore('a.pth', None, None, None, {}, ())),
    ('a.pth', lambda: find_newest_checkpoint('a.pth')),
    ('hub/checkpoints/vgg16-397923af.pth', load_vgg),
    ('hub/checkpoints/ssd300_vgg16_coco-b556d3b4.pth', lambda: download_coco('...')),
    ('a.pth', lambda: start_from_caffe_vgg(None, 'a.pth')),
], ids=['load_checkpoint', 'from_checkpoint', 'resume', 'resume auto', 'VGG-16', 'COCO', 'Caffe'])
def test_code_is_not_run_wherever_a_file_is_read(tmp_path, monkeypatch, name, read, is_zip):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv('TORCH_HOME', '.')
    pathlib.Path(name).parent.mkdir(parents=True, exist_ok=True)
    layer = nn.Conv2d(1, 1, 1)
    code = layer.extra = Calls(open, 'marker', 'w')
    for content in (code, {'model': code}, {'backbone.features.0.weight': code},
                    {'vgg.0.weight': code}, layer, {'model': layer}):
        torch.save(content, name, _use_new_zipfile_serialization=is_zip)
        with contextlib.suppress(UserError):
            assert read() is None
        assert not pathlib.Path('marker').exists()


def mutate(data, rng):
    """Change a few bytes, or remove or repeat a few."""
    data = bytearray(data)
    for _ in range(rng.randint(1, 3)):
        i = rng.randrange(len(data))
        n = rng.choice((1, 1, 4, 8))
        data[i:i + n] = rng.choice((rng.randbytes(n), b'\xff' * n, b'', 2 * data[i:i + n]))
    return bytes(data)


@pytest.mark.filterwarnings('ignore:Detected pickle protocol')
@pytest.mark.parametrize('is_zip', [False, True], ids=['before 1.6', 'since 1.6'])
def test_mutated_checkpoint_is_loaded_or_a_user_error(tmp_path, is_zip):
    file, path, rng = io.BytesIO(), tmp_path / 'mutated.pth', random.Random(0)
    torch.save({'iteration': 3, 'model': {'a': torch.ones(2, 3), 'b': torch.ones(4).bfloat16()},
                'label_map': {'background': 0}}, file, _use_new_zipfile_serialization=is_zip)
    for _ in range(int(os.environ.get('SSD_FUZZ', 200))):
        path.write_bytes(mutate(file.getvalue(), rng))
        with contextlib.suppress(UserError):
            published.read_checkpoint(path)


@pytest.mark.filterwarnings('ignore:Detected pickle protocol')
@pytest.mark.parametrize('content', [
    b'\x80\x02}r\xff\xff\xff\x01.', b'\x80\x05\x96' + (1 << 28).to_bytes(8, 'little') + b'.'],
    ids=['index of the memo', 'length of a bytearray'])
def test_damaged_number_of_a_pickle_allocates_nothing(tmp_path, content):
    (tmp_path / 'damaged.pth').write_bytes(content)
    tracemalloc.start()
    try:
        with pytest.raises(UserError, match='damaged.pth'):
            published.read_checkpoint(tmp_path / 'damaged.pth')
        assert tracemalloc.get_traced_memory()[1] < 10_000_000
    finally:
        tracemalloc.stop()


# --- the number of classes ---


def stride_0(shape):
    """Return a tensor of any shape that is one number in a file."""
    return torch.zeros(()).expand(shape)


def million_classes(program, tutorial):
    """Return the content of a small file that has a million classes."""
    with torch.device('meta'):
        if program == 'torchvision':
            state = ssd300_vgg16(weights=None, weights_backbone=None,
                                 num_classes=1_000_000).state_dict()
        else:
            state = ssd_pytorch_state(1_000_000)
    if program == 'tutorial':
        for parameter in tutorial.parameters():
            parameter.data = stride_0(parameter.shape)
        tutorial.pred_convs.cl_conv4_3.weight.data = stride_0(state['conf.0.weight'].shape)
        tutorial.pred_convs.cl_conv4_3.bias.data = stride_0(state['conf.0.bias'].shape)
        return tutorial
    if program == 'this one':
        return {'model': {f'{published.CLASS_CONVS[0]}.weight': stride_0((4_000_000, 512, 3, 3))},
                'label_map': {'background': 0}}
    return {name: stride_0(tensor.shape) for name, tensor in state.items()}


@pytest.mark.filterwarnings('ignore:Couldn.t retrieve source code')
@pytest.mark.parametrize('program', ['this one', 'torchvision', 'ssd.pytorch', 'tutorial'])
def test_nothing_is_built_for_classes_that_a_file_does_not_have(tmp_path, monkeypatch, tutorial,
                                                                program):
    torch.save(million_classes(program, tutorial), tmp_path / 'million.pth')
    for module in ('model', 'support.published'):
        monkeypatch.setattr(f'{module}.default_label_map', lambda n_classes: pytest.fail('built'))
    with pytest.raises(UserError, match='million.pth.*no complete pred_convs.class_convs.0.weight'):
        SSD300.from_checkpoint(tmp_path / 'million.pth')


@pytest.mark.parametrize('label_map', [
    {'background': 0, 'x': 7}, {'background': 0, 'x': 0}, {'background': 1, 'x': 0},
    {'a': 0, 'b': 1}, {'background': 0, 1: 1}, {'background': 0, 'x': 1.},
    {'background': 0, 'x': [1]}, {'background': 0}, {'background': 0, 'x': 1, 'y': 2},
    {'background': 0, **{str(i): i for i in range(1, 100_000)}}], ids=lambda names: str(names)[:40])
def test_label_map_numbers_the_classes_of_the_weights(monkeypatch, label_map):
    state = {f'{published.CLASS_CONVS[0]}.weight': torch.zeros(8, 512, 3, 3)}
    published.check_classes(state, {'background': 0, 'x': 1})
    monkeypatch.setattr('model.default_label_map', lambda n_classes: pytest.fail('built'))
    with pytest.raises(UserError, match='label_map'):
        SSD300.from_state({'model': state, 'label_map': label_map})


def test_weights_without_values_have_no_classes():
    weight = torch.empty(8, 512, 3, 3, device='meta')
    with pytest.raises(UserError, match='no complete'):
        published.count_classes({f'{published.CLASS_CONVS[0]}.weight': weight})


# --- priors, image constants and classes in a checkpoint ---


def test_converted_model_is_saved_and_loaded_with_its_constants(converted, tmp_path):
    path = tmp_path / 'converted.pth.tar'
    save_checkpoint(path, model=converted.state_dict(), label_map=converted.label_map)
    loaded = SSD300.from_checkpoint(path)
    for name in ('priors_cxcy', *CONSTANTS, 'rescale_factors'):
        assert torch.equal(loaded.state_dict()[name], converted.state_dict()[name])
    assert loaded.label_map == converted.label_map and loaded.l2_epsilon == torch.tensor(1e-12)


def test_checkpoint_without_constants_gets_those_of_imagenet(tmp_path):
    state = SSD300(3).state_dict()
    for name in CONSTANTS:
        del state[name]
    save_checkpoint(tmp_path / 'old.pth.tar', model=state,
                          label_map={'background': 0, 'a': 1, 'b': 2})
    model = SSD300.from_checkpoint(tmp_path / 'old.pth.tar')
    images = torch.randint(0, 256, (1, 3, 300, 300), dtype=torch.uint8)
    assert torch.equal(model.normalize(images), utils.normalize(images))
    assert model.l2_epsilon == torch.tensor(1e-10) and model.antialias


def test_large_photo_is_resized_and_normalized_as_by_torchvision(torchvision_model, converted,
                                                                 monkeypatch):
    photo = Image.effect_noise((640, 480), 100).convert('RGB')
    inputs = []
    monkeypatch.setattr(SSD300, 'forward', lambda model, batch: inputs.append(batch) or (
        torch.zeros(1, 8732, 4), torch.zeros(1, 8732, 91)))
    detect.predict([photo], model=converted)
    expected = torchvision_model.transform([utils.pil_to_tensor(photo) / 255])[0].tensors
    # Pillow rounds to levels; torchvision's mean has five digits.
    torch.testing.assert_close(inputs[0], expected, rtol=0, atol=1.1)


# --- detection without a checkpoint ---


@pytest.fixture
def without_checkpoint(tmp_path, monkeypatch):
    """A working folder with a photo and without a checkpoint."""
    monkeypatch.chdir(tmp_path)
    Image.radial_gradient('L').save('photo.png')
    detect.default_model.cache_clear()
    yield tmp_path
    detect.default_model.cache_clear()


def test_without_a_checkpoint_coco_classes_are_detected(without_checkpoint, downloads, capsys):
    detect.main(detect.Parameters(inputs=('photo.png',), device='cpu',
                                                output='found.png'))
    assert 'checkpoint_ssd300.pth.tar is not there' in capsys.readouterr().err
    assert len(Image.open('found.png').convert('RGB').getcolors(100_000)) > 300   # boxes are drawn
    prediction, = detect.predict([Image.open('photo.png')], min_score=0.1)
    assert set(prediction['labels']) <= set(coco_label_map())
    assert downloads == [{'progress': True, 'check_hash': True, 'weights_only': True}] * 2


def test_named_or_damaged_checkpoint_is_not_replaced_by_coco(without_checkpoint, downloads, capsys):
    pathlib.Path('checkpoint_ssd300.pth.tar').write_text('damaged')
    for path in ('other.pth', './checkpoint_ssd300.pth.tar'):
        with pytest.raises(SystemExit):
            detect.main(detect.Parameters(inputs=('photo.png',), checkpoint=path))
        assert path in capsys.readouterr().err
    assert not downloads


def test_failed_download_is_a_user_error_with_the_next_step(without_checkpoint, monkeypatch):
    def fail(*args, **kwargs):
        raise OSError('no route to host')

    monkeypatch.setattr(type(WEIGHTS), 'get_state_dict', fail)
    with pytest.raises(UserError, match='no route to host.*connect.*train.py'):
        detect.predict([Image.open('photo.png')])
    with pytest.raises(UserError, match='--init imagenet'):
        train.load_pretrained(SSD300(21), 'coco', None)


# --- training from COCO or another SSD300 ---


@torch.no_grad()
def test_voc_classes_start_with_the_scores_of_coco(converted, photos):
    model = SSD300(21).eval()
    assert start_from(model, converted) == list(utils.voc_labels)
    coco = {**converted.label_map, 'aeroplane': converted.label_map['airplane'],
            'motorbike': converted.label_map['motorcycle'], 'sofa': converted.label_map['couch'],
            'diningtable': converted.label_map['dining table'],
            'pottedplant': converted.label_map['potted plant'],
            'tvmonitor': converted.label_map['tv']}
    image = photos[0].unsqueeze(0)
    expected_locs, expected = converted(converted.normalize(image))
    locs, scores = model(model.normalize(image))
    assert torch.equal(locs, expected_locs)
    indices = [coco[name] for name in ('background', *utils.voc_labels)]
    assert torch.allclose(scores, expected[:, :, indices], atol=1e-4)
    assert torch.equal(model.priors_cxcy, converted.priors_cxcy)


def test_classes_unknown_to_coco_stay_random(converted):
    model = SSD300(4)
    model.label_map = {'background': 0, 'RBC': 1, 'stop_sign': 2, 'N/A': 3}
    before = model.pred_convs.class_convs[0].weight.detach().clone().unflatten(0, (4, 4))
    assert start_from(model, converted) == ['stop_sign']
    after = model.pred_convs.class_convs[0].weight.detach().unflatten(0, (4, 4))
    assert [bool((before[:, i] == after[:, i]).all()) for i in range(4)] == [0, 1, 0, 1]


def test_run_from_coco_keeps_its_priors_and_constants(downloads, converted, make_voc, tmp_path,
                                                     monkeypatch, capsys):
    folder = make_voc({'train': {stem: [('dog', (5, 5, 40, 40)), ('wug', (9, 9, 50, 30))]
                                 for stem in 'ab'}})
    lists = tmp_path / 'lists'
    write_data_lists([(folder, 'train')], [(folder, 'train')], lists)
    losses, normalized, antialias = [], [], []
    loss_class, normalize, transform = train.MultiBoxLoss, SSD300.normalize, datasets.transform
    monkeypatch.setattr(datasets, 'transform',
                        lambda *args: antialias.append(args[-2:]) or transform(*args))
    monkeypatch.setattr(SSD300, 'normalize', lambda model, images: normalized.append(
        normalize(model, images)) or normalized[-1])
    monkeypatch.setattr(train, 'MultiBoxLoss',
                        lambda priors: losses.append(loss_class(priors)) or losses[-1])
    monkeypatch.setattr(VGGBase, 'load_pretrained_layers', None)
    path = str(tmp_path / 'run.pth.tar')
    for iterations in (1, 2):
        train.main(train.Parameters(
            data_folder=str(lists), init='coco', iterations=iterations, batch_size=1, warmup=1,
            decay_lr_at=(), workers=0, device='cpu', checkpoint=path, resume='auto', eval_every=0,
            precision='float32'))
    assert len(downloads) == 1 and len(normalized) == len(losses) == 2
    assert antialias == [(False, 300)] * 2
    assert re.search('1 of 2 classes.*: dog', capsys.readouterr().out)
    model = SSD300.from_checkpoint(path)
    for loss in losses:
        assert torch.equal(loss.priors_cxcy, converted.priors_cxcy)
        assert torch.equal(loss.priors_xy, utils.cxcy_to_xy(converted.priors_cxcy))
    assert torch.equal(model.image_mean, converted.image_mean)
    assert torch.equal(model.image_std, converted.image_std)


def test_start_from_a_checkpoint_takes_its_priors_constants_and_scores(tmp_path, capsys):
    source = SSD300(21)     # of VOC's classes
    source.priors_cxcy.copy_(source.priors_cxcy.flip(0))
    source.image_mean.fill_(0.25)
    path = str(tmp_path / 'source.pth.tar')
    save_checkpoint(path, model=source.state_dict(), label_map=source.label_map)
    model = SSD300(3)
    model.label_map = {'background': 0, 'wug': 1, 'sofa': 2}
    train.load_pretrained(model, 'checkpoint', path)
    assert f'1 of 2 classes start with the scores of {path}: sofa' in capsys.readouterr().out
    for name, tensor in source.state_dict().items():    # the priors among them
        if 'class_convs' not in name:
            assert torch.equal(model.state_dict()[name], tensor), name
    for ours, theirs in zip(model.pred_convs.class_convs, source.pred_convs.class_convs):
        rows, source_rows = ours.weight.unflatten(0, (-1, 3)), theirs.weight.unflatten(0, (-1, 21))
        for name in ('background', 'sofa'):
            assert torch.equal(rows[:, model.label_map[name]],
                               source_rows[:, source.label_map[name]])


# --- training from the Caffe code's VGG-16 ---


def caffe_vgg():
    """Return ssd.pytorch's VGG-16 as a list of layers, as its vgg() builds it for 300 pixels."""
    layers, channels = [], 3
    for out in (64, 64, 'M', 128, 128, 'M', 256, 256, 256, 'C', 512, 512, 512, 'M', 512, 512, 512):
        if out in ('M', 'C'):
            layers.append(nn.MaxPool2d(2, 2, ceil_mode=out == 'C'))
        else:
            layers += [nn.Conv2d(channels, out, 3, padding=1), nn.ReLU()]
            channels = out
    layers += [nn.MaxPool2d(3, 1, 1), nn.Conv2d(512, 1024, 3, padding=6, dilation=6), nn.ReLU(),
               nn.Conv2d(1024, 1024, 1), nn.ReLU()]
    return nn.Sequential(*layers)


@torch.no_grad()
def test_base_from_caffe_gives_the_features_of_its_vgg(tmp_path):
    vgg = caffe_vgg()
    numbers = [int(name) for name, layer in vgg.named_modules() if isinstance(layer, nn.Conv2d)]
    assert numbers == [0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28, 31, 33]
    torch.save(vgg.state_dict(), tmp_path / 'vgg16_reducedfc.pth')
    model = SSD300(3)
    start_from_caffe_vgg(model, tmp_path / 'vgg16_reducedfc.pth')
    image = torch.randint(0, 256, (1, 3, 44, 44), dtype=torch.uint8)
    conv4_3_feats, conv7_feats = model.base(model.normalize(image))
    # Caffe's images are BGR.
    blob = image.flip(1).float() - torch.tensor([104., 117., 123.]).view(1, 3, 1, 1)
    torch.testing.assert_close(conv4_3_feats, vgg[:23](blob), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(conv7_feats, vgg(blob), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize('content', [
    {}, {'features.0.weight': torch.zeros(1)}, {f'{i}.weight': torch.zeros(1) for i in range(15)},
    {f'{i}.{kind}': i for i in range(15) for kind in ('weight', 'bias')}, {1: 2}, [3]],
    ids=['empty', 'torchvision', 'no biases', 'no tensors', 'no names', 'list'])
def test_other_file_than_caffes_vgg_is_a_user_error(tmp_path, content):
    torch.save(content, tmp_path / 'other.pth')
    with torch.device('meta'):
        model = SSD300(2)
    with pytest.raises(UserError, match='other.pth'):
        start_from_caffe_vgg(model, tmp_path / 'other.pth')
