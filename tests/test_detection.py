import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import torch
from networks import randomised

import lgcn_fast
import lgcn_fast_kernels
from lgcn_fast import Engine, LGCNConfig, ShapeModel, detect, detection, load_model, peaks, predict
from lgcn_fast.cli import main
from lgcn_fast.detection import OVERLAP, Faces, combined_heatmap, distinct, fitted_faces
from lgcn_fast.images import face_box, read_image, write_image
from lgcn_fast.loading import engine_for, shape_for
from lgcn_fast.model import LGCN
from lgcn_fast.multiface import LabelledPhoto, read_photos, score_photo, score_photos, summary

FACE = (82, 70, 124, 124)


@pytest.fixture(scope="module")
def face():
    """The face of demo.jpg with what is around it, (300, 300, 3)."""
    return read_image(Path(lgcn_fast.__file__).with_name("demo.jpg"), color=True)


@pytest.fixture(scope="module")
def points(face):
    return predict(face, [FACE]).points[0]


def resized(face, scale):
    return cv2.resize(face, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA)


def distance(a, b) -> float:
    """Mean distance of two faces' points, as a share of the second one's box."""
    return float(np.linalg.norm(a - b, axis=-1).mean() / face_box(b)[2])


def test_finds_the_face_of_the_demo(face, points):
    faces = detect(face)
    assert len(faces) == 1
    assert faces.points.shape == (1, 68, 2)
    assert faces.scores.shape == (1, 68)
    for part in vars(faces).values():
        assert part.dtype == np.float32
    assert distance(faces.points[0], points) < 0.01
    assert 0.5 <= faces.confidence[0] <= 1
    np.testing.assert_allclose(faces.boxes[0], face_box(points), atol=3)


@pytest.mark.parametrize("scale", [0.4, 0.7, 1.6, 3.0, 6.0])
def test_finds_faces_of_any_size(face, points, scale):
    faces = detect(resized(face, scale))
    assert len(faces) == 1
    assert distance(faces.points[0], (points + 0.5) * scale - 0.5) < 0.02


@pytest.mark.parametrize("angle", [-30, 40, 45])
def test_turned_faces_are_read_upright(face, points, angle):
    """Off by 0.5 % of the box; read from squares that are not turned, by 0.5, 1.0 and 1.2 %."""
    matrix = cv2.getRotationMatrix2D((144, 132), -angle, 1)
    faces = detect(cv2.warpAffine(face, matrix, face.shape[1::-1], borderMode=cv2.BORDER_REPLICATE))
    assert len(faces) == 1
    assert distance(faces.points[0], points @ matrix[:, :2].T + matrix[:, 2]) < 0.008


@pytest.mark.parametrize(("gain", "offset"), [(0.1, 0), (0.2, 200)])
def test_faces_in_the_dark_and_in_haze(face, points, gain, offset):
    faces = detect(np.rint(face * np.float64(gain) + offset).astype(np.uint8))
    assert len(faces) == 1
    assert distance(faces.points[0], points) < 0.01


def test_more_faces_than_go_through_the_network_at_once(face, points):
    boxes = np.repeat(face_box(points)[None], 70, axis=0) + np.linspace(-6, 6, 70)[:, None] * (1, 1, 0, 0)
    angles = np.linspace(-0.3, 0.3, 70)
    engine, shape = engine_for("lgcn-finder", "cpu", "auto"), shape_for(None, 68)
    faces = fitted_faces(face, boxes, angles, engine, shape)
    assert len(faces) == 70
    for index in (0, 64, 69):
        alone = fitted_faces(face, boxes[index : index + 1], angles[index : index + 1], engine, shape)
        np.testing.assert_allclose(faces.points[index], alone.points[0], atol=1e-3)


def test_a_shape_model_of_other_landmarks_is_named(face):
    shape = ShapeModel(np.zeros((15, 2)), np.zeros((1, 15, 2)), np.ones(1))
    with pytest.raises(ValueError, match="shape: expected a shape model of 68 landmarks, got one of 15"):
        detect(face, shape=shape)


