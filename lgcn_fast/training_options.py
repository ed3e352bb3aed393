"""What a training run is asked for, and whether a crop cache is fit for it."""

from dataclasses import dataclass, field
from pathlib import Path

from .config import LGCNConfig
from .crops import CropCache
from .landmarks import SCHEMES
from .recipes import Recipe


@dataclass(frozen=True)
class TrainingOptions:
    """What a training run is made of besides the crop cache; written into the weights' metadata."""

    config: LGCNConfig
    recipe: Recipe
    epochs: int | None = None
    """Length of the schedule. None: what fits `time_budget`, or the recipe's number."""
    init: Path | None = None
    """Weights of a trained model to start from, of a narrower one or for other landmarks too; None: random ones."""
    teacher: Path | None = None
    """Weights of a better model: half of the loss is against its heatmaps, the other half against the labels."""
    seed: int = 0
    shares: dict[str, float] = field(default_factory=dict)
    """Share of a set (as named in the cache) that an epoch draws, where it is not all."""
    device: str = "cpu"
    amp: bool | None = None
    """bf16 autocast. None: on a GPU, and on a processor that has instructions for it; elsewhere it is slow."""
    compiled: bool = False
    """Compile what follows each convolution (`torch.compile`)."""
    workers: int = 0
    """Processes that prepare batches; 0: none beside this one."""


def check_cache(cache: CropCache, options: TrainingOptions) -> None:
    """Raise ValueError where a crop cache does not fit the options."""
    config = options.config
    if cache.num_landmarks != config.num_landmarks:
        raise ValueError(f"num_landmarks: expected the cache's {cache.num_landmarks}, got {config.num_landmarks}")
    if cache.num_landmarks not in SCHEMES:
        known = " or ".join(map(str, sorted(SCHEMES)))
        raise ValueError(
            f"num_landmarks: expected {known}, or an entry in `landmarks.SCHEMES`, got {cache.num_landmarks}"
        )
    if cache.channels != config.in_channels:
        raise ValueError(f"in_channels: expected the cache's {cache.channels}, got {config.in_channels}")
    unknown = options.shares.keys() - set(cache.sets.tolist())
    if unknown or not all(0 <= share <= 1 for share in options.shares.values()):
        known = ", ".join(sorted(set(cache.sets.tolist())))
        raise ValueError(f"shares: expected numbers in 0..1 for sets among {known}, got {options.shares}")
    if not 0 <= options.seed < 2**32:
        raise ValueError(f"seed: expected 0 to 2**32 - 1, got {options.seed}")
    if options.workers < 0:
        raise ValueError(f"workers: expected 0 or more, got {options.workers}")
    if options.epochs is not None and options.epochs < 1:
        raise ValueError(f"epochs: expected at least 1, got {options.epochs}")


def check_faces(training: int, validation: int, groups: int) -> None:
    """Raise ValueError where there is nothing to learn from, or nothing to measure with.

    Args:
        groups: number of photos and persons that the faces are of, see `datasets.group_of`.
    """
    if not training or not validation:
        expected = (
            "labelled faces to train on and others, a tenth of the photos or persons by the hash of their names, whose "
            "outer eye corners are labelled, to validate with"
        )
        kinds = f"by their names of {groups} photos or persons: NAME_1 and NAME_12 belong together"
        remedy = "with few faces, rename some or add more; sets of share 0 do not count"
        raise ValueError(f"cache: expected {expected}, got {training} and {validation} ({kinds}); {remedy}")
