"""Everything that needs an NVIDIA GPU: the tests of what runs there, then times beside PyTorch's."""

import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from importlib.metadata import version
from importlib.util import find_spec
from itertools import product
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from end_to_end import latencies
from heatmaps import real_crops, real_heatmaps
from network import TOLERANCE, giga_multiply_adds
from runtimes import constant_bands
from timing import output_folder, turn, write

from lgcn_fast import LGCN, Engine, ShapeModel, gaussian_sum, load_model, predict
from lgcn_fast.checkpoints import WEIGHTS
from lgcn_fast.engine import known_precisions
from lgcn_fast.fitting import CudaFitter, Fit, fit
from lgcn_fast.images import from_crop
from lgcn_fast.operators import gaussian_sum_banded

BATCHES = (1, 64)
NETWORKS = ("lgcn-128", "lgcn-nano-128", "lgcn-64", "lgcn-nano", "lgcn-16")
LAYERS = ((3, 4, 96), (5, 1, 96), (3, 1, 24))
"""Filter size, dilation and side of the inner layers: context and local subnet, those of nano."""
LONGEST_TESTS = 150
"""Seconds after which the tests are given up: the times still count."""
LAST_COMPILATION = 300
"""Seconds behind the start at which torch.compile, which takes a minute or more, is begun at the latest."""
LAST_TABLE = 450
"""Seconds behind the start at which a table of launch constants is begun at the latest: eight minutes are for all."""
TESTS = tuple(
    f"test_{name}.py" for name in ("triton", "triton_convolution", "triton_crop", "triton_peaks", "cuda", "cuda_fit")
)
START = time.monotonic()


def on_device(function: Callable[[], object]) -> float:
    """Median time on the device, milliseconds: of kernels, while the host is ahead of them."""
    from triton.testing import do_bench

    return do_bench(function, warmup=25, rep=100, return_mode="median")


def replayed(function: Callable[[], object]) -> float:
    """Median time on the device, milliseconds, recorded as a CUDA graph: without the gaps between short kernels."""
    from triton.testing import do_bench_cudagraph

    with torch.cuda.stream(torch.cuda.Stream()):
        return do_bench_cudagraph(function, rep=20, return_mode="median")


def by_the_clock(function: Callable[[], object]) -> float:
    """Time of a call among others, the host's work included, milliseconds: median of five turns behind the first."""
    return float(np.median([turn(function, 0.1, torch.cuda.synchronize) for _ in range(6)][1:]))


def table(
    title: str, functions: dict[str, Callable[[], object]], time_of: Callable[[Callable], float] = on_device
) -> dict[str, float]:
    """Time functions one after the other and print them beside the first; NaN for those that cannot run here."""
    times: dict[str, float] = {}
    print(f"\n{title}")
    for name, function in functions.items():
        try:
            times[name] = time_of(function)
        except Exception as error:  # whatever Triton, CuPy and PyTorch raise: the others still count
            times[name] = float("nan")
            print(f"{name:<44}{type(error).__name__}: {(str(error).splitlines() or [''])[0]}", flush=True)
            continue
        first = next(iter(times.values()))
        print(f"{name:<44}{times[name]:>11.4f} ms{first / times[name]:>9.1f}x", flush=True)
    return times


def tests() -> list[int]:
    """Exit codes of the tests that run on a GPU: all of the kernels, compiled here, and the `gpu` ones of other files.

    -1 where there was not enough time.
    """
    folder = Path(__file__).parents[1] / "tests"
    command = [sys.executable, "-m", "pytest", "-q", "--maxfail=20", "--continue-on-collection-errors"]
    if find_spec("xdist"):  # most of the time goes into compiling kernels, on the host
        command += ["-n", "8", "-p", "no:benchmark"]
    kernels = [folder / name for name in TESTS]
    others = ["-m", "gpu", *(f"--ignore={path}" for path in kernels)]
    start, codes = time.monotonic(), []
    for chosen in (kernels, others):
        left = LONGEST_TESTS - (time.monotonic() - start)
        try:
            codes.append(subprocess.run([*command, *chosen], cwd=folder.parent, timeout=max(left, 10)).returncode)
        except subprocess.TimeoutExpired:
            codes.append(-1)
    return codes


