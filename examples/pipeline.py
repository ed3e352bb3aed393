"""A live pipeline of two threads: a camera that does not wait, a consumer that may be slow, no growing queue between.

`newest` is the queue: a thread of its own reads the camera as fast as it delivers and keeps one frame, the newest; the
consumer, this thread, takes that one when it is ready, and what came in between is dropped. So how old the landmarks
are does not depend on how slow the consumer is (`--work` makes it slower). The camera here is a file that is played at
its own pace; in your program put `VideoReader(0)` in its place.

    python examples/pipeline.py clip.mp4 --work 100
"""

import argparse
import time as clock
from collections.abc import Iterator
from contextlib import closing

import numpy as np

import lgcn_fast
from lgcn_fast.video import Frame, VideoReader, newest


class FileAsCamera:
    """Delivers the frames of a file when a camera would, each with the clock's time, whether or not anyone is ready."""

    def __init__(self, reader: VideoReader) -> None:
        self.delivered = 0
        self._reader = reader

    def __iter__(self) -> Iterator[Frame]:
        start = clock.perf_counter()
        for image, time in self._reader:
            clock.sleep(max(start + time - clock.perf_counter(), 0))
            self.delivered += 1
            yield Frame(image, clock.perf_counter())


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", metavar="VIDEO")
    parser.add_argument("--work", type=float, default=0, metavar="MS", help="what else the consumer does with a frame")
    options = parser.parse_args(arguments)

    tracker = lgcn_fast.Tracker()
    ages, seen = [], 0
    # (`closing` ends the camera's thread, however the loop ends.)
    with VideoReader(options.file) as reader, closing(newest(camera := FileAsCamera(reader))) as frames:
        for image, time in frames:
            faces = tracker.update(image, time)
            ages.append(1e3 * (clock.perf_counter() - time))
            seen += len(faces) > 0
            clock.sleep(options.work / 1e3)
    if not ages:
        raise SystemExit(f"{options.file}: no frames")
    dropped = camera.delivered - len(ages)
    print(f"{camera.delivered} frames delivered, {len(ages)} consumed, {dropped} dropped; a face in {seen} of them")
    print(f"from the camera to landmarks: median {np.median(ages):.1f} ms, worst {max(ages):.1f} ms")


if __name__ == "__main__":
    main()
