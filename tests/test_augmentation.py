"""Tests of augmentation, section 6 of utils.py.

Random sampling and geometry are separate functions, so geometry is tested with literal numbers, and
`transform()` with colored rectangles, whose pixels the boxes must enclose.
"""

import random

import pytest
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torchvision.transforms.functional import pil_to_tensor

import utils
from utils import transform

FILLER = (124, 116, 104)  # ImageNet's mean: 0.485, 0.456, 0.406 of 255
SAME = {'brightness': 0., 'contrast': 1., 'saturation': 1., 'hue': 0., 'contrast_first': True}


@pytest.fixture
def same_colors(monkeypatch):
    """Turn the random change of colors off."""
    monkeypatch.setattr(utils, 'sample_colors', lambda: SAME)


def objects_of(*boxes):
    """Return boxes (O, 4), labels 1, 2, ... and difficulties, all False."""
    return (torch.tensor(boxes, dtype=torch.float32).view(-1, 4), torch.arange(len(boxes)) + 1,
            torch.zeros(len(boxes), dtype=torch.bool))


def noise(width, height):
    return Image.effect_noise((width, height), 80).convert('RGB')


# --------------------------------------------------------------------------------------------------
# Geometry of windows
# --------------------------------------------------------------------------------------------------


def test_window_keeps_objects_whose_center_is_inside():
    boxes = torch.tensor([[10., 10., 20., 20.],     # inside the first two windows
                          [0., 0., 100., 100.],     # around the first window
                          [35., 10., 50., 20.],     # a third is in the first one
                          [25., 10., 50., 20.],     # 0.6 are in the first one
                          [10., 35., 20., 50.]])    # as the third, downwards
    windows = torch.tensor([[0., 0., 40., 40.], [0., 0., 200., 200.], [60., 60., 90., 90.]])
    assert utils.find_kept_objects(windows, boxes).int().tolist() == [
        [1, 0, 0, 1, 0], [1, 1, 1, 1, 1], [0, 0, 0, 0, 0]]
    assert utils.find_kept_objects(windows, torch.zeros(0, 4)).shape == (3, 0)
    assert utils.find_kept_objects(torch.zeros(0, 4), boxes).shape == (0, 5)


@pytest.mark.parametrize('box, kept', [
    ((10., 10., 12., 50.), True),       # 1 of the 300 pixels wide
    ((10., 10., 11.9, 50.), False),
    ((10., 10., 50., 12.), True),
    ((10., 10., 50., 11.9), False),
    ((598., 10., 602., 50.), False),    # its center is on the border
    ((597., 10., 601., 50.), True),     # 3 pixels after clipping
    ((598.5, 10., 600.5, 50.), False),  # center inside, but 0.75 pixels after clipping
    ((10., 10., 10., 50.), False),
])
def test_window_keeps_objects_of_at_least_one_pixel(box, kept):
    window = torch.tensor([[0., 0., 600., 600.]])
    assert utils.find_kept_objects(window, torch.tensor([box])).tolist() == [[kept]]


def test_crop_clips_objects_and_returns_fractions_of_the_window():
    boxes, labels, difficulties = objects_of(
        (30., 20., 50., 40.), (0., 0., 45., 45.), (90., 90., 100., 100.), (20., 20., 70., 40.))
    difficulties[3] = True
    before = boxes.clone()
    cropped = utils.crop(boxes, labels, difficulties, (20, 20, 60, 40))
    expected = torch.tensor([[0.25, 0., 0.75, 1.], [0., 0., 0.625, 1.], [0., 0., 1., 1.]])
    assert torch.allclose(cropped[0], expected)
    assert cropped[1].tolist() == [1, 2, 4] and cropped[2].tolist() == [False, False, True]
    assert torch.equal(boxes, before)
    # A window larger than the image: zoom-out.
    cropped = utils.crop(boxes, labels, difficulties, (-100, -50, 100, 150))
    assert torch.allclose(cropped[0][0], torch.tensor([0.65, 0.35, 0.75, 0.45]))
    assert cropped[1].tolist() == [1, 2, 3, 4]
    empty = utils.crop(*objects_of(), (0, 0, 10, 10))
    assert [tuple(tensor.shape) for tensor in empty] == [(0, 4), (0,), (0,)]