def limits() -> dict[str, float]:
    """What this GPU can do at best: bytes moved by a copy, bf16 matrix products of random numbers."""
    source = torch.empty(2**31, dtype=torch.uint8, device="cuda")
    a = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    times = table("limits", {"copy of 2 GiB": source.clone, "8192 x 8192 x 8192, bf16": lambda: a @ a})
    copy, matrix = times.values()
    result = {"copy_gb_per_s": 2 * 2**31 / copy / 1e6, "bf16_tflops": 2 * 8192**3 / matrix / 1e9}
    print(result)
    return result


def kernel_convolution(copy: float) -> dict[str, dict]:
    """136 maps of 96 x 96, with the share of the bandwidth of a copy."""
    from lgcn_fast_kernels.triton_gaussian_sum import gaussian_sum as fused

    results = {}
    for batch in BATCHES:
        maps = torch.randn(batch, 136, 96, 96, device="cuda")
        half = maps.bfloat16()
        error = (fused(half).float() - gaussian_sum(maps)).norm() / gaussian_sum(maps).norm()
        assert error < 1e-2, f"relative error {error}"
        functions = {
            "grouped convolution, fp32": lambda m=maps: gaussian_sum(m),
            "matrix products, bf16": lambda m=half: gaussian_sum_banded(m),
            "Triton, fp32": lambda m=maps: fused(m),
            "Triton, bf16": lambda m=half: fused(m),
        }
        times = table(f"kernel convolution, 136 maps x batch {batch}", functions)
        share = 2 * half.numel() * 2 / times["Triton, bf16"] / 1e6 / copy
        print(f"{100 * share:.0f} % of the copy bandwidth")
        results[f"batch {batch}"] = times | {"share_of_copy": share}
    return results


def convolutions(peak: float) -> dict[str, dict]:
    """Inner layers in bf16: launch constants beside each other, beside cuDNN's fused call, the widest beside fp8."""
    from lgcn_fast_kernels.triton_convolution import FP8, TILES, Convolution, tiles_of

    results = {}
    for (filters, tiles), (size, dilation, side), batch in product(TILES.items(), LAYERS, BATCHES):
        if time.monotonic() - START > LAST_TABLE:
            print("no time left for more launch constants")
            break
        x = torch.randn(batch, filters, side, side, device="cuda", dtype=torch.bfloat16).relu_()
        x = x.contiguous(memory_format=torch.channels_last)
        weight = torch.randn(filters, filters, size, size, device="cuda", dtype=torch.bfloat16) / (size * filters**0.5)
        bias = torch.randn(filters, device="cuda", dtype=torch.bfloat16)
        fused = weight.contiguous(memory_format=torch.channels_last)
        padding = size // 2 * dilation
        functions: dict[str, Callable[[], object]] = {
            "cuDNN": lambda x=x, w=fused, b=bias, p=padding, d=dilation: F.conv2d(x, w, b, 1, p, d).relu_(),
            "cuDNN, fused": lambda x=x, w=fused, b=bias, p=padding, d=dilation: torch.cudnn_convolution_relu(
                x, w, b, (1, 1), (p, p), (d, d), 1
            ),
        }
        for tile in tiles:
            ours = Convolution(weight, bias, dilation, relu=True, tile=tile)
            functions[str(tile)] = lambda f=ours, x=x: f(x)
        rounded = x.to(FP8, memory_format=torch.channels_last)
        for tile in tiles_of(filters, filters, size, FP8, planes=False) if filters == max(TILES) else ():
            ours = Convolution(weight.to(FP8), bias, dilation, relu=True, tile=tile)
            functions[f"fp8, {tile}"] = lambda f=ours, x=rounded: f(x)
        name = f"F = {filters}, {size} x {size}, dilation {dilation}, {side} x {side}, batch {batch}"
        times = table(name, functions, replayed)
        best = np.nanmin([time for name, time in times.items() if not name.startswith("fp8")])
        rate = 2 * x.numel() * filters * size**2 / best / 1e9
        print(f"the best of bf16: {rate:.0f} TFLOP/s, {100 * rate / peak:.0f} % of the limit")
        results[name] = times
    return results


