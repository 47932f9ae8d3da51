"""A classifier for more identities than before: new ones are added, or several sets merged. Learned prototypes are kept."""

import math
from collections import Counter
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from partial_fc import bank, collectives
from partial_fc.classifier import PartialFC
from partial_fc.collectives import Group
from partial_fc.optimizers import RowOptimizer
from partial_fc.shards import ClassShard, initial_prototypes

BLOCK_ELEMENTS = 1 << 24  # a rank sends this much of a matrix at a time (64 MB in float32), and receives up to N times as much


def merge_identities(sets: Sequence[Sequence[str]], same_name: bool = True) -> tuple[list[str], list[np.ndarray]]:
    """(names of the merged set; for each set an int64 array that maps its labels to those of the merged set), in order of appearance.
    same_name: a name in several sets is one identity; otherwise it is another in each, and the number of the set becomes a prefix,
    "1/anna"."""
    label_of: dict[str, int] = {}
    maps = []
    for number, names in enumerate(sets):
        if len(set(names)) < len(names):
            name, times = Counter(names).most_common(1)[0]
            raise ValueError(f"set {number} has {times} identities called {name!r}: give every identity of a set a name of its own")
        keys = names if same_name else [f"{number}/{name}" for name in names]
        maps.append(np.array([label_of.setdefault(key, len(label_of)) for key in keys], np.int64))
    return list(label_of), maps


@torch.no_grad()
def grow(
    classifier: PartialFC,
    optimizer: torch.optim.Optimizer | None,
    num_classes: int,
    new_labels: np.ndarray | None = None,
    class_counts: Tensor | None = None,
) -> None:
    """Gives a classifier `num_classes` classes, between two steps. Every rank calls it.

    Old prototypes and their rows of the optimizer's state are kept to the bit, whichever rank owns them afterwards; new ones start like
    those of a new classifier of that size, with zero state. So do the loss's learned values by class, and the bank of last features.
    `classifier.prototypes` becomes another tensor, which the optimizer knows. Learned scalars and tracked values stay; a queue of BroadFace
    is among them, so new_labels, which would change the meaning of its labels, are refused.

    new_labels    int64, the new label of each old class. By default the new classes follow the old ones.
    class_counts  int64 [num_classes], images of each identity, if the classifier has them

    Communicates as `move_rows` for the prototypes and each tensor with a row per class; keeps an old and a new copy of one at a time."""
    old, ranks = classifier.shard, collectives.world_size(classifier.group)
    new = ClassShard.of_rank(num_classes, collectives.rank(classifier.group), ranks)
    _check_labels(new_labels, old.num_classes, num_classes)
    if classifier.current.draws:
        raise ValueError("a classifier grows between two steps: call the optimizer's step() and zero_grad() before")
    if new_labels is not None and any(name.endswith("queue_labels") for name in classifier.tracked_names):
        raise ValueError("the loss keeps samples of earlier steps by their labels: grow without new_labels, or with a new classifier")
    has_counts = classifier.class_counts_S is not None or class_counts is not None
    if has_counts and (class_counts is None or class_counts.shape != (num_classes,)):
        raise ValueError(f"the classifier knows the images of each identity: give grow class_counts=, int64 [{num_classes}]")
    if optimizer is None and classifier.companion is not None:
        raise ValueError("this classifier has an optimizer, whose state must grow with it: give it to grow(classifier, optimizer, ...)")
    first_bank = bank.empty(new.rows, classifier.width, classifier.prototypes.device) if classifier.has_bank else None
    if isinstance(optimizer, RowOptimizer):
        optimizer.flush()

    def moved(old_S: Tensor, new_S: Tensor) -> Tensor:
        move_rows(old_S, old, new_S, new, new_labels, classifier.group)
        return new_S

    def replaced(before: nn.Parameter, first_S: Tensor) -> nn.Parameter:
        """The parameter that takes the place of another, in the optimizer too."""
        after = nn.Parameter(moved(before.data, first_S.to(before)), requires_grad=before.requires_grad)
        if optimizer is not None:
            for group in optimizer.param_groups:
                group["params"] = [after if parameter is before else parameter for parameter in group["params"]]
            state = optimizer.state.pop(before, {})
            for name, value in state.items():
                if isinstance(value, Tensor) and value.ndim:  # one row per class
                    state[name] = moved(value, value.new_zeros(new.rows, *value.shape[1:]))
            optimizer.state[after] = state
        return after

    classifier.prototypes = replaced(classifier.prototypes, initial_prototypes(new, classifier.width, classifier.seed))
    for name, value in classifier.loss.learned_by_class(num_classes).items():
        classifier.learned[name] = replaced(classifier.learned[name], torch.full((new.rows,), value))
    if classifier.bank is not None and first_bank is not None:
        classifier.bank_features = moved(classifier.bank.features_SD, first_bank.features_SD.to(classifier.bank.features_SD))
        classifier.bank_steps = moved(classifier.get_buffer("bank_steps"), first_bank.steps_S)
    classifier.shard, classifier.current.sample = new, None
    if class_counts is not None:
        classifier.count_images(class_counts)
    if isinstance(optimizer, RowOptimizer) and optimizer.is_lazy:
        optimizer._made_S = optimizer._made_S.new_zeros(new.rows)  # all rows are up to date


