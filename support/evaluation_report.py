"""What an evaluation prints and writes: the table, result files, curves, pictures of mistakes.

Boxes are in pixels of the original image here, as edges. Result files are those of the VOC devkit,
`comp4_det_test_{class}.txt`, one line per detection: `image_id score xmin ymin xmax ymax`. The
devkit counts pixels from 1 and includes both ends, so the edges become (x_min + 1, y_min + 1,
x_max, y_max).
"""

import contextlib
import math
import os
import pathlib
from concurrent.futures import ThreadPoolExecutor

import torch
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

from support.drawing import box_pixels, draw_objects
from support.errors import UserError, atomic_write
from utils import (
    Detections,
    GroundTruth,
    average_precision,
    concatenate_images,
    distinct_colors,
    find_jaccard_overlap,
    match_classes,
    nan_mean,
    read_image,
    read_image_size,
)

# --------------------------------------------------------------------------------------------------
# The table
# --------------------------------------------------------------------------------------------------


def print_table(average_precisions, mAP, matches, coco_numbers, operating_score):
    """Print one line per class, the means, COCO's average precision and the mAP of VOC 2007.

    Args:
        average_precisions, mAP: as `calculate_mAP()` returns them.
        matches: {class name: ClassMatches}.
        coco_numbers: as `coco_average_precision()` or `coco_summary()` returns them; empty: no such
            lines.
        operating_score: score threshold for the recall.
    """
    # `tqdm.write` prints to stdout, above a progress bar if one is shown.
    width = max(map(len, (*matches, 'COCO AP 0.5:0.95'))) + 2
    tqdm.write(f'{"":{width}}AP (07)     AP (area)   objects  difficult  detections  '
               f'recall at {operating_score:g}')
    areas, recalls, counts = {}, {}, {}
    for name, match in matches.items():
        areas[name] = average_precision(match.true_positive, match.false_positive,
                                        match.n_objects, 'area')
        recalls[name] = recall_at(match, operating_score)
        counts[name] = (match.n_objects, match.n_difficult, len(match.score))
        tqdm.write(format_line(name, width, average_precisions[name], areas[name], counts[name],
                               recalls[name]))
    sums = [sum(column) for column in zip(*counts.values())] or (0, 0, 0)
    tqdm.write(format_line('mean, sum', width, mAP, nan_mean(areas.values()), sums,
                           nan_mean(recalls.values())))
    for name, value in coco_numbers.items():
        tqdm.write(f'{f"COCO {name}":{width}}'
                   f'{"no objects" if math.isnan(value) else f"{value:.4f}"}')
    tqdm.write(f'{"mAP":{width}}{mAP:.4f}')


def format_line(name, width, ap, area, counts, recall):
    """Format a line of the table; `counts` are objects, difficult objects and detections."""
    n_objects, n_difficult, n_detections = counts
    cells = [f'{"no objects" if math.isnan(ap) else f"{ap:.4f}":12}',
             f'{"" if math.isnan(area) else f"{area:.4f}":12}',
             f'{n_objects:7}  {n_difficult:9}  {n_detections:10}  ',
             '' if math.isnan(recall) else f'{recall:.4f}']
    return f'{name:{width}}{"".join(cells)}'.rstrip()


def recall_at(match, min_score):
    """Calculate the recall of one class with the detections of at least this score."""
    if match.n_objects == 0:
        return math.nan
    # Whether a detection is a true positive depends only on detections of higher score, so the
    # matches of all detections hold for these.
    return int((match.true_positive & (match.score >= min_score)).sum()) / match.n_objects


# --------------------------------------------------------------------------------------------------
# Pixels and result files
# --------------------------------------------------------------------------------------------------

FROM_1 = torch.tensor([1., 1., 0., 0.], dtype=torch.float64)    # edges to the devkit's pixels
DECIMALS = 4    # of a pixel; a network's float32 fraction of 500 pixels is no finer
MAX_PIXEL = 1e6         # of a corner
MAX_NAME_BYTES = 200    # of a class


