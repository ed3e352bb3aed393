import csv
import errno
import json
import os
import runpy
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from lgcn_fast import Landmarks, __version__, cli, cli_training, predict
from lgcn_fast.checkpoints import load_card, model_names
from lgcn_fast.cli import main
from lgcn_fast.crops import BACKGROUND_CROPS
from lgcn_fast.datasets import is_validation, read_csv
from lgcn_fast.images import read_image
from lgcn_fast.shipped import default_model


def test_demo(tmp_path, capsys):
    assert main(["demo", "--out", str(tmp_path / "new" / "demo.png")]) == 0
    assert "68 landmarks" in capsys.readouterr().out
    assert cv2.imread(str(tmp_path / "new" / "demo.png")).shape == (600, 600, 3)


def test_predict_doubts_that_a_photo_is_one_face(tmp_path, demo_picture, capsys):
    predict_it = ["predict", str(demo_picture), "--out", str(tmp_path)]
    assert main(["predict", *[str(demo_picture)] * 2, "--passes", "1", "--out", str(tmp_path)]) == 0
    assert "mean score below 0.5 in 1 of 1 pictures: is the whole picture one face?" in capsys.readouterr().err
    near = tmp_path / "near.png"  # one face, but loosely cut out: the second pass is closer
    cv2.imwrite(str(near), cv2.imread(str(demo_picture))[40:230, 60:250])
    means = []
    for passes in ([], ["--passes", "1"]):
        assert main(["predict", str(near), *passes, "--style", "boxes", "confidence", "--out", str(tmp_path)]) == 0
        means.append(np.mean(json.loads((tmp_path / "landmarks.json").read_text())[str(near)]["scores"]))
    assert means[0] > means[1] + 0.05
    capsys.readouterr()
    assert main([*predict_it, "--box", "93,79,108,108"]) == 0
    printed = capsys.readouterr()
    assert not printed.err
    assert "landmarks of 1 of 1 files, mean score 0.7" in printed.out


def test_help_names_the_models_that_are_the_default(capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["predict", "--help"])
    expected = f"default: {default_model('cuda')}, on a CPU {default_model('cpu')} "
    assert expected in " ".join(capsys.readouterr().out.split()) + " "


def test_version(capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["--version"])
    assert capsys.readouterr().out == f"lgcn_fast {__version__}\n"


def test_predict_goes_on_after_bad_files(tmp_path, demo_picture, capsys):
    text = tmp_path / "text.jpg"
    text.write_text("no picture")
    cut = tmp_path / "cut.jpg"
    cut.write_bytes(demo_picture.read_bytes()[:8000])
    small = tmp_path / "small.png"
    cv2.imwrite(str(small), np.zeros((20, 20), np.uint8))
    twin = tmp_path / "folder" / "demo.jpg"
    twin.parent.mkdir()
    twin.write_bytes(demo_picture.read_bytes())
    files = [text, demo_picture, tmp_path, cut, small, tmp_path / "missing.png", twin]
    out = tmp_path / "out"
    assert main(["predict", *map(str, files), "--box", "82,70,124,124", "--out", str(out)]) == 2
    captured = capsys.readouterr()
    assert "landmarks of 2 of 7 files" in captured.out
    errors = captured.err.splitlines()
    assert len(errors) == 5
    for path, error in zip([text, tmp_path, cut, small, tmp_path / "missing.png"], errors, strict=True):
        assert str(path) in error
        assert "expected" in error
        assert "got" in error
    found = json.loads((out / "landmarks.json").read_text())
    assert list(found) == [str(demo_picture), str(twin)]
    assert found[str(demo_picture)]["points"] == found[str(twin)]["points"]
    assert len({entry["picture"] for entry in found.values()}) == 2
    for entry in found.values():
        assert np.array(entry["points"]).shape == (68, 2)
        assert np.array(entry["scores"]).shape == (68,)
        assert entry["points"] == np.round(entry["points"], 3).tolist()  # not as many digits as float32 makes of them
        assert (out / entry["picture"]).is_file()