@torch.no_grad()
def copy_prototypes(source: PartialFC, target: PartialFC, new_labels: np.ndarray) -> None:
    """Prototype c of `source` becomes prototype new_labels[c] of `target`, whichever ranks of their common group own them. The classifier
    of a merged set can thus start from those of its parts; where these share an identity, the last copy counts:

        names, maps = merge_identities([names_a, names_b])
        merged = PartialFC(len(names), ...)
        copy_prototypes(b, merged, maps[1])
        copy_prototypes(a, merged, maps[0])
    """
    if source.width != target.width:
        raise ValueError(f"prototypes of width {source.width} cannot be copied into a classifier of width {target.width}")
    _check_labels(new_labels, source.shard.num_classes, target.shard.num_classes)
    for each in (source, target):
        if each.companion is not None:
            each.companion.flush()
    move_rows(source.prototypes.data, source.shard, target.prototypes.data, target.shard, new_labels, target.group)


def move_rows(old_S: Tensor, old: ClassShard, new_S: Tensor, new: ClassShard, new_labels: np.ndarray | None, group: Group) -> None:
    """Writes row c of a matrix [old.num_classes, ...] into row new_labels[c] of one of [new.num_classes, ...], both sharded over `group`,
    in rounds of at most BLOCK_ELEMENTS from each rank: 1 all-to-all each, and each row travels once. Nothing else is exchanged. Rows whose
    new label is -1 stay behind."""
    ranks, rank = collectives.world_size(group), collectives.rank(group)
    rows = max(1, BLOCK_ELEMENTS // max(1, math.prod(old_S.shape[1:])))
    rows_per_rank = ClassShard.of_rank(new.num_classes, 0, ranks).rows

    def parcel(sender: int, first: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(row at the sender, new label, receiver) of all that a rank sends in the round that starts at row `first`, by receiver."""
        shard = ClassShard.of_rank(old.num_classes, sender, ranks)
        sent = np.arange(first, max(first, min(first + rows, shard.rows)))
        labels = sent + shard.first if new_labels is None else new_labels[sent + shard.first]
        sent, labels = sent[labels >= 0], labels[labels >= 0]
        order = np.argsort(labels // rows_per_rank, kind="stable")
        return sent[order], labels[order], labels[order] // rows_per_rank

    for first in range(0, ClassShard.of_rank(old.num_classes, 0, ranks).rows, rows):
        parcels = [parcel(sender, first) for sender in range(ranks)]
        sent, _, receivers = parcels[rank]
        arriving = [labels[receivers == rank] for _, labels, receivers in parcels]
        received = collectives.exchange(
            old_S[torch.from_numpy(sent).to(old_S.device)],
            np.bincount(receivers, minlength=ranks).tolist(),
            [len(labels) for labels in arriving],
            group,
        )
        new_S[torch.from_numpy(np.concatenate(arriving) - new.first).to(new_S.device)] = received.to(new_S.dtype)


def _check_labels(new_labels: np.ndarray | None, old_classes: int, new_classes: int) -> None:
    """Every old class needs a place of its own."""
    if new_classes < old_classes:
        raise ValueError(f"{old_classes} classes cannot become {new_classes}: a classifier keeps all its old ones")
    if new_labels is None:
        return
    if new_labels.shape != (old_classes,) or new_labels.dtype != np.int64:
        raise ValueError(
            f"new_labels is {new_labels.dtype} of shape {new_labels.shape}, but must be int64 of shape ({old_classes},), one per old class"
        )
    if new_labels.min() < 0 or new_labels.max() >= new_classes or len(np.unique(new_labels)) < old_classes:
        raise ValueError(f"new_labels must give every old class a label of its own in [0, {new_classes})")
