"""Augmentation: one random similarity transform and some light on the way from a cached crop to the network's input."""

from dataclasses import dataclass

import cv2
import numpy as np
from numpy.random import Generator

FIXED_VARIANTS = 18


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
    fixed: bool = False
    """The paper's fixed set of `FIXED_VARIANTS`: scale and rotation at their ends or none, mirrored or not."""
    contrast: float = 0.0
    """Largest relative change of contrast; half of it, of the value range, the largest change of brightness."""
    blur: float = 0.0
    """Largest standard deviation of a Gaussian blur, pixels; one image in four."""
    noise: float = 0.0
    """Largest standard deviation of noise, gray levels; one image in four."""
    occlusion: float = 0.0
    """Largest side of a rectangle that hides a part, as a share of the image; every second image."""


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
    image = cv2.warpAffine(image, matrix, (size, size), flags=cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)
    points = points @ matrix[:, :2].T + matrix[:, 2]
    if mirror and augmentation.mirror and mirror_order is not None:
        image = np.ascontiguousarray(image[:, ::-1])
        points = points[list(mirror_order)]
        points[:, 0] = size - 1 - points[:, 0]
        # The mirror has turned the shift round; it must point where it does in a photo of a face turned like this.
        points += 2 * label_shift * box[2] * matrix[:, 0] * (1, -1)
    return _relight(image, augmentation, random), points.astype(np.float32)


def _relight(image: np.ndarray, augmentation: Augmentation, random: Generator) -> np.ndarray:
    if augmentation.blur and random.random() < 0.25:
        image = cv2.GaussianBlur(image, (0, 0), random.uniform(0.3, max(augmentation.blur, 0.31)))
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
    return np.rint(np.clip(image, 0, 255)).astype(np.uint8)
