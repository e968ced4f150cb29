"""Tests of datasets.py: the data set, then the augmentation.

What is drawn and what is done are apart, so geometry is tested with literal numbers, and the whole
with painted rectangles: wherever the paint went, the box must have gone, too.
"""

import json
import random

import pytest
import torch
from PIL import Image, ImageDraw
from torchvision.transforms.functional import pil_to_tensor

import datasets
import utils
from datasets import PascalVOCDataset, collate_fn, transform
from utils import UserError, write_data_lists

FILLER = (124, 116, 104)  # ImageNet's mean: 0.485, 0.456, 0.406 of 255
SAME = {'brightness': 0., 'contrast': 1., 'saturation': 1., 'hue': 0., 'contrast_first': True}
CAT, DOG = ('cat', (1, 1, 32, 24)), ('dog', (33, 25, 64, 48))


@pytest.fixture
def same_colors(monkeypatch):
    """Switches the change of colours off."""
    monkeypatch.setattr(datasets, 'sample_colors', lambda: SAME)


def objects_of(*boxes):
    """Boxes (O, 4), labels 1, 2, ... and difficulties, all False."""
    return (torch.tensor(boxes, dtype=torch.float32).view(-1, 4), torch.arange(len(boxes)) + 1,
            torch.zeros(len(boxes), dtype=torch.bool))


def noise(width, height):
    return Image.effect_noise((width, height), 80).convert('RGB')


# --------------------------------------------------------------------------------------------------
# The data set
# --------------------------------------------------------------------------------------------------


@pytest.fixture
def lists(make_voc, tmp_path):
    """A function that makes a folder with the lists of images; returns it and the VOC folder."""
    def make(images):
        root = make_voc({'s': images})
        write_data_lists([(root, 's')], [(root, 's')], tmp_path / 'lists')
        return tmp_path / 'lists', root / 'JPEGImages'
    return make


@pytest.mark.parametrize('split', ['TRAIN', 'TEST'])
def test_items_have_their_types_and_shapes(split, lists):
    folder, _ = lists({'a': [CAT, DOG], 'b': [DOG]})
    data = PascalVOCDataset(str(folder), split)
    assert len(data) == 2
    assert data.label_map == {'background': 0, 'cat': 1, 'dog': 2}
    for image, boxes, labels, difficulties in (data[0], data[1]):
        assert (image.shape, image.dtype) == ((3, 300, 300), torch.uint8)
        assert (boxes.shape, boxes.dtype) == ((len(labels), 4), torch.float32)
        assert (labels.shape, labels.dtype) == ((len(labels),), torch.int64)
        assert (difficulties.shape, difficulties.dtype) == ((len(labels),), torch.bool)


def test_test_items_are_the_lists_in_fractions(lists):
    folder, _ = lists({'a': [CAT, DOG], 'empty': []})
    data = PascalVOCDataset(folder, 'TEST')
    _, boxes, labels, _ = data[0]
    assert boxes.tolist() == [[0, 0, 0.5, 0.5], [0.5, 0.5, 1, 1]] and labels.tolist() == [1, 2]
    assert [tuple(tensor.shape) for tensor in data[1][1:]] == [(0, 4), (0,), (0,)]


@pytest.mark.parametrize('split', ['TRAIN', 'TEST'])
def test_difficult_objects_are_kept_on_request_in_either_split(split, lists, monkeypatch):
    monkeypatch.setattr(datasets, 'CROP_OPTIONS', (None,))  # a crop may drop objects
    folder, _ = lists({'a': [(*CAT, 1), (*DOG, 0)], 'only': [(*CAT, 1)]})
    easy, every = (PascalVOCDataset(folder, split, keep_difficult=keep) for keep in (False, True))
    assert easy[0][2].tolist() == [2] and easy[0][3].tolist() == [False]
    assert every[0][2].tolist() == [1, 2] and every[0][3].tolist() == [True, False]
    assert easy[1][1].shape == (0, 4) and len(every[1][1]) == 1
    assert len(PascalVOCDataset(folder, split)[0][2]) == 1  # not kept unless asked for


@pytest.mark.parametrize('mode, color, level', [('L', 100, 100), ('RGBA', (0, 0, 0, 0), 255)])
def test_photos_of_other_modes_become_rgb(mode, color, level, lists):
    folder, images = lists({'a': [CAT]})
    Image.new(mode, (64, 48), color).save(images / 'a.jpg', 'PNG')
    image = PascalVOCDataset(folder, 'TEST')[0][0]
    assert image.shape == (3, 300, 300) and (image == level).all()


