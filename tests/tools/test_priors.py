"""Tests of tools/priors.py."""

import pytest
import torch

from create_data_lists import write_data_lists
from model import create_prior_boxes
from reference import jaccard_overlap
from tools import priors
from utils import cxcy_to_xy


def test_table_has_the_percentage_of_each_class(make_voc, tmp_path, capsys):
    # In fractions of the image: a prior of SSD300, of 0.1 x 0.1; 0.06 x 0.06, which COCO's scales
    # and SSD512 reach; 0.02 x 0.02, which none reaches.
    root = make_voc({'train': {'a': [('cell', (101, 51, 120, 60)), ('cell', (101, 51, 112, 56))],
                               'b': [('dot', (101, 51, 104, 52))]}}, size=(200, 100))
    folder = str(tmp_path / 'lists')
    write_data_lists([(root, 'train')], [], folder, {'background': 0, 'none': 1, 'cell': 2,
                                                     'dot': 3})
    capsys.readouterr()
    priors.main(priors.Parameters(folder))
    title, heading, *rows = capsys.readouterr().out.splitlines()
    assert title == 'objects with an IoU of 0.5 or more with a prior, in percent'
    assert heading.split('  ')[-4:] == ['ssd300', 'ssd300 --priors coco', 'ssd512',
                                        'ssd512 --priors coco']
    assert [row.split() for row in rows] == [
        ['cell', '2', '50.0', '100.0', '100.0', '100.0'],
        ['dot', '1', '0.0', '0.0', '0.0', '0.0'],
        ['all', '3', '33.3', '66.7', '66.7', '66.7']]
    assert {len(row) for row in rows} == {len(heading)}


def test_best_overlaps_equal_a_loop_over_all_priors():
    prior_boxes = create_prior_boxes()[::50]
    images = [torch.tensor([[0.1, 0.2, 0.5, 0.9], [0., 0., 1., 1.]]), torch.zeros(0, 4),
              torch.tensor([[0.3, 0.3, 0.33, 0.36]])]
    expected = [max(jaccard_overlap(box, prior) for prior in cxcy_to_xy(prior_boxes).tolist())
                for boxes in images for box in boxes.tolist()]
    found = priors.find_best_overlaps(images, prior_boxes)
    torch.testing.assert_close(found, torch.tensor(expected))


def test_empty_list_is_a_user_error(tmp_path, capsys):
    write_data_lists([], [], tmp_path, {'background': 0, 'cell': 1})
    with pytest.raises(SystemExit):
        priors.main(priors.Parameters(str(tmp_path)))
    assert 'the TRAIN list of' in capsys.readouterr().err
