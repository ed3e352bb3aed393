"""The network: `Engine` beside the eager model, and the kernel convolution beside the grouped convolution.

Eager is the model in eval mode under inference_mode, fp32. The matrix-product rate is that of 2048 x 2048 matrices.
"""

import numpy as np
import torch
from timing import compare, save, show

import lgcn_fast_kernels
from lgcn_fast import LGCN, Engine, LGCNConfig, gaussian_sum, load_model, predict
from lgcn_fast.operators import gaussian_sum_banded
from lgcn_fast.prediction import DEFAULT_WEIGHTS

CONFIGS = {"nano": None, **{f"F = {f}": LGCNConfig(filters=f) for f in (16, 32, 64, 128)}}


def matrix_rate(dtype: torch.dtype) -> float:
    """GFLOP/s of a matrix product, its result in memory that is there already."""
    a = torch.randn(2048, 2048).to(dtype)
    out = torch.empty_like(a)
    return 2 * 2048**3 / compare({"": lambda: torch.mm(a, a, out=out)}, rounds=5)[""]["median_ms"] / 1e6


def giga_multiply_adds(config: LGCNConfig) -> float:
    """Of the convolutions for one image of the nominal size; the kernel convolution is not counted."""
    pixels, filters, grid = (config.input_size // config.shuffle) ** 2, config.filters, config.shuffle**2
    local = sum(k * k for k in config.local_kernels[1:]) * filters**2
    local += config.local_kernels[0] ** 2 * filters * config.in_channels * grid
    heads = filters * (2 * config.num_landmarks + config.side_channels) * grid
    context = 9 * filters * (config.num_landmarks + config.side_channels + (config.global_layers - 1) * filters)
    return pixels * (local + heads + context) / 1e9


def network(name: str, config: LGCNConfig | None, rates: dict[str, float]) -> dict[str, dict]:
    """Eager and engine side by side on one image, correctness first."""
    if config is None:
        model = load_model(DEFAULT_WEIGHTS)
    else:
        model = LGCN(config).eval()
        # Trained weights of this size do not exist yet: heads that are not all zero, for times that mean something.
        for head in (model.main, model.refine):
            torch.nn.init.normal_(head.weight, std=0.1)
    image = torch.randint(0, 256, (1, 1, 96, 96), dtype=torch.uint8)
    engines = {precision: Engine(model, precision=precision) for precision in ("fp32", "bf16")}
    with torch.inference_mode():
        expected = model(image).output
        for precision, tolerance in (("fp32", 1e-4), ("bf16", 5e-2)):
            error = (engines[precision].heatmaps(image) - expected).abs().max() / expected.abs().max()
            assert error < tolerance, f"{name} {precision}: relative error {error}"
        functions = {"eager fp32": lambda: model(image).output}
        functions |= {f"engine {p}": lambda e=engine: e.heatmaps(image) for p, engine in engines.items()}
        rows = compare(functions, rounds=5)
    for precision in engines:
        rate = 2e3 * giga_multiply_adds(model.config) / rows[f"engine {precision}"]["median_ms"]
        rows[f"engine {precision}"] |= {"gflops": rate, "share_of_matrix_rate": rate / rates[precision]}
        print(f"{name} {precision}: {rate:.0f} GFLOP/s, {100 * rate / rates[precision]:.0f} % of the matrix rate")
    show(f"{name}, one image of 96 x 96", rows)
    return rows


def kernel_convolution() -> dict[str, dict]:
    """136 maps of 96 x 96."""
    maps = torch.randn(1, 136, 96, 96)
    half = maps.bfloat16()
    threads = torch.get_num_threads()
    with torch.inference_mode():
        ours = lgcn_fast_kernels.gaussian_sum(maps.numpy())
        np.testing.assert_allclose(ours, gaussian_sum(maps.double()).numpy(), atol=1e-4)
        functions = {
            "grouped convolution (gaussian_sum)": lambda: gaussian_sum(maps),
            "matrix products, fp32": lambda: gaussian_sum_banded(maps),
            "matrix products, bf16": lambda: gaussian_sum_banded(half),
            "native, 1 thread": lambda: lgcn_fast_kernels.gaussian_sum(maps.numpy(), num_threads=1),
            f"native, {threads} threads": lambda: lgcn_fast_kernels.gaussian_sum(maps.numpy(), num_threads=threads),
        }
        rows = compare(functions, rounds=5)
    show("kernel convolution, 136 maps of 96 x 96", rows)
    return rows


def end_to_end() -> dict[str, dict]:
    """`predict` with the shipped model: image in, points out."""
    crops = np.random.default_rng(0).integers(0, 256, (64, 96, 96), np.uint8)
    rows = compare({"one crop": lambda: predict(crops[0])}, rounds=30)
    batch = compare({"64 crops": lambda: predict(crops)}, rounds=5)["64 crops"]
    rows["64 crops, each"] = {key: value / (64 if key.endswith("ms") else 1) for key, value in batch.items()}
    show("predict, nano", rows)
    return rows


def main() -> None:
    rates = {"fp32": matrix_rate(torch.float32), "bf16": matrix_rate(torch.bfloat16)}
    print(f"matrix products: {rates['fp32']:.0f} GFLOP/s in fp32, {rates['bf16']:.0f} in bf16")
    results = {"matrix_gflops": rates, "kernel convolution": kernel_convolution(), "predict": end_to_end()}
    results |= {name: network(name, config, rates) for name, config in CONFIGS.items()}
    save("network", results)


if __name__ == "__main__":
    main()