def test_the_orientation_tag_is_not_followed(lists):
    folder, images = lists({'a': [CAT]})
    photo = Image.new('RGB', (64, 48))
    photo.paste((255, 255, 255), (0, 0, 32, 48))  # the left half is white
    exif = photo.getexif()
    exif[0x0112] = 6
    photo.save(images / 'a.jpg', exif=exif, quality=95)
    image = PascalVOCDataset(folder, 'TEST')[0][0].float()
    assert image[:, :, :140].min() > 250 and image[:, :, 160:].max() < 5


def test_lists_that_are_not_there_or_no_lists_are_a_slip(lists, tmp_path):
    with pytest.raises(UserError, match='nowhere.*create_data_lists.py'):
        PascalVOCDataset(tmp_path / 'nowhere', 'TRAIN')
    folder, _ = lists({'a': [CAT]})
    for name in ('TEST_images.json', 'TEST_objects.json', 'label_map.json'):
        whole = (folder / name).read_text()
        (folder / name).write_text(whole[:-1])
        with pytest.raises(UserError, match=f'{name}.*create_data_lists.py'):
            PascalVOCDataset(folder, 'TEST')
        (folder / name).unlink()
        with pytest.raises(UserError, match=f'{name}.*create_data_lists.py'):
            PascalVOCDataset(folder, 'TEST')
        (folder / name).write_text(whole)
    assert len(PascalVOCDataset(folder, 'TEST')) == 1


def test_images_that_have_moved_are_a_slip_from_the_start(lists):
    folder, images = lists({'a': [CAT], 'b': [CAT]})
    (images / 'b.jpg').unlink()
    with pytest.raises(UserError, match='b.jpg.*create_data_lists.py'):
        PascalVOCDataset(folder, 'TRAIN')


@pytest.mark.parametrize('content', [b'', b'not an image', None])
def test_an_image_that_cannot_be_decoded_is_named(content, lists):
    folder, images = lists({'a': [CAT], 'b': [CAT]})
    path = images / 'b.jpg'
    path.write_bytes(path.read_bytes()[:-200] if content is None else content)
    data = PascalVOCDataset(folder, 'TRAIN')
    assert data[0][0].shape == (3, 300, 300)
    with pytest.raises(UserError, match='b.jpg'):
        data[1]


def test_a_split_is_train_or_test(lists):
    folder, _ = lists({'a': [CAT]})
    with pytest.raises(AssertionError, match="'train'"):
        PascalVOCDataset(folder, 'train')
    with pytest.raises(AssertionError, match="'train'"):
        transform(noise(8, 8), *objects_of(), 'train')


def test_lists_of_different_lengths_are_refused(lists):
    folder, _ = lists({'a': [CAT], 'b': [CAT]})
    images = json.loads((folder / 'TRAIN_images.json').read_text())
    (folder / 'TRAIN_images.json').write_text(json.dumps(images[:1]))
    with pytest.raises((AssertionError, UserError), match='1.*2'):
        PascalVOCDataset(folder, 'TRAIN')


def test_a_batch_holds_its_items(lists):
    folder, _ = lists({'a': [CAT, DOG], 'b': [DOG], 'empty': []})
    items = [PascalVOCDataset(folder, 'TEST')[i] for i in range(3)]
    images, *objects = collate_fn(items)
    assert (images.shape, images.dtype) == ((3, 3, 300, 300), torch.uint8)
    assert [type(values) for values in objects] == [list] * 3
    assert [len(boxes) for boxes in objects[0]] == [2, 1, 0]
    for item, image, *its_objects in zip(items, images, *objects):
        assert all(torch.equal(a, b) for a, b in zip(item, (image, *its_objects)))


# --------------------------------------------------------------------------------------------------
# Windows: which objects they keep, and where these go
# --------------------------------------------------------------------------------------------------


def test_transform_is_found_in_utils_too():
    assert utils.transform is transform
    with pytest.raises(AttributeError, match='no_such_name'):
        _ = utils.no_such_name


