"""Draw the pictures of the README's tutorial, from the code that they explain.

    python figures.py

Priors, matches, hard negatives, windows, suppression, rate and average precision come from the
functions that training and detection call, so a picture cannot tell another story than the code.
Images are drawn by `shapes.py`. The same version of matplotlib draws the same bytes.

Letters: P = 8732 priors, C classes with background 0, O objects in an image.
"""

import dataclasses
import io
import math
import pathlib
import random
from fractions import Fraction

import matplotlib.style
import torch
import torch.nn.functional as F
import tyro
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, Rectangle
from matplotlib.patheffects import Stroke, withStroke
from PIL import Image

import train
from average_precision import average_precision, judge_detections
from datasets import transform
from model import (
    FEATURE_MAPS,
    N_PRIORS,
    SSD300,
    CrossEntropy,
    MultiBoxLoss,
    decimate,
    hard_negatives,
)
from report import read_log
from shapes import OUTLINES, draw_image
from utils import (
    cxcy_to_gcxgcy,
    cxcy_to_xy,
    exit_on_user_error,
    find_intersection,
    find_jaccard_overlap,
    make_folder,
    write_beside,
    xy_to_cxcy,
)


@dataclasses.dataclass
class Parameters:
    """Draw the pictures of the README."""

    # Where the pictures go.
    output_folder: str = './img'
    # The log.csv of a training run, for training_curves.png; without it that picture is left out.
    log: str = './img/demo_log.csv'


# --------------------------------------------------------------------------------------------------
# What all pictures share
#
# A README is read on phones, where 8 inches become 3: few words, large ones.
# --------------------------------------------------------------------------------------------------

WIDTH, DPI = 8, 110
INK, GREY, PALE, PAPER = '#24292f', '#6e7781', '#d9dde2', '#fdfcf9'
# Okabe and Ito's colours, which colour-blind readers tell apart.
BLUE, ORANGE, GREEN, RED, PURPLE, SKY = (
    '#0072b2', '#e69f00', '#009e73', '#d55e00', '#cc79a7', '#56b4e9')
COLORS = (BLUE, ORANGE, GREEN, RED, PURPLE, SKY)
STYLE = {
    'font.size': 16, 'axes.titlesize': 16, 'legend.fontsize': 15, 'lines.linewidth': 2.5,
    'text.color': INK, 'axes.labelcolor': INK, 'axes.edgecolor': GREY, 'xtick.color': INK,
    'ytick.color': INK, 'figure.facecolor': PAPER, 'savefig.facecolor': PAPER,
    'axes.facecolor': 'white', 'axes.spines.top': False, 'axes.spines.right': False,
    'grid.color': PALE, 'figure.labelsize': 16, 'figure.constrained_layout.h_pad': 0.15,
    'figure.constrained_layout.w_pad': 0.15,
}
LABEL_MAP = {'background': 0, **{name: i for i, name in enumerate(sorted(OUTLINES), 1)}}
NAMES = list(LABEL_MAP)


def start(height, *grid, **options):
    """A figure of a height in inches, and its axes."""
    figure = Figure(figsize=(WIDTH, height), layout='constrained')
    figure.get_layout_engine().set(rect=(0.01, 0.02, 0.98, 0.96))   # a margin
    return figure, figure.subplots(*grid, **options)


def board(height):
    """A figure with one empty axes over all of it, whose unit is the inch, y downward."""
    figure = Figure(figsize=(WIDTH, height))
    axes = figure.add_axes((0, 0, 1, 1), xlim=(0, WIDTH), ylim=(height, 0))
    axes.axis('off')
    return figure, axes


def save(figure, path):
    """Write a figure as a PNG with a palette: a third of the bytes, and no date or version.

    The octree keeps the colours of thin lines, which a median cut gives to the large areas.
    """
    content = io.BytesIO()
    figure.savefig(content, format='png', dpi=DPI, metadata={'Software': None})
    with Image.open(content) as image, write_beside(path) as beside:
        image = image.convert('RGB').quantize(method=Image.Quantize.FASTOCTREE)
        image.save(beside, optimize=True)


