"""The convolution in Triton: interpreted where there is no GPU (conftest.py)."""

import importlib.util

import pytest
import torch
import torch.nn.functional as F

pytestmark = pytest.mark.skipif(not importlib.util.find_spec("triton"), reason="no triton (pip install '.[gpu]')")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# (B, C, F, kernel size, dilation, H, W); blocks of pixels are 8 x 16.
SHAPES = {
    "gray image": (2, 1, 16, 5, 1, 9, 17),
    "one pixel": (1, 3, 7, 3, 4, 1, 1),
    "block less one, descriptors": (1, 16, 16, 3, 4, 7, 15),
    "exact block, descriptors": (2, 16, 16, 3, 1, 8, 16),
    "dilated, descriptors": (1, 64, 64, 3, 4, 11, 18),
    "half a block of channels, descriptors": (1, 24, 16, 3, 4, 9, 17),
    "terms across taps": (1, 34, 16, 3, 4, 9, 7),
    "several blocks of filters, descriptors": (1, 16, 136, 1, 1, 3, 37),
    "filters no multiple of 8, descriptors": (1, 16, 68, 1, 1, 3, 37),
    "no image": (0, 4, 4, 3, 1, 5, 5),
}
# fp32 sums in another order; otherwise the result is rounded.
TOLERANCES = {torch.float32: 1e-6, torch.float16: 5e-4, torch.bfloat16: 4e-3}


@pytest.fixture(scope="module")
def convolution():
    from lgcn_fast_kernels.triton_convolution import Convolution

    return Convolution


def layer(shape, dtype):
    batch, channels, filters, size, _, height, width = shape
    x = torch.randn(batch, channels, height, width, device=DEVICE, dtype=dtype)
    weight = torch.randn(filters, channels, size, size, device=DEVICE, dtype=dtype) / (channels * size**2) ** 0.5
    return x, weight, torch.randn(filters, device=DEVICE)


def reference(x, weight, bias, dilation):
    return F.conv2d(
        x.double(), weight.double(), bias.double(), padding=len(weight[0, 0]) // 2 * dilation, dilation=dilation
    )


def check(convolution, name, dtype, planes) -> None:
    shape = SHAPES[name]
    x, weight, bias = layer(shape, dtype)
    layout = torch.contiguous_format if planes else torch.channels_last
    x = x.contiguous(memory_format=layout)
    expected = reference(x, weight, bias, shape[4]).relu()
    out = torch.full_like(expected, float("nan"), dtype=dtype, memory_format=layout)
    ours = convolution(weight, bias, shape[4], relu=True, planes=planes)
    assert ours(x, out=out) is out
    scale = float(expected.max()) if expected.numel() else 1.0
    torch.testing.assert_close(out.double(), expected, rtol=0, atol=TOLERANCES[dtype] * scale)
    alone = ours(x)
    assert alone.dtype == dtype
    assert alone.is_contiguous(memory_format=layout)
    assert torch.equal(alone, out)


@pytest.mark.parametrize("planes", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("name", SHAPES)
def test_equals_the_reference(convolution, name, dtype, planes):
    check(convolution, name, dtype, planes)


# (The interpreter multiplies the bits of bf16.)
@pytest.mark.gpu
@pytest.mark.parametrize("planes", [False, True])
@pytest.mark.parametrize("name", SHAPES)
def test_equals_the_reference_in_bf16(convolution, name, planes):
    check(convolution, name, torch.bfloat16, planes)


FP8 = torch.float8_e4m3fn


@pytest.mark.parametrize("planes", [False, True])
@pytest.mark.parametrize("name", SHAPES)
def test_fp8_equals_the_reference(convolution, name, planes):
    """Up to the precision of the sums: what is multiplied has eight bits for the reference, too."""
    shape = SHAPES[name]
    x, weight, bias = layer(shape, torch.float32)
    x, weight, scale = x.to(FP8), (64 * weight).to(FP8), torch.rand(shape[2], device=DEVICE)
    layout = torch.contiguous_format if planes else torch.channels_last
    x = x.contiguous(memory_format=layout)
    expected = reference(x.float(), weight.float() * scale.view(-1, 1, 1, 1), bias, shape[4]).relu()
    largest = float(expected.max()) if expected.numel() else 1.0
    for dtype, tolerance in ((torch.float32, 2e-3 if DEVICE == "cuda" else 1e-6), (torch.float16, 3e-3)):
        ours = convolution(weight, bias, shape[4], relu=True, planes=planes, scale=scale, out_dtype=dtype)
        out = torch.full_like(expected, float("nan"), dtype=dtype, memory_format=layout)
        assert ours(x, out=out) is out
        torch.testing.assert_close(out.double(), expected, rtol=0, atol=tolerance * largest)
        assert torch.equal(ours(x), out)


@pytest.mark.parametrize("dtype", [torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.gpu), FP8])
def test_results_are_rounded_to_fp8(convolution, dtype):
    x, weight, bias = layer((2, 64, 64, 3, 1, 9, 17), torch.float32)
    x, weight = x.to(dtype).contiguous(memory_format=torch.channels_last), weight.to(dtype)
    expected = reference(x.float(), weight.float(), 100 * bias, 1).relu()
    result = convolution(weight, 100 * bias, relu=True, out_dtype=FP8)(x)
    assert result.dtype == FP8
    assert result.is_contiguous(memory_format=torch.channels_last)
    near = (result.double() - expected).abs() <= expected / 15 + 2**-9  # (a rounding error is at most a 16th)
    if DEVICE == "cpu":  # Triton's interpreter forgets to carry where all bits of the mantissa would become 0
        near |= expected.frexp().mantissa > 0.96
    assert near.float().mean() > 0.999


