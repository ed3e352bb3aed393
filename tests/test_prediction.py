import gc
import os
import subprocess
import sys
import weakref
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import array_api_strict
import cv2
import numpy as np
import pytest
import torch
from PIL import Image  # (which matplotlib needs)

import lgcn_fast
from lgcn_fast import LGCN, Engine, LGCNConfig, ShapeModel, load_model, loading, predict, prediction
from lgcn_fast.checkpoints import WEIGHTS, save_model
from lgcn_fast.datasets import is_validation, read_300w
from lgcn_fast.evaluation import evaluate, landmark_errors, summary
from lgcn_fast.fitting import NativeFitter
from lgcn_fast.images import (
    crop,
    face_box,
    from_crop,
    read_image,
    square_box,
    to_crop,
    turned,
    upright_boxes,
)
from lgcn_fast.inputs import as_images
from lgcn_fast.loading import KEPT_ENGINES, engine_for, shape_for
from lgcn_fast.operators import gaussian_sum_banded
from lgcn_fast.prediction import network_input
from lgcn_fast.shipped import default_model, models
from lgcn_fast_kernels import INSTRUCTIONS

FACE = [82, 70, 124, 124]


@pytest.fixture
def image(demo_picture):
    return read_image(demo_picture, color=True)


@pytest.fixture
def gray(image):
    return crop(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY), square_box(np.array(FACE)), 96)


def test_the_five_line_example(image):
    landmarks = predict(image, [FACE])
    assert landmarks.points.shape == (1, 68, 2)
    assert landmarks.points.dtype == landmarks.scores.dtype == np.float32
    assert landmarks.scores.shape == (1, 68)
    assert 0 <= landmarks.scores.min() <= landmarks.scores.max() <= 1
    # Where a person sees them, in pixels of the picture: eyes, nose tip, mouth, chin.
    expected = {36: (114, 101), 45: (177, 105), 33: (146, 136), 57: (146, 153), 8: (143, 178)}
    for index, place in expected.items():
        assert np.linalg.norm(landmarks.points[0, index] - place) < 6, index


def test_all_forms_of_a_batch_give_the_same_points(gray):
    expected = predict(gray).points
    assert expected.shape == (1, 68, 2)
    rgb = np.repeat(gray[..., None], 3, axis=2)
    forms = {
        "(1, H, W)": gray[None],
        "(1, 1, H, W)": gray[None, None],
        "(H, W, 1)": gray[..., None],
        "(H, W, 3)": rgb,
        "(1, H, W, 3)": rgb[None],
        "(1, 3, H, W)": rgb.transpose(2, 0, 1)[None],
        "float 0..255": gray.astype(np.float64),
        "float 0..1": gray.astype(np.float32) / 255,
        "torch uint8": torch.from_numpy(gray),
        "torch bf16": torch.from_numpy(gray).bfloat16(),
        "DLPack": array_api_strict.asarray(gray),
        "list": [gray],
        "list of torch": [torch.from_numpy(rgb)],
        "not contiguous": np.repeat(gray, 2, axis=1)[:, ::2],
    }
    for name, form in forms.items():
        np.testing.assert_allclose(predict(form).points, expected, atol=0.02, err_msg=name)


@pytest.mark.parametrize("fit", [True, False])
def test_results_may_stay_on_the_device(gray, fit):
    expected = predict([gray] * 3, fit=fit)
    there = predict([gray] * 3, fit=fit, to_host=False)
    assert there.points.device == there.scores.device == Engine(load_model("lgcn-nano")).device
    np.testing.assert_allclose(there.points.cpu().numpy(), expected.points, atol=1e-3)
    np.testing.assert_allclose(there.scores.cpu().numpy(), expected.scores, atol=1e-3)


def test_three_gray_images_are_not_one_in_colour(gray):
    assert len(predict(np.stack([gray] * 3))) == 3
    with pytest.raises(ValueError, match=r"expected one image .*, got 3 .* take image\[None\]"):
        lgcn_fast.detect(np.stack([gray] * 3))


def test_images_of_any_sizes_in_one_call(image, gray):
    both = predict([image, gray, image[:, 50:]], [FACE, [0, 0, 96, 96], [32, 70, 124, 124]])
    np.testing.assert_allclose(both.points[2] + (50, 0), both.points[0], atol=1e-2)
    # Gray before or after resizing makes a last bit of difference, which may move the peak of a flat heatmap.
    assert np.median(np.abs(both.points[1] * (124 / 96) + (82.15, 70.15) - both.points[0])) < 0.05


