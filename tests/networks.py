"""Small networks for tests, and what they compute in float64."""

from copy import deepcopy

import torch

from lgcn_fast import LGCN, LGCNConfig
from lgcn_fast.operators import gaussian_sum_banded

SMALL = {"filters": 16, "num_landmarks": 3, "local_kernels": (5, 5, 3), "global_layers": 2}
CONFIGS = {
    "plain": LGCNConfig(**SMALL, side_channels=2),
    "no side": LGCNConfig(**SMALL, side_channels=0),
    "rgb": LGCNConfig(**SMALL, side_channels=2, in_channels=3),
    "other kernel": LGCNConfig(**SMALL, side_channels=2, kernel_size=9, sigmas=(2.0, 4.0)),
    "cross entropy": LGCNConfig(**SMALL, side_channels=2, loss="cross_entropy"),
    "nano": LGCNConfig.nano(filters=16, num_landmarks=3, local_kernels=(3, 3), global_layers=2),
    "finder": LGCNConfig.finder(filters=16, num_landmarks=3, local_kernels=(3, 3), global_layers=2),
    "odd shuffle": LGCNConfig(**SMALL | {"filters": 21}, side_channels=1, input_size=96, shuffle=3, dilation=3),
    "other filters": LGCNConfig(**SMALL | {"local_kernels": (1, 7)}, side_channels=0, shuffle=2, stride=2),
    "pixels alone": LGCNConfig(**SMALL | {"local_kernels": (1,), "global_layers": 1}, side_channels=0, dilation=1),
    "nano with side": LGCNConfig.nano(filters=16, num_landmarks=3, local_kernels=(3,), side_channels=2),
}


def randomised(config: LGCNConfig) -> LGCN:
    """A network with random statistics, weights of both signs and outputs of the size of heatmaps."""
    model = LGCN(config)
    for name, tensor in model.state_dict().items():
        if name.endswith(("running_var", "1.weight")):
            tensor.uniform_(0.5, 1.5)
        elif name.endswith(("bias", "running_mean")) or (tensor.is_floating_point() and not tensor.any()):
            tensor.normal_(0, 0.1)
    return model.eval()


def eager_output(model: LGCN, images: torch.Tensor) -> torch.Tensor:
    """In float64."""
    model = deepcopy(model).double()
    model.kernel_convolution.operator = gaussian_sum_banded  # a hundred times as fast
    with torch.inference_mode():
        return model(images).output


def eager(model: LGCN, images: torch.Tensor) -> torch.Tensor:
    output = eager_output(model, images)
    if model.config.loss == "cross_entropy":
        output = torch.softmax(torch.nn.functional.pad(output, (0, 0, 0, 0, 0, 1)), dim=1)[:, :-1]
    return output
