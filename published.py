"""Weights that others published, as checkpoints of this program.

Three programs published an SSD300 of the same layers:

1. torchvision's `ssd300_vgg16`, a state dict. Its weights of COCO are what `detect.py` falls back
   to and what `train.py --init coco` starts from.
2. ssd.pytorch (github.com/amdegroot/ssd.pytorch), a state dict.
3. a-PyTorch-Tutorial-to-Object-Detection (github.com/sgrvinod), a whole module in a pickle.

Their layers have other names, and they were trained with other priors, image constants and classes.
All of that becomes part of the checkpoint, so nothing else in this program knows of it.

Letters: P = 8732 priors, C classes with background 0.
"""

import math
import os
import pathlib
import pickle
import zipfile
from collections import OrderedDict

import torch
from torchvision.models.detection import SSD300_VGG16_Weights

from model import FEATURE_MAPS, SSD300, spread_priors
from utils import SIDE, UserError, default_label_map, download_weights, load_checkpoint

# --------------------------------------------------------------------------------------------------
# A pickle of modules, read without its code
#
# A pickle is a program: it names functions, and what loads it calls them. The one that reads here
# knows no function but its own few, which build tensors and dictionaries. It takes a module's
# attributes and never its class. torch.load() is left out of it, since it runs the code of some
# files (TorchScript archives) however the pickle is read.
# --------------------------------------------------------------------------------------------------

# What a pickle's storages hold, by the name of their class.
DTYPES = {'FloatStorage': torch.float32, 'DoubleStorage': torch.float64,
          'HalfStorage': torch.float16, 'BFloat16Storage': torch.bfloat16,
          'LongStorage': torch.int64, 'IntStorage': torch.int32, 'ByteStorage': torch.uint8,
          'BoolStorage': torch.bool}
TUTORIAL_MODULES = ('SSD300', 'VGGBase', 'AuxiliaryConvolutions', 'PredictionConvolutions')
# The first two numbers of a file that PyTorch before 1.6 wrote.
OLD_FORMAT = 0x1950a86a20f9469cfc6c, 1001


class Inert:
    """What stands in place of a module or an optimizer: its attributes, without any code."""

    __slots__ = ('attributes',)

    def __setstate__(self, state):
        self.attributes = state


class Harmless:
    """A function that a pickle may call, but not change."""

    __slots__ = ('function',)

    def __init__(self, function):
        self.function = function

    def __call__(self, *args):
        return self.function(*args)

    def __setstate__(self, state):
        raise pickle.UnpicklingError('the pickle would change a function')


HARMLESS = {
    ('collections', 'OrderedDict'): Harmless(OrderedDict),
    ('collections', 'defaultdict'): Harmless(lambda *kind: {}),
    ('builtins', 'dict'): Harmless(dict),
    ('builtins', 'set'): Harmless(set),
    ('torch', 'Size'): Harmless(tuple),
    ('torch._utils', '_rebuild_tensor'): Harmless(
        lambda storage, offset, size, stride: storage.as_strided(size, stride, offset)),
    ('torch._utils', '_rebuild_tensor_v2'): Harmless(
        lambda storage, offset, size, stride, *rest: storage.as_strided(size, stride, offset)),
    ('torch._utils', '_rebuild_parameter'): Harmless(lambda tensor, *rest: tensor),
    ('torch.nn.parameter', 'Parameter'): Harmless(lambda tensor, *rest: tensor),
}


class TensorReader(pickle.Unpickler):
    """Reads a pickle with PyTorch's storages, and nothing that is neither data nor a module.

    Args:
        file: where the pickle begins.
        make_storage: function of a storage's key, dtype and number of elements.
    """

    def __init__(self, file, make_storage=None):
        super().__init__(file, encoding='utf-8')
        self.make_storage = make_storage

    def find_class(self, module, name):
        """What stands for a name in the pickle. Nothing is imported."""
        if module in ('torch', 'torch.cuda') and name in DTYPES:
            return DTYPES[name]
        module = 'builtins' if module == '__builtin__' else module  # its name in Python 2
        if (module, name) in HARMLESS:
            return HARMLESS[module, name]
        if name in TUTORIAL_MODULES or module.startswith(('torch.nn.', 'torch.optim.')):
            return Inert
        raise UserError(f'it asks for {module}.{name}, which is neither a tensor nor a layer')

    def persistent_load(self, saved):
        """A storage as a tensor of one dimension; of a class with its source code, the class."""
        kind, *rest = saved
        if kind == 'module':
            return rest[0]
        dtype, key, _, n_elements, *view = rest
        if kind != 'storage' or any(view):
            raise pickle.UnpicklingError(f'{kind} of an unknown form')
        return self.make_storage(key, dtype, n_elements)


