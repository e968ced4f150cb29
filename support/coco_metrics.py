"""COCO's average precision and recall, calculated by pycocotools."""

import contextlib
import io
import math

import torch

from support.coco_lists import make_results
from utils import concatenate_images

MAX_DETECTIONS = 100    # per image and class, the most confident ones; COCO ignores the others

# Average precision and recall (AR) by IoU threshold; by area of the objects, below 32 x 32 pixels,
# above 96 x 96, and between; AR by number of detections per image and class.
SUMMARY = ('AP 0.5:0.95', 'AP 0.5', 'AP 0.75', 'AP small', 'AP medium', 'AP large',
           'AR 1', 'AR 10', 'AR 100', 'AR small', 'AR medium', 'AR large')


def coco_average_precision(detections, ground_truth, label_map):
    """Calculate COCO's average precision over all classes, for objects of any size.

    Difficult objects become COCO's ignored objects: a detection that is matched to one is neither
    a true nor a false positive. By COCO's rule that goes for one detection of each such object,
    and an object that is not ignored is preferred at any sufficient IoU.

    Args:
        detections, ground_truth: `Detections` and `GroundTruth` of the same images.

    Returns:
        {'AP 0.5:0.95': AP, 'AP 0.5': AP, 'AP 0.75': AP} by IoU threshold, means over the classes
        that have objects; NaN if none has.
    """
    from pycocotools.cocoeval import COCOeval  # slow to import, and only needed here

    n_images = len(ground_truth.boxes)
    image, boxes, labels, difficult = concatenate_images(*ground_truth)
    # pycocotools overwrites `ignore` with `iscrowd`, and calculates IoU with a crowd in another
    # way, without the union. It also ignores objects whose area is outside of the range below,
    # and uses no other area.
    area = torch.where(difficult.bool(), -1, 1)
    truth = make_coco_data(n_images, label_map, image, boxes, labels,
                           area=area, iscrowd=torch.zeros_like(area))
    image, boxes, labels, scores = concatenate_images(*detections)
    detected = make_coco_data(n_images, label_map, image, boxes, labels,
                              area=torch.ones_like(image), score=scores)
    with contextlib.redirect_stdout(io.StringIO()):  # it prints at every step
        truth.createIndex()
        detected.createIndex()
        run = COCOeval(truth, detected, 'bbox')
        run.params.areaRng, run.params.areaRngLbl = [[0, 1e10]], ['all']
        run.params.maxDets = [MAX_DETECTIONS]
        run.evaluate()
        run.accumulate()
    precision = run.eval['precision'][..., 0, 0]    # (10 IoU thresholds, 101 recalls, classes)
    precision = precision[:, :, (precision > -1).all(axis=(0, 1))]  # -1: a class without objects
    by_threshold = precision.mean(axis=(1, 2)).tolist() if precision.size else [math.nan] * 10
    return {'AP 0.5:0.95': sum(by_threshold) / 10, 'AP 0.5': by_threshold[0],
            'AP 0.75': by_threshold[5]}


def coco_summary(detections, data, label_map):
    """Calculate COCO's twelve numbers, with crowds and ranges of areas.

    Args:
        detections: `Detections` in pixels.
        data: CocoData of the same images.

    Returns:
        {name: value} in COCO's order, NaN where there are no objects, such as none of that area.
    """
    from pycocotools.coco import COCO  # slow to import, and only needed here
    from pycocotools.cocoeval import COCOeval

    truth, detected = COCO(), COCO()
    images = [{'id': image['id']} for image in data.images]
    categories = [{'id': category_id} for category_id in data.categories]
    objects = [{**row, 'image_id': image_id} for image_id, rows in data.annotations.items()
               for row in rows]
    found = make_results(detections, data, label_map)
    for row in found:
        row['area'] = row['bbox'][2] * row['bbox'][3]
    with contextlib.redirect_stdout(io.StringIO()):
        for coco, rows in ((truth, objects), (detected, found)):
            for number, row in enumerate(rows, 1):  # 0 means "not matched" there
                row['id'] = number
            coco.dataset = {'images': images, 'categories': categories, 'annotations': rows}
            coco.createIndex()
        run = COCOeval(truth, detected, 'bbox')
        run.evaluate()
        run.accumulate()
        run.summarize()
    return {name: math.nan if value == -1 else float(value)
            for name, value in zip(SUMMARY, run.stats, strict=True)}


def make_coco_data(n_images, label_map, image, boxes, labels, **columns):
    """Build a `pycocotools.coco.COCO` of detections or objects.

    Args:
        image, boxes, labels: (n,) index of the image, (n, 4) corners, (n,).
        columns: further columns by name, (n,).
    """
    from pycocotools.coco import COCO  # slow to import, and only needed here

    x_min, y_min, x_max, y_max = boxes.double().unbind(1)
    boxes = torch.stack([x_min, y_min, (x_max - x_min).clamp(min=0), (y_max - y_min).clamp(min=0)],
                        dim=1)
    columns = {'image_id': image, 'category_id': labels, 'bbox': boxes, **columns}
    data = COCO()
    data.dataset = {
        'images': [{'id': i} for i in range(n_images)],
        'categories': [{'id': label} for name, label in label_map.items() if name != 'background'],
        # Numbered from 1: 0 means "not matched" there.
        'annotations': [dict(zip(('id', *columns), values)) for values in zip(
            range(1, len(boxes) + 1), *(column.tolist() for column in columns.values()))],
    }
    return data