def eager(model: LGCN, images: torch.Tensor, allow_tf32: bool = False) -> torch.Tensor:
    """Heatmaps by PyTorch in fp32 or, as PyTorch comes, with convolutions in TF32."""
    with torch.backends.cudnn.flags(enabled=True, benchmark=True, allow_tf32=allow_tf32):
        return model(images).output


def network(name: str, peak: float) -> dict[str, dict]:
    """Images on the device to heatmaps: eager PyTorch in three precisions, CUDA graphs of it, torch.compile, ours."""
    results = {}
    exact = load_model(name).cuda().requires_grad_(False)
    precisions = [precision for precision in known_precisions(exact.main.weight.device) if precision != "fp32"]
    engines = {precision: Engine(exact, "cuda", precision) for precision in precisions}
    ours = engines["bf16"]
    for batch in BATCHES:
        images = torch.from_numpy(real_crops(batch)).cuda()[:, None]
        fast = load_model(name).cuda().requires_grad_(False).to(memory_format=torch.channels_last).bfloat16()
        fast.load_state_dict(exact.state_dict())
        fast.kernel_convolution.operator = constant_bands(exact.config, torch.bfloat16, "cuda")

        with torch.inference_mode():
            expected = eager(exact, images)
            error = (ours.heatmaps(images) - expected).abs().max() / expected.abs().max()
            assert error < TOLERANCE["bf16"], f"{name}: relative error {error}"
            fast(images)
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                fast(images)
            functions = {
                "eager, fp32": lambda x=images: eager(exact, x),
                "eager, TF32": lambda x=images: eager(exact, x, allow_tf32=True),
                "eager, bf16, channels last, banded blur": lambda m=fast, x=images: m(x).output,
                "CUDA graph of it": graph.replay,
            }
            if time.monotonic() - START < LAST_COMPILATION:
                torch.compiler.reset()
                compiled = torch.compile(fast, mode="max-autotune", dynamic=False)
                functions["torch.compile max-autotune of it"] = lambda m=compiled, x=images: m(x).output
            for precision, engine in engines.items():
                functions[f"engine, {precision}"] = lambda e=engine, x=images: e.heatmaps(x)
            times = table(f"network {name}, batch {batch}", functions)
        rate = 2 * giga_multiply_adds(exact.config) * batch / times["engine, bf16"]
        print(f"engine: {rate:.0f} TFLOP/s, {100 * rate / peak:.0f} % of the limit")
        results[f"batch {batch}"] = times | {"engine_tflops": rate}
    return results


def fits() -> dict[str, float]:
    """64 faces from heatmaps on the device, on torch's stream, beside the same on other arrays; and NumPy's time."""
    import cupy

    from lgcn_fast_kernels.triton_peaks import heatmap_reduction

    model = ShapeModel.load(WEIGHTS / "shape-68.safetensors")
    heatmaps = real_heatmaps(64)
    on_device = torch.from_numpy(heatmaps).cuda()
    fitter = CudaFitter(model)
    stream = cupy.cuda.Stream.from_external(torch.cuda.current_stream())
    cupy_heatmaps = cupy.from_dlpack(on_device)

    def fused() -> object:
        return fitter(on_device, heatmap_reduction(on_device, 0), 1)

    np.testing.assert_allclose(fused().points.cpu(), fit(model, heatmaps).points, atol=1e-2)
    start = time.perf_counter()
    fit(model, heatmaps)
    numpy = 1e3 * (time.perf_counter() - start)
    functions = {
        "PyTorch": lambda: fit(model, on_device),
        "CuPy arrays": lambda: fit(model, cupy_heatmaps),
        "reduction": lambda: heatmap_reduction(on_device, 0),
        "reduction and fit": fused,
    }
    with stream:
        times = table("fit of 64 faces, 96 x 96", functions)
    print(f"NumPy, on the host: {numpy:.1f} ms, {numpy / times['reduction and fit']:.0f} x")
    return times | {"NumPy": numpy}


