"""Export a checkpoint to one ONNX file, which programs in any language run without PyTorch.

    python -m tools.export checkpoint_ssd300.pth.tar ssd300.onnx
    python -m tools.export checkpoint_ssd300.pth.tar ssd300-int8.onnx --int8 --calibration-data data

Images go in and boxes come out: the file holds the normalization, the network and what
`SSD300.detect_objects()` does with its output. docs/export.md lists inputs, outputs and metadata.

Letters: N images in a batch, P priors, C classes without the background, M boxes that
non-maximum suppression keeps in the batch, n detections in the batch.
"""

import copy
import dataclasses
import json
import pathlib
import random
import tempfile

import onnx
import onnxscript
import torch
import tyro
from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_static
from onnxscript import FLOAT, INT64, opset18 as op
from torch import nn

from datasets import PascalVOCDataset
from model import MAX_CANDIDATES, MAX_SIZE_OFFSET, SSD300, VISUALIZATION
from support.errors import UserError, atomic_write, check_at_least, exit_on_user_error
from support.onnx_network import OnnxNetwork, is_onnx
from support.published import used_names
from utils import cxcy_to_xy, gcxgcy_to_cxcy


@dataclasses.dataclass
class Parameters:
    """Export a checkpoint to an ONNX file."""

    # The checkpoint that train.py wrote, or a published one.
    checkpoint: tyro.conf.Positional[str]
    # The file to write, .onnx.
    output: tyro.conf.Positional[str]

    # End at the network's output, offsets and scores before the softmax.
    raw: bool = False
    # Compute the convolutions with 8-bit integers: a quarter of the size, and faster on a CPU.
    int8: bool = False
    # Keep the weights in float16: half of the size. Faster on a GPU; a CPU computes in float32.
    fp16: bool = False
    # For int8, the folder of the lists that create_data_lists.py wrote; the range of the
    # activations is measured in images of its TRAIN list.
    calibration_data: str | None = None
    # Number of these images, sampled at random.
    calibration_images: int = 200


# --------------------------------------------------------------------------------------------------
# The graph: exported from PyTorch up to the boxes of all priors, then written in ONNX's operators
# --------------------------------------------------------------------------------------------------


