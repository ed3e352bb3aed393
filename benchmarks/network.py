"""The network: `Engine` beside the eager model and other runtimes, image to heatmaps.

Eager is the model in eval mode under inference_mode, fp32. The matrix-product rate is that of torch.mm; without
AMX the engine does a third of the filters' multiplications (csrc/winograd.hpp): its share of that rate may be above 1.
"""

import torch
from heatmaps import real_crops
from runtimes import runtimes
from timing import compare, matrix_rate, run, show

from lgcn_fast import LGCN, Engine, LGCNConfig, load_model
from lgcn_fast.checkpoints import model_names
from lgcn_fast_kernels import INSTRUCTIONS

TOLERANCE = {"fp32": 1e-4, "bf16": 5e-2}


def giga_multiply_adds(config: LGCNConfig) -> float:
    """Of the convolutions for one image of the nominal size; the kernel convolution is not counted."""
    pixels, filters = (config.input_size // config.shuffle) ** 2, config.filters
    local = sum(k * k for k in config.local_kernels[1:]) * filters**2
    local += config.local_kernels[0] ** 2 * filters * config.in_channels * config.shuffle**2
    heads = filters * (2 * config.num_landmarks + config.side_channels) * (config.shuffle // config.stride) ** 2
    context = 9 * filters * (config.num_landmarks + config.side_channels + (config.global_layers - 1) * filters)
    return pixels * (local + heads + context) / 1e9


def network(name: str, model: LGCN, rates: dict[str, float]) -> dict[str, dict]:
    """All of them side by side on one image, correctness first."""
    side = model.config.input_size
    image = torch.from_numpy(real_crops(1, side))[:, None]  # (of noise, bf16 is off by a quarter of its faint maximum)
    engines = {precision: Engine(model, "cpu", precision) for precision in INSTRUCTIONS}
    with torch.inference_mode():
        expected = model(image).output
        for precision, engine in engines.items():
            error = (engine.heatmaps(image) - expected).abs().max() / expected.abs().max()
            assert error < TOLERANCE[precision], f"{name} {precision}: relative error {error}"
        functions = {"eager PyTorch, fp32": lambda: model(image).output}
        functions |= runtimes(model, image)
        functions |= {f"engine, {p}": lambda e=engine: e.heatmaps(image) for p, engine in engines.items()}
        rows = compare(functions, rounds=7)
    for precision in engines:
        rate = 2e3 * giga_multiply_adds(model.config) / rows[f"engine, {precision}"]["median_ms"]
        rows[f"engine, {precision}"] |= {"gflops": rate, "share_of_matrix_rate": rate / rates[precision]}
        print(f"{name} {precision}: {rate:.0f} GFLOP/s, {100 * rate / rates[precision]:.0f} % of the matrix rate")
    show(f"{name}, one image of {side} x {side}", rows)
    return rows


def main() -> dict:
    dtypes = {"fp32": torch.float32, "bf16": torch.bfloat16}
    rates = {precision: matrix_rate(dtypes[precision]) for precision in INSTRUCTIONS}
    print("matrix products: " + ", ".join(f"{rate:.0f} GFLOP/s in {precision}" for precision, rate in rates.items()))
    return {"matrix_gflops": rates} | {name: network(name, load_model(name), rates) for name in model_names()}


if __name__ == "__main__":
    run(main)
