"""Tests of SSD512: its maps, priors and checkpoints, and the scripts with it."""

import itertools
import math

import pytest
import torch
from PIL import Image

import detect
import eval
import model
import train
from create_data_lists import write_data_lists
from detect import predict
from model import SSD300, SSD512
from support.checkpoints import save_checkpoint
from support.published import COCO_SCALES
from thin import ThinSSD300, ThinSSD512


def test_it_has_24564_priors():
    # The number of boxes in table 7 of the paper.
    priors = SSD512.create_prior_boxes()
    assert priors.shape == (24564, 4) and priors.min() > 0 and priors.max() <= 1
    counts = [feature_map.size ** 2 * feature_map.n_priors_per_cell
              for feature_map in SSD512.feature_maps]
    assert counts == [16384, 6144, 1536, 384, 96, 16, 4]
    # ssd_pascal_512.py of the Caffe code: squares of 35.84 pixels, and sqrt(35.84 * 76.8)
    firsts = [0, *itertools.accumulate(counts[:-1])]    # a square of each map
    assert priors[firsts, 2].tolist() == pytest.approx([.07, .15, .3, .45, .6, .75, .9])
    assert (512 * priors[1, 2]).item() == pytest.approx(math.sqrt(35.84 * 76.8))
    assert priors[-3, 2].item() == pytest.approx(math.sqrt(0.9 * 1.05))     # the last extra square
    assert SSD512.create_prior_boxes(COCO_SCALES[512])[0, 2].item() == pytest.approx(0.04)


def test_maps_have_the_sizes_of_the_table():
    network, sizes = ThinSSD512(3), []
    network.pred_convs.register_forward_hook(
        lambda _, maps, __: sizes.extend(feats.shape[2:] for feats in maps))
    with torch.no_grad():
        locs, scores = network(torch.zeros(2, 3, 512, 512))
    assert locs.shape == (2, 24564, 4) and scores.shape == (2, 24564, 3)
    assert sizes == [(feature_map.size,) * 2 for feature_map in SSD512.feature_maps]
    full = SSD512(3)
    channels = [conv.in_channels for conv in full.pred_convs.loc_convs]
    assert channels == [feature_map.channels for feature_map in SSD512.feature_maps]


def test_checkpoint_makes_the_network_that_it_was(tmp_path):
    network = SSD512(3)
    save_checkpoint(tmp_path / 'a.pth.tar', model=network.state_dict(),
                    label_map={'background': 0, 'cat': 1, 'dog': 2})
    loaded = SSD300.from_checkpoint(tmp_path / 'a.pth.tar')
    assert type(loaded) is SSD512
    assert all(torch.equal(tensor, network.state_dict()[name])
               for name, tensor in loaded.state_dict().items())


def test_images_are_resized_to_512_pixels(monkeypatch):
    network, shapes = ThinSSD512(3).eval(), []
    forward = SSD512.forward
    monkeypatch.setattr(SSD512, 'forward', lambda self, images: shapes.append(images.shape)
                        or forward(self, images))
    prediction, = predict([Image.effect_noise((200, 100), 50)], 0.0, 0.5, 5, model=network)
    assert shapes == [(1, 3, 512, 512)] and prediction['boxes'].shape == (5, 4)
    assert (prediction['boxes'] <= torch.tensor([200, 100, 200, 100])).all()


@pytest.fixture
def thin(monkeypatch):
    """Replace both networks by thin ones in all scripts."""
    for name, network in (('SSD300', ThinSSD300), ('SSD512', ThinSSD512)):
        monkeypatch.setitem(train.NETWORKS, name.lower(), network)
        for module in (model, train, eval, detect):
            monkeypatch.setattr(module, name, network, raising=False)


def test_scripts_train_resume_evaluate_and_detect_with_it(make_voc, tmp_path, monkeypatch, capsys,
                                                          thin):
    monkeypatch.chdir(tmp_path)
    folder = make_voc({'train': {stem: [('cat', (5, 5, 40, 40))] for stem in 'abcd'}})
    write_data_lists([(folder, 'train')], [(folder, 'train')], 'data')

    def run(**parameters):
        """Train; returns what was printed, and whether it ended with an error."""
        capsys.readouterr()
        common = {'network': 'ssd512', 'batch_size': 2, 'workers': 0, 'device': 'cpu',
                  'precision': 'float32', 'decay_lr_at': (), 'eval_every': 2,
                  'checkpoint': 'run.pth.tar'}
        try:
            train.main(train.Parameters(**common | parameters))
        except SystemExit:
            return capsys.readouterr().err
        return capsys.readouterr().out

    scratch = {'pretrained': False, 'batch_norm': True, 'priors': 'coco', 'resume': 'auto'}
    assert '2 iterations: mAP' in run(**scratch, iterations=2)
    assert 'iterations 2 to 3' in run(**scratch, iterations=3)
    assert 'network = ssd512; resume with the same --network' in run(
        **scratch, iterations=4, network='ssd300')

    eval.main(eval.Parameters(checkpoint='run.pth.tar', workers=0, device='cpu'))
    assert 'mAP ' in capsys.readouterr().out
    detect.main(detect.Parameters(('voc/JPEGImages/a.jpg',), checkpoint='run.pth.tar',
                                  output='a.png', min_score=0., top_k=3, device='cpu'))
    assert Image.open('a.png').size == (64, 48)

    start = {'init': 'checkpoint', 'weights': 'run.pth.tar', 'iterations': 1, 'eval_every': 0,
             'checkpoint': 'next.pth.tar'}
    assert '1 of 1 classes start with the scores' in run(**start)
    assert 'give --network ssd512' in run(**start, network='ssd300')
    assert '--init coco is an SSD300' in run(init='coco')
