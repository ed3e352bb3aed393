"""What is known of the errors: reports of one model, and of the family beside published and other people's figures."""

import hashlib
import json
import os
import platform
import shutil
import subprocess
import textwrap
import time
from pathlib import Path

import numpy as np
import torch

from .checkpoints import load_card, model_names, weights_path
from .datasets import read_faces
from .engine import Engine
from .evaluation import Evaluation, evaluate, with_mean_shape
from .figures import draw_curves, draw_sheet
from .files import write_whole
from .images import crop, face_box, square_box
from .loading import engine_for
from .prediction import predict
from .shipped import MEASURED, REFERENCE_SET

TEST_SETS = {REFERENCE_SET: "300w/lfpw/testset", "YouTube test": "youtube/test.csv"}
"""The folders of labelled single faces that nothing is trained on; what ships, and the default, is decided by them."""
SOURCE = "Merget et al., CVPR 2018, Table 1 (F = 128, LFPW and HELEN test sets together) and section 4.1 (failures)"
PUBLISHED = {"fit": (2.86, 2.21), "heatmap maxima": (3.04, 2.34)}
"""Published medians of the paper's network, percent, 68 and 51 points."""
PUBLISHED_FAILURES = {"fit": "4 of 689, 300-W in all", "heatmap maxima": ""}
PEERS = {
    "dlib": (2.54, 2.14),
    "PFLD": (3.24, 2.72),
    "MobileFaceNet": (3.41, 2.88),
    "MediaPipe FaceMesh": (4.61, 3.28),
    "3DDFA-V2": (4.99, 4.15),
    "OpenSeeFace": (5.25, 4.28),
}
"""Medians on LFPW test, percent, 68 and 51 points, measured by the owners of this project."""
MARKERS = ("<!-- accuracy -->\n", "<!-- /accuracy -->\n")
"""What stands before and behind the table in a README."""
ERRORS_NOTE = """Medians in percent of the inter-ocular distance, with 68 points / with the 51 without the outline;
failures are faces above 10 % (68 points). The labels of YouTube-Faces are semi-automatic and rounded to whole pixels.
From one arithmetic to another (fp32, bf16 with and without AMX) medians move by up to 0.04, failures by one. Speed:
`predict`, one crop after the other ({machines}). Published: {source}."""
PEERS_NOTE = """Other detectors on the faces of LFPW test, measured by the owners of this project, each given its own
best box around the labelled face (dlib: a mean of 3.37 and 6 failures; these photos were very likely in its training
set):"""


