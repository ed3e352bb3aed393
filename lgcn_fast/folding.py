"""The fast path as a transformation of the trained network: everything that can be computed once, in its filters.

ReLU(s x) = s ReLU(x) for s > 0, so the factor behind every ReLU moves into the filters of the next layer; the factor
behind the kernel convolution moves into the heads in front of it; batch normalisation becomes part of the filters.
"""

from copy import deepcopy
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from .config import LGCNConfig
from .model import LGCN

Layer = tuple[np.ndarray, np.ndarray]
"""Filters (F, C, k, k) and biases (F,), float32."""
ORIGIN = 128
"""The pixel value that counts as 0, in padding too: the input is (v / 128 - 1) * 0.1 = (v - 128) * 0.1 / 128."""


@dataclass(frozen=True)
class FoldedNetwork:
    """`LGCN.forward` in eval mode, of pixel values minus `ORIGIN`, with nothing left but convolutions, ReLU and K."""

    config: LGCNConfig
    local: list[Layer]
    """Each with a ReLU behind it."""
    heads: Layer
    """Main and side as one 1 x 1 convolution; the side half lacks its ReLU."""
    context: list[Layer]
    """Each with a ReLU behind it."""
    refine: Layer


@torch.inference_mode()
def fold(model: LGCN) -> FoldedNetwork:
    """Fold a trained network, which is not changed."""
    model = deepcopy(model).eval().cpu()
    scale = model.config.activation_scale
    return FoldedNetwork(
        model.config,
        _folded_blocks(model.local_subnet, 0.1 / 128, scale),
        _merged_heads(model),
        _folded_blocks(model.global_subnet, 1.0, scale),
        _filters(model.refine, scale),
    )


def _folded_blocks(subnet: nn.Sequential, first_scale: float, scale: float) -> list[Layer]:
    folded = [fuse_conv_bn_eval(block[0], block[1]) for block in subnet]
    return [_filters(layer, scale if index else first_scale) for index, layer in enumerate(folded)]


def _filters(convolution: nn.Conv2d, scale_in: float, scale_out: float = 1.0) -> Layer:
    """Filters and biases, times the factors of what comes in and of what goes out."""
    return (convolution.weight * (scale_in * scale_out)).numpy(), (convolution.bias * scale_out).numpy()


def _merged_heads(model: LGCN) -> Layer:
    config = model.config
    parts = [_filters(model.main, config.activation_scale, config.blur_scale)]
    if model.side is not None:
        side = fuse_conv_bn_eval(model.side[0], model.side[1])
        parts.append(_filters(side, config.activation_scale, config.blur_scale * config.activation_scale))
    weights, biases = zip(*parts, strict=True)
    return np.concatenate(weights), np.concatenate(biases)