@pytest.mark.parametrize(
    ("dark", "light", "lamp"), [(0, 0.8, 0), (255, 0.6, 0), (10, 0.1, 300)], ids=["dark room", "white paper", "lamp"]
)
def test_light_elsewhere_in_the_photo_does_not_count(face, points, dark, light, lamp):
    """With one gain for all of the photo none of these faces is found."""
    photo = np.full((1000, 1000, 3), dark, np.uint8)
    photo[:lamp, :lamp] = 255
    part = cv2.resize(face[50:214, 62:226], (80, 80), interpolation=cv2.INTER_AREA)
    photo[500:580, 300:380] = np.rint(part * light)
    faces = detect(photo)
    assert len(faces) == 1
    expected = (points - (62, 50) + 0.5) * (80 / 164) - 0.5 + (300, 500)
    assert distance(faces.points[0], expected) < 0.025


@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
@pytest.mark.parametrize("color", [True, False])
def test_light_of_a_level_is_that_of_a_face_around_each_pixel(random, color, dtype):
    """Against float64: mean and deviation of 5 x 5 squares of 4 x 4 pixels, interpolated between the squares."""
    level = random.normal(20, 3, (60, 72, 3) if color else (60, 72)).clip(0, 255).astype(dtype)
    level[:, 40:] *= 4
    gray = (cv2.cvtColor(level, cv2.COLOR_RGB2GRAY) if color else level).astype(float)
    means = []
    for values in (gray, gray**2):
        squares = values.reshape(15, 4, 18, 4).mean((1, 3))
        near = np.lib.stride_tricks.sliding_window_view(np.pad(squares, 2, mode="symmetric"), (5, 5))
        means.append(near.mean((2, 3)))
    gain = np.clip(25 / np.sqrt(means[1] - means[0] ** 2), 1, 12)
    light = [gain, np.clip(means[0], 60, 170) - gain * means[0]]
    for axis, count in enumerate((60, 72)):
        places = np.arange(count), np.arange(1.5, count, 4)
        light = [np.apply_along_axis(lambda line, p=places: np.interp(*p, line), axis, part) for part in light]
    gain, offset = (part[..., None] if color else part for part in light)
    found = detection._lit(level, 21)
    assert found.dtype == dtype
    np.testing.assert_allclose(found, (level * gain + offset).clip(0, 255), atol=0.51 if dtype == np.uint8 else 0.1)


@pytest.mark.parametrize("stride", [2, 4])
def test_hypotheses_stand_where_the_votes_are(stride, monkeypatch):
    """Votes for a spot of light: they lie on a grid, so each is a bit beside it, but together not to one side."""

    def votes(tiles, offsets, voters, every):
        heatmaps = (torch.nn.functional.avg_pool2d(tiles.float(), stride).numpy() / 255 - 0.5).clip(0)
        return np.ascontiguousarray(np.repeat(heatmaps[:, :, ::every, ::every], len(detection.SIZES), axis=1))

    monkeypatch.setattr(detection, "_lit", lambda level, side: level)  # a spot with more contrast has no summit
    engine = SimpleNamespace(config=LGCNConfig.finder(stride=stride), votes=votes, num_threads=1)
    beside = []
    for spot in zip(np.linspace(80, 90, 24), np.linspace(70, 90, 24), strict=True):
        x, y = (np.exp(-((np.arange(length) - at) ** 2) / 50) for length, at in zip((170, 160), spot, strict=True))
        photo = np.rint(80 + 170 * y[:, None] * x).astype(np.uint8)
        boxes = detection.find_hypotheses(photo, engine, shape_for(None, 68), 40)
        finest = boxes[boxes[:, 2].argmin()]
        beside.append(finest[:2] + (finest[2:] - 1) / 2 - spot)
    assert np.abs(np.mean(beside, axis=0)).max() < 0.2 * stride


@pytest.mark.parametrize("size", [(33, 71), (60, 70)])
@pytest.mark.parametrize("color", [True, False])
def test_light_of_levels_of_any_size(random, size, color):
    usual = random.normal(120, 50, size).clip(0, 255).astype(np.uint8)
    usual = np.dstack([usual] * 3) if color else usual
    np.testing.assert_array_equal(detection._lit(usual, 41), usual)
    dark = detection._lit((usual * 0.2).astype(np.float32), 96)
    np.testing.assert_allclose((dark.mean(), dark.std()), (60, 25), atol=3)


