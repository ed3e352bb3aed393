import itertools
from dataclasses import replace

import cv2
import numpy as np
import pytest

import lgcn_fast
from lgcn_fast import Engine, Tracker, load_model, tracking
from lgcn_fast.detection import overlap
from lgcn_fast.images import read_image
from lgcn_fast.smoothing import OneEuroFilter
from lgcn_fast.tracking import TrackedFaces
from lgcn_fast.video import VideoReader

FPS = 30


@pytest.fixture(scope="module")
def engine() -> Engine:
    return Engine(load_model("lgcn-nano"), num_threads=1)


@pytest.fixture
def face(demo_picture) -> np.ndarray:
    """(300, 300, 3): the demo's face, 124 pixels a side around (144, 132)."""
    return read_image(demo_picture, color=True)


def motion(x: float, y: float, angle: float, scale: float) -> np.ndarray:
    """(2, 3): see `moved`."""
    matrix = cv2.getRotationMatrix2D((144, 132), -angle, scale)
    matrix[:, 2] += x, y
    return matrix


def moved(image: np.ndarray, x: float = 0, y: float = 0, angle: float = 0, scale: float = 1) -> np.ndarray:
    """The image shifted by (x, y) pixels, turned (degrees, clockwise) and resized about the face."""
    return cv2.warpAffine(image, motion(x, y, angle, scale), image.shape[1::-1], borderMode=cv2.BORDER_REPLICATE)


def noisy(image: np.ndarray, deviation: float, random: np.random.Generator) -> np.ndarray:
    return np.clip(image + random.normal(0, deviation, image.shape), 0, 255).astype(np.uint8)


def track(tracker: Tracker, frames: list[np.ndarray]) -> list[TrackedFaces]:
    return list(tracker.run((frame, index / FPS) for index, frame in enumerate(frames)))


def blank(image: np.ndarray) -> np.ndarray:
    return np.full_like(image, 90)


@pytest.fixture
def searched(monkeypatch) -> list[tuple[int, int]]:
    """Sizes (width, height) of all that `detect` is called with."""
    sizes = []

    def detect(image, *arguments, **options):
        sizes.append(image.shape[1::-1])
        return lgcn_fast.detect(image, *arguments, **options)

    monkeypatch.setattr(tracking, "detect", detect)
    return sizes


def test_first_frame_is_detected_and_the_next_ones_are_tracked(engine, face):
    first, *rest = track(Tracker(engine), [face] * 4)
    expected = lgcn_fast.detect(face, min_face=0.15 * 300, model=engine)
    np.testing.assert_array_equal(first.points, expected.points)
    np.testing.assert_allclose(first.boxes, expected.boxes, rtol=1e-6)
    assert [faces.tracked.tolist() for faces in (first, *rest)] == [[False], [True], [True], [True]]
    assert all(faces.ids.tolist() == [0] for faces in rest)
    assert [faces.time for faces in rest] == [1 / FPS, 2 / FPS, 3 / FPS]
    assert all(faces.latency > 0 for faces in rest)
    for faces in rest:
        assert np.abs(faces.points - expected.points).mean() < 1
    for name, shape, dtype in (
        ("points", (1, 68, 2), np.float32),
        ("scores", (1, 68), np.float32),
        ("confidence", (1,), np.float32),
        ("boxes", (1, 4), np.float32),
        ("ids", (1,), np.int64),
        ("tracked", (1,), bool),
    ):
        values = getattr(rest[-1], name)
        assert values.shape == shape
        assert values.dtype == dtype


def test_some_faces_of_a_frame(engine, face):
    faces = Tracker(engine, min_face=60).update(np.hstack([face, face]), 3)
    assert len(faces) == 2
    second = faces[faces.ids == 1]
    assert (len(second), second.time, second.latency) == (1, 3, faces.latency)
    assert (second.points[0] == faces.points[1]).all()
    assert [int(found.ids) for found in faces] == [0, 1]
    style = ["boxes", "confidence"]
    pictures = [lgcn_fast.draw(np.hstack([face, face]), which, style) for which in (faces[1], second)]
    np.testing.assert_array_equal(*pictures)


def test_nothing_in_the_frame(engine, face):
    faces = Tracker(engine).update(blank(face))
    assert len(faces) == 0
    assert faces.points.shape == (0, 68, 2)
    assert faces.boxes.shape == (0, 4)
    assert faces.ids.shape == (0,)


