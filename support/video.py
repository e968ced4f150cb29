"""Videos, frame by frame: read files, cameras and network streams as images, and write images
together with the sound.

Frames are read one by one, so a video of any length needs the memory of a few frames.

    with VideoReader('clip.mp4') as reader, VideoWriter('copy.mp4', reader) as writer:
        for frame in reader:
            writer.write(frame)
"""

import collections
import contextlib
import dataclasses
import functools
import math
import pathlib
import platform
import time
from fractions import Fraction

import av
from PIL import Image

from support.errors import UserError
from support.images import OUTPUT_VIDEO_SUFFIXES, is_stream

# FFmpeg's input format for a camera, and the name of the camera with a number.
CAMERAS = {'Linux': ('v4l2', '/dev/video{}'), 'Darwin': ('avfoundation', '{}'),
           'Windows': ('vfwcap', '{}')}

# The protocols and formats that FFmpeg may use for a file, and for a URL by its scheme. A playlist
# names other files or servers: it is read from a server only, and cannot name a file.
FILE_FORMATS = 'mov,matroska,avi,mpeg,mpegts,mpegvideo,h264,hevc,m4v,asf,flv,ogg'
HTTP_FORMATS = f'{FILE_FORMATS},hls,aac,webvtt,mpjpeg,mjpeg'
WHITELISTS = {'file': ('file', FILE_FORMATS),
              'http': ('http,https,tcp,tls,crypto', HTTP_FORMATS),
              'rtsp': ('rtp,udp,tcp,tls', 'rtsp'),
              'rtmp': ('rtmp,rtmps,tcp,tls', 'flv')}
# FFmpeg numbers the frames of these formats as if there were 25 per second.
UNTIMED_FORMATS = ('mpjpeg', 'mjpeg', 'h264', 'hevc', 'm4v')
# Seconds that the times of a stream go back where files were joined, at least. Less is disorder.
MIN_STEP_BACK = 1

# The largest frame of H.264's highest level, 6.2. A damaged file may claim any size.
MAX_PIXELS = 8192 * 4352

# Encoders and their options; the first that FFmpeg was built with is used. crf is the quality: 18
# is about indistinguishable from the source, +6 halves the file.
H264 = (('libx264', {'crf': '20', 'preset': 'veryfast'}), ('libopenh264', {}), ('mpeg4', {}))
VP9 = (('libvpx-vp9', {'crf': '28', 'deadline': 'realtime', 'cpu-used': '6', 'row-mt': '1'}),)
ENCODERS = {**dict.fromkeys(OUTPUT_VIDEO_SUFFIXES, H264), '.webm': VP9}

# What PyAV raises for files and values that FFmpeg cannot handle.
AV_ERRORS = (av.FFmpegError, OSError, ValueError)

BT709 = 1               # FFmpeg's number of this color space, its primaries and its transfer curve
LIMITED_RANGE = 1       # FFmpeg's number of the range 16 to 235, which all players expect


@dataclasses.dataclass
class Frame:
    """A frame of a video."""

    decoded: av.VideoFrame
    number: int             # from 0; broken frames are not counted
    time: float             # seconds from the start of the video

    @functools.cached_property
    def image(self):
        """The frame as a PIL image, RGB and upright."""
        return upright_image(self.decoded)


