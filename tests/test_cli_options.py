"""What is said on the command line reaches the functions that do it: all options off their defaults, nothing is run."""

from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from lgcn_fast import cli, cli_photos, cli_training, cli_video
from lgcn_fast.config import LGCNConfig
from lgcn_fast.detection import Faces
from lgcn_fast.recipes import RECIPES
from lgcn_fast.training_options import TrainingOptions

ENGINE = ["--model", "m", "--device", "cpu", "--precision", "fp32"]
SHAPE = ["--shape", "s"]
DETECTION = ["--finder", "f", "--min-face", "33", "--min-confidence", "0.7", "--any-angle"]
NOBODY = Faces(np.empty((0, 68, 2)), np.empty((0, 68)), np.empty(0), np.empty((0, 4)))


class CallSeen(Exception):
    """Raised by what stands for a function, with its arguments."""


def stop_and_tell(*arguments, **options):
    raise CallSeen(arguments, options)


def call_made_by(*words: str | Path) -> tuple[tuple, dict]:
    """Arguments and keywords that a command line leads to."""
    with pytest.raises(CallSeen) as stopped:
        cli.main([str(word) for word in words])
    return stopped.value.args


@dataclass(frozen=True)
class StandInEngine:
    """What stands for an engine: what it was asked for by."""

    names: tuple
    config = LGCNConfig(num_landmarks=5)


FOUND_BY = StandInEngine(("m", "cpu", "fp32"))
DETECTED = {"min_face": 33.0, "min_confidence": 0.7, "model": FOUND_BY, "finder": ("f", FOUND_BY),
            "shape": (Path("s"), 5), "any_angle": True}  # fmt: skip


@pytest.fixture
def stand_ins(monkeypatch):
    """Engines, finders and shape models are what they were asked for by."""
    monkeypatch.setattr(cli_photos, "engine_for", lambda *names: StandInEngine(names))
    monkeypatch.setattr(cli_photos, "finder_for", lambda *names: names)
    for module in (cli, cli_photos):
        monkeypatch.setattr(module, "shape_for", lambda *names: names)


def test_predict(stand_ins, monkeypatch, demo_picture, tmp_path):
    monkeypatch.setattr(cli, "predict", stop_and_tell)
    words = ["--box", "1,2,30,40", "--passes", "3", "--ensemble", "4", "--out", tmp_path]
    (_, *arguments), options = call_made_by("predict", demo_picture, *ENGINE, *SHAPE, *words)
    assert arguments == [[(1, 2, 30, 40)], FOUND_BY, True, (Path("s"), 5)]
    assert options == {"ensemble": 4, "passes": 3}
    (_, *arguments), _ = call_made_by("predict", demo_picture, *ENGINE, "--no-fit", *words)
    assert arguments == [[(1, 2, 30, 40)], FOUND_BY, False, None]


def test_detect(stand_ins, monkeypatch, demo_picture, tmp_path):
    monkeypatch.setattr(cli_photos, "detect", stop_and_tell)
    assert call_made_by("detect", demo_picture, *ENGINE, *SHAPE, *DETECTION, "--out", tmp_path)[1] == DETECTED


def test_detections_are_drawn_with_the_engine_that_found_them(stand_ins, monkeypatch, demo_picture, tmp_path):
    monkeypatch.setattr(cli_photos, "detect", lambda *_, **__: NOBODY)
    monkeypatch.setattr(cli_photos, "draw", stop_and_tell)
    style = ["--style", "heatmaps", "boxes"]
    (_, faces, styles, engine), _ = call_made_by("detect", demo_picture, *ENGINE, *style, "--out", tmp_path)
    assert faces is NOBODY
    assert styles == ["heatmaps", "boxes"]
    assert engine == FOUND_BY
    monkeypatch.setattr(cli_photos, "draw", lambda photo, *_: photo)
    monkeypatch.setattr(cli_photos, "combined_heatmap", stop_and_tell)
    _, options = call_made_by("detect", demo_picture, *ENGINE, *DETECTION, "--heatmap", "--out", tmp_path)
    assert options == {name: DETECTED[name] for name in ("min_face", "model", "finder")}


def test_landmarks_are_drawn_with_the_engine_that_found_them(stand_ins, monkeypatch, demo_picture, tmp_path):
    monkeypatch.setattr(cli, "predict", lambda *_, **__: NOBODY)
    monkeypatch.setattr(cli, "draw", stop_and_tell)
    (_, _, styles, engine), _ = call_made_by("predict", demo_picture, *ENGINE, "--style", "heatmaps", "--out", tmp_path)
    assert styles == ["heatmaps"]
    assert engine == FOUND_BY


def test_export(monkeypatch, tmp_path):
    monkeypatch.setattr(cli, "export", stop_and_tell)
    out = tmp_path / "a.pt2"
    assert call_made_by("export", "--model", "lgcn-nano", *SHAPE, "--format", "pt2", "--out", out)[0] == (
        "lgcn-nano",
        out,
        "pt2",
        Path("s"),
    )


def test_evaluate(monkeypatch, tmp_path):
    monkeypatch.setattr(cli, "read_faces", lambda path: [path.name])
    monkeypatch.setattr(cli, "evaluate", stop_and_tell)
    words = ["--ensemble", "3", "--normalisation", "face-size", "--out", tmp_path]
    arguments, options = call_made_by("evaluate", "a", "b", *ENGINE, *SHAPE, *words)
    assert arguments == (["a", "b"], "m")
    assert options == {"normalisation": "face-size", "shape": Path("s"), "device": "cpu", "precision": "fp32",
                       "ensemble": 3}  # fmt: skip


