"""Batches for training: which crops an epoch draws, and the augmented crop behind each key."""

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from .augmentation import Augmentation, augment
from .crops import CropCache, training_shapes
from .landmarks import SCHEMES
from .shape import ShapeModel


class AugmentedCrops(Dataset):
    """Crops of a cache by (draw, index): the same key always gives the same augmented crop."""

    def __init__(
        self,
        cache: CropCache,
        augmentation: Augmentation,
        size: int,
        seed: int,
        label_shifts: dict[str, float] | None = None,
    ) -> None:
        """Args:
        label_shifts: by set, see `label_shifts.measured_shifts`; 0 where there is none.
        """
        self.cache, self.augmentation, self.size, self.seed = cache, augmentation, size, seed
        self.label_shifts = label_shifts or {}
        scheme = SCHEMES.get(cache.num_landmarks)
        self.mirror_order = scheme.mirror if scheme else None
        self.shape = _shape_model(cache) if augmentation.warp else None

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """Image (C, size, size) uint8 and points (1, N, 2) float32."""
        draw, index = key
        random = np.random.default_rng((self.seed, draw, index))
        cache = self.cache
        image, points = augment(
            cache.images[index], cache.points[index], cache.boxes[index],
            self.size, self.augmentation, self.mirror_order, random, draw + index,
            label_shift=self.label_shifts.get(str(cache.sets[index]), 0.0), shape=self.shape,
        )  # fmt: skip
        channels_first = image[None] if image.ndim == 2 else np.ascontiguousarray(image.transpose(2, 0, 1))
        return torch.from_numpy(channels_first), torch.from_numpy(points[None])


def _shape_model(cache: CropCache) -> ShapeModel | None:
    """Of all faces of the cache but those for validation, whatever their share; None where too few have all labels."""
    shapes = training_shapes(cache)
    return ShapeModel.fit(shapes) if np.isfinite(shapes).all((1, 2)).sum() > 1 else None


class EpochBatches:
    """Batches of (draw, index) keys: a fresh order and a fresh choice from the partly used sets in every epoch."""

    def __init__(self, indices: np.ndarray, shares: np.ndarray, batch_size: int, seed: int, repeats: int = 1) -> None:
        """Args:
        indices: (M,) crops to draw from.
        shares: (M,) share of the crops with the same share that an epoch draws.
        repeats: how often an epoch draws each of the crops that it has chosen.
        """
        parts = [(share, indices[shares == share]) for share in np.unique(shares)]
        self.parts = [(part, max(round(share * len(part)), 1)) for share, part in parts]
        self.batch_size, self.seed, self.repeats = batch_size, seed, repeats
        self.epoch = 0

    def __len__(self) -> int:
        return max(self.repeats * sum(count for _, count in self.parts) // self.batch_size, 1)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        random = np.random.default_rng((self.seed, self.epoch))
        chosen = np.concatenate([random.choice(part, count, replace=False) for part, count in self.parts])
        draws = self.epoch * self.repeats + np.arange(self.repeats)
        keys = random.permutation([(draw, index) for draw in draws.tolist() for index in chosen.tolist()])
        for batch in np.array_split(keys[: len(self) * self.batch_size], len(self)):
            yield [(int(draw), int(index)) for draw, index in batch]