@pytest.mark.parametrize("angle", [60, 90, 135, 180, 240, 270])
def test_faces_at_any_angle(face, points, angle):
    """In a photo that is no square: 500 x 340, the face somewhere right."""
    matrix = cv2.getRotationMatrix2D((144, 132), -angle, 1)
    matrix[:, 2] += 200, 60
    photo = cv2.warpAffine(face, matrix, (500, 340), borderValue=(90, 90, 90))
    expected = points @ matrix[:, :2].T + matrix[:, 2]
    assert angle == 60 or len(detect(photo)) == 0
    faces = detect(photo, any_angle=True)
    assert len(faces) == 1
    assert distance(faces.points[0], expected) < 0.01
    np.testing.assert_allclose(faces.boxes[0], face_box(expected), atol=3)
    assert len(detect(photo, any_angle=True, known=faces.boxes)) == 0


def test_several_faces_of_different_size(face, points):
    photo = np.full((500, 900, 3), 90, np.uint8)
    places = {(10, 20): 0.5, (200, 10): 0.9, (480, 60): 1.4, (30, 250): 0.8}
    for (x, y), scale in places.items():
        part = resized(face, scale)
        photo[y : y + len(part), x : x + len(part)] = part
    faces = detect(photo)
    assert len(faces) == len(places)
    assert (np.diff(faces.confidence) <= 0).all()
    for (x, y), scale in places.items():
        expected = (points + 0.5) * scale - 0.5 + (x, y)
        assert min(distance(found, expected) for found in faces.points) < 0.02, (x, y)


def test_all_forms_of_a_photo_give_the_same_faces(face):
    gray = cv2.cvtColor(face, cv2.COLOR_RGB2GRAY)
    expected = detect(face).points
    forms = {"gray": gray, "float": face / 255, "channels first": face.transpose(2, 0, 1)[None]}
    for name, form in forms.items():
        # (A pixel of the crop: levels that are rounded move a flat maximum.)
        np.testing.assert_allclose(detect(form).points, expected, atol=1.3, err_msg=name)


def test_faces_at_the_border(face, points):
    """Cut by the left border through the outer end of a brow; filling the frame."""
    left = int(points[:, 0].min()) + 6
    cut = detect(face[:, left:])
    assert len(cut) == 1
    assert distance(cut.points[0] + (left, 0), points) < 0.05
    x, y, width, height = FACE
    assert len(detect(face[y : y + height, x : x + width])) == 1


@pytest.mark.parametrize("shape", [(1, 1), (1, 300), (10, 5000), (300, 40), (97, 95)])
@pytest.mark.parametrize("kind", ["black", "noise"])
def test_odd_photos_have_no_faces(shape, kind, random):
    photo = np.zeros(shape, np.uint8) if kind == "black" else random.integers(0, 256, shape, np.uint8)
    faces = detect(photo)
    assert faces.points.shape == (0, 68, 2)
    assert len(faces) == len(faces.boxes) == 0


@pytest.mark.parametrize("finder", ["lgcn-nano", "lgcn-nano-128"])
def test_other_models_can_look_for_faces(face, points, finder):
    """Their heatmaps have a pixel for two of the image's, those of lgcn-finder for four."""
    faces = detect(face, finder=finder)
    assert len(faces) == 1
    assert distance(faces.points[0], points) < 0.01


def test_tiles_find_the_same_faces(face, monkeypatch):
    photo = np.tile(resized(face, 0.8), (2, 3, 1))
    whole = detect(photo)
    heatmap = combined_heatmap(photo)
    monkeypatch.setattr(detection, "WHOLE", 0)
    monkeypatch.setattr(detection, "TILE", 256)
    monkeypatch.setattr(detection, "TILES", 3)
    parts = detect(photo)
    # What a tile does not see makes a difference, but only near where its part ends (one pixel aside: 0.0026).
    assert np.median(np.abs(combined_heatmap(photo) - heatmap)) < 0.001
    assert len(whole) == len(parts) == 6
    for found in parts.points:
        assert min(distance(found, known) for known in whole.points) < 0.01


def test_small_faces_are_looked_for_only_where_asked(face):
    photo = resized(face, 0.25)
    assert len(detect(photo, min_face=100)) == 0
    assert len(detect(photo, min_face=24)) == 1


