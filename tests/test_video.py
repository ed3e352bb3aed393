import itertools
import json
import os
import resource
import subprocess
import sys
import threading
import time
from collections import namedtuple
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from conftest import FPS

from lgcn_fast import Tracker, cli_video, video
from lgcn_fast.cli import main
from lgcn_fast.tracking import TrackedFaces
from lgcn_fast.video import CODECS, LinesWriter, VideoReader, VideoWriter, newest


def write(path: Path, pictures: list[np.ndarray]) -> Path:
    with VideoWriter(path, FPS) as writer:
        for picture in pictures:
            writer.write(picture)
    return path


def cut(path: Path, share: float) -> Path:
    data = path.read_bytes()
    path.write_bytes(data[: int(share * len(data))])
    return path


class Camera:
    """What stands in for `cv2.VideoCapture`: gives some pictures, then nothing."""

    def __init__(self, pictures: list[np.ndarray], pause: float = 0.0) -> None:
        self.pictures, self.pause, self.released = iter(pictures), pause, False

    def isOpened(self) -> bool:
        return True

    def get(self, _: int) -> float:
        return 0.0

    def read(self) -> tuple[bool, np.ndarray | None]:
        assert not self.released
        time.sleep(self.pause)
        picture = next(self.pictures, None)
        return picture is not None, picture

    def release(self) -> None:
        self.released = True


def put_in_place(monkeypatch, camera: Camera) -> None:
    capture = cv2.VideoCapture
    monkeypatch.setattr(
        video.cv2, "VideoCapture", lambda source: camera if isinstance(source, int) else capture(source)
    )


@pytest.mark.parametrize("suffix", CODECS)
def test_what_is_written_can_be_read(tmp_path, pictures, suffix):
    path = write(tmp_path / "new" / f"clip{suffix}", pictures)
    with VideoReader(path) as reader:
        assert reader.fps == FPS
        assert not reader.live
        frames = list(reader)
    assert len(frames) == len(pictures)
    np.testing.assert_allclose([frame.time for frame in frames], np.arange(12) / FPS, atol=2e-3)
    for frame, picture in zip(frames, pictures, strict=True):
        assert frame.image.shape == picture.shape
        assert np.abs(frame.image.astype(float) - picture).mean() < 6  # RGB, not BGR


def test_odd_sizes(tmp_path, pictures):
    path = write(tmp_path / "clip.mp4", [picture[:239, :317] for picture in pictures])
    with VideoReader(path) as reader:
        frames = list(reader)
    assert len(frames) == len(pictures)
    assert all(abs(frame.image.shape[0] - 239) <= 1 and abs(frame.image.shape[1] - 317) <= 1 for frame in frames)


def test_live_frames_keep_pace(tmp_path, pictures):
    """A second at five frames/s and a burst: as long as it was."""
    with VideoWriter(tmp_path / "clip.mp4", FPS) as writer:
        for moment in (7.0, 7.2, 7.4, 7.401, 7.402, 7.6, 7.8, 8.0):
            writer.write(pictures[0], moment)
        assert writer.written == 26
        for moment in (1e5, 1e5 + 0.2):  # after a pause, which takes no time
            writer.write(pictures[0], moment)
        assert writer.written == 26 + 1 + 5


def test_variable_frame_rates_keep_pace(tmp_path, pictures, clip, monkeypatch):
    """A frame a second behind the fourth."""
    times = [0.0, 0.04, 0.08, 0.12, 1.12, 2.12]

    class Variable(VideoReader):
        def __iter__(self):
            return (frame._replace(time=time) for frame, time in zip(super().__iter__(), times, strict=False))

    monkeypatch.setattr(cli_video, "VideoReader", Variable)
    out, lines = tmp_path / "out.mp4", tmp_path / "out.jsonl"
    assert main(["video", str(clip), "--out", str(out), "--json", str(lines)]) == 0
    assert [json.loads(line)["time"] for line in lines.read_text().splitlines()] == times
    with VideoReader(out) as reader:
        assert list(reader)[-1].time == pytest.approx(times[-1])


