"""Draw the pictures of the README's tutorial, from the code that they explain.

    python -m tools.figures

Priors, matches, losses, crops, suppression, learning rate and average precision come from the
functions that training and detection call, so the pictures agree with the code. They follow one
image, `tools/example.py`. Each is drawn for light and for dark pages (folder dark/). The same
version of matplotlib draws the same bytes.

Letters: P = 8732 priors, C classes with background 0, O objects in an image.
"""

import dataclasses
import math
import pathlib
import random
from fractions import Fraction

import torch
import torch.nn.functional as F
import tyro
from matplotlib.patches import Rectangle
from PIL import Image

import train
from model import (
    FEATURE_MAPS,
    N_PRIORS,
    SSD300,
    VISUALIZATION,
    MultiBoxLoss,
    create_prior_boxes,
    decimate,
)
from support.errors import exit_on_user_error, make_folder
from support.training_log import read_log
from tools.canvas import (
    DARK,
    LIGHT,
    ORANGE,
    OVERLAYS,
    RIM,
    SKY,
    create_canvas,
    create_figure,
    draw_arrow,
    draw_box,
    draw_grid,
    label_boxes,
    page_style,
    save,
    show,
)
from tools.example import (
    LABEL_MAP,
    count_iterations,
    draw_example,
    find_hard,
    load_example,
    load_output,
    to_tensors,
)
from utils import (
    average_precision,
    crop,
    cxcy_to_gcxgcy,
    cxcy_to_xy,
    distort,
    find_intersection,
    find_jaccard_overlap,
    flip,
    transform,
    warp,
    xy_to_cxcy,
)


@dataclasses.dataclass
class Parameters:
    """Draw the pictures of the README."""

    # Folder for the pictures.
    output_folder: str = './img'
    # The log.csv of a training run, for training_curves.png; if it does not exist, that picture is
    # left out.
    log: str = './img/bccd_log.csv'


NAMES = list(LABEL_MAP)
STAR_BEHIND, TRIANGLE, STAR, CIRCLE = range(4)      # the objects of the example


def to_array(image):
    """Convert an image (3, 300, 300) to an array (300, 300, 3)."""
    return image.permute(1, 2, 0).numpy()


def show_example(axes, margin=0.):
    """Show the example as the network sees it, 300 x 300, with coordinates from 0 to 1."""
    show(axes, to_array(load_example()[0]), margin)


def make_meta_model():
    """Create an SSD300 without memory for its weights: it has shapes, and real priors."""
    with torch.device('meta'):
        model = SSD300(len(LABEL_MAP))
    model.priors_cxcy = create_prior_boxes()
    return model


def count_rows():
    """Return the number of priors of each feature map: rows in the output of the network."""
    return [feature_map.size ** 2 * feature_map.n_priors_per_cell for feature_map in FEATURE_MAPS]


def select_priors(name):
    """Return the priors of one feature map: (size, size, priors per cell, 4), center and size."""
    index = [feature_map.name for feature_map in FEATURE_MAPS].index(name)
    size = FEATURE_MAPS[index].size
    return create_prior_boxes().split(count_rows())[index].view(size, size, -1, 4)


def name_map(prior):
    """Return the name of the feature map that a prior belongs to, by its index."""
    names = [feature_map.name for feature_map in FEATURE_MAPS]
    ends = torch.tensor(count_rows()).cumsum(0)
    return names[int((prior >= ends).sum())]


def name_ratios(feature_map):
    """Name the priors of a cell, in their order: '1 : 1', the additional square, '2 : 1', ..."""
    ratios = [Fraction(ratio).limit_denominator(10) for ratio in feature_map.aspect_ratios]
    names = [f'{ratio.numerator} : {ratio.denominator}' for ratio in ratios]
    return [names[0], f'{names[0]}, additional', *names[1:]]


# --------------------------------------------------------------------------------------------------
# The example and the network
# --------------------------------------------------------------------------------------------------


