"""The command line: `lgcn-fast predict | demo | prepare | train | evaluate`."""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

from tqdm import tqdm

from .config import LOSSES, LGCNConfig
from .recipes import RECIPES

NETWORKS: dict[str, Callable[..., LGCNConfig]] = {
    "nano": LGCNConfig.nano,
    **{str(f): lambda f=f, **changes: LGCNConfig(filters=f, side_channels=changes["num_landmarks"], **changes)
       for f in (128, 64, 32, 16)},
}  # fmt: skip


def main(arguments: list[str] | None = None) -> int:
    """Run the command line.

    Returns:
        The exit code: 0, or 2 where some input could not be used; what was wrong is on standard error.
    """
    options = _parser().parse_args(arguments)
    try:
        return options.run(options)
    except ValueError as error:
        print(f"lgcn-fast {options.command}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


def _prepare(options: argparse.Namespace) -> int:
    from .crops import write_cache
    from .datasets import read_background, read_faces

    sets = {str(path): read_faces(path) for path in options.faces}
    sets |= {str(path): read_background(path) for path in options.background}
    options.out.parent.mkdir(parents=True, exist_ok=True)
    count = write_cache(options.out, sets, options.color, lambda faces: tqdm(faces, "crops", disable=None))
    print(f"{options.out}: {count} crops, {options.out.stat().st_size / 1e6:.1f} MB")
    return 0


def _train(options: argparse.Namespace) -> int:
    from .crops import read_cache
    from .training import Trainer, TrainingOptions

    cache = read_cache(options.cache)
    config = NETWORKS[options.network](
        num_landmarks=cache.num_landmarks, in_channels=cache.channels, loss=options.loss.replace("-", "_")
    )
    training = TrainingOptions(
        config=config,
        recipe=RECIPES[options.recipe],
        epochs=options.epochs,
        seed=options.seed,
        shares=dict(options.share),
        device=options.device,
        amp=options.amp,
        workers=options.workers,
    )
    finished = Trainer(cache, options.out, training).run(options.time_budget)
    print(f"{options.out}: {'finished' if finished else 'not finished; the same command goes on'}")
    return 0


def _share(text: str) -> tuple[str, float]:
    name, _, share = text.rpartition("=")
    return name, float(share)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="lgcn-fast", description="Facial landmarks with the LGCN (CVPR 2018).")
    commands = parser.add_subparsers(dest="command", required=True)

    def command(name: str, run: Callable[[argparse.Namespace], int], text: str) -> argparse.ArgumentParser:
        added = commands.add_parser(name, help=text, description=text)
        added.set_defaults(run=run)
        return added

    prepare = command("prepare", _prepare, "Cut all faces of some data sets out into one file for training.")
    prepare.add_argument("faces", type=Path, nargs="+", help="folder with .pts files, or a .csv file")
    prepare.add_argument("--background", type=Path, nargs="+", default=[], help="folders of pictures without faces")
    prepare.add_argument("--out", type=Path, required=True, help="the .npz file to write")
    prepare.add_argument("--color", action="store_true", help="RGB instead of grayscale")

    train = command("train", _train, "Train a network; the same command takes an interrupted training up again.")
    train.add_argument("cache", type=Path, help="file from `lgcn-fast prepare`")
    train.add_argument("--out", type=Path, required=True, help="folder of the run")
    train.add_argument("--network", choices=NETWORKS, default="nano", help="nano, or the number of filters")
    train.add_argument("--recipe", choices=RECIPES, default="fast")
    train.add_argument("--epochs", type=int, help="default: what fits the time budget, or the recipe's number")
    train.add_argument("--time-budget", type=float, metavar="MINUTES", help="stop this call in time, to be taken up")
    train.add_argument("--share", type=_share, action="append", default=[], metavar="SET=SHARE",
                       help="share of a set that each epoch draws, e.g. faces/noisy.csv=0.25")  # fmt: skip
    train.add_argument("--loss", choices=[name.replace("_", "-") for name in LOSSES], default="squared-error")
    train.add_argument("--seed", type=int, default=0)
    train.add_argument("--device", default="cpu", help="cpu or cuda")
    train.add_argument("--amp", action=argparse.BooleanOptionalAction, default=True, help="bf16 autocast")
    train.add_argument("--workers", type=int, default=0, help="processes that prepare batches")
    return parser
