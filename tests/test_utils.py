"""Tests of utils.py, section by section.

Where a rule is subtle (greedy suppression, the devkit's average precision), the test holds a slow
and obvious version of it, and the two must agree on many random inputs.
"""

import errno
import json
import math
import os
import pickle
import random

import pytest
import torch
import torchvision
from conftest import annotation
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


def test_a_device_has_a_name():
    assert utils.choose_device('cpu') == torch.device('cpu')
    assert utils.choose_device('auto').type == ('cuda' if torch.cuda.is_available() else 'cpu')


@pytest.mark.parametrize('name', ['gpu', 'cuda:99', ''])
def test_a_device_that_is_not_there_is_a_slip(name):
    with pytest.raises(UserError, match=f'{name!r}.*--device cpu'):
        utils.choose_device(name)


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


def overlap_of(box, other):
    """Jaccard overlap of two boxes, as a beginner writes it."""
    width = min(box[2], other[2]) - max(box[0], other[0])
    height = min(box[3], other[3]) - max(box[1], other[1])
    if width <= 0 or height <= 0:
        return 0.
    areas = sum((b[2] - b[0]) * (b[3] - b[1]) for b in (box, other))
    return width * height / (areas - width * height)


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
# Annotations
# --------------------------------------------------------------------------------------------------

CATS = {'background': 0, 'cat': 1, 'dog': 2}


@pytest.fixture
def parse(tmp_path):
    """A function that parses the text of an annotation."""
    def parse_text(text, label_map=CATS):
        path = tmp_path / 'note.xml'
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return utils.parse_annotation(path, label_map)
    return parse_text


def test_pixels_of_an_annotation_become_edges(parse):
    objects = parse(annotation([('dog', (1, 1, 64, 48), 1), ('cat', (10, 20, 10, 20), 0)]))
    assert objects == {'boxes': [[0, 0, 64, 48], [9, 19, 10, 20]], 'labels': [2, 1],
                       'difficulties': [True, False]}


def test_an_annotation_may_hold_floats_and_no_difficult_and_no_objects(parse):
    objects = parse(annotation([('cat', (1.25, ' 2.5\n', 1e1, '47.75'))]))
    assert objects == {'boxes': [[0.25, 1.5, 10, 47.75]], 'labels': [1], 'difficulties': [False]}
    assert parse('<annotation/>') == {'boxes': [], 'labels': [], 'difficulties': []}


def test_boxes_of_parts_are_not_objects(parse):
    part = ('<part><name>head</name><bndbox><xmin>3</xmin><ymin>3</ymin><xmax>4</xmax>'
            '<ymax>4</ymax></bndbox></part>')
    text = annotation([('cat', (2, 2, 30, 30))])
    wanted = {'boxes': [[1, 1, 30, 30]], 'labels': [1], 'difficulties': [False]}
    for place in ('</object>', '<bndbox>'):  # behind the object's own box, and before it
        assert parse(text.replace(place, part + place)) == wanted


def test_nothing_is_clipped_when_parsing(parse):
    text = annotation([('cat', (-5, 0, 999, 20)), ('cat', (9, 9, 3, 3))])
    assert parse(text)['boxes'] == [[-6, -1, 999, 20], [8, 8, 3, 3]]


def test_without_a_label_map_labels_are_names(parse):
    assert parse(annotation([('zebra', (1, 1, 2, 2))]), None)['labels'] == ['zebra']


GOOD = annotation([('cat', (1, 2, 3, 4), 0)])


@pytest.mark.parametrize('text, says', [
    ('', 'malformed XML'),
    (GOOD[:-20], 'malformed XML'),
    (b'\xff\xfe\x00' + GOOD.encode(), 'malformed XML'),
    (b'<?xml version="1.0" encoding="gbk"?>' + GOOD.encode(), 'note.xml'),
    (b'<?xml version="1.0" encoding="no-such"?>' + GOOD.encode(), 'note.xml'),
    (GOOD.replace('<xmin>1</xmin>', ''), 'object 1.*xmin'),
    (GOOD.replace('<ymax>4</ymax>', '<ymax></ymax>'), 'object 1.*ymax'),
    (GOOD.replace('>3<', '>three<'), "object 1.*xmax.*'three'"),
    (GOOD.replace('>3<', '>nan<'), "object 1.*xmax.*'nan'"),
    (GOOD.replace('>3<', '>inf<'), "object 1.*xmax.*'inf'"),
    (GOOD.replace('<name>cat</name>', ''), 'object 1.*name'),
    (GOOD.replace('cat', 'zebra'), "object 1.*'zebra'.*'cat', 'dog'"),
    (GOOD.replace('cat', 'background'), "object 1.*'background'"),
])
def test_a_faulty_annotation_is_a_slip_that_names_file_and_fault(text, says, parse):
    with pytest.raises(UserError, match=says) as error:
        parse(text)
    assert 'note.xml' in str(error.value)


