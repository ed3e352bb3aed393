"""The command line: `lgcn-fast predict | demo | models | export | evaluate | report | bench`; more in `cli_*.py`."""

import argparse
import csv
import json
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from io import StringIO, TextIOWrapper
from pathlib import Path

import cv2
import numpy as np

from . import __version__, checkpoints
from .checkpoints import load_card, load_header, weights_path
from .cli_photos import (
    add_detect,
    add_detection_options,
    add_device_option,
    add_engine_options,
    add_model_options,
    add_style_option,
    engine_of,
    found_in,
    free_name,
    names_in,
    rounded,
    run_multiface,
)
from .cli_training import add_command, add_fit_shape, add_prepare, add_train
from .cli_video import add_video, add_webcam
from .datasets import read_faces
from .drawing import draw
from .engine import Engine, engine_device
from .evaluation import evaluate, with_mean_shape
from .export import FORMATS, export
from .files import write_whole
from .images import read_image, write_image
from .loading import packaged_shape, shape_for
from .prediction import Landmarks, predict
from .report import accuracy_table, around_markers, put_into_readme, write_evaluation, write_report
from .shipped import MEASURED, default_model, models

DEMO_BOX = (93, 79, 108, 108)
"""The face in demo.jpg (Eileen Collins, NASA, public domain)."""
DOUBTFUL = 0.5
"""Mean scores below it make one ask whether there is a face. Of 260 validation pictures, each taken for one face as it
is and looked at in two passes of lgcn-nano-128, 71 of the 87 with errors above 10 % have less, and 2 of the others; of
150 pictures without faces, 149."""
PICTURE_SIZE = 600
"""Smaller pictures are enlarged to about this many pixels before landmarks are drawn."""
FINISHING = ("predict", "detect", "video", "webcam")
"""Commands that have files to finish whenever they end; training has what it needs after each epoch."""
OF_BOXES, OF_PHOTOS = ("ensemble", "normalisation"), ("finder", "min_face", "min_confidence", "any_angle")
"""What `evaluate` knows for faces in their boxes only, and with `--multiface` only."""
BENCHMARKS = ("kernel_convolution", "network", "peaks", "fit", "end_to_end", "detection")