def scene(seed):
    """A drawn image as the network sees it: (300, 300, 3), boxes (O, 4) in fractions, labels."""
    image, objects = draw_image(random.Random(f'figure {seed}'))
    image, boxes, labels, _ = transform(image, *to_tensors(objects), 'TEST')
    return image.permute(1, 2, 0).numpy(), boxes, labels


def to_tensors(objects):
    """The objects of `draw_image()` as `transform()` takes them."""
    names, boxes, difficult, _ = zip(*objects)
    return (torch.tensor(boxes, dtype=torch.float32), torch.tensor([LABEL_MAP[n] for n in names]),
            torch.tensor(difficult))


def show(axes, image, margin=0.):
    """Show an image from 0 to 1 in both directions, with a margin around it."""
    axes.imshow(image, extent=(0, 1, 1, 0))
    axes.set(xlim=(-margin, 1 + margin), ylim=(1 + margin, -margin))
    axes.axis('off')


def outline(axes, box, color, width=3., alpha=1., **options):
    """Draw a box (corners) with a dark rim, so that it is seen on any background."""
    x_min, y_min, x_max, y_max = (float(corner) for corner in box)
    patch = Rectangle((x_min, y_min), x_max - x_min, y_max - y_min, fill=False, edgecolor=color,
                      linewidth=width, alpha=alpha, **options)
    if alpha == 1 and 'linestyle' not in options:
        patch.set_path_effects([Stroke(linewidth=width + 1.5, foreground=INK),
                                Stroke(linewidth=width, foreground=color)])
    axes.add_patch(patch)


def arrow(axes, begin, end, color=GREY, **options):
    """Draw an arrow between two points."""
    axes.add_patch(FancyArrowPatch(begin, end, arrowstyle='-|>', mutation_scale=20, color=color,
                                   linewidth=2, **options))


def cells(axes, x, y, side, n, color, filled=()):
    """Draw a square of n x n cells at a corner; those whose numbers are in `filled` are full."""
    step = side / n
    axes.add_patch(Rectangle((x, y), side, side, facecolor='white', edgecolor=color))
    for number in filled:
        row, column = divmod(number, n)
        axes.add_patch(Rectangle((x + column * step, y + row * step), step, step, color=color))
    lines = [i * step for i in range(n + 1)]
    width = min(1.2, 12 * step)
    axes.vlines([x + line for line in lines], y, y + side, color=color, linewidth=width)
    axes.hlines([y + line for line in lines], x, x + side, color=color, linewidth=width)


def empty_model():
    """A network whose weights take neither memory nor time; only shapes and priors are real."""
    with torch.device('meta'):
        model = SSD300(len(LABEL_MAP))
    model.priors_cxcy = SSD300.create_prior_boxes()
    return model


def priors_of(name):
    """The priors of one map: (size, size, priors a cell, 4), centre and size."""
    first = 0
    for map_ in FEATURE_MAPS:
        n_rows = map_.size ** 2 * map_.n_priors_per_cell
        if map_.name == name:
            rows = SSD300.create_prior_boxes()[first:first + n_rows]
            return rows.view(map_.size, map_.size, -1, 4)
        first += n_rows
    raise AssertionError(f'no map {name}')


def ratio_names(map_):
    """The names of a cell's priors, in their order: '1 : 1', the second square, '2 : 1', ..."""
    ratios = [Fraction(ratio).limit_denominator(10) for ratio in map_.aspect_ratios]
    names = [f'{ratio.numerator} : {ratio.denominator}' for ratio in ratios]
    return [names[0], f'{names[0]}, second square', *names[1:]]


# --------------------------------------------------------------------------------------------------
# The network
# --------------------------------------------------------------------------------------------------


