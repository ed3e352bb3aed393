"""Shared fixtures. Tests marked `data` read real faces from $LGCN_DATA or ../shared/data and skip elsewhere."""

import ctypes
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from lgcn_fast import LGCN, LGCNConfig, checkpoints
from lgcn_fast.checkpoints import WEIGHTS, save_model
from lgcn_fast.engine import known_precisions
from lgcn_fast.images import read_image
from lgcn_fast.shipped import MEASURED, default_model, lightest_model
from lgcn_fast.video import VideoWriter

# Before triton is imported for the first time: without a GPU its kernels are interpreted.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

ROOT = Path(__file__).parents[1]
FRAMES, FPS = 12, 25.0
"""Of the clip."""
DATA = Path(os.environ.get("LGCN_DATA", ROOT.parent / "shared" / "data"))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    no_data = pytest.mark.skip(reason=f"no face data in {DATA} (set LGCN_DATA)")
    no_fp8 = pytest.mark.skip(reason="this GPU has no fp8")
    has_fp8 = not torch.cuda.is_available() or "fp8" in known_precisions(torch.device("cuda"))
    for item in items:
        if "data" in item.keywords and not DATA.is_dir():
            item.add_marker(no_data)
        if "fp8" in item.name and not has_fp8:
            item.add_marker(no_fp8)


@pytest.fixture(scope="session")
def data() -> Path:
    return DATA


@pytest.fixture
def random() -> np.random.Generator:
    """Fresh inputs in every run; the seed is printed where a test fails."""
    seed = int.from_bytes(os.urandom(4))
    print(f"seed {seed}")
    return np.random.default_rng(seed)


@pytest.fixture
def demo_picture() -> Path:
    return ROOT / "lgcn_fast" / "demo.jpg"


@pytest.fixture
def pictures(demo_picture: Path) -> list[np.ndarray]:
    """Twelve frames (240, 320, 3) of the demo's face, which moves to the right."""
    face = cv2.resize(read_image(demo_picture, color=True), (240, 240), interpolation=cv2.INTER_AREA)
    return [cv2.copyMakeBorder(face, 0, 0, 20 + i, 60 - i, cv2.BORDER_REPLICATE) for i in range(FRAMES)]


@pytest.fixture
def clip(tmp_path: Path, pictures: list[np.ndarray]) -> Path:
    """They as a video."""
    with VideoWriter(tmp_path / "clip.avi", FPS) as writer:
        for picture in pictures:
            writer.write(picture)
    return writer.path


@pytest.fixture
def poisoned_memory() -> Iterator[None]:
    """Fresh memory is full of 3.4e38: an element that nobody wrote fails the test (glibc only)."""
    m_perturb = -6
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    if libc and hasattr(libc, "mallopt"):
        libc.mallopt(m_perturb, 0x80)
    yield
    if libc and hasattr(libc, "mallopt"):
        libc.mallopt(m_perturb, 0)


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The package with other weights: two untrained models, and made-up figures of one of them."""
    folder = tmp_path / "weights"
    folder.mkdir()
    monkeypatch.setattr(checkpoints, "WEIGHTS", folder)
    default_model.cache_clear()
    lightest_model.cache_clear()
    mean_shape = (np.arange(136).reshape(68, 2) / 136).tolist()
    for name, filters in (("lgcn-small", 4), ("lgcn-big", 8)):
        save_model(folder / f"{name}.safetensors", LGCN(LGCNConfig.nano(filters=filters)), {"mean_shape": mean_shape})
    (folder / "shape-68.safetensors").write_bytes((WEIGHTS / "shape-68.safetensors").read_bytes())
    points = {"68 points": {"median": 3.5}, "51 points": {"median": 2.5}}
    maxima = {"68 points": {"median": 4.5}, "51 points": {"median": 3.25}}
    others = {"68 points": {"median": 4.5}, "51 points": {"median": 4.25}}
    percent = {"LFPW test": {"fit": points, "heatmap maxima": maxima}, "YouTube test": {"fit": others}}
    figures = {"percent": percent, "speed": {"cpu": {"faces_per_second": 1234.5, "machine": "abacus"}}}
    (folder / MEASURED).write_text(json.dumps({"lgcn-big": figures, "lgcn-gone": figures}))
    yield folder
    default_model.cache_clear()
    lightest_model.cache_clear()
