"""Each change that an augmentation makes, alone and all together, for the tests of this room."""

from dataclasses import replace

from dali_loaders import AugmentConfig

NONE = AugmentConfig.named("none")
# The options beside the probability, which is called like the change.
CHANGES = {
    "mask": {},
    "crop": {},
    "frame": {"crop_resize": False},
    "geometry": {"rotate": 20, "zoom": 0.2, "shift": 0.1},
    "cutout": {},
    "blur": {},
    "low_resolution": {"low_resolution_scale": (0.2, 0.8)},
    "colour": {"brightness": 0.5, "contrast": 0.5, "saturation": 0.5, "hue": 90},
    "grey": {},
    "jpeg": {"jpeg_quality": (5, 50)},
}
PROBABILITIES = CHANGES.keys() - {"frame"}  # that of "frame" is crop


def only(change: str, probability: float = 0.5) -> AugmentConfig:
    return replace(NONE, **CHANGES[change] | {"crop" if change == "frame" else change: probability})


OPTIONS = {name: value for change in PROBABILITIES for name, value in CHANGES[change].items()}
ALL = AugmentConfig(**OPTIONS | dict.fromkeys(PROBABILITIES, 0.5))
ALL_FRAMED = replace(ALL, crop_resize=False)
