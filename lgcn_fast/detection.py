"""Faces anywhere in a photo, found by the network alone (section 4.3): no face detector in front of it.

The network runs on an image pyramid. In each level every landmark's heatmap, shifted by where that landmark sits in the
mean face, votes for the middle of a face; the peaks of the votes are hypotheses. Each is cut out and fitted twice, as
`predict` would, and judged by how well heatmaps and shape model agree.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch

import lgcn_fast_kernels

from .engine import Engine
from .fitting import Fit
from .images import BOX_ENLARGEMENT, face_box, from_crop, square_box
from .landmarks import SCHEMES
from .model import LGCN
from .prediction import engine_for, network_input, one_image, shape_for
from .shape import ShapeModel

SIZES = (0.72, 1.1)
"""Sizes of the mean face that vote in a level, over the nominal one: a network for crops sees faces of 0.6 to 1.4."""
SMALLEST = 0.6
STEP = 2.0
"""Factor from level to level."""
LARGEST_ENLARGEMENT = 2.0
BORDER = 24
"""Pixels around a level that repeat its border: faces that the border cuts are voted for too."""
VOTE_STEP = 2
"""Votes are counted in every second row and column of the heatmaps: the fit finds the place."""
LEAST_VOTE = 0.25
"""Mean value of the shifted heatmaps that makes a hypothesis. On the validation faces of 300-W, 36 to 160 px wide, 98 %
have more than 0.31; on photos of the training background 0.7 places a photo have."""
APART = 0.35
"""Hypotheses nearer than this share of the larger one's side are one, where their sizes differ by less than..."""
SIZE_RATIO = 2.5
RESIDUAL, PLAUSIBLE = 0.15, 4.0
"""Scales of what lowers a confidence: the fit's residual, and the root mean square of its coefficients."""
OVERLAP = 0.4
"""Of two faces whose boxes have more than this in common (over their union), the less confident one goes."""
TILE, TILE_BORDER = 1024, 128
"""Largest part of a level that goes through the network at once, and what it sees around it: memory stays bounded."""
CHUNK = 64
"""Hypotheses that are fitted at once."""


@dataclass(frozen=True)
class Faces:
    """The faces of a photo, the most confident first."""

    points: np.ndarray
    """(F, N, 2) float32: x and y in pixels of the photo, pixel centres at integers."""
    scores: np.ndarray
    """(F, N) float32 in 0..1, as in `Landmarks`."""
    confidence: np.ndarray
    """(F,) float32 in 0..1: mean score of the inner landmarks, lowered where heatmaps and shape model disagree."""
    boxes: np.ndarray
    """(F, 4) float32: x, y, width, height, the square around the landmarks enlarged by 17 %, as `predict` wants it."""

    def __len__(self) -> int:
        return len(self.points)


@dataclass(frozen=True)
class _Hypotheses:
    """Squares that may hold a face."""

    votes: np.ndarray
    """(M,) mean value of the shifted heatmaps."""
    centres: np.ndarray
    """(M, 2) pixels of the photo."""
    sides: np.ndarray
    """(M,)"""

    def boxes(self) -> np.ndarray:
        return np.column_stack([self.centres - self.sides[:, None] / 2 + 0.5, self.sides, self.sides])


def detect(
    image: Any,
    min_face: float = 40,
    min_confidence: float = 0.5,
    model: Engine | LGCN | Path | str | None = None,
    finder: Engine | LGCN | Path | str | None = None,
    shape: ShapeModel | Path | str | None = None,
    device: str = "auto",
    precision: str = "auto",
) -> Faces:
    """Find all faces of a photo and their landmarks (section 4.3).

    Args:
        image: one photo of any size, as for `predict`.
        min_face: side of the smallest face box to look for, pixels; the work grows with the photo's pixels over its
            square.
        min_confidence: faces below it are dropped.
        model: finds the landmarks of each face, see `predict`.
        finder: finds the faces; default: `model`.
        shape: the shape model, see `predict`.
        device: see `predict`.
        precision: see `predict`.

    Returns:
        `Faces`, none where there is none.

    Raises:
        ValueError: as `predict`; more than one image, a `min_face` that is not positive, different models.
    """
    photo = one_image(image, "image")
    if not min_face > 0:
        raise ValueError(f"min_face: expected a positive number of pixels, got {min_face}")
    engine = engine_for(model, device, precision)
    seeker = engine if finder is None else engine_for(finder, device, precision)
    count = engine.config.num_landmarks
    if seeker.config.num_landmarks != count:
        raise ValueError(f"finder: expected a model of {count} landmarks, got one of {seeker.config.num_landmarks}")
    shape = shape_for(shape, count)
    hypotheses = find_hypotheses(photo, seeker, shape, min_face)
    # Twice: the first fit says where the face's box is.
    boxes = hypotheses.boxes()
    for _ in range(2):
        boxes = boxes[meet(boxes, photo)]
        points, fitted = _fitted(photo, boxes, engine, shape)
        boxes = np.array([face_box(face) for face in points]).reshape(-1, 4)
    confidence = confidence_of(fitted)
    kept = distinct(boxes, confidence, min_confidence)
    return Faces(
        points[kept].astype(np.float32),
        fitted.certainties[kept].clip(0, 1).astype(np.float32),
        confidence[kept].astype(np.float32),
        boxes[kept].astype(np.float32),
    )