def map_shapes():
    """The shapes (channels, size, size) of the six maps that really reach the predictions."""
    model, shapes = empty_model(), []
    model.pred_convs.register_forward_pre_hook(
        lambda _, maps: shapes.extend(tuple(map_.shape[1:]) for map_ in maps))
    model(torch.zeros(1, 3, 300, 300, device='meta'))
    return shapes


def draw_network():
    """The image, the six maps one under the other, and the priors that each gives."""
    figure, axes = board(9.1)
    for x, text in ((2.25, 'map'), (3.6, 'channels, size'), (5.85, 'priors'), (7.7, 'rows')):
        axes.text(x, 0.45, text, color=GREY, ha='right' if text == 'rows' else 'left')
    axes.imshow(scene(4)[0], extent=(0.3, 1.7, 2.05, 0.65), aspect='auto')
    axes.text(2.25, 1.35, 'image', weight='bold', va='center')
    axes.text(3.6, 1.35, '3, 300 × 300', va='center')
    bottom = 2.05
    for map_, (channels, size, _) in zip(FEATURE_MAPS, map_shapes()):
        color = BLUE if map_.name in ('conv4_3', 'conv7') else RED
        side = 0.22 * math.sqrt(size)
        top = bottom + 0.33
        arrow(axes, (1, bottom), (1, top), shrinkA=2, shrinkB=0)
        cells(axes, 1 - side / 2, top, side, size, color)
        bottom, middle = top + side, top + side / 2
        per_cell = map_.n_priors_per_cell
        axes.text(2.25, middle, map_.name, color=color, weight='bold', va='center')
        axes.text(3.6, middle, f'{channels}, {size} × {size}', va='center')
        axes.text(5.85, middle, f'× {per_cell}', va='center')
        axes.text(7.7, middle, f'{size ** 2 * per_cell}', va='center', ha='right')
    axes.hlines(bottom + 0.2, 6.7, 7.7, color=INK, linewidth=1.5)
    axes.text(7.7, bottom + 0.45, f'{N_PRIORS}', weight='bold', va='center', ha='right')
    axes.text(2.25, bottom + 0.45, 'base (VGG-16)', color=BLUE, va='center')
    axes.text(4.35, bottom + 0.45, 'auxiliary', color=RED, va='center')
    return figure


def draw_fc_to_conv():
    """A fully connected layer's 7 x 7 weights, every third of them, and those spread out again."""
    conv6 = empty_model().base.conv6
    kept = decimate(torch.arange(49).view(7, 7), (3, 3)).flatten().tolist()
    dilation, n_kept = conv6.dilation[0], conv6.kernel_size[0]
    reach = dilation * (n_kept - 1) + 1
    spread = [row * dilation * reach + column * dilation
              for row in range(n_kept) for column in range(n_kept)]
    figure, axes = board(3.95)
    panels = ((7, range(49), BLUE, 'fc6', '4096 filters\n7 × 7 × 512'),
              (7, kept, BLUE, 'decimated', 'every 3rd cell,\nevery 4th filter'),
              (reach, spread, RED, 'conv6', f'{conv6.out_channels} filters, {n_kept} × {n_kept}\n'
                                            f'dilation {dilation}: {reach} × {reach}'))
    for x, (n, filled, color, title, text) in zip((0.35, 3.0, 5.65), panels):
        cells(axes, x, 0.75, 2, n, color, filled)
        if n == 7 and len(filled) == 49:    # white lines between full cells
            axes.vlines([x + 2 / 7 * i for i in range(1, 7)], 0.75, 2.75, color='white')
            axes.hlines([0.75 + 2 / 7 * i for i in range(1, 7)], x, x + 2, color='white')
        axes.text(x + 1, 0.45, title, weight='bold', ha='center', color=color)
        axes.text(x + 1, 3.0, text, ha='center', va='top')
    for x in (2.35, 5.0):
        arrow(axes, (x, 1.75), (x + 0.65, 1.75), shrinkA=4, shrinkB=4)
    return figure


