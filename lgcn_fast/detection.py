"""Faces anywhere in a photo, found by the network alone (section 4.3): no face detector in front of it.

The network runs on an image pyramid. In each level every landmark's heatmap, shifted by where that landmark sits in the
mean face, votes for the middle of a face; the peaks of the votes are hypotheses. Each is cut out and fitted, by the
network that voted, then by the one that is to read the landmarks, in the upright box of its points until that settles,
and judged by how well heatmaps and shape agree.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch

import lgcn_fast_kernels

from .engine import Engine
from .fitting import Fit
from .images import (
    BOX_ENLARGEMENT,
    BRIGHTEST,
    DARKEST,
    LARGEST_GAIN,
    LEAST_CONTRAST,
    face_box,
    from_crop,
    meet,
    turned,
    upright_boxes,
)
from .inputs import checked_boxes, one_image
from .landmarks import SCHEMES
from .loading import engine_for, finder_for, shape_for
from .model import LGCN
from .prediction import CHUNK, Landmarks, as_network_input, network_input
from .shape import ShapeModel

SIZES = (0.72, 1.1)
"""Sizes of the mean face that vote in a level, over the nominal one: a network for crops sees faces of 0.6 to 1.4."""
SMALLEST = 0.6
PYRAMID_STEP = 2.0
"""From one level of the image pyramid to the next. On the validation faces of 300-W 1.41 finds no more and takes 1.5
times as long."""
LARGEST_ENLARGEMENT = 2.0
BORDER = 16
"""Pixels around a level that repeat its border: faces that the border cuts are voted for too."""
VOTES = 24
"""Votes along the side of a nominal face box, or as many as the heatmaps have pixels: the fit finds the place."""
LEAST_VOTE = 0.25
"""Mean value of the shifted heatmaps that makes a hypothesis. With lgcn-finder 98 % of the validation faces of
300-W, 36 to 160 px wide, have more than 0.5; a photo of the background held out has 0.7 hypotheses."""
FIRST_ROUND = 0.4
"""A hypothesis is fitted by the finder first, in a tenth of the model's time, and needs this share of the least
confidence to stay: four of five false ones go."""
ROUNDS = (0.5, 0.8, 1.0)
"""Then the model fits it so often, each time in the box of the points before: again the shares that it needs."""
SETTLED = 0.03
"""Unless its box has moved and grown by no more than this share of its side."""
APART = 0.35
"""Hypotheses nearer than this share of the larger one's side are one, where their sizes differ by less than..."""
SIZE_RATIO = 2.5
RESIDUAL, PLAUSIBLE = 0.12, 4.0
"""Scales of what lowers a confidence: the fit's residual, and the root mean square of its coefficients."""
OVERLAP = 0.4
"""Of two faces whose boxes have more than this in common (over their union), the less confident one goes."""
LIGHT_STEP = 4
"""Pixels of a level between places where its light is measured."""
WHOLE = 2**20
"""Pixels of a level that goes through the network as a whole; larger ones go in tiles, so that memory is bounded."""
LONGEST = 2560
"""Longest side of such a level: in bf16 the network's blur needs memory that grows with its square."""
TILE, TILE_BORDER = 640, 48
"""Largest side of what a tile is to answer for, and what it sees around it. (Without AMX 640 takes 0.6 to 0.8 of the
time of 256, which overlap more, and less than 512 or 720, measured with lgcn-nano.)"""
TILES = 8
"""Tiles that go through the network at once, each with up to 100 MB."""


@dataclass(frozen=True, eq=False, repr=False)
class Faces(Landmarks):
    """The faces of a photo, the most confident first: `Landmarks`, and where each face is.

    Attributes:
        points: (F, N, 2) float32: x and y in pixels of the photo, pixel centres at integers.
        scores: (F, N) float32 in 0..1, as in `Landmarks`.
        confidence: (F,) float32 in 0..1: mean score of the inner landmarks, lowered where heatmaps and shape model
            disagree.
        boxes: (F, 4) float32: x, y, width, height, the square around the landmarks enlarged by 17 %, as `predict` wants
            it.
    """

    confidence: np.ndarray
    boxes: np.ndarray


