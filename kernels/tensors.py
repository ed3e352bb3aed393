"""What the launchers of GPU kernels share: tensors that they check."""

import torch
from torch import Tensor


def check_tensor(name: str, x: Tensor, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
    """Raise ValueError where a tensor is another one than expected, or not contiguous."""
    if x.shape != shape or x.dtype != dtype or x.device != device or not x.is_contiguous():
        raise ValueError(f"{name}: expected contiguous {shape} {dtype} on {device}, got {described(x)}")


def described(x: Tensor) -> str:
    """What came, for error messages."""
    layout = "contiguous" if x.is_contiguous() else f"strides {x.stride()}"
    return f"{layout} {tuple(x.shape)} {x.dtype} on {x.device}"
