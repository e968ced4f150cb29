"""`detect()`, `predict()` and the command line, with a model that finds what the test wants."""

import doctest
import io
import json
import signal

import av
import pytest
import torch
from PIL import Image, ImageOps
from test_video import make_video

import detect as detect_module
from detect import Parameters, choose_outputs, detect, draw_objects, main, predict
from files import expand_inputs
from model import SSD300
from utils import (
    UserError,
    cxcy_to_gcxgcy,
    distinct_colors,
    label_map,
    save_checkpoint,
    xy_to_cxcy,
)

THRESHOLDS = {'min_score': 0.2, 'max_overlap': 0.5, 'top_k': 200}


class FixedModel(SSD300):
    """Finds the given objects (label number, box in fractions, logit) on every image."""

    def __init__(self, objects, n_classes=21):
        super().__init__(n_classes)
        self.objects = objects
        self.seen = None
        self.eval()

    def forward(self, image):
        self.seen = image
        locs = torch.zeros(len(image), 8732, 4)
        scores = torch.zeros(len(image), 8732, self.n_classes)
        scores[..., 0] = 10.
        for prior, (label, box, logit) in enumerate(self.objects):
            box = xy_to_cxcy(torch.tensor(box))
            locs[:, prior] = cxcy_to_gcxgcy(box, self.priors_cxcy[prior])
            scores[:, prior, label] = logit
        return locs, scores


@pytest.fixture(scope='module')
def model():
    return FixedModel([(label_map['dog'], [.1, .2, .5, .6], 20.),
                       (label_map['cat'], [.5, .5, .9, 1.], 12.)])


def test_prediction_is_in_pixels_of_each_image(model):
    images = [Image.new('RGB', (200, 100)), Image.new('L', (50, 400))]
    for image, prediction in zip(images, predict(images, **THRESHOLDS, model=model), strict=True):
        expected = torch.tensor([[.1, .2, .5, .6], [.5, .5, .9, 1.]])
        expected = expected * torch.tensor([*image.size, *image.size])
        assert torch.allclose(prediction['boxes'], expected, atol=0.01)
        assert prediction['labels'] == ['dog', 'cat']
        assert prediction['scores'].shape == (2,) and prediction['scores'][0] > 0.99


def test_many_images_are_predicted_in_batches(model, monkeypatch):
    monkeypatch.setattr(detect_module, 'BATCH_SIZE', 2)
    images = [Image.new('RGB', (10 * width, 50)) for width in range(1, 6)]
    predictions = predict(images, **THRESHOLDS, model=model)
    assert len(model.seen) == 1 and len(predictions) == 5
    for image, prediction in zip(images, predictions):
        alone, = predict([image], **THRESHOLDS, model=model)
        assert torch.equal(prediction['boxes'], alone['boxes'])


def test_nothing_found_is_empty(model):
    prediction, = predict([Image.new('RGB', (30, 30))], min_score=1., max_overlap=.5, top_k=200,
                          model=model)
    assert prediction['boxes'].shape == (0, 4) and prediction['scores'].shape == (0,)
    assert prediction['labels'] == []
    assert predict([], **THRESHOLDS, model=model) == []


@pytest.mark.parametrize('mode', ['1', 'L', 'LA', 'P', 'RGBA', 'CMYK', 'YCbCr', 'I;16', 'I', 'F'])
def test_any_mode_is_annotated_and_left_alone(model, mode):
    image = Image.new(mode, (120, 80))
    before = image.tobytes()
    annotated = detect(image, **THRESHOLDS, model=model)
    assert annotated.mode == 'RGB' and annotated.size == image.size
    assert image.tobytes() == before and image.mode == mode
    assert annotated is not image and len(annotated.getcolors(maxcolors=10_000)) > 1


@pytest.mark.parametrize('size', [(1, 1), (8, 3), (40, 40), (3000, 200), (1500, 2000)])
def test_any_size_is_annotated(model, size):
    annotated = detect(Image.new('RGB', size, 'gray'), **THRESHOLDS, model=model)
    assert annotated.size == size
    assert annotated.tobytes() != Image.new('RGB', size, 'gray').tobytes()


@pytest.mark.parametrize('orientation', range(1, 9))
def test_exif_orientation_is_respected_and_not_handed_on(model, orientation):
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
    seen_upright = model.seen.clone()
    predict([upright], **THRESHOLDS, model=model)
    assert torch.equal(seen_upright, model.seen)

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


