"""Compiles every Triton kernel for GPUs that need not be there: run by test_compilation.py in a process of its own.

What Triton would see at a launch is written down here: types of the arguments, and those that are constants.
"""

import subprocess
from tempfile import NamedTemporaryFile

import torch
from triton import compile, knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from lgcn_fast_kernels import triton_convolution, triton_crop, triton_gaussian_sum, triton_peaks
from lgcn_fast_kernels.triton_convolution import FP32_TILES, TILES, Tile

SHARED_MEMORY = 227 * 1024
"""Bytes that a program may have on an H200."""


def ptx(kernel, constants: dict, pointers: dict[str, str], capability: int = 90, **options) -> str:
    """PTX of a kernel whose other arguments are 32-bit integers, checked to fit a multiprocessor."""
    types = dict.fromkeys(kernel.arg_names, "i32") | pointers | dict.fromkeys(constants, "constexpr")
    compiled = compile(ASTSource(kernel, types, constants), GPUTarget("cuda", capability, 32), options)
    assert compiled.metadata.shared <= SHARED_MEMORY, (
        f"{kernel.__name__}, {constants}: {compiled.metadata.shared} bytes"
    )
    with NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        command = [knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert " STACK:0 " in usage, f"{kernel.__name__}, {constants}: registers spilled, {usage}"
    return compiled.asm["ptx"]


def convolution(
    tile: Tile, name: str, descriptors: bool = False, capability: int = 90, pointers: dict | None = None, **changes
) -> str:
    """Of a layer of 128 filters; `changes` of the constants, `pointers` of the types."""
    constants = {
        "residual_ptr": None, "CHANNELS": 128, "FILTERS": 128, "KERNEL_SIZE": 3, "DILATION": 4, "ORIGIN": 0,
        "RELU": True, "DESCRIPTORS": descriptors, "BLOCK_Y": tile.block_y, "BLOCK_X": tile.block_x,
        "BLOCK_K": tile.block_k if descriptors else min(tile.block_k, triton_convolution.LARGEST_GATHERED_K),
        "BLOCK_F": tile.block_f, "FILTER_BLOCKS": 128 // tile.block_f,
    } | changes  # fmt: skip
    types = dict.fromkeys(("x", "weight", "out_ptr"), f"*{name}") | {"bias_ptr": "*fp32"} | (pointers or {})
    if "residual_ptr" in types:
        del constants["residual_ptr"]
    if descriptors:
        types["x"] = f"tensordesc<{name}[1,{tile.block_y},{tile.block_x},{tile.block_k}]>"
        types["weight"] = f"tensordesc<{name}[{tile.block_k},{tile.block_f}]>"
    options = {"num_warps": tile.num_warps, "num_stages": tile.num_stages}
    return ptx(triton_convolution._convolution_kernel, constants, types, capability, **options)


def gaussian_sum(dtype: torch.dtype, name: str) -> str:
    block_y = triton_gaussian_sum.LARGEST_BLOCK_Y[dtype]
    constants = {
        "COUNT": 4, "REACH_Y": int(block_y < 96), "REACH_X": 1, "BLOCK_Y": block_y,
        "BLOCK_X": triton_gaussian_sum.BLOCK_X,
    }  # fmt: skip
    pointers = dict.fromkeys(("x_ptr", "bands_y_ptr", "bands_x_ptr"), f"*{name}") | {"out_ptr": "*fp32"}
    options = {"num_warps": triton_gaussian_sum.NUM_WARPS}
    return ptx(triton_gaussian_sum._gaussian_sum_kernel, constants, pointers, **options)


def heatmap_reduction() -> str:
    constants = {"BLOCKS": 9, "BLOCK": triton_peaks.BLOCK}
    pointers = {"x_ptr": "*fp32", "out_ptr": "*fp32", "threshold": "fp32"}
    return ptx(triton_peaks._heatmap_reduction_kernel, constants, pointers, num_warps=triton_peaks.NUM_WARPS)


def crop(to_gray: bool, taps: int) -> str:
    block_t = min(taps * taps, triton_crop.LARGEST_BLOCK_T)
    constants = {
        "TO_GRAY": to_gray, "TAPS": taps, "BLOCK_T": block_t, "BLOCK_P": max(triton_crop.ELEMENTS // block_t, 1),
    }  # fmt: skip
    pointers = {"image_ptr": "*u8", "places_ptr": "*i32", "out_ptr": "*u8"}
    return ptx(triton_crop._crop_kernel, constants, pointers, num_warps=triton_crop.NUM_WARPS, enable_fp_fusion=False)


if __name__ == "__main__":
    for tile in TILES.values():
        text = convolution(tile, "bf16", True)
        assert "wgmma.mma_async" in text, tile
        assert "cp.async.bulk.tensor" in text, tile
        assert "wgmma.mma_async" in convolution(tile, "bf16"), tile
        assert "mma.sync" in convolution(tile, "bf16", True, capability=80), tile
        # The first layer, and the first behind the blur.
        convolution(tile, "bf16", pointers={"x": "*u8"}, CHANNELS=1, KERNEL_SIZE=5, DILATION=1, ORIGIN=128)
        convolution(tile, "bf16", pointers={"x": "*fp32"}, CHANNELS=136)
    last = {"residual_ptr": "*fp32", "out_ptr": "*fp32"}  # the blurred heatmaps are added
    convolution(TILES[128], "bf16", True, pointers=last, KERNEL_SIZE=1, DILATION=1, RELU=False, FILTERS=68)
    for tile in FP32_TILES.values():
        for descriptors in (False, True):
            assert "mma" in convolution(tile, "fp32", descriptors)
    for dtype, name in ((torch.bfloat16, "bf16"), (torch.float32, "fp32")):
        assert "mma" in gaussian_sum(dtype, name)
    heatmap_reduction()
    for to_gray in (False, True):
        for taps in (1, 4, 32):
            crop(to_gray, taps)
