"""The shape model of section 3.3: a 2-D point distribution model, mean and principal components of aligned shapes."""

from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np
import torch

from .checkpoints import load_tensors, save_tensors
from .landmarks import SCHEMES, lines_of

FORMAT = "lgcn_fast-shape-1"
ALIGNMENTS = 10
"""Rounds of aligning all shapes to their mean; it stands still after about four."""


@dataclass(frozen=True, eq=False)  # compared and hashed as the object that it is
class ShapeModel:
    """Mean face and its main variations, free of position, size and rotation.

    A face of size s at position t, turned by R, is `s R (mean + sum_k b_k modes[k]) + t`; over the training faces the
    coefficients b_k have variance `variances[k]`.
    """

    mean: np.ndarray
    """(N, 2) float64, centred, root mean square distance from the centre 1."""
    modes: np.ndarray
    """(K, N, 2) float64, orthonormal, at right angles to all shifts, turns and changes of size."""
    variances: np.ndarray
    """(K,) float64, largest first."""

    def __post_init__(self) -> None:
        """Raises ValueError for arrays of other shapes, numbers that are not finite, or variances that are not above
        0."""
        shapes = mean, modes, variances = self.mean.shape, self.modes.shape, self.variances.shape
        if len(mean) != 2 or mean[1] != 2 or len(variances) != 1 or modes != (*variances, *mean):
            raise ValueError(f"expected mean (N, 2), modes (K, N, 2) and variances (K,), got {shapes}")
        finite = all(np.isfinite(part).all() for part in (self.mean, self.modes, self.variances))
        if not (finite and (self.variances > 0).all()):
            raise ValueError("expected finite numbers and variances above 0")

    @classmethod
    def fit(cls, shapes: np.ndarray, modes: int | float = 20) -> Self:
        """Learn a model: Procrustes alignment (rotations by Kabsch's algorithm), then a PCA.

        Args:
            shapes: (M, N, 2), pixels of any images; partly labelled shapes (NaN) are left out.
            modes: their number K, or the share of the variance that they must explain, between 0 and 1; no more than
                the shapes have.

        Raises:
            ValueError: another shape of the array, fewer than two complete shapes, or modes out of range.
        """
        shapes = np.asarray(shapes, np.float64)
        if shapes.ndim != 3 or shapes.shape[2] != 2:
            raise ValueError(f"shapes: expected (M, N, 2), got {shapes.shape}")
        shapes = shapes[np.isfinite(shapes).all(axis=(1, 2))]
        if len(shapes) < 2:
            raise ValueError(f"shapes: expected at least two complete ones, got {len(shapes)}")
        scheme = SCHEMES.get(shapes.shape[1])
        if scheme is not None:
            # Faces are symmetric: the mirror image of each is one more.
            shapes = np.concatenate([shapes, shapes[:, list(scheme.mirror)] * (-1, 1)])
        aligned = _normalised(shapes)
        mean, average = aligned[0], aligned.mean(axis=0)
        for _ in range(ALIGNMENTS):
            aligned = _turned(aligned, mean)
            mean = _normalised(aligned.mean(axis=0, keepdims=True))[0]
        # Upright as the shapes are on average, not as the first of them is.
        mean = _turned(mean[None], average)[0]
        aligned = _turned(aligned, mean)
        # On the tangent plane at the mean: divided by the part along the mean, sizes are exactly comparable.
        along = (aligned * mean).sum(axis=(1, 2), keepdims=True) / len(mean)
        aligned /= np.where(along > 0, along, 1)
        residuals = (aligned - mean).reshape(len(aligned), -1)
        frame = similarity_basis(mean).reshape(4, -1)
        frame /= np.maximum(np.linalg.norm(frame, axis=1, keepdims=True), 1e-12)
        residuals -= residuals @ frame.T @ frame
        _, values, directions = np.linalg.svd(residuals, full_matrices=False)
        variances = values**2 / len(residuals)
        count = _number_of_modes(modes, variances)
        return cls(mean, directions[:count].reshape(count, *mean.shape), variances[:count])

    @property
    def num_landmarks(self) -> int:
        return len(self.mean)

    def save(self, path: Path) -> None:
        """Write the model to a safetensors file."""
        tensors = {name: torch.from_numpy(getattr(self, name)) for name in ("mean", "modes", "variances")}
        save_tensors(path, tensors, {"format": FORMAT})

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read a model that `save` wrote.

        Raises:
            ValueError: another kind of file; names it.
        """
        tensors, metadata = load_tensors(path)
        if metadata.get("format") != FORMAT:
            raise ValueError(f"{path}: expected a shape model ({FORMAT}), got {metadata.get('format')!r}")
        try:
            return cls(*(tensors[name].numpy() for name in ("mean", "modes", "variances")))
        except KeyError as error:
            raise ValueError(f"{path}: expected mean, modes and variances, got no {error.args[0]}") from None
        except TypeError as error:  # (NumPy has no bfloat16)
            raise ValueError(f"{path}: expected float64, got {error}") from None
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None

    def draw(self, path: Path, count: int = 6) -> None:
        """Draw the first modes, mean and three standard deviations to each side, as a picture."""
        import matplotlib.figure  # here: `import lgcn_fast` reaches this module, and only this method draws

        count = min(count, len(self.modes))
        figure = matplotlib.figure.Figure(figsize=(2.2 * max(count, 1), 2.6), layout="constrained")
        lines = lines_of(self.num_landmarks)
        strokes, style = (lines, "-") if lines else ([range(self.num_landmarks)], ".")
        for k, axes in enumerate(figure.subplots(1, max(count, 1), squeeze=False)[0][:count]):
            for step, color in ((-3, "tab:blue"), (3, "tab:red"), (0, "black")):
                points = self.mean + step * self.variances[k] ** 0.5 * self.modes[k]
                for stroke in strokes:
                    axes.plot(*points[list(stroke)].T, style, color=color, linewidth=1)
            axes.set_title(f"mode {k + 1}", fontsize=9)
            axes.set_aspect("equal")
            axes.invert_yaxis()
            axes.axis("off")
        figure.savefig(path, dpi=120)


def similarity_basis(mean: np.ndarray) -> np.ndarray:
    """What a change of size, a turn and shifts along x and y do to the mean shape.

    Returns:
        (4, N, 2).
    """
    turned = np.stack([-mean[:, 1], mean[:, 0]], axis=1)
    ones, zeros = np.ones(len(mean)), np.zeros(len(mean))
    return np.stack([mean, turned, np.stack([ones, zeros], axis=1), np.stack([zeros, ones], axis=1)])


def _normalised(shapes: np.ndarray) -> np.ndarray:
    """Shapes (M, N, 2) with their centre at 0 and a root mean square distance of 1 from it."""
    centred = shapes - shapes.mean(axis=1, keepdims=True)
    size = np.sqrt((centred**2).sum(axis=2).mean(axis=1))[:, None, None]
    return centred / np.where(size > 0, size, 1)


def _turned(shapes: np.ndarray, target: np.ndarray) -> np.ndarray:
    """Shapes (M, N, 2) turned to fit a target best: Kabsch's algorithm, which has a closed form in the plane."""
    cos = (shapes * target).sum(axis=(1, 2))
    sin = (shapes[..., 0] * target[:, 1] - shapes[..., 1] * target[:, 0]).sum(axis=1)
    angle = np.arctan2(sin, cos)
    cos, sin = np.cos(angle), np.sin(angle)
    rotation = np.stack([np.stack([cos, sin], axis=1), np.stack([-sin, cos], axis=1)], axis=1)
    return shapes @ rotation


def _number_of_modes(modes: int | float, variances: np.ndarray) -> int:
    present = int((variances > 1e-12).sum())
    if isinstance(modes, float):
        if not 0 < modes <= 1:
            raise ValueError(f"modes: expected a share of the variance in (0, 1], got {modes}")
        explained = np.cumsum(variances[:present]) / max(variances.sum(), 1e-12)
        return min(int(np.searchsorted(explained, modes)) + 1, present)
    if modes < 0:
        raise ValueError(f"modes: expected 0 or more, got {modes}")
    return min(modes, present)
