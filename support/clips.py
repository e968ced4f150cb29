"""Clips of a camera, copied without decoding from the packets of the last seconds."""

import collections
import dataclasses
import io
import math
import threading
from fractions import Fraction

import av

from support.errors import UserError, atomic_write
from support.video import AV_ERRORS, reason_of

# Memory for the packets of a ring: 30 seconds of 32 Mbit/s.
MAX_RING_BYTES = 2 ** 27
# A packet whose time is so many seconds further on than its arrival, or further back than the
# previous one's, has a wrong time. Less than its arrival is none: after a pause the packets that
# were held up come at once.
MAX_JUMP = 5
# What players expect in mp4. Matroska takes nearly every codec, and QuickTime telephone sound.
MP4_CODECS = {'h264', 'hevc', 'aac', 'mp3'}


@dataclasses.dataclass(slots=True)
class StoredPacket:
    """A packet, without FFmpeg's objects, so that it outlives its connection."""

    content: bytes
    stream_index: int
    is_keyframe: bool
    pts: int | None
    dts: int | None
    time_base: Fraction
    duration: int
    time: float         # seconds on the clock of the ring


class Ring:
    """The packets of the last seconds of a connection, from a key frame on.

    Attributes:
        templates: {index: stream} from which the streams of a clip are copied.
        suffix: of the clips, a format that holds these streams.
    """

    def __init__(self, streams, seconds, is_timed):
        """Make an empty ring.

        Args:
            streams: the stream of the pictures and those of the sound. Their input may be closed
                before the ring is.
            seconds: how long packets are kept at least.
            is_timed: False for a live source whose packets have no times of their own.
        """
        self.seconds = seconds
        self.is_timed = is_timed
        self.groups = collections.deque()   # lists of packets, each begins with a key frame
        self.n_bytes = 0
        self.requests = []                  # (start, end, function) of clips to come
        self.is_closed = False
        self.lock = threading.Lock()
        # Nothing is written to it: it only keeps the streams' parameters, of any codec.
        self.container = av.open(io.BytesIO(), 'w', format='mpegts')
        known = [stream for stream in streams if stream.codec_context is not None]
        self.templates = {
            stream.index: self.container.add_stream_from_template(stream, opaque=True)
            for stream in known}
        for stream in known:
            copy_pixel_format(stream, self.templates[stream.index])
        self.suffix = choose_suffix({stream.codec_context.codec.canonical_name
                                     for stream in known})

    def add(self, packet, time):
        """Add a packet that arrived at a time, and remove old ones."""
        if packet.stream.index not in self.templates or not packet.size:
            return
        time_base = packet.time_base if self.is_timed else Fraction(1, 90000)
        pts_and_dts = (packet.pts, packet.dts) if self.is_timed else (None, None)
        duration = round((packet.duration or 0) * packet.time_base / time_base)
        is_video = packet.stream.type == 'video'
        stored = StoredPacket(bytes(packet), packet.stream.index, packet.is_keyframe, *pts_and_dts,
                              time_base, duration, time)
        with self.lock:
            if is_video and packet.is_keyframe:
                self.groups.append([])
            if not self.groups or self.is_closed:
                return
            self.groups[-1].append(stored)
            self.n_bytes += packet.size
            clips = self._take_clips([request for request in self.requests if request[1] <= time])
            clips += self._remove_old(time)
        for function, *clip in clips:
            function(*clip)

    def take(self, ring, pts):
        """Add the packets of a closed ring from the key frame of a presentation time on."""
        for group in ring.groups:
            if self.groups or (pts is not None and group[0].pts == pts):
                self.groups.append(group)
                self.n_bytes += sum(len(packet.content) for packet in group)

    def _remove_old(self, time):
        """Remove packets before the last key frame that is older than needed; limit the bytes.

        Returns:
            The clips that begin in what is removed, see `_take_clips()`.
        """
        clips = []
        while self.n_bytes > MAX_RING_BYTES or (
                len(self.groups) > 1 and self.groups[1][0].time <= time - self.seconds):
            first_kept = self.groups[1][0].time if len(self.groups) > 1 else math.inf
            due = [request for request in self.requests if request[0] < first_kept]
            clips += self._take_clips(due, is_shortened=True)
            self.n_bytes -= sum(len(packet.content) for packet in self.groups.popleft())
        return clips

    def _take_clips(self, due, is_shortened=False):
        """Remove some of the requests; returns their clips as (function, packets, is_shortened)."""
        self.requests = [request for request in self.requests if request not in due]
        return [(function, self._collect(start, end), is_shortened)
                for start, end, function in due]

    def _collect(self, start, end):
        """Return the packets from the last key frame before `start`, or the first, to `end`."""
        n_before = sum(group[0].time <= start for group in self.groups)
        groups = list(self.groups)[max(0, n_before - 1):]
        return [packet for group in groups for packet in group if packet.time <= end]

    def request(self, start, end, function):
        """Call a function with the packets between two times once the latter has come.

        If the ring is closed before, or has no memory for more, it is called then, with the packets
        until then.

        Args:
            start, end: seconds on the clock of the ring.
            function: of the list of packets, and whether the memory has shortened it.
        """
        with self.lock:
            if not self.is_closed:
                self.requests.append((start, end, function))
                return
            packets = self._collect(start, end)
        function(packets, False)

    def close(self):
        """Hand out the requested packets; none are added any more."""
        with self.lock:
            self.is_closed = True
            clips = self._take_clips(self.requests)
        for function, *clip in clips:
            function(*clip)


