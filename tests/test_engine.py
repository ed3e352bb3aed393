import pickle
import subprocess
import sys
import threading
from copy import deepcopy

import numpy as np
import pytest
import torch
from networks import CONFIGS, eager, eager_output, randomised

from lgcn_fast import Engine, ShapeModel, load_model
from lgcn_fast.checkpoints import save_model
from lgcn_fast.engine import known_precisions
from lgcn_fast.fitting import NativeFitter
from lgcn_fast.folding import fold
from lgcn_fast.images import read_image
from lgcn_fast.native import native_network
from lgcn_fast_kernels import INSTRUCTION_SETS, INSTRUCTIONS, Network, Shape


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch):
    """These are tests of the engine on a CPU, which "auto" is without a GPU."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


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


def test_heatmaps_are_the_callers():
    """Tensors made in inference mode could not be changed outside."""
    heatmaps = Engine("lgcn-finder").heatmaps(torch.zeros((2, 1, 48, 48), dtype=torch.uint8))
    heatmaps.clamp_(min=0.5)
    assert (heatmaps >= 0.5).all()


@pytest.mark.parametrize("instructions", INSTRUCTION_SETS)
@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.usefixtures("poisoned_memory")
def test_every_instruction_set_is_the_model(name, instructions, random):
    """Any batch, size and number of threads: as many faces as threads side by side, the rest by all threads."""
    model = randomised(CONFIGS[name])
    network = native_network(fold(model), instructions)
    for batch, threads in ((1, 1), (1, 2), (2, 5), (5, 3)):
        height, width = random.integers(1, 130, 2)
        images = random.integers(0, 256, (batch, model.config.in_channels, height, width), np.uint8)
        expected = eager_output(model, torch.from_numpy(images)).numpy()
        tolerance = (3e-2 if instructions.endswith("bf16") else 1e-4) * np.abs(expected).max()
        np.testing.assert_allclose(network.heatmaps(images, threads), expected, atol=tolerance, rtol=0)
        np.testing.assert_allclose(
            network.heatmaps(images.astype(np.float32), threads), expected, atol=tolerance, rtol=0
        )


@pytest.mark.parametrize("instructions", INSTRUCTION_SETS)
@pytest.mark.parametrize("name", CONFIGS)
def test_nan_is_not_hidden(name, instructions):
    model = randomised(CONFIGS[name])
    images = np.full((1, model.config.in_channels, 33, 30), np.nan, np.float32)
    assert eager_output(model, torch.from_numpy(images)).isnan().all()
    assert np.isnan(native_network(fold(model), instructions).heatmaps(images, 1)).all()


def test_native_layers_must_fit_together():
    def layer(out: int, inputs: int, kernel: int) -> tuple[np.ndarray, np.ndarray]:
        return np.zeros((out, inputs, kernel, kernel), np.float32), np.zeros(out, np.float32)

    shape = Shape(landmarks=3, side_channels=2, shuffle=2, stride=1, dilation=1, taps=np.ones((1, 3)))
    good = {
        "local": [layer(8, 4, 3), layer(8, 8, 3)],
        "heads": layer(20, 8, 1),
        "context": [layer(8, 5, 3)],
        "refine": layer(12, 8, 1),
    }
    Network("baseline", shape, **good)
    wrong = {
        "local": [layer(8, 4, 3), layer(8, 7, 3)],
        "heads": layer(19, 8, 1),
        "context": [layer(8, 5, 5)],
        "refine": layer(12, 9, 1),
    }
    for name, value in wrong.items():
        with pytest.raises(ValueError, match=f"{name}: expected filters"):
            Network("baseline", shape, **good | {name: value})
    with pytest.raises(ValueError, match="at least one layer"):
        Network("baseline", shape, **good | {"context": []})
    for change in ({"dilation": 2**62}, {"shuffle": 2**32, "stride": 2**32}):  # products overflow
        numbers = {"landmarks": 3, "side_channels": 2, "shuffle": 2, "stride": 1, "dilation": 1} | change
        with pytest.raises(ValueError, match="shape: expected positive numbers up to 65536"):
            Network("baseline", Shape(**numbers, taps=np.ones((1, 3))), **good)


def test_threads_do_not_change_the_heatmaps(random):
    images = torch.from_numpy(random.integers(0, 256, (5, 1, 61, 97), np.uint8))
    model = randomised(CONFIGS["plain"])
    expected = Engine(model, num_threads=1).heatmaps(images)
    for threads in (2, 3, 64):
        assert torch.equal(Engine(model, num_threads=threads).heatmaps(images), expected)
    torch.testing.assert_close(Engine(model, num_threads=2).heatmaps(images[4:]), expected[4:], rtol=0, atol=0)


@pytest.mark.parametrize("name", ["plain", "nano", "cross entropy"])
def test_fit_is_the_fit_of_the_heatmaps(name, random):
    model = randomised(CONFIGS[name])
    shape = ShapeModel.fit(random.normal(size=(20, 3, 2)), 2)
    images = torch.from_numpy(random.integers(0, 256, (5, 1, 40, 37), np.uint8))
    engine = Engine(model, "cpu", num_threads=2)
    fitted = engine.fit(images, shape)
    expected = NativeFitter(shape)(engine.heatmaps(images).numpy(), model.config.stride)
    np.testing.assert_array_equal(fitted.points, expected.points)
    np.testing.assert_array_equal(fitted.certainties, expected.certainties)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("name", ["lgcn-nano", "plain", "nano"])
def test_rounding_errors_are_at_most_four_times_those_of_torch(name, precision):
    if precision not in INSTRUCTIONS:
        pytest.skip(f"this processor has no {precision} instructions")
    model = randomised(CONFIGS[name]) if name in CONFIGS else load_model(name)
    images = torch.randint(0, 256, (8, 1, 96, 96), dtype=torch.uint8)
    exact = eager(model, images)
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
        torchs = model(images).output.double()
    ours = Engine(model, precision=precision).heatmaps(images).double()
    assert (ours - exact).abs().mean() <= 4 * (torchs - exact).abs().mean()


def test_the_model_is_not_changed():
    model = randomised(CONFIGS["plain"]).train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    Engine(model)
    assert model.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_says_what_runs():
    engine = Engine(randomised(CONFIGS["plain"]), precision="fp32")
    assert (engine.backend, engine.precision, engine.num_threads) == ("cpu", "fp32", torch.get_num_threads())
    assert repr(engine) == (
        "Engine(16 filters, 3 landmarks, heatmaps of 96 x 96; backend='cpu', precision='fp32', "
        f"num_threads={torch.get_num_threads()})"
    )
    for copied in (pickle.dumps, deepcopy):
        with pytest.raises(TypeError, match="Engine: it cannot be pickled or copied; build one in each process"):
            copied(engine)
    assert Engine(randomised(CONFIGS["plain"])).precision in ("fp32", "bf16")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"precision": "int8"}, "precision: expected one of 'auto', 'fp32', 'bf16', 'fp8', got 'int8'"),
        ({"precision": "fp8"}, "precision: expected 'auto' or 'fp32'.*, got 'fp8', for which this processor has no"),
        ({"device": "tpu"}, "device"),
        ({"num_threads": -1}, "num_threads: expected a whole number, 0 or more, got -1"),
        ({"num_threads": 1.5}, "num_threads: expected a whole number, 0 or more, got 1.5"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        Engine(randomised(CONFIGS["plain"]), **options)


def test_is_built_from_a_name_or_a_file_and_takes_numpy(tmp_path, random):
    save_model(tmp_path / "own.safetensors", randomised(CONFIGS["plain"]), {})
    images = random.integers(0, 256, (2, 1, 33, 20), np.uint8)
    for model in (str(tmp_path / "own.safetensors"), tmp_path / "own.safetensors", "lgcn-nano"):
        expected = Engine(load_model(model), precision="fp32").heatmaps(torch.from_numpy(images))
        assert torch.equal(Engine(model, precision="fp32").heatmaps(images), expected)
    with pytest.raises(ValueError, match=r"model: expected one of lgcn-.*, .*got 'lgcn-none'"):
        Engine("lgcn-none")


def test_wrong_images_are_named():
    engine = Engine(randomised(CONFIGS["plain"]))
    for shape in ((1, 3, 9, 9), (9, 9), (1, 1, 0, 9)):
        with pytest.raises(ValueError, match=r"images: expected \(B, 1, H, W\)"):
            engine.heatmaps(torch.zeros(shape))
    with pytest.raises(ValueError, match=r"images: expected an array or a tensor .*, got list"):
        engine.heatmaps([np.zeros((1, 9, 9))])
    for images in (torch.zeros(1, 1, 9, 9, dtype=torch.complex64), torch.zeros(1, 1, 9, 9).to_sparse()):
        with pytest.raises(ValueError, match="images: expected real numbers in a dense tensor, got torch"):
            engine.heatmaps(images)


def test_native_network_says_what_came():
    network = native_network(fold(randomised(CONFIGS["plain"])), INSTRUCTION_SETS[0])
    with pytest.raises(ValueError, match=r"images: expected \(B, 1, H, W\) without empty sides, got \(2, 3, 9, 9\)"):
        network.heatmaps(np.zeros((2, 3, 9, 9), np.uint8), 1)


def test_several_threads_at_once(demo_picture):
    engine = Engine(load_model("lgcn-nano"))
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


@pytest.mark.parametrize("kind", ["read-only", "flipped", "big-endian", "channels last"])
def test_numpy_images_of_all_kinds(kind, random, recwarn):
    engine = Engine(randomised(CONFIGS["plain"]), precision="fp32")
    images = random.uniform(0, 255, (2, 1, 20, 30)).astype(np.float32)
    forms = {
        "read-only": np.frombuffer(images.tobytes(), np.float32).reshape(images.shape),
        "flipped": np.ascontiguousarray(images[..., ::-1])[..., ::-1],
        "big-endian": images.astype(">f4"),
        "channels last": np.ascontiguousarray(images.transpose(0, 2, 3, 1)).transpose(0, 3, 1, 2),
    }
    assert torch.equal(engine.heatmaps(forms[kind]), engine.heatmaps(torch.from_numpy(images)))
    assert not recwarn.list


def test_votes_do_not_depend_on_the_threads(random):
    images = torch.from_numpy(random.integers(0, 256, (1, 1, 90, 120), np.uint8))
    offsets, voters = random.integers(-9, 10, (2, 68, 2)), list(range(17, 68))
    model = load_model("lgcn-nano")
    for precision in INSTRUCTIONS:
        one = Engine(model, precision=precision, num_threads=1).votes(images, offsets, voters, 2)
        for threads in (2, 3, 7) * 2:
            votes = Engine(model, precision=precision, num_threads=threads).votes(images, offsets, voters, 2)
            np.testing.assert_array_equal(votes, one)


def alone(code: str) -> str:
    """What a program of its own prints, which has no other threads and whose limits are its own."""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.mark.parametrize(
    ("capability", "expected"),
    [
        ((7, 5), ("fp32",)),
        ((8, 6), ("fp32", "bf16")),
        ((8, 9), ("fp32", "bf16", "fp8")),
        ((9, 0), ("fp32", "bf16", "fp8")),
    ],
)
def test_precisions_of_a_gpu(monkeypatch, capability, expected):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert known_precisions(torch.device("cuda", 0)) == expected


@pytest.mark.skipif(sys.platform != "linux", reason="needs Linux's limits")
def test_threads_that_cannot_start_are_an_error():
    printed = alone("""
