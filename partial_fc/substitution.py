"""Pairwise substitution: for one step, sample features stand in for the prototypes of some classes. The abstract of GFace (Zhao et al., TIP
2025) names the mechanism; the form is ours. Features come from the gathered batch, with gradient to both sides, or from the bank."""

import torch
from torch import Tensor

from partial_fc import sampling
from partial_fc.bank import Bank
from partial_fc.collectives import Group
from partial_fc.columns import Columns, Mask, Placement
from partial_fc.positives import positives_of, share_of, within
from partial_fc.prototype_sources import AllRows, ConcatenatedRows

STREAM = 1  # of random numbers; the sample of classes uses none


def substitute(columns: Columns, features_BD: Tensor, labels_B: Tensor, rate: float, seed: int, step: int, group: Group) -> Columns:
    """The columns, with the prototype of each class of the batch replaced by its first sample with probability `rate`, decided by numbers
    keyed (seed, step, class). For that sample, which must not meet itself, the prototype stays the target. The samples are further columns,
    B / N on each rank. Communicates nothing."""
    positives, mine, count = positives_of(labels_B), share_of(len(labels_B), group), columns.size
    is_replaced_B = sampling.uniform(labels_B, seed, step, STREAM) < rate
    samples_B = within(positives.first_B, mine)
    samples_B = torch.where(samples_B >= 0, samples_B + count, -1)
    prototypes_B = columns.targets_B
    included_n = torch.ones(count + 1, dtype=torch.bool, device=labels_B.device)  # the last entry takes other ranks' columns
    if columns.mask.included_n is not None:
        included_n[:-1] = columns.mask.included_n
    included_n[torch.where(is_replaced_B & (prototypes_B >= 0), prototypes_B, count)] = False
    bias_n, placement = columns.bias_n, columns.placement
    return columns._replace(
        source=ConcatenatedRows(columns.source, AllRows(features_BD[mine])),
        targets_B=samples_B.where(is_replaced_B & ~positives.is_first_B, prototypes_B),
        mask=Mask(
            samples_B.where(is_replaced_B, prototypes_B),
            included_n=torch.cat([included_n[:-1], (is_replaced_B & positives.is_first_B)[mine]]),
        ),
        bias_n=None if bias_n is None else torch.cat([bias_n, bias_n.new_zeros(mine.stop - mine.start)]),
        placement=Placement(
            placement.first_class, torch.cat([columns.classes(), labels_B[mine]]), placement.rows_n, placement.column_S, mine
        ),
    )


def substitute_from_bank(columns: Columns, bank: Bank, staleness: int, rate: float, seed: int, step: int) -> Columns:
    """The columns, with the prototype of each class whose feature in the bank is at most `staleness` steps old replaced by that feature
    with probability `rate`, decided by numbers keyed (seed, step, class). In this step neither the bank nor a replaced prototype has a
    gradient, but momentum and weight decay still move the prototype. Communicates nothing. No anchor meets itself, as the bank is written
    after the step; but a class of one image meets that image's earlier feature."""
    first = columns.placement.first_class
    ids_S = torch.arange(first, first + len(bank.steps_S), device=bank.steps_S.device)
    is_replaced_S = bank.fresh(step, staleness) & (sampling.uniform(ids_S, seed, step, STREAM) < rate)
    return columns.mixed(bank, is_replaced_S.to(bank.features_SD.dtype))
