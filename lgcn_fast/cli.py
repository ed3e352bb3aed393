"""The command line: `lgcn-fast predict | demo | evaluate | prepare | train | fit-shape | bench`."""

import argparse
import csv
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
from tqdm import tqdm

from .checkpoints import load_card
from .config import LOSSES, LGCNConfig
from .crops import read_cache, training_shapes, write_cache
from .datasets import read_background, read_faces, read_shapes
from .drawing import draw_landmarks
from .evaluation import evaluate, report, with_mean_shape
from .images import read_image
from .prediction import DEFAULT_WEIGHTS, predict
from .recipes import RECIPES
from .shape import ShapeModel
from .training import Trainer, TrainingOptions

DEMO_BOX = (82, 70, 124, 124)
"""The face in demo.jpg (Eileen Collins, NASA, public domain)."""
PICTURE_SIZE = 600
"""Smaller pictures are enlarged to about this many pixels before landmarks are drawn."""
BENCHMARKS = ("kernel_convolution", "network", "peaks", "fit", "end_to_end")
NETWORKS = ("nano", "16", "32", "64", "128")


def main(arguments: list[str] | None = None) -> int:
    """Run the command line.

    Returns:
        The exit code: 0, or 2 where some input could not be used; what was wrong is on standard error.
    """
    parser = argparse.ArgumentParser(prog="lgcn-fast", description="Facial landmarks with the LGCN (CVPR 2018).")
    commands = parser.add_subparsers(dest="command", required=True)
    for add in (_add_predict, _add_demo, _add_evaluate, _add_prepare, _add_train, _add_fit_shape, _add_bench):
        add(commands)
    options = parser.parse_args(arguments)
    try:
        return options.run(options)
    except (ValueError, OSError) as error:
        print(f"lgcn-fast {options.command}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


def _add_command(commands, run: Callable[[argparse.Namespace], int], text: str) -> argparse.ArgumentParser:
    parser = commands.add_parser(run.__name__.removeprefix("_run_").replace("_", "-"), help=text, description=text)
    parser.set_defaults(run=run)
    return parser


def _add_predict(commands) -> None:
    parser = _add_command(commands, _run_predict, "Landmarks of the face in each picture, drawn and as numbers.")
    parser.add_argument("files", type=Path, nargs="+", metavar="FILE")
    parser.add_argument(
        "--box", type=_box, metavar="X,Y,W,H", help="the face in pixels, in every file; default: the whole picture"
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for pictures and numbers")
    parser.add_argument("--format", choices=["json", "csv"], default="json", help="of the numbers")
    _add_model_options(parser)
    parser.add_argument("--fit", action=argparse.BooleanOptionalAction, default=True, help="the shape fit")
    parser.add_argument("--device", default="auto", help="cpu, cuda or auto")


def _add_model_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", type=Path, default=DEFAULT_WEIGHTS, help="weights; default: those of the package")
    parser.add_argument("--shape", type=Path, help="shape model; default: the package's for the model's landmarks")


def _run_predict(options: argparse.Namespace) -> int:
    options.out.mkdir(parents=True, exist_ok=True)
    found = {}
    for path in options.files:
        try:
            image = read_image(path, color=True)
            boxes = [options.box] if options.box else None
            result = predict(image, boxes, options.model, options.fit, options.shape, options.device)
        except ValueError as error:
            # The other files are not at fault.
            message = str(error) if str(path) in str(error) else f"{path}: {error}"
            print(f"lgcn-fast predict: {message}", file=sys.stderr)
            continue
        picture = _free_name(path.stem, {entry["picture"] for entry in found.values()})
        _write_picture(options.out / picture, image, result.points)
        points, scores = result.points[0].round(3).tolist(), result.scores[0].round(4).tolist()
        found[str(path)] = {"picture": picture, "points": points, "scores": scores}
    if found:
        numbers = options.out / f"landmarks.{options.format}"
        (_write_csv if options.format == "csv" else _write_json)(numbers, found)
        print(f"{numbers}: landmarks of {len(found)} of {len(options.files)} files")
    return 0 if len(found) == len(set(map(str, options.files))) else 2


def _free_name(stem: str, taken: set[str]) -> str:
    """Name of a picture: files of the same name in different folders must not overwrite each other."""
    name, number = f"{stem}_landmarks.png", 2
    while name in taken:
        name, number = f"{stem}_{number}_landmarks.png", number + 1
    return name


def _write_picture(path: Path, image: np.ndarray, points: np.ndarray) -> None:
    """Draw landmarks; small pictures are enlarged so that one can see something."""
    zoom = max(round(PICTURE_SIZE / max(image.shape[:2])), 1)
    if zoom > 1:
        image = cv2.resize(image, None, fx=zoom, fy=zoom, interpolation=cv2.INTER_CUBIC)
    drawn = draw_landmarks(image, (points + 0.5) * zoom - 0.5)
    if not cv2.imwrite(str(path), cv2.cvtColor(drawn, cv2.COLOR_RGB2BGR)):
        raise OSError(f"{path}: the picture could not be written")


def _write_json(path: Path, found: dict[str, dict]) -> None:
    path.write_text(json.dumps(found, indent=1))


def _write_csv(path: Path, found: dict[str, dict]) -> None:
    """The points as `lgcn-fast prepare` reads them."""
    count = len(next(iter(found.values()))["points"])
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["image", *(f"{axis}{i}" for i in range(count) for axis in "xy")])
        for name, entry in found.items():
            writer.writerow([name, *(value for point in entry["points"] for value in point)])


def _add_demo(commands) -> None:
    parser = _add_command(commands, _run_demo, "Landmarks of a picture that comes with the package.")
    parser.add_argument("--out", type=Path, default=Path("lgcn-demo.png"))


def _run_demo(options: argparse.Namespace) -> int:
    image = read_image(Path(__file__).with_name("demo.jpg"), color=True)
    result = predict(image, [DEMO_BOX])
    options.out.parent.mkdir(parents=True, exist_ok=True)
    _write_picture(options.out, image, result.points)
    print(f"{options.out}: {result.points.shape[1]} landmarks, mean score {result.scores.mean():.2f}")
    return 0


def _add_evaluate(commands) -> None:
    parser = _add_command(commands, _run_evaluate, "Errors of a model on labelled faces: numbers, curve, pictures.")
    parser.add_argument("faces", type=Path, nargs="+", help="folder with .pts files, or a .csv file")
    parser.add_argument("--out", type=Path, required=True, help="folder for the report")
    _add_model_options(parser)
    parser.add_argument("--normalisation", choices=["inter-ocular", "face-size"], default="inter-ocular")


def _run_evaluate(options: argparse.Namespace) -> int:
    faces = [face for path in options.faces for face in read_faces(path)]
    evaluations = {
        "fit": evaluate(faces, options.model, options.normalisation, fit=True, shape=options.shape),
        "heatmap maxima": evaluate(faces, options.model, options.normalisation, fit=False),
    }
    mean_shape = load_card(options.model).get("mean_shape")
    if mean_shape is not None:
        evaluations["mean shape"] = with_mean_shape(evaluations["fit"], np.array(mean_shape))
    values = report(evaluations, options.out)
    print(f"{'':<28}{'faces':>7}{'median':>9}{'mean':>9}{'failures':>10}{'AUC':>8}   [%, {options.normalisation}]")
    for name, row in values["percent"].items():
        numbers = f"{row['median']:>9.2f}{row['mean']:>9.2f}{row['failures']:>10.2f}{row['auc']:>8.1f}"
        print(f"{name:<28}{row['faces']:>7}{numbers}")
    print(f"{options.out}: evaluation.json, curve.png, sheet.png")
    return 0


def _add_prepare(commands) -> None:
    parser = _add_command(commands, _run_prepare, "Cut all faces of some data sets out into one file for training.")
    parser.add_argument("faces", type=Path, nargs="+", help="folder with .pts files, or a .csv file")
    parser.add_argument("--background", type=Path, nargs="+", default=[], help="folders of pictures without faces")
    parser.add_argument("--out", type=Path, required=True, help="the .npz file to write")
    parser.add_argument("--color", action="store_true", help="RGB instead of grayscale")


def _run_prepare(options: argparse.Namespace) -> int:
    sets = {str(path): read_faces(path) for path in options.faces}
    sets |= {str(path): read_background(path) for path in options.background}
    options.out.parent.mkdir(parents=True, exist_ok=True)
    count = write_cache(options.out, sets, options.color, lambda faces: tqdm(faces, "crops", disable=None))
    print(f"{options.out}: {count} crops, {options.out.stat().st_size / 1e6:.1f} MB")
    return 0


def _add_train(commands) -> None:
    text = "Train a network; the same command takes an interrupted training up again."
    parser = _add_command(commands, _run_train, text)
    parser.add_argument("cache", type=Path, help="file from `lgcn-fast prepare`")
    parser.add_argument("--out", type=Path, required=True, help="folder of the run")
    parser.add_argument("--network", choices=NETWORKS, default="nano", help="nano, or the number of filters")
    parser.add_argument("--recipe", choices=RECIPES, default="fast")
    parser.add_argument("--init", type=Path, help="weights to start from instead of random ones")
    parser.add_argument("--epochs", type=int, help="default: what fits the time budget, or the recipe's number")
    parser.add_argument("--time-budget", type=float, metavar="MINUTES", help="stop this call in time, to be taken up")
    parser.add_argument(
        "--share",
        type=_share,
        action="append",
        default=[],
        metavar="SET=SHARE",
        help="share of a set, named as in `prepare`, that each epoch draws",
    )
    parser.add_argument("--loss", choices=[name.replace("_", "-") for name in LOSSES], default="squared-error")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="auto", help="cpu, cuda or auto")
    parser.add_argument("--amp", action=argparse.BooleanOptionalAction, default=True, help="bf16 autocast")
    parser.add_argument("--workers", type=int, default=0, help="processes that prepare batches")


