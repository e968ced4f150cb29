"""A camera: only its newest frame is looked at, and no stall, disconnection or garbage ends the
watch."""

import io
import itertools
import random
import threading

import av
import pytest
from PIL import Image

from support import camera
from support.camera import Camera, Lost
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


def send_forever(part):
    """Return a script of a server that sends the same frame again and again."""
    def script(send, is_closed):
        while not is_closed.wait(0.02):
            send(part)
    return script


def read_until(url, is_last, timeout=5.):
    """Return the items of a camera up to the first one that `is_last` is true of."""
    items = []
    with Camera(url, timeout, fps=None, seconds=1) as source:
        for item in source.read(threading.Event()):
            items.append(item)
            if is_last(item):
                return items
    return None


def is_color(name):
    """Return a function that tells whether an item is a frame of a color."""
    return lambda item: not isinstance(item, Lost) and color_of(item) == name


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

    with Camera(make_camera(script), 5., fps=None, seconds=1) as source:
        views = source.read(threading.Event())
        assert color_of(next(views)) == 'red'
        go_on.set()
        n_green = 0
        while not is_color('blue')(view := next(views)):
            n_green += color_of(view) == 'lime'
            threading.Event().wait(0.3)     # a slow network
        assert n_green < 10
        assert view.ring.n_bytes > 50 * 300  # and none of the packets is missing in the clips


def test_disconnected_camera_is_opened_again(make_camera, jpeg_part):
    def short(send, is_closed):
        for _ in range(4):
            send(jpeg_part('red'))

    items = read_until(make_camera(short, short, send_forever(jpeg_part('blue'))),
                       is_color('blue'))
    assert sum(isinstance(item, Lost) for item in items) == 2


def test_stalled_camera_is_opened_again(make_camera, jpeg_part):
    def stall(send, is_closed):
        for _ in range(4):
            send(jpeg_part('red'))
        is_closed.wait(20)

    items = read_until(make_camera(stall, send_forever(jpeg_part('blue'))), is_color('blue'), 0.5)
    assert [item.problem for item in items if isinstance(item, Lost)] == ['no data came in time']


def test_pauses_between_failed_connections_grow(monkeypatch):
    pauses = []
    source = Camera('http://127.0.0.1:9/closed', 1., fps=None, seconds=1)
    monkeypatch.setattr(camera, 'LAST_PAUSE', 0.4)
    monkeypatch.setattr(source.is_closed, 'wait', pauses.append)
    with source:
        for item in source.read(threading.Event()):
            assert isinstance(item, Lost) and 'refused' in item.problem
            if len(pauses) > 5:
                break
    assert pauses[:6] == [0.05, 0.1, 0.2, 0.4, 0.4, 0.4]


def test_garbage_does_not_end_the_watch(make_camera, jpeg_part):
    rng = random.Random(0)
    part = jpeg_part('red')

    def garbage(send, is_closed):
        for _ in range(4):
            send(part)
        send(rng.randbytes(5000))

    def broken_frames(send, is_closed):
        for _ in range(4):
            send(part)
        for _ in range(20):
            broken = bytearray(part)
            for _ in range(30):
                broken[rng.randrange(100, len(broken))] = rng.randrange(256)
            send(bytes(broken))
        send(part[:len(part) // 2])

    def garbage_only(send, is_closed):
        send(rng.randbytes(20000))

    items = read_until(make_camera(garbage, broken_frames, garbage_only,
                                   send_forever(jpeg_part('blue'))), is_color('blue'))
    assert sum(isinstance(item, Lost) for item in items) >= 3


def test_camera_without_a_frame_that_can_be_decoded_is_lost(make_camera, jpeg_part):
    """Data arrive, so that no timeout of the network ends it."""
    empty = (b'--frame\r\nContent-Type: image/jpeg\r\nContent-Length: 4\r\n\r\n'
             b'\xff\xd8\xff\xd9\r\n')

    def script(send, is_closed):
        for _ in range(4):
            send(jpeg_part('red'))
        while not is_closed.wait(0.02):
            send(empty)

    items = read_until(make_camera(script, send_forever(jpeg_part('blue'))), is_color('blue'), 0.5)
    problem, = [item.problem for item in items if isinstance(item, Lost)]
    # The second, if this computer is too busy to send the sound in time.
    assert 'no frame could be decoded' in problem or 'no data came in time' in problem


def test_camera_with_sound_but_without_frames_is_lost(make_camera, jpeg_part):
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
        data = content.getvalue()
        for start in range(0, len(data), 188 * 5):
            send(data[start:start + 188 * 5])
            is_closed.wait(0.02)

    items = read_until(make_camera(script, send_forever(jpeg_part('blue'))), is_color('blue'), 1.)
    problem, = [item.problem for item in items if isinstance(item, Lost)]
    # The second, if this computer is too busy to send the sound in time.
    assert 'no frame could be decoded' in problem or 'no data came in time' in problem


def test_new_size_of_a_camera_is_a_new_connection(make_camera, jpeg_part):
    """So that the clips, whose streams are those of the connection, have it in their header."""
    large = send_forever(jpeg_part('blue', (96, 72)))

    def script(send, is_closed):
        for _ in range(20):
            send(jpeg_part('red'))
            is_closed.wait(0.02)
        large(send, is_closed)

    items = read_until(make_camera(script, large), is_color('blue'))
    problem, = [item.problem for item in items if isinstance(item, Lost)]
    assert problem == 'the picture has a new size' and items[0].ring.is_closed
    stream, = items[-1].ring.templates.values()
    assert (stream.width, stream.height) == items[-1].image.size == (96, 72)


def write_video(path, codec, n_frames, size=(64, 48)):
    """Write a video of 25 frames per second."""
    with av.open(str(path), 'w') as container:
        stream = container.add_stream(codec, rate=25)
        stream.width, stream.height = size
        for _ in range(n_frames):
            container.mux(stream.encode(av.VideoFrame(*size)))
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
    assert 10 <= len(times) <= 11
    assert all(0.15 < b - a < 0.25 for a, b in itertools.pairwise(times[1:]))


def test_broken_file_is_user_error(video):
    video.write_bytes(video.read_bytes()[:video.stat().st_size // 2])
    with Camera(str(video), 5., fps=None, seconds=1) as source:
        with pytest.raises(UserError, match=r'a\.mkv: it should last'):
            list(source.read(threading.Event()))
    video.write_bytes(b'no video')
    with Camera(str(video), 5., fps=None, seconds=1) as source:
        with pytest.raises(UserError, match='cannot be read'):
            list(source.read(threading.Event()))