def detect_in_example(max_overlap):
    """Detect objects in the trained network's output for the example: boxes, labels, scores.

    Args:
        max_overlap: of non-maximum suppression; 1 keeps all boxes, as no IoU is above it.
    """
    thresholds = VISUALIZATION | {'max_overlap': max_overlap}
    detections = make_meta_model().detect_objects(*load_output('trained'), **thresholds)
    return [tensors[0] for tensors in detections]


def draw_detections(axes, boxes, labels, scores):
    """Draw the detections in the example, with class and score."""
    show_example(axes)
    for box, label in zip(boxes, labels):
        draw_box(axes, box, OVERLAYS[label])
    texts = [f'{NAMES[label]} {score:.2f}' for label, score in zip(labels, scores)]
    label_boxes(axes, torch.cat([boxes, load_example()[1]]), texts)


def draw_example_picture(colors):
    """Draw the objects of the example, and what the trained network detects in it."""
    figure, (left, right) = create_figure(4.5, 1, 2)
    _, boxes, labels, difficulties = load_example()
    show_example(left)
    for box in boxes:
        draw_box(left, box, 'white')
    label_boxes(left, boxes, [NAMES[label] + difficult * ', difficult'
                              for label, difficult in zip(labels, difficulties)])
    left.set_title(f'ground truth: {len(boxes)} objects')
    detections = detect_in_example(VISUALIZATION['max_overlap'])
    draw_detections(right, *detections)
    right.set_title(f'{len(detections[0])} detections')
    return figure


def feature_map_shapes():
    """Find the shapes (channels, size, size) of the six maps that reach the prediction layers."""
    model, shapes = make_meta_model(), []
    model.pred_convs.register_forward_pre_hook(
        lambda _, maps: shapes.extend(tuple(feature_map.shape[1:]) for feature_map in maps))
    model(torch.zeros(1, 3, 300, 300, device='meta'))
    return shapes


def draw_network(colors):
    """Draw the image, the six feature maps, the prediction convolutions, and their two outputs."""
    figure, axes = create_canvas(9.3)
    for x, text in ((4.5, '3 × 3\nfilters'), (6.05, 'rows of\nlocs'), (7.25, 'rows of\nscores')):
        axes.text(x, 1.75, text, ha='center', va='bottom', weight='bold')
    axes.imshow(to_array(load_example()[0]), extent=(0.3, 1.7, 1.75, 0.35), aspect='auto')
    axes.text(1.95, 1.05, 'image\n3, 300 × 300', va='center')
    bottom, top, first = 1.75, 1.95, 0
    for feature_map, n_rows, shape in zip(FEATURE_MAPS, count_rows(), feature_map_shapes()):
        size, color = shape[1], colors.red if '_2' in feature_map.name else colors.blue
        side = 0.22 * math.sqrt(size)
        height = max(side + 0.3, 0.86)
        middle = top + height / 2
        draw_arrow(axes, (1, bottom), (1, middle - side / 2), colors.gray, shrinkA=2, shrinkB=0)
        draw_grid(axes, 1 - side / 2, middle - side / 2, side, size, color, colors.paper)
        axes.text(1.95, middle - 0.15, feature_map.name, color=color, weight='bold', va='center')
        axes.text(1.95, middle + 0.15, f'{shape[0]}, {size} × {size}', va='center')
        draw_prediction(axes, middle, height, feature_map.n_priors_per_cell,
                        f'{first} …\n{first + n_rows - 1}', colors)
        bottom, top, first = middle + side / 2, top + height, first + n_rows
    assert first == N_PRIORS, f'{first} rows, not {N_PRIORS}'
    axes.text(0.25, top + 0.4, 'base (VGG-16)', color=colors.blue, va='center')
    axes.text(2.3, top + 0.4, 'auxiliary', color=colors.red, va='center')
    for x, text, color in ((6.05, f'{N_PRIORS} × 4', colors.green),
                           (7.25, f'{N_PRIORS} × C', colors.orange)):
        axes.text(x, top + 0.4, text, ha='center', va='center', fontsize=15, color=color)
    return figure


