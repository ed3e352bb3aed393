"""A trained network made fast for inference: a transformation of the model, not a second model."""

from collections.abc import Callable
from copy import deepcopy

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

import lgcn_fast_kernels

from .losses import probabilities
from .model import LGCN, KernelConvolution, check_images, checked_device, pad_to_grid
from .operators import gaussian_sum_banded

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}


class Engine:
    """Heatmaps from images, built once from a trained network and used many times, from several threads at once.

    On a CPU ("cpu"): batch normalisation and all constant factors folded into the filters, main and side head merged,
    convolutions with bias and ReLU in one channels-last oneDNN call each, the kernel convolution in native code.
    Elsewhere ("eager"): the model as it is, its kernel convolution as matrix products.

    >>> engine = Engine(lgcn_fast.load_model("weights.safetensors"))
    >>> engine.heatmaps(images)  # (B, 1, 96, 96) uint8 -> (B, 68, 96, 96) float32
    """

    def __init__(self, model: LGCN, device: str = "cpu", precision: str = "auto") -> None:
        """Build an engine; the model is not changed.

        Args:
            device: "cpu", "cuda" or another torch device.
            precision: of the convolutions on a CPU: "fp32", "bf16", or "auto": bf16 where the processor has
                instructions for it. Sums, the kernel convolution and the heatmaps are fp32 in any case.

        Raises:
            ValueError: a device that is not there, an unknown precision, or one that the backend does not have.
        """
        self.config = model.config
        self.device = checked_device(device)
        self.backend = "cpu" if self.device.type == "cpu" else "eager"
        if precision not in ("auto", *PRECISIONS):
            raise ValueError(f"precision: expected 'auto', 'fp32' or 'bf16', got {precision!r}")
        if self.backend == "eager" and precision == "bf16":
            raise ValueError(f"precision: expected 'fp32' or 'auto' on {self.device.type}, got 'bf16'")
        if precision == "auto":
            precision = "bf16" if self.backend == "cpu" and _has_bf16() else "fp32"
        self.precision = precision
        model = deepcopy(model).eval()
        self._network: Callable[[Tensor], Tensor]
        with torch.inference_mode():
            if self.backend == "cpu":
                self._network = _FoldedNetwork(model, PRECISIONS[precision])
            else:
                model.kernel_convolution.operator = gaussian_sum_banded
                model.to(self.device, memory_format=torch.channels_last)
                self._network = lambda images: model(images).output

    def __repr__(self) -> str:
        network = f"{self.config.filters} filters, {self.config.num_landmarks} landmarks"
        return f"Engine({network}, backend={self.backend!r}, precision={self.precision!r})"

    @torch.inference_mode()
    def heatmaps(self, images: Tensor) -> Tensor:
        """Heatmaps of a batch of images, as `LGCN.forward(images).output`; probabilities for cross-entropy networks.

        Args:
            images: (B, in_channels, H, W) pixel values 0..255, any dtype.

        Returns:
            (B, N, H, W) float32, contiguous, a pixel for every `config.stride` x `config.stride` of the images, on the engine's device.
        """
        check_images(images, self.config.in_channels)
        heatmaps = self._network(images.to(self.device))
        if self.config.loss == "cross_entropy":
            heatmaps = probabilities(heatmaps)
        return heatmaps.float().contiguous()


def _has_bf16() -> bool:
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


class _Convolution:
    """Convolution, bias and, if wanted, ReLU, channels-last in and out: one oneDNN call, its filters packed once.

    Where PyTorch is built without oneDNN (macOS), the same with PyTorch's own operators.
    """

    def __init__(self, convolution: nn.Conv2d, scale: float, relu: bool, dtype: torch.dtype) -> None:
        """Args:
        scale: factor of what comes in, folded into the filters.
        """
        self.geometry = [list(convolution.padding), list(convolution.stride), list(convolution.dilation), 1]
        self.weight = (convolution.weight * scale).to(dtype)
        self.bias = convolution.bias.to(dtype)
        self.relu = relu
        self.packed = torch.backends.mkldnn.is_available()
        if self.packed:
            self.weight = torch.ops.mkldnn._reorder_convolution_weight(self.weight, *self.geometry, None)

    def __call__(self, x: Tensor) -> Tensor:
        if not self.packed:
            padding, stride, dilation, groups = self.geometry
            x = F.conv2d(x, self.weight, self.bias, stride, padding, dilation, groups)
            return x.relu_() if self.relu else x
        activation = "relu" if self.relu else "none"
        return torch.ops.mkldnn._convolution_pointwise(x, self.weight, self.bias, *self.geometry, activation, [], "")


