"""The stub has no batch that ranks would have to share."""

from pipeline.config import TrainConfig


def check(config: TrainConfig, ranks: int) -> None:
    pass
