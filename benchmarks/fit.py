"""The fit from heatmaps to points: `fit` on native reductions beside the same with one equation per pixel."""

import numpy as np
import torch
from heatmaps import real_heatmaps
from timing import compare, save, show

import lgcn_fast_kernels
from lgcn_fast import ShapeModel
from lgcn_fast.fitting import fit, fit_reference
from lgcn_fast.prediction import WEIGHTS

FACES = 64


def main() -> None:
    model = ShapeModel.load(WEIGHTS / "shape-68.safetensors")
    heatmaps = real_heatmaps(FACES)
    threads = torch.get_num_threads()
    few = heatmaps[:4]
    np.testing.assert_allclose(fit(model, few, lgcn_fast_kernels).points, fit_reference(model, few).points, atol=1e-3)
    functions = {
        "one equation per pixel (fit_reference)": lambda: fit_reference(model, heatmaps),
        "fit, NumPy reductions": lambda: fit(model, heatmaps),
        "fit, native, 1 thread": lambda: fit(model, heatmaps, lgcn_fast_kernels, 1),
        f"fit, native, {threads} threads": lambda: fit(model, heatmaps, lgcn_fast_kernels, threads),
    }
    results = {f"{FACES} faces": compare(functions, rounds=3)}
    show(f"{FACES} faces, 68 landmarks, 96 x 96", results[f"{FACES} faces"])
    ours = results[f"{FACES} faces"][f"fit, native, {threads} threads"]["median_ms"] / FACES
    single = {f"fit, native, {threads} threads": lambda: fit(model, heatmaps[:1], lgcn_fast_kernels, threads)}
    results["1 face"] = compare(single)
    show("1 face", results["1 face"])
    print(f"\n{ours:.3f} ms a face in a batch of {FACES}")
    save("fit", results)


if __name__ == "__main__":
    main()
