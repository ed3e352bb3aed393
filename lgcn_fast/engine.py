"""A trained network made fast for inference: a transformation of the model, not a second model."""

from collections.abc import Callable
from copy import deepcopy

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

import lgcn_fast_kernels

from .fitting import Fit, NativeFitter
from .losses import probabilities
from .model import LGCN, check_images, checked_device
from .operators import gaussian_sum_banded

INSTRUCTIONS = {
    ("bf16" if name.endswith("bf16") else "fp32"): name for name in reversed(lgcn_fast_kernels.INSTRUCTION_SETS)
}
"""The best instruction set of this processor for each precision that it has."""


class Engine:
    """Heatmaps from images, built once from a trained network and used many times, from several threads at once.

    On a CPU ("cpu"): batch normalisation and all constant factors folded into the filters, main and side head merged,
    everything in native code, see `lgcn_fast_kernels.Network`. Elsewhere ("eager"): the model as it is, its kernel
    convolution as matrix products.

    >>> engine = Engine(lgcn_fast.load_model("weights.safetensors"))
    >>> engine.heatmaps(images)  # (B, 1, 96, 96) uint8 -> (B, 68, 96, 96) float32
    """

    def __init__(self, model: LGCN, device: str = "auto", precision: str = "auto", num_threads: int = 0) -> None:
        """Build an engine; the model is not changed.

        Args:
            device: "cpu", "cuda" or another torch device; "auto": "cuda" where there is one.
            precision: of filters and activations on a CPU: "fp32", "bf16", or "auto": bf16 where the processor has
                instructions for it. Sums and heatmaps are fp32 in any case.
            num_threads: on a CPU; 0: as many as PyTorch uses (`torch.get_num_threads()`).

        Raises:
            ValueError: a device that is not there, a negative number of threads, an unknown precision, or one that
                backend or processor do not have.
        """
        self.config = model.config
        self.device = checked_device(device)
        self.backend = "cpu" if self.device.type == "cpu" else "eager"
        self.precision = _checked_precision(precision, self.device)
        if num_threads < 0:
            raise ValueError(f"num_threads: expected 0 or more, got {num_threads}")
        self._num_threads = num_threads
        model = deepcopy(model).eval()
        self._network: Callable[[Tensor], Tensor]
        self._native: lgcn_fast_kernels.Network | None = None
        with torch.inference_mode():
            if self.backend == "cpu":
                native = native_network(model.cpu(), INSTRUCTIONS[self.precision])
                self._network = lambda images: torch.from_numpy(native.heatmaps(_pixels(images), self.num_threads))
                if self.config.loss == "squared_error":
                    self._native = native
            else:
                model.kernel_convolution.operator = gaussian_sum_banded
                model.to(self.device, memory_format=torch.channels_last)
                self._network = lambda images: model(images).output

    @property
    def num_threads(self) -> int:
        """Threads that a call uses on a CPU."""
        return self._num_threads or torch.get_num_threads()

    def __repr__(self) -> str:
        network = f"{self.config.filters} filters, {self.config.num_landmarks} landmarks"
        return f"Engine({network}, backend={self.backend!r}, precision={self.precision!r})"

    @torch.inference_mode()
    def heatmaps(self, images: Tensor) -> Tensor:
        """Heatmaps of a batch of images, as `LGCN.forward(images).output`; probabilities for cross-entropy networks.

        Args:
            images: (B, in_channels, H, W) pixel values 0..255, any dtype.

        Returns:
            (B, N, H, W) float32, contiguous, on the engine's device; H and W of `config.heatmap_size`.

        Raises:
            ValueError: another shape.
        """
        check_images(images, self.config.in_channels)
        heatmaps = self._network(images.to(self.device))
        if self.config.loss == "cross_entropy":
            heatmaps = probabilities(heatmaps)
        return heatmaps.float().contiguous()

    def fit(self, images: Tensor, fitter: NativeFitter) -> Fit:
        """Fit a shape model to the heatmaps of images: `fitter(self.heatmaps(images), self.config.stride)`.

        On a CPU the heatmaps of a face are fitted while they are in the cache.

        Args:
            images: as for `heatmaps`.

        Raises:
            ValueError: another shape, or a fitter for another number of landmarks.
        """
        if fitter.num_landmarks != self.config.num_landmarks:
            expected, got = self.config.num_landmarks, fitter.num_landmarks
            raise ValueError(f"shape: expected a shape model of {expected} landmarks, got one of {got}")
        if self._native is None:
            return fitter(self.heatmaps(images).cpu().numpy(), self.config.stride, self.num_threads)
        check_images(images, self.config.in_channels)
        return Fit(*self._native.fit(_pixels(images.cpu()), fitter.native, self.num_threads))


