from dataclasses import replace

import pytest
import torch
from torch import nn

from lgcn_fast import LGCN, LGCNConfig
from lgcn_fast.model import ConvBlock, widened
from lgcn_fast.operators import gaussian_sum, gaussian_sum_banded

SMALL = {"filters": 4, "num_landmarks": 3, "side_channels": 2, "local_kernels": (5, 3), "global_layers": 2}
CONFIGS = {
    "plain": LGCNConfig(**SMALL),
    "rgb": LGCNConfig(**SMALL, in_channels=3),
    "other kernel": LGCNConfig(**SMALL, kernel_size=9, sigmas=(2.0, 4.0)),
    "nano": LGCNConfig.nano(filters=4, num_landmarks=3, local_kernels=(3, 3), global_layers=2),
    "nano with side": LGCNConfig.nano(filters=4, num_landmarks=3, local_kernels=(3,), side_channels=2),
}


def randomised(config: LGCNConfig) -> LGCN:
    """A network with weights and statistics in which nothing is 0 or 1 by construction."""
    model = LGCN(config)
    for tensor in model.state_dict().values():
        if tensor.is_floating_point():
            tensor.copy_(torch.rand_like(tensor) * 0.4 + 0.1)
    return model.eval()


def test_layers_are_those_of_the_paper():
    model = LGCN(LGCNConfig(filters=16))
    local = [block[0] for block in model.local_subnet]
    assert [c.kernel_size for c in local] == [(5, 5)] * 5 + [(3, 3)] * 10
    assert all(c.out_channels == 16 and c.bias is not None for c in local)
    assert model.main.weight.shape == (68, 16, 1, 1)
    assert model.side[0].weight.shape == (68, 16, 1, 1)
    assert isinstance(model.side[1], nn.BatchNorm2d)
    dilated = [block[0] for block in model.global_subnet]
    assert [(c.kernel_size, c.dilation) for c in dilated] == [((3, 3), (4, 4))] * 7
    assert dilated[0].in_channels == 136
    assert model.refine.weight.shape == (68, 16, 1, 1)
    for block in [*model.local_subnet, *model.global_subnet]:
        assert [type(m).__name__ for m in block] == ["Conv2d", "ScaledBatchNorm2d", "ReLU", "Dropout"]
        assert (block[1].eps, block[1].scale, block[3].p) == (1e-5, 0.1, 0.1)


@pytest.mark.parametrize("filters", [128, 64, 32, 16])
def test_parameters_per_filters(filters):
    f = filters
    convolutions = (25 * f + f) + 4 * (25 * f * f + f) + 10 * (9 * f * f + f) + (9 * 136 * f + f) + 6 * (9 * f * f + f)
    heads, norms = 3 * (68 * f + 68), 22 * 2 * f + 2 * 68
    assert sum(p.numel() for p in LGCN(LGCNConfig(filters=f)).parameters()) == convolutions + heads + norms


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize(("height", "width"), [(96, 96), (1, 1), (13, 30), (97, 95)])
def test_any_image_size(name, height, width):
    config = CONFIGS[name]
    model = randomised(config)
    images = torch.randint(0, 256, (2, config.in_channels, height, width), dtype=torch.uint8)
    with torch.inference_mode():
        heatmaps = model(images)
    assert heatmaps.output.shape == heatmaps.local.shape == (2, 3, *config.heatmap_size(height, width))
    assert torch.isfinite(heatmaps.output).all()


@pytest.mark.parametrize("name", CONFIGS)
def test_banded_blur_is_the_same_network(name):
    model = randomised(CONFIGS[name]).double()
    images = torch.rand(1, model.config.in_channels, 37, 50) * 255
    with torch.inference_mode():
        expected = model(images)
        model.kernel_convolution.operator = gaussian_sum_banded
        torch.testing.assert_close(model(images), expected)


