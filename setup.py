"""Builds csrc/ with CMake as lgcn_fast_kernels._native; everything declarative is in pyproject.toml."""

import shutil
import subprocess
import sys
from pathlib import Path

import pybind11
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent


class CMakeBuild(build_ext):
    """Configure and build with CMake and Ninja."""

    def build_extension(self, extension: Extension) -> None:
        output = Path(self.get_ext_fullpath(extension.name)).resolve().parent
        build = Path(self.build_temp).resolve()
        # --fresh: a second build must not look for the ninja of the first one's vanished environment.
        configure = [
            "cmake", "--fresh", "-S", ROOT, "-B", build, "-G", "Ninja",
            f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={output}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
        ]  # fmt: skip
        for command in (configure, ["cmake", "--build", build]):
            if subprocess.run(command).returncode:
                raise SystemExit("cmake failed, see above; what it needs: docs/troubleshooting.md#installing")


for stale in (ROOT / "build").glob("lib*"):  # setuptools would pack files that have been deleted since
    shutil.rmtree(stale)
setup(ext_modules=[Extension("lgcn_fast_kernels._native", sources=[])], cmdclass={"build_ext": CMakeBuild})