def test_a_window_keeps_the_objects_whose_centre_is_inside():
    boxes = torch.tensor([[10., 10., 20., 20.],     # wholly inside both windows
                          [0., 0., 100., 100.],     # around the first window
                          [35., 10., 50., 20.],     # the first holds a third of it
                          [25., 10., 50., 20.],     # the first holds more than half
                          [10., 35., 20., 50.]])    # as the third, downwards
    windows = torch.tensor([[0., 0., 40., 40.], [0., 0., 200., 200.], [60., 60., 90., 90.]])
    assert datasets.objects_in(windows, boxes).int().tolist() == [
        [1, 0, 0, 1, 0], [1, 1, 1, 1, 1], [0, 0, 0, 0, 0]]
    assert datasets.objects_in(windows, torch.zeros(0, 4)).shape == (3, 0)
    assert datasets.objects_in(torch.zeros(0, 4), boxes).shape == (0, 5)


@pytest.mark.parametrize('box, kept', [
    ((10., 10., 12., 50.), True),       # 1 of the 300 pixels wide
    ((10., 10., 11.9, 50.), False),
    ((10., 10., 50., 12.), True),
    ((10., 10., 50., 11.9), False),
    ((598., 10., 602., 50.), False),    # its centre is on the border
    ((597., 10., 601., 50.), True),     # 3 pixels after clipping
    ((598.5, 10., 600.5, 50.), False),  # centre inside, but 0.75 pixels after clipping
    ((10., 10., 10., 50.), False),
])
def test_a_window_keeps_the_objects_that_are_left_with_a_pixel(box, kept):
    window = torch.tensor([[0., 0., 600., 600.]])
    assert datasets.objects_in(window, torch.tensor([box])).tolist() == [[kept]]


def test_a_crop_clips_what_it_keeps_and_gives_fractions_of_itself():
    boxes, labels, difficulties = objects_of(
        (30., 20., 50., 40.), (0., 0., 45., 45.), (90., 90., 100., 100.), (20., 20., 70., 40.))
    difficulties[3] = True
    before = boxes.clone()
    got = datasets.crop(boxes, labels, difficulties, (20, 20, 60, 40))
    wanted = torch.tensor([[0.25, 0., 0.75, 1.], [0., 0., 0.625, 1.], [0., 0., 1., 1.]])
    assert torch.allclose(got[0], wanted)
    assert got[1].tolist() == [1, 2, 4] and got[2].tolist() == [False, False, True]
    assert torch.equal(boxes, before)
    # A window larger than the image: zoom-out.
    got = datasets.crop(boxes, labels, difficulties, (-100, -50, 100, 150))
    assert torch.allclose(got[0][0], torch.tensor([0.65, 0.35, 0.75, 0.45]))
    assert got[1].tolist() == [1, 2, 3, 4]
    none = datasets.crop(*objects_of(), (0, 0, 10, 10))
    assert [tuple(tensor.shape) for tensor in none] == [(0, 4), (0,), (0,)]


def test_a_flip_mirrors_and_twice_is_nothing():
    boxes = torch.tensor([[0., 0.125, 0.25, 0.5], [0.25, 0., 1., 1.]])
    flipped = torch.tensor([[0.75, 0.125, 1., 0.5], [0., 0., 0.75, 1.]])
    assert torch.equal(datasets.flip(boxes), flipped)
    assert torch.equal(datasets.flip(flipped), boxes)
    assert datasets.flip(torch.zeros(0, 4)).shape == (0, 4)


def test_the_whole_image_is_warped():
    image = noise(64, 48)
    before = image.tobytes()
    warped = datasets.cut_out(image, (0, 0, 64, 48))
    wanted = image.resize((300, 300), Image.Resampling.BILINEAR)
    assert warped.tobytes() == wanted.tobytes() and image.tobytes() == before


@pytest.mark.parametrize('window, span', [
    ((-10, -10, 20, 20), (100, 100, 200, 200)),
    ((0, -30, 30, 30), (0, 150, 100, 200)),
    ((-5, 0, 5, 10), (150, 0, 300, 300)),        # part of the image, past its left border
    ((5, 5, 15, 20), (0, 0, 150, 100)),          # past two borders
    ((2, 3, 8, 9), (0, 0, 300, 300)),
    ((20, 0, 30, 10), (0, 0, 0, 0)),             # no image at all
])
def test_a_window_past_the_border_is_filled_with_the_mean(window, span):
    result = pil_to_tensor(datasets.cut_out(Image.new('RGB', (10, 10), (255, 0, 0)), window))
    wanted = torch.tensor(FILLER, dtype=torch.uint8).view(3, 1, 1).repeat(1, 300, 300)
    left, top, right, bottom = span
    wanted[:, top:bottom, left:right] = torch.tensor([255, 0, 0]).view(3, 1, 1)
    assert torch.equal(result, wanted)