def test_follows_a_face_that_turns_shrinks_and_moves(engine, face):
    """Its points are those of the first frame, moved alike."""
    frames = [moved(face, -0.8 * i, 0.5 * i, 1.5 * i, 1 - 0.008 * i) for i in range(40)]
    found = track(Tracker(engine, smoothing=None), frames)
    assert all(faces.ids.tolist() == [0] for faces in found)
    assert all(faces.tracked.all() for faces in found[1:])
    matrix = motion(-0.8 * 39, 0.5 * 39, 1.5 * 39, 1 - 0.008 * 39)
    expected = found[1].points[0] @ matrix[:, :2].T + matrix[:, 2]
    error = np.linalg.norm(found[-1].points[0] - expected, axis=1).mean()
    assert error < 0.02 * 124  # 60 degrees: `detect` would not see it


def test_detects_rarely_while_all_is_well(engine, face, searched):
    track(Tracker(engine, detect_every=60), [face] * 61)
    assert len(searched) == 1 + 60 / 10
    assert searched.count((300, 300)) == 1 + 2
    quarters = [size for size in searched if size != (300, 300)]
    assert all(150 < width < 300 and 150 < height < 300 for width, height in quarters)


@pytest.mark.parametrize(("detect_every", "windows"), [(1, 60), (2, 30), (4, 15), (6, 10), (8, 7.5), (20, 3)])
def test_detects_as_often_as_asked(engine, face, searched, detect_every, windows):
    track(Tracker(engine, detect_every=detect_every), [face] * 11)
    assert abs(len(searched) - 1 - windows) < 1


def test_moving_face_that_is_hidden_keeps_its_identity(engine, face):
    """Where it comes back it has nothing in common with where it was seen last."""
    frames = [blank(face) if 8 <= i < 17 else moved(face, x=8 * i - 88) for i in range(22)]
    found = track(Tracker(engine), frames)
    assert [len(faces) for faces in found[:17]] == [1] * 8 + [0] * 9
    again = next(faces for faces in found[17:] if len(faces))
    assert overlap(found[7].boxes[0], again.boxes[0]) < tracking.SAME_FACE
    assert again.ids.tolist() == [0]


def test_after_a_gap_a_face_elsewhere_is_another_one(engine, face):
    """Even where the one before it would be by now."""
    tracker = Tracker(engine)
    track(tracker, [moved(face, x=4 * i - 88) for i in range(8)])
    found = [tracker.update(moved(face, x=70), 1.5 + i / FPS) for i in range(3)]
    assert found[-1].ids.tolist() == [1]


@pytest.mark.parametrize("error", [MemoryError, KeyboardInterrupt])
def test_an_update_that_was_interrupted_loses_nobody(engine, face, monkeypatch, error):
    def stop(*_, **__):
        raise error

    tracker = Tracker(engine)
    for name, time in (("detect", 0), ("fitted_faces", 1 / FPS)):
        with monkeypatch.context() as interrupted:
            interrupted.setattr(tracking, name, stop)
            with pytest.raises(error):
                tracker.update(face, time)
        assert tracker.update(face, time).ids.tolist() == [0]


def test_small_faces_near_one_that_was_lost_are_not_taken(engine, face):
    """They are looked for, as it may have become smaller."""
    tracker = Tracker(engine, min_face=100)
    small = cv2.resize(face, None, fx=0.45, fy=0.45, interpolation=cv2.INTER_AREA)
    beside = np.full_like(face, 128)
    beside[60 : 60 + len(small), 150 : 150 + small.shape[1]] = small
    assert len(lgcn_fast.detect(beside, min_face=45)) == 1
    assert len(tracker.update(face, 0)) == 1
    assert [len(tracker.update(beside, index / FPS)) for index in range(1, 20)] == [0] * 19


def test_the_surest_pairs_of_faces_come_first(engine, face):
    """A face that turns up near where another was seen last does not take its identity, if that is there as well."""
    tracker = Tracker(engine)
    moving = tracker.update(face, 0).points[0].astype(np.float64)
    still, turned_up = (np.add(moving, (x, 0)) for x in (200, 160))
    lost = [tracking._Track(i, where, np.ones(68), 1.0, True, 0.0, None) for i, where in ((10, still), (11, moving))]
    lost[1].pace = np.array([800.0, 0.0])
    tracker._lost, tracker._tracks, tracker._time = lost, [], 0.3
    points = np.stack([turned_up, still])
    tracker._take(lgcn_fast.Faces(points, np.ones((2, 68)), np.ones(2), np.stack([*map(tracking.face_box, points)])))
    assert [found.identity for found in tracker._tracks] == [1, 10]
    assert [other.identity for other in tracker._lost] == [11]


