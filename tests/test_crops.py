from dataclasses import replace

import numpy as np
import pytest

from lgcn_fast.crops import (
    BACKGROUND_CROPS,
    CROP_SIZE,
    MARGIN,
    CropCache,
    background_crops,
    face_crop,
    read_cache,
    training_shapes,
    write_cache,
)
from lgcn_fast.datasets import Face, is_validation, read_faces
from lgcn_fast.images import face_box, write_image


def face(random, group="g", size=(200, 220), count=5):
    image = random.integers(0, 256, size, np.uint8)
    return Face(image, random.uniform(40, 150, (count, 2)).astype(np.float32), group, group)


@pytest.mark.parametrize("color", [False, True])
def test_round_trip(tmp_path, random, color):
    faces = {"a": [face(random, "g1"), face(random, "g2")], "b": [face(random, "g3")]}
    background = Face(random.integers(0, 256, (50, 300), np.uint8), np.empty((0, 2), np.float32), "bg", "bg")
    assert write_cache(tmp_path / "c.npz", faces | {"background": [background]}, color) == 3 + BACKGROUND_CROPS
    cache = read_cache(tmp_path / "c.npz")
    assert (len(cache), cache.num_landmarks, cache.channels) == (3 + BACKGROUND_CROPS, 5, 3 if color else 1)
    assert cache.groups.tolist() == ["g1", "g2", "g3"] + ["bg"] * BACKGROUND_CROPS
    assert cache.sets.tolist() == ["a", "a", "b"] + ["background"] * BACKGROUND_CROPS
    assert all(image.shape[:2] == (CROP_SIZE, CROP_SIZE) for image in cache.images)
    assert np.isnan(cache.points[3:]).all()
    assert not list(tmp_path.glob("*.part"))


@pytest.mark.parametrize("size", [(1, 1), (40, 300), (700, 500)])
def test_background_is_cut_at_many_sizes_and_places(size):
    """In a picture whose pixels say where they are, twice alike."""
    rows, columns = np.mgrid[: size[0], : size[1]] * 0.3
    picture = np.stack([rows, columns, 0 * rows], axis=-1).astype(np.uint8)
    squares = set()
    for name in ("a.jpg", "b.jpg", "a.jpg"):
        crops = list(background_crops(Face(picture, np.empty((0, 2)), name, name), 5, color=False))
        assert len(crops) == BACKGROUND_CROPS
        for image, points, box in crops:
            assert image.shape == (CROP_SIZE, CROP_SIZE, 3)
            assert points.shape == (5, 2)
            assert np.isnan(points).all()
            np.testing.assert_allclose(box, [33.75, 33.75, 112.5, 112.5], atol=0.5)
            squares.add((*image.min((0, 1))[:2], *np.ptp(image, (0, 1))[:2]))
    if min(size) > CROP_SIZE:
        assert len(squares) == 2 * BACKGROUND_CROPS
        sides = [max(square[2:]) / 0.3 for square in squares]
        assert all(CROP_SIZE / 2 - 8 < side < min(size) + 8 for side in sides)
        assert max(sides) > 2 * min(sides)


def test_box_stays_around_the_points(random):
    one = face(random)
    image, points, box = face_crop(one, color=False)
    np.testing.assert_allclose(box, face_box(points), rtol=1e-3, atol=1e-3)
    assert box[2] == pytest.approx(CROP_SIZE / MARGIN, rel=0.02)
    assert image.shape == (CROP_SIZE, CROP_SIZE)


def test_different_numbers_of_landmarks_are_refused(tmp_path, random):
    with pytest.raises(ValueError, match=r"expected one number of landmarks .* got 5 in a \(.*\), 4 in a \("):
        write_cache(tmp_path / "c.npz", {"a": [face(random), face(random, count=4)]})
    with pytest.raises(ValueError, match="got no labelled face in a, b"):
        write_cache(tmp_path / "c.npz", {"a": [], "b": []})
    assert not list(tmp_path.iterdir())


def test_damaged_crops_are_named(tmp_path, random):
    path = tmp_path / "c.npz"
    write_cache(path, {"a": [face(random)]})
    with np.load(path) as file:
        parts = dict(file)
    parts["jpegs"][:50] = 0
    np.savez(path, **parts)
    with pytest.raises(ValueError, match=r"c\.npz: expected a crop cache .* got a crop that does not decode"):
        read_cache(path)
    np.save(tmp_path / "c.npy", parts["points"])
    with pytest.raises(ValueError, match=r"c\.npy: expected a crop cache"):
        read_cache(tmp_path / "c.npy")


