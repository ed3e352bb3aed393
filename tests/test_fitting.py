import array_api_strict
import numpy as np
import pytest
import torch

import lgcn_fast_kernels
from lgcn_fast import Engine, ShapeModel, fitting, load_model
from lgcn_fast.checkpoints import WEIGHTS
from lgcn_fast.datasets import read_300w
from lgcn_fast.evaluation import landmark_errors
from lgcn_fast.fitting import Fit, NativeFitter, fit, fit_reference
from lgcn_fast.heatmaps import blurred_ground_truth
from lgcn_fast.images import crop, face_box, square_box, to_crop
from lgcn_fast.peaks import PEAK_RADIUS

HALF_SIGMAS = (0.5, 1.5, 2.5, 3.5, 4.5)


@pytest.fixture(scope="module")
def model() -> ShapeModel:
    return ShapeModel.load(WEIGHTS / "shape-68.safetensors")


def faces(model, random, count=4, size=18.0, side=96, angle=0.5):
    """Shapes that the model can make, (count, N, 2), near the middle of a side x side image."""
    weights = random.normal(size=(count, len(model.modes))) * model.variances**0.5 * 0.7
    points = model.mean + np.tensordot(weights, model.modes, 1)
    angles = random.uniform(-angle, angle, count)
    cos, sin = np.cos(angles), np.sin(angles)
    rotation = np.stack([np.stack([cos, sin], 1), np.stack([-sin, cos], 1)], 1)
    return size * points @ rotation + side / 2 + random.uniform(-4, 4, (count, 1, 2))


def heatmaps_of(points, height=96, width=96) -> np.ndarray:
    return blurred_ground_truth(torch.from_numpy(points[:, None]).float(), height, width).numpy()


def distances(a, b) -> np.ndarray:
    return np.linalg.norm(np.asarray(a) - np.asarray(b), axis=-1)


def native(model, heatmaps, stride=1) -> Fit:
    return NativeFitter(model)(heatmaps, stride)


def small_model(random, count, modes=3) -> ShapeModel:
    return ShapeModel.fit(random.normal(size=(1, count, 2)) + 0.2 * random.normal(size=(50, count, 2)), modes)


def test_finds_shapes_that_the_model_can_make(model, random):
    points = faces(model, random)
    fitted = native(model, heatmaps_of(points))
    assert distances(fitted.shapes, points).mean() < 0.5
    assert distances(fitted.points, points).mean() < 0.3
    assert fitted.certainties.min() > 0.8
    assert fitted.residuals.max() < 0.05


@pytest.mark.parametrize(("height", "width"), [(96, 96), (41, 67)])
def test_moment_form_equals_one_equation_per_pixel(random, height, width):
    """Random heatmaps, in float64: the same least-squares problem, solved in two ways."""
    model = small_model(random, 9)
    heatmaps = random.uniform(-0.2, 1, (3, 9, height, width)) ** 3
    one, two = fit(model, heatmaps), fit_reference(model, heatmaps)
    for name in ("points", "shapes", "coefficients", "certainties", "residuals"):
        np.testing.assert_allclose(getattr(one, name), getattr(two, name), rtol=1e-8, atol=1e-8, err_msg=name)


@pytest.mark.parametrize("stride", [0, -1, float("nan")])
def test_strides_are_positive(model, stride):
    with pytest.raises(ValueError, match="stride: expected a positive number, got"):
        native(model, np.zeros((1, 68, 8, 8), np.float32), stride)


@pytest.mark.parametrize(("height", "width", "stride"), [(96, 96, 1), (48, 48, 2), (41, 67, 1), (13, 7, 3)])
def test_native_fit_is_the_fit(random, height, width, stride):
    model = small_model(random, 9)
    heatmaps = (random.uniform(-0.2, 1, (3, 9, height, width)) ** 3).astype(np.float32)
    one, two = fit(model, heatmaps, stride), native(model, heatmaps, stride)
    for name in ("points", "shapes", "coefficients", "certainties", "residuals"):
        np.testing.assert_allclose(getattr(one, name), getattr(two, name), rtol=1e-4, atol=1e-4, err_msg=name)


@pytest.mark.parametrize("shift", [0, (-35, -20)])
def test_native_fit_of_faces_is_the_fit(model, random, shift):
    """Also of faces that are partly outside."""
    heatmaps = heatmaps_of(faces(model, random) + shift) + random.normal(size=(4, 68, 96, 96)).astype(np.float32) * 0.01
    one, two = fit(model, heatmaps), native(model, heatmaps)
    np.testing.assert_allclose(one.shapes, two.shapes, atol=1e-3)
    np.testing.assert_allclose(one.points, two.points, atol=1e-3)
    np.testing.assert_allclose(one.certainties, two.certainties, atol=1e-5)


