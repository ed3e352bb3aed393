import pytest
import torch

from lgcn_fast import LGCN, LGCNConfig
from lgcn_fast.recipes import RECIPES


@pytest.mark.parametrize(
    ("epoch", "rate"),
    [(1, 1e-3), (10, 1e-3), (11, 5e-4), (20, 5e-4), (31, 1e-4), (41, 5e-5), (50, 5e-5), (51, 2e-5), (99, 2e-5)],
)
def test_the_papers_rates_are_those_of_a_sample(epoch, rate):
    for step in (0, 6):
        assert RECIPES["paper"].learning_rate((epoch - 1) * 7 + step, 7, 100) == pytest.approx(20 * rate)


@pytest.mark.parametrize(("name", "rate"), [("fast", 4e-3), ("polish", 2e-3), ("scene", 6e-3)])
def test_other_rates_rise_and_fall(name, rate):
    rates = [RECIPES[name].learning_rate(step, 100, 10) for step in range(1000)]
    assert rates[0] == pytest.approx(0.01 * rate)
    assert rates[15] == pytest.approx(0.51 * rate, rel=1e-3)  # half of the warm-up
    assert max(rates) == pytest.approx(rate, rel=5e-3)
    assert rates.index(max(rates)) == 30
    assert rates[500] == pytest.approx(0.5 * rate)
    assert rates[-1] == pytest.approx(1e-3 * rate)
    assert rates[30:] == sorted(rates[30:], reverse=True)


def test_momentum_of_sgd_has_a_gain_of_one():
    model = LGCN(LGCNConfig(filters=1, num_landmarks=2, side_channels=0))
    optimiser = RECIPES["paper"].optimiser(model, torch.float32)
    optimiser.param_groups[0]["lr"] = 0.5
    weight = model.main.weight
    before = weight.detach().clone()
    weight.grad = torch.ones_like(weight)
    optimiser.step()
    torch.testing.assert_close(weight, before - 0.5)  # (the first step is a whole one)
    weight.grad = 3 * torch.ones_like(weight)
    optimiser.step()
    torch.testing.assert_close(weight, before - 0.5 - 0.5 * (0.9 + 0.1 * 3))