def test_a_missing_annotation_is_a_slip(tmp_path):
    with pytest.raises(UserError, match='none.xml'):
        utils.parse_annotation(tmp_path / 'none.xml', CATS)


@pytest.mark.parametrize('folder, n_files, n_objects, classes', [
    ('voc-sample/VOC2007', 395, 899, set(utils.voc_labels)),
    ('voc-sample/VOC2012', 1037, 2092, set(utils.voc_labels)),
    ('bccd', 364, 4888, {'RBC', 'WBC', 'Platelets'}),
])
def test_real_annotations_are_read_whole(folder, n_files, n_objects, classes, sample_data):
    files = sorted((sample_data / folder / 'Annotations').glob('*.xml'))
    parsed = [utils.parse_annotation(path, None) for path in files]
    boxes = torch.tensor([box for objects in parsed for box in objects['boxes']])
    assert (len(files), len(boxes)) == (n_files, n_objects)
    assert {name for objects in parsed for name in objects['labels']} == classes
    assert (boxes[:, :2] >= 0).all() and (boxes[:, 2:] - boxes[:, :2] >= 1).all()


# --------------------------------------------------------------------------------------------------
# Data lists
# --------------------------------------------------------------------------------------------------

LISTS = ('TRAIN_images', 'TRAIN_objects', 'TEST_images', 'TEST_objects', 'label_map')
CAT = ('cat', (1, 1, 10, 10))
EMPTY = {'boxes': [], 'labels': [], 'difficulties': []}


def read_lists(folder):
    """The content of the five files, and nothing else may be there."""
    assert sorted(os.listdir(folder)) == sorted(f'{name}.json' for name in LISTS)
    return {name: json.loads((folder / f'{name}.json').read_text()) for name in LISTS}


def count_of(counts, word):
    """The one count of a summary whose name holds a word; 0 if there is none."""
    found = [count for what, count in counts.items() if word in what]
    assert len(found) <= 1, counts
    return sum(found)


def test_lists_of_a_small_folder(make_voc, tmp_path, monkeypatch, capsys):
    make_voc({'train': {'a': [('dog', (1, 1, 64, 48), 1), ('cat', (5.5, 5, 9, 9))], 'b': [CAT]},
              'test': {'c': [CAT]}})
    monkeypatch.chdir(tmp_path)  # relative in, absolute out
    summary = utils.write_data_lists([('voc', 'train')], [('voc', 'test')], 'made/here')
    lists = read_lists(tmp_path / 'made' / 'here')
    images = tmp_path / 'voc' / 'JPEGImages'
    assert lists['label_map'] == CATS
    assert lists['TRAIN_images'] == [str(images / 'a.jpg'), str(images / 'b.jpg')]
    assert lists['TEST_images'] == [str(images / 'c.jpg')]
    assert lists['TRAIN_objects'] == [
        {'boxes': [[0, 0, 64, 48], [4.5, 4, 9, 9]], 'labels': [2, 1],
         'difficulties': [True, False]},
        {'boxes': [[0, 0, 10, 10]], 'labels': [1], 'difficulties': [False]}]
    assert summary['classes'] == ['cat', 'dog']
    assert summary['TRAIN']['images'] == 2 and summary['TRAIN']['objects'] == 3
    assert summary['TEST']['images'] == 1 and summary['TEST']['objects'] == 1
    assert count_of(summary['TRAIN'], 'difficult') == 1
    printed = capsys.readouterr().out
    assert '2 images, 3 objects' in printed and 'cat, dog' in printed


