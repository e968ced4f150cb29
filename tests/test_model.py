"""model.py against properties, slow references written out here, and torchvision."""

import http.client
import math
import urllib.error
import urllib.request

import pytest
import torch
import torchvision
from torch import nn
from torchvision.ops import box_iou

import utils
from model import (
    SSD300,
    AuxiliaryConvolutions,
    L2Rescale,
    PredictionConvolutions,
    VGGBase,
)

LABEL_MAP = {'background': 0, 'cat': 1, 'dog': 2, 'bird': 3}


@pytest.fixture(scope='module')
def model():
    torch.manual_seed(0)
    return SSD300(21).eval()


@pytest.fixture(scope='module')
def small_model():
    """Four classes, with names."""
    torch.manual_seed(1)
    model = SSD300(len(LABEL_MAP)).eval()
    model.label_map = dict(LABEL_MAP)
    return model


@pytest.fixture(scope='module')
def images():
    return torch.randn(2, 3, 300, 300, generator=torch.Generator().manual_seed(2))


@pytest.fixture(scope='module')
def outputs(model, images):
    """What two images give: by part of the network, and `locs` and `scores` at its end."""
    found = {}
    hooks = [part.register_forward_hook(lambda _, __, out, name=name: found.update({name: out}))
             for name, part in (('base', model.base), ('aux', model.aux_convs))]
    with torch.no_grad():
        found['locs'], found['scores'] = model(images)
    for hook in hooks:
        hook.remove()
    return found


def convolutions(module):
    return [layer for layer in module.modules() if isinstance(layer, nn.Conv2d)]


# --------------------------------------------------------------------------------------------------
# The base
# --------------------------------------------------------------------------------------------------


@pytest.fixture(scope='module')
def vgg():
    """torchvision's VGG-16 with random weights, its biases too."""
    torch.manual_seed(3)
    vgg = torchvision.models.vgg16(weights=None).eval()
    for name, parameter in vgg.named_parameters():
        if name.endswith('bias'):
            nn.init.uniform_(parameter, -0.1, 0.1)
    return vgg.requires_grad_(False)


@pytest.fixture(scope='module')
def pretrained(vgg):
    """A base that took its weights from `vgg`, and what its weights were before."""
    base = VGGBase().requires_grad_(False)
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torchvision.models.VGG16_Weights, 'get_state_dict',
                      lambda *_, **__: vgg.state_dict())
        base.load_pretrained_layers()
    return base, before


def test_base_gives_the_maps_of_conv4_3_and_conv7(outputs):
    conv4_3_feats, conv7_feats = outputs['base']
    assert conv4_3_feats.shape == (2, 512, 38, 38)
    assert conv7_feats.shape == (2, 1024, 19, 19)
    assert conv4_3_feats.min() == 0 and conv7_feats.min() == 0     # after the ReLU


def test_pretrained_features_are_those_of_torchvision(vgg, pretrained, monkeypatch):
    base, _ = pretrained
    # The third pooling sees 11 cells of 44 pixels, an odd number as with 300.
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


def test_loading_replaces_every_weight_and_bias(pretrained):
    base, before = pretrained
    kept = [name for name, tensor in base.state_dict().items()
            if (tensor == before[name]).float().mean() > 0.01]
    assert len(before) == 2 * 15
    assert kept == []


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


def test_conv6_looks_six_cells_away(vgg, pretrained):
    base, _ = pretrained
    feats = torch.randn(1, 512, 19, 19)
    got = base.conv6(feats)
    fc6 = vgg.classifier[0].weight.view(4096, 512, 7, 7)
    for out, y, x in ((3, 9, 9), (8, 0, 18), (1000, 4, 14)):
        expected = vgg.classifier[0].bias[4 * out]
        for row in range(3):
            for column in range(3):
                there_y, there_x = y + 6 * (row - 1), x + 6 * (column - 1)
                if 0 <= there_y < 19 and 0 <= there_x < 19:
                    tap = fc6[4 * out, :, 3 * row, 3 * column]
                    expected = expected + tap @ feats[0, :, there_y, there_x]
        assert got[0, out, y, x].item() == pytest.approx(expected.item(), abs=1e-4)


