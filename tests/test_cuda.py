"""The engine on a GPU. Where there is none, its kernels are interpreted and its batches run without a record."""

import gc
import importlib.util
import threading
import weakref
from contextlib import nullcontext
from dataclasses import fields

import numpy as np
import pytest
import torch
from networks import CONFIGS, eager, randomised

from lgcn_fast import Engine, LGCNConfig, ShapeModel, engine, load_model, predict
from lgcn_fast.fitting import Fit, NativeFitter
from lgcn_fast.folding import fold
from lgcn_fast.images import read_image
from lgcn_fast.loading import shape_for
from lgcn_fast.native import NativeEngine

pytestmark = pytest.mark.skipif(not importlib.util.find_spec("triton"), reason="no triton (pip install '.[gpu]')")
DEVICE = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
IMAGE = (1, 4, 6)


@pytest.fixture(scope="module")
def cuda():
    from lgcn_fast import cuda

    return cuda


@pytest.mark.parametrize("name", CONFIGS)
@torch.inference_mode()
def test_fp32_is_the_model(cuda, name):
    model = randomised(CONFIGS[name])
    for height, width in ((13, 30), (1, 1)):
        images = torch.randint(0, 256, (2, model.config.in_channels, height, width), dtype=torch.uint8)
        expected = eager(model, images)
        for form in (images, images.float()):
            heatmaps = cuda.CudaNetwork(fold(model), DEVICE, torch.float32)(form.to(DEVICE)).cpu()
            assert heatmaps.dtype == torch.float32
            assert heatmaps.is_contiguous()
            torch.testing.assert_close(heatmaps.double(), expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


@pytest.mark.parametrize("name", ["plain", "nano", "cross entropy"])
@torch.inference_mode()
def test_half_precision_is_near_the_model(cuda, name):
    """fp16, which Triton's interpreter computes as a GPU does; bf16 differs in the type alone."""
    model = randomised(CONFIGS[name])
    images = torch.randint(0, 256, (1, 1, 24, 24), dtype=torch.uint8)
    heatmaps = cuda.CudaNetwork(fold(model), DEVICE, torch.float16)(images.to(DEVICE)).cpu()
    expected = eager(model, images)
    torch.testing.assert_close(heatmaps.double(), expected, rtol=0, atol=5e-3 * float(expected.abs().max()))


@torch.inference_mode()
def test_fp8_is_near_the_model(cuda):
    """As far as its rounding errors, of which Triton's interpreter makes some larger ones, allow."""
    model = randomised(CONFIGS["nano"])
    images = torch.randint(0, 256, (1, 1, 24, 24), dtype=torch.uint8)
    plain, ours = (cuda.CudaNetwork(fold(model), DEVICE, torch.float16, inner) for inner in (None, cuda.FP8))
    assert cuda.FP8 in [layer.weight.dtype for layer in (*ours._local, *ours._context)]
    expected, heatmaps = eager(model, images), ours(images.to(DEVICE))
    assert not torch.equal(heatmaps, plain(images.to(DEVICE)))
    assert (heatmaps.cpu() - expected).norm() / expected.norm() < 0.1


def recorded(cuda):
    """Sums of images, and the batches that the function behind them was asked for."""
    sizes, results = [], {}

    def sums(images):
        sizes.append(len(images))
        result = images.float().sum(dim=(2, 3))
        if DEVICE.type == "cuda":
            return result
        # As of a graph: each buffer has one result, which is written again and again.
        return results.setdefault((images.data_ptr(), len(images)), torch.empty_like(result)).copy_(result)

    return cuda.RecordedBatches(sums, IMAGE, DEVICE), sizes


@pytest.mark.parametrize(("count", "steps"), [(1, [1]), (3, [4]), (64, [64]), (130, [64, 64, 2])])
@torch.inference_mode()
def test_batches_go_up_to_the_sizes_of_the_ladder(cuda, count, steps):
    run, sizes = recorded(cuda)
    images = torch.randint(0, 256, (count, *IMAGE), dtype=torch.uint8)
    expected = images.float().sum(dim=(2, 3))
    for form, to_host in ((images, False), (images.to(DEVICE), True), (images, True)):
        for _ in range(2):
            sums = run(form, to_host)
            assert sums.device == (torch.device("cpu") if to_host else DEVICE)
            assert torch.equal(sums.cpu(), expected)
    # On a GPU a size is computed twice, to warm up and to record, and then replayed; once more from host to host.
    once = [size for size in dict.fromkeys(steps) for _ in range(2)]
    assert sizes == (once * (2 if count <= 64 else 1) if DEVICE.type == "cuda" else steps * 6)


@torch.inference_mode()
def test_results_outlive_the_next_call(cuda):
    run, _ = recorded(cuda)
    first = run(torch.full((3, *IMAGE), 1, dtype=torch.uint8))
    second = run(torch.full((2, *IMAGE), 2, dtype=torch.uint8))
    assert first.unique().tolist() == [24]
    assert second.unique().tolist() == [48]


@torch.inference_mode()
def test_other_images_are_not_recorded(cuda):
    run, sizes = recorded(cuda)
    for images in (torch.ones(5, 1, 7, 7, dtype=torch.uint8), torch.ones(5, *IMAGE)):
        assert torch.equal(run(images).cpu(), images.float().sum(dim=(2, 3)))
    assert sizes == [5, 5]


@pytest.mark.parametrize("to_host", [False, True])
@pytest.mark.parametrize("busy", [False, True])
@torch.inference_mode()
def test_results_stay_when_others_follow(cuda, to_host, busy):
    """Also where another call has the pinned memory."""
    run, _ = recorded(cuda)
    with run._pinned_memory if busy else nullcontext():
        results = [run(torch.full((2, *IMAGE), value, dtype=torch.uint8), to_host) for value in range(4)]
    assert [result.cpu().tolist() for result in results] == [[[24.0 * value]] * 2 for value in range(4)]


@torch.inference_mode()
def test_a_call_that_comes_in_between_takes_other_memory(cuda, monkeypatch):
    run, _ = recorded(cuda)
    replay, others = run._replay, []

    def interrupted(images, to_host, pinned=False):
        result = replay(images, to_host, pinned)
        if pinned:
            others.append(run(images + 1, True))
        return result

    monkeypatch.setattr(run, "_replay", interrupted)
    results = [run(torch.full((2, *IMAGE), value, dtype=torch.uint8), True) for value in (1, 3)]
    assert [result.unique().tolist() for result in results + others] == [[24.0], [72.0], [48.0], [96.0]]


@torch.inference_mode()
def test_pinned_memory_is_handed_back_when_a_call_fails(cuda):
    fails = cuda.RecordedBatches(lambda images: images.no_such_method(), IMAGE, DEVICE)
    with pytest.raises(AttributeError, match="no_such_method"):
        fails(torch.zeros(1, *IMAGE, dtype=torch.uint8), True)
    assert not fails._pinned_memory.locked()


@torch.inference_mode()
def test_images_need_not_be_contiguous(cuda, random):
    run, _ = recorded(cuda)
    images = random.integers(0, 256, (6, 8, 6, 1), np.uint8)[::2, ::2]
    images = torch.from_numpy(images).permute(0, 3, 1, 2)
    assert not images.is_contiguous()
    assert torch.equal(run(images, True), images.float().sum(dim=(2, 3)))


def test_batches_of_several_threads(cuda):
    run, _ = recorded(cuda)
    calls = [(1, DEVICE, True), (3, DEVICE, False), (3, "cpu", True), (7, DEVICE, True), (7, "cpu", True)]
    results = []

    @torch.inference_mode()
    def work(value: int) -> None:
        stream = torch.cuda.Stream() if DEVICE.type == "cuda" else None
        with torch.cuda.stream(stream):
            for count, device, to_host in calls * 5:
                sums = run(torch.full((count, *IMAGE), value, dtype=torch.uint8, device=device), to_host)
                results.append((sums.cpu().tolist(), [[24.0 * value]] * count))

    threads = [threading.Thread(target=work, args=(value,)) for value in range(1, 6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 5 * len(calls) * 5
    assert all(found == expected for found, expected in results)


class HostFitter:
    """In the place of the fit on the device."""

    def __init__(self, shape: ShapeModel, device: torch.device) -> None:
        self._fitter = NativeFitter(shape)

    def __call__(self, heatmaps, reductions, stride) -> Fit:
        fit = self._fitter(heatmaps.cpu().numpy(), stride)
        return Fit(*(torch.from_numpy(getattr(fit, f.name)).float().to(DEVICE) for f in fields(fit)))


@pytest.mark.parametrize("to_host", [True, False])
@torch.inference_mode()
def test_engine_finds_what_the_native_one_finds(cuda, random, to_host):
    """Crops go through recorded batches, images of another size do not."""
    config = LGCNConfig.nano(filters=16, num_landmarks=3, local_kernels=(3,), global_layers=1, input_size=24)
    network = fold(randomised(config))
    shape = ShapeModel.fit(random.normal(size=(20, 3, 2)), 2)
    # (Results are moved to the host for to_host: on a CPU nothing can be recorded with a fit on the host.)
    ours = cuda.CudaEngine(network, DEVICE, torch.float32, fitter=HostFitter)
    expected = NativeEngine(network, "fp32", 1)
    for side in (24, 21):
        images = torch.from_numpy(random.integers(0, 256, (3, 1, side, side), np.uint8))
        torch.testing.assert_close(ours.heatmaps(images).cpu(), expected.heatmaps(images), rtol=0, atol=1e-4)
        offsets = random.integers(-3, 4, (2, 3, 2))
        votes = (engine.votes(images, offsets, [0, 2], 2) for engine in (ours, expected))
        np.testing.assert_allclose(*votes, atol=1e-4)
        pairs = list(zip(ours.maxima(images, to_host), expected.maxima(images, True), strict=True))
        if DEVICE.type == "cpu":
            fitted, known = ours.fit(images, shape, to_host), expected.fit(images, shape, True)
            pairs += [(getattr(fitted, f.name), getattr(known, f.name)) for f in fields(Fit)]
        for found, known in pairs:
            assert isinstance(found, np.ndarray if to_host else torch.Tensor)
            np.testing.assert_allclose(torch.as_tensor(found).cpu(), known, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("faces", [0, 1, 4])
def test_parts_of_a_fit_lie_side_by_side(cuda, random, faces):
    shape = ShapeModel.fit(random.normal(size=(20, 3, 2)), 2)
    expected = Fit(*(torch.rand(4, *size) for size in ((3, 2), (3, 2), (2,), (3,), ())))

    def network(images):
        return torch.zeros(4, 3, 8, 8, device=DEVICE)

    network.config = LGCNConfig(num_landmarks=3)
    packed = cuda.packed_fit(network, lambda *_: expected)(torch.zeros(4, 1, 8, 8))[:faces]
    for found in (cuda.unpacked_fit(packed, shape), cuda.unpacked_fit(packed.numpy(), shape)):
        for field in fields(Fit):
            np.testing.assert_array_equal(getattr(found, field.name), getattr(expected, field.name)[:faces])


@torch.inference_mode()
def test_engines_are_freed_without_the_garbage_collector(cuda, random):
    config = LGCNConfig.nano(filters=16, num_landmarks=3, local_kernels=(3,), global_layers=1, input_size=24)
    ours = cuda.CudaEngine(fold(randomised(config)), DEVICE, torch.float32, fitter=HostFitter)
    images = torch.from_numpy(random.integers(0, 256, (2, 1, 24, 24), np.uint8))
    ours.heatmaps(images)
    ours.maxima(images, True)
    if DEVICE.type == "cpu":
        ours.fit(images, ShapeModel.fit(random.normal(size=(20, 3, 2)), 2), True)
    parts = [weakref.ref(part) for part in (ours, ours._heatmaps, ours._reductions)]
    gc.disable()
    try:
        del ours
        assert [part() for part in parts] == [None] * 3
    finally:
        gc.enable()


def test_what_is_missing_is_named(monkeypatch):
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="device: expected one that is there, got 'cuda', but"):
            Engine(randomised(CONFIGS["nano"]), "cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(engine, "find_spec", lambda name: None if name == "cupy" else "there")
    with pytest.raises(ValueError, match=r"'cuda' needs triton and cupy, got no cupy .*pip install"):
        Engine(randomised(CONFIGS["nano"]), "cuda")


def test_an_old_cupy_is_named(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(engine, "find_spec", lambda name: "there")
    monkeypatch.setattr(engine, "version", {"cupy-cuda12x": "13.6.0"}.__getitem__)
    engine.old_cupy.cache_clear()
    with pytest.raises(ValueError, match=r"device: 'cuda' needs CuPy 14 or newer, got 13\.6\.0"):
        Engine(randomised(CONFIGS["nano"]), "cuda")
    assert engine.engine_device("auto") == torch.device("cpu")
    engine.old_cupy.cache_clear()


def test_a_gpu_too_many_is_named(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(ValueError, match=r"device: expected one of 2 GPUs, counted from 0, got 'cuda:2'"):
        Engine(randomised(CONFIGS["nano"]), "cuda:2")


@pytest.mark.parametrize(
    ("there", "capability", "missing", "expected"),
    [
        (True, (9, 0), (), torch.device("cuda", 3)),
        (True, (9, 0), ("cupy",), torch.device("cpu")),
        (True, (7, 5), (), torch.device("cpu")),
        (False, (9, 0), (), torch.device("cpu")),
    ],
)
def test_auto_is_a_gpu_that_can_be_used(monkeypatch, there, capability, missing, expected):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: there)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(engine, "find_spec", lambda name: None if name in missing else "there")
    assert engine.engine_device("auto") == expected
    assert engine.engine_device("cpu") == torch.device("cpu")


@pytest.fixture
def frames(demo_picture):
    """Four frames of a face, with its boxes."""
    image = read_image(demo_picture, color=True)
    shifts = range(0, 12, 3)
    boxes = np.array([[82 + shift, 70, 124, 124] for shift in shifts])
    return np.stack([np.roll(image, shift, axis=1) for shift in shifts]), boxes


@pytest.mark.gpu
@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 1e-4), ("bf16", 0.03), ("fp8", 0.2)])
@pytest.mark.parametrize("name", CONFIGS)
def test_gpu_heatmaps_are_the_models(name, precision, tolerance):
    model = randomised(CONFIGS[name])
    ours = Engine(model, "cuda", precision)
    assert (ours.backend, ours.precision) == ("cuda", precision)
    for shape in ((5, 96, 96), (2, 97, 41)):
        images = torch.randint(0, 256, (shape[0], model.config.in_channels, *shape[1:]), dtype=torch.uint8)
        expected = eager(model, images)
        for form in (images, images.cuda()):
            heatmaps = ours.heatmaps(form).cpu().double()
            torch.testing.assert_close(heatmaps, expected, rtol=0, atol=tolerance * float(expected.abs().max()))


@pytest.mark.gpu
@pytest.mark.parametrize(("precision", "pixels"), [("fp32", 0.01), ("bf16", 0.1), ("fp8", 0.2)])
@pytest.mark.parametrize("fit", [True, False])
def test_gpu_points_are_those_of_a_cpu(frames, precision, pixels, fit):
    """From the host and from the device, in photo coordinates."""
    images, boxes = frames
    expected = predict(images, boxes, "lgcn-nano", device="cpu", precision="fp32", fit=fit)
    forms = {
        "host": images,
        "device": torch.from_numpy(images).cuda(),
        "channels first": torch.from_numpy(images).cuda().permute(0, 3, 1, 2),
        "float": torch.from_numpy(images).cuda().float(),
    }
    for name, form in forms.items():
        found = predict(form, boxes, "lgcn-nano", device="cuda", precision=precision, fit=fit)
        distance = np.linalg.norm(found.points - expected.points, axis=-1)
        # (Crops of floating point are not rounded to whole levels.)
        assert np.median(distance) < max(pixels, 0.03 if name == "float" else 0), name
        np.testing.assert_allclose(found.scores, expected.scores, atol=0.05, err_msg=name)
        there = predict(form, boxes, "lgcn-nano", device="cuda", precision=precision, fit=fit, to_host=False)
        assert there.points.is_cuda
        assert there.scores.dtype == torch.float32
        np.testing.assert_allclose(there.points.cpu(), found.points, atol=1e-3, err_msg=name)


@pytest.mark.gpu
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("name", "counts"), [("lgcn-nano", (1, 3, 64, 65, 3, 1)), ("lgcn-128", (1, 1))])
def test_gpu_host_to_host_is_device_to_device(random, name, counts, stream):
    """Bit for bit, and still when later calls have used the same memory; images as they may lie on the host."""
    ours, shape = Engine(name, "cuda"), shape_for(None, 68)
    channels, size = ours.config.in_channels, ours.config.input_size
    results = []
    with torch.cuda.stream(torch.cuda.Stream() if stream else None):
        for count in counts:
            pictures = random.integers(0, 256, (count, size, 2 * size, channels), np.uint8)
            images = torch.from_numpy(pictures)[:, :, ::2].permute(0, 3, 1, 2)
            expected, maxima = ours.fit(images.cuda(), shape, to_host=False), ours.maxima(images.cuda(), to_host=False)
            for form in (images, images.numpy(), images.contiguous(), images.contiguous().pin_memory()):
                fitted, found = ours.fit(form, shape), ours.maxima(form)
                results += [(getattr(fitted, f.name), getattr(expected, f.name)) for f in fields(Fit)]
                results += list(zip(found, maxima, strict=True))
        for found, known in results:
            np.testing.assert_array_equal(found, known.cpu())


@pytest.mark.gpu
@pytest.mark.parametrize("pinned", [False, True])
def test_gpu_images_belong_to_the_caller_again(random, pinned):
    """Also where the device has not come to them yet; and all of a batch may be one."""
    ours = Engine("lgcn-nano", "cuda")
    image = torch.from_numpy(random.integers(0, 256, (1, 1, 96, 96), np.uint8))
    expected = ours.heatmaps(image.cuda()).cpu()
    ours.heatmaps(image.expand(3, -1, -1, -1))  # records it
    staging = image.pin_memory() if pinned else image.clone()
    torch.cuda._sleep(100_000_000)
    found = ours.heatmaps(staging.expand(3, -1, -1, -1))
    staging.zero_()
    for heatmaps in found.cpu():
        torch.testing.assert_close(heatmaps, expected[0], rtol=0, atol=1e-2)


@pytest.mark.gpu
def test_gpu_host_to_host_of_several_threads(random):
    """One has the pinned memory, the others do not; each in a stream of its own."""
    ours, shape = Engine("lgcn-nano", "cuda"), shape_for(None, 68)
    images = random.integers(0, 256, (4, 3, ours.config.in_channels, *[ours.config.input_size] * 2), np.uint8)
    expected = [ours.fit(batch, shape).points for batch in images]
    results = []

    def work(index: int) -> None:
        with torch.cuda.stream(torch.cuda.Stream()):
            results.extend((index, ours.fit(images[index], shape).points) for _ in range(50))

    threads = [threading.Thread(target=work, args=(index,)) for index in range(len(images))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 50 * len(images)
    for index, found in results:
        np.testing.assert_array_equal(found, expected[index])


@pytest.mark.gpu
def test_gpu_takes_arrays_of_other_libraries(frames):
    import cupy

    images, boxes = frames
    expected = predict(images, boxes, device="cuda").points
    np.testing.assert_allclose(predict(cupy.asarray(images), boxes, device="cuda").points, expected, atol=0.05)


@pytest.mark.gpu
def test_gpu_finds_several_faces_in_one_frame(frames):
    image, boxes = frames[0][0], frames[1]
    expected = predict(image, boxes, device="cuda").points
    found = predict(torch.from_numpy(image).cuda(), boxes, device="cuda").points
    np.testing.assert_allclose(found, expected, atol=0.05)


@pytest.mark.gpu
def test_gpu_streams_and_threads_at_once(frames):
    """The caller's stream is the one that works: a batch that is still being written there is waited for."""
    images, boxes = torch.from_numpy(frames[0]).cuda(), frames[1]
    ours = Engine(load_model("lgcn-nano"), "cuda")
    expected = predict(images, boxes, ours).points
    wrong = []

    def work() -> None:
        with torch.cuda.stream(torch.cuda.Stream()):
            for _ in range(20):
                late = torch.zeros_like(images)
                torch.cuda._sleep(1_000_000)
                late.copy_(images)
                if not np.allclose(predict(late, boxes, ours).points, expected, atol=1e-3):
                    wrong.append(1)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