def draw_prediction(axes, middle, height, n_priors, rows, colors):
    """Draw the two prediction convolutions of a feature map, and their rows of the outputs.

    Args:
        middle, height: of the map's part of the picture.
        n_priors: priors per cell.
        rows: the first and the last row.
    """
    draw_arrow(axes, (3.57, middle), (3.9, middle), colors.gray, shrinkA=0, shrinkB=0)
    draw_arrow(axes, (5.1, middle), (5.48, middle), colors.gray, shrinkA=0, shrinkB=0)
    for y, x, numbers, color in ((middle - 0.18, 6.05, '4', colors.green),
                                 (middle + 0.18, 7.25, 'C', colors.orange)):
        axes.add_patch(Rectangle((3.95, y - 0.16), 1.1, 0.32, fill=False, edgecolor=color,
                                 linewidth=2))
        axes.text(4.5, y, f'{n_priors} × {numbers}', ha='center', va='center')
        axes.add_patch(Rectangle((x - 0.53, middle - height / 2), 1.06, height, facecolor=color,
                                 edgecolor=colors.paper, linewidth=2))
        axes.text(x, middle, rows, ha='center', va='center', color=colors.paper)


def draw_fc_to_conv(colors):
    """Draw the 7 x 7 kernel of fc6, its decimation, and the dilated kernel of conv6, to scale."""
    conv6 = make_meta_model().base.conv6
    kept = decimate(torch.arange(49).view(7, 7), (3, 3)).flatten().tolist()
    dilation, n_kept = conv6.dilation[0], conv6.kernel_size[0]
    reach = dilation * (n_kept - 1) + 1
    spread = [row * dilation * reach + column * dilation
              for row in range(n_kept) for column in range(n_kept)]
    figure, axes = create_canvas(4.3)
    # fc6 follows five poolings that halve the map, conv6 four: their cells are 32 and 16 pixels.
    panels = ((7, 32, range(49), colors.blue, 'fc6', '4096 filters, 7 × 7\ncells of 32 pixels'),
              (7, 32, kept, colors.blue, 'decimated', 'every 3rd cell,\nevery 4th filter'),
              (reach, 16, spread, colors.red, 'conv6',
               f'{conv6.out_channels} filters, {n_kept} × {n_kept}\ncells of 16 pixels,\n'
               f'dilation {dilation}'))
    for x, (n, pixels, filled, color, title, text) in zip((0.3, 2.95, 5.65), panels):
        side = n * pixels / 106
        draw_grid(axes, x, 0.75, side, n, color, colors.paper, filled)
        axes.text(x + side / 2, 0.45, title, weight='bold', ha='center', color=color)
        axes.text(x + side / 2, 3.05, text, ha='center', va='top', linespacing=1.3)
    for x in (2.42, 5.07):
        draw_arrow(axes, (x, 1.8), (x + 0.52, 1.8), colors.gray, shrinkA=4, shrinkB=4)
    return figure


# --------------------------------------------------------------------------------------------------
# Boxes and priors
# --------------------------------------------------------------------------------------------------


def draw_overlap(colors):
    """Draw intersection and union of the boxes of the example's two stars, in pixels."""
    image, objects = draw_example()
    boxes = to_tensors(objects)[0][[STAR_BEHIND, STAR]]
    intersection = find_intersection(boxes, boxes)[0, 1]
    union = (boxes[:, 2:] - boxes[:, :2]).prod(dim=1).sum() - intersection
    iou = find_jaccard_overlap(boxes, boxes)[0, 1]
    intersection_box = torch.cat([boxes[:, :2].amax(dim=0), boxes[:, 2:].amin(dim=0)])[None]

    figure, panels = create_figure(4.6, 1, 2)
    for axes, title, lit in ((panels[0], f'intersection: {intersection:.0f}', intersection_box),
                             (panels[1], f'union: {union:.0f}', boxes)):
        axes.imshow(image, extent=(0, image.width, image.height, 0))
        axes.set(xlim=(172, 283), ylim=(256, 153), title=title)
        axes.axis('off')
        shade = torch.full((image.height, image.width), 0.6)     # on all but the lit area
        for x_min, y_min, x_max, y_max in lit.int().tolist():
            shade[y_min:y_max, x_min:x_max] = 0
        axes.imshow(0 * shade.numpy(), extent=(0, image.width, image.height, 0),
                    alpha=shade.numpy(), cmap='gray', interpolation='none')
        for box, color in zip(boxes, (ORANGE, SKY)):
            draw_box(axes, box, color, 4)
    figure.supxlabel(f'IoU = {intersection:.0f} / {union:.0f} = {iou:.2f}', weight='bold',
                     color=colors.ink, fontsize=20)
    return figure