def test_without_box_the_whole_image_is_the_face(gray):
    wide = np.pad(gray, ((0, 0), (20, 20)), mode="edge")
    np.testing.assert_allclose(predict(wide).points, predict(wide, [[0, -20, 136, 136]]).points, atol=1e-3)


def test_a_given_model_is_used_and_not_changed(gray):
    model = LGCN(LGCNConfig.nano(filters=8, num_landmarks=5)).train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert predict(gray, model=model, fit=False).points.shape == (1, 5, 2)
    assert model.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_a_given_engine_is_used(gray):
    engine = Engine(load_model("lgcn-nano"), precision="fp32")
    difference = np.abs(predict(gray, model=engine).points - predict(gray, model="lgcn-nano").points)
    assert np.median(difference) < 0.05  # the default may be bf16


def test_a_shape_model_of_ones_own(gray, random, tmp_path):
    network = LGCN(LGCNConfig.nano(filters=8, num_landmarks=5))
    with pytest.raises(ValueError, match=r"shape: expected the shape model of the 5 landmarks .* or fit=False"):
        predict(gray, model=network)
    shape = ShapeModel.fit(random.normal(size=(20, 5, 2)), 2)
    shape.save(tmp_path / "shape.safetensors")
    points = predict(gray, model=network, shape=shape).points
    np.testing.assert_array_equal(predict(gray, model=network, shape=tmp_path / "shape.safetensors").points, points)
    with pytest.raises(ValueError, match="shape: expected a shape model of 68 landmarks, got one of 5"):
        predict(gray, shape=shape)


def test_rgb_and_cross_entropy_models(gray):
    config = LGCNConfig.nano(filters=8, num_landmarks=5, in_channels=3, loss="cross_entropy")
    landmarks = predict(gray, model=LGCN(config), fit=False)
    # Untrained logits are 0: each landmark and the background are equally likely.
    np.testing.assert_allclose(landmarks.scores, 1 / 6, rtol=1e-5)


NAN_IMAGE = np.full((9, 9), np.nan, np.float32)


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ([], "batch: expected at least one image, got none"),
        (np.zeros((0, 96, 96), np.uint8), "at least one pixel, got shape"),
        (np.zeros((2, 0, 96), np.uint8), "at least one pixel, got shape"),
        (np.zeros((2, 2, 9, 9), np.uint8), r"batch: expected \(B, H, W\).* got \(2, 2, 9, 9\)"),
        (np.zeros((2, 9, 9, 4), np.uint8), r"batch: expected gray or RGB, got \(2, 9, 9, 4\), as of RGBA"),
        (np.zeros((9, 8, 4), np.uint8), r"batch: expected gray or RGB, got \(9, 8, 4\), as of RGBA"),
        (np.zeros(9, np.uint8), r"got \(9,\)"),
        (np.zeros((9, 9, 2), np.uint8), r"expected gray or RGB, got \(9, 9, 2\), as of gray with alpha"),
        (np.zeros((9, 9), np.int64), "expected uint8 or floating point, got int64"),
        (np.zeros((9, 9), np.uint16), r"got uint16 \(its upper eight bits are \(image >> 8\)"),
        (Image.new("RGB", (9, 9)), r"got Image \(of it: np.asarray\(image.convert"),
        (NAN_IMAGE, "expected finite pixel values"),
        (np.full((9, 9), -1.0), "expected pixel values in 0..1 or 0..255, got -1 to -1"),
        (np.full((9, 9), 300.0), "got 300 to 300"),
        ("face.jpg", "expected a NumPy array, torch tensor or list of them, got str"),
        ([np.zeros((2, 9, 9), np.uint8)], r"batch\[0\]: expected one image .*, got 2 in an array of \(2, 9, 9\)"),
        (np.zeros((1, 1, 17000), np.uint8), r"boxes\[0\]: expected a face of at most 16384"),
        ([np.zeros((9, 9), np.uint8), NAN_IMAGE], r"batch\[1\]: expected finite"),
    ],
)
def test_bad_batches_are_named(batch, message):
    with pytest.raises(ValueError, match=message):
        predict(batch)


