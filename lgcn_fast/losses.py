"""The loss of section 3.2.4: weighted square error against blurred labels (Eq. 4), or cross entropy."""

import torch
import torch.nn.functional as F
from torch import Tensor

from .config import LGCNConfig
from .heatmaps import blurred_ground_truth, loss_weights, to_heatmap, visibility_weights
from .model import Heatmaps

SEEN = 0.1
"""Least maximum of the heatmap of a landmark that a network sees; the maximum of the labels' is 1."""


def lgcn_loss(heatmaps: Heatmaps, points: Tensor, config: LGCNConfig) -> Tensor:
    """Loss of a batch: local and final heatmaps against the labels, both weighted by Eq. 3.

    Eq. 4 with the authors' published weighting: `(K * O^l - K * G)^2 + (Omega - K * G)^2`, weighted, summed over pixels
    and landmarks, times 0.05; or, with `config.loss == "cross_entropy"`, the cross entropy of both.

    Args:
        heatmaps: the network's output, (B, N, H, W) each.
        points: (B, faces, N, 2) float32, pixels of the image; NaN without a label.

    Returns:
        () float32, the mean over the batch.
    """
    height, width = heatmaps.output.shape[2:]
    points = to_heatmap(points, config.stride)
    target = blurred_ground_truth(points, height, width, config.kernel_size, config.sigmas)
    weights = loss_weights(points, height, width)
    distance = squared_error if config.loss == "squared_error" else cross_entropy
    return (distance(heatmaps.local, target, weights) + distance(heatmaps.output, target, weights)).mean()


def distillation_loss(heatmaps: Heatmaps, taught: Tensor) -> Tensor:
    """Loss of a batch against the heatmaps of another network in place of labels: Eq. 4 with them for K * G.

    V of Eq. 3, whether a landmark is visible, is whether the other network sees it.

    Args:
        heatmaps: the network's output, (B, N, H, W) each.
        taught: (B, N, H, W), the other network's.

    Returns:
        () float32, the mean over the batch.
    """
    visible = (taught.amax((2, 3)) >= SEEN).float()
    weights = visibility_weights(visible)
    return (squared_error(heatmaps.local, taught, weights) + squared_error(heatmaps.output, taught, weights)).mean()


def squared_error(prediction: Tensor, target: Tensor, weights: Tensor) -> Tensor:
    """One term of Eq. 4: `0.05 * sum_n w_n sum_pixels (prediction - target)^2`.

    Args:
        prediction: (B, N, H, W).
        target: (B, N, H, W).
        weights: (B, N).

    Returns:
        (B,) float32.
    """
    return 0.05 * (_SumOfSquares.apply(prediction, target) * weights).sum(1)


def cross_entropy(logits: Tensor, target: Tensor, weights: Tensor) -> Tensor:
    """Pixel-wise cross entropy with a background channel (section 3.2.4).

    The background's logit is 0 (a softmax only sees differences). Targets that add up to more than 1 in a pixel are
    scaled to a distribution; what they lack to 1 is background. Landmarks with weight 0 (no label) do not compete.

    Args:
        logits: (B, N, H, W).
        target: (B, N, H, W), >= 0.
        weights: (B, N); the background weighs as much as the mean labelled landmark.

    Returns:
        (B,) float32.
    """
    labelled = weights > 0
    logits = logits.float().masked_fill(~labelled[..., None, None], -torch.inf)
    log_probabilities = F.log_softmax(F.pad(logits, (0, 0, 0, 0, 0, 1)), dim=1)
    target = target * labelled[..., None, None]
    total = target.sum(1, keepdim=True)
    target = torch.cat([target / total.clamp(min=1), (1 - total).clamp(min=0)], dim=1)
    background = weights.sum(1, keepdim=True) / labelled.sum(1, keepdim=True).clamp(min=1)
    weights = torch.cat([weights, background], dim=1)[..., None, None]
    terms = torch.where(target > 0, target * log_probabilities, 0.0) * weights
    return -0.05 * terms.sum((1, 2, 3))


def probabilities(logits: Tensor) -> Tensor:
    """Heatmaps of a network trained with cross entropy: softmax over landmarks and the background channel.

    Args:
        logits: (B, N, H, W).

    Returns:
        (B, N, H, W) in 0..1.
    """
    return F.softmax(F.pad(logits, (0, 0, 0, 0, 0, 1)), dim=1)[:, :-1]


def readable(output: Tensor, config: LGCNConfig) -> Tensor:
    """The heatmaps that landmarks are read off, (B, N, H, W) float32, from the output of a network."""
    return output.float() if config.loss == "squared_error" else probabilities(output.float())


class _SumOfSquares(torch.autograd.Function):
    """`(prediction - target).square().sum((2, 3))` in fp32, with half of autograd's passes over the heatmaps."""

    @staticmethod
    def forward(ctx, prediction: Tensor, target: Tensor) -> Tensor:
        difference = prediction.float() - target
        ctx.save_for_backward(difference)
        ctx.dtype = prediction.dtype
        return torch.linalg.vector_norm(difference, dim=(2, 3)) ** 2

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:
        (difference,) = ctx.saved_tensors
        return (difference * (2 * gradient[..., None, None])).to(ctx.dtype), None
