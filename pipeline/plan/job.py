"""What is planned: a whole training step with a backbone, or the classifier alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from pipeline import backbones

Precision = Literal["float32", "bfloat16"]
OptimizerName = Literal["sgd", "adamw"]
BYTES = {"float32": 4, "bfloat16": 2}
STATES = {"sgd": 1, "adamw": 2}  # float32 numbers that an optimizer keeps per weight


@dataclass(frozen=True)
class Job:
    identities: int
    width: int = 512
    batch: int = 1024  # of all ranks and micro-batches
    ranks: int = 1
    accumulation: int = 1  # micro-batches of a step
    rate: float = 1.0
    optimizer: OptimizerName = "sgd"  # of the prototypes
    dtype: Precision = "bfloat16"  # of the products with prototypes
    storage_dtype: Precision = "float32"  # of the prototypes
    in_backward: bool = False
    bank: bool = False  # of last features, which substitution_source="bank" and some losses keep
    backbone: str = "none"  # a name of pipeline.backbones; none for the classifier alone
    checkpoint_activations: bool = False  # of its blocks
    image_size: int = 112
    backbone_optimizer: OptimizerName = "sgd"
    frozen: tuple[str, ...] = ()  # parts of the backbone that do not move
    ema: bool = False  # an average of the backbone's weights beside them
    engine: Literal["ddp", "deepspeed"] = "ddp"
    zero_stage: Literal[1, 2, 3] = 1
    precision: Literal["auto", "float32", "bfloat16", "float16"] = "auto"  # of the backbone's products
    asynchronous: bool = True  # checkpoints are written from a copy in the memory of the host

    def __post_init__(self) -> None:
        for name in ("identities", "width", "batch", "ranks", "accumulation"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name} is {getattr(self, name)}, but must be at least 1")
        if not 0 < self.rate <= 1:
            raise ValueError(f"--rate is {self.rate}, but must be above 0 and at most 1")
        if self.in_backward and self.accumulation > 1:
            raise ValueError("--in-backward moves prototypes in every backward pass, of which --accumulation takes several: choose one")
        if self.ema and self.engine == "deepspeed" and self.zero_stage == 3:
            raise ValueError("--ema averages whole weights, which --zero-stage 3 shards over ranks: choose one of them")
        if self.has_backbone:
            backbones.check(self.network, self.image_size)
            parts = self.ranks * self.accumulation
            if self.batch % self.accumulation or self.batch < 2 * parts:
                multiple = f"a multiple of {self.accumulation} from {2 * parts} on" if self.accumulation > 1 else f"at least {2 * parts}"
                raise ValueError(
                    f"--batch is {self.batch}, but must give each of {self.ranks} ranks at least 2 images of each of {self.accumulation} "
                    f"micro-batches, which are equally large: use {multiple}"
                )

    @property
    def has_backbone(self) -> bool:
        return self.backbone != "none"

    @property
    def network(self) -> backbones.BackboneConfig:
        return backbones.BackboneConfig(self.backbone, self.width, checkpoint_activations=self.checkpoint_activations)

    @property
    def rows(self) -> int:
        """Classes of the rank that has the most."""
        return -(-self.identities // self.ranks)

    @property
    def sampled(self) -> float:
        """How many of these classes take part in a step, on average."""
        return self.rows if self.rate == 1 else min(self.rows, self.rows * self.rate + self.batch / self.ranks)

    @property
    def gathered(self) -> int:
        """Samples that the classifier sees at once."""
        return -(-self.batch // self.accumulation)

    @property
    def local(self) -> int:
        """Images of a rank that the backbone sees at once."""
        return -(-self.gathered // self.ranks)
