"""Videos: a copy has the times, sizes, rotation, colors and sound of its source; no input makes the
reader open another file or server, hang, or fail other than with a UserError."""

import contextlib
import functools
import http.server
import itertools
import os
import random
import socket
import threading
import types
from fractions import Fraction

import av
import pytest
import torch

from support.errors import UserError
from support.images import (
    OUTPUT_VIDEO_SUFFIXES,
    VIDEO_SUFFIXES,
    candidate_names,
    expand_inputs,
    is_video,
)
from support.video import ENCODERS, VideoReader, VideoWriter


def make_video(path, n_frames=12, size=(64, 48), sound=None, times=None, options=None,
               pixel_ratio=1):
    """Write a small video of noise; frame i is shown at times[i] / 12800 s, by default at i / 25 s.
    """
    with av.open(str(path), 'w', options=options or {}) as container:
        stream = container.add_stream('libx264', rate=25)
        stream.width, stream.height = size
        stream.pix_fmt = 'yuv420p' if size[0] % 2 == size[1] % 2 == 0 else 'yuv444p'
        stream.codec_context.time_base = Fraction(1, 12800)
        stream.codec_context.sample_aspect_ratio = pixel_ratio
        audio = container.add_stream(sound, rate=48000) if sound else None
        noise = torch.randint(256, (n_frames, size[1], size[0], 3), dtype=torch.uint8)
        for i in range(n_frames):
            frame = av.VideoFrame.from_ndarray(noise[i].numpy(), format='rgb24')
            frame.pts = times[i] if times else 512 * i
            frame.time_base = Fraction(1, 12800)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
        for i in range(n_frames * 1920 // 1024 if sound else 0):
            samples = av.AudioFrame.from_ndarray(torch.rand(1, 1024).numpy(), 'fltp', 'mono')
            samples.sample_rate, samples.pts = 48000, 1024 * i
            container.mux(audio.encode(samples))
        if sound:
            container.mux(audio.encode())
    return path


def rotate(path, matrix):
    """Set the rotation of an mp4: in the track's header, a matrix a b u c d v in 16.16 fixed point.
    """
    content = bytearray(path.read_bytes())
    start = content.index(b'tkhd') + 44
    a, b, c, d = (value << 16 for value in matrix)
    content[start:start + 24] = b''.join(
        value.to_bytes(4, 'big', signed=True) for value in (a, b, 0, c, d, 0))
    path.write_bytes(content)


def copy_video(source, target):
    """Read and write a video without a change; returns the writer's note."""
    with VideoReader(source) as reader, VideoWriter(target, reader) as writer:
        for frame in reader:
            writer.write(frame)
    return writer.note


def audio_packets(path):
    """Return the bytes and the time in seconds of each packet of sound."""
    with av.open(str(path)) as container:
        return [(bytes(packet), float(packet.pts * packet.time_base))
                for packet in container.demux(container.streams.audio[0]) if packet.dts is not None]


@pytest.mark.parametrize('suffix', ['.mp4', '.mkv', '.mov', '.avi', '.webm', '.m4v'])
def test_copy_keeps_times_and_size(tmp_path, suffix):
    source, target = make_video(tmp_path / 'a.mp4'), tmp_path / f'b{suffix}'
    copy_video(source, target)
    with VideoReader(source) as before, VideoReader(target) as after:
        assert after.rate == before.rate == 25
        frames, copies = list(before), list(after)
    assert len(frames) == len(copies) == 12
    for i, (frame, same) in enumerate(zip(frames, copies)):
        assert same.image.size == (64, 48) and same.number == i
        assert same.time == pytest.approx(frame.time, abs=0.001) == pytest.approx(i / 25, abs=0.001)


def test_copy_keeps_irregular_times(tmp_path):
    times = [0, 512, 700, 3000, 3001, 9000, 12800]
    source = make_video(tmp_path / 'a.mp4', 7, times=times)
    copy_video(source, tmp_path / 'b.mp4')
    with VideoReader(tmp_path / 'b.mp4') as reader:
        assert [round(frame.time * 12800) for frame in reader] == times


@pytest.mark.parametrize('matrix, expected', [((1, 0, 0, 1), Fraction(4, 3)),
                                              ((0, -1, 1, 0), Fraction(3, 4))])
def test_copy_keeps_the_aspect_ratio_of_pixels(tmp_path, matrix, expected):
    source = make_video(tmp_path / 'a.mp4', 3, pixel_ratio=Fraction(4, 3))
    rotate(source, matrix)
    copy_video(source, tmp_path / 'b.mp4')
    with VideoReader(source) as before, VideoReader(tmp_path / 'b.mp4') as after:
        assert before.stream.sample_aspect_ratio == Fraction(4, 3)
        assert after.stream.sample_aspect_ratio == expected     # of the upright image


def test_odd_size_is_padded_to_even(tmp_path):
    source = make_video(tmp_path / 'a.mp4', 3, size=(63, 47))
    copy_video(source, tmp_path / 'b.mp4')
    with VideoReader(source) as before, VideoReader(tmp_path / 'b.mp4') as after:
        assert before.first.image.size == (63, 47) and after.first.image.size == (64, 48)


@pytest.mark.parametrize('rotation, matrix, size, corner', [
    (90, (0, -1, 1, 0), (48, 64), (0, 63)), (180, (-1, 0, 0, -1), (64, 48), (63, 47)),
    (270, (0, 1, -1, 0), (48, 64), (47, 0))])
def test_rotated_video_is_read_upright(tmp_path, rotation, matrix, size, corner):
    path = make_video(tmp_path / 'a.mp4', 3)
    rotate(path, matrix)
    copy_video(path, tmp_path / 'b.mp4')
    with av.open(str(path)) as container:
        stored = next(container.decode(video=0))
        assert stored.rotation % 360 == rotation
        stored = stored.to_image()
    with VideoReader(path) as before, VideoReader(tmp_path / 'b.mp4') as after:
        assert before.first.image.size == after.first.image.size == size
        upright = before.first.image
    assert upright.getpixel(corner) == stored.getpixel((0, 0))


def test_copy_keeps_colors(tmp_path):
    source = make_video(tmp_path / 'a.mp4', 3)
    with VideoReader(source) as reader, VideoWriter(tmp_path / 'b.mp4', reader) as writer:
        for frame in reader:
            frame.image.paste((250, 30, 60), (0, 0, 64, 48))
            writer.write(frame)
    with VideoReader(tmp_path / 'b.mp4') as reader:
        for frame in reader:
            values = frame.image.getpixel((20, 20))
            assert all(abs(a - b) <= 5 for a, b in zip(values, (250, 30, 60)))


def test_sound_is_copied_unchanged(tmp_path):
    source = make_video(tmp_path / 'a.mp4', sound='aac')
    for suffix in ('.mp4', '.mkv', '.mov'):
        assert copy_video(source, tmp_path / f'b{suffix}') is None
        expected, found = audio_packets(source), audio_packets(tmp_path / f'b{suffix}')
        assert [data for data, _ in found] == [data for data, _ in expected]
        assert [time for _, time in found] == pytest.approx([time for _, time in expected],
                                                            abs=0.025)


def test_sound_that_the_format_cannot_hold_is_left_out_and_noted(tmp_path):
    note = copy_video(make_video(tmp_path / 'a.mp4', sound='aac'), tmp_path / 'b.webm')
    assert 'without its sound' in note
    with av.open(str(tmp_path / 'b.webm')) as container:
        assert not container.streams.audio
        assert len(list(container.decode(video=0))) == 12


def test_broken_frames_are_counted(tmp_path):
    path = make_video(tmp_path / 'a.mp4', 40)
    content = bytearray(path.read_bytes())
    end = content.rindex(b'moov')
    for position in range(end // 2, end * 3 // 4, 400):
        content[position] ^= 255
    path.write_bytes(content)
    with VideoReader(path) as reader:
        n_frames = len(list(reader))
    assert 0 < reader.n_broken < 20 and n_frames + reader.n_broken == 40


def test_truncated_video_is_reported(tmp_path):
    for suffix in ('.mkv', '.mp4'):
        path = make_video(tmp_path / f'a{suffix}', 60, options={'movflags': 'faststart'})
        with VideoReader(path) as reader:
            assert len(list(reader)) == 60 and reader.problem is None
        content = path.read_bytes()
        path.write_bytes(content[:len(content) // 2])
        with VideoReader(path) as reader:
            assert 10 < len(list(reader)) < 50
        assert reader.problem or reader.n_broken


def test_file_that_is_no_video_is_user_error(tmp_path):
    (tmp_path / 'no.mp4').write_bytes(b'no video')
    make_video(tmp_path / 'whole.mp4')
    half = (tmp_path / 'whole.mp4').read_bytes()
    (tmp_path / 'half.mp4').write_bytes(half[:len(half) // 2])
    for name in ('no.mp4', 'half.mp4', 'missing.mp4'):
        with pytest.raises(UserError, match='cannot be read'):
            VideoReader(tmp_path / name)
    with pytest.raises(UserError, match='camera .*99.* cannot be opened'):
        VideoReader(99)


def test_unwritable_file_is_user_error(tmp_path):
    with VideoReader(make_video(tmp_path / 'a.mp4')) as reader:
        for path in (tmp_path / 'b.wmv', tmp_path / 'no' / 'b.mp4'):
            with pytest.raises(UserError, match='cannot be written'):
                VideoWriter(path, reader)


def test_video_is_not_read_into_memory_as_a_whole(tmp_path):
    """Frames are decoded one by one, so after the first most of the sound is not read yet."""
    path = make_video(tmp_path / 'a.mkv', 200, sound='aac')
    with VideoReader(path) as reader:
        assert reader.n_frames == pytest.approx(200, abs=2)  # estimated from the duration
        assert len(reader.audio_packets) < len(audio_packets(path)) / 2


def test_every_output_suffix_has_an_encoder_and_can_be_read():
    assert tuple(ENCODERS) == OUTPUT_VIDEO_SUFFIXES and set(ENCODERS) <= set(VIDEO_SUFFIXES)


def copy_name(url):
    """Return the first name for the annotated version of a URL, which stays as it is."""
    assert expand_inputs([url]) == ([url], []) and is_video(url)
    return next(candidate_names(url))


def test_url_is_a_video_and_names_its_output():
    assert copy_name('rtsp://admin:secret@192.168.1.5:554/stream1') == 'stream1.mp4'
    assert copy_name('http://[::1]:8000/clips/a.mkv?token=[1]') == 'a.mkv'
    assert copy_name('rtsp://admin:secret@camera') == 'camera.mp4'
    assert copy_name('rtsp://admin:p[w@camera/live') == 'live.mp4'
    assert copy_name('rtsp://camera/user=admin&password=secret&channel=1.sdp') == 'camera.mp4'
    assert not is_video('file:a') and not is_video('ftp://host/a')


@pytest.fixture
def server(tmp_path):
    """Yield the URL of a server of the folder and the list of the paths it is sent; of a path that
    starts with /half it sends only the first half."""
    requests, stop = [], threading.Event()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            """Send a file."""
            requests.append(self.path)
            content = (tmp_path / self.path[1:]).read_bytes()
            self.send_response(200)
            self.send_header('Content-Length', str(len(content)))
            self.end_headers()
            is_half = self.path.startswith('/half')
            self.wfile.write(content[:len(content) // 2] if is_half else content)
            if is_half:
                stop.wait(10)

        def log_message(self, *args):
            """Print nothing."""

    server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f'http://127.0.0.1:{server.server_port}', requests
    stop.set()
    server.shutdown()
    server.server_close()
    thread.join()


PLAYLISTS = {
    'concat': 'ffconcat version 1.0\nfile {}\n',
    'hls': '#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\n{}\n#EXT-X-ENDLIST\n',
    'sdp': 'v=0\ns={}\nc=IN IP4 127.0.0.1\nt=0 0\nm=video 5004 RTP/AVP 26\n'}


@pytest.mark.parametrize('kind', PLAYLISTS)
def test_playlist_opens_neither_files_nor_servers(tmp_path, server, kind):
    url, requests = server
    make_video(tmp_path / 'other.ts')
    for target in ('other.ts', f'{url}/other.ts'):
        for suffix in ('.mp4', '.m3u8'):
            path = tmp_path / f'list{suffix}'
            path.write_text(PLAYLISTS[kind].format(target), encoding='utf-8')
            with pytest.raises(UserError, match='cannot be read'):
                VideoReader(path)
    assert not requests


@pytest.mark.parametrize('kind', PLAYLISTS)
def test_playlist_from_a_server_opens_no_file(tmp_path, server, kind):
    make_video(tmp_path / 'other.ts')
    (tmp_path / 'list.m3u8').write_text(
        PLAYLISTS[kind].format(f'file:{(tmp_path / "other.ts").as_posix()}'), encoding='utf-8')
    with pytest.raises(UserError, match='cannot be read'):
        VideoReader(f'{server[0]}/list.m3u8', timeout=5)


def test_stream_is_read_from_a_server(tmp_path, server):
    url, requests = server
    make_video(tmp_path / 'a.mp4')
    make_video(tmp_path / 'a.ts')
    (tmp_path / 'list.m3u8').write_text(PLAYLISTS['hls'].format('a.ts'), encoding='utf-8')
    for name in ('a.mp4', 'list.m3u8'):
        with VideoReader(f'{url}/{name}', timeout=20) as reader:
            assert len(list(reader)) == 12 and reader.problem is None
    assert requests[-1] == '/a.ts'


def test_frames_without_times_are_as_far_apart_as_they_arrive(
        tmp_path, make_camera, jpeg_part, monkeypatch):
    """FFmpeg numbers those of a motion JPEG camera as if there were 25 per second."""
    clock = types.SimpleNamespace(monotonic=functools.partial(next, itertools.count(100, 0.25)))
    monkeypatch.setattr('support.video.time', clock)

    def script(send, is_closed):
        for _ in range(8):
            send(jpeg_part('red'))

    with (VideoReader(make_camera(script), 5) as reader,
          VideoWriter(tmp_path / 'a.mp4', reader) as writer):
        times = []
        for frame in reader:
            times.append(frame.time)
            writer.write(frame)
    assert len(times) > 5
    assert all(after - before == 0.25 for before, after in itertools.pairwise(times))
    with VideoReader(tmp_path / 'a.mp4') as copy:
        assert [frame.time + times[0] for frame in copy] == pytest.approx(times, abs=0.002)


def test_stream_that_falls_silent_ends(tmp_path, server):
    make_video(tmp_path / 'half.mp4', 60, options={'movflags': 'faststart'})
    with VideoReader(f'{server[0]}/half.mp4', timeout=0.5) as reader:
        assert 10 < len(list(reader)) < 50
    assert reader.problem == 'no data came in time'


@pytest.mark.parametrize('scheme', ['rtsp', 'rtmp'])
def test_silent_server_is_user_error(scheme):
    with socket.create_server(('127.0.0.1', 0)) as listener:
        listener.settimeout(2)
        with pytest.raises(UserError, match='cannot be read'):
            VideoReader(f'{scheme}://127.0.0.1:{listener.getsockname()[1]}/a', timeout=0.2)
        connection, _ = listener.accept()
        with connection:
            assert connection.recv(10)  # the protocol is allowed


def test_frames_above_the_largest_size_are_not_decoded(tmp_path, monkeypatch):
    monkeypatch.setattr('support.video.MAX_PIXELS', 64 * 48)
    small, large = make_video(tmp_path / 'a.ts'), make_video(tmp_path / 'b.ts', size=(128, 96))
    with pytest.raises(UserError, match='128 x 96 pixels'):
        VideoReader(large)
    (tmp_path / 'c.ts').write_bytes(small.read_bytes() + large.read_bytes())
    with VideoReader(tmp_path / 'c.ts') as reader:
        assert {frame.image.size for frame in reader} == {(64, 48)} and reader.n_broken


def test_unknown_codec_is_user_error(tmp_path):
    path = make_video(tmp_path / 'a.mp4')
    path.write_bytes(path.read_bytes().replace(b'avc1', b'none'))
    with pytest.raises(UserError, match='no decoder'):
        VideoReader(path)


def test_metadata_that_is_not_utf8_is_ignored(tmp_path):
    path = make_video(tmp_path / 'a.mp4')
    path.write_bytes(path.read_bytes().replace(b'VideoHandler', b'Vid\xe9oHandler'))
    with VideoReader(path) as reader:
        assert len(list(reader)) == 12


def test_sound_whose_times_go_back_does_not_end_the_copy(tmp_path):
    content = make_video(tmp_path / 'a.ts', sound='aac').read_bytes()
    (tmp_path / 'twice.ts').write_bytes(2 * content)
    assert 'gaps in its sound' in copy_video(tmp_path / 'twice.ts', tmp_path / 'b.mp4')
    with VideoReader(tmp_path / 'b.mp4') as reader:
        assert len(list(reader)) == 24


def test_times_of_joined_files_continue(tmp_path):
    """The second file's begin again; it has fewer frames than the first, by more than a second."""
    contents = [make_video(tmp_path / f'{n}.ts', n, sound='aac').read_bytes() for n in (100, 50)]
    (tmp_path / 'joined.ts').write_bytes(b''.join(contents))
    assert copy_video(tmp_path / 'joined.ts', tmp_path / 'b.mp4') is None
    for name in ('joined.ts', 'b.mp4'):
        with VideoReader(tmp_path / name) as reader:
            times = [frame.time for frame in reader]
        assert len(times) == 150
        assert times[100:] == pytest.approx([i / 25 for i in range(100, 150)], abs=0.1)
    sound = [time for _, time in audio_packets(tmp_path / 'b.mp4')]
    assert sound == sorted(sound) and sound[-1] == pytest.approx(6, abs=0.2)


def mutate(content, rng):
    """Return the bytes of a file with some of them changed, cut off, removed or swapped."""
    content, kind = bytearray(content), rng.choice(('bytes', 'ends', 'cut', 'remove', 'swap'))
    i, j = sorted(rng.sample(range(len(content)), 2))
    n = rng.randrange(1, 400)
    if kind == 'cut':
        return content[:j]
    if kind == 'remove':
        return content[:j] + content[j + n:]
    if kind == 'swap':
        content[i:i + n], content[j:j + n] = content[j:j + n], content[i:i + n]
        return content
    for _ in range(rng.choice((1, 4, 16))):
        # The headers are at the ends.
        place = rng.randrange(len(content) if kind == 'bytes' else 1000)
        content[rng.choice((place, -1 - place))] = rng.choice((0, 255, rng.randrange(256)))
    return content


@pytest.mark.parametrize('suffix', ['.mp4', '.mkv', '.avi', '.mov', '.webm', '.ts'])
def test_mutated_video_ends_as_frames_or_as_user_error(tmp_path, suffix, capfd):
    """SSD_FUZZ is the number of mutated files of all formats together."""
    source = make_video(tmp_path / ('a.ts' if suffix == '.ts' else 'a.mp4'), sound='aac')
    if source.suffix != suffix:
        source, _ = tmp_path / f'a{suffix}', copy_video(source, tmp_path / f'a{suffix}')
    content, path = source.read_bytes(), tmp_path / f'mutated{suffix}'
    for seed in range(int(os.environ.get('SSD_FUZZ', 60)) // 6):
        path.write_bytes(mutate(content, random.Random(f'{suffix} {seed}')))
        with contextlib.suppress(UserError), VideoReader(path) as reader:
            frames = list(itertools.islice(reader, 200))
            assert all(frame.image.mode == 'RGB' for frame in frames)
            with VideoWriter(tmp_path / 'copy.mp4', reader) as writer:
                for frame in frames:
                    writer.write(frame)
    assert capfd.readouterr().err == ''  # FFmpeg's log is off
