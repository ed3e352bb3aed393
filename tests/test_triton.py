"""The Triton kernels: in Triton's interpreter where there is no GPU (conftest.py), compiled where there is one."""

import importlib.util
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from lgcn_fast import gaussian_sum

pytestmark = pytest.mark.skipif(not importlib.util.find_spec("triton"), reason="no triton (pip install '.[gpu]')")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SHAPES = [(1, 2, 96, 96), (1, 1, 1, 1), (2, 1, 31, 33), (1, 1, 130, 45), (1, 3, 7, 97), (1, 1, 65, 127), (0, 1, 4, 4)]
KERNELS = [(45, (1.0, 3.0, 5.0, 7.0, 9.0)), (23, (0.5, 1.5, 2.5, 3.5, 4.5)), (1, (1.0,))]
# fp32 sums in another order; in half precision the input, the band and what lies between the products are rounded.
TOLERANCES = {torch.float32: 2e-6, torch.float16: 3e-3, torch.bfloat16: 2e-2}


@pytest.fixture(scope="module")
def kernel():
    from lgcn_fast_kernels import triton_gaussian_sum

    return triton_gaussian_sum.gaussian_sum


def poisoned(monkeypatch) -> None:
    """Every `torch.empty_like` is full of NaN: an element that the kernel does not write fails the test."""
    monkeypatch.setattr(torch, "empty_like", lambda x: torch.full_like(x, float("nan")))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(("size", "sigmas"), KERNELS)
@pytest.mark.parametrize("shape", SHAPES)
def test_equals_the_reference(kernel, monkeypatch, random, shape, size, sigmas, dtype):
    check(kernel, monkeypatch, random, shape, size, sigmas, dtype)


# (Triton 3.6 interprets products of bf16 wrongly: it multiplies their bits.)
@pytest.mark.gpu
@pytest.mark.parametrize(("size", "sigmas"), KERNELS)
@pytest.mark.parametrize("shape", SHAPES)
def test_equals_the_reference_in_bf16(kernel, monkeypatch, random, shape, size, sigmas):
    check(kernel, monkeypatch, random, shape, size, sigmas, torch.bfloat16)


def check(kernel, monkeypatch, random, shape, size, sigmas, dtype) -> None:
    x = torch.from_numpy(random.normal(size=shape)).to(DEVICE, dtype)
    expected = gaussian_sum(x.double(), size, sigmas)
    poisoned(monkeypatch)
    result = kernel(x, size, sigmas)
    assert result.dtype == dtype
    scale = float(expected.abs().max()) if expected.numel() else 0.0
    torch.testing.assert_close(result.double(), expected, rtol=0, atol=TOLERANCES[dtype] * scale)


@pytest.mark.parametrize(
    ("side", "dtype", "out_dtype"),
    [
        ((20, 20), torch.float32, torch.float32),
        ((20, 20), torch.float16, torch.float16),
        ((96, 96), torch.float16, torch.float32),
        ((66, 97), torch.float16, torch.float64),
        ((97, 66), torch.float16, torch.float16),
        pytest.param((96, 96), torch.bfloat16, torch.float16, marks=pytest.mark.gpu),
        pytest.param((66, 97), torch.bfloat16, torch.float32, marks=pytest.mark.gpu),
    ],
)
def test_relu_of_the_side_branch_and_a_result_of_another_dtype(kernel, random, side, dtype, out_dtype):
    x = torch.from_numpy(random.normal(size=(2, 3, *side))).to(DEVICE, dtype)
    positive = x.double()
    positive[:, 2:].relu_()
    expected = gaussian_sum(positive)
    out = torch.full(x.shape, float("nan"), dtype=out_dtype, device=DEVICE)
    assert kernel(x, first_side=2, out=out) is out
    torch.testing.assert_close(out.double(), expected, rtol=0, atol=TOLERANCES[dtype] * float(expected.abs().max()))


@pytest.mark.parametrize(("out_dtype", "tolerance"), [(torch.float16, 0.0), (torch.float32, 2.0**-15)])
@pytest.mark.parametrize(("height", "width"), [(96, 96), (65, 98)])
def test_mirrored_maps_give_mirrored_results(kernel, random, height, width, out_dtype, tolerance):
    """Half of a result is made the other way round: to the bit in half precision."""
    x = torch.from_numpy(random.normal(size=(1, 2, height, width))).to(DEVICE, torch.float16)
    poison = torch.full(x.shape, float("nan"), dtype=out_dtype, device=DEVICE)
    found, of_mirrored = (kernel(maps, out=poison.clone()) for maps in (x, x.flip(3)))
    torch.testing.assert_close(of_mirrored, found.flip(3), rtol=0, atol=tolerance * float(found.abs().max()))


@pytest.mark.parametrize(("side", "dtype"), [((18, 40), torch.float32), ((65, 66), torch.float16)])
def test_gradient_is_the_operation_itself(kernel, random, side, dtype):
    x = torch.from_numpy(random.normal(size=(1, 2, *side))).to(DEVICE, dtype).requires_grad_()
    weight = torch.from_numpy(random.normal(size=(1, 2, *side))).to(DEVICE, dtype)
    expected = gaussian_sum(weight.double())
    (found,) = torch.autograd.grad((kernel(x) * weight).sum(), x)
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=TOLERANCES[dtype] * float(expected.abs().max()))


@pytest.mark.parametrize(("side", "dtype", "count"), [(96, torch.float16, 1), (40, torch.float32, 3)])
def test_threads_that_come_first_share_their_bands(kernel, monkeypatch, side, dtype, count):
    """Those that one of them records must not be given up for those of another."""
    from lgcn_fast_kernels import triton_gaussian_sum

    made = []

    def slowly(*args):
        made.append(args)
        time.sleep(0.05)
        return matrices(*args)

    matrices = triton_gaussian_sum._matrices
    monkeypatch.setattr(triton_gaussian_sum, "_matrices", slowly)
    for bands in (triton_gaussian_sum._bands, triton_gaussian_sum._even_odd_bands):
        bands.cache_clear()
    for name in ("_even_odd_kernel", "_gaussian_sum_kernel"):  # (the interpreter takes one thread only)
        monkeypatch.setattr(triton_gaussian_sum, name, {(2,): no_launch, (2, 2, 2): no_launch})
    maps = torch.zeros((1, 2, side, side), dtype=dtype, device=DEVICE)
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda _: kernel(maps, 5, (0.5,)), range(4)))
    assert len(made) == count  # a band for each distance of two blocks, or one


def no_launch(*arguments, **options):
    pass


@pytest.mark.parametrize(("shape", "dtype"), [((1, 96, 96), torch.float32), ((1, 1, 4, 4), torch.int64)])
def test_wrong_input_is_named(kernel, shape, dtype):
    with pytest.raises(ValueError, match=r"x: expected \(B, C, H, W\) float32, float16 or bfloat16, got"):
        kernel(torch.zeros(shape, dtype=dtype))
