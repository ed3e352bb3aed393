"""All faces of photos with `detect`, drawn.

No face detector and no boxes are needed. `--min-face` is the side of the smallest face box to look for: the larger it
is, the faster the search. Each picture is written beside the others in the folder `--out`, as NAME_faces.png.

    python examples/photo.py party.jpg --out drawn --min-face 60
"""

import argparse
from pathlib import Path

import lgcn_fast
from lgcn_fast.images import read_image, write_image


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", type=Path, nargs="+", metavar="FILE")
    parser.add_argument("--out", type=Path, required=True, help="folder for the pictures")
    parser.add_argument("--min-face", type=float, default=40, metavar="PIXELS")
    parser.add_argument("--min-confidence", type=float, default=0.5, metavar="SHARE")
    options = parser.parse_args(arguments)

    options.out.mkdir(parents=True, exist_ok=True)
    for path in options.files:
        photo = read_image(path, color=True)  # (H, W, 3) uint8 RGB; EXIF orientation is applied
        faces = lgcn_fast.detect(photo, options.min_face, options.min_confidence)
        # Colours of the points: from red, where the network is not certain, to green.
        picture = lgcn_fast.draw(photo, faces, style=["boxes", "lines", "confidence"])
        write_image(options.out / f"{path.stem}_faces.png", picture)
        print(f"{path}: {len(faces)} faces, confidence {', '.join(f'{c:.2f}' for c in faces.confidence) or '-'}")


if __name__ == "__main__":
    main()
