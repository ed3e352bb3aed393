"""Videos through OpenCV: frames with time stamps out of files and cameras, pictures and numbers into files.

A file is finished properly whatever happens, so that what was written so far can be read.
"""

import atexit
import errno
import json
import os
import shutil
import sys
import threading
import time as clock
from collections import deque
from collections.abc import Iterable, Iterator
from io import FileIO
from numbers import Integral
from pathlib import Path
from typing import NamedTuple, Self

import cv2
import numpy as np

from .files import same_file
from .images import check_picture, silent_opencv, what_else_is

STANDARD_OUTPUT = 1
"""Its file descriptor."""
DEFAULT_FPS = 30.0
"""Where a source does not say."""
MOST_FPS = 1000
"""Frame rates from here on are none."""
MISSING = 0.01
"""Share of its frames that a file may lack: some containers only say how long they are."""
CODECS = {
    ".mp4": ("mp4v",) if sys.platform == "linux" else ("avc1", "mp4v"),
    ".mov": ("mp4v",) if sys.platform == "linux" else ("avc1", "mp4v"),
    ".webm": ("VP80",),
    ".mkv": ("VP80",),
    ".avi": ("MJPG",),
}
"""What is tried for each kind of file. OpenCV's wheels for Linux have no encoder for H.264 (avc1), others may use the
system's; MPEG-4 (mp4v) plays in players but not in browsers, VP8 in browsers, too. VP9 takes five times as long."""
RESERVE = 16 << 20
"""Bytes left free on the disk: OpenCV does not say that a write failed, and a file needs its index to be readable."""
CHECK_EVERY = 16
"""Frames from one look at the disk to the next."""
LONGEST_PAUSE = 10.0
"""Seconds from a frame to the next: more is a fault of the time stamps, or somebody has stopped the recording."""
LONGEST_STEP_BACK = 1.0
"""Seconds: frames may come in another order than they were taken; more, and another recording has begun."""


class Frame(NamedTuple):
    """One picture of a video."""

    image: np.ndarray
    """(H, W, 3) uint8 RGB."""
    time: float
    """Time stamp, seconds."""


class VideoReader:
    """The frames of a file, a stream or a camera, in order, none dropped; to be iterated once.

    >>> with VideoReader("clip.mp4") as frames:
    ...     for image, time in frames: ...
    """

    def __init__(self, source: Path | str | int) -> None:
        """Open a source.

        Args:
            source: a file; the address of a stream, with "://"; or the number of a camera.

        Raises:
            ValueError: nothing there, or no video.
        """
        is_camera = isinstance(source, Integral)
        if is_camera and not 0 <= source < 2**31:  # on others OpenCV crashes
            raise ValueError(f"camera: expected a number from 0 to 2**31 - 1, got {source}")
        self._name = f"camera {source}" if is_camera else str(source)
        remote = is_camera or "://" in str(source)
        if not remote and not Path(source).is_file():
            raise ValueError(f"{source}: expected a video file, got {what_else_is(Path(source))}")
        address = int(source) if is_camera else str(source) if remote else _opencv_name(Path(source))
        with silent_opencv():
            self._capture = cv2.VideoCapture(address)
        if not self._capture.isOpened():
            raise ValueError(f"{self._name}: expected a video, got {'nothing there' if remote else 'another file'}")
        fps = self._capture.get(cv2.CAP_PROP_FPS)
        self.fps = fps if 0 < fps < MOST_FPS else DEFAULT_FPS
        count = self._capture.get(cv2.CAP_PROP_FRAME_COUNT)
        self.frame_count = int(count) if count > 0 and not is_camera else None
        self.live = remote and not self.frame_count
        self._path = None if remote else Path(source)
        self._lock, self._closed = threading.Lock(), False
        self._count, self._last = 0, -1.0  # frames that were read, and the time of the last

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        with self._lock:  # OpenCV crashes where another thread, that of `newest`, reads meanwhile
            self._closed = True
            self._capture.release()

    def _read(self) -> tuple[np.ndarray | None, float]:
        """The next picture (BGR), None behind the last, and its time stamp, seconds."""
        with self._lock:
            if self._closed:
                raise ValueError(f"{self._name}: expected an open reader, got one that was closed")
            there, image = self._capture.read()
            return (image, self._capture.get(cv2.CAP_PROP_POS_MSEC) / 1e3) if there else (None, 0.0)

    def __iter__(self) -> Iterator[Frame]:
        """The frames. Time stamps are the file's (made up from the frame rate where they do not rise), or of the clock.

        Raises:
            OSError: the file ends in the middle, or the camera is gone: after all frames that there were.
            ValueError: it was closed.
        """
        while True:
            image, stamp = self._read()
            if image is None:
                break
            time = clock.perf_counter() if self.live else stamp if stamp > self._last else self._last + 1 / self.fps
            self._count, self._last = self._count + 1, max(time, 0.0)
            yield Frame(cv2.cvtColor(image, cv2.COLOR_BGR2RGB), self._last)
        count = self._count
        if self.live:
            raise OSError(f"{self._name}: expected another frame after {count}, got none: it is gone")
        # (Some containers say how long they are, not how many frames that makes, or how long their sound is.)
        expected = (1 - MISSING) * (self.frame_count or 0) - 1
        short = max(count, self._last * self.fps + 1) < expected and (not self._path or _is_cut(self._path))
        if short or not count:
            expected = self.frame_count or "some"
            raise OSError(f"{self._name}: expected {expected} frames, got {count}: the file ends in the middle")


