import csv
import errno
import os
import shutil
from contextlib import suppress

import cv2
import numpy as np
import pytest

from lgcn_fast.datasets import (
    group_of,
    is_validation,
    read_300w,
    read_background,
    read_csv,
    read_faces,
    read_kaggle,
    read_pts,
    read_shapes,
)
from lgcn_fast.landmarks import KAGGLE_NAMES

HEADER = "version: 1\nn_points: 3\n{\n"
POINTS = "1.0 2.5\n3 4\n5e0 6\n"
EXPECTED = np.array([[0, 1.5], [2, 3], [4, 5]], np.float32)


@pytest.mark.parametrize(
    "text",
    [
        HEADER + POINTS + "}\n",
        POINTS,
        HEADER.replace(": ", ":") + POINTS + "}",
        "\ufeff" + HEADER.replace("points: 3", "points 3") + POINTS,
        HEADER.replace(": 3\n{", ": 3 {") + POINTS,
        "version: 1\r\nn_points: 3\r\n{\r\n1.0 2.5\r\n3\t4\r\n 5e0   6\r\n}\r\n\r\n",
    ],
)
def test_pts_with_and_without_header(tmp_path, text):
    path = tmp_path / "a.pts"
    path.write_text(text, "utf-8")
    np.testing.assert_array_equal(read_pts(path), EXPECTED)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "expected some points, got 0"),
        (HEADER + "1 2\n}", "expected 3 points, got 1"),
        ("1 2\n3\n", r"a.pts, line 2: expected two numbers, got '3'"),
        ("n_points: many\n1 2\n", "line 1: expected a number of points, got 'n_points: many'"),
        ("1 x\n", "line 1: expected two numbers"),
        ("1 2 3\n", "line 1: expected two numbers"),
        ("1 2\n3 inf\n", "a.pts: expected finite numbers, got infinity"),
    ],
)
def test_malformed_pts_names_file_and_line(tmp_path, text, message):
    path = tmp_path / "a.pts"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        read_pts(path)


def picture(path, size=(20, 30)):
    path.parent.mkdir(parents=True, exist_ok=True)
    cv2.imwrite(str(path), np.full(size, 100, np.uint8))
    return path


def test_points_without_labels_in_pts_files(tmp_path):
    """Those with half a label have none; faces with fewer than two labels are left out."""
    for name, text in (("a", "nan 2\n3 4\n5 6\n"), ("b", "nan nan\n3 4\nnan nan\n")):
        picture(tmp_path / f"{name}.png")
        (tmp_path / f"{name}.pts").write_text(text)
    (face,) = read_300w(tmp_path)
    np.testing.assert_array_equal(face.points, [[np.nan, np.nan], [2, 3], [4, 5]])


def test_300w_folder_at_any_depth(tmp_path):
    for name, suffix in (("deep/er/photo_1", ".jpg"), ("deep/photo_2", ".png"), ("other", ".jpg")):
        picture(tmp_path / f"{name}{suffix}")
        (tmp_path / f"{name}.pts").write_text(POINTS)
    faces = read_faces(tmp_path)
    assert [(face.name, face.group) for face in faces] == [
        ("deep/er/photo_1.pts", "photo"),
        ("deep/photo_2.pts", "photo"),
        ("other.pts", "other"),
    ]
    assert faces[0].image().shape == (20, 30)
    assert faces[0].image(color=True).shape == (20, 30, 3)


def test_label_without_picture_is_named(tmp_path):
    (tmp_path / "a.pts").write_text(POINTS)
    with pytest.raises(ValueError, match=r"a.pts: expected a picture"):
        read_300w(tmp_path)


def test_suffixes_may_be_upper_case(tmp_path):
    for name in ("a.pts", "b.PTS"):
        (tmp_path / name).write_text(POINTS)
    picture(tmp_path / "a.PNG")
    picture(tmp_path / "b.Jpg")
    assert [face.image().ndim for face in read_300w(tmp_path)] == [2, 2]
    (tmp_path / "F.CSV").write_text("image,x0,y0,x1,y1\na.PNG,1,2,3,4\n")
    picture(tmp_path / "F" / "a.PNG")
    assert len(read_faces(tmp_path / "F.CSV")) == 1