def test_known_faces_are_not_looked_at(face, points, monkeypatch):
    photo = np.concatenate([face, face], axis=1)
    read = []
    fit = Engine.fit

    def counted(engine, crops, *arguments):
        read.extend([engine.config.filters] * len(crops))
        return fit(engine, crops, *arguments)

    monkeypatch.setattr(Engine, "fit", counted)
    assert len(detect(face, model="lgcn-nano", known=[face_box(points)])) == 0
    assert set(read) == {32}  # the finder has 32 filters, lgcn-nano 64
    (left,) = detect(photo, model="lgcn-nano", known=[face_box(points + np.array([300, 0]))]).points
    assert distance(left, points) < 0.05
    assert len(detect(face, model="lgcn-nano", known=[])) == 1
    with pytest.raises(ValueError, match=r"known: expected boxes \(K, 4\), got shape \(4,\)"):
        detect(photo, known=face_box(points))
    with pytest.raises(
        ValueError, match=r"known\[1\]: expected x, y and a width and height above 0, got \[1.0, 2.0, nan"
    ):
        detect(photo, known=[[1, 2, 3, 3], [1, 2, np.nan, 3]])


def test_confidence_is_a_threshold(face):
    (confidence,) = detect(face).confidence
    assert len(detect(face, min_confidence=confidence + 0.01)) == 0


def test_bad_input_is_named(face):
    with pytest.raises(ValueError, match=r"image: expected one image .*, got 2"):
        detect(np.stack([face, face]))
    with pytest.raises(ValueError, match="min_face: expected a positive number of pixels, got 0"):
        detect(face, min_face=0)
    with pytest.raises(ValueError, match=r"min_confidence: expected a share in \[0, 1\], got nan"):
        detect(face, min_confidence=np.nan)
    with pytest.raises(ValueError, match="image: expected uint8 or floating point, got int64"):
        detect(face.astype(np.int64))
    other = LGCN(LGCNConfig.nano(filters=8, num_landmarks=5))
    for function in (detect, combined_heatmap):
        with pytest.raises(ValueError, match="finder: expected a model of 68 landmarks, got one of 5"):
            function(face, finder=other)
    with pytest.raises(ValueError, match=r"finder: expected one of .*, or a safetensors file, got 'none'"):
        detect(face, finder="none")


def test_shape_models_without_modes_judge_by_certainty_and_residual(face):
    shape = shape_for(None, 68)
    rigid = replace(shape, modes=shape.modes[:0], variances=shape.variances[:0])
    (confidence,) = detect(face, min_confidence=0.4, shape=rigid).confidence
    assert 0.4 < confidence < 1
    assert len(detect(face, min_confidence=1, shape=rigid)) == 0


def test_heatmap_is_high_on_the_face_and_has_the_photos_size(face, points):
    heatmap = combined_heatmap(face[:287, :293])
    assert heatmap.shape == (287, 293)
    x, y = np.rint(points[17:]).astype(int).T
    assert heatmap[y, x].mean() > 2 * heatmap.mean()


@pytest.mark.parametrize("side", [289, 293, 300])
def test_heatmap_of_the_eyes_lies_on_the_eyes(face, points, side, monkeypatch):
    """In the middle of them, at whatever side: the heatmaps of the last pixels reach beyond the photo."""
    eyes = list(range(36, 48))
    heatmaps = Engine.heatmaps
    monkeypatch.setattr(Engine, "heatmaps", lambda engine, images: heatmaps(engine, images)[:, eyes])
    heatmap = combined_heatmap(np.ascontiguousarray(face[:, 300 - side :]), min_face=90) ** 4
    middle = (
        np.array([(heatmap.sum(0) * np.arange(side)).sum(), (heatmap.sum(1) * np.arange(300)).sum()]) / heatmap.sum()
    )
    expected = points[eyes].mean(0) - (300 - side, 0)
    np.testing.assert_allclose(middle, expected, atol=3)


