"""The kernel convolution in Triton, forward and backward, for CUDA tensors (or, with TRITON_INTERPRET=1, any).

A zero-padded convolution along a line is a banded matrix T_s, so `K * X = sum_s T_s X T_s`: programs multiply maps with
the bands, on tensor cores. Maps of about 96 x 96 in half precision are split into even and odd parts, which halves the
work.
"""

from functools import cache
from threading import Lock

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from . import BF16_TOLERANCE, kernel_taps

TOLERANCES = {torch.float32: 0.0, torch.float16: 2.0**-15, torch.bfloat16: BF16_TOLERANCE}
"""Of `kernel_taps`. Fewer lines, fewer products."""
HALF = 64
"""Rows and columns of half a map that is split into even and odd parts, filled up: the least for Hopper's tensor cores.
With smaller maps it would take longer."""
BLOCK = {torch.float32: 32, torch.float16: 64, torch.bfloat16: 64}
"""Rows or columns of a program's part of others at most: what it sees of its neighbours needs room, too."""
NUM_STAGES = 2
"""The next band is loaded while products are made with this one. (3 take 3 % less time on an H200 to fp16, as much to
bf16, and of 100 KB of shared memory the room of a second program; `benchmarks/results/h200/tiles.json`.)"""
_MAKING_BANDS = Lock()
"""Two threads that miss bands at once would both make them, and only those of the second would be kept: but a recorded
CUDA graph may read those of the first."""


@triton.jit
def _inside(index, length):
    return (index >= 0) & (index < length)


