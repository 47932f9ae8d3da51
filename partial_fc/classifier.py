"""PartialFC: the model-parallel classifier. Each rank holds the prototypes of its own classes; the loss is the global batch's."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from partial_fc import collectives
from partial_fc.collectives import Group
from partial_fc.losses import Loss
from partial_fc.shards import ClassShard, initial_prototypes
from partial_fc.similarity import hardest_non_target, similarity_statistics


class PartialFC(nn.Module):
    """Prototype matrix [num_classes, width] sharded by rows over the ranks of `group`, with a loss on top.

    num_classes        identities of the whole job
    width              features per sample, D
    loss               from `losses.build`; may be replaced between steps (margin warm-up)
    seed               of the first prototypes, which depend on the class id alone and not on the number of ranks
    group              process group; without an initialised one this is an ordinary single-process module
    kernel             "auto" (chunked) or a name in similarity.KERNELS
    feature_gradient   "averaged": multiplied by the world size, because a data-parallel engine (DDP, DeepSpeed) then averages over
                       ranks; "global": the gradient of the returned loss itself. Nowhere else does this factor appear.

    `prototypes` is this rank's [S, D] parameter, float32, kept out of the data-parallel engine (which would average it over ranks).
    """

    def __init__(
        self,
        num_classes: int,
        width: int,
        loss: Loss,
        *,
        seed: int = 0,
        group: Group = None,
        kernel: str = "auto",
        feature_gradient: Literal["averaged", "global"] = "averaged",
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        if feature_gradient not in ("averaged", "global"):
            raise ValueError(f"feature_gradient is {feature_gradient!r}, but must be 'averaged' or 'global'")
        ranks = collectives.world_size(group)
        self.shard = ClassShard.of_rank(num_classes, collectives.rank(group), ranks)
        self.width, self.loss, self.group = width, loss, group
        self.kernel = "chunked" if kernel == "auto" else kernel
        self.gradient_factor = float(ranks) if feature_gradient == "averaged" else 1.0
        self.prototypes = nn.Parameter(initial_prototypes(self.shard, width, seed).to(device))

    def forward(self, features_bD: Tensor, labels_b: Tensor) -> Tensor:
        """Mean loss over the global batch, equal on every rank. Every rank calls it with its own, equally many, rows.

        features_bD  float [b, D], with gradient     labels_b  int64 [b], global class ids
        Communicates 1 all-gather of B D floats, 1 of B labels, 1 all-reduce of 2 B floats; backward 1 reduce-scatter of B D floats.
        """
        features_BD = collectives.gather_rows(features_bD.float(), self.group, self.gradient_factor)
        labels_B = collectives.gather_constant(labels_b, self.group)
        statistics = similarity_statistics(
            features_BD,
            self.prototypes,
            labels_B,
            scale=self.loss.scale,
            first_class=self.shard.first,
            kernel=self.kernel,
            group=self.group,
        )
        return self.loss(statistics)

    @torch.no_grad()
    def cosines(self, features_bD: Tensor, labels_b: Tensor) -> tuple[Tensor, Tensor]:
        """(target, hardest non-target) cosine of each of the B samples of the global batch, for monitoring; costs a forward pass."""
        features_BD = collectives.gather_constant(features_bD.float(), self.group)
        labels_B = collectives.gather_constant(labels_b, self.group)
        return hardest_non_target(features_BD, self.prototypes, labels_B, first_class=self.shard.first, group=self.group)

    def extra_repr(self) -> str:
        first, stop = self.shard.first, self.shard.first + self.shard.rows
        return f"classes [{first}, {stop}) of {self.shard.num_classes}, width {self.width}, {self.loss}"
