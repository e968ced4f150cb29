"""Tests of utils.py, sections 1 to 5; augmentation and mAP have files of their own."""

import math

import pytest
import torch
import torchvision
from PIL import Image

import utils
from reference import jaccard_overlap
from support.errors import UserError

LABEL_MAP = {'background': 0, 'cat': 1, 'dog': 2}


def random_boxes(n, *batch, high=1.):
    """Return random boxes (..., n, 4) with area."""
    corners = torch.rand(*batch, n, 2, 2).sort(dim=-2).values * high
    return corners.flatten(-2) + torch.tensor([0, 0, 0.01, 0.01])


def grid_boxes(n, cells=8):
    """Return random boxes (n, 4) with small integers: equal IoUs, and IoUs of 0.5, are common."""
    low = torch.randint(0, cells, (n, 2))
    return torch.cat([low, low + torch.randint(1, cells, (n, 2))], dim=1).float()


# --------------------------------------------------------------------------------------------------
# Classes and labels
# --------------------------------------------------------------------------------------------------


def test_voc_classes_are_sorted_and_background_is_0():
    assert len(utils.voc_labels) == 20 and sorted(utils.voc_labels) == list(utils.voc_labels)
    assert utils.label_map['background'] == 0
    assert [utils.label_map[name] for name in utils.voc_labels] == list(range(1, 21))
    assert {n: name for name, n in utils.label_map.items()} == utils.rev_label_map


def test_colors_of_classes_are_distinct():
    assert utils.label_color_map.keys() == utils.label_map.keys()
    assert len(set(utils.label_color_map.values())) == 21
    assert all(len(color) == 7 and int(color[1:], 16) >= 0
               for color in utils.label_color_map.values())


# --------------------------------------------------------------------------------------------------
# Box coordinates
# --------------------------------------------------------------------------------------------------


def test_box_coordinates_of_a_worked_example():
    xy, cxcy = torch.tensor([[1., 2., 5., 10.]]), torch.tensor([[3., 6., 4., 8.]])
    assert torch.equal(utils.xy_to_cxcy(xy), cxcy)
    assert torch.equal(utils.cxcy_to_xy(cxcy), xy)
    prior = torch.tensor([[2., 2., 4., 8.]])
    expected = torch.tensor([[2.5, 5., 0., 0.]])  # a quarter and half a prior away, times 10
    assert torch.allclose(utils.cxcy_to_gcxgcy(cxcy, prior), expected)
    twice = utils.cxcy_to_gcxgcy(prior * torch.tensor([1, 1, 2, math.e]), prior)
    assert torch.allclose(twice, torch.tensor([[0., 0., 5 * math.log(2), 5.]]))


@pytest.mark.parametrize('shape', [(), (7,), (2, 3), (0,), (2, 0)])
def test_box_conversions_are_inverses(shape):
    xy = random_boxes(1, *shape).squeeze(-2)
    priors = utils.xy_to_cxcy(random_boxes(1, *shape).squeeze(-2))
    before = xy.clone(), priors.clone()
    cxcy = utils.xy_to_cxcy(xy)
    locs = utils.cxcy_to_gcxgcy(cxcy, priors)
    assert locs.shape == cxcy.shape == xy.shape == (*shape, 4)
    assert torch.allclose(utils.cxcy_to_xy(cxcy), xy, atol=1e-6)
    assert torch.allclose(utils.gcxgcy_to_cxcy(locs, priors), cxcy, atol=1e-5)
    assert torch.equal(xy, before[0]) and torch.equal(priors, before[1])


def test_objects_are_padded_to_the_largest_number():
    counts = (2, 0, 5, 1)
    boxes = [random_boxes(count) for count in counts]
    labels = [torch.randint(1, 21, (count,)) for count in counts]
    before = [tensor.clone() for tensor in (*boxes, *labels)]
    padded_boxes, padded_labels = utils.pad_objects(boxes, labels)
    assert padded_boxes.shape == (4, 5, 4) and padded_labels.shape == (4, 5)
    assert padded_boxes.dtype == torch.float32 and padded_labels.dtype == torch.int64
    for i, count in enumerate(counts):
        assert torch.equal(padded_boxes[i, :count], boxes[i])
        assert torch.equal(padded_labels[i, :count], labels[i])
        assert (padded_labels[i, count:] == 0).all()
        sides = padded_boxes[i, count:, 2:] - padded_boxes[i, count:, :2]
        assert (sides == 0).all()   # no area
    assert all(torch.equal(a, b) for a, b in zip((*boxes, *labels), before))
    again = utils.pad_objects(padded_boxes, padded_labels)
    assert torch.equal(again[0], padded_boxes) and torch.equal(again[1], padded_labels)


