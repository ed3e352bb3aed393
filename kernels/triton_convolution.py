"""A convolution with all that stands around it in one Triton kernel: an implicit matrix product on tensor cores.

The rows of the product are the filters, its columns the pixels of a block of the result, and what is summed over are
the taps and channels that a pixel sees. Where the channels of a pixel lie side by side, blocks of the image are loaded
through tensor descriptors, which also fill the zero padding; elsewhere element by element.
"""

import math
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from .tensors import described

FP8 = torch.float8_e4m3fn
"""Four bits of exponent, three of mantissa: from 2^-9 to 448."""
DTYPES = (torch.float32, torch.float16, torch.bfloat16, FP8)


@dataclass(frozen=True)
class Tile:
    """Launch constants; a program has `block_f` filters of `block_y` x `block_x` pixels, `block_k` terms a turn."""

    block_y: int
    block_x: int
    block_k: int
    block_f: int
    num_warps: int
    num_stages: int

    def stages(self, element_size: int, shared_memory: int) -> int:
        """`num_stages`, or as many as fit into so many bytes: each is a block of filters and one of pixels."""
        block = (self.block_f + self.block_y * self.block_x) * self.block_k * element_size
        return min(self.num_stages, max((shared_memory - 256) // block, 1))


TILES = {
    16: (Tile(8, 16, 16, 16, 4, 4), Tile(32, 32, 16, 16, 8, 3)),
    32: (Tile(8, 16, 32, 32, 4, 4), Tile(16, 32, 32, 32, 8, 3)),
    64: (Tile(4, 8, 64, 64, 4, 4), Tile(8, 16, 64, 64, 4, 3)),
    128: (Tile(4, 4, 128, 64, 4, 3), Tile(8, 16, 64, 128, 8, 4), Tile(16, 16, 64, 128, 8, 3)),
}
"""By the number of filters, rounded up: for few pixels, for many, and for very many. Those of 64 and 128 are the best
of 9 and 16 on an H100, where cuDNN is not (`CUDNN`), in batches of 1 to 64 (`benchmarks/results/h100/tiles.json`)."""
MANY_CHANNELS = 128
"""With more of them 16 filters take half of the time if they take 64 channels a turn, 32 filters three quarters
(`benchmarks/results/h200/tiles.json`, like the lines of 32 pixels in `tiles_of`)."""
PROGRAMS = (0, 64, 1000)
"""From so many programs on the tiles of `TILES` are used. 64 is half as many as an H100 has multiprocessors; with 1000
the last of its turns, in which some have nothing to do, hardly counts."""
FP8_TILES = (Tile(8, 8, 128, 64, 4, 3), Tile(8, 16, 128, 128, 4, 3), Tile(16, 16, 128, 128, 8, 3))
"""As `TILES`, for any number of filters. Hopper keeps some 14 bits of a sum of products of fp8, which is a 25th of the
error that rounding to fp8 makes anyway; to add up in fp32 every 128 terms would keep products from overlapping."""
LEAST_FP8_K = 32
"""Of `block_k`, of fp8."""
FP32_TILE = Tile(8, 8, 32, 64, 4, 3)
"""Three products on tensor cores for one of fp32, and twice the bytes: less fits into registers and shared memory. With
8 warps Triton lets both groups of 4 compute two of the three products, the same ones, which takes twice the time."""
BLOCK_C, BLOCK_P = 128, 64
"""Channels and pixels of a program of `channels_last`; the best for 136 maps of 96 x 96
(`benchmarks/results/h200/tiles.json`)."""
CUDNN = {(128, 3): 4 * 96 * 96, (64, 3): 32 * 96 * 96, (64, 5): 16 * 96 * 96}
"""By filters and their size: from so many pixels on cuDNN is faster, with bias and ReLU in the same call. It rounds the
bias: a face in a large batch may differ in the last bits from the same face alone."""
LARGEST_GATHERED_K = 32
"""Of `block_k` where the input is loaded element by element: each has an address, which takes registers."""


@triton.jit
def _convolution_kernel(
    x,
    weight,
    bias_ptr,
    scale_ptr,
    residual_ptr,
    out_ptr,
    height,
    width,
    out_height,
    out_width,
    tiles_y,
    tiles_x,
    x_batch,
    x_channel,
    x_row,
    x_column,
    out_batch,
    out_channel,
    out_row,
    out_column,
    residual_batch,
    CHANNELS: tl.constexpr,
    PADDED_CHANNELS: tl.constexpr,
    FILTERS: tl.constexpr,
    KERNEL_SIZE: tl.constexpr,
    DILATION: tl.constexpr,
    ORIGIN: tl.constexpr,
    RELU: tl.constexpr,
    SHUFFLE: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    BLOCK_Y: tl.constexpr,
    BLOCK_X: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_F: tl.constexpr,
    FILTER_BLOCKS: tl.constexpr,
):
    PIXELS: tl.constexpr = BLOCK_Y * BLOCK_X
    REACH: tl.constexpr = KERNEL_SIZE // 2 * DILATION
    TERMS: tl.constexpr = KERNEL_SIZE * KERNEL_SIZE * PADDED_CHANNELS
    program = tl.program_id(0)
    f0 = program % FILTER_BLOCKS * BLOCK_F
    tile = program // FILTER_BLOCKS
    x0, y0 = tile % tiles_x * BLOCK_X, tile // tiles_x % tiles_y * BLOCK_Y
    image = tile // tiles_x // tiles_y
    pixel = tl.arange(0, PIXELS)
    rows, columns = y0 + pixel // BLOCK_X, x0 + pixel % BLOCK_X
    filters = f0 + tl.arange(0, BLOCK_F)
    dtype = weight.dtype if DESCRIPTORS else weight.dtype.element_ty
    total = tl.zeros((BLOCK_F, PIXELS), tl.float32)
    for k0 in range(0, TERMS, BLOCK_K):
        if DESCRIPTORS:  # all of a block's terms belong to one tap
            tap = k0 // PADDED_CHANNELS
            seen_y, seen_x = y0 + tap // KERNEL_SIZE * DILATION - REACH, x0 + tap % KERNEL_SIZE * DILATION - REACH
            seen = tl.reshape(x.load([image, seen_y, seen_x, k0 % PADDED_CHANNELS]), (PIXELS, BLOCK_K))
            filter_block = weight.load([f0, k0])
        else:
            term = k0 + tl.arange(0, BLOCK_K)
            tap, channel = term // PADDED_CHANNELS, term % PADDED_CHANNELS
            is_term = (term < TERMS) & (channel < CHANNELS)
            seen_rows = rows[:, None] + (tap // KERNEL_SIZE * DILATION - REACH)[None, :]
            seen_columns = columns[:, None] + (tap % KERNEL_SIZE * DILATION - REACH)[None, :]
            inside = (seen_rows >= 0) & (seen_rows < height) & (seen_columns >= 0) & (seen_columns < width)
            offsets = image.to(tl.int64) * x_batch + seen_rows.to(tl.int64) * x_row + seen_columns * x_column
            offsets += channel[None, :] * x_channel
            seen = tl.load(x + offsets, mask=inside & is_term[None, :], other=1.0 * ORIGIN)  # (fp8 is made of no int)
            if ORIGIN:
                seen = seen.to(tl.float32) - ORIGIN
            seen = seen.to(dtype)
            kept = (filters < FILTERS)[:, None] & is_term[None, :]
            filter_block = tl.load(weight + filters[:, None] * TERMS + term[None, :], mask=kept, other=0.0)
        # The filters in front: what is reshaped there would come to the tensor cores through registers, and Triton (3.6
        # to 3.9) loads the next block into them while the last products still read them, on Hopper.
        total = tl.dot(filter_block, tl.trans(seen), total, input_precision="tf32x3")  # (of fp32, as exact)
    if scale_ptr is not None:
        total *= tl.load(scale_ptr + filters, mask=filters < FILTERS, other=0.0)[:, None]
    total += tl.load(bias_ptr + filters, mask=filters < FILTERS, other=0.0)[:, None]
    if RELU:
        total = tl.maximum(total, 0.0)
    if SHUFFLE == 1:
        inside = (filters < FILTERS)[:, None] & ((rows < height) & (columns < width))[None, :]
        places = rows.to(tl.int64) * out_row + columns * out_column
        places = filters[:, None].to(tl.int64) * out_channel + places[None, :]
    else:
        channel, part = filters // (SHUFFLE * SHUFFLE), filters % (SHUFFLE * SHUFFLE)
        out_rows = (part // SHUFFLE)[:, None] + rows[None, :] * SHUFFLE
        out_columns = (part % SHUFFLE)[:, None] + columns[None, :] * SHUFFLE
        inside = (filters < FILTERS)[:, None] & (out_rows < out_height) & (out_columns < out_width)
        places = out_rows.to(tl.int64) * out_row + out_columns * out_column
        places += channel[:, None].to(tl.int64) * out_channel
    if residual_ptr is not None:
        residual = residual_ptr + image.to(tl.int64) * residual_batch + places
        total += tl.load(residual, mask=inside, other=0.0).to(tl.float32)
    out = out_ptr + image.to(tl.int64) * out_batch + places
    tl.store(out, total.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _channels_last_kernel(x, out, channels, pixels, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr):
    image = tl.program_id(2).to(tl.int64) * channels * pixels
    channel = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    pixel = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)
    inside = (channel < channels)[:, None] & (pixel < pixels)[None, :]
    block = tl.load(x + image + channel[:, None].to(tl.int64) * pixels + pixel[None, :], mask=inside)
    places = pixel[:, None].to(tl.int64) * channels + channel[None, :]
    tl.store(out + image + places, tl.trans(block.to(out.dtype.element_ty)), mask=tl.trans(inside))


def channels_last(x: Tensor, dtype: torch.dtype) -> Tensor:
    """`x.to(dtype, memory_format=torch.channels_last)` in one pass that reads and writes whole lines.

    Args:
        x: (B, C, H, W) floating point, contiguous.

    Returns:
        (B, C, H, W), channels-last.

    Raises:
        ValueError: another shape or layout.
    """
    if x.ndim != 4 or not x.is_contiguous():
        raise ValueError(f"x: expected contiguous (B, C, H, W), got {described(x)}")
    batch, channels, height, width = x.shape
    out = torch.empty(x.shape, dtype=dtype, device=x.device, memory_format=torch.channels_last)
    if out.numel():
        grid = (triton.cdiv(height * width, BLOCK_P), triton.cdiv(channels, BLOCK_C), batch)
        _channels_last_kernel[grid](
            x, out, channels, height * width, BLOCK_C=BLOCK_C, BLOCK_P=BLOCK_P, enable_fp_fusion=True
        )
    return out


@lru_cache
def shared_memory(device: torch.device) -> int:
    """Bytes that a program may have; none is too many where kernels are interpreted."""
    return torch.cuda.get_device_properties(device).shared_memory_per_block_optin if device.type == "cuda" else 2**30


def tiles_of(filters: int, channels: int, kernel_size: int, dtype: torch.dtype, planes: bool) -> tuple[Tile, ...]:
    """The launch constants of a layer, as in `TILES`."""
    size = min(max(triton.next_power_of_2(filters), min(TILES)), max(TILES))
    tiles = TILES[size]
    if dtype == torch.float32:
        tiles = (replace(FP32_TILE, block_k=min(FP32_TILE.block_k, size), block_f=min(FP32_TILE.block_f, size)),)
    elif dtype == FP8:
        # (With nine taps the large blocks have nothing to do while the last of them are loaded and written.)
        tiles = FP8_TILES if kernel_size > 3 else FP8_TILES[:2]
        tiles = tuple(replace(tile, block_f=min(tile.block_f, size)) for tile in tiles)
    elif size < 64 and channels > MANY_CHANNELS:
        tiles = (replace(tiles[0], block_k=64),)
    # Where each element has an address, which takes registers: of the result, of the input.
    if planes:
        tiles = [replace(tile, block_f=min(tile.block_f, 64), num_warps=8, num_stages=2) for tile in tiles[:2]]
        if len(tiles) > 1 and size >= 64:  # lines of 32 pixels, since those of a channel lie side by side in the result
            rows, warps = (4, 8) if filters > 128 else (2, 4)
            tiles[1] = replace(tiles[1], block_y=rows, block_x=32, num_warps=warps)
    if channels < 16:
        tiles = tuple(replace(tile, block_y=min(tile.block_y, 8), block_x=min(tile.block_x, 16)) for tile in tiles)
    # Filled up with zeros to whole blocks, the channels become at most half as many again, or one of the least blocks.
    largest, least = max(tile.block_k for tile in tiles), LEAST_FP8_K if dtype == FP8 else 16
    while largest > least and padded(channels, largest) > 1.5 * channels:
        largest //= 2
    return tuple(replace(tile, block_k=min(tile.block_k, largest)) for tile in tiles)


def padded(channels: int, block_k: int) -> int:
    """Channels as blocks of them hold them; few are not filled up, but loaded one by one."""
    return channels if channels < 16 else -(-channels // block_k) * block_k


class Convolution:
    """A zero-padded convolution, its bias and what follows; the reference is `torch.nn.functional.conv2d`."""

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor,
        dilation: int = 1,
        relu: bool = False,
        origin: int = 0,
        planes: bool = False,
        shuffle: int = 1,
        tile: Tile | None = None,
        scale: Tensor | None = None,
        out_dtype: torch.dtype | None = None,
    ) -> None:
        """Put the filters where the kernel wants them.

        Args:
            weight: (F, C, k, k) with odd k, of `DTYPES`: the dtype of the products; sums are fp32.
            bias: (F,).
            relu: end with a ReLU.
            origin: value of the input that counts as 0, also that of its padding.
            planes: the result's channels lie one after the other, contiguous; otherwise those of a pixel side by side.
            shuffle: a square of so many pixels a side is made of the filters of a pixel (`F.pixel_shuffle`).
            tile: launch constants; default: those of `TILES`, or cuDNN, by the size of a batch.
            scale: (F,), which the sums are multiplied by before the bias is added; 1, if None.
            out_dtype: of the result, default that of the filters; what fp8 cannot hold becomes its largest number.

        Raises:
            ValueError: another shape or dtype.
        """
        if weight.ndim != 4 or weight.shape[2] != weight.shape[3] or weight.shape[2] % 2 == 0:
            raise ValueError(f"weight: expected (F, C, k, k) with odd k, got {tuple(weight.shape)}")
        if weight.dtype not in DTYPES:
            raise ValueError(f"weight: expected float32, float16, bfloat16 or float8_e4m3fn, got {weight.dtype}")
        for name, part in (("bias", bias), ("scale", scale)):
            if part is not None and part.shape != weight.shape[:1]:
                raise ValueError(f"{name}: expected ({len(weight)},), got {tuple(part.shape)}")
        self.filters, self.channels, self.kernel_size, _ = weight.shape
        self.dilation, self.relu, self.origin, self.planes, self.shuffle = dilation, relu, origin, planes, shuffle
        self.tiles = (tile,) if tile else tiles_of(self.filters, self.channels, self.kernel_size, weight.dtype, planes)
        self.padded_channels = padded(self.channels, max(tile.block_k for tile in self.tiles))
        bits = weight.view(torch.uint8) if weight.dtype == FP8 else weight  # (torch cannot pad fp8)
        whole = F.pad(bits, (0, 0, 0, 0, 0, self.padded_channels - self.channels)).view(weight.dtype)
        self.weight = whole.permute(0, 2, 3, 1).reshape(self.filters, -1).contiguous()
        self.bias = bias.float().contiguous()
        self.scale = None if scale is None else scale.float().contiguous()
        self.out_dtype = out_dtype or weight.dtype
        self._cudnn = None
        plain = scale is None and self.out_dtype == weight.dtype and not (origin or planes or tile)
        if (self.filters, self.kernel_size) in CUDNN and relu and plain and weight.dtype != FP8:
            self._cudnn = weight.contiguous(memory_format=torch.channels_last), bias.to(weight.dtype)

    def __call__(self, x: Tensor, residual: Tensor | None = None, out: Tensor | None = None) -> Tensor:
        """Convolve a batch of images.

        Args:
            x: (B, C, H, W), any strides and dtype; fastest channels-last in the filters' dtype.
            residual: as large as the result, with as many channels or more, added in the end; in memory as the result.
            out: to write to: any dtype; with a shuffle it may end before the last rows and columns.

        Returns:
            (B, F, H, W), with a shuffle of S (B, F / S^2, S H, S W), `out_dtype`; or `out`.

        Raises:
            ValueError: another shape, also of `out`, or a residual that lies otherwise in memory.
        """
        if x.ndim != 4 or x.shape[1] != self.channels:
            raise ValueError(f"x: expected (B, {self.channels}, H, W), got {tuple(x.shape)}")
        batch, _, height, width = x.shape
        size = (batch, self.filters // self.shuffle**2, height * self.shuffle, width * self.shuffle)
        if out is not None and not self._fits_result(out.shape, size):
            raise ValueError(f"out: expected {size}, with a shuffle at most as high and wide, got {tuple(out.shape)}")
        if out is None and residual is None and self._is_faster_in_cudnn(x):
            padding = 2 * (self.kernel_size // 2 * self.dilation,)
            dilation = 2 * (self.dilation,)
            return torch.cudnn_convolution_relu(x, self._cudnn[0], self._cudnn[1], (1, 1), padding, dilation, 1)
        if out is None:
            layout = torch.contiguous_format if self.planes else torch.channels_last
            out = torch.empty(size, dtype=self.out_dtype, device=x.device, memory_format=layout)
        if residual is not None and residual.stride()[1:] != out.stride()[1:]:
            raise ValueError(f"residual: expected strides {out.stride()}, got {residual.stride()}")
        tile = self._tile(batch, height, width)
        tiles_y, tiles_x, filter_blocks = self._grid(tile, height, width)
        descriptors = self._fits_descriptors(x, tile)
        weight: Tensor | TensorDescriptor = self.weight
        seen: Tensor | TensorDescriptor = x
        if descriptors:
            weight = TensorDescriptor.from_tensor(self.weight, [tile.block_f, tile.block_k])
            block = [1, tile.block_y, tile.block_x, tile.block_k]
            seen = TensorDescriptor.from_tensor(x.permute(0, 2, 3, 1), block)
        if out.numel():
            _convolution_kernel[(batch * tiles_y * tiles_x * filter_blocks,)](
                seen, weight, self.bias, self.scale, residual, out, height, width, *out.shape[2:], tiles_y, tiles_x,
                *x.stride(), *out.stride(),
                0 if residual is None else residual.stride(0),
                CHANNELS=self.channels, PADDED_CHANNELS=self.padded_channels, FILTERS=self.filters,
                KERNEL_SIZE=self.kernel_size, DILATION=self.dilation,
                ORIGIN=self.origin, RELU=self.relu, SHUFFLE=self.shuffle, DESCRIPTORS=descriptors,
                BLOCK_Y=tile.block_y, BLOCK_X=tile.block_x, BLOCK_F=tile.block_f,
                BLOCK_K=tile.block_k if descriptors else min(tile.block_k, LARGEST_GATHERED_K),
                FILTER_BLOCKS=filter_blocks, num_warps=tile.num_warps,
                num_stages=tile.stages(self.weight.element_size(), shared_memory(x.device)),
                enable_fp_fusion=True,  # Triton 3.9 warns where it is not said
            )  # fmt: skip
        return out

    def _fits_result(self, shape: torch.Size, size: tuple[int, ...]) -> bool:
        if self.shuffle == 1:
            return shape == size
        return len(shape) == 4 and shape[:2] == size[:2] and shape[2] <= size[2] and shape[3] <= size[3]

    def _tile(self, batch: int, height: int, width: int) -> Tile:
        """The launch constants for a batch of images."""
        programs = [batch * math.prod(self._grid(tile, height, width)) for tile in self.tiles]
        enough = [tile for tile, count, least in zip(self.tiles, programs, PROGRAMS, strict=False) if count >= least]
        return enough[-1]

    def _grid(self, tile: Tile, height: int, width: int) -> tuple[int, int, int]:
        """Programs an image, along y, x and the filters."""
        cdiv = triton.cdiv
        return cdiv(height, tile.block_y), cdiv(width, tile.block_x), cdiv(self.filters, tile.block_f)

    def _is_faster_in_cudnn(self, x: Tensor) -> bool:
        """Whether a batch on a GPU, channels-last in half precision, has enough pixels, as in `CUDNN`."""
        if not self._cudnn or not x.is_cuda or x.dtype != self.weight.dtype or x.dtype == torch.float32:
            return False
        enough = x.numel() // self.channels >= CUDNN[self.filters, self.kernel_size]
        return enough and x.is_contiguous(memory_format=torch.channels_last)

    def _fits_descriptors(self, x: Tensor, tile: Tile) -> bool:
        """Whether blocks of `x` and of the filters can be loaded as a whole: 16 bytes are the least."""
        image, channel, *line = x.stride()
        aligned = channel == 1 and all(stride * x.element_size() % 16 == 0 for stride in (image, *line))
        whole = self.padded_channels % tile.block_k == 0 and tile.block_k * x.element_size() >= 16
        return aligned and whole and not self.origin and x.dtype == self.weight.dtype and x.data_ptr() % 16 == 0