class _FoldedNetwork:
    """`LGCN.forward` in eval mode for one device and precision, without what can be computed once.

    ReLU(s x) = s ReLU(x) for s > 0, so the factor behind every ReLU moves into the filters of the next layer; the
    factor behind the kernel convolution moves into the heads in front of it.
    """

    def __init__(self, model: LGCN, dtype: torch.dtype) -> None:
        config = model.config
        self.config, self.dtype = config, dtype
        scale = config.activation_scale
        # The input's scale, (v / 128 - 1) * 0.1 = (v - 128) * 0.1 / 128: zero padding still means v = 128.
        self.local = [
            _Convolution(fuse_conv_bn_eval(block[0], block[1]), scale if index else 0.1 / 128, True, dtype)
            for index, block in enumerate(model.local_subnet)
        ]
        self.heads = _Convolution(_merged_heads(model), scale, False, dtype)
        self.kernel: KernelConvolution = model.kernel_convolution
        self.context = _blocks(model.global_subnet, 1.0, scale, dtype)
        self.refine = _Convolution(model.refine, scale, False, dtype)

    def __call__(self, images: Tensor) -> Tensor:
        step, landmarks = self.config.shuffle, self.config.num_landmarks
        height, width = self.config.heatmap_size(*images.shape[2:])
        x = images.float() - 128
        if step > 1:
            x = F.pixel_unshuffle(pad_to_grid(x, step), step)
        x = self._channels_last(x)
        for layer in self.local:
            x = layer(x)
        step //= self.config.stride
        maps = F.pixel_shuffle(self.heads(x).float(), step)[..., :height, :width].contiguous()
        maps[:, landmarks:].relu_()
        blurred = torch.from_numpy(
            lgcn_fast_kernels.gaussian_sum(
                maps.numpy(), self.kernel.kernel_size, self.kernel.sigmas, torch.get_num_threads()
            )
        )
        x = F.avg_pool2d(pad_to_grid(blurred, step), step) if step > 1 else blurred
        x = self._channels_last(x)
        for layer in self.context:
            x = layer(x)
        refined = F.pixel_shuffle(self.refine(x).float(), step)[..., :height, :width]
        return blurred[:, :landmarks] + refined

    def _channels_last(self, x: Tensor) -> Tensor:
        return x.to(self.dtype, memory_format=torch.channels_last)


def _blocks(subnet: nn.Sequential, first_scale: float, scale: float, dtype: torch.dtype) -> list[_Convolution]:
    folded = [fuse_conv_bn_eval(block[0], block[1]) for block in subnet]
    return [_Convolution(layer, scale if i else first_scale, True, dtype) for i, layer in enumerate(folded)]


def _merged_heads(model: LGCN) -> nn.Conv2d:
    """Main and side as one 1 x 1 convolution, each times the factors that follow it; the side half lacks its ReLU."""
    config = model.config
    parts = [(model.main, config.blur_scale)]
    if model.side is not None:
        parts.append((fuse_conv_bn_eval(model.side[0], model.side[1]), config.blur_scale * config.activation_scale))
    merged = nn.Conv2d(config.filters, sum(head.out_channels for head, _ in parts), 1)
    # (The filters' own input factor is folded in by `_Convolution`, the bias has none.)
    merged.weight.copy_(torch.cat([head.weight * scale for head, scale in parts]))
    merged.bias.copy_(torch.cat([head.bias * scale for head, scale in parts]))
    return merged
