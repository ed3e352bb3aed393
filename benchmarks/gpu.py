"""Everything that needs an NVIDIA GPU: the `gpu` tests, then the parts beside what PyTorch does, in under 8 minutes.

Not run on a GPU yet.
"""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from heatmaps import real_heatmaps
from timing import run

from lgcn_fast import LGCN, LGCNConfig, ShapeModel, gaussian_sum
from lgcn_fast.fitting import THRESHOLD, CudaFitter, fit
from lgcn_fast.operators import gaussian_sum_banded
from lgcn_fast.prediction import WEIGHTS
from lgcn_fast_kernels import peak_centroids, window_moments

BATCHES = (1, 64)


def milliseconds(function: Callable[[], object]) -> float:
    """Median time on the device."""
    from triton.testing import do_bench

    return do_bench(function, warmup=50, rep=300, return_mode="median")


def table(title: str, functions: dict[str, Callable[[], object]]) -> dict[str, float]:
    """Time functions one after the other and print them beside the first."""
    times = {name: milliseconds(function) for name, function in functions.items()}
    first = next(iter(times.values()))
    print(f"\n{title}")
    for name, time in times.items():
        print(f"{name:<44}{time:>11.4f} ms{first / time:>9.1f}x", flush=True)
    return times


def tests() -> int:
    """Exit code of the `gpu` tests; other tests do not run here."""
    return subprocess.run([sys.executable, "-m", "pytest", "-q", "-m", "gpu"], cwd=Path(__file__).parents[1]).returncode


def kernel_convolution() -> dict[str, dict]:
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
            "copy, bf16": lambda m=half: m.clone(),
        }
        results[f"batch {batch}"] = table(f"kernel convolution, 136 maps x batch {batch}", functions)
    return results


def network(filters: int) -> dict[str, dict]:
    """Eager PyTorch in three precisions, CUDA graphs of it, and torch.compile."""
    results = {}
    for batch in BATCHES:
        images = torch.randint(0, 256, (batch, 1, 96, 96), device="cuda").float()
        exact = LGCN(LGCNConfig(filters=filters)).cuda().eval().requires_grad_(False)
        fast = LGCN(exact.config).cuda().eval().requires_grad_(False).to(memory_format=torch.channels_last).bfloat16()
        fast.kernel_convolution.operator = gaussian_sum_banded
        compiled = torch.compile(fast, mode="max-autotune")

        def tf32(model: LGCN = exact, images: torch.Tensor = images) -> torch.Tensor:
            with torch.backends.cudnn.flags(allow_tf32=True):
                return model(images).output

        graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
        with torch.cuda.stream(stream):
            fast(images)
        torch.cuda.synchronize()
        with torch.cuda.graph(graph):
            fast(images)
        functions = {
            "eager, fp32": lambda m=exact, x=images: m(x).output,
            "eager, TF32": tf32,
            "eager, bf16, banded": lambda m=fast, x=images: m(x).output,
            "CUDA graph of it": graph.replay,
            "torch.compile max-autotune, bf16": lambda m=compiled, x=images: m(x).output,
        }
        results[f"batch {batch}"] = table(f"network F = {filters}, batch {batch}", functions)
    return results


def fits() -> dict[str, dict]:
    """From heatmaps on the device to points, on torch's stream: arrays in CuPy, and all in one launch."""
    import cupy

    model = ShapeModel.load(WEIGHTS / "shape-68.safetensors")
    fitter = CudaFitter(model)
    results = {}
    for batch in BATCHES:
        heatmaps = real_heatmaps(batch)
        points, values = peak_centroids(heatmaps)
        moments = window_moments(heatmaps, threshold=THRESHOLD)
        peaks = torch.from_numpy(np.concatenate([points, values[..., None], moments], axis=2)).float().cuda()
        maps = torch.from_numpy(heatmaps).cuda()
        arrays = cupy.from_dlpack(maps)
        with cupy.cuda.Stream.from_external(torch.cuda.current_stream()):
            out, expected = fitter(maps, peaks), fit(model, heatmaps).points
            np.testing.assert_allclose(out.points.cpu(), expected, atol=1e-3)
            np.testing.assert_allclose(cupy.asnumpy(fit(model, arrays).points), expected, atol=1e-3)
            functions = {
                "CuPy": lambda a=arrays: fit(model, a),
                "one launch, after the reduction": lambda m=maps, p=peaks, o=out: fitter(m, p, 1, o),
            }
            results[f"batch {batch}"] = table(f"fit, batch {batch}", functions)
    return results


def main() -> dict:
    if not torch.cuda.is_available():
        raise SystemExit("benchmarks/gpu.py: expected an NVIDIA GPU, torch finds none")
    results = {"gpu tests, exit code": tests(), "kernel convolution": kernel_convolution()}
    results |= {f"network, F = {filters}": network(filters) for filters in (128, 16)}
    return results | {"fit": fits()}


if __name__ == "__main__":
    run(main)
