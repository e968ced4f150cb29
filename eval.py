"""Evaluate a checkpoint: average precisions by the rules of VOC 2007, VOC 2010 and COCO.

    python eval.py --data-folder data --checkpoint checkpoint_ssd300.pth.tar
    python eval.py --results results --pictures pictures    # files and pictures as well
    python eval.py --detections results                     # of files, without the network
    torchrun --nproc-per-node=8 eval.py --data-folder data --checkpoint checkpoint_ssd300.pth.tar
"""

import dataclasses
import pathlib

import torch
import tyro
from tqdm import tqdm

from average_precision import (
    Detections,
    Objects,
    average_precisions,
    coco_average_precision,
    judge_classes,
)
from datasets import PascalVOCDataset, make_test_loader
from evaluation_report import (
    dataset_objects,
    draw_mistakes,
    draw_precision_recall,
    image_ids,
    in_pixels,
    print_table,
    read_results,
    read_sizes,
    write_results,
)
from machine import (
    default_workers,
    full_float32,
    gather_from_processes,
    join_processes,
    process_number,
)
from model import SSD300
from utils import UserError, check_at_least, exit_on_user_error, make_folder

# The thresholds of the paper's evaluation (section 3.7 and its code). Another value of any of
# them gives an mAP that compares with nobody's: a min_score of 0.5 costs several points.
MIN_SCORE, MAX_OVERLAP, TOP_K = 0.01, 0.45, 200
# Detections from this score on are what a person is shown, as by detect.py.
OPERATING_SCORE = 0.2


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

    # --- what is reported ---

    # The table's recall, and the missed objects in the pictures, are for detections from this
    # score on. 0.2 is what detect.py draws. No average precision depends on it.
    operating_score: float = OPERATING_SCORE
    # Folder for the devkit's result files, comp4_det_test_CLASS.txt; none: not written.
    results: str | None = None
    # Folder of such files to evaluate, without checkpoint and network.
    detections: str | None = None
    # Folder for pictures: precision-recall curves, and the worst mistakes.
    pictures: str | None = None

    # --- bookkeeping ---

    # Images at a time; changes memory and speed, not the result.
    batch_size: int = 32
    # cpu, cuda, cuda:1, ...; auto is the GPU where there is one.
    device: str = 'auto'


def evaluate(test_loader, model, operating_score=OPERATING_SCORE):
    """Detect on all images of a loader, print the table of average precisions, and return it.

    Works in float32, on the model's device, always with the thresholds 0.01, 0.45 and 200.

    Args:
        test_loader: batches as `datasets.collate_fn` makes them; its data set keeps difficult
            objects, whose detections count neither way. Of several processes, each has the share
            of `datasets.make_test_loader()`, and the same result.
        model: an SSD300 with its `label_map`.
        operating_score: what the table's recall is for.

    Returns:
        ({class name: AP}, mAP) by the rule of VOC 2007, NaN for a class without objects.
    """
    detections, objects, n_images = find_detections(test_loader, model)
    judged = judge_classes(detections, objects, model.label_map)
    if process_number() == 0:
        coco = coco_average_precision(detections, objects, n_images, model.label_map)
        print_table(judged, coco, operating_score)
    return average_precisions(judged)


def find_average_precisions(test_loader, model):
    """`evaluate()` without the printing, and without what only the table shows."""
    detections, objects, _ = find_detections(test_loader, model)
    return average_precisions(judge_classes(detections, objects, model.label_map))


@torch.no_grad()
def find_detections(test_loader, model):
    """Detect on all images of a loader; boxes in fractions, everything on the CPU.

    Returns:
        Detections, Objects and the number of images, of all processes together.
    """
    was_training = model.training
    model.eval()
    device = model.priors_cxcy.device
    found, true = [], []    # of each batch (rows, number of rows of each image)
    bar = tqdm(test_loader, 'evaluating', unit='batch', leave=False, disable=process_number() > 0)
    for images, *targets in bar:
        with full_float32():
            predictions = model(model.normalize(images.to(device, non_blocking=True)))
        found.append(pack(*model.detect_objects(*predictions, MIN_SCORE, MAX_OVERLAP, TOP_K)))
        true.append(pack(*targets))
    model.train(was_training)

    image, rows, n_images = join_shares(gather_from_processes(join_batches(found)))
    true_image, true_rows, _ = join_shares(gather_from_processes(join_batches(true)))
    return (Detections(image, rows[:, :4], rows[:, 4].long(), rows[:, 5]),
            Objects(true_image, true_rows[:, :4], true_rows[:, 4].long(), true_rows[:, 5].bool()),
            n_images)


