"""The section `data.augment` of a configuration: random changes of a training image, and sets of them by name."""

from __future__ import annotations

from dataclasses import dataclass

# Largest values of numbers, of which the least is 0; least and largest of both ends of ranges.
_PROBABILITIES = ("geometry", "colour", "crop", "mask", "cutout", "blur", "low_resolution", "grey", "jpeg")
_LIMITS = dict.fromkeys((*_PROBABILITIES, "brightness", "contrast", "saturation"), 1.0) | {
    "zoom": 0.9,
    "shift": 0.9,
    "rotate": 180,
    "hue": 180,
}
_RANGES = {
    "crop_area": (0.01, 1.0),
    "crop_ratio": (0.1, 10.0),
    "cutout_area": (0.001, 1.0),
    "blur_sigma": (0.1, 20.0),
    "low_resolution_scale": (0.01, 1.0),
    "jpeg_quality": (1, 100),
}
# Changes whose amounts are all 0 unless they are set, which the probability alone does not show.
_AMOUNTS = {"geometry": ("rotate", "zoom", "shift"), "colour": ("brightness", "contrast", "saturation", "hue")}


@dataclass(frozen=True)
class AugmentConfig:
    """Random changes of a training image; the default mirrors it and does no more. docs/data.md has their order and their costs.

    Amounts (rotate to hue) are drawn uniformly and symmetrically around no change; zero switches one off. Pairs are the ends of ranges."""

    flip: bool = True  # mirrors left and right with probability 1/2
    rotate: float = 0.0  # largest angle in degrees, either way
    zoom: float = 0.0  # scale between 1 - zoom and 1 + zoom
    shift: float = 0.0  # up to this fraction of the side, in x and in y
    brightness: float = 0.0  # factor between 1 - brightness and 1 + brightness
    contrast: float = 0.0  # factor around mid-grey between 1 - contrast and 1 + contrast
    saturation: float = 0.0  # factor between 1 - saturation and 1 + saturation
    hue: float = 0.0  # largest turn of the colour circle in degrees, either way
    geometry: float = 1.0  # probability that an image is rotated, zoomed and shifted
    colour: float = 1.0  # probability that its brightness, contrast, saturation and hue change
    crop: float = 0.0  # probability that a part of the image is cut out
    crop_area: tuple[float, float] = (0.2, 1.0)  # of that part, as a fraction of the image's
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)  # its width : height, drawn on a logarithmic scale
    crop_resize: bool = True  # the part fills the image; false: it stays where it is, and the rest is black
    mask: float = 0.0  # probability of a plain mask over the lower half of an aligned face
    cutout: float = 0.0  # probability of a mid-grey rectangle
    cutout_area: tuple[float, float] = (0.02, 0.2)  # of the rectangle, as a fraction of the image's
    blur: float = 0.0  # probability of a Gaussian blur
    blur_sigma: tuple[float, float] = (0.5, 1.5)  # in pixels of the final image
    low_resolution: float = 0.0  # probability that the image is made smaller and then as large as before
    low_resolution_scale: tuple[float, float] = (0.2, 1.0)  # of the sides in between
    grey: float = 0.0  # probability of losing the colours
    jpeg: float = 0.0  # probability of being compressed once more
    jpeg_quality: tuple[int, int] = (30, 95)  # of that compression, from 1 to 100

    def __post_init__(self) -> None:
        if not isinstance(self.flip, bool):
            raise ValueError(f"augment.flip is {self.flip}; expected true or false (it mirrors with probability 1/2).")
        for name, limit in _LIMITS.items():
            value = getattr(self, name)
            if not 0 <= value <= limit:
                raise ValueError(f"augment.{name} is {value}; expected a number from 0 to {limit:g}.")
        for name, amounts in _AMOUNTS.items():
            if 0 < getattr(self, name) < 1 and not any(getattr(self, amount) for amount in amounts):
                raise ValueError(f"augment.{name} is {getattr(self, name)}, but nothing changes: set an amount, {', '.join(amounts)}.")
        for name, (least, most) in _RANGES.items():
            ends = getattr(self, name)
            if not isinstance(ends, tuple) or len(ends) != 2 or not least <= ends[0] <= ends[1] <= most:
                raise ValueError(f"augment.{name} is {ends}; expected two numbers, the smaller one first, from {least:g} to {most:g}.")

    @classmethod
    def named(cls, name: str) -> AugmentConfig:
        """What `--set data.augment=NAME` stands for: "none", "flip" (the default), or "adaface".

        "adaface" is the augmentation of Kim, Jain and Liu, "AdaFace: Quality Adaptive Margin for Face Recognition", 2022, with the
        ranges of its code: parts cut out in place, low resolution and colours, each with probability 0.2."""
        sets = {
            "none": cls(flip=False),
            "flip": cls(),
            "adaface": cls(crop=0.2, crop_resize=False, low_resolution=0.2, colour=0.2, brightness=0.5, contrast=0.5, saturation=0.5),
        }
        if name not in sets:
            raise ValueError(f"data.augment is {name!r}; expected one of {', '.join(sets)}, or set its fields one by one.")
        return sets[name]
