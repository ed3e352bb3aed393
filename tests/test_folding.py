import numpy as np
import torch
import torch.nn.functional as F
from networks import CONFIGS, randomised

from lgcn_fast.folding import ORIGIN, _typical_size, fold
from lgcn_fast.model import ScaledBatchNorm2d


@torch.inference_mode()
def test_channels_come_out_in_sizes_of_about_1():
    """However large the norms make them: here over six powers of ten."""
    model = randomised(CONFIGS["plain"])
    for block in (*model.local_subnet, *model.global_subnet):
        spread = 10 ** torch.empty(len(block[1].weight)).uniform_(-3, 3)
        block[1].weight *= spread
        block[1].bias.copy_(spread * torch.empty_like(spread).uniform_(-1, 1))
        block[1].momentum = 0.999
    images = torch.randint(0, 256, (4, 1, 40, 40))
    model.train()(images)  # the norms' statistics are those of these images
    x = images.float() - ORIGIN
    for weight, bias in fold(model).local:
        x = F.conv2d(x, torch.from_numpy(weight), torch.from_numpy(bias), padding=weight.shape[2] // 2).relu()
        sizes = x.square().mean((0, 2, 3)).sqrt()
        assert float(sizes.max()) < 5, sizes
        assert float((sizes > 0.1).float().mean()) > 0.4, sizes  # (others are nearly always 0)


def test_default_device_does_not_matter():
    model = randomised(CONFIGS["plain"])
    expected = fold(model).context[0][0]
    with torch.device("meta"):  # where there is no GPU to be the default
        np.testing.assert_array_equal(fold(model).context[0][0], expected)


@torch.inference_mode()
def test_sizes_are_powers_of_two_and_never_0():
    norm = ScaledBatchNorm2d(7, 0.1)
    norm.weight.copy_(torch.tensor([1.0, 1.0, 1.0, -4.0, 0.0, 0.0, 1e-20]))
    norm.bias.copy_(torch.tensor([0.1, 3.0, -9.0, 0.4, 0.0, -5.0, 6.0]))
    sizes = _typical_size(norm)
    # Those of the halves above 0 are 0.77 and 3.1; what lies at -9 is hardly ever seen.
    assert sizes[[0, 1, 2, 3, 6]].tolist() == [1.0, 4.0, 1 / 16, 4.0, 8.0]
    assert torch.equal(sizes.log2(), sizes.log2().round())
    assert (sizes[4:6] > 0).all()
