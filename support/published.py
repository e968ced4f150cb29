"""Weights of other programs, converted to checkpoints of this one.

Four programs published an SSD300 with the same layers, those of 2 and 4 also an SSD512:

1. torchvision's `ssd300_vgg16`, a state dict. `detect.py` uses its COCO weights where there is no
   checkpoint, and `train.py --init coco` starts from them.
2. ssd.pytorch (github.com/amdegroot/ssd.pytorch) and its forks, a state dict. It also distributes
   the VGG-16 of the paper's Caffe code, for `train.py --init caffe`.
3. a-PyTorch-Tutorial-to-Object-Detection (github.com/sgrvinod), a pickle of the whole module.
4. github.com/lufficc/SSD, a dictionary with a state dict.

They name their layers differently, and were trained with other priors, image constants and classes.
A converted checkpoint contains all of these, so the rest of this program treats it as its own.

Sections: 1. reading a checkpoint · 2. conversion · 3. priors · 4. weights to start from ·
5. pickled modules

Letters: P priors (8732, or 24564 of an SSD512), C classes with background 0.
"""

import math
import os
import pathlib
import pickle
import zipfile
from collections import OrderedDict
from typing import NamedTuple

import torch
from torchvision.models.detection import SSD300_VGG16_Weights

from support.checkpoints import download_weights, load_checkpoint
from support.data_lists import is_label_map
from support.errors import UserError, describe_error
from utils import default_label_map

# --------------------------------------------------------------------------------------------------
# 1. Reading a checkpoint
# --------------------------------------------------------------------------------------------------


def read_checkpoint(path):
    """Load a checkpoint; convert it if it comes from one of the four other programs.

    The names of its weights tell which program wrote it. Any other dictionary is returned as is.

    Returns:
        The dictionary of the checkpoint; a converted one has `model`, a state dict of `SSD300`,
        and `label_map`.

    Raises:
        UserError: the file is missing, truncated, contains code, or is a network of other layers.
    """
    try:
        content = load_checkpoint(path)
    except UserError as error:
        content = read_tutorial_module(path, error)
    try:
        if isinstance(content, ModuleState):
            return from_tutorial(content)
        if 'backbone.features.0.weight' in content:
            return from_torchvision(content)
        if 'vgg.0.weight' in content:
            return from_ssd_pytorch(content)
        state = content.get('model')
        if isinstance(state, dict) and 'backbone.vgg.0.weight' in state:
            return from_lufficc(state)
    except (UserError, KeyError, ValueError, TypeError, AttributeError, RuntimeError) as error:
        reason = error if isinstance(error, UserError) else f'{type(error).__name__}: {error}'
        raise UserError(f'{path} holds no SSD300 with the layers of the paper ({reason}); give '
                        f'another checkpoint') from error
    return content


def read_tutorial_module(path, error):
    """Read the `ModuleState` of a pickled network; raise `error` if the file is none either.

    Args:
        path: the file.
        error: the UserError of `load_checkpoint(path)`.
    """
    if not pathlib.Path(path).is_file():
        raise error
    try:
        content = read_pickled_modules(path)
    except UserError as refused:
        raise UserError(f'{path} holds code, which is not run: {refused}; give a checkpoint of '
                        f'weights alone') from refused
    except Exception:  # arbitrary bytes can raise anything
        raise error from None
    content = content.get('model') if isinstance(content, dict) else content
    if not isinstance(content, ModuleState):
        raise error
    return content


# --------------------------------------------------------------------------------------------------
# 2. Conversion
# --------------------------------------------------------------------------------------------------


class PublishedMap(NamedTuple):
    """A feature map, as all four programs have it."""

    name: str
    size: int                        # cells along a side
    step: int                        # distance of neighboring cell centers, in pixels
    aspect_ratios: tuple[int, ...]   # width over height; each comes with its inverse


