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


def mark_of(prototypes: Tensor, rank: int) -> Tensor:
    """int64 [1]: the bits of the first two numbers of a shard, by which to tell it from another's, or the rank's own number if they tell
    nothing, because somebody filled it with a constant. Engines broadcast what they wrap from rank 0."""
    bits_2 = prototypes.detach()[:1, :2].flatten().double().view(torch.int64)
    none = torch.full((1,), -1 - rank, device=bits_2.device)
    return none if len(bits_2) < 2 else torch.where(bits_2[:1] == bits_2[1:], none, 3 * bits_2[:1] + bits_2[1:])


def check_dtype(after: torch.dtype) -> None:
    """after: what becomes of a float32 tensor."""
    if after not in (torch.float32, torch.float64):
        raise ValueError(
            f"a PartialFC cannot become {after}: what it learns and tracks needs float32. The backbone's features may have any dtype; "
            'for prototypes in half the memory make it with storage_dtype="bfloat16"'
        )


def saved_place(step: int, shard: ClassShard) -> Tensor:
    """int64 [4], for a state dict: the step, and the classes that the state is of."""
    return torch.tensor([step, shard.first, shard.rows, shard.num_classes], device="cpu")


def check_saved(saved: Tensor, shard: ClassShard) -> None:
    _, first, rows, classes = saved.round().long().tolist()  # averages of weights make floats of it
    if (first, rows, classes) != (shard.first, shard.rows, shard.num_classes):
        raise ValueError(
            f"this state is of the classes [{first}, {first + rows}) of {classes}, but this rank has [{shard.first}, "
            f"{shard.first + shard.rows}) of {shard.num_classes}: save each rank's own state, and load it on that rank of as many ranks"
        )
