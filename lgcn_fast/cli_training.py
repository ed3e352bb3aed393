"""The commands that train: `lgcn-fast prepare | train | fit-shape`."""

import argparse
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from .config import LOSSES, LGCNConfig
from .crops import read_cache, training_shapes, write_cache
from .datasets import read_background, read_faces, read_shapes
from .files import same_file
from .recipes import RECIPES
from .shape import ShapeModel
from .training import Trainer
from .training_options import TrainingOptions

NETWORKS = ("nano", "nano-96", "nano-128", "finder", "16", "32", "64", "128")


def add_command(commands, run: Callable[[argparse.Namespace], int], text: str) -> argparse.ArgumentParser:
    """A command named like the function that runs it."""
    parser = commands.add_parser(run.__name__.removeprefix("_run_").replace("_", "-"), help=text, description=text)
    parser.set_defaults(run=run)
    return parser


def add_prepare(commands) -> None:
    parser = add_command(commands, _run_prepare, "Cut all faces of some data sets out into one file for training.")
    parser.add_argument("faces", type=Path, nargs="+", help="folder with .pts files, or a .csv file")
    parser.add_argument("--background", type=Path, nargs="+", default=[], help="folders of pictures without faces")
    parser.add_argument("--out", type=Path, required=True, help="the .npz file to write")
    parser.add_argument("--color", action="store_true", help="RGB instead of grayscale")


def _run_prepare(options: argparse.Namespace) -> int:
    paths = {path.resolve(): path for path in [*options.faces, *options.background]}
    if len(paths) < len(options.faces) + len(options.background):
        raise ValueError(f"faces: expected each set once, got some twice beside {', '.join(map(str, paths.values()))}")
    _check_not_read(options.out, options.out, paths.values())
    sets = {str(path): read_faces(path) for path in options.faces}
    sets |= {str(path): read_background(path) for path in options.background}
    for name, members in sets.items():
        print(f"{name}: {len(members)} {'faces' if Path(name) in options.faces else 'pictures'}")
    options.out.parent.mkdir(parents=True, exist_ok=True)
    count = write_cache(options.out, sets, options.color, lambda faces: tqdm(faces, "crops", disable=None))
    print(f"{options.out}: {count} crops, {options.out.stat().st_size / 1e6:.1f} MB")
    return 0


def add_train(commands) -> None:
    text = "Train a network; the same command takes an interrupted training up again."
    parser = add_command(commands, _run_train, text)
    parser.add_argument("cache", type=Path, help="file from `lgcn-fast prepare`")
    parser.add_argument("--out", type=Path, required=True, help="folder of the run")
    parser.add_argument(
        "--network",
        choices=NETWORKS,
        default="nano",
        help="the light network (64 filters, or more), one that looks for faces, or the paper's with so many filters",
    )
    parser.add_argument(
        "--recipe",
        choices=RECIPES,
        default="fast",
        help="fast (default), polish (the end of a training, with --init), paper (SGD), scene (for finders)",
    )
    parser.add_argument("--init", type=Path, help="weights to start from, of fewer filters or for other landmarks too")
    parser.add_argument("--teacher", type=Path, help="weights of a better model, to learn from its heatmaps as well")
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
    parser.add_argument("--dropout", type=float, metavar="SHARE", help="of activations; default: the network's own")
    parser.add_argument("--batch-size", type=int, help="faces a step; default: the recipe's; 32 for a GPU")
    parser.add_argument("--repeats", type=int, help="draws of each face an epoch; default: the recipe's; 4 for a GPU")
    warp = "draw faces of other shapes, by so much of the modes' deviations; 0.5 for few faces or large networks"
    parser.add_argument("--warp", type=float, default=0.0, metavar="SHARE", help=warp)
    losses = [name.replace("_", "-") for name in LOSSES]
    parser.add_argument("--loss", choices=losses, default=losses[0], help=f"default: {losses[0]}")
    parser.add_argument("--seed", type=int, default=0, help="of all random numbers (default: 0)")
    parser.add_argument("--device", default="auto", help="cpu, cuda, or auto: a GPU where there is one")
    parser.add_argument("--amp", action=argparse.BooleanOptionalAction, help="bf16 autocast; default: where it is fast")
    parser.add_argument("--compile", action="store_true", help="for long runs on a GPU: quicker steps; needs gcc")
    parser.add_argument("--workers", type=int, default=0, help="processes that prepare batches")


