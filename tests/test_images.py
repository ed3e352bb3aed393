import errno
import os
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from PIL import Image

from lgcn_fast.images import (
    BRIGHTEST,
    DARKEST,
    LEAST_CONTRAST,
    crop,
    face_box,
    from_crop,
    lit,
    read_image,
    silent_opencv,
    square_box,
    to_crop,
    turned,
    upright_boxes,
    upright_crop,
    write_image,
)


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".webp", ".bmp"])
def test_reads_gray_and_rgb(tmp_path, suffix):
    path = tmp_path / f"a{suffix}"
    red = np.zeros((16, 24, 3), np.uint8)
    red[..., 2] = 255  # OpenCV writes BGR
    cv2.imwrite(str(path), red)
    image = read_image(path, color=True)
    assert image.shape == (16, 24, 3)
    assert image[8, 8, 0] > 200
    assert image[8, 8, 2] < 50
    assert read_image(path).shape == (16, 24)


def damaged(tmp_path, demo_picture, kind):
    path = tmp_path / "a.jpg"
    content = {
        "text": b"hello, this is no picture",
        "empty": b"",
        "truncated": demo_picture.read_bytes()[:9000],
        "cut in the header": demo_picture.read_bytes()[:20],
    }
    if kind == "directory":
        path.mkdir()
    elif kind != "missing":
        path.write_bytes(content[kind])
    return path


@pytest.mark.parametrize("kind", ["text", "empty", "truncated", "cut in the header", "directory", "missing"])
def test_unreadable_files_are_named(tmp_path, demo_picture, kind, capfd):
    with pytest.raises(ValueError, match=r"a\.jpg: expected a picture file, got"):
        read_image(damaged(tmp_path, demo_picture, kind))
    assert capfd.readouterr().err == ""  # OpenCV's own complaint would only puzzle


def test_truncated_png_is_an_error(tmp_path, random):
    path = tmp_path / "a.png"
    cv2.imwrite(str(path), random.integers(0, 256, (64, 64), np.uint8))
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(ValueError, match=r"a\.png"):
        read_image(path)


def test_opencv_may_speak_again_when_the_last_is_done():
    logging = cv2.utils.logging
    before = logging.getLogLevel()
    first, second = silent_opencv(), silent_opencv()
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert logging.getLogLevel() == logging.LOG_LEVEL_SILENT
    second.__exit__(None, None, None)
    assert logging.getLogLevel() == before != logging.LOG_LEVEL_SILENT


def test_pictures_with_names_in_any_encoding(tmp_path, random):
    image = random.integers(0, 256, (8, 9, 3), np.uint8)
    path = tmp_path / os.fsdecode(b"latin-\xfc.png")
    write_image(path, image)
    np.testing.assert_array_equal(read_image(path, color=True), image)


@pytest.mark.parametrize(
    ("name", "image", "message"),
    [
        ("a.txt", np.zeros((2, 2, 3), np.uint8), r"a\.txt: expected the suffix of a picture, .* got \.txt"),
        ("a", np.zeros((2, 2, 3), np.uint8), r"a: expected the suffix of a picture, .* got none"),
        ("a.png", np.zeros((2, 2, 3)), r"image: expected \(H, W, 3\) uint8, got \(2, 2, 3\) float64"),
        ("a.png", np.zeros((2, 2), np.uint8), r"image: expected \(H, W, 3\) uint8, got \(2, 2\) uint8"),
        ("a.png", np.zeros((0, 2, 3), np.uint8), r"image: expected \(H, W, 3\) uint8, got \(0, 2, 3\) uint8"),
    ],
)
def test_what_is_no_picture_is_not_written(tmp_path, name, image, message):
    with pytest.raises(ValueError, match=message):
        write_image(tmp_path / name, image)
    assert not (tmp_path / name).exists()


def test_face_box_is_the_enlarged_tight_square():
    points = np.array([[10, 20], [50, 40], [30, 60], [np.nan, np.nan]])
    x, y, width, height = face_box(points)
    assert width == height == pytest.approx(40 * 1.17)
    # Centre of the box, whose left edge lies half a pixel left of pixel x.
    assert x - 0.5 + width / 2 == pytest.approx(30)
    assert y - 0.5 + height / 2 == pytest.approx(40)


def test_face_box_where_labels_are_missing(random):
    """Of a face that is the mean shape, moved, turned and scaled, two labels say where all others are."""
    mean = random.uniform(-1, 1, (12, 2))
    turn = np.array([[0.8, 0.6], [-0.6, 0.8]]) * 30
    points = mean @ turn + (70, 50)
    expected = face_box(points)
    for count in (2, 5, 11):
        partly = points.copy()
        partly[random.permutation(12)[count:]] = np.nan
        np.testing.assert_allclose(face_box(partly, mean), expected, rtol=1e-4, atol=1e-3)
    np.testing.assert_array_equal(face_box(partly), face_box(partly[~np.isnan(partly).any(axis=1)]))
    np.testing.assert_array_equal(face_box(points, mean), expected)