def read_modules(path):
    """What a file of `torch.save()` holds, with an `Inert` in place of each module.

    Raises:
        UserError: the file asks for a function or class that is not known to be harmless.
        Exception: it is no such file; which one depends on its bytes.
    """
    with open(path, 'rb') as file:
        is_zip = file.read(4) == b'PK\x03\x04'
        file.seek(0)
        return read_zip(file) if is_zip else read_old(file)


def read_zip(file):
    """Read the format since PyTorch 1.6: an archive of a pickle and a file a storage."""
    with zipfile.ZipFile(file) as archive:
        pickled, = (name for name in archive.namelist() if name.endswith('/data.pkl'))
        storages = {}

        def make_storage(key, dtype, n_elements):
            """A storage is read when it is first named."""
            if key not in storages:
                data = bytearray(archive.read(pickled.removesuffix('data.pkl') + f'data/{key}'))
                storages[key] = torch.frombuffer(data, dtype=dtype, count=n_elements)
            return storages[key]

        with archive.open(pickled) as pickle_file:
            return TensorReader(pickle_file, make_storage).load()


def read_old(file):
    """Read the format before PyTorch 1.6: five pickles, then the storages one after the other."""
    n_bytes, storages = os.fstat(file.fileno()).st_size, {}

    def make_storage(key, dtype, n_elements):
        """A storage is empty until the end of the file is read."""
        if key not in storages:
            if n_elements * dtype.itemsize > n_bytes:
                raise EOFError(f'{n_elements} elements in {n_bytes} bytes')
            storages[key] = torch.zeros(n_elements, dtype=dtype)
        return storages[key]

    if tuple(TensorReader(file).load() for _ in OLD_FORMAT) != OLD_FORMAT:
        raise pickle.UnpicklingError('not of PyTorch')
    TensorReader(file).load()                           # facts of the machine that wrote it
    content = TensorReader(file, make_storage).load()
    for key in TensorReader(file).load():
        storage = storages[key]
        data = bytearray(file.read(8 + storage.nbytes))
        if int.from_bytes(data[:8], 'little') != len(storage):
            raise EOFError(f'{len(storage)} elements are expected in storage {key}')
        storage.copy_(torch.frombuffer(data, dtype=storage.dtype, offset=8))
    return content


# --------------------------------------------------------------------------------------------------
# From their layers to ours
# --------------------------------------------------------------------------------------------------

# Distance of the cells, in pixels of the 300. Cells of 32 pixels do not tile 300: the tenth one's
# centre is outside.
CELL_STEPS = (8, 16, 32, 64, 100, 300)
# Sides of the squares, of each map and of the one after it, as fractions of the image: of
# DefaultBoxGenerator in torchvision's ssd300_vgg16, and of the Caffe code, which ssd.pytorch took.
TORCHVISION_SCALES = (0.07, 0.15, 0.33, 0.51, 0.69, 0.87, 1.05)
CAFFE_SCALES = tuple(side / SIDE for side in (30, 60, 111, 162, 213, 264, 315))


def create_caffe_priors(scales):
    """The P priors in the order of the Caffe code, not clamped: (P, 4), centre and size.

    In a cell the square, the extra square, 2, 1/2, and where there are six 3, 1/3.
    """
    priors_of_maps = []
    for map_, step, scale, next_scale in zip(FEATURE_MAPS, CELL_STEPS, scales, scales[1:]):
        sizes = [(scale, scale), (math.sqrt(scale * next_scale),) * 2]
        for ratio in (ratio for ratio in map_.aspect_ratios if ratio > 1):
            width, height = scale * math.sqrt(ratio), scale / math.sqrt(ratio)
            sizes += [(width, height), (height, width)]
        priors_of_maps.append(spread_priors(sizes, map_.size, SIDE / step))
    return torch.cat(priors_of_maps)


def numbered_convolutions(state, *prefixes):
    """The names of the convolutions whose names are numbers, in the order of the layers."""
    found = []
    for prefix in prefixes:
        convs = [key.removeprefix(prefix).removesuffix('.weight') for key in state
                 if key.startswith(prefix) and key.endswith('.weight')]
        convs.sort(key=lambda name: [int(number) for number in name.split('.')])
        found += [prefix + name for name in convs]
    return found


