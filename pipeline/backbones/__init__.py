"""Backbones by name: images float32 [b, 3, H, W] -> features [b, width], not normalised. `register` adds one's own (docs/backbones.md)."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import partial
from typing import Any, NamedTuple, TypeVar

from torch import nn

from partial_fc.fields import hint_at
from pipeline.backbones.ir import IR, IR_DEPTHS
from pipeline.backbones.iresnet import DEPTHS, IResNet
from pipeline.backbones.layers import layers_of
from pipeline.backbones.mobilefacenet import BLOCKS, MobileFaceNet
from pipeline.backbones.small import SmallNet
from pipeline.backbones.vit import SIZES, VisionTransformer

__all__ = ["BackboneConfig", "build", "check", "layers_of", "names", "options", "register"]


@dataclass(frozen=True)
class BackboneConfig:
    """Which network turns an image into features. A network refuses an option that it does not have.

    name: "iresnet18", 34, 50, 100 (the field's standard), 200, "mobilefacenet", "mobilefacenet_large", "vit_t", "vit_s", "vit_b", "vit_l":
        with the parameter names of InsightFace's arcface_torch. "small" (a few minutes of CPU), "small_nobn" (the same without batch
        statistics: row i of the output depends on image i only). "ir18", "ir34", "ir50", "ir101": those of AdaFace and CVLface. Or the name
        of a registered network.
    width: features per image.
    dropout: probability in front of the last linear layer.
    drop_path: share of the images for which the last block of a ViT is left out in training; falls evenly to 0 at the first block.
    mask_ratio: share of an image's patches that training keeps from the blocks of a ViT.
    float32_attention: the products between a ViT's tokens are in float32 even where the others are in bfloat16.
    checkpoint_activations: backward computes the inside of blocks again: far less memory, a third more computation, the same numbers.
    """

    name: str = "iresnet50"
    width: int = 512
    dropout: float = 0.0
    drop_path: float = 0.0
    mask_ratio: float = 0.0
    float32_attention: bool = False
    checkpoint_activations: bool = False


Create = Callable[..., nn.Module]  # (width=, image_size=, and those of BackboneConfig's options that it names)
_C = TypeVar("_C", bound=Create)
OPTIONS = {item.name: item.default for item in fields(BackboneConfig) if item.name not in ("name", "width")}


class _Network(NamedTuple):
    create: Create
    multiple_of: int  # an image size is a multiple of it
    options: frozenset[str]  # of OPTIONS


_NETWORKS: dict[str, _Network] = {}


def register(name: str, multiple_of: int = 1) -> Callable[[_C], _C]:
    """Gives a class or function a name that `backbone.name` can have.

    It is called with width=, image_size= and those of the options of BackboneConfig that its signature names, and returns a network from
    images [b, 3, image_size, image_size] to features [b, width]. Sizes of images that are no multiple of `multiple_of` are refused early.
    A name that another network has is refused.
    """
    if not isinstance(name, str):
        raise ValueError(f'a backbone is registered by name: put @register("NAME") above {getattr(name, "__name__", name)}')

    def add(create: _C) -> _C:
        taken = _NETWORKS.get(name)
        if taken and _definition(taken.create) != _definition(create):
            raise ValueError(f"there is a backbone named {name!r} already: register yours under another name")
        parameters = inspect.signature(create).parameters
        takes_all = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
        missing = [] if takes_all else [needed for needed in ("width", "image_size") if needed not in parameters]
        if missing:
            raise ValueError(f"backbone {name!r} must take {' and '.join(missing)}: it is called with width= and image_size=")
        given = {"width", "image_size", *OPTIONS}
        kinds = inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL
        wants = [key for key, each in parameters.items() if each.default is each.empty and each.kind not in kinds and key not in given]
        if wants:
            raise ValueError(f"backbone {name!r} asks for {', '.join(wants)}, which nothing gives it: give it a default")
        _NETWORKS[name] = _Network(create, multiple_of, frozenset(OPTIONS if takes_all else OPTIONS.keys() & parameters))
        return create

    return add


def _definition(create: Any) -> Any:
    """What is equal after a recipe file has run a second time in a process, where its classes and functions are others."""
    if isinstance(create, partial):
        return _definition(create.func), create.args, create.keywords
    return (create.__module__, create.__qualname__) if hasattr(create, "__qualname__") else create


for _depth in DEPTHS:
    register(f"iresnet{_depth}", multiple_of=16)(partial(IResNet, _depth))
for _size in IR_DEPTHS:
    register(_size, multiple_of=16)(partial(IR, _size))
for _size in BLOCKS:
    register(_size, multiple_of=16)(partial(MobileFaceNet, _size))
for _size in SIZES:
    register(_size)(partial(VisionTransformer, _size))
register("small", multiple_of=16)(SmallNet)
register("small_nobn", multiple_of=16)(partial(SmallNet, batch_norm=False))


def names() -> list[str]:
    """All names that `build` knows."""
    return list(_NETWORKS)


def options(name: str) -> frozenset[str]:
    """Which options of BackboneConfig the network of that name has."""
    return _NETWORKS[name].options


def check(config: BackboneConfig, image_size: int) -> None:
    """ValueError for an unknown name, an image size that the network does not take, an option that it does not have, or a value out of
    range."""
    what = f"backbone {config.name!r}"
    if config.name not in _NETWORKS:
        raise ValueError(f"there is no backbone named {config.name!r}: {hint_at(config.name, _NETWORKS)}")
    network = _NETWORKS[config.name]
    if image_size <= 0 or image_size % network.multiple_of:
        divisible = f" divisible by {network.multiple_of}" if network.multiple_of > 1 else " of at least 1"
        raise ValueError(f"{what} needs an image size{divisible}, not {image_size}: try 112 or 64.")
    if config.width < 1:
        raise ValueError(f"the width of {what} is {config.width}, but must be at least 1 (512 is usual).")
    for name, default in OPTIONS.items():
        value = getattr(config, name)
        if value != default and name not in network.options:
            having = ", ".join(other for other in _NETWORKS if name in _NETWORKS[other].options)
            raise ValueError(f"{what} has no {name}, which is {value}: leave it at {default} (those that have it: {having}).")
        if not isinstance(default, bool) and not 0.0 <= value < 1.0:
            raise ValueError(f"the {name} of {what} is {value}, but must be at least 0 and below 1.")


def build(config: BackboneConfig, image_size: int) -> nn.Module:
    """The network `config` describes, for square images of `image_size` pixels, with fresh weights from torch's global generator.

    Raises what `check` does.
    """
    check(config, image_size)
    network = _NETWORKS[config.name]
    chosen = {name: getattr(config, name) for name in OPTIONS if name in network.options}
    module = network.create(width=config.width, image_size=image_size, **chosen)
    if not isinstance(module, nn.Module):
        raise ValueError(f"backbone {config.name!r} is a {type(module).__name__}, but must be a torch.nn.Module.")
    return module
