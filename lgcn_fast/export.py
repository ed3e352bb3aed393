"""The trained network for other runtimes: an ONNX file, or a program of `torch.export`.

Both hold the folded network as ordinary operators, for any batch and any size of the images, and with it what a
consumer needs beside the heatmaps: see `metadata`. Images are uint8, as cameras and decoders deliver them: a quarter of
the bytes, and nothing to convert; the network makes floating point of them in its first step.
"""

import json
import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from importlib.util import find_spec
from io import BytesIO
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .checkpoints import load_model
from .config import LGCNConfig
from .files import same_file, whole_file
from .fitting import fitter_constants
from .folding import ORIGIN, FoldedNetwork, Layer, fold
from .loading import packaged_shape, shape_for
from .losses import readable
from .model import LGCN, shuffled
from .operators import bands, gaussian_taps, two_products
from .peaks import PEAK_RADIUS
from .shape import ShapeModel

FORMATS = ("onnx", "pt2")
ONNX_PACKAGES = ("onnx", "onnxscript", "onnxruntime")
TOLERANCE = 1e-3
"""Largest difference to the model's heatmaps that is let through, times the largest value where that is above 1."""
SIZES = {0: "batch", 2: "height", 3: "width"}
"""What may change from call to call: these axes of the images, by these names."""
METADATA = "metadata.json"
"""Extra file of a pt2 archive with what an ONNX file has in its metadata."""


