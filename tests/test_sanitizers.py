"""The extension under AddressSanitizer and UndefinedBehaviorSanitizer: built so, loaded into a Python of its own."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pybind11
import pytest

ROOT = Path(__file__).parents[1]
EXERCISE = """
import numpy as np
import _native

random = np.random.default_rng()
shapes = [(2, 3, 96, 96), (1, 1, 1, 1), (1, 4, 1, 7), (3, 1, 500, 3), (1, 300, 5, 17), (0, 3, 4, 4), (7, 2, 96, 96)]
for shape in shapes:
    for fill in ("random", "levels", "zeros", "nan", "inf", "odd address"):
        maps = random.normal(size=shape).astype(np.float32)
        if fill == "levels":
            maps = random.integers(0, 3, shape).astype(np.float32)
        elif fill == "zeros":
            maps[:] = 0
        elif fill in ("nan", "inf"):
            maps[random.random(shape) < 0.3] = float(fill)
        elif fill == "odd address" and maps.size:
            maps = np.frombuffer(b"." + maps.tobytes(), np.float32, offset=1).reshape(shape)
        for threads in (1, 5):
            for radius in (0.0, 12.0, np.inf):
                _native.peak_centroids(maps, radius, threads)
            _native.local_maxima(maps, 0.5, threads)
            for size in (1, 45, 101):
                line = np.exp(-((np.arange(size) - size // 2) ** 2) / np.array([[0.1], [50.0]]))
                for instructions in _native.instruction_sets():
                    _native.gaussian_sum(maps, line, threads, instructions)
            _native.window_moments(maps, None, 0.0, 0.01, threads)
            for spread in (1, 1e3, 1e300):
                points = random.normal(size=(*shape[:2], 2)) * spread
                for radius in (0.0, 7.0, 20.0, 1e300, np.inf):
                    _native.window_moments(maps, points, radius, 0.01, threads)


def layers(*shapes):
    return [(random.normal(size=s).astype(np.float32) / s[1], np.ones(s[0], np.float32)) for s in shapes]


for instructions in _native.instruction_sets():
    for filters, shuffle, stride, dilation, side in ((16, 1, 1, 4, 5), (21, 3, 1, 2, 0), (64, 4, 2, 1, 0)):
        grid = (shuffle // stride) ** 2
        shape = _native.Shape(landmarks=7, side_channels=side, shuffle=shuffle, stride=stride, dilation=dilation,
                              taps=np.ones((2, 9)))
        local = layers((filters, shuffle**2, 5, 5), (filters, filters, 5, 5), (filters, filters, 3, 3))
        context = layers((filters, 7 + side, 3, 3), (filters, filters, 3, 3))
        heads, refine = layers(((7 + side) * grid, filters, 1, 1), (7 * grid, filters, 1, 1))
        network = _native.Network(instructions, shape, local, heads, context, refine)
        basis = random.normal(size=(6, 7, 2))
        fitter = _native.Fitter(basis, np.ones(2), radii=[20.0, 7.0], certain=0.1, fallback=10, noise=50.0,
                                peak_radius=12.0, largest_move=5.0, size_spread=0.3, shift_spread=1.0,
                                threshold=0.01, nominal_size=0.3)
        for batch, height, width in ((1, 1, 1), (3, 33, 95), (2, 96, 96), (0, 5, 5)):
            images = random.integers(0, 256, (batch, 1, height, width)).astype(np.uint8)
            for threads in (1, 2, 5):
                heatmaps = network.heatmaps(images, threads)
                network.fit(images.astype(np.float32), fitter, threads)
                fitter.fit(heatmaps, stride, threads)
                for value in (1e20, np.inf, np.nan):
                    heatmaps[..., -1] = value
                    fitter.fit(heatmaps, stride, threads)
print("clean")
"""


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("g++"), reason="needs g++ and its sanitizers")
def test_extension_is_clean(tmp_path):
    build = tmp_path / "build"
    cmake = [
        "cmake", "-S", ROOT, "-B", build, "-G", "Ninja", "-DLGCN_SANITIZE=ON", "-DCMAKE_BUILD_TYPE=RelWithDebInfo",
        "-DCMAKE_CXX_COMPILER=g++", f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={tmp_path}",
        f"-DPython_EXECUTABLE={sys.executable}", f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
    ]  # fmt: skip
    subprocess.run(cmake, check=True)
    subprocess.run(["cmake", "--build", build], check=True)
    runtime = subprocess.run(["g++", "-print-file-name=libasan.so"], capture_output=True, text=True, check=True)
    environment = os.environ | {
        "LD_PRELOAD": runtime.stdout.strip(),
        "ASAN_OPTIONS": "detect_leaks=0",  # Python's own
        "PYTHONPATH": str(tmp_path),
    }
    result = subprocess.run([sys.executable, "-c", EXERCISE], env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "clean"
