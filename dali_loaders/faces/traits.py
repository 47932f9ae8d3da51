"""What a procedural face is made of: Traits belong to an identity, Conditions to one image of it.
Each field says how it is drawn; lengths are in units of half a head's width, angles in degrees, colours are RGB in 0..255."""

# ruff: noqa: RUF009 (between, palette and the others are dataclasses.field under names that say how to draw)
from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import Any, TypeVar

import numpy as np

Colour = np.ndarray  # float64 [3]
Record = TypeVar("Record")


def between(low: float, high: float) -> Any:
    """A field drawn uniformly from [low, high)."""
    return field(metadata={"draw": lambda rng: low + (high - low) * rng.random()})


def sometimes(share: float, low: float, high: float) -> Any:
    """A field that is 0 in most records and uniform in [low, high) in a `share` of them."""

    def draw(rng: np.random.Generator) -> float:
        present, value = rng.random(2)
        return low + (high - low) * value if present < share else 0.0

    return field(metadata={"draw": draw})


def scattered(most: int, *ranges: tuple[float, float]) -> Any:
    """A field of 0 to `most` points, float64 [n, len(ranges)], each coordinate uniform in its range."""
    low, high = np.array(ranges).T

    def draw(rng: np.random.Generator) -> np.ndarray:
        return low + (high - low) * rng.random((int(rng.integers(most + 1)), len(ranges)))

    return field(metadata={"draw": draw})


def any_colour(darkest: float, lightest: float, saturation: float) -> Any:
    """A field drawn around the greys between `darkest` and `lightest`, each channel up to `saturation` away from them."""
    return field(metadata={"draw": lambda rng: np.clip(rng.uniform(darkest, lightest) + rng.uniform(-saturation, saturation, 3), 0, 255)})


def palette(*colours: tuple[int, int, int], spread: float = 8.0) -> Any:
    """A field drawn from the line through `colours`, plus a normal deviation of `spread`."""
    table = np.array(colours, float)

    def draw(rng: np.random.Generator) -> Colour:
        place = rng.random() * (len(table) - 1)
        left = int(place)
        colour = table[left] + (place - left) * (table[left + 1] - table[left])
        return np.clip(colour + rng.normal(0, spread, 3), 0, 255)

    return field(metadata={"draw": draw})


def draw_record(kind: Callable[..., Record], rng: np.random.Generator) -> Record:
    """One random Traits or Conditions, its fields drawn from `rng` in the order of their declaration."""
    return kind(**{entry.name: entry.metadata["draw"](rng) for entry in fields(kind)})  # type: ignore[arg-type]


@dataclass(frozen=True)
class Traits:
    """What makes an identity. The face is looked at from the front, x to the right, y down, (0, 0) between the cheekbones."""

    skin: Colour = palette((250, 222, 200), (240, 200, 170), (222, 172, 136), (188, 132, 96), (140, 92, 64), (96, 62, 46))
    # Head
    temple_width: float = between(0.74, 0.95)
    cheek_width: float = between(0.82, 1.0)
    jaw_width: float = between(0.52, 0.88)
    jaw_height: float = between(0.58, 0.82)
    chin_width: float = between(0.16, 0.42)
    chin: float = between(1.04, 1.36)
    ear_size: float = between(0.14, 0.27)
    ear_tilt: float = between(-0.03, 0.14)
    # Eyes
    eye_gap: float = between(0.33, 0.47)
    eye_height: float = between(-0.14, 0.06)
    eye_width: float = between(0.15, 0.235)
    eye_opening: float = between(0.085, 0.17)
    eye_tilt: float = between(-0.22, 0.24)
    eye_peak: float = between(-0.4, 0.4)
    lower_lid: float = between(0.4, 0.95)
    lid_fold: float = between(0.0, 0.07)
    lash: float = between(0.02, 0.06)
    iris: Colour = palette((56, 34, 22), (98, 62, 34), (128, 104, 56), (92, 128, 82), (84, 130, 172), (136, 152, 162))
    iris_size: float = between(0.085, 0.13)
    eye_bag: float = sometimes(0.4, 0.05, 0.2)
    # Brows
    brow_gap: float = between(0.2, 0.34)
    brow_length: float = between(0.18, 0.3)
    brow_thickness: float = between(0.025, 0.095)
    brow_taper: float = between(0.15, 1.0)
    brow_arch: float = between(0.0, 0.12)
    brow_tilt: float = between(-0.24, 0.2)
    brow_darkness: float = between(0.45, 0.95)
    # Nose
    nose_length: float = between(0.34, 0.6)
    nose_width: float = between(0.11, 0.25)
    nose_bridge: float = between(0.03, 0.09)
    nose_bulb: float = between(0.06, 0.13)
    nose_turn: float = between(-0.05, 0.06)
    nostril: float = between(0.02, 0.05)
    # Mouth
    mouth_drop: float = between(0.18, 0.34)
    mouth_width: float = between(0.22, 0.42)
    upper_lip: float = between(0.025, 0.1)
    lower_lip: float = between(0.04, 0.125)
    cupid_bow: float = between(0.0, 0.6)
    lip_redness: float = between(0.1, 0.75)
    habitual_smile: float = between(-0.03, 0.1)
    # Hair
    hair: Colour = palette(
        (24, 20, 22), (50, 34, 26), (88, 56, 34), (132, 66, 32), (184, 104, 46), (206, 164, 96), (232, 208, 152), (170, 168, 166)
    )
    hairline: float = between(0.5, 0.86)
    hairline_curve: float = between(-0.1, 0.45)
    parting: float = between(-0.7, 0.7)
    parting_depth: float = between(0.0, 0.22)
    fringe: float = sometimes(0.35, 0.12, 0.42)
    fringe_slant: float = between(-0.3, 0.3)
    hair_volume: float = between(0.02, 0.4)
    side_volume: float = between(0.0, 0.28)
    hair_length: float = sometimes(0.5, 0.5, 1.9)
    sideburn: float = between(-0.3, 0.3)
    curl: float = between(0.0, 0.11)
    curls: float = between(4.0, 13.0)
    bald: float = sometimes(0.1, 1.0, 1.0)
    # Facial hair and marks
    beard: float = sometimes(0.22, 0.25, 0.9)
    beard_depth: float = between(0.15, 0.6)
    moustache: float = sometimes(0.2, 0.3, 0.95)
    moustache_width: float = between(0.7, 1.2)
    moustache_height: float = between(0.06, 0.14)
    blush: float = between(0.0, 0.3)
    folds: float = sometimes(0.4, 0.12, 0.4)
    freckles: np.ndarray = scattered(28, (-0.62, 0.62), (0.12, 0.45))
    moles: np.ndarray = scattered(3, (-0.7, 0.7), (-0.45, 0.9), (0.02, 0.045))
    scar: float = sometimes(0.12, -0.5, 0.5)


