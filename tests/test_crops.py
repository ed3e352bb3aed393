from dataclasses import replace

import numpy as np
import pytest

from lgcn_fast.crops import CROP_SIZE, MARGIN, make_crop, read_cache, write_cache
from lgcn_fast.datasets import Face, read_faces
from lgcn_fast.images import face_box


def face(random, group="g", size=(200, 220), count=5):
    image = random.integers(0, 256, size, np.uint8)
    return Face(image, random.uniform(40, 150, (count, 2)).astype(np.float32), group, group)


@pytest.mark.parametrize("color", [False, True])
def test_round_trip(tmp_path, random, color):
    faces = {"a": [face(random, "g1"), face(random, "g2")], "b": [face(random, "g3")]}
    background = Face(random.integers(0, 256, (50, 300), np.uint8), np.empty((0, 2), np.float32), "bg", "bg")
    assert write_cache(tmp_path / "c.npz", faces | {"background": [background]}, color) == 4
    cache = read_cache(tmp_path / "c.npz")
    assert (len(cache), cache.num_landmarks, cache.channels) == (4, 5, 3 if color else 1)
    assert cache.groups.tolist() == ["g1", "g2", "g3", "bg"]
    assert cache.sets.tolist() == ["a", "a", "b", "background"]
    assert all(image.shape[:2] == (CROP_SIZE, CROP_SIZE) for image in cache.images)
    assert np.isnan(cache.points[3]).all()
    assert not list(tmp_path.glob("*.part"))


def test_box_stays_around_the_points(random):
    one = face(random)
    image, points, box = make_crop(one, 5, color=False)
    np.testing.assert_allclose(box, face_box(points), rtol=1e-3, atol=1e-3)
    assert box[2] == pytest.approx(CROP_SIZE / MARGIN, rel=0.02)
    assert image.shape == (CROP_SIZE, CROP_SIZE)


def test_different_numbers_of_landmarks_are_refused(tmp_path, random):
    with pytest.raises(ValueError, match=r"expected one number of landmarks .* got \[4, 5\]"):
        write_cache(tmp_path / "c.npz", {"a": [face(random), face(random, count=4)]})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("content", [b"", b"text", b"PK\x03\x04 the first part", None])
def test_other_files_are_named(tmp_path, content):
    path = tmp_path / "c.npz"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ValueError, match=r"c\.npz: expected a crop cache"):
        read_cache(path)


@pytest.mark.data
def test_real_faces_lie_within_their_crops(data):
    for one in read_faces(data / "300w" / "afw")[:20]:
        _, points, _ = make_crop(one, 68, color=False)
        assert points.min() > 20
        assert points.max() < CROP_SIZE - 20


def test_labels_beside_the_picture_are_named(tmp_path, random):
    outside = replace(face(random, "there"), points=random.uniform(400, 500, (5, 2)).astype(np.float32))
    with pytest.raises(ValueError, match="there, its labels: expected a box that meets the image of 220 x 200 pixels"):
        write_cache(tmp_path / "c.npz", {"a": [face(random), outside]})
    assert not list(tmp_path.iterdir())
