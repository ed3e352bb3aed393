"""All faces of a folder of photos with Ray Data, for those who outgrow one machine.

Each worker has an engine of its own with one thread: the cores work on different photos, not together on one. On a
cluster (`RAY_ADDRESS`) the folder must be one that all machines see, and lgcn_fast be installed on them. The result is
a line of JSON for each photo, in no particular order; a file that is no picture has an `error` instead of `faces`, and
does not stop the others. Needs `pip install "ray[data]"`.

    python examples/ray_folder.py photos/ --out faces.jsonl --workers 2
"""

import argparse
import json
from importlib.util import find_spec
from pathlib import Path

import cv2
import numpy as np

import lgcn_fast
from lgcn_fast.cli_photos import as_json
from lgcn_fast.datasets import IMAGE_SUFFIXES
from lgcn_fast.images import read_image


class FaceFinder:
    """A worker: built once in its process, then called with batches of paths."""

    def __init__(self, model: str, min_face: float) -> None:
        cv2.setNumThreads(1)  # the other cores have workers of their own
        self._engine = lgcn_fast.Engine(model, "cpu", num_threads=1)
        self._min_face = min_face

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, list[str]]:
        return {"line": [json.dumps({"file": path} | self._look_at(Path(path))) for path in batch["path"].tolist()]}

    def _look_at(self, path: Path) -> dict:
        try:
            return {"faces": as_json(lgcn_fast.detect(read_image(path), self._min_face, model=self._engine))}
        except (ValueError, OSError, MemoryError, cv2.error) as error:
            return {"error": str(error)}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--out", type=Path, required=True, help="the .jsonl file to write")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--model", default="lgcn-nano", help="name (see `lgcn-fast models`) or weights")
    parser.add_argument("--min-face", type=float, default=40, metavar="PIXELS")
    options = parser.parse_args(arguments)
    if find_spec("ray") is None:
        raise SystemExit('expected Ray Data, got none (pip install "ray[data]")')
    import ray

    paths = sorted(path for path in options.folder.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES)
    if not paths:
        raise SystemExit(f"{options.folder}: expected pictures in it or below, got none")
    photos = ray.data.from_items([{"path": str(path.resolve())} for path in paths])
    found = photos.map_batches(
        FaceFinder,
        fn_constructor_kwargs={"model": options.model, "min_face": options.min_face},
        compute=ray.data.ActorPoolStrategy(size=options.workers),
        num_cpus=1,
        batch_size=16,
    )
    with options.out.open("w") as file:
        file.writelines(f"{row['line']}\n" for row in found.iter_rows())
    print(f"{options.out}: {len(paths)} photos")


if __name__ == "__main__":
    main()
