"""The fast path as a transformation of the trained network: everything that can be computed once, in its filters.

ReLU(s x) = s ReLU(x) for s > 0, so the factor behind every ReLU moves into the filters of the next layer; the factor
behind the kernel convolution moves into the heads in front of it; batch normalisation becomes part of the filters. The
same way each channel is brought to a size of about 1, by a power of two, which costs no precision: so the few exponents
of eight-bit numbers suffice for all channels.
"""

from copy import deepcopy
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
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
    with torch.device("cpu"):  # whatever the default is
        model = deepcopy(model).eval().cpu().float()
        scale = model.config.activation_scale
        local, local_scale = _folded_blocks(model.local_subnet, 0.1 / 128, scale)
        context, context_scale = _folded_blocks(model.global_subnet, 1.0, scale)
        heads, refine = _merged_heads(model, local_scale), _filters(model.refine, context_scale)
    return FoldedNetwork(model.config, local, heads, context, refine)


def _folded_blocks(subnet: nn.Sequential, first_scale: float, scale: float) -> tuple[list[Layer], Tensor]:
    """The layers of a subnet, and the factors (C,) of the channels that come out of them."""
    layers, scale_in = [], torch.tensor(first_scale, dtype=torch.float32)
    for convolution, norm, *_ in subnet:
        size = _typical_size(norm)
        layers.append(_filters(fuse_conv_bn_eval(convolution, norm), scale_in, 1 / size))
        scale_in = scale * size
    return layers, scale_in


def _typical_size(norm: nn.BatchNorm2d) -> Tensor:
    """Root mean square of each channel (C,) behind norm and ReLU, rounded to a power of two.

    Before the ReLU a channel has mean b and deviation w, those of the norm; it is taken to be normal. One that is
    hardly ever above 0 counts as if its size were w / 16: when it is, it is not small.
    """
    b, w = norm.bias.double(), norm.weight.double().abs().clamp(min=1e-30)
    normal = torch.distributions.Normal(0.0, 1.0)
    square = (b**2 + w**2) * normal.cdf(b / w) + b * w * normal.log_prob(b / w).exp()
    return torch.maximum(square, (w / 16) ** 2).clamp(min=1e-12).log2().div(2).round().exp2().float()


def _filters(convolution: nn.Conv2d, scale_in: Tensor, scale_out: Tensor | float = 1.0) -> Layer:
    """Filters and biases, times the factors of what comes in and of what goes out, a number or one a channel."""
    scale_out = torch.as_tensor(scale_out, dtype=torch.float32)
    weight = convolution.weight * (scale_in.view(1, -1, 1, 1) * scale_out.view(-1, 1, 1, 1))
    return weight.numpy(), (convolution.bias * scale_out).numpy()


def _merged_heads(model: LGCN, scale: Tensor) -> Layer:
    config = model.config
    parts = [_filters(model.main, scale, config.blur_scale)]
    if model.side is not None:
        side = fuse_conv_bn_eval(model.side[0], model.side[1])
        parts.append(_filters(side, scale, config.blur_scale * config.activation_scale))
    weights, biases = zip(*parts, strict=True)
    return np.concatenate(weights), np.concatenate(biases)