def test_flip_is_its_own_inverse():
    boxes = torch.tensor([[0., 0.125, 0.25, 0.5], [0.25, 0., 1., 1.]])
    flipped = torch.tensor([[0.75, 0.125, 1., 0.5], [0., 0., 0.75, 1.]])
    assert torch.equal(utils.flip(boxes), flipped)
    assert torch.equal(utils.flip(flipped), boxes)
    assert utils.flip(torch.zeros(0, 4)).shape == (0, 4)


def test_warp_of_the_whole_image():
    image = noise(64, 48)
    before = image.tobytes()
    warped = utils.warp(image, (0, 0, 64, 48))
    expected = image.resize((300, 300), Image.Resampling.BILINEAR)
    assert warped.tobytes() == expected.tobytes() and image.tobytes() == before


@pytest.mark.parametrize('size', [(640, 480), (40, 30)])
def test_warp_without_antialiasing_is_plain_bilinear_interpolation(size):
    image = noise(*size)
    warped = pil_to_tensor(utils.warp(image, (0, 0, *size), antialias=False))
    expected = F.interpolate(pil_to_tensor(image).unsqueeze(0).float(), (300, 300), mode='bilinear')
    # Pillow rounds the levels.
    torch.testing.assert_close(warped.unsqueeze(0).float(), expected, rtol=0, atol=1.02)
    border = utils.warp(Image.new('RGB', size, 'red'), (-10, 0, *size), antialias=False)
    assert border.getpixel((299, 150)) == (255, 0, 0) and border.getpixel((0, 150)) == FILLER


@pytest.mark.parametrize('window, span', [
    ((-10, -10, 20, 20), (100, 100, 200, 200)),
    ((0, -30, 30, 30), (0, 150, 100, 200)),
    ((-5, 0, 5, 10), (150, 0, 300, 300)),        # part of the image, past its left border
    ((5, 5, 15, 20), (0, 0, 150, 100)),          # past two borders
    ((2, 3, 8, 9), (0, 0, 300, 300)),
    ((20, 0, 30, 10), (0, 0, 0, 0)),             # outside the image
])
def test_window_outside_the_image_is_filled_with_the_mean(window, span):
    result = pil_to_tensor(utils.warp(Image.new('RGB', (10, 10), (255, 0, 0)), window))
    expected = torch.tensor(FILLER, dtype=torch.uint8).view(3, 1, 1).repeat(1, 300, 300)
    left, top, right, bottom = span
    expected[:, top:bottom, left:right] = torch.tensor([255, 0, 0]).view(3, 1, 1)
    assert torch.equal(result, expected)


def test_colors_of_the_filler_are_not_changed():
    sizes = []

    def change(part):
        sizes.append(part.size)
        return Image.new('RGB', part.size, (1, 2, 3))
    result = utils.warp(noise(20, 10), (-20, -10, 40, 20), change)
    assert sizes == [(100, 100)]
    assert result.getpixel((150, 150)) == (1, 2, 3) and result.getpixel((99, 99)) == FILLER


# --------------------------------------------------------------------------------------------------
# Random sampling
# --------------------------------------------------------------------------------------------------


def test_zoom_out_is_1_to_4_times_the_image_at_any_place():
    zooms, places = [], []
    for _ in range(500):
        x_min, y_min, x_max, y_max = utils.sample_zoom_out(200, 100)
        zooms.append((x_max - x_min) / 200)
        assert (y_max - y_min) / 100 == pytest.approx(zooms[-1])
        assert x_min <= 0 and y_min <= 0 and x_max >= 200 - 1e-9 and y_max >= 100 - 1e-9
        places.append(-x_min / (x_max - x_min - 200))
    assert 1 <= min(zooms) < 1.2 and 3.8 < max(zooms) <= 4
    assert 0 <= min(places) < 0.1 and 0.9 < max(places) <= 1


WINDOWS = [(0, 0, 200, 120), (-150, -60, 250, 190), (-20, -80, 90, 110)]


