"""Crops in Triton: in its interpreter where there is no GPU (conftest.py), compiled where there is one."""

import importlib.util

import cv2
import numpy as np
import pytest
import torch

from lgcn_fast import predict, prediction
from lgcn_fast.images import BRIGHTEST, DARKEST, LARGEST_GAIN, LEAST_CONTRAST, lit, read_image, square_box
from lgcn_fast.images import crop as images_crop
from lgcn_fast.prediction import _device_crops, as_network_input, network_input

pytestmark = pytest.mark.skipif(not importlib.util.find_spec("triton"), reason="no triton (pip install '.[gpu]')")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
POISON = 137
BOXES = {
    "inside": (3, 4, 50, 50),
    "twice the size": (5, 5, 48, 48),
    "size": (10, 12, 24, 24),
    "smaller": (1, 2, 17, 17),
    "one pixel": (80, 60, 1, 1),
    "beyond the upper left": (-20, -31, 52, 52),
    "beyond the lower right": (75, 60, 31, 31),
    "small and beyond": (-5, 66, 11, 11),
    "larger than the image": (-30, -20, 150, 150),
}


@pytest.fixture(scope="module")
def module():
    from lgcn_fast_kernels import triton_crop

    return triton_crop


@pytest.fixture
def crop(module, monkeypatch):
    if DEVICE == "cpu":
        # Triton's interpreter takes its time per program, not per pixel.
        monkeypatch.setattr(module, "ELEMENTS", 2**15)
    return module.crop


def check(crop, images: np.ndarray | torch.Tensor, boxes, size: int, gray: bool, frames=None) -> None:
    """The crops are those of the host, byte for byte, every one of them written."""
    images, boxes = torch.as_tensor(images).to(DEVICE), np.array(boxes)
    with pytest.MonkeyPatch.context() as patch:  # a pixel that the kernel does not write stays POISON
        patch.setattr(torch, "empty", lambda size, **options: torch.full(size, POISON, **options))
        out = crop(images, boxes, size, gray, frames)
    for index, (box, frame) in enumerate(zip(boxes, range(len(boxes)) if frames is None else frames, strict=True)):
        face = images_crop(images[frame].cpu().contiguous().numpy(), box, size, gray)
        expected = as_network_input(face, 1 if gray else 3)
        np.testing.assert_array_equal(out[index].cpu().numpy(), expected.numpy(), f"box {box}")


@pytest.mark.parametrize(("colors", "gray"), [(1, True), (3, True), (3, False), (1, False)])
def test_equals_opencv(crop, random, colors, gray):
    images = random.integers(0, 256, (2, 70, 90, 3) if colors == 3 else (2, 70, 90), np.uint8)
    check(crop, images, list(BOXES.values()), 24, gray, random.integers(0, 2, len(BOXES)))


def test_programs_of_the_usual_size(module, random):
    check(module.crop, random.integers(0, 256, (2, 40, 50), np.uint8), [(3, 4, 30, 30), (30, 9, 9, 9)], 13, True)


@pytest.mark.parametrize("size", [16, 33])
def test_any_box(crop, random, size):
    """Sides from 1 to 120 somewhere over 60 x 80 pixels."""
    sides = random.integers(1, 121, 12)
    x, y = random.integers(1 - sides, 80), random.integers(1 - sides, 60)
    images = random.integers(0, 256, (1, 60, 80), np.uint8)
    check(crop, images, np.stack([x, y, sides, sides], axis=1), size, True, np.zeros(12, int))


def test_large_face(crop, random):
    check(crop, random.integers(0, 256, (1, 705, 703), np.uint8), [(2, 3, 700, 700)], 8, True)


def test_means_between_two_levels(crop, random):
    """Where rounding decides: sides to size as 10 to 3, 12 to 11, 6 to 5, 4 to 3, 2 to 1 and 6 to 1."""
    images = random.integers(0, 256, (1, 110, 110), np.uint8)
    for size, sides in ((33, (110, 36, 44, 66)), (15, (18, 90))):
        check(crop, images, [(0, 0, side, side) for side in sides], size, True, np.zeros(len(sides), int))


