"""The commands for moving pictures: `lgcn-fast video | webcam`."""

import argparse
import os
import sys
import time
from array import array
from collections.abc import Iterable
from contextlib import ExitStack, closing, suppress
from pathlib import Path
from typing import TextIO

import cv2
import numpy as np
from tqdm import tqdm

from .cli_photos import add_engine_options, add_finder_option, add_model_options, add_style_option, as_json
from .cli_training import add_command
from .drawing import draw, write_text
from .files import same_file
from .loading import engine_for
from .tracking import TrackedFaces, Tracker
from .video import STANDARD_OUTPUT, Frame, LinesWriter, VideoReader, VideoWriter, newest

WINDOW = "lgcn-fast"
QUIT_KEYS = (27, ord("q"))


def add_video(commands) -> None:
    parser = add_command(commands, _run_video, "Landmarks of the faces in a video, drawn and as numbers.")
    parser.add_argument("file", metavar="IN", help="a video file, or the address of a stream")
    parser.add_argument("--show", action="store_true", help="in a window, too; q or Esc stops")
    _add_options(parser)


def add_webcam(commands) -> None:
    text = "Landmarks of the faces before a camera, in a window; q, Esc or Ctrl-C stops."
    parser = add_command(commands, _run_webcam, text)
    parser.add_argument("--index", type=int, default=0, help="number of the camera (default: 0)")
    parser.add_argument("--show", action=argparse.BooleanOptionalAction, default=True, help="the window")
    _add_options(parser)


def _add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", type=Path, help="write the pictures: .mp4, .mov, .webm, .mkv or .avi")
    parser.add_argument("--json", type=Path, help="write the numbers, a line of JSON for each frame")
    add_style_option(parser)
    add_model_options(parser)
    add_finder_option(parser)
    text = "all of the frame is searched for new faces once in so many frames (default: 30)"
    parser.add_argument("--detect-every", type=int, default=30, metavar="FRAMES", help=text)
    text = "find new faces however they are turned; each search takes longer"
    parser.add_argument("--any-angle", action="store_true", help=text)
    text = "smallest face box to look for; default: 15 %% of the frame's shorter side, at least 40"
    parser.add_argument("--min-face", type=float, metavar="PIXELS", help=text)
    parser.add_argument("--smoothing", type=float, default=1.0, help="strength of the filter, 0: off (default: 1)")
    text = "of the network (default: 1); OpenCV has others to decode and encode"
    parser.add_argument("--threads", type=int, default=1, help=text)
    add_engine_options(parser)


def _run_video(options: argparse.Namespace) -> int:
    with VideoReader(options.file) as reader:
        if reader.live:
            with closing(newest(reader)) as frames:
                return _process(options, reader, frames)
        return _process(options, reader, reader)


def _run_webcam(options: argparse.Namespace) -> int:
    with VideoReader(options.index) as reader, closing(newest(reader)) as frames:
        _process(options, reader, frames)
    return 0  # Ctrl-C is how one leaves


