"""Evaluate a checkpoint: average precision by the rules of VOC 2007, VOC 2010 and COCO.

    python eval.py --data-folder data --checkpoint checkpoint_ssd300.pth.tar
    python eval.py --results results --pictures pictures    # result files and pictures as well
    python eval.py --detections results                     # of result files, without the network
    python eval.py --precision bf16                         # also what bf16 costs in mAP
    python eval.py --checkpoint ssd300.onnx                 # a file that tools/export.py wrote
    torchrun --nproc-per-node=8 eval.py --data-folder data --checkpoint checkpoint_ssd300.pth.tar
"""

import dataclasses
from typing import Literal

import torch
import tyro
from tqdm import tqdm

from datasets import PascalVOCDataset, make_test_loader
from model import EVALUATION, SSD300, VISUALIZATION
from support.coco_lists import (
    read_evaluation,
    read_results as read_coco_results,
    write_results as write_coco_results,
)
from support.coco_metrics import coco_average_precision, coco_summary
from support.device import choose_precision, disable_tf32
from support.errors import (
    UserError,
    check_at_least,
    check_fractions,
    exit_on_user_error,
    make_folder,
)
from support.evaluation_report import (
    draw_pictures,
    ground_truth_in_pixels,
    image_ids,
    print_table,
    read_image_sizes,
    read_results,
    result_paths,
    to_pixels,
    write_results,
)
from support.onnx_network import OnnxNetwork, check_parameters, is_onnx
from support.processes import (
    all_gather,
    check_shared_memory,
    default_workers,
    get_rank,
    process_group,
)
from support.published import used_names
from utils import Detections, GroundTruth, calculate_mAP, match_classes


@dataclasses.dataclass
class Parameters:
    """Evaluate a checkpoint of SSD300 on the TEST list of a data folder."""

    # --- data ---

    # Folder of the lists that create_data_lists.py wrote.
    data_folder: str = './data'
    # Worker processes that read images.
    workers: int = dataclasses.field(default_factory=default_workers)

    # --- model ---

    # The checkpoint that train.py wrote, a published one, or an .onnx file of tools/export.py, in
    # its own precision.
    checkpoint: str = './checkpoint_ssd300.pth.tar'

    # --- output ---

    # Score threshold for the table's recall and for the missed objects in the pictures; 0.2 is
    # what detect.py draws. Average precision does not depend on it.
    operating_score: float = VISUALIZATION['min_score']
    # Folder for the devkit's result files, comp4_det_test_CLASS.txt; for data in COCO's format,
    # coco_results.json, which COCO's server takes. None: not written.
    results: str | None = None
    # Folder of such files to evaluate instead of a checkpoint.
    detections: str | None = None
    # Folder for pictures: precision-recall curves and the worst mistakes; none: not drawn.
    pictures: str | None = None

    # --- bookkeeping ---

    # Images per batch; changes memory and speed, not the result.
    batch_size: int = 32
    # cpu, cuda, cuda:1, ...; auto is the GPU where there is one.
    device: str = 'auto'
    # The table is that of float32. With bf16, fp16 or auto (what detect.py uses) objects are
    # detected once more, in this precision, and the difference of the mAP is printed.
    precision: Literal['auto', 'bf16', 'fp16', 'float32'] = 'float32'


# --------------------------------------------------------------------------------------------------
# Evaluating a model
# --------------------------------------------------------------------------------------------------


def evaluate(test_loader, model, operating_score=VISUALIZATION['min_score'], coco=True,
             autocast=None):
    """Evaluate a model with the images of a loader: print and return the average precision.

    Runs on the model's device, always with the thresholds EVALUATION of model.py.

    Args:
        test_loader: of a PascalVOCDataset that keeps difficult objects, resized for the model
            (`resize_for()`), as `datasets.make_test_loader()` makes it.
        model: an SSD300 with its `label_map`; its classes may be in another order than the data
            set's.
        operating_score: score threshold for the recall in the table.
        coco: add COCO's average precision to the table, about 25 s of CPU time for VOC07 test.
        autocast: context of the forward pass, for another precision than float32.

    Returns:
        ({class name: AP}, mAP) by the rule of VOC 2007, NaN for a class without objects; the same
        in every rank.
    """
    was_training, label_map = model.training, test_loader.dataset.label_map
    detections, ground_truth = find_detections(test_loader, model.eval(), autocast)
    model.train(was_training)
    coco_numbers = (coco_average_precision(detections, ground_truth, label_map)
                    if coco and get_rank() == 0 else {})
    return print_evaluation(detections, ground_truth, label_map, operating_score, coco_numbers)


