"""Tests of model.py: the network, its priors, checkpoints and detection."""

import http.client
import math
import urllib.error
import urllib.request

import pytest
import torch
import torchvision
from torch import nn
from torchvision.ops import box_iou

from model import (
    EVALUATION,
    SSD300,
    VISUALIZATION,
    AuxiliaryConvolutions,
    PredictionConvolutions,
    VGGBase,
    create_prior_boxes,
)
from support.checkpoints import load_checkpoint, save_checkpoint
from support.errors import UserError
from support.published import COCO_SCALES, create_caffe_priors

LABEL_MAP = {'background': 0, 'cat': 1, 'dog': 2, 'bird': 3}


@pytest.fixture(scope='module')
def model():
    torch.manual_seed(0)
    return SSD300(21).eval()


@pytest.fixture(scope='module')
def small_model():
    """Return a model of four classes with names."""
    torch.manual_seed(1)
    model = SSD300(len(LABEL_MAP)).eval()
    model.label_map = dict(LABEL_MAP)
    return model


@pytest.fixture(scope='module')
def images():
    return torch.randn(2, 3, 300, 300, generator=torch.Generator().manual_seed(2))


@pytest.fixture(scope='module')
def outputs(model, images):
    """Return the outputs for two images: of `base`, of `aux`, and the final `locs`, `scores`."""
    outputs = {}
    hooks = [part.register_forward_hook(lambda _, __, out, name=name: outputs.update({name: out}))
             for name, part in (('base', model.base), ('aux', model.aux_convs))]
    with torch.no_grad():
        outputs['locs'], outputs['scores'] = model(images)
    for hook in hooks:
        hook.remove()
    return outputs


def convolutions(module):
    return [layer for layer in module.modules() if isinstance(layer, nn.Conv2d)]


# --------------------------------------------------------------------------------------------------
# The base
# --------------------------------------------------------------------------------------------------


@pytest.fixture(scope='module')
def vgg():
    """Return torchvision's VGG-16 with random weights and biases."""
    torch.manual_seed(3)
    with torch.device('meta'):      # without torchvision's slow initialization
        vgg = torchvision.models.vgg16(weights=None, init_weights=False)
    vgg = vgg.to_empty(device='cpu').eval().requires_grad_(False)
    for parameter in vgg.parameters():
        bound = 0.1 if parameter.dim() == 1 else math.sqrt(6 / parameter[0].numel())    # He, 2015
        nn.init.uniform_(parameter, -bound, bound)
    return vgg


@pytest.fixture(scope='module')
def pretrained(vgg):
    """Return a base with the weights of `vgg`, and its state dict before they were loaded."""
    base = VGGBase().requires_grad_(False)
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torchvision.models.VGG16_Weights, 'get_state_dict',
                      lambda *_, **__: vgg.state_dict())
        base.load_pretrained_layers()
    return base, before


def test_base_returns_conv4_3_and_conv7(outputs):
    conv4_3_feats, conv7_feats = outputs['base']
    assert conv4_3_feats.shape == (2, 512, 38, 38)
    assert conv7_feats.shape == (2, 1024, 19, 19)
    assert conv4_3_feats.min() == 0 and conv7_feats.min() == 0     # after the ReLU