def _run_train(options: argparse.Namespace) -> int:
    cache = read_cache(options.cache)
    changes = {} if options.dropout is None else {"dropout": options.dropout}
    loss = options.loss.replace("-", "_")
    asked = {"batch_size": options.batch_size, "repeats": options.repeats}
    recipe = replace(RECIPES[options.recipe], **{name: value for name, value in asked.items() if value is not None})
    recipe = replace(recipe, augmentation=replace(recipe.augmentation, warp=options.warp))
    training = TrainingOptions(
        config=_network(
            options.network, num_landmarks=cache.num_landmarks, in_channels=cache.channels, loss=loss, **changes
        ),
        recipe=recipe,
        epochs=options.epochs,
        init=options.init,
        teacher=options.teacher,
        seed=options.seed,
        shares=dict(options.share),
        device=options.device,
        amp=options.amp,
        compiled=options.compile,
        workers=options.workers,
    )
    trainer = Trainer(cache, options.out, training)
    print(f"{options.out}: {len(trainer.chosen)} crops to train on, {len(trainer.validation)} faces to validate with")
    finished = trainer.run(options.time_budget)
    print(f"{options.out}: {'finished' if finished else 'not finished; the same command goes on'}")
    return 0


def _network(name: str, num_landmarks: int, **changes: Any) -> LGCNConfig:
    light = {"nano": LGCNConfig.nano, "finder": LGCNConfig.finder}
    kind, _, filters = name.partition("-")
    if kind not in light:
        return LGCNConfig(num_landmarks=num_landmarks, filters=int(name), side_channels=num_landmarks, **changes)
    if filters:
        changes["filters"] = int(filters)
    return light[kind](num_landmarks=num_landmarks, **changes)


def add_fit_shape(commands) -> None:
    parser = add_command(commands, _run_fit_shape, "Learn the shape model that predictions are fitted with.")
    parser.add_argument("cache", type=Path, help="file from `lgcn-fast prepare`; its validation faces are left out")
    parser.add_argument(
        "--sets", nargs="+", type=_set_name, metavar="SET", help="sets of the cache to learn from; default: all"
    )
    parser.add_argument("--shapes", type=Path, nargs="+", default=[], metavar="NPZ",
                        help="more shapes: .npz files with `landmarks` (M, N, 2)")  # fmt: skip
    parser.add_argument("--modes", type=int, default=20, help="number of principal components (default: 20)")
    parser.add_argument("--out", type=Path, required=True, help="the .safetensors file; a picture goes beside it")


def _run_fit_shape(options: argparse.Namespace) -> int:
    picture = options.out.with_suffix(".png")
    if options.out == picture:
        raise ValueError(f"--out: expected the .safetensors file, beside which the picture goes, got {options.out}")
    for written in (options.out, picture):
        _check_not_read(options.out, written, [options.cache, *options.shapes])
    shapes = training_shapes(read_cache(options.cache), options.sets)
    shapes = np.concatenate([shapes, *(read_shapes(path, shapes.shape[1]) for path in options.shapes)])
    model = ShapeModel.fit(shapes, options.modes)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    model.save(options.out)
    model.draw(picture)
    print(f"{options.out}: {len(model.modes)} modes of {(~np.isnan(shapes).any((1, 2))).sum()} shapes")
    return 0


def _check_not_read(out: Path, written: Path, read: Iterable[Path]) -> None:
    if any(same_file(written, path) for path in read):
        raise ValueError(f"--out: expected another file than those that are read, got {out}")


def _set_name(text: str) -> str:
    """A set as `prepare` names it, where there may be a slash behind a folder or `./` in front of it."""
    return str(Path(text))


def _share(text: str) -> tuple[str, float]:
    name, _, share = text.rpartition("=")
    try:
        return _set_name(name), float(share)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected SET=SHARE with a number, got {text!r}") from None
