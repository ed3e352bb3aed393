"""Weights files: safetensors with the configuration in the metadata, read strictly, written whole or not at all."""

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from .config import LGCNConfig
from .files import write_whole
from .model import LGCN, retargeted, widened

FORMAT = "lgcn_fast-1"
WEIGHTS = Path(__file__).parent / "weights"
"""What ships: `NAME.safetensors` for every model, shape models, what was measured of them, model cards."""


def model_names() -> list[str]:
    """Names of the models in the package."""
    return sorted(path.stem for path in WEIGHTS.glob("lgcn-*.safetensors"))


def weights_path(model: Path | str, name: str = "model") -> Path:
    """The weights file of a model.

    Args:
        model: the name of a model in the package, or a path.
        name: of the argument, for errors.

    Raises:
        ValueError: neither; lists the names.
    """
    if not isinstance(model, Path | str):
        raise ValueError(f"{name}: expected a name, a path, a network or an engine, got {type(model).__name__}")
    text = str(model)
    shipped = _in_package(text, WEIGHTS)
    if text.startswith("lgcn-") and shipped.parent == WEIGHTS and shipped.is_file():
        return shipped
    if not Path(model).is_file():
        names = ", ".join(model_names())
        raise ValueError(f"{name}: expected one of {names}, or a safetensors file, got {text!r}, no file")
    return Path(model)


@lru_cache(maxsize=32)
def _in_package(name: str, folder: Path) -> Path:
    """(Kept, as `predict` asks for it in every call.)"""
    return folder / f"{name}.safetensors"


def save_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Write tensors to a file that appears complete or not at all.

    Raises:
        OSError: it could not be written; names it.
    """
    write_whole(path, save({name: tensor.contiguous() for name, tensor in tensors.items()}, metadata))


def load_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read the tensors and the metadata of a file.

    Raises:
        ValueError: not a safetensors file; names it.
    """
    with _opened(path) as file:
        return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """A safetensors file, to be read; ValueError where it is none, or while it is read."""
    try:
        Path(path).open("rb").close()  # (safetensors says of all that it cannot open that it is not there)
        with safe_open(path, framework="pt") as file:
            yield file
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path}: expected a safetensors file, got {error}") from None


def save_model(path: Path, model: LGCN, training: dict[str, Any]) -> None:
    """Write a model for inference: filters in fp16, the rest in fp32, with the configuration.

    Args:
        path: `.safetensors` file.
        training: what the model card needs (recipe, seed, commit, errors), JSON.
    """
    tensors = {
        name: tensor.half() if tensor.ndim > 1 else tensor.float()
        for name, tensor in model.state_dict().items()
        if not name.endswith("num_batches_tracked")
    }
    metadata = {"format": FORMAT, "config": model.config.to_json(), "training": json.dumps(training)}
    save_tensors(path, tensors, metadata)


def load_model(model: Path | str, name: str = "model") -> LGCN:
    """Read a model that `save_model` wrote, in eval mode, fp32.

    Args:
        model: the name of a model in the package, or a path.
        name: of the argument, for errors.

    Returns:
        The network, on the CPU.

    Raises:
        ValueError: an unknown name, another kind of file, or tensors that do not fit the configuration in its metadata.
    """
    path = weights_path(model, name)
    tensors, metadata = load_tensors(path)
    _check_format(path, metadata)
    try:
        with torch.device("meta"):  # random weights would cost the caller random numbers
            network = LGCN(LGCNConfig.from_json(metadata["config"]))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path}: expected a configuration in its metadata, got {error}") from None
    expected = {name: t for name, t in network.state_dict().items() if not name.endswith("num_batches_tracked")}
    wrong = sorted(expected.keys() ^ tensors.keys())
    if wrong:
        raise ValueError(f"{path}: expected the tensors of its configuration, but it has or lacks {', '.join(wrong)}")
    for key, tensor in expected.items():
        if tensors[key].shape != tensor.shape:
            raise ValueError(f"{path}: {key}: expected {tuple(tensor.shape)}, got {tuple(tensors[key].shape)}")
        if not tensors[key].isfinite().all():
            raise ValueError(f"{path}: {key}: expected finite numbers, got NaN or infinite ones")
    weights = {name: tensor.to(torch.float32) for name, tensor in tensors.items()}
    uncounted = torch.zeros((), dtype=torch.int64, device="cpu")
    batches = {name: uncounted.clone() for name in network.state_dict().keys() - expected.keys()}
    network.load_state_dict(weights | batches, strict=True, assign=True)
    return network.eval()


