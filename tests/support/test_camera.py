"""A camera: only its newest frame is looked at, and no stall, disconnection or garbage ends the
watch."""

import io
import itertools
import random
import threading
import types

import av
import pytest
from PIL import Image

from support import camera
from support.camera import Camera, Lost, RingReader
from support.clips import write_clip
from support.errors import UserError

COLORS = ('red', 'lime', 'blue')


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch):
    """Connect again at once."""
    monkeypatch.setattr(camera, 'FIRST_PAUSE', 0.05)


def color_of(view):
    """Return the name of the color of an image."""
    pixel = view.image.getpixel((20, 20))
    return COLORS[pixel.index(max(pixel))]


class Clock:
    """The module `time` with a clock that only the test, or each look at it, advances."""

    def __init__(self, step=0.):
        self.seconds, self.step = 100., step

    def monotonic(self):
        """Return the time."""
        self.seconds += self.step
        return self.seconds


def send_until(event, part):
    """Return a script of a server that sends the same frame until an event is set."""
    def script(send, is_closed):
        while not (event.is_set() or is_closed.wait(0.02)):
            send(part)
    return script


def send_forever(part):
    """Return a script of a server that sends the same frame again and again."""
    return send_until(threading.Event(), part)


def read_until(url, last, seen=(), timeout=30.):
    """Return what a camera yields, up to the first frame of a color.

    Args:
        url: of the camera.
        last: name of the color.
        seen: {name of a color: event that its first frame sets}.
        timeout: see Camera.

    Returns:
        The items, and the problems and names of colors, without repetition.
    """
    items, names = [], []
    with Camera(url, timeout, fps=None, seconds=1) as source:
        for item in source.read(threading.Event()):
            items.append(item)
            names.append(item.problem if isinstance(item, Lost) else color_of(item))
            if names[-1] in seen:
                seen[names[-1]].set()
            if names[-1] == last:
                break
    return items, [name for name, _ in itertools.groupby(names)]


def test_only_the_newest_frame_is_looked_at(make_camera, jpeg_part):
    """While the first frame is looked at, fifty arrive; the next one is the last of them."""
    go_on = threading.Event()

    def script(send, is_closed):
        for _ in range(4):      # FFmpeg reads some before it hands out the first
            send(jpeg_part('red'))
        go_on.wait(10)
        for _ in range(50):
            send(jpeg_part('lime'))
        send(jpeg_part('blue'))
        is_closed.wait(10)

    with Camera(make_camera(script), 60., fps=None, seconds=1) as source:
        views = source.read(threading.Event())
        assert color_of(next(views)) == 'red'
        go_on.set()
        n_green = 0
        while color_of(view := next(views)) != 'blue':
            n_green += color_of(view) == 'lime'
            threading.Event().wait(0.3)     # a slow network
        assert n_green < 10
        assert view.ring.n_bytes > 50 * 300  # and none of the packets is missing in the clips


def test_disconnected_camera_is_opened_again(make_camera, jpeg_part):
    seen = {'red': threading.Event(), 'lime': threading.Event()}
    url = make_camera(send_until(seen['red'], jpeg_part('red')),
                      send_until(seen['lime'], jpeg_part('lime')), send_forever(jpeg_part('blue')))
    _, names = read_until(url, 'blue', seen)
    assert names[::2] == ['red', 'lime', 'blue'] and len(names) == 5    # lost in between


def test_frame_of_a_lost_connection_is_dropped(make_camera, jpeg_part, monkeypatch):
    """Nobody looks while the first connection has frames, and ends."""
    has_ended, go_on = threading.Event(), threading.Event()

    def first(send, is_closed):
        for _ in range(4):
            send(jpeg_part('red'))

    def second(send, is_closed):
        go_on.wait(60)
        send_forever(jpeg_part('blue'))(send, is_closed)

    source = Camera(make_camera(first, second), 60., fps=None, seconds=1)
    monkeypatch.setattr(source.is_closed, 'wait', lambda pause: has_ended.set())
    with source:
        assert has_ended.wait(60) and source.reader is not None     # there was a frame
        items = source.read(threading.Event())
        assert isinstance(next(items), Lost)
        go_on.set()
        assert color_of(next(items)) == 'blue'


