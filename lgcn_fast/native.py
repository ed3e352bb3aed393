"""The network on a CPU: everything in native code, see `lgcn_fast_kernels.Network`."""

from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

import lgcn_fast_kernels
from lgcn_fast_kernels import INSTRUCTIONS

from .fitting import Fit, NativeFitter
from .folding import FoldedNetwork
from .losses import readable
from .peaks import PEAK_RADIUS, Array
from .shape import ShapeModel


def native_network(network: FoldedNetwork, instructions: str) -> lgcn_fast_kernels.Network:
    """A folded network as native code for one of `lgcn_fast_kernels.INSTRUCTION_SETS`."""
    config = network.config
    tolerance = lgcn_fast_kernels.tolerance_of(instructions)
    shape = lgcn_fast_kernels.Shape(
        landmarks=config.num_landmarks,
        side_channels=config.side_channels,
        shuffle=config.shuffle,
        stride=config.stride,
        dilation=config.dilation,
        taps=lgcn_fast_kernels.kernel_taps(config.kernel_size, config.sigmas, tolerance),
    )
    layers = network.local, network.heads, network.context, network.refine
    return lgcn_fast_kernels.Network(instructions, shape, *layers)


class NativeEngine:
    """What `Engine` runs on a CPU."""

    def __init__(self, network: FoldedNetwork, precision: str, num_threads: int) -> None:
        self._config = network.config
        self._network = native_network(network, INSTRUCTIONS[precision])
        self._num_threads = num_threads

    @property
    def num_threads(self) -> int:
        return self._num_threads or torch.get_num_threads()

    def heatmaps(self, images: Tensor) -> Tensor:
        heatmaps = torch.from_numpy(self._network.heatmaps(_pixels(images), self.num_threads))
        return readable(heatmaps, self._config).contiguous()

    def maxima(self, images: Tensor, to_host: bool) -> tuple[Array, Array]:
        radius = PEAK_RADIUS / self._config.stride
        found = lgcn_fast_kernels.peak_centroids(self.heatmaps(images).numpy(), radius, self.num_threads)
        return found if to_host else tuple(map(torch.from_numpy, found))

    def votes(self, images: Tensor, offsets: np.ndarray, voters: list[int], step: int) -> np.ndarray:
        if self._config.loss != "squared_error":
            return lgcn_fast_kernels.face_votes(self.heatmaps(images).numpy(), offsets, voters, step, self.num_threads)
        return self._network.votes(_pixels(images), offsets, voters, step, self.num_threads)

    def fit(self, images: Tensor, shape: ShapeModel, to_host: bool) -> Fit:
        fitter = _fitter(shape)
        if self._config.loss == "squared_error":
            # In one call: the heatmaps of a face are fitted while they are in the cache.
            found = self._network.fit(_pixels(images), fitter.native, self.num_threads)
        else:
            heatmaps = self.heatmaps(images).numpy()
            found = fitter.native.fit(heatmaps, self._config.stride, self.num_threads)
        return Fit(*(found if to_host else map(torch.from_numpy, found)))


@lru_cache(maxsize=8)
def _fitter(shape: ShapeModel) -> NativeFitter:
    return NativeFitter(shape)


def _pixels(images: Tensor) -> np.ndarray:
    """(B, C, H, W) uint8 or float32, contiguous, on the host."""
    images = images.cpu() if images.dtype == torch.uint8 else images.cpu().float()
    return images.contiguous().numpy()
