"""Heatmaps to benchmark on: the shipped network's, of the face in the package, in jittered boxes."""

from pathlib import Path

import numpy as np
import torch

import lgcn_fast
from lgcn_fast.cli import DEMO_BOX
from lgcn_fast.images import read_image, square_box
from lgcn_fast.prediction import DEFAULT_WEIGHTS, network_input


def real_heatmaps(count: int) -> np.ndarray:
    """Heatmaps (count, 68, 96, 96) float32."""
    random = np.random.default_rng(0)
    image = read_image(Path(lgcn_fast.__file__).with_name("demo.jpg"))
    jitter = np.pad(random.uniform(-6, 6, (count, 2)), ((0, 0), (0, 2)))
    boxes = [square_box(box) for box in np.array(DEMO_BOX) + jitter]
    crops = torch.stack([network_input(image, box, 96, 1) for box in boxes])
    engine = lgcn_fast.Engine(lgcn_fast.load_model(DEFAULT_WEIGHTS), precision="fp32")
    return torch.cat([engine.heatmaps(part) for part in crops.split(8)]).numpy()