def test_boxes_past_the_border_and_images_without_objects_and_the_count_of_both(
        make_voc, tmp_path, capsys):
    faulty = {'past': [('cat', (-3, 0, 70, 20)), CAT],
              'outside': [('cat', (65, 1, 80, 20))],           # without area once it is clipped
              'reversed': [('cat', (20, 5, 5, 20)), ('cat', (9, 5, 30, 4)), CAT],
              'nothing': []}
    root = make_voc({'all': faulty})
    summary = utils.write_data_lists([(root, 'all')], [(root, 'all')], tmp_path / 'out', CATS)
    lists = read_lists(tmp_path / 'out')
    boxes = {os.path.basename(path).removesuffix('.jpg'): objects['boxes']
             for path, objects in zip(lists['TEST_images'], lists['TEST_objects'])}
    assert boxes == {'past': [[0, 0, 64, 20], [0, 0, 10, 10]], 'outside': [],
                     'reversed': [[0, 0, 10, 10]], 'nothing': []}
    assert lists['TEST_objects'][3] == EMPTY
    assert [os.path.basename(path) for path in lists['TRAIN_images']] == ['past.jpg',
                                                                          'reversed.jpg']
    assert [len(objects['labels']) for objects in lists['TRAIN_objects']] == [2, 1]
    for split, n_images, word in (('TRAIN', 2, 'left out'), ('TEST', 4, 'kept')):
        counts = summary[split]
        assert (counts['images'], counts['objects']) == (n_images, 3)
        assert [count_of(counts, what) for what in ('clipped', 'dropped', word)] == [1, 3, 2]
    assert capsys.readouterr().out.count('clipped') == 2


def test_a_pixel_is_a_box_with_area(make_voc, tmp_path):
    root = make_voc({'all': {'a': [('cat', (64, 48, 64, 48))]}})
    utils.write_data_lists([(root, 'all')], [], tmp_path / 'out', CATS)
    assert read_lists(tmp_path / 'out')['TRAIN_objects'][0]['boxes'] == [[63, 47, 64, 48]]


def test_image_names_of_many_kinds_are_found(make_voc, tmp_path):
    root = make_voc({'all': {stem: [CAT] for stem in ('a', 'b', 'c.1', 'd d')}})
    images = root / 'JPEGImages'
    (images / 'a.jpg').rename(images / 'a.JPG')
    (images / 'b.jpg').unlink()
    Image.new('RGB', (64, 48)).save(images / 'b.png')
    (images / 'notes.txt').write_text('not an image')
    # As the lists of a single class are, and with an empty line.
    (root / 'ImageSets' / 'Main' / 'cat_all.txt').write_text('a  1\n\nb -1\nc.1  0\nd d\n')
    utils.write_data_lists([(root, 'cat_all')], [], tmp_path / 'out', CATS)
    found = [os.path.basename(path) for path in read_lists(tmp_path / 'out')['TRAIN_images']]
    assert found == ['a.JPG', 'b.png', 'c.1.jpg', 'd d.jpg']


def test_a_given_label_map_is_kept_and_classes_that_are_found_are_sorted(make_voc, tmp_path):
    train = make_voc({'s': {'a': [('zebra', (1, 1, 9, 9)), ('ape', (1, 1, 9, 9))]}}, 'one')
    test = make_voc({'s': {'a': [('newt', (1, 1, 9, 9))]}}, 'two')
    given = {'background': 0, 'zebra': 1, 'newt': 2, 'yak': 3, 'ape': 4}
    for label_map, labels in ((None, [3, 1]), (given, [1, 4])):
        summary = utils.write_data_lists([(train, 's')], [(test, 's')], tmp_path / 'out', label_map)
        lists = read_lists(tmp_path / 'out')
        wanted = label_map or {'background': 0, 'ape': 1, 'newt': 2, 'zebra': 3}
        assert lists['label_map'] == wanted
        assert lists['TRAIN_objects'][0]['labels'] == labels
        assert lists['TEST_objects'][0]['labels'] == [2]
        assert ['background', *summary['classes']] == list(wanted)


def test_several_folders_become_one_list_in_order(make_voc, tmp_path):
    roots = [make_voc({'s': {stem: [CAT]}}, stem) for stem in ('z', 'a')]
    utils.write_data_lists([(root, 's') for root in roots], [], tmp_path / 'out')
    lists = read_lists(tmp_path / 'out')
    assert [os.path.basename(path) for path in lists['TRAIN_images']] == ['z.jpg', 'a.jpg']
    assert lists['TEST_images'] == lists['TEST_objects'] == []


def edit_size(root, stem, size):
    """Write another size element into an annotation."""
    path = root / 'Annotations' / f'{stem}.xml'
    head, rest = path.read_text().split('<size>')
    path.write_text(head + size + rest.split('</size>')[1])


@pytest.mark.parametrize('size', [
    '', '<size></size>', '<size><width>0</width><height>0</height></size>',
    '<size><height>48</height></size>', '<size><width>64.0</width><height>0</height></size>'])
def test_a_size_may_be_missing_or_0(size, make_voc, tmp_path):
    root = make_voc({'s': {'a': [CAT]}})
    edit_size(root, 'a', size)
    summary = utils.write_data_lists([(root, 's')], [], tmp_path / 'out', CATS)
    assert summary['TRAIN']['images'] == 1