def draw_priors_of_a_cell(colors):
    """Draw the six priors of the middle cell of conv9_2, named by their aspect ratios."""
    feature_map = next(feature_map for feature_map in FEATURE_MAPS if feature_map.name == 'conv9_2')
    priors = select_priors(feature_map.name)[2, 2]
    figure, (left, right) = create_figure(4.5, 1, 2, width_ratios=(3, 2))
    show_example(left, margin=0.01)
    for box, color in zip(cxcy_to_xy(priors), OVERLAYS):
        draw_box(left, box, color, 4)
    left.plot(0.5, 0.5, 'o', color='white', markersize=10, markeredgecolor=RIM)
    right.axis('off')
    right.set(xlim=(0, 1), ylim=(7, 0))
    right.text(0, 0.3, 'width : height', weight='bold', va='center')
    for row, (name, color) in enumerate(zip(name_ratios(feature_map), OVERLAYS), 1):
        right.hlines(row + 0.3, 0, 0.14, color=color, linewidth=8)
        right.text(0.22, row + 0.3, name, va='center')
    return figure


def draw_priors_of_a_map(colors):
    """Draw the cells of two feature maps, their centers, and the priors of one cell of each."""
    figure, panels = create_figure(4.3, 1, 2)
    for axes, name, row, column in zip(panels, ('conv8_2', 'conv9_2'), (2, 2), (6, 1)):
        priors = select_priors(name)
        size = len(priors)
        show_example(axes)
        axes.set(xlim=(-0.2, 1.04), ylim=(1.02, -0.1))
        lines = [i / size for i in range(size + 1)]
        axes.vlines(lines, 0, 1, color='white', linewidth=0.8)
        axes.hlines(lines, 0, 1, color='white', linewidth=0.8)
        centers = priors[:, :, 0, :2].reshape(-1, 2)
        axes.plot(*centers.T.tolist(), 'o', color='white', markersize=4)
        for box in cxcy_to_xy(priors[row, column]):
            draw_box(axes, box, ORANGE, 2.5)
        axes.plot(*priors[row, column, 0, :2].tolist(), 'o', color=ORANGE, markersize=10,
                  markeredgecolor=RIM)
        axes.set_title(f'{name}: {size} × {size} cells')
    return figure


def explain_offsets(box, prior):
    """Split the offsets from a prior to a box into what they measure and their factors.

    Args:
        box, prior: (4,), center and size.

    Returns:
        Three lists of four: offsets without factors, factors, encoded offsets.
    """
    unscaled = torch.cat([(box[:2] - prior[:2]) / prior[2:], (box[2:] / prior[2:]).log()])
    locs = cxcy_to_gcxgcy(box, prior)
    return unscaled.tolist(), (locs / unscaled).tolist(), locs.tolist()


def draw_offsets(colors):
    """Draw a prior, an object, and the four offsets between them."""
    _, boxes, labels, _ = load_example()
    matched, _, _ = match(boxes, labels)
    box, priors = xy_to_cxcy(boxes[CIRCLE]), create_prior_boxes()[matched[CIRCLE]]
    # Of the object's positive priors, the one whose offsets are best visible.
    prior = priors[cxcy_to_gcxgcy(box, priors).abs().amin(dim=1).argmax()]

    figure, (left, right) = create_figure(4.3, 1, 2)
    show_example(left)
    left.set(xlim=(0.22, 0.68), ylim=(0.87, 0.41))      # where they are
    draw_box(left, cxcy_to_xy(prior), SKY, 4, linestyle='--')
    draw_box(left, boxes[CIRCLE], ORANGE, 4)
    left.plot(*prior[:2].tolist(), 'o', color=SKY, markersize=9)
    left.plot(*box[:2].tolist(), 'o', color=ORANGE, markersize=9)
    right.axis('off')
    right.set(xlim=(0, 10), ylim=(8, 0))
    right.text(0, 0.6, '- - prior', color=colors.blue, weight='bold')
    right.text(5.2, 0.6, '— object', color=colors.orange, weight='bold')
    rows = zip(('shift x / prior width', 'shift y / prior height',
                'log(width / prior width)', 'log(height / prior height)'),
               *explain_offsets(box, prior))
    for y, (name, unscaled, factor, loc) in enumerate(rows):
        y = 2. + 1.65 * y
        right.text(0, y, name)
        right.text(0, y + 0.75, f'{unscaled:+.3f} × {factor:.0f} =', color=colors.gray)
        right.text(7.8, y + 0.75, f'{loc:+.2f}', weight='bold', ha='right', fontsize=20)
    return figure


