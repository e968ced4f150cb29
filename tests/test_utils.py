"""Tests of utils.py, section by section; those of its lists and its mAP have files of their own.
"""

import errno
import math
import os
import pickle

import pytest
import torch
import torchvision
from conftest import overlap_of
from PIL import Image

import utils
from utils import UserError


def random_boxes(n, *batch, high=1.):
    """Boxes (..., n, 4) with area."""
    corners = torch.rand(*batch, n, 2, 2).sort(dim=-2).values * high
    return corners.flatten(-2) + torch.tensor([0, 0, 0.01, 0.01])


def grid_boxes(n, cells=8):
    """Boxes (n, 4) with small whole numbers: ties and overlaps of exactly a half are common."""
    low = torch.randint(0, cells, (n, 2))
    return torch.cat([low, low + torch.randint(1, cells, (n, 2))], dim=1).float()


# --------------------------------------------------------------------------------------------------
# Slips, files and devices
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('error, says', [
    (UserError('photo.jpg: cannot be decoded; replace it'), 'photo.jpg: cannot be decoded'),
    (FileNotFoundError(errno.ENOENT, 'No such file or directory', 'gone.txt'), 'gone.txt'),
    (UserError('Caught UserError in DataLoader worker process 0.\nOriginal Traceback (most recent '
               'call last):\n  File "a.py"\nutils.UserError: photo.jpg: cannot be decoded\n'),
     'photo.jpg: cannot be decoded'),
])
def test_a_slip_ends_a_script_with_one_line_and_1(error, says, capsys):
    @utils.exit_on_user_error
    def main():
        raise error
    with pytest.raises(SystemExit) as end:
        main()
    printed = capsys.readouterr()
    assert end.value.code == 1
    assert printed.out == ''
    assert printed.err.count('\n') == 1 and says in printed.err
    assert 'Traceback' not in printed.err


def test_only_slips_are_caught():
    assert utils.exit_on_user_error(lambda x: x + 1)(2) == 3
    with pytest.raises(ZeroDivisionError):
        utils.exit_on_user_error(lambda: 1 / 0)()


def test_a_file_appears_whole_or_not_at_all(tmp_path):
    path = tmp_path / 'result.txt'
    for content in ('old', 'new'):
        with utils.write_beside(path) as beside:
            beside.write_text(content)
            assert beside.parent == path.parent and beside.suffix == path.suffix
        assert path.read_text() == content
    with pytest.raises(ZeroDivisionError), utils.write_beside(path) as beside:
        beside.write_text('half')
        1 / 0  # noqa: B018
    with pytest.raises(UserError, match='result.txt.*No space left'), utils.write_beside(path):
        raise OSError(errno.ENOSPC, 'No space left on device')
    assert path.read_text() == 'new'
    assert os.listdir(tmp_path) == ['result.txt']


def test_a_file_in_the_way_of_a_folder_is_a_slip(tmp_path):
    (tmp_path / 'file').touch()
    for place in (tmp_path / 'file', tmp_path / 'file' / 'below'):
        with pytest.raises(UserError, match='file'):
            utils.make_folder(place)
    with pytest.raises(UserError, match='file'), utils.write_beside(tmp_path / 'file' / 'b') as b:
        b.write_text('nowhere to go')
    assert utils.make_folder(tmp_path / 'a' / 'b').is_dir()


# --------------------------------------------------------------------------------------------------
# Classes and labels
# --------------------------------------------------------------------------------------------------


def test_voc_has_twenty_classes_in_alphabetical_order_and_the_background():
    assert len(utils.voc_labels) == 20 and sorted(utils.voc_labels) == list(utils.voc_labels)
    assert utils.label_map['background'] == 0
    assert [utils.label_map[name] for name in utils.voc_labels] == list(range(1, 21))
    assert {n: name for name, n in utils.label_map.items()} == utils.rev_label_map


def test_every_class_has_a_colour_of_its_own():
    assert utils.label_color_map.keys() == utils.label_map.keys()
    assert len(set(utils.label_color_map.values())) == 21
    assert all(len(color) == 7 and int(color[1:], 16) >= 0
               for color in utils.label_color_map.values())


# --------------------------------------------------------------------------------------------------
# Box coordinates
# --------------------------------------------------------------------------------------------------