def detect(
    image: Any,
    min_face: float = 40,
    min_confidence: float = 0.5,
    model: Engine | LGCN | Path | str | None = None,
    finder: Engine | LGCN | Path | str | None = None,
    shape: ShapeModel | Path | str | None = None,
    device: str = "auto",
    precision: str = "auto",
    known: Any = None,
    any_angle: bool = False,
) -> Faces:
    """Find all faces of a photo and their landmarks (section 4.3).

    Args:
        image: one photo of any size, as for `predict`.
        min_face: side of the smallest face box to look for, pixels; on large photos the work grows with their pixels
            over its square. Photos are enlarged twice at most: less than 0.3 input sizes of the finder (14 pixels)
            changes nothing.
        min_confidence: faces below it are dropped.
        model: finds the landmarks of each face, see `predict`.
        finder: finds the faces; default: the lightest in the package with the model's landmarks (lgcn-finder), or the
            model.
        shape: the shape model, see `predict`.
        device: see `predict`.
        precision: see `predict`.
        known: boxes (K, 4), as in `Faces`, of faces that are known already: the finder sees them, the model does not
            look at them.
        any_angle: find faces however they are turned in the photo: of people who lie down, or in a photo that does.
            Otherwise they must stand upright, to about 40 degrees. The finder takes four times as long, the model
            about twice: it judges what was found more than once.

    Returns:
        `Faces`, none where there is none; without the known ones.

    Raises:
        ValueError: as `predict`; more than one image, a `min_face` that is not positive, a `min_confidence`
            out of range, models for different landmarks, `known` that are no boxes.
    """
    photo = one_image(image, "image")
    if not min_face > 0:
        raise ValueError(f"min_face: expected a positive number of pixels, got {min_face}")
    if not 0 <= min_confidence <= 1:
        raise ValueError(f"min_confidence: expected a share in [0, 1], got {min_confidence}")
    engine = engine_for(model, device, precision)
    seeker, shape = finder_for(finder, engine), shape_for(shape, engine.config.num_landmarks)
    known = checked_boxes("known", [] if known is None else known)
    seen, faces, settled = _as_seen(photo, seeker), [], []
    for quarters in range(4 if any_angle else 1):
        boxes = _turned_back(find_hypotheses(np.rot90(seen, quarters), seeker, shape, min_face), photo, quarters)
        boxes = boxes[meet(boxes, photo)]
        found = fitted_faces(photo, boxes, np.full(len(boxes), quarters * np.pi / 2), seeker, shape)
        faces.append(found[distinct(found.boxes, found.confidence, FIRST_ROUND * min_confidence, known)])
    faces = _joined(faces)
    boxes, angles = upright_boxes(faces.points, shape.mean)
    for share in ROUNDS:
        if not len(faces):
            break
        near = meet(boxes, photo)
        before = boxes[near]
        faces = fitted_faces(photo, before, angles[near], engine, shape)
        kept = distinct(faces.boxes, faces.confidence, share * min_confidence, known)
        faces, before = faces[kept], before[kept]
        boxes, angles = upright_boxes(faces.points, shape.mean)
        still = np.abs(boxes - before).max(axis=1) <= SETTLED * before[:, 2]
        settled.append(faces[still])
        faces, boxes, angles = faces[~still], boxes[~still], angles[~still]
    faces = _joined([*settled, faces])
    return faces[distinct(faces.boxes, faces.confidence, min_confidence)]


def _joined(parts: list[Faces] | list[Fit]) -> Any:
    return type(parts[0])(*map(np.concatenate, zip(*(vars(part).values() for part in parts), strict=True)))