# By the width and height of the images. The steps are the Caffe code's. Cells of 32 pixels do not
# tile 300: the tenth one's center lies outside the image.
PUBLISHED_MAPS = {
    300: (
        PublishedMap('conv4_3', 38, 8, (2,)),
        PublishedMap('conv7', 19, 16, (2, 3)),
        PublishedMap('conv8_2', 10, 32, (2, 3)),
        PublishedMap('conv9_2', 5, 64, (2, 3)),
        PublishedMap('conv10_2', 3, 100, (2,)),
        PublishedMap('conv11_2', 1, 300, (2,)),
    ),
    512: (
        PublishedMap('conv4_3', 64, 8, (2,)),
        PublishedMap('conv7', 32, 16, (2, 3)),
        PublishedMap('conv8_2', 16, 32, (2, 3)),
        PublishedMap('conv9_2', 8, 64, (2, 3)),
        PublishedMap('conv10_2', 4, 128, (2, 3)),
        PublishedMap('conv11_2', 2, 256, (2,)),
        PublishedMap('conv12_2', 1, 512, (2,)),
    ),
}
INPUT_SIZES = {len(maps): size for size, maps in PUBLISHED_MAPS.items()}    # by number of maps

# The Caffe code subtracts a mean, (104, 117, 123) in BGR, and does not divide.
CAFFE_IMAGE_MEAN = (123 / 255, 117 / 255, 104 / 255)
CAFFE_IMAGE_STD = (1 / 255,) * 3

# The convolutions of `model.SSD512`, from input to output; SSD300 has those of the first six maps.
# Written out because model.py imports this module.
BASE_CONVS = tuple(f'base.conv{number}' for number in (
    '1_1', '1_2', '2_1', '2_2', '3_1', '3_2', '3_3', '4_1', '4_2', '4_3', '5_1', '5_2', '5_3',
    '6', '7'))
AUX_CONVS = tuple(f'aux_convs.conv{number}' for number in (
    '8_1', '8_2', '9_1', '9_2', '10_1', '10_2', '11_1', '11_2', '12_1', '12_2'))
LOC_CONVS = tuple(f'pred_convs.loc_convs.{i}' for i in range(7))
CLASS_CONVS = tuple(f'pred_convs.class_convs.{i}' for i in range(7))


def from_torchvision(state):
    """Convert the state dict of torchvision's `ssd300_vgg16` (models/detection/ssd.py).

    Its image constants are not in the file. With 91 classes it is COCO's.
    """
    head = 'head.{}_head.module_list.'
    converted = rename_layers(
        state, numbered_convs(state, 'backbone.features.', 'backbone.extra.'),
        numbered_convs(state, head.format('regression')),
        numbered_convs(state, head.format('classification')))
    priors_cxcy = create_caffe_priors(300, COCO_SCALES[300])
    priors_cxcy[:, 2:].clamp_(0, 1)                 # sizes only
    converted |= {'rescale_factors': state['backbone.scale_weight'].view(1, -1, 1, 1),
                  'priors_cxcy': priors_cxcy,
                  'image_mean': torch.tensor([0.48235, 0.45882, 0.40784]),
                  'image_std': torch.full((3,), 1 / 255),
                  'antialias': torch.tensor(False),     # default of F.interpolate
                  'l2_epsilon': torch.tensor(1e-12)}    # default of F.normalize
    n_classes = count_classes(converted)
    is_coco = n_classes == len(SSD300_VGG16_Weights.COCO_V1.meta['categories'])
    label_map = coco_label_map() if is_coco else default_label_map(n_classes)
    return {'model': converted, 'label_map': label_map}


def from_ssd_pytorch(state):
    """Convert the state dict of ssd.pytorch."""
    return from_caffe_like(state, ['vgg.', 'extras.'], 'loc.', 'conf.', 'L2Norm.weight')


def from_lufficc(state):
    """Convert the state dict of lufficc/SSD, which trains as ssd.pytorch does."""
    head = 'box_head.predictor.{}_headers.'
    return from_caffe_like(state, ['backbone.vgg.', 'backbone.extras.'], head.format('reg'),
                           head.format('cls'), 'backbone.l2_norm.weight')


