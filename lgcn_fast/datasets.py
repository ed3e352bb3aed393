"""Readers of labelled faces: 300-W folders, CSV of points, Kaggle's facial keypoints; and of background pictures."""

import csv
import os
import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import sha256
from itertools import zip_longest
from pathlib import Path
from tokenize import TokenError
from zipfile import BadZipFile

import numpy as np

from .images import read_image
from .landmarks import KAGGLE_NAMES

ENCODING = "utf-8-sig"
"""UTF-8, with the mark in front that spreadsheets write or without it."""
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".pgm", ".ppm", ".tif", ".tiff", ".gif", ".jp2")
UNREADABLE = (
    OSError, ValueError, KeyError, EOFError, TypeError, SyntaxError, NotImplementedError, TokenError, BadZipFile,
    zlib.error,
)  # fmt: skip
"""What NumPy raises for an .npz that is damaged, or something else."""


@dataclass(frozen=True)
class Face:
    """One labelled face, or a background picture."""

    source: Path | np.ndarray
    """The picture: a file, or its pixels (H, W) uint8."""
    points: np.ndarray
    """(N, 2) float32, pixels; NaN without a label. (0, 2) for a background picture."""
    group: str
    """Photo or person: faces of one group never stand on both sides of a split."""
    name: str
    """Where the face comes from, for messages and reports."""

    def image(self, color: bool = False) -> np.ndarray:
        """The picture, (H, W) uint8, with `color` (H, W, 3) in RGB order."""
        if isinstance(self.source, Path):
            return read_image(self.source, color)
        return np.repeat(self.source[..., None], 3, axis=2) if color else self.source


def read_faces(path: Path) -> list[Face]:
    """Read the labelled faces of a folder or file, whatever the format.

    A folder: every `.pts` in it or below, beside a picture of the same name. A `.csv`: Kaggle's facial keypoints if it
    has a column "Image", otherwise points of the pictures in the folder of the same name beside it.

    Raises:
        ValueError: nothing there, or not readable as what it seems to be; names the file and line.
    """
    path = Path(path)
    if path.is_dir():
        return read_300w(path)
    if not path.is_file():
        raise ValueError(f"{path}: expected a folder with .pts files or a .csv file, got nothing there")
    if path.suffix.lower() != ".csv":
        raise ValueError(f"{path}: expected a folder with .pts files or a .csv file, got a file {path.suffix!r}")
    _, header = next(_rows(path), (1, []))
    kaggle = "Image" in header and not {f"{name}_x" for name in KAGGLE_NAMES}.isdisjoint(header)
    return read_kaggle(path) if kaggle else read_csv(path, path.with_suffix(""))


def read_300w(folder: Path) -> list[Face]:
    """Read a folder in the manner of 300-W: `NAME.pts` beside a picture `NAME`, at any depth.

    Faces with fewer than two labels are left out.

    Raises:
        ValueError: no `.pts` file, one without a picture, or a malformed one.
    """
    folder = Path(folder)
    labels = _files_below(folder, (".pts",))
    if not labels:
        raise ValueError(f"{folder}: expected .pts files in it or below, got none")
    faces = []
    for path in labels:
        suffixes = [case for suffix in IMAGE_SUFFIXES for case in (suffix, suffix.upper(), suffix.title())]
        pictures = [path.with_suffix(suffix) for suffix in suffixes if path.with_suffix(suffix).is_file()]
        if not pictures:
            suffixes = ", ".join(IMAGE_SUFFIXES)
            raise ValueError(f"{path}: expected a picture of the same name beside it ({suffixes}), got none")
        others = [picture.name for picture in pictures[1:] if not picture.samefile(pictures[0])]
        if others:
            got = ", ".join([pictures[0].name, *others])
            raise ValueError(f"{path}: expected one picture of the same name beside it, got {got}")
        points = read_pts(path)
        if enough_labels(points):
            faces.append(Face(pictures[0], points, group_of(path.stem), str(path.relative_to(folder))))
    return faces