@pytest.mark.parametrize(
    ("boxes", "message"),
    [
        ([[96, 0, 10, 10]], r"boxes\[0\]: expected a box that meets the image of 96 x 96"),
        ([[-10, 0, 10, 10]], r"boxes\[0\]"),
        ([[0, 0, 0, 10]], r"boxes\[0\]"),
        (
            [[0, 0, np.nan, 10]],
            r"boxes\[0\]: expected x, y and a width and height above 0, got \[0.0, 0.0, nan, 10.0\]",
        ),
        ([[0.3, 0.2, 0.4, 0.4]], r"boxes\[0\]: expected a box of at least 2 pixels a side, got 0.4 x 0.4 \(shares of"),
        ([[95.8, 50, 10, 10]], r"boxes\[0\], in whole pixels: expected a box that meets .*, got x=96"),
        ([[-10, 50, 10.2, 10.2]], r"boxes\[0\], in whole pixels"),
        ([[0, 0, np.inf, 10]], r"boxes\[0\]"),
        ([[0, 0, 1e9, 1e9]], r"boxes\[0\]: expected a face of at most 16384 pixels a side, got 1000000000"),
        ([[0, 0, 10]], r"boxes: expected x, y, width, height for 1 images, got shape \(1, 3\)"),
        ([[0, 0, 10, 10], [96, 0, 10, 10]], r"boxes\[1\]"),
        (["0,0,10,10"], r"boxes: expected x, y, width, height of each face .*, got \['0,0,10,10'\]"),
        ([[[0, 0, 10, 10]] * 2, [[0, 0, 10, 10]]], r"boxes: expected .* repeat the images"),
        (lgcn_fast.Faces(*np.zeros((4, 0))), r"boxes: expected .*, got Faces .*`faces.boxes`"),
    ],
)
def test_bad_boxes_are_named(gray, boxes, message):
    with pytest.raises(ValueError, match=message):
        predict(gray, boxes)


def test_boxes_of_any_kind(image):
    boxes = [[82, 70, 124, 124], [70, 60, 140, 140]]
    expected = predict(image, boxes, "lgcn-finder").points
    tensor = torch.tensor(boxes, dtype=torch.float32)
    kinds = (
        tensor,
        tensor.bfloat16(),
        tensor.long(),
        tensor.requires_grad_(),
        array_api_strict.asarray(boxes),
        [*np.array(boxes)],
    )
    for kind in kinds:
        np.testing.assert_array_equal(predict(image, kind, "lgcn-finder").points, expected)


def test_several_images_want_as_many_boxes(gray):
    with pytest.raises(ValueError, match=r"boxes: expected .* for 2 images, got shape \(3, 4\)"):
        predict([gray, gray], [[0, 0, 10, 10]] * 3)


@pytest.mark.parametrize("ensemble", [1, 2])
def test_one_image_may_have_several_faces(image, ensemble):
    boxes = [[82, 70, 124, 124], [70, 60, 140, 140], [90, 80, 110, 110]]
    together = predict(image, boxes, ensemble=ensemble)
    for index, box in enumerate(boxes):
        alone = predict(image, box, ensemble=ensemble)
        np.testing.assert_allclose(together.points[index], alone.points[0], atol=1e-3)
    np.testing.assert_array_equal(together.points, predict([image] * 3, boxes, ensemble=ensemble).points)


@pytest.mark.parametrize("to_host", [True, False])
def test_faces_one_by_one_and_some_of_them(image, to_host):
    boxes = [[82, 70, 124, 124], [70, 60, 140, 140], [90, 80, 110, 110]]
    faces = predict(image, boxes, "lgcn-finder", to_host=to_host)
    one_by_one = list(faces)
    assert [face.points.shape for face in one_by_one] == [(68, 2)] * 3
    assert [repr(found) for found in (faces, faces[:0], faces[0])] == [
        f"Landmarks({faces} of 68 points)" for faces in ("3 faces", "0 faces", "1 face")
    ]
    assert all((face.scores == scores).all() for face, scores in zip(one_by_one, faces.scores, strict=True))
    with pytest.raises(TypeError, match="expected some, got the landmarks of one"):
        one_by_one[0][0]
    for chosen in (None, True, (0, 1), (..., 0), np.array([[0, 1]])):
        with pytest.raises(TypeError, match="faces: expected an index, a slice, a mask or indices, got"):
            faces[chosen]
    for chosen in ([2, 0], slice(2), np.array([True, False, True])):
        assert (faces[chosen].points == faces.points[chosen]).all()
        assert (faces[chosen].scores == faces.scores[chosen]).all()


class Foreign:
    """An array of another library."""

    def __init__(self, array):
        self.array = array

    def __dlpack__(self, **options):
        return self.array.__dlpack__(**options)

    def __dlpack_device__(self):
        return self.array.__dlpack_device__()


