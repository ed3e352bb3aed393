import numpy as np
import pytest

from lgcn_fast import load_model, predict
from lgcn_fast.crops import CropCache
from lgcn_fast.datasets import is_validation
from lgcn_fast.images import crop, read_image
from lgcn_fast.label_shifts import measured_shifts

FACE = np.array([82, 70, 124, 124])


@pytest.mark.parametrize("mirrored", [False, True])
def test_shifts_of_labels_are_found_in_a_picture_and_its_mirror_image(demo_picture, mirrored):
    """Labels where the network sees the points, moved: the shift between two sets is what they were moved by."""
    image = read_image(demo_picture)
    image = crop(image, FACE, 96)
    image = np.ascontiguousarray(image[:, ::-1]) if mirrored else image
    points = predict(image, model="lgcn-nano", fit=False).points[0]
    shifts = np.array([[0, 0], [0.02, 0], [-0.03, 0.01], [np.nan, np.nan]]) * 96
    labels = points + shifts[:, None]
    labels[:2, :5] = np.nan
    boxes = np.tile(np.array([0, 0, 96, 96], np.float32), (4, 1))
    sets = np.array(["none", "right", "left", "background"])
    assert not any(map(is_validation, sets))
    cache = CropCache([image] * 4, labels.astype(np.float32), boxes, sets, sets)
    shifts = measured_shifts(cache, load_model("lgcn-nano"))
    assert shifts.keys() == {"none", "right", "left"}
    assert shifts["none"] == pytest.approx(0, abs=0.015)
    assert shifts["right"] - shifts["none"] == pytest.approx(0.02, abs=0.002)
    assert shifts["left"] - shifts["none"] == pytest.approx(-0.03, abs=0.005)


def test_shifts_are_measured_without_validation_faces(demo_picture):
    image = crop(read_image(demo_picture), FACE, 48)
    labels = np.tile(predict(image, model="lgcn-finder", fit=False).points[0], (40, 1, 1)).astype(np.float32)
    groups, boxes = np.array([f"photo{i}" for i in range(40)]), np.tile(np.array([0, 0, 48, 48], np.float32), (40, 1))
    held_out = np.array([is_validation(group) for group in groups])
    labels[held_out, :, 0] = np.inf
    assert held_out.any()
    sets = np.where(held_out | (np.arange(40) < 20), "mixed", "plain")
    sets[np.flatnonzero(held_out)[0]] = "held out"
    shifts = measured_shifts(CropCache([image] * 40, labels, boxes, groups, sets), load_model("lgcn-finder"))
    assert shifts.keys() == {"mixed", "plain"}
    assert shifts["mixed"] == shifts["plain"]


def test_shifts_where_one_half_of_the_face_is_labelled(demo_picture):
    """What the network sees in the mirror image are the other half's landmarks."""
    image = crop(read_image(demo_picture), FACE, 96)
    points = predict(image, model="lgcn-nano", fit=False).points[0]
    labels = np.stack([points, points + np.array([2.4, 0])]).astype(np.float32)
    labels[1, 24:36] = labels[0, 5:68] = np.nan
    sets = np.array(["none", "right"])
    boxes = np.tile(np.array([0, 0, 96, 96], np.float32), (2, 1))
    shifts = measured_shifts(CropCache([image] * 2, labels, boxes, sets, sets), load_model("lgcn-nano"))
    assert shifts["none"] == pytest.approx(0, abs=0.03)
    assert shifts["right"] == pytest.approx(0.025, abs=0.02)


def test_faces_of_a_large_set_are_looked_at_from_first_to_last(demo_picture):
    """Of 200 the last 120 have labels that were moved, and decide the median; of the first 128 the others would."""
    image = crop(read_image(demo_picture), FACE, 48)
    points = predict(image, model="lgcn-finder", fit=False).points[0]
    labels = np.tile(points, (200, 1, 1)).astype(np.float32)
    sets, boxes = np.full(200, "set"), np.tile(np.array([0, 0, 48, 48], np.float32), (200, 1))
    plain = measured_shifts(CropCache([image] * 200, labels, boxes, sets, sets), load_model("lgcn-finder"))
    labels[80:, :, 0] += 0.1 * 48
    moved = measured_shifts(CropCache([image] * 200, labels, boxes, sets, sets), load_model("lgcn-finder"))
    assert moved["set"] - plain["set"] > 0.05
