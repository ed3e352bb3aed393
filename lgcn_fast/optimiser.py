"""Muon: the optimiser of all recipes but `paper`."""

from collections import defaultdict

import torch
from torch import Tensor, optim

from .model import LGCN

MOMENTUM = 0.95
ITERATIONS = 5
"""Newton-Schulz iterations: afterwards the singular values lie between about 0.7 and 1.2."""
STEP_OF_ADAMW = 0.2
"""Root mean square of AdamW's steps for a rate of 1 (Liu et al., "Muon is scalable for LLM training", 2025)."""


class Muon(optim.AdamW):
    """Muon (Jordan et al., 2024) for the filters of the hidden convolutions, AdamW for all other parameters.

    The momentum of a convolution, as a matrix with a line a filter, is made orthogonal before it is taken as a step, so
    that all directions are learned at the same pace. `torch.optim.Muon` takes matrices only, one at a time.
    """

    def __init__(
        self, model: LGCN, rate: float = 1.0, weight_decay: float = 0.01, dtype: torch.dtype = torch.float32
    ) -> None:
        """Sort the parameters of a model: filters of more than one pixel are the hidden convolutions'.

        Args:
            dtype: of the products that make a step orthogonal, of which bf16 is exact enough.
        """
        parameters = list(model.parameters())
        hidden = [p for p in parameters if p.ndim > 1 and p.shape[-1] > 1]
        heads = [model.main.weight, model.refine.weight]
        pixelwise = [p for p in parameters if p.ndim > 1 and p.shape[-1] == 1 and all(p is not head for head in heads)]
        others = [p for p in parameters if p.ndim <= 1]
        scale = 1 / model.config.activation_scale
        groups = [
            {"params": hidden},
            {"params": heads, "lr": rate * scale, "weight_decay": weight_decay / scale, "rate_scale": scale},
            {"params": pixelwise},
            {"params": others, "weight_decay": 0.0},
        ]
        on_gpu = model.main.weight.is_cuda
        super().__init__(groups, rate, weight_decay=weight_decay, capturable=on_gpu, fused=on_gpu)
        for group in self.param_groups:
            group["lr"] = recordable_rate(group["lr"], model.main.weight)
        self.dtype = dtype

    @torch.no_grad()
    def step(self) -> None:
        """One step from the gradients, which are gone afterwards where Muon has used them."""
        hidden = self.param_groups[0]
        rate, decay = hidden["lr"], hidden["weight_decay"]
        moved = [parameter for parameter in hidden["params"] if parameter.grad is not None]
        gradients, momenta = [p.grad for p in moved], [self._momentum(p) for p in moved]
        same_shape = defaultdict(list)
        if moved:
            torch._foreach_mul_(moved, 1 - rate * decay)
            torch._foreach_lerp_(momenta, gradients, 1 - MOMENTUM)
            torch._foreach_lerp_(gradients, momenta, MOMENTUM)  # (Nesterov's look ahead)
        for parameter in moved:
            same_shape[parameter.shape].append(parameter)
        for shape, parameters in same_shape.items():
            directions = torch.stack([parameter.grad.flatten(1) for parameter in parameters])
            steps = orthogonalised(directions.to(self.dtype)).float()
            size = STEP_OF_ADAMW * max(steps.shape[1:]) ** 0.5
            torch._foreach_sub_(parameters, steps.mul_(rate * size).view(-1, *shape).unbind())
        for parameter in moved:
            parameter.grad = None  # AdamW leaves out what has none
        super().step()

    def _momentum(self, parameter: Tensor) -> Tensor:
        state = self.state[parameter]
        if not state:
            state["momentum"] = torch.zeros_like(parameter)
            state["step"] = torch.zeros(())  # unused, but AdamW expects one when a state is loaded
        return state["momentum"]


def recordable_rate(rate: float, parameter: Tensor) -> float | Tensor:
    """A learning rate for an optimiser: on a GPU in its memory, where a CUDA graph reads it in each step."""
    return torch.tensor(rate, device=parameter.device) if parameter.is_cuda else rate


def set_rate(optimiser: optim.Optimizer, rate: float) -> None:
    """Set the learning rates of all groups, wherever they are, each with the group's `rate_scale`."""
    for group in optimiser.param_groups:
        scaled = rate * group.get("rate_scale", 1.0)
        group["lr"] = group["lr"].fill_(scaled) if isinstance(group["lr"], Tensor) else scaled


def orthogonalised(matrices: Tensor) -> Tensor:
    """The orthogonal matrices nearest to some, nearly: U S V^T becomes about U V^T.

    Args:
        matrices: (B, M, N) floating point.

    Returns:
        (B, M, N) with singular values between about 0.7 and 1.2 (from those above a thousandth of the norm).
    """
    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT if tall else matrices
    x = x / torch.linalg.matrix_norm(x, keepdim=True).clamp(min=1e-30)
    for _ in range(ITERATIONS):
        gram = x @ x.mT
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x.mT if tall else x
