"""A batch of face crops through `predict`, and their landmarks as CSV.

Each picture is one face, cut out by whatever finds faces in your program: about 1.17 times the tight square around the
landmarks, or more, as the second pass looks again where the first has found it. Crops may be of any sizes; all go
through the network together. The CSV is what `lgcn-fast prepare` reads, so that landmarks which somebody corrected by
hand can be trained on.

    python examples/crops.py faces/*.png --out landmarks.csv
"""

import argparse
import csv
from pathlib import Path

import lgcn_fast
from lgcn_fast.images import read_image


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", type=Path, nargs="+", metavar="FILE", help="pictures of one face each")
    parser.add_argument("--out", type=Path, required=True, help="the .csv file to write")
    parser.add_argument("--model", help="name (see `lgcn-fast models`) or weights")
    options = parser.parse_args(arguments)

    crops = [read_image(path) for path in options.files]  # (H, W) uint8: gray is all that the network sees
    landmarks = lgcn_fast.predict(crops, model=options.model, passes=2)

    with options.out.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["image", *(f"{axis}{i}" for i in range(landmarks.points.shape[1]) for axis in "xy")])
        for path, points in zip(options.files, landmarks.points, strict=True):
            writer.writerow([path.name, *(f"{value:.3f}" for value in points.ravel())])
    print(f"{options.out}: {len(landmarks)} faces, mean score {landmarks.scores.mean():.2f}")


if __name__ == "__main__":
    main()
