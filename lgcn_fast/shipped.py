"""The models that ship with the package, what was measured of them, and which one is the default."""

import json
import math
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from . import checkpoints
from .config import LGCNConfig

MEASURED = "measured.json"
"""Beside the weights, written by `lgcn-fast report --ship`: the one source of all figures about the models."""
REFERENCE_SET = "LFPW test"
"""The test set whose errors are shown."""
REAL_TIME = 30.0
"""Faces a second that the default model reaches on a CPU."""
EVEN = 0.05
"""Errors that differ by no more, in percent, are even: another arithmetic alone moves them by up to 0.04."""


@dataclass(frozen=True, repr=False)
class ShippedModel:
    """A model in the package; `predict(batch, model=name)` uses it."""

    name: str
    path: Path
    """Its weights."""
    parameters: int
    """Trained numbers: filters, biases, scales and shifts."""
    size: int
    """Bytes of the weights file."""
    config: LGCNConfig
    error: tuple[float, float] | None
    """Median error on LFPW test with the fit, percent of the inter-ocular distance: with all points, without the
    outline. None where it was not measured."""
    error_without_fit: tuple[float, float] | None
    """The same for the maxima of the heatmaps."""
    mean_error: float | None
    """Median error with the fit, all points, mean over all test sets: the best model has the least."""
    faces_per_second: dict[str, float]
    """Single crops through `predict`, by device ("cpu", "cuda"); `measured.json` says on which machine."""

    def __repr__(self) -> str:
        facts = [repr(self.name), f"{self.parameters:,} parameters", f"{self.size / 1e6:.1f} MB"]
        if self.error and self.error_without_fit:
            with_fit, without = (" / ".join(f"{e:.2f}" for e in pair) for pair in (self.error, self.error_without_fit))
            facts.append(f"{REFERENCE_SET}: {with_fit} %, without the fit {without} %")
        facts += [f"{speed:,.0f} faces/s on {device}" for device, speed in self.faces_per_second.items()]
        return f"ShippedModel({', '.join(facts)})"


def models() -> list[ShippedModel]:
    """The models that ship, from the least error to the largest; those that were not measured come last."""
    path = checkpoints.WEIGHTS / MEASURED
    measured = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    found = [_shipped(name, measured.get(name, {})) for name in checkpoints.model_names()]
    return sorted(found, key=_rank)


@lru_cache
def default_model(device: str) -> str:
    """Name of the model that is used where none is asked for, see `best_model`.

    Args:
        device: "cpu", "cuda" or another type of torch device.
    """
    return best_model(models(), device).name


@lru_cache
def lightest_model(num_landmarks: int) -> str | None:
    """Name of the model with so many landmarks that takes the least work, if there is one: it can look for faces."""
    candidates = [model for model in models() if model.config.num_landmarks == num_landmarks]
    return min(candidates, key=_work).name if candidates else None


def best_model(candidates: list[ShippedModel], device: str) -> ShippedModel:
    """The model with the least error, of several that are even the fastest; on a CPU among those above 30 faces/s, or
    the fastest where none is."""
    if device == "cpu":
        fast = [model for model in candidates if _speed(model) > REAL_TIME]
        candidates = fast or [max(candidates, key=_speed)]
    least = min(map(_rank, candidates))
    even = [model for model in candidates if _rank(model) <= least + EVEN]
    return max(even, key=lambda model: _speed(model, device))


def _shipped(name: str, measured: dict) -> ShippedModel:
    path = checkpoints.weights_path(name)
    config, parameters = checkpoints.load_header(path)
    methods = measured.get("percent", {}).get(REFERENCE_SET, {})
    error, error_without_fit = (
        tuple(points["median"] for points in methods[method].values()) if method in methods else None
        for method in ("fit", "heatmap maxima")
    )
    medians = [next(iter(methods["fit"].values()))["median"] for methods in measured.get("percent", {}).values()]
    mean_error = sum(medians) / len(medians) if medians else None
    speeds = {device: entry["faces_per_second"] for device, entry in measured.get("speed", {}).items()}
    size = path.stat().st_size
    return ShippedModel(name, path, parameters, size, config, error, error_without_fit, mean_error, speeds)


def _rank(model: ShippedModel) -> float:
    return math.inf if model.mean_error is None else model.mean_error


def _work(model: ShippedModel) -> float:
    """Multiplications for a face, about: each parameter once at each position of the grid the subnets run on."""
    return model.parameters * (model.config.input_size / model.config.shuffle) ** 2


def _speed(model: ShippedModel, device: str = "cpu") -> float:
    return model.faces_per_second.get(device, 0.0)