@pytest.mark.parametrize('n_images', [1, 3])
def test_images_without_objects_are_padded_to_one(n_images):
    boxes, labels = utils.pad_objects(n_images * [torch.zeros(0, 4)],
                                      n_images * [torch.zeros(0, dtype=torch.int64)])
    assert torch.equal(boxes, torch.zeros(n_images, 1, 4)) and boxes.dtype == torch.float32
    assert torch.equal(labels, torch.zeros(n_images, 1, dtype=torch.int64))
    assert labels.dtype == torch.int64


# --------------------------------------------------------------------------------------------------
# Jaccard overlap and non-maximum suppression
# --------------------------------------------------------------------------------------------------


def test_overlap_of_a_worked_example():
    box = torch.tensor([[0., 0., 4., 4.]])
    others = torch.tensor([[0., 0., 4., 4.], [2., 2., 6., 6.], [0., 0., 4., 2.], [4., 0., 8., 4.]])
    assert utils.find_intersection(box, others).tolist() == [[16, 4, 8, 0]]
    expected = torch.tensor([[1, 4 / 28, 0.5, 0]])
    assert torch.allclose(utils.find_jaccard_overlap(box, others), expected)


def test_overlap_equals_torchvisions_and_is_symmetric():
    set_1, set_2 = random_boxes(40), random_boxes(30)
    before = set_1.clone(), set_2.clone()
    overlap = utils.find_jaccard_overlap(set_1, set_2)
    assert torch.allclose(overlap, torchvision.ops.box_iou(set_1, set_2), atol=1e-6)
    assert torch.equal(overlap, utils.find_jaccard_overlap(set_2, set_1).T)
    assert torch.allclose(utils.find_jaccard_overlap(set_1, set_1).diagonal(), torch.ones(40))
    assert torch.equal(set_1, before[0]) and torch.equal(set_2, before[1])


def test_overlap_of_edges_equals_the_devkits_of_pixels():
    pixels_1, pixels_2 = grid_boxes(50) + 1, grid_boxes(40) + 1
    edges = torch.tensor([1., 1., 0., 0.])
    low = torch.maximum(pixels_1[:, None, :2], pixels_2[:, :2])
    high = torch.minimum(pixels_1[:, None, 2:], pixels_2[:, 2:])
    shared = (high - low + 1).clamp(min=0).prod(dim=2)
    area_1, area_2 = ((p[:, 2:] - p[:, :2] + 1).prod(dim=1) for p in (pixels_1, pixels_2))
    devkit = shared / (area_1[:, None] + area_2 - shared)
    assert torch.equal(utils.find_jaccard_overlap(pixels_1 - edges, pixels_2 - edges), devkit)


def test_box_without_area_overlaps_nothing():
    empty = torch.tensor([[2., 2., 2., 2.], [1., 1., 1., 5.], [3., 3., 1., 1.], [3., 1., 1., 3.]])
    boxes = torch.cat([empty, torch.tensor([[0., 0., 4., 4.]])])
    assert torch.equal(utils.find_jaccard_overlap(empty, boxes), torch.zeros(4, 5))
    assert torch.equal(utils.find_jaccard_overlap(boxes, empty), torch.zeros(5, 4))


@pytest.mark.parametrize('find', [utils.find_intersection, utils.find_jaccard_overlap])
def test_overlap_broadcasts_and_accepts_empty_sets(find):
    set_1, set_2 = random_boxes(4, 2, 1), random_boxes(5, 3)
    overlap = find(set_1, set_2)
    assert overlap.shape == (2, 3, 4, 5)
    for i in range(2):
        for j in range(3):
            assert torch.equal(overlap[i, j], find(set_1[i, 0], set_2[j]))
    assert find(torch.zeros(0, 4), set_2[0]).shape == (0, 5)
    assert find(set_2[0], torch.zeros(0, 4)).shape == (5, 0)
    assert find(torch.zeros(0, 4), torch.zeros(0, 4)).shape == (0, 0)