class VideoReader:
    """Iterate over the frames of a video file, a camera or a network stream.

    Attributes:
        n_frames: number of frames by the file's header, or estimated from its duration; None if
            unknown.
        is_timed: False for a network stream whose frames have no times of their own: theirs are
            those of their arrival.
        n_broken: number of frames so far that could not be decoded.
        problem: why the video ended early, or None.
        audio_packets: packets of sound read so far, not decoded; the writer takes them from here.
    """

    def __init__(self, source, timeout=30):
        """Open a file, the URL of a network stream, or the camera with a number (int).

        Args:
            source: path, URL or number.
            timeout: seconds without data after which a network stream ends. A live playlist has
                new data every 5 to 10 seconds.

        Raises:
            UserError: no such input, or it has no frame that can be decoded.
        """
        self.n_broken, self.problem, self.audio_packets = 0, None, collections.deque()
        self.container, self.frames = None, None
        name, input_format, options = open_arguments(source)
        try:
            self._open(name, input_format, options, timeout if is_stream(source) else None)
        except AV_ERRORS as error:
            self._close()
            problem = f'camera {name} cannot be opened' if input_format else 'cannot be read'
            raise UserError(f'{problem} ({reason_of(error)})') from error
        except IndexError as error:
            self._close()
            raise UserError('cannot be read (no picture in it)') from error
        if self.first is None:
            self._close()
            raise UserError('cannot be read (none of its frames can be decoded)')

    def _open(self, name, input_format, options, timeout):
        """Open the input and decode its first frame."""
        self.container = av.open(name, format=input_format, options=options, timeout=timeout,
                                 metadata_errors='replace')
        self.stream = self.container.streams.video[0]
        if self.stream.codec_context is None:
            raise ValueError('FFmpeg has no decoder for it')
        if self.stream.width * self.stream.height > MAX_PIXELS:
            raise ValueError(f'{self.stream.width} x {self.stream.height} pixels; scale it down to '
                             f'8192 x 4352 or fewer')
        self.stream.codec_context.options = {'max_pixels': str(MAX_PIXELS)}  # a frame may change
        # Threads that decode a frame each are faster, but delay the frames of a live source.
        self.stream.thread_type = 'SLICE' if input_format or timeout else 'AUTO'
        self.audio_streams = list(self.container.streams.audio)
        self.is_timed = timeout is None or self.container.format.name not in UNTIMED_FORMATS
        self.time_base = self.stream.time_base if self.is_timed else Fraction(1, 1000)
        self.rate = self.stream.average_rate or self.stream.guessed_rate or Fraction(25)
        # A camera's clock starts with the machine.
        self.start = Fraction(self.container.start_time or 0, av.time_base)
        self.n_frames = self.stream.frames or round(
            (self.container.duration or 0) / av.time_base * self.rate) or None
        self.frames = self._read()
        self.first = next(self.frames, None)
        if self.first is not None:
            width, height = self.first.image.size
            self.is_rotated = (width, height) == (self.stream.height, self.stream.width) != (
                height, width)

    def __iter__(self):
        yield self.first
        yield from self.frames

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self._close()

    def _close(self):
        """Close what has been opened."""
        for opened in filter(None, (self.frames, self.container)):
            opened.close()

    def _read(self):
        """Yield frames, and store packets of sound."""
        number, frame_time, first_arrival = 0, -1 / self.rate, None
        for packet in self._packets():
            for decoded in self._decode(packet):
                # Some files, and all raw streams, have no presentation times. AVI's are decoding
                # times.
                frame_time += 1 / self.rate
                if not self.is_timed:
                    first_arrival = first_arrival or time.monotonic()
                    frame_time = time.monotonic() - first_arrival
                elif decoded.pts is not None and self.container.format.name != 'avi':
                    frame_time = decoded.pts * decoded.time_base - self.start
                yield Frame(decoded, number, float(frame_time))
                number += 1

    def _packets(self):
        """Yield the packets of the pictures, and store those of the sound."""
        packets, end = self.container.demux(self.stream, *self.audio_streams), 0
        positions = {}
        try:
            for packet in packets:
                if packet.dts is not None:
                    self._shift(packet, positions)
                    end = max(end, (packet.dts + (packet.duration or 0)) * packet.time_base)
                if packet.stream.type == 'video':
                    yield packet
                elif packet.dts is not None:  # the last packet of a stream is an empty one
                    self._store_audio(packet)
        except av.FFmpegError as error:
            self.problem = reason_of(error)
        # FFmpeg does not report a truncated file, but the headers of these two formats hold the
        # duration. It is that of all streams, and subtitles may be longer than the pictures.
        seconds = (self.container.duration or 0) / av.time_base
        all_read = len(self.container.streams) == 1 + len(self.audio_streams)
        has_duration = self.container.format.name.startswith(('matroska', 'mov'))
        if has_duration and all_read and end < min(0.95 * seconds, seconds - 0.5):
            self.problem = self.problem or f'it should last {seconds:.1f} s'

    def _shift(self, packet, positions):
        """Let the times of a packet rise where those of joined files begin again.

        Args:
            packet: its times are changed.
            positions: {index of a stream: (time of its last packet, seconds that were added to it)}
        """
        last, offset = positions.get(packet.stream.index, (-math.inf, 0))
        packet_time = packet.dts * packet.time_base
        if packet_time + offset < last - MIN_STEP_BACK:
            # As much as the other streams, if they have begun again: sound and pictures stay
            # together.
            offset = max(seconds for _, seconds in positions.values())
            if packet_time + offset < last - MIN_STEP_BACK:
                offset = last + 1 / self.rate - packet_time
        positions[packet.stream.index] = packet_time + offset, offset
        packet.dts += round(offset / packet.time_base)
        if packet.pts is not None:
            packet.pts += round(offset / packet.time_base)

    def _store_audio(self, packet):
        """Store a packet of sound for the writer; `support/camera.py` overrides this."""
        self.audio_packets.append(packet)

    def _decode(self, packet):
        """Decode the intact frames of a packet, and count the others."""
        try:
            frames = packet.decode()
        except av.FFmpegError:
            self.n_broken += 1
            return []
        intact = [frame for frame in frames if not frame.is_corrupt]
        self.n_broken += len(frames) - len(intact)
        return intact