@dataclass(frozen=True)
class Conditions:
    """What changes from image to image and must not identify anyone."""

    # Pose and framing: shifts are in half image sides, zoom is the share of it that half the width of a head takes
    yaw: float = between(-25, 25)
    pitch: float = between(-13, 13)
    roll: float = between(-9, 9)
    zoom: float = between(0.68, 0.8)
    shift_x: float = between(-0.06, 0.06)
    shift_y: float = between(-0.07, 0.04)
    # Expression
    smile: float = between(-0.03, 0.16)
    mouth_open: float = sometimes(0.4, 0.02, 0.2)
    eye_open: float = between(0.6, 1.1)
    blink: float = sometimes(0.05, 0.75, 0.9)
    gaze_x: float = between(-0.07, 0.07)
    gaze_y: float = between(-0.02, 0.03)
    brow_raise: float = between(-0.04, 0.07)
    brow_frown: float = between(-0.08, 0.08)
    # The day's hair
    hair_lift: float = between(0.85, 1.2)
    hair_phase: float = between(0.0, 6.28)
    hair_shift: float = between(-0.05, 0.05)
    # Scene and occlusion
    background: Colour = any_colour(40, 220, 60)
    background_end: Colour = any_colour(40, 220, 60)
    clutter: np.ndarray = scattered(8, (-1.1, 1.1), (-1.1, 1.1), (0.1, 0.7), (0.1, 0.7), (0, 3.14), (20, 235), (20, 235), (20, 235))
    clothes: Colour = any_colour(40, 220, 60)
    accessory: Colour = any_colour(30, 200, 70)
    glasses: float = sometimes(0.18, 0.25, 0.36)
    sunglasses: float = sometimes(0.25, 1.0, 1.0)
    hat: float = sometimes(0.08, 0.5, 0.75)
    scarf: float = sometimes(0.05, 0.55, 0.95)
    hand: float = sometimes(0.07, -1.0, 1.0)
    # Light
    sun_x: float = between(-1, 1)
    sun_y: float = between(-0.8, 0.4)
    shade: float = between(0.02, 0.22)
    slope: float = between(0.0, 0.7)
    exposure: float = between(-0.65, 0.35)
    warmth: float = between(-0.25, 0.25)
    tint: float = between(-0.1, 0.1)
    contrast: float = between(0.68, 1.2)
    grey: float = sometimes(0.06, 1.0, 1.0)
    # Camera
    blur: float = sometimes(0.5, 0.4, 0.9)
    coarse: float = sometimes(0.15, 0.6, 0.85)
    noise: float = between(1.0, 8.0)
    quality: float = between(35, 96)