def test_box_coordinates_by_hand():
    xy, cxcy = torch.tensor([[1., 2., 5., 10.]]), torch.tensor([[3., 6., 4., 8.]])
    assert torch.equal(utils.xy_to_cxcy(xy), cxcy)
    assert torch.equal(utils.cxcy_to_xy(cxcy), xy)
    prior = torch.tensor([[2., 2., 4., 8.]])
    wanted = torch.tensor([[2.5, 5., 0., 0.]])  # a quarter and half a prior away, times 10
    assert torch.allclose(utils.cxcy_to_gcxgcy(cxcy, prior), wanted)
    twice = utils.cxcy_to_gcxgcy(prior * torch.tensor([1, 1, 2, math.e]), prior)
    assert torch.allclose(twice, torch.tensor([[0., 0., 5 * math.log(2), 5.]]))


@pytest.mark.parametrize('shape', [(), (7,), (2, 3), (0,), (2, 0)])
def test_box_coordinates_come_back(shape):
    xy = random_boxes(1, *shape).squeeze(-2)
    priors = utils.xy_to_cxcy(random_boxes(1, *shape).squeeze(-2))
    before = xy.clone(), priors.clone()
    cxcy = utils.xy_to_cxcy(xy)
    locs = utils.cxcy_to_gcxgcy(cxcy, priors)
    assert locs.shape == cxcy.shape == xy.shape == (*shape, 4)
    assert torch.allclose(utils.cxcy_to_xy(cxcy), xy, atol=1e-6)
    assert torch.allclose(utils.gcxgcy_to_cxcy(locs, priors), cxcy, atol=1e-5)
    assert torch.equal(xy, before[0]) and torch.equal(priors, before[1])


# --------------------------------------------------------------------------------------------------
# Jaccard overlap and non-maximum suppression
# --------------------------------------------------------------------------------------------------


def test_overlap_by_hand():
    box = torch.tensor([[0., 0., 4., 4.]])
    others = torch.tensor([[0., 0., 4., 4.], [2., 2., 6., 6.], [0., 0., 4., 2.], [4., 0., 8., 4.]])
    assert utils.find_intersection(box, others).tolist() == [[16, 4, 8, 0]]
    wanted = torch.tensor([[1, 4 / 28, 0.5, 0]])
    assert torch.allclose(utils.find_jaccard_overlap(box, others), wanted)


def test_overlap_agrees_with_torchvision_is_symmetric_and_edits_nothing():
    set_1, set_2 = random_boxes(40), random_boxes(30)
    before = set_1.clone(), set_2.clone()
    overlap = utils.find_jaccard_overlap(set_1, set_2)
    assert torch.allclose(overlap, torchvision.ops.box_iou(set_1, set_2), atol=1e-6)
    assert torch.equal(overlap, utils.find_jaccard_overlap(set_2, set_1).T)
    assert torch.allclose(utils.find_jaccard_overlap(set_1, set_1).diagonal(), torch.ones(40))
    assert torch.equal(set_1, before[0]) and torch.equal(set_2, before[1])


def test_overlap_of_edges_is_the_devkits_of_pixels():
    pixels_1, pixels_2 = grid_boxes(50) + 1, grid_boxes(40) + 1
    edges = torch.tensor([1., 1., 0., 0.])
    low = torch.maximum(pixels_1[:, None, :2], pixels_2[:, :2])
    high = torch.minimum(pixels_1[:, None, 2:], pixels_2[:, 2:])
    shared = (high - low + 1).clamp(min=0).prod(dim=2)
    area_1, area_2 = ((p[:, 2:] - p[:, :2] + 1).prod(dim=1) for p in (pixels_1, pixels_2))
    devkit = shared / (area_1[:, None] + area_2 - shared)
    assert torch.equal(utils.find_jaccard_overlap(pixels_1 - edges, pixels_2 - edges), devkit)


def test_a_box_without_area_overlaps_nothing():
    empty = torch.tensor([[2., 2., 2., 2.], [1., 1., 1., 5.], [3., 3., 1., 1.], [3., 1., 1., 3.]])
    boxes = torch.cat([empty, torch.tensor([[0., 0., 4., 4.]])])
    assert torch.equal(utils.find_jaccard_overlap(empty, boxes), torch.zeros(4, 5))
    assert torch.equal(utils.find_jaccard_overlap(boxes, empty), torch.zeros(5, 4))


