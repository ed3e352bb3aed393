import pytest
import torch

from lgcn_fast.config import LGCNConfig
from lgcn_fast.model import LGCN
from lgcn_fast.optimiser import MOMENTUM, STEP_OF_ADAMW, Muon, orthogonalised, set_rate


def model_with_gradients(**changes) -> LGCN:
    model = LGCN(LGCNConfig.nano(filters=8, **changes))
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    return model


@pytest.mark.parametrize("shape", [(1, 8, 72), (3, 64, 16), (2, 5, 5), (1, 1, 7), (1, 7, 1)])
def test_singular_values_become_one(shape):
    values = torch.linalg.svdvals(orthogonalised(torch.randn(shape)))
    assert values.min() > 0.6
    assert values.max() < 1.25


def test_directions_stay():
    left, _, right = torch.linalg.svd(torch.randn(8, 30, dtype=torch.float64), full_matrices=False)
    matrix = (left * torch.linspace(1, 9, 8)) @ right
    result = left.T @ orthogonalised(matrix[None])[0] @ right.T
    assert (result.diagonal() > 0.6).all()
    assert (result - result.diagonal().diag()).abs().max() < 1e-10


def test_zero_stays_zero():
    assert (orthogonalised(torch.zeros(1, 3, 5)) == 0).all()


def test_hidden_filters_take_orthogonal_steps_with_momentum():
    model = model_with_gradients()
    optimiser = Muon(model, rate=0.01, weight_decay=0.5)
    weight = model.local_subnet[3][0].weight
    momentum = torch.zeros_like(weight)
    for _ in range(3):
        before = weight.detach().clone()
        weight.grad = gradient = torch.randn_like(weight)
        momentum += (1 - MOMENTUM) * (gradient - momentum)
        nesterov = gradient + MOMENTUM * (momentum - gradient)
        left, _, right = torch.linalg.svd(nesterov.flatten(1).double(), full_matrices=False)
        optimiser.step()
        step = (before * (1 - 0.01 * 0.5) - weight.detach()).flatten(1).double()
        step /= 0.01 * STEP_OF_ADAMW * 72**0.5
        turned = left.T @ step @ right.T
        assert (turned.diagonal() > 0.6).all()
        assert (turned.diagonal() < 1.25).all()
        assert (turned - turned.diagonal().diag()).abs().max() < 1e-3


def test_steps_are_as_long_as_those_of_adamw():
    model = model_with_gradients()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    Muon(model, rate=1e-3, weight_decay=0.0).step()
    for name, parameter in model.named_parameters():
        step = (parameter.detach() - before[name]).square().mean().sqrt() / 1e-3
        if parameter.ndim == 4 and parameter.shape[2] > 1:
            assert 0.1 < step < 0.3
        else:  # AdamW's first step is 1 for every element; later ones are about 0.2
            assert step == pytest.approx(1, rel=0.01)


def test_other_parameters_are_adamws():
    model = model_with_gradients()
    reference = LGCN(model.config)
    reference.load_state_dict(model.state_dict())
    others = dict(reference.named_parameters())
    others = {name: p for name, p in others.items() if p.ndim == 1 or p.shape[-1] == 1}
    decayed = [{"params": [p], "weight_decay": 0.1 if p.ndim > 1 else 0.0} for p in others.values()]
    adamw = torch.optim.AdamW(decayed, lr=0.02)
    muon = Muon(model, rate=0.02, weight_decay=0.1)
    for _ in range(3):
        for name, parameter in model.named_parameters():
            parameter.grad = torch.randn_like(parameter)
            if name in others:
                others[name].grad = parameter.grad.clone()
        muon.step()
        adamw.step()
    for name, expected in others.items():
        torch.testing.assert_close(model.get_parameter(name), expected, msg=name)


def test_heads_take_longer_steps_where_activations_are_small():
    model = model_with_gradients(activation_scale=0.1, side_channels=3)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    Muon(model, rate=1e-3, weight_decay=0.5).step()
    for name, rate in {"main": 1e-2, "refine": 1e-2, "side.0": 1e-3}.items():
        weight, gradient = model.get_parameter(f"{name}.weight"), model.get_parameter(f"{name}.weight").grad
        expected = before[f"{name}.weight"] * (1 - 1e-3 * 0.5) - rate * gradient.sign()
        torch.testing.assert_close(weight.detach(), expected, atol=1e-4, rtol=0)


def test_all_parameters_learn():
    for changes in ({}, {"side_channels": 3}, {"local_kernels": (3, 1, 3)}):
        model = model_with_gradients(**changes)
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        Muon(model, rate=0.1).step()
        assert not [name for name, p in model.named_parameters() if torch.equal(p, before[name])], changes


def test_parameters_without_a_gradient_are_left_alone():
    model = model_with_gradients()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for parameter in model.global_subnet.parameters():
        parameter.grad = None
    Muon(model, rate=0.1).step()
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert not any(name.startswith("global_subnet") for name in changed)
    assert any(name.startswith("local_subnet") for name in changed)


def test_state_can_be_saved_and_loaded():
    model = model_with_gradients()
    first = Muon(model, rate=0.01)
    first.step()
    again = Muon(model, rate=0.01)
    again.load_state_dict(first.state_dict())
    for parameter in model.parameters():
        for name, value in first.state[parameter].items():
            assert torch.equal(again.state[parameter][name], value), name


def test_rates_in_memory_are_as_good_as_numbers():
    """As on a GPU, where a CUDA graph reads them: the same tensors must hold them in every step."""
    model = model_with_gradients(activation_scale=0.1, side_channels=3)
    other = LGCN(model.config)
    other.load_state_dict(model.state_dict())
    numbers, tensors = Muon(model), Muon(other)
    for group in tensors.param_groups:
        group["lr"], group["fused"] = torch.tensor(group["lr"]), True
    rates = [group["lr"] for group in tensors.param_groups]
    for rate in (1e-2, 3e-3, 1e-4):
        for parameter, same in zip(model.parameters(), other.parameters(), strict=True):
            parameter.grad = torch.randn_like(parameter)
            same.grad = parameter.grad.clone()
        for optimiser in (numbers, tensors):
            set_rate(optimiser, rate)
            optimiser.step()
    assert all(group["lr"] is rate for group, rate in zip(tensors.param_groups, rates, strict=True))
    assert [rate.item() for rate in rates] == pytest.approx([1e-4, 1e-3, 1e-4, 1e-4])
    for parameter, same in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(parameter, same, rtol=1e-5, atol=1e-6)