@pytest.mark.parametrize("box", [(10, 20, 30, 30), (-20, -10, 60, 60), (50, 40, 40, 40), (0, 0, 96, 96)])
@pytest.mark.parametrize("size", [96, 33])
def test_coordinates_follow_the_pixels(box, size):
    """A bright spot in the image is where `to_crop` says in the crop, and `from_crop` leads back."""
    spot = np.array([[25.0, 35.0]]) if box[0] < 40 else np.array([[60.0, 50.0]])
    y, x = np.mgrid[:72, :80]
    image = (255 * np.exp(-((x - spot[0, 0]) ** 2 + (y - spot[0, 1]) ** 2) / 18)).astype(np.float32)
    box = square_box(np.array(box))
    found = crop(image, box, size)
    expected = to_crop(spot, box, size)
    rows, columns = np.mgrid[:size, :size]
    weights = found / found.sum()
    centroid = [(columns * weights).sum(), (rows * weights).sum()]
    np.testing.assert_allclose(centroid, expected[0], atol=0.2 * size / 30)
    np.testing.assert_allclose(from_crop(expected, box, size), spot)


def test_beyond_the_image_the_border_repeats():
    image = np.arange(12, dtype=np.uint8).reshape(3, 4)
    result = crop(image, np.array([-1, -1, 5, 5]), 5)
    np.testing.assert_array_equal(result, np.pad(image, ((1, 1), (1, 0)), mode="edge"))


@pytest.mark.parametrize("box", [(10, 10, 20, 19), (10.5, 10.5, 20, 20), (0.5, 3, 20.5, 7)])
def test_square_box_moves_with_its_box(box):
    for shift in range(-3, 4):
        moved = np.add(box, (shift, shift, 0, 0))
        np.testing.assert_array_equal(square_box(moved), np.add(square_box(np.array(box)), (shift, shift, 0, 0)))


def test_square_box_keeps_the_centre():
    np.testing.assert_array_equal(square_box(np.array([10, 20, 30, 10])), [10, 10, 30, 30])
    np.testing.assert_array_equal(square_box(np.array([0, 0, 0.2, 0.2])), [0, 0, 1, 1])


@pytest.mark.parametrize("shape", [(30, 40), (30, 40, 3)])
@pytest.mark.parametrize("box", [(40, 0, 9, 9), (0, 30, 9, 9), (-9, 0, 9, 9), (0, -9, 9, 9), (900, 900, 9, 9)])
def test_boxes_beside_the_image_are_named(shape, box):
    with pytest.raises(ValueError, match=r"box: expected a box that meets the image of 40 x 30 pixels, got x="):
        crop(np.zeros(shape, np.uint8), np.array(box), 8)


def test_a_full_disk_leaves_the_picture_that_was_there(tmp_path, monkeypatch):
    def full(path, content):
        path.touch()
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    path = tmp_path / "a.png"
    path.write_bytes(b"before")
    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match=r"No space left on device: '.*a\.png'"):
        write_image(path, np.zeros((4, 4, 3), np.uint8))
    assert path.read_bytes() == b"before"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("box", [[93.0, 79, 108, 108], [93, 79, 108, 140], [[93, 79, 108, 108]], [93, 79, 108]])
def test_boxes_to_cut_are_whole_squares(box):
    with pytest.raises(ValueError, match=r"box: expected four whole numbers, a square as of `square_box`, got"):
        crop(np.zeros((300, 300), np.uint8), np.array(box), 96)


@pytest.mark.parametrize("side", [60.0, 96.0, 250.0])
def test_points_of_an_upright_crop_are_turned_back(random, side):
    """The pixels say where they come from, also where the crop shrinks and beyond the border."""
    y, x = np.mgrid[:300, :400].astype(np.float32)
    box, angle = np.array([*(random.uniform((150, 130), (250, 170)) - side / 2), side, side]), random.uniform(-3, 3)
    found = np.stack([upright_crop(ramp, box, angle, 96) for ramp in (x, y)], axis=-1)
    pixels = np.stack(np.meshgrid(np.arange(96), np.arange(96)), axis=-1).reshape(1, -1, 2)
    expected = turned(from_crop(pixels, box[None], 96), box[None], np.array([angle])).reshape(96, 96, 2)
    inside = ((expected > 2) & (expected < (397, 297))).all(axis=-1)
    np.testing.assert_allclose(found[inside], expected[inside], atol=0.1)


def test_autocast_has_no_part_in_turns(random):
    points, boxes, angles = (
        random.uniform(0, 1000, (2, 68, 2)),
        np.array([[200.0, 300, 500, 500]] * 2),
        np.array([0.7, 2]),
    )
    with torch.autocast("cpu", torch.bfloat16):
        found = turned(torch.from_numpy(points).float(), boxes, angles)
    np.testing.assert_allclose(found, turned(points, boxes, angles), atol=1e-3)


def test_an_upright_crop_without_a_turn_is_crop(demo_picture):
    face = read_image(demo_picture)
    np.testing.assert_array_equal(upright_crop(face, np.array([96, 84, 96, 96]), 0.0, 96), face[84:180, 96:192])


