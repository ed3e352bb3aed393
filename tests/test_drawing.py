from dataclasses import replace

import numpy as np
import pytest
import torch

import lgcn_fast
from lgcn_fast import Faces, Landmarks, Tracker, draw
from lgcn_fast.drawing import LABEL_COLOR, LINE_COLOR, POINT_COLOR, STYLES, contact_sheet
from lgcn_fast.images import read_image

ONE = Landmarks(np.zeros((68, 2)), np.ones(68))


@pytest.fixture
def picture(demo_picture) -> np.ndarray:
    return read_image(demo_picture, color=True)


@pytest.fixture
def faces(picture) -> Faces:
    return lgcn_fast.detect(picture)


def has(image: np.ndarray, color: tuple[int, int, int], tolerance: int = 40) -> bool:
    return bool((np.abs(image.astype(int) - color).max(axis=-1) <= tolerance).any())


@pytest.mark.parametrize("style", STYLES)
def test_every_style_draws_something_and_leaves_the_image(picture, faces, style):
    before = picture.copy()
    drawn = draw(picture, faces, style=style)
    np.testing.assert_array_equal(picture, before)
    assert drawn.shape == picture.shape
    assert drawn.dtype == np.uint8
    changed = (drawn != picture).any(axis=-1)
    assert 0 < changed.mean() < 0.5
    x, y, side, _ = faces.boxes[0].astype(int)
    # (With captions and indices; the heatmaps' box leans with the face.)
    changed[max(y - 20, 0) : y + side + 8, x - 8 : x + side + 20] = False
    assert not changed.any()


def test_colors(faces):
    black = np.zeros((300, 300), np.uint8)
    plain = draw(black, faces.points)
    assert has(plain, LINE_COLOR)
    assert has(plain, POINT_COLOR)
    assert not has(draw(black, faces, "points"), LINE_COLOR)
    assert has(draw(black, faces, "indices"), LABEL_COLOR)
    np.testing.assert_array_equal(draw(black, faces, ["points", "lines"]), plain)


@pytest.mark.parametrize("shift", [(0, -100), (-130, -100), (130, 0)])
def test_captions_are_inside_the_picture(faces, shift):
    """Where the face is not."""
    cut = faces.points + shift
    black = np.zeros((250, 250), np.uint8)
    drawn, alone = draw(black, replace(faces, points=cut), "boxes"), draw(black, cut, "boxes")
    caption = np.argwhere((drawn != alone).any(axis=-1))
    assert len(caption) > 100
    assert (np.ptp(caption, axis=0) >= (8, 20)).all()


def test_confidence_is_red_to_green():
    points = np.array([[[20, 20], [60, 20], [100, 20.0]]])
    drawn = draw(np.zeros((50, 120, 3), np.uint8), Landmarks(points, np.array([[0, 0.5, 1]])), style="confidence")
    red, yellow, green = (drawn[20, x].astype(int) for x in (20, 60, 100))
    assert red[0] > 200 > 60 > red[1]
    assert yellow[0] > 200 < yellow[1]
    assert green[1] > 200 > 60 > green[0]


def test_what_can_be_drawn(picture, faces):
    expected = draw(picture, faces)
    np.testing.assert_array_equal(draw(picture, faces.points), expected)
    np.testing.assert_array_equal(draw(picture, faces.points[0]), expected)
    np.testing.assert_array_equal(draw(picture, Landmarks(faces.points, faces.scores)), expected)
    np.testing.assert_array_equal(draw((picture / 255).astype(np.float32), faces), expected)
    assert draw(picture[..., 0], faces).shape == picture.shape
    np.testing.assert_array_equal(draw(picture, np.empty((0, 68, 2)), STYLES[:4]), picture)


def test_boxes_tell_identities(picture):
    tracked, found = Tracker().update(picture), lgcn_fast.detect(picture, min_face=45)
    with_identity, without = draw(picture, tracked, "boxes"), draw(picture, found, "boxes")
    assert (with_identity != without).any()


def test_points_without_a_place_are_left_out(picture, faces):
    points = faces.points[0].copy()
    points[:17] = np.nan
    drawn = draw(picture, points, ["boxes", "lines", "points", "indices"])
    jaw = drawn[int(faces.points[0, 8, 1]) - 2 :]
    np.testing.assert_array_equal(jaw, picture[-len(jaw) :])
    np.testing.assert_array_equal(draw(picture, np.full((1, 68, 2), np.nan), STYLES[:4]), picture)