def draw_stacking():
    """How the rows of the six maps stand under each other in locs (P, 4) and scores (P, C)."""
    figure, axes = board(7.6)
    axes.text(4.9, 0.45, 'locs\n(8732, 4)', ha='center', va='center', weight='bold')
    axes.text(6.75, 0.45, 'scores\n(8732, C)', ha='center', va='center', weight='bold')
    axes.text(0.3, 0.45, 'cells × priors', va='center', weight='bold')
    axes.text(2.35, 0.45, 'rows', va='center', weight='bold')
    heights = [n_rows ** 0.22 for n_rows in rows_of_maps()]
    scale, top, first = 6.3 / sum(heights), 0.95, 0
    for map_, n_rows, height, color in zip(FEATURE_MAPS, rows_of_maps(), heights, COLORS):
        height *= scale
        middle = top + height / 2
        for x, width in ((4.3, 1.2), (5.75, 2)):
            axes.add_patch(Rectangle((x, top), width, height, facecolor=color, edgecolor=PAPER,
                                     linewidth=2))
        axes.text(0.3, middle, f'{map_.size} × {map_.size} × {map_.n_priors_per_cell}',
                  va='center', color=INK)
        axes.text(2.35, middle, f'{n_rows}', va='center', ha='left', weight='bold')
        arrow(axes, (3.2, middle), (4.25, middle), color)
        axes.text(6.75, middle, f'{first} … {first + n_rows - 1}', va='center', ha='center',
                  color='white' if color in (BLUE, GREEN, RED) else INK)
        top, first = top + height, first + n_rows
    assert first == N_PRIORS, f'{first} rows, not {N_PRIORS}'
    return figure


def rows_of_maps():
    """How many rows each map gives."""
    return [map_.size ** 2 * map_.n_priors_per_cell for map_ in FEATURE_MAPS]


# --------------------------------------------------------------------------------------------------
# Boxes and priors
# --------------------------------------------------------------------------------------------------


def draw_overlap():
    """Two boxes on a grid: the squares of the intersection over those of the union."""
    boxes = torch.tensor([[1., 1., 6., 5.], [3., 2., 8., 7.]])
    shared = find_intersection(boxes, boxes)[0, 1]
    both = (boxes[:, 2:] - boxes[:, :2]).prod(dim=1).sum() - shared
    number = find_jaccard_overlap(boxes, boxes)[0, 1]
    common = torch.cat([boxes[:, :2].amax(dim=0), boxes[:, 2:].amin(dim=0)])

    figure, panels = start(4.4, 1, 2)
    for axes, title, filled, color in (
            (panels[0], f'intersection: {shared:.0f}', [common], ORANGE),
            (panels[1], f'union: {both:.0f}', boxes, GREEN)):
        axes.set(xlim=(0, 9), ylim=(8, 0), xticks=range(10), yticks=range(9), title=title,
                 aspect='equal')
        axes.grid()
        axes.tick_params(labelbottom=False, labelleft=False, length=0)
        axes.spines[:].set_visible(False)
        for x_min, y_min, x_max, y_max in torch.stack(list(filled)).tolist():
            axes.add_patch(Rectangle((x_min, y_min), x_max - x_min, y_max - y_min, color=color))
        for box, box_color in zip(boxes, (BLUE, RED)):
            outline(axes, box, box_color, 4, zorder=3)
    figure.supxlabel(f'overlap = {shared:.0f} / {both:.0f} = {number:.2f}', weight='bold',
                     color=INK, fontsize=20)
    return figure


def draw_priors_of_a_cell():
    """The six priors of the middle cell of conv9_2, named by their ratios."""
    map_ = next(map_ for map_ in FEATURE_MAPS if map_.name == 'conv9_2')
    priors = priors_of(map_.name)[2, 2]
    figure, (left, right) = start(4.5, 1, 2, width_ratios=(3, 2))
    show(left, scene(9)[0], margin=0.01)
    for box, color in zip(cxcy_to_xy(priors), COLORS):
        outline(left, box, color, 4)
    left.plot(0.5, 0.5, 'o', color='white', markersize=10, markeredgecolor=INK)
    right.axis('off')
    right.set(xlim=(0, 1), ylim=(7, 0))
    right.text(0, 0.3, 'width : height', weight='bold', va='center')
    for row, (name, color) in enumerate(zip(ratio_names(map_), COLORS), 1):
        right.hlines(row + 0.3, 0, 0.14, color=color, linewidth=8)
        right.text(0.22, row + 0.3, name, va='center')
    return figure