def test_mp4_that_was_trimmed_without_encoding_is_whole(tmp_path, pictures):
    """Its edit list names fewer frames than the file holds; cut off it is still an error."""
    path = write(tmp_path / "clip.mp4", pictures)
    data = bytearray(path.read_bytes())
    at = data.index(b"elst") + 12  # version, number of entries; then the first one's duration
    duration = int.from_bytes(data[at : at + 4], "big")
    data[at : at + 4] = (duration // 3).to_bytes(4, "big")
    path.write_bytes(data)
    with VideoReader(path) as reader:
        assert reader.frame_count == 12
        assert 3 <= len(list(reader)) <= 5
    assert video._is_whole_mp4(path)
    assert not video._is_whole_mp4(cut(path, 0.9))
    assert not video._is_whole_mp4(write(tmp_path / "clip.avi", pictures))


@pytest.mark.parametrize("name", ["take:1.mp4", "-x.mp4", "über 日.mp4"])
def test_names_that_ffmpeg_would_take_for_something_else(tmp_path, pictures, name, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with VideoReader(write(Path(name), pictures)) as reader:
        assert len(list(reader)) == 12


def test_names_in_other_encodings_are_errors(tmp_path, clip, capsys):
    strange = tmp_path / os.fsdecode(b"latin-\xfc.avi")
    clip.rename(strange)
    assert main(["video", str(strange)]) == 2
    assert "expected a file name in UTF-8" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("missing.mp4", None, "missing.mp4: expected a video file, got nothing there"),
        (".", None, "expected a video file, got a directory"),
        ("text.mp4", b"no video", "text.mp4: expected a video, got another file"),
    ],
)
def test_bad_sources(tmp_path, name, content, message, capfd):
    if content:
        (tmp_path / name).write_bytes(content)
    assert main(["video", str(tmp_path / name)]) == 2
    assert message in capfd.readouterr().err


def test_video_of_somebody_who_lies(tmp_path, pictures):
    path, lines = tmp_path / "lying.avi", tmp_path / "lines.jsonl"
    write(path, [np.ascontiguousarray(np.rot90(picture)) for picture in pictures])
    for options, found in (([], 0), (["--any-angle"], 12)):
        assert main(["video", str(path), "--json", str(lines), "--model", "lgcn-nano", *options]) == 0
        assert sum(bool(json.loads(line)["faces"]) for line in lines.read_text().splitlines()) == found


def test_output_needs_a_known_suffix(tmp_path, clip, capsys):
    assert main(["video", str(clip), "--out", str(tmp_path / "out.gif")]) == 2
    assert "out.gif: expected a file name that ends in .mp4" in capsys.readouterr().err


def test_video(tmp_path, clip, capsys):
    out, lines = tmp_path / "out.mp4", tmp_path / "out.jsonl"
    outputs = ["--out", str(out), "--json", str(lines)]
    assert main(["video", str(clip), *outputs, "--finder", "lgcn-nano", "--style", "boxes", "points"]) == 0
    printed = capsys.readouterr().out
    assert "12 frames in" in printed
    assert "latency: median" in printed
    assert "12 frames, mp4v" in printed or "12 frames, avc1" in printed
    with VideoReader(out) as reader:
        assert reader.fps == FPS
        assert len(list(reader)) == 12
    records = [json.loads(line) for line in lines.read_text().splitlines()]
    assert [record["frame"] for record in records] == list(range(12))
    np.testing.assert_allclose([record["time"] for record in records], np.arange(12) / FPS, atol=1e-3)
    assert all(record["size"] == [320, 240] and record["latency_ms"] > 0 for record in records)
    for index, record in enumerate(records):
        (face,) = record["faces"]
        assert face["id"] == 0
        assert face["tracked"] == (index > 0)
        assert np.shape(face["points"]) == (68, 2)
        assert np.shape(face["scores"]) == (68,)
        assert np.shape(face["box"]) == (4,)
        assert 0.5 < face["confidence"] < 1
    with VideoReader(clip) as reader:
        expected = list(Tracker(finder="lgcn-nano").run(reader))
    np.testing.assert_allclose(
        [record["faces"][0]["points"] for record in records], [faces.points[0] for faces in expected], atol=0.02
    )


