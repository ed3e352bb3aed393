"""A trained network made fast for inference: a transformation of the model, not a second model."""

import os
from contextlib import suppress
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from numbers import Integral
from pathlib import Path
from typing import NoReturn, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.dlpack import to_dlpack

from lgcn_fast_kernels import INSTRUCTIONS

from .checkpoints import load_model
from .fitting import Fit
from .folding import fold
from .model import LGCN, check_images, checked_device
from .native import NativeEngine
from .peaks import Array
from .shape import ShapeModel

if hasattr(os, "register_at_fork"):
    # Of PyTorch's threads a forked process has none, and waits for them for ever.
    os.register_at_fork(after_in_child=lambda: torch.set_num_threads(1))

GPU_PACKAGES = ("triton", "cupy")
LEAST_CUPY = 14
LEAST_CAPABILITY = (8, 0)
"""Of a GPU that "auto" takes (Ampere): older ones have no bf16."""
LEAST_FP8_CAPABILITY = (8, 9)
"""Of a GPU with products of fp8 (Ada)."""
PRECISIONS = ("auto", "fp32", "bf16", "fp8")
"""What may be asked for, see `Engine`."""


class _Backend(Protocol):
    """What an engine needs of a device: images (B, C, H, W) to heatmaps or points, as documented in `Engine`."""

    @property
    def num_threads(self) -> int: ...

    def heatmaps(self, images: Tensor) -> Tensor: ...

    def maxima(self, images: Tensor, to_host: bool) -> tuple[Array, Array]: ...

    def votes(self, images: Tensor, offsets: np.ndarray, voters: list[int], step: int) -> np.ndarray: ...

    def fit(self, images: Tensor, shape: ShapeModel, to_host: bool) -> Fit: ...


class Engine:
    """Heatmaps and landmarks of images: built once from a trained network, used many times, by several threads at once.

    `engine.backend` says what runs: "cpu", native code; "cuda", Triton kernels in CUDA graphs and a fit on the GPU.

    >>> engine = Engine("lgcn-nano")
    >>> engine.heatmaps(images)  # (B, 1, 96, 96) uint8 -> (B, 68, 48, 48) float32
    """

    def __init__(
        self, model: LGCN | Path | str, device: str = "auto", precision: str = "auto", num_threads: int = 0
    ) -> None:
        """Build an engine; the model is not changed.

        Args:
            model: a network, the name of one in the package (`lgcn_fast.models()`), or the path of weights.
            device: "cpu" or "cuda" (or "cuda:1"). "auto" is a GPU (Ampere or newer) where torch, Triton and CuPy
                are there for it, else the CPU.
            precision: of filters and activations: "fp32", "bf16", or "auto": bf16 on a GPU, and on a processor that has
                instructions for it. "fp8", on a GPU (Ada, Hopper or newer), rounds what the layers in the middle see to
                eight bits: faster with lgcn-128; small networks lose accuracy. Sums are fp32 in any case, as are the
                heatmaps that come out.
            num_threads: on a CPU; 0: as many as PyTorch uses (`torch.get_num_threads()`).

        Raises:
            ValueError: an unknown model, a device that is not there or lacks packages, a negative number of threads, an
                unknown precision, or one that the processor or GPU does not have.
        """
        model = model if isinstance(model, LGCN) else load_model(model)
        self.config = model.config
        self.device = engine_device(device)
        self.precision = _checked_precision(precision, self.device)
        if not (isinstance(num_threads, Integral) and 0 <= num_threads < 2**31):
            raise ValueError(f"num_threads: expected a whole number, 0 or more, got {num_threads}")
        self.options = str(self.device), precision, num_threads
        """Device, precision and threads that were asked for: an engine with the same runs where and as this one."""
        network = fold(model)
        self._backend: _Backend
        if self.device.type == "cpu":
            self._backend = NativeEngine(network, self.precision, num_threads)
        else:
            from .cuda import FP8, CudaEngine

            dtype = torch.float32 if self.precision == "fp32" else torch.bfloat16
            self._backend = CudaEngine(network, self.device, dtype, FP8 if self.precision == "fp8" else None)

    @property
    def backend(self) -> str:
        """What runs, "cpu" or "cuda"."""
        return self.device.type

    @property
    def num_threads(self) -> int:
        """Threads of what it does on the host."""
        return self._backend.num_threads

    def __repr__(self) -> str:
        config, side = self.config, self.config.input_size // self.config.stride
        network = f"{config.filters} filters, {config.num_landmarks} landmarks, heatmaps of {side} x {side}"
        how = f"backend={self.backend!r}, precision={self.precision!r}, num_threads={self.num_threads}"
        return f"Engine({network}; {how})"

    def __reduce__(self) -> NoReturn:
        raise TypeError("Engine: it cannot be pickled or copied; build one in each process")

    def heatmaps(self, images: Tensor | np.ndarray) -> Tensor:
        """Heatmaps of a batch of images, as `LGCN.forward(images).output`; probabilities for cross-entropy networks.

        Args:
            images: (B, in_channels, H, W) pixel values 0..255, any real dtype, NumPy or torch, on any device. On a GPU
                uint8 images of `config.input_size` are fastest: they go through a CUDA graph.

        Returns:
            torch (B, N, H, W) float32, contiguous, on the engine's device; H and W of `config.heatmap_size`. Column x
            of a heatmap lies at `(x + 0.5) * config.stride - 0.5` in the image, and rows likewise. (On a GPU
            `record_stream` has no effect on it: what uses it in another stream must be waited for.)

        Raises:
            ValueError: another shape.
        """
        images = self._checked(images)
        with torch.inference_mode():
            heatmaps = self._backend.heatmaps(images)
        # The caller may change it, too. (`Tensor.__dlpack__` refuses GPUs other than the current one.)
        return torch.from_dlpack(to_dlpack(heatmaps))

    @torch.inference_mode()
    def maxima(self, images: Tensor | np.ndarray, to_host: bool = True) -> tuple[Array, Array]:
        """The maxima of the heatmaps of images, see `peaks.peak_centroids`.

        Args:
            images: as for `heatmaps`.
            to_host: NumPy arrays; otherwise torch tensors on the engine's device, which is not waited for.

        Returns:
            points (B, N, 2), pixels of the heatmaps; values (B, N).

        Raises:
            ValueError: another shape.
        """
        images = self._checked(images)
        return self._backend.maxima(images, to_host)

    @torch.inference_mode()
    def votes(self, images: Tensor | np.ndarray, offsets: np.ndarray, voters: list[int], step: int) -> np.ndarray:
        """Votes of the heatmaps of images for the middles of faces, see `peaks.face_votes`.

        Args:
            images: as for `heatmaps`.
            offsets, voters, step: as for `peaks.face_votes`.

        Returns:
            (B, S, h, w) float32.

        Raises:
            ValueError: another shape.
        """
        images = self._checked(images)
        return self._backend.votes(images, offsets, voters, step)

    @torch.inference_mode()
    def fit(self, images: Tensor | np.ndarray, shape: ShapeModel, to_host: bool = True) -> Fit:
        """Fit a shape model to the heatmaps of images (section 3.3), see `fitting.fit`.

        Args:
            images: as for `heatmaps`; `predict` lights them before, see `images.lit`.
            shape: with as many landmarks as the network.
            to_host: as for `maxima`.

        Returns:
            `Fit`, in pixels of the heatmaps.

        Raises:
            ValueError: another shape, or a shape model of another number of landmarks.
        """
        images = self._checked(images)
        if shape.num_landmarks != self.config.num_landmarks:
            expected, got = self.config.num_landmarks, shape.num_landmarks
            raise ValueError(f"shape: expected a shape model of {expected} landmarks, got one of {got}")
        return self._backend.fit(images, shape, to_host)

    def _checked(self, images: Tensor | np.ndarray) -> Tensor:
        if isinstance(images, np.ndarray):
            # Torch takes neither arrays that run backwards, foreign byte orders, nor, silently, what is read-only.
            images = images.copy() if min(images.strides, default=0) < 0 else images
            images = torch.from_numpy(np.require(images, images.dtype.newbyteorder("="), ["C", "W"]))
        if not isinstance(images, Tensor):
            raise ValueError(f"images: expected an array or a tensor (B, C, H, W), got {type(images).__name__}")
        check_images(images, self.config.in_channels)
        return images


