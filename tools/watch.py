"""Watch a camera, and raise an alarm when somebody stands in a zone for some seconds.

    python -m tools.watch rtsp://camera/stream --classes person --seconds 3 --run ./alarm.sh
    python -m tools.watch 0 --zone 0.1,0.5 0.9,0.5 0.9,1.0 0.1,1.0 --clips clips

Objects are detected in each frame for itself, without a tracker. So the rule is about someone: if
one person leaves the zone while another enters it, both count as one occupation.
"""

import collections
import dataclasses
import datetime
import functools
import math
import os
import pathlib
import time
import urllib.parse
from typing import Literal

import tyro
from PIL import ImageDraw

from detect import Detector, load_model, select_classes
from model import VISUALIZATION
from support.alarms import Alarms, Worker
from support.camera import Camera, Lost
from support.clips import MAX_RING_BYTES, write_clip
from support.drawing import draw_objects
from support.errors import (
    UserError,
    check_at_least,
    check_fractions,
    exit_on_user_error,
    make_folder,
)
from support.images import is_camera, is_live, is_stream, print_error, redact, save_image
from support.onnx_network import check_parameters as check_onnx_parameters
from support.processes import stop_on_signal

# Clips that may wait for a slow disk: each may hold as much as the ring. At the end of a connection
# all that wait for their end come at once, but they share the packets of a single ring.
MAX_WAITING_CLIPS = 2
# Packets are kept so many seconds longer than a clip, for detections that take that long.
SLACK_SECONDS = 5


@dataclasses.dataclass
class Parameters:
    """Raise an alarm when somebody stands in a zone of a camera's picture."""

    # The number of a camera, a network stream (rtsp://..., http://...), or a video file.
    source: tyro.conf.Positional[str]

    # --- the rule ---

    # Names of the classes that count; none: all.
    classes: tuple[str, ...] = ()
    # Corners x,y of a polygon in fractions of the width and height, from the upper left; none: the
    # whole image. An object is in the zone if the bottom center of its box is.
    zone: tuple[str, ...] = ()
    # The zone must be occupied for this many seconds.
    seconds: float = 3.
    # An absence of up to this many seconds, or in a single frame, does not end an occupation:
    # detections are missed.
    gap: float = 1.
    # Seconds after an alarm without another one. An occupation raises one alarm at most.
    cooldown: float = 60.
    # Detections count above this score. A higher one misses more, with fewer false alarms.
    min_score: float = 0.4

    # --- the alarm ---

    # A line of JSON per event is appended to this file, and printed.
    log: str = './watch.jsonl'
    # Folder for a snapshot and a clip per alarm; none: neither is written.
    clips: str | None = None
    # Seconds of the clip before the alarm, at least: it begins at a key frame.
    before: float = 5.
    # Seconds of the clip after the alarm.
    after: float = 10.
    # A command line, run without a shell, with the JSON on its standard input.
    run: str | None = None
    # A URL to which the JSON is posted.
    webhook: str | None = None
    # Seconds that the command may take, and that the webhook's server may send nothing; each is
    # tried up to three times.
    alarm_timeout: float = 10.

    # --- the camera ---

    # Seconds without data after which a camera is lost. A live playlist (HLS) has new data every 5
    # to 10 seconds.
    timeout: float = 30.
    # Look at this many frames per second at most; none: as many as possible, in a file all.
    fps: float | None = None

    # --- the model ---

    # See detect.py.
    checkpoint: str = './checkpoint_ssd300.pth.tar'
    # Of two boxes of a class that overlap more than this, the one with the lower score is removed.
    max_overlap: float = VISUALIZATION['max_overlap']
    # cpu, cuda, cuda:1, ...; auto is the GPU if there is one.
    device: str = 'auto'
    # See detect.py.
    precision: Literal['auto', 'bf16', 'fp16', 'float32'] = 'auto'