@pytest.mark.parametrize('error', [
    urllib.error.URLError('no route'), TimeoutError('timed out'), RuntimeError('invalid hash'),
    http.client.IncompleteRead(b'')], ids=lambda error: type(error).__name__)
def test_a_failed_download_says_how_to_go_on(model, monkeypatch, error):
    def fail(*_, **__):
        raise error
    monkeypatch.setattr(torchvision.models.VGG16_Weights, 'get_state_dict', fail)
    with pytest.raises(utils.UserError, match='--no-pretrained'):
        model.base.load_pretrained_layers()


@pytest.mark.parametrize('content', [b'', b'<html>not found</html>', b'PK\x03\x04' + 99 * b'0'],
                         ids=['empty', 'a web page', 'a broken archive'])
def test_a_damaged_file_of_weights_says_how_to_go_on(model, monkeypatch, tmp_path, content):
    folder = tmp_path / 'hub' / 'checkpoints'
    folder.mkdir(parents=True)
    (folder / 'vgg16-397923af.pth').write_bytes(content)
    monkeypatch.setenv('TORCH_HOME', str(tmp_path))
    with pytest.raises(utils.UserError, match='--no-pretrained'):
        model.base.load_pretrained_layers()


def test_an_untrained_base_is_he_normal(small_model):
    for layer in convolutions(small_model.base):
        fan_in = layer.weight[0].numel()
        assert layer.weight.std().item() == pytest.approx(math.sqrt(2 / fan_in), rel=0.08)
        assert abs(layer.weight.mean()) < 0.1 * math.sqrt(2 / fan_in)
        assert layer.weight.abs().max() > 2 * math.sqrt(2 / fan_in)     # beyond any uniform
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
# The convolutions on top, and the predictions
# --------------------------------------------------------------------------------------------------

# Contract of the maps, repeated here by hand: channels, size, scale, ratios.
MAPS = [(512, 38, 0.1, (1, 2, 1 / 2)), (1024, 19, 0.2, (1, 2, 3, 1 / 2, 1 / 3)),
        (512, 10, 0.375, (1, 2, 3, 1 / 2, 1 / 3)), (256, 5, 0.55, (1, 2, 3, 1 / 2, 1 / 3)),
        (256, 3, 0.725, (1, 2, 1 / 2)), (256, 1, 0.9, (1, 2, 1 / 2))]
N_PRIORS_PER_CELL = [4, 6, 6, 6, 4, 4]
N_PRIORS_OF_MAPS = [5776, 2166, 600, 150, 36, 4]


def test_auxiliary_maps_have_their_shapes(outputs):
    assert [tuple(feats.shape) for feats in outputs['aux']] == [
        (2, 512, 10, 10), (2, 256, 5, 5), (2, 256, 3, 3), (2, 256, 1, 1)]


@pytest.mark.parametrize('make', [AuxiliaryConvolutions, lambda: PredictionConvolutions(4)],
                         ids=['auxiliary', 'prediction'])
def test_new_convolutions_are_xavier_uniform(make):
    layers = convolutions(make())
    assert len(layers) in (8, 12)
    for layer in layers:
        fans = sum(layer.weight.shape[:2]) * layer.weight[0, 0].numel()
        bound = math.sqrt(6 / fans)
        assert 0.99 * bound < layer.weight.abs().max() <= bound * 1.000001
        assert layer.weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.05)
        assert (layer.bias == 0).all()


@pytest.fixture
def blank_heads():
    """Prediction convolutions of 3 classes whose weights are all 0, and six maps of zeros."""
    heads = PredictionConvolutions(3).requires_grad_(False)
    for layer in convolutions(heads):
        layer.weight.zero_()
    return heads, [torch.zeros(2, channels, size, size) for channels, size, _, _ in MAPS]