def find_hypotheses(photo: np.ndarray, engine: Engine, shape: ShapeModel, min_face: float) -> _Hypotheses:
    """Where the heatmaps of several landmarks agree that a face may be.

    Args:
        photo: (H, W) or (H, W, 3), uint8 or float32 in 0..255.
    """
    found = [np.empty((0, 4))]
    nominal = engine.config.input_size
    for scale, level in _levels(photo, engine, min_face):
        for (x, y), tile, core in _tiles(level):
            heatmaps = engine.heatmaps(torch.from_numpy(tile)[None])[0].cpu().numpy()
            votes, step = _votes(heatmaps, engine, shape)
            maps, points, values = lgcn_fast_kernels.local_maxima(votes[None], LEAST_VOTE)
            # (A pixel of the votes is the first of step x step pixels of the level.)
            points = points * step + (step / VOTE_STEP - 1) / 2
            inside = ((points >= core[:2]) & (points < core[2:])).all(1)
            centres = (points[inside] + (x - BORDER, y - BORDER) + 0.5) / scale - 0.5
            sides = nominal / scale * np.array(SIZES)[maps[inside, 1]]
            found.append(np.column_stack([values[inside], centres, sides]))
    return _apart(np.concatenate(found))


def _levels(photo: np.ndarray, engine: Engine, min_face: float) -> Iterator[tuple[float, np.ndarray]]:
    """The photo as (C, H, W) in falling sizes, with a border; the scale of each."""
    if engine.config.in_channels == 1 and photo.ndim == 3:
        photo = cv2.cvtColor(photo, cv2.COLOR_RGB2GRAY)
    elif engine.config.in_channels == 3 and photo.ndim == 2:
        photo = cv2.cvtColor(photo, cv2.COLOR_GRAY2RGB)
    nominal = engine.config.input_size
    height, width = photo.shape[:2]
    scale = min(SMALLEST * nominal / min_face, LARGEST_ENLARGEMENT)
    while max(height, width) * scale >= nominal / 2:
        size = max(round(width * scale), 1), max(round(height * scale), 1)
        level = cv2.resize(photo, size, interpolation=cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR)
        level = cv2.copyMakeBorder(level, BORDER, BORDER, BORDER, BORDER, cv2.BORDER_REPLICATE)
        yield scale, level[None] if level.ndim == 2 else level.transpose(2, 0, 1)
        scale /= STEP


def _tiles(level: np.ndarray) -> Iterator[tuple[tuple[int, int], np.ndarray, np.ndarray]]:
    """Parts of a level (C, H, W): where each begins, the part, and left, top, right, bottom of what it is to answer
    for, in its own pixels."""
    height, width = level.shape[1:]
    for y in range(0, height, TILE):
        for x in range(0, width, TILE):
            left, top = max(x - TILE_BORDER, 0), max(y - TILE_BORDER, 0)
            tile = level[:, top : y + TILE + TILE_BORDER, left : x + TILE + TILE_BORDER]
            core = np.array([x, y, min(x + TILE, width), min(y + TILE, height)]) - (left, top, left, top)
            yield (left, top), np.ascontiguousarray(tile), core