@triton.jit
def _gaussian_sum_kernel(
    x_ptr,
    bands_y_ptr,
    bands_x_ptr,
    out_ptr,
    height,
    width,
    channels,
    first_side,
    COUNT: tl.constexpr,
    REACH_Y: tl.constexpr,
    REACH_X: tl.constexpr,
    BLOCK_Y: tl.constexpr,
    BLOCK_X: tl.constexpr,
    NUM_STAGES: tl.constexpr,
):
    WHOLE_SQUARE: tl.constexpr = REACH_Y == 0 and REACH_X == 0 and BLOCK_Y == BLOCK_X
    map_index = tl.program_id(0)
    start = map_index.to(tl.int64) * height * width
    is_side = map_index % channels >= first_side
    block_y, block_x = tl.program_id(1), tl.program_id(2)
    y, x = tl.arange(0, BLOCK_Y), tl.arange(0, BLOCK_X)
    rows, columns = block_y * BLOCK_Y + y, block_x * BLOCK_X + x
    dtype = x_ptr.dtype.element_ty
    total = tl.zeros((BLOCK_Y, BLOCK_X), tl.float32)
    # What the kernel reaches of the map: it ends at its border.
    for near_y in range(-tl.minimum(REACH_Y, block_y), tl.minimum(REACH_Y, tl.num_programs(1) - 1 - block_y) + 1):
        seen_rows = rows + near_y * BLOCK_Y
        bands_y = bands_y_ptr + (near_y + REACH_Y) * COUNT * BLOCK_Y * BLOCK_Y + y[:, None] * BLOCK_Y + y[None, :]
        for near_x in range(-tl.minimum(REACH_X, block_x), tl.minimum(REACH_X, tl.num_programs(2) - 1 - block_x) + 1):
            seen_columns = columns + near_x * BLOCK_X
            inside = _inside(seen_rows, height)[:, None] & _inside(seen_columns, width)[None, :]
            seen = tl.load(x_ptr + start + seen_rows[:, None] * width + seen_columns[None, :], mask=inside, other=0.0)
            seen = tl.where(is_side, tl.maximum(seen, 0.0), seen).to(dtype)
            bands_x = bands_x_ptr + (REACH_X - near_x) * COUNT * BLOCK_X * BLOCK_X + x[:, None] * BLOCK_X + x[None, :]
            for s in tl.range(COUNT, num_stages=NUM_STAGES):
                band_y = tl.load(bands_y + s * BLOCK_Y * BLOCK_Y)
                band_x = band_y if WHOLE_SQUARE else tl.load(bands_x + s * BLOCK_X * BLOCK_X)
                along_y = tl.dot(band_y, seen, input_precision="tf32x3")
                total = tl.dot(along_y.to(dtype), band_x, total, input_precision="tf32x3")
    inside = _inside(rows, height)[:, None] & _inside(columns, width)[None, :]
    out = out_ptr + start + rows[:, None] * width + columns[None, :]
    tl.store(out, total.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _turned(x, turn, dtype: tl.constexpr):
    """The columns from last to first, for a result of a dtype: exact to the bit in half precision, else to 16 bits (of
    float16 bands as far down as their exponents reach)."""
    part: tl.constexpr = dtype if dtype.primitive_bitwidth == 16 else turn.dtype
    turn = turn.to(part)
    large = x.to(part)
    turned = tl.dot(large, turn)
    if part != dtype:
        turned = tl.dot((x - large.to(tl.float32)).to(part), turn, turned)
    return turned.to(dtype)


@triton.jit
def _even_odd_kernel(
    x_ptr,
    bands_y_ptr,
    bands_x_ptr,
    out_ptr,
    height,
    width,
    half_height,
    half_width,
    channels,
    first_side,
    COUNT: tl.constexpr,
    SAME: tl.constexpr,
    HALF: tl.constexpr,
    NUM_STAGES: tl.constexpr,
):
    map_index = tl.program_id(0)
    x_ptr += map_index.to(tl.int64) * height * width
    out_ptr += map_index.to(tl.int64) * height * width
    y, x = tl.arange(0, HALF), tl.arange(0, HALF)
    dtype = x_ptr.dtype.element_ty
    out_dtype = out_ptr.dtype.element_ty
    # The bottom is read and written upwards. The right half is not read backwards, which would be pixel by pixel: it is
    # turned by a product, which is exact.
    top, bottom = (y * width)[:, None], ((height - 1 - y) * width)[:, None]
    left, right = x[None, :], (width - HALF + x)[None, :]
    turn = tl.load(bands_x_ptr + 2 * COUNT * HALF * HALF + x[:, None] * HALF + x[None, :])
    on_left = (y < half_height)[:, None] & (x < half_width)[None, :]
    on_right = (y < half_height)[:, None] & (x >= HALF - half_width)[None, :]
    least = tl.where(map_index % channels >= first_side, 0.0, float("-inf"))
    top_left = tl.maximum(tl.load(x_ptr + top + left, mask=on_left, other=0.0).to(tl.float32), least)
    top_right = tl.maximum(tl.dot(tl.load(x_ptr + top + right, mask=on_right, other=0.0), turn), least)
    bottom_left = tl.maximum(tl.load(x_ptr + bottom + left, mask=on_left, other=0.0).to(tl.float32), least)
    bottom_right = tl.maximum(tl.dot(tl.load(x_ptr + bottom + right, mask=on_right, other=0.0), turn), least)
    # Even or odd along y, along x.
    top_even, top_odd = 0.25 * (top_left + top_right), 0.25 * (top_left - top_right)
    bottom_even, bottom_odd = 0.25 * (bottom_left + bottom_right), 0.25 * (bottom_left - bottom_right)
    seen_ee, seen_eo = (top_even + bottom_even).to(dtype), (top_odd + bottom_odd).to(dtype)
    seen_oe, seen_oo = (top_even - bottom_even).to(dtype), (top_odd - bottom_odd).to(dtype)
    ee = tl.zeros((HALF, HALF), tl.float32)
    eo = tl.zeros((HALF, HALF), tl.float32)
    oe = tl.zeros((HALF, HALF), tl.float32)
    oo = tl.zeros((HALF, HALF), tl.float32)
    bands_y = bands_y_ptr + y[:, None] * HALF + y[None, :]
    bands_x = bands_x_ptr + x[None, :] * HALF + x[:, None]
    # The bands are zero beyond these, which need not be read.
    in_y = (y < half_height)[:, None] & (y < half_height)[None, :]
    in_x = (x < half_width)[:, None] & (x < half_width)[None, :]
    for s in tl.range(COUNT, num_stages=NUM_STAGES):
        even_y = tl.load(bands_y + s * HALF * HALF, mask=in_y, other=0.0)
        odd_y = tl.load(bands_y + (COUNT + s) * HALF * HALF, mask=in_y, other=0.0)
        even_x = even_y if SAME else tl.load(bands_x + s * HALF * HALF, mask=in_x, other=0.0)
        odd_x = odd_y if SAME else tl.load(bands_x + (COUNT + s) * HALF * HALF, mask=in_x, other=0.0)
        ee = tl.dot(tl.dot(even_y, seen_ee).to(dtype), even_x, ee)
        eo = tl.dot(tl.dot(even_y, seen_eo).to(dtype), odd_x, eo)
        oe = tl.dot(tl.dot(odd_y, seen_oe).to(dtype), even_x, oe)
        oo = tl.dot(tl.dot(odd_y, seen_oo).to(dtype), odd_x, oo)
    beside = on_right & (x >= HALF - width // 2)[None, :]  # without the column in the middle, which is on the left
    even, odd = ee + oe, eo + oo
    tl.store(out_ptr + top + left, (even + odd).to(out_dtype), mask=on_left)
    tl.store(out_ptr + top + right, _turned(even - odd, turn, out_dtype), mask=beside)
    even, odd = ee - oe, eo - oo
    tl.store(out_ptr + bottom + left, (even + odd).to(out_dtype), mask=on_left)
    tl.store(out_ptr + bottom + right, _turned(even - odd, turn, out_dtype), mask=beside)


def gaussian_sum(
    x: Tensor,
    kernel_size: int = 45,
    sigmas: tuple[float, ...] = (1.0, 3.0, 5.0, 7.0, 9.0),
    first_side: int | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Convolve every channel with the sum of Gaussians K of Eq. 1; the reference is `lgcn_fast.gaussian_sum`.

    Sums are fp32; of bfloat16 K is up to 0.0015 off (its maximum is 1). K is symmetric, so the gradient is the same
    operation.

    Args:
        x: (B, C, H, W) float32, float16 or bfloat16, on a GPU. Results in float16 or of it must be below 65504.
        kernel_size: side of the truncated kernel in pixels, odd.
        sigmas: standard deviations of the Gaussians, in pixels.
        first_side: channels from this one on are the side branch: their ReLU in front of the convolution is computed
            on the way. Not for training.
        out: like `x`, contiguous, any floating-point dtype: where to write the result. Not for training.

    Returns:
        (B, C, H, W), dtype of `x`, or `out`.

    Raises:
        ValueError: another shape or dtype.
    """
    if x.ndim != 4 or x.dtype not in TOLERANCES:
        expected = "(B, C, H, W) float32, float16 or bfloat16"
        raise ValueError(f"x: expected {expected}, got {tuple(x.shape)} {x.dtype}")
    if out is not None and (out.shape != x.shape or not out.is_contiguous()):
        raise ValueError(
            f"out: expected {tuple(x.shape)}, contiguous, got {tuple(out.shape)} of strides {out.stride()}"
        )
    if first_side is not None or out is not None:
        return _launch(x, kernel_size, tuple(sigmas), x.shape[1] if first_side is None else first_side, out)
    return _GaussianSum.apply(x, kernel_size, tuple(sigmas))


@cache  # recorded CUDA graphs read them
def _bands(
    kernel_size: int, sigmas: tuple[float, ...], block: int, reach: int, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """The blocks of the matrices T_s, which depend on how far they lie from the diagonal alone: what a block of the
    result sees of the block `near` further on; kept on the device, since a launch must not wait for a copy.

    Returns:
        (2 * reach + 1, S, block, block), near = -reach to reach; symmetric but for the order of `near`.
    """
    blocks = [_matrices(kernel_size, sigmas, block, dtype, near * block) for near in range(-reach, reach + 1)]
    return torch.stack(blocks).to(device, dtype)


@cache
def _even_odd_bands(
    kernel_size: int, sigmas: tuple[float, ...], length: int, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """What the matrices T_s do to lines that are even, x_i = x_(length - 1 - i), and to odd ones: T_s is the same from
    both ends, so that they stay so, and half of a line says all.

    Returns:
        (2 S + 1, HALF, HALF): S for even ones, S for odd ones, zero beyond half the length, rounded up; and what turns
        a line of HALF pixels around.
    """
    matrices, half = _matrices(kernel_size, sigmas, length, dtype), (length + 1) // 2
    mirrored = matrices.flip(2)
    if length % 2:
        mirrored[..., half - 1] = 0  # the pixel in the middle is there once
    halves = torch.cat([matrices + mirrored, matrices - mirrored])[:, :half, :half]
    turn = torch.eye(HALF, dtype=halves.dtype, device="cpu").flip(1)
    return torch.cat([F.pad(halves, 2 * (0, HALF - half)), turn[None]]).to(device, dtype)


def _matrices(kernel_size: int, sigmas: tuple[float, ...], length: int, dtype: torch.dtype, offset: int = 0) -> Tensor:
    """The matrices T_s: what each pixel of a line sees of those that lie `offset` further on, (S, length, length)."""
    lines = torch.from_numpy(kernel_taps(kernel_size, sigmas, TOLERANCES[dtype]))
    index = torch.arange(length, device="cpu")  # whatever the default is
    tap = index[:, None] - index - offset + kernel_size // 2
    return torch.where((tap >= 0) & (tap < kernel_size), lines[:, tap.clamp(0, kernel_size - 1)], 0.0)


def _block(length: int, dtype: torch.dtype) -> int:
    """How many pixels along a side of a map a program computes; 16 are the least for a tensor core."""
    return min(max(triton.next_power_of_2(length), 16), BLOCK[dtype])


def _launch(
    x: Tensor, kernel_size: int, sigmas: tuple[float, ...], first_side: int, out: Tensor | None = None
) -> Tensor:
    x = x.contiguous()
    out = torch.empty_like(x) if out is None else out
    if not x.numel():
        return out
    batch, channels, height, width = x.shape
    if x.dtype != torch.float32 and all(HALF < length <= 2 * HALF for length in (height, width)):
        with _MAKING_BANDS:
            bands_y, bands_x = (
                _even_odd_bands(kernel_size, sigmas, length, x.dtype, x.device) for length in (height, width)
            )
        # (Halves are arguments, since of those Triton knows which are multiples of 16, and loads whole lines.)
        _even_odd_kernel[(batch * channels,)](
            x, bands_y, bands_x, out, height, width, (height + 1) // 2, (width + 1) // 2, channels, first_side,
            COUNT=len(bands_y) // 2, SAME=height == width and height % 2 == 0, HALF=HALF,
            NUM_STAGES=NUM_STAGES, num_warps=4, enable_fp_fusion=True,
        )  # fmt: skip
        return out
    block_y, block_x = (_block(length, x.dtype) for length in (height, width))
    grid = (batch * channels, triton.cdiv(height, block_y), triton.cdiv(width, block_x))
    # Blocks to each side that the kernel reaches, where there are as many.
    reach_y, reach_x = (min(triton.cdiv(kernel_size // 2, block), blocks - 1)
                        for block, blocks in ((block_y, grid[1]), (block_x, grid[2])))  # fmt: skip
    with _MAKING_BANDS:
        bands_y, bands_x = (_bands(kernel_size, sigmas, block, reach, x.dtype, x.device)
                            for block, reach in ((block_y, reach_y), (block_x, reach_x)))  # fmt: skip
    _gaussian_sum_kernel[grid](
        x, bands_y, bands_x, out, height, width, channels, first_side,
        COUNT=bands_y.shape[1], REACH_Y=reach_y, REACH_X=reach_x, BLOCK_Y=block_y, BLOCK_X=block_x,
        NUM_STAGES=NUM_STAGES, num_warps=4, enable_fp_fusion=True,
    )  # fmt: skip
    return out


class _GaussianSum(torch.autograd.Function):
    """`gaussian_sum` for autograd: nothing is saved, the backward pass is the forward pass."""

    @staticmethod
    def forward(ctx, x: Tensor, kernel_size: int, sigmas: tuple[float, ...]) -> Tensor:
        ctx.kernel = kernel_size, sigmas
        return _launch(x, kernel_size, sigmas, x.shape[1])

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None, None]:
        return _launch(gradient, *ctx.kernel, gradient.shape[1]), None, None
