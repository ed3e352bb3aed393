"""The commands for whole photos: `lgcn-fast detect`, and `lgcn-fast evaluate --multiface`."""

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TypeVar

import cv2
import numpy as np

from .cli_training import add_command
from .datasets import ENCODING
from .detection import Faces, combined_heatmap, detect
from .drawing import STYLES, draw
from .engine import PRECISIONS, Engine
from .files import write_whole
from .images import read_image, write_image
from .loading import engine_for, finder_for, shape_for
from .multiface import draw_score, read_photos, score_photos, summary

LONGEST_STEM = 200
"""Bytes of a picture's name that are of the photo's; file systems allow 255 in all."""
Found = TypeVar("Found")


def add_detect(commands) -> None:
    parser = add_command(commands, _run_detect, "All faces of photos and their landmarks, drawn and as numbers.")
    parser.add_argument("files", type=Path, nargs="+", metavar="FILE")
    parser.add_argument("--out", type=Path, required=True, help="folder for pictures and faces.json")
    parser.add_argument("--heatmap", action="store_true", help="draw the combined heatmap (of upright faces), too")
    add_style_option(parser)
    add_model_options(parser)
    add_engine_options(parser)
    add_detection_options(parser)


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """Which network and which shape model: of every command that uses trained ones."""
    parser.add_argument(
        "--model", help="name (see `lgcn-fast models`) or weights; default: lgcn-128, on a CPU lgcn-nano-128"
    )
    parser.add_argument("--shape", type=Path, help="shape model; default: the package's for the model's landmarks")


def add_style_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--style", nargs="+", choices=STYLES, default=["lines", "points"], help="what to draw (default: lines points)"
    )


def add_device_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--device", default="auto", help="cpu, cuda, or auto: a GPU where there is one, with triton and cupy"
    )


def add_engine_options(parser: argparse.ArgumentParser) -> None:
    """Where and how the network runs."""
    add_device_option(parser)
    parser.add_argument(
        "--precision",
        choices=PRECISIONS,
        default="auto",
        help="of the network; default: bf16 where the processor or GPU has instructions for it, else fp32",
    )


def engine_of(options: argparse.Namespace) -> Engine:
    """The engine that these options name: the one that `predict` and `detect` take for them."""
    return engine_for(options.model, options.device, options.precision)


def add_finder_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--finder",
        help="what looks for faces, as --model; default: lgcn-finder, for other landmarks than its 68 the model",
    )


def add_detection_options(parser: argparse.ArgumentParser) -> None:
    add_finder_option(parser)
    parser.add_argument(
        "--min-face", type=float, default=40, metavar="PIXELS", help="smallest face box to look for (default: 40)"
    )
    parser.add_argument(
        "--min-confidence", type=float, default=0.5, metavar="SHARE", help="faces below it are dropped (default: 0.5)"
    )
    text = "find faces however they are turned; takes two to four times as long"
    parser.add_argument("--any-angle", action="store_true", help=text)


def _detector(options: argparse.Namespace) -> tuple[Callable[[np.ndarray], Faces], Engine, Engine]:
    """`detect` as asked for, its engine and its finder."""
    engine = engine_of(options)
    finder, shape = finder_for(options.finder, engine), shape_for(options.shape, engine.config.num_landmarks)
    find = partial(
        detect,
        min_face=options.min_face,
        min_confidence=options.min_confidence,
        model=engine,
        finder=finder,
        shape=shape,
        any_angle=options.any_angle,
    )
    return find, engine, finder


def _run_detect(options: argparse.Namespace) -> int:
    options.files = list(dict.fromkeys(options.files))
    numbers = options.out / "faces.json"
    _check_no_labels(numbers)
    found: dict[str, dict] = {}
    find, engine, finder = _detector(options)
    heatmap_of = partial(combined_heatmap, min_face=options.min_face, model=engine, finder=finder)
    options.out.mkdir(parents=True, exist_ok=True)
    taken = names_in(options.out, options.files)
    taken |= {name.replace("_heatmap.png", "_faces.png") for name in taken}  # a heatmap is named like its drawing
    try:
        for path, photo, faces in found_in("detect", options.files, find):
            picture = free_name(path.stem, "faces", taken)
            write_image(options.out / picture, draw(photo, faces, options.style, engine))
            found[str(path)] = {"picture": picture, "faces": as_json(faces)}
            if options.heatmap:
                colors = cv2.applyColorMap((heatmap_of(photo) * 255).astype(np.uint8), cv2.COLORMAP_INFERNO)
                write_image(options.out / picture.replace("_faces.png", "_heatmap.png"), colors[..., ::-1])
    finally:  # also where it is interrupted, or the disk gets full
        if found:
            write_whole(numbers, json.dumps(found, indent=1).encode())
            count = sum(len(entry["faces"]) for entry in found.values())
            print(f"{numbers}: {count} faces in {len(found)} of {len(options.files)} photos")
    return 0 if len(found) == len(options.files) else 2


