"""Files that appear complete or not at all."""

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from threading import get_native_id


def write_whole(path: Path, content: bytes | memoryview) -> None:
    """Write a file that appears complete or not at all, see `whole_file`."""
    with whole_file(path) as partial:
        partial.write_bytes(content)


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Where to write a file that appears complete or not at all: what stood there before is not lost.

    Yields:
        a name beside it; what is there takes its place in the end, if all went well.

    Raises:
        OSError: it could not be written; names it.
    """
    path = Path(path)
    partial = path.with_name(f"{path.name}.{get_native_id()}.part")  # no other thread's
    try:
        yield partial
        os.replace(partial, path)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from None
    finally:
        with suppress(OSError):  # (of a name that is too long)
            partial.unlink()


def same_file(one: Path | str | int, other: Path | str | int) -> bool:
    """Whether two paths, or open files by their descriptors, are one file that is there."""
    try:
        return os.path.samefile(one, other)
    except OSError:
        return False
