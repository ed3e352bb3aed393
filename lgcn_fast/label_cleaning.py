"""Noisy labels, moved to where a network sees the landmarks."""

from dataclasses import replace
from pathlib import Path

import numpy as np

from .datasets import Face
from .images import face_box
from .prediction import predict

SEEN_AT_ONCE = 64


def recentred(faces: list[Face], model: Path | str) -> list[Face]:
    """Take out of each face's labels the shift that they have in common; what they say of the shape stays.

    For semi-automatic labels. Those of YouTube-Faces lie, in the median, a fortieth of the inter-ocular distance to the
    right of what networks see that learned from manual labels.

    Args:
        faces: labelled faces; background pictures among them stay as they are.
        model: a network trained on labels that are better, see `predict`.

    Returns:
        The faces in their order, each moved by the median, over its labelled points, of prediction minus label.

    Raises:
        ValueError: another number of landmarks than the model's.
    """
    moved = list(faces)
    labelled = [i for i, face in enumerate(faces) if not np.isnan(face.points).all()]
    for start in range(0, len(labelled), SEEN_AT_ONCE):
        part = labelled[start : start + SEEN_AT_ONCE]
        boxes = np.stack([face_box(faces[i].points) for i in part])
        seen = predict([faces[i].image() for i in part], boxes, model=model).points
        for i, points in zip(part, seen, strict=True):
            labels = faces[i].points
            if points.shape != labels.shape:
                raise ValueError(f"{faces[i].name}: expected the model's {len(points)} landmarks, got {len(labels)}")
            moved[i] = replace(faces[i], points=labels + np.nanmedian(points - labels, axis=0).astype(np.float32))
    return moved