def test_the_size_of_a_turned_photo_is_the_stored_one(make_voc, tmp_path):
    root = make_voc({'s': {'a': [('cat', (60, 1, 64, 48))]}})
    image = Image.new('RGB', (64, 48))
    exif = image.getexif()
    exif[0x0112] = 6  # orientation: to be turned by 90 degrees
    image.save(root / 'JPEGImages' / 'a.jpg', exif=exif)
    utils.write_data_lists([(root, 's')], [], tmp_path / 'out', CATS)
    assert read_lists(tmp_path / 'out')['TRAIN_objects'][0]['boxes'] == [[59, 0, 64, 48]]


def break_size(root):
    edit_size(root, 'b', '<size><width>48</width><height>64</height></size>')
    return 'b.xml.*48.*b.jpg.*64'


def break_height(root):
    edit_size(root, 'b', '<size><height>47</height></size>')
    return 'b.xml.*47.*b.jpg.*48'


def break_image(root):
    path = root / 'JPEGImages' / 'b.jpg'
    path.write_bytes(path.read_bytes()[:-200])
    return 'b.jpg.*decoded.*--skip-broken'


def break_class(root):
    (root / 'Annotations' / 'b.xml').write_text(annotation([('zebra', (1, 1, 9, 9))]))
    return "b.xml.*'zebra'"


def break_annotation(root):
    (root / 'Annotations' / 'b.xml').unlink()
    return 'b.xml'


def break_name(root):
    (root / 'JPEGImages' / 'b.jpg').unlink()
    return "test.txt.*'b'"


def break_split(root):
    (root / 'ImageSets' / 'Main' / 'test.txt').unlink()
    return 'test.txt.*no such split.*there are: train'


def break_layout(root):
    (root / 'Annotations').rename(root / 'annotations_')
    return 'VOC layout.*Annotations'


@pytest.mark.parametrize('break_it', [break_size, break_height, break_image, break_class,
                                      break_annotation, break_name, break_split, break_layout])
@pytest.mark.parametrize('old_lists', [False, True])
def test_a_slip_in_the_folder_is_named_and_nothing_is_written(break_it, old_lists, make_voc,
                                                              tmp_path):
    root, out = make_voc({'train': {'a': [CAT]}, 'test': {'a': [CAT], 'b': [CAT]}}), tmp_path / 'o'
    splits = [(root, 'train')], [(root, 'test')]
    if old_lists:
        utils.write_data_lists(*splits, out, CATS)
    before = read_lists(out) if old_lists else None
    says = break_it(root)
    with pytest.raises(UserError, match=f'(?s){says}'):
        utils.write_data_lists(*splits, out, CATS)
    if old_lists:
        assert read_lists(out) == before
    else:
        assert not out.exists() or os.listdir(out) == []


def test_a_folder_that_is_not_there_is_a_slip(tmp_path):
    with pytest.raises(UserError, match='nowhere.*VOC layout'):
        utils.write_data_lists([(tmp_path / 'nowhere', 'train')], [], tmp_path / 'out')


def test_a_class_named_background_is_a_slip(make_voc, tmp_path):
    root = make_voc({'s': {'a': [('background', (1, 1, 9, 9))]}})
    with pytest.raises(UserError, match='background'):
        utils.write_data_lists([(root, 's')], [], tmp_path / 'out')
    assert not (tmp_path / 'out' / 'label_map.json').exists()


@pytest.mark.parametrize('content', [b'', b'not an image', 'truncated'])
def test_broken_images_can_be_left_out_and_are_counted(content, make_voc, tmp_path, capsys):
    root = make_voc({'s': {'a': [CAT], 'b': [CAT], 'c': [CAT]}})
    path = root / 'JPEGImages' / 'b.jpg'
    path.write_bytes(path.read_bytes()[:-200] if content == 'truncated' else content)
    splits = [(root, 's')], [(root, 's')]
    with pytest.raises(UserError, match='b.jpg'):
        utils.write_data_lists(*splits, tmp_path / 'out')
    capsys.readouterr()
    summary = utils.write_data_lists(*splits, tmp_path / 'out', skip_broken=True)
    lists = read_lists(tmp_path / 'out')
    for split in ('TRAIN', 'TEST'):
        assert [os.path.basename(path) for path in lists[f'{split}_images']] == ['a.jpg', 'c.jpg']
        assert len(lists[f'{split}_objects']) == summary[split]['images'] == 2
        assert count_of(summary[split], 'broken') == 1
    assert 'broken' in capsys.readouterr().out


