"""Faces followed through a video: the last points say where to look, detection runs now and then, a part at a time.

A tracked face costs one crop, upright and of the network's size; all faces of a frame go through the network together.
A full `detect` takes as long as several crops. So its work is spread: every few frames one window of the frame is
looked through for new faces, the whole frame for large ones or a quarter of it for small ones.
"""

import itertools
import time as clock
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from .detection import Faces, detect, distinct, fitted_faces, overlap
from .engine import Engine
from .images import face_box, meet, middle, square_box, upright_boxes
from .inputs import one_image
from .loading import engine_for, finder_for, shape_for
from .model import LGCN
from .shape import ShapeModel
from .smoothing import LEAST_STEP, OneEuroFilter

SMALLEST_FACE, SMALLEST_SHARE = 40.0, 0.15
"""The default `min_face`: pixels, and share of the frame's shorter side, the larger of the two."""
SEARCH_EVERY = 2
"""Frames from window to window while no face is tracked, or one was just lost."""
WINDOWS = (None, (0, 0), (1, 1), None, (1, 0), (0, 1))
"""The order in which windows are looked through: the whole frame for large faces only, or a quarter (right? lower?)."""
COARSE = 2.0
"""Least size of the large faces, over `min_face`. Quarters overlap by so much: each smaller face is all in one."""
LEAST_SHRINKING = 0.6
"""Side of the smallest face that is looked for where one was lost, over that of the lost one."""
MEMORY = 1.0
"""Seconds for which a lost face keeps its identity, where it was last seen or would be by its pace then."""
PACE = 0.15
"""Seconds over which a face's pace is averaged."""
MOTION = 0.7
"""Share of a face's last shift that is expected again. On a pan of 16 % of the face a frame it cuts the points' error
from 0.95 to 0.2 pixels, and without it a pan of 30 % loses the face; more of it overshoots where the motion turns."""
MOST_STEPS = 3.0
"""For so many times the last step, at most, a face is expected to go on: time stamps may jump, or lie together."""
SAME_FACE = 0.3
"""A detection that has more than this in common with a lost face's box (over their union) is that face."""
NEARBY, NEARBY_RATIO, NEARBY_TIME = 0.75, 1.4, 0.3
"""So is one no farther from it than this share of its side, and larger or smaller by this factor at most, within so
many seconds: quick moves, few frames a second. (In six sequences of 8 to 15 frames a second, of faces that move to and
fro, it takes 181 wrong identities down to 18. More of it takes the next face, after a cut, for the one before.)"""
WINDOW_WORK = 20
"""What each window takes besides, as areas of the smallest faces: some 4 ms of a core (Zen 4, lgcn-finder)."""
NEIGHBOURHOOD = 2.5
"""Side of the square in which a face that was just lost is looked for, over that of its box."""


@dataclass(frozen=True, eq=False, repr=False)
class TrackedFaces(Faces):
    """The faces of a frame, those first that have been there longest: `Faces`, and what is known of their past.

    Attributes:
        ids: (F,) int64: the same number for the same face in all frames; a number is never given twice.
        tracked: (F,) bool: found from the last frame's points; False: detected in this frame.
        time: time stamp of the frame, seconds.
        latency: how long the update took, seconds.
    """

    ids: np.ndarray
    tracked: np.ndarray
    time: float
    latency: float