def test_face_that_is_lost_is_searched_at_once_and_keeps_its_identity(engine, face, searched):
    tracker = Tracker(engine, detect_every=10**6)
    frames = [face] * 3 + [blank(face)] * 6 + [face] * 6
    found = track(tracker, frames)
    assert [len(faces) for faces in found[:9]] == [1, 1, 1, 0, 0, 0, 0, 0, 0]
    assert len(searched) > 2
    assert found[-1].ids.tolist() == [0]
    again = next(faces for faces in found[9:] if len(faces))
    assert not again.tracked.any()


def test_bad_frames_at_a_steady_rate_do_not_hide_a_face(engine, face):
    """It is looked for where it was, whichever window is due; a large one, too."""
    for period, least in ((6, 75), (3, 35)):
        frames = [blank(face) if index % period == period - 1 else face for index in range(120)]
        found = [len(faces) for faces in track(Tracker(engine, min_face=40), frames)]
        assert sum(found) >= least


def test_faces_that_lie_are_found_where_asked_for(engine, face):
    lying = np.ascontiguousarray(np.rot90(face))
    assert [len(faces) for faces in track(Tracker(engine), [lying] * 3)] == [0, 0, 0]
    found = track(Tracker(engine, any_angle=True), [blank(face), *[lying] * 8])
    assert [len(faces) for faces in found[-2:]] == [1, 1]
    x, y = lgcn_fast.detect(face, model=engine).points[0].T
    expected = np.stack([y, face.shape[1] - 1 - x], axis=1)
    assert np.linalg.norm(found[-1].points[0] - expected, axis=1).mean() < 0.01 * 124


def test_after_a_while_it_is_another_face(engine, face):
    tracker = Tracker(engine)
    tracker.update(face, 0)
    assert len(tracker.update(blank(face), 0.1)) == 0
    found = [tracker.update(face, 5 + index / FPS) for index in range(2 * len(tracking.WINDOWS))]
    assert found[-1].ids.tolist() == [1]


def test_several_faces_keep_their_identities(engine, face):
    """Three faces, of which one leaves and one comes."""

    def frame(index: int) -> np.ndarray:
        left, right = moved(face, x=0.5 * index), moved(face, y=0.5 * index, scale=0.8)
        third = blank(face) if index < 10 else face
        return np.hstack([left, blank(face) if index >= 25 else right, third])

    found = track(Tracker(engine, detect_every=6), [frame(index) for index in range(60)])
    assert sorted(found[5].ids.tolist()) == [0, 1]
    first = {int(i): box for i, box in zip(found[5].ids, found[5].boxes, strict=True)}
    left = next(i for i, box in first.items() if box[0] < 300)
    assert sorted(found[24].ids.tolist()) == [0, 1, 2]
    assert sorted(found[-1].ids.tolist()) == [left, 2]
    assert found[-1].ids.tolist() == sorted(found[-1].ids.tolist())
    for before, after in itertools.pairwise(found[12:]):
        places = dict(zip(before.ids.tolist(), before.boxes, strict=True))
        for identity, box in zip(after.ids.tolist(), after.boxes, strict=True):
            assert identity not in places or overlap(places[identity], box) > 0.8


def test_all_faces_of_a_frame_go_through_the_network_as_one_batch(engine, face, monkeypatch):
    tracker = Tracker(engine, detect_every=10**6)
    pair = np.hstack([face, face])
    assert len(tracker.update(pair, 0)) == 2
    batches = []
    fit = engine.fit
    monkeypatch.setattr(engine, "fit", lambda images, shape: batches.append(images.shape) or fit(images, shape))
    assert len(tracker.update(pair, 1)) == 2
    assert batches == [(2, 1, 96, 96)]


def test_frame_of_another_size(engine, face):
    tracker = Tracker(engine)
    tracker.update(face, 0)
    small = cv2.resize(face, (200, 200), interpolation=cv2.INTER_AREA)
    faces = tracker.update(small, 1)
    assert faces.tracked.tolist() == [False]
    assert np.abs(faces.points - lgcn_fast.detect(small, model=engine).points).max() < 1e-3


@pytest.mark.parametrize("kind", ["gray", "float"])
def test_other_kinds_of_images(engine, face, kind):
    image = cv2.cvtColor(face, cv2.COLOR_RGB2GRAY) if kind == "gray" else (face / 255).astype(np.float32)
    expected, found = track(Tracker(engine), [face] * 2), track(Tracker(engine), [image] * 2)
    assert np.abs(found[1].points - expected[1].points).max() < 0.5


