"""Facial landmarks with the local-global context network (Merget, Rock, Rigoll, CVPR 2018), made fast.

>>> landmarks = lgcn_fast.predict(images)  # (B, H, W) or (B, H, W, 3), one face in each
>>> landmarks.points  # (B, 68, 2), pixels
"""

from .checkpoints import load_model
from .config import LGCNConfig
from .detection import Faces, detect
from .drawing import draw
from .engine import Engine
from .model import LGCN, Heatmaps
from .operators import gaussian_sum
from .prediction import Landmarks, predict
from .shape import ShapeModel
from .shipped import ShippedModel, models
from .tracking import TrackedFaces, Tracker

__version__ = "0.1.0"

__all__ = [
    "LGCN",
    "Engine",
    "Faces",
    "Heatmaps",
    "LGCNConfig",
    "Landmarks",
    "ShapeModel",
    "ShippedModel",
    "TrackedFaces",
    "Tracker",
    "detect",
    "draw",
    "gaussian_sum",
    "load_model",
    "models",
    "predict",
]
