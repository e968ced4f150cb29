"""The newest frame of a camera, whose packets of the last seconds are kept for clips.

A thread reads and decodes all that arrives. When its frames come faster than they are used, only
the newest is kept, so that the delay does not grow. A lost connection is opened again.

    with Camera('rtsp://camera/stream', timeout=10, fps=None, seconds=20) as camera:
        for item in camera.read(stopped):
            if isinstance(item, Lost): ...

Without `fps` the frames of a file are all yielded, at the pace at which they are used, and once.
"""

import dataclasses
import math
import threading
import time

from PIL import Image

from support.clips import Ring
from support.errors import UserError
from support.images import is_camera, is_live
from support.video import AV_ERRORS, VideoReader, reason_of

# Seconds between two connections. The pause doubles up to the last while connections are shorter
# than it, unless a new size of the picture ends them: those connections work.
FIRST_PAUSE, LAST_PAUSE = 1, 60
NEW_SIZE = 'the picture has a new size'
# Seconds between two checks whether a waiting thread has to end.
POLL_SECONDS = 0.2


@dataclasses.dataclass
class View:
    """A frame to be looked at."""

    image: Image.Image      # RGB, upright
    time: float             # seconds: in a file from its start, else of time.monotonic()
    arrival: float          # time.monotonic() when its packet had been received
    is_live: bool
    ring: Ring              # the packets around it


@dataclasses.dataclass
class Lost:
    """A connection that could not be opened, has ended, or gives no frames."""

    problem: str


class RingReader(VideoReader):
    """A reader of frames that keeps the packets of the last seconds.

    Attributes:
        ring: of a file a new one after each change of the picture's size.
        arrival: time.monotonic() when the last packet had been received.
    """

    def __init__(self, source, timeout, seconds):
        """Open a source; see VideoReader.

        Args:
            timeout: seconds without data after which a network stream ends; also seconds for which
                packets of a live source may come without a frame that can be decoded.
            seconds: how long packets are kept at least.
        """
        self.is_live = is_live(str(source)) or isinstance(source, int)
        self.timeout, self.seconds = timeout, seconds
        self.size, self.ring, self.file_time = None, None, 0.
        super().__init__(source, timeout)

    def _packets(self):
        """Yield the packets of the pictures; once they are decoded, all are in the ring."""
        self.ring = self._make_ring()
        self.undecoded_since = None     # arrival of the first packet since the last frame
        for packet in super()._packets():
            packet_time = self._register(packet)
            yield packet
            self.ring.add(packet, packet_time)

    def _store_audio(self, packet):
        """Add a packet of sound to the ring."""
        self.ring.add(packet, self._register(packet))

    def _register(self, packet):
        """Return the time of a packet that has just been received, on the clock of the ring."""
        self.arrival = time.monotonic()
        if self.is_live:
            self.undecoded_since = self.undecoded_since or self.arrival
            if self.arrival > self.undecoded_since + self.timeout:
                raise UserError(f'no frame could be decoded for {self.timeout:g} seconds')
            return self.arrival
        if packet.dts is not None:
            self.file_time = float(packet.dts * packet.time_base - self.start)
        return self.file_time

    def _make_ring(self):
        """Return an empty ring."""
        return Ring([self.stream, *self.audio_streams], self.seconds, self.is_timed)

    def _decode(self, packet):
        """Decode a packet; a new size of the frames begins a new ring.

        Raises:
            UserError: a live source has a new size. The streams that clips are copied from have the
                old one, which only a new connection changes.
        """
        frames = super()._decode(packet)
        if frames:
            self.undecoded_since = None
            size = frames[-1].width, frames[-1].height
            if self.size not in (None, size):
                if self.is_live:
                    raise UserError(NEW_SIZE)
                self.ring.close()
                old, self.ring = self.ring, self._make_ring()
                # The decoder runs late: the packets of these frames are in the old ring already.
                self.ring.take(old, next(frame.pts for frame in frames
                                         if (frame.width, frame.height) == size))
            self.size = size
        return frames

    def _close(self):
        """Close the input, and complete the clips that wait for packets."""
        super()._close()
        if self.ring is not None:
            self.ring.close()