@pytest.mark.parametrize('min_overlap', [0., 0.1, 0.3, 0.5, 0.7, 0.9])
@pytest.mark.parametrize('window', WINDOWS)
def test_crop_keeps_an_object_of_the_minimum_iou(min_overlap, window, monkeypatch):
    monkeypatch.setattr(utils, 'CROP_OPTIONS', (min_overlap,))
    x_min, y_min, x_max, y_max = window
    width, height = x_max - x_min, y_max - y_min
    # An object that can reach the minimum of each option, and small ones: a crop that keeps only
    # these must not count as one that overlaps the large one enough.
    boxes = (torch.tensor([[.02, .02, .98, .98], [.1, .1, .15, .15], [.85, .85, .9, .9]])
             * torch.tensor([width, height] * 2) + torch.tensor([x_min, y_min] * 2))
    for _ in range(24):
        crop = utils.sample_crop(window, boxes)
        sides = crop[2] - crop[0], crop[3] - crop[1]
        for low, high, side, whole in zip(crop[:2], crop[2:], sides, (width, height)):
            assert 0.3 - 1e-6 <= side / whole <= 1 + 1e-6 and low < high
        assert 0.5 - 1e-6 <= sides[0] / sides[1] <= 2 + 1e-6
        assert crop[0] >= x_min - 1e-6 and crop[2] <= x_max + 1e-6
        assert crop[1] >= y_min - 1e-6 and crop[3] <= y_max + 1e-6
        crop = torch.tensor([crop])
        centers = (boxes[:, :2] + boxes[:, 2:]) / 2
        inside = ((centers > crop[:, :2]) & (centers < crop[:, 2:])).all(dim=1)
        overlap = utils.find_jaccard_overlap(crop, boxes)[0]
        assert (inside & (overlap >= min_overlap)).any()


def test_crops_of_all_options_are_drawn(monkeypatch):
    assert set(utils.CROP_OPTIONS) == {None, 0., 0.1, 0.3, 0.5, 0.7, 0.9}
    window, boxes = (0, 0, 100, 100), torch.tensor([[20., 20., 80., 80.]])
    crops = [utils.sample_crop(window, boxes) for _ in range(300)]
    assert 20 < sum(crop == window for crop in crops) < 80      # a seventh is 43
    monkeypatch.setattr(utils, 'CROP_OPTIONS', (None,))
    assert utils.sample_crop(window, boxes) == window


def test_another_option_is_drawn_if_no_crop_reaches_the_minimum(monkeypatch):
    monkeypatch.setattr(utils, 'CROP_OPTIONS', (0.9, None))
    boxes = torch.tensor([[10., 10., 12., 12.]])                # no crop overlaps it by 0.9
    assert utils.sample_crop((0, 0, 100, 100), boxes) == (0, 0, 100, 100)


def test_probability_and_range_of_color_changes():
    drawn = [utils.sample_colors() for _ in range(1000)]
    for name, low, high in (('brightness', -32, 32), ('contrast', 0.5, 1.5),
                            ('saturation', 0.5, 1.5), ('hue', -18, 18)):
        values = [colors[name] for colors in drawn]
        changed = [value for value in values if value != SAME[name]]
        assert 420 < len(changed) < 580
        spread = (high - low) / 20
        assert low <= min(changed) < low + spread and high - spread < max(changed) <= high
    assert 420 < sum(colors['contrast_first'] for colors in drawn) < 580


