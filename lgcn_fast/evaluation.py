"""Landmarks of labelled faces, and how far they are off (section 4.1)."""

from collections import Counter
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from torch import Tensor

import lgcn_fast_kernels

from .crops import labelled_box
from .datasets import Face, enough_labels
from .engine import Engine
from .fitting import NativeFitter
from .images import face_box, square_box
from .landmarks import SCHEMES
from .loading import engine_for, shape_for
from .model import LGCN
from .peaks import PEAK_RADIUS
from .prediction import CHUNK, locate
from .shape import ShapeModel

FAILURE = 0.1
"""Faces with an error above this share of the inter-ocular distance count as failures."""


@dataclass(frozen=True)
class Evaluation:
    """Predicted and labelled landmarks of a set of faces, in pixels of their pictures."""

    faces: list[Face]
    predicted: np.ndarray
    """(B, N, 2) float32 or float64."""
    labelled: np.ndarray
    """(B, N, 2) float32, NaN without a label."""
    normalisation: str
    """"inter-ocular" or "face-size"."""

    def errors(self, outline: bool = True) -> np.ndarray:
        """Error of each face, see `landmark_errors`."""
        return landmark_errors(self.predicted, self.labelled, self.normalisation, outline)

    def point_sets(self) -> dict[str, bool]:
        """What errors are taken over, "68 points" and "51 points", and whether the outline is in it; without the second
        where there is no outline, or nothing else has labels."""
        count = self.labelled.shape[1]
        inner = count - len(SCHEMES[count].outline)
        has_inner = inner < count and not np.isnan(self.errors(outline=False)).all()
        return {f"{count} points": True} | ({f"{inner} points": False} if has_inner else {})

    def summaries(self) -> dict[str, dict[str, float]]:
        """`summary` of the errors over each set of points."""
        return {points: summary(self.errors(outline)) for points, outline in self.point_sets().items()}

    def by_face(self) -> dict[str, float | None]:
        """The error of each face over all points, percent, by its name; the second of a name is "NAME (2)". None where
        the labels that normalise are missing."""
        errors, names = {}, Counter()
        for face, error in zip(self.faces, self.errors(), strict=True):
            names[face.name] += 1
            name = face.name if names[face.name] == 1 else f"{face.name} ({names[face.name]})"
            errors[name] = None if np.isnan(error) else 100 * float(error)
        return errors


def landmark_errors(
    predicted: np.ndarray, labelled: np.ndarray, normalisation: str = "inter-ocular", outline: bool = True
) -> np.ndarray:
    """Mean distance of the points of each face, normalised.

    Args:
        predicted: (B, N, 2) pixels.
        labelled: (B, N, 2) pixels; a point without a label (NaN) does not count.
        normalisation: "inter-ocular", the distance of the outer eye corners; or "face-size", the mean of width and
            height of the labelled points, as Table 1 has it for Menpo.
        outline: count the points of the face outline ("68"), or not ("51").

    Returns:
        (B,) float64, shares; NaN where the labels that normalise are missing, or at one place.

    Raises:
        ValueError: shapes that differ, an unknown normalisation, or landmarks of an unknown scheme.
    """
    scheme = SCHEMES.get(labelled.shape[1])
    if scheme is None:
        raise ValueError(f"labelled: expected {' or '.join(map(str, SCHEMES))} landmarks, got {labelled.shape[1]}")
    if predicted.shape != labelled.shape:
        raise ValueError(f"predicted: expected the shape of labelled, {labelled.shape}, got {predicted.shape}")
    labelled = labelled.astype(np.float64)
    if normalisation == "inter-ocular":
        left, right = (labelled[:, index] for index in scheme.eye_corners)
        size = np.linalg.norm(left - right, axis=-1)
    elif normalisation == "face-size":
        size = (np.nanmax(labelled, axis=1) - np.nanmin(labelled, axis=1)).mean(axis=-1)
    else:
        raise ValueError(f"normalisation: expected 'inter-ocular' or 'face-size', got {normalisation!r}")
    distance = np.linalg.norm(predicted - labelled, axis=-1)
    if not outline:
        distance = np.delete(distance, scheme.outline, axis=1)
    counted = ~np.isnan(distance)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(counted, distance, 0).sum(axis=1) / counted.sum(axis=1) / np.where(size > 0, size, np.nan)


