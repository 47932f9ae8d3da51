"""The random numbers of augmentations, as functions of (seed, position in the stream)."""

from __future__ import annotations

import numpy as np

from dali_loaders.config import AugmentConfig
from dali_loaders.order import uniform

_AUGMENT_STREAM = 1
_COLUMNS = 7  # flip, angle, zoom, shift x, shift y, brightness, contrast: fixed, so that one option does not change another's numbers


def augment_arguments(config: AugmentConfig, image_size: int, seed: int, positions: np.ndarray) -> dict[str, np.ndarray]:
    """Per-sample arguments of the graph for the stream positions, each a function of (seed, position) alone.

    flip int32 [b]; matrix float32 [b, 2, 3], which maps output to input pixels; brightness and contrast float32 [b]."""
    draw = uniform(seed, _AUGMENT_STREAM, positions, _COLUMNS)
    signed = 2 * draw - 1
    arguments = {"flip": (draw[:, 0] < 0.5).astype(np.int32) * config.flip}
    if config.geometric:
        angle, scale = np.radians(config.rotate) * signed[:, 1], 1 + config.zoom * signed[:, 2]
        cos, sin = np.cos(angle) / scale, np.sin(angle) / scale
        centre = image_size / 2
        from_x, from_y = centre + config.shift * image_size * signed[:, 3], centre + config.shift * image_size * signed[:, 4]
        rows = [cos, sin, centre - cos * from_x - sin * from_y, -sin, cos, centre + sin * from_x - cos * from_y]
        arguments["matrix"] = np.stack(rows, axis=1).reshape(-1, 2, 3).astype(np.float32)
    if config.photometric:
        arguments["brightness"] = (1 + config.brightness * signed[:, 5]).astype(np.float32)
        arguments["contrast"] = (1 + config.contrast * signed[:, 6]).astype(np.float32)
    return arguments