@pytest.mark.parametrize("angle", [-2.5, -0.4, 0.0, 1.2])
def test_upright_boxes_of_turned_faces(random, angle):
    mean = random.uniform(0, 1, (68, 2))
    boxes = np.array([[30.0, 40, 90, 90], [-7, 5, 200, 200]])
    upright = from_crop(mean, boxes, 1)
    expected = [face_box(points) for points in upright]
    points = turned(upright, np.array(expected), np.full(2, angle))
    found, angles = upright_boxes(points, mean)
    np.testing.assert_allclose(angles, angle, atol=1e-12)
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    found, angles = upright_boxes(upright)
    np.testing.assert_array_equal(angles, 0)
    np.testing.assert_allclose(found, expected, rtol=1e-5)


@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
@pytest.mark.parametrize("shape", [(96, 96), (96, 96, 3)])
def test_pale_and_dark_faces_are_lit(random, dtype, shape):
    usual = random.normal(120, 40, shape).clip(0, 255).astype(dtype)
    assert lit(usual) is usual
    for gain, offset, level in ((0.25, 100, 130), (0.1, 0, DARKEST), (0.4, 150, BRIGHTEST), (1, -100, DARKEST)):
        image = (usual.astype(np.float32) * gain + offset).clip(0, 255).astype(dtype)
        found = lit(image)
        assert (found.dtype, found.shape) == (image.dtype, image.shape)
        assert abs(found.mean() - level) < 3
        deviation = max(LEAST_CONTRAST, image.std())
        assert found.std() == pytest.approx(deviation, rel=0.1)
        assert found.min() >= 0
        assert found.max() <= 255


def test_light_is_continuous(random):
    """From frame to frame of a face that gets darker no level jumps; an even one stays even."""
    face = random.normal(60, 30, (64, 64)).clip(0, 255).astype(np.float32)
    frames = np.stack([lit(face * light) for light in np.geomspace(1, 0.02, 400)])
    assert np.abs(np.diff(frames, axis=0)).max() < 5
    assert len(np.unique(lit(np.full((8, 8), 7, np.uint8)))) == 1


def test_turned_means_clockwise_as_one_sees_it():
    box, right = np.array([[0, 0, 11, 11]]), np.array([[[8.0, 5.0]]])
    np.testing.assert_allclose(turned(right, box, np.array([np.pi / 2])), [[[5, 8]]], atol=1e-12)
    tensor = turned(torch.from_numpy(right).float(), box, np.array([np.pi / 2]))
    assert tensor.dtype == torch.float32
    np.testing.assert_allclose(tensor.numpy(), [[[5, 8]]], atol=1e-5)


SILENT = """
import os, sys, threading, time
import cv2
from lgcn_fast.images import read_image

level, ended = cv2.utils.logging.getLogLevel(), False

def read():
    while not ended:
        read_image(sys.argv[1])

threads = [threading.Thread(target=read) for _ in range(4)]
for thread in threads:
    thread.start()
for _ in range(300):
    child = os.fork()
    if not child:
        read_image(sys.argv[1])
        os._exit(cv2.utils.logging.getLogLevel() != level)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0, "silent"
ended = True
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no processes are forked here")
def test_forked_processes_neither_wait_nor_stay_silent(tmp_path):
    write_image(tmp_path / "a.png", np.zeros((8, 8, 3), np.uint8))
    subprocess.run([sys.executable, "-c", SILENT, tmp_path / "a.png"], check=True, timeout=120)


LITTLE_MEMORY = """
import resource, sys
from lgcn_fast.images import read_image

read_image(sys.argv[1])
pages = int(open("/proc/self/statm").read().split()[0])
resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + 100_000_000, -1))
try:
    read_image(sys.argv[2])
except MemoryError as error:
    assert "large.png" in str(error)
else:
    sys.exit("no error")
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_pictures_that_do_not_fit_into_memory_are_not_called_broken(tmp_path):
    write_image(tmp_path / "small.png", np.zeros((8, 8, 3), np.uint8))
    write_image(tmp_path / "large.png", np.zeros((8000, 8000, 3), np.uint8))
    command = [sys.executable, "-c", LITTLE_MEMORY, tmp_path / "small.png", tmp_path / "large.png"]
    subprocess.run(command, check=True)


def test_pictures_are_turned_as_the_camera_was(tmp_path):
    picture, exif = np.zeros((24, 48, 3), np.uint8), Image.Exif()
    picture[:, :24] = 255
    exif[0x0112] = 6  # a quarter clockwise: what is left in the file is up
    Image.fromarray(picture).save(tmp_path / "a.jpg", exif=exif)
    for image in (read_image(tmp_path / "a.jpg"), read_image(tmp_path / "a.jpg", color=True)[..., 0]):
        assert image.shape == (48, 24)
        assert image[:20].min() > 200 > 50 > image[28:].max()


def test_turned_crops_that_shrink_do_not_alias():
    """Black and white pixels in turn are gray from afar."""
    board = (255 * (np.indices((800, 800)).sum(axis=0) % 2)).astype(np.uint8)
    for angle in (0.0, 0.3, 2.0):
        assert upright_crop(board, np.array([100, 100, 600, 600]), angle, 96).std() < 20