@pytest.mark.parametrize("command", ["predict", "detect"])
def test_what_was_found_is_kept_when_interrupted(tmp_path, demo_picture, monkeypatch, command):
    from lgcn_fast import cli_photos

    def stop(*_, **__):
        raise KeyboardInterrupt

    def once(path, color):
        monkeypatch.setattr(cli, "read_image", stop)
        monkeypatch.setattr(cli_photos, "read_image", stop)
        return read_image(path, color)

    monkeypatch.setattr(cli, "read_image", once)
    monkeypatch.setattr(cli_photos, "read_image", once)
    assert main([command, str(demo_picture), "b.jpg", "--out", str(tmp_path)]) == 130
    name = {"predict": "landmarks.json", "detect": "faces.json"}[command]
    assert list(json.loads((tmp_path / name).read_text())) == [str(demo_picture)]


@pytest.mark.parametrize(("command", "kind"), [("predict", "landmarks"), ("detect", "faces")])
def test_drawings_do_not_overwrite_the_input(tmp_path, demo_picture, command, kind):
    files = [tmp_path / "a.jpg", tmp_path / f"a_{kind}.png"]
    for file in files:
        file.write_bytes(demo_picture.read_bytes())
    assert main([command, *map(str, files), "--out", str(tmp_path)]) == 0
    assert all(file.read_bytes() == demo_picture.read_bytes() for file in files)
    found = json.loads((tmp_path / f"{kind}.json").read_text())
    assert [entry["picture"] for entry in found.values()] == [f"a_2_{kind}.png", f"a_{kind}_{kind}.png"]


def test_numbers_replace_others_only_when_they_are_whole(tmp_path, demo_picture, monkeypatch, capsys):
    def full(path, content):
        path.touch()
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    numbers = tmp_path / "landmarks.json"
    numbers.write_text("{}")
    monkeypatch.setattr(Path, "write_bytes", full)
    monkeypatch.setattr(cli, "_write_picture", lambda *_: None)
    assert main(["predict", str(demo_picture), "--out", str(tmp_path)]) == 2
    assert f"No space left on device: '{numbers}'" in capsys.readouterr().err
    assert numbers.read_text() == "{}"
    assert not list(tmp_path.glob("*.part"))


def test_numbers_of_files_whose_names_are_no_utf8(tmp_path, demo_picture):
    strange = tmp_path / os.fsdecode(b"latin-\xfc.jpg")
    shutil.copy(demo_picture, strange)
    assert main(["predict", str(strange), "--format", "csv", "--out", str(tmp_path)]) == 0
    assert b"latin-\xfc.jpg," in (tmp_path / "landmarks.csv").read_bytes()


@pytest.mark.parametrize(("command", "kind"), [("predict", "landmarks"), ("detect", "faces")])
def test_long_names_are_cut(tmp_path, demo_picture, command, kind):
    files = [tmp_path / name for name in ("名" * 80 + ".jpg", "a" * 250 + ".jpg")]
    for file in files:
        shutil.copy(demo_picture, file)
    assert main([command, *map(str, files), "--out", str(tmp_path / "out")]) == 0
    names = {f"{'名' * 66}_{kind}.png", f"{'a' * 200}_{kind}.png", f"{kind}.json"}
    assert {path.name for path in (tmp_path / "out").iterdir()} == names


def test_output_takes_names_that_are_no_text(tmp_path, faces):
    strange = tmp_path / os.fsdecode(b"caf\xe9")
    faces.rename(strange)
    program = "import sys; from lgcn_fast.cli import main; sys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-c", program, "prepare", strange, "--out", tmp_path / "c.npz"]
    environment = os.environ | {"PYTHONIOENCODING": "utf-8:strict"}
    run = subprocess.run(command, env=environment, capture_output=True, check=True)
    assert b"caf\\udce9: 11 faces" in run.stdout


def test_what_is_read_is_not_written_over(tmp_path, faces, capsys):
    for command in (["prepare", str(faces), "--out", str(faces)], ["fit-shape", str(faces), "--out", str(faces)]):
        assert main(command) == 2
        assert "--out: expected another file than those that are read, got" in capsys.readouterr().err
    (tmp_path / "shape.png").write_text("a cache, of a strange name")
    assert main(["fit-shape", str(tmp_path / "shape.png"), "--out", str(tmp_path / "shape.safetensors")]) == 2
    assert (tmp_path / "shape.png").read_text() == "a cache, of a strange name"


def test_nothing_is_left_where_weights_are_missing(tmp_path, demo_picture):
    for command in ("predict", "detect"):
        assert main([command, str(demo_picture), "--model", "lgcn-0", "--out", str(tmp_path / "out")]) == 2
    assert main(["export", "--model", "lgcn-0", "--out", str(tmp_path / "out" / "a.onnx")]) == 2
    assert not list(tmp_path.iterdir())


