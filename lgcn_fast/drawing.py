"""Landmarks drawn on pictures."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from torch import Tensor

from .detection import Faces
from .engine import Engine
from .images import face_box, from_crop, square_box, touches, turned, upright_boxes
from .inputs import one_image
from .landmarks import lines_of
from .loading import engine_for, packaged_shape
from .model import LGCN
from .prediction import Landmarks, network_input
from .tracking import TrackedFaces

STYLES = ("heatmaps", "boxes", "lines", "points", "confidence", "indices")
"""What can be drawn, in the order in which it is."""
LINE_COLOR = (80, 220, 100)
POINT_COLOR = (255, 70, 70)
LABEL_COLOR = (70, 160, 255)
HEAT = 0.6
"""Opacity of the heatmaps where they are 1."""
FARTHEST = 8
"""Points whose x or y is so many times the larger side of the picture, or more, are not drawn: OpenCV would draw for
minutes, or crash."""
_SUBPIXEL_BITS = 4


def draw(
    image: Any,
    faces: Landmarks | np.ndarray,
    style: str | Iterable[str] = ("lines", "points"),
    model: Engine | LGCN | Path | str | None = None,
) -> np.ndarray:
    """Draw the landmarks of the faces of one image.

    Args:
        image: as for `predict`; it is not changed.
        faces: of `predict`, `detect` or `Tracker.update`, some of this image or one; or points (F, N, 2) or (N, 2),
            pixels, where points that are not finite, or are far outside of the image, are left out.
        style: one or more of `STYLES`: "points"; "lines" between them, where the annotation scheme is known;
            "confidence", points coloured by their scores, from red (0) to green (1); "indices" of the points; "boxes"
            with the faces' confidence and identity where they have some; "heatmaps" of the network, laid over.
        model: for "heatmaps", see `predict`.

    Returns:
        (H, W, 3) uint8 RGB.

    Raises:
        ValueError: more than one image, an unknown style, points of another shape, "confidence" without scores.
    """
    picture = _as_picture(image)
    styles = {style} if isinstance(style, str) else set(style)
    if not styles <= set(STYLES):
        raise ValueError(f"style: expected some of {', '.join(STYLES)}, got {', '.join(sorted(styles - set(STYLES)))}")
    if isinstance(faces, list | tuple) and any(isinstance(face, Landmarks) for face in faces):
        got = "a list of them (of some faces take `faces[faces.confidence > 0.6]`)"
        raise ValueError(f"faces: expected what `predict` or `detect` gives, or points, got {got}")
    points = faces.points if isinstance(faces, Landmarks) else faces
    points = points.detach().cpu().double().numpy() if isinstance(points, Tensor) else np.array(points, np.float64)
    points = points[None] if points.ndim == 2 else points
    if points.ndim != 3 or points.shape[2] != 2:
        raise ValueError(f"faces: expected points (F, N, 2) or (N, 2), got {points.shape}")
    drawn = np.abs(points) < FARTHEST * max(picture.shape[:2])
    points = np.where(drawn.all(axis=2, keepdims=True), points, np.nan)
    scores = getattr(faces, "scores", None)
    if "confidence" in styles and scores is None:
        raise ValueError("style: expected faces with scores for 'confidence', got points alone")
    if "heatmaps" in styles:
        picture = _with_heatmaps(picture, points, engine_for(model, "auto", "auto"))
    for index, face in enumerate(points):
        if not np.isfinite(face).all(axis=1).any():
            continue
        if "boxes" in styles:
            _draw_box(picture, face, _caption(faces, index))
        if "lines" in styles:
            _draw_lines(picture, face)
        if "confidence" in styles:
            _draw_points(picture, face, [_score_color(score) for score in np.atleast_2d(scores)[index]])
        elif "points" in styles:
            _draw_points(picture, face, [POINT_COLOR] * len(face))
        if "indices" in styles:
            _draw_indices(picture, face)
    return picture


def _as_picture(image: Any) -> np.ndarray:
    """A copy, (H, W, 3) uint8."""
    image = one_image(image, "image")
    picture = image.copy() if image.dtype == np.uint8 else np.rint(image).astype(np.uint8)
    return cv2.cvtColor(picture, cv2.COLOR_GRAY2RGB) if picture.ndim == 2 else picture


def _extent(picture: np.ndarray, face: np.ndarray) -> float:
    """The larger side of the tight box around landmarks, at most that of the picture, pixels: how thick to draw."""
    return min(float((np.nanmax(face, axis=0) - np.nanmin(face, axis=0)).max()), max(picture.shape[:2]))


def _fixed(points: np.ndarray) -> np.ndarray:
    """OpenCV's fixed point numbers."""
    return np.round(np.nan_to_num(points) * 2**_SUBPIXEL_BITS).astype(np.int32)


def _draw_lines(picture: np.ndarray, face: np.ndarray) -> None:
    visible, fixed = np.isfinite(face).all(axis=1), _fixed(face)
    thickness = max(round(_extent(picture, face) / 250), 1)
    lines = [fixed[[index for index in stroke if visible[index]]] for stroke in lines_of(len(face))]
    cv2.polylines(picture, lines, False, LINE_COLOR, thickness, cv2.LINE_AA, _SUBPIXEL_BITS)


def _draw_points(picture: np.ndarray, face: np.ndarray, colors: list[tuple[int, int, int]]) -> None:
    share = 130 if lines_of(len(face)) else 30  # few points without lines between them are seen less
    radius = round(max(_extent(picture, face) / share, 0.35) * 2**_SUBPIXEL_BITS)
    visible = np.isfinite(face).all(axis=1)
    for (x, y), color, shown in zip(_fixed(face).tolist(), colors, visible, strict=True):
        if shown:
            cv2.circle(picture, (x, y), radius, color, cv2.FILLED, cv2.LINE_AA, _SUBPIXEL_BITS)


