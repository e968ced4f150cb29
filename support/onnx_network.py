"""Detection with an ONNX file of `tools/export.py`, by onnxruntime instead of PyTorch."""

import json
import pathlib

import torch

from support.errors import UserError, describe_error

OUTPUTS = ['boxes', 'labels', 'scores', 'image_indices']


class OnnxNetwork:
    """A network in an ONNX file, which detects objects in the place of an SSD300.

    Attributes:
        label_map, antialias: as those of an SSD300.
        input_size: width and height of its images in pixels.
        device: that of the detections, the CPU.
    """

    device = torch.device('cpu')

    def __init__(self, path):
        """Load a file. It cannot run code or read files of other folders; onnxruntime refuses it.

        Raises:
            UserError: onnxruntime is not installed, or the file is missing, broken, or not one that
                `tools/export.py` wrote.
        """
        if not pathlib.Path(path).is_file():
            raise UserError(f'{path}: no such file; write one with python -m tools.export')
        try:
            import onnxruntime  # not needed for checkpoints
        except ImportError as error:
            raise UserError(f'{path} needs onnxruntime ({error}): pip install '
                            f'onnxruntime') from error
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.log_severity_level = 4      # its errors are raised here, too
        try:
            self.session = onnxruntime.InferenceSession(path, options,
                                                        providers=['CPUExecutionProvider'])
            metadata = self.session.get_modelmeta().custom_metadata_map
            self.input_size = json.loads(metadata['input_size'])
            self.antialias = json.loads(metadata['antialias'])
            names = json.loads(metadata['class_names'])
            self.label_map = {name: label for label, name in enumerate(names)}
        except Exception as error:  # arbitrary bytes can raise anything
            reason = describe_error(error)
            raise UserError(f'{path} cannot be read as an exported network: broken, or written by '
                            f'another program ({reason}); write one with python -m '
                            f'tools.export') from error
        outputs = [output.name for output in self.session.get_outputs()]
        if outputs != OUTPUTS:
            raise UserError(f'{path} has the outputs {outputs}, not {OUTPUTS}; export it without '
                            f'--raw')

    def detect_in_batch(self, images, min_score, max_overlap, top_k):
        """Detect objects in uint8 images (N, 3, 300, 300); see `SSD300.detect_objects()`."""
        boxes, labels, scores, image = map(torch.from_numpy, self.session.run(OUTPUTS, {
            'images': images.contiguous().numpy(),
            'min_score': torch.tensor(min_score, dtype=torch.float32).numpy(),
            'max_overlap': torch.tensor(max_overlap, dtype=torch.float32).numpy(),
            'top_k': torch.tensor(top_k).numpy()}))
        counts = image.bincount(minlength=len(images)).tolist()
        return [list(rows.split(counts)) for rows in (boxes, labels, scores)]


def is_onnx(path):
    """Return whether a checkpoint's name is that of an ONNX file."""
    return pathlib.Path(path).suffix.lower() == '.onnx'


def check_parameters(path, device, precision):
    """Raise a UserError for a device or a precision that an ONNX file would not use."""
    if is_onnx(path) and (device not in ('auto', 'cpu') or precision not in ('auto', 'float32')):
        raise UserError(f'{path} runs on the CPU in the precision that it was exported with; leave '
                        f'--device {device} --precision {precision} out')
