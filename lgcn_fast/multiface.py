"""How well `detect` finds the faces of whole photos (section 4.3): recall, errors, detections without a label."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np

from .datasets import ENCODING
from .detection import Faces
from .drawing import draw
from .evaluation import FAILURE, landmark_errors
from .images import face_box, read_image

LABELLED_COLOR, EXTRA_COLOR = (80, 220, 100), (255, 0, 255)


@dataclass(frozen=True)
class LabelledPhoto:
    """A photo with the landmarks of its labelled faces; there may be others in it."""

    path: Path
    points: np.ndarray
    """(F, N, 2) pixels, 0-based."""


@dataclass(frozen=True)
class PhotoScore:
    """What was found in a photo, beside its labels."""

    photo: LabelledPhoto
    found: Faces
    errors: np.ndarray
    """(F,) of each labelled face: inter-ocular error of the detection that fits it best, a share; infinite without."""
    counted: np.ndarray
    """(F,) bool: labelled faces that are large enough."""
    extra: np.ndarray
    """Indices of the detections that are no labelled face: faces without a label, or false ones. Look at them."""


def read_photos(folder: Path) -> list[LabelledPhoto]:
    """Read `faces.json` of a folder: a list of `{"image": name, "faces": [[[x, y] * N], ...]}`.

    Raises:
        ValueError: no such file, another content, or a landmark without a label.
    """
    path = Path(folder) / "faces.json"
    try:
        entries = json.loads(path.read_text(ENCODING))
        photos = [LabelledPhoto(path.parent / e["image"], np.array(e["faces"], np.float64)) for e in entries]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f'{path}: expected a list of {{"image": ..., "faces": ...}}, got {error}') from error
    for photo in photos:
        if photo.points.size and (photo.points.ndim != 3 or photo.points.shape[2] != 2):
            raise ValueError(f"{path}: expected faces (F, N, 2) in {photo.path.name}, got {photo.points.shape}")
        if not np.isfinite(photo.points).all():
            raise ValueError(
                f"{path}: expected all landmarks of each face in {photo.path.name}, got some without label"
            )
    return photos


def score_photo(photo: LabelledPhoto, found: Faces, min_face: float) -> PhotoScore:
    """Match what was found with the labels: each detection belongs to the labelled face whose points are nearest.

    Args:
        min_face: labelled faces with a smaller box do not count, whether found or not.

    Raises:
        ValueError: labels of another number of landmarks.
    """
    if photo.points.size and photo.points.shape[1] != found.points.shape[1]:
        expected, got = found.points.shape[1], photo.points.shape[1]
        raise ValueError(f"{photo.path}: expected labels of the model's {expected} landmarks, got {got}")
    sides = np.array([face_box(points)[2] for points in photo.points])
    errors = np.full((len(found), len(photo.points)), np.inf)
    for index, points in enumerate(found.points if len(photo.points) else ()):
        repeated = np.repeat(points[None], len(photo.points), axis=0)
        errors[index] = landmark_errors(repeated, photo.points)
    best = errors.min(axis=0, initial=np.inf)
    # Half the inter-ocular distance off: on another face, or on none.
    extra = np.flatnonzero(errors.min(axis=1, initial=np.inf) > 0.5)
    return PhotoScore(photo, found, best, sides >= min_face, extra)


def score_photos(photos: list[LabelledPhoto], find: Callable[[np.ndarray], Faces], min_face: float) -> list[PhotoScore]:
    """Run a detector, (H, W, 3) uint8 RGB to `Faces`, on labelled photos."""
    return [score_photo(photo, find(read_image(photo.path, color=True)), min_face) for photo in photos]


def summary(scores: list[PhotoScore]) -> dict[str, float]:
    """Labelled faces, how many of them were found with an error below 10 %, their errors, unlabelled detections."""
    errors = np.concatenate([np.empty(0), *(score.errors[score.counted] for score in scores)])
    found = errors[errors < FAILURE]
    return {
        "photos": len(scores),
        "faces": len(errors),
        "found": len(found),
        "recall": 100 * len(found) / max(len(errors), 1),
        "mean error": 100 * float(found.mean()) if len(found) else float("nan"),
        "median error": 100 * float(np.median(found)) if len(found) else float("nan"),
        "unlabelled": sum(len(score.extra) for score in scores),
    }


def draw_score(score: PhotoScore) -> np.ndarray:
    """The photo with all landmarks, labelled faces in green squares and unlabelled detections in magenta ones."""
    image = draw(read_image(score.photo.path, color=True), score.found.points)
    labels = [(face_box(points), LABELLED_COLOR) for points in score.photo.points]
    extras = [(score.found.boxes[index], EXTRA_COLOR) for index in score.extra]
    for (x, y, width, height), color in labels + extras:
        cv2.rectangle(image, (round(x), round(y)), (round(x + width), round(y + height)), color, 2)
    return image