def from_caffe_like(state, layers, loc_convs, class_convs, rescale_factors):
    """Convert the state dict of a program that follows the Caffe code, given its names of layers.

    Images are RGB minus the Caffe code's mean. The L2 normalization adds the epsilon to the length
    instead of clamping it, which makes no difference except for vectors of zeros. With 81 classes
    the priors and names are COCO's.
    """
    loc_names = numbered_convs(state, loc_convs)
    converted = rename_layers(state, numbered_convs(state, *layers), loc_names,
                              numbered_convs(state, class_convs))
    n_classes = count_classes(converted)
    coco_names = used_names(coco_label_map())
    is_coco = n_classes == len(coco_names)
    size = INPUT_SIZES[len(loc_names)]
    scales = (COCO_SCALES if is_coco else CAFFE_SCALES)[size]
    converted |= {'rescale_factors': state[rescale_factors].view(1, -1, 1, 1),
                  'priors_cxcy': create_caffe_priors(size, scales).clamp_(0, 1),
                  'image_mean': torch.tensor(CAFFE_IMAGE_MEAN),
                  'image_std': torch.tensor(CAFFE_IMAGE_STD),
                  'antialias': torch.tensor(False),     # cv2.resize() has none
                  'l2_epsilon': torch.tensor(1e-10)}
    label_map = ({name: label for label, name in enumerate(coco_names)} if is_coco
                 else default_label_map(n_classes))
    return {'model': converted, 'label_map': label_map}


def from_tutorial(module):
    """Convert the tutorial's SSD300, given as a `ModuleState`.

    It uses the same image constants as this program. Its priors are in the file (they have 0.333
    for 1/3).
    """
    state = dict(named_tensors(module))
    layers = [name for name in BASE_CONVS + AUX_CONVS if f'{name}.weight' in state]
    loc_convs, class_convs = ([f'pred_convs.{kind}_{feature_map.name}'
                               for feature_map in PUBLISHED_MAPS[300]] for kind in ('loc', 'cl'))
    converted = rename_layers(state, layers, loc_convs, class_convs)
    converted |= {'rescale_factors': state['rescale_factors'],
                  'priors_cxcy': state.get('priors_cxcy', module.attributes.get('priors_cxcy'))}
    return {'model': converted, 'label_map': default_label_map(count_classes(converted))}


def rename_layers(state, layers, loc_convs, class_convs):
    """Copy weights and biases to the names of `SSD300`'s or `SSD512`'s convolutions.

    Args:
        state: the other program's state dict.
        layers: names of its base and auxiliary convolutions, from input to output.
        loc_convs, class_convs: names of its prediction convolutions of each kind, one per map.

    Raises:
        UserError: the number of convolutions is that of neither network.
    """
    n_maps = len(loc_convs) if len(loc_convs) in INPUT_SIZES else 6
    renamed = {}
    for old_names, new_names in (
            (layers, BASE_CONVS + AUX_CONVS[:2 * n_maps - 4]),  # two per map after conv7's
            (loc_convs, LOC_CONVS[:n_maps]), (class_convs, CLASS_CONVS[:n_maps])):
        if len(old_names) != len(new_names):
            raise UserError(f'it has {len(old_names)} convolutions where an '
                            f'SSD{INPUT_SIZES[n_maps]} has {len(new_names)}')
        renamed |= {f'{new}.{kind}': state[f'{old}.{kind}']
                    for old, new in zip(old_names, new_names) for kind in ('weight', 'bias')}
    return renamed


def numbered_convs(state, *prefixes):
    """List the convolutions `prefix` + number of a state dict, ordered by prefix and number."""
    names = []
    for prefix in prefixes:
        numbers = [key.removeprefix(prefix).removesuffix('.weight') for key in state
                   if key.startswith(prefix) and key.endswith('.weight')]
        numbers.sort(key=lambda number: [int(part) for part in number.split('.')])
        names += [prefix + number for number in numbers]
    return names


