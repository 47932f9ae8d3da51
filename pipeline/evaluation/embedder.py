"""A network and how images become its embeddings: what a protocol is given."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from dali_loaders.config import DataConfig
from dali_loaders.sources import Source
from pipeline.evaluation.embed import Breaks, Look, embed


@dataclass(frozen=True)
class Embedder:
    """All ranks of `group` call its methods alike and get the same."""

    model: Callable[[Tensor], Tensor]  # images float32 [b, 3, H, W] to features [b, D]
    data: DataConfig
    batch_size: int = 64
    flip: bool = True  # add the features of the mirror image, where the protocol leaves it open
    device: torch.device | str = "cpu"
    rank: int = 0
    world_size: int = 1
    group: dist.ProcessGroup | None = None
    breaks: Breaks | None = None
    look: Look | None = None  # gets the embeddings of a labelled set

    def embed(self, source: Source, *, flip: bool | None = None, unit: bool = True) -> tuple[Tensor, np.ndarray]:
        """Embeddings float32 [n, D] and numbers int64 [n] of the n images of `source` that can be read, in its order; of unit length,
        unless the protocol needs the sum of the two features as it is. ValueError where no image can be read."""
        return embed(
            self.model, source, self.data,
            batch_size=self.batch_size, flip=self.flip if flip is None else flip, unit=unit,
            device=self.device, **self.ranks,
        )  # fmt: skip

    @property
    def ranks(self) -> dict[str, Any]:
        """What functions that share their work among ranks take: `all_pairs(..., **embedder.ranks)`."""
        return {"rank": self.rank, "world_size": self.world_size, "group": self.group, "breaks": self.breaks}