@pytest.mark.parametrize(
    ("times", "speed"),
    [((0, 1, 2, 3, 93), 10), ((0, 1, 2, 2.03, 4), 10), ((0, 1, 1, 2), 12), ((0, 0, 0, 90), 12)],
    ids=["gap", "burst", "equal", "equal and a gap"],
)
@pytest.mark.parametrize("color", [True, False])
def test_time_stamps_that_jump(engine, face, times, speed, color):
    """A face that goes on where it went is held, whatever its clock says, and at the border of the frame."""
    tracker = Tracker(engine)
    for index, time in enumerate(times):
        frame = moved(face, 60 + speed * index)
        faces = tracker.update(frame if color else frame[..., 1], time / FPS)
        assert faces.ids.tolist() == [0]
        assert faces.tracked.tolist() == [index > 0]


def test_lost_faces_are_found_again_each_as_itself(engine, face):
    """Boxes that have a third in common: the face nearest to a detection is the one that is found."""
    tracker = Tracker(engine)
    found = lgcn_fast.detect(face, model=engine)
    beside = replace(found, points=found.points + np.float32([0.5 * found.boxes[0, 2], 0]),
                     boxes=found.boxes + np.float32([0.5 * found.boxes[0, 2], 0, 0, 0]))  # fmt: skip
    assert 0.3 < overlap(found.boxes[0], beside.boxes[0]) < 0.4
    tracker._take(found)
    tracker._take(beside)
    assert [track.identity for track in tracker._tracks] == [0, 1]
    tracker._tracks, tracker._lost = [], tracker._tracks
    tracker._take(beside)
    assert [track.identity for track in tracker._tracks] == [1]
    tracker._take(found)
    assert [track.identity for track in tracker._tracks] == [1, 0]


def test_time_must_not_go_back(engine, face):
    tracker = Tracker(engine)
    tracker.update(face, 3)
    tracker.update(face, 3)
    with pytest.raises(ValueError, match=r"time: expected 3 s or later \(or `reset`\), got 2"):
        tracker.update(face, 2)
    with pytest.raises(ValueError, match="got nan"):
        tracker.update(face, np.nan)
    tracker.reset()
    assert tracker.update(face, 0).ids.tolist() == [1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"detect_every": 0}, "detect_every: expected 1 or more frames, got 0"),
        ({"detect_every": np.nan}, "detect_every: expected 1 or more frames, got nan"),
        ({"min_face": 0}, "min_face: expected a positive number"),
        ({"smoothing": -1}, "smoothing: expected 0 or more, got -1"),
        ({"lost_below": 0.7}, "lost_below: expected 0 <= lost_below <= min_confidence <= 1"),
        ({"model": "lgcn-0"}, "model: expected one of"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        Tracker(**options)


def test_two_images_are_no_frame(engine, face):
    with pytest.raises(ValueError, match=r"frame: expected one image .*, got 2"):
        Tracker(engine).update([face, face])


def test_smoothing_steadies_a_still_face_to_a_third(engine, face, random):
    frames = [noisy(face, 6, random) for _ in range(60)]

    def jitter(smoothing: float | None) -> float:
        points = np.array([faces.points[0] for faces in track(Tracker(engine, smoothing=smoothing), frames)])
        return np.linalg.norm(np.diff(points[15:], axis=0), axis=-1).mean()

    assert jitter(1.0) < jitter(None) / 3
    assert jitter(4.0) < jitter(1.0)


@pytest.mark.parametrize("speed", [0.5, 2])
def test_smoothed_points_lag_by_less_than_a_frame(engine, face, speed, random):
    shifts = np.maximum(np.arange(30) - 10, 0) * speed
    frames = [noisy(moved(face, x), 2, random) for x in shifts]
    points = np.array([faces.points[0, :, 0].mean() for faces in track(Tracker(engine), frames)])
    behind = shifts - (points - points[:10].mean())
    assert behind[-8:].mean() < speed


def test_filter_leaves_the_first_frame_and_weighs_by_scores(random):
    still = random.uniform(0, 100, (3, 2))
    smooth = OneEuroFilter()
    scores = np.array([1, 0.5, 0.0])
    np.testing.assert_array_equal(smooth(still, scores, 100, 0), still)
    after = np.abs(smooth(still + 0.001, scores, 100, 1 / FPS) - still)[:, 0]
    assert 0.001 > after[0] > after[1] > after[2] > 0


def test_filter_counts_seconds_and_sizes_of_the_face(random):
    """The same video at twice the size, or the same moment in two steps or one after a long pause."""
    path = np.cumsum(random.normal(0, 1, (20, 5, 2)), axis=0)
    scores = np.ones(5)
    small, large = OneEuroFilter(), OneEuroFilter()
    for index, points in enumerate(path):
        a, b = small(points, scores, 50, index / FPS), large(2 * points, scores, 100, index / FPS)
        np.testing.assert_allclose(2 * a, b)
    np.testing.assert_allclose(small(path[-1] + 1, scores, 50, 1000), path[-1] + 1, atol=0.01)
    assert np.isfinite(small(path[-1], scores, 50, 1000)).all()


@pytest.mark.data
@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "visible"), [("cap13_edit2", [range(765)]), ("short_hamilton_clip", [range(20), range(82, 211)])]
)
def test_faces_of_real_clips_are_held(engine, data, name, visible):
    """Frames with a face that is not in profile, as a person saw them (see benchmarks/video.py)."""
    with VideoReader(data / "video" / f"{name}.mp4") as frames:
        found = list(Tracker(engine).run(frames))
    for span in visible:
        held = [found[index] for index in span if len(found[index])]
        assert len(held) >= 0.98 * len(span)
        assert len({faces.ids[0] for faces in held}) == 1