def summary(errors: np.ndarray) -> dict[str, float]:
    """Median, mean, failures and area under the cumulative error curve up to 10 %, in percent.

    Args:
        errors: (B,) shares; NaN is left out.
    """
    errors = errors[~np.isnan(errors)]
    return {
        "faces": len(errors),
        "median": 100 * float(np.median(errors)),
        "mean": 100 * float(errors.mean()),
        "failures": 100 * float((errors > FAILURE).mean()),
        "auc": 100 * float((1 - errors / FAILURE).clip(0).mean()),
    }


def evaluate(
    faces: list[Face],
    model: Engine | LGCN | Path | str | None = None,
    normalisation: str = "inter-ocular",
    shape: ShapeModel | Path | str | None = None,
    device: str = "auto",
    precision: str = "auto",
    ensemble: int = 1,
) -> dict[str, Evaluation]:
    """Find the landmarks of labelled faces, each in the box of its labels enlarged by 17 %, in one pass of the network.

    Args:
        model, shape, device, precision, ensemble: see `predict`.

    Returns:
        The points that `predict` finds with the fit, as "fit", and without it, as "heatmap maxima".

    Raises:
        ValueError: no face with two labels or more, none with the labels that errors are divided by, labels that are
            not in the picture, or another number of landmarks than the model's.
    """
    faces = [face for face in faces if enough_labels(face.points)]
    if not faces:
        raise ValueError("faces: expected at least one labelled face, got none")
    engine = engine_for(model, device, precision)
    counts = sorted({len(face.points) for face in faces})
    if counts != [engine.config.num_landmarks]:
        raise ValueError(f"faces: expected the model's {engine.config.num_landmarks} landmarks, got {counts}")
    labelled = np.stack([face.points for face in faces])
    if np.isnan(landmark_errors(labelled, labelled, normalisation)).all():
        needed = "both outer eye corners (or the normalisation face-size)"
        raise ValueError(f"faces: expected some with labels of {needed}, got none")
    shape = shape_for(shape, engine.config.num_landmarks)
    fitter = NativeFitter(shape)
    read = partial(_fit_and_maxima, engine, fitter)
    found = []
    for start in range(0, len(faces), CHUNK):
        part = faces[start : start + CHUNK]
        images = [face.image(color=True) for face in part]
        boxes = [labelled_box(face, image, shape.mean) for face, image in zip(part, images, strict=True)]
        boxes = np.stack([square_box(box) for box in boxes])
        found.append(locate(images, boxes, engine, read, ensemble)[0])
    methods = zip(("fit", "heatmap maxima"), np.concatenate(found, axis=1).astype(np.float32), strict=True)
    return {method: Evaluation(faces, points, labelled, normalisation) for method, points in methods}


def _fit_and_maxima(engine: Engine, fitter: NativeFitter, crops: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Points (2, B, N, 2) in pixels of the heatmaps and scores (2, B, N), off the same heatmaps, on the host."""
    heatmaps = engine.heatmaps(crops).cpu().numpy()
    fitted = fitter(heatmaps, engine.config.stride, engine.num_threads)
    radius = PEAK_RADIUS / engine.config.stride
    maxima, values = lgcn_fast_kernels.peak_centroids(heatmaps, radius, engine.num_threads)
    return np.stack([fitted.points, maxima]), np.stack([fitted.certainties, values])


def with_mean_shape(evaluation: Evaluation, mean_shape: np.ndarray) -> Evaluation:
    """The same faces, "predicted" by putting a mean shape into each box: what any network must beat.

    Args:
        mean_shape: (N, 2) in units of the box.
    """
    boxes = np.stack([face_box(points, mean_shape) for points in evaluation.labelled])
    predicted = mean_shape * boxes[:, None, 2:] + boxes[:, None, :2] - 0.5
    return Evaluation(evaluation.faces, predicted, evaluation.labelled, evaluation.normalisation)