def test_background_may_have_any_name(random):
    picture = Face(random.integers(0, 256, (50, 60), np.uint8), np.empty((0, 2)), "caf\udce9", "caf\udce9.jpg")
    assert len(list(background_crops(picture, 5, color=False))) == BACKGROUND_CROPS


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
        _, points, _ = face_crop(one, color=False)
        assert points.min() > 20
        assert points.max() < CROP_SIZE - 20


def test_crops_do_not_depend_on_what_is_labelled(tmp_path, random):
    shape, image = random.uniform(-1, 1, (5, 2)), random.integers(0, 256, (200, 220), np.uint8)
    points = [shape * scale + (100, 90) for scale in (40, 50, 40)]
    points[2][random.integers(5)] = np.nan
    faces = [Face(image, p.astype(np.float32), f"g{i}", f"g{i}") for i, p in enumerate(points)]
    write_cache(tmp_path / "c.npz", {"a": faces})
    cache = read_cache(tmp_path / "c.npz")
    np.testing.assert_allclose(cache.boxes[2], cache.boxes[0], atol=0.1)
    np.testing.assert_array_equal(cache.images[2], cache.images[0])


def test_mistyped_labels_are_named(tmp_path, random):
    far = face(random, "far")
    far.points[2] = 100, 40_000
    message = "far: expected labels in its picture of 220 x 200 pixels, got a face of 4"
    with pytest.raises(ValueError, match=message):
        write_cache(tmp_path / "c.npz", {"a": [face(random), far]})


def test_zeros_for_missing_labels_are_named(tmp_path, random):
    zeros = replace(face(random, "zeros"), points=np.zeros((5, 2), np.float32))
    with pytest.raises(ValueError, match=r"zeros: expected labels at different places .* got all of them at 0, 0"):
        write_cache(tmp_path / "c.npz", {"a": [face(random), zeros]})


def test_labels_beside_the_picture_are_named(tmp_path, random):
    outside = replace(face(random, "there"), points=random.uniform(400, 500, (5, 2)).astype(np.float32))
    with pytest.raises(ValueError, match="there, its labels: expected a box that meets the image of 220 x 200 pixels"):
        write_cache(tmp_path / "c.npz", {"a": [face(random), outside]})
    assert not list(tmp_path.iterdir())


def test_colours_stay_what_they_are(tmp_path, random):
    picture = np.full((200, 220, 3), (200, 30, 60), np.uint8)
    write_image(tmp_path / "red.png", picture)
    write_cache(tmp_path / "c.npz", {"a": [replace(face(random), source=tmp_path / "red.png")]}, color=True)
    np.testing.assert_allclose(read_cache(tmp_path / "c.npz").images[0][90, 90], (200, 30, 60), atol=4)


def test_training_shapes_are_those_of_the_sets_without_validation(random):
    groups = np.array([f"photo{i}" for i in range(60)])
    held_out = np.array([is_validation(group) for group in groups])
    assert 0 < held_out.sum() < 30
    points, sets = random.normal(size=(60, 5, 2)), np.array(["a", "b"] * 30)
    cache = CropCache([], points, np.zeros((60, 4)), groups, sets)
    np.testing.assert_array_equal(training_shapes(cache), points[~held_out])
    np.testing.assert_array_equal(training_shapes(cache, ["b"]), points[~held_out & (sets == "b")])
    with pytest.raises(ValueError, match="sets: expected some of a, b, got a, c"):
        training_shapes(cache, ["a", "c"])


def test_a_digest_is_of_all_that_is_in_a_cache(tmp_path, random):
    write_cache(tmp_path / "c.npz", {"a": [face(random, "g1"), face(random, "g2")]})
    cache = read_cache(tmp_path / "c.npz")
    changed = [replace(cache, **{name: part[::-1]}) for name, part in vars(cache).items() if name != "sets"]
    changed.append(replace(cache, sets=np.array(["a", "b"])))
    assert len({other.digest() for other in (cache, *changed)}) == 6
    assert read_cache(tmp_path / "c.npz").digest() == cache.digest()