def named_tensors(module, prefix=''):
    """Yield name and tensor of the parameters and buffers of a `ModuleState`, as a state dict."""
    for name, tensor in (module.attributes['_parameters'] | module.attributes['_buffers']).items():
        yield prefix + name, tensor
    for name, child in module.attributes['_modules'].items():
        yield from named_tensors(child, f'{prefix}{name}.')


def count_classes(state):
    """Return C, from the first map's convolution for class scores.

    Raises:
        UserError: the file does not contain that convolution, or not all of it: with strides of 0,
            a few bytes can have the shape of any number of classes.
    """
    name = f'{CLASS_CONVS[0]}.weight'
    weight = state.get(name)
    if (not isinstance(weight, torch.Tensor) or weight.dim() != 4 or weight.is_meta
            or math.prod(weight.shape) * weight.itemsize > weight.untyped_storage().nbytes()):
        raise UserError(f'it has no complete {name}')
    return len(weight) // 4     # priors per cell of conv4_3, in either network


def check_classes(state, label_map):
    """Check that a label map has one name per class of the weights, before a model is built.

    Args:
        state: a state dict of `SSD300`.
        label_map: class names to indices.

    Raises:
        UserError: the classes differ in number, or are not numbered 0 (background) to C - 1.
    """
    n_classes = count_classes(state)
    if len(label_map) != n_classes:
        raise UserError(f'its weights have {n_classes} classes, its label_map {len(label_map)}')
    if not is_label_map(label_map):
        raise UserError(f'its label_map has to number {n_classes} names from 0, the background: '
                        f'{str(label_map)[:80]}')


def coco_label_map():
    """Return COCO's class names and indices; the ten unused indices are named `N/A` and index."""
    names = SSD300_VGG16_Weights.COCO_V1.meta['categories']
    named = {f'{name} {i}' if name == 'N/A' else name: i for i, name in enumerate(names[1:], 1)}
    return {'background': 0, **named}


def used_names(label_map):
    """Return the names of a label map without those of `coco_label_map()`'s unused indices."""
    return [name for name in label_map if not name.startswith('N/A ')]


# --------------------------------------------------------------------------------------------------
# 3. Priors
# --------------------------------------------------------------------------------------------------

# Sides of the square priors of each map, and of the one after the last, as fractions of the image,
# by its width and height: for COCO in the Caffe code (ssd_coco.py, ssd_coco_512.py) and in
# torchvision, for VOC in the Caffe code, which ssd.pytorch follows.
COCO_SCALES = {300: (0.07, 0.15, 0.33, 0.51, 0.69, 0.87, 1.05),
               512: (0.04, 0.1, 0.26, 0.42, 0.58, 0.74, 0.9, 1.06)}
CAFFE_SCALES = {300: tuple(side / 300 for side in (30, 60, 111, 162, 213, 264, 315)),
                512: (0.07, 0.15, 0.3, 0.45, 0.6, 0.75, 0.9, 1.05)}


def create_caffe_priors(input_size, scales):
    """Create the priors in the order of the Caffe code, not clamped.

    Aspect ratios within a cell: 1, 1 (the larger square), 2, 1/2 and, where there are six priors,
    3, 1/3.

    Args:
        input_size: width and height of the image in pixels, 300 or 512.
        scales: sides of the squares of the maps and of the one after, fractions of the image.

    Returns:
        (P, 4), center and size as fractions of the image.
    """
    priors = []
    for feature_map, scale, next_scale in zip(PUBLISHED_MAPS[input_size], scales, scales[1:]):
        extra = math.sqrt(scale * next_scale)
        sizes = [(scale, scale), (extra, extra)]
        for ratio in feature_map.aspect_ratios:
            width, height = scale * math.sqrt(ratio), scale / math.sqrt(ratio)
            sizes += [(width, height), (height, width)]
        priors.append(spread_priors(sizes, feature_map.size, input_size / feature_map.step))
    return torch.cat(priors)


