"""The fit on a GPU. Without one: its source in emulated blocks of threads, the kernel on a CPU, and the CUDA compiler
over it."""

import ctypes
import importlib.util
import shutil
import subprocess
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from test_fitting import faces, heatmaps_of, small_model, weak_peaks

from lgcn_fast import ShapeModel, fitting
from lgcn_fast.checkpoints import WEIGHTS
from lgcn_fast.fitting import CudaFitter, Fit, NativeFitter, fit
from lgcn_fast_kernels import cuda_fit, peak_centroids, window_moments

NAMES = ("points", "shapes", "coefficients", "certainties", "residuals")
# (landmarks, height, width, stride)
CASES = [(9, 96, 96, 1), (68, 41, 67, 1), (68, 48, 48, 2), (5, 13, 7, 3), (2, 41, 67, 2), (1, 20, 33, 1), (3, 1, 1, 1)]
# (threads, threads in a team): one, many alone, the teams of a GPU, a team of two rows of a window.
BLOCKS = [(1, 1), (3, 1), (8, 4), (32, 32)]


def reduction(heatmaps: np.ndarray) -> np.ndarray:
    """What the fit needs of all pixels, (B, N, 6) float32."""
    points, values = peak_centroids(heatmaps, 0)
    moments = window_moments(heatmaps, threshold=fitting.THRESHOLD)
    return np.concatenate([points, values[..., None], moments], axis=2).astype(np.float32)


def random_heatmaps(random, count, height, width, batch=3) -> np.ndarray:
    return (random.uniform(-0.2, 1, (batch, count, height, width)) ** 3).astype(np.float32)


def real_model() -> ShapeModel:
    return ShapeModel.load(WEIGHTS / "shape-68.safetensors")


def noisy_faces(model, random) -> np.ndarray:
    heatmaps = heatmaps_of(faces(model, random, 3)) + random.normal(size=(3, 68, 96, 96)).astype(np.float32) * 0.01
    heatmaps[:, ::5] = 0
    heatmaps[random.random(heatmaps.shape) < 0.01] = np.nan
    return heatmaps


def check(found: Fit, expected: Fit, atol: float) -> None:
    for name in NAMES:
        array = np.asarray(getattr(found, name))
        assert array.dtype == np.float32
        np.testing.assert_allclose(array, getattr(expected, name), rtol=atol, atol=atol, err_msg=name)


def check_noise(found: Fit, model: ShapeModel, heatmaps: np.ndarray, stride: float = 1) -> None:
    """Noise makes a small shape, over whose size the residual jumps, and a window's edge may lie on a pixel: there the
    last bit decides. So each face must be what `fit` gives for one of several roundings of its heatmaps."""
    roundings = 1 + 1e-6 * np.random.default_rng(0).normal(size=(16, *heatmaps.shape))
    roundings[0] = 1
    expected = fit(model, (heatmaps * roundings).reshape(-1, *heatmaps.shape[1:]), stride)
    same = np.ones((16, len(heatmaps)), dtype=bool)
    for name in NAMES:
        one, many = np.asarray(getattr(found, name)), getattr(expected, name)
        assert one.dtype == np.float32
        if name == "residuals":
            one, many = np.arctan(one), np.arctan(many)
        close = np.isclose(one, many.reshape(16, *one.shape), rtol=1e-4, atol=1e-4)
        same &= close.reshape(*same.shape, one[:1].size).all(axis=2)
    assert same.any(axis=0).all(), f"faces {np.flatnonzero(~same.any(axis=0))} of {found}"


def built(source: str, folder: Path, *flags: str) -> ctypes.CDLL:
    """A C++ file of this folder as a library, built in another one."""
    compiler = shutil.which("g++") or shutil.which("clang++")
    if not compiler:
        pytest.skip("needs g++ or clang++")
    path, library = Path(__file__).with_name(source), folder / "library.so"
    subprocess.run([compiler, *flags, f"-I{folder}", "-shared", "-fPIC", path, "-o", library], check=True)
    return ctypes.CDLL(str(library))


