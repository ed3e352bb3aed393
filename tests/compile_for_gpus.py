"""Compiles every Triton kernel for GPUs that need not be there: run by test_compilation.py in a process of its own.

What Triton would see at a launch is written down here: types of the arguments, and those that are constants.
"""

import re
import subprocess
from tempfile import NamedTemporaryFile

import torch
from triton import compile, knobs, next_power_of_2
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from lgcn_fast_kernels import triton_convolution, triton_crop, triton_gaussian_sum, triton_peaks
from lgcn_fast_kernels.triton_convolution import FP8_TILES, TILES, Convolution

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp8e4nv": torch.float8_e4m3fn}
"""By what Triton calls them."""
EXACT = {"fp32": "fp32", "bf16": "fp16"}
"""Of blurred maps, by the dtype of a network."""
SHARED_MEMORY = {80: 163, 89: 99, 90: 227}
"""Kilobytes that a program may have on an A100, an RTX 40 and an H100, by capability."""
SPILLS = {"fp32": 16, "bf16": 0}
"""Bytes of registers that a thread of the blur may keep in memory: in fp32 Triton 3.6, which comes with torch 2.11,
keeps 16, and 3.7, with torch 2.13, 8; those after them none."""
EVEN_ODD_SPILLS = {"fp32": 48, "fp16": 16, "bf16": 0}
"""The same for maps of about 96 x 96, by the dtype of the result: some addresses wait there for the end."""


