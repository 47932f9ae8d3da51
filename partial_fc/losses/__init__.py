"""Losses: a registry by name. A loss is a frozen dataclass that asks the global batch for a few numbers per sample and makes a scalar of
them. Every module of this folder is a family of losses and is found by being here."""

import importlib
import pkgutil
from typing import TYPE_CHECKING, Any

from partial_fc.fields import Angle, Cosine, Margin, Scale, Share, Steps, Weight, Within
from partial_fc.losses.base import REGISTRY, Loss, build, name_of, register, softplus
from partial_fc.renamed import refuse

__all__ = ["REGISTRY", "Angle", "Cosine", "Loss", "Margin", "Scale", "Share", "Steps", "Weight", "Within"]
__all__ += ["build", "name_of", "register", "softplus"]

RENAMED = {
    "check_range": 'the annotation of the field: share: Annotated[float, Within(0.0, 1.0, "it is a share")]',
    "check_scale": "the annotation of the field: scale: Scale",
    "check_margin": "the annotation of the field: margin: Margin",
}


if not TYPE_CHECKING:  # a type checker would then accept any name

    def __getattr__(name: str) -> Any:
        refuse("partial_fc.losses", name, RENAMED)


for _family in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_family.name}")  # fills the registry