# --------------------------------------------------------------------------------------------------
# Training
# --------------------------------------------------------------------------------------------------


def match(boxes, labels):
    """Match the priors to the objects of one image.

    Returns:
        matched (O, P) bool, the priors that are matched to each object; overlap (O, P), the IoU of
        objects and priors; true_classes (P,).
    """
    criterion = MultiBoxLoss(create_prior_boxes())
    true_locs, true_classes = criterion.match([boxes], [labels])
    locs = cxcy_to_gcxgcy(xy_to_cxcy(boxes).unsqueeze(1), criterion.priors_cxcy)    # (O, P, 4)
    matched = ((true_locs - locs).abs().amax(dim=2) < 1e-5) & (true_classes > 0)    # (O, P)
    return matched, find_jaccard_overlap(boxes, criterion.priors_xy), true_classes[0]


def draw_matching(colors):
    """Draw each positive prior of the triangle, and four priors that overlap both stars."""
    _, boxes, labels, _ = load_example()
    matched, overlap, _ = match(boxes, labels)
    priors = cxcy_to_xy(create_prior_boxes())
    n_matched = int(matched[TRIANGLE].sum())
    figure = create_figure(9.6)[0]
    figure.clear()
    figure.get_layout_engine().set(w_pad=0.04, h_pad=0.06)
    upper, lower = figure.subfigures(2, 1, height_ratios=(3, 1.25))
    upper.suptitle(f'the {n_matched} positive priors of the triangle, and their IoU', fontsize=16)
    best_first = overlap[TRIANGLE].masked_fill(~matched[TRIANGLE], 0).argsort(descending=True)
    panels = upper.subplots(3, 5).flatten()
    for axes in panels[n_matched:]:
        axes.remove()
    for axes, prior in zip(panels, best_first[:n_matched].tolist()):
        show_close_up(axes, boxes[TRIANGLE], 0.22)
        draw_box(axes, boxes[TRIANGLE], 'white', 2.5)
        name = name_map(prior)
        draw_box(axes, priors[prior], SKY if name == 'conv7' else ORANGE, 3.5)
        axes.set_title(f'{name}: {overlap[TRIANGLE, prior]:.2f}', fontsize=14)

    contested = (overlap[[STAR_BEHIND, STAR]] >= 0.5).all(dim=0).nonzero().flatten().tolist()
    lower.suptitle(f'four of {len(contested)} priors that reach 0.5 with both stars:\n'
                   'IoU with the left | right one, the matched one bold', fontsize=16)
    for axes, prior in zip(lower.subplots(1, 4), contested):
        show_close_up(axes, boxes[[STAR_BEHIND, STAR]].mean(dim=0), 0.22)
        for obj in (STAR_BEHIND, STAR):
            draw_box(axes, boxes[obj], 'white', 2.5 if matched[obj, prior] else 1)
        draw_box(axes, priors[prior], SKY, 3.5)
        both = [f'{overlap[obj, prior]:.2f}' for obj in (STAR_BEHIND, STAR)]
        axes.set_title(' | '.join(rf'$\bf{{{text}}}$' if matched[obj, prior] else text
                                  for obj, text in zip((STAR_BEHIND, STAR), both)), fontsize=14)
    return figure