def record_pauses(monkeypatch, source, n):
    """Return the first n pauses between connections of a Camera, none of which is waited for."""
    pauses, is_done = [], threading.Event()

    def wait(pause):
        pauses.append(pause)
        if len(pauses) == n:
            source.is_closed.set()
            is_done.set()

    monkeypatch.setattr(source.is_closed, 'wait', wait)
    with source:
        assert is_done.wait(60)
    return pauses


def test_long_connection_shortens_the_pauses_again(make_camera, jpeg_part, monkeypatch):
    monkeypatch.setattr(camera, 'FIRST_PAUSE', 1e-9)

    def failed(send, is_closed):
        """Send nothing."""

    def longer_than_the_pause(send, is_closed):
        for _ in range(4):
            send(jpeg_part('red'))

    source = Camera(make_camera(failed, failed, longer_than_the_pause, failed), 60., None, 1)
    assert record_pauses(monkeypatch, source, 5) == [1e-9, 2e-9, 1e-9, 2e-9, 4e-9]


def test_new_sizes_do_not_lengthen_the_pauses(make_camera, jpeg_part, monkeypatch):
    """These connections work, however short they are."""
    monkeypatch.setattr(camera, 'FIRST_PAUSE', 1000)
    monkeypatch.setattr(camera, 'LAST_PAUSE', 10 ** 6)

    def script(send, is_closed):
        for _ in range(4):
            send(jpeg_part('red'))
        send_forever(jpeg_part('blue', (96, 72)))(send, is_closed)

    source = Camera(make_camera(script), 60., None, 1)
    assert record_pauses(monkeypatch, source, 3) == [1000, 1000, 1000]
    assert source.problem == 'the picture has a new size'


def test_frames_after_a_pause_are_decoded(make_camera, jpeg_part, monkeypatch):
    """The segments of a playlist come 10 seconds apart."""
    monkeypatch.setattr(camera, 'time', clock := Clock())
    url = make_camera(send_forever(jpeg_part('red')))
    with RingReader(url, timeout=30., seconds=1) as reader:
        n_frames = 0
        for _ in itertools.islice(reader, 5):
            clock.seconds += 40
            n_frames += 1
    assert n_frames == 5


def test_camera_that_hangs_is_lost_once_and_back(monkeypatch):
    """FFmpeg waits for a USB camera forever."""
    go_on, is_over = threading.Event(), threading.Event()

    class HangingReader:
        problem, ring = None, types.SimpleNamespace(close=lambda: None)

        def __init__(self, source, timeout, seconds):
            assert source == 0
            self.arrival = clock.seconds

        def __enter__(self):
            return self

        def __exit__(self, *error):
            """Nothing is open."""

        def __iter__(self):
            for color, event in (('red', go_on), ('blue', is_over)):
                self.arrival = clock.seconds
                yield types.SimpleNamespace(image=Image.new('RGB', (64, 48), color))
                event.wait(60)

    n_looks = 0

    def is_set():
        nonlocal n_looks
        n_looks += 1
        if n_looks == 10:   # several looks after the loss
            go_on.set()

    monkeypatch.setattr(camera, 'time', clock := Clock())
    monkeypatch.setattr(camera, 'RingReader', HangingReader)
    with Camera('0', 30., fps=None, seconds=1) as source:
        items = source.read(types.SimpleNamespace(is_set=is_set))
        assert color_of(next(items)) == 'red'
        clock.seconds += 31
        assert next(items) == Lost('no data came in time')
        assert color_of(next(items)) == 'blue' and n_looks >= 10
        is_over.set()


