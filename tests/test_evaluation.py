import numpy as np
import pytest

from lgcn_fast import Engine, figures, predict
from lgcn_fast.datasets import Face
from lgcn_fast.evaluation import Evaluation, evaluate, landmark_errors, summary, with_mean_shape
from lgcn_fast.figures import draw_sheet
from lgcn_fast.images import face_box, read_image


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
    labelled[1, 36] = labelled[1, 45]
    assert np.isnan(landmark_errors(predicted, labelled)[1])


def test_sets_of_points_without_labels_are_left_out(random):
    labelled = random.uniform(0, 100, (2, 68, 2))
    labelled[:, 17:] = np.nan
    evaluation = Evaluation(faces_of(labelled), labelled + 5, labelled, "face-size")
    assert list(evaluation.point_sets()) == ["68 points"]
    assert list(evaluation.summaries()) == ["68 points"]


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


def test_faces_are_seen_alike_whatever_is_labelled(demo_picture):
    points = predict(read_image(demo_picture, color=True), [[82, 70, 124, 124]], "lgcn-nano").points[0]
    eyes = np.full_like(points, np.nan)
    eyes[36:48] = points[36:48]
    faces = [Face(demo_picture, labels, "g", "name") for labels in (points, eyes)]
    whole, partly = evaluate(faces, "lgcn-nano")["fit"].predicted
    np.testing.assert_allclose(partly, whole, atol=3)


def test_one_pass_gives_what_predict_gives(demo_picture, random, monkeypatch):
    """Both ways of reading the heatmaps, more faces than go through the network at once."""
    image = read_image(demo_picture, color=True)
    points = random.uniform(90, 190, (40, 68, 2)).astype(np.float32)
    faces = [Face(demo_picture, p, f"f{i}", f"f{i}") for i, p in enumerate(points)]
    passes = []
    heatmaps = Engine.heatmaps
    monkeypatch.setattr(Engine, "heatmaps", lambda engine, crops: passes.append(len(crops)) or heatmaps(engine, crops))
    found = evaluate(faces, "lgcn-nano", ensemble=2)
    assert list(found) == ["fit", "heatmap maxima"]
    assert sum(passes) == 2 * 40
    boxes = [face_box(p) for p in points]
    for fit, evaluation in zip((True, False), found.values(), strict=True):
        expected = predict([image] * 40, boxes, "lgcn-nano", fit, ensemble=2).points
        np.testing.assert_allclose(evaluation.predicted, expected, atol=1e-3)
        assert evaluation.predicted.dtype == np.float32
        np.testing.assert_array_equal(evaluation.labelled, points)


def test_mean_shape_lies_in_the_box(random):
    """A face that is the mean shape itself is met exactly."""
    points = random.uniform(20, 80, (1, 68, 2)).astype(np.float32)
    evaluation = Evaluation([], points, points, "inter-ocular")
    low, high = points[0].min(axis=0), points[0].max(axis=0)
    side = (high - low).max() * 1.17
    in_box = (points[0] - (low + high) / 2) / side + 0.5
    np.testing.assert_allclose(with_mean_shape(evaluation, in_box).predicted, points, atol=1e-3)


def faces_of(points):
    return [Face(np.zeros((60, 60), np.uint8), p.astype(np.float32), "g", "name") for p in points]


def test_labels_that_cannot_be_evaluated_are_named(random):
    points = random.uniform(10, 50, (2, 68, 2))
    without = points.copy()
    without[:, 36] = np.nan
    for faces, message in (
        (faces_of(random.uniform(10, 50, (1, 98, 2))), r"faces: expected the model's 68 landmarks, got \[98\]"),
        (faces_of(points) + faces_of(points[:, :15]), r"got \[15, 68\]"),
        (faces_of(without), "faces: expected some with labels of both outer eye corners"),
        (faces_of(points + 100), "name, its labels: expected a box that meets the image of 60 x 60 pixels"),
    ):
        with pytest.raises(ValueError, match=message):
            evaluate(faces, "lgcn-nano")
    assert len(evaluate(faces_of(without), "lgcn-nano", "face-size")["fit"].by_face()) == 2


def test_a_face_with_labels_beside_its_picture_has_a_place_on_the_sheet(random, tmp_path):
    points = random.uniform(10, 50, (2, 68, 2))
    points[1] -= 100
    draw_sheet(Evaluation(faces_of(points), points, points, "inter-ocular"), tmp_path / "sheet.png")
    assert read_image(tmp_path / "sheet.png").size > 0


def test_faces_of_one_name_are_all_reported():
    evaluation = Evaluation(faces_of(np.zeros((3, 68, 2))), shapes(3) + 5, shapes(3), "inter-ocular")
    assert list(evaluation.by_face()) == ["name", "name (2)", "name (3)"]
    evaluation.labelled[1, 36] = np.nan  # an eye corner
    assert [error is None for error in evaluation.by_face().values()] == [False, True, False]


def test_a_sheet_goes_from_the_best_to_the_worst(random, tmp_path, monkeypatch):
    captions, labelled = [], np.stack([random.uniform(10, 50, (68, 2))] * 5)
    predicted = labelled + np.array([3, 1, 2, 5, 4])[:, None, None]
    labelled[4, 36] = np.nan  # which cannot be measured
    sheet = figures.contact_sheet
    monkeypatch.setattr(figures, "contact_sheet", lambda *parts: captions.extend(parts[1]) or sheet(*parts))
    evaluation = Evaluation(faces_of(labelled), predicted, labelled, "inter-ocular")
    draw_sheet(evaluation, tmp_path / "sheet.png")
    assert captions == [f"{100 * error:.2f} %" for error in evaluation.errors()[[1, 2, 0, 3]]]


def test_the_size_of_a_face_is_the_mean_of_width_and_height():
    labelled = shapes(1) * (1, 0.4)  # 50 wide and 20 high
    np.testing.assert_allclose(landmark_errors(labelled + np.array([3, 4]), labelled, "face-size"), [5 / 35])


def test_a_baseline_is_normalised_alike():
    evaluation = Evaluation([], shapes(), shapes(), "face-size")
    assert with_mean_shape(evaluation, np.zeros((68, 2))).normalisation == "face-size"