def test_file_that_ends_in_the_middle(tmp_path, clip, capfd):
    cut(clip, 0.6)
    out, lines = tmp_path / "out.mp4", tmp_path / "out.jsonl"
    assert main(["video", str(clip), "--out", str(out), "--json", str(lines)]) == 2
    assert "clip.avi: expected 12 frames, got " in capfd.readouterr().err
    count = len(lines.read_text().splitlines())
    assert 4 < count < 12
    with VideoReader(out) as reader:
        assert len(list(reader)) == count


def test_ctrl_c_leaves_finished_files(tmp_path, clip, monkeypatch, capsys):
    class Interrupted(Tracker):
        def update(self, frame, time=None):
            if time > 4.5 / FPS:
                raise KeyboardInterrupt
            return super().update(frame, time)

    monkeypatch.setattr(cli_video, "Tracker", Interrupted)
    out, lines = tmp_path / "out.mp4", tmp_path / "out.jsonl"
    assert main(["video", str(clip), "--out", str(out), "--json", str(lines)]) == 130
    assert "5 frames in" in capsys.readouterr().out
    assert len(lines.read_text().splitlines()) == 5
    with VideoReader(out) as reader:
        assert len(list(reader)) == 5


def test_output_must_not_be_the_input(clip, capsys):
    before = clip.read_bytes()
    for option in ("--out", "--json"):
        assert main(["video", str(clip), option, str(clip)]) == 2
        assert f"{option}: expected another file than the input" in capsys.readouterr().err
    assert clip.read_bytes() == before
    both = str(clip.with_name("both.mp4"))
    assert main(["video", str(clip), "--out", both, "--json", both]) == 2
    assert "--json: expected another file than --out" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP"])
def test_signals_that_end_it_leave_finished_files(tmp_path, clip, name):
    out = tmp_path / "out.avi"
    program = (
        "import os, signal, sys; from lgcn_fast import cli, cli_video; update = cli_video.Tracker.update\n"
        f"signal.signal(signal.{name}, signal.SIG_DFL)\n"  # (which `nohup` has ignored)
        "def killed(self, image, time):\n"
        f"    if time > 4.5 / 25: os.kill(os.getpid(), signal.{name})\n"
        "    return update(self, image, time)\n"
        "cli_video.Tracker.update = killed; sys.exit(cli.main(sys.argv[1:]))"
    )
    run = subprocess.run([sys.executable, "-c", program, "video", str(clip), "--out", str(out)], stdout=subprocess.PIPE)
    assert run.returncode == 130
    assert b"5 frames in" in run.stdout
    with VideoReader(out) as reader:
        assert len(list(reader)) == 5


def test_numbers_may_go_into_a_pipe(tmp_path, clip):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with ThreadPoolExecutor(1) as pool:
        received = pool.submit(pipe.read_text)
        assert main(["video", str(clip), "--json", str(pipe)]) == 0
    assert [json.loads(line)["frame"] for line in received.result().splitlines()] == list(range(12))


def test_numbers_on_standard_output_are_all_that_is_there(clip):
    program = "import sys; from lgcn_fast.cli import main; sys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-c", program, "video", str(clip), "--json", "/dev/stdout"]
    run = subprocess.run(command, capture_output=True, check=True)
    assert [json.loads(line)["frame"] for line in run.stdout.splitlines()] == list(range(12))
    assert b"12 frames in" in run.stderr


def test_numbers_follow_what_the_shell_has_written(tmp_path):
    program = "from lgcn_fast.video import LinesWriter as W\nwith W('/dev/stdout') as out: out.write({'frame': 0})"
    for mode in ("wb", "ab"):
        with (tmp_path / "all.jsonl").open(mode) as file:
            for _ in range(2):
                subprocess.run([sys.executable, "-c", program], stdout=file, check=True)
    assert (tmp_path / "all.jsonl").read_text() == '{"frame": 0}\n' * 4