def test_labels_stay_inside_the_image():
    image = Image.new('RGB', (300, 200))
    prediction = {'boxes': torch.tensor([[250., 0, 300, 40], [0., 150, 30, 200]]),
                  'labels': ['diningtable', 'tvmonitor'], 'scores': torch.tensor([.9, .8])}
    draw_objects(image, prediction, dict.fromkeys(prediction['labels'], '#ff0000'), ())
    larger = Image.new('RGB', (500, 400))
    draw_objects(larger, prediction, dict.fromkeys(prediction['labels'], '#ff0000'), ())
    width = 12 * 10  # of a label, about
    assert image.crop((300 - width, 0, 250, 8)).getextrema()[0][1] == 255, 'moved to the left'


def test_every_class_has_a_colour_of_its_own():
    many = {'background': 0, **{f'class {i}': i for i in range(1, 81)}}
    for names in (label_map, many):
        colors = distinct_colors(names)
        assert colors.keys() == names.keys() and len(set(colors.values())) == len(names)
        assert all(len(color) == 7 and color[0] == '#' for color in colors.values())


def test_default_model_is_loaded_once(model, monkeypatch, tmp_path):
    loaded = []

    def load(path):
        loaded.append(path)
        return model

    monkeypatch.setattr(detect_module.SSD300, 'from_checkpoint', load)
    detect_module.default_model.cache_clear()
    for _ in range(2):
        detect(Image.new('RGB', (20, 20)), **THRESHOLDS)
        predict([Image.new('RGB', (20, 20))], **THRESHOLDS)
    detect_module.default_model.cache_clear()
    assert loaded == ['./checkpoint_ssd300.pth.tar']


def test_only_some_classes_count_and_leave_room_for_each_other(model):
    image = Image.new('RGB', (200, 100), 'gray')
    prediction, = predict([image], top_k=1, model=model, classes=['cat', 'cow'])
    assert prediction['labels'] == ['cat'] and prediction['boxes'].shape == (1, 4)
    nothing, = predict([image], model=model, classes=['cow'])
    assert nothing['labels'] == [] and nothing['boxes'].shape == (0, 4)
    prediction, = predict([image], model=model, classes=['cat', 'dog'], suppress=['dog'])
    assert prediction['labels'] == ['cat']
    with pytest.raises(UserError, match='unicorn.*the model has aeroplane, bicycle'):
        predict([image], model=model, classes=['unicorn'])


def test_the_example_of_the_docstring_runs(model, monkeypatch, tmp_path):
    shown = []
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(detect_module.SSD300, 'from_checkpoint', lambda path: model)
    monkeypatch.setattr(Image.Image, 'show', lambda image: shown.append(image))
    Image.new('RGB', (60, 40)).save('photo.jpg')
    detect_module.default_model.cache_clear()
    result = doctest.testmod(detect_module)
    detect_module.default_model.cache_clear()
    assert result.attempted == 6 and result.failed == 0 and shown[0].size == (60, 40)


# --- the command line ---


