import numpy as np
import pytest
import torch

from lgcn_fast.heatmaps import blurred_ground_truth, ground_truth, loss_weights, to_heatmap
from lgcn_fast.operators import gaussian_sum

NAN = float("nan")


def test_bilinear_weights_by_hand():
    heatmap = ground_truth(torch.tensor([[[[2.25, 1.5]]]]), 4, 5)[0, 0]
    expected = torch.zeros(4, 5)
    expected[1, 2] = expected[2, 2] = 0.75 * 0.5
    expected[1, 3] = expected[2, 3] = 0.25 * 0.5
    torch.testing.assert_close(heatmap, expected)


@pytest.mark.parametrize("point", [(0, 0), (4, 3), (4, 0.5), (0.001, 3), (-0.49, 3.49)])
def test_visible_points_sum_to_one_up_to_the_border(point):
    assert ground_truth(torch.tensor([[[point]]]), 4, 5).sum() == pytest.approx(1)


@pytest.mark.parametrize("point", [(-0.51, 1), (4.51, 1), (1, -0.51), (1, 3.51), (NAN, 1), (NAN, NAN)])
def test_points_outside_or_without_label_leave_nothing(point):
    assert ground_truth(torch.tensor([[[point]]]), 4, 5).sum() == 0


def test_point_in_the_outer_half_of_a_border_pixel_is_in_that_pixel():
    """The first and last row of an image are there, on heatmaps that are coarser too."""
    corners = to_heatmap(torch.tensor([[[[0.0, 0.0]]], [[[9.0, 7.0]]]]), 2)
    heatmaps = ground_truth(corners, 4, 5)[:, 0]
    assert heatmaps[0, 0, 0] == heatmaps[1, 3, 4] == 1
    assert torch.equal(loss_weights(corners, 4, 5), torch.full((2, 1), 1.6))


def test_faces_add_up():
    one, two = [[1.0, 1.0], [NAN, NAN]], [[3.0, 2.0], [2.0, 2.0]]
    both = ground_truth(torch.tensor([[one, two]]), 4, 5)
    torch.testing.assert_close(both, ground_truth(torch.tensor([[one], [two]]), 4, 5).sum(0, keepdim=True))


@pytest.mark.parametrize(("height", "width"), [(96, 96), (1, 1), (17, 50)])
def test_blurred_labels_are_convolved_labels(height, width, random):
    points = torch.from_numpy(random.uniform(-5, 1, (3, 2, 4, 2)) + random.uniform(0, 1, 2) * (width, height)).float()
    points[0, 1, 2] = NAN
    expected = gaussian_sum(ground_truth(points, height, width).double())
    torch.testing.assert_close(blurred_ground_truth(points, height, width).double(), expected, atol=1e-6, rtol=1e-5)


def test_weights_of_equation_3_by_hand():
    inside, outside, unlabelled = [1.0, 1.0], [-5.0, 1.0], [NAN, NAN]
    points = torch.tensor([[[inside, inside, outside, unlabelled]]])
    # mean V = 2 / 4: V + L / 10 + L / 2 * 0.5
    torch.testing.assert_close(loss_weights(points, 4, 5), torch.tensor([[1.35, 1.35, 0.35, 0.0]]))


def test_weights_of_several_faces():
    inside, outside, unlabelled = [1.0, 1.0], [-5.0, 1.0], [NAN, NAN]
    faces = [[inside, outside, inside], [outside, outside, unlabelled], [unlabelled] * 3]
    # Landmark 0 is visible in one face; 2 lacks a label in the second face; the third face is padding. mean V = 1 / 3.
    expected = torch.tensor([[1 + 0.1 + 1 / 6, 0.1 + 1 / 6, 0.0]])
    torch.testing.assert_close(loss_weights(torch.tensor([faces]), 4, 5), expected)


def test_background_weighs_a_tenth():
    torch.testing.assert_close(loss_weights(torch.full((2, 1, 3, 2), NAN), 4, 5), torch.full((2, 3), 0.1))


def test_maximum_of_blurred_label_is_at_the_point():
    heatmap = blurred_ground_truth(torch.tensor([[[[30.0, 61.0]]]]), 96, 96)[0, 0].numpy()
    assert np.unravel_index(heatmap.argmax(), heatmap.shape) == (61, 30)
    assert heatmap.max() == pytest.approx(1)


def test_points_on_coarser_heatmaps():
    """A pixel of stride 2 covers the pixels 0 and 1: its centre lies between theirs."""
    points = torch.tensor([[0.0, 1.0], [0.5, 10.5]])
    torch.testing.assert_close(to_heatmap(points, 2), torch.tensor([[-0.25, 0.25], [0.0, 5.0]]))
    assert torch.equal(to_heatmap(points, 1), points)
