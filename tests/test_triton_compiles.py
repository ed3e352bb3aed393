"""The interpreter takes what the compiler refuses: without a GPU the kernels are compiled for one all the same."""

import importlib.util
import os
import subprocess
import sys

import pytest
import torch

pytestmark = pytest.mark.skipif(
    not importlib.util.find_spec("triton") or torch.cuda.is_available(),
    reason="no triton (pip install '.[gpu]'), or a GPU that compiles all kernels in the other tests",
)

PROGRAM = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from lgcn_fast_kernels import triton_crop, triton_peaks


def check(kernel, pointers, constants, **options):
    numbers = {name: "fp32" if name == "threshold" else "i32" for name in kernel.arg_names}
    signature = numbers | pointers | dict.fromkeys(constants, "constexpr")
    values = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
    result = triton.compile(ASTSource(kernel, signature, values), target=GPUTarget("cuda", 90, 32), options=options)
    assert result.asm["cubin"]


pointers = {"x_ptr": "*bf16", "out_ptr": "*fp32"}
check(triton_peaks._heatmap_reduction_kernel, pointers, {"BLOCKS": 3, "BLOCK": triton_peaks.BLOCK}, num_warps=8)
pointers = {"image_ptr": "*u8", "places_ptr": "*i32", "out_ptr": "*u8"}
for to_gray, taps in ((True, 4), (False, 1)):
    constants = {"TO_GRAY": to_gray, "TAPS": taps, "BLOCK_P": triton_crop.ELEMENTS // taps}
    check(triton_crop._crop_kernel, pointers, constants, num_warps=4, enable_fp_fusion=False)
"""


def test_kernels_compile_for_a_gpu(tmp_path):
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    result = subprocess.run([sys.executable, program], env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