def _draw_indices(picture: np.ndarray, face: np.ndarray) -> None:
    size = max(_extent(picture, face) / 800, 0.25)
    for index, (x, y) in enumerate(face):
        if np.isfinite((x, y)).all():
            write_text(picture, str(index), (round(x) + 2, round(y) - 2), size, LABEL_COLOR)


def _draw_box(picture: np.ndarray, face: np.ndarray, caption: str) -> None:
    x, y, side, _ = square_box(face_box(face)).tolist()
    extent = min(side, max(picture.shape[:2]))
    cv2.rectangle(picture, (x, y), (x + side - 1, y + side - 1), LABEL_COLOR, max(round(extent / 250), 1))
    if caption:
        size = max(extent / 300, 0.4)
        # Above the box, or as near as it can be read: where the picture cuts a face, its box begins outside.
        (width, height), below = cv2.getTextSize(caption, cv2.FONT_HERSHEY_SIMPLEX, size, 1)
        left = min(max(x, 2), max(picture.shape[1] - width - 2, 0))
        low = min(max(y - 4, height + 4), max(picture.shape[0] - below - 2, 0))
        write_text(picture, caption, (left, low), size, LABEL_COLOR)


def _caption(faces: Landmarks | np.ndarray, index: int) -> str:
    identity = f"{np.atleast_1d(faces.ids)[index]}: " if isinstance(faces, TrackedFaces) else ""
    return f"{identity}{np.atleast_1d(faces.confidence)[index]:.2f}" if isinstance(faces, Faces) else ""


def _score_color(score: float) -> tuple[int, int, int]:
    share = min(max(float(score), 0), 1)
    return round(255 * min(2 - 2 * share, 1)), round(255 * min(2 * share, 1)), 40


def _with_heatmaps(picture: np.ndarray, points: np.ndarray, engine: Engine) -> np.ndarray:
    """The largest of each face's heatmaps in each pixel, as colours over its upright box."""
    heat = np.zeros(picture.shape[:2], np.float32)
    config, shape = engine.config, packaged_shape(points.shape[1])
    for face in points[np.isfinite(points).all(axis=2).any(axis=1)]:
        visible = np.isfinite(face).all(axis=1)
        boxes, angles = upright_boxes(face[None, visible], shape and shape.mean[visible])
        if not touches(boxes[0], picture) or boxes[0, 2] > 2 * max(picture.shape[:2]):
            continue
        crop = network_input(picture, boxes[0], config.input_size, config.in_channels, angles[0])
        seen = engine.heatmaps(crop[None])[0].amax(dim=0).clamp(0, 1).cpu().numpy()
        three = np.array([[0, 0], [1, 0], [0, 1]], np.float32)
        there = turned(from_crop(three[None], boxes, config.input_size / config.stride), boxes, angles)[0]
        matrix = cv2.getAffineTransform(three, there.astype(np.float32))
        height, width = seen.shape  # (in a large picture it covers a small part)
        corners = matrix @ np.array([[-1, -1, 1], [-1, height, 1], [width, -1, 1], [width, height, 1]]).T
        left, top = np.clip(np.floor(corners.min(axis=1)), 0, picture.shape[1::-1]).astype(int)
        right, bottom = np.clip(np.ceil(corners.max(axis=1)) + 1, 0, picture.shape[1::-1]).astype(int)
        matrix[:, 2] -= left, top
        part = heat[top:bottom, left:right]
        if part.size:
            np.maximum(part, cv2.warpAffine(seen, matrix, part.shape[::-1]), out=part)
    colors = cv2.applyColorMap((heat * 255).astype(np.uint8), cv2.COLORMAP_INFERNO)[..., ::-1]
    opacity = HEAT * np.minimum(2 * heat, 1)[..., None]
    return np.ascontiguousarray(np.rint(picture * (1 - opacity) + colors * opacity).astype(np.uint8))


def write_text(
    picture: np.ndarray, text: str, at: tuple[int, int], size: float = 0.45, color: tuple[int, int, int] = (255,) * 3
) -> None:
    """Write a line of text into a picture (H, W, 3), its lower left corner at x, y; black around it."""
    # (Not with thicker letters below: OpenCV 5 draws those further apart.)
    (x, y), width = at, max(round(size), 1)
    around = [(x + dx, y + dy) for dx in (-width, width) for dy in (-width, width)]
    for place, shade in [*((place, (0, 0, 0)) for place in around), (at, color)]:
        cv2.putText(picture, text, place, cv2.FONT_HERSHEY_SIMPLEX, size, shade, 1, cv2.LINE_AA)


def contact_sheet(tiles: list[np.ndarray], captions: list[str], columns: int) -> np.ndarray:
    """Tiles of one size side by side, each with a caption.

    Args:
        tiles: (H, W, 3) uint8 each.

    Returns:
        (rows * H, columns * W, 3) uint8.
    """
    height, width = tiles[0].shape[:2]
    sheet = np.zeros((-(-len(tiles) // columns) * height, columns * width, 3), np.uint8)
    for index, (tile, caption) in enumerate(zip(tiles, captions, strict=True)):
        row, column = divmod(index, columns)
        part = sheet[row * height : (row + 1) * height, column * width : (column + 1) * width]
        part[:] = tile
        write_text(part, caption, (4, height - 6))
    return sheet
