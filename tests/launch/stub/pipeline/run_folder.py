"""The stub takes any folder for a run's."""

from pipeline.config import TrainConfig


def fault(config: TrainConfig, resume: str) -> str | None:
    return None