def _checked_precision(precision: str, device: torch.device) -> str:
    if precision not in ("auto", "fp32", "bf16"):
        raise ValueError(f"precision: expected 'auto', 'fp32' or 'bf16', got {precision!r}")
    if device.type != "cpu":
        if precision == "bf16":
            raise ValueError(f"precision: expected 'fp32' or 'auto' on {device.type}, got 'bf16'")
        return "fp32"
    if precision == "bf16" and "bf16" not in INSTRUCTIONS:
        raise ValueError(
            "precision: expected 'fp32' or 'auto', got 'bf16', for which this processor has no instructions"
        )
    return precision if precision != "auto" else "bf16" if "bf16" in INSTRUCTIONS else "fp32"


def _pixels(images: Tensor) -> np.ndarray:
    """(B, C, H, W) uint8 or float32, contiguous."""
    images = images if images.dtype == torch.uint8 else images.float()
    return images.contiguous().numpy()


def native_network(model: LGCN, instructions: str) -> lgcn_fast_kernels.Network:
    """`LGCN.forward` in eval mode as native code, with everything that can be computed once in its filters.

    ReLU(s x) = s ReLU(x) for s > 0, so the factor behind every ReLU moves into the filters of the next layer; the
    factor behind the kernel convolution moves into the heads in front of it.
    """
    config = model.config
    scale = config.activation_scale
    tolerance = lgcn_fast_kernels.tolerance_of(instructions)
    shape = lgcn_fast_kernels.Shape(
        landmarks=config.num_landmarks,
        side_channels=config.side_channels,
        shuffle=config.shuffle,
        stride=config.stride,
        dilation=config.dilation,
        taps=lgcn_fast_kernels.kernel_taps(config.kernel_size, config.sigmas, tolerance),
    )
    # The input's scale, (v / 128 - 1) * 0.1 = (v - 128) * 0.1 / 128: zero padding still means v = 128.
    local = _folded_blocks(model.local_subnet, 0.1 / 128, scale)
    context = _folded_blocks(model.global_subnet, 1.0, scale)
    refine = _filters(model.refine, scale)
    return lgcn_fast_kernels.Network(instructions, shape, local, _merged_heads(model), context, refine)


def _folded_blocks(subnet: nn.Sequential, first_scale: float, scale: float) -> list[tuple[np.ndarray, np.ndarray]]:
    folded = [fuse_conv_bn_eval(block[0], block[1]) for block in subnet]
    return [_filters(layer, scale if index else first_scale) for index, layer in enumerate(folded)]


def _filters(convolution: nn.Conv2d, scale_in: float, scale_out: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
    """Filters and biases, times the factors of what comes in and of what goes out."""
    return (convolution.weight * (scale_in * scale_out)).numpy(), (convolution.bias * scale_out).numpy()


def _merged_heads(model: LGCN) -> tuple[np.ndarray, np.ndarray]:
    """Main and side as one 1 x 1 convolution; the side half lacks its ReLU."""
    config = model.config
    parts = [_filters(model.main, config.activation_scale, config.blur_scale)]
    if model.side is not None:
        side = fuse_conv_bn_eval(model.side[0], model.side[1])
        parts.append(_filters(side, config.activation_scale, config.blur_scale * config.activation_scale))
    weights, biases = zip(*parts, strict=True)
    return np.concatenate(weights), np.concatenate(biases)