def test_video_without_standard_error(tmp_path, clip, monkeypatch):
    monkeypatch.setattr(sys, "stderr", None)
    assert main(["video", str(clip), "--json", str(tmp_path / "lines.jsonl")]) == 0
    assert len((tmp_path / "lines.jsonl").read_text().splitlines()) == 12


def test_video_that_leaves_nothing_says_so(clip, capsys):
    assert main(["video", str(clip)]) == 0
    assert "lgcn-fast video: nothing is written (--out, --json) or shown (--show)" in capsys.readouterr().err


def test_a_dash_is_no_file(clip, capsys):
    assert main(["video", str(clip), "--json", "-"]) == 2
    assert "--json: expected a file (standard output is /dev/stdout), got -" in capsys.readouterr().err


@pytest.mark.parametrize("how", ["key", "closed"])
def test_the_window_ends_a_video(clip, tmp_path, monkeypatch, how):
    shown = []
    monkeypatch.setenv("DISPLAY", ":0")
    monkeypatch.setattr(cli_video.cv2, "imshow", lambda _, picture: shown.append(picture))
    monkeypatch.setattr(cli_video.cv2, "waitKey", lambda _: ord("q") if how == "key" and len(shown) == 4 else -1)
    monkeypatch.setattr(cli_video.cv2, "getWindowProperty", lambda *_: float(how == "key" or len(shown) < 4))
    monkeypatch.setattr(cli_video.cv2, "destroyAllWindows", lambda: shown.append(None))
    out, lines = tmp_path / "out.avi", tmp_path / "out.jsonl"
    assert main(["video", str(clip), "--show", "--out", str(out), "--json", str(lines)]) == 0
    assert [picture is None for picture in shown] == [False] * 4 + [True]
    assert shown[0].shape == (240, 320, 3)
    assert len(lines.read_text().splitlines()) == 4
    with VideoReader(out) as frames:
        assert len(list(frames)) == 4


def test_an_opencv_without_windows_is_named(clip, monkeypatch, capsys):
    def headless(*_):
        raise cv2.error("The function is not implemented")

    monkeypatch.setenv("DISPLAY", ":0")
    monkeypatch.setattr(cli_video.cv2, "imshow", headless)
    monkeypatch.setattr(cli_video.cv2, "destroyAllWindows", headless)
    assert main(["video", str(clip), "--show"]) == 2
    assert "--show: expected an OpenCV with windows (opencv-python, not -headless)" in capsys.readouterr().err


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere there is always a display")
def test_show_without_a_display(clip, monkeypatch, capsys):
    monkeypatch.delenv("DISPLAY", raising=False)
    assert main(["video", str(clip), "--show"]) == 2
    assert "--show: expected a display, got no $DISPLAY" in capsys.readouterr().err


def test_disk_that_gets_full(tmp_path, clip, monkeypatch, capsys):
    """Writing stops while there is room for the file's index."""
    usage, free = namedtuple("Usage", "free"), iter([1 << 40, 1 << 40, 1 << 20])
    monkeypatch.setattr(video, "CHECK_EVERY", 4)
    monkeypatch.setattr(video.shutil, "disk_usage", lambda path: usage(next(free)))
    out, lines = tmp_path / "out.mp4", tmp_path / "out.jsonl"
    assert main(["video", str(clip), "--out", str(out), "--json", str(lines)]) == 2
    captured = capsys.readouterr()
    assert "No space left on device, less than 16 MB free after 8 frames: " in captured.err
    assert "frames in" in captured.out
    with VideoReader(out) as reader:
        assert len(list(reader)) == 8


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """Writes beyond so many bytes of a file fail as on a full disk. (pytest's own, into a log, must not.)"""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_video_that_could_not_be_finished_is_an_error(tmp_path, pictures):
    """OpenCV says nothing."""
    writer = VideoWriter(tmp_path / "out.mp4", FPS)
    with largest_file(10_000):
        for picture in pictures:
            writer.write(picture)
        with pytest.raises(OSError, match=r"out\.mp4: expected 12 frames in the finished file, got 0"):
            writer.close()


