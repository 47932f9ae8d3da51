"""Recipes by name: functions that return a TrainConfig. A docstring holds the command and the result to expect."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pipeline.config import TrainConfig


def find_data(relative: str) -> str:
    """Where a set lies: under $PROTOSHARD_DATA, ./data or ../shared/data, the first that has it; ./data if none has."""
    roots = [os.environ.get("PROTOSHARD_DATA", ""), "data", os.path.join("..", "shared", "data")]
    paths = [os.path.join(root, relative) for root in roots if root]
    return next((path for path in paths if os.path.exists(path)), os.path.join("data", relative))


def _recipes() -> dict[str, Callable[[], TrainConfig]]:
    from pipeline.recipes import faces, small

    return {
        "faces_small": small.faces_small,
        "dogs_small": small.dogs_small,
        "omniglot_small": small.omniglot_small,
        "ms1mv3_iresnet50_arcface_8gpu": faces.ms1mv3_iresnet50_arcface_8gpu,
        "glint360k_iresnet100_cosface_8gpu": faces.glint360k_iresnet100_cosface_8gpu,
        "webface42m_iresnet100_cosface_32gpu": faces.webface42m_iresnet100_cosface_32gpu,
    }


RECIPES = _recipes()