def test_pretrained_features_equal_torchvisions(vgg, pretrained, monkeypatch):
    base, _ = pretrained
    # 44 pixels give the third pooling 11 cells, an odd number as with 300.
    image = torch.randn(1, 3, 44, 44)
    monkeypatch.setattr(vgg.features[16], 'ceil_mode', True)
    conv5_3 = []
    hook = base.conv5_3.register_forward_hook(lambda _, __, out: conv5_3.append(out.clone()))
    conv4_3_feats, _ = base(image)
    hook.remove()
    expected = vgg.features[:23](image)
    torch.testing.assert_close(conv4_3_feats, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(conv5_3[0].relu(), vgg.features[23:30](expected),
                               rtol=1e-4, atol=1e-4)


def test_all_weights_and_biases_are_loaded(pretrained):
    base, before = pretrained
    unchanged = [name for name, tensor in base.state_dict().items()
                 if (tensor == before[name]).float().mean() > 0.01]
    assert len(before) == 2 * 15
    assert unchanged == []


def test_fc6_and_fc7_become_conv6_and_conv7_by_decimation(vgg, pretrained):
    base, _ = pretrained
    fc6, fc7 = vgg.classifier[0], vgg.classifier[3]
    assert base.conv6.weight.shape == (1024, 512, 3, 3)
    assert base.conv7.weight.shape == (1024, 1024, 1, 1)
    for out, in_, row, column in ((0, 0, 0, 0), (1, 5, 2, 0), (700, 300, 1, 2), (1023, 511, 2, 2)):
        flat = in_ * 49 + 3 * row * 7 + 3 * column
        assert base.conv6.weight[out, in_, row, column] == fc6.weight[4 * out, flat]
        assert base.conv6.bias[out] == fc6.bias[4 * out]
        assert base.conv7.weight[out, in_, 0, 0] == fc7.weight[4 * out, 4 * in_]
        assert base.conv7.bias[out] == fc7.bias[4 * out]


def test_dilation_of_conv6_is_six_cells(vgg, pretrained):
    base, _ = pretrained
    feats = torch.randn(1, 512, 19, 19)
    conv6_feats = base.conv6(feats)
    fc6 = vgg.classifier[0].weight.view(4096, 512, 7, 7)
    for out, y, x in ((3, 9, 9), (8, 0, 18), (1000, 4, 14)):
        expected = vgg.classifier[0].bias[4 * out]
        for row in range(3):
            for column in range(3):
                input_y, input_x = y + 6 * (row - 1), x + 6 * (column - 1)
                if 0 <= input_y < 19 and 0 <= input_x < 19:
                    weight = fc6[4 * out, :, 3 * row, 3 * column]
                    expected = expected + weight @ feats[0, :, input_y, input_x]
        assert conv6_feats[0, out, y, x].item() == pytest.approx(expected.item(), abs=1e-4)


@pytest.mark.parametrize('error', [
    urllib.error.URLError('no route'), TimeoutError('timed out'), RuntimeError('invalid hash'),
    http.client.IncompleteRead(b'')], ids=lambda error: type(error).__name__)
def test_failed_download_is_a_user_error_that_names_the_next_step(model, monkeypatch, error):
    def fail(*_, **__):
        raise error
    monkeypatch.setattr(torchvision.models.VGG16_Weights, 'get_state_dict', fail)
    with pytest.raises(UserError, match='--no-pretrained'):
        model.base.load_pretrained_layers()


@pytest.mark.parametrize('content', [b'', b'<html>not found</html>', b'PK\x03\x04' + 99 * b'0'],
                         ids=['empty', 'web page', 'corrupt archive'])
def test_corrupt_weights_are_a_user_error_that_names_the_next_step(model, monkeypatch, tmp_path,
                                                                   content):
    folder = tmp_path / 'hub' / 'checkpoints'
    folder.mkdir(parents=True)
    (folder / 'vgg16-397923af.pth').write_bytes(content)
    monkeypatch.setenv('TORCH_HOME', str(tmp_path))
    with pytest.raises(UserError, match='--no-pretrained'):
        model.base.load_pretrained_layers()


def test_initial_base_is_he_normal(small_model):
    for layer in convolutions(small_model.base):
        fan_in = layer.weight[0].numel()
        assert layer.weight.std().item() == pytest.approx(math.sqrt(2 / fan_in), rel=0.08)
        assert abs(layer.weight.mean()) < 0.1 * math.sqrt(2 / fan_in)
        assert layer.weight.abs().max() > 2 * math.sqrt(2 / fan_in)     # a uniform one ends at 1.73
        assert (layer.bias == 0).all()


def test_constructors_use_no_network(monkeypatch):
    def fail(*_, **__):
        raise AssertionError('network in a constructor')
    monkeypatch.setattr('socket.socket.connect', fail)
    monkeypatch.setattr(urllib.request, 'urlopen', fail)
    monkeypatch.setattr(torchvision.models.VGG16_Weights, 'get_state_dict', fail)
    first, second = VGGBase(), SSD300(2).base
    assert not torch.equal(first.conv1_1.weight, second.conv1_1.weight)


# --------------------------------------------------------------------------------------------------
# Auxiliary and prediction convolutions
# --------------------------------------------------------------------------------------------------

# The table of feature maps, independent of FEATURE_MAPS: channels, size, scale, aspect ratios.
MAPS = [(512, 38, 0.1, (1, 2, 1 / 2)), (1024, 19, 0.2, (1, 2, 3, 1 / 2, 1 / 3)),
        (512, 10, 0.375, (1, 2, 3, 1 / 2, 1 / 3)), (256, 5, 0.55, (1, 2, 3, 1 / 2, 1 / 3)),
        (256, 3, 0.725, (1, 2, 1 / 2)), (256, 1, 0.9, (1, 2, 1 / 2))]
N_PRIORS_PER_CELL = [4, 6, 6, 6, 4, 4]
N_PRIORS_OF_MAPS = [5776, 2166, 600, 150, 36, 4]


def test_shapes_of_auxiliary_maps(outputs):
    assert [tuple(feats.shape) for feats in outputs['aux']] == [
        (2, 512, 10, 10), (2, 256, 5, 5), (2, 256, 3, 3), (2, 256, 1, 1)]


@pytest.mark.parametrize(('make', 'n_layers'), [
    (AuxiliaryConvolutions, 8), (lambda: PredictionConvolutions(4), 12)],
    ids=['auxiliary', 'prediction'])
def test_initial_auxiliary_and_prediction_convolutions_are_xavier_uniform(make, n_layers):
    layers = convolutions(make())
    assert len(layers) == n_layers
    for layer in layers:
        fans = sum(layer.weight.shape[:2]) * layer.weight[0, 0].numel()
        bound = math.sqrt(6 / fans)
        assert 0.99 * bound < layer.weight.abs().max() <= bound * 1.000001
        assert layer.weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.05)
        assert (layer.bias == 0).all()


