import cv2
import numpy as np
import pytest
import torch

from lgcn_fast import ShapeModel
from lgcn_fast.checkpoints import WEIGHTS, load_tensors, save_tensors
from lgcn_fast.landmarks import SCHEMES
from lgcn_fast.shape import similarity_basis


def similar(points, size, angle, shift):
    cos, sin = np.cos(angle), np.sin(angle)
    return size * points @ np.array([[cos, sin], [-sin, cos]]) + shift


@pytest.fixture
def shapes(random):
    """Faces of 10 points with two modes, anywhere, of any size, turned by up to 40 degrees."""
    base, modes = random.normal(size=(10, 2)), random.normal(size=(2, 10, 2)) * 0.1
    return np.stack(
        [
            similar(
                base + np.tensordot(random.normal(size=2) * (1, 0.5), modes, 1),
                random.uniform(10, 100),
                random.uniform(-0.7, 0.7),
                random.uniform(-200, 200, 2),
            )
            for _ in range(300)
        ]
    )


def test_mean_is_upright_whichever_face_comes_first(random):
    """It is that of the shapes and their mirror images: symmetric."""
    base, mirror = ShapeModel.load(WEIGHTS / "shape-68.safetensors").mean, list(SCHEMES[68].mirror)
    faces = [
        similar(base + random.normal(size=base.shape) * 0.05, 50, angle, 0) for angle in random.uniform(-0.5, 0.5, 40)
    ]
    means = [ShapeModel.fit(np.stack([similar(base, 1, turn, 0), *faces])).mean for turn in (0, 1, np.pi)]
    for mean in (base, *means):
        np.testing.assert_allclose(mean, mean[mirror] * (-1, 1), atol=1e-9)
        assert mean[8, 1] > mean[27, 1]


def test_finds_the_modes_and_nothing_else(shapes):
    model = ShapeModel.fit(shapes, modes=6)
    # Two modes make nearly all of the variance; what is left is the curvature of aligning sizes and turns.
    assert model.variances[:2].sum() > 0.98 * model.variances.sum()
    assert np.all(np.diff(model.variances) <= 0)
    assert len(ShapeModel.fit(shapes, modes=0.9).modes) <= 2


def test_modes_are_orthonormal_and_free_of_position_size_and_turn(shapes):
    model = ShapeModel.fit(shapes, modes=6)
    flat = model.modes.reshape(len(model.modes), -1)
    np.testing.assert_allclose(flat @ flat.T, np.eye(len(flat)), atol=1e-10)
    np.testing.assert_allclose(flat @ similarity_basis(model.mean).reshape(4, -1).T, 0, atol=1e-9)
    np.testing.assert_allclose(model.mean.mean(axis=0), 0, atol=1e-12)
    assert (model.mean**2).sum(axis=1).mean() == pytest.approx(1)


def test_does_not_depend_on_where_faces_are(shapes, random):
    moved = np.stack(
        [similar(s, random.uniform(0.1, 9), random.uniform(-0.3, 0.3), random.normal(size=2)) for s in shapes]
    )
    one, two = ShapeModel.fit(shapes, 2), ShapeModel.fit(np.stack(moved), 2)
    np.testing.assert_allclose(one.variances, two.variances, rtol=1e-6)


def test_partly_labelled_shapes_are_left_out(shapes):
    holes = shapes.copy()
    holes[::3, 4] = np.nan
    complete = np.delete(shapes, np.s_[::3], axis=0)
    np.testing.assert_allclose(ShapeModel.fit(holes, 2).variances, ShapeModel.fit(complete, 2).variances)


def test_no_more_modes_than_the_shapes_have(random):
    assert len(ShapeModel.fit(random.normal(size=(4, 3, 2)), 12).modes) <= 2  # 6 coordinates, 4 similarities
    single = ShapeModel.fit(random.normal(size=(5, 1, 2)), 12)
    assert single.modes.shape == (0, 1, 2)
    assert np.isfinite(single.mean).all()


