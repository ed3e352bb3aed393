import csv
import json
import os

import cv2
import numpy as np
import pytest

from lgcn_fast import checkpoints, models, report
from lgcn_fast.checkpoints import WEIGHTS, model_names
from lgcn_fast.cli import main
from lgcn_fast.datasets import Face, read_faces
from lgcn_fast.evaluation import Evaluation, evaluate, with_mean_shape
from lgcn_fast.report import MARKERS, TEST_SETS, put_into_readme, write_evaluation
from lgcn_fast.shipped import MEASURED


def test_evaluations_are_written_as_numbers_curve_and_sheet(tmp_path, random):
    points = random.uniform(30, 90, (20, 68, 2)).astype(np.float32)
    faces = [Face(random.integers(0, 256, (120, 120), np.uint8), p, f"f{i}", f"f{i}") for i, p in enumerate(points)]
    evaluation = Evaluation(faces, points + 1, points, "inter-ocular")
    baseline = with_mean_shape(evaluation, random.uniform(0, 1, (68, 2)))
    values = write_evaluation({"fit": evaluation, "mean shape": baseline}, tmp_path / "out")
    assert json.loads((tmp_path / "out" / "evaluation.json").read_text()) == values
    names = {"fit, 68 points", "fit, 51 points", "mean shape, 68 points", "mean shape, 51 points"}
    assert set(values["percent"]) == names
    assert len(values["faces"]) == 20
    for name in ("curve.png", "sheet.png"):
        picture = cv2.imread(str(tmp_path / "out" / name))
        assert picture.std() > 10


@pytest.fixture
def faces(tmp_path, random):
    """Test sets like those of the workplace, three pictures of noise each."""
    lfpw, youtube = tmp_path / "300w" / "lfpw" / "testset", tmp_path / "youtube" / "test"
    for folder in (lfpw, youtube):
        folder.mkdir(parents=True)
        for index in range(3):
            cv2.imwrite(str(folder / f"p{index}.png"), random.integers(0, 256, (150, 150), np.uint8))
    points = random.uniform(40, 110, (3, 68, 2))
    for index, face in enumerate(points):
        (lfpw / f"p{index}.pts").write_text("\n".join(f"{x + 1:.3f} {y + 1:.3f}" for x, y in face))
    with youtube.with_suffix(".csv").open("w", newline="") as file:
        header = ["image", *(f"{axis}{i}" for i in range(68) for axis in "xy")]
        csv.writer(file).writerows([header, *([f"p{i}.png", *face.ravel()] for i, face in enumerate(points))])
    return tmp_path


def test_report_of_the_family(faces, package, tmp_path, monkeypatch, capsys):
    speeds = iter((200.0, 100.0, 50.0, 25.0))  # of lgcn-big, lgcn-small, and again
    monkeypatch.setattr(report, "faces_per_second", lambda engine, sample: next(speeds))
    readme, out = tmp_path / "README.md", tmp_path / "new" / "report"
    readme.write_text(f"before\n{MARKERS[0]}old\n{MARKERS[1]}behind\n")
    command = ["report", "--data", str(faces), "--out", str(out), "--device", "cpu"]
    assert main([*command, "--readme", str(readme), "--ship"]) == 0
    table = (out / "accuracy.md").read_text()
    assert capsys.readouterr().out == table
    assert readme.read_text() == f"before\n{MARKERS[0]}{table}{MARKERS[1]}behind\n"
    assert table.index("**lgcn-big**") < table.index("**lgcn-small**") < table.index("*published:*")
    assert "2.86 / 2.21" in table
    assert "| 3.24 / 2.72 |" in table
    stems = [f"{name}-{kind}.png" for name in ("lfpw-test", "youtube-test") for kind in ("curve", *model_names())]
    assert {path.name for path in out.iterdir()} == {*stems, "accuracy.md", "report.json", MEASURED}
    assert all(cv2.imread(str(out / stem)).std() > 10 for stem in stems)
    values = json.loads((out / "report.json").read_text())
    assert values["models"] == json.loads((package / MEASURED).read_text())
    assert len(values["faces"]["LFPW test"]["lgcn-big"]) == 3
    big = next(model for model in models() if model.name == "lgcn-big")
    alone = evaluate(read_faces(faces / TEST_SETS["LFPW test"]), "lgcn-big")
    for method, error in (("fit", big.error), ("heatmap maxima", big.error_without_fit)):
        expected = [row["median"] for row in alone[method].summaries().values()]
        assert error == pytest.approx(expected, abs=1e-3)
    assert big.faces_per_second == {"cpu": 200.0}