def fit_with(function, model: ShapeModel, heatmaps: np.ndarray, stride: float, block=(), sizes=()) -> Fit:
    """What a C++ function fits; `block` and `sizes` are arguments that not all of them have."""
    native = NativeFitter(model).native
    batch, count, height, width = heatmaps.shape
    shapes = (batch, count, 2), (batch, count, 2), (batch, native.modes), (batch, count), (batch,)
    out = [np.full(shape, np.nan, np.float32) for shape in shapes]

    def numbers(*values):
        return [ctypes.c_longlong(value) for value in values]

    def pointers(*arrays):
        return [array.ctypes.data_as(ctypes.c_void_p) for array in arrays]

    evidence, constants = reduction(heatmaps), native.constants
    function(
        *block, *numbers(batch), *pointers(heatmaps, evidence, constants),
        *numbers(*sizes, native.windows, height, width), ctypes.c_double(stride), *pointers(*out),
    )  # fmt: skip
    return Fit(*out)


@pytest.fixture(scope="module")
def emulated(tmp_path_factory):
    """`fit_face.hpp` on several CPU threads, as a function like `NativeFitter.__call__`."""
    include = f"-I{cuda_fit.SOURCES[0].parent}"
    flags = ("-std=c++20", "-O2", "-g", "-Wall", "-Wextra", "-Werror", "-pthread", include)
    function = built("emulated_block.cpp", tmp_path_factory.mktemp("emulated"), *flags).fit_faces

    def run(model: ShapeModel, heatmaps: np.ndarray, stride: float, block: tuple[int, int]) -> Fit:
        return fit_with(function, model, heatmaps, stride, block, (model.num_landmarks, len(model.modes) + 4))

    return run


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize(("count", "height", "width", "stride"), CASES)
def test_emulated_block_is_the_fit(emulated, random, count, height, width, stride, block):
    model = small_model(random, count)
    heatmaps = random_heatmaps(random, count, height, width)
    check_noise(emulated(model, heatmaps, stride, block), model, heatmaps, stride)


@pytest.mark.parametrize("block", BLOCKS)
def test_emulated_block_of_faces_is_the_fit(emulated, random, block):
    model = real_model()
    heatmaps = noisy_faces(model, random)
    check(emulated(model, heatmaps, 1, block), fit(model, heatmaps), 1e-3)


@pytest.mark.parametrize("block", BLOCKS)
def test_emulated_block_leaves_out_peaks_far_from_the_shape(emulated, random, block):
    model = real_model()
    heatmaps, _ = weak_peaks(model, random)
    check(emulated(model, heatmaps, 1, block), fit(model, heatmaps), 1e-3)


def test_emulated_block_of_faces_partly_outside_is_the_fit(emulated, random):
    model = real_model()
    heatmaps = heatmaps_of(faces(model, random) - [35, 20])
    check(emulated(model, heatmaps, 1, (8, 4)), fit(model, heatmaps), 1e-3)


def test_without_evidence_the_mean_face_stands_in_the_middle(emulated):
    fitted = emulated(real_model(), np.zeros((1, 68, 96, 96), np.float32), 1, (8, 4))
    np.testing.assert_allclose(fitted.shapes[0].mean(axis=0), 47.5, atol=1e-5)
    assert np.isinf(fitted.residuals[0])
    assert not fitted.certainties.any()


@pytest.fixture(scope="module")
def on_device(tmp_path_factory):
    """The kernel itself, with all that is for a GPU only, as a function like `NativeFitter.__call__`."""

    @cache
    def function(landmarks: int, parameters: int):
        folder = tmp_path_factory.mktemp("device")
        (folder / "kernel.cu").write_text(cuda_fit.cuda_source())
        sizes = [option for option in cuda_fit.cuda_options(landmarks, parameters) if option.startswith("-D")]
        return built("device_on_cpu.cpp", folder, "-std=c++17", "-O1", "-w", *sizes).fit_faces_on_device

    def run(model: ShapeModel, heatmaps: np.ndarray, stride: float = 1) -> Fit:
        return fit_with(function(model.num_landmarks, len(model.modes) + 4), model, heatmaps, stride)

    return run