import os, resource
import torch
from lgcn_fast import Engine
engine, images = Engine("lgcn-nano", num_threads=4), torch.zeros(1, 1, 96, 96, dtype=torch.uint8)
if os.getuid() == 0:  # whom limits do not bind
    os.setuid(65534)
for limit in (1, 2, 3):
    resource.setrlimit(resource.RLIMIT_NPROC, (limit, 3))
    try:
        engine.heatmaps(images)
    except ValueError as error:
        print(error)
""")
    expected = "num_threads: expected as many threads as may be started, got 4 (Resource temporarily unavailable)"
    assert printed.splitlines() == [expected] * 3


@pytest.mark.skipif(sys.platform != "linux", reason="needs Linux's limits")
def test_memory_that_is_lacking_in_a_thread_is_an_error():
    printed = alone("""
import resource
import numpy as np
from lgcn_fast_kernels import local_maxima
heatmaps = np.zeros((1, 2, 4000, 4000), np.float32)
heatmaps[..., ::2, ::2] = 1
size = int(next(line for line in open("/proc/self/status") if line.startswith("VmSize")).split()[1]) << 10
resource.setrlimit(resource.RLIMIT_AS, (size + (60 << 20), -1))
for threads in (1, 2):
    try:
        local_maxima(heatmaps, 0.5, threads)
    except MemoryError:
        print("lacking")
""")
    assert printed.splitlines() == ["lacking"] * 2


def test_remembers_what_was_asked_for():
    assert Engine("lgcn-finder", "cpu").options == ("cpu", "auto", 0)
    assert Engine("lgcn-finder", "cpu", "fp32", 1).options == ("cpu", "fp32", 1)