def test_the_command_line_starts_without_matplotlib():
    """It takes half a second, and does not start where no folder can be written to."""
    code = "import sys, lgcn_fast.cli; assert 'matplotlib' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_predicted_csv_can_be_trained_on(tmp_path, demo_picture):
    assert main(["predict", str(demo_picture), "--format", "csv", "--out", str(tmp_path)]) == 0
    (face,) = read_csv(tmp_path / "landmarks.csv", demo_picture.parent)
    assert face.points.shape == (68, 2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["predict", "a.png", "--out", "o", "--box", "1,2,3"], "expected four numbers x,y,width,height, got '1,2,3'"),
        (["predict", "--out", "o"], "the following arguments are required: FILE"),
        (["train", "c.npz", "--out", "o", "--share", "a"], "expected SET=SHARE"),
        (["train", "c.npz", "--out", "o", "--network", "17"], "invalid choice: '17'"),
        (["nothing"], "invalid choice"),
    ],
)
def test_bad_arguments(arguments, message, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(arguments)
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["predict", "{demo}", "--out", "{tmp}/o", "--model", "{demo}"], "demo.jpg: expected a safetensors file"),
        (["predict", "{demo}", "--out", "{tmp}/o", "--model", "lgcn-0"], "model: expected one of lgcn-"),
        (["predict", "{demo}", "--out", "{tmp}/o", "--ensemble", "0"], "ensemble: expected 1 or more, got 0"),
        (["predict", "{demo}", "--out", "{tmp}/file"], "file"),
        (["prepare", "{tmp}/nowhere", "--out", "{tmp}/c.npz"], "nowhere: expected a folder"),
        (["train", "{demo}", "--out", "{tmp}/run"], "demo.jpg: expected a crop cache"),
        (["evaluate", "{tmp}", "--out", "{tmp}/o"], "expected .pts files"),
        *(
            (
                [command, "{demo}", "--out", "{tmp}/o.avi", "--device", "cpu", "--precision", "fp8"],
                "precision: expected",
            )
            for command in ("predict", "detect", "video")
        ),
    ],
)
def test_bad_input_exits_with_2(tmp_path, demo_picture, arguments, message, capsys):
    (tmp_path / "file").write_text("")
    assert main([text.format(tmp=tmp_path, demo=demo_picture) for text in arguments]) == 2
    assert message in capsys.readouterr().err


def test_models_are_listed_with_what_is_known_of_them(package, capsys):
    assert main(["models"]) == 0
    head, big, small, _ = (line.split() for line in capsys.readouterr().out.splitlines())
    assert head[:2] == ["parameters", "size"]
    assert " ".join(big[:1] + big[4:]) == "lgcn-big 3.50 / 2.50 4.50 / 3.25 1,234 on cpu"
    assert small[:1] + small[4:] == ["lgcn-small", "-", "-", "-"]


def test_predict_takes_a_name_an_ensemble_and_passes(tmp_path, demo_picture):
    files = [str(demo_picture), "--box", "90,70,140,140", "--model", "lgcn-nano", "--ensemble", "2", "--passes", "2"]
    assert main(["predict", *files, "--out", str(tmp_path)]) == 0
    (found,) = json.loads((tmp_path / "landmarks.json").read_text()).values()
    expected = predict(read_image(demo_picture, color=True), [[90, 70, 140, 140]], "lgcn-nano", ensemble=2, passes=2)
    np.testing.assert_allclose(found["points"], expected.points[0], atol=1e-3)


@pytest.fixture
def faces(tmp_path, random):
    """A 300-W style folder with eleven labelled pictures of blobs."""
    folder = tmp_path / "faces"
    folder.mkdir()
    for index in range(11):
        points = random.uniform(40, 110, (68, 2))
        cv2.imwrite(str(folder / f"p{index}.png"), random.integers(0, 256, (150, 150), np.uint8))
        lines = "\n".join(f"{x + 1:.3f} {y + 1:.3f}" for x, y in points)
        (folder / f"p{index}.pts").write_text(f"version: 1\nn_points: 68\n{{\n{lines}\n}}\n")
    return folder


