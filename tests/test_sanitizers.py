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
shapes = [(2, 3, 96, 96), (1, 1, 1, 1), (1, 4, 1, 7), (3, 1, 500, 3), (1, 300, 5, 17), (0, 3, 4, 4), (4, 68, 96, 96)]
for shape in shapes:
    for fill in ("random", "levels", "zeros", "nan", "inf"):
        maps = random.normal(size=shape).astype(np.float32)
        if fill == "levels":
            maps = random.integers(0, 3, shape).astype(np.float32)
        elif fill == "zeros":
            maps[:] = 0
        elif fill in ("nan", "inf"):
            maps[random.random(shape) < 0.3] = float(fill)
        for threads in (1, 5):
            _native.peak_centroids(maps, threads)
            _native.local_maxima(maps, 0.5, threads)
            for size, sigmas in ((45, (1.0, 9.0)), (1, (2.0,)), (101, (0.1, 50.0, 3.0))):
                _native.gaussian_sum(maps, size, sigmas, threads)
            _native.window_moments(maps, None, 0.0, 0.01, threads)
            for spread in (1, 1e3, 1e300):
                points = random.normal(size=(*shape[:2], 2)) * spread
                _native.nearest_peaks(maps, points, 0.0, threads)
                for radius in (0.0, 7.0, 20.0, 1e300, np.inf):
                    _native.window_moments(maps, points, radius, 0.01, threads)
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