def test_real_picture(crop, demo_picture):
    image = read_image(demo_picture, color=True)[None]
    height, width = image.shape[1:3]
    side = min(height, width)
    boxes = [(0, 0, side, side), (width // 3, height // 3, 60, 60), (width // 4, height // 4, 200, 200)]
    for gray in (True, False):
        check(crop, image, boxes, 96, gray, [0, 0, 0])


@pytest.mark.parametrize("channels", [1, 3])
def test_upright_crops(crop, demo_picture, channels):
    """Those of the host but for rounding (which OpenCV does after each step), also beyond the border."""
    image = read_image(demo_picture, color=True)
    boxes = np.array([[82.3, 70.1, 124.7, 124.7], [120, 100, 50.5, 50.5], [-100, -80, 333, 333], [200, 190, 90, 90]])
    angles = np.array([0.3, -1.2, 2.7, -0.6])
    frames = torch.from_numpy(np.stack([0 * image, image])).to(DEVICE)
    found = _device_crops(frames, np.ones(len(boxes), int), boxes, 96, channels, angles).cpu().float()
    for index, (box, angle) in enumerate(zip(boxes, angles, strict=True)):
        expected = network_input(image, box, 96, channels, angle).float()
        difference = (found[index] - expected).abs()
        assert difference.mean() < 1.5, index
        assert (difference > 10).float().mean() < 0.01, index


@pytest.mark.parametrize(("channels", "size"), [(1, 96), (3, 96), (1, 64), (1, 17), (2, 1)])
def test_lit(module, monkeypatch, random, channels, size):
    """Those of the host to a level, every pixel written: ordinary faces, pale, dark, glaring and empty ones."""
    spread = random.integers(0, 256, (6, channels, size, size)).astype(np.float32)
    faces = np.stack([spread[0], 100 + spread[1] / 20, spread[2] / 10, 200 + spread[3] / 8, 0 * spread[4], spread[5]])
    faces = faces.astype(np.uint8)
    monkeypatch.setattr(torch, "empty_like", lambda x: torch.full_like(x, POISON))
    found = module.lit(torch.from_numpy(faces).to(DEVICE), LEAST_CONTRAST, LARGEST_GAIN, DARKEST, BRIGHTEST)
    expected = np.stack([lit(face.transpose(1, 2, 0)).transpose(2, 0, 1) for face in faces])
    np.testing.assert_allclose(found.cpu().numpy().astype(int), expected.astype(int), atol=1)
    if size > 1:
        np.testing.assert_array_equal(found[0].cpu().numpy(), faces[0])


def test_what_is_not_to_be_lit_is_named(module):
    with pytest.raises(ValueError, match=r"faces: expected contiguous \(B, C, S, S\) uint8, got .* torch.float32 on"):
        module.lit(IMAGES.to(DEVICE).float(), 1.0, 1.0, 1.0, 1.0)


@pytest.mark.parametrize("ensemble", [1, 2])
def test_second_looks_at_frames_that_stay(crop, demo_picture, monkeypatch, ensemble):
    """On a device the points are those of the host, but for what rounding makes of them."""
    image, boxes = read_image(demo_picture, color=True), [[82, 70, 124, 124], [90, 60, 130, 130]]
    expected = predict(image, boxes, "lgcn-nano", device="cpu", ensemble=ensemble, passes=2)
    monkeypatch.setattr(prediction, "_stays_on", lambda engine, batch: True)
    frames = torch.from_numpy(image).to(DEVICE)
    found = predict(frames, boxes, "lgcn-nano", device=DEVICE, ensemble=ensemble, passes=2, to_host=False)
    assert found.points.device.type == DEVICE
    np.testing.assert_allclose(found.points.cpu().numpy(), expected.points, atol=0.7)
    np.testing.assert_allclose(found.scores.cpu().numpy(), expected.scores, atol=0.05)


def test_colors_become_the_same_gray(crop, random):
    image = random.integers(0, 256, (64, 64, 3), np.uint8)
    image[0, :8] = np.stack(np.meshgrid([0, 255], [0, 255], [0, 255]), axis=-1).reshape(8, 3)
    result = crop(torch.from_numpy(image[None]).to(DEVICE), np.array([[0, 0, 64, 64]]), 64, gray=True)
    np.testing.assert_array_equal(result[0, 0].cpu().numpy(), cv2.cvtColor(image, cv2.COLOR_RGB2GRAY))


def test_any_strides(crop, random):
    channels_first = torch.from_numpy(random.integers(0, 256, (2, 3, 40, 50), np.uint8)).to(DEVICE)
    boxes = [(3, 4, 30, 30), (-4, 20, 22, 22)]
    for images in (channels_first.permute(0, 2, 3, 1), channels_first.permute(0, 3, 2, 1), channels_first[:, 1]):
        check(crop, images, boxes, 12, True)
        check(crop, images[:, 1:, ::2], boxes, 12, False)
        check(crop, images[:1].expand(2, *images.shape[1:]), boxes, 12, True)  # several faces of one frame


def test_no_boxes(crop):
    images = torch.zeros((2, 8, 8), dtype=torch.uint8, device=DEVICE)
    assert crop(images, np.zeros((0, 4), int), 4, frames=[]).shape == (0, 3, 4, 4)


def test_the_largest_faces_may_lean(module):
    """What is cut out around them, to be turned, is larger than they are."""
    around = square_box((-8000, -8000, 16384, 16384), 2**0.5)
    boxes, _ = module._checked_boxes(around[None], None, torch.zeros((1, 8, 9), dtype=torch.uint8))
    np.testing.assert_array_equal(boxes, [around])


IMAGES = torch.zeros((1, 8, 9, 3), dtype=torch.uint8)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"images": torch.zeros(1, 8, 8)}, r"images: expected \(F, H, W\) or \(F, H, W, 3\) uint8, got"),
        ({"images": IMAGES[..., :2]}, r"images: expected .*, got"),
        ({"images": IMAGES[0, 0]}, r"images: expected .*, got"),
        ({"size": 0}, "size: expected 1 to 16384 pixels, got 0"),
        ({"boxes": np.zeros((1, 3), int)}, r"boxes: expected \(B, 4\) integers, got \(1, 3\)"),
        ({"boxes": np.zeros((1, 4))}, r"boxes: expected \(B, 4\) integers, got \(1, 4\) float64"),
        ({"boxes": np.array([[0, 0, 4, 5]])}, r"boxes\[0\]: expected x, y, side, side .*, got \[0, 0, 4, 5\]"),
        ({"boxes": np.array([[0, 0, 0, 0]])}, r"boxes\[0\]: expected"),
        ({"boxes": np.array([[0, 0, 32769, 32769]])}, r"boxes\[0\]: expected"),
        ({"boxes": np.array([[9, 0, 4, 4]])}, r"boxes\[0\]: expected .* that meets 9 x 8 pixels, got"),
        ({"boxes": np.array([[0, -4, 4, 4]])}, r"boxes\[0\]: expected"),
        ({"frames": [0, 0]}, r"frames: expected \(1,\) integers, got \(2,\)"),
        ({"frames": [0.5]}, r"frames: expected \(1,\) integers, got \(1,\) float64"),
        ({"frames": [1]}, r"frames\[0\]: expected one of 1 frames, got 1"),
    ],
)
def test_wrong_input_is_named(crop, changed, message):
    given = {"images": IMAGES, "boxes": np.array([[0, 0, 4, 4]]), "size": 4} | changed
    given = {name: value.to(DEVICE) if isinstance(value, torch.Tensor) else value for name, value in given.items()}
    with pytest.raises(ValueError, match=message):
        crop(**given)
