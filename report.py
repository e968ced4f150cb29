"""What people look at while a network trains: the progress bar, `log.csv`, TensorBoard, curves.

All four show the same numbers, those of one row: the means since the row before it. Losses stay on
the device until a row is due.
"""

import csv
import math
import pathlib
import time

import torch
from matplotlib.figure import Figure
from PIL import ImageDraw
from torch.utils.tensorboard import SummaryWriter
from torchvision.transforms.functional import pil_to_tensor
from tqdm import tqdm

from datasets import read_image
from detect import draw_objects, predict
from machine import (
    gather_from_processes,
    n_processes,
    peak_memory,
    process_number,
    sum_over_processes,
)
from utils import UserError, distinct_colors, make_folder, write_beside

COLUMNS = ('iteration', 'loss', 'classes', 'boxes', 'rate', 'images_per_s', 'skipped', 'mAP')

# Steps in a row whose loss or gradient is not finite, before the run is given up.
MAX_SKIPPED_IN_A_ROW = 10
# Iterations after which the first speed is typical of the rest.
SETTLED = 50


class Report:
    """The rows of one run, shown in four places by the process that has number 0.

    Args:
        folder: for `log.csv`, TensorBoard's files and `curves.png`. Of an earlier `log.csv` the
            rows up to `start` are kept.
        start, end: iterations done, and to be done in all.
        device: of the losses.
        names_of: function from an iteration, counted from 0, to the images of its batch.
    """

    def __init__(self, folder, start, end, device, names_of):
        self.folder, self.start, self.end = pathlib.Path(folder), start, end
        self.device, self.names_of = device, names_of
        self.is_first = process_number() == 0
        self.rows = []      # of the whole run, each a dictionary of COLUMNS
        self.pending = []   # (3,) on the device for each iteration since the last row
        self.skipped = self.skipped_in_a_row = self.n_images = 0
        if self.is_first:
            make_folder(self.folder)
            if start > 0:
                self.rows = [row for row in read_log(self.folder / 'log.csv')
                             if row['iteration'] <= start]
            if self.rows:
                self.skipped = self.rows[-1]['skipped']
            write_log(self.folder / 'log.csv', self.rows)
            # What an earlier run showed after `start` is taken off the curves.
            self.board = SummaryWriter(str(self.folder), purge_step=start + 1 if start else 0)
        self.bar = tqdm(initial=start, total=end, unit='it', dynamic_ncols=True,
                        disable=not self.is_first)
        self.since = time.perf_counter()

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.bar.close()
        if self.is_first:
            self.board.close()
            if self.rows:
                draw_curves(self.rows, self.folder / 'curves.png')

    def add(self, conf_loss, loc_loss, finite, n_images):
        """Note one iteration, without waiting for its numbers.

        Args:
            conf_loss, loc_loss: the two parts, scalar tensors; of several processes their shares.
            finite: whether the step was taken, a scalar tensor.
            n_images: of the whole batch.
        """
        self.pending.append(torch.stack([conf_loss, loc_loss, finite.to(conf_loss)]).detach())
        self.n_images += n_images
        self.bar.update()

    def is_settled(self, iteration):
        """Whether the run has gone on for just so long that its speed says how long it will take.
        """
        return iteration - self.start == SETTLED and iteration < self.end

    def read(self, iteration, rate, wants_stop):
        """Make and show a row of what was noted since the last one. All processes come together.

        Args:
            iteration, rate: number of iterations done, and the rate of the last.
            wants_stop: whether this process was asked to stop.

        Returns:
            Whether any process was asked to stop.

        Raises:
            UserError: too many steps in a row were skipped.
        """
        noted = torch.stack(self.pending)                               # (iterations, 3)
        stop = noted.new_tensor([[wants_stop, 0, 0]])
        *noted, stop = sum_over_processes(torch.cat([noted, stop])).tolist()
        good = []
        for number, (conf, loc, finite) in enumerate(noted, iteration - len(noted) + 1):
            if finite == n_processes():
                good.append((conf, loc))
                self.skipped_in_a_row = 0
                continue
            self.skipped += 1
            self.skipped_in_a_row += 1
            if self.skipped_in_a_row == MAX_SKIPPED_IN_A_ROW:
                raise UserError(
                    f'loss or gradient was not finite {MAX_SKIPPED_IN_A_ROW} times in a row, the '
                    f'last time at iteration {number}, at a rate of {rate:.2g}: classification '
                    f'{conf}, localization {loc}; lower --lr, lengthen --warmup, or look at its '
                    f'images: {", ".join(self.names_of(number - 1))}')
        conf, loc = torch.tensor(good or [(math.nan, math.nan)]).mean(dim=0).tolist()
        seconds = time.perf_counter() - self.since
        row = dict.fromkeys(COLUMNS, math.nan) | {
            'iteration': iteration, 'loss': conf + loc, 'classes': conf, 'boxes': loc, 'rate': rate,
            'images_per_s': self.n_images / seconds, 'skipped': self.skipped}
        self.bar.set_postfix_str(describe(row))
        if self.is_settled(iteration):
            self.say(f'{SETTLED} iterations: {row["images_per_s"]:.1f} images/s, '
                     f'{tqdm.format_interval((self.end - iteration) * seconds / len(noted))} to go '
                     f'without evaluations, {peak_memory(self.device) / 1e9:.1f} GB at the peak')
        self.rows.append(row)
        self.pending, self.n_images = [], 0
        if self.is_first:
            with open(self.folder / 'log.csv', 'a', encoding='utf-8', newline='') as file:
                csv.writer(file).writerow(format_row(row))
            for column in COLUMNS[1:-1]:
                if not math.isnan(row[column]):
                    self.board.add_scalar(column, row[column], iteration)
            self.board.flush()
        return stop[0] > 0

    def go_on(self):
        """Count the next row's speed from here: saving and evaluating is not training."""
        self.since = time.perf_counter()

    def lacks_mAP(self):
        """Whether a resumed run's last row has none: it was stopped while it was evaluated."""
        lacks = self.rows and self.rows[-1]['iteration'] == self.start and math.isnan(
            self.rows[-1]['mAP'])
        return gather_from_processes(bool(lacks))[0]

    def add_mAP(self, mAP):
        """Add the mAP to the last row."""
        if self.is_first and self.rows:
            self.rows[-1]['mAP'] = mAP
            write_log(self.folder / 'log.csv', self.rows)
            self.board.add_scalar('mAP', mAP, self.rows[-1]['iteration'])
            self.board.flush()

    def say(self, text):
        """Print a line above the progress bar."""
        if self.is_first:
            tqdm.write(text)

    def best_mAP(self):
        """The highest mAP of the run so far, -inf without one."""
        return max((row['mAP'] for row in self.rows if not math.isnan(row['mAP'])),
                   default=-math.inf)

    def show_images(self, model, dataset, iteration, n_images=4):
        """Some images of a data set for TensorBoard: true boxes white, found ones coloured."""
        if not self.is_first:
            return
        colors = distinct_colors(model.label_map)
        for i in range(min(n_images, len(dataset))):
            image = read_image(dataset.images[i])
            image.info.clear()  # annotations count the stored pixels, whatever its orientation
            prediction, = predict([image], model=model)
            draw = ImageDraw.Draw(image)
            for box in dataset.objects[i]['boxes']:
                draw.rectangle(box, outline='white', width=3)
            draw_objects(image, prediction, colors, suppress=())
            self.board.add_image(f'test image {i + 1}', pil_to_tensor(image),
                                 iteration)