def test_arrays_of_other_libraries_may_run_backwards(image):
    """Torch would end the process."""
    boxes = [[94, 70, 124, 124]]
    expected = predict(image[:, ::-1].copy(), boxes, "lgcn-finder").points
    np.testing.assert_array_equal(predict(Foreign(image[:, ::-1]), boxes, "lgcn-finder").points, expected)
    half = predict(Foreign(torch.from_numpy(image).bfloat16()), boxes, "lgcn-finder")  # NumPy has no bfloat16
    assert half.points.shape == (1, 68, 2)
    engine = Engine("lgcn-finder", "cpu")
    crops = np.random.default_rng(0).integers(0, 256, (1, 1, 48, 48), np.uint8)
    np.testing.assert_array_equal(engine.heatmaps(crops[::-1, ::-1]), engine.heatmaps(crops))


@pytest.mark.parametrize("shape", [(1, 0, 96), (2, 96, 0, 3), (0, 96, 96)])
def test_images_without_pixels_are_named_where_they_stay_on_a_gpu(shape, monkeypatch):
    monkeypatch.setattr(prediction, "_stays_on", lambda engine, batch: True)
    with pytest.raises(ValueError, match=r"batch: expected at least one image with at least one pixel, got shape \("):
        predict(torch.zeros(shape, dtype=torch.uint8), model="lgcn-finder")


@pytest.mark.parametrize("boxes", [[], np.zeros((0, 4))])
@pytest.mark.parametrize("to_host", [True, False])
def test_one_image_may_have_no_faces(image, boxes, to_host):
    landmarks = predict(image, boxes, "lgcn-finder", to_host=to_host)
    assert len(landmarks) == 0
    assert (landmarks.points.shape, landmarks.scores.shape) == ((0, 68, 2), (0, 68))
    assert isinstance(landmarks.points, np.ndarray if to_host else torch.Tensor)


def test_floats_a_little_above_1_are_not_bytes(gray):
    """As after resizing with an antialiasing filter."""
    expected = predict(gray, model="lgcn-nano").points
    bright = gray.astype(np.float32) / gray.max()
    found = predict(bright, model="lgcn-nano").points
    bright[bright == 1] += 2e-7
    assert bright.max() > 1
    np.testing.assert_allclose(predict(bright, model="lgcn-nano").points, found, atol=1e-3)
    np.testing.assert_allclose(found, expected, atol=1)  # (brighter by a few percent)


def test_images_may_be_read_only(gray):
    gray.flags.writeable = False  # as of PIL
    assert predict(gray, model="lgcn-nano").points.shape == (1, 68, 2)


@pytest.mark.parametrize("ensemble", [1, 2, 65])
def test_images_belong_to_the_caller(gray, ensemble):
    """What the network reads, and mirrors, is never the image itself, also where nothing was to be cut or resized."""
    image = cv2.resize(gray, (96, 96))
    before, read = image.copy(), []

    def maxima(crops, to_host=True):
        read.append(crops)
        return Engine.maxima(engine, crops, to_host)

    engine = Engine("lgcn-nano")
    prediction.locate([image], np.array([[0, 0, 96, 96]]), engine, maxima, ensemble)
    assert not any(np.shares_memory(crops.numpy(), image) for crops in read)
    np.testing.assert_array_equal(image, before)


def test_a_second_pass_looks_in_the_box_of_the_first(image):
    boxes = [[90, 60, 150, 140], FACE]
    first = predict(image, boxes, "lgcn-nano")
    engine, shape = Engine("lgcn-nano"), ShapeModel.load(WEIGHTS / "shape-68.safetensors")
    upright, angles = upright_boxes(first.points, shape.mean)
    crops = [network_input(image, box, 96, 1, angle) for box, angle in zip(upright, angles, strict=True)]
    fitted = engine.fit(torch.stack(crops), shape)
    found = predict(image, boxes, engine, passes=2)
    expected = turned(from_crop(fitted.points, upright, 48), upright, angles)
    np.testing.assert_allclose(found.points, expected, atol=1e-3)
    np.testing.assert_allclose(found.scores, fitted.certainties.clip(0, 1), atol=1e-6)
    assert np.abs(found.points[0] - found.points[1]).mean() < np.abs(first.points[0] - first.points[1]).mean()


