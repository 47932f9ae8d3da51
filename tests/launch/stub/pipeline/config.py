"""The two fields and the errors of the real configuration that the launcher meets."""

from dataclasses import dataclass


@dataclass(frozen=True)
class RunConfig:
    folder: str = "run"
    note: str = ""


@dataclass(frozen=True)
class TrainConfig:
    run: RunConfig = RunConfig()
    steps: int = 5
    pause: float = 0.0
    fail: str = ""


def resolve(recipe: str, overrides: list[str]) -> TrainConfig:
    if recipe != "stub":
        raise ValueError(f"There is no recipe {recipe!r}; did you mean 'stub'?")
    values = dict(override.split("=", 1) for override in overrides)
    run = RunConfig(values.pop("run.folder", "run"), values.pop("run.note", ""))
    return TrainConfig(run, int(values.pop("steps", 5)), float(values.pop("pause", 0)), values.pop("fail", ""))
