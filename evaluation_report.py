"""What is quoted and looked at after an evaluation: the table, result files, curves, mistakes.

Boxes are in pixels of the original image here, as edges. Result files are those of the VOC devkit,
`comp4_det_test_{class}.txt`, a line a detection: `image_id score xmin ymin xmax ymax`. The devkit
counts pixels from 1 and includes both ends, so the edges become (x_min + 1, y_min + 1, x_max,
y_max).
"""

import contextlib
import math
import os
import pathlib
from concurrent.futures import ThreadPoolExecutor

import torch
from matplotlib.figure import Figure
from PIL import Image, ImageDraw, ImageFont

from average_precision import (
    Detections,
    Objects,
    average_precision,
    average_precisions,
    mean_of_known,
    recall_from,
)
from datasets import read_image, read_size
from detect import draw_objects
from utils import UserError, distinct_colors, find_jaccard_overlap, write_beside

# --------------------------------------------------------------------------------------------------
# The table
# --------------------------------------------------------------------------------------------------


def print_table(judged, coco, operating_score):
    """A line a class, the means, COCO's average precision, and the mAP of VOC 2007.

    Args:
        judged: {class name: Judged}.
        coco: what `coco_average_precision()` returns.
        operating_score: the score from which on a detection would be shown to a person.
    """
    width = max(map(len, (*judged, 'COCO AP 0.5:0.95'))) + 2
    areas, area_mean = average_precisions(judged, 'area')
    aps, mean = average_precisions(judged)
    recalls = {name: recall_from(mine, operating_score) for name, mine in judged.items()}
    print(f'{"":{width}}AP (07)     AP (area)   objects  difficult  detections  '
          f'recall at {operating_score:g}')

    def print_line(name, ap, area, counts, recall):
        """A line of the table."""
        n_objects, n_difficult, n_detections = counts
        cells = [f'{"no objects" if math.isnan(ap) else f"{ap:.4f}":12}',
                 f'{"" if math.isnan(area) else f"{area:.4f}":12}',
                 f'{n_objects:7}  {n_difficult:9}  {n_detections:10}  ',
                 '' if math.isnan(recall) else f'{recall:.4f}']
        print(f'{name:{width}}{"".join(cells)}'.rstrip())

    counts = {name: (mine.n_objects, mine.n_difficult, len(mine.rows))
              for name, mine in judged.items()}
    for name in judged:
        print_line(name, aps[name], areas[name], counts[name], recalls[name])
    print_line('mean, sum', mean, area_mean, [sum(column) for column in zip(*counts.values())]
               or (0, 0, 0), mean_of_known(recalls.values()))
    for overlap, ap in coco.items():
        print(f'{f"COCO AP {overlap}":{width}}{ap:.4f}')
    print(f'{"mAP":{width}}{mean:.4f}')


# --------------------------------------------------------------------------------------------------
# Pixels and result files
# --------------------------------------------------------------------------------------------------

FROM_1 = torch.tensor([1., 1., 0., 0.], dtype=torch.float64)
DECIMALS = 4    # of a pixel; a network's float32 fraction of 500 pixels is no finer