def test_a_crowd_that_is_lost_is_looked_for_everywhere_at_once(engine, face, searched):
    crowd = np.tile(cv2.resize(face, (160, 160)), (5, 8, 1))
    tracker = Tracker(engine, min_face=50)
    tracker.update(crowd, 0.0)
    found = tracker.update(crowd, 1 / FPS)
    assert len(found) >= 35
    searched.clear()
    assert len(tracker.update(blank(crowd), 2 / FPS)) == 0
    assert searched[0] == crowd.shape[1::-1]
    assert len(searched) == 2
    again = [tracker.update(crowd, time / FPS) for time in (3, 4, 5)][-1]
    assert len(set(found.ids) & set(again.ids)) >= 35


def test_a_face_that_moves_by_most_of_its_side_from_frame_to_frame_is_the_same(engine, face):
    """But not one that is a whole side away, as after a cut."""
    wide = cv2.copyMakeBorder(face, 0, 0, 0, 300, cv2.BORDER_REPLICATE)
    tracker = Tracker(engine, min_face=60)
    found = [tracker.update(moved(wide, 75 * (index % 2)), index / 10) for index in range(8)]
    assert [list(faces.ids) for faces in found] == [[0]] * 8
    assert list(tracker.update(moved(wide, 240), 0.8).ids) == [1]


def test_reset_forgets_lost_faces_too(engine, face):
    tracker = Tracker(engine)
    assert tracker.update(face, 0).ids.tolist() == [0]
    assert len(tracker.update(blank(face), 0.1)) == 0
    tracker.reset()
    assert tracker.update(face, 0).ids.tolist() == [1]


def test_boxes_are_those_of_the_smoothed_points(engine, face, random):
    for faces in track(Tracker(engine, smoothing=4), [noisy(face, 6, random) for _ in range(6)]):
        np.testing.assert_allclose(faces.boxes[0], tracking.face_box(faces.points[0]), atol=1e-3)


def test_windows_show_neither_known_faces_nor_parts(engine, face):
    """A face that the window cuts is another window's, or cut by the image itself."""
    how = 40, 0.5, engine, tracking.finder_for(None, engine), tracking.shape_for(None, 68), False

    def found(image, x, width, known=()):
        return len(tracking._detect_in(image, np.array([x, 0, width, 300]), list(known), *how))

    beside, (box,) = np.hstack([blank(face), face]), lgcn_fast.detect(face, model=engine).boxes
    assert found(beside, 200, 400) == 1
    assert found(beside, 200, 400, [box + np.array([300, 0, 0, 0])]) == 0
    assert found(beside, 200, 400, [box]) == 1
    for cut in (range(110, 300), range(180)):
        part = face[:, list(cut)]
        assert found(part, 0, len(cut)) == 1
        assert found(face, cut[0], len(cut)) == 0


def test_smoothing_may_be_off(engine, face, random):
    frames = [noisy(face, 6, random) for _ in range(3)]
    off, none = (track(Tracker(engine, smoothing=how), frames)[-1].points for how in (0, None))
    np.testing.assert_array_equal(off, none)