@pytest.mark.parametrize("min_face", [14.4, 20, 28, 40, 100])
def test_levels_are_as_sharp_as_the_photo(face, min_face):
    """Those of an enlarged photo, too: they are not made from the enlargement."""
    engine = engine_for("lgcn-finder", "cpu", "fp32")
    photo = cv2.cvtColor(face, cv2.COLOR_RGB2GRAY)
    for scale, level in detection._levels(photo, engine, min_face):
        level = level[0, detection.BORDER : -detection.BORDER, detection.BORDER : -detection.BORDER]
        kind = cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR
        expected = cv2.resize(photo, level.shape[::-1], interpolation=kind)
        sharpness = [cv2.Laplacian(image, cv2.CV_32F).var() for image in (level, expected)]
        assert sharpness[0] > (0.9 if len(level) >= 48 else 0.7) * sharpness[1]


@pytest.mark.parametrize("step", [1, 2, 3])
def test_native_votes_equal_the_reference(random, step):
    for _ in range(5):
        height, width = random.integers(1, 60, 2)
        heatmaps = random.normal(size=(2, 5, height, width)).astype(np.float32)
        for value in (np.nan, np.inf, -np.inf):
            heatmaps[random.random(heatmaps.shape) < 0.05] = value
        offsets = random.integers(-30, 30, (3, 5, 2))
        expected = peaks.face_votes(heatmaps, offsets, [0, 2, 3], step)
        for threads in (1, 3):
            found = lgcn_fast_kernels.face_votes(heatmaps, offsets, [0, 2, 3], step, threads)
            np.testing.assert_allclose(found, expected, atol=1e-6, strict=True)


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("loss", ["squared_error", "cross_entropy"])
def test_votes_of_an_engine_are_those_of_its_heatmaps(random, threads, loss):
    import torch

    model = load_model("lgcn-nano")
    if loss == "cross_entropy":
        model = randomised(replace(model.config, loss=loss))
    engine = Engine(model, "cpu", num_threads=threads)
    images = torch.from_numpy(random.integers(0, 256, (2, 1, 70, 61), np.uint8))
    offsets = random.integers(-9, 9, (2, 68, 2))
    expected = peaks.face_votes(engine.heatmaps(images).numpy(), offsets, range(17, 68), 2)
    np.testing.assert_allclose(engine.votes(images, offsets, list(range(17, 68)), 2), expected, atol=1e-5)


def test_long_levels_go_in_tiles(monkeypatch, random):
    widths, votes = [], Engine.votes

    def voted(engine, tiles, *rest):
        widths.append(tiles.shape[-1])
        return votes(engine, tiles, *rest)

    monkeypatch.setattr(Engine, "votes", voted)
    detect(random.integers(0, 256, (40, 6000), np.uint8))
    assert max(widths) <= detection.LONGEST


def test_labels_of_another_scheme_are_named(tmp_path):
    photo = LabelledPhoto(tmp_path / "a.jpg", np.zeros((1, 68, 2)))
    nobody = Faces(np.empty((0, 5, 2)), np.empty((0, 5)), np.empty(0), np.empty((0, 4)))
    with pytest.raises(ValueError, match=r"a.jpg: expected labels of the model's 5 landmarks, got 68"):
        score_photo(photo, nobody, 40)


def test_wrong_ballots_are_named():
    heatmaps = np.zeros((1, 2, 4, 4), np.float32)
    with pytest.raises(ValueError, match=r"offsets: expected \(S, 2, 2\), got \(1, 3, 2\)"):
        lgcn_fast_kernels.face_votes(heatmaps, np.zeros((1, 3, 2), int), [0])
    with pytest.raises(ValueError, match="voters: expected landmarks from 0 to 1, got 2"):
        lgcn_fast_kernels.face_votes(heatmaps, np.zeros((1, 2, 2), int), [2])
    with pytest.raises(ValueError, match="step: expected at least 1, got 0"):
        lgcn_fast_kernels.face_votes(heatmaps, np.zeros((1, 2, 2), int), [0], step=0)
    with pytest.raises(ValueError, match=r"offsets: expected numbers of pixels, got one beyond 2\^31"):
        lgcn_fast_kernels.face_votes(heatmaps, np.full((1, 2, 2), -(2**63)), [0])
    for dtype in (np.uint64, np.float64):
        with pytest.raises(ValueError, match=f"offsets: expected whole pixels, got {np.dtype(dtype)}"):
            lgcn_fast_kernels.face_votes(heatmaps, np.zeros((1, 2, 2), dtype), [0])


