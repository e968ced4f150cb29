"""Batch normalization: its folding, pretrained weights, optimizer, running statistics, and runs."""

import copy
import dataclasses
import math

import pytest
import torch
import torchvision

import train
from create_data_lists import Parameters as ListParameters, main as make_lists
from datasets import PascalVOCDataset, make_test_loader
from model import SSD300, MultiBoxLoss
from support.batch_norm import add_batch_norm, fold_batch_norm, is_norm
from support.checkpoints import load_checkpoint, save_checkpoint
from support.compilation import compile_network_and_loss
from support.training_log import draw_detections
from thin import ThinSSD300


@pytest.fixture
def network():
    """Return a thin network with batch normalization of random parameters and statistics."""
    network = ThinSSD300(3)
    add_batch_norm(network)
    randomize_norms(network)
    return network.eval()


def randomize_norms(module):
    """Give each BatchNorm2d random parameters and statistics; variances are positive."""
    for layer in module.modules():
        if isinstance(layer, torch.nn.BatchNorm2d):
            for tensor in (layer.weight, layer.bias, layer.running_mean, layer.running_var):
                torch.nn.init.uniform_(tensor, 0.5, 1.5)


def running_statistics(module):
    return {name: buffer.clone() for name, buffer in module.named_buffers() if is_norm(name)}


def assert_equal(a, b):
    assert a.keys() == b.keys()
    assert all(torch.equal(tensor, b[name]) for name, tensor in a.items())


# --------------------------------------------------------------------------------------------------
# Folding
# --------------------------------------------------------------------------------------------------


def test_folded_network_predicts_the_same(network):
    state = copy.deepcopy(network.state_dict())
    folded = ThinSSD300(3).eval()
    folded.load_state_dict(fold_batch_norm(network.state_dict()))
    assert_equal(state, network.state_dict())   # a copy was folded
    images = torch.randn(2, 3, 300, 300)
    with torch.no_grad():
        for expected, predicted in zip(network(images), folded(images)):
            assert expected.std() > 0.01
            torch.testing.assert_close(predicted, expected, rtol=1e-4, atol=1e-4)


def test_folding_is_computed_in_float64(network):
    state, folded = network.state_dict(), fold_batch_norm(network.state_dict())
    weight, bias, gamma, beta, mean, variance = (
        state[f'aux_convs.conv9_2.{key}'].double() for key in (
            'weight', 'bias', 'norm.weight', 'norm.bias', 'norm.running_mean', 'norm.running_var'))
    std = (variance + 1e-5) ** 0.5
    torch.testing.assert_close(folded['aux_convs.conv9_2.weight'],
                               (weight * (gamma / std)[:, None, None, None]).float(),
                               rtol=1.2e-7, atol=0)
    torch.testing.assert_close(folded['aux_convs.conv9_2.bias'],
                               (beta + (bias - mean) * gamma / std).float(), rtol=1.2e-7, atol=1e-9)


def test_state_without_batch_normalization_is_unchanged():
    state = ThinSSD300(3).state_dict()
    assert_equal(fold_batch_norm(state), state)


def test_checkpoint_is_loaded_as_the_network_of_the_paper(tmp_path):
    network = SSD300(3)
    add_batch_norm(network)
    randomize_norms(network)
    save_checkpoint(tmp_path / 'a.pth', model=network.state_dict(), label_map=network.label_map)
    loaded = SSD300.from_checkpoint(tmp_path / 'a.pth')
    assert loaded.state_dict().keys() == SSD300(3).state_dict().keys()
    image = torch.randn(1, 512, 8, 8)
    with torch.no_grad():
        torch.testing.assert_close(loaded.base.conv5_1(image), network.eval().base.conv5_1(image),
                                   rtol=1e-4, atol=1e-4)


# --------------------------------------------------------------------------------------------------
# Initial weights, pretrained weights and the optimizer
# --------------------------------------------------------------------------------------------------