def choose_suffix(codecs):
    """Return the suffix of a format for a set of codecs, .mp4 if all players know them there."""
    if codecs <= MP4_CODECS:
        return '.mp4'
    for suffix, name in (('.mkv', 'matroska'), ('.mov', 'mov')):
        with av.open(io.BytesIO(), 'w', format=name) as container:
            if codecs <= container.supported_codecs:
                return suffix
    return '.mkv'


def copy_pixel_format(stream, copy):
    """Copy the name of the pixels' format, which Matroska needs, of an uncompressed stream."""
    if stream.codec_context.name == 'rawvideo':
        copy.codec_context.codec_tag = stream.codec_context.codec_tag


def write_clip(path, templates, packets):
    """Write packets of a ring as a video file, whole or not at all.

    Sound that the format cannot hold is left out.

    Raises:
        UserError: there is no key frame among them; the file cannot be written.
    """
    if not packets:
        raise UserError(f'{path}: no key frame came in time, so there is no clip')
    try:
        with atomic_write(path) as temporary, av.open(str(temporary), 'w') as output:
            used = {packet.stream_index for packet in packets}
            copies = {index: output.add_stream_from_template(templates[index], opaque=True)
                      for index in sorted(used)
                      if templates[index].codec_context.name in output.supported_codecs}
            for index, copy in copies.items():
                copy_pixel_format(templates[index], copy)
            for stored, position in timed_from_zero(packets):
                if stored.stream_index not in copies:
                    continue
                packet = av.Packet(stored.content)
                packet.stream, packet.time_base = copies[stored.stream_index], stored.time_base
                packet.dts = packet.pts = round(position / stored.time_base)
                if stored.pts is not None and stored.dts is not None:
                    packet.pts += stored.pts - stored.dts
                packet.duration, packet.is_keyframe = stored.duration, stored.is_keyframe
                output.mux(packet)
            output.close()      # before it is renamed
    except AV_ERRORS as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f'{path} cannot be written ({reason_of(error)})') from error


def timed_from_zero(packets):
    """Yield (packet, position in seconds): positions begin at 0 and rise in each stream.

    A camera's own times place a packet after the previous one of its stream. Where they jump, or
    are missing, the arrivals do.
    """
    previous = {}       # {index of a stream: (packet, its position, the position that was yielded)}
    for packet in packets:
        reference, position, last = previous.get(packet.stream_index, (packets[0], 0., -math.inf))
        step = elapsed = packet.time - reference.time
        if packet.dts is not None and reference.dts is not None:
            step = float(packet.dts * packet.time_base - reference.dts * reference.time_base)
        if not -MAX_JUMP <= step <= elapsed + MAX_JUMP:
            step = elapsed
        position += step
        last = max(position, last + 0.001)
        if last >= 0:   # sound may begin before the key frame
            previous[packet.stream_index] = packet, position, last
            yield packet, last
