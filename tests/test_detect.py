"""`detect()`, `predict()` and the command line, with a model whose detections the test chooses."""

import doctest
import io
import json
import math
import os
import pathlib
import signal
import sys

import av
import pytest
import torch
from PIL import Image, ImageOps

import detect as detect_module
from detect import Parameters, detect, main, predict, select_classes
from model import SSD300
from support.checkpoints import save_checkpoint
from support.errors import UserError
from support.published import coco_label_map
from utils import cxcy_to_gcxgcy, distinct_colors, label_map, xy_to_cxcy

THRESHOLDS = {'min_score': 0.2, 'max_overlap': 0.5, 'top_k': 200}


class FixedModel(SSD300):
    """Detects the given objects (label, box in fractions, logit) in every image."""

    def __init__(self, objects, n_classes=21):
        super().__init__(n_classes)
        self.objects = objects
        self.batches = []   # of images that the model was given
        self.eval()

    def forward(self, image):
        self.batches.append(image)
        locs = torch.zeros(len(image), 8732, 4)
        scores = torch.zeros(len(image), 8732, self.n_classes)
        scores[..., 0] = 10.
        for prior, (label, box, logit) in enumerate(self.objects):
            box = xy_to_cxcy(torch.tensor(box))
            locs[:, prior] = cxcy_to_gcxgcy(box, self.priors_cxcy[prior])
            scores[:, prior, label] = logit
        return locs, scores


@pytest.fixture(scope='module')
def fixed_model():
    """A dog, and with a lower score a cat."""
    return FixedModel([(label_map['dog'], [.1, .2, .5, .6], 20.),
                       (label_map['cat'], [.5, .5, .9, 1.], 12.)])


@pytest.fixture
def model(fixed_model):
    """The model above, without the batches of other tests."""
    fixed_model.batches.clear()
    return fixed_model


@pytest.fixture
def empty_cache():
    """The default model is not loaded before the test, nor after it."""
    detect_module.default_model.cache_clear()
    yield
    detect_module.default_model.cache_clear()