def end_to_end(name: str, precision: str) -> dict[str, dict | float]:
    """`predict`: one crop, host to host; batches, device to device; beside eager PyTorch with the fit in PyTorch."""
    exact = load_model(name).cuda()
    engine, shape = Engine(exact, "cuda", precision), ShapeModel.load(WEIGHTS / "shape-68.safetensors")
    crops = real_crops(64)
    results: dict[str, dict | float] = {}

    @torch.inference_mode()
    def fitted(images: torch.Tensor, allow_tf32: bool = False) -> Fit:
        return fit(shape, eager(exact, images, allow_tf32), exact.config.stride)

    points = fitted(torch.from_numpy(crops[:, None]).cuda()).points.cpu().numpy()
    expected = from_crop(points, np.array([[0, 0, 96, 96]]), 96 / exact.config.stride)
    moved = np.linalg.norm(predict(crops, model=engine).points - expected, axis=-1)
    results[f"{precision} moves the points by, pixels"] = {
        "median": float(np.median(moved)),
        "99 %": np.percentile(moved, 99),
    }
    results["one crop, host to host"] = latencies(lambda: predict(crops[0], model=engine), 2000)
    for batch in (64, 256):
        images = torch.from_numpy(np.tile(crops, (batch // 64, 1, 1))).cuda()
        time_ms = by_the_clock(lambda x=images: predict(x, model=engine, to_host=False))
        results[f"faces/s, batch {batch}"] = 1e3 * batch / time_ms
    for batch in BATCHES:
        images = torch.from_numpy(crops[:batch, None]).cuda()
        functions = {
            "eager, fp32": lambda x=images: fitted(x),
            "eager, TF32": lambda x=images: fitted(x, allow_tf32=True),
            "predict": lambda x=images: predict(x, model=engine, to_host=False),
        }
        times = table(f"{name}, {precision}, image to points, batch {batch}", functions, by_the_clock)
        for way in ("fp32", "TF32"):
            results[f"times eager {way}, batch {batch}"] = times[f"eager, {way}"] / times["predict"]
    print(name, precision, results)
    return results


def main() -> None:
    if not torch.cuda.is_available():
        raise SystemExit("benchmarks/gpu.py: expected an NVIDIA GPU, torch finds none")
    torch.backends.cudnn.benchmark = True
    out = output_folder()
    results: dict[str, object] = {name: version(name) for name in ("triton", "torch")} | {"limits": limits()}
    copy, peak = results["limits"].values()
    parts: dict[str, Callable[[], object]] = {
        "tests, exit codes": tests,
        "fit": fits,
        "kernel convolution": lambda: kernel_convolution(copy),
        # While there is time for torch.compile.
        f"network, {NETWORKS[0]}": lambda: network(NETWORKS[0], peak),
        **{f"end to end, {name}": lambda n=name: end_to_end(n, "bf16") for name in NETWORKS},
        f"end to end, {NETWORKS[0]}, fp8": lambda: end_to_end(NETWORKS[0], "fp8"),
        **{f"network, {name}": lambda n=name: network(n, peak) for name in NETWORKS[1:]},
        "convolutions": lambda: convolutions(peak),
    }
    for name, part in parts.items():
        try:
            results[name] = part()
        except Exception as error:  # the machine is short-lived: the other parts still count
            results[name] = f"{type(error).__name__}: {error}"
            traceback.print_exc()
        write(out, results)
        print(f"{name} [{time.monotonic() - START:.0f} s]", flush=True)


if __name__ == "__main__":
    main()