@pytest.mark.slow
def test_from_labels_to_report(tmp_path, faces, capsys):
    cache, run, out = tmp_path / "cache" / "c.npz", tmp_path / "run", tmp_path / "report"
    background = tmp_path / "background"
    background.mkdir()
    cv2.imwrite(str(background / "b.jpg"), np.zeros((80, 60), np.uint8))
    assert main(["prepare", str(faces), "--background", str(background), "--out", str(cache)]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed[:2] == [f"{faces}: 11 faces", f"{background}: 1 pictures"]
    assert printed[2].startswith(f"{cache}: {11 + BACKGROUND_CROPS} crops, ")
    train = ["train", str(cache), "--out", str(run), "--epochs", "2", "--share", f"{faces}=0.9", "--no-amp"]
    train += ["--warp", "0.5"]
    assert main([*train, "--time-budget", "1e-6"]) == 0
    assert "the same command goes on" in capsys.readouterr().out
    assert main(train) == 0
    assert "finished" in capsys.readouterr().out
    with (run / "log.csv").open(newline="") as file:
        assert [row["epoch"] for row in csv.DictReader(file)] == ["1", "2"]
    card = load_card(run / "best.safetensors")
    assert card["data"] == {str(faces): 11, str(background): BACKGROUND_CROPS}
    assert card["recipe"]["name"] == "fast"
    assert card["recipe"]["augmentation"]["warp"] == 0.5
    shape = tmp_path / "shape" / "shape.safetensors"
    np.savez(tmp_path / "more.npz", landmarks=np.ones((3, 68, 2)) * np.arange(2) + np.arange(68)[:, None])
    more = ["--shapes", str(tmp_path / "more.npz"), "--modes", "2"]
    assert main(["fit-shape", str(cache), "--sets", str(faces), *more, "--out", str(shape)]) == 0
    assert {path.name for path in shape.parent.iterdir()} == {"shape.safetensors", "shape.png"}
    assert main(["fit-shape", str(cache), "--sets", "nothing", "--out", str(shape)]) == 2
    assert main(["fit-shape", str(cache), "--out", str(shape.with_suffix(".png"))]) == 2
    assert "--out: expected the .safetensors file, beside which the picture goes" in capsys.readouterr().err
    assert main(["prepare", str(faces), f"{faces}/../{faces.name}", "--out", str(cache)]) == 2
    assert "faces: expected each set once" in capsys.readouterr().err
    assert (
        main(
            ["evaluate", str(faces), "--model", str(run / "best.safetensors"), "--shape", str(shape), "--out", str(out)]
        )
        == 0
    )
    assert json.loads((out / "evaluation.json").read_text())["percent"]["fit, 68 points"]["faces"] == 11
    assert {path.name for path in out.iterdir()} == {"evaluation.json", "curve.png", "sheet.png"}


def test_sets_may_be_named_as_shells_complete_them():
    for text in ("faces", "./faces", "faces/", "./faces//"):
        assert cli_training._set_name(text) == "faces"
    assert cli_training._share("../a/b.csv=0.25") == ("../a/b.csv", 0.25)


@pytest.mark.slow
def test_bench_runs_and_writes_json(tmp_path, monkeypatch):
    monkeypatch.setattr(cli, "BENCHMARKS", ("kernel_convolution",))
    benchmarks = Path(__file__).parents[1] / "benchmarks"
    assert main(["bench", "--benchmarks", str(benchmarks), "--out", str(tmp_path)]) == 0
    written = json.loads((tmp_path / "kernel_convolution.json").read_text())
    assert written["machine"]["cpu"]
    assert written["results"]["136 maps"]["native, fp32"]["ratio"] > 1


@pytest.mark.slow
def test_benchmark_of_the_network_takes_every_model(monkeypatch):
    """One round of it, without other runtimes: each model that ships is within the tolerances."""
    benchmarks = Path(__file__).parents[1] / "benchmarks"
    monkeypatch.syspath_prepend(benchmarks)
    main = runpy.run_path(str(benchmarks / "network.py"))["main"]
    compare = main.__globals__["compare"]
    monkeypatch.setitem(main.__globals__, "compare", lambda functions, rounds: compare(functions, rounds=1))
    monkeypatch.setitem(main.__globals__, "runtimes", lambda *_: {})
    results = main()
    assert set(results) == {"matrix_gflops", *model_names()}
    for name in model_names():
        assert {"eager PyTorch, fp32", "engine, fp32"} <= results[name].keys()


@pytest.mark.slow
def test_benchmark_of_robustness_on_one_face(tmp_path, demo_picture, monkeypatch, capsys):
    """Labels that are the network's own points: no error with the labels' box, and more where the picture is worse."""
    image = read_image(demo_picture)
    points = predict(image, [[82, 70, 124, 124]], model="lgcn-nano", passes=2).points[0]
    name = next(name for name in map(str, range(99)) if is_validation(name))
    for folder in ("300w/afw", "300w/helen", "300w/lfpw/trainset", "infants/trainset"):
        (tmp_path / folder).mkdir(parents=True)
        shutil.copy(demo_picture, tmp_path / folder / f"{name}.jpg")
        (tmp_path / folder / f"{name}.pts").write_text("\n".join(f"{x + 1} {y + 1}" for x, y in points))
    script = Path(__file__).parents[1] / "benchmarks" / "robustness.py"
    monkeypatch.setattr(sys, "argv", [str(script), str(tmp_path), "--model", "lgcn-nano"])
    runpy.run_path(str(script), run_name="__main__")
    printed = capsys.readouterr().out
    assert "3 faces, 2 photos, 1 infants" in printed
    rows = {
        cells[0].strip(): cells[1:] for line in printed.splitlines() if len(cells := line.strip("| ").split("|")) > 2
    }
    errors = {name: float(cells[0].split()[0]) for name, cells in rows.items() if "%" in cells[0]}
    assert errors["around the labels"] < 1 < errors["0.8 times as large"]
    assert errors["turned by 60 degrees"] > 1.5
    assert errors["box of 60 pixels"] < errors["20 pixels"]
    assert errors["out of focus, 1/80 of the box"] < errors["1/25"]
    assert [cells.strip() for cells in rows["any_angle=True"]] == ["1"] * 6


def test_benchmark_for_a_gpu_says_that_there_is_none():
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    script = Path(__file__).parents[1] / "benchmarks" / "gpu.py"
    result = subprocess.run([sys.executable, str(script)], capture_output=True, text=True)
    assert result.returncode == 1
    assert result.stderr == "benchmarks/gpu.py: expected an NVIDIA GPU, torch finds none\n"


def test_bench_needs_a_checkout_and_says_what_failed(tmp_path, monkeypatch, capsys):
    assert main(["bench", "--benchmarks", str(tmp_path), "--out", str(tmp_path)]) == 2
    assert "--benchmarks: expected the folder benchmarks/ of a checkout" in capsys.readouterr().err
    monkeypatch.setattr(cli, "BENCHMARKS", ("broken",))
    (tmp_path / "broken.py").write_text("raise SystemExit(1)")
    assert main(["bench", "--benchmarks", str(tmp_path), "--out", str(tmp_path)]) == 2
    assert "broken.py: failed" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "filters", "stride"), [("nano", 64, 2), ("nano-96", 96, 2), ("finder", 32, 4), ("16", 16, 1)]
)
def test_networks_by_name(name, filters, stride):
    config = cli_training._network(name, 5, in_channels=3, dropout=0.25)
    assert (config.filters, config.stride, config.num_landmarks, config.in_channels) == (filters, stride, 5, 3)
    assert config.dropout == 0.25


