"""The log of a training run: progress bar, `log.csv`, TensorBoard and curves.

All four show the same rows: means over the iterations since the previous row. Until a row is due,
losses stay on the device, since reading them would make the CPU wait for it.
"""

import csv
import math
import os
import pathlib
import time

import torch
from PIL import ImageDraw
from torch.utils.tensorboard import SummaryWriter
from torchvision.transforms.functional import pil_to_tensor, to_pil_image
from tqdm import tqdm

from model import VISUALIZATION
from support.device import peak_memory
from support.drawing import box_pixels, draw_objects
from support.errors import UserError, atomic_write, make_folder
from support.processes import all_gather, all_reduce_sum, get_rank, get_world_size
from utils import distinct_colors

COLUMNS = ('iteration', 'loss', 'classes', 'boxes', 'rate', 'images_per_s', 'skipped', 'mAP')

# A run is given up after so many steps in a row whose gradients are not finite.
MAX_SKIPPED_IN_A_ROW = 10
# The iteration, counted from the start, after which the remaining time is estimated.
ESTIMATE_AFTER = 50


class TrainingLog:
    """Log the rows of a run; rank 0 shows and writes them.

    All ranks call the methods alike. The log is a context manager: at its end the curves are drawn.

    Args:
        folder: for `log.csv`, TensorBoard's files and `curves.png`. Rows of an existing `log.csv`
            are kept up to `start`.
        start, end: number of iterations done, and of all.
        device: of the losses.
        batches: the run's `datasets.ShuffledBatches`.
        image_paths: of the training set, to name the images of a batch.
    """

    def __init__(self, folder, start, end, device, batches, image_paths):
        self.folder, self.start, self.end = pathlib.Path(folder), start, end
        self.device, self.batches, self.image_paths = device, batches, image_paths
        self.is_first = get_rank() == 0
        self.rows = []      # of the whole run, each a dictionary of COLUMNS
        self.pending = []   # (3,) on the device for each iteration since the last row
        self.n_images = 0   # since the last row
        self.n_skipped = self.n_skipped_in_a_row = 0
        if self.is_first:
            make_folder(self.folder)
            path = self.folder / 'log.csv'
            if start > 0:
                self.rows = [row for row in read_log(path) if row['iteration'] <= start]
            elif path.exists():
                os.replace(path, self.folder / 'log.earlier.csv')
            if self.rows:
                self.n_skipped = self.rows[-1]['skipped']
            write_log(path, self.rows)
            # TensorBoard hides what an earlier, longer run logged after `start`.
            self.board = SummaryWriter(str(self.folder), purge_step=start + 1 if start else 0)
        self.bar = tqdm(initial=start, total=end, unit='it', dynamic_ncols=True,
                        disable=not self.is_first)
        self.restart_clock()

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.bar.close()
        if self.is_first:
            self.board.close()
            if self.rows:
                draw_curves(self.rows, self.folder / 'curves.png')

    # --- one row ---

    def update(self, losses, is_finite, n_images):
        """Store the numbers of one iteration, without waiting for the device.

        Args:
            losses: (2,), classification and localization loss, of this rank.
            is_finite: whether the gradients were, a scalar tensor.
            n_images: in the whole batch.
        """
        self.pending.append(torch.cat([losses, is_finite.to(losses).unsqueeze(0)]))
        self.n_images += n_images
        self.bar.update()

    def write_row(self, iteration, lr, scale=1.):
        """Write a row with the means since the last one. All ranks call this together.

        Args:
            iteration: number of iterations done.
            lr: learning rate of the last one.
            scale: of the gradients now, see `support.gradient_scaling.make_scaler()`.

        Raises:
            UserError: too many steps in a row were skipped.
        """
        pending = all_reduce_sum(torch.stack(self.pending)).tolist()    # (iterations, 3)
        losses = self.select_finite(pending, iteration, lr, scale)
        conf_loss, loc_loss = torch.tensor(losses or [(math.nan, math.nan)]).mean(dim=0).tolist()
        seconds = time.perf_counter() - self.clock
        row = dict.fromkeys(COLUMNS, math.nan) | {
            'iteration': iteration, 'loss': conf_loss + loc_loss, 'classes': conf_loss,
            'boxes': loc_loss, 'rate': lr, 'images_per_s': self.n_images / seconds,
            'skipped': self.n_skipped}
        self.rows.append(row)
        self.bar.set_postfix_str(describe(row))
        if iteration - self.start == ESTIMATE_AFTER and iteration < self.end:
            remaining = tqdm.format_interval((self.end - iteration) * seconds / len(pending))
            self.print(f'{ESTIMATE_AFTER} iterations: {row["images_per_s"]:.1f} images/s, '
                       f'{remaining} to go without evaluations, '
                       f'{peak_memory(self.device) / 1e9:.1f} GB at the peak')
        if self.is_first:
            try:
                with open(self.folder / 'log.csv', 'a', encoding='utf-8', newline='') as file:
                    csv.writer(file).writerow(format_row(row))
            except OSError as error:
                raise UserError(f'{self.folder} cannot be written ({error}); free some space, and '
                                f'resume with --resume auto') from error
            for column in COLUMNS[1:-1]:
                if not math.isnan(row[column]):
                    self.board.add_scalar(column, row[column], iteration)
            self.board.flush()
        self.pending, self.n_images = [], 0

    def select_finite(self, pending, iteration, lr, scale):
        """Select the losses of the steps that were taken, and count the others.

        Args:
            pending: for each iteration the sums over the ranks of the two losses and `is_finite`.
            iteration, lr, scale: as in `write_row()`.

        Returns:
            A list of (classification loss, localization loss).
        """
        losses = []
        for number, (conf_loss, loc_loss, n_finite) in enumerate(pending,
                                                                 iteration - len(pending) + 1):
            if n_finite == get_world_size():
                losses.append((conf_loss, loc_loss))
                self.n_skipped_in_a_row = 0
                continue
            self.n_skipped += 1
            # Gradients of a finite loss overflow until the scale has been halved often enough.
            if scale > 1 and math.isfinite(conf_loss + loc_loss):
                continue
            self.n_skipped_in_a_row += 1
            if self.n_skipped_in_a_row == MAX_SKIPPED_IN_A_ROW:
                paths = [self.image_paths[i] for _, i in self.batches.batch(number - 1)]
                raise UserError(
                    f'loss or gradient was not finite {MAX_SKIPPED_IN_A_ROW} times in a row, the '
                    f'last time at iteration {number}, at a learning rate of {lr:.2g}: '
                    f'classification {conf_loss}, localization {loc_loss}; lower --lr, lengthen '
                    f'--warmup, or look at its images: {", ".join(paths)}')
        return losses

    def restart_clock(self):
        """Start the time of the next row: saving and evaluating does not count as training."""
        self.clock = time.perf_counter()

    def print(self, text):
        """Print a line above the progress bar."""
        if self.is_first:
            tqdm.write(text)

    # --- evaluations ---

    def lacks_mAP(self):
        """Return whether a resumed run was stopped after the last row, during its evaluation."""
        lacks = self.rows and self.rows[-1]['iteration'] == self.start and math.isnan(
            self.rows[-1]['mAP'])
        return all_gather(bool(lacks))[0]

    def best_mAP(self):
        """Return the highest mAP of the run so far, -inf if there is none."""
        return max((row['mAP'] for row in self.rows if not math.isnan(row['mAP'])),
                   default=-math.inf)

    def add_mAP(self, mAP):
        """Add the mAP to the last row."""
        if self.is_first and self.rows:
            self.rows[-1]['mAP'] = mAP
            write_log(self.folder / 'log.csv', self.rows)
            self.board.add_scalar('mAP', mAP, self.rows[-1]['iteration'])
            self.board.flush()

    def add_images(self, model, dataset, iteration, n_images=4):
        """Show detections in the first images of a data set in TensorBoard."""
        if self.is_first:
            for i in range(min(n_images, len(dataset))):
                image = draw_detections(model, *dataset[i][:2])
                self.board.add_image(f'test image {i + 1}', pil_to_tensor(image), iteration)


