"""The image that the tutorial follows from its objects to its detections, drawn like the demo's.

    python -m tools.example --early demo/early.pth.tar --trained demo/checkpoint.pth.tar

writes img/example.json: what two networks of the demo predict for this image, one after a few
iterations and one that has learned the shapes. The pictures and the README need that file and no
checkpoint. Of each output it holds the rows that matter: positives, hard negatives and candidates.
"""

import dataclasses
import functools
import io
import json
import pathlib
import random

import torch
import tyro
from PIL import Image

from model import (
    N_PRIORS,
    SSD300,
    VISUALIZATION,
    MultiBoxLoss,
    create_prior_boxes,
    hard_negatives,
)
from support.checkpoints import load_checkpoint
from support.errors import UserError, atomic_write, exit_on_user_error
from tools.shapes import OUTLINES, draw_image
from utils import number_classes, transform

NUMBER, SEED = 284981, 0    # of the image, see tools/shapes.py: none of the 1,100 of the demo
LABEL_MAP = number_classes(sorted(OUTLINES))
PATH = pathlib.Path(__file__).resolve().parent.parent / 'img' / 'example.json'
BACKGROUND = 20.            # score of the background in the rows that the file does not hold


@dataclasses.dataclass
class Parameters:
    """Write what two networks predict for the tutorial's image."""

    # Checkpoint of a run of the demo after a few iterations, as 40.
    early: str = './demo/early.pth.tar'
    # Checkpoint of make demo.
    trained: str = './demo/checkpoint.pth.tar'
    # The file to write.
    output: str = './img/example.json'


@exit_on_user_error
def main(parameters):
    """Write the rows of both networks' outputs."""
    image, boxes, labels, _ = load_example()
    outputs = {}
    for name, path in (('early', parameters.early), ('trained', parameters.trained)):
        model = SSD300.from_checkpoint(path)
        if model.label_map != LABEL_MAP:
            raise UserError(f'{path} has the classes {sorted(model.label_map)}, not those of the '
                            'demo; give a checkpoint of make demo')
        with torch.no_grad():
            locs, scores = model(model.normalize(image.unsqueeze(0)))
        rows = select_rows(scores, boxes, labels).tolist()
        numbers = torch.cat([locs, scores], dim=2)[0, rows].double()        # (rows, 4 + C)
        outputs[name] = {'iteration': load_checkpoint(path)['iteration'], 'rows': rows,
                         'numbers': [[round(x, 3) for x in row] for row in numbers.tolist()]}
    with atomic_write(parameters.output) as temporary:
        temporary.write_text(json.dumps(outputs).replace('], [', '],\n['), encoding='utf-8')
    print(f'{sum(len(output["rows"]) for output in outputs.values())} rows, written to '
          f'{parameters.output}')


def select_rows(scores, boxes, labels):
    """Select positives, hard negatives and candidates of detection: indices of priors."""
    criterion = MultiBoxLoss(create_prior_boxes())
    true_classes = criterion.match([boxes], [labels])[1]                    # (1, P)
    positive = true_classes > 0
    candidate = (scores.softmax(dim=2)[:, :, 1:] > 0.9 * VISUALIZATION['min_score']).any(dim=2)
    return (positive | find_hard(scores, true_classes) | candidate)[0].nonzero().flatten()


def find_hard(scores, true_classes):
    """Find the hard negatives, as the loss does: (N, P) bool."""
    positive = true_classes > 0
    cross_entropy = torch.nn.functional.cross_entropy(
        scores.transpose(1, 2), true_classes, reduction='none')             # (N, P)
    return hard_negatives(cross_entropy, positive, 3 * positive.sum(dim=1, keepdim=True))


@functools.cache
def draw_example():
    """Draw the image: a PIL image that equals a JPEG file of the demo, and its objects."""
    image, objects = draw_image(random.Random(f'{SEED} {NUMBER}'))
    content = io.BytesIO()
    image.save(content, 'jpeg', quality=90)
    return Image.open(content).convert('RGB'), objects


def to_tensors(objects):
    """Convert the objects of `draw_image()` to the boxes, labels and difficulties of `transform()`.
    """
    names, boxes, difficulties, _ = zip(*objects)
    return (torch.tensor(boxes, dtype=torch.float32),
            torch.tensor([LABEL_MAP[name] for name in names]), torch.tensor(difficulties))


@functools.cache
def load_example():
    """Return an item like the demo's: image (3, 300, 300), boxes, labels, difficulties."""
    image, objects = draw_example()
    return transform(image, *to_tensors(objects), 'TEST')


def read_output(name):
    """Read a network's part of the file: iteration, rows and their numbers."""
    return json.loads(PATH.read_text(encoding='utf-8'))[name]


def count_iterations(name):
    """Return the number of iterations that a network, 'early' or 'trained', was trained for."""
    return read_output(name)['iteration']


def load_output(name):
    """Return what a network predicts for the example: locs (1, P, 4) and scores (1, P, C).

    In the rows that the file does not hold, all offsets are 0 and the class is the background.

    Args:
        name: 'early' or 'trained'.
    """
    output = read_output(name)
    numbers = torch.zeros(N_PRIORS, 4 + len(LABEL_MAP))
    numbers[:, 4] = BACKGROUND
    numbers[output['rows']] = torch.tensor(output['numbers'])
    return numbers[None, :, :4], numbers[None, :, 4:]


if __name__ == '__main__':
    main(tyro.cli(Parameters))
