"""The network on a GPU: Triton kernels, recorded once as CUDA graphs and replayed.

The shape model's fit follows on the device, so that of a face only its 96 x 96 pixels go in and its points come out.
"""

import threading
from collections.abc import Callable
from functools import lru_cache, partial
from itertools import pairwise

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from lgcn_fast_kernels import face_votes
from lgcn_fast_kernels.triton_convolution import FP8, Convolution, channels_last
from lgcn_fast_kernels.triton_gaussian_sum import gaussian_sum
from lgcn_fast_kernels.triton_peaks import heatmap_reduction

from .fitting import THRESHOLD, CudaFitter, Fit
from .folding import ORIGIN, FoldedNetwork, Layer
from .losses import readable
from .model import cudnn_benchmark, pad_to_grid, pooled
from .peaks import PEAK_RADIUS, Array
from .recorded_step import record_graph
from .shape import ShapeModel

LADDER = (1, 2, 4, 8, 16, 32, 64)
"""Batch sizes that are recorded. A batch goes through in parts of the largest, its rest in the next that holds it."""
IN_FP8 = 2.0
"""What activations in fp8 are multiplied by, so that those of up to 224 fit: they are about 1 (`folding.py`), of real
faces below 50, of noise below 180 (of black and white noise up to 263, and there a few are cut off). Up to 8 the
precision is the same."""
_RECORDING = threading.Lock()
"""One graph is recorded at a time: nobody may wait for the whole device meanwhile, which is how each record begins."""