def test_speeds_of_other_devices_stay_while_the_weights_do(faces, package, tmp_path, monkeypatch):
    monkeypatch.setattr(report, "faces_per_second", lambda engine, sample: 100.0)
    command = ["report", "--data", str(faces), "--out", str(tmp_path / "out"), "--device", "cpu", "--ship"]
    assert main(command) == 0
    measured = json.loads((package / MEASURED).read_text())
    assert list(measured["lgcn-big"]["speed"]) == ["cpu"]  # what stood there was of other weights
    for entry in measured.values():
        entry["speed"]["cuda"] = {"faces_per_second": 9000.0, "machine": "a GPU"}
    (package / MEASURED).write_text(json.dumps(measured))
    small = checkpoints.load_model("lgcn-small")
    small.main.bias.data += 1
    checkpoints.save_model(package / "lgcn-small.safetensors", small, checkpoints.load_card("lgcn-small"))
    assert main(command) == 0
    speeds = {model.name: model.faces_per_second for model in models()}
    assert speeds == {"lgcn-big": {"cuda": 9000.0, "cpu": 100.0}, "lgcn-small": {"cpu": 100.0}}
    assert "faces/s, cpu | faces/s, cuda |" in (tmp_path / "out" / "accuracy.md").read_text()


def test_missing_data_and_markers_are_named(tmp_path, capsys):
    assert main(["report", "--data", str(tmp_path), "--out", str(tmp_path / "out")]) == 2
    assert "testset: expected a folder with .pts files or a .csv file, got nothing there" in capsys.readouterr().err
    readme = tmp_path / "README.md"
    readme.write_text("<!-- accuracy -->\nno end\n")
    assert main(["report", "--data", str(tmp_path), "--out", str(tmp_path / "out"), "--readme", str(readme)]) == 2
    assert "README.md: expected the lines" in capsys.readouterr().err  # before all work
    with pytest.raises(ValueError, match=r"README.md: expected the lines <!-- accuracy --> and <!-- /accuracy -->"):
        put_into_readme(readme, "table")


def test_speed_is_calls_a_second(monkeypatch):
    clock = iter(range(1000))
    monkeypatch.setattr(report, "predict", lambda sample, model: None)
    monkeypatch.setattr(report.time, "perf_counter", lambda: next(clock) / 4)
    assert report.faces_per_second(None, np.zeros((96, 96), np.uint8), seconds=10) == 4


@pytest.mark.data
@pytest.mark.slow
def test_measured_errors_are_reproduced(data):
    """The table of the README, by what is here now. From one arithmetic to another (fp32, bf16 with AMX, bf16 with
    Winograd's algorithm) the means of the errors change by up to 0.2 %, those of lgcn-16 and -32; a median jumps from
    one face to the next, by up to 0.04."""
    measured = json.loads((WEIGHTS / MEASURED).read_text())
    for title, path in TEST_SETS.items():
        faces = read_faces(data / path)
        for name, entry in measured.items():
            for method, evaluation in evaluate(faces, name).items():
                for points, row in evaluation.summaries().items():
                    known = entry["percent"][title][method][points]
                    assert row["mean"] == pytest.approx(known["mean"], rel=3e-3)
                    assert row["median"] == pytest.approx(known["median"], abs=0.05)


def test_processors_have_a_name_in_any_language(tmp_path, monkeypatch):
    script = (
        "#!/bin/sh\nif [ $LC_ALL = C ]; then echo 'Model name: Abacus 7'; else echo 'Nom de modele : Abacus 7'; fi\n"
    )
    (tmp_path / "lscpu").write_text(script)
    (tmp_path / "lscpu").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setenv("LC_ALL", "fr_FR.UTF-8")
    assert report.cpu_name().startswith(f"Abacus 7, {os.cpu_count()} cores")


def test_failures_are_counted_in_faces():
    row = {"68 points": {"median": 2.5, "failures": 2.0, "faces": 350}, "51 points": {"median": 1.25}}
    assert report._cells(row) == ["2.50 / 1.25", "7"]