@pytest.fixture(scope='module')
def greedy():
    """Return greedy non-maximum suppression as a loop over boxes, best first."""
    def suppress(boxes, scores, max_overlap):
        boxes, scores, kept = boxes.tolist(), scores.tolist(), []
        for i in sorted(range(len(boxes)), key=lambda i: -scores[i]):  # stable: lower index first
            if all(jaccard_overlap(boxes[i], boxes[j]) <= max_overlap for j in kept):
                kept.append(i)
        return kept
    return suppress


@pytest.mark.parametrize('max_overlap', [0., 0.25, 0.45, 0.5, 1.])
def test_suppression_is_greedy_also_with_ties(greedy, max_overlap):
    for _ in range(30):
        boxes, scores = grid_boxes(40), torch.randint(0, 8, (40,)) / 8
        kept = utils.non_max_suppression(boxes, scores, max_overlap)
        assert kept.tolist() == greedy(boxes, scores, max_overlap)


def test_rows_of_similar_length_are_padded_together():
    rows = [torch.arange(n) for n in (3, 50, 1, 20, 21, 7, 2, 40)]
    batches = list(utils.batch_by_length(rows))
    assert sorted(len(row) for batch in batches for row in batch) == sorted(map(len, rows))
    assert all(max(map(len, batch)) <= 2 * min(map(len, batch)) for batch in batches)
    assert len(batches) < len(rows)


def test_suppression_of_a_long_chain(greedy):
    # Each box overlaps its two neighbors by 2/3: every second one is kept, one after the other.
    x_min = torch.arange(60.)
    boxes = torch.stack([x_min, 0 * x_min, x_min + 5, 0 * x_min + 1], dim=1)
    scores = torch.linspace(1, 0.1, 60)
    kept = utils.non_max_suppression(boxes, scores, 0.5)
    assert kept.tolist() == list(range(0, 60, 2)) == greedy(boxes, scores, 0.5)
    order = torch.randperm(60)
    shuffled = utils.non_max_suppression(boxes[order], scores[order], 0.5)
    assert order[shuffled].tolist() == kept.tolist()


def test_suppression_equals_torchvisions():
    for _ in range(20):
        boxes, scores = random_boxes(100, high=2.), torch.rand(100)
        before = boxes.clone(), scores.clone()
        kept = utils.non_max_suppression(boxes, scores, 0.45)
        assert torch.equal(kept, torchvision.ops.nms(boxes, scores, 0.45))
        assert torch.equal(boxes, before[0]) and torch.equal(scores, before[1])


def test_boxes_at_the_threshold_and_without_area_are_kept():
    halves = torch.tensor([[0., 0., 4., 4.], [0., 0., 4., 2.]])
    assert utils.non_max_suppression(halves, torch.tensor([0.5, 0.9]), 0.5).tolist() == [1, 0]
    assert utils.non_max_suppression(halves, torch.tensor([0.5, 0.9]), 0.49).tolist() == [1]
    points = torch.ones(3, 4)
    assert utils.non_max_suppression(points, torch.ones(3), 0.).tolist() == [0, 1, 2]


def suppress_each_group(boxes, scores, max_overlap, groups):
    """Suppress the boxes of each group alone; returns kept indices by falling score."""
    kept = []
    for group in groups.unique():
        indices = (groups == group).nonzero().flatten()
        kept += indices[utils.non_max_suppression(boxes[indices], scores[indices],
                                                  max_overlap)].tolist()
    return sorted(kept, key=lambda i: (-scores[i].item(), i))


@pytest.mark.parametrize('group_sizes', [
    [40, 3, 1, 17, 40, 8], [1] * 12, [1, 30], [60], [900, 1, 5, 250, 30, 30], [2] * 300],
    ids=['mixed', 'one box per group', 'two groups', 'one group', 'group of 900', 'many groups'])
@pytest.mark.parametrize('max_overlap', [0.25, 0.45])
def test_suppression_in_groups_equals_that_of_each_group_alone(group_sizes, max_overlap):
    n = sum(group_sizes)
    numbers = torch.tensor([7 * i % 11 + 100 * i for i in range(len(group_sizes))])
    groups = numbers.repeat_interleave(torch.tensor(group_sizes))[torch.randperm(n)]
    boxes, scores = grid_boxes(n, cells=16), torch.randint(0, 20, (n,)) / 20      # with ties
    arguments = boxes, scores, groups
    before = [tensor.clone() for tensor in arguments]
    kept = utils.non_max_suppression(boxes, scores, max_overlap, groups)
    assert kept.dtype == torch.int64
    assert kept.tolist() == suppress_each_group(boxes, scores, max_overlap, groups)
    assert all(torch.equal(a, b) for a, b in zip(arguments, before))