def test_evaluate_on_photos(stand_ins, monkeypatch, tmp_path):
    monkeypatch.setattr(cli_photos, "read_photos", lambda folder: [folder.name])
    monkeypatch.setattr(cli_photos, "score_photos", stop_and_tell)
    words = ["evaluate", "--multiface", "a", "b", *ENGINE, *SHAPE, *DETECTION, "--out", tmp_path]
    (photos, find, min_face), _ = call_made_by(*words)
    assert (photos, min_face) == (["a", "b"], 33)
    assert find.keywords == DETECTED


@pytest.mark.parametrize("command", ["video", "webcam"])
def test_moving_pictures(monkeypatch, tmp_path, command):
    opened = []

    def reader(source):
        opened.append(source)
        return nullcontext(SimpleNamespace(live=False))

    monkeypatch.setattr(cli_video, "VideoReader", reader)
    monkeypatch.setattr(cli_video, "newest", lambda frames: SimpleNamespace(close=lambda: None))
    monkeypatch.setattr(cli_video, "engine_for", lambda *names: names)
    monkeypatch.setattr(cli_video, "Tracker", stop_and_tell)
    source = ["in.mp4"] if command == "video" else ["--index", "2", "--no-show"]
    words = ["--finder", "f", "--min-face", "33", "--any-angle", "--detect-every", "7", "--smoothing", "0.5"]
    words += ["--threads", "3", "--json", tmp_path / "a.jsonl"]
    arguments, options = call_made_by(command, *source, *ENGINE, *SHAPE, *words)
    assert opened == ["in.mp4" if command == "video" else 2]
    assert arguments == (("m", "cpu", "fp32", 3), 7, 33)
    assert options == {"smoothing": 0.5, "finder": "f", "shape": Path("s"), "any_angle": True}


def test_prepare(monkeypatch, tmp_path):
    monkeypatch.setattr(cli_training, "read_faces", lambda path: [path.name])
    monkeypatch.setattr(cli_training, "read_background", lambda path: [path.name, None])
    monkeypatch.setattr(cli_training, "write_cache", stop_and_tell)
    words = ["prepare", "a", "b", "--background", "c", "d", "--color", "--out", tmp_path / "faces.npz"]
    (out, sets, color, _), _ = call_made_by(*words)
    assert (out, color) == (tmp_path / "faces.npz", True)
    assert sets == {"a": ["a"], "b": ["b"], "c": ["c", None], "d": ["d", None]}


def test_train(monkeypatch, tmp_path):
    def trainer(cache, out, options):
        return SimpleNamespace(chosen=[], validation=[], run=lambda budget: stop_and_tell(out, options, budget))

    monkeypatch.setattr(cli_training, "read_cache", lambda path: SimpleNamespace(num_landmarks=5, channels=3))
    monkeypatch.setattr(cli_training, "Trainer", trainer)
    words = [
        *("--network", "32", "--recipe", "polish", "--init", "i", "--teacher", "t", "--epochs", "9"),
        *("--time-budget", "1.5", "--share", "a=0.25", "--share", "b=0", "--dropout", "0.3", "--batch-size", "6"),
        *("--repeats", "2", "--warp", "0.5", "--loss", "cross-entropy", "--seed", "8", "--device", "cpu", "--no-amp"),
        *("--compile", "--workers", "4"),
    ]
    (out, options, budget), _ = call_made_by("train", "faces.npz", *words, "--out", tmp_path)
    polish = RECIPES["polish"]
    assert (out, budget) == (tmp_path, 1.5)
    assert options == TrainingOptions(
        config=LGCNConfig(
            num_landmarks=5, filters=32, side_channels=5, in_channels=3, loss="cross_entropy", dropout=0.3
        ),
        recipe=replace(polish, batch_size=6, repeats=2, augmentation=replace(polish.augmentation, warp=0.5)),
        epochs=9,
        init=Path("i"),
        teacher=Path("t"),
        seed=8,
        shares={"a": 0.25, "b": 0.0},
        device="cpu",
        amp=False,
        compiled=True,
        workers=4,
    )


def test_fit_shape(monkeypatch, tmp_path):
    monkeypatch.setattr(cli_training, "read_cache", lambda path: path.name)
    monkeypatch.setattr(cli_training, "training_shapes", lambda *arguments: np.full((1, 5, 2), len(arguments[1])))
    monkeypatch.setattr(cli_training, "read_shapes", lambda path, count: np.full((1, count, 2), float(path.stem)))
    monkeypatch.setattr(cli_training.ShapeModel, "fit", stop_and_tell)
    words = ["--sets", "a", "b/", "--shapes", "7.npz", "8.npz", "--modes", "3", "--out", tmp_path / "s.safetensors"]
    (shapes, modes), _ = call_made_by("fit-shape", "faces.npz", *words)
    np.testing.assert_array_equal(shapes[:, 0, 0], [2, 7, 8])
    assert modes == 3


def test_report(monkeypatch, tmp_path):
    monkeypatch.setattr(cli, "write_report", stop_and_tell)
    assert call_made_by("report", "--data", "d", "--device", "cpu", "--out", tmp_path)[0] == (
        Path("d"),
        tmp_path,
        "cpu",
    )
