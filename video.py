"""Videos, frame by frame: a file or a camera is read as images, images are written with the sound.

Nothing in here knows about boxes, and never more than a few frames are in memory.

    with VideoReader('clip.mp4') as reader, VideoWriter('copy.mp4', reader) as writer:
        for frame in reader:
            writer.write(frame)
"""

import collections
import contextlib
import dataclasses
import platform
from fractions import Fraction

import av
from PIL import Image

from utils import UserError

VIDEO_SUFFIXES = ('.mp4', '.mkv', '.mov', '.avi', '.webm', '.m4v', '.mpg', '.mpeg', '.wmv', '.flv',
                  '.ts', '.mts', '.m2ts', '.3gp', '.ogv')

# How a camera with a number is named to FFmpeg: its input format and the device.
CAMERAS = {'Linux': ('v4l2', '/dev/video{}'), 'Darwin': ('avfoundation', '{}'),
           'Windows': ('vfwcap', '{}')}

# What is written, by suffix: encoders, of which the first one counts that FFmpeg was built with,
# and their options. crf is the quality: about 18 cannot be told from the source, +6 halves the
# file.
H264 = (('libx264', {'crf': '20', 'preset': 'veryfast'}), ('libopenh264', {}), ('mpeg4', {}))
VP9 = (('libvpx-vp9', {'crf': '28', 'deadline': 'realtime', 'cpu-used': '6', 'row-mt': '1'}),)
ENCODERS = {'.mp4': H264, '.mkv': H264, '.mov': H264, '.avi': H264, '.m4v': H264, '.webm': VP9}

# What PyAV raises for files and values that FFmpeg does not like.
AV_ERRORS = (av.FFmpegError, OSError, ValueError)

BT709 = 1  # the number of this set of colours in FFmpeg


@dataclasses.dataclass
class Frame:
    """A frame of a video."""

    image: Image.Image      # RGB, upright
    number: int             # from 0; broken frames are not counted
    time: float             # seconds from the start of the video
    duration: float         # seconds, 0 where the file does not say


class VideoReader:
    """The frames of a video file or a camera, one by one, as it comes to them.

    Attributes:
        n_frames: how many the file says it has, or about that; None where nothing is known.
        n_broken: how many could not be decoded so far.
        problem: why the video ended before its end, or None.
        sound_packets: what has been read of the sound, undecoded; the writer takes it from here.
    """

    def __init__(self, source, with_sound=True):
        """Open a file, or the camera of a number.

        Raises:
            UserError: no such file or camera, or nothing that can be decoded in it.
        """
        self.n_broken, self.problem, self.sound_packets = 0, None, collections.deque()
        format_, name = None, str(source)
        if isinstance(source, int):
            format_, name = CAMERAS.get(platform.system(), CAMERAS['Linux'])
            name = name.format(source)
        try:
            self.container = av.open(name, format=format_)
            self.stream = self.container.streams.video[0]
            self.stream.thread_type = 'AUTO'
            self.sound = list(self.container.streams.audio) if with_sound else []
            self.rate = self.stream.average_rate or self.stream.guessed_rate or Fraction(25)
            # A camera counts from when the machine was started.
            self.start = Fraction(self.container.start_time or 0, av.time_base)
            self.n_frames = self.stream.frames or round(
                (self.container.duration or 0) / av.time_base * self.rate) or None
            self.frames = self._read()
            self.first = next(self.frames, None)
        except AV_ERRORS as error:
            what = f'camera {name} cannot be opened' if format_ else 'cannot be read'
            raise UserError(f'{what} ({reason_of(error)})') from error
        except IndexError as error:
            raise UserError('cannot be read (no picture in it)') from error
        if self.first is not None:
            width, height = self.first.image.size
            self.is_turned = (width, height) == (self.stream.height, self.stream.width) != (
                height, width)
        else:
            self.container.close()
            raise UserError('cannot be read (none of its frames can be decoded)')

    def __iter__(self):
        yield self.first
        yield from self.frames

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.frames.close()
        self.container.close()

    def _read(self):
        """Yield frames, and put packets of sound aside."""
        number, last = 0, -1 / self.rate
        for packet in self._packets():
            for decoded in self._decode(packet):
                # Some files, and all raw streams, do not say when a frame is shown. AVI says when
                # it is decoded.
                time = last + 1 / self.rate
                if decoded.pts is not None and self.container.format.name != 'avi':
                    time = decoded.pts * decoded.time_base - self.start
                last = time
                duration = float((decoded.duration or 0) * decoded.time_base)
                yield Frame(upright_image(decoded), number, float(time), duration)
                number += 1

    def _packets(self):
        """Yield packets of the pictures, and put those of the sound aside."""
        packets, end = self.container.demux(self.stream, *self.sound), 0
        try:
            for packet in packets:
                if packet.dts is not None:
                    end = max(end, (packet.dts + (packet.duration or 0)) * packet.time_base)
                if packet.stream.type == 'video':
                    yield packet
                elif packet.dts is not None:  # the last packet of all is an empty one
                    self.sound_packets.append(packet)
        except av.FFmpegError as error:
            self.problem = reason_of(error)
        # FFmpeg takes a file that was cut off for a whole one, but these two formats' headers know.
        # Only where all streams were read: subtitles may go on after the pictures.
        seconds = (self.container.duration or 0) / av.time_base
        all_read = len(self.container.streams) == 1 + len(self.sound)
        says_length = self.container.format.name.startswith(('matroska', 'mov'))
        if says_length and all_read and end < min(0.95 * seconds, seconds - 0.5):
            self.problem = self.problem or f'it should last {seconds:.1f} s'

    def _decode(self, packet):
        """The intact frames of a packet; the others are counted."""
        try:
            frames = packet.decode()
        except av.FFmpegError:
            self.n_broken += 1
            return []
        intact = [frame for frame in frames if not frame.is_corrupt]
        self.n_broken += len(frames) - len(intact)
        return intact


