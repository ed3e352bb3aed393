"""The crop cache: all faces of a training in one compact file, cut out once with room for augmentation."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

import cv2
import numpy as np

from .datasets import UNREADABLE, Face, is_validation
from .files import whole_file
from .images import check_touches, crop, face_box, square_box, to_crop

MARGIN = 1.6
"""Side of a cached crop over that of the face box: what rotation by 30 degrees and 12.5 % of scale can reach.
(Faces of the recipe `scene` may be smaller still: beyond the crop its border repeats.)"""
CROP_SIZE = 180
"""Side of a cached crop in pixels: the face box is 112 px wide, a bit more than the network's 96."""
JPEG_QUALITY = 95
LARGEST_FACE = 3
"""Times the longer side of its picture: a larger face box has a label that was mistyped."""
BACKGROUND_CROPS = 6
"""Squares that are cut out of a background picture, from half of `CROP_SIZE` to the whole picture."""


@dataclass(frozen=True)
class CropCache:
    """Crops with room around the face box, in memory.

    Those of background pictures have NaN for points and the middle of the crop for a box.
    """

    images: list[np.ndarray]
    """M times (S, S) or (S, S, 3) uint8."""
    points: np.ndarray
    """(M, N, 2) float32, pixels of the crops."""
    boxes: np.ndarray
    """(M, 4) float32, the face boxes in pixels of the crops."""
    groups: np.ndarray
    """(M,) str, see `datasets.Face`."""
    sets: np.ndarray
    """(M,) str, the path that a face was read from."""

    def __len__(self) -> int:
        return len(self.images)

    @property
    def num_landmarks(self) -> int:
        return self.points.shape[1]

    @property
    def channels(self) -> int:
        return 1 if self.images[0].ndim == 2 else 3

    def held_out(self) -> np.ndarray:
        """Which crops are for validation, (M,) bool."""
        return np.array([is_validation(group) for group in self.groups])

    def digest(self) -> str:
        """What tells it from others: a hash of all that is in it."""
        digest = sha256()
        for part in (*self.images, self.points, self.boxes, self.groups, self.sets):
            digest.update(np.ascontiguousarray(part))
        return digest.hexdigest()


def labelled_box(face: Face, image: np.ndarray, mean: np.ndarray | None) -> np.ndarray:
    """`face_box` of a labelled face.

    Raises:
        ValueError: one that does not meet the picture, is far larger, or has no extent; names the face.
    """
    points = face.points[~np.isnan(face.points).any(axis=1)]
    if len(points) and np.ptp(points, axis=0).max() == 0:
        got = f"all of them at {points[0, 0]:g}, {points[0, 1]:g}"
        raise ValueError(
            f"{face.name}: expected labels at different places (a cell without a label is empty), got {got}"
        )
    box = face_box(face.points, mean)
    check_touches(box, image, f"{face.name}, its labels")
    if box[2] > LARGEST_FACE * max(image.shape[:2]):
        size = f"{image.shape[1]} x {image.shape[0]}"
        raise ValueError(f"{face.name}: expected labels in its picture of {size} pixels, got a face of {box[2]:g}")
    return box


def mean_shape(points: np.ndarray, boxes: np.ndarray) -> np.ndarray | None:
    """Mean of the fully labelled faces among some (M, N, 2), with boxes (M, 4): (N, 2) in units of the face box; None
    where there is none."""
    shapes = to_crop(points, boxes, 1)
    shapes = shapes[~np.isnan(shapes).any((1, 2))]
    return shapes.mean(axis=0) + 0.5 if len(shapes) else None