class Decoder(nn.Module):
    """The part of detection whose shapes do not depend on what is detected."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, images):
        """Compute the boxes and probabilities of all priors, as `SSD300.detect_objects()` does.

        Args:
            images: (N, 3, 300, 300) uint8.

        Returns:
            boxes (N, P, 4), corners in fractions, and the probabilities (N, P, C) of all classes
            but the background.
        """
        locs, scores = compute_outputs(self.model, images)
        probabilities = scores.softmax(dim=2)
        is_finite = probabilities[:, :, 0].isfinite() & locs.isfinite().all(dim=2)      # (N, P)
        probabilities = probabilities.masked_fill(~is_finite.unsqueeze(2), 0)
        locs = torch.cat([locs[:, :, :2], locs[:, :, 2:].clamp(max=MAX_SIZE_OFFSET)], dim=2)
        boxes = cxcy_to_xy(gcxgcy_to_cxcy(locs, self.model.priors_cxcy))
        return boxes, probabilities[:, :, 1:]


class RawNetwork(Decoder):
    """The network from uint8 images to its output."""

    def forward(self, images):
        """Compute locs (N, P, 4) and scores (N, P, C + 1) of images (N, 3, 300, 300) uint8."""
        return compute_outputs(self.model, images)


def compute_outputs(model, images):
    """Compute the output of a network in float32, whatever the dtype of its weights."""
    images = model.normalize(images).to(model.base.conv1_1.weight.dtype)
    return [output.float() for output in model(images)]


@onnxscript.script(default_opset=op)
def select_detections(
        all_boxes: FLOAT[None, None, 4], all_scores: FLOAT[None, None, None],
        min_score: FLOAT, max_overlap: FLOAT, top_k: INT64
) -> tuple[FLOAT[None, 4], INT64[None], FLOAT[None], INT64[None]]:
    """Select the detections among the output of `Decoder`, in the order of `detect_objects()`.

    The code of this function is not run, but converted to a graph.
    """
    # At most 400 candidates per class and image. Others get a score that is below any threshold.
    class_scores = op.Transpose(all_scores, perm=[0, 2, 1])                     # (N, C, P)
    best_scores, best = op.TopK(class_scores, op.Reshape(MAX_CANDIDATES, [1]), sorted=0)
    candidate_scores = op.ScatterElements(op.Expand(-1.0, op.Shape(class_scores)), best,
                                          best_scores, axis=2)
    kept = op.NonMaxSuppression(all_boxes, candidate_scores, MAX_CANDIDATES,
                                op.Clip(max_overlap, 0.0, 1.0), min_score)      # (M, 3)

    # Back to one score for each prior and class, -1 for those that were not kept. Of equal scores
    # TopK takes the one of the lower index first, as the stable sort of detect_objects() does.
    index = op.Gather(kept, [0, 2, 1], axis=1)      # image, prior, class
    none_kept = op.Expand(-1.0, op.Shape(all_scores))
    kept_scores = op.ScatterND(none_kept, index, op.GatherND(all_scores, index))
    flat_scores = op.Flatten(kept_scores)                                       # (N, P * C)
    n_best = op.Min(top_k, op.Shape(kept, end=1), op.Shape(flat_scores, start=1))
    top_scores, top_index = op.TopK(flat_scores, n_best)                        # (N, n_best)

    # The rows of all images one after the other, each image's by falling score.
    row = op.Transpose(op.NonZero(top_scores >= 0.0))                           # (n, 2)
    scores = op.GatherND(top_scores, row)
    prior_and_class = op.GatherND(top_index, row)
    n_classes = op.Shape(all_scores, start=2)
    labels = prior_and_class % n_classes + 1
    image_indices = op.Gather(row, 0, axis=1)
    image_and_prior = op.Concat(op.Unsqueeze(image_indices, [1]),
                                op.Unsqueeze(prior_and_class / n_classes, [1]), axis=1)
    boxes = op.Clip(op.GatherND(all_boxes, image_and_prior), 0.0, 1.0)
    return boxes, labels, scores, image_indices


def export(model, raw=False):
    """Export an SSD300 to an ONNX model; without `raw`, up to the boxes of all priors.

    Args:
        model: on the CPU, in evaluation mode.
    """
    outputs = ['locs', 'scores'] if raw else ['all_boxes', 'all_scores']
    images = torch.zeros(2, 3, model.input_size, model.input_size, dtype=torch.uint8)
    program = torch.onnx.export(
        (RawNetwork if raw else Decoder)(model).eval(), (images,), dynamo=True, verbose=False,
        opset_version=18, input_names=['images'], output_names=outputs,
        dynamic_shapes={'images': {0: 'N'}})
    network = program.model_proto
    # Where each node was made in the source, with the paths of this computer.
    for item in (*network.graph.node, *network.graph.value_info):
        del item.metadata_props[:]
    return network


def append_detection(network):
    """Append `select_detections()` to the ONNX model of `export()`, in place."""
    selection = onnx.compose.add_prefix(
        select_detections.to_model_proto(ir_version=network.ir_version), 'selection/',
        rename_inputs=False, rename_outputs=False).graph
    graph, thresholds = network.graph, selection.input[2:]
    graph.node.extend(selection.node)
    graph.initializer.extend(selection.initializer)
    graph.input.extend(thresholds)
    # An initializer with the name of an input is the default of that input.
    graph.initializer.extend(
        onnx.helper.make_tensor(value.name, value.type.tensor_type.elem_type, (),
                                [VISUALIZATION[value.name]]) for value in thresholds)
    del graph.output[:]
    graph.output.extend(selection.output)


def describe(model):
    """Return what a program needs to know about an SSD300, as the metadata of its ONNX file."""
    # Thresholds as defaults, and names in the order of their labels, the background first.
    return {name: json.dumps(value) for name, value in {
        'class_names': sorted(model.label_map, key=model.label_map.get),
        'input_size': model.input_size, 'antialias': bool(model.antialias),
        **VISUALIZATION}.items()}


# --------------------------------------------------------------------------------------------------
# 8-bit integers
# --------------------------------------------------------------------------------------------------


class CalibrationImages(CalibrationDataReader):
    """Images as the input of an ONNX model, one at a time: uint8 tensors (3, 300, 300)."""

    def __init__(self, images):
        self.images = iter(images)

    def get_next(self):
        """Return the next input, None after the last."""
        image = next(self.images, None)
        return None if image is None else {'images': image[None].numpy()}


def sample_images(data_folder, n_images, model):
    """Sample images of a data folder's TRAIN list at random; they are not augmented."""
    dataset = PascalVOCDataset(data_folder, 'TRAIN', augment=False)
    if not len(dataset):
        raise UserError(f'{data_folder} has no images in its TRAIN list; make the lists with a '
                        f'split to train on')
    dataset.resize_for(model)
    indices = random.Random(0).sample(range(len(dataset)), min(n_images, len(dataset)))
    return (dataset[i][0] for i in indices)