def load_start(model: Path | str, config: LGCNConfig) -> tuple[LGCN, bool]:
    """Read a trained model to go on from in training, see `widened` and `retargeted` for what it may be.

    Args:
        model: the name of a model in the package, or a path.

    Returns:
        A network of that configuration, but for the dropout perhaps, and whether it knows the landmarks.

    Raises:
        ValueError: as `load_model`; or weights of another kind of network, or of one with more filters.
    """
    start = load_model(model, "init")
    wide = replace(start.config, filters=config.filters, dropout=config.dropout)
    same_landmarks = wide.num_landmarks == config.num_landmarks
    if not same_landmarks:
        side_channels = config.side_channels if wide.side_channels else 0
        wide = replace(wide, num_landmarks=config.num_landmarks, side_channels=side_channels, loss=config.loss)
    other = {name for name, value in vars(config).items() if getattr(wide, name) != value}
    if start.config.filters > config.filters:
        other.add("filters")
    if other:
        expected, got = (", ".join(f"{name}={getattr(each, name)!r}" for name in sorted(other))
                         for each in (config, start.config))  # fmt: skip
        fewer = " (or of fewer filters)" if "filters" in other else ""
        raise ValueError(f"{model}: expected weights with {expected}{fewer}, got {got}")
    start = widened(start, config.filters)
    return (start if same_landmarks else retargeted(start, config)), same_landmarks


def load_teacher(model: Path | str, student: LGCNConfig) -> LGCN:
    """Read a trained model for another one to learn its heatmaps from.

    Args:
        model: the name of a model in the package, or a path.

    Raises:
        ValueError: as `load_model`; or a model of other landmarks, colours or input size, with heatmaps coarser than
            the student's or that do not divide into them, or with outputs that are no "squared_error" heatmaps.
    """
    teacher = load_model(model, "teacher")
    for name in ("num_landmarks", "in_channels", "input_size"):
        expected, got = getattr(student, name), getattr(teacher.config, name)
        if expected != got:
            raise ValueError(f"{model}: {name}: expected the student's {expected}, got {got}")
    if student.stride % teacher.config.stride:
        expected = f"a divisor of the student's {student.stride}"
        raise ValueError(f"{model}: stride: expected {expected}, got {teacher.config.stride}")
    if (losses := {student.loss, teacher.config.loss}) != {"squared_error"}:
        raise ValueError(f"{model}: loss: expected 'squared_error' for teacher and student, got {sorted(losses)}")
    return teacher


def load_card(model: Path | str) -> dict[str, Any]:
    """What `save_model` was told of the training.

    Args:
        model: the name of a model in the package, or a path.

    Raises:
        ValueError: an unknown name, or another kind of file.
    """
    path = weights_path(model)
    metadata, _ = _header(path)
    try:
        return json.loads(metadata["training"])
    except ValueError as error:
        raise ValueError(f"{path}: expected JSON of its training in its metadata, got {error}") from None


def load_header(path: Path) -> tuple[LGCNConfig, int]:
    """The configuration of a model and its number of parameters, without reading its tensors.

    Raises:
        ValueError: another kind of file.
    """
    metadata, shapes = _header(path)
    trained = (shape for name, shape in shapes.items() if ".running_" not in name)
    return LGCNConfig.from_json(metadata["config"]), sum(map(math.prod, trained))


def _header(path: Path) -> tuple[dict[str, str], dict[str, list[int]]]:
    """The metadata of a model, and the shapes of its tensors."""
    with _opened(path) as file:
        metadata = file.metadata() or {}
        shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
    _check_format(path, metadata)
    return metadata, shapes


def _check_format(path: Path, metadata: dict[str, str]) -> None:
    if metadata.get("format") != FORMAT or not {"config", "training"} <= metadata.keys():
        raise ValueError(f"{path}: expected the weights of a model ({FORMAT}), got {metadata.get('format')!r}")