def test_predictions_come_map_by_map_and_prior_by_prior(blank_heads):
    heads, maps = blank_heads
    # A channel's number, as its bias, says for which prior of the cell and what it predicts.
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
def test_a_cell_feeds_the_rows_of_its_own_priors(blank_heads, number, row, column):
    heads, maps = blank_heads
    for layer in convolutions(heads):
        layer.weight[:, 0, 1, 1] = 1
    maps[number][0, 0, row, column] = 1
    _, size, _, _ = MAPS[number]
    centre = torch.tensor([(column + 0.5) / size, (row + 0.5) / size])
    start = sum(N_PRIORS_OF_MAPS[:number])
    for predictions in heads(*maps):
        changed = (predictions[0] != 0).all(dim=1).nonzero().squeeze(1)
        assert len(changed) == N_PRIORS_PER_CELL[number]
        assert start <= changed.min() and changed.max() < start + N_PRIORS_OF_MAPS[number]
        centres = SSD300.create_prior_boxes()[changed, :2]
        torch.testing.assert_close(centres, centre.expand_as(centres))
        assert (predictions[1] == 0).all()


# --------------------------------------------------------------------------------------------------
# The priors
# --------------------------------------------------------------------------------------------------


@pytest.fixture(scope='module')
def priors():
    return SSD300.create_prior_boxes()


def test_priors_are_8732_float32_rows_within_the_image(priors):
    assert priors.shape == (8732, 4) and priors.dtype == torch.float32
    assert priors.min() > 0 and priors.max() <= 1


def test_priors_equal_a_loop_over_maps_rows_columns_and_ratios(priors):
    expected = []
    for number, (_, size, scale, ratios) in enumerate(MAPS):
        next_scale = MAPS[number + 1][2] if number < 5 else 1.
        for i in range(size):
            for j in range(size):
                for ratio in ratios:
                    centre = [(j + 0.5) / size, (i + 0.5) / size]
                    expected.append(
                        [*centre, scale * math.sqrt(ratio), scale / math.sqrt(ratio)])
                    if ratio == 1:
                        expected.append([*centre] + 2 * [math.sqrt(scale * next_scale)])
        assert len(expected) == sum(N_PRIORS_OF_MAPS[:number + 1])
    torch.testing.assert_close(priors, torch.tensor(expected).clamp(0, 1), rtol=0, atol=1e-6)


@pytest.mark.parametrize(('start', 'centre', 'sizes'), [
    (0, 0.013158, [(0.1, 0.1), (0.141421, 0.141421), (0.141421, 0.070711), (0.070711, 0.141421)]),
    (5776, 0.026316, [(0.2, 0.2), (0.273861, 0.273861), (0.282843, 0.141421),
                      (0.346410, 0.115470), (0.141421, 0.282843), (0.115470, 0.346410)]),
    (8728, 0.5, [(0.9, 0.9), (0.948683, 0.948683), (1.0, 0.636396), (0.636396, 1.0)]),
], ids=['conv4_3', 'conv7', 'conv11_2'])
def test_first_cell_of_a_map_has_these_priors(priors, start, centre, sizes):
    expected = torch.tensor([(centre, centre, *size) for size in sizes])
    torch.testing.assert_close(priors[start:start + len(sizes)], expected, rtol=0, atol=1e-6)


# --------------------------------------------------------------------------------------------------
# The network
# --------------------------------------------------------------------------------------------------


class Fixed(nn.Module):
    """A base that gives these maps whatever the image."""

    def __init__(self, *maps):
        super().__init__()
        self.maps = maps

    def forward(self, _):
        return self.maps


@pytest.fixture
def forward_from(small_model):
    """A function from what the base gives to what the small model makes of it."""
    base = small_model.base

    def forward(conv4_3_feats, conv7_feats):
        small_model.base = Fixed(conv4_3_feats, conv7_feats)
        return small_model(torch.zeros(1, 3, 300, 300))
    yield forward
    small_model.base = base


def test_network_gives_a_row_a_prior(outputs):
    assert outputs['locs'].shape == (2, 8732, 4)
    assert outputs['scores'].shape == (2, 8732, 21)
    assert outputs['locs'].isfinite().all() and outputs['scores'].isfinite().all()


