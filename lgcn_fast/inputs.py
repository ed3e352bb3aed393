"""What users hand in: images and boxes of any kind, checked."""

from contextlib import suppress
from math import isfinite
from typing import Any

import cv2
import numpy as np
import torch
from array_api_compat import array_namespace
from torch import Tensor

from .images import check_touches, square_box
from .peaks import Array

BYTES_FROM = 1.5
"""Pixels in floating point are those of 0..255 where the largest is above it: one of 0..1 may be a little above 1 after
it was resized, and one of 0..255 below it would be black."""
SMALLEST_BOX = 2.0
"""Smallest side of a face box, pixels: where it is smaller, pixels were not meant."""
MAX_SIDE = 16384
"""Largest side of a face box, pixels."""


def from_dlpack(batch: Any) -> Any:
    """Arrays of other libraries as NumPy arrays or tensors; what is none as it is."""
    if isinstance(batch, np.ndarray | Tensor | list | tuple) or not hasattr(batch, "__dlpack__"):
        return batch
    # Negative strides make torch end the process. NumPy takes them: CPU arrays go through it, others are copied first.
    if batch.__dlpack_device__()[0] == 1:  # a CPU
        with suppress(BufferError, RuntimeError, TypeError):  # (NumPy has no bfloat16)
            return np.from_dlpack(batch)
    strides = getattr(batch, "strides", None)
    backwards = isinstance(strides, tuple) and any(stride < 0 for stride in strides)
    return torch.from_dlpack(batch.copy() if backwards else batch)


def as_images(batch: Any, name: str = "batch") -> list[np.ndarray]:
    """Check a batch and split it into images (H, W) or (H, W, 3), uint8 or float32 in 0..255; see `predict`."""
    if isinstance(batch, Tensor):
        batch = batch.detach().cpu()
        batch = (batch.float() if batch.is_floating_point() else batch).numpy()
    if isinstance(batch, list | tuple):
        if not batch:
            raise ValueError(f"{name}: expected at least one image, got none")
        images = [as_images(from_dlpack(image), f"{name}[{index}]") for index, image in enumerate(batch)]
        for index, parts in enumerate(images):
            if len(parts) != 1:
                raise ValueError(f"{name}[{index}]: {_one_expected(len(parts), batch[index])}")
        return [image for (image,) in images]
    if not isinstance(batch, np.ndarray):
        of_file, of_pillow = "lgcn_fast.images.read_image(path, color=True)", 'np.asarray(image.convert("RGB"))'
        hint = f"of it: {of_pillow}" if hasattr(batch, "convert") else f"of a file: {of_file}"
        got = f"{type(batch).__name__} ({hint})"
        raise ValueError(f"{name}: expected a NumPy array, torch tensor or list of them, got {got}")
    return list(_in_bytes_range(_contiguous(channels_last(batch, name)), name))


def _contiguous(images: np.ndarray) -> np.ndarray:
    """`np.ascontiguousarray` of (B, H, W) or (B, H, W, 3).

    NumPy copies pixel by pixel where the colours lie otherwise than side by side, in views such as `frame[..., ::-1]`
    (BGR), `image[..., :3]` (RGBA) or of planes: a frame of 1920 x 1080 takes 12 ms, OpenCV 0.2, each colour alone 2.
    """
    if images.ndim == 3 or images.strides[2] == 3 * images.strides[3]:
        return np.ascontiguousarray(images)
    backwards = images[..., ::-1]
    if images.dtype == np.uint8 and backwards.flags.c_contiguous:
        return cv2.cvtColor(backwards.reshape(-1, *images.shape[2:]), cv2.COLOR_BGR2RGB).reshape(images.shape)
    copy = np.empty(images.shape, images.dtype)
    for colour in range(3):
        copy[..., colour] = images[..., colour]
    return copy


def one_image(image: Any, name: str) -> np.ndarray:
    """Check that there is one image: (H, W) or (H, W, 3), see `as_images`."""
    images = as_images(image, name)
    if len(images) != 1:
        raise ValueError(f"{name}: {_one_expected(len(images), image)}")
    return images[0]


def _one_expected(count: int, batch: Any) -> str:
    shape = f" in an array of {tuple(batch.shape)}" if hasattr(batch, "shape") else ""
    return f"expected one image (H, W) or (H, W, 3), got {count}{shape}{_if_colours_first(count)}"


def _if_colours_first(count: int) -> str:
    """What helps whoever has one image and is told that it is three."""
    return " (of an image (3, H, W) take image[None])" if count == 3 else ""