@pytest.mark.parametrize('find', [utils.find_intersection, utils.find_jaccard_overlap])
def test_overlap_broadcasts_over_batches_and_takes_empty_sets(find):
    set_1, set_2 = random_boxes(4, 2, 1), random_boxes(5, 3)
    overlap = find(set_1, set_2)
    assert overlap.shape == (2, 3, 4, 5)
    for i in range(2):
        for j in range(3):
            assert torch.equal(overlap[i, j], find(set_1[i, 0], set_2[j]))
    assert find(torch.zeros(0, 4), set_2[0]).shape == (0, 5)
    assert find(set_2[0], torch.zeros(0, 4)).shape == (5, 0)
    assert find(torch.zeros(0, 4), torch.zeros(0, 4)).shape == (0, 0)


def greedy(boxes, scores, max_overlap):
    """Non-maximum suppression as it is told: best box first, each looks at those that are kept."""
    boxes, scores, kept = boxes.tolist(), scores.tolist(), []
    for i in sorted(range(len(boxes)), key=lambda i: -scores[i]):  # stable: lower index first
        if all(overlap_of(boxes[i], boxes[j]) <= max_overlap for j in kept):
            kept.append(i)
    return kept


@pytest.mark.parametrize('max_overlap', [0., 0.25, 0.45, 0.5, 1.])
def test_suppression_is_greedy_also_with_ties(max_overlap):
    for _ in range(30):
        boxes, scores = grid_boxes(40), torch.randint(0, 8, (40,)) / 8
        kept = utils.non_max_suppression(boxes, scores, max_overlap)
        assert kept.tolist() == greedy(boxes, scores, max_overlap)


def test_suppression_settles_long_chains():
    # Each box overlaps its two neighbours by 2/3: every second one is kept, one after the other.
    left = torch.arange(60.)
    boxes = torch.stack([left, 0 * left, left + 5, 0 * left + 1], dim=1)
    scores = torch.linspace(1, 0.1, 60)
    kept = utils.non_max_suppression(boxes, scores, 0.5)
    assert kept.tolist() == list(range(0, 60, 2)) == greedy(boxes, scores, 0.5)
    order = torch.randperm(60)
    shuffled = utils.non_max_suppression(boxes[order], scores[order], 0.5)
    assert order[shuffled].tolist() == kept.tolist()


def test_suppression_agrees_with_torchvision_and_edits_nothing():
    for _ in range(20):
        boxes, scores = random_boxes(100, high=2.), torch.rand(100)
        before = boxes.clone(), scores.clone()
        kept = utils.non_max_suppression(boxes, scores, 0.45)
        assert torch.equal(kept, torchvision.ops.nms(boxes, scores, 0.45))
        assert torch.equal(boxes, before[0]) and torch.equal(scores, before[1])


def test_suppression_at_the_threshold_and_without_area():
    halves = torch.tensor([[0., 0., 4., 4.], [0., 0., 4., 2.]])
    assert utils.non_max_suppression(halves, torch.tensor([0.5, 0.9]), 0.5).tolist() == [1, 0]
    assert utils.non_max_suppression(halves, torch.tensor([0.5, 0.9]), 0.49).tolist() == [1]
    points = torch.ones(3, 4)
    assert utils.non_max_suppression(points, torch.ones(3), 0.).tolist() == [0, 1, 2]


def test_suppression_of_no_boxes_keeps_none():
    none = utils.non_max_suppression(torch.zeros(0, 4), torch.zeros(0), 0.5)
    assert none.shape == (0,) and none.dtype == torch.int64


# --------------------------------------------------------------------------------------------------
# Images
# --------------------------------------------------------------------------------------------------


def palette(transparency=None):
    """A palette image whose one pixel is (10, 20, 30)."""
    image = Image.new('P', (1, 1), 1)
    image.putpalette([99, 99, 99, 10, 20, 30])
    if transparency is not None:
        image.info['transparency'] = transparency
    return image


def flat(mode, color):
    return Image.new(mode, (3, 2), color)


