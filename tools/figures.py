"""Draw the pictures of the README's tutorial, from the code that they explain.

    python -m tools.figures

Priors, matches, hard negatives, crops, suppression, learning rate and average precision come from
the functions that training and detection call, so the pictures agree with the code. Images are
drawn by `tools/shapes.py`. The same version of matplotlib draws the same bytes.

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
from model import (
    FEATURE_MAPS,
    N_PRIORS,
    SSD300,
    MultiBoxLoss,
    create_prior_boxes,
    decimate,
    hard_negatives,
)
from support.errors import atomic_write, exit_on_user_error, make_folder
from support.training_log import read_log
from tools.shapes import OUTLINES, draw_image
from utils import (
    average_precision,
    cxcy_to_gcxgcy,
    cxcy_to_xy,
    find_intersection,
    find_jaccard_overlap,
    match_detections,
    transform,
    xy_to_cxcy,
)


@dataclasses.dataclass
class Parameters:
    """Draw the pictures of the README."""

    # Folder for the pictures.
    output_folder: str = './img'
    # The log.csv of a training run, for training_curves.png; if it does not exist, that picture is
    # left out.
    log: str = './img/demo_log.csv'


# --------------------------------------------------------------------------------------------------
# Helpers of all pictures
#
# A README is also read on phones, where 8 inches become 3, so the texts are short and large.
# --------------------------------------------------------------------------------------------------

WIDTH, DPI = 8, 110
INK, GREY, PALE, PAPER = '#24292f', '#6e7781', '#d9dde2', '#fdfcf9'
# Okabe and Ito's colors, which color-blind readers can distinguish.
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


def create_figure(height, *grid, **options):
    """Create a figure of a height in inches, and its axes; see `Figure.subplots()`."""
    figure = Figure(figsize=(WIDTH, height), layout='constrained')
    figure.get_layout_engine().set(rect=(0.01, 0.02, 0.98, 0.96))   # a margin
    return figure, figure.subplots(*grid, **options)


def create_canvas(height):
    """Create a figure that is covered by one empty axes, with the inch as its unit, y downward."""
    figure = Figure(figsize=(WIDTH, height))
    axes = figure.add_axes((0, 0, 1, 1), xlim=(0, WIDTH), ylim=(height, 0))
    axes.axis('off')
    return figure, axes


def save(figure, path):
    """Write a figure as a PNG with a palette, for a third of the bytes, without date or version.

    Quantization by an octree keeps the colors of thin lines; a median cut would drop them.
    """
    content = io.BytesIO()
    figure.savefig(content, format='png', dpi=DPI, metadata={'Software': None})
    with Image.open(content) as image, atomic_write(path) as temporary:
        image = image.convert('RGB').quantize(method=Image.Quantize.FASTOCTREE)
        image.save(temporary, optimize=True)


def make_example(seed):
    """Draw an image and transform it as for evaluation.

    Returns:
        image (300, 300, 3) uint8, a NumPy array; boxes (O, 4) in fractions; labels (O,).
    """
    image, objects = draw_image(random.Random(f'figure {seed}'))
    image, boxes, labels, _ = transform(image, *to_tensors(objects), 'TEST')
    return image.permute(1, 2, 0).numpy(), boxes, labels


def to_tensors(objects):
    """Convert the objects of `draw_image()` to the boxes, labels and difficulties of `transform()`.
    """
    names, boxes, difficulties, _ = zip(*objects)
    return (torch.tensor(boxes, dtype=torch.float32),
            torch.tensor([LABEL_MAP[name] for name in names]), torch.tensor(difficulties))


def show(axes, image, margin=0.):
    """Show an image with coordinates from 0 to 1 in both directions, and a margin around it."""
    axes.imshow(image, extent=(0, 1, 1, 0))
    axes.set(xlim=(-margin, 1 + margin), ylim=(1 + margin, -margin))
    axes.axis('off')


def draw_box(axes, box, color, width=3., alpha=1., **options):
    """Draw a box (4,), corners, with a dark rim that makes it visible on any background."""
    x_min, y_min, x_max, y_max = (float(corner) for corner in box)
    patch = Rectangle((x_min, y_min), x_max - x_min, y_max - y_min, fill=False, edgecolor=color,
                      linewidth=width, alpha=alpha, **options)
    if alpha == 1 and 'linestyle' not in options:
        patch.set_path_effects([Stroke(linewidth=width + 1.5, foreground=INK),
                                Stroke(linewidth=width, foreground=color)])
    axes.add_patch(patch)


def draw_arrow(axes, begin, end, color=GREY, **options):
    """Draw an arrow between two points."""
    axes.add_patch(FancyArrowPatch(begin, end, arrowstyle='-|>', mutation_scale=20, color=color,
                                   linewidth=2, **options))


def draw_grid(axes, x, y, side, n, color, filled=()):
    """Draw a grid of n x n cells with its upper left corner at x, y.

    Args:
        side: length in the unit of the axes.
        filled: numbers of the cells that are filled, counted row by row.
    """
    step = side / n
    axes.add_patch(Rectangle((x, y), side, side, facecolor='white', edgecolor=color))
    for number in filled:
        row, column = divmod(number, n)
        axes.add_patch(Rectangle((x + column * step, y + row * step), step, step, color=color))
    lines = [i * step for i in range(n + 1)]
    width = min(1.2, 12 * step)
    axes.vlines([x + line for line in lines], y, y + side, color=color, linewidth=width)
    axes.hlines([y + line for line in lines], x, x + side, color=color, linewidth=width)


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


def name_ratios(feature_map):
    """Name the priors of a cell, in their order: '1 : 1', the additional square, '2 : 1', ..."""
    ratios = [Fraction(ratio).limit_denominator(10) for ratio in feature_map.aspect_ratios]
    names = [f'{ratio.numerator} : {ratio.denominator}' for ratio in ratios]
    return [names[0], f'{names[0]}, additional', *names[1:]]


# --------------------------------------------------------------------------------------------------
# The network
# --------------------------------------------------------------------------------------------------


def feature_map_shapes():
    """Find the shapes (channels, size, size) of the six maps that reach the prediction layers."""
    model, shapes = make_meta_model(), []
    model.pred_convs.register_forward_pre_hook(
        lambda _, maps: shapes.extend(tuple(feature_map.shape[1:]) for feature_map in maps))
    model(torch.zeros(1, 3, 300, 300, device='meta'))
    return shapes


def draw_network():
    """Draw the image, the six feature maps below it, and the number of priors of each."""
    figure, axes = create_canvas(9.1)
    for x, text in ((1.98, 'feature map'), (3.6, 'channels, size'), (5.4, 'priors per cell'),
                    (7.7, 'rows')):
        axes.text(x, 0.45, text, color=GREY, ha='right' if text == 'rows' else 'left')
    axes.imshow(make_example(4)[0], extent=(0.3, 1.7, 2.05, 0.65), aspect='auto')
    axes.text(1.98, 1.35, 'image', weight='bold', va='center')
    axes.text(3.6, 1.35, '3, 300 × 300', va='center')
    bottom = 2.05
    for feature_map, (channels, size, _) in zip(FEATURE_MAPS, feature_map_shapes()):
        color = BLUE if feature_map.name in ('conv4_3', 'conv7') else RED
        side = 0.22 * math.sqrt(size)
        top = bottom + 0.33
        draw_arrow(axes, (1, bottom), (1, top), shrinkA=2, shrinkB=0)
        draw_grid(axes, 1 - side / 2, top, side, size, color)
        bottom, middle = top + side, top + side / 2
        per_cell = feature_map.n_priors_per_cell
        axes.text(1.98, middle, feature_map.name, color=color, weight='bold', va='center')
        axes.text(3.6, middle, f'{channels}, {size} × {size}', va='center')
        axes.text(5.4, middle, f'× {per_cell}', va='center')
        axes.text(7.7, middle, f'{size ** 2 * per_cell}', va='center', ha='right')
    axes.hlines(bottom + 0.2, 6.7, 7.7, color=INK, linewidth=1.5)
    axes.text(7.7, bottom + 0.45, f'{N_PRIORS}', weight='bold', va='center', ha='right')
    axes.text(1.98, bottom + 0.45, 'base (VGG-16)', color=BLUE, va='center')
    axes.text(4.08, bottom + 0.45, 'auxiliary', color=RED, va='center')
    return figure


def draw_fc_to_conv():
    """Draw the 7 x 7 kernel of fc6, its decimation, and the dilated kernel of conv6."""
    conv6 = make_meta_model().base.conv6
    kept = decimate(torch.arange(49).view(7, 7), (3, 3)).flatten().tolist()
    dilation, n_kept = conv6.dilation[0], conv6.kernel_size[0]
    reach = dilation * (n_kept - 1) + 1
    spread = [row * dilation * reach + column * dilation
              for row in range(n_kept) for column in range(n_kept)]
    figure, axes = create_canvas(3.95)
    panels = ((7, range(49), BLUE, 'fc6', '4096 filters\n7 × 7 × 512'),
              (7, kept, BLUE, 'decimated', 'every 3rd cell,\nevery 4th filter'),
              (reach, spread, RED, 'conv6', f'{conv6.out_channels} filters, {n_kept} × {n_kept}\n'
                                            f'dilation {dilation}: {reach} × {reach}'))
    for x, (n, filled, color, title, text) in zip((0.35, 3.0, 5.65), panels):
        draw_grid(axes, x, 0.75, 2, n, color, filled)
        if n == 7 and len(filled) == 49:    # white lines between full cells
            axes.vlines([x + 2 / 7 * i for i in range(1, 7)], 0.75, 2.75, color='white')
            axes.hlines([0.75 + 2 / 7 * i for i in range(1, 7)], x, x + 2, color='white')
        axes.text(x + 1, 0.45, title, weight='bold', ha='center', color=color)
        axes.text(x + 1, 3.0, text, ha='center', va='top')
    for x in (2.35, 5.0):
        draw_arrow(axes, (x, 1.75), (x + 0.65, 1.75), shrinkA=4, shrinkB=4)
    return figure


def draw_stacking():
    """Draw how the rows of the six maps are concatenated to locs (P, 4) and scores (P, C)."""
    figure, axes = create_canvas(7.6)
    axes.text(4.9, 0.45, 'locs\n(8732, 4)', ha='center', va='center', weight='bold')
    axes.text(6.75, 0.45, 'scores\n(8732, C)', ha='center', va='center', weight='bold')
    axes.text(0.3, 0.45, 'cells × priors', va='center', weight='bold')
    axes.text(2.35, 0.45, 'rows', va='center', weight='bold')
    heights = [n_rows ** 0.22 for n_rows in count_rows()]
    scale, top, first = 6.3 / sum(heights), 0.95, 0
    for feature_map, n_rows, height, color in zip(FEATURE_MAPS, count_rows(), heights, COLORS):
        height *= scale
        middle = top + height / 2
        for x, width in ((4.3, 1.2), (5.75, 2)):
            axes.add_patch(Rectangle((x, top), width, height, facecolor=color, edgecolor=PAPER,
                                     linewidth=2))
        size, per_cell = feature_map.size, feature_map.n_priors_per_cell
        axes.text(0.3, middle, f'{size} × {size} × {per_cell}', va='center', color=INK)
        axes.text(2.35, middle, f'{n_rows}', va='center', ha='left', weight='bold')
        draw_arrow(axes, (3.2, middle), (4.25, middle), color)
        axes.text(6.75, middle, f'{first} … {first + n_rows - 1}', va='center', ha='center',
                  color='white' if color in (BLUE, GREEN, RED) else INK)
        top, first = top + height, first + n_rows
    assert first == N_PRIORS, f'{first} rows, not {N_PRIORS}'
    return figure


# --------------------------------------------------------------------------------------------------
# Boxes and priors
# --------------------------------------------------------------------------------------------------


def draw_overlap():
    """Draw intersection and union of two boxes on a grid."""
    boxes = torch.tensor([[1., 1., 6., 5.], [3., 2., 8., 7.]])
    intersection = find_intersection(boxes, boxes)[0, 1]
    union = (boxes[:, 2:] - boxes[:, :2]).prod(dim=1).sum() - intersection
    iou = find_jaccard_overlap(boxes, boxes)[0, 1]
    intersection_box = torch.cat([boxes[:, :2].amax(dim=0), boxes[:, 2:].amin(dim=0)])

    figure, panels = create_figure(4.4, 1, 2)
    for axes, title, filled, color in (
            (panels[0], f'intersection: {intersection:.0f}', [intersection_box], ORANGE),
            (panels[1], f'union: {union:.0f}', boxes, GREEN)):
        axes.set(xlim=(0, 9), ylim=(8, 0), xticks=range(10), yticks=range(9), title=title,
                 aspect='equal')
        axes.grid()
        axes.tick_params(labelbottom=False, labelleft=False, length=0)
        axes.spines[:].set_visible(False)
        for x_min, y_min, x_max, y_max in torch.stack(list(filled)).tolist():
            axes.add_patch(Rectangle((x_min, y_min), x_max - x_min, y_max - y_min, color=color))
        for box, box_color in zip(boxes, (BLUE, RED)):
            draw_box(axes, box, box_color, 4, zorder=3)
    figure.supxlabel(f'IoU = {intersection:.0f} / {union:.0f} = {iou:.2f}', weight='bold',
                     color=INK, fontsize=20)
    return figure


def draw_priors_of_a_cell():
    """Draw the six priors of the middle cell of conv9_2, named by their aspect ratios."""
    feature_map = next(feature_map for feature_map in FEATURE_MAPS if feature_map.name == 'conv9_2')
    priors = select_priors(feature_map.name)[2, 2]
    figure, (left, right) = create_figure(4.5, 1, 2, width_ratios=(3, 2))
    show(left, make_example(9)[0], margin=0.01)
    for box, color in zip(cxcy_to_xy(priors), COLORS):
        draw_box(left, box, color, 4)
    left.plot(0.5, 0.5, 'o', color='white', markersize=10, markeredgecolor=INK)
    right.axis('off')
    right.set(xlim=(0, 1), ylim=(7, 0))
    right.text(0, 0.3, 'width : height', weight='bold', va='center')
    for row, (name, color) in enumerate(zip(name_ratios(feature_map), COLORS), 1):
        right.hlines(row + 0.3, 0, 0.14, color=color, linewidth=8)
        right.text(0.22, row + 0.3, name, va='center')
    return figure


def draw_priors_of_a_map():
    """Draw the cells of two feature maps, their centers, and the priors of one cell of each."""
    figure, panels = create_figure(4.3, 1, 2)
    image = make_example(9)[0]
    for axes, name, row, column in zip(panels, ('conv8_2', 'conv9_2'), (2, 2), (6, 1)):
        priors = select_priors(name)
        size = len(priors)
        show(axes, image)
        axes.set(xlim=(-0.2, 1.04), ylim=(1.02, -0.1))
        lines = [i / size for i in range(size + 1)]
        axes.vlines(lines, 0, 1, color='white', linewidth=0.8)
        axes.hlines(lines, 0, 1, color='white', linewidth=0.8)
        centers = priors[:, :, 0, :2].reshape(-1, 2)
        axes.plot(*centers.T.tolist(), 'o', color='white', markersize=4)
        for box in cxcy_to_xy(priors[row, column]):
            draw_box(axes, box, ORANGE, 2.5)
        axes.plot(*priors[row, column, 0, :2].tolist(), 'o', color=ORANGE, markersize=10,
                  markeredgecolor=INK)
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


def draw_offsets():
    """Draw a prior, an object, and the four offsets between them."""
    image, boxes, _ = make_example(4)
    box, priors = xy_to_cxcy(boxes[2]), create_prior_boxes()
    # Of the priors that would be matched to the object, the one whose offsets are best visible.
    overlaps = find_jaccard_overlap(boxes[2:3], cxcy_to_xy(priors))[0]
    priors = priors[overlaps >= 0.5]
    prior = priors[cxcy_to_gcxgcy(box, priors).abs().amin(dim=1).argmax()]

    figure, (left, right) = create_figure(4.3, 1, 2)
    show(left, image)
    left.set(xlim=(0.33, 1.03), ylim=(0.67, -0.03))     # the corner where they are
    draw_box(left, cxcy_to_xy(prior), SKY, 4, linestyle='--')
    draw_box(left, boxes[2], ORANGE, 4)
    left.plot(*prior[:2].tolist(), 'o', color=SKY, markersize=9)
    left.plot(*box[:2].tolist(), 'o', color=ORANGE, markersize=9)
    right.axis('off')
    right.set(xlim=(0, 10), ylim=(8, 0))
    right.text(0, 0.6, '- - prior', color=BLUE, weight='bold')
    right.text(5.2, 0.6, '— object', color='#a87000', weight='bold')
    rows = zip(('shift x / prior width', 'shift y / prior height',
                'log(width / prior width)', 'log(height / prior height)'),
               *explain_offsets(box, prior))
    for y, (name, unscaled, factor, loc) in enumerate(rows):
        y = 2. + 1.65 * y
        right.text(0, y, name)
        right.text(0, y + 0.75, f'{unscaled:+.3f} × {factor:.0f} =', color=GREY)
        right.text(7.8, y + 0.75, f'{loc:+.2f}', weight='bold', ha='right', fontsize=20)
    return figure


# --------------------------------------------------------------------------------------------------
# Training
# --------------------------------------------------------------------------------------------------


def match(boxes, labels):
    """Match the priors to the objects of one image.

    Returns:
        matched (O, P) bool, the priors that are matched to each object; highest (O,), the highest
        IoU of each object with any prior; true_classes (P,).
    """
    criterion = MultiBoxLoss(create_prior_boxes())
    true_locs, true_classes = criterion.match([boxes], [labels])
    locs = cxcy_to_gcxgcy(xy_to_cxcy(boxes).unsqueeze(1), criterion.priors_cxcy)    # (O, P, 4)
    matched = ((true_locs - locs).abs().amax(dim=2) < 1e-5) & (true_classes > 0)    # (O, P)
    highest = find_jaccard_overlap(boxes, criterion.priors_xy).amax(dim=1)          # (O,)
    return matched, highest, true_classes[0]


def draw_matching():
    """Draw the positive priors of four objects, one of which overlaps no prior by 0.5."""
    image, boxes, labels = make_example(431)
    priors = cxcy_to_xy(create_prior_boxes())
    matched, highest, _ = match(boxes, labels)
    figure, panels = create_figure(9.4, 2, 2)
    for axes, obj in zip(panels.flat, highest.argsort(descending=True)):
        text, color = f'{int(matched[obj].sum())} priors with IoU ≥ 0.5', SKY
        if highest[obj] < 0.5:
            assert matched[obj].sum() == 1, f'{matched[obj].sum()} priors'
            text, color = 'only its best prior', ORANGE
        show(axes, image)
        draw_box(axes, boxes[obj], 'white', 6)
        for prior in priors[matched[obj]]:
            draw_box(axes, prior, color, 2.5, alpha=0.9)
        x, y = ((boxes[obj, :2] + boxes[obj, 2:]) / 2).tolist()
        axes.set(xlim=(x - 0.23, x + 0.23), ylim=(y + 0.23, y - 0.23))
        axes.set_title(f'{NAMES[labels[obj]]}, highest IoU {highest[obj]:.2f}:\n{text}')
    return figure


def draw_hard_negatives():
    """Draw the positives and the hard negatives of an image, for simulated scores.

    The scores are those of a network after a little training: the score of a class grows with the
    IoU of the prior and an object of this class, and there is noise.
    """
    image, boxes, labels = make_example(10)
    priors = cxcy_to_xy(create_prior_boxes())
    _, _, true_classes = match(boxes, labels)
    rng = torch.Generator().manual_seed(0)
    scores = 0.3 * torch.randn(N_PRIORS, len(LABEL_MAP), generator=rng)
    scores[:, 0] += 5
    for label, overlap in zip(labels, find_jaccard_overlap(boxes, priors)):
        scores[:, label] += 10 * overlap
    positive = true_classes > 0
    cross_entropy = F.cross_entropy(scores, true_classes, reduction='none')         # (P,)
    n_hard = MultiBoxLoss(create_prior_boxes()).neg_pos_ratio * positive.sum()
    hard = hard_negatives(cross_entropy[None], positive[None], n_hard.view(1, 1))[0]

    figure, panels = create_figure(4.7, 1, 2)
    for axes, selected, color, title in ((panels[0], positive, SKY, 'positives'),
                                         (panels[1], hard, RED, 'hard negatives')):
        show(axes, image)
        for prior in priors[selected]:
            draw_box(axes, prior, color, 1.2, alpha=0.8)
        axes.set_title(f'{int(selected.sum())} {title}')
    n_others = int((~positive & ~hard).sum())
    figure.supxlabel(f'the other {n_others} priors do not count in the loss', color=INK)
    return figure


def draw_augmentation():
    """Draw sixteen augmentations of one image."""
    image, objects = draw_image(random.Random('figure 6'))
    tensors = to_tensors(objects)
    figure, panels = create_figure(WIDTH, 4, 4)
    figure.get_layout_engine().set(w_pad=0.04, h_pad=0.04, wspace=0, hspace=0)
    state = random.getstate()
    for number, axes in enumerate(panels.flat):
        random.seed(f'figure {64 + number}')    # every kind of augmentation occurs
        augmented, boxes, _, _ = transform(image, *tensors, 'TRAIN')
        show(axes, augmented.permute(1, 2, 0).numpy())
        for box in boxes:
            draw_box(axes, box, 'white', 1.8)
    random.setstate(state)
    return figure


def draw_learning_rate():
    """Draw the learning rate over the iterations of the default schedule."""
    p = train.Parameters()
    figure, (first, whole) = create_figure(3.9, 1, 2, width_ratios=(2, 3))
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
    """Draw losses and mAP of a training run, from the rows of its log."""
    figure, (losses, scores) = create_figure(6.6, 2, 1, sharex=True, height_ratios=(3, 2))
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


def simulate_output(boxes, labels):
    """Simulate the output of a well-trained network for one image.

    Positive priors predict their object, with noise; the others predict background.

    Args:
        boxes, labels: (O, 4) in fractions and (O,).

    Returns:
        locs (1, P, 4) and scores (1, P, C).
    """
    rng = torch.Generator().manual_seed(1)
    true_locs, true_classes = MultiBoxLoss(create_prior_boxes()).match([boxes], [labels])
    locs = true_locs + 0.4 * torch.randn(true_locs.shape, generator=rng)
    confidence = 12 + torch.randn(1, N_PRIORS, 1, generator=rng)
    scores = confidence * F.one_hot(true_classes, len(LABEL_MAP))           # (1, P, C)
    scores[:, :, 0] = torch.where(true_classes > 0, 10., 20.)
    return locs, scores


def draw_nms():
    """Draw the detections in an image before and after non-maximum suppression."""
    image, boxes, labels = make_example(7)
    output, model = simulate_output(boxes, labels), make_meta_model()
    figure, panels = create_figure(4.3, 1, 2)
    # No IoU is above 1, so this threshold keeps all boxes.
    for axes, title, max_overlap in zip(panels, ('before', 'after'), (1., 0.5)):
        detections = [tensors[0] for tensors in model.detect_objects(
            *output, min_score=0.2, max_overlap=max_overlap, top_k=200)]
        show(axes, image, margin=0.02)
        for box, label, score in zip(*detections):
            draw_box(axes, box, COLORS[label], 2 if title == 'before' else 3.5)
            if title == 'after':
                axes.text(*((box[:2] + box[2:]) / 2).tolist(), f'{NAMES[label]}\n{score:.2f}',
                          color='white', ha='center', va='center',
                          path_effects=[withStroke(linewidth=4, foreground=INK)])
        axes.set_title(f'{title}: {len(detections[0])} boxes')
    return figure


def simulate_matches():
    """Simulate 30 detections of one class in ten images and match them to the ground truth.

    Returns:
        true_positive (D,) and false_positive (D,) bool, by falling score, and the number of
        objects: the first arguments of `average_precision()`.
    """
    rng = torch.Generator().manual_seed(3)
    corners = torch.tensor([[0.1, 0.1, 0.4, 0.4], [0.5, 0.5, 0.9, 0.9]])
    true_boxes, true_image = corners.repeat(10, 1), torch.arange(10).repeat_interleave(2)
    # One detection near each object, and one in each image where there is no object.
    near = true_boxes + 0.045 * torch.randn(20, 4, generator=rng)
    far = torch.tensor([0.55, 0.05, 0.95, 0.4]).repeat(10, 1)
    boxes, image = torch.cat([near, far]), torch.cat([true_image, torch.arange(10)])
    scores = torch.rand(30, generator=rng) + torch.tensor([0.45] * 20 + [0.] * 10)
    order = scores.argsort(descending=True)
    true_positive, false_positive, _ = match_detections(
        image[order], boxes[order], true_image, true_boxes, torch.zeros(20, dtype=torch.bool))
    return true_positive, false_positive, 20


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


def draw_precision_recall():
    """Draw precision over recall, and the eleven points whose mean is the AP."""
    matches = simulate_matches()
    recall, precision, points = precision_recall_points(*matches)
    figure, axes = create_figure(5.2)
    axes.plot(recall, precision, color=GREY, label='after each detection')
    axes.plot([tenth / 10 for tenth in range(11)], points, 'o', color=RED, markersize=12,
              label='11 points', clip_on=False, zorder=3)
    axes.vlines([tenth / 10 for tenth in range(11)], 0, points, color=RED, linewidth=1.2)
    axes.set(xlabel='recall', ylabel='precision', xlim=(0, 1.02), ylim=(0, 1.05),
             title=f'AP = mean of 11 points = {average_precision(*matches):.2f}')
    axes.legend(loc='lower left', framealpha=1)
    return figure


PICTURES = (draw_network, draw_fc_to_conv, draw_stacking, draw_overlap, draw_priors_of_a_cell,
            draw_priors_of_a_map, draw_offsets, draw_matching, draw_hard_negatives,
            draw_augmentation, draw_learning_rate, draw_nms, draw_precision_recall)


@exit_on_user_error
def main(parameters):
    """Draw all pictures into the output folder."""
    folder = make_folder(parameters.output_folder)
    pictures = {draw.__name__.removeprefix('draw_'): draw for draw in PICTURES}
    rows = read_log(pathlib.Path(parameters.log))
    if rows:
        pictures['training_curves'] = lambda: draw_training_curves(rows)
    else:
        print(f'note: training_curves.png is left out: {parameters.log} has no rows')
    with matplotlib.style.context(['default', STYLE]):
        for name, draw in pictures.items():
            save(draw(), folder / f'{name}.png')
    print(f'{len(pictures)} pictures drawn in {folder}')


if __name__ == '__main__':
    main(tyro.cli(Parameters))
