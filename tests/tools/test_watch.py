"""The watch: its rule with literal numbers, and main() with a file and with a camera over HTTP.

Instead of a network's detections, whoever is red in the middle of the picture is a person.
"""

import contextlib
import datetime
import inspect
import json
import math
import os
import pathlib
import shutil
import signal
import subprocess
import threading
import time
import types

import av
import pytest
import torch
from PIL import Image

from support import alarms, camera, clips
from support.errors import UserError
from support.video import VideoReader
from tools import watch
from tools.watch import (
    Occupation,
    Parameters,
    describe,
    is_inside,
    parse_zone,
    select_in_zone,
)


class RedDetector:
    """Instead of a Detector: a red image has a person, whose feet are at (0.5, 0.9)."""

    colors = {'person': '#ff0000', 'dog': '#0000ff'}

    def __init__(self, *arguments):
        """Take the arguments of a Detector."""

    def predict(self, images):
        """Return the prediction of one image."""
        (image,), (width, height) = images, images[0].size
        red, green, _ = image.getpixel((width // 2, height // 2))
        n = int(red > 200 and green < 100)
        boxes = torch.tensor([[0.4 * width, 0.2 * height, 0.6 * width, 0.9 * height]])
        return [{'boxes': boxes[:n],
                 'labels': ['person'] * n, 'scores': torch.tensor([0.875])[:n]}]


class Model:
    label_map = {'person': 1, 'dog': 2, 'background': 0}


@pytest.fixture
def run_main(tmp_path, monkeypatch, capsys):
    """Return a function that runs main() and returns the events and standard error."""
    monkeypatch.setattr(watch, 'load_model', lambda path, device: Model)
    monkeypatch.setattr(watch, 'Detector', RedDetector)
    monkeypatch.setattr(camera, 'FIRST_PAUSE', 0.05)
    monkeypatch.setattr(alarms, 'RETRY_PAUSES', (0, 0))
    (tmp_path / 'log.jsonl').touch()

    def run(source, **options):
        defaults = {'log': str(tmp_path / 'log.jsonl'), 'clips': str(tmp_path / 'clips'),
                    'classes': ('person',)}
        watch.main(Parameters(str(source), **(defaults | options)))
        captured = capsys.readouterr()
        assert (tmp_path / 'log.jsonl').read_text() == captured.out
        return [json.loads(line) for line in captured.out.splitlines()], captured.err
    return run


# --------------------------------------------------------------------------------------------------
# The rule
# --------------------------------------------------------------------------------------------------


def alarm_times(occupied, seconds=3, gap=1, cooldown=10, step=0.5, end=60):
    """Return the times of the alarms, if the zone is occupied in these intervals of time."""
    rule = Occupation(seconds, gap, cooldown)
    times = [step * i for i in range(int(end / step))]
    return [now for now in times
            if rule.update(now, any(start <= now < stop for start, stop in occupied))]


@pytest.mark.parametrize('occupied, expected', [
    ([], []),
    ([(1, 4)], []),                         # too short
    ([(1, 4.5)], [4]),
    ([(1, 60)], [4]),                       # one alarm per occupation
    ([(1, 3), (4, 6)], [4]),                # a gap of 1 s
    ([(1, 3), (4.5, 7)], []),               # a longer one
    ([(1, 3), (4.5, 8)], [7.5]),
    ([(1, 5), (20, 25)], [4, 23]),          # two occupations
    ([(1, 5), (8, 11.5)], [4]),             # the second one within the cool-down
    ([(1, 5), (8, 30)], [4, 14]),           # and beyond it
    ([(1, 3), (10, 14)], [13]),             # without an alarm there is no cool-down
])
def test_alarms_of_an_occupied_zone(occupied, expected):
    assert alarm_times(occupied) == expected


def test_rule_does_not_depend_on_the_frame_rate():
    """Two seconds per frame are more than the gap, and yet no absence."""
    assert alarm_times([(1, 30)], step=2) == [6]
    assert alarm_times([(1, 30)], step=1 / 64) == [4]
    assert alarm_times([(5, 6)], seconds=0) == [5]


def test_single_missed_detection_is_no_absence_at_any_frame_rate():
    assert alarm_times([(0, 2), (4, 60)], step=2) == [4]
    assert alarm_times([(0, 2), (6, 60)], step=2) == [10]
    assert alarm_times([(0, 60)], gap=0, step=2) == [4]
    assert alarm_times([(0, 4), (4.5, 60)], seconds=5, gap=0) == [5]


def test_point_in_a_polygon():
    concave = [(0., 0.), (1., 0.), (1., 1.), (0.5, 0.5), (0., 1.)]
    assert is_inside(0.1, 0.5, concave) and is_inside(0.5, 0.4, concave)
    assert not is_inside(0.5, 0.8, concave) and not is_inside(1.2, 0.5, concave)


def test_bottom_center_of_a_box_decides():
    prediction = {'boxes': torch.tensor([[0., 0., 20., 40.], [30., 0., 50., 100.],
                                         [150., 90., 250., 100.]]),
                  'labels': ['dog', 'person', 'person'], 'scores': torch.tensor([.9, .8, .7])}
    zone = parse_zone(('0.1,0.5', '0.9,0.5', '0.9,1', '0.1,1.0'))
    objects = select_in_zone(prediction, (200, 100), zone)
    # At (40, 100), on the lower border of the image; the dog is above the zone, the other person's
    # center on its right border.
    assert objects['labels'] == ['person'] and objects['boxes'].tolist() == [[30, 0, 50, 100]]
    assert objects['scores'].tolist() == pytest.approx([.8])
    everything = select_in_zone(prediction, (200, 100), parse_zone(()))
    assert everything['labels'] == ['dog', 'person', 'person']


@pytest.mark.parametrize('corners', [('0.1,0.1', '0.9,0.9'), ('0,0', '1,1', '0.5,0.5'),
                                     ('0,0', '1,0', '1,2'), ('0,0', '1,0', 'nan,1'),
                                     ('0,0', '1,0', '1'), ('a,b', '1,0', '1,1')])
def test_invalid_zone_is_user_error(corners):
    with pytest.raises(UserError, match='--zone'):
        parse_zone(corners)


def test_sentence():
    assert describe({'person': 2, 'dog': 1}) == '2 persons, 1 dog'
    assert describe({'bus': 2, 'sheep': 3, 'bench': 2}) == '2 buses, 3 sheep, 2 benches'


# --------------------------------------------------------------------------------------------------
# main()
# --------------------------------------------------------------------------------------------------


@pytest.fixture
def video(tmp_path):
    """Return the path of a video of 12 seconds, red from second 4 to 8, with sound."""
    path = tmp_path / 'a.mp4'
    with av.open(str(path), 'w') as container:
        stream = container.add_stream('libx264', rate=10, options={'g': '10'})
        stream.width, stream.height, stream.pix_fmt = 64, 48, 'yuv420p'
        audio = container.add_stream('aac', rate=16000)
        for i in range(120):
            color = 'red' if 40 <= i < 80 else 'blue'
            container.mux(stream.encode(av.VideoFrame.from_image(
                Image.new('RGB', (64, 48), color))))
        container.mux(stream.encode())
        for i in range(187):
            samples = av.AudioFrame.from_ndarray(torch.zeros(1, 1024).numpy(), 'fltp', 'mono')
            samples.sample_rate, samples.pts = 16000, 1024 * i
            container.mux(audio.encode(samples))
        container.mux(audio.encode())
    return path


def test_alarm_of_a_file(run_main, video, tmp_path, monkeypatch):
    made = []

    def record(kind):
        """Return a function that makes an object of a class, and stores the arguments."""
        def make(*arguments):
            made.append(arguments)
            return kind(*arguments)
        return make

    command = f"sh -c 'cat > {tmp_path}/json'"
    for kind in (alarms.Alarms, RedDetector, camera.Camera, Occupation):
        monkeypatch.setattr(watch, kind.__name__.removeprefix('Red'), record(kind))
    (event,), error = run_main(video, seconds=2., gap=0.5, cooldown=30., before=3., after=1.5,
                               min_score=0.3, max_overlap=0.6, precision='float32', timeout=7.,
                               run=command, alarm_timeout=20.)
    assert made == [
        (str(tmp_path / 'log.jsonl'), command, None, 20.),
        (Model, 1, {'person'}, 0.3, 0.6, 200, 'float32'), (str(video), 7., None, 9.5),
        (2., 0.5, 30.)]
    assert (event['event'], event['seen'], event['counts']) == ('alarm', '1 person', {'person': 1})
    assert event['source'] == str(video) and event['time'].endswith('+00:00')
    age = datetime.datetime.now(datetime.timezone.utc) - datetime.datetime.fromisoformat(
        event['time'])
    assert 0 <= age.total_seconds() < 600
    assert event['labels'] == ['person'] and event['scores'] == [0.875]
    assert event['boxes'] == [pytest.approx([25.6, 9.6, 38.4, 43.2])]
    assert event['image_size'] == [64, 48] and event['video_time'] == pytest.approx(6, abs=0.01)
    assert json.loads((tmp_path / 'json').read_text()) == event
    with Image.open(event['snapshot']) as snapshot:
        assert snapshot.size == (64, 48) and snapshot.getpixel((32, 40))[0] > 200
    with av.open(event['clip']) as clip:
        assert clip.duration / 1e6 == pytest.approx(4.5, abs=0.7)
        assert len(clip.streams.audio) == 1
        colors = [frame.to_image().getpixel((5, 5)) for frame in clip.decode(video=0)]
    n_blue = sum(blue > red for red, _, blue in colors)
    assert n_blue == pytest.approx(10, abs=5) and len(colors) == pytest.approx(45, abs=5)
    assert 'when person is in the zone for 2 seconds' in error and 'not the same person' in error
    assert f'{video}: 120 frames in ' in error


def test_snapshot_has_the_zone_and_the_box(run_main, video, monkeypatch):
    monkeypatch.setattr(RedDetector, 'colors', {'person': '#0000ff'})
    (event,), _ = run_main(video, seconds=2., zone=('0.25,0', '0.75,0', '0.75,1', '0.25,1'))
    with Image.open(event['snapshot']) as snapshot:
        assert snapshot.getpixel((16, 24))[1] > 120     # the left side of the zone, yellow
        assert snapshot.getpixel((32, 42))[2] > 60      # the lower edge of the box, blue
        red, green, blue = snapshot.getpixel((32, 30))
        assert red > 200 and green < 60 and blue < 60


def test_zone_without_anyone(run_main, video):
    events, error = run_main(video, zone=('0,0', '1,0', '1,0.5', '0,0.5'), fps=4.)
    assert events == [] and f'{video}: 48 frames in ' in error  # of 12 seconds


def test_default_timeout_is_that_of_other_videos():
    """Enough for a live playlist, whose segments may come 10 seconds apart."""
    assert Parameters('0').timeout == inspect.signature(VideoReader).parameters['timeout'].default
    assert Parameters('0').timeout == 30


def test_clip_that_the_memory_shortens_is_named(run_main, video, monkeypatch):
    with av.open(str(video)) as container:
        n_bytes = sum(packet.size for packet in container.demux())
    monkeypatch.setattr(clips, 'MAX_RING_BYTES', n_bytes // 3)
    (event,), error = run_main(video, seconds=2., before=1., after=10.)
    assert f"clip: {event['clip']} is shortened to " in error and '--after' in error
    with av.open(event['clip']) as clip:
        frames = list(clip.decode(video=0))
    assert 20 < len(frames) < 60    # of 70
    red, _, blue = frames[10].to_image().getpixel((5, 5))
    assert red > 200 and blue < 100     # the alarm, 1 second after the start of the clip


def test_watch_goes_on_without_its_folder(run_main, video, tmp_path, monkeypatch):
    """As with a full disk: the snapshot, the clip and the command are a line each."""
    folder, send = tmp_path / 'clips', watch.Watch.handle

    def handle(self, item):
        if folder.exists():
            folder.rmdir()
        send(self, item)

    monkeypatch.setattr(watch.Watch, 'handle', handle)
    (event,), error = run_main(video, run='false')
    assert event['event'] == 'alarm' and event['snapshot'] is None
    assert 'snapshot: ' in error and 'clip: ' in error and '120 frames' in error
    assert error.count('cannot be written') == 2


def test_no_clip_is_dropped_at_the_end_of_a_connection(tmp_path, monkeypatch, capsys):
    """All that wait for their end are written then, also on a slow disk."""
    written, go_on = [], threading.Event()

    def write_clip(path, templates, packets):
        go_on.wait(20)
        written.append(packets)

    monkeypatch.setattr(watch, 'write_clip', write_clip)
    requests = []
    ring = types.SimpleNamespace(suffix='.mp4', templates={}, is_closed=False,
                                 request=lambda start, end, function: requests.append(function))
    image = Image.new('RGB', (64, 48), 'red')
    detector = RedDetector(None, 1, ['person'], 0.4, 0.5, 200, 'auto')
    watched = watch.Watch('a', detector, parse_zone(()), Occupation(0, 0, 0),
                          alarms.Alarms(tmp_path / 'log.jsonl', None, None, 1), tmp_path, 5, 10)
    for i in range(6):
        watched.occupation = Occupation(0, 0, 0)
        watched.handle(camera.View(image.copy(), i, time.monotonic(), False, ring))
    ring.is_closed = True
    for i, function in enumerate(requests):
        function(i, False)
    go_on.set()
    watched.close(is_interrupted=False)
    assert written == [0, 1, 2, 3, 4, 5] and 'dropped' not in capsys.readouterr().err


@contextlib.contextmanager
def signal_when(condition, signal_number):
    """Send a signal to the watch in the block once a condition holds, or after 60 seconds."""
    is_over = threading.Event()

    def wait():
        deadline = time.monotonic() + 60
        while not (condition() or time.monotonic() > deadline or is_over.wait(0.03)):
            pass
        if not is_over.is_set():
            os.kill(os.getpid(), signal_number)

    thread = threading.Thread(target=wait, daemon=True)
    thread.start()
    try:
        yield
    finally:
        is_over.set()
        thread.join()


def test_camera_is_lost_and_back_and_sigterm_ends_the_watch(
        run_main, make_camera, jpeg_part, tmp_path):
    """The person stands there before the camera is lost and after: for a second occupation."""
    def count_alarms():
        return (tmp_path / 'log.jsonl').read_text().count('"alarm"')

    def first(send, is_closed):
        for _ in range(10):     # more than the clip must have
            send(jpeg_part('red'))
        while count_alarms() == 0 and not is_closed.wait(0.03):
            send(jpeg_part('red'))

    def second(send, is_closed):
        for _ in range(10):
            send(jpeg_part('red', (96, 72)))
        while not is_closed.wait(0.03):
            send(jpeg_part('red', (96, 72)))

    with signal_when(lambda: count_alarms() == 2, signal.SIGTERM):
        events, error = run_main(make_camera(first, second), seconds=0.2, gap=0., cooldown=0.,
                                 before=60., after=60.)
    assert [event['event'] for event in events] == ['alarm', 'camera lost', 'camera back', 'alarm']
    assert events[1]['reason'] and 'frames in' in error
    # The first clip ends with the connection, the second one with the watch.
    for event, size in zip((events[0], events[3]), (64, 96)):
        with av.open(event['clip']) as clip:
            assert clip.streams.video[0].width == size
            assert sum(not frame.is_corrupt for frame in clip.decode(video=0)) > 3


def test_password_is_neither_printed_nor_written(run_main, tmp_path):
    """The camera refuses the connection."""
    with signal_when(lambda: '"camera lost"' in (tmp_path / 'log.jsonl').read_text(),
                     signal.SIGINT):
        (event,), error = run_main('rtsp://admin:secret@127.0.0.1:9/live')
    assert event['source'] == 'rtsp://127.0.0.1:9/live' and 'refused' in event['reason']
    assert 'secret' not in error + json.dumps(event)


@pytest.mark.parametrize('options, message', [
    ({'source': 'missing.mp4'}, 'missing.mp4 is no file'),
    ({'seconds': -1.}, 'seconds is -1'), ({'fps': 0.}, 'fps is 0'),
    ({'min_score': 40.}, 'min_score is 40'), ({'max_overlap': math.nan}, 'max_overlap is nan'),
    ({'classes': ('cat',)}, 'no class is named cat; the model has person, dog'),
    ({'log': '.'}, ": '.'"), ({'run': 'no-such-program'}, 'no such program'),
    ({'webhook': 'ftp://x'}, '--webhook ftp://x'),
    ({'source': 'rtsp://admin:secret@[bad/'}, 'rtsp://[bad/ is no valid URL'),
    ({'source': 'rtsp://admin:secret@camera:80000/'}, 'rtsp://camera:80000/ is no valid URL'),
    ({'source': 'http://admin:secret@camera:x/?key=secret'}, 'http://camera:x/ is no valid URL'),
    ({'source': 'rtsp:///live'}, 'rtsp:///live is no valid URL'),
])
def test_invalid_parameters_are_user_errors(run_main, video, options, message, capsys, tmp_path):
    with signal_when(lambda: '"camera lost"' in (tmp_path / 'log.jsonl').read_text(),
                     signal.SIGTERM), pytest.raises(SystemExit):
        run_main(options.pop('source', video), **options)
    error = capsys.readouterr().err
    assert message in error and error.count('\n') == 1 and 'secret' not in error


@pytest.mark.skipif(shutil.which('jq') is None, reason='jq is not installed')
def test_command_of_the_documentation(tmp_path):
    text = pathlib.Path(__file__).parents[2].joinpath('docs', 'watch.md').read_text()
    script = '#!/bin/sh\n' + text.split('#!/bin/sh\n')[1].split('```')[0]
    for event in ({'event': 'alarm', 'time': '12:00', 'seen': '1 dog'},
                  {'event': 'camera lost', 'time': '12:01', 'reason': 'refused'},
                  {'event': 'camera back', 'time': '12:02'}):
        subprocess.run(['sh', '-c', script, 'alarm.sh', tmp_path / 'siren'],
                       input=json.dumps(event), text=True, check=True)
    assert (tmp_path / 'siren.txt').read_text().splitlines() == [
        '12:00 alarm 1 dog', '12:01 camera lost refused', '12:02 camera back ']