def test_the_stride_does_not_matter(model, random):
    """Heatmaps of half the resolution give the same face: the constants are in pixels of the image."""
    points = faces(model, random)
    coarse = blurred_ground_truth(torch.from_numpy((points[:, None] + 0.5) / 2 - 0.5).float(), 48, 48, 23, HALF_SIGMAS)
    one, two = fit(model, heatmaps_of(points)), fit(model, coarse.numpy(), 2)
    assert distances(2 * two.shapes + 0.5, one.shapes).mean() < 0.4


@pytest.mark.parametrize("namespace", ["array_api_strict", "torch"])
def test_other_array_namespaces_give_the_same_fit(random, namespace):
    model = small_model(random, 7)
    heatmaps = random.uniform(-0.2, 1, (2, 7, 30, 33)) ** 3
    expected = fit(model, heatmaps)
    arrays = array_api_strict.asarray(heatmaps) if namespace == "array_api_strict" else torch.from_numpy(heatmaps)
    found = fit(model, arrays)
    assert type(found.points) is type(arrays)
    for name in ("points", "shapes", "coefficients", "certainties", "residuals"):
        values = np.from_dlpack(getattr(found, name))
        np.testing.assert_allclose(values, getattr(expected, name), rtol=1e-9, atol=1e-9, err_msg=name)


def test_a_face_does_not_depend_on_its_batch(model, random):
    heatmaps = heatmaps_of(faces(model, random, 5))
    together = native(model, heatmaps)
    for index in range(5):
        alone = native(model, heatmaps[index : index + 1])
        np.testing.assert_allclose(alone.points[0], together.points[index], atol=1e-9)


def test_upside_down_faces(model, random):
    points = 95 - faces(model, random)
    assert distances(native(model, heatmaps_of(points)).points, points).mean() < 0.3


def test_erased_heatmaps_are_reconstructed(model, random):
    points = faces(model, random, 8)
    heatmaps = heatmaps_of(points)
    gone = random.random((8, 68)) < 0.2
    heatmaps[gone] = 0
    fitted = native(model, heatmaps)
    assert np.median(distances(fitted.points, points)[gone]) < 1.5
    assert fitted.certainties[gone].max() == 0


def weak_peaks(model, random) -> tuple[np.ndarray, np.ndarray]:
    """Heatmaps of faces, of which every other has one pixel only, too weak to move the shape, 3 or 8 pixels from it;
    and which of them are near (B, 34)."""
    heatmaps = heatmaps_of(faces(model, random))
    heatmaps[:, ::2] = 0
    pixels = np.round(fit(model, heatmaps).shapes).astype(int)
    near = random.random(heatmaps.shape[:2]) < 0.5
    for face in range(len(heatmaps)):
        for landmark in range(0, 68, 2):
            x, y = pixels[face, landmark]
            inwards = 1 if x < 48 else -1  # (a wide face may end less than 8 pixels from the border)
            heatmaps[face, landmark, y, x + inwards * (3 if near[face, landmark] else 8)] = 0.02
    return heatmaps, near[:, ::2]


@pytest.mark.parametrize("method", [fit, native])
def test_a_peak_far_from_the_shape_does_not_count(model, method, random):
    heatmaps, near = weak_peaks(model, random)
    fitted = method(model, heatmaps)
    np.testing.assert_allclose(fitted.certainties[:, ::2], np.where(near, 0.02, 0), atol=1e-6)
    np.testing.assert_array_equal(fitted.points[:, ::2][~near], fitted.shapes[:, ::2][~near])


def test_false_peaks_are_filtered(model, random):
    points = faces(model, random, 8)
    wrong = random.random((8, 68)) < 0.2
    moved = np.where(wrong[..., None], random.uniform(5, 90, points.shape), points)
    fitted = native(model, heatmaps_of(moved))
    assert np.median(distances(fitted.points, points)[wrong]) < 2


HARD = {
    "empty": lambda r: np.zeros((2, 68, 96, 96)),
    "constant": lambda r: np.full((2, 68, 96, 96), 0.7),
    "negative": lambda r: -r.random((2, 68, 96, 96)),
    "random": lambda r: r.normal(size=(2, 68, 96, 96)),
    "one pixel in all": lambda r: np.eye(96)[None, None, :, 5:6] * np.ones((2, 68, 1, 1)) * np.eye(96)[5],
    "one point visible": lambda r: np.pad(np.ones((1, 1, 3, 3)), ((0, 1), (4, 63), (50, 43), (30, 63))),
    "enormous": lambda r: r.random((2, 68, 96, 96)) * 1e10,
    "1 x 1": lambda r: r.random((2, 68, 1, 1)),
    "500 x 3": lambda r: r.random((2, 68, 500, 3)),
    "no face": lambda r: np.zeros((0, 68, 96, 96)),
}