def channels_last(batch: Array, name: str) -> Array:
    """(B, H, W) or (B, H, W, 3) of any accepted shape, a view."""
    if 0 in batch.shape:
        raise ValueError(f"{name}: expected at least one image with at least one pixel, got shape {tuple(batch.shape)}")
    if batch.ndim == 3 and batch.shape[2] in (1, 3):
        return batch[None, ..., 0] if batch.shape[2] == 1 else batch[None]
    if batch.ndim == 2:
        return batch[None]
    if 3 <= batch.ndim <= 4 and batch.shape[-1] == 4:
        raise ValueError(f"{name}: expected gray or RGB, got {tuple(batch.shape)}, as of RGBA (take image[..., :3])")
    if batch.ndim == 3 and batch.shape[2] == 2:
        got = f"{tuple(batch.shape)}, as of gray with alpha (take image[..., 0])"
        raise ValueError(f"{name}: expected gray or RGB, got {got}")
    if batch.ndim == 3:
        return batch
    if batch.ndim == 4 and batch.shape[1] != 1 and batch.shape[3] in (1, 3):
        return batch[..., 0] if batch.shape[3] == 1 else batch
    if batch.ndim == 4 and batch.shape[1] in (1, 3):
        return batch[:, 0] if batch.shape[1] == 1 else array_namespace(batch).permute_dims(batch, (0, 2, 3, 1))
    shapes = "(B, H, W), (B, H, W, 3), (B, 1, H, W) or (B, 3, H, W)"
    raise ValueError(f"{name}: expected {shapes}, got {tuple(batch.shape)}")


def _in_bytes_range(batch: np.ndarray, name: str) -> np.ndarray:
    """uint8 as it is, floating point as float32 in 0..255."""
    if batch.dtype == np.uint8:
        return batch
    if not np.issubdtype(batch.dtype, np.floating):
        hint = " (its upper eight bits are (image >> 8).astype(np.uint8))" if batch.dtype == np.uint16 else ""
        raise ValueError(f"{name}: expected uint8 or floating point, got {batch.dtype}{hint}")
    batch = batch.astype(np.float32)
    if not np.isfinite(batch).all():
        raise ValueError(f"{name}: expected finite pixel values, got NaN or infinity")
    low, high = float(batch.min()), float(batch.max())
    if low < 0 or high > 255:
        raise ValueError(f"{name}: expected pixel values in 0..1 or 0..255, got {low:g} to {high:g}")
    return batch if high > BYTES_FROM else (batch * 255).clip(max=255)


def square_boxes(boxes: np.ndarray | None, images: list[np.ndarray]) -> np.ndarray:
    """The squares of whole pixels around boxes (B, 4) in B images, or of whole images: (B, 4) int64; see `predict`."""
    if boxes is None:
        squares = [square_box((0, 0, image.shape[1], image.shape[0])) for image in images]
    else:
        boxes = boxes[None] if boxes.ndim == 1 else boxes
        if boxes.shape != (len(images), 4):
            expected = f"x, y, width, height for {len(images)} images"
            raise ValueError(f"boxes: expected {expected}, got shape {boxes.shape}{_if_colours_first(len(images))}")
        squares = []
        for index, (box, image) in enumerate(zip(checked_boxes("boxes", boxes).tolist(), images, strict=True)):
            if max(box[2:]) < SMALLEST_BOX:
                got = f"{box[2]:g} x {box[3]:g} (shares of the image? multiply them by its size)"
                raise ValueError(
                    f"boxes[{index}]: expected a box of at least {SMALLEST_BOX:g} pixels a side, got {got}"
                )
            check_touches(box, image, f"boxes[{index}]")
            squares.append(square_box(box))
            check_touches(squares[-1], image, f"boxes[{index}], in whole pixels")
    # A crop is padded to its square before it shrinks: a side beyond reason is an error, not gigabytes of border.
    for index, (_, _, side, _) in enumerate(squares):
        if side > MAX_SIDE:
            raise ValueError(f"boxes[{index}]: expected a face of at most {MAX_SIDE} pixels a side, got {side}")
    return np.array(squares)


def box_numbers(name: str, boxes: Any) -> np.ndarray:
    """Boxes of any kind as float64, of whatever shape."""
    if hasattr(boxes, "points"):
        got = f"{type(boxes).__name__} (what `detect` finds has them as `faces.boxes`)"
        raise ValueError(f"{name}: expected x, y, width, height of each face, got {got}")
    boxes = from_dlpack(boxes)
    if isinstance(boxes, Tensor):  # of any device and dtype
        return boxes.detach().cpu().double().numpy()
    try:
        return np.asarray(boxes, np.float64)
    except (TypeError, ValueError):  # (of ragged lists)
        expected = "x, y, width, height of each face (for several in each of several images repeat the images)"
        raise ValueError(f"{name}: expected {expected}, got {boxes!r:.100}") from None


def checked_boxes(name: str, boxes: Any) -> np.ndarray:
    """Boxes as (K, 4) float64, of which there may be none.

    Raises:
        ValueError: another shape, a number that is not finite, a width or height that is not above 0.
    """
    boxes = box_numbers(name, boxes)
    if boxes.size and (boxes.ndim != 2 or boxes.shape[1] != 4):
        raise ValueError(f"{name}: expected boxes (K, 4), got shape {boxes.shape}")
    boxes = boxes.reshape(-1, 4)
    for index, box in enumerate(boxes.tolist()):  # (Python's numbers: of so few NumPy's take ten times as long)
        if not (all(map(isfinite, box)) and min(box[2:]) > 0):
            raise ValueError(f"{name}[{index}]: expected x, y and a width and height above 0, got {box}")
    return boxes
