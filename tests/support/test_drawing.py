"""Drawing: boxes and labels are where they belong, and labels can be read."""

import pytest
import torch
from PIL import Image

from support.drawing import draw_objects, place_labels

RED, BLUE = (255, 0, 0), (0, 0, 255)


def draw(size, boxes, labels, colors):
    """Draw boxes of falling score onto a gray image; returns it."""
    image = Image.new('RGB', size, 'gray')
    scores = torch.linspace(.9, .5, len(boxes))
    draw_objects(image, {'boxes': torch.tensor(boxes), 'labels': labels, 'scores': scores}, colors)
    return image


def count(image, color):
    """Count the pixels of a color."""
    return sum(n for n, value in image.getcolors(100_000) if value == color)


def test_box_is_drawn_at_its_edges():
    image = draw((200, 150), [[50., 60., 120., 130.]], ['dog'], {'dog': '#ff0000'})
    for corner in ((50, 60), (119, 60), (50, 129), (119, 129)):
        assert image.getpixel(corner) == RED
    for outside in ((49, 100), (120, 100), (80, 130), (80, 100)):
        assert image.getpixel(outside) == (128, 128, 128)


def test_label_stays_inside_the_image():
    boxes = [[250., 0, 300, 40], [0., 150, 30, 200]]
    image = draw((300, 200), boxes, ['diningtable', 'tvmonitor'],
                 {'diningtable': '#ff0000', 'tvmonitor': '#0000ff'})
    assert count(image.crop((180, 40, 250, 52)), RED) > 100, 'not moved to the left of the box'
    # In an image with room to the right, the label is whole: as many pixels have its color here.
    wide = draw((500, 200), boxes, ['diningtable', 'tvmonitor'],
                {'diningtable': '#ff0000', 'tvmonitor': '#0000ff'})
    labels = [picture.crop((0, 41, picture.width, 54)) for picture in (image, wide)]
    assert count(labels[0], RED) == pytest.approx(count(labels[1], RED), abs=40)


def test_no_box_crosses_a_label():
    """The upper edge of the larger box passes through the other box's label."""
    boxes = [[20., 30., 180., 140.], [100., 37., 150., 100.]]
    colors = {'dog': '#ff0000', 'cat': '#0000ff'}
    image = draw((200, 150), boxes, ['dog', 'cat'], colors)
    assert image.getpixel((101, 30)) == BLUE and image.getpixel((90, 30)) == RED


def test_labels_of_equal_boxes_do_not_cover_each_other_and_the_more_confident_box_is_on_top():
    boxes = [[50., 60., 120., 130.]] * 2
    colors = {'dog': '#ff0000', 'cat': '#0000ff'}
    for labels, color, other in ((['dog', 'cat'], RED, BLUE), (['cat', 'dog'], BLUE, RED)):
        image = draw((200, 150), boxes, labels, colors)
        assert image.getpixel((50, 50)) == image.getpixel((50, 100)) == color
        assert image.getpixel((51, 131)) == other, 'not below the box'


def test_labels_avoid_boxes_and_stay_inside():
    """A dog whose label would cover a cat above it, and one at the upper border."""
    boxes = torch.tensor([[50., 60, 120, 130], [40., 30, 130, 58], [150., 2, 190, 50]])
    places = place_labels(boxes, [(60, 13)] * 3, (200, 150))
    assert places == [(50, 130), (40, 17), (140, 50)]


def test_labels_choose_the_place_that_covers_least():
    """In a box that fills the image all places cover it; the other box decides."""
    boxes = torch.tensor([[0., 0, 200, 150], [0., 0, 100, 20]])
    assert place_labels(boxes, [(60, 13)], (200, 150)) == [(140, 0)]


def test_text_contrasts_with_its_label():
    for color, is_bright in (('#0000ff', False), ('#ffff00', True)):
        image = draw((200, 150), [[10., 60., 120., 130.]], ['dog'], {'dog': color})
        darkest, brightest = image.crop((10, 48, 40, 60)).getextrema()[0]   # of red, in the label
        assert darkest < 100 and brightest == 255 if is_bright else brightest > 150


def test_nothing_is_drawn_without_objects():
    empty = {'boxes': torch.zeros(0, 4), 'labels': [], 'scores': torch.zeros(0)}
    image = Image.new('RGB', (20, 20))
    draw_objects(image, empty, {})
    assert image.getcolors() == [(400, (0, 0, 0))]
