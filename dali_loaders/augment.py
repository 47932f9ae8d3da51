"""The random numbers of augmentations, as functions of (seed, position in the stream)."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from dali_loaders.augment_config import AugmentConfig
from dali_loaders.order import uniform

_AUGMENT_STREAM = 1
# Each number has its own column for good, so that one option does not change another's numbers: new ones are added at the end.
_COLUMNS = (
    "flip", "angle", "zoom", "shift_x", "shift_y", "brightness", "contrast",
    "geometry", "colour", "saturation", "hue",
    "crop", "crop_area", "crop_ratio", "crop_y", "crop_x",
    "mask", "mask_top", "mask_red", "mask_green", "mask_blue",
    "cutout", "cutout_area", "cutout_ratio", "cutout_y", "cutout_x",
    "blur", "sigma", "low_resolution", "scale", "shrink", "enlarge", "grey", "jpeg", "quality",
)  # fmt: skip
# Type and number of dimensions of the arguments of one image. An argument called like a change says whether the image is changed.
ARGUMENTS: dict[str, tuple[type[np.generic], int]] = {
    "flip": (np.int32, 0),
    "mask": (np.bool_, 0),
    "mask_anchor": (np.float32, 1),
    "mask_shape": (np.float32, 1),
    "mask_colour": (np.float32, 1),
    "crop": (np.bool_, 0),
    "crop_start": (np.float32, 1),
    "crop_end": (np.float32, 1),
    "geometry": (np.bool_, 0),
    "matrix": (np.float32, 2),
    "frame": (np.bool_, 0),
    "frame_anchor": (np.float32, 1),
    "frame_shape": (np.float32, 1),
    "cutout": (np.bool_, 0),
    "cutout_anchor": (np.float32, 1),
    "cutout_shape": (np.float32, 1),
    "blur": (np.bool_, 0),
    "sigma": (np.float32, 0),
    "low_resolution": (np.bool_, 0),
    "low_size": (np.float32, 1),
    "smooth": (np.bool_, 0),
    "shrink": (np.int32, 0),
    "enlarge": (np.int32, 0),
    "brightness": (np.float32, 0),
    "contrast": (np.float32, 0),
    "colour": (np.bool_, 0),
    "saturation": (np.float32, 0),
    "hue": (np.float32, 0),
    "grey": (np.bool_, 0),
    "jpeg": (np.bool_, 0),
    "quality": (np.int32, 0),
}
_CUTOUT_RATIO = (0.5, 2.0)
# A mask in fractions of a face aligned as for ArcFace: eyes at 0.46, tip of the nose at 0.64 and mouth at 0.82 of the height.
_MASK_TOP, _MASK_JAW, _MASK_CHIN = (0.52, 0.6), 0.8, 1.0  # its upper edge; where it begins to narrow; its lower edge
_MASK_HALF_WIDTH, _MASK_CHIN_HALF_WIDTH = 0.34, 0.17
_MASK_STRIPS = 64


def augment_arguments(config: AugmentConfig, image_size: int, seed: int, positions: np.ndarray) -> dict[str, np.ndarray]:
    """Per-sample arguments [b, ...] of the graph for the stream positions, each a function of (seed, position) alone; which ones there
    are depends on config alone. Pairs are (y, x).

    flip; mask, and its rectangles' mask_anchor and mask_shape (fractions of the decoded image) and mask_colour (RGB); crop, crop_start
    and crop_end (fractions); geometry, and matrix [b, 2, 3], which maps output to input pixels; frame, and its four black rectangles'
    frame_anchor and frame_shape (pixels); cutout, cutout_anchor and cutout_shape (pixels); blur and sigma (pixels); low_resolution,
    low_size (pixels), shrink and enlarge (DALI's numbers of interpolations), and smooth, which shrinks by averaging instead;
    colour, brightness, contrast, saturation and hue (degrees); grey; jpeg and quality."""
    draw = dict(zip(_COLUMNS, uniform(seed, _AUGMENT_STREAM, positions, len(_COLUMNS)).T, strict=True))
    arguments = {"flip": (draw["flip"] < 0.5) * config.flip}
    if config.mask:
        arguments |= _mask(draw) | {"mask": draw["mask"] < config.mask}
    if config.crop:
        start_b2, size_b2 = _part(draw, "crop", config.crop_area, config.crop_ratio)
        cropped = draw["crop"] < config.crop
        if config.crop_resize:
            arguments |= {"crop": cropped, "crop_start": start_b2, "crop_end": start_b2 + size_b2}
        else:
            arguments |= _frame(_pixels(start_b2, size_b2, image_size), image_size) | {"frame": cropped}
    if max(config.rotate, config.zoom, config.shift) > 0:
        arguments |= {"matrix": _matrix(config, image_size, draw)} | _if_not_all("geometry", config, draw)
    if config.cutout:
        anchor_b2, shape_b2 = _pixels(*_part(draw, "cutout", config.cutout_area, _CUTOUT_RATIO), image_size)
        arguments |= {"cutout": draw["cutout"] < config.cutout, "cutout_anchor": anchor_b2, "cutout_shape": shape_b2}
    if config.blur:
        arguments |= {"blur": draw["blur"] < config.blur, "sigma": _between(config.blur_sigma, draw["sigma"])}
    if config.low_resolution:
        arguments |= _low_resolution(config, image_size, draw)
    if max(config.brightness, config.contrast, config.saturation, config.hue) > 0:
        arguments |= _colour(config, draw)
    if config.grey:
        arguments["grey"] = draw["grey"] < config.grey
    if config.jpeg:
        least, most = config.jpeg_quality
        quality = np.floor(_between((least, most + 1), draw["quality"]))
        arguments |= {"jpeg": draw["jpeg"] < config.jpeg, "quality": quality}
    return {name: np.ascontiguousarray(values, ARGUMENTS[name][0]) for name, values in arguments.items()}


Draw = Mapping[str, np.ndarray]  # column -> float64 [b] in [0, 1)


def _between(ends: tuple[float, float], draw: np.ndarray) -> np.ndarray:
    return ends[0] + (ends[1] - ends[0]) * draw


def _if_not_all(change: str, config: AugmentConfig, draw: Draw) -> dict[str, np.ndarray]:
    """Which images are changed; nothing where all are, so that they are not told apart."""
    probability = getattr(config, change)
    return {change: draw[change] < probability} if probability < 1 else {}


def _matrix(config: AugmentConfig, image_size: int, draw: Draw) -> np.ndarray:
    angle = np.radians(config.rotate) * (2 * draw["angle"] - 1)
    scale = 1 + config.zoom * (2 * draw["zoom"] - 1)
    cos, sin = np.cos(angle) / scale, np.sin(angle) / scale
    centre, reach = image_size / 2, config.shift * image_size
    from_x, from_y = centre + reach * (2 * draw["shift_x"] - 1), centre + reach * (2 * draw["shift_y"] - 1)
    rows = [cos, sin, centre - cos * from_x - sin * from_y, -sin, cos, centre + sin * from_x - cos * from_y]
    return np.stack(rows, axis=1).reshape(-1, 2, 3)


def _part(draw: Draw, name: str, areas: tuple[float, float], ratios: tuple[float, float]) -> tuple[np.ndarray, np.ndarray]:
    """Start and size [b, 2] of a part of the image as fractions of its sides. The area is uniform in its range. So is the logarithm of
    width : height, in that share of its range with which the part is no wider or higher than the image."""
    area = _between(areas, draw[f"{name}_area"])
    low, high = (np.log(np.clip(end, area, 1 / area)) for end in ratios)
    ratio = np.exp(low + (high - low) * draw[f"{name}_ratio"])
    size_b2 = np.minimum(np.sqrt(np.stack([area / ratio, area * ratio], axis=1)), 1)
    return (1 - size_b2) * np.stack([draw[f"{name}_y"], draw[f"{name}_x"]], axis=1), size_b2


def _pixels(start_b2: np.ndarray, size_b2: np.ndarray, image_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Start and size in whole pixels, at least one."""
    start = np.minimum(np.round(start_b2 * image_size), image_size - 1)
    return start, np.maximum(np.round((start_b2 + size_b2) * image_size) - start, 1)


def _frame(part: tuple[np.ndarray, np.ndarray], image_size: int) -> dict[str, np.ndarray]:
    """The four rectangles around a part: above, below, left and right."""
    (top, left), (height, width) = part[0].T, part[1].T
    none, all_of_it = np.zeros_like(top), np.full_like(top, image_size)
    anchors = [none, none, top + height, none, top, none, top, left + width]
    shapes = [top, all_of_it, image_size - top - height, all_of_it, height, left, height, image_size - left - width]
    return {"frame_anchor": np.stack(anchors, axis=1), "frame_shape": np.stack(shapes, axis=1)}


def _mask(draw: Draw) -> dict[str, np.ndarray]:
    """A shape that is straight down to the jaw and narrows to the chin, as strips that overlap, since their edges are rounded to pixels."""
    top = _between(_MASK_TOP, draw["mask_top"])[:, None]
    height = (_MASK_CHIN - top) / _MASK_STRIPS
    y = top + height * np.arange(_MASK_STRIPS)
    narrowed = np.clip((y - _MASK_JAW) / (_MASK_CHIN - _MASK_JAW), 0, 1)
    half = _MASK_HALF_WIDTH + (_MASK_CHIN_HALF_WIDTH - _MASK_HALF_WIDTH) * narrowed
    return {
        "mask_anchor": np.stack([y, 0.5 - half], axis=2).reshape(len(top), -1),
        "mask_shape": np.stack([np.broadcast_to(2 * height, y.shape), 2 * half], axis=2).reshape(len(top), -1),
        "mask_colour": np.floor(256 * np.stack([draw["mask_red"], draw["mask_green"], draw["mask_blue"]], axis=1)),
    }


def _low_resolution(config: AugmentConfig, image_size: int, draw: Draw) -> dict[str, np.ndarray]:
    """Each way one of five interpolations: nearest, linear, cubic, Lanczos (DALI's numbers 0 to 3), or averaging, which is linear for
    enlarging."""
    side = np.maximum(1, np.floor(image_size * _between(config.low_resolution_scale, draw["scale"])))
    shrink, enlarge = np.floor(5 * draw["shrink"]), np.floor(5 * draw["enlarge"])
    return {
        "low_resolution": draw["low_resolution"] < config.low_resolution,
        "low_size": np.stack([side, side], axis=1),
        "smooth": shrink == 4,
        "shrink": np.where(shrink == 4, 1, shrink),
        "enlarge": np.where(enlarge == 4, 1, enlarge),
    }


def _colour(config: AugmentConfig, draw: Draw) -> dict[str, np.ndarray]:
    arguments = _if_not_all("colour", config, draw)
    if max(config.brightness, config.contrast) > 0:
        for name in ("brightness", "contrast"):
            arguments[name] = 1 + getattr(config, name) * (2 * draw[name] - 1)
    if max(config.saturation, config.hue) > 0:
        arguments["saturation"] = 1 + config.saturation * (2 * draw["saturation"] - 1)
        arguments["hue"] = config.hue * (2 * draw["hue"] - 1)
    return arguments
