"""Landmarks of anything that FFmpeg decodes: hardware decoders, network streams, formats that OpenCV lacks.

Frames come from PyAV where it is installed (`pip install av`), otherwise from the standard output of an `ffmpeg`
process, as raw RGB pictures with a header each (PPM), at a constant rate. `--source` insists on one of the two. The
numbers go to standard output, a line of JSON for each frame.

    python examples/ffmpeg_pipe.py rtsp://camera/stream > landmarks.jsonl
"""

import argparse
import json
import shutil
import subprocess
from collections.abc import Iterator
from importlib.util import find_spec

import numpy as np

import lgcn_fast
from lgcn_fast.video import Frame


def frames_of_pyav(address: str) -> Iterator[Frame]:
    """Frames with the time stamps of the stream. (Cameras that note their orientation: PyAV does not turn pictures.)"""
    import av

    with av.open(address) as container:
        step, last = 1 / float(container.streams.video[0].average_rate or 25), -1.0
        for frame in container.decode(video=0):
            # Raw streams have no time stamps, others may lack some.
            rises = frame.time is not None and frame.time > last
            last = frame.time if rises else max(last + step, 0.0)
            yield Frame(frame.to_ndarray(format="rgb24"), last)


def frames_of_ffmpeg(address: str, fps: float) -> Iterator[Frame]:
    """Frames of an `ffmpeg` process, `fps` in a second: it repeats or leaves out frames where the stream has others."""
    output = ["-vf", f"fps={fps:g}", "-pix_fmt", "rgb24", "-c:v", "ppm", "-f", "image2pipe", "-"]
    command = ["ffmpeg", "-nostdin", "-loglevel", "error", "-i", address, *output]
    index = 0
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:  # when it is left, ffmpeg's pipe breaks: it ends
        while process.stdout.readline() == b"P6\n":
            width, height = map(int, process.stdout.readline().split())
            process.stdout.readline()  # the largest value, 255
            pixels = process.stdout.read(3 * width * height)
            if len(pixels) < 3 * width * height:
                break
            yield Frame(np.frombuffer(pixels, np.uint8).reshape(height, width, 3), index / fps)
            index += 1
    if process.returncode:
        raise SystemExit(f"{address}: ffmpeg stopped with exit code {process.returncode} after {index} frames")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("address", metavar="VIDEO", help="a file or address that FFmpeg understands")
    parser.add_argument("--source", choices=["av", "ffmpeg"], help="default: av, where it is installed")
    parser.add_argument("--fps", type=float, default=25, help="of the ffmpeg process")
    options = parser.parse_args(arguments)

    there = [name for name, found in (("av", find_spec("av")), ("ffmpeg", shutil.which("ffmpeg"))) if found]
    source = options.source or next(iter(there), None)
    if source not in there:
        remedy = "`pip install av`, or install ffmpeg and have it in your PATH"
        raise SystemExit(f"expected {source or 'PyAV or the program ffmpeg'}, got none ({remedy})")
    frames = frames_of_pyav(options.address) if source == "av" else frames_of_ffmpeg(options.address, options.fps)
    for index, faces in enumerate(lgcn_fast.Tracker().run(frames)):
        points = {str(i): face.round(2).tolist() for i, face in zip(faces.ids, faces.points.astype(float), strict=True)}
        print(json.dumps({"frame": index, "time": round(faces.time, 6), "points": points}))


if __name__ == "__main__":
    main()