def show_close_up(axes, box, radius):
    """Show a square part of the example around the center of a box (4,)."""
    show_example(axes)
    x, y = ((box[:2] + box[2:]) / 2).tolist()
    axes.set(xlim=(x - radius, x + radius), ylim=(y + radius, y - radius))


def draw_hard_negatives(colors):
    """Draw where the classification loss comes from: early in training, and at its end."""
    _, boxes, labels, _ = load_example()
    criterion = MultiBoxLoss(create_prior_boxes())
    _, true_classes = criterion.match([boxes], [labels])
    figure, panels = create_figure(5.5, 1, 2)
    for axes, name in zip(panels, ('early', 'trained')):
        locs, scores = load_output(name)
        loss = criterion(locs, scores, [boxes], [labels])
        cross_entropy = F.cross_entropy(scores[0], true_classes[0], reduction='none')   # (P,)
        hard = find_hard(scores, true_classes)[0]
        show_example(axes)
        for selected, color in ((true_classes[0] > 0, SKY), (hard, ORANGE)):
            draw_losses(axes, cross_entropy * selected, color)
        hardest = int((cross_entropy * hard).argmax())
        draw_box(axes, criterion.priors_xy[hardest], ORANGE, 2)
        label_boxes(axes, torch.cat([criterion.priors_xy[[hardest]], boxes]),
                    [f'{cross_entropy[hardest]:.2f}'])
        axes.set_title(f'after {count_iterations(name)} iterations:\nloss {loss:.2f}')
    figure.supxlabel(f'blue: {int((true_classes > 0).sum())} positives, orange: '
                     f'{int(hard.sum())} hard negatives\narea: cross entropy, box: the hardest '
                     'negative and its value', color=colors.ink)
    return figure


def draw_losses(axes, losses, color):
    """Draw a circle at the center of each prior (P,), with an area in proportion to its loss."""
    centers, cell = create_prior_boxes()[:, :2].unique(dim=0, return_inverse=True)
    sums = torch.zeros(len(centers)).index_add(0, cell, losses)
    axes.scatter(*centers.T.tolist(), s=(25 * sums).tolist(), color=color, alpha=0.75,
                 edgecolor=RIM, linewidth=0.8 * (sums > 0.01).float())


def augment(image, tensors, window=None, colors=None, mirror=False):
    """Augment an image in a given way, in the order of `transform()`.

    Args:
        tensors: boxes in pixels, labels, difficulties.
        window: (x_min, y_min, x_max, y_max) in pixels; None: the image.
        colors: arguments of `distort()` that are not neutral.
        mirror: whether to flip it.
    """
    window = window or (0, 0, *image.size)
    neutral = {'brightness': 0., 'contrast': 1., 'saturation': 1., 'hue': 0.,
               'contrast_first': True}
    boxes, _, _ = crop(*tensors, window)
    image = warp(image, window, lambda part: distort(part, **neutral | (colors or {})))
    if mirror:
        return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT), flip(boxes)
    return image, boxes


def draw_augmentation(colors):
    """Draw the original, each step of the augmentation, and all steps together, at random."""
    image, objects = draw_example()
    tensors = to_tensors(objects)
    tiles = {
        'original': {}, 'brightness': {'colors': {'brightness': 32.}},
        'contrast': {'colors': {'contrast': 0.5}}, 'saturation': {'colors': {'saturation': 0.5}},
        'hue': {'colors': {'hue': -18.}}, 'flip': {'mirror': True},
        'zoom-out × 2': {'window': (-230, -60, 410, 480)},
        'zoom-out × 4': {'window': (-300, -620, 980, 460)}}
    for window in ((60, 20, 310, 250), (170, 20, 310, 260), (85, 90, 285, 190),
                   (165, 145, 290, 255)):
        iou = find_jaccard_overlap(torch.tensor([window]).float(), tensors[0]).max()
        tiles[f'crop: IoU {iou:.2f}'] = {'window': window}
    figure, panels = create_figure(9.4, 4, 4)
    figure.get_layout_engine().set(w_pad=0.04, h_pad=0.04, wspace=0, hspace=0)
    results = [(title, *augment(image, tensors, **how)) for title, how in tiles.items()]
    state = random.getstate()
    for number in range(4):
        random.seed(f'figure {number}')
        augmented, boxes, _, _ = transform(image, *tensors, 'TRAIN')
        results.append((f'at random, {number + 1}', to_array(augmented), boxes))
    random.setstate(state)
    for axes, (title, augmented, boxes) in zip(panels.flat, results):
        show(axes, augmented)
        axes.set_title(title, fontsize=14, weight='bold' if title == 'original' else 'normal',
                       color=colors.blue if title == 'original' else colors.ink)
        for box in boxes:
            draw_box(axes, box, 'white', 1.8)
    return figure


