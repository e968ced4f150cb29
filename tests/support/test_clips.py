"""Clips begin at a key frame and hold the sound; their times rise whatever the source's do."""

from fractions import Fraction

import av
import pytest
import torch
from PIL import Image

from support import clips
from support.clips import Ring, StoredPacket, choose_suffix, timed_from_zero, write_clip
from support.errors import UserError

SECONDS = 10


@pytest.fixture(scope='module')
def video(tmp_path_factory):
    """Return the path of a video of ten seconds with a key frame per second, and sound."""
    path = tmp_path_factory.mktemp('video') / 'a.mp4'
    with av.open(str(path), 'w') as container:
        stream = container.add_stream('libx264', rate=10, options={'g': '10', 'sc_threshold': '0'})
        stream.width, stream.height, stream.pix_fmt = 64, 48, 'yuv420p'
        audio = container.add_stream('aac', rate=16000)
        for i in range(10 * SECONDS):
            frame = av.VideoFrame.from_image(Image.new('RGB', (64, 48)))
            frame.pts, frame.time_base = i, Fraction(1, 10)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
        for i in range(16000 * SECONDS // 1024):
            samples = av.AudioFrame.from_ndarray(torch.rand(1, 1024).numpy(), 'fltp', 'mono')
            samples.sample_rate, samples.pts = 16000, 1024 * i
            container.mux(audio.encode(samples))
        container.mux(audio.encode())
    return path


def fill(video, seconds, requests=(), n_times=1, is_timed=True):
    """Add the packets of a video to a ring, n times: at each time the timestamps begin again.

    Returns:
        The ring; its input is closed.
    """
    for i in range(n_times):
        with av.open(str(video)) as container:
            if i == 0:
                ring = Ring(container.streams, seconds, is_timed)
                for request in requests:
                    ring.request(*request)
            for packet in container.demux():
                if packet.dts is not None:
                    ring.add(packet, SECONDS * i + float(packet.dts * packet.time_base))
    return ring


def store_in(handed_out):
    """Return a function that stores the packets of a clip, which the memory must not shorten."""
    def store(packets, is_shortened):
        assert not is_shortened
        handed_out.append(packets)
    return store


def read(path):
    """Return the times of the pictures and of the packets of sound; all pictures are intact."""
    with av.open(str(path)) as container:
        packets = [packet for packet in container.demux() if packet.size]
        video = [packet for packet in packets if packet.stream.type == 'video']
        sound = [float(packet.pts * packet.time_base) for packet in packets
                 if packet.stream.type == 'audio']
    assert video[0].is_keyframe
    with av.open(str(path)) as container:
        pictures = [frame.time for frame in container.decode(video=0) if not frame.is_corrupt]
    assert len(pictures) == len(video)
    return pictures, sound


@pytest.mark.parametrize('suffix', ['.mp4', '.mkv'])
def test_clip_begins_at_the_key_frame_before_and_has_the_sound(video, tmp_path, suffix):
    handed_out = []
    ring = fill(video, 5, [(3.5, 6, store_in(handed_out))])
    assert ring.suffix == '.mp4'
    write_clip(tmp_path / f'clip{suffix}', ring.templates, *handed_out)
    pictures, sound = read(tmp_path / f'clip{suffix}')
    pictures = [time - pictures[0] for time in pictures]
    assert pictures[:25] == pytest.approx([i / 10 for i in range(25)], abs=0.01)
    # From second 3 to 6; where it ends, frames are not in the order of their times.
    assert len(pictures) == pytest.approx(31, abs=2)
    assert len(sound) * 1024 / 16000 == pytest.approx(3, abs=0.3)
    assert sound[-1] == pytest.approx(3, abs=0.3)


def test_times_that_begin_again_rise_in_the_clip(video, tmp_path):
    """As after a camera's restart: from second 8 of the first round to second 2 of the next."""
    handed_out = []
    ring = fill(video, 6, [(8, 12, store_in(handed_out))], n_times=2)
    write_clip(tmp_path / 'clip.mp4', ring.templates, *handed_out)
    pictures, sound = read(tmp_path / 'clip.mp4')
    assert len(pictures) == pytest.approx(40, abs=3) and pictures == sorted(set(pictures))
    assert pictures[-1] - pictures[0] == pytest.approx(4, abs=0.4)
    assert sound[-1] == pytest.approx(4, abs=0.4)


def packet(time, dts, stream_index=0):
    """Return an empty packet that arrived at a time, with its own time in hundredths."""
    return StoredPacket(b'', stream_index, True, dts, dts, Fraction(1, 100), 0, time)


def test_arrivals_replace_missing_times():
    """Without times of their own, or with a jump, packets are as far apart as they arrived."""
    untimed = [packet(time, None) for time in (50, 50, 50.1, 50.4)]
    assert [position for _, position in timed_from_zero(untimed)] == pytest.approx(
        [0, 0.001, 0.1, 0.4])
    # By their times at 0, 0.04, 0.08 s, then 1000 s later, then back.
    jumps = [packet(time, dts) for time, dts in ((7, 500), (7.1, 504), (7.1, 508), (7.2, 100508),
                                                 (7.3, 100512), (7.4, 100))]
    assert [position for _, position in timed_from_zero(jumps)] == pytest.approx(
        [0, 0.04, 0.08, 0.18, 0.22, 0.32])


def test_bursts_do_not_lengthen_a_clip():
    """The segments of a playlist arrive at once, each 6 seconds after the previous one."""
    packets = [packet(6 * segment + 0.003 * i, 600 * segment + 4 * i)
               for segment in range(4) for i in range(150)]
    positions = [position for _, position in timed_from_zero(packets)]
    assert positions == pytest.approx([0.04 * i for i in range(600)])


def test_sound_before_the_key_frame_is_left_out():
    """It comes after the key frame, but by its time it is earlier."""
    packets = [packet(7, 500), packet(7, 450, stream_index=1), packet(7, 499, stream_index=1),
               packet(7.1, 504), packet(7.1, 503, stream_index=1)]
    pairs = list(timed_from_zero(packets))
    assert [stored for stored, _ in pairs] == [packets[0], *packets[3:]]
    assert [position for _, position in pairs] == pytest.approx([0, 0.04, 0.03])


def test_ring_is_bounded_in_seconds_and_in_bytes(video, monkeypatch):
    ring = fill(video, 2)
    assert [group[0].time for group in ring.groups] == pytest.approx([7.8, 8.8], abs=0.01)
    n_bytes = sum(len(packet.content) for group in ring.groups for packet in group)
    assert ring.n_bytes == n_bytes
    monkeypatch.setattr(clips, 'MAX_RING_BYTES', 0.75 * n_bytes)
    assert 0 < fill(video, 100).n_bytes <= 0.75 * n_bytes
    # A key frame that is too far back.
    monkeypatch.setattr(clips, 'MAX_RING_BYTES', 100)
    assert fill(video, 100).n_bytes <= 100


def test_clip_that_exceeds_the_memory_is_handed_out_before_its_start_is_removed(
        video, monkeypatch):
    """The memory holds two to three seconds, the second clip is whole within it."""
    n_bytes = fill(video, 100).n_bytes
    monkeypatch.setattr(clips, 'MAX_RING_BYTES', 0.3 * n_bytes)
    handed_out = []
    fill(video, 100, [(3.5, 9, lambda *clip: handed_out.append(clip)),
                      (6.5, 7.5, lambda *clip: handed_out.append(clip))])
    (long, long_is_shortened), (short, short_is_shortened) = handed_out
    assert long_is_shortened and not short_is_shortened
    # The key frames are at 2.8, 3.8, ... seconds.
    assert long[0].is_keyframe and long[0].time == pytest.approx(2.8, abs=0.01)
    assert 4.8 < long[-1].time < 6.5
    assert short[0].time == pytest.approx(5.8, abs=0.01)
    assert short[-1].time == pytest.approx(7.5, abs=0.1)


def test_closed_ring_hands_out_what_has_come(video, tmp_path):
    """The last clip of a watch, or of a connection."""
    handed_out = []
    ring = fill(video, 5, [(9, 20, store_in(handed_out))])
    assert not handed_out
    ring.close()
    ring.request(9, 20, store_in(handed_out))
    assert len(handed_out) == 2 and len(handed_out[0]) == len(handed_out[1]) > 10


def test_codecs_choose_the_format(tmp_path):
    """Motion JPEG and uncompressed sound, as of many cameras, are in no mp4."""
    path = tmp_path / 'a.avi'
    with av.open(str(path), 'w') as container:
        stream = container.add_stream('mjpeg', rate=25)
        stream.width, stream.height, stream.pix_fmt = 64, 48, 'yuvj420p'
        audio = container.add_stream('pcm_mulaw', rate=8000, layout='mono')
        for i in range(50):
            frame = av.VideoFrame.from_image(Image.new('RGB', (64, 48)))
            container.mux(stream.encode(frame.reformat(format='yuvj420p')))
            samples = av.AudioFrame.from_ndarray(torch.zeros(1, 320, dtype=torch.int16).numpy(),
                                                 's16', 'mono')
            samples.sample_rate, samples.pts = 8000, 320 * i
            container.mux(audio.encode(samples))
        container.mux(stream.encode())
        container.mux(audio.encode())
    handed_out = []
    ring = fill(path, 5, is_timed=False)
    ring.request(0, 9, store_in(handed_out))
    ring.close()
    assert ring.suffix == '.mov' and choose_suffix({'mjpeg'}) == '.mkv'
    assert choose_suffix({'hevc', 'aac'}) == choose_suffix({'h264'}) == '.mp4'
    write_clip(tmp_path / 'clip.mov', ring.templates, *handed_out)
    pictures, sound = read(tmp_path / 'clip.mov')
    assert len(pictures) == sum(packet.stream_index == 0 for packet in handed_out[0]) > 40
    assert len(sound) == sum(packet.stream_index == 1 for packet in handed_out[0]) > 40
    # mp4 cannot hold this sound.
    write_clip(tmp_path / 'clip.mp4', ring.templates, *handed_out)
    assert read(tmp_path / 'clip.mp4') == (pytest.approx(pictures, abs=0.01), [])


def test_clip_of_a_camera_without_compression(tmp_path):
    """Matroska needs the name of its pixels' format."""
    path = tmp_path / 'a.nut'
    with av.open(str(path), 'w') as container:
        stream = container.add_stream('rawvideo', rate=10)
        stream.width, stream.height, stream.pix_fmt = 64, 48, 'yuyv422'
        for i in range(21):
            gray = torch.full((48, 64, 3), 10 * i, dtype=torch.uint8).numpy()
            container.mux(stream.encode(av.VideoFrame.from_ndarray(gray).reformat(
                format='yuyv422')))
        container.mux(stream.encode())
    handed_out = []
    ring = fill(path, 5)
    ring.request(0, 9, store_in(handed_out))
    ring.close()
    assert ring.suffix == '.mkv'
    write_clip(tmp_path / 'clip.mkv', ring.templates, *handed_out)
    with av.open(str(tmp_path / 'clip.mkv')) as container:
        frames = list(container.decode(video=0))
    assert {frame.format.name for frame in frames} == {'yuyv422'}
    assert [frame.time for frame in frames] == pytest.approx([i / 10 for i in range(21)], abs=0.01)
    assert [frame.to_ndarray(format='rgb24').mean() for frame in frames] == pytest.approx(
        [10 * i for i in range(21)], abs=4)


def test_clip_that_cannot_be_written_is_user_error(video, tmp_path):
    ring, handed_out = fill(video, 5), []
    ring.request(8, 10, store_in(handed_out))
    ring.close()
    with pytest.raises(UserError, match=r'no/clip\.mp4 cannot be written'):
        write_clip(tmp_path / 'no' / 'clip.mp4', ring.templates, *handed_out)
    with pytest.raises(UserError, match='no key frame'):
        write_clip(tmp_path / 'clip.mp4', ring.templates, [])
