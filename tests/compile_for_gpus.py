"""Compiles every Triton kernel for GPUs that need not be there: run by test_compilation.py in a process of its own.

What Triton would see at a launch is written down here: types of the arguments, and those that are constants.
"""

from triton import compile
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from lgcn_fast_kernels import triton_convolution, triton_crop, triton_gaussian_sum, triton_peaks
from lgcn_fast_kernels.triton_convolution import TILES


def ptx(kernel, constants: dict, pointers: dict[str, str], capability: int = 90, **options) -> str:
    """PTX of a kernel whose other arguments are 32-bit integers."""
    types = dict.fromkeys(kernel.arg_names, "i32") | pointers | dict.fromkeys(constants, "constexpr")
    return compile(ASTSource(kernel, types, constants), GPUTarget("cuda", capability, 32), options).asm["ptx"]


def convolution(filters: int, descriptors: bool, capability: int = 90) -> str:
    tile = TILES[filters]
    constants = {
        "residual_ptr": None, "CHANNELS": filters, "FILTERS": filters, "KERNEL_SIZE": 3, "DILATION": 4, "ORIGIN": 0,
        "RELU": True, "DESCRIPTORS": descriptors, "BLOCK_Y": tile.block_y, "BLOCK_X": tile.block_x,
        "BLOCK_K": tile.block_k, "BLOCK_F": tile.block_f, "FILTER_BLOCKS": 1, "PRECISION": "tf32",
    }  # fmt: skip
    pointers = {"x": "*bf16", "weight": "*bf16", "bias_ptr": "*fp32", "out_ptr": "*bf16"}
    if descriptors:
        pointers["x"] = f"tensordesc<bf16[1,{tile.block_y},{tile.block_x},{tile.block_k}]>"
        pointers["weight"] = f"tensordesc<bf16[{tile.block_k},{tile.block_f}]>"
    options = {"num_warps": tile.num_warps, "num_stages": tile.num_stages}
    return ptx(triton_convolution._convolution_kernel, constants, pointers, capability, **options)


def gaussian_sum(dtype: str) -> str:
    constants = {
        "COUNT": 4, "KERNEL_SIZE": 45, "REACH_Y": 0, "REACH_X": 2, "BLOCK_Y": 128, "BLOCK_X": 32,
        "PRECISION": "ieee" if dtype == "fp32" else "tf32",
    }  # fmt: skip
    pointers = {"x_ptr": f"*{dtype}", "taps_ptr": f"*{dtype}", "out_ptr": "*fp32"}
    return ptx(triton_gaussian_sum._gaussian_sum_kernel, constants, pointers)


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
    for filters in TILES:
        text = convolution(filters, True)
        assert "wgmma.mma_async" in text, filters
        assert "cp.async.bulk.tensor" in text, filters
    assert "wgmma.mma_async" in convolution(128, False)
    assert "mma.sync" in convolution(128, True, capability=80)
    assert "mma" in gaussian_sum("bf16")
    gaussian_sum("fp32")
    heatmap_reduction()
    for to_gray in (False, True):
        for taps in (1, 4, 32):
            crop(to_gray, taps)
