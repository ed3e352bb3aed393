"""The GPU's kernels are compiled to the instructions of its tensor cores and its copy engine, with or without a GPU."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.skipif(not importlib.util.find_spec("triton"), reason="no triton (pip install '.[gpu]')")
def test_triton_kernels(tmp_path):
    """For Hopper, and the convolution for what came before it too."""
    environment = os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    script = Path(__file__).with_name("compile_for_gpus.py")
    done = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