def ptx(kernel, constants: dict, pointers: dict[str, str], capability: int = 90, spills: int = 0, **options) -> str:
    """PTX of a kernel whose other arguments are 32-bit integers, checked to fit a multiprocessor, on
    Hopper with no more bytes of spilled registers than `spills`.

    Pointers, height and width are multiples of 16, as for 96 x 96.
    """
    types = dict.fromkeys(kernel.arg_names, "i32") | pointers | dict.fromkeys(constants, "constexpr")
    sizes = ("height", "width", "half_height", "half_width", "pixels")
    sixteens = [name for name in kernel.arg_names if types[name].startswith("*") or name in sizes]
    attributes = {(kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name in sixteens}
    compiled = compile(ASTSource(kernel, types, constants, attributes), GPUTarget("cuda", capability, 32), options)
    assert compiled.metadata.shared <= 1024 * SHARED_MEMORY[capability], (
        f"{kernel.__name__}, {constants}: {compiled.metadata.shared} bytes"
    )
    with NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        command = [knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    stack = int(re.search(r" STACK:(\d+) ", usage)[1])
    assert stack <= spills or capability < 90, f"{kernel.__name__}, {constants}: registers spilled, {usage}"
    return compiled.asm["ptx"]


def convolution(
    dtype: str, filters: int = 128, channels: int = 128, descriptors: bool = False, planes: bool = False,
    capability: int = 90, tile: int = -1, types: dict | None = None, **changes,
) -> str:  # fmt: skip
    """With one of its tiles, of which the last is for most pixels; `types` and `changes` of the kernel's arguments
    beside those of an inner layer."""
    size = changes.get("KERNEL_SIZE", 3)
    weight = torch.empty(filters, channels, size, size, dtype=DTYPES[dtype])
    layer = Convolution(weight, torch.empty(filters), planes=planes)
    launch = layer.tiles[tile]
    constants = {
        "scale_ptr": None, "residual_ptr": None,
        "CHANNELS": channels, "PADDED_CHANNELS": layer.padded_channels, "FILTERS": filters,
        "KERNEL_SIZE": size, "DILATION": 4, "ORIGIN": 0, "RELU": True, "SHUFFLE": 1, "DESCRIPTORS": descriptors,
        "BLOCK_Y": launch.block_y, "BLOCK_X": launch.block_x,
        "BLOCK_K": launch.block_k if descriptors else min(launch.block_k, triton_convolution.LARGEST_GATHERED_K),
        "BLOCK_F": launch.block_f, "FILTER_BLOCKS": -(-filters // launch.block_f),
    } | changes  # fmt: skip
    types = dict.fromkeys(("x", "weight", "out_ptr"), f"*{dtype}") | {"bias_ptr": "*fp32"} | (types or {})
    for name in types:
        constants.pop(name, None)
    if descriptors:
        types["x"] = f"tensordesc<{dtype}[1,{launch.block_y},{launch.block_x},{launch.block_k}]>"
        types["weight"] = f"tensordesc<{dtype}[{launch.block_f},{launch.block_k}]>"
    stages = launch.stages(weight.element_size(), 1024 * SHARED_MEMORY[capability])
    options = {"num_warps": launch.num_warps, "num_stages": stages}
    return ptx(triton_convolution._convolution_kernel, constants, types, capability, **options)


def gaussian_sum(dtype: torch.dtype, name: str, capability: int = 90, reach: int = 1) -> str:
    """Of parts of maps, or, with a reach of 0, of small ones as a whole."""
    block = triton_gaussian_sum.BLOCK[dtype]
    constants = {
        "COUNT": 3 if name == "bf16" else 5, "REACH_Y": reach, "REACH_X": reach, "BLOCK_Y": block, "BLOCK_X": block,
        "NUM_STAGES": triton_gaussian_sum.NUM_STAGES,
    }  # fmt: skip
    pointers = dict.fromkeys(("x_ptr", "bands_y_ptr", "bands_x_ptr"), f"*{name}") | {"out_ptr": f"*{EXACT[name]}"}
    return ptx(triton_gaussian_sum._gaussian_sum_kernel, constants, pointers, capability, SPILLS[name], num_warps=4)


def even_odd_gaussian_sum(name: str, capability: int = 90, same: bool = True) -> str:
    """Of maps of 96 x 96, of the bf16 to `name`; not `same`: of maps that are not square, or of odd sides."""
    constants = {
        "COUNT": 3, "SAME": same, "HALF": triton_gaussian_sum.HALF, "NUM_STAGES": triton_gaussian_sum.NUM_STAGES,
    }  # fmt: skip
    pointers = dict.fromkeys(("x_ptr", "bands_y_ptr", "bands_x_ptr"), "*bf16") | {"out_ptr": f"*{name}"}
    spills = EVEN_ODD_SPILLS[name]
    return ptx(triton_gaussian_sum._even_odd_kernel, constants, pointers, capability, spills, num_warps=4)


def heatmap_reduction(radius: int, side: int) -> str:
    lanes = next_power_of_2((2 * radius + 1) ** 2)
    pointers = {"x_ptr": "*fp32", "out_ptr": "*fp32", "threshold": "fp32"}
    constants, num_warps = {"SIDE": side, "RADIUS": radius, "LANES": lanes}, triton_peaks.NUM_WARPS[side]
    return ptx(triton_peaks._heatmap_reduction_kernel, constants, pointers, num_warps=num_warps)


def channels_last(name: str) -> str:
    constants = {"BLOCK_C": triton_convolution.BLOCK_C, "BLOCK_P": triton_convolution.BLOCK_P}
    return ptx(triton_convolution._channels_last_kernel, constants, {"x": f"*{EXACT[name]}", "out": f"*{name}"})


def crop(to_gray: bool, taps: int) -> str:
    constants = {"TO_GRAY": to_gray, "TAPS": taps, "BLOCK_P": max(triton_crop.ELEMENTS // taps, 1)}
    pointers = {"image_ptr": "*u8", "places_ptr": "*i32", "out_ptr": "*u8"}
    return ptx(triton_crop._crop_kernel, constants, pointers, num_warps=triton_crop.NUM_WARPS, enable_fp_fusion=False)


def lit(count: int) -> str:
    constants = {"COUNT": count, "BLOCK": triton_crop.LIT_BLOCK}
    floats = dict.fromkeys(("least_contrast", "largest_gain", "darkest", "brightest"), "fp32")
    pointers = {"faces_ptr": "*u8", "out_ptr": "*u8"} | floats
    return ptx(triton_crop._lit_kernel, constants, pointers, num_warps=triton_crop.NUM_WARPS)


if __name__ == "__main__":
    for filters in TILES:
        for tile in range(len(TILES[filters])):
            text = convolution("bf16", filters, filters, descriptors=True, tile=tile)
            assert "cp.async.bulk.tensor" in text, filters
            # 64 rows are the least of a product of a group of warps. Its operands must lie in shared memory: registers
            # would be overwritten, see `_convolution_kernel`.
            assert ("wgmma.mma_async" in text) == (filters >= 64), filters
            assert ("ldmatrix" in text) == (filters < 64), filters
        for capability in (80, 89):
            for tile in range(len(TILES[filters])):
                text = convolution("bf16", filters, filters, descriptors=True, capability=capability, tile=tile)
                assert "mma.sync" in text, filters
        first = {"KERNEL_SIZE": 5, "DILATION": 1, "ORIGIN": 128}
        head = {"KERNEL_SIZE": 1, "DILATION": 1, "RELU": False}
        scaled, to_fp8, to_bf16 = {"scale_ptr": "*fp32"}, {"out_ptr": "*fp8e4nv"}, {"out_ptr": "*bf16"}
        for tile in range(len(FP8_TILES)):
            inner = {"descriptors": True, "tile": tile, "types": scaled, "KERNEL_SIZE": 5}
            text = convolution("fp8e4nv", filters, filters, **inner)
            convolution("fp8e4nv", filters, filters, **inner, capability=89)
            assert ("wgmma.mma_async" in text and "e4m3.e4m3" in text) == (filters >= 64), filters
        convolution("bf16", filters, 1, types={"x": "*u8"} | to_fp8, **first)
        convolution("bf16", filters, 136, descriptors=True, types=to_fp8)
        convolution("fp8e4nv", filters, filters, descriptors=True, types=scaled | to_bf16)
        convolution("fp8e4nv", filters, 21, types=scaled)
        for dtype in ("bf16", "fp32"):
            # First layer, heads, behind the blur, inner layer, last layer: the blurred heatmaps are added.
            convolution(dtype, filters, 1, types={"x": "*u8"}, **first)
            for shuffle, tile in ((1, -1), (2, -1), (2, 0)):
                more = head | {"SHUFFLE": shuffle}
                convolution(dtype, 136 * shuffle**2, filters, descriptors=True, planes=True, tile=tile, **more)
            convolution(dtype, filters, 136, descriptors=True)
            convolution(dtype, filters, filters, descriptors=True)
            sums = {"residual_ptr": f"*{EXACT[dtype]}", "out_ptr": "*fp32"}
            convolution(dtype, 68, filters, descriptors=True, planes=True, types=sums, **head)
    for dtype, name in ((torch.bfloat16, "bf16"), (torch.float32, "fp32")):
        for capability in SHARED_MEMORY:
            assert "mma" in gaussian_sum(dtype, name, capability)
        assert ("wgmma" in gaussian_sum(dtype, name, reach=0)) == (dtype == torch.bfloat16)
        assert "ld.global.v4" in channels_last(name)
    for name in EVEN_ODD_SPILLS:
        for capability in SHARED_MEMORY:
            for same in (False, True):
                assert ("wgmma" if capability == 90 else "mma") in even_odd_gaussian_sum(name, capability, same)
    for radius in (0, 6, 12):
        for side in triton_peaks.NUM_WARPS:
            heatmap_reduction(radius, side)
    for to_gray in (False, True):
        for taps in (1, 4, 32):
            crop(to_gray, taps)
    for count in (96 * 96, 3 * 48 * 48 + 1):
        lit(count)