def test_stalled_camera_is_opened_again(make_camera, jpeg_part):
    seen = {'red': threading.Event()}

    def stall(send, is_closed):
        send_until(seen['red'], jpeg_part('red'))(send, is_closed)
        is_closed.wait(60)

    url = make_camera(stall, send_forever(jpeg_part('blue')))
    assert read_until(url, 'blue', seen, timeout=3.)[1] == ['red', 'no data came in time', 'blue']


def test_pauses_between_failed_connections_grow(monkeypatch):
    source = Camera('http://127.0.0.1:9/closed', 60., fps=None, seconds=1)
    monkeypatch.setattr(camera, 'LAST_PAUSE', 0.4)
    assert record_pauses(monkeypatch, source, 6) == [0.05, 0.1, 0.2, 0.4, 0.4, 0.4]
    assert 'refused' in source.problem


def test_garbage_does_not_end_the_watch(make_camera, jpeg_part):
    rng = random.Random(0)
    part = jpeg_part('red')
    called = []

    def garbage(send, is_closed):
        called.append('garbage')
        for _ in range(4):
            send(part)
        send(rng.randbytes(5000))

    def broken_frames(send, is_closed):
        called.append('broken frames')
        for _ in range(4):
            send(part)
        for _ in range(20):
            broken = bytearray(part)
            for _ in range(30):
                broken[rng.randrange(100, len(broken))] = rng.randrange(256)
            send(bytes(broken))
        send(part[:len(part) // 2])

    def garbage_only(send, is_closed):
        called.append('garbage only')
        send(rng.randbytes(20000))

    url = make_camera(garbage, broken_frames, garbage_only, send_forever(jpeg_part('blue')))
    items, _ = read_until(url, 'blue')
    assert called == ['garbage', 'broken frames', 'garbage only']
    assert any(isinstance(item, Lost) for item in items)


def read_all(url, monkeypatch):
    """Read frames, one second between two packets, until none could be decoded for 60 seconds."""
    monkeypatch.setattr(camera, 'time', Clock(step=1.))
    with RingReader(url, timeout=60., seconds=1) as reader:
        with pytest.raises(UserError, match='no frame could be decoded for 60 seconds'):
            list(reader)
    return reader


def test_camera_without_a_frame_that_can_be_decoded_is_lost(make_camera, jpeg_part, monkeypatch):
    """Data arrive, so that no timeout of the network ends it."""
    empty = (b'--frame\r\nContent-Type: image/jpeg\r\nContent-Length: 4\r\n\r\n'
             b'\xff\xd8\xff\xd9\r\n')

    def script(send, is_closed):
        for _ in range(4):
            send(jpeg_part('red'))
        for _ in range(500):
            send(empty)

    read_all(make_camera(script), monkeypatch)


def test_camera_with_sound_but_without_frames_is_lost(make_camera, monkeypatch):
    """Its sound continues, which must not fill the memory either."""
    content = io.BytesIO()
    with av.open(content, 'w', format='mpegts') as container:
        stream = container.add_stream('mpeg2video', rate=25)
        stream.width, stream.height = 64, 48
        audio = container.add_stream('mp2', rate=48000, layout='stereo')
        for i in range(5):
            frame = av.VideoFrame.from_image(Image.new('RGB', (64, 48), 'red'))
            frame.pts = i
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
        for i in range(200):
            samples = av.AudioFrame('s16', 'stereo', 1152)
            samples.sample_rate, samples.pts = 48000, 1152 * i
            container.mux(audio.encode(samples))

    def script(send, is_closed):
        send(content.getvalue())

    assert not read_all(make_camera(script), monkeypatch).audio_packets


def test_new_size_of_a_camera_is_a_new_connection(make_camera, jpeg_part):
    """So that the clips, whose streams are those of the connection, have it in their header."""
    seen = {'red': threading.Event()}
    large = send_forever(jpeg_part('blue', (96, 72)))

    def script(send, is_closed):
        send_until(seen['red'], jpeg_part('red'))(send, is_closed)
        large(send, is_closed)

    items, names = read_until(make_camera(script, large), 'blue', seen)
    assert names == ['red', 'the picture has a new size', 'blue'] and items[0].ring.is_closed
    stream, = items[-1].ring.templates.values()
    assert (stream.width, stream.height) == items[-1].image.size == (96, 72)


def write_video(path, codec, n_frames, size=(64, 48)):
    """Write a video of 25 frames per second."""
    with av.open(str(path), 'w') as container:
        stream = container.add_stream(codec, rate=25)
        stream.width, stream.height = size
        for _ in range(n_frames):
            container.mux(stream.encode(av.VideoFrame.from_image(Image.new('RGB', size))))
        container.mux(stream.encode())


def test_new_size_in_a_file_begins_a_new_ring(tmp_path):
    path = tmp_path / 'a.ts'
    for size in ((64, 48), (96, 72)):
        content = path.read_bytes() if path.exists() else b''
        write_video(path, 'mpeg2video', 20, size)
        path.write_bytes(content + path.read_bytes())
    with Camera(str(path), 5., fps=None, seconds=100) as source:
        views = list(source.read(threading.Event()))
    assert views[0].image.size == (64, 48) and views[-1].image.size == (96, 72)
    assert views[0].ring is not views[-1].ring and views[0].ring.is_closed


@pytest.fixture
def video(tmp_path):
    """Return the path of a video of 50 frames in 2 seconds."""
    path = tmp_path / 'a.mkv'
    write_video(path, 'mpeg4', 50)
    return path


def test_clip_after_a_new_size_in_a_file_begins_with_its_key_frame(tmp_path):
    """Threads of the H.264 decoder return a frame when later packets are in the ring already."""
    content = b''
    for size in ((64, 48), (96, 72)):
        write_video(tmp_path / 'a.ts', 'libx264', 40, size)
        content += (tmp_path / 'a.ts').read_bytes()
    (tmp_path / 'a.ts').write_bytes(content)
    with Camera(str(tmp_path / 'a.ts'), 5., fps=None, seconds=100) as source:
        *_, view = source.read(threading.Event())
    packets = [packet for group in view.ring.groups for packet in group]
    assert packets[0].is_keyframe and len(packets) == 40
    clip_path = tmp_path / f'clip{view.ring.suffix}'
    write_clip(clip_path, view.ring.templates, packets)
    with av.open(str(clip_path)) as clip:
        sizes = [(frame.width, frame.height) for frame in clip.decode(video=0)]
    assert sizes == 40 * [(96, 72)]


def test_every_frame_of_a_file_is_yielded_once(video):
    with Camera(str(video), 5., fps=None, seconds=1) as source:
        times = [view.time for view in source.read(threading.Event())]
    assert times == pytest.approx([i / 25 for i in range(50)], abs=0.002)


def test_joined_file_is_watched_to_its_end(tmp_path):
    """The times of its second half begin again."""
    path = tmp_path / 'a.ts'
    write_video(path, 'mpeg2video', 50)
    path.write_bytes(2 * path.read_bytes())
    with Camera(str(path), 5., fps=None, seconds=100) as source:
        *_, (time, ring) = [(view.time, view.ring) for view in source.read(threading.Event())]
    assert time == pytest.approx(4, abs=0.2)
    # The clips are on the same clock.
    assert ring.groups[-1][-1].time == pytest.approx(4, abs=0.2)


def test_fps_limits_the_frames_of_a_file(video):
    with Camera(str(video), 5., fps=5, seconds=1) as source:
        times = [view.time for view in source.read(threading.Event())]
    assert times == pytest.approx([i / 5 for i in range(10)], abs=0.042)    # the next frame


def test_broken_file_is_user_error(video):
    video.write_bytes(video.read_bytes()[:video.stat().st_size // 2])
    with Camera(str(video), 5., fps=None, seconds=1) as source:
        with pytest.raises(UserError, match=r'a\.mkv: it should last'):
            list(source.read(threading.Event()))
    video.write_bytes(b'no video')
    with Camera(str(video), 5., fps=None, seconds=1) as source:
        with pytest.raises(UserError, match='cannot be read'):
            list(source.read(threading.Event()))