@pytest.fixture
def zero_heads():
    """Return prediction convolutions of 3 classes, weights 0, and the six maps of zeros."""
    heads = PredictionConvolutions(3).requires_grad_(False)
    for layer in convolutions(heads):
        layer.weight.zero_()
    return heads, [torch.zeros(2, channels, size, size) for channels, size, _, _ in MAPS]


def test_predictions_are_in_the_order_of_the_priors(zero_heads):
    heads, maps = zero_heads
    # The bias of a channel is its index, which tells the prior of the cell and the number.
    for layer in convolutions(heads):
        layer.bias.copy_(torch.arange(len(layer.bias)))
    locs, scores = heads(*maps)
    assert locs.shape == (2, 8732, 4) and scores.shape == (2, 8732, 3)
    for width, predictions in ((4, locs), (3, scores)):
        expected = [torch.arange(n * width).view(n, width).repeat(size * size, 1)
                    for n, (_, size, _, _) in zip(N_PRIORS_PER_CELL, MAPS)]
        expected = torch.cat(expected).float().expand(2, -1, -1)
        torch.testing.assert_close(predictions, expected, rtol=0, atol=0)


@pytest.mark.parametrize(('number', 'row', 'column'), [
    (0, 0, 37), (0, 21, 4), (1, 2, 17), (2, 9, 0), (3, 1, 3), (4, 2, 1), (5, 0, 0)])
def test_cell_predicts_the_rows_of_its_priors(zero_heads, number, row, column):
    heads, maps = zero_heads
    for layer in convolutions(heads):
        layer.weight[:, 0, 1, 1] = 1
    maps[number][0, 0, row, column] = 1
    _, size, _, _ = MAPS[number]
    center = torch.tensor([(column + 0.5) / size, (row + 0.5) / size])
    start = sum(N_PRIORS_OF_MAPS[:number])
    for predictions in heads(*maps):
        changed = (predictions[0] != 0).all(dim=1).nonzero().squeeze(1)
        assert len(changed) == N_PRIORS_PER_CELL[number]
        assert start <= changed.min() and changed.max() < start + N_PRIORS_OF_MAPS[number]
        centers = create_prior_boxes()[changed, :2]
        torch.testing.assert_close(centers, center.expand_as(centers))
        assert (predictions[1] == 0).all()