def test_faces_that_are_distinct(random):
    """As by comparing all pairs, one by one."""
    boxes = (200 * random.random((60, 4)) + (0, 0, 30, 30)).astype(np.float32)
    confidence = random.random(60).astype(np.float32)

    def in_common(a, b):
        width, height = (min(a[i] + a[i + 2], b[i] + b[i + 2]) - max(a[i], b[i]) for i in (0, 1))
        common = max(width, 0) * max(height, 0)
        return common / (a[2] * a[3] + b[2] * b[3] - common)

    for known in ([], list(boxes[:5])):
        expected = []
        for index in np.argsort(-confidence):
            others = [*known, *(boxes[other] for other in expected)]
            if confidence[index] >= 0.2 and all(in_common(boxes[index], other) <= OVERLAP for other in others):
                expected.append(index)
        assert 5 < len(expected) < 40
        assert distinct(boxes, confidence, 0.2, known) == expected


def test_photos_are_scored(face, points):
    """A face that is found, one that is labelled where none is, one that is not labelled, one that is too small."""
    photo = np.concatenate([face, face], axis=1)
    labels = np.stack([points, points + np.array([150, 100]), points / 10])
    score = score_photo(LabelledPhoto(None, labels), detect(photo), 40)
    assert score.counted.tolist() == [True, True, False]
    assert score.errors[0] < 0.05
    assert score.errors[1] > 0.1
    assert len(score.extra) == 1
    values = summary([score])
    assert (values["faces"], values["found"], values["recall"], values["unlabelled"]) == (2, 1, 50, 1)
    assert summary([])["faces"] == 0


def test_commands(face, points, tmp_path, capsys):
    write_image(tmp_path / "two.png", np.concatenate([face, face], axis=1))
    labels = [points.tolist(), (points + np.array([300, 0])).tolist()]
    (tmp_path / "faces.json").write_text(json.dumps([{"image": "two.png", "faces": labels}]))
    missing = tmp_path / "none.jpg"
    out = tmp_path / "out"
    assert main(["detect", str(tmp_path / "two.png"), str(missing), "--out", str(out), "--heatmap"]) == 2
    assert f"{missing}: expected a picture file" in capsys.readouterr().err
    found = json.loads((out / "faces.json").read_text())[str(tmp_path / "two.png")]
    assert [len(face["points"]) for face in found["faces"]] == [68, 68]
    assert read_image(out / found["picture"], color=True).shape == (300, 600, 3)
    assert read_image(out / "two_heatmap.png", color=True).shape == (300, 600, 3)
    write_image(tmp_path / "lying.png", np.rot90(face))
    for options, count in (([], 0), (["--any-angle"], 1)):
        assert main(["detect", str(tmp_path / "lying.png"), "--out", str(out), *options]) == 0
        (found,) = json.loads((out / "faces.json").read_text()).values()
        assert len(found["faces"]) == count
    write_image(tmp_path / "two_faces.png", face)  # named like the other's drawing
    entries = [{"image": "two.png", "faces": labels}, {"image": "two_faces.png", "faces": labels[:1]}]
    (tmp_path / "faces.json").write_text(json.dumps(entries))
    assert main(["evaluate", "--multiface", str(tmp_path), "--finder", "lgcn-nano", "--out", str(tmp_path)]) == 0
    np.testing.assert_array_equal(read_image(tmp_path / "two_faces.png", color=True), face)
    assert main(["evaluate", "--multiface", str(tmp_path), "--finder", "lgcn-nano", "--out", str(out)]) == 0
    assert json.loads((out / "multiface.json").read_text())["recall"] == 100
    (tmp_path / "sub").mkdir()
    (tmp_path / "two.png").rename(tmp_path / "sub" / "zwölf.png")
    empty = json.dumps([{"image": "sub/zwölf.png", "faces": []}], ensure_ascii=False)
    (tmp_path / "faces.json").write_bytes(b"\xef\xbb\xbf" + empty.encode())  # as some editors write UTF-8
    assert main(["evaluate", "--multiface", str(tmp_path), "--out", str(out)]) == 0
    assert json.loads((out / "multiface.json").read_text())["unlabelled"] == 2
    before = (tmp_path / "faces.json").read_bytes()
    assert (
        main(["detect", str(tmp_path / "two_faces.png"), "--out", str(tmp_path)]) == 2
    )  # where it writes a faces.json, too
    assert "--out: expected a folder without labels" in capsys.readouterr().err
    assert (tmp_path / "faces.json").read_bytes() == before
    for option, value in (("--ensemble", "2"), ("--normalisation", "face-size")):
        assert main(["evaluate", "--multiface", str(tmp_path), option, value, "--out", str(out)]) == 2
        assert f"{option}: expected without --multiface" in capsys.readouterr().err
    assert main(["evaluate", str(tmp_path), "--any-angle", "--out", str(out)]) == 2
    assert "--any-angle: expected with --multiface" in capsys.readouterr().err
    (tmp_path / "sub" / "zwölf.png").rename(tmp_path / "two.png")
    labels[0][7] = [None, 3.0]
    (tmp_path / "faces.json").write_text(json.dumps([{"image": "two.png", "faces": labels}]))
    assert main(["evaluate", "--multiface", str(tmp_path), "--out", str(out)]) == 2
    assert "faces.json: expected all landmarks of each face in two.png" in capsys.readouterr().err
    (tmp_path / "faces.json").write_text(json.dumps([{"image": "two.png", "faces": points.tolist()}]))
    assert main(["evaluate", "--multiface", str(tmp_path), "--out", str(out)]) == 2
    assert "faces.json: expected faces (F, N, 2) in two.png, got (68, 2)" in capsys.readouterr().err
    (tmp_path / "faces.json").write_text("{}[")
    assert main(["evaluate", "--multiface", str(tmp_path), "--out", str(out)]) == 2
    assert "faces.json: expected a list" in capsys.readouterr().err


