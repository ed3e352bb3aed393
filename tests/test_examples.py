"""examples/*.py on the demo picture and a clip made of it. (The example in C++: test_cpp_example.py.)"""

import csv
import json
import os
import runpy
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from conftest import FPS, FRAMES

import lgcn_fast
from lgcn_fast.cli import DEMO_BOX
from lgcn_fast.images import crop, read_image, square_box, write_image

EXAMPLES = Path(__file__).parents[1] / "examples"
TOLERANCE = 2.0
"""Pixels that two decoders, a lossy clip and the filter may put between points."""


def run(name: str, *arguments: object) -> None:
    runpy.run_path(str(EXAMPLES / f"{name}.py"))["main"]([str(word) for word in arguments])


def test_crops(tmp_path, demo_picture):
    photo = read_image(demo_picture, color=True)
    files = [tmp_path / "tight.png", tmp_path / "wide.png"]
    for path, scale in zip(files, (1.0, 1.2), strict=True):
        box = square_box(np.array(DEMO_BOX), scale)
        write_image(path, crop(photo, box, int(box[2])))
    run("crops", *files, "--out", tmp_path / "landmarks.csv")
    with (tmp_path / "landmarks.csv").open(newline="") as file:
        header, *rows = csv.reader(file)
    assert header[:3] == ["image", "x0", "y0"]
    assert [row[0] for row in rows] == ["tight.png", "wide.png"]
    points = np.array([row[1:] for row in rows], float).reshape(2, 68, 2)
    expected = lgcn_fast.predict([read_image(path) for path in files], passes=2).points
    np.testing.assert_allclose(points, expected, atol=1e-3)


def test_photo(tmp_path, demo_picture, capsys):
    run("photo", demo_picture, "--out", tmp_path)
    assert "1 faces" in capsys.readouterr().out
    drawn, photo = (read_image(path, color=True) for path in (tmp_path / "demo_faces.png", demo_picture))
    assert drawn.shape == photo.shape
    assert (drawn != photo).any()


def test_video(tmp_path, clip, pictures):
    run("video", clip, "--out", tmp_path / "landmarks.jsonl")
    lines = [json.loads(line) for line in (tmp_path / "landmarks.jsonl").read_text().splitlines()]
    assert [line["frame"] for line in lines] == list(range(FRAMES))
    assert [[face["id"] for face in line["faces"]] for line in lines] == [[0]] * FRAMES
    assert_close_to_detected(pictures[-1], lines[-1]["faces"][0]["points"])


def assert_close_to_detected(picture: np.ndarray, points: list) -> None:
    (expected,) = lgcn_fast.detect(picture).points
    assert np.linalg.norm(np.array(points) - expected, axis=1).mean() < TOLERANCE


def test_a_consumer_that_is_slower_than_the_camera_drops_frames(clip, capsys):
    run("pipeline", clip, "--work", 100)
    words = capsys.readouterr().out.split()
    delivered, consumed, dropped = (int(words[i]) for i in (0, 3, 5))
    assert delivered == FRAMES
    assert consumed + dropped == delivered
    assert consumed <= FRAMES / 2


def test_an_installed_interpreter_runs_an_example_as_a_file(clip):
    command = [sys.executable, EXAMPLES / "pipeline.py", clip]
    found = subprocess.run(command, capture_output=True, text=True, env=environment())
    assert found.returncode == 0, found.stderr
    assert f"{FRAMES} frames delivered" in found.stdout


def environment() -> dict[str, str]:
    """For another process: what is imported here, wherever it was found, is found there too."""
    return os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}


@pytest.mark.parametrize("source", ["av", "ffmpeg"])
def test_frames_of_ffmpeg(clip, pictures, capsys, source):
    if source == "av" and find_spec("av") is None:
        pytest.skip("needs PyAV (pip install av)")
    if source == "ffmpeg" and shutil.which("ffmpeg") is None:
        pytest.skip("needs the program ffmpeg")
    run("ffmpeg_pipe", clip, "--source", source, "--fps", FPS)
    assert_frames(capsys.readouterr().out, pictures)


