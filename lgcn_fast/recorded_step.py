"""A training step on a GPU as one CUDA graph: many small kernels take longer to launch than to run."""

from collections.abc import Callable

import torch
from torch import Tensor

WARM_UP = 4
"""Steps that run as they are before one is recorded: they make all that stays, as the optimiser's state."""


class RecordedStep:
    """A function of batches of one size, recorded after the first few of them and replayed.

    What it reads and writes besides its batch (weights, learning rates, cached constants) must stay where it is in
    memory. While it records, nobody may wait for the whole device, and no engine may record in another thread.
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
        # The default stream cannot be recorded; the first steps set up in this one what libraries need in a stream.
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def __call__(self, images: Tensor, points: Tensor) -> Tensor:
        """One step.

        Args:
            images: (B, C, H, W) uint8, on the host or the device.
            points: (B, faces, N, 2) float32, pixels, likewise.

        Returns:
            () float32 on the device, the loss.

        Raises:
            ValueError: another size than that of the batches before.
        """
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
        for buffer, part in zip(self._batch, (images, points), strict=True):
            if part.shape != buffer.shape:
                raise ValueError(f"batch: expected {tuple(buffer.shape)}, got {tuple(part.shape)}")
            buffer.copy_(part, non_blocking=True)
        if self._replay is None and self._steps >= WARM_UP:
            self._replay = self._record()
        self._steps += 1
        loss = self._replay() if self._replay else self._step(*self._batch)
        return loss.clone()

    def _record(self) -> Callable[[], Tensor]:
        step, batch = self._step, self._batch
        if self._stream is None:
            return lambda: step(*batch)
        return record_graph(lambda: step(*batch), self._stream)


def record_graph(
    function: Callable[[], Tensor], stream: torch.cuda.Stream, pool: tuple[int, int] | None = None
) -> Callable[[], Tensor]:
    """What a function does on a GPU as a CUDA graph; it has been called before, which has set up what it needs.

    Args:
        function: without waiting for the device; returns one tensor.
        pool: of memory for intermediate results; a new one, if None.

    Returns:
        Replays it in the current stream, and returns the same tensor each time.
    """
    graph = torch.cuda.CUDAGraph()
    # Other threads may go on meanwhile, allocate and pin memory.
    # (`graph` enters the stream as well, but leaves it for good only where the record succeeds.)
    with torch.cuda.stream(stream), torch.cuda.graph(graph, pool, stream, capture_error_mode="thread_local"):
        result = function()

    def replay() -> Tensor:
        graph.replay()
        return result

    return replay
