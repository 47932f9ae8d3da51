"""What a run evaluates, and how often."""

from dataclasses import dataclass


@dataclass(frozen=True)
class EvaluationConfig:
    data: str = ""  # labelled folder, .tar or .rec of identities that are not trained on: all pairs, at the end of the run; "" for none
    pairs: tuple[str, ...] = ()  # InsightFace .bin pair sets, at the same times
    every_epochs: float = 0.0  # evaluate also during training; 0: only at the end
    at_start: bool = False  # also the untrained network, for comparison
    flip: bool = True  # add the features of the mirror image
    batch_size: int = 64  # images per forward pass on each rank

    def __post_init__(self) -> None:
        if self.every_epochs < 0 or self.batch_size < 1:
            raise ValueError(
                f"evaluation.every_epochs is {self.every_epochs} (must not be negative), "
                f"evaluation.batch_size is {self.batch_size} (must be at least 1)"
            )