def find_hypotheses(photo: np.ndarray, engine: Engine, shape: ShapeModel, min_face: float) -> np.ndarray:
    """Where the heatmaps of several landmarks agree that a face may be.

    Args:
        photo: (H, W), or (H, W, 3) for a network that sees colours, uint8 or float32 in 0..255.

    Returns:
        boxes (M, 4) float64: x, y, side, side in pixels of the photo, those with most votes first.
    """
    found = [np.empty((0, 4))]
    nominal, stride = engine.config.input_size, engine.config.stride
    every = max(round(nominal / stride / VOTES), 1)  # rows and columns of the heatmaps to a vote
    step = stride * every
    offsets, voters = _offsets(nominal / step, shape), _inner(shape.num_landmarks)
    for scale, level in _levels(photo, engine, min_face):
        for tiles, places, cores in _tiles(level):
            votes = engine.votes(torch.from_numpy(tiles), offsets, voters, every)
            maps, pixels, values = lgcn_fast_kernels.local_maxima(votes, LEAST_VOTE, engine.num_threads)
            # A vote is that of a pixel of the heatmaps, which stands in the middle of its pixels of the level.
            points = pixels * step + (stride - 1) / 2 + places[maps[:, 0]]
            inside = ((points >= cores[maps[:, 0], :2]) & (points < cores[maps[:, 0], 2:])).all(1)
            centres = (points[inside] - BORDER + 0.5) / scale - 0.5
            sides = nominal / scale * np.array(SIZES)[maps[inside, 1]]
            found.append(np.column_stack([values[inside], centres, sides]))
    _, x, y, sides = _apart(np.concatenate(found)).T
    return np.column_stack([x - sides / 2 + 0.5, y - sides / 2 + 0.5, sides, sides])


def _turned_back(boxes: np.ndarray, photo: np.ndarray, quarters: int) -> np.ndarray:
    """Where squares (M, 4) of `np.rot90(photo, quarters)` lie in the photo."""
    (height, width), (x, y, side, _) = photo.shape[:2], boxes.T
    there = (x, y), (width - y - side, x), (width - x - side, height - y - side), (y, height - x - side)
    return np.column_stack([*there[quarters], side, side])


def combined_heatmap(
    image: Any,
    min_face: float = 40,
    model: Engine | LGCN | Path | str | None = None,
    finder: Engine | LGCN | Path | str | None = None,
    device: str = "auto",
    precision: str = "auto",
) -> np.ndarray:
    """The largest value of all landmarks' heatmaps in all levels, scaled back to the photo (Figure 6).

    Args:
        image, min_face, model, finder, device, precision: as for `detect`; the heatmaps are the finder's.

    Returns:
        (H, W) float32 in 0..1.
    """
    photo = one_image(image, "image")
    engine = finder_for(finder, engine_for(model, device, precision))
    combined = np.zeros(photo.shape[:2], np.float32)
    for scale, level in _levels(_as_seen(photo, engine), engine, min_face):
        heat = np.zeros(level.shape[1:], np.float32)
        for tiles, places, cores in _tiles(level):
            heatmaps = engine.heatmaps(torch.from_numpy(tiles)).amax(1).cpu().numpy()
            for heatmap, (x, y), (left, top, right, bottom) in zip(heatmaps, places, cores, strict=True):
                # (The last of its pixels may stand for some beyond the tile.)
                heatmap = cv2.resize(heatmap, None, fx=engine.config.stride, fy=engine.config.stride)
                heat[top:bottom, left:right] = heatmap[top - y : bottom - y, left - x : right - x]
        height, width = (max(round(side * scale), 1) for side in photo.shape[:2])
        inner = np.ascontiguousarray(heat[BORDER : BORDER + height, BORDER : BORDER + width])
        np.maximum(combined, cv2.resize(inner, photo.shape[1::-1]), out=combined)
    return combined.clip(0, 1)


def _as_seen(photo: np.ndarray, engine: Engine) -> np.ndarray:
    """A photo in the colours that a network sees: (H, W) or (H, W, 3)."""
    gray = engine.config.in_channels == 1 and photo.ndim == 3
    return cv2.cvtColor(photo, cv2.COLOR_RGB2GRAY) if gray else photo