def quantize(network, images):
    """Quantize the convolutions of an ONNX model to 8-bit integers.

    One scale per output channel of the weights and one per feature map, from the moving average
    of its lowest and highest values in the images. ReLU and max pooling between two convolutions
    take integers, too.

    Args:
        images: iterable of uint8 tensors (3, 300, 300).
    """
    # PyTorch's exporter has done what onnxruntime would otherwise ask for in a warning.
    onnx.helper.set_model_props(network, {'onnx.quant.pre_process': 'onnxruntime.quant'})
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder, 'quantized.onnx')
        quantize_static(network, path, CalibrationImages(images),
                        op_types_to_quantize=['Conv', 'Relu', 'MaxPool'], per_channel=True,
                        activation_type=QuantType.QUInt8, weight_type=QuantType.QInt8,
                        # Weights of 7 bits: without VNNI, x86 adds pairs of 8-bit products in
                        # 16 bits, which overflow.
                        reduce_range=True, extra_options={'CalibMovingAverage': True})
        return onnx.load(path)


# --------------------------------------------------------------------------------------------------
# The script
# --------------------------------------------------------------------------------------------------


@exit_on_user_error
def main(parameters):
    """Export as the parameters say, and compare the file with the checkpoint."""
    p = parameters
    check_at_least(1, calibration_images=p.calibration_images)
    if not is_onnx(p.output):
        raise UserError(f'{p.output} does not end with .onnx; name the file to write so')
    if p.int8 != bool(p.calibration_data):
        raise UserError('--int8 and --calibration-data DATA_FOLDER need each other; give both')
    if p.int8 and p.fp16:
        raise UserError('--int8 and --fp16 exclude each other; give one of them')
    model = SSD300.from_checkpoint(p.checkpoint)
    images = sample_images(p.calibration_data, p.calibration_images, model) if p.int8 else None
    with atomic_write(p.output) as temporary:   # fails now if the folder cannot be written
        write_onnx(temporary, convert_to_float16(model) if p.fp16 else model, images, p.raw)
    size = pathlib.Path(p.output).stat().st_size
    n_classes = len(used_names(model.label_map)) - 1
    print(f'{p.output}: {size / 1e6:.1f} MB, {n_classes} classes')
    if not p.raw:
        compare(model, p.output)


def convert_to_float16(model):
    """Return a copy of an SSD300 whose convolutions are in float16."""
    model = copy.deepcopy(model)
    for part in (model.base, model.aux_convs, model.pred_convs):
        part.half()
    return model


def write_onnx(path, model, images=None, raw=False):
    """Write an ONNX file of an SSD300 on the CPU in evaluation mode.

    Args:
        images: for int8, see `quantize()`; None: float32.
        raw: end at the output of the network.
    """
    network = export(model, raw)
    if images is not None:
        network = quantize(network, images)
    if not raw:
        append_detection(network)
    onnx.helper.set_model_props(network, describe(model))
    onnx.checker.check_model(network, full_check=True)
    onnx.save(network, path)


@torch.no_grad()
def compare(model, path):
    """Print the largest difference of scores and boxes between a model and its ONNX file."""
    torch.manual_seed(0)
    image = torch.randint(0, 256, (1, 3, model.input_size, model.input_size), dtype=torch.uint8)
    (boxes,), (labels,), (scores,) = model.detect_in_batch(image, 0., 0.5, 200)
    (others,), (other_labels,), (other_scores,) = OnnxNetwork(path).detect_in_batch(
        image, 0., 0.5, 200)
    n = min(len(scores), len(other_scores))
    score_difference = (scores[:n] - other_scores[:n]).abs().max()
    # To the nearest box of the same class: nearly equal scores may be in another order.
    distance = (boxes[:, None] - others).abs().amax(2)
    distance[labels[:, None] != other_labels] = 1
    box_difference = distance.amin(1).max()
    print(f'largest difference to the checkpoint in an image of noise: {score_difference:.1e} in '
          f'scores, {box_difference:.1e} in boxes')


if __name__ == '__main__':
    main(tyro.cli(Parameters))
