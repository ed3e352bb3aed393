import threading

import pytest
import torch

from lgcn_fast import LGCN, Engine, LGCNConfig, load_model
from lgcn_fast.images import read_image
from lgcn_fast.prediction import DEFAULT_WEIGHTS

SMALL = {"filters": 16, "num_landmarks": 3, "local_kernels": (5, 3), "global_layers": 2}
CONFIGS = {
    "plain": LGCNConfig(**SMALL, side_channels=2),
    "no side": LGCNConfig(**SMALL, side_channels=0),
    "rgb": LGCNConfig(**SMALL, side_channels=2, in_channels=3),
    "other kernel": LGCNConfig(**SMALL, side_channels=2, kernel_size=9, sigmas=(2.0, 4.0)),
    "cross entropy": LGCNConfig(**SMALL, side_channels=2, loss="cross_entropy"),
    "nano": LGCNConfig.nano(filters=16, num_landmarks=3, local_kernels=(3, 3), global_layers=2),
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


def eager(model: LGCN, images: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        output = model.double()(images).output
    model.float()
    if model.config.loss == "cross_entropy":
        output = torch.softmax(torch.nn.functional.pad(output, (0, 0, 0, 0, 0, 1)), dim=1)[:, :-1]
    return output


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize(("height", "width"), [(96, 96), (1, 1), (13, 30), (97, 95)])
def test_fp32_is_the_model(name, height, width):
    model = randomised(CONFIGS[name])
    images = torch.randint(0, 256, (2, model.config.in_channels, height, width), dtype=torch.uint8)
    heatmaps = Engine(model, precision="fp32").heatmaps(images)
    expected = eager(model, images)
    assert heatmaps.dtype == torch.float32
    assert heatmaps.is_contiguous()
    torch.testing.assert_close(heatmaps.double(), expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


def test_without_onednn_it_is_the_model_too(monkeypatch):
    model = randomised(CONFIGS["plain"])
    images = torch.randint(0, 256, (1, 1, 40, 30), dtype=torch.uint8)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    heatmaps, expected = Engine(model, precision="fp32").heatmaps(images), eager(model, images)
    torch.testing.assert_close(heatmaps.double(), expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


@pytest.mark.parametrize("name", ["plain", "nano"])
def test_bf16_is_no_worse_than_twice_torch_in_bf16(name):
    model = randomised(CONFIGS[name])
    images = torch.randint(0, 256, (2, 1, 96, 96), dtype=torch.uint8)
    exact = eager(model, images)
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        torchs = model(images).output.double()
    ours = Engine(model, precision="bf16").heatmaps(images).double()
    assert (ours - exact).abs().mean() <= 2 * (torchs - exact).abs().mean()


def test_the_model_is_not_changed():
    model = randomised(CONFIGS["plain"]).train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    Engine(model)
    assert model.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_says_what_runs():
    engine = Engine(randomised(CONFIGS["plain"]), precision="fp32")
    assert (engine.backend, engine.precision) == ("cpu", "fp32")
    assert repr(engine) == "Engine(16 filters, 3 landmarks, backend='cpu', precision='fp32')"
    assert Engine(randomised(CONFIGS["plain"])).precision in ("fp32", "bf16")


@pytest.mark.parametrize(
    ("options", "message"),
    [({"precision": "fp8"}, "precision: expected 'auto', 'fp32' or 'bf16', got 'fp8'"), ({"device": "tpu"}, "device")],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        Engine(randomised(CONFIGS["plain"]), **options)


def test_wrong_images_are_named():
    engine = Engine(randomised(CONFIGS["plain"]))
    for shape in ((1, 3, 9, 9), (9, 9), (1, 1, 0, 9)):
        with pytest.raises(ValueError, match=r"images: expected \(B, 1, H, W\)"):
            engine.heatmaps(torch.zeros(shape))


def test_several_threads_at_once(demo_picture):
    engine = Engine(load_model(DEFAULT_WEIGHTS))
    image = torch.from_numpy(read_image(demo_picture))[None, None]
    inputs = [image[..., 70 + i : 166 + i, 85:181].contiguous() for i in range(4)]
    expected = [engine.heatmaps(x) for x in inputs]
    wrong = []

    def work(index: int) -> None:
        for _ in range(10):
            if not torch.equal(engine.heatmaps(inputs[index]), expected[index]):
                wrong.append(index)

    threads = [threading.Thread(target=work, args=(index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.gpu
def test_cuda_gives_the_same_heatmaps(demo_picture):
    model = load_model(DEFAULT_WEIGHTS)
    image = torch.from_numpy(read_image(demo_picture))[None, None, 70:194, 82:206].contiguous()
    engine = Engine(model, device="cuda")
    assert (engine.backend, engine.precision) == ("eager", "fp32")
    # TF32 products, where they are on, keep 10 bits.
    torch.testing.assert_close(engine.heatmaps(image).cpu().double(), eager(model, image), rtol=1e-2, atol=5e-3)