@exit_on_user_error
def main(parameters):
    """Watch until Ctrl-C, SIGTERM or the end of a file."""
    p = parameters
    zone = parse_zone(p.zone)
    check_parameters(p)
    name = f'camera {p.source}' if is_camera(p.source) else redact(p.source)
    alarms = Alarms(p.log, p.run, p.webhook, p.alarm_timeout)
    check_onnx_parameters(p.checkpoint, p.device, p.precision)
    model = load_model(p.checkpoint, p.device)
    detector = Detector(model, 1, select_classes(model.label_map, p.classes, None), p.min_score,
                        p.max_overlap, VISUALIZATION['top_k'], p.precision)
    print_error(f'{name}: an alarm when {" or ".join(p.classes) or "an object of any class"} is in '
                f'the zone for {p.seconds:g} seconds. There is no tracker: this means someone, not '
                f'the same person')
    camera = Camera(p.source, p.timeout, p.fps, p.before + p.after + SLACK_SECONDS)
    watch = Watch(name, detector, zone, Occupation(p.seconds, p.gap, p.cooldown), alarms,
                  p.clips and pathlib.Path(p.clips), p.before, p.after)
    with stop_on_signal() as stopped:
        try:
            with camera:
                for item in camera.read(stopped):
                    watch.handle(item)
        finally:
            watch.close(stopped.is_set())
    print_error(watch.statistics())


def check_parameters(p):
    """Raise a UserError for parameters that cannot be; make the folders."""
    check_at_least(0, seconds=p.seconds, gap=p.gap, cooldown=p.cooldown, before=p.before,
                   after=p.after)
    check_at_least(0.01, timeout=p.timeout, alarm_timeout=p.alarm_timeout,
                   fps=1 if p.fps is None else p.fps)
    check_fractions(min_score=p.min_score, max_overlap=p.max_overlap)
    if not is_live(p.source) and not os.path.isfile(p.source):
        raise UserError(f'{redact(p.source)} is no file; give a video file, the number of a camera '
                        f'or a URL (rtsp://..., http://...)')
    if is_stream(p.source) and not is_valid_url(p.source):
        raise UserError(f'{redact(p.source)} is no valid URL; give one as rtsp://HOST:554/PATH, '
                        f'with special characters of a password as %XX, such as %5B for [')
    make_folder(pathlib.Path(p.log).parent)
    open(p.log, 'a').close()    # fails here, not at the first alarm
    if p.clips:
        make_folder(p.clips)


def is_valid_url(url):
    """Return whether a URL has a host and no invalid port."""
    try:
        parts = urllib.parse.urlsplit(url)
        return bool(parts.hostname) and parts.port != 0
    except ValueError:      # a port that is no number, or brackets around no IPv6 address
        return False


# --------------------------------------------------------------------------------------------------
# The rule
# --------------------------------------------------------------------------------------------------


class Occupation:
    """Decide when an occupied zone raises an alarm: one per occupation, none in the cool-down."""

    def __init__(self, seconds, gap, cooldown):
        """Start with an empty zone; see the parameters of the rule."""
        self.seconds, self.gap, self.cooldown = seconds, gap, cooldown
        self.start = None           # of the occupation
        self.last_seen = None
        self.was_empty = False      # in the previous frame
        self.has_alarmed = False    # in this occupation
        self.last_alarm = -math.inf

    def update(self, now, is_occupied):
        """Return whether to raise an alarm, at a time in seconds on any clock that only rises.

        An occupation ends when the zone is found empty more than the gap after it was last
        occupied, and in the frame before, too. A single frame may miss a detection, and more than
        the gap may pass between two frames: the network may need seconds for one.
        """
        was_empty, self.was_empty = self.was_empty, not is_occupied
        if not is_occupied:
            if self.start is not None and was_empty and now - self.last_seen > self.gap:
                self.start, self.has_alarmed = None, False
            return False
        if self.start is None:
            self.start = now
        self.last_seen = now
        if (self.has_alarmed or now - self.start < self.seconds
                or now - self.last_alarm < self.cooldown):
            return False
        self.has_alarmed, self.last_alarm = True, now
        return True