def draw_learning_rate(colors):
    """Draw the learning rate over the iterations of the default schedule."""
    p = train.Parameters()
    figure, (first, whole) = create_figure(3.9, 1, 2, width_ratios=(4, 5))
    for axes, iterations in ((first, range(0, 2 * p.warmup, 10)),
                             (whole, range(0, p.iterations, 100))):
        rates = [train.get_lr(i, p.lr, p.warmup, p.decay_lr_at) for i in iterations]
        axes.plot([i / 1000 for i in iterations], rates, color=colors.blue, linewidth=3.5)
        axes.axvspan(0, p.warmup / 1000, color=colors.orange, alpha=0.3, linewidth=0)
        axes.grid()
    first.set(title='the first 2,000', xlim=(0, 2), xticks=(0, 1, 2), ylim=(0, 1.15 * p.lr),
              yticks=(0, p.lr / 2, p.lr))
    first.set_yticklabels(['0', f'{p.lr / 2:g}', f'{p.lr:g}'])
    first.text(0.5, 1.05 * p.lr, 'warm-up', ha='center', weight='bold', color=colors.orange)
    whole.set(title='all iterations', yscale='log', ylim=(p.lr / 200, 2 * p.lr),
              xlim=(0, None), xticks=[i / 1000 for i in (0, *p.decay_lr_at, p.iterations)])
    for drop in p.decay_lr_at:
        rate = train.get_lr(drop, p.lr, p.warmup, p.decay_lr_at)
        whole.text(drop / 1000 - 2, 1.4 * rate, '÷ 10', ha='right', color=colors.red, weight='bold')
    figure.supxlabel('iterations, in thousands')
    return figure


def draw_training_curves(colors, rows):
    """Draw losses, learning rate and mAP of a training run, from the rows of its log."""
    figure, (losses, rates, scores) = create_figure(7.6, 3, 1, sharex=True,
                                                    height_ratios=(3, 1.2, 2))
    iterations = [row['iteration'] for row in rows]
    for column, label, color in (('loss', 'loss', colors.ink),
                                 ('classes', 'classification', colors.blue),
                                 ('boxes', 'localization', colors.red)):
        losses.plot(iterations, [row[column] for row in rows], label=label, color=color)
    losses.set(title='loss', ylim=(0, None))
    losses.legend()
    rates.step(iterations, [row['rate'] for row in rows], color=colors.orange)
    rates.set(title='learning rate', yscale='log', ylim=(1e-5, 2e-3))
    rates.tick_params(which='minor', labelleft=False)
    evaluated = [row for row in rows if not math.isnan(row['mAP'])]
    scores.plot([row['iteration'] for row in evaluated], [row['mAP'] for row in evaluated], 'o-',
                color=colors.green, markersize=9 if len(evaluated) < 20 else 4)
    # As many points are labeled as there is room for, the last one always.
    labeled = math.inf
    for row in evaluated[::-1]:
        if labeled - row['iteration'] >= iterations[-1] / 9:
            labeled = row['iteration']
            scores.annotate(f'{row["mAP"]:.2f}', (labeled, row['mAP']),
                            (0, -26 if row['mAP'] > 0.3 else 12), textcoords='offset points',
                            ha='center' if row['mAP'] > 0.3 else 'right',
                            weight='bold' if row is evaluated[-1] else 'normal')
    scores.set(title='mAP', ylim=(0, 1.05), xlabel='iterations')
    for axes in (losses, rates, scores):
        axes.grid()
        axes.margins(x=0.06)
    return figure