def draw_priors_of_a_map():
    """The cells and centres of two maps, and the priors of one cell of each."""
    figure, panels = start(4.3, 1, 2)
    image = scene(9)[0]
    for axes, name, row, column in zip(panels, ('conv8_2', 'conv9_2'), (2, 2), (6, 1)):
        priors = priors_of(name)
        size = len(priors)
        show(axes, image)
        axes.set(xlim=(-0.2, 1.04), ylim=(1.02, -0.1))
        lines = [i / size for i in range(size + 1)]
        axes.vlines(lines, 0, 1, color='white', linewidth=0.8)
        axes.hlines(lines, 0, 1, color='white', linewidth=0.8)
        centres = priors[:, :, 0, :2].reshape(-1, 2)
        axes.plot(*centres.T.tolist(), 'o', color='white', markersize=4)
        for box in cxcy_to_xy(priors[row, column]):
            outline(axes, box, ORANGE, 2.5)
        axes.plot(*priors[row, column, 0, :2].tolist(), 'o', color=ORANGE, markersize=10,
                  markeredgecolor=INK)
        axes.set_title(f'{name}: {size} × {size} cells')
    return figure


def offset_steps(box, prior):
    """The offsets from a prior to a box, both centre and size: raw, their factors, as predicted."""
    raw = torch.cat([(box[:2] - prior[:2]) / prior[2:], (box[2:] / prior[2:]).log()])
    locs = cxcy_to_gcxgcy(box, prior)
    return raw.tolist(), (locs / raw).tolist(), locs.tolist()


def draw_offsets():
    """A prior, an object, and the four numbers that lead from one to the other."""
    image, boxes, _ = scene(4)
    box, priors = xy_to_cxcy(boxes[2]), SSD300.create_prior_boxes()
    # Of the priors that would take the object the one whose offsets are easiest to see.
    overlaps = find_jaccard_overlap(boxes[2:3], cxcy_to_xy(priors))[0]
    priors = priors[overlaps >= 0.5]
    prior = priors[cxcy_to_gcxgcy(box, priors).abs().amin(dim=1).argmax()]

    figure, (left, right) = start(4.3, 1, 2)
    show(left, image)
    left.set(xlim=(0.33, 1.03), ylim=(0.67, -0.03))     # the corner where they are
    outline(left, cxcy_to_xy(prior), SKY, 4, linestyle='--')
    outline(left, boxes[2], ORANGE, 4)
    left.plot(*prior[:2].tolist(), 'o', color=SKY, markersize=9)
    left.plot(*box[:2].tolist(), 'o', color=ORANGE, markersize=9)
    right.axis('off')
    right.set(xlim=(0, 10), ylim=(8, 0))
    right.text(0, 0.6, '- - prior', color=BLUE, weight='bold')
    right.text(5.2, 0.6, '— object', color='#a87000', weight='bold')
    rows = zip(('shift x / prior width', 'shift y / prior height',
                'log(width / prior width)', 'log(height / prior height)'),
               *offset_steps(box, prior))
    for y, (name, raw, factor, loc) in enumerate(rows):
        y = 2. + 1.65 * y
        right.text(0, y, name)
        right.text(0, y + 0.75, f'{raw:+.3f} × {factor:.0f} =', color=GREY)
        right.text(7.8, y + 0.75, f'{loc:+.2f}', weight='bold', ha='right', fontsize=20)
    return figure


# --------------------------------------------------------------------------------------------------
# Training
# --------------------------------------------------------------------------------------------------