def write_evaluation(evaluations: dict[str, Evaluation], folder: Path) -> dict:
    """Write `evaluation.json`, `curve.png` (Figure 4) and `sheet.png` (Figure 5).

    Args:
        evaluations: of the same faces, by method (see `draw_curves`); the first one's are drawn on the sheet.
        folder: made where it is not there.

    Returns:
        What the JSON holds: summaries by method and set of points, and the error of each face by the first method.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    first = next(iter(evaluations.values()))
    values = {
        "normalisation": first.normalisation,
        "percent": {
            f"{method}, {points}": row
            for method, evaluation in evaluations.items()
            for points, row in evaluation.summaries().items()
        },
        "faces": first.by_face(),
    }
    write_whole(folder / "evaluation.json", json.dumps(values, indent=1).encode())
    draw_curves({"": evaluations}, folder / "curve.png")
    draw_sheet(first, folder / "sheet.png")
    return values


def write_report(data: Path, folder: Path, device: str = "auto") -> dict:
    """Evaluate all models that ship on all test sets; write tables, curves and contact sheets.

    Files: `report.json`, all errors; `measured.json`, what `models()` knows; `accuracy.md`, the README's table;
    `SET-curve.png` (Figure 4) of all models; `SET-MODEL.png` (Figure 5).

    Args:
        data: folder with `TEST_SETS`.
        folder: made where it is not there.

    Returns:
        What `report.json` holds.

    Raises:
        ValueError: a test set that is not there.
    """
    folder = Path(folder)
    sets = {name: read_faces(Path(data) / path) for name, path in TEST_SETS.items()}
    folder.mkdir(parents=True, exist_ok=True)
    names = sorted(model_names(), key=lambda name: -weights_path(name).stat().st_size)
    evaluations = {
        title: {name: evaluate(faces, name, device=device) for name in names} for title, faces in sets.items()
    }
    mean_shape = np.array(load_card(names[0])["mean_shape"])
    baselines = {title: with_mean_shape(models[names[0]]["fit"], mean_shape) for title, models in evaluations.items()}
    for title, models in evaluations.items():
        _draw(title, models, baselines[title], folder)
    face = sets[REFERENCE_SET][0]
    sample = crop(face.image(), square_box(face_box(face.points)), 96)
    values = {
        "models": {name: _measured(name, evaluations, sample, device) for name in names},
        "mean shape": {title: baseline.summaries() for title, baseline in baselines.items()},
        "published": {"source": SOURCE, "median": PUBLISHED},
        "peers": {"source": "measured by the owners of this project on LFPW test", "median": PEERS},
        "faces": {
            title: {name: methods["fit"].by_face() for name, methods in models.items()}
            for title, models in evaluations.items()
        },
    }
    write_whole(folder / "report.json", (json.dumps(values, indent=1) + "\n").encode())
    write_whole(folder / MEASURED, (json.dumps(values["models"], indent=1) + "\n").encode())
    write_whole(folder / "accuracy.md", accuracy_table(values).encode())
    return values


def _draw(title: str, models: dict[str, dict[str, Evaluation]], baseline: Evaluation, folder: Path) -> None:
    """Curves of all models on a test set, and a contact sheet of each."""
    stem = title.lower().replace(" ", "-")
    published = PUBLISHED if title == REFERENCE_SET else None
    curves = models | {"": {"mean shape": baseline}}
    heading = f"{title}, {len(baseline.faces)} faces"
    draw_curves(curves, folder / f"{stem}-curve.png", heading, published, "published, F = 128, LFPW + HELEN")
    for name, methods in models.items():
        draw_sheet(methods["fit"], folder / f"{stem}-{name}.png")


def _measured(
    name: str, evaluations: dict[str, dict[str, dict[str, Evaluation]]], sample: np.ndarray, device: str
) -> dict:
    """All figures of a model; speeds on other kinds of devices stay, as long as the weights do."""
    path = weights_path(name)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    known = path.with_name(MEASURED)
    before = json.loads(known.read_text(encoding="utf-8")).get(name, {}) if known.is_file() else {}
    engine = engine_for(name, device, "auto")
    entry = {"faces_per_second": round(faces_per_second(engine, sample), 1), "machine": machine_of(engine)}
    return {
        "sha256": digest,
        "bytes": path.stat().st_size,
        "percent": {
            title: {method: _rounded(evaluation.summaries()) for method, evaluation in models[name].items()}
            for title, models in evaluations.items()
        },
        "speed": (before["speed"] if before.get("sha256") == digest else {}) | {engine.device.type: entry},
    }


def faces_per_second(engine: Engine, sample: np.ndarray, seconds: float = 2.0) -> float:
    """How many crops `predict` reads in a second, one after the other: one over the median time of a call.

    Args:
        sample: (S, S) uint8.
    """
    predict(sample, model=engine)
    times, start = [], time.perf_counter()
    while not times or time.perf_counter() - start < seconds:
        began = time.perf_counter()
        predict(sample, model=engine)
        times.append(time.perf_counter() - began)
    return 1 / float(np.median(times))


def machine_of(engine: Engine) -> str:
    """What an engine computes on, for people."""
    name = torch.cuda.get_device_name(engine.device) if engine.device.type == "cuda" else cpu_name()
    return f"{name}, {engine.precision}, PyTorch {torch.__version__}"


def cpu_name() -> str:
    """Model, cores and flags of the processor that matter here, as `lscpu` has them where there is one."""
    if not shutil.which("lscpu"):
        return f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores"
    english = os.environ | {"LC_ALL": "C"}
    text = subprocess.run(["lscpu"], capture_output=True, text=True, check=True, env=english).stdout
    fields = dict(line.split(":", 1) for line in text.splitlines() if ":" in line)
    flags = set(fields.get("Flags", "").split())
    extras = [flag for flag in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if flag in flags]
    return f"{fields.get('Model name', platform.machine()).strip()}, {os.cpu_count()} cores, {' '.join(extras)}"


def accuracy_table(values: dict) -> str:
    """Markdown: errors and speed of all models, the mean shape, the paper's figures and the peers'.

    Args:
        values: of `write_report`.
    """
    models = values["models"]
    heads = ["", "size"]
    for title, row in values["mean shape"].items():
        heads += [f"{title}, {_all_points(row)['faces']} faces", "failures"]
    machines = dict(sorted((d, speed["machine"]) for entry in models.values() for d, speed in entry["speed"].items()))
    heads += [f"faces/s, {device}" for device in machines]
    rows = []
    for name, entry in models.items():
        speeds = (entry["speed"].get(device) for device in machines)
        speeds = [f"{speed['faces_per_second']:,.0f}" if speed else "" for speed in speeds]
        fit, maxima = (
            [cell for methods in entry["percent"].values() for cell in _cells(methods[method])]
            for method in ("fit", "heatmap maxima")
        )
        rows.append([f"**{name}**, with the fit", f"{entry['bytes'] / 1e6:.1f} MB", *fit, *speeds])
        rows.append(["heatmap maxima", "", *maxima])
    mean_shape = [cell for row in values["mean shape"].values() for cell in _cells(row)]
    rows.append(["the mean face put into the box", "", *mean_shape])
    for method, label in (("fit", "with the fit"), ("heatmap maxima", "without")):
        rows.append([f"*published:* the paper's F = 128, {label}, LFPW + HELEN", "", _pair(PUBLISHED[method])])
        rows[-1].append(PUBLISHED_FAILURES[method])
    note = ERRORS_NOTE.format(machines="; ".join(f"{d}: {machine}" for d, machine in machines.items()), source=SOURCE)
    peers = _table(list(PEERS), [[_pair(medians) for medians in PEERS.values()]])
    paragraphs = (_table(heads, rows), textwrap.fill(note, 120), textwrap.fill(PEERS_NOTE, 120), peers)
    return "\n\n".join(paragraphs) + "\n"


def put_into_readme(readme: Path, table: str) -> None:
    """Replace what stands between the two lines of `MARKERS`.

    Raises:
        ValueError: a file without them.
    """
    before, after = around_markers(readme)
    write_whole(readme, (before + table + after).encode())


def around_markers(readme: Path) -> tuple[str, str]:
    """A README up to the first of `MARKERS` and from the second one on, which are included.

    Raises:
        ValueError: a file without them.
    """
    text = Path(readme).read_text(encoding="utf-8")
    before, opening, rest = text.partition(MARKERS[0])
    _, closing, after = rest.partition(MARKERS[1])
    if not closing:
        raise ValueError(f"{readme}: expected the lines {' and '.join(map(str.strip, MARKERS))}, got none")
    return before + opening, closing + after


def _rounded(summaries: dict[str, dict[str, float]]) -> dict[str, dict[str, float]]:
    """Figures that mean something: a file under version control need not change in the twelfth digit."""
    return {points: {key: round(value, 3) for key, value in row.items()} for points, row in summaries.items()}


def _all_points(row: dict[str, dict]) -> dict:
    return next(iter(row.values()))


def _cells(row: dict[str, dict]) -> list[str]:
    """Medians and number of failures."""
    counted = _all_points(row)
    return [_pair([points["median"] for points in row.values()]), f"{counted['failures'] * counted['faces'] / 100:.0f}"]


def _pair(medians: list[float] | tuple[float, float]) -> str:
    return " / ".join(f"{median:.2f}" for median in medians)


def _table(heads: list[str], rows: list[list[str]]) -> str:
    """Markdown; short rows are filled up with empty cells."""
    lines = (heads, ["---"] * len(heads), *([*row, *[""] * (len(heads) - len(row))] for row in rows))
    return "\n".join("|" + "".join(f" {cell} |" if cell else " |" for cell in line) for line in lines)
