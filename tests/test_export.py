import json
from pathlib import Path

import numpy as np
import pytest
import torch
from networks import CONFIGS, eager, randomised

import lgcn_fast_kernels
from lgcn_fast import ShapeModel, cli, export, load_model
from lgcn_fast.checkpoints import WEIGHTS, save_model
from lgcn_fast.fitting import NativeFitter
from lgcn_fast.folding import fold

needs_onnx = pytest.mark.skipif(
    any(export.find_spec(package) is None for package in export.ONNX_PACKAGES),
    reason=f"needs {', '.join(export.ONNX_PACKAGES)} (pip install '.[export]')",
)
formats = pytest.mark.parametrize("format", [pytest.param("onnx", marks=needs_onnx), "pt2"])


def heatmaps_of(path: Path, images: np.ndarray) -> np.ndarray:
    """What other people's runtimes make of an exported file."""
    if path.suffix == ".pt2":
        return torch.export.load(path).module()(torch.from_numpy(images)).numpy()
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return session.run(["heatmaps"], {"images": images})[0]


def metadata_of(path: Path) -> dict[str, str]:
    if path.suffix == ".pt2":
        extra = {export.METADATA: ""}
        torch.export.load(path, extra_files=extra)
        return json.loads(extra[export.METADATA])
    import onnxruntime

    return onnxruntime.InferenceSession(path).get_modelmeta().custom_metadata_map


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize(("height", "width"), [(96, 96), (1, 1), (13, 30), (97, 95), (2, 131)])
def test_plain_network_is_the_model(name, height, width):
    model = randomised(CONFIGS[name])
    images = torch.randint(0, 256, (2, model.config.in_channels, height, width), dtype=torch.uint8)
    with torch.inference_mode():
        heatmaps = export.PlainNetwork(fold(model))(images)
    expected = eager(model, images)
    assert heatmaps.dtype == torch.float32
    torch.testing.assert_close(heatmaps.double(), expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


@formats
@pytest.mark.parametrize("name", ["nano", "cross entropy", "odd shuffle", "other filters"])
def test_exported_file_is_the_model(name, format, tmp_path, random):
    model = randomised(CONFIGS[name]).train()
    path = tmp_path / f"model.{format}"
    assert export.export(model, path, format) < export.TOLERANCE
    assert model.training
    model.eval()
    for batch in (1, 2, 5):
        height, width = random.integers(model.config.stride + 1, 130, 2)
        images = random.integers(0, 256, (batch, model.config.in_channels, height, width), np.uint8)
        expected = eager(model, torch.from_numpy(images)).numpy()
        heatmaps = heatmaps_of(path, images)
        assert heatmaps.dtype == np.float32
        np.testing.assert_allclose(heatmaps, expected, rtol=0, atol=1e-3 * np.abs(expected).max())
    assert metadata_of(path) == export.metadata(model.config, None)  # the package has no shape of three landmarks


@formats
def test_metadata_holds_the_fit(format, tmp_path, random):
    """A consumer without Python builds from it the fitter that `predict` uses."""
    path = tmp_path / f"nano.{format}"
    export.export("lgcn-nano", path, format)
    facts = metadata_of(path)
    numbers = {"num_landmarks": 68, "in_channels": 1, "input_size": 96, "stride": 2, "peak_radius": 12}
    assert {name: float(facts[name]) for name in numbers} == numbers
    lists = {name: np.array(facts[f"fit_{name}"].split(), float) for name in ("basis", "variances", "radii", "options")}
    # The order of the members of `lgcn::FitOptions`, on which consumers rely.
    options = (
        "certain", "fallback", "noise", "peak_radius", "largest_move", "size_spread", "shift_spread", "threshold",
        "nominal_size",
    )  # fmt: skip
    fitter = lgcn_fast_kernels.Fitter(
        lists["basis"].reshape(-1, 68, 2),
        lists["variances"],
        radii=lists["radii"].tolist(),
        **dict(zip(options, lists["options"], strict=True)),
    )
    heatmaps = random.random((2, 68, 48, 48), np.float32)
    expected = NativeFitter(ShapeModel.load(WEIGHTS / "shape-68.safetensors"))(heatmaps, 2)
    np.testing.assert_array_equal(fitter.fit(heatmaps, 2, 1)[0], expected.points)


@formats
def test_file_that_disagrees_is_not_written(format, tmp_path, monkeypatch):
    model, another = (randomised(CONFIGS["nano"]) for _ in range(2))
    path = tmp_path / f"model.{format}"
    path.write_bytes(b"yesterday's")
    monkeypatch.setattr(export, "fold", lambda _: fold(another))
    with pytest.raises(ValueError, match=r"expected heatmaps within .* of the model's, got .* for 1 images of 96 x 96"):
        export.export(model, path, format)
    assert [file.read_bytes() for file in tmp_path.iterdir()] == [b"yesterday's"]


def test_mistakes_are_named(tmp_path, monkeypatch, random):
    model, path = randomised(CONFIGS["nano"]), tmp_path / "model.onnx"
    with pytest.raises(ValueError, match="format: expected one of onnx, pt2, got 'tflite'"):
        export.export(model, path, "tflite")
    with pytest.raises(ValueError, match="shape: expected a shape model of 3 landmarks, got one of 5"):
        export.export(model, path.with_suffix(".pt2"), "pt2", shape=ShapeModel.fit(random.normal(size=(9, 5, 2))))
    with pytest.raises(ValueError, match="model: expected one of lgcn-"):
        export.export("no-such-model", path.with_suffix(".pt2"), "pt2")
    with pytest.raises(FileNotFoundError, match=r"model\.pt2'"):
        export.export(model, tmp_path / "no such folder" / "model.pt2", "pt2")
    monkeypatch.setattr(export, "find_spec", lambda name: None if name == "onnxscript" else object())
    with pytest.raises(ValueError, match=r"got no onnxscript \(pip install onnx onnxscript onnxruntime\)"):
        export.export(model, path)
    assert not list(tmp_path.iterdir())


def test_what_is_read_is_not_written_over(tmp_path):
    own, shape = tmp_path / "own.safetensors", tmp_path / "shape.safetensors"
    for path, source in ((own, "lgcn-finder"), (shape, "shape-68")):
        path.write_bytes((WEIGHTS / f"{source}.safetensors").read_bytes())
    before = own.read_bytes(), shape.read_bytes()
    for path in (own, shape):
        with pytest.raises(ValueError, match="path: expected another file than those that are read, got"):
            export.export(own, path, "pt2", shape)
    assert (own.read_bytes(), shape.read_bytes()) == before
    for path, message in (
        (tmp_path, "path: expected a file to write, got the folder"),
        (Path("."), r"path: expected a file to write, got the folder \."),
        (tmp_path / "a.onnx", "path: expected a name for the format 'pt2', got"),
    ):
        with pytest.raises(ValueError, match=message):
            export.export(own, path, "pt2")


@formats
def test_command(format, tmp_path, capsys):
    weights, path = tmp_path / "mine.safetensors", tmp_path / "new folder" / f"mine.{format}"
    save_model(weights, randomised(CONFIGS["nano"]), {})
    assert cli.main(["export", "--model", str(weights), "--format", format, "--out", str(path)]) == 0
    assert capsys.readouterr().out.endswith(" of the model's, without a fit of 3 landmarks (--shape)\n")
    model = load_model(weights)
    images = np.zeros((1, 1, 24, 24), np.uint8)
    with torch.inference_mode():
        expected = model(torch.from_numpy(images)).output.numpy()
    np.testing.assert_allclose(heatmaps_of(path, images), expected, rtol=0, atol=1e-3 * np.abs(expected).max())
    assert cli.main(["export", "--model", "lgcn-finder", "--format", format, "--out", str(path)]) == 0
    assert capsys.readouterr().out.endswith(" of the model's\n")
    assert cli.main(["export", "--model", "nothing", "--format", format, "--out", str(path)]) == 2
    assert "model: expected one of" in capsys.readouterr().err
