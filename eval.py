"""Evaluate a checkpoint: the average precision of every class and their mean, by VOC 2007's rule.

    python eval.py --data-folder data --checkpoint checkpoint_ssd300.pth.tar
    torchrun --nproc-per-node=8 eval.py --data-folder data --checkpoint checkpoint_ssd300.pth.tar
"""

import dataclasses
import math

import torch
import tyro
from tqdm import tqdm

from datasets import PascalVOCDataset, make_test_loader
from machine import (
    default_workers,
    full_float32,
    gather_from_processes,
    join_processes,
    process_number,
)
from model import SSD300
from utils import (
    UserError,
    calculate_mAP,
    check_at_least,
    exit_on_user_error,
)

# The thresholds of the paper's evaluation (section 3.7 and its code). Another value of any of
# them gives an mAP that compares with nobody's: a min_score of 0.5 costs several points.
MIN_SCORE, MAX_OVERLAP, TOP_K = 0.01, 0.45, 200


@dataclasses.dataclass
class Parameters:
    """Evaluate a checkpoint of SSD300 on the TEST list of a data folder."""

    # --- data ---

    # Folder of the lists that create_data_lists.py wrote.
    data_folder: str = './data'
    # Processes that read images.
    workers: int = default_workers()

    # --- model ---

    # The checkpoint that train.py wrote.
    checkpoint: str = './checkpoint_ssd300.pth.tar'

    # --- bookkeeping ---

    # Images at a time; changes memory and speed, not the result.
    batch_size: int = 32
    # cpu, cuda, cuda:1, ...; auto is the GPU where there is one.
    device: str = 'auto'


def evaluate(test_loader, model):
    """Detect on all images of a loader, print the table of average precisions, and return it.

    Works in float32, on the model's device, always with the thresholds 0.01, 0.45 and 200.

    Args:
        test_loader: batches as `datasets.collate_fn` makes them; its data set keeps difficult
            objects, whose detections count neither way. Of several processes, each has the share
            of `datasets.make_test_loader()`, and the same result.
        model: an SSD300 with its `label_map`.

    Returns:
        ({class name: AP}, mAP), NaN for a class without objects.
    """
    average_precisions, mean = find_average_precisions(test_loader, model)
    if process_number() == 0:
        print_table(average_precisions, mean)
    return average_precisions, mean


@torch.no_grad()
def find_average_precisions(test_loader, model):
    """`evaluate()` without the printing."""
    was_training = model.training
    model.eval()
    device = model.priors_cxcy.device
    found, true = ([], [], []), ([], [], [])  # boxes, labels, and scores or difficulties
    bar = tqdm(test_loader, 'evaluating', unit='batch', leave=False, disable=process_number() > 0)
    for images, *targets in bar:
        with full_float32():
            predictions = model(model.normalize(images.to(device, non_blocking=True)))
        detections = model.detect_objects(*predictions, MIN_SCORE, MAX_OVERLAP, TOP_K)
        for lists, batch in ((found, detections), (true, targets)):
            for all_images, of_batch in zip(lists, batch):
                all_images.extend(tensor.cpu() for tensor in of_batch)
    model.train(was_training)

    shares = gather_from_processes((*found, *true))
    whole = [in_order(lists) for lists in zip(*shares)]
    return calculate_mAP(*whole, model.label_map)


def in_order(shares):
    """One list out of those of several processes, which took the images in turn."""
    whole = [None] * sum(map(len, shares))
    for number, share in enumerate(shares):
        whole[number::len(shares)] = share
    return whole


def print_table(average_precisions, mean):
    """A line a class, and the mean."""
    width = max(map(len, average_precisions), default=0) + 2
    for name, ap in average_precisions.items():
        print(f'{name:{width}}{"no objects" if math.isnan(ap) else f"{ap:.4f}"}')
    print(f'{"mAP":{width}}{mean:.4f}')


@exit_on_user_error
def main(parameters):
    """Evaluate as the parameters say."""
    p = parameters
    check_at_least(1, batch_size=p.batch_size)
    check_at_least(0, workers=p.workers)
    with join_processes(p.device) as device:
        model = SSD300.from_checkpoint(p.checkpoint)
        dataset = PascalVOCDataset(p.data_folder, 'TEST', keep_difficult=True)
        if len(dataset) == 0:
            raise UserError(f'{p.data_folder} has no images in its TEST list; make the lists with '
                            f'a split to test on')
        if dataset.label_map != model.label_map:
            raise UserError(f'{p.checkpoint} knows the classes {list(model.label_map)[1:]}, '
                            f'{p.data_folder} has {list(dataset.label_map)[1:]}; give the '
                            f'checkpoint that was trained on this data set')
        model = model.to(device, memory_format=torch.channels_last)
        evaluate(make_test_loader(dataset, p.batch_size, p.workers, device), model)


if __name__ == '__main__':
    main(tyro.cli(Parameters))
