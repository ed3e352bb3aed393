"""Landmarks of images: `predict`, the main entry point."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from numbers import Integral
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from array_api_compat import array_namespace
from torch import Tensor
from torch.nn.functional import affine_grid, grid_sample

from . import ensembles
from .engine import Engine
from .images import (
    BRIGHTEST,
    DARKEST,
    LARGEST_GAIN,
    LEAST_CONTRAST,
    OVERSAMPLING,
    crop,
    from_crop,
    lit,
    meet,
    middle,
    square_box,
    turned,
    upright_boxes,
    upright_crop,
)
from .inputs import as_images, box_numbers, channels_last, from_dlpack, square_boxes
from .loading import engine_for, shape_for
from .model import LGCN
from .peaks import Array
from .shape import ShapeModel

CHUNK = 64
"""Crops that go through the network at once: on a GPU the largest batch that is recorded."""


@dataclass(frozen=True, eq=False)
class Landmarks:
    """Landmarks of some faces, as NumPy arrays or, from `predict(to_host=False)`, torch tensors.

    `faces[0]` is one face, with points (N, 2) and so on; `faces[mask]`, `faces[:3]`, `faces[[2, 0]]` are some.

    Attributes:
        points: (B, N, 2) float32: x and y in pixels of the input image, pixel centres at integers.
        scores: (B, N) float32 in 0..1: how certain the network is, the height of the heatmap's maximum; with the fit,
            where it is high around the shape, and 0 where that is far from the shape.
    """

    points: Array
    scores: Array

    def __len__(self) -> int:
        return len(self.points)

    def __iter__(self) -> Iterator[Self]:
        return (self[index] for index in range(len(self)))

    def __repr__(self) -> str:
        """How many faces, not all the numbers."""
        count = len(self) if self.points.ndim > 2 else 1
        points = f"{self.points.shape[-2]} points"
        return f"{type(self).__name__}({count} face{'s' if count != 1 else ''} of {points})"

    def __getitem__(self, chosen: Any) -> Self:
        if self.points.ndim < 3:
            raise TypeError("faces: expected some, got the landmarks of one")
        of_each_face = ((name, part) for name, part in vars(self).items() if getattr(part, "ndim", 0))
        parts = {name: part[chosen] for name, part in of_each_face}
        if isinstance(chosen, tuple) or parts["points"].ndim not in (2, 3):
            raise TypeError(f"faces: expected an index, a slice, a mask or indices, got {chosen!r}")
        return replace(self, **parts)


def predict(
    batch: Any,
    boxes: Any = None,
    model: Engine | LGCN | Path | str | None = None,
    fit: bool = True,
    shape: ShapeModel | Path | str | None = None,
    device: str = "auto",
    precision: str = "auto",
    to_host: bool = True,
    ensemble: int = 1,
    passes: int = 1,
) -> Landmarks:
    """Find the landmarks of one face in each image, or of several in one.

    Args:
        batch: array (B, H, W), (B, H, W, 3) or (B, 1 or 3, H, W); one image (H, W) or (H, W, 3); or a list of such
            single images of any sizes. NumPy, torch, or anything that speaks DLPack. Colours are RGB, without alpha.
            (3, H, W) are three gray images: of one in torchvision's layout take `image[None]`. uint8, or floating point
            in 0..1 or 0..255 (where the largest value of the array is above 1.5). An array of uint8 on a GPU stays
            there, where the engine runs there too; everything else takes the way over the host.
        boxes: (B, 4) x, y, width, height of the faces in pixels, about 1.17 times the tight square around the
            landmarks: one for each image, or any number for a single image, none too. (For several faces in each of
            several images repeat the images.) Default: the whole image. Boxes that are not square become the square
            around their centre.
        model: an engine, a network, the name of one in the package (`lgcn_fast.models()`), or the path of weights.
            Default: the best in the package; on a CPU the best above 30 faces/s. Engines are kept and used again until
            the file or the network changes (what is done through a parameter's `.data` is not noticed: build an
            `Engine`).
        fit: fit a shape model to the heatmaps, which filters outliers and reconstructs hidden points (section 3.3);
            otherwise each point is where its heatmap is high around its maximum.
        shape: the shape model, or its file. Default: the one in the package for the model's number of landmarks.
        device: where the network runs, "cpu", "cuda" or "auto", see `Engine`; an engine brings its own.
        precision: "fp32", "bf16", on a GPU "fp8", or "auto", likewise.
        to_host: NumPy arrays; otherwise torch tensors on the engine's device, which is not waited for.
        ensemble: see each face so many times, mirrored and in slightly other boxes, and average: 10 take ten times as
            long and have 2 to 4 % less error, see `ensembles`.
        passes: 2: look again, in the box around the points that were found first, for boxes that are not quite those
            described above, such as another detector's; with the fit it is turned, too, so that the face stands
            upright. It takes twice as long.

    Returns:
        `Landmarks` of all faces, in the order given.

    Raises:
        ValueError: an empty batch, an image without pixels, a wrong number of channels, integers that are not uint8,
            NaN or values outside 0..255, a box outside its image, an unknown model, a device that is not there, a
            precision that the processor lacks, no shape model for the number of landmarks or one of another number,
            an ensemble or passes below 1; the message names the argument, what was expected and what came.
    """
    if not isinstance(passes, Integral) or passes < 1:
        raise ValueError(f"passes: expected 1 or more, got {passes!r}")
    engine = engine_for(model, device, precision)
    shape = shape_for(shape, engine.config.num_landmarks) if fit else None
    batch = from_dlpack(batch)
    frames = channels_last(batch, "batch") if _stays_on(engine, batch) else None
    images = as_images(batch) if frames is None else list(frames)
    boxes = None if boxes is None else box_numbers("boxes", boxes)
    if len(images) == 1 and boxes is not None and boxes.shape in ((0,), (0, 4)):
        return _no_faces(engine, to_host)
    if len(images) == 1 and boxes is not None and (count := len(np.atleast_2d(boxes))) > 1:
        images *= count
        frames = frames if frames is None else frames.expand(count, *frames.shape[1:])
    boxes = square_boxes(boxes, images)
    read = engine.maxima if shape is None else partial(_fitted, engine, shape)
    faces, angles = images if frames is None else frames, None
    for _ in range(passes - 1):
        points, _ = locate(faces, boxes, engine, read, angles=angles)
        boxes, angles = _looked_at_again(points, boxes, angles, images, shape)
    return Landmarks(*locate(faces, boxes, engine, partial(read, to_host=to_host), ensemble, angles))


def _no_faces(engine: Engine, to_host: bool) -> Landmarks:
    points = np.zeros((0, engine.config.num_landmarks, 2), np.float32)
    found = points, points[..., 0]
    return Landmarks(*(found if to_host else (torch.from_numpy(array).to(engine.device) for array in found)))


def locate(
    images: list[np.ndarray] | Tensor,
    boxes: np.ndarray,
    engine: Engine,
    read: Callable[[Tensor], tuple[Array, Array]],
    ensemble: int = 1,
    angles: np.ndarray | None = None,
) -> tuple[Array, Array]:
    """Cut the faces out, read landmarks off the crops, and put them back into the pixels of the images.

    Args:
        images: B times (H, W) or (H, W, 3), see `as_images`; or frames (B, H, W) or (B, H, W, 3) on the engine's GPU.
        boxes: (B, 4) square; whole pixels, unless there are `angles`.
        read: from crops (b, C, S, S) to points (..., b, N, 2) in pixels of their heatmaps and scores (..., b, N),
            NumPy arrays or torch tensors.
        ensemble: see `predict`.
        angles: (B,) by which the boxes are turned about their middles, see `upright_boxes`.

    Returns:
        points (..., B, N, 2), scores (..., B, N) in 0..1 float32, arrays of the kind that `read` returns.

    Raises:
        ValueError: an ensemble below 1.
    """
    count, config = len(boxes), engine.config
    first = boxes
    boxes, mirrored = ensembles.views(images, boxes, ensemble, config.num_landmarks)
    places = boxes if angles is None else _turned_views(boxes, first, angles)
    points, scores = [], []
    for start in range(0, len(boxes), CHUNK):
        part = slice(start, start + CHUNK)
        faces = np.arange(len(boxes))[part] % count
        turns = None if angles is None else angles[faces]
        crops = _crops(images, faces, places[part], config.input_size, config.in_channels, turns)
        if ensemble > 1:
            crops[mirrored[part]] = crops[mirrored[part]].flip(-1)
        found, values = read(crops)
        points.append(found)
        scores.append(values)
    xp = array_namespace(found)
    if len(points) > 1:
        found, values = xp.concat(points, axis=-3), xp.concat(scores, axis=-2)
    points, scores = found, values.clip(0, 1)
    if isinstance(points, Tensor):
        boxes = torch.from_numpy(boxes).to(points.device, non_blocking=True)
    points = from_crop(points, boxes, config.input_size / config.stride)
    points, scores = ensembles.merged(points, scores, boxes, mirrored, count)
    points = points if angles is None else turned(points, first, angles)
    return xp.astype(points, xp.float32, copy=False), xp.astype(scores, xp.float32, copy=False)


def _looked_at_again(
    points: np.ndarray,
    boxes: np.ndarray,
    angles: np.ndarray | None,
    images: list[np.ndarray],
    shape: ShapeModel | None,
) -> tuple[np.ndarray, np.ndarray]:
    """Upright boxes around the points of faces and their angles; those that they were found in, where that is none to
    look at."""
    found, turns = upright_boxes(points, None if shape is None else shape.mean)
    for index, (box, image) in enumerate(zip(found, images, strict=True)):
        if not meet(box[None], image)[0]:
            found[index], turns[index] = boxes[index], 0.0 if angles is None else angles[index]
    return found, turns


def _turned_views(views: np.ndarray, boxes: np.ndarray, angles: np.ndarray) -> np.ndarray:
    """Where views (K * B, 4) of faces come to lie when these are turned about the middles of their boxes (B, 4)."""
    middles = middle(views).reshape(-1, len(boxes), 1, 2)
    moved = turned(middles, boxes, angles) - middles
    return views + np.concatenate([moved, np.zeros_like(moved)], axis=-1).reshape(views.shape)


def _fitted(engine: Engine, shape: ShapeModel, crops: Tensor, to_host: bool = True) -> tuple[Array, Array]:
    fitted = engine.fit(crops, shape, to_host)
    return fitted.points, fitted.certainties


def _crops(
    images: list[np.ndarray] | Tensor,
    faces: np.ndarray,
    boxes: np.ndarray,
    size: int,
    channels: int,
    angles: np.ndarray | None,
) -> Tensor:
    """Network inputs (b, channels, size, size) of some boxes, each in the image that `faces` (b,) names."""
    if not isinstance(images, Tensor):
        turns = (None for _ in faces) if angles is None else angles
        of_each = zip(faces, boxes, turns, strict=True)
        # (A copy: an uncut image would be read after the caller has it back, where a GPU is not waited for.)
        return torch.stack([network_input(images[face], box, size, channels, turn) for face, box, turn in of_each])
    return _device_crops(images, faces, boxes, size, channels, angles)


def _stays_on(engine: Engine, batch: Any) -> bool:
    return isinstance(batch, Tensor) and batch.is_cuda and batch.device == engine.device and batch.dtype == torch.uint8


def _device_crops(
    frames: Tensor,
    faces: np.ndarray,
    boxes: np.ndarray,
    size: int,
    channels: int,
    angles: np.ndarray | None,
) -> Tensor:
    """What `network_input` makes of some boxes, each in the frame that `faces` (b,) names, but for rounding, on the GPU
    that the frames are on."""
    from lgcn_fast_kernels import triton_crop

    gray = channels == 1
    with torch.cuda.device_of(frames):
        if angles is None:
            crops = triton_crop.crop(frames, boxes, size, gray, faces)
        else:
            around = np.stack([square_box(box, 2**0.5) for box in boxes])  # however they are turned
            sources = triton_crop.crop(frames, around, round(OVERSAMPLING * 2**0.5 * size), gray, faces)
            crops = _upright(sources, around, boxes, angles, size)
        return triton_crop.lit(crops, LEAST_CONTRAST, LARGEST_GAIN, DARKEST, BRIGHTEST)


def _upright(sources: Tensor, around: np.ndarray, boxes: np.ndarray, angles: np.ndarray, size: int) -> Tensor:
    """`upright_crop` of boxes that are turned by angles (b,), from pictures (b, C, s, s) of the squares around them."""
    # In torch each side of a picture goes from -1 to 1.
    cos, sin = boxes[:, 2] / around[:, 2] * (np.cos(angles), np.sin(angles))
    x, y = ((middle(boxes) - around[:, :2] + 0.5) / around[:, 2:] * 2 - 1).T
    matrices = torch.from_numpy(np.stack([cos, -sin, x, sin, cos, y], axis=1).reshape(-1, 2, 3)).float()
    shape = (*sources.shape[:2], size, size)
    grid = affine_grid(matrices.to(sources.device, non_blocking=True), shape, align_corners=False)
    crops = grid_sample(sources.float(), grid, padding_mode="border", align_corners=False)
    return crops.round().to(torch.uint8)


def network_input(image: np.ndarray, box: np.ndarray, size: int, channels: int, angle: float | None = None) -> Tensor:
    """Cut the face out, resize it, light it and convert it to the network's colours.

    Args:
        image: (H, W) or (H, W, 3) uint8 or float32 in 0..255.
        box: (4,) square; whole pixels, unless there is an angle.
        angle: by which the box is turned about its middle, see `upright_crop`.

    Returns:
        (channels, size, size), dtype of `image`.
    """
    gray = channels == 1
    face = crop(image, box, size, gray) if angle is None else upright_crop(image, box, angle, size, gray)
    return as_network_input(lit(face), channels)


def as_network_input(face: np.ndarray, channels: int) -> Tensor:
    """An image (H, W), gray, or (H, W, 3) as (channels, H, W); with one channel it must be gray."""
    if not face.flags.writeable:  # (which torch warns of)
        face = face.copy()
    if channels == 1:
        return torch.from_numpy(face)[None]
    face = face if face.ndim == 3 else np.repeat(face[..., None], 3, axis=2)
    return torch.from_numpy(face).permute(2, 0, 1)
