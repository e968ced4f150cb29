"""Run a script with a thin SSD300 or SSD512: all layers, with a sixteenth of their channels.

    PYTHONPATH=. python tests/thin.py train.py --data-folder data

For tests of what a run writes, and when. A training step takes a hundredth of the time, and
torch.compile, if it is on, makes the same graphs but no C++ code of them.
"""

import functools
import pathlib
import runpy
import sys

import torch
from torch import nn

import model

ROOT = pathlib.Path(__file__).resolve().parent.parent


class Thin:
    """A network of which every 16th channel is left, those of images and predictions excepted."""

    def __init__(self, n_classes):
        super().__init__(n_classes)
        for name, layer in self.named_modules():
            if isinstance(layer, nn.Conv2d):
                in_step = 1 if name == 'base.conv1_1' else 16
                out_step = 1 if name.startswith('pred_convs') else 16
                # With a sixteenth of the inputs, four times the weights keep the outputs' variance.
                weight = layer.weight.detach()[::out_step, ::in_step] * in_step ** 0.5
                layer.weight = nn.Parameter(weight.contiguous())
                layer.bias = nn.Parameter(layer.bias.detach()[::out_step].clone())
        self.rescale_factors = nn.Parameter(self.rescale_factors.detach()[:, ::16].clone())


class ThinSSD300(Thin, model.SSD300):
    """A thin SSD300."""


class ThinSSD512(Thin, model.SSD512):
    """A thin SSD512."""


if __name__ == '__main__':
    model.SSD300, model.SSD512 = ThinSSD300, ThinSSD512     # which the scripts import
    torch.compile = functools.partial(torch.compile, backend='aot_eager')
    sys.argv = sys.argv[1:]
    runpy.run_path(str(ROOT / sys.argv[0]), run_name='__main__')
