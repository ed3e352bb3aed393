"""The fit from heatmaps to points: native, beside NumPy, beside one equation per pixel."""

import numpy as np
import torch
from heatmaps import real_heatmaps
from timing import compare, run, show

from lgcn_fast import ShapeModel
from lgcn_fast.checkpoints import WEIGHTS
from lgcn_fast.fitting import NativeFitter, fit, fit_reference

FACES = 64


def main() -> dict:
    model = ShapeModel.load(WEIGHTS / "shape-68.safetensors")
    fitter = NativeFitter(model)
    heatmaps = real_heatmaps(FACES)
    np.testing.assert_allclose(fitter(heatmaps[:4]).points, fit_reference(model, heatmaps[:4]).points, atol=1e-3)
    threads = torch.get_num_threads()
    functions = {
        "one equation per pixel (fit_reference)": lambda h: fit_reference(model, h),
        "moments in NumPy (fit)": lambda h: fit(model, h),
        "native, 1 thread": lambda h: fitter(h, num_threads=1),
        f"native, {threads} threads": lambda h: fitter(h, num_threads=threads),
    }
    results = {}
    # The reference takes a third of a second a face: it has its turn with one face only.
    for count, first in ((1, 0), (FACES, 1)):
        chosen = list(functions.items())[first:]
        rows = compare({name: lambda f=function, h=heatmaps[:count]: f(h) for name, function in chosen}, rounds=7)
        results[f"{count} faces"] = rows
        show(f"{count} faces, 68 landmarks, 96 x 96", rows)
    return results


if __name__ == "__main__":
    run(main)