def match(boxes, labels):
    """What `MultiBoxLoss.match()` says of one image.

    Returns:
        (O, P) bool, the priors that have each object as their target; (O,) the best overlap of
        each object; (P,) the classes.
    """
    criterion = MultiBoxLoss(SSD300.create_prior_boxes())
    true_cxcy, true_classes = criterion.match([boxes], [labels])
    same = (true_cxcy - xy_to_cxcy(boxes).unsqueeze(1)).abs().amax(dim=2) < 1e-6    # (O, P)
    best = find_jaccard_overlap(boxes, criterion.priors_xy).amax(dim=1)
    return same & (true_classes[0] > 0), best, true_classes[0]


def draw_matching():
    """The priors of four objects; one overlaps no prior by 0.5 and still has a prior of its own."""
    image, boxes, labels = scene(431)
    priors = cxcy_to_xy(SSD300.create_prior_boxes())
    matched, best, _ = match(boxes, labels)
    figure, panels = start(9.4, 2, 2)
    for axes, number in zip(panels.flat, best.argsort(descending=True)):
        mine, n_priors, color = priors[matched[number]], int(matched[number].sum()), SKY
        text = f'{n_priors} priors from 0.5 up'
        if best[number] < 0.5:
            text, color = f'{n_priors} prior of its own', ORANGE
        show(axes, image)
        outline(axes, boxes[number], 'white', 6)
        for prior in mine:
            outline(axes, prior, color, 2.5, alpha=0.9)
        x, y = ((boxes[number, :2] + boxes[number, 2:]) / 2).tolist()
        axes.set(xlim=(x - 0.23, x + 0.23), ylim=(y + 0.23, y - 0.23))
        axes.set_title(f'{NAMES[labels[number]]}, best overlap {best[number]:.2f}:\n{text}')
    return figure


def draw_hard_negatives():
    """The positives of an image and the negatives that count, for made-up scores.

    The scores are those of a network that has learned a little: a class's score grows with the
    overlap of a prior with an object of it, and there is noise.
    """
    image, boxes, labels = scene(10)
    priors = cxcy_to_xy(SSD300.create_prior_boxes())
    _, _, true_classes = match(boxes, labels)
    noise = torch.Generator().manual_seed(0)
    scores = 0.3 * torch.randn(N_PRIORS, len(LABEL_MAP), generator=noise)
    scores[:, 0] += 5
    for label, overlaps in zip(labels, find_jaccard_overlap(boxes, priors)):
        scores[:, label] += 10 * overlaps
    positive = true_classes > 0
    losses = CrossEntropy.apply(scores, true_classes)
    n_wanted = MultiBoxLoss(SSD300.create_prior_boxes()).neg_pos_ratio * positive.sum()
    hard = hard_negatives(losses[None], positive[None], n_wanted.view(1, 1))[0]

    figure, panels = start(4.7, 1, 2)
    for axes, chosen, color, title in ((panels[0], positive, SKY, 'positives'),
                                       (panels[1], hard, RED, 'hard negatives')):
        show(axes, image)
        for prior in priors[chosen]:
            outline(axes, prior, color, 1.2, alpha=0.8)
        axes.set_title(f'{int(chosen.sum())} {title}')
    n_others = int((~positive & ~hard).sum())
    figure.supxlabel(f'the other {n_others} priors do not count', color=INK)
    return figure


def draw_augmentation():
    """Sixteen augmentations of one image."""
    image, objects = draw_image(random.Random('figure 6'))
    tensors = to_tensors(objects)
    figure, panels = start(WIDTH, 4, 4)
    figure.get_layout_engine().set(w_pad=0.04, h_pad=0.04, wspace=0, hspace=0)
    dice = random.getstate()
    for number, axes in enumerate(panels.flat):
        random.seed(f'figure {64 + number}')    # sixteen in which everything happens
        augmented, boxes, _, _ = transform(image, *tensors, 'TRAIN')
        show(axes, augmented.permute(1, 2, 0).numpy())
        for box in boxes:
            outline(axes, box, 'white', 1.8)
    random.setstate(dice)
    return figure