# --------------------------------------------------------------------------------------------------
# Detection and evaluation
# --------------------------------------------------------------------------------------------------


def draw_nms(colors):
    """Draw the detections in the example before and after non-maximum suppression."""
    figure, (left, right) = create_figure(4.5, 1, 2)
    boxes, labels, _ = detect_in_example(max_overlap=1.)
    show_example(left)
    for box, label in zip(boxes, labels):
        draw_box(left, box, OVERLAYS[label], 1.2)
    left.set_title(f'before: {len(boxes)} boxes')
    detections = detect_in_example(VISUALIZATION['max_overlap'])
    draw_detections(right, *detections)
    right.set_title(f'after: {len(detections[0])} boxes')
    return figure


# The example by hand of the README: which of six detections, by falling score, are true positives
# and false positives, and the number of objects.
MATCHES = (torch.tensor([True, True, False, True, False, True]),
           torch.tensor([False, False, True, False, True, False]), 5)


def precision_recall_points(true_positive, false_positive, n_objects):
    """Calculate the curve of precision over recall, and its eleven points.

    Returns:
        Three lists: recall and precision after each detection, and the highest precision from the
        recalls 0, 0.1, ..., 1 on.
    """
    n_true = true_positive.cumsum(0)
    precision = n_true / (n_true + false_positive.cumsum(0)).clamp(min=1)
    points = [max(precision[10 * n_true >= tenth * n_objects].tolist(), default=0.)
              for tenth in range(11)]
    return (n_true / n_objects).tolist(), precision.tolist(), points


def draw_precision_recall(colors):
    """Draw precision over recall, and the eleven points whose mean is the AP."""
    recall, precision, points = precision_recall_points(*MATCHES)
    figure, axes = create_figure(5.2)
    axes.plot(recall, precision, 's-', color=colors.gray, label='after each of 6 detections')
    axes.plot([tenth / 10 for tenth in range(11)], points, 'o', color=colors.red, markersize=12,
              label='11 points', clip_on=False, zorder=3)
    axes.vlines([tenth / 10 for tenth in range(11)], 0, points, color=colors.red, linewidth=1.2)
    axes.set(xlabel='recall', ylabel='precision', xlim=(0, 1.02), ylim=(0, 1.05),
             title=f'AP = mean of 11 points = {average_precision(*MATCHES):.2f}')
    axes.legend(loc='lower left', framealpha=1)
    return figure


PICTURES = {
    'example': draw_example_picture, 'network': draw_network, 'fc_to_conv': draw_fc_to_conv,
    'overlap': draw_overlap, 'priors_of_a_cell': draw_priors_of_a_cell,
    'priors_of_a_map': draw_priors_of_a_map, 'offsets': draw_offsets, 'matching': draw_matching,
    'hard_negatives': draw_hard_negatives, 'augmentation': draw_augmentation,
    'learning_rate': draw_learning_rate, 'nms': draw_nms,
    'precision_recall': draw_precision_recall}


def draw_all(pictures, colors, folder):
    """Draw pictures for a page of given colors into a folder.

    Args:
        pictures: {name of the file: function that draws a figure}
    """
    make_folder(folder)
    with page_style(colors):
        for name, draw in pictures.items():
            save(draw(colors), folder / f'{name}.png', colors.paper)


@exit_on_user_error
def main(parameters):
    """Draw all pictures into the output folder, and those for dark pages into its folder dark."""
    folder = pathlib.Path(parameters.output_folder)
    pictures = dict(PICTURES)
    rows = read_log(pathlib.Path(parameters.log))
    if rows:
        pictures['training_curves'] = lambda colors: draw_training_curves(colors, rows)
    else:
        print(f'note: training_curves.png is left out: {parameters.log} has no rows')
    draw_all(pictures, LIGHT, folder)
    draw_all(pictures, DARK, folder / 'dark')
    print(f'{len(pictures)} pictures drawn in {folder}, for light and dark pages')


if __name__ == '__main__':
    main(tyro.cli(Parameters))
