import pytest
import torch

from lgcn_fast.recorded_step import WARM_UP, RecordedStep

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def batch(value: float, size: int = 7) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.full((size, 1, 3, 3), value).byte(), torch.full((size, 1, 2, 2), value)


@pytest.mark.parametrize("device", DEVICES)
def test_every_batch_is_seen_once_and_losses_stay(device):
    device = torch.device(device)
    total, rate, loss = (torch.full((), value, device=device) for value in (0.0, 1.0, 0.0))

    def step(images, points):
        assert images.device.type == points.device.type == device.type
        loss.copy_((images.float().mean() + points.mean()) * rate)
        total.add_(loss)
        return loss  # where the next step writes, too, as in a CUDA graph

    recorded, losses, expected = RecordedStep(step, device), [], []
    for index in range(3 * WARM_UP):
        assert bool(recorded._replay) == (index > WARM_UP)
        rate.fill_(1 + index % 2)
        losses.append(recorded(*batch(float(index))))
        expected.append(2.0 * index * (1 + index % 2))
    assert [loss.item() for loss in losses] == pytest.approx(expected)
    assert total.item() == pytest.approx(sum(expected))


@pytest.mark.parametrize("device", DEVICES)
def test_another_size_is_named(device):
    recorded = RecordedStep(lambda images, points: points.sum(), torch.device(device))
    recorded(*batch(1.0))
    with pytest.raises(ValueError, match=r"batch: expected \(7, 1, 3, 3\), got \(1, 1, 3, 3\)"):
        recorded(*batch(1.0, size=1))
