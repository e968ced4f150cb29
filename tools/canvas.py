"""Draw the README's pictures with matplotlib: colors for light and dark pages, figures, boxes.

A README is also read on phones, where 8 inches become 3, so the texts are short and large.
"""

import io
from typing import NamedTuple

import matplotlib.style
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, Rectangle
from matplotlib.patheffects import Stroke, withStroke
from PIL import Image, ImageColor

from support.drawing import place_labels
from support.errors import atomic_write

WIDTH, DPI = 8, 110


class Colors(NamedTuple):
    """Colors of a page, which is light or dark; those of ink and paper are GitHub's."""

    ink: str
    gray: str       # of what is less important
    pale: str       # of grids
    paper: str
    blue: str
    orange: str
    green: str
    red: str


LIGHT = Colors('#1f2328', '#59636e', '#d1d9e0', '#ffffff',
               blue='#0072b2', orange='#a86a00', green='#00805f', red='#c24e00')
DARK = Colors('#f0f6fc', '#9aa4af', '#3d444d', '#0d1117',
              blue='#56b4e9', orange='#e69f00', green='#2fc298', red='#ff8a4c')
# Over images, on both pages: Okabe and Ito's colors, which color-blind readers can distinguish.
BLUE, ORANGE, GREEN, RED, PURPLE, SKY = OVERLAYS = (
    '#0072b2', '#e69f00', '#009e73', '#d55e00', '#cc79a7', '#56b4e9')
RIM = '#1f2328'     # around white and colored lines, visible on any image


def page_style(colors):
    """Return the style of a page, for `matplotlib.style.context()`."""
    ink = dict.fromkeys(('text.color', 'axes.labelcolor', 'xtick.color', 'ytick.color'), colors.ink)
    paper = dict.fromkeys(('figure.facecolor', 'savefig.facecolor', 'axes.facecolor',
                           'legend.facecolor'), colors.paper)
    return matplotlib.style.context(['default', ink | paper | {
        'font.size': 16, 'axes.titlesize': 16, 'legend.fontsize': 15, 'lines.linewidth': 2.5,
        'axes.edgecolor': colors.gray, 'axes.spines.top': False, 'axes.spines.right': False,
        'grid.color': colors.pale, 'legend.edgecolor': colors.pale, 'figure.labelsize': 16,
        'figure.constrained_layout.h_pad': 0.15, 'figure.constrained_layout.w_pad': 0.15}])


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


def save(figure, path, paper):
    """Write a figure as a PNG with a palette, for a third of the bytes, without date or version.

    Quantization by an octree keeps the colors of thin lines; a median cut would drop them. It may
    change a color by a level or two, so that of the paper is restored.
    """
    content = io.BytesIO()
    figure.savefig(content, format='png', dpi=DPI, metadata={'Software': None})
    with Image.open(content) as image, atomic_write(path) as temporary:
        image = image.convert('RGB').quantize(method=Image.Quantize.FASTOCTREE)
        palette, first = image.getpalette(), 3 * image.getpixel((0, 0))
        palette[first:first + 3] = ImageColor.getrgb(paper)
        image.putpalette(palette)
        image.save(temporary, optimize=True)


def show(axes, image, margin=0.):
    """Show an image with coordinates from 0 to 1 in both directions, and a margin around it."""
    axes.imshow(image, extent=(0, 1, 1, 0))
    axes.set(xlim=(-margin, 1 + margin), ylim=(1 + margin, -margin))
    axes.axis('off')


def draw_box(axes, box, color, width=3., **options):
    """Draw a box (4,), corners, with a dark rim."""
    x_min, y_min, x_max, y_max = (float(corner) for corner in box)
    patch = Rectangle((x_min, y_min), x_max - x_min, y_max - y_min, fill=False, edgecolor=color,
                      linewidth=width, **options)
    if 'linestyle' not in options:
        patch.set_path_effects([Stroke(linewidth=width + 1.5, foreground=RIM),
                                Stroke(linewidth=width, foreground=color)])
    axes.add_patch(patch)


def label_boxes(axes, boxes, texts):
    """Write the labels of boxes of an image, see `place_labels()`."""
    sizes = [(0.035 * len(text), 0.08) for text in texts]   # half of the page has such an image
    for (x, y), text in zip(place_labels(boxes, sizes, (1, 1)), texts):
        axes.text(x, y + 0.04, text, color='white', fontsize=15, va='center',
                  path_effects=[withStroke(linewidth=4, foreground=RIM)])


def draw_arrow(axes, begin, end, color, **options):
    """Draw an arrow between two points."""
    axes.add_patch(FancyArrowPatch(begin, end, arrowstyle='-|>', mutation_scale=20, color=color,
                                   linewidth=2, **options))


def draw_grid(axes, x, y, side, n, color, paper, filled=()):
    """Draw a grid of n x n cells with its upper left corner at x, y.

    Args:
        side: length in the unit of the axes.
        color, paper: of lines and filled cells, and of the others.
        filled: numbers of the cells that are filled, counted row by row.
    """
    step = side / n
    axes.add_patch(Rectangle((x, y), side, side, facecolor=paper, edgecolor=color))
    for number in filled:
        row, column = divmod(number, n)
        axes.add_patch(Rectangle((x + column * step, y + row * step), step, step, color=color))
    lines = [i * step for i in range(n + 1)]
    width = min(1.2, 12 * step)
    inner = paper if len(filled) == n * n else color    # visible between filled cells
    axes.vlines([x + line for line in lines], y, y + side, color=inner, linewidth=width)
    axes.hlines([y + line for line in lines], x, x + side, color=inner, linewidth=width)
