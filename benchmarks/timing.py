"""Times measured side by side: rounds of A, B, A, B, ..., medians with 20/80 quantiles, and ratios."""

import argparse
import json
import platform
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from lgcn_fast.report import cpu_name
from lgcn_fast.training import commit


def compare(functions: dict[str, Callable[[], object]], rounds: int = 15, seconds: float = 0.05) -> dict[str, dict]:
    """Time functions in turns; each turn runs a function until `seconds` are over.

    Returns:
        By name: median, 20 and 80 % quantile of the time of one call in milliseconds, and `ratio`, how many times
        longer the first function takes.
    """
    times: dict[str, list[float]] = {name: [] for name in functions}
    for function in functions.values():
        function()
    for _ in range(rounds):
        for name, function in functions.items():
            times[name].append(turn(function, seconds))
    first = np.median(next(iter(times.values())))
    rows = {}
    for name, values in times.items():
        low, median, high = np.quantile(values, (0.2, 0.5, 0.8))
        rows[name] = {"median_ms": median, "q20_ms": low, "q80_ms": high, "ratio": first / median}
    return rows


def turn(function: Callable[[], object], seconds: float, finish: Callable[[], object] = lambda: None) -> float:
    """Milliseconds of a call of a function, of those that it takes until `seconds` are over; `finish` counts, too."""
    calls, start = 0, time.perf_counter()
    while calls == 0 or time.perf_counter() - start < seconds:
        function()
        calls += 1
    finish()
    return 1e3 * (time.perf_counter() - start) / calls


def show(title: str, rows: dict[str, dict]) -> None:
    """Print a table of `compare`."""
    print(f"\n{title}\n{'':<44}{'median ms':>11}{'20 %':>10}{'80 %':>10}{'ratio':>9}")
    for name, row in rows.items():
        print(f"{name:<44}{row['median_ms']:>11.3f}{row['q20_ms']:>10.3f}{row['q80_ms']:>10.3f}{row['ratio']:>8.1f}x")


def run(benchmark: Callable[[], dict]) -> None:
    """Run a benchmark as a script; with `--out FOLDER` write its results there, see `write`."""
    out = output_folder()
    write(out, benchmark())


def output_folder() -> Path | None:
    """What `--out` names on the command line of a benchmark."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="write the results as JSON")
    return parser.parse_args().out


def write(out: Path | None, results: dict) -> None:
    """Write the results of the script that runs, with machine, versions and commit, if there is a folder for them."""
    if out:
        machine = {
            "cpu": cpu_name(),
            "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
            "threads": torch.get_num_threads(),
            "python": platform.python_version(),
            "torch": torch.__version__,
            "numpy": np.__version__,
            "commit": commit(),
        }
        out.mkdir(parents=True, exist_ok=True)
        path = out / f"{Path(sys.argv[0]).stem}.json"
        path.write_text(json.dumps({"machine": machine, "results": results}, indent=1) + "\n")


def matrix_rate(dtype: torch.dtype) -> float:
    """GFLOP/s of a matrix product, 2048 x 2048, its result in memory that is there already."""
    a = torch.randn(2048, 2048).to(dtype)
    out = torch.empty_like(a)
    return 2 * 2048**3 / compare({"": lambda: torch.mm(a, a, out=out)}, rounds=5)[""]["median_ms"] / 1e6