class VideoWriter:
    """A video file that gets images at their times, and the sound of a reader without a change.

    The file can be played when the block ends, also when it ends early. The frames have the size
    of the reader's, made even where it is odd: chroma has half the resolution.
    """

    def __init__(self, path, reader):
        """Open the file; see `ENCODERS` for the suffixes.

        Raises:
            UserError: the file, or the format that its suffix names, cannot be written.
        """
        self.path, self.reader, self.last_pts, self.note = path, reader, None, None
        width, height = reader.first.image.size
        self.size = width + width % 2, height + height % 2
        try:
            self._open(reader.sound)
        except AV_ERRORS as error:
            if not reader.sound:
                raise UserError(f'cannot be written ({reason_of(error)})') from error
            # Not every format may hold every sound. It would have to be coded anew.
            self.note = f'without its sound, which {path.suffix} cannot hold as it is'
            try:
                self._open([])
            except AV_ERRORS as again:
                raise UserError(f'cannot be written ({reason_of(again)})') from again

    def _open(self, sound):
        """Open the file and write its header."""
        encoder, options = choose_encoder(self.path.suffix)
        self.container = av.open(str(self.path), 'w')
        try:
            self.stream = self.container.add_stream(encoder, self.reader.rate, options=options)
            self.stream.width, self.stream.height = self.size
            self.stream.pix_fmt = 'yuv420p'
            context = self.stream.codec_context
            context.bit_rate = 0  # crf says how many bits
            context.colorspace = context.color_primaries = context.color_trc = BT709
            ratio = self.reader.stream.sample_aspect_ratio  # of pixels that are not square
            if ratio:
                context.sample_aspect_ratio = 1 / ratio if self.reader.is_turned else ratio
            context.color_range = 1  # 16 to 235, as everything that plays videos expects
            # AVI and MPEG-4 know nothing but a steady rate; elsewhere every frame has its time.
            steady = self.path.suffix.lower() == '.avi' or encoder == 'mpeg4'
            self.time_base = 1 / self.reader.rate if steady else self.reader.stream.time_base
            context.time_base = self.time_base
            if steady:
                context.max_b_frames = 0  # AVI does not say in which order they are shown
            self.copies = {stream.index: self.container.add_stream_from_template(stream)
                           for stream in sound}
            self.container.start_encoding()
        except AV_ERRORS:
            with contextlib.suppress(*AV_ERRORS):
                self.container.close()
            raise

    def write(self, frame):
        """Write a frame, and the sound that the reader has come by."""
        image = frame.image
        if image.size == self.reader.first.image.size != self.size:
            image = image.crop((0, 0, *self.size))  # adds a black line, so that boxes stay in place
        picture = av.VideoFrame.from_image(image).reformat(
            *self.size, format='yuv420p', dst_colorspace='ITU709')
        # Times must rise, and in a broken file they do not.
        pts = round(frame.time / self.time_base)
        if self.last_pts is not None:
            pts = max(pts, self.last_pts + 1)
        picture.pts = self.last_pts = pts
        picture.time_base = self.time_base
        picture.duration = round(frame.duration / self.time_base)
        with self._errors():
            self.container.mux(self.stream.encode(picture))
            self.copy_sound()

    def copy_sound(self):
        """Write what the reader has put aside of the sound."""
        while self.reader.sound_packets:
            packet = self.reader.sound_packets.popleft()
            copy = self.copies.get(packet.stream.index)
            if copy is None:
                continue
            start = round(self.reader.start / packet.time_base)
            packet.dts -= start
            packet.pts = packet.dts if packet.pts is None else packet.pts - start
            packet.stream = copy
            self.container.mux(packet)

    def __enter__(self):
        return self

    def __exit__(self, kind, *error):
        with self._errors() if kind is None else contextlib.suppress(*AV_ERRORS):
            try:
                self.copy_sound()
                self.container.mux(self.stream.encode())  # what the encoder still holds
            finally:
                self.container.close()

    @contextlib.contextmanager
    def _errors(self):
        """Within the block FFmpeg's errors are a UserError."""
        try:
            yield
        except AV_ERRORS as error:
            raise UserError(f'cannot be written ({reason_of(error)})') from error


def upright_image(frame):
    """A decoded frame as an RGB image, turned as the file says it is to be shown."""
    image = frame.to_image()
    turns = {90: Image.Transpose.ROTATE_90, 180: Image.Transpose.ROTATE_180,
             270: Image.Transpose.ROTATE_270}  # all anticlockwise, as FFmpeg counts
    turn = turns.get(round(frame.rotation) % 360)
    return image if turn is None else image.transpose(turn)


def choose_encoder(suffix):
    """The first encoder for a suffix that FFmpeg was built with, and its options."""
    encoders = ENCODERS.get(suffix.lower(), ())
    for name, options in encoders:
        with contextlib.suppress(ValueError):
            av.codec.Codec(name, 'w')
            return name, options
    names = ', '.join(name for name, _ in encoders) or 'an encoder'
    raise UserError(f'{suffix} needs {names}; take another of {" ".join(ENCODERS)}')


def reason_of(error):
    """FFmpeg's message without its number and the name of the file."""
    return getattr(error, 'strerror', None) or str(error)