@pytest.mark.parametrize("options", [{}, {"ensemble": 4}, {"to_host": False}])
def test_a_second_pass_turns_faces_upright(image, options):
    """0.2 to 0.45 pixels from where they were before the turn; in one pass 0.4, 1.0 and 4.4."""
    upright = predict(image, [FACE], "lgcn-nano", passes=2).points
    for angle, least in ((20, 0.3), (-45, 0.8), (60, 3)):
        matrix = cv2.getRotationMatrix2D((143.5, 131.5), -angle, 1)
        there = cv2.warpAffine(image, matrix, image.shape[1::-1], borderMode=cv2.BORDER_REPLICATE)
        expected = upright @ matrix[:, :2].T + matrix[:, 2]
        box = face_box(expected[0])
        found = np.asarray(predict(there, [box], "lgcn-nano", passes=2, **options).points)
        assert np.linalg.norm(found - expected, axis=-1).mean() < 0.7, angle
        once = predict(there, [box], "lgcn-nano").points
        assert np.linalg.norm(once - expected, axis=-1).mean() > least, angle


def test_the_second_look_of_bare_maxima_is_not_turned(image):
    first = predict(image, [FACE], "lgcn-nano", fit=False)
    boxes, _ = upright_boxes(first.points)
    points, _ = Engine("lgcn-nano").maxima(network_input(image, boxes[0], 96, 1, 0.0)[None])
    found = predict(image, [FACE], "lgcn-nano", fit=False, passes=2)
    np.testing.assert_allclose(found.points, from_crop(points, boxes, 48), atol=1e-3)


@pytest.mark.parametrize("box", [(-900, 0, 100, 100), (-4356, -4368, 9000, 9000)])
def test_a_pass_that_ends_beside_the_image_is_not_followed(image, monkeypatch, box):
    nowhere = np.array([box], float), np.ones(1)
    monkeypatch.setattr(prediction, "upright_boxes", lambda points, mean: nowhere)
    found = predict(image, [FACE], "lgcn-nano", passes=3).points
    np.testing.assert_allclose(found, predict(image, [FACE], "lgcn-nano").points, atol=0.7)  # (another way to resize)


@pytest.mark.parametrize(("gain", "offset"), [(0.25, 0), (0.1, 0), (0.3, 178), (0.2, 30)])
def test_dark_and_pale_pictures(image, gain, offset):
    """0.64 to 0.74 pixels beside the points of the picture as it is; without more light 0.89 to 1.64."""
    expected = predict(image, [FACE], "lgcn-nano")
    found = predict(np.rint(image * np.float64(gain) + offset).astype(np.uint8), [FACE], "lgcn-nano")
    assert np.linalg.norm(found.points - expected.points, axis=-1).mean() < 0.82
    assert found.scores.mean() > 0.985 * expected.scores.mean()


def leaning(image, angle: float) -> tuple[np.ndarray, np.ndarray]:
    """The picture turned by so many degrees about the face, and the box of its landmarks there."""
    matrix = cv2.getRotationMatrix2D((143.5, 131.5), -angle, 1)
    points = predict(image, [FACE], "lgcn-finder").points[0] @ matrix[:, :2].T + matrix[:, 2]
    return cv2.warpAffine(image, matrix, image.shape[1::-1], borderMode=cv2.BORDER_REPLICATE), face_box(points)


def test_a_third_pass_that_ends_nowhere_is_the_second_again(image, monkeypatch):
    turned_image, box = leaning(image, 50)
    expected = predict(turned_image, [box], "lgcn-finder", passes=2).points
    looks = [upright_boxes, lambda points, mean: (np.array([[-900.0, 0, 100, 100]]), np.zeros(1))]
    monkeypatch.setattr(prediction, "upright_boxes", lambda points, mean: looks.pop(0)(points, mean))
    np.testing.assert_allclose(predict(turned_image, [box], "lgcn-finder", passes=3).points, expected, atol=1e-3)
    assert not looks


def test_each_of_many_faces_is_turned_as_it_leans(image):
    """More than go through the network at once."""
    pictures = [leaning(image, angle) for angle in np.linspace(-60, 60, 70)]
    images, boxes = zip(*pictures, strict=True)
    found = predict(list(images), boxes, "lgcn-finder", passes=2).points
    for index in (0, 35, 63, 64, 69):
        alone = predict(images[index], boxes[index], "lgcn-finder", passes=2).points
        np.testing.assert_allclose(found[index : index + 1], alone, atol=1e-3)


def test_too_few_passes_are_named(gray):
    with pytest.raises(ValueError, match=r"passes: expected 1 or more, got 2\.0"):
        predict(gray, model="lgcn-finder", passes=2.0)
    with pytest.raises(ValueError, match="passes: expected 1 or more, got 0"):
        predict(gray, passes=0)


