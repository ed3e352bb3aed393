"""What the landmarks of a known annotation scheme mean: the 68 points of 300-W and the 15 of Kaggle's keypoints."""

from dataclasses import dataclass

KAGGLE_NAMES = (
    "left_eye_center", "right_eye_center",
    "left_eye_inner_corner", "left_eye_outer_corner", "right_eye_inner_corner", "right_eye_outer_corner",
    "left_eyebrow_inner_end", "left_eyebrow_outer_end", "right_eyebrow_inner_end", "right_eyebrow_outer_end",
    "nose_tip", "mouth_left_corner", "mouth_right_corner", "mouth_center_top_lip", "mouth_center_bottom_lip",
)  # fmt: skip
"""Column names of Kaggle's facial keypoints, without `_x` and `_y`, in the order of the file."""


@dataclass(frozen=True)
class Scheme:
    """An annotation scheme; all indices are 0-based."""

    mirror: tuple[int, ...]
    """mirror[i] is the landmark that landmark i becomes when the image is mirrored."""
    eye_corners: tuple[int, int]
    """Outer corners of the eyes; their distance is the inter-ocular distance."""
    outline: tuple[int, ...]
    """The face outline, left out of the error "51"."""
    lines: tuple[tuple[int, ...], ...]
    """Strokes for drawings; a stroke whose first point is its last is closed."""


def _mirror_of_300w() -> tuple[int, ...]:
    pairs = [(i, 16 - i) for i in range(8)] + [(17 + i, 26 - i) for i in range(5)]
    pairs += [(31, 35), (32, 34), (36, 45), (37, 44), (38, 43), (39, 42), (40, 47), (41, 46)]
    pairs += [(48, 54), (49, 53), (50, 52), (59, 55), (58, 56), (60, 64), (61, 63), (67, 65)]
    other = dict(pairs) | {b: a for a, b in pairs}
    return tuple(other.get(i, i) for i in range(68))


def _mirror_of_kaggle() -> tuple[int, ...]:
    swap = {"left": "right", "right": "left"}
    mirrored = ["_".join(swap.get(word, word) for word in name.split("_")) for name in KAGGLE_NAMES]
    return tuple(KAGGLE_NAMES.index(name) for name in mirrored)


def _stroke(first: int, last: int, closed: bool = False) -> tuple[int, ...]:
    return (*range(first, last + 1), first) if closed else tuple(range(first, last + 1))


SCHEMES = {
    68: Scheme(
        mirror=_mirror_of_300w(),
        eye_corners=(36, 45),
        outline=tuple(range(17)),
        lines=(
            _stroke(0, 16), _stroke(17, 21), _stroke(22, 26), _stroke(27, 30), _stroke(31, 35),
            _stroke(36, 41, closed=True), _stroke(42, 47, closed=True),
            _stroke(48, 59, closed=True), _stroke(60, 67, closed=True),
        ),
    ),
    15: Scheme(mirror=_mirror_of_kaggle(), eye_corners=(3, 5), outline=(), lines=()),
}  # fmt: skip
"""Known schemes by their number of landmarks."""


def lines_of(num_landmarks: int) -> tuple[tuple[int, ...], ...]:
    """The lines that are drawn through landmarks, see `Scheme`; none where nobody knows them."""
    scheme = SCHEMES.get(num_landmarks)
    return scheme.lines if scheme else ()