def _opencv_name(path: Path) -> str:
    """What OpenCV takes for a file: of a name like `take:1.mp4` alone FFmpeg thinks that it starts with a protocol.

    Raises:
        ValueError: a name that is no UTF-8, on which OpenCV crashes.
    """
    name = str(path.absolute())
    try:
        name.encode()
    except UnicodeEncodeError:
        raise ValueError(f"{path!r}: expected a file name in UTF-8, got another encoding; rename it") from None
    return name


def _is_cut(path: Path) -> bool:
    """Whether a file that gives fewer frames than it announces was cut off, as far as its container tells: AVI counts
    the frames themselves, MP4 and Matroska say how many bytes they have, others nothing."""
    with path.open("rb") as file:
        start, size = file.read(4096), os.fstat(file.fileno()).st_size
    if start[4:8] == b"ftyp":
        return not _is_whole_mp4(path)
    segment = start.find(b"\x18\x53\x80\x67") + 4  # what holds all else of a Matroska file
    if start.startswith(b"\x1a\x45\xdf\xa3") and 4 <= segment < len(start):
        length = 9 - start[segment].bit_length()  # of the number that follows, whose highest bit says how long it is
        announced = int.from_bytes(start[segment : segment + length], "big") - (1 << 7 * length)
        unknown = announced == (1 << 7 * length) - 1
        return not unknown and segment + length + announced > size
    return start.startswith(b"RIFF")


def _is_whole_mp4(path: Path) -> bool:
    """Whether a file consists of the boxes of an MP4 or MOV, the last of them complete. Such a file may have fewer
    frames than it holds: editors that cut without encoding only note which frames are to be shown."""
    with path.open("rb") as file:
        size, at = os.fstat(file.fileno()).st_size, 0
        while at < size:
            file.seek(at)
            header = file.read(16)
            if len(header) < 8 or (at == 0 and header[4:8] != b"ftyp"):
                return False
            length = int.from_bytes(header[:4], "big")
            if length == 1:  # more than 4 GB
                length = int.from_bytes(header[8:], "big")
            elif length == 0:  # to the end
                return True
            if length < 8:
                return False
            at += length
    return at == size


def newest(frames: Iterable) -> Iterator:
    """The newest frame of a live source each time that one is asked for; those that came in between are dropped.

    A thread reads the source as fast as it delivers and keeps one frame. It ends with the iteration (leave it early
    with `close`, which waits for the source's next frame; Ctrl-C while a frame is awaited is raised at once, but the
    program ends when the source delivers: one that stalls may take half a minute). What the source raises is raised
    here, after its last frame.

    Args:
        frames: a live source, as `VideoReader`; it is read in another thread.
    """
    slot: deque = deque(maxlen=1)
    changed, stop, ended = threading.Condition(), threading.Event(), threading.Event()
    errors: list[BaseException] = []

    def read() -> None:
        try:
            for frame in frames:
                if stop.is_set():
                    break
                with changed:
                    slot.append(frame)
                    changed.notify()
        except BaseException as error:  # whatever it is: it is raised below
            errors.append(error)
        finally:
            with changed:
                ended.set()
                changed.notify()

    def finish() -> None:
        stop.set()
        thread.join()

    # (A daemon: for others the interpreter waits before it closes iterators that somebody still holds.)
    thread = threading.Thread(target=read, name="newest", daemon=True)
    thread.start()
    atexit.register(finish)
    try:
        while True:
            with changed:
                changed.wait_for(lambda: slot or ended.is_set())
                if not slot:
                    break
                frame = slot.pop()
            yield frame
    except KeyboardInterrupt:
        stop.set()
        raise
    finally:
        if not stop.is_set():
            finish()
            atexit.unregister(finish)
    if errors:
        raise errors[0]


