"""Augmentation: a random similarity transform, another shape of the face and some light, on the way from a cached crop
to the network's input."""

import math
from dataclasses import dataclass
from functools import lru_cache

import cv2
import numpy as np
from numpy.random import Generator

from .images import similarity
from .shape import ShapeModel

FIXED_VARIANTS = 18
WARP_GRID = 12
"""Places along x and y that a warp is computed at; it is interpolated in between."""
WARP_REACH, WARP_FLOOR = 0.1, 0.05
"""Standard deviation of the weights with which landmarks pull what is around them, as a share of the crop's side; and
the sum of weights below which less and less moves."""
WARP_ROUNDS = 8
"""Of finding where a landmark comes to lie: with warps of 0.5, 99.9 % are within 0.1 pixels, all within half a one."""


@dataclass(frozen=True)
class Augmentation:
    """Ranges that random changes are drawn from, uniformly; the defaults are the paper's (section 4), on the fly."""

    mirror: bool = True
    scale: float = 0.125
    """Largest relative change of size."""
    rotation: float = 30.0
    """Largest rotation, degrees."""
    shift: float = 0.0
    """Largest shift of the box along x and y, as a share of its side."""
    warp: float = 0.0
    """Standard deviation of how far the face's shape is to move along each mode of the shape model, over the mode's
    own; a smooth warp follows it about half way."""
    fixed: bool = False
    """The paper's fixed set of `FIXED_VARIANTS`: scale and rotation at their ends or none, mirrored or not."""
    contrast: float = 0.0
    """Largest relative change of contrast; half of it, of the value range, the largest change of brightness."""
    blur: float = 0.0
    """Largest standard deviations of a Gaussian blur, along some direction and across it, pixels; one image in four."""
    noise: float = 0.0
    """Largest standard deviation of noise, gray levels; one image in four."""
    occlusion: float = 0.0
    """Largest side of a rectangle that hides a part, as a share of the image; every second image."""
    compression: float = 0.0
    """Largest loss of quality by JPEG, of 100; one image in four."""

    def __post_init__(self) -> None:
        if not 0 <= self.warp <= 1:
            raise ValueError(f"warp: expected a share of the modes' standard deviations, 0 to 1, got {self.warp}")


NONE = Augmentation(mirror=False, scale=0, rotation=0)
"""Crops as they are."""


def transform_matrix(box: np.ndarray, size: int, scale: float, degrees: float, shift: np.ndarray) -> np.ndarray:
    """Affine map of a box's pixels to a `size` x `size` crop.

    Args:
        box: (4,) x, y, width, height; square.
        scale: size of the face in the result over its nominal size.
        degrees: rotation of the face, clockwise on the screen.
        shift: (2,) shift of the face, as a share of the box.

    Returns:
        (2, 3) float64.
    """
    zoom = size / box[2] * scale
    cos, sin = zoom * np.cos(np.radians(degrees)), zoom * np.sin(np.radians(degrees))
    linear = np.array([[cos, -sin], [sin, cos]])
    middle = box[:2] + (box[2:] - 1) / 2
    target = (size - 1) / 2 + np.asarray(shift) * size
    return np.column_stack([linear, target - linear @ middle])


