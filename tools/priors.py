"""Measure how well the priors fit the objects of a data set, to choose network and priors.

    python -m tools.priors --data-folder data

prints for each class the percentage of objects that overlap some prior by an IoU of 0.5 or more.
Each of the others has a single positive prior (see `MultiBoxLoss.match()`), and so learns slowly.
The images are those of the TRAIN list, resized without augmentation.

Letters: O objects, P priors.
"""

import dataclasses

import torch
import tyro
from tqdm import tqdm

from model import SSD300, SSD512
from support.data_lists import read_lists
from support.errors import UserError, exit_on_user_error
from support.published import COCO_SCALES
from utils import cxcy_to_xy, find_jaccard_overlap, read_image_size

THRESHOLD = 0.5     # that of MultiBoxLoss


@dataclasses.dataclass
class Parameters:
    """Measure how well the priors fit the objects of a data set."""

    # Folder of the lists that create_data_lists.py wrote.
    data_folder: str = './data'


@exit_on_user_error
def main(parameters):
    """Print the table."""
    boxes, labels, label_map = read_boxes(parameters.data_folder)
    priors = {'ssd300': SSD300.create_prior_boxes(),
              'ssd300 --priors coco': SSD300.create_prior_boxes(COCO_SCALES[300]),
              'ssd512': SSD512.create_prior_boxes(),
              'ssd512 --priors coco': SSD512.create_prior_boxes(COCO_SCALES[512])}
    overlaps = {name: find_best_overlaps(boxes, cxcy) for name, cxcy in priors.items()}
    print(f'objects with an IoU of {THRESHOLD} or more with a prior, in percent')
    print(f'{"":20}  objects', *overlaps, sep='  ')
    for name, label in label_map.items():
        if (labels == label).any():
            print_row(name, labels == label, overlaps)
    print_row('all', labels > 0, overlaps)


def print_row(name, chosen, overlaps):
    """Print the number of the chosen objects, and the percentages of those that fit a prior."""
    percentages = [f'{100 * (best[chosen] >= THRESHOLD).float().mean().item():{len(heading)}.1f}'
                   for heading, best in overlaps.items()]
    print(f'{name:20}  {chosen.sum().item():7}', *percentages, sep='  ')


def read_boxes(data_folder):
    """Read the objects of the TRAIN list.

    Returns:
        For each image the boxes (O, 4), in fractions; the labels (all O,); the label map.
    """
    images, all_objects, label_map = read_lists(data_folder, 'TRAIN')
    if not images:
        raise UserError(f'the TRAIN list of {data_folder} is empty; give --train or --coco-train '
                        f'to create_data_lists.py')
    boxes, labels = [], []
    for image, objects in zip(tqdm(images), all_objects):
        size = torch.tensor(read_image_size(image))
        boxes.append(torch.tensor(objects['boxes']).view(-1, 4) / size.repeat(2))
        labels.append(torch.tensor(objects['labels'], dtype=torch.int64))
    return boxes, torch.cat(labels), label_map


def find_best_overlaps(boxes, priors_cxcy):
    """Return the highest IoU of each object with a prior.

    Args:
        boxes: (O, 4) for each image.
        priors_cxcy: (P, 4).

    Returns:
        (all O,)
    """
    priors = cxcy_to_xy(priors_cxcy)
    return torch.cat([find_jaccard_overlap(image_boxes, priors).amax(dim=1)
                      for image_boxes in boxes])


if __name__ == '__main__':
    main(tyro.cli(Parameters))