def test_only_the_image_is_changed_and_not_the_filler():
    seen = []

    def change(part):
        seen.append(part.size)
        return Image.new('RGB', part.size, (1, 2, 3))
    result = datasets.cut_out(noise(20, 10), (-20, -10, 40, 20), change)
    assert seen == [(100, 100)]
    assert result.getpixel((150, 150)) == (1, 2, 3) and result.getpixel((99, 99)) == FILLER


# --------------------------------------------------------------------------------------------------
# The dice
# --------------------------------------------------------------------------------------------------


def test_a_zoom_out_is_1_to_4_times_the_image_which_is_anywhere_in_it():
    zooms, places = [], []
    for _ in range(500):
        x_min, y_min, x_max, y_max = datasets.sample_zoom_out(200, 100)
        zooms.append((x_max - x_min) / 200)
        assert (y_max - y_min) / 100 == pytest.approx(zooms[-1])
        assert x_min <= 0 and y_min <= 0 and x_max >= 200 - 1e-9 and y_max >= 100 - 1e-9
        places.append(-x_min / (x_max - x_min - 200))
    assert 1 <= min(zooms) < 1.2 and 3.8 < max(zooms) <= 4
    assert 0 <= min(places) < 0.1 and 0.9 < max(places) <= 1


WINDOWS = [(0, 0, 200, 120), (-150, -60, 250, 190), (-20, -80, 90, 110)]


@pytest.mark.parametrize('min_overlap', [0., 0.1, 0.3, 0.5, 0.7, 0.9])
@pytest.mark.parametrize('window', WINDOWS)
def test_a_crop_keeps_an_object_that_it_overlaps_enough(min_overlap, window, monkeypatch):
    monkeypatch.setattr(datasets, 'CROP_OPTIONS', (min_overlap,))
    x_min, y_min, x_max, y_max = window
    width, height = x_max - x_min, y_max - y_min
    # An object that any option can be met with, and a small one that is good for few.
    boxes = torch.tensor([[x_min + 0.02 * width, y_min + 0.02 * height,
                           x_max - 0.02 * width, y_max - 0.02 * height],
                          [x_min, y_min, x_min + 0.05 * width, y_min + 0.05 * height]])
    for _ in range(8):
        crop = datasets.sample_crop(window, boxes)
        sides = crop[2] - crop[0], crop[3] - crop[1]
        for low, high, side, whole in zip(crop[:2], crop[2:], sides, (width, height)):
            assert 0.3 - 1e-6 <= side / whole <= 1 + 1e-6 and low < high
        assert 0.5 - 1e-6 <= sides[0] / sides[1] <= 2 + 1e-6
        assert crop[0] >= x_min - 1e-6 and crop[2] <= x_max + 1e-6
        assert crop[1] >= y_min - 1e-6 and crop[3] <= y_max + 1e-6
        crop = torch.tensor([crop])
        centres = (boxes[:, :2] + boxes[:, 2:]) / 2
        inside = ((centres > crop[:, :2]) & (centres < crop[:, 2:])).all(dim=1)
        assert inside.any()
        assert utils.find_jaccard_overlap(crop, boxes).max() >= min_overlap


def test_crops_are_of_all_options_and_none_is_the_whole_window(monkeypatch):
    assert set(datasets.CROP_OPTIONS) == {None, 0., 0.1, 0.3, 0.5, 0.7, 0.9}
    window, boxes = (0, 0, 100, 100), torch.tensor([[20., 20., 80., 80.]])
    crops = [datasets.sample_crop(window, boxes) for _ in range(300)]
    assert 20 < sum(crop == window for crop in crops) < 80      # a seventh is 43
    monkeypatch.setattr(datasets, 'CROP_OPTIONS', (None,))
    assert datasets.sample_crop(window, boxes) == window


def test_an_option_that_cannot_be_met_gives_way_to_another(monkeypatch):
    monkeypatch.setattr(datasets, 'CROP_OPTIONS', (0.9, None))
    boxes = torch.tensor([[10., 10., 12., 12.]])                # no crop overlaps it by 0.9
    assert datasets.sample_crop((0, 0, 100, 100), boxes) == (0, 0, 100, 100)