@pytest.mark.gpu
def test_what_fp8_cannot_hold_becomes_its_largest_number(convolution):
    x, weight, bias = layer((1, 16, 16, 1, 1, 8, 16), torch.bfloat16)
    result = convolution(weight, bias * 0 + 1000, relu=True, out_dtype=FP8)(x)
    assert set(result.float().unique().tolist()) == {448.0}


@pytest.mark.parametrize("cut", [0, 1, 2])
def test_filters_become_pixels(convolution, cut):
    """`F.pixel_shuffle`, of which the last rows and columns may be cut off, with a residual of more channels."""
    x, weight, bias = layer((2, 16, 27, 1, 1, 5, 18), torch.float32)
    shuffled = F.pixel_shuffle(reference(x, weight, bias, 1), 3)[..., : 15 - cut, : 54 - cut]
    maps = torch.randn(2, 5, 15 - cut, 54 - cut, device=DEVICE)
    residual = maps[:, :3]
    out = torch.full(shuffled.shape, float("nan"), device=DEVICE)
    ours = convolution(weight, bias, planes=True, shuffle=3)
    for form in (x, x.contiguous(memory_format=torch.channels_last)):
        assert ours(form, residual, out) is out
        torch.testing.assert_close(out.double(), shuffled + residual, rtol=0, atol=1e-5)
        assert ours(form).shape == (2, 3, 15, 54)


@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (2, 136, 7, 19), (3, 64, 8, 8), (1, 65, 5, 13), (0, 3, 4, 5)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_channels_last(shape, dtype):
    from lgcn_fast_kernels.triton_convolution import channels_last

    x = torch.randn(shape, device=DEVICE)
    ours = channels_last(x, dtype)
    assert ours.is_contiguous(memory_format=torch.channels_last)
    assert ours.dtype == dtype
    assert torch.equal(ours, x.to(dtype))


def test_channels_last_wants_contiguous_images(convolution):
    from lgcn_fast_kernels.triton_convolution import channels_last

    with pytest.raises(ValueError, match=r"x: expected contiguous \(B, C, H, W\), got strides"):
        channels_last(torch.zeros(2, 3, 4, 5, device=DEVICE).mT, torch.float32)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("channels", "filters", "size", "dilation"), [(128, 128, 3, 4), (136, 128, 3, 4), (128, 128, 3, 1), (64, 64, 5, 1)]
)
def test_large_batches_go_through_cudnn(convolution, channels, filters, size, dilation):
    shape = (4 if filters == 128 else 32, channels, filters, size, dilation, 96, 96)
    x, weight, bias = layer(shape, torch.bfloat16)
    x = x.contiguous(memory_format=torch.channels_last)
    ours = convolution(weight, bias, dilation, relu=True)
    assert ours._is_faster_in_cudnn(x)
    assert not ours._is_faster_in_cudnn(x[:1])
    expected = reference(x, weight, bias, dilation).relu()
    tolerance = TOLERANCES[torch.bfloat16] * float(expected.max())
    torch.testing.assert_close(ours(x).double(), expected, rtol=0, atol=2 * tolerance)
    assert ours(x).is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(ours(x[:1]).double(), expected[:1], rtol=0, atol=tolerance)


def test_descriptors_are_used_where_they_can_be(convolution):
    for name, shape in SHAPES.items():
        x, weight, bias = layer(shape, torch.float16)
        ours = convolution(weight, bias)
        assert ours._fits_descriptors(x.contiguous(memory_format=torch.channels_last), ours.tiles[0]) == (
            "descriptors" in name
        )
        assert not ours._fits_descriptors(x.contiguous(), ours.tiles[0])