@pytest.mark.data
@pytest.mark.slow
def test_a_second_pass_puts_up_with_boxes_of_others(data):
    """Validation faces in boxes that are moved and scaled; measured with lgcn-nano: 3.99 -> 3.56 %."""
    faces = [face for face in read_300w(data / "300w" / "helen") if is_validation(face.group)]
    random, boxes = np.random.default_rng(0), []
    for face in faces:
        x, y, side, _ = face_box(face.points)
        (dx, dy), scale = random.uniform(-0.12, 0.12, 2), random.uniform(0.85, 1.2)
        boxes.append([x + (dx + 0.5 - scale / 2) * side, y + (dy + 0.5 - scale / 2) * side, scale * side, scale * side])
    images, labels = [face.image() for face in faces], np.stack([face.points for face in faces])
    one, two = (
        landmark_errors(predict(images, boxes, "lgcn-nano", passes=passes).points, labels).mean() for passes in (1, 2)
    )
    assert two < 0.94 * one


def test_what_is_no_model_is_named(gray):
    with pytest.raises(ValueError, match="model: expected a name, a path, a network or an engine, got ShippedModel"):
        predict(gray, model=models()[0])
    with pytest.raises(ValueError, match="shape: expected a shape model or a path, got ndarray"):
        predict(gray, shape=np.zeros((68, 2)))


@pytest.mark.parametrize("kind", ["file", "network"])
def test_threads_that_call_first_build_one_engine(tmp_path, monkeypatch, kind):
    path, built, start = tmp_path / "a.safetensors", [], Barrier(8)
    network = LGCN(LGCNConfig.nano(filters=4)).eval()
    save_model(path, network, {})
    model = path if kind == "file" else network
    build = Engine.__init__
    monkeypatch.setattr(Engine, "__init__", lambda engine, *given: (built.append(engine), build(engine, *given))[1])

    def first_call(_) -> Engine:
        start.wait(timeout=60)
        return engine_for(model, "cpu", "fp32")

    with ThreadPoolExecutor(8) as threads:
        engines = list(threads.map(first_call, range(8)))
    assert [engine is built[0] for engine in engines] == [True] * 8
    assert len(built) == 1


@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
@pytest.mark.parametrize("size", [(1, 4, 1), (2, 5, 7), (3, 4, 9)])
def test_views_of_any_layout_are_what_they_show(dtype, size, random):
    rgba = (255 * random.random((*size, 4))).astype(dtype)
    rgb = np.ascontiguousarray(rgba[..., :3])
    planes = np.ascontiguousarray(rgb.transpose(0, 3, 1, 2))
    gray_as_colours = np.broadcast_to(rgb[..., :1], rgb.shape)
    views = [rgb, rgb[..., ::-1], rgba[..., :3], rgba[..., 2::-1], planes.transpose(0, 2, 3, 1), gray_as_colours]
    for view in [*views, rgb[:, :, ::-1], rgb[:, ::-1, ::-1, ::-1], rgb[:, ::2], np.asfortranarray(rgb)]:
        for image, expected in zip(as_images(view), view, strict=True):
            assert image.flags.c_contiguous
            assert image.dtype == dtype
            np.testing.assert_array_equal(image, expected)


def test_an_image_may_have_one_row():
    assert [image.shape for image in as_images(np.zeros((1, 50, 3), np.uint8))] == [(1, 50, 3)]


def test_kinds_of_images_may_mix(gray):
    points = predict([gray, gray.astype(np.float32), torch.from_numpy(gray) / 255]).points
    np.testing.assert_allclose(points[1:], points[:1].repeat(2, axis=0), atol=0.02)


@pytest.mark.parametrize("device", ["cuda", "nothing", "cuda:99"])
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_devices_that_are_not_there_are_named(gray, device):
    with pytest.raises(ValueError, match=f"device: expected .* got '{device}'"):
        predict(gray, device=device)


@pytest.mark.parametrize("shape", [(1, 1), (1, 300), (500, 3), (97, 95)])
def test_images_of_odd_sizes(shape, random):
    landmarks = predict(random.integers(0, 256, shape, np.uint8)[None])
    assert np.isfinite(landmarks.points).all()


def test_import_is_light():
    """No GPU packages, no training code that nobody asked for, and quickly."""
    code = (
        "import sys, time, torch; t = time.perf_counter(); import lgcn_fast; s = time.perf_counter() - t;"
        "heavy = {'triton', 'cupy', 'matplotlib', *(f'lgcn_fast.{m}' for m in ('training', 'optimiser', 'cli'))};"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules); print(s)"
    )
    seconds = min(
        float(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)
        for _ in range(3)
    )
    assert seconds < 1, f"import lgcn_fast took {seconds:.2f} s beside torch"