def main(arguments: list[str] | None = None) -> int:
    """Run the command line.

    Returns:
        The exit code: 0; 2 where some input could not be used (standard error says what was wrong); 130 after Ctrl-C.
    """
    parser = argparse.ArgumentParser(prog="lgcn-fast", description="Facial landmarks with the LGCN (CVPR 2018).")
    parser.add_argument("--version", action="version", version=f"lgcn_fast {__version__}")
    commands = parser.add_subparsers(dest="command", required=True)
    predicting = (_add_predict, add_detect, add_video, add_webcam, _add_demo, _add_models)
    training = (add_prepare, add_train, add_fit_shape)
    for add in (*predicting, *training, _add_export, _add_evaluate, _add_report, _add_bench):
        add(commands)
    options = parser.parse_args(arguments)
    if isinstance(sys.stdout, TextIOWrapper) and sys.stdout.errors == "strict":
        sys.stdout.reconfigure(errors="backslashreplace")  # file names need not be UTF-8
    try:
        with _finished_when_terminated() if options.command in FINISHING else nullcontext():
            return options.run(options)
    except (ValueError, OSError, FloatingPointError, MemoryError) as error:
        print(f"lgcn-fast {options.command}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


@contextmanager
def _finished_when_terminated() -> Iterator[None]:
    """What SIGTERM ends (`timeout`, `docker stop`, batch queues), or a terminal that is closed, finishes its files, as
    after Ctrl-C."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    ends = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]
    # (`nohup` ignores SIGHUP.)
    before = {end: signal.getsignal(end) for end in ends if signal.getsignal(end) != signal.SIG_IGN}
    for end in before:
        signal.signal(end, signal.default_int_handler)
    try:
        yield
    finally:
        for end, handler in before.items():
            signal.signal(end, handler)


def _add_predict(commands) -> None:
    parser = add_command(commands, _run_predict, "Landmarks of the face in each picture, drawn and as numbers.")
    parser.add_argument("files", type=Path, nargs="+", metavar="FILE")
    parser.add_argument(
        "--box",
        type=_box,
        metavar="X,Y,W,H",
        help="the face in pixels, in every file (--box=-5,... where x is below 0); default: the whole picture is one "
        "face (for photos: detect)",
    )
    parser.add_argument(
        "--passes",
        type=int,
        metavar="N",
        help="2: look again, in the box around the points, turned upright (default: 1, without --box 2)",
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for pictures and numbers")
    parser.add_argument("--format", choices=["json", "csv"], default="json", help="of the numbers")
    add_style_option(parser)
    _add_prediction_options(parser)
    parser.add_argument("--fit", action=argparse.BooleanOptionalAction, default=True, help="the shape fit")


def _add_prediction_options(parser: argparse.ArgumentParser) -> None:
    add_model_options(parser)
    parser.add_argument("--ensemble", type=int, default=1, metavar="N", help="see each face N times and average")
    add_engine_options(parser)


def _run_predict(options: argparse.Namespace) -> int:
    options.files = list(dict.fromkeys(options.files))
    engine, found = engine_of(options), {}
    shape = shape_for(options.shape, engine.config.num_landmarks) if options.fit else None
    boxes = [options.box] if options.box else None
    if options.passes is None:
        options.passes = 1 if boxes else 2
    options.out.mkdir(parents=True, exist_ok=True)
    taken = names_in(options.out, options.files)

    def find(image: np.ndarray) -> Landmarks:
        return predict(image, boxes, engine, options.fit, shape, ensemble=options.ensemble, passes=options.passes)

    try:
        for path, image, result in found_in("predict", options.files, find):
            picture = free_name(path.stem, "landmarks", taken)
            _write_picture(options.out / picture, image, result, options.style, engine)
            found[str(path)] = {"picture": picture, **rounded(result.points[0], result.scores[0])}
    finally:  # also where it is interrupted, or the disk gets full
        if found:
            numbers = options.out / f"landmarks.{options.format}"
            text = _as_csv(found) if options.format == "csv" else json.dumps(found, indent=1)
            write_whole(numbers, text.encode(errors="surrogateescape"))  # (file names need not be UTF-8)
            count = f"{len(found)} of {len(options.files)} files"
            scores = [np.mean(face["scores"]) for face in found.values()]
            print(f"{numbers}: landmarks of {count}, mean score {np.mean(scores):.2f}")
            doubtful = sum(score < DOUBTFUL for score in scores)
            if doubtful and not boxes:
                where = f"mean score below {DOUBTFUL} in {doubtful} of {len(found)} pictures"
                hint = "is the whole picture one face? (For photos there is `lgcn-fast detect`.)"
                print(f"lgcn-fast predict: {where}: {hint}", file=sys.stderr)
    return 0 if len(found) == len(options.files) else 2


def _write_picture(
    path: Path,
    image: np.ndarray,
    landmarks: Landmarks,
    style: Sequence[str] = ("lines", "points"),
    engine: Engine | None = None,
) -> None:
    """Draw landmarks; small pictures are enlarged so that one can see something."""
    zoom = max(round(PICTURE_SIZE / max(image.shape[:2])), 1)
    if zoom > 1:
        image = cv2.resize(image, None, fx=zoom, fy=zoom, interpolation=cv2.INTER_CUBIC)
    write_image(path, draw(image, replace(landmarks, points=(landmarks.points + 0.5) * zoom - 0.5), style, engine))


def _as_csv(found: dict[str, dict]) -> str:
    """The points as `lgcn-fast prepare` reads them."""
    count = len(next(iter(found.values()))["points"])
    text = StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["image", *(f"{axis}{i}" for i in range(count) for axis in "xy")])
    for name, entry in found.items():
        writer.writerow([name, *(value for point in entry["points"] for value in point)])
    return text.getvalue()


def _add_demo(commands) -> None:
    parser = add_command(commands, _run_demo, "Landmarks of a picture that comes with the package.")
    parser.add_argument(
        "--out", type=Path, default=Path("lgcn-demo.png"), help="picture to write (default: lgcn-demo.png)"
    )


def _run_demo(options: argparse.Namespace) -> int:
    image = read_image(Path(__file__).with_name("demo.jpg"), color=True)
    result = predict(image, [DEMO_BOX])
    options.out.parent.mkdir(parents=True, exist_ok=True)
    _write_picture(options.out, image, result)
    print(f"{options.out}: {result.points.shape[1]} landmarks, mean score {result.scores.mean():.2f}")
    return 0


def _add_models(commands) -> None:
    add_command(commands, _run_models, "The models that ship, their size, errors and speed.")


def _run_models(options: argparse.Namespace) -> int:
    print(f"{'':<14}{'parameters':>12}{'size':>10}{'LFPW test, %':>15}{'without fit':>15}   faces/s")
    for model in models():
        errors = (" / ".join(f"{e:.2f}" for e in pair or ()) or "-" for pair in (model.error, model.error_without_fit))
        speeds = ", ".join(f"{speed:,.0f} on {device}" for device, speed in model.faces_per_second.items()) or "-"
        size = f"{model.size / 1e6:.1f} MB"
        print(f"{model.name:<14}{model.parameters:>12,}{size:>10}{''.join(f'{e:>15}' for e in errors)}   {speeds}")
    print("Medians with the outline / without it. The most accurate first, by all test sets.")
    return 0


def _add_export(commands) -> None:
    parser = add_command(commands, _run_export, "Write a network for ONNX Runtime or torch.export, and check the file.")
    add_model_options(parser)
    parser.add_argument("--format", choices=FORMATS, default="onnx", help="default: onnx")
    parser.add_argument("--out", type=Path, required=True, help="the file to write")


def _run_export(options: argparse.Namespace) -> int:
    model = options.model or default_model("cpu")
    count = load_header(weights_path(model))[0].num_landmarks
    options.out.parent.mkdir(parents=True, exist_ok=True)
    error = export(model, options.out, options.format, options.shape)
    size = options.out.stat().st_size / 1e6
    fit = "" if options.shape or packaged_shape(count) else f", without a fit of {count} landmarks (--shape)"
    print(f"{options.out}: {size:.1f} MB, heatmaps within {error:.1e} of the model's{fit}")
    return 0


def _add_evaluate(commands) -> None:
    parser = add_command(commands, _run_evaluate, "Errors of a model on labelled faces: numbers, curve, pictures.")
    parser.add_argument("faces", type=Path, nargs="+", help="folder with .pts files, or a .csv file")
    parser.add_argument("--out", type=Path, required=True, help="folder for the report")
    _add_prediction_options(parser)
    parser.add_argument("--multiface", action="store_true", help="score detect on folders with a faces.json")
    add_detection_options(parser)
    parser.add_argument(
        "--normalisation",
        choices=["inter-ocular", "face-size"],
        default="inter-ocular",
        help="what errors are shares of: the distance of the outer eye corners (default), or the face's size",
    )
    parser.set_defaults(parser=parser)


def _run_evaluate(options: argparse.Namespace) -> int:
    for name in OF_BOXES if options.multiface else OF_PHOTOS:
        if getattr(options, name) != options.parser.get_default(name):
            option, how = name.replace("_", "-"), "without" if options.multiface else "with"
            raise ValueError(f"--{option}: expected {how} --multiface, where it has a meaning")
    if options.multiface:
        return run_multiface(options)
    faces = [face for path in options.faces for face in read_faces(path)]
    model = options.model or default_model(engine_device(options.device).type)
    options.out.mkdir(parents=True, exist_ok=True)  # (rather an error now than after minutes)
    names = ("normalisation", "shape", "device", "precision", "ensemble")
    evaluations = evaluate(faces, model, **{name: getattr(options, name) for name in names})
    mean_shape = load_card(model).get("mean_shape")
    if mean_shape is not None:
        evaluations["mean shape"] = with_mean_shape(evaluations["fit"], np.array(mean_shape))
    values = write_evaluation(evaluations, options.out)
    print(f"{'':<28}{'faces':>7}{'median':>9}{'mean':>9}{'failures':>10}{'AUC':>8}   [%, {options.normalisation}]")
    for name, row in values["percent"].items():
        numbers = f"{row['median']:>9.2f}{row['mean']:>9.2f}{row['failures']:>10.2f}{row['auc']:>8.1f}"
        print(f"{name:<28}{row['faces']:>7}{numbers}")
    print(f"{options.out}: evaluation.json, curve.png, sheet.png")
    return 0


def _add_report(commands) -> None:
    parser = add_command(commands, _run_report, "Errors and speed of all models that ship: tables, curves, pictures.")
    parser.add_argument("--data", type=Path, default=Path("../shared/data"), help="folder of 300w/ and youtube/")
    parser.add_argument("--out", type=Path, required=True, help="folder for the report")
    parser.add_argument("--readme", type=Path, help="put the table between its lines <!-- accuracy -->, too")
    parser.add_argument("--ship", action="store_true", help="put the figures beside the weights, where models() looks")
    add_device_option(parser)


def _run_report(options: argparse.Namespace) -> int:
    if options.readme:
        around_markers(options.readme)  # (rather an error now than after minutes)
    table = accuracy_table(write_report(options.data, options.out, options.device))
    if options.readme:
        put_into_readme(options.readme, table)
    if options.ship:
        shutil.copy(options.out / MEASURED, checkpoints.WEIGHTS)
    print(table, end="")
    return 0


def _add_bench(commands) -> None:
    parser = add_command(commands, _run_bench, "Time a checkout on the CPU: benchmarks, their results as JSON.")
    parser.add_argument("--out", type=Path, required=True, help="folder for one file a benchmark")
    parser.add_argument("--benchmarks", type=Path, default=Path("benchmarks"), help="folder of the checkout")


def _run_bench(options: argparse.Namespace) -> int:
    scripts = [options.benchmarks / f"{name}.py" for name in BENCHMARKS]
    missing = [str(script) for script in scripts if not script.is_file()]
    if missing:
        raise ValueError(f"--benchmarks: expected the folder benchmarks/ of a checkout, but there is no {missing[0]}")
    for script in scripts:
        print(f"\n{script}", flush=True)
        if subprocess.run([sys.executable, script, "--out", options.out]).returncode:
            raise ValueError(f"{script}: failed, see above")
    return 0


def _box(text: str) -> tuple[float, ...]:
    try:
        x, y, width, height = (float(word) for word in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected four numbers x,y,width,height, got {text!r}") from None
    return x, y, width, height