@dataclass
class _Track:
    """A face that is followed."""

    identity: int
    points: np.ndarray
    """(N, 2) float64, pixels, not smoothed."""
    scores: np.ndarray
    """(N,)"""
    confidence: float
    tracked: bool
    seen: float
    """Time stamp of the last frame with it."""
    filter: OneEuroFilter | None
    box: np.ndarray = field(init=False)
    """(4,) as in `Faces`, of `points`."""
    smooth: np.ndarray = field(init=False)
    """(N, 2) float64, pixels."""

    shift: np.ndarray = field(init=False)
    """(2,) pixels, from the frame before."""
    step: float = field(init=False)
    """Seconds since then."""
    pace: np.ndarray = field(init=False)
    """(2,) pixels a second."""

    def __post_init__(self) -> None:
        self.shift, self.step, self.pace = np.zeros(2), LEAST_STEP, np.zeros(2)
        self._update()

    def expected_shift(self, time: float) -> np.ndarray:
        """How far the face will have moved, (2,) pixels."""
        return MOTION * self.shift * min((time - self.seen) / self.step, MOST_STEPS)

    def likeness(self, box: np.ndarray, time: float) -> float:
        """How surely a box is this face, above 0 if it is: because of what it has in common with where the face was
        last seen, or would be by its pace, or else because it is near there, and about as large."""
        gone_on = self.box + np.append(self.pace * (time - self.seen), (0, 0))
        common = max(overlap(box, self.box), overlap(box, gone_on) if time - self.seen <= MEMORY else 0.0)
        if common > SAME_FACE:
            return 1 + common
        if time - self.seen > NEARBY_TIME or not 1 / NEARBY_RATIO <= box[2] / self.box[2] <= NEARBY_RATIO:
            return 0.0
        return max(1 - float(np.linalg.norm(middle(box) - middle(self.box))) / (NEARBY * self.box[2]), 0.0)

    def move(self, points: np.ndarray, scores: np.ndarray, confidence: float, tracked: bool, time: float) -> None:
        """Take over what was found in a new frame."""
        # (Shifts only: turns and changes of size are slow, and as noisy.)
        self.shift, self.step = (points - self.points).mean(axis=0), max(time - self.seen, LEAST_STEP)
        self.pace = self.pace + min(self.step / PACE, 1) * (self.shift / self.step - self.pace)
        self.points, self.scores, self.confidence, self.tracked, self.seen = points, scores, confidence, tracked, time
        self._update()

    def _update(self) -> None:
        self.box = face_box(self.points)
        filtered = self.filter and self.filter(self.points, self.scores, float(self.box[2]), self.seen)
        self.smooth = self.points if filtered is None else filtered


