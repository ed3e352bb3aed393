"""The kernel convolution: native, beside the grouped convolution and matrix products in PyTorch."""

import numpy as np
import torch
from timing import compare, run, show

from lgcn_fast import gaussian_sum
from lgcn_fast.operators import gaussian_sum_banded
from lgcn_fast_kernels import INSTRUCTION_SETS, INSTRUCTIONS
from lgcn_fast_kernels import gaussian_sum as native


def main() -> dict:
    maps = torch.randn(1, 136, 96, 96)
    arrays, half, threads = maps.numpy(), maps.bfloat16(), torch.get_num_threads()
    exact = gaussian_sum(maps.double()).numpy()
    functions = {
        "grouped convolution (gaussian_sum)": lambda: gaussian_sum(maps),
        "matrix products, fp32": lambda: gaussian_sum_banded(maps),
        "matrix products, bf16": lambda: gaussian_sum_banded(half),
    }
    for name in [name for name in INSTRUCTION_SETS if name.endswith("bf16")] + ["fp32"]:
        instructions = INSTRUCTIONS.get(name, name)
        options = {"num_threads": threads, "instructions": instructions}
        np.testing.assert_allclose(native(arrays, **options), exact, atol=1e-4 if name == "fp32" else 0.5)
        functions[f"native, {name}"] = lambda options=options: native(arrays, **options)
    with torch.inference_mode():
        rows = compare(functions, rounds=7)
    show("136 maps of 96 x 96", rows)
    return {"136 maps": rows}


if __name__ == "__main__":
    run(main)