def parse_zone(corners):
    """Return a polygon as a list of (x, y) for strings 'x,y'; the whole image for none.

    Raises:
        UserError: these are not the corners of a polygon within the image.
    """
    if not corners:
        return [(0., 0.), (1., 0.), (1., 1.), (0., 1.)]
    zone = []
    for corner in corners:
        try:
            x, y = map(float, corner.split(','))
        except ValueError:
            x = y = math.nan
        if not (0 <= x <= 1 and 0 <= y <= 1):
            raise UserError(f'--zone {corner}: give x,y as fractions of the width and the height, '
                            f'each from 0 to 1, such as 0.1,0.5')
        zone.append((x, y))
    area = sum(x1 * y2 - x2 * y1 for (x1, y1), (x2, y2) in zip(zone, zone[1:] + zone[:1])) / 2
    if len(zone) < 3 or abs(area) < 1e-6:
        raise UserError(f'--zone {" ".join(corners)} encloses no area; give three or more corners, '
                        f'in order around it')
    return zone


def is_inside(x, y, polygon):
    """Return whether a point is in a polygon: a ray from it crosses an odd number of sides."""
    n_crossed = 0
    for (x1, y1), (x2, y2) in zip(polygon, polygon[1:] + polygon[:1]):
        if (y1 > y) != (y2 > y):
            n_crossed += x < x1 + (y - y1) * (x2 - x1) / (y2 - y1)
    return n_crossed % 2 == 1


def select_in_zone(prediction, size, zone):
    """Return the part of a prediction whose boxes stand in the zone.

    Args:
        prediction: see `predict()` in detect.py.
        size: width and height of the image.
        zone: polygon in fractions of them.
    """
    # A box that the lower border of the image cuts off is in a zone that extends to the border.
    last = 1 - 1e-6
    kept = [i for i, (x_min, _, x_max, y_max) in enumerate(prediction['boxes'].tolist())
            if is_inside(min((x_min + x_max) / 2 / size[0], last), min(y_max / size[1], last),
                         zone)]
    return {'boxes': prediction['boxes'][kept],
            'labels': [prediction['labels'][i] for i in kept],
            'scores': prediction['scores'][kept]}


def describe(counts):
    """Return a sentence such as '2 persons, 1 dog' for {class name: number}."""
    return ', '.join(f'{n} {name if n == 1 else plural(name)}' for name, n in counts.items())


def plural(name):
    """Return the plural of a class name of VOC or COCO."""
    irregular = {'sheep': 'sheep', 'mouse': 'mice', 'knife': 'knives', 'skis': 'skis',
                 'scissors': 'scissors'}
    return irregular.get(name, name + ('es' if name.endswith(('s', 'x', 'ch', 'sh')) else 's'))


# --------------------------------------------------------------------------------------------------
# The watch
# --------------------------------------------------------------------------------------------------