def describe(row):
    """Format a row for the progress bar."""
    text = (f'loss {row["loss"]:.3f} = classes {row["classes"]:.3f} + boxes {row["boxes"]:.3f}, '
            f'lr {row["rate"]:.2g}, {row["images_per_s"]:.1f} images/s')
    return f'{text}, {row["skipped"]} steps skipped' if row['skipped'] else text


@torch.no_grad()
def draw_detections(model, image, boxes):
    """Draw ground truth, in white, and detections onto an image as the network sees it.

    Args:
        model: an SSD300 with its `label_map`; its mode is the same afterwards.
        image: (3, 300, 300) uint8.
        boxes: (O, 4), ground truth, corners in fractions.

    Returns:
        A PIL image.
    """
    was_training = model.training
    model.eval()
    (detected_boxes,), (labels,), (scores,) = model.detect_in_batch(image.unsqueeze(0),
                                                                    **VISUALIZATION)
    model.train(was_training)

    picture = to_pil_image(image)
    draw = ImageDraw.Draw(picture)
    for box in (boxes * picture.width).tolist():
        draw.rectangle(box_pixels(box), outline='white', width=3)
    names = {index: name for name, index in model.label_map.items()}
    detections = {'boxes': detected_boxes.cpu() * picture.width,
                  'labels': [names[label] for label in labels.tolist()], 'scores': scores.cpu()}
    draw_objects(picture, detections, distinct_colors(model.label_map))
    return picture


