"""What the launchers of the Triton kernels share: tensors to write to, and tensors in error messages."""

import torch
from torch import Tensor


def result_tensor(out: Tensor | None, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """The caller's tensor to write to, or a new one.

    Raises:
        ValueError: `out` has another shape, dtype or device, or is not contiguous.
    """
    if out is None:
        return torch.empty(shape, dtype=dtype, device=device)
    if out.shape != shape or out.dtype != dtype or out.device != device or not out.is_contiguous():
        raise ValueError(f"out: expected contiguous {shape} {dtype} on {device}, got {described(out)}")
    return out


def described(x: Tensor) -> str:
    """What came, for error messages."""
    layout = "contiguous" if x.is_contiguous() else f"strides {x.stride()}"
    return f"{layout} {tuple(x.shape)} {x.dtype} on {x.device}"
