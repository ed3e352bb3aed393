"""`detect`: its time against the photo's size, and a photo of 640 x 480; beside OpenCV's cascade where OpenCV has one.

OpenCV 4 ships the cascade, OpenCV 5 does not. The face of demo.jpg is all that the photos show, at any size.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import cv2
import matplotlib.figure
import numpy as np
from end_to_end import latencies
from heatmaps import DEMO
from timing import output_folder, write

import lgcn_fast
from lgcn_fast.images import read_image

MEGAPIXELS = (0.1, 0.3, 1, 2, 4, 8)
SMALLEST = (40, 60, 100)
"""Sides of the smallest face boxes that are looked for, pixels."""
detect = partial(lgcn_fast.detect, device="cpu")


def photo_of(megapixels: float) -> np.ndarray:
    """A photo of 4 : 3 with one face that fills a third of it."""
    height = round((megapixels * 1e6 * 3 / 4) ** 0.5)
    return cv2.resize(read_image(DEMO, color=True), (height * 4 // 3, height), interpolation=cv2.INTER_CUBIC)


def cascade() -> Callable[[np.ndarray], np.ndarray] | None:
    """OpenCV's frontal cascade, gray photo to boxes, where it is there."""
    if not hasattr(cv2, "CascadeClassifier"):
        return None
    classifier = cv2.CascadeClassifier(cv2.data.haarcascades + "haarcascade_frontalface_default.xml")
    return lambda gray: classifier.detectMultiScale(gray, minSize=(40, 40))


def main() -> dict:
    results: dict[str, dict] = {}
    print(f"{'':<16}" + "".join(f"{f'faces from {size}':>16}" for size in SMALLEST))
    for megapixels in MEGAPIXELS:
        photo, calls = photo_of(megapixels), max(round(20 / megapixels), 3)
        row = {f"faces from {size}": latencies(lambda p=photo, s=size: detect(p, s), calls) for size in SMALLEST}
        results[f"{megapixels} megapixels"] = row
        times = "".join(f"{quantiles['median_ms']:>13.1f} ms" for quantiles in row.values())
        print(f"{f'{megapixels} megapixels':<16}{times}", flush=True)
    photo = cv2.resize(photo_of(0.3), (640, 480))
    results["640 x 480, faces from 60"] = latencies(lambda: detect(photo, 60), 100)
    print("640 x 480, faces from 60:", {k: round(v, 1) for k, v in results["640 x 480, faces from 60"].items()})
    if find := cascade():
        gray = cv2.cvtColor(photo, cv2.COLOR_RGB2GRAY)
        results["640 x 480, cascade"] = latencies(lambda: find(gray), 50)
        print("640 x 480, OpenCV's cascade:", {k: round(v, 1) for k, v in results["640 x 480, cascade"].items()})
    return results


def draw(results: dict[str, dict], path: Path) -> None:
    figure = matplotlib.figure.Figure(figsize=(5.5, 4), layout="constrained")
    axes = figure.subplots()
    for size in SMALLEST:
        times = [results[f"{m} megapixels"][f"faces from {size}"]["median_ms"] for m in MEGAPIXELS]
        axes.loglog(MEGAPIXELS, times, "o-", label=f"faces from {size} pixels on")
    axes.set(xlabel="photo [megapixels]", ylabel="detect [ms]", title="two CPU cores")
    axes.grid(alpha=0.3, which="both")
    axes.legend()
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    out = output_folder()
    times = main()
    write(out, times)
    if out:
        draw(times, out / "detect-time.png")