class Watch:
    """Detect objects in the frames of a camera, and send its events."""

    def __init__(self, name, detector, zone, occupation, alarms, folder, before, after):
        """Prepare the watch.

        Args:
            name: of the source, without its password.
            detector: see detect.py.
            zone: polygon in fractions of the image.
            folder: for snapshots and clips, or None.
            before, after: seconds of a clip before and after the alarm.
        """
        self.name, self.detector, self.zone = name, detector, zone
        self.occupation, self.alarms = occupation, alarms
        self.folder, self.before, self.after = folder, before, after
        self.clips = Worker('clip', MAX_WAITING_CLIPS)
        self.is_lost = False
        self.start = self.end = None    # of the detections
        self.n_frames, self.delay_sum, self.longest_delay = 0, 0., 0.

    def handle(self, item):
        """Handle a View or a Lost of `Camera.read()`."""
        if isinstance(item, Lost):
            self.is_lost = True
            now = time.monotonic()
            self.send('camera lost', now, reason=item.problem)
            self.occupation.update(now, is_occupied=False)
            return
        if self.is_lost:
            self.is_lost = False
            self.send('camera back', item.arrival)
            self.occupation.update(item.time, is_occupied=False)    # nobody was seen meanwhile
        self.start = self.start or time.monotonic()
        prediction, = self.detector.predict([item.image])
        objects = select_in_zone(prediction, item.image.size, self.zone)
        self.end = time.monotonic()
        delay = self.end - item.arrival
        self.n_frames, self.delay_sum = self.n_frames + 1, self.delay_sum + delay
        self.longest_delay = max(self.longest_delay, delay)
        if self.occupation.update(item.time, is_occupied=bool(objects['labels'])):
            self.alarm(item, objects)

    def alarm(self, view, objects):
        """Save the snapshot, request the clip, and send the event."""
        counts = dict(collections.Counter(objects['labels']).most_common())
        snapshot = clip = None
        if self.folder is not None:
            stem = f'{utc_time(view.arrival):%Y%m%dT%H%M%S.%fZ}'
            snapshot = self.save_snapshot(view.image, objects, self.folder / f'{stem}.jpg')
            clip = self.folder / f'{stem}{view.ring.suffix}'
            view.ring.request(view.time - self.before, view.time + self.after,
                              functools.partial(self.save_clip, view.ring, clip))
        self.send('alarm', view.arrival, seen=describe(counts), counts=counts,
                  labels=objects['labels'],
                  scores=[round(score, 4) for score in objects['scores'].tolist()],
                  boxes=[[round(side, 1) for side in box] for box in objects['boxes'].tolist()],
                  image_size=view.image.size, snapshot=snapshot and str(snapshot),
                  clip=clip and str(clip),
                  video_time=None if view.is_live else round(view.time, 3))

    def save_snapshot(self, image, objects, path):
        """Draw the zone and the objects, and save the image; returns its path, None if it cannot.
        """
        corners = [(x * image.width, y * image.height) for x, y in self.zone]
        ImageDraw.Draw(image).polygon(corners, outline='yellow',
                                      width=max(1, min(image.size) // 200))
        draw_objects(image, objects, self.detector.colors)
        try:
            save_image(image, path)
        except UserError as error:
            print_error(f'snapshot: {error}')
            return None
        return path

    def save_clip(self, ring, path, packets, is_shortened):
        """Let the thread of the clips write packets of a ring."""
        self.clips.submit(write_clip, path, ring.templates, packets,
                          is_limited=not ring.is_closed)
        if is_shortened:
            seconds = packets[-1].time - packets[0].time
            self.clips.report(f'{path} is shortened to {seconds:.1f} seconds, more would take over '
                              f'{MAX_RING_BYTES // 2 ** 20} MB; give a shorter --before or --after')

    def send(self, event, moment, **more):
        """Send an event of a time.monotonic()."""
        stamp = utc_time(moment).isoformat(timespec='milliseconds')
        self.alarms.send({'event': event, 'time': stamp, 'source': self.name, **more})

    def close(self, is_interrupted):
        """Wait for clips, commands and webhooks; see `Worker.close()`."""
        self.clips.close(is_interrupted)
        self.alarms.close(is_interrupted)

    def statistics(self):
        """Return the number of frames, their rate and delay as a sentence."""
        if self.n_frames == 0:
            return f'{self.name}: no frame came'
        seconds = self.end - self.start
        return (f'{self.name}: {self.n_frames} frames in {seconds:.1f} seconds, '
                f'{self.n_frames / seconds:.2f} per second; from the arrival of a frame to its '
                f'detections {1000 * self.delay_sum / self.n_frames:.0f} ms on average, '
                f'{1000 * self.longest_delay:.0f} ms at most')


def utc_time(moment):
    """Return a time.monotonic() as a datetime in UTC."""
    return datetime.datetime.now(datetime.timezone.utc) - datetime.timedelta(
        seconds=time.monotonic() - moment)


if __name__ == '__main__':
    main(tyro.cli(Parameters))