def own_layer_names():
    """The names of our 15 + 8 convolutions, of the six for offsets, and of the six for classes."""
    with torch.device('meta'):
        names = [name for name, layer in SSD300(2).named_modules()
                 if isinstance(layer, torch.nn.Conv2d)]
    return [[name for name in names if name.startswith(prefix)] for prefix in (
        ('base.', 'aux_convs.'), 'pred_convs.loc_convs.', 'pred_convs.class_convs.')]


def rename(state, layers, loc_convs, class_convs):
    """The weights and biases of three lists of convolutions under our names.

    Raises:
        UserError: there are more or fewer of them than here, as in an SSD512.
    """
    renamed = {}
    for theirs, own in zip((layers, loc_convs, class_convs), own_layer_names()):
        if len(theirs) != len(own):
            raise UserError(f'it has {len(theirs)} convolutions where an SSD300 has {len(own)}')
        renamed |= {f'{new}.{kind}': state[f'{old}.{kind}']
                    for old, new in zip(theirs, own) for kind in ('weight', 'bias')}
    return renamed


def count_classes(state):
    """C, from the biases of the first map's class scores."""
    return len(state['pred_convs.class_convs.0.bias']) // FEATURE_MAPS[0].n_priors_per_cell


def from_torchvision(state):
    """A checkpoint from the state dict of torchvision's `ssd300_vgg16` (models/detection/ssd.py).

    Its constants are not in the file. With its 91 classes it is COCO's.
    """
    head = 'head.{}_head.module_list.'
    own = rename(state, numbered_convolutions(state, 'backbone.features.', 'backbone.extra.'),
                 numbered_convolutions(state, head.format('regression')),
                 numbered_convolutions(state, head.format('classification')))
    priors = create_caffe_priors(TORCHVISION_SCALES)
    priors[:, 2:].clamp_(0, 1)      # sizes alone
    own |= {'rescale_factors': state['backbone.scale_weight'].view(1, -1, 1, 1),
            'priors_cxcy': priors,
            'image_mean': torch.tensor([0.48235, 0.45882, 0.40784]),
            'image_std': torch.full((3,), 1 / 255),
            'l2_epsilon': torch.tensor(1e-12)}      # of F.normalize
    n_classes = count_classes(own)
    is_coco = n_classes == len(SSD300_VGG16_Weights.COCO_V1.meta['categories'])
    return {'model': own, 'label_map': coco_label_map() if is_coco else
            default_label_map(n_classes)}


def coco_label_map():
    """COCO's class names and numbers. Ten numbers have no class: those are N/A and the number."""
    names = SSD300_VGG16_Weights.COCO_V1.meta['categories']
    named = {f'{name} {i}' if name == 'N/A' else name: i for i, name in enumerate(names[1:], 1)}
    return {'background': 0, **named}


def from_ssd_pytorch(state):
    """A checkpoint from the state dict of ssd.pytorch.

    Its images are RGB less the mean of the Caffe code, (104, 117, 123) in BGR, not divided. Its
    normalization adds the epsilon to the length, which only a length of nothing notices.
    """
    own = rename(state, numbered_convolutions(state, 'vgg.', 'extras.'),
                 numbered_convolutions(state, 'loc.'), numbered_convolutions(state, 'conf.'))
    own |= {'rescale_factors': state['L2Norm.weight'].view(1, -1, 1, 1),
            'priors_cxcy': create_caffe_priors(CAFFE_SCALES).clamp_(0, 1),
            'image_mean': torch.tensor([123., 117., 104.]) / 255,
            'image_std': torch.full((3,), 1 / 255),
            'l2_epsilon': torch.tensor(1e-10)}
    return {'model': own, 'label_map': default_label_map(count_classes(own))}


def from_tutorial(module):
    """A checkpoint from the `Inert` that stands for the tutorial's SSD300.

    Its image constants are ours, its priors are in the file (theirs have 0.333 for 1/3).
    """
    state = dict(tensors_of(module))
    layers = [name for name in own_layer_names()[0] if f'{name}.weight' in state]
    heads = [[f'pred_convs.{kind}_{map_.name}' for map_ in FEATURE_MAPS] for kind in ('loc', 'cl')]
    own = rename(state, layers, *heads)
    own |= {'rescale_factors': state['rescale_factors'],
            'priors_cxcy': state.get('priors_cxcy', module.attributes.get('priors_cxcy'))}
    return {'model': own, 'label_map': default_label_map(count_classes(own))}