def test_an_image_alone_gives_what_it_gives_in_a_batch(model, images, outputs):
    with torch.no_grad():
        locs, scores = model(images[1:])
    torch.testing.assert_close(locs, outputs['locs'][1:], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(scores, outputs['scores'][1:], rtol=1e-4, atol=1e-4)


def test_priors_are_a_buffer_and_not_learned(model, priors):
    assert torch.equal(dict(model.named_buffers())['priors_cxcy'], priors)
    assert 'priors_cxcy' not in dict(model.named_parameters())


def test_bfloat16_gives_finite_predictions(model, images):
    with torch.no_grad(), torch.autocast('cpu', dtype=torch.bfloat16):
        locs, scores = model(images[:1])
    assert locs.isfinite().all() and scores.isfinite().all()


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16, torch.float16])
def test_rescaling_equals_normalization_in_float32_and_so_do_its_gradients(dtype):
    feats = torch.rand(5, 64, 3, 3).relu() * 1000       # whose squares float16 cannot hold
    feats[0, :, 1, 2] = 0
    feats = feats.to(dtype).requires_grad_()
    factors = (20 * torch.rand(1, 64, 1, 1)).requires_grad_()
    weights = torch.randn(5, 64, 3, 3).to(dtype)

    rescaled = L2Rescale.apply(feats, factors)
    expected = (nn.functional.normalize(feats.float(), dim=1, eps=1e-10) * factors).to(dtype)
    assert rescaled.dtype == dtype and (rescaled[0, :, 1, 2] == 0).all()
    torch.testing.assert_close(rescaled, expected)
    found = torch.autograd.grad((rescaled * weights).sum(), [feats, factors])
    wanted = torch.autograd.grad((expected * weights).sum(), [feats, factors])
    for gradients in (found[0], wanted[0]):
        gradients[0, :, 1, 2] = 0                       # there the epsilon makes them huge
    rtol = 1e-4 if dtype == torch.float32 else 1e-2
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=rtol)


def test_conv4_3_is_normalized_to_length_20(small_model, forward_from):
    seen = []
    hook = small_model.pred_convs.register_forward_pre_hook(lambda _, maps: seen.extend(maps))
    forward_from(torch.rand(1, 512, 38, 38) * 1000, torch.rand(1, 1024, 19, 19))
    hook.remove()
    torch.testing.assert_close(seen[0][0].norm(dim=0), torch.full((38, 38), 20.))


def test_a_cell_of_zeros_has_finite_gradients_and_the_factors_learn(small_model, forward_from):
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
    utils.save_checkpoint(path, model=small_model.state_dict(), label_map=small_model.label_map)
    return path


def test_a_model_comes_back_from_its_checkpoint(small_model, checkpoint):
    loaded = SSD300.from_checkpoint(checkpoint)
    assert not any(part.training for part in loaded.modules())
    assert loaded.label_map == LABEL_MAP
    expected, got = small_model.state_dict(), loaded.state_dict()
    assert got.keys() == expected.keys()
    assert all(torch.equal(got[name], expected[name]) for name in expected)


@pytest.mark.parametrize('content', [
    None, lambda data: b'', lambda data: b'a text', lambda data: data[:len(data) // 2],
    lambda data: data[:-100]], ids=['missing', 'empty', 'text', 'half', 'nearly whole'])
def test_a_file_that_is_no_checkpoint_is_named(checkpoint, tmp_path, content):
    path = tmp_path / 'other.pth.tar'
    if content:
        path.write_bytes(content(checkpoint.read_bytes()))
    with pytest.raises(utils.UserError, match='other.pth.tar'):
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
    lambda state: {'model': without(state, 'rescale_factors'), 'label_map': LABEL_MAP},
    lambda state: {'model': {**state, 'rescale_factors': torch.ones(1, 256, 1, 1)},
                   'label_map': LABEL_MAP},
    lambda state: {'model': {**state, 'rescale_factors': 20}, 'label_map': LABEL_MAP},
], ids=['list', 'other keys', 'no label map', 'label map None', 'model a list',
        'other number of classes', 'weight missing', 'other shape', 'not a tensor'])