@pytest.mark.parametrize("method", [fit, native])
@pytest.mark.parametrize("kind", HARD)
def test_hard_heatmaps_give_finite_points(model, kind, method, random):
    heatmaps = HARD[kind](random).astype(np.float32)
    fitted = method(model, heatmaps)
    assert fitted.points.shape == (len(heatmaps), 68, 2)
    for name in ("points", "shapes", "coefficients", "certainties"):
        assert np.isfinite(getattr(fitted, name)).all(), name
    assert not np.isnan(fitted.residuals).any()


def test_without_evidence_the_mean_face_stands_in_the_middle(model):
    fitted = native(model, np.zeros((1, 68, 96, 96), np.float32))
    np.testing.assert_allclose(fitted.shapes[0].mean(axis=0), 47.5, atol=1e-6)
    np.testing.assert_allclose(fitted.coefficients, 0, atol=1e-9)
    assert np.isinf(fitted.residuals[0])


@pytest.mark.parametrize("count", [1, 2, 300])
def test_any_number_of_landmarks(count, random):
    model = small_model(random, count)
    fitted = native(model, random.random((2, count, 20, 20)).astype(np.float32))
    assert fitted.points.shape == (2, count, 2)
    assert np.isfinite(fitted.points).all()


@pytest.mark.parametrize("shape", [(1, 67, 96, 96), (68, 96, 96), (1, 68, 0, 5)])
def test_wrong_shapes_are_named(model, shape):
    with pytest.raises(ValueError, match=r"heatmaps: expected \(B, 68, H, W\)"):
        fit(model, np.zeros(shape, np.float32))
    with pytest.raises(ValueError, match=r"heatmaps: expected \(B, 68, H, W\)"):
        native(model, np.zeros(shape, np.float32))


def test_native_fitter_says_what_came(model):
    constants = fitting.fitter_constants(model)
    constants["variances"] = constants["variances"][:-1]
    shapes = r"got \(24, 68, 2\), \(19,\) and 2 radii"
    with pytest.raises(ValueError, match=rf"basis: expected \(4 \+ K, N, 2\), with variances \(K,\) .*, {shapes}"):
        lgcn_fast_kernels.Fitter(**constants)


def test_rounds_are_those_of_the_paper():
    assert fitting.RADII == (None, 20, 7)


@pytest.mark.gpu
def test_cupy_gives_the_same_fit_on_torchs_stream(model, random):
    import cupy

    heatmaps = heatmaps_of(faces(model, random)) + random.normal(size=(4, 68, 96, 96)).astype(np.float32) * 0.01
    expected = fit(model, heatmaps)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream), cupy.cuda.Stream.from_external(stream):
        fitted = fit(model, cupy.from_dlpack(torch.from_numpy(heatmaps).cuda()))
        points = torch.from_dlpack(fitted.points).cpu()
    np.testing.assert_allclose(points.numpy(), expected.points, atol=1e-3)


@pytest.fixture(scope="module")
def real(data):
    """Heatmaps of the shipped model and labels of the LFPW test set, in pixels of the heatmaps."""
    engine = Engine(load_model("lgcn-nano"), precision="fp32")
    members = read_300w(data / "300w" / "lfpw" / "testset")
    boxes = [square_box(face_box(face.points)) for face in members]
    crops = np.stack([crop(face.image(), box, 96) for face, box in zip(members, boxes, strict=True)])
    maps = [engine.heatmaps(part) for part in torch.from_numpy(crops)[:, None].split(8)]
    labels = np.stack([to_crop(face.points, box, 48) for face, box in zip(members, boxes, strict=True)])
    return torch.cat(maps).numpy(), labels


@pytest.mark.data
@pytest.mark.slow
def test_fit_helps_on_real_faces(model, real):
    heatmaps, labels = real
    with_fit = landmark_errors(native(model, heatmaps, 2).points, labels)
    without = landmark_errors(lgcn_fast_kernels.peak_centroids(heatmaps, PEAK_RADIUS / 2)[0], labels)
    assert np.median(with_fit) <= np.median(without)
    assert with_fit.mean() < without.mean()
    assert (with_fit > 0.1).sum() <= (without > 0.1).sum()


@pytest.mark.data
@pytest.mark.slow
@pytest.mark.parametrize("damage", ["erased", "false peak"])
def test_fit_recovers_damaged_points_of_real_faces(model, real, damage):
    heatmaps, labels = real
    random = np.random.default_rng(0)
    hit = random.random(labels.shape[:2]) < 0.2
    damaged = heatmaps.copy()
    damaged[hit] = 0
    if damage == "false peak":
        wrong = torch.from_numpy(random.uniform(2, 45, (len(labels), 1, 68, 2))).float()
        damaged[hit] = blurred_ground_truth(wrong, 48, 48, 23, HALF_SIGMAS).numpy()[hit]
    points = native(model, damaged, 2).points
    inter_ocular = np.linalg.norm(labels[:, 36] - labels[:, 45], axis=1)[:, None]
    recovered = (distances(points, labels) / inter_ocular)[hit] < 0.1
    assert recovered.mean() >= 0.8