# --------------------------------------------------------------------------------------------------
# The priors
# --------------------------------------------------------------------------------------------------


@pytest.fixture(scope='module')
def priors():
    return create_prior_boxes()


def test_priors_are_8732_boxes_of_float32_from_0_to_1(priors):
    assert priors.shape == (8732, 4) and priors.dtype == torch.float32
    assert priors.min() > 0 and priors.max() <= 1


def test_priors_for_coco_have_the_sizes_of_torchvisions():
    ours = create_prior_boxes(COCO_SCALES[300])[:, 2:]
    theirs = create_caffe_priors(300, COCO_SCALES[300])[:, 2:].clamp(0, 1)
    assert ours.shape == theirs.shape and ours[0].tolist() == pytest.approx([0.07, 0.07])
    for a, b in zip(ours.split((5776, 2166, 600, 150, 36, 4)),
                    theirs.split((5776, 2166, 600, 150, 36, 4))):
        # In another order within each cell.
        torch.testing.assert_close(a.unique(dim=0), b.unique(dim=0), rtol=0, atol=1e-6)


def test_ssd300_creates_the_same_priors(priors, small_model):
    assert torch.equal(SSD300.create_prior_boxes(), priors)
    assert torch.equal(small_model.create_prior_boxes(), priors)


def test_priors_equal_a_loop_over_maps_cells_and_aspect_ratios(priors):
    expected = []
    for number, (_, size, scale, ratios) in enumerate(MAPS):
        next_scale = MAPS[number + 1][2] if number < 5 else 1.
        for i in range(size):
            for j in range(size):
                for ratio in ratios:
                    center = [(j + 0.5) / size, (i + 0.5) / size]
                    expected.append(
                        [*center, scale * math.sqrt(ratio), scale / math.sqrt(ratio)])
                    if ratio == 1:
                        expected.append([*center] + 2 * [math.sqrt(scale * next_scale)])
        assert len(expected) == sum(N_PRIORS_OF_MAPS[:number + 1])
    torch.testing.assert_close(priors, torch.tensor(expected).clamp(0, 1), rtol=0, atol=1e-6)


@pytest.mark.parametrize(('start', 'center', 'sizes'), [
    (0, 0.013158, [(0.1, 0.1), (0.141421, 0.141421), (0.141421, 0.070711), (0.070711, 0.141421)]),
    (5776, 0.026316, [(0.2, 0.2), (0.273861, 0.273861), (0.282843, 0.141421),
                      (0.346410, 0.115470), (0.141421, 0.282843), (0.115470, 0.346410)]),
    (8728, 0.5, [(0.9, 0.9), (0.948683, 0.948683), (1.0, 0.636396), (0.636396, 1.0)]),
], ids=['conv4_3', 'conv7', 'conv11_2'])
def test_priors_of_the_first_cell_of_a_map(priors, start, center, sizes):
    expected = torch.tensor([(center, center, *size) for size in sizes])
    torch.testing.assert_close(priors[start:start + len(sizes)], expected, rtol=0, atol=1e-6)


# --------------------------------------------------------------------------------------------------
# The network
# --------------------------------------------------------------------------------------------------


class FixedBase(nn.Module):
    """A base that returns the same maps for any image."""

    def __init__(self, *maps):
        super().__init__()
        self.maps = maps

    def forward(self, _):
        return self.maps


@pytest.fixture
def forward_from(small_model):
    """Return a function from the output of the base to the output of the small model."""
    base = small_model.base

    def forward(conv4_3_feats, conv7_feats):
        small_model.base = FixedBase(conv4_3_feats, conv7_feats)
        return small_model(torch.zeros(1, 3, 300, 300))
    yield forward
    small_model.base = base


def test_network_predicts_one_row_per_prior(outputs):
    assert outputs['locs'].shape == (2, 8732, 4)
    assert outputs['scores'].shape == (2, 8732, 21)
    assert outputs['locs'].isfinite().all() and outputs['scores'].isfinite().all()


