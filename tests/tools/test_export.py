"""Tests of tools/export.py and support/onnx_network.py: an ONNX file against its checkpoint."""

import copy
import json
import pathlib
import re
import sys
from types import SimpleNamespace

import onnx
import onnxruntime
import pytest
import torch
from PIL import Image
from torch import nn

import detect
import eval as evaluation
from create_data_lists import write_data_lists
from model import EVALUATION, SSD300, VISUALIZATION
from support.checkpoints import save_checkpoint
from support.errors import UserError
from support.onnx_network import OnnxNetwork
from thin import ThinSSD300, ThinSSD512
from tools import export
from tools.benchmark_sides import (
    sample_objects,
    simulate_trained_outputs,
    simulate_untrained_outputs,
)

ROOT = pathlib.Path(__file__).resolve().parents[2]
LABEL_MAP = {'background': 0, 'cat': 1, 'dog': 2, 'cow': 3}


@pytest.fixture(scope='module')
def model():
    """Random weights. With this bias of the background few scores are so high as to be equal."""
    torch.manual_seed(0)
    model = ThinSSD300(4).eval()
    model.label_map = LABEL_MAP
    with torch.no_grad():
        for conv in model.pred_convs.class_convs:
            conv.bias[::4] += 16
    return model


@pytest.fixture(scope='module')
def checkpoint(model, tmp_path_factory):
    path = tmp_path_factory.mktemp('checkpoint') / 'thin.pth.tar'
    save_checkpoint(path, model=model.state_dict(), label_map=LABEL_MAP)
    return path


@pytest.fixture(scope='module')
def run(checkpoint):
    """A function that runs the script with the checkpoint above, and returns the path."""
    original, networks = export.export, {}

    def export_once(model, raw=False):      # it takes seconds
        key = raw, model.base.conv1_1.weight.dtype
        networks[key] = networks[key] if key in networks else original(model, raw)
        return copy.deepcopy(networks[key])

    def run_main(output, **parameters):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(export, 'SSD300', ThinSSD300)
            patch.setattr(export, 'export', export_once)
            export.main(export.Parameters(str(checkpoint), str(output), **parameters))
        return output
    return run_main


@pytest.fixture(scope='module')
def exported(run, tmp_path_factory):
    """The ONNX file of the model above."""
    return run(tmp_path_factory.mktemp('exported') / 'thin.onnx')


@pytest.fixture
def lists(make_voc, tmp_path):
    """A data folder of two training and two test images of noise."""
    objects = [('cat', (8, 6, 32, 24)), ('dog', (4, 4, 60, 40)), ('cow', (1, 1, 20, 40))]
    voc = make_voc({'trainval': {'a': objects, 'b': objects}, 'test': {'c': objects, 'd': []}})
    for path in (voc / 'JPEGImages').iterdir():
        Image.effect_noise((64, 48), 90).convert('RGB').save(path)
    write_data_lists([(voc, 'trainval')], [(voc, 'test')], tmp_path / 'lists', LABEL_MAP)
    return tmp_path / 'lists'


def make_images(n_images):
    """Make images of noise, (N, 3, 300, 300) uint8."""
    return torch.randint(0, 256, (n_images, 3, 300, 300), dtype=torch.uint8)


def assert_equal(detections, expected, tolerance=1e-4):
    """Assert that boxes, labels and scores are those expected, in the same order."""
    for boxes, labels, scores, *expected_tensors in zip(*detections, *expected, strict=True):
        expected_boxes, expected_labels, expected_scores = expected_tensors
        assert torch.equal(labels, expected_labels) and labels.dtype == torch.int64
        assert torch.allclose(boxes, expected_boxes, rtol=0, atol=tolerance)
        assert torch.allclose(scores, expected_scores, rtol=0, atol=tolerance)


# --- the graph ---


class FixedOutputs(nn.Module):
    """A network of given outputs."""

    base = SimpleNamespace(conv1_1=nn.Conv2d(1, 1, 1))      # whose dtype is that of the network
    normalize = staticmethod(lambda images: images)

    def __init__(self, *outputs):
        super().__init__()
        self.outputs = outputs
        self.priors_cxcy = SSD300.create_prior_boxes()

    def forward(self, images):
        return self.outputs

    detect_objects = SSD300.detect_objects


