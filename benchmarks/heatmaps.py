"""What to benchmark on: the face in the package, in jittered boxes, and its heatmaps by the shipped network."""

from pathlib import Path

import cv2
import numpy as np
import torch

import lgcn_fast
from lgcn_fast.cli import DEMO_BOX
from lgcn_fast.images import crop, read_image, square_box

DEMO = Path(lgcn_fast.__file__).with_name("demo.jpg")


def real_crops(count: int, side: int = 96) -> np.ndarray:
    """Crops (count, side, side) uint8."""
    random = np.random.default_rng(0)
    image = read_image(DEMO)
    jitter = np.pad(random.uniform(-6, 6, (count, 2)), ((0, 0), (0, 2)))
    return np.stack([crop(image, square_box(box), side) for box in np.array(DEMO_BOX) + jitter])


def real_heatmaps(count: int) -> np.ndarray:
    """Heatmaps (count, 68, 96, 96) float32: the shipped network's 48 x 48, enlarged to those of F = 16 to 128."""
    engine = lgcn_fast.Engine("lgcn-nano", "cpu", "fp32")
    heatmaps = engine.heatmaps(torch.from_numpy(real_crops(count))[:, None]).numpy()
    return np.stack([[cv2.resize(heatmap, (96, 96)) for heatmap in face] for face in heatmaps])
