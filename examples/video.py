"""Faces followed through a video file with `Tracker`, steady points as lines of JSON.

Every frame is processed, and each has a line: its number, its time stamp, and of each face the identity, whether it was
tracked or detected in this frame, and the smoothed points. `--smoothing 0` gives them as the network sees them.

    python examples/video.py clip.mp4 --out landmarks.jsonl
"""

import argparse
from pathlib import Path

import lgcn_fast
from lgcn_fast.tracking import TrackedFaces
from lgcn_fast.video import LinesWriter, VideoReader


def record(index: int, faces: TrackedFaces) -> dict:
    """A frame as a line of JSON."""
    columns = zip(faces.ids.tolist(), faces.tracked.tolist(), faces.points.astype(float).round(2).tolist(), strict=True)
    people = [{"id": identity, "tracked": tracked, "points": points} for identity, tracked, points in columns]
    return {"frame": index, "time": round(faces.time, 6), "faces": people}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", metavar="VIDEO")
    parser.add_argument("--out", type=Path, required=True, help="the .jsonl file to write")
    parser.add_argument("--smoothing", type=float, default=1.0, help="2 is steadier, 0.5 quicker, 0 off")
    options = parser.parse_args(arguments)

    tracker = lgcn_fast.Tracker(smoothing=options.smoothing)  # one for each video
    frames, people = 0, set()
    with VideoReader(options.file) as reader, LinesWriter(options.out) as lines:
        for frames, faces in enumerate(tracker.run(reader), start=1):
            lines.write(record(frames - 1, faces))
            people.update(faces.ids.tolist())
    print(f"{options.out}: {frames} frames, {len(people)} faces")


if __name__ == "__main__":
    main()