def outputs_of_networks():
    """Yield locs and scores of networks for three images: trained, untrained, diverged."""
    priors_cxcy = SSD300.create_prior_boxes()
    yield simulate_trained_outputs(priors_cxcy, *sample_objects(None, 3, 'cpu'))
    locs, scores = simulate_untrained_outputs(3, 'cpu')     # more than 400 candidates per class
    scores[1, :, 0] += 20                                   # no detections in this image
    yield locs, scores
    locs, scores = locs.clone(), torch.zeros_like(scores)   # many equal scores
    scores[:, :, 1:] += 6 * (torch.rand(scores[:, :, 1:].shape) < 1e-3)
    scores[:, :, 0] += 6
    scores[2, 5, 3], scores[2, 6, 4] = torch.nan, torch.inf
    locs[0, :40, 1], locs[2, 50:90, 3] = torch.inf, 1e9     # the latter only too large a box
    yield locs, scores


def test_selection_of_detections_is_that_of_detect_objects():
    session = onnxruntime.InferenceSession(
        export.select_detections.to_model_proto().SerializeToString())
    for locs, scores in outputs_of_networks():
        network = FixedOutputs(locs, scores)
        boxes, probabilities = export.Decoder(network)(torch.zeros(3))
        for thresholds in (EVALUATION, VISUALIZATION, {**EVALUATION, 'top_k': sys.maxsize},
                           {'min_score': 0.9, 'max_overlap': 0.0, 'top_k': 3},
                           {'min_score': 1.0, 'max_overlap': 1.0, 'top_k': 200}):
            expected = network.detect_objects(locs, scores, **thresholds)
            *detections, image_indices = map(torch.from_numpy, session.run(None, {
                'all_boxes': boxes.numpy(), 'all_scores': probabilities.contiguous().numpy(),
                **{name: torch.tensor(value).numpy() for name, value in thresholds.items()}}))
            counts = [len(labels) for labels in expected[1]]
            assert image_indices.bincount(minlength=3).tolist() == counts
            assert_equal([tensor.split(counts) for tensor in detections], expected, 1e-6)


def test_selection_of_more_detections_than_an_image_can_have():
    session = onnxruntime.InferenceSession(
        export.select_detections.to_model_proto().SerializeToString())
    boxes, scores = torch.rand(2, 400, 4), torch.rand(2, 400, 1) * 0.9 + 0.1
    boxes[:, :, 2:] += boxes[:, :, :2]
    found = session.run(None, {
        'all_boxes': boxes.numpy(), 'all_scores': scores.numpy(),
        **{name: torch.tensor(value).numpy() for name, value in (
            ('min_score', 0.), ('max_overlap', 1.), ('top_k', sys.maxsize))}})
    assert torch.equal(torch.from_numpy(found[2]),
                       scores.flatten(1).sort(descending=True).values.flatten())


@pytest.mark.parametrize('n_images', [1, 3])
@pytest.mark.parametrize('thresholds', [EVALUATION, VISUALIZATION,
                                        {'min_score': 1., 'max_overlap': .5, 'top_k': 5}])
def test_file_detects_what_the_checkpoint_does(model, exported, n_images, thresholds):
    images = make_images(n_images)
    expected = model.detect_in_batch(images, **thresholds)
    assert_equal(OnnxNetwork(exported).detect_in_batch(images, **thresholds), expected)
    assert (thresholds['min_score'] == 1) == (sum(map(len, expected[1])) == 0)


def test_file_describes_itself(model, exported):
    """What docs/export.md promises to programs without this repository."""
    session = onnxruntime.InferenceSession(exported)
    assert session.get_modelmeta().custom_metadata_map == {
        'class_names': '["background", "cat", "dog", "cow"]', 'input_size': '300',
        'antialias': 'true', 'min_score': '0.2', 'max_overlap': '0.5', 'top_k': '200'}
    images, = session.get_inputs()      # thresholds are optional
    assert images.type == 'tensor(uint8)' and images.shape == ['N', 3, 300, 300]
    batch = make_images(2)
    boxes, labels, scores, image_indices = session.run(
        ['boxes', 'labels', 'scores', 'image_indices'], {'images': batch.numpy()})
    expected_boxes, *_ = model.detect_in_batch(batch, **VISUALIZATION)
    assert torch.allclose(torch.from_numpy(boxes), torch.cat(expected_boxes), atol=1e-4)
    assert image_indices.tolist() == [0] * len(expected_boxes[0]) + [1] * len(expected_boxes[1])
    # Neither weights in other files nor paths of the computer that wrote it.
    network = onnx.load(exported, load_external_data=False)
    assert not any(tensor.external_data for tensor in network.graph.initializer)
    assert b'site-packages' not in exported.read_bytes()


