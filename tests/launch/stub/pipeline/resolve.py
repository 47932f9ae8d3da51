"""The one recipe, and the error of a user who misspells it."""

from pipeline.config import CheckpointConfig, EngineConfig, RunConfig, TrainConfig


def resolve(recipe: str, overrides: list[str]) -> TrainConfig:
    if recipe != "stub":
        raise ValueError(f"There is no recipe {recipe!r}; did you mean 'stub'?")
    values = dict(override.split("=", 1) for override in overrides)
    run = RunConfig(values.pop("run.folder", "run"), values.pop("run.note", ""))
    engine = EngineConfig(values.pop("engine.device", "auto"))
    rest = int(values.pop("steps", 5)), float(values.pop("pause", 0)), values.pop("fail", "")
    return TrainConfig(run, engine, CheckpointConfig(), *rest)