def test_heatmaps_do_not_overwrite_the_input(tmp_path, demo_picture):
    files = [tmp_path / "a.jpg", tmp_path / "a_heatmap.png"]
    for file in files:
        file.write_bytes(demo_picture.read_bytes())
    assert main(["detect", *map(str, files), "--heatmap", "--out", str(tmp_path)]) == 0
    assert all(file.read_bytes() == demo_picture.read_bytes() for file in files)


def test_small_pictures_are_enlarged_with_their_points(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(cli, "draw", lambda image, faces, *_: drawn.append(faces.points) or image)
    corners = Landmarks(np.array([[[-0.5, -0.5], [49.5, 99.5]]]), np.ones((1, 2)))
    cli._write_picture(tmp_path / "a.png", np.zeros((100, 50, 3), np.uint8), corners)
    assert read_image(tmp_path / "a.png").shape == (600, 300)
    np.testing.assert_array_equal(drawn, [[[[-0.5, -0.5], [299.5, 599.5]]]])


def test_signals_are_handled_as_before(tmp_path):
    ends = signal.SIGTERM, signal.SIGINT
    before = [signal.getsignal(end) for end in ends]
    assert main(["predict", str(tmp_path / "none.jpg"), "--out", str(tmp_path)]) == 2
    assert [signal.getsignal(end) for end in ends] == before


def test_names_of_sets_may_hold_an_equals_sign():
    assert cli_training._share("a=b/c=0.25") == ("a=b/c", 0.25)
