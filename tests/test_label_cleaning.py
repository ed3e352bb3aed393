from dataclasses import replace

import numpy as np
import pytest

import lgcn_fast
from lgcn_fast.datasets import Face
from lgcn_fast.images import read_image
from lgcn_fast.label_cleaning import recentred


@pytest.fixture
def face(demo_picture):
    image = read_image(demo_picture)
    points = lgcn_fast.detect(image).points[0]
    return Face(image, points.astype(np.float32), "demo", "demo.jpg")


def test_a_shift_is_taken_out_and_the_shape_stays(face):
    original = recentred([face], "lgcn-nano")[0].points
    shifted = replace(face, points=face.points + np.array([3, -2], np.float32))
    shifted.points[::5] = np.nan
    background = Face(face.image(), np.empty((0, 2), np.float32), "bg", "bg")
    moved, same = recentred([shifted, background], "lgcn-nano")
    assert same is background
    np.testing.assert_array_equal(np.isnan(moved.points), np.isnan(shifted.points))
    change = moved.points - shifted.points
    np.testing.assert_allclose(change[1::5], np.broadcast_to(change[1], change[1::5].shape), atol=1e-4)
    np.testing.assert_allclose(moved.points[1::5], original[1::5], atol=0.7)


def test_another_number_of_landmarks_is_named(face):
    with pytest.raises(ValueError, match=r"demo\.jpg: expected the model's 68 landmarks, got 15"):
        recentred([replace(face, points=face.points[:15])], "lgcn-nano")