def test_csv_of_points_with_missing_labels(tmp_path):
    picture(tmp_path / "faces" / "Some_One_07.png")
    rows = "1,2.5,,4,5,6", ",,,,,", ",2,3,,5,6"  # with fewer than two labels a face has no size
    text = "image,x0,y0,x1,y1,x2,y2\n" + "".join(f"Some_One_07.png,{row}\n" for row in rows)
    (tmp_path / "faces.csv").write_text("\ufeff" + text + "\n,,,,,,\n", "utf-8")  # as spreadsheets write it
    (face,) = read_faces(tmp_path / "faces.csv")
    np.testing.assert_array_equal(face.points, [[1, 2.5], [np.nan, np.nan], [5, 6]])
    assert face.group == "Some_One"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "expected the columns image"),
        ("file,x0,y0\na.png,1,2\n", "expected the columns image, .* as column 1 image, got file"),
        ("image\na.png\n", "as column 2 x0, got nothing"),
        ("image,x0,y0,person\na.png,1,2,3\n", "as column 4 nothing, got person"),
        ("image,x0,y0,\na.png,1,2,\n", "as column 4 nothing, got an empty one"),
        ("image,x0,y0\na.png,1,1e39\n", "line 2: expected finite numbers"),
        ("image,x0,y0\nb.png,1,2\n", "line 2: expected a picture"),
        ("image,x0,y0\na.png,1\n", "line 2: expected 2 coordinates, got 1"),
        ("image,x0,y0\na.png,1,two\n", "line 2: expected numbers"),
        ("image,x0,y0\na.png,1,inf\n", "line 2: expected finite numbers"),
        ("image,x0,y0\nü.png,1,2\n", r"f\.csv: expected a CSV in UTF-8"),
    ],
)
def test_malformed_csv_names_the_line(tmp_path, text, message):
    picture(tmp_path / "a.png")
    (tmp_path / "f.csv").write_text(text, "latin-1")
    with pytest.raises(ValueError, match=message):
        read_csv(tmp_path / "f.csv", tmp_path)


def test_csv_headers_may_have_blanks_and_are_not_taken_for_kaggles(tmp_path):
    picture(tmp_path / "f" / "a.png")
    (tmp_path / "f.csv").write_text("image, x0, y0, x1, y1\na.png, 1, 2, 3, 4\n")
    (face,) = read_faces(tmp_path / "f.csv")
    np.testing.assert_array_equal(face.points, [[1, 2], [3, 4]])
    (tmp_path / "f.csv").write_text("Image,x0,y0\na.png,1,2\n")
    with pytest.raises(ValueError, match="as column 1 image, got Image"):
        read_faces(tmp_path / "f.csv")


def kaggle(path, rows):
    columns = [f"{name}_{axis}" for name in KAGGLE_NAMES for axis in "xy"] + ["Image"]
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(columns)
        writer.writerows(rows)
    return path


def test_kaggle(tmp_path):
    pixels = " ".join(str(i % 256) for i in range(96 * 96))
    labelled = [str(v) for v in range(28)] + ["", "", pixels]
    path = kaggle(tmp_path / "training.csv", [labelled, [""] * 30 + [pixels]])
    (face,) = read_faces(path)
    assert face.points.shape == (15, 2)
    np.testing.assert_array_equal(face.points[0], [0, 1])
    assert np.isnan(face.points[14]).all()
    assert face.image().dtype == np.uint8
    assert face.image()[1, 0] == 96
    assert face.image(color=True).shape == (96, 96, 3)


@pytest.mark.parametrize(
    ("pixels", "message"), [("1 2 3", "expected 96 x 96 pixels .* got 3"), ("1 b", "expected pixel values")]
)
def test_malformed_kaggle_names_the_line(tmp_path, pixels, message):
    path = kaggle(tmp_path / "training.csv", [["1"] * 30 + [pixels]])
    with pytest.raises(ValueError, match=f"line 2: {message}"):
        read_kaggle(path)


def test_two_pictures_of_one_name_are_named(tmp_path):
    """One may be a mask, or a drawing."""
    (tmp_path / "a.pts").write_text(POINTS)
    picture(tmp_path / "a.jpg")
    picture(tmp_path / "a.png")
    with pytest.raises(
        ValueError, match=r"a\.pts: expected one picture of the same name beside it, got a\.png, a\.jpg"
    ):
        read_300w(tmp_path)
    (tmp_path / "a.png").unlink()
    with suppress(FileExistsError):  # as it is where file systems do not tell cases apart
        os.link(tmp_path / "a.jpg", tmp_path / "a.JPG")
    assert len(read_300w(tmp_path)) == 1