def _process(options: argparse.Namespace, reader: VideoReader, frames: Iterable[Frame]) -> int:
    """Track, draw and write all frames; the outputs are finished whatever happens.

    Returns:
        The exit code: 0, or 130 after Ctrl-C.
    """
    _check_options(options)
    engine = engine_for(options.model, options.device, options.precision, options.threads)
    tracker = Tracker(
        engine,
        options.detect_every,
        options.min_face,
        smoothing=options.smoothing,
        finder=options.finder,
        shape=options.shape,
        any_angle=options.any_angle,
    )
    latencies, start, code = array("d"), time.perf_counter(), 0
    # Behind numbers that go into a pipe nothing else may stand.
    text = sys.stderr if options.json and same_file(options.json, STANDARD_OUTPUT) else sys.stdout
    try:
        with ExitStack() as outputs:
            writer = outputs.enter_context(VideoWriter(options.out, reader.fps)) if options.out else None
            lines = outputs.enter_context(LinesWriter(options.json)) if options.json else None
            if options.show:
                outputs.callback(_close_windows)
            no_bar = True if sys.stderr is None else None  # None: not on a terminal
            bar = outputs.enter_context(tqdm(frames, total=reader.frame_count, unit=" frames", disable=no_bar))
            try:
                for frame in bar:
                    faces = tracker.update(*frame)
                    latencies.append(1e3 * faces.latency)
                    bar.set_postfix_str(f"{latencies[-1]:.1f} ms, {len(faces)} faces", refresh=False)
                    if lines:
                        lines.write(_record(len(latencies) - 1, frame, faces))
                    if writer or options.show:
                        picture = draw(frame.image, faces, options.style, tracker.engine)
                    if writer:
                        writer.write(picture, frame.time)
                    if options.show and not _shown(picture, faces.latency):
                        break
            except KeyboardInterrupt:
                code = 130
    finally:
        _summarise(latencies, time.perf_counter() - start, text)
    if writer and writer.written:
        scaled = f", {writer.scaled} of another size scaled into the first one's" if writer.scaled else ""
        print(f"{options.out}: {writer.written} frames, {writer.codec}{scaled}", file=text)
    if lines:
        print(f"{options.json}: {len(latencies)} lines", file=text)
    return code


def _close_windows() -> None:
    with suppress(cv2.error):  # an OpenCV without windows has none to close
        cv2.destroyAllWindows()


def _check_options(options: argparse.Namespace) -> None:
    source = getattr(options, "file", None)
    for name in ("out", "json"):
        path = getattr(options, name)
        if path and source and same_file(path, source):
            raise ValueError(f"--{name}: expected another file than the input, got {path}")
    if str(options.json) == "-":
        raise ValueError("--json: expected a file (standard output is /dev/stdout), got -")
    if options.out and options.json and options.out.absolute() == options.json.absolute():
        raise ValueError(f"--json: expected another file than --out, got {options.json}")
    if not (options.out or options.json or options.show):
        print(f"lgcn-fast {options.command}: nothing is written (--out, --json) or shown (--show)", file=sys.stderr)
    # Qt would end the process.
    if options.show and sys.platform == "linux" and not os.environ.get("DISPLAY"):
        raise ValueError(
            "--show: expected a display, got no $DISPLAY (write --out or --json instead; webcam: --no-show)"
        )


def _record(index: int, frame: Frame, faces: TrackedFaces) -> dict:
    """A line of JSON."""
    height, width = frame.image.shape[:2]
    columns = zip(faces.ids.tolist(), faces.tracked.tolist(), as_json(faces), strict=True)
    return {
        "frame": index,
        "time": round(frame.time, 6),
        "size": [width, height],
        "latency_ms": round(1e3 * faces.latency, 3),
        "faces": [{"id": identity, "tracked": tracked, **face} for identity, tracked, face in columns],
    }


def _shown(picture: np.ndarray, latency: float) -> bool:
    """Show a picture, and how many seconds it took; False where the user has had enough."""
    write_text(picture, f"{1e3 * latency:.1f} ms", (6, 18))
    try:
        cv2.imshow(WINDOW, cv2.cvtColor(picture, cv2.COLOR_RGB2BGR))
        key = cv2.waitKey(1) & 0xFF
        return key not in QUIT_KEYS and cv2.getWindowProperty(WINDOW, cv2.WND_PROP_VISIBLE) >= 1
    except cv2.error as error:
        raise ValueError(f"--show: expected an OpenCV with windows (opencv-python, not -headless): {error}") from None


def _summarise(latencies: array, seconds: float, text: TextIO | None) -> None:
    if not latencies:
        return
    median, late, worst = np.quantile(latencies, (0.5, 0.99, 1))
    speed = f"{len(latencies)} frames in {seconds:.1f} s: {len(latencies) / seconds:.0f} frames/s"
    print(f"{speed}; latency: median {median:.1f} ms, 99 % {late:.1f} ms, worst {worst:.1f} ms", file=text)