class Tracker:
    """Follows the faces of one video: built once, `update` with each frame in turn. Not for several threads at once.

    >>> tracker = lgcn_fast.Tracker()
    >>> faces = tracker.update(frame)  # (H, W, 3) uint8 RGB
    >>> faces.ids, faces.points  # (F,), (F, 68, 2)
    """

    def __init__(
        self,
        model: Engine | LGCN | Path | str | None = None,
        detect_every: int = 30,
        min_face: float | None = None,
        min_confidence: float = 0.5,
        lost_below: float = 0.4,
        smoothing: float | None = 1.0,
        finder: Engine | LGCN | Path | str | None = None,
        shape: ShapeModel | Path | str | None = None,
        device: str = "auto",
        precision: str = "auto",
        any_angle: bool = False,
    ) -> None:
        """Build the engine.

        Args:
            model: see `predict`.
            detect_every: frames in which all of the frame is looked through once for new faces, while faces are
                tracked, in six windows one after the other: fewer frames find them sooner and cost more. Where no face
                is, or one was just lost, every other frame has its window at least.
            min_face: side of the smallest face box to look for, pixels. Default: 15 % of the frame's shorter side, at
                least 40. Tracked faces may become smaller.
            min_confidence: least confidence of a new face, see `Faces`.
            lost_below: a tracked face with less confidence is lost.
            smoothing: strength of the one-euro filter, see `OneEuroFilter`; None or 0: off.
            finder: finds new faces, see `detect`.
            shape, device, precision: see `predict`.
            any_angle: find new faces however they are turned, see `detect`. (Those that were found may turn in any
                case.)

        Raises:
            ValueError: as `predict`; a number out of range.
        """
        if not 1 <= detect_every < np.inf:
            raise ValueError(f"detect_every: expected 1 or more frames, got {detect_every}")
        if min_face is not None and not min_face > 0:
            raise ValueError(f"min_face: expected a positive number of pixels, got {min_face}")
        if not 0 <= lost_below <= min_confidence <= 1:
            got = f"lost_below={lost_below}, min_confidence={min_confidence}"
            raise ValueError(f"lost_below: expected 0 <= lost_below <= min_confidence <= 1, got {got}")
        if smoothing is not None and not smoothing >= 0:
            raise ValueError(f"smoothing: expected 0 or more, got {smoothing}")
        self.engine = engine_for(model, device, precision)
        self._finder = finder_for(finder, self.engine)
        self._shape = shape_for(shape, self.engine.config.num_landmarks)
        self._detect_every, self._min_face = detect_every, min_face
        self._min_confidence, self._lost_below = min_confidence, lost_below
        self._smoothing, self._any_angle = smoothing, any_angle
        self._identities = itertools.count()
        self.reset()

    def reset(self) -> None:
        """Forget all faces, for another video: time may start again. Identities go on."""
        self._tracks: list[_Track] = []
        self._lost: list[_Track] = []
        self._size: tuple[int, ...] | None = None
        self._time = -np.inf
        self._order = itertools.cycle(WINDOWS)
        self._wait = 1.0  # frames until the next window is due

    def run(self, frames: Iterable[Any]) -> Iterator[TrackedFaces]:
        """`update` with all frames of a source, none dropped; see `video.newest` for live ones.

        Args:
            frames: images, or pairs of image and time stamp, as `video.VideoReader` yields.
        """
        for frame in frames:
            yield self.update(*frame) if isinstance(frame, tuple) else self.update(frame)

    def update(self, frame: Any, time: float | None = None) -> TrackedFaces:
        """Find the faces of the next frame.

        Args:
            frame: one image, as for `predict`. After a frame of another size all faces are detected anew.
            time: when it was taken, seconds from any start. Default: now.

        Returns:
            `TrackedFaces`, none where there is none.

        Raises:
            ValueError: as `predict`; a time before that of the last frame (`reset` starts another video).
        """
        start = clock.perf_counter()
        image = one_image(frame, "frame")
        time = start if time is None else float(time)
        if not (self._time <= time and np.isfinite(time)):
            raise ValueError(f"time: expected {self._time:g} s or later (or `reset`), got {time:g}")
        first = image.shape[:2] != self._size
        if first:
            self.reset()
            self._size = image.shape[:2]
        self._time = time
        lost = self._follow(image)
        self._lost = [track for track in self._lost if time - track.seen <= MEMORY] + lost
        try:
            self._detect(image, first, bool(lost))
        except BaseException:  # Ctrl-C, or no memory: the next frame is looked through as a whole in its place
            if first:
                self._size = None
            raise
        return self._result(clock.perf_counter() - start)

    def _smallest(self) -> float:
        return self._min_face or max(SMALLEST_FACE, SMALLEST_SHARE * min(self._size))

    def _follow(self, image: np.ndarray) -> list[_Track]:
        """Find the tracked faces again, in one batch; return those that are lost."""
        before = self._tracks
        inside = meet(np.array([track.box for track in before]).reshape(-1, 4), image)
        seen, followed = [track for track, meets in zip(before, inside, strict=True) if meets], []
        if seen:
            expected = []
            for track in seen:
                points = track.points + track.expected_shift(self._time)
                expected.append(points if meet(face_box(points)[None], image)[0] else track.points)
            boxes, angles = upright_boxes(np.array(expected), self._shape.mean)
            faces = fitted_faces(image, boxes, angles, self.engine, self._shape)
            for index in distinct(faces.boxes, faces.confidence, self._lost_below):
                points, confidence = faces.points[index].astype(np.float64), float(faces.confidence[index])
                seen[index].move(points, faces.scores[index], confidence, True, self._time)
                followed.append(seen[index])
        self._tracks = followed  # (now, as the network may have been interrupted)
        return [track for track in before if track not in followed]

    def _detect(self, image: np.ndarray, first: bool, lost: bool) -> None:
        """Look through the windows that are due: all of the first frame, and one at once where a face was lost."""
        self._wait -= 1
        if self._wait > 0 and not lost:
            return
        searching = not self._tracks or bool(self._lost)
        pause = min(self._detect_every / len(WINDOWS), SEARCH_EVERY if searching else np.inf)
        self._wait, due = min(self._wait, 0) + pause, 1
        while self._wait <= 0 and due < len(WINDOWS):
            self._wait, due = self._wait + pause, due + 1
        smallest = self._smallest()
        if first:
            windows = [(_window(image, None, smallest), smallest)]
        else:
            if lost:
                self._order = itertools.cycle(WINDOWS)
            large, quarters = COARSE * smallest, list(itertools.islice(self._order, due))
            # Lost faces are looked for each time, where they were: bad frames at a steady rate would hide them else.
            unseen = [track.box for track in self._lost if track.box[2] < large or None not in quarters]
            windows = [(_neighbourhood(image, box), LEAST_SHRINKING * box[2]) for box in unseen]
            everywhere = [(_window(image, None, 0), min((least for _, least in windows), default=smallest))]
            windows = min(windows, everywhere, key=_work)  # of a crowd
            windows += [(_window(image, q, large), large if q is None else smallest) for q in quarters]
        how = self._min_confidence, self.engine, self._finder, self._shape, self._any_angle
        least = LEAST_SHRINKING * smallest  # (near a face that was lost smaller ones are found)
        for window, smallest in windows:
            self._take(_detect_in(image, window, [track.box for track in self._tracks], smallest, *how), least)

    def _take(self, found: Faces, least: float = 0.0) -> None:
        """Detected faces that are not tracked yet: those that were lost, and new ones with boxes of at least so many
        pixels."""
        boxes, lost = enumerate(found.boxes), self._lost
        pairs = [(track.likeness(box, self._time), i, track) for i, box in boxes for track in lost]
        again: dict[int, int] = {}  # which face has which identity
        for likeness, index, track in sorted(pairs, key=lambda pair: -pair[0]):  # the surest first
            if likeness > 0 and index not in again and track.identity not in again.values():
                again[index] = track.identity
        self._lost = [track for track in self._lost if track.identity not in again.values()]
        faces = zip(found.points, found.scores, found.confidence, strict=True)
        for index, (points, scores, confidence) in enumerate(faces):
            if index not in again and found.boxes[index, 2] < least:
                continue
            identity = again[index] if index in again else next(self._identities)
            smooth = OneEuroFilter(self._smoothing) if self._smoothing else None
            points = points.astype(np.float64)
            self._tracks.append(_Track(identity, points, scores, float(confidence), False, self._time, smooth))

    def _result(self, latency: float) -> TrackedFaces:
        tracks = sorted(self._tracks, key=lambda track: track.identity)
        count = self.engine.config.num_landmarks
        return TrackedFaces(
            points=np.array([track.smooth for track in tracks], np.float32).reshape(-1, count, 2),
            scores=np.array([track.scores for track in tracks], np.float32).reshape(-1, count),
            confidence=np.array([track.confidence for track in tracks], np.float32),
            boxes=np.array([face_box(track.smooth) for track in tracks], np.float32).reshape(-1, 4),
            ids=np.array([track.identity for track in tracks], np.int64),
            tracked=np.array([track.tracked for track in tracks], bool),
            time=self._time,
            latency=latency,
        )