def test_folders_and_shadows_of_files_are_no_pictures(tmp_path):
    for name in ("._a.pts", "._a.jpg"):  # of archives made on macOS
        (tmp_path / name).write_bytes(b"\x00\x05\x16\x07")
    for name in ("b.pts", "b.jpg"):
        (tmp_path / name).mkdir()
    (tmp_path / "a.pts").write_text(POINTS)
    picture(tmp_path / "a.jpg")
    assert [face.source.name for face in read_300w(tmp_path)] == ["a.jpg"]
    assert [face.source.name for face in read_background(tmp_path)] == ["a.jpg"]


def test_folders_behind_links_are_read_once(tmp_path):
    picture(tmp_path / "elsewhere" / "a.jpg")
    picture(tmp_path / "set" / "b.jpg")
    (tmp_path / "set" / "link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "circle").symlink_to(tmp_path / "set")
    assert [face.source.name for face in read_background(tmp_path / "set")] == ["b.jpg", "a.jpg"]


def test_folders_that_cannot_be_read_are_named(tmp_path, monkeypatch):
    picture(tmp_path / "set" / "a.jpg")
    (tmp_path / "set" / "locked").mkdir()
    scandir = os.scandir

    def refuse(path):
        if os.path.basename(path) == "locked":
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(PermissionError, match="locked"):
        read_background(tmp_path / "set")


def test_shapes_without_pictures(tmp_path):
    path = tmp_path / "shapes.npz"
    shapes = np.zeros((3, 5, 2))
    np.savez(path, landmarks=shapes)
    np.testing.assert_array_equal(read_shapes(path, 5), shapes)
    with pytest.raises(ValueError, match=r"shapes\.npz: expected landmarks \(M, 7, 2\), got \(3, 5, 2\)"):
        read_shapes(path, 7)
    np.save(tmp_path / "shapes.npy", shapes)
    for other in (tmp_path / "shapes.npy", tmp_path / "nowhere.npz"):
        with pytest.raises(ValueError, match=f"{other}: expected a .npz file with an array `landmarks`"):
            read_shapes(other, 5)


def test_groups_need_not_be_text():
    assert {is_validation(f"caf\udce9{index}") for index in range(50)} == {True, False}


def test_background_has_no_points(tmp_path):
    picture(tmp_path / "sub" / "a.jpg")
    (face,) = read_background(tmp_path)
    assert face.points.shape == (0, 2)
    with pytest.raises(ValueError, match="expected pictures"):
        read_background(tmp_path / "nowhere")


@pytest.mark.parametrize("name", ["nothing", "text.txt"])
def test_what_is_no_data_set_is_named(tmp_path, name):
    (tmp_path / "text.txt").write_text("hello")
    with pytest.raises(ValueError, match=f"{name}: expected a folder"):
        read_faces(tmp_path / name)


@pytest.mark.parametrize(
    ("stem", "group"),
    [("100040721_2", "100040721"), ("Al_Gore_51", "Al_Gore"), ("image_0001", "image_0001"), ("007", "007")],
)
def test_groups_are_photos_or_persons(stem, group):
    assert group_of(stem) == group


def test_a_tenth_is_for_validation():
    share = np.mean([is_validation(f"photo{i}") for i in range(5000)])
    assert 0.08 < share < 0.12


@pytest.mark.data
@pytest.mark.parametrize(
    ("path", "count"),
    [
        ("300w/afw", 156),
        ("300w/helen", 870),
        ("300w/lfpw/trainset", 802),
        ("300w/lfpw/testset", 224),
        ("youtube/train.csv", 2550),
        ("infants/trainset", 210),
    ],
)
def test_real_sets(data, path, count):
    faces = read_faces(data / path)
    assert len(faces) == count
    for face in faces[:5]:
        height, width = face.image().shape
        inside = (face.points > -0.5) & (face.points < (width, height))
        assert face.points.shape == (68, 2)
        assert inside.mean() > 0.9


@pytest.mark.data
def test_header_of_real_pts_files_is_optional(data, tmp_path):
    original = data / "300w" / "afw" / "1051618982_1.pts"
    stripped = tmp_path / "a.pts"
    shutil.copyfile(original, stripped)
    stripped.write_text("".join(original.read_text().splitlines(keepends=True)[3:-1]))
    np.testing.assert_array_equal(read_pts(original), read_pts(stripped))