def test_an_output_folder_that_cannot_be_written_is_a_slip_before_any_work(tmp_path):
    (tmp_path / 'file').write_text('in the way')
    for output in (tmp_path / 'file', tmp_path / 'file' / 'lists'):
        with pytest.raises(UserError, match='file'):  # and not the folder without VOC's layout
            utils.write_data_lists([(tmp_path, 's')], [], output)
    assert (tmp_path / 'file').read_text() == 'in the way'


def test_lists_that_cannot_be_written_leave_the_old_ones(make_voc, tmp_path, monkeypatch):
    root, out = make_voc({'s': {'a': [CAT]}, 't': {'b': [CAT]}}), tmp_path / 'out'
    utils.write_data_lists([(root, 's')], [(root, 's')], out)
    before, write_text, written = read_lists(out), type(out).write_text, []

    def full(path, *args, **kwargs):
        written.append(path)
        if len(written) == 4:
            raise OSError(errno.ENOSPC, 'No space left on device')
        return write_text(path, *args, **kwargs)
    monkeypatch.setattr(type(out), 'write_text', full)
    with pytest.raises(UserError, match='No space left'):
        utils.write_data_lists([(root, 't')], [(root, 't')], out)
    assert read_lists(out) == before


def test_vocs_own_lists(make_voc, tmp_path):
    voc07 = make_voc({'trainval': {'07a': [('dog', (1, 1, 9, 9))]},
                      'test': {'07t': [('person', (1, 1, 9, 9), 1)], '07e': []},
                      'unused': {'07u': [('zebra', (1, 1, 9, 9))]}}, 'VOC2007')
    voc12 = make_voc({'trainval': {'12a': [('tvmonitor', (1, 1, 9, 9))]}}, 'VOC2012')
    utils.create_data_lists(voc07, voc12, tmp_path / 'out')
    lists = read_lists(tmp_path / 'out')
    assert lists['label_map'] == utils.label_map
    assert lists['TRAIN_images'] == [str(voc07 / 'JPEGImages' / '07a.jpg'),
                                     str(voc12 / 'JPEGImages' / '12a.jpg')]
    assert [objects['labels'] for objects in lists['TRAIN_objects']] == [[12], [20]]
    assert [os.path.basename(path) for path in lists['TEST_images']] == ['07t.jpg', '07e.jpg']
    assert lists['TEST_objects'] == [
        {'boxes': [[0, 0, 9, 9]], 'labels': [15], 'difficulties': [True]}, EMPTY]


def test_lists_of_real_images(sample_data, tmp_path):
    root = sample_data / 'bccd'
    summary = utils.write_data_lists([(root, 'val')], [(root, 'test')], tmp_path)
    lists = read_lists(tmp_path)
    assert lists['label_map'] == {'background': 0, 'Platelets': 1, 'RBC': 2, 'WBC': 3}
    assert (summary['TRAIN']['images'], summary['TEST']['images']) == (87, 72)
    for split in ('TRAIN', 'TEST'):
        counted = sum(len(objects['labels']) for objects in lists[f'{split}_objects'])
        assert counted == summary[split]['objects'] > 700


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
# Mean average precision
# --------------------------------------------------------------------------------------------------

CAT_MAP = {'background': 0, 'cat': 1}


def devkit_ap(detections, objects):
    """VOCevaldet.m and VOCap.m as loops.

    Args:
        detections: [(score, image, box)].
        objects: {image: [(box, difficult)]}.
    """
    n_objects = sum(not difficult for mine in objects.values() for _, difficult in mine)
    if n_objects == 0:
        return math.nan
    n_true, n_false, taken, points = 0, 0, set(), []
    for _, image, box in sorted(detections, key=lambda detection: -detection[0]):
        best_overlap, best = -math.inf, None
        for number, (true_box, _) in enumerate(objects.get(image, [])):
            if overlap_of(box, true_box) > best_overlap:
                best_overlap, best = overlap_of(box, true_box), number
        if best_overlap >= 0.5 and objects[image][best][1]:
            continue
        if best_overlap >= 0.5 and (image, best) not in taken:
            taken.add((image, best))
            n_true += 1
        else:
            n_false += 1
        points.append((n_true, n_true / (n_true + n_false)))
    return sum(max((precision for found, precision in points if 10 * found >= k * n_objects),
                   default=0) for k in range(11)) / 11