def test_colors_are_changed_half_of_the_time_and_so_much():
    drawn = [datasets.sample_colors() for _ in range(1000)]
    for name, low, high in (('brightness', -32, 32), ('contrast', 0.5, 1.5),
                            ('saturation', 0.5, 1.5), ('hue', -18, 18)):
        values = [colors[name] for colors in drawn]
        changed = [value for value in values if value != SAME[name]]
        assert 420 < len(changed) < 580
        spread = (high - low) / 20
        assert low <= min(changed) < low + spread and high - spread < max(changed) <= high
    assert 420 < sum(colors['contrast_first'] for colors in drawn) < 580


# --------------------------------------------------------------------------------------------------
# Colours
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('color, change, wanted', [
    ((10, 100, 250), {'brightness': 20}, (30, 120, 255)),
    ((10, 100, 250), {'brightness': -20}, (0, 80, 230)),
    ((10, 100, 250), {'contrast': 0.5}, (5, 50, 125)),
    ((10, 100, 250), {'contrast': 1.5, 'contrast_first': False}, (15, 150, 255)),
    ((40, 100, 40), {'brightness': 20, 'contrast': 0.5}, (30, 60, 30)),
    ((40, 100, 40), {'brightness': 20, 'contrast': 0.5, 'contrast_first': False}, (30, 60, 30)),
    ((200, 100, 100), {'saturation': 0.5}, (200, 150, 150)),
    ((200, 100, 100), {'saturation': 1.5}, (200, 50, 50)),
    ((90, 90, 90), {'saturation': 1.5, 'hue': 18}, (90, 90, 90)),
    ((255, 0, 0), {'hue': 120}, (0, 255, 0)),
    ((255, 0, 0), {'hue': -120}, (0, 0, 255)),
    ((255, 0, 0), {'hue': 18}, (255, 77, 0)),
    ((255, 0, 0), {'hue': -18}, (255, 0, 77)),
    ((200, 100, 100), {'contrast': 1.5, 'saturation': 0.5}, (255, 203, 203)),
    ((200, 100, 100), {'contrast': 1.5, 'saturation': 0.5, 'contrast_first': False},
     (255, 225, 225)),
], ids=str)
def test_colors_by_hand(color, change, wanted):
    image = Image.new('RGB', (4, 4), color)
    changed = datasets.distort(image, **{**SAME, **change})
    assert changed.size == (4, 4) and changed.mode == 'RGB'
    assert all(abs(a - b) <= 4 for a, b in zip(changed.getpixel((1, 2)), wanted))
    assert image.getpixel((1, 2)) == color


@pytest.mark.parametrize('contrast_first', [True, False])
def test_no_change_of_colors_changes_nothing(contrast_first):
    image = noise(20, 20)
    unchanged = datasets.distort(image, **{**SAME, 'contrast_first': contrast_first})
    assert unchanged.tobytes() == image.tobytes()


def test_training_leaves_the_filler_alone(monkeypatch):
    monkeypatch.setattr(datasets, 'sample_colors', lambda: {**SAME, 'brightness': 32.})
    n_filled = 0
    for number in range(40):
        random.seed(number)
        image = transform(Image.new('RGB', (30, 20), (10, 20, 30)), *objects_of(), 'TRAIN')[0]
        filler, bright = ((image == torch.tensor(color).view(3, 1, 1)).all(dim=0)
                          for color in (FILLER, (42, 52, 62)))
        assert (filler | bright).all() and bright.any()
        n_filled += bool(filler.any())
    assert 10 < n_filled < 30


# --------------------------------------------------------------------------------------------------
# The whole augmentation
# --------------------------------------------------------------------------------------------------


def test_test_images_are_warped_and_nothing_is_dropped():
    image = noise(100, 40)
    boxes, labels, difficulties = objects_of((0., 0., 100., 40.), (50., 10., 50.1, 10.1),
                                             (99., 39., 100., 40.))
    difficulties[1] = True
    warped, fractions, *rest = transform(image, boxes, labels, difficulties, 'TEST')
    wanted = image.resize((300, 300), Image.Resampling.BILINEAR)
    assert torch.equal(warped, pil_to_tensor(wanted))
    assert torch.allclose(fractions * torch.tensor([100., 40., 100., 40.]), boxes)
    assert torch.equal(rest[0], labels) and torch.equal(rest[1], difficulties)


