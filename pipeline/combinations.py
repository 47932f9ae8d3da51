"""Options of different sections that exclude each other, each refused in a sentence before anything is built."""

from __future__ import annotations

from pipeline.config import TrainConfig


def check(config: TrainConfig) -> None:
    """ValueError that names both options and what to choose."""
    run, optimizer, engine = config.run, config.optimizer, config.engine
    if optimizer.in_backward:
        because = "optimizer.in_backward moves prototypes in every backward pass, but "
        if run.accumulation > 1:
            raise ValueError(f"{because}run.accumulation = {run.accumulation} takes several for a step: choose one of them")
        if engine.precision == "float16":
            raise ValueError(f"{because}engine.precision=float16 judges gradients after it: set optimizer.in_backward=False")
        if run.spike:
            raise ValueError(f"{because}run.spike judges the loss after it: choose one of them")
    if engine.shards_weights and run.ema:
        raise ValueError("run.ema averages whole weights, which engine.zero_stage=3 shards over ranks: set run.ema=0 or another stage")
    if run.deterministic and optimizer.unsampled == "lazy":
        raise ValueError(
            "run.deterministic excludes optimizer.unsampled=lazy: a save makes rows catch up, which rounds otherwise than later, so "
            "that a run which saved for a stop would differ from one that did not: set optimizer.unsampled=frozen"
        )