def devkit_aps(det_boxes, det_labels, det_scores, true_boxes, true_labels, true_difficulties,
               label_map):
    """The devkit's AP of each class, from the arguments of `calculate_mAP`."""
    detections = {label: [] for label in label_map.values()}
    objects = {label: {} for label in label_map.values()}
    for image, found in enumerate(zip(det_boxes, det_labels, det_scores)):
        for box, label, score in zip(*(values.tolist() for values in found)):
            detections[label].append((score, image, box))
    for image, there in enumerate(zip(true_boxes, true_labels, true_difficulties)):
        for box, label, difficult in zip(*(values.tolist() for values in there)):
            objects[label].setdefault(image, []).append((box, difficult))
    return {name: devkit_ap(detections[label], objects[label])
            for name, label in label_map.items() if name != 'background'}


def random_case(n_images, n_classes):
    """Lists for `calculate_mAP` with ties, duplicates, difficult objects and empty images."""
    case = [[] for _ in range(6)]
    for _ in range(n_images):
        n_objects, n_detections = random.choice([0, 1, 3, 6]), random.choice([0, 2, 8])
        true_boxes = grid_boxes(n_objects)
        near = grid_boxes(n_detections)
        if n_objects:
            near = true_boxes[torch.randint(0, n_objects, (n_detections,))]
        det_boxes = near + torch.randint(0, 2, near.shape) * torch.tensor([-1., -1., 1., 1.])
        true_labels = torch.randint(1, n_classes, (n_objects,))
        for values, value in zip(case, (
                det_boxes, torch.randint(1, n_classes, (n_detections,)),
                torch.randint(0, 10, (n_detections,)) / 10, true_boxes, true_labels,
                torch.rand(n_objects) < 0.3)):
            values.append(value)
    return case


def assert_same_aps(got, wanted):
    assert got.keys() == wanted.keys()
    assert list(got.values()) == pytest.approx(list(wanted.values()), abs=1e-9, nan_ok=True)


def test_map_is_the_devkits():
    label_map = {'background': 0, 'a': 1, 'b': 2, 'c': 3}
    seen = []
    for number in range(150):
        random.seed(number)
        case = random_case(n_images=number % 8, n_classes=4)
        aps, mean = utils.calculate_mAP(*case, label_map)
        wanted = devkit_aps(*case, label_map)
        assert_same_aps(aps, wanted)
        known = [ap for ap in wanted.values() if not math.isnan(ap)]
        assert mean == pytest.approx(sum(known) / len(known) if known else math.nan, nan_ok=True)
        seen += known
    assert len({round(ap, 3) for ap in seen}) > 30  # the cases are not all alike


def map_of(detections, objects, n_images=1):
    """AP of 'cat' for detections (image, box, score) and objects (image, box[, difficult])."""
    def lists(rows, column, shape, dtype):
        return [torch.tensor([row[column] for row in rows if row[0] == i], dtype=dtype).view(shape)
                for i in range(n_images)]
    objects = [(*row, False)[:3] for row in objects]
    found = lists(detections, 1, (-1, 4), torch.float32)
    there = lists(objects, 1, (-1, 4), torch.float32)
    aps, mean = utils.calculate_mAP(
        found, [torch.ones(len(boxes), dtype=torch.int64) for boxes in found],
        lists(detections, 2, -1, torch.float32), there,
        [torch.ones(len(boxes), dtype=torch.int64) for boxes in there],
        lists(objects, 2, -1, torch.bool), CAT_MAP)
    assert mean == pytest.approx(aps['cat'], nan_ok=True)
    return aps['cat']


@pytest.mark.parametrize('story, n_objects, ap', [
    ('', 1, 0),
    ('T', 1, 1),
    ('F', 1, 0),
    ('TFFF', 1, 1),                            # what comes after full recall costs nothing
    ('FT', 1, 1 / 2),
    ('T', 2, 6 / 11),                          # recall 0 to 0.5
    ('TFT', 2, (6 + 5 * 2 / 3) / 11),
    ('TXT', 2, (6 + 5 * 2 / 3) / 11),          # a second detection of an object is false
    ('TDT', 2, 1),                             # one of a difficult object is ignored
    ('DDD', 1, 0),
    ('FTT', 2, 2 / 3),                         # precision 0, 1/2, 2/3: the highest counts
    ('TFTF', 3, (4 + 3 * 2 / 3) / 11),         # recall 1/3 reaches 0.3, 2/3 reaches 0.6
    *[('T' * n, 10, (n + 1) / 11) for n in range(1, 11)],   # recall of exactly n tenths
    ('FTTT', 10, 4 * 0.75 / 11),
    ('T' * 6, 20, 4 / 11),                     # 6 of 20 is 0.3, too
])
def test_average_precision_by_hand(story, n_objects, ap):
    # Objects stand in a row; a detection finds the next (T), the last again (X), a difficult one
    # (D), or none (F).
    row = [(0, (20. * i, 0., 20. * i + 10, 10.)) for i in range(n_objects)]
    difficult = (0, (0., 50., 10., 60.), True)
    nowhere, detections, found = (0., 900., 10., 910.), [], -1
    for step, letter in enumerate(story):
        found += letter == 'T'
        box = {'F': nowhere, 'D': difficult[1]}.get(letter) or row[found][1]
        detections.append((0, box, 0.9 - 0.01 * step))
    assert map_of(detections, [*row, difficult]) == pytest.approx(ap)