def read_sizes(paths):
    """Width and height of image files, from their headers: (n, 2) float64."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return torch.tensor(list(pool.map(read_size, paths)), dtype=torch.float64).view(-1, 2)


def in_pixels(detections, sizes):
    """Detections with boxes in fractions of their images, as they will stand in result files.

    Rounded as there, so that numbers from memory and from files are the same to the last digit.
    """
    pixels = detections.boxes.double() * sizes[detections.image].repeat(1, 2) + FROM_1
    pixels = (pixels * 10 ** DECIMALS).round() / 10 ** DECIMALS
    return detections._replace(boxes=pixels - FROM_1, scores=detections.scores.double())


def dataset_objects(dataset):
    """The objects of a data set, difficult ones included, boxes in pixels."""
    def column(key, dtype):
        """One value of all objects."""
        return torch.tensor([value for objects in dataset.objects for value in objects[key]],
                            dtype=dtype)
    counts = torch.tensor([len(objects['boxes']) for objects in dataset.objects]).long()
    return Objects(torch.repeat_interleave(torch.arange(len(counts)), counts),
                   column('boxes', torch.float64).view(-1, 4), column('labels', torch.int64),
                   column('difficulties', torch.bool))


def image_ids(paths):
    """What result files call the images: the files' names without their endings.

    Raises:
        UserError: two images of the same name.
    """
    ids = {}
    for path in paths:
        first = ids.setdefault(pathlib.Path(path).stem, path)
        if first != path:
            raise UserError(f'{first} and {path} have the same name; result files name an image by '
                            f'it alone: rename one, or evaluate their folders one by one')
    return list(ids)


def result_path(folder, name):
    """The result file of a class."""
    if '/' in name or os.sep in name:
        raise UserError(f'class {name!r} cannot be part of the name of a result file; rename it')
    return pathlib.Path(folder) / f'comp4_det_test_{name}.txt'


def write_results(folder, detections, ids, label_map):
    """Write detections (boxes in pixels) as the devkit's result files, an empty one for no box.

    A class's detections keep their order, which settles equal scores.
    """
    boxes = detections.boxes.double() + FROM_1
    with contextlib.ExitStack() as stack:   # none is renamed before all are written
        for name, label in label_map.items():
            if name == 'background':
                continue
            mine = detections.labels == label
            rows = zip(detections.image[mine].tolist(), detections.scores[mine].tolist(),
                       boxes[mine].tolist())
            path = stack.enter_context(write_beside(result_path(folder, name)))
            with open(path, 'w', encoding='utf-8') as file:
                # Nine digits tell any two float32 numbers apart.
                file.writelines(
                    f'{ids[image]} {score:.9g} {box[0]:.{DECIMALS}f} {box[1]:.{DECIMALS}f} '
                    f'{box[2]:.{DECIMALS}f} {box[3]:.{DECIMALS}f}\n' for image, score, box in rows)


def read_results(folder, ids, label_map):
    """The detections of the devkit's result files, boxes in pixels as edges.

    Raises:
        UserError: a class without file, a file of another class, a malformed line, an image that
            is not among the ids.
    """
    paths = {name: result_path(folder, name) for name in label_map if name != 'background'}
    known = ', '.join(paths)
    for path in sorted(pathlib.Path(folder).glob('comp4_det_test_*.txt')):
        if path not in paths.values():
            raise UserError(f'{path}: the data has no such class, it has {known}; take the file '
                            f'away, or give the --data-folder that it belongs to')
    number_of, images, rows, labels = {name: i for i, name in enumerate(ids)}, [], [], []
    for name, path in paths.items():
        if not path.is_file():
            raise UserError(f'{path}: no such file; each class needs one, an empty one if nothing '
                            f'was found')
        lines = path.read_text(encoding='utf-8', errors='replace').splitlines()
        for line_number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            id_, *numbers = line.rsplit(None, 5)
            if id_ not in number_of:
                raise UserError(f'{path}, line {line_number}: image {id_[:80]!r} is not in the '
                                f'TEST list; give the --data-folder that the files belong to')
            rows.append(read_numbers(numbers, f'{path}, line {line_number}'))
            images.append(number_of[id_])
            labels.append(label_map[name])
    rows = torch.tensor(rows, dtype=torch.float64).view(-1, 5)
    return Detections(torch.tensor(images, dtype=torch.int64), rows[:, 1:] - FROM_1,
                      torch.tensor(labels, dtype=torch.int64), rows[:, 0])


def read_numbers(words, where):
    """The score and the four corners of a line; a UserError if they are not there."""
    try:
        numbers = list(map(float, words))
    except ValueError:
        numbers = []
    if len(numbers) != 5 or not all(map(math.isfinite, numbers)):
        raise UserError(f'{where}: {" ".join(words)[:80]!r} is not `score xmin ymin xmax ymax`; '
                        f'correct it')
    return numbers


# --------------------------------------------------------------------------------------------------
# Curves
# --------------------------------------------------------------------------------------------------


def draw_precision_recall(judged, label_map, path):
    """Draw precision over recall, a line a class, best first, into an image file."""
    known = [(average_precision(mine.correct, mine.wrong, mine.n_objects), name, mine)
             for name, mine in judged.items() if mine.n_objects]
    known.sort(key=lambda row: -row[0])
    n_columns = math.ceil(len(known) / 30) or 1
    figure = Figure(figsize=(8 + 2 * n_columns, 7), layout='constrained')
    axes = figure.subplots()
    colors = distinct_colors(label_map)
    for ap, name, mine in known:
        n_correct, n_wrong = mine.correct.cumsum(0), mine.wrong.cumsum(0)
        # Where a further object is found; between two such points the precision only falls.
        n_correct, n_wrong = n_correct[mine.correct], n_wrong[mine.correct]
        axes.plot((n_correct / mine.n_objects).tolist(),
                  (n_correct / (n_correct + n_wrong)).tolist(), color=colors[name],
                  label=f'{name} {ap:.4f}')
    axes.set_xlabel('recall: share of the objects that are found')
    axes.set_ylabel('precision: share of the detections that are right')
    axes.set_xlim(0, 1)
    axes.set_ylim(0, 1.02)
    axes.grid(alpha=0.3)
    if known:
        figure.legend(loc='outside right upper', ncols=n_columns, title='AP (07)')
    with write_beside(path) as beside:
        figure.savefig(beside, dpi=100)


# --------------------------------------------------------------------------------------------------
# Mistakes
#
# The kinds of Hoiem et al., Diagnosing Error in Object Detectors (2012), with duplicates on their
# own: from an overlap of 0.1 on, a false detection is taken to mean the object that it overlaps.
# --------------------------------------------------------------------------------------------------

MISTAKES_A_PAGE = 16
LOOKED_AT = 5_000   # false detections, by falling score
TITLES = {
    'duplicate': 'Found twice: the object has a better detection',
    'overlap': 'Bad box: overlaps an object of its class by 0.1 to 0.5',
    'class': 'Wrong class: overlaps most with an object of another class',
    'background': 'Nothing there: overlaps no object by 0.1',
    'missed': 'Missed: the largest objects without a detection',
}


def find_mistakes(judged, detections, objects, operating_score):
    """The worst mistakes of each kind.

    Returns:
        {kind: rows}: of false detections the most confident ones, as row numbers of detections;
        'missed': the largest objects not found from the operating score on, as those of objects.
    """
    mistakes = {kind: [] for kind in TITLES}
    wrong = torch.cat([mine.rows[mine.wrong] for mine in judged.values()]).tolist()
    is_duplicate = {row for mine in judged.values()
                    for row in mine.rows[mine.wrong & (mine.match >= 0)].tolist()}
    wrong.sort(key=detections.scores.tolist().__getitem__, reverse=True)
    for row in wrong[:LOOKED_AT]:
        kind = 'duplicate' if row in is_duplicate else kind_of(row, detections, objects)
        mistakes[kind].append(row)

    found = torch.zeros(len(objects.image), dtype=torch.bool)
    for mine in judged.values():
        found[mine.match[mine.correct & (mine.scores >= operating_score)]] = True
    missed = (~found & ~objects.difficult).nonzero().flatten()
    sides = objects.boxes[missed, 2:] - objects.boxes[missed, :2]
    mistakes['missed'] = missed[sides.prod(dim=1).argsort(descending=True)].tolist()
    return {kind: rows[:MISTAKES_A_PAGE] for kind, rows in mistakes.items()}


def kind_of(row, detections, objects):
    """The kind of a false detection that is no duplicate."""
    image = detections.image[row]
    there = slice(*torch.searchsorted(objects.image, torch.stack([image, image + 1])).tolist())
    overlap = find_jaccard_overlap(detections.boxes[row:row + 1].double(),
                                   objects.boxes[there].double()).flatten()
    if len(overlap) == 0 or overlap.max() < 0.1:
        return 'background'
    mine = objects.labels[there] == detections.labels[row]
    return 'overlap' if mine[overlap == overlap.max()].any() else 'class'


def draw_mistakes(judged, detections, objects, dataset, operating_score, folder):
    """Draw a page of each kind of mistake: `mistakes_{kind}.png`. True boxes are white."""
    mistakes = find_mistakes(judged, detections, objects, operating_score)
    names = {label: name for name, label in dataset.label_map.items()}
    colors = distinct_colors(dataset.label_map)
    for kind, rows in mistakes.items():
        of = objects if kind == 'missed' else detections
        tiles = []
        for row in rows:
            i = int(of.image[row])
            image = read_image(dataset.images[i])
            scale = TILE / max(image.size)
            tile = image.resize([max(1, round(scale * side)) for side in image.size])
            draw = ImageDraw.Draw(tile)
            for box in (objects.boxes[objects.image == i] * scale).tolist():
                draw.rectangle(box, outline='white', width=2)
            name, box = names[int(of.labels[row])], of.boxes[row] * scale
            if kind == 'missed':
                draw.rectangle(box.tolist(), outline='red', width=4)
            else:
                draw_objects(tile, {'boxes': box[None], 'labels': [name],
                                    'scores': of.scores[row:row + 1]}, colors, suppress=())
            tiles.append((tile, f'{pathlib.Path(dataset.images[i]).name}: {name}'))
        with write_beside(pathlib.Path(folder) / f'mistakes_{kind}.png') as beside:
            make_page(TITLES[kind], tiles).save(beside)


TILE, LINE = 320, 24    # pixels


def make_page(title, tiles):
    """A picture of (image, caption) pairs, four in a row, under a title."""
    font = ImageFont.load_default(16)
    n_rows = math.ceil(len(tiles) / 4)
    page = Image.new('RGB', (4 * TILE, 2 * LINE + n_rows * (TILE + LINE)), 'black')
    draw = ImageDraw.Draw(page)
    draw.text((8, LINE // 2), title if tiles else f'{title}. None.', fill='white', font=font)
    for number, (image, caption) in enumerate(tiles):
        x, y = number % 4 * TILE, 2 * LINE + number // 4 * (TILE + LINE)
        page.paste(image, (x, y + LINE))
        draw.text((x + 4, y + 2), caption, fill='white', font=font)
    return page