# --------------------------------------------------------------------------------------------------
# Colors
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('color, change, expected', [
    ((10, 100, 250), {'brightness': 20}, (30, 120, 255)),
    ((10, 100, 250), {'brightness': -20}, (0, 80, 230)),
    ((10, 100, 250), {'contrast': 0.5}, (5, 50, 125)),
    ((10, 100, 250), {'contrast': 1.5, 'contrast_first': False}, (15, 150, 255)),
    ((40, 100, 40), {'brightness': 20, 'contrast': 0.5}, (30, 60, 30)),
    ((40, 100, 40), {'brightness': 20, 'contrast': 0.5, 'contrast_first': False}, (30, 60, 30)),
    ((250, 250, 250), {'brightness': 32, 'contrast': 0.5}, (128, 128, 128)),
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
def test_colors_of_worked_examples(color, change, expected):
    image = Image.new('RGB', (4, 4), color)
    changed = utils.distort(image, **{**SAME, **change})
    assert changed.size == (4, 4) and changed.mode == 'RGB'
    assert all(abs(a - b) <= 4 for a, b in zip(changed.getpixel((1, 2)), expected))
    assert image.getpixel((1, 2)) == color


@pytest.mark.parametrize('contrast_first', [True, False])
def test_neutral_color_changes_are_the_identity(contrast_first):
    image = noise(20, 20)
    unchanged = utils.distort(image, **{**SAME, 'contrast_first': contrast_first})
    assert unchanged.tobytes() == image.tobytes()


def test_training_does_not_change_the_colors_of_the_filler(monkeypatch):
    monkeypatch.setattr(utils, 'sample_colors', lambda: {**SAME, 'brightness': 32.})
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
# transform()
# --------------------------------------------------------------------------------------------------


def test_images_for_evaluation_are_warped_and_keep_all_objects():
    image = noise(100, 40)
    boxes, labels, difficulties = objects_of((0., 0., 100., 40.), (50., 10., 50.1, 10.1),
                                             (99., 39., 100., 40.))
    difficulties[1] = True
    warped, fractions, *rest = transform(image, boxes, labels, difficulties, 'TEST')
    expected = image.resize((300, 300), Image.Resampling.BILINEAR)
    assert torch.equal(warped, pil_to_tensor(expected))
    assert torch.allclose(fractions * torch.tensor([100., 40., 100., 40.]), boxes)
    assert torch.equal(rest[0], labels) and torch.equal(rest[1], difficulties)


def painted_box(image, channel):
    """Return the box of the red (0) or blue (2) pixels in (3, 300, 300), in pixels."""
    # The threshold is the middle between the black background, or the filler, and the color.
    painted = image[channel].int() - image[2 - channel] > 127
    rows, columns = painted.any(dim=1).nonzero(), painted.any(dim=0).nonzero()
    return [columns.min().item(), rows.min().item(), columns.max().item() + 1,
            rows.max().item() + 1]


@pytest.mark.parametrize('size', [(160, 120), (90, 200)])
@pytest.mark.parametrize('split, n_seeds', [('TEST', 1), ('TRAIN', 120)])
def test_boxes_enclose_the_pixels_of_their_objects(size, split, n_seeds, same_colors):
    width, height = size
    boxes, labels, _ = objects_of(
        (width * 0.1, height * 0.15, width * 0.4, height * 0.6),
        (width * 0.5, height * 0.3, width * 0.9, height * 0.95))
    difficulties = torch.tensor([False, True])
    image = Image.new('RGB', size)
    for box, color in zip(boxes.tolist(), ((255, 0, 0), (0, 0, 255))):
        image.paste(color, tuple(round(corner) for corner in box))
    n_kept = {1: 0, 2: 0}
    for number in range(n_seeds):
        random.seed(number)
        result = transform(image, boxes, labels, difficulties, split)
        for box, label, difficult in zip(*(values.tolist() for values in result[1:])):
            pixels = painted_box(result[0], channel=2 * label - 2)
            assert all(abs(300 * a - b) <= 2 for a, b in zip(box, pixels)), (number, box, pixels)
            assert difficult == (label == 2)
            n_kept[label] += 1
    assert min(n_kept.values()) > 0.4 * n_seeds


def test_flip_and_zoom_out_have_probability_one_half(same_colors, monkeypatch):
    monkeypatch.setattr(utils, 'CROP_OPTIONS', (None,))
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


def test_augmented_boxes_are_valid_and_at_least_one_is_kept():
    boxes, labels, difficulties = objects_of(
        (0., 0., 90., 60.), (30., 10., 50., 50.), (80., 50., 90., 60.), (40., 20., 41., 21.))
    image = noise(90, 60)
    counts = set()
    for number in range(200):
        random.seed(number)
        result, *objects = transform(image, boxes, labels, difficulties, 'TRAIN')
        new_boxes, new_labels, new_difficulties = objects
        assert (result.shape, result.dtype) == ((3, 300, 300), torch.uint8)
        assert new_boxes.isfinite().all() and (new_boxes >= 0).all() and (new_boxes <= 1).all()
        assert (new_boxes[:, 2:] - new_boxes[:, :2] >= 1 / 300 - 1e-6).all()
        assert len(new_boxes) == len(new_labels) == len(new_difficulties) >= 1
        assert len(set(new_labels.tolist())) == len(new_labels)
        assert new_boxes.dtype == torch.float32 and new_labels.dtype == torch.int64
        counts.add(len(new_boxes))
    assert {1, 4} <= counts


@pytest.mark.parametrize('box', [(500., 100., 502.2, 200.), (5., 3., 7., 3.8)], ids=str)
def test_zoom_out_that_would_drop_all_objects_is_not_done(box, same_colors):
    # The objects are a little larger than 1 of the 300 pixels: any zoom-out makes them smaller.
    size = (600, 300) if box[0] > 100 else (20, 200)
    for number in range(60):
        random.seed(number)
        image, boxes, _, _ = transform(Image.new('RGB', size), *objects_of(box), 'TRAIN')
        assert len(boxes) == 1


def test_object_under_a_pixel_is_dropped_unless_a_crop_enlarges_it(monkeypatch):
    image, tiny = Image.new('RGB', (600, 600)), objects_of((100., 100., 101., 300.))
    for number in range(60):
        random.seed(number)
        boxes = transform(image, *tiny, 'TRAIN')[1]
        assert ((boxes[:, 2:] - boxes[:, :2]) >= 1 / 300 - 1e-6).all()
    monkeypatch.setattr(utils, 'CROP_OPTIONS', (None,))
    assert transform(image, *tiny, 'TRAIN')[1].shape == (0, 4)


@pytest.mark.parametrize('size', [(64, 48), (1, 1), (3, 500), (700, 2)])
def test_images_of_extreme_sizes_and_without_objects(size):
    for number in range(10):
        random.seed(number)
        image, *objects = transform(noise(*size), *objects_of(), 'TRAIN')
        assert image.shape == (3, 300, 300)
        assert [tuple(tensor.shape) for tensor in objects] == [(0, 4), (0,), (0,)]
        image, boxes, _, _ = transform(noise(*size), *objects_of((0., 0., *size)), 'TRAIN')
        assert image.shape == (3, 300, 300) and len(boxes) == 1


def test_result_depends_on_the_seed_of_random_alone():
    image, objects = noise(60, 40), objects_of((5., 5., 30., 30.), (20., 10., 55., 35.))

    def draw(number, torch_seed):
        random.seed(number)
        torch.manual_seed(torch_seed)
        state = torch.get_rng_state()
        results = [transform(image, *objects, 'TRAIN') for _ in range(5)]
        assert torch.equal(torch.get_rng_state(), state)
        return [tensor for result in results for tensor in result]

    def are_equal(tensors, others):
        return all(torch.equal(a, b) for a, b in zip(tensors, others))
    assert are_equal(draw(1, 1), draw(1, 2))
    assert not are_equal(draw(1, 1), draw(2, 1))


@pytest.mark.parametrize('split', ['TRAIN', 'TEST'])
def test_arguments_are_not_modified(split):
    image, objects = noise(60, 40), objects_of((5., 5., 30., 30.), (20., 10., 55., 35.))
    pixels, before = image.tobytes(), [tensor.clone() for tensor in objects]
    for number in range(30):
        random.seed(number)
        transform(image, *objects, split)
        assert image.tobytes() == pixels and image.size == (60, 40)
        assert all(torch.equal(a, b) for a, b in zip(objects, before))


def test_split_is_train_or_test():
    with pytest.raises(AssertionError, match="'train'"):
        transform(noise(8, 8), *objects_of(), 'train')


def test_warped_image_of_any_size_has_no_filler():
    for side in [*range(1, 700), 1000, 1023, 4032]:
        for size in ((side, 300), (300, side)):
            result = utils.warp(Image.new('RGB', size, 'black'), (0, 0, *size))
            assert result.getextrema() == ((0, 0),) * 3, size
