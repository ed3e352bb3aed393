"""What faces in bad conditions cost: the tables of docs/robustness.md, on the validation faces of 300-W.

python benchmarks/robustness.py ../shared/data --model lgcn-nano-128
"""

import argparse
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from unittest.mock import patch

import cv2
import numpy as np
from tqdm import tqdm

import lgcn_fast
from lgcn_fast.augmentation import blurred
from lgcn_fast.datasets import Face, is_validation, read_faces
from lgcn_fast.evaluation import FAILURE, landmark_errors
from lgcn_fast.images import crop, face_box, middle, square_box, to_crop
from lgcn_fast.multiface import LabelledPhoto, score_photo

FOLDERS = ("afw", "helen", "lfpw/trainset")
AROUND, LARGEST = 2.0, 400
"""Side of what is cut out around a face over that of its box, and pixels of it at most."""
PHOTO_FACE = 120
"""Side of a face box in the photos that `detect` gets, pixels."""


@dataclass(frozen=True)
class Sample:
    """A picture (H, W) uint8 with labels (N, 2) and the box that `predict` is given, (4,)."""

    image: np.ndarray
    points: np.ndarray
    box: np.ndarray


Change = Callable[[Sample, np.random.Generator], Sample]


def around_face(face: Face) -> Sample:
    square = square_box(face_box(face.points), AROUND)
    size = min(int(square[2]), LARGEST)
    points = to_crop(face.points, square, size)
    return Sample(crop(face.image(), square, size), points, face_box(points))


def in_photo(face: Face) -> Sample:
    """All of the photo, so large that the face has `PHOTO_FACE` pixels, or as it is."""
    sample = Sample(face.image(), face.points, face_box(face.points))
    return resized(sample, min(PHOTO_FACE / sample.box[2], 1))


def resized(sample: Sample, scale: float) -> Sample:
    image = cv2.resize(sample.image, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA)
    points = (sample.points + 0.5) * scale - 0.5
    return Sample(image, points, face_box(points))


def unchanged(sample: Sample, random: np.random.Generator) -> Sample:
    return sample


def box_off(shift: float, smallest: float, largest: float) -> Change:
    def change(sample: Sample, random: np.random.Generator) -> Sample:
        side = sample.box[2] * random.uniform(smallest, largest)
        centre = middle(sample.box) + random.uniform(-shift, shift, 2) * sample.box[2]
        return Sample(sample.image, sample.points, np.array([*(centre - (side - 1) / 2), side, side]))

    return change


def turned(degrees: float) -> Change:
    """The picture turned about the face, one way or the other; the box is around the labels again."""

    def change(sample: Sample, random: np.random.Generator) -> Sample:
        centre = tuple(map(float, middle(sample.box)))
        matrix = cv2.getRotationMatrix2D(centre, degrees * random.choice([-1, 1]), 1)
        size = sample.image.shape[::-1]
        image = cv2.warpAffine(sample.image, matrix, size, borderMode=cv2.BORDER_REPLICATE)
        points = sample.points @ matrix[:, :2].T + matrix[:, 2]
        return Sample(image, points, face_box(points))

    return change


def light(gain: float, offset: float = 0) -> Change:
    def change(sample: Sample, random: np.random.Generator) -> Sample:
        image = np.rint(sample.image * gain + offset).clip(0, 255).astype(np.uint8)
        return Sample(image, sample.points, sample.box)

    return change


def small(side: int) -> Change:
    return lambda sample, random: resized(sample, side / sample.box[2])


def blur(along: float, across: float) -> Change:
    """Standard deviations as shares of the box's side, along a random direction and across."""

    def change(sample: Sample, random: np.random.Generator) -> Sample:
        sigmas = (max(share * sample.box[2], 0.3) for share in (along, across))
        return Sample(blurred(sample.image, *sigmas, random.uniform(0, np.pi)), sample.points, sample.box)

    return change


def compressed(side: int, quality: int) -> Change:
    def change(sample: Sample, random: np.random.Generator) -> Sample:
        sample = resized(sample, side / sample.box[2])
        data = cv2.imencode(".jpg", sample.image, (cv2.IMWRITE_JPEG_QUALITY, quality))[1]
        return Sample(cv2.imdecode(data, cv2.IMREAD_GRAYSCALE), sample.points, sample.box)

    return change