@pytest.mark.parametrize('image, rgb', [
    (flat('RGB', (1, 2, 3)), (1, 2, 3)),
    (flat('1', 1), (255, 255, 255)),
    (flat('L', 100), (100, 100, 100)),
    (flat('LA', (100, 255)), (100, 100, 100)),
    (flat('LA', (100, 0)), (255, 255, 255)),
    (flat('RGBA', (10, 20, 30, 255)), (10, 20, 30)),
    (flat('RGBA', (10, 20, 30, 0)), (255, 255, 255)),
    (flat('RGBA', (0, 100, 255, 128)), (127, 177, 255)),
    (palette(), (10, 20, 30)),
    (palette(transparency=0), (10, 20, 30)),
    (palette(transparency=1), (255, 255, 255)),
    (flat('CMYK', (0, 255, 255, 0)), (255, 0, 0)),
    (flat('YCbCr', (76, 85, 255)), (255, 0, 0)),
    (flat('HSV', (0, 255, 255)), (255, 0, 0)),
    (flat('LAB', (255, 128, 128)), (255, 255, 255)),
    (flat('I', 200), (200, 200, 200)),
    (flat('F', 200.), (200, 200, 200)),
    *[(flat(mode, level * 257), (level,) * 3)
      for mode in ('I;16', 'I', 'F') for level in (255, 128, 0)],
    (flat('I;16B', 128 * 257), (128, 128, 128)),  # a TIFF with the high byte first
    (flat('I;16', 200), (0, 0, 0)),  # of 65535
], ids=lambda value: value.mode if isinstance(value, Image.Image) else str(value))
def test_every_mode_becomes_rgb(image, rgb):
    mode, before = image.mode, image.tobytes()
    converted = utils.to_rgb(image)
    assert (converted.mode, converted.size) == ('RGB', image.size)
    assert all(abs(a - b) <= 2 for a, b in zip(converted.getpixel((0, 0)), rgb))
    converted.putpixel((0, 0), (7, 7, 7))
    assert (image.mode, image.tobytes()) == (mode, before)  # a copy, also of an RGB image


def test_16_bits_are_scaled_not_clipped(tmp_path):
    levels = [0, 255, 256, 20000, 40000, 65535]
    image = Image.new('I;16', (6, 1))
    image.putdata(levels)
    image.save(tmp_path / 'deep.png')
    with Image.open(tmp_path / 'deep.png') as file:
        row = [utils.to_rgb(file).getpixel((x, 0))[0] for x in range(6)]
    assert all(abs(got - level / 257) <= 1 for got, level in zip(row, levels))


def test_pixels_are_normalized_by_hand():
    image = torch.tensor([0, 128, 255], dtype=torch.uint8).view(1, 1, 3).repeat(3, 2, 1)
    images = torch.stack([image, 255 - image])
    before = images.clone()
    floats = utils.normalize(images)
    assert (floats.dtype, floats.shape) == (torch.float32, (2, 3, 2, 3))
    for channel, (mean, std) in enumerate([(0.485, 0.229), (0.456, 0.224), (0.406, 0.225)]):
        wanted = torch.tensor([(level / 255 - mean) / std for level in (0, 128, 255)])
        assert torch.allclose(floats[0, channel], wanted.expand(2, 3), atol=1e-5)
    assert torch.equal(utils.normalize(image), floats[0])  # a single image as in its batch
    assert torch.equal(images, before)


# --------------------------------------------------------------------------------------------------
# Checkpoints
# --------------------------------------------------------------------------------------------------


