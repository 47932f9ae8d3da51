"""Recipes by name: functions that return a TrainConfig. A docstring holds the command and the result to expect."""

from __future__ import annotations

from collections.abc import Callable

from pipeline.config import TrainConfig
from pipeline.recipes import faces, small
from pipeline.recipes.data import find_data

__all__ = ["RECIPES", "find_data"]

RECIPES: dict[str, Callable[[], TrainConfig]] = {
    "photos": small.photos,
    "faces_small": small.faces_small,
    "dogs_small": small.dogs_small,
    "omniglot_small": small.omniglot_small,
    "ms1mv3_iresnet50_arcface_8gpu": faces.ms1mv3_iresnet50_arcface_8gpu,
    "ms1mv3_mobilefacenet_arcface_8gpu": faces.ms1mv3_mobilefacenet_arcface_8gpu,
    "glint360k_iresnet100_cosface_8gpu": faces.glint360k_iresnet100_cosface_8gpu,
    "glint360k_mobilefacenet_cosface_8gpu": faces.glint360k_mobilefacenet_cosface_8gpu,
    "webface42m_iresnet100_cosface_32gpu": faces.webface42m_iresnet100_cosface_32gpu,
    "webface42m_vit_t_64gpu": faces.webface42m_vit_t_64gpu,
    "webface42m_vit_b_64gpu": faces.webface42m_vit_b_64gpu,
}