def test_prediction_for_an_image_does_not_depend_on_its_batch(model, images, outputs):
    with torch.no_grad():
        locs, scores = model(images[1:])
    torch.testing.assert_close(locs, outputs['locs'][1:], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(scores, outputs['scores'][1:], rtol=1e-4, atol=1e-4)


def test_priors_are_a_buffer_and_not_a_parameter(model, priors):
    assert torch.equal(dict(model.named_buffers())['priors_cxcy'], priors)
    assert 'priors_cxcy' not in dict(model.named_parameters())


def test_predictions_in_bfloat16_are_finite(small_model, forward_from):
    # The base sees a small image: many CPUs take a minute for a whole one in bfloat16.
    with torch.no_grad(), torch.autocast('cpu', dtype=torch.bfloat16):
        conv4_3_feats, conv7_feats = VGGBase()(torch.randn(1, 3, 44, 44))
        locs, scores = forward_from(1000 * torch.rand(1, 512, 38, 38).bfloat16(),
                                    torch.rand(1, 1024, 19, 19).bfloat16())
    for output in (conv4_3_feats, conv7_feats, locs, scores):
        assert output.dtype == torch.bfloat16 and output.isfinite().all()
        assert output.std() > 0


def test_conv4_3_is_normalized_to_length_20(small_model, forward_from):
    feature_maps = []
    hook = small_model.pred_convs.register_forward_pre_hook(
        lambda _, maps: feature_maps.extend(maps))
    forward_from(torch.rand(1, 512, 38, 38) * 1000, torch.rand(1, 1024, 19, 19))
    hook.remove()
    torch.testing.assert_close(feature_maps[0][0].norm(dim=0), torch.full((38, 38), 20.))


def test_gradients_with_a_cell_of_zeros_are_finite(small_model, forward_from):
    conv4_3 = torch.rand(1, 512, 38, 38)
    conv4_3[0, :, 5, 7] = 0
    conv4_3.requires_grad_(True)
    assert (small_model.rescale_factors == 20).all()
    locs, scores = forward_from(conv4_3, torch.rand(1, 1024, 19, 19))
    assert locs.isfinite().all() and scores.isfinite().all()
    factors_grad, conv4_3_grad = torch.autograd.grad(locs.sum() + scores.sum(),
                                                     [small_model.rescale_factors, conv4_3])
    assert factors_grad.numel() == 512 and (factors_grad != 0).all()
    assert conv4_3_grad.isfinite().all() and (conv4_3_grad != 0).any()


# --------------------------------------------------------------------------------------------------
# Checkpoints
# --------------------------------------------------------------------------------------------------


@pytest.fixture(scope='module')
def checkpoint(small_model, tmp_path_factory):
    path = tmp_path_factory.mktemp('checkpoint') / 'small.pth.tar'
    save_checkpoint(path, model=small_model.state_dict(), label_map=small_model.label_map)
    return path


@pytest.mark.parametrize('load', [
    lambda path: SSD300.from_checkpoint(path),
    lambda path: SSD300.from_state(load_checkpoint(path))], ids=['from_checkpoint', 'from_state'])
def test_loaded_model_equals_the_saved_one(small_model, checkpoint, load):
    loaded = load(checkpoint)
    assert not any(part.training for part in loaded.modules())
    assert loaded.label_map == LABEL_MAP
    expected, state = small_model.state_dict(), loaded.state_dict()
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[name], expected[name]) for name in expected)


