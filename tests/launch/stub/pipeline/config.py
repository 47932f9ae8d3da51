"""The fields of the real configuration that the launcher meets."""

from dataclasses import dataclass


@dataclass(frozen=True)
class RunConfig:
    folder: str = "run"
    note: str = ""
    timeout: float = 60.0


@dataclass(frozen=True)
class EngineConfig:
    device: str = "auto"


@dataclass(frozen=True)
class CheckpointConfig:
    folder: str = ""


@dataclass(frozen=True)
class TrainConfig:
    run: RunConfig = RunConfig()
    engine: EngineConfig = EngineConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    steps: int = 5
    pause: float = 0.0
    fail: str = ""