def test_a_checkpoint_of_another_program_or_model_is_named(small_model, tmp_path, content):
    path = tmp_path / 'other.pth.tar'
    torch.save(content(small_model.state_dict()), path)
    with pytest.raises(utils.UserError, match='other.pth.tar'):
        SSD300.from_checkpoint(path)


# --------------------------------------------------------------------------------------------------
# Detection
# --------------------------------------------------------------------------------------------------


def separated_predictions(n_images, n_classes):
    """Random locs and scores whose probabilities all lie well apart within an image.

    Some classes score higher than others, so that few of them have most of the candidates.

    Returns:
        locs, scores, and a function from a share to the min_score that so many are above.
    """
    n = 8732 * (n_classes - 1)
    keys = torch.rand(n_images, 8732, n_classes - 1) * torch.linspace(0.3, 1, n_classes - 1)
    rank = keys.view(n_images, n).argsort(dim=1).argsort(dim=1).double()
    probs = 0.9 / (n_classes - 1) * ((rank + 1) / n) ** 3
    probs = probs.view(n_images, 8732, n_classes - 1)
    probs = torch.cat([1 - probs.sum(dim=2, keepdim=True), probs], dim=2)

    def min_score(share):
        return 0.9 / (n_classes - 1) * ((round(n * (1 - share)) + 0.5) / n) ** 3
    return 3 * torch.randn(n_images, 8732, 4), probs.log().float(), min_score


def decode(locs, priors):
    centres = priors[:, :2] + locs[:, :2] * priors[:, 2:] / 10
    sizes = priors[:, 2:] * torch.exp(locs[:, 2:] / 5)
    return torch.cat([centres - sizes / 2, centres + sizes / 2], dim=1)


def detect_slowly(locs, scores, priors, min_score, max_overlap, top_k):
    """Detection in one image, as loops over classes and boxes."""
    boxes, probs = decode(locs, priors), scores.softmax(dim=1)
    found = []      # (score, label, prior)
    for label in range(1, scores.shape[1]):
        of_class = probs[:, label].tolist()
        candidates = [p for p in range(len(of_class)) if of_class[p] > min_score]
        candidates = sorted(candidates, key=lambda p: -of_class[p])[:400]
        overlap = box_iou(boxes[candidates], boxes[candidates]).tolist()
        kept = []
        for i in range(len(candidates)):
            if all(overlap[j][i] <= max_overlap for j in kept):
                kept.append(i)
        found += [(of_class[candidates[i]], label, candidates[i]) for i in kept]
    found = sorted(found, key=lambda entry: -entry[0])[:top_k]
    return (boxes[[p for _, _, p in found]].view(-1, 4).clamp(0, 1),
            torch.tensor([label for _, label, _ in found], dtype=torch.long),
            torch.tensor([score for score, _, _ in found]))


@pytest.mark.parametrize('n_classes', [4, 21])
@pytest.mark.parametrize(('share', 'max_overlap', 'top_k'), [
    (1, 0.45, 200), (0.5, 0.3, 100000), (0.01, 0.45, 200)])