def test_faces_beyond_the_border(picture, faces):
    for style in STYLES:
        beyond = Faces(faces.points - 120, faces.scores, faces.confidence, faces.boxes)
        assert (draw(picture, beyond, style) != picture).any()


@pytest.mark.parametrize("place", [np.inf, -np.inf, 3e6, 9e8, 1e300])
@pytest.mark.parametrize("style", STYLES)
def test_points_far_away_are_left_out(picture, faces, style, place):
    """OpenCV would crash, or draw for minutes."""
    points = faces.points.astype(np.float64)
    points[0, 5, 0] = place
    without = points.copy()
    without[0, 5] = np.nan
    rest = faces.scores, faces.confidence, faces.boxes
    drawn, expected = (draw(picture, Faces(places, *rest), style) for places in (points, without))
    np.testing.assert_array_equal(drawn, expected)


def test_one_point_beside_the_picture_does_not_make_the_others_large(picture, faces):
    points = faces.points.copy()
    points[0, 5] = 2000
    share, usual = ((draw(picture, some, "points") != picture).any(axis=-1).mean() for some in (points, faces))
    assert 0.5 < share / usual < 8


def test_points_may_be_tensors(picture, faces):
    points = torch.from_numpy(faces.points).requires_grad_()
    np.testing.assert_array_equal(draw(picture, points), draw(picture, faces))
    assert (draw(picture, points.bfloat16()) != picture).any()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((np.zeros((2, 8, 8, 3), np.uint8), np.zeros((1, 68, 2))), r"image: expected one image .*, got 2"),
        ((np.zeros((8, 8), np.uint8), np.zeros((1, 68, 3))), r"faces: expected points \(F, N, 2\) or \(N, 2\)"),
        ((np.zeros((8, 8), np.uint8), [ONE]), r"faces: expected .*, got a list of them \(of some faces take"),
        ((np.zeros((8, 8), np.uint8), np.zeros((68, 2)), "dots"), "style: expected some of heatmaps, .*got dots"),
        ((np.zeros((8, 8), np.uint8), np.zeros((68, 2)), "confidence"), "style: expected faces with scores"),
    ],
)
def test_bad_input(arguments, message):
    with pytest.raises(ValueError, match=message):
        draw(*arguments)


def test_contact_sheet():
    tiles = [np.full((20, 30, 3), 50 * index, np.uint8) for index in range(3)]
    sheet = contact_sheet(tiles, [""] * 3, 2)
    assert sheet.shape == (40, 60, 3)
    assert [sheet[5, 5, 0], sheet[5, 35, 0], sheet[25, 5, 0], sheet[25, 35, 0]] == [0, 50, 100, 0]


@pytest.mark.parametrize("angle", [0, 90, 180])
def test_heatmaps_are_those_of_the_upright_face(demo_picture, angle):
    """Drawn where they are seen: over most landmarks the picture turns yellow, beside the face it stays as it is."""
    face = np.rot90(read_image(demo_picture, color=True), angle // 90)
    faces = lgcn_fast.detect(face, model="lgcn-nano", any_angle=True)
    drawn = draw(face, faces, "heatmaps", "lgcn-nano").astype(int)
    x, y = np.rint(faces.points[0, 17:]).astype(int).T
    warmer = (drawn - face)[y, x] @ (1, 0, -1) > 20  # more red than blue was added
    assert warmer.mean() > 0.9
    left, top, side = np.rint(faces.boxes[0, :3]).astype(int)
    outside = np.ones(face.shape[:2], bool)
    outside[max(top - 20, 0) : top + side + 20, max(left - 20, 0) : left + side + 20] = False
    np.testing.assert_array_equal(drawn[outside], face[outside])


def test_heatmaps_of_faces_that_overlap(picture, faces):
    """The higher one is seen, whichever comes last."""
    both = np.concatenate([faces.points, faces.points + np.float32([60, 0])])
    np.testing.assert_array_equal(draw(picture, both, "heatmaps"), draw(picture, both[::-1], "heatmaps"))


def test_each_face_has_the_colors_of_its_own_scores():
    faces = Landmarks(np.array([[(20, 20.0), (20, 40)], [(60, 20), (60, 40)]]), np.array([[0.0, 0], [1, 1]]))
    black = np.zeros((50, 80, 3), np.uint8)
    drawn = draw(black, faces, "confidence").astype(int)
    assert drawn[20, 20, 0] > 100 > drawn[20, 20, 1]
    assert drawn[20, 60, 1] > 100 > drawn[20, 60, 0]
    np.testing.assert_array_equal(draw(black, faces, ["points", "confidence"]), drawn)
