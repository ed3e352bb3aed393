import json

import cv2
import numpy as np
import pytest

from lgcn_fast.datasets import Face
from lgcn_fast.evaluation import Evaluation, evaluate, landmark_errors, report, summary, with_mean_shape


def shapes(count=2):
    labelled = np.zeros((count, 68, 2), np.float32)
    labelled[:, 36], labelled[:, 45] = (10, 20), (50, 50)  # inter-ocular distance 50
    return labelled


def test_inter_ocular_error_by_hand():
    labelled = shapes()
    predicted = labelled.copy()
    predicted[0, :34, 0] += 5  # half of the points are off by a tenth of the distance; 17 of them are outline
    np.testing.assert_allclose(landmark_errors(predicted, labelled), [0.05, 0])
    np.testing.assert_allclose(landmark_errors(predicted, labelled, outline=False), [0.1 * 17 / 51, 0])


def test_face_size_error_by_hand():
    labelled = shapes(1)  # 50 wide and 50 high
    np.testing.assert_allclose(landmark_errors(labelled + np.array([3, 4]), labelled, "face-size"), [0.1])


def test_points_without_label_do_not_count():
    labelled = shapes(2)
    predicted = labelled + np.array([5, 0])
    labelled[0, 0] = np.nan
    labelled[1, 36] = np.nan
    errors = landmark_errors(predicted, labelled)
    assert errors[0] == pytest.approx(0.1)
    assert np.isnan(errors[1])  # no eye corner, no distance


def test_summary_by_hand():
    values = summary(np.array([0.02, 0.04, 0.12, np.nan]))
    assert values == pytest.approx({"faces": 3, "median": 4, "mean": 6, "failures": 100 / 3, "auc": 100 * 1.4 / 3})


@pytest.mark.parametrize(
    ("predicted", "labelled", "normalisation", "message"),
    [
        ((1, 67, 2), (1, 67, 2), "inter-ocular", "expected 68 or 15 landmarks, got 67"),
        ((2, 68, 2), (1, 68, 2), "inter-ocular", "predicted: expected"),
        ((1, 68, 2), (1, 68, 2), "iod", "normalisation: expected"),
    ],
)
def test_bad_input_is_named(predicted, labelled, normalisation, message):
    with pytest.raises(ValueError, match=message):
        landmark_errors(np.zeros(predicted), np.zeros(labelled), normalisation)


def test_no_face_is_named():
    with pytest.raises(ValueError, match="faces: expected at least one labelled face"):
        evaluate([])


def test_report_writes_numbers_curve_and_sheet(tmp_path, random):
    points = random.uniform(30, 90, (20, 68, 2)).astype(np.float32)
    faces = [Face(random.integers(0, 256, (120, 120), np.uint8), p, f"f{i}", f"f{i}") for i, p in enumerate(points)]
    evaluation = Evaluation(faces, points + 1, points, "inter-ocular")
    baseline = with_mean_shape(evaluation, random.uniform(0, 1, (68, 2)))
    values = report({"fit": evaluation, "mean shape": baseline}, tmp_path / "out")
    assert json.loads((tmp_path / "out" / "evaluation.json").read_text()) == values
    names = {"fit, 68 points", "fit, 51 points", "mean shape, 68 points", "mean shape, 51 points"}
    assert set(values["percent"]) == names
    assert len(values["faces"]) == 20
    for name in ("curve.png", "sheet.png"):
        picture = cv2.imread(str(tmp_path / "out" / name))
        assert picture.std() > 10


def test_mean_shape_lies_in_the_box(random):
    """A face that is the mean shape itself is met exactly."""
    points = random.uniform(20, 80, (1, 68, 2)).astype(np.float32)
    evaluation = Evaluation([], points, points, "inter-ocular")
    low, high = points[0].min(axis=0), points[0].max(axis=0)
    side = (high - low).max() * 1.17
    in_box = (points[0] - (low + high) / 2) / side + 0.5
    np.testing.assert_allclose(with_mean_shape(evaluation, in_box).predicted, points, atol=1e-3)
