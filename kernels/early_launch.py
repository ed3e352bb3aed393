"""Programmatic dependent launch: from Hopper on a kernel starts while the one before it in its stream still runs."""

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra import cuda

EARLY_LAUNCH = True
"""Whether kernels start early where they can. A CUDA graph keeps what was set when it was recorded."""

gdc_wait = getattr(cuda, "gdc_wait", None)
gdc_launch_dependents = getattr(cuda, "gdc_launch_dependents", None)


@triton.jit
def await_previous_kernel(EARLY: tl.constexpr):
    """The first statement of a kernel: others may still read and write what it is going to write and read.

    The next kernel may start only then, so that one at most waits where kernels of other streams could run. (Behind
    index arithmetic it takes more registers, and ptxas puts the arithmetic behind it all the same.)
    """
    if EARLY:
        gdc_wait()
        gdc_launch_dependents()


def launch_options(x: Tensor) -> dict[str, bool]:
    """For the launch of a kernel that begins with `await_previous_kernel(EARLY)`, on the device of `x`."""
    if EARLY_LAUNCH and _can_start_early(x.device):
        return {"EARLY": True, "launch_pdl": True}
    return {"EARLY": False}


@lru_cache(maxsize=64)
def _can_start_early(device: torch.device) -> bool:
    is_compiled = isinstance(await_previous_kernel, triton.JITFunction)  # and not interpreted
    if not is_compiled or not gdc_wait or device.type != "cuda" or torch.version.hip:
        return False
    return torch.cuda.get_device_capability(device) >= (9, 0)
