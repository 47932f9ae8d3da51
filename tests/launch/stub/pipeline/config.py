"""The fields of the real configuration that the launcher meets."""

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