def test_lines_are_whole_where_the_disk_is_full(tmp_path):
    with LinesWriter(tmp_path / "out.jsonl") as lines:
        lines.write({"frame": 0})
        with largest_file(20), pytest.raises(OSError, match=r"out\.jsonl"):
            lines.write({"frame": 1})
    assert (tmp_path / "out.jsonl").read_text() == '{"frame": 0}\n'


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full")
def test_numbers_on_a_full_disk(clip, capsys):
    assert main(["video", str(clip), "--json", "/dev/full"]) == 2
    assert "No space left on device" in capsys.readouterr().err


def test_folder_that_cannot_be_written_to(tmp_path, clip, capsys):
    (tmp_path / "file").write_text("")
    assert main(["video", str(clip), "--out", str(tmp_path / "file" / "out.mp4")]) == 2
    assert "file" in capsys.readouterr().err


def test_frames_that_change_size(tmp_path, pictures, monkeypatch, capsys):
    """The numbers are those of each frame's own pixels; the video keeps the size of its first frame."""
    tall = [cv2.resize(picture, (120, 180))[:, :, ::-1] for picture in pictures[:5]]
    put_in_place(monkeypatch, Camera([picture[:, :, ::-1] for picture in pictures[:5]] + tall, pause=0.03))
    monkeypatch.setattr(cli_video, "newest", lambda frames: iter_and_close(frames))
    out, lines = tmp_path / "out.mp4", tmp_path / "out.jsonl"
    assert main(["webcam", "--no-show", "--out", str(out), "--json", str(lines)]) == 2  # it is gone in the end
    assert "camera 0: expected another frame after 10, got none" in capsys.readouterr().err
    sizes = [json.loads(line)["size"] for line in lines.read_text().splitlines()]
    assert sizes == [[320, 240]] * 5 + [[120, 180]] * 5
    with VideoReader(out) as reader:
        images = [frame.image for frame in reader]
    assert {image.shape for image in images} == {(240, 320, 3)}
    assert images[-1][:, :70].max() < 30  # black beside the picture
    assert images[-1][:, 100:220].mean() > 30


def iter_and_close(frames):
    """A generator, which `newest` is, that drops nothing."""
    yield from frames


def test_camera_that_disappears(tmp_path, pictures, monkeypatch, capsys):
    camera = Camera([picture[:, :, ::-1] for picture in pictures], pause=0.02)
    put_in_place(monkeypatch, camera)
    out = tmp_path / "out.mp4"
    assert main(["webcam", "--index", "3", "--no-show", "--out", str(out)]) == 2
    assert "camera 3: expected another frame after 12, got none: it is gone" in capsys.readouterr().err
    assert camera.released
    with VideoReader(out) as reader:
        assert len(list(reader)) > 0


def test_camera_that_is_not_there(capfd):
    assert main(["webcam", "--index", "97", "--no-show"]) == 2
    assert "camera 97: expected a video, got nothing there" in capfd.readouterr().err


@pytest.mark.parametrize("index", [-1, 2**31])
def test_numbers_that_no_camera_has(index, capsys):
    assert main(["webcam", "--index", str(index), "--no-show"]) == 2
    assert f"camera: expected a number from 0 to 2**31 - 1, got {index}" in capsys.readouterr().err


def test_pipes_are_no_files(tmp_path, capsys):
    os.mkfifo(tmp_path / "pipe")
    assert main(["video", str(tmp_path / "pipe")]) == 2
    assert "expected a video file, got a pipe or device" in capsys.readouterr().err


@pytest.mark.parametrize("fps", [0, -1, np.nan, np.inf])
def test_frame_rates_that_are_none(tmp_path, fps):
    with pytest.raises(ValueError, match="fps: expected frames per second"):
        VideoWriter(tmp_path / "a.mp4", fps)