def test_raw_file_in_half_precision_has_the_output_of_the_network(model, run, exported, tmp_path):
    """Both parameters at once: each would start the exporter again."""
    path = run(tmp_path / 'raw.onnx', raw=True, fp16=True)
    assert path.stat().st_size < 0.75 * exported.stat().st_size     # the rest are priors
    images = make_images(3)
    outputs = onnxruntime.InferenceSession(path).run(['locs', 'scores'],
                                                     {'images': images.numpy()})
    with torch.no_grad():
        for output, expected in zip(outputs, model(model.normalize(images)), strict=True):
            assert output.shape == expected.shape and output.dtype == 'float32'
            assert (torch.from_numpy(output) - expected).std() < 0.01 * expected.std()
    with pytest.raises(UserError, match='without --raw'):
        OnnxNetwork(path)


def test_convolutions_of_an_int8_file_are_quantized(model, run, lists, tmp_path):
    path = run(tmp_path / 'int8.onnx', int8=True, calibration_data=str(lists),
               calibration_images=2)
    network = onnx.load(path)
    producers = {output: node.op_type for node in network.graph.node for output in node.output}
    convolutions = [node for node in network.graph.node if node.op_type == 'Conv']
    assert len(convolutions) == 35
    assert all(producers[name] == 'DequantizeLinear' for conv in convolutions
               for name in conv.input[:2])
    images = make_images(1)[:, :1].expand(1, 3, 300, 300)   # gray noise, as in the calibration
    _, _, (scores,) = OnnxNetwork(path).detect_in_batch(images, **VISUALIZATION)
    _, _, (expected,) = model.detect_in_batch(images, **VISUALIZATION)
    assert len(expected) > 20 and scores[:20].numpy() == pytest.approx(expected[:20], abs=0.2)


def test_python_of_the_documentation_draws_the_detections(model, exported, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'ssd300.onnx').symlink_to(exported)
    noise = Image.effect_noise((90, 120), 80).convert('RGB')
    exif = noise.getexif()
    exif[0x0112] = 6    # to be turned by 90 degrees
    noise.save('photo.jpg', quality=95, exif=exif)
    text = (ROOT / 'docs' / 'export.md').read_text(encoding='utf-8')
    python, = re.findall(r'```python\n(.*?)```', text, re.DOTALL)
    namespace = {}
    exec(compile(python, 'export.md', 'exec'), namespace)
    with Image.open('photo.jpg') as photo:
        expected, = detect.predict([photo], model=model, precision='float32')
    assert [namespace['names'][label] for label in namespace['labels']] == expected['labels'] != []
    boxes = torch.from_numpy(namespace['boxes']) * torch.tensor([120, 90, 120, 90])
    assert torch.allclose(boxes, expected['boxes'], atol=0.02)
    assert len(Image.open('annotated.png').getcolors(20_000)) > 1


def test_unused_indices_are_not_counted_as_classes(run, model, tmp_path, monkeypatch, capsys):
    published = copy.copy(model)
    published.label_map = {**LABEL_MAP, 'N/A 4': 4}
    monkeypatch.setattr(ThinSSD300, 'from_checkpoint', lambda _: published)
    run(tmp_path / 'published.onnx', raw=True)
    assert 'MB, 3 classes\n' in capsys.readouterr().out


@torch.no_grad()
def test_ssd512_is_exported_with_its_size(tmp_path):
    model = ThinSSD512(4).eval()
    for conv in model.pred_convs.class_convs:
        conv.bias[::4] += 16
    export.write_onnx(tmp_path / 'large.onnx', model)
    network = OnnxNetwork(tmp_path / 'large.onnx')
    assert network.input_size == 512
    images = torch.randint(0, 256, (2, 3, 512, 512), dtype=torch.uint8)
    expected = model.detect_in_batch(images, 0., 0.45, 200)
    assert_equal(network.detect_in_batch(images, 0., 0.45, 200), expected)


# --- the scripts ---


def test_scripts_take_the_file_in_the_place_of_a_checkpoint(checkpoint, exported, lists, tmp_path,
                                                            capsys, monkeypatch):
    for script in (detect, evaluation):
        monkeypatch.setattr(script, 'SSD300', ThinSSD300)
    monkeypatch.chdir(tmp_path)
    Image.effect_noise((90, 70), 90).convert('RGB').save('photo.png')
    reports, tables = [], []
    for path in map(str, (checkpoint, exported)):
        detect.main(detect.Parameters(inputs=('photo.png',), checkpoint=path, output='out.png',
                                      json='found.json', device='cpu', precision='float32'))
        reports.append(json.loads((tmp_path / 'found.json').read_text())[0])
        capsys.readouterr()
        evaluation.main(evaluation.Parameters(data_folder=str(lists), checkpoint=path,
                                              device='cpu', workers=0))
        tables.append(capsys.readouterr().out)
    assert tables[0] == tables[1] and 'mAP' in tables[0]
    expected, report = reports
    assert report['labels'] == expected['labels'] != []
    for key in ('boxes', 'scores'):
        assert torch.allclose(*(torch.tensor(r[key]) for r in reports), atol=1e-2)