@torch.no_grad()
def find_detections(test_loader, model, autocast=None):
    """Detect objects in all images of a loader with a model in evaluation mode; see `evaluate()`.

    Returns:
        `Detections` and `GroundTruth` of the images of all ranks in their order, boxes in
        fractions, labels those of the data set, on the CPU.
    """
    detected, annotated = [], []    # rows (n, 6) of each image
    for images, *targets in tqdm(test_loader, 'evaluating', unit='batch', leave=False,
                                 disable=get_rank() > 0):
        with autocast or disable_tf32():
            detections = model.detect_in_batch(images, **EVALUATION)
        detected += rows_per_image(*detections)
        annotated += rows_per_image(*targets)

    detected, annotated = gather_images(detected), gather_images(annotated)
    detections = Detections([rows[:, :4] for rows in detected],
                            [rows[:, 4].long() for rows in detected],
                            [rows[:, 5] for rows in detected])
    ground_truth = GroundTruth([rows[:, :4] for rows in annotated],
                               [rows[:, 4].long() for rows in annotated],
                               [rows[:, 5].bool() for rows in annotated])
    label_map = test_loader.dataset.label_map
    if label_map != model.label_map:    # another order, or COCO's published weights
        detections = relabel(detections, model.label_map, label_map)
    return detections, ground_truth


def rows_per_image(boxes, labels, values):
    """Join a batch's boxes, labels and scores (or difficulties) to rows (n, 6) per image, on CPU.

    One tensor for the whole batch is one copy from the device instead of three per image.
    """
    rows = torch.cat([torch.cat(boxes), torch.cat(labels)[:, None], torch.cat(values)[:, None]],
                     dim=1)
    return rows.cpu().split([len(tensor) for tensor in labels])