def test_a_checkpoint_comes_back(tmp_path):
    path = tmp_path / 'check.pth.tar'
    model = torch.nn.Linear(2, 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    utils.save_checkpoint(path, iteration=7, model=model.state_dict(), label_map={'cat': 1},
                          optimizer=optimizer.state_dict(), note=None)
    state = utils.load_checkpoint(str(path))
    assert state['iteration'] == 7 and state['label_map'] == {'cat': 1} and state['note'] is None
    assert all(torch.equal(state['model'][name], tensor) and tensor.device.type == 'cpu'
               for name, tensor in model.state_dict().items())
    optimizer.load_state_dict(state['optimizer'])
    assert os.listdir(tmp_path) == ['check.pth.tar']


def test_the_old_checkpoint_stays_when_the_new_one_cannot_be_written(tmp_path, monkeypatch):
    path = tmp_path / 'check.pth.tar'
    utils.save_checkpoint(path, iteration=1)
    with pytest.raises((AttributeError, pickle.PicklingError)):
        utils.save_checkpoint(path, iteration=lambda: 2)  # cannot be pickled

    def full(_):
        raise OSError(errno.ENOSPC, 'No space left on device')
    monkeypatch.setattr(os, 'fsync', full)
    with pytest.raises(UserError, match='check.pth.tar.*No space left'):
        utils.save_checkpoint(path, iteration=3)
    assert utils.load_checkpoint(path) == {'iteration': 1}
    assert os.listdir(tmp_path) == ['check.pth.tar']


def test_a_full_disk_is_a_slip_and_the_old_checkpoint_stays(tmp_path):
    resource = pytest.importorskip('resource')
    path = tmp_path / 'check.pth.tar'
    utils.save_checkpoint(path, iteration=1)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))  # no file may grow past this
    try:
        with pytest.raises(UserError, match='check.pth.tar cannot be written'):
            utils.save_checkpoint(path, weights=torch.zeros(200_000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert utils.load_checkpoint(path) == {'iteration': 1}
    assert os.listdir(tmp_path) == ['check.pth.tar']


@pytest.mark.parametrize('place', ['file/check.pth.tar', 'nowhere/check.pth.tar', ''])
def test_a_place_that_cannot_be_written_is_a_slip(place, tmp_path):
    (tmp_path / 'file').touch()
    with pytest.raises(UserError, match='cannot be written'):
        utils.save_checkpoint(tmp_path / place, iteration=1)
    assert os.listdir(tmp_path) == ['file']


class Trap:
    """Runs code when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_no_code_of_a_checkpoint_is_run(tmp_path):
    for content in (torch.nn.Linear(1, 1), {'model': Trap(tmp_path / 'sprung')}):
        torch.save(content, tmp_path / 'check.pth.tar')
        with pytest.raises(UserError, match='check.pth.tar.*train.py'):
            utils.load_checkpoint(tmp_path / 'check.pth.tar')
    assert not (tmp_path / 'sprung').exists()


def checkpoint_bytes(tmp_path):
    utils.save_checkpoint(tmp_path / 'whole', weights=torch.zeros(500))
    return (tmp_path / 'whole').read_bytes()


@pytest.mark.parametrize('spoil', [
    pytest.param(lambda whole: b'', id='empty'),
    pytest.param(lambda whole: b'\n', id='an empty line'),
    pytest.param(lambda whole: b'not a checkpoint', id='text'),
    pytest.param(lambda whole: b'Keras', id='text that starts like a pickle'),
    pytest.param(lambda whole: b'{"images": 3}', id='json'),
    pytest.param(lambda whole: bytes(range(256)), id='bytes'),
    pytest.param(lambda whole: pickle.dumps([1, 2], 2), id='another pickle'),
    pytest.param(lambda whole: pickle.dumps({'a': 1}, 2)[:-3], id='half a pickle'),
    *[pytest.param(lambda whole, part=part: whole[:len(whole) * part // 100], id=f'{part} %')
      for part in (1, 30, 60, 99)],
])
def test_what_is_no_checkpoint_is_a_slip(spoil, tmp_path):
    path = tmp_path / 'check.pth.tar'
    path.write_bytes(spoil(checkpoint_bytes(tmp_path)))
    with pytest.raises(UserError, match='check.pth.tar'):
        utils.load_checkpoint(path)


@pytest.mark.parametrize('content', [torch.zeros(3), [1, 2], 'text'], ids=str)
def test_a_checkpoint_is_a_dictionary(content, tmp_path):
    torch.save(content, tmp_path / 'check.pth.tar')
    with pytest.raises(UserError, match='check.pth.tar'):
        utils.load_checkpoint(tmp_path / 'check.pth.tar')


def test_a_checkpoint_that_is_not_there_is_a_slip(tmp_path):
    for path in (tmp_path / 'none.pth.tar', tmp_path):
        with pytest.raises(UserError, match=path.name):
            utils.load_checkpoint(path)
