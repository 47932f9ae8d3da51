"""Options of the classifier."""

from dataclasses import dataclass
from typing import Annotated, Literal

from partial_fc.fields import Steps, Within, check_fields

Dtype = Literal["float32", "bfloat16"]
Probability = Annotated[float, Within(0.0, 1.0, "it is a probability")]


@dataclass(frozen=True)
class ClassifierConfig:
    sample_rate: float = 1.0  # share of the classes outside the batch that take part in a step; 0.1 is usual above a million classes
    correct_rate: bool = False  # weigh each sampled negative by 1 / sample_rate, so that log-sum-exps estimate those over all classes
    hard_negatives: int = 0  # nearest classes of each class of the batch that are always sampled; costs a product with all classes
    dtype: Dtype = "float32"  # of the products with prototypes; sums are float32
    storage_dtype: Dtype = "float32"  # of the prototypes; updates are rounded stochastically, with float32 state
    tile_megabytes: int = 0  # of logits that are in memory at a time; 0 chooses by device: see device_policy.py
    gather_dtype: Dtype = "float32"  # of features between ranks, rounded once; their gradient travels as float32
    substitution_rate: Probability = 0.0  # of replacing the prototype of a class by one of its features: see substitution.py
    substitution_source: Literal["batch", "bank"] = "batch"  # of features: the gathered batch, with gradient, or the last ones
    substitution_staleness: Steps = 200  # steps after which a feature of the bank is no longer used; VPL's
    non_finite: Literal["raise", "skip"] = "skip"  # a step with NaN or infinity in features or loss is left out, or ends the run

    def __post_init__(self) -> None:
        if not 0 < self.sample_rate <= 1:
            raise ValueError(f"sample_rate is {self.sample_rate}, but must be above 0 and at most 1")
        if self.hard_negatives < 0 or (self.hard_negatives and self.sample_rate == 1):
            raise ValueError(
                f"hard_negatives is {self.hard_negatives}, but must be 0 or more, and above 0 only with a sample_rate below 1: at rate 1 "
                "all classes are in"
            )
        if self.tile_megabytes < 0:
            raise ValueError(f"tile_megabytes is {self.tile_megabytes}, but must be 0 (by device) or more")
        check_fields(self)