class VideoWriter:
    """Write a video file of images at their times, with the sound of a reader, copied unchanged.

    When the block ends, also if it ends early, the file can be played. The frames have the size of
    the reader's, rounded up to even numbers, since chroma has half the resolution.

    Attributes:
        note: what of the source is missing, for the user, or None.
    """

    def __init__(self, path, reader):
        """Open the file; see `ENCODERS` for the suffixes.

        Raises:
            UserError: the file, or the format of its suffix, cannot be written.
        """
        self.path, self.reader = pathlib.Path(path), reader
        self.last_pts, self.note = None, None
        width, height = reader.first.image.size
        self.size = width + width % 2, height + height % 2
        try:
            self._open(reader.audio_streams)
        except AV_ERRORS as error:
            if not reader.audio_streams:
                raise UserError(f'cannot be written ({reason_of(error)})') from error
            # Not every format can hold every audio codec, and sound is not re-encoded.
            self.note = f'without its sound, which {self.path.suffix} cannot hold as it is'
            try:
                self._open([])
            except AV_ERRORS as silent_error:
                raise UserError(f'cannot be written ({reason_of(silent_error)})') from silent_error

    def _open(self, audio_streams):
        """Open the file and write its header."""
        encoder, options = choose_encoder(self.path.suffix)
        self.container = av.open(str(self.path), 'w')
        try:
            self._add_video_stream(encoder, options)
            self.audio_copies = {stream.index: self.container.add_stream_from_template(stream)
                                 for stream in audio_streams}
            self.container.start_encoding()
        except AV_ERRORS:
            with contextlib.suppress(*AV_ERRORS):
                self.container.close()
            raise

    def _add_video_stream(self, encoder, options):
        """Add the stream of the pictures to the file and set up its encoder."""
        self.stream = self.container.add_stream(encoder, self.reader.rate, options=options)
        self.stream.width, self.stream.height = self.size
        self.stream.pix_fmt = 'yuv420p'
        context = self.stream.codec_context
        context.bit_rate = 0  # crf determines it
        context.colorspace = context.color_primaries = context.color_trc = BT709
        context.color_range = LIMITED_RANGE
        pixel_ratio = self.reader.stream.sample_aspect_ratio  # of pixels that are not square
        if pixel_ratio:
            context.sample_aspect_ratio = (1 / pixel_ratio if self.reader.is_rotated else
                                           pixel_ratio)
        # AVI and MPEG-4 only have a constant frame rate; elsewhere each frame has its own time.
        constant_rate = self.path.suffix.lower() == '.avi' or encoder == 'mpeg4'
        self.time_base = 1 / self.reader.rate if constant_rate else self.reader.time_base
        context.time_base = self.time_base
        if constant_rate:
            context.max_b_frames = 0  # AVI has no presentation order

    def write(self, frame):
        """Write a frame, and the sound that was read before it."""
        image = frame.image
        if image.size == self.reader.first.image.size != self.size:
            # Pads with black on the right and below, so that drawn boxes stay in place.
            image = image.crop((0, 0, *self.size))
        picture = av.VideoFrame.from_image(image).reformat(
            *self.size, format='yuv420p', dst_colorspace='ITU709')
        # Times must rise, and in a broken file they do not.
        pts = round(frame.time / self.time_base)
        if self.last_pts is not None:
            pts = max(pts, self.last_pts + 1)
        picture.pts = self.last_pts = pts
        picture.time_base = self.time_base
        with self._user_errors():
            self.container.mux(self.stream.encode(picture))
            self._copy_audio()

    def _copy_audio(self):
        """Write the packets of sound that the reader has stored."""
        while self.reader.audio_packets:
            packet = self.reader.audio_packets.popleft()
            audio_copy = self.audio_copies.get(packet.stream.index)
            if audio_copy is None:
                continue
            start = round(self.reader.start / packet.time_base)
            packet.dts -= start
            packet.pts = packet.dts if packet.pts is None else packet.pts - start
            packet.stream = audio_copy
            try:
                self.container.mux(packet)
            except (av.error.ArgumentError, av.error.InvalidDataError):
                self.note = 'with gaps in its sound, where it is damaged or its times go back'

    def __enter__(self):
        return self

    def __exit__(self, kind, *error):
        with self._user_errors() if kind is None else contextlib.suppress(*AV_ERRORS):
            try:
                self._copy_audio()
                self.container.mux(self.stream.encode())  # the frames still in the encoder
            finally:
                self.container.close()

    @contextlib.contextmanager
    def _user_errors(self):
        """Turn FFmpeg's errors within the block into a UserError."""
        try:
            yield
        except AV_ERRORS as error:
            raise UserError(f'cannot be written ({reason_of(error)})') from error


