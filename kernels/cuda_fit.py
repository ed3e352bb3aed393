"""The fit of section 3.3 on an NVIDIA GPU: the source that the CPU runs too (`fit_face.hpp`), one block of threads a
face, compiled by CuPy when a fitter is built.
"""

from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ._native import Fitter
from .tensors import check_tensor

SOURCES = tuple(Path(__file__).with_name(name) for name in ("heatmap.hpp", "fit_face.hpp"))
OPTIONS = ("-std=c++17", "-default-device")
"""Of NVRTC. (The functions of the source are not marked for a device: on a CPU there is no such mark.)"""
THREADS = 512
"""Of a block."""
PLAIN_SHARED_BYTES = 48 * 1024
"""Shared memory that a kernel gets without asking for it."""


def cuda_source() -> str:
    """What NVRTC compiles: one text without includes, as CuPy keeps compiled kernels on disk by their text alone."""
    return "\n".join(source.read_text() for source in SOURCES)


def cuda_options(landmarks: int, parameters: int) -> tuple[str, ...]:
    """Of NVRTC, with the sizes that the source is compiled for: those of a shape model and of a block."""
    sizes = {"LANDMARKS": landmarks, "PARAMETERS": parameters, "THREADS": THREADS}
    return (*OPTIONS, *(f"-DLGCN_{name}={size}" for name, size in sizes.items()))


class CudaFitter:
    """What `Fitter` computes, for CUDA tensors.

    Args:
        fitter: shape model and options.
        device: "cuda", "cuda:1", ...

    Raises:
        ImportError: without CuPy.
        ValueError: a device of another kind, or more landmarks than fit its shared memory.
    """

    def __init__(self, fitter: Fitter, device: torch.device | str = "cuda") -> None:
        device = torch.device(device)
        if device.type != "cuda":
            raise ValueError(f"device: expected 'cuda', got {str(device)!r}")
        index = torch.cuda.current_device() if device.index is None else device.index
        self.device = torch.device("cuda", index)
        self.landmarks, self.modes, self._windows = fitter.landmarks, fitter.modes, fitter.windows
        self._shared_bytes = 8 * fitter.workspace
        limit = torch.cuda.get_device_properties(index).shared_memory_per_block_optin
        if self._shared_bytes > limit:
            expected, got = f"a model that needs up to {limit} bytes", f"{self._shared_bytes}"
            raise ValueError(f"fitter: expected {expected} of shared memory on {self.device}, got {got}")
        self._constants = torch.from_numpy(fitter.constants).to(self.device)
        self._kernel = _compiled(index, self.landmarks, self.modes + 4)
        if self._shared_bytes > PLAIN_SHARED_BYTES:
            with _cupy().cuda.Device(index):
                self._kernel.max_dynamic_shared_size_bytes = limit

    def fit(
        self, heatmaps: Tensor, peaks: Tensor, stride: float = 1, out: tuple[Tensor, ...] | None = None
    ) -> tuple[Tensor, ...]:
        """Fit the shape model to heatmaps: one launch on torch's current stream, without waiting for it.

        Args:
            heatmaps: (B, N, H, W) float32, contiguous, at least one pixel, on the device.
            peaks: (B, N, 6) float32, contiguous, on the device: of every heatmap x, y and value of its largest pixel,
                and the sums of w^2, w^2 x and w^2 y over the pixels with a value w above the threshold.
            stride: side of a heatmap's pixel in pixels of the image.
            out: what is returned, to write to.

        Returns:
            points (B, N, 2), shapes (B, N, 2), coefficients (B, K), certainties (B, N), residuals (B,), float32.

        Raises:
            ValueError: another shape, dtype, layout or device, or a stride that is not positive.
        """
        if heatmaps.ndim != 4 or not 0 < heatmaps.shape[2] * heatmaps.shape[3] < 2**31:
            expected = f"(B, {self.landmarks}, H, W) with 1 to 2**31 - 1 pixels"
            raise ValueError(f"heatmaps: expected {expected}, got {tuple(heatmaps.shape)}")
        faces, landmarks, height, width = len(heatmaps), self.landmarks, *heatmaps.shape[2:]
        check_tensor("heatmaps", heatmaps, (faces, landmarks, height, width), torch.float32, self.device)
        if not stride > 0:
            raise ValueError(f"stride: expected a positive number, got {stride}")
        check_tensor("peaks", peaks, (faces, landmarks, 6), torch.float32, self.device)
        shapes = (faces, landmarks, 2), (faces, landmarks, 2), (faces, self.modes), (faces, landmarks), (faces,)
        if out is None:
            out = tuple(torch.empty(shape, dtype=torch.float32, device=self.device) for shape in shapes)
        for array, shape in zip(out, shapes, strict=True):
            check_tensor("out", array, shape, torch.float32, self.device)
        if faces:
            self._launch(faces, (
                heatmaps.data_ptr(), peaks.data_ptr(), self._constants.data_ptr(), self._windows, height, width,
                float(stride), *(array.data_ptr() for array in out),
            ))  # fmt: skip
        return out

    def _launch(self, faces: int, arguments: tuple) -> None:
        cuda = _cupy().cuda
        stream = torch.cuda.current_stream(self.device)
        with cuda.Device(self.device.index), cuda.Stream.from_external(stream):  # in this order: it asks for the device
            self._kernel((faces,), (THREADS,), arguments, shared_mem=self._shared_bytes)


@cache
def _compiled(device_index: int, landmarks: int, parameters: int) -> Any:
    """The kernel, compiled and loaded: the first launch may be one into a CUDA graph, where neither is possible."""
    cupy = _cupy()
    with cupy.cuda.Device(device_index):
        options = cuda_options(landmarks, parameters)
        kernel = cupy.RawModule(code=cuda_source(), options=options).get_function("fit_faces")
        kernel.compile()
    return kernel


def _cupy() -> Any:
    try:
        import cupy
    except ImportError as error:
        raise ImportError("the fit on a GPU needs CuPy: pip install cupy-cuda12x (or cupy-cuda13x)") from error
    return cupy