def draw_learning_rate():
    """The rate over the iterations of the default schedule."""
    p = train.Parameters()
    figure, (first, whole) = start(3.9, 1, 2, width_ratios=(2, 3))
    for axes, iterations in ((first, range(0, 2 * p.warmup, 10)),
                             (whole, range(0, p.iterations, 100))):
        rates = [train.get_lr(i, p.lr, p.warmup, p.decay_lr_at) for i in iterations]
        axes.plot([i / 1000 for i in iterations], rates, color=BLUE, linewidth=3.5)
        axes.grid()
    first.set(title='warm-up', xticks=(0, 1, 2), ylim=(0, 1.1 * p.lr), yticks=(0, p.lr))
    first.set_yticklabels(['0', f'{p.lr:g}'])
    whole.set(title='all iterations', yscale='log', ylim=(p.lr / 200, 2 * p.lr),
              xticks=[i / 1000 for i in (0, *p.decay_lr_at, p.iterations)])
    for drop in p.decay_lr_at:
        rate = train.get_lr(drop, p.lr, p.warmup, p.decay_lr_at)
        whole.text(drop / 1000 - 2, 1.4 * rate, '÷ 10', ha='right', color=RED, weight='bold')
    figure.supxlabel('iterations, in thousands')
    return figure


def draw_training_curves(rows):
    """Losses and mAP of a run, from the rows of its log."""
    figure, (losses, scores) = start(6.6, 2, 1, sharex=True, height_ratios=(3, 2))
    iterations = [row['iteration'] for row in rows]
    for column, label, color in (('loss', 'loss', INK), ('classes', 'classification', BLUE),
                                 ('boxes', 'localization', RED)):
        losses.plot(iterations, [row[column] for row in rows], label=label, color=color)
    losses.set(title='loss', ylim=(0, None))
    losses.legend()
    evaluated = [row for row in rows if not math.isnan(row['mAP'])]
    scores.plot([row['iteration'] for row in evaluated], [row['mAP'] for row in evaluated], 'o-',
                color=GREEN, markersize=9)
    for row in evaluated[-1:]:
        scores.annotate(f'{row["mAP"]:.2f}', (row['iteration'], row['mAP']), (0, -26),
                        textcoords='offset points', ha='right', weight='bold')
    scores.set(title='mAP', ylim=(0, 1.05), xlabel='iterations')
    for axes in (losses, scores):
        axes.grid()
    return figure


# --------------------------------------------------------------------------------------------------
# Detection and evaluation
# --------------------------------------------------------------------------------------------------


def candidates(boxes, labels):
    """Made-up output of a good network: (1, P, 4) and (1, P, C).

    The priors that match an object point to it, but for some noise; the others are background.
    """
    noise = torch.Generator().manual_seed(1)
    priors = SSD300.create_prior_boxes()
    true_cxcy, true_classes = MultiBoxLoss(priors).match([boxes], [labels])
    locs = cxcy_to_gcxgcy(true_cxcy, priors)
    locs = locs + 0.4 * torch.randn(locs.shape, generator=noise)
    confidence = 12 + torch.randn(1, N_PRIORS, 1, generator=noise)
    scores = confidence * F.one_hot(true_classes, len(LABEL_MAP))           # (1, P, C)
    scores[:, :, 0] = torch.where(true_classes > 0, 10., 20.)
    return locs, scores