def test_public_names_exist():
    assert all(hasattr(lgcn_fast, name) for name in lgcn_fast.__all__)


@pytest.mark.data
def test_batch_and_one_by_one_agree(data):
    faces = read_300w(data / "300w" / "lfpw" / "testset")[:100]
    images = [face.image() for face in faces]
    boxes = np.stack([face_box(face.points) for face in faces])
    together = predict(images, boxes)
    for index in range(100):
        alone = predict(images[index], boxes[index])
        np.testing.assert_allclose(alone.points[0], together.points[index], atol=1e-3)
        np.testing.assert_allclose(alone.scores[0], together.scores[index], atol=1e-4)


@pytest.mark.data
@pytest.mark.slow
def test_accuracy_of_the_shipped_model_on_lfpw(data):
    evaluation = evaluate(read_300w(data / "300w" / "lfpw" / "testset"), "lgcn-nano")["heatmap maxima"]
    points, inner = (summary(evaluation.errors(outline)) for outline in (True, False))
    assert points["faces"] == 224
    assert points["median"] <= 3.45
    assert inner["median"] <= 2.8
    assert points["failures"] < 2


@pytest.mark.data
@pytest.mark.slow
@pytest.mark.parametrize(("precision", "pixels", "points"), [("fp32", 1e-3, 1e-5), ("bf16", 0.05, 2e-4)])
def test_engines_find_the_points_of_the_eager_model(data, precision, pixels, points):
    """Median distance in pixels of the crop, and change of the error on the test set (shares)."""
    if precision not in INSTRUCTIONS:
        pytest.skip("this processor has no bf16 instructions")
    model, shape = load_model("lgcn-nano"), ShapeModel.load(WEIGHTS / "shape-68.safetensors")
    faces = read_300w(data / "300w" / "lfpw" / "testset")
    boxes = [square_box(face_box(face.points)) for face in faces]
    crops = torch.from_numpy(np.stack([crop(face.image(), box, 96) for face, box in zip(faces, boxes, strict=True)]))
    stride = model.config.stride
    labels = np.stack([to_crop(face.points, box, 96 / stride) for face, box in zip(faces, boxes, strict=True)])
    model.kernel_convolution.operator = gaussian_sum_banded  # the same (test_model.py) in less time
    with torch.inference_mode():
        heatmaps = torch.cat([model(part).output for part in crops[:, None].split(32)]).numpy()
    expected = NativeFitter(shape)(heatmaps, stride).points
    found = Engine(model, "cpu", precision).fit(crops[:, None], shape).points
    assert stride * np.median(np.linalg.norm(found - expected, axis=-1)) <= pixels
    errors = [np.median(landmark_errors(p, labels)) for p in (expected, found)]
    assert abs(errors[0] - errors[1]) <= points


def test_engines_are_kept_until_the_weights_change():
    network = LGCN(LGCNConfig.nano(filters=8)).eval()
    before = engine_for(network, "cpu", "fp32")
    others = [engine_for(network, "cpu", "fp32", threads) for threads in (1, 2)]
    assert [engine_for(network, "cpu", "fp32", threads) for threads in (0, 1, 2)] == [before, *others]
    with torch.no_grad():
        network.main.bias += 1
    assert engine_for(network, "cpu", "fp32") is not before
    assert engine_for(network, "cpu", "fp32", 1) is not others[0]
    shipped = engine_for(None, "cpu", "fp32")
    name = default_model("cpu")
    assert engine_for(name, "cpu", "fp32") is shipped
    assert engine_for(WEIGHTS / f"{name}.safetensors", "cpu", "fp32") is shipped
    assert shipped.precision == "fp32"


def test_another_file_in_the_place_of_one_is_read(tmp_path):
    """Of the same size, with the same time: as after `cp -p`."""
    path = tmp_path / "best.safetensors"
    for epoch in (0, 1):
        new = tmp_path / f"{epoch}.safetensors"
        save_model(new, LGCN(LGCNConfig.nano(filters=8)), {"epoch": epoch})
        os.utime(new, (0, 0))
    found = []
    for epoch in (0, 1):
        (tmp_path / f"{epoch}.safetensors").replace(path)
        assert path.stat().st_mtime == 0
        found.append(engine_for(path, "cpu", "fp32"))
    assert found[0] is not found[1]