@pytest.mark.parametrize(("count", "height", "width", "stride"), CASES)
def test_kernel_is_the_fit(on_device, random, count, height, width, stride):
    model = small_model(random, count)
    heatmaps = random_heatmaps(random, count, height, width)
    check_noise(on_device(model, heatmaps, stride), model, heatmaps, stride)


def test_kernel_of_faces_is_the_fit(on_device, random):
    model = real_model()
    heatmaps = noisy_faces(model, random)
    check(on_device(model, heatmaps), fit(model, heatmaps), 1e-4)


def test_kernel_leaves_out_peaks_far_from_the_shape(on_device, random):
    model = real_model()
    heatmaps, _ = weak_peaks(model, random)
    check(on_device(model, heatmaps), fit(model, heatmaps), 1e-3)


@pytest.mark.parametrize("modes", [0, 27, 28, 29, 40])
def test_kernel_of_few_and_many_modes_is_the_fit(on_device, random, modes):
    """Up to 32 parameters a warp solves the system in its registers."""
    model = small_model(random, 68, modes)
    heatmaps = heatmaps_of(faces(model, random, 2))
    check(on_device(model, heatmaps), fit(model, heatmaps), 1e-4)


@pytest.mark.skipif(not importlib.util.find_spec("nvidia"), reason="needs NVRTC (pip install nvidia-cuda-nvrtc-cu12)")
@pytest.mark.parametrize("parameters", [24, 40])
@pytest.mark.parametrize("architecture", ["sm_80", "sm_90"])
def test_compiles_without_a_warning(architecture, parameters):
    nvrtc = load_nvrtc()
    program, size = ctypes.c_void_p(), ctypes.c_size_t()
    source = cuda_fit.cuda_source().encode()
    assert nvrtc.nvrtcCreateProgram(ctypes.byref(program), source, b"fit_face.cu", 0, None, None) == 0
    # (-ftz: CuPy's.)
    options = [
        option.encode() for option in (*cuda_fit.cuda_options(68, parameters), "-ftz=true", f"-arch={architecture}")
    ]
    result = nvrtc.nvrtcCompileProgram(program, len(options), (ctypes.c_char_p * len(options))(*options))
    assert nvrtc.nvrtcGetProgramLogSize(program, ctypes.byref(size)) == 0
    log = ctypes.create_string_buffer(size.value)
    assert nvrtc.nvrtcGetProgramLog(program, log) == 0
    assert (result, log.value.decode()) == (0, "")
    nvrtc.nvrtcDestroyProgram(ctypes.byref(program))


def load_nvrtc() -> ctypes.CDLL:
    folders = importlib.util.find_spec("nvidia").submodule_search_locations
    for library in (path for folder in folders for path in Path(folder).glob("*/lib/libnvrtc.so.*")):
        for part in library.parent.glob("libnvrtc-builtins.so.*"):  # which it does not look for beside itself
            ctypes.CDLL(str(part))
        return ctypes.CDLL(str(library))
    pytest.skip("needs NVRTC (pip install nvidia-cuda-nvrtc-cu12)")


def test_wrong_device_is_named():
    with pytest.raises(ValueError, match="device: expected 'cuda', got 'cpu'"):
        CudaFitter(real_model(), "cpu")


def poisoned(fitter: CudaFitter, batch: int) -> Fit:
    count, modes = fitter.num_landmarks, fitter.kernel.modes
    shapes = (batch, count, 2), (batch, count, 2), (batch, modes), (batch, count), (batch,)
    return Fit(*(torch.full(shape, torch.nan, device="cuda") for shape in shapes))


def on_host(fitted: Fit) -> Fit:
    return Fit(*(getattr(fitted, name).cpu() for name in NAMES))


