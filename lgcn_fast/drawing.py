"""Landmarks drawn on pictures."""

import cv2
import numpy as np

from .landmarks import SCHEMES

LINE_COLOR = (80, 220, 100)
POINT_COLOR = (255, 70, 70)
LABEL_COLOR = (70, 160, 255)
_SUBPIXEL_BITS = 4


def draw_landmarks(image: np.ndarray, points: np.ndarray, color: tuple[int, int, int] = POINT_COLOR) -> np.ndarray:
    """Draw the points of some faces, and the lines between them where the annotation scheme is known.

    Args:
        image: (H, W) or (H, W, 3) RGB uint8; it is not changed.
        points: (faces, N, 2), pixels; points that are NaN are left out.
        color: RGB of the points.

    Returns:
        (H, W, 3) uint8 RGB.
    """
    image = cv2.cvtColor(image, cv2.COLOR_GRAY2RGB) if image.ndim == 2 else image.copy()
    for face in points:
        visible = np.isfinite(face).all(axis=1)
        if not visible.any():
            continue
        extent = float((face[visible].max(axis=0) - face[visible].min(axis=0)).max())
        fixed = np.round(np.nan_to_num(face) * 2**_SUBPIXEL_BITS).astype(np.int32)
        radius = round(max(extent / 130, 0.8) * 2**_SUBPIXEL_BITS)
        thickness = max(round(extent / 250), 1)
        scheme = SCHEMES.get(len(face))
        for stroke in scheme.lines if scheme else ():
            line = fixed[[index for index in stroke if visible[index]]]
            cv2.polylines(image, [line], False, LINE_COLOR, thickness, cv2.LINE_AA, _SUBPIXEL_BITS)
        for x, y in fixed[visible].tolist():
            cv2.circle(image, (x, y), radius, color, cv2.FILLED, cv2.LINE_AA, _SUBPIXEL_BITS)
    return image


def contact_sheet(tiles: list[np.ndarray], captions: list[str], columns: int) -> np.ndarray:
    """Tiles of one size side by side, each with a caption.

    Args:
        tiles: (S, S, 3) uint8 each.

    Returns:
        (rows * S, columns * S, 3) uint8.
    """
    side = tiles[0].shape[0]
    sheet = np.zeros((-(-len(tiles) // columns) * side, columns * side, 3), np.uint8)
    for index, (tile, caption) in enumerate(zip(tiles, captions, strict=True)):
        tile = tile.copy()
        cv2.putText(tile, caption, (4, side - 6), cv2.FONT_HERSHEY_SIMPLEX, 0.45, (0, 0, 0), 3, cv2.LINE_AA)
        cv2.putText(tile, caption, (4, side - 6), cv2.FONT_HERSHEY_SIMPLEX, 0.45, (255, 255, 255), 1, cv2.LINE_AA)
        row, column = divmod(index, columns)
        sheet[row * side : (row + 1) * side, column * side : (column + 1) * side] = tile
    return sheet
