"""Which samples of a batch share an identity, and which of them are this rank's columns if samples stand in for prototypes."""

from typing import NamedTuple

import torch
from torch import Tensor

from partial_fc import collectives
from partial_fc.collectives import Group


class Positives(NamedTuple):
    """For each sample of a batch, the samples of its identity."""

    first_B: Tensor  # int64: the first sample of its identity, by place in the batch
    is_first_B: Tensor  # bool
    other_B: Tensor  # int64: another sample of its identity: the first one, or for the first one the second
    has_other_B: Tensor  # bool: whether there is another one


def positives_of(labels_B: Tensor) -> Positives:
    sorted_B, order_B = labels_B.sort(stable=True)
    start_B = torch.searchsorted(sorted_B, labels_B)  # place of the first sample of the identity among the sorted ones
    last_B = torch.searchsorted(sorted_B, labels_B, right=True) - 1
    first_B = order_B[start_B]
    is_first_B = first_B == torch.arange(len(labels_B), device=labels_B.device)
    return Positives(first_B, is_first_B, order_B[torch.where(is_first_B, torch.minimum(start_B + 1, last_B), start_B)], last_B > start_B)


def share_of(batch: int, group: Group) -> slice:
    """The samples of the gathered batch that are this rank's columns."""
    share = -(-batch // collectives.world_size(group))
    first = min(batch, collectives.rank(group) * share)
    return slice(first, min(batch, first + share))


def within(places_B: Tensor, mine: slice, is_wanted_B: Tensor | None = None) -> Tensor:
    """Places of samples within a slice of the batch; -1 for those outside it or not wanted."""
    is_here_B = (places_B >= mine.start) & (places_B < mine.stop)
    return (places_B - mine.start).where(is_here_B if is_wanted_B is None else is_here_B & is_wanted_B, -1)
