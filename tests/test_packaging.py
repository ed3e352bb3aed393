"""What leaves a checkout: a source archive that can be built, compiled for every processor."""

import json
import os
import platform
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pybind11
import pytest

import lgcn_fast

ROOT = Path(__file__).parents[1]


def test_source_archive_holds_what_a_build_needs(tmp_path):
    pytest.importorskip("setuptools", "77")
    for name in ("pyproject.toml", "setup.py", "MANIFEST.in", "CMakeLists.txt", "README.md"):
        shutil.copy(ROOT / name, tmp_path)
    for name in ("lgcn_fast", "kernels", "csrc", "tests"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__", "*.so"))
    code = "from setuptools.build_meta import build_sdist; build_sdist('dist')"
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True, capture_output=True)
    (archive,) = (tmp_path / "dist").iterdir()
    with tarfile.open(archive) as file:
        held = {name.split("/", 1)[1] for name in file.getnames() if "/" in name}
    for folder in ("lgcn_fast", "kernels", "csrc"):
        files = {str(path.relative_to(tmp_path)) for path in (tmp_path / folder).rglob("*") if path.is_file()}
        assert files <= held, files - held
    assert "CMakeLists.txt" in held
    assert not [name for name in held if name.startswith("tests/")]  # half of them, without what they need


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64") or sys.platform != "linux", reason="for x86-64 Linux")
def test_functions_choose_their_instructions_whatever_the_environment_asks_for(tmp_path):
    command = [
        "cmake", "-S", ROOT, "-B", tmp_path, "-G", "Ninja", "-DCMAKE_EXPORT_COMPILE_COMMANDS=ON",
        f"-DPython_EXECUTABLE={sys.executable}", f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
    ]  # fmt: skip
    environment = os.environ | {"CXXFLAGS": "-march=x86-64-v4"}
    subprocess.run(command, check=True, capture_output=True, env=environment)
    (compilation,) = json.loads((tmp_path / "compile_commands.json").read_text())
    architectures = [word for word in compilation["command"].split() if word.startswith("-march=")]
    assert architectures == ["-march=x86-64-v4", "-march=x86-64"]


def test_module_runs_the_command_line():
    command = [sys.executable, "-m", "lgcn_fast", "--version"]
    ran = subprocess.run(command, check=True, capture_output=True, text=True)
    assert ran.stdout == f"lgcn_fast {lgcn_fast.__version__}\n"