@pytest.mark.parametrize('content', [
    None, lambda data: b'', lambda data: b'a text', lambda data: data[:len(data) // 2],
    lambda data: data[:-100]], ids=['missing', 'empty', 'text', 'half', 'all but 100 bytes'])
def test_file_that_is_no_checkpoint_is_a_user_error(checkpoint, tmp_path, content):
    path = tmp_path / 'other.pth.tar'
    if content:
        path.write_bytes(content(checkpoint.read_bytes()))
    with pytest.raises(UserError, match='other.pth.tar'):
        SSD300.from_checkpoint(path)


def without(state, name):
    return {key: value for key, value in state.items() if key != name}


@pytest.mark.parametrize('content', [
    lambda state: [1, 2],
    lambda state: {'state_dict': state},
    lambda state: {'model': state},
    lambda state: {'model': state, 'label_map': None},
    lambda state: {'model': [1, 2], 'label_map': LABEL_MAP},
    lambda state: {'model': state, 'label_map': without(LABEL_MAP, 'bird')},
    lambda state: {'model': state, 'label_map': {**LABEL_MAP, 'bird': 7}},
    lambda state: {'model': without(state, 'rescale_factors'), 'label_map': LABEL_MAP},
    lambda state: {'model': {**state, 'rescale_factors': torch.ones(1, 256, 1, 1)},
                   'label_map': LABEL_MAP},
    lambda state: {'model': {**state, 'rescale_factors': 20}, 'label_map': LABEL_MAP},
], ids=['list', 'other keys', 'no label map', 'label map None', 'model a list',
        'other number of classes', 'index too high', 'weight missing', 'other shape',
        'not a tensor'])
def test_checkpoint_of_another_program_or_model_is_a_user_error(small_model, tmp_path, content):
    # Names and shapes are those of a model; one number per tensor in the file is enough, except
    # where the classes are counted.
    whole = 'pred_convs.class_convs.0.weight'
    state = {name: tensor.flatten()[:1].clone().expand(tensor.numel()).view(tensor.shape)
             for name, tensor in small_model.state_dict().items()}
    state[whole] = small_model.state_dict()[whole].clone()
    path = tmp_path / 'other.pth.tar'
    torch.save(content(state), path)
    assert path.stat().st_size < 1e6
    with pytest.raises(UserError, match='other.pth.tar'):
        SSD300.from_checkpoint(path)


# --------------------------------------------------------------------------------------------------
# Detection
# --------------------------------------------------------------------------------------------------


def separated_predictions(n_images, n_classes):
    """Return random predictions whose probabilities differ clearly within an image.

    Some classes score higher than others, so that few of them have most of the candidates.

    Returns:
        locs, scores, and a function that returns the min_score which a given fraction exceeds.
    """
    n = 8732 * (n_classes - 1)
    keys = torch.rand(n_images, 8732, n_classes - 1) * torch.linspace(0.3, 1, n_classes - 1)
    rank = keys.view(n_images, n).argsort(dim=1).argsort(dim=1).double()
    probs = 0.9 / (n_classes - 1) * ((rank + 1) / n) ** 3
    probs = probs.view(n_images, 8732, n_classes - 1)
    probs = torch.cat([1 - probs.sum(dim=2, keepdim=True), probs], dim=2)

    def min_score(fraction):
        return 0.9 / (n_classes - 1) * ((round(n * (1 - fraction)) + 0.5) / n) ** 3
    return 3 * torch.randn(n_images, 8732, 4), probs.log().float(), min_score


def decode(locs, priors):
    centers = priors[:, :2] + locs[:, :2] * priors[:, 2:] / 10
    sizes = priors[:, 2:] * torch.exp(locs[:, 2:] / 5)
    return torch.cat([centers - sizes / 2, centers + sizes / 2], dim=1)


def detect_slowly(locs, scores, priors, min_score, max_overlap, top_k):
    """Detect objects in one image, with loops over classes and boxes."""
    boxes, probs = decode(locs, priors), scores.softmax(dim=1)
    detections = []     # (score, label, prior)
    for label in range(1, scores.shape[1]):
        score_of = probs[:, label].tolist()
        candidates = [p for p in range(len(score_of)) if score_of[p] > min_score]
        candidates = sorted(candidates, key=lambda p: -score_of[p])[:400]
        overlap = box_iou(boxes[candidates], boxes[candidates]).tolist()
        kept = []
        for i in range(len(candidates)):
            if all(overlap[j][i] <= max_overlap for j in kept):
                kept.append(i)
        detections += [(score_of[candidates[i]], label, candidates[i]) for i in kept]
    detections = sorted(detections, key=lambda detection: -detection[0])[:top_k]
    return (boxes[[p for _, _, p in detections]].view(-1, 4).clamp(0, 1),
            torch.tensor([label for _, label, _ in detections], dtype=torch.long),
            torch.tensor([score for score, _, _ in detections]))


@pytest.mark.parametrize(('n_classes', 'fraction', 'max_overlap', 'top_k', 'n_full'), [
    (4, 1, 0.45, 200, 6), (4, 0.5, 0.3, 100000, 6), (21, 0.01, 0.45, 200, 4),
    (4, 0.01, 0.45, 200, 0)])
def test_detection_equals_loops_over_classes_and_boxes(small_model, n_classes, fraction,
                                                       max_overlap, top_k, n_full):
    locs, scores, min_score_of = separated_predictions(2, n_classes)
    min_score = 0 if fraction == 1 else min_score_of(fraction)
    n_candidates = (scores.softmax(dim=2)[:, :, 1:] > min_score).sum(dim=1)
    assert (n_candidates > 400).sum() == n_full     # all of the others enter the suppression
    before = locs.clone(), scores.clone()
    detections = small_model.detect_objects(locs, scores, min_score, max_overlap, top_k)
    assert [len(part) for part in detections] == [2, 2, 2]
    for i, (boxes, labels, scores_of_image) in enumerate(zip(*detections)):
        expected = detect_slowly(locs[i], scores[i], small_model.priors_cxcy, min_score,
                                 max_overlap, top_k)
        assert labels.tolist() == expected[1].tolist()
        torch.testing.assert_close(scores_of_image, expected[2], rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(boxes, expected[0], rtol=1e-4, atol=1e-5)
    assert torch.equal(locs, before[0]) and torch.equal(scores, before[1])


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_detections_are_sorted_clipped_and_never_background(small_model, dtype):
    locs = 20 * torch.randn(2, 8732, 4)
    scores = torch.randn(2, 8732, 4)
    scores[..., 0] += 3
    detections = small_model.detect_objects(locs.to(dtype), scores.to(dtype), 0.01, 0.45, 200)
    for boxes, labels, top_scores in zip(*detections):
        assert boxes.shape == (200, 4) and labels.shape == top_scores.shape == (200,)
        assert boxes.dtype == top_scores.dtype == torch.float32 and labels.dtype == torch.int64
        assert (top_scores[:-1] >= top_scores[1:]).all() and top_scores.min() > 0.01
        assert (boxes == 0).any() and (boxes == 1).any()
        assert boxes.min() >= 0 and boxes.max() <= 1
        assert set(labels.tolist()) == {1, 2, 3}


def test_detections_in_an_image_do_not_depend_on_its_batch(small_model):
    locs, scores, min_score = separated_predictions(3, 4)
    arguments = min_score(0.1), 0.45, 200
    batch = small_model.detect_objects(locs, scores, *arguments)
    for i in range(3):
        single = small_model.detect_objects(locs[i:i + 1], scores[i:i + 1], *arguments)
        for part, part_of_single in zip(batch, single):
            torch.testing.assert_close(part[i], part_of_single[0], rtol=0, atol=1e-6)


def test_top_k_detections_are_the_first_of_more(small_model):
    locs, scores, _ = separated_predictions(2, 4)
    longer = small_model.detect_objects(locs, scores, 0.01, 0.45, 200)
    shorter = small_model.detect_objects(locs, scores, 0.01, 0.45, 7)
    for part, part_longer in zip(shorter, longer):
        assert [len(entries) for entries in part] == [7, 7]
        assert all(torch.equal(a, b[:7]) for a, b in zip(part, part_longer))


@pytest.mark.parametrize('empty', [(0, 1, 2), (1,), (0, 2)])
def test_no_detections_are_empty_tensors(small_model, empty):
    scores = torch.zeros(3, 8732, 4)
    scores[..., 0] = 20
    for i in set(range(3)) - set(empty):
        scores[i, 100, 2] = 40
    boxes, labels, top_scores = small_model.detect_objects(torch.zeros(3, 8732, 4), scores, 0.2,
                                                          0.5, 200)
    assert [len(entries) for entries in labels] == [int(i not in empty) for i in range(3)]
    for i in empty:
        assert boxes[i].shape == (0, 4) and labels[i].shape == top_scores[i].shape == (0,)
        assert boxes[i].dtype == top_scores[i].dtype == torch.float32
        assert labels[i].dtype == torch.int64


def test_equal_scores_of_all_priors_give_top_k_detections(small_model):
    zeros = torch.zeros(2, 8732, 4), torch.zeros(2, 8732, 21)
    for boxes, labels, scores in zip(*small_model.detect_objects(*zeros, 0.01, 0.45, 200)):
        assert len(boxes) == len(labels) == len(scores) == 200
        torch.testing.assert_close(scores, torch.full((200,), 1 / 21))
        same_class = labels.unsqueeze(1) == labels
        overlap = box_iou(boxes, boxes).fill_diagonal_(0) * same_class
        # Clipping may raise an IoU, but boxes inside the image are not clipped.
        inside = ((boxes > 0) & (boxes < 1)).all(dim=1)
        assert overlap[inside][:, inside].max() <= 0.45


def test_score_of_0_does_not_exceed_min_score_0(small_model):
    scores = torch.zeros(1, 8732, 4)
    scores[..., 1:] = -300      # a probability that is 0 in float32
    scores[0, 100, 2] = 1
    _, labels, top_scores = small_model.detect_objects(torch.zeros(1, 8732, 4), scores, 0, 0.45,
                                                         200)
    assert labels[0].tolist() == [2]
    assert (top_scores[0] > 0).all()


@pytest.mark.parametrize('part, number', [
    ('locs', math.inf), ('locs', -math.inf), ('locs', math.nan),
    ('scores', math.inf), ('scores', math.nan)])    # -inf is a probability of 0
def test_priors_whose_output_is_not_finite_are_not_detected(small_model, part, number):
    locs, scores, min_score_of = separated_predictions(2, 4)
    thresholds = min_score_of(0.5), 0.45, 200       # more than 400 candidates per class
    is_broken = torch.rand(2, 8732, 1) < 0.2
    background = torch.tensor([50., 0, 0, 0])
    expected = small_model.detect_objects(locs, torch.where(is_broken, background, scores),
                                          *thresholds)
    {'locs': locs, 'scores': scores}[part][..., 2:3].masked_fill_(is_broken, number)
    for images in (slice(0, 2), slice(0, 1), slice(1, 2)):
        detections = small_model.detect_objects(locs[images], scores[images], *thresholds)
        for entries, expected_entries in zip(detections, expected):
            for a, b in zip(entries, expected_entries[images], strict=True):
                torch.testing.assert_close(a, b, rtol=0, atol=1e-6)


@pytest.mark.parametrize('offset', [3e38, 1e4, -1e4, -3e38])
@pytest.mark.parametrize('columns', [slice(0, 2), slice(2, 4), slice(0, 4)],
                         ids=['centers', 'sizes', 'both'])
def test_boxes_of_huge_offsets_are_in_the_image(small_model, offset, columns):
    locs, scores = torch.zeros(2, 8732, 4), torch.zeros(2, 8732, 4)
    locs[..., columns] = offset
    scores[..., 1] = 5
    for boxes in small_model.detect_objects(locs, scores, 0.5, 0.45, 200)[0]:
        assert len(boxes) > 0 and boxes.isfinite().all()
        assert boxes.min() >= 0 and boxes.max() <= 1 and (boxes[:, :2] <= boxes[:, 2:]).all()
        if offset > 0 and columns == slice(2, 4):
            assert len(boxes) < 50      # they overlap, so most are suppressed


def test_ordinary_offsets_are_not_bounded(small_model, monkeypatch):
    locs, scores, _ = separated_predictions(1, 4)
    bounded = small_model.detect_objects(locs, scores, 0.01, 0.45, 200)
    monkeypatch.setattr('model.MAX_SIZE_OFFSET', math.inf)
    unbounded = small_model.detect_objects(locs, scores, 0.01, 0.45, 200)
    assert all(torch.equal(a, b) for (a,), (b,) in zip(bounded, unbounded))


def test_presets_of_thresholds(small_model):
    assert EVALUATION == {'min_score': 0.01, 'max_overlap': 0.45, 'top_k': 200}
    assert VISUALIZATION == {'min_score': 0.2, 'max_overlap': 0.5, 'top_k': 200}
    locs, scores, _ = separated_predictions(1, 4)
    for preset in (EVALUATION, VISUALIZATION):
        _, _, top_scores = small_model.detect_objects(locs, scores, **preset)
        assert top_scores[0].min() > preset['min_score'] and len(top_scores[0]) <= 200
