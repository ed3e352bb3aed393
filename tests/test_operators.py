import platform

import numpy as np
import pytest
import torch

import lgcn_fast_kernels
from lgcn_fast.operators import (
    band_matrices,
    gaussian_sum,
    gaussian_sum_banded,
    gaussian_sum_native,
    gaussian_taps,
)
from lgcn_fast_kernels import INSTRUCTION_SETS

SHAPES = [(1, 1, 1, 1), (2, 3, 96, 96), (1, 2, 7, 113), (1, 1, 44, 46), (2, 1, 45, 1), (1, 5, 23, 97)]
KERNELS = [(45, (1.0, 3.0, 5.0, 7.0, 9.0)), (9, (2.0,)), (1, (1.0, 4.0)), (101, (0.2, 30.0, 2.0))]


def kernel_of_equation_1(size: int, sigmas: tuple[float, ...]) -> np.ndarray:
    """Eq. 1 written out, with the normal distribution's own factor."""
    y, x = np.mgrid[-(size // 2) : size // 2 + 1, -(size // 2) : size // 2 + 1].astype(float)
    terms = [s**2 * np.exp(-(x**2 + y**2) / (2 * s**2)) / (2 * np.pi * s**2) for s in sigmas]
    return 2 * np.pi / len(sigmas) * sum(terms)


def convolve(x: np.ndarray, kernel: np.ndarray) -> np.ndarray:
    """Zero-padded convolution in float64, one tap at a time."""
    radius = kernel.shape[0] // 2
    padded = np.pad(x.astype(np.float64), ((0, 0), (0, 0), (radius, radius), (radius, radius)))
    result = np.zeros(x.shape)
    for j, i in np.ndindex(kernel.shape):
        result += kernel[j, i] * padded[:, :, j : j + x.shape[2], i : i + x.shape[3]]
    return result


def native(instructions: str):
    return lambda x, kernel_size, sigmas: torch.from_numpy(
        lgcn_fast_kernels.gaussian_sum(x.numpy(), kernel_size, sigmas, instructions=instructions)
    )


NATIVE = [pytest.param(native(name), id=name) for name in INSTRUCTION_SETS if not name.endswith("bf16")]


@pytest.mark.parametrize("operator", [gaussian_sum, gaussian_sum_banded, gaussian_sum_native, *NATIVE])
@pytest.mark.parametrize(("size", "sigmas"), KERNELS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.usefixtures("poisoned_memory")
def test_equals_equation_1_in_float64(operator, size, sigmas, shape, random):
    x = random.normal(size=shape)
    expected = convolve(x, kernel_of_equation_1(size, sigmas))
    result = operator(torch.from_numpy(x).float(), size, sigmas)
    assert result.dtype == torch.float32
    # fp32 sums over 2025 taps up to 1.
    np.testing.assert_allclose(result.numpy(), expected, atol=5e-5 * max(1, np.abs(expected).max()))


def test_kernel_is_one_in_the_centre():
    taps = gaussian_taps()
    assert torch.einsum("sy,sx->yx", taps, taps)[22, 22] == pytest.approx(1, abs=1e-12)


def test_banded_gradient_is_right(random):
    x = torch.from_numpy(random.normal(size=(1, 2, 5, 7))).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: gaussian_sum_banded(x, 5, (1.0, 2.0)), x)


@pytest.mark.parametrize("channels_last", [False, True])
def test_native_gradient_is_right(channels_last, random):
    x = torch.from_numpy(random.normal(size=(2, 3, 13, 30))).float()
    gradient = torch.from_numpy(random.normal(size=x.shape)).float()
    if channels_last:
        x, gradient = (t.to(memory_format=torch.channels_last) for t in (x, gradient))
    x.requires_grad_()
    (result,) = torch.autograd.grad(gaussian_sum_native(x), x, gradient)
    torch.testing.assert_close(result, gaussian_sum(gradient), atol=5e-5, rtol=1e-5)


@pytest.mark.parametrize("operator", [gaussian_sum_banded, gaussian_sum_native])
def test_bf16_is_no_worse_than_twice_the_grouped_convolution(operator, random):
    x = torch.from_numpy(random.normal(size=(1, 4, 96, 96))).float()
    exact = gaussian_sum(x.double())
    errors = [(blur(x.bfloat16()).double() - exact).abs().mean() for blur in (operator, gaussian_sum)]
    assert errors[0] <= 2 * errors[1]


@pytest.mark.parametrize("operator", [gaussian_sum_banded, gaussian_sum_native])
def test_follows_autocast(operator, random):
    x = torch.from_numpy(random.normal(size=(1, 1, 8, 8))).float().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        blurred = operator(x)
    assert blurred.dtype == torch.bfloat16
    blurred.sum().backward()
    assert x.grad.dtype == torch.float32


def test_band_matrices_made_in_inference_mode_serve_training():
    band_matrices.cache_clear()
    with torch.inference_mode():
        gaussian_sum_banded(torch.ones(1, 1, 8, 8))
    x = torch.ones(1, 1, 8, 8, requires_grad=True)
    gaussian_sum_banded(x).sum().backward()
    assert torch.isfinite(x.grad).all()


@pytest.mark.parametrize(("size", "sigmas"), [*KERNELS, (23, (0.5, 1.5, 2.5, 3.5, 4.5))])
def test_no_product_of_taps_is_subnormal(size, sigmas):
    """Products with subnormal numbers take many times as long; with sigma = 0.5 those were most of all products."""
    line = gaussian_taps(size, sigmas).float()
    products = torch.einsum("sy,sx->syx", line, line)
    assert products[products > 0].min() > torch.finfo(torch.float32).tiny


@pytest.mark.skipif(platform.machine() != "x86_64", reason="of processors with SSE")
@pytest.mark.parametrize("instructions", INSTRUCTION_SETS)
def test_native_takes_denormals_for_zero(instructions):
    """They would take a hundred times as long. The caller's own arithmetic keeps them."""
    denormal = np.full((1, 1, 40, 40), 1e-40, np.float32)
    blurred = lgcn_fast_kernels.gaussian_sum(denormal, 45, (1.0, 5.0), 1, instructions)
    assert not blurred.any()
    assert (denormal * np.float32(0.5)).all()


@pytest.mark.parametrize("instructions", [name for name in INSTRUCTION_SETS if name.endswith("bf16")])
@pytest.mark.parametrize(("size", "sigmas"), KERNELS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.usefixtures("poisoned_memory")
def test_native_bf16_is_no_worse_than_twice_torch_in_bf16(instructions, size, sigmas, shape, random):
    # Of a map of one pixel many: one may be exact by luck.
    batch = shape[0] * max(500 // (shape[2] * shape[3]), 1)
    x = torch.from_numpy(random.normal(size=(batch, *shape[1:]))).float()
    exact = gaussian_sum(x.double(), size, sigmas)
    torchs = (gaussian_sum_banded(x.bfloat16(), size, sigmas).double() - exact).abs().mean()
    ours = torch.from_numpy(lgcn_fast_kernels.gaussian_sum(x.numpy(), size, sigmas, instructions=instructions))
    assert (ours.double() - exact).abs().mean() <= 2 * torchs


def test_bf16_needs_fewer_lines():
    """Two of the five singular values of K are about what bf16 rounds away."""
    lines = lgcn_fast_kernels.kernel_taps(45, (1.0, 3.0, 5.0, 7.0, 9.0), lgcn_fast_kernels.BF16_TOLERANCE)
    assert lines.shape == (3, 45)
    np.testing.assert_allclose(lines.T @ lines, kernel_of_equation_1(45, (1.0, 3.0, 5.0, 7.0, 9.0)), atol=2e-3)


def test_native_does_not_depend_on_threads(random):
    x = random.normal(size=(2, 5, 33, 40)).astype(np.float32)
    expected = lgcn_fast_kernels.gaussian_sum(x, num_threads=1)
    for threads in (0, 3, 64):
        np.testing.assert_array_equal(lgcn_fast_kernels.gaussian_sum(x, num_threads=threads), expected)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((45, (1.0,), 1, "mmx"), "instructions: expected one of INSTRUCTION_SETS, got 'mmx'"),
        ((44,), "kernel_size: expected an odd"),
        ((45, ()), "sigmas: expected"),
        ((45, (0.0,)), "sigmas: expected"),
    ],
)
def test_native_names_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        lgcn_fast_kernels.gaussian_sum(np.zeros((1, 1, 4, 4), np.float32), *arguments)
