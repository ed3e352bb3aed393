"""A training step on a GPU as one CUDA graph: launching its thousand kernels takes longer than they do."""

from collections.abc import Callable

import torch
from torch import Tensor

WARM_UP = 4
"""Steps that run as they are before one is recorded: they make all that stays, as the optimiser's state."""


class RecordedStep:
    """A function of batches, recorded after the first few of them and replayed for those of the same size.

    What it reads and writes besides its batch, as weights and learning rates, must stay where it is in memory.
    """

    def __init__(self, step: Callable[[Tensor, Tensor], Tensor], device: torch.device) -> None:
        """Record nothing yet.

        Args:
            step: of images and points on the device, without waiting for it; returns the loss.
            device: a GPU. (On a CPU nothing is recorded, but all else is done.)
        """
        self._step, self._device = step, device
        self._steps = 0
        self._batch: tuple[Tensor, Tensor] | None = None
        self._replay: Callable[[], Tensor] | None = None
        # Autograd's work for a parameter stays in the stream of its first step.
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def __call__(self, images: Tensor, points: Tensor) -> Tensor:
        """One step with a batch that may lie on the host; its loss ()."""
        if self._stream is None:
            return self._run(images, points)
        current = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            loss = self._run(images, points)
        current.wait_stream(self._stream)
        return loss

    def _run(self, images: Tensor, points: Tensor) -> Tensor:
        if self._batch is None:
            self._batch = tuple(torch.empty_like(part, device=self._device) for part in (images, points))
        buffers = self._batch
        if images.shape != buffers[0].shape or points.shape != buffers[1].shape:
            return self._step(images.to(self._device), points.to(self._device))
        for buffer, part in zip(buffers, (images, points), strict=True):
            buffer.copy_(part, non_blocking=True)
        if self._replay is None and self._steps >= WARM_UP:
            self._replay = self._record()
        self._steps += 1
        return self._replay().clone() if self._replay else self._step(*buffers)

    def _record(self) -> Callable[[], Tensor]:
        step, batch = self._step, self._batch
        if self._stream is None:
            return lambda: step(*batch)
        graph = torch.cuda.CUDAGraph()
        # Other threads may go on meanwhile: one puts batches into pinned memory.
        with torch.cuda.graph(graph, stream=self._stream, capture_error_mode="thread_local"):
            loss = step(*batch)

        def replay() -> Tensor:
            graph.replay()
            return loss

        return replay