def read_pts(path: Path) -> np.ndarray:
    """Read a file of the iBUG format, with or without its `version`, `n_points` and brace lines.

    Returns:
        (N, 2) float32, pixels, 0-based (the files count from 1).

    Raises:
        ValueError: no points, a line that is not two numbers, or another count than `n_points`.
    """
    points, announced = [], None
    for number, line in enumerate(Path(path).read_text(ENCODING, errors="replace").splitlines(), start=1):
        words = line.replace("{", " ").replace("}", " ").split()
        if not words or words[0].startswith("version"):
            continue
        if words[0].startswith("n_points"):
            if not (digits := re.search(r"\d+", words[-1])):
                raise ValueError(f"{path}, line {number}: expected a number of points, got {line.strip()!r}")
            announced = int(digits[0])
            continue
        try:
            x, y = (float(word) for word in words)
        except ValueError:
            raise ValueError(f"{path}, line {number}: expected two numbers, got {line.strip()!r}") from None
        points.append((x, y))
    if not points or announced not in (None, len(points)):
        raise ValueError(f"{path}: expected {announced or 'some'} points, got {len(points)}")
    return _labels(points, str(path)) - 1


def read_csv(path: Path, images: Path) -> list[Face]:
    """Read a CSV with the columns `image, x0, y0, x1, y1, ...`, 0-based pixels; an empty cell is no label.

    Faces with fewer than two labels are left out.

    Args:
        path: the file.
        images: folder that the column `image` is relative to.

    Raises:
        ValueError: another header, a row of another length, a cell that is not a number, a missing picture.
    """
    path, images = Path(path), Path(images)
    rows = _rows(path)
    _, header = next(rows, (1, []))
    expected = ["image", *(f"{axis}{i}" for i in range(max((len(header) - 1) // 2, 1)) for axis in "xy")]
    for column, (name, known) in enumerate(zip_longest(header, expected, fillvalue="nothing"), start=1):
        if name.strip() != known:
            where = f"{path}: expected the columns image, x0, y0, x1, y1, ..., as column {column}"
            raise ValueError(f"{where} {known}, got {name or 'an empty one'}")
    faces = []
    for number, row in rows:
        where = f"{path}, line {number}"
        picture = images / row[0]
        if not picture.is_file():
            raise ValueError(f"{where}: expected a picture {picture}, got none")
        points = _cells_to_points(row[1:], len(header) - 1, where)
        if enough_labels(points):
            faces.append(Face(picture, points, group_of(picture.stem), row[0]))
    return faces


def read_kaggle(path: Path) -> list[Face]:
    """Read Kaggle's facial-keypoints CSV: 15 points, some without a label, 96 x 96 pixels in the column `Image`.

    Faces with fewer than two labels are left out: nobody knows how large they are.

    Raises:
        ValueError: missing columns, cells that are not numbers, another number of pixels.
    """
    path = Path(path)
    columns = [f"{name}_{axis}" for name in KAGGLE_NAMES for axis in "xy"]
    faces = []
    rows = _rows(path)
    _, header = next(rows, (1, []))
    missing = {*columns, "Image"} - set(header)
    if missing:
        raise ValueError(f"{path}: expected Kaggle's columns, got none called {', '.join(sorted(missing))}")
    for number, cells in rows:
        where = f"{path}, line {number}"
        row = dict(zip(header, cells, strict=False))
        points = _cells_to_points([row.get(column, "") for column in columns], len(columns), where)
        pixels = _pixels(row.get("Image"), where)
        if enough_labels(points):
            faces.append(Face(pixels, points, f"{path.stem}-{number}", f"{path.name}:{number}"))
    return faces


def read_background(folder: Path) -> list[Face]:
    """Read a folder of pictures without faces, at any depth.

    Raises:
        ValueError: no picture.
    """
    folder = Path(folder)
    pictures = _files_below(folder, IMAGE_SUFFIXES)
    if not pictures:
        raise ValueError(f"{folder}: expected pictures in it or below, got none")
    nothing = np.empty((0, 2), np.float32)
    return [Face(path, nothing, path.stem, str(path.relative_to(folder))) for path in pictures]


def read_shapes(path: Path, num_landmarks: int) -> np.ndarray:
    """Read landmarks without pictures: a `.npz` file with an array `landmarks` (M, N, 2).

    Raises:
        ValueError: another kind of file, or another number of landmarks.
    """
    try:
        with Path(path).open("rb") as raw, np.load(raw, allow_pickle=False) as file:
            shapes = file["landmarks"]
    except UNREADABLE as error:
        raise ValueError(f"{path}: expected a .npz file with an array `landmarks`, got {error}") from None
    if shapes.ndim != 3 or shapes.shape[1:] != (num_landmarks, 2):
        raise ValueError(f"{path}: expected landmarks (M, {num_landmarks}, 2), got {shapes.shape}")
    return shapes


def _files_below(folder: Path, suffixes: tuple[str, ...]) -> list[Path]:
    """Files in a folder or below, behind links too. (Archives made on macOS have a file `._NAME` beside each.)

    Raises:
        OSError: a folder that cannot be read.
    """

    def give_up(error: OSError) -> None:
        raise error

    found, seen = [], set()
    if not folder.is_dir():
        return found
    for place, folders, names in os.walk(folder, onerror=give_up, followlinks=True):
        if (real := os.path.realpath(place)) in seen:  # links may lead in a circle
            folders.clear()
            continue
        seen.add(real)
        found += [Path(place, name) for name in names if not name.startswith("._")]
    return sorted(path for path in found if path.suffix.lower() in suffixes)


def group_of(stem: str) -> str:
    """Photo or person of a file name: what stands before a last `_` and one or two digits.

    The second face of a photo is `PHOTO_2`, the eleventh frame of a person `PERSON_11`; `image_0001` stays whole.
    """
    return re.sub(r"_\d{1,2}$", "", stem)


def is_validation(group: str) -> bool:
    """Whether a group belongs to the validation tenth: decided by its name alone, the same on every machine."""
    return int.from_bytes(sha256(group.encode(errors="surrogateescape")).digest()[:4]) % 10 == 0


def enough_labels(points: np.ndarray) -> bool:
    """Whether two landmarks of a face (N, 2) are labelled or more: with fewer nobody knows how large it is."""
    return bool(np.isfinite(points).all(axis=1).sum() >= 2)


def _rows(path: Path) -> Iterator[tuple[int, list[str]]]:
    """Number, from 1, and cells of the header of a CSV and of each line that is not empty. They come one after the
    other, as those of Kaggle are long.

    Raises:
        ValueError: an encoding other than UTF-8, or no CSV; names the file.
    """
    try:
        with path.open(newline="", encoding=ENCODING) as file:
            for number, cells in enumerate(csv.reader(file), start=1):
                if number == 1 or any(cells):
                    yield number, cells
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{path}: expected a CSV in UTF-8, got {error}") from None


def _cells_to_points(cells: list[str], expected: int, where: str) -> np.ndarray:
    if len(cells) != expected:
        raise ValueError(f"{where}: expected {expected} coordinates, got {len(cells)}")
    try:
        points = [float(cell) if cell else np.nan for cell in cells]
    except ValueError as error:
        raise ValueError(f"{where}: expected numbers, got {error}") from None
    return _labels(points, where)


def _labels(numbers: list, where: str) -> np.ndarray:
    """Points (N, 2) float32 of the numbers in a file; both coordinates of one without a label are NaN."""
    with np.errstate(over="ignore"):
        points = np.array(numbers, np.float32).reshape(-1, 2)
    if np.isinf(points).any():
        raise ValueError(f"{where}: expected finite numbers, got infinity")
    points[np.isnan(points).any(axis=1)] = np.nan
    return points


def _pixels(text: str | None, where: str) -> np.ndarray:
    try:
        pixels = np.array((text or "").split(), np.uint8)
    except (ValueError, OverflowError):
        raise ValueError(f"{where}: expected pixel values 0..255 in the column Image, got {text[:40]!r} ...") from None
    if pixels.size != 96 * 96:
        raise ValueError(f"{where}: expected 96 x 96 pixels in the column Image, got {pixels.size}")
    return pixels.reshape(96, 96)
