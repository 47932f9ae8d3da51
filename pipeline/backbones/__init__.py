"""Backbones by name: images float32 [b, 3, H, W] -> features [b, width], not normalised."""

import difflib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from torch import nn

from pipeline.backbones.iresnet import DEPTHS, IResNet
from pipeline.backbones.small import SmallNet


@dataclass(frozen=True)
class BackboneConfig:
    """Which network turns an image into features.

    name: "iresnet18", "iresnet34", "iresnet50", "iresnet100" (the field's standard, parameter names as in InsightFace's arcface_torch),
        "small" (a few minutes of CPU) or "small_nobn" (the same without batch statistics: row i of the output depends on image i only).
    width: features per image.
    dropout: probability in front of the last linear layer.
    """

    name: str = "iresnet50"
    width: int = 512
    dropout: float = 0.0


_BUILDERS: dict[str, Callable[..., nn.Module]] = {
    **{f"iresnet{depth}": partial(IResNet, depth) for depth in DEPTHS},
    "small": SmallNet,
    "small_nobn": partial(SmallNet, batch_norm=False),
}


def names() -> list[str]:
    """All names that `build` knows."""
    return list(_BUILDERS)


def check(config: BackboneConfig, image_size: int) -> None:
    """ValueError for an unknown name, an image size that is not a positive multiple of 16, a width below 1 or a dropout outside [0, 1)."""
    if config.name not in _BUILDERS:
        near = difflib.get_close_matches(config.name, _BUILDERS, n=1, cutoff=0.4)
        hint = f"did you mean {near[0]!r}?" if near else f"known are {', '.join(_BUILDERS)}."
        raise ValueError(f"there is no backbone named {config.name!r}: {hint}")
    if image_size <= 0 or image_size % 16:
        raise ValueError(f"backbone {config.name!r} needs an image size divisible by 16, not {image_size}: try 112 or 64.")
    if config.width < 1:
        raise ValueError(f"the width of backbone {config.name!r} is {config.width}, but must be at least 1 (512 is usual).")
    if not 0.0 <= config.dropout < 1.0:
        raise ValueError(f"the dropout of backbone {config.name!r} is {config.dropout}, but must be at least 0 and below 1.")


def build(config: BackboneConfig, image_size: int) -> nn.Module:
    """The network `config` describes, for square images of `image_size` pixels, with fresh weights from torch's global generator.

    Raises what `check` does.
    """
    check(config, image_size)
    return _BUILDERS[config.name](width=config.width, image_size=image_size, dropout=config.dropout)
