"""The configuration of a network: one frozen dataclass, stored in the metadata of its weights file."""

import json
import math
from dataclasses import asdict, dataclass, fields
from typing import Any, Self

LOSSES = ("squared_error", "cross_entropy")


@dataclass(frozen=True)
class LGCNConfig:
    """Shape of a local-global context network (paper, section 3.2; numbers of the authors' published configuration).

    The defaults are the network of the paper. `LGCNConfig(filters=64)`, 32 and 16 are its smaller siblings,
    `LGCNConfig.nano()` is a light one for CPUs, and `LGCNConfig.finder()` one that looks for faces in photos.
    """

    num_landmarks: int = 68
    """N, the number of heatmaps."""
    in_channels: int = 1
    """1 for grayscale, 3 for RGB."""
    input_size: int = 96
    """Side of the square crops that the network is trained on, in pixels. The network itself takes any size."""
    filters: int = 128
    """F, the channels of every hidden convolution."""
    local_kernels: tuple[int, ...] = (5,) * 5 + (3,) * 10
    """Filter sizes of the local-context subnet, first to last (section 3.2.1)."""
    side_channels: int = 68
    """Channels of the side branch: blurred like the heatmaps, seen by the global subnet only. 0 for none."""
    kernel_size: int = 45
    """Side of the truncated kernel K (Eq. 1), odd."""
    sigmas: tuple[float, ...] = (1.0, 3.0, 5.0, 7.0, 9.0)
    """Standard deviations of the Gaussians in K, in pixels (Eq. 1: 2s - 1)."""
    global_layers: int = 7
    """Dilated 3 x 3 convolutions of the global-context subnet (section 3.2.3)."""
    dilation: int = 4
    """Their dilation, in pixels of the grid they run on."""
    shuffle: int = 1
    """Both subnets run at 1/shuffle of the resolution: pixel-unshuffle in front, pixel-shuffle behind. 1 for none."""
    stride: int = 1
    """A pixel of the heatmaps is `stride` x `stride` pixels of the image; `kernel_size` and `sigmas` are in theirs."""
    dropout: float = 0.1
    """Share of activations dropped in training."""
    activation_scale: float = 0.1
    """Factor behind every ReLU."""
    blur_scale: float = 0.01
    """Factor behind the kernel convolution."""
    loss: str = "squared_error"
    """What the outputs mean: "squared_error" heatmaps (Eq. 4) or "cross_entropy" logits (section 3.2.4)."""

    def __post_init__(self) -> None:
        for field in fields(self):
            if field.type == tuple[int, ...] or field.type == tuple[float, ...]:
                object.__setattr__(self, field.name, tuple(getattr(self, field.name)))
        counts = ("num_landmarks", "input_size", "filters", "global_layers", "dilation", "shuffle", "stride")
        for name in counts:
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1, got {getattr(self, name)}")
        if self.in_channels not in (1, 3):
            raise ValueError(f"in_channels: expected 1 (grayscale) or 3 (RGB), got {self.in_channels}")
        if self.side_channels < 0:
            raise ValueError(f"side_channels: expected 0 or more, got {self.side_channels}")
        if not self.local_kernels or any(k < 1 or k % 2 == 0 for k in self.local_kernels):
            raise ValueError(f"local_kernels: expected odd filter sizes, got {self.local_kernels}")
        if self.kernel_size < 1 or self.kernel_size % 2 == 0:
            raise ValueError(f"kernel_size: expected an odd number of pixels, got {self.kernel_size}")
        if not self.sigmas or any(sigma <= 0 for sigma in self.sigmas):
            raise ValueError(f"sigmas: expected positive numbers, got {self.sigmas}")
        for name in ("activation_scale", "blur_scale"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name}: expected a factor above 0, got {getattr(self, name)}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout: expected a share in [0, 1), got {self.dropout}")
        if self.input_size % self.shuffle:
            raise ValueError(f"input_size: expected a multiple of shuffle={self.shuffle}, got {self.input_size}")
        if self.shuffle % self.stride:
            raise ValueError(f"stride: expected a divisor of shuffle={self.shuffle}, got {self.stride}")
        if self.loss not in LOSSES:
            raise ValueError(f"loss: expected one of {LOSSES}, got {self.loss!r}")

    @classmethod
    def nano(cls, **changes: Any) -> Self:
        """The light network for CPUs: both subnets on a 24 x 24 grid, heatmaps of 48 x 48."""
        nano = {
            "filters": 64,
            "local_kernels": (3,) * 8,
            "side_channels": 0,
            "global_layers": 5,
            "dilation": 1,
            "shuffle": 4,
            "stride": 2,
            "kernel_size": 23,
            "sigmas": (0.5, 1.5, 2.5, 3.5, 4.5),
            "dropout": 0.0,
            "activation_scale": 1.0,
        }
        return cls(**(nano | changes))

    @classmethod
    def finder(cls, **changes: Any) -> Self:
        """What looks for faces: smaller than `nano`, for faces of half the size, heatmaps of 12 x 12."""
        finder = {
            "input_size": 48,
            "filters": 32,
            "local_kernels": (3,) * 6,
            "global_layers": 4,
            "stride": 4,
            "kernel_size": 11,
            "sigmas": (0.5, 1.0, 1.5, 2.0, 2.5),
        }
        return cls.nano(**(finder | changes))

    def heatmap_size(self, height: int, width: int) -> tuple[int, int]:
        """Height and width of the heatmaps of an image."""
        return -(-height // self.stride), -(-width // self.stride)

    def to_json(self) -> str:
        """The configuration as one JSON object."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Self:
        """The configuration that `to_json` wrote.

        Raises:
            ValueError: unknown keys or values out of range.
        """
        values = json.loads(text)
        known = {field.name for field in fields(cls)}
        if not isinstance(values, dict) or not values.keys() <= known:
            raise ValueError(f"configuration: expected an object with keys among {sorted(known)}, got {text}")
        return cls(**values)
