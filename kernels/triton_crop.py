"""Faces cut out of frames, and lit, in Triton, for CUDA tensors (or, with TRITON_INTERPRET=1, any).

The same bytes as OpenCV computes on the host: one pixel that differs by one level can tip the choice between two peaks
of a heatmap, and a landmark moves by pixels.
"""

from collections.abc import Sequence

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from .tensors import described

ELEMENTS = 512
"""Of a program's tile, target pixels times the rows that each of them sees. Not compared with others."""
NUM_WARPS = 4
"""4 elements of a tile per thread. Not compared with others."""
LIT_BLOCK = 4096
"""Pixels of a face that its program lights at once. Not compared with others."""
LARGEST_SIDE = 16384
"""Of a crop, pixels: keeps 32-bit arithmetic from overflowing."""
LARGEST_BOX = 2**15
"""Pixels of a side, likewise: of the largest face that is predicted, however it leans, 16384 times the root of 2."""


@triton.jit
def _load(image_ptr, y, x, top, left, height, width, stride_y, stride_x, stride_c, mask, TO_GRAY: tl.constexpr):
    """Pixels (y, x) of a box as int32; beyond the image the border's pixels repeat."""
    y = tl.minimum(tl.maximum(top + y, 0), height - 1).to(tl.int64)
    x = tl.minimum(tl.maximum(left + x, 0), width - 1).to(tl.int64)
    pixel_ptr = image_ptr + y * stride_y + x * stride_x
    value = tl.load(pixel_ptr, mask=mask, other=0).to(tl.int32)
    if TO_GRAY:
        green = tl.load(pixel_ptr + stride_c, mask=mask, other=0).to(tl.int32)
        blue = tl.load(pixel_ptr + 2 * stride_c, mask=mask, other=0).to(tl.int32)
        # 0.299, 0.587 and 0.114 of 2**15, as OpenCV rounds them.
        value = (9798 * value + 19235 * green + 3735 * blue + 16384) >> 15
    return value


@triton.jit
def _interpolation(target, side, size):
    """Of cv2.INTER_LINEAR along a line: the first of two source pixels and the weight of the second, of 2048."""
    position = (2 * target + 1) * side - size  # Of the target pixel's centre, in source pixels times 2 size.
    first = (position + 2 * size) // (2 * size) - 1
    return first, ((position - first * 2 * size) * 2048 + size) // (2 * size)


@triton.jit
def _overlap(target, source, cells, parts):
    """Of cv2.INTER_AREA along a line: what target and source pixel have in common, where they are `cells` and `parts`
    long; 0 where nothing."""
    low, high = tl.maximum(target * cells, source * parts), tl.minimum((target + 1) * cells, (source + 1) * parts)
    return tl.maximum(high - low, 0).to(tl.float32)


@triton.jit
def _enlarged(
    image_ptr, target_y, target_x, side, size, top, left, height, width, stride_y, stride_x, stride_c, inside,
    TO_GRAY: tl.constexpr,
):  # fmt: skip
    """Target pixels (P,) of a box as cv2.INTER_LINEAR interpolates them."""
    y, weight_y = _interpolation(target_y, side, size)
    x, weight_x = _interpolation(target_x, side, size)
    y0, y1 = tl.maximum(y, 0), tl.minimum(y + 1, side - 1)
    x0, x1 = tl.maximum(x, 0), tl.minimum(x + 1, side - 1)
    v00 = _load(image_ptr, y0, x0, top, left, height, width, stride_y, stride_x, stride_c, inside, TO_GRAY)
    v01 = _load(image_ptr, y0, x1, top, left, height, width, stride_y, stride_x, stride_c, inside, TO_GRAY)
    v10 = _load(image_ptr, y1, x0, top, left, height, width, stride_y, stride_x, stride_c, inside, TO_GRAY)
    v11 = _load(image_ptr, y1, x1, top, left, height, width, stride_y, stride_x, stride_c, inside, TO_GRAY)
    upper = v00 * (2048 - weight_x) + v01 * weight_x
    lower = v10 * (2048 - weight_x) + v11 * weight_x
    # Cut off where OpenCV does, which works in 16 bits.
    return ((((2048 - weight_y) * (upper >> 4)) >> 16) + ((weight_y * (lower >> 4)) >> 16) + 2) >> 2