BOXES = {
    "around the labels": unchanged,
    "moved by up to 12 % of their side, 0.85 to 1.2 times as large": box_off(0.12, 0.85, 1.2),
    "moved by up to 15 %, 0.75 to 1.4 times as large": box_off(0.15, 0.75, 1.4),
    "1.3 times as large": box_off(0, 1.3, 1.3),
    "0.8 times as large": box_off(0, 0.8, 0.8),
    "around the labels, pictures turned by 30 degrees": turned(30),
    "turned by 45 degrees": turned(45),
    "turned by 60 degrees": turned(60),
}
SOFT = {
    "as it is": unchanged,
    "box of 60 pixels": small(60),
    "40 pixels": small(40),
    "20 pixels": small(20),
    "out of focus, 1/80 of the box": blur(1 / 80, 1 / 80),
    "1/40": blur(1 / 40, 1 / 40),
    "1/25": blur(1 / 25, 1 / 25),
    "in motion, 1/40": blur(1 / 40, 0),
    "1/20": blur(1 / 20, 0),
    "box of 100 pixels, JPEG quality 15": compressed(100, 15),
}
LIGHT = {
    "as it is": unchanged,
    "a quarter": light(1 / 4),
    "a tenth": light(1 / 10),
    "a third of the contrast, on bright gray": light(1 / 3, 150),
}
ANGLES = (0, 45, 60, 90, 180)


def changed(samples: list[Sample], change: Change) -> list[Sample]:
    """The same change for the same faces in each run."""
    return [change(sample, np.random.default_rng(index)) for index, sample in enumerate(samples)]


def error(samples: list[Sample], model: str, **options: int) -> str:
    """Mean error of `predict`."""
    images, boxes = [sample.image for sample in samples], np.stack([sample.box for sample in samples])
    points = lgcn_fast.predict(images, boxes, model=model, **options).points
    errors = landmark_errors(points, np.stack([sample.points for sample in samples]))
    return f"{100 * errors.mean():.2f} %"


def found(samples: list[Sample], model: str, **options: bool) -> str:
    """Of how many photos `detect` finds the labelled face, with an error below `FAILURE`."""
    count = 0
    for sample in tqdm(samples, leave=False, disable=None):
        smallest = min(0.75 * sample.box[2], 40)
        faces = lgcn_fast.detect(sample.image, smallest, model=model, **options)
        score = score_photo(LabelledPhoto(Path(), sample.points[None]), faces, smallest)
        count += int(score.errors[0] < FAILURE)
    return str(count)


def as_they_are() -> ExitStack:
    """Faces in their own light, while this is entered."""
    stack = ExitStack()
    stack.enter_context(patch("lgcn_fast.prediction.lit", lambda image: image))
    stack.enter_context(patch("lgcn_fast.detection._lit", lambda level, side: level))
    return stack


def table(*heads: str) -> None:
    print(f"\n| {' | '.join(heads)} |\n|{' --- |' * len(heads)}")


def row(*cells: str) -> None:
    print(f"| {' | '.join(cells)} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="folder with 300w/ and infants/")
    parser.add_argument("--model", default="lgcn-nano-128")
    options = parser.parse_args()
    model = options.model
    faces = [face for folder in FOLDERS for face in read_faces(options.data / "300w" / folder)]
    faces = [face for face in faces if is_validation(face.group)]
    samples, photos = [around_face(face) for face in faces], [in_photo(face) for face in faces[::2]]
    infants = [face for face in read_faces(options.data / "infants/trainset") if is_validation(face.group)]
    print(f"{len(samples)} faces, {len(photos)} photos, {len(infants)} infants")
    table("boxes", "one pass", "`passes=2`")
    for name, change in BOXES.items():
        these = changed(samples, change)
        row(name, error(these, model), error(these, model, passes=2))
    table("soft pictures", "`predict`", "`detect` finds")
    for name, change in SOFT.items():
        row(name, error(changed(samples, change), model), found(changed(photos, change), model))
    table("light", "`predict` without it", "`predict`", "`detect` without it", "`detect`")
    for name, change in LIGHT.items():
        these, those = changed(samples, change), changed(photos, change)
        with as_they_are():
            before = error(these, model), found(those, model)
        row(name, before[0], error(these, model), before[1], found(those, model))
    table("faces found", *map(str, ANGLES), "infants")
    photos, lying = [in_photo(face) for face in faces[::3]], [in_photo(face) for face in infants]
    for any_angle in (False, True):
        counts = [found(changed(photos, turned(angle)), model, any_angle=any_angle) for angle in ANGLES]
        row(f"any_angle={any_angle}", *counts, found(lying, model, any_angle=any_angle))


if __name__ == "__main__":
    main()