def gather_images(tensors):
    """Gather one tensor (n, 6) per image from all ranks, in the order of the images.

    Of w ranks, rank r has images r, r + w, r + 2 w, ... (`datasets.make_test_loader()`).
    """
    # One tensor per rank: a tensor that is a view is pickled with all of the memory it views.
    rows, n_rows = torch.cat([torch.zeros(0, 6), *tensors]), [len(tensor) for tensor in tensors]
    shares = [rows.split(n_rows) for rows, n_rows in all_gather((rows, n_rows))]
    n_images, world_size = sum(map(len, shares)), len(shares)
    return [shares[i % world_size][i // world_size] for i in range(n_images)]


def print_evaluation(detections, ground_truth, label_map, operating_score, coco_numbers):
    """Print the table of average precisions, in rank 0; return ({class name: AP}, mAP).

    `coco_numbers` are those of COCO's rules by name.
    """
    average_precisions, mAP = calculate_mAP(*detections, *ground_truth, label_map)
    if get_rank() == 0:
        matches = match_classes(detections, ground_truth, label_map)
        print_table(average_precisions, mAP, matches, coco_numbers, operating_score)
    return average_precisions, mAP


# --------------------------------------------------------------------------------------------------
# The script: result files and pictures as well
# --------------------------------------------------------------------------------------------------


@exit_on_user_error
def main(parameters):
    """Evaluate as the parameters say."""
    p = parameters
    check_at_least(1, batch_size=p.batch_size)
    check_at_least(0, workers=p.workers)
    check_fractions(operating_score=p.operating_score)
    if p.detections and p.results:
        raise UserError('--detections are already written; leave --results out')
    if p.detections and p.precision != 'float32':
        raise UserError('--detections are of one precision; leave --precision out')
    check_parameters(p.checkpoint, p.device, p.precision)
    if is_onnx(p.checkpoint) and p.precision == 'auto':
        raise UserError(f'{p.checkpoint} has only the precision that it was exported with; leave '
                        f'--precision out')
    with process_group('cpu' if p.detections or is_onnx(p.checkpoint) else p.device) as device:
        model = None if p.detections else load_model(p.checkpoint, device)
        dataset = PascalVOCDataset(p.data_folder, 'TEST', keep_difficult=True)
        check_dataset(p, model, dataset)
        coco = read_evaluation(p.data_folder, dataset.images, dataset.label_map)
        ids = image_ids(dataset.images) if coco is None and (p.results or p.detections) else None
        if coco is None and p.results:
            result_paths(p.results, dataset.label_map)  # raises now what writing them would
        for folder in filter(None, (p.results, p.pictures)):
            make_folder(folder)

        dtype = choose_precision(p.precision, device)
        if not p.detections:
            detections = detect_in_dataset(p, model, dataset, device)
            if dtype != torch.float32:
                less_precise = detect_in_dataset(p, model, dataset, device, dtype)
        elif coco is None:
            detections = read_results(p.detections, ids, dataset.label_map)
        else:
            detections = read_coco_results(p.detections, coco, dataset.label_map)
        if get_rank() > 0:
            return
        ground_truth = ground_truth_in_pixels(dataset)
        if p.results:
            if coco is None:
                write_results(p.results, detections, ids, dataset.label_map)
            else:
                write_coco_results(p.results, detections, coco, dataset.label_map)
            print(f'result files written to {p.results}')
        if p.pictures:
            draw_pictures(detections, ground_truth, dataset, p.operating_score, p.pictures)
            print(f'pictures written to {p.pictures}')
        coco_numbers = (coco_average_precision(detections, ground_truth, dataset.label_map)
                        if coco is None else coco_summary(detections, coco, dataset.label_map))
        _, mAP = print_evaluation(detections, ground_truth, dataset.label_map, p.operating_score,
                                  coco_numbers)
        if dtype != torch.float32:
            print_difference(mAP, less_precise, ground_truth, dataset.label_map, dtype)
        elif p.precision != 'float32':
            print(f'--precision {p.precision} is float32 on this device')


def load_model(path, device):
    """Load a checkpoint's model, or an ONNX file."""
    if is_onnx(path):
        return OnnxNetwork(path)
    return SSD300.from_checkpoint(path).to(device, memory_format=torch.channels_last)


def detect_in_dataset(p, model, dataset, device, dtype=torch.float32):
    """Detect objects in all images of a data set: `Detections` in pixels, with its labels."""
    check_shared_memory(p.workers, p.batch_size * 3 * model.input_size ** 2)
    dataset.resize_for(model)
    loader = make_test_loader(dataset, p.batch_size, p.workers, device)
    autocast = None if dtype == torch.float32 else torch.autocast(device.type, dtype)
    detections, _ = find_detections(loader, model, autocast)
    return to_pixels(detections, read_image_sizes(dataset.images))


def print_difference(mAP, detections, ground_truth, label_map, dtype):
    """Print how much the mAP of detections in another precision differs from float32's."""
    _, other = calculate_mAP(*detections, *ground_truth, label_map)
    print(f'in {dtype}: mAP {other:.4f}, float32 {mAP:.4f}, difference {other - mAP:+.4f}')


def relabel(detections, label_map, new_label_map):
    """Convert the labels of `Detections` by class name; drop those of other classes."""
    names = sorted(label_map, key=label_map.get)
    new_labels = torch.tensor([new_label_map.get(name, -1) for name in names])
    labels = [new_labels[old] for old in detections.labels]
    kept = [new >= 0 for new in labels]
    return Detections(*([tensor[rows] for tensor, rows in zip(tensors, kept)]
                        for tensors in (detections.boxes, labels, detections.scores)))


def check_dataset(p, model, dataset):
    """Raise a UserError for a data set without images or with other classes than the model's."""
    if len(dataset) == 0:
        raise UserError(f'{p.data_folder} has no images in its TEST list; make the lists with '
                        f'a split to test on')
    # Of the 91 indices of COCO's published weights 10 are of no class.
    if (model and dataset.label_map != model.label_map
            and dataset.label_map.keys() != set(used_names(model.label_map))):
        raise UserError(f'{p.checkpoint} was trained on the classes '
                        f'{used_names(model.label_map)[1:]}, {p.data_folder} has '
                        f'{list(dataset.label_map)[1:]}; give the checkpoint that was trained on '
                        f'this data set')


if __name__ == '__main__':
    main(tyro.cli(Parameters))