def test_an_overlap_of_exactly_a_half_counts():
    objects = [(0, (0., 0., 10., 10.))]
    assert map_of([(0, (0., 0., 10., 5.), 0.9)], objects) == 1
    assert map_of([(0, (0., 0., 10., 4.99), 0.9)], objects) == 0
    thirds = torch.tensor([[1., 1., 2., 3.], [1., 1., 2., 2.]]) / 3 - torch.tensor(1 / 3)
    assert map_of([(0, thirds[1].tolist(), 0.9)], [(0, thirds[0].tolist())]) == 1


def test_a_detection_looks_at_the_object_that_it_overlaps_most_and_at_no_other():
    easy, other = (0., 0., 10., 10.), (0., 0., 10., 12.)
    nearer_other = (0, (0., 0., 10., 11.5), 0.9)
    # Nearest is a difficult object: ignored, and the easy one is missed.
    assert map_of([nearer_other], [(0, easy), (0, other, True)]) == 0
    assert map_of([nearer_other, (0, easy, 0.5)], [(0, easy), (0, other, True)]) == 1
    # Nearest is taken: false, though another is free. Recall 1/2 at precision 1.
    again = (0, (0., 0., 10., 11.6), 0.8)
    assert map_of([nearer_other, again], [(0, easy), (0, other)]) == pytest.approx(6 / 11)
    # As near to both: the first one.
    between = (0, (0., 0., 10., 10.), 0.9)
    twins = (0., 0., 10., 8.), (0., 2., 10., 10.)
    assert map_of([between], [(0, twins[0], True), (0, twins[1])]) == 0
    assert map_of([between], [(0, twins[0]), (0, twins[1], True)]) == 1


def test_equal_scores_keep_their_order():
    box, nowhere = (0., 0., 10., 10.), (50., 50., 60., 60.)
    objects = [(1, box)]
    assert map_of([(0, nowhere, 0.5), (1, box, 0.5)], objects, 2) == 0.5
    assert map_of([(1, box, 0.5), (2, nowhere, 0.5)], objects, 3) == 1
    many = [(0, nowhere, 0.5)] * 20 + [(0, box, 0.5)]  # an unstable sort shuffles these
    assert map_of(many, [(0, box)]) == pytest.approx(1 / 21)


def test_detections_in_images_without_objects_are_false():
    box = (0., 0., 10., 10.)
    assert map_of([(0, box, 0.9), (1, box, 0.8)], [(1, box)], 2) == 0.5
    assert map_of([(0, box, 0.9), (1, box, 0.8)], [(1, box), (0, box, True)], 2) == 1


def test_a_class_without_objects_has_no_ap_and_no_part_in_the_mean():
    box = torch.tensor([[0., 0., 1., 1.]])
    label_map = {'background': 0, 'found': 1, 'difficult': 2, 'absent': 3, 'missed': 4}
    lists = ([box.repeat(3, 1)], [torch.tensor([1, 2, 3])], [torch.tensor([0.9, 0.8, 0.7])],
             [box.repeat(3, 1)], [torch.tensor([1, 2, 4])], [torch.tensor([False, True, False])])
    aps, mean = utils.calculate_mAP(*lists, label_map)
    assert_same_aps(aps, {'found': 1, 'difficult': math.nan, 'absent': math.nan, 'missed': 0})
    assert mean == 0.5 and isinstance(mean, float)


@pytest.mark.parametrize('dtype', [torch.bool, torch.uint8, torch.int64])
def test_difficulties_of_any_type(dtype):
    boxes = torch.tensor([[0., 0., 1., 1.], [2., 2., 3., 3.]])
    labels, scores = torch.ones(2, dtype=torch.int64), torch.tensor([0.9, 0.8])
    difficulties = torch.tensor([1, 0]).to(dtype)
    aps, _ = utils.calculate_mAP([boxes], [labels], [scores], [boxes], [labels], [difficulties],
                                 CAT_MAP)
    assert aps == {'cat': 1.}