def augment(
    image: np.ndarray,
    points: np.ndarray,
    box: np.ndarray,
    size: int,
    augmentation: Augmentation,
    mirror_order: tuple[int, ...] | None,
    random: Generator,
    draw: int = 0,
    label_shift: float = 0.0,
    shape: ShapeModel | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Draw one augmented crop.

    Args:
        image: (S, S) or (S, S, 3) uint8, a cached crop.
        points: (N, 2) pixels of `image`.
        box: (4,) face box in `image`.
        size: side of the result in pixels.
        mirror_order: the scheme's mirror permutation; None where it is not known: never mirrored.
        draw: which variant of a fixed set, modulo their number.
        label_shift: how far the labels lie to the right, see `label_shifts`; those of a mirror image will, too.
        shape: for warps; without it, and of faces that have not all labels, there are none.

    Returns:
        (size, size) or (size, size, 3) uint8, and (N, 2) float32 in its pixels.
    """
    if augmentation.fixed:
        mirror, turn = divmod(draw % FIXED_VARIANTS, 9)
        scale, rotation = turn // 3 - 1, turn % 3 - 1
    else:
        mirror = random.random() < 0.5
        scale, rotation = random.uniform(-1, 1, 2)
    shift = random.uniform(-1, 1, 2) * augmentation.shift
    matrix = transform_matrix(box, size, 1 + scale * augmentation.scale, rotation * augmentation.rotation, shift)
    points = points @ matrix[:, :2].T + matrix[:, 2]
    if augmentation.warp and shape is not None and not np.isnan(points).any():
        image, points = _warped(image, points, matrix, size, augmentation.warp, shape, random)
    else:
        image = cv2.warpAffine(image, matrix, (size, size), flags=cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)
    if mirror and augmentation.mirror and mirror_order is not None:
        image = np.ascontiguousarray(image[:, ::-1])
        points = points[list(mirror_order)]
        points[:, 0] = size - 1 - points[:, 0]
        # The mirror has turned the shift round; it must point where it does in a photo of a face turned like this.
        points += 2 * label_shift * box[2] * matrix[:, 0] * (1, -1)
    return _relight(image, augmentation, random), points.astype(np.float32)


def _warped(
    image: np.ndarray,
    points: np.ndarray,
    matrix: np.ndarray,
    size: int,
    warp: float,
    shape: ShapeModel,
    random: Generator,
) -> tuple[np.ndarray, np.ndarray]:
    """A cached crop through an affine map with a face of another shape, and where its points (N, 2) of the result lie.

    A pixel p of the result shows what the affine map alone would have shown at p + d(p). Each landmark would have d
    take it back to where it was; d is the mean of what those near p want, by their distances.
    """
    modes = random.normal(0, warp, len(shape.modes)) * np.sqrt(shape.variances)
    change = np.tensordot(modes, shape.modes, 1) @ (1, 1j) * similarity(shape.mean, points)
    change = np.column_stack([change.real, change.imag])
    step = size / WARP_GRID
    line = (np.arange(WARP_GRID) + 0.5) * step - 0.5
    x, y = (np.exp(-((line[:, None] - part) ** 2) / (2 * (WARP_REACH * size) ** 2)) for part in (points + change).T)
    weights = y[:, None] * x
    back = (-(weights @ change) / (weights.sum(axis=2, keepdims=True) + WARP_FLOOR)).astype(np.float32)
    moved = points
    for _ in range(WARP_ROUNDS):
        place = ((moved + 0.5) / step - 0.5).astype(np.float32)
        moved = points - cv2.remap(back, place[None], None, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)[0]
    shown = cv2.resize(back, (size, size)) + _pixels(size)
    source = cv2.transform(shown, cv2.invertAffineTransform(matrix))
    return cv2.remap(image, source, None, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE), moved


@lru_cache(maxsize=4)
def _pixels(size: int) -> np.ndarray:
    """x and y of each: (size, size, 2) float32."""
    return np.dstack(np.meshgrid(*[np.arange(size, dtype=np.float32)] * 2))


def _relight(image: np.ndarray, augmentation: Augmentation, random: Generator) -> np.ndarray:
    if augmentation.blur and random.random() < 0.25:
        image = blurred(image, *random.uniform(0.3, max(augmentation.blur, 0.31), 2), random.uniform(0, np.pi))
    image = image.astype(np.float32)
    if augmentation.contrast:
        gain = 1 + random.uniform(-1, 1) * augmentation.contrast
        image = (image - image.mean()) * gain + image.mean()
        image += random.uniform(-1, 1) * augmentation.contrast * 128
    if augmentation.occlusion and random.random() < 0.5:
        size = image.shape[0]
        width, height = (random.uniform(0.05, augmentation.occlusion, 2) * size).astype(int) + 1
        x, y = random.integers(0, size - width + 1), random.integers(0, size - height + 1)
        image[y : y + height, x : x + width] = random.uniform(0, 255)
    if augmentation.noise and random.random() < 0.25:
        image += random.normal(0, random.uniform(0, augmentation.noise), image.shape)
    image = np.rint(np.clip(image, 0, 255)).astype(np.uint8)
    if augmentation.compression and random.random() < 0.25:
        quality = round(100 - random.uniform(0, augmentation.compression))
        data = cv2.imencode(".jpg", _colours_turned(image), (cv2.IMWRITE_JPEG_QUALITY, quality))[1]
        image = _colours_turned(cv2.imdecode(data, cv2.IMREAD_UNCHANGED))
    return image


def _colours_turned(image: np.ndarray) -> np.ndarray:
    """RGB as OpenCV's BGR, and back; gray as it is."""
    return image if image.ndim == 2 else cv2.cvtColor(image, cv2.COLOR_RGB2BGR)


def blurred(image: np.ndarray, along: float, across: float, angle: float) -> np.ndarray:
    """A picture out of focus or in motion: blurred by a Gaussian that is as wide along a direction (`angle`, radians,
    clockwise on the screen from the x axis) and across it as given, in pixels."""
    radius = math.ceil(3 * max(along, across))
    y, x = np.mgrid[-radius : radius + 1, -radius : radius + 1]
    cos, sin = math.cos(angle), math.sin(angle)
    kernel = np.exp(-(((x * cos + y * sin) / along) ** 2 + ((y * cos - x * sin) / across) ** 2) / 2)
    return cv2.filter2D(image, -1, kernel / kernel.sum(), borderType=cv2.BORDER_REPLICATE)
