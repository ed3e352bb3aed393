import pytest

from lgcn_fast import LGCNConfig


def test_defaults_are_the_published_network():
    config = LGCNConfig()
    assert (config.filters, config.num_landmarks, config.side_channels) == (128, 68, 68)
    assert config.local_kernels == (5,) * 5 + (3,) * 10
    assert (config.global_layers, config.dilation) == (7, 4)
    assert (config.kernel_size, config.sigmas) == (45, (1, 3, 5, 7, 9))
    assert (config.activation_scale, config.blur_scale, config.dropout) == (0.1, 0.01, 0.1)


@pytest.mark.parametrize(
    "config", [LGCNConfig(), LGCNConfig.nano(num_landmarks=15, in_channels=3), LGCNConfig.finder()]
)
def test_json_round_trip(config):
    assert LGCNConfig.from_json(config.to_json()) == config


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"in_channels": 2}, "in_channels: expected 1 .* got 2"),
        ({"num_landmarks": 0}, "num_landmarks: expected at least 1, got 0"),
        ({"kernel_size": 44}, "kernel_size: expected an odd .* got 44"),
        ({"local_kernels": (3, 4)}, "local_kernels: expected odd"),
        ({"sigmas": (1.0, 0.0)}, "sigmas: expected positive"),
        ({"dropout": 1.0}, "dropout"),
        ({"activation_scale": -0.1}, "activation_scale: expected a factor above 0, got -0.1"),
        ({"blur_scale": float("nan")}, "blur_scale: expected a factor above 0, got nan"),
        ({"shuffle": 5}, "input_size: expected a multiple of shuffle=5, got 96"),
        ({"shuffle": 4, "stride": 3}, "stride: expected a divisor of shuffle=4, got 3"),
        ({"side_channels": -1}, "side_channels"),
        ({"loss": "l1"}, "loss: expected one of .* got 'l1'"),
    ],
)
def test_bad_values_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        LGCNConfig(**changes)


def test_unknown_keys_are_refused():
    with pytest.raises(ValueError, match="expected an object with keys among"):
        LGCNConfig.from_json('{"filter": 3}')
