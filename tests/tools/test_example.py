"""Tests of tools/example.py: the tutorial's image, and what networks predict for it."""

import pytest
import torch

from model import VISUALIZATION, MultiBoxLoss
from support.checkpoints import save_checkpoint
from tests.thin import ThinSSD300
from tools import example
from tools.shapes import draw_split
from utils import label_map, parse_annotation, pil_to_tensor, warp


def test_example_is_drawn_like_the_images_of_the_demo(tmp_path):
    draw_split(tmp_path, 'test', [example.NUMBER], example.SEED)
    name = f'{example.NUMBER:06d}'
    with example.Image.open(tmp_path / 'JPEGImages' / f'{name}.jpg') as image:
        expected = pil_to_tensor(warp(image, (0, 0, *image.size)))
    objects = parse_annotation(tmp_path / 'Annotations' / f'{name}.xml', example.LABEL_MAP)
    image, boxes, labels, difficulties = example.load_example()
    assert torch.equal(image, expected)
    assert torch.allclose(boxes * torch.tensor([320, 270, 320, 270]),
                          torch.tensor(objects['boxes']))
    assert labels.tolist() == objects['labels'] == [3, 4, 3, 1]
    assert difficulties.tolist() == [True, False, False, False]


def test_stored_rows_have_the_loss_and_the_detections_of_the_network(tmp_path, monkeypatch):
    torch.manual_seed(0)
    model = ThinSSD300(len(example.LABEL_MAP)).eval()
    for conv in model.pred_convs.class_convs:       # most priors predict the background
        conv.bias.data[0::len(example.LABEL_MAP)] += 6
    path = tmp_path / 'checkpoint.pth.tar'
    save_checkpoint(path, model=model.state_dict(), label_map=example.LABEL_MAP, iteration=7)
    monkeypatch.setattr(example, 'SSD300', ThinSSD300)
    monkeypatch.setattr(example, 'PATH', tmp_path / 'example.json')
    example.main(example.Parameters(str(path), str(path), str(example.PATH)))
    assert example.count_iterations('early') == 7

    image, boxes, labels, _ = example.load_example()
    with torch.no_grad():
        expected = model(model.normalize(image.unsqueeze(0)))
    stored = example.load_output('trained')
    criterion = MultiBoxLoss(model.priors_cxcy)
    true_classes = criterion.match([boxes], [labels])[1]
    assert criterion(*stored, [boxes], [labels]).item() == pytest.approx(
        criterion(*expected, [boxes], [labels]).item(), abs=0.01)
    hard = example.find_hard(stored[1], true_classes)
    assert hard.sum() == 3 * (true_classes > 0).sum()
    assert (hard & example.find_hard(expected[1], true_classes)).sum() > 0.95 * hard.sum()
    found, expected = ([tensors[0] for tensors in model.detect_objects(*output, **VISUALIZATION)]
                       for output in (stored, expected))
    assert len(expected[2]) > 5, 'too few detections to compare'
    assert torch.allclose(found[2], expected[2], atol=0.01)
    assert torch.allclose(found[0][0], expected[0][0], atol=0.01)


def test_network_of_other_classes_is_refused(tmp_path, monkeypatch, capsys):
    path = tmp_path / 'voc.pth.tar'
    save_checkpoint(path, model=ThinSSD300(len(label_map)).state_dict(), label_map=label_map,
                    iteration=7)
    monkeypatch.setattr(example, 'SSD300', ThinSSD300)
    with pytest.raises(SystemExit):
        example.main(example.Parameters(str(path), str(path), str(tmp_path / 'example.json')))
    assert 'make demo' in capsys.readouterr().err