@pytest.mark.gpu
@pytest.mark.parametrize("batch", [0, 1, 3])
@pytest.mark.parametrize(("count", "height", "width", "stride"), CASES)
def test_on_a_gpu_is_the_fit(random, batch, count, height, width, stride):
    model = small_model(random, count)
    heatmaps = random_heatmaps(random, count, height, width, batch)
    fitter = CudaFitter(model)
    device_heatmaps, peaks = torch.from_numpy(heatmaps).cuda(), torch.from_numpy(reduction(heatmaps)).cuda()
    out = poisoned(fitter, batch)
    assert fitter(device_heatmaps, peaks, stride, out).points is out.points
    check_noise(on_host(out), model, heatmaps, stride)
    check(on_host(fitter(device_heatmaps, peaks, stride)), on_host(out), 0)


@pytest.mark.gpu
def test_more_faces_than_processors(random):
    model = small_model(random, 5)
    heatmaps = random_heatmaps(random, 5, 20, 20, 1000)
    inputs = [torch.from_numpy(x).cuda() for x in (heatmaps, reduction(heatmaps))]
    check_noise(on_host(CudaFitter(model)(*inputs)), model, heatmaps)


@pytest.mark.gpu
def test_faces_on_a_side_stream(random):
    model = real_model()
    arrays = noisy_faces(model, random)
    fitter = CudaFitter(model)
    out = poisoned(fitter, 3)
    sources = [torch.from_numpy(x).pin_memory() for x in (arrays, reduction(arrays))]
    inputs = [torch.zeros_like(source, device="cuda") for source in sources]
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)  # The inputs come late: a fit on another stream would not see them.
        for array, source in zip(inputs, sources, strict=True):
            array.copy_(source, non_blocking=True)
        fitter(*inputs, 1, out)
        assert not stream.query()  # Nothing waited for the device.
        found = on_host(out)
    check(found, fit(model, arrays), 1e-3)


@pytest.mark.gpu
def test_in_a_cuda_graph(random):
    model = real_model()
    fitter = CudaFitter(model)
    heatmaps, peaks = torch.zeros(3, 68, 96, 96, device="cuda"), torch.zeros(3, 68, 6, device="cuda")
    out = poisoned(fitter, 3)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        fitter(heatmaps, peaks, 1, out)
    for _ in range(2):
        arrays = noisy_faces(model, random)
        heatmaps.copy_(torch.from_numpy(arrays))
        peaks.copy_(torch.from_numpy(reduction(arrays)))
        graph.replay()
        check(on_host(out), fit(model, arrays), 1e-3)


@pytest.mark.gpu
def test_many_landmarks_on_a_gpu(random):
    """More than 48 KiB of shared memory."""
    model = small_model(random, 1500)
    heatmaps = random_heatmaps(random, 1500, 12, 12, 1)
    inputs = [torch.from_numpy(x).cuda() for x in (heatmaps, reduction(heatmaps))]
    check_noise(on_host(CudaFitter(model)(*inputs)), model, heatmaps)


@pytest.mark.gpu
def test_wrong_arrays_are_named():
    fitter = CudaFitter(real_model())
    heatmaps, peaks = torch.zeros(1, 68, 9, 9, device="cuda"), torch.zeros(1, 68, 6, device="cuda")
    with pytest.raises(ValueError, match=r"heatmaps: expected \(B, 68, H, W\)"):
        fitter(heatmaps[:, 1:], peaks)
    with pytest.raises(ValueError, match=r"heatmaps: expected contiguous .* got strides"):
        fitter(heatmaps.mT, peaks)
    with pytest.raises(ValueError, match=r"peaks: expected contiguous .* got contiguous \(1, 68, 6\) torch.float64"):
        fitter(heatmaps, peaks.double())
    with pytest.raises(ValueError, match=r"stride: expected a positive number, got 0"):
        fitter(heatmaps, peaks, 0)
    with pytest.raises(ValueError, match=r"out: expected contiguous \(1, 68, 2\)"):
        fitter(heatmaps, peaks, 1, poisoned(fitter, 2))