def describe(row):
    """A row as the progress bar shows it."""
    text = (f'loss {row["loss"]:.3f} = classes {row["classes"]:.3f} + boxes {row["boxes"]:.3f}, '
            f'lr {row["rate"]:.2g}, {row["images_per_s"]:.1f} images/s')
    return f'{text}, {row["skipped"]} steps skipped' if row['skipped'] else text


# --------------------------------------------------------------------------------------------------
# The log and its curves
# --------------------------------------------------------------------------------------------------


def format_row(row):
    """The cells of a row of `log.csv`; a number that there is not is an empty cell."""
    return ['' if math.isnan(row[column]) else
            f'{row[column]:d}' if column in ('iteration', 'skipped') else f'{row[column]:.6g}'
            for column in COLUMNS]


def write_log(path, rows):
    """Write a whole `log.csv`."""
    with write_beside(path) as beside, open(beside, 'w', encoding='utf-8', newline='') as file:
        csv.writer(file).writerows([COLUMNS, *map(format_row, rows)])


def read_log(path):
    """The rows of a `log.csv`; none if there is no such file. What a power cut tore is left out."""
    try:
        with open(path, encoding='utf-8', errors='replace', newline='') as file:
            lines = list(csv.reader(line.replace('\0', '') for line in file))[1:]
    except OSError:
        return []
    rows = []
    for cells in lines:
        try:
            numbers = [float(cell) if cell else math.nan for cell in cells]
        except ValueError:
            continue
        if len(numbers) == len(COLUMNS) and not math.isnan(numbers[0]):
            rows.append(dict(zip(COLUMNS, numbers)))
            for column in ('iteration', 'skipped'):
                rows[-1][column] = int(rows[-1][column])
    return rows


def draw_curves(rows, path):
    """Draw losses, mAP and rate over the iterations into an image file."""
    figure = Figure(figsize=(8, 9), layout='constrained')
    losses, scores, rates = figure.subplots(3, 1, sharex=True, height_ratios=(3, 2, 1))
    iterations = [row['iteration'] for row in rows]
    for column, label in (('loss', 'loss'), ('classes', 'classification'),
                          ('boxes', 'localization')):
        losses.plot(iterations, [row[column] for row in rows], label=label)
    losses.set_ylabel('loss')
    losses.legend()
    evaluated = [row for row in rows if not math.isnan(row['mAP'])]
    scores.plot([row['iteration'] for row in evaluated], [row['mAP'] for row in evaluated],
                marker='o')
    scores.set_ylabel('mAP on the test list')
    scores.set_ylim(0, 1)
    rates.plot(iterations, [row['rate'] for row in rows])
    rates.set_ylabel('learning rate')
    rates.set_xlabel('iterations')
    for axes in (losses, scores, rates):
        axes.grid(alpha=0.3)
    with write_beside(path) as beside:
        figure.savefig(beside, dpi=100)