def test_forward_by_hand():
    """Every step of Figure 1 written out, from the input's scale to Omega = K * O^l + O^g."""
    config = LGCNConfig(num_landmarks=2, side_channels=1, filters=2, local_kernels=(3,), global_layers=1)
    model = randomised(config).double()
    image = torch.randint(0, 256, (1, 1, 20, 24), dtype=torch.uint8)

    def block(x, layers, dilation):
        convolution, norm = layers[0], layers[1]
        x = nn.functional.conv2d(x, convolution.weight, convolution.bias, padding=dilation, dilation=dilation)
        scale = norm.weight / (norm.running_var + 1e-5).sqrt()
        x = (x - norm.running_mean[:, None, None]) * scale[:, None, None] + norm.bias[:, None, None]
        return x.clamp(min=0) * 0.1

    features = block((image.double() / 128 - 1) * 0.1, model.local_subnet[0], 1)
    main = model.main(features)
    side = model.side[1](model.side[0](features)).clamp(min=0)  # the norm's factor is 0.1
    blurred = gaussian_sum(torch.cat([main, side], dim=1)) * 0.01
    expected = blurred[:, :2] + model.refine(block(blurred, model.global_subnet[0], 4))
    heatmaps = model(image)
    torch.testing.assert_close(heatmaps.local, blurred[:, :2])
    torch.testing.assert_close(heatmaps.output, expected)


def test_training_is_that_of_a_norm_behind_a_bias():
    block = ConvBlock(3, 5, 3, 2, 0.1, 0.0).double()
    nn.init.normal_(block[0].bias)
    plain = nn.Sequential(nn.Conv2d(3, 5, 3, padding=2, dilation=2), nn.BatchNorm2d(5), nn.ReLU()).double()
    plain.load_state_dict(block.state_dict())
    for _ in range(2):
        x = torch.randn(2, 3, 7, 6, dtype=torch.float64)
        torch.testing.assert_close(block(x), 0.1 * plain(x))
    (10 * block(x)).square().sum().backward()
    plain(x).square().sum().backward()
    for ours, expected in zip(block.parameters(), plain.parameters(), strict=True):
        if ours is block[0].bias:
            assert ours.grad is None
            assert expected.grad.abs().max() < 1e-10
        else:
            torch.testing.assert_close(ours.grad, expected.grad)
    for name in ("running_mean", "running_var"):
        torch.testing.assert_close(getattr(block[1], name), getattr(plain[1], name))
    torch.testing.assert_close(block.eval()(x), 0.1 * plain.eval()(x))


def test_nano_does_not_see_beyond_the_image():
    """The grid of 4 x 4 pixels is filled with the border's values; the blur still sees zeros beyond the image."""
    model = randomised(CONFIGS["nano"]).double()
    image = torch.rand(1, 1, 14, 14).double() * 255
    padded = nn.functional.pad(image, (0, 2, 0, 2), mode="replicate")
    maps = nn.functional.pixel_shuffle(
        model.main(model.local_subnet(nn.functional.pixel_unshuffle((padded / 128 - 1) * 0.1, 4))), 2
    )[..., :7, :7]
    blurred = gaussian_sum(maps, model.config.kernel_size, model.config.sigmas)
    torch.testing.assert_close(model(image).local, blurred * model.config.blur_scale)


def test_train_and_eval_mode():
    model = LGCN(LGCNConfig(**SMALL))
    for parameter in model.parameters():
        nn.init.normal_(parameter)
    images = torch.rand(4, 1, 16, 16) * 255
    model.train()
    assert not torch.equal(model(images).output, model(images).output)  # dropout
    model.eval()
    assert torch.equal(model(images).output, model(images).output)


@pytest.mark.parametrize("name", CONFIGS)
def test_widened_networks_compute_the_same_and_learn_with_all_filters(name):
    model = randomised(CONFIGS[name]).double()
    wide = widened(model, 7).double()
    images = torch.rand(2, model.config.in_channels, 16, 18) * 255
    torch.testing.assert_close(wide(images), model(images))
    assert wide.config == replace(model.config, filters=7)
    wide.train()  # batch normalisation keeps the random filters from being silent
    optimiser = torch.optim.SGD(wide.parameters(), lr=1e-3)
    before = {name: p.clone() for name, p in wide.named_parameters()}
    for _ in range(2):
        optimiser.zero_grad()
        wide(images).output.square().sum().backward()
        optimiser.step()
    for name, parameter in wide.named_parameters():
        if parameter.ndim > 1 and parameter.shape[1] == 7:
            assert (parameter - before[name]).abs().amax((0, 2, 3)).min() > 0, name
    with pytest.raises(ValueError, match="filters: expected at least 4, got 3"):
        widened(model, 3)


@pytest.mark.parametrize("shape", [(1, 3, 96, 96), (1, 96, 96), (0, 1, 96, 96), (1, 1, 0, 5)])
def test_wrong_shapes_are_named(shape):
    with pytest.raises(ValueError, match=r"images: expected \(B, 1, H, W\)"):
        LGCN(LGCNConfig(**SMALL))(torch.zeros(shape))