def test_features_equal_those_of_torchvisions_vgg_with_batch_normalization(monkeypatch):
    with torch.device('meta'):      # without torchvision's slow initialization
        vgg = torchvision.models.vgg16_bn(weights=None, init_weights=False)
    vgg = vgg.to_empty(device='cpu').eval().requires_grad_(False)
    for parameter in vgg.parameters():
        torch.nn.init.uniform_(parameter, -0.05, 0.05)
    randomize_norms(vgg)
    # Files that are older than this counter do not have it.
    state = {key: tensor for key, tensor in vgg.state_dict().items() if 'tracked' not in key}
    monkeypatch.setattr(torchvision.models.VGG16_BN_Weights, 'get_state_dict',
                        lambda *_, **__: state)
    network = SSD300(2)
    add_batch_norm(network)
    base = network.base.eval().requires_grad_(False)
    base.load_pretrained_layers()

    image = torch.randn(1, 3, 44, 44)
    monkeypatch.setattr(vgg.features[23], 'ceil_mode', True)    # the third pooling
    conv5_3 = []
    base.conv5_3.register_forward_hook(lambda _, __, out: conv5_3.append(out.clone()))
    conv4_3_feats, _ = base(image)
    torch.testing.assert_close(conv4_3_feats, vgg.features[:33](image), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(conv5_3[0], vgg.features[:42](image), rtol=1e-4, atol=1e-4)
    # VGG-16 has no batch normalization of fc6 and fc7.
    assert torch.equal(base.conv7.weight[1, :, 0, 0], state['classifier.3.weight'][4, ::4])
    feats = torch.randn(1, 1024, 2, 2)
    torch.testing.assert_close(base.conv7.norm(feats), feats, rtol=1e-4, atol=1e-4)


def test_prediction_convolutions_start_at_a_tenth():
    network = ThinSSD300(3)
    before = {name: weight.clone() for name, weight in network.named_parameters()}
    add_batch_norm(network)
    for name, weight in before.items():
        scale = 0.1 if name.startswith('pred_convs.') else 1
        assert torch.equal(network.get_parameter(name), scale * weight)


def test_initial_loss_is_little_more_than_that_of_scores_of_zero():
    # With Xavier's weights it is 24.5: the hard negatives of an object are those of the highest
    # scores, three for each of its positives.
    torch.manual_seed(0)
    network = SSD300(5)
    add_batch_norm(network)
    with torch.no_grad():
        locs, scores = network(torch.randn(2, 3, 300, 300))
    criterion = MultiBoxLoss(network.priors_cxcy)
    boxes, labels = torch.tensor([[[0.2, 0.2, 0.5, 0.6]]] * 2), torch.tensor([[1], [2]])
    criterion(locs, scores, boxes, labels)
    assert 1 < criterion.conf_loss.item() / (4 * math.log(5)) < 1.3


@pytest.mark.parametrize('kind', ['sgd', 'adamw'])
def test_parameters_have_the_plain_rate_and_no_weight_decay(network, kind):
    decayed, biases, norms = train.make_optimizer(network, kind, 5e-4).param_groups
    assert (norms['rate_factor'], norms['weight_decay']) == (1, 0)
    assert len(norms['params']) == 2 * 23
    assert {id(p) for p in norms['params']} == {
        id(p) for name, p in network.named_parameters() if is_norm(name)}
    plain = ThinSSD300(3)
    groups = train.make_optimizer(plain, kind, 5e-4).param_groups
    assert ([len(group['params']) for group in groups]
            == [len(decayed['params']), len(biases['params'])])


# --------------------------------------------------------------------------------------------------
# Running statistics
# --------------------------------------------------------------------------------------------------


@pytest.fixture
def parameters(make_voc, tmp_path):
    """Parameters of two iterations on four images of two classes, with two images in a batch."""
    images = {f'im{i}': [('cat', (5, 5, 30, 30)), ('dog', (20, 10, 60, 45))] for i in range(4)}
    voc = make_voc({'train': images, 'test': {'t0': [('cat', (5, 5, 30, 30))], 't1': []}})
    lists = str(tmp_path / 'lists')
    make_lists(ListParameters(train=(f'{voc}:train',), test=(f'{voc}:test',), output_folder=lists))
    return train.Parameters(
        data_folder=lists, pretrained=False, batch_norm=True, iterations=2, batch_size=2, warmup=2,
        decay_lr_at=(1,), eval_every=0, workers=0, device='cpu', precision='float32',
        checkpoint=str(tmp_path / 'run' / 'checkpoint.pth.tar'))


def test_evaluations_and_drawings_do_not_change_them(network, parameters):
    network.label_map = {'background': 0, 'cat': 1, 'dog': 2}
    before = running_statistics(network.train())
    dataset = PascalVOCDataset(parameters.data_folder, 'TEST', keep_difficult=True)
    train.evaluate(make_test_loader(dataset, 2, 0, torch.device('cpu')), network, coco=False)
    draw_detections(network, *dataset[0][:2])
    assert network.training
    assert_equal(running_statistics(network), before)


@pytest.mark.parametrize('works', [True, False])
def test_compilation_does_not_change_them(network, monkeypatch, works):
    def fail(*args):
        raise RuntimeError('no compiler')

    monkeypatch.setattr(torch, 'compile', lambda function, **_: function if works else fail)
    before = running_statistics(network.train())
    compile_network_and_loss('on', network, MultiBoxLoss(network.priors_cxcy),
                                   torch.autocast('cpu', enabled=False), 2, 300)
    assert_equal(running_statistics(network), before)
    network(torch.zeros(2, 3, 300, 300))
    after = running_statistics(network)
    assert after['base.conv1_1.norm.num_batches_tracked'] == 1
    assert not torch.equal(after['base.conv1_1.norm.running_var'],
                           before['base.conv1_1.norm.running_var'])


def test_ranks_evaluate_with_the_statistics_of_rank_0(parameters, monkeypatch):
    events = []
    monkeypatch.setitem(train.NETWORKS, 'ssd300', ThinSSD300)
    monkeypatch.setattr(train, 'broadcast_buffers', lambda model: events.append('broadcast'))
    monkeypatch.setattr(train, 'evaluate', lambda *args, **_: events.append('evaluate') or ({}, .5))
    train.main(dataclasses.replace(parameters, eval_every=2))
    assert events == ['broadcast', 'broadcast', 'evaluate']     # the first at the start


# --------------------------------------------------------------------------------------------------
# Runs
# --------------------------------------------------------------------------------------------------


def test_resumed_run_equals_the_uninterrupted_one_in_every_bit(parameters, tmp_path, monkeypatch,
                                                               capsys):
    monkeypatch.setitem(train.NETWORKS, 'ssd300', ThinSSD300)
    paths = [str(tmp_path / name / 'a.pth.tar') for name in ('whole', 'resumed')]
    train.main(dataclasses.replace(parameters, iterations=3, checkpoint=paths[0]))
    resumed = dataclasses.replace(parameters, checkpoint=paths[1], resume='auto')
    train.main(resumed)
    resumed.iterations = 3
    with pytest.raises(SystemExit):
        train.main(dataclasses.replace(resumed, batch_norm=False))
    assert 'with batch_norm = True; resume with the same --batch-norm' in capsys.readouterr().err
    train.main(resumed)
    whole, last = map(load_checkpoint, paths)
    assert_equal(whole['model'], last['model'])
    assert whole['model']['base.conv1_1.norm.num_batches_tracked'] == 3
    for number, state in whole['optimizer']['state'].items():
        assert_equal(state, last['optimizer']['state'][number])

    train.main(dataclasses.replace(resumed, iterations=4, batch_size=4, grad_accumulation=2))
    assert 'note: grad_accumulation was 1 and is 2 now' in capsys.readouterr().out

    checkpoint = load_checkpoint(paths[1])
    checkpoint['parameters']['world_size'] = 2
    save_checkpoint(paths[1], **checkpoint)
    train.main(dataclasses.replace(resumed, iterations=5))
    assert 'note: world_size was 2 and is 1 now' in capsys.readouterr().out


def test_best_checkpoint_is_the_evaluated_network(parameters, monkeypatch):
    monkeypatch.setitem(train.NETWORKS, 'ssd300', ThinSSD300)
    images, predicted = torch.randn(2, 3, 300, 300), []

    @torch.no_grad()
    def evaluate(test_loader, model, **options):
        model.eval()
        predicted.append(model(images))
        model.train()
        return {}, [0.5, 0.7, 0.6][len(predicted) - 1]

    monkeypatch.setattr(train, 'evaluate', evaluate)
    train.main(dataclasses.replace(parameters, iterations=3, eval_every=1))
    best = load_checkpoint(parameters.checkpoint.replace('.pth', '.best.pth'))
    assert best['iteration'] == 2 and any(is_norm(name) for name in best['model'])
    with torch.no_grad():
        folded = ThinSSD300.from_state(best)(images)
    for output, expected, other in zip(folded, predicted[1], predicted[2]):
        torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-4)
        assert (other - expected).abs().max() > 1e-3


def test_its_checkpoint_starts_another_run_folded(parameters, tmp_path, monkeypatch):
    monkeypatch.setitem(train.NETWORKS, 'ssd300', ThinSSD300)
    monkeypatch.setattr(train, 'SSD300', ThinSSD300)
    train.main(parameters)
    path = str(tmp_path / 'next.pth.tar')
    train.main(dataclasses.replace(parameters, batch_norm=False, pretrained=True, init='checkpoint',
                                   weights=parameters.checkpoint, iterations=1, lr=0.,
                                   checkpoint=path))
    assert_equal(load_checkpoint(path)['model'],
                 fold_batch_norm(load_checkpoint(parameters.checkpoint)['model']))


@pytest.mark.parametrize('changes, words', [
    ({'grad_accumulation': 2}, 'two images per micro-batch'),
    ({'pretrained': True, 'init': 'coco'}, 'init coco have no batch normalization'),
    ({'pretrained': True, 'init': 'caffe', 'weights': 'vgg.pth'}, 'init caffe have no')])
def test_user_errors(parameters, capsys, changes, words):
    with pytest.raises(SystemExit):
        train.main(dataclasses.replace(parameters, **changes))
    assert words in capsys.readouterr().err