def engine_device(name: str) -> torch.device:
    """The device that an engine runs on, see `Engine`."""
    device = checked_device(name)
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"device: expected 'cpu', 'cuda' or 'auto', got {name!r}")
    if device.type == "cuda":
        missing = [package for package in GPU_PACKAGES if find_spec(package) is None]
        old = old_cupy()
        if name == "auto" and (missing or old or torch.cuda.get_device_capability(device) < LEAST_CAPABILITY):
            return torch.device("cpu")
        if missing:
            remedy = "pip install triton and, for your version of CUDA, cupy-cuda12x or cupy-cuda13x"
            raise ValueError(f"device: {name!r} needs {' and '.join(GPU_PACKAGES)}, got no {missing[0]} ({remedy})")
        if old:
            raise ValueError(f"device: {name!r} needs CuPy {LEAST_CUPY} or newer, got {old}")
        device = torch.device("cuda", device.index if device.index is not None else torch.cuda.current_device())
    return device


@cache
def old_cupy() -> str | None:
    """The version of the CuPy that is installed, where it is too old. (To import it takes a second.)"""
    for name in ("cupy-cuda12x", "cupy-cuda13x", "cupy"):
        with suppress(PackageNotFoundError):
            if int((found := version(name)).split(".")[0]) < LEAST_CUPY:
                return found
    return None


def known_precisions(device: torch.device) -> tuple[str, ...]:
    """Those that a processor or GPU has instructions for."""
    if device.type == "cpu":
        return tuple(INSTRUCTIONS)
    least = {"fp32": (0, 0), "bf16": LEAST_CAPABILITY, "fp8": LEAST_FP8_CAPABILITY}
    capability = torch.cuda.get_device_capability(device)
    return tuple(precision for precision in least if capability >= least[precision])


def _checked_precision(precision: str, device: torch.device) -> str:
    if precision not in PRECISIONS:
        raise ValueError(f"precision: expected one of {', '.join(map(repr, PRECISIONS))}, got {precision!r}")
    known = known_precisions(device)
    if precision == "auto":
        return "bf16" if "bf16" in known else "fp32"
    if precision not in known:
        expected = " or ".join(map(repr, ("auto", *known)))
        what = "GPU" if device.type == "cuda" else "processor"
        raise ValueError(
            f"precision: expected {expected}, got {precision!r}, for which this {what} has no instructions"
        )
    return precision