def test_the_more_pixels_the_larger_are_the_tiles(convolution):
    ours = convolution(torch.zeros(128, 128, 3, 3, dtype=torch.bfloat16), torch.zeros(128))
    chosen = [ours.tiles.index(ours._tile(batch, side, side)) for batch, side in ((1, 24), (1, 96), (64, 24), (64, 96))]
    assert chosen == [0, 1, 1, 2]
    assert [tile.stages(2, 227 * 1024) for tile in ours.tiles] == [tile.num_stages for tile in ours.tiles]
    assert [tile.stages(2, 99 * 1024) for tile in ours.tiles] == [3, 3, 2]


def test_pixels_count_from_their_origin(convolution):
    """uint8 and fp32 pixels alike; the padding is the origin too."""
    pixels = torch.randint(0, 256, (2, 1, 9, 5), dtype=torch.uint8, device=DEVICE)
    _, weight, bias = layer(SHAPES["gray image"], torch.float32)
    expected = reference(pixels.double() - 128, weight, bias, 1)
    ours = convolution(weight, bias, origin=128)
    for x in (pixels, pixels.float()):
        torch.testing.assert_close(ours(x).double(), expected, rtol=0, atol=1e-4)


def test_adds_a_part_of_other_planes(convolution):
    x, weight, bias = layer((2, 16, 3, 1, 1, 9, 17), torch.float16)
    planes = torch.randn(2, 5, 9, 17, device=DEVICE)
    out = torch.full((2, 3, 9, 17), float("nan"), device=DEVICE)
    convolution(weight, bias, planes=True)(x, planes[:, :3], out)
    torch.testing.assert_close(out.double(), reference(x, weight, bias, 1) + planes[:, :3], rtol=0, atol=1e-5)


def test_wrong_input_is_named(convolution):
    weight, bias = torch.zeros(2, 3, 3, 3), torch.zeros(2)
    with pytest.raises(ValueError, match=r"weight: expected \(F, C, k, k\) with odd k, got \(2, 3, 2, 2\)"):
        convolution(weight[:, :, :2, :2], bias)
    with pytest.raises(ValueError, match="weight: expected float32, float16, bfloat16 or float8_e4m3fn"):
        convolution(weight.long(), bias)
    with pytest.raises(ValueError, match=r"bias: expected \(2,\), got \(3,\)"):
        convolution(weight, torch.zeros(3))
    with pytest.raises(ValueError, match=r"scale: expected \(2,\), got \(3,\)"):
        convolution(weight, bias, scale=torch.zeros(3))
    with pytest.raises(ValueError, match=r"x: expected \(B, 3, H, W\), got \(1, 2, 9, 9\)"):
        convolution(weight, bias)(torch.zeros(1, 2, 9, 9))
    x = torch.zeros(1, 3, 9, 9)
    with pytest.raises(ValueError, match="residual: expected strides"):
        convolution(weight, bias)(x, torch.zeros(1, 2, 9, 9))
    shuffling = convolution(torch.zeros(8, 3, 3, 3), torch.zeros(8), planes=True, shuffle=2)
    for ours, shape in (
        (convolution(weight, bias), (1, 2, 9, 8)),
        (shuffling, (1, 2, 18, 19)),
        (shuffling, (1, 8, 9, 9)),
    ):
        with pytest.raises(ValueError, match=r"out: expected \(1, 2, .*\), with a shuffle at most"):
            ours(x, out=torch.zeros(shape))


@pytest.mark.gpu
@pytest.mark.parametrize("size", [3, 5])
@pytest.mark.parametrize("filters", [16, 32, 64, 128])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, pytest.param(FP8, id="fp8")])
def test_every_call_gives_the_same_bits(convolution, dtype, filters, size):
    """Products that read what the next block of the loop overwrites once gave one tile in a hundred wrong."""
    from lgcn_fast_kernels.triton_convolution import tiles_of

    x, weight, bias = layer((16, filters, filters, size, 1, 96, 96), torch.float32)
    x, weight = x.to(dtype), (64 * weight).to(dtype)
    x = x.contiguous(memory_format=torch.channels_last)
    results = []
    for tile in tiles_of(filters, filters, size, dtype, False):
        ours = convolution(weight, bias, relu=True, tile=tile)
        results.append(ours(x).float())
        assert all(torch.equal(ours(x).float(), results[-1]) for _ in range(20))
    largest = float(results[0].max())
    # (A result of fp8 that lies between two numbers may be rounded to either.)
    tolerance = 1 / 8 if dtype == FP8 else 2 * TOLERANCES[dtype]
    assert all(torch.allclose(result, results[0], rtol=0, atol=tolerance * largest) for result in results)