def _votes(heatmaps: np.ndarray, engine: Engine, shape: ShapeModel) -> tuple[np.ndarray, int]:
    """Votes for the middle of a face of each of `SIZES`: (S, h, w) float32 in 0..1; their distance in pixels.

    Args:
        heatmaps: (N, H, W).
    """
    inner = _inner(len(heatmaps))
    step = engine.config.stride * VOTE_STEP
    seen = heatmaps[inner, ::VOTE_STEP, ::VOTE_STEP].clip(0, 1)
    low, high = shape.mean.min(0), shape.mean.max(0)
    offsets = (shape.mean - (low + high) / 2) * (engine.config.input_size / BOX_ENLARGEMENT / (high - low).max())
    votes = np.zeros((len(SIZES), *seen.shape[1:]), np.float32)
    for size, counted in zip(SIZES, votes, strict=True):
        for heatmap, (dx, dy) in zip(seen, np.rint(offsets[inner] * size / step).astype(int), strict=True):
            height, width = (max(length - abs(d), 0) for length, d in zip(heatmap.shape, (dy, dx), strict=True))
            to_y, to_x, from_y, from_x = max(-dy, 0), max(-dx, 0), max(dy, 0), max(dx, 0)
            part = heatmap[from_y : from_y + height, from_x : from_x + width]
            counted[to_y : to_y + height, to_x : to_x + width] += part
    return votes / len(inner), step


def _inner(num_landmarks: int) -> list[int]:
    """Landmarks that vote and are judged: not those on the outline, where their scheme is known."""
    scheme = SCHEMES.get(num_landmarks)
    outline = set(scheme.outline) if scheme else set()
    return [index for index in range(num_landmarks) if index not in outline]


def _apart(found: np.ndarray) -> _Hypotheses:
    """The best of those that are near each other.

    Args:
        found: (M, 4) vote, x, y, side.
    """
    found = found[np.argsort(-found[:, 0], kind="stable")]
    kept: list[int] = []
    for index, (_, x, y, side) in enumerate(found):
        others = found[kept]
        larger = np.maximum(others[:, 3], side)
        near = np.hypot(others[:, 1] - x, others[:, 2] - y) < APART * larger
        if not (near & (larger < SIZE_RATIO * np.minimum(others[:, 3], side))).any():
            kept.append(index)
    return _Hypotheses(found[kept, 0], found[kept, 1:3], found[kept, 3])


def meet(boxes: np.ndarray, photo: np.ndarray) -> np.ndarray:
    """Which boxes have their middle in the photo, and are not larger than twice the photo."""
    height, width = photo.shape[:2]
    middle = boxes[:, :2] + boxes[:, 2:] / 2
    return ((middle >= 0) & (middle < (width, height))).all(1) & (boxes[:, 2] <= 2 * max(height, width))


def _fitted(photo: np.ndarray, boxes: np.ndarray, engine: Engine, shape: ShapeModel) -> tuple[np.ndarray, Fit]:
    """Points (F, N, 2) in the photo of the faces in boxes (F, 4), and their fit."""
    size, channels = engine.config.input_size, engine.config.in_channels
    squares = np.array([square_box(box) for box in boxes], np.int64).reshape(-1, 4)
    parts = []
    for start in range(0, len(squares), CHUNK):
        crops = [network_input(photo, box, size, channels) for box in squares[start : start + CHUNK]]
        parts.append(engine.fit(torch.stack(crops), shape))
    if not parts:
        count, modes = shape.num_landmarks, len(shape.modes)
        shapes = ((0, count, 2), (0, count, 2), (0, modes), (0, count), (0,))
        parts = [Fit(*map(np.empty, shapes))]
    names = ("points", "shapes", "coefficients", "certainties", "residuals")
    fitted = Fit(*(np.concatenate([getattr(part, name) for part in parts]) for name in names))
    return from_crop(fitted.points, squares, size / engine.config.stride), fitted


def confidence_of(fitted: Fit) -> np.ndarray:
    """(F,) in 0..1."""
    certainty = fitted.certainties[:, _inner(fitted.certainties.shape[1])].mean(axis=1)
    unlikely = (fitted.coefficients**2).mean(axis=1)
    return certainty.clip(0, 1) * np.exp(-((fitted.residuals / RESIDUAL) ** 2) - unlikely / PLAUSIBLE**2)


def distinct(boxes: np.ndarray, confidence: np.ndarray, least: float) -> list[int]:
    """Indices of the faces that are confident enough and no duplicates, the most confident first."""
    kept: list[int] = []
    for index in np.argsort(-confidence, kind="stable"):
        if confidence[index] < least:
            break
        if all(overlap(boxes[index], boxes[other]) <= OVERLAP for other in kept):
            kept.append(int(index))
    return kept


def overlap(a: np.ndarray, b: np.ndarray) -> float:
    """Intersection of two boxes over their union."""
    shared = np.minimum(a[:2] + a[2:], b[:2] + b[2:]) - np.maximum(a[:2], b[:2])
    common = float(np.prod(shared.clip(0)))
    return common / (float(a[2] * a[3] + b[2] * b[3]) - common)