class PlainNetwork(nn.Module):
    """A folded network as convolutions, ReLU and matrix products, for exporters and compilers.

    Everything up to the last step runs on images padded to whole cells of the coarse grid (`LGCNConfig.shuffle`); what
    `LGCN.forward` crops and pads between its steps is in the matrices of the kernel convolution instead.
    """

    def __init__(self, network: FoldedNetwork) -> None:
        super().__init__()
        config = self.config = network.config
        self.step = config.shuffle // config.stride
        (weight, bias), *rest = network.local
        # Pixel-unshuffle and a convolution are one convolution with larger filters.
        larger = F.pixel_shuffle(torch.from_numpy(weight), config.shuffle).numpy()
        first = _convolution((larger, bias), config.shuffle * (weight.shape[2] // 2), stride=config.shuffle)
        self.local = _with_relu([first, *(_convolution(layer, layer[0].shape[2] // 2) for layer in rest)])
        self.heads = _convolution(network.heads)
        context = [_convolution(layer, config.dilation, dilation=config.dilation) for layer in network.context]
        self.context = _with_relu(context)
        self.refine = _convolution(network.refine)
        self.register_buffer("taps", gaussian_taps(config.kernel_size, config.sigmas).float())

    def forward(self, images: Tensor) -> Tensor:
        """Heatmaps, as `Engine.heatmaps`: probabilities for cross-entropy networks.

        Args:
            images: (B, in_channels, H, W) pixel values 0..255, any real dtype.

        Returns:
            (B, N, H / stride, W / stride), rounded up, float32.
        """
        config = self.config
        height, width = images.shape[2:]
        if config.shuffle > 1:
            for axis, length in ((2, height), (3, width)):
                padded = _divided_up(length, config.shuffle) * config.shuffle
                places = torch.arange(padded, device=images.device).clamp(max=length - 1)
                images = images.index_select(axis, places)
        maps = shuffled(self.heads(self.local(images.float() - ORIGIN)), self.step)
        landmarks = config.num_landmarks
        if config.side_channels:
            maps = torch.cat([maps[:, :landmarks], F.relu(maps[:, landmarks:])], dim=1)
        height, width = _divided_up(height, config.stride), _divided_up(width, config.stride)
        blurred = two_products(maps, self._bands(height, maps.shape[2]), self._bands(width, maps.shape[3]))
        coarse = F.avg_pool2d(blurred, self.step) if self.step > 1 else blurred
        heatmaps = blurred[:, :landmarks] + shuffled(self.refine(self.context(coarse)), self.step)
        if self.step > 1:
            heatmaps = heatmaps[:, :, :height, :width]
        return readable(heatmaps, config)

    def _bands(self, length: int, padded: int) -> Tensor:
        """Matrices of the kernel convolution; its input ends at `length`, from there on its output repeats the last."""
        places = torch.arange(padded, device=self.taps.device)
        out_of_reach = torch.where(places < length, places, places + self.config.kernel_size)
        return bands(self.taps, places.clamp(max=length - 1), out_of_reach)


def _convolution(layer: Layer, padding: int = 0, **options: int) -> nn.Conv2d:
    weight, bias = (torch.from_numpy(array) for array in layer)
    convolution = nn.Conv2d(weight.shape[1], weight.shape[0], weight.shape[2], padding=padding, **options)
    convolution.weight, convolution.bias = (nn.Parameter(t, requires_grad=False) for t in (weight, bias))
    return convolution


def _with_relu(convolutions: list[nn.Conv2d]) -> nn.Sequential:
    return nn.Sequential(*(module for convolution in convolutions for module in (convolution, nn.ReLU())))


def _divided_up(length: int, step: int) -> int:
    """(Not `-(-length // step)`: of a traced length ONNX rounds that towards 0.)"""
    return (length + step - 1) // step


def export(
    model: LGCN | Path | str, path: Path | str, format: str = "onnx", shape: ShapeModel | Path | str | None = None
) -> float:
    """Write a network for other runtimes, and compare what they compute from the file with the network itself.

    The file appears complete and checked, or not at all. It takes `images` (B, in_channels, H, W) uint8 pixel values
    and returns `heatmaps` (B, N, H / stride, W / stride) float32, rounded up, as `Engine.heatmaps`: any batch, and any
    size with more than one pixel of a heatmap to each side.

    Args:
        model: a network, which is not changed; the name of one in the package; or the path of weights.
        path: the file to write.
        format: "onnx", a file for ONNX Runtime and others, with `metadata` in its `metadata_props`; or "pt2", a program
            for `torch.export.load`, with `metadata` as JSON in its extra file `METADATA`. (Not compiled: a compiled
            package of AOTInductor is bound to one kind of processor and one release of PyTorch, and
            `torch._inductor.aoti_compile_and_package(program)` makes one of this program where it is to run.)
        shape: the shape model that goes into the metadata. Default: the one in the package for the model's number of
            landmarks, if there is one.

    Returns:
        The largest difference to the model's heatmaps.

    Raises:
        ValueError: another format, a path that does not fit it or is one of those that are read, packages that are not
            installed, an unknown model, a shape model of another number of landmarks, or a file whose heatmaps differ
            by more than `TOLERANCE`.
        OSError: the file could not be written.
    """
    if format not in FORMATS:
        raise ValueError(f"format: expected one of {', '.join(FORMATS)}, got {format!r}")
    missing = [package for package in ONNX_PACKAGES if format == "onnx" and find_spec(package) is None]
    if missing:
        needed = ", ".join(ONNX_PACKAGES)
        raise ValueError(f"format: 'onnx' needs {needed}, got no {missing[0]} (pip install {needed.replace(',', '')})")
    path = Path(path)
    if not path.name or path.is_dir():
        raise ValueError(f"path: expected a file to write, got the folder {path}")
    if path.suffix.lower() in {f".{other}" for other in FORMATS if other != format}:
        raise ValueError(f"path: expected a name for the format {format!r}, got {path}")
    if any(isinstance(source, Path | str) and same_file(path, source) for source in (model, shape)):
        raise ValueError(f"path: expected another file than those that are read, got {path}")
    model = model if isinstance(model, LGCN) else load_model(model)
    count = model.config.num_landmarks
    facts = metadata(model.config, packaged_shape(count) if shape is None else shape_for(shape, count))
    program = traced(model)
    with whole_file(path) as partial:
        if format == "onnx":
            write_onnx(program, partial, facts)
            run = _onnx_runtime(partial)
        else:
            buffer = BytesIO()  # (on a full disk torch would end the process)
            torch.export.save(program, buffer, extra_files={METADATA: json.dumps(facts)})
            partial.write_bytes(buffer.getbuffer())
            with partial.open("rb") as file:
                run = torch.export.load(file).module()
        return _checked(run, model, path)


def metadata(config: LGCNConfig, shape: ShapeModel | None) -> dict[str, str]:
    """What a consumer needs beside the heatmaps; lists of numbers are separated by blanks.

    Returns:
        num_landmarks, in_channels, input_size (pixels), stride, peak_radius (see `peaks.PEAK_RADIUS`); with a shape
        model also what `lgcn::Fitter` in csrc/fit.hpp takes: fit_basis, P x N x 2 numbers; fit_variances, P - 4;
        fit_radii; fit_options, 9.
    """
    facts = {name: str(getattr(config, name)) for name in ("num_landmarks", "in_channels", "input_size", "stride")}
    facts["peak_radius"] = str(PEAK_RADIUS)
    if shape is None:
        return facts
    constants = fitter_constants(shape)
    lists = {name: constants.pop(name) for name in ("basis", "variances", "radii")} | {"options": [*constants.values()]}
    return facts | {f"fit_{name}": _numbers(values) for name, values in lists.items()}


def _numbers(values: np.ndarray | list[float]) -> str:
    return " ".join(repr(value) for value in np.asarray(values, np.float64).ravel().tolist())


def traced(model: LGCN) -> torch.export.ExportedProgram:
    """The folded network as a graph of operators, for images as described in `export`."""
    config = model.config
    network = PlainNetwork(fold(model)).eval()
    images = torch.zeros(2, config.in_channels, 97, 98, dtype=torch.uint8)
    # Otherwise all images would have to take the same way through torch's special cases (lengths of 1, no padding) as
    # this one example.
    with torch.fx.experimental._config.patch(backed_size_oblivious=True):
        return torch.export.export(network, (images,), dynamic_shapes=_dynamic_shapes(config))


def _dynamic_shapes(config: LGCNConfig) -> tuple[dict[int, torch.export.Dim]]:
    return ({axis: torch.export.Dim(name, min=config.stride + 1 if axis else 1) for axis, name in SIZES.items()},)


def write_onnx(program: torch.export.ExportedProgram, path: Path, facts: dict[str, str]) -> None:
    """Write a traced network as one ONNX file with metadata."""
    with _quiet_exporter():
        # (The dimensions are dynamic already; here they give their names.)
        dimensions = ({axis: torch.export.Dim(name) for axis, name in SIZES.items()},)
        names = {"input_names": ["images"], "output_names": ["heatmaps"], "dynamic_shapes": dimensions}
        exported = torch.onnx.export(program, dynamo=True, verbose=False, **names)
    exported.model.metadata_props.update(facts)
    exported.save(path, external_data=False)


@contextmanager
def _quiet_exporter() -> Iterator[None]:
    """Without what torch's exporter says of itself: of a package that it does not find, of functions it still uses."""
    logger = logging.getLogger("torch.onnx._internal.exporter._registration")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*LeafSpec.* is deprecated", FutureWarning)
            yield
    finally:
        logger.setLevel(level)


def _onnx_runtime(path: Path) -> Callable[[Tensor], Tensor]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(path.read_bytes(), options, providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run(["heatmaps"], {"images": images.numpy()})[0])


@torch.inference_mode()
def _checked(run: Callable[[Tensor], Tensor], model: LGCN, path: Path) -> float:
    """The largest difference to the model, on single images and batches of even, odd and tiny sizes."""
    model = deepcopy(model).eval().cpu()
    size, least, channels = model.config.input_size, model.config.stride + 1, model.config.in_channels
    generator = torch.Generator().manual_seed(0)
    largest = 0.0
    for batch, height, width in ((1, size, size), (3, size, size), (2, size - 1, size // 2 + 3), (1, 5 * least, least)):
        images = torch.randint(0, 256, (batch, channels, height, width), dtype=torch.uint8, generator=generator)
        expected = readable(model(images).output, model.config)
        heatmaps = run(images)
        if heatmaps.shape != expected.shape:
            raise ValueError(f"{path}: expected heatmaps of {tuple(expected.shape)}, got {tuple(heatmaps.shape)}")
        error = float((heatmaps - expected).abs().max())
        allowed = TOLERANCE * max(1.0, float(expected.abs().max()))
        if not error <= allowed:
            of = f"{batch} images of {width} x {height}"
            raise ValueError(f"{path}: expected heatmaps within {allowed:.1e} of the model's, got {error:.1e} for {of}")
        largest = max(largest, error)
    return largest