def painted_box(image, channel):
    """What is painted red (0) or blue (2) in (3, 300, 300): (x_min, y_min, x_max, y_max)."""
    # Half way from the black of the ground, and from the filler, to the paint.
    paint = image[channel].int() - image[2 - channel] > 127
    rows, columns = paint.any(dim=1).nonzero(), paint.any(dim=0).nonzero()
    return [columns.min().item(), rows.min().item(), columns.max().item() + 1,
            rows.max().item() + 1]


@pytest.mark.parametrize('size', [(160, 120), (90, 200)])
@pytest.mark.parametrize('split, n_seeds', [('TEST', 1), ('TRAIN', 120)])
def test_boxes_go_where_the_paint_goes(size, split, n_seeds, same_colors):
    width, height = size
    boxes, labels, _ = objects_of(
        (width * 0.1, height * 0.15, width * 0.4, height * 0.6),
        (width * 0.5, height * 0.3, width * 0.9, height * 0.95))
    difficulties = torch.tensor([False, True])
    image = Image.new('RGB', size)
    for box, color in zip(boxes.tolist(), ((255, 0, 0), (0, 0, 255))):
        image.paste(color, tuple(round(corner) for corner in box))
    n_seen = {1: 0, 2: 0}
    for number in range(n_seeds):
        random.seed(number)
        result = transform(image, boxes, labels, difficulties, split)
        for box, label, difficult in zip(*(values.tolist() for values in result[1:])):
            found = painted_box(result[0], channel=2 * label - 2)
            assert all(abs(300 * a - b) <= 2 for a, b in zip(box, found)), (number, box, found)
            assert difficult == (label == 2)
            n_seen[label] += 1
    assert min(n_seen.values()) > 0.4 * n_seeds


def test_a_striped_photo_stays_upright_and_is_mirrored_half_of_the_time(same_colors, monkeypatch):
    monkeypatch.setattr(datasets, 'CROP_OPTIONS', (None,))
    image = Image.new('RGB', (40, 30), (0, 0, 255))
    ImageDraw.Draw(image).rectangle((0, 0, 19, 14), fill=(255, 0, 0))  # top left
    n_mirrored = n_zoomed = 0
    for number in range(200):
        random.seed(number)
        result, boxes, _, _ = transform(image, *objects_of((0., 0., 20., 15.)), 'TRAIN')
        blue = (result[2] > 200) & (result[0] < 60)
        columns, rows = blue.any(dim=0).nonzero().flatten(), blue.any(dim=1).nonzero().flatten()
        x_min, y_min, x_max, _ = (300 * boxes[0]).tolist()
        assert abs(y_min - rows.min()) <= 2                  # never upside down
        mirrored = abs(x_max - 1 - columns.max()) <= 2
        assert mirrored or abs(x_min - columns.min()) <= 2
        n_mirrored += mirrored
        n_zoomed += bool((result == torch.tensor(FILLER).view(3, 1, 1)).all(dim=0).any())
    assert 75 < n_mirrored < 125 and 75 < n_zoomed < 125


def test_augmented_boxes_are_sound_and_an_object_always_stays():
    boxes, labels, difficulties = objects_of(
        (0., 0., 90., 60.), (30., 10., 50., 50.), (80., 50., 90., 60.), (40., 20., 41., 21.))
    image = noise(90, 60)
    counts = set()
    for number in range(200):
        random.seed(number)
        result, found, its_labels, its_difficulties = transform(image, boxes, labels, difficulties,
                                                                'TRAIN')
        assert (result.shape, result.dtype) == ((3, 300, 300), torch.uint8)
        assert found.isfinite().all() and (found >= 0).all() and (found <= 1).all()
        assert (found[:, 2:] - found[:, :2] >= 1 / 300 - 1e-6).all()
        assert len(found) == len(its_labels) == len(its_difficulties) >= 1
        assert len(set(its_labels.tolist())) == len(its_labels)
        assert found.dtype == torch.float32 and its_labels.dtype == torch.int64
        counts.add(len(found))
    assert {1, 4} <= counts


@pytest.mark.parametrize('box', [(500., 100., 502.2, 200.), (5., 3., 7., 3.8)], ids=str)
def test_a_zoom_out_that_would_lose_every_object_is_not_done(box, same_colors):
    # A little more than 1 of the 300 pixels: any real zoom-out makes it less.
    size = (600, 300) if box[0] > 100 else (20, 200)
    for number in range(60):
        random.seed(number)
        image, boxes, _, _ = transform(Image.new('RGB', size), *objects_of(box), 'TRAIN')
        assert len(boxes) == 1


