"""Named training recipes: the paper's, one that gets furthest in the time there is, one to go on from there, and one
for networks that look for faces."""

import math
from dataclasses import dataclass, replace

import torch
from torch import optim

from .augmentation import FIXED_VARIANTS, Augmentation
from .model import LGCN
from .optimiser import Muon, recordable_rate

PAPER_RATES = ((11, 1e-3), (21, 5e-4), (31, 2e-4), (41, 1e-4), (51, 5e-5), (math.inf, 2e-5))
"""Learning rate per sample before each epoch (authors' published configuration)."""


@dataclass(frozen=True)
class Recipe:
    """Everything about a training that is neither data nor network."""

    name: str
    batch_size: int
    epochs: int
    augmentation: Augmentation
    repeats: int = 1
    """How often an epoch draws each crop; the paper's epoch goes through its fixed set of 18."""
    ema_decay: float = 0.0
    """Decay per step of the averaged weights that are validated and kept; 0: the weights themselves."""
    clip_value: float | None = None
    """Gradient elements are truncated at this."""
    clip_norm: float | None = None
    """The gradient's norm is truncated at this."""
    muon_rate: float = 0.0
    """Largest learning rate of Muon; 0: the paper's SGD."""

    def __post_init__(self) -> None:
        for name in ("batch_size", "repeats"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1, got {getattr(self, name)}")

    def optimiser(self, model: LGCN, dtype: torch.dtype) -> optim.Optimizer:
        """SGD with momentum as in the paper, or Muon with products in `dtype`."""
        if self.muon_rate:
            return Muon(model, dtype=dtype)
        weight = next(model.parameters())
        # The authors' toolkit scales the gradient by 1 - momentum before adding it: "unit gain". (But for the first
        # step, of which PyTorch takes all.)
        rate = recordable_rate(1.0, weight)
        return optim.SGD(model.parameters(), rate, momentum=0.9, dampening=0.9, fused=weight.is_cuda)

    def learning_rate(self, step: int, steps_per_epoch: int, epochs: int) -> float:
        """Learning rate of a step, counted from 0.

        Paper: constant by epoch, per sample; the loss is a mean over the batch, so the rate is times the batch.
        Otherwise: up over 3 % of the steps, then down along a cosine to a thousandth.
        """
        if not self.muon_rate:
            epoch = step // steps_per_epoch + 1
            return self.batch_size * next(rate for end, rate in PAPER_RATES if epoch < end)
        progress = step / (steps_per_epoch * epochs)
        warm_up = min(1.0, progress / 0.03 + 1e-2)
        return self.muon_rate * warm_up * max(0.5 * (1 + math.cos(math.pi * progress)), 1e-3)


_PAPER = Recipe(
    "paper",
    batch_size=20,
    epochs=100,
    augmentation=Augmentation(fixed=True),
    repeats=FIXED_VARIANTS,
    clip_value=0.1,
)
_FAST = Recipe(
    "fast",
    batch_size=8,
    epochs=100,
    augmentation=Augmentation(shift=0.05, contrast=0.3, blur=4.0, noise=10.0, occlusion=0.4, compression=85.0),
    ema_decay=0.998,
    clip_norm=20.0,
    muon_rate=4e-3,
)
# A trained network goes on with half the rate and half of what noise and occlusion spoil.
_POLISH = replace(
    _FAST,
    name="polish",
    epochs=30,
    augmentation=replace(_FAST.augmentation, noise=5.0, occlusion=0.2),
    muon_rate=2e-3,
)

# Faces of 0.6 to 1.4 times the nominal size, as they come in the levels of an image pyramid (`detection.py`).
_SCENE = replace(
    _FAST,
    name="scene",
    batch_size=16,
    augmentation=replace(_FAST.augmentation, scale=0.4, shift=0.1, blur=2.0),
    muon_rate=6e-3,
)

RECIPES = {recipe.name: recipe for recipe in (_PAPER, _FAST, _POLISH, _SCENE)}
