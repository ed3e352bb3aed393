"""`predict`, image in to points out: one crop (with the tail of its latency) and a batch of 64; the memory it takes."""

import resource
import sys
import time

import numpy as np
from heatmaps import real_crops
from timing import run

from lgcn_fast import Engine, load_model, predict
from lgcn_fast.checkpoints import model_names
from lgcn_fast_kernels import INSTRUCTIONS

FACES = 64


def latencies(call, count: int) -> dict[str, float]:
    """Quantiles of the time of one call, milliseconds."""
    for _ in range(count // 20 + 1):
        call()
    times = []
    for _ in range(count):
        start = time.perf_counter()
        call()
        times.append(1e3 * (time.perf_counter() - start))
    return dict(
        zip(("q20_ms", "median_ms", "q80_ms", "p99_ms"), np.quantile(times, (0.2, 0.5, 0.8, 0.99)), strict=True)
    )


def main() -> dict:
    crops = real_crops(FACES)
    models = {name: load_model(name) for name in model_names()}
    results = {}
    print(f"{'':<32}{'median ms':>11}{'20 %':>9}{'80 %':>9}{'99 %':>9}")
    for name, model in models.items():
        for precision in INSTRUCTIONS:
            engine = Engine(model, "cpu", precision)
            calls = 1000 if model.config.shuffle > 1 else 50  # the paper's networks take long
            one = latencies(lambda e=engine: predict(crops[0], model=e), calls)
            batch = latencies(lambda e=engine: predict(crops, model=e), max(calls // 50, 1))
            rows = {"one crop": one, f"{FACES} crops, each": {key: value / FACES for key, value in batch.items()}}
            for title, row in rows.items():
                numbers = "".join(f"{row[key]:>{width}.3f}" for key, width in
                                  (("median_ms", 11), ("q20_ms", 9), ("q80_ms", 9), ("p99_ms", 9)))  # fmt: skip
                print(f"{f'{name}, {precision}, {title}':<32}{numbers}")
            results[f"{name}, {precision}"] = rows
    # (Kilobytes on Linux, bytes on macOS.)
    results["peak_rss_mb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (
        2**20 if sys.platform == "darwin" else 1024
    )
    print(f"peak memory of this process: {results['peak_rss_mb']:.0f} MB")
    return results


if __name__ == "__main__":
    run(main)