class VideoWriter:
    """Writes frames into a video file, which is opened with the first and finished by `close`.

    Frames of another size than the first are scaled into it, with black borders: `scaled` counts them. Of an odd number
    of rows or columns encoders leave out the last one.
    """

    def __init__(self, path: Path | str, fps: float) -> None:
        """
        Args:
            path: its suffix says what kind of file, see `CODECS`.
            fps: frames per second, less than 1000.

        Raises:
            ValueError: another suffix, or no such number.
        """
        if not 0 < fps < MOST_FPS:
            raise ValueError(f"fps: expected frames per second, above 0 and below {MOST_FPS}, got {fps}")
        self.path, self.fps = Path(path), fps
        if self.path.suffix.lower() not in CODECS:
            raise ValueError(f"{path}: expected a file name that ends in {', '.join(CODECS)}")
        self.codec = ""
        self.written = self.scaled = 0
        self._writer: cv2.VideoWriter | None = None
        self._start = self._last = 0.0
        self._closed = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def write(self, image: np.ndarray, time: float | None = None) -> None:
        """Append a frame.

        Args:
            image: (H, W, 3) uint8 RGB.
            time: its time stamp, seconds: the frame is repeated, or left out, so that the video keeps pace with it. (A
                pause of more than ten seconds counts as one frame, and so does a step back of more than one: another
                source may follow.) Without it, each frame is written once.

        Raises:
            OSError: the file cannot be opened, or the disk is (almost) full.
            ValueError: it was closed, another image, or a time that is not finite.
        """
        if self._closed:
            raise ValueError(f"{self.path}: expected an open writer, got one that was closed")
        check_picture(image)
        if time is not None and not np.isfinite(time):
            raise ValueError(f"time: expected seconds, got {time}")
        if self._writer is None:
            self._open(image.shape[1], image.shape[0])
            self._start = self._last = time or 0.0
        if image.shape[1::-1] != self._size:
            image = _scaled_into(image, self._size)
            self.scaled += 1
        copies = 1
        if time is not None:
            if -LONGEST_STEP_BACK <= time - self._last <= LONGEST_PAUSE:
                self._last = max(self._last, time)
            else:
                self._start += time - self._last - 1 / self.fps
                self._last = time
            copies = round((time - self._start) * self.fps) + 1 - self.written
        picture = cv2.cvtColor(image, cv2.COLOR_RGB2BGR)
        for _ in range(copies):
            if self.written % CHECK_EVERY == 0 and shutil.disk_usage(self.path.parent).free < RESERVE:
                free = f"less than {RESERVE >> 20} MB free after {self.written} frames"
                raise OSError(errno.ENOSPC, f"{os.strerror(errno.ENOSPC)}, {free}", str(self.path))
            self._writer.write(picture)
            self.written += 1

    def _open(self, width: int, height: int) -> None:
        name = _opencv_name(self.path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        new = not self.path.exists()
        self.path.open("ab").close()  # which says what is wrong where OpenCV does not
        for codec in CODECS[self.path.suffix.lower()]:
            with silent_opencv():
                writer = cv2.VideoWriter(name, cv2.VideoWriter.fourcc(*codec), self.fps, (width, height))
            if writer.isOpened():
                self._writer, self._size, self.codec = writer, (width, height), codec
                return
        if new:
            self.path.unlink(missing_ok=True)
        what = f"a video of {width} x {height} pixels, {self.fps:g} frames/s"
        raise OSError(f"{self.path}: OpenCV could not open {what} there")

    def close(self) -> None:
        """Finish the file.

        Raises:
            OSError: it cannot be read back: some write failed.
        """
        self._closed = True
        if self._writer is None:
            return
        self._writer.release()
        self._writer = None
        try:
            with VideoReader(self.path) as written:
                count = written.frame_count or 0
        except ValueError:
            count = 0
        if count < (1 - MISSING) * self.written - 1:
            got = f"{count} (is the disk full?)"
            raise OSError(f"{self.path}: expected {self.written} frames in the finished file, got {got}")


def _scaled_into(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """An image in another size (width, height), as large as it fits, black around it."""
    scale = min(size[0] / image.shape[1], size[1] / image.shape[0])
    inner = max(round(image.shape[1] * scale), 1), max(round(image.shape[0] * scale), 1)
    picture = np.zeros((size[1], size[0], 3), np.uint8)
    x, y = (size[0] - inner[0]) // 2, (size[1] - inner[1]) // 2
    interpolation = cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR
    picture[y : y + inner[1], x : x + inner[0]] = cv2.resize(image, inner, interpolation=interpolation)
    return picture


class LinesWriter:
    """Writes records as lines of JSON, each at once and whole or, where the disk is full, not at all."""

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        # (Opened anew, what the shell has sent there would be gone.)
        standard = same_file(self.path, STANDARD_OUTPUT)
        self._file = FileIO(os.dup(STANDARD_OUTPUT) if standard else self.path, "w")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def write(self, record: dict) -> None:
        """Append a line.

        Raises:
            OSError: it could not be written.
        """
        line = (json.dumps(record) + "\n").encode()
        written = self._file.write(line)
        if written < len(line):
            if self._file.seekable():
                self._file.truncate(self._file.tell() - written)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.path))