def test_suppression_in_groups_equals_torchvisions():
    boxes, scores = random_boxes(300, high=2.), torch.rand(300)
    groups = torch.randint(0, 9, (300,))
    kept = utils.non_max_suppression(boxes, scores, 0.45, groups)
    assert torch.equal(kept, torchvision.ops.batched_nms(boxes, scores, groups, 0.45))


@pytest.mark.parametrize('groups', [None, torch.zeros(0, dtype=torch.int64)], ids=str)
def test_suppression_of_no_boxes(groups):
    kept = utils.non_max_suppression(torch.zeros(0, 4), torch.zeros(0), 0.5, groups)
    assert kept.shape == (0,) and kept.dtype == torch.int64


# --------------------------------------------------------------------------------------------------
# VOC annotations
# --------------------------------------------------------------------------------------------------


@pytest.fixture
def parse(tmp_path):
    """Return a function that parses the text of an annotation."""
    def parse_text(text, label_map=LABEL_MAP):
        path = tmp_path / 'image.xml'
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return utils.parse_annotation(path, label_map)
    return parse_text


def test_annotated_pixels_become_edges(parse, annotation):
    objects = parse(annotation([('dog', (1, 1, 64, 48), 1), ('cat', (10, 20, 10, 20), 0)]))
    assert objects == {'boxes': [[0, 0, 64, 48], [9, 19, 10, 20]], 'labels': [2, 1],
                       'difficulties': [True, False]}


def test_coordinates_may_be_floats_and_difficult_and_objects_may_be_missing(parse, annotation):
    objects = parse(annotation([('cat', (1.25, ' 2.5\n', 1e1, '47.75'))]))
    assert objects == {'boxes': [[0.25, 1.5, 10, 47.75]], 'labels': [1], 'difficulties': [False]}
    empty = annotation([('cat', (1, 1, 9, 9), 1)]).replace('<difficult>1</difficult>',
                                                           '<difficult/>')
    assert parse(empty)['difficulties'] == [False]
    assert parse('<annotation/>') == {'boxes': [], 'labels': [], 'difficulties': []}


def test_boxes_of_object_parts_are_ignored(parse, annotation):
    part = ('<part><name>head</name><bndbox><xmin>3</xmin><ymin>3</ymin><xmax>4</xmax>'
            '<ymax>4</ymax></bndbox></part>')
    text = annotation([('cat', (2, 2, 30, 30))])
    expected = {'boxes': [[1, 1, 30, 30]], 'labels': [1], 'difficulties': [False]}
    for place in ('</object>', '<bndbox>'):  # after the object's box, and before it
        assert parse(text.replace(place, part + place)) == expected


def test_parsing_does_not_clip(parse, annotation):
    text = annotation([('cat', (-5, 0, 999, 20)), ('cat', (9, 9, 3, 3))])
    assert parse(text)['boxes'] == [[-6, -1, 999, 20], [8, 8, 3, 3]]


def test_labels_are_names_without_a_label_map(parse, annotation):
    assert parse(annotation([('zebra', (1, 1, 2, 2))]), None)['labels'] == ['zebra']


VALID = ('<annotation><object><name>cat</name><difficult>0</difficult><bndbox><xmin>1</xmin>'
         '<ymin>2</ymin><xmax>3</xmax><ymax>4</ymax></bndbox></object></annotation>')


@pytest.mark.parametrize('text, message', [
    ('', 'malformed XML'),
    (VALID[:-20], 'malformed XML'),
    (b'\xff\xfe\x00' + VALID.encode(), 'malformed XML'),
    (b'<?xml version="1.0" encoding="gbk"?>' + VALID.encode(), 'image.xml'),
    (b'<?xml version="1.0" encoding="no-such"?>' + VALID.encode(), 'image.xml'),
    (VALID.replace('<xmin>1</xmin>', ''), 'object 1.*xmin'),
    (VALID.replace('<ymax>4</ymax>', '<ymax></ymax>'), 'object 1.*ymax'),
    (VALID.replace('>3<', '>three<'), "object 1.*xmax.*'three'"),
    (VALID.replace('>3<', '>nan<'), "object 1.*xmax.*'nan'"),
    (VALID.replace('>3<', '>inf<'), "object 1.*xmax.*'inf'"),
    (VALID.replace('<name>cat</name>', ''), 'object 1.*name'),
    (VALID.replace('cat', 'zebra'), "object 1.*'zebra'.*'cat', 'dog'"),
    (VALID.replace('cat', 'background'), "object 1.*'background'"),
])
def test_invalid_annotation_is_reported_with_its_file(text, message, parse):
    with pytest.raises(UserError, match=message) as error:
        parse(text)
    assert 'image.xml' in str(error.value)


