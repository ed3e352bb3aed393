import pytest
import torch

from lgcn_fast.recorded_step import WARM_UP, RecordedStep

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def batch(size: int, value: float) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.full((size, 1, 3, 3), value).byte(), torch.full((size, 1, 2, 2), value)


@pytest.mark.parametrize("device", DEVICES)
def test_every_batch_is_seen_once_and_losses_stay(device):
    device = torch.device(device)
    total, rate = torch.zeros((), device=device), torch.ones((), device=device)

    def step(images, points):
        assert images.device.type == points.device.type == device.type
        loss = (images.float().mean() + points.mean()) * rate
        total.add_(loss)
        return loss

    recorded, losses, expected = RecordedStep(step, device), [], []
    for index in range(3 * WARM_UP):
        rate.fill_(1 + index % 2)
        size = 2 if index % 5 == 4 else 7  # the first batch's size is recorded, another one is not
        losses.append(recorded(*batch(size, float(index))))
        expected.append(2.0 * index * (1 + index % 2))
    assert [loss.item() for loss in losses] == pytest.approx(expected)
    assert total.item() == pytest.approx(sum(expected))