def test_detection_equals_loops_over_classes_and_boxes(model, small_model, n_classes, share,
                                                       max_overlap, top_k):
    locs, scores, min_score = separated_predictions(3, n_classes)
    bar = 0 if share == 1 else min_score(share)
    above = (scores.softmax(dim=2)[:, :, 1:] > bar).sum(dim=1)
    assert (above > 400).any() or (share, n_classes) == (0.01, 4)
    before = locs.clone(), scores.clone()
    detector = model if n_classes == 21 else small_model
    found = detector.detect_objects(locs, scores, bar, max_overlap, top_k)
    assert [len(part) for part in found] == [3, 3, 3]
    for i, (boxes, labels, of_labels) in enumerate(zip(*found)):
        expected = detect_slowly(locs[i], scores[i], model.priors_cxcy, bar, max_overlap, top_k)
        assert labels.tolist() == expected[1].tolist()
        torch.testing.assert_close(of_labels, expected[2], rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(boxes, expected[0], rtol=1e-4, atol=1e-5)
    assert torch.equal(locs, before[0]) and torch.equal(scores, before[1])


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_detections_are_sorted_clipped_typed_and_never_background(small_model, dtype):
    locs = 20 * torch.randn(2, 8732, 4)
    scores = torch.randn(2, 8732, 4)
    scores[..., 0] += 3
    found = small_model.detect_objects(locs.to(dtype), scores.to(dtype), 0.01, 0.45, 200)
    for boxes, labels, of_labels in zip(*found):
        assert boxes.shape == (200, 4) and labels.shape == of_labels.shape == (200,)
        assert boxes.dtype == of_labels.dtype == torch.float32 and labels.dtype == torch.int64
        assert (of_labels[:-1] >= of_labels[1:]).all() and of_labels.min() > 0.01
        assert (boxes == 0).any() and (boxes == 1).any()
        assert boxes.min() >= 0 and boxes.max() <= 1
        assert set(labels.tolist()) == {1, 2, 3}


def test_an_image_alone_is_detected_as_in_a_batch(small_model):
    locs, scores, min_score = separated_predictions(3, 4)
    arguments = min_score(0.1), 0.45, 200
    batch = small_model.detect_objects(locs, scores, *arguments)
    for i in range(3):
        alone = small_model.detect_objects(locs[i:i + 1], scores[i:i + 1], *arguments)
        for part, part_alone in zip(batch, alone):
            torch.testing.assert_close(part[i], part_alone[0], rtol=0, atol=1e-6)


def test_top_k_takes_the_first_of_the_longer_list(small_model):
    locs, scores, _ = separated_predictions(2, 4)
    longer = small_model.detect_objects(locs, scores, 0.01, 0.45, 200)
    shorter = small_model.detect_objects(locs, scores, 0.01, 0.45, 7)
    for part, part_longer in zip(shorter, longer):
        assert [len(entries) for entries in part] == [7, 7]
        assert all(torch.equal(a, b[:7]) for a, b in zip(part, part_longer))


@pytest.mark.parametrize('silent', [(0, 1, 2), (1,), (0, 2)])
def test_nothing_found_is_an_empty_tensor(small_model, silent):
    scores = torch.zeros(3, 8732, 4)
    scores[..., 0] = 20
    for i in set(range(3)) - set(silent):
        scores[i, 100, 2] = 40
    boxes, labels, of_labels = small_model.detect_objects(torch.zeros(3, 8732, 4), scores, 0.2,
                                                          0.5, 200)
    assert [len(entries) for entries in labels] == [int(i not in silent) for i in range(3)]
    for i in silent:
        assert boxes[i].shape == (0, 4) and labels[i].shape == of_labels[i].shape == (0,)
        assert boxes[i].dtype == of_labels[i].dtype == torch.float32
        assert labels[i].dtype == torch.int64


def test_equal_scores_everywhere_give_no_more_than_top_k(model):
    zeros = torch.zeros(2, 8732, 4), torch.zeros(2, 8732, 21)
    for boxes, labels, scores in zip(*model.detect_objects(*zeros, 0.01, 0.45, 200)):
        assert len(boxes) == len(labels) == len(scores) == 200
        torch.testing.assert_close(scores, torch.full((200,), 1 / 21))
        same_class = labels.unsqueeze(1) == labels
        overlap = box_iou(boxes, boxes).fill_diagonal_(0) * same_class
        # Two of a class overlapped less before they were clipped; inside the image nothing was.
        inside = ((boxes > 0) & (boxes < 1)).all(dim=1)
        assert overlap[inside][:, inside].max() <= 0.45


def test_a_score_of_0_is_not_above_a_min_score_of_0(small_model):
    scores = torch.zeros(1, 8732, 4)
    scores[..., 1:] = -300      # a probability that float32 writes as 0
    scores[0, 100, 2] = 1
    _, labels, of_labels = small_model.detect_objects(torch.zeros(1, 8732, 4), scores, 0, 0.45, 200)
    assert labels[0].tolist() == [2]
    assert (of_labels[0] > 0).all()