def spread_priors(sizes, n_cells, cells_across):
    """Place boxes of the given sizes at the center of each cell of a feature map, row by row.

    Args:
        sizes: (width, height) of each prior of a cell, fractions of the image.
        n_cells: number of cells along a side of the map.
        cells_across: number of cells that fit into the image, less than `n_cells` if the last one
            extends beyond it.

    Returns:
        (n_cells * n_cells * len(sizes), 4), center and size as fractions of the image.
    """
    centers = (torch.arange(n_cells) + 0.5) / cells_across
    cy, cx = torch.meshgrid(centers, centers, indexing='ij')
    cells = torch.stack([cx, cy], dim=2).view(-1, 1, 2)                 # (cells, 1, 2)
    return torch.cat(torch.broadcast_tensors(cells, torch.tensor(sizes)), dim=2).view(-1, 4)


# --------------------------------------------------------------------------------------------------
# 4. Weights to start from
# --------------------------------------------------------------------------------------------------

# COCO's names of VOC's classes, where they differ in more than spaces.
COCO_NAMES = {'aeroplane': 'airplane', 'motorbike': 'motorcycle', 'sofa': 'couch',
              'tvmonitor': 'tv'}


def download_coco(otherwise):
    """Load the checkpoint of torchvision's SSD300 trained on COCO, 136 MB, downloaded once.

    Args:
        otherwise: see `support.checkpoints.download_weights()`.

    Returns:
        `{'model': state dict of SSD300, 'label_map': ...}`, for `SSD300.from_state()`.
    """
    return from_torchvision(download_weights(SSD300_VGG16_Weights.COCO_V1, otherwise))


def start_from(model, source):
    """Load the weights of one SSD300 into another of any classes, priors and constants included.

    Class scores are copied for the background and for the classes that both have; for the others
    they stay random.

    Args:
        model: an SSD300 with its `label_map`; modified in place.
        source: the other SSD300.

    Returns:
        The names of the classes that both have, without the background.

    Raises:
        UserError: one is an SSD300, the other an SSD512.
    """
    if model.input_size != source.input_size:
        raise UserError(f'the weights are those of an SSD{source.input_size}; give --network '
                        f'ssd{source.input_size}')
    source_indices = {unify(name): index for name, index in source.label_map.items()}
    shared = {name: (index, source_indices[unify(name)])
              for name, index in model.label_map.items() if unify(name) in source_indices}
    here, there = map(list, zip(*shared.values()))      # indices of the same classes

    state, source_state = model.state_dict(), source.state_dict()
    for name in CLASS_CONVS[:len(model.pred_convs.class_convs)]:
        for key in (f'{name}.weight', f'{name}.bias'):
            # Output channels are ordered by prior, then class.
            scores = state[key].cpu().clone().unflatten(0, (-1, len(model.label_map)))
            source_scores = source_state[key].cpu().unflatten(0, (-1, len(source.label_map)))
            scores[:, here] = source_scores[:, there]   # (priors per cell, C, ...)
            source_state[key] = scores.flatten(0, 1)
    model.load_state_dict(source_state)
    return [name for name in shared if name != 'background']


def unify(name):
    """Return COCO's name of a class, if it is VOC's, without spaces and underscores."""
    return COCO_NAMES.get(name, name).replace(' ', '').replace('_', '')