def _work(windows: list[tuple[np.ndarray, float]]) -> float:
    """How much it takes to look through windows for faces of least sizes, relative to others."""
    return sum(window[2] * window[3] / least**2 + WINDOW_WORK for window, least in windows)


def _window(image: np.ndarray, quarter: tuple[int, int] | None, shared: float) -> np.ndarray:
    """A quarter of an image, enlarged so that it shares a strip with the others, or all of it: (4,) int64, a box."""
    whole = np.array(image.shape[1::-1])
    if quarter is None:
        return np.array([0, 0, *whole])
    size = np.ceil(np.minimum((whole + shared) / 2, whole)).astype(int)
    return np.array([*(whole - size) * quarter, *size])


def _neighbourhood(image: np.ndarray, box: np.ndarray) -> np.ndarray:
    """The part of an image around a box: (4,) int64, a box."""
    square = square_box(box, NEIGHBOURHOOD)
    size = np.array(image.shape[1::-1])
    low = np.clip(square[:2], 0, size - 1)
    high = np.clip(square[:2] + square[2:], low + 1, size)
    return np.array([*low, *(high - low)])


def _detect_in(
    image: np.ndarray,
    window: np.ndarray,
    known: list[np.ndarray],
    min_face: float,
    min_confidence: float,
    engine: Engine,
    finder: Engine,
    shape: ShapeModel,
    any_angle: bool,
) -> Faces:
    """`detect` in a window (4,) of an image, without faces that are known, by their boxes, or cross the window's border
    inside the image."""
    x, y, width, height = (int(value) for value in window)
    part, known = image[y : y + height, x : x + width], [box - (x, y, 0, 0) for box in known]
    faces = detect(part, min_face, min_confidence, engine, finder, shape, known=known, any_angle=any_angle)
    low, high = faces.boxes[:, :2], faces.boxes[:, :2] + faces.boxes[:, 2:]
    inner_low, inner_high = np.array([x, y]) > 0, np.array([x + width, y + height]) < image.shape[1::-1]
    inside = (((low >= 0) | ~inner_low) & ((high <= (width, height)) | ~inner_high)).all(axis=1)
    moved = faces.points[inside] + np.array([x, y], np.float32)
    boxes = faces.boxes[inside] + np.array([x, y, 0, 0], np.float32)
    return Faces(moved, faces.scores[inside], faces.confidence[inside], boxes)
