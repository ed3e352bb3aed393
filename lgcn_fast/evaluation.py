"""Errors of predicted landmarks, and the pictures that show them (section 4.1, Figures 4 and 5)."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib.figure
import matplotlib.image
import numpy as np

from .datasets import Face
from .drawing import contact_sheet, draw_landmarks
from .images import crop, face_box, square_box, to_crop
from .landmarks import SCHEMES
from .prediction import CHUNK, predict

FAILURE = 0.1
"""Faces with an error above this share of the inter-ocular distance count as failures."""
TILE = 192
SHEET_COLUMNS = 8


@dataclass(frozen=True)
class Evaluation:
    """Predicted and labelled landmarks of a set of faces, in pixels of their pictures."""

    faces: list[Face]
    predicted: np.ndarray
    """(B, N, 2) float32."""
    labelled: np.ndarray
    """(B, N, 2) float32, NaN without a label."""
    normalisation: str
    """"inter-ocular" or "face-size"."""

    def errors(self, outline: bool = True) -> np.ndarray:
        """Error of each face, see `landmark_errors`."""
        return landmark_errors(self.predicted, self.labelled, self.normalisation, outline)


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
        (B,) float64, shares; NaN where the labels that normalise are missing.

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
        return np.where(counted, distance, 0).sum(axis=1) / counted.sum(axis=1) / size


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
    faces: list[Face], model: Path | str | None = None, normalisation: str = "inter-ocular", **options: Any
) -> Evaluation:
    """Predict the landmarks of labelled faces, each in the box of its labels enlarged by 17 %.

    Args:
        options: passed on to `predict`: fit, shape, device.

    Raises:
        ValueError: no labelled face, or a model with another number of landmarks.
    """
    faces = [face for face in faces if np.isfinite(face.points).any()]
    if not faces:
        raise ValueError("faces: expected at least one labelled face, got none")
    predicted = []
    for start in range(0, len(faces), CHUNK):
        part = faces[start : start + CHUNK]
        boxes = [face_box(face.points) for face in part]
        predicted.append(predict([face.image(color=True) for face in part], boxes, model, **options).points)
    return Evaluation(faces, np.concatenate(predicted), np.stack([face.points for face in faces]), normalisation)


def with_mean_shape(evaluation: Evaluation, mean_shape: np.ndarray) -> Evaluation:
    """The same faces, "predicted" by putting a mean shape into each box: what any network must beat.

    Args:
        mean_shape: (N, 2) in units of the box.
    """
    boxes = np.stack([face_box(points) for points in evaluation.labelled])
    predicted = mean_shape * boxes[:, None, 2:] + boxes[:, None, :2] - 0.5
    return Evaluation(evaluation.faces, predicted, evaluation.labelled, evaluation.normalisation)


def report(evaluations: dict[str, Evaluation], folder: Path) -> dict:
    """Write `evaluation.json`, `curve.png` (Figure 4) and `sheet.png` (Figure 5).

    Args:
        evaluations: of the same faces, by the name of the method; the first one's are drawn on the sheet.
        folder: made where it is not there.

    Returns:
        What the JSON holds: summaries by method and set of points, and the error of each face by the first method.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    results = {}
    for name, evaluation in evaluations.items():
        count = evaluation.labelled.shape[1]
        outline = len(SCHEMES[count].outline)
        results[f"{name}, {count} points"] = evaluation.errors()
        if outline:
            results[f"{name}, {count - outline} points"] = evaluation.errors(outline=False)
    first = next(iter(evaluations.values()))
    values = {
        "normalisation": first.normalisation,
        "percent": {name: summary(errors) for name, errors in results.items()},
        "faces": {face.name: 100 * float(e) for face, e in zip(first.faces, first.errors(), strict=True)},
    }
    (folder / "evaluation.json").write_text(json.dumps(values, indent=1))
    draw_curve(results, folder / "curve.png", first.normalisation)
    draw_sheet(first, folder / "sheet.png")
    return values


def draw_curve(results: dict[str, np.ndarray], path: Path, normalisation: str) -> None:
    """The cumulative error curves of Figure 4: share of the faces with an error below x."""
    figure = matplotlib.figure.Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    for name, errors in results.items():
        errors = np.sort(errors[~np.isnan(errors)])
        axes.step([0, *(100 * errors)], np.arange(len(errors) + 1) / len(errors), where="post", label=name)
    axes.set(xlim=(0, 100 * FAILURE), ylim=(0, 1), xlabel=f"{normalisation} error [%]", ylabel="share of the faces")
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right")
    figure.savefig(path, dpi=150)


def draw_sheet(evaluation: Evaluation, path: Path, count: int = 40) -> None:
    """Predictions sorted by error, evenly picked from best to worst, the worst 16 in full (Figure 5)."""
    errors = evaluation.errors()
    order = np.argsort(errors)
    order = order[~np.isnan(errors[order])]
    rest = max(len(order) - 16, 0)
    picked = np.unique(np.r_[np.linspace(0, rest - 1, min(count - 16, rest)).astype(int), rest : len(order)])
    tiles = [_tile(evaluation, index) for index in order[picked]]
    captions = [f"{100 * errors[index]:.2f} %" for index in order[picked]]
    sheet = contact_sheet(tiles, captions, SHEET_COLUMNS)
    matplotlib.image.imsave(path, sheet)


def _tile(evaluation: Evaluation, index: int) -> np.ndarray:
    box = square_box(face_box(evaluation.labelled[index]), 1.15)
    image = crop(evaluation.faces[index].image(color=True), box, TILE)
    return draw_landmarks(image, to_crop(evaluation.predicted[index][None], box, TILE))