@pytest.mark.parametrize('parameters, message', [
    ({'precision': 'bf16'}, 'leave --device auto --precision bf16 out'),
    ({'device': 'cuda'}, 'runs on the CPU'),
])
def test_parameters_without_an_effect_are_a_user_error(exported, capsys, parameters, message):
    for script, inputs in ((detect, {'inputs': ('photo.png',)}), (evaluation, {})):
        with pytest.raises(SystemExit):
            script.main(script.Parameters(checkpoint=str(exported), **inputs, **parameters))
        assert message in capsys.readouterr().err


def test_file_is_not_evaluated_in_two_precisions(exported, capsys):
    with pytest.raises(SystemExit):
        evaluation.main(evaluation.Parameters(checkpoint=str(exported), precision='auto'))
    assert 'has only the precision that it was exported with' in capsys.readouterr().err


def test_calibration_needs_images(make_voc, tmp_path):
    voc = make_voc({'test': {'a': [('cat', (1, 1, 9, 9))]}})
    write_data_lists([], [(voc, 'test')], tmp_path / 'lists')
    with pytest.raises(UserError, match='has no images in its TRAIN list'):
        export.sample_images(tmp_path / 'lists', 5, ThinSSD300(2))


@pytest.mark.parametrize('parameters, message', [
    ({'output': 'ssd300.pt'}, 'does not end with .onnx'),
    ({'int8': True}, 'give both'),
    ({'calibration_data': 'x'}, 'give both'),
    ({'int8': True, 'calibration_data': 'x', 'fp16': True}, 'exclude each other'),
    ({'int8': True, 'calibration_data': 'missing'}, 'missing'),
    ({'output': 'no/such/folder.onnx'}, 'cannot be written'),
])
def test_invalid_parameters_are_a_user_error(run, tmp_path, capsys, monkeypatch, parameters,
                                             message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit):
        run(**{'output': 'a.onnx', **parameters})
    assert message in capsys.readouterr().err and not list(tmp_path.iterdir())


# --- files that are not exported networks ---


def make_foreign_file(folder, external=None):
    """Write an ONNX file that adds four weights to its input."""
    weights = onnx.helper.make_tensor('weights', onnx.TensorProto.FLOAT, [4], [1., 2., 3., 4.])
    if external is not None:
        weights.ClearField('float_data')
        weights.data_location = onnx.TensorProto.EXTERNAL
        weights.external_data.add(key='location', value=external)
    x, y = (onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [4]) for name in 'xy')
    graph = onnx.helper.make_graph([onnx.helper.make_node('Add', ['x', 'weights'], ['y'])], 'add',
                                   [x], [y], [weights])
    model = onnx.helper.make_model(graph, ir_version=10,
                                   opset_imports=[onnx.helper.make_opsetid('', 18)])
    onnx.helper.set_model_props(model, {'class_names': '["a"]', 'input_size': '300',
                                        'antialias': 'true'})
    path = folder / 'foreign.onnx'
    path.write_bytes(model.SerializeToString())
    return path


def test_file_that_is_no_exported_network_is_a_user_error(exported, tmp_path, capfd):
    broken, content = tmp_path / 'broken.onnx', exported.read_bytes()
    for part in (b'', b'no network', content[:5000], content[:-100], b'\0' * 100):
        broken.write_bytes(part)
        with pytest.raises(UserError, match='broken, or written by another program'):
            OnnxNetwork(broken)
    with pytest.raises(UserError, match='no such file'):
        OnnxNetwork(tmp_path / 'missing.onnx')
    with pytest.raises(UserError, match=r"has the outputs \['y'\]"):
        OnnxNetwork(make_foreign_file(tmp_path))
    assert capfd.readouterr().err == ''


@pytest.mark.parametrize('is_absolute', [False, True])
def test_file_cannot_read_files_of_other_folders(tmp_path, is_absolute):
    secret = tmp_path / 'secret.bin'
    secret.write_bytes(bytes(16))
    (tmp_path / 'folder').mkdir()
    path = make_foreign_file(tmp_path / 'folder', str(secret) if is_absolute else '../secret.bin')
    with pytest.raises(UserError, match='External data path'):
        OnnxNetwork(path)


def test_missing_onnxruntime_is_a_user_error(exported, monkeypatch):
    monkeypatch.setitem(sys.modules, 'onnxruntime', None)
    with pytest.raises(UserError, match='pip install onnxruntime'):
        OnnxNetwork(exported)