def test_files_that_change_are_read_again(tmp_path, random):
    path, engines = tmp_path / "best.safetensors", []
    for filters in (8, 9):  # as training writes a better one
        save_model(path, LGCN(LGCNConfig.nano(filters=filters)), {})
        assert engine_for(path, "cpu", "fp32").config.filters == filters
        engines.append(weakref.ref(engine_for(path, "cpu", "fp32")))
    gc.collect()
    assert [engine() is None for engine in engines] == [True, False]
    assert engine_for(path, "cpu", "fp32") is engine_for(path, "cpu", "fp32")
    for modes in (4, 5):
        ShapeModel.fit(random.normal(size=(20, 68, 2)), modes=modes).save(tmp_path / "shape.safetensors")
        assert len(shape_for(tmp_path / "shape.safetensors", 68).modes) == modes


def test_the_last_engines_of_files_are_kept(monkeypatch):
    monkeypatch.setattr(loading, "_files", {})
    first = engine_for("lgcn-finder", "cpu", "fp32", 1)
    others = [engine_for("lgcn-finder", "cpu", "fp32", threads) for threads in range(2, KEPT_ENGINES + 1)]
    assert engine_for("lgcn-finder", "cpu", "fp32", 1) is first  # now the last that was asked for
    engine_for("lgcn-finder", "cpu", "fp32", 0)
    assert engine_for("lgcn-finder", "cpu", "fp32", 1) is first
    assert engine_for("lgcn-finder", "cpu", "fp32", 3) is others[1]
    assert engine_for("lgcn-finder", "cpu", "fp32", 2) is not others[0]


def test_networks_in_any_state_of_torch(gray):
    expected = predict(gray, model="lgcn-finder", precision="fp32").points
    with torch.inference_mode():
        network = load_model("lgcn-finder")
    np.testing.assert_allclose(predict(gray, model=network, precision="fp32").points, expected, atol=1e-4)
    double = load_model("lgcn-finder").double()
    np.testing.assert_allclose(predict(gray, model=double, precision="fp32").points, expected, atol=1e-4)
    try:
        torch.set_default_dtype(torch.float64)
        engine = Engine("lgcn-finder", "cpu", "fp32")
    finally:
        torch.set_default_dtype(torch.float32)
    np.testing.assert_allclose(predict(gray, model=engine).points, expected, atol=1e-4)


def test_several_threads_at_once(gray):
    crops = [gray[i : i + 80, i : i + 80] for i in range(8)]
    expected = [predict(crop).points for crop in crops]
    with ThreadPoolExecutor(8) as pool:
        for _ in range(5):
            for points, known in zip(pool.map(lambda crop: predict(crop).points, crops), expected, strict=True):
                np.testing.assert_array_equal(points, known)


FORKED = """
import multiprocessing
import numpy as np
from lgcn_fast import Engine, predict

image = np.random.default_rng(0).integers(0, 256, (96, 96), np.uint8)

def job(_):
    Engine("lgcn-nano")
    return predict(image, model="lgcn-finder", ensemble=40).points

before = job(0)
with multiprocessing.get_context("fork").Pool(1) as pool:
    np.testing.assert_array_equal(pool.map(job, [0])[0], before)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no processes are forked here")
def test_forked_processes_do_not_wait_for_threads_that_they_have_not():
    subprocess.run([sys.executable, "-c", FORKED], check=True, timeout=120)


MEMORY = """
import numpy as np
from lgcn_fast import LGCN, LGCNConfig, predict

def peak() -> float:  # (ru_maxrss would be the largest of this process and its parent.)
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM"))

crops = np.random.default_rng(0).integers(0, 256, (8, 96, 96), np.uint8)
model = LGCN(LGCNConfig(filters=128)).eval()
predict(crops, model=model)
assert peak() < 700, f"F = 128: {peak()} MB"
del model
for _ in range(500):
    predict(crops[0])
before = peak()
for _ in range(10_000):
    predict(crops[0])
assert peak() < before + 2, f"{before} MB before 10,000 calls, {peak()} MB behind"
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_is_small_and_does_not_grow():
    subprocess.run([sys.executable, "-c", MEMORY], check=True)


@pytest.mark.parametrize(("bias", "score"), [(300, 1), (-300, 0)])
def test_scores_are_shares_whatever_the_heatmaps_hold(gray, bias, score):
    model = LGCN(LGCNConfig.nano(filters=8, num_landmarks=5))
    torch.nn.init.constant_(model.main.bias, bias)
    np.testing.assert_array_equal(predict(gray, model=model, fit=False).scores, score)


def test_boxes_that_are_thin_are_squares_all_the_same(gray):
    thin, square = predict(gray, [[47.5, 0, 1, 96]], "lgcn-finder"), predict(gray, [[0, 0, 96, 96]], "lgcn-finder")
    np.testing.assert_array_equal(thin.points, square.points)
