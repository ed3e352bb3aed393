"""How far labels lie to the right of where a network sees the landmarks, in a picture and in its mirror image alike.

Labels are off by a fraction of a pixel, by habit or by a conversion of coordinates. Along y a network learns that.
Along x it cannot where mirror images have their labels shifted the other way: it learns the middle, and is off by the
shift in every picture.
"""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from .augmentation import NONE
from .batches import AugmentedCrops
from .crops import CropCache
from .engine import Engine
from .heatmaps import to_heatmap
from .landmarks import SCHEMES
from .losses import readable
from .model import LGCN
from .peaks import PEAK_RADIUS, peak_centroids

FACES = 128
"""Faces of a set that are looked at: the shift of one varies by about 0.5 % of the box, that of all by 0.04 %."""


def measured_shifts(cache: CropCache, model: LGCN) -> dict[str, float]:
    """Median of labels minus points, along x, of each set of a cache.

    Args:
        model: trained; what it sees in a picture and in its mirror image is averaged. It runs where it is.

    Returns:
        By set, as a share of the face box's side; sets without labels, but for faces held out, are not in it.
    """
    size, stride = model.config.input_size, model.config.stride
    crops = AugmentedCrops(cache, NONE, size, 0)
    heatmaps, mirror = _heatmaps(model), list(SCHEMES[cache.num_landmarks].mirror)
    labelled = ~np.isnan(cache.points).all((1, 2)) & ~cache.held_out()
    shifts = {}
    for name in np.unique(cache.sets[labelled]):
        faces = np.flatnonzero(labelled & (cache.sets == name))
        faces = faces[:: -(-len(faces) // FACES)]
        images, points = (torch.stack(part) for part in zip(*(crops[0, int(face)] for face in faces), strict=True))
        seen, mirrored = (_columns(heatmaps, view, PEAK_RADIUS / stride) for view in (images, images.flip(3)))
        middle = (seen + model.config.heatmap_size(size, size)[1] - 1 - mirrored[:, mirror]) / 2
        labels = to_heatmap(points[:, 0], stride)[..., 0].numpy()
        shifts[str(name)] = float(np.nanmedian(labels - middle)) * stride / size
    return shifts


def _heatmaps(model: LGCN) -> Callable[[Tensor], Tensor]:
    """The network as it stands on a GPU (left in eval mode), or in the native engine."""
    device = model.main.weight.device
    if device.type == "cpu":
        return Engine(model, device="cpu", precision="fp32").heatmaps
    return lambda images: readable(model.eval()(images.to(device)).output, model.config)


@torch.no_grad()
def _columns(heatmaps: Callable[[Tensor], Tensor], images: Tensor, radius: float) -> np.ndarray:
    """Where the maxima of the heatmaps are along x, (B, N)."""
    parts = [peak_centroids(heatmaps(part.contiguous()), radius)[0][..., 0].cpu() for part in images.split(32)]
    return torch.cat(parts).numpy()