def tensors_of(module, prefix=''):
    """The pairs of name and tensor of a module's parameters and buffers, as in a state dict."""
    for name, tensor in (module.attributes['_parameters'] | module.attributes['_buffers']).items():
        yield prefix + name, tensor
    for name, child in module.attributes['_modules'].items():
        yield from tensors_of(child, f'{prefix}{name}.')


def read_checkpoint(path):
    """The dictionary of a checkpoint, converted where it is one of the three others.

    Which one it is shows in the names of its weights. What is neither is returned as it is.

    Returns:
        For the converted ones `model`, a state dict of `SSD300`, and its `label_map`.

    Raises:
        UserError: the file is missing, truncated, holds code, or is a network of other layers.
    """
    try:
        content = load_checkpoint(path)
    except UserError as error:
        content = try_modules(path, error)
    try:
        if isinstance(content, Inert):
            return from_tutorial(content)
        if 'backbone.features.0.weight' in content:
            return from_torchvision(content)
        if 'vgg.0.weight' in content:
            return from_ssd_pytorch(content)
    except (UserError, KeyError, ValueError, TypeError, AttributeError, RuntimeError) as error:
        reason = error if isinstance(error, UserError) else f'{type(error).__name__}: {error}'
        raise UserError(f'{path} holds no SSD300 with the layers of the paper ({reason}); give '
                        f'another checkpoint') from error
    return content


def try_modules(path, error):
    """The `Inert` of a file's network, or the `error` that says why it is no checkpoint."""
    if not pathlib.Path(path).is_file():
        raise error
    try:
        content = read_modules(path)
    except UserError as refused:
        raise UserError(f'{path} holds code, which is not run: {refused}; give a checkpoint of '
                        f'weights alone') from refused
    except Exception:  # bytes of any kind mean anything
        raise error from None
    content = content.get('model') if isinstance(content, dict) else content
    if not isinstance(content, Inert):
        raise error
    return content


# --------------------------------------------------------------------------------------------------
# COCO's weights, to detect with and to start from
# --------------------------------------------------------------------------------------------------

# COCO's names of VOC's classes that differ in more than spaces.
COCO_NAMES = {'aeroplane': 'airplane', 'motorbike': 'motorcycle', 'sofa': 'couch',
              'tvmonitor': 'tv'}


def download_coco(otherwise):
    """The checkpoint of torchvision's SSD300 of COCO, a download of 136 MB, once.

    Args:
        otherwise: see `utils.download_weights()`.
    """
    return from_torchvision(download_weights(SSD300_VGG16_Weights.COCO_V1, otherwise))


def coco_model():
    """The SSD300 that torchvision trained on COCO: 80 classes, on the CPU, in evaluation mode."""
    checkpoint = download_coco('train a checkpoint with train.py and give it with --checkpoint')
    model = SSD300(len(checkpoint['label_map']))
    model.load_state_dict(checkpoint['model'])
    model.label_map = checkpoint['label_map']
    return model.eval()


def start_from_coco(model):
    """Give a model of any classes COCO's weights, with priors and image constants.

    The scores of its classes that COCO has, and of the background, come with them; those of
    others stay random. Names are the same but for spaces, underscores and VOC's synonyms.

    Returns:
        The names of the classes that were found.
    """
    coco = download_coco('start from ImageNet with --init imagenet')
    numbers = {squeeze(name): number for name, number in coco['label_map'].items()}
    pairs = {name: (own, numbers[squeeze(COCO_NAMES.get(name, name))])
             for name, own in model.label_map.items()
             if squeeze(COCO_NAMES.get(name, name)) in numbers}
    own, theirs = map(list, zip(*pairs.values()))

    before = model.state_dict()
    for number, map_ in enumerate(FEATURE_MAPS):
        for kind in ('weight', 'bias'):
            key = f'pred_convs.class_convs.{number}.{kind}'
            scores, trained = (state[key].cpu().unflatten(0, (map_.n_priors_per_cell, -1))
                               for state in (before, coco['model']))    # (priors a cell, C, ...)
            scores = scores.clone()
            scores[:, own] = trained[:, theirs]
            coco['model'][key] = scores.flatten(0, 1)
    model.load_state_dict(coco['model'])
    return [name for name in pairs if name != 'background']


def squeeze(name):
    """A class name without spaces and underscores."""
    return name.replace(' ', '').replace('_', '')