def face_crop(face: Face, color: bool, mean: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Cut a face out, with room around it.

    Args:
        mean: see `face_box`.

    Returns:
        image (S, S) or (S, S, 3) uint8, points (N, 2) float32, box (4,) float32, both in pixels of the crop.
    """
    image = face.image(color)
    box = labelled_box(face, image, mean)
    square = square_box(box, MARGIN)
    scale = CROP_SIZE / square[2]
    box = np.array([*((box[:2] - square[:2]) * scale), *(box[2:] * scale)], np.float32)
    return crop(image, square, CROP_SIZE), to_crop(face.points, square, CROP_SIZE).astype(np.float32), box


def background_crops(
    face: Face, num_landmarks: int, color: bool
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Cut `BACKGROUND_CROPS` squares out of a picture, of sizes and at places that follow from its name.

    Yields:
        what `face_crop` returns: points (num_landmarks, 2) are NaN, the box is in the middle.
    """
    points = np.full((num_landmarks, 2), np.nan, np.float32)
    box = square_box(np.array([0, 0, CROP_SIZE, CROP_SIZE]), 1 / MARGIN).astype(np.float32)
    image, random = face.image(color), np.random.default_rng(list(face.name.encode(errors="surrogateescape")))
    height, width = image.shape[:2]
    largest = min(height, width)
    smallest = min(CROP_SIZE / 2, largest)
    for _ in range(BACKGROUND_CROPS):
        side = int(smallest * (largest / smallest) ** random.random())
        x, y = random.integers(0, width - side + 1), random.integers(0, height - side + 1)
        yield crop(image, np.array([x, y, side, side]), CROP_SIZE), points, box


def write_cache(
    path: Path,
    sets: dict[str, list[Face]],
    color: bool = False,
    progress: Callable[[list], Iterable] | None = None,
) -> int:
    """Write the crop cache of several sets of faces.

    Args:
        path: the file to write, `.npz`; it appears complete or not at all.
        sets: faces by the name of their set.
        color: RGB crops instead of grayscale.
        progress: wraps the iterable of faces (tqdm).

    Returns:
        Number of crops.

    Raises:
        ValueError: sets with different numbers of landmarks, no labelled face, an unreadable picture, or labels that
            are not in it.
    """
    faces = [(name, face) for name, members in sets.items() for face in members]
    counts = {len(face.points): f"{len(face.points)} in {name} ({face.name})" for name, face in faces}
    counts.pop(0, None)
    if len(counts) != 1:
        got = ", ".join(counts.values()) or f"no labelled face in {', '.join(sets)}"
        raise ValueError(f"sets: expected one number of landmarks in all labelled faces, got {got}")
    (num_landmarks,) = counts
    labelled = np.stack([face.points for _, face in faces if len(face.points)])
    mean = mean_shape(labelled, np.stack([face_box(its_points) for its_points in labelled]))
    blobs, points, boxes, groups, names = [], [], [], [], []
    for name, face in progress(faces) if progress else faces:
        crops = [face_crop(face, color, mean)] if len(face.points) else background_crops(face, num_landmarks, color)
        for image, its_points, box in crops:
            image = cv2.cvtColor(image, cv2.COLOR_RGB2BGR) if color else image
            blobs.append(cv2.imencode(".jpg", image, (cv2.IMWRITE_JPEG_QUALITY, JPEG_QUALITY))[1])
            points.append(its_points)
            boxes.append(box)
            groups.append(face.group)
            names.append(name)
    with whole_file(path) as partial, partial.open("wb") as file:
        np.savez(
            file,
            jpegs=np.concatenate(blobs),
            sizes=np.array([len(blob) for blob in blobs]),
            points=np.stack(points),
            boxes=np.stack(boxes),
            groups=np.array(groups),
            sets=np.array(names),
            color=np.array(color),
        )
    return len(blobs)


def read_cache(path: Path) -> CropCache:
    """Read a crop cache that `write_cache` wrote.

    Raises:
        ValueError: not such a file.
    """
    try:
        with Path(path).open("rb") as raw, np.load(raw, allow_pickle=False) as file:
            flag = cv2.IMREAD_COLOR if file["color"] else cv2.IMREAD_GRAYSCALE
            blobs = np.split(file["jpegs"], np.cumsum(file["sizes"])[:-1])
            images = [cv2.imdecode(blob, flag) for blob in blobs]
            if any(image is None for image in images):
                raise ValueError("a crop that does not decode")
            if file["color"]:
                images = [cv2.cvtColor(image, cv2.COLOR_BGR2RGB) for image in images]
            return CropCache(images, file["points"], file["boxes"], file["groups"], file["sets"])
    except UNREADABLE as error:
        raise ValueError(f"{path}: expected a crop cache from `lgcn-fast prepare`, got {error}") from error


def training_shapes(cache: CropCache, sets: list[str] | None = None) -> np.ndarray:
    """Landmarks of the crops that are not for validation, of some sets or all: (M, N, 2) float32.

    Raises:
        ValueError: a set that the cache does not have.
    """
    known = sorted(set(cache.sets.tolist()))
    if sets is not None and not set(sets) <= set(known):
        raise ValueError(f"sets: expected some of {', '.join(known)}, got {', '.join(sets)}")
    return cache.points[~cache.held_out() & np.isin(cache.sets, known if sets is None else sets)]