@pytest.mark.data
@pytest.mark.slow
def test_faces_of_real_photos(data):
    values = summary(score_photos(read_photos(data / "multiface"), detect, 40))
    assert values["faces"] == 87
    assert values["recall"] >= 95
    # All of them looked at: nine faces that nobody labelled, and one shelf with toy animals.
    assert values["unlabelled"] <= 10


@pytest.mark.data
@pytest.mark.slow
def test_no_faces_where_there_are_none(data):
    paths = sorted((data / "background" / "test").glob("*"))
    assert len(paths) == 150
    assert sum(len(detect(read_image(path))) for path in paths) <= 3


MEMORY = """
import sys
import cv2
from lgcn_fast import detect
from lgcn_fast.images import read_image

photo = cv2.resize(read_image(sys.argv[1], color=True), (6000, 4000), interpolation=cv2.INTER_CUBIC)
assert detect(photo).boxes[0, 2] > 2000  # the most certain one
lines = open("/proc/self/status").read().splitlines()
peak = next(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM"))
assert peak < 2000, f"{peak} MB"
print(peak)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_is_bounded(demo_picture):
    """24 megapixels, its border's faces down to 40 pixels looked for."""
    subprocess.run([sys.executable, "-c", MEMORY, demo_picture], check=True)


def test_hypotheses_near_each_other_are_one():
    """The one with most votes; another size is another face."""
    found = np.array([[0.5, 100, 100, 80], [0.9, 110, 100, 80], [0.6, 110, 100, 300], [0.7, 400, 100, 80]])
    np.testing.assert_array_equal(detection._apart(found), found[[1, 3, 2]])


def test_confidence_by_hand():
    """Of the inner landmarks, lowered by what the shape model finds unlikely, and by the residual."""
    certainties = np.r_[np.zeros(17), np.full(51, 0.8)][None].repeat(3, axis=0)
    coefficients = np.array([0, detection.PLAUSIBLE, 0])[:, None] * np.ones(20)
    residuals = np.array([0, 0, detection.RESIDUAL])
    found = detection.confidence_of(detection.Fit(None, None, coefficients, certainties, residuals))
    np.testing.assert_allclose(found, 0.8 * np.exp([0, -1, -1]))


def test_faces_that_wander_out_of_the_photo_are_given_up(face, monkeypatch):
    def beside(points, mean):
        return np.tile([-900.0, 0, 100, 100], (len(points), 1)), np.zeros(len(points))

    monkeypatch.setattr(detection, "upright_boxes", beside)
    assert len(detect(face)) == 0
