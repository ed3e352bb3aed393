"""examples/cpp/landmarks.cpp, built as its README says, beside `predict`."""

import json
import os
import platform
import shutil
import subprocess
from importlib.util import find_spec
from pathlib import Path

import cv2
import numpy as np
import pytest

import lgcn_fast
from lgcn_fast.cli import DEMO_BOX
from lgcn_fast.export import ONNX_PACKAGES, export
from lgcn_fast.images import read_image

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def program(tmp_path_factory) -> Path:
    """The example, built with the headers of the system, or below $CMAKE_PREFIX_PATH, and the library of the wheel."""
    missing = [package for package in ONNX_PACKAGES if find_spec(package) is None]
    if missing or not (shutil.which("cmake") and shutil.which("ninja")):
        pytest.skip(f"needs {', '.join(ONNX_PACKAGES)}, cmake and ninja (pip install '.[dev]')")
    folders = [Path(folder) for folder in os.environ.get("CMAKE_PREFIX_PATH", "").split(":") if folder]
    headers = [folder / "include" for folder in (*folders, Path("/usr"), Path("/usr/local"))]
    names = ("onnxruntime_cxx_api.h", "onnxruntime/onnxruntime_cxx_api.h")
    if not any((folder / name).is_file() for folder in headers for name in names):
        pytest.skip("needs the headers of ONNX Runtime (see examples/cpp/README.md), below /usr or $CMAKE_PREFIX_PATH")
    import onnxruntime

    folder = tmp_path_factory.mktemp("example")
    libraries = list(Path(onnxruntime.__file__).parent.glob("capi/libonnxruntime.so.*"))
    if not libraries:
        pytest.skip("needs the library in the wheel of ONNX Runtime for Linux")
    for name in ("libonnxruntime.so", "libonnxruntime.so.1"):
        (folder / name).symlink_to(libraries[0])
    build = folder / "build"
    library = f"-DONNXRUNTIME_LIBRARY={folder / 'libonnxruntime.so'}"
    flags = "-DCMAKE_CXX_FLAGS=-Werror"
    subprocess.run(["cmake", "-S", ROOT, "-B", build, "-G", "Ninja", "-DLGCN_EXAMPLES=ON", library, flags], check=True)
    subprocess.run(["cmake", "--build", build], check=True)
    return build / "landmarks"


@pytest.fixture(scope="module")
def network(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("network") / "nano.onnx"
    export("lgcn-nano", path)
    return path


def run(program: Path, *words: object) -> subprocess.CompletedProcess:
    return subprocess.run([program, *map(str, words)], capture_output=True, text=True)


@pytest.mark.skipif(not shutil.which("g++"), reason="needs g++")
def test_compiles():
    """Against declarations alone, so that it is tested where ONNX Runtime has no headers, too."""
    folders = (ROOT / "csrc", ROOT / "kernels", Path(__file__).with_name("declarations"))
    flags = ["-std=c++17", "-O1", "-Wall", "-Wextra", "-Wno-psabi", "-Werror", "-fsyntax-only"]
    subprocess.run(
        ["g++", *flags, *(f"-I{folder}" for folder in folders), ROOT / "examples/cpp/landmarks.cpp"], check=True
    )


@pytest.mark.slow
@pytest.mark.parametrize("color", [True, False])
@pytest.mark.parametrize("fit", [True, False])
@pytest.mark.parametrize("light", [1, 0.2])
def test_points_are_those_of_predict(light, fit, color, program, network, demo_picture, tmp_path):
    image = np.rint(read_image(demo_picture, color=color) * np.float64(light)).astype(np.uint8)
    picture = tmp_path / f"demo.{'ppm' if color else 'pgm'}"
    cv2.imwrite(str(picture), cv2.cvtColor(image, cv2.COLOR_RGB2BGR) if color else image)
    beyond_the_border = (-10, -20, 200, 211)
    for box in (DEMO_BOX, beyond_the_border):
        result = run(program, network, picture, *box, *([] if fit else ["--no-fit"]))
        assert result.returncode == 0, result.stderr
        found = json.loads(result.stdout)
        expected = lgcn_fast.predict(image, [box], "lgcn-nano", fit=fit, device="cpu", precision="fp32")
        np.testing.assert_allclose(found["points"], expected.points[0], rtol=0, atol=0.1)
        np.testing.assert_allclose(found["scores"], expected.scores[0], rtol=0, atol=0.01)


@pytest.mark.slow
def test_mistakes_are_named(program, network, tmp_path):
    whole, cut, other = (tmp_path / name for name in ("whole.pgm", "cut.pgm", "other.png"))
    whole.write_bytes(b"P5\n# a comment\n4 3\n255\n" + bytes(12))
    cut.write_bytes(whole.read_bytes()[:-1])
    other.write_bytes(b"\x89PNG")
    huge = tmp_path / "huge.pgm"
    header = b"P5\n60000 60000\n255"
    huge.write_bytes(header + b"\n")  # 3.6 GB, of which nothing is there
    (tmp_path / "header.pgm").write_bytes(header)
    assert run(program, network, whole, 0, 0, 4, 3).returncode == 0
    for words, message in (
        ((network, whole, 0, 0, 4), "usage: "),
        ((network, cut, 0, 0, 4, 3), "cut.pgm: expected a complete picture"),
        ((network, huge, 0, 0, 4, 3), "huge.pgm: expected a complete picture"),
        ((network, tmp_path / "header.pgm", 0, 0, 4, 3), "header.pgm: expected a complete picture"),
        ((network, tmp_path / "none.pgm", 0, 0, 4, 3), "none.pgm: expected a picture, got no file"),
        ((network, whole, 0, 0, 4, "3x"), "box: expected four numbers, got '3x'"),
        ((network, whole, 0, 0, 4, ""), "box: expected four numbers, got ''"),
        ((network, other, 0, 0, 4, 3), "other.png: expected a binary PGM or PPM file"),
        ((network, whole, 4, 0, 4, 3), "box: expected one that meets the picture"),
        ((network, whole, "nan", 0, 4, 3), "box: expected one that meets the picture"),
        ((network, whole, 0, 0, 1e300, 3), "box: expected one that meets the picture"),
        ((tmp_path / "nothing.onnx", whole, 0, 0, 4, 3), "nothing.onnx"),
    ):
        result = run(program, *words)
        assert result.returncode == 2
        assert message in result.stderr


@pytest.mark.skipif(platform.machine() != "x86_64", reason="of other processors there is one version only")
@pytest.mark.parametrize("flag", ["-march=x86-64", "-march=haswell", "-march=x86-64-v4", "-mavx512f"])
def test_headers_compile_for_any_processor(flag, tmp_path):
    """GCC inlines nothing into functions for other processors than it was made for."""
    source = tmp_path / "main.cpp"
    source.write_text('#include "fit.hpp"\n#include "peaks.hpp"\n#include "votes.hpp"\nint main() {}\n')
    folders = (f"-I{ROOT / name}" for name in ("csrc", "kernels"))
    command = ["c++", "-std=c++17", "-O2", "-Wno-psabi", flag, *folders, "-c", source, "-o", tmp_path / "main.o"]
    subprocess.run(command, check=True)
