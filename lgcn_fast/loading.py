"""Engines and shape models of names, files and networks: each is built once, and kept."""

import os
from functools import lru_cache
from pathlib import Path
from threading import RLock
from weakref import WeakKeyDictionary

from .checkpoints import WEIGHTS, weights_path
from .engine import Engine, engine_device
from .model import LGCN
from .shape import ShapeModel
from .shipped import default_model, lightest_model

KEPT_ENGINES = 8
"""Of files; those of networks are kept as long as these."""


@lru_cache(maxsize=8)
def packaged_shape(num_landmarks: int) -> ShapeModel | None:
    """The package's shape model of so many landmarks, if it has one."""
    path = WEIGHTS / f"shape-{num_landmarks}.safetensors"
    return ShapeModel.load(path) if path.is_file() else None


def shape_for(shape: ShapeModel | Path | str | None, num_landmarks: int) -> ShapeModel:
    """A shape model, of a file loaded once; default: the package's.

    Raises:
        ValueError: one of another number of landmarks, or none in the package.
    """
    if shape is None:
        if found := packaged_shape(num_landmarks):
            return found
        source = "`shape` or --shape, from `lgcn-fast fit-shape`"
        expected = f"the shape model of the {num_landmarks} landmarks ({source}), or fit=False of `predict`"
        raise ValueError(f"shape: expected {expected}, got none, and the package has none for them")
    if not isinstance(shape, ShapeModel | Path | str):
        raise ValueError(f"shape: expected a shape model or a path, got {type(shape).__name__}")
    found = shape if isinstance(shape, ShapeModel) else _loaded_shape(Path(shape), _version(Path(shape)))
    if found.num_landmarks != num_landmarks:
        expected, got = num_landmarks, found.num_landmarks
        raise ValueError(f"shape: expected a shape model of {expected} landmarks, got one of {got}")
    return found


@lru_cache(maxsize=8)
def _loaded_shape(path: Path, version: tuple[int, ...] | None) -> ShapeModel:
    return ShapeModel.load(path)


def _version(path: Path) -> tuple[int, ...] | None:
    """What changes when a file is written anew, or another one stands there (of the same size, and copied with its
    time); None where there is none."""
    try:
        status = os.stat(path)
    except OSError:
        return None
    return status.st_dev, status.st_ino, status.st_ctime_ns, status.st_mtime_ns, status.st_size


def engine_for(
    model: Engine | LGCN | Path | str | None, device: str, precision: str, num_threads: int = 0, name: str = "model"
) -> Engine:
    """The engine of a model, built once. `name` is what the argument is called in errors."""
    if isinstance(model, Engine):
        return model
    found = engine_device(device)
    if isinstance(model, LGCN):
        return _built(model, str(found), precision, num_threads)
    path = weights_path(default_model(found.type) if model is None else model, name)
    return _loaded(path, _version(path), str(found), precision, num_threads)


def finder_for(finder: Engine | LGCN | Path | str | None, engine: Engine) -> Engine:
    """What looks for faces whose landmarks an engine reads, where and as that one runs: `finder`; else the model in the
    package with these landmarks that takes the least work; where there is none, the engine itself.

    Raises:
        ValueError: a finder for other landmarks.
    """
    count = engine.config.num_landmarks
    asked_for = lightest_model(count) if finder is None else finder
    device, precision, num_threads = engine.options
    if precision == "fp8":  # for large networks: small ones lose accuracy and gain nothing
        precision = "auto"
    found = engine if asked_for is None else engine_for(asked_for, device, precision, num_threads, "finder")
    if found.config.num_landmarks != count:
        raise ValueError(f"finder: expected a model of {count} landmarks, got one of {found.config.num_landmarks}")
    return found


_loads: dict[object, RLock] = {}
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_loads.clear)  # whoever held them is not there
_files: dict[tuple, tuple[tuple[int, ...] | None, Engine]] = {}
"""Engines of files by path and options, with the version that was read; the last that was asked for comes last."""


def _loaded(path: Path, version: tuple[int, ...] | None, *options: str | int) -> Engine:
    """The engine of a file, built by the first of the threads that ask for it, while the others wait. That of a former
    version is given up."""
    key = str(path), options
    with _loads.setdefault(key, RLock()):
        found, engine = _files.pop(key, (None, None))
        if engine is None or found != version:
            engine = None  # its memory may be needed
            engine = Engine(path, *options)
        _files[key] = version, engine
        for oldest in list(_files)[:-KEPT_ENGINES]:
            _files.pop(oldest, None)
        return engine


_engines: WeakKeyDictionary[LGCN, tuple[list, dict[tuple, Engine]]] = WeakKeyDictionary()


def _built(model: LGCN, device: str, precision: str, num_threads: int) -> Engine:
    """The engine of a network with such options; all of a network's are given up when its weights have changed."""
    options = device, precision, num_threads
    tensors = model.state_dict().values()
    state = [(t.data_ptr(), None if t.is_inference() else t._version) for t in tensors]
    with _loads.setdefault(id(model), RLock()):
        known = _engines.get(model)
        if known is None or known[0] != state:
            known = _engines[model] = state, {}
        engines = known[1]
        if options not in engines:
            engines[options] = Engine(model, *options)
        return engines[options]