@pytest.fixture
def default_checkpoint(model, empty_cache, monkeypatch, tmp_path):
    """A working folder in which the default checkpoint is that of the model above."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(SSD300, 'from_checkpoint', lambda path: model)
    pathlib.Path(Parameters.checkpoint).touch()


@pytest.fixture(scope='module')
def real_checkpoint(tmp_path_factory):
    """A checkpoint of random weights for the classes cat and dog."""
    path = tmp_path_factory.mktemp('checkpoint') / 'model.pth.tar'
    save_checkpoint(path, model=SSD300(3).state_dict(),
                    label_map={'background': 0, 'cat': 1, 'dog': 2})
    return path


# --- predict() and detect() ---


def test_prediction_is_in_pixels_of_each_image(model):
    images = [Image.new('RGB', (200, 100)), Image.new('L', (50, 400))]
    for image, prediction in zip(images, predict(images, **THRESHOLDS, model=model), strict=True):
        expected = torch.tensor([[.1, .2, .5, .6], [.5, .5, .9, 1.]])
        expected = expected * torch.tensor([*image.size, *image.size])
        assert torch.allclose(prediction['boxes'], expected, atol=0.01)
        assert prediction['labels'] == ['dog', 'cat']
        assert prediction['scores'].shape == (2,) and prediction['scores'][0] > 0.99


def test_many_images_are_predicted_in_batches(model):
    images = [Image.new('RGB', (10 * width, 50)) for width in range(1, 6)]
    predictions = predict(images, **THRESHOLDS, model=model, batch_size=2)
    assert [len(batch) for batch in model.batches] == [2, 2, 1] and len(predictions) == 5
    for image, prediction in zip(images, predictions):
        single, = predict([image], **THRESHOLDS, model=model)
        assert torch.equal(prediction['boxes'], single['boxes'])


def test_image_without_detections_gives_empty_tensors(model):
    prediction, = predict([Image.new('RGB', (30, 30))], min_score=1., max_overlap=.5, top_k=200,
                          model=model)
    assert prediction['boxes'].shape == (0, 4) and prediction['scores'].shape == (0,)
    assert prediction['labels'] == []
    assert predict([], **THRESHOLDS, model=model) == []


@pytest.mark.parametrize('threshold', [{'min_score': 20}, {'max_overlap': math.nan}])
def test_threshold_that_is_no_fraction_is_a_user_error(model, run, capsys, threshold):
    Image.new('RGB', (30, 30)).save('photo.png')
    with pytest.raises(UserError, match='give a number from 0 to 1'):
        predict([Image.open('photo.png')], **{**THRESHOLDS, **threshold}, model=model)
    assert run('photo.png', **threshold) == 1
    error = capsys.readouterr().err
    assert 'give a number from 0 to 1' in error and error.count('\n') == 1
    assert not os.path.exists('detections')


@pytest.mark.parametrize('mode', ['1', 'L', 'LA', 'P', 'RGBA', 'CMYK', 'YCbCr', 'I;16', 'I', 'F'])
def test_image_of_any_mode_is_annotated_and_not_changed(model, mode):
    image = Image.new(mode, (120, 80))
    before = image.tobytes()
    annotated = detect(image, **THRESHOLDS, model=model)
    assert annotated.mode == 'RGB' and annotated.size == image.size
    assert image.tobytes() == before and image.mode == mode
    assert annotated is not image and len(annotated.getcolors(maxcolors=10_000)) > 1


@pytest.mark.parametrize('size', [(1, 1), (8, 3), (40, 40), (2000, 100), (700, 900)])
def test_image_of_any_size_is_annotated(model, size):
    annotated = detect(Image.new('RGB', size, 'gray'), **THRESHOLDS, model=model)
    assert annotated.size == size
    assert annotated.tobytes() != Image.new('RGB', size, 'gray').tobytes()


@pytest.mark.parametrize('orientation', range(1, 9))
def test_exif_orientation_is_respected_and_not_copied(model, orientation):
    image = Image.new('RGB', (200, 100), 'white')
    image.paste('black', (0, 0, 100, 50))
    exif = image.getexif()
    exif[0x0112] = orientation
    file = io.BytesIO()
    image.save(file, 'png', exif=exif)
    photo = Image.open(file)
    upright = ImageOps.exif_transpose(photo)

    prediction, = predict([photo], **THRESHOLDS, model=model)
    width, height = upright.size
    assert torch.allclose(prediction['boxes'][0] / torch.tensor([width, height, width, height]),
                          torch.tensor([.1, .2, .5, .6]), atol=1e-4)
    predict([upright], **THRESHOLDS, model=model)
    assert torch.equal(*model.batches)

    annotated = detect(photo, **THRESHOLDS, model=model)
    assert annotated.size == upright.size
    file = io.BytesIO()
    annotated.save(file, 'jpeg')
    assert Image.open(file).getexif().get(0x0112, 1) == 1


def test_suppressed_classes_are_not_drawn(model):
    image = Image.new('RGB', (200, 100), 'gray')
    both = detect(image, **THRESHOLDS, model=model)
    dog = detect(image, **THRESHOLDS, suppress=['cat'], model=model)
    nothing = detect(image, **THRESHOLDS, suppress=['cat', 'dog'], model=model)
    assert nothing.tobytes() == image.tobytes()
    assert len({both.tobytes(), dog.tobytes(), nothing.tobytes()}) == 3
    with pytest.raises(ValueError, match='unicorn'):
        detect(image, **THRESHOLDS, suppress=['unicorn'], model=model)


def test_every_class_has_a_different_color():
    many = {'background': 0, **{f'class {i}': i for i in range(1, 81)}}
    for names in (label_map, many):
        colors = distinct_colors(names)
        assert colors.keys() == names.keys() and len(set(colors.values())) == len(names)
        assert all(len(color) == 7 and color[0] == '#' for color in colors.values())


def test_default_model_is_loaded_once(real_checkpoint, empty_cache, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    checkpoint = pathlib.Path(Parameters.checkpoint)
    checkpoint.symlink_to(real_checkpoint)
    image = Image.new('RGB', (20, 20))
    assert detect(image, min_score=1., max_overlap=.5, top_k=1).size == (20, 20)
    checkpoint.unlink()
    checkpoint.write_bytes(b'no checkpoint')
    prediction, = predict([image], min_score=1.)
    assert prediction['labels'] == []


def test_other_classes_take_no_place_among_the_best(model):
    image = Image.new('RGB', (200, 100), 'gray')
    prediction, = predict([image], top_k=1, model=model, classes=['cat', 'cow'])
    assert prediction['labels'] == ['cat'] and prediction['boxes'].shape == (1, 4)
    best, = predict([image], top_k=1, model=model, classes=['cat', 'dog', 'cow'])
    assert len(best['labels']) == 1     # of two
    nothing, = predict([image], model=model, classes=['cow'])
    assert nothing['labels'] == [] and nothing['boxes'].shape == (0, 4)
    prediction, = predict([image], model=model, classes=['cat', 'dog'], suppress=['dog'])
    assert prediction['labels'] == ['cat']
    with pytest.raises(UserError, match='unicorn.*the model has aeroplane, bicycle'):
        predict([image], model=model, classes=['unicorn'])
    with pytest.raises(UserError, match='the model has person, bicycle') as error:
        select_classes(coco_label_map(), ['unicorn'], None)
    assert 'N/A' not in str(error.value)


@pytest.mark.parametrize('precision, expected', [
    ('float32', torch.float32), ('bf16', torch.bfloat16), ('auto', torch.bfloat16)])
def test_precision_is_that_of_autocast(model, monkeypatch, precision, expected):
    def forward(images):
        dtypes.append((images[:, :, 0] @ torch.zeros(300, 1)).dtype)
        return FixedModel.forward(model, images)

    dtypes, image = [], Image.new('RGB', (30, 20))
    monkeypatch.setattr(model, 'forward', forward)
    monkeypatch.setattr(torch.cpu, 'get_capabilities', lambda: {'avx512_bf16': True},
                        raising=False)
    prediction, = predict([image], model=model, precision=precision)
    detect(image, model=model, precision=precision)
    assert dtypes == [expected] * 2 and prediction['scores'].dtype == torch.float32


def test_docstring_example_runs(default_checkpoint, monkeypatch):
    shown = []
    monkeypatch.setattr(Image.Image, 'show', lambda image: shown.append(image))
    Image.new('RGB', (60, 40)).save('photo.jpg')
    result = doctest.testmod(detect_module)
    assert result.attempted == 6 and result.failed == 0 and shown[0].size == (60, 40)


# --- the command line ---


@pytest.fixture
def run(default_checkpoint):
    """A function that runs the script in an empty folder; returns the exit status."""
    def run_main(*inputs, **parameters):
        try:
            main(Parameters(inputs=inputs, device='cpu', **{'batch_size': 4} | parameters))
        except SystemExit as stop:
            return stop.code
        return 0
    return run_main


def make_clip(path, n_frames=12, with_sound=False):
    """Write a gray video of 25 frames per second and 64 x 48 pixels."""
    with av.open(str(path), 'w') as container:
        stream = container.add_stream('libx264', rate=25)
        stream.width, stream.height, stream.pix_fmt = 64, 48, 'yuv420p'
        audio = container.add_stream('aac', rate=48000) if with_sound else None
        for _ in range(n_frames):
            frame = av.VideoFrame.from_image(Image.new('RGB', (64, 48), 'gray'))
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
        if with_sound:
            samples = av.AudioFrame.from_ndarray(torch.zeros(1, 1024).numpy(), 'fltp', 'mono')
            samples.sample_rate = 48000
            container.mux(audio.encode(samples))
            container.mux(audio.encode())


def test_folders_patterns_and_standard_input_are_annotated(run, tmp_path, capsys, monkeypatch):
    for name in ('a/x.png', 'a/deep/y.jpg', 'b/x.png', 'b/z.bmp'):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new('RGB', (60 + len(name), 40)).save(name)
    (tmp_path / 'b' / 'notes.txt').write_text('no image')
    (tmp_path / 'empty').mkdir()
    content = io.BytesIO((tmp_path / 'a' / 'x.png').read_bytes())
    monkeypatch.setattr('sys.stdin', type('Input', (), {'buffer': content}))
    assert run('a/**/*', 'b', 'b/x.png', '-', 'empty', 'no*.jpg', json='found.json') == 1
    output = capsys.readouterr()
    assert sorted(path.name for path in (tmp_path / 'detections').iterdir()) == [
        'stdin.png', 'x.png', 'x_2.png', 'y.jpg', 'z.bmp']
    assert 'empty: no image and no video' in output.err and 'no*.jpg: no image' in output.err
    assert 'b/x.png -> detections/x_2.png' in output.out
    rows = json.loads((tmp_path / 'found.json').read_text())
    assert [row['file'] for row in rows] == ['a/deep/y.jpg', 'a/x.png', 'b/x.png', 'b/z.bmp', '-']
    assert rows[1]['labels'] == ['dog', 'cat'] and len(rows[1]['scores']) == 2
    assert rows[1]['boxes'][0] == pytest.approx([6.7, 8, 33.5, 24], abs=0.01)


@pytest.mark.parametrize('options, labels', [
    ({}, ['dog', 'cat']), ({'min_score': 0.95}, ['dog']), ({'top_k': 1}, ['dog']),
    ({'suppress': ('dog',)}, ['cat'])], ids=str)
def test_options_choose_the_detections(run, tmp_path, options, labels):
    Image.new('RGB', (60, 40)).save('photo.png')
    assert run('photo.png', json='found.json', **options) == 0
    row, = json.loads((tmp_path / 'found.json').read_text())
    assert row['labels'] == labels


def test_batch_size_thresholds_and_precision_reach_the_model(run, model, monkeypatch):
    def detect_in_batch(images, *thresholds):
        calls.append((len(images), *thresholds, torch.is_autocast_enabled('cpu')))
        return original(images, *thresholds)

    calls, original = [], model.detect_in_batch
    monkeypatch.setattr(model, 'detect_in_batch', detect_in_batch)
    monkeypatch.setattr(torch.cpu, 'get_capabilities', dict, raising=False)     # no bf16
    for number in range(3):
        Image.new('RGB', (60, 40)).save(f'{number}.png')
    assert run('*.png', batch_size=2, min_score=0.1, max_overlap=0.3, top_k=7,
               precision='bf16') == 0
    assert calls == [(2, 0.1, 0.3, 7, True), (1, 0.1, 0.3, 7, True)]


def test_broken_image_among_many_is_skipped(run, tmp_path, capsys):
    (tmp_path / 'in').mkdir()
    for number in range(30):
        Image.new('RGB', (30, 20)).save(tmp_path / 'in' / f'{number}.png')
    (tmp_path / 'in' / '7.png').write_bytes(b'no image')
    assert run('in', json='found.json', classes=('cat',)) == 1
    error = capsys.readouterr().err
    assert error.count('skipped') == 1 and 'in/7.png: cannot be read' in error
    rows = json.loads((tmp_path / 'found.json').read_text())
    assert len(rows) == 29 and all(row['labels'] == ['cat'] for row in rows)


@pytest.mark.skipif(sys.platform != 'linux', reason='other file systems refuse such names')
def test_file_may_have_any_name(run, tmp_path, capsys):
    names = [os.fsdecode(name) for name in (b'a\nb.png', b'c\x1b[2J.png', b'\xff.png')]
    for name in names:
        Image.new('RGB', (30, 20)).save(name)
    (tmp_path / 'broken\n.png').write_bytes(b'no image')
    assert run(*names, 'broken\n.png', json='found.json') == 1
    output = capsys.readouterr()
    assert output.out.splitlines() == [
        f'{name} -> detections/{name}' for name in (r'a\nb.png', r'c\x1b[2J.png', r'\udcff.png')]
    assert r'broken\n.png: cannot be read' in output.err
    rows = json.loads((tmp_path / 'found.json').read_text())
    assert [row['file'] for row in rows] == names
    assert {path.name for path in (tmp_path / 'detections').iterdir()} == set(names)


def test_user_errors_are_reported_before_anything_is_written(run, tmp_path, capsys):
    Image.new('RGB', (60, 40)).save('photo.png')
    assert run('photo.png', classes=('unicorn',)) == 1
    assert 'unicorn' in capsys.readouterr().err and not (tmp_path / 'detections').exists()
    assert run('photo.png', json='photo.png') == 1
    assert 'would be replaced' in capsys.readouterr().err


def test_video_is_annotated_and_reported(run, tmp_path):
    make_clip('clip.mp4', with_sound=True)
    assert run('clip.mp4', output='new/out.mkv', json='found.json') == 0
    assert [path.name for path in (tmp_path / 'new').iterdir()] == ['out.mkv']
    with av.open('new/out.mkv') as container:
        assert len(container.streams.audio) == 1
        frames = list(container.decode(video=0))
    assert len(frames) == 12 and (frames[0].width, frames[0].height) == (64, 48)
    rows = json.loads((tmp_path / 'found.json').read_text())
    assert [row['frame'] for row in rows] == list(range(12))
    assert [row['time'] for row in rows] == pytest.approx([i / 25 for i in range(12)])
    assert rows[0]['labels'] == ['dog', 'cat']


def test_broken_videos_are_skipped(run, tmp_path, capsys):
    make_clip('clip.mp4')
    make_clip('clip.mkv')
    Image.new('RGB', (60, 40)).save('clip.png')
    (tmp_path / 'broken.mp4').write_bytes(b'no video')
    assert run('broken.mp4', 'clip.mp4', 'clip.png', 'clip.mkv', '99') == 1
    error = capsys.readouterr().err
    assert 'broken.mp4: cannot be read' in error and '99: camera' in error
    assert '2 of 5 inputs could not be read' in error
    assert sorted(path.name for path in (tmp_path / 'detections').iterdir()) == [
        'clip.mkv', 'clip.mp4', 'clip.png']


def test_video_cannot_be_written_as_an_image(run, tmp_path, capsys):
    make_clip('clip.mp4', 2)
    for output in ('a.png', 'a.wmv'):
        assert run('clip.mp4', output=output) == 1
        assert f'cannot be written as {output[1:]}' in capsys.readouterr().err


@pytest.mark.parametrize('name, status', [('clip.mp4', 1), ('0', 0)])
def test_ctrl_c_finishes_the_video(run, model, tmp_path, capsys, monkeypatch, name, status):
    """For a camera, in place of which a file is read here, it is the usual way to stop."""
    make_clip('clip.mp4', 40)
    reader = detect_module.VideoReader
    monkeypatch.setattr(detect_module, 'VideoReader', lambda source: reader('clip.mp4'))

    def forward(image):
        if len(model.batches) == 2:
            signal.raise_signal(signal.SIGINT)
        return FixedModel.forward(model, image)

    monkeypatch.setattr(model, 'forward', forward)
    assert run(name, output='out.mp4', json='found.json') == status
    n_frames = 3 if name == '0' else 12
    with av.open('out.mp4') as container:
        assert len(list(container.decode(video=0))) == n_frames
    assert len(json.loads((tmp_path / 'found.json').read_text())) == n_frames
    assert not list(tmp_path.glob('.*'))
    assert ('interrupted' in capsys.readouterr().err) == bool(status)


def test_ctrl_c_finishes_the_batch_of_images(run, model, tmp_path, capsys, monkeypatch):
    def forward(image):
        signal.raise_signal(signal.SIGINT)
        return FixedModel.forward(model, image)

    monkeypatch.setattr(model, 'forward', forward)
    for number in range(6):
        Image.new('RGB', (30, 20)).save(f'{number}.png')
    assert run('*.png', json='found.json') == 1
    assert sorted(path.name for path in (tmp_path / 'detections').iterdir()) == [
        '0.png', '1.png', '2.png', '3.png']
    assert len(json.loads((tmp_path / 'found.json').read_text())) == 4
    assert 'interrupted' in capsys.readouterr().err


def test_input_is_never_replaced(run, tmp_path, capsys):
    Image.new('RGB', (60, 40)).save('photo.png')
    before = (tmp_path / 'photo.png').read_bytes()
    for output in ('.', 'photo.png', str(tmp_path)):
        assert run('photo.png', output=output) == 1
        assert 'would be replaced' in capsys.readouterr().err
    assert (tmp_path / 'photo.png').read_bytes() == before


def test_broken_inputs_are_skipped(real_checkpoint, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Image.new('L', (60, 40)).save('gray.png')
    (tmp_path / 'broken.jpg').write_bytes(b'no image')
    with pytest.raises(SystemExit) as stop:
        main(Parameters(inputs=('broken.jpg', 'gray.png', 'missing.jpg'),
                        checkpoint=str(real_checkpoint), output='out', device='cpu'))
    assert stop.value.code == 1
    assert [path.name for path in (tmp_path / 'out').iterdir()] == ['gray.png']
    error = capsys.readouterr().err
    assert 'broken.jpg: cannot be read' in error and 'missing.jpg: cannot be read' in error
    assert '2 of 3 inputs could not be read' in error


def test_password_of_a_stream_is_not_printed(run, capsys):
    assert run('http://admin:secret@127.0.0.1:9/video?pwd=secret', json='found.json') == 1
    error = capsys.readouterr().err
    assert 'http://127.0.0.1:9/video: cannot be read' in error and 'secret' not in error
