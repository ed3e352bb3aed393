import math

import pytest
import torch

from lgcn_fast import Heatmaps, LGCNConfig
from lgcn_fast.heatmaps import blurred_ground_truth
from lgcn_fast.losses import cross_entropy, distillation_loss, lgcn_loss, probabilities, squared_error

NAN = float("nan")


def test_squared_error_by_hand():
    prediction = torch.tensor([[[[1.0, 2.0]], [[0.0, 3.0]]]])
    target = torch.tensor([[[[0.0, 0.0]], [[1.0, 1.0]]]])
    # landmark sums of squares 1 + 4 and 1 + 4
    assert squared_error(prediction, target, torch.tensor([[1.6, 0.1]])).item() == pytest.approx(0.05 * 5 * 1.7)


def test_loss_of_equation_4_by_hand():
    config = LGCNConfig(num_landmarks=2, kernel_size=1)
    points = torch.tensor([[[[0.0, 0.0], [NAN, NAN]]]])
    local = torch.tensor([[[[0.5, 0.0]], [[9.0, 9.0]]]])
    output = torch.tensor([[[[1.0, 0.25]], [[9.0, 9.0]]]])
    # K is 1 at its centre. w = 1 + 0.1 + 0.5 / 2 for the first landmark, 0 for the second, which has no label.
    expected = 0.05 * 1.35 * (0.5**2 + 0.25**2)
    assert lgcn_loss(Heatmaps(local, output), points, config).item() == pytest.approx(expected)


def test_loss_of_perfect_heatmaps_is_zero(random):
    config = LGCNConfig(num_landmarks=3)
    points = torch.from_numpy(random.uniform(0, 40, (2, 2, 3, 2))).float()
    target = blurred_ground_truth(points, 41, 43)
    assert lgcn_loss(Heatmaps(target, target), points, config) == 0


def test_distillation_loss_by_hand():
    # The teacher sees the first landmark and not the second, so V = (1, 0) and w = (1 + 0.1 + 0.25, 0.1 + 0.25).
    taught = torch.tensor([[[[0.1, 0.0]], [[0.09, 0.0]]]])
    local = torch.tensor([[[[0.3, 0.0]], [[0.09, 0.0]]]])
    output = torch.tensor([[[[0.1, 0.4]], [[0.09, 1.0]]]])
    expected = 0.05 * (1.35 * (0.2**2 + 0.4**2) + 0.35 * 1)
    assert distillation_loss(Heatmaps(local, output), taught).item() == pytest.approx(expected)


def test_distillation_from_the_labels_heatmaps_is_the_loss_on_labels(random):
    config = LGCNConfig(num_landmarks=3)
    points = torch.from_numpy(random.uniform(5, 30, (2, 1, 3, 2))).float()
    heatmaps = Heatmaps(*torch.from_numpy(random.normal(size=(2, 2, 3, 41, 43))).float())
    expected = lgcn_loss(heatmaps, points, config)
    torch.testing.assert_close(distillation_loss(heatmaps, blurred_ground_truth(points, 41, 43)), expected)


def test_gradient_is_that_of_the_formula(random):
    prediction = torch.from_numpy(random.normal(size=(2, 3, 4, 5))).float().requires_grad_()
    target = torch.from_numpy(random.normal(size=(2, 3, 4, 5))).float()
    weights = torch.from_numpy(random.uniform(size=(2, 3))).float()
    squared_error(prediction, target, weights).mean().backward()
    found, prediction.grad = prediction.grad, None
    (0.05 * (weights[..., None, None] * (prediction - target) ** 2).sum((1, 2, 3))).mean().backward()
    torch.testing.assert_close(found, prediction.grad)


def test_cross_entropy_by_hand():
    # One pixel, one landmark: p = e^z / (e^z + 1); target 0.25 landmark, 0.75 background.
    z = 0.7
    logits, target, weights = torch.full((1, 1, 1, 1), z), torch.full((1, 1, 1, 1), 0.25), torch.tensor([[2.0]])
    p = math.exp(z) / (math.exp(z) + 1)
    expected = -0.05 * 2 * (0.25 * math.log(p) + 0.75 * math.log(1 - p))
    assert cross_entropy(logits, target, weights).item() == pytest.approx(expected)


def test_cross_entropy_scales_crowded_targets_to_a_distribution():
    logits, weights = torch.zeros(1, 2, 1, 1), torch.ones(1, 2)
    # Two landmarks of 1 in one pixel become 0.5 each, nothing is left for the background; all p = 1 / 3.
    value = cross_entropy(logits, torch.ones(1, 2, 1, 1), weights)
    assert value.item() == pytest.approx(0.05 * math.log(3))


@pytest.mark.parametrize("loss", ["squared_error", "cross_entropy"])
def test_landmarks_without_label_get_no_gradient(loss, random):
    config = LGCNConfig(num_landmarks=2, loss=loss)
    output = torch.from_numpy(random.normal(size=(1, 2, 8, 8))).float().requires_grad_()
    points = torch.tensor([[[[3.0, 3.0], [NAN, NAN]]]])
    lgcn_loss(Heatmaps(output, output), points, config).backward()
    assert output.grad[0, 0].abs().sum() > 0
    assert output.grad[0, 1].abs().sum() == 0


def test_probabilities_leave_room_for_the_background(random):
    heatmaps = probabilities(torch.from_numpy(random.normal(size=(2, 3, 4, 5))))
    assert (heatmaps > 0).all()
    assert (heatmaps.sum(1) < 1).all()


def test_cross_entropy_leaves_landmarks_without_a_label_out():
    """The second one neither competes nor takes from the background, which weighs as much as the first."""
    target = torch.tensor([[[[0.25]], [[0.5]]]])
    value = cross_entropy(torch.zeros(1, 2, 1, 1), target, torch.tensor([[2.0, 0.0]]))
    assert value.item() == pytest.approx(0.05 * 2 * math.log(2))
