"""The same network in other runtimes, where they are installed: torch.compile, ONNX Runtime, OpenVINO.

They get the kernel convolution as matrix products, which makes them several times faster than the grouped convolution;
ONNX Runtime and OpenVINO the folded network, as `lgcn-fast export` writes it. bf16 is for processors that have it.
"""

import importlib.util
import shutil
import tempfile
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path

import torch
from torch import Tensor, nn

from lgcn_fast import LGCN, LGCNConfig
from lgcn_fast.export import SIZES, traced, write_onnx
from lgcn_fast.operators import band_matrices, two_products
from lgcn_fast_kernels import INSTRUCTIONS


def constant_bands(config: LGCNConfig, dtype: torch.dtype, device: str = "cpu") -> Callable[..., Tensor]:
    """The kernel convolution as products with matrices that are there: torch.compile would make them in every call."""
    side, _ = config.heatmap_size(config.input_size, config.input_size)
    bands = band_matrices(side, config.kernel_size, config.sigmas, dtype, torch.device(device))
    return lambda x, *_: two_products(x, bands, bands)


class _Output(nn.Module):
    def __init__(self, model: LGCN, dtype: torch.dtype) -> None:
        super().__init__()
        self.model = deepcopy(model).eval().requires_grad_(False)
        self.model.kernel_convolution.operator = constant_bands(model.config, dtype)

    def forward(self, images: Tensor) -> Tensor:
        return self.model(images).output


def runtimes(model: LGCN, images: Tensor) -> dict[str, Callable[[], object]]:
    """Functions that compute the heatmaps of `images` (uint8), by name."""
    functions = {}
    if shutil.which("g++"):
        functions |= _compiled(model, images)
    else:
        print("torch.compile: no g++")
    missing = [name for name in ("onnx", "onnxscript") if not importlib.util.find_spec(name)]
    if missing:
        print(f"ONNX Runtime, OpenVINO: not installed: {', '.join(missing)} (pip install '.[bench]')")
        return functions
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        write_onnx(traced(model), path, {})
        for name, load in (("onnxruntime", _onnx_runtime), ("openvino", _openvino)):
            if importlib.util.find_spec(name):
                functions |= load(path, images)
            else:
                print(f"{name}: not installed (pip install '.[bench]')")
    return functions


def _compiled(model: LGCN, images: Tensor) -> dict[str, Callable[[], object]]:
    torch.compiler.reset()  # it gives up after a few models
    fp32 = torch.compile(_Output(model, torch.float32).to(memory_format=torch.channels_last))
    half = torch.compile(_Output(model, torch.bfloat16).to(memory_format=torch.channels_last))

    def bf16() -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return half(images)

    functions = {"torch.compile, fp32": lambda: fp32(images)}
    return functions | ({"torch.compile, bf16": bf16} if "bf16" in INSTRUCTIONS else {})


def _onnx_runtime(path: Path, images: Tensor) -> dict[str, Callable[[], object]]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    for axis, name in SIZES.items():
        options.add_free_dimension_override_by_name(name, images.shape[axis])
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    inputs = {session.get_inputs()[0].name: images.numpy()}
    return {"ONNX Runtime, fp32": lambda: session.run(None, inputs)}


def _openvino(path: Path, images: Tensor) -> dict[str, Callable[[], object]]:
    import openvino

    functions = {}
    hints = {"fp32": "f32", "bf16": "bf16"}
    for precision in INSTRUCTIONS:
        options = {"INFERENCE_PRECISION_HINT": hints[precision], "PERFORMANCE_HINT": "LATENCY"}
        options["INFERENCE_NUM_THREADS"] = torch.get_num_threads()
        network = openvino.Core().read_model(path)
        network.reshape(list(images.shape))
        request = openvino.Core().compile_model(network, "CPU", options).create_infer_request()
        functions[f"OpenVINO, {precision}"] = lambda request=request: request.infer([images.numpy()])
    return functions