class Camera:
    """A thread that reads a source, and opens it again when it is lost."""

    def __init__(self, source, timeout, fps, seconds):
        """Prepare the thread; the block starts it.

        Args:
            source: a path, a URL or the number of a camera, as a string.
            timeout: see RingReader; also seconds without data after which a USB camera is lost.
            seconds: see RingReader.
            fps: frames per second that are looked at, at most; None: as many as possible.
        """
        self.source = int(source) if is_camera(source) else source
        self.is_live = is_live(source)
        self.timeout, self.seconds = timeout, seconds
        self.interval, self.due = 1 / fps if fps else 0, -math.inf
        self.reader = None
        # What the thread hands over: the frame that is looked at next, with its times and ring; why
        # the connection was lost; whether it is the last; whether a file was read.
        self.newest, self.problem, self.has_ended, self.was_read = None, None, False, False
        self.changed = threading.Condition()
        self.is_closed = threading.Event()
        self.thread = threading.Thread(target=self._run, name='camera', daemon=True)

    def __enter__(self):
        self.start = time.monotonic()
        self.thread.start()
        return self

    def __exit__(self, *error):
        self.is_closed.set()
        self.thread.join(5 * POLL_SECONDS)  # it may wait for data for as long as the timeout
        if self.reader is not None:
            self.reader.ring.close()

    def read(self, stopped):
        """Yield a View of the newest frame, or Lost, until an event is set or a file has ended.

        Lost is yielded once, however many connections fail until the next View.

        Raises:
            UserError: a file cannot be read, or not to its end.
        """
        is_lost = False
        while not stopped.is_set():
            with self.changed:
                self.changed.wait_for(lambda: self.newest or self.problem or self.has_ended,
                                      POLL_SECONDS)
                newest, problem, has_ended = self.newest, self.problem, self.has_ended
                self.newest = self.problem = None
                self.changed.notify_all()
            if newest is None and self._is_silent():
                problem = problem or 'no data came in time'
            if problem is not None:
                if not self.is_live:
                    raise UserError(f'{self.source}: {problem}')
                if not is_lost:
                    is_lost = True
                    yield Lost(problem)
            if newest is not None:
                frame, *times_and_ring = newest
                try:
                    image = frame.image
                except AV_ERRORS:   # a format that cannot be converted
                    continue
                is_lost = False
                yield View(image, *times_and_ring)
            elif has_ended:
                assert self.was_read, 'the thread of the camera has failed, see its traceback'
                return

    def _is_silent(self):
        """Return whether a live source has sent no data for the timeout.

        FFmpeg has no timeout for a USB camera: the thread may wait for its data forever.
        """
        arrival = self.start if self.reader is None else self.reader.arrival
        return self.is_live and time.monotonic() > arrival + self.timeout

    def _run(self):
        """Read connections until the block ends, or a file once."""
        pause = FIRST_PAUSE
        try:
            while not self.is_closed.is_set():
                problem, seconds = self._read_connection()
                with self.changed:
                    self.problem = problem
                    if self.is_live:
                        self.newest = None
                    self.changed.notify_all()
                if not self.is_live:
                    self.was_read = True
                    return
                if seconds > pause or problem == NEW_SIZE:
                    pause = FIRST_PAUSE
                self.is_closed.wait(pause)
                pause = min(2 * pause, LAST_PAUSE)
        finally:
            with self.changed:
                self.has_ended = True
                self.changed.notify_all()

    def _read_connection(self):
        """Hand over the frames of a connection.

        Returns:
            Why it ended (None: a file was read to its end), and how long it had frames.
        """
        start = math.inf
        try:
            with RingReader(self.source, self.timeout, self.seconds) as self.reader:
                start = time.monotonic()
                for frame in self.reader:
                    self._offer(frame)
                    if self.is_closed.is_set():
                        break
            problem = self.reader.problem or ('the stream has ended' if self.is_live else None)
        except AV_ERRORS as error:
            problem = reason_of(error)
        return problem, time.monotonic() - start

    def _offer(self, frame):
        """Hand over a frame if it is due: of a live source at once, of a file when it is wanted."""
        arrival = self.reader.arrival
        frame_time = arrival if self.is_live else frame.time
        if self.interval:
            if frame_time < self.due:
                return
            if frame_time > self.due + self.interval:   # the first one, or after a pause
                self.due = frame_time
            self.due += self.interval
        with self.changed:
            while not (self.is_live or self.newest is None or self.is_closed.is_set()):
                self.changed.wait(POLL_SECONDS)
            self.newest = frame, frame_time, arrival, self.is_live, self.reader.ring
            self.changed.notify_all()
