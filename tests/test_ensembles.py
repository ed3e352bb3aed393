import numpy as np
import pytest
import torch

from lgcn_fast import LGCN, LGCNConfig, predict
from lgcn_fast.datasets import is_validation, read_300w
from lgcn_fast.ensembles import merged, views
from lgcn_fast.evaluation import landmark_errors
from lgcn_fast.images import crop, face_box, from_crop, read_image, to_crop
from lgcn_fast.landmarks import SCHEMES

FACE = [82, 70, 124, 124]


@pytest.fixture
def image(demo_picture):
    return read_image(demo_picture, color=True)


@pytest.mark.parametrize("count", [1, 2, 5, 20])
@pytest.mark.parametrize("habit", [0, 2])
def test_views_are_read_back_to_where_they_came_from(count, habit, random):
    """Perfect answers in all views make the true points again, whatever the flips and boxes.

    So do answers that are right but for a habit in mirror images, as networks have it.
    """
    images = [np.zeros((300, 400), np.uint8), np.zeros((200, 250), np.uint8)]
    boxes = np.array([[50, 60, 230, 230], [10, 5, 290, 290]])
    truth = random.uniform(0, 200, (2, 68, 2))
    certain = random.uniform(0, 1, (2, 68))
    squares, mirrored = views(images, boxes, count, 68)
    assert squares.shape == (2 * count, 4)
    assert len(np.unique(np.c_[squares, mirrored], axis=0)) == 2 * count
    np.testing.assert_array_equal(squares[:2], boxes)
    assert mirrored.tolist() == [view % 2 == 1 for view in range(count) for _ in range(2)]
    landmarks = list(SCHEMES[68].mirror)
    answers = to_crop(np.concatenate([truth] * count), squares, 96)
    scores = np.concatenate([certain] * count)
    for view in np.flatnonzero(mirrored):
        answers[view] = (answers[view] * (-1, 1) + (95 + habit, 0))[landmarks]
        scores[view] = scores[view][landmarks]
    points, scores = merged(from_crop(answers, squares, 96), scores, squares, mirrored, 2)
    np.testing.assert_allclose(points, truth, atol=1e-9)
    np.testing.assert_allclose(scores, certain, atol=1e-12)


def test_boxes_move_a_little_and_stay_in_the_image():
    boxes = np.array([[100, 100, 200, 200], [499, 0, 50, 50]])
    squares, _ = views([np.zeros((500, 500), np.uint8)] * 2, boxes, 50, 68)
    squares = squares.reshape(50, 2, 4)
    sides = squares[:, 0, 2] / 200
    shifts = (squares[:, 0, :2] + squares[:, 0, 2:] / 2 - 200) / 200
    assert 0.94 <= sides.min() < 0.95 < 1.05 < sides.max() <= 1.06
    assert np.abs(shifts).max() < 0.025
    assert np.abs(shifts.mean(axis=0)).max() < 0.005
    assert (squares[:, 1, 0] < 500).all()


def test_landmarks_of_an_unknown_scheme_are_not_mirrored(image):
    assert not views([image], np.array([FACE]), 10, 5)[1].any()
    network = LGCN(LGCNConfig.nano(filters=8, num_landmarks=5))
    assert predict(image, [FACE], network, fit=False, ensemble=3).points.shape == (1, 5, 2)


def test_one_view_is_the_plain_prediction(image):
    plain, one, ten = predict(image, [FACE]), predict(image, [FACE], ensemble=1), predict(image, [FACE], ensemble=10)
    np.testing.assert_array_equal(one.points, plain.points)
    np.testing.assert_array_equal(one.scores, plain.scores)
    assert ten.points.dtype == ten.scores.dtype == np.float32
    assert 0 < np.abs(ten.points - plain.points).max() < 3
    np.testing.assert_array_equal(predict(image, [FACE], ensemble=10).points, ten.points)


def test_faces_of_a_batch_are_not_mixed_up(image):
    """More views than go through the network at once, images of several sizes."""
    images = [image, image[20:, 30:], crop(image, np.array(FACE), 96)]
    boxes = [FACE, [52, 50, 124, 124], [0, 0, 96, 96]]
    together = predict(images, boxes, ensemble=11)
    for index in range(3):
        alone = predict(images[index], [boxes[index]], ensemble=11)
        np.testing.assert_allclose(alone.points[0], together.points[index], atol=1e-3)
        np.testing.assert_allclose(alone.scores[0], together.scores[index], atol=1e-4)


@pytest.mark.parametrize("fit", [True, False])
def test_ensembles_may_stay_on_the_device(image, fit):
    expected = predict(image, [FACE], fit=fit, ensemble=4)
    there = predict(image, [FACE], fit=fit, ensemble=4, to_host=False)
    assert there.points.dtype == there.scores.dtype == torch.float32
    np.testing.assert_allclose(there.points.cpu().numpy(), expected.points, atol=1e-3)
    np.testing.assert_allclose(there.scores.cpu().numpy(), expected.scores, atol=1e-3)


@pytest.mark.parametrize("count", [0, -1])
def test_too_small_ensembles_are_named(image, count):
    with pytest.raises(ValueError, match=f"ensemble: expected 1 or more, got {count}"):
        predict(image, [FACE], ensemble=count)


@pytest.mark.data
@pytest.mark.slow
@pytest.mark.parametrize(("fit", "gain"), [(True, 0.02), (False, 0.03)])
def test_ten_views_have_less_error_than_one(data, fit, gain):
    """On the validation faces that the views were chosen on; measured: 2.4 and 3.4 % less."""
    faces = [face for name in ("afw", "helen", "lfpw/trainset") for face in read_300w(data / "300w" / name)]
    faces = [face for face in faces if is_validation(face.group)]
    images, boxes = [face.image() for face in faces], [face_box(face.points) for face in faces]
    labels = np.stack([face.points for face in faces])
    one, ten = (
        landmark_errors(predict(images, boxes, "lgcn-nano", fit, ensemble=count).points, labels).mean()
        for count in (1, 10)
    )
    assert ten < (1 - gain) * one