@torch.no_grad()
def start_from_caffe_vgg(model, path):
    """Load the VGG-16 that the paper's authors started from, with the mean of its images.

    Args:
        model: an SSD300; its base and its image constants are modified in place.
        path: ssd.pytorch's `vgg16_reducedfc.pth`, with fc6 and fc7 decimated already.

    Raises:
        UserError: the file cannot be read, or holds another network.
    """
    state = load_checkpoint(path)
    try:
        # Numbered as in ssd.pytorch's list of layers, ReLU and pooling included: 0, 2, 5, ..., 33.
        pairs = list(zip(BASE_CONVS, numbered_convs(state, ''), strict=True))
        model.base.load_state_dict({f'{new.removeprefix("base.")}.{kind}': state[f'{old}.{kind}']
                                    for new, old in pairs for kind in ('weight', 'bias')})
    except (KeyError, ValueError, TypeError, AttributeError, RuntimeError) as error:
        reason = describe_error(error, line=-1)
        raise UserError(f'{path} is not the VGG-16 of ssd.pytorch ({reason}); give its '
                        f'vgg16_reducedfc.pth') from error
    # The first convolution takes blue, green, red, as in Caffe: the scripts that converted it
    # (data/scripts of ssd.pytorch, and loadcaffe) copy all weights as they are. ssd.pytorch itself
    # trains it with RGB nevertheless. ChainerCV reverses the channels, too.
    model.base.conv1_1.weight.copy_(model.base.conv1_1.weight.flip(1))
    model.image_mean.copy_(torch.tensor(CAFFE_IMAGE_MEAN))
    model.image_std.copy_(torch.tensor(CAFFE_IMAGE_STD))


# --------------------------------------------------------------------------------------------------
# 5. Pickled modules, read without running their code
#
# A pickle is a program: it names functions and calls them. The unpickler below resolves only a few
# names, those that build tensors and dictionaries, and replaces modules by their attributes.
# torch.load() is not used, since it runs the code of some files (TorchScript archives) even with
# an unpickler of our own.
# --------------------------------------------------------------------------------------------------

STORAGE_DTYPES = {'FloatStorage': torch.float32, 'DoubleStorage': torch.float64,
                  'HalfStorage': torch.float16, 'BFloat16Storage': torch.bfloat16,
                  'LongStorage': torch.int64, 'IntStorage': torch.int32,
                  'ByteStorage': torch.uint8, 'BoolStorage': torch.bool}
TUTORIAL_MODULES = ('SSD300', 'VGGBase', 'AuxiliaryConvolutions', 'PredictionConvolutions')
# Magic number and protocol version of the format before PyTorch 1.6.
LEGACY_HEADER = 0x1950a86a20f9469cfc6c, 1001


def read_pickled_modules(path):
    """Read a file of `torch.save()`, with a `ModuleState` in place of each module.

    Raises:
        UserError: the pickle names a function or class that is not in the list of allowed ones.
        Exception: the file is not one of `torch.save()`; the type depends on its bytes.
    """
    with open(path, 'rb') as file:
        is_zip = file.read(4) == b'PK\x03\x04'
        file.seek(0)
        return read_zip(file) if is_zip else read_legacy(file)


def read_zip(file):
    """Read the format since PyTorch 1.6: an archive of a pickle and one file per storage."""
    with zipfile.ZipFile(file) as archive:
        pickled, = (name for name in archive.namelist() if name.endswith('/data.pkl'))
        storages = {}

        def make_storage(key, dtype, n_elements):
            """Read a storage at its first use."""
            if key not in storages:
                data = bytearray(archive.read(pickled.removesuffix('data.pkl') + f'data/{key}'))
                storages[key] = torch.frombuffer(data, dtype=dtype, count=n_elements)
            return storages[key]

        with archive.open(pickled) as pickle_file:
            return RestrictedUnpickler(pickle_file, make_storage).load()