def draw_nms():
    """The candidates of an image, and those that non-maximum suppression keeps."""
    image, boxes, labels = scene(7)
    output, model = candidates(boxes, labels), empty_model()
    figure, panels = start(4.3, 1, 2)
    # Nothing overlaps by more than 1, so that threshold keeps all.
    for axes, title, max_overlap in zip(panels, ('before', 'after'), (1., 0.5)):
        found = [list_[0] for list_ in model.detect_objects(*output, 0.2, max_overlap, 200)]
        show(axes, image, margin=0.02)
        for box, label, score in zip(*found):
            outline(axes, box, COLORS[label], 2 if title == 'before' else 3.5)
            if title == 'after':
                axes.text(*((box[:2] + box[2:]) / 2).tolist(), f'{NAMES[label]}\n{score:.2f}',
                          color='white', ha='center', va='center',
                          path_effects=[withStroke(linewidth=4, foreground=INK)])
        axes.set_title(f'{title}: {len(found[0])} boxes')
    return figure


def made_up_detections():
    """Detections of one class in ten images, judged: correct and wrong (D,), number of objects."""
    dice = torch.Generator().manual_seed(3)
    corners = torch.tensor([[0.1, 0.1, 0.4, 0.4], [0.5, 0.5, 0.9, 0.9]])
    true_boxes, true_image = corners.repeat(10, 1), torch.arange(10).repeat_interleave(2)
    # One guess an object, more or less near it, and one a corner of an image without an object.
    near = true_boxes + 0.045 * torch.randn(20, 4, generator=dice)
    far = torch.tensor([0.55, 0.05, 0.95, 0.4]).repeat(10, 1)
    boxes, image = torch.cat([near, far]), torch.cat([true_image, torch.arange(10)])
    scores = torch.rand(30, generator=dice) + torch.tensor([0.45] * 20 + [0.] * 10)
    order = scores.argsort(descending=True)
    correct, wrong, _ = judge_detections(image[order], boxes[order], true_image, true_boxes,
                                         torch.zeros(20, dtype=torch.bool))
    return correct, wrong, 20


def precisions_at_recalls(correct, wrong, n_objects):
    """Recall and precision after each detection, and the precision at recall 0, 0.1, ..., 1."""
    n_correct = correct.cumsum(0)
    precision = n_correct / (n_correct + wrong.cumsum(0)).clamp(min=1)
    points = [max(precision[10 * n_correct >= tenth * n_objects].tolist(), default=0.)
              for tenth in range(11)]
    return (n_correct / n_objects).tolist(), precision.tolist(), points


def draw_precision_recall():
    """A curve of precision over recall, and the eleven points whose mean is the AP."""
    judged = made_up_detections()
    recall, precision, points = precisions_at_recalls(*judged)
    figure, axes = start(5.2)
    axes.plot(recall, precision, color=GREY, label='after each detection')
    axes.plot([tenth / 10 for tenth in range(11)], points, 'o', color=RED, markersize=12,
              label='11 points', clip_on=False, zorder=3)
    axes.vlines([tenth / 10 for tenth in range(11)], 0, points, color=RED, linewidth=1.2)
    axes.set(xlabel='recall', ylabel='precision', xlim=(0, 1.02), ylim=(0, 1.05),
             title=f'AP = mean of 11 points = {average_precision(*judged):.2f}')
    axes.legend(loc='lower left', framealpha=1)
    return figure


PICTURES = (draw_network, draw_fc_to_conv, draw_stacking, draw_overlap, draw_priors_of_a_cell,
            draw_priors_of_a_map, draw_offsets, draw_matching, draw_hard_negatives,
            draw_augmentation, draw_learning_rate, draw_nms, draw_precision_recall)


@exit_on_user_error
def main(parameters):
    """Draw all pictures."""
    folder = make_folder(parameters.output_folder)
    pictures = {draw.__name__.removeprefix('draw_'): draw for draw in PICTURES}
    rows = read_log(pathlib.Path(parameters.log))
    if rows:
        pictures['training_curves'] = lambda: draw_training_curves(rows)
    else:
        print(f'note: training_curves.png is left out, no rows in {parameters.log}')
    with matplotlib.style.context(['default', STYLE]):
        for name, draw in pictures.items():
            save(draw(), folder / f'{name}.png')
    print(f'{len(pictures)} pictures drawn in {folder}')


if __name__ == '__main__':
    main(tyro.cli(Parameters))