@pytest.mark.parametrize('n_images', [0, 1, 3])
def test_nothing_found_and_nothing_there(n_images):
    def lists(shape, dtype=torch.float32):
        return [torch.zeros(shape, dtype=dtype) for _ in range(n_images)]
    nothing = (lists((0, 4)), lists(0, torch.int64), lists(0))
    there = (lists((0, 4)), lists(0, torch.int64), lists(0, torch.bool))
    aps, mean = utils.calculate_mAP(*nothing, *there, CAT_MAP)
    assert math.isnan(aps['cat']) and math.isnan(mean)
    aps, mean = utils.calculate_mAP(*nothing, *there, {'background': 0})
    assert aps == {} and math.isnan(mean)
    there = ([*there[0], torch.tensor([[0., 0., 1., 1.]])], [*there[1], torch.tensor([1])],
             [*there[2], torch.tensor([False])])
    nothing = ([*nothing[0], torch.zeros(0, 4)], [*nothing[1], torch.zeros(0, dtype=torch.int64)],
               [*nothing[2], torch.zeros(0)])
    assert utils.calculate_mAP(*nothing, *there, CAT_MAP) == ({'cat': 0.}, 0.)


def test_map_needs_as_many_images_of_each_list():
    with pytest.raises(AssertionError, match='1'):
        utils.calculate_mAP([torch.zeros(0, 4)], [], [], [], [], [], CAT_MAP)


def test_map_does_not_depend_on_the_unit_or_the_order_of_images_and_edits_nothing():
    random.seed(1)
    label_map = {'background': 0, 'a': 1, 'b': 2}
    case = random_case(30, 3)
    case[2] = list(torch.rand(sum(map(len, case[2]))).split([len(s) for s in case[2]]))  # no ties
    before = [[tensor.clone() for tensor in list_] for list_ in case]
    aps, _ = utils.calculate_mAP(*case, label_map)
    assert all(torch.equal(a, b) for list_, old in zip(case, before) for a, b in zip(list_, old))
    order = torch.randperm(30).tolist()
    shuffled = [[list_[i] for i in order] for list_ in case]
    assert_same_aps(utils.calculate_mAP(*shuffled, label_map)[0], aps)
    for which in (0, 3):
        case[which] = [boxes / 8 for boxes in case[which]]
    assert_same_aps(utils.calculate_mAP(*case, label_map)[0], aps)


def test_map_on_the_objects_of_voc_2007(sample_data):
    boxes, labels = [], []
    for line in (sample_data / 'voc07-test-boxes.txt').read_text().splitlines():
        numbers = torch.tensor([float(number) for number in line.split()[1:]]).view(-1, 5)
        boxes.append(numbers[:, :4] - torch.tensor([1., 1., 0., 0.]))
        labels.append(numbers[:, 4].long() + 1)
    scores, easy = [torch.ones(len(l)) for l in labels], [torch.zeros(len(l)) for l in labels]
    assert sum(map(len, boxes)) == 12031
    aps, mean = utils.calculate_mAP(boxes, labels, scores, boxes, labels, easy, utils.label_map)
    assert set(aps.values()) == {1.} and mean == 1
    # Shaken, each twice, some of another class: against the devkit's loop on a part.
    case = [[], [], [], boxes[:600], labels[:600], [torch.rand(len(l)) < 0.2 for l in labels[:600]]]
    for box, label in zip(boxes[:600], labels[:600]):
        size = (box[:, 2:] - box[:, :2]).repeat(2, 2)
        case[0].append(box.repeat(2, 1) + torch.randn(len(size), 4) * size * 0.12)
        other = torch.randint(1, 21, (len(size),))
        case[1].append(torch.where(torch.rand(len(size)) < 0.2, other, label.repeat(2)))
        case[2].append(torch.rand(len(size)))
    aps, mean = utils.calculate_mAP(*case, utils.label_map)
    assert_same_aps(aps, devkit_aps(*case, utils.label_map))
    assert 0.2 < mean < 0.8


# --------------------------------------------------------------------------------------------------
# Checkpoints
# --------------------------------------------------------------------------------------------------


def test_a_checkpoint_comes_back(tmp_path):
    path = tmp_path / 'check.pth.tar'
    model = torch.nn.Linear(2, 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    utils.save_checkpoint(path, iteration=7, model=model.state_dict(), label_map=CATS,
                          optimizer=optimizer.state_dict(), note=None)
    state = utils.load_checkpoint(str(path))
    assert state['iteration'] == 7 and state['label_map'] == CATS and state['note'] is None
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