@triton.jit
def _averaged(
    image_ptr, target_y, target_x, cells, parts, top, left, height, width, stride_y, stride_x, stride_c, inside,
    TO_GRAY: tl.constexpr, TAPS: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """Target pixels (P,) of a box as cv2.INTER_AREA averages what they cover, at most TAPS pixels along a line."""
    # A source pixel's weight is its share of the target pixel; but OpenCV divides last where all are whole.
    length = tl.where(parts == 1, 1, cells).to(tl.float32)
    area = tl.where(parts == 1, cells * cells, 1)
    # Its sums are rounded, so the order counts: along every row that a target pixel sees, then down the rows.
    tap = tl.arange(0, TAPS)[:, None]
    y = (target_y * cells // parts)[None, :] + tap
    weight_y = tl.div_rn(_overlap(target_y[None, :], y, cells, parts), length)
    rows = tl.zeros((TAPS, BLOCK_P), tl.float32)
    for k in range(TAPS):
        x = target_x * cells // parts + k
        weight_x = tl.div_rn(_overlap(target_x, x, cells, parts), length)[None, :]
        seen = (weight_y > 0) & (weight_x > 0) & inside[None, :]
        value = _load(image_ptr, y, x[None, :], top, left, height, width, stride_y, stride_x, stride_c, seen, TO_GRAY)
        rows += weight_x * value.to(tl.float32)
    total = tl.zeros((BLOCK_P,), tl.float32)
    for k in range(TAPS):
        total += tl.sum(tl.where(tap == k, weight_y * rows, 0.0), axis=0)
    mean = total * (1.0 / area.to(tl.float64)).to(tl.float32)
    level = mean.to(tl.int32)
    rest = mean - level.to(tl.float32)
    # Halves go to the even number, or, where the side is twice the size, up: OpenCV's special case.
    half_up = (level % 2 == 1) | ((cells == 2) & (parts == 1))
    return level + ((rest > 0.5) | ((rest == 0.5) & half_up)).to(tl.int32)


@triton.jit
def _crop_kernel(
    image_ptr,
    places_ptr,
    out_ptr,
    height,
    width,
    stride_f,
    stride_y,
    stride_x,
    stride_c,
    size,
    blocks,
    TO_GRAY: tl.constexpr,
    TAPS: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    face, channel = tl.program_id(0) // blocks, tl.program_id(1)
    place_ptr = places_ptr + face * 5
    frame, left, top = tl.load(place_ptr), tl.load(place_ptr + 1), tl.load(place_ptr + 2)
    side, divisor = tl.load(place_ptr + 3), tl.load(place_ptr + 4)
    image_ptr += frame.to(tl.int64) * stride_f + channel.to(tl.int64) * stride_c
    pixels = tl.program_id(0) % blocks * BLOCK_P + tl.arange(0, BLOCK_P)
    inside = pixels < size * size
    target_y, target_x = pixels // size, pixels % size
    if side < size:
        result = _enlarged(
            image_ptr, target_y, target_x, side, size, top, left, height, width, stride_y, stride_x, stride_c, inside,
            TO_GRAY,
        )  # fmt: skip
    else:
        result = _averaged(
            image_ptr, target_y, target_x, side // divisor, size // divisor, top, left, height, width,
            stride_y, stride_x, stride_c, inside, TO_GRAY, TAPS, BLOCK_P,
        )  # fmt: skip
    start = (face.to(tl.int64) * tl.num_programs(1) + channel) * size * size
    tl.store(out_ptr + start + pixels, result.to(tl.uint8), mask=inside)


def crop(
    images: Tensor,
    boxes: np.ndarray,
    size: int,
    gray: bool = False,
    frames: Sequence[int] | np.ndarray | None = None,
) -> Tensor:
    """Cut squares of whole pixels out of frames and resize them; beyond the frame the border's pixels repeat.

    The pixels of `lgcn_fast.images.crop`, whose resizing OpenCV does (cv2.INTER_AREA to shrink, cv2.INTER_LINEAR to
    enlarge). The host does not wait for the device.

    Args:
        images: (F, H, W) or, in RGB order, (F, H, W, 3), uint8 with any strides, on a GPU.
        boxes: (B, 4) integers x, y, side, side, on the host, as from `lgcn_fast.images.square_box`; each must meet its
            frame.
        size: side of the crops in pixels.
        gray: convert RGB to grayscale, before it is resized.
        frames: (B,) integers, the frame that each box is cut from. Default: box i is cut from frame i.

    Returns:
        (B, C, size, size) uint8: one channel with `gray`, otherwise three; of frames without colours three equal ones.

    Raises:
        ValueError: another shape, dtype, layout or device, a frame that does not exist, a box that is no square, has
            more than 32768 pixels a side or does not meet its frame.
    """
    if images.ndim not in (3, 4) or images.dtype != torch.uint8 or (images.ndim == 4 and images.shape[3] != 3):
        raise ValueError(f"images: expected (F, H, W) or (F, H, W, 3) uint8, got {described(images)}")
    if not 0 < size <= LARGEST_SIDE:
        raise ValueError(f"size: expected 1 to {LARGEST_SIDE} pixels, got {size}")
    boxes, frames = _checked_boxes(boxes, frames, images)
    out = torch.empty((len(boxes), 1 if gray else 3, size, size), dtype=torch.uint8, device=images.device)
    if len(boxes):
        _launch(images, boxes, frames, size, gray, out)
    return out


def _checked_boxes(
    boxes: np.ndarray, frames: Sequence[int] | np.ndarray | None, images: Tensor
) -> tuple[np.ndarray, np.ndarray]:
    """Boxes (B, 4) and frames (B,) that the kernel can rely on."""
    boxes = np.asarray(boxes)
    if boxes.ndim != 2 or boxes.shape[1] != 4 or not np.issubdtype(boxes.dtype, np.integer):
        raise ValueError(f"boxes: expected (B, 4) integers, got {boxes.shape} {boxes.dtype}")
    frames = np.arange(len(boxes)) if frames is None else np.asarray(frames)
    count, height, width = images.shape[:3]
    if frames.shape != (len(boxes),) or (len(boxes) and not np.issubdtype(frames.dtype, np.integer)):
        raise ValueError(f"frames: expected ({len(boxes)},) integers, got {frames.shape} {frames.dtype}")
    for index in np.flatnonzero((frames < 0) | (frames >= count)):
        raise ValueError(f"frames[{index}]: expected one of {count} frames, got {frames[index]}")
    x, y, side, other_side = boxes.T
    fits = (side == other_side) & (side > 0) & (side <= LARGEST_BOX)
    for index in np.flatnonzero(~(fits & (x < width) & (y < height) & (x + side > 0) & (y + side > 0))):
        expected = f"x, y, side, side of a square of at most {LARGEST_BOX} pixels that meets {width} x {height} pixels"
        raise ValueError(f"boxes[{index}]: expected {expected}, got {boxes[index].tolist()}")
    return boxes, frames


def _launch(images: Tensor, boxes: np.ndarray, frames: np.ndarray, size: int, gray: bool, out: Tensor) -> None:
    to_gray = gray and images.ndim == 4
    if images.ndim == 3:
        images = images[..., None].expand(-1, -1, -1, 3)
    height, width = images.shape[1:3]
    sides = boxes[:, 2]
    divisors = np.gcd(sides, size)
    places = torch.from_numpy(np.stack([frames, *boxes[:, :3].T, divisors], axis=1).astype(np.int32))
    if images.is_cuda:
        # From pinned memory, so that the host need not wait for the copy.
        places = places.pin_memory().to(images.device, non_blocking=True)
    # The most source pixels that a target pixel meets along a line, rounded up: few different kernels to compile.
    taps = triton.next_power_of_2(max(int(((sides // divisors - 2) // (size // divisors) + 2).max()), 1))
    block_p = max(ELEMENTS // taps, 1)
    blocks = triton.cdiv(size * size, block_p)
    # No fused multiply-add: it would round once where OpenCV rounds twice.
    _crop_kernel[(len(boxes) * blocks, out.shape[1])](
        images, places, out, height, width, *images.stride(), size, blocks,
        TO_GRAY=to_gray, TAPS=taps, BLOCK_P=block_p, num_warps=NUM_WARPS, enable_fp_fusion=False,
    )  # fmt: skip


@triton.jit
def _lit_kernel(
    faces_ptr, out_ptr, least_contrast, largest_gain, darkest, brightest, COUNT: tl.constexpr, BLOCK: tl.constexpr
):
    start = tl.program_id(0).to(tl.int64) * COUNT
    offsets = tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for first in range(0, COUNT, BLOCK):
        total += tl.load(faces_ptr + start + first + offsets, mask=first + offsets < COUNT, other=0).to(tl.float32)
    mean = tl.sum(total, axis=0) / COUNT
    squares = tl.zeros((BLOCK,), tl.float32)
    for first in range(0, COUNT, BLOCK):
        inside = first + offsets < COUNT
        value = tl.load(faces_ptr + start + first + offsets, mask=inside, other=0).to(tl.float32)
        squares += tl.where(inside, (value - mean) * (value - mean), 0.0)
    deviation = tl.sqrt(tl.sum(squares, axis=0) / COUNT)
    gain = tl.minimum(tl.maximum(least_contrast / tl.maximum(deviation, 1e-6), 1.0), largest_gain)
    level = tl.minimum(tl.maximum(mean, darkest), brightest)
    for first in range(0, COUNT, BLOCK):
        inside = first + offsets < COUNT
        value = tl.load(faces_ptr + start + first + offsets, mask=inside, other=0).to(tl.float32)
        value = tl.minimum(tl.maximum((value - mean) * gain + level, 0.0), 255.0)
        tl.store(out_ptr + start + first + offsets, (value + 0.5).to(tl.uint8), mask=inside)


def lit(faces: Tensor, least_contrast: float, largest_gain: float, darkest: float, brightest: float) -> Tensor:
    """Faces in light that networks know, as `lgcn_fast.images.lit` makes it of each, to a gray level.

    Args:
        faces: (B, C, S, S) uint8, contiguous, on a GPU.
        least_contrast: standard deviation of the gray levels that a pale face gets, by...
        largest_gain: ...at most so many times what it had.
        darkest, brightest: range of the mean.

    Returns:
        (B, C, S, S) uint8.

    Raises:
        ValueError: another dtype or layout.
    """
    if faces.ndim != 4 or faces.dtype != torch.uint8 or not faces.is_contiguous():
        raise ValueError(f"faces: expected contiguous (B, C, S, S) uint8, got {described(faces)}")
    out = torch.empty_like(faces)
    if faces.numel():
        _lit_kernel[(len(faces),)](
            faces, out, least_contrast, largest_gain, darkest, brightest, COUNT=faces[0].numel(), BLOCK=LIT_BLOCK,
            num_warps=NUM_WARPS, enable_fp_fusion=True,
        )  # fmt: skip
    return out