def _run_train(options: argparse.Namespace) -> int:
    cache = read_cache(options.cache)
    training = TrainingOptions(
        config=_network(options.network, cache.num_landmarks, cache.channels, options.loss.replace("-", "_")),
        recipe=RECIPES[options.recipe],
        epochs=options.epochs,
        init=options.init,
        seed=options.seed,
        shares=dict(options.share),
        device=options.device,
        amp=options.amp,
        workers=options.workers,
    )
    finished = Trainer(cache, options.out, training).run(options.time_budget)
    print(f"{options.out}: {'finished' if finished else 'not finished; the same command goes on'}")
    return 0


def _network(name: str, num_landmarks: int, in_channels: int, loss: str) -> LGCNConfig:
    common = {"num_landmarks": num_landmarks, "in_channels": in_channels, "loss": loss}
    if name == "nano":
        return LGCNConfig.nano(**common)
    return LGCNConfig(filters=int(name), side_channels=num_landmarks, **common)


def _add_fit_shape(commands) -> None:
    parser = _add_command(commands, _run_fit_shape, "Learn the shape model that predictions are fitted with.")
    parser.add_argument("cache", type=Path, help="file from `lgcn-fast prepare`; its validation faces are left out")
    parser.add_argument("--sets", nargs="+", metavar="SET", help="sets of the cache to learn from; default: all")
    parser.add_argument("--shapes", type=Path, nargs="+", default=[], metavar="NPZ",
                        help="more shapes: .npz files with `landmarks` (M, N, 2)")  # fmt: skip
    parser.add_argument("--modes", type=int, default=20, help="number of principal components")
    parser.add_argument("--out", type=Path, required=True, help="the .safetensors file; a picture goes beside it")


def _run_fit_shape(options: argparse.Namespace) -> int:
    shapes = training_shapes(read_cache(options.cache), options.sets)
    shapes = np.concatenate([shapes, *(read_shapes(path, shapes.shape[1]) for path in options.shapes)])
    model = ShapeModel.fit(shapes, options.modes)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    model.save(options.out)
    model.draw(options.out.with_suffix(".png"))
    print(f"{options.out}: {len(model.modes)} modes of {len(shapes)} shapes")
    return 0


def _add_bench(commands) -> None:
    parser = _add_command(commands, _run_bench, "Run all benchmarks of a checkout and write their results as JSON.")
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


def _share(text: str) -> tuple[str, float]:
    name, _, share = text.rpartition("=")
    try:
        return name, float(share)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected SET=SHARE with a number, got {text!r}") from None