def read_image_sizes(paths):
    """Read width and height of image files from their headers: (n, 2) float64."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        sizes = list(pool.map(read_image_size, paths))
    return torch.tensor(sizes, dtype=torch.float64).view(-1, 2)


def to_pixels(detections, sizes):
    """Convert detections with boxes in fractions to pixels.

    Rounded as in result files, so that the average precision of both is the same in every digit.

    Args:
        sizes: (n, 2), width and height of each image.
    """
    factor = 10 ** DECIMALS
    boxes = [((boxes.double() * size.repeat(2) + FROM_1) * factor).round() / factor - FROM_1
             for boxes, size in zip(detections.boxes, sizes)]
    return Detections(boxes, detections.labels, [scores.double() for scores in detections.scores])


def ground_truth_in_pixels(dataset):
    """Take the ground truth of a data set from its lists: difficult objects too, in pixels."""
    return GroundTruth(
        [torch.tensor(objects['boxes'], dtype=torch.float64).view(-1, 4)
         for objects in dataset.objects],
        [torch.tensor(objects['labels'], dtype=torch.int64) for objects in dataset.objects],
        [torch.tensor(objects['difficulties'], dtype=torch.bool) for objects in dataset.objects])


def image_ids(paths):
    """List the image ids of result files: the files' names without their suffixes.

    Raises:
        UserError: a name with white space, which separates the columns; an image that is listed
            twice; two images of one name.
    """
    ids = {}
    for path in paths:
        image_id = pathlib.Path(path).stem
        if image_id.split() != [image_id]:
            raise UserError(f'{path!r} has white space in its name, which separates the columns '
                            f'of a result file; rename it')
        first = ids.get(image_id)
        if first == path:
            raise UserError(f'{path} is in the TEST list twice; make the lists again with '
                            f'create_data_lists.py')
        if first is not None:
            raise UserError(f'{first} and {path} have the same name; result files name an image by '
                            f'it alone: rename one, or evaluate their folders one by one')
        ids[image_id] = path
    return list(ids)


def result_paths(folder, label_map):
    """Compose the path of each class's result file: {class name: path}.

    Raises:
        UserError: a class name that cannot be part of a file's name.
    """
    names = [name for name in label_map if name != 'background']
    for name in names:
        # File systems take 255 bytes, and a temporary file has a longer name.
        if ('/' in name or os.sep in name or not name.isprintable()
                or len(name.encode()) > MAX_NAME_BYTES):
            raise UserError(f'class {name[:80]!r} cannot be part of the name of a result file; '
                            f'rename it')
    return {name: pathlib.Path(folder) / f'comp4_det_test_{name}.txt' for name in names}


def write_results(folder, detections, ids, label_map):
    """Write detections (boxes in pixels) as the devkit's result files, one per class.

    A class's detections keep their order, which decides between equal scores.
    """
    image, boxes, labels, scores = concatenate_images(*detections)
    boxes = boxes.double() + FROM_1
    with contextlib.ExitStack() as stack:   # no file is renamed before all are written
        for name, path in result_paths(folder, label_map).items():
            of_class = labels == label_map[name]
            rows = zip(image[of_class].tolist(), scores[of_class].tolist(),
                       boxes[of_class].tolist())
            temporary = stack.enter_context(atomic_write(path))
            with open(temporary, 'w', encoding='utf-8', errors='surrogateescape') as file:
                # Nine digits tell any two float32 numbers apart.
                file.writelines(
                    f'{ids[i]} {score:.9g} {box[0]:.{DECIMALS}f} {box[1]:.{DECIMALS}f} '
                    f'{box[2]:.{DECIMALS}f} {box[3]:.{DECIMALS}f}\n' for i, score, box in rows)


def read_results(folder, ids, label_map):
    """Read the detections of the devkit's result files, boxes in pixels as edges.

    Of a class's detections with equal scores, those of an earlier image come first, in an image
    those of an earlier line.

    Raises:
        UserError: a class without file, a file of another class, a malformed line, an image that
            is not among the ids.
    """
    paths = result_paths(folder, label_map)
    for path in sorted(pathlib.Path(folder).glob('comp4_det_test_*.txt')):
        if path not in paths.values():
            raise UserError(f'{path}: the data has no such class, it has {", ".join(paths)}; take '
                            f'the file away, or give the --data-folder that it belongs to')
    rows = {image_id: [] for image_id in ids}   # of each image: score, corners, label
    for name, path in paths.items():
        if not path.is_file():
            raise UserError(f'{path}: no such file; each class needs one, an empty one if nothing '
                            f'was detected')
        lines = path.read_text(encoding='utf-8', errors='surrogateescape').splitlines()
        for line_number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            image_id, *words = line.split()
            if image_id not in rows:
                raise UserError(f'{path}, line {line_number}: image {image_id[:80]!r} is not in '
                                f'the TEST list; give the --data-folder that the files belong to')
            numbers = parse_numbers(words, f'{path}, line {line_number}')
            rows[image_id].append([*numbers, label_map[name]])
    tensors = [torch.tensor(numbers, dtype=torch.float64).view(-1, 6) for numbers in rows.values()]
    return Detections([rows[:, 1:5] - FROM_1 for rows in tensors],
                      [rows[:, 5].long() for rows in tensors], [rows[:, 0] for rows in tensors])


def parse_numbers(words, place):
    """Parse the score and the four corners of a line; a UserError names `place`."""
    try:
        score, x_min, y_min, x_max, y_max = map(float, words)
        # Boxes may leave the image. One without area ends a pixel before its beginning, or a little
        # more when rounded.
        is_valid = (math.isfinite(score) and -MAX_PIXEL < x_min <= x_max + 1.001 < MAX_PIXEL
                    and -MAX_PIXEL < y_min <= y_max + 1.001 < MAX_PIXEL)
    except ValueError:
        is_valid = False
    if not is_valid:
        raise UserError(f'{place}: {" ".join(words)[:80]!r} is not `score xmin ymin xmax ymax` of '
                        f'a box in pixels; edit it')
    return score, x_min, y_min, x_max, y_max


# --------------------------------------------------------------------------------------------------
# Pictures: curves
# --------------------------------------------------------------------------------------------------


def draw_pictures(detections, ground_truth, dataset, operating_score, folder):
    """Draw the precision-recall curves and the worst mistakes into a folder; boxes in pixels."""
    matches = match_classes(detections, ground_truth, dataset.label_map)
    draw_precision_recall(matches, dataset.label_map,
                          pathlib.Path(folder) / 'precision_recall.png')
    draw_mistakes(matches, detections, ground_truth, dataset, operating_score, folder)


def draw_precision_recall(matches, label_map, path):
    """Draw precision over recall, one line per class, by falling AP, into an image file."""
    from matplotlib.figure import Figure  # slow to import, and only needed here

    curves = [(average_precision(match.true_positive, match.false_positive, match.n_objects),
               name, match) for name, match in matches.items() if match.n_objects]
    curves.sort(key=lambda curve: -curve[0])
    n_columns = math.ceil(len(curves) / 30) or 1
    figure = Figure(figsize=(8 + 2 * n_columns, 7), layout='constrained')
    axes = figure.subplots()
    colors = distinct_colors(label_map)
    for ap, name, match in curves:
        # At the true positives; between two of them the recall stays and the precision falls.
        n_true = match.true_positive.cumsum(0)[match.true_positive]
        n_false = match.false_positive.cumsum(0)[match.true_positive]
        axes.plot((n_true / match.n_objects).tolist(), (n_true / (n_true + n_false)).tolist(),
                  marker='.',   # a single one is a point
                  color=colors[name],
                  # Dollars would enclose a formula; a label that begins with _ would be hidden.
                  label=f'{ap:.4f} {name}'.replace('$', r'\$'))
    axes.set_xlabel('recall = TP / objects')
    axes.set_ylabel('precision = TP / (TP + FP)')
    axes.set_xlim(0, 1)
    axes.set_ylim(0, 1.02)
    axes.grid(alpha=0.3)
    if curves:
        figure.legend(loc='outside right upper', ncols=n_columns, title='AP (07)')
    with atomic_write(path) as temporary:
        figure.savefig(temporary, dpi=100)


# --------------------------------------------------------------------------------------------------
# Pictures: mistakes
#
# False positives by kind as in Hoiem et al., Diagnosing Error in Object Detectors (2012), with
# duplicates apart: from an IoU of 0.1 on a false positive belongs to the object that it overlaps.
# --------------------------------------------------------------------------------------------------

MISTAKES_PER_PAGE = 16
MAX_FALSE_POSITIVES = 5_000     # to find the kind of, by falling score
TITLES = {
    'duplicate': 'Duplicate: the object has a detection of higher score',
    'overlap': 'Inaccurate box: IoU of 0.1 to 0.5 with an object of its class',
    'class': 'Other class: highest IoU with an object of another class',
    'background': 'Background: IoU below 0.1 with every object',
    'missed': 'Missed: the largest objects without a detection',
}
TILE, LINE = 320, 24    # pixels


def draw_mistakes(matches, detections, ground_truth, dataset, operating_score, folder):
    """Draw one page per kind of mistake, `mistakes_{kind}.png`; the ground truth is white."""
    mistakes = find_mistakes(matches, detections, ground_truth, operating_score)
    class_names = {label: name for name, label in dataset.label_map.items()}
    colors = distinct_colors(dataset.label_map)
    for kind, rows in mistakes.items():
        image_index, boxes, labels, values = concatenate_images(
            *(ground_truth if kind == 'missed' else detections))
        tiles = []
        for row in rows:
            i, box, name = int(image_index[row]), boxes[row], class_names[int(labels[row])]
            image = read_image(dataset.images[i])
            scale = TILE / max(image.size)
            tile = image.resize([max(1, round(scale * side)) for side in image.size])
            draw = ImageDraw.Draw(tile)
            for true_box in (ground_truth.boxes[i] * scale).tolist():
                draw.rectangle(box_pixels(true_box), outline='white', width=2)
            if kind == 'missed':
                draw.rectangle(box_pixels((box * scale).tolist()), outline='red', width=4)
            else:
                draw_objects(tile, {'boxes': box[None] * scale, 'labels': [name],
                                    'scores': values[row:row + 1]}, colors)
            tiles.append((tile, f'{pathlib.Path(dataset.images[i]).name}: {name}'))
        with atomic_write(pathlib.Path(folder) / f'mistakes_{kind}.png') as temporary:
            make_page(TITLES[kind], tiles).save(temporary)


def find_mistakes(matches, detections, ground_truth, operating_score):
    """Find the worst mistakes of each kind.

    Returns:
        {kind: indices through all images}. Of false positives, the detections of highest score;
        'missed': the largest objects without a true positive of at least the operating score.
    """
    mistakes = {kind: [] for kind in TITLES}
    image, boxes, labels, scores = concatenate_images(*detections)
    false_positives = torch.cat([m.detection[m.false_positive] for m in matches.values()])
    has_object = torch.cat([m.assigned[m.false_positive] >= 0 for m in matches.values()])
    order = scores[false_positives].argsort(descending=True, stable=True)[:MAX_FALSE_POSITIVES]
    for row, is_duplicate in zip(false_positives[order].tolist(), has_object[order].tolist()):
        i = int(image[row])
        kind = 'duplicate' if is_duplicate else kind_of_false_positive(
            boxes[row], labels[row], ground_truth.boxes[i], ground_truth.labels[i])
        mistakes[kind].append(row)

    _, true_boxes, _, difficult = concatenate_images(*ground_truth)
    missed = ~difficult.bool()
    for match in matches.values():
        missed[match.assigned[match.true_positive & (match.score >= operating_score)]] = False
    missed = missed.nonzero().flatten()
    areas = (true_boxes[missed, 2:] - true_boxes[missed, :2]).prod(dim=1)
    mistakes['missed'] = missed[areas.argsort(descending=True, stable=True)].tolist()
    return {kind: rows[:MISTAKES_PER_PAGE] for kind, rows in mistakes.items()}


def kind_of_false_positive(box, label, true_boxes, true_labels):
    """Name the kind of a false positive with an IoU below 0.5 with the objects of its class.

    Args:
        box, label: (4,), scalar.
        true_boxes, true_labels: (O, 4), (O,), all objects of the image.
    """
    overlap = find_jaccard_overlap(box[None].double(), true_boxes.double()).flatten()   # (O,)
    if len(overlap) == 0 or overlap.max() < 0.1:
        return 'background'
    same_class = true_labels == label
    return 'overlap' if same_class[overlap == overlap.max()].any() else 'class'


def make_page(title, tiles):
    """Compose a picture of (image, caption) pairs, four per row, under a title."""
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