class CudaNetwork:
    """`LGCN.forward` of a folded network, launched kernel by kernel; sums are fp32 in any case."""

    def __init__(
        self, network: FoldedNetwork, device: torch.device, dtype: torch.dtype, inner_dtype: torch.dtype | None = None
    ) -> None:
        """Bring the filters to the device.

        Args:
            dtype: of filters and activations.
            inner_dtype: fp8, for layers in the middle of both subnets; default: `dtype`.
        """
        self.config, self._dtype = network.config, dtype
        inner_dtype = inner_dtype or dtype

        def convolutions(layers: list[Layer], dtypes: list[torch.dtype], **options) -> list[Convolution]:
            """Layers of which each takes the first of two dtypes that follow each other, and gives the second."""
            parts = zip(layers, pairwise(dtypes), strict=True)
            return [convolution(layer, device, *pair, relu=True, **options) for layer, pair in parts]

        first, *local = network.local
        # (With all of the local subnet in fp8 lgcn-128's points move by 0.06 pixels, with two thirds of it by 0.04.)
        exact = len(network.local) // 3
        inner = [inner_dtype] * (len(local) - exact) + [dtype] * (exact + 1)
        self._local = convolutions([first], [dtype, inner[0]], origin=ORIGIN) + convolutions(local, inner)
        shuffle = self.config.shuffle // self.config.stride
        self._heads = convolution(network.heads, device, dtype, planes=True, shuffle=shuffle)
        inner = [dtype, *[inner_dtype] * (len(network.context) - 1), dtype]
        self._context = convolutions(network.context, inner, dilation=self.config.dilation)
        self._refine = convolution(network.refine, device, dtype, planes=True, shuffle=shuffle)

    def __call__(self, images: Tensor) -> Tensor:
        """Heatmaps of a batch of images.

        Args:
            images: (B, in_channels, H, W) pixel values 0..255, any real dtype.

        Returns:
            (B, N, H, W) float32, contiguous; H and W of `config.heatmap_size`.
        """
        config = self.config
        height, width = config.heatmap_size(*images.shape[2:])
        x, step = images, config.shuffle
        if step > 1:
            if images.shape[2] % step or images.shape[3] % step:
                x = pad_to_grid(images.float(), step)  # (torch cannot pad uint8)
            x = F.pixel_unshuffle(x, step)
        for layer in self._local:
            x = layer(x)
        step //= config.stride
        size = (len(images), len(self._heads.bias) // step**2, height, width)
        maps = self._heads(x, out=torch.empty(size, dtype=self._dtype, device=images.device))
        # (These are about 1, or logits: fp16 is finer than what was blurred. The context's input is rounded anyway.)
        exact = torch.float32 if self._dtype == torch.float32 else torch.float16
        blurred = torch.empty(size, dtype=exact, device=images.device)
        gaussian_sum(maps, config.kernel_size, config.sigmas, config.num_landmarks, blurred)
        local = blurred[:, : config.num_landmarks]
        x = channels_last(pooled(blurred, step), self._dtype)
        for layer in self._context:
            x = layer(x)
        heatmaps = self._refine(x, local, torch.empty(local.shape, dtype=torch.float32, device=images.device))
        return readable(heatmaps, config).contiguous()


def convolution(
    layer: Layer, device: torch.device, dtype: torch.dtype, out_dtype: torch.dtype | None = None, **options
) -> Convolution:
    """A folded layer on the device; of what it takes and gives, fp8 is `IN_FP8` times the activations.

    Args:
        dtype: of what it takes, and of the filters; in fp8 those of each output have a scale of their own.
        out_dtype: of what it gives; default: `dtype`.
    """
    weight, bias = (torch.from_numpy(part).to(device) for part in layer)
    scale_in, scale_out = (IN_FP8 if each == FP8 else 1.0 for each in (dtype, out_dtype or dtype))
    weight, scale = weight * (scale_out / scale_in), None
    if dtype == FP8:
        scale = weight.abs().amax((1, 2, 3)).clamp(min=1e-30) / torch.finfo(FP8).max
        weight = weight / scale.view(-1, 1, 1, 1)
    return Convolution(weight.to(dtype), bias * scale_out, scale=scale, out_dtype=out_dtype, **options)


class CudaEngine:
    """What `Engine` runs on a GPU."""

    def __init__(
        self,
        network: FoldedNetwork,
        device: torch.device,
        dtype: torch.dtype,
        inner_dtype: torch.dtype | None = None,
        fitter: type = CudaFitter,
    ) -> None:
        """Bring the network to the device.

        Args:
            dtype: of filters and activations.
            inner_dtype: as for `CudaNetwork`.
            fitter: what makes fits of a shape model, heatmaps and their reductions; tests put one for a CPU here.
        """
        # (Nothing here refers back to the engine: its graphs are freed with it, not by the garbage collector, which
        # might do so while another graph is recorded.)
        heatmaps_of, size = CudaNetwork(network, device, dtype, inner_dtype), network.config.input_size
        recorded = partial(RecordedBatches, image=(network.config.in_channels, size, size), device=device)
        self._heatmaps = recorded(heatmaps_of)
        radius = int(PEAK_RADIUS / network.config.stride)
        self._reductions = recorded(lambda images: heatmap_reduction(heatmaps_of(images), radius))
        self._fits = lru_cache(maxsize=4)(lambda shape: recorded(packed_fit(heatmaps_of, fitter(shape, device))))
        if device.type == "cuda":
            torch.cuda.current_stream(device).synchronize()  # other streams may use the filters from now on

    @property
    def num_threads(self) -> int:
        return torch.get_num_threads()

    def heatmaps(self, images: Tensor) -> Tensor:
        return self._heatmaps(images)

    def maxima(self, images: Tensor, to_host: bool) -> tuple[Array, Array]:
        reductions = self._reductions(images, to_host)
        if to_host:
            reductions = reductions.numpy()
        return reductions[..., :2], reductions[..., 2]

    def votes(self, images: Tensor, offsets: np.ndarray, voters: list[int], step: int) -> np.ndarray:
        return face_votes(self.heatmaps(images).cpu().numpy(), offsets, voters, step, self.num_threads)

    def fit(self, images: Tensor, shape: ShapeModel, to_host: bool) -> Fit:
        packed = self._fits(shape)(images, to_host)
        return unpacked_fit(packed.numpy() if to_host else packed, shape)


def packed_fit(network: CudaNetwork, fitter: Callable[..., Fit]) -> Callable[[Tensor], Tensor]:
    """Images to all parts of a fit side by side, (B, ...): one copy brings them to the host."""

    def packed(images: Tensor) -> Tensor:
        heatmaps = network(images)
        fit = fitter(heatmaps, heatmap_reduction(heatmaps, 0, THRESHOLD), network.config.stride)
        return torch.cat([part.reshape(len(images), -1) for part in vars(fit).values()], dim=1)

    return packed


def unpacked_fit(packed: Array, shape: ShapeModel) -> Fit:
    """The parts of a fit, views of what `packed_fit` has put side by side."""
    faces, count = len(packed), shape.num_landmarks
    points, shapes, rest = packed[:, : 2 * count], packed[:, 2 * count : 4 * count], packed[:, 4 * count :]
    points, shapes = points.reshape(faces, count, 2), shapes.reshape(faces, count, 2)
    return Fit(points, shapes, rest[:, : -count - 1], rest[:, -count - 1 : -1], rest[:, -1])


class RecordedBatches:
    """A function of batches of images of one size, recorded for the sizes of a ladder and replayed.

    Its buffers stay where they are, as a CUDA graph demands. Threads and streams may call it at once: it runs in the
    caller's stream, behind what others have it do. While a size is recorded, in the first call that needs it, nobody
    may wait for the whole device (`torch.cuda.synchronize()`): CUDA forbids it. (On a CPU nothing is recorded.)

    Small batches from host to host have records of their own, with both copies in them, out of and into pinned memory:
    so the host has the least to do. The call that has this memory keeps it until it returns; one that comes meanwhile
    takes the records on the device, so that its work lies ready there when that of the first is done.
    """

    def __init__(self, function: Callable[[Tensor], Tensor], image: tuple[int, int, int], device: torch.device) -> None:
        """Record nothing yet: a size is recorded when it is needed first.

        Args:
            function: (B, C, H, W) on the device to one (B, ...) tensor, without waiting for the device.
            image: C, H, W of the images that are recorded, uint8; others are computed without a record.
        """
        self._function, self._image, self._device = function, image, device
        self._recorded: dict[tuple[int, bool], tuple[Tensor, Callable[[], Tensor]]] = {}  # see `_record`
        self._lock, self._pinned_memory = threading.Lock(), threading.Lock()
        self._pool = torch.cuda.graph_pool_handle() if device.type == "cuda" else None
        # One for all sizes: they share the memory of their intermediate results.
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._done: torch.cuda.Event | None = None

    def __call__(self, images: Tensor, to_host: bool = False) -> Tensor:
        """What the function makes of a batch, which may lie on the host or on the device.

        Returns:
            (B, ...) on the device; or on the host, and then it has been waited for.
        """
        recorded = images.dtype == torch.uint8 and images.shape[1:] == self._image
        pinned = recorded and to_host and images.device.type == "cpu" and len(images) <= LADDER[-1]
        if pinned and self._pinned_memory.acquire(blocking=False):
            try:
                result, done = self._replay(images, to_host, pinned=True)
                if done:
                    done.synchronize()
                return result.clone()
            finally:
                self._pinned_memory.release()
        with self._on_device():
            if not recorded:
                result = self._function(images.to(self._device))
                return result.cpu() if to_host else result
            parts, done = zip(*(self._replay(part, to_host) for part in images.split(LADDER[-1])), strict=True)
            if to_host and done[-1]:
                done[-1].synchronize()
            return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _replay(self, images: Tensor, to_host: bool, pinned: bool = False) -> tuple[Tensor, torch.cuda.Event | None]:
        """The result for a part, and the event behind which it is there.

        With `pinned` on the host, and the record's own, to be copied by whoever holds the pinned memory.
        """
        count = len(images)
        if self._pool and not pinned and images.device.type == "cpu":
            # Pinned, or the copy to the device would wait for all that the stream has to do before; and not the
            # caller's memory, which may be written to again before that copy.
            fresh = torch.empty(images.shape, dtype=images.dtype, device="cpu", pin_memory=True)
            images = fresh.copy_(images)
        with self._lock:
            key = next(size for size in LADDER if size >= count), pinned
            if key not in self._recorded:
                with _RECORDING, self._on_device():
                    self._recorded[key] = self._record(*key)
            buffer, replay = self._recorded[key]
            stream = torch.cuda.current_stream(self._device) if self._pool else None
            if stream and self._done:
                stream.wait_event(self._done)
            buffer[:count].copy_(images, non_blocking=True)
            result = replay()[:count]
            if not pinned:
                # (What is copied to the host comes into fresh pinned memory.)
                result = result.to("cpu", non_blocking=True, copy=True) if to_host else result.clone()
            if stream:
                self._done = stream.record_event()
            return result, self._done

    def _record(self, size: int, pinned: bool) -> tuple[Tensor, Callable[[], Tensor]]:
        """Where images go, and what makes a result of them: both on the device, or both in pinned memory."""
        function, device, stream = self._function, self._device, self._stream
        place = {"device": "cpu", "pin_memory": True} if pinned and stream else {"device": device}
        buffer = torch.zeros((size, *self._image), dtype=torch.uint8, **place)
        if stream is None:
            return buffer, lambda: function(buffer)
        host_result: Tensor | None = None

        def compute() -> Tensor:
            result = function(buffer.to(device, non_blocking=True))
            return result if host_result is None else host_result.copy_(result, non_blocking=True)

        torch.cuda.synchronize()
        with cudnn_benchmark():
            with torch.cuda.stream(stream):
                result = compute()  # compiles what is not compiled yet, and lets cuDNN choose
            stream.synchronize()
            if pinned:
                host_result = torch.empty(result.shape, dtype=result.dtype, **place)
            del result  # (not needed, but large)
            return buffer, record_graph(compute, stream, self._pool)

    def _on_device(self) -> torch.cuda.device:
        return torch.cuda.device(self._device if self._pool else -1)