def test_missing_annotation_is_reported(tmp_path):
    with pytest.raises(UserError, match='none.xml'):
        utils.parse_annotation(tmp_path / 'none.xml', LABEL_MAP)


@pytest.mark.parametrize('folder, n_files, n_objects, classes', [
    ('voc-sample/VOC2007', 395, 899, set(utils.voc_labels)),
    ('voc-sample/VOC2012', 1037, 2092, set(utils.voc_labels)),
    ('bccd', 364, 4888, {'RBC', 'WBC', 'Platelets'}),
])
def test_all_objects_of_real_annotations_are_read(folder, n_files, n_objects, classes, sample_data):
    files = sorted((sample_data / folder / 'Annotations').glob('*.xml'))
    parsed = [utils.parse_annotation(path, None) for path in files]
    boxes = torch.tensor([box for objects in parsed for box in objects['boxes']])
    assert (len(files), len(boxes)) == (n_files, n_objects)
    assert {name for objects in parsed for name in objects['labels']} == classes
    assert (boxes[:, :2] >= 0).all() and (boxes[:, 2:] - boxes[:, :2] >= 1).all()


# --------------------------------------------------------------------------------------------------
# Images
# --------------------------------------------------------------------------------------------------


def palette(transparency=None):
    """Return a palette image of one pixel, (10, 20, 30)."""
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
    (flat('F', 1.), (255, 255, 255)),
    (flat('F', .5), (127, 127, 127)),
    (flat('I', 1), (1, 1, 1)),
    *[(flat(mode, level * 257), (level,) * 3)
      for mode in ('I;16', 'I', 'F') for level in (255, 128, 0)],
    (flat('I;16B', 128 * 257), (128, 128, 128)),  # a TIFF with the high byte first
    (flat('I;16', 200), (0, 0, 0)),  # of 65535
], ids=lambda value: value.mode if isinstance(value, Image.Image) else str(value))
def test_images_of_all_modes_are_converted_to_rgb(image, rgb):
    mode, before = image.mode, image.tobytes()
    converted = utils.to_rgb(image)
    assert (converted.mode, converted.size) == ('RGB', image.size)
    assert all(abs(a - b) <= 2 for a, b in zip(converted.getpixel((0, 0)), rgb))
    converted.putpixel((0, 0), (7, 7, 7))
    assert (image.mode, image.tobytes()) == (mode, before)  # a copy, also of an RGB image


def test_16_bits_are_scaled_and_not_clipped(tmp_path):
    levels = [0, 255, 256, 20000, 40000, 65535]
    image = Image.new('I;16', (6, 1))
    image.putdata(levels)
    image.save(tmp_path / 'deep.png')
    with Image.open(tmp_path / 'deep.png') as file:
        row = [utils.to_rgb(file).getpixel((x, 0))[0] for x in range(6)]
    assert all(abs(got - level / 257) <= 1 for got, level in zip(row, levels))


def test_normalization_of_a_worked_example():
    image = torch.tensor([0, 128, 255], dtype=torch.uint8).view(1, 1, 3).repeat(3, 2, 1)
    images = torch.stack([image, 255 - image])
    before = images.clone()
    floats = utils.normalize(images)
    assert (floats.dtype, floats.shape) == (torch.float32, (2, 3, 2, 3))
    for channel, (mean, std) in enumerate([(0.485, 0.229), (0.456, 0.224), (0.406, 0.225)]):
        expected = torch.tensor([(level / 255 - mean) / std for level in (0, 128, 255)])
        assert torch.allclose(floats[0, channel], expected.expand(2, 3), atol=1e-5)
    assert torch.equal(utils.normalize(image), floats[0])  # a single image as in its batch
    assert torch.equal(images, before)