# --------------------------------------------------------------------------------------------------
# log.csv and its curves
# --------------------------------------------------------------------------------------------------


def format_row(row):
    """Format the cells of a row of `log.csv`; a missing number is an empty cell."""
    return ['' if math.isnan(row[column]) else
            f'{row[column]:d}' if column in ('iteration', 'skipped') else f'{row[column]:.6g}'
            for column in COLUMNS]


def write_log(path, rows):
    """Write a whole `log.csv`."""
    with (atomic_write(path) as temporary,
          open(temporary, 'w', encoding='utf-8', newline='') as file):
        csv.writer(file).writerows([COLUMNS, *map(format_row, rows)])


def read_log(path):
    """Read the rows of a `log.csv`, without those that a power failure has cut off.

    Returns:
        A list of dictionaries of COLUMNS, empty if there is no such file.
    """
    try:
        with open(path, encoding='utf-8', errors='replace', newline='') as file:
            lines = list(csv.reader(line.replace('\0', '') for line in file))[1:]
    except OSError:
        return []
    rows = []
    for cells in lines:
        try:
            row = dict(zip(COLUMNS, (float(cell) if cell else math.nan for cell in cells),
                           strict=True))
            row |= {column: int(row[column]) for column in ('iteration', 'skipped')}
        except (ValueError, OverflowError):
            continue
        rows.append(row)
    return rows


def draw_curves(rows, path):
    """Draw losses, mAP and learning rate over the iterations into an image file."""
    from matplotlib.figure import Figure  # slow to import, and needed only at the end of a run

    figure = Figure(figsize=(8, 9), layout='constrained')
    loss_axes, mAP_axes, lr_axes = figure.subplots(3, 1, sharex=True, height_ratios=(3, 2, 1))
    iterations = [row['iteration'] for row in rows]
    for column, label in (('loss', 'loss'), ('classes', 'classification'),
                          ('boxes', 'localization')):
        loss_axes.plot(iterations, [row[column] for row in rows], label=label)
    loss_axes.set_ylabel('loss')
    loss_axes.legend()
    evaluated = [row for row in rows if not math.isnan(row['mAP'])]
    mAP_axes.plot([row['iteration'] for row in evaluated], [row['mAP'] for row in evaluated],
                  marker='o')
    mAP_axes.set_ylabel('mAP on the test list')
    mAP_axes.set_ylim(0, 1)
    lr_axes.plot(iterations, [row['rate'] for row in rows])
    lr_axes.set_ylabel('learning rate')
    lr_axes.set_xlabel('iterations')
    for axes in (loss_axes, mAP_axes, lr_axes):
        axes.grid(alpha=0.3)
    with atomic_write(path) as temporary:
        figure.savefig(temporary, dpi=100)