def assert_frames(output: str, pictures: list[np.ndarray]) -> None:
    lines = [json.loads(line) for line in output.splitlines()]
    assert [line["time"] for line in lines] == [i / FPS for i in range(FRAMES)]
    assert_close_to_detected(pictures[-1], lines[-1]["points"]["0"])


def in_place_of_ffmpeg(folder: Path, script: str) -> None:
    path = folder / "ffmpeg"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)


@pytest.mark.skipif(sys.platform == "win32", reason="needs a shell")
def test_raw_pictures_from_a_process(tmp_path, pictures, capsys, monkeypatch):
    header = b"P6\n320 240\n255\n"
    (tmp_path / "frames.ppm").write_bytes(b"".join(header + picture.tobytes() for picture in pictures))
    in_place_of_ffmpeg(tmp_path, f"cat {tmp_path / 'frames.ppm'}")
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    run("ffmpeg_pipe", "stream", "--source", "ffmpeg", "--fps", FPS)
    assert_frames(capsys.readouterr().out, pictures)


@pytest.mark.skipif(sys.platform == "win32", reason="needs a shell")
def test_a_process_that_fails_says_so(tmp_path, monkeypatch):
    in_place_of_ffmpeg(tmp_path, "exit 3")
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    with pytest.raises(SystemExit, match="stream: ffmpeg stopped with exit code 3 after 0 frames"):
        run("ffmpeg_pipe", "stream", "--source", "ffmpeg")


def test_without_ffmpeg_there_is_a_remedy(clip, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    monkeypatch.setattr("shutil.which", lambda _: None)
    with pytest.raises(SystemExit, match=r"expected PyAV or the program ffmpeg, got none.*pip install av"):
        run("ffmpeg_pipe", clip)
    with pytest.raises(SystemExit, match="expected av, got none"):
        run("ffmpeg_pipe", clip, "--source", "av")


def test_without_ray_there_is_a_remedy(tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(SystemExit, match="pip install"):
        run("ray_folder", tmp_path, "--out", tmp_path / "faces.jsonl")


def test_a_worker_of_rays_goes_on_after_bad_files(tmp_path, demo_picture):
    torn = tmp_path / "torn.jpg"
    torn.write_bytes(demo_picture.read_bytes()[:5000])
    worker = runpy.run_path(str(EXAMPLES / "ray_folder.py"))["FaceFinder"]

    def unreadable(path):
        if path.name == "far.jpg":
            raise OSError("the network is down")
        return read_image(path)

    worker._look_at.__globals__["read_image"] = unreadable
    files = [str(demo_picture), str(torn), "far.jpg"]
    found, *others = map(json.loads, worker("lgcn-nano", 40)({"path": np.array(files)})["line"])
    assert len(found["faces"]) == 1
    assert "expected a picture file" in others[0]["error"]
    assert others[1]["error"] == "the network is down"


@pytest.mark.slow
@pytest.mark.skipif(find_spec("ray") is None, reason='needs Ray Data (pip install "ray[data]")')
def test_a_folder_with_ray(tmp_path, demo_picture):
    photos = tmp_path / "photos"
    photos.mkdir()
    shutil.copy(demo_picture, photos)
    (photos / "torn.jpg").write_bytes(demo_picture.read_bytes()[:5000])
    command = [sys.executable, EXAMPLES / "ray_folder.py", photos, "--out", tmp_path / "faces.jsonl", "--workers", "1"]
    # (Ray puts a token into the home folder, and reports how it is used.)
    settings = {"HOME": str(tmp_path), "RAY_USAGE_STATS_ENABLED": "0"}
    subprocess.run(command, check=True, env=environment() | settings)
    records = {}
    for line in (tmp_path / "faces.jsonl").read_text().splitlines():
        record = json.loads(line)
        records[Path(record["file"]).name] = record
    assert records.keys() == {"demo.jpg", "torn.jpg"}
    assert len(records["demo.jpg"]["faces"]) == 1
    assert "expected a picture file" in records["torn.jpg"]["error"]
