"""The network of section 3.2, as plain PyTorch."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .config import LGCNConfig
from .operators import gaussian_sum


class Heatmaps(NamedTuple):
    """What the network computes: both are (B, N, H / stride, W / stride), rounded up."""

    local: Tensor
    """K * O^l, the blurred output of the local-context subnet. Part of the loss, not needed for inference."""
    output: Tensor
    """Omega = K * O^l + O^g (Eq. 2)."""


class ScaledBatchNorm2d(nn.BatchNorm2d):
    """Batch normalisation times a constant: ReLU(s x) = s ReLU(x), and here no pass over the activations is needed."""

    def __init__(self, channels: int, scale: float) -> None:
        super().__init__(channels)
        self.scale = scale

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = self.weight * self.scale, self.bias * self.scale
        mean, variance = self.running_mean, self.running_var
        return F.batch_norm(x, mean, variance, weight, bias, self.training, self.momentum, self.eps)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, scale={self.scale}"


class KernelConvolution(nn.Module):
    """Every channel convolved with K (Eq. 1), times a constant; no parameters."""

    def __init__(self, config: LGCNConfig) -> None:
        super().__init__()
        self.kernel_size = config.kernel_size
        self.sigmas = config.sigmas
        self.scale = config.blur_scale
        self.operator = gaussian_sum
        """`gaussian_sum`, or what training puts in its place: `gaussian_sum_banded` or `gaussian_sum_native`."""

    def forward(self, x: Tensor) -> Tensor:
        return self.operator(x, self.kernel_size, self.sigmas) * self.scale

    def extra_repr(self) -> str:
        return f"kernel_size={self.kernel_size}, sigmas={self.sigmas}, operator={self.operator.__name__}"


class ConvBlock(nn.Sequential):
    """Zero-padded convolution with bias, scaled batch normalisation, ReLU, dropout."""

    def __init__(
        self, in_channels: int, out_channels: int, kernel: int, dilation: int, scale: float, dropout: float
    ) -> None:
        super().__init__(
            nn.Conv2d(in_channels, out_channels, kernel, padding=dilation * (kernel // 2), dilation=dilation),
            ScaledBatchNorm2d(out_channels, scale),
            nn.ReLU(),
            nn.Dropout(dropout),
        )
        self.activation = activated
        """What follows the convolution in training: `activated`, or what training puts in its place: it, compiled."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return super().forward(x)
        # The norm takes the bias away again, so that it has no gradient: a quarter of a GPU's time saved.
        convolution, norm, _, dropout = self
        x = F.conv2d(x, convolution.weight, None, 1, convolution.padding, convolution.dilation)
        # Its running mean is that with the bias, added before the norm's own step: behind it autograd keeps the mean.
        norm.running_mean.add_(convolution.bias.detach(), alpha=norm.momentum / (1 - norm.momentum))
        return self.activation(x, norm, dropout.p)


def activated(x: Tensor, norm: ScaledBatchNorm2d, dropout: float) -> Tensor:
    """What follows the convolution of a `ConvBlock` in training, as one function for `torch.compile`."""
    return F.dropout(F.relu(norm(x)), dropout)