def test_an_object_under_a_pixel_is_dropped_unless_a_crop_enlarges_it(monkeypatch):
    image, tiny = Image.new('RGB', (600, 600)), objects_of((100., 100., 101., 300.))
    for number in range(60):
        random.seed(number)
        boxes = transform(image, *tiny, 'TRAIN')[1]
        assert ((boxes[:, 2:] - boxes[:, :2]) >= 1 / 300 - 1e-6).all()
    monkeypatch.setattr(datasets, 'CROP_OPTIONS', (None,))
    assert transform(image, *tiny, 'TRAIN')[1].shape == (0, 4)


@pytest.mark.parametrize('size', [(64, 48), (1, 1), (3, 500), (700, 2)])
def test_images_of_any_size_and_without_objects(size):
    for number in range(10):
        random.seed(number)
        image, *objects = transform(noise(*size), *objects_of(), 'TRAIN')
        assert image.shape == (3, 300, 300)
        assert [tuple(tensor.shape) for tensor in objects] == [(0, 4), (0,), (0,)]
        image, boxes, _, _ = transform(noise(*size), *objects_of((0., 0., *size)), 'TRAIN')
        assert image.shape == (3, 300, 300) and len(boxes) == 1


def test_the_same_seed_gives_the_same_and_torchs_dice_are_not_touched():
    image, objects = noise(60, 40), objects_of((5., 5., 30., 30.), (20., 10., 55., 35.))

    def draw(number, torch_seed):
        random.seed(number)
        torch.manual_seed(torch_seed)
        state = torch.get_rng_state()
        results = [transform(image, *objects, 'TRAIN') for _ in range(5)]
        assert torch.equal(torch.get_rng_state(), state)
        return [tensor for result in results for tensor in result]

    def same(one, other):
        return all(torch.equal(a, b) for a, b in zip(one, other))
    assert same(draw(1, 1), draw(1, 2))
    assert not same(draw(1, 1), draw(2, 1))


@pytest.mark.parametrize('split', ['TRAIN', 'TEST'])
def test_no_argument_is_edited_in_place(split):
    image, objects = noise(60, 40), objects_of((5., 5., 30., 30.), (20., 10., 55., 35.))
    pixels, before = image.tobytes(), [tensor.clone() for tensor in objects]
    for number in range(30):
        random.seed(number)
        transform(image, *objects, split)
        assert image.tobytes() == pixels and image.size == (60, 40)
        assert all(torch.equal(a, b) for a, b in zip(objects, before))


# --------------------------------------------------------------------------------------------------
# Real images
# --------------------------------------------------------------------------------------------------


def test_real_images_in_both_splits(sample_data, tmp_path):
    root = tmp_path / 'voc'
    for part in ('JPEGImages', 'Annotations'):
        (root / part).parent.mkdir(exist_ok=True)
        (root / part).symlink_to(sample_data / 'voc-sample' / 'VOC2007' / part)
    (root / 'ImageSets' / 'Main').mkdir(parents=True)
    names = (sample_data / 'voc-sample/VOC2007/ImageSets/Main/test.txt').read_text().split()[:30]
    (root / 'ImageSets' / 'Main' / 'few.txt').write_text('\n'.join(names))
    write_data_lists([(root, 'few')], [(root, 'few')], tmp_path / 'lists', utils.label_map)
    random.seed(0)
    train, test = (PascalVOCDataset(tmp_path / 'lists', split) for split in ('TRAIN', 'TEST'))
    assert len(train) == len(test) == 30
    for i in range(30):
        for data in (train, test):
            image, boxes, labels, _ = data[i]
            assert image.shape == (3, 300, 300) and image.float().std() > 1
            assert len(boxes) >= 1 and boxes.min() >= 0 and boxes.max() <= 1 + 1e-6
            assert (boxes[:, 2:] > boxes[:, :2]).all()
            assert set(labels.tolist()) <= set(range(1, 21))
        assert len(labels) == len(test.objects[i]['labels'])


def test_an_image_of_any_size_fills_the_whole_result():
    for side in [*range(1, 700), 1000, 1023, 4032]:
        for size in ((side, 300), (300, side)):
            result = datasets.cut_out(Image.new('RGB', size, 'black'), (0, 0, *size))
            assert result.getextrema() == ((0, 0),) * 3, size
