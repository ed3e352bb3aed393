"""The one-euro filter (Casiez, Roussel, Vogel, CHI 2012) for landmarks: steady on a still face, quick on a moving one.

x'_t = x'_(t-1) + a (x_t - x'_(t-1)), a = 1 / (1 + 1 / (2 pi f dt)), with a cutoff f that rises with the speed.
"""

import numpy as np

CUTOFF = 1.0
"""Hz, of a point that stands still and that the network is certain of; lower where it is not."""
CUTOFF_BY_SPEED = 40.0
"""Hz for each side of the face's box that a point moves in a second."""
SPEED_CUTOFF = 2.0
"""Hz, of the low-pass filter that the speeds go through."""
LEAST_CERTAINTY = 0.2
"""Points of lower scores are filtered as if they had this one: those that are hidden go with the face, too."""
LEAST_STEP = 1e-3
"""Seconds from frame to frame, where the time stamps say less."""


class OneEuroFilter:
    """The filter of one face's landmarks, called with each frame in turn."""

    def __init__(self, smoothing: float = 1.0) -> None:
        """
        Args:
            smoothing: divides the cutoff of points that stand still: 2 is steadier, 0.5 quicker.
        """
        self._cutoff = CUTOFF / smoothing
        self._time: float | None = None

    def __call__(self, points: np.ndarray, scores: np.ndarray, side: float, time: float) -> np.ndarray:
        """Filter the landmarks of the next frame.

        Args:
            points: (N, 2), pixels.
            scores: (N,) in 0..1, as in `Landmarks`.
            side: of the face's box, pixels: speeds count in it, so that near and far faces are filtered alike.
            time: of the frame, seconds.

        Returns:
            (N, 2) float64, pixels; in the first call the points as they are.
        """
        if self._time is None:
            self._filtered, self._speed = np.array(points, np.float64), np.zeros(np.shape(points))
        else:
            step = max(time - self._time, LEAST_STEP)
            speed = (points - self._before) / (side * step)
            self._speed += _weight(SPEED_CUTOFF, step) * (speed - self._speed)
            still = self._cutoff * np.clip(scores, LEAST_CERTAINTY, 1)
            cutoff = still + CUTOFF_BY_SPEED * np.linalg.norm(self._speed, axis=1)
            self._filtered = self._filtered + _weight(cutoff, step)[:, None] * (points - self._filtered)
        self._before, self._time = points, time
        return self._filtered


def _weight(cutoff: np.ndarray, step: float) -> np.ndarray:
    """What a low-pass filter of a cutoff (Hz) gives a new value, when the last came `step` seconds ago."""
    return 1 / (1 + 1 / (2 * np.pi * cutoff * step))