class LGCN(nn.Module):
    """Local-global context network (section 3.2): image in, one heatmap a landmark out.

    >>> model = LGCN(LGCNConfig(filters=16)).eval()
    >>> model(torch.zeros(1, 1, 96, 96)).output.shape
    torch.Size([1, 68, 96, 96])
    """

    def __init__(self, config: LGCNConfig = LGCNConfig()) -> None:  # noqa: B008 (frozen)
        super().__init__()
        self.config = config
        filters, subpixels = config.filters, (config.shuffle // config.stride) ** 2
        channels = [config.in_channels * config.shuffle**2] + [filters] * len(config.local_kernels)
        block = partial(ConvBlock, scale=config.activation_scale, dropout=config.dropout)
        self.local_subnet = nn.Sequential(
            *(block(channels[i], filters, kernel, 1) for i, kernel in enumerate(config.local_kernels))
        )
        self.main = nn.Conv2d(filters, config.num_landmarks * subpixels, 1)
        self.side = None
        if config.side_channels:
            self.side = ConvBlock(filters, config.side_channels * subpixels, 1, 1, config.activation_scale, 0.0)
        self.kernel_convolution = KernelConvolution(config)
        channels = [config.num_landmarks + config.side_channels] + [filters] * config.global_layers
        self.global_subnet = nn.Sequential(
            *(block(channels[i], filters, 3, config.dilation) for i in range(config.global_layers))
        )
        self.refine = nn.Conv2d(filters, config.num_landmarks * subpixels, 1)
        # Almost all of a heatmap is 0: from there the first steps are not spent on unlearning noise.
        for head in (self.main, self.refine):
            nn.init.zeros_(head.weight)
            nn.init.zeros_(head.bias)

    def forward(self, images: Tensor) -> Heatmaps:
        """Heatmaps of a batch of images of any size.

        Args:
            images: (B, in_channels, H, W) pixel values 0..255, any real dtype.

        Returns:
            `Heatmaps` of shape (B, N, H, W), with a stride (B, N, H / stride, W / stride), rounded up.

        Raises:
            ValueError: another shape.
        """
        check_images(images, self.config.in_channels)
        step = self.config.shuffle
        height, width = self.config.heatmap_size(*images.shape[2:])
        x = (images.to(self.main.weight.dtype) / 128 - 1) * 0.1
        if step > 1:
            x = F.pixel_unshuffle(pad_to_grid(x, step), step)
        features = self.local_subnet(x)
        maps, step = self.main(features), step // self.config.stride
        if self.side is not None:
            maps = torch.cat([maps, self.side(features)], dim=1)
        # Cropped before the blur: beyond the image there is nothing (zero padding), whatever the grid.
        blurred = self.kernel_convolution(shuffled(maps, step)[..., :height, :width])
        local = blurred[:, : self.config.num_landmarks]
        refined = shuffled(self.refine(self.global_subnet(pooled(blurred, step))), step)[..., :height, :width]
        return Heatmaps(local, local + refined)


@torch.no_grad()
def widened(model: LGCN, filters: int) -> LGCN:
    """A network with more filters that computes the same as a trained one, and has room to learn more.

    The added filters are random and nothing listens to them: what leads from them to the old ones is zero. Its gradient
    is not, so that they are of use after a step.

    Args:
        filters: at least as many as `model` has.

    Raises:
        ValueError: fewer.
    """
    if filters < model.config.filters:
        raise ValueError(f"filters: expected at least {model.config.filters}, got {filters}")
    wide = LGCN(replace(model.config, filters=filters))
    trained = model.state_dict()
    for name, tensor in wide.state_dict().items():
        kept = tuple(map(slice, trained[name].shape))
        if tensor.ndim > 1:
            tensor[kept[0]] = 0
        tensor[kept] = trained[name]
    return wide.train(model.training)


def retargeted(model: LGCN, config: LGCNConfig) -> LGCN:
    """A network for other landmarks that starts with what a trained one has learned to see.

    Its hidden layers are those of the trained one, but for the first of the global subnet, which sees the heatmaps:
    that one and the heads are those of an untrained network.

    Args:
        config: that of `model`, but for what depends on the landmarks.
    """
    other = LGCN(config)
    fresh, trained = other.state_dict(), model.state_dict()
    fitting = {name: tensor for name, tensor in trained.items() if tensor.shape == fresh[name].shape}
    other.load_state_dict(fresh | fitting)
    return other.train(model.training)


def check_images(images: Tensor, channels: int) -> None:
    """Raise ValueError where a batch is not what a network takes."""
    if images.ndim != 4 or images.shape[1] != channels or 0 in images.shape:
        raise ValueError(f"images: expected (B, {channels}, H, W) without empty sides, got {tuple(images.shape)}")
    if images.is_complex() or images.layout != torch.strided:
        raise ValueError(f"images: expected real numbers in a dense tensor, got {images.dtype}, {images.layout}")


def shuffled(x: Tensor, step: int) -> Tensor:
    """`pixel_shuffle`, which copies where there is nothing to shuffle."""
    return F.pixel_shuffle(x, step) if step > 1 else x


def pooled(blurred: Tensor, step: int) -> Tensor:
    """Means of step x step pixels, which lose little: K is a low-pass. Beyond the border its values go on."""
    return F.avg_pool2d(pad_to_grid(blurred, step), step) if step > 1 else blurred


def pad_to_grid(x: Tensor, step: int) -> Tensor:
    """Pad right and bottom with the border's values to multiples of `step`."""
    height, width = x.shape[2:]
    if height % step or width % step:
        x = F.pad(x, (0, -width % step, 0, -height % step), mode="replicate")
    return x


def checked_device(name: str) -> torch.device:
    """A torch device that is there; for "auto", "cuda" where there is one and "cpu" elsewhere.

    Raises:
        ValueError: an unknown name, or CUDA where torch finds no GPU.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"device: expected 'cpu', 'cuda' or 'auto', got {name!r}") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        build = "this PyTorch is built without CUDA" if torch.version.cuda is None else "torch finds no NVIDIA GPU"
        raise ValueError(f"device: expected one that is there, got {name!r}, but {build}")
    if device.type == "cuda" and device.index is not None and device.index >= torch.cuda.device_count():
        raise ValueError(f"device: expected one of {torch.cuda.device_count()} GPUs, counted from 0, got {name!r}")
    return device


@contextmanager
def cudnn_benchmark() -> Iterator[None]:
    """Let cuDNN try its algorithms for each new shape and keep the fastest."""
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = True
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before
