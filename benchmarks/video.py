"""The tracker on the clips of the workplace: frames/s from file to file, faces held, jitter, lag, latency and memory.

The clips are looked for in $LGCN_DATA or ../shared/data. Contact sheets are written, too: look at them.
"""

import itertools
import os
import tempfile
import time
from pathlib import Path

import cv2
import numpy as np
from timing import run

from lgcn_fast import Engine, Tracker, draw
from lgcn_fast.drawing import contact_sheet
from lgcn_fast.images import write_image
from lgcn_fast.shipped import default_model
from lgcn_fast.video import Frame, VideoReader, VideoWriter

FOLDER = Path(os.environ.get("LGCN_DATA", "../shared/data")) / "video"
VISIBLE = {"cap13_edit2": [range(765)], "short_hamilton_clip": [range(20), range(82, 211)]}
"""Frames with a face that is not in profile, as a person saw them; the rest of the second clip shows profiles."""
STILL = 300
"""A frame of the first clip in which the face, 108 pixels a side, looks into the camera."""
FPS = 30.0
NEVER = 10**9
UPDATES = 10_000
TILES = 30
WARM_UP = 20


def main() -> dict:
    engines = {f"threads={threads}": Engine(default_model("cpu"), "cpu", num_threads=threads) for threads in (2, 1)}
    results: dict = {"clips": {}}
    # (Not beside the results: faces of the workplace do not go into the repository.)
    sheets = Path(tempfile.mkdtemp(prefix="lgcn-fast-sheets-"))
    print(f"contact sheets: {sheets}")
    digits = {"frames_per_second": 0, "cpu_seconds": 1, "held": 3, "median_ms": 2, "p99_ms": 1, "worst_ms": 1}
    print(f"{'':<34}{''.join(f'{name:>18}' for name in digits)}")
    for name, visible in VISIBLE.items():
        for threads, engine in engines.items():
            row = results["clips"][f"{name}, {threads}"] = clip(name, visible, engine, sheets)
            print(f"{f'{name}, {threads}':<34}{''.join(f'{row[key]:>18.{places}f}' for key, places in digits.items())}")
    engine = engines["threads=1"]
    results["jitter"] = {f"noise {noise}": jitter(engine, noise) for noise in (3, 6, 12)}
    for name, row in results["jitter"].items():
        print(f"jitter, {name}: {row['unsmoothed_px']:.3f} px, smoothed {row['smoothed_px']:.3f}: {row['ratio']:.2f}")
    results["lag"] = {f"{speed} px/frame": lag(engine, speed) for speed in (0.5, 1, 3, 8)}
    for name, row in results["lag"].items():
        print(f"lag on a pan, {name}: {row['steady_frames']:.2f} frames, largest {row['largest_frames']:.2f}")
    results["updates"] = row = updates(engine)
    print(f"{UPDATES} updates: {', '.join(f'{key} {value:.2f}' for key, value in row.items())}")
    return results


def quantiles(latencies: list[float]) -> dict[str, float]:
    return dict(zip(("median_ms", "p99_ms", "worst_ms"), np.quantile(latencies, (0.5, 0.99, 1)), strict=True))


def clip(name: str, visible: list[range], engine: Engine, sheets: Path) -> dict:
    """A file decoded, tracked, drawn and encoded."""
    tracker, found, latencies, tiles = Tracker(engine), [], [], []
    with tempfile.TemporaryDirectory() as folder, VideoReader(FOLDER / f"{name}.mp4") as reader:
        start, cpu = time.perf_counter(), time.process_time()
        with VideoWriter(Path(folder) / "out.mp4", reader.fps) as writer:
            for image, stamp in reader:
                faces = tracker.update(image, stamp)
                picture = draw(image, faces, ("boxes", "lines", "points"))
                writer.write(picture)
                if len(found) % (reader.frame_count // TILES) == 0:
                    tiles.append((len(found), picture))
                found.append(len(faces) > 0)
                latencies.append(1e3 * faces.latency)
        seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
    sheet = contact_sheet([tile for _, tile in tiles], [f"frame {index}" for index, _ in tiles], 6)
    write_image(sheets / f"{name}.png", sheet)
    held = np.mean([found[index] for frames in visible for index in frames])
    return {"frames_per_second": len(found) / seconds, "cpu_seconds": cpu, "held": held, **quantiles(latencies)}


def still() -> np.ndarray:
    with VideoReader(FOLDER / "cap13_edit2.mp4") as reader:
        return next(itertools.islice(reader, STILL, None)).image


def tracked_points(engine: Engine, frames: list[np.ndarray], smoothing: float | None) -> np.ndarray:
    """(T, N, 2) of the one face in the frames."""
    tracker = Tracker(engine, detect_every=NEVER, smoothing=smoothing)
    found = list(tracker.run(Frame(frame, index / FPS) for index, frame in enumerate(frames)))
    assert all(faces.ids.tolist() == [0] for faces in found)
    return np.array([faces.points[0] for faces in found])


def noisy(image: np.ndarray, deviation: float, random: np.random.Generator) -> np.ndarray:
    return np.clip(image + random.normal(0, deviation, image.shape), 0, 255).astype(np.uint8)


def jitter(engine: Engine, noise: float, frames: int = 150) -> dict[str, float]:
    """Mean movement of the points from frame to frame on a still face with sensor noise (grey levels), pixels."""
    random, image = np.random.default_rng(0), still()
    video = [noisy(image, noise, random) for _ in range(frames)]

    def movement(smoothing: float | None) -> float:
        moved = np.diff(tracked_points(engine, video, smoothing)[WARM_UP:], axis=0)
        return float(np.linalg.norm(moved, axis=-1).mean())

    before, after = movement(None), movement(1.0)
    return {"unsmoothed_px": before, "smoothed_px": after, "ratio": after / before}


def lag(engine: Engine, speed: float, frames: int = 40, starts: int = 10) -> dict[str, float]:
    """How far the smoothed points are behind on a face that moves to the right, from rest: frames."""
    random, image = np.random.default_rng(0), still()
    moved = np.maximum(np.arange(frames) - starts, 0) * speed
    size = image.shape[1::-1]
    video = [cv2.warpAffine(image, np.float32([[1, 0, x], [0, 1, 0]]), size, borderMode=cv2.BORDER_REPLICATE)
             for x in moved - moved[-1] / 2]  # fmt: skip
    video = [noisy(frame, 3, random) for frame in video]
    points = tracked_points(engine, video, 1.0)[..., 0].mean(axis=1)
    # Against the truth, whose constant offset is that of the frames at rest.
    behind = (moved - (points - points[:starts].mean())) / speed
    return {"steady_frames": float(behind[-10:].mean()), "largest_frames": float(behind[starts + 1 :].max())}


def updates(engine: Engine) -> dict:
    """Latencies of many updates, and the memory of the process after a tenth of them and at the end."""
    with VideoReader(FOLDER / "cap13_edit2.mp4") as reader:
        images = [image for image, _ in itertools.islice(reader, 300)]
    forth_and_back = itertools.cycle([*images, *images[::-1]])
    tracker, latencies, memory = Tracker(engine), [], []
    for index, image in enumerate(itertools.islice(forth_and_back, UPDATES)):
        latencies.append(1e3 * tracker.update(image, index / FPS).latency)
        if index in (UPDATES // 10, UPDATES - 1):
            memory.append(resident_mb())
    return {**quantiles(latencies), "memory_after_1000_mb": memory[0], "memory_mb": memory[1]}


def resident_mb() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096 / 2**20


if __name__ == "__main__":
    run(main)