def pack(boxes, labels, values):
    """The rows (n, 6) of a batch, on the CPU, and how many each image has.

    One tensor is one copy from the device, not three for each image.

    Args:
        boxes, labels, values: lists of a tensor an image; scores are values, or difficulties.
    """
    columns = torch.cat(boxes), torch.cat(labels)[:, None], torch.cat(values)[:, None]
    return torch.cat(columns, dim=1).cpu(), [len(some) for some in labels]


def join_batches(batches):
    """The same of all batches."""
    return (torch.cat([torch.zeros(0, 6), *(rows for rows, _ in batches)]),
            [count for _, counts in batches for count in counts])


def join_shares(shares):
    """The rows of several processes, which took the images in turn, in the images' order.

    Returns:
        image (n,), the number of each row's image, rows (n, 6), and the number of images.
    """
    image = torch.cat([
        torch.arange(len(counts)).repeat_interleave(torch.tensor(counts).long()) * len(shares)
        + number for number, (_, counts) in enumerate(shares)])
    order = image.argsort(stable=True)
    return (image[order], torch.cat([rows for rows, _ in shares])[order],
            sum(len(counts) for _, counts in shares))


def check_classes(p, model, dataset):
    """A UserError if the classes of a checkpoint are not those of the data set."""
    if dataset.label_map != model.label_map:
        raise UserError(f'{p.checkpoint} knows the classes {list(model.label_map)[1:]}, '
                        f'{p.data_folder} has {list(dataset.label_map)[1:]}; give the '
                        f'checkpoint that was trained on this data set')


def report(detections, dataset, p):
    """Write and print what the parameters ask for; boxes of the detections are in pixels."""
    objects = dataset_objects(dataset)
    judged = judge_classes(detections, objects, dataset.label_map)
    if p.pictures:
        folder = pathlib.Path(p.pictures)
        draw_precision_recall(judged, dataset.label_map, folder / 'precision_recall.png')
        draw_mistakes(judged, detections, objects, dataset, p.operating_score, folder)
        print(f'pictures written to {folder}')
    coco = coco_average_precision(detections, objects, len(dataset), dataset.label_map)
    print_table(judged, coco, p.operating_score)


@exit_on_user_error
def main(parameters):
    """Evaluate as the parameters say."""
    p = parameters
    check_at_least(1, batch_size=p.batch_size)
    check_at_least(0, workers=p.workers)
    if p.detections and p.results:
        raise UserError('--detections are already written; leave --results out')
    with join_processes('cpu' if p.detections else p.device) as device:
        model = None if p.detections else SSD300.from_checkpoint(p.checkpoint)
        dataset = PascalVOCDataset(p.data_folder, 'TEST', keep_difficult=True)
        if len(dataset) == 0:
            raise UserError(f'{p.data_folder} has no images in its TEST list; make the lists with '
                            f'a split to test on')
        ids = image_ids(dataset.images) if p.results or p.detections else None
        for folder in filter(None, (p.results, p.pictures)):
            make_folder(folder)
        if p.detections:
            detections = read_results(p.detections, ids, dataset.label_map)
        else:
            check_classes(p, model, dataset)
            model = model.to(device, memory_format=torch.channels_last)
            loader = make_test_loader(dataset, p.batch_size, p.workers, device)
            detections, _, _ = find_detections(loader, model)
            detections = in_pixels(detections, read_sizes(dataset.images))
        if process_number() > 0:
            return
        if p.results:
            write_results(p.results, detections, ids, dataset.label_map)
            print(f'result files written to {p.results}')
        report(detections, dataset, p)


if __name__ == '__main__':
    main(tyro.cli(Parameters))