@pytest.mark.parametrize(
    ("shapes", "modes", "message"),
    [
        (np.zeros((3, 4)), 1, r"shapes: expected \(M, N, 2\), got \(3, 4\)"),
        (np.full((3, 4, 2), np.nan), 1, "at least two complete ones, got 0"),
        (np.eye(8).reshape(8, 4, 2), -1, "modes: expected 0 or more, got -1"),
        (np.eye(8).reshape(8, 4, 2), 1.5, r"modes: expected a share .* got 1.5"),
    ],
)
def test_bad_input_is_named(shapes, modes, message):
    with pytest.raises(ValueError, match=message):
        ShapeModel.fit(shapes, modes)


def test_round_trip_and_picture(shapes, tmp_path):
    model = ShapeModel.fit(shapes, 3)
    model.save(tmp_path / "shape.safetensors")
    loaded = ShapeModel.load(tmp_path / "shape.safetensors")
    for name in ("mean", "modes", "variances"):
        np.testing.assert_array_equal(getattr(model, name), getattr(loaded, name))
    model.draw(tmp_path / "modes.png")
    assert cv2.imread(str(tmp_path / "modes.png")).std() > 5


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"modes": None}, "expected mean, modes and variances, got no modes"),
        ({"mean": torch.zeros(10)}, r"expected mean \(N, 2\), modes \(K, N, 2\) and variances \(K,\), got"),
        ({"modes": torch.zeros(2, 9, 2)}, r"expected mean .*, got \(\(10, 2\), \(2, 9, 2\), \(2,\)\)"),
        ({"variances": torch.ones(3)}, "expected mean"),
        ({"variances": torch.zeros(2)}, "expected finite numbers and variances above 0"),
        ({"mean": torch.full((10, 2), torch.nan)}, "expected finite numbers"),
        ({"mean": torch.zeros(10, 2, dtype=torch.bfloat16)}, "expected float64, got"),
    ],
)
def test_damaged_files_are_named(shapes, tmp_path, change, message):
    path = tmp_path / "shape.safetensors"
    ShapeModel.fit(shapes, 2).save(path)
    tensors, metadata = load_tensors(path)
    save_tensors(path, {name: part for name, part in (tensors | change).items() if part is not None}, metadata)
    with pytest.raises(ValueError, match=r"shape\.safetensors: " + message):
        ShapeModel.load(path)


def test_other_files_are_named():
    with pytest.raises(ValueError, match=r"lgcn-nano\.safetensors: expected a shape model"):
        ShapeModel.load(WEIGHTS / "lgcn-nano.safetensors")


def test_shipped_model_is_a_face():
    model = ShapeModel.load(WEIGHTS / "shape-68.safetensors")
    assert model.mean.shape == (68, 2)
    eyes, mouth = model.mean[36:48].mean(axis=0), model.mean[48:].mean(axis=0)
    assert eyes[1] < 0 < mouth[1]
    assert model.mean[36, 0] < model.mean[45, 0]


def test_variances_by_hand(random):
    """Along two modes at right angles, however far; as many as make the share."""
    base = random.normal(size=(10, 2))
    base -= base.mean(axis=0)
    base /= np.sqrt((base**2).sum(axis=1).mean())
    frame = np.column_stack([similarity_basis(base).reshape(4, -1).T, random.normal(size=(20, 2))])
    modes = np.linalg.qr(frame)[0].T[4:].reshape(2, 10, 2)
    steps = np.array([(0.8, 0), (-0.8, 0), (0, 0.4), (0, -0.4)])
    shapes = base + np.tensordot(steps, modes, 1)
    model = ShapeModel.fit(shapes)
    np.testing.assert_allclose(model.mean, base, atol=1e-9)
    np.testing.assert_allclose(model.variances, [0.32, 0.08])
    np.testing.assert_allclose(np.abs((model.modes * modes).sum(axis=(1, 2))), 1)
    assert [len(ShapeModel.fit(shapes, share).modes) for share in (0.1, 0.79, 0.81, 1.0)] == [1, 1, 2, 2]
