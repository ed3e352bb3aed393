"""Pictures: reading files, square boxes, crops of one size. Boxes are x, y, width, height in pixels.

A box covers whole pixels: its left edge lies half a pixel left of pixel x, as with slices and `cv2.resize`.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from math import floor
from pathlib import Path
from threading import Lock

import cv2
import numpy as np
from array_api_compat import array_namespace, device

from .files import write_whole
from .peaks import Array

BOX_ENLARGEMENT = 1.17
"""Side of a face box over that of the tight square around the landmarks (paper, section 4)."""

OVERSAMPLING = 1.5
"""Pixels, a side, of what a turned crop is sampled from, over its own."""

LEAST_CONTRAST, LARGEST_GAIN = 25.0, 12.0
"""Standard deviation of gray levels that a pale face gets, and how much more than it had at most. Of the validation
faces of 300-W and YouTube-Faces 2 and 8 % have less."""
DARKEST, BRIGHTEST = 60.0, 170.0
"""Range of a face's mean gray level."""


def read_image(path: Path | str, color: bool = False) -> np.ndarray:
    """Read a picture file.

    Args:
        path: any format that OpenCV reads; EXIF orientation is applied.
        color: RGB instead of grayscale.

    Returns:
        (H, W) uint8, with `color` (H, W, 3) in RGB order.

    Raises:
        MemoryError: it decodes to more than there is memory for.
        ValueError: not a readable, complete picture; names the file.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path}: expected a picture file, got {what_else_is(path)}")
    data = np.frombuffer(path.read_bytes(), np.uint8)
    with silent_opencv():
        try:
            image = cv2.imdecode(data, cv2.IMREAD_COLOR if color else cv2.IMREAD_GRAYSCALE) if data.size else None
        except cv2.error as error:
            if error.code == cv2.Error.StsNoMem:
                raise MemoryError(f"{path}: {error.err}") from None
            image = None
    if image is None:
        raise ValueError(f"{path}: expected a picture file, got {data.size} bytes that do not decode as one")
    return cv2.cvtColor(image, cv2.COLOR_BGR2RGB) if color else image


def what_else_is(path: Path) -> str:
    """What is where a file was expected, for error messages."""
    if path.is_dir():
        return f"a directory (its files are {path / '*'})"
    return "a pipe or device" if path.exists() else "nothing there"


def write_image(path: Path | str, image: np.ndarray) -> None:
    """Write a picture, (H, W, 3) uint8 RGB, in the format of the file's name.

    Raises:
        OSError: it could not be written.
        ValueError: a name that is not one of a picture, or an array that is none.
    """
    path = Path(path)
    check_picture(image)
    if not cv2.haveImageWriter(f"picture{path.suffix}"):
        got = path.suffix or "none"
        raise ValueError(f"{path}: expected the suffix of a picture, such as .png or .jpg, got {got}")
    # (OpenCV itself crashes on names that are no UTF-8, and does not say why it could not write.)
    encoded, data = cv2.imencode(path.suffix, cv2.cvtColor(image, cv2.COLOR_RGB2BGR))
    if not encoded:
        raise ValueError(f"{path}: expected a picture that fits the format, got {image.shape}")
    write_whole(path, data.data)


def check_picture(image: np.ndarray) -> None:
    """Raise ValueError for anything but an array (H, W, 3) uint8 with pixels."""
    if not isinstance(image, np.ndarray):
        raise ValueError(f"image: expected an array (H, W, 3) uint8, got {type(image).__name__}")
    if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8 or not image.size:
        raise ValueError(f"image: expected (H, W, 3) uint8, got {image.shape} {image.dtype}")


_silence, _silent_calls, _level = Lock(), 0, 0


def _forked() -> None:
    """A forked process has none of the threads that were to end the silence."""
    global _silent_calls
    if _silent_calls:
        _silent_calls = 0
        cv2.utils.logging.setLogLevel(_level)
    _silence.release()


if hasattr(os, "register_at_fork"):  # while nobody is changing level or number
    os.register_at_fork(before=_silence.acquire, after_in_parent=_silence.release, after_in_child=_forked)


@contextmanager
def silent_opencv() -> Iterator[None]:
    """Keeps OpenCV from writing what it thinks of a file to standard error, until no thread is in here any more."""
    global _silent_calls, _level
    logging = cv2.utils.logging
    with _silence:
        if not _silent_calls:
            _level = logging.setLogLevel(logging.LOG_LEVEL_SILENT)
        _silent_calls += 1
    try:
        yield
    finally:
        with _silence:
            _silent_calls -= 1
            if not _silent_calls:
                logging.setLogLevel(_level)


def face_box(points: np.ndarray, mean: np.ndarray | None = None) -> np.ndarray:
    """The tight square around landmarks, enlarged by 17 % (paper, section 4).

    Args:
        points: (N, 2), NaN without a label.
        mean: (N, 2), a mean shape of any size and place. It is brought to the labelled points, of which there must be
            two, and stands for the others: the square is one around all landmarks. Without it they do not count.

    Returns:
        (4,) float32: x, y, width, height.
    """
    labelled = ~np.isnan(points).any(axis=1)
    if mean is not None and 2 <= labelled.sum() < len(points):
        factor, shape = similarity(mean[labelled], points[labelled]), mean @ (1, 1j)
        moved = factor * (shape - shape[labelled].mean()) + (points[labelled] @ (1, 1j)).mean()
        points = np.where(labelled[:, None], points, np.stack([moved.real, moved.imag], axis=1))
    low, high = np.nanmin(points, axis=0), np.nanmax(points, axis=0)
    side = max(float((high - low).max()) * BOX_ENLARGEMENT, 1.0)
    return np.array([*((low + high - side + 1) / 2), side, side], np.float32)


def square_box(box: np.ndarray, scale: float = 1.0) -> np.ndarray:
    """The square of whole pixels around a box's centre, its side the box's longer one times `scale`.

    Returns:
        (4,) int64: x, y, side, side.
    """
    x, y, width, height = (float(v) for v in box)
    # (`round` goes to even numbers: a box one pixel further on would be a square two pixels further on, or none.)
    side = max(floor(max(width, height) * scale + 0.5), 1)
    return np.array([floor(x + (width - side) / 2 + 0.5), floor(y + (height - side) / 2 + 0.5), side, side])


def touches(box: np.ndarray, image: np.ndarray) -> bool:
    """Whether a box (4,) x, y, width, height and an image (H, W) or (H, W, 3) have pixels in common."""
    x, y, width, height = box
    return bool(x < image.shape[1] and y < image.shape[0] and x + width > 0 and y + height > 0)


def meet(boxes: np.ndarray, image: np.ndarray) -> np.ndarray:
    """Which boxes (M, 4) have their middle in an image (H, W) or (H, W, 3), and are at most twice as large: (M,) bool.

    Around others there is nothing to see, or too much to pad.
    """
    height, width = image.shape[:2]
    inside = (middle(boxes) >= -0.5) & (middle(boxes) < (width - 0.5, height - 0.5))
    return inside.all(axis=1) & (boxes[:, 2] <= 2 * max(height, width))


def check_touches(box: np.ndarray, image: np.ndarray, name: str) -> None:
    """Raise ValueError where a box and an image have no pixel in common."""
    if not touches(box, image):
        size = f"{image.shape[1]} x {image.shape[0]}"
        got = "x={:g}, y={:g}, width={:g}, height={:g}".format(*box)
        raise ValueError(f"{name}: expected a box that meets the image of {size} pixels, got {got}")


def crop(image: np.ndarray, box: np.ndarray, size: int, gray: bool = False) -> np.ndarray:
    """Cut a square of whole pixels out and resize it; beyond the image the border's pixels repeat.

    Args:
        image: (H, W) or (H, W, 3) uint8 or float32.
        box: (4,) integers from `square_box`; must meet the image.
        size: side of the result in pixels.
        gray: convert RGB to grayscale, before it is resized: less to resize.

    Returns:
        (size, size) or (size, size, 3), dtype of `image`.

    Raises:
        ValueError: a box that does not meet the image, or is no such square.
    """
    box = np.asarray(box).tolist()  # (Python's numbers are faster than NumPy's)
    if len(box) != 4 or box[2] != box[3] or not all(isinstance(number, int) for number in box):
        raise ValueError(f"box: expected four whole numbers, a square as of `square_box`, got {box}")
    check_touches(box, image, "box")
    height, width = image.shape[:2]
    x, y, side, _ = box
    left, top = max(-x, 0), max(-y, 0)
    right, bottom = max(x + side - width, 0), max(y + side - height, 0)
    image = image[max(y, 0) : y + side, max(x, 0) : x + side]
    if gray and image.ndim == 3:
        image = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)
    if left or top or right or bottom:
        image = cv2.copyMakeBorder(image, top, bottom, left, right, cv2.BORDER_REPLICATE)
    if side == size:
        return image
    return cv2.resize(image, (size, size), interpolation=cv2.INTER_AREA if side > size else cv2.INTER_LINEAR)


def upright_boxes(points: np.ndarray, mean: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
    """`face_box` of faces that stand upright in it.

    Args:
        points: (B, N, 2), pixels.
        mean: (N, 2), an upright face of any size and place, as of a shape model. Without it no box is turned.

    Returns:
        boxes (B, 4): x, y, side, side of each square before it is turned about its middle; angles (B,) by which
        it is, radians, clockwise as one sees it.
    """
    angles = np.zeros(len(points)) if mean is None else np.angle([similarity(mean, face) for face in points])
    upright = turned(points, np.zeros((len(points), 4)), -angles)
    low, high = upright.min(axis=1), upright.max(axis=1)
    sides = np.maximum(BOX_ENLARGEMENT * (high - low).max(axis=1), 1.0)[:, None]
    middles = turned((low + high)[:, None] / 2, np.zeros((len(points), 4)), angles)[:, 0]
    return np.concatenate([middles - (sides - 1) / 2, sides, sides], axis=1), angles


def similarity(mean: np.ndarray, points: np.ndarray) -> complex:
    """What takes a mean face (N, 2) to points (N, 2), but for a shift: least squares give the turn and the change of
    size as one factor of complex numbers x + i y."""
    shape = (mean - mean.mean(axis=0)) @ (1, 1j)
    return np.vdot(shape, points @ (1, 1j)) / max(np.vdot(shape, shape).real, 1e-12)


def upright_crop(image: np.ndarray, box: np.ndarray, angle: float, size: int, gray: bool = False) -> np.ndarray:
    """Cut a turned square out, so that what is in it stands upright, and resize it.

    Args:
        image: (H, W) or (H, W, 3) uint8 or float32.
        box: (4,) any fractions, square, its middle in the image.
        angle: by which it is turned about its middle, see `upright_boxes`.
        size: side of the result in pixels.
        gray: convert RGB to grayscale.

    Returns:
        (size, size) or (size, size, 3), dtype of `image`.
    """
    side, centre = float(box[2]), middle(box)
    cos, sin = np.cos(angle), np.sin(angle)
    turn = np.array([[cos, -sin], [sin, cos]]) * (side / size)
    # Large faces are shrunk by areas first: warpAffine looks at four pixels only and would alias.
    whole = side * (abs(cos) + abs(sin)) + 2
    around = square_box((*(centre - whole / 2 + 0.5), whole, whole))
    shrunk = min(int(around[2]), round(OVERSAMPLING * size * float(around[2]) / side))
    scale = shrunk / around[2]
    first = centre - turn @ np.full(2, (size - 1) / 2)
    inverse = np.column_stack([turn * scale, (first - around[:2] + 0.5) * scale - 0.5])
    flags = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
    source = crop(image, around, shrunk, gray)
    return cv2.warpAffine(source, inverse, (size, size), flags=flags, borderMode=cv2.BORDER_REPLICATE)


def lit(image: np.ndarray) -> np.ndarray:
    """A face in light that networks know: a pale one gets more contrast, a dark or glaring one a medium level, others
    stay as they are.

    How much is continuous in mean and deviation of the gray levels, so that nothing jumps in a video.

    Args:
        image: (H, W) or (H, W, 3) uint8 or float32 in 0..255.

    Returns:
        The same shape and dtype.
    """
    mean, deviation = (float(value[0, 0]) for value in cv2.meanStdDev(image.reshape(len(image), -1)))
    gain = min(max(LEAST_CONTRAST / max(deviation, 1e-6), 1.0), LARGEST_GAIN)
    level = min(max(mean, DARKEST), BRIGHTEST)
    if gain == 1 and level == mean:
        return image
    changed = ((image.astype(np.float32) - mean) * gain + level).clip(0, 255)
    return np.rint(changed).astype(np.uint8) if image.dtype == np.uint8 else changed


def middle(boxes: np.ndarray) -> np.ndarray:
    """Middles of boxes (..., 4): (..., 2), pixels."""
    return boxes[..., :2] + (boxes[..., 2:] - 1) / 2


def to_crop(points: np.ndarray, boxes: np.ndarray, size: int) -> np.ndarray:
    """Image coordinates to coordinates in the crops of `boxes`.

    Args:
        points: (..., N, 2) pixels.
        boxes: (..., 4).

    Returns:
        (..., N, 2) pixels of the crops.
    """
    boxes = np.asarray(boxes)[..., None, :]
    return (points - boxes[..., :2] + 0.5) * (size / boxes[..., 2:]) - 0.5


def from_crop(points: Array, boxes: Array, size: float) -> Array:
    """Inverse of `to_crop`, on NumPy arrays or torch tensors."""
    boxes = boxes[..., None, :]
    return (points + 0.5) * (boxes[..., 2:] / size) + boxes[..., :2] - 0.5


def turned(points: Array, boxes: np.ndarray, angles: np.ndarray) -> Array:
    """Where points come to lie when boxes are turned about their middles, and what is in them with them.

    Args:
        points: (..., B, N, 2) pixels, a NumPy array or torch tensor.
        boxes: (B, 4).
        angles: (B,), see `upright_boxes`.

    Returns:
        (..., B, N, 2).
    """
    xp = array_namespace(points)
    cos, sin = np.cos(angles)[:, None, None], np.sin(angles)[:, None, None] * (-1, 1)
    about, cos, sin = (
        xp.asarray(array, dtype=points.dtype, device=device(points)) for array in (middle(boxes)[:, None], cos, sin)
    )
    moved = points - about
    # (No product of matrices: that would be rounded in autocast, and to TF32 where the user has allowed it.)
    return moved * cos + xp.flip(moved, axis=-1) * sin + about
