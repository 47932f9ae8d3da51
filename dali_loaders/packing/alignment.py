"""Faces brought to one place by five landmarks: a similarity warp (shift, rotation, scale) to the template of ArcFace."""

from __future__ import annotations

import numpy as np

# x and y in pixels of a crop of SIDE x SIDE: the eyes, the tip of the nose, the corners of the mouth; left is left in the image. Crops of
# another size scale it.
SIDE = 112
TEMPLATE_52 = np.array([(38.2946, 51.6963), (73.5318, 51.5014), (56.0252, 71.7366), (41.5493, 92.3655), (70.7299, 92.2041)])


def similarity(points_52: np.ndarray, target_52: np.ndarray) -> np.ndarray:
    """The matrix float64 [2, 3] of the similarity, without reflection, that brings points closest to their targets in the least squares.

    In complex numbers it is z -> a z + b, linear in a and b, so that the best a is a quotient of two sums; it equals Umeyama's solution
    (PAMI 1991, equations 40 to 42) in two dimensions. ValueError where all points are one, or nowhere."""
    points, target = _complex(points_52), _complex(target_52)
    p, q = points - points.mean(), target - target.mean()
    spread = float(np.vdot(p, p).real)
    extent = float(np.abs(points).max())
    if not extent < 1e100:  # whose square is a number
        raise ValueError("the landmarks are too far away")
    if not spread > 1e-12 * max(1.0, extent**2):
        raise ValueError("the landmarks are one point")
    a = np.vdot(p, q) / spread
    b = target.mean() - a * points.mean()
    return np.array([[a.real, -a.imag, b.real], [a.imag, a.real, b.imag]])


def is_mirrored(points_52: np.ndarray) -> bool:
    """Whether a mirror image of the points fits the template better: left and right are mixed up, or the image itself was mirrored."""
    p, q = (points - points.mean() for points in (_complex(points_52), _complex(TEMPLATE_52)))
    return bool(abs((p * q).sum()) > abs(np.vdot(p, q)))


def _complex(points_52: np.ndarray) -> np.ndarray:
    return np.asarray(points_52, np.float64) @ (1, 1j)
