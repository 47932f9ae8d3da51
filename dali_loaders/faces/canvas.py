"""Flat shapes on a head that turns in three dimensions, and the camera that looks at them.
A shape is a few points in face coordinates, projected, joined by a spline and filled or stroked."""

from __future__ import annotations

import math

import cv2
import numpy as np

from dali_loaders.faces.traits import Colour, Conditions

FRACTION_BITS = 4  # cv2 takes fixed-point coordinates, here in sixteenths of a pixel
Depth = float | np.ndarray
ON_HEAD = math.nan

# Catmull-Rom weights of the four neighbours of a segment, at some places along it.
SPLINE_STEPS = 4
_T = np.arange(SPLINE_STEPS) / SPLINE_STEPS
SPLINE = 0.5 * np.stack([-_T + 2 * _T**2 - _T**3, 2 - 5 * _T**2 + 3 * _T**3, _T + 4 * _T**2 - 3 * _T**3, _T**3 - _T**2], axis=1)


class Canvas:
    """Shapes in the order of drawing. They are all projected together, which takes a third of the time of projecting them one by one."""

    def __init__(self) -> None:
        self.shapes: list[tuple[np.ndarray, Colour, float, bool]] = []  # points [n, 2], colour, line width (0: filled), smooth
        self.depths: list[np.ndarray] = []  # [n]; see fill
        self.lifts: list[float] = []

    def fill(self, points_N2: np.ndarray, colour: Colour, depth: Depth = ON_HEAD, lift: float = 0.0, smooth: bool = True) -> None:
        """A closed area. Its points lie at `depth` in front of the head's middle, or ON_HEAD, an ellipsoid, raised by `lift`."""
        self._add(points_N2, colour, 0.0, depth, lift, smooth)

    def stroke(self, points_N2: np.ndarray, colour: Colour, width: float, depth: Depth = ON_HEAD, lift: float = 0.0) -> None:
        """An open line of `width` face units. OpenCV draws nothing for a single point."""
        self._add(points_N2, colour, width, depth, lift, True)

    def _add(self, points_N2: np.ndarray, colour: Colour, width: float, depth: Depth, lift: float, smooth: bool) -> None:
        self.shapes.append((points_N2, colour, width, smooth))
        self.depths.append(np.full(len(points_N2), depth))
        self.lifts.append(lift)

    def render(self, pixels: np.ndarray, pose: Conditions) -> None:
        """Draws the shapes onto `pixels`, [side, side, 3], in the order in which they were added."""
        unit = pose.zoom * len(pixels) / 2
        sizes = np.array([len(shape[0]) for shape in self.shapes])
        points_N2 = np.concatenate([shape[0] for shape in self.shapes])
        pixels_N2 = project(points_N2, np.concatenate(self.depths), np.repeat(self.lifts, sizes), pose) * unit
        pixels_N2 += len(pixels) / 2 * (1 + np.array([pose.shift_x, pose.shift_y]))
        is_open = np.array([shape[2] > 0 for shape in self.shapes])
        path = np.rint(spline(pixels_N2, sizes, is_open) * (1 << FRACTION_BITS)).astype(np.int32)  # [N, SPLINE_STEPS, 2]
        paints = np.clip([shape[1] for shape in self.shapes], 0, 255).tolist()
        start = 0
        for (points, _, width, smooth), paint in zip(self.shapes, paints, strict=True):
            stop = start + len(points)
            thickness = max(1, round(width * unit))
            if width:
                line = path[start : stop - 1].reshape(-1, 2)
                cv2.polylines(pixels, [np.concatenate([line, path[stop - 1, :1]])], False, paint, thickness, cv2.LINE_8, FRACTION_BITS)
            else:
                area = path[start:stop].reshape(-1, 2) if smooth else np.ascontiguousarray(path[start:stop, 0])
                cv2.fillPoly(pixels, [area], paint, cv2.LINE_8, FRACTION_BITS)
            start = stop


def project(points_N2: np.ndarray, depths_N: np.ndarray, lifts_N: np.ndarray, pose: Conditions) -> np.ndarray:
    """Where the camera sees points of the turned head, [N, 2], in face units around the middle of the head."""
    x, y = points_N2.T
    surface_N = 0.75 * np.sqrt(np.maximum(1 - (x / 1.12) ** 2 - (y / 1.5) ** 2, 0))
    points_3N = np.stack([x, y, np.where(np.isnan(depths_N), surface_N + lifts_N, depths_N)])
    yaw, pitch, roll = np.radians([pose.yaw, pose.pitch, pose.roll])
    turn_yaw = np.array([[math.cos(yaw), 0, math.sin(yaw)], [0, 1, 0], [-math.sin(yaw), 0, math.cos(yaw)]])
    turn_pitch = np.array([[1, 0, 0], [0, math.cos(pitch), math.sin(pitch)], [0, -math.sin(pitch), math.cos(pitch)]])
    turn_roll = np.array([[math.cos(roll), -math.sin(roll), 0], [math.sin(roll), math.cos(roll), 0], [0, 0, 1]])
    seen_3N = turn_roll @ turn_pitch @ turn_yaw @ points_3N
    return (seen_3N[:2] * (1 + 0.1 * seen_3N[2])).T


def spline(points_N2: np.ndarray, sizes: np.ndarray, is_open: np.ndarray) -> np.ndarray:
    """Catmull-Rom curves through the points of several shapes, [N, SPLINE_STEPS, 2]: from each point towards the next of its shape."""
    stops = np.cumsum(sizes)
    firsts, lasts = stops - sizes, stops - 1
    before, after = np.arange(len(points_N2)) - 1, np.arange(len(points_N2)) + 1
    before[firsts] = np.where(is_open, firsts, lasts)
    after[lasts] = np.where(is_open, lasts, firsts)
    neighbours_N42 = np.stack([points_N2[before], points_N2, points_N2[after], points_N2[after[after]]], axis=1)
    return SPLINE @ neighbours_N42
