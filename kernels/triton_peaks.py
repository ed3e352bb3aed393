"""Heatmaps to points and moments in Triton, for CUDA tensors (or, with TRITON_INTERPRET=1, any).

One program reads one heatmap once: all that the shape fit needs of it is 24 bytes.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .tensors import described

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
NUM_WARPS = {32: 4, 16: 1}
"""By the side of the squares that a program reads at a time, 8 pixels a thread: fewer and more take longer for 64 faces
(`benchmarks/results/h200/tiles.json`)."""


@triton.jit
def _centroid_shift(x_ptr, y, x, height, width, RADIUS: tl.constexpr, LANES: tl.constexpr):
    """Of the window around the pixel (y, x): its centroid's distance from it, along x and y."""
    side = 2 * RADIUS + 1
    lane = tl.arange(0, LANES)
    dy, dx = lane // side - RADIUS, lane % side - RADIUS
    # Cut at the border to a window that is symmetric about the pixel.
    reach_y, reach_x = tl.minimum(y, height - 1 - y), tl.minimum(x, width - 1 - x)
    inside = (tl.abs(dy) <= reach_y) & (tl.abs(dx) <= reach_x) & (lane < side * side)
    window = tl.load(x_ptr + (y + dy) * width + x + dx, mask=inside, other=0.0).to(tl.float32)
    square = tl.where(window > 0, window * window, 0.0)
    total = tl.sum(square, axis=0)
    found = (total > 0) & (total < float("inf"))
    square, total = tl.where(found, square, 0.0), tl.where(found, total, 1.0)
    return tl.sum(square * dx, axis=0) / total, tl.sum(square * dy, axis=0) / total


@triton.jit
def _square(x_ptr, block, height, width, SIDE: tl.constexpr):
    """The pixels of one of the squares that a map consists of, minus infinity beyond it; their rows and columns."""
    blocks_x = tl.cdiv(width, SIDE)
    y = block // blocks_x * SIDE + tl.arange(0, SIDE)[:, None]
    x = block % blocks_x * SIDE + tl.arange(0, SIDE)[None, :]
    inside = (y < height) & (x < width)
    return tl.load(x_ptr + y * width + x, mask=inside, other=float("-inf")).to(tl.float32), y, x


@triton.jit
def _heatmap_reduction_kernel(
    x_ptr, out_ptr, height, width, threshold,
    SIDE: tl.constexpr, RADIUS: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    map_index = tl.program_id(0).to(tl.int64)
    x_ptr += map_index * (height * width)
    # Every lane keeps its own first maximum and its own sums. (Rows and columns are counted, as a division for each
    # pixel would take longer than to read it.)
    largest = tl.full((SIDE, SIDE), float("-inf"), tl.float32)
    largest_at = tl.zeros((SIDE, SIDE), tl.int32)
    w2 = tl.zeros((SIDE, SIDE), tl.float32)
    w2x = tl.zeros((SIDE, SIDE), tl.float32)
    w2y = tl.zeros((SIDE, SIDE), tl.float32)
    value, y, x = _square(x_ptr, 0, height, width, SIDE)
    for block in range(tl.cdiv(height, SIDE) * tl.cdiv(width, SIDE)):
        following, next_y, next_x = _square(x_ptr, block + 1, height, width, SIDE)  # (on its way meanwhile)
        larger = value > largest  # (NaN never is)
        largest = tl.where(larger, value, largest)
        largest_at = tl.where(larger, y * width + x, largest_at)
        square = tl.where(value > threshold, value * value, 0.0)
        w2 += square
        w2x += square * x.to(tl.float32)
        w2y += square * y.to(tl.float32)
        value, y, x = following, next_y, next_x
    peak = tl.max(largest)
    # Of equal ones the first. Where nothing is above minus infinity, all lanes hold pixel 0.
    first = tl.min(tl.where(largest == peak, largest_at, height * width))
    y, x = first // width, first % width
    shift_x, shift_y = _centroid_shift(x_ptr, y, x, height, width, RADIUS, LANES)
    out_ptr += map_index * 6
    tl.store(out_ptr, (x + shift_x).to(tl.float32))
    tl.store(out_ptr + 1, (y + shift_y).to(tl.float32))
    tl.store(out_ptr + 2, peak)
    tl.store(out_ptr + 3, tl.sum(w2))
    tl.store(out_ptr + 4, tl.sum(w2x))
    tl.store(out_ptr + 5, tl.sum(w2y))


def heatmap_reduction(heatmaps: Tensor, radius: int, threshold: float = 0.01) -> Tensor:
    """Find the maximum of every heatmap, to a fraction of a pixel, and its moments; what `lgcn_fast.peaks` calls
    `peak_centroids` and `window_moments` (of all pixels), in one reading.

    The moments are the sums of w^2, w^2 x and w^2 y over the pixels with a value w above the threshold (section 3.3),
    in fp32. NaN counts as minus infinity.

    Args:
        heatmaps: (B, N, H, W) float32, float16 or bfloat16, contiguous, at least one pixel, on a GPU.
        radius: half side of the window that places the point, pixels; 0: the point is the largest pixel.
        threshold: of the moments.

    Returns:
        (B, N, 6) float32: x and y in pixels, the largest pixel's value, the sums of w^2, w^2 x, w^2 y.

    Raises:
        ValueError: another shape, dtype, layout or device, or a radius that is no whole number or below 0.
    """
    if not (isinstance(radius, int) and radius >= 0):
        raise ValueError(f"radius: expected 0 or more whole pixels, got {radius}")
    fits = heatmaps.ndim == 4 and heatmaps.dtype in DTYPES and heatmaps.is_contiguous()
    # (A square may reach beyond the last pixel.)
    if not fits or not 0 < heatmaps.shape[2] * heatmaps.shape[3] < 2**31 - max(NUM_WARPS):
        expected = "contiguous (B, N, H, W) float32, float16 or bfloat16 with 1 to about 2**31 pixels"
        raise ValueError(f"heatmaps: expected {expected}, got {described(heatmaps)}")
    batch, channels, height, width = heatmaps.shape
    out = torch.empty((batch, channels, 6), dtype=torch.float32, device=heatmaps.device)
    if out.numel():
        side = 32 if width % 32 == 0 else 16
        _heatmap_reduction_kernel[(batch * channels,)](
            heatmaps, out, height, width, float(threshold), SIDE=side,
            RADIUS=radius, LANES=triton.next_power_of_2((2 * radius + 1) ** 2), num_warps=NUM_WARPS[side],
            enable_fp_fusion=True,
        )  # fmt: skip
    return out
