"""Peak finding: `lgcn_fast_kernels.local_maxima` beside the usual way with SciPy's `maximum_filter`."""

import numpy as np
import scipy.ndimage
import torch
from heatmaps import real_heatmaps
from timing import compare, run, show

import lgcn_fast_kernels as kernels
from lgcn_fast import peaks

THRESHOLD, RADIUS = 0.1, peaks.PEAK_RADIUS


def scipy_maxima(heatmaps: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Maps and pixels of the maxima."""
    filtered = scipy.ndimage.maximum_filter(heatmaps, size=(1, 1, 3, 3), mode="constant", cval=-np.inf)
    found = np.argwhere((heatmaps == filtered) & (heatmaps > THRESHOLD))
    return found[:, :2], found[:, :1:-1]


def main() -> dict:
    results = {}
    threads = torch.get_num_threads()
    for count in (1, 16):
        heatmaps = real_heatmaps(count)
        maps, pixels, values = kernels.local_maxima(heatmaps, THRESHOLD)
        expected = peaks.local_maxima(heatmaps, THRESHOLD)
        np.testing.assert_array_equal(maps, expected[0])
        np.testing.assert_array_equal(pixels, expected[1])
        for found, by_scipy in zip((maps, pixels), scipy_maxima(heatmaps), strict=True):
            np.testing.assert_array_equal(found, by_scipy)
        functions = {
            "SciPy maximum_filter": lambda h=heatmaps: scipy_maxima(h),
            "lgcn_fast.peaks.local_maxima (reference)": lambda h=heatmaps: peaks.local_maxima(h, THRESHOLD),
            "local_maxima, 1 thread": lambda h=heatmaps: kernels.local_maxima(h, THRESHOLD, 1),
            f"local_maxima, {threads} threads": lambda h=heatmaps: kernels.local_maxima(h, THRESHOLD, threads),
            f"peak_centroids, {threads} threads": lambda h=heatmaps: kernels.peak_centroids(h, RADIUS, threads),
        }
        results[f"{count} faces"] = compare(functions)
        show(f"68 heatmaps of 96 x 96, {count} faces, {len(values)} peaks", results[f"{count} faces"])
    return results


if __name__ == "__main__":
    run(main)