def found_in(
    command: str, paths: list[Path], find: Callable[[np.ndarray], Found]
) -> Iterator[tuple[Path, np.ndarray, Found]]:
    """Path, picture (H, W, 3) and what was found in it, of all files that can be used.

    What is wrong with others is said on standard error: the rest is not at fault.
    """
    for path in paths:
        try:
            image = read_image(path, color=True)
            found = find(image)
        except (ValueError, OSError, MemoryError, cv2.error) as error:
            message = str(error) if str(path) in str(error) else f"{path}: {error}"
            print(f"lgcn-fast {command}: {message}", file=sys.stderr)
            continue
        yield path, image, found


def as_json(faces: Faces) -> list[dict]:
    """Numbers of the faces of a photo."""
    columns = zip(faces.confidence, faces.boxes, faces.points, faces.scores, strict=True)
    return [
        {
            "confidence": round(float(confidence), 4),
            "box": box.astype(float).round(2).tolist(),
            **rounded(points, scores),
        }
        for confidence, box, points, scores in columns
    ]


def rounded(points: np.ndarray, scores: np.ndarray) -> dict[str, list]:
    """Numbers of the landmarks of a face."""
    return {"points": points.astype(float).round(3).tolist(), "scores": scores.astype(float).round(4).tolist()}


def names_in(folder: Path, files: list[Path]) -> set[str]:
    """Names of those files that are in a folder: no drawing may overwrite them."""
    return {path.name for path in files if path.parent.resolve() == folder.resolve()}


def free_name(stem: str, kind: str, taken: set[str]) -> str:
    """Name of a picture, which is taken then: files of the same name in different folders must not overwrite each
    other. Of a long name its beginning."""
    if len(encoded := stem.encode(errors="surrogateescape")) > LONGEST_STEM:
        stem = encoded[:LONGEST_STEM].decode(errors="ignore")
    name, number = f"{stem}_{kind}.png", 2
    while name in taken:
        name, number = f"{stem}_{number}_{kind}.png", number + 1
    taken.add(name)
    return name


def _check_no_labels(path: Path) -> None:
    """Raise ValueError where a `faces.json` holds labels, as `evaluate --multiface` reads them."""
    try:
        labels = isinstance(json.loads(path.read_text(ENCODING)), list)
    except (OSError, ValueError):
        return
    if labels:
        raise ValueError(f"--out: expected a folder without labels, which would be lost, got {path}")


def run_multiface(options: argparse.Namespace) -> int:
    """Score `detect` on folders with `faces.json`."""
    photos = [photo for folder in options.faces for photo in read_photos(folder)]
    find = _detector(options)[0]
    options.out.mkdir(parents=True, exist_ok=True)  # (rather an error now than after minutes)
    scores = score_photos(photos, find, options.min_face)
    values = summary(scores)
    taken = names_in(options.out, [photo.path for photo in photos])
    for score in scores:
        picture = free_name(score.photo.path.stem, "faces", taken)
        write_image(options.out / picture, draw_score(score))
    known = {name: None if np.isnan(value) else value for name, value in values.items()}
    write_whole(options.out / "multiface.json", json.dumps(known, indent=1).encode())
    print(f"{values['found']} of {values['faces']} labelled faces of at least {options.min_face:g} pixels found in "
          f"{values['photos']} photos ({values['recall']:.1f} %), error {values['mean error']:.2f} % mean, "
          f"{values['median error']:.2f} % median; {values['unlabelled']} detections without a label (magenta: look at "
          f"them in {options.out})")  # fmt: skip
    return 0