def _levels(photo: np.ndarray, engine: Engine, min_face: float) -> Iterator[tuple[float, np.ndarray]]:
    """A photo as the network sees it (`_as_seen`), (C, H, W) in falling sizes with a border; the scale of each."""
    nominal = engine.config.input_size
    height, width = photo.shape[:2]
    scale = min(SMALLEST * nominal / min_face, LARGEST_ENLARGEMENT)
    sources = [photo]  # and what was made of it, from large to small
    while max(height, width) * scale >= nominal / 2:
        size = max(round(width * scale), 1), max(round(height * scale), 1)
        # From the smallest that is twice as large: to go through all of a large photo for each level takes as long as
        # the network does.
        while len(sources) > 1 and (np.array(sources[1].shape[1::-1]) >= 2 * np.array(size)).all():
            del sources[0]
        level = cv2.resize(sources[0], size, interpolation=cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR)
        if scale < 1:
            sources.append(level)
        level = cv2.copyMakeBorder(level, BORDER, BORDER, BORDER, BORDER, cv2.BORDER_REPLICATE)
        yield scale, as_network_input(_lit(level, 2 * nominal), engine.config.in_channels).numpy()
        scale /= PYRAMID_STEP


def _lit(level: np.ndarray, side: int) -> np.ndarray:
    """`lit` of each pixel by what lies in a square around it, so many pixels a side: a lamp, a dark room or white paper
    elsewhere in the photo is no reason to change a face. In between `LIGHT_STEP` pixels light is interpolated."""
    gray = (level if level.ndim == 2 else cv2.cvtColor(level, cv2.COLOR_RGB2GRAY)).astype(np.float32)
    height, width = (length // LIGHT_STEP for length in gray.shape)
    whole = gray[: height * LIGHT_STEP, : width * LIGHT_STEP]  # (of other sizes INTER_AREA takes twice as long)
    around = (side // LIGHT_STEP | 1,) * 2
    places = (cv2.resize(part, (width, height), interpolation=cv2.INTER_AREA) for part in (whole, whole * whole))
    mean, squares = (cv2.blur(part, around, borderType=cv2.BORDER_REFLECT) for part in places)
    gain = np.clip(LEAST_CONTRAST / np.sqrt(np.maximum(squares - mean * mean, 1e-6)), 1, LARGEST_GAIN)
    offset = np.clip(mean, DARKEST, BRIGHTEST) - gain * mean
    if not offset.any():
        return level
    gain, offset = (cv2.resize(values, gray.shape[::-1]) for values in (gain, offset))
    if level.ndim == 3:
        gain, offset = cv2.merge([gain] * 3), cv2.merge([offset] * 3)
    changed = cv2.multiply(level, gain, dtype=cv2.CV_32F)
    if level.dtype == np.uint8:
        return cv2.add(changed, offset, dtype=cv2.CV_8U)  # rounded, and within 0..255
    return (changed + offset).clip(0, 255)


def _tiles(level: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Parts of a level (C, H, W), all of one size: tiles (T, C, h, w); places (T, 2) of their first pixels, x and y;
    and what each is to answer for (T, 4): left, top, right, bottom, in pixels of the level."""
    height, width = level.shape[1:]
    whole = height * width <= WHOLE and max(height, width) <= LONGEST
    rows, columns = ([(0, 0, side)] if whole else _cuts(side) for side in (height, width))
    h, w = (min(cuts[0][2] + 2 * TILE_BORDER, side) for cuts, side in ((rows, height), (columns, width)))
    cuts = [(row, column) for row in rows for column in columns]
    for start in range(0, len(cuts), TILES):
        part = cuts[start : start + TILES]
        places = np.array([(min(x, width - w), min(y, height - h)) for (y, *_), (x, *_) in part])
        cores = np.array([(left, top, right, bottom) for (_, top, bottom), (_, left, right) in part])
        yield np.stack([level[:, y : y + h, x : x + w] for x, y in places]), places, cores


def _cuts(length: int) -> list[tuple[int, int, int]]:
    """A side in equal parts of at most `TILE` pixels: where each part begins to see, where it begins, where it ends."""
    count = -(-length // TILE)
    side = -(-length // count)
    return [(max(i * side - TILE_BORDER, 0), i * side, min((i + 1) * side, length)) for i in range(count)]


def _offsets(side: float, shape: ShapeModel) -> np.ndarray:
    """Where the landmarks of faces of all `SIZES` sit from the middle of their box: (S, N, 2), pixels of the votes; so
    is the side of the nominal box."""
    low, high = shape.mean.min(0), shape.mean.max(0)
    mean = (shape.mean - (low + high) / 2) * (side / BOX_ENLARGEMENT / (high - low).max())
    return np.rint(mean * np.array(SIZES)[:, None, None]).astype(np.int64)


def _inner(num_landmarks: int) -> list[int]:
    """Landmarks that vote and are judged: not those on the outline, where their scheme is known."""
    scheme = SCHEMES.get(num_landmarks)
    outline = set(scheme.outline) if scheme else set()
    return [index for index in range(num_landmarks) if index not in outline]


def _apart(found: np.ndarray) -> np.ndarray:
    """Of hypotheses near each other, rows of vote, x, y and side, the one with most votes."""
    found = found[np.argsort(-found[:, 0], kind="stable")]
    kept: list[int] = []
    for index, (_, x, y, side) in enumerate(found):
        others = found[kept]
        larger = np.maximum(others[:, 3], side)
        near = np.hypot(others[:, 1] - x, others[:, 2] - y) < APART * larger
        if not (near & (larger < SIZE_RATIO * np.minimum(others[:, 3], side))).any():
            kept.append(index)
    return found[kept]


def fitted_faces(photo: np.ndarray, boxes: np.ndarray, angles: np.ndarray, engine: Engine, shape: ShapeModel) -> Faces:
    """The faces in boxes (M, 4) that are turned by angles (M,), see `upright_boxes`, none left out."""
    size, channels = engine.config.input_size, engine.config.in_channels
    crops = [network_input(photo, box, size, channels, angle) for box, angle in zip(boxes, angles, strict=True)]
    parts = [engine.fit(torch.stack(crops[start : start + CHUNK]), shape) for start in range(0, len(crops), CHUNK)]
    if not parts:
        count, modes = shape.num_landmarks, len(shape.modes)
        shapes = ((0, count, 2), (0, count, 2), (0, modes), (0, count), (0,))
        parts = [Fit(*map(np.empty, shapes))]
    fitted = _joined(parts)
    points = turned(from_crop(fitted.points, boxes, size / engine.config.stride), boxes, angles)
    boxes = np.array([face_box(face) for face in points], np.float32).reshape(-1, 4)
    parts = points, fitted.certainties.clip(0, 1), confidence_of(fitted), boxes
    return Faces(*(part.astype(np.float32) for part in parts))


def confidence_of(fitted: Fit) -> np.ndarray:
    """(F,) in 0..1."""
    certainty = fitted.certainties[:, _inner(fitted.certainties.shape[1])].mean(axis=1)
    coefficients = fitted.coefficients  # (F, K); a shape model may have no modes
    unlikely = (coefficients**2).sum(axis=1) / max(coefficients.shape[1], 1)
    return certainty.clip(0, 1) * np.exp(-((fitted.residuals / RESIDUAL) ** 2) - unlikely / PLAUSIBLE**2)


def distinct(boxes: np.ndarray, confidence: np.ndarray, least: float, known: Iterable[np.ndarray] = ()) -> list[int]:
    """Indices of the faces that are confident enough and no duplicates, not of known boxes either, the most confident
    first."""
    kept: list[int] = []
    known = np.array([*known], float).reshape(-1, 4)
    for index in np.argsort(-confidence, kind="stable"):
        if confidence[index] < least:
            break
        if (overlap(boxes[index], np.concatenate([known, boxes[kept]])) <= OVERLAP).all():
            kept.append(int(index))
    return kept


def overlap(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Intersections of boxes (..., 4) over their unions, (...)."""
    shared = np.minimum(a[..., :2] + a[..., 2:], b[..., :2] + b[..., 2:]) - np.maximum(a[..., :2], b[..., :2])
    common = shared.clip(0).prod(axis=-1)
    return common / (a[..., 2:].prod(axis=-1) + b[..., 2:].prod(axis=-1) - common)