def read_legacy(file):
    """Read the format before PyTorch 1.6: five pickles, then the storages one after the other."""
    n_bytes, storages = os.fstat(file.fileno()).st_size, {}

    def make_storage(key, dtype, n_elements):
        """Allocate a storage, to be filled from the end of the file."""
        if key not in storages:
            if n_elements * dtype.itemsize > n_bytes:
                raise EOFError(f'{n_elements} elements in {n_bytes} bytes')
            storages[key] = torch.zeros(n_elements, dtype=dtype)
        return storages[key]

    if tuple(RestrictedUnpickler(file).load() for _ in LEGACY_HEADER) != LEGACY_HEADER:
        raise pickle.UnpicklingError('no magic number of PyTorch')
    RestrictedUnpickler(file).load()                # byte order and sizes of types
    content = RestrictedUnpickler(file, make_storage).load()
    for key in RestrictedUnpickler(file).load():
        storage = storages[key]
        data = bytearray(file.read(8 + storage.nbytes))
        if int.from_bytes(data[:8], 'little') != len(storage):
            raise EOFError(f'{len(storage)} elements are expected in storage {key}')
        storage.copy_(torch.frombuffer(data, dtype=storage.dtype, offset=8))
    return content


class ModuleState:
    """The attributes of a pickled module or optimizer, in place of the object itself."""

    __slots__ = ('attributes',)

    def __setstate__(self, state):
        self.attributes = state


class AllowedFunction:
    """A function that a pickle may call but not change."""

    __slots__ = ('function',)

    def __init__(self, function):
        self.function = function

    def __call__(self, *args):
        return self.function(*args)

    def __setstate__(self, state):
        raise pickle.UnpicklingError('the pickle would change a function')


ALLOWED_FUNCTIONS = {
    ('collections', 'OrderedDict'): AllowedFunction(OrderedDict),
    ('collections', 'defaultdict'): AllowedFunction(lambda *factory: {}),
    ('builtins', 'dict'): AllowedFunction(dict),
    ('builtins', 'set'): AllowedFunction(set),
    ('torch', 'Size'): AllowedFunction(tuple),
    ('torch._utils', '_rebuild_tensor'): AllowedFunction(
        lambda storage, offset, size, stride: storage.as_strided(size, stride, offset)),
    ('torch._utils', '_rebuild_tensor_v2'): AllowedFunction(
        lambda storage, offset, size, stride, *rest: storage.as_strided(size, stride, offset)),
    ('torch._utils', '_rebuild_parameter'): AllowedFunction(lambda tensor, *rest: tensor),
    ('torch.nn.parameter', 'Parameter'): AllowedFunction(lambda tensor, *rest: tensor),
}


class RestrictedUnpickler(pickle._Unpickler):
    """Unpickle tensors, containers and `ModuleState`s, and nothing else.

    The base class is Python's own implementation. The one in C, and the instruction left out here,
    allocate gigabytes for a damaged number.

    Args:
        file: positioned at the start of the pickle.
        make_storage: function of a storage's key, dtype and number of elements; returns a tensor
            of one dimension.
    """

    dispatch = {code: load for code, load in pickle._Unpickler.dispatch.items()
                if code != pickle.BYTEARRAY8[0]}

    def __init__(self, file, make_storage=None):
        super().__init__(file, encoding='utf-8')
        self.make_storage = make_storage

    def find_class(self, module, name):
        """Resolve a name of the pickle without importing anything."""
        if module in ('torch', 'torch.cuda') and name in STORAGE_DTYPES:
            return STORAGE_DTYPES[name]
        module = 'builtins' if module == '__builtin__' else module  # its name in Python 2
        if (module, name) in ALLOWED_FUNCTIONS:
            return ALLOWED_FUNCTIONS[module, name]
        if name in TUTORIAL_MODULES or module.startswith(('torch.nn.', 'torch.optim.')):
            return ModuleState
        raise UserError(f'it names {module}.{name}, which is neither a tensor nor a layer')

    def persistent_load(self, saved):
        """Resolve a storage to its tensor, and a class that comes with its source to the class."""
        kind, *rest = saved
        if kind == 'module':
            return rest[0]
        dtype, key, _, n_elements, *view = rest
        if kind != 'storage' or any(view):
            raise pickle.UnpicklingError(f'unknown kind of object: {kind}')
        return self.make_storage(key, dtype, n_elements)