def test_what_is_no_frame_is_named(tmp_path, pictures):
    with VideoWriter(tmp_path / "a.mp4", 25) as writer:
        for image, message in (
            (pictures[0] / 255, r"image: expected \(H, W, 3\) uint8, got .* float64"),
            (torch.from_numpy(pictures[0]), r"image: expected an array \(H, W, 3\) uint8, got Tensor"),
        ):
            with pytest.raises(ValueError, match=message):
                writer.write(image)
        with pytest.raises(ValueError, match="time: expected seconds, got nan"):
            writer.write(pictures[0], np.nan)
        writer.write(pictures[0])
    assert writer.written == 1


def readers() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("newest")]


def test_newest_frame_wins():
    """A consumer ten times slower than the camera: it gets late frames, not old ones."""
    produced = []

    def camera():
        for index in range(60):
            time.sleep(0.005)
            produced.append(index)
            yield index

    taken, behind = [], []
    for index in newest(camera()):
        behind.append(produced[-1] - index)
        taken.append(index)
        time.sleep(0.05)
    assert taken == sorted(set(taken))
    assert taken[-1] == 59
    assert len(taken) < 20
    assert np.median(behind) <= 1
    assert not readers()


def test_newest_hands_on_what_the_source_raises():
    def camera():
        yield 1
        raise OSError("unplugged")

    taken = []
    with pytest.raises(OSError, match="unplugged"):
        taken.extend(taken.append(frame) for frame in newest(camera()))
    assert taken[:1] == [1]
    assert not readers()


def test_ctrl_c_does_not_wait_for_a_source_that_stalls(monkeypatch):
    stalls = threading.Event()

    def camera():
        yield 1
        stalls.wait(60)

    frames = newest(camera())
    assert next(frames) == 1

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(threading.Condition, "wait_for", interrupted)
    start = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        next(frames)
    assert time.monotonic() - start < 30
    stalls.set()
    for thread in readers():
        thread.join()


def test_newest_stops_its_thread_when_left_early():
    ended = []

    def camera():
        try:
            while True:
                time.sleep(0.002)
                yield 0
        finally:
            ended.append(True)

    frames = newest(source := camera())
    assert next(frames) == 0
    assert len(readers()) == 1
    frames.close()
    assert not readers()
    source.close()
    assert ended


@pytest.mark.parametrize(("last", "whole"), [(11, True), (7, False)])
def test_frames_may_be_missing_in_the_middle(clip, pictures, monkeypatch, last, whole):
    """Screen recorders leave out what does not change: 8 of 12 frames, whose time stamps tell whether all are there."""

    class Capture(Camera):
        index = -1

        def get(self, name: int) -> float:
            stamps = [*range(7), last]
            return {cv2.CAP_PROP_FPS: FPS, cv2.CAP_PROP_FRAME_COUNT: 12}.get(name, 1e3 * stamps[self.index] / FPS)

        def read(self):
            self.index += 1
            return super().read()

    monkeypatch.setattr(video.cv2, "VideoCapture", lambda _: Capture(pictures[:8]))
    frames = VideoReader(clip)
    if whole:
        assert len(list(frames)) == 8
    else:
        with pytest.raises(OSError, match="expected 12 frames, got 8: the file ends in the middle"):
            list(frames)


def test_encoders_that_refuse_leave_files_alone(tmp_path, capfd):
    before, new = tmp_path / "before.mp4", tmp_path / "new.mp4"
    before.write_bytes(b"precious")
    for path in (before, new):
        with VideoWriter(path, FPS) as writer, pytest.raises(OSError, match="could not open a video of 400 x 1 pixels"):
            writer.write(np.zeros((1, 400, 3), np.uint8))
    assert before.read_bytes() == b"precious"
    assert not new.exists()
    assert not capfd.readouterr().err


def test_a_step_back_in_time_is_a_pause(tmp_path, pictures):
    """As where a second source follows the first."""
    with VideoWriter(tmp_path / "out.avi", FPS) as writer:
        for moment in (100, 100 + 1 / FPS, 100 + 2 / FPS, 0, 1 / FPS, 4 / FPS):
            writer.write(pictures[0], moment)
        assert writer.written == 3 + 1 + 1 + 3