@pytest.fixture
def run(model, monkeypatch, tmp_path):
    """A function that runs the script in an empty folder; returns the exit status."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(detect_module.SSD300, 'from_checkpoint', lambda path: model)

    def run_main(*inputs, **parameters):
        try:
            main(Parameters(inputs=inputs, device='cpu', **{'batch_size': 4} | parameters))
        except SystemExit as stop:
            return stop.code
        return 0
    return run_main


def test_folders_patterns_and_standard_input(run, tmp_path, capsys, monkeypatch):
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


def test_one_broken_image_among_many(run, tmp_path, capsys):
    (tmp_path / 'in').mkdir()
    for number in range(30):
        Image.new('RGB', (30, 20)).save(tmp_path / 'in' / f'{number}.png')
    (tmp_path / 'in' / '7.png').write_bytes(b'no image')
    assert run('in', json='found.json', classes=('cat',)) == 1
    error = capsys.readouterr().err
    assert error.count('passed over') == 1 and 'in/7.png: cannot be read' in error
    rows = json.loads((tmp_path / 'found.json').read_text())
    assert len(rows) == 29 and all(row['labels'] == ['cat'] for row in rows)


def test_a_slip_in_a_class_is_told_before_anything_is_written(run, tmp_path, capsys):
    Image.new('RGB', (60, 40)).save('photo.png')
    assert run('photo.png', classes=('unicorn',)) == 1
    assert 'unicorn' in capsys.readouterr().err and not (tmp_path / 'detections').exists()
    assert run('photo.png', json='photo.png') == 1
    assert 'would be replaced' in capsys.readouterr().err


def test_a_video_is_annotated_and_reported(run, tmp_path):
    make_video(tmp_path / 'clip.mp4', sound='aac')
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


def test_good_videos_are_annotated_when_others_are_broken(run, tmp_path, capsys):
    make_video(tmp_path / 'clip.mp4')
    make_video(tmp_path / 'clip.mkv')
    Image.new('RGB', (60, 40)).save('clip.png')
    (tmp_path / 'broken.mp4').write_bytes(b'no video')
    assert run('broken.mp4', 'clip.mp4', 'clip.png', 'clip.mkv', '99') == 1
    error = capsys.readouterr().err
    assert 'broken.mp4: cannot be read' in error and '99: camera' in error
    assert '2 of 5 inputs could not be read' in error
    assert sorted(path.name for path in (tmp_path / 'detections').iterdir()) == [
        'clip.mkv', 'clip.mp4', 'clip.png']


def test_a_video_is_no_image(run, tmp_path, capsys):
    make_video(tmp_path / 'clip.mp4', 2)
    for output in ('a.png', 'a.wmv'):
        assert run('clip.mp4', output=output) == 1
        assert f'cannot be written as {output[1:]}' in capsys.readouterr().err


@pytest.mark.parametrize('name, status', [('clip.mp4', 1), ('0', 0)])
def test_ctrl_c_finishes_the_file(run, model, tmp_path, capsys, monkeypatch, name, status):
    """An ordinary end for a camera, which a file stands for here."""
    make_video(tmp_path / 'clip.mp4', 40)
    reader = detect_module.VideoReader
    monkeypatch.setattr(detect_module, 'VideoReader', lambda source: reader('clip.mp4'))
    seen = []

    def forward(image):
        seen.append(len(image))
        if len(seen) == 3:
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


def test_each_input_counts_once(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / '[a]').mkdir()
    for name in ('[a]/1.jpg', '3'):
        (tmp_path / name).write_bytes(b'')
    assert expand_inputs(['[a]/1.jpg', '[a]', '3', '4', 'missing.jpg']) == (
        ['[a]/1.jpg', '3', '4', 'missing.jpg'], [])


def test_outputs_are_files_or_go_into_a_folder(tmp_path):
    folder = tmp_path / 'out'
    assert choose_outputs(['a.jpg'], tmp_path / 'new' / 'b.PNG') == [tmp_path / 'new' / 'b.PNG']
    assert choose_outputs(['x/a.jpg', 'y/a.jpg', 'y/b.xyz'], folder) == [
        folder / 'a.jpg', folder / 'a_2.jpg', folder / 'b.png']
    assert choose_outputs(['a.jpg'], folder) == [folder / 'a.jpg']
    (tmp_path / 'folder.png').mkdir()
    assert choose_outputs(['a.jpg'], tmp_path / 'folder.png') == [tmp_path / 'folder.png' / 'a.jpg']


def test_an_input_is_never_replaced(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_checkpoint('model.pth', model=SSD300(2).state_dict(), label_map={'background': 0, 'a': 1})
    Image.new('RGB', (60, 40)).save('photo.png')
    before = (tmp_path / 'photo.png').read_bytes()
    for output in ('.', 'photo.png', str(tmp_path)):
        with pytest.raises(SystemExit):
            main(Parameters(inputs=('photo.png',), checkpoint='model.pth', output=output,
                            device='cpu'))
        assert 'would be replaced' in capsys.readouterr().err
    assert (tmp_path / 'photo.png').read_bytes() == before


def test_good_inputs_are_annotated_when_others_are_broken(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_checkpoint('model.pth', model=SSD300(3).state_dict(),
                    label_map={'background': 0, 'cat': 1, 'dog': 2})
    Image.new('L', (60, 40)).save('gray.png')
    (tmp_path / 'broken.jpg').write_bytes(b'no image')
    with pytest.raises(SystemExit) as stop:
        main(Parameters(inputs=('broken.jpg', 'gray.png', 'missing.jpg'), checkpoint='model.pth',
                        output='out', device='cpu'))
    assert stop.value.code == 1
    assert [path.name for path in (tmp_path / 'out').iterdir()] == ['gray.png']
    error = capsys.readouterr().err
    assert 'broken.jpg: cannot be read' in error and 'missing.jpg: cannot be read' in error
    assert '2 of 3 inputs could not be read' in error