def open_arguments(source):
    """Return a source's name, format (None: by its content) and options for FFmpeg."""
    options = {'max_pixels': str(MAX_PIXELS)}
    if isinstance(source, int):
        input_format, device = CAMERAS.get(platform.system(), CAMERAS['Linux'])
        return device.format(source), input_format, options
    name, scheme = f'file:{source}', 'file'
    if is_stream(source):
        name, scheme = source, source.split(':')[0].removesuffix('s')
    options['protocol_whitelist'], options['format_whitelist'] = WHITELISTS[scheme]
    options['rtsp_flags'] = 'prefer_tcp'  # UDP loses packets
    return name, None, options


def upright_image(frame):
    """Convert a decoded frame to an RGB image, rotated by the angle in its metadata."""
    image = frame.to_image()
    # Counterclockwise, as FFmpeg's `rotation`.
    transposes = {90: Image.Transpose.ROTATE_90, 180: Image.Transpose.ROTATE_180,
                  270: Image.Transpose.ROTATE_270}
    transpose = transposes.get(round(frame.rotation) % 360)
    return image if transpose is None else image.transpose(transpose)


def choose_encoder(suffix):
    """Return the first encoder for a suffix that FFmpeg was built with, and its options."""
    encoders = ENCODERS.get(suffix.lower(), ())
    for name, options in encoders:
        with contextlib.suppress(ValueError):
            av.codec.Codec(name, 'w')
            return name, options
    names = ', '.join(name for name, _ in encoders) or 'an encoder'
    raise UserError(f'{suffix} needs {names}; use another of {" ".join(ENCODERS)}')


def reason_of(error):
    """Return FFmpeg's message without its number and the name of the file."""
    if isinstance(error, av.error.ExitError):  # after the timeout of a network stream
        return 'no data came in time'
    return getattr(error, 'strerror', None) or str(error)