@pytest.mark.parametrize("order", [(0, 3, 1, 2, 6, 4, 5, 9, 7, 8), (0, 1, 2, 3, 4, 5, 6, 7, 0.5, 9)])
def test_frames_that_come_late_are_left_out(tmp_path, pictures, order):
    with VideoWriter(tmp_path / "out.avi", FPS) as writer:
        for moment in order:
            writer.write(pictures[0], moment / FPS)
        assert writer.written == 10


@pytest.mark.parametrize("suffix", CODECS)
def test_a_video_that_is_at_its_end_has_no_more_frames(tmp_path, pictures, suffix):
    with VideoReader(write(tmp_path / f"clip{suffix}", pictures)) as frames:
        assert next(iter(frames)).time == 0
        assert len(list(frames)) == len(pictures) - 1
        assert not list(frames)


@pytest.mark.parametrize("suffix", CODECS)
def test_sound_that_goes_on_is_no_damage(tmp_path, pictures, suffix):
    """Where it is longer than the pictures, most containers announce as many frames as would be as long."""
    with VideoReader(write(tmp_path / f"clip{suffix}", pictures)) as frames:
        frames.frame_count = 20
        if suffix == ".avi":  # it counts frames
            with pytest.raises(OSError, match="expected 20 frames, got 12"):
                list(frames)
        else:
            assert len(list(frames)) == len(pictures)


def test_a_video_without_a_frame_is_damaged(tmp_path, pictures, monkeypatch):
    content = bytearray(write(tmp_path / "whole.mp4", pictures).read_bytes())
    start = content.find(b"mdat") + 4
    length = int.from_bytes(content[start - 8 : start - 4], "big") - 8
    content[start : start + length] = bytes(length)
    damaged = tmp_path / "damaged.mp4"
    damaged.write_bytes(content)
    with VideoReader(damaged) as frames, pytest.raises(OSError, match="expected 12 frames, got 0"):
        list(frames)
    with VideoReader(damaged) as frames:
        monkeypatch.setattr(frames, "frame_count", None)  # as in streams that were recorded
        with pytest.raises(OSError, match="expected some frames, got 0"):
            list(frames)


def test_readers_and_writers_say_that_they_were_closed(tmp_path, pictures, monkeypatch):
    """A writer would start its file anew, OpenCV crash where a thread reads what is released."""
    put_in_place(monkeypatch, Camera(itertools.cycle(pictures), pause=0.01))
    with VideoReader(0) as frames:
        live = newest(frames)
        next(live)
    with pytest.raises(ValueError, match="expected an open reader, got one that was closed"):
        list(live)
    with VideoWriter(tmp_path / "out.avi", FPS) as writer:
        writer.write(pictures[0])
    content = writer.path.read_bytes()
    with pytest.raises(ValueError, match="expected an open writer, got one that was closed"):
        writer.write(pictures[0])
    writer.close()
    assert writer.path.read_bytes() == content


def test_a_source_that_never_ends_does_not_keep_a_program_that_failed():
    script = """
import itertools, time
from lgcn_fast.video import newest

frames = newest(time.sleep(0.01) or i for i in itertools.count())
next(frames)
raise RuntimeError("bug")
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert done.stderr.endswith("RuntimeError: bug\n")


def test_a_line_holds_milliseconds():
    parts = np.empty((0, 68, 2)), np.empty((0, 68)), np.empty(0), np.empty((0, 4)), np.empty(0), np.empty(0)
    faces = TrackedFaces(*parts, time=0.5, latency=0.0125)
    expected = {"frame": 3, "time": 0.5, "size": [9, 8], "latency_ms": 12.5, "faces": []}
    assert cli_video._record(3, video.Frame(np.zeros((8, 9, 3), np.uint8), 0.5), faces) == expected


def test_time_stamps_that_do_not_rise_are_made_up(clip, pictures, monkeypatch):
    stamps = iter([(pictures[0], time) for time in (0.0, 0.0, -5.0, 0.5, 0.4)])
    with VideoReader(clip) as reader:
        reader.frame_count = None
        monkeypatch.setattr(reader, "_read", lambda: next(stamps, (None, 0)))
        assert [frame.time for frame in reader] == pytest.approx([0, 0.04, 0.08, 0.5, 0.54])
