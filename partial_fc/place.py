"""Whether a classifier is where it was made, and its shard whole and its own: frameworks may not average, cut, cast or replace it."""

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from partial_fc import collectives
from partial_fc.collectives import Group
from partial_fc.shards import ClassShard


def check_place(made: tuple[int, int], group: Group) -> None:
    """made: (rank, ranks) when the shard was cut."""
    now = collectives.rank(group), collectives.world_size(group)
    if now != made:
        raise ValueError(
            f"this PartialFC was made as rank {made[0]} of {made[1]}, but is used as rank {now[0]} of {now[1]}, which own other classes: "
            "make it after init_process_group (in Lightning, in configure_model), in the group that uses it"
        )


def check_whole(prototypes: Tensor, shape: tuple[int, int]) -> None:
    if tuple(prototypes.shape) != shape:
        raise ValueError(
            f"prototypes have shape {list(prototypes.shape)}, but this rank's shard has {list(shape)}: keep the classifier out of engines "
            "that shard or flatten parameters (FSDP, ZeRO 3)"
        )
    ddp = DistributedDataParallel._active_ddp_module  # of the forward that we are in, if it is one of DDP
    if ddp is not None and any(parameter is prototypes for parameter in ddp._module_parameters):
        raise ValueError(
            "DistributedDataParallel has taken this classifier in, and would average shards of different classes: call it outside of DDP, "
            "or partial_fc.keep_out_of_ddp(module) before DDP(module)"
        )


@torch.no_grad()
def check_shards_differ(prototypes: Tensor, made: tuple[int, int], group: Group) -> None:
    """Engines broadcast what they wrap from rank 0. The host waits. 1 all-gather of a number of 8 bytes."""
    if made[1] == 1 or prototypes.is_meta:
        return
    bits_D = prototypes[:1].double().view(torch.int64).flatten()
    key = (bits_D * (2 * torch.arange(len(bits_D), device=bits_D.device) + 1)).sum(dim=0, keepdim=True)
    keys = collectives.gather_constant(key if len(bits_D) else key - 1 - made[0], group).tolist()
    twins = [rank for rank, other in enumerate(keys) if keys.index(other) < rank]
    if twins:
        raise ValueError(
            f"ranks {keys.index(keys[twins[0]])} and {twins[0]} hold the same prototypes, which should be of different classes: keep the "
            "classifier out of engines that broadcast or shard parameters (DDP: partial_fc.keep_out_of_ddp; DeepSpeed, FSDP: give the "
            "backbone alone), and load into each rank its own shard"
        )


def check_dtype(before: torch.dtype, after: torch.dtype) -> None:
    if after not in (before, torch.float32, torch.float64):
        raise ValueError(
            f"a PartialFC cannot become {after}: what it learns and tracks needs float32. The backbone's features may have any dtype; "
            'for prototypes in half the memory make it with storage_dtype="bfloat16"'
        )


def saved_place(step: int, shard: ClassShard) -> Tensor:
    """int64 [4], for a state dict: the step, and the classes that the state is of."""
    return torch.tensor([step, shard.first, shard.rows, shard.num_classes], device="cpu")


def check_saved(saved: Tensor, shard: ClassShard) -> None:
    _, first, rows, classes = saved.tolist()
    if (first, rows, classes) != (shard.first, shard.rows, shard.num_classes):
        raise ValueError(
            f"this state is of the classes [{first}, {first + rows}) of {classes}, but this rank has [{shard.first}, "
            f"{shard.first + shard.rows}) of {shard.num_classes}: save each rank's own state, and load it on that rank of as many ranks"
        )
