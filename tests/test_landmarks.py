import numpy as np
import pytest

from lgcn_fast.datasets import read_300w
from lgcn_fast.landmarks import KAGGLE_NAMES, SCHEMES


@pytest.mark.parametrize("count", SCHEMES)
def test_mirroring_twice_changes_nothing(count):
    mirror = SCHEMES[count].mirror
    assert sorted(mirror) == list(range(count))
    assert [mirror[i] for i in mirror] == list(range(count))


@pytest.mark.parametrize("count", SCHEMES)
def test_mirroring_swaps_the_eye_corners(count):
    scheme = SCHEMES[count]
    left, right = scheme.eye_corners
    assert scheme.mirror[left] == right


def test_kaggle_mirror_swaps_left_and_right_names():
    mirror = SCHEMES[15].mirror
    assert KAGGLE_NAMES[mirror[KAGGLE_NAMES.index("left_eyebrow_inner_end")]] == "right_eyebrow_inner_end"
    assert mirror[KAGGLE_NAMES.index("nose_tip")] == KAGGLE_NAMES.index("nose_tip")


@pytest.mark.data
def test_mean_face_is_its_own_mirror_image(data):
    shapes = np.stack([face.points for face in read_300w(data / "300w" / "afw")])
    shapes -= shapes.mean(axis=1, keepdims=True)
    mean = (shapes / np.abs(shapes).max(axis=(1, 2), keepdims=True)).mean(axis=0)
    mirrored = mean[list(SCHEMES[68].mirror)] * (-1, 1)
    assert np.linalg.norm(mean - mirrored, axis=1).max() < 0.1
